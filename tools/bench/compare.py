"""Runs the rows: all drivers in turn on one MTU, then the next MTU, then all again.

The order of the drivers turns by one a repetition, so that none is always first.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.drivers import Datapath, Driver, running
from bench.lab import Lab, LabError
from bench.results import Record
from bench.rows import Row
from pipeline import procs

LOOK_S = 0.3  # before each start of a driver: how busy is the machine without us?


@dataclass(frozen=True)
class Plan:
    drivers: Sequence[Driver]
    mtus: Sequence[int]
    rows: Sequence[Row]
    reps: int
    secs: float
    first_rep: int = 0


def due(row: Row, driver: Driver, mtu: int, plan: Plan) -> bool:
    return (row.each_mtu or mtu == plan.mtus[0]) and (row.kernel or driver.kind != "kernel")


def turns(plan: Plan) -> Iterator[tuple[int, int, Driver]]:
    """(repetition, MTU, driver) in the order they are run."""
    for rep in range(plan.first_rep, plan.first_rep + plan.reps):
        for mtu in plan.mtus:
            shift = rep % len(plan.drivers)
            for driver in [*plan.drivers[shift:], *plan.drivers[:shift]]:
                yield rep, mtu, driver


def measure(plan: Plan, say: Callable[[str], None]) -> Iterator[Record]:
    """Every record as soon as it is there. What cannot be measured is a record that says why, and the rest goes on."""
    lab = Lab()
    for rep, mtu, driver in turns(plan):
        rows = [r for r in plan.rows if due(r, driver, mtu, plan)]
        todo = list(rows)
        others = procs.busy_percent(LOOK_S) if rows else 0.0
        try:
            if rows:
                with running(driver, lab, mtu, forwards=any(r.forwards for r in rows)) as datapath:
                    while todo:
                        yield _one(todo[0], datapath, rep, plan.secs, others, say)
                        todo.pop(0)
        except LabError as e:  # it does not start
            say(f"{driver.name}, MTU {mtu}: {e}")
            yield from (Record(mtu, row.name, driver.name, rep, error=str(e)) for row in todo)


def _one(row: Row, d: Datapath, rep: int, secs: float, others: float, say: Callable[[str], None]) -> Record:
    began = time.monotonic()
    record = Record(d.mtu, row.name, d.driver.name, rep, others_percent=round(others, 1))
    try:
        measured = row.run(d, secs)
    except LabError as e:
        record.error = str(e)
        say(f"{d.driver.name}, MTU {d.mtu}, {row.name}: {e}")
    else:
        record.values = {k: float(f"{v:.6g}") for k, v in measured.values.items()}
        record.stages = {k: float(f"{v:.4g}") for k, v in measured.stages.items()}
        figure = f"{measured.values[row.figure]:10.4g} {row.figure}" if row.figure in measured.values else ""
        say(f"rep {rep} mtu {d.mtu:5} {d.driver.name:12} {row.name:20} {figure:26} ({time.monotonic() - began:.1f} s)")
    return record
