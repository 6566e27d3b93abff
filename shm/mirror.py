"""Mirrors of captured frames: made by the supervisor, filled by a stage in C, read here (csrc/rn_mirror.h)."""
from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Self

from shm._dataplane import ffi, lib
from shm.memory import CData, SharedObject, check

BYTES_MIN, BYTES_MAX = lib.RN_MIRROR_MIN, lib.RN_MIRROR_MAX
POINT_LINK, POINT_LINK2 = lib.RN_TAP_LINK, lib.RN_TAP_LINK2
POINTS = lib.RN_NTAP_POINTS
FRAME_ROOM = 70_000  # bytes a block needs at most: the largest frame and what is around it


class MirrorBroken(Exception):
    """A mirror holds what no stage of this build writes."""


class Mirror(SharedObject):
    kind = "mirror"

    @classmethod
    def create(cls, room: int, *, name: str = "mirror") -> Self:
        """`room`: bytes of records, a power of two in BYTES_MIN..BYTES_MAX."""
        size = lib.rn_mirror_size(room) if room >= 0 else 0
        return cls._new("mirror", size, name, lambda mem, size: lib.rn_mirror_create(mem, size, room))

    def _check(self) -> int:
        return lib.rn_mirror_check(self.mem, self.size)

    @property
    def dropped(self) -> int:
        """Frames that found the mirror full."""
        return int(lib.rn_mirror_dropped(self.mem, self.size))


def _address(text: str) -> bytes:
    a = ipaddress.ip_address(text)
    return a.packed if a.version == 6 else b"\0" * 10 + b"\xff\xff" + a.packed


def c_filter(*, proto: int = 0, host: str = "", port: int = 0, guest: str = "", guest_port: int = 0, peer: str = "",
             peer_port: int = 0) -> CData:
    """struct rn_filter *: what is "" or 0 does not count. Raises ValueError for a host that is no address."""
    f = ffi.new("struct rn_filter *")
    if proto:
        f.flags |= lib.RN_FILTER_PROTO
        f.proto = proto
    if host:
        f.flags |= lib.RN_FILTER_HOST
        f.host = _address(host)
    if port:
        f.flags |= lib.RN_FILTER_PORT
        f.port = port
    if guest:
        f.flags |= lib.RN_FILTER_FLOW
        f.guest, f.guest_port = _address(guest), guest_port
        if peer:
            f.flags |= lib.RN_FILTER_FLOW_PEER
            f.peer, f.peer_port = _address(peer), peer_port
    return f


class CaptureReader:
    """Frames of several mirrors as pcapng blocks, by time."""

    def __init__(self, mirrors: Sequence[tuple[Mirror, Sequence[int]]], *, chunk: int = 1 << 20) -> None:
        """Each with the pcapng interface of each point (POINTS of them). Raises LayoutMismatch."""
        self._c = ffi.gc(lib.rn_capture_new(), lib.rn_capture_free)
        if self._c == ffi.NULL:
            raise MemoryError
        self._mirrors = [m for m, _ in mirrors]
        for mirror, interfaces in mirrors:
            check(lib.rn_capture_add(self._c, mirror.mem, mirror.size, ffi.new("uint32_t[]", list(interfaces))),
                  mirror.name)
        self._chunk = max(chunk, FRAME_ROOM)
        self._out = ffi.new("uint8_t[]", self._chunk)

    def read(self, room: int, frames: int) -> memoryview:
        """Whole blocks of at most `frames` frames, `room` bytes (FRAME_ROOM at least); empty if there are none. Valid
        until the next call. Raises MirrorBroken."""
        n = lib.rn_capture_read(self._c, self._out, min(room, self._chunk), frames)
        if n < 0:
            raise MirrorBroken(f"a mirror holds what no stage writes (error {-n})")
        return memoryview(ffi.buffer(self._out, n)) if n else memoryview(b"")

    def arm(self) -> bool:
        """Ask for the doorbell. True: there is something after all."""
        return bool(lib.rn_capture_arm(self._c))

    @property
    def frames(self) -> int:
        return int(lib.rn_capture_frames(self._c))

    @property
    def dropped(self) -> int:
        return sum(m.dropped for m in self._mirrors)
