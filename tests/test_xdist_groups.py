"""The runner itself: tests of one xdist_group land on one worker.

With pytest 9 and xdist 3.8, `--dist loadgroup` silently did not group; tests that share a resource would then
meet. A nested run shows that the versions installed do it right.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

NESTED = '''
import os, pathlib, pytest

def note(group, n):
    pathlib.Path(f"{group}-{n}").write_text(os.environ["PYTEST_XDIST_WORKER"])

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("n", range(8))
def test_one(n):
    note("one", n)

@pytest.mark.xdist_group("two")
@pytest.mark.parametrize("n", range(8))
def test_two(n):
    note("two", n)
'''


def test_a_group_lands_on_one_worker(tmp_path: Path) -> None:
    (tmp_path / "test_nested.py").write_text(NESTED)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"],
                          cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    workers = defaultdict(list)
    for file in tmp_path.glob("*-*"):
        workers[file.name.partition("-")[0]].append(file.read_text())
    assert {group: len(names) for group, names in workers.items()} == {"one": 8, "two": 8}
    assert all(len(set(names)) == 1 for names in workers.values()), dict(workers)
    assert workers["one"][0] != workers["two"][0]  # or a single worker would pass as well
