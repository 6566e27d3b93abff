"""DHCP server: every message and state of RFC 2131, read back with scapy."""
from __future__ import annotations

import json
import os
import stat
from collections import Counter
from ipaddress import IPv4Address, IPv4Network

import pytest
from scapy.layers.dhcp import BOOTP, DHCP

from pipeline.services.dhcp import (
    BROADCAST4,
    BROADCAST_MAC,
    DhcpConfig,
    DhcpServer,
    Reply,
    encode_routes,
    encode_search,
    parse,
)

GATEWAY = IPv4Address("10.0.2.1")
MAC = bytes.fromhex("525400000001")
MAC2 = bytes.fromhex("525400000002")


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Lab:
    """A server, its clock and counters, and a client that speaks through scapy."""

    def __init__(self, clock: Clock | None = None, **config: object) -> None:
        self.clock = clock or Clock()
        self.counts: Counter[str] = Counter()
        settings = {
            "server": GATEWAY, "network": IPv4Network("10.0.2.0/24"), "first": IPv4Address("10.0.2.2"),
            "pool_start": IPv4Address("10.0.2.2"), "pool_end": IPv4Address("10.0.2.254"), "mtu": 4000,
            "domain": "ringnet.internal", "search": ("ringnet.internal", "example.com"),
        } | config
        self.server = DhcpServer(DhcpConfig(**settings), self.clock, lambda name: self.counts.update([name]))

    def send(self, kind: str, *options: object, mac: bytes = MAC, ciaddr: str = "0.0.0.0", flags: int = 0,
             giaddr: str = "0.0.0.0", xid: int = 0x1234, src: str = "0.0.0.0") -> list[Reply]:
        packet = BOOTP(op=1, xid=xid, chaddr=mac, ciaddr=ciaddr, giaddr=giaddr, flags=flags) / DHCP(
            options=[("message-type", kind), *options, "end"])
        return self.server.handle(bytes(packet), mac, IPv4Address(src))

    def lease(self, mac: bytes = MAC, *options: object) -> str:
        """DISCOVER, then REQUEST of what was offered."""
        offer = read(self.send("discover", *options, mac=mac))
        ack = read(self.send("request", ("server_id", str(GATEWAY)), ("requested_addr", offer.yiaddr), *options,
                             mac=mac))
        assert ack["message-type"] == 5
        assert ack.yiaddr == offer.yiaddr
        return ack.yiaddr


class Read(dict):  # options by scapy's name
    yiaddr: str
    packet: BOOTP
    reply: Reply


def read(replies: list[Reply]) -> Read:
    (reply,) = replies
    packet = BOOTP(reply.payload)
    assert packet.op == 2 and packet.options[:4] == b"\x63\x82\x53\x63"
    out = Read()
    out.order = []
    for option in packet[DHCP].options:
        if isinstance(option, tuple):
            out[option[0]] = option[1] if len(option) == 2 else option[1:]
            out.order.append(option[0])
    out.yiaddr, out.packet, out.reply = packet.yiaddr, packet, reply
    return out


def raw_options(payload: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 240
    while payload[at] != 255:
        if payload[at]:
            found[payload[at]] = found.get(payload[at], b"") + payload[at + 2 : at + 2 + payload[at + 1]]
            at += 2 + payload[at + 1]
        else:
            at += 1
    return found


# --- getting a lease ---


def test_first_client_gets_the_configured_address_with_everything_it_needs():
    lab = Lab()
    offer = read(lab.send("discover"))
    assert offer["message-type"] == 2
    assert offer.yiaddr == "10.0.2.2"
    options = raw_options(offer.reply.payload)
    assert options[1] == IPv4Address("255.255.255.0").packed
    assert options[3] == options[6] == options[54] == GATEWAY.packed
    assert options[15] == b"ringnet.internal"
    assert int.from_bytes(options[26]) == 4000
    assert options[28] == IPv4Address("10.0.2.255").packed
    assert [int.from_bytes(options[c]) for c in (51, 58, 59)] == [86400, 43200, 75600]
    assert 121 not in options  # only when asked for (RFC 3442)
    assert options[119] == b"\x07ringnet\x08internal\x00\x07example\x03com\x00"
    ack = read(lab.send("request", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.2")))
    assert (ack["message-type"], ack.yiaddr, ack.packet.ciaddr) == (5, "10.0.2.2", "0.0.0.0")
    assert ack.packet.xid == 0x1234 and ack.packet.chaddr[:6] == MAC
    assert lab.counts == {"dhcp_requests": 2, "dhcp_replies": 2}


def test_first_lease_need_not_be_the_lowest_of_the_pool():
    lab = Lab(first=IPv4Address("10.0.2.15"))
    assert [lab.lease(bytes([2, 0, 0, 0, 0, n])) for n in range(3)] == ["10.0.2.15", "10.0.2.2", "10.0.2.3"]


def test_replies_have_the_bootp_minimum_length():
    replies = Lab().send("discover") + Lab().send("request", ("requested_addr", "1.2.3.4"))
    assert len(replies) == 2 and all(len(r.payload) >= 300 for r in replies)


def test_allocation_is_in_order_and_never_gives_gateway_network_or_broadcast():
    lab = Lab(network=IPv4Network("10.0.2.0/29"), server=IPv4Address("10.0.2.3"), pool_start=IPv4Address("10.0.2.0"),
              pool_end=IPv4Address("10.0.2.7"))
    got = []
    for n in range(5):
        mac = bytes([2, 0, 0, 0, 0, n])
        got.append(read(lab.send("discover", mac=mac)).yiaddr)
        lab.send("request", ("server_id", "10.0.2.3"), ("requested_addr", got[-1]), mac=mac)
    assert got == ["10.0.2.2", "10.0.2.1", "10.0.2.4", "10.0.2.5", "10.0.2.6"]
    assert lab.send("discover", mac=MAC2) == []
    assert lab.counts["drop_dhcp_no_address"] == 1


def test_a_pool_without_a_usable_address_is_refused_at_start():
    with pytest.raises(ValueError, match="no usable address"):
        Lab(pool_start=GATEWAY, pool_end=GATEWAY, first=GATEWAY)


def test_same_client_is_offered_its_own_address_again():
    lab = Lab()
    first = lab.lease()
    lab.lease(MAC2)
    assert read(lab.send("discover", ("requested_addr", "10.0.2.99"))).yiaddr == first


def test_requested_address_is_honoured_if_free():
    lab = Lab()
    assert read(lab.send("discover", ("requested_addr", "10.0.2.77"))).yiaddr == "10.0.2.77"
    assert read(lab.send("discover", ("requested_addr", "10.0.2.77"), mac=MAC2)).yiaddr == "10.0.2.2"
    assert read(lab.send("discover", ("requested_addr", "192.168.1.1"), mac=b"\2" * 6)).yiaddr == "10.0.2.3"


def test_client_identifier_keys_the_lease_not_the_mac():
    lab = Lab()
    a = lab.lease(MAC, ("client_id", b"\xffone"))
    b = lab.lease(MAC, ("client_id", b"\xfftwo"))
    assert a != b
    assert lab.lease(MAC2, ("client_id", b"\xffone")) == a
    lab.lease(MAC)
    assert len(lab.server.leases()) == 3


def test_client_identifier_is_sent_back():
    """RFC 6842 3."""
    offer = Lab().send("discover", ("client_id", b"\x01abcdef"))
    assert raw_options(offer[0].payload)[61] == b"\x01abcdef"


def test_host_name_is_remembered_and_made_harmless():
    lab = Lab()
    lab.lease(MAC, ("hostname", b"vm\x1b[31m\xff"))
    assert lab.server.leases()[0].hostname == "vm?[31m\ufffd"


def test_rapid_commit():
    """RFC 4039: DISCOVER with option 80 is answered by an ACK with option 80, and the lease holds."""
    lab = Lab()
    packet = bytes(BOOTP(op=1, chaddr=MAC) / DHCP(options=[("message-type", "discover"), "end"]))[:-1] + b"\x50\x00\xff"
    (reply,) = lab.server.handle(packet, MAC)
    options = raw_options(reply.payload)
    assert options[53] == b"\x05" and options[80] == b""
    assert [str(x.address) for x in lab.server.leases()] == ["10.0.2.2"]
    assert lab.server.leases()[0].expires == lab.clock.now + 86400


# --- REQUEST in every state (RFC 2131 4.3.2) ---


def test_selecting_another_address_than_the_one_offered_is_refused():
    lab = Lab()
    lab.send("discover")
    nak = read(lab.send("request", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.9")))
    assert nak["message-type"] == 6
    assert set(raw_options(nak.reply.payload)) == {53, 54, 56}  # RFC 2131 table 3
    assert nak.yiaddr == "0.0.0.0"
    assert (nak.reply.dst, nak.reply.dst_mac) == (BROADCAST4, BROADCAST_MAC)


def test_fault_34_request_with_another_servers_id_is_not_ours():
    """No answer, and our offer is free for others at once."""
    lab = Lab()
    lab.send("discover")
    assert lab.send("request", ("server_id", "10.0.2.250"), ("requested_addr", "10.0.2.2")) == []
    assert lab.server.leases() == ()
    assert read(lab.send("discover", mac=MAC2)).yiaddr == "10.0.2.2"


def test_request_with_another_servers_id_keeps_a_bound_lease():
    lab = Lab()
    lab.lease()
    assert lab.send("request", ("server_id", "10.0.2.250"), ("requested_addr", "10.0.2.2")) == []
    assert [str(x.address) for x in lab.server.leases()] == ["10.0.2.2"]


def test_fault_34_mtu_is_told_even_if_not_asked_for():
    options = raw_options(Lab().send("discover", ("param_req_list", [1, 3, 6]))[0].payload)
    assert int.from_bytes(options[26]) == 4000


def test_init_reboot_with_the_right_address():
    lab = Lab()
    lab.lease()
    assert read(lab.send("request", ("requested_addr", "10.0.2.2")))["message-type"] == 5


@pytest.mark.parametrize("address", ["10.0.2.1", "10.0.2.3", "10.0.2.255", "192.168.0.5", "10.0.3.2"])
def test_init_reboot_with_a_wrong_address_is_refused(address):
    """Gateway, another client's, broadcast, another network."""
    lab = Lab()
    lab.lease()
    lab.lease(MAC2)
    nak = read(lab.send("request", ("requested_addr", address)))
    assert nak["message-type"] == 6 and lab.counts["dhcp_naks"] == 1


def test_init_reboot_of_an_unknown_client_gets_a_free_address_since_we_are_alone():
    lab = Lab()
    assert read(lab.send("request", ("requested_addr", "10.0.2.40"))).yiaddr == "10.0.2.40"
    assert [str(x.address) for x in lab.server.leases()] == ["10.0.2.40"]


def test_init_reboot_of_an_unknown_client_is_silent_if_not_authoritative():
    """RFC 2131 4.3.2, where other servers may be."""
    lab = Lab(authoritative=False)
    assert lab.send("request", ("requested_addr", "10.0.2.40")) == []
    assert read(lab.send("request", ("requested_addr", "192.168.7.7")))["message-type"] == 6  # wrong network


def test_renewing_extends_and_answers_by_unicast():
    lab = Lab()
    lab.lease()
    lab.clock.now += 43200
    ack = read(lab.send("request", ciaddr="10.0.2.2", src="10.0.2.2"))
    assert ack["message-type"] == 5
    assert (ack.packet.ciaddr, ack.yiaddr) == ("10.0.2.2", "10.0.2.2")
    assert (ack.reply.dst, ack.reply.dst_mac) == (IPv4Address("10.0.2.2"), MAC)
    assert lab.server.leases()[0].expires == lab.clock.now + 86400


def test_rebinding_after_the_lease_ran_out_gets_the_address_if_nobody_else_has_it():
    lab = Lab()
    lab.lease()
    lab.clock.now += 86401
    assert lab.server.leases() == ()
    assert read(lab.send("request", ciaddr="10.0.2.2"))["message-type"] == 5


def test_renewing_an_address_that_went_to_another_client_is_refused():
    lab = Lab()
    lab.lease()
    lab.clock.now += 86401
    assert read(lab.send("request", ("requested_addr", "10.0.2.2"), mac=MAC2))["message-type"] == 5
    nak = read(lab.send("request", ciaddr="10.0.2.2"))
    assert nak["message-type"] == 6 and nak.reply.dst == BROADCAST4


def test_broadcast_flag_and_unicast_rules():
    """RFC 2131 4.1 for giaddr 0, ciaddr 0."""
    plain = read(Lab().send("discover"))
    assert (plain.reply.dst, plain.reply.dst_mac, plain.reply.dst_port) == (IPv4Address("10.0.2.2"), MAC, 68)
    wide = read(Lab().send("discover", flags=0x8000))
    assert (wide.reply.dst, wide.reply.dst_mac) == (BROADCAST4, BROADCAST_MAC)
    assert wide.packet.flags == 0x8000


# --- the rest ---


def test_fault_33_a_discover_alone_holds_its_address_for_a_minute_only():
    """253 made-up clients do not empty the pool for a day."""
    lab = Lab()
    for n in range(253):
        assert lab.send("discover", mac=bytes([2, 0, 0, 0, n >> 8, n & 255]))
    assert len(lab.server.leases()) == 253
    lab.clock.now += 61
    assert lab.server.leases() == ()
    assert lab.lease(MAC2)


def test_fault_33_when_only_offers_fill_the_pool_the_oldest_makes_room():
    lab = Lab(pool_end=IPv4Address("10.0.2.3"))
    lab.send("discover", mac=b"\2aaaaa")
    lab.clock.now += 1
    lab.send("discover", mac=b"\2bbbbb")
    assert read(lab.send("discover", mac=MAC)).yiaddr == "10.0.2.2"
    nak = read(lab.send("request", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.2"), mac=b"\2aaaaa"))
    assert nak["message-type"] == 6


def test_fault_33_declined_address_has_no_lease_and_is_not_offered_again():
    lab = Lab()
    lab.lease()
    assert lab.send("decline", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.2")) == []
    assert lab.server.leases() == ()
    assert lab.server.quarantined() == (IPv4Address("10.0.2.2"),)
    assert read(lab.send("discover")).yiaddr == "10.0.2.3"
    assert read(lab.send("discover", ("requested_addr", "10.0.2.2"), mac=MAC2)).yiaddr == "10.0.2.4"
    assert read(lab.send("request", ("requested_addr", "10.0.2.2"), mac=b"\2ccccc"))["message-type"] == 6


def test_quarantine_ends():
    lab = Lab(quarantine_s=600)
    lab.lease()
    lab.send("decline", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.2"))
    lab.clock.now += 599
    assert read(lab.send("discover")).yiaddr == "10.0.2.3"
    lab.clock.now += 61  # also past the offer
    assert read(lab.send("discover", mac=MAC2)).yiaddr == "10.0.2.2"


def test_decline_of_somebody_elses_address_is_counted_and_ignored():
    lab = Lab()
    lab.lease()
    lab.send("decline", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.2"), mac=MAC2)
    lab.send("decline", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.200"), mac=MAC2)
    lab.send("decline", ("server_id", str(GATEWAY)))
    assert lab.counts["drop_dhcp_bad"] == 3
    assert [str(x.address) for x in lab.server.leases()] == ["10.0.2.2"]


def test_release_frees_the_address_but_remembers_its_owner():
    lab = Lab()
    lab.lease()
    assert lab.send("release", ("server_id", str(GATEWAY)), ciaddr="10.0.2.2") == []
    assert lab.server.leases() == ()
    assert read(lab.send("discover", mac=MAC2)).yiaddr == "10.0.2.3"  # others first get one nobody had
    assert read(lab.send("discover")).yiaddr == "10.0.2.2"


def test_released_addresses_are_given_out_again_when_the_rest_is_gone():
    lab = Lab(pool_end=IPv4Address("10.0.2.2"))
    lab.lease()
    lab.send("release", ("server_id", str(GATEWAY)), ciaddr="10.0.2.2")
    assert lab.lease(MAC2) == "10.0.2.2"
    assert lab.send("discover") == []


def test_release_by_a_stranger_is_ignored():
    lab = Lab()
    lab.lease()
    lab.send("release", ("server_id", str(GATEWAY)), ciaddr="10.0.2.2", mac=MAC2)
    assert len(lab.server.leases()) == 1 and lab.counts["drop_dhcp_bad"] == 1


def test_inform_gets_parameters_and_no_lease():
    """RFC 2131 4.3.5 (ArcBox section 5 ignored it): no yiaddr, no times, to ciaddr."""
    lab = Lab()
    ack = read(lab.send("inform", ("param_req_list", [51, 58, 59, 6, 15]), ciaddr="10.0.2.100"))
    options = raw_options(ack.reply.payload)
    assert options[53] == b"\x05" and options[6] == GATEWAY.packed and options[15] == b"ringnet.internal"
    assert not {51, 58, 59} & set(options)
    assert (ack.yiaddr, ack.reply.dst, ack.reply.dst_mac) == ("0.0.0.0", IPv4Address("10.0.2.100"), MAC)
    assert lab.server.leases() == ()


def test_inform_from_another_network_is_dropped():
    lab = Lab()
    assert lab.send("inform", ciaddr="8.8.8.8") == [] == lab.send("inform")
    assert lab.counts["drop_dhcp_bad"] == 2


# --- two clients, one address; no address left ---


def test_two_clients_that_want_one_address_get_two():
    """RFC 2131 4.3.1: both ask for .77; the second is offered another, and is refused when it requests .77 all the same."""
    lab, selecting = Lab(), ("server_id", str(GATEWAY))
    first = read(lab.send("discover", ("requested_addr", "10.0.2.77")))
    second = read(lab.send("discover", ("requested_addr", "10.0.2.77"), mac=MAC2))
    assert (first.yiaddr, second.yiaddr) == ("10.0.2.77", "10.0.2.2")
    stolen = read(lab.send("request", selecting, ("requested_addr", "10.0.2.77"), mac=MAC2))
    assert stolen["message-type"] == 6
    assert read(lab.send("request", selecting, ("requested_addr", "10.0.2.77")))["message-type"] == 5
    assert [(str(x.address), x.mac) for x in lab.server.leases() if x.state == "bound"] == [("10.0.2.77", MAC)]


@pytest.mark.parametrize("how", [("init reboot", {}), ("renewing", {"ciaddr": "10.0.2.2"})], ids=lambda how: how[0])
def test_of_two_clients_that_both_think_an_address_is_theirs_one_keeps_it(how):
    """RFC 2131 4.3.2. A guest that was cloned with its lease: the copy has another MAC and the same memory."""
    lab = Lab()
    assert lab.lease() == "10.0.2.2"
    wish = () if how[1] else (("requested_addr", "10.0.2.2"),)
    nak = read(lab.send("request", *wish, mac=MAC2, src="10.0.2.2", **how[1]))
    assert nak["message-type"] == 6 and nak.reply.dst_mac == BROADCAST_MAC  # table 4: the clone has no address now
    assert read(lab.send("request", *wish, src="10.0.2.2", **how[1]))["message-type"] == 5
    assert [x.mac for x in lab.server.leases()] == [MAC]


def test_a_pool_of_leases_is_exhausted_for_newcomers_only():
    """RFC 2131 4.3.1: silence and a counter for DISCOVER, a refusal for REQUEST; who has a lease renews;
    what ends is given out again."""
    lab = Lab(pool_end=IPv4Address("10.0.2.4"))
    macs = [bytes([2, 0, 0, 0, 0, n]) for n in range(3)]
    held = [lab.lease(mac) for mac in macs]
    assert lab.send("discover", mac=MAC) == [] and lab.counts["drop_dhcp_no_address"] == 1
    assert read(lab.send("request", ("requested_addr", held[0]), mac=MAC))["message-type"] == 6
    lab.clock.now += 86000
    assert all(read(lab.send("request", ciaddr=ip, mac=m))["message-type"] == 5 for m, ip in zip(macs[:2], held))
    assert lab.send("discover", mac=MAC) == []
    lab.clock.now += 500  # the one that did not renew ran out
    assert lab.lease(MAC) == held[2]
    assert lab.send("discover", mac=macs[2]) == [] and len(lab.server.leases()) == 3


def test_a_pool_that_was_declined_whole_is_exhausted_until_the_quarantine_ends():
    """RFC 2131 4.3.3."""
    lab = Lab(pool_end=IPv4Address("10.0.2.3"), quarantine_s=600)
    for _ in range(2):
        lab.send("decline", ("server_id", str(GATEWAY)), ("requested_addr", lab.lease()))
    assert lab.send("discover") == [] == lab.send("discover", ("requested_addr", "10.0.2.3"), mac=MAC2)
    assert read(lab.send("request", ("requested_addr", "10.0.2.2")))["message-type"] == 6
    assert lab.counts["drop_dhcp_no_address"] == 2
    lab.clock.now += 601
    assert lab.lease() == "10.0.2.2"


# --- options ---


def test_parameter_request_list_gives_the_order_with_the_mask_before_the_router():
    offer = Lab().send("discover", ("param_req_list", [28, 3, 1, 15, 121, 119, 200]))
    order = [c for c in raw_options(offer[0].payload) if c not in (53, 54, 51, 58, 59)]
    assert order == [1, 28, 3, 15, 121, 119, 6, 26]  # 6 and 26 are needed though nobody asked


def test_classless_routes_when_asked():
    """RFC 3442: a client that takes 121 ignores 3, so the default route is in it."""
    options = raw_options(Lab().send("discover", ("param_req_list", [121]))[0].payload)
    assert options[121] == b"\x00" + GATEWAY.packed
    assert encode_routes(((IPv4Network("10.17.0.0/17"), GATEWAY),)) == b"\x11\x0a\x11\x00" + GATEWAY.packed


def test_search_list_is_compressed_and_split():
    """RFC 3397 and RFC 3396, with the RFC's own example shape."""
    assert encode_search(("eng.apple.com", "marketing.apple.com")) == (
        b"\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04")
    names = tuple(f"{'x' * 60}{n}.example" for n in range(8))
    lab = Lab(search=names)
    (reply,) = lab.send("discover", ("max_dhcp_size", 1500))
    assert len(raw_options(reply.payload)[119]) > 255
    assert raw_options(reply.payload)[119] == encode_search(names)


def test_client_that_takes_576_bytes_gets_no_more():
    """RFC 2131 2; what does not fit is left out, what it needs is there."""
    names = tuple(f"{'x' * 60}{n}.example" for n in range(8))
    (reply,) = Lab(search=names).send("discover")
    assert len(reply.payload) + 28 <= 576
    assert {1, 3, 6, 26, 51, 53, 54} <= set(raw_options(reply.payload))


def test_option_82_is_ignored():
    (reply,) = Lab().send("discover", ("relay_agent_information", b"\x01\x02ab"))
    assert 82 not in raw_options(reply.payload)


def test_overloaded_and_split_options_are_read():
    """RFC 2132 9.3, RFC 3396."""
    packet = bytearray(bytes(BOOTP(op=1, chaddr=MAC))[:236])
    packet[108:115] = b"\x35\x01\x01\x3d\x02AB"
    packet[115] = 255
    packet[44:49] = b"\x3d\x02CD\xff"
    packet += b"\x63\x82\x53\x63\x34\x01\x03\xff"
    message = parse(bytes(packet))
    assert message.type == 1 and message.options[61] == b"ABCD"


FILE, SNAME = slice(108, 236), slice(44, 108)


def overloaded(value: int, options: bytes, file: bytes = b"", sname: bytes = b"") -> bytes:
    packet = bytearray(bytes(BOOTP(op=1, chaddr=MAC))[:236])
    packet[FILE], packet[SNAME] = file.ljust(128, b"\0"), sname.ljust(64, b"\0")
    return bytes(packet) + b"\x63\x82\x53\x63" + b"\x34\x01" + bytes([value]) + options


WISH = b"\x32\x04" + IPv4Address("10.0.2.44").packed
OVERLOADS = {
    "type in file": (overloaded(1, b"\xff", file=b"\x35\x01\x01\xff"), "10.0.2.2"),
    "wish in sname": (overloaded(2, b"\x35\x01\x01\xff", sname=WISH + b"\xff"), "10.0.2.44"),
    "in both": (overloaded(3, b"\xff", b"\x35\x01\x01\xff", WISH + b"\xff"), "10.0.2.44"),
    "not announced, so a file name": (overloaded(2, b"\x35\x01\x01\xff", file=WISH + b"\xff"), "10.0.2.2"),
    "a value without meaning": (overloaded(0, b"\x35\x01\x01\xff", WISH, WISH), "10.0.2.2"),
    # RFC 2132 9.3: the option stands in the options field; what it says within file is nobody's word.
    "announced in file only": (overloaded(1, b"\x35\x01\x01\xff", b"\x34\x01\x03\xff", WISH), "10.0.2.2"),
    "behind the end of file": (overloaded(1, b"\x35\x01\x01\xff", b"\xff" + WISH), "10.0.2.2"),
    "half in file, half in sname": (overloaded(3, b"\x35\x01\x01\xff", b"\x32\x02\x0a\x00\xff", b"\x32\x02\x02\x2c\xff"),
                                    "10.0.2.44"),  # RFC 3396 5, in that order
    "no end anywhere": (overloaded(3, b"\x35\x01\x01", b"", WISH), "10.0.2.44"),
    "past the end of sname": (overloaded(2, b"\x35\x01\x01\xff", sname=bytes(60) + b"\x32\x04\x0a\x00"), None),
    "length cut off by the end of file": (overloaded(1, b"\x35\x01\x01\xff", file=bytes(127) + b"\x32"), None),
}


@pytest.mark.parametrize("name", OVERLOADS)
def test_option_overload(name):
    """RFC 2132 9.3, RFC 2131 4.1: what is offered shows what was read; None: malformed, dropped and counted."""
    packet, offered = OVERLOADS[name]
    lab = Lab()
    replies = lab.server.handle(packet, MAC)
    assert (read(replies).yiaddr if replies else None) == offered
    assert lab.counts["drop_dhcp_bad"] == (offered is None)
    if replies:
        assert replies[0].payload[FILE] == bytes(128) and replies[0].payload[SNAME] == bytes(64)  # ours need no overload


# --- what is not DHCP ---


def hostile() -> dict[str, bytes]:
    good = bytes(BOOTP(op=1, chaddr=MAC) / DHCP(options=[("message-type", "discover"), "end"]))
    return {
        "empty": b"",
        "cut before the options": good[:239],
        "bootp": good[:236] + b"\0" * 64,
        "reply": b"\x02" + good[1:],
        "token ring": good[:1] + b"\x06" + good[2:],
        "address length 16": good[:2] + b"\x10" + good[3:],
        "option past the end": good[:240] + b"\x35\x01\x01\x0c\x50ab",
        "option without length": good[:240] + b"\x35\x01\x01\x0c",
        "no type": good[:240] + b"\xff",
        "type 9": good[:240] + b"\x35\x01\x09\xff",
        "type of two bytes": good[:240] + b"\x35\x02\x01\x01\xff",
        "server's message": good[:240] + b"\x35\x01\x02\xff",
        "address of three bytes": good[:240] + b"\x35\x01\x01\x32\x03\x0a\x00\x02\xff",
        "request without address": good[:240] + b"\x35\x01\x03\xff",
        "empty client id": good[:240] + b"\x35\x01\x01\x3d\x00\xff",
        "overload of two bytes": good[:240] + b"\x35\x01\x01\x34\x02\x01\x01\xff",
    }


@pytest.mark.parametrize("name", hostile())
def test_malformed_is_dropped_and_counted(name):
    lab = Lab()
    assert lab.server.handle(hostile()[name], MAC) == []
    assert lab.counts == {"dhcp_requests": 1, "drop_dhcp_bad": 1}
    assert lab.server.leases() == ()


def test_relayed_messages_are_ignored_and_counted():
    lab = Lab()
    assert lab.send("discover", giaddr="10.0.2.9") == []
    assert lab.counts["drop_dhcp_relayed"] == 1


# --- lease file ---


def test_leases_survive_a_restart(tmp_path):
    path = str(tmp_path / "leases.json")
    lab = Lab(lease_file=path)
    lab.lease(MAC2, ("hostname", b"other"))
    lab.lease(MAC)
    lab.send("discover", mac=b"\2ddddd")  # an offer is not kept
    lab.lease(b"\2eeeee")
    lab.send("decline", ("server_id", str(GATEWAY)), ("requested_addr", "10.0.2.5"), mac=b"\2eeeee")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(tmp_path) == ["leases.json"]  # the temporary one is gone

    again = Lab(lab.clock, lease_file=path)
    assert [(str(x.address), x.mac, x.hostname) for x in again.server.leases()] == [
        ("10.0.2.2", MAC2, "other"), ("10.0.2.3", MAC, "")]
    assert again.server.quarantined() == (IPv4Address("10.0.2.5"),)
    assert read(again.send("request", ciaddr="10.0.2.3", mac=MAC))["message-type"] == 5
    assert read(again.send("discover", mac=b"\2fffff")).yiaddr == "10.0.2.4"


def test_release_is_remembered_over_a_restart(tmp_path):
    lab = Lab(lease_file=str(tmp_path / "l"))
    lab.lease(MAC2)
    lab.lease(MAC)
    lab.send("release", ("server_id", str(GATEWAY)), ciaddr="10.0.2.3")
    again = Lab(lab.clock, lease_file=str(tmp_path / "l"))
    assert len(again.server.leases()) == 1
    assert read(again.send("discover")).yiaddr == "10.0.2.3"


def test_leases_outside_a_changed_pool_are_void(tmp_path):
    lab = Lab(lease_file=str(tmp_path / "l"))
    lab.lease()
    again = Lab(lab.clock, lease_file=str(tmp_path / "l"), pool_start=IPv4Address("10.0.2.100"),
                first=IPv4Address("10.0.2.100"))
    assert again.server.leases() == ()
    assert again.lease() == "10.0.2.100"


@pytest.mark.parametrize("text", [
    "", "not json", "[]", '{"version": 2, "leases": [], "quarantine": {}}',
    '{"version": 1, "leases": [{"address": "10.0.2.999", "key": "00", "mac": "525400000001", "state": "bound",'
    ' "since": 0, "expires": 0}], "quarantine": {}}',
    '{"version": 1, "leases": [{"address": "10.0.2.9", "key": "zz", "mac": "525400000001", "state": "bound",'
    ' "since": 0, "expires": 0}], "quarantine": {}}',
    '{"version": 1, "leases": [], "quarantine": {"x": 1}}', "\x00\xff",
])
def test_corrupt_lease_file_is_put_aside(tmp_path, caplog, text):
    path = tmp_path / "leases.json"
    path.write_text(text)
    lab = Lab(lease_file=str(path))
    assert lab.server.leases() == ()
    assert (tmp_path / "leases.json.bad").read_text() == text
    assert "starting with no leases" in caplog.text and str(path) in caplog.text
    lab.lease()
    assert json.loads(path.read_text())["leases"][0]["address"] == "10.0.2.2"


def test_unwritable_lease_file_is_said_once_and_the_lease_holds(tmp_path, caplog):
    lab = Lab(lease_file=str(tmp_path / "absent" / "leases"))
    lab.lease()
    lab.lease(MAC2)
    assert len(lab.server.leases()) == 2
    assert caplog.text.count("cannot be written") == 1


def test_repeated_requests_do_not_write_the_file_each_time(tmp_path):
    """A renewal storm must not become an fsync storm; a renewal in earnest is written."""
    path = tmp_path / "leases"
    lab = Lab(lease_file=str(path))
    lab.lease()
    inode = path.stat().st_ino
    for _ in range(20):
        lab.clock.now += 1
        lab.send("request", ciaddr="10.0.2.2")
    assert path.stat().st_ino == inode
    held_until = lab.server.leases()[0].expires
    assert held_until == lab.clock.now + 86400
    assert Lab(lab.clock, lease_file=str(path)).server.leases()[0].expires >= held_until
    lab.clock.now += 43200
    lab.send("request", ciaddr="10.0.2.2")
    assert json.loads(path.read_text())["leases"][0]["expires"] == lab.clock.now + 86400
