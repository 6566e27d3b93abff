"""What ringnet is to reach, as data; and how near a file of results comes."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from bench.results import Results
from bench.rows import FIGURES, IDLE_FLOWS, MORE
from bench.stats import Summary, ratio, summary


class Against(Enum):
    PEER = "best peer"  # of all peers, row by row
    PASTA = "best pasta"
    KERNEL = "kernel forwarding"
    ITSELF = "ringnet, other row"
    NOTHING = "nothing: the figure itself"


BULK = ("tcp up 1", "tcp down 1", "tcp up 8", "tcp down 8", "tcp both ways")


@dataclass(frozen=True)
class Target:
    text: str
    rows: tuple[str, ...]
    figure: str
    op: str  # ">=" or "<="
    bound: float
    against: Against = Against.PEER
    mtus: tuple[int, ...] | None = None  # None: all that were measured
    other_row: str = ""  # Against.ITSELF


TARGETS = (
    Target("TCP bulk at MTU 1500", BULK, "gbps", ">=", 4.0, mtus=(1500,)),
    Target("TCP bulk at MTU 4000", BULK, "gbps", ">=", 2.2, mtus=(4000,)),
    Target("TCP bulk at MTU 65520", BULK, "gbps", ">=", 1.1, mtus=(65520,)),
    Target("TCP bulk", BULK, "gbps", ">=", 0.5, Against.KERNEL),
    Target("CPU a GB of TCP bulk at MTU 1500", BULK, "cpu_s_per_GB", "<=", 0.4, mtus=(1500,)),
    Target("CPU a GB of TCP bulk at MTU 65520", BULK, "cpu_s_per_GB", "<=", 1.0, mtus=(65520,)),
    Target("request and response, p50", ("tcp rr", "udp rr"), "p50_us", "<=", 1.0, Against.PASTA),
    Target("request and response, p99", ("tcp rr", "udp rr"), "p99_us", "<=", 1.2, Against.PASTA),
    Target("connect, request, close, p50", ("tcp crr",), "p50_us", "<=", 1.1),
    Target("1400-byte datagrams, 2 Gbit/s offered, delivered", ("udp up 1400", "udp down 1400"), "gbps", ">=", 1.7),
    Target("1000 flows, total against 8 flows", ("flows up 1000",), "gbps", ">=", 0.8, Against.ITSELF, other_row="flows up 8"),
    Target("1000 flows, total against 8 flows", ("flows down 1000",), "gbps", ">=", 0.8, Against.ITSELF, other_row="flows down 8"),
    Target("1000 flows, Jain's fairness index", ("flows up 1000", "flows down 1000"), "jain", ">=", 0.9, Against.NOTHING),
    Target(f"{IDLE_FLOWS} idle flows, CPU in % of a core", (f"idle {IDLE_FLOWS} flows",), "cpu_percent", "<=", 1.0, Against.NOTHING),
    Target(f"{IDLE_FLOWS} idle flows, p50 with them to without", (f"idle {IDLE_FLOWS} flows",), "p50_ratio", "<=", 1.1, Against.NOTHING),
    Target("start, seconds to the guest's first connection", ("start",), "seconds", "<=", 0.5, Against.NOTHING),
    Target("memory at rest, MiB PSS", ("memory",), "pss_rest_mib", "<=", 64.0, Against.NOTHING),
)


class Cell(NamedTuple):
    """One row at one MTU, ringnet against what it is measured by."""

    mtu: int
    row: str
    ratio: Summary  # the figure itself for Against.NOTHING
    other: str  # name of the best peer, or of what else

    def reaches(self, target: Target) -> bool:
        return self.ratio.median >= target.bound if target.op == ">=" else self.ratio.median <= target.bound


class Outcome(NamedTuple):
    target: Target
    cells: list[Cell]

    def reached(self) -> int:
        return sum(c.reaches(self.target) for c in self.cells)

    def worst(self) -> Cell:
        pick = min if self.target.op == ">=" else max
        return pick(self.cells, key=lambda c: c.ratio.median)

    def nearness(self) -> float:
        """1 and more: reached by all; 0.8: the worst cell has 80 % of what it needs."""
        worst, bound = self.worst().ratio.median, self.target.bound
        return worst / bound if self.target.op == ">=" else bound / worst if worst else float("inf")


def best_peer(results: Results, mtu: int, row: str, figure: str, prefix: str = "") -> tuple[str, list[float]] | None:
    """The peer with the best median of this cell, and its runs."""
    peers = [(name, v) for name in results.drivers("peer") if name.startswith(prefix)
             and (v := results.values(mtu, row, name, figure))]
    if not peers:
        return None
    pick = max if FIGURES[figure][0] == MORE else min
    return pick(peers, key=lambda p: summary(p[1]).median)


def _other(results: Results, target: Target, mtu: int, row: str, ours: str) -> tuple[str, list[float]] | None:
    match target.against:
        case Against.PEER:
            return best_peer(results, mtu, row, target.figure)
        case Against.PASTA:
            return best_peer(results, mtu, row, target.figure, "pasta")
        case Against.KERNEL:
            name = next(iter(results.drivers("kernel")), "")
            return (name, v) if (v := results.values(mtu, row, name, target.figure)) else None
        case Against.ITSELF:
            v = results.values(mtu, target.other_row, ours, target.figure)
            return (target.other_row, v) if v else None
        case Against.NOTHING:
            return "", [1.0]


def _cells(results: Results, target: Target, ours: str) -> Iterator[Cell]:
    for row in target.rows:
        for mtu in results.mtus(row):
            values = results.values(mtu, row, ours, target.figure)
            if (target.mtus is not None and mtu not in target.mtus) or not values:
                continue
            other = _other(results, target, mtu, row, ours)
            if other is None:
                continue
            of = summary(values) if target.against is Against.NOTHING else ratio(values, other[1])
            if of is not None:
                yield Cell(mtu, row, of, other[0])


def outcomes(results: Results, ours: str) -> list[Outcome]:
    """Of the targets for which something of this ringnet was measured."""
    if ours not in results.drivers("ringnet"):
        return []
    found = (Outcome(t, list(_cells(results, t, ours))) for t in TARGETS)
    return [o for o in found if o.cells]
