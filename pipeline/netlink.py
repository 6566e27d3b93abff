"""The few rtnetlink requests that give an interface its address, and a second NIC its bridge (rtnetlink(7), netlink(7)).

Headers are in host byte order, addresses in network order. Every call is one request and its acknowledgement,
in the caller's network namespace. Raises NetlinkError with what was asked.
"""
from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator

from msgspec import Struct

NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE, NLM_F_EXCL = 1, 4, 0x100, 0x400, 0x200
NLMSG_ERROR = 2
NLM_F_DUMP = 0x300
NLMSG_DONE = 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 17, 18, 20, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTMGRP_LINK = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 10, 13, 18, 20
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_BR_FORWARD_DELAY, IFLA_BR_MCAST_SNOOPING = 1, 23
IFLA_BRPORT_ISOLATED = 33
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST = 1, 2, 4
RTA_DST, RTA_OIF, RTA_GATEWAY = 1, 4, 5
RTNH_F_ONLINK = 4
RT_TABLE_MAIN, RTPROT_DHCP, RTN_UNICAST = 254, 16, 1
RT_TABLE_LOCAL, RTN_LOCAL, RT_SCOPE_HOST = 255, 2, 254
RTM_DELADDR, RTA_METRICS, RTAX_QUICKACK = 21, 8, 15
RTPROT_OURS = 82  # of routes into a guest: by it those of a session that was killed are found
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
IFF_UP = 1
TAP_QUEUE = 8192  # frames: super-frames of many connections that begin at once must not be lost there


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


# -- bridges and what is on them

class LinkInfo(Struct, frozen=True, kw_only=True):
    """One interface, as a dump has it."""

    index: int
    name: str
    kind: str  # "bridge", "tun", "veth", "" for a physical one
    alias: str
    master: int  # index of the bridge it is on, or 0
    mtu: int
    up: bool


class RouteInfo(Struct, frozen=True, kw_only=True):
    network: ipaddress.IPv4Network
    via: ipaddress.IPv4Address | None
    oif: int
    proto: int


def _attrs(data: bytes) -> dict[int, bytes]:
    """Attributes of one level, by number without its flags; the last of a number counts."""
    found, at = {}, 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[at + 4:at + size]
        at += size + -size % 4
    return found


def _dump(what: str, kind: int, body: bytes) -> Iterator[bytes]:
    """Bodies of the answers to a dump. Raises NetlinkError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as nl:
        nl.settimeout(5)
        nl.bind((0, 0))
        nl.send(struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
        while True:
            data, at = nl.recv(1 << 18), 0
            while at + 16 <= len(data):
                size, got = struct.unpack_from("=IH", data, at)
                if got == NLMSG_DONE:
                    return
                if got == NLMSG_ERROR:
                    error = struct.unpack_from("=i", data, at + 16)[0]
                    raise NetlinkError(-error, f"{what}: {os.strerror(-error)}")
                yield data[at + 16:at + size]
                at += size + -size % 4


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def links() -> list[LinkInfo]:
    """The interfaces of this namespace."""
    found = []
    for body in _dump("list interfaces", RTM_GETLINK, bytes(16)):
        index, flags = struct.unpack_from("=iI", body, 4)
        a = _attrs(body[16:])
        info = _attrs(a.get(IFLA_LINKINFO, b""))
        found.append(LinkInfo(
            index=index, name=_text(a.get(IFLA_IFNAME, b"")), kind=_text(info.get(IFLA_INFO_KIND, b"")),
            alias=_text(a.get(IFLA_IFALIAS, b"")), master=int.from_bytes(a.get(IFLA_MASTER, b""), sys.byteorder),
            mtu=int.from_bytes(a.get(IFLA_MTU, b""), sys.byteorder), up=bool(flags & IFF_UP)))
    return found


def addresses() -> list[tuple[int, ipaddress.IPv4Interface]]:
    """(interface index, address) of this namespace."""
    found = []
    for body in _dump("list addresses", RTM_GETADDR, struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0)):
        family, prefix, _, _, index = struct.unpack_from("=BBBBi", body)
        a = _attrs(body[8:])
        raw = a.get(IFA_LOCAL, a.get(IFA_ADDRESS, b""))
        if family == socket.AF_INET and len(raw) == 4:
            found.append((index, ipaddress.IPv4Interface((raw, prefix))))
    return found


def routes() -> list[RouteInfo]:
    """IPv4 routes of the main table to networks, the default one included."""
    found = []
    for body in _dump("list routes", RTM_GETROUTE, struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
        family, prefix, _, _, table, proto, _, kind = struct.unpack_from("=BBBBBBBB", body)
        if (family, table, kind) != (socket.AF_INET, RT_TABLE_MAIN, RTN_UNICAST):
            continue
        a = _attrs(body[12:])
        via = a.get(RTA_GATEWAY)
        found.append(RouteInfo(network=ipaddress.IPv4Network((a.get(RTA_DST, bytes(4)), prefix)),
                               via=ipaddress.IPv4Address(via) if via else None,
                               oif=int.from_bytes(a.get(RTA_OIF, b""), sys.byteorder), proto=proto))
    return found


def bridge_add(name: str, mac: str, alias: str) -> None:
    """A bridge that forwards at once and passes all multicast, with a fixed MAC address: by itself it would take, and
    change, that of a port. Raises NetlinkError (EEXIST)."""
    data = _attr(IFLA_BR_FORWARD_DELAY, struct.pack("=I", 0)) + _attr(IFLA_BR_MCAST_SNOOPING, b"\0")
    info = _attr(IFLA_INFO_KIND, b"bridge") + _attr(IFLA_INFO_DATA, data)
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + _attr(IFLA_IFNAME, name.encode() + b"\0")
    body += _attr(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))) + _attr(IFLA_LINKINFO, info)
    _request(f"make bridge {name}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)
    link_alias(name, alias)


def link_alias(name: str, alias: str) -> None:
    _link("set alias of", name, 0, _attr(IFLA_IFALIAS, alias.encode()))


def link_master(name: str, bridge: int, *, isolated: bool = False) -> None:
    """Put an interface on a bridge, or (0) off it. isolated: it does not reach other isolated ports."""
    _link("put on a bridge:" if bridge else "take off its bridge:", name, 0, _attr(IFLA_MASTER, struct.pack("=I", bridge)))
    if isolated:
        data = _attr(IFLA_BRPORT_ISOLATED, b"\1")
        info = _attr(IFLA_INFO_SLAVE_KIND, b"bridge") + _attr(IFLA_INFO_SLAVE_DATA, data)
        _link("isolate", name, 0, _attr(IFLA_LINKINFO, info))


def link_queue(name: str) -> None:
    """Have the kernel keep TAP_QUEUE frames behind a tap of ours."""
    _link("set queue length of", name, 0, _attr(IFLA_TXQLEN, struct.pack("=I", TAP_QUEUE)))


def link_delete(name: str) -> None:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index(name), 0, 0)
    _request(f"remove {name}", RTM_DELLINK, 0, body)


def _route(what: str, kind: int, flags: int, network: ipaddress.IPv4Network, via: ipaddress.IPv4Address, oif: int) -> None:
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, network.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_OURS,
                       RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    body += _attr(RTA_DST, network.network_address.packed) + _attr(RTA_OIF, struct.pack("=i", oif))
    body += _attr(RTA_GATEWAY, via.packed)
    _request(f"{what} route {network} via {via}", kind, flags, body)


def route_add(network: ipaddress.IPv4Network, via: ipaddress.IPv4Address, oif: int) -> None:
    """Raises NetlinkError: EEXIST if there is such a route."""
    _route("add", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, network, via, oif)


def route_delete(network: ipaddress.IPv4Network, via: ipaddress.IPv4Address, oif: int) -> None:
    """Raises NetlinkError: ESRCH if there is none."""
    _route("remove", RTM_DELROUTE, 0, network, via, oif)


def every_address_is_local(oif: int) -> None:
    """In a namespace of one's own, its loopback up: whatever is connected to is this machine, 127.0.0.1 like all else, and
    each segment is acknowledged at once (ip-route(8), quickack). Raises NetlinkError."""
    own = struct.pack("=BBBBi", socket.AF_INET, 8, 0, RT_SCOPE_HOST, oif) + _attr(IFA_LOCAL, bytes([127, 0, 0, 1]))
    _request("remove 127.0.0.1", RTM_DELADDR, 0, own)  # and its routes, which have no quickack
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, RT_TABLE_LOCAL, RTPROT_OURS, RT_SCOPE_HOST, RTN_LOCAL, 0)
    _request("make every address local", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL,
             body + _attr(RTA_OIF, struct.pack("=i", oif)) + _attr(RTA_METRICS, _attr(RTAX_QUICKACK, struct.pack("=I", 1))))


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
