"""Promoted flows when something breaks: a stage is killed, or has no descriptor left. No socket is kept that nobody uses,
none is mixed up with another's, and a flow goes on where it can."""
from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import DEADLINE, Wire, fresh_port, udp_server
from tests.wire.guest_tcp import RST
from tests.wire.test_promotion import both_ways, descriptors, gone, owners, promoted, settle, udp_settle, until
from tests.wire.test_tcp import connection

LINK_STAGES = ("guest_tx", "guest_rx")


def kill(wire: Wire, *names: str) -> None:
    """kill -9, and wait until the successors run."""
    old = {name: wire.session.child(name).generation for name in names}
    for name in names:
        os.kill(wire.session.stages()[name], signal.SIGKILL)
    end = time.monotonic() + DEADLINE
    while any(wire.session.child(n).generation == g or wire.session.child(n).state.name != "RUNNING" for n, g in old.items()):
        assert wire.session.poll(0.1) and time.monotonic() < end, f"{names} were not started again"


@contextlib.contextmanager
def descriptor_limit(wire: Wire, *names: str) -> Iterator[None]:
    """These stages get no further descriptor, as long as this lasts."""
    pids = [wire.session.stages()[name] for name in names]
    before = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids]
    for pid, (_, hard) in zip(pids, before, strict=True):
        used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(n for n in range(1024) if n not in used), hard))
    try:
        yield
    finally:
        for pid, limits in zip(pids, before, strict=True):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", LINK_STAGES)
def test_without_descriptors_a_flow_is_not_offered_again_and_again(make_wire: Callable[..., Wire], name: str) -> None:
    """It goes on in egress; each exchange asks whether it may be offered. Once there are descriptors it is promoted."""
    wire = make_wire(promote=2)
    with connection(wire) as (g, host), udp_server() as server:
        port = fresh_port()
        with descriptor_limit(wire, name):
            start = time.monotonic()
            for _ in range(30):
                both_ways(g, host, 3000)
                wire.send_udp(port, server.getsockname()[1], b"up")
                data, address = server.recvfrom(10)
                server.sendto(b"down", address)
                assert (data, wire.recv_udp(port).data) == (b"up", b"down")
            took = time.monotonic() - start
            lacking = wire.counters()["promote_lacking"]
            # Two flows at once, then none for 0.1 s, 0.2 s ...: and there is a way to lose count, not to lose hundreds.
            assert 1 <= lacking <= 4 + 2 * took / 0.1
            assert lacking <= wire.counters(name)["promote_failed"] <= lacking + 4
        settle(wire, g, host)
        both_ways(g, host)
        end = time.monotonic() + DEADLINE
        while owners(wire, port) != ("guest_tx", "guest_rx"):
            assert time.monotonic() < end
            wire.send_udp(port, server.getsockname()[1], b"up")
            server.sendto(b"down", server.recvfrom(10)[1])
            assert wire.recv_udp(port).data == b"down"


def test_no_descriptor_is_left_after_kills_and_ends(make_wire: Callable[..., Wire]) -> None:
    """Flows that were promoted, taken back, promoted anew to a successor, and ended: also while offers were under way to a
    process that was killed. What each stage holds at the end is what it held at the start."""
    wire = make_wire(promote=2, restarts=1000)
    before = descriptors(wire)
    with udp_server() as server:
        port = fresh_port()
        for victims in (("guest_tx",), ("guest_rx",), LINK_STAGES):
            with contextlib.ExitStack() as stack:
                flows = [stack.enter_context(promoted(wire)) for _ in range(20)]
                late = [stack.enter_context(connection(wire)) for _ in range(20)]
                address = udp_settle(wire, port, server)
                server.sendto(b"down", address)
                assert wire.recv_udp(port).data == b"down"
                # Offers under way while the stage dies: what these say settles their flows.
                for name in victims:
                    os.kill(wire.session.stages()[name], signal.SIGSTOP)
                for g, host in late:
                    if "guest_tx" not in victims:
                        g.push(b"s" * 10)
                    host.sendall(b"s" * 10)
                kill(wire, *victims)
                for g, host in late:
                    if "guest_tx" not in victims:
                        assert host.recv(10) == b"s" * 10
                    assert g.pull(10) == b"s" * 10
                for g, host in flows + late:
                    settle(wire, g, host)
                    both_ways(g, host, 3000)
                assert udp_settle(wire, port, server) == address
                # Each flow's socket once in each stage, and the mapping's.
                until(wire, {name: n + len(flows + late) + 1 for name, n in before.items()})
                for k, (g, host) in enumerate(flows + late):
                    if k % 2:
                        g.send(RST, seq=g.snd_nxt)
                    else:
                        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        host.close()
                for g, _ in flows + late:
                    gone(wire, g.sport)
        until(wire, {name: n + 1 for name, n in before.items()})
