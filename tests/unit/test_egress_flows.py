"""The egress stage's own machinery (csrc/stage_egress.c): flow table, timers, work queue, output, distrust.

egress runs alone in this process (tests/harness.py, EgressOnly), with UDP as the protocol that exercises it.
"""
from __future__ import annotations

import os
import socket
import struct
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib
from tests.fds import open_fds
from tests.harness import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    GUEST_MAC,
    ICMP,
    UDP,
    EgressOnly,
    closed_udp_port,
    ipv4,
    mac_bytes,
    quoted,
    udp,
    udp_server,
)

ETH = mac_bytes(GATEWAY_MAC) + mac_bytes(GUEST_MAC) + b"\x08\x00"
EG_FD_RESERVE = 32  # csrc/egress.h


def meta(l3: int = 14, l4: int = 34, payload: int = 42, length: int = 0, *, version: int = 4, proto: int = UDP,
         ttl: int = 64) -> bytes:
    """struct rn_meta, right or wrong."""
    return struct.pack("=BBBBHHII", version, proto, ttl, 0, l3, l4, payload, length)


# -- hashing

# From the reference implementation's vectors.h (key 00..0f, data 00..n-1), as 64-bit little-endian numbers.
SIPHASH = {0: 0x726FDB47DD0E0E31, 1: 0x74F839C593DC67FD, 7: 0xAB0200F58B01D137, 8: 0x93F5F5799A932462,
           15: 0xA129CA6149BE45E5}


@pytest.mark.parametrize("length", sorted(SIPHASH))
def test_siphash_is_the_published_one(length):
    key = struct.unpack("<QQ", bytes(range(16)))
    assert lib.stage_egress_siphash(*key, bytes(range(length)), length) == SIPHASH[length]


# -- table


@pytest.mark.fault(42)
def test_a_mapping_is_in_the_table_for_the_monitor():
    with EgressOnly() as guest, udp_server() as server:
        guest.send_udp(4000, server.getsockname()[1], b"12345")
        (flow,) = guest.flows()
        assert bytes(flow.guest_addr) == bytes(10) + b"\xff\xff" + socket.inet_aton(GUEST)
        assert (flow.guest_port, flow.proto, flow.state) == (4000, UDP, lib.RN_FL_MAPPED)
        assert bytes(flow.peer_addr) == bytes(16) and flow.peer_port == 0, "endpoint-independent"
        assert (flow.up_owner, flow.down_owner) == (2, 2), "stage row + 1"
        assert (flow.up_packets, flow.up_bytes, flow.down_packets) == (1, 5, 0)
        server.sendto(b"123", server.recvfrom(10)[1])
        guest.recv_udp(4000)
        (flow,) = guest.flows()
        assert (flow.down_packets, flow.down_bytes) == (1, 3)


@settings(max_examples=40, deadline=None)
@given(udp_max=st.integers(1, 6), ports=st.lists(st.integers(5000, 5009), max_size=40))
def test_eviction_takes_the_least_recently_used(udp_max, ports):
    """Against a model: an ordered dictionary of at most udp_max."""
    with EgressOnly(udp_max=udp_max, flows=16) as guest, udp_server() as server:
        model: OrderedDict[int, tuple[str, int]] = OrderedDict()
        evicted = 0
        for port in ports:
            guest.send_udp(port, server.getsockname()[1], b"x")
            where = server.recvfrom(10)[1]
            if port in model:
                assert model[port] == where, "the mapping was replaced"
                model.move_to_end(port)
                continue
            if len(model) == udp_max:
                model.popitem(last=False)
                evicted += 1
            model[port] = where
        assert {f.guest_port for f in guest.flows()} == set(model)
        assert guest.counters()["udp_evicted"] == evicted


@pytest.mark.fault(29)
@pytest.mark.parametrize("bound", [{"flows": 4}, {"nfile": EG_FD_RESERVE + 4}], ids=["flow table", "descriptors"])
def test_a_full_table_makes_room_for_the_newest(bound):
    before = len(open_fds())
    with EgressOnly(**bound) as guest, udp_server() as server:
        for port in range(6000, 6020):
            guest.send_udp(port, server.getsockname()[1], b"%d" % port)
            assert server.recvfrom(10)[0] == b"%d" % port
        assert sorted(f.guest_port for f in guest.flows()) == [6016, 6017, 6018, 6019]
        assert guest.counters()["drop_udp_table"] == 0
    assert len(open_fds()) == before, "a descriptor was left open"


def test_a_dead_mapping_leaves_nothing_queued():
    """A reply waits for room when its mapping is evicted: no frame of it may come, and nothing may break."""
    with EgressOnly(udp_max=1, ring=2) as guest, udp_server() as server:
        guest.send_udp(7000, server.getsockname()[1], b"a")
        where = server.recvfrom(10)[1]
        for k in range(10):
            server.sendto(b"%d" % k, where)
        guest.settle()  # two frames in the ring, the mapping in the queue for want of room
        guest.send_udp(7001, server.getsockname()[1], b"b")
        assert server.recvfrom(10)[0] == b"b"
        got = []
        while (d := guest.datagram(timeout=0)) is not None:
            got.append((d.dport, d.data))
        assert got == [(7000, b"0"), (7000, b"1")]
        assert [f.guest_port for f in guest.flows()] == [7001]


# -- timers


@pytest.mark.fault(15, 29)
def test_udp_ends_after_30_s_unanswered_and_180_s_answered():
    """RFC 4787 4.3; before an answer only the guest's datagrams count."""
    with EgressOnly() as guest, udp_server() as server:
        def ports() -> list[int]:
            return sorted(f.guest_port for f in guest.flows())

        for port in (8000, 8001):
            guest.send_udp(port, server.getsockname()[1], b"x")
        where = [server.recvfrom(10)[1] for _ in range(2)][0]
        server.sendto(b"y", where)
        guest.recv_udp(8000)
        guest.advance(29.9)
        assert ports() == [8000, 8001]
        guest.advance(0.2)
        assert ports() == [8000]
        guest.advance(140)
        server.sendto(b"still there", where)
        guest.recv_udp(8000)
        guest.advance(179)
        assert ports() == [8000], "a datagram of the host side did not keep the mapping"
        guest.advance(2)
        assert ports() == []


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(9000, 9005), st.integers(0, 12000)), max_size=25))
def test_timers_against_a_model(steps):
    """Any sequence of (datagram of a port, then so many milliseconds): who is left is who spoke in the last 30 s.
    Deadlines moved back, entries more than one turn of the wheel away and jumps over whole turns all occur."""
    with EgressOnly() as guest:
        closed = closed_udp_port()
        last: dict[int, int] = {}
        now = 0
        guest.stop_clock()
        for port, ms in steps:
            guest.send_udp(port, closed, b"")
            last[port] = now
            guest.advance(ms / 1000)
            now += ms
            alive = {f.guest_port for f in guest.flows()}
            assert alive >= {p for p, at in last.items() if now - at < 30000}
            assert alive <= {p for p, at in last.items() if now - at < 30004}


@pytest.mark.fault(19, 41)
@settings(max_examples=30, deadline=None)
@given(gaps=st.lists(st.integers(0, 40_000_000_000), min_size=1, max_size=5))
def test_the_loop_wakes_for_each_timer_and_not_much_oftener(gaps):
    """Each mapping ends at its time, if the clock only ever moves to where the loop asked to be woken: never
    early, one tick late at most, and one wake a turn of the wheel besides."""
    with EgressOnly() as guest:
        assert guest.due() is None
        closed, now = closed_udp_port(), guest.stop_clock()
        ends: dict[int, int] = {}
        wakes = 0

        def until(at: int) -> None:
            nonlocal now, wakes
            while (due := guest.due()) is not None and due <= at:
                assert due > now, "would wake for ever"
                for end in ends.values():
                    assert now >= end or due < end + 8_000_000, "would sleep past a timer"
                now, wakes = guest.stop_clock(due), wakes + 1
                left = {f.guest_port for f in guest.flows()}
                assert all(port in left or now >= end for port, end in ends.items()), "ended early"
            assert due is not None or all(now >= end for end in ends.values()), "a timer is not waited for"
            now = guest.stop_clock(at)

        start = now
        for port, gap in enumerate(gaps, 11000):
            guest.send_udp(port, closed, b"")
            ends[port] = now + 30_000_000_000
            until(now + gap)
        until(max(ends.values()) + 8_000_000)
        assert guest.flows() == [] and guest.due() is None
        assert wakes <= len(gaps) * (2 + (now - start) // (1024 * 4_000_000))


def test_many_timers_due_at_once_all_fire():
    """More than one turn's budget, in one slot."""
    with EgressOnly(udp_max=400) as guest:
        closed = closed_udp_port()
        for port in range(10000, 10400):
            guest.put(ETH + ipv4(UDP, udp(GUEST, port, GATEWAY, closed, b""), GUEST, GATEWAY))
            if port % 50 == 0:
                guest.settle()
        guest.settle()
        assert len(guest.flows()) == 400
        guest.advance(31)
        assert guest.flows() == []


# -- output


@pytest.mark.fault(11)
@pytest.mark.parametrize("room", [{"ring": 8}, {"small": 4, "large": 1}], ids=["ring", "buffers"])
def test_nothing_is_lost_while_the_guest_is_slow(room):
    """The host socket is the buffer: egress stops reading, is idle (settle() returns), and goes on when there is
    room. Short datagrams, ones that need fragments, and one that needs more fragments than there is room for."""
    with EgressOnly(**room) as guest, udp_server() as server:
        guest.send_udp(4000, server.getsockname()[1], b"go")
        where = server.recvfrom(10)[1]
        sent = [os.urandom(n) for n in [10, 1400, 5000, 3] * 8 + [65507, 1]]
        for data in sent:
            server.sendto(data, where)
        guest.settle()
        assert 1 <= guest.waiting() <= 8, "more frames than there was room for"
        assert [guest.recv_udp(4000).data for _ in sent] == sent
        assert guest.counters()["drop_udp_full"] == 0


def test_data_upwards_does_not_wait_for_room_downwards():
    with EgressOnly(ring=2) as guest, udp_server() as server:
        port = server.getsockname()[1]
        guest.send_udp(4000, port, b"go")
        where = server.recvfrom(10)[1]
        for _ in range(5):
            server.sendto(b"fills the ring", where)
        guest.settle()
        for k in range(100):
            guest.send_udp(4000, port, b"%d" % k)
            assert server.recvfrom(10)[0] == b"%d" % k


@pytest.mark.fault(17)
def test_a_busy_flow_leaves_room_for_the_others():
    """Round robin: with 300 datagrams waiting for one flow, another's single one is not last."""
    with EgressOnly(ring=32, small=1024) as guest, udp_server() as server:
        where = []
        for port in (4000, 4001):
            guest.send_udp(port, server.getsockname()[1], b"go")
            where.append(server.recvfrom(10)[1])
        for _ in range(150):
            server.sendto(b"busy", where[0])
        guest.settle()  # the ring is full
        server.sendto(b"single", where[1])
        order = []
        while (d := guest.datagram(timeout=0)) is not None:
            order.append(d.data)
        assert len(order) == 151
        assert order.index(b"single") < 100


def test_fragments_share_one_identification_and_datagrams_do_not():
    """RFC 791 3.2, RFC 6864 4.3."""
    with EgressOnly(mtu=576) as guest, udp_server() as server:
        guest.send_udp(4000, server.getsockname()[1], b"go")
        where = server.recvfrom(10)[1]
        for _ in range(2):
            server.sendto(bytes(2000), where)
        frames = [f for f in iter(lambda: guest.recv_frame(0.2), None)]
        idents = [struct.unpack_from("!H", f, 18)[0] for f in frames]
        assert len(frames) == 8 and len(set(idents)) == 2 and idents == sorted(idents, key=idents.index)
        assert idents[:4] == [idents[0]] * 4


# -- ICMP errors


def test_icmp_errors_are_limited_in_rate():
    """RFC 1812 4.3.2.8: 50 at once, then 100 a second; what is not sent is counted."""
    with EgressOnly() as guest:
        def probes(n: int) -> int:
            before = guest.counters()["icmp_errors"]
            for _ in range(n):
                guest.send_udp(4000, 33434, b"", dst="192.0.2.1", ttl=1)
            return guest.counters()["icmp_errors"] - before

        guest.stop_clock()
        assert probes(60) == 50
        assert guest.counters()["drop_icmp_rate"] == 10
        guest.advance(0.1)
        assert probes(60) == 10
        guest.advance(1000)
        assert probes(60) == 50


@pytest.mark.parametrize("packet,why", [
    (ipv4(UDP, udp(GUEST, 1, "224.0.0.9", 2, b"x"), GUEST, "224.0.0.9", ttl=1), "multicast"),
    (ipv4(UDP, udp(GUEST, 1, "255.255.255.255", 2, b"x"), GUEST, "255.255.255.255", ttl=1), "broadcast"),
    (ipv4(UDP, udp("0.0.0.0", 1, "192.0.2.1", 2, b"x"), "0.0.0.0", "192.0.2.1", ttl=1), "no source"),
    (ipv4(UDP, udp(GUEST, 1, "192.0.2.1", 2, b"x"), GUEST, "192.0.2.1", ttl=1, frag=1), "not the first fragment"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_no_icmp_error_where_rfc1122_forbids_it(packet, why):
    """RFC 1122 3.2.2. classify lets none of these through; egress does not rely on it."""
    with EgressOnly() as guest:
        guest.put(ETH + packet, meta(length=1, ttl=1))
        guest.settle()
        guest.fence()
        assert guest.datagram(lambda d: d.icmp != (0, 0), timeout=0) is None
        assert guest.counters()["icmp_errors"] == 0


@pytest.mark.parametrize("size", [0, 100, 519, 520, 521, 1400])
def test_an_icmp_error_quotes_as_much_as_fits_in_576_bytes(size):
    """RFC 1812 4.3.2.3."""
    data = os.urandom(size)
    with EgressOnly() as guest:
        guest.send_udp(4000, 33434, data, dst="192.0.2.1", ttl=1)
        error = guest.recv_error(lambda q: q.sport == 4000)
        assert quoted(error).data == data[:520]
        assert 20 + len(error.payload) == min(576, 20 + 8 + 20 + 8 + size)


# -- distrust


def test_a_handler_is_given_only_what_lies_in_the_frame():
    """Each lie alone: dropped, counted, and the buffer comes back."""
    frame = ETH + ipv4(UDP, udp(GUEST, 4000, GATEWAY, 9, b"data"), GUEST, GATEWAY)
    n = len(frame)
    lies = [
        meta(length=5), meta(payload=n + 1), meta(payload=0xFFFFFFFF, length=0xFFFFFFFF), meta(length=0xFFFFFFFF),
        meta(l3=0), meta(l3=13), meta(l4=14), meta(l4=33), meta(l4=75), meta(payload=41, length=1),
        meta(payload=43, length=1), meta(l3=0xFFFF, l4=0xFFFF), meta(proto=6, length=4), meta(version=6, length=4),
        meta(version=0), meta(proto=0, length=4), meta(proto=50, length=4),
    ]
    with EgressOnly() as guest:
        free = lib.rn_pool_free(guest._pool, lib.RN_SMALL)
        for lie in lies:
            guest.put(frame, lie)
        guest.settle()
        assert guest.counters()["drop_bad_descriptor"] == len(lies)
        assert lib.rn_pool_free(guest._pool, lib.RN_SMALL) == free
        assert guest.flows() == []


@pytest.mark.parametrize("lie", [{"len_": 0}, {"len_": 13}, {"len_": 65000}, {"len_": 0xFFFFFFFF}, {"gen": 0x7777},
                                 {"off": -64}, {"off": 1 << 40}, {"off": 2048 * 300}])
def test_a_descriptor_that_lies_is_dropped(lie):
    frame = ETH + ipv4(UDP, udp(GUEST, 4000, GATEWAY, 9, b"data"), GUEST, GATEWAY)
    with EgressOnly() as guest:
        guest.put(frame, **lie)
        guest.settle()
        assert guest.counters()["drop_bad_descriptor"] == 1
        guest.fence()  # and egress goes on


_OFFSETS = st.sampled_from([0, 13, 14, 33, 34, 42, 54, 74, 75, 100, 0xFFFF]) | st.integers(0, 150)
_LIES = st.builds(meta, _OFFSETS, _OFFSETS, _OFFSETS, _OFFSETS | st.integers(0, 0xFFFFFFFF), ttl=st.just(1),
                  version=st.sampled_from([4, 4, 4, 0, 6]), proto=st.sampled_from([UDP, ICMP, 0, 58, 255]))


@settings(max_examples=300, deadline=None)
@given(body=st.binary(min_size=20, max_size=120), lies=_LIES, good=st.booleans(), proto=st.sampled_from([UDP, ICMP]))
def test_no_bytes_and_no_meta_break_it(body, lies, good, proto):
    """Any frame with any meta, then a ping that must be answered. The TTL is 1, so that nothing leaves the machine
    whatever the bytes say. (Under a sanitizer build this is the fuzz test.)"""
    frame = ETH + body
    guest = _shared_guest()
    guest.put(frame, meta(length=max(0, len(frame) - 42), proto=proto, ttl=1) if good else lies)
    guest.settle()
    guest.flush()
    guest.fence()


_GUEST: list[EgressOnly] = []


def _shared_guest() -> EgressOnly:
    """One egress for all examples: state left by one is what the next one meets."""
    if not _GUEST:
        _GUEST.append(EgressOnly(udp_max=8))
    return _GUEST[0]


@pytest.fixture(scope="module", autouse=True)
def _close_shared():
    yield
    while _GUEST:
        _GUEST.pop().close()


def test_a_flow_table_of_another_kind_is_refused():
    stage = lib.rn_stage_new(1, 1)
    try:
        junk = ffi.new("uint64_t[1024]")
        cfg = ffi.new("struct egress_config *", {"mtu": 1500, "raw_icmp_fd": -1})
        assert lib.stage_egress_init(stage, junk, 8192, cfg) < 0
        assert b"flow table" in ffi.string(lib.rn_stage_error(stage))
    finally:
        lib.rn_stage_free(stage)
