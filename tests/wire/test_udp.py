"""UDP through the gateway to real sockets on loopback (csrc/udp.c). Most tests run against egress alone and
through the whole pipeline: see the `guest` fixture."""
from __future__ import annotations

import os
import random
import select
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as ScapyUDP
from scapy.layers.l2 import Ether

from tests.harness import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    GUEST2,
    GUEST_MAC,
    UDP,
    EgressOnly,
    Wire,
    checksum,
    closed_udp_port,
    fresh_port,
    quoted,
    udp,
    udp_server,
)

SHARED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.fault(27)
@pytest.mark.parametrize("size", [0, 1, 1400, 1472, 1473, 1924, 1925, 3000, 9000, 65507])
def test_a_datagram_of_any_size_there_and_back(guest, size):
    """RFC 768; RFC 791 3.2: 1472 is the last that fits an MTU of 1500."""
    data = os.urandom(size)
    port = fresh_port()
    with udp_server() as server:
        guest.send_udp(port, server.getsockname()[1], data)
        got, address = server.recvfrom(70000)
        assert got == data
        server.sendto(got, address)
        reply = guest.recv_udp(port)
        assert reply.data == data
        assert (reply.src, reply.dst, reply.sport) == (GATEWAY, GUEST, server.getsockname()[1])
    assert reply.fragments == -(-(8 + size) // 1480)


@SHARED
@given(size=st.integers(0, 65507) | st.integers(1440, 2000))
def test_any_size_through_the_whole_pipeline(wire, size):
    """Fragments both ways put together to the same bytes (the harness checks that they fit and fill)."""
    data = random.Random(size).randbytes(size)
    with udp_server() as server:
        port = fresh_port()
        wire.send_udp(port, server.getsockname()[1], data)
        got, address = server.recvfrom(70000)
        assert got == data
        server.sendto(got, address)
        assert wire.recv_udp(port).data == data


@settings(max_examples=40, deadline=None)
@given(mtu=st.sampled_from([576, 577, 1280, 1500, 1952, 1953, 4000, 9000, 65520]), sizes=st.lists(
    st.integers(0, 65507) | st.integers(500, 2000), min_size=1, max_size=8))
def test_replies_of_any_size_at_any_mtu(mtu, sizes):
    """Bursts mix datagrams that need small buffers, large ones and fragments; order is kept."""
    with EgressOnly(mtu=mtu) as guest, udp_server() as server:
        port = fresh_port()
        guest.send_udp(port, server.getsockname()[1], b"")
        address = server.recvfrom(10)[1]
        sent = [random.Random(n).randbytes(n) for n in sizes]
        for data in sent:
            server.sendto(data, address)
        for data in sent:
            reply = guest.recv_udp(port)
            assert reply.data == data
            step = (mtu - 20) // 8 * 8
            assert reply.fragments == (1 if 28 + len(data) <= mtu else -(-(8 + len(data)) // step))


def test_frames_are_what_scapy_calls_right(wire):
    """An oracle of its own: header checksums recomputed by scapy are those on the wire."""
    port = fresh_port()
    with udp_server() as server:
        wire.send(Ether(dst=GATEWAY_MAC, src=GUEST_MAC) / IP(src=GUEST, dst=GATEWAY) /
                  ScapyUDP(sport=port, dport=server.getsockname()[1]) / b"ping")
        data, address = server.recvfrom(100)
        assert data == b"ping"
        server.sendto(b"pong", address)
        got = wire.recv(lambda p: ScapyUDP in p and p[ScapyUDP].dport == port)
    again = got.copy()
    del again[IP].chksum, again[ScapyUDP].chksum, again[IP].len, again[ScapyUDP].len
    assert bytes(Ether(bytes(again))) == bytes(got)
    assert bytes(got[ScapyUDP].payload) == b"pong"
    assert (got.src, got.dst) == (GATEWAY_MAC, GUEST_MAC)


@pytest.mark.fault(29)
def test_one_guest_port_is_one_host_port_for_every_destination(guest):
    """RFC 4787 4.1 REQ-1: endpoint-independent mapping."""
    port = fresh_port()
    with udp_server() as one, udp_server() as two:
        for server in (one, two):
            guest.send_udp(port, server.getsockname()[1], b"who am I?")
        assert one.recvfrom(100)[1] == two.recvfrom(100)[1]


def test_a_host_that_was_not_asked_reaches_the_guest_under_its_own_port(guest):
    """RFC 4787 5: filtering is endpoint-independent too, so that peers can be introduced to each other."""
    port = fresh_port()
    with udp_server() as asked, udp_server() as stranger:
        guest.send_udp(port, asked.getsockname()[1], b"hello")
        stranger.sendto(b"from elsewhere", asked.recvfrom(100)[1])
        got = guest.recv_udp(port)
        assert (got.data, got.sport) == (b"from elsewhere", stranger.getsockname()[1])


@pytest.mark.fault(31)
def test_two_guest_ports_and_two_guest_addresses_have_mappings_of_their_own(guest):
    port = fresh_port()
    with udp_server() as server:
        seen = set()
        for src, sport in ((GUEST, port), (GUEST, fresh_port()), (GUEST2, port)):
            guest.send_udp(sport, server.getsockname()[1], b"x", src=src)
            seen.add(server.recvfrom(10)[1])
        assert len(seen) == 3


@pytest.mark.fault(30)
def test_closed_port_is_told_as_port_unreachable(guest):
    """RFC 792 type 3 code 3, about the guest's own packet, from the address it was sent to."""
    port, closed = fresh_port(), closed_udp_port()
    guest.send_udp(port, closed, b"anybody there?")
    error = guest.recv_error(lambda q: q.proto == UDP and q.sport == port)
    about = quoted(error)
    assert (error.src, error.icmp) == (GATEWAY, (3, 3))
    assert (about.src, about.dst, about.dport, about.data) == (GUEST, GATEWAY, closed, b"anybody there?")


def test_a_refused_datagram_does_not_cost_the_next_one(guest):
    """ECONNREFUSED for an earlier datagram is returned by a later sendmsg(), which then sent nothing."""
    port, closed = fresh_port(), closed_udp_port()
    with udp_server() as server:
        for n in range(20):
            guest.send_udp(port, closed, b"lost")
            guest.send_udp(port, server.getsockname()[1], b"%d" % n)
        assert [server.recvfrom(10)[0] for _ in range(20)] == [b"%d" % n for n in range(20)]


@pytest.mark.fault(30)
def test_ttl_that_ends_here_is_time_exceeded(guest):
    """RFC 1812 5.3.1, RFC 792 type 11: the gateway is the first hop."""
    port = fresh_port()
    guest.send_udp(port, 33434, b"probe", dst="192.0.2.7", ttl=1)
    error = guest.recv_error(lambda q: q.proto == UDP and q.sport == port)
    assert (error.src, error.icmp) == (GATEWAY, (11, 0))
    assert quoted(error).dst == "192.0.2.7"


def test_ttl_one_reaches_the_gateway_itself(guest):
    """A router delivers to itself without looking at the TTL (RFC 1812 5.2.3): traceroute's last line."""
    port = fresh_port()
    with udp_server() as server:
        guest.send_udp(port, server.getsockname()[1], b"near", ttl=1)
        assert server.recvfrom(10)[0] == b"near"


@pytest.mark.fault(26)
@pytest.mark.parametrize("order", [lambda f: f, lambda f: f[::-1], lambda f: f + f[:1]],
                         ids=["in order", "backwards", "one twice"])
def test_fragments_of_the_guest_arrive_whole(wire, order):
    """RFC 791 3.2, RFC 815: classify puts them together, whatever their order."""
    data = os.urandom(7000)
    with udp_server() as server:
        wire.send_udp(fresh_port(), server.getsockname()[1], data, order=order)
        assert server.recvfrom(10000)[0] == data


@pytest.mark.fault(26)
def test_bad_udp_checksum_goes_nowhere(wire):
    port = fresh_port()
    with udp_server() as server:
        dport = server.getsockname()[1]
        bad = bytearray(udp(GUEST, port, GATEWAY, dport, b"bad"))
        bad[6] ^= 0xFF
        wire.send_ip(UDP, bytes(bad))
        none = udp(GUEST, port, GATEWAY, dport, b"none")
        wire.send_ip(UDP, none[:6] + b"\0\0" + none[8:])  # RFC 768: zero means it was not computed
        assert server.recvfrom(10)[0] == b"none"


def test_a_checksum_that_comes_out_as_zero_is_sent_as_ones(guest):
    """RFC 768: zero on the wire would mean that there is none."""
    port = fresh_port()
    with udp_server() as server:
        sport = server.getsockname()[1]
        guest.send_udp(port, sport, b"go")
        address = server.recvfrom(10)[1]
        pseudo = socket.inet_aton(GATEWAY) + socket.inet_aton(GUEST) + struct.pack("!BBH", 0, UDP, 10)
        data = struct.pack("!H", checksum(pseudo + struct.pack("!HHHH", sport, port, 10, 0) + b"\0\0"))
        server.sendto(data, address)
        reply = guest.recv_udp(port)
        assert reply.data == data and reply.payload[6:8] == b"\xff\xff"


def test_a_burst_of_replies_arrives_in_order_and_whole(guest):
    port, n = fresh_port(), 200
    with udp_server() as server:
        guest.send_udp(port, server.getsockname()[1], b"go")
        address = server.recvfrom(10)[1]
        for k in range(n):
            server.sendto(b"%d" % k * 20, address)
        assert [guest.recv_udp(port).data for _ in range(n)] == [b"%d" % k * 20 for k in range(n)]


@pytest.mark.fault(29)
def test_the_least_recently_used_mapping_goes_when_there_are_too_many(make_wire):
    """The bound is a setting; the one that goes gets a new host port when it speaks again."""
    w: Wire = make_wire(udp_max=4)
    ports = [fresh_port() for _ in range(5)]
    with udp_server() as server:
        def speak(port: int) -> tuple[str, int]:
            w.send_udp(port, server.getsockname()[1], b"x")
            return server.recvfrom(10)[1]

        first = {p: speak(p) for p in ports[:4]}
        assert speak(ports[0]) == first[ports[0]]  # now ports[1] is the oldest
        speak(ports[4])
        for p in (ports[0], ports[2], ports[3]):
            assert speak(p) == first[p], "a mapping in use was ended"
        w.fence()
        assert w.counters()["udp_evicted"] == 1
        # The socket is gone: what is sent to its port is refused.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("127.0.0.1", first[ports[1]][1]))
            s.send(b"late")
            assert select.select([s], [], [], 20)[0], "no error came back"
            with pytest.raises(ConnectionRefusedError):
                s.recv(10)


@pytest.mark.fault(32)
def test_loopback_can_be_closed_to_the_guest(make_wire):
    """--no-host-loopback: told at once, RFC 1812 5.2.7.1 code 13, and nothing reaches the server."""
    w: Wire = make_wire(no_host_loopback=True)
    port = fresh_port()
    with udp_server() as server:
        w.send_udp(port, server.getsockname()[1], b"let me in")
        assert w.recv_error(lambda q: q.sport == port).icmp == (3, 13)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recvfrom(10)
