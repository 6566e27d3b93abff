"""Medians, ranges and ratios of repeated runs."""
from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    median: float
    low: float
    high: float
    n: int


def summary(values: Sequence[float]) -> Summary:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Summary | None:
    """Ratio of the medians, with the least and the greatest ratio of runs that stand side by side.

    Runs pair by position, as they were interleaved; where one side has more, the rest only counts in the median.
    None if theirs are zero: there is nothing to compare with.
    """
    a, b = summary(ours), summary(theirs)
    if b.median == 0:
        return None
    pairs = [x / y for x, y in zip(ours, theirs, strict=False) if y]
    middle = a.median / b.median
    return Summary(middle, min([*pairs, middle]), max([*pairs, middle]), min(a.n, b.n))


def jain(shares: Iterable[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has everything; 0 if nobody has anything."""
    x = list(shares)
    squares = sum(v * v for v in x)
    return sum(x) ** 2 / (len(x) * squares) if squares else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest value that at least `percent` of all do not exceed."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = -(-percent * len(ordered) // 100)  # rounded up
    return ordered[max(0, min(len(ordered), int(rank)) - 1)]
