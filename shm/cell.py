"""Stage cells (pid, state, heartbeat, stop) and counters."""
from __future__ import annotations

import enum
from functools import cache
from typing import Self

from msgspec import Struct

from shm._dataplane import ffi, lib
from shm.memory import SharedObject, check


class State(enum.IntEnum):
    """enum rn_stage_state."""

    ABSENT = lib.RN_ST_ABSENT
    READY = lib.RN_ST_READY
    RUNNING = lib.RN_ST_RUNNING
    DRAINING = lib.RN_ST_DRAINING
    ENDED = lib.RN_ST_ENDED
    FAILED = lib.RN_ST_FAILED
    PAUSED = lib.RN_ST_PAUSED


class Counter(Struct, frozen=True, kw_only=True):
    """One line of csrc/rn_metrics.def."""

    index: int
    stage: str  # "all": every stage has one
    name: str
    unit: str
    help: str

    @property
    def is_drop(self) -> bool:
        return self.name.startswith("drop_")


@cache
def counters() -> tuple[Counter, ...]:
    """All counters, by index."""
    def text(raw: object) -> str:
        return ffi.string(raw).decode()

    return tuple(
        Counter(index=i, stage=text(lib.rn_counter_stage(i)), name=text(lib.rn_counter_name(i)),
                unit=text(lib.rn_counter_unit(i)), help=text(lib.rn_counter_help(i)))
        for i in range(lib.rn_ncounters())
    )


def counters_of(stage: str) -> tuple[Counter, ...]:
    """The counters a stage keeps: its own and those that all have."""
    return tuple(c for c in counters() if c.stage in (stage, "all"))


class Cell(Struct, frozen=True, kw_only=True):
    """One stage, as it says of itself."""

    pid: int
    generation: int
    state: State
    stop: bool  # told to stop
    asleep: bool  # blocked with nothing to do, so an old heartbeat is no fault
    heartbeat_ns: int  # CLOCK_MONOTONIC of the last turn


class Session(SharedObject):
    kind = "session"

    @classmethod
    def create(cls, stages: int, *, name: str = "session") -> Self:
        """`stages`: rows used, 1..8."""
        return cls._new("session", lib.rn_session_size(), name,
                        lambda mem, size: lib.rn_session_create(mem, size, stages))

    def _check(self) -> int:
        return lib.rn_session_check(self.mem, self.size)

    def cell(self, row: int) -> Cell:
        """Raises LayoutMismatch (no such row)."""
        out = ffi.new("struct rn_cell_view *")
        check(lib.rn_cell_read(self.mem, self.size, row, out), f"{self.name}, row {row}")
        return Cell(pid=out.pid, generation=out.generation, state=State(out.state), stop=bool(out.stop),
                    asleep=bool(out.asleep), heartbeat_ns=out.heartbeat_ns)

    def stop(self, row: int) -> None:
        """Set a stage's stop word. Ring its doorbell afterwards: it may be asleep."""
        lib.rn_cell_stop(self.mem, row)

    def counters(self, row: int, stage: str) -> dict[str, int]:
        """Counters of the stage in `row`, by name; each value is whole, but not all are of one moment."""
        return {c.name: int(lib.rn_counter_read(self.mem, self.size, row, c.index)) for c in counters_of(stage)}
