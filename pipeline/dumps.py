"""What is left of a session, in a directory: written when a stage dies, or when told to; read by `ringnet postmortem`.

    info.json      session, reason, time, stages (row, process, generation, state), rings, settings without secrets
    session.bin    stage cells, counters, decisions, latencies: the shared object as it was
    flows.bin      the flow table, without the session's key
    ring.N.bin     each ring: counters and descriptors; info.json has the names

Frames are not in it: no byte the guest sent or got but addresses and ports. The binary files are read by the build that
wrote them; another one says so.
"""
from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec
from msgspec import Struct

from shm._dataplane import ffi, lib
from shm.cell import Session as CellTable
from shm.flows import Flows
from shm.memory import LayoutMismatch, SharedObject
from shm.ring import Ring

if TYPE_CHECKING:
    from pipeline.supervisor import Session

KEEP = 16  # dumps in one directory; then the oldest of them goes
_PREFIX = "ringnet-"
_SECRET = frozenset({"proxy", "hosts"})  # may hold a password; is the user's own
_Object = TypeVar("_Object", bound=SharedObject)


class DumpError(Exception):
    """A directory holds no dump we can read; one line."""


class StageInfo(Struct, frozen=True, kw_only=True):
    name: str
    pid: int
    generation: int
    state: str  # as the supervisor saw it
    held: bool


class Info(Struct, frozen=True, kw_only=True):
    session: str
    reason: str
    unix_time: float  # of the dump,
    monotonic_ns: int  # and by the clock that flows and events have
    kernel: str
    stages: list[StageInfo]  # by row
    rings: list[str]  # by number of file
    settings: dict[str, object]


def write(session: Session, directory: str | os.PathLike[str], reason: str) -> Path:
    """A dump in a new directory below `directory`. Raises OSError."""
    assert session.memory is not None
    base = Path(directory)
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = next(p for n in range(1 << 20)
                if not (p := base / f"{_PREFIX}{session.name or os.getpid()}-{stamp}{f'.{n}' if n else ''}").exists())
    path.mkdir(mode=0o700)
    memory, rings = session.memory, list(session.memory.rings.items())
    settings = {k: v for k, v in msgspec.to_builtins(session.settings).items() if k not in _SECRET}
    info = Info(session=session.name, reason=reason, unix_time=time.time(), monotonic_ns=time.monotonic_ns(),
                kernel=platform.release(), settings=settings, rings=[name for name, _ in rings],
                stages=[StageInfo(name=c.decl.name, pid=c.pid, generation=c.generation, state=c.state.name.lower(),
                                  held=c.decl.name in session.seats.held) for c in session.children])
    _save(path / "session.bin", memory.session.buffer())
    flows = ffi.new("uint8_t[]", memory.flows.size)
    ffi.memmove(flows, memory.flows.mem, memory.flows.size)
    lib.rn_flows_redact(flows, memory.flows.size)
    _save(path / "flows.bin", ffi.buffer(flows))
    for n, (_, ring) in enumerate(rings):
        _save(path / f"ring.{n}.bin", ring.buffer())
    _save(path / "info.json", msgspec.json.format(msgspec.json.encode(info)) + b"\n")  # last: it says that all is there
    for old in sorted(base.glob(f"{_PREFIX}*/info.json"), key=lambda p: p.stat().st_mtime_ns)[:-KEEP]:
        _remove(old.parent)
    return path


def _save(path: Path, data: object) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
        out.write(data)  # type: ignore[arg-type]


def _remove(path: Path) -> None:
    """One of our dumps: its files, and nothing else that may lie there."""
    for file in [*path.glob("*.bin"), path / "info.json"]:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()


class Dump:
    """A dump, opened: the same objects a running session has, read-only."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """directory: a dump, or a directory of dumps: the last one of them. Raises DumpError."""
        path = Path(directory)
        if not (path / "info.json").exists():
            dumps = sorted(path.glob(f"{_PREFIX}*/info.json"), key=lambda p: p.stat().st_mtime_ns)
            if not dumps:
                raise DumpError(f"{path}: holds no dump of a session (no info.json)")
            path = dumps[-1].parent
        self.path = path
        self._all: list[SharedObject] = []
        try:
            self.info = msgspec.json.decode((path / "info.json").read_bytes(), type=Info)
            self.session = self._open(CellTable, "session.bin")
            self.flows = self._open(Flows, "flows.bin")
            self.rings = {name: self._open(Ring, f"ring.{n}.bin") for n, name in enumerate(self.info.rings)}
        except (OSError, LayoutMismatch, msgspec.MsgspecError) as e:
            self.close()
            raise DumpError(f"{path}: {e}") from e

    def _open(self, kind: type[_Object], name: str) -> _Object:
        path = self.path / name
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        made = kind.attach(fd, os.fstat(fd).st_size, name=name, read_only=True)
        self._all.append(made)
        return made

    def row(self, stage: str) -> int:
        """Raises KeyError."""
        return {s.name: n for n, s in enumerate(self.info.stages)}[stage]

    def close(self) -> None:
        for made in self._all:
            made.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
