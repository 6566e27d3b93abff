"""The services stage between its rings: frames in, frames out, sleep, drain. DHCP and DNS have tests of their own."""
from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from pipeline.services import Config, Services, same_user, serve
from pipeline.services.loop import READ, Loop
from pipeline.topology import Role
from shm._dataplane import ffi, lib
from shm.arena import Arena
from shm.cell import Session
from shm.ring import Desc, Ring

GUEST_MAC, GATEWAY_MAC = "52:54:00:00:00:01", "02:ab:cd:00:00:01"
FEED, ROW, SINK = 0, 1, 2  # stage rows: who feeds us, we, who takes our frames
HEADER_ROOM = 82  # bytes from a buffer's header to the Ethernet header (RN_BUF_ETH_OFF)


class FakeContext:
    """What serve() needs of pipeline.stage.StageContext."""

    draining = False
    standing = False


class Bench:
    """One services stage, with the other ends of its rings in our hands."""

    def __init__(self, mtu: int = 1500, small: int = 32, large: int = 4, slots: int = 64, **config: object) -> None:
        self.arena = Arena.create([(16, 2), (small, large), (0, 0)])
        self.rx, self.tx = Ring.create(16), Ring.create(slots)
        self.session = Session.create(3)
        self.bells = [lib.rn_bell_new() for _ in range(3)]
        self.stage = lib.rn_stage_new(ROW, 1)
        assert lib.rn_stage_set_session(self.stage, self.session.mem, self.session.size) == 0
        assert lib.rn_stage_set_arena(self.stage, self.arena.mem, self.arena.size, 1) == 0
        for row, bell in enumerate(self.bells):
            assert lib.rn_stage_set_bell(self.stage, row, os.dup(bell)) == 0
        assert lib.rn_stage_add_input(self.stage, self.rx.mem, self.rx.size, FEED) == 0
        assert lib.rn_stage_add_output(self.stage, Role.GUEST, self.tx.mem, self.tx.size, SINK) == 0
        self.feed, self.sink = self.rx.producer(self.bells[ROW]), self.tx.consumer(self.bells[ROW])
        self.feed_pool, self.sink_pool = self.arena.pool(FEED), self.arena.pool(SINK, owner=False)
        self.loop = Loop(lambda: 0.0)
        settings = {"gateway4": "10.0.2.1", "prefix": 24, "gateway_mac": GATEWAY_MAC, "mtu": mtu, "guest4": "10.0.2.2",
                    "pool_start": "10.0.2.2", "pool_end": "10.0.2.254", "dns": ["127.0.0.1#9"]}
        self.services = Services(Config(**(settings | config)), self.stage, self.loop)
        self.memory = self.arena.buffer()

    def close(self) -> None:
        self.services.close()
        self.loop.close()
        lib.rn_stage_fini(self.stage)
        lib.rn_stage_free(self.stage)
        self.memory.release()
        del self.feed, self.sink, self.feed_pool, self.sink_pool
        for thing in (self.arena, self.rx, self.tx, self.session):
            thing.destroy()
        for bell in self.bells:
            os.close(bell)

    def put(self, frame: bytes, *, meta: bytes | None = None, length: int | None = None) -> Desc:
        """Hand a frame over as classify does, with true or forged metadata."""
        desc = self.feed_pool.take(len(frame) if length is None else length)
        assert desc is not None
        self.memory[desc.off : desc.off + len(frame)] = frame
        # struct rn_meta: version, protocol, TTL, flags, L3, L4, payload offset, each, length
        true = struct.pack("<4B4HI", 4, 17, 64, 0, 14, 34, 42, 0, len(frame) - 42)
        at = desc.off - HEADER_ROOM + 16
        self.memory[at : at + 16] = true if meta is None else meta
        self.feed.put(desc)
        self.feed.publish()
        return desc

    def turn(self) -> None:
        lib.rn_services_begin(self.stage)
        while self.services.turn():
            pass
        assert lib.rn_services_end(self.stage) == 0

    def take(self) -> list[Ether]:
        """Frames on their way to the guest, read and freed."""
        found = self.sink.peek()
        frames = [bytes(self.memory[d.off : d.off + d.len]) for d in found]
        for d in found:
            assert bytes(self.memory[d.off - 12 : d.off]) == bytes(12)  # virtio-net header: nothing to say
            self.sink_pool.give(d)
        self.sink.consume(len(found))
        return [Ether(f) for f in frames]

    def count(self, name: str) -> int:
        return self.session.counters(ROW, "services")[name]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def benches() -> Iterator[object]:
    made: list[Bench] = []

    def make(**config: object) -> Bench:
        made.append(Bench(**config))
        return made[-1]

    yield make
    for each in made:
        each.close()


def discover() -> bytes:
    return bytes(Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255")
                 / UDP(sport=68, dport=67) / BOOTP(op=1, chaddr=bytes.fromhex(GUEST_MAC.replace(":", "")))
                 / DHCP(options=[("message-type", "discover"), "end"]))


def ask(name: str, qtype: str = "A", sport: int = 40000) -> bytes:
    return bytes(Ether(src=GUEST_MAC, dst=GATEWAY_MAC) / IP(src="10.0.2.2", dst="10.0.2.1")
                 / UDP(sport=sport, dport=53) / DNS(id=7, rd=1, qd=DNSQR(qname=name, qtype=qtype)))


def checked(frame: Ether) -> Ether:
    """Both checksums are right: scapy computes them anew."""
    again = frame.copy()
    del again[IP].chksum
    if again.haslayer(UDP) and not int(again[IP].flags) & 1:  # of a fragment only the header
        del again[UDP].chksum
    assert bytes(Ether(bytes(again))) == bytes(frame)
    return frame


def test_a_lease_through_the_rings(bench):
    bench.put(discover())
    bench.turn()
    (offer,) = bench.take()
    checked(offer)
    assert (offer.src, offer.dst) == (GATEWAY_MAC, GUEST_MAC)
    assert (offer[IP].src, offer[IP].dst, offer[IP].ttl, offer[IP].flags) == ("10.0.2.1", "10.0.2.2", 64, "DF")
    assert (offer[UDP].sport, offer[UDP].dport) == (67, 68)
    assert offer[BOOTP].yiaddr == "10.0.2.2" and ("interface-mtu", 1500) in offer[DHCP].options
    assert bench.count("dhcp_requests") == bench.count("dhcp_replies") == 1
    assert bench.count("frames_in") == bench.count("frames_out") == 1
    assert bench.count("bytes_out") == len(offer)
    assert bench.feed_pool.free() == 16  # the guest's buffer went home


def test_a_name_through_the_rings(bench):
    bench.put(ask("gateway.ringnet.internal"))
    bench.turn()
    (reply,) = bench.take()
    checked(reply)
    assert (reply[IP].src, reply[IP].dst, reply[UDP].sport, reply[UDP].dport) == ("10.0.2.1", "10.0.2.2", 53, 40000)
    assert reply[DNS].id == 7 and reply[DNS].an[0].rdata == "10.0.2.1"
    assert bench.count("dns_queries") == bench.count("dns_local") == 1


def test_other_ports_are_counted(bench):
    bench.put(bytes(Ether() / IP(src="10.0.2.2", dst="10.0.2.1") / UDP(sport=1, dport=69) / b"x"))
    bench.turn()
    assert bench.take() == [] and bench.count("drop_services_port") == 1


def test_a_reply_over_the_mtu_goes_in_fragments(benches):
    """RFC 791 3.2: offsets in units of 8, more-fragments on all but the last, one identification."""
    bench = benches(mtu=576)
    payload = bytes(i & 255 for i in range(3000))
    gateway, guest = socket.inet_aton("10.0.2.1"), socket.inet_aton("10.0.2.2")
    assert bench.services.send(payload, guest, 5353, bytes(6), 53, gateway) == 0
    assert bench.services.send(payload, guest, 5353, bytes(6), 53, gateway) == 0
    frames = bench.take()
    assert len(frames) == 12
    for part in frames:
        assert len(part) <= 576 + 14
        raw = bytes(part[IP])
        assert checked(part) and len(raw) == part[IP].len
    first, second = frames[:6], frames[6:]
    assert len({f[IP].id for f in first}) == 1 and first[0][IP].id != second[0][IP].id
    assert [int(f[IP].flags) for f in first] == [1, 1, 1, 1, 1, 0]
    assert [f[IP].frag * 8 for f in first] == [552 * i for i in range(6)]
    body = b"".join(bytes(f[IP].payload) for f in first)
    whole = checked(Ether(bytes(Ether() / IP(src="10.0.2.1", dst="10.0.2.2", proto=17) / body)))
    assert bytes(whole[UDP].payload) == payload and whole[UDP].len == 3008


def test_largest_and_too_large_replies(benches):
    bench = benches(mtu=65535)
    a = socket.inet_aton("10.0.2.1")
    assert bench.services.send(bytes(65507), a, 1, bytes(6), 2, a) == 0
    (frame,) = bench.take()
    assert len(frame) == 65535 + 14 and frame[IP].flags == "DF"
    assert bench.services.send(bytes(65508), a, 1, bytes(6), 2, a) < 0
    assert bench.take() == []


@pytest.mark.parametrize("small,slots", [(32, 2), (3, 64)])
def test_a_reply_without_room_or_buffer_is_dropped_whole_and_counted(benches, small, slots):
    bench = benches(mtu=576, small=small, slots=slots, large=0)
    a = socket.inet_aton("10.0.2.1")
    assert bench.services.send(bytes(3000), a, 1, bytes(6), 2, a) < 0
    assert bench.take() == []
    assert bench.services.send(b"x", a, 1, bytes(6), 2, a) == 0  # and nothing was lost by it
    bench.turn()
    assert len(bench.take()) == 1 and bench.count("drop_services_reply_full") == 1


@pytest.mark.parametrize("meta", [
    struct.pack("<4BHHII", 6, 17, 64, 0, 14, 34, 42, 10),  # not IPv4
    struct.pack("<4BHHII", 4, 6, 64, 0, 14, 34, 42, 10),  # TCP
    struct.pack("<4BHHII", 4, 17, 64, 0, 300, 34, 42, 10),  # L3 behind the end
    struct.pack("<4BHHII", 4, 17, 64, 0, 14, 65535, 42, 10),
    struct.pack("<4BHHII", 4, 17, 64, 0, 14, 34, 42, 2**32 - 1),  # length that overflows
    struct.pack("<4BHHII", 4, 17, 64, 0, 14, 34, 2**32 - 1, 2),
    struct.pack("<4BHHII", 4, 17, 64, 0, 14, 34, 42, 400),
])
def test_metadata_that_contradicts_the_frame_is_dropped(bench, meta):
    """classify could be taken over: no offset of its is believed."""
    bench.put(ask("gateway.ringnet.internal"), meta=meta)
    bench.put(ask("gateway.ringnet.internal"))
    bench.turn()
    assert len(bench.take()) == 1
    assert bench.count("drop_bad_meta") == 1
    assert bench.feed_pool.free() == 16


def test_a_descriptor_that_names_no_buffer_is_dropped(bench):
    bench.feed.put(Desc(2**40, 60, 0, 0))
    bench.feed.publish()
    bench.put(ask("gateway.ringnet.internal"))
    bench.turn()
    assert len(bench.take()) == 1 and bench.count("drop_bad_descriptor") == 1


def test_the_loop_sleeps_wakes_and_drains(bench):
    """Asleep after a turn without work; a frame rings the doorbell; on cancel what is in the ring is still served."""
    ctx = FakeContext()
    bench.loop.watch(lib.rn_services_bell(bench.stage), READ, lambda _: None)
    asleep: list[bool] = []

    def while_asleep(max_wait: float | None = None, real=bench.loop.step) -> int:
        if max_wait is None:  # the blocking step: the stage announced sleep
            asleep.append(bench.session.cell(ROW).asleep and bench.rx.stat().asleep)
            if len(asleep) == 1:
                bench.put(ask("gateway.ringnet.internal"))
            else:
                ctx.draining = True
                bench.put(ask("host.ringnet.internal", sport=50000))
        return real(max_wait)

    bench.loop.step = while_asleep
    assert serve(bench.services, ctx, []) == "drained"
    assert asleep == [True, True]
    assert [f[UDP].dport for f in bench.take()] == [40000, 50000]
    assert not bench.session.cell(ROW).asleep and not bench.rx.stat().asleep


def test_a_frame_that_comes_just_before_the_end_is_still_served(bench):
    ctx, late = FakeContext(), [True]
    ctx.draining = True

    def late_frame(max_wait: float | None = None, real=bench.loop.step) -> int:
        if late:
            late.clear()
            bench.put(ask("gateway.ringnet.internal"))
        return real(max_wait)

    bench.loop.step = late_frame
    assert serve(bench.services, ctx, []) == "drained"
    assert len(bench.take()) == 1


def test_the_stop_word_ends_the_loop(bench):
    bench.session.stop(ROW)
    assert serve(bench.services, FakeContext(), []) == "stopped"


def test_a_neighbour_with_an_impossible_counter_ends_the_stage(bench):
    from pipeline.stage import StageError

    ring = bench.rx.buffer()
    struct.pack_into("<Q", ring, 64, 2**63)  # producer's tail
    ring.release()
    with pytest.raises(StageError, match="tail"):
        serve(bench.services, FakeContext(), [])


def test_dns_over_tcp_is_for_our_own_user(monkeypatch):
    a, b = socket.socketpair()
    with a, b:
        assert same_user(a)
        monkeypatch.setattr(os, "geteuid", lambda uid=os.geteuid(): uid + 1)
        assert not same_user(a)


def test_resolver_socket_serves_tcp_queries(benches):
    bench = benches()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # abstract, name chosen by the kernel
    listener.listen()
    services = Services(Config(gateway4="10.0.2.1", prefix=24, gateway_mac=GATEWAY_MAC, mtu=1500, guest4="10.0.2.2",
                               pool_start="10.0.2.2", pool_end="10.0.2.254", dns=["127.0.0.1#9"]),
                        bench.stage, bench.loop, listener)
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    query = bytes(DNS(id=99, rd=1, qd=DNSQR(qname="host.ringnet.internal")))
    client.sendall(struct.pack("!H", len(query)) + query)
    client.settimeout(0)
    reply = b""
    while not reply:
        bench.loop.step(5)
        try:
            reply = client.recv(4096)
        except BlockingIOError:
            pass
    assert DNS(reply[2:]).id == 99 and DNS(reply[2:]).an[0].rdata == "10.0.2.1"
    services.close()
    client.close()
    listener.close()


def test_config_rejects_what_cannot_be():
    import msgspec

    good = {"gateway4": "10.0.2.1", "prefix": 24, "gateway_mac": GATEWAY_MAC, "mtu": 1500, "guest4": "10.0.2.2",
            "pool_start": "10.0.2.2", "pool_end": "10.0.2.254"}
    msgspec.convert(good | {"type": "services"}, Config)
    for change in ({"mtu": 20}, {"prefix": 0}, {"lease_s": 1}, {"unknown": 1}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(good | change, Config)


def test_every_counter_the_python_half_names_is_declared():
    """A name that rn_metrics.def lacks would raise in the middle of a session."""
    import re
    from pathlib import Path

    names = {ffi.string(lib.rn_counter_name(i)).decode() for i in range(lib.rn_ncounters())
             if ffi.string(lib.rn_counter_stage(i)) in (b"services", b"all")}
    root = Path(__file__).resolve().parents[2] / "pipeline" / "services"
    used = {n for f in root.glob("*.py") for n in re.findall(r'count\("(\w+)"', f.read_text())}
    assert used and used <= names
