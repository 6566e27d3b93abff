"""The Internet checksum against the byte-by-byte version, the RFC's example and scapy."""
from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib


def fast(data: bytes, *, shift: int = 0, start: int = 0) -> int:
    """Sum of `data` placed `shift` bytes behind an aligned address."""
    room = ffi.new("uint8_t[]", bytes(shift) + data + b"\xa5" * 8)  # what lies behind must not count
    return lib.rn_csum_fold(lib.rn_csum_add(start, room + shift, len(data)))


def plain(data: bytes) -> int:
    return lib.rn_csum_plain(ffi.new("uint8_t[]", data + b"\xa5"), len(data))


def wire(value: int) -> int:
    """From memory order, as the functions give it, to the number on the wire."""
    return int.from_bytes(struct.pack("=H", value), "big")


def test_the_example_of_rfc_1071_3():
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert wire(fast(data)) == wire(plain(data)) == 0xDDF2


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(0, 15))
def test_equals_the_plain_sum_at_any_length_and_alignment(data, shift):
    assert fast(data, shift=shift) == plain(data)


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1499, 1500, 65534, 65535])
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x80, 0xFF])
def test_carries_are_not_lost(length, byte):
    data = bytes([byte]) * length
    assert fast(data) == plain(data)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 150))
def test_a_sum_goes_on_after_an_even_length(data, half):
    cut = min(2 * half, len(data) & ~1)
    first = ffi.new("uint8_t[]", data[:cut] or b"\0")
    assert fast(data[cut:], start=lib.rn_csum_add(0, first, cut)) == plain(data)


def test_the_largest_running_sum_keeps_its_carry():
    """Adding to 2^64 - 1 is adding to zero, in ones' complement."""
    assert fast(b"\x01\x00" * 100, start=2**64 - 1) == fast(b"\x01\x00" * 100)
    assert lib.rn_csum_fold(2**64 - 1) == 0xFFFF
    assert lib.rn_csum_fold(0) == 0


def test_ipv4_header():
    """A header from the wire: the field written is the field that was there."""
    ip = "4500003c1c4640004006b1e6ac100a63ac100a0c"
    header = ffi.new("uint8_t[]", bytes.fromhex(ip))
    header[10] = header[11] = 0xAA
    lib.rn_csum_ip4(header, 20)
    assert ffi.buffer(header, 20)[:].hex() == ip
    assert lib.rn_csum_fold(lib.rn_csum_add(0, header, 20)) == 0xFFFF


@settings(deadline=None)  # scapy's import
@given(st.binary(max_size=100), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_udp_with_pseudo_header_is_what_scapy_says(payload, src, dst):
    from scapy.layers.inet import IP, UDP

    a, b = src.to_bytes(4, "big"), dst.to_bytes(4, "big")
    built = bytes(IP(src=".".join(map(str, a)), dst=".".join(map(str, b))) / UDP(sport=1, dport=2) / payload)
    udp = built[20:]
    pseudo = lib.rn_csum_pseudo4(ffi.new("uint8_t[]", a), ffi.new("uint8_t[]", b), 17, len(udp))
    assert fast(udp, start=pseudo) == 0xFFFF, "a datagram with its checksum in place sums to all ones"
