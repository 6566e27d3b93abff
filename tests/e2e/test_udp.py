"""UDP of every size, both ways, and errors."""
from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from netlab import DEADLINE, GATEWAY, SERVER, Attached, Netns

pytestmark = pytest.mark.netns

MTU = 4000  # the default; 28: IPv4 and UDP headers
SIZES = [1, 2, 3, 512, 1472, 1473, MTU - 29, MTU - 28, MTU - 27, 2 * MTU, 9000, 40_001, 65506, 65507]


@pytest.fixture
def echo(host_ns: Netns) -> Iterator[Callable[[str], tuple[str, int]]]:
    """echo(address): an echo server there; yields its address. One thread serves all."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []
    stop_r, stop_w = os.pipe()

    def start(address: str) -> tuple[str, int]:
        s = host_ns.socket(kind=socket.SOCK_DGRAM)
        s.bind((address, 0))
        sockets.append(s)

        def serve() -> None:
            while stop_r not in select.select([s, stop_r], [], [])[0]:
                data, peer = s.recvfrom(65535)
                s.sendto(data, peer)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return s.getsockname()

    yield start
    os.close(stop_w)
    for thread in threads:
        thread.join()
    for s in sockets:
        s.close()
    os.close(stop_r)


@pytest.mark.parametrize("address", ["127.0.0.1", SERVER], ids=["gateway", "server"])
def test_echo_of_every_size(echo, guest_session: Attached, guest_ns: Netns, address: str) -> None:
    port = echo(address)[1]
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.connect((GATEWAY if address == "127.0.0.1" else SERVER, port))
        for size in SIZES:
            sent = hashlib.shake_256(b"%d" % size).digest(size)
            s.send(sent)
            assert s.recv(65535) == sent, f"{size} bytes"


def test_echo_at_a_small_mtu(echo, attach, guest_ns: Netns) -> None:
    attach(mtu=576)
    address = echo(SERVER)
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.connect(address)
        for size in (1, 548, 549, 65507):
            sent = hashlib.shake_256(b"%d" % size).digest(size)
            s.send(sent)
            assert s.recv(65535) == sent, f"{size} bytes"


def test_an_empty_datagram(echo, guest_session: Attached, guest_ns: Netns) -> None:
    address = echo(SERVER)
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.connect(address)
        s.send(b"")
        assert s.recv(1) == b""


def test_one_guest_port_is_one_host_port(host_ns: Netns, guest_session: Attached, guest_ns: Netns) -> None:
    """Endpoint-independent mapping (RFC 4787 4.1): two servers see the same source."""
    with host_ns.socket(kind=socket.SOCK_DGRAM) as one, host_ns.socket(kind=socket.SOCK_DGRAM) as two, \
            guest_ns.socket(kind=socket.SOCK_DGRAM) as guest:
        one.bind((SERVER, 0))
        two.bind((SERVER, 0))
        guest.bind(("10.0.2.2", 0))
        seen = []
        for server in (one, two):
            guest.sendto(b"who am I", server.getsockname())
            data, peer = server.recvfrom(100)
            assert data == b"who am I"
            seen.append(peer)
            server.sendto(b"you", peer)
            assert guest.recvfrom(100) == (b"you", server.getsockname())
        assert seen[0] == seen[1]


def test_a_closed_port_is_refused_at_once(host_ns: Netns, guest_session: Attached, guest_ns: Netns) -> None:
    with host_ns.socket(kind=socket.SOCK_DGRAM) as held:
        held.bind((SERVER, 0))
        address = held.getsockname()
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.connect(address)
        s.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError):  # by ICMP port unreachable
            s.recv(1)


def test_no_route_is_told_at_once(guest_session: Attached, guest_ns: Netns) -> None:
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.settimeout(DEADLINE)
        s.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: soft errors too (ip(7))
        s.connect(("203.0.113.1", 9))
        s.send(b"x")
        with pytest.raises(OSError) as caught:
            s.recv(1)
    assert caught.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
