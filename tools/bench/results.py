"""The JSON file: one record a run of one row by one driver; everything the tables show is computed from these."""
from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
REPO = Path(__file__).resolve().parent.parent.parent


class ResultsError(Exception):
    """One line: why a file cannot be used."""


@dataclass
class Record:
    mtu: int
    row: str
    driver: str
    rep: int
    values: dict[str, float] = field(default_factory=dict)  # figure -> value, see rows.FIGURES
    stages: dict[str, float] = field(default_factory=dict)  # stage -> CPU seconds (a GB, or a request)
    others_percent: float | None = None  # how busy all CPUs were just before, by what else runs on the machine
    error: str = ""  # it could not be measured: why; then there are no values


@dataclass
class Results:
    meta: dict[str, Any]
    records: list[Record]

    def values(self, mtu: int, row: str, driver: str, figure: str) -> list[float]:
        """All runs of one cell, by repetition."""
        found = [r for r in self.records if (r.mtu, r.row, r.driver) == (mtu, row, driver) and figure in r.values]
        return [r.values[figure] for r in sorted(found, key=lambda r: r.rep)]

    def stages(self, mtu: int, row: str, driver: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        for r in self.records:
            if (r.mtu, r.row, r.driver) == (mtu, row, driver):
                for name, value in r.stages.items():
                    found[name].append(value)
        return dict(found)

    def errors(self) -> list[Record]:
        return [r for r in self.records if r.error]

    def mtus(self, row: str | None = None) -> list[int]:
        return sorted({r.mtu for r in self.records if row in (None, r.row)})

    def drivers(self, kind: str | None = None) -> list[str]:
        """In the order they were given; of one kind only."""
        kinds: dict[str, str] = self.meta["drivers"]
        return [name for name, k in kinds.items() if kind in (None, k)]

    def others(self) -> list[float]:
        """How busy the machine was without us, a figure a start of a driver."""
        seen = {(r.rep, r.mtu, r.driver): r.others_percent for r in self.records if r.others_percent is not None}
        return list(seen.values())

    def next_rep(self) -> int:
        return max((r.rep for r in self.records), default=-1) + 1

    def write(self, path: Path) -> None:
        """A record a line, so that a diff of two files is readable."""
        lines = ",\n".join("  " + json.dumps({k: v for k, v in asdict(r).items() if v not in ("", {}, None)}) for r in self.records)
        text = f'{{\n "schema": {SCHEMA},\n "meta": {json.dumps(self.meta)},\n "records": [\n{lines}\n ]\n}}\n'
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(text)
        fresh.replace(path)


def read(path: Path) -> Results:
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ResultsError(f"{path}: schema {data['schema']}, this program knows {SCHEMA}; measure again")
        return Results(data["meta"], [Record(**r) for r in data["records"]])
    except OSError as e:
        raise ResultsError(f"{path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ResultsError(f"{path}: not written by tools/bench/run ({e!r})") from e


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(REPO), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The last commit that changed what is measured, with -dirty if the checkout differs from it."""
    parts = ("--", "csrc", "pipeline", "shm")
    changed = _git("status", "--porcelain", "--untracked-files=no", *parts)
    return (_git("log", "-1", "--abbrev=10", "--format=%h", *parts) + ("-dirty" if changed else "")) or "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def conditions() -> dict[str, Any]:
    """What two runs must have in common to stand in one file: the machine, and what of ringnet was measured."""
    return {"kernel": os.uname().release, "cpus": len(os.sched_getaffinity(0)), "cpu": _cpu_model(), "commit": commit()}


def fresh(kinds: dict[str, str], versions: dict[str, str], congestion: str, command: str) -> Results:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Results({**conditions(), "date": now, "commands": [command], "congestion": congestion,
                    "drivers": kinds, "versions": versions}, [])


def joined(old: Results, new: Results) -> Results:
    """old with new's records behind them. Raises ResultsError if they do not belong together."""
    for key in (*conditions(), "congestion"):
        if old.meta[key] != new.meta[key]:
            raise ResultsError(f"--append: the file was measured with {key} {old.meta[key]}, this is {new.meta[key]}")
    meta = old.meta | {"date": new.meta["date"], "drivers": old.meta["drivers"] | new.meta["drivers"],
                       "versions": old.meta["versions"] | new.meta["versions"]}
    meta["commands"] = list(dict.fromkeys([*old.meta["commands"], *new.meta["commands"]]))
    return Results(meta, [*old.records, *new.records])


def replaced(document: str, mark: str, end: str, body: str) -> str:
    """The document with body between its two marks. Raises ResultsError if one is missing."""
    if document.count(mark) != 1 or document.count(end) != 1:
        raise ResultsError(f"the document needs one line {mark} and one line {end}")
    head, rest = document.split(mark)
    return f"{head}{mark}\n{body}{end}{rest.split(end)[1]}"
