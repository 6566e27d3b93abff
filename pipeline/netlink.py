"""The few rtnetlink requests that give an interface its address (rtnetlink(7), netlink(7)).

Headers are in host byte order, addresses in network order. Every call is one request and its acknowledgement,
in the caller's network namespace. Raises NetlinkError with what was asked.
"""
from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE, NLM_F_EXCL = 1, 4, 0x100, 0x400, 0x200
NLMSG_ERROR = 2
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_NEWROUTE = 16, 17, 20, 24
RTMGRP_LINK = 1
IFLA_ADDRESS, IFLA_MTU = 1, 4
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST = 1, 2, 4
RTA_OIF, RTA_GATEWAY = 4, 5
RTNH_F_ONLINK = 4
RT_TABLE_MAIN, RTPROT_DHCP, RTN_UNICAST = 254, 16, 1
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
IFF_UP = 1


class NetlinkError(OSError):
    """The kernel refused; strerror says what was asked for."""


def _attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _request(what: str, kind: int, flags: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as nl:
        nl.settimeout(5)  # the kernel answers within the call; a hang would be a kernel's fault, not ours
        nl.bind((0, 0))
        nl.send(struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        answer = nl.recv(65536)
    _, kind, _, _, _, error = struct.unpack_from("=IHHIIi", answer)
    if kind != NLMSG_ERROR:
        raise NetlinkError(errno.EPROTO, f"{what}: unexpected answer {kind}")
    if error:
        raise NetlinkError(-error, f"{what}: {os.strerror(-error)}")


def index(name: str) -> int:
    """Interface index. Raises OSError (ENODEV)."""
    return socket.if_nametoindex(name)


def _link(what: str, name: str, change: int, attrs: bytes) -> None:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index(name), change, change)
    _request(f"{what} {name}", RTM_NEWLINK, 0, body + attrs)


def link_up(name: str) -> None:
    _link("bring up", name, IFF_UP, b"")


def link_mtu(name: str, mtu: int) -> None:
    _link(f"set MTU {mtu} on", name, 0, _attr(IFLA_MTU, struct.pack("=I", mtu)))


def link_address(name: str, mac: str) -> None:
    _link(f"set MAC address {mac} on", name, 0, _attr(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))))


def addr_add(name: str, address: ipaddress.IPv4Interface) -> None:
    """Add an address, with its broadcast address; the same one again is no error."""
    a, b = address.ip.packed, address.network.broadcast_address.packed
    body = struct.pack("=BBBBi", socket.AF_INET, address.network.prefixlen, 0, RT_SCOPE_UNIVERSE, index(name))
    body += _attr(IFA_LOCAL, a) + _attr(IFA_ADDRESS, a) + _attr(IFA_BROADCAST, b)
    _request(f"add address {address} to {name}", RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def default_route(name: str, via: ipaddress.IPv4Address, *, onlink: bool = False) -> None:
    """Default route; onlink: the router is not in the interface's subnet (as a /32 lease has it)."""
    flags = RTNH_F_ONLINK if onlink else 0
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_DHCP, RT_SCOPE_UNIVERSE,
                       RTN_UNICAST, flags)
    body += _attr(RTA_OIF, struct.pack("=i", index(name))) + _attr(RTA_GATEWAY, via.packed)
    _request(f"add default route via {via} on {name}", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body)


def link_events() -> socket.socket:
    """A socket that tells of changes to interfaces of the namespace it is made in, wherever it is read."""
    nl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    nl.bind((0, RTMGRP_LINK))
    nl.setblocking(False)
    return nl


def links_removed(nl: socket.socket) -> list[int]:
    """Indices of the interfaces removed since the last look (those the kernel had room to tell of)."""
    found: list[int] = []
    while True:
        try:
            data = nl.recv(65536)
        except BlockingIOError:
            return found
        except OSError as e:
            if e.errno != errno.ENOBUFS:
                raise
            continue  # some were lost; go on with what came after
        at = 0
        while at + 32 <= len(data):  # nlmsghdr 16 bytes, ifinfomsg 16
            size, kind = struct.unpack_from("=IH", data, at)
            if size < 32:
                break
            if kind == RTM_DELLINK:
                found.append(struct.unpack_from("=i", data, at + 20)[0])
            at += size + -size % 4
