"""Looking on before going to sleep (csrc/rn_busy_wait.h): where guest and host talk in turn, and nowhere else."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipeline.processors import processors
from shm._dataplane import ffi, lib
from tests.harness import DEADLINE, Wire, fresh_port, udp_server
from tests.wire.test_promotion import udp_settle

STAGES = ("guest_tx", "guest_rx", "egress", "classify")


def waits(wire: Wire) -> dict[str, int]:
    return {stage: wire.counters(stage).get("busy_waits", 0) for stage in STAGES}


@contextmanager
def mapping(wire: Wire) -> Iterator[Callable[[], None]]:
    """A promoted UDP mapping; what it gives is a request and its answer."""
    port = fresh_port()
    with udp_server() as server:
        address = udp_settle(wire, port, server)

        def ask() -> None:
            wire.send_udp(port, server.getsockname()[1], b"question")
            assert server.recv(100) == b"question"
            server.sendto(b"answer", address)
            assert wire.recv_udp(port).data == b"answer"

        yield ask


def test_those_who_answer_each_other_are_waited_for(make_wire: Callable[..., Wire]) -> None:
    """On a busy machine it pays seldom; there it is tried seldom, but not never."""
    if processors() < 2:
        pytest.skip("one CPU: there is nobody to wait for")
    wire = make_wire(promote=2)
    end = time.monotonic() + DEADLINE
    with mapping(wire) as ask:
        while not (waits(wire)["guest_tx"] and waits(wire)["guest_rx"]):
            ask()
            assert time.monotonic() < end, waits(wire)
    counters = wire.counters("guest_tx")
    assert counters["busy_waits"] <= counters["sleeps"]


def test_a_stream_one_way_is_not(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(promote=2)
    with udp_server() as server:
        port = fresh_port()
        udp_settle(wire, port, server)
        for n in range(300):
            if n == 50:
                before = waits(wire)  # the last frame to the guest is long ago
            wire.send_udp(port, server.getsockname()[1], b"%d" % n)
            assert server.recv(100) == b"%d" % n
        assert waits(wire) == before


def test_never_with_0(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(promote=2, busy_wait=0)
    with mapping(wire) as ask:
        for _ in range(300):
            ask()
    assert waits(wire) == dict.fromkeys(STAGES, 0)


def test_never_on_one_cpu(make_wire: Callable[..., Wire]) -> None:
    """Who is waited for could not run."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        wire = make_wire(promote=2)
        with mapping(wire) as ask:
            for _ in range(300):
                ask()
        assert waits(wire) == dict.fromkeys(STAGES, 0)
    finally:
        os.sched_setaffinity(0, cpus)


def test_a_second_is_refused() -> None:
    stage = lib.rn_stage_new(0, 1)
    try:
        assert lib.rn_stage_busy_wait(stage, 1000) == 0
        assert lib.rn_stage_busy_wait(stage, 1001) < 0
        assert "busy wait of 1001 us" in ffi.string(lib.rn_stage_error(stage)).decode()
    finally:
        lib.rn_stage_free(stage)
