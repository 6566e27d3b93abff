"""The tables, in Markdown, from a file of results and nothing else."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.results import Results, ResultsError, replaced
from bench.rows import DATAGRAMS, FIGURES, FLOWS, MESSAGES, ROWS, Row
from bench.stats import Summary, ratio, summary
from bench.targets import Against, best_peer, outcomes

MARK = "<!-- generated: bench (tools/bench/run --docs) -->"
END = "<!-- end of generated: bench -->"
NOISY = 10.0  # % of all CPUs that others took
SHOWN_ALONE = ("flows", "idle", "size", "memory", "start")  # groups with a table of their own shape


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(s: Summary) -> str:
    return number(s.median) if s.n == 1 else f"{number(s.median)} ({number(s.low)}..{number(s.high)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(results: Results, mtu: int, row: str, driver: str, figure: str, show: Callable[[Summary], str] = spread) -> str:
    values = results.values(mtu, row, driver, figure)
    if values:
        return show(summary(values))
    return "failed" if any((r.mtu, r.row, r.driver) == (mtu, row, driver) for r in results.errors()) else "-"


def _median(s: Summary) -> str:
    return number(s.median)


def ours(results: Results) -> str:
    """Who is compared with the others: the first ringnet; without one, the first driver at all."""
    return [*results.drivers("ringnet"), *results.drivers()][0]


def measured_rows(results: Results, *groups: str) -> list[tuple[int, Row]]:
    """(MTU, row) of these groups, by MTU."""
    return [(mtu, row) for mtu in results.mtus() for row in ROWS
            if row.group in groups and mtu in results.mtus(row.name)]


def heading(results: Results) -> str:
    meta = results.meta
    versions = "; ".join(f"{name}: {said}" for name, said in meta["versions"].items())
    lines = [f"Measured {meta['date']} on Linux {meta['kernel']}, {meta['cpus']} CPUs ({meta['cpu']}), congestion control "
             f"{meta['congestion']}, ringnet at commit {meta['commit']}" + (f". {versions}" if versions else "") + ".", "",
             *_quiet(results),
             "```sh", *meta["commands"], "```", ""]
    return "\n".join(lines)


def _quiet(results: Results) -> list[str]:
    """How far the figures can be believed."""
    busy = results.others()
    if not busy:
        return []
    s = summary(busy)
    said = f"Before each start of a driver, others kept {number(s.median)} % of the CPUs busy ({number(s.low)}..{number(s.high)})"
    return [said + (": this machine was not quiet." if s.high > NOISY else "."), ""]


def targets_table(results: Results) -> str:
    rows = []
    for o in outcomes(results, ours(results)):
        worst, against = o.worst(), o.target.against
        unit = "" if against is Against.NOTHING else "x "
        by = f" {worst.other}" if against in (Against.PEER, Against.PASTA) else ""
        what = "" if against is Against.NOTHING else o.target.other_row or against.value
        where = f"{worst.row}, MTU {worst.mtu}" if len(o.cells) > 1 else ""
        rows.append([o.target.text, f"{o.target.op} {o.target.bound:g}{unit and 'x'} {what}".strip(),
                     f"{number(worst.ratio.median)}{unit and 'x'}{by}" + (f" ({where})" if where else ""),
                     f"{o.reached()} of {len(o.cells)}",
                     "yes" if o.reached() == len(o.cells) else f"no: {100 * o.nearness():.0f} % of the way"])
    return table(["work", "target", "worst row", "rows that reach it", "reached"], rows) if rows else ""


def compared_table(results: Results) -> str:
    """The main one: ringnet, the best peer and the kernel, row by row, then each peer's own figure."""
    me, kernel = ours(results), next(iter(results.drivers("kernel")), "")
    others = [n for n in results.drivers() if n not in (me, kernel)]
    rows = []
    for mtu, row in measured_rows(results, *(r.group for r in ROWS if r.group not in SHOWN_ALONE)):
        values = results.values(mtu, row.name, me, row.figure)
        best = best_peer(results, mtu, row.name, row.figure)
        to_peer = ratio(values, best[1]) if values and best else None
        theirs = results.values(mtu, row.name, kernel, row.figure)
        to_kernel = ratio(values, theirs) if values and theirs else None
        rows.append([str(mtu), f"{row.name}, {FIGURES[row.figure][1]}", _cell(results, mtu, row.name, me, row.figure),
                     f"{spread(to_peer)} {best[0]}" if to_peer and best else "-",
                     *(_cell(results, mtu, row.name, n, row.figure, _median) for n in others),
                     *([_cell(results, mtu, row.name, kernel, row.figure, _median),
                        _median(to_kernel) if to_kernel else "-"] if kernel else [])])
    head = ["MTU", "work", me, f"{me} / best peer", *others, *([kernel, f"{me} / {kernel}"] if kernel else [])]
    return table(head, rows) if rows else ""


def cpu_table(results: Results) -> str:
    me = ours(results)
    drivers = [n for n in results.drivers() if n not in results.drivers("kernel")]
    bulk = [(mtu, row) for mtu, row in measured_rows(results, "tcp", "udp", "forward") if row.figure == "gbps"]
    stages = sorted({s for mtu, row in bulk for s, spent in results.stages(mtu, row.name, me).items() if max(spent) >= 0.001})
    rows = []
    for mtu, row in bulk:
        values = results.values(mtu, row.name, me, "cpu_s_per_GB")
        best = best_peer(results, mtu, row.name, "cpu_s_per_GB")
        to_peer = ratio(values, best[1]) if values and best else None
        by_stage = results.stages(mtu, row.name, me)
        rows.append([str(mtu), row.name, *(_cell(results, mtu, row.name, n, "cpu_s_per_GB", _median) for n in drivers),
                     f"{_median(to_peer)} {best[0]}" if to_peer and best else "-",
                     *(number(summary(by_stage[s]).median) if s in by_stage else "-" for s in stages)])
    return table(["MTU", "work", *drivers, f"{me} / best peer", *(f"of it {s}" for s in stages)], rows) if rows else ""


def latency_table(results: Results) -> str:
    rows = []
    for mtu, row in measured_rows(results, "rr", "forward"):
        if row.figure != "p50_us":
            continue
        for name in results.drivers():
            values = results.values(mtu, row.name, name, "p50_us")
            if not values:
                continue
            rows.append([str(mtu), row.name, name, *(_cell(results, mtu, row.name, name, f) for f in ("p50_us", "p90_us", "p99_us")),
                         *(_cell(results, mtu, row.name, name, f, _median) for f in ("cpu_us_each", "sleeps_each"))])
    return table(["MTU", "work", "", "p50, us", "p90, us", "p99, us", "CPU, us each", "sleeps each"], rows) if rows else ""


def _growth(results: Results, names: Sequence[tuple[str, str]], figures: Sequence[str], first: str) -> str:
    """A row a size, a column a driver; names: (label, row's name)."""
    drivers = results.drivers()
    rows = [[label, str(mtu), *(" / ".join(_cell(results, mtu, name, d, f, _median) for f in figures) for d in drivers)]
            for label, name in names for mtu in results.mtus(name)]
    return table([first, "MTU", *drivers], rows) if rows else ""


def flows_table(results: Results) -> str:
    return _growth(results, [(f"{n} {way}", f"flows {way} {n}") for way in ("up", "down") for n in FLOWS],
                   ("gbps", "jain"), "flows: Gbit/s / fairness")


def datagram_table(results: Results) -> str:
    return _growth(results, [(f"{n} {way}", f"datagram {way} {n}") for way in ("up", "down") for n in DATAGRAMS],
                   ("gbps", "kpps", "loss_percent"), "bytes: Gbit/s / 1000 datagrams a s / lost %")


def message_table(results: Results) -> str:
    return _growth(results, [(str(n), f"message {n}") for n in MESSAGES], ("p50_us", "p99_us"), "bytes each way: p50 / p99, us")


def itself_table(results: Results) -> str:
    """Start, memory, idle flows."""
    rows = []
    for mtu, row in measured_rows(results, "start", "memory", "idle"):
        shown = {"start": ("seconds",), "memory": ("pss_rest_mib", "pss_load_mib"),
                 "idle": ("cpu_percent", "p50_ratio", "pss_load_mib")}[row.group]
        for figure in shown:
            rows.append([str(mtu), row.name, {"pss_rest_mib": "MiB at rest", "pss_load_mib": "MiB under it", "seconds": "s",
                                              "cpu_percent": "CPU, % of a core", "p50_ratio": "tcp rr p50 with / without"}[figure],
                         *(_cell(results, mtu, row.name, d, figure) for d in results.drivers())])
    return table(["MTU", "", "", *results.drivers()], rows) if rows else ""


def failures(results: Results) -> str:
    seen = dict.fromkeys(f"- {r.driver}, MTU {r.mtu}, {r.row}: {r.error}" for r in results.errors())
    return "\n".join(seen) + "\n" if seen else ""


SECTIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("Targets", targets_table),
    ("Throughput and latency", compared_table),
    ("CPU seconds a GB", cpu_table),
    ("Latency percentiles", latency_table),
    ("Number of flows", flows_table),
    ("Size of datagrams, as many as can be sent", datagram_table),
    ("Size of messages", message_table),
    ("Start, memory, idle flows", itself_table),
    ("Not measured", failures),
)


def markdown(results: Results) -> str:
    parts = [heading(results)]
    for title, make in SECTIONS:
        if body := make(results):
            parts.append(f"### {title}\n\n{body}")
    return "\n".join(parts)


def insert(path: Path, results: Results) -> None:
    try:
        path.write_text(replaced(path.read_text(), MARK, END, markdown(results)))
    except OSError as e:
        raise ResultsError(f"{path}: {e.strerror}") from e
    except ResultsError as e:
        raise ResultsError(f"{path}: {e}") from e
