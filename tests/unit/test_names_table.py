"""The table of names in shared memory: made, checked, written and read (csrc/rn_names.h, shm/names.py)."""
from __future__ import annotations

import errno
import ipaddress
import os
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib
from shm.memory import LayoutMismatch
from shm.names import Names, NamesWriter

HEADER, ENTRY = 64, 320
SEQ, INFO, ADDR, EXPIRES, NAME = 0, 4, 8, 24, 32  # struct rn_name
A = ipaddress.ip_address("203.0.113.7")
B = ipaddress.ip_address("2001:db8::7")
S = 1_000_000_000  # ns


@pytest.fixture
def names() -> Iterator[Names]:
    with Names.create() as n:
        yield n


def entry_of(names: Names, packed: bytes) -> memoryview:
    """The entry an address is in."""
    for i in range(lib.RN_NAMES_ENTRIES):
        entry = names.buffer()[HEADER + i * ENTRY:][:ENTRY]
        if bytes(entry[ADDR:ADDR + 16]) == packed:
            return entry
    raise AssertionError("not in the table")


def mapped(address: ipaddress.IPv4Address) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + address.packed


def test_layout() -> None:
    assert lib.rn_names_size() == HEADER + lib.RN_NAMES_ENTRIES * ENTRY
    assert lib.RN_NAMES_ENTRIES == 4096


def test_check_tells_what_is_wrong(names: Names) -> None:
    assert lib.rn_names_check(ffi.NULL, names.size) == -errno.EINVAL
    assert lib.rn_names_check(names.mem + 32, names.size) == -errno.EINVAL
    assert lib.rn_names_check(names.mem, 63) == -errno.EMSGSIZE
    assert lib.rn_names_check(names.mem, names.size - 1) == -errno.EMSGSIZE
    assert lib.rn_names_create(names.mem, names.size - 1) == -errno.EINVAL


@pytest.mark.parametrize(("offset", "value"), [(0, 1), (4, 9), (8, 4095)])
def test_attach_refuses_another_layout(names: Names, offset: int, value: int) -> None:
    struct.pack_into("I", names.buffer(), offset, value)
    with pytest.raises(LayoutMismatch, match="build"):
        Names.attach(os.dup(names.fd), names.size)
    with pytest.raises(LayoutMismatch, match="build"):
        NamesWriter(names.mem, names.size)


def test_one_process_writes_another_reads(names: Names) -> None:
    with Names.attach(os.dup(names.fd), names.size, read_only=True) as reader:
        assert reader.find(A, now_ns=1) is None
        assert names.writer().set(A, "WWW.Example", now_ns=S, seconds=60)
        assert names.writer().set(B, "six.example", now_ns=S, seconds=60, local=True)
        assert reader.find(A, now_ns=2 * S) == ("www.example", False)
        assert reader.find(B, now_ns=2 * S) == ("six.example", True)


def test_a_name_ends_by_its_time(names: Names) -> None:
    names.writer().set(A, "www.example", now_ns=S, seconds=60)
    assert names.find(A, now_ns=61 * S - 1) is not None
    assert names.find(A, now_ns=61 * S) is None


def test_the_last_name_counts(names: Names) -> None:
    for name in ("a.example", "a-longer-one.example", "b"):
        names.writer().set(A, name, now_ns=S, seconds=60)
        assert names.find(A, now_ns=S) == (name, False)


@pytest.mark.parametrize("name", ["", ".", "a..b", ".a", "a.", "a b", "a\r\nHost: x", "a/b", "a:1",
                                  "a\0b", "é.example",
                                  "x" * 64, ".".join(["x" * 63] * 3 + ["y" * 62]), "*"])
def test_what_is_no_host_name_is_not_kept(names: Names, name: str) -> None:
    assert not names.writer().set(A, name, now_ns=S, seconds=60)
    assert names.find(A, now_ns=S) is None


def test_the_longest_name(names: Names) -> None:
    name = ".".join(["x" * 63] * 3 + ["y" * 61])
    assert len(name) == lib.RN_NAME_MAX
    assert names.writer().set(A, name, now_ns=S, seconds=60)
    assert names.find(A, now_ns=S) == (name, False)


def test_no_time_left_is_not_kept(names: Names) -> None:
    assert not names.writer().set(A, "a", now_ns=S, seconds=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(1, 100)), max_size=200))
def test_against_a_dictionary(ops: list[tuple[int, int, int]]) -> None:
    """As long as no set overflows (41 addresses), the table is a dictionary with times."""
    with Names.create() as names:
        model: dict[int, tuple[str, int]] = {}
        now = S
        for who, what, seconds in ops:
            names.writer().set(A + who, f"n{what}", now_ns=now, seconds=seconds)
            model[who] = (f"n{what}", now + seconds * S)
            now += S
        # 41 addresses may still put nine into one set of eight: then the one that would have ended first is gone
        found = {who: names.find(A + who, now_ns=now) for who in model}
        for who, got in found.items():
            name, ends = model[who]
            assert got is None or got == (name, False) and ends > now
        assert sum(g is None for w, g in found.items() if model[w][1] > now) <= 1


def test_many_more_names_than_places(names: Names) -> None:
    """The table stays as it is made; the youngest are there, and what was longest-lived of a full set."""
    w = names.writer()
    for k in range(20000):
        assert w.set(A + k, f"h{k}", now_ns=S, seconds=60 + k)
    found = [names.find(A + k, now_ns=S) for k in range(20000)]
    kept = [k for k, f in enumerate(found) if f is not None]
    assert all(found[k] == (f"h{k}", False) for k in kept)
    assert 3500 < len(kept) <= 4096 and kept[-1] == 19999


@pytest.mark.parametrize("fill", [b"a\r\nX: y", b"\0" * 8, b"a..b\0\0\0\0"])
def test_a_reader_does_not_believe_the_writer(names: Names, fill: bytes) -> None:
    names.writer().set(A, "abcdefgh", now_ns=S, seconds=60)
    entry = entry_of(names, mapped(A))
    entry[NAME:NAME + 8] = fill[:8].ljust(8, b"\0")
    assert names.find(A, now_ns=S) is None


@pytest.mark.parametrize("length", [0, 254, 255, 0xffff])
def test_an_impossible_length_is_no_name(names: Names, length: int) -> None:
    names.writer().set(A, "abcdefgh", now_ns=S, seconds=60)
    struct.pack_into("I", entry_of(names, mapped(A)), INFO, length)
    assert names.find(A, now_ns=S) is None


def test_an_entry_under_way_is_no_name_and_a_dead_writers_is_taken_over(names: Names) -> None:
    names.writer().set(A, "abc", now_ns=S, seconds=60)
    entry = entry_of(names, mapped(A))
    (seq,) = struct.unpack_from("I", entry, SEQ)
    assert seq % 2 == 0
    struct.pack_into("I", entry, SEQ, seq + 1)  # killed in the middle
    assert names.find(A, now_ns=S) is None
    names.writer().set(A, "def", now_ns=S, seconds=60)
    assert names.find(A, now_ns=S) == ("def", False)


def test_a_reader_never_sees_half_of_a_change(names: Names) -> None:
    """Two names without a common byte, written in turn while another thread reads (cffi lets go of the GIL)."""
    texts = ["a" * 60 + "." + "a" * 60, "b" * 40]
    names.writer().set(A, texts[0], now_ns=S, seconds=60)
    stop = threading.Event()

    def write() -> None:
        w, k = names.writer(), 0
        while not stop.is_set():
            k += 1
            w.set(A, texts[k % 2], now_ns=S, seconds=60)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen: set[object] = set()
        reads = 0
        while reads < 20000 or len(seen - {None}) < 2:
            seen.add(names.find(A, now_ns=S))
            reads += 1
    finally:
        stop.set()
        thread.join()
    assert seen <= {(t, False) for t in texts} | {None}
    assert len(seen) >= 2
