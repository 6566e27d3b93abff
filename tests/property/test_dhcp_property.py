"""DHCP server under any bytes and any order of messages."""
from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scapy.layers.dhcp import BOOTP, DHCP

from pipeline.services.dhcp import COOKIE, DhcpConfig, DhcpServer, State, encode_search, parse

NETWORK = IPv4Network("10.0.2.0/28")
CONFIG = DhcpConfig(server=IPv4Address("10.0.2.1"), network=NETWORK, first=IPv4Address("10.0.2.2"),
                    pool_start=IPv4Address("10.0.2.2"), pool_end=IPv4Address("10.0.2.6"), mtu=1500,
                    domain="ringnet.internal", search=("ringnet.internal",))

options = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=60)), max_size=8).map(
    lambda found: b"".join(bytes([code, len(value)]) + value for code, value in found))
almost = st.builds(
    lambda head, kind, rest, end: b"\x01\x01\x06" + head + COOKIE + b"\x35\x01" + bytes([kind]) + rest + end,
    st.binary(min_size=233, max_size=233), st.integers(0, 9), options | st.binary(max_size=80),
    st.sampled_from([b"\xff", b"", b"\xff\x00\x00"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=700) | almost, min_size=1, max_size=6))
def test_no_bytes_raise_and_every_message_is_accounted_for(messages):
    counts: Counter[str] = Counter()
    server = DhcpServer(CONFIG, lambda: 1e9, lambda name: counts.update([name]))
    for data in messages:
        before = counts.copy()
        replies = server.handle(data, b"\2" * 6, IPv4Address("10.0.2.2"))
        assert counts["dhcp_requests"] == before["dhcp_requests"] + 1
        assert len(replies) == counts["dhcp_replies"] - before["dhcp_replies"] <= 1
        for reply in replies:
            packet = BOOTP(reply.payload)
            assert packet.op == 2 and len(reply.payload) >= 300
            assert packet[DHCP].options[0][0] == "message-type"
            if "." in packet.yiaddr and packet.yiaddr != "0.0.0.0":
                assert CONFIG.pool_start <= IPv4Address(packet.yiaddr) <= CONFIG.pool_end
            assert reply.dst in NETWORK or str(reply.dst) == "255.255.255.255"


CODES = [50, 12, 54, 55, 57, 60, 61]  # with values of the length each has


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(CODES).flatmap(lambda code: st.tuples(st.just(code), st.binary(
    min_size=(n := {50: 4, 54: 4, 57: 2}.get(code, 1)), max_size=n if code in (50, 54, 57) else 60))),
    max_size=6, unique_by=lambda option: option[0]), st.sampled_from(["discover", "request", "decline", "release", "inform"]),
    st.integers(0, 0xFFFFFFFF), st.binary(min_size=6, max_size=6), st.booleans())
def test_messages_read_as_scapy_wrote_them(found, kind, xid, mac, broadcast):
    packet = BOOTP(op=1, xid=xid, chaddr=mac, ciaddr="10.0.2.9", flags=0x8000 * broadcast) / DHCP(
        options=[("message-type", kind), *found, "end"])
    message = parse(bytes(packet))
    assert (message.type.name.lower(), message.xid, message.mac, message.broadcast, str(message.ciaddr)) == (
        kind, xid.to_bytes(4), mac, broadcast, "10.0.2.9")
    assert {code: value for code, value in message.options.items() if code != 53} == dict(found)


@given(st.lists(st.text(max_size=80), max_size=6))
def test_any_search_list_encodes_or_is_left_out(names):
    import dns.name

    raw, at, found = encode_search(tuple(names)), 0, []
    while at < len(raw):
        name, used = dns.name.from_wire(raw, at)
        found.append(name)
        at += used
    assert len(found) <= len(names)


class Link(RuleBasedStateMachine):
    """Clients, honest and not, on one link. Model: nobody is told an address that another may use."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1e9
        self.server = DhcpServer(CONFIG, lambda: self.now)
        self.acked: dict[str, tuple[int, float]] = {}  # address: client, until
        self.declined: dict[str, float] = {}
        self.offered: dict[int, str] = {}

    def send(self, client: int, kind: str, *extra: object, ciaddr: str = "0.0.0.0") -> BOOTP | None:
        packet = BOOTP(op=1, chaddr=bytes([2, 0, 0, 0, 0, client]), ciaddr=ciaddr) / DHCP(
            options=[("message-type", kind), *extra, "end"])
        replies = self.server.handle(bytes(packet))
        return BOOTP(replies[0].payload) if replies else None

    def learn(self, client: int, packet: BOOTP | None) -> None:
        if packet is None:
            return
        kind = dict(o for o in packet[DHCP].options if isinstance(o, tuple) and len(o) == 2)["message-type"]
        address = packet.yiaddr
        if kind in (2, 5):
            owner, until = self.acked.get(address, (client, 0.0))
            assert owner == client or until <= self.now, f"{address} is {owner}'s, and was given to {client}"
            assert self.declined.get(address, 0.0) <= self.now, f"{address} was declined"
        if kind == 2:
            self.offered[client] = address
        if kind == 5:
            for other in [a for a, (c, _) in self.acked.items() if c == client]:
                del self.acked[other]
            self.acked[address] = (client, self.now + CONFIG.lease_s)

    clients = st.integers(0, 7)
    addresses = st.integers(0, 16).map(lambda n: f"10.0.2.{n}")

    @rule(client=clients, wish=st.none() | addresses)
    def discover(self, client, wish):
        self.learn(client, self.send(client, "discover", *([("requested_addr", wish)] if wish else [])))

    @rule(client=clients)
    def select(self, client):
        if client in self.offered:
            self.learn(client, self.send(client, "request", ("server_id", "10.0.2.1"),
                                         ("requested_addr", self.offered.pop(client))))

    @rule(client=clients, address=addresses)
    def reboot(self, client, address):
        self.learn(client, self.send(client, "request", ("requested_addr", address)))

    @rule(client=clients, address=addresses)
    def renew(self, client, address):
        self.learn(client, self.send(client, "request", ciaddr=address))

    @rule(client=clients, address=addresses)
    def release(self, client, address):
        self.send(client, "release", ciaddr=address)
        if self.acked.get(address, (-1, 0))[0] == client:
            del self.acked[address]

    @rule(client=clients, address=addresses)
    def decline(self, client, address):
        held = any(str(x.address) == address and x.mac[5] == client for x in self.server.leases())
        self.send(client, "decline", ("requested_addr", address))
        if held:
            self.acked.pop(address, None)
            self.declined[address] = self.now + CONFIG.quarantine_s

    @rule(seconds=st.sampled_from([1, 59, 61, 40000, 86401]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def one_lease_an_address_and_a_client(self):
        leases = self.server.leases()
        assert len({x.address for x in leases}) == len({x.key for x in leases}) == len(leases) <= 5
        for address, (client, until) in self.acked.items():
            if until > self.now:
                assert any(str(x.address) == address and x.mac[5] == client and x.state is State.BOUND for x in leases)


TestLink = Link.TestCase
TestLink.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
