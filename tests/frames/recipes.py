"""The names `made` expressions of classify.toml use: scapy's layers and a few short-hands."""
from __future__ import annotations

import logging
import struct

logging.getLogger("scapy").setLevel(logging.ERROR)

from scapy.all import (  # noqa: E402, F401
    ARP,
    ICMP,
    IP,
    TCP,
    UDP,
    Dot1Q,
    Ether,
    IPOption_LSRR,
    IPOption_NOP,
    IPOption_RR,
    IPOption_SSRR,
    IPv6,
    Raw,
    raw,
)

from frames import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC  # noqa: E402, F401

BROADCAST = "ff:ff:ff:ff:ff:ff"
WORLD = "192.0.2.10"


def eth(**kw):
    return Ether(**{"src": GUEST_MAC, "dst": GATEWAY_MAC, **kw})


def ip(**kw):
    """Ethernet and IP from the guest to the world, all fields right unless given."""
    mac = {k: kw.pop(k) for k in ("dmac", "smac") if k in kw}
    return Ether(src=mac.get("smac", GUEST_MAC), dst=mac.get("dmac", GATEWAY_MAC)) / IP(
        **{"src": GUEST, "dst": WORLD, "id": 1, **kw})


def tcp(**kw):
    return TCP(**{"sport": 40000, "dport": 80, "seq": 1000, "window": 64240, **kw})


def udp(**kw):
    return UDP(**{"sport": 40000, "dport": 7, **kw})


def arp(**kw):
    return Ether(src=GUEST_MAC, dst=BROADCAST) / ARP(**{"op": 1, "hwsrc": GUEST_MAC, "psrc": GUEST,
                                                       "hwdst": "00:00:00:00:00:00", "pdst": GATEWAY, **kw})


def cut(pkt, n):
    """The first n bytes (n < 0: all but the last -n)."""
    return raw(pkt)[:n]


def poke(pkt, offset, data):
    """Bytes overwritten, checksums left as they were."""
    b = bytearray(raw(pkt))
    b[offset:offset + len(data)] = data
    return bytes(b)


def reheader(pkt):
    """IP header checksum made right again, so that the check behind it is reached."""
    b = bytearray(raw(pkt))
    n = (b[14] & 15) * 4
    b[24:26] = b"\0\0"
    total = sum(struct.unpack(f"!{n // 2}H", b[14:14 + n]))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    b[24:26] = struct.pack("!H", total ^ 0xFFFF)
    return bytes(b)
