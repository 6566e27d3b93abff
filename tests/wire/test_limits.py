"""What happens at each bound: what runs goes on, the newcomer gets an answer, a counter says so, memory stays bounded.

Egress alone where a small table shows it best, the whole pipeline where processes, descriptors and memory matter.
"""
from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.conformance.script import FLAGS, Script
from tests.harness import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    TCP,
    EgressOnly,
    Guest,
    Wire,
    checksum,
    fill,
    fresh_port,
    ipv4,
    mac_bytes,
    udp,
    udp_server,
)
from tests.netlab import Netns
from tests.wire.routed import inside

SYN = FLAGS["SYN"]


def alive(c: Script, n: int = 1000) -> None:
    """Data goes both ways on an established connection."""
    up, down = c.snd_max, c.rcv_nxt
    c.do(f"guest sends ACK PSH seq={up} ack={down} len={n}", f"guest awaits ACK ack={up + n}", f"host reads {n}",
         f"host writes {n}", f"guest takes {n}")


def syn(sport: int, dport: int, dst: str = GATEWAY) -> bytes:
    """A SYN's Ethernet frame."""
    seg = struct.pack("!HHIIBBHHH", sport, dport, 1000, 0, 5 << 4, SYN, 65535, 0, 0)
    pseudo = socket.inet_aton(GUEST) + socket.inet_aton(dst) + struct.pack("!BBH", 0, TCP, len(seg))
    seg = seg[:16] + struct.pack("!H", checksum(pseudo + seg)) + seg[18:]
    return mac_bytes(GATEWAY_MAC) + mac_bytes(Guest.mac) + b"\x08\x00" + ipv4(TCP, seg, GUEST, dst)


@contextmanager
def never_accepting() -> Iterator[int]:
    """The port of a listener whose queue is full: a connect() to it stays under way."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for s in fill(server):
            stack.enter_context(s)
        yield server.getsockname()[1]


def memory(w: Wire) -> dict[str, int]:
    """Unshared pages of each stage, bytes: what only this process holds (proc(5), smaps_rollup)."""
    out = {}
    for name in w.session.stages():
        with open(f"/proc/{w.session.child(name).pid}/smaps_rollup") as f:
            rows = dict(line.split(":", 1) for line in f if ":" in line and "kB" in line)
        out[name] = sum(int(rows[key].split()[0]) for key in ("Private_Clean", "Private_Dirty")) * 1024
    return out


# -- tables


def test_flow_table_full_of_tcp() -> None:
    """I4: the connection that finds no entry is reset at once; those that have one go on; an end makes room."""
    with EgressOnly(flows=8) as guest, ExitStack() as stack:
        guest.stop_clock()
        inside = [stack.enter_context(Script.on(guest)) for _ in range(8)]
        for c in inside:
            c.do("connected")
        late = stack.enter_context(Script.on(guest))
        late.do("host listens", "guest sends SYN seq=0 mss=1460 wscale=7", "guest gets RST ACK seq=0 ack=1",
                "counter tcp_over_limit +1")
        for c in inside:
            alive(c)
        inside[3].do("guest sends RST seq=1001", "host reads reset")
        late.do("guest sends SYN seq=0 mss=1460 wscale=7", "guest gets SYN ACK seq=new ack=1",
                "guest sends ACK seq=1 ack=1", "host accepts")
        late.rcv_nxt = 1
        alive(late)


def test_flow_table_full_of_time_wait() -> None:
    """Connections that are over and only remembered (RFC 9293 3.6.1) make room, the oldest first."""
    with EgressOnly(flows=4) as guest, ExitStack() as stack:
        guest.stop_clock()
        over = []
        for _ in range(4):
            c = stack.enter_context(Script.on(guest))
            c.do("connected", "host shuts down", "guest gets FIN ACK seq=1 ack=1", "guest sends FIN ACK seq=1 ack=2",
                 "guest gets ACK seq=2 ack=2")
            over.append(c)
        late = stack.enter_context(Script.on(guest))
        late.do("connected")
        alive(late)
        over[3].do("guest sends FIN ACK seq=1 ack=2", "guest gets ACK seq=2 ack=2")  # still remembered
        over[0].do("guest sends FIN ACK seq=1 ack=2", "guest gets RST seq=2")


def test_flow_table_full_of_udp_leaves_tcp_connections_alone() -> None:
    """A UDP mapping that needs an entry takes one from the oldest mapping, never from a connection."""
    with EgressOnly(flows=8, udp_max=8) as guest, Script.on(guest) as c, udp_server() as server:
        guest.stop_clock()
        c.do("connected")
        for k in range(50):
            guest.send_udp(5000 + k, server.getsockname()[1], b"x")
            assert server.recvfrom(10)[0] == b"x"
        assert guest.counters()["udp_evicted"] == 50 - 7
        alive(c)


def test_flow_table_full_of_tcp_and_a_udp_newcomer() -> None:
    """With no mapping to give up the datagram is dropped and counted; with room again it goes out."""
    with EgressOnly(flows=4) as guest, ExitStack() as stack, udp_server() as server:
        guest.stop_clock()
        inside = [stack.enter_context(Script.on(guest)) for _ in range(4)]
        for c in inside:
            c.do("connected")
        guest.send_udp(5000, server.getsockname()[1], b"one")
        assert guest.counters()["drop_udp_table"] == 1
        inside[0].do("guest sends RST seq=1")
        guest.send_udp(5000, server.getsockname()[1], b"two")
        assert server.recvfrom(10)[0] == b"two"
        alive(inside[1])


def test_pending_connects_full() -> None:
    """I4: what is over the bound is reset at once; an established connection does not notice; an end makes room."""
    with EgressOnly(pending_max=4) as guest, Script.on(guest) as old, ExitStack() as stack, never_accepting() as port:
        guest.stop_clock()
        old.do("connected")
        waiting = [stack.enter_context(Script.on(guest)) for _ in range(6)]
        for c in waiting:
            c.port = port
            c.do("guest sends SYN seq=0 mss=1460 wscale=7")
        for c in waiting[:4]:
            c.do("guest gets nothing")
        for c in waiting[4:]:
            c.do("guest gets RST ACK seq=0 ack=1")
        assert guest.counters()["tcp_over_limit"] == 2
        alive(old)
        waiting[0].do("guest sends RST seq=1")  # the guest gives one up
        fresh = stack.enter_context(Script.on(guest))
        fresh.do("connected")
        alive(fresh)


def test_syn_flood_to_a_port_that_listens_and_never_acks() -> None:
    """Half-open connections fill the table, no more; each SYN is answered; within 63 s all are gone again."""
    with EgressOnly(flows=64, ring=2048, small=4096) as guest, Script.on(guest) as old, \
            socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        guest.stop_clock()
        old.do("connected")
        ports = [30000 + k for k in range(500)]
        for p in ports:
            guest.send(syn(p, server.getsockname()[1]))
        answers = [f[47] for f in iter(lambda: guest.recv_frame(0), None)]
        assert answers.count(FLAGS["SYN"] | FLAGS["ACK"]) == 63
        assert answers.count(FLAGS["RST"] | FLAGS["ACK"]) == 500 - 63
        alive(old)
        for wait in (1, 2, 4, 8, 16, 33):
            guest.advance(wait + 0.01)
            while guest.recv_frame(0) is not None:
                pass
        assert len(guest.flows()) == 1
        assert guest.counters()["tcp_timed_out"] == 63
        alive(old)


# -- descriptors


def test_descriptors_at_their_limit() -> None:
    """The table's bound on descriptors: RST for a connection, the oldest mapping goes for UDP."""
    with EgressOnly(nfile=32 + 6) as guest, ExitStack() as stack, udp_server() as server:
        guest.stop_clock()
        inside = [stack.enter_context(Script.on(guest)) for _ in range(4)]
        for c in inside:
            c.do("connected")
        for k in range(10):
            guest.send_udp(5000 + k, server.getsockname()[1], b"x")
            assert server.recvfrom(10)[0] == b"x"
        assert guest.counters()["udp_evicted"] == 8
        late = stack.enter_context(Script.on(guest))
        late.do("host listens", "guest sends SYN seq=0 mss=1460 wscale=7", "guest gets RST ACK seq=0 ack=1",
                "counter tcp_over_limit +1")
        for c in inside:
            alive(c)


@contextmanager
def soft_nofile(n: int) -> Iterator[None]:
    """RLIMIT_NOFILE of this process and what it starts meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(n, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_systems_own_descriptor_limit() -> None:
    """socket() itself fails with EMFILE, whatever the configuration says: an answer all the same."""
    with EgressOnly(nfile=1 << 20, flows=1024) as guest, Script.on(guest) as old, ExitStack() as stack:
        guest.stop_clock()
        old.do("connected")
        late = stack.enter_context(Script.on(guest))
        late.do("host listens")
        with udp_server() as server:
            top = os.dup(0)
            os.close(top)
            with soft_nofile(top):  # not one more
                late.do("guest sends SYN seq=0 mss=1460 wscale=7", "guest gets RST ACK seq=0 ack=1")
                guest.send_udp(5000, server.getsockname()[1], b"lost")
                assert guest.counters()["drop_udp_table"] == 1
                alive(old)
            late.do("guest sends SYN seq=0 mss=1460 wscale=7", "guest gets SYN ACK seq=new ack=1",
                    "guest sends ACK seq=1 ack=1", "host accepts")
            late.rcv_nxt = 1
            alive(late)


# -- arena and rings


@pytest.mark.parametrize("room", [{"ring": 2}, {"small": 2, "large": 1}], ids=["ring", "arena"])
def test_no_room_towards_the_guest(room: dict[str, int]) -> None:
    """Egress waits; what a guest sends is still taken; when the guest reads again, everything comes."""
    with EgressOnly(**room) as guest, Script.on(guest) as c, Script.on(guest) as other, udp_server() as server:
        guest.stop_clock()
        c.do("connected")
        other.do("connected")
        c.do("host writes 60000")
        other.do("host writes 60000")
        guest.settle()
        assert 1 <= guest.waiting() <= 2
        for k in range(50):
            guest.send_udp(5000, server.getsockname()[1], b"%d" % k)
            assert server.recvfrom(10)[0] == b"%d" % k
        c.do("guest takes 60000")
        other.do("guest takes 60000")
        assert guest.counters()["stalls_room"] + guest.counters()["stalls_buf"] > 0
        assert guest.counters()["tcp_retransmit_frames"] == 0


def test_a_guest_that_sends_and_never_reads_the_link(make_wire) -> None:
    """All rings and buffers towards it fill up; what it sends is still served, and reading again brings what waited.

    The link's own queue is the last place: the pings that found no room anywhere are dropped and counted.
    """
    w: Wire = make_wire()
    with udp_server() as server, Script.on(w) as c:
        c.do("connected", "host writes 3000000")
        for k in range(3000):
            w.ping(7, k, bytes(1000))
            if k % 100 == 0:
                w.send_udp(5000, server.getsockname()[1], b"%d" % k)
                assert server.recvfrom(10)[0] == b"%d" % k
        c.do("guest takes 3000000")
        w.flush()
        w.ping(8, 1)
        assert w.recv_echo(8).data == b""


# -- floods through the whole pipeline


@pytest.mark.netns
@pytest.mark.timeout(300)
def test_udp_sweep_of_60000_ports_from_one_socket(make_netns: Callable[[str], Netns]) -> None:
    """RFC 4787 REQ-1: one mapping, whatever the number of destinations; each closed port is told as far as the limit on
    ICMP errors lets it; an established connection goes on; no memory is taken for it. In a namespace of its own: the
    sweep would come by other tests' servers."""
    with inside(make_netns("h")), Wire() as w, Script.on(w) as c, udp_server() as server:
        c.do("connected")
        alive(c)
        before, counted = memory(w), w.counters()
        frame_head = mac_bytes(GATEWAY_MAC) + mac_bytes(w.mac) + b"\x08\x00"
        port = fresh_port()
        assert 5000 <= server.getsockname()[1] < 65000
        for dport in range(5000, 65000):
            w.send(frame_head + ipv4(17, udp(GUEST, port, GATEWAY, dport, b""), GUEST, GATEWAY))
            if dport % 10000 == 0:
                w.fence()
                w.flush()
                alive(c)
        w.fence()
        w.flush()
        after = w.counters()
        assert after["udp_mappings"] - counted["udp_mappings"] == 1
        told = after["icmp_errors"] - counted["icmp_errors"] + after["drop_icmp_rate"] - counted["drop_icmp_rate"]
        assert told > 0, "nobody was told that a port is closed"
        server.setblocking(False)
        assert server.recv(10) == b"", "the sweep came by this server, too"
        server.settimeout(60)
        w.send_udp(port, server.getsockname()[1], b"still there")
        assert server.recvfrom(20)[0] == b"still there"
        alive(c)
        grown = {name: n - before[name] for name, n in memory(w).items()}
        assert max(grown.values()) < 4 << 20, grown


@pytest.mark.timeout(300)
def test_udp_from_60000_source_ports(make_wire) -> None:
    """Mappings are bounded: the oldest go, are counted, and their descriptors with them; the newest works."""
    w: Wire = make_wire(udp_max=500)
    with Script.on(w) as c, udp_server() as server:
        c.do("connected")
        before = memory(w)
        frame_head = mac_bytes(GATEWAY_MAC) + mac_bytes(w.mac) + b"\x08\x00"
        dport = server.getsockname()[1]
        got = 0
        for k, sport in enumerate(range(5000, 65000)):
            w.send(frame_head + ipv4(17, udp(GUEST, sport, GATEWAY, dport, b"x"), GUEST, GATEWAY))
            if k % 2000 == 1999:
                w.fence()
                server.setblocking(False)
                with pytest.raises(BlockingIOError):
                    while True:
                        server.recv(10)
                        got += 1
                server.settimeout(60)
        w.fence()
        counters = w.counters()
        assert counters["udp_mappings"] == 60000 and counters["udp_evicted"] == 59500
        assert got == 60000 - counters["drop_udp_table"] - counters["drop_udp_send"]
        fds = len(os.listdir(f"/proc/{w.session.child('egress').pid}/fd"))
        assert fds < 500 + 64
        w.send_udp(64999, dport, b"newest")
        data, where = server.recvfrom(10)
        server.sendto(data, where)
        assert w.recv_udp(64999).data == b"newest"
        alive(c)
        grown = {name: n - before[name] for name, n in memory(w).items()}
        assert max(grown.values()) < 8 << 20, grown


@pytest.mark.timeout(300)
def test_syn_flood_through_the_pipeline(make_wire) -> None:
    """20 000 SYNs to a server that never answers: the bound holds, the rest is reset, a connection goes on."""
    w: Wire = make_wire(pending_max=100)
    with Script.on(w) as c, never_accepting() as port:
        c.do("connected")
        alive(c)
        before = memory(w)
        resets = 0
        for k in range(20000):
            w.send(syn(5000 + k, port))
            if k % 500 == 499:
                while (frame := w.recv_frame(0)) is not None:
                    resets += frame[23] == TCP and frame[47] == FLAGS["RST"] | FLAGS["ACK"]
        w.fence()
        w.flush()
        counters = w.counters()
        assert counters["tcp_over_limit"] == 20000 - 100
        assert resets > 0
        alive(c)
        grown = {name: n - before[name] for name, n in memory(w).items()}
        assert max(grown.values()) < 4 << 20, grown


def test_stages_run_where_they_are_told(make_wire):
    first = min(os.sched_getaffinity(0))
    w: Wire = make_wire(cpus=[f"egress={first}"])
    stages = w.session.stages()
    assert os.sched_getaffinity(stages["egress"]) == {first}
    assert os.sched_getaffinity(stages["guest_tx"]) == os.sched_getaffinity(0)
