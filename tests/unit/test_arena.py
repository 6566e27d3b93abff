"""The arena one call at a time: who gets a buffer, which descriptors are believed, how buffers come back."""
from __future__ import annotations

import errno
import os
import struct

import pytest

from shm._dataplane import ffi, lib
from shm.arena import Arena
from shm.memory import LayoutMismatch
from shm.ring import Desc

HLEN, SMALL, LARGE = lib.RN_BUF_HLEN, lib.RN_BUF_SMALL, lib.RN_BUF_LARGE
ETH = HLEN + 18
PARTS = [(4, 2), (0, 0), (3, 0)]


@pytest.fixture
def arena():
    with Arena.create(PARTS) as a:
        yield a


@pytest.fixture
def bell():
    fd = lib.rn_bell_new()
    yield fd
    os.close(fd)


def take_all(pool, *, large=False):
    found = []
    while (d := pool.take(large=large)) is not None:
        found.append(d)
    return found


@pytest.mark.parametrize("parts", [[], [(1, 1)] * 9, [(2**20 + 1, 0)], [(0, 2**32 - 1)]])
def test_bounds_of_create(parts):
    with pytest.raises(LayoutMismatch, match="arena"):
        Arena.create(parts)


def test_check_tells_what_is_wrong(arena):
    assert lib.rn_arena_check(ffi.NULL, arena.size) == -errno.EINVAL
    assert lib.rn_arena_check(arena.mem + 8, arena.size) == -errno.EINVAL
    assert lib.rn_arena_check(arena.mem, arena.size - 1) == -errno.EMSGSIZE
    struct.pack_into("I", arena.buffer(), 4, 99)
    assert lib.rn_arena_check(arena.mem, arena.size) == -errno.EPROTO


@pytest.mark.parametrize("value", [0, 8, 4096 + 1, 2**40, 2**64 - 64])
@pytest.mark.parametrize("field", [64, 72])  # small_off, large_off of part 0
def test_a_part_outside_the_arena_is_refused(arena, field, value):
    struct.pack_into("Q", arena.buffer(), field, value)
    with pytest.raises(LayoutMismatch, match="another build"):
        arena.pool(0)


def test_no_such_part(arena):
    with pytest.raises(LayoutMismatch, match="part 3"):
        arena.pool(3)


def test_buffers_are_apart_and_counted(arena):
    pool = arena.pool(0)
    assert (pool.free(), pool.free(large=True)) == (4, 2)
    small, large = take_all(pool), take_all(pool, large=True)
    assert (len(small), len(large)) == (4, 2)
    spans = sorted([(d.off - ETH, SMALL) for d in small] + [(d.off - ETH, LARGE) for d in large])
    assert all(a + n <= b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][0] + spans[-1][1] <= arena.size
    assert all(start % 64 == 0 for start, _ in spans)
    assert (pool.free(), pool.free(large=True)) == (0, 0)


def test_last_freed_is_first_reused(arena):
    pool = arena.pool(0)
    a, b, c = (pool.take() for _ in range(3))
    pool.give(b)
    pool.give(a)
    assert [pool.take().off, pool.take().off] == [a.off, b.off]
    assert c.off not in (a.off, b.off)


def test_a_stage_without_a_part_gets_nothing(arena):
    for pool in (arena.pool(1), arena.pool(0, owner=False)):
        assert pool.take() is None
        assert pool.free() == 0
        assert pool.arm() is False


def test_descriptor_of_an_earlier_use_is_refused(arena):
    pool = arena.pool(0)
    old = pool.take()
    pool.give(old)
    new = pool.take()
    assert new.off == old.off
    assert pool.holds(new)
    assert not pool.holds(old)
    with pytest.raises(ValueError, match="no such buffer"):
        pool.give(old)


@pytest.mark.parametrize("large", [False, True])
def test_frame_must_lie_in_one_buffer(arena, large):
    pool = arena.pool(0)
    d = pool.take(large=large)
    start, size = d.off - ETH, LARGE if large else SMALL

    def held(off: int, length: int) -> bool:
        return arena.pool(2).holds(Desc(off, length, 0, d.gen))

    assert held(d.off, 0)
    assert held(d.off, size - ETH)
    assert not held(d.off, size - ETH + 1)
    assert not held(d.off, 2**32 - 1)
    assert held(start + HLEN + 12, 1), "a virtio-net header fits in front"
    assert not held(start + HLEN + 11, 1)
    assert not held(start + HLEN - 1, 1)
    assert not held(start, 1)
    assert held(start + size - 1, 1)
    assert not held(start + size - 1, 2)


@pytest.mark.parametrize("off", [0, 64, 4095, 2**32, 2**63, 2**64 - 1, 2**64 - 64])
def test_offset_outside_all_parts_is_refused(arena, off):
    pool = arena.pool(0)
    pool.take()
    assert not pool.holds(Desc(off, 1, 0, 0))
    assert not pool.holds(Desc(off, 1, 0, 1))


def test_offsets_around_the_end_are_refused(arena):
    pool = arena.pool(2)
    last = max(d.off for d in take_all(pool)) - ETH
    assert pool.holds(Desc(last + SMALL - 1, 1, 0, 1))
    assert not pool.holds(Desc(last + SMALL, 1, 0, 1))
    assert not pool.holds(Desc(arena.size, 1, 0, 1))


def test_a_rewritten_header_is_not_believed(arena):
    pool = arena.pool(0)
    d = pool.take()
    base = d.off - ETH
    for part, cls in ((1, 0), (0, 1), (7, 0)):
        struct.pack_into("HH", arena.buffer(), base + 12, part, cls)
        assert not pool.holds(d)
    struct.pack_into("HH", arena.buffer(), base + 12, 0, 0)
    assert pool.holds(d)


def test_another_stage_returns_by_the_list(arena):
    owner, other = arena.pool(0), arena.pool(1, owner=False)
    taken = take_all(owner) + take_all(owner, large=True)
    assert other.give_many(taken) == 6
    assert (owner.free(), owner.free(large=True)) == (4, 2)
    again = take_all(owner) + take_all(owner, large=True)
    assert sorted(d.off for d in again) == sorted(d.off for d in taken)


def test_allocation_looks_at_the_return_list(arena):
    owner, other = arena.pool(0), arena.pool(1, owner=False)
    taken = take_all(owner)
    other.give(taken[2])
    assert owner.take().off == taken[2].off
    assert owner.take() is None


@pytest.mark.parametrize("by_owner", [True, False])
def test_a_buffer_given_back_twice_is_taken_once(arena, by_owner):
    owner = arena.pool(0)
    freer = owner if by_owner else arena.pool(1, owner=False)
    taken = take_all(owner)
    freer.give(taken[1])
    freer.give(taken[0])
    freer.give(taken[1])
    freer.give(taken[0])
    assert owner.free() == 2
    assert {owner.take().off, owner.take().off} == {taken[0].off, taken[1].off}
    assert owner.take() is None


def test_a_forged_return_list_is_survived(arena):
    """A taken-over stage can write any links: at worst buffers are lost, none is handed out twice."""
    owner, other = arena.pool(0), arena.pool(1, owner=False)
    taken = take_all(owner)
    other.give(taken[0])
    other.give(taken[1])
    buf = arena.buffer()
    for link in (1, 2, 3, 6, 7, 2**31, 2**32 - 1):
        struct.pack_into("I", buf, taken[0].off - ETH + 8, link)  # next
        struct.pack_into("I", buf, taken[1].off - ETH + 8, link)
        struct.pack_into("I", buf, 128, link)  # part 0: returned
        owner.free()
        seen = [d.off for d in take_all(owner) + take_all(owner, large=True)]
        assert len(seen) == len(set(seen)) <= 6


def test_a_starved_owner_is_woken_once(arena, bell):
    owner, other = arena.pool(0), arena.pool(1, owner=False)
    other.bell(0, bell)
    taken = take_all(owner)
    other.give(taken[0])
    with pytest.raises(BlockingIOError):
        os.read(bell, 8)  # nobody asked
    assert owner.take() is not None
    assert owner.take() is None
    assert owner.arm() is False
    other.give(taken[1])
    other.give(taken[2])
    assert struct.unpack("Q", os.read(bell, 8)) == (1,)
    assert other.wakes == 1


def test_an_owner_does_not_sleep_on_a_buffer_it_has_not_seen(arena, bell):
    owner, other = arena.pool(0), arena.pool(1, owner=False)
    other.bell(0, bell)
    taken = take_all(owner)
    assert owner.take() is None
    other.give(taken[0])
    assert owner.arm() is True
    other.give(taken[1])
    with pytest.raises(BlockingIOError):
        os.read(bell, 8)  # withdrawn


def test_a_successor_leaves_out_what_others_hold(arena):
    first, other = arena.pool(0), arena.pool(1, owner=False)
    taken = take_all(first)
    holder = taken[0].off - ETH
    struct.pack_into("I", arena.buffer(), holder, 1 + 1)  # stage 1 has this one
    other.give(taken[1])  # on the return list
    del first  # died with taken[2] and taken[3] in its hands
    second = arena.pool(0, recover=True)
    back = take_all(second)
    assert sorted(d.off for d in back) == sorted(d.off for d in taken[1:])
    other.give(taken[0])
    assert second.free() == 1


def test_longest_frames_fit(arena):
    pool = arena.pool(0)
    assert pool.take(SMALL - ETH) is not None
    assert pool.take(LARGE - ETH, large=True) is not None
    assert LARGE - ETH >= 65535 + 14
    with pytest.raises(ValueError, match="does not fit"):
        pool.take(SMALL - ETH + 1)


def test_usage_says_who_holds_what(arena):
    owner, other = arena.pool(0), arena.pool(2)
    taken = [owner.take(), owner.take(), owner.take()]
    owner.take(large=True)
    struct.pack_into("I", arena.buffer(), taken[0].off - ETH, 2 + 1)  # handed to stage 2
    other.give(taken[1])
    small, large = arena.usage(0)
    assert (small.total, small.held, small.returned, small.free) == (4, {0: 1, 2: 1}, 1, 2)
    assert (large.total, large.held, large.returned, large.free) == (2, {0: 1}, 0, 1)
    struct.pack_into("I", arena.buffer(), taken[2].off - ETH, 4711)  # a hostile stage's word
    assert arena.usage(0)[0].held == {2: 1, -1: 1}
    assert [u.total for u in arena.usage(1)] == [0, 0]
    with Arena.look(arena.fd, arena.size) as seen:
        assert seen.usage(0) == arena.usage(0)
    with pytest.raises(LayoutMismatch, match="part 3"):
        arena.usage(3)
