"""RFC 4787, requirement by requirement, as far as it binds a NAT with one inside host: a test each, named after it.

Not here: REQ-2, 3, 4 and 9 speak of pools, port parity and hairpins, which need more than one inside host or outside address;
REQ-7 and 12 follow from the mapping's being a socket. Most of it is tested in depth in test_udp.py and test_reassembly.py.
"""
from __future__ import annotations

import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable

import pytest

from shm._dataplane import lib
from tests.harness import (
    GATEWAY_MAC,
    GUEST,
    GUEST2,
    UDP,
    EgressOnly,
    Guest,
    Wire,
    fresh_port,
    ipv4,
    mac_bytes,
    quoted,
    udp,
    udp_server,
)

SERVER = "198.51.100.2"  # beyond the gateway (RFC 5737)


def test_req_1_one_guest_port_is_one_host_port_whatever_the_destination(guest: Guest) -> None:
    """RFC 4787 REQ-1."""
    port = fresh_port()
    with udp_server() as one, udp_server() as two:
        for server in (one, two, one):
            guest.send_udp(port, server.getsockname()[1], b"?")
        assert one.recvfrom(10)[1] == two.recvfrom(10)[1] == one.recvfrom(10)[1]


def test_req_5_an_answered_mapping_lives_more_than_two_minutes() -> None:
    """RFC 4787 REQ-5. One that nobody ever answered ends after 30 s, less than asked: a scan or a flood of queries must not
    hold a socket each for minutes; conntrack does the same."""
    with EgressOnly() as guest, udp_server() as server:
        guest.stop_clock()
        guest.send_udp(4000, server.getsockname()[1], b"?")
        where = server.recvfrom(10)[1]
        server.sendto(b"!", where)
        assert guest.recv_udp(4000).data == b"!"
        guest.advance(179)
        server.sendto(b"late", where)
        assert guest.recv_udp(4000).data == b"late"


def test_req_6_what_the_guest_sends_refreshes_the_mapping() -> None:
    """RFC 4787 REQ-6: outbound refresh, also when nothing comes back."""
    with EgressOnly() as guest, udp_server() as server:
        guest.stop_clock()
        seen = set()
        for _ in range(20):
            guest.send_udp(4000, server.getsockname()[1], b"still here")
            seen.add(server.recvfrom(10)[1])
            guest.advance(29)
        assert len(seen) == 1
        guest.advance(2)
        assert guest.flows() == [], "and without it the mapping ends"


def test_req_8_anybody_may_answer(guest: Guest) -> None:
    """RFC 4787 REQ-8: endpoint-independent filtering."""
    port = fresh_port()
    with udp_server() as asked, udp_server() as stranger:
        guest.send_udp(port, asked.getsockname()[1], b"introduce me")
        stranger.sendto(b"pleased to meet you", asked.recvfrom(20)[1])
        got = guest.recv_udp(port)
        assert (got.data, got.sport) == (b"pleased to meet you", stranger.getsockname()[1])


@pytest.mark.root
@pytest.mark.parametrize("dport", [53000, 5060, 69, 3478])  # any, SIP, TFTP, STUN: the ones others rewrite
def test_req_10_no_payload_is_rewritten(dport: int) -> None:
    """RFC 4787 REQ-10: no ALG, not even where a payload names the guest's own address."""
    body = b"INVITE sip:x@y SIP/2.0\r\nContact: <sip:" + GUEST.encode() + b":4000>\r\n" + socket.inet_aton(GUEST) + \
        struct.pack("!H", 4000) + random.Random(dport).randbytes(100)
    there: list[bytes] = []

    def play() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with EgressOnly() as guest, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.settimeout(60)
            server.bind(("127.0.0.1", dport))
            guest.send_udp(4000, dport, body)
            data, address = server.recvfrom(2000)
            there.append(data)
            server.sendto(body[::-1], address)
            there.append(guest.recv_udp(4000).data)

    in_a_namespace(play)
    assert there == [body, body[::-1]]


def test_req_11_the_behaviour_does_not_change_under_load() -> None:
    """RFC 4787 REQ-11: with the table full, two guests on one port and a flood, mapping and filtering are what they were."""
    with EgressOnly(udp_max=64) as guest, udp_server() as one, udp_server() as two:
        def mapped(src: str) -> tuple[str, int]:
            found = set()
            for server in (one, two):
                guest.send_udp(4000, server.getsockname()[1], b"who?", src=src)
                found.add(server.recvfrom(10)[1])
            (address,) = found
            return address

        alone = mapped(GUEST)
        other = mapped(GUEST2)
        assert other != alone
        for port in range(5000, 5200):  # far more than the table holds; ours is the one used last, always
            guest.send_udp(port, one.getsockname()[1], b"x")
            one.recvfrom(10)
            assert mapped(GUEST) == alone
        for server in (one, two):
            server.sendto(b"unasked", alone)
            assert guest.recv_udp(4000).data == b"unasked"


@pytest.mark.root
@pytest.mark.parametrize("size", [1273, 3000])
def test_req_13_too_long_with_df_is_told_and_without_is_fragmented(size: int) -> None:
    """RFC 4787 REQ-13, RFC 1191 4: the path's MTU is 1300; 1272 bytes fit."""
    def play() -> None:
        subprocess.run(["ip", "link", "set", "lo", "mtu", "1300", "up"], check=True)
        subprocess.run(["ip", "addr", "add", f"{SERVER}/32", "dev", "lo"], check=True)
        with EgressOnly(mtu=4000) as guest, udp_server(SERVER) as server:
            server.setblocking(False)

            def send(body: bytes, frag: int) -> None:
                packet = ipv4(UDP, udp(GUEST, 4000, SERVER, server.getsockname()[1], body), GUEST, SERVER, frag=frag)
                guest.send(mac_bytes(GATEWAY_MAC) + mac_bytes(guest.mac) + b"\x08\x00" + packet)

            for body in (b"a" * 1272, b"b" * size, b"c" * 1272):
                send(body, 0x4000)
            assert [server.recv(9000) for _ in range(2)] == [b"a" * 1272, b"c" * 1272]
            error = guest.recv_error(lambda d: d.dport == server.getsockname()[1])
            assert (error.icmp, error.rest & 0xffff) == ((3, 4), 1300)
            assert quoted(error).sport == 4000
            send(b"d" * size, 0)
            assert server.recv(9000) == b"d" * size
            assert guest.datagram(timeout=0) is None, "nothing was wrong with that one"
            assert guest.counters()["drop_udp_send"] == 1

    in_a_namespace(play)


@pytest.mark.parametrize("order", [lambda f: f[::-1], lambda f: f[1:] + f[:1], lambda f: random.Random(1).sample(f, len(f))],
                         ids=["backwards", "first-last", "shuffled"])
def test_req_14_fragments_in_any_order(wire: Wire, order: Callable[[list[bytes]], list[bytes]]) -> None:
    """RFC 4787 REQ-14. That what waits for the rest is bounded: test_limits.py, test_reassembly.py."""
    port, data = fresh_port(), random.Random(14).randbytes(9000)
    with udp_server() as server:
        wire.send_udp(port, server.getsockname()[1], data, order=order)
        assert server.recv(10000) == data


def in_a_namespace(play: Callable[[], None]) -> None:
    """Run it in a thread with a network of its own, which goes when the thread ends."""
    failed: list[BaseException] = []

    def thread() -> None:
        try:
            assert lib.rn_os_unshare(lib.RN_CLONE_NEWNET) == 0
            play()
        except BaseException as e:
            failed.append(e)

    t = threading.Thread(target=thread)
    t.start()
    t.join()
    if failed:
        raise failed[0]
