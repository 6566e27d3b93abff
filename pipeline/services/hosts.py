"""Hosts table: names the session answers for by itself, changeable while it runs.

Owned are the domain (ringnet.internal) and the guest subnet's reverse names: what is not in the table there does
not exist (NXDOMAIN), and is never asked of anybody else (ArcBox fault 36 leaked it). A user's name outside the
domain (`--hosts db.example=10.1.1.1`) is owned alone; its neighbours are forwarded as ever. A name of one label is
known under the domain as well. More domains can be owned at run time. `*.DOMAIN` answers for every name below DOMAIN
that does not exist and has no nearer ancestor that does (RFC 4592 2.2, 3.3.1); it gives no reverse name.

A name has addresses, or is an alias: another name stands behind it (CNAME, RFC 1034 3.6.2). The answer has the whole
chain and what is at its end, since a stub resolver follows none (RFC 1034 4.3.2 3a). A chain stays in the table: names
of others are not asked for on its behalf, and an alias whose target was taken away leads to "no such name".

A name that exists answers any type: with the addresses of that family for A and AAAA (ArcBox fault 35 gave an A
record for AAAA), with no data for the rest. Time to live is short, since the table may change at any time.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from msgspec import Struct

from pipeline.host_names import CHAIN_MAX, PRESETS, check_chain
from pipeline.services import dns_message as dm
from pipeline.services.dns_message import IN, Rtype

Address = IPv4Address | IPv6Address
Entry = tuple[Address, ...] | bytes  # addresses of a name; an alias: wire form of the name behind it

TTL = 60  # seconds, of records from the table
NEGATIVE_TTL = 10  # seconds, of "no such name": one just added should be seen soon
NAMES_MAX = 65536
DOMAINS_MAX = 4096
STAR = b"\1*"  # first label of a wildcard
ADDRESSES_MAX = 32  # of one name: the answer stays far below 64 KiB
ASKED = b"\xc0\x0c"  # pointer to the question: the asker's own spelling comes back


class Answer(Struct, frozen=True):
    """What to say about a name we own."""

    rcode: int
    records: list[bytes]
    authority: list[bytes]


class HostsTable:
    """Name to addresses and back. Names compare without case (RFC 4343)."""

    def __init__(self, *, domain: str, gateway: IPv4Address, network: IPv4Network) -> None:
        if not domain.strip("."):
            raise ValueError("the owned domain must not be empty: the table would own every name")
        self.domain = domain
        self._apex = dm.encode_name(domain).lower()
        self._zones = {self._apex}  # owned domains
        self._gateway = gateway
        self._network = network
        self._names: dict[bytes, Entry] = {}
        self._owner: dict[Address, list[bytes]] = {}  # names of an address, first set first
        self._inner: dict[bytes, int] = {}  # how many names lie below this one (RFC 8020: it exists, without data)
        for name in PRESETS:
            self._put(dm.encode_name(f"{name}.{domain}").lower(), (gateway,))
        self._preset = frozenset(self._names)

    # --- changing it ---

    def set(self, name: str, values: Iterable[Address | str]) -> None:
        """Give a name these addresses, or the one name it is an alias of, instead of what it had. Raises DnsFormatError
        for an impossible name, ValueError for one of ours, for no address or too many, for addresses and a name or two
        names, for aliases that lead in a circle or too far, and if the table is full."""
        values = tuple(values)
        if not values:
            raise ValueError(f"{name}: 0 addresses; a name has 1 to {ADDRESSES_MAX}")
        self.change({name: values})

    def remove(self, name: str) -> bool:
        """Forget a name; false if it was not there. Raises as set()."""
        there = any(wire in self._names for wire in self._wires(name))
        self.change({name: ()})
        return there

    def change(self, names: Mapping[str, Iterable[Address | str]], *, own: Iterable[str] = (),
               disown: Iterable[str] = ()) -> None:
        """Give names what set() does, none: forget it; own more domains, or some no more. All of it, or, raising as
        set(), nothing."""
        todo: dict[bytes, Entry] = {}
        for name, values in names.items():
            todo.update(dict.fromkeys(self._wires(name), self._entry(name, values)))
        zones = (self._zones - {self._domain(d) for d in disown}) | {self._domain(d) for d in own}
        if len(zones) > DOMAINS_MAX:
            raise ValueError(f"too many owned domains ({DOMAINS_MAX} at most)")
        more = sum((bool(entry) - (wire in self._names)) for wire, entry in todo.items())
        if more > 0 and len(self._names) + more > NAMES_MAX:
            raise ValueError(f"the hosts table is full ({NAMES_MAX} names)")
        if any(isinstance(entry, bytes) for entry in todo.values()):
            after = self._names | todo

            def behind(name: bytes) -> bytes | None:
                return entry if isinstance(entry := after.get(name), bytes) else None

            for wire in after:  # circles by way of a wildcard show in lookup() only
                check_chain(wire, behind, _text)
        self._zones = zones
        for wire, entry in todo.items():
            self._drop(wire)
            if entry:
                self._put(wire, entry)

    def _entry(self, name: str, values: Iterable[Address | str]) -> Entry:
        values = tuple(dict.fromkeys(values))
        addresses = tuple(v for v in values if not isinstance(v, str))
        if len(addresses) > ADDRESSES_MAX:
            raise ValueError(f"{name}: {len(addresses)} addresses; a name has 1 to {ADDRESSES_MAX}")
        if len(addresses) == len(values):
            return addresses
        if len(values) > 1:  # RFC 1034 3.6.2: "no other data should be present"
            raise ValueError(f"{name}: a name has addresses, or one other name behind it")
        (target,) = (v for v in values if isinstance(v, str))
        wire = dm.encode_name(target).lower()
        if wire == b"\0" or wire.startswith(STAR):
            raise ValueError(f"{name}: {target!r} is not a name to stand behind another")
        if len(dm.labels_of(wire)) == 1:  # known under the domain, too, and the presets only there
            wire = dm.encode_name(f"{target.removesuffix('.')}.{self.domain}").lower()
        return wire

    def replace(self, hosts: Mapping[str, Iterable[Address | str]]) -> None:
        """The whole table but the presets. Raises as set(); then the old table stays."""
        new = HostsTable(domain=self.domain, gateway=self._gateway, network=self._network)
        for name, values in hosts.items():
            new.set(name, values)
        self._names, self._owner, self._inner = new._names, new._owner, new._inner

    def names(self) -> dict[str, tuple[Address | str, ...]]:
        """All of it, names as text."""
        return {_text(n): (_text(e),) if isinstance(e, bytes) else e for n, e in self._names.items()}

    def _wires(self, name: str) -> list[bytes]:
        wire = dm.encode_name(name).lower()
        if wire == b"\0":
            raise dm.DnsFormatError("the root has no address")
        if wire == STAR + b"\0":
            raise ValueError(f"{name}: a wildcard needs a domain, like *.example")
        wires = [wire]
        if len(dm.labels_of(wire)) == 1:
            wires.append(dm.encode_name(f"{name.removesuffix('.')}.{self.domain}").lower())
        for w in wires:
            if w in self._preset or w == self._apex:
                raise ValueError(f"{name} is a name of ringnet's own")
        return wires

    def _domain(self, text: str) -> bytes:
        """A domain that can be owned, or not any more."""
        wire = dm.encode_name(text).lower()
        if wire == b"\0" or wire.startswith(STAR):
            raise ValueError(f"{text!r}: not a domain to be owned")
        if wire == self._apex:
            raise ValueError(f"{text} is ringnet's own already, for good")
        return wire

    def _put(self, wire: bytes, entry: Entry) -> None:
        self._names[wire] = entry
        for address in _reversible(wire, entry):
            self._owner.setdefault(address, []).append(wire)
        for parent in list(dm.parents_of(wire))[1:]:
            self._inner[parent] = self._inner.get(parent, 0) + 1

    def _drop(self, wire: bytes) -> bool:
        entry = self._names.pop(wire, None)
        if entry is None:
            return False
        for address in _reversible(wire, entry):
            self._owner[address].remove(wire)
            if not self._owner[address]:
                del self._owner[address]
        for parent in list(dm.parents_of(wire))[1:]:
            self._inner[parent] -= 1
            if not self._inner[parent]:
                del self._inner[parent]
        return True

    # --- asking it ---

    def lookup(self, question: dm.Question) -> Answer | None:
        """Answer if the name is ours, else None: ask upstream."""
        name = question.folded
        entry = self._find(name)
        if isinstance(entry, bytes):
            return self._chain(question, name, entry)
        if entry is not None:
            return self._found(question, _records(entry))
        if (zone := self._zone(name)) is not None:
            return self._nothing(zone, exists=name in self._inner or name == zone)
        return self._reverse(question, name)

    def _find(self, name: bytes) -> Entry | None:
        """What a name has, by itself or by a wildcard."""
        entry = self._names.get(name)
        return self._wildcard(name) if entry is None and name not in self._inner else entry

    def _chain(self, question: dm.Question, name: bytes, target: bytes) -> Answer:
        """An alias: each step as a CNAME record, then what the last name has of what was asked for (RFC 1034 4.3.2)."""
        if question.rclass not in (IN, dm.ANY_CLASS):
            return self._nothing(name, exists=True)
        steps: list[bytes] = []
        owner, entry = ASKED, target
        while isinstance(entry, bytes):
            steps.append(dm.resource(owner, Rtype.CNAME, TTL, entry))
            if question.rtype in (Rtype.CNAME, Rtype.ANY):  # 3a: "QTYPE doesn't match CNAME" is what makes it go on
                return Answer(dm.Rcode.NOERROR, steps, [])
            if len(steps) > CHAIN_MAX:  # by way of a wildcard: change() saw no circle
                return Answer(dm.Rcode.SERVFAIL, [], [])
            owner, entry = entry, self._find(entry)
        found = self._found(question, _records(entry or ()), owner)
        if entry is None and owner not in self._inner:
            # The target was taken away. RFC 6604 3: the rcode is that of the chain's last name.
            found = self._nothing(owner, exists=owner in self._zones)
        return Answer(found.rcode, steps + found.records, found.authority)

    def _zone(self, name: bytes) -> bytes | None:
        """The nearest owned domain that the name lies in."""
        for parent in dm.parents_of(name):  # labels, not bytes: "xringnet" is not "ringnet"
            if parent in self._zones:
                return parent
        return None

    def _wildcard(self, name: bytes) -> Entry | None:
        """What a name has that is not there: that of `*` below its nearest ancestor that is (RFC 4592 3.3.1)."""
        for parent in list(dm.parents_of(name))[1:]:
            if (entry := self._names.get(STAR + parent)) is not None:
                return entry
            if parent in self._names or parent in self._inner or parent in self._zones:
                return None
        return None

    def _reverse(self, question: dm.Question, name: bytes) -> Answer | None:
        labels = dm.labels_of(name)
        if labels[-2:] == [b"in-addr", b"arpa"]:
            octets = labels[:-2][::-1]
            address = _address4(octets)
            if address is not None and (names := self._owner.get(address)):
                return self._found(question, [(Rtype.PTR, names[0])])
            if not self._inside(octets[:4]):
                return None
            # Names between the subnet and its addresses exist, without data; below an address there is nothing.
            zone = b"".join(bytes([len(x)]) + x for x in labels[-2 - min(3, len(octets)):]) + b"\0"
            return self._nothing(zone, exists=len(octets) < 4)
        if labels[-2:] == [b"ip6", b"arpa"] and len(labels) == 34:
            nibbles = b"".join(labels[:-2][::-1])
            if len(nibbles) != 32 or not all(c in b"0123456789abcdef" for c in nibbles):
                return None
            if names := self._owner.get(IPv6Address(int(nibbles, 16))):
                return self._found(question, [(Rtype.PTR, names[0])])
        return None

    def _inside(self, octets: list[bytes]) -> bool:
        """Does every address that begins with these octets lie in the guest subnet?"""
        if not octets or not all(_is_octet(o) for o in octets):
            return False
        values = bytes(int(o) for o in octets) + bytes(4 - len(octets))
        return IPv4Network((values, 8 * len(octets))).subnet_of(self._network)

    def _found(self, question: dm.Question, records: list[tuple[int, bytes]], name: bytes = ASKED) -> Answer:
        in_class = question.rclass in (IN, dm.ANY_CLASS)
        wires = [dm.resource(name, rtype, TTL, rdata) for rtype, rdata in records
                 if in_class and question.rtype in (rtype, Rtype.ANY)]
        if wires:
            return Answer(dm.Rcode.NOERROR, wires, [])
        return self._nothing(question.folded if name == ASKED else name, exists=True)

    def _nothing(self, zone: bytes, *, exists: bool) -> Answer:
        """No data, or no such name, with the SOA that says for how long (RFC 2308 3). The zone is the owned
        domain where the name lies in it; a name outside it is a zone of its own."""
        zone = self._zone(zone) or zone
        soa = dm.soa_rdata(dm.encode_name(f"{PRESETS[0]}.{self.domain}"), dm.encode_name(f"hostmaster.{self.domain}"),
                           minimum=NEGATIVE_TTL)
        return Answer(dm.Rcode.NOERROR if exists else dm.Rcode.NXDOMAIN, [],
                      [dm.resource(zone, Rtype.SOA, NEGATIVE_TTL, soa)])


def _text(name: bytes) -> str:
    return b".".join(dm.labels_of(name)).decode("latin-1")


def _records(addresses: tuple[Address, ...]) -> list[tuple[int, bytes]]:
    return [(Rtype.A if isinstance(a, IPv4Address) else Rtype.AAAA, a.packed) for a in addresses]


def _reversible(wire: bytes, entry: Entry) -> tuple[Address, ...]:
    """Addresses that give a reverse name: not a wildcard's, nor those behind an alias."""
    return () if isinstance(entry, bytes) or wire.startswith(STAR) else entry


def _is_octet(label: bytes) -> bool:
    return label.isdigit() and len(label) <= 3 and int(label) <= 255


def _address4(octets: list[bytes]) -> IPv4Address | None:
    if len(octets) != 4 or not all(_is_octet(o) for o in octets):
        return None
    return IPv4Address(bytes(int(o) for o in octets))
