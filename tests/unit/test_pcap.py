"""The capture file (csrc/rn_pcap.c), read back by scapy."""
from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from frames import inproc
from frames.inproc import count
from frames.recipes import arp, ip, raw, tcp, udp
from scapy.utils import PcapNgReader

from shm._dataplane import lib

TX, RX = lib.RN_PCAP_FROM_GUEST, lib.RN_PCAP_TO_GUEST


def begin(path: Path, name: bytes = b"tap0") -> int:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
    assert lib.rn_pcap_begin(fd, name, 0) == 0
    return fd


def packets(path: Path) -> list[tuple[bytes, int]]:
    """(frame, direction) of all packets; fails on a file that is not whole."""
    found = []
    with PcapNgReader(str(path)) as reader:
        while True:
            try:
                packet = reader.read_packet(size=1 << 20)  # by itself it cuts at less than a super-frame
            except EOFError:
                return found
            found.append((packet.original, packet.direction))


def blocks(path: Path) -> list[int]:
    """Types of all blocks; the file ends with a whole one and each says its length twice."""
    data, types = path.read_bytes(), []
    while data:
        kind, n = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
        assert n % 4 == 0 and n <= len(data) and data[n - 4:n] == data[4:8]
        types.append(kind)
        data = data[n:]
    return types


def test_frames_with_direction_time_and_length(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    fd = begin(path)
    sent = [(raw(ip() / udp() / bytes(n)), d) for n, d in ((0, TX), (1, RX), (2, TX), (3, RX), (1400, TX))]
    writers = {d: lib.rn_pcap_new(fd, d, 0) for d in (TX, RX)}
    before = time.time()
    for frame, d in sent:
        lib.rn_pcap_frame(writers[d], frame, len(frame))
        lib.rn_pcap_flush(writers[d])
    after = time.time()
    assert [lib.rn_pcap_written(writers[d]) for d in (TX, RX)] == [3, 2]
    for w in writers.values():
        lib.rn_pcap_free(w)
    os.close(fd)
    assert [f for f, _ in packets(path)] == [f for f, _ in sent]
    with PcapNgReader(str(path)) as reader:
        for packet, (frame, d) in zip(reader, sent, strict=True):
            assert before - 0.01 <= float(packet.time) <= after + 0.01
            assert packet.wirelen == len(frame) and packet.sniffed_on == "tap0"
            assert packet.direction == d
    assert blocks(path) == [0x0A0D0D0A, 1] + [6] * 5


def test_super_frames_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    fd = begin(path)
    w = lib.rn_pcap_new(fd, TX, 0)
    frames = [bytes([i]) * 65549 for i in range(10)]  # more than one batch
    for f in frames:
        lib.rn_pcap_frame(w, f, len(f))
    lib.rn_pcap_free(w)
    os.close(fd)
    assert [f for f, _ in packets(path)] == frames


def test_snap_length(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    assert lib.rn_pcap_begin(fd, b"tap0", 60) == 0
    w = lib.rn_pcap_new(fd, TX, 60)
    lib.rn_pcap_frame(w, bytes(100), 100)
    lib.rn_pcap_free(w)
    os.close(fd)
    with PcapNgReader(str(path)) as reader:
        (packet,) = list(reader)
    assert len(raw(packet)) == 60 and packet.wirelen == 100


def test_long_interface_name_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    os.close(begin(path, b"n" * 300))
    assert blocks(path) == [0x0A0D0D0A, 1]


WRITER = """
import os, sys
sys.path[:0] = {path!r}
from shm._dataplane import lib
fd = os.open({file!r}, os.O_WRONLY | os.O_APPEND)
w = lib.rn_pcap_new(fd, {direction}, 0)
sys.stdin.read()
for i in range({n}):
    frame = bytes([{direction}]) * (60 + i % 1400)
    lib.rn_pcap_frame(w, frame, len(frame))
    if i % 7 == 0:
        lib.rn_pcap_flush(w)
lib.rn_pcap_free(w)
"""


def test_two_processes_append_whole_blocks(tmp_path: Path) -> None:
    path, n = tmp_path / "c.pcapng", 500
    os.close(begin(path))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER.format(path=sys.path, file=str(path), direction=d, n=n)],
                                stdin=subprocess.PIPE) for d in (TX, RX)]
    for p in writers:
        assert p.stdin is not None
        p.stdin.close()  # go
    assert [p.wait(60) for p in writers] == [0, 0]
    assert blocks(path) == [0x0A0D0D0A, 1] + [6] * (2 * n)
    got = packets(path)
    for d in (TX, RX):
        assert [f for f, direction in got if direction == d] == [bytes([d]) * (60 + i % 1400) for i in range(n)]


def test_a_full_disk_is_counted_and_ends_the_capture() -> None:
    with open("/dev/full", "wb", buffering=0) as f:
        assert lib.rn_pcap_begin(f.fileno(), b"tap0", 0) == -28  # ENOSPC
        w = lib.rn_pcap_new(f.fileno(), TX, 0)
        for _ in range(3):
            lib.rn_pcap_frame(w, bytes(60), 60)
        lib.rn_pcap_flush(w)
        lib.rn_pcap_frame(w, bytes(60), 60)
        lib.rn_pcap_flush(w)
        assert (lib.rn_pcap_written(w), lib.rn_pcap_lost(w)) == (0, 4)
        lib.rn_pcap_free(w)


FULL = """
import os, resource, sys
sys.path[:0] = {path!r}
from shm._dataplane import lib
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
fd = os.open({file!r}, os.O_WRONLY | os.O_APPEND)
w = lib.rn_pcap_new(fd, 1, 0)
for i in range(10):
    lib.rn_pcap_frame(w, bytes(1000), 1000)
    lib.rn_pcap_frame(w, bytes(1000), 1000)
    lib.rn_pcap_flush(w)
print(lib.rn_pcap_written(w), lib.rn_pcap_lost(w))
"""


def test_a_torn_batch_is_cut_off_again(tmp_path: Path) -> None:
    """The limit lies within a batch: the kernel takes a part of the write."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "c.pcapng"
    os.close(begin(path))
    done = subprocess.run([sys.executable, "-c", FULL.format(path=sys.path, file=str(path), limit=8000)],
                          capture_output=True, text=True, check=True, timeout=60)
    written, lost = map(int, done.stdout.split())
    assert written + lost == 20 and written == 6
    assert blocks(path) == [0x0A0D0D0A, 1] + [6] * written


def test_stages_capture_both_ways(tmp_path: Path) -> None:
    """guest_tx and guest_rx on one file: what was dropped is in it, what was not written is not."""
    path = tmp_path / "c.pcapng"
    fd = begin(path)
    ring = inproc.Ring(64)
    inner, guest = inproc.pair()
    other, sink = inproc.pair()
    with inproc.Plane({0: (32, 4)}) as p:
        tx = p.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (ring, 1)})
        assert lib.stage_guest_tx_init(tx, inproc.link(inner), fd) == 0
        rx = p.stage(1, inputs={0: ring})
        assert lib.stage_guest_rx_init(rx, inproc.link(other), fd) == 0
        frames = [raw(arp()), raw(ip() / tcp()), raw(ip() / udp() / bytes(3000))]
        for f in frames:
            guest.send(bytes(12) + f)
        bad = raw(ip(id=9) / tcp())
        guest.send(b"\x04" + bytes(11) + bad)  # virtio-net header nobody negotiated
        inproc.run(tx)
        inproc.run(rx)
        assert count(tx, "drop_bad_vnet_header") == 1
        assert (count(tx, "pcap_frames"), count(rx, "pcap_frames")) == (4, 3)
        assert len(inproc.received(sink)) == 3
        got = packets(path)
        assert [f for f, d in got if d == TX] == [*frames, bad]
        assert [f for f, d in got if d == RX] == frames
    for s in (inner, guest, other, sink):
        s.close()
    os.close(fd)
