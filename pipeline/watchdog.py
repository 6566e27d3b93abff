"""Stages that hang: found, named and killed, so that a successor takes the seat (pipeline/seats.py).

A stage lives as long as its heartbeat moves, or it answers a Ping: between two bursts, and also while it is paused, waits for
room or has nothing to do. One that did neither for --watchdog seconds hangs. What /proc says of it is told, and it is killed as
if it had died: by SIGABRT, so that it leaves a core file and Python's stack where those are wanted, then SIGKILL.

Not killed: a stage somebody started by hand, and one that is traced (gdb, strace, a breakpoint's stop). Time in which we did not
run ourselves (^Z of the whole group, a frozen container, a suspended machine) is nobody's fault and does not count.
"""
from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from pipeline.text import span

if TYPE_CHECKING:
    from pipeline.supervisor import Child, Session

LOOKS = 4  # within --watchdog's time
ABORT_S = 1.0  # from SIGABRT to SIGKILL: writing a core file takes a moment


def traced(pid: int) -> bool:
    """Does a debugger have it? proc(5): TracerPid."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return not any(line.split() == ["TracerPid:", "0"] for line in status.splitlines())


class Doing(Struct, frozen=True):
    """What a process is at, by proc(5)."""

    state: str  # a letter; "": it is gone
    cpu_s: float  # since it began

    @classmethod
    def of(cls, pid: int) -> Doing:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return cls("", 0.0)
        return cls(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def words(pid: int, now: Doing, cpu_share: float) -> str:
    """Why it may not answer."""
    match now.state:
        case "T":
            return "stopped by a signal, as by kill -STOP"
        case "D":
            try:
                where = Path(f"/proc/{pid}/wchan").read_text().strip("0\n")
            except OSError:
                where = ""
            return f"waiting inside the kernel{f' ({where})' if where else ''}"
        case _ if cpu_share > 0.5:
            return f"busy: {100 * cpu_share:.0f} % of a CPU meanwhile"
        case _:
            return "waiting, and not for work"


class Seen(Struct):
    """A stage's process as it was when we last looked."""

    pid: int
    alive_at: float  # CLOCK_MONOTONIC s: it was sure to be at work
    beat: int  # its heartbeat then
    ping: int = 0  # one it has not answered; 0: none
    doing: Doing | None = None  # since it owes an answer
    doing_at: float = 0.0


class Watchdog:
    """Of one session, which asks when to look, and looks."""

    def __init__(self, session: Session, seconds: float) -> None:
        """seconds: of silence that are too many; 0: nobody is watched."""
        self._session, self._seconds = session, seconds
        self._every = seconds / LOOKS
        self._next = time.monotonic() + self._every
        self._pings = 0
        self._seen: dict[str, Seen] = {}
        self._aborted: dict[str, tuple[int, float]] = {}  # pid, and when its patience is over

    def due(self) -> float | None:
        """When tick() wants to be called, CLOCK_MONOTONIC s."""
        return min([self._next, *(at for _, at in self._aborted.values())]) if self._seconds else None

    def tick(self) -> None:
        now = time.monotonic()
        for name, (pid, at) in list(self._aborted.items()):
            child = self._session.child(name)
            if child.pid != pid or not child.alive:
                del self._aborted[name]
            elif at <= now:
                del self._aborted[name]
                self._session.signal(child, signal.SIGKILL)
        if not self._seconds or now < self._next:
            return
        asleep_ourselves = now - self._next > self._every
        self._next = now + self._every
        for child in self._session.children:
            if child.decl.name not in self._aborted:
                self._look(child, now, asleep_ourselves)

    def _look(self, child: Child, now: float, asleep_ourselves: bool) -> None:
        name, seen = child.decl.name, self._seen.get(child.decl.name)
        if not child.ours or not self._session.serves(child):
            self._seen.pop(name, None)
            return
        assert self._session.memory is not None
        beat = self._session.memory.session.cell(child.row).heartbeat_ns
        if seen is None or seen.pid != child.pid:
            self._seen[name] = Seen(pid=child.pid, alive_at=now, beat=beat)
            return
        answered = seen.ping != 0 and child.pongs == seen.ping
        if answered:
            seen.ping = 0
        if answered or beat != seen.beat or asleep_ourselves or traced(child.pid):
            seen.alive_at, seen.beat, seen.doing = now, beat, None
            return
        if seen.doing is None:
            seen.doing, seen.doing_at = Doing.of(child.pid), now
        if now - seen.alive_at >= self._seconds:
            self._hangs(child, seen, now)
        elif not seen.ping and self._session.answers(child):
            self._pings += 1
            seen.ping = self._pings
            self._session.ping(name, seen.ping)

    def _hangs(self, child: Child, seen: Seen, now: float) -> None:
        doing = Doing.of(child.pid)
        assert seen.doing is not None
        share = (doing.cpu_s - seen.doing.cpu_s) / max(0.001, now - seen.doing_at)
        del self._seen[child.decl.name]
        child.hung = f"it hung: no answer for {span(now - seen.alive_at)}, {words(child.pid, doing, share)}"
        if doing.state == "T":  # only SIGKILL reaches it
            self._session.signal(child, signal.SIGKILL)
            return
        self._session.signal(child, signal.SIGABRT)
        self._aborted[child.decl.name] = child.pid, now + ABORT_S
