"""The guest-side DHCP client: against our own server, and against bytes that no server should send."""
from __future__ import annotations

import ipaddress
import struct
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from pipeline import dhcp_client
from pipeline.dhcp_client import (
    ACK,
    DISCOVER,
    OFFER,
    REQUEST,
    DhcpError,
    build,
    checksum,
    lease_of,
    options_of,
    parse,
    search_list,
)
from pipeline.services.dhcp import DhcpServer, config_from

MAC = bytes.fromhex("5254ab000002")
XID = 0x12345678


def reply_frame(payload: bytes, *, sport: int = 67, dport: int = 68) -> bytes:
    return bytes(Ether(src="02:ab:cd:00:00:01", dst="ff:ff:ff:ff:ff:ff") / IP(src="10.0.2.1", dst="255.255.255.255")
                 / UDP(sport=sport, dport=dport) / payload)


def bootp(kind: int = ACK, *, xid: int = XID, mac: bytes = MAC, options: bytes = b"") -> bytes:
    head = struct.pack("!BBBBIHH", 2, 1, 6, 0, xid, 0, 0) + bytes(4) + bytes([10, 0, 2, 2]) + bytes(8)
    return head + mac.ljust(16, b"\0") + bytes(192) + dhcp_client.COOKIE + bytes((53, 1, kind)) + options + b"\xff"


FULL = (b"\x01\x04\xff\xff\xff\x00" b"\x03\x04\x0a\x00\x02\x01" b"\x06\x08\x0a\x00\x02\x01\x01\x01\x01\x01"
        b"\x0f\x10ringnet.internal" b"\x1a\x02\x0f\xa0" b"\x33\x04\x00\x01\x51\x80" b"\x36\x04\x0a\x00\x02\x01")


def test_what_is_sent_is_dhcp_by_another_reading() -> None:
    p = Ether(build(REQUEST, MAC, XID, bytes((50, 4, 10, 0, 2, 2))))
    assert (p[IP].src, p[IP].dst, p[UDP].sport, p[UDP].dport) == ("0.0.0.0", "255.255.255.255", 68, 67)
    sums = p[IP].chksum, p[UDP].chksum
    del p[IP].chksum, p[UDP].chksum
    again = Ether(bytes(p))
    assert sums == (again[IP].chksum, again[UDP].chksum)
    assert (again[BOOTP].xid, again[BOOTP].chaddr[:6], again[BOOTP].flags.value) == (XID, MAC, 0x8000)
    options = dict(o[:2] for o in again[DHCP].options if isinstance(o, tuple))
    assert options["message-type"] == REQUEST and options["requested_addr"] == "10.0.2.2"
    assert set(options["param_req_list"]) == set(dhcp_client.WANTED)


def test_our_server_and_our_client_agree() -> None:
    server = DhcpServer(
        config_from(gateway4="10.0.2.1", prefix=24, guest4="10.0.2.2", pool_start="10.0.2.2", pool_end="10.0.2.254",
                    mtu=4000, domain="ringnet.internal", search=["a.example", "b.a.example"], lease_s=600,
                    lease_file=""),
        clock=lambda: 0.0, count=lambda *_: None)

    def ask(kind: int, options: bytes = b"") -> tuple[int, IPv4Address, dict[int, bytes]]:
        payload = build(kind, MAC, XID, options)[42:]
        [reply] = server.handle(payload, MAC, IPv4Address(0))
        got = parse(reply_frame(reply.payload), MAC, XID)
        assert got is not None
        return got

    kind, address, offered = ask(DISCOVER)
    assert (kind, str(address)) == (OFFER, "10.0.2.2")
    kind, address, options = ask(REQUEST, b"\x32\x04" + address.packed + b"\x36\x04" + offered[54])
    assert kind == ACK
    lease = lease_of(address, options)
    assert lease.address == ipaddress.IPv4Interface("10.0.2.2/24")
    assert (lease.router, lease.dns) == (IPv4Address("10.0.2.1"), (IPv4Address("10.0.2.1"),))
    assert (lease.mtu, lease.seconds, lease.domain) == (4000, 600, "ringnet.internal")
    assert lease.search == ("a.example", "b.a.example")
    kind, address, _ = ask(DISCOVER, bytes((80, 0)))
    assert kind in (OFFER, ACK) and str(address) == "10.0.2.2"


def test_an_ack_is_a_lease() -> None:
    got = parse(reply_frame(bootp(options=FULL)), MAC, XID)
    assert got is not None
    lease = lease_of(got[1], got[2])
    assert (str(lease.address), str(lease.router), lease.mtu, lease.seconds) == ("10.0.2.2/24", "10.0.2.1", 4000, 86400)
    assert [str(a) for a in lease.dns] == ["10.0.2.1", "1.1.1.1"]


@pytest.mark.parametrize("frame", [
    reply_frame(bootp(xid=XID + 1)), reply_frame(bootp(mac=b"\x52" * 6)), reply_frame(bootp(), dport=67),
    reply_frame(bootp(), sport=68), reply_frame(bootp()[:200]), reply_frame(b""), build(DISCOVER, MAC, XID),
    reply_frame(bootp(options=b"\x03\x09\x0a")), bytes(14),
], ids=["other xid", "other client", "to a server", "from a client", "cut", "empty", "a request", "option cut",
        "not IP"])
def test_what_is_not_an_answer_to_us_is_none(frame: bytes) -> None:
    assert parse(frame, MAC, XID) is None


@given(st.binary(max_size=600))
def test_no_bytes_make_it_stumble(noise: bytes) -> None:
    assert parse(noise, MAC, XID) is None
    got = parse(reply_frame(bootp()[:240] + noise), MAC, XID)
    if got is not None:
        try:
            lease_of(got[1], got[2])
        except DhcpError:
            pass


@given(st.binary(max_size=300))
def test_options_are_read_or_refused(data: bytes) -> None:
    try:
        found = options_of(data)
    except ValueError:
        return
    assert sum(len(v) + 2 for v in found.values()) <= max(len(data), 2 * len(found))


@given(st.dictionaries(st.integers(1, 254), st.binary(max_size=600), max_size=5))
def test_long_options_are_split_and_joined(options: dict[int, bytes]) -> None:
    """RFC 3396: parts of at most 255 bytes, joined in order."""
    data = b"".join(bytes((k, len(part))) + part for k, v in options.items()
                    for part in [v[i: i + 255] for i in range(0, len(v), 255)] or [b""])
    assert options_of(b"\0" + data + b"\xff") == options


@given(st.lists(st.lists(st.text("abc-1", min_size=1, max_size=9), min_size=1, max_size=4), max_size=4))
def test_search_lists(names: list[list[str]]) -> None:
    data = b"".join(b"".join(bytes([len(label)]) + label.encode() for label in name) + b"\0" for name in names)
    assert search_list(data) == tuple(".".join(name) for name in names)


def test_search_list_pointers() -> None:
    """RFC 3397 2: the second name ends in a pointer to the first one's "example"."""
    assert search_list(b"\x01a\x07example\x00\x01b\xc0\x02") == ("a.example", "b.example")
    assert search_list(b"\xc0\x00") == ()  # to itself
    assert search_list(b"\x01a\x00\xc0\xff") == ("a",)  # past the end


@given(st.binary(max_size=200))
def test_search_lists_of_any_bytes_end(data: bytes) -> None:
    assert len(search_list(data)) <= len(data)


@given(st.binary(min_size=1, max_size=100))
def test_checksum_of_data_with_its_checksum_is_zero(data: bytes) -> None:
    data += b"\0" * (len(data) % 2)
    assert checksum(data + struct.pack("!H", checksum(data))) == 0


@pytest.mark.parametrize("missing", [1, 51, 54])
def test_an_ack_without_what_every_ack_has(missing: int) -> None:
    options = {k: v for k, v in options_of(FULL).items() if k != missing}
    with pytest.raises(DhcpError, match="ACK has no"):
        lease_of(IPv4Address("10.0.2.2"), options)
