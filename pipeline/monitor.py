"""A read-only look at a session: what each stage did, by counters, ring fill and CPU.

Reads shared memory and /proc; disturbs nothing. Works while a session runs and on the result of one that ended.
"""
from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

from pipeline.supervisor import Session
from pipeline.text import size, table


class StageFacts(Struct, frozen=True, kw_only=True):
    """One stage, as of now (or as of its end)."""

    name: str
    pid: int
    state: str  # as the stage published it
    frames_in: int
    bytes_in: int  # Ethernet headers included
    frames_out: int
    bytes_out: int
    cpu_s: float  # user + system
    drops: dict[str, int]  # reason without "drop_": frames; zeros left out; --impair's as "impair_dropped"
    counters: dict[str, int]  # all of the stage's; zeros left out


def cpu_seconds(pid: int) -> float:
    """User + system time of a process; 0.0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stage_facts(session: Session) -> list[StageFacts]:
    """One entry a stage, in data order."""
    found = []
    for child in session.children:
        name = child.decl.name
        all_counters = session.counters(name)
        state = "absent"
        if session.memory is not None:
            cell = session.memory.session.cell(child.row)
            # One that was killed could not say that it ended.
            state = cell.state.name.lower() if child.alive or not child.pid else child.state.name.lower()
        elif session.result is not None:
            state = "ended"
        counters = {n: v for n, v in all_counters.items() if v}
        found.append(StageFacts(
            name=name, pid=child.pid, state=state,
            frames_in=all_counters.get("frames_in", 0), bytes_in=all_counters.get("bytes_in", 0),
            frames_out=all_counters.get("frames_out", 0), bytes_out=all_counters.get("bytes_out", 0),
            cpu_s=child.cpu_s + (cpu_seconds(child.pid) if child.alive else 0.0),  # with its predecessors'
            drops={n.removeprefix("drop_"): v for n, v in counters.items()
                   if n.startswith(("drop_", "impair_dropped"))},
            counters=counters,
        ))
    return found


def stage_table(session: Session) -> str:
    """Frames, bytes, drops by reason and CPU of each stage, as text."""
    rows = []
    for f in stage_facts(session):
        drops = ", ".join(f"{reason} {n}" for reason, n in sorted(f.drops.items(), key=lambda d: -d[1])) or "none"
        rows.append([f.name, str(f.pid), str(f.frames_in), size(f.bytes_in), str(f.frames_out), size(f.bytes_out),
                     f"{f.cpu_s:.2f} s", drops])
    return table(["stage", "pid", "frames in", "bytes in", "frames out", "bytes out", "CPU", "drops by reason"], rows,
                 frozenset({0, 7}))
