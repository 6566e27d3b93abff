"""`ringnet explain [WHAT]`: what the stages decided lately, in words. (pipeline/postmortem.py: the same of a dead session.)

WHAT is a flow (12.3, as `ringnet ctl flows` names it), a counter (drop_l4_checksum), a stage, or an address or port of
either side (10.0.2.2, 192.0.2.1:443, :53); several must all fit; none is everything. Decisions come from a log each
stage keeps in shared memory (csrc/rn_event.h), and are read through the session's control API.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from pipeline import api
from pipeline.api import ApiError
from pipeline.client import Client, ClientError, find
from pipeline.dumps import DumpError
from pipeline.text import duration
from pipeline.topology import TOPOLOGY
from shm.cell import Counter, counters

PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}
EPILOG = "exit status: 0 something was said; 1 nothing fits, or there is no such session or dump; 2 usage"

Matches = Callable[[api.EventInfo], bool]


class ExplainUsage(Exception):
    """One line about the command line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ExplainUsage(f"{self.prog}: {message} (see {self.prog} --help)")


def add_what(p: argparse.ArgumentParser) -> None:
    p.add_argument("what", nargs="*", metavar="WHAT", help="a flow (12.3), a counter (drop_l4_checksum), a stage, an"
                   " address and/or port (10.0.2.2, 192.0.2.1:443, :53); several must all fit")
    p.add_argument("-n", "--last", type=int, default=50, metavar="N", help="at most so many decisions, the last ones (50)")
    p.add_argument("--json", action="store_true", help="one JSON object a line")


def parser() -> Parser:
    p = Parser(prog="ringnet explain", allow_abbrev=False, epilog=EPILOG,
               description="What the stages of a running session decided lately about a flow, a counter or an address.")
    where = p.add_mutually_exclusive_group()
    where.add_argument("-s", "--session", metavar="NAME", default="", help="which session (else the only one)")
    where.add_argument("--api-socket", metavar="PATH", default="", help="the session's control socket instead")
    add_what(p)
    return p


# -- what is meant


def _counter(word: str) -> Counter | None:
    return next((c for c in counters() if c.name == word), None)


def matcher(word: str) -> Matches:
    """Does a decision fit this word? Raises ExplainUsage."""
    if flow := re.fullmatch(r"(\d{1,10})\.(\d{1,10})", word):
        index, gen = int(flow[1]), int(flow[2])
        return lambda e: (e.flow, e.gen) == (index, gen)
    if word in {s.name for s in TOPOLOGY.stages}:
        return lambda e: e.stage == word
    if _counter(word):
        return lambda e: e.counter == word
    if end := re.fullmatch(r"(\[?[0-9a-fA-F:.]*?\]?)(?::(\d{1,5}))?", word):
        address, port = end[1].strip("[]"), int(end[2]) if end[2] else None
        if (address and ("." in address or ":" in address)) or (not address and port is not None):
            return lambda e: any((not address or a == address) and port in (None, p)
                                 for a, p in ((e.guest, e.guest_port), (e.peer, e.peer_port)))
    close = [c.name for c in counters() if word and word in c.name][:6]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ExplainUsage(f"ringnet explain: {word}: neither a flow (12.3), a counter, a stage, nor an address{hint}")


# -- words


def who(e: api.EventInfo) -> str:
    if not e.guest and not e.peer:
        return ""
    proto = PROTOCOLS.get(e.proto, f"protocol {e.proto}") if e.proto else ""
    ends = [f"{a or '?'}{f':{p}' if p else ''}" for a, p in ((e.guest, e.guest_port), (e.peer, e.peer_port))]
    if e.proto == 17 and e.flow >= 0 and not e.peer:
        ends[1] = "any"
    return f"{proto} {ends[0]} > {ends[1]}".strip()


def _age(ns: int) -> str:
    return duration(ns / 1e9) if ns >= 10**9 else f"{ns / 1e6:.1f} ms"


def sentence(e: api.EventInfo) -> str:
    """One decision."""
    flow = f" (flow {e.flow}.{e.gen})" if e.flow >= 0 else ""
    about = f"{who(e)}{flow}"
    match e.kind:
        case "start":
            return f"generation {e.value} began"
        case "refuse":
            return f"{about}: not made: {os.strerror(e.value)}"
        case "open":
            return f"{about}: opened"
        case "end":
            return f"{about}: ended after {_age(e.value)}"
    more = f"; {e.n} since the last one told here" if e.n > 1 else ""
    known = _counter(e.counter)
    text = f"{e.counter}: {known.help}" if known else e.counter
    return f"{about}: {text}{more}" if about else f"{text}{more}"


def show(events: list[api.EventInfo], last: int, as_json: bool) -> None:
    for e in sorted(events, key=lambda e: (e.at_ns, e.stage, e.number))[-last if last > 0 else len(events):]:
        if as_json:
            print(msgspec.json.encode(e).decode())
        else:
            clock = time.strftime("%H:%M:%S", time.localtime(e.time)) + f".{int(e.time % 1 * 1e6):06d}"
            print(f"{clock}  {e.stage:<9} {sentence(e)}")


def headings(words: Iterable[str], totals: dict[str, dict[str, int]]) -> None:
    """For a counter: what it means, and how often it was so."""
    for word in words:
        if (c := _counter(word)) is not None:
            seen = {stage: values.get(word, 0) for stage, values in totals.items() if c.stage in (stage, "all")}
            count = ", ".join(f"{n} in {stage}" for stage, n in seen.items() if n) or "never"
            print(f"{word}: {c.help} ({c.unit}); {count}")


# -- a session that runs


def running(client: Client) -> list[api.EventInfo]:
    found: list[api.EventInfo] = []
    for stage in client.call(api.Stages()).stages:
        start: int | None = 1
        while start is not None:
            page = client.call(api.EventsList(stage=stage.name, start=start))
            found += page.events
            start = page.next
    return found


def _flow_line(client: Client, word: str) -> str:
    for page in client.pages(api.FlowsList()):
        for f in page.flows:
            if f.flow == word:
                return (f"{word}: {f.proto} {f.guest}:{f.guest_port} > {f.peer or 'any'}:{f.peer_port}, {f.state},"
                        f" {duration(f.age_s)} old, {f.up_bytes} bytes up, {f.down_bytes} bytes down")
    return f"{word}: no such flow now"


def explain(args: argparse.Namespace) -> int:
    wanted = [matcher(w) for w in args.what]
    with Client(args.api_socket or find(args.session)) as client:
        found = [e for e in running(client) if all(m(e) for m in wanted)]
        if not args.json:
            headings(args.what, client.call(api.Statistics()).counters)
            for word in args.what:
                if re.fullmatch(r"\d+\.\d+", word):
                    print(_flow_line(client, word))
    show(found, args.last, args.json)
    if not found:
        print("ringnet explain: nothing was decided lately that fits", file=sys.stderr)
    return 0 if found else 1


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet explain`. Returns the exit code."""
    return run("explain", lambda: explain(parser().parse_args(argv)))


def run(command: str, do: Callable[[], int]) -> int:
    """What it returns, or one line about what was wrong, and an exit code."""
    try:
        return do()
    except ExplainUsage as e:
        print(str(e).replace("ringnet explain:", f"ringnet {command}:", 1), file=sys.stderr)
        return 2
    except (ClientError, ApiError, DumpError) as e:
        print(f"ringnet {command}: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads us: no second complaint at exit
        return 1
    except KeyboardInterrupt:
        return 130
