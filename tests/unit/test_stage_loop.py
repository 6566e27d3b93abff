"""The loop all C stages share, driven by stages made for the purpose (stage_loop.c), plain and sanitized."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from procs import fixed_layout

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"]
KINDS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@pytest.fixture(scope="module", params=KINDS)
def program(request, tmp_path_factory):
    """Command that runs stage_loop; stages left unfreed are no leak worth a report."""
    path = tmp_path_factory.mktemp("loop") / f"stage_loop_{request.param}"
    names = ("stage", "busy_wait", "ring", "arena", "session", "impair", "link", "link_segments", "link_stream", "link_burst",
             "gso", "gro", "unfinished", "csum", "tap", "mirror", "filter", "event", "trace")
    sources = [HERE / "stage_loop.c", *(CSRC / f"rn_{n}.c" for n in names)]
    subprocess.run([os.environ.get("CC", "gcc"), *FLAGS, *KINDS[request.param], f"-I{CSRC}", *map(str, sources),
                    "-o", str(path), "-lpthread"], check=True)
    fixed = fixed_layout() if request.param == "thread" else []

    def run(check: str) -> list[str]:
        env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run([*fixed, str(path), check], env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        *said, last = done.stdout.splitlines()
        assert last == "done"
        return said

    return run


@pytest.mark.parametrize("check", ["relay", "control_message", "control_end", "timer_then_stop", "stop_asleep",
                                   "busy_returns", "bad_grants"])
def test_loop(program, check):
    assert program(check) == []


def test_an_impossible_tail_ends_the_stage_with_ring_and_counters(program):
    assert program("impossible_tail") == ["input ring from stage row 0: tail 99 is over 8 slots past head 0"]


def test_an_impossible_head_ends_the_stage_with_ring_and_counters(program):
    assert program("impossible_head") == [
        "output ring, role 0, to stage row 2: head 5 is not within 8 slots behind tail 0"]


def test_a_failing_turn_ends_the_stage_with_its_words(program):
    assert program("turn_fails") == ["the printer is on fire"]
