"""Pictures of a file of results. matplotlib is an extra: `pip install ringnet[plots]`."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results import Results
from bench.rows import DATAGRAMS, FLOWS, ROWS
from bench.stats import summary


class PlotsError(Exception):
    """One line: why there are no pictures."""


def _median(results: Results, mtu: int, row: str, driver: str, figure: str) -> float | None:
    values = results.values(mtu, row, driver, figure)
    return summary(values).median if values else None


def _bars(axes: Any, results: Results, mtu: int, group: str, figure: str) -> bool:
    """A cluster of bars a row, a bar a driver with its range. False if there is nothing to show."""
    names = [r.name for r in ROWS if r.group == group and mtu in results.mtus(r.name)]
    drivers = [d for d in results.drivers() if any(results.values(mtu, n, d, figure) for n in names)]
    for i, driver in enumerate(drivers):
        cells = [(x, summary(v)) for x, n in enumerate(names) if (v := results.values(mtu, n, driver, figure))]
        where = [x + (i - (len(drivers) - 1) / 2) * 0.8 / len(drivers) for x, _ in cells]
        axes.bar(where, [s.median for _, s in cells], 0.8 / len(drivers), label=driver,
                 yerr=[[s.median - s.low for _, s in cells], [s.high - s.median for _, s in cells]], error_kw={"linewidth": 0.7})
    axes.set_xticks(range(len(names)), names)
    return bool(drivers)


def _lines(axes: Any, results: Results, sizes: tuple[int, ...], name: str, figure: str) -> bool:
    """name: the row's, with {} for the size."""
    shown = False
    for driver in results.drivers():
        found = [(n, v) for n in sizes for mtu in results.mtus(name.format(n))[:1]
                 if (v := _median(results, mtu, name.format(n), driver, figure)) is not None]
        if found:
            axes.plot([n for n, _ in found], [v for _, v in found], marker="o", label=driver)
            shown = True
    axes.set_xscale("log")
    return shown


def _by_stage(axes: Any, results: Results, mtu: int) -> bool:
    """CPU a GB: a bar a driver and direction, cut by stage."""
    bars = [(f"{d}\n{row.removeprefix('tcp ')}", results.stages(mtu, row, d)) for row in ("tcp up 1", "tcp down 1")
            for d in results.drivers() if results.stages(mtu, row, d)]
    stages = list(dict.fromkeys(s for _, by in bars for s in by))
    bottom = [0.0] * len(bars)
    for stage in stages:
        heights = [summary(by[stage]).median if stage in by else 0.0 for _, by in bars]
        axes.bar(range(len(bars)), heights, 0.7, bottom=bottom, label=stage)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    return bool(bars)


def draw(results: Results, directory: Path) -> Iterator[Path]:
    """Writes SVG files, yields their paths. Raises PlotsError without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("svg")
        matplotlib.rcParams["svg.hashsalt"] = "ringnet"  # the same picture is the same file
        from matplotlib import pyplot
    except ImportError as e:
        raise PlotsError("--plots needs matplotlib: pip install ringnet[plots]") from e
    directory.mkdir(parents=True, exist_ok=True)
    first = results.mtus()[0]
    pictures = [(f"{group}-{mtu}", f"{title}, MTU {mtu}", unit, lambda axes, m=mtu, g=group, f=figure: _bars(axes, results, m, g, f))
                for mtu in results.mtus() for group, figure, title, unit in (
                    ("tcp", "gbps", "TCP", "Gbit/s"), ("rr", "p50_us", "Latency p50", "us"), ("udp", "gbps", "UDP, 2 Gbit/s offered", "Gbit/s"))]
    pictures += [(f"cpu-{mtu}", f"CPU a GB by process, MTU {mtu}", "CPU s/GB", lambda axes, m=mtu: _by_stage(axes, results, m))
                 for mtu in results.mtus()]
    for way in ("up", "down"):
        pictures += [(f"flows-{way}", f"Number of flows, {way}, MTU {first}", "Gbit/s",
                      lambda axes, w=way: _lines(axes, results, FLOWS, f"flows {w} {{}}", "gbps")),
                     (f"fairness-{way}", f"Fairness, {way}, MTU {first}", "Jain's index",
                      lambda axes, w=way: _lines(axes, results, FLOWS, f"flows {w} {{}}", "jain")),
                     (f"datagram-{way}", f"Size of datagrams, {way}, MTU {first}", "Gbit/s",
                      lambda axes, w=way: _lines(axes, results, DATAGRAMS, f"datagram {w} {{}}", "gbps"))]
    for name, title, unit, make in pictures:
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        if make(axes):
            axes.set_title(title)
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
            figure.tight_layout()
            path = directory / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            yield path
        pyplot.close(figure)
