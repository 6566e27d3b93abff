"""Stages that hang (pipeline/watchdog.py): who is killed, how, and who is not. Time is the test's."""
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipeline import watchdog
from pipeline.watchdog import ABORT_S, LOOKS, Watchdog, traced

SECONDS = 8
EVERY = SECONDS / LOOKS
PTRACE_DETACH, PTRACE_SEIZE = 17, 0x4206  # ptrace(2)


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Session:
    """One stage, a process of ours that does what the test wants."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.stage = SimpleNamespace(decl=SimpleNamespace(name="classify"), ours=True, pid=popen.pid, row=0, pongs=0, hung="",
                                     alive=True)
        self.children = [self.stage]
        self.memory = SimpleNamespace(session=SimpleNamespace(cell=lambda row: SimpleNamespace(heartbeat_ns=self.beat)))
        self.beat, self.at_work, self.listens = 1, True, True
        self.pings: list[int] = []
        self.signals: list[int] = []

    def serves(self, child: object) -> bool:
        return self.at_work

    def answers(self, child: object) -> bool:
        return self.listens

    def child(self, name: str) -> SimpleNamespace:
        return self.stage

    def ping(self, name: str, seq: int) -> None:
        self.pings.append(seq)

    def signal(self, child: object, signum: int) -> None:
        self.signals.append(signum)


class World:
    def __init__(self, session: Session, clock: Clock) -> None:
        self.session, self.clock = session, clock
        self.dog = Watchdog(session, SECONDS)  # type: ignore[arg-type]

    def looks(self, n: int = 1, every: float = EVERY) -> None:
        for _ in range(n):
            self.clock.now += every
            self.dog.tick()


@contextlib.contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """It has printed a line when the block begins."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as p:
        try:
            assert p.stdout is not None and p.stdout.readline()
            yield p
        finally:
            p.kill()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    with process("import signal; print(flush=True); signal.pause()") as p:
        yield World(Session(p), clock)


def test_one_that_answers_lives_and_is_asked_again(world: World) -> None:
    for _ in range(5 * LOOKS):
        world.looks()
        world.session.stage.pongs = max(world.session.pings, default=0)
    assert not world.session.signals and len(world.session.pings) > 2


def test_one_whose_heartbeat_moves_is_not_even_asked(world: World) -> None:
    for _ in range(5 * LOOKS):
        world.session.beat += 1
        world.looks()
    assert not world.session.signals and not world.session.pings


def test_one_that_is_silent_is_asked_once_then_aborted_then_killed(world: World) -> None:
    world.looks(LOOKS)
    assert world.session.pings == [1] and not world.session.signals
    world.looks()
    assert world.session.signals == [signal.SIGABRT]
    assert world.session.stage.hung == "it hung: no answer for 8.0 s, waiting, and not for work"
    assert world.dog.due() == world.clock.now + ABORT_S
    world.looks(every=ABORT_S / 2)
    assert world.session.signals == [signal.SIGABRT]
    world.looks(every=ABORT_S / 2)
    assert world.session.signals == [signal.SIGABRT, signal.SIGKILL]


def test_one_that_died_of_the_abort_is_not_killed_again(world: World) -> None:
    world.looks(LOOKS + 1)
    world.session.stage.alive = False
    world.session.at_work = False
    world.looks(2 * LOOKS)
    assert world.session.signals == [signal.SIGABRT]


def test_one_that_is_stopped_is_killed_at_once(world: World) -> None:
    pid = world.session.stage.pid
    os.kill(pid, signal.SIGSTOP)
    assert os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT) is not None
    world.looks(LOOKS + 1)
    assert world.session.signals == [signal.SIGKILL]
    assert world.session.stage.hung.endswith("stopped by a signal, as by kill -STOP")


def test_one_that_is_busy_is_called_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([watchdog.Doing("R", 10.0), watchdog.Doing("R", 10.0 + 0.99 * EVERY * (LOOKS - 1))])
    monkeypatch.setattr(watchdog.Doing, "of", lambda pid: next(used))
    world.looks(LOOKS + 1)
    assert world.session.stage.hung == "it hung: no answer for 8.0 s, busy: 99 % of a CPU meanwhile"


def test_one_in_the_debugger_is_let_be(world: World) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    pid = world.session.stage.pid
    assert not traced(pid)
    if libc.ptrace(PTRACE_SEIZE, pid, 0, 0) < 0:
        pytest.skip(f"ptrace: {os.strerror(ctypes.get_errno())}")
    assert traced(pid)
    world.looks(5 * LOOKS)
    assert not world.session.signals
    os.kill(pid, signal.SIGSTOP)  # a tracee's stop is its tracer's to see, which may then let go of it
    os.waitpid(pid, os.WUNTRACED)
    assert libc.ptrace(PTRACE_DETACH, pid, 0, 0) == 0, os.strerror(ctypes.get_errno())
    world.looks(LOOKS - 1)
    assert not world.session.signals, "what was the debugger's time counted"
    world.looks(2)
    assert world.session.signals


def test_one_that_was_started_by_hand_is_let_be(world: World) -> None:
    world.session.stage.ours = False
    world.looks(5 * LOOKS)
    assert not world.session.signals and not world.session.pings


def test_one_that_does_not_leave_its_seat_is_killed_unasked(world: World) -> None:
    world.session.listens = False
    world.looks(LOOKS + 1)
    assert world.session.signals == [signal.SIGABRT] and not world.session.pings


def test_our_own_sleep_does_not_count(world: World) -> None:
    world.looks(LOOKS)
    world.looks(every=1000.0)  # ^Z, a frozen container
    assert not world.session.signals
    world.looks(LOOKS - 1)
    assert not world.session.signals
    world.looks()
    assert world.session.signals


def test_a_successor_begins_anew(world: World) -> None:
    world.looks(LOOKS)
    world.session.stage.pid = os.getpid()
    world.looks(LOOKS)
    assert not world.session.signals


def test_zero_seconds_watch_nobody() -> None:
    with process("print(flush=True); input()") as p:
        dog = Watchdog(Session(p), 0)  # type: ignore[arg-type]
        assert dog.due() is None
        dog.tick()


def test_a_process_that_is_gone_is_not_traced() -> None:
    with process("print()") as p:
        p.wait()
        assert not traced(p.pid) and watchdog.Doing.of(p.pid).state == ""
    assert watchdog.Doing.of(os.getpid()).state == "R"
    assert watchdog.Doing.of(os.getpid()).cpu_s <= time.process_time() + 1
