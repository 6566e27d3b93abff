"""The flow table: made, checked, and read entry by entry."""
from __future__ import annotations

import errno
import os
import struct

import pytest

from shm._dataplane import ffi, lib
from shm.flows import Flows, FlowState
from shm.memory import LayoutMismatch

HEADER = 64
ENTRY = lib.rn_flows_size(2) - lib.rn_flows_size(1)


@pytest.fixture
def flows():
    with Flows.create(4, (0x1122334455667788, 0x99AABBCCDDEEFF00)) as f:
        yield f


def entry(flows: Flows, i: int) -> memoryview:
    return flows.buffer()[HEADER + i * ENTRY:][:ENTRY]


def fill(flows: Flows, i: int, *, state: FlowState, peer: bytes = b"\0" * 16) -> None:
    """struct rn_flow: addresses, ports, proto, state."""
    guest = b"\0" * 10 + b"\xff\xff" + bytes([10, 0, 2, 2])
    struct.pack_into("=16s16sHHBB", entry(flows, i), 0, guest, peer, 40000, 443, 6, state)


def test_entries_are_whole_cache_lines():
    assert ENTRY % 64 == 0
    assert lib.rn_flows_size(1) == HEADER + ENTRY


@pytest.mark.parametrize("entries", [0, 2**24 + 1, 2**32 - 1])
def test_bounds_of_create(entries):
    with pytest.raises(LayoutMismatch, match="flows"):
        Flows.create(entries, (1, 2))


def test_check_tells_what_is_wrong(flows):
    assert lib.rn_flows_check(ffi.NULL, flows.size) == -errno.EINVAL
    assert lib.rn_flows_check(flows.mem + 32, flows.size) == -errno.EINVAL
    assert lib.rn_flows_check(flows.mem, 63) == -errno.EMSGSIZE
    assert lib.rn_flows_check(flows.mem, flows.size - 1) == -errno.EMSGSIZE


@pytest.mark.parametrize(("offset", "value", "match"), [(0, 1, "build"), (4, 9, "build"), (8, 0, "build"),
                                                        (8, 5, "too short"), (8, 2**32 - 1, "build")])
def test_attach_refuses_another_layout(flows, offset, value, match):
    struct.pack_into("I", flows.buffer(), offset, value)
    with pytest.raises(LayoutMismatch, match=match):
        Flows.attach(os.dup(flows.fd), flows.size)


def test_the_session_key_is_stored(flows):
    assert struct.unpack_from("QQ", flows.buffer(), 16) == (0x1122334455667788, 0x99AABBCCDDEEFF00)


def test_a_new_table_is_empty(flows):
    assert len(flows) == 4
    assert list(flows) == []
    assert flows.read(3) is None
    with pytest.raises(LayoutMismatch, match="flows, entry 4"):
        flows.read(4)


def test_entries_in_use_are_shown(flows):
    fill(flows, 1, state=FlowState.ESTABLISHED, peer=b"\0" * 10 + b"\xff\xff" + bytes([192, 0, 2, 7]))
    fill(flows, 3, state=FlowState.MAPPED)
    first, second = list(flows)
    assert (first.index, first.state, first.proto) == (1, FlowState.ESTABLISHED, 6)
    assert (first.guest, first.guest_port, first.peer, first.peer_port) == ("10.0.2.2", 40000, "192.0.2.7", 443)
    assert (first.up_owner, first.down_owner) == (-1, -1)
    assert (second.index, second.state, second.peer) == (3, FlowState.MAPPED, "")


def test_addresses_have_room_for_ipv6(flows):
    fill(flows, 0, state=FlowState.CONNECTING, peer=bytes.fromhex("20010db8000000000000000000000001"))
    assert flows.read(0).peer == "2001:db8::1"
