"""ThreadSanitizer over the ring and the arena; and, with one order taken away at a time, that it would tell."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from procs import fixed_layout

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing",
         "-fsanitize=thread"]

# What to weaken: file, the access as it is written there, and with the order taken away.
WEAKER = {
    "P1 publish": ("rn_ring.c", "&tx->ring->tail, tx->tail, memory_order_release",
                   "&tx->ring->tail, tx->tail, memory_order_relaxed"),
    "C1 peek": ("rn_ring.c", "uint64_t tail = atomic_load_explicit(&rx->ring->tail, memory_order_acquire)",
                "uint64_t tail = atomic_load_explicit(&rx->ring->tail, memory_order_relaxed)"),
    "C2 consume": ("rn_ring.c", "&rx->ring->head, rx->head, memory_order_release",
                   "&rx->ring->head, rx->head, memory_order_relaxed"),
    "P2 room": ("rn_ring.c", "uint64_t head = atomic_load_explicit(&tx->ring->head, memory_order_acquire)",
                "uint64_t head = atomic_load_explicit(&tx->ring->head, memory_order_relaxed)"),
    "A1 free": ("rn_arena.c", "&head, index + 1, memory_order_seq_cst,", "&head, index + 1, memory_order_relaxed,"),
    "A2 reclaim": ("rn_arena.c", "link = atomic_exchange_explicit(&part->returned, 0, memory_order_acquire);",
                   "link = atomic_exchange_explicit(&part->returned, 0, memory_order_relaxed);"),
}


def run_under_tsan(tmp_path: Path, weaker: str = "") -> subprocess.CompletedProcess[str]:
    sources = []
    for name in ("rn_ring.c", "rn_arena.c"):
        text = (CSRC / name).read_text()
        if weaker and WEAKER[weaker][0] == name:
            _, old, new = WEAKER[weaker]
            assert text.count(old) == 1, f"{name} has changed: say anew what to weaken"
            text = text.replace(old, new)
        copy = tmp_path / name
        copy.write_text(text)
        sources.append(str(copy))
    program = tmp_path / "ring_tsan"
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, *FLAGS, f"-I{CSRC}", str(Path(__file__).with_name("ring_tsan.c")), *sources,
                    "-o", str(program), "-lpthread"], check=True)
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run([*fixed_layout(), str(program)], env=env, capture_output=True, text=True, timeout=100)


def test_no_race_is_reported(tmp_path):
    done = run_under_tsan(tmp_path)
    assert (done.returncode, done.stdout) == (0, "40000 frames\n"), done.stderr


@pytest.mark.parametrize("weaker", WEAKER)
def test_a_missing_order_is_reported(tmp_path, weaker):
    done = run_under_tsan(tmp_path, weaker)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert done.returncode == 66
