"""When a stage looks on before it sleeps (csrc/rn_busy_wait.c), on a clock of the test's (busy_wait.c)."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CHECKS = ("in_turn", "one_way", "after_a_long_wait", "in_vain", "when_others_need_the_cpu", "a_stream", "a_timer")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("busy") / "busy_wait"
    sources = [HERE / "busy_wait.c", *sorted(CSRC.glob("rn_*.c"))]
    wraps = [f"-Wl,--wrap={name}" for name in ("clock_gettime", "epoll_wait", "sched_yield")]
    subprocess.run([os.environ.get("CC", "gcc"), *FLAGS, *wraps, f"-I{CSRC}", *map(str, sources), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_it_pays_or_is_left(program: Path, check: str) -> None:
    done = subprocess.run([str(program), check], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
