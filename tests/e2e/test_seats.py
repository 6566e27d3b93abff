"""Stages that are killed, stopped and started by hand under traffic: what the guest's programs see of it is nothing."""
from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import (
    DEADLINE,
    GATEWAY,
    REPO,
    RINGNET,
    SERVER,
    Attached,
    Netns,
    Program,
    pseudorandom,
    run_env,
    sh,
    sha256_file,
)

from pipeline import api
from pipeline.api import ApiError
from pipeline.client import Client

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("runtime")]

RESTARTED = ["guest_tx", "classify", "services", "guest_rx"]


@pytest.fixture
def client(runtime: Path) -> Iterator[Callable[[], Client]]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Client(runtime / "s.sock"))


def pids(client: Client) -> dict[str, int]:
    return {s.name: s.pid for s in client.call(api.Stages()).stages}


class Watch:
    """Stage events of a session, as they come."""

    def __init__(self, client: Client) -> None:
        client.call(api.Subscribe(events=["stage"]))
        self._client = client

    def all_running(self, stages: list[str]) -> None:
        """These come to run, in any order."""
        left = set(stages)
        for event in self._client.events(DEADLINE):
            assert isinstance(event, api.StageChanged)
            if event.state == "running":
                left.discard(event.stage)
            if not left:
                return
        raise AssertionError(f"the session ended before {left} ran")

    def until(self, stage: str, state: str) -> int:
        """The pid the stage had when it came to this state."""
        for event in self._client.events(DEADLINE):
            assert isinstance(event, api.StageChanged)
            if (event.stage, event.state) == (stage, state):
                return event.pid
        raise AssertionError(f"the session ended before {stage} was {state}")


@pytest.fixture
def by_hand(host_ns: Netns) -> Callable[[str, Path], Program]:
    """by_hand(stage, log): a stage of the session, as somebody in a terminal starts it."""
    return lambda name, log: Program(host_ns.argv(*RINGNET, "stage", name, "--session", "s"), log)


@contextlib.contextmanager
def transfers(guest_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path, size: int, rate: str
              ) -> Iterator[Callable[[], bool]]:
    """A download and an upload at a rate; at the end both are whole. Yields: are both still under way?"""
    address, port, root = nginx
    down, up = pseudorandom(root / "body", size, b"d"), pseudorandom(tmp_path / "source", size, b"u")
    url, curl = f"http://{address}:{port}", ["curl", "-sS", "--fail", "--max-time", "300", "--limit-rate", rate]
    with (subprocess.Popen(guest_ns.argv(*curl, "-o", str(tmp_path / "got"), f"{url}/body"), env=run_env()) as one,
          subprocess.Popen(guest_ns.argv(*curl, "-T", str(tmp_path / "source"), f"{url}/arrived"), env=run_env()) as two):
        yield lambda: one.poll() is None and two.poll() is None
    assert (one.returncode, two.returncode) == (0, 0)
    assert (sha256_file(tmp_path / "got"), sha256_file(root / "arrived")) == (down, up)


@contextlib.contextmanager
def moving(guest_ns: Netns, host_ns: Netns) -> Iterator[Callable[[], None]]:
    """Bytes on two connections, one a way, for as long as the block takes; each arrives, in order. Yields a function that
    returns when some more did on both."""
    done, news = threading.Event(), threading.Condition()
    blocks, errors = [0, 0], []

    def stream(way: int, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not done.wait(0.002):
                block = blocks[way].to_bytes(8, "big") * 2048  # both sockets' buffers have room for it
                source.sendall(block)
                left = memoryview(block)
                while left:
                    part = sink.recv(len(left))
                    assert part and part == left[:len(part)], f"block {blocks[way]}: {len(left)} bytes left"
                    left = left[len(part):]
                with news:
                    blocks[way] += 1
                    news.notify_all()
        except BaseException as e:
            errors.append(e)

    def moved() -> None:
        with news:
            want = [n + 2 for n in blocks]  # the first may have been under way
            assert news.wait_for(lambda: errors or blocks[0] >= want[0] and blocks[1] >= want[1], DEADLINE), "nothing moves"
        assert not errors, errors

    with host_ns.listen(SERVER) as listener, contextlib.ExitStack() as stack:
        threads = []
        for way in range(2):
            guest = stack.enter_context(guest_ns.socket())
            guest.connect(listener.getsockname())
            host = stack.enter_context(listener.accept()[0])
            host.settimeout(DEADLINE)
            threads.append(threading.Thread(target=stream, args=(way, *((guest, host) if way else (host, guest)))))
        for thread in threads:
            thread.start()
        try:
            moved()
            yield moved
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not errors, errors


def test_kill_9_of_the_stages_under_load_loses_no_byte(
        attach: Callable[..., Attached], guest_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path,
        client: Callable[[], Client]) -> None:
    attach("--session", "s", "--restarts", "1000")
    look, watch = client(), Watch(client())
    kills = under_load = 0
    with transfers(guest_ns, nginx, tmp_path, 32 << 20, "12M") as under_way:
        while (busy := under_way()) or kills < len(RESTARTED):  # a busy machine takes long to start a stage again
            name = RESTARTED[kills % len(RESTARTED)]
            victim = pids(look)[name]
            os.kill(victim, signal.SIGKILL)
            assert watch.until(name, "running") != victim
            kills += 1
            under_load += busy
    assert under_load, "the transfers were over before any stage was killed"
    # Names, leases and echoes are served by successors as well.
    assert guest_ns.run("dig", f"@{GATEWAY}", "+short", "host.ringnet.internal").stdout.split() == [GATEWAY]
    guest_ns.run("ping", "-c1", "-W30", GATEWAY)


def test_no_buffer_is_lost_by_kills(attach: Callable[..., Attached], guest_ns: Netns, client: Callable[[], Client]
                                    ) -> None:
    """More kills under a flood than a leak of a burst each would survive: guest_tx has 128 large buffers."""
    attach("--session", "s", "--restarts", "1000")
    look, watch = client(), Watch(client())
    for n in range(12):
        with subprocess.Popen(guest_ns.argv("ping", "-q", "-f", "-s", "1400", "-c", "2000", GATEWAY), env=run_env(),
                              stdout=subprocess.DEVNULL) as flood:
            name = RESTARTED[n % len(RESTARTED)]
            os.kill(pids(look)[name], signal.SIGKILL)
            watch.until(name, "running")
            flood.terminate()
    guest_ns.run("ping", "-c1", "-W30", GATEWAY)
    counters = look.call(api.Statistics()).counters
    assert sum(c.get("stalls_buf", 0) for c in counters.values()) == 0


def test_past_the_limit_the_session_ends_and_says_so(attach: Callable[..., Attached], client: Callable[[], Client]
                                                     ) -> None:
    session = attach("--session", "s", "--restarts", "1")
    look, watch = client(), Watch(client())
    os.kill(pids(look)["classify"], signal.SIGKILL)
    os.kill(watch.until("classify", "running"), signal.SIGKILL)
    assert session.wait() == 70
    said = session.output()
    assert "stage classify is gone (signal 9 (SIGKILL)): started again, 1 of at most 1 times within a minute" in said
    assert "stage classify died: signal 9 (SIGKILL); it was started again 1 times within a minute; last counters:" in said


@pytest.mark.parametrize("name", [*RESTARTED, "egress"])
def test_stopped_and_started_by_hand_the_flows_go_on(
        attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, tmp_path: Path,
        client: Callable[[], Client], name: str, by_hand: Callable[[str, Path], Program]) -> None:
    attach("--session", "s")
    look, watch = client(), Watch(client())
    with moving(guest_ns, host_ns) as moved:
        look.call(api.StageHold(stage=name))
        watch.until(name, "vacant")
        for n in range(2):
            with by_hand(name, tmp_path / f"hand{n}.log") as hand:
                assert watch.until(name, "running") == hand.pid
                moved()
                assert hand.end(signal.SIGINT) == 0
            watch.until(name, "vacant")
            assert f"ringnet stage: {name} ended: SIGINT; counters: " in hand.output()
        look.call(api.StageRelease(stage=name))
        watch.until(name, "running")
        moved()


@pytest.mark.parametrize("promote", ["0", "8"])
def test_egress_by_hand_keeps_every_flow(
        attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path,
        client: Callable[[], Client], by_hand: Callable[[str, Path], Program], promote: str) -> None:
    """Five processes in egress's seat, one after the other: transfers, an idle connection, a mapping of the guest's and one of
    a forward, and a client that comes while nobody sits there."""
    attach("--session", "s", "--promote", promote, "-t", "127.0.0.1/8080:80", "-u", "127.0.0.1/8080:80")
    look, watch = client(), Watch(client())
    with contextlib.ExitStack() as stack:
        def sock(ns: Netns, kind: int = socket.SOCK_STREAM) -> socket.socket:
            made = stack.enter_context(ns.socket(kind=kind))
            made.settimeout(DEADLINE)
            return made

        listener = stack.enter_context(host_ns.listen(SERVER))
        idle = sock(guest_ns)
        idle.connect(listener.getsockname())
        idle_host = stack.enter_context(listener.accept()[0])
        idle_host.settimeout(DEADLINE)
        inside, inside_udp = sock(guest_ns), sock(guest_ns, socket.SOCK_DGRAM)
        inside.bind(("0.0.0.0", 80))
        inside.listen()
        inside_udp.bind(("0.0.0.0", 80))
        asker, server, outside = (sock(ns, socket.SOCK_DGRAM) for ns in (guest_ns, host_ns, host_ns))
        server.bind((SERVER, 0))
        asker.sendto(b"first", server.getsockname())
        _, mapped = server.recvfrom(100)
        outside.sendto(b"first", ("127.0.0.1", 8080))
        _, seen = inside_udp.recvfrom(100)

        busy = 0
        with transfers(guest_ns, nginx, tmp_path, 12 << 20, "4M") as under_way:
            look.call(api.StageHold(stage="egress"))
            watch.until("egress", "vacant")
            for n in range(5):
                busy += under_way()
                waiting = sock(host_ns)
                waiting.connect(("127.0.0.1", 8080))  # into the backlog
                server.sendto(b"to %d" % n, mapped)
                outside.sendto(b"in %d" % n, ("127.0.0.1", 8080))
                with by_hand("egress", tmp_path / f"hand{n}.log") as hand:
                    assert watch.until("egress", "running") == hand.pid
                    assert asker.recv(100) == b"to %d" % n
                    asker.sendto(b"from %d" % n, server.getsockname())
                    assert server.recvfrom(100) == (b"from %d" % n, mapped)
                    assert inside_udp.recvfrom(100) == (b"in %d" % n, seen)
                    inside_udp.sendto(b"out %d" % n, seen)
                    assert outside.recv(100) == b"out %d" % n
                    with inside.accept()[0] as came:
                        came.sendall(b"hello")
                        assert waiting.recv(100) == b"hello"
                    if n % 2:  # in between it says nothing at all
                        idle.sendall(b"up %d" % n)
                        assert idle_host.recv(100) == b"up %d" % n
                        idle_host.sendall(b"down %d" % n)
                        assert idle.recv(100) == b"down %d" % n
                    assert hand.end(signal.SIGINT if n % 2 else signal.SIGTERM) == 0
                watch.until("egress", "vacant")
                said = hand.output()
                assert re.search("goes on with [0-9]+ flows of the process that left this seat", said), said
                assert re.search("leaves [0-9]+ flows to whoever takes this seat", said), said
            look.call(api.StageRelease(stage="egress"))
            watch.until("egress", "running")
        assert busy, "the transfers were over before the first process left"
        answer = guest_ns.run("dig", f"@{GATEWAY}", "+tcp", "+short", "host.ringnet.internal").stdout
        assert answer.split() == [GATEWAY]
        counters = look.call(api.Statistics()).counters["egress"]
        assert counters["flows_left"] == counters["flows_inherited"] >= 6 * 4
        assert "flows_not_inherited" not in counters  # zeros are left out


def test_egress_killed_by_hand_ends_its_flows_and_serves_new_ones(
        attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, tmp_path: Path, client: Callable[[], Client],
        by_hand: Callable[[str, Path], Program]) -> None:
    """The kernel closes its sockets."""
    attach("--session", "s", "-t", "127.0.0.1/8080:80")
    look, watch = client(), Watch(client())
    listener = host_ns.listen(SERVER)
    look.call(api.StageHold(stage="egress"))
    watch.until("egress", "vacant")
    for n in range(2):
        with by_hand("egress", tmp_path / f"hand{n}.log") as hand, guest_ns.socket() as guest:
            watch.until("egress", "running")
            guest.settimeout(DEADLINE)
            guest.connect(listener.getsockname())
            with listener.accept()[0] as host:
                host.settimeout(DEADLINE)
                guest.sendall(b"there")
                assert host.recv(100) == b"there"
                os.kill(hand.pid, signal.SIGKILL)
                watch.until("egress", "vacant")
                with contextlib.suppress(ConnectionResetError):  # by FIN or RST, but it learns of it
                    assert host.recv(100) == b""
                with by_hand("egress", tmp_path / f"next{n}.log") as successor:
                    watch.until("egress", "running")
                    with pytest.raises(ConnectionResetError):
                        guest.sendall(b"nobody")
                        guest.recv(100)
                    assert successor.end(signal.SIGINT) == 0
                watch.until("egress", "vacant")
    with by_hand("egress", tmp_path / "forward.log"), guest_ns.socket() as inside, host_ns.socket() as outside:
        watch.until("egress", "running")  # and knows of the forwards
        inside.bind(("0.0.0.0", 80))
        inside.listen()
        outside.connect(("127.0.0.1", 8080))
        inside.accept()[0].close()


def test_what_lies_there_at_the_sessions_end_is_reset(
        attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, client: Callable[[], Client]) -> None:
    """Nobody comes any more: a host shall not take a cut connection for a whole one."""
    session = attach("--session", "s")
    look, watch = client(), Watch(client())
    listener = host_ns.listen(SERVER)
    with guest_ns.socket() as guest:
        guest.connect(listener.getsockname())
        with listener.accept()[0] as host:
            host.settimeout(DEADLINE)
            look.call(api.StageHold(stage="egress"))
            watch.until("egress", "vacant")
            os.kill(session.pid, signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                host.recv(100)


def test_forwards_do_not_mind_that_a_link_stage_starts_again(
        attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, client: Callable[[], Client]) -> None:
    """They are egress's business: its neighbours, which map the flow table too, are not told of them."""
    attach("--session", "s", "-t", "127.0.0.1/8080:80")
    look, watch = client(), Watch(client())
    with guest_ns.socket() as inside:
        inside.bind(("0.0.0.0", 80))
        inside.listen()
        for name in ("guest_tx", "guest_rx"):
            os.kill(pids(look)[name], signal.SIGKILL)
            watch.until(name, "running")
            with host_ns.socket() as outside:
                outside.connect(("127.0.0.1", 8080))
                inside.accept()[0].close()


def test_run_hold_prints_the_commands_and_waits(host_ns: Netns, tmp_path: Path,
                                                by_hand: Callable[[str, Path], Program]) -> None:
    with Program(host_ns.argv(*RINGNET, "run", "--session", "s", "--hold", "classify", "--", "ping", "-c1", "-W30",
                              GATEWAY), tmp_path / "log") as session:
        deadline = time.monotonic() + DEADLINE
        while "every held seat was taken once" not in session.output():
            assert time.monotonic() < deadline and session.process.poll() is None, session.output()
            time.sleep(0.05)  # a file tells nobody that it was written
        said = session.output()
        assert f"PYTHONPATH={REPO} gdb --args {sys.executable} -P -m pipeline stage classify --session s\n" in said
        for word in ("perf record", "valgrind", "py-spy"):
            assert word in said
        with by_hand("classify", tmp_path / "hand.log") as hand:
            assert session.wait() == 0
            assert hand.wait() == 0
        assert "1 received" in session.output()
        assert "classify ended: drained" in hand.output()


def test_a_stage_in_another_network_namespace_is_refused(attach: Callable[..., Attached]) -> None:
    attach("--session", "s")
    done = sh(*RINGNET, "stage", "egress", "--session", "s", check=False, env=run_env())
    assert done.returncode == 1 and "has another network namespace; start the stage there, with nsenter" in done.stderr


@pytest.mark.parametrize(("args", "says"), [
    (["stage", "nonsense", "--session", "s"], "invalid choice: 'nonsense'"),
    (["stage", "classify"], "stage classify runs, as process [0-9]+; free its seat with: ringnet ctl hold classify"),
    (["ctl", "-s", "s", "hold", "nonsense"], "there is no stage nonsense; there are guest_tx, classify, "),
    (["ctl", "-s", "s", "release", "classify"], "stage classify is not held"),
])
def test_what_cannot_be_is_said(attach: Callable[..., Attached], host_ns: Netns, args: list[str], says: str) -> None:
    attach("--session", "s")
    done = sh(*host_ns.argv(*RINGNET, *args), check=False, env=run_env())
    assert done.returncode in (1, 2) and done.stdout == ""
    assert re.search(says, done.stderr) and "Traceback" not in done.stderr, done.stderr


def test_a_seat_is_taken_once(attach: Callable[..., Attached], client: Callable[[], Client], tmp_path: Path,
                              by_hand: Callable[[str, Path], Program]) -> None:
    attach("--session", "s")
    look, watch = client(), Watch(client())
    look.call(api.StageHold(stage="services"))
    watch.until("services", "vacant")
    with by_hand("services", tmp_path / "hand.log"):
        watch.until("services", "running")
        with pytest.raises(ApiError, match="stage services runs, as process"):
            look.call(api.StageTake(stage="services"))


def test_names_added_while_it_ran_are_known_to_the_successor(
        attach: Callable[..., Attached], guest_ns: Netns, client: Callable[[], Client]) -> None:
    attach("--session", "s", "--hosts", "old=192.0.2.9", "--hosts", "kept=192.0.2.8")
    look, watch = client(), Watch(client())
    look.call(api.HostsAdd(names={"new": ["192.0.2.7"]}))
    look.call(api.HostsRemove(names=["old"], owner="options"))
    os.kill(pids(look)["services"], signal.SIGKILL)
    watch.until("services", "running")

    def dig(name: str) -> list[str]:
        return guest_ns.run("dig", f"@{GATEWAY}", "+time=30", "+tries=1", "+short", f"{name}.ringnet.internal").stdout.split()

    assert (dig("new"), dig("kept"), dig("old")) == (["192.0.2.7"], ["192.0.2.8"], [])


def test_a_stage_by_hand_ends_with_the_session(attach: Callable[..., Attached], client: Callable[[], Client],
                                               tmp_path: Path, by_hand: Callable[[str, Path], Program]) -> None:
    session = attach("--session", "s")
    look, watch = client(), Watch(client())
    look.call(api.StageHold(stage="guest_rx"))
    watch.until("guest_rx", "vacant")
    with by_hand("guest_rx", tmp_path / "hand.log") as hand:
        watch.until("guest_rx", "running")
        os.kill(session.pid, signal.SIGKILL)
        assert hand.wait() == 3
