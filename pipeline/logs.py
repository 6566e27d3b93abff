"""What ringnet says on standard error: as text, or as one JSON object a line; by level and stage; never in a flood.

    ringnet: egress: ping works to the gateway only ...
    {"time":"2026-01-02T03:04:05.678Z","level":"warning","stage":"egress","session":"web","text":"..."}

The supervisor and each stage write for themselves (a line is one write(2), so lines do not mix). Levels: --log-level LEVEL or
STAGE=LEVEL, later `ringnet ctl log`. Rate: RATE lines a second of each stage and level in the long run, BURST at once; what
is over is counted, and told with the next line that passes. Errors always pass.
"""
from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping

FORMATS = ("text", "json")
LEVELS = ("error", "warning", "info", "debug")
RATE, BURST = 20.0, 100.0
FORMAT_VARIABLE, LEVEL_VARIABLE, SESSION_VARIABLE = "RINGNET_LOG_FORMAT", "RINGNET_LOG_LEVEL", "RINGNET_LOG_SESSION"


def parse_levels(specs: tuple[str, ...], stages: tuple[str, ...]) -> dict[str, str]:
    """Levels by stage, "" for all others. Raises ValueError with what is wrong."""
    levels: dict[str, str] = {}
    for spec in specs:
        stage, equals, level = spec.rpartition("=")
        if level not in LEVELS:
            raise ValueError(f"{spec}: {level} is no level; there are {', '.join(LEVELS)}")
        if equals and stage not in (*stages, "supervisor"):
            raise ValueError(f"{spec}: no such stage; there are supervisor, {', '.join(stages)}")
        levels[stage] = level
    return levels


class Bucket:
    """Tokens for lines of one kind."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._tokens, self._at = clock, BURST, clock()
        self.held = 0  # lines not told since the last one that was

    def passes(self) -> bool:
        now = self._clock()
        self._tokens = min(BURST, self._tokens + (now - self._at) * RATE)
        self._at = now
        if self._tokens < 1:
            self.held += 1
            return False
        self._tokens -= 1
        return True


class Log:
    """One process's end of it."""

    def __init__(self, stage: str, *, form: str = "text", level: str = "warning", session: str = "",
                 fd: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage, self.form, self.session = stage, form, session
        self.level = level
        self._fd, self._clock = fd, clock
        self._buckets: dict[str, Bucket] = {}

    def wants(self, level: str) -> bool:
        return LEVELS.index(level) <= LEVELS.index(self.level)

    def write(self, level: str, text: str, *, always: bool = False) -> None:
        """A line. always: whatever the level asked for, and past the rate: what the user must see."""
        if not always and not self.wants(level):
            return
        bucket = self._buckets.setdefault(level, Bucket(self._clock))
        if not always and level != "error" and not bucket.passes():
            return
        held, bucket.held = bucket.held, 0
        if self.form == "json":
            import json  # only who writes it pays for it; and text need not be Unicode, which msgspec would refuse

            line = json.dumps({
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "level": level, "stage": self.stage, "session": self.session, "pid": os.getpid(), "text": text,
                **({"suppressed": held} if held else {})})
        else:
            who = "" if self.stage == "supervisor" else f"{self.stage}: "
            more = f" ({held} lines before it were too many)" if held else ""
            line = f"ringnet: {who}{text}{more}"
        data = line.encode(errors="backslashreplace").decode() + "\n"
        with contextlib.suppress(OSError, ValueError):  # nobody reads standard error any more: there is nobody to tell
            if self._fd is not None:
                os.write(self._fd, data.encode())
            else:
                print(data, end="", file=sys.stderr, flush=True)


def for_stage(stage: str, environ: Mapping[str, str] = os.environ) -> Log:
    """The log of a stage, as its supervisor set it up."""
    log = Log(stage, form=environ.get(FORMAT_VARIABLE, "text"), level=environ.get(LEVEL_VARIABLE, "warning"),
              session=environ.get(SESSION_VARIABLE, ""))
    take_over(log)
    return log


def take_over(log: Log) -> None:
    """Python's logging goes to this log from now on, if the process has it: to import it is a MiB, which stages that never
    log by it do not pay."""
    if "logging" in sys.modules:
        from pipeline.log_handler import take

        take(log)
        set_level(log, log.level)


def set_level(log: Log, level: str) -> None:
    log.level = level
    if "logging" in sys.modules:
        sys.modules["logging"].getLogger("ringnet").setLevel(level.upper())
