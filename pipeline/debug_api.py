"""The control API's calls for debugging: pace of a stage, bad wires, decisions, latency, a dump (docs/debugging.md)."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from pipeline import api, dumps
from pipeline.api import ApiError, Code
from pipeline.config import ConfigError, Impair, parse_impair
from pipeline.messages import Ask, Pace, Wire
from pipeline.supervisor import Session
from shm import trace

Done = Callable[[Any], None]


class DebugApi:
    """Of one session. `calls` is what the control API does for each call: it returns a result, or `later` and calls done."""

    def __init__(self, session: Session, later: Any) -> None:
        self.session = session
        self._later = later
        self.calls: dict[type[api.Call], Callable[[Any, Any, Done], Any]] = {
            api.StagePause: lambda _, call, done: self._pace(call.stage, 0, done),
            api.StageStep: lambda _, call, done: self._pace(call.stage, call.frames, done),
            api.StageResume: lambda _, call, done: self._pace(call.stage, None, done),
            api.ImpairSet: self._impair_set, api.ImpairClear: self._impair_clear, api.ImpairList: self._impair_list,
            api.EventsList: self._events, api.Latency: self._latency, api.Dump: self._dump,
        }

    def _row(self, stage: str) -> int:
        """Raises ApiError."""
        try:
            return self.session.topology.row(stage)
        except KeyError:
            names = ", ".join(s.name for s in self.session.topology.stages)
            raise ApiError(Code.NOT_FOUND, f"stage: there is no stage {stage}; there are {names}") from None

    def _ask(self, stage: str, ask: Ask, done: Done, then: Callable[[], None] = lambda: None) -> Any:
        def answered(error: str) -> None:
            if not error:
                then()
            done(ApiError(Code.FAILED, error) if error else api.Nothing())

        self.session.ask(stage, ask, answered)
        return self._later

    def _pace(self, stage: str, frames: int | None, done: Done) -> Any:
        self._row(stage)
        return self._ask(stage, Pace(frames=frames), done)

    # -- bad wires

    def _impair_set(self, client: Any, call: api.ImpairSet, done: Done) -> Any:
        try:
            impair = parse_impair(call.spec)
        except ConfigError as e:
            raise ApiError(Code.BAD_ARGS, f"spec: {str(e).removeprefix('--impair ')}") from None

        def told() -> None:
            self.session.impairments[impair.place] = call.spec, impair

        return self._ask(impair.stage, Wire(impair=impair), done, told)

    def _impair_clear(self, client: Any, call: api.ImpairClear, done: Done) -> Any:
        there = self.session.impairments
        if call.place not in there:
            have = f"; there are {', '.join(there)}" if there else "; nothing is impaired"
            raise ApiError(Code.NOT_FOUND, f"place: {call.place}{have}")
        impair = there[call.place][1]
        nothing = Impair(place=impair.place, stage=impair.stage, output=impair.output)
        return self._ask(impair.stage, Wire(impair=nothing), done, lambda: there.pop(call.place, None))

    def _impair_list(self, client: Any, call: api.ImpairList, done: Done) -> api.Impairments:
        return api.Impairments(specs=[text for text, _ in self.session.impairments.values()])

    # -- looking

    def _events(self, client: Any, call: api.EventsList, done: Done) -> api.Events:
        row = self._row(call.stage)
        assert self.session.memory is not None
        table = self.session.memory.session
        found: list[api.EventInfo] = []
        wall = time.time_ns() - time.monotonic_ns()
        for e in trace.events(table, row, call.start):
            if len(found) == call.limit:
                return api.Events(events=found, next=e.number)
            found.append(api.EventInfo(stage=call.stage, time=(e.at_ns + wall) / 1e9, **{
                **msgspec.structs.asdict(e), "kind": e.kind.name.lower()}))
        return api.Events(events=found, next=None)

    def _latency(self, client: Any, call: api.Latency, done: Done) -> api.Latencies:
        assert self.session.memory is not None
        table, stages = self.session.memory.session, self.session.topology.stages
        return api.Latencies(paths=[
            api.PathLatency(source=source.name, target=target.name, buckets=buckets)
            for j, target in enumerate(stages) for i, source in enumerate(stages)
            if (buckets := trace.latency(table, i, j))])

    def _dump(self, client: Any, call: api.Dump, done: Done) -> api.Dumped:
        try:
            path = dumps.write(self.session, call.directory, "asked for")
        except OSError as e:
            raise ApiError(Code.FAILED, f"directory: {e.filename or call.directory}: {e.strerror}") from None
        return api.Dumped(directory=str(path))
