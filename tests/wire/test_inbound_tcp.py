"""TCP forwards, one test a rule: a real client on the host's loopback, a scripted guest on the link.

The guest is the passive end: `accept()` waits for a SYN and makes a GuestTcp of it. What needs a clock (SYN timeouts)
runs against egress alone, in the test's process (EgressOnly), with frames made by scapy.
"""
from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import ARP, Ether

from pipeline.forwards import Forward, ForwardError
from shm._dataplane import ffi, lib
from tests.harness import DEADLINE, GATEWAY_MAC, EgressOnly, Wire, fresh_port
from tests.wire.guest_tcp import (
    ACK,
    FIN,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    M32,
    RST,
    SYN,
    GuestTcp,
    Segment,
    checksum,
    ethernet,
    ipv4,
    parse_ipv4,
    receive,
)
from tests.wire.test_tcp import read_exactly


@contextlib.contextmanager
def forward(wire: Wire, **more: Any) -> Iterator[Forward]:
    """A rule on a free port of 127.0.0.1 to a port of the guest of its own."""
    rule = Forward(**({"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 0, "guest_port": fresh_port()} | more))
    [made] = wire.session.change_forwards([rule])
    try:
        yield made
    finally:
        if made in wire.session.forwards():
            wire.session.change_forwards(remove=[made], close_flows=True)
        assert made not in wire.session.forwards()


def known(wire: Wire) -> None:
    """Let the guest say something, so that its MAC address is known."""
    GuestTcp(wire.sock, 1)._echo()


def client(rule: Forward, source: tuple[str, int] | None = None) -> socket.socket:
    s = socket.socket()
    s.settimeout(DEADLINE)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if source:
        s.bind(source)
    s.connect(("127.0.0.1", rule.host_port))
    return s


def syn_to(wire: Wire, port: int, timeout: float = DEADLINE) -> tuple[str, int, Segment] | None:
    """The next SYN without ACK to a port of the guest that is not one sent again: (source address, source port, segment)."""
    seen = wire.__dict__.setdefault("syns_seen", set())
    while (frame := receive(wire.sock, timeout)) is not None:
        ip = parse_ipv4(frame)
        if ip is None or ip[0] != 6:
            continue
        sport, dport = struct.unpack("!HH", ip[3][:4])
        if dport == port and ip[3][13] & (SYN | ACK) == SYN:
            segment = GuestTcp(wire.sock, sport, ip[1], sport=port)._mine(frame)
            assert segment is not None
            assert frame[:6] == GUEST_MAC
            if (ip[1], sport, segment.seq) in seen:
                continue
            seen.add((ip[1], sport, segment.seq))
            return ip[1], sport, segment
    return None


def asked(wire: Wire, rule: Forward, **guest: Any) -> tuple[GuestTcp, Segment]:
    """The guest's end of a connection whose SYN has come, and the SYN."""
    got = syn_to(wire, rule.guest_port)
    assert got, "no SYN"
    address, port, syn = got
    g = GuestTcp(wire.sock, port, address, sport=rule.guest_port, **guest)
    g.irs, g.rcv_nxt = syn.seq, (syn.seq + 1) & M32
    g.peer_wscale = syn.wscale or 0
    return g, syn


def answer(g: GuestTcp) -> Segment:
    """SYN-ACK; returns the ACK that completes the handshake."""
    g.send(SYN | ACK, opts=g.syn_options())
    g.snd_nxt = (g.isn + 1) & M32
    while (ack := g.recv()) is not None and ack.flags & SYN:
        pass  # sent again meanwhile
    assert ack is not None and ack.flags & (FIN | SYN | RST | ACK) == ACK, ack
    assert (ack.seq, ack.ack) == (g.rcv_nxt, g.snd_nxt)
    return ack


@contextlib.contextmanager
def established(wire: Wire, **guest: Any) -> Iterator[tuple[GuestTcp, socket.socket, Forward]]:
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        g, _ = asked(wire, rule, **guest)
        answer(g)
        yield g, host, rule


def is_reset(s: socket.socket) -> bool:
    try:
        s.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_syn_carries_our_options_and_the_clients_port(wire: Wire) -> None:
    """RFC 9293 3.7.1, RFC 7323 2.2, RFC 2018 2; a client on loopback appears as the gateway."""
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        g, syn = asked(wire, rule)
        assert (g.dst, g.port) == (GATEWAY, host.getsockname()[1])
        assert (syn.mss, syn.wscale, syn.sack_ok, syn.data) == (wire.mtu - 40, 7, True, b"")
        assert syn.flags == SYN


def test_data_both_ways(wire: Wire) -> None:
    with established(wire) as (g, host, _):
        host.sendall(b"request")
        assert g.pull(7) == b"request"
        g.push(b"answer")
        g.wait_ack()
        assert read_exactly(host, 6) == b"answer"


@pytest.mark.parametrize("listens", ["", "::", "::1"])
def test_clients_by_ipv6_are_the_gateway(wire: Wire, listens: str) -> None:
    known(wire)
    with forward(wire, host_addr=listens) as rule:
        with socket.create_connection(("::1", rule.host_port), DEADLINE) as host:
            g, _ = asked(wire, rule)
            assert (g.dst, g.port) == (GATEWAY, host.getsockname()[1])
            answer(g)
            g.push(b"up")
            assert read_exactly(host, 2) == b"up"
            host.sendall(b"down")
            assert g.pull(4) == b"down"
        if listens:
            with pytest.raises(ConnectionRefusedError):
                client(rule)
        else:
            with client(rule):
                assert asked(wire, rule)[0].dst == GATEWAY


def test_nothing_is_taken_before_the_guest_answered(wire: Wire) -> None:
    """The bytes wait in the kernel: none goes out before the handshake, all do after it."""
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        host.sendall(b"early")
        g, _ = asked(wire, rule)
        assert g.fence() == []
        answer(g)
        assert g.pull(5) == b"early"


@pytest.mark.fault(25)
def test_guest_refuses_and_the_client_is_reset(wire: Wire) -> None:
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        g, _ = asked(wire, rule)
        g.send(RST | ACK, seq=0)
        assert is_reset(host)
        assert g.fence() == []


def test_a_reset_that_acknowledges_something_else_is_ignored(wire: Wire) -> None:
    """RFC 9293 3.10.7.3, second: only if the ACK was acceptable."""
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        g, _ = asked(wire, rule)
        g.send(RST | ACK, seq=0, ack=g.rcv_nxt + 1)
        g.send(RST, seq=0)
        answer(g)
        host.sendall(b"on")
        assert g.pull(2) == b"on"


@pytest.mark.fault(25)
def test_client_that_resets_early_stops_the_syns(wire: Wire) -> None:
    """No SYN goes on; the guest may have seen one, so it gets a RST without ACK, which a stack in
    SYN-RECEIVED takes."""
    known(wire)
    with forward(wire) as rule:
        host = client(rule)
        g, syn = asked(wire, rule)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        host.close()
        rst = g.expect(RST)
        assert rst.seq == (syn.seq + 1) & M32
        g.send(SYN | ACK, opts=g.syn_options())  # too late
        assert g.expect(RST).seq == g.rcv_nxt


def test_client_that_only_finished_sending_gets_its_answer(wire: Wire) -> None:
    """Half close before the handshake (nc -N): not gone."""
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        host.sendall(b"all of it")
        host.shutdown(socket.SHUT_WR)
        g, _ = asked(wire, rule)
        answer(g)
        assert g.pull(9) == b"all of it"
        g.push(b"reply", FIN)
        assert read_exactly(host, 5) == b"reply"
        assert host.recv(1) == b""


def test_half_close_by_the_guest(wire: Wire) -> None:
    """I5, the other way round."""
    with established(wire) as (g, host, _):
        g.push(b"bye", FIN)
        g.wait_ack()
        assert read_exactly(host, 3) == b"bye"
        assert host.recv(1) == b""
        host.sendall(b"still here")
        assert g.pull(10) == b"still here"


def test_simultaneous_open_is_refused(wire: Wire) -> None:
    """The guest calls from the very tuple: both ends are reset, nobody is joined with a stranger."""
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        g, syn = asked(wire, rule)
        g.send(SYN, opts=g.syn_options())
        rst = g.expect(RST | ACK)
        assert (rst.seq, rst.ack) == ((syn.seq + 1) & M32, (g.isn + 1) & M32)
        assert is_reset(host)


def test_old_connection_of_the_guest_is_cleared_out_of_the_way(wire: Wire) -> None:
    """RFC 9293 3.5.1: an ACK for something else gets a RST at its number, and the SYN comes again at once."""
    known(wire)
    with forward(wire) as rule, client(rule):
        g, syn = asked(wire, rule)
        g.send(ACK, seq=77, ack=4711)
        rst = g.expect(RST)
        assert rst.seq == 4711
        again = g.expect(SYN)
        assert (again.seq, again.mss) == (syn.seq, syn.mss)
        answer(g)


@pytest.mark.parametrize("quoted_seq, resets", [(0, True), (1, False)], ids=["about-our-SYN", "about-another"])
def test_icmp_unreachable_about_the_syn(wire: Wire, quoted_seq: int, resets: bool) -> None:
    """RFC 5927 4.1: the sequence number must be of something in flight."""
    known(wire)
    with forward(wire) as rule, client(rule) as host:
        g, syn = asked(wire, rule)
        quote = ipv4(6, struct.pack("!HHI", g.port, g.sport, (syn.seq + quoted_seq) & M32) + bytes(12), g.dst, GUEST)
        message = struct.pack("!BBHI", 3, 3, 0, 0) + quote
        message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
        wire.sock.send(ethernet(ipv4(1, message, GUEST, GATEWAY)))
        g.fence()
        if resets:
            assert is_reset(host)
        else:
            answer(g)


def test_syn_ack_without_options(wire: Wire) -> None:
    """RFC 7323 2.2: no scale unless both offered it; RFC 9293 3.7.1: 536 bytes if the guest did not say."""
    with established(wire, mss=None, wscale=None) as (g, host, _):
        host.sendall(b"x" * 1500)
        sizes = []
        while sum(sizes) < 1500:
            seg = g.expect(ACK)
            sizes.append(len(seg.data))
            g.rcv_nxt = (g.rcv_nxt + len(seg.data)) & M32
            g.send(ACK)
        assert max(sizes) == 536


@pytest.mark.fault(23)
def test_source_port_in_use_is_replaced(wire: Wire) -> None:
    """Two clients with one port, on different loopback addresses, are both the gateway: their tuples must differ."""
    known(wire)
    with forward(wire, host_addr="") as rule, client(rule, ("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        g1, _ = asked(wire, rule)
        with client(rule, ("127.0.0.2", port)) as two:
            g2, _ = asked(wire, rule)
            assert g1.port == port != g2.port
            answer(g1)
            answer(g2)
            one.sendall(b"one")
            two.sendall(b"two")
            assert g1.pull(3) == b"one"
            assert g2.pull(3) == b"two"


@pytest.mark.fault(23)
def test_a_closed_tuple_in_time_wait_is_not_used_again(wire: Wire) -> None:
    known(wire)
    with forward(wire) as rule:
        host = client(rule)
        port = host.getsockname()[1]
        g, _ = asked(wire, rule)
        answer(g)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        host.shutdown(socket.SHUT_WR)
        fin = g.expect(FIN | ACK)
        g.rcv_nxt = (fin.seq + 1) & M32
        g.push(b"", FIN)
        assert host.recv(1) == b""
        host.close()
        g.wait_ack()
        with contextlib.suppress(OSError), client(rule, ("127.0.0.1", port)):  # its own kernel may refuse: TIME-WAIT
            g2, _ = asked(wire, rule)
            assert g2.port != port


def test_removing_a_rule_stops_the_listener_and_leaves_the_flow(wire: Wire) -> None:
    with established(wire) as (g, host, rule):
        wire.session.change_forwards(remove=[rule])
        with pytest.raises(ConnectionRefusedError):
            client(rule)
        host.sendall(b"alive")
        assert g.pull(5) == b"alive"
        [again] = wire.session.change_forwards([rule])  # the same port, at once
        assert again == rule
        with client(rule):
            g2, _ = asked(wire, rule)
            answer(g2)
        g.push(b"both", 0)
        g.wait_ack()
        assert read_exactly(host, 4) == b"both"


def test_close_flows_resets_both_sides(wire: Wire) -> None:
    with established(wire) as (g, host, rule):
        wire.session.change_forwards(remove=[rule], close_flows=True)
        assert g.expect(RST | ACK).seq == g.rcv_nxt
        assert is_reset(host)


@pytest.mark.fault(42)
def test_a_rule_that_cannot_be_bound_changes_nothing(wire: Wire) -> None:
    """All or none, with every reason."""
    with forward(wire) as rule, socket.create_server(("127.0.0.1", 0)) as taken:
        port = fresh_port()
        new = [Forward(proto="tcp", host_addr="127.0.0.1", host_port=0, guest_port=port),
               Forward(proto="tcp", host_addr="127.0.0.1", host_port=taken.getsockname()[1], guest_port=port),
               Forward(proto="tcp", host_addr="198.51.100.77", host_port=0, guest_port=port),
               Forward(proto="tcp", ifname="nosuch0", host_port=0, guest_port=port), rule]
        before = wire.session.forwards()
        with pytest.raises(ForwardError) as e:
            wire.session.change_forwards(new, [rule, Forward(proto="udp", host_port=1, guest_port=1)])
        assert {(f.forward, f.errno) for f in e.value.faults} == {
            (new[1], errno.EADDRINUSE), (new[2], errno.EADDRNOTAVAIL), (new[3], errno.ENODEV),
            (Forward(proto="udp", host_port=1, guest_port=1), errno.ENOENT)}
        assert wire.session.forwards() == before
        client(rule).close()


def test_the_port_of_a_replaced_rule_leads_elsewhere_without_a_gap(wire: Wire) -> None:
    known(wire)
    with forward(wire) as rule:
        new = Forward(proto="tcp", host_addr=rule.host_addr, host_port=rule.host_port, guest_port=fresh_port())
        assert wire.session.change_forwards([new], [rule]) == [new]
        assert rule not in wire.session.forwards()
        with client(new):
            g, _ = asked(wire, new)
            answer(g)
        wire.session.change_forwards(remove=[new])


def test_hundreds_of_rules_in_one_change(wire: Wire) -> None:
    """More than one message holds; all at once, and all gone at once."""
    base = fresh_port()
    made = wire.session.change_forwards(
        [Forward(proto="tcp", host_addr="127.0.0.1", host_port=0, guest_port=base) for _ in range(300)])
    assert len({f.host_port for f in made}) == 300
    known(wire)
    with client(made[-1]):
        asked(wire, made[-1])
    wire.session.change_forwards(remove=made, close_flows=True)
    for rule in (made[0], made[-1]):
        with pytest.raises(ConnectionRefusedError):
            client(rule)


@pytest.mark.parametrize("wire", [{"pending_max": 2}], indirect=True)
def test_pending_handshakes_are_bounded_by_the_backlog(wire: Wire) -> None:
    """Clients over the bound wait in the listener's backlog, and go on as soon as others are through."""
    known(wire)
    with forward(wire) as rule, contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(client(rule)) for _ in range(3)]
        first, _ = asked(wire, rule)
        second, _ = asked(wire, rule)
        assert not [s for s in first.fence() if s.flags & SYN]
        answer(first)
        third, _ = asked(wire, rule)
        assert {g.port for g in (first, second, third)} == {h.getsockname()[1] for h in hosts}
        answer(second)
        answer(third)


# --- with a clock --------------------------------------------------------------------------------------------------


class Alone(EgressOnly):
    """egress alone with one TCP forward on loopback."""

    def __init__(self, guest_port: int = 80, **more: Any) -> None:
        super().__init__(**more)
        sock = socket.create_server(("127.0.0.1", 0))
        self.address = sock.getsockname()
        c = ffi.new("struct egress_listener *", {"fd": sock.detach(), "proto": 6, "guest4": socket.inet_aton(GUEST),
                                                 "guest_port": guest_port})
        self.slot = lib.stage_egress_listen(self._stage, c)
        assert self.slot >= 0

    def client(self) -> socket.socket:
        s = socket.create_connection(self.address, DEADLINE)
        while not self.step(DEADLINE):  # the listener's event
            pass
        self.settle()
        self.take()
        return s

    def segment(self, timeout: float = 0) -> Any:
        return self.recv(lambda p: TCP in p, timeout)

    def learn(self) -> None:
        """The guest says something, so that its MAC address is known."""
        self.ping(1, 1)
        self.recv_echo(1)


def test_syn_is_sent_at_0_1_3_and_7_seconds_and_given_up_at_15() -> None:
    """RFC 6298 2.1, 5.5: 1 s, doubled."""
    with Alone() as g:
        g.learn()
        g.stop_clock()
        with g.client() as host:
            first = g.segment()
            assert first[TCP].flags == "S" and first.dst == g.mac
            at, when = 0.0, []
            while (due := g.due()) is not None and at < 60:
                step = (due - g._stopped_at) / 1e9
                at += step
                g.advance(step)
                g.take()
                while (s := g.segment()) is not None:
                    assert s[TCP].seq == first[TCP].seq + (1 if s[TCP].flags == "R" else 0)
                    when.append((str(s[TCP].flags), round(at)))
            assert when == [("S", 1), ("S", 3), ("S", 7), ("R", 15)]
            assert is_reset(host)
            assert g.counters()["tcp_inbound_unanswered"] == 1
            assert g.flows() == []


@pytest.mark.fault(25)
def test_no_more_syns_for_a_client_that_closed() -> None:
    """A port scanner's connect and close: the first SYN may be answered, no second one is sent."""
    with Alone() as g:
        g.learn()
        g.stop_clock()
        host = g.client()
        assert g.segment()[TCP].flags == "S"
        host.close()
        g.step(DEADLINE)  # its FIN
        g.advance(1.1)
        g.take()
        assert [str(s[TCP].flags) for s in iter(g.segment, None)] == ["R"]
        assert g.counters()["tcp_inbound_gone"] == 1
        assert g.flows() == []


def arp_reply(g: EgressOnly, mac: str, ip: str = GUEST) -> None:
    frame = bytes(Ether(src=mac, dst=GATEWAY_MAC) / ARP(op=2, hwsrc=mac, psrc=ip, hwdst=GATEWAY_MAC, pdst=GATEWAY))
    g.put(frame, bytes(16))  # as classify hands it on: no IP
    g.settle()


def test_a_guest_that_never_spoke_is_asked_by_arp() -> None:
    """Linux drops a TCP segment in an Ethernet broadcast, so the SYN waits for the address."""
    with Alone() as g:
        g.stop_clock()
        with g.client():
            ask = Ether(g.recv_frame(0))
            assert ask.dst == "ff:ff:ff:ff:ff:ff"
            assert (ask[ARP].op, ask[ARP].pdst, ask[ARP].psrc, ask[ARP].hwsrc) == (1, GUEST, GATEWAY, GATEWAY_MAC)
            assert g.recv_frame(0) is None
            arp_reply(g, "52:54:ab:11:22:33", "10.0.2.9")  # nobody asked for that one
            assert g.recv_frame(0) is None
            g.advance(1.01)
            again = Ether(g.recv_frame(0))
            assert ARP in again
            arp_reply(g, "52:54:ab:11:22:33")
            syn = Ether(g.recv_frame(0))
            assert syn.dst == "52:54:ab:11:22:33" and syn[TCP].flags == "S"
            assert g.counters()["arp_requests"] == 2


@pytest.mark.fault(31)
def test_the_guests_mac_address_may_change() -> None:
    with Alone() as g:
        g.learn()
        g.mac = "52:54:ab:00:00:77"
        g.send_udp(4000, 9, b"now I am somebody else")
        g.flush()
        with g.client():
            assert g.segment().dst == g.mac


@pytest.mark.fault(31)
def test_a_guest_with_another_lease_is_served_there() -> None:
    """A rule that names no guest address means the guest."""
    with EgressOnly() as g:
        sock = socket.create_server(("127.0.0.1", 0))
        address = sock.getsockname()
        c = ffi.new("struct egress_listener *", {"fd": sock.detach(), "proto": 6, "guest_port": 80})
        assert lib.stage_egress_listen(g._stage, c) >= 0
        g.send_udp(4000, 9, b"hello", src="10.0.2.3")
        g.flush()
        with socket.create_connection(address, DEADLINE):
            syn = g.recv(lambda p: TCP in p)
            assert syn[IP].dst == "10.0.2.3"


def test_listeners_leave_descriptors_for_flows() -> None:
    with EgressOnly(nfile=80) as g:
        made = []
        while True:
            sock = socket.create_server(("127.0.0.1", 0))
            c = ffi.new("struct egress_listener *", {"fd": sock.fileno(), "proto": 6, "guest_port": 80})
            slot = lib.stage_egress_listen(g._stage, c)
            if slot < 0:
                sock.close()
                break
            sock.detach()
            made.append(slot)
        assert slot == -errno.EMFILE
        assert len(made) == 80 - 32 - 20  # EG_FD_RESERVE, and a quarter
        for slot in made:
            assert lib.stage_egress_unlisten(g._stage, slot, 1) == 0
            assert lib.stage_egress_unlisten(g._stage, slot, 1) == -errno.ENOENT


def test_select_is_quiet_when_nothing_happens() -> None:
    """A listener that has to wait does not keep the loop awake."""
    with Alone(pending_max=1) as g:
        g.learn()
        g.stop_clock()
        with g.client(), socket.create_connection(g.address, DEADLINE):
            g.step(DEADLINE)  # the second client's event
            g.settle()
            assert len(g.flows()) == 1
            assert g.due() >= g._stopped_at + 900_000_000  # the SYN's timer, and no other reason
