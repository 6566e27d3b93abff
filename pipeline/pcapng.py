"""Capture files, read and written whole: pcapng (draft-ietf-opsawg-pcapng), and the older pcap for reading.

For running a stage on a file (pipeline/replay.py): some thousand frames, in memory. What captures live is csrc/rn_pcap.c
and rn_capture.c.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

ETHERNET = 1  # LINKTYPE_ETHERNET
FRAME_MAX = 1 << 18  # bytes of a frame believed
FROM_GUEST, TO_GUEST = 1, 2  # epb_flags bits 0-1: inbound, outbound, as csrc/rn_pcap.h writes them


class CaptureError(Exception):
    """A file is no capture, or not whole; the text names it and where."""


class Packet(Struct, frozen=True, kw_only=True):
    time_ns: int  # since the epoch
    interface: str  # "" if the file has no name
    direction: int  # FROM_GUEST, TO_GUEST, 0: not known
    frame: bytes


class _Interface:
    def __init__(self, name: str, link: int, resolution: int, offset: int) -> None:
        self.name, self.link, self.resolution, self.offset = name, link, resolution, offset

    def time_ns(self, high: int, low: int) -> int:
        ticks = high << 32 | low
        per_second = 1 << (self.resolution & 0x7F) if self.resolution & 0x80 else 10 ** self.resolution
        return (self.offset * per_second + ticks) * 10**9 // per_second


def _options(body: bytes, order: str) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(body):
        code, size = struct.unpack_from(f"{order}HH", body, at)
        if code == 0:
            break
        found.setdefault(code, body[at + 4:at + 4 + size])
        at += 4 + (size + 3) // 4 * 4
    return found


def read(path: str | Path) -> list[Packet]:
    """Every frame of a file, in its order. Raises CaptureError, OSError."""
    data = Path(path).read_bytes()
    magic = data[:4]
    if magic == b"\x0a\x0d\x0d\x0a":
        return _read_pcapng(data, str(path))
    for order in "<>":
        for number, tick in ((0xA1B2C3D4, 1000), (0xA1B23C4D, 1)):
            if magic == struct.pack(f"{order}I", number):
                return _read_pcap(data, order, tick, str(path))
    raise CaptureError(f"{path}: neither a pcapng nor a pcap file")


def _read_pcap(data: bytes, order: str, tick: int, path: str) -> list[Packet]:
    if len(data) < 24 or struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF != ETHERNET:
        raise CaptureError(f"{path}: not a capture of Ethernet frames")
    found, at = [], 24
    while at < len(data):
        if at + 16 > len(data):
            raise CaptureError(f"{path}: cut at byte {at}")
        seconds, part, kept, size = struct.unpack_from(f"{order}IIII", data, at)
        if kept > FRAME_MAX or at + 16 + kept > len(data):
            raise CaptureError(f"{path}: cut, or a frame of {kept} bytes, at byte {at}")
        if kept < size:
            raise CaptureError(f"{path}: frame {len(found) + 1} is not whole ({kept} of {size} bytes); capture without a"
                               " snap length")
        found.append(Packet(time_ns=seconds * 10**9 + part * tick, interface="", direction=0,
                            frame=data[at + 16:at + 16 + kept]))
        at += 16 + kept
    return found


def _read_pcapng(data: bytes, path: str) -> list[Packet]:
    found: list[Packet] = []
    interfaces: list[_Interface] = []
    order, at = "<", 0
    while at < len(data):
        def cut(why: str = "cut", at: int = at) -> CaptureError:
            return CaptureError(f"{path}: {why} at byte {at}")

        if at + 12 > len(data):
            raise cut()
        if data[at:at + 4] == b"\x0a\x0d\x0d\x0a":  # a section; its byte order, and interfaces anew
            order = "<" if data[at + 8:at + 12] == b"\x4d\x3c\x2b\x1a" else ">"
            interfaces = []
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if size < 12 or size % 4 or at + size > len(data):
            raise cut("not a whole block")
        body = data[at + 8:at + size - 4]
        at += size
        if kind == 1:
            if len(body) < 8:
                raise cut("an interface without a link type")
            options = _options(body[8:], order)
            interfaces.append(_Interface(
                options.get(2, b"").decode("utf-8", "replace"), struct.unpack_from(f"{order}H", body)[0],
                options.get(9, b"\x06")[0], struct.unpack(f"{order}q", options[14])[0] if len(options.get(14, b"")) == 8
                else 0))
        elif kind == 6:
            if len(body) < 20:
                raise cut("a packet block without its head")
            number, high, low, kept, whole = struct.unpack_from(f"{order}IIIII", body)
            if number >= len(interfaces) or kept > min(FRAME_MAX, len(body) - 20):
                raise cut("a packet block that does not fit")
            if kept < whole:
                raise CaptureError(f"{path}: frame {len(found) + 1} is not whole ({kept} of {whole} bytes); capture without"
                                   " a snap length")
            where = interfaces[number]
            if where.link != ETHERNET:
                raise CaptureError(f"{path}: interface {where.name or number} is not Ethernet")
            flags = _options(body[20 + (kept + 3) // 4 * 4:], order).get(2, b"\0\0\0\0")
            found.append(Packet(time_ns=where.time_ns(high, low), interface=where.name,
                                direction=struct.unpack(f"{order}I", flags)[0] & 3 if len(flags) == 4 else 0,
                                frame=body[20:20 + kept]))
    return found


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + b"\0" * (-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    size = len(body) + 12
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def written(interfaces: Sequence[str], packets: Sequence[Packet]) -> bytes:
    """A pcapng file, little-endian whatever the machine, times in nanoseconds: the same packets are the same bytes."""
    end = struct.pack("<HH", 0, 0)
    made = [_block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + _option(4, b"ringnet") + end)]
    made += [_block(1, struct.pack("<HHI", ETHERNET, 0, 0) + _option(2, name.encode()) + _option(9, b"\x09") + end)
             for name in interfaces]
    for p in packets:
        size = len(p.frame)
        body = struct.pack("<IIIII", interfaces.index(p.interface), p.time_ns >> 32, p.time_ns & 0xFFFFFFFF, size, size)
        body += p.frame + b"\0" * (-size % 4)
        if p.direction:
            body += _option(2, struct.pack("<I", p.direction)) + end
        made.append(_block(6, body))
    return b"".join(made)
