"""tools/bench measures, at its smallest: the file and the tables it makes are whole. How fast anything is, is not looked at."""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from netlab import NETNS_DIR, REPO, Program, run_env, sh, stage_pids, wait_gone

sys.path.insert(0, str(REPO / "tools"))

from bench import lab, micro, report, results, rows, where  # noqa: E402
from bench.load import Load  # noqa: E402

pytestmark = [pytest.mark.netns, pytest.mark.root]
ROWS = ("start", "tcp up 1", "tcp rr", "udp down 1400", "flows up 10", "inbound rr")


def bench(*options: str) -> list[str]:
    return [sys.executable, "-P", "-m", "bench", *options]


def env() -> dict[str, str]:
    return run_env() | {"PYTHONPATH": f"{REPO / 'tools'}:{REPO}"}


def namespaces(pid: int) -> list[str]:
    return [n for n in os.listdir(NETNS_DIR) if n.startswith(f"rb{pid}")] if NETNS_DIR.is_dir() else []


def test_a_short_run_writes_every_row_and_leaves_nothing(tmp_path: Path) -> None:
    file, document = tmp_path / "r.json", tmp_path / "doc.md"
    document.write_text(f"{report.MARK}\n{report.END}\n")
    argv = bench("--drivers", "ringnet,kernel", "--rows", ",".join(ROWS), "--mtu", "1500", "--reps", "1", "--secs", "0.4",
                 "--json", str(file), "--docs", str(document))
    with Program(argv, tmp_path / "log", env=env()) as run:
        assert run.wait() == 0, run.output()
        assert namespaces(run.pid) == []
    got = results.read(file)
    assert got.errors() == []
    assert {(r.driver, r.row) for r in got.records} == {(d, r) for d in ("ringnet", "kernel") for r in ROWS} - {
        ("kernel", "start")}
    for r in got.records:
        row = next(x for x in rows.ROWS if x.name == r.row)
        assert r.values[row.figure] > 0 and r.mtu == 1500, r
    by_stage = got.stages(1500, "tcp up 1", "ringnet")
    assert {"guest_tx", "classify", "egress", "guest_rx", "services", "supervisor"} <= set(by_stage)
    assert sum(v[0] for v in by_stage.values()) == pytest.approx(
        got.values(1500, "tcp up 1", "ringnet", "cpu_s_per_GB")[0], rel=0.01)
    text = document.read_text()
    assert text == f"{report.MARK}\n{report.markdown(got)}{report.END}\n"
    for row in ("tcp up 1, Gbit/s", "tcp rr, us", "udp down 1400, Gbit/s", "inbound rr, us", "10 up"):
        assert f"| {row} |" in text


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    argv = bench("--drivers", "kernel,ringnet", "--driver", "broken=false {netns}", "--rows", "tcp rr", "--mtu", "1500",
                 "--reps", "1", "--secs", "0.1", "--json", str(file))
    with Program(argv, tmp_path / "log", env=env()) as run:
        assert run.wait() == 0, run.output()  # a peer that fails is no failure of the run
        assert "broken" in run.output()
    got = results.read(file)
    assert [r.driver for r in got.errors()] == ["broken"]
    assert "- broken, MTU 1500, tcp rr: " in report.markdown(got)


def test_after_kill_9_nothing_runs_on_and_the_next_run_tidies_up(tmp_path: Path) -> None:
    with Program(bench("--drivers", "ringnet", "--rows", "tcp rr", "--mtu", "1500", "--secs", "60", "--json",
                       str(tmp_path / "r.json")), tmp_path / "log", env=env() | {"TMPDIR": str(tmp_path)}) as run:
        while "egress" not in stage_pids(run.pid):
            assert run.process.poll() is None, run.output()
        inside = [int(p) for n in namespaces(run.pid) for p in sh("ip", "netns", "pids", n, check=False).stdout.split()]
        assert inside
        run.process.send_signal(signal.SIGKILL)
        run.wait()
        assert wait_gone(inside) == []
        left = namespaces(run.pid)
        assert left
        lab.reap()
        assert namespaces(run.pid) == []


@pytest.mark.parametrize(("options", "says"), [
    (["--drivers", "nobody"], "--drivers nobody: not one of"),
    (["--rows", "tpc"], "--rows tpc: neither a group"),
    (["--mtu", "small"], "--mtu small"),
    (["--append"], "--append: to which --json FILE?"),
    (["--report", "/nonexistent.json"], "/nonexistent.json: No such file"),
])
def test_bad_input_is_one_line(options: list[str], says: str) -> None:
    done = sh(*bench(*options), check=False, env=env())
    assert done.returncode == 1 and done.stderr.startswith("bench: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_micro_benchmarks_say_what_each_part_costs() -> None:
    done = sh(sys.executable, "-P", "-m", "bench.micro", env=env(), timeout=280)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {r[0] for r in rows[2:]} == set(micro.PARTS)
    for part, case, median, span, _ in rows[2:]:
        low, high = map(float, span.split(".."))
        assert 0 < low <= float(median) <= high, (part, case)


def test_where_tells_calls_and_sleeps_by_stage(tmp_path: Path) -> None:
    """Kernel functions need perf, which a machine may forbid: what it counts is not looked at here."""
    with lab.Lab().fresh() as names, Load(names.host, "serve", "127.0.0.1", "5000", 1) as load:
        load.line(60)
        stages = {load.process.pid: "serving"}
        with where.straced(stages, tmp_path) as counts, Load(names.host, "rr", "127.0.0.1", "5000", 0.2, 1) as asking:
            n = asking.answer(60)["n"]
    calls = counts["serving"]
    assert n <= calls["recvfrom"] <= n + 5 and calls["sendto"] == n and calls["epoll_wait"] >= n
