"""`ringnet top`: a session's stages, rings, drops and busiest flows, live. `ringnet flows`: every flow, in figures and words.

Both read the session's shared memory (pipeline/look.py). With `rich` (the extra `ringnet[top]`) top has colours; without,
or with --plain, it is plain text. docs/looking.md.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from pipeline.api import ApiError
from pipeline.client import Client, ClientError, find
from pipeline.ctl import CtlUsage, Parser, common
from pipeline.look import SORTS, FlowRate, Look, Looker
from pipeline.messages import Exit
from pipeline.supervisor import Signals
from pipeline.text import bits, duration, size, table
from shm.memory import LayoutMismatch

EPILOG = "exit status: 0 done; 1 refused, or no such session; 2 usage"
INTERVAL_MIN, INTERVAL_MAX = 0.1, 3600.0  # s
Section = tuple[str, list[str], list[list[str]], frozenset[int]]  # title, head, rows, columns to the left


def parser() -> Parser:
    p = Parser(prog="ringnet top", allow_abbrev=False, parents=[common()], epilog=EPILOG,
               description="Watch a running session: stages, rings, drops by reason, the busiest flows. Keys: q ends, s"
                           " sorts the flows by something else. Without a terminal each look is printed below the last.")
    p.add_argument("-i", "--interval", type=float, metavar="S", default=1.0, help="between two looks (default 1)")
    p.add_argument("-n", "--count", type=int, metavar="N", default=0, help="end after so many looks")
    p.add_argument("--sort", choices=list(SORTS), default="rate", help="which flows come first (default rate)")
    p.add_argument("--flows", type=int, metavar="N", default=20, help="flows shown at most (default 20)")
    p.add_argument("--plain", action="store_true", help="no colours, even if rich is installed")
    return p


def flow_section(flows: list[FlowRate], *, rates: bool) -> Section:
    """A row a flow. rates: bits a second, else bytes in all."""
    rows = []
    for f in flows:
        up, down = (bits(f.up_bits_s), bits(f.down_bits_s)) if rates else (size(f.up_bytes), size(f.down_bytes))
        owners = f.up_owner if f.up_owner == f.down_owner else f"{f.up_owner}/{f.down_owner}"
        rows.append([f.flow, f.proto, f"{f.guest}:{f.guest_port}", f"{f.peer}:{f.peer_port}" if f.peer else "*",
                     f.state, up, down, duration(f.age_s), owners, f"{f.srtt_ms:.1f}" if f.srtt_ms else "-",
                     str(f.retransmits), f.waits])
    return ("flows", ["flow", "proto", "guest", "peer", "state", "up", "down", "age", "owner up/down", "RTT ms", "resent",
                      "waits for"], rows, frozenset({0, 1, 2, 3, 4, 8, 11}))


def sections(look: Look) -> list[Section]:
    """What top shows, as tables."""
    stages, drops = [], []
    for s in look.stages:
        stages.append([
            s.name, s.state, str(s.restarts), f"{s.frames_in_s:.0f}", bits(s.bits_in_s), f"{s.frames_out_s:.0f}",
            bits(s.bits_out_s), f"{s.wakes_s:.0f}", f"{s.sleeps_s:.0f}", f"{s.batch:.1f}",
            f"{s.stalls_room_s:.0f}/{s.stalls_buf_s:.0f}",
            f"{s.small_used}/{s.small_total} {s.large_used}/{s.large_total}" if s.small_total else "-",
            f"{s.cpu:.0%}", f"{s.memory_kib / 1024:.1f}"])
        drops += [[s.name, reason, str(n), f"{s.drops_s.get(reason, 0.0):.0f}"] for reason, n in s.drops.items()]
    drops.sort(key=lambda d: (-float(d[3]), -int(d[2])))
    rings = [[r.name, f"{r.fill}/{r.slots}", str(r.high), f"{r.frames_s:.0f}", r.waits] for r in look.rings]
    found: list[Section] = [
        ("stages", ["stage", "state", "restarts", "in fr/s", "in bit/s", "out fr/s", "out bit/s", "wakes/s", "sleeps/s",
                    "batch", "stalls/s room/buf", "buffers 2K 68K", "CPU", "MiB"], stages, frozenset({0, 1})),
        ("rings", ["ring", "waiting", "most", "frames/s", ""], rings, frozenset({0, 4}))]
    if drops:
        found.append(("drops", ["stage", "reason", "frames", "now/s"], drops, frozenset({0, 1})))
    if look.top:
        found.append(flow_section(look.top, rates=True))
    return found


def headline(look: Look, sort: str) -> str:
    kinds = ", ".join(f"{n} {name}" for name, n in look.kinds.items()) or "none"
    return (f"ringnet top: session {look.session}, up {duration(look.uptime_s)}; of the last {look.interval_s:.1f} s;"
            f" flows by {sort}; this look took {look.took_ms:.1f} ms\n"
            f"flows {look.flows} of {look.flows_max}: {kinds}; {look.promoted} halves promoted")


def plain(look: Look, sort: str) -> str:
    return "\n\n".join([headline(look, sort), *(table(head, rows, left) for _, head, rows, left in sections(look))])


class Plain:
    """The whole terminal, rewritten in place."""

    def __enter__(self) -> Plain:
        sys.stdout.write("\x1b[?1049h\x1b[?25l")  # alternate screen, no cursor (xterm's control sequences)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()

    def show(self, look: Look, sort: str) -> None:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())  # not $COLUMNS: it is what it was at the start
        text = plain(look, sort).splitlines()[:lines - 1]
        sys.stdout.write("\x1b[H" + "".join(f"{line[:columns]}\x1b[K\n" for line in text) + "\x1b[J")
        sys.stdout.flush()


class Rich:
    """The same with rich. Raises ImportError if it is not there."""

    def __init__(self) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        self._group, self._table, self._text = Group, Table, Text
        self._live = Live(console=Console(), screen=True, auto_refresh=False)

    def __enter__(self) -> Rich:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(*exc)

    def show(self, look: Look, sort: str) -> None:
        parts: list[Any] = [self._text(headline(look, sort), style="bold")]
        for title, head, rows, left in sections(look):
            made = self._table(title=title, title_justify="left", title_style="bold cyan", box=None, pad_edge=False,
                               header_style="dim")
            for i, name in enumerate(head):
                made.add_column(name, justify="left" if i in left else "right", no_wrap=True,
                                style="red" if title == "drops" and i == 3 else "yellow" if name == "waits for" else None)
            for row in rows:
                made.add_row(*(self._text(cell) for cell in row))
            parts.append(made)
        self._live.update(self._group(*parts), refresh=True)


class Lines:
    """No terminal: each look below the last."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, look: Look, sort: str) -> None:
        print(msgspec.json.encode(look).decode() if self._json else plain(look, sort) + "\n", flush=True)


def _screen(args: argparse.Namespace) -> Plain | Rich | Lines:
    if getattr(args, "json", False) or not sys.stdout.isatty():
        return Lines(getattr(args, "json", False))
    if not args.plain:
        with contextlib.suppress(ImportError):
            return Rich()
    return Plain()


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Standard input, a key at a time, if it is a terminal of ours; else -1."""
    if not (sys.stdin.isatty() and sys.stdout.isatty() and os.tcgetpgrp(0) == os.getpgrp()):
        yield -1
        return
    before = termios.tcgetattr(0)
    tty.setcbreak(0)
    try:
        yield 0
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _watch(args: argparse.Namespace, looker: Looker, signals: Signals) -> None:
    order, sort, shown = list(SORTS), args.sort, 0
    with _keys() as keys, _screen(args) as screen:
        due = time.monotonic()
        while True:
            screen.show(looker.look(flows=args.flows, sort=sort), sort)
            shown += 1
            if shown == args.count:
                return
            due = max(due + args.interval, time.monotonic())
            while (left := due - time.monotonic()) > 0:
                poll = select.poll()
                for fd in (signals.fileno(), looker.client.fileno(), keys):
                    if fd >= 0:
                        poll.register(fd, select.POLLIN)
                ready = {fd for fd, _ in poll.poll(left * 1000)}
                if signals.fileno() in ready and signals.take():
                    return
                if looker.client.fileno() in ready:
                    raise ClientError(f"session {looker.session} ended")
                if keys in ready:
                    match os.read(keys, 1):
                        case b"q" | b"":
                            return
                        case b"s":
                            sort = order[(order.index(sort) + 1) % len(order)]
                            break


def run(parse: Callable[[], Parser], argv: list[str], does: Callable[[argparse.Namespace, Looker, Signals], None]) -> int:
    """A command that looks; returns the exit code."""
    p = parse()
    try:
        args: Any = p.parse_args(argv)
        if not INTERVAL_MIN <= args.interval <= INTERVAL_MAX:
            raise CtlUsage(f"{p.prog}: --interval {args.interval:g}: not within {INTERVAL_MIN:g}..{INTERVAL_MAX:g}")
        with Signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals, \
                Client(getattr(args, "api_socket", "") or find(getattr(args, "session", ""))) as client:
            looker = Looker(client)
            try:
                does(args, looker, signals)
            finally:
                looker.close()
    except CtlUsage as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except (ClientError, ApiError, LayoutMismatch) as e:
        print(f"{p.prog}: {e}", file=sys.stderr)
        return int(Exit.RUNTIME)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return int(Exit.OK)


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet top`. Returns the exit code."""
    return run(parser, argv, _watch)
