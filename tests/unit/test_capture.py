"""Captures in the stages: the mirror (csrc/rn_mirror.c), the filter (rn_filter.c), the points (rn_tap.c), and what the
reader makes of them (rn_capture.c), read back by scapy."""
from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from frames import GATEWAY, GUEST, inproc
from frames.inproc import Classified, count, run
from frames.recipes import ICMP, IP, TCP, UDP, WORLD, Dot1Q, Ether, IPv6, arp, eth, ip, raw, tcp, udp
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet6 import IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.utils import PcapNgReader

from pipeline import api
from pipeline.capture_file import CaptureFile, head
from pipeline.captures import CaptureError, points_of
from pipeline.topology import TOPOLOGY, Feature
from shm._dataplane import ffi, lib
from shm.mirror import POINT_LINK, POINT_LINK2, POINTS, CaptureReader, Mirror, MirrorBroken, c_filter

ROOM = lib.RN_MIRROR_MIN
TAIL, HEAD, ASLEEP, DATA = 64, 128, 136, 192  # csrc/rn_mirror.h
REC = struct.Struct("<IIIIQHBBI")


@contextmanager
def tapped(stage: Any, points: int, *, room: int = ROOM, snaplen: int = 1 << 17, drops: bool = False, number: int = 1,
           bell: int | None = None, **wanted: Any) -> Iterator[Mirror]:
    """A capture of a stage in this process."""
    with Mirror.create(room) as mirror:
        rung = lib.rn_bell_new() if bell is None else bell
        rc = lib.rn_tap_start(stage, number, mirror.mem, mirror.size, rung, points, snaplen, int(drops), c_filter(**wanted))
        assert rc == 0, inproc.error(stage)
        try:
            yield mirror
        finally:
            lib.rn_tap_stop(stage, number)
            if bell is None:
                os.close(rung)


def read(tmp_path: Path, *mirrors: Mirror) -> list[Any]:
    """Packets of the mirrors, as scapy has them out of the file that a reader would write."""
    reader = CaptureReader([(m, [i] * POINTS) for i, m in enumerate(mirrors)])
    path = tmp_path / "c.pcapng"
    blocks = bytearray()
    while piece := reader.read(1 << 20, 1 << 30):
        blocks += piece
    path.write_bytes(head([api.CaptureInterface(name=f"i{i}", description="d") for i in range(len(mirrors))], 0) + blocks)
    found = []
    with PcapNgReader(str(path)) as packets:
        while True:
            try:
                found.append(packets.read_packet(size=1 << 20))
            except EOFError:
                return found


def test_a_ring_with_the_reason_of_each_drop(tmp_path: Path) -> None:
    good, bad = raw(ip() / tcp()), raw(ip(ttl=0) / tcp())
    with Classified() as plane, tapped(plane.classify, 1) as mirror:
        plane.through(good, bad, raw(arp()))
        assert count(plane.classify, "capture_frames") == 3 and count(plane.classify, "drop_ip_ttl") == 1
        packets = read(tmp_path, mirror)
    assert [p.original for p in packets] == [good, bad, raw(arp())]
    assert [p.comment for p in packets] == [None, b"dropped: ip_ttl (TTL 0)", None]
    assert [p.direction for p in packets] == [1, 1, 1]
    assert [float(p.time) for p in packets] == sorted(float(p.time) for p in packets)


def test_only_drops(tmp_path: Path) -> None:
    with Classified() as plane, tapped(plane.classify, 1, drops=True) as mirror:
        plane.through(*[raw(ip(id=n, ttl=n % 2) / tcp()) for n in range(6)])
        assert count(plane.classify, "capture_frames") == 3
        assert [p[IP].id for p in read(tmp_path, mirror)] == [0, 2, 4]


def test_the_link_both_ways_on_one_interface(tmp_path: Path) -> None:
    """What guest_tx drops is in it with its reason; what a full link refuses is in it once, when it went."""
    with Classified() as plane:
        with tapped(plane.guest_tx, 1 << POINT_LINK) as up, tapped(plane.readers["reply"], 1 << POINT_LINK) as down:
            plane.through(raw(arp()))
            plane.guest.send(b"\x04" + bytes(11) + raw(ip() / tcp()))  # virtio-net header nobody negotiated
            run(plane.guest_tx)
            packets = read(tmp_path, up, down)
    assert [(p.direction, p.sniffed_on) for p in packets] == [(1, "i0"), (2, "i1"), (1, "i0")]
    assert packets[2].comment == b"dropped: bad_vnet_header (virtio-net header that contradicts the frame)"


def test_a_frame_that_waits_for_the_link_is_captured_once(tmp_path: Path) -> None:
    ring, (inner, guest), (out, sink) = inproc.Ring(64), inproc.pair(), inproc.pair(4096)
    with inproc.Plane({0: (64, 4)}) as p:
        tx = p.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (ring, 1)})
        assert lib.stage_guest_tx_init(tx, inproc.link(inner), -1) == 0
        rx = p.stage(1, inputs={0: ring})
        assert lib.stage_guest_rx_init(rx, inproc.link(out), -1) == 0
        for n in range(20):
            guest.send(bytes(12) + raw(ip(id=n) / udp() / bytes(1000)))
        run(tx)
        with tapped(rx, 1 | 1 << POINT_LINK) as mirror:
            run(rx)
            assert count(rx, "link_full") >= 1
            got = inproc.received(sink)
            for _ in range(20):
                run(rx)
                got += inproc.received(sink)
            packets = read(tmp_path, mirror)
    assert len(got) == 20
    assert [p[IP].id for p in packets] == [n for n in range(20) for _ in range(2)]  # on the ring, on the link
    for s in (inner, guest, out, sink):
        s.close()


def test_snap_length(tmp_path: Path) -> None:
    with Classified() as plane, tapped(plane.classify, 1, snaplen=50) as mirror:
        plane.through(raw(ip() / udp() / bytes(500)))
        (packet,) = read(tmp_path, mirror)
    assert len(raw(packet)) == 50 and packet.wirelen == 542


def test_a_full_mirror_costs_copies_and_no_frame(tmp_path: Path) -> None:
    frames = [raw(ip(id=n) / udp() / (bytes([n]) * 1400)) for n in range(100)]
    with Classified() as plane, tapped(plane.classify, 1) as mirror:
        arrived = 0
        for _ in range(4):  # 4 x 100 frames of 1.4 KB into 256 KiB, and nobody reads
            for f in frames:
                arrived += len(plane.through(f)["bridge"])
        lost = count(plane.classify, "capture_dropped")
        assert arrived == 400 and lost > 100 and mirror.dropped == lost
        assert count(plane.classify, "capture_frames") == 400 - lost
        assert len(read(tmp_path, mirror)) == 400 - lost
        plane.through(frames[0])  # there is room again
        (after,) = read(tmp_path, mirror)
    assert after.original == frames[0]
    drop_count = struct.pack("<HHQ", 4, 8, lost)  # epb_dropcount: in the file, before the first frame after the gap
    assert drop_count in (tmp_path / "c.pcapng").read_bytes()


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(14, 3000), min_size=1, max_size=60), reads=st.integers(1, 20))
def test_records_survive_every_wrap(sizes: list[int], reads: int) -> None:
    """Whatever the lengths, what is read is what was written, in order, many times round the mirror."""
    want, got = [], []
    with Classified(slots=1024) as plane, tapped(plane.classify, 1) as mirror:
        reader = CaptureReader([(mirror, [0] * POINTS)])
        number = 0
        for _ in range(max(1, 700_000 // (sum(sizes) + 32 * len(sizes)))):
            for n in sizes:
                number += 1
                frame = struct.pack("!I", number) + bytes(n - 4)
                want.append((number, n))
                plane.send(frame)
                plane.work()
                for name in plane.rings:
                    plane.read(name)
                if number % reads == 0 or mirror.dropped:
                    got += blocks_of(reader)
        got += blocks_of(reader)
        assert mirror.dropped == 0 and got == want


def blocks_of(reader: CaptureReader) -> list[tuple[int, int]]:
    found, data = [], bytes(reader.read(1 << 20, 1 << 30))
    while data:
        size, length = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 24)[0]
        found.append((struct.unpack_from("!I", data, 28)[0], length))
        data = data[size:]
    return found


@pytest.mark.parametrize("head_moved", [1, 8, -8, 1 << 40, (1 << 64) - 1])
def test_a_reader_that_lies_harms_its_capture_only(head_moved: int) -> None:
    with Classified() as plane, tapped(plane.classify, 1) as mirror:
        plane.through(raw(ip() / tcp()))
        struct.pack_into("<Q", mirror.buffer(), HEAD, head_moved % (1 << 64))
        for _ in range(3):
            assert len(plane.through(*[raw(ip() / udp() / bytes(1400))] * 60)["bridge"]) == 60


@settings(deadline=None)
@given(size=st.integers(0, 1 << 32 - 1) | st.sampled_from([0, 8, 31, 32, 40, 96, 104, 1 << 18]),
       caplen=st.integers(0, (1 << 32) - 1) | st.sampled_from([0, 54, 64, 72, 0xFFFFFFFF]),
       tail=st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 8, 32, 88, 96, ROOM, ROOM + 8]), reason=st.integers(0, 65535),
       point=st.integers(0, 255))
def test_a_stage_that_lies_is_found_out_by_the_reader(size: int, caplen: int, tail: int, reason: int, point: int) -> None:
    """Any header and any count: blocks that are whole, or MirrorBroken; never a read outside (sanitizers watch)."""
    with Mirror.create(ROOM) as mirror:
        reader = CaptureReader([(mirror, [0] * POINTS)])
        REC.pack_into(mirror.buffer(), DATA, size & 0xFFFFFFFF, caplen, 54, 0, 1, reason, point, 1, 0)
        struct.pack_into("<Q", mirror.buffer(), TAIL, tail)
        try:
            data = bytes(reader.read(1 << 20, 3))
        except MirrorBroken:
            return
        while data:
            n = struct.unpack_from("<I", data, 4)[0]
            assert data[n - 4:n] == data[4:8]
            data = data[n:]


def test_the_doorbell_is_rung_once_for_each_sleep() -> None:
    bell = lib.rn_bell_new()
    with Classified() as plane, tapped(plane.classify, 1, bell=bell) as mirror:
        reader = CaptureReader([(mirror, [0] * POINTS)])
        assert not reader.arm()
        plane.through(raw(ip() / tcp()))
        plane.through(raw(ip() / tcp()))
        assert os.read(bell, 8) == struct.pack("=Q", 1)
        assert reader.arm() and len(reader.read(1 << 20, 9))  # there is something: not to sleep
        assert not reader.arm()
    os.close(bell)


def test_more_captures_than_there_is_room_for_are_refused() -> None:
    with Mirror.create(ROOM) as mirror, Classified() as plane:
        bell = lib.rn_bell_new()

        def start(number: int, points: int = 1, size: int = mirror.size) -> int:
            return lib.rn_tap_start(plane.classify, number, mirror.mem, size, bell, points, 100, 0, c_filter())

        assert [start(n) for n in range(1, lib.RN_TAPS_MAX + 1)] == [0] * lib.RN_TAPS_MAX
        assert start(9) == -16 and "under way" in inproc.error(plane.classify)  # EBUSY
        assert lib.rn_tap_stop(plane.classify, 2) == 0 and lib.rn_tap_stop(plane.classify, 2) == -2
        assert start(0) == start(9, points=1 << POINTS) == start(9, points=0) == -22
        assert start(9, size=1000) == -90 and start(9) == 0
        os.close(bell)


V6 = IPv6(src="2001:db8::1", dst="2001:db8::2")
FLOW = {"guest": GUEST, "guest_port": 40000, "peer": WORLD, "peer_port": 80}
BACK = Ether() / IP(src=WORLD, dst=GUEST) / TCP(sport=80, dport=40000)


@pytest.mark.parametrize(("wanted", "frame", "matches"), [
    ({}, b"", True),
    ({"host": GUEST}, ip() / tcp(), True),
    ({"host": WORLD}, ip() / tcp(), True),
    ({"host": "192.0.2.11"}, ip() / tcp(), False),
    ({"host": GATEWAY}, arp(), True),
    ({"host": "192.0.2.11"}, arp(), False),
    ({"proto": 6}, arp(), False),
    ({"proto": 6}, ip() / tcp(), True),
    ({"proto": 6}, ip() / udp(), False),
    ({"proto": 17}, ip(frag=100, proto=17) / b"12345678", True),
    ({"port": 0x3132, "proto": 17}, ip(frag=100, proto=17) / b"12345678", False),  # not a port, though it looks like one
    ({"port": 80}, ip() / tcp(), True),
    ({"port": 40000}, ip() / tcp(), True),
    ({"port": 81}, ip() / tcp(), False),
    ({"port": 80, "host": WORLD, "proto": 6}, ip() / tcp(), True),
    ({"port": 80, "host": WORLD, "proto": 17}, ip() / tcp(), False),
    (FLOW, ip() / tcp(), True),
    (FLOW, BACK, True),
    (FLOW, ip() / tcp(sport=40001), False),
    (FLOW, Ether() / IP(src=GUEST, dst=WORLD) / TCP(sport=80, dport=40000), False),
    ({**FLOW, "peer": ""}, ip(dst="192.0.2.99") / tcp(dport=9), True),
    ({**FLOW, "peer": ""}, Ether() / IP(src="192.0.2.99", dst=GUEST) / UDP(sport=9, dport=40000), True),
    ({**FLOW, "peer": ""}, ip() / tcp(sport=1), False),
    ({"proto": 1, "guest": GUEST, "guest_port": 7, "peer": WORLD}, ip() / ICMP(id=7), True),
    ({"proto": 1, "guest": GUEST, "guest_port": 7, "peer": WORLD}, ip() / ICMP(id=8), False),
    ({"proto": 1, "guest": GUEST, "guest_port": 7}, Ether() / IP(src="1.2.3.4", dst=GUEST) / ICMP(type=0, id=7), True),
    ({"proto": 1, "guest": GUEST, "guest_port": 7}, ip() / ICMP(type=3), False),
    ({"host": "2001:db8::2", "port": 53}, eth() / V6 / UDP(dport=53), True),
    ({"host": "2001:db8::3"}, eth() / V6 / UDP(dport=53), False),
    ({"port": 53, "proto": 17}, eth() / V6 / IPv6ExtHdrHopByHop() / UDP(dport=53), True),
    ({"proto": 17}, eth() / V6 / IPv6ExtHdrFragment(nh=17, offset=9) / b"12345678", True),
    ({"port": 0x3132}, eth() / V6 / IPv6ExtHdrFragment(nh=17, offset=9) / b"12345678", False),
    ({"proto": 1}, eth() / V6 / b"", False),
    ({"port": 80}, Ether() / Dot1Q(vlan=5) / IP(src=GUEST, dst=WORLD) / tcp(), True),
])
def test_filter(wanted: dict[str, Any], frame: Any, matches: bool) -> None:
    data = raw(frame)
    assert lib.rn_filter_match(c_filter(**wanted), data, len(data)) == int(matches)


@settings(deadline=None)
@given(data=st.data(), wanted=st.sampled_from([{"port": 80}, {"host": GUEST}, FLOW, {"proto": 6}]))
def test_a_cut_or_mangled_frame_is_no_trouble_to_the_filter(data: st.DataObject, wanted: dict[str, Any]) -> None:
    frame = bytearray(raw(data.draw(st.sampled_from([ip() / tcp(), arp(), eth() / V6 / IPv6ExtHdrHopByHop() / UDP()]))))
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    n = data.draw(st.integers(0, len(frame)))
    copy = ffi.new("uint8_t[]", bytes(frame[:n]))  # of exactly this size: sanitizers see one byte too far
    assert lib.rn_filter_match(c_filter(**wanted), copy, n) in (0, 1)


# --- names of points, files ---

SESSION = TOPOLOGY.only(frozenset({Feature.NIC1}))
ONE = {"link": api.CaptureInterface(name="tap0", description="")}
TWO = ONE | {"link2": api.CaptureInterface(name="tap1", description=""), "bridge": api.CaptureInterface(name="br", description="")}


def test_points_by_name() -> None:
    interfaces, parts = points_of(SESSION, ["link"], ONE)
    assert [i.name for i in interfaces] == ["tap0"]
    assert {p.stage: p.points for p in parts} == dict.fromkeys(("guest_tx", "egress", "guest_rx"), {POINT_LINK: 0})
    assert points_of(SESSION, ["classify:egress"], ONE) == points_of(SESSION, ["classify->egress"], ONE)
    interfaces, parts = points_of(SESSION, ["egress"], ONE)
    assert [i.name for i in interfaces] == ["classify->egress", "guest_tx->egress"]
    interfaces, parts = points_of(SESSION, ["all"], ONE)
    assert [i.name for i in interfaces] == ["tap0", *(r.name for s in SESSION.stages for r in SESSION.inputs(s.name)
                                                      if not r.notices)]
    for part in parts:
        for point, interface in part.points.items():
            want = "tap0" if point == POINT_LINK else SESSION.inputs(part.stage)[point].name
            assert interfaces[interface].name == want


def test_points_of_the_second_nic() -> None:
    interfaces, parts = points_of(TOPOLOGY, ["link2", "bridge"], TWO)
    assert [i.name for i in interfaces] == ["tap1", "br"]
    assert {p.stage: p.points for p in parts} == {"guest_tx": {POINT_LINK2: 0}, "guest_rx": {POINT_LINK2: 0},
                                                  "vmnet": {POINT_LINK: 1}}
    interfaces, parts = points_of(TOPOLOGY, ["vmnet"], TWO)
    assert [i.name for i in interfaces] == ["br", "guest_tx->vmnet"]
    assert {"tap0", "tap1", "br", "vmnet->guest_rx"} < {i.name for i in points_of(TOPOLOGY, ["all"], TWO)[0]}
    for name in ("link2", "bridge"):
        with pytest.raises(CaptureError, match=f"{name}: no such point"):
            points_of(SESSION, [name], ONE)


@pytest.mark.parametrize("name", ["", "nothing", "classify:nobody", "services->egress"])
def test_a_point_that_is_none(name: str) -> None:
    with pytest.raises(CaptureError, match="no such point; there are all, link, .*classify.*guest_tx->classify"):
        points_of(SESSION, [name], ONE)


def test_a_ring_of_files(tmp_path: Path) -> None:
    first = head([api.CaptureInterface(name="tap0", description="")], 0)
    out = CaptureFile(str(tmp_path / "c.pcapng"), first, limit=4096, keep=3)
    for n in range(50):
        assert out.room(1000, 1 << 20) >= 1000
        out.write(bytes([n]) * 1000)
    out.close()
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [f"c_{n:05}.pcapng" for n in (11, 12, 13)]
    for p in tmp_path.iterdir():
        assert p.stat().st_size <= 4096 and p.read_bytes().startswith(first) and p.stat().st_mode & 0o077 == 0
