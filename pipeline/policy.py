"""Policy: which destinations the guest may call, and who may call the guest (--policy, --no-metadata; docs/policy.md).

    deny out 10.0.0.0/8                     nothing of the guest goes there
    deny out tcp,udp any port 25,465        no mail from the guest, wherever to
    allow in tcp 192.0.2.0/24 port 22       what follows does not hold for these clients of port 22 of the guest
    deny in tcp any port 22

The first rule that fits decides; what no rule fits is allowed. NET is the other side: the destination of what the guest
begins (out), the client of a forward (in). PORTS are those that are called: of the destination, or of the guest.
"""
from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from pipeline.units import PolicyEntry, Port

RULES_MAX = 1024  # networks times port ranges, of all rules: POLICY_RULES_MAX (csrc/policy.h)
PROTOS = ("tcp", "udp", "icmp")
WAYS = ("out", "in")
# Where clouds answer a machine with what is its own, credentials too: the link-local ranges (RFC 3927, RFC 4291 2.5.6), and
# those outside of them: AWS and GCP over IPv6, Alibaba.
METADATA = ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")  # IPv4 as the data plane has it (RFC 4291 2.5.5.2)
_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


class PolicyError(ValueError):
    """A rule that cannot be read; one line that names the bad part."""


class PolicyRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule, read."""

    text: str  # as it was written, or the option that stands for it
    action: Literal["allow", "deny"]
    ways: tuple[Literal["out", "in"], ...]
    protos: tuple[Literal["tcp", "udp", "icmp"], ...]
    networks: tuple[str, ...] = ()  # CIDR; none: every address
    ports: tuple[tuple[Port, Port], ...] = ()  # first and last; none: every port

    def size(self) -> int:
        """Entries it has in the data plane."""
        return max(1, len(self.wire())) * max(1, len(self.ports))

    def wire(self) -> list[ipaddress.IPv6Network]:
        """Its networks as the data plane compares them; none: every address. IPv6 ones leave mapped IPv4 out."""
        found: list[ipaddress.IPv6Network] = []
        for text in self.networks:
            net = ipaddress.ip_network(text)
            if isinstance(net, ipaddress.IPv4Network):
                mapped = int(_MAPPED.network_address) + int(net.network_address)
                found.append(ipaddress.IPv6Network((mapped, 96 + net.prefixlen)))
            elif net.supernet_of(_MAPPED):
                found += net.address_exclude(_MAPPED)
            else:
                found.append(net)
        return found


def entries(rules: Iterable[PolicyRule], first: int = 0) -> tuple[PolicyEntry, ...]:
    """Rules for egress, which calls them first, first + 1 ..."""
    return tuple(PolicyEntry(name, rule.action == "deny", sum(1 << WAYS.index(w) for w in rule.ways),
                             sum(1 << PROTOS.index(p) for p in rule.protos), net.network_address.packed, net.prefixlen,
                             low, high)
                 for name, rule in enumerate(rules, first)
                 for net in rule.wire() or [ipaddress.IPv6Network("::/0")]
                 for low, high in rule.ports or [(0, 65535)])


class PolicyBook:
    """A session's rules as they are, and the names that egress has for them."""

    def __init__(self, rules: tuple[PolicyRule, ...]) -> None:
        self.rules, self.first = rules, 0
        self._before: dict[int, str] = {}  # names of the rules before these: a refusal may still be on its way
        self._next = len(rules)

    def entries(self) -> tuple[PolicyEntry, ...]:
        return entries(self.rules, self.first)

    def plan(self, rules: tuple[PolicyRule, ...]) -> tuple[int, tuple[PolicyEntry, ...]]:
        """What egress is to be told, and what commit() then needs."""
        first, self._next = self._next, self._next + len(rules)
        return first, entries(rules, first)

    def commit(self, rules: tuple[PolicyRule, ...], first: int) -> None:
        self._before = {self.first + n: r.text for n, r in enumerate(self.rules)}
        self.rules, self.first = rules, first

    def text(self, name: int) -> str:
        """The rule that egress calls so; "" if there is none."""
        n = name - self.first
        return self.rules[n].text if 0 <= n < len(self.rules) else self._before.get(name, "")


def _ports(text: str, part: str) -> tuple[tuple[int, int], ...]:
    found = []
    for piece in part.split(","):
        low, dash, high = piece.partition("-")
        ends = [low, high] if dash else [low, low]
        if not all(e.isascii() and e.isdecimal() and len(e) <= 5 and 1 <= int(e) <= 65535 for e in ends):
            raise PolicyError(f"{text}: {piece or 'nothing'}: expected a port or a range, 1..65535")
        if int(ends[1]) < int(ends[0]):
            raise PolicyError(f"{text}: {piece}: the range ends before it begins")
        found.append((int(ends[0]), int(ends[1])))
    return tuple(found)


def _networks(text: str, part: str, ways: tuple[str, ...]) -> tuple[str, ...]:
    if part == "any":
        return ()
    found = []
    for piece in part.split(","):
        try:
            net = ipaddress.ip_network(piece, strict=False)
        except ValueError:
            raise PolicyError(f"{text}: {piece or 'nothing'}: expected a network like 10.0.0.0/8, an address or any") \
                from None
        if ways == ("out",) and isinstance(net, ipaddress.IPv4Network) and net.subnet_of(_LOOPBACK):
            raise PolicyError(f"{text}: {piece}: the guest has the host's loopback under the gateway's address: name"
                              " that, or use --no-host-loopback")
        found.append(str(net))
    return tuple(found)


def parse(text: str) -> PolicyRule:
    """`allow|deny [out|in] [tcp|udp|icmp[,...]] [NET[,NET...]|any] [port PORTS]`. Raises PolicyError."""
    words = text.split()
    if not words or words[0] not in ("allow", "deny"):
        raise PolicyError(f"{text or 'nothing'}: a rule begins with allow or deny, like: deny out tcp 10.0.0.0/8 port 22")
    action, rest = words[0], words[1:]
    ways: tuple[str, ...] = (rest.pop(0),) if rest and rest[0] in WAYS else WAYS
    protos: tuple[str, ...] = PROTOS
    if rest and set(rest[0].split(",")) <= set(PROTOS):
        given = rest.pop(0).split(",")
        protos = tuple(p for p in PROTOS if p in given)
    networks: tuple[str, ...] = ()
    if rest and rest[0] != "port":
        networks = _networks(text, rest.pop(0), ways)
    ports: tuple[tuple[int, int], ...] = ()
    if rest and rest[0] == "port":
        if len(rest) < 2:
            raise PolicyError(f"{text}: nothing after port")
        ports = _ports(text, rest[1])
        rest = rest[2:]
    if rest:
        raise PolicyError(f"{text}: {rest[0]}: expected the end; the order is allow|deny, out|in, protocol, network, port"
                          " PORTS")
    if ports:
        protos = tuple(p for p in protos if p != "icmp")
        if not protos:
            raise PolicyError(f"{text}: icmp has no ports")
    if ways == ("in",) and protos == ("icmp",):
        raise PolicyError(f"{text}: no forward carries icmp; it goes out only")
    return PolicyRule(text=text, action=action, ways=ways, protos=protos,  # type: ignore[arg-type]  # checked above
                      networks=networks, ports=ports)


def parse_all(texts: Iterable[str]) -> tuple[PolicyRule, ...]:
    """Rules in order. Raises PolicyError, also if they are too many."""
    rules = tuple(parse(t) for t in texts)
    if (total := sum(r.size() for r in rules)) > RULES_MAX - len(METADATA) - 1:
        raise PolicyError(f"{total} networks and port ranges in all; at most {RULES_MAX - len(METADATA) - 1}")
    return rules


def effective(texts: Iterable[str], *, no_metadata: bool, no_host_loopback: bool, gateway: str
              ) -> tuple[PolicyRule, ...]:
    """All that holds: the switches' rules first, since nothing shall open again what they close. Raises PolicyError."""
    first = []
    if no_host_loopback:
        first.append(PolicyRule(text="--no-host-loopback", action="deny", ways=("out",), protos=("tcp", "udp"),
                                networks=(f"{gateway}/32",)))
    if no_metadata:
        first.append(PolicyRule(text="--no-metadata", action="deny", ways=("out",), protos=PROTOS,  # type: ignore[arg-type]
                                networks=METADATA))
    return (*first, *parse_all(texts))
