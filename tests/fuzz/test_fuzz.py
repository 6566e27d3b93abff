"""Every fuzz target for a bounded time, by a fixed seed; RINGNET_LONG=1 (tools/test --long) makes it minutes.

Also: what fuzzing once found (tests/fuzz/seeds), that runs repeat, and that each oracle can say no.
"""
from __future__ import annotations

import importlib
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzz import pyfuzz, targets
from tests.fuzz.targets import C_TARGETS, ENV, PYTHON_TARGETS

LONG = bool(os.environ.get("RINGNET_LONG"))
RUNS = {"egress": 1200, "reassembly": 6000, "link": 1500, "dhcp": 300, "dns": 300, "control": 100}
MINUTES = 5  # each, with RINGNET_LONG
# A generator that no longer gets anywhere would find nothing either: so much at least, for the runs above.
REACHED = {
    "egress": {"connections": 1500, "whole": 500, "up_bytes": 1_000_000, "down_bytes": 100_000, "resets": 1, "udp": 100},
    "reassembly": {"whole": 2000, "expired": 5000},
    "link": {"bridged": 300, "served": 300, "answered": 2000},
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
@pytest.mark.timeout(60 * MINUTES + 400 if LONG else 300)
@pytest.mark.parametrize("name", C_TARGETS)
def test_c_target(name: str, programs: dict[str, Path], tmp_path: Path) -> None:
    much = ("-seconds", 60 * MINUTES) if LONG else ("-runs", RUNS[name])
    found = targets.numbers(_run(programs[name], "-seed", 1, *much, *targets.seeds(name), keep=tmp_path).stdout)
    assert found["runs"] >= RUNS[name]
    assert all(found[k] >= v for k, v in REACHED[name].items()), found


@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("name", C_TARGETS)
def test_c_target_is_repeatable(name: str, programs: dict[str, Path], tmp_path: Path) -> None:
    """What the host kernel does in between may differ; the inputs may not."""
    once, again = (targets.numbers(_run(programs[name], "-seed", 7, "-first", 5, "-runs", 30, keep=tmp_path).stdout)
                   for _ in range(2))
    assert once["runs"] == again["runs"] == 30
    assert name == "egress" or once == again


@pytest.mark.xdist_group("fuzz")
def test_the_egress_oracle_can_say_no(parts: list[Path], tmp_path: Path) -> None:
    program = targets.build("egress", tmp_path / "plant", parts, "-DPLANT")
    done = _run(program, "-seed", 1, "-runs", 200, keep=tmp_path, check=False)
    assert done.returncode != 0 and "ACK of what was sent" in done.stderr
    assert "died in run" in done.stderr and len(list(tmp_path.glob("crash-1-*"))) == 1
    (kept,) = tmp_path.glob("crash-1-*")
    assert _run(program, kept, keep=tmp_path, check=False).returncode in (0, -6), "a kept input can be replayed"


@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("name", C_TARGETS)
def test_libfuzzer_form(name: str, tmp_path: Path) -> None:
    """The same target under clang's libFuzzer; where there is no clang it at least has no main() of its own."""
    if shutil.which("clang"):
        program = targets.build_libfuzzer(name, tmp_path / "libfuzzer")
        subprocess.run([str(program), "-runs=500", "-seed=1", f"-artifact_prefix={tmp_path}/"], env=ENV, check=True, timeout=200)
        return
    out = tmp_path / "f.o"
    subprocess.run(["gcc", *targets.FLAGS, "-fsanitize=address", "-DLIBFUZZER", "-c", str(targets.HERE / f"fuzz_{name}.c"),
                    "-o", str(out)], check=True)
    symbols = subprocess.run(["nm", "--defined-only", str(out)], capture_output=True, text=True, check=True).stdout.split()
    assert "LLVMFuzzerTestOneInput" in symbols and "main" not in symbols


@pytest.mark.timeout(60 * MINUTES + 100 if LONG else 120)
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
