from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.processors import processors


@pytest.mark.parametrize(("quotas", "most"), [
    ({}, None),
    ({"a/b": "max 100000"}, None),
    ({"a/b": "50000 100000"}, 0.5),
    ({"a": "150000 100000", "a/b": "max 100000"}, 1.5),
    ({"": "20000 20000", "a/b": "400000 100000"}, 1.0),
    ({"a/b": "nonsense"}, None),
    ({"c": "1000 100000"}, None),  # another's
])
def test_the_least_of_affinity_and_quotas(tmp_path: Path, quotas: dict[str, str], most: float | None) -> None:
    (tmp_path / "groups/a/b").mkdir(parents=True)
    (tmp_path / "groups/c").mkdir()
    (tmp_path / "self").write_text("1:cpu:/x\n0::/a/b\n")
    for group, text in quotas.items():
        (tmp_path / "groups" / group / "cpu.max").write_text(text + "\n")
    cpus = len(os.sched_getaffinity(0))
    assert processors(tmp_path / "groups", tmp_path / "self") == (cpus if most is None else min(cpus, most))


def test_without_control_groups_it_is_the_affinity(tmp_path: Path) -> None:
    assert processors(tmp_path, tmp_path / "none") == len(os.sched_getaffinity(0))
