"""Fuzz target: the DHCP server's one entry, with clients that are nearly right, over time.

Promised: never raises, each message is counted, at most one reply; what is leased lies in the pool and belongs to one client
at a time; a reply is a whole BOOTP message.
"""
from __future__ import annotations

import random
import struct
from collections import Counter
from ipaddress import IPv4Address, IPv4Network

from pipeline.services.dhcp import COOKIE, DhcpConfig, DhcpServer
from tests.fuzz import pyfuzz

CONFIG = DhcpConfig(server=IPv4Address("10.0.2.1"), network=IPv4Network("10.0.2.0/28"), first=IPv4Address("10.0.2.2"),
                    pool_start=IPv4Address("10.0.2.2"), pool_end=IPv4Address("10.0.2.6"), mtu=1500,
                    domain="ringnet.internal", search=("ringnet.internal",))
_reached: Counter[str] = Counter()


def message(rng: random.Random, client: int, kind: int) -> bytes:
    """What a client would send; addresses and server ids are sometimes another's."""
    mac = bytes([2, 0, 0, 0, 0, client])
    address = (CONFIG.pool_start + rng.randrange(6)).packed
    opts = bytes([53, 1, kind])
    if kind in (3, 4, 7) and rng.random() < 0.7:
        opts += bytes([54, 4]) + rng.choice((CONFIG.server, IPv4Address("10.0.2.99"))).packed
    if kind in (1, 3, 4) and rng.random() < 0.8:
        opts += bytes([50, 4]) + address
    if rng.random() < 0.3:
        opts += bytes([61, 7, 1]) + mac
    if rng.random() < 0.3:
        opts += bytes([12, 5]) + b"guest"
    if rng.random() < 0.5:
        opts += bytes([55, 4, 1, 3, 6, rng.randrange(256)])
    if rng.random() < 0.1:
        opts += bytes([57, 2]) + struct.pack("!H", rng.choice((0, 300, 576, 1500, 65535)))
    if rng.random() < 0.1:
        opts += bytes([52, 1, rng.randrange(5)])  # option overload (RFC 2132 9.3)
    ciaddr = address if kind in (3, 7, 8) and rng.random() < 0.5 else bytes(4)
    return struct.pack("!BBBBIHH4s4s4s4s16s64s128s", 1, 1, 6, 0, rng.getrandbits(32), 0, rng.choice((0, 0x8000)), ciaddr,
                       bytes(4), bytes(4), bytes(4), mac, b"", rng.choice((b"", opts))) + COOKIE + opts + b"\xff"


def one(rng: random.Random) -> None:
    now = [1e9]
    counts: Counter[str] = Counter()
    server = DhcpServer(CONFIG, lambda: now[0], lambda name, n=1: counts.update({name: n}))
    for k in range(1, rng.randrange(2, 40)):
        data = message(rng, rng.randrange(8), rng.choice((1, 3, 3, 4, 7, 8, rng.randrange(256))))
        if rng.random() < 0.4:
            data = pyfuzz.mutate(rng, data)
        before = counts["dhcp_replies"]
        replies = server.handle(data, bytes([2, 0, 0, 0, 0, rng.randrange(8)]),
                                rng.choice((IPv4Address("0.0.0.0"), CONFIG.pool_start, IPv4Address("8.8.8.8"))))
        assert counts["dhcp_requests"] == k, "a message that was not counted"
        assert len(replies) <= 1 and counts["dhcp_replies"] == before + len(replies)
        for r in replies:
            assert len(r.payload) >= 300 and r.payload[0] == 2 and r.payload[236:240] == COOKIE
            yiaddr = IPv4Address(r.payload[16:20])
            assert int(yiaddr) == 0 or CONFIG.pool_start <= yiaddr <= CONFIG.pool_end, f"{yiaddr} is not in the pool"
        leases = [lease.address for lease in server.leases()]
        assert len(leases) == len(set(leases)), "one address, two clients"
        _reached["leases"] += bool(leases)
        if rng.random() < 0.1:
            now[0] += rng.choice((1, 60, 3600, 90000))
    _reached.update({k: counts[k] for k in ("dhcp_replies", "dhcp_naks", "drop_dhcp_bad")})


def report() -> dict[str, int]:
    return dict(_reached)


if __name__ == "__main__":
    pyfuzz.main(one, report)
