"""Where captured frames go: a pcapng file, a ring of files, or a pipe (draft-ietf-opsawg-pcapng).

Frames come as whole blocks from csrc/rn_capture.c; this writes what stands before them in each file, and decides in
which file they land. Nothing here is done a frame.
"""
from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pipeline import api

_LINKTYPE_ETHERNET = 1


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + value + b"\0" * (-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    size = len(body) + 12
    return struct.pack("=II", kind, size) + body + struct.pack("=I", size)


def head(interfaces: Sequence[api.CaptureInterface], snaplen: int) -> bytes:
    """Section header (4.1) and an interface description (4.2) for each; times are in nanoseconds."""
    end = struct.pack("=HH", 0, 0)
    made = _block(0x0A0D0D0A, struct.pack("=IHHq", 0x1A2B3C4D, 1, 0, -1) + _option(4, b"ringnet") + end)
    for i in interfaces:
        options = _option(2, i.name.encode()) + _option(3, i.description.encode()) + _option(9, b"\x09") + end
        made += _block(1, struct.pack("=HHI", _LINKTYPE_ETHERNET, 0, snaplen) + options)
    return made


class CaptureFile:
    """Raises OSError from any of its methods."""

    def __init__(self, path: str, first: bytes, *, limit: int = 0, keep: int = 0) -> None:
        """path: "-" is standard output. first: what each file begins with. limit: bytes of a file, then the next one is
        begun, named PATH's stem with _00001 and so on; 0: one file. keep: files kept, the oldest goes; 0: all."""
        self._first, self._limit, self._keep = first, limit, keep
        self._path, self._number = Path(path), 0
        self._files: deque[Path] = deque()
        self._fd = -1
        self.size = 0  # bytes of the present file
        if path == "-":
            self._limit = 0
            self._fd = os.dup(1)
            self.write(first)
        else:
            self._next()

    def _next(self) -> None:
        path = self._path
        if self._limit:
            self._number += 1
            path = path.with_name(f"{path.stem}_{self._number:05}{path.suffix}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)  # holds the guest's traffic
        self.close()
        self._fd, self.size = fd, 0
        self._files.append(path)
        if self._keep and len(self._files) > self._keep:
            self._files.popleft().unlink(missing_ok=True)
        self.write(self._first)

    def room(self, least: int, most: int) -> int:
        """Bytes to be written next, of so many that are wanted; a new file is begun if fewer than `least` fit."""
        if not self._limit:
            return most
        if self._limit - self.size < least:
            self._next()
        return min(most, self._limit - self.size)

    def write(self, blocks: bytes | memoryview) -> None:
        left = memoryview(blocks)
        while left:
            n = os.write(self._fd, left)
            left = left[n:]
            self.size += n

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
