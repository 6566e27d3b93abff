"""Every known fault has a test that would fail on it, or stands among those that wait, with the reason."""
from __future__ import annotations

import pytest

from tests.conformance.table import entries
from tests.faults.faults import FAULTS, PARTS, WAITS

COVERED = {n: [e.test for e in entries() if n in e.faults] for n in FAULTS}


def test_the_list_is_whole() -> None:
    assert list(FAULTS) == list(range(1, 43))
    assert {n for e in entries() for n in e.faults} <= set(FAULTS)
    assert not set(WAITS) & set(PARTS)


@pytest.mark.parametrize("number", FAULTS)
def test_is_covered_or_waits(number: int) -> None:
    if number in WAITS:
        assert COVERED[number] == [], f"fault {number} is tested now: take it out of WAITS"
    else:
        assert COVERED[number], f"no test for fault {number}: {FAULTS[number]}"
