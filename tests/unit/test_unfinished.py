"""Frames that lost their virtio-net header (csrc/rn_unfinished.c): what they are told from, what becomes of them, and that a
link whose peer sends such frames takes them and gives it super-frames (csrc/rn_link.h)."""
from __future__ import annotations

import random
import struct

import pytest
from frames import GATEWAY_MAC, GUEST_MAC
from frames.inproc import VNET, config, count
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_gso import ACK, NEEDS_CSUM, PSH, TCPV4, TCPV6, finish, packet, plain_sum, pseudo, tcp_head, udp_head, vnet
from test_link_kinds import MTU_FRAME, Vm, frame, read_all, record, records, tcp

from shm._dataplane import ffi, lib

MTU = 1500
TIMESTAMPS = b"\1\1\x08\x0a" + bytes(8)
CFG, OUT = config(), ffi.new("struct rn_parsed *")


def mark(data: bytes, mtu: int = MTU) -> bytes:
    """The header that the frame gets; bytes(12): none."""
    both = bytearray(b"\xee" * 12 + data)
    says = lib.rn_unfinished_mark(ffi.from_buffer(both), len(data), mtu)
    header = bytes(both[:12])
    assert both[12:] == data and says == any(header)
    return header


def made(v: int, proto: int, n: int, seed: int, *, partial: bool, options: bytes = b"") -> bytes:
    payload = random.Random(seed).randbytes(n)
    if proto == 6:
        return packet(v, 6, tcp_head(seed % (1 << 32), ACK | PSH, options), payload, partial=partial)
    return packet(v, 17, udp_head(n), payload, at=6, partial=partial)


@given(v=st.sampled_from((4, 6)), proto=st.sampled_from((6, 17)), n=st.integers(0, 3000) | st.integers(0, 60_000), seed=st.integers(0, 1 << 32),
       options=st.sampled_from((b"", TIMESTAMPS)), mtu=st.sampled_from((576, 1280, 1500, 9000, 65520)))
@settings(deadline=None, max_examples=60)
def test_what_was_left_to_do_is_done(v: int, proto: int, n: int, seed: int, options: bytes, mtu: int) -> None:
    """Marked, and finished as its header says, an unfinished frame is what its sender would have sent without offloads."""
    header = mark(made(v, proto, n, seed, partial=True, options=options), mtu)
    flags, gso, hlen, size, start, offset, _ = struct.unpack("<BBHHHHH", header)
    l4 = 34 if v == 4 else 54
    assert (flags, start, offset) == (NEEDS_CSUM, l4, 16 if proto == 6 else 6)
    done = finish(header, made(v, proto, n, seed, partial=True, options=options))
    if gso == 0:
        assert proto == 17 or l4 - 14 + 20 + len(options) + n <= mtu
        assert done == [made(v, proto, n, seed, partial=False, options=options)]
    else:
        assert gso == (TCPV4 if v == 4 else TCPV6) and hlen == l4 + 20 + len(options) and size == mtu - (hlen - 14)
        payload = random.Random(seed).randbytes(n)
        parts = [payload[i:i + size] for i in range(0, n, size)]
        assert done == [packet(v, 6, tcp_head((seed + i * size) % (1 << 32), ACK | PSH if i == len(parts) - 1 else ACK, options),
                               p, ident=7 + i) for i, p in enumerate(parts)]


@given(v=st.sampled_from((4, 6)), proto=st.sampled_from((6, 17)), n=st.integers(0, 3000), seed=st.integers(0, 1 << 32))
@settings(deadline=None)
def test_a_finished_frame_is_left_alone(v: int, proto: int, n: int, seed: int) -> None:
    whole = made(v, proto, n, seed, partial=False)
    assume(whole != made(v, proto, n, seed, partial=True))  # both sums are one: 1 in 65536
    assert mark(whole) == VNET


def guest(proto: int, n: int, seed: int) -> bytes:
    """An unfinished frame from the guest to the gateway."""
    sent = made(4, proto, n, seed, partial=True)  # from the gateway; a sum does not know which address comes first
    macs = bytes.fromhex((GATEWAY_MAC + GUEST_MAC).replace(":", ""))
    return macs + sent[12:26] + sent[30:34] + sent[26:30] + sent[34:]


def looks_right(data: bytes) -> bool:
    """Is what it is to look like to the receiver one of: finished, unfinished? By the RFCs, octet by octet."""
    proto, l4 = data[23], data[34:14 + int.from_bytes(data[16:18], "big")]
    if proto == 1:
        return plain_sum(l4) == 0xFFFF
    if proto == 17 and len(l4) >= 8:
        l4 = l4[:int.from_bytes(l4[4:6], "big")]
    at = 16 if proto == 6 else 6
    fake = pseudo(data[26:30], data[30:34], proto, len(l4))
    if proto == 17 and l4[6:8] == b"\0\0":  # RFC 768: none was made
        return True
    return plain_sum(fake + l4) == 0xFFFF or plain_sum(fake) == int.from_bytes(l4[at:at + 2], "big")


@given(proto=st.sampled_from((6, 17)), n=st.integers(1, 1000), seed=st.integers(0, 1 << 30), bit=st.integers(0, 8 * 15 - 1))
@settings(deadline=None)
def test_damage_where_the_sum_looks_is_seen(proto: int, n: int, seed: int, bit: int) -> None:
    """One bit of addresses, protocol, length or of the field itself: the parser drops the frame. (Damage elsewhere: the sum is
    still to be made.)"""
    data = bytearray(guest(proto, n, seed))
    assert verdict(bytes(data)) == "to_bridge"
    at = [*range(26, 34), 23, 16, 17, *((50, 51) if proto == 6 else (38, 39, 40, 41))]
    byte = at[bit // 8 % len(at)]
    data[byte] ^= 1 << bit % 8
    if byte < 34:  # the IP header's own checksum would see it: make that right again, as a router in between would
        data[24:26] = bytes(2)
        data[24:26] = struct.pack("!H", 0xFFFF ^ plain_sum(bytes(data[14:34])))
    assume(not looks_right(bytes(data)))  # 2 in 65536
    assert verdict(bytes(data)) != "to_bridge"


def verdict(data: bytes) -> str:
    header = mark(data)
    found = lib.rn_parse_bytes(ffi.new("uint8_t[]", data), len(data), header if any(header) else ffi.NULL, CFG, OUT)
    return ffi.string(lib.rn_verdict_name(found)).decode()


@given(data=st.binary(max_size=200), mtu=st.integers(1, 65520))
def test_any_bytes_get_a_header_that_fits_them(data: bytes, mtu: int) -> None:
    header = mark(data, mtu)
    assert lib.rn_vnet_ok(header, len(data)) == 1


@given(seed=st.integers(0, 1 << 32), changes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=3),
       cut=st.integers(0, 3100), more=st.integers(0, 20), v=st.sampled_from((4, 6)))
@settings(deadline=None)
def test_a_hostile_header_is_never_believed(seed: int, changes: list[tuple[int, int]], cut: int, more: int, v: int) -> None:
    """Lengths that do not fit, offsets that lead out: what is marked can always be finished, within the MTU."""
    data = bytearray(made(v, 6, 3000, seed, partial=True))
    for at, value in changes:
        data[at] = value
    data = data[:len(data) - cut] if cut < 3000 else data
    header = mark(bytes(data) + bytes(more))
    if any(header):
        done = finish(header, bytes(data) + bytes(more))
        assert isinstance(done, list) and (header[1] == 0 or all(len(d) <= MTU_FRAME for d in done))


def test_fragments_are_never_marked() -> None:
    """Their checksum is over what is not in them."""
    data = bytearray(guest(17, 100, 1))
    for frag in (0x2000, 1):
        data[20:22] = struct.pack("!H", frag)
        assert mark(bytes(data)) == VNET


def test_behind_a_vlan_tag_only_the_checksum() -> None:
    for n, says in ((100, NEEDS_CSUM), (3000, NEEDS_CSUM)):
        plain = made(4, 6, n, 5, partial=True)
        header = mark(plain[:12] + b"\x81\0\0\x05" + plain[12:])
        assert struct.unpack("<BBHHHHH", header) == (says, 0, 0, 0, 38, 16, 0)


# --- on a link ---


@pytest.fixture(params=[lib.RN_LINK_DGRAM, lib.RN_LINK_STREAM], ids=["dgram", "stream"])
def kind(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def put(v: Vm, *frames: bytes) -> None:
    if v.options["kind"] == lib.RN_LINK_STREAM:
        v.vm.sendall(b"".join(map(record, frames)))
    else:
        for f in frames:
            v.vm.send(f)


def got(v: Vm) -> list[bytes]:
    if v.options["kind"] == lib.RN_LINK_STREAM:
        return records(read_all(v.vm))
    found = []
    while True:
        try:
            found.append(v.vm.recv(1 << 17))
        except BlockingIOError:
            return found


def test_a_link_gives_the_header_back(kind: int) -> None:
    """64 KiB at an MTU of 1500, unfinished; what is finished, and what is no TCP or UDP, comes as it is."""
    big, small, whole = (made(4, 6, 65_000, 1, partial=True), made(4, 17, 100, 2, partial=True), made(4, 6, 100, 3, partial=False))
    with Vm(kind=kind, unfinished=MTU) as v:
        put(v, big, small, whole, frame(60))
        heads = [mark(big), mark(small), VNET, VNET]
        assert heads[0][1] == TCPV4
        assert v.from_guest(headers=True) == [h + f for h, f in zip(heads, (big, small, whole, frame(60)), strict=True)]


def test_without_it_they_are_too_long(kind: int) -> None:
    with Vm(kind=kind) as v:
        put(v, made(4, 6, 65_000, 1, partial=True))
        assert v.from_guest() == [] and count(v.tx, "drop_oversize") == 1


def test_too_long_and_nothing_to_cut(kind: int) -> None:
    """No longer than the link's limit unless it is TCP to be cut."""
    with Vm(kind=kind, unfinished=MTU) as v:
        put(v, made(4, 17, 3000, 1, partial=True), made(4, 6, 3000, 2, partial=False), frame(60_000), frame(60))
        assert v.from_guest() == [frame(60)] and count(v.tx, "drop_oversize") == 3


def test_nothing_is_longer_than_a_buffer(kind: int) -> None:
    with Vm(kind=kind, unfinished=MTU) as v:
        put(v, frame(65_536 + 14), frame(69_632 if kind == lib.RN_LINK_STREAM else 70_000), frame(60))
        assert v.from_guest() == [frame(60)] and count(v.tx, "drop_oversize") == 2


@pytest.mark.parametrize("whole", [True, False])
def test_super_frames_to_the_guest(kind: int, whole: bool) -> None:
    """As they are, with a checksum, or cut; never unfinished: libkrun's guest is told of nothing left to do."""
    data = random.Random(4).randbytes(60_000)
    big = tcp(77, data)
    with Vm(kind=kind, whole=whole) as v:
        v.to_guest(big, header=vnet(gso=TCPV4, size=1448, start=34, offset=16))
        frames = got(v)
        assert len(frames) == (1 if whole else 42)
        for f in frames:
            l4 = f[34:]
            assert plain_sum(pseudo(f[26:30], f[30:34], 6, len(l4)) + l4) == 0xFFFF and plain_sum(f[14:34]) == 0xFFFF
        assert b"".join(f[34 + (f[46] >> 4) * 4:] for f in frames) == data
        v.to_guest(packet(4, 17, udp_head(9), b"123456789", at=6, partial=True), header=vnet(offset=6))
        assert got(v) == [packet(4, 17, udp_head(9), b"123456789", at=6)]


def test_a_full_link_keeps_the_super_frame(kind: int) -> None:
    """Those that were taken arrive whole and in order when there is room again, however small the buffer."""
    payloads = [random.Random(i).randbytes(50_000) for i in range(12)]
    with Vm(kind=kind, whole=True, buffers=1 << 17) as v:
        for i, p in enumerate(payloads):
            v.to_guest(tcp(i, p), header=vnet(gso=TCPV4, size=1448))
        found: list[bytes] = []
        raw = b""
        while len(found) < len(payloads):
            if kind == lib.RN_LINK_STREAM:
                raw += read_all(v.vm)
                while len(raw) >= 4 and len(raw) >= (n := 4 + int.from_bytes(raw[:4], "big")):
                    found, raw = [*found, raw[4:n]], raw[n:]
            else:
                found += got(v)
            assert lib.rn_stage_run(v.rx) == lib.RN_RUN_CONTROL
        assert [f[34 + (f[46] >> 4) * 4:] for f in found] == payloads
