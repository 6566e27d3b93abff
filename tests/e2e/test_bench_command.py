"""`ringnet bench` measures, with root and without, and leaves nothing. How fast anything is, is not looked at."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from netlab import RINGNET, PlainUser, run_env, sh

from pipeline.bench import FIGURES

pytestmark = pytest.mark.netns
SHORT = ("--secs", "0.1", "--json")


@pytest.mark.root
def test_all_programs_side_by_side(tmp_path: Path) -> None:
    scratch = tmp_path / "t"
    scratch.mkdir()
    done = sh(*RINGNET, "bench", *SHORT, check=False, timeout=120, env=run_env() | {"TMPDIR": str(scratch)})
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert [r["name"] for r in found["rows"]] == ["ringnet", "pasta", "slirp4netns"]
    for row in found["rows"]:
        assert not row.get("error") and row["figures"].keys() == FIGURES.keys(), row
        assert all(v > 0 for v in row["figures"].values()), row
    assert list(scratch.iterdir()) == []


@pytest.mark.root
def test_without_root(tmp_path: Path) -> None:
    user = PlainUser(tmp_path)
    done = sh(*user.ringnet("bench", "--only", "ringnet", *SHORT), check=False, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["rows"][0]["figures"].keys() == FIGURES.keys()


@pytest.mark.root
def test_what_is_missing_is_said(tmp_path: Path) -> None:
    user = PlainUser(tmp_path)
    done = sh(*user.ringnet("bench", "--only", "ringnet", *SHORT, tun=False,
                            before="mount -t tmpfs -o mode=755 tmpfs /dev/net"), check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ringnet bench: cannot open /dev/net/tun: ") and "modprobe tun" in done.stderr
