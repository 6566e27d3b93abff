"""The guest's link: reading, writing, back-pressure both ways, and links that go away (csrc/rn_link.c,
stage_guest_tx.c, stage_guest_rx.c)."""
from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from frames import inproc
from frames.inproc import FRAME_MAX, VNET, count, counts, error, link, pair, received, run
from netlab import Netns

from shm._dataplane import ffi, lib

PARTIAL = bytes.fromhex("010000000000220010000000")
TSO = bytes.fromhex("01013600b405220010000000")
SMALL_MAX = lib.RN_BUF_SMALL - 82  # RN_SMALL_FRAME_MAX


def frame(n: int, tag: int = 0) -> bytes:
    return (bytes([2, 0, 0, 0, 0, tag & 255]) * (n // 6 + 1))[:n]


class Wire(inproc.Plane):
    """guest_tx and guest_rx back to back: what the guest sends on `tx` it gets back on `rx`."""

    def __init__(self, *, vnet: bool = True, frame_max: int = FRAME_MAX, small: int = 64, large: int = 8,
                 slots: int = 64, inputs: int = 1, buffers: int = 4 << 20) -> None:
        super().__init__({0: (small, large), **{i + 2: (64, 4) for i in range(inputs - 1)}})
        self.rings = [inproc.Ring(slots) for _ in range(inputs)]
        self.tx_in, self.tx = pair()
        self.rx_out, self.rx = pair(buffers)
        self.guest_tx = self.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (self.rings[0], 1)})
        self.guest_rx = self.stage(1, inputs={(i + 1 if i else 0): r for i, r in enumerate(self.rings)})
        options = {"vnet": vnet, "frame_max": frame_max}
        assert lib.stage_guest_tx_init(self.guest_tx, link(self.tx_in, **options), -1) == 0
        assert lib.stage_guest_rx_init(self.guest_rx, link(self.rx_out, **options), -1) == 0
        self.sources: list[tuple[Any, socket.socket]] = [(self.guest_tx, self.tx)]
        for i in range(1, inputs):  # more producers: guest_tx stages of other rows
            a, b = pair()
            self.keep.append(a)
            s = self.stage(i + 1, outputs={lib.RN_ROLE_CLASSIFY: (self.rings[i], 1)})
            assert lib.stage_guest_tx_init(s, link(a, **options), -1) == 0
            self.sources.append((s, b))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        ends = [self.tx_in, self.tx, self.rx_out, self.rx, *(s for _, s in self.sources)]
        for s in (*ends, *(k for k in self.keep if isinstance(k, socket.socket))):
            s.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as w:
        yield w


@pytest.mark.parametrize("n", [14, 15, 60, 1514, SMALL_MAX, SMALL_MAX + 1, 9014, 65549])
def test_frames_of_any_size_go_through(wire: Wire, n: int) -> None:
    wire.tx.send(VNET + frame(n))
    run(wire.guest_tx)
    (off, length, flags, _), = wire.rings[0].descriptors()
    assert (length, flags) == (n, 0)
    run(wire.guest_rx)
    assert received(wire.rx) == [VNET + frame(n)]
    assert (count(wire.guest_tx, "bytes_in"), count(wire.guest_rx, "bytes_out")) == (n, n)


def test_link_without_virtio_header() -> None:
    with Wire(vnet=False, frame_max=1514) as w:
        for n in (13, 14, 1514, 1515, 65000):
            w.tx.send(frame(n))
        run(w.guest_tx)
        run(w.guest_rx)
        assert received(w.rx) == [frame(14), frame(1514)]
        assert counts(w.guest_tx) == {"frames_in": 5, "bytes_in": 13 + 14 + 1514, "frames_out": 2, "bytes_out": 1528,
                                      "drop_runt": 1, "drop_oversize": 2}


@pytest.mark.parametrize(("datagram", "counter"), [
    (b"", "drop_runt"),
    (VNET[:11], "drop_runt"),
    (VNET, "drop_runt"),
    (VNET + bytes(13), "drop_runt"),
    (VNET + bytes(4015), "drop_oversize"),
    (VNET + bytes(65550), "drop_oversize"),
    (b"\x08" + VNET[1:] + bytes(60), "drop_bad_vnet_header"),
    (PARTIAL + bytes(51), "drop_bad_vnet_header"),
    (TSO[:4] + b"\0\0" + TSO[6:] + bytes(3000), "drop_bad_vnet_header"),
    (b"\0" + TSO[1:] + bytes(3000), "drop_bad_vnet_header"),
    (b"\x01\x03" + TSO[2:] + bytes(3000), "drop_bad_vnet_header"),  # UFO
], ids=["empty", "header-cut", "header-only", "runt", "over-mtu", "over-64k", "flag", "csum-outside", "no-gso-size",
        "gso-without-csum", "gso-not-negotiated"])
def test_what_is_no_frame_is_counted(datagram: bytes, counter: str) -> None:
    with Wire(frame_max=4014) as w:
        w.tx.send(datagram)
        w.tx.send(VNET + frame(60))
        run(w.guest_tx)
        assert [count(w.guest_tx, n) for n in (counter, "frames_in", "frames_out")] == [1, 2, 1]
        run(w.guest_rx)
        assert received(w.rx) == [VNET + frame(60)]


def test_super_frame_may_be_longer_than_the_link_otherwise_allows() -> None:
    with Wire(frame_max=1514) as w:
        w.tx.send(TSO + frame(65549))
        run(w.guest_tx)
        assert w.rings[0].descriptors()[0][2] == 1
        run(w.guest_rx)
        assert received(w.rx) == [TSO + frame(65549)]


def test_small_frames_do_not_hold_large_buffers() -> None:
    with Wire(large=2) as w:
        for i in range(40):
            w.tx.send(VNET + frame(60, i))
        run(w.guest_tx)
        assert w.rings[0].fill == 40
        run(w.guest_rx)
        assert received(w.rx) == [VNET + frame(60, i) for i in range(40)]


def test_no_small_buffer_left() -> None:
    """The large one goes itself: what was read gets through."""
    with Wire(small=2, large=4) as w:
        for i in range(10):
            w.tx.send(VNET + frame(60, i))
        run(w.guest_tx)
        assert w.rings[0].fill == 6 and count(w.guest_tx, "stalls_buf") > 0
        got = []
        while len(got) < 10:
            run(w.guest_rx)
            more = received(w.rx)
            assert more
            got += more
            run(w.guest_tx)
        assert got == [VNET + frame(60, i) for i in range(10)]
        assert count(w.guest_tx, "frames_in") == count(w.guest_tx, "frames_out") == 10


def test_a_full_ring_stops_the_reading_and_loses_nothing() -> None:
    with Wire(slots=4) as w:
        for i in range(10):
            w.tx.send(VNET + frame(60, i))
        run(w.guest_tx)
        assert w.rings[0].fill == 4 and count(w.guest_tx, "frames_in") == 4
        got = []
        for fill in (4, 2, 0):
            run(w.guest_rx)
            got += received(w.rx)
            run(w.guest_tx)
            assert w.rings[0].fill == fill
        assert got == [VNET + frame(60, i) for i in range(10)]


def test_drained_source_leaves_the_link_alone(wire: Wire) -> None:
    wire.tx.send(VNET + frame(60))
    lib.rn_stage_drain(wire.guest_tx)
    assert run(wire.guest_tx) == lib.RN_RUN_DRAINED
    assert wire.rings[0].fill == 0 and wire.tx_in.recv(100) == VNET + frame(60)


# --- towards the guest ---


def test_a_full_link_keeps_frames_in_order_and_loses_none() -> None:
    with Wire(slots=256, small=512, buffers=1) as w:  # the kernel's smallest send buffer: a frame or two
        sent = [VNET + frame(1400, i) for i in range(100)]
        for s in sent:
            w.tx.send(s)
        run(w.guest_tx)
        run(w.guest_rx)
        assert count(w.guest_rx, "link_full") > 0 and 0 < w.rings[0].fill < 100
        lib.rn_stage_drain(w.guest_rx)
        got = received(w.rx)
        while len(got) < 100:
            assert run(w.guest_rx) == (lib.RN_RUN_CONTROL if w.rings[0].fill else lib.RN_RUN_DRAINED)
            more = received(w.rx)
            assert more
            got += more
        assert run(w.guest_rx) == lib.RN_RUN_DRAINED
        assert got == sent
        assert counts(w.guest_rx) == {"frames_in": 100, "bytes_in": 140000, "frames_out": 100, "bytes_out": 140000,
                                      "link_full": count(w.guest_rx, "link_full")}


def test_a_full_link_by_path_wakes_the_writer(tmp_path: Any) -> None:
    """A socket that is sent to by path stalls after some ten datagrams, and says when it goes on."""
    with Wire() as w:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        server.bind(str(tmp_path / "guest"))
        server.setblocking(False)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        client.setblocking(False)
        client.connect(str(tmp_path / "guest"))
        rx = w.stage(5, inputs={0: w.rings[0]})
        assert lib.stage_guest_rx_init(rx, link(client), -1) == 0
        for i in range(40):
            w.tx.send(VNET + frame(60, i))
        run(w.guest_tx)
        got = []
        while len(got) < 40:
            run(rx)
            more = received(server)
            assert more
            got += more
        assert got == [VNET + frame(60, i) for i in range(40)]
        assert count(rx, "link_full") > 0
        lib.rn_stage_fini(rx)
        server.close()
        client.close()


def test_inputs_are_served_in_turn() -> None:
    """One busy producer does not hold up another's single frame for more than a burst."""
    with Wire(inputs=3, slots=128, small=128) as w:
        for i in range(100):
            w.tx.send(VNET + frame(60, 1))
        for _, sock in w.sources[1:]:
            sock.send(VNET + frame(60, 2))
        for s, _ in w.sources:
            run(s)
        assert [r.fill for r in w.rings] == [100, 1, 1]
        run(w.guest_rx)
        got = received(w.rx)
        assert len(got) == 102
        assert all(got.index(VNET + frame(60, 2), start) <= 33 for start in (0, got.index(VNET + frame(60, 2)) + 1))


def test_inputs_are_served_in_turn_on_a_link_that_is_mostly_full() -> None:
    """It takes a frame or two and says EAGAIN: who comes next must not be the busy one for ever."""
    with Wire(inputs=3, slots=128, small=128, buffers=1) as w:
        for i in range(100):
            w.tx.send(VNET + frame(1400, 1))
        for _, sock in w.sources[1:]:
            for _ in range(5):
                sock.send(VNET + frame(1400, 2))
        for s, _ in w.sources:
            run(s)
        assert [r.fill for r in w.rings] == [100, 5, 5]
        rounds = 0
        while any(r.fill for r in w.rings[1:]):
            run(w.guest_rx)
            got = received(w.rx)
            assert got and len(got) < 10
            rounds += 1
        assert w.rings[0].fill > 50  # by far not emptied first


def test_closed_peer_is_a_counted_drop(wire: Wire) -> None:
    for _ in range(3):
        wire.tx.send(VNET + frame(60))
    run(wire.guest_tx)
    wire.rx.close()
    assert run(wire.guest_rx) == lib.RN_RUN_NOTICE  # told once, for whoever can bring another peer
    assert lib.stage_guest_rx_broken(wire.guest_rx) == -errno.ECONNREFUSED
    assert lib.stage_guest_rx_broken(wire.guest_rx) == 0
    assert run(wire.guest_rx) == lib.RN_RUN_CONTROL
    assert counts(wire.guest_rx) == {"frames_in": 3, "bytes_in": 180, "drop_link_down": 3}
    assert wire.rings[0].fill == 0


def test_end_of_file_of_a_packet_socket() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    a.setblocking(False)
    ring = inproc.Ring(8)
    with inproc.Plane({0: (8, 2)}) as p:
        tx = p.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (ring, 1)})
        assert lib.stage_guest_tx_init(tx, link(a), -1) == 0
        b.send(VNET + frame(60))
        b.close()
        run(tx)
        assert counts(tx) == {"frames_in": 1, "bytes_in": 60, "frames_out": 1, "bytes_out": 60}
        lib.rn_stage_drain(tx)
        assert run(tx) == lib.RN_RUN_DRAINED
    a.close()


@pytest.mark.fault(12)
def test_what_cannot_be_finished_is_a_counted_drop() -> None:
    """Our own error if it happens: a header that asks for segments of what is no TCP, and a frame over the MTU."""
    with Wire() as w:
        out, sink = pair()
        rx = w.stage(5, inputs={0: w.rings[0]})
        assert lib.stage_guest_rx_init(rx, link(out, vnet=False, frame_max=1514), -1) == 0
        for s in (TSO + frame(3000), VNET + frame(1515), PARTIAL + frame(1515), VNET + frame(1514)):
            w.tx.send(s)
        run(w.guest_tx)
        run(rx)
        assert received(sink) == [frame(1514)]
        assert count(rx, "drop_link_write") == 3
        lib.rn_stage_fini(rx)
        out.close()
        sink.close()


def test_bad_descriptor_towards_the_guest(wire: Wire) -> None:
    wire.rings[0].forge(1, 60)
    run(wire.guest_rx)
    assert counts(wire.guest_rx) == {"frames_in": 1, "drop_bad_descriptor": 1}


@pytest.mark.parametrize("init", [lib.stage_guest_tx_init, lib.stage_guest_rx_init])
@pytest.mark.parametrize(("bad", "text"), [({"frame_max": 13}, "outside 14..65549"), ({"frame_max": 65550}, "65550"),
                                           ({}, "cannot watch")])
def test_init_says_what_is_wrong(init: Callable[..., int], bad: dict[str, int], text: str) -> None:
    s = lib.rn_stage_new(0, 0)
    try:
        assert init(s, link(1 << 20, **bad), -1) < 0  # no such descriptor
        assert text in error(s)
        lib.rn_stage_fini(s)
    finally:
        lib.rn_stage_free(s)


# --- a real tap ---


@contextmanager
def tap(ns: Netns, name: str) -> Iterator[int]:
    """A tap made in that namespace, by a thread that goes there; down."""
    made: list[int] = []

    def make() -> None:
        fd = os.open(ns.path, os.O_RDONLY)
        assert lib.rn_os_setns(fd, lib.RN_CLONE_NEWNET) == 0
        os.close(fd)
        made.append(lib.rn_tap_open(name.encode(), ffi.new("int *")))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert made and made[0] >= 0
    try:
        yield made[0]
    finally:
        os.close(made[0])


@pytest.mark.netns
def test_tap_up_down_and_gone(make_netns: Callable[[str], Netns]) -> None:
    ns = make_netns("tap")
    with tap(ns, "t0") as fd, Wire() as w:
        rx = w.stage(5, inputs={0: w.rings[0]})
        assert lib.stage_guest_rx_init(rx, link(fd, kind=lib.RN_LINK_TAP), -1) == 0
        ring = inproc.Ring(64)
        tx = w.stage(6, outputs={lib.RN_ROLE_CLASSIFY: (ring, 1)})
        reader = os.dup(fd)  # guest_tx and guest_rx have a descriptor each
        assert lib.stage_guest_tx_init(tx, link(reader, kind=lib.RN_LINK_TAP), -1) == 0

        def to_guest() -> None:
            w.tx.send(VNET + b"\xff" * 6 + frame(54))
            run(w.guest_tx)
            assert run(rx) == lib.RN_RUN_CONTROL, error(rx)

        to_guest()
        assert counts(rx) == {"frames_in": 1, "bytes_in": 60, "drop_link_down": 1}  # EIO: not up yet
        ns.ip("link", "set", "t0", "up")
        to_guest()
        assert (count(rx, "frames_out"), count(rx, "drop_link_down")) == (1, 1)
        ns.ip("link", "set", "t0", "down")
        to_guest()
        assert count(rx, "drop_link_down") == 2
        ns.ip("link", "delete", "t0")
        to_guest()
        assert count(rx, "drop_link_down") == 3
        assert run(tx) == lib.RN_RUN_CONTROL  # the device is gone: noted, and it does not spin
        lib.rn_stage_fini(rx)
        lib.rn_stage_fini(tx)
        os.close(reader)


@pytest.mark.netns
def test_tap_carries_what_the_guest_sends(make_netns: Callable[[str], Netns]) -> None:
    ns = make_netns("tap")
    with tap(ns, "t0") as fd, inproc.Plane({0: (64, 8)}) as p:
        ring = inproc.Ring(64)
        tx = p.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (ring, 1)})
        assert lib.stage_guest_tx_init(tx, link(fd, kind=lib.RN_LINK_TAP), -1) == 0
        ns.ip("addr", "add", "10.0.2.2/24", "dev", "t0")
        ns.ip("link", "set", "t0", "up")
        ns.ip("neigh", "add", "10.0.2.1", "lladdr", "02:ab:cd:00:00:01", "dev", "t0")
        with ns.socket(kind=socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x" * 1000, ("10.0.2.1", 9))
        assert run(tx) == lib.RN_RUN_CONTROL
        assert 14 + 28 + 1000 in [d[1] for d in ring.descriptors()]
        assert count(tx, "frames_in") == count(tx, "frames_out") == ring.fill
