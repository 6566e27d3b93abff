"""The data plane under AddressSanitizer and UBSan: a part of the suite in CI, more of it with RINGNET_LONG=1."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.sanitize import sanitized

LONG = bool(os.environ.get("RINGNET_LONG"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sanitize")
    sanitized.prepare(path)
    return path


@pytest.mark.xdist_group("sanitize")
@pytest.mark.timeout(3600 if LONG else 1200)
def test_the_suite_passes_without_a_report(tree: Path) -> None:
    status, text, reports = sanitized.run(tree, *(("-n", "auto", *sanitized.LONG) if LONG else ("-n", "0", *sanitized.SHORT)))
    assert reports == [], reports[0][:6000]
    assert status == 0, text[-6000:]


@pytest.mark.xdist_group("sanitize")
@pytest.mark.parametrize(("code", "says"), [
    ("lib.rn_csum_plain(ffi.new('uint8_t[]', 1001), 1002)", "heap-buffer-overflow"),
    ("lib.rn_stage_error(ffi.cast('struct rn_stage *', ffi.new('uint8_t[]', 1 << 20) + 1))", "misaligned"),
], ids=["address", "undefined"])
def test_what_is_wrong_is_reported(tree: Path, code: str, says: str) -> None:
    """The test of the harness: the loaded build is the instrumented one, and each sanitizer's report is where it is looked for."""
    reports = tree / f"proof-{says}"
    reports.mkdir()
    done = subprocess.run([str(sanitized.python(tree)), "-c", f"from shm._dataplane import ffi, lib; {code}"], cwd=tree,
                          env=sanitized.environment(reports), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    (report,) = reports.iterdir()
    assert says in report.read_text() and code[4:].partition("(")[0] in report.read_text()
