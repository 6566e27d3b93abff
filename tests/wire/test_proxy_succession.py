"""What goes through a proxy outlives its egress (csrc/proxy_estate.c): tunnels, handshakes at any step, associations."""
from __future__ import annotations

import os
import socket
import threading

import pytest

from tests.harness import DEADLINE, EgressOnly, fresh_port, udp_server
from tests.proxy_servers import HttpProxy, Proxy, SocksProxy
from tests.wire.guest_tcp import FIN
from tests.wire.test_proxy import KINDS, TARGET, StageTcp, echo, plan, quoted_url, served
from tests.wire.test_succession import seat_changes


def both_ways(g: StageTcp, n: int = 5000) -> None:
    data = os.urandom(n)
    for at in range(0, n, 1000):
        g.push(data[at:at + 1000])
    assert g.pull(n) == data


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_tunnel_goes_on(kind: type[Proxy], options: dict[str, str]) -> None:
    with served(echo) as server, kind(route=lambda h, p: server, **options) as proxy, \
            EgressOnly(proxy=plan(quoted_url(proxy))) as guest:
        g = StageTcp(guest, 80)
        g.connect()
        both_ways(g)
        assert seat_changes(guest) == 1
        both_ways(g)
        g.push(b"", FIN)
        while not (fin := g.recv()).flags & FIN:
            pass
        assert fin.ack == g.snd_nxt
        assert len(proxy.asked) == 1


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_handshake_goes_on_from_where_it_was(kind: type[Proxy], options: dict[str, str], turns: int) -> None:
    """A connect() to the proxy, a greeting, a password, a request: the seat changes after so many turns with an event."""
    with served(echo) as server, kind(route=lambda h, p: server, **options) as proxy, \
            EgressOnly(proxy=plan(quoted_url(proxy))) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        for _ in range(turns):
            if guest.waiting():
                break
            guest.step(0.05)
        assert seat_changes(guest) == 1
        sa = g.recv()
        assert sa is not None and sa.ack == (g.isn + 1) & 0xFFFFFFFF
        g.snd_nxt, g.rcv_nxt = sa.ack, (sa.seq + 1) & 0xFFFFFFFF
        both_ways(g)
        assert proxy.asked == [("connect", TARGET, 80)]


@pytest.mark.parametrize("password", [{}, {"user": "u", "password": "p w:@"}])
def test_an_association_goes_on(password: dict[str, str]) -> None:
    with udp_server() as server, SocksProxy(route=lambda h, p: server.getsockname(), **password) as proxy, \
            EgressOnly(proxy=plan(quoted_url(proxy))) as guest:
        port = fresh_port()
        guest.send_udp(port, 4242, b"one", TARGET)
        while guest.counters()["udp_up"] == 0:
            guest.step(0.05)
        data, relay = server.recvfrom(100)
        assert data == b"one" and seat_changes(guest) == 1
        server.sendto(b"two", relay)
        reply = guest.recv_udp(port)
        assert (reply.data, reply.src, reply.sport) == (b"two", TARGET, 4242)
        guest.send_udp(port, 4242, b"three", TARGET)
        guest.settle()
        assert server.recvfrom(100) == (b"three", relay)
        assert [a for a, _, _ in proxy.asked] == ["associate"]


def test_an_association_that_ended_meanwhile_is_noticed() -> None:
    """It ends with its connection (RFC 1928 7), also while nobody sat there."""
    with udp_server() as server, SocksProxy(route=lambda h, p: server.getsockname()) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        guest.send_udp(fresh_port(), 4242, b"one", TARGET)
        while guest.counters()["udp_up"] == 0:
            guest.step(0.05)
        assert server.recvfrom(10)[0] == b"one"
        assert guest.leave() == 1
        proxy.controls[0].shutdown(socket.SHUT_RDWR)
        assert guest.succeed() == (1, "")
        while guest.flows():
            guest.step(0.05)


@pytest.mark.parametrize("kind", [SocksProxy, HttpProxy])
def test_a_handshake_with_a_proxy_that_the_successor_does_not_know_is_refused(kind: type[Proxy]) -> None:
    go = threading.Event()

    def wait(host: str, port: int) -> tuple[str, int]:
        go.wait(DEADLINE)
        return server

    with served(lambda s: None) as server, kind(route=wait) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        while not proxy.asked:
            guest.step(0.05)
        assert guest.leave() == 1
        guest._proxy = None
        code, why = guest.succeed()
        assert code < 0 and why and guest.flows() == []
        go.set()
