"""`ringnet bench`: how fast is it on this machine, beside pasta and slirp4netns where those are installed? About 20 seconds.

The short form, for users: one connection, each figure once. What developers compare by is tools/bench (docs/performance.md).
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from pipeline import peers, procs
from pipeline.bench_lab import Lab, LabError
from pipeline.config import ConfigError, Settings, make
from pipeline.ctl import CtlUsage, Parser
from pipeline.messages import Exit
from pipeline.netns import GuestError
from pipeline.text import table
from shm._dataplane import lib

FIGURES = {  # key: (as the table calls it, decimals)
    "tcp_up_gbps": ("TCP from the guest, Gbit/s", 2),
    "tcp_down_gbps": ("TCP to the guest, Gbit/s", 2),
    "cpu_s_per_GB": ("its CPU time, s a GB", 2),
    "request_us": ("request and answer, us", 0),
    "connection_us": ("connect, request, answer, close, us", 0),
    "start_s": ("from its start to the first connection, s", 2),
    "memory_mib": ("memory at rest, MiB", 0),
}
QUIET_PERCENT = 15.0  # of all CPUs, that others may use
EPILOG = ("exit status: 0 measured; 1 ringnet could not be; 2 usage. Figures move by tens of per cent from run to run, and with"
          " what else the machine does. No root is needed where unprivileged user namespaces and /dev/net/tun are allowed:"
          " `ringnet doctor` tells.")


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was found of one program."""

    name: str
    version: str = ""
    figures: dict[str, float] = {}
    error: str = ""


def drivers() -> dict[str, peers.Driver]:
    return {d.name: d for d in (peers.ringnet(), peers.pasta(), peers.slirp4netns())}


def parser() -> Parser:
    p = Parser(prog="ringnet bench", allow_abbrev=False, epilog=EPILOG,
               description="Measure ringnet on this machine, beside pasta and slirp4netns where they are installed: between two"
                           " namespaces made for it, in about 20 seconds.")
    p.add_argument("-m", "--mtu", type=int, metavar="BYTES", default=Settings().mtu, help="of the guest's link (default"
                   f" {Settings().mtu})")
    p.add_argument("--secs", type=float, metavar="S", default=1.0, help="of each of four measurements (default 1)")
    p.add_argument("--only", metavar="LIST", default=",".join(drivers()), help="which programs (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def chosen(args: argparse.Namespace) -> list[peers.Driver]:
    """Raises CtlUsage."""
    known, prog = drivers(), "ringnet bench"
    if not 0.05 <= args.secs <= 60:
        raise CtlUsage(f"{prog}: --secs {args.secs:g}: not within 0.05..60")
    try:
        make({"mtu": args.mtu})
    except ConfigError as e:
        raise CtlUsage(f"{prog}: {e}") from e
    names = list(dict.fromkeys(args.only.split(",")))
    for name in names:
        if name not in known:
            raise CtlUsage(f"{prog}: --only {args.only}: {name or 'nothing'} is not one of {', '.join(known)}")
    return [known[name] for name in names]


def _measure_all(chosen: list[peers.Driver], mtu: int, seconds: float) -> Iterator[Row]:
    """Raises GuestError, OSError."""
    lab = None
    for driver in chosen:
        if not driver.available():
            yield Row(driver.name, error=f"not installed (Debian package {driver.package})")
            continue
        lab = lab or Lab()
        try:
            yield Row(driver.name, driver.said_version(), lab.measure(driver, mtu, seconds))
        except LabError as e:
            yield Row(driver.name, driver.said_version(), error=str(e))


def _in_a_process(chosen: list[peers.Driver], mtu: int, seconds: float) -> Iterator[Row]:
    """The same in a process of its own: there is no way back out of a namespace. Raises LabError."""
    r, w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            lib.rn_os_pdeathsig(signal.SIGKILL)
            os.close(r)
            with os.fdopen(w, "wb") as out:
                try:
                    for row in _measure_all(chosen, mtu, seconds):
                        out.write(msgspec.json.encode(row) + b"\n")
                        out.flush()
                except (GuestError, OSError) as e:
                    out.write(msgspec.json.encode(Row("", error=getattr(e, "strerror", None) or str(e))) + b"\n")
            code = 0
        except (KeyboardInterrupt, BrokenPipeError):
            pass  # nobody waits for it any more
        finally:
            os._exit(code)
    os.close(w)
    try:
        with os.fdopen(r, "rb") as lines:
            for line in lines:
                row = msgspec.json.decode(line, type=Row)
                if not row.name:
                    raise LabError(row.error)
                yield row
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def shown(rows: list[Row]) -> str:
    """The table."""
    measured = [r for r in rows if r.figures]
    lines = [[what, *(f"{r.figures[key]:.{decimals}f}" for r in measured)] for key, (what, decimals) in FIGURES.items()]
    text = table(["", *(r.name for r in measured)], lines) + "\n" if measured else ""
    return text + "".join(f"{r.name}: {r.error}\n" for r in rows if r.error)


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet bench`. Returns the exit code."""
    try:
        args: Any = parser().parse_args(argv)
        which = chosen(args)
        others = procs.busy_percent(0.2)
        rows: list[Row] = []
        for row in _in_a_process(which, args.mtu, args.secs):
            rows.append(row)
            if not args.json and sys.stderr.isatty():
                print(f"ringnet bench: {row.name} done", file=sys.stderr, flush=True)
    except CtlUsage as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except LabError as e:
        print(f"ringnet bench: {e}", file=sys.stderr)
        return int(Exit.RUNTIME)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    conditions = {"mtu": args.mtu, "seconds": args.secs, "kernel": platform.release(), "cpus": len(os.sched_getaffinity(0)),
                  "others_percent": round(others, 1)}
    if args.json:
        print(json.dumps(conditions | {"rows": msgspec.to_builtins(rows)}))
    else:
        print(f"MTU {args.mtu}, one connection, {args.secs:g} s each; Linux {conditions['kernel']}, {conditions['cpus']} CPUs\n")
        print(shown(rows), end="")
        if others > QUIET_PERCENT:
            print(f"Other programs used {others:.0f} % of the CPUs when this began: all of these are slower than they could be.")
    return int(Exit.RUNTIME) if any(r.error for r in rows if r.name == "ringnet") else int(Exit.OK)
