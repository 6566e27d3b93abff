"""How many CPUs we may use: what busy waiting is for has one of its own, or it is not worth it (csrc/rn_busy_wait.h)."""
from __future__ import annotations

import contextlib
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def _quota(group: Path) -> float:
    """CPUs by one control group's cpu.max, "MAX PERIOD" (Linux Documentation/admin-guide/cgroup-v2.rst); infinity: no limit."""
    with contextlib.suppress(OSError, ValueError):
        most, period = (group / "cpu.max").read_text().split()
        if most != "max":
            return int(most) / int(period)
    return float("inf")


def processors(root: Path = GROUPS, of: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs this process may run on, or the least quota of its control groups (version 2), if that is less."""
    most = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):
        for line in of.read_text().splitlines():
            if line.startswith("0::/"):
                inner = root / line[4:]
                most = min(most, *(_quota(g) for g in (inner, *inner.parents) if g.is_relative_to(root)))
    return most
