"""After a session nothing is left, however it ended: no process, no namespace, no socket, no shared memory."""
from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import RINGNET, Attached, Netns, Program, children, shm_left, shm_objects, stage_pids, wait_gone

from pipeline.messages import Exit
from pipeline.topology import TOPOLOGY, Feature

pytestmark = pytest.mark.netns

STAGES = [s.name for s in TOPOLOGY.only(frozenset({Feature.NIC1})).stages]


def unix_sockets(ns: Netns) -> list[str]:
    """Named Unix sockets of a namespace, abstract ones too (proc_net(5): the eighth column, if any)."""
    lines = ns.run("cat", "/proc/net/unix").stdout.splitlines()[1:]
    return [fields[7] for fields in map(str.split, lines) if len(fields) > 7]


def nothing_left(host: Netns, pids: list[int], shm_before: set[str]) -> None:
    assert wait_gone(pids) == []
    assert unix_sockets(host) == []
    assert host.pids() == []
    assert shm_left() <= shm_before


@pytest.fixture
def run_in_guest(host_ns: Netns, tmp_path: Path):
    """A `ringnet run` whose command waits; gives (program, inode of the guest's network namespace)."""
    r, w = os.pipe()
    script = f'echo "$(readlink /proc/self/ns/net)" >/dev/fd/{w}; exec sleep 1000'
    with Program(host_ns.argv(*RINGNET, "run", "--", "sh", "-c", script), tmp_path / "run.log",
                 pass_fds=(w,)) as program:
        os.close(w)
        yield program, program.wait_word(r, "the command did not start")
        os.close(r)


def users_of_netns(link: str) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/net") == link:
                found.append(int(entry))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_attach_ends_on_a_signal(guest_session: Attached, host_ns: Netns, guest_ns: Netns, sig: int) -> None:
    before, pids = shm_objects(), [guest_session.pid, *children(guest_session.pid)]
    assert sorted(stage_pids(guest_session.pid)) == sorted(STAGES)
    assert guest_session.end(sig) == 0, guest_session.output()
    nothing_left(host_ns, pids, before)
    assert "tap0" not in guest_ns.ip("-br", "link")


def test_kill_9_of_everything(guest_session: Attached, host_ns: Netns, guest_ns: Netns) -> None:
    before, pids = shm_objects(), [guest_session.pid, *children(guest_session.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    guest_session.wait()
    nothing_left(host_ns, pids, before)
    assert "tap0" not in guest_ns.ip("-br", "link")


def test_kill_9_of_the_supervisor_alone(guest_session: Attached, host_ns: Netns, guest_ns: Netns) -> None:
    before, pids = shm_objects(), [guest_session.pid, *children(guest_session.pid)]
    assert guest_session.end(signal.SIGKILL) == -signal.SIGKILL
    nothing_left(host_ns, pids, before)
    assert "tap0" not in guest_ns.ip("-br", "link")


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_of_a_stage_ends_the_session_and_is_named(attach: Callable[..., Attached], host_ns: Netns, stage: str) -> None:
    """If it may not be started again; test_seats.py has what happens else."""
    session = attach("--restarts", "0")
    before, pids = shm_objects(), [session.pid, *children(session.pid)]
    os.kill(stage_pids(session.pid)[stage], signal.SIGKILL)
    assert session.wait() == Exit.STAGE_DIED
    assert re.search(rf"\b{stage}\b.*SIGKILL", session.output()), session.output()
    nothing_left(host_ns, pids, before)


def test_run_ends_with_its_command(run_in_guest, host_ns: Netns) -> None:
    program, link = run_in_guest
    pids = [program.pid, *children(program.pid)]
    [command] = [p for p in users_of_netns(link) if not children(p)]
    os.kill(command, signal.SIGTERM)
    assert program.wait() == 128 + signal.SIGTERM
    assert wait_gone(pids) == []
    assert users_of_netns(link) == []
    assert host_ns.pids() == []


def test_run_killed_takes_its_command_along(run_in_guest, host_ns: Netns) -> None:
    program, link = run_in_guest
    pids = [program.pid, *children(program.pid)]
    assert program.end(signal.SIGKILL) == -signal.SIGKILL
    assert wait_gone(pids) == []
    assert users_of_netns(link) == []
    assert host_ns.pids() == []


def test_two_sessions_do_not_meet(attach: Callable[..., Attached], make_netns: Callable[[str], Netns], host_ns: Netns,
                                  guest_ns: Netns, tmp_path: Path) -> None:
    """On one host, at the same time; the end of one leaves the other as it was."""
    other = make_netns("g")
    with Attached(host_ns, other, tmp_path / "other.log") as second:
        first = attach()
        assert first.end() == 0
        assert "1 received" in other.run("ping", "-n", "-c1", "-w30", "10.0.2.1").stdout
        assert second.process.poll() is None
