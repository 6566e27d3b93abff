"""ICMP echo and the errors of the network (csrc/icmp.c, and csrc/udp.c's error queue).

What leaves the host needs a network with routers: tests/wire/routed.py.
"""
from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import (
    GATEWAY,
    GUEST,
    ICMP,
    UDP,
    EgressOnly,
    Wire,
    checksum,
    echo,
    fresh_ident,
    fresh_port,
    ipv4,
    quoted,
)
from tests.netlab import Netns
from tests.wire.routed import FAR, NO_ROUTE, ROUTER, inside, routed

SHARED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# -- the gateway itself


@pytest.mark.fault(30)
@pytest.mark.parametrize("size", [0, 1, 56, 1472, 1473, 9000, 65507])
def test_the_gateway_answers_pings_of_any_size(guest, size):
    """RFC 1122 3.2.2.6: identifier, sequence number and all the data come back."""
    ident, data = fresh_ident(), os.urandom(size)
    guest.ping(ident, 7, data)
    reply = guest.recv_echo(ident)
    assert (reply.src, reply.dst, reply.rest, reply.data) == (GATEWAY, GUEST, ident << 16 | 7, data)
    assert reply.fragments == -(-(8 + size) // 1480)


@SHARED
@given(data=st.binary(max_size=3000), seq=st.integers(0, 65535))
def test_what_the_gateway_sends_back_is_what_was_sent(wire, data, seq):
    ident = fresh_ident()
    wire.ping(ident, seq, data)
    reply = wire.recv_echo(ident)
    assert (reply.rest & 0xFFFF, reply.data) == (seq, data)


def test_the_gateway_answers_whatever_the_ttl(guest):
    ident = fresh_ident()
    guest.ping(ident, 1, ttl=1)
    guest.recv_echo(ident)


def test_the_gateway_answers_without_any_right_to_icmp_sockets():
    with EgressOnly(raw_icmp_fd=-1) as guest:
        guest.ping(5, 1, b"x")
        guest.recv_echo(5)
        assert guest.counters()["icmp_echo_local"] == 1
        assert guest.counters()["icmp_mappings"] == 0


def test_ttl_that_ends_here_is_time_exceeded(guest):
    """RFC 1812 5.3.1: the first line of a traceroute -I."""
    ident = fresh_ident()
    guest.ping(ident, 1, b"probe", dst="192.0.2.77", ttl=1)
    error = guest.recv_error(lambda q: q.proto == ICMP and q.rest >> 16 == ident)
    assert (error.src, error.icmp, quoted(error).dst) == (GATEWAY, (11, 0), "192.0.2.77")


@pytest.mark.parametrize("kind", [0, 3, 5, 11, 13, 17])
def test_other_icmp_of_the_guest_is_counted_and_not_answered(kind):
    with EgressOnly() as guest:
        guest.send_ip(ICMP, echo(1, 1, b"", kind=kind))
        guest.fence()
        assert guest.counters()["drop_icmp_type"] == 1
        assert guest.datagram(timeout=0) is None


@pytest.mark.fault(26)
def test_a_bad_checksum_is_not_answered(wire):
    ident = fresh_ident()
    bad = bytearray(echo(ident, 1, b"abc"))
    bad[2] ^= 1
    wire.send_ip(ICMP, bytes(bad))
    wire.fence()
    assert wire.datagram(lambda d: d.proto == ICMP and d.rest >> 16 == ident, timeout=0) is None


def test_fragmented_ping_of_the_guest(wire):
    ident, data = fresh_ident(), os.urandom(20000)
    wire.ping(ident, 1, data)
    assert wire.recv_echo(ident).data == data


# -- behind the gateway


@pytest.fixture(scope="module")
def network() -> Iterator[Netns]:
    """The host's namespace, a router and a far one behind it (tests/wire/routed.py)."""
    with routed() as (host, _):
        yield host


def group_range(ns: Netns, text: str) -> None:
    with inside(ns), open("/proc/sys/net/ipv4/ping_group_range", "w") as f:
        f.write(text)


@pytest.fixture(params=["ping socket", "raw socket"])
def way_out(request: pytest.FixtureRequest, network: Netns) -> Iterator[Callable[[], EgressOnly]]:
    """egress in the host's namespace, with either kind of ICMP socket."""
    raw = request.param == "raw socket"
    group_range(network, "1 0" if raw else "0 2147483647")
    with contextlib.ExitStack() as stack:
        stack.enter_context(inside(network))
        fd = -1
        if raw:
            fd = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)).fileno()
        yield lambda **more: stack.enter_context(EgressOnly(raw_icmp_fd=fd, **more))


def about_ident(ident: int) -> Callable:
    return lambda q: q.proto == ICMP and q.rest >> 16 == ident


@pytest.mark.root
def test_the_reply_finds_the_next_process_in_the_seat(way_out):
    """The request went out from the one, the reply comes to the other (csrc/egress_estate.c)."""
    guest = way_out()
    ident = fresh_ident()
    guest.ping(ident, 1, b"one", dst=FAR)
    assert guest.recv_echo(ident).data == b"one"
    guest.ping(ident, 2, b"two", dst=FAR)
    assert guest.leave() == 1
    assert guest.succeed() == (1, "")
    guest.ping(ident, 3, b"three", dst=FAR)
    assert {guest.recv_echo(ident).data, guest.recv_echo(ident).data} == {b"two", b"three"}
    assert guest.counters()["icmp_mappings"] == 1


@pytest.mark.root
@pytest.mark.parametrize("size", [0, 56, 1472, 1473, 65507])
def test_ping_of_any_size_beyond_the_gateway(way_out, size):
    """The guest's identifier comes back, whatever was on the wire; fragments both ways."""
    guest = way_out()
    ident, data = fresh_ident(), os.urandom(size)
    for seq in (1, 2):
        guest.ping(ident, seq, data, dst=FAR)
        reply = guest.recv_echo(ident)
        assert (reply.src, reply.rest & 0xFFFF, reply.data) == (FAR, seq, data)
    assert reply.ttl == 63, "the TTL the reply arrived with: one router is between"
    c = guest.counters()
    assert (c["icmp_up"], c["icmp_down"], c["icmp_mappings"]) == (2, 2, 1)


@pytest.mark.fault(30)
@pytest.mark.root
def test_two_pings_with_one_identifier_from_two_guests_do_not_mix(way_out):
    guest = way_out()
    for src, data in ((GUEST, b"first"), ("10.0.2.3", b"second")):
        guest.ping(77, 1, data, dst=FAR, src=src)
    got = {(d := guest.recv_echo(77)).dst: d.data for _ in range(2)}
    assert got == {GUEST: b"first", "10.0.2.3": b"second"}


@pytest.mark.fault(30)
@pytest.mark.root
def test_traceroute_with_echo_requests_names_each_hop(way_out):
    guest = way_out()
    ident, hops = fresh_ident(), []
    for ttl in (1, 2):
        guest.ping(ident, ttl, b"p" * 32, dst=FAR, ttl=ttl)
        error = guest.recv_error(about_ident(ident))
        about = quoted(error)
        assert (error.icmp, about.src, about.dst) == ((11, 0), GUEST, FAR)
        assert about.rest & 0xFFFF == ttl and about.icmp == (8, 0)
        assert about.data == b"p" * len(about.data) and (checksum(about.payload) == 0 or len(about.data) < 32)
        hops.append(error.src)
    guest.ping(ident, 3, dst=FAR, ttl=3)
    hops.append(guest.recv_echo(ident).src)
    assert hops == [GATEWAY, ROUTER, FAR]


@pytest.mark.root
def test_unreachable_of_a_router_comes_with_its_address(way_out):
    guest = way_out()
    ident = fresh_ident()
    error = None
    for seq in range(30):  # as ping does: the router's kernel sends one such error a second at most
        guest.ping(ident, seq, dst=NO_ROUTE)
        if (error := guest.datagram(lambda d: d.proto == ICMP and d.icmp[0] == 3, timeout=1)) is not None:
            break
    assert error is not None and about_ident(ident)(quoted(error))
    assert (error.src, error.icmp, quoted(error).dst) == (ROUTER, (3, 0), NO_ROUTE)


@pytest.mark.root
def test_a_host_without_a_route_is_told_at_once(way_out):
    guest = way_out()
    ident, port = fresh_ident(), fresh_port()
    guest.ping(ident, 1, dst="8.8.8.8")
    error = guest.recv_error(about_ident(ident))
    assert (error.src, error.icmp) == (GATEWAY, (3, 0))
    guest.send_udp(port, 53, b"query", dst="8.8.8.8")
    error = guest.recv_error(lambda q: q.proto == UDP and q.sport == port)
    assert (error.src, error.icmp, quoted(error).data) == (GATEWAY, (3, 0), b"query")


@pytest.mark.root
def test_traceroute_with_udp_names_each_hop(way_out):
    """UDP's error queue: time exceeded from the router, port unreachable from the end."""
    guest = way_out()
    port, hops = fresh_port(), []
    for ttl in (1, 2, 3):
        guest.send_udp(port, 33434 + ttl, b"q" * 24, dst=FAR, ttl=ttl)
        error = guest.recv_error(lambda q: q.proto == UDP and q.sport == port)
        about = quoted(error)
        assert (about.src, about.dst, about.dport) == (GUEST, FAR, 33434 + ttl)
        hops.append((error.src, error.icmp))
    assert hops == [(GATEWAY, (11, 0)), (ROUTER, (11, 0)), (FAR, (3, 3))]


@pytest.mark.fault(30)
@pytest.mark.root
def test_a_mapping_ends_after_a_minute_and_there_are_64_at_most(way_out):
    """RFC 5508 3.1 REQ-1: 60 s and not less."""
    guest = way_out()
    for ident in range(1, 71):
        guest.ping(ident, 1, dst=FAR)
        guest.recv_echo(ident)
    assert len(guest.flows()) == 64
    assert guest.counters()["icmp_evicted"] == 6
    assert min(f.guest_port for f in guest.flows()) == 7, "not the least recently used ones went"
    guest.advance(30)
    guest.ping(40, 2, dst=FAR)
    guest.recv_echo(40)
    guest.advance(31)
    assert [f.guest_port for f in guest.flows()] == [40]
    guest.advance(30)
    assert guest.flows() == []


@pytest.mark.root
def test_the_whole_pipeline_pings_and_traces(network):
    """The supervisor picks the kind of socket; here as root, with ping sockets forbidden, the raw one."""
    group_range(network, "1 0")
    with inside(network), Wire() as w:
        ident = fresh_ident()
        w.ping(ident, 1, b"hello", dst=FAR)
        assert w.recv_echo(ident).src == FAR
        w.ping(ident, 2, dst=FAR, ttl=2)
        assert w.recv_error(about_ident(ident)).src == ROUTER


@pytest.mark.root
def test_without_any_icmp_socket_the_guest_is_told_and_stderr_says_what_to_do(network, capfd):
    """Administratively prohibited, RFC 1812 5.2.7.1 code 13; one line, not one a ping."""
    group_range(network, "1 0")
    with inside(network), EgressOnly(raw_icmp_fd=-1) as guest:
        for seq in (1, 2, 3):
            guest.ping(9, seq, dst=FAR)
            error = guest.recv_error(about_ident(9))
            assert (error.src, error.icmp) == (GATEWAY, (3, 13))
        assert guest.counters()["drop_icmp_unavailable"] == 3
    assert capfd.readouterr().err.count("net.ipv4.ping_group_range") == 1


@pytest.mark.root
@pytest.mark.parametrize("junk", [
    b"\x00" * 8,
    struct.pack("!BBHHH", 0, 0, 0, 0xFFFF, 1),
    b"\x03\x01" + b"\xff" * 6,
    b"\x03\x01" + b"\xff" * 40,
    b"\x0b\x00" + bytes(6) + ipv4(ICMP, b"\x08", GUEST, FAR),
], ids=["zeros", "identifier of nobody", "no quote", "quote of noise", "quote that is cut"])
def test_what_is_not_ours_on_the_raw_socket_is_ignored(network, junk):
    """Every process's ICMP arrives there, errors with cut or wrong quotes too."""
    group_range(network, "1 0")
    with inside(network), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw, \
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as other, \
            EgressOnly(raw_icmp_fd=raw.fileno()) as guest:
        guest.ping(3, 1, dst=FAR)
        guest.recv_echo(3)
        before = guest.counters()["icmp_down"]
        other.sendto(junk, ("127.0.0.1", 0))
        other.close()
        guest.ping(3, 2, dst=FAR)
        guest.recv_echo(3)
        assert guest.counters()["icmp_down"] == before + 1
        assert guest.datagram(timeout=0) is None
