"""The ring one call at a time: who is refused, what is seen when, who is woken."""
from __future__ import annotations

import errno
import os
import struct

import pytest

from shm._dataplane import ffi, lib
from shm.memory import LayoutMismatch
from shm.ring import Desc, Ring, RingProtocolError

# Offsets the header's drawing promises (csrc/rn_ring.h asserts them).
MAGIC, VERSION, NSLOTS, TAIL, STARVED, HEAD, ASLEEP, SLOTS = 0, 4, 8, 64, 72, 128, 136, 192


def poke(ring: Ring, offset: int, fmt: str, value: int) -> None:
    struct.pack_into(fmt, ring.buffer(), offset, value)


@pytest.fixture
def ring():
    with Ring.create(8, name="a->b") as r:
        yield r


@pytest.fixture
def bell():
    fd = lib.rn_bell_new()
    assert fd >= 0
    yield fd
    os.close(fd)


def rang(fd: int) -> int:
    """Times the doorbell was rung since last asked."""
    try:
        return struct.unpack("Q", os.read(fd, 8))[0]
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("slots", [0, 1, 3, 100, 65536, 2**32 - 1])
def test_only_powers_of_two_up_to_32768_are_made(slots):
    with pytest.raises(LayoutMismatch, match="ring"):
        Ring.create(slots)


@pytest.mark.parametrize("slots", [2, 8, 32768])
def test_size_is_header_and_sixteen_bytes_a_slot(slots):
    assert lib.rn_ring_size(slots) == SLOTS + 16 * slots


def test_create_refuses_bad_memory(ring):
    assert lib.rn_ring_create(ffi.NULL, 4096, 8) == -errno.EINVAL
    assert lib.rn_ring_create(ring.mem + 8, ring.size - 8, 8) == -errno.EINVAL
    assert lib.rn_ring_create(ring.mem, lib.rn_ring_size(8) - 1, 8) == -errno.EINVAL


def test_check_tells_what_is_wrong(ring):
    assert lib.rn_ring_check(ring.mem, ring.size) == 0
    assert lib.rn_ring_check(ffi.NULL, ring.size) == -errno.EINVAL
    assert lib.rn_ring_check(ring.mem + 32, ring.size) == -errno.EINVAL
    assert lib.rn_ring_check(ring.mem, 100) == -errno.EMSGSIZE
    assert lib.rn_ring_check(ring.mem, ring.size - 1) == -errno.EMSGSIZE


@pytest.mark.parametrize(("offset", "value"), [(MAGIC, 0), (VERSION, 2), (NSLOTS, 3), (NSLOTS, 0), (NSLOTS, 1 << 30)])
def test_attach_refuses_another_layout(ring, offset, value):
    poke(ring, offset, "I", value)
    assert lib.rn_ring_check(ring.mem, ring.size) == -errno.EPROTO
    for end in (ring.producer, ring.consumer):
        with pytest.raises(LayoutMismatch, match="a->b: made by another build"):
            end()


def test_more_slots_than_are_mapped_is_refused(ring):
    poke(ring, NSLOTS, "I", 16)
    with pytest.raises(LayoutMismatch, match="too short"):
        ring.consumer()


def test_attach_of_a_descriptor_checks_it(ring):
    with Ring.attach(os.dup(ring.fd), ring.size, name="again") as again:
        assert again.stat() == ring.stat()
    with pytest.raises(LayoutMismatch, match="again: mapping too short"):
        Ring.attach(os.dup(ring.fd), ring.size + 1, name="again")
    poke(ring, MAGIC, "I", 0)
    with pytest.raises(LayoutMismatch, match="again"):
        Ring.attach(os.dup(ring.fd), ring.size, name="again")


def test_detached_ring_says_so(ring):
    ring.detach()
    with pytest.raises(ValueError, match="a->b is detached"):
        ring.stat()


def test_nothing_is_visible_before_publish(ring):
    p, c = ring.producer(), ring.consumer()
    p.put(Desc(64, 60, 1, 7))
    assert c.peek() == []
    p.publish()
    assert c.peek() == [Desc(64, 60, 1, 7)]
    assert c.peek() == [Desc(64, 60, 1, 7)], "until consume() they stay"
    assert ring.stat().fill == 1
    c.consume(1)
    assert c.peek() == []
    assert ring.stat().fill == 0


def test_full_ring_takes_no_more(ring):
    p, c = ring.producer(), ring.consumer()
    for i in range(8):
        p.put(Desc(i, 60))
    with pytest.raises(BufferError):
        p.put(Desc(8, 60))
    p.publish()
    assert p.room() == 0
    assert len(c.peek(3)) == 3
    c.consume(3)
    assert p.room() == 3
    assert [d.off for d in c.peek()] == [3, 4, 5, 6, 7]


def test_a_new_generation_goes_on_where_the_last_one_stopped(ring):
    p, c = ring.producer(), ring.consumer()
    for i in range(6):
        p.put(Desc(i, 60))
    p.publish()
    c.consume(len(c.peek(2)))
    del p, c
    p, c = ring.producer(), ring.consumer()
    p.put(Desc(6, 60))
    p.publish()
    assert [d.off for d in c.peek()] == [2, 3, 4, 5], "what was there at attach"
    c.consume(4)
    assert [d.off for d in c.peek()] == [6]


def test_unpublished_slots_of_a_dead_producer_are_forgotten(ring):
    p = ring.producer()
    p.put(Desc(1, 60))
    del p
    p, c = ring.producer(), ring.consumer()
    assert p.room(8) == 8
    p.put(Desc(2, 60))
    p.publish()
    assert [d.off for d in c.peek()] == [2]


@pytest.mark.parametrize("ahead", [0, 1, 7, 8, 9, 2**31, 2**63, 2**64 - 1])
def test_peek_accepts_a_tail_only_within_one_ring(ring, ahead):
    c = ring.consumer()
    poke(ring, TAIL, "Q", ahead)
    if ahead <= 8:
        assert c.ready() == ahead
    else:
        with pytest.raises(RingProtocolError, match=f"a->b: tail {ahead} is over 8 slots past head 0") as e:
            c.ready()
        assert (e.value.head, e.value.tail) == (0, ahead)
        with pytest.raises(RingProtocolError):
            c.arm()
        with pytest.raises(RingProtocolError):
            ring.consumer()


@pytest.mark.parametrize("head", [0, 1, 3, 4, 2**63, 2**64 - 5, 2**64 - 6])
def test_room_accepts_a_head_only_behind_tail(ring, head):
    p = ring.producer()
    for i in range(3):
        p.put(Desc(i, 60))
    p.publish()
    poke(ring, HEAD, "Q", head)
    if (3 - head) % 2**64 <= 8:
        assert p.room(8) == 8 - (3 - head) % 2**64
    else:
        with pytest.raises(RingProtocolError, match=f"head {head} is not within 8 slots behind tail 3"):
            p.room(8)


def test_head_past_what_was_published_is_refused(ring):
    """Slots that were put but not published cannot have been taken."""
    p = ring.producer()
    p.put(Desc(0, 60))
    poke(ring, HEAD, "Q", 1)
    with pytest.raises(RingProtocolError):
        p.room(8)


def test_counters_wrap_at_64_bits(ring):
    start = 2**64 - 3
    poke(ring, TAIL, "Q", start)
    poke(ring, HEAD, "Q", start)
    p, c = ring.producer(), ring.consumer()
    for i in range(8):
        p.put(Desc(i, 60))
    p.publish()
    assert [d.off for d in c.peek()] == list(range(8))
    c.consume(8)
    assert ring.stat().head == ring.stat().tail == 5
    assert p.room(8) == 8


def test_consumer_is_woken_once_a_sleep(ring, bell):
    p, c = ring.producer(bell), ring.consumer()
    p.put(Desc(0, 60))
    p.publish()
    assert rang(bell) == 0, "awake"
    c.consume(1)
    assert c.arm() == 0
    assert ring.stat().asleep
    for i in range(3):
        p.put(Desc(i, 60))
    p.publish()
    p.put(Desc(3, 60))
    p.publish()
    assert rang(bell) == 1
    assert p.wakes == 1
    assert not ring.stat().asleep


def test_publish_of_nothing_wakes_nobody(ring, bell):
    p, c = ring.producer(bell), ring.consumer()
    assert c.arm() == 0
    p.publish()
    assert rang(bell) == 0


def test_consumer_does_not_sleep_on_what_it_has_not_seen(ring, bell):
    p, c = ring.producer(bell), ring.consumer()
    assert c.peek() == []
    p.put(Desc(0, 60))
    p.publish()
    assert c.arm() == 1
    assert not ring.stat().asleep, "withdrawn"


def test_disarmed_consumer_is_left_alone(ring, bell):
    p, c = ring.producer(bell), ring.consumer()
    c.arm()
    c.disarm()
    p.put(Desc(0, 60))
    p.publish()
    assert rang(bell) == 0


def test_starved_producer_is_woken_once(ring, bell):
    p, c = ring.producer(), ring.consumer(bell)
    for i in range(8):
        p.put(Desc(i, 60))
    p.publish()
    c.consume(len(c.peek(1)))
    assert rang(bell) == 0, "nobody asked"
    p.put(Desc(8, 60))
    p.publish()
    assert p.room() == 0
    assert p.arm() == 0
    assert ring.stat().starved
    c.consume(1)
    c.consume(1)
    assert rang(bell) == 1
    assert c.wakes == 1
    assert not ring.stat().starved


def test_producer_does_not_sleep_on_room_it_has_not_seen(ring):
    p, c = ring.producer(), ring.consumer()
    for i in range(8):
        p.put(Desc(i, 60))
    p.publish()
    c.consume(len(c.peek(2)))
    assert p.arm() == 2
    assert not ring.stat().starved


def test_producer_that_needs_more_sleeps_on_less(ring, bell):
    """A datagram of several fragments is sent whole or not at all: less room than that is no room."""
    p, c = ring.producer(), ring.consumer(bell)
    for i in range(8):
        p.put(Desc(i, 60))
    p.publish()
    c.consume(len(c.peek(2)))
    assert p.arm(want=5) == 0
    c.consume(len(c.peek(4)))
    assert rang(bell) == 1
    assert p.arm(want=5) == 6
    assert p.arm(want=1000) == 0, "more than the ring has: as soon as it is empty"
    c.consume(len(c.peek()))
    assert p.arm(want=1000) == 8


def test_bell_counts_and_is_quieted(bell):
    lib.rn_bell_ring(bell)
    lib.rn_bell_ring(bell)
    lib.rn_bell_quiet(bell)
    assert rang(bell) == 0
    lib.rn_bell_quiet(bell)  # a quiet one does not block


def test_segment_leaves_no_name_and_is_private(ring):
    st = os.fstat(ring.fd)
    assert st.st_mode & 0o777 == 0o600
    assert st.st_nlink == 0
    assert not os.get_inheritable(ring.fd)
