"""RFC 4787 and ICMP errors for UDP mappings that are promoted: they run past egress, and the rules are the same.

    guest -- ringnet in `host` -- router (the link behind it takes 1300 bytes) -- far

REQ-1 and 8 through one socket, fragments and what is evicted: test_promotion.py.
"""
from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from netlab import Netns

from tests.harness import DEADLINE, GATEWAY, GUEST, UDP, Wire, fresh_port, quoted, udp, udp_server
from tests.wire.guest_tcp import ethernet, ipv4
from tests.wire.routed import FAR, ROUTER, inside, routed
from tests.wire.test_promotion import THERE, owners

pytestmark = pytest.mark.root

PATH_MTU = 1300


@pytest.fixture(scope="module")
def nets() -> Iterator[tuple[Netns, Netns]]:
    """The host's namespace, and the far one."""
    with routed(PATH_MTU) as (host, far):
        yield host, far


@pytest.fixture
def far_wire(nets: tuple[Netns, Netns]) -> Iterator[Wire]:
    with inside(nets[0]), Wire(promote=2) as wire:
        yield wire


@pytest.fixture
def server(nets: tuple[Netns, Netns]) -> Iterator[Callable[[], socket.socket]]:
    """Makes sockets at FAR."""
    with contextlib.ExitStack() as stack:
        def make() -> socket.socket:
            s = stack.enter_context(nets[1].socket(kind=socket.SOCK_DGRAM))
            s.bind((FAR, 0))
            return s
        yield make


def settle(wire: Wire, port: int, there: socket.socket, dst: str = FAR) -> tuple[str, int]:
    """Datagrams both ways until both halves are promoted; where the guest's come from."""
    for _ in range(6):
        wire.send_udp(port, there.getsockname()[1], b"hello", dst=dst)
        data, address = there.recvfrom(100)
        there.sendto(b"world", address)
        assert (data, wire.recv_udp(port).data) == (b"hello", b"world")
    assert owners(wire, port) == THERE
    return address


def about(port: int) -> Callable:
    return lambda q: q.proto == UDP and q.sport == port


def test_icmp_errors_reach_the_flow_they_are_about(far_wire: Wire, server: Callable[[], socket.socket]) -> None:
    """RFC 5508 4.2 REQ-4: of two promoted mappings to one host the one whose port was closed is told, by that host."""
    one, two, ports = server(), server(), (fresh_port(), fresh_port())
    for port, there in zip(ports, (one, two), strict=True):
        settle(far_wire, port, there)
    dport = one.getsockname()[1]
    one.close()
    far_wire.send_udp(ports[0], dport, b"anybody?", dst=FAR)
    error = far_wire.recv_error(about(ports[0]))
    quote = quoted(error)
    assert (error.src, error.icmp) == (FAR, (3, 3))
    assert (quote.src, quote.sport, quote.dst, quote.dport) == (GUEST, ports[0], FAR, dport)
    settle(far_wire, ports[1], two)


def test_too_long_for_the_path_with_df_is_told_and_without_is_fragmented(far_wire: Wire,
                                                                         server: Callable[[], socket.socket]) -> None:
    """RFC 4787 REQ-13, RFC 1191 4: the router says how much its next link takes; what is shorter still passes."""
    there, port = server(), fresh_port()
    settle(far_wire, port, there)
    dport = there.getsockname()[1]

    def send(body: bytes) -> None:
        far_wire.send(ethernet(ipv4(UDP, udp(GUEST, port, FAR, dport, body), GUEST, FAR)))  # DF is set

    fits = PATH_MTU - 28
    send(b"a" * fits)
    assert there.recv(9000) == b"a" * fits
    for _ in range(2):  # the first by the router's word, then by the host's memory of it
        send(b"b" * (fits + 1))
        error = far_wire.recv_error(about(port))
        assert (error.icmp, error.rest & 0xffff) == ((3, 4), PATH_MTU)
        assert (quoted(error).dst, quoted(error).dport) == (FAR, dport)
    send(b"c" * fits)
    assert there.recv(9000) == b"c" * fits
    for size in (fits + 1, 4000):
        far_wire.send_udp(port, dport, b"d" * size, dst=FAR)
        assert there.recv(9000) == b"d" * size


def test_traceroute_names_each_hop(far_wire: Wire, server: Callable[[], socket.socket]) -> None:
    """RFC 1812 5.3.1: a short TTL in the middle of a promoted flow; later datagrams have the usual one again."""
    there, port = server(), fresh_port()
    address = settle(far_wire, port, there)
    dport = there.getsockname()[1]
    hops = []
    for ttl in (1, 2):
        far_wire.send_udp(port, dport, b"q" * 24, dst=FAR, ttl=ttl)
        error = far_wire.recv_error(about(port))
        hops.append((error.src, error.icmp))
    assert hops == [(GATEWAY, (11, 0)), (ROUTER, (11, 0))]
    far_wire.send_udp(port, dport, b"there", dst=FAR, ttl=3)
    assert there.recvfrom(10) == (b"there", address)
    assert settle(far_wire, port, there) == address


@pytest.mark.parametrize("wire", [{"promote": 2}], indirect=True)
def test_req_10_no_payload_is_rewritten(wire: Wire) -> None:
    """RFC 4787 REQ-10: not even where it names the guest's own address and port."""
    port = fresh_port()
    with udp_server() as there:
        address = settle(wire, port, there, GATEWAY)
        body = b"Contact: <sip:%s:%d>\r\n" % (GUEST.encode(), port) + socket.inet_aton(GUEST) + struct.pack("!H", port)
        before = wire.counters()["frames_in"]
        wire.send_udp(port, there.getsockname()[1], body)
        assert there.recvfrom(1000) == (body, address)
        there.sendto(body[::-1], address)
        assert wire.recv_udp(port).data == body[::-1]
        assert wire.counters()["frames_in"] == before, "egress had a part in it"


def test_req_11_the_behaviour_does_not_change_under_load() -> None:
    """RFC 4787 REQ-11: while a flood fills the table again and again, a promoted mapping that is used keeps its port, and
    anybody may answer it."""
    port = fresh_port()
    with Wire(promote=2, udp_max=16) as wire, udp_server() as there, udp_server() as other, udp_server() as sink:
        address = settle(wire, port, there, GATEWAY)
        there.settimeout(DEADLINE)
        for _ in range(100):
            for _ in range(4):
                wire.send_udp(fresh_port(), sink.getsockname()[1], b"x")
                sink.recv(10)
            wire.send_udp(port, there.getsockname()[1], b"who?")
            assert there.recvfrom(10) == (b"who?", address)
        other.sendto(b"unasked", address)
        got = wire.recv_udp(port)
        assert (got.data, got.sport) == (b"unasked", other.getsockname()[1])
        wire.send_udp(port, other.getsockname()[1], b"to you, too")
        assert other.recvfrom(20) == (b"to you, too", address)
