"""The traffic generators: compiles load/*.c when they changed, and talks to the program's modes by lines."""
from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
from pathlib import Path
from typing import Any

from bench.lab import LabError, inside

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror"]


def compiled(sources: list[Path], target: Path, *, flags: list[str] = FLAGS, depends: list[Path] | None = None) -> Path:
    """target, made again if a source, or what it depends on, is newer. Raises LabError with the compiler's words."""
    newest = max(p.stat().st_mtime_ns for p in [*sources, *(depends or [])])
    if not target.exists() or target.stat().st_mtime_ns < newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.{os.getpid()}")  # another run may be at it
        argv = [*shlex.split(os.environ.get("CC", "gcc")), *flags, *map(str, sources), "-o", str(fresh)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"{shlex.join(argv)}:\n{done.stderr}")
        fresh.replace(target)
    return target


def program() -> Path:
    sources = sorted((HERE / "load").glob("*.c"))
    return compiled(sources, REPO / "build" / "bench" / "load", depends=sorted((HERE / "load").glob("*.h")))


class Load:
    """One running generator, in a namespace. Ended with the `with` block."""

    def __init__(self, namespace: str, mode: str, *words: str | float) -> None:
        self.what = " ".join([mode, *map(str, words)])
        self.process = subprocess.Popen(inside(namespace, str(program()), mode, *map(str, words)),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def line(self, patience: float, while_runs: subprocess.Popen[bytes] | None = None) -> str:
        """Its next line. Raises LabError if it, or the other process, ends first, or if `patience` seconds are over."""
        out = self.process.stdout
        assert out is not None
        with contextlib.ExitStack() as stack:
            watched: list[Any] = [out]
            if while_runs:
                watched.append(os.pidfd_open(while_runs.pid))
                stack.callback(os.close, watched[1])
            ready = select.select(watched, [], [], patience)[0]
        if out not in ready:
            raise LabError("it ended" if ready else f"load {self.what}: nothing in {patience:g} s")
        line = out.readline().decode()
        if not line:
            assert self.process.stderr is not None
            self.process.wait()
            raise LabError(f"load {self.what}: {self.process.stderr.read().decode().strip() or 'ended'}")
        return line.strip()

    def answer(self, patience: float, while_runs: subprocess.Popen[bytes] | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.line(patience, while_runs))
        return answer

    def order(self, words: str, patience: float = 30.0) -> str:
        self.give(words)
        return self.line(patience)

    def give(self, words: str) -> None:
        """An order whose answer is read later."""
        assert self.process.stdin is not None
        self.process.stdin.write(words.encode() + b"\n")
        self.process.stdin.flush()
