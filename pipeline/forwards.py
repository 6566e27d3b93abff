"""Inbound forwards: what a rule is, and passt's grammar for it (-t, -u; passt(1)).

    none                      no forwards
    auto                      what the guest listens on, as long as it does; auto,~22 without some
    all                       every port outside the host's range for outgoing connections, as far as it is free
    22                        port 22 of the host to port 22 of the guest
    22:23                     to port 23 of the guest
    22,25,80-89               several, and ranges
    22-80:32-90               a range to a range of the same width
    2000-5000,~3000-3010      without some
    ~20000-20010              all but these
    192.0.2.1/22              only on that address of the host; before the list, for all of it; [2001:db8::1]/22 likewise
    192.0.2.1%eth0/22         and only by that interface
    %eth0/22                  any address, only by that interface
    0.0.0.0/22, [::]/22       every address of one family; without, of both

`auto` is no list of rules but a standing order (Auto; pipeline/auto_forwards.py), for a guest that can be looked into.
"""
from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

Proto = Literal["tcp", "udp"]
IFNAME_MAX = 15  # bytes (IFNAMSIZ - 1)
EPHEMERAL = (32768, 60999)  # Linux's default; ip(7), ip_local_port_range


class ForwardSyntaxError(ValueError):
    """A rule that cannot be read; the text is one line and names the bad part."""


class Forward(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One port of the host that leads to one port of the guest."""

    proto: Proto
    host_addr: str = ""  # to listen on; "" is every one, IPv4 and IPv6, "0.0.0.0" and "::" every one of one of them
    ifname: str = ""  # only what comes in by this interface; "" is every one
    host_port: Annotated[int, Meta(ge=0, le=65535)]  # 0: one that is free; the rule as made has its number
    guest_addr: str = ""  # "" is the guest, whatever address it has
    guest_port: Annotated[int, Meta(ge=1, le=65535)]
    owner: str = ""  # for those who change rules together
    optional: bool = False  # it is no error if it cannot be bound (`all`)
    auto: bool = False  # made by an Auto, and goes with what the guest listens on

    @property
    def endpoint(self) -> tuple[str, str, str, int]:
        """What no two rules of a session share."""
        return self.proto, self.host_addr, self.ifname, self.host_port

    def __str__(self) -> str:
        return f"{self.proto} {render([self])}"


class Auto(Struct, frozen=True, kw_only=True):
    """A spec with `auto`."""

    proto: Proto
    host_addr: str = ""
    ifname: str = ""
    without: frozenset[int] = frozenset()  # ports
    owner: str = ""  # of it, and of the forwards it makes

    @property
    def place(self) -> tuple[str, str, str]:
        """What no two of a session share."""
        return self.proto, self.host_addr, self.ifname

    def makes(self, f: Forward) -> bool:
        """Is it one of this one's?"""
        return (f.auto and self.place == (f.proto, f.host_addr, f.ifname) and self.owner == f.owner
                and f.host_port not in self.without)

    @property
    def spec(self) -> str:
        runs: list[range] = []
        for port in sorted(self.without):
            if runs and port == runs[-1].stop:
                runs[-1] = range(runs[-1].start, port + 1)
            else:
                runs.append(range(port, port + 1))
        return _place(self.host_addr, self.ifname) + ",".join(["auto", *(f"~{_span(r.start, r[-1])}" for r in runs)])

    def __str__(self) -> str:
        return f"{self.proto} {self.spec}"


class Fault(Struct, frozen=True, kw_only=True):
    """Why one rule of a change could not be."""

    forward: Forward | None  # None: the reason is not one rule's
    errno: int  # 0: none fits
    text: str


class ForwardError(Exception):
    """A change of the forwards did not happen, nothing of it. `faults` has every reason, the text all of them."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(f"{f.forward}: {f.text}" if f.forward else f.text for f in self.faults))


def check(f: Forward) -> Forward:
    """The same rule with its addresses as they are usually written. Raises ForwardSyntaxError: addresses and interface,
    which types do not tell."""
    guest = "" if f.guest_addr == "0.0.0.0" else _address(f.guest_addr, f.guest_addr)
    if ":" in guest:
        raise ForwardSyntaxError(f"{f.guest_addr}: the guest has no IPv6 address yet")
    return Forward(proto=f.proto, host_addr=_address(f.host_addr, f.host_addr), ifname=_interface(f.ifname, f.ifname),
                   host_port=f.host_port, guest_addr=guest, guest_port=f.guest_port, owner=f.owner, optional=f.optional,
                   auto=f.auto)


def _address(spec: str, text: str) -> str:
    if not text:
        return ""
    try:
        address = ipaddress.ip_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError:
        raise ForwardSyntaxError(f"{spec}: {text}: not an address (expected like 192.0.2.1 or [2001:db8::1])") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ForwardSyntaxError(f"{spec}: {text}: the interface belongs behind the address: [ADDR]%IFACE")
        if address.ipv4_mapped is not None:
            raise ForwardSyntaxError(f"{spec}: {text}: say {address.ipv4_mapped}")
    if address.is_multicast or (address.version == 4 and int(address) >> 28 == 15):
        raise ForwardSyntaxError(f"{spec}: {text}: not an address of a host")
    return str(address)


def _interface(spec: str, text: str) -> str:
    if len(text.encode()) > IFNAME_MAX or text in (".", "..") or re.search(r"[/:\s%]", text):
        raise ForwardSyntaxError(f"{spec}: {text}: not an interface name")
    return text


def _number(spec: str, part: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= 65535:
        what = f"{part}: {text}" if text and text != part else part or "nothing"
        raise ForwardSyntaxError(f"{spec}: {what}: expected a port, 1..65535")
    return int(text)


def _range(spec: str, part: str, text: str) -> range:
    low, dash, high = text.partition("-")
    first = _number(spec, part, low)
    last = _number(spec, part, high) if dash else first
    if last < first:
        raise ForwardSyntaxError(f"{spec}: {part}: the range ends before it begins")
    return range(first, last + 1)


def ephemeral() -> range:
    """Ports this host takes for connections of its own."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return range(int(first), int(last) + 1)
    except (OSError, ValueError):
        return range(EPHEMERAL[0], EPHEMERAL[1] + 1)


def _where(spec: str) -> tuple[str, str, str]:
    """Host address, interface, and what follows the slash."""
    where, slash, ports = spec.rpartition("/")
    address, percent, ifname = where.partition("%")
    if slash and not where:
        raise ForwardSyntaxError(f"{spec}: nothing before the /; expected ADDR, %IFACE or ADDR%IFACE")
    if percent and not ifname:
        raise ForwardSyntaxError(f"{spec}: {where}: no interface after the %")
    return _address(spec, address), _interface(spec, ifname), ports


def parse_auto(spec: str, proto: Proto, *, owner: str = "") -> Auto | None:
    """The spec, if it says `auto`. Raises ForwardSyntaxError."""
    parts = spec.rpartition("/")[2].split(",")
    if "auto" not in parts:
        return None
    address, ifname, _ = _where(spec)
    parts.remove("auto")
    without: set[int] = set()
    for part in parts:
        if not part.startswith("~"):
            raise ForwardSyntaxError(f"{spec}: {part or 'nothing'}: beside auto only what is left out, like ~22; name ports"
                                     " in a spec of their own")
        without.update(_range(spec, part, part[1:]))
    return Auto(proto=proto, host_addr=address, ifname=ifname, without=frozenset(without), owner=owner)


def autos(specs: dict[Proto, Iterable[str]], *, owner: str = "") -> list[Auto]:
    """Those of all specs that say `auto`. Raises ForwardSyntaxError: also if two are for the same address and interface."""
    found: dict[tuple[str, str, str], Auto] = {}
    for proto, texts in specs.items():
        for text in texts:
            if (auto := parse_auto(text, proto, owner=owner)) is None:
                continue
            if found.setdefault(auto.place, auto) != auto:
                raise ForwardSyntaxError(f"{text}: beside {found[auto.place].spec}: say all that is left out in one of them")
    return list(found.values())


def parse(spec: str, proto: Proto, *, owner: str = "", outgoing: range | None = None) -> list[Forward]:
    """Rules of one -t or -u, by port. outgoing: what `all` leaves out; None asks the host.

    Raises ForwardSyntaxError.
    """
    if spec == "none":
        return []
    address, ifname, ports = _where(spec)
    targets: dict[int, int] = {}
    left_out: set[int] = set()
    everything = ports == "all"
    for part in () if everything else ports.split(","):
        if part in ("none", "all", "auto"):
            why = "no list of ports (parse_auto)" if part == "auto" else "cannot be combined with others"
            raise ForwardSyntaxError(f"{spec}: {part}: {why}")
        if part.startswith("~"):
            if ":" in part:
                raise ForwardSyntaxError(f"{spec}: {part}: what is left out has no target")
            left_out.update(_range(spec, part, part[1:]))
            continue
        ours, colon, theirs = part.partition(":")
        host = _range(spec, part, ours)
        guest = _range(spec, part, theirs) if colon else host
        if len(host) != len(guest):
            raise ForwardSyntaxError(f"{spec}: {part}: {len(host)} ports to {len(guest)}")
        if twice := targets.keys() & set(host):
            raise ForwardSyntaxError(f"{spec}: {part}: port {min(twice)} twice")
        targets.update(zip(host, guest, strict=True))
    everything = everything or not targets
    if everything:
        skip = ephemeral() if outgoing is None else outgoing
        targets = {p: p for p in range(1, 65536) if p not in skip}
    return [Forward(proto=proto, host_addr=address, ifname=ifname, host_port=p, guest_port=targets[p], owner=owner,
                    optional=everything) for p in sorted(targets.keys() - left_out)]


def _place(address: str, ifname: str) -> str:
    """What stands in front of the ports."""
    where = (f"[{address}]" if ":" in address else address) + (f"%{ifname}" if ifname else "")
    return f"{where}/" if where else ""


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def render(rules: list[Forward]) -> str:
    """Rules of one host address and interface in the grammar; the guest's address and the owner have no place in it."""
    if not rules:
        return "none"
    runs: list[list[Forward]] = []
    for rule in sorted(rules, key=lambda r: r.host_port):
        before = runs[-1][-1] if runs else None
        if before and (rule.host_port, rule.guest_port) == (before.host_port + 1, before.guest_port + 1):
            runs[-1].append(rule)
        else:
            runs.append([rule])

    parts = []
    for run in runs:
        host, guest = (_span(run[0].host_port, run[-1].host_port), _span(run[0].guest_port, run[-1].guest_port))
        parts.append(host if host == guest else f"{host}:{guest}")
    return _place(rules[0].host_addr, rules[0].ifname) + ",".join(parts)


def parse_all(specs: dict[Proto, Iterable[str]], *, owner: str = "") -> list[Forward]:
    """Rules of all -t and -u but `auto`. A port that a spec names wins over the same one of `all`.

    Raises ForwardSyntaxError: also if two specs want the same port, or `none` is not alone.
    """
    found: dict[tuple[str, str, str, int], Forward] = {}
    for proto, texts in specs.items():
        given = list(texts)
        if "none" in given and len(given) > 1:
            raise ForwardSyntaxError("none: cannot be combined with others")
        for text in given:
            if parse_auto(text, proto):
                continue
            for f in parse(text, proto, owner=owner):
                there = found.get(f.endpoint)
                if there and not there.optional and not f.optional:
                    raise ForwardSyntaxError(f"{text}: {render([f])}: port {f.host_port} twice")
                if not there or there.optional:
                    found[f.endpoint] = f
    return list(found.values())
