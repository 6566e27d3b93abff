"""IPv4 reassembly (csrc/reassembly.c): any order and size, duplicates, overlaps, bounds, time."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from frames.inproc import config
from frames.recipes import IP, Ether, IPOption_NOP, Raw, ip, poke, raw, reheader
from hypothesis import given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib

S = 10**9  # ns


class Reassembly:
    def __init__(self, blocks: int = 16) -> None:
        self.r = lib.reassembly_new_heap(blocks)
        self.cfg = config()
        self.out, self.n = ffi.new("uint8_t[]", 65549), ffi.new("uint32_t *")
        self.added = 0

    def add(self, frame: bytes, now: int = 0) -> bytes | int:
        """The whole datagram's frame, or RA_HELD or RA_DROPPED."""
        self.added += 1
        result = lib.reassembly_add_bytes(self.r, now, frame, len(frame), self.cfg, self.out, self.n)
        return bytes(ffi.buffer(self.out, self.n[0])) if result == lib.RA_DONE else result

    def expire(self, now: int) -> bytes | None:
        """Start of the first fragment of one expired datagram (b"" if unknown), or None."""
        if not lib.reassembly_expire_bytes(self.r, now, self.out, self.n):
            return None
        return bytes(ffi.buffer(self.out, self.n[0]))

    @property
    def stat(self) -> Any:
        out = ffi.new("struct ra_stat *")
        lib.reassembly_stat(self.r, out)
        assert self.added == out.joined + out.held + out.duplicates + out.bad + out.table + out.timeout
        return out


@contextmanager
def reassembly(blocks: int = 16) -> Iterator[Reassembly]:
    r = Reassembly(blocks)
    try:
        yield r
    finally:
        lib.reassembly_free(r.r)


@pytest.fixture
def r() -> Iterator[Reassembly]:
    with reassembly() as one:
        yield one


def part(data: bytes, offset: int, more: bool, **kw: Any) -> bytes:
    """One fragment; offset in bytes."""
    return raw(ip(**{"id": 1, "proto": 17, **kw}, frag=offset // 8, flags="MF" if more else 0) / Raw(data))


def split(body: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({c for c in cuts if 0 < c < len(body)}), len(body)]
    return [part(body[a:b], a, b < len(body)) for a, b in zip(edges, edges[1:], strict=False)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_cut_in_any_order_with_duplicates_gives_the_original(data: st.DataObject) -> None:
    body = data.draw(st.binary(min_size=9, max_size=9000))
    cuts = data.draw(st.lists(st.integers(1, (len(body) - 1) // 8).map(lambda n: n * 8), max_size=40))
    parts = split(body, cuts or [8])
    extra = data.draw(st.lists(st.sampled_from(parts), max_size=5))
    order = data.draw(st.permutations(parts + extra))
    with reassembly() as r:
        # Once it is whole, a later duplicate begins a new datagram: it must not give another one.
        whole = [x for x in map(r.add, order) if isinstance(x, bytes)]
        assert len(whole) >= 1
        assert r.stat.datagrams == len(whole) and r.stat.bad == r.stat.table == 0
        if not extra:
            assert r.stat.open == 0
        for w in whole:
            packet = Ether(w)[IP]
            assert raw(packet.payload) == body
            assert (packet.len, packet.frag, packet.flags, packet.id) == (20 + len(body), 0, 0, 1)
            made = packet.chksum
            del packet.chksum
            assert IP(raw(packet)).chksum == made


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_overlap_never_gives_a_datagram(data: st.DataObject) -> None:
    """Between the whole's fragments comes one that lies across an edge or says something else."""
    body = bytes(data.draw(st.lists(st.integers(0, 255), min_size=64, max_size=512)))
    n = len(body) // 8
    parts = split(body, [8 * i for i in range(1, n)])
    first = data.draw(st.integers(0, n - 3))
    units = data.draw(st.integers(1, 2))
    bad = bytes(b ^ 1 for b in body[first * 8:(first + units) * 8])
    held = data.draw(st.integers(first + 1, len(parts) - 1))  # at least the fragment it overlaps came before
    with reassembly() as r:
        order = [*parts[:held], part(bad, first * 8, True), *parts[held:]]
        results = [r.add(f) for f in order]
        assert not any(isinstance(x, bytes) for x in results)
        assert results[held:] == [lib.RA_DROPPED] * (len(order) - held)
        assert r.stat.bad == len(order) and r.stat.held == 0 and r.stat.open == 1


def test_tiny_fragments_cost_no_more(r: Reassembly) -> None:
    body = bytes(range(256)) * 255 + bytes(200)
    like = part(bytes(8), 0, True)
    parts = [reheader(poke(poke(like, 20, (o // 8 | (0x2000 if o + 8 < len(body) else 0)).to_bytes(2, "big")),
                           34, body[o:o + 8])) for o in range(0, len(body), 8)]
    assert len(body) % 8 == 0 and len(parts) > 8000
    results = [r.add(f) for f in reversed(parts)]
    assert raw(Ether(results[-1])[IP].payload) == body


def test_last_before_first(r: Reassembly) -> None:
    assert r.add(part(b"b" * 5, 8, False)) == lib.RA_HELD
    assert raw(Ether(r.add(part(b"a" * 8, 0, True)))[IP].payload) == b"a" * 8 + b"b" * 5


def test_header_is_the_first_fragments(r: Reassembly) -> None:
    assert r.add(part(b"b" * 8, 8, False, ttl=3)) == lib.RA_HELD
    whole = Ether(r.add(part(b"a" * 8, 0, True, ttl=9, tos=4, options=[IPOption_NOP()] * 4)))
    assert (whole[IP].ttl, whole[IP].tos, whole[IP].ihl) == (9, 4, 6)
    assert raw(whole[IP].payload) == b"a" * 8 + b"b" * 8


def test_datagrams_do_not_mix(r: Reassembly) -> None:
    keys = [{}, {"id": 2}, {"dst": "192.0.2.11"}, {"src": "10.0.2.3"}, {"proto": 1}]
    for i, k in enumerate(keys):
        assert r.add(part(bytes([i]) * 8, 0, True, **k)) == lib.RA_HELD
    assert r.stat.open == len(keys)
    for i, k in enumerate(keys):
        whole = r.add(part(bytes([i + 100]), 8, False, **k))
        assert raw(Ether(whole)[IP].payload) == bytes([i]) * 8 + bytes([i + 100])


@pytest.mark.parametrize("frames", [
    [part(b"a" * 9, 0, True)],
    [part(b"", 0, True)],
    [part(b"", 8, False)],
    [part(b"a" * 1000, 65528, False)],
    [part(b"a" * 16, 8, False), part(b"c" * 8, 32, True)],
    [part(b"c" * 8, 32, True), part(b"a" * 16, 8, False)],
    [part(b"a" * 16, 8, False), part(b"a" * 24, 8, False)],
    [part(b"a" * 16, 8, False), part(b"a" * 8, 8, False)],
    [part(b"a" * 13, 8, False), part(b"a" * 12, 8, False)],
    [part(b"a" * 16, 8, True), part(b"a" * 8, 16, False), part(b"a" * 8, 16, True)],
], ids=["odd", "empty", "empty-last", "past-64k", "behind-end", "end-before", "two-ends", "shorter-end", "cut-end",
        "end-in-the-middle"])
def test_impossible_fragments_drop_the_datagram(r: Reassembly, frames: list[bytes]) -> None:
    results = [r.add(f) for f in frames]
    assert lib.RA_DROPPED in results and not any(isinstance(x, bytes) for x in results)
    assert r.add(part(b"a" * 8, 0, True)) == lib.RA_DROPPED  # its other fragments too
    assert r.stat.bad == r.added and r.stat.held == 0
    assert isinstance(r.add(part(b"b" * 8, 0, True, id=2)), int) and r.stat.held == 1  # but not its neighbours'


def test_total_length_counts_the_options(r: Reassembly) -> None:
    """65515 bytes of payload are allowed behind 20 bytes of header, not behind 24."""
    body = bytes(65515)
    assert r.add(part(body[60000:], 60000, False)) == lib.RA_HELD
    assert len(r.add(part(body[:60000], 0, True))) == 14 + 65535
    assert r.add(part(body[60000:], 60000, False, id=2)) == lib.RA_HELD
    assert r.add(part(body[:60000], 0, True, id=2, options=[IPOption_NOP()] * 4)) == lib.RA_DROPPED


def test_exact_duplicates_are_ignored(r: Reassembly) -> None:
    a, b = part(b"a" * 16, 0, True), part(b"b" * 5, 16, False)
    assert [r.add(f) for f in (a, a, part(b"a" * 8, 8, True), b[:-1] + b"b")][:3] == [lib.RA_HELD] * 3
    assert r.stat.duplicates == 2 and r.stat.datagrams == 1


def test_full_table_evicts_the_oldest(r: Reassembly) -> None:
    for i in range(lib.RA_DATAGRAMS + 1):
        assert r.add(part(b"a" * 8, 0, True, id=i), now=i) == lib.RA_HELD
    assert (r.stat.open, r.stat.table) == (lib.RA_DATAGRAMS, 1)
    assert r.add(part(b"z", 8, False, id=0), now=100) == lib.RA_HELD  # its first half went
    assert isinstance(r.add(part(b"z", 8, False, id=lib.RA_DATAGRAMS), now=100), bytes)


def test_memory_has_a_bound() -> None:
    with reassembly(blocks=2) as r:
        for i in range(10):
            assert r.add(part(b"a" * 8, 0, True, id=i), now=i) == lib.RA_HELD
            assert r.stat.held <= 2
        assert r.stat.table == 8
    with reassembly(blocks=0) as r:
        assert r.add(part(b"a" * 8, 0, True)) == lib.RA_DROPPED
        assert (r.stat.table, r.stat.open) == (1, 0)


def test_refused_datagrams_hold_no_memory() -> None:
    with reassembly(blocks=1) as r:
        for i in range(8):
            assert r.add(part(b"a" * 9, 0, True, id=i), now=i) == lib.RA_DROPPED
        assert r.stat.open == 8
        assert r.add(part(b"a" * 8, 0, True, id=100)) == lib.RA_HELD


def test_timeout_counts_from_the_first_fragment(r: Reassembly) -> None:
    timeout = lib.RA_TIMEOUT_NS
    assert lib.reassembly_deadline(r.r) == 2**64 - 1
    r.add(part(b"a" * 16, 0, True), now=5 * S)
    r.add(part(b"a" * 16, 32, True), now=19 * S)
    r.add(part(b"a" * 16, 32, True, id=2), now=6 * S)
    assert lib.reassembly_deadline(r.r) == 5 * S + timeout
    assert r.expire(5 * S + timeout - 1) is None
    assert r.expire(5 * S + timeout) == part(b"a" * 16, 0, True)
    assert r.stat.timeout == 2
    assert r.expire(5 * S + timeout) is None
    assert lib.reassembly_deadline(r.r) == 6 * S + timeout
    assert r.expire(6 * S + timeout) == b""  # the first fragment never came: RFC 1122 3.3.2, no ICMP
    assert r.expire(2**63) is None and (r.stat.open, r.stat.timeout) == (0, 3)


def test_quote_of_an_expired_datagram_is_bounded(r: Reassembly) -> None:
    first = part(bytes(1480), 0, True)
    r.add(first)
    assert r.expire(16 * S) == first[:14 + 548]


def test_only_fragments_are_taken(r: Reassembly) -> None:
    whole = raw(ip() / Raw(bytes(8)))
    assert lib.reassembly_add_bytes(r.r, 0, whole, len(whole), r.cfg, r.out, r.n) == lib.RA_DROPPED
    assert r.stat.open == 0
