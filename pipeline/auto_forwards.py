"""-t auto and -u auto: forwards that follow what the guest listens on, for a guest whose kernel is ours (a namespace).

The namespace's own tables of sockets (/proc/net/tcp and so on; proc(5)) are opened once, by the child that makes the tap
there, and read again each second by the supervisor; frames know nothing of it. A port that the guest begins to listen on
becomes a forward if the host has it free, and is tried again each second if it has not; one that the guest closes goes,
its connections live on. Forwards so made belong to the owner `auto`. A rule that somebody else made is left alone.

Not followed: sockets on addresses that a forward cannot lead to (loopback, IPv6 only); UDP ports of the range for outgoing
connections, where a client's socket looks like a server's; the DHCP client's. The guest decides what is here, so what it can
cause is bounded: PORTS_MAX ports a protocol, one look a second.
"""
from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from pipeline import api
from pipeline.forwards import Auto, Forward, ForwardError, Proto, ephemeral
from shm._dataplane import lib

OWNER = "auto"
TABLES = ("tcp", "tcp6", "udp", "udp6")  # below /proc/net
INTERVAL_MS = 1000
PORTS_MAX = 1024  # a protocol
TABLE_MAX = 4 << 20  # bytes read of one table, about 28000 sockets
DHCP_CLIENT = 68
_STATE = {"tcp": b"0A", "udp": b"07"}  # TCP_LISTEN; TCP_CLOSE: a UDP socket that is connected to nobody

Listening = set[tuple[str, int]]  # IPv4 address, or "" for every one; port


def open_tables() -> dict[str, int]:
    """Descriptors of this namespace's tables, by name: those there are. They stay this namespace's wherever they go."""
    found = {}
    for name in TABLES:
        try:
            found[name] = os.open(f"/proc/self/net/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no IPv6, or /proc is masked
            continue
    return found


def _address(text: bytes) -> str | None:
    """The IPv4 address that a socket of a table is for; "" for every one, None for no IPv4 one. Words are in host order."""
    if not text.strip(b"0"):
        return ""  # of tcp6: unless it is IPV6_V6ONLY, which the table does not tell
    raw = bytes.fromhex(text.decode())
    words = b"".join(raw[n:n + 4][::-1] for n in range(0, len(raw), 4))
    address = ipaddress.ip_address(words)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return None
        address = address.ipv4_mapped
    return str(address)


def listening(table: bytes, proto: Proto) -> Listening:
    """Who listens, by a table's text."""
    found: Listening = set()
    for line in table.splitlines()[1:]:
        words = line.split(None, 4)
        if len(words) < 4 or words[3] != _STATE[proto]:
            if proto == "tcp":
                break  # listeners come first
            continue
        host, _, port = words[1].rpartition(b":")
        if (address := _address(host)) is not None:
            found.add((address, int(port, 16)))
    return found


def read_table(fd: int, proto: Proto) -> bytes:
    """A table as it is now; of TCP about the part with the listeners. Raises OSError."""
    os.lseek(fd, 0, os.SEEK_SET)
    parts: list[bytes] = []
    size = 0
    while size < TABLE_MAX and (part := os.read(fd, 65536)):
        parts.append(part)
        size += len(part)
        last = part.rstrip(b"\n").rpartition(b"\n")[2].split(None, 4)
        if proto == "tcp" and len(last) >= 4 and last[3] != _STATE["tcp"] and last[0] != b"sl":
            break
    return b"".join(parts)


def wanted(autos: Iterable[Auto], there: Mapping[Proto, Listening], network: ipaddress.IPv4Network,
           outgoing: range) -> list[Forward]:
    """Forwards for what the guest listens on, by protocol and port; at most PORTS_MAX a protocol and rule."""
    found: list[Forward] = []
    for auto in autos:
        targets: dict[int, str] = {}
        for address, port in sorted(there.get(auto.proto, ()), reverse=True):  # "" last: it wins
            if port in auto.without or (auto.proto == "udp" and (port in outgoing or port == DHCP_CLIENT)):
                continue
            if not address or ipaddress.IPv4Address(address) in network:
                targets[port] = address
        found += [Forward(proto=auto.proto, host_addr=auto.host_addr, ifname=auto.ifname, host_port=port,
                          guest_addr=targets[port], guest_port=port, owner=OWNER, optional=True)
                  for port in sorted(targets)[:PORTS_MAX]]
    return found


class Followed(Protocol):
    """What is needed of a session."""

    @property
    def ending(self) -> bool: ...

    def watch(self, fd: int, callback: Callable[[], None]) -> None: ...

    def unwatch(self, fd: int) -> None: ...

    def forwards(self) -> list[Forward]: ...

    def change_forwards(self, add: Iterable[Forward] = (), remove: Iterable[Forward] = ()) -> list[Forward]: ...

    def tell(self, event: api.Event) -> None: ...


class Follower:
    """Keeps a session's forwards in step with its guest, until close()."""

    def __init__(self, session: Followed, autos: Iterable[Auto], tables: Mapping[str, int],
                 network: ipaddress.IPv4Network, warn: Callable[[str], None]) -> None:
        """tables: the guest's, as open_tables() gave them there; duplicated. Raises OSError."""
        self._session, self._autos, self._network, self._warn = session, tuple(autos), network, warn
        self._protos = {a.proto for a in self._autos}
        self._said = ""
        self._tables: dict[str, int] = {}
        self._host: dict[str, int] = {}
        self._timer = lib.rn_os_ticker(INTERVAL_MS)
        if self._timer < 0:
            raise OSError(-self._timer, f"timer: {os.strerror(-self._timer)}")
        self._tables = {name: os.dup(fd) for name, fd in tables.items()}
        self._host = open_tables()
        session.watch(self._timer, self._tick)
        self.look()

    def close(self) -> None:
        """Let go; the forwards stay."""
        if self._timer >= 0:
            self._session.unwatch(self._timer)
            for fd in (self._timer, *self._tables.values(), *self._host.values()):
                os.close(fd)
            self._timer = -1

    def _tick(self) -> None:
        os.read(self._timer, 8)
        if self._session.ending:
            return  # what the guest closes now goes with the session
        try:
            self.look()
        except OSError as e:  # of a table: the kernel could not write it
            self._complain(f"cannot see the guest's ports: {e.strerror}")

    def _complain(self, text: str) -> None:
        """Once, until it is something else."""
        if self._said != text:
            self._said = text
            self._warn(text)

    def _read(self, tables: Mapping[str, int], proto: Proto, names: Iterable[str]) -> Listening:
        return set().union(*(listening(read_table(tables[n], proto), proto) for n in names if n in tables))

    def look(self) -> None:
        """Make it so now."""
        there = {proto: self._read(self._tables, proto, (proto, f"{proto}6")) for proto in sorted(self._protos)}
        want = {f.endpoint: f for f in wanted(self._autos, there, self._network, ephemeral())}
        have = {f.endpoint: f for f in self._session.forwards()}
        gone = [f for key, f in have.items() if f.owner == OWNER and want.get(key) != f]
        held = {key for key, f in have.items() if f not in gone}
        # A forward of one IPv4 address could be bound; who has the port by IPv6 alone has it all the same.
        host6 = {proto: {port for _, port in self._read(self._host, proto, [f"{proto}6"])} for proto in self._protos}
        ours = {(f.proto, f.host_port) for f in have.values()}
        new = [f for key, f in want.items() if key not in held
               and (f.host_port not in host6[f.proto] or (f.proto, f.host_port) in ours)]
        if not gone and not new:
            return
        try:
            made = self._session.change_forwards(new, gone)
        except ForwardError as e:
            self._complain(f"cannot follow the guest's ports: {e}")
            return
        for f in gone:
            self._session.tell(api.ForwardRemoved(forward=api.forward_info(f)))
        for f in made:
            self._session.tell(api.ForwardAdded(forward=api.forward_info(f)))
