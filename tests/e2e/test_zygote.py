"""The first process of every stage is a copy of one (pipeline/zygote.py), and is what one started alone would be."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, run_env, wait_gone

from e2e.test_lifecycle import NAMES, PATIENT, GuestEnd, argv_of, ends, nothing_left
from pipeline.config import make
from pipeline.messages import VERSION, Channel, Exit, Hello, Seat, StageExit
from pipeline.supervisor import Session, SessionError
from shm._dataplane import lib

__all__ = ["ends", "nothing_left"]  # fixtures

def state_of(pid: int) -> dict[str, object]:
    """What a process has and may do."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    return {
        "fds": sorted(re.sub(r"\d+", "", os.readlink(proc / "fd" / fd)) for fd in os.listdir(proc / "fd")),
        "stdio": [os.readlink(proc / "fd" / str(fd)) for fd in range(2)],
        "shared": sorted(re.findall(r"/dev/shm/rn-[0-9a-f]{8}-\w+", (proc / "maps").read_text())),
        "name": (proc / "comm").read_text(),
        "argv": argv_of(pid)[:-1],
        "cwd": os.readlink(proc / "cwd"),
        **{key: status[key] for key in ("PPid", "SigBlk", "SigIgn", "SigCgt", "CapEff", "CapBnd", "NoNewPrivs", "Threads",
                                        "Groups")},
    }


def until_runs(session: Session, name: str, not_pid: int) -> int:
    """The pid of the stage's process that is not that one, when it runs."""
    end = time.monotonic() + DEADLINE
    while not (session.child(name).pid != not_pid and session.child(name).state.name == "RUNNING"):
        assert session.poll(max(0.0, end - time.monotonic())) and time.monotonic() < end, f"{name} has no successor"
    return session.child(name).pid


def test_a_copy_is_what_its_successor_is(ends: GuestEnd, nothing_left: None) -> None:
    """Started as a process of its own, the same program has the same descriptors, rights, signals, memory and name."""
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        ends.arp()
        first = {name: state_of(pid) for name, pid in s.stages().items()}
        for name, state in first.items():
            assert state["PPid"] == str(os.getpid())
            if not s.child(name).decl.restart:  # egress: without it the session is over
                continue
            os.kill(pid := s.child(name).pid, signal.SIGKILL)
            assert state_of(until_runs(s, name, pid)) == state, name
        ends.arp()


def test_nobody_else_is_left(ends: GuestEnd, nothing_left: None) -> None:
    was = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        now = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert sorted(map(int, set(now) - set(was))) == sorted(s.stages().values())
        assert lib.rn_os_subreaper(0) == 0, "orphans of others would become ours"


def test_a_start_that_does_not_come_to_it(ends: GuestEnd, nothing_left: None, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for program, says in ((None, r"cannot start the stages: No such file or directory"),
                          ("echo fork: no room; exit 1", r"the stages did not start: fork: no room"),
                          ("kill -9 $$", r"the stages did not start: signal 9 \(SIGKILL\)")):
        if program is not None:
            python.write_text(f"#!/bin/sh\n{program}\n")
            python.chmod(0o755)
        with pytest.raises(SessionError, match=f"^{says}$") as error:
            Session(make({}), link=ends.link(), deadlines=PATIENT).start()
        assert error.value.code is (Exit.RUNTIME if program is None else Exit.NOT_READY)


class Alone:
    """A zygote, of which this test is the supervisor, or not."""

    def __init__(self, names: list[str], supervisor: int) -> None:
        pairs = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for name in names}
        seats = [Seat(name, theirs.fileno(), "warning") for name, (_, theirs) in pairs.items()]
        self.process = subprocess.Popen([sys.executable, "-P", "-m", "pipeline", "zygote", str(supervisor), *map(str, seats)],
                                        pass_fds=[seat.fd for seat in seats], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, env=run_env(), cwd="/")
        for _, theirs in pairs.values():
            theirs.close()
        self.channels = {name: Channel(ours) for name, (ours, _) in pairs.items()}

    def pids(self) -> list[int]:
        said, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0
        return list(map(int, said.split()))

    def close(self) -> None:
        for channel in self.channels.values():
            channel.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def subreaper() -> Iterator[None]:
    assert lib.rn_os_subreaper(1) == 0
    yield
    assert lib.rn_os_subreaper(0) == 1


@pytest.mark.parametrize("words", [[], ["me"], ["1", "egress"], ["1", "egress:x:info"]])
def test_by_hand_it_says_whose_it_is(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "pipeline", "zygote", *words], env=run_env(), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (StageExit.USAGE, "") and "started by the supervisor" in done.stderr


def test_every_stage_greets_on_its_own_socket(subreaper: None) -> None:
    alone = Alone(NAMES, os.getpid())
    try:
        pids = alone.pids()
        for (name, channel), pid in zip(alone.channels.items(), pids, strict=True):
            assert channel.wait(DEADLINE)
            assert channel.recv() == (Hello(version=VERSION, stage=name, pid=pid), [])
    finally:
        alone.close()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [StageExit.ORPHANED] * len(NAMES)


def test_stages_whose_supervisor_is_gone_do_not_begin(subreaper: None) -> None:
    """It was killed while they were forked: their parent is somebody else, who never hears of them."""
    alone = Alone(NAMES, supervisor=1)
    try:
        pids = alone.pids()
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [StageExit.ORPHANED] * len(NAMES)
        assert [channel.recv() for channel in alone.channels.values()] == [None] * len(NAMES)
    finally:
        alone.close()


def test_a_zygote_that_is_killed_leaves_none(subreaper: None) -> None:
    """Whether it had forked some or not: those are then ours, and end when their sockets do."""
    was = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    alone = Alone(NAMES, os.getpid())
    alone.close()
    left = sorted(map(int, set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) - was))
    for pid in left:
        os.waitpid(pid, 0)
    assert wait_gone(left) == []
