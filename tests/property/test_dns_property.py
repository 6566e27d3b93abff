"""DNS parser and forwarder under any bytes, and against dnspython."""
from __future__ import annotations

import random
import time
from collections import Counter
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipeline.services import dns_message as dm
from pipeline.services.dns import Cache, DnsForwarder, Limits
from pipeline.services.hosts import HostsTable
from pipeline.services.loop import Loop

label = st.binary(min_size=1, max_size=20) | st.sampled_from(
    [b"example", b"www", b"ringnet", b"internal", b"10", b"arpa"])
names = st.lists(label, max_size=8).map(lambda labels: dns.name.Name([*labels, b""]))
types = st.sampled_from(["A", "AAAA", "MX", "TXT", "PTR", "SOA", "CNAME", "ANY"])
queries = st.builds(
    lambda name, rdtype, ident, edns, payload, do: dns.message.make_query(
        name, rdtype, id=ident, use_edns=0 if edns else -1, payload=payload, want_dnssec=do and edns),
    names, types, st.integers(0, 65535), st.booleans(), st.integers(512, 4096), st.booleans())


RECORDS = [("A", "192.0.2.1"), ("AAAA", "2001:db8::1"), ("MX", "10 mail.example."), ("TXT", '"hello"'),
           ("SOA", "ns.example. admin.example. 1 2 3 4 77"), ("CNAME", "www.example.")]


@st.composite
def replies(draw) -> dns.message.Message:
    """A query's reply with records of several types; dnspython compresses the names."""
    q = draw(queries.filter(lambda q: q.question[0].rdtype != dns.rdatatype.ANY))
    reply = dns.message.make_response(q, our_payload=1232 if q.edns >= 0 else None)
    owner = q.question[0].name
    for section in (reply.answer, reply.authority, reply.additional):
        for kind, text in draw(st.lists(st.sampled_from(RECORDS), max_size=3, unique=True)):
            section.append(dns.rrset.from_text(owner, draw(st.integers(0, 2**31 - 1)), "IN", kind, text))
    return reply


def wire(message: dns.message.Message) -> bytes:
    try:
        return message.to_wire(max_size=65535)
    except (dns.exception.DNSException, ValueError):
        assume(False)
        raise


class Lab:
    def __init__(self, clock=lambda: 0.0) -> None:
        self.loop = Loop(clock)
        self.counts: Counter[str] = Counter()
        hosts = HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"),
                           network=IPv4Network("10.0.2.0/24"))
        hosts.set("db", [IPv4Address("10.0.2.50"), IPv6Address("fd00::1")])
        self.dns = DnsForwarder(self.loop, hosts, count=lambda name, n=1: self.counts.update({name: n}))

    def close(self) -> None:
        self.dns.close()
        self.loop.close()


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300) | queries.map(lambda q: q.to_wire()), st.lists(
    st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=6), st.booleans())
@example(b"\0\0\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", [], False)
def test_no_bytes_raise_and_answers_are_whole_messages(data, damage, stream):
    """Every query is dropped (counted) or gets one well-formed response, which fits."""
    data = bytearray(data)
    for at, value in damage:
        if at < len(data):
            data[at] = value
    lab, got = Lab(), []
    try:
        answered = lab.dns.query(bytes(data), got.append, stream=stream)
        assert len(got) == answered  # no upstream: everything is answered on the spot or not at all
        for reply in got:
            parsed = dm.parse(reply)
            assert parsed.end == len(reply) and parsed.flags & dm.QR and reply[:2] == data[:2]
            assert stream or len(reply) <= max(512, 65507 if parsed.edns else 512)
        assert answered or lab.counts["drop_dns_bad"] == 1
    finally:
        lab.close()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120).map(lambda b: bytes(12) + b) | replies().map(wire), st.data())
def test_names_read_as_dnspython_reads_them(data, draw):
    at = draw.draw(st.integers(12, max(12, len(data) - 1)))
    try:
        name, end = dm.read_name(data, at)
    except dm.DnsFormatError:
        return
    theirs, used = dns.name.from_wire(data, at)  # stricter or equal: what we accept, it accepts
    assert theirs.to_wire() == name and at + used == end


@settings(max_examples=300, deadline=None)
@given(replies())
def test_parse_agrees_with_dnspython(reply):
    data = wire(reply)
    ours, theirs = dm.parse(data), dns.message.from_wire(data, one_rr_per_rrset=True)
    assert (ours.id, ours.rcode, ours.opcode) == (theirs.id, theirs.rcode(), theirs.opcode())
    assert ours.question.name == theirs.question[0].name.to_wire() and ours.question.rtype == theirs.question[0].rdtype
    want = [(r.name.to_wire(), r.rdtype, r.ttl, n) for n, section in
            enumerate((theirs.answer, theirs.authority, theirs.additional), 1) for r in section]
    assert [(r.name, r.rtype, r.ttl, r.section) for r in ours.records if r.rtype != dm.Rtype.OPT] == want
    assert (ours.edns is None) == (theirs.edns < 0)
    if ours.edns:
        assert ours.edns.size == max(512, theirs.payload) and ours.edns.do == bool(theirs.ednsflags & dns.flags.DO)


@settings(max_examples=200, deadline=None)
@given(replies())
def test_a_cut_message_is_never_accepted(reply):
    data = wire(reply)
    for n in {len(data) - 1, len(data) // 2, 12, 11, 0, random.Random(len(data)).randrange(len(data))}:
        try:
            dm.parse(data[:n])
        except dm.DnsFormatError:
            continue
        raise AssertionError(f"{n} of {len(data)} bytes were taken for a message")


@settings(max_examples=200, deadline=None)
@given(queries)
def test_local_answers_read_back_with_dnspython(q):
    lab, got = Lab(), []
    try:
        lab.dns.query(q.to_wire(), got.append)
        reply = dns.message.from_wire(got[0])
        assert q.is_response(reply) and (reply.edns >= 0) == (q.edns >= 0)
        assert bool(reply.ednsflags & dns.flags.DO) == bool(q.ednsflags & dns.flags.DO)
    finally:
        lab.close()


@settings(max_examples=300, deadline=None)
@given(replies(), st.integers(0, 2**31), st.integers(0, 65535), st.booleans(), st.randoms(use_true_random=False))
def test_a_cached_reply_is_the_reply_with_its_ttls_counted_down(reply, age, ident, edns, rng):
    now = [0.0]
    cache = Cache(lambda: now[0], Limits(positive_s=2**31, negative_s=2**31, cache_reply=65535))
    asked = dns.message.make_query(reply.question[0].name, reply.question[0].rdtype, use_edns=reply.edns,
                                   want_dnssec=bool(reply.ednsflags & dns.flags.DO))
    cache.put(dm.parse(asked.to_wire()), dm.parse(wire(reply)))
    if not len(cache):
        return
    now[0] = float(age)
    labels = [bytes(c ^ 0x20 if chr(c).isascii() and chr(c).isalpha() and rng.random() < 0.5 else c for c in x)
              for x in reply.question[0].name.labels]
    do = bool(reply.ednsflags & dns.flags.DO)
    again = dns.message.make_query(dns.name.Name(labels), reply.question[0].rdtype, id=ident,
                                   use_edns=0 if edns or do else -1, want_dnssec=do)
    raw = cache.get(dm.parse(again.to_wire()))
    ttls = [r.ttl for s in (reply.answer, reply.authority, reply.additional) for r in s]
    if raw is None:
        soa = [r for r in reply.authority if r.rdtype == dns.rdatatype.SOA]
        assert age >= min([*ttls, *(x.minimum for r in soa for x in r)])
        return
    got = dns.message.from_wire(raw)
    assert got.id == ident and got.question[0].name.labels == tuple(labels)
    assert (got.edns >= 0) == (again.edns >= 0)
    want = [(r.name, r.rdtype, r.ttl - age) for s in (reply.answer, reply.authority, reply.additional) for r in s]
    assert [(r.name, r.rdtype, r.ttl) for s in (got.answer, got.authority, got.additional) for r in s] == want


@given(st.integers(-1, 20), st.lists(st.floats(0, 10), max_size=30))
def test_timers_fire_in_order_and_once(cancel, delays):
    now, fired = [0.0], []
    loop = Loop(lambda: now[0])
    timers = [loop.after(d, lambda i=i: fired.append(i)) for i, d in enumerate(delays)]
    if 0 <= cancel < len(timers):
        timers[cancel].cancel()
    want = [i for i, _ in sorted(enumerate(delays), key=lambda x: x[1]) if i != cancel]
    for now[0] in (3.0, 7.0, 10.0):
        loop.step(0)
        assert fired == [i for i in want if delays[i] <= now[0]]
    assert loop.deadline() is None
    loop.close()


def test_a_step_never_waits_past_its_deadline_or_for_ever():
    """Real clock, the shortest wait: that it returns is the assertion."""
    loop = Loop(time.monotonic)
    fired = []
    loop.after(0.001, lambda: fired.append(1))
    while not fired:
        loop.step()
    loop.close()
