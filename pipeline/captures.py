"""Captures of a running session: which stage is tapped where, the mirrors, and their end with their reader.

A capture point is an input ring of a stage, or its link; names: a ring's (`guest_tx->classify`, or `guest_tx:classify`
for shells), `link` (the guest's, both ways), a stage's (all its points) and `all`. Each tapped stage has one mirror a
capture (csrc/rn_mirror.h); the reader, another process, gets it by descriptor.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from msgspec import Struct

from pipeline import api
from pipeline.messages import Capture, CaptureEnd, FrameFilter
from pipeline.supervisor import Session
from pipeline.topology import Topology
from shm._dataplane import lib
from shm.mirror import BYTES_MIN, POINT_LINK, POINTS, Mirror

SNAPLEN_ALL = 1 << 17  # above the largest frame


class CaptureError(Exception):
    """One line."""


class Tapped(Struct, frozen=True, kw_only=True):
    """One stage's part of a capture."""

    stage: str
    points: dict[int, int]  # point: interface of the capture

    @property
    def mask(self) -> int:
        return sum(1 << p for p in self.points)


def points_of(topology: Topology, names: Iterable[str], link: str) -> tuple[list[api.CaptureInterface], list[Tapped]]:
    """What is to be tapped, in data order. link: name of the guest's link. Raises CaptureError."""
    stages = {s.name for s in topology.stages}
    rings = {r.name: r for r in topology.rings if not r.notices}
    wanted: set[str] = set()
    for name in names:
        if name == "all":
            wanted |= {"link", *rings}
        elif name == "link" or name in rings:
            wanted.add(name)
        elif name.replace(":", "->", 1) in rings:
            wanted.add(name.replace(":", "->", 1))
        elif name in stages:
            wanted |= {r.name for r in topology.inputs(name) if r.name in rings} | ({"link"} if "link" in topology.stage(name).fds else set())
        else:
            raise CaptureError(f"{name}: no such point; there are link, all, {', '.join(sorted(stages))},"
                               f" {', '.join(rings)}")
    interfaces: list[api.CaptureInterface] = []
    tapped: dict[str, dict[int, int]] = {}
    if "link" in wanted:
        interfaces.append(api.CaptureInterface(name=link, description="the guest's link"))
        for stage in topology.stages:
            if {"link", "link_tap"} & set(stage.fds):
                tapped.setdefault(stage.name, {})[POINT_LINK] = 0
    for stage in topology.stages:
        for point, ring in enumerate(topology.inputs(stage.name)):
            if ring.name in wanted:
                tapped.setdefault(stage.name, {})[point] = len(interfaces)
                interfaces.append(api.CaptureInterface(
                    name=ring.name, description=f"frames from {ring.producer} to {ring.consumer}, as it takes them"))
    return interfaces, [Tapped(stage=s.name, points=tapped[s.name]) for s in topology.stages if s.name in tapped]


class Running:
    """One capture."""

    def __init__(self, number: int, tapped: list[Tapped], request: Callable[[Tapped, Mirror], Capture]) -> None:
        self.number, self.tapped, self.request = number, tapped, request
        self.mirrors: list[Mirror] = []
        self.bell = -1
        self.waiting = 0
        self.error = ""
        self.ended = False

    def close(self) -> None:
        for mirror in self.mirrors:
            mirror.destroy()
        self.mirrors = []
        if self.bell >= 0:
            os.close(self.bell)
            self.bell = -1


class Captures:
    """All captures of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.running: dict[int, Running] = {}
        self._number = 0

    def start(self, call: api.CaptureStart, wanted: FrameFilter,
              then: Callable[[tuple[api.CaptureStarted, list[int]] | CaptureError], None]) -> int:
        """Begin; `then` gets the result and its descriptors, which stay ours, or why not. Returns the capture's number.
        Raises CaptureError."""
        interfaces, tapped = points_of(self.session.topology, call.points, self.session.link.name)
        self._number += 1
        number, room = self._number, BYTES_MIN
        while room < call.buffer:
            room *= 2

        def request(t: Tapped, mirror: Mirror) -> Capture:
            return Capture(capture=number, size=mirror.size, points=t.mask, snaplen=call.snaplen or SNAPLEN_ALL,
                           drops=call.drops, filter=wanted)

        run = Running(number, tapped, request)
        try:
            for t in tapped:
                run.mirrors.append(Mirror.create(room, name=f"mirror of {t.stage}"))
            run.bell = lib.rn_bell_new()
            if run.bell < 0:
                raise OSError(-run.bell, os.strerror(-run.bell))
        except OSError as e:
            run.close()
            raise CaptureError(f"cannot make the capture's memory: {e.strerror}") from e
        self.running[number] = run
        run.waiting = len(tapped)

        def answered(error: str) -> None:
            run.waiting -= 1
            run.error = run.error or error
            if run.waiting:
                return
            if run.error or run.ended:
                self.end(number)
                then(CaptureError(run.error or "the client went away"))
                return
            then((api.CaptureStarted(
                capture=number, interfaces=interfaces,
                mirrors=[api.CaptureMirror(stage=t.stage, size=m.size,
                                           interfaces=[t.points.get(p, 0) for p in range(POINTS)])
                         for t, m in zip(tapped, run.mirrors, strict=True)]),
                [*(m.fd for m in run.mirrors), run.bell]))

        for t, mirror in zip(tapped, list(run.mirrors), strict=True):
            self.session.ask(t.stage, request(t, mirror), answered, (mirror.fd, run.bell))
        return number

    def end(self, number: int) -> None:
        """Stop a capture, if there is one. The memory goes with the last process that has it mapped."""
        run = self.running.get(number)
        if run is None:
            return
        run.ended = True
        if run.waiting:
            return  # descriptors are still to be sent: when the last stage has answered
        del self.running[number]
        for t in run.tapped:
            self.session.ask(t.stage, CaptureEnd(capture=number), lambda error: None)
        run.close()

    def again(self, stage: str) -> None:
        """A successor of a stage runs: it goes on with what was captured there."""
        for run in list(self.running.values()):
            for t, mirror in zip(run.tapped, run.mirrors, strict=True):
                if t.stage == stage and not run.waiting:
                    run.waiting += 1
                    self.session.ask(stage, run.request(t, mirror), lambda error, run=run: self._went_on(run),
                                     (mirror.fd, run.bell))

    def _went_on(self, run: Running) -> None:
        run.waiting -= 1
        if run.ended:
            self.end(run.number)

    def close(self) -> None:
        for run in list(self.running.values()):
            with contextlib.suppress(KeyError):
                del self.running[run.number]
            run.close()
