"""Hosts table: what is ours, what it says, and how it changes. Answers are read with dnspython."""
from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_address

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest

from pipeline.services import dns_message as dm
from pipeline.services.hosts import HostsTable

GATEWAY = "10.0.2.1"


@pytest.fixture
def table() -> HostsTable:
    made = HostsTable(domain="ringnet.internal", gateway=IPv4Address(GATEWAY), network=IPv4Network("10.0.2.0/24"))
    made.set("db", [ip_address("10.0.2.50"), ip_address("fd00::50")])
    made.set("api.corp.example", [ip_address("192.0.2.7")])
    made.set("deep.er.ringnet.internal", [ip_address("192.0.2.8")])
    made.set("v6only", [ip_address("fd00::6")])
    return made


def ask(table: HostsTable, name: str, rdtype: str = "A", *, edns: bool = False,
        rdclass: str = "IN") -> dns.message.Message | None:
    """None: the table does not own the name, it is forwarded."""
    query = dns.message.make_query(name, rdtype, rdclass, use_edns=0 if edns else -1)
    parsed = dm.parse(query.to_wire())
    found = table.lookup(parsed.question)
    if found is None:
        return None
    reply = dns.message.from_wire(dm.respond(parsed, parsed.data, found.rcode, answers=found.records,
                                             authority=found.authority, authoritative=True))
    assert query.is_response(reply)
    assert reply.flags & (dns.flags.AA | dns.flags.RA)
    if not reply.answer:  # RFC 2308 3: the SOA says how long "nothing" holds
        (soa,) = reply.authority
        assert soa.rdtype == dns.rdatatype.SOA and soa.ttl <= 10
        assert query.question[0].name.is_subdomain(soa.name)
    return reply


def data(reply: dns.message.Message | None) -> list[str]:
    assert reply is not None and reply.rcode() == dns.rcode.NOERROR
    return [r.to_text() for rrset in reply.answer for r in rrset]


@pytest.mark.parametrize("name", ["host.ringnet.internal", "gateway.ringnet.internal", "GATEWAY.RingNet.internal."])
def test_preset_names_are_the_gateway(table, name):
    assert data(ask(table, name)) == [GATEWAY]
    assert data(ask(table, name, "AAAA")) == []


def test_a_name_has_all_its_addresses_by_family(table):
    assert data(ask(table, "db")) == data(ask(table, "db.ringnet.internal")) == ["10.0.2.50"]
    assert data(ask(table, "db", "AAAA")) == ["fd00::50"]
    assert set(data(ask(table, "db", "ANY"))) == {"10.0.2.50", "fd00::50"}


def test_fault_35_aaaa_question_gets_no_a_record(table):
    reply = ask(table, "api.corp.example", "AAAA")
    assert data(reply) == [] and reply.rcode() == dns.rcode.NOERROR
    assert data(ask(table, "v6only", "A")) == []


def test_fault_35_arcount_is_right_for_edns_queries(table):
    """dnspython's strict parser raises on a wrong count; the OPT record is ours, and only if asked with one."""
    with_opt, without = ask(table, "db", edns=True), ask(table, "db")
    assert (with_opt.edns, without.edns) == (0, -1)
    assert data(with_opt) == data(without) == ["10.0.2.50"]
    assert dm.parse(with_opt.to_wire()).data[10:12] == b"\0\1"


@pytest.mark.parametrize("rdtype", ["MX", "TXT", "SRV", "CNAME", "HTTPS", "TYPE65400"])
def test_other_types_of_a_local_name_have_no_data_and_are_not_forwarded(table, rdtype):
    assert data(ask(table, "db.ringnet.internal", rdtype)) == []


@pytest.mark.parametrize("name", ["nosuch.ringnet.internal", "a.b.c.ringnet.internal", "x.db.ringnet.internal"])
def test_fault_36_unknown_names_of_the_owned_domain_are_denied_here(table, name):
    for rdtype in ("A", "AAAA", "TXT", "ANY"):
        assert ask(table, name, rdtype).rcode() == dns.rcode.NXDOMAIN
    assert ask(table, name, "TXT", rdclass="CH").rcode() == dns.rcode.NXDOMAIN


def test_names_between_exist_without_data(table):
    """RFC 8020: NXDOMAIN for er.ringnet.internal would deny deep.er.ringnet.internal too."""
    assert data(ask(table, "er.ringnet.internal")) == []
    assert data(ask(table, "ringnet.internal")) == []


@pytest.mark.parametrize("name", ["example.com", "corp.example", "other.corp.example", "xringnet.internal", "internal",
                                  ".", "ringnet.internal.example", "nosuch"])
def test_other_names_are_forwarded(table, name):
    assert ask(table, name) is None


@pytest.mark.parametrize("name", [r"x\.ringnet.internal", r"x\007ringnet.internal"])
def test_names_compare_by_label_not_by_byte(table, name):
    """One label "x.ringnet", or "x", 7, "ringnet" (which looks like the length in front of ours), is not our domain."""
    assert ask(table, name) is None


# --- reverse ---


def test_reverse_of_known_addresses(table):
    assert data(ask(table, "1.2.0.10.in-addr.arpa", "PTR")) == ["gateway.ringnet.internal."]
    assert data(ask(table, "50.2.0.10.IN-ADDR.arpa", "PTR")) == ["db."]
    assert data(ask(table, ip_address("192.0.2.7").reverse_pointer, "PTR")) == ["api.corp.example."]
    assert data(ask(table, ip_address("fd00::50").reverse_pointer, "PTR")) == ["db."]
    assert data(ask(table, "1.2.0.10.in-addr.arpa", "A")) == []


@pytest.mark.parametrize("name,rcode", [
    ("77.2.0.10.in-addr.arpa", dns.rcode.NXDOMAIN),
    ("2.0.10.in-addr.arpa", dns.rcode.NOERROR),
    ("x.77.2.0.10.in-addr.arpa", dns.rcode.NXDOMAIN),
    ("1.50.2.0.10.in-addr.arpa", dns.rcode.NXDOMAIN),
])
def test_reverse_names_of_the_guest_subnet_never_leak(table, name, rcode):
    for rdtype in ("PTR", "A", "ANY"):
        reply = ask(table, name, rdtype)
        assert reply is not None and reply.rcode() == rcode


@pytest.mark.parametrize("name", [
    "1.3.0.10.in-addr.arpa", "0.10.in-addr.arpa", "in-addr.arpa", "8.8.8.8.in-addr.arpa", "256.2.0.10.in-addr.arpa",
    "x.2.0.10.in-addr.arpa", ip_address("2001:db8::1").reverse_pointer, "ip6.arpa", "1_0" + ".0" * 31 + ".ip6.arpa",
])
def test_other_reverse_names_are_forwarded(table, name):
    assert ask(table, name, "PTR") is None


@pytest.mark.parametrize("prefix,inside,outside", [
    (23, ["1.2.0.10", "1.3.0.10", "3.0.10"], ["1.4.0.10", "0.10"]),
    (25, ["127.2.0.10"], ["128.2.0.10", "2.0.10"]),
    (16, ["1.99.0.10", "99.0.10", "0.10"], ["10", "1.99.1.10"]),
])
def test_reverse_names_of_subnets_that_end_between_octets(prefix, inside, outside):
    network = IPv4Network(f"10.0.2.0/{prefix}", strict=False)
    table = HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"), network=network)
    assert all(ask(table, f"{n}.in-addr.arpa", "PTR") is not None for n in inside)
    assert all(ask(table, f"{n}.in-addr.arpa", "PTR") is None for n in outside)


# --- changing it ---


def test_set_replaces_and_remove_forgets(table):
    table.set("db", [ip_address("10.0.2.51")])
    assert data(ask(table, "db")) == ["10.0.2.51"]
    assert data(ask(table, "db", "AAAA")) == []
    assert ask(table, "50.2.0.10.in-addr.arpa", "PTR").rcode() == dns.rcode.NXDOMAIN
    assert table.remove("DB") and not table.remove("db")
    assert ask(table, "db") is None
    assert ask(table, "db.ringnet.internal").rcode() == dns.rcode.NXDOMAIN
    table.remove("deep.er.ringnet.internal")
    assert ask(table, "er.ringnet.internal").rcode() == dns.rcode.NXDOMAIN


def test_reverse_name_falls_back_to_the_next_name_of_an_address(table):
    table.set("first", [ip_address("192.0.2.99")])
    table.set("second", [ip_address("192.0.2.99")])
    reverse = ip_address("192.0.2.99").reverse_pointer
    assert data(ask(table, reverse, "PTR")) == ["first."]
    table.remove("first")
    assert data(ask(table, reverse, "PTR")) == ["second."]


def test_replace_keeps_the_presets_and_is_all_or_nothing(table):
    with pytest.raises(ValueError, match="0 addresses"):
        table.replace({"new": [ip_address("1.2.3.4")], "bad": []})
    assert data(ask(table, "db")) == ["10.0.2.50"] and ask(table, "new") is None
    table.replace({"new": [ip_address("1.2.3.4")]})
    assert set(table.names()) == {"new", "new.ringnet.internal", "host.ringnet.internal", "gateway.ringnet.internal"}


@pytest.mark.parametrize("name", ["", ".", "a..b", "x" * 64, ".".join(["x" * 60] * 5), "host", "ringnet.internal",
                                  "gateway.ringnet.internal"])
def test_impossible_and_reserved_names_are_refused(table, name):
    before = table.names()
    with pytest.raises(ValueError):
        table.set(name, [ip_address("1.2.3.4")])
    assert table.names() == before


def test_an_empty_domain_would_own_every_name():
    with pytest.raises(ValueError, match="must not be empty"):
        HostsTable(domain="", gateway=IPv4Address(GATEWAY), network=IPv4Network("10.0.2.0/24"))
