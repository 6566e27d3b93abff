"""sd_notify(3): what a service manager is told, and when the watchdog is left alone (pipeline/service_manager.py)."""
from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.service_manager import ServiceManager, Told
from pipeline.supervisor import State
from shm._dataplane import lib
from tests.control import FakeSession

PATIENCE = 60.0
HEADER = 64
HEARTBEAT, ASLEEP = 16, 24  # in struct rn_cell (csrc/rn_session.h)


@pytest.fixture
def session() -> Iterator[FakeSession]:
    s = FakeSession()
    for child in s.children:
        child.state, child.pid = State.RUNNING, os.getpid()
    for row in range(len(s.children)):
        cell(s, row, ASLEEP, "I", 1)
    yield s
    s.close()


def cell(session: FakeSession, row: int, at: int, kind: str, value: int) -> None:
    table = session.memory.session
    size = 64 + -(-8 * lib.rn_ncounters() // 64) * 64  # the identity line, then the counters in whole lines
    struct.pack_into(kind, table.buffer(), HEADER + row * size + at, value)


class Manager:
    """systemd's end."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.setblocking(False)

    def heard(self) -> list[dict[str, str]]:
        found = []
        while True:
            try:
                found.append(dict(line.split("=", 1) for line in self.sock.recv(4096).decode().splitlines()))
            except BlockingIOError:
                return found


def wait(session: FakeSession, manager: Manager, key: str) -> dict[str, str]:
    end, last = time.monotonic() + PATIENCE, {}
    while time.monotonic() < end:
        session.step(1.0)
        for last in manager.heard():
            if key in last:
                return last
    raise AssertionError(f"nothing was said of {key}: {last}")


def test_the_environment_is_taken() -> None:
    env = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "/bin"}
    assert Told.take(env) == Told("\0x", 3.0) and env == {"PATH": "/bin"}
    assert Told.take({"NOTIFY_SOCKET": "/run/s", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}) == Told("/run/s", 0.0)
    for nonsense in ({}, {"NOTIFY_SOCKET": "relative"}, {"WATCHDOG_USEC": "soon"}):
        assert Told.take(dict(nonsense)) == Told("", 0.0)


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_status_and_end(session: FakeSession, tmp_path: Path, abstract: bool) -> None:
    address = f"\0rt-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
    manager = Manager(address)
    service = ServiceManager(session, Told(address, 0.0))  # type: ignore[arg-type]
    assert manager.heard() == []
    service.ready()
    service.ready()  # once
    (said,) = manager.heard()
    assert said["READY"] == "1" and said["MAINPID"] == str(os.getpid())
    assert said["STATUS"].startswith("0 stages, 0 flows, ") and "bit/s on the guest's link, up " in said["STATUS"]
    service.close()
    assert manager.heard() == [{"STOPPING": "1", "STATUS": "ending"}]
    service.close()
    manager.sock.close()


def test_the_watchdog_is_fed_while_every_stage_moves_or_sleeps(session: FakeSession, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "n"))
    service = ServiceManager(session, Told(str(tmp_path / "n"), 0.5))  # type: ignore[arg-type]
    service.ready()
    wait(session, manager, "WATCHDOG")
    cell(session, 2, ASLEEP, "I", 0)  # awake, and its last turn was long ago
    manager.heard()
    for _ in range(2):
        said = wait(session, manager, "STATUS")
        assert "WATCHDOG" not in said and said["STATUS"].endswith("; hanging: egress")
    cell(session, 2, HEARTBEAT, "Q", time.monotonic_ns() + 10**10)
    wait(session, manager, "WATCHDOG")
    session.children[0].state = State.CANCELLED
    manager.heard()
    assert wait(session, manager, "STATUS")["STATUS"].endswith("; hanging: guest_tx")
    service.close()
    manager.sock.close()


def test_nobody_listens(session: FakeSession, tmp_path: Path) -> None:
    for told in (Told("", 1.0), Told(str(tmp_path / "none"), 0.2)):
        service: Any = ServiceManager(session, told)  # type: ignore[arg-type]
        service.ready()
        session.step(0.3)
        service.close()
