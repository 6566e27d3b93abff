"""The benchmark's arithmetic and tables: what it says of given figures. Measures nothing (tests/e2e/test_bench.py does)."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO / "tools"))

from bench import compare, drivers, plots, report, results, rows, stats, targets, where  # noqa: E402
from bench.lab import LabError  # noqa: E402
from bench.results import Record, Results, ResultsError  # noqa: E402

from pipeline import procs  # noqa: E402

KINDS = {"ringnet": "ringnet", "pasta": "peer", "slirp4netns": "peer", "kernel": "kernel"}
META = {"kernel": "6.1", "cpus": 2, "cpu": "Z80", "date": "2030-01-02 03:04 UTC", "commit": "abc", "commands": ["run it"],
        "congestion": "cubic", "drivers": KINDS, "versions": {"pasta": "pasta 1"}}
rates = st.floats(1e-3, 1e6)


def made(*records: tuple[int, str, str, dict[str, list[float]]]) -> Results:
    """Results from (mtu, row, driver, figure -> a value a repetition)."""
    found = []
    for mtu, row, driver, figures in records:
        for rep in range(len(next(iter(figures.values())))):
            found.append(Record(mtu, row, driver, rep, {k: v[rep] for k, v in figures.items()}))
    return Results(META, found)


def test_summary_is_the_median_and_the_range() -> None:
    assert stats.summary([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError):
        stats.summary([])


@given(st.lists(rates, min_size=1, max_size=9), st.lists(rates, min_size=1, max_size=9))
def test_a_ratio_lies_in_its_own_range(a: list[float], b: list[float]) -> None:
    r = stats.ratio(a, b)
    assert r is not None and r.low <= r.median <= r.high and r.n == min(len(a), len(b))


def test_ratio_pairs_runs_that_stand_side_by_side() -> None:
    assert stats.ratio([10.0, 40.0], [5.0, 10.0]) == (25 / 7.5, 2.0, 4.0, 2)
    assert stats.ratio([1.0], [0.0]) is None


@given(st.lists(rates, min_size=1, max_size=50))
def test_fairness_is_between_one_for_all_and_one_nth(shares: list[float]) -> None:
    assert 1 / len(shares) - 1e-9 <= stats.jain(shares) <= 1 + 1e-9


def test_fairness_at_its_ends() -> None:
    assert stats.jain([5.0] * 7) == pytest.approx(1)
    assert stats.jain([9.0, 0, 0, 0]) == 0.25
    assert stats.jain([0.0, 0.0]) == 0


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 5), (90, 9), (91, 10), (99, 10), (100, 10)])
def test_percentile_is_the_nearest_rank(percent: float, value: int) -> None:
    assert stats.percentile(range(10, 0, -1), percent) == value


@pytest.mark.parametrize(("argv", "comm", "name"), [
    (["/x/python", "-P", "-m", "pipeline", "stage", "egress", "--control-fd", "3"], "rn-egress", "egress"),
    (["/x/python", "-P", "-m", "pipeline", "attach", "/run/netns/g"], "python", "supervisor"),
    (["pasta", "-f"], "pasta.avx2", "pasta.avx2"),
])
def test_processes_are_told_apart_by_stage(argv: list[str], comm: str, name: str) -> None:
    assert procs.stage_of(argv, comm) == name


def test_usage_of_this_process_grows() -> None:
    import os

    before = procs.usage(os.getpid())
    sum(range(2_000_000))
    spent = procs.total(procs.spent(before, procs.usage(os.getpid())))
    assert spent.cpu_s > 0.001 and procs.pss_mib(os.getpid()) > 1
    assert procs.usage(None) == {} and procs.pss_mib(None) == 0


def test_a_busy_machine_is_said_so() -> None:
    r = bulk(20, 4, 1, 40)
    assert "others kept" not in report.markdown(r)
    for rec in r.records:
        rec.others_percent = 2.0
    assert "others kept 2 % of the CPUs busy (2..2).\n" in report.markdown(r)
    assert 0 <= procs.busy_percent(0.05) <= 100
    r.records[-1].others_percent = r.records[-2].others_percent = 50.0
    assert "(2..50): this machine was not quiet." in report.markdown(r)


def test_rows_are_chosen_by_group_name_or_beginning() -> None:
    assert [r.name for r in rows.chosen(["flows up 10"])] == ["flows up 10"]  # not flows up 100
    assert [r.name for r in rows.chosen(["tcp rr", "tcp up"])] == ["tcp up 1", "tcp up 8", "tcp rr"]
    assert {r.group for r in rows.chosen(["udp", "idle"])} == {"udp", "idle"}
    for wrong in ("tpc", ""):
        with pytest.raises(LabError, match="neither a group"):
            rows.chosen([wrong])


def test_rows_have_figures_that_are_declared_and_names_of_their_own() -> None:
    assert {r.figure for r in rows.ROWS} <= set(rows.FIGURES)
    assert len({r.name for r in rows.ROWS}) == len(rows.ROWS)
    for t in targets.TARGETS:
        assert t.figure in rows.FIGURES and t.op in (">=", "<=")
        assert {*t.rows, *filter(None, [t.other_row])} <= {r.name for r in rows.ROWS}


def test_drivers_take_turns_and_none_is_always_first() -> None:
    known = list(drivers.builtin().values())
    plan = compare.Plan(known, (1500, 4000), rows.ROWS, reps=len(known), secs=1)
    order = [(rep, mtu, d.name) for rep, mtu, d in compare.turns(plan)]
    assert len(order) == len(set(order)) == len(known) * 2 * len(known)
    assert {name for rep, mtu, name in order[::len(known)]} == set(KINDS)
    by_name = {r.name: r for r in rows.ROWS}
    assert compare.due(by_name["flows up 10"], known[0], 1500, plan)
    assert not compare.due(by_name["flows up 10"], known[0], 4000, plan)
    assert not compare.due(by_name["start"], drivers.builtin()["kernel"], 1500, plan)


def test_drivers_from_the_command_line() -> None:
    assert drivers.custom("x=y --netns {netns}") == drivers.Driver("x", "peer", "y --netns {netns}")
    more = drivers.custom("slow=+--debug")
    assert more.kind == "ringnet" and more.command.endswith("--debug") and "pipeline attach" in more.command
    assert "pasta25" in drivers.builtin("/opt/pasta") and "pasta25" not in drivers.builtin()
    for wrong in ("x", "x=", "=y"):
        with pytest.raises(LabError, match="NAME=COMMAND"):
            drivers.custom(wrong)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    r = made((1500, "tcp rr", "ringnet", {"p50_us": [1.5, 2.5]}))
    r.records.append(Record(1500, "tcp rr", "pasta", 0, error="it is broken"))
    r.records[0].stages = {"egress": 0.25}
    path = tmp_path / "r.json"
    r.write(path)
    assert results.read(path) == r
    assert r.next_rep() == 2 and r.errors() == r.records[-1:]


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 99}', '{"schema": 1, "meta": {}, "records": [{"x": 1}]}', "[1]"])
def test_a_file_that_is_something_else_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match="odd.json"):
        results.read(path)
    with pytest.raises(ResultsError, match="none.json"):
        results.read(tmp_path / "none.json")


def test_only_what_belongs_together_is_joined() -> None:
    old, new = made((1500, "tcp rr", "ringnet", {"p50_us": [1.0]})), made((1500, "tcp rr", "ringnet", {"p50_us": [3.0]}))
    new.meta = META | {"commands": ["again"]}
    both = results.joined(old, new)
    assert both.values(1500, "tcp rr", "ringnet", "p50_us") == [1.0, 3.0]
    assert both.meta["commands"] == ["run it", "again"]
    new.meta = META | {"commit": "def"}
    with pytest.raises(ResultsError, match="commit"):
        results.joined(old, new)


def bulk(ours: float, pasta: float, slirp: float, kernel: float, mtu: int = 1500) -> Results:
    return made(*((mtu, row, name, {"gbps": [v, v, v]}) for row in targets.BULK for name, v in
                  (("ringnet", ours), ("pasta", pasta), ("slirp4netns", slirp), ("kernel", kernel))))


def outcome(r: Results, text: str) -> targets.Outcome:
    return next(o for o in targets.outcomes(r, "ringnet") if o.target.text == text)


def test_a_target_counts_the_best_peer_row_by_row() -> None:
    r = bulk(20, 4, 1, 30)
    o = outcome(r, "TCP bulk at MTU 1500")
    assert (o.reached(), len(o.cells), o.worst().other, o.nearness()) == (5, 5, "pasta", 1.25)
    r.records += made((1500, "tcp up 8", "slirp4netns", {"gbps": [10.0] * 4})).records  # now the best one there
    o = outcome(r, "TCP bulk at MTU 1500")
    assert o.reached() == 4 and (o.worst().row, o.worst().other) == ("tcp up 8", "slirp4netns")
    assert o.nearness() == pytest.approx(0.5)


def test_a_target_for_less_is_reached_from_below() -> None:
    r = made(*((1500, row, name, {"p50_us": [v], "p99_us": [2 * v]}) for row in ("tcp rr", "udp rr")
               for name, v in (("ringnet", 90.0), ("pasta", 100.0), ("slirp4netns", 10.0))))
    p50 = outcome(r, "request and response, p50")  # slirp4netns is no pasta
    assert p50.reached() == 2 and p50.worst().ratio.median == 0.9
    r.records += made((1500, "udp rr", "ringnet", {"p50_us": [200.0] * 3, "p99_us": [1.0] * 3})).records
    assert outcome(r, "request and response, p50").reached() == 1


def test_targets_without_measurements_are_not_reported() -> None:
    assert targets.outcomes(Results(META, []), "ringnet") == []
    only = bulk(20, 4, 1, 30, mtu=4000)
    assert "TCP bulk at MTU 1500" not in {o.target.text for o in targets.outcomes(only, "ringnet")}


def test_flows_are_compared_with_ringnets_own_other_row() -> None:
    r = made((1500, "flows up 8", "ringnet", {"gbps": [10.0], "jain": [1.0]}),
             (1500, "flows up 1000", "ringnet", {"gbps": [7.0], "jain": [0.95]}))
    total = outcome(r, "1000 flows, total against 8 flows")
    assert total.reached() == 0 and total.worst().ratio.median == pytest.approx(0.7)
    assert outcome(r, "1000 flows, Jain's fairness index").reached() == 1


def test_the_tables_show_figures_ratios_and_failures() -> None:
    r = bulk(20, 4, 1, 40)
    r.records.append(Record(1500, "udp up 1400", "ringnet", 0, {"gbps": 1.5, "cpu_s_per_GB": 2.0}, {"egress": 1.25}))
    r.records.append(Record(1500, "udp up 1400", "pasta", 0, error="no hello came back"))
    text = report.markdown(r)
    row = next(line for line in text.splitlines() if "| tcp up 1, Gbit/s |" in line)
    assert [c.strip() for c in row.strip("|").split("|")] == [
        "1500", "tcp up 1, Gbit/s", "20 (20..20)", "5 (5..5) pasta", "4", "1", "40", "0.5"]
    assert "| 1500 | udp up 1400 | 2 | failed | - | - | 1.25 |" in text  # CPU: egress
    assert "- pasta, MTU 1500, udp up 1400: no hello came back" in text and "| failed |" in text
    assert "2030-01-02" in text and "Linux 6.1" in text and "commit abc" in text and "run it" in text
    assert "| TCP bulk at MTU 1500 | >= 4x best peer | 5x pasta (tcp up 1, MTU 1500) | 5 of 5 | yes |" in text


@pytest.mark.parametrize(("value", "text"), [(0.000123, "0.000123"), (1.2345, "1.23"), (99.96, "100"), (1234567.0, "1234567")])
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_document_keeps_what_is_around_its_marks(tmp_path: Path) -> None:
    r = bulk(20, 4, 1, 40)
    path = tmp_path / "doc.md"
    path.write_text(f"before\n{report.MARK}\nold\n{report.END}\nafter\n")
    report.insert(path, r)
    once = path.read_text()
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once and "Gbit/s" in once
    report.insert(path, r)
    assert path.read_text() == once
    path.write_text("no marks")
    with pytest.raises(ResultsError, match="doc.md.*needs one line"):
        report.insert(path, r)


def test_pictures_without_matplotlib_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotsError, match=r"ringnet\[plots\]"):
        list(plots.draw(bulk(20, 4, 1, 40), tmp_path))


STRACE = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000300           3       100           epoll_wait
 40.00    0.000200           2       101         7 read
------ ----------- ----------- --------- --------- ----------------
100.00    0.000500           2       201         7 total
"""


def test_counts_are_read_from_strace() -> None:
    assert where.strace_counts(STRACE) == {"epoll_wait": 100, "read": 101}
    assert where.strace_counts("") == {}


def test_shares_are_read_from_perf_and_sorted_by_what_they_are_for() -> None:
    text = "# Overhead;Symbol\n#\n 60.11% ;[k] _copy_to_iter  ;-  -\n  9.50%;[.] rn_stage_run;-\n"
    assert where.perf_shares(text) == [("_copy_to_iter", True, 0.6011), ("rn_stage_run", False, 0.095)]
    kinds = {"_copy_to_iter": "copy", "finish_task_switch.isra.0": "wake, switch", "tcp_ack": "TCP, IP, veth",
             "tun_get_user": "guest's link (tap)", "ep_send_events": "epoll", "kmem_cache_free": "memory",
             "entry_SYSCALL_64": "system call entry", "zzz": "other kernel"}
    assert {symbol: where.kind_of(symbol, kernel=True) for symbol in kinds} == kinds
    assert where.kind_of("tcp_ack", kernel=False) == "our own code"
