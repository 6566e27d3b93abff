"""Every fuzz target for a bounded time, by a fixed seed; RINGNET_LONG=1 (tools/test --long) makes it minutes.

Also: what fuzzing once found (tests/fuzz/seeds), that runs repeat, and that each oracle can say no.
"""
from __future__ import annotations

import importlib
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests.fuzz import pyfuzz, targets
from tests.fuzz.targets import C_TARGETS, ENV, LIBFUZZER_TARGETS, PYTHON_TARGETS

LONG = bool(os.environ.get("RINGNET_LONG"))
RUNS = {"egress": 1200, "promote": 600, "reassembly": 6000, "link": 1500, "dhcp": 300, "dns": 300, "control": 100}
COVERED_RUNS = {"classify": 30_000, "egress": 150, "promote": 150, "reassembly": 2000, "link": 600}  # by libFuzzer: a few seconds each
MINUTES = 5  # each, with RINGNET_LONG
# A generator that no longer gets anywhere would find nothing either: so much at least, for the runs above.
REACHED = {
    "egress": {"connections": 1500, "whole": 500, "up_bytes": 1_000_000, "down_bytes": 100_000, "resets": 1, "udp": 100},
    "promote": {"up_bytes": 2_000_000, "down_bytes": 4_000_000, "acks": 600, "relent": 1500, "restarts": 500, "scribbled": 200,
                "trains": 300},
    "reassembly": {"whole": 2000, "expired": 5000},
    "link": {"bridged": 300, "served": 300, "answered": 2000, "trains": 200},
    "dhcp": {"dhcp_replies": 500, "dhcp_naks": 50, "drop_dhcp_bad": 500},
    "dns": {"answers": 800, "dns_forwarded": 400, "dns_local": 200, "drop_dns_bad": 200, "drop_dns_reply": 100},
    "control": {"decoded": 1000, "refused": 1000, "packets": 20, "packets_refused": 200},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return targets.objects(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, parts: list[Path]) -> dict[str, Path]:
    """The C targets, built once a worker."""
    tmp = tmp_path_factory.mktemp("fuzz")
    return {name: targets.build(name, tmp / name, parts) for name in C_TARGETS}


def _run(program: Path, *args: object, keep: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(program), "-keep", str(keep), *map(str, args)], env=ENV, capture_output=True, text=True,
                          timeout=60 * MINUTES + 300)
    if check:
        assert done.returncode == 0 and done.stderr == "", done.stderr[-6000:]
    return done


@pytest.mark.xdist_group("fuzz")
@pytest.mark.timeout(60 * MINUTES + 400 if LONG else 900)
@pytest.mark.parametrize("name", C_TARGETS)
def test_c_target(name: str, programs: dict[str, Path], tmp_path: Path) -> None:
    much = ("-seconds", 60 * MINUTES) if LONG else ("-runs", RUNS[name])
    found = targets.numbers(_run(programs[name], "-seed", 1, *much, *targets.seeds(name), keep=tmp_path).stdout)
    assert found["runs"] >= RUNS[name]
    assert all(found[k] >= v for k, v in REACHED[name].items()), found


@pytest.fixture(scope="module")
def covered_parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return targets.objects(tmp_path_factory.mktemp("covered"), "libfuzzer")


@pytest.mark.xdist_group("libfuzzer")
@pytest.mark.timeout(60 * MINUTES + 400 if LONG else 900)
@pytest.mark.parametrize("name", LIBFUZZER_TARGETS)
def test_libfuzzer(name: str, covered_parts: list[Path], tmp_path: Path) -> None:
    """The same targets, but led by what they cover; an input that fails is kept and named."""
    program = targets.build(name, tmp_path / "fuzz", covered_parts, engine="libfuzzer")
    keep = Path(os.environ.get("RINGNET_FUZZ_KEEP", tmp_path))
    much = f"-max_total_time={60 * MINUTES}" if LONG else f"-runs={COVERED_RUNS[name]}"
    done = subprocess.run([str(program), "-seed=1", "-max_len=16384", "-print_final_stats=1", much, f"-artifact_prefix={keep}/",
                           str(targets.corpus(name, tmp_path / "corpus"))], env=ENV, capture_output=True, text=True,
                          timeout=60 * MINUTES + 300)
    assert done.returncode == 0, done.stderr[-6000:]
    executed = int(re.findall(r"stat::number_of_executed_units: +(\d+)", done.stderr)[0])
    covered = [int(n) for n in re.findall(r"\bcov: (\d+)", done.stderr)]
    assert executed >= COVERED_RUNS[name] and max(covered) > min(covered) > 0, done.stderr[-3000:]


@pytest.mark.xdist_group("libfuzzer")
def test_libfuzzer_keeps_what_failed(covered_parts: list[Path], tmp_path: Path) -> None:
    program = targets.build("egress", tmp_path / "plant", covered_parts, "-DPLANT", engine="libfuzzer")
    done = subprocess.run([str(program), "-seed=1", "-runs=2000", "-max_len=16384", f"-artifact_prefix={tmp_path}/",
                           str(targets.corpus("egress", tmp_path / "corpus"))], env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "ACK of what was sent" in done.stderr
    (kept,) = tmp_path.glob("crash-*")
    assert kept.stat().st_size > 0


@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("name", C_TARGETS)
def test_c_target_is_repeatable(name: str, programs: dict[str, Path], tmp_path: Path) -> None:
    """What the host kernel does in between may differ; the inputs may not."""
    once, again = (targets.numbers(_run(programs[name], "-seed", 7, "-first", 5, "-runs", 30, keep=tmp_path).stdout)
                   for _ in range(2))
    assert once["runs"] == again["runs"] == 30
    assert name in ("egress", "promote") or once == again


@pytest.mark.xdist_group("fuzz")
def test_the_egress_oracle_can_say_no(parts: list[Path], tmp_path: Path) -> None:
    program = targets.build("egress", tmp_path / "plant", parts, "-DPLANT")
    done = _run(program, "-seed", 1, "-runs", 200, keep=tmp_path, check=False)
    assert done.returncode != 0 and "ACK of what was sent" in done.stderr
    assert "died in run" in done.stderr and len(list(tmp_path.glob("crash-1-*"))) == 1
    (kept,) = tmp_path.glob("crash-1-*")
    assert _run(program, kept, keep=tmp_path, check=False).returncode in (0, -6), "a kept input can be replayed"


@pytest.mark.timeout(60 * MINUTES + 100 if LONG else 300)
@pytest.mark.parametrize("name", PYTHON_TARGETS)
def test_python_target(name: str) -> None:
    module = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    before = module.report()
    done = pyfuzz.run(module.one, seed=1, seconds=60.0 * MINUTES) if LONG else pyfuzz.run(module.one, seed=1, runs=RUNS[name])
    assert done >= RUNS[name]
    found = {k: v - before.get(k, 0) for k, v in module.report().items()}
    assert all(found.get(k, 0) >= v for k, v in REACHED[name].items()), found


def test_the_python_driver_names_the_run() -> None:
    def one(rng: random.Random) -> None:
        if rng.random() < 0.1:
            raise KeyError("x")

    with pytest.raises(AssertionError, match=r"run \d+ of seed 3 \(again: --seed 3 --first \d+ --runs 1\): KeyError"):
        pyfuzz.run(one, seed=3, runs=1000)
