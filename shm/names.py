"""The table of names: which name an address was asked for (csrc/rn_names.h). services writes it, egress reads it."""
from __future__ import annotations

import ipaddress
from typing import Self

from shm._dataplane import ffi, lib
from shm.memory import CData, SharedObject, check

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _key(address: Address) -> bytes:
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


class NamesWriter:
    """The one writer's hold on a mapped table."""

    def __init__(self, mem: CData, size: int, *, name: str = "names") -> None:
        """Raises LayoutMismatch."""
        check(lib.rn_names_check(mem, size), name)
        self._mem = mem

    def set(self, address: Address, name: str, *, now_ns: int, seconds: float, local: bool = False) -> bool:
        """`address` has this name for so many seconds from now_ns (CLOCK_MONOTONIC). local: it comes from the hosts
        table. False: not a name that is kept (rn_names.h), or no time left."""
        text = name.encode("ascii", "replace").lower()
        return not lib.rn_names_set(self._mem, _key(address), text, len(text), lib.RN_NAME_LOCAL if local else 0,
                                    now_ns, now_ns + int(seconds * 1e9))


class Names(SharedObject):
    kind = "names"

    @classmethod
    def create(cls, *, name: str = "names") -> Self:
        return cls._new("names", lib.rn_names_size(), name, lib.rn_names_create)

    def _check(self) -> int:
        return lib.rn_names_check(self.mem, self.size)

    def writer(self) -> NamesWriter:
        return NamesWriter(self.mem, self.size, name=self.name)

    def find(self, address: Address, *, now_ns: int) -> tuple[str, bool] | None:
        """(name, whether it is from the hosts table), or None."""
        text, flags = ffi.new("char[]", lib.RN_NAME_MAX + 1), ffi.new("uint32_t *")
        if not lib.rn_names_find(self.mem, _key(address), now_ns, text, flags):
            return None
        return ffi.string(text).decode("ascii"), bool(flags[0] & lib.RN_NAME_LOCAL)
