"""Links to virtual machines, and links that are changed while the stages run (csrc/rn_link_stream.c,
rn_link_segments.c): framing, partial reads and writes, what is held when a link is full, what a bad peer does."""
from __future__ import annotations

import errno
import os
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from frames import inproc
from frames.inproc import FRAME_MAX, VNET, count, counts, link, pair, received, run
from test_gso import ACK, PSH, finish, packet, plain_sum, pseudo, tcp_head, vnet

from shm._dataplane import ffi, lib

WORD_MAX = lib.RN_LINK_WORD_MAX
MTU_FRAME = 1514


def frame(n: int, tag: int = 0) -> bytes:
    return (bytes([2, 0, 0, 0, 0, tag & 255]) * (n // 6 + 1))[:n]


def record(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data


def records(data: bytes) -> list[bytes]:
    """Frames of whole records; fails on anything else."""
    found = []
    while data:
        n = int.from_bytes(data[:4], "big")
        assert 14 <= n <= len(data) - 4, f"a record of {n} bytes in {len(data)}"
        found.append(data[4:4 + n])
        data = data[4 + n:]
    return found


def stream_pair(buffers: int = 1 << 20) -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for s in (a, b):
        s.setblocking(False)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
    return a, b


def read_all(sock: socket.socket) -> bytes:
    got = b""
    while True:
        try:
            part = sock.recv(1 << 20)
        except BlockingIOError:
            return got
        if not part:
            return got
        got += part


class Vm(inproc.Plane):
    """guest_tx reads a stream or datagram link, guest_rx writes another frame source's frames to one: `vm` is the
    guest's end of what is under test, `feed` and `seen` are plain datagram ends with headers at the other side."""

    def __init__(self, *, kind: int = lib.RN_LINK_STREAM, vnet: bool = False, frame_max: int = MTU_FRAME, slots: int = 256,
                 buffers: int = 1 << 20, merge: bool = False, unfinished: int = 0, whole: bool = False) -> None:
        super().__init__({0: (512, 16), 2: (512, 32)})
        make = stream_pair if kind == lib.RN_LINK_STREAM else pair
        self.ours, self.vm = make(buffers)
        inner, self.feed = pair()
        outer, self.seen = pair()
        self.keep += [inner, outer, self.ours, self.vm, self.feed, self.seen]
        up, down = inproc.Ring(slots), inproc.Ring(slots)
        self.up, self.down = up, down
        self.options = {"kind": kind, "vnet": vnet, "frame_max": frame_max, "merge": merge, "unfinished": unfinished,
                        "whole": whole}
        self.tx = self.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (up, 1)})
        self.rx = self.stage(3, inputs={2: down})
        assert lib.stage_guest_tx_init(self.tx, link(self.ours, **self.options), -1) == 0
        self.reader = os.dup(self.ours.fileno())
        assert lib.stage_guest_rx_init(self.rx, link(self.reader, **self.options), -1) == 0
        self.source = self.stage(2, outputs={lib.RN_ROLE_CLASSIFY: (down, 3)})
        assert lib.stage_guest_tx_init(self.source, link(inner), -1) == 0
        self.sink = self.stage(1, inputs={0: up})
        assert lib.stage_guest_rx_init(self.sink, link(outer), -1) == 0

    def from_guest(self, *, headers: bool = False) -> list[bytes]:
        """Frames that came through guest_tx since the last call; headers: with their virtio-net headers."""
        got = []
        while True:
            run(self.tx)
            run(self.sink)
            more = received(self.seen)
            if not more:
                return got
            got += [d if headers else d[12:] for d in more]

    def to_guest(self, *frames: bytes, header: bytes = VNET) -> None:
        for f in frames:
            self.feed.send(header + f)
            run(self.source)
            run(self.rx)

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for s in self.keep:
            if isinstance(s, socket.socket):
                s.close()
        os.close(self.reader)


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Vm() as v:
        yield v


# --- stream: reading ---


def test_which_links_write_a_frame_or_nothing() -> None:
    for kind, atomic in ((lib.RN_LINK_TAP, 1), (lib.RN_LINK_DGRAM, 1), (lib.RN_LINK_STREAM, 0)):
        assert lib.rn_link_atomic(link(0, kind=kind)) == atomic


def test_many_frames_in_one_write(vm: Vm) -> None:
    sent = [frame(60 + i, i) for i in range(100)]
    vm.vm.sendall(b"".join(map(record, sent)))
    assert vm.from_guest() == sent


@pytest.mark.fault(12)
@pytest.mark.parametrize("seed", range(6))
def test_frames_in_pieces_of_any_size(vm: Vm, seed: int) -> None:
    """Cut anywhere: in the length, between two frames, one byte at a time."""
    rng = random.Random(seed)
    sent = [frame(rng.choice((14, 60, 590, 1514)), i) for i in range(60)]
    wire, got = b"".join(map(record, sent)), []
    while wire:
        n = rng.choice((1, 2, 3, 5, 100, 2000, 9000))
        vm.vm.sendall(wire[:n])
        wire = wire[n:]
        got += vm.from_guest()
    assert got == sent


def test_large_frames_across_the_read_buffer() -> None:
    with Vm(frame_max=65534) as v:
        rng, sent = random.Random(1), []
        for i in range(40):
            sent.append(frame(rng.choice((14, 9000, 65534)), i))
            v.vm.sendall(record(sent[-1])[:-1])
            v.from_guest()  # all but the last byte
            v.vm.sendall(sent[-1][-1:])
            assert v.from_guest() == [sent[-1]]


def test_headers_on_a_stream() -> None:
    """vnet_hdr: the length counts the header."""
    with Vm(vnet=True, frame_max=FRAME_MAX) as v:
        big = packet(4, 6, tcp_head(1, ACK), b"x" * 30000, partial=True)
        v.vm.sendall(record(VNET + frame(60)) + record(vnet(gso=1, size=1460) + big))
        assert v.from_guest() == [frame(60), big]
        v.to_guest(big, header=vnet(gso=1, size=1460))
        assert read_all(v.vm) == record(vnet(gso=1, size=1460) + big)


@pytest.mark.parametrize("word", [0, WORD_MAX + 1, 1 << 24, 0xFFFFFFFF])
def test_a_length_no_frame_has_ends_the_connection(vm: Vm, word: int) -> None:
    """Where the next frame begins nobody knows: what was whole is served, the rest is not guessed at."""
    vm.vm.sendall(record(frame(60)) + struct.pack("!I", word) + record(frame(70)))
    assert run(vm.tx) == lib.RN_RUN_NOTICE
    assert lib.stage_guest_tx_broken(vm.tx) == -errno.EPROTO and lib.stage_guest_tx_broken(vm.tx) == 0
    assert vm.from_guest() == [frame(60)]
    assert count(vm.tx, "link_desync") == 1
    vm.vm.sendall(record(frame(80)))
    assert vm.from_guest() == [] and count(vm.tx, "link_desync") == 1


@pytest.mark.parametrize(("n", "counter"), [(1, "drop_runt"), (13, "drop_runt"), (MTU_FRAME + 1, "drop_oversize"),
                                            (WORD_MAX, "drop_oversize")])
def test_a_frame_of_the_wrong_size_is_skipped(vm: Vm, n: int, counter: str) -> None:
    vm.vm.sendall(record(bytes(n)) + record(frame(60)))
    assert vm.from_guest() == [frame(60)]
    assert [count(vm.tx, c) for c in (counter, "frames_in", "frames_out", "link_desync")] == [1, 2, 1, 0]


def test_a_frame_shorter_than_its_header_is_skipped() -> None:
    with Vm(vnet=True) as v:
        v.vm.sendall(record(VNET[:11]) + record(VNET) + record(VNET + frame(60)))
        assert v.from_guest() == [frame(60)]
        assert count(v.tx, "drop_runt") == 2


@pytest.mark.parametrize("rest", [b"", b"\0", b"\0\0\0\x40", record(frame(60))[:-1]], ids=["between", "length", "head", "frame"])
def test_the_end_of_a_stream(vm: Vm, rest: bytes) -> None:
    vm.vm.sendall(record(frame(60)) + rest)
    vm.vm.close()
    assert vm.from_guest() == [frame(60)]
    assert count(vm.tx, "drop_link_read") == (1 if rest else 0)
    assert run(vm.tx) == lib.RN_RUN_CONTROL  # and it does not spin


def test_a_flood_is_read_as_far_as_there_is_room() -> None:
    """The peer's writes stop: nothing grows here."""
    with Vm(slots=8, buffers=1 << 16) as v:
        sent = 0
        for _ in range(1000):
            try:
                sent += v.vm.send(record(frame(1500)) * 20)
            except BlockingIOError:
                break
            run(v.tx)
        else:
            raise AssertionError("it reads for ever")
        assert v.up.fill == 8 and sent < (1 << 20)
        whole = sent // 1504
        got = len(v.from_guest())
        assert got == whole


# --- stream: writing ---


def test_small_frames_go_together(vm: Vm) -> None:
    sent = [frame(60 + i, i) for i in range(32)]
    for f in sent:
        vm.feed.send(VNET + f)
    run(vm.source)
    run(vm.rx)
    assert vm.vm.recv(1 << 20) == b"".join(map(record, sent))
    assert counts(vm.rx) == {"frames_in": 32, "bytes_in": sum(map(len, sent)), "frames_out": 32,
                             "bytes_out": sum(map(len, sent))}


def test_a_peer_that_stops_reading_holds_frames_back_and_loses_none() -> None:
    with Vm(slots=64, buffers=1) as v:
        sent, i = [], 0
        while v.down.fill < 60:  # neither the link nor what it holds takes more
            f = frame(random.Random(i).choice((60, 1500)), i)
            v.to_guest(f)
            sent.append(f)
            i += 1
            assert i < 2000
        assert count(v.rx, "link_full") > 0
        held = sum(map(len, sent)) - 60 * 1500
        assert held < 300_000  # the link's own buffer is bounded
        got = b""
        for _ in range(10_000):
            part = read_all(v.vm)
            got += part
            if not part and not v.down.fill and run(v.rx) == lib.RN_RUN_CONTROL and not (part := read_all(v.vm)):
                break
            got += part if part and got[-len(part):] != part else b""
            run(v.rx)
        assert records(got) == sent


def test_drain_waits_for_what_is_held() -> None:
    with Vm(buffers=1) as v:
        v.to_guest(*[frame(1500, i) for i in range(20)])
        lib.rn_stage_drain(v.rx)
        assert run(v.rx) == lib.RN_RUN_CONTROL
        got = b""
        while run(v.rx) != lib.RN_RUN_DRAINED:
            part = read_all(v.vm)
            assert part
            got += part
        assert records(got + read_all(v.vm)) == [frame(1500, i) for i in range(20)]


def test_a_closed_peer_of_a_stream(vm: Vm) -> None:
    vm.vm.close()
    vm.feed.send(VNET + frame(60))
    run(vm.source)
    assert run(vm.rx) == lib.RN_RUN_NOTICE
    assert lib.stage_guest_rx_broken(vm.rx) == -errno.EPIPE
    assert count(vm.rx, "drop_link_down") == 1 and lib.rn_stage_run(vm.rx) == lib.RN_RUN_CONTROL


# --- offloads towards a peer without them ---


def check_tcp(segments: list[bytes], payload: bytes, mss: int) -> None:
    """What a receiver would check, and that it gets all bytes."""
    got = b""
    for s in segments:
        assert len(s) <= 54 + mss and plain_sum(s[14:34]) == 0xFFFF
        assert plain_sum(pseudo(s[26:30], s[30:34], 6, len(s) - 34) + s[34:]) == 0xFFFF
        assert int.from_bytes(s[38:42], "big") == 1 + len(got)
        got += s[54:]
    assert got == payload


@pytest.mark.parametrize("kind", [lib.RN_LINK_STREAM, lib.RN_LINK_DGRAM], ids=["stream", "dgram"])
@pytest.mark.parametrize("n", [0, 1, 1459, 1460, 1461, 64 * 1460, 64 * 1460 + 1, 65480 - 40])
def test_a_super_frame_becomes_segments(kind: int, n: int) -> None:
    payload = os.urandom(n)
    with Vm(kind=kind) as v:
        if n > 1460:
            v.to_guest(packet(4, 6, tcp_head(1, ACK | PSH), payload[:65000], partial=True), header=vnet(gso=1, size=1460))
        else:
            v.to_guest(packet(4, 6, tcp_head(1, ACK | PSH), payload, partial=True), header=vnet())
        got = received(v.vm) if kind == lib.RN_LINK_DGRAM else records(read_all(v.vm))
        check_tcp(got, payload[:65000], 1460)
        assert count(v.rx, "frames_out") == 1


@pytest.mark.fault(12)
@pytest.mark.parametrize("kind", [lib.RN_LINK_STREAM, lib.RN_LINK_DGRAM], ids=["stream", "dgram"])
def test_a_super_frame_on_a_link_that_is_full_in_its_middle(kind: int) -> None:
    """It was begun, so that it is finished: no segment twice, none missing, and a plain frame behind it stays behind."""
    payload = os.urandom(60000)
    big, small = packet(4, 6, tcp_head(1, ACK), payload, partial=True), frame(100, 9)
    with Vm(kind=kind, buffers=1) as v:
        v.feed.send(vnet(gso=1, size=1460) + big)
        v.feed.send(VNET + small)
        run(v.source)
        run(v.rx)
        assert count(v.rx, "link_full") > 0
        got: list[bytes] = []
        data = b""
        for _ in range(500):
            more = received(v.vm) if kind == lib.RN_LINK_DGRAM else read_all(v.vm)
            if not more:
                break
            if isinstance(more, list):
                got += more
            else:
                data += more
            run(v.rx)
        got += records(data)
        assert got[-1] == small
        check_tcp(got[:-1], payload, 1460)


@pytest.mark.parametrize("kind", [lib.RN_LINK_STREAM, lib.RN_LINK_DGRAM], ids=["stream", "dgram"])
def test_segments_over_the_mtu_are_refused(kind: int) -> None:
    with Vm(kind=kind) as v:
        v.to_guest(packet(4, 6, tcp_head(1, ACK), bytes(4000), partial=True), header=vnet(gso=1, size=1461))
        assert count(v.rx, "drop_link_write") == 1 and count(v.rx, "frames_out") == 0


# --- segments that come together ---


def tcp(seq: int, payload: bytes, flags: int = ACK, *, options: bytes = b"", ident: int = 7, port: int = 80) -> bytes:
    head = struct.pack("!H", port) + tcp_head(seq & 0xFFFFFFFF, flags, options)[2:]
    return packet(4, 6, head, payload, ident=ident)


def recut(received_: list[bytes]) -> list[bytes]:
    """Frames with headers, cut again as the product would for a peer without offloads. IP identification is left out."""
    found = []
    for d in received_:
        parts = finish(d[:12], d[12:])
        assert isinstance(parts, list)
        found += [p[:18] + p[20:24] + p[26:] for p in parts]
    return found


def plain(frames: list[bytes]) -> list[bytes]:
    """The same of frames as they were sent: without IP identification and the header's checksum over it."""
    return [f[:18] + f[20:24] + f[26:] for f in frames]


BOTH = pytest.mark.parametrize("kind", [lib.RN_LINK_STREAM, lib.RN_LINK_DGRAM], ids=["stream", "dgram"])


def put(v: Vm, frames: list[bytes]) -> None:
    """As the guest: in one write, or a datagram each."""
    if v.options["kind"] == lib.RN_LINK_STREAM:
        v.vm.sendall(b"".join(map(record, frames)))
    else:
        for f in frames:
            v.vm.send(f)


@BOTH
def test_segments_of_a_connection_become_one_frame(kind: int) -> None:
    rng = random.Random(3)
    payload = rng.randbytes(100_000)
    sent = [tcp(0xFFFF0000 + at, payload[at:at + 1448], ident=at & 0xFFFF, options=b"\1\1\x08\x0a" + b"time" + b"echo")
            for at in range(0, len(payload), 1448)]
    with Vm(merge=True, kind=kind) as v:
        put(v, sent)
        got = v.from_guest(headers=True)
        assert len(got) == (2 if kind == lib.RN_LINK_STREAM else 3) and all(len(d) <= 12 + FRAME_MAX for d in got)  # 64 KiB each at most
        assert recut(got) == plain(sent)
        assert count(v.tx, "frames_in") == count(v.tx, "frames_out") == len(got)


def test_no_segments_are_merged_unless_asked(vm: Vm) -> None:
    sent = [tcp(1 + i * 100, bytes(100)) for i in range(5)]
    vm.vm.sendall(b"".join(map(record, sent)))
    assert vm.from_guest() == sent


FIRST = tcp(1, b"a" * 100)


@pytest.mark.parametrize("second", [
    tcp(101, b"b" * 100, port=81), tcp(102, b"b" * 100), tcp(1, b"a" * 100), tcp(101, b"b" * 101), tcp(101, b""),
    tcp(101, b"b" * 100, ACK | 1), tcp(101, b"b" * 100, ACK | 2), tcp(101, b"b" * 100, ACK | 4), tcp(101, b"b" * 100, ACK | 32),
    tcp(101, b"b" * 100, ACK | 64), tcp(101, b"b" * 100, 0), tcp(101, b"b" * 100, options=b"\1\1\1\1"),
    tcp(101, b"b" * 100)[:42] + b"\0\0\0\x64" + tcp(101, b"b" * 100)[46:],
    tcp(101, b"b" * 100)[:48] + b"\1\0" + tcp(101, b"b" * 100)[50:],
    tcp(101, b"b" * 100)[:50] + b"\0\0" + tcp(101, b"b" * 100)[52:],
    tcp(101, b"b" * 100)[:-1] + b"c",
    tcp(101, b"b" * 100)[:24] + b"\0\0" + tcp(101, b"b" * 100)[26:],
    tcp(101, b"b" * 100)[:22] + b"\1" + tcp(101, b"b" * 100)[23:],
    tcp(101, b"b" * 100)[:15] + b"\3" + tcp(101, b"b" * 100)[16:],
    tcp(101, b"b" * 100)[:20] + b"\x20\0" + tcp(101, b"b" * 100)[22:],
    tcp(101, b"b" * 100) + bytes(4),
    b"\1" + tcp(101, b"b" * 100)[1:],
    frame(60),
], ids=["port", "gap", "again", "longer", "empty", "fin", "syn", "rst", "urg", "ece", "no-ack", "options", "ack-number", "window",
        "checksum-field", "damaged", "ip-checksum", "ttl", "ecn", "fragment", "padded", "mac", "other"])
@BOTH
def test_what_is_not_the_next_segment_stays_by_itself(kind: int, second: bytes) -> None:
    with Vm(merge=True, kind=kind) as v:
        for pair_ in ([FIRST, second], [second, FIRST]):
            put(v, pair_)
            assert v.from_guest() == pair_


@BOTH
def test_a_short_segment_is_the_last(kind: int) -> None:
    sent = [tcp(1, b"a" * 100), tcp(101, b"b" * 40), tcp(141, b"c" * 100), tcp(241, b"d" * 100)]
    with Vm(merge=True, kind=kind) as v:
        put(v, sent)
        got = v.from_guest(headers=True)
        assert [len(d) - 12 for d in got] == [54 + 140, 54 + 200] and recut(got) == plain(sent)


@BOTH
def test_wrong_sizes_among_segments(kind: int) -> None:
    """Counted as ever; what stands around them is not merged over them."""
    sent = [tcp(1, b"a" * 100), tcp(101, b"b" * 100), frame(MTU_FRAME + 1), tcp(201, b"c" * 100), frame(13), tcp(301, b"d" * 100)]
    with Vm(merge=True, kind=kind) as v:
        put(v, sent)
        assert recut(v.from_guest(headers=True)) == plain([s for s in sent if 14 <= len(s) <= MTU_FRAME])
        assert (count(v.tx, "drop_oversize"), count(v.tx, "drop_runt")) == (1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_comes_out_in_order(seed: int) -> None:
    """Several connections, damage, other frames, cut anywhere: cut again, it is what was sent."""
    rng = random.Random(seed)
    seqs, sent = [rng.randrange(1 << 32) for _ in range(3)], []
    for _ in range(300):
        i = 0 if rng.random() < 0.8 else rng.randrange(3)
        n = rng.choice((1448, 1448, 1448, 1448, 1, 700))
        made = tcp(seqs[i], rng.randbytes(n), port=80 + i)
        seqs[i] += n if rng.random() < 0.97 else 5
        if rng.random() < 0.03:
            made = frame(rng.randrange(60, 1514))
        sent.append(made)
    wire, got = b"".join(map(record, sent)), []
    with Vm(merge=True) as v:
        while wire:
            n = rng.choice((1, 100, 5000, 60_000))
            v.vm.sendall(wire[:n])
            wire = wire[n:]
            got += v.from_guest(headers=True)
    assert len(got) < len(sent) and recut(got) == plain(sent)


# --- another link ---


@pytest.mark.parametrize("kind", [lib.RN_LINK_STREAM, lib.RN_LINK_DGRAM], ids=["stream", "dgram"])
def test_another_link_while_the_stages_run(kind: int) -> None:
    with Vm(kind=kind) as v:
        put = record if kind == lib.RN_LINK_STREAM else bytes
        v.vm.send(put(frame(60, 1)))
        assert v.from_guest() == [frame(60, 1)]
        if kind == lib.RN_LINK_STREAM:
            v.vm.send(record(frame(60, 2))[:30])  # cut by the end of the machine
            run(v.tx)
        gone = link(-1, **v.options)
        assert lib.stage_guest_tx_link(v.tx, gone) == 0 and lib.stage_guest_rx_link(v.rx, gone) == 0
        v.vm.send(put(frame(60, 3)))
        assert v.from_guest() == []
        v.to_guest(frame(60, 4))
        assert count(v.rx, "drop_link_down") == 1
        ours, theirs = (stream_pair if kind == lib.RN_LINK_STREAM else pair)()
        new = link(ours, **v.options)
        other = os.dup(ours.fileno())
        assert lib.stage_guest_tx_link(v.tx, new) == 0
        assert lib.stage_guest_rx_link(v.rx, link(other, **v.options)) == 0
        theirs.send(put(frame(60, 5)))
        assert v.from_guest() == [frame(60, 5)]
        v.to_guest(frame(60, 6))
        assert theirs.recv(1000) == put(frame(60, 6))
        assert lib.stage_guest_tx_link(v.tx, link(1 << 20, **v.options)) < 0  # no such descriptor: the old one stays
        theirs.send(put(frame(60, 7)))
        assert v.from_guest() == [frame(60, 7)]
        ours.close()
        theirs.close()
        os.close(other)


def test_a_broken_link_is_forgotten_with_the_link(vm: Vm) -> None:
    vm.vm.sendall(bytes(4))
    run(vm.tx)
    assert lib.stage_guest_tx_link(vm.tx, link(-1, **vm.options)) == 0
    assert lib.stage_guest_tx_broken(vm.tx) == 0


def test_it_costs_nothing_on_a_tap() -> None:
    """No buffers, so that nothing is looked at but one null pointer."""
    made = link(0, kind=lib.RN_LINK_TAP)
    assert lib.rn_link_open(made) == 0 and made.state == ffi.NULL and lib.rn_link_held(made) == 0
