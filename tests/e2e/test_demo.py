"""`ringnet demo`: the main job in one command."""
from __future__ import annotations

import pytest
from netlab import RINGNET, Netns, PlainUser

from pipeline.topology import TOPOLOGY, Feature

pytestmark = pytest.mark.netns


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("bulk")
@pytest.mark.parametrize("who", ["root", "plain user"])
def test_demo(host_ns: Netns, who: str, request: pytest.FixtureRequest) -> None:
    argv = [*RINGNET, "demo"]
    if who == "plain user":
        user: PlainUser = request.getfixturevalue("plain_user")
        argv = user.ringnet("demo")
    done = host_ns.run(*argv, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    for program in ("udhcpc", "dig", "ping", "curl"):
        assert program in done.stdout
    table = done.stdout.split("What each stage did")[1].splitlines()
    for stage in TOPOLOGY.only(frozenset({Feature.NIC1})).stages:
        [row] = [line.split() for line in table if line.split()[:1] == [stage.name]]
        assert int(row[2]) > 0, f"{stage.name} took no frame: {row}"  # stage, pid, frames in


def test_a_step_that_fails_ends_the_demo_with_1(host_ns: Netns) -> None:
    """Without the loopback behind the gateway the page cannot be fetched: the demo must notice."""
    done = host_ns.run(*RINGNET, "demo", "--no-host-loopback", check=False, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" in done.stdout
