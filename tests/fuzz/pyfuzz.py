"""The driver of the fuzz targets that are Python: seeded, bounded, repeatable.

A target is a module with `one(rng)`: one run, everything random from rng; it raises if something is not as promised. Run I
of seed S depends on (S, I) alone; a failure names both. Modules may have `report()`, numbers of what was reached.

    python -m tests.fuzz.fuzz_dns --seed 1 --runs 1000 [--first I] [--seconds T]
"""
from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable

EDGES = (0, 1, 2, 0x0C, 0x3F, 0x40, 0x7F, 0x80, 0xBF, 0xC0, 0xFE, 0xFF)


def mutate(rng: random.Random, data: bytes, *, times: int | None = None, limit: int = 70000) -> bytes:
    """Some small changes: bits, bytes with a value at some edge, 16-bit fields, cuts, repeats."""
    out = bytearray(data)
    for _ in range(rng.randrange(6) if times is None else times):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(8):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at] = rng.choice(EDGES)
            case 2 if out:
                out[at] = rng.randrange(256)
            case 3 if len(out) > 1:
                out[at - 1:at + 1] = rng.choice((0, 1, 12, 0xC00C, 255, 512, 65535)).to_bytes(2, "big")
            case 4:
                del out[at:]
            case 5:
                del out[at:at + rng.randrange(1, 9)]
            case 6:
                out[at:at] = out[at:at + rng.randrange(1, 40)]
            case _:
                out[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(out[:limit])


def run(one: Callable[[random.Random], None], *, seed: int, runs: int = 0, first: int = 0, seconds: float = 0.0) -> int:
    """Do so many runs, or as many as fit in so many seconds. Returns how many; raises AssertionError naming the run."""
    done, end = 0, time.monotonic() + seconds
    while (runs and done < runs) or (seconds and time.monotonic() < end):
        try:
            one(random.Random(f"{seed}/{first + done}"))
        except Exception as e:
            raise AssertionError(f"run {first + done} of seed {seed} (again: --seed {seed} --first {first + done} --runs 1): "
                                 f"{type(e).__name__}: {e}") from e
        done += 1
    return done


def main(one: Callable[[random.Random], None], report: Callable[[], dict[str, int]]) -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--runs", type=int, default=0)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--seconds", type=float, default=0.0)
    args = p.parse_args()
    done = run(one, seed=args.seed, runs=args.runs or (0 if args.seconds else 1000), first=args.first, seconds=args.seconds)
    print(f"runs {done}", *(f"{k} {v}" for k, v in report().items()), sep="\n")
    sys.exit(0)
