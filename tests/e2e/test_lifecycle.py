"""A session from start to end with real processes, over a socket pair: no namespace, no root.

However it ends, the end is named, and afterwards there is no process, no descriptor and no shared memory.
"""
from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from multiprocess import get_context
from netlab import DEADLINE, REPO, run_env, shm_left, wait_gone
from procs import Fd, spawned

from pipeline.config import Settings, make
from pipeline.messages import VERSION, Cancel, Channel, Configure, Ended, Exit, Failed, Hello, Ping, StageExit
from pipeline.monitor import stage_facts, stage_table
from pipeline.supervisor import Child, Deadlines, Link, Result, Session, SessionError, Signals
from pipeline.topology import TOPOLOGY, Feature
from tests.fds import open_fds

TOPO = TOPOLOGY.only(frozenset({Feature.NIC1}))
NAMES = [s.name for s in TOPO.stages]
GATEWAY_MAC, GUEST_MAC = bytes.fromhex("02abcd000001"), bytes.fromhex("5254ab000002")
ARP_REQUEST = (b"\xff" * 6 + GUEST_MAC + bytes.fromhex("0806" "0001" "0800" "0604" "0001") + GUEST_MAC
               + bytes([10, 0, 2, 2]) + bytes(6) + bytes([10, 0, 2, 1])).ljust(60, b"\0")


# What ends at once on an idle machine may take long on a busy one; no test waits for these to pass.
PATIENT = Deadlines(hello=DEADLINE, ready=DEADLINE, running=DEADLINE, drain=DEADLINE, drain_failed=DEADLINE,
                    term=DEADLINE)


class GuestEnd:
    """The guest's end of the link, and the session's."""

    def __init__(self) -> None:
        self.guest, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.guest.settimeout(DEADLINE)

    def link(self) -> Link:
        return Link(fd=self.host.fileno(), kind="dgram", vnet=False)

    def arp(self) -> None:
        """The gateway answers: frames go through guest_tx, classify and guest_rx."""
        self.guest.send(ARP_REQUEST)
        reply = self.guest.recv(2048)
        assert reply[:14] == GUEST_MAC + GATEWAY_MAC + b"\x08\x06" and reply[21] == 2

    def close(self) -> None:
        self.guest.close()
        self.host.close()


@pytest.fixture
def ends() -> Iterator[GuestEnd]:
    e = GuestEnd()
    yield e
    e.close()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """This process has the descriptors and children it had, and /dev/shm has no name of ours."""
    fds = open_fds()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    yield
    assert open_fds() == fds
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == children
    assert shm_left() == set()


def until_over(session: Session) -> Result:
    """Serve until the session ends by itself; fails if it does not."""
    deadline = time.monotonic() + DEADLINE
    while session.poll(max(0.0, deadline - time.monotonic())):
        assert time.monotonic() < deadline, f"still running after {DEADLINE} s"
    return session.stop()


def session_is_gone(session: Session) -> bool:
    return session.stages() == {} and all(c.status is not None for c in session.children)


def argv_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


# -- what runs


def test_one_process_a_stage_each_with_its_name(ends: GuestEnd, nothing_left: None) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        pids = s.stages()
        assert list(pids) == NAMES and len(set(pids.values())) == len(NAMES)
        for name, pid in pids.items():
            assert argv_of(pid)[-5:-1] == ["pipeline", "stage", name, "--control-fd"]
            assert Path(f"/proc/{pid}/comm").read_text() == f"rn-{name}"[:15] + "\n"
        shown = subprocess.run(["ps", "-ww", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
        assert re.findall(r"pipeline stage (\w+) ", shown) and set(NAMES) <= set(re.findall(r"stage (\w+) ", shown))
        ends.arp()
    assert wait_gone(list(pids.values())) == []


def test_a_stage_holds_what_the_topology_grants_and_no_rights(ends: GuestEnd) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        for name, pid in s.stages().items():
            maps = set(re.findall(r"/dev/shm/rn-[0-9a-f]{8}-(\w+).*", Path(f"/proc/{pid}/maps").read_text()))
            stage = TOPO.stage(name)
            assert maps == ({"session", "arena", "ring"} | ({"flows"} if stage.flows else set())
                            | ({"names"} if stage.names else set()))
            objects = len(re.findall(r"/dev/shm/rn-", Path(f"/proc/{pid}/maps").read_text()))
            assert objects == (2 + len(TOPO.inputs(name)) + len(TOPO.outputs(name)) + stage.flows + bool(stage.names))
            fds = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            assert sum("eventfd" in f for f in fds) == 1 + len(TOPO.neighbours(name))
            assert not [f for f in fds if "/dev/shm" in f]  # mapped, then closed
            link = f"socket:[{os.fstat(ends.host.fileno()).st_ino}]"
            assert fds.count(link) == ("link" in TOPO.stage(name).fds)
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.findall(r"^NoNewPrivs:\t(\d)", status, re.M) == ["1"]
            for cap in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert re.findall(rf"^{cap}:\t(\w+)", status, re.M) == ["0" * 16]
            if os.geteuid() == 0:  # others have nothing in it to lose
                assert re.findall(r"^CapBnd:\t(\w+)", status, re.M) == ["0" * 16]


def test_a_stage_answers_pings(ends: GuestEnd) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        for seq, name in enumerate(NAMES, 1):
            s.ping(name, seq)
        while [c.pongs for c in s.children] != list(range(1, len(NAMES) + 1)):
            assert s.poll(DEADLINE), s.stop().reason


def test_two_sessions_side_by_side(ends: GuestEnd, nothing_left: None) -> None:
    other = GuestEnd()
    with (Session(make({}), link=ends.link(), deadlines=PATIENT) as a,
          Session(make({}), link=other.link(), deadlines=PATIENT) as b):
        for _ in range(3):
            ends.arp()
        other.arp()
        assert not set(a.stages().values()) & set(b.stages().values())
    assert (a.counters("classify")["arp_replies"], b.counters("classify")["arp_replies"]) == (3, 1)
    other.close()


def test_the_monitor_sees_a_running_and_an_ended_session(ends: GuestEnd) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        ends.guest.send(b"runt")
        ends.arp()
        facts = {f.name: f for f in stage_facts(s)}
        assert {f.state for f in facts.values()} == {"running"}
    after = {f.name: f for f in stage_facts(s)}
    assert {f.state for f in after.values()} == {"ended"}
    assert (after["guest_tx"].frames_in, after["guest_tx"].bytes_in) >= (1, 60)
    assert after["guest_tx"].drops == {"runt": 1}
    assert after["guest_rx"].frames_out == 1
    assert all(f.cpu_s > 0 for f in after.values())
    lines = stage_table(s).splitlines()
    assert [line.split()[0] for line in lines[2:]] == NAMES and "runt 1" in lines[2]


# -- ends that were asked for


def test_an_orderly_end_drains_what_was_taken(ends: GuestEnd, nothing_left: None) -> None:
    taken = 0
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        ends.guest.setblocking(False)
        for taken in range(50):
            ends.guest.send(ARP_REQUEST)
        taken += 1
        result = s.stop()
    assert (result.code, result.reason) == (Exit.OK, "stopped")
    assert {n: (e.status, e.reason, e.frames_left) for n, e in result.stages.items()} == {
        n: (0, "drained", 0) for n in NAMES}
    read = result.stages["guest_tx"].counters["frames_out"]
    assert result.stages["classify"].counters["frames_in"] == read
    assert result.stages["guest_rx"].counters["frames_out"] == result.stages["classify"].counters["arp_replies"] == read
    assert read <= taken
    assert s.counters("guest_tx")["frames_out"] == read  # still there after the memory is gone
    assert s.stop() is result


def test_end_asks_and_the_first_reason_counts(ends: GuestEnd) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        s.end("enough", Exit.RUNTIME)
        s.end("too late")
        assert not s.poll()
        result = s.stop()
    assert (result.code, result.reason) == (Exit.RUNTIME, "enough")


def test_a_guest_that_closes_the_link_ends_the_session(ends: GuestEnd, nothing_left: None) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        ends.arp()
        ends.guest.shutdown(socket.SHUT_RDWR)
        result = until_over(s)
    assert (result.code, result.reason) == (Exit.OK, "the guest closed the link")
    assert {e.status for e in result.stages.values()} == {0}, result


def serve(host: Fd, tell: Any, session_of_its_own: bool) -> None:
    """A supervisor's process: tells the stages' pids, serves until a signal, tells how it went."""
    if session_of_its_own:
        os.setsid()
    with Signals(signal.SIGINT, signal.SIGTERM) as signals:
        s = Session(make({}), link=Link(fd=int(host), kind="dgram", vnet=False), deadlines=PATIENT)
        s.watch(signals.fileno(), lambda: [s.end(n.name) for n in signals.take()])
        with s:
            tell.send(s.stages())
            result = s.run()
        tell.send((int(result.code), result.reason, {n: e.status for n, e in result.stages.items()}))


@pytest.fixture
def supervisor(ends: GuestEnd) -> Iterator[Callable[..., tuple[Any, Any, dict[str, int]]]]:
    """supervisor(): (process, pipe, pids of its stages) of a session in a process of its own."""
    with contextlib.ExitStack() as stack:
        def start(*, session_of_its_own: bool = False) -> tuple[Any, Any, dict[str, int]]:
            hear, tell = get_context("spawn").Pipe(duplex=False)
            stack.callback(hear.close)
            child = stack.enter_context(spawned(serve, Fd(ends.host.fileno()), tell, session_of_its_own))
            tell.close()
            assert hear.poll(DEADLINE)
            return child, hear, hear.recv()
        yield start


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_it_in_order(supervisor: Callable[..., Any], ends: GuestEnd, sig: signal.Signals) -> None:
    child, hear, pids = supervisor()
    ends.arp()
    os.kill(child.pid, sig)
    assert hear.poll(DEADLINE)
    assert hear.recv() == (0, sig.name, dict.fromkeys(NAMES, 0))
    assert wait_gone(list(pids.values())) == []


def test_a_signal_to_the_whole_group_is_no_accident(supervisor: Callable[..., Any]) -> None:
    """`kill -- -PGID`, as a container engine does: the stages get it too, and it is not reported as their fault."""
    child, hear, pids = supervisor(session_of_its_own=True)
    os.killpg(child.pid, signal.SIGTERM)
    assert hear.poll(DEADLINE)
    assert hear.recv() == (0, "SIGTERM", dict.fromkeys(NAMES, 0))
    assert wait_gone(list(pids.values())) == []


def test_kill_9_of_the_supervisor_ends_the_stages(supervisor: Callable[..., Any]) -> None:
    child, _, pids = supervisor()
    os.kill(child.pid, signal.SIGKILL)
    assert wait_gone(list(pids.values())) == []
    assert shm_left() == set()


def test_kill_9_of_everything(supervisor: Callable[..., Any]) -> None:
    child, _, pids = supervisor()
    for pid in (*pids.values(), child.pid):
        os.kill(pid, signal.SIGKILL)
    assert wait_gone(list(pids.values())) == []
    assert shm_left() == set()


# -- ends that nobody asked for


@pytest.mark.parametrize("name", NAMES)
def test_kill_9_of_a_stage_ends_the_session_and_is_named(ends: GuestEnd, name: str, nothing_left: None) -> None:
    with Session(make({"restarts": 0}), link=ends.link(), deadlines=PATIENT) as s:
        ends.arp()
        pids = s.stages()
        for n in range(1, 100):  # answered between two turns, or before the first: until it has published that it ended one
            s.ping(name, n)
            while s.child(name).pongs != n:
                assert s.poll(DEADLINE)
            if s.counters(name)["turns"]:
                break
        os.kill(pids[name], signal.SIGKILL)
        result = until_over(s)
    assert result.code is Exit.STAGE_DIED
    assert result.reason.startswith(f"stage {name} died: signal 9 (SIGKILL); last counters: ")
    assert "turns=" in result.reason
    assert {n: e.status for n, e in result.stages.items() if n != name} == dict.fromkeys(set(NAMES) - {name}, 0)
    assert result.stages[name].status == -signal.SIGKILL
    assert wait_gone(list(pids.values())) == []


def test_sigterm_to_one_stage_is_a_clean_end_of_it_and_ends_the_session(ends: GuestEnd, nothing_left: None) -> None:
    with Session(make({}), link=ends.link(), deadlines=PATIENT) as s:
        ends.arp()
        os.kill(s.stages()["egress"], signal.SIGTERM)
        result = until_over(s)
    assert result.code is Exit.STAGE_DIED
    assert result.reason.startswith("stage egress ended: SIGTERM; last counters: ")
    assert {e.status for e in result.stages.values()} == {0}


@pytest.mark.parametrize("name", ["classify", "services"])
def test_a_stage_that_hangs_is_killed_in_the_end(ends: GuestEnd, name: str, nothing_left: None) -> None:
    said: list[str] = []
    impatient = msgspec.structs.replace(PATIENT, drain=1.0, term=1.0)
    with Session(make({}), link=ends.link(), deadlines=impatient, warn=said.append) as s:
        os.kill(s.stages()[name], signal.SIGSTOP)
        result = s.stop()
    assert result.code is Exit.OK
    assert result.stages[name].status == -signal.SIGKILL
    assert f"stage {name} did not end: SIGKILL" in said  # others too, if the machine is that busy
    assert session_is_gone(s)


def test_a_second_signal_ends_the_patience(ends: GuestEnd, nothing_left: None) -> None:
    said: list[str] = []
    r, w = os.pipe()
    with Session(make({}), link=ends.link(), deadlines=PATIENT, warn=said.append) as s:
        os.kill(s.stages()["guest_tx"], signal.SIGSTOP)
        s.watch(r, lambda: (os.read(r, 1), s.hurry()))
        os.write(w, b"x")
        result = s.stop()
    assert result.stages["guest_tx"].status == -signal.SIGKILL
    os.close(r)
    os.close(w)


# -- starts that fail


def test_a_configuration_a_stage_refuses_names_stage_and_field(ends: GuestEnd, nothing_left: None) -> None:
    bad = Settings(mtu=100)  # not checked: make() would refuse it
    with pytest.raises(SessionError, match=r"^stage \w+ did not start: configuration: .*\$\.mtu") as error:
        Session(bad, link=ends.link()).start()
    assert error.value.code is Exit.NOT_READY


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_dies_in_start_up(ends: GuestEnd, name: str, nothing_left: None) -> None:
    class Killing(Session):
        def _begun(self, child: Child, *args: Any) -> None:
            super()._begun(child, *args)
            if child.decl.name == name:
                os.kill(child.pid, signal.SIGKILL)

    session = Killing(make({}), link=ends.link())
    says = rf"^stage {name} ended before it was running .*signal 9 \(SIGKILL\)"
    with pytest.raises(SessionError, match=says) as error:
        session.start()
    assert error.value.code is Exit.NOT_READY
    assert session.stages() == {}


@pytest.mark.parametrize(("deadlines", "says"), [
    ({"hello": 0.0}, r"the stages did not start within 0 s"), ({"ready": 0.0}, r"no Ready within 0 s"),
    ({"running": 0.0}, r"stage guest_rx: no Running within 0 s"),
], ids=["hello", "ready", "running"])
def test_a_stage_that_is_late(ends: GuestEnd, deadlines: dict[str, float], says: str, nothing_left: None) -> None:
    with pytest.raises(SessionError, match=says) as error:
        Session(make({}), link=ends.link(), deadlines=msgspec.structs.replace(PATIENT, **deadlines)).start()
    assert error.value.code is Exit.NOT_READY


def test_a_capture_file_that_cannot_be_made(ends: GuestEnd, tmp_path: Path, nothing_left: None) -> None:
    with pytest.raises(SessionError, match="--pcap .*no/file: No such file"):
        Session(make({"pcap": str(tmp_path / "no" / "file")}), link=ends.link()).start()


def test_an_end_asked_for_during_the_start(ends: GuestEnd, nothing_left: None) -> None:
    session = Session(make({}), link=ends.link(), deadlines=PATIENT)
    session.end("changed my mind")
    with pytest.raises(SessionError, match="changed my mind") as error:
        session.start()
    assert error.value.code is Exit.OK


# -- a stage, seen from the other end of its control socket


class ByHand:
    """A stage started as one would for a debugger; this test is its supervisor."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline", "stage", name, "--control-fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=run_env(),
                cwd="/")
        self.channel = Channel(ours)

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def next(self) -> Any:
        assert self.channel.wait(DEADLINE)
        got = self.channel.recv()
        return got[0] if got else None


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_whose_supervisor_goes_ends(name: str) -> None:
    with ByHand(name) as stage:
        assert stage.next() == Hello(version=VERSION, stage=name, pid=stage.process.pid)
        stage.channel.close()
        assert stage.process.wait(DEADLINE) == StageExit.ORPHANED


def test_a_stage_cancelled_before_it_is_configured() -> None:
    with ByHand("classify") as stage:
        stage.next()
        stage.channel.send(Cancel(drain_ms=0))
        assert stage.next() == Ended(reason="cancelled before it was configured")
        assert stage.process.wait(DEADLINE) == StageExit.OK


@pytest.mark.parametrize(("send", "says"), [
    (lambda c: c.send(Ping(seq=1)), "expected Configure, got Ping"),
    (lambda c: c.sock.send(b"\xc1"), "control message"),
    (lambda c: c.sock.send(msgspec.msgpack.encode({"type": "cancel", "drain_ms": "soon"})), r"\$\.drain_ms"),
    (lambda c: c.send(configure(version=VERSION + 1)), f"version {VERSION + 1}"),
    (lambda c: c.send(configure(stage="egress")), "'egress'"),
], ids=["wrong message", "no message", "wrong field", "other version", "other stage"])
def test_a_stage_says_what_is_wrong_with_a_message(send: Callable[[Channel], object], says: str) -> None:
    with ByHand("classify") as stage:
        stage.next()
        send(stage.channel)
        answer = stage.next()
        assert isinstance(answer, Failed) and re.search(says, answer.error), answer
        assert stage.process.wait(DEADLINE) == StageExit.PROTOCOL


def configure(*, version: int = VERSION, stage: str = "classify") -> Configure:
    return Configure(version=version, stage=stage, row=0, generation=0, session_size=1, arena_size=1, has_part=False,
                     flows_size=0, inputs=(), outputs=(), fds=(), config=msgspec.Raw(b"\x80"))


def test_it_starts_from_any_directory_and_ignores_what_lies_there(tmp_path: Path) -> None:
    """A `pipeline` package in the working directory is not ours."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('wrong package')")
    script = ("import sys, socket; sys.path.insert(0, sys.argv[1])\n"
              "from pipeline.supervisor import Link, Session\nfrom pipeline.config import make\n"
              "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
              "with Session(make({}), link=Link(fd=a.fileno(), kind='dgram', vnet=False)) as s: print(len(s.stages()))")
    done = subprocess.run([sys.executable, "-P", "-c", script, str(REPO)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=DEADLINE, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert (done.stdout, done.stderr) == (f"{len(NAMES)}\n", "")
