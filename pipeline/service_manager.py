"""systemd's notification protocol (sd_notify(3)): ready, status in a line, watchdog. Nothing without $NOTIFY_SOCKET.

READY=1 is said once the guest can be served. STATUS= is what `systemctl status` shows, renewed every few seconds. With
WatchdogSec= in the unit, WATCHDOG=1 is said at half that time, but only while every stage lives and has moved lately (or
sleeps with nothing to do): a stage that hangs lets systemd restart the session.
"""
from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

from msgspec import Struct

from pipeline.supervisor import Session, State
from pipeline.text import bits, duration
from shm._dataplane import lib

STATUS_S = 5.0


class Told(Struct, frozen=True):
    """What the service manager said of itself."""

    address: str  # of its socket; "": there is none
    watchdog_s: float  # it expects a word this often; 0: it does not

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Told:
        """Out of environ, where it is then no more: the guest's command, and stages, are not the service."""
        path = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = usec.isdecimal() and pid in ("", str(os.getpid()))
        return cls("\0" + path[1:] if path.startswith("@") else path if path.startswith("/") else "",
                   int(usec) / 1e6 if ours else 0.0)


class ServiceManager:
    """Tells the service manager of a session, until close()."""

    def __init__(self, session: Session, told: Told) -> None:
        self.session = session
        self._sock: socket.socket | None = None
        self._timer = -1
        self._bytes, self._at = 0, time.monotonic()
        self._watchdog_s, self._address = told.watchdog_s, told.address
        if self._address:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def ready(self) -> None:
        """The guest can be served."""
        if self._sock is None or self._timer >= 0:
            return
        self._say(f"READY=1\nMAINPID={os.getpid()}\n{self._status()}")
        every = min(STATUS_S, self._watchdog_s / 2) if self._watchdog_s else STATUS_S
        self._timer = lib.rn_os_ticker(int(every * 1000))
        if self._timer >= 0:
            self.session.watch(self._timer, self._tick)

    def close(self) -> None:
        """The session ends."""
        if self._sock is None:
            return
        self._say("STOPPING=1\nSTATUS=ending")
        if self._timer >= 0:
            self.session.unwatch(self._timer)
            os.close(self._timer)
            self._timer = -1
        self._sock.close()
        self._sock = None

    def _tick(self) -> None:
        os.read(self._timer, 8)
        healthy = not self.hanging()
        self._say(self._status() + ("\nWATCHDOG=1" if self._watchdog_s and healthy else ""))

    def hanging(self) -> list[str]:
        """Stages that are gone, or awake and without a turn for the watchdog's time."""
        found = []
        memory, now = self.session.memory, time.monotonic()
        for child in self.session.children:
            if not child.alive or child.state is not State.RUNNING or memory is None:
                found.append(child.decl.name)
                continue
            cell = memory.session.cell(child.row)
            if not cell.asleep and now - cell.heartbeat_ns / 1e9 > (self._watchdog_s or STATUS_S):
                found.append(child.decl.name)
        return found

    def _status(self) -> str:
        session, now = self.session, time.monotonic()
        moved = sum(session.counters(s.name).get("bytes_in", 0) + session.counters(s.name).get("bytes_out", 0)
                    for s in session.topology.stages if "link" in s.fds)
        rate, self._bytes, self._at = (moved - self._bytes) * 8 / max(1e-3, now - self._at), moved, now
        flows = sum(1 for _ in session.memory.flows) if session.memory else 0
        slow = f"; hanging: {', '.join(h)}" if (h := self.hanging()) else ""
        return (f"STATUS={len(session.stages())} stages, {flows} flows, {bits(rate)}bit/s on the guest's link, up"
                f" {duration(now - session.started_at)}{slow}")

    def _say(self, text: str) -> None:
        assert self._sock is not None
        try:
            self._sock.sendto(text.encode(), self._address)
        except OSError:
            pass  # sd_notify(3): a manager that does not listen is no error of the service
