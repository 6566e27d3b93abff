"""The arena under any order of calls, under several freeing processes, and after one of them is killed."""
from __future__ import annotations

import contextlib
import os
import random
import select

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from procs import Fd, spawned

from shm._dataplane import lib
from shm.arena import Arena
from shm.ring import Desc, Ring

PARTS = [(5, 2), (3, 1), (0, 0)]
DEADLINE_S = 60


class ArenaAgainstSets(RuleBasedStateMachine):
    """Two owners and a stage that only frees: a buffer is in one pair of hands at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena.create(PARTS)
        self.pools = [self.arena.pool(0), self.arena.pool(1), self.arena.pool(2, owner=False)]
        self.out: dict[int, tuple[int, bool, Desc]] = {}  # by offset: part, large, descriptor
        self.old: list[Desc] = []

    def teardown(self) -> None:
        self.arena.destroy()

    @rule(row=st.integers(0, 2), large=st.booleans(), length=st.integers(0, 1900))
    def take(self, row: int, large: bool, length: int) -> None:
        d = self.pools[row].take(length, large=large)
        left = PARTS[row][large] - sum(1 for part, size, _ in self.out.values() if (part, size) == (row, large))
        assert (d is None) == (left == 0)
        if d is not None:
            assert d.off not in self.out
            self.out[d.off] = (row, large, d)

    @rule(row=st.integers(0, 2), data=st.data())
    def give(self, row: int, data: st.DataObject) -> None:
        if self.out:
            off = data.draw(st.sampled_from(sorted(self.out)))
            _, _, d = self.out.pop(off)
            self.pools[row].give(d)
            self.old.append(d)

    @rule(row=st.integers(0, 2), data=st.data())
    def give_again(self, row: int, data: st.DataObject) -> None:
        """A stage that frees twice: nobody may lose or gain a buffer by it."""
        free = [d for d in self.old if d.off not in self.out]
        if free:
            with contextlib.suppress(ValueError):
                self.pools[row].give(data.draw(st.sampled_from(free)))

    @invariant()
    def live_descriptors_are_believed_and_dead_ones_are_not(self) -> None:
        for pool in self.pools:
            assert all(pool.holds(d) for _, _, d in self.out.values())
            assert not any(pool.holds(d) for d in self.old if d.off in self.out)

    @invariant()
    def nothing_is_lost(self) -> None:
        for row in (0, 1):
            for large in (False, True):
                out = sum(1 for part, size, _ in self.out.values() if (part, size) == (row, large))
                assert self.pools[row].free(large=large) == PARTS[row][large] - out


ArenaAgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArenaAgainstSets = ArenaAgainstSets.TestCase


def free_what_comes(arena_fd: Fd, arena_size: int, ring_fd: Fd, ring_size: int, row: int, mine: Fd, owner: Fd) -> None:
    """A sink: every frame from the ring is freed, until one of length 0."""
    with Arena.attach(arena_fd, arena_size) as arena, Ring.attach(ring_fd, ring_size) as ring:
        pool, end = arena.pool(row, owner=False), ring.consumer(owner)
        pool.bell(0, owner)
        while True:
            burst = end.peek(16)
            if not burst:
                if not end.arm():
                    if not select.select([mine], [], [], DEADLINE_S)[0]:
                        raise TimeoutError("a wake was lost")
                    lib.rn_bell_quiet(mine)
                    end.disarm()
                continue
            if pool.give_many(d for d in burst if d.len) != sum(1 for d in burst if d.len):
                raise AssertionError("a live descriptor was refused")
            end.consume(len(burst))
            if not burst[-1].len:
                return


def test_an_owner_that_runs_out_is_woken_by_two_stages_that_free():
    """16 buffers, 4000 frames: the owner starves all the time; nothing is handed out twice or lost."""
    frames, rng = 4000, random.Random(5)
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(Arena.create([(16, 0), (0, 0), (0, 0)]))
        rings = [stack.enter_context(Ring.create(32)) for _ in range(2)]
        bells = [lib.rn_bell_new() for _ in range(3)]
        for fd in bells:
            stack.callback(os.close, fd)
        sinks = [
            stack.enter_context(spawned(free_what_comes, Fd(arena.fd), arena.size, Fd(ring.fd), ring.size,
                                        row, Fd(bells[row]), Fd(bells[0])))
            for row, ring in enumerate(rings, start=1)
        ]
        pool = arena.pool(0)
        ends = [ring.producer(bells[row]) for row, ring in enumerate(rings, start=1)]
        sent = 0
        seen_gen: dict[int, int] = {}
        while sent < frames:
            d = pool.take(rng.randrange(60, 1500))
            if d is None:
                for end in ends:
                    end.publish()
                if not pool.arm():
                    assert select.select([bells[0]], [], [], DEADLINE_S)[0], "a wake was lost"
                    lib.rn_bell_quiet(bells[0])
                    pool.disarm()
                continue
            # Each use of a buffer has the next generation: none was handed out in between.
            assert d.gen == (seen_gen.get(d.off, 0) + 1) % 65536
            seen_gen[d.off] = d.gen
            end = rng.choice(ends)
            assert end.room(), "more slots than buffers"
            end.put(d)
            if rng.random() < 0.3:
                end.publish()
            sent += 1
        for end in ends:
            end.put(Desc(0, 0))
            end.publish()
        for sink in sinks:
            sink.join(DEADLINE_S)
            assert sink.exitcode == 0
        assert len(seen_gen) <= 16
        assert pool.free() == 16


def free_one_by_one(arena_fd: Fd, arena_size: int, row: int, descs: list[tuple[int, int, int, int]], owner: Fd) -> None:
    with Arena.attach(arena_fd, arena_size) as arena:
        pool = arena.pool(row, owner=False)
        pool.bell(0, owner)
        pool.give_many(Desc(*d) for d in descs)


@pytest.mark.parametrize("wakes", [1, 2, 5, 20])
def test_a_stage_killed_while_it_frees_leaves_the_list_whole(wakes):
    """kill -9 at whatever instruction: at most the buffer in its hands stays out, and none comes back twice."""
    total = 20000
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(Arena.create([(total, 0), (0, 0)]))
        pool = arena.pool(0)
        out = [pool.take() for _ in range(total)]
        random.Random(wakes).shuffle(out)
        bell = lib.rn_bell_new()
        stack.callback(os.close, bell)
        back: list[Desc] = []
        assert not pool.arm()
        child = stack.enter_context(
            spawned(free_one_by_one, Fd(arena.fd), arena.size, 1, [(d.off, d.len, d.flags, d.gen) for d in out],
                    Fd(bell)))
        for _ in range(wakes):  # it is in the middle of its work: take some back, and kill it then
            assert select.select([bell], [], [], DEADLINE_S)[0], "a wake was lost"
            lib.rn_bell_quiet(bell)
            while True:
                while len(back) < total and (d := pool.take()) is not None:
                    back.append(d)
                if len(back) == total or not pool.arm():
                    break
            if len(back) == total:
                break
        child.kill()
        child.join(DEADLINE_S)
        while (d := pool.take()) is not None:
            back.append(d)
        offsets = {d.off for d in back}
        assert len(back) == len(offsets)
        # It frees in order: what came back is what it began with, but for the one in its hands.
        assert offsets == {d.off for d in out[:len(back)]}
        # And the list still works for the next stage.
        rest = out[len(back) + 1:]
        assert arena.pool(1, owner=False).give_many(rest) == len(rest)
        assert pool.free() == len(rest)
