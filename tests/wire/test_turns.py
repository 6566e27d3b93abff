"""Many flows that send at once (csrc/fast_turns.c): windows are opened in turn, nobody is forgotten, no byte is lost."""
from __future__ import annotations

import contextlib
import hashlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tests.harness import DEADLINE, Wire
from tests.wire.guest_tcp import M32, GuestTcp, receive
from tests.wire.test_promotion import settle
from tests.wire.test_tcp import listener

MTU = 4000
SEGMENT = MTU - 40
FLOWS = 80  # more than have a turn at once: 64


class Sender:
    """The guest's end of a flow that has always more to send than it may."""

    def __init__(self, wire: Wire, port: int) -> None:
        self.g = GuestTcp(wire.sock, port, mss=SEGMENT, wscale=None)
        sa = self.g.connect()
        self.edge = (self.g.snd_nxt + sa.wnd) & M32
        self.sent = hashlib.sha256()

    @property
    def room(self) -> int:
        """Bytes of window."""
        return (self.edge - self.g.snd_nxt) & M32

    def send(self, n: int) -> None:
        block = (b"%08d" % n) * (SEGMENT // 8)
        self.g.push(block)
        self.sent.update(block)


def read(wire: Wire, flows: dict[int, Sender], timeout: float) -> bool:
    """Take one frame from the link. False: none came."""
    if (frame := receive(wire.sock, timeout)) is None:
        return False
    f = flows.get(int.from_bytes(frame[36:38], "big"))
    if f is not None and (seg := f.g._mine(frame)) is not None:
        edge = (seg.ack + seg.wnd) & M32
        assert (edge - f.edge) & M32 < 1 << 31, "an edge went back (RFC 9293 3.8.6)"
        f.edge = edge
    return True


@contextlib.contextmanager
def read_all(sockets: list[socket.socket]) -> Iterator[list[hashlib._Hash]]:
    """A thread that reads to the end of each; what it read, once the block has ended."""
    digests = [hashlib.sha256() for _ in sockets]

    def run() -> None:
        with selectors.DefaultSelector() as sel:
            for k, s in enumerate(sockets):
                sel.register(s, selectors.EVENT_READ, k)
            while sel.get_map():
                for key, _ in sel.select():
                    if data := key.fileobj.recv(1 << 18):
                        digests[key.data].update(data)
                    else:
                        sel.unregister(key.fileobj)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield digests
    thread.join(DEADLINE)
    assert not thread.is_alive(), "a connection has not ended"


def test_windows_are_opened_in_turn(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(promote=2, mtu=MTU)
    with contextlib.ExitStack() as stack:
        srv = stack.enter_context(listener(FLOWS))
        flows: dict[int, Sender] = {}
        hosts = []
        for _ in range(FLOWS):
            f = Sender(wire, srv.getsockname()[1])
            hosts.append(stack.enter_context(srv.accept()[0]))
            settle(wire, f.g, hosts[-1])
            f.edge = (f.g.snd_nxt + 65535 - SEGMENT) & M32  # at least: it was told while it settled
            flows[f.g.sport] = f
        with read_all(hosts) as received:
            end, rounds = time.monotonic() + DEADLINE, 0
            while wire.counters("guest_tx")["tcp_turns"] < 2 * FLOWS:
                assert time.monotonic() < end, f"{wire.counters('guest_tx')['tcp_turns']} turns after {rounds} rounds"
                rounds += 1
                for f in flows.values():
                    if f.room >= SEGMENT:
                        f.send(rounds)
                while read(wire, flows, 0):
                    pass
            # Whoever waits gets its turn: with nothing more from the guest, every window opens.
            while shut := [port for port, f in flows.items() if f.room < SEGMENT]:
                assert read(wire, flows, DEADLINE), f"{len(shut)} windows stay closed"
            for f in flows.values():
                f.g.push(b"", 1)
    assert [d.digest() for d in received] == [f.sent.digest() for f in flows.values()]
