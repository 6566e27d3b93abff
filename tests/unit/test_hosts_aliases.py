"""Aliases in the hosts table: CNAME chains, read back with dnspython, and what is refused."""
from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_address

import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from pipeline import host_names
from pipeline.config import ConfigError, make
from pipeline.hosts_book import HostsBook
from pipeline.services.dns import DnsForwarder
from pipeline.services.hosts import CHAIN_MAX, HostsTable
from pipeline.services.loop import Loop

ONE, SIX = ip_address("192.0.2.1"), ip_address("2001:db8::1")


@pytest.fixture
def table() -> HostsTable:
    made = HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"), network=IPv4Network("10.0.2.0/24"))
    made.change({"web1.example": [ONE, SIX], "web.example": ["web1.example"], "www.example": ["Web.Example."],
                 "up": ["host"], "*.apps.example": ["www.example"]})
    return made


def ask(table: HostsTable, name: str, rdtype: str = "A", rdclass: str = "IN") -> dns.message.Message | None:
    """By way of the forwarder, which has no upstream: what it says is the table's, or SERVFAIL."""
    loop, got = Loop(lambda: 0.0), []
    query = dns.message.make_query(name, rdtype, rdclass)
    DnsForwarder(loop, table).query(query.to_wire(), got.append, stream=True)
    loop.close()
    (wire,) = got
    reply = dns.message.from_wire(wire)
    assert query.is_response(reply)
    return reply


def chain(reply: dns.message.Message) -> list[str]:
    """The whole answer in its order: NAME TYPE DATA."""
    return [f"{r.name} {dns.rdatatype.to_text(r.rdtype)} {d.to_text()}" for r in reply.answer for d in r]


def test_a_chain_is_answered_whole_and_in_order(table: HostsTable) -> None:
    """RFC 1034 4.3.2 step 3a: a stub resolver gets every step and the addresses at the end."""
    assert chain(ask(table, "WWW.example")) == ["WWW.example. CNAME web.example.", "web.example. CNAME web1.example.",
                                                "web1.example. A 192.0.2.1"]
    assert ask(table, "www.example").canonical_name().to_text() == "web1.example."  # dnspython walks it, too
    assert chain(ask(table, "www.example", "AAAA"))[-1] == "web1.example. AAAA 2001:db8::1"
    assert chain(ask(table, "up")) == ["up. CNAME host.ringnet.internal.", "host.ringnet.internal. A 10.0.2.1"]
    assert chain(ask(table, "up.ringnet.internal"))[-1] == "host.ringnet.internal. A 10.0.2.1"


def test_who_asks_for_the_alias_itself_gets_it_alone(table: HostsTable) -> None:
    """RFC 1034 3.6.2: a query for CNAME, or for anything, is not followed."""
    for rdtype in ("CNAME", "ANY"):
        assert chain(ask(table, "www.example", rdtype)) == ["www.example. CNAME web.example."]


def test_a_chain_to_no_data_says_so(table: HostsTable) -> None:
    """RFC 2308 2.2: the aliases, no record of that type, NOERROR, and the SOA for how long that holds."""
    reply = ask(table, "www.example", "MX")
    assert reply.rcode() == dns.rcode.NOERROR and len(chain(reply)) == 2
    assert reply.authority[0].name.to_text() == "web1.example." and reply.authority[0].rdtype == dns.rdatatype.SOA
    assert ask(table, "www.example", rdclass="CH").answer == []


def test_a_chain_whose_end_was_taken_away_is_no_such_name_and_asks_nobody(table: HostsTable) -> None:
    """RFC 6604 3: the rcode tells of the last name; RFC 2308 2.1."""
    assert table.remove("web1.example")
    reply = ask(table, "www.example")
    assert reply.rcode() == dns.rcode.NXDOMAIN and len(chain(reply)) == 2 and reply.authority
    table.set("deep.web1.example", [ONE])  # now it exists, without data (RFC 8020)
    assert ask(table, "www.example").rcode() == dns.rcode.NOERROR


def test_wildcards_may_be_aliases(table: HostsTable) -> None:
    """RFC 4592 3.3.3: the asked name is the CNAME's owner."""
    assert chain(ask(table, "a.b.apps.example"))[0] == "a.b.apps.example. CNAME www.example."
    table.change({"*.dev.example": [ONE], "any.example": ["this.dev.example"]})
    assert chain(ask(table, "any.example")) == ["any.example. CNAME this.dev.example.", "this.dev.example. A 192.0.2.1"]


def test_a_circle_is_refused_and_one_by_a_wildcard_ends(table: HostsTable) -> None:
    before = table.names()
    for change in ({"web1.example": ["www.example"]}, {"self.example": ["self.example"]}, {"x": ["y"], "y": ["X"]}):
        with pytest.raises(ValueError, match="circle"):
            table.change({**change, "new.example": [ONE]})
    assert table.names() == before
    table.change({"*.loop.example": ["a.loop.example"]})
    reply = ask(table, "b.loop.example")
    assert reply.rcode() == dns.rcode.SERVFAIL and reply.answer == []


def test_a_chain_has_a_greatest_length(table: HostsTable) -> None:
    steps = {f"n{i}.example": [f"n{i + 1}.example"] for i in range(CHAIN_MAX)}
    table.change({**steps, f"n{CHAIN_MAX}.example": [ONE]})
    assert len(chain(ask(table, "n0.example"))) == CHAIN_MAX + 1
    with pytest.raises(ValueError, match=f"over more than {CHAIN_MAX}"):
        table.change({f"n{CHAIN_MAX}.example": ["web1.example"]})
    assert len(chain(ask(table, "n0.example"))) == CHAIN_MAX + 1


@pytest.mark.parametrize("values", [["a.example", ONE], ["a.example", "b.example"], [""], ["."], ["*.x.example"], ["a..b"],
                                    ["x" * 64]])
def test_what_cannot_stand_behind_a_name(table: HostsTable, values: list) -> None:
    before = table.names()
    with pytest.raises(ValueError):
        table.set("new.example", values)
    assert table.names() == before


def test_an_alias_has_no_reverse_name_and_takes_its_own_away(table: HostsTable) -> None:
    reverse = ONE.reverse_pointer
    assert chain(ask(table, reverse, "PTR"))[0].endswith("PTR web1.example.")
    table.change({"second.example": [ONE], "web1.example": ["second.example"]})
    assert chain(ask(table, reverse, "PTR"))[0].endswith("PTR second.example.")


def test_owners_of_a_name_and_of_what_is_behind_it() -> None:
    book = HostsBook()
    book.commit(book.plan_add("a", {"web1.example": ["192.0.2.1"]}, ()))
    delta = book.plan_add("b", {"www.example": ["WEB1.example."]}, ())
    assert delta.told == {"www.example": ("web1.example",)}
    book.commit(delta)
    # Addresses of anybody come before an alias; it is back when they go.
    both = book.plan_add("c", {"www.example": ["192.0.2.9"]}, ())
    assert both.told == {"www.example": ("192.0.2.9",)}
    book.commit(both)
    gone = book.plan_remove("c", ["www.example"], ())
    assert gone.told == {"www.example": ("web1.example",)}
    book.commit(gone)
    for names in ({"x": ["nobody.example"]}, {"x": ["web1.example", "192.0.2.1"]}, {"x": ["192.0.2.777"]}):
        with pytest.raises(ValueError, match="x: "):
            book.plan_add("b", names, ())
    book.plan_add("b", {"x": ["y"], "y": ["host"]}, ())  # known by the same call; preset
    with pytest.raises(ValueError, match="www.example: web1.example"):
        book.plan_replace("a", {"www.example": ["web1.example"]}, ())  # what it would be an alias of goes


@pytest.mark.parametrize(("hosts", "says"), [
    ({"a": "b"}, "--hosts a=b: neither an IP address nor a name"), ({"a": "192.0.2.777"}, "not an IP address"),
    ({"a": "b", "b": "a"}, "circle"), ({"a": "b,192.0.2.1", "b": "192.0.2.1"}, "one other name"),
    ({"a": "b", "b.ringnet.internal": "host"}, ""),
])
def test_on_the_command_line(hosts: dict[str, str], says: str) -> None:
    if not says:
        assert make({"hosts": hosts}).hosts_table()
        return
    with pytest.raises(ConfigError, match=says) as error:
        make({"hosts": hosts})
    assert "\n" not in str(error.value)


def test_what_is_typed_as_an_address_is_never_a_name() -> None:
    assert host_names.values(["FD00::1", "fd00:0::1"]) == ("fd00::1",)
    assert host_names.alias_of(host_names.values(["A.b."])) == "a.b"
    for text in ("1.2.3", "10.0.2.256", "fe80::1::2", "1", "x.1", "a b", "", "."):
        with pytest.raises(ValueError, match="not an IP address"):
            host_names.values([text])
