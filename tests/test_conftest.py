"""The rules in conftest.py hold: a skip fails a CI run, and what a test leaves behind fails the run."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parent / "conftest.py"


def nested(tmp_path: Path, body: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A pytest run of its own, with our conftest, over one file."""
    (tmp_path / "test_nested.py").write_text(body)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "RINGNET_TEST")) and k != "CI"}
    # imported, not copied: it finds netlab.py beside itself
    (tmp_path / "conftest.py").write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('rules', {str(CONFTEST)!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "globals().update({k: v for k, v in vars(module).items() if not k.startswith('__')})\n")
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1"]
    return subprocess.run(argv, cwd=tmp_path, text=True, env={**clean, **env}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=100)


SKIPPED = "import pytest\ndef test_a():\n    pytest.skip('no such thing here')\ndef test_b():\n    pass\n"
SKIPPED_MODULE = "import pytest\npytest.importorskip('no_such_module_anywhere')\ndef test_b():\n    pass\n"


@pytest.mark.parametrize("body", [SKIPPED, SKIPPED_MODULE], ids=["test", "module"])
def test_a_skip_fails_in_ci_only(tmp_path: Path, body: str) -> None:
    assert nested(tmp_path, body).returncode in (0, 5)  # 5: nothing collected
    done = nested(tmp_path, body, CI="true")
    assert done.returncode not in (0, 5), done.stdout
    assert "skipped in CI" in done.stdout


def test_a_process_left_behind_fails_the_run(tmp_path: Path) -> None:
    body = ("import subprocess\ndef test_a():\n    p = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
            "    open('pid', 'w').write(str(p.pid))\n")
    done = nested(tmp_path, body)
    try:
        assert done.returncode == 1, done.stdout
        assert re.search(r"left behind.*process \d+: sleep 1000", done.stdout, re.S)
        assert "1 passed" in done.stdout
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)


@pytest.mark.root
def test_a_namespace_left_behind_fails_the_run_and_is_removed(tmp_path: Path) -> None:
    body = ("import netlab, os\ndef test_a():\n    ns = netlab.Netns('h')\n    ns.__enter__()\n"
            "    open('name', 'w').write(ns.name)\n")
    done = nested(tmp_path, body)
    assert done.returncode == 1, done.stdout
    name = (tmp_path / "name").read_text()
    assert f"network namespace {name}" in done.stdout
    assert not Path("/run/netns", name).exists()
