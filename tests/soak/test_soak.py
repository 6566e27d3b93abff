"""A short soak in the suite (tools/soak: as long as you like), and whether its judge can say no."""
from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.soak import soak
from tests.soak.soak import Process, Rest

LONG = bool(os.environ.get("RINGNET_LONG"))


@pytest.mark.netns
@pytest.mark.timeout(900 if LONG else 200)
def test_nothing_grows(tmp_path: Path) -> None:
    seconds, round_s = (300.0, 30.0) if LONG else (16.0, 4.0)
    done, wrong = soak.run(tmp_path, seconds, round_s, wait=LONG)
    assert wrong == [], done.report()
    assert all(done.done[k] for k in ("bulk", "requests", "connections", "datagrams", "names", "inbound")), done.done


def rests() -> list[Rest]:
    """Ten rests at which nothing grew."""
    one = Rest(at_s=0, processes={"egress": Process(fds=20, memory=10 << 20), "services": Process(fds=9, memory=9 << 20)},
               buffers={"egress large egress": 1}, waiting={"egress->guest_rx": 0}, flows={}, mapped_after=0)
    busy = replace(one, flows={"mapped": 5, "time_wait": 100}, mapped_after=5,
                   processes=one.processes | {"egress": Process(fds=25, memory=(10 << 20) + 5000)})
    return [one, *(replace(busy, at_s=float(n)) for n in range(1, 9)), replace(one, at_s=9.0)]


def test_a_soak_at_which_nothing_grew() -> None:
    assert soak.judge(rests()) == []
    assert soak.judge(rests()[:2]) != []


@pytest.mark.parametrize(("change", "says"), [
    ({"processes": {"egress": Process(fds=26, memory=10 << 20)}}, "egress has 26 descriptors"),
    ({"processes": {"egress": Process(fds=24, memory=10 << 20)}}, "egress has 24 descriptors"),
    ({"buffers": {"egress large egress": 4}}, "4 buffers are held at rest: egress large egress"),
    ({"buffers": {"guest_tx small egress": 3}}, "3 buffers are held at rest: guest_tx small egress"),
    ({"waiting": {"egress->guest_rx": 1}}, "1 frames lie in egress->guest_rx"),
    ({"flows": {"mapped": 5, "established": 1}}, "1 flows are established"),
])
def test_the_judge_says_no(change: dict, says: str) -> None:
    found = rests()
    found[5] = replace(found[5], **{k: v if k == "flows" else getattr(found[5], k) | v for k, v in change.items()})
    (only,) = soak.judge(found)
    assert says in only


def test_mappings_may_time_out_while_processes_are_looked_at() -> None:
    found = rests()
    for fds, right in ((22, False), (23, True), (25, True), (26, False)):
        found[5] = replace(found[5], mapped_after=3, processes=found[4].processes | {"egress": Process(fds=fds, memory=10 << 20)})
        assert (soak.judge(found) == []) is right, fds


def test_the_judge_sees_memory_grow() -> None:
    found = rests()
    found[-1].processes["services"] = Process(fds=9, memory=(9 << 20) + soak.MEMORY_SLACK + 100_000)
    assert soak.judge(found) == ["services has 610 KiB more at the end than when warm"]


def test_every_connection_has_an_end() -> None:
    egress = Counter(tcp_established=10, tcp_closed=7, tcp_reset_by_guest=2)
    assert soak.balance({"egress": egress, "guest_tx": Counter(tcp_reset_by_guest=1)}) == []
    (only,) = soak.balance({"egress": egress})
    assert "10 connections were established" in only
