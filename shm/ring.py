"""Rings of frame descriptors: create and look at one, and be an end of it (tests, tools; stages do it in C)."""
from __future__ import annotations

import errno
from typing import Self

from msgspec import Struct

from shm._dataplane import ffi, lib
from shm.memory import CData, SharedObject, check


class RingProtocolError(Exception):
    """The other end's counter is impossible; names the ring and both counters."""

    def __init__(self, ring: str, text: str, *, head: int, tail: int) -> None:
        super().__init__(f"ring {ring}: {text}")
        self.ring = ring
        self.head = head
        self.tail = tail


class Desc(Struct, frozen=True):
    """One frame: where it is in the arena (bytes, to the Ethernet header), its length, RN_DESC_*, generation."""

    off: int
    len: int
    flags: int = 0
    gen: int = 0


class RingStat(Struct, frozen=True, kw_only=True):
    """Descriptors taken and put since creation, slots, and whether an end waits."""

    head: int
    tail: int
    slots: int
    asleep: bool  # the consumer blocks
    starved: bool  # the producer waits for room
    high: int = 0  # most descriptors the consumer ever found waiting

    @property
    def fill(self) -> int:
        """Descriptors in the ring."""
        return min(max(self.tail - self.head, 0), self.slots)


class Ring(SharedObject):
    kind = "ring"

    @classmethod
    def create(cls, slots: int, *, name: str = "ring") -> Self:
        """`slots`: a power of two in 2..32768, else LayoutMismatch."""
        size = lib.rn_ring_size(slots) if 0 <= slots < 2**32 else 0
        return cls._new("ring", size, name, lambda mem, size: lib.rn_ring_create(mem, size, slots))

    def _check(self) -> int:
        return lib.rn_ring_check(self.mem, self.size)

    def stat(self) -> RingStat:
        out = ffi.new("struct rn_ring_stat *")
        check(lib.rn_ring_stat(self.mem, self.size, out), self.name)
        return RingStat(head=out.head, tail=out.tail, slots=out.nslots, asleep=bool(out.asleep),
                        starved=bool(out.starved), high=out.high)

    def producer(self, bell: int = -1) -> RingProducer:
        """Be the one producer; `bell` is the consumer's eventfd, -1: never wake it."""
        return RingProducer(self, bell)

    def consumer(self, bell: int = -1) -> RingConsumer:
        """Be the one consumer; `bell` is the producer's eventfd."""
        return RingConsumer(self, bell)

    def _counters(self) -> tuple[int, int]:
        stat = self.stat()
        return stat.head, stat.tail

    def _attach_error(self, rc: int) -> Exception:
        if rc == -errno.EPROTO and self._check() == 0:
            head, tail = self._counters()
            return RingProtocolError(self.name, f"tail {tail} is over {self.stat().slots} slots past head {head}",
                                     head=head, tail=tail)
        try:
            check(rc, self.name)
        except Exception as e:
            return e
        return RuntimeError(f"{self.name}: attach failed")


class RingProducer:
    """The producer's end. Not thread-safe; the ring must stay attached."""

    def __init__(self, ring: Ring, bell: int = -1) -> None:
        err = ffi.new("int *")
        handle = lib.rn_ring_tx_new(ring.mem, ring.size, bell, err)
        if handle == ffi.NULL:
            raise ring._attach_error(err[0])
        self.ring = ring
        self._tx: CData = ffi.gc(handle, lib.rn_ring_tx_delete)

    def _answer(self, rc: int) -> int:
        if rc < 0:
            head, tail = self.ring._counters()
            text = f"head {head} is not within {self.ring.stat().slots} slots behind tail {tail}"
            raise RingProtocolError(self.ring.name, text, head=head, tail=tail)
        return rc

    def room(self, want: int = 1) -> int:
        """Free slots. Raises RingProtocolError."""
        return self._answer(lib.rn_ring_room(self._tx, want))

    def put(self, desc: Desc) -> None:
        """Fill one slot, not yet visible. Raises BufferError if the ring is full."""
        if not self.room(1):
            raise BufferError(f"ring {self.ring.name} is full")
        lib.rn_ring_put(self._tx, ffi.new("struct rn_desc *", (desc.off, desc.len, desc.flags, desc.gen)))

    def publish(self) -> None:
        lib.rn_ring_publish(self._tx)

    def arm(self, want: int = 1) -> int:
        """Ask to be woken for room. Positive: there is room for `want` already, do not block."""
        lib.rn_ring_tx_want(self._tx, want)
        return self._answer(lib.rn_ring_tx_arm(self._tx))

    def disarm(self) -> None:
        lib.rn_ring_tx_disarm(self._tx)

    @property
    def wakes(self) -> int:
        """Doorbells rung."""
        return int(lib.rn_ring_tx_wakes(self._tx))


class RingConsumer:
    """The consumer's end. Not thread-safe; the ring must stay attached."""

    def __init__(self, ring: Ring, bell: int = -1) -> None:
        err = ffi.new("int *")
        handle = lib.rn_ring_rx_new(ring.mem, ring.size, bell, err)
        if handle == ffi.NULL:
            raise ring._attach_error(err[0])
        self.ring = ring
        self._rx: CData = ffi.gc(handle, lib.rn_ring_rx_delete)

    def _answer(self, rc: int) -> int:
        if rc < 0:
            head, tail = self.ring._counters()
            text = f"tail {tail} is over {self.ring.stat().slots} slots past head {head}"
            raise RingProtocolError(self.ring.name, text, head=head, tail=tail)
        return rc

    def ready(self, max: int = 2**31 - 1) -> int:
        """Descriptors ready, at most `max`. Raises RingProtocolError."""
        return self._answer(lib.rn_ring_peek(self._rx, max))

    def peek(self, max: int = 2**31 - 1) -> list[Desc]:
        """Copies of what is ready; they stay in the ring until consume(). Raises RingProtocolError."""
        found = []
        for i in range(self.ready(max)):
            d = lib.rn_ring_at(self._rx, i)
            found.append(Desc(d.off, d.len, d.flags, d.gen))
        return found

    def consume(self, n: int) -> None:
        lib.rn_ring_consume(self._rx, n)

    def arm(self) -> int:
        """Announce sleep. Positive: that many came in between, do not block. Raises RingProtocolError."""
        return self._answer(lib.rn_ring_rx_arm(self._rx))

    def disarm(self) -> None:
        lib.rn_ring_rx_disarm(self._rx)

    @property
    def wakes(self) -> int:
        return int(lib.rn_ring_rx_wakes(self._rx))
