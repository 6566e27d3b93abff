"""What services learns from DNS answers for egress: which names, when, and that it is before the answer goes out."""
from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import dns.flags
import dns.message
import dns.rrset
import pytest

from pipeline.services.dns import DnsForwarder
from pipeline.services.hosts import HostsTable
from pipeline.services.loop import Loop
from pipeline.services.resolv import Upstream


class Lab:
    """A forwarder with one upstream; `events` are what was learned ("name", ...) and answered ("answer",), in order."""

    def __init__(self) -> None:
        self.loop = Loop(time.monotonic)
        hosts = HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"),
                           network=IPv4Network("10.0.2.0/24"))
        hosts.set("db.example", [IPv4Address("192.0.2.9")])
        self.events: list[tuple[object, ...]] = []
        self.dns = DnsForwarder(self.loop, hosts, learn=lambda *what: self.events.append(("name", *what)))
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind(("127.0.0.1", 0))
        self.server.settimeout(60)
        self.dns.set_upstreams([Upstream.parse(f"127.0.0.1#{self.server.getsockname()[1]}")])

    def close(self) -> None:
        self.dns.close()
        self.loop.close()
        self.server.close()

    def ask(self, name: str, rdtype: str = "A") -> list[tuple[object, ...]]:
        self.events = []
        self.dns.query(dns.message.make_query(name, rdtype).to_wire(), lambda reply: self.events.append(("answer",)))
        return self.events

    def answer(self, *records: tuple[str, int, str, str], flags: int = 0) -> list[tuple[object, ...]]:
        """The upstream answers with (owner, TTL, type, data)."""
        wire, peer = self.server.recvfrom(4096)
        reply = dns.message.make_response(dns.message.from_wire(wire))
        reply.flags |= flags
        reply.answer = [dns.rrset.from_text(o, ttl, "IN", kind, data) for o, ttl, kind, data in records]
        self.server.sendto(reply.to_wire(), peer)
        while ("answer",) not in self.events:
            self.loop.step(20)
        return self.events


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


def ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def test_addresses_get_the_name_that_was_asked_for_before_the_answer_goes_out(lab: Lab) -> None:
    assert lab.ask("WWW.Example") == []
    assert lab.answer(("www.example.", 300, "CNAME", "cdn.example."), ("cdn.example.", 60, "A", "192.0.2.1"),
                      ("cdn.example.", 60, "A", "192.0.2.2")) == [
        ("name", ip("192.0.2.1"), "www.example", 60, False), ("name", ip("192.0.2.2"), "www.example", 60, False),
        ("answer",)]


def test_a_cached_answer_is_learned_again(lab: Lab) -> None:
    lab.ask("www.example")
    lab.answer(("www.example.", 300, "A", "192.0.2.1"))
    assert [e[:3] for e in lab.ask("www.example")] == [("name", ip("192.0.2.1"), "www.example"), ("answer",)]


def test_ipv6(lab: Lab) -> None:
    lab.ask("www.example", "AAAA")
    assert lab.answer(("www.example.", 30, "AAAA", "2001:db8::1"))[0] == (
        "name", ip("2001:db8::1"), "www.example", 30, False)


def test_the_hosts_tables_names_are_marked(lab: Lab) -> None:
    (learned, answer) = lab.ask("db.example")
    assert learned[1:3] == (ip("192.0.2.9"), "db.example") and learned[4] is True and answer == ("answer",)


def test_other_types_say_nothing(lab: Lab) -> None:
    lab.ask("www.example", "TXT")
    assert lab.answer(("www.example.", 30, "TXT", "192.0.2.1")) == [("answer",)]
