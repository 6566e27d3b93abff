"""UDP forwards: real peers on the host's loopback, a scripted guest on the link; with a clock, egress alone."""
from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.forwards import Forward
from shm._dataplane import ffi, lib
from tests.harness import (
    DEADLINE,
    GATEWAY,
    GUEST,
    UDP,
    Datagram,
    EgressOnly,
    Guest,
    Wire,
    fresh_ident,
    fresh_port,
    udp_server,
)


@contextlib.contextmanager
def forward(wire: Wire, **more: Any) -> Iterator[Forward]:
    rule = Forward(**({"proto": "udp", "host_addr": "127.0.0.1", "host_port": 0, "guest_port": fresh_port()} | more))
    [made] = wire.session.change_forwards([rule])
    try:
        yield made
    finally:
        if made in wire.session.forwards():
            wire.session.change_forwards(remove=[made])


def known(guest: Guest) -> None:
    ident = fresh_ident()
    guest.ping(ident, 0)
    guest.recv_echo(ident)


@contextlib.contextmanager
def peer(port: int, address: str = "127.0.0.1", source: tuple[str, int] = ("", 0)) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(DEADLINE)
        s.bind(source)
        s.connect((address, port))
        yield s


def reply(guest: Guest, to: Datagram, data: bytes) -> None:
    guest.send_udp(to.dport, to.sport, data, to.src)


@pytest.mark.fault(28)
def test_a_peer_has_one_port_and_gets_its_answers(wire: Wire) -> None:
    """Not a new port for each datagram."""
    known(wire)
    with forward(wire) as rule, peer(rule.host_port) as one, peer(rule.host_port) as two:
        seen = {}
        for n in range(5):
            for name, s in (("one", one), ("two", two)):
                s.send(b"%s %d" % (name.encode(), n))
                d = wire.recv_udp(rule.guest_port)
                assert (d.src, d.data) == (GATEWAY, b"%s %d" % (name.encode(), n))
                assert seen.setdefault(name, d.sport) == d.sport == s.getsockname()[1]
                reply(wire, d, b"to " + d.data)
                assert s.recv(100) == b"to " + d.data


def test_the_guest_may_speak_first_again_and_unasked(wire: Wire) -> None:
    known(wire)
    with forward(wire) as rule, peer(rule.host_port) as s:
        s.send(b"subscribe")
        d = wire.recv_udp(rule.guest_port)
        for n in range(20):
            reply(wire, d, b"%d" % n)
        assert [s.recv(100) for _ in range(20)] == [b"%d" % n for n in range(20)]


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 9000, 65507])
def test_every_size_both_ways(wire: Wire, size: int) -> None:
    known(wire)
    data = hashlib.shake_256(b"%d" % size).digest(size)
    with forward(wire) as rule, peer(rule.host_port) as s:
        s.send(data)
        d = wire.recv_udp(rule.guest_port)
        assert d.data == data
        reply(wire, d, data)
        assert s.recv(65535) == data


def test_answers_leave_from_the_address_that_was_asked(wire: Wire) -> None:
    """A rule for every address: a connected peer takes answers only from where it sent to."""
    known(wire)
    with forward(wire, host_addr="") as rule:
        for address in ("127.0.0.1", "127.0.0.2", "127.1.2.3"):
            with peer(rule.host_port, address) as s:
                s.send(address.encode())
                d = wire.recv_udp(rule.guest_port)
                reply(wire, d, b"yes")
                assert s.recv(100) == b"yes"


@pytest.mark.parametrize("listens", ["", "::", "::1"])
def test_peers_by_ipv6(wire: Wire, listens: str) -> None:
    """The guest knows no IPv6: they are the gateway to it; answers leave from the address that was asked."""
    known(wire)
    with forward(wire, host_addr=listens) as rule, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one, \
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as two:
        seen = set()
        for n in range(3):
            for s in (one, two):
                s.settimeout(DEADLINE)
                s.connect(("::1", rule.host_port))  # takes answers from there only
                s.send(b"%d" % n)
                d = wire.recv_udp(rule.guest_port)
                assert (d.src, d.data) == (GATEWAY, b"%d" % n)
                seen.add(d.sport)
                reply(wire, d, b"to %d" % n)
                assert s.recv(100) == b"to %d" % n
        assert len(seen) == 2
        with peer(rule.host_port) as v4:  # IPv4 where the rule is for every address, and only there
            v4.send(b"four")
            if listens:
                with pytest.raises(ConnectionRefusedError):
                    v4.recv(1)
            else:
                assert wire.recv_udp(rule.guest_port).data == b"four"


def test_peers_with_one_port_get_different_ones(wire: Wire) -> None:
    """127.0.0.1 and 127.0.0.2 are both the gateway to the guest."""
    known(wire)
    with forward(wire) as rule, peer(rule.host_port, source=("127.0.0.1", 0)) as one:
        with peer(rule.host_port, source=("127.0.0.2", one.getsockname()[1])) as two:
            one.send(b"one")
            first = wire.recv_udp(rule.guest_port)
            two.send(b"two")
            second = wire.recv_udp(rule.guest_port)
            assert first.sport != second.sport
            reply(wire, second, b"for two")
            reply(wire, first, b"for one")
            assert (one.recv(100), two.recv(100)) == (b"for one", b"for two")


def test_the_guests_own_traffic_from_that_port_is_not_touched(wire: Wire) -> None:
    known(wire)
    with forward(wire) as rule, peer(rule.host_port) as s, udp_server() as server:
        s.send(b"in")
        d = wire.recv_udp(rule.guest_port)
        wire.send_udp(rule.guest_port, server.getsockname()[1], b"out")
        data, address = server.recvfrom(100)
        assert data == b"out"
        server.sendto(b"back", address)
        assert wire.recv_udp(rule.guest_port).data == b"back"
        reply(wire, d, b"answer")
        assert s.recv(100) == b"answer"


def test_removed_rule_and_the_same_again(wire: Wire) -> None:
    """The port is free at once; the peer keeps its port towards the guest."""
    known(wire)
    with forward(wire) as rule, peer(rule.host_port) as s:
        s.send(b"one")
        before = wire.recv_udp(rule.guest_port)
        wire.session.change_forwards(remove=[rule])
        with contextlib.suppress(ConnectionRefusedError):
            s.send(b"lost")
            s.send(b"lost")
        assert wire.session.change_forwards([rule]) == [rule]
        with contextlib.suppress(ConnectionRefusedError):
            s.send(b"maybe")  # may be told of the ICMP error for the one before
        s.send(b"two")
        while (d := wire.recv_udp(rule.guest_port)).data != b"two":
            assert d.data == b"maybe"
        assert d.sport == before.sport
        reply(wire, d, b"yes")
        assert s.recv(100) == b"yes"


class Alone(EgressOnly):
    """egress alone with one UDP forward on loopback."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
            c = ffi.new("struct egress_listener *", {"fd": s.fileno(), "proto": 17, "guest4": socket.inet_aton(GUEST),
                                                     "guest_port": 53})
            self.slot = lib.stage_egress_listen(self._stage, c)
            assert self.slot >= 0
            s.detach()
        known(self)

    def mappings(self) -> int:
        return sum(1 for f in self.flows() if f.proto == UDP)


@pytest.mark.fault(29)
def test_a_guest_that_only_listens_sees_one_peer_for_as_long_as_it_speaks() -> None:
    """Like a log server: it never answers, and the peer's port towards it stays."""
    with Alone() as g, peer(g.port) as s:
        g.stop_clock()
        seen = set()
        for n in range(20):
            s.send(b"%d" % n)
            seen.add(g.recv_udp(53).sport)
            g.advance(29)
        assert len(seen) == 1 and g.counters()["udp_inbound_mappings"] == 1


def test_timeouts() -> None:
    """30 s until the guest answered, then 180 s of silence (RFC 4787 4.3)."""
    with Alone() as g, peer(g.port) as s:
        s.send(b"?")
        d = g.recv_udp(53)
        g.stop_clock()
        g.advance(29)
        assert g.mappings() == 1
        g.advance(2)
        assert g.mappings() == 0
        s.send(b"?")
        d = g.recv_udp(53)
        reply(g, d, b"!")
        assert s.recv(10) == b"!"
        g.advance(179)
        assert g.mappings() == 1
        g.advance(2)
        assert g.mappings() == 0


@pytest.mark.fault(28)
def test_the_table_is_bounded_and_the_oldest_goes() -> None:
    """And outsiders never cost the guest a mapping of its own."""
    with Alone(udp_max=4) as g, contextlib.ExitStack() as stack, udp_server() as server:
        g.send_udp(4000, server.getsockname()[1], b"mine")
        peers = [stack.enter_context(peer(g.port)) for _ in range(6)]
        seen = []
        for s in peers:
            s.send(b"?")
            seen.append(g.recv_udp(53))
        assert g.mappings() == 5
        assert g.counters()["udp_evicted"] == 2
        reply(g, seen[-1], b"!")
        assert peers[-1].recv(10) == b"!"
        server.sendto(b"still yours", server.recvfrom(10)[1])
        assert g.recv_udp(4000).data == b"still yours"


def test_removing_ends_the_mappings() -> None:
    with Alone() as g, peer(g.port) as s:
        s.send(b"?")
        d = g.recv_udp(53)
        assert lib.stage_egress_unlisten(g._stage, g.slot, 0) == 1
        assert g.mappings() == 0
        reply(g, d, b"!")  # not to the peer, but to the gateway's port: a mapping of the guest's own
        assert g.mappings() == 1


def test_a_full_ring_leaves_the_datagrams_in_the_socket() -> None:
    with Alone(ring=16) as g, peer(g.port) as s:
        for n in range(100):
            s.send(b"%d" % n)
        assert [g.recv_udp(53).data for _ in range(100)] == [b"%d" % n for n in range(100)]


def test_a_guest_that_never_spoke_gets_a_broadcast_and_an_arp_request() -> None:
    """Linux takes a datagram that came as an Ethernet broadcast (unlike TCP)."""
    with EgressOnly() as g, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        c = ffi.new("struct egress_listener *", {"fd": listener.detach(), "proto": 17, "guest_port": 53})
        assert lib.stage_egress_listen(g._stage, c) >= 0
        with peer(port) as s:
            s.send(b"?")
            frames = [g.recv_frame(), g.recv_frame()]
            assert {f[12:14] for f in frames} == {b"\x08\x00", b"\x08\x06"}
            assert all(f[:6] == b"\xff" * 6 for f in frames)
