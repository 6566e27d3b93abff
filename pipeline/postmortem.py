"""`ringnet postmortem DIR [WHAT]`: what a session that died left (--postmortem, pipeline/dumps.py), in words.

Without WHAT: its stages, rings, flows and last decisions. WHAT picks decisions as for `ringnet explain`.
"""
from __future__ import annotations

import argparse
import time

import msgspec

from pipeline import api
from pipeline.dumps import Dump
from pipeline.explain import EPILOG, PROTOCOLS, Parser, add_what, headings, matcher, run, show
from pipeline.text import duration, table
from shm import trace


def parser() -> Parser:
    p = Parser(prog="ringnet postmortem", allow_abbrev=False, epilog=EPILOG,
               description="What a session that died left in a directory (--postmortem): stages, drops, rings, flows and"
                           " the last decisions.")
    p.add_argument("directory", metavar="DIR", help="a dump, or the directory they are in: the last one")
    add_what(p)
    return p


def recorded(dump: Dump) -> list[api.EventInfo]:
    wall = dump.info.unix_time - dump.info.monotonic_ns / 1e9
    return [api.EventInfo(stage=stage.name, time=e.at_ns / 1e9 + wall, **{
                **msgspec.structs.asdict(e), "kind": e.kind.name.lower()})
            for row, stage in enumerate(dump.info.stages) for e in trace.events(dump.session, row)]


def _overview(dump: Dump, totals: dict[str, dict[str, int]]) -> None:
    info = dump.info
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.unix_time))
    print(f"session {info.session}, {when}, {dump.path}\nreason: {info.reason}\n")
    rows = []
    for row, stage in enumerate(info.stages):
        cell = dump.session.cell(row)
        idle = "asleep" if cell.asleep else "at work"
        ago = f"{idle}, last turn {duration(max(0, info.monotonic_ns - cell.heartbeat_ns) / 1e9)} before" \
            if cell.heartbeat_ns else "never ran"
        mine = totals[stage.name]
        drops = ", ".join(f"{n.removeprefix('drop_')} {v}" for n, v in mine.items() if n.startswith("drop_") and v)
        rows.append([stage.name, str(stage.pid), str(stage.generation), stage.state, ago, str(mine["frames_in"]),
                     str(mine["frames_out"]), drops or "none"])
    print(table(["stage", "pid", "gen", "state", "its loop", "frames in", "frames out", "drops by reason"], rows,
                frozenset({0, 3, 4, 7})))
    print()
    rings = [(name, ring.stat()) for name, ring in dump.rings.items()]
    print(table(["ring", "waiting", "slots", "ever"],
                [[name, str(s.fill), str(s.slots), str(s.tail)] for name, s in rings], frozenset({0})))
    used = list(dump.flows)
    print(f"\nflows in use: {len(used)}")
    for f in used[:20]:
        print(f"  {f.index}.{f.gen} {PROTOCOLS.get(f.proto, f.proto)} {f.guest}:{f.guest_port} > {f.peer or 'any'}:"
              f"{f.peer_port} {f.state.name.lower()}, {f.up_bytes} bytes up, {f.down_bytes} bytes down")
    if len(used) > 20:
        print(f"  and {len(used) - 20} more")
    print()


def postmortem(args: argparse.Namespace) -> int:
    wanted = [matcher(w) for w in args.what]
    with Dump(args.directory) as dump:
        totals = {s.name: dump.session.counters(row, s.name) for row, s in enumerate(dump.info.stages)}
        if not args.json:
            if args.what:
                headings(args.what, totals)
            else:
                _overview(dump, totals)
        found = [e for e in recorded(dump) if all(m(e) for m in wanted)]
        show(found, args.last, args.json)
    return 0 if found else 1


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet postmortem`. Returns the exit code."""
    return run("postmortem", lambda: postmortem(parser().parse_args(argv)))
