"""The guest's flows through SOCKS5 and HTTP proxies on loopback (csrc/proxy.c, csrc/proxy_handshake.c).

Targets are addresses of documentation networks (RFC 5737): what reaches a server there came through the proxy, which
knows where it really is. Most tests drive egress alone, whose clock can be set forward.
"""
from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.proxies import Bypass, Plan, parse_url
from shm._dataplane import ffi, lib
from tests.fds import open_fds
from tests.harness import DEADLINE, GATEWAY, TCP, UDP, EgressOnly, closed_tcp_port, fresh_port, quoted, udp_server
from tests.netlab import Netns
from tests.proxy_servers import HttpProxy, Proxy, RawProxy, SocksProxy
from tests.wire.guest_tcp import ACK, FIN, RST, SYN, GuestTcp, Segment
from tests.wire.routed import inside

TARGET = "203.0.113.7"
HOST, NET, ADMIN = (3, 1), (3, 0), (3, 13)  # ICMP unreachable (RFC 792, RFC 1812 5.2.7.1)
REFUSED = "RST"


def plan(*urls: str, block: bool = True, bypass: Bypass = Bypass(), ports: tuple[int, ...] = ()) -> Plan:
    servers = tuple(parse_url(u, only_port=p) for u, p in zip(urls, ports or (0,) * len(urls), strict=True))
    return Plan(servers=servers, bypass=bypass, udp_block=block)


class StageTcp(GuestTcp):
    """A scripted guest TCP on EgressOnly instead of a socket."""

    def __init__(self, guest: EgressOnly, port: int, dst: str = TARGET, **more: object) -> None:
        super().__init__(guest, port, dst, **more)
        self.guest = guest

    def recv(self, timeout: float = DEADLINE) -> Segment | None:
        end = time.monotonic() + timeout
        while (frame := self.guest.recv_frame(max(0.0, end - time.monotonic()))) is not None:
            if (seg := self._mine(frame)) is not None:
                return seg
        return None

    def syn(self) -> None:
        self.send(SYN, opts=self.syn_options())

    def answer(self) -> str | tuple[int, int]:
        """What comes of a SYN that fails: "RST", or type and code of the ICMP error about it."""
        d = self.guest.datagram(lambda d: d.proto == TCP and d.dport == self.sport or d.proto == 1)
        assert d is not None, "no answer"
        if d.proto == TCP:
            assert d.payload[13] & RST
            return REFUSED
        about = quoted(d)
        assert (about.dst, about.sport, about.dport) == (self.dst, self.sport, self.port)
        return d.icmp


@contextlib.contextmanager
def served(do: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A TCP server on loopback, one connection."""
    errors: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as srv:
        srv.settimeout(DEADLINE)

        def run() -> None:
            try:
                connection, _ = srv.accept()
                with connection:
                    connection.settimeout(DEADLINE)
                    do(connection)
            except ConnectionResetError:
                pass  # the guest of the test was done
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield srv.getsockname()
        thread.join(DEADLINE)
    assert not errors and not thread.is_alive(), errors


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


KINDS = [pytest.param(SocksProxy, {}, id="socks5"),
         pytest.param(SocksProxy, {"user": "u", "password": "p w:@"}, id="socks5-password"),
         pytest.param(HttpProxy, {}, id="connect"),
         pytest.param(HttpProxy, {"user": "u", "password": "p:w"}, id="connect-password")]


def quoted_url(proxy: Proxy) -> str:
    from urllib.parse import quote

    who = f"{quote(proxy.user)}:{quote(proxy.password, safe='')}@" if proxy.user else ""
    return f"{proxy.scheme}://{who}{proxy.address}:{proxy.port}"


# -- TCP


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("peek", [-1, 0], ids=["offset", "discard"])
def test_bytes_both_ways_and_both_ends(kind: type[Proxy], options: dict[str, str], peek: int) -> None:
    """A tunnel is a connection like any other: data, half-close, end."""
    with served(echo) as server, kind(route=lambda h, p: server, **options) as proxy, \
            EgressOnly(proxy=plan(quoted_url(proxy)), peek=peek) as guest:
        g = StageTcp(guest, 80)
        g.connect()
        assert proxy.asked == [("connect", TARGET, 80)]
        data = os.urandom(5000)
        for at in range(0, len(data), 1000):
            g.push(data[at:at + 1000])
        assert g.pull(len(data)) == data
        g.push(b"", FIN)
        fin = g.recv()
        while not fin.flags & FIN:
            fin = g.recv()
        assert fin.ack == g.snd_nxt
        g.rcv_nxt += 1
        g.send(ACK)
        guest.settle()
        c = guest.counters()
        assert (c["proxy_tcp"], c["proxy_accepted"], c["proxy_refused"], c["proxy_failed"]) == (1, 1, 0, 0)
        assert (c["tcp_closed"], c["tcp_down_bytes"], c["tcp_up_bytes"]) == (1, 5000, 5000)


@pytest.mark.parametrize("kind", [SocksProxy, HttpProxy])
@pytest.mark.parametrize("peek", [-1, 0], ids=["offset", "discard"])
def test_what_follows_the_yes_in_one_segment_is_the_tunnels(kind: type[Proxy], peek: int) -> None:
    """The first bytes of the server come with the proxy's answer: none is lost, and none of the answer is shown."""
    banner = b"220 here\r\n" * 300
    with served(lambda s: s.recv(1)) as server, kind(route=lambda h, p: server, banner=banner) as proxy, \
            EgressOnly(proxy=plan(proxy.url), peek=peek) as guest:
        g = StageTcp(guest, 25)
        g.connect()
        assert g.pull(len(banner)) == banner
        g.send(RST | ACK)


@pytest.mark.parametrize("kind", [SocksProxy, HttpProxy])
def test_the_syn_is_answered_after_the_yes_and_not_before(kind: type[Proxy]) -> None:
    go = threading.Event()

    def wait(host: str, port: int) -> tuple[str, int]:
        go.wait(DEADLINE)
        return server

    with served(lambda s: s.recv(1)) as server, kind(route=wait) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        while not proxy.asked:
            guest.step(0.05)
        g.syn()  # the guest's retransmission
        guest.settle()
        assert guest.waiting() == 0
        (flow,) = guest.flows()
        assert flow.state == lib.RN_FL_CONNECTING
        go.set()
        assert g.recv().flags == SYN | ACK
        assert g.recv(0) is None
        g.send(RST, seq=g.isn + 1)


def test_the_guest_may_give_up_meanwhile() -> None:
    go = threading.Event()
    with RawProxy(lambda s: (s.recv(100), go.wait(DEADLINE))) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        guest.settle()
        g.send(RST, seq=g.isn + 1)
        assert guest.flows() == []
        go.set()


ANSWERS = [
    (SocksProxy, 1, REFUSED), (SocksProxy, 2, ADMIN), (SocksProxy, 3, NET), (SocksProxy, 4, HOST),
    (SocksProxy, 5, REFUSED), (SocksProxy, 6, HOST), (SocksProxy, 7, REFUSED), (SocksProxy, 8, NET),
    (SocksProxy, 200, REFUSED),
    (HttpProxy, 400, REFUSED), (HttpProxy, 403, ADMIN), (HttpProxy, 407, ADMIN), (HttpProxy, 404, REFUSED),
    (HttpProxy, 500, REFUSED), (HttpProxy, 502, HOST), (HttpProxy, 503, HOST), (HttpProxy, 504, HOST),
    (HttpProxy, 302, REFUSED),
]


@pytest.mark.parametrize(("kind", "code", "seen"), ANSWERS)
def test_a_no_looks_like_a_failed_connect(kind: type[Proxy], code: int, seen: object) -> None:
    with kind(refuse=code) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        assert g.answer() == seen
        guest.settle()
        assert guest.flows() == []
        c = guest.counters()
        assert (c["proxy_refused"], c["proxy_failed"], c["proxy_accepted"]) == (1, 0, 0)


@pytest.mark.parametrize("kind", [SocksProxy, HttpProxy])
@pytest.mark.parametrize("wrong", ["u:wrong", "", "other:p"])
def test_wrong_credentials(kind: type[Proxy], wrong: str) -> None:
    with kind(user="u", password="p") as proxy, \
            EgressOnly(proxy=plan(f"{proxy.scheme}://{wrong}@127.0.0.1:{proxy.port}".replace("//@", "//"))) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        assert g.answer() == ADMIN
        assert proxy.asked == []


def test_a_proxy_that_is_not_there() -> None:
    with EgressOnly(proxy=plan(f"socks5://127.0.0.1:{closed_tcp_port()}")) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        assert g.answer() == HOST
        assert guest.counters()["proxy_failed"] == 1


GARBAGE = [b"\x04\x00", b"\x05\x02\x01\x00", b"\x05\x03", b"HTTP/1.1 400 Bad\r\n\r\n", b"", b"\x05",
           b"\x05\x00\x04\x00\x00\x01", b"\x05\x00\x05\x00\x00\x09" + bytes(20), b"\x05\x00\x05\x00\x00\x01\x00"]
HTTP_GARBAGE = [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200", b"HTTP/1.1 2x0 OK\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"\r\n",
                b"HTTP/1.1 200 " + b"x" * 5000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
                b"HTTP/1.1 100 C\r\n\r\n" * 2000, b"HTTP/1.1 099 C\r\n\r\n", b"HTTP/1.1 200x\r\n\r\n", b"\x05\x00"]


@pytest.mark.parametrize(("scheme", "answer"), [("socks5", a) for a in GARBAGE] + [("http", a) for a in HTTP_GARBAGE],
                         ids=lambda v: repr(v)[:24])
def test_a_proxy_that_is_none_ends_in_a_reset(scheme: str, answer: bytes) -> None:
    """Cut, huge, or another protocol. It hangs up only after the answer; a huge one is not read to its end."""
    def serve(s: socket.socket) -> None:
        s.recv(4096)
        s.sendall(answer)
        s.shutdown(socket.SHUT_WR)
        while s.recv(4096):
            pass

    with RawProxy(serve, scheme) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        assert g.answer() == REFUSED
        guest.settle()
        assert guest.flows() == [] and guest.counters()["proxy_failed"] == 1


@pytest.mark.parametrize(("scheme", "answer"), [("socks5", b""), ("socks5", b"\x05"), ("http", b""),
                                                ("http", b"HTTP/1.1 200 OK\r\nX: ")])
def test_a_silent_proxy_is_given_up_after_30_s(scheme: str, answer: bytes) -> None:
    if scheme == "socks5" and answer.startswith(b"H") or scheme == "http" and answer == b"\x05":
        pytest.skip("is garbage, see above")
    said, stop = threading.Event(), threading.Event()

    def serve(s: socket.socket) -> None:
        s.recv(4096)
        s.sendall(answer)
        said.set()
        stop.wait(DEADLINE)

    with RawProxy(serve, scheme) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.syn()
        while not said.is_set():
            guest.step(0.05)
        guest.advance(29)
        assert len(guest.flows()) == 1 and guest.waiting() == 0
        guest.advance(2)
        assert g.answer() == HOST
        guest.settle()
        assert guest.flows() == [] and guest.counters()["proxy_failed"] == 1
        stop.set()


def test_answers_in_single_bytes() -> None:
    def serve(s: socket.socket) -> None:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.recv(4096)
        for b in b"HTTP/1.0 200 OK\nA: b\n\nhello":
            s.sendall(bytes([b]))
        s.recv(1)

    with RawProxy(serve, "http") as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.connect()
        assert g.pull(5) == b"hello"
        g.send(RST | ACK)


def test_headers_of_the_yes_are_passed_over() -> None:
    with served(lambda s: s.sendall(b"x")) as server, HttpProxy(
            route=lambda h, p: server, interim=b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n",
            headers=("Content-Length: 5", "X-Long: " + "y" * 7000)) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        g = StageTcp(guest, 80)
        g.connect()
        assert g.pull(1) == b"x"
        g.send(RST | ACK)


# -- by name, and what goes directly


def learn(guest: EgressOnly, address: str, name: str, *, seconds: float = 60, local: bool = False) -> None:
    assert guest.names.writer().set(ipaddress.ip_address(address), name, now_ns=time.monotonic_ns(), seconds=seconds,
                                    local=local)


@pytest.mark.parametrize("kind", [SocksProxy, HttpProxy])
def test_a_known_name_is_what_the_proxy_is_asked_for(kind: type[Proxy]) -> None:
    with kind(refuse=1 if kind is SocksProxy else 500) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        learn(guest, TARGET, "www.example")
        learn(guest, "203.0.113.8", "db.example", local=True)
        learn(guest, "203.0.113.9", "old.example", seconds=10)
        learn(guest, "203.0.113.10", "x" * 63 + ".example" * 20)
        guest.advance(11)
        for address in (TARGET, "203.0.113.8", "203.0.113.9", "203.0.113.10"):
            g = StageTcp(guest, 443, address)
            g.syn()
            assert g.answer() == REFUSED
        assert [host for _, host, _ in proxy.asked] == [
            "www.example", "203.0.113.8", "203.0.113.9", "x" * 63 + ".example" * 20]
        assert guest.counters()["proxy_by_name"] == 2


def test_what_is_excepted_goes_directly() -> None:
    bypass = Bypass(networks=("198.51.100.0/25", "192.0.2.1/32", "2001:db8::/32"),
                    names=("exact.example", ".suffix.example"))
    cases = {"198.51.100.127": ("", False), "198.51.100.128": ("", True),
             "192.0.2.1": ("", False), "192.0.2.2": ("", True),
             "203.0.113.1": ("exact.example", False), "203.0.113.2": ("sub.exact.example", True),
             "203.0.113.3": ("a.suffix.example", False), "203.0.113.4": ("suffix.example", True),
             "203.0.113.5": ("notsuffix.example", True), "203.0.113.6": ("a.b.suffix.example", False)}
    with SocksProxy(refuse=5) as proxy, EgressOnly(proxy=plan(proxy.url, bypass=bypass)) as guest:
        for address, (name, _) in cases.items():
            if name:
                learn(guest, address, name)
            StageTcp(guest, 80, address).syn()
        want = {a for a, (_, proxied) in cases.items() if proxied}
        while len(proxy.asked) < len(want):
            guest.step(0.05)
        guest.settle()
        names = {n: a for a, (n, _) in cases.items() if n}
        assert {names.get(h, h) for _, h, _ in proxy.asked} == want
        assert guest.counters()["proxy_tcp"] == len(want)


def test_the_gateway_is_never_for_a_proxy() -> None:
    with served(echo) as server, SocksProxy() as proxy, EgressOnly(proxy=plan(proxy.url)) as guest, udp_server() as u:
        learn(guest, GATEWAY, "www.example")
        g = StageTcp(guest, server[1], GATEWAY)
        g.connect(b"hi")
        assert g.pull(2) == b"hi"
        port = fresh_port()
        guest.send_udp(port, u.getsockname()[1], b"direct")
        assert u.recvfrom(10)[0] == b"direct"
        assert proxy.asked == []
        g.send(RST | ACK)


def test_a_proxy_for_a_port() -> None:
    """--proxy auto: HTTP_PROXY for 80, HTTPS_PROXY for 443, ALL_PROXY for the rest."""
    with HttpProxy(refuse=500) as one, HttpProxy(refuse=500) as two, SocksProxy(refuse=5) as rest, \
            EgressOnly(proxy=plan(one.url, two.url, rest.url, ports=(80, 443, 0))) as guest:
        for port in (80, 443, 22, 8080):
            g = StageTcp(guest, port)
            g.syn()
            assert g.answer() == REFUSED
        assert [[p for _, _, p in proxy.asked] for proxy in (one, two, rest)] == [[80], [443], [22, 8080]]


# -- UDP


@pytest.mark.parametrize("options", [{}, {"user": "u", "password": "p"}], ids=["open", "password"])
@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 9000, 65000])
def test_datagrams_through_the_relay(options: dict[str, str], size: int) -> None:
    data = os.urandom(size)
    with udp_server() as server, SocksProxy(route=lambda h, p: server.getsockname(), **options) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        port = fresh_port()
        guest.send_udp(port, 4242, data, TARGET)
        while guest.counters()["udp_up"] == 0:
            guest.step(0.05)
        got, where = server.recvfrom(70000)
        assert got == data
        server.sendto(data, where)
        reply = guest.recv_udp(port)
        assert (reply.src, reply.sport, reply.data) == (TARGET, 4242, data)
        guest.send_udp(port, 4243, b"again", "203.0.113.8")  # the same association
        assert server.recvfrom(100)[0] == b"again"
        assert [a for a, _, _ in proxy.asked] == ["associate"]
        (flow,) = guest.flows()
        assert (flow.guest_port, flow.peer_port, bytes(flow.peer_addr)) == (port, 1, bytes(16))


def test_datagrams_wait_for_the_association_within_bounds() -> None:
    go = threading.Event()

    class Slow(SocksProxy):
        def associate(self, connection: socket.socket) -> None:
            go.wait(DEADLINE)
            super().associate(connection)

    with udp_server() as server, Slow(route=lambda h, p: server.getsockname()) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        port = fresh_port()
        for k in range(12):
            guest.send_udp(port, 4242, b"%d" % k, TARGET)
        go.set()
        while guest.counters()["udp_up"] < 8:
            guest.step(0.05)
        assert [server.recvfrom(10)[0] for _ in range(8)] == [b"%d" % k for k in range(8)]
        assert guest.counters()["drop_udp_send"] == 4


def test_an_association_ends_with_its_connection_and_the_next_datagram_makes_another() -> None:
    with udp_server() as server, SocksProxy(route=lambda h, p: server.getsockname()) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        port = fresh_port()
        guest.send_udp(port, 4242, b"one", TARGET)
        while guest.counters()["udp_up"] == 0:
            guest.step(0.05)
        assert server.recvfrom(10)[0] == b"one"  # through the relay before the association ends
        proxy.controls[0].shutdown(socket.SHUT_RDWR)
        while guest.flows():
            guest.step(0.05)
        guest.send_udp(port, 4242, b"two", TARGET)
        while guest.counters()["udp_up"] == 1:
            guest.step(0.05)
        assert server.recvfrom(10)[0] == b"two"
        assert guest.counters()["proxy_udp"] == 2


def test_an_idle_association_is_closed() -> None:
    before = len(open_fds())
    with udp_server() as server, SocksProxy(route=lambda h, p: server.getsockname()) as proxy, \
            EgressOnly(proxy=plan(proxy.url)) as guest:
        guest.send_udp(fresh_port(), 4242, b"one", TARGET)
        while guest.counters()["udp_up"] == 0:
            guest.step(0.05)
        guest.advance(31)
        assert guest.flows() == []
        proxy.threads[-1].join(DEADLINE)  # it saw the control connection end
        assert not proxy.threads[-1].is_alive()
    assert len(open_fds()) == before


@pytest.mark.parametrize("make", [lambda: HttpProxy(), lambda: SocksProxy(udp=False),
                                  lambda: SocksProxy(user="u", password="p")],
                         ids=["http", "no associate", "no password"])
@pytest.mark.parametrize("block", [True, False])
def test_udp_that_the_proxy_cannot_carry(make: Callable[[], Proxy], block: bool) -> None:
    """Refused with ICMP, or sent directly: that is the user's choice."""
    with make() as proxy, EgressOnly(proxy=plan(f"{proxy.scheme}://127.0.0.1:{proxy.port}", block=block)) as guest:
        port = fresh_port()
        guest.send_udp(port, 4242, b"x", TARGET)
        if block:
            d = guest.recv_error(lambda q: q.proto == UDP and q.dst == TARGET and q.dport == 4242 and q.sport == port)
            assert d.icmp == ADMIN
            assert guest.flows() == [] and guest.counters()["drop_proxy_udp"] == 1
        else:  # its mapping is an ordinary one; this host may have no route to TARGET
            while not any(f.peer_port == 0 for f in guest.flows()):
                guest.step(0.05)
            assert guest.counters()["drop_proxy_udp"] == 0
        asked = len(proxy.asked)
        guest.send_udp(port, 4242, b"y", TARGET)
        guest.settle()
        assert len(proxy.asked) == asked, "asked again at once"


RELAYED = [b"", b"\0\0\0", b"\0\0\1\1" + bytes([203, 0, 113, 7, 1, 1]) + b"frag", b"\0\0\0\3\1a\1\1x",
           b"\0\0\0\1" + socket.inet_aton(GATEWAY) + b"\0\x35forged", b"\0\0\0\1\x7f\0\0\1\1\1x",
           b"\0\0\0\1\xe0\0\0\1\1\1x",
           b"\0\0\0\1\0\0\0\0\1\1x", b"\0\0\0\1" + bytes([203, 0, 113, 7, 0, 0]) + b"x", b"\0\0\0\4" + bytes(18) + b"x"]


def test_a_relay_is_not_believed() -> None:
    with udp_server() as server, udp_server() as stranger, \
            SocksProxy(route=lambda h, p: server.getsockname()) as proxy, EgressOnly(proxy=plan(proxy.url)) as guest:
        port = fresh_port()
        guest.send_udp(port, 4242, b"x", TARGET)
        while guest.counters()["udp_up"] == 0:
            guest.step(0.05)
        where = server.recvfrom(10)[1]
        relay, address = proxy.relays[0], proxy.sources[0]
        stranger.sendto(b"\0\0\0\1" + socket.inet_aton(TARGET) + b"\1\1stranger", address)
        for data in RELAYED:
            relay.sendto(data, address)
        server.sendto(b"good", where)
        assert guest.recv_udp(port).data == b"good"
        assert guest.counters()["drop_proxy_reply"] == len(RELAYED)
        assert guest.datagram(timeout=0) is None


@pytest.mark.root
@pytest.mark.parametrize("relay", ["192.0.2.9", "127.0.0.1"], ids=["beside the proxy", "our loopback"])
def test_a_relay_on_our_loopback_is_for_a_proxy_there_only(relay: str) -> None:
    """Else a proxy could have the guest's bytes sent to any port of the host. The same proxy is believed about 192.0.2.9."""
    with Netns("p") as ns:
        for address in ("192.0.2.8", "192.0.2.9"):
            ns.ip("addr", "add", f"{address}/32", "dev", "lo")
        with ns.socket(kind=socket.SOCK_DGRAM) as there:
            there.bind((relay, 0))

            class Says(SocksProxy):
                def associate(self, connection: socket.socket) -> None:
                    where = socket.inet_aton(relay) + struct.pack("!H", there.getsockname()[1])
                    connection.sendall(b"\x05\x00\x00\x01" + where)
                    connection.recv(1)

            with Says(address="192.0.2.8", make_socket=lambda kind: ns.socket(kind=kind)) as proxy, inside(ns), \
                    EgressOnly(proxy=plan(proxy.url)) as guest:
                port = fresh_port()
                guest.send_udp(port, 4242, b"x", TARGET)
                if relay != "127.0.0.1":
                    while guest.counters()["udp_up"] == 0:
                        guest.step(0.05)
                    assert there.recvfrom(100)[0].endswith(b"x")
                    return
                d = guest.recv_error(lambda q: q.proto == UDP and q.dst == TARGET and q.dport == 4242 and q.sport == port)
                assert d.icmp == ADMIN and guest.flows() == [] and guest.counters()["drop_proxy_udp"] == 1
                assert select.select([there], [], [], 0)[0] == []


# -- the state machine alone


def handshake(kind: int, answer: bytes, *, user: bytes = b"", cuts: tuple[int, ...] = (), associate: bool = False,
              name: bytes = b"") -> tuple[int, bytes, bytes]:
    """(result, what it sent, what it left on the socket) of a handshake over a socket pair."""
    server = ffi.new("struct proxy_server *", {"kind": kind, "user_len": len(user), "user": user,
                                               "password_len": len(user), "password": user})
    target = ffi.new("struct proxy_target *", {"addr": b"\0" * 10 + b"\xff\xff" + bytes([203, 0, 113, 7]), "port": 80,
                                               "name": name})
    ours, theirs = socket.socketpair()
    h = lib.proxy_handshake_new(server, associate, target)
    try:
        ours.setblocking(False)
        theirs.setblocking(False)
        r, at = 1, 0
        for cut in [*sorted(cuts), len(answer)]:
            if r == 1:
                r = lib.proxy_handshake_step(h, ours.fileno())
            theirs.sendall(answer[at:cut])
            at = max(at, cut)
        while r == 1:
            r = lib.proxy_handshake_step(h, ours.fileno())
            if r == 1:
                theirs.shutdown(socket.SHUT_WR)
        left = b""
        with contextlib.suppress(BlockingIOError):
            left = ours.recv(1 << 20)
        with contextlib.suppress(BlockingIOError):
            return r, theirs.recv(1 << 16), left
        return r, b"", left
    finally:
        lib.proxy_handshake_free(h)
        ours.close()
        theirs.close()


def test_where_an_association_is() -> None:
    assert handshake_of(b"\x05\x00\x05\x00\x00\x01\xc0\x00\x02\x09\x12\x34", associate=True) == (
        0, "192.0.2.9", 0x1234)


def handshake_of(answer: bytes, *, associate: bool) -> tuple[int, str, int]:
    server = ffi.new("struct proxy_server *", {"kind": lib.PROXY_SOCKS5})
    target = ffi.new("struct proxy_target *")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        h = lib.proxy_handshake_new(server, associate, target)
        r = lib.proxy_handshake_step(h, ours.fileno())
        addr, port = ffi.new("uint8_t[16]"), ffi.new("uint16_t *")
        assert lib.proxy_handshake_bound(h, addr, port) == 0
        lib.proxy_handshake_free(h)
        return r, socket.inet_ntoa(bytes(addr)[12:]), port[0]


YES = {lib.PROXY_SOCKS5: b"\x05\x00" + b"\x05\x00\x00\x03\x04abcd\x00\x50",
       lib.PROXY_HTTP: b"HTTP/1.1 204 x\r\na: b\r\n\r\n"}


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(YES)), tail=st.binary(max_size=40), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_exactly_the_handshakes_bytes_are_read(kind: int, tail: bytes, cuts: list[int]) -> None:
    """However the answer is cut into segments."""
    answer = YES[kind] + tail
    r, _, left = handshake(kind, answer, cuts=tuple(c for c in cuts if c <= len(answer)))
    assert (r, left) == (0, tail)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(YES)), answer=st.binary(max_size=300) | st.builds(
    lambda a, at, b: a[:at] + b + a[at:], st.sampled_from([*YES.values(), *GARBAGE]), st.integers(0, 20),
    st.binary(max_size=8)),
    user=st.sampled_from([b"", b"u" * 255]))
def test_any_answer_ends_in_yes_or_an_error(kind: int, answer: bytes, user: bytes) -> None:
    r, _, _ = handshake(kind, answer, user=user)
    assert r <= 0


def test_the_longest_request_fits() -> None:
    """A name of 253 bytes, credentials of 255 each."""
    name = b".".join([b"a" * 63] * 3 + [b"b" * 61])
    assert len(name) == 253
    _, sent, _ = handshake(lib.PROXY_HTTP, b"", user=b"u" * 255, name=name)
    assert sent.endswith(b"\r\n\r\n") and sent.count(name + b":80") == 2
    _, sent, _ = handshake(lib.PROXY_SOCKS5, b"\x05\x02\x01\x00", user=b"u" * 255, name=name)
    assert sent.endswith(b"\x05\x01\x00\x03\xfd" + name + struct.pack("!H", 80))
    assert sent.startswith(b"\x05\x02\x00\x02\x01\xff" + b"u" * 255 + b"\xff" + b"u" * 255)


# -- through the whole pipeline


def test_whole_pipeline(make_wire) -> None:
    """Settings to stage and back; the password is on no stage's command line."""
    with served(echo) as server, SocksProxy(user="u", password="s3cret", route=lambda h, p: server) as proxy, \
            udp_server() as u:
        wire = make_wire(proxy=proxy.url, no_proxy=("192.0.2.0/24",))
        g = GuestTcp(wire.sock, 80, TARGET)
        g.connect(b"hello")
        assert g.pull(5) == b"hello"
        proxy.route = lambda h, p: u.getsockname()
        port = fresh_port()
        wire.send_udp(port, 53, b"q", TARGET)
        assert u.recvfrom(10)[0] == b"q"
        assert proxy.asked == [("connect", TARGET, 80), ("associate", "0.0.0.0", 0)]
        for pid in wire.session.stages().values():
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                assert b"s3cret" not in f.read()
        g.send(RST | ACK)
