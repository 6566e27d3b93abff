"""The command line of tools/bench/run."""
from __future__ import annotations

import argparse
import os
import resource
import shlex
import signal
import sys
from pathlib import Path

from bench import compare, drivers, lab, plots, report, results, rows
from bench.lab import LabError
from bench.results import ResultsError

NOFILE = 1 << 17  # a datapath needs a descriptor or two a flow; children inherit this


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="tools/bench/run", description="Measure ringnet beside its peers on the same work, in turn.",
        epilog="Figures move by tens of per cent from run to run: only compare what was measured in one run (or appended"
               " to it), and keep the machine quiet. docs/performance.md says how to read the tables.")
    p.add_argument("--drivers", default="ringnet,pasta,slirp4netns,kernel", metavar="LIST",
                   help="what to measure (default %(default)s)")
    p.add_argument("--driver", action="append", default=[], metavar="NAME=COMMAND",
                   help="one more: a command with {netns} {tap} {mtu} {tcp} {api} filled in, run in the foreground on the"
                        " host's side; NAME=+OPTIONS is this checkout's ringnet with more options. May be repeated")
    p.add_argument("--newer-pasta", metavar="PATH", help="a pasta newer than the distribution's, as driver pasta25")
    p.add_argument("--mtu", default="1500,4000,65520", metavar="LIST",
                   help="MTUs of the guest's link (default %(default)s); rows of flows, idle, memory and size are run at"
                        " the first one only")
    p.add_argument("--rows", default=",".join(rows.GROUPS), metavar="LIST",
                   help="groups, or beginnings of rows' names (default: all of %(default)s)")
    p.add_argument("--reps", type=int, default=3, help="repetitions (default %(default)s)")
    p.add_argument("--secs", type=float, default=3.0, help="of each row (default %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    p.add_argument("--append", action="store_true", help="add to the runs that are in --json's file already")
    p.add_argument("--report", type=Path, metavar="FILE.json", help="measure nothing: show the tables of this file")
    p.add_argument("--docs", type=Path, metavar="FILE.md", help="put the tables between this document's marks")
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures there (needs matplotlib: pip install ringnet[plots])")
    p.add_argument("--list", action="store_true", help="show rows and drivers, measure nothing")
    return p


def chosen_drivers(args: argparse.Namespace) -> list[drivers.Driver]:
    known = drivers.builtin(args.newer_pasta)
    extra = [drivers.custom(text) for text in args.driver]
    known |= {d.name: d for d in extra}
    names = [*args.drivers.split(","), *(["pasta25"] if args.newer_pasta else []), *(d.name for d in extra)]
    found = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise LabError(f"--drivers {name}: not one of {', '.join(known)}"
                           + ("; pasta25 needs --newer-pasta PATH" if name == "pasta25" else ""))
        if not known[name].available():
            raise LabError(f"{name}: {shlex.split(known[name].command)[0]} is not installed; leave it out by --drivers")
        found.append(known[name])
    return found


def allow_files() -> None:
    """As many descriptors as the machine lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(NOFILE, hard), max(NOFILE, hard)))
    except ValueError:  # root, but without the right to raise it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measured(args: argparse.Namespace, argv: list[str]) -> results.Results:
    which = chosen_drivers(args)
    plan_rows = rows.chosen(args.rows.split(","))
    try:
        mtus = [int(m) for m in args.mtu.split(",")]
    except ValueError as e:
        raise LabError(f"--mtu {args.mtu}: not a list of numbers") from e
    if args.reps < 1 or not 0.1 <= args.secs <= 600:
        raise LabError("--reps must be at least 1, --secs in 0.1..600")
    if os.geteuid() != 0:
        raise LabError("namespaces need root: run it as root")
    old = results.read(args.json) if args.append and args.json and args.json.exists() else None
    allow_files()
    lab.reap()
    with lab.Lab().fresh() as names:
        congestion = lab.congestion_control(names.guest)
    got = results.fresh({d.name: d.kind for d in which}, {d.name: v for d in which if (v := d.said_version())}, congestion,
                        shlex.join(["tools/bench/run", *argv]))
    if old:
        got = results.joined(old, got)
    plan = compare.Plan(which, mtus, plan_rows, args.reps, args.secs, got.next_rep())
    for record in compare.measure(plan, lambda text: print(text, file=sys.stderr, flush=True)):
        got.records.append(record)
        if args.json:
            got.write(args.json)
    return got


def main(argv: list[str] | None = None) -> int:
    """The whole command; argv without the program's name. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # namespaces and processes go in any case
    if args.list:
        print("\n".join([*(f"{r.group:8} {r.name}" for r in rows.ROWS), "drivers: " + ", ".join(drivers.builtin(args.newer_pasta))]))
        return 0
    try:
        if args.append and not args.json:
            raise LabError("--append: to which --json FILE?")
        got = results.read(args.report) if args.report else measured(args, argv)
        if args.docs:
            report.insert(args.docs, got)
        else:
            print(report.markdown(got), end="")
        if args.plots:
            for path in plots.draw(got, args.plots):
                print(path, file=sys.stderr)
    except (LabError, ResultsError, plots.PlotsError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted" + (f"; {args.json} has what was measured" if args.json else ""), file=sys.stderr)
        return 128 + signal.SIGINT
    return 1 if any(got.meta["drivers"].get(r.driver) == "ringnet" for r in got.errors()) else 0


if __name__ == "__main__":
    sys.exit(main())
