"""tools/bench/links: its guest really gets a connection through each link, both ways, and counts what arrived. What it says of
speed is not looked at."""
from __future__ import annotations

import sys

import pytest
from netlab import REPO

sys.path.insert(0, str(REPO / "tools"))

from bench import links  # noqa: E402


@pytest.mark.parametrize(("target", "mode", "mtu"), [
    ("ringnet stream", "tcp-down", 1500), ("ringnet socketpair", "tcp-up", 1500), ("ringnet stream", "udp-small", 1500),
    ("ringnet socketpair", "tcp-down", 65520)])
def test_the_guest_in_user_space(target: str, mode: str, mtu: int) -> None:
    assert links.measure(target, mode, mtu, 0.2) > 0
