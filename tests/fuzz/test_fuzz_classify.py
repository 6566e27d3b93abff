"""The C fuzzer of classify's parsing, built with the sanitizers: a bounded, repeatable run over tests/frames.

The same target under libFuzzer: test_fuzz.py.
"""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import frames
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SOURCES = [HERE / "fuzz_classify.c", *(CSRC / f for f in ("rn_parse.c", "arp.c", "reassembly.c", "rn_csum.c", "rn_gso.c", "rn_unfinished.c"))]
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer",
         "-fno-sanitize-recover=all", f"-I{CSRC}"]
ITERATIONS = 1_000_000


def build(out: Path, compiler: str, *flags: str) -> Path:
    subprocess.run([compiler, *FLAGS, *flags, *map(str, SOURCES), "-o", str(out)], check=True, timeout=300)
    return out


def run(*argv: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1",
           "PATH": "/usr/bin:/bin"}
    return subprocess.run([str(a) for a in argv], check=check, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "corpus"
    path.write_bytes(frames.corpus())
    return path


@pytest.mark.xdist_group("fuzz")
def test_fuzzer_finds_nothing_and_reaches_everything(corpus: Path, tmp_path: Path) -> None:
    program = build(tmp_path / "fuzz", "gcc", "-fsanitize=address,undefined")
    done = run(program, corpus, ITERATIONS, 1)
    assert done.stderr == ""
    reached = {n: int(v) for n, v in re.findall(r"(\w+) (\d+)", done.stdout)}
    # A mutator that no longer gets past the first checks would find nothing either.
    assert all(v >= 20 for v in reached.values()), reached
    assert reached["to_bridge"] > ITERATIONS // 100 and reached["reassembled"] > 100
    assert reached["marked"] > ITERATIONS // 500
    assert run(program, corpus, 5000, 7).stdout == run(program, corpus, 5000, 7).stdout


@pytest.mark.xdist_group("fuzz")
def test_fuzzer_sees_a_planted_overflow(corpus: Path, tmp_path: Path) -> None:
    program = build(tmp_path / "plant", "gcc", "-fsanitize=address,undefined", "-DPLANT")
    done = run(program, corpus, ITERATIONS, 1, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "fuzz_classify.c" in done.stderr
