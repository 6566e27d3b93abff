"""What a link without offloads makes of a frame that has them: checksums, segments (csrc/rn_gso.c), against a reference
written here that works octet by octet."""
from __future__ import annotations

import os
import random
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm._dataplane import ffi, lib

FIN, PSH, ACK, CWR = 1, 8, 16, 0x80
NEEDS_CSUM, TCPV4, TCPV6, USO, UFO, ECN = 1, 1, 4, 5, 3, 0x80
A4, B4 = socket.inet_aton("10.0.2.1"), socket.inet_aton("10.0.2.2")
A6, B6 = socket.inet_pton(socket.AF_INET6, "fd00::1"), socket.inet_pton(socket.AF_INET6, "fd00::2")


def plain_sum(data: bytes) -> int:
    """RFC 1071 as it is written."""
    data += b"\0" * (len(data) % 2)
    total = sum(int.from_bytes(data[i:i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def vnet(flags: int = NEEDS_CSUM, gso: int = 0, size: int = 0, start: int = 34, offset: int = 16, hdr_len: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, size, start, offset, 0)


def pseudo(src: bytes, dst: bytes, proto: int, n: int) -> bytes:
    return src + dst + (struct.pack("!BBH", 0, proto, n) if len(src) == 4 else struct.pack("!IHBB", n, 0, 0, proto))


def ip_header(v: int, proto: int, n: int, ident: int = 7, options: bytes = b"") -> bytes:
    if v == 6:
        return struct.pack("!IHBB", 6 << 28, n, proto, 64) + A6 + B6
    hlen = 20 + len(options)
    h = struct.pack("!BBHHHBBH", 0x40 | hlen // 4, 0, hlen + n, ident, 0x4000, 64, proto, 0) + A4 + B4 + options
    return h[:10] + struct.pack("!H", 0xFFFF ^ plain_sum(h)) + h[12:]


def packet(v: int, proto: int, head: bytes, payload: bytes, *, ident: int = 7, at: int = 16, partial: bool = False,
           options: bytes = b"") -> bytes:
    """An Ethernet frame whose transport checksum is complete, or the pseudo-header's sum."""
    l4 = head + payload
    ip = ip_header(v, proto, len(l4), ident, options)
    fake = pseudo(A4 if v == 4 else A6, B4 if v == 4 else B6, proto, len(l4))
    total = plain_sum(fake) if partial else 0xFFFF ^ plain_sum(fake + l4) or 0xFFFF
    l4 = l4[:at] + struct.pack("!H", total) + l4[at + 2:]
    return bytes(12) + (b"\x08\x00" if v == 4 else b"\x86\xdd") + ip + l4


def tcp_head(seq: int, flags: int, options: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", 80, 40000, seq, 99, (20 + len(options)) // 4 << 4, flags, 500, 0, 0) + options


def udp_head(n: int) -> bytes:
    return struct.pack("!HHHH", 53, 40000, 8 + n, 0)


def finish(header: bytes, frame: bytes, cap: int = 1 << 20) -> list[bytes] | int:
    """What rn_gso makes of it, or its error. The frame is in memory of exactly its size: ASan would see a step outside."""
    out = ffi.new("uint8_t[]", cap)
    n = lib.rn_gso_all(ffi.new("uint8_t[]", header + frame), len(frame), out, cap)
    if n < 0:
        return int(n)
    data, found = bytes(ffi.buffer(out, n)), []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append(data[4:4 + size])
        data = data[4 + size:]
    return found


def test_a_frame_that_asks_for_nothing_comes_out_as_it_is() -> None:
    frame = os.urandom(77)
    assert finish(bytes(12), frame) == [frame]
    assert finish(vnet(flags=2), frame) == [frame]  # DATA_VALID


@given(v=st.sampled_from((4, 6)), n=st.integers(0, 1500), seed=st.integers(0, (1 << 32) - 1), proto=st.sampled_from((6, 17)))
def test_checksum_is_completed(v: int, n: int, seed: int, proto: int) -> None:
    payload = random.Random(seed).randbytes(n)
    head, at = (tcp_head(seed, ACK | PSH), 16) if proto == 6 else (udp_head(n), 6)
    frame = packet(v, proto, head, payload, at=at, partial=True)
    assert finish(vnet(start=34 if v == 4 else 54, offset=at), frame) == [packet(v, proto, head, payload, at=at)]


def test_a_sum_of_zero_is_written_as_ones() -> None:
    """RFC 768: 0 would say that there is no checksum."""
    base = plain_sum(pseudo(A4, B4, 17, 10) + udp_head(2))
    payload = struct.pack("!H", 0xFFFF ^ base)
    frame = packet(4, 17, udp_head(2), payload, at=6, partial=True)
    (done,) = finish(vnet(offset=6), frame)  # type: ignore[misc]
    assert done[40:42] == b"\xff\xff"


@given(v=st.sampled_from((4, 6)), n=st.integers(1, 9000), mss=st.integers(40, 1460), seed=st.integers(0, (1 << 32) - 1),
       options=st.sampled_from((b"", b"\1\1\x08\x0a" + bytes(8))), flags=st.sampled_from((ACK, ACK | PSH, ACK | FIN | PSH | CWR)))
def test_tcp_segments(v: int, n: int, mss: int, seed: int, options: bytes, flags: int) -> None:
    """The reference cuts the payload and builds each packet from nothing."""
    payload = random.Random(seed).randbytes(n)
    seq = seed % (1 << 32)
    frame = packet(v, 6, tcp_head(seq, flags, options), payload, partial=True)
    expected = []
    for i, at in enumerate(range(0, n, mss)):
        part = payload[at:at + mss]
        mine = flags & ~(0 if at + mss >= n else FIN | PSH) & ~(CWR if i else 0)
        expected.append(packet(v, 6, tcp_head((seq + at) % (1 << 32), mine, options), part, ident=7 + i))
    header = vnet(gso=(TCPV4 if v == 4 else TCPV6) | (ECN if flags & CWR else 0), size=mss, start=34 if v == 4 else 54)
    assert finish(header, frame) == expected


@given(v=st.sampled_from((4, 6)), n=st.integers(1, 9000), size=st.integers(40, 1460), seed=st.integers(0, (1 << 32) - 1))
def test_udp_segments(v: int, n: int, size: int, seed: int) -> None:
    payload = random.Random(seed).randbytes(n)
    frame = packet(v, 17, udp_head(n), payload, at=6, partial=True)
    parts = [payload[at:at + size] for at in range(0, n, size)]
    expected = [packet(v, 17, udp_head(len(p)), p, ident=7 + i, at=6) for i, p in enumerate(parts)]
    assert finish(vnet(gso=USO, size=size, start=34 if v == 4 else 54, offset=6), frame) == expected


def test_the_largest_frame() -> None:
    """64 KiB in the smallest segments that are allowed, and one byte less."""
    payload = os.urandom(65535 - 40)
    frame = packet(4, 6, tcp_head(1, ACK), payload, partial=True)
    segments = finish(vnet(gso=TCPV4, size=32), frame)
    assert isinstance(segments, list) and b"".join(s[54:] for s in segments) == payload and len(segments) == 2047
    assert finish(vnet(gso=TCPV4, size=31), frame) == -90  # EMSGSIZE
    assert finish(vnet(gso=TCPV4, size=1460), frame, cap=1000) == -105  # ENOBUFS: of the test's own function


def test_ip_options_are_repeated() -> None:
    options = b"\x94\x04\0\0"  # router alert
    frame = packet(4, 6, tcp_head(5, ACK), b"x" * 100, partial=True, options=options)
    assert finish(vnet(gso=TCPV4, size=60, start=38), frame) == [
        packet(4, 6, tcp_head(5, ACK), b"x" * 60, options=options),
        packet(4, 6, tcp_head(65, ACK), b"x" * 40, options=options, ident=8)]


GOOD = packet(4, 6, tcp_head(1, ACK), b"x" * 100, partial=True)


@pytest.mark.parametrize(("header", "frame"), [
    (vnet(flags=0, gso=TCPV4, size=50), GOOD),
    (vnet(start=13), GOOD),
    (vnet(offset=15), GOOD),
    (vnet(start=150), GOOD),
    (vnet(start=65535, offset=65534), GOOD),
    (vnet(gso=TCPV4, size=0), GOOD),
    (vnet(gso=TCPV4, size=50, start=38), GOOD),
    (vnet(gso=TCPV4, size=50, offset=6), GOOD),
    (vnet(gso=TCPV6, size=50), GOOD),
    (vnet(gso=USO, size=50, offset=6), GOOD),
    (vnet(gso=UFO, size=50, offset=6), GOOD),
    (vnet(gso=TCPV4, size=50), GOOD[:14] + b"\x44" + GOOD[15:]),
    (vnet(gso=TCPV4, size=50), GOOD[:20] + b"\x20" + GOOD[21:]),
    (vnet(gso=TCPV4, size=50), GOOD[:46] + b"\x40" + GOOD[47:]),
    (vnet(gso=TCPV4, size=50), GOOD[:46] + b"\xf0" + GOOD[47:60]),
    (vnet(gso=TCPV4, size=50), GOOD[:53]),
    (vnet(gso=TCPV4, size=50), GOOD[:30]),
    (vnet(gso=USO, size=50, start=14, offset=6), bytes(100)),
], ids=["gso-without-csum", "in-the-ethernet-header", "odd-offset", "behind-the-frame", "no-wrap", "no-size", "wrong-start",
        "wrong-offset", "v4-as-v6", "tcp-as-uso", "ufo", "ip-header-cut", "fragment", "tcp-header-short", "tcp-header-cut",
        "tcp-cut", "ip-cut", "no-ip"])
def test_what_does_not_fit_together_is_refused(header: bytes, frame: bytes) -> None:
    assert finish(header, frame) == -22


@given(header=st.binary(min_size=12, max_size=12), at=st.integers(0, 53), byte=st.integers(0, 255), n=st.integers(0, 154))
def test_whatever_the_header_says_nothing_is_read_or_written_outside(header: bytes, at: int, byte: int, n: int) -> None:
    """tools/sanitize runs this with ASan; here: an error, or what comes out is not longer than what went in allows."""
    frame = (GOOD[:at] + bytes([byte]) + GOOD[at + 1:])[:n]
    found = finish(header, frame)
    assert isinstance(found, int) or (len(found) <= 2048 and all(len(f) <= len(frame) for f in found))
