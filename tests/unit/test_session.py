"""Stage cells and counters: what is refused, what is read, and that Python's names are C's."""
from __future__ import annotations

import errno
import os
import struct

import pytest

from shm._dataplane import ffi, lib
from shm.cell import Counter, Session, State, counters, counters_of
from shm.memory import LayoutMismatch
from shm.ring import Ring
from shm.view import MemoryView


@pytest.fixture
def session():
    with Session.create(5) as s:
        yield s


@pytest.fixture
def stage(session):
    """Row 2, attached as a stage does it, generation 3."""
    s = lib.rn_stage_new(2, 3)
    assert lib.rn_stage_set_session(s, session.mem, session.size) == 0
    yield s
    lib.rn_stage_free(s)


@pytest.mark.parametrize("stages", [0, 9, 2**32 - 1])
def test_bounds_of_create(stages):
    with pytest.raises(LayoutMismatch, match="session"):
        Session.create(stages)


def test_check_tells_what_is_wrong(session):
    assert lib.rn_session_check(ffi.NULL, session.size) == -errno.EINVAL
    assert lib.rn_session_check(session.mem + 4, session.size) == -errno.EINVAL
    assert lib.rn_session_check(session.mem, session.size - 1) == -errno.EMSGSIZE


@pytest.mark.parametrize(("offset", "value"), [(0, 0), (4, 2), (8, 9), (12, 1)])  # magic, version, stages, counters
def test_attach_refuses_another_layout(session, offset, value):
    struct.pack_into("I", session.buffer(), offset, value)
    with pytest.raises(LayoutMismatch, match="session: made by another build"):
        Session.attach(os.dup(session.fd), session.size)


def test_a_fresh_row_is_absent(session):
    cell = session.cell(0)
    assert (cell.pid, cell.generation, cell.state, cell.stop, cell.asleep) == (0, 0, State.ABSENT, False, False)
    with pytest.raises(LayoutMismatch, match="session, row 8"):
        session.cell(8)


def test_a_stage_writes_its_own_row(session, stage):
    lib.rn_stage_state(stage, lib.RN_ST_RUNNING)
    cell = session.cell(2)
    assert (cell.pid, cell.generation, cell.state) == (os.getpid(), 3, State.RUNNING)
    assert cell.heartbeat_ns > 0
    assert session.cell(1) == session.cell(3)


def test_a_stage_needs_a_row_the_session_has(session):
    s = lib.rn_stage_new(5, 1)
    assert lib.rn_stage_set_session(s, session.mem, session.size) == -errno.EINVAL
    assert b"no row 5" in ffi.string(lib.rn_stage_error(s))
    lib.rn_stage_free(s)
    assert lib.rn_stage_new(8, 1) == ffi.NULL


def test_stop_word(session):
    session.stop(1)
    session.stop(99)  # no such row: nothing happens
    assert [session.cell(i).stop for i in range(5)] == [False, True, False, False, False]


def test_the_table_names_every_counter_once_a_stage():
    seen: set[tuple[str, str]] = set()
    for i, c in enumerate(counters()):
        assert c.index == i
        assert c.help and c.unit
        assert (c.stage, c.name) not in seen
        seen.add((c.stage, c.name))
    assert ("all", "turns") in seen
    assert lib.rn_counter_name(len(counters())) == ffi.NULL
    assert lib.rn_counter_help(2**32 - 1) == ffi.NULL


def test_a_stage_keeps_its_own_counters_and_the_common_ones():
    names = {c.name for c in counters_of("classify")}
    assert {"turns", "drop_bad_descriptor", "arp_replies"} <= names
    assert "tcp_syn" not in names


@pytest.mark.fault(42)
def test_drops_are_known_by_name():
    drop = Counter(index=0, stage="x", name="drop_ip_ttl", unit="frames", help="TTL 0")
    assert drop.is_drop
    assert not Counter(index=0, stage="x", name="turns", unit="turns", help="Batches").is_drop


def test_counters_are_read_by_row_and_name(session):
    index = {c.name: c.index for c in counters()}
    cell_size = 64 + (8 * lib.rn_ncounters() + 63) // 64 * 64
    at = 64 + 2 * cell_size + 64 + 8 * index["frames_in"]
    struct.pack_into("Q", session.buffer(), at, 2**63 + 5)
    assert session.counters(2, "classify")["frames_in"] == 2**63 + 5
    assert session.counters(1, "classify")["frames_in"] == 0
    assert lib.rn_counter_read(session.mem, session.size, 8, index["frames_in"]) == 0
    assert lib.rn_counter_read(session.mem, session.size, 2, len(index)) == 0


def test_a_new_generation_counts_on(session):
    index = {c.name: c.index for c in counters()}
    cell_size = 64 + (8 * lib.rn_ncounters() + 63) // 64 * 64
    struct.pack_into("Q", session.buffer(), 64 + 2 * cell_size + 64 + 8 * index["wakes_sent"], 11)
    s = lib.rn_stage_new(2, 2)
    assert lib.rn_stage_set_session(s, session.mem, session.size) == 0
    lib.rn_stage_fini(s)  # publishes
    assert session.counters(2, "classify")["wakes_sent"] == 11
    lib.rn_stage_free(s)


def test_view_is_read_only_and_whole(session, stage):
    with Ring.create(4) as ring:
        rings = {"a->b": (os.dup(ring.fd), ring.size)}
        with MemoryView(("a", "b", "c"), (os.dup(session.fd), session.size), rings) as view:
            snap = view.read()
            assert [s.name for s in snap.stages] == ["a", "b", "c"]
            assert snap.stages[2].cell.pid == os.getpid()
            assert snap.rings["a->b"].slots == 4
            assert view.flows() == []
            assert view._session.read_only


def test_view_names_the_object_it_cannot_read(session):
    fd = os.dup(session.fd)
    with pytest.raises(LayoutMismatch, match="a->b"):
        MemoryView(("a",), (os.dup(session.fd), session.size), {"a->b": (fd, session.size)})
    with pytest.raises(OSError):
        os.fstat(fd)  # let go of
