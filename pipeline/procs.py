"""What a datapath costs: CPU, context switches and memory of its whole process tree, told apart by stage."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Usage(NamedTuple):
    """Since the processes began."""

    cpu_s: float  # on a CPU, in user and kernel mode
    sleeps: int  # voluntary context switches: it waited for something, so something had to wake it
    preempted: int

    def __add__(self, other: object) -> Usage:
        assert isinstance(other, Usage)
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(self, other, strict=True)))


NOTHING = Usage(0.0, 0, 0)


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        with contextlib.suppress(OSError):  # it has just ended
            for task in os.listdir(PROC / str(one) / "task"):
                todo += map(int, (PROC / str(one) / "task" / task / "children").read_text().split())
    return found


def stage_of(argv: list[str], comm: str) -> str:
    """What a process is called in the tables: ringnet's by their stage, others by their name."""
    if "pipeline" in argv:
        words = argv[argv.index("pipeline") + 1:]
        return words[1] if words[:1] == ["stage"] and len(words) > 1 else "supervisor"
    return comm


def _name(pid: int) -> str:
    """Empty for one that has ended and waits to be reaped."""
    argv = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if argv == [""]:
        return ""
    return stage_of(argv, (PROC / str(pid) / "comm").read_text().strip())


def _tasks(pid: int) -> Iterator[Usage]:
    for task in (PROC / str(pid) / "task").iterdir():
        nanoseconds = int((task / "schedstat").read_text().split()[0])
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
        yield Usage(nanoseconds / 1e9, int(status["voluntary_ctxt_switches"]), int(status["nonvoluntary_ctxt_switches"]))


def named_tree(pid: int) -> dict[int, str]:
    """Processes of the tree that live, by what they are called."""
    found = {}
    for one in tree(pid):
        with contextlib.suppress(OSError):
            if name := _name(one):
                found[one] = name
    return found


def usage(pid: int | None) -> dict[str, Usage]:
    """By stage. Nothing for a datapath without processes (the kernel's)."""
    found: dict[str, Usage] = {}
    for one, name in named_tree(pid).items() if pid is not None else ():
        with contextlib.suppress(OSError):  # it has just ended
            for task in _tasks(one):
                found[name] = found.get(name, NOTHING) + task
    return found


def spent(before: dict[str, Usage], after: dict[str, Usage]) -> dict[str, Usage]:
    return {name: u - before.get(name, NOTHING) for name, u in after.items()}


def total(by_stage: dict[str, Usage]) -> Usage:
    return sum(by_stage.values(), NOTHING)


def pss_mib(pid: int | None) -> float:
    """Memory of the tree, shared pages counted once (PSS)."""
    kib = 0
    for one in tree(pid) if pid is not None else ():
        with contextlib.suppress(OSError):
            for line in (PROC / str(one) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kib += int(line.split()[1])
    return kib / 1024


def _busy_and_all() -> tuple[int, int]:
    """Ticks of all CPUs together since boot (proc(5))."""
    user, nice, system, idle, iowait, *rest = map(int, (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + iowait


def busy_percent(seconds: float) -> float:
    """How busy the CPUs are while we do nothing: what else runs here, of all of them together."""
    before = _busy_and_all()
    time.sleep(seconds)
    busy, every = (b - a for a, b in zip(before, _busy_and_all(), strict=True))
    return 100 * busy / every if every else 0.0
