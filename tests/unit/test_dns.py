"""DNS forwarder against fake servers on loopback; messages are made and read with dnspython.

Time is injected: a test moves the clock past a timeout and steps the loop. A step that waits, waits for a socket.
"""
from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, ip_address

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from pipeline.services import dns_message as dm
from pipeline.services.dns import DnsForwarder, Limits
from pipeline.services.hosts import HostsTable
from pipeline.services.loop import Loop
from pipeline.services.resolv import Upstream
from tests.fds import open_fds


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """A name server whose every step the test makes itself."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for _ in range(50):  # one number free for both protocols
            self.udp = socket.socket(family, socket.SOCK_DGRAM)
            self.udp.bind((address, 0))
            self.tcp = socket.socket(family, socket.SOCK_STREAM)
            try:
                self.tcp.bind(self.udp.getsockname()[:2])
                break
            except OSError:
                self.close()
        self.tcp.listen()
        for sock in (self.udp, self.tcp):
            sock.settimeout(60)
        self.upstream = Upstream(ip_address(address), self.udp.getsockname()[1])
        self.peer: tuple[str, int] = ("", 0)

    def close(self) -> None:
        self.udp.close()
        self.tcp.close()

    def receive(self) -> dns.message.Message:
        wire, self.peer = self.udp.recvfrom(65535)
        return dns.message.from_wire(wire)

    def asked(self) -> bool:
        """Did a datagram come? Loopback delivers within send(), so there is nothing to wait for."""
        self.udp.setblocking(False)
        try:
            return bool(self.udp.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self.udp.settimeout(60)

    def send(self, reply: dns.message.Message | bytes) -> None:
        self.udp.sendto(reply if isinstance(reply, bytes) else reply.to_wire(max_size=65535), self.peer)

    def answer(self, *addresses: str, ttl: int = 300) -> dns.message.Message:
        """Receive and answer one query; returns it."""
        query = self.receive()
        self.send(made(query, *addresses, ttl=ttl))
        return query


def made(query: dns.message.Message, *addresses: str, ttl: int = 300, rcode: int = 0) -> dns.message.Message:
    reply = dns.message.make_response(query, our_payload=1232 if query.edns >= 0 else None)
    reply.flags |= dns.flags.RA
    reply.set_rcode(rcode)
    if addresses:
        question = query.question[0]
        reply.answer.append(dns.rrset.from_text(question.name, ttl, "IN", question.rdtype, *addresses))
    return reply


def denied(query: dns.message.Message, rcode: int = dns.rcode.NXDOMAIN, *, soa_ttl: int = 3600,
           minimum: int = 60) -> dns.message.Message:
    reply = made(query, rcode=rcode)
    reply.authority.append(dns.rrset.from_text(
        "example.", soa_ttl, "IN", "SOA", f"ns.example. hostmaster.example. 1 2 3 4 {minimum}"))
    return reply


class Lab:
    def __init__(self, **limits: float) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.counts: Counter[str] = Counter()
        self.hosts = HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"),
                                network=IPv4Network("10.0.2.0/24"))
        self.dns = DnsForwarder(self.loop, self.hosts, count=lambda name, n=1: self.counts.update({name: n}),
                                limits=Limits(**limits))
        self.servers: list[Server] = []
        self.replies: list[bytes] = []

    def server(self, address: str = "127.0.0.1") -> Server:
        self.servers.append(Server(address))
        return self.servers[-1]

    def use(self, *servers: Server) -> None:
        self.dns.set_upstreams([s.upstream for s in servers])

    def ask(self, query: dns.message.Message | bytes, who: object = "guest") -> bool:
        wire = query if isinstance(query, bytes) else query.to_wire()
        return self.dns.query(wire, self.replies.append, who=who)

    def wait(self, done: Callable[[], object]) -> None:
        while not done():
            self.loop.step(5)

    def reply(self) -> dns.message.Message:
        """The one reply the guest has got, or gets now."""
        self.wait(lambda: self.replies)
        (wire,) = self.replies
        self.replies.clear()
        return dns.message.from_wire(wire)

    def later(self, seconds: float) -> None:
        """Time passes; what is due happens."""
        self.clock.now += seconds
        while self.loop.step(0):
            pass

    def resolve(self, query: dns.message.Message, server: Server, *addresses: str,
                ttl: int = 300) -> dns.message.Message:
        self.ask(query)
        server.answer(*addresses, ttl=ttl)
        return self.reply()

    def close(self) -> None:
        self.dns.close()
        self.loop.close()
        for each in self.servers:
            each.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


@pytest.fixture
def labs() -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(**limits: float) -> Lab:
        made.append(Lab(**limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def query(name: str = "www.example.", rdtype: str = "A", **kw: object) -> dns.message.Message:
    return dns.message.make_query(name, rdtype, **kw)


# --- forwarding over UDP ---


def test_a_query_is_forwarded_and_its_answer_comes_back(lab):
    server = lab.server()
    lab.use(server)
    q = query()
    reply = lab.resolve(q, server, "192.0.2.1", "192.0.2.2")
    assert q.is_response(reply)
    assert sorted(r.to_text() for r in reply.answer[0]) == ["192.0.2.1", "192.0.2.2"]
    assert lab.counts == {"dns_queries": 1, "dns_forwarded": 1}
    assert lab.dns.under_way == 0


def test_ids_and_ports_are_fresh_for_each_query(lab):
    server = lab.server()
    lab.use(server)
    seen = set()
    for n in range(30):
        lab.ask(query(f"n{n}.example."))
        seen.add((server.receive().id, server.peer[1]))
    assert len({i for i, _ in seen}) > 25 and len({p for _, p in seen}) > 25
    assert lab.dns.under_way == 30


def test_ipv6_upstream(lab):
    server = lab.server("::1")
    lab.use(server)
    assert lab.resolve(query(), server, "192.0.2.1").answer


def test_letter_case_of_the_question_is_kept_both_ways(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query("wWw.ExAmPlE."))
    got = server.answer("192.0.2.1")
    assert got.question[0].name.to_text() == lab.reply().question[0].name.to_text() == "wWw.ExAmPlE."


def looped(query: dns.message.Message, target: Callable[[int], int], labels: bytes = b"") -> bytes:
    """A reply that is right but for the owner of its one record: `labels`, then a pointer to target(where it stands)."""
    wire = made(query).to_wire()
    pointer = struct.pack("!H", 0xC000 | target(len(wire) + len(labels)) & 0x3FFF)
    record = labels + pointer + struct.pack("!HHIH", 1, 1, 60, 4) + b"\6\6\6\6"
    return wire[:6] + b"\0\1" + wire[8:] + record


FORGERIES: dict[str, Callable[[dns.message.Message], bytes]] = {
    "another id": lambda q: struct.pack("!H", q.id ^ 1) + made(q, "6.6.6.6").to_wire()[2:],
    "another name": lambda q: struct.pack("!H", q.id) + made(query("evil.example."), "6.6.6.6").to_wire()[2:],
    "another type": lambda q: struct.pack("!H", q.id) + made(query(rdtype="AAAA"), "::6").to_wire()[2:],
    "another class": lambda q: struct.pack("!H", q.id) + made(query(rdclass="CH")).to_wire()[2:],
    "another letter case": lambda q: struct.pack("!H", q.id) + made(query("WWW.example."), "6.6.6.6").to_wire()[2:],
    "a query": lambda q: q.to_wire(),
    "another opcode": lambda q: b"%b\xa8%b" % (q.to_wire()[:2], made(q).to_wire()[3:]),
    "no question, no error": lambda q: struct.pack("!6H", q.id, 0x8180, 0, 0, 0, 0),
    "an owner that points to itself": lambda q: looped(q, lambda at: at),
    "an owner that points forward": lambda q: looped(q, lambda at: at + 16),
    "two pointers in a circle": lambda q: looped(q, lambda at: at - 2, b"\1x"),
    "a pointer into the header": lambda q: looped(q, lambda at: 4),
    "a pointer past the end": lambda q: looped(q, lambda at: 0x3FFF),
    "cut": lambda q: made(q, "6.6.6.6").to_wire()[:-1],
    "short": lambda q: q.to_wire()[:11],
    "empty": lambda q: b"",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_replies_that_do_not_match_are_dropped_and_the_true_one_is_taken(lab, name):
    """RFC 5452 9.1, RFC 1035 4.1.4: wrong id or question, and names whose compression leads in a circle."""
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    got = server.receive()
    server.send(FORGERIES[name](got))
    lab.wait(lambda: lab.counts["drop_dns_reply"])
    assert lab.replies == []
    server.send(made(got, "192.0.2.1"))
    assert lab.reply().answer[0][0].to_text() == "192.0.2.1"


def test_fault_36_a_reply_from_another_address_never_arrives(lab):
    server, stranger = lab.server(), lab.server()
    lab.use(server)
    lab.ask(query())
    stranger.peer = (server.receive(), server.peer)[1]
    stranger.send(made(query(), "6.6.6.6"))
    assert lab.loop.step(0) == 0  # the kernel dropped it: our socket is connected
    assert lab.replies == []


@pytest.mark.parametrize("address", ["127.0.0.2", "127.0.0.1"], ids=["address", "port"])
def test_a_perfect_reply_from_the_wrong_source_is_not_taken(lab, address):
    """RFC 5452 9.1: right id, right question, sent to the right port; only where it comes from is wrong."""
    server, stranger = lab.server(), lab.server(address)
    lab.use(server)
    lab.ask(query())
    got = server.receive()
    stranger.peer = server.peer
    stranger.send(made(got, "6.6.6.6"))
    assert lab.loop.step(0) == 0 and lab.replies == []
    server.send(made(got, "192.0.2.1"))
    assert lab.reply().answer[0][0].to_text() == "192.0.2.1"


def test_a_flood_of_forgeries_does_not_starve_the_loop(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    got = server.receive()
    for _ in range(40):
        server.send(b"x" * 20)
    lab.loop.step(0)
    assert lab.counts["drop_dns_reply"] == 16
    server.send(made(got, "192.0.2.1"))
    assert lab.reply().answer


# --- retry and failure ---


def test_silent_server_then_the_next_after_one_second_then_two(lab):
    a, b, c = lab.server(), lab.server(), lab.server()
    lab.use(a, b, c)
    lab.ask(query())
    a.receive()
    lab.later(0.99)
    assert not b.asked()
    lab.later(0.02)
    b.receive()
    lab.later(1.98)
    assert not c.asked()
    lab.later(0.03)
    c.answer("192.0.2.3")
    assert lab.reply().answer[0][0].to_text() == "192.0.2.3"


def test_late_reply_of_an_earlier_server_is_taken(lab):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    lab.ask(query())
    lab.later(1.1)
    assert b.asked()
    a.answer("192.0.2.1")
    assert lab.reply().answer[0][0].to_text() == "192.0.2.1"


def test_one_server_is_asked_again(lab):
    a = lab.server()
    lab.use(a)
    lab.ask(query())
    first = a.receive()
    lab.later(1.1)
    second = a.answer("192.0.2.1")
    assert first.question == second.question
    assert lab.reply().answer


def test_all_silent_is_servfail_after_five_seconds(lab):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    q = query(use_edns=0)
    lab.ask(q)
    for _ in range(49):
        lab.later(0.1)
    assert lab.replies == []
    lab.later(0.11)
    reply = lab.reply()
    assert q.is_response(reply) and reply.rcode() == dns.rcode.SERVFAIL and reply.edns == 0
    assert lab.counts["dns_servfail"] == 1 and lab.dns.under_way == 0


def test_refused_port_fails_over_at_once(lab):
    dead, alive = lab.server(), lab.server()
    dead.close()
    lab.use(dead, alive)
    lab.ask(query())
    lab.wait(alive.asked)  # the clock stands still: only the ICMP error can have done it
    alive.answer("192.0.2.1")
    assert lab.reply().answer


def test_all_refused_is_servfail_at_once(lab):
    a, b = lab.server(), lab.server()
    a.close()
    b.close()
    lab.use(a, b)
    lab.ask(query())
    assert lab.reply().rcode() == dns.rcode.SERVFAIL
    assert lab.counts["dns_servfail"] == 1


def test_unreachable_network_is_servfail_at_once(lab, monkeypatch):
    import errno

    def connect(self, address):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("pipeline.services.dns.socket.socket", type("S", (socket.socket,), {"connect": connect}))
    lab.dns.set_upstreams([Upstream(ip_address("192.0.2.1")), Upstream(ip_address("2001:db8::1"))])
    lab.ask(query())
    assert len(lab.replies) == 1 and lab.reply().rcode() == dns.rcode.SERVFAIL


def test_no_upstream_is_servfail_at_once(lab):
    lab.ask(query())
    assert len(lab.replies) == 1 and lab.reply().rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
def test_a_server_that_fails_hands_over_at_once(lab, rcode):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    lab.ask(query())
    a.send(made(a.receive(), rcode=rcode))
    lab.wait(b.asked)
    b.answer("192.0.2.1")
    assert lab.reply().answer


def test_header_only_error_hands_over(lab):
    """Some servers answer what they cannot read with twelve bytes."""
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    lab.ask(query(use_edns=0))
    a.send(struct.pack("!6H", a.receive().id, 0x8181, 0, 0, 0, 0))
    lab.wait(b.asked)


def test_when_every_server_fails_the_guest_is_told_at_once(lab):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    q = query()
    lab.ask(q)
    a.send(made(a.receive(), rcode=dns.rcode.SERVFAIL))
    lab.wait(b.asked)
    b.send(made(b.receive(), rcode=dns.rcode.REFUSED))
    reply = lab.reply()
    assert reply.rcode() == dns.rcode.SERVFAIL and q.is_response(reply)


@pytest.mark.parametrize("rcode", [dns.rcode.NXDOMAIN, dns.rcode.FORMERR, dns.rcode.NOTIMP])
def test_other_answers_are_passed_on(lab, rcode):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    lab.ask(query())
    a.send(made(a.receive(), rcode=rcode))
    assert lab.reply().rcode() == rcode
    assert not b.asked()


def test_a_stand_in_is_asked_first_for_a_minute(lab):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    lab.ask(query("one.example."))
    a.receive()
    lab.later(1.1)
    b.answer("192.0.2.1")
    lab.reply()
    lab.ask(query("two.example."))
    assert not a.asked()
    b.answer("192.0.2.1")
    lab.reply()
    lab.later(60)
    lab.ask(query("three.example."))
    assert a.asked()


# --- change of resolvers ---


def test_fault_37_a_change_of_resolvers_asks_the_new_ones_and_empties_the_cache(lab):
    old, new = lab.server(), lab.server()
    lab.use(old)
    lab.resolve(query("known.example."), old, "192.0.2.1")
    lab.ask(query("waiting.example."))
    old.receive()
    lab.use(new)
    assert new.answer("192.0.2.9").question[0].name.to_text() == "waiting.example."
    assert lab.reply().answer[0][0].to_text() == "192.0.2.9"
    assert lab.resolve(query("known.example."), new, "192.0.2.8").answer[0][0].to_text() == "192.0.2.8"
    assert not old.asked()


def test_the_same_resolvers_again_change_nothing(lab):
    server = lab.server()
    lab.use(server)
    lab.resolve(query(), server, "192.0.2.1")
    lab.use(server)
    lab.ask(query())
    assert lab.reply().answer and lab.counts["dns_cached"] == 1


def test_losing_all_resolvers_ends_what_waits(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    lab.use()
    assert len(lab.replies) == 1 and lab.reply().rcode() == dns.rcode.SERVFAIL


# --- sizes, EDNS, truncation ---


def big(q: dns.message.Message, n: int) -> dns.message.Message:
    return made(q, *[f"192.0.{i // 250}.{i % 250}" for i in range(n)])


def test_reply_over_512_bytes_is_cut_for_a_guest_without_edns(lab):
    server = lab.server()
    lab.use(server)
    q = query()
    lab.ask(q)
    server.send(big(server.receive(), 60))
    reply = lab.reply()
    assert q.is_response(reply) and reply.flags & dns.flags.TC and not reply.answer
    assert reply.edns == -1


@pytest.mark.parametrize("size,cut", [(600, True), (1232, False), (4096, False), (100, True)])
def test_reply_fits_the_size_the_guest_told(lab, size, cut):
    server = lab.server()
    lab.use(server)
    q = query(use_edns=0, payload=size)
    lab.ask(q)
    server.send(big(server.receive(), 50))
    lab.wait(lambda: lab.replies)
    assert len(lab.replies[0]) <= max(512, size)  # RFC 6891 6.2.3: less than 512 means 512
    reply = lab.reply()
    assert bool(reply.flags & dns.flags.TC) == cut and reply.edns == 0 and bool(reply.answer) != cut


def test_edns_options_pass_both_ways(lab):
    server = lab.server()
    lab.use(server)
    cookie = dns.edns.GenericOption(10, b"abcdefgh")
    lab.ask(query(use_edns=0, payload=1400, options=[cookie], want_dnssec=True))
    got = server.receive()
    assert got.payload == 1400 and got.options[0].to_wire() == b"abcdefgh" and got.ednsflags & dns.flags.DO
    reply = made(got, "192.0.2.1")
    reply.use_edns(0, dns.flags.DO, 1232, options=[dns.edns.GenericOption(10, b"abcdefgh12345678")])
    server.send(reply)
    assert lab.reply().options[0].to_wire() == b"abcdefgh12345678"


def test_tc_from_upstream_is_passed_to_a_udp_guest(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    reply = made(server.receive(), "192.0.2.1")
    reply.flags |= dns.flags.TC
    server.send(reply)
    assert lab.reply().flags & dns.flags.TC
    lab.ask(query())
    assert server.asked()  # and not kept


def test_tc_reply_that_is_cut_in_the_middle_of_a_record(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    wire = bytearray(big(server.receive(), 60).to_wire()[:500])
    wire[2] |= 2
    server.send(bytes(wire))
    reply = lab.reply()
    assert reply.flags & dns.flags.TC and not reply.answer


def test_unknown_edns_version_is_badvers(lab):
    q = query(use_edns=1)
    lab.ask(q)
    reply = lab.reply()
    assert reply.rcode() == dns.rcode.BADVERS and reply.edns == 0 and q.is_response(reply)


# --- malformed and unserved queries ---


def test_short_messages_and_replies_get_no_answer(lab):
    for wire in (b"", b"x" * 11, made(query(), "192.0.2.1").to_wire()):
        assert lab.ask(wire) is False
    assert lab.replies == [] and lab.counts["drop_dns_bad"] == 3


@pytest.mark.parametrize("opcode", range(1, 16))
def test_other_opcodes_are_notimp(lab, opcode):
    wire = bytearray(query().to_wire())
    wire[2] = wire[2] & 0x87 | opcode << 3
    lab.ask(bytes(wire))
    reply = dm.parse(lab.replies[0])
    assert (reply.rcode, reply.opcode, reply.id) == (dns.rcode.NOTIMP, opcode, int.from_bytes(wire[:2]))


HEAD = struct.pack("!6H", 5, 0x0100, 1, 0, 0, 0)
MALFORMED = {
    "no question": struct.pack("!6H", 5, 0x0100, 0, 0, 0, 0),
    "two questions": struct.pack("!6H", 5, 0x0100, 2, 0, 0, 0) + b"\x01a\x00\x00\x01\x00\x01" * 2,
    "question cut": HEAD + b"\x01a\x00\x00\x01\x00",
    "name cut": HEAD + b"\x05abc",
    "pointer to itself": HEAD + b"\xc0\x0c\x00\x01\x00\x01",
    "two pointers in a circle": HEAD + b"\x01a\xc0\x0c\x00\x01\x00\x01",
    "pointer forward": HEAD + b"\xc0\x12\x00\x01\x00\x01\x01a\x00",
    "pointer into the header": HEAD + b"\xc0\x00\x00\x01\x00\x01",
    "label type 1": HEAD + b"\x41a\x00\x00\x01\x00\x01",
    "name of 256 bytes": HEAD + b"\x3fx".ljust(64, b"x") * 4 + b"\x00\x00\x01\x00\x01",
    "record announced and not there": struct.pack("!6H", 5, 0x0100, 1, 0, 0, 1) + b"\x01a\x00\x00\x01\x00\x01",
    "answers in a query": made(query(), "192.0.2.1").to_wire()[:2] + b"\x01" + made(query(), "192.0.2.1").to_wire()[3:],
    "two OPT records": struct.pack("!6H", 5, 0x0100, 1, 0, 0, 2) + b"\x01a\x00\x00\x01\x00\x01" + (
        dm.opt_record(size=1232) * 2),
    "OPT option past its end": struct.pack("!6H", 5, 0x0100, 1, 0, 0, 1) + b"\x01a\x00\x00\x01\x00\x01"
    b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x05\x00\x0a\x00\x08x",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_queries_are_formerr(lab, name):
    """RFC 1035 4.1.1."""
    assert lab.ask(MALFORMED[name]) is True
    (reply,) = lab.replies
    assert dm.parse(reply).rcode == dns.rcode.FORMERR and reply[:2] == MALFORMED[name][:2]
    assert lab.counts["drop_dns_bad"] == 1


@pytest.mark.parametrize("rdtype", ["AXFR", "IXFR"])
def test_zone_transfers_are_refused(lab, rdtype):
    lab.ask(dns.message.make_query("example.", rdtype))
    assert lab.reply().rcode() == dns.rcode.REFUSED


def test_hosts_table_comes_first_and_nothing_leaks(lab):
    server = lab.server()
    lab.use(server)
    for name, rdtype in (("host.ringnet.internal.", "A"), ("nosuch.ringnet.internal.", "A"),
                         ("9.2.0.10.in-addr.arpa.", "PTR")):
        q = query(name, rdtype)
        lab.ask(q)
        reply = lab.reply()
        assert q.is_response(reply) and reply.flags & dns.flags.AA
    assert not server.asked()
    assert lab.counts["dns_local"] == 3


def test_local_answer_over_512_bytes_is_cut(lab):
    lab.hosts.set("many", [ip_address(f"fd00::{i:x}") for i in range(1, 33)])
    lab.ask(query("many.ringnet.internal.", "AAAA"))
    assert lab.reply().flags & dns.flags.TC
    lab.ask(query("many.ringnet.internal.", "AAAA", use_edns=0, payload=1400))
    assert len(lab.reply().answer[0]) == 32


# --- limits and joining ---


def test_queries_under_way_are_bounded(labs):
    lab = labs(under_way=3)
    server = lab.server()
    lab.use(server)
    assert [lab.ask(query(f"n{n}.example.")) for n in range(5)] == [True] * 3 + [False] * 2
    assert lab.counts["drop_dns_limit"] == 2 and lab.dns.under_way == 3
    server.answer("192.0.2.1")
    lab.reply()
    assert lab.ask(query("n9.example.")) is True


def test_200_queries_under_way_each_get_their_own_answer(lab):
    """RFC 5452 9.2: a socket and an id each. Answered in another order; two of the guest's ports use the same ids."""
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    got: dict[tuple[int, int], bytes] = {}
    for n in range(200):
        wire = query(f"n{n}.example.", id=n % 100).to_wire()
        assert lab.dns.query(wire, lambda reply, n=n: got.__setitem__((n // 100, n % 100), reply), who=n // 100)
    assert lab.dns.under_way == 200
    asked = []
    for _ in range(200):
        asked.append((a.receive(), a.peer))
    assert len({peer for _, peer in asked}) == 200  # a socket each
    for q, a.peer in asked[::-1]:
        a.send(made(q, f"192.0.2.{int(q.question[0].name.to_text()[1:].partition('.')[0])}"))
    lab.wait(lambda: len(got) == 200)
    for (who, ident), wire in got.items():
        reply = dns.message.from_wire(wire)
        n = who * 100 + ident
        assert (reply.id, reply.question[0].name.to_text(), reply.answer[0][0].to_text()) == (
            ident, f"n{n}.example.", f"192.0.2.{n}")
    assert lab.dns.under_way == 0 and not b.asked() and lab.counts["drop_dns_limit"] == 0


def test_equal_queries_wait_for_one_reply(lab):
    server = lab.server()
    lab.use(server)
    first, second = query(id=1), query(id=2)
    lab.ask(first, who=("10.0.2.2", 1))
    lab.ask(second, who=("10.0.2.2", 2))
    lab.ask(second, who=("10.0.2.2", 2))  # the guest repeats itself
    server.answer("192.0.2.1")
    assert not server.asked()
    lab.wait(lambda: len(lab.replies) >= 2)
    assert [dns.message.from_wire(r).id for r in lab.replies] == [1, 2]


def test_sockets_are_closed_when_a_query_ends(lab):
    a, b = lab.server(), lab.server()
    lab.use(a, b)
    before = len(open_fds())
    for n in range(5):
        lab.ask(query(f"n{n}.example."))
    lab.later(1.1)
    assert len(open_fds()) == before + 10
    lab.later(4)
    assert len(lab.replies) == 5
    assert len(open_fds()) == before


# --- cache ---


def cached(lab: Lab, q: dns.message.Message) -> dns.message.Message | None:
    """Reply from the cache; None if it went upstream (the query is then withdrawn)."""
    before = lab.counts["dns_cached"]
    lab.ask(q)
    if lab.counts["dns_cached"] == before:
        lab.dns.close()
        return None
    reply = lab.reply()
    assert q.is_response(reply)
    return reply


def test_cache_counts_the_ttl_down_and_forgets_in_time(lab):
    server = lab.server()
    lab.use(server)
    lab.resolve(query(), server, "192.0.2.1", ttl=100)
    lab.later(40)
    reply = cached(lab, query("WWW.Example."))
    assert reply.answer[0].ttl == 60 and reply.question[0].name.to_text() == "WWW.Example."
    assert not reply.flags & dns.flags.AA
    lab.later(59)
    assert cached(lab, query()).answer[0].ttl == 1
    lab.later(1)
    assert cached(lab, query()) is None


def test_cache_life_is_the_smallest_ttl_of_the_reply(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    reply = made(server.receive(), "192.0.2.1", ttl=500)
    reply.answer.insert(0, dns.rrset.from_text("www.example.", 5, "IN", "CNAME", "x.example."))
    server.send(reply)
    lab.reply()
    lab.later(4)
    assert [r.ttl for r in cached(lab, query()).answer] == [1, 496]
    lab.later(1)
    assert cached(lab, query()) is None


@pytest.mark.parametrize("rcode", [dns.rcode.NXDOMAIN, dns.rcode.NOERROR])
@pytest.mark.parametrize("soa_ttl,minimum", [(3600, 60), (60, 3600)])
def test_negative_answers_live_as_the_soa_says(lab, rcode, soa_ttl, minimum):
    """RFC 2308 5: the smaller of its TTL and its last field."""
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    server.send(denied(server.receive(), rcode, soa_ttl=soa_ttl, minimum=minimum))
    lab.reply()
    lab.later(59)
    assert cached(lab, query()).rcode() == rcode
    lab.later(1)
    assert cached(lab, query()) is None


def test_fault_38_empty_answers_without_soa_are_not_kept(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    server.send(made(server.receive()))
    lab.reply()
    assert cached(lab, query()) is None


def test_fault_38_one_slow_upstream_does_not_block_other_names(lab):
    server = lab.server()
    lab.use(server)
    lab.ask(query("slow.example."))
    server.receive()
    assert lab.resolve(query("quick.example."), server, "192.0.2.1").answer
    lab.ask(query("host.ringnet.internal."))
    assert lab.reply().answer


@pytest.mark.parametrize("change", [
    {"rdtype": "AAAA"}, {"name": "other.example."}, {"want_dnssec": True}, {"flags": dns.flags.RD | dns.flags.CD},
    {"rdclass": "CH"}, {"flags": 0},
    {"use_edns": 0, "options": [dns.edns.ECSOption("192.0.2.0", 24)]},
])
def test_cache_key(lab, change):
    """Name, type, class, DO, CD; no RD or a client subnet: never."""
    server = lab.server()
    lab.use(server)
    lab.resolve(query(), server, "192.0.2.1")
    assert cached(lab, query()) is not None
    assert cached(lab, query(**change)) is None


def test_cached_reply_has_an_opt_record_if_this_asker_sent_one(lab):
    server = lab.server()
    lab.use(server)
    q = query(use_edns=0, options=[dns.edns.GenericOption(10, b"abcdefgh")])
    lab.ask(q)
    reply = made(server.receive(), "192.0.2.1")
    reply.use_edns(0, 0, 1232, options=[dns.edns.GenericOption(10, b"abcdefghijklmnop")])
    server.send(reply)
    assert lab.reply().options
    plain, edns = cached(lab, query()), cached(lab, query(use_edns=0))
    assert (plain.edns, edns.edns) == (-1, 0) and not edns.options


def test_ttl_zero_and_servfail_are_not_kept(lab):
    server = lab.server()
    lab.use(server)
    lab.resolve(query(), server, "192.0.2.1", ttl=0)
    assert cached(lab, query()) is None
    lab.use()
    lab.use(server)
    while server.asked():
        server.receive()
    lab.ask(query("bad.example."))
    server.send(denied(server.receive(), dns.rcode.SERVFAIL))
    assert lab.reply().rcode() == dns.rcode.SERVFAIL
    assert cached(lab, query("bad.example.")) is None


def test_cache_is_bounded_and_the_least_used_goes(labs):
    lab = labs(cache_entries=3)
    server = lab.server()
    lab.use(server)
    for name in "abc":
        lab.resolve(query(f"{name}.example."), server, "192.0.2.1")
    assert cached(lab, query("a.example."))
    lab.resolve(query("d.example."), server, "192.0.2.1")
    assert len(lab.dns.cache) == 3
    assert cached(lab, query("a.example.")) and cached(lab, query("b.example.")) is None


# --- TCP ---


class Stream:
    """The guest's end of a DNS-over-TCP connection."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(0)
        self.bytes = b""
        self.ended = False
        lab.dns.accept(theirs)

    def send(self, *queries: dns.message.Message) -> None:
        self.sock.sendall(b"".join(struct.pack("!H", len(w)) + w for w in (q.to_wire() for q in queries)))

    def poll(self) -> None:
        try:
            while chunk := self.sock.recv(1 << 16):
                self.bytes += chunk
            self.ended = True
        except BlockingIOError:
            pass
        except ConnectionResetError:  # AF_UNIX says so if the other end left bytes unread
            self.ended = True

    def receive(self) -> dns.message.Message:
        def whole() -> bool:
            self.poll()
            return len(self.bytes) >= 2 and len(self.bytes) >= 2 + int.from_bytes(self.bytes[:2])

        self.lab.wait(whole)
        length = int.from_bytes(self.bytes[:2])
        wire, self.bytes = self.bytes[2 : 2 + length], self.bytes[2 + length :]
        return dns.message.from_wire(wire)

    def wait_end(self) -> None:
        self.lab.wait(lambda: (self.poll(), self.ended)[1])


@pytest.fixture
def stream(lab) -> Iterator[Stream]:
    made = Stream(lab)
    yield made
    made.sock.close()


class ServerStream:
    """One connection at a fake server, driven together with the forwarder's loop."""

    def __init__(self, lab: Lab, server: Server) -> None:
        self.lab = lab
        server.tcp.settimeout(0)
        accepted: list[socket.socket] = []

        def came() -> bool:
            try:
                accepted.append(server.tcp.accept()[0])
            except BlockingIOError:
                pass
            return bool(accepted)

        lab.wait(came)
        self.sock = accepted[0]
        self.sock.settimeout(0)

    def receive(self) -> dns.message.Message:
        data = b""

        def whole() -> bool:
            nonlocal data
            try:
                data += self.sock.recv(65537)
            except BlockingIOError:
                pass
            return len(data) > 2 and len(data) >= 2 + int.from_bytes(data[:2])

        self.lab.wait(whole)
        return dns.message.from_wire(data[2:])

    def send(self, reply: dns.message.Message) -> None:
        wire = reply.to_wire(max_size=65535)
        self.sock.settimeout(60)
        self.sock.sendall(struct.pack("!H", len(wire)) + wire)

    def close(self) -> None:
        self.sock.close()


def test_a_tcp_query_is_forwarded_over_tcp_and_not_cut(lab, stream):
    server = lab.server()
    lab.use(server)
    q = query()
    stream.send(q)
    upstream = ServerStream(lab, server)
    upstream.send(big(upstream.receive(), 2000))  # 32 KB
    reply = stream.receive()
    assert q.is_response(reply) and len(reply.answer[0]) == 2000
    assert not server.asked()  # no UDP
    upstream.close()


def test_fault_36_truncated_over_udp_then_whole_over_tcp(lab, stream):
    server = lab.server()
    lab.use(server)
    lab.ask(query())
    server.send(big(server.receive(), 60))
    assert lab.reply().flags & dns.flags.TC
    stream.send(query())
    # The reply the guest could not take is in the cache: TCP gets it whole from there.
    assert len(stream.receive().answer[0]) == 60


def test_pipelined_queries_are_answered_as_the_answers_come(lab, stream):
    """RFC 7766 6.2.1.1."""
    server = lab.server()
    lab.use(server)
    stream.send(query("slow.example.", id=1), query("host.ringnet.internal.", id=2), query("quick.example.", id=3))
    assert stream.receive().id == 2
    first, second = ServerStream(lab, server), ServerStream(lab, server)
    got = {s.receive().question[0].name.to_text(): s for s in (first, second)}
    for name, ident in (("quick.example.", 3), ("slow.example.", 1)):
        s = got[name]
        s.sock.settimeout(60)
        s.send(made_for(lab, name, ident, s))
        assert stream.receive().id == ident
        s.close()


def made_for(lab: Lab, name: str, ident: int, s: ServerStream) -> dns.message.Message:
    """A reply with the id that the forwarder chose on that connection."""
    pending = next(p for p in lab.dns._pending.values() if p.query.id == ident)
    return made(query(name, id=pending.attempts[-1].id), "192.0.2.1")


def test_queries_that_come_a_byte_at_a_time(lab, stream):
    wire = query("host.ringnet.internal.").to_wire()
    for byte in struct.pack("!H", len(wire)) + wire:
        stream.sock.sendall(bytes([byte]))
        lab.loop.step(5)
    assert stream.receive().answer


def test_half_closed_connection_still_gets_its_answers(lab, stream):
    server = lab.server()
    lab.use(server)
    stream.send(query())
    stream.sock.shutdown(socket.SHUT_WR)
    upstream = ServerStream(lab, server)
    upstream.send(made(upstream.receive(), "192.0.2.1"))
    assert stream.receive().answer
    stream.wait_end()
    assert lab.dns.connections == 0
    upstream.close()


def test_what_is_no_query_ends_the_connection(lab, stream):
    stream.send(made(query(), "192.0.2.1"))
    stream.wait_end()
    assert lab.counts["drop_dns_bad"] == 1


def test_idle_connection_is_closed(lab, stream):
    stream.send(query("host.ringnet.internal."))
    stream.receive()
    lab.later(29)
    assert lab.dns.connections == 1
    lab.later(2)
    assert lab.dns.connections == 0
    stream.wait_end()


def test_a_trickle_of_bytes_does_not_keep_a_connection(lab, stream):
    for _ in range(31):
        if lab.dns.connections:
            stream.sock.sendall(b"\x01")
        lab.later(1)
    assert lab.dns.connections == 0


def test_connections_are_bounded_and_the_idle_one_makes_room(labs):
    lab = labs(connections=2)
    lab.use(lab.server())
    streams = [Stream(lab), Stream(lab)]
    streams[1].send(query())
    lab.wait(lambda: lab.dns.under_way)
    streams.append(Stream(lab))
    streams[0].wait_end()  # idle: closed for the newcomer
    streams[2].send(query("b.example."))
    lab.wait(lambda: lab.dns.under_way == 2)
    streams.append(Stream(lab))
    streams[3].wait_end()  # all busy: refused
    assert lab.dns.connections == 2
    for s in streams:
        s.sock.close()


def test_a_guest_that_does_not_read_is_not_read_either(labs):
    """Replies under way are bounded: 1000 large answers are asked for, and never taken until the end."""
    lab = labs(stream_out=10_000, stream_queries=4)
    lab.hosts.set("many", [ip_address(f"fd00::{i:x}") for i in range(1, 33)])
    s = Stream(lab)
    s.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    s.send(*[query("many.ringnet.internal.", "AAAA", id=n) for n in range(1000)])
    while lab.loop.step(0):
        pass
    taken = lab.counts["dns_queries"]
    assert 0 < taken < 1000
    assert [s.receive().id for _ in range(1000)] == list(range(1000))
    s.sock.close()


def test_tcp_refused_fails_over_at_once(lab, stream):
    dead, alive = lab.server(), lab.server()
    dead.close()
    lab.use(dead, alive)
    stream.send(query())
    upstream = ServerStream(lab, alive)
    upstream.send(made(upstream.receive(), "192.0.2.1"))
    assert stream.receive().answer
    upstream.close()


def test_tcp_server_that_closes_early_is_servfail_at_once(lab, stream):
    server = lab.server()
    lab.use(server)
    stream.send(query())
    upstream = ServerStream(lab, server)
    upstream.receive()
    upstream.close()
    assert stream.receive().rcode() == dns.rcode.SERVFAIL


def test_tcp_reply_to_another_query_is_not_taken(lab, stream):
    server = lab.server()
    lab.use(server)
    stream.send(query())
    upstream = ServerStream(lab, server)
    got = upstream.receive()
    got.id ^= 1
    upstream.send(made(got, "6.6.6.6"))
    assert stream.receive().rcode() == dns.rcode.SERVFAIL
    assert lab.counts["drop_dns_reply"] == 1
    upstream.close()


def test_tcp_over_the_limit_gets_servfail(labs):
    lab = labs(under_way=1)
    lab.use(lab.server())
    s = Stream(lab)
    s.send(query("a.example.", id=1), query("b.example.", id=2))
    reply = s.receive()
    assert reply.id == 2 and reply.rcode() == dns.rcode.SERVFAIL
    s.sock.close()


def test_close_leaves_no_descriptor(labs):
    before = len(open_fds())
    lab = Lab()
    lab.use(lab.server())
    s = Stream(lab)
    s.send(query())
    lab.ask(query("b.example."))
    lab.wait(lambda: lab.dns.under_way == 2)
    lab.close()
    s.sock.close()
    assert len(open_fds()) == before
