"""Many flows that send at once (csrc/fast_turns.c): windows are opened in turn, nobody is forgotten, no byte is lost."""
from __future__ import annotations

import contextlib
import hashlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import DEADLINE, Wire
from tests.wire.guest_tcp import FIN, M32, GuestTcp, receive
from tests.wire.test_promotion import settle
from tests.wire.test_tcp import listener

MTU = 4000
SEGMENT = MTU - 40
FLOWS = 80  # more than have a turn at once: 64


class Sender:
    """The guest's end of a flow that has always more to send than it may."""

    def __init__(self, wire: Wire, port: int, mss: int = SEGMENT, wscale: int | None = None) -> None:
        self.g = GuestTcp(wire.sock, port, mss=mss, wscale=wscale)
        sa = self.g.connect()
        self.mss, self.scale = mss, sa.wscale or 0
        self.acked, self.edge = sa.ack, (self.g.snd_nxt + sa.wnd) & M32
        self.sent = hashlib.sha256()

    @property
    def room(self) -> int:
        """Bytes of window."""
        return (self.edge - self.g.snd_nxt) & M32

    def send(self, n: int) -> None:
        block = ((b"%08d" % n) * (self.mss // 8 + 1))[:self.mss]
        self.g.push(block)
        self.sent.update(block)


def read(wire: Wire, flows: dict[int, Sender], timeout: float) -> bool:
    """Take one frame from the link. False: none came."""
    if (frame := receive(wire.sock, timeout)) is None:
        return False
    f = flows.get(int.from_bytes(frame[36:38], "big"))
    if f is not None and (seg := f.g._mine(frame)) is not None:
        edge = (seg.ack + (seg.wnd << f.scale)) & M32
        if (seg.ack - f.acked) & M32 >= 1 << 31:
            return True  # an older one, overtaken by another stage's: it says nothing of the window (RFC 9293 3.10.7.4)
        f.acked = seg.ack
        # RFC 7323 2.4: what the scale cuts off may seem to be taken back.
        assert (edge + (1 << f.scale) - 1 - f.edge) & M32 < 1 << 31, "an edge went back (RFC 9293 3.8.6)"
        if (edge - f.edge) & M32 < 1 << 31:
            f.edge = edge
    return True


def read_to(wire: Wire, f: Sender, room: int) -> bool:
    """Until the window is open so far. False: nothing came that opened it."""
    while f.room < room:
        if not read(wire, {f.g.sport: f}, DEADLINE):
            return False
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
            assert wire.counters("guest_tx")["now_tcp_crowded"] == 1
            # Whoever waits gets its turn: with nothing more from the guest, every window opens.
            while shut := [port for port, f in flows.items() if f.room < SEGMENT]:
                assert read(wire, flows, DEADLINE), f"{len(shut)} windows stay closed"
            for f in flows.values():
                f.g.push(b"", FIN)
            # The crowd is over without a byte more: the windows that egress offers are cut as long as it is not.
            end = time.monotonic() + DEADLINE
            while wire.counters("guest_tx")["now_tcp_crowded"]:
                assert time.monotonic() < end, "nobody sends, and it still is a crowd"
                read(wire, flows, 0.1)
    assert [d.digest() for d in received] == [f.sent.digest() for f in flows.values()]


@pytest.mark.parametrize("promote", [0, 8])
@pytest.mark.parametrize("mtu", [1500, 9000, 65520])
def test_a_segment_has_always_room_where_the_host_reads(make_wire: Callable[..., Wire], mtu: int, promote: int) -> None:
    """From the handshake on, while it is promoted and after: whatever the host's send buffer is at first, a window of less than a segment
    would leave the guest to its persist timer (RFC 9293 3.8.6.1)."""
    wire = make_wire(promote=promote, mtu=mtu)
    with contextlib.ExitStack() as stack:
        srv = stack.enter_context(listener())
        f = Sender(wire, srv.getsockname()[1], mss=mtu - 40, wscale=7)
        host = stack.enter_context(srv.accept()[0])
        with read_all([host]) as received:
            for n in range(100):
                assert read_to(wire, f, mtu - 40), f"{f.room} bytes of window before segment {n}"
                f.send(n)
            f.g.push(b"", FIN)
    assert received[0].digest() == f.sent.digest()
