"""The hosts table while a session runs: whole changes, owned domains, wildcards; and services' part of it."""
from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_address
from types import SimpleNamespace

import dns.message
import dns.rcode
import pytest

from pipeline.messages import HostsChange, Leased, Notices
from pipeline.services import Bucket, Services
from pipeline.services import dns_message as dm
from pipeline.services.hosts import HostsTable


@pytest.fixture
def table() -> HostsTable:
    return HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"), network=IPv4Network("10.0.2.0/24"))


def ask(table: HostsTable, name: str, rdtype: str = "A") -> list[str] | int | None:
    """Addresses; an rcode where there is no such name; None: it is asked upstream."""
    parsed = dm.parse(dns.message.make_query(name, rdtype).to_wire())
    found = table.lookup(parsed.question)
    if found is None:
        return None
    reply = dns.message.from_wire(dm.respond(parsed, parsed.data, found.rcode, answers=found.records,
                                             authority=found.authority, authoritative=True))
    return reply.rcode() or [r.to_text() for rrset in reply.answer for r in rrset]


ONE, TWO = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def test_an_owned_domain(table: HostsTable) -> None:
    table.change({"a.dev.example": [ONE]}, own=["Dev.Example."])
    assert ask(table, "a.dev.example") == ["192.0.2.1"]
    assert ask(table, "b.dev.example") == dns.rcode.NXDOMAIN
    assert ask(table, "dev.example") == []
    assert ask(table, "xdev.example") is None and ask(table, "example") is None
    table.change({}, disown=["dev.example"])
    assert ask(table, "b.dev.example") is None and ask(table, "a.dev.example") == ["192.0.2.1"]


def test_wildcards_as_rfc_4592_says(table: HostsTable) -> None:
    table.change({"*.example": [ONE], "host1.example": [TWO], "sub.deep.example": [TWO], "*.ringnet.internal": [TWO]})
    assert ask(table, "anything.example") == ask(table, "any.thing.example") == ["192.0.2.1"]
    assert ask(table, "host1.example") == ["192.0.2.2"]
    assert ask(table, "x.host1.example") is None  # its nearest ancestor is there, and has no wildcard
    assert ask(table, "deep.example") is None  # it exists, without data
    assert ask(table, "x.deep.example") is None
    assert ask(table, "example") is None
    assert ask(table, "anything.example", "AAAA") == []
    assert ask(table, "new.ringnet.internal") == ["192.0.2.2"]
    assert ask(table, "host.ringnet.internal") == ["10.0.2.1"]
    assert ask(table, "1.2.0.192.in-addr.arpa", "PTR") is None  # a wildcard is nobody's name
    table.change({"*.example": []})
    assert ask(table, "anything.example") is None


@pytest.mark.parametrize("bad", [
    {"names": {"x..y": [ONE]}}, {"names": {"gateway": [ONE]}}, {"names": {"*": [ONE]}}, {"names": {"": [ONE]}},
    {"names": {}, "own": ["."]}, {"names": {}, "own": ["*.x"]}, {"names": {}, "own": ["ringnet.internal"]},
    {"names": {}, "disown": ["ringnet.internal"]},
])
def test_all_of_a_change_or_nothing(table: HostsTable, bad: dict) -> None:
    table.change({"was": [ONE]}, own=["dev.example"])
    before = table.names()
    with pytest.raises(ValueError):
        table.change({"new": [TWO], "was": [], **bad["names"]}, own=["other.example", *bad.get("own", [])],
                     disown=["dev.example", *bad.get("disown", [])])
    assert table.names() == before
    assert ask(table, "x.dev.example") == dns.rcode.NXDOMAIN and ask(table, "x.other.example") is None


def services(table: HostsTable) -> SimpleNamespace:
    """As much of Services as these methods need."""
    clock = [0.0]
    told: list[Leased] = []
    return SimpleNamespace(hosts=table, _change=[], _notices=False, _lost=0, clock=clock, told=told,
                           _rate=Bucket(20, 3, lambda: clock[0]), tell=lambda m: told.append(m) or True)


def test_a_change_in_parts_happens_at_the_last(table: HostsTable) -> None:
    s = services(table)
    assert Services.change_hosts(s, HostsChange(names={"a": ("192.0.2.1",)}, commit=False), []) == ""
    assert ask(table, "a") is None
    assert Services.change_hosts(s, HostsChange(names={"b": ("192.0.2.2",)}, own=("d.example",)), []) == ""
    assert (ask(table, "a"), ask(table, "b"), ask(table, "x.d.example")) == (["192.0.2.1"], ["192.0.2.2"], 3)
    assert Services.change_hosts(s, HostsChange(names={"a": ()}, commit=False), []) == ""
    assert "gateway" in Services.change_hosts(s, HostsChange(names={"gateway": ("192.0.2.2",)}), [])
    assert ask(table, "a") == ["192.0.2.1"]
    assert Services.change_hosts(s, HostsChange(names={"c": ("192.0.2.3",)}), []) == ""  # the failed one is forgotten
    assert ask(table, "a") == ["192.0.2.1"]


def test_leases_are_told_at_a_bounded_rate(table: HostsTable) -> None:
    s = services(table)
    lease = SimpleNamespace(address=ip_address("10.0.2.2"), mac=b"\2\0\0\0\0\1", hostname="box", since=5.0,
                            expires=65.0)
    Services._leased(s, lease)
    assert s.told == []  # nobody listens
    Services.set_notices(s, Notices(on=True), [])
    for _ in range(10):
        Services._leased(s, lease)
    assert s.told == [Leased(address="10.0.2.2", mac="02:00:00:00:00:01", hostname="box", seconds=60)] * 3
    s.clock[0] = 1.0
    Services._leased(s, lease)
    assert s.told[-1].lost == 7
