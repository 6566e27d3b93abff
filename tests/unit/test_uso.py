"""Trains of datagrams to a host socket (csrc/rn_uso.c): what arrives is what was in the train, whatever the kernel refuses."""
from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib
from tests.harness import udp_server

SO_NO_CHECK = 11  # asm-generic/socket.h


@contextlib.contextmanager
def sender(to: tuple[str, int], *, alone: bool = False) -> Iterator[socket.socket]:
    """alone: a socket whose trains the kernel refuses (EINVAL: it must not be told to leave checksums out)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, int(alone))
        s.connect(to)
        yield s


def send(s: socket.socket, payload: bytes, size: int, head: bytes = b"") -> tuple[int, int, int]:
    """(sent, lost, errno)."""
    out = ffi.new("struct rn_uso *")
    lib.rn_uso_connected(s.fileno(), head, len(head), payload, len(payload), size, out)
    return out.sent, out.lost, out.err


def cut(payload: bytes, size: int) -> list[bytes]:
    return [payload[at:at + size] for at in range(0, len(payload), size)] or [b""]


def refused_as_a_train(s: socket.socket) -> bool:
    try:
        s.sendmsg([b"ab"], [(socket.IPPROTO_UDP, 103, struct.pack("H", 1))])
    except OSError as e:
        return e.errno == errno.EINVAL
    return False


@settings(max_examples=150, deadline=None)
@given(data=st.data(), head=st.binary(max_size=22), alone=st.booleans())
def test_any_train_arrives_as_its_datagrams(data: st.DataObject, head: bytes, alone: bool) -> None:
    size = data.draw(st.integers(1, 3000) | st.integers(1, 65507 - len(head)))
    most = min(65507, size * lib.RN_USO_DATAGRAMS_MAX)
    length = data.draw(st.integers(0, most) | st.just(most) | st.sampled_from([size, min(most, 64 * size), min(most, 64 * size + 1)]))
    payload = random.Random(length).randbytes(length)
    with udp_server() as server, sender(server.getsockname(), alone=alone) as s:
        want = cut(payload, size)
        assert send(s, payload, size, head) == (len(want), 0, 0)
        assert [server.recv(70000) for _ in want] == [head + d for d in want]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(1)


@example(payload=b"")
@given(payload=st.binary(max_size=100))
def test_no_size_is_one_datagram(payload: bytes) -> None:
    with udp_server() as server, sender(server.getsockname()) as s:
        assert send(s, payload, 0) == (1, 0, 0)
        assert server.recv(200) == payload


def test_the_refusal_that_these_tests_rest_on() -> None:
    with udp_server() as server, sender(server.getsockname()) as s, sender(server.getsockname(), alone=True) as t:
        assert not refused_as_a_train(s)
        assert refused_as_a_train(t)


def test_longer_than_a_datagram_can_be() -> None:
    """With what goes in front of it each is too long, but for the last; asked for once."""
    with udp_server() as server, sender(server.getsockname()) as s:
        assert send(s, bytes(65507), 65500, b"front....") == (1, 1, errno.EMSGSIZE)
        assert server.recv(100) == b"front...." + bytes(7)


@pytest.mark.parametrize("alone", [False, True])
def test_an_earlier_error_costs_nothing(alone: bool) -> None:
    """Nobody listens: the first train is refused by ICMP, which the next call returns. That one is sent all the same."""
    with contextlib.ExitStack() as stack:
        with udp_server() as server:
            port = server.getsockname()[1]
            s = stack.enter_context(sender(("127.0.0.1", port), alone=alone))  # while it is taken: not by this one
        sent, lost, err = send(s, bytes(400), 100)
        assert sent + lost == 4 and err in (0, errno.ECONNREFUSED)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", port))
            server.settimeout(20)
            assert send(s, b"a" * 250, 100) == (3, 0, 0)
            assert [len(server.recv(200)) for _ in range(3)] == [100, 100, 50]


def test_a_full_buffer_loses_what_did_not_fit() -> None:
    """Counted, each datagram of it, and nothing waits. A Unix socket that nobody reads refuses as a full UDP socket does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(b"x")
        assert send(ours, bytes(1000), 100) == (0, 10, errno.EAGAIN)
