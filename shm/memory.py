"""A shared-memory object that has no name: made, sized and unlinked at once, then known by its descriptor.

A named object would outlive a SIGKILL of everything; a descriptor does not. Processes that may see the object
inherit or are sent the descriptor.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

import posix_ipc

from shm._dataplane import ffi, lib

CData = Any  # cffi has no type for a pointer

NAME_MAX = 30  # bytes, with the slash: the shortest limit among systems with shm_open() (macOS has 31 with NUL)


class LayoutMismatch(Exception):
    """The mapped bytes are not the object this build expects; names the object and what differs."""

    def __init__(self, what: str, differs: str) -> None:
        super().__init__(f"{what}: {differs}")
        self.object = what
        self.differs = differs


_DIFFERS = {
    errno.EINVAL: "not mapped, misaligned, or numbers out of range",
    errno.EPROTO: "made by another build, or not this kind of object",
    errno.EMSGSIZE: "mapping too short",
    errno.ENOMEM: "out of memory",
}


def check(rc: int, what: str) -> None:
    """Turn a negative errno of a create, check or attach function into LayoutMismatch."""
    if rc < 0:
        raise LayoutMismatch(what, _DIFFERS.get(-rc) or os.strerror(-rc))


def new_segment(what: str, size: int) -> int:
    """Zeroed shared memory of `size` bytes, mode 0600, with no name. Returns its descriptor.

    Raises ValueError (name too long, size), OSError (no space, no descriptor).
    """
    if size <= 0:
        raise ValueError(f"{what}: size {size}")
    while True:
        name = f"/rn-{os.urandom(4).hex()}-{what}"
        if len(name) > NAME_MAX:
            raise ValueError(f"{name}: over {NAME_MAX} characters")
        try:
            segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            continue  # somebody drew the same eight digits
        segment.unlink()
        break
    fd: int = segment.fd
    try:
        os.set_inheritable(fd, False)
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


class SharedObject:
    """One mapped object. Subclasses say what it is and check it.

    create() and attach() map it; detach() unmaps it and leaves the descriptor open; destroy() closes that too.
    The memory goes back to the system when the last process has let go of it.
    """

    kind: ClassVar[str] = "object"

    def __init__(self, fd: int, size: int, *, name: str, read_only: bool = False) -> None:
        """Map `size` bytes of `fd`, which this object owns from now on. Raises LayoutMismatch, OSError."""
        self.fd = fd
        self.size = size
        self.name = name
        self.read_only = read_only
        mem = lib.rn_map(fd, size, int(read_only))
        if mem == ffi.NULL:
            number = ffi.errno
            os.close(fd)
            self.fd = -1
            check(-number if number == errno.EMSGSIZE else 0, name)
            raise OSError(number, f"cannot map {name}: {os.strerror(number)}")
        self._mem: CData | None = mem

    @classmethod
    def _new(cls, what: str, size: int, name: str, fmt: Callable[[CData, int], int]) -> Self:
        """New memory, formatted by `fmt(address, bytes)`."""
        if size <= 0:
            raise LayoutMismatch(name, _DIFFERS[errno.EINVAL])
        self = cls(new_segment(what, size), size, name=name)
        try:
            check(fmt(self.mem, size), name)
        except BaseException:
            self.destroy()
            raise
        return self

    @classmethod
    def attach(cls, fd: int, size: int, *, name: str | None = None, read_only: bool = False) -> Self:
        """Map an object another process made; takes the descriptor over. Raises LayoutMismatch, OSError."""
        self = cls(fd, size, name=name or cls.kind, read_only=read_only)
        try:
            check(self._check(), self.name)
        except BaseException:
            self.destroy()
            raise
        return self

    def _check(self) -> int:
        raise NotImplementedError

    @property
    def mem(self) -> CData:
        """Address in this process. Raises ValueError after detach()."""
        if self._mem is None:
            raise ValueError(f"{self.name} is detached")
        return self._mem

    def buffer(self) -> memoryview:
        """The bytes themselves, for tests: they may change at any time."""
        return memoryview(ffi.buffer(self.mem, self.size))

    def detach(self) -> None:
        if self._mem is not None:
            lib.rn_unmap(self._mem, self.size)
            self._mem = None

    def destroy(self) -> None:
        self.detach()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.destroy()
