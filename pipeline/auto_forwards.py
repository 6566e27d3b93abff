"""`auto`: forwards that follow what the guest listens on, for a guest whose kernel is ours (a namespace).

The namespace's own tables of sockets (/proc/net/tcp and so on; proc(5)) are opened once, by the child that makes the tap
there, and read again each second by the supervisor while there is a rule `auto`; frames know nothing of it. A port that the
guest begins to listen on becomes a forward if the host has it free; if not, it is skipped, with an event and a line that say why,
and tried again each second. One that the guest closes goes, its connections live on. Forwards so made are marked (Forward.auto)
and belong to the rule's owner. A forward by name is left alone, and takes the place of one so made.

Not followed: sockets on addresses that a forward cannot lead to (loopback, IPv6 only); UDP ports of the range for outgoing
connections, where a client's socket looks like a server's; the DHCP client's. The guest decides what is here, so what it can
cause is bounded: PORTS_MAX ports a protocol, one look a second.
"""
from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from pipeline import api
from pipeline.forwards import Auto, Fault, Forward, ForwardError, Proto, ephemeral
from shm._dataplane import lib

TABLES = ("tcp", "tcp6", "udp", "udp6")  # below /proc/net
INTERVAL_MS = 1000
PORTS_MAX = 1024  # a protocol
TABLE_MAX = 4 << 20  # bytes read of one table, about 28000 sockets
DHCP_CLIENT = 68
UNSEEN = ("what this guest listens on cannot be seen: that of a namespace (run, attach) can, where /proc shows it, that of a virtual"
          " machine cannot; name the ports, or say all")
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
                          guest_addr=targets[port], guest_port=port, owner=auto.owner, optional=True, auto=True)
                  for port in sorted(targets)[:PORTS_MAX]]
    return found


class Followed(Protocol):
    """What is needed of a session."""

    @property
    def ending(self) -> bool: ...

    def watch(self, fd: int, callback: Callable[[], None]) -> None: ...

    def unwatch(self, fd: int) -> None: ...

    def forwards(self) -> list[Forward]: ...

    def change_forwards(self, add: Iterable[Forward] = (), remove: Iterable[Forward] = (), close_flows: bool = False,
                        skipped: Callable[[Fault], None] = ...) -> list[Forward]: ...

    def tell(self, event: api.Event) -> None: ...


class Follower:
    """A session's rules `auto`, and its forwards in step with its guest while there is one."""

    def __init__(self, session: Followed, network: ipaddress.IPv4Network, warn: Callable[[str], None]) -> None:
        self._session, self._network, self._warn = session, network, warn
        self._rules: dict[tuple[str, str, str], Auto] = {}
        self._guest: dict[str, int] = {}  # tables
        self._host: dict[str, int] = {}  # likewise, while something is followed
        self._timer = -1
        self._said = ""
        self._skipped: dict[tuple[str, str, str, int], str] = {}  # endpoint: why, as it was told
        self._warned: set[tuple[str, str, str, int]] = set()

    def see(self, tables: Mapping[str, int]) -> None:
        """The guest's tables, as open_tables() gave them there; duplicated. Raises OSError."""
        for name, fd in tables.items():
            self._guest[name] = os.dup(fd)

    def close(self) -> None:
        """Let go; the forwards stay."""
        self._rest()
        for fd in self._guest.values():
            os.close(fd)
        self._guest = {}

    @property
    def rules(self) -> list[Auto]:
        """By protocol and place."""
        return [self._rules[place] for place in sorted(self._rules)]

    def unseen(self, auto: Auto) -> bool:
        """Is this guest's kernel not ours, or hidden?"""
        return not any(name in self._guest for name in (auto.proto, f"{auto.proto}6"))

    def change(self, add: Iterable[Forward] = (), remove: Iterable[Forward] = (), close_flows: bool = False, *,
               follow: Iterable[Auto] = (), unfollow: Iterable[Auto] = ()) -> list[Forward]:
        """Session.change_forwards together with a change of the rules, all or none, and its events. A rule that goes takes the
        forwards it made with it, but those that a new one of the same place and owner makes too. What the guest listens on now
        is followed when this returns. Raises ForwardError with every reason."""
        add, remove = list(add), list(remove)
        rules = self._plan(follow, unfollow)
        named, going = {f.endpoint for f in add}, {f.endpoint for f in remove}
        remove += [f for f in self._session.forwards() if f.auto and f.endpoint not in going
                   and (f.endpoint in named or not any(r.makes(f) for r in rules.values()))]
        try:
            if rules:
                self._begin()
            made = self._session.change_forwards(add, remove, close_flows)
            self._rules = rules
        finally:
            if not self._rules:
                self._rest()
        self._tell(remove, made)
        if rules:
            self._try_look()
        return made

    def _plan(self, follow: Iterable[Auto], unfollow: Iterable[Auto]) -> dict[tuple[str, str, str], Auto]:
        """The rules as they would be. Raises ForwardError."""
        rules = dict(self._rules)
        faults: list[Fault] = []
        for auto in unfollow:
            if rules.get(auto.place) == auto:
                del rules[auto.place]
            else:
                faults.append(Fault(forward=None, errno=errno.ENOENT, text=f"{auto}: there is no such rule"))
        for auto in follow:
            if self.unseen(auto):
                faults.append(Fault(forward=None, errno=errno.EOPNOTSUPP, text=f"{auto}: {UNSEEN}"))
            elif (there := rules.setdefault(auto.place, auto)) is not auto:
                whose = f"of owner {there.owner}" if there.owner else "of no owner"
                faults.append(Fault(forward=None, errno=errno.EEXIST, text=f"{auto}: there is {there} already, {whose}"))
        if faults:
            raise ForwardError(faults)
        return rules

    def _begin(self) -> None:
        """Look each second. Raises ForwardError."""
        if self._timer >= 0:
            return
        timer = lib.rn_os_ticker(INTERVAL_MS)
        if timer < 0:
            raise ForwardError([Fault(forward=None, errno=-timer, text=f"cannot follow the guest: {os.strerror(-timer)}")])
        self._timer = timer
        self._host = open_tables()
        self._session.watch(timer, self._tick)

    def _rest(self) -> None:
        """Look no more."""
        if self._timer < 0:
            return
        self._session.unwatch(self._timer)
        for fd in (self._timer, *self._host.values()):
            os.close(fd)
        self._timer, self._host, self._said = -1, {}, ""
        self._skipped.clear()
        self._warned.clear()

    def _tick(self) -> None:
        os.read(self._timer, 8)
        if not self._session.ending:  # else what the guest closes now goes with the session
            self._try_look()

    def _try_look(self) -> None:
        try:
            self.look()
        except OSError as e:  # of a table: the kernel could not write it
            self._complain(f"cannot see the guest's ports: {e.strerror}")

    def _complain(self, text: str) -> None:
        """Once, until it is something else."""
        if self._said != text:
            self._said = text
            self._warn(text)

    def _tell(self, removed: Iterable[Forward], added: Iterable[Forward]) -> None:
        for f in removed:
            self._session.tell(api.ForwardRemoved(forward=api.forward_info(f)))
        for f in added:
            self._session.tell(api.ForwardAdded(forward=api.forward_info(f)))

    def _tell_skipped(self, faults: Iterable[Fault]) -> None:
        """An event each time that a port is skipped anew; a line of the log the first time, and one for all."""
        now: dict[tuple[str, str, str, int], str] = {}
        first: list[Fault] = []
        for fault in faults:
            assert fault.forward is not None
            key = fault.forward.endpoint
            now[key] = fault.text
            if self._skipped.get(key) != fault.text:
                self._session.tell(api.ForwardSkipped(forward=api.forward_info(fault.forward), reason=fault.text))
            if key not in self._warned:
                self._warned.add(key)
                first.append(fault)
        self._skipped = now
        if first:
            more = f" (and {len(first) - 1} more)" if len(first) > 1 else ""
            self._warn(f"{first[0].forward}{more}: the guest listens there, but it is not forwarded: {first[0].text}; it is tried"
                       " again each second")

    @staticmethod
    def _read(tables: Mapping[str, int], proto: Proto, names: Iterable[str]) -> Listening:
        return set().union(*(listening(read_table(tables[n], proto), proto) for n in names if n in tables))

    def look(self) -> None:
        """Make it so now. Raises OSError."""
        protos = sorted({r.proto for r in self._rules.values()})
        there = {proto: self._read(self._guest, proto, (proto, f"{proto}6")) for proto in protos}
        want = {f.endpoint: f for f in wanted(self._rules.values(), there, self._network, ephemeral())}
        have = {f.endpoint: f for f in self._session.forwards()}
        gone = [f for key, f in have.items() if f.auto and want.get(key) != f]
        held = have.keys() - {f.endpoint for f in gone}
        # A forward of one IPv4 address could be bound; who has the port by IPv6 alone has it all the same.
        host6 = {proto: {port for _, port in self._read(self._host, proto, [f"{proto}6"])} for proto in protos}
        ours = {(f.proto, f.host_port) for f in have.values()}
        new: list[Forward] = []
        skipped: list[Fault] = []
        for key, f in want.items():
            if key in held:
                continue
            if f.host_port in host6[f.proto] and (f.proto, f.host_port) not in ours:
                skipped.append(Fault(forward=f, errno=errno.EADDRINUSE, text="the port is taken on this host, by IPv6"))
            else:
                new.append(f)
        if gone or new:
            try:
                made = self._session.change_forwards(new, gone, skipped=skipped.append)
            except ForwardError as e:
                self._complain(f"cannot follow the guest's ports: {e}")
                return
            self._tell(gone, made)
        self._tell_skipped(skipped)
