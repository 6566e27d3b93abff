"""Everything a session shows, read-only: what the monitor stands on."""
from __future__ import annotations

import time
from functools import cached_property
from typing import Self

from msgspec import Struct

from shm.cell import Cell, Session
from shm.flows import Flow, Flows, Scan
from shm.ring import Ring, RingStat


class StageView(Struct, frozen=True, kw_only=True):
    name: str
    row: int
    cell: Cell
    counters: dict[str, int]  # those the stage keeps, by name


class Snapshot(Struct, frozen=True, kw_only=True):
    """One look. Values are of nearly, not exactly, one moment."""

    at_ns: int  # CLOCK_MONOTONIC
    stages: tuple[StageView, ...]
    rings: dict[str, RingStat]  # by ring name


class MemoryView:
    """Read-only mappings of a session's objects. Takes the descriptors over; close() lets go of them."""

    def __init__(
        self,
        stages: tuple[str, ...],
        session: tuple[int, int],
        rings: dict[str, tuple[int, int]],
        flows: tuple[int, int] | None = None,
    ) -> None:
        """`stages`: names by row. Others: (descriptor, bytes). Raises LayoutMismatch, OSError."""
        self._stages = stages
        self._session = Session.attach(*session, read_only=True)
        self._rings: dict[str, Ring] = {}
        self._flows: Flows | None = None
        try:
            for name, end in rings.items():
                self._rings[name] = Ring.attach(*end, name=name, read_only=True)
            if flows is not None:
                self._flows = Flows.attach(*flows, read_only=True)
        except BaseException:
            self.close()
            raise

    def read(self) -> Snapshot:
        return Snapshot(
            at_ns=time.monotonic_ns(),
            stages=tuple(
                StageView(name=name, row=row, cell=self._session.cell(row), counters=self._session.counters(row, name))
                for row, name in enumerate(self._stages)
            ),
            rings={name: ring.stat() for name, ring in self._rings.items()},
        )

    def flows(self) -> list[Flow]:
        """Flow entries in use; empty if the session's table was not given."""
        return list(self._flows) if self._flows is not None else []

    @property
    def flows_max(self) -> int:
        """Entries of the flow table."""
        return len(self._flows) if self._flows is not None else 0

    @cached_property
    def scan(self) -> Scan:
        """Looks at all flows at once. Raises ValueError if the session's table was not given."""
        if self._flows is None:
            raise ValueError("the session's flow table was not given")
        return Scan(self._flows)

    def close(self) -> None:
        for obj in [self._session, *self._rings.values(), *([self._flows] if self._flows else [])]:
            obj.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
