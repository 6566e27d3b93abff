"""Names: dig by UDP and TCP, drill, the hosts table, dead upstreams, and a resolv.conf that changes."""
from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

import dns.message
import dns.rcode
import dns.rrset
import pytest
from netlab import DEADLINE, GATEWAY, HOST_NAME, SERVER, Attached, Netns

from e2e.dns_server import zone

pytestmark = pytest.mark.netns

WWW = {("www.example", "A"): ["192.0.2.80"]}


def dig(guest: Netns, *args: str) -> str:
    return guest.run("dig", f"@{GATEWAY}", "+time=30", "+tries=1", *args, check=False).stdout


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_dig_asks_the_upstream(transport: str, dns_upstream: Callable, guest_session: Attached,
                               guest_ns: Netns) -> None:
    upstream = dns_upstream("127.0.0.1", zone(WWW))
    assert dig(guest_ns, transport, "+short", "www.example").strip() == "192.0.2.80"
    assert [(name, kind) for _, name, kind in upstream.asked] == [("www.example.", "A")]


def test_drill(dns_upstream: Callable, guest_session: Attached, guest_ns: Netns) -> None:
    dns_upstream("127.0.0.1", zone(WWW))
    for flag in ("-u", "-t"):
        out = guest_ns.run("drill", flag, f"@{GATEWAY}", "www.example").stdout
        assert "rcode: NOERROR" in out and "192.0.2.80" in out


def test_the_libc_resolver(dns_upstream: Callable, guest_session: Attached, guest_ns: Netns) -> None:
    dns_upstream("127.0.0.1", zone(WWW))
    assert guest_ns.run("getent", "ahostsv4", "www.example").stdout.split()[0] == "192.0.2.80"


def test_nxdomain_is_passed_on(dns_upstream: Callable, guest_session: Attached, guest_ns: Netns) -> None:
    dns_upstream("127.0.0.1", zone(WWW))
    assert "status: NXDOMAIN" in dig(guest_ns, "nothing.example")


def test_an_answer_too_long_for_udp_comes_by_tcp(dns_upstream: Callable, guest_session: Attached,
                                                 guest_ns: Netns) -> None:
    texts = [f'"{n:03d} {"x" * 200}"' for n in range(60)]
    upstream = dns_upstream("127.0.0.1", zone({("long.example", "TXT"): texts}))
    out = dig(guest_ns, "+short", "long.example", "TXT")
    assert sorted(out.split("\n")[-61:-1]) == sorted(texts), out
    assert {transport for transport, _, _ in upstream.asked} == {"udp", "tcp"}


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_the_gateways_name_needs_no_upstream(transport: str, guest_session: Attached, guest_ns: Netns) -> None:
    assert dig(guest_ns, transport, "+short", HOST_NAME).strip() == GATEWAY
    name = dig(guest_ns, transport, "+short", "-x", GATEWAY).strip()
    assert name.endswith(".ringnet.internal.")
    assert dig(guest_ns, transport, "+short", name).strip() == GATEWAY


def test_the_hosts_table(attach: Callable[..., Attached], guest_ns: Netns) -> None:
    attach("--hosts", "db.internal=192.0.2.77", "--hosts", "six.internal=2001:db8::6", "--hosts", "www=sql.internal", "--hosts",
           "sql.internal=db.internal")
    assert dig(guest_ns, "+short", "db.internal").strip() == "192.0.2.77"
    assert dig(guest_ns, "+short", "six.internal", "AAAA").strip() == "2001:db8::6"
    assert dig(guest_ns, "+short", "-x", "192.0.2.77").strip() == "db.internal."
    # A chain of aliases comes whole, and the C library takes it.
    assert dig(guest_ns, "+short", "www.ringnet.internal").split() == ["sql.internal.", "db.internal.", "192.0.2.77"]
    assert guest_ns.run("getent", "ahostsv4", "www").stdout.split()[0] == "192.0.2.77"
    empty = dig(guest_ns, "db.internal", "AAAA")  # the name exists, the type does not: not NXDOMAIN (RFC 2308 2.2)
    assert "status: NOERROR" in empty and "ANSWER: 0" in empty


@pytest.mark.parametrize("server", ["127.0.0.1", "203.0.113.53"], ids=["port closed", "no route"])
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_a_dead_upstream_is_servfail_at_once(server: str, transport: str, attach: Callable[..., Attached],
                                             guest_ns: Netns) -> None:
    attach("-D", server)
    out = dig(guest_ns, transport, "www.example")
    assert "status: SERVFAIL" in out, out  # dig's own time-out would print none


def test_a_dead_first_server_is_passed_over(dns_upstream: Callable, attach: Callable[..., Attached],
                                            guest_ns: Netns) -> None:
    dns_upstream(SERVER, zone(WWW))
    attach("-D", "127.0.0.1", "-D", SERVER)
    assert dig(guest_ns, "+short", "www.example").strip() == "192.0.2.80"


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_a_stub_resolver_on_127_0_0_53(transport: str, dns_upstream: Callable, host_ns: Netns, attach: Callable[..., Attached],
                                       guest_ns: Netns) -> None:
    """What systemd-resolved writes: a resolver on the host's loopback, which means another thing in the guest."""
    (host_ns.etc / "resolv.conf").write_text("# a stub\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n")
    upstream = dns_upstream("127.0.0.53", zone(WWW))
    attach()
    assert dig(guest_ns, transport, "+short", "www.example").strip() == "192.0.2.80"
    assert upstream.asked == [("tcp" if transport == "+tcp" else "udp", "www.example.", "A")]


def test_a_changed_resolv_conf_is_read_again(dns_upstream: Callable, host_ns: Netns, guest_session: Attached,
                                             guest_ns: Netns) -> None:
    dns_upstream("127.0.0.1", zone({("where.example", "A"): ["192.0.2.1"]}))
    dns_upstream(SERVER, zone({("where.example", "A"): ["192.0.2.2"], ("other.example", "A"): ["192.0.2.3"]}))
    assert dig(guest_ns, "+short", "where.example").strip() == "192.0.2.1"
    (host_ns.etc / "resolv.conf").write_text(f"nameserver {SERVER}\n")
    assert dig(guest_ns, "+short", "other.example").strip() == "192.0.2.3"


def test_200_queries_in_flight(host_ns: Netns, guest_session: Attached, guest_ns: Netns) -> None:
    """RFC 5452 9.2: the upstream answers none until it has seen all 200; then in another order. As resolvers
    do, the guest asks again for what it has no answer to: a datagram may be lost."""
    with host_ns.socket(kind=socket.SOCK_DGRAM) as upstream, guest_ns.socket(kind=socket.SOCK_DGRAM) as guest:
        upstream.bind(("127.0.0.1", 53))
        guest.connect((GATEWAY, 53))
        want = {n: dns.message.make_query(f"n{n}.example", "A", id=1000 + n) for n in range(200)}
        asked: dict[str, list[tuple[dns.message.Message, tuple[str, int]]]] = {}
        whole, end = False, time.monotonic() + DEADLINE
        again = time.monotonic()
        while want:
            assert (now := time.monotonic()) < end, f"{len(want)} without answer, {len(asked)} asked upstream"
            if now >= again:
                for query in want.values():
                    guest.send(query.to_wire())
                again = now + 3.0
            for s in select.select([upstream, guest], [], [], max(0.0, again - now))[0]:
                if s is guest:
                    reply = dns.message.from_wire(guest.recv(65535))
                    if reply.rcode() == dns.rcode.SERVFAIL:
                        continue  # 5 s were over, on a machine that is busy: it is asked again
                    assert whole, "answered before all had been asked"
                    n = int(reply.question[0].name.to_text()[1:].partition(".")[0])
                    assert reply.id == 1000 + n and reply.answer[0][0].to_text() == f"192.0.2.{n}"
                    want.pop(n, None)
                    continue
                wire, peer = upstream.recvfrom(65535)
                query = dns.message.from_wire(wire)
                asked.setdefault(query.question[0].name.to_text(), []).append((query, peer))
                if len(asked) == 200:
                    whole = True
                    for name in sorted(asked, reverse=True):
                        for query, peer in asked[name]:
                            reply = dns.message.make_response(query)
                            reply.answer.append(dns.rrset.from_text(name, 300, "IN", "A", f"192.0.2.{name[1:].partition('.')[0]}"))
                            upstream.sendto(reply.to_wire(), peer)
                        asked[name].clear()


def test_answers_are_cached(dns_upstream: Callable, guest_session: Attached, guest_ns: Netns) -> None:
    upstream = dns_upstream("127.0.0.1", zone(WWW))
    for _ in range(3):
        assert dig(guest_ns, "+short", "www.example").strip() == "192.0.2.80"
    assert len(upstream.asked) == 1
