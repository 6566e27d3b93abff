"""The arena of frame buffers: create it, and be one of its users (tests, tools; stages do it in C)."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import Self

from msgspec import Struct

from shm._dataplane import ffi, lib
from shm.memory import CData, SharedObject, check
from shm.ring import Desc


def _spec(parts: Sequence[tuple[int, int]]) -> CData:
    return ffi.new("struct rn_part_spec[]", [(small, large) for small, large in parts])


class Use(Struct, frozen=True, kw_only=True):
    """Who holds one class of a part's buffers. At rest exact; while frames move, as of about now."""

    total: int
    returned: int  # given back, not yet taken by the owner
    held: dict[int, int]  # stage row (-1: the word names nobody): buffers; one in a ring is its consumer's; no zeros

    @property
    def free(self) -> int:
        return self.total - sum(self.held.values())


class Arena(SharedObject):
    kind = "arena"

    @classmethod
    def create(cls, parts: Sequence[tuple[int, int]], *, name: str = "arena") -> Self:
        """`parts`: (small, large) buffers by stage row; (0, 0) for a row that never allocates."""
        spec = _spec(parts)
        size = lib.rn_arena_size(spec, len(parts))
        return cls._new("arena", size, name, lambda mem, size: lib.rn_arena_create(mem, size, spec, len(parts)))

    def _check(self) -> int:
        return lib.rn_arena_check(self.mem, self.size)

    def usage(self, part: int) -> tuple[Use, Use]:
        """Small and large buffers of a part. Raises LayoutMismatch."""
        out = ffi.new("struct rn_part_use *")
        check(lib.rn_arena_usage(self.mem, self.size, part, out), f"{self.name}, part {part}")
        small, large = (Use(total=out.total[c], returned=out.returned[c],
                            held={row: out.held[row][c] for row in range(len(out.held)) if out.held[row][c]}
                            | ({-1: out.unknown[c]} if out.unknown[c] else {})) for c in range(2))
        return small, large

    @classmethod
    def look(cls, fd: int, size: int) -> Arena:
        """Map another process's arena for reading; the descriptor stays the caller's. Raises LayoutMismatch, OSError."""
        return cls.attach(os.dup(fd), size, read_only=True)

    def pool(self, row: int, *, owner: bool = True, recover: bool = False) -> Pool:
        """Use it as stage `row`; owner: allocate from part `row`. Raises LayoutMismatch."""
        return Pool(self, row, owner=owner, recover=recover)


class Pool:
    """One stage's hold on the arena. Not thread-safe; the arena must stay attached."""

    def __init__(self, arena: Arena, row: int, *, owner: bool, recover: bool = False) -> None:
        err = ffi.new("int *")
        handle = lib.rn_pool_new(arena.mem, arena.size, row if owner else -1, row, int(recover), err)
        if handle == ffi.NULL:
            check(err[0], f"{arena.name}, part {row}")
        self.arena = arena
        self._p: CData = ffi.gc(handle, lib.rn_pool_delete)

    def bell(self, row: int, fd: int) -> None:
        """Doorbell of the owner of part `row`."""
        lib.rn_pool_bell(self._p, row, fd)

    def take(self, length: int = 60, *, large: bool = False) -> Desc | None:
        """A buffer, described as a frame of `length` bytes; None if none is free. Raises ValueError (too long)."""
        d = ffi.new("struct rn_desc *")
        rc = lib.rn_pool_take(self._p, lib.RN_LARGE if large else lib.RN_SMALL, length, d)
        if rc == -errno.ENOBUFS:
            return None
        if rc < 0:
            raise ValueError(f"a frame of {length} bytes does not fit")
        return Desc(d.off, d.len, d.flags, d.gen)

    def holds(self, desc: Desc) -> bool:
        """Whether the descriptor names a frame inside a buffer, in the buffer's present use."""
        return bool(lib.rn_pool_holds(self._p, self._c(desc)))

    def give(self, desc: Desc) -> None:
        """Free the buffer. Raises ValueError if the descriptor names none."""
        if lib.rn_pool_give(self._p, self._c(desc)) < 0:
            raise ValueError(f"no such buffer: {desc}")

    def give_many(self, descs: Iterable[Desc]) -> int:
        """Free many in one call; stops at the first bad one. Returns how many."""
        rows = [(d.off, d.len, d.flags, d.gen) for d in descs]
        return int(lib.rn_pool_give_many(self._p, ffi.new("struct rn_desc[]", rows), len(rows)))

    def free(self, *, large: bool = False) -> int:
        """Free buffers of a class, after taking back what others returned."""
        return int(lib.rn_pool_free(self._p, lib.RN_LARGE if large else lib.RN_SMALL))

    def arm(self) -> bool:
        """Ask to be woken when a buffer comes back. True: some just did, do not block."""
        return bool(lib.rn_pool_arm(self._p))

    def disarm(self) -> None:
        lib.rn_pool_disarm(self._p)

    @property
    def wakes(self) -> int:
        return int(lib.rn_pool_wakes(self._p))

    @staticmethod
    def _c(d: Desc) -> CData:
        return ffi.new("struct rn_desc *", (d.off, d.len, d.flags, d.gen))
