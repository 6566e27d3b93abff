"""Many connections that receive as much as they can: the host sockets' buffers are bounded meanwhile (csrc/fast_bound.c)."""
from __future__ import annotations

import hashlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from netlab import DEADLINE, SERVER, Attached, Netns

from pipeline import api
from pipeline.client import Client, find

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

FLOWS = 600  # of which a good part sends at a time
SIZE = 1 << 20  # bytes of each
FEW = 30
BLOCK = hashlib.shake_256(b"receivers").digest(1 << 16)


@contextmanager
def connections(host_ns: Netns, guest_ns: Netns) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """FLOWS of them: the host's ends, and the guest's."""
    with ExitStack() as stack:
        listener = stack.enter_context(host_ns.listen(SERVER))
        listener.listen(FLOWS)
        host: list[socket.socket] = []
        guest: list[socket.socket] = []
        for _ in range(FLOWS):
            guest.append(stack.enter_context(guest_ns.socket()))
            guest[-1].settimeout(DEADLINE)
            guest[-1].connect(listener.getsockname())
            host.append(stack.enter_context(listener.accept()[0]))
        yield host, guest


def send(sockets: list[socket.socket], size: int) -> None:
    left = {}
    with selectors.DefaultSelector() as sel:
        for s in sockets:
            s.setblocking(False)
            left[s] = size
            sel.register(s, selectors.EVENT_WRITE)
        while left:
            assert (ready := sel.select(DEADLINE)), f"nobody may send; {len(left)} have not ended"
            for key, _ in ready:
                s, at = key.fileobj, size - left[key.fileobj]
                left[s] -= s.send(memoryview(BLOCK)[at % len(BLOCK):][:left[s]])
                if not left[s]:
                    sel.unregister(s)
                    del left[s]


def receive(sockets: list[socket.socket], size: int, look: Callable[[], None]) -> None:
    """So much from each, as it was sent. look() is called now and then."""
    got = dict.fromkeys(sockets, 0)
    with selectors.DefaultSelector() as sel:
        for s in sockets:
            sel.register(s, selectors.EVENT_READ)
        while got:
            assert (ready := sel.select(DEADLINE)), f"nothing comes; {len(got)} have not ended"
            for key, _ in ready:
                s = key.fileobj
                at = got[s] % len(BLOCK)
                part = s.recv(min(len(BLOCK) - at, size - got[s]))
                assert part and part == BLOCK[at:at + len(part)]
                got[s] += len(part)
                if got[s] == size:
                    sel.unregister(s)
                    del got[s]
            look()


def transfer(host: list[socket.socket], guest: list[socket.socket], size: int, look: Callable[[], None] = lambda: None) -> None:
    sender = threading.Thread(target=send, args=(host, size), daemon=True)
    sender.start()
    receive(guest, size, look)
    sender.join(DEADLINE)
    assert not sender.is_alive()


def test_buffers_are_bounded_while_many_receive_and_the_kernels_again_afterwards(
        attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns) -> None:
    session = attach("--session", guest_ns.name)
    with Client(find(guest_ns.name)) as client:
        def bounded() -> int:
            return client.call(api.Statistics()).counters["guest_rx"].get("now_tcp_bounded", 0)

        with connections(host_ns, guest_ns) as (host, guest):
            seen = [0]
            transfer(host, guest, SIZE, lambda: seen.append(bounded()) if len(seen) < 400 else None)
            assert 0 < max(seen) <= FLOWS
            # Few are no crowd, which an epoch of theirs shows (rn_crowd.h): each is let go with what it receives next.
            was, end = bounded(), time.monotonic() + DEADLINE
            while bounded() >= was:
                assert time.monotonic() < end, f"{was} are still bounded"
                transfer(host[:FEW], guest[:FEW], SIZE)
        end = time.monotonic() + DEADLINE
        while bounded():  # they are being closed
            assert time.monotonic() < end, f"{bounded()} are still bounded"
    assert session.end() == 0, session.output()
