"""The ring against a deque, in one process step by step, and across two processes with real doorbells."""
from __future__ import annotations

import contextlib
import os
import random
import select
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from procs import Fd, spawned

from shm._dataplane import lib
from shm.ring import Desc, Ring

SLOTS = 8
DEADLINE_S = 60  # no wait below is unbounded; a lost wake fails here, not by the test's timeout


class RingAgainstDeque(RuleBasedStateMachine):
    """Any order of calls: what comes out is what went in, and a flag is set exactly while somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring.create(SLOTS)
        self.bells = [lib.rn_bell_new(), lib.rn_bell_new()]
        self.producer = self.ring.producer(self.bells[1])
        self.consumer = self.ring.consumer(self.bells[0])
        self.put: deque[Desc] = deque()  # not published
        self.held: deque[Desc] = deque()  # published
        self.count = 0
        self.asleep = self.starved = 0  # slots the producer waits for

    def teardown(self) -> None:
        for fd in self.bells:
            os.close(fd)
        self.ring.destroy()

    def rang(self, end: int) -> int:
        try:
            return int.from_bytes(os.read(self.bells[end], 8), "little")
        except BlockingIOError:
            return 0

    @property
    def room(self) -> int:
        return SLOTS - len(self.put) - len(self.held)

    @rule(n=st.integers(1, SLOTS + 1))
    def write(self, n: int) -> None:
        for _ in range(min(n, self.room)):
            d = Desc(self.count, self.count % 2000, self.count % 2, self.count % 65536)
            self.producer.put(d)
            self.put.append(d)
            self.count += 1

    @rule()
    def publish(self) -> None:
        self.producer.publish()
        assert self.rang(1) == (1 if self.put and self.asleep else 0)
        if self.put:
            self.asleep = 0
        self.held += self.put
        self.put.clear()

    @rule(n=st.integers(1, SLOTS))
    def read(self, n: int) -> None:
        found = self.consumer.peek(n)
        assert found == list(self.held)[:len(found)]
        assert bool(found) == bool(self.held)

    @rule(n=st.integers(1, SLOTS))
    def consume(self, n: int) -> None:
        n = len(self.consumer.peek(n))
        self.consumer.consume(n)
        assert self.rang(0) == (1 if n and self.starved else 0)
        if n:
            self.starved = 0
        for _ in range(n):
            self.held.popleft()

    @rule()
    def consumer_arms(self) -> None:
        assert self.consumer.arm() == len(self.held)
        self.asleep = not self.held

    @rule()
    def consumer_disarms(self) -> None:
        self.consumer.disarm()
        self.asleep = 0

    @precondition(lambda self: not self.put)
    @rule(want=st.integers(0, SLOTS + 2))
    def producer_arms(self, want: int) -> None:
        enough = self.room >= min(max(want, 1), SLOTS)
        assert self.producer.arm(want) == (self.room if enough else 0)
        self.starved = not enough

    @rule()
    def producer_is_replaced(self) -> None:
        self.producer = self.ring.producer(self.bells[1])
        self.put.clear()

    @rule()
    def consumer_is_replaced(self) -> None:
        self.consumer = self.ring.consumer(self.bells[0])

    @invariant()
    def counters_agree(self) -> None:
        stat = self.ring.stat()
        assert stat.fill == len(self.held)
        assert (stat.asleep, stat.starved) == (bool(self.asleep), bool(self.starved))
        assert self.producer.room(SLOTS) == self.room


RingAgainstDeque.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRingAgainstDeque = RingAgainstDeque.TestCase


def wait_bell(fd: int) -> None:
    ready, _, _ = select.select([fd], [], [], DEADLINE_S)
    if not ready:
        raise TimeoutError("a wake was lost")
    lib.rn_bell_quiet(fd)


def produce(ring_fd: Fd, size: int, mine: Fd, theirs: Fd, total: int, seed: int) -> None:
    """Send 0..total-1 in random bursts, sleeping when full; several ends of life on the way."""
    rng = random.Random(seed)
    with Ring.attach(ring_fd, size) as ring:
        end = ring.producer(theirs)
        sent = 0
        while sent < total:
            if rng.random() < 0.02:
                end = ring.producer(theirs)  # a new generation
            want = rng.randrange(1, 6)
            room = end.room(want)
            if room < min(want, total - sent):
                if end.arm(want):
                    continue
                wait_bell(mine)
                end.disarm()
                continue
            for _ in range(min(room, rng.randrange(1, 40), total - sent)):
                end.put(Desc(sent * 64, sent % 1500, sent % 2, sent % 65536))
                sent += 1
            end.publish()


@pytest.mark.parametrize(("slots", "seed"), [(2, 1), (8, 2), (64, 3), (1024, 4)])
def test_first_in_first_out_across_two_processes(slots, seed):
    """Both ends sleep and are woken; with few slots, mostly."""
    total = 6000 if slots > 8 else 3000
    rng = random.Random(-seed)
    with contextlib.ExitStack() as stack:
        ring = stack.enter_context(Ring.create(slots))
        mine, theirs = lib.rn_bell_new(), lib.rn_bell_new()
        stack.callback(os.close, mine)
        stack.callback(os.close, theirs)
        child = stack.enter_context(
            spawned(produce, Fd(ring.fd), ring.size, Fd(theirs), Fd(mine), total, seed))
        end = ring.consumer(theirs)
        got = 0
        while got < total:
            burst = end.peek(rng.randrange(1, 50))
            if not burst:
                if not end.arm():
                    wait_bell(mine)
                    end.disarm()
                continue
            if rng.random() < 0.02:
                end = ring.consumer(theirs)  # died before it consumed: the burst is seen again
                continue
            for d in burst:
                assert d == Desc(got * 64, got % 1500, got % 2, got % 65536)
                got += 1
            end.consume(len(burst))
        child.join(DEADLINE_S)
        assert child.exitcode == 0
        assert ring.stat().fill == 0
