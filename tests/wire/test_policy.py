"""--policy on the wire: a denied connection is reset at once, a denied datagram or ping gets ICMP, and who listens is told
the rule; what is allowed is not touched."""
from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import TCP

from pipeline import api
from pipeline.egress import refusals
from pipeline.forwards import Forward
from pipeline.messages import Notices
from pipeline.policy import PolicyError
from shm._dataplane import ffi, lib
from tests.harness import DEADLINE, GATEWAY, GUEST, UDP, EgressOnly, Wire, fresh_ident, fresh_port, udp_server
from tests.proxy_servers import SocksProxy
from tests.wire.guest_tcp import ACK, RST, SYN, GuestTcp
from tests.wire.test_control import answer
from tests.wire.test_proxy import StageTcp, plan

FAR = "203.0.113.7"  # RFC 5737: nobody
ADMIN = (3, 13)  # RFC 1812 5.2.7.1: communication administratively prohibited


def told(guest: EgressOnly, policy: tuple[str, ...]) -> list[tuple[str, str, int, str, str]]:
    return [(r.proto, r.peer, r.peer_port, r.reason, policy[r.rule]) for r in refusals(guest._stage)]


@pytest.mark.fault(32)
def test_a_denied_connection_is_reset_at_once() -> None:
    policy = (f"deny out tcp {FAR} port 22", f"deny out {FAR}/24 port 80-89")
    with EgressOnly(policy=policy) as guest:
        lib.stage_egress_notices(guest._stage, 1)
        for port in (22, 85):
            g = StageTcp(guest, port, FAR)
            g.syn()
            assert g.expect(RST | ACK).ack == g.isn + 1
        assert guest.flows() == []
        counters = guest.counters()
        assert (counters["drop_policy_out"], counters["tcp_syn"], counters["tcp_refused"]) == (2, 2, 0)
        assert told(guest, policy) == [("tcp", FAR, 22, "denied by the policy", policy[0]),
                                       ("tcp", FAR, 85, "denied by the policy", policy[1])]


def test_a_denied_datagram_and_ping_get_icmp_and_are_told_once() -> None:
    policy = (f"deny out {FAR}",)
    with EgressOnly(policy=policy) as guest:
        lib.stage_egress_notices(guest._stage, 1)
        guest.stop_clock()
        port = fresh_port()
        for n in range(5):
            guest.send_udp(port, 4242, b"%d" % n, FAR)
            error = guest.recv_error(lambda q: q.proto == UDP and q.dst == FAR and q.sport == port and q.dport == 4242)
            assert error.icmp == ADMIN
            guest.ping(7, n, b"", FAR)
            assert guest.recv_error(lambda q: q.proto == 1 and q.dst == FAR).icmp == ADMIN
        assert guest.flows() == [] and guest.counters()["drop_policy_out"] == 10
        assert [t[:3] for t in told(guest, policy)] == [("udp", FAR, 4242), ("icmp", FAR, 0)]
        guest.advance(11)  # it still tries: said again
        guest.send_udp(port, 4242, b"again", FAR)
        assert [t[:3] for t in told(guest, policy)] == [("udp", FAR, 4242)]


@pytest.mark.fault(32)
def test_what_is_allowed_goes_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, udp_server() as echo:
        allowed = f"allow out {GATEWAY} port {server.getsockname()[1]},{echo.getsockname()[1]}"
        with EgressOnly(policy=(allowed, "deny out")) as guest:
            g = StageTcp(guest, server.getsockname()[1], GATEWAY)
            g.connect()
            port = fresh_port()
            guest.send_udp(port, echo.getsockname()[1], b"hello")
            data, address = echo.recvfrom(10)
            echo.sendto(b"yes", address)
            assert guest.recv_udp(port).data == b"yes"
            with udp_server() as other:
                guest.send_udp(port, other.getsockname()[1], b"x")  # of the same mapping: asked about all the same
                assert guest.recv_error(lambda q: q.dport == other.getsockname()[1]).icmp == ADMIN
            ident = fresh_ident()
            guest.ping(ident, 0)  # the gateway's own answer
            guest.recv_echo(ident)


def test_what_is_denied_is_not_asked_of_a_proxy() -> None:
    with SocksProxy() as proxy, EgressOnly(policy=(f"deny out {FAR}",), proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80, FAR)
        g.syn()
        g.expect(RST | ACK)
        port = fresh_port()
        guest.send_udp(port, 4242, b"x", FAR)
        assert guest.recv_error(lambda q: q.sport == port).icmp == ADMIN
        assert proxy.asked == [] and guest.counters()["proxy_tcp"] == guest.counters()["proxy_udp"] == 0


def listen(guest: EgressOnly, sock: socket.socket, port: int) -> int:
    proto = 6 if sock.type & socket.SOCK_STREAM else 17
    slot = lib.stage_egress_listen(guest._stage, ffi.new("struct egress_listener *", {
        "fd": sock.detach(), "proto": proto, "guest_port": port}))
    assert slot >= 0
    return slot


def known(guest: EgressOnly) -> None:
    """Let the guest say something, so that its MAC address is known."""
    guest.ping(1, 0)
    guest.recv_echo(1)


def test_a_denied_client_is_reset_and_the_guest_hears_nothing() -> None:
    policy = ("allow in 127.0.0.2", "deny in 127.0.0.0/8 port 80")
    with EgressOnly(policy=policy) as guest:
        lib.stage_egress_notices(guest._stage, 1)
        known(guest)
        listener = socket.create_server(("127.0.0.1", 0))
        where = listener.getsockname()
        listen(guest, listener, 80)
        with socket.create_connection(where) as client:
            client.settimeout(DEADLINE)
            guest.step(DEADLINE)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        guest.settle()
        assert guest.sniff() == [] and guest.counters()["drop_policy_in"] == 1
        (refused,) = refusals(guest._stage)
        assert (refused.proto, refused.guest, refused.guest_port, refused.peer) == ("tcp", GUEST, 80, "127.0.0.1")
        assert refused.rule == 1
        with socket.create_connection(where, source_address=("127.0.0.2", 0)):
            assert guest.recv(lambda p: TCP in p and p[TCP].dport == 80 and p[TCP].flags == "S")


def test_a_denied_client_by_ipv6() -> None:
    """By its own address, not by the gateway's under which the guest would see it; IPv4 rules mean IPv4 clients."""
    with EgressOnly(policy=("allow in 127.0.0.0/8", "deny in ::/0")) as guest:
        known(guest)
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        port = listener.getsockname()[1]
        listen(guest, listener, 80)
        with socket.create_connection(("::1", port)) as client:
            client.settimeout(DEADLINE)
            guest.step(DEADLINE)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert guest.counters()["drop_policy_in"] == 1
        with socket.create_connection(("127.0.0.1", port)):
            assert guest.recv(lambda p: TCP in p and p[TCP].dport == 80 and p[TCP].flags == "S")


def test_a_denied_peers_datagrams_are_dropped_and_counted() -> None:
    policy = ("deny in udp 127.0.0.1", "deny in tcp")
    with EgressOnly(policy=policy) as guest, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        lib.stage_egress_notices(guest._stage, 1)
        known(guest)
        bound.bind(("127.0.0.1", 0))
        where = bound.getsockname()
        port = fresh_port()
        listen(guest, bound, port)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, socket.socket(socket.AF_INET,
                                                                                  socket.SOCK_DGRAM) as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.3", 0))
            for _ in range(3):
                one.sendto(b"denied", where)
            two.sendto(b"allowed", where)
            assert guest.recv_udp(port).data == b"allowed"
        counters = guest.counters()
        assert (counters["drop_policy_in"], counters["drop_udp_table"], counters["udp_inbound"]) == (3, 0, 1)
        assert [t[0] for t in told(guest, policy)] == ["udp"]


def test_the_whole_pipeline_tells_the_rule(make_wire: Callable[..., Wire]) -> None:
    policy = ("deny out tcp any port 9", f"deny out {ipaddress.ip_network(FAR + '/24', strict=False)}")
    wire = make_wire(policy=policy, no_metadata=True, no_host_loopback=True)
    events: list[Any] = []
    wire.session.listeners.append(events.append)
    assert answer(wire, Notices(on=True)) == ""
    for port, dst in ((9, FAR), (80, "169.254.169.254"), (8080, GATEWAY)):
        g = GuestTcp(wire.sock, port, dst)
        g.send(SYN, opts=g.syn_options())
        g.expect(RST | ACK)
    port = fresh_port()
    wire.send_udp(port, 4242, b"x", FAR)
    assert wire.recv_error(lambda q: q.dst == FAR and q.sport == port).icmp == ADMIN
    assert answer(wire, Notices(on=False)) == ""
    seen = [(e.proto, e.peer, e.peer_port, e.rule) for e in events if isinstance(e, api.FlowRefused)]
    assert seen == [("tcp", FAR, 9, policy[0]), ("tcp", "169.254.169.254", 80, "--no-metadata"),
                    ("tcp", GATEWAY, 8080, "--no-host-loopback"), ("udp", FAR, 4242, policy[1])]
    assert all(e.reason == "denied by the policy" for e in events if isinstance(e, api.FlowRefused))
    assert wire.session.counters("egress")["drop_policy_out"] == 4


def test_rules_change_while_it_runs(make_wire: Callable[..., Wire]) -> None:
    """What begins then is asked of the new rules, what goes on is left alone; a successor of egress will have
    them too."""
    wire = make_wire(no_metadata=True)
    said: list[str] = []

    def replace(*rules: str) -> None:
        wire.session.change_policy(rules, said.append)
        while not said:
            assert wire.session.poll(DEADLINE)
        assert said.pop() == ""

    def refused(port: int) -> bool:
        g = GuestTcp(wire.sock, port)
        g.send(SYN, opts=g.syn_options())
        segment = g.recv(DEADLINE)
        assert segment
        return bool(segment.flags & RST)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        g = GuestTcp(wire.sock, port)
        g.connect()
        host, _ = server.accept()
        replace(f"deny out {GATEWAY} port {port}")
        assert refused(port)
        with host:
            g.push(b"goes on")
            assert host.recv(100) == b"goes on"
        with pytest.raises(PolicyError):
            wire.session.change_policy(["deny out x"], said.append)
        assert [r.text for r in wire.session.policy.rules] == ["--no-metadata", f"deny out {GATEWAY} port {port}"]
        assert wire.session._configs["egress"]["policy"] == wire.session.policy.entries()
        assert refused(port)
        replace()
        assert not refused(port)


def test_the_longest_list_of_rules_starts(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(policy=tuple(f"deny out 2001:db8::{n:x} port 65534" for n in range(1000)))
    assert len(wire.session.policy.rules) == 1000


def test_a_guest_keeps_what_serves_it_whatever_is_denied(make_wire: Callable[..., Wire]) -> None:
    """DNS over TCP at the gateway, and what came in by a forward that is allowed, with its answers."""
    wire = make_wire(policy=("allow in udp", "deny"))
    GuestTcp(wire.sock, 53).connect()
    port = fresh_port()
    ident = fresh_ident()
    wire.ping(ident, 0)
    wire.recv_echo(ident)
    [made] = wire.session.change_forwards([Forward(proto="udp", host_addr="127.0.0.1", host_port=0, guest_port=port)])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(DEADLINE)
        peer.connect(("127.0.0.1", made.host_port))
        peer.send(b"in")
        d = wire.recv_udp(port)
        wire.send_udp(port, d.sport, b"out", d.src)
        assert peer.recv(10) == b"out"
