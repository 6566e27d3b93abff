"""`ringnet bench`: its table and its command line. It measures in tests/e2e/test_bench_command.py."""
from __future__ import annotations

import pytest

from pipeline import bench, bench_lab
from pipeline.bench import Row, shown
from pipeline.bench_lab import LabError, Task
from pipeline.peers import Driver

FIGURES = {key: 1.25 for key in bench.FIGURES}


def test_the_table_has_a_column_for_each_that_was_measured_and_a_line_for_each_other() -> None:
    text = shown([Row("ringnet", "", FIGURES), Row("pasta", error="not installed (Debian package passt)"),
                  Row("slirp4netns", "1.2", FIGURES)])
    head, _, *lines = text.splitlines()
    assert head.split() == ["ringnet", "slirp4netns"]
    assert lines[-1] == "pasta: not installed (Debian package passt)" and len(lines) == len(FIGURES) + 1
    assert lines[0].split()[-2:] == ["1.25", "1.25"] and lines[3].split()[-2:] == ["1", "1"]
    assert shown([Row("ringnet", error="no")]) == "ringnet: no\n"


@pytest.mark.parametrize(("argv", "says"), [
    (["--secs", "0"], "ringnet bench: --secs 0: not within"), (["--secs", "x"], "invalid float value: 'x'"),
    (["--mtu", "100"], "ringnet bench: --mtu"), (["--only", "qemu"], "--only qemu: qemu is not one of ringnet, pasta, slirp4netns"),
    (["--only", ""], "nothing is not one of"), (["now"], "unrecognized arguments: now"),
])
def test_what_cannot_be_measured_is_said(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(argv) == 2
    assert says in capsys.readouterr().err


def test_a_program_that_is_not_there_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Driver("pasta", "peer", "no-such-program {netns}", package="passt")
    assert list(bench._measure_all([missing], 1500, 1.0)) == [Row("pasta", error="not installed (Debian package passt)")]


def test_a_task_says_what_it_found_or_why_not() -> None:
    def fails() -> None:
        raise LabError("nothing there")

    with Task(lambda: [1, 2]) as task:
        assert task.result(20.0) == [1, 2]
    with Task(fails) as task, pytest.raises(LabError, match="nothing there"):
        task.result(20.0)
    with Task(lambda: bench_lab.signal.pause()) as task, pytest.raises(LabError, match="nothing in 0 s"):
        task.result(0.0)


def test_the_median_of_nothing_is_an_error() -> None:
    assert bench_lab._median_us([3e-6, 1e-6, 2e-6]) == pytest.approx(2)
    with pytest.raises(LabError, match="no answer"):
        bench_lab._median_us([])
