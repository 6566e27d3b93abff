"""TCP where it is hard: half-close, refused, unreachable, resets, many connections at once."""
from __future__ import annotations

import errno
import hashlib
import resource
import selectors
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator

import pytest
from netlab import DEADLINE, GATEWAY, SERVER, Attached, Netns, connect_error, run_env, serving

pytestmark = pytest.mark.netns

LINGER_0 = struct.pack("ii", 1, 0)  # close() sends RST


@pytest.fixture
def host(host_ns: Netns, guest_session: Attached) -> Netns:
    return host_ns


def read_all(connection: socket.socket) -> bytes:
    got = bytearray()
    while piece := connection.recv(1 << 16):
        got += piece
    return bytes(got)


def test_half_close_of_the_guest(host: Netns, guest_ns: Netns) -> None:
    """The server answers only after it has seen the guest's FIN; the answer arrives."""
    sent = hashlib.shake_256(b"half").digest(3_000_000)

    def serve(connection: socket.socket) -> None:
        got = read_all(connection)
        connection.sendall(hashlib.sha256(got).hexdigest().encode() + bytes(1_000_000))

    with serving(host.listen(SERVER), serve) as (address, port):
        done = subprocess.run(guest_ns.argv("socat", "-t60", "-", f"TCP4:{address}:{port}"), input=sent,
                              timeout=DEADLINE, capture_output=True, env=run_env())
    assert done.returncode == 0, done.stderr
    assert done.stdout[:64].decode() == hashlib.sha256(sent).hexdigest()
    assert done.stdout[64:] == bytes(1_000_000)


def test_half_close_of_the_host(host: Netns, guest_ns: Netns) -> None:
    """The other way: the server ends its direction first and still takes what the guest sends."""
    took = []

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"first")
        connection.shutdown(socket.SHUT_WR)
        took.append(hashlib.sha256(read_all(connection)).digest())

    sent = hashlib.shake_256(b"other").digest(2_000_000)
    with serving(host.listen(SERVER), serve) as address, guest_ns.socket() as guest:
        guest.connect(address)
        assert read_all(guest) == b"first"
        guest.sendall(sent)
    assert took == [hashlib.sha256(sent).digest()]


@pytest.mark.parametrize("address", [GATEWAY, SERVER])
def test_refused(host: Netns, guest_ns: Netns, address: str) -> None:
    with host.listen("127.0.0.1") as held, guest_ns.socket() as guest:
        port = held.getsockname()[1]  # surely free once closed, in a namespace of our own
        held.close()
        assert connect_error(guest, (address, port)) == errno.ECONNREFUSED


@pytest.mark.fault(24)
def test_no_route_is_unreachable(host: Netns, guest_ns: Netns) -> None:
    with guest_ns.socket() as guest:
        assert connect_error(guest, ("203.0.113.1", 80)) == errno.ENETUNREACH


@pytest.mark.fault(24)
def test_unreachable_host(host: Netns, guest_ns: Netns) -> None:
    host.ip("route", "add", "unreachable", "203.0.113.2/32")
    with guest_ns.socket() as guest:
        assert connect_error(guest, ("203.0.113.2", 80)) == errno.EHOSTUNREACH


@pytest.mark.fault(7)
def test_reset_by_the_guest(host: Netns, guest_ns: Netns) -> None:
    seen: list[object] = []

    def serve(connection: socket.socket) -> None:
        assert connection.recv(5) == b"hello"
        connection.sendall(b"x")
        try:
            seen.append(connection.recv(1))
        except ConnectionResetError as error:
            seen.append(error.errno)

    with serving(host.listen(SERVER), serve) as address, guest_ns.socket() as guest:
        guest.connect(address)
        guest.sendall(b"hello")
        assert guest.recv(1) == b"x"
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        guest.close()
    assert seen == [errno.ECONNRESET]


def test_reset_by_the_host(host: Netns, guest_ns: Netns) -> None:
    def serve(connection: socket.socket) -> None:
        assert connection.recv(5) == b"hello"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)

    with serving(host.listen(SERVER), serve) as address, guest_ns.socket() as guest:
        guest.connect(address)
        guest.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            guest.recv(1)


def test_data_before_the_hosts_reset_is_not_needed_but_the_reset_is(host: Netns, guest_ns: Netns) -> None:
    """A server that closes with unread data resets (RFC 2525 2.17); the guest must not wait for ever."""
    def serve(connection: socket.socket) -> None:
        connection.recv(1)

    with serving(host.listen(SERVER), serve) as address, guest_ns.socket() as guest:
        guest.connect(address)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                guest.sendall(bytes(1 << 16))


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard != resource.RLIM_INFINITY else 8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_500_parallel_connections(host: Netns, guest_ns: Netns, many_files: None) -> None:
    """All open at the same time; each gets its own bytes back."""
    count, size = 500, 20_000
    arrived = threading.Barrier(count)

    def echo(connection: socket.socket) -> None:
        arrived.wait(DEADLINE)  # nobody is answered before all are connected
        while piece := connection.recv(1 << 16):
            connection.sendall(piece)

    threading.stack_size(256 << 10)
    try:
        with serving(host.listen(SERVER), echo) as address, selectors.DefaultSelector() as selector:
            wants: dict[socket.socket, list[bytearray]] = {}
            for n in range(count):
                s = guest_ns.socket()
                s.setblocking(False)
                assert s.connect_ex(address) in (0, errno.EINPROGRESS)
                wants[s] = [bytearray(hashlib.shake_256(b"%d" % n).digest(size)), bytearray()]
                selector.register(s, selectors.EVENT_WRITE)
            left = set(wants)
            while left:
                events = selector.select(DEADLINE)
                assert events, f"{len(left)} of {count} connections stand still"
                for key, mask in events:
                    s, (out, back) = key.fileobj, wants[key.fileobj]
                    if mask & selectors.EVENT_WRITE and out:
                        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                        del out[: s.send(out)]
                        if not out:
                            s.shutdown(socket.SHUT_WR)
                            selector.modify(s, selectors.EVENT_READ)
                    elif mask & selectors.EVENT_READ:
                        piece = s.recv(1 << 16)
                        back += piece
                        if not piece:
                            left.discard(s)
                            selector.unregister(s)
            for n, (s, (_, back)) in enumerate(wants.items()):
                assert bytes(back) == hashlib.shake_256(b"%d" % n).digest(size), f"connection {n}"
                s.close()
    finally:
        threading.stack_size(0)


@pytest.mark.fault(1, 5)
def test_a_slow_reader_stops_the_sender_and_loses_nothing(host: Netns, guest_ns: Netns) -> None:
    """The host's server reads nothing at first: the guest's send must block, not run ahead or fail."""
    total, go = 16 << 20, threading.Event()
    took = []

    def serve(connection: socket.socket) -> None:
        assert go.wait(DEADLINE)
        digest = hashlib.sha256()
        while piece := connection.recv(1 << 16):
            digest.update(piece)
        took.append(digest.digest())
        connection.sendall(b"k")

    data = hashlib.shake_256(b"slow").digest(total)
    with serving(host.listen(SERVER), serve) as address, guest_ns.socket() as guest:
        guest.connect(address)
        guest.setblocking(False)
        sent = 0
        poller = selectors.DefaultSelector()
        poller.register(guest, selectors.EVENT_WRITE)
        while poller.select(1.0):  # until the kernel of the guest takes no more for a second
            sent += guest.send(data[sent:sent + (1 << 16)])
            if sent == total:
                pytest.fail("16 MiB went nowhere: nobody read them, and no buffer is so large")
        go.set()
        guest.setblocking(True)
        guest.settimeout(DEADLINE)
        guest.sendall(data[sent:])
        guest.shutdown(socket.SHUT_WR)
        assert guest.recv(1) == b"k"
    assert took == [hashlib.sha256(data).digest()]
