"""Captures of a running session: which stage is tapped where, the mirrors, and their end with their reader.

A capture point is an input ring of a stage, or a link of its; names: a ring's (`guest_tx->classify`, or `guest_tx:classify`
for shells), `link` (the guest's, both ways), `link2` and `bridge` (the second NIC's, towards the guest and towards the host), a
stage's (all its points) and `all`. Each tapped stage has one mirror a capture (csrc/rn_mirror.h); the reader, another process,
gets it by descriptor.

A stage whose seat is empty, or that dies meanwhile, is no obstacle: it has its mirror already, and is told of it when it runs.
"""
from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct

from pipeline import api
from pipeline.messages import Capture, CaptureEnd, FrameFilter
from pipeline.supervisor import Session, State
from pipeline.topology import Topology
from shm._dataplane import lib
from shm.mirror import BYTES_MIN, POINT_LINK, POINT_LINK2, POINTS, Mirror

SNAPLEN_ALL = 1 << 17  # above the largest frame
LINKS = {  # name: (descriptors, one of which a stage at this link has; its point there)
    "link": ({"link", "link_tap"}, POINT_LINK), "link2": ({"link2"}, POINT_LINK2), "bridge": ({"bridge"}, POINT_LINK)}


class CaptureError(Exception):
    """One line."""


class Tapped(Struct, frozen=True, kw_only=True):
    """One stage's part of a capture."""

    stage: str
    points: dict[int, int]  # point: interface of the capture

    @property
    def mask(self) -> int:
        return sum(1 << p for p in self.points)


def links_of(session: Session) -> dict[str, api.CaptureInterface]:
    """The links a session has, as a file calls them."""
    found = {"link": api.CaptureInterface(name=session.link.name, description="the guest's link")}
    if session.nic2 is not None:
        name = session.nic2.link.name
        found["link2"] = api.CaptureInterface(name=name if name != session.link.name else "link2", description="the guest's second link")
        found["bridge"] = api.CaptureInterface(name="bridge", description=f"the second NIC's host side: {session.nic2.facts.host}")
    return found


def points_of(topology: Topology, names: Iterable[str], links: Mapping[str, api.CaptureInterface]
              ) -> tuple[list[api.CaptureInterface], list[Tapped]]:
    """What is to be tapped, in data order. links: those there are, of LINKS. Raises CaptureError."""
    stages = {s.name for s in topology.stages}
    rings = {r.name: r for r in topology.rings if not r.notices}
    wanted: set[str] = set()
    for name in names:
        if name == "all":
            wanted |= {*links, *rings}
        elif name in links or name in rings:
            wanted.add(name)
        elif name.replace(":", "->", 1) in rings:
            wanted.add(name.replace(":", "->", 1))
        elif name in stages:
            wanted |= {r.name for r in topology.inputs(name) if r.name in rings}
            wanted |= {n for n in links if n in topology.stage(name).fds}
        else:
            raise CaptureError(f"{name}: no such point; there are all, {', '.join(links)}, {', '.join(sorted(stages))},"
                               f" {', '.join(rings)}")
    interfaces: list[api.CaptureInterface] = []
    tapped: dict[str, dict[int, int]] = {}
    for name in (n for n in links if n in wanted):
        fds, number = LINKS[name]
        for stage in topology.stages:
            if fds & set(stage.fds):
                tapped.setdefault(stage.name, {})[number] = len(interfaces)
        interfaces.append(links[name])
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
        self.waiting = 0  # stages that have not answered yet
        self.joining = 0  # successors that have not
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
        interfaces, tapped = points_of(self.session.topology, call.points, links_of(self.session))
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
        absent: list[str] = []

        def answered(stage: str, error: str) -> None:
            run.waiting -= 1
            if error and self._away(stage):
                absent.append(stage)  # again() tells its successor
            else:
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
                         for t, m in zip(tapped, run.mirrors, strict=True)], absent=absent),
                [*(m.fd for m in run.mirrors), run.bell]))

        for t, mirror in zip(tapped, list(run.mirrors), strict=True):
            self.session.ask(t.stage, request(t, mirror), functools.partial(answered, t.stage), (mirror.fd, run.bell))
        return number

    def _away(self, stage: str) -> bool:
        child = self.session.child(stage)
        return child.state is not State.RUNNING or child.channel is None

    def end(self, number: int) -> None:
        """Stop a capture, if there is one. The memory goes with the last process that has it mapped."""
        run = self.running.get(number)
        if run is None:
            return
        run.ended = True
        if run.waiting or run.joining:
            return  # descriptors are still to be sent: when the last stage has answered
        del self.running[number]
        for t in run.tapped:
            self.session.ask(t.stage, CaptureEnd(capture=number), lambda error: None)
        run.close()

    def again(self, stage: str) -> None:
        """A successor of a stage runs: it goes on with what was captured there."""
        for run in list(self.running.values()):
            for t, mirror in zip(run.tapped, run.mirrors, strict=True):
                if t.stage == stage and not run.ended:
                    run.joining += 1
                    self.session.ask(stage, run.request(t, mirror), lambda error, run=run: self._went_on(run),
                                     (mirror.fd, run.bell))

    def _went_on(self, run: Running) -> None:
        run.joining -= 1
        if run.ended:
            self.end(run.number)

    def close(self) -> None:
        for run in list(self.running.values()):
            with contextlib.suppress(KeyError):
                del self.running[run.number]
            run.close()
