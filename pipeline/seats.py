"""Seats of a session whose stage is gone: started again, or kept free for one that is started by hand.

A stage's seat is what the topology grants it: its rings, doorbells, shared memory, the guest's link. The supervisor
keeps all of it, and where the work stands is in shared memory, so a successor goes on where the last process stopped
(csrc/rn_stage.c, rn_stage_recover()). egress has host sockets and more that is its own: in order it leaves them in a
socket pair that the supervisor holds (csrc/egress_estate.c), killed it loses them. Two policies:

    restart   a stage that died is started again, at generation + 1: at once, then after 0.1 s, 0.2 s, ... At most
              `restarts` times within a minute; then the session ends, as it does for a stage that the topology does
              not say this of (Stage.restart).
    held      --hold, or `ringnet ctl hold`: the seat stays empty until somebody takes it by hand
              (`ringnet stage NAME --session S`), as often as he likes. There is no deadline: a debugger may stand
              anywhere. `ringnet ctl release` gives it back to the supervisor.

A successor is started while its neighbours run; what they hand it meanwhile waits in its rings.
"""
from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.messages import Exit

if TYPE_CHECKING:
    from pipeline.supervisor import Child, Session

WINDOW = 60.0  # s in which restarts are counted
BACKOFF, BACKOFF_MAX = 0.1, 2.0  # s before the second restart within the window, doubled for each one after it


class SeatError(Exception):
    """A seat cannot be taken, held or released; one sentence. `missing`: there is no such stage."""

    def __init__(self, text: str, *, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing


def by_hand(stage: str, session: str) -> list[tuple[str, str]]:
    """(what it is good for, the command) of every usual way to start a stage by hand."""
    root = str(Path(__file__).resolve().parent.parent)
    run = shlex.join([sys.executable, "-P", "-m", "pipeline", "stage", stage, "--session", session])
    env = f"PYTHONPATH={shlex.quote(root)} "
    return [
        ("in this terminal", f"{env}{run}"),
        ("gdb", f"{env}gdb --args {run}"),
        ("perf", f"{env}perf record -g -o perf.{stage}.data -- {run}"),
        ("valgrind", f"{env}PYTHONMALLOC=malloc valgrind --trace-children=no {run}"),
        ("py-spy", f"{env}py-spy record --native -o {stage}.svg -- {run}"),
    ]


class Seats:
    """Of one session; its supervisor tells what happens, and asks when to look again."""

    def __init__(self, session: Session, held: tuple[str, ...], restarts: int) -> None:
        self._session = session
        self.restarts = restarts
        self.held = set(held)
        self._deaths: dict[str, list[float]] = {}  # CLOCK_MONOTONIC of each, by stage
        self._again: dict[str, float] = {}  # when a successor is due
        self._late: dict[str, float] = {}  # until when it must run
        self._first = set(held)  # held from the start, and never taken yet
        self._waiting: list[Callable[[], None]] = []
        self.listeners: list[Callable[[str], None]] = []  # told of each successor that runs

    # -- for the session's loop

    def due(self) -> float | None:
        """When tick() wants to be called, CLOCK_MONOTONIC s."""
        return min([*self._again.values(), *self._late.values()], default=None)

    def tick(self) -> None:
        """Start successors that are due; give up those that are late."""
        now = time.monotonic()
        for name in [n for n, at in self._again.items() if at <= now]:
            del self._again[name]
            self._begin(self._session.child(name))
        for name in [n for n, at in self._late.items() if at <= now]:
            del self._late[name]
            self._session.give_up(Exit.NOT_READY, f"the successor of stage {name} did not run in time")

    def _begin(self, child: Child) -> None:
        d = self._session.deadlines
        child.generation += 1
        self._late[child.decl.name] = time.monotonic() + d.hello + d.ready + d.running
        self._session.spawn(child)

    def vacated(self, child: Child, how: str) -> bool:
        """A stage's process is gone, not because we cancelled the session. True: the session goes on without it for now.

        Otherwise nothing has happened yet, and the caller ends the session."""
        name = child.decl.name
        self._late.pop(name, None)
        if name in self.held:
            self._session.say(f"stage {name} is gone ({how}): its seat waits; {self._how(name)}")
            return True
        if not child.decl.restart or not self.restarts:
            return False
        now = time.monotonic()
        deaths = [at for at in self._deaths.get(name, []) if now - at < WINDOW]
        if len(deaths) >= self.restarts:
            return False
        wait = min(BACKOFF_MAX, BACKOFF * 2 ** (len(deaths) - 1)) if deaths else 0.0
        self._deaths[name] = [*deaths, now]
        self._again[name] = now + wait
        self._session.say(f"stage {name} is gone ({how}): started again, {len(deaths) + 1} of at most {self.restarts}"
                          " times within a minute")
        return True

    def exhausted(self, child: Child) -> str:
        """What to add to the reason of an end, if the limit was it."""
        n = sum(time.monotonic() - at < WINDOW for at in self._deaths.get(child.decl.name, []))
        return f"; it was started again {n} times within a minute" if n else ""

    def runs(self, child: Child) -> None:
        """A successor says it is running."""
        name = child.decl.name
        self._late.pop(name, None)
        self._first.discard(name)
        self._session.say(f"stage {name} runs again, generation {child.generation}, process {child.pid}")
        for listener in self.listeners:
            listener(name)
        if not self._first:
            waiting, self._waiting = self._waiting, []
            for then in waiting:
                then()

    # -- for people

    @property
    def empty(self) -> list[str]:
        """Held seats that nobody sits in."""
        return [c.decl.name for c in self._session.children if c.decl.name in self.held and not c.alive]

    def when_whole(self, then: Callable[[], None]) -> None:
        """Call when every seat that --hold names was taken once; at once if there is none."""
        if self._first:
            self._waiting.append(then)
        else:
            then()

    def _child(self, name: str) -> Child:
        try:
            return self._session.child(name)
        except KeyError:
            names = ", ".join(c.decl.name for c in self._session.children)
            raise SeatError(f"there is no stage {name}; there are {names}", missing=True) from None

    def take(self, name: str, pid: int) -> socket.socket:
        """A process, already there, becomes this stage: returns its end of the control socket. Raises SeatError."""
        child = self._child(name)
        if child.alive:
            raise SeatError(f"stage {name} runs, as process {child.pid}; free its seat with: ringnet ctl hold {name}")
        if name not in self.held:
            raise SeatError(f"stage {name} is being started again; keep its seat with: ringnet ctl hold {name}")
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as e:
            raise SeatError(f"process {pid}: {e.strerror}") from e
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child.generation += 1
        self._session.seat(child, ours, pid, pidfd)
        return theirs

    def hold(self, name: str) -> None:
        """From now on this seat is taken by hand; whoever sits in it now leaves between two bursts. Raises SeatError."""
        child = self._child(name)
        self.held.add(name)
        self._again.pop(name, None)
        self._session.leave(child)

    def release(self, name: str) -> None:
        """The supervisor fills the seat again, at once if it is empty. Raises SeatError."""
        child = self._child(name)
        if name not in self.held:
            raise SeatError(f"stage {name} is not held")
        self.held.remove(name)
        if not child.alive:
            self._begin(child)

    def _how(self, name: str) -> str:
        return f"take it with: ringnet stage {name} --session {self._session.name}"

    def invitation(self) -> str:
        """What is printed for the seats that nobody sits in; "" if there is none."""
        lines = []
        for name in self.empty:
            lines.append(f"stage {name} is held: everything else runs. Take its seat from another terminal, and again"
                         " as often as you like:")
            lines += [f"    {what:<17} {command}" for what, command in by_hand(name, self._session.name)]
        return "\n".join(lines)

