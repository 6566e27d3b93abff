"""The second NIC's relay with real rings, arena and stages: guest's link, guest_tx, vmnet, host's link, and back.

Both links are datagram sockets, so that the test is guest and host network at once.
"""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from frames.inproc import VNET, Plane, Ring, count, error, link, pair, received, run

from shm._dataplane import ffi, lib
from tests.harness import checksum

TX, RX, VMNET = 0, 1, 2  # rows
MAC = bytes.fromhex("0200000000aa")
PLAIN_MAX = 9216
TSO = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)  # TCP/IPv4 super-frame, checksum left to the link


def frame(n: int, size: int = 60, dst: bytes = MAC) -> bytes:
    return dst + MAC + b"\x08\x00" + struct.pack("!I", n) + bytes(size - 18)


class Nic2(Plane):
    """guest <-> guest_tx -> vmnet -> host, and host -> vmnet -> guest_rx -> guest. NIC1's links are there, and idle."""

    def __init__(self, *, guest_vnet: bool = True, host_vnet: bool = True, frame_max: int = 1518, storm: int = 0,
                 slots: int = 64, large: int = 80, vmnet_large: int = 16, host_buffers: int = 4 << 20,
                 uso: bool = False) -> None:
        super().__init__({TX: (128, large), VMNET: (128, vmnet_large)})
        self.up, self.down, self.nic1_up, self.nic1_down = Ring(slots), Ring(slots), Ring(slots), Ring(slots)
        self.inner, self.guest = pair()
        self.outer, self.host = pair(host_buffers)
        self.inner1, self.guest1 = pair()
        self.vnets = guest_vnet, host_vnet
        self.tx = self.stage(TX, outputs={lib.RN_ROLE_HOSTNET: (self.up, VMNET), lib.RN_ROLE_CLASSIFY: (self.nic1_up, 3)})
        assert lib.stage_guest_tx_init(self.tx, link(self.inner1), -1) == 0
        self.uso = uso
        guest = {"vnet": guest_vnet, "frame_max": frame_max, "uso": uso}
        assert lib.stage_guest_tx_nic2(self.tx, link(self.inner, **guest)) == 0, error(self.tx)
        self.rx = self.stage(RX, inputs={3: self.nic1_down, VMNET: self.down})
        self.rx_inner = socket.socket(fileno=self.inner.dup().detach())
        assert lib.stage_guest_rx_init(self.rx, link(self.inner1.dup().detach()), -1) == 0
        assert lib.stage_guest_rx_nic2(self.rx, link(self.rx_inner, **guest), VMNET) == 0, error(self.rx)
        self.start_vmnet(host_vnet, frame_max, storm)

    def start_vmnet(self, vnet: bool = True, frame_max: int = 1518, storm: int = 0) -> None:
        self.vmnet = self.stage(VMNET, inputs={TX: self.up}, outputs={lib.RN_ROLE_GUEST: (self.down, RX)})
        assert lib.stage_vmnet_init(self.vmnet, link(self.outer, vnet=vnet, frame_max=frame_max, uso=self.uso), storm) == 0

    def work(self) -> None:
        for stage in (self.tx, self.vmnet, self.rx):
            assert run(stage) == lib.RN_RUN_CONTROL, error(stage)

    def send_up(self, *frames: bytes, vnet: bytes = VNET) -> list[bytes]:
        """From the guest; what comes out at the host."""
        for f in frames:
            self.guest.send((vnet if self.vnets[0] else b"") + f)
        self.work()
        return received(self.host)

    def send_down(self, *frames: bytes, vnet: bytes = VNET) -> list[bytes]:
        for f in frames:
            self.host.send((vnet if self.vnets[1] else b"") + f)
        self.work()
        return received(self.guest)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for s in (self.inner, self.guest, self.outer, self.host, self.inner1, self.guest1, self.rx_inner):
            s.close()


@pytest.fixture
def nic2() -> Iterator[Nic2]:
    with Nic2() as n:
        yield n


def test_frames_pass_whole_both_ways(nic2: Nic2) -> None:
    frames = [frame(1, 14 + 46), frame(2, 1518), frame(3, 18)]
    assert nic2.send_up(*frames) == [VNET + f for f in frames]
    assert nic2.send_down(*frames) == [VNET + f for f in frames]
    size = sum(map(len, frames))
    assert (count(nic2.tx, "nic2_up_frames"), count(nic2.vmnet, "vmnet_up_frames")) == (3, 3)
    assert (count(nic2.vmnet, "vmnet_down_frames"), count(nic2.rx, "nic2_down_frames")) == (3, 3)
    assert count(nic2.tx, "nic2_up_bytes") == count(nic2.vmnet, "vmnet_up_bytes") == size
    assert count(nic2.vmnet, "vmnet_down_bytes") == count(nic2.rx, "nic2_down_bytes") == size
    assert nic2.nic1_up.stat().tail == 0 and received(nic2.guest1) == []  # nothing of it went by NIC1


def test_super_frames_and_their_headers_are_untouched(nic2: Nic2) -> None:
    big = frame(7, 65000)
    assert nic2.send_up(big, vnet=TSO) == [TSO + big]
    assert nic2.send_down(big, vnet=TSO) == [TSO + big]


@pytest.mark.parametrize("size", [PLAIN_MAX, PLAIN_MAX + 1])
def test_without_headers_frames_go_up_to_the_largest(size: int) -> None:
    with Nic2(guest_vnet=False, host_vnet=False, frame_max=PLAIN_MAX) as n:
        f = frame(1, size)
        passes = [f] if size == PLAIN_MAX else []
        assert n.send_up(f) == passes and n.send_down(f) == passes
        assert count(n.tx, "drop_oversize") == count(n.vmnet, "drop_vmnet_oversize") == 1 - len(passes)


def tcp(size: int) -> bytes:
    """TCP over IPv4, as a kernel with offloads hands it to its link; `size` bytes of payload."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + size, 1, 0, 64, 6, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    return MAC + MAC + b"\x08\x00" + ip + struct.pack("!HHIIBBHHH", 1, 2, 1000, 0, 0x50, 0x10, 100, 0, 0) + bytes(
        i % 251 for i in range(size))


def test_a_side_without_headers_gets_segments_instead_of_super_frames() -> None:
    with Nic2(host_vnet=False) as n:
        got = n.send_up(tcp(5000), vnet=TSO)
        assert [len(f) for f in got] == [54 + 1448] * 3 + [54 + 5000 - 3 * 1448]
        assert b"".join(f[54:] for f in got) == tcp(5000)[54:]
        assert n.send_up(frame(2)) == [frame(2)] and n.send_down(frame(3)) == [VNET + frame(3)]


def train(size: int) -> bytes:
    """Datagrams of 1000 bytes behind one header, as a kernel hands them to its link; USO says so."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + size, 1, 0, 64, 17, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    return MAC + MAC + b"\x08\x00" + ip + struct.pack("!HHHH", 1, 2, 8 + size, 0) + bytes(i % 251 for i in range(size))


USO = struct.pack("<BBHHHHH", 1, 5, 42, 1000, 34, 6, 0)


def test_trains_of_datagrams_are_untouched_where_both_sides_take_them() -> None:
    with Nic2(uso=True) as n:
        assert n.send_up(train(60000), vnet=USO) == [USO + train(60000)]
        assert n.send_down(train(60000), vnet=USO) == [USO + train(60000)]


def test_trains_are_refused_where_the_other_side_was_not_asked(nic2: Nic2) -> None:
    assert nic2.send_up(train(5000), vnet=USO) == [] and nic2.send_down(train(5000), vnet=USO) == []
    assert (count(nic2.tx, "drop_bad_vnet_header"), count(nic2.vmnet, "drop_vmnet_header")) == (1, 1)


@pytest.mark.parametrize("guest", [True, False], ids=["up", "down"])
def test_a_side_without_headers_gets_the_datagrams_of_a_train(guest: bool) -> None:
    with Nic2(uso=True, guest_vnet=guest, host_vnet=not guest) as n:
        got = (n.send_up if guest else n.send_down)(train(2500), vnet=USO)
        assert [len(f) for f in got] == [1042, 1042, 542]
        assert b"".join(f[42:] for f in got) == train(2500)[42:]
        for f in got:
            assert f[38:40] == (len(f) - 34).to_bytes(2, "big")  # its own UDP length
            assert checksum(f[14:34]) == 0
            assert checksum(f[26:34] + struct.pack("!BBH", 0, 17, len(f) - 34) + f[34:]) == 0


def test_what_is_no_frame_is_dropped_by_reason(nic2: Nic2) -> None:
    assert nic2.send_up(b"x" * 13, b"", frame(1, 1519)) == []
    assert nic2.send_up(frame(1), vnet=struct.pack("<BBHHHHH", 0, 9, 0, 0, 0, 0, 0)) == []
    assert (count(nic2.tx, "drop_runt"), count(nic2.tx, "drop_oversize"), count(nic2.tx, "drop_bad_vnet_header")) == (2, 1, 1)
    assert nic2.send_down(b"x" * 13, frame(1, 1519)) == []
    assert (count(nic2.vmnet, "drop_vmnet_runt"), count(nic2.vmnet, "drop_vmnet_oversize")) == (1, 1)
    nic2.up.forge(4096, 60)
    nic2.work()
    assert count(nic2.vmnet, "drop_bad_descriptor") == 1


@pytest.mark.fault(39)
def test_a_host_side_that_stands_still_stops_the_reading_and_loses_nothing() -> None:
    """All the way back to the guest's queue; and NIC1's buffers are left alone."""
    with Nic2(host_buffers=1, slots=16) as n:
        sent = [frame(i, 1500) for i in range(100)]
        got = n.send_up(*sent)
        assert 0 < len(got) < 100 and count(n.vmnet, "vmnet_full") >= 1
        n.work()
        assert n.up.fill > 0
        n.guest1.send(VNET + frame(5))  # NIC1 still moves
        n.work()
        assert count(n.tx, "frames_out") - count(n.tx, "nic2_up_frames") == 1 and n.nic1_up.fill == 1
        while more := received(n.host):
            got += more
            n.work()
            n.work()
        assert got == [VNET + f for f in sent]


def test_nic2_leaves_large_buffers_to_nic1() -> None:
    with Nic2(host_buffers=1, slots=128, large=66) as n:
        for i in range(20):
            n.guest.send(VNET + frame(i, 60000)[:1518])
        for i in range(20):
            n.guest.send(TSO + frame(i, 60000))
        n.work()
        assert n.up.fill < 40
        n.guest1.send(TSO + frame(5, 60000))
        n.work()
        assert n.nic1_up.fill == 1


@pytest.mark.fault(39)
def test_a_guest_that_does_not_read_holds_back_the_host_but_not_nic1(nic2: Nic2) -> None:
    """guest_rx: neither link, when full, holds the other's frames."""
    with Nic2(slots=16) as n:
        n.inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for i in range(60):
            n.host.send(VNET + frame(i, 1500))
        n.work()
        assert n.down.fill > 0 and count(n.rx, "link_full") >= 1
        put = n.stage(3, outputs={lib.RN_ROLE_GUEST: (n.nic1_down, RX)})
        a, b = pair()
        n.nic1_down.forge(4096, 60)  # any frame: it is taken off its ring at once
        n.work()
        assert n.nic1_down.fill == 0 and n.down.fill > 0 and put
        got = []
        while more := received(n.guest):
            got += more
            n.work()
            n.work()
        assert got == [VNET + frame(i, 1500) for i in range(60)]
        a.close()
        b.close()


@pytest.mark.parametrize(("way", "counter"), [("up", "drop_storm_up"), ("down", "drop_storm_down")])
def test_broadcast_and_multicast_pass_up_to_the_limit(way: str, counter: str) -> None:
    with Nic2(storm=10, slots=256) as n:
        send = n.send_up if way == "up" else n.send_down
        group = [b"\xff" * 6, bytes.fromhex("01005e0000fb")]
        got = send(*[frame(i, dst=group[i % 2]) for i in range(50)])
        assert 10 <= len(got) < 15 and count(n.vmnet, counter) == 50 - len(got)
        assert len(send(*[frame(i) for i in range(50)])) == 50  # unicast is never held back


def test_no_limit_is_no_limit() -> None:
    with Nic2(storm=0, slots=256) as n:
        assert len(n.send_up(*[frame(i, dst=b"\xff" * 6) for i in range(60)])) == 60


def test_a_closed_helper_ends_the_stage_with_a_reason() -> None:
    ours, helper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with Plane({VMNET: (8, 2)}) as p:
        s = p.stage(VMNET, inputs={TX: Ring(8)}, outputs={lib.RN_ROLE_GUEST: (Ring(8), RX)})
        assert lib.stage_vmnet_init(s, link(ours, vnet=False), 0) == 0
        helper.close()
        assert run(s) == lib.RN_RUN_ERROR
        assert error(s) == "the host side of the second NIC is gone"
    ours.close()


@pytest.mark.fault(40)
def test_a_descriptor_that_blocks_is_refused() -> None:
    ours, helper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Plane({VMNET: (8, 2)}) as p:
        s = p.stage(VMNET, inputs={TX: Ring(8)}, outputs={lib.RN_ROLE_GUEST: (Ring(8), RX)})
        assert lib.stage_vmnet_init(s, link(ours, vnet=False), 0) < 0
        assert "blocks: set O_NONBLOCK" in error(s)
        ours.setblocking(False)
        assert lib.stage_vmnet_init(s, link(ours, vnet=False), 0) == 0
    ours.close()
    helper.close()


def test_another_link_takes_the_place_of_the_guests(nic2: Nic2) -> None:
    """As when a virtual machine is started again; without one, what is for it is dropped as for an interface that is down."""
    assert lib.stage_guest_tx_nic2(nic2.tx, link(-1, frame_max=1518)) == 0
    assert lib.stage_guest_rx_nic2(nic2.rx, link(-1, frame_max=1518), VMNET) == 0
    assert nic2.send_up(frame(1)) == [] and nic2.send_down(frame(2)) == []
    assert count(nic2.rx, "drop_link_down") == 1
    inner, guest = pair()
    again = socket.socket(fileno=inner.dup().detach())
    try:
        assert lib.stage_guest_tx_nic2(nic2.tx, link(inner, frame_max=1518)) == 0
        assert lib.stage_guest_rx_nic2(nic2.rx, link(again, frame_max=1518), VMNET) == 0
        guest.send(VNET + frame(3))
        nic2.host.send(VNET + frame(4))
        nic2.work()
        assert (received(nic2.host), received(guest), received(nic2.guest)) == ([VNET + frame(3)], [VNET + frame(4)], [])
        assert lib.stage_guest_tx_nic2(nic2.tx, link(inner, frame_max=13)) < 0  # refused: the old one stays
        guest.send(VNET + frame(5))
        nic2.work()
        assert received(nic2.host) == [VNET + frame(5)]
        assert lib.stage_guest_tx_nic2(nic2.tx, link(-1, frame_max=1518)) == 0
        assert lib.stage_guest_rx_nic2(nic2.rx, link(-1, frame_max=1518), VMNET) == 0
    finally:
        for s in (inner, guest, again):
            s.close()


@pytest.mark.parametrize("bad", [{"frame_max": 13}, {"frame_max": 65550}])
def test_init_says_what_is_wrong(nic2: Nic2, bad: dict[str, int]) -> None:
    for init in (lambda s, k: lib.stage_vmnet_init(s, k, 0), lib.stage_guest_tx_nic2,
                 lambda s, k: lib.stage_guest_rx_nic2(s, k, VMNET)):
        assert init(nic2.vmnet, link(0, **bad)) < 0
        assert "outside 14..65549" in error(nic2.vmnet)
    assert lib.stage_guest_rx_nic2(nic2.rx, link(0), 7) < 0 and "no input from stage row 7" in error(nic2.rx)
    lonely = nic2.stage(4)
    assert lib.stage_vmnet_init(lonely, link(0), 0) < 0 and "needs one input" in error(lonely)
    assert ffi.NULL != lonely
