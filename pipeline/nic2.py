"""The second NIC: what --nic2 and --route say, and what a backend tells of itself (docs/nic2.md).

    shared                        a network of the host with NAT: guests reach out, the host reaches them
    host                          a network of the host and its guests, and nobody else
    bridged,if=br0                joined to a bridge of the host, or to an interface (which gets a bridge)
    socket,path=/run/vmnet.sock   a helper that has the network: socket_vmnet, vmnet-helper
    fd=3                          a descriptor we were started with: a tap, a helper's socket, or nic2-helper's line

and after a comma, any of:

    name=lab                      the network (shared, host): guests of one name meet there
    subnet=192.168.70.1/24        the host's address in it, and its size (shared, host)
    isolate                       guests of the network do not reach each other
    mac=02:..., mtu=1500          of the guest's interface
    ifname=eth1                   its name in the guest's namespace
    storm=N                       broadcast and multicast frames a second each way; 0: no limit
    facts=FILE                    where vmnet-helper said the interface's MAC address and MTU (socket)
"""
from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Annotated, Literal

from msgspec import Meta, Struct

Mode = Literal["shared", "host", "bridged", "socket", "fd"]
MODES = ("shared", "host", "bridged", "socket", "fd")
MAC_TEXT = r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"
NETWORK_NAME = r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?"  # with "rn-" in front an interface's name
MTU = 1500  # bytes of L3, where nobody says otherwise
MTU_MIN, MTU_MAX = 576, 65520  # of a tap; without virtio-net headers:
PLAIN_FRAME_MAX = 9216  # bytes of Ethernet frame, the most that socket_vmnet and vmnet-helper carry
ETHERNET = 18  # bytes around L3: header and a VLAN tag
STORM = 10_000  # frames a second: far above what ARP, DHCP and mDNS of a full network send
SUBNETS = tuple(f"192.168.{n}.1/24" for n in range(64, 128))  # tried in turn for a network that names none
ROUTES_MAX = 32


class Nic2SyntaxError(ValueError):
    """--nic2 or --route cannot be read; one line that names the bad part."""


class Nic2(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """--nic2, parsed. Empty or 0: not said."""

    mode: Mode
    name: str = ""
    subnet: str = ""  # the host's address, with the prefix length
    isolate: bool = False
    interface: str = ""  # bridged: of the host
    path: str = ""  # socket
    facts: str = ""  # socket
    fd: int = -1  # fd
    mac: str = ""
    mtu: int = 0
    ifname: str = ""
    storm: int = STORM

    @property
    def network(self) -> str:
        """Name of the network: guests of one name share it."""
        return self.name or self.mode

    @property
    def address(self) -> IPv4Interface | None:
        return IPv4Interface(self.subnet) if self.subnet else None


class Route(Struct, frozen=True, kw_only=True):
    """One --route."""

    network: IPv4Network
    via: IPv4Address | None = None  # None: the guest's address on NIC2, once it is known


class Facts(Struct, frozen=True, kw_only=True):
    """What the backend says the guest's device is."""

    mac: Annotated[str, Meta(pattern=f"^{MAC_TEXT}$")]
    mtu: Annotated[int, Meta(ge=68, le=65535)]
    host: str = ""  # the host side, for people: "bridge rn-lab", "socket /run/x"
    address: str = ""  # the guest's, with the prefix length, if the host side gives it
    gateway: str = ""  # the host's address there
    router: bool = False  # the gateway is a way out


def frame_max(facts: Facts) -> int:
    """Largest frame that is no super-frame, bytes."""
    return facts.mtu + ETHERNET


def parse(text: str) -> Nic2:
    """Raises Nic2SyntaxError."""
    mode, *words = text.split(",")
    if mode.startswith("fd="):
        mode, words = "fd", [mode, *words]
    if mode not in MODES:
        raise Nic2SyntaxError(f"{text}: {mode or 'nothing'} is no mode; there are {', '.join(MODES)}")
    said: dict[str, object] = {"mode": mode}
    for word in words:
        key, equals, value = word.partition("=")
        field = {"if": "interface"}.get(key, key)
        if field in said:
            raise Nic2SyntaxError(f"{text}: {key} twice")
        if word == "isolate":
            said["isolate"] = True
            continue
        if field not in Nic2.__struct_fields__ or field in ("mode", "isolate") or key == "interface" or not equals:
            raise Nic2SyntaxError(f"{text}: {word or 'nothing'} is none of name=, subnet=, isolate, if=, path=, facts=, mac=,"
                                  " mtu=, ifname=, storm=")
        said[field] = _value(key, value)
    return _check(text, Nic2(**said))  # type: ignore[arg-type]  # each field was checked above


def _value(key: str, value: str) -> object:
    match key:
        case "name" if not re.fullmatch(NETWORK_NAME, value):
            raise Nic2SyntaxError(f"name={value}: not a network's name (at most 10 of a-z, 0-9 and '-')")
        case "subnet":
            return str(_host_address(value))
        case "if" | "ifname" if not 0 < len(value.encode()) <= 15 or re.search(r"[/:\s%]", value) or value in (".", ".."):
            raise Nic2SyntaxError(f"{key}={value}: not the name of an interface")
        case "fd":
            return _number(key, value, 3, 1 << 20)
        case "path" if not value or len(value.encode()) > 107:  # unix(7)
            raise Nic2SyntaxError(f"path={value}: not the path of a socket")
        case "mac":
            return check_mac(value)
        case "mtu":
            return _number(key, value, MTU_MIN, MTU_MAX)
        case "storm":
            return _number(key, value, 0, 1_000_000_000)
    return value


def _number(key: str, value: str, least: int, most: int) -> int:
    if not value.isascii() or not value.isdecimal() or not least <= int(value) <= most:
        raise Nic2SyntaxError(f"{key}={value}: not within {least}..{most}")
    return int(value)


def check_mac(text: str) -> str:
    """In lower case. Raises Nic2SyntaxError, naming the text."""
    if not re.fullmatch(MAC_TEXT, text):
        raise Nic2SyntaxError(f"mac={text}: not a MAC address (expected like 02:00:5e:00:53:01)")
    if int(text[:2], 16) & 1 or not int(text.replace(":", ""), 16):
        raise Nic2SyntaxError(f"mac={text}: a multicast or zero address cannot be an interface's")
    return text.lower()


def _host_address(text: str) -> IPv4Interface:
    try:
        address = IPv4Interface(text)
    except ValueError:
        raise Nic2SyntaxError(f"subnet={text}: not an address with a prefix length (expected like 192.168.70.1/24)"
                              ) from None
    net = address.network
    if not 16 <= net.prefixlen <= 30:
        raise Nic2SyntaxError(f"subnet={text}: prefix length {net.prefixlen} is out of range 16..30")
    if address.ip in (net.network_address, net.broadcast_address):
        raise Nic2SyntaxError(f"subnet={text}: is the network itself; give the host's address in it, like"
                              f" {net.network_address + 1}/{net.prefixlen}")
    if address.ip.is_loopback or address.ip.is_multicast or address.ip.is_unspecified or int(address.ip) >> 28 == 15:
        raise Nic2SyntaxError(f"subnet={text}: not an address for a host")
    return address


def _check(text: str, n: Nic2) -> Nic2:
    own = n.mode in ("shared", "host")
    for key, given, fits in (("name=", n.name, own), ("subnet=", n.subnet, own), ("if=", n.interface, n.mode == "bridged"),
                             ("path=", n.path, n.mode == "socket"), ("facts=", n.facts, n.mode == "socket"),
                             ("fd=", n.fd >= 0, n.mode == "fd"), ("isolate", n.isolate, own or n.mode == "bridged")):
        if given and not fits:
            raise Nic2SyntaxError(f"{text}: {key} says nothing about mode {n.mode}")
    if n.mode == "bridged" and not n.interface:
        raise Nic2SyntaxError(f"{text}: say which bridge or interface of the host: bridged,if=NAME")
    if n.mode == "socket" and not n.path:
        raise Nic2SyntaxError(f"{text}: say where the helper listens: socket,path=PATH")
    if n.mode == "fd" and n.fd < 0:
        raise Nic2SyntaxError(f"{text}: say which descriptor: fd=N")
    if n.mode == "socket" and n.mtu + ETHERNET > PLAIN_FRAME_MAX:
        raise Nic2SyntaxError(f"{text}: mtu={n.mtu}: over {PLAIN_FRAME_MAX - ETHERNET}, the most such a helper carries")
    return n


def parse_route(text: str) -> Route:
    """NET or NET@ADDRESS. Raises Nic2SyntaxError."""
    net, at, via = text.partition("@")
    try:
        network = IPv4Network(net)
    except ValueError as e:
        why = "has host bits set" if "host bits" in str(e) else "not a network (expected like 172.16.0.0/12)"
        raise Nic2SyntaxError(f"{text}: {why}") from None
    if not network.prefixlen or network.is_loopback or network.is_multicast:
        raise Nic2SyntaxError(f"{text}: not a network to be routed to a guest")
    try:
        return Route(network=network, via=ipaddress.IPv4Address(via) if at else None)
    except ValueError:
        raise Nic2SyntaxError(f"{text}: {via or 'nothing'} is not an IPv4 address") from None


def _digest(text: str) -> bytes:
    import hashlib  # here: it maps OpenSSL, 3 MiB, and most sessions have one NIC

    return hashlib.sha256(text.encode()).digest()


def generated_mac(*parts: str) -> str:
    """A locally administered address (IEEE 802 8.2) that is the same whenever the parts are."""
    digest = _digest("\0".join(("ringnet nic2", *parts)))
    return bytes([digest[0] & 0xFC | 0x02, *digest[1:6]]).hex(":")


def guest_address(host: IPv4Interface, mac: str, taken: set[IPv4Address]) -> IPv4Address | None:
    """The guest's address in a network: the same for a MAC address as long as nobody else has it. None: all taken."""
    net = host.network
    size = net.num_addresses - 2
    start = int.from_bytes(_digest(mac)[:4]) % size
    for n in range(size):
        found = net.network_address + 1 + (start + n) % size
        if found != host.ip and found not in taken:
            return found
    return None
