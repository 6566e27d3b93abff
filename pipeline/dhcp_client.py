"""A DHCP client for the guest's end: asks, takes a lease, and says what it contains. Configures nothing.

For `ringnet run` and `ringnet attach --config-net`. It speaks through the interface like any guest's client, so
that what it gets has passed the whole pipeline. The lease is not renewed: the server's lasts a day, its one
client is this guest, and an address in use is never given to another (the server asks by its lease table).

Source: RFC 2131 (messages, retransmission 4.1, client 4.4), RFC 2132 (options), RFC 3397 (option 119),
packet(7) for the socket: there is no address yet to bind a UDP socket to.
"""
from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
import time
from ipaddress import IPv4Address

from msgspec import Struct

DISCOVER, OFFER, REQUEST, ACK, NAK = 1, 2, 3, 5, 6  # RFC 2132 9.6
COOKIE = b"\x63\x82\x53\x63"  # RFC 2131 3
WANTED = bytes((1, 3, 6, 15, 26, 51, 54, 119))  # option 55
BROADCAST = b"\xff" * 6
ETH_IP = 0x0800
FIRST_WAIT, MAX_WAIT = 0.5, 4.0  # s; RFC 2131 4.1 has 4 s first, for a slower network than this


class DhcpError(Exception):
    """No lease; the text says how far it came."""


class Lease(Struct, frozen=True, kw_only=True):
    address: ipaddress.IPv4Interface
    router: IPv4Address | None
    dns: tuple[IPv4Address, ...]
    domain: str
    search: tuple[str, ...]
    mtu: int  # bytes of L3; 0: not told
    seconds: int
    server: IPv4Address


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def build(kind: int, mac: bytes, xid: int, options: bytes = b"", secs: int = 0) -> bytes:
    """Ethernet frame with a client's broadcast message."""
    bootp = struct.pack("!BBBBIHH16x", 1, 1, 6, 0, xid, secs, 0x8000) + mac + bytes(10 + 64 + 128) + COOKIE
    bootp += bytes((53, 1, kind)) + options + bytes((55, len(WANTED))) + WANTED + b"\xff"
    bootp = bootp.ljust(300, b"\0")  # BOOTP's size (RFC 1542 2.1)
    udp_len = 8 + len(bootp)
    src, dst = bytes(4), b"\xff" * 4
    pseudo = src + dst + struct.pack("!BBH", 0, 17, udp_len)
    udp = struct.pack("!HHHH", 68, 67, udp_len, 0)
    udp = struct.pack("!HHHH", 68, 67, udp_len, checksum(pseudo + udp + bootp) or 0xFFFF)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + udp_len, 0, 0, 64, 17, 0, src, dst)
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return BROADCAST + mac + struct.pack("!H", ETH_IP) + ip + udp + bootp


def options_of(data: bytes) -> dict[int, bytes]:
    """Options by number; parts of one option are joined (RFC 3396 7). Raises ValueError if they are cut."""
    found: dict[int, bytes] = {}
    i = 0
    while i < len(data) and data[i] != 255:
        if data[i] == 0:
            i += 1
            continue
        if i + 2 > len(data) or i + 2 + data[i + 1] > len(data):
            raise ValueError(f"option {data[i]} is cut")
        found[data[i]] = found.get(data[i], b"") + data[i + 2 : i + 2 + data[i + 1]]
        i += 2 + data[i + 1]
    return found


def parse(frame: bytes, mac: bytes, xid: int) -> tuple[int, IPv4Address, dict[int, bytes]] | None:
    """(message type, yiaddr, options) if the frame is a DHCP reply to us; else None."""
    if len(frame) < 14 + 20 or frame[12:14] != b"\x08\x00" or frame[14] >> 4 != 4 or frame[23] != 17:
        return None
    ihl = (frame[14] & 15) * 4
    udp = frame[14 + ihl : 14 + int.from_bytes(frame[16:18], "big")]
    if len(udp) < 8 + 240 or udp[:4] != b"\x00\x43\x00\x44":
        return None
    b = udp[8 : int.from_bytes(udp[4:6], "big")]
    if len(b) < 240 or b[0] != 2 or b[4:8] != xid.to_bytes(4, "big") or b[28:34] != mac or b[236:240] != COOKIE:
        return None
    try:
        options = options_of(b[240:])
    except ValueError:
        return None
    if len(options.get(53, b"")) != 1:
        return None
    return options[53][0], IPv4Address(b[16:20]), options


def search_list(data: bytes) -> tuple[str, ...]:
    """Option 119: names as in DNS, with pointers into the option itself (RFC 3397 2). Bad ones end the list."""
    names, i = [], 0
    while i < len(data):
        labels, j, jumped, hops = [], i, False, 0
        while True:
            if j >= len(data):
                return tuple(names)
            n = data[j]
            if n & 0xC0 == 0xC0:
                if j + 1 >= len(data) or (hops := hops + 1) > 16:
                    return tuple(names)
                if not jumped:
                    i, jumped = j + 2, True
                j = (n & 0x3F) << 8 | data[j + 1]
                continue
            j += 1
            if not n:
                break
            labels.append(data[j : j + n].decode("ascii", "replace"))
            j += n
        if not jumped:
            i = j
        names.append(".".join(labels))
    return tuple(n for n in names if n)


def lease_of(address: IPv4Address, o: dict[int, bytes]) -> Lease:
    """Raises DhcpError if the ACK lacks what every ACK has."""
    if len(o.get(1, b"")) != 4 or len(o.get(54, b"")) != 4 or len(o.get(51, b"")) != 4:
        raise DhcpError("DHCP: the server's ACK has no subnet mask, lease time or server identifier")
    four = [IPv4Address(o[6][k : k + 4]) for k in range(0, len(o.get(6, b"")) - 3, 4)]
    return Lease(
        address=ipaddress.IPv4Interface(f"{address}/{IPv4Address(o[1])}"),
        router=IPv4Address(o[3][:4]) if len(o.get(3, b"")) >= 4 else None,
        dns=tuple(four), domain=o.get(15, b"").rstrip(b"\0").decode("ascii", "replace"),
        search=search_list(o.get(119, b"")), mtu=int.from_bytes(o[26], "big") if len(o.get(26, b"")) == 2 else 0,
        seconds=int.from_bytes(o[51], "big"), server=IPv4Address(o[54]),
    )


def ask(ifname: str, *, seconds: float = 15.0) -> Lease:
    """DISCOVER, OFFER, REQUEST, ACK on an interface that is up. Raises DhcpError after so many seconds, OSError."""
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_IP)) as s:
        s.bind((ifname, ETH_IP))
        mac: bytes = s.getsockname()[4]
        poll = select.poll()
        poll.register(s, select.POLLIN)

        def exchange(kind: int, xid: int, options: bytes, answers: tuple[int, ...], until: float
                     ) -> tuple[int, IPv4Address, dict[int, bytes]] | None:
            """Send and send again, with back-off, until one of the answers comes."""
            wait, began = FIRST_WAIT, time.monotonic()
            while (now := time.monotonic()) < until:
                s.send(build(kind, mac, xid, options, int(now - began)))
                again = min(now + wait, until)
                while (left := again - time.monotonic()) > 0:
                    if not poll.poll(left * 1000 + 1):
                        break
                    got = parse(s.recv(65536), mac, xid)
                    if got is not None and got[0] in answers:
                        return got
                wait = min(wait * 2, MAX_WAIT)
            return None

        while True:
            xid = int.from_bytes(os.urandom(4))
            offer = exchange(DISCOVER, xid, bytes((80, 0)), (OFFER, ACK), end)  # 80: rapid commit (RFC 4039)
            if offer is None:
                raise DhcpError(f"DHCP: no offer on {ifname} within {seconds:g} s")
            if offer[0] == ACK:
                return lease_of(offer[1], offer[2])
            asked = bytes((50, 4)) + offer[1].packed + bytes((54, 4)) + offer[2].get(54, bytes(4))
            answer = exchange(REQUEST, xid, asked, (ACK, NAK), min(end, time.monotonic() + 5))
            if answer is not None and answer[0] == ACK:
                return lease_of(answer[1], answer[2])
            if time.monotonic() >= end:
                raise DhcpError(f"DHCP: {offer[1]} was offered on {ifname} but not acknowledged")
