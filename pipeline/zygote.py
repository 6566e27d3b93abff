"""The first process of every stage of a session, as copies of one: an interpreter and its modules are in memory once.

`python -m pipeline zygote SUPERVISOR NAME:FD:LEVEL...` imports what stages need, forks one process a stage, writes their
process ids to standard output (or why it could not) and ends. The stages become children of the supervisor, which is
their subreaper meanwhile; they wait for that, and then are what `python -m pipeline stage NAME --control-fd FD` is
(pipeline/stage.py). A successor is started that way, on its own: what it costs then is a few MiB more.

This process has nothing that a stage might not see: it has no settings, and no descriptors but the stages' ends of their
control sockets. The copies share one layout of addresses, so one that is found out in one is in all of them.
"""
from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import sys
from typing import NoReturn

from pipeline.logs import LEVEL_VARIABLE
from pipeline.messages import Seat, StageExit
from pipeline.stage import main as stage
from shm._dataplane import ffi, lib


def _retitle(argv: list[str]) -> None:
    """Have ps, and whoever else reads /proc/self/cmdline, see these words (proc_pid_cmdline(5): it is our memory)."""
    with open("/proc/self/stat", "rb") as f:
        start, end = map(int, f.read().rpartition(b")")[2].split()[45:47])  # arg_start, arg_end
    if 0 < start < end:  # 0: not to be seen
        words = b"\0".join(w.encode() for w in argv)[:end - start - 1]
        ffi.memmove(ffi.cast("char *", start), words.ljust(end - start, b"\0"), end - start)


def _become(mine: Seat, seats: list[Seat], supervisor: int, parent: int) -> NoReturn:
    """In the fork: the stage's whole life. parent: a pidfd."""
    code = int(StageExit.FAILED)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        for other in seats:
            if other is not mine:
                os.close(other.fd)
        select.select([parent], [], [])  # from then on our parent is another (exit_notify(): children first)
        os.close(parent)
        if os.getppid() != supervisor:
            os._exit(StageExit.ORPHANED)
        os.environ[LEVEL_VARIABLE] = mine.level
        with contextlib.suppress(OSError):  # a /proc that shows less than ours: it keeps the old title
            _retitle([sys.executable, "-P", "-m", "pipeline", "stage", mine.name, "--control-fd", str(mine.fd)])
        code = stage([mine.name, "--control-fd", str(mine.fd)])
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def main(argv: list[str]) -> int:
    """argv: [SUPERVISOR, NAME:FD:LEVEL...]. Returns a StageExit."""
    try:
        supervisor, seats = int(argv[0]), [Seat.parse(text) for text in argv[1:]]
    except (ValueError, IndexError):
        print("ringnet zygote: it is started by the supervisor, with sockets that it made", file=sys.stderr)
        return StageExit.USAGE
    lib.rn_os_pdeathsig(signal.SIGKILL)
    for s in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # of a terminal: the supervisor decides
        signal.signal(s, signal.SIG_IGN)
    for one in seats:
        importlib.import_module(f"pipeline.{one.name}")
    ours = os.pidfd_open(os.getpid())
    gc.collect()
    gc.freeze()  # a collection in a stage would touch, and so copy, all that is shared
    pids: list[int] = []
    try:
        for one in seats:
            if (pid := os.fork()) == 0:
                _become(one, seats, supervisor, ours)
            pids.append(pid)
    except OSError as e:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        print(f"fork: {e.strerror}", flush=True)
        return StageExit.FAILED
    print(*pids, flush=True)
    return StageExit.OK
