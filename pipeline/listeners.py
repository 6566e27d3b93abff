"""The host's side of forwards: listening sockets, bound with the user's rights, held by the supervisor.

A change is prepared (every socket bound, or an error with every reason and nothing bound), then told to egress, which
gets the sockets, then committed here. The supervisor keeps its descriptors, so that a successor of egress can be given
them, and so that a port stays taken for as long as its rule exists.
"""
from __future__ import annotations

import errno
import ipaddress
import resource
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from pipeline.forwards import Fault, Forward, ForwardError, ForwardSyntaxError, check
from pipeline.messages import ForwardsChange, Rule

BACKLOG = 4096  # connections; net.core.somaxconn may make it less
UDP_BUFFER = 4 << 20  # bytes, as far as net.core.[rw]mem_max allow
PART = 60  # rules in one message: each has a descriptor (messages.FDS_MAX)
_HINTS = {
    errno.EADDRINUSE: "the port is taken on this host",
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.ENODEV: "this host has no such interface",
    errno.EACCES: "a port below net.ipv4.ip_unprivileged_port_start needs root, or CAP_NET_BIND_SERVICE",
    errno.EPERM: "listening on one interface needs root, or CAP_NET_RAW",
    errno.EMFILE: "no descriptors left (ulimit -n)",
}


class Held(NamedTuple):
    rule: int  # what egress calls it
    forward: Forward
    sock: socket.socket


def bind(f: Forward) -> socket.socket:
    """A socket that listens: one for every address takes IPv4 too, where the host has IPv6 at all. Raises OSError."""
    if not f.host_addr:
        try:
            return _bind(f, socket.AF_INET6)
        except OSError as e:
            if e.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return _bind(f, socket.AF_INET6 if ":" in f.host_addr else socket.AF_INET)


def _bind(f: Forward, family: socket.AddressFamily) -> socket.socket:
    tcp = f.proto == "tcp"
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(f.host_addr != ""))
        if tcp:  # connections of an earlier rule may live on, or be in TIME-WAIT
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, UDP_BUFFER)
        if f.ifname:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, f.ifname.encode() + b"\0")
        if family == socket.AF_INET6:
            local = f.ifname and ipaddress.IPv6Address(f.host_addr or "::").is_link_local
            sock.bind((f.host_addr or "::", f.host_port, 0, socket.if_nametoindex(f.ifname) if local else 0))
        else:
            sock.bind((f.host_addr, f.host_port))
        if tcp:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_with_room(f: Forward) -> socket.socket:
    """As bind(), with as many descriptors as the hard limit allows."""
    try:
        return bind(f)
    except OSError as e:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if e.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return bind(f)


class Change:
    """A change that can be: all is bound. Ends with commit() or abort()."""

    def __init__(self, listeners: Listeners, fresh: list[Held], reused: list[Held], relabelled: list[Held],
                 removed: list[Held], skipped: Iterable[Fault] = ()) -> None:
        """skipped: optional ones that could not be had."""
        self.skipped = tuple(skipped)
        self._listeners, self._fresh, self._reused = listeners, fresh, reused
        self._relabelled, self._removed = relabelled, removed

    @property
    def forwards(self) -> list[Forward]:
        """What was to be added, as it is: with the port that was free, without what could not be had of `all`."""
        return [h.forward for h in self._fresh + self._reused + self._relabelled]

    def messages(self, *, close_flows: bool, whole: bool = False) -> Iterator[tuple[ForwardsChange, list[int]]]:
        """For egress, with descriptors; it acts on the last one. Nothing if nothing changes for egress. whole: what is
        added is all there is."""
        add = self._fresh + self._reused
        remove = [h.rule for h in self._removed]
        first = whole
        while add or remove or first:
            first = False
            now, add = add[:PART], add[PART:]
            gone, remove = remove[:1000], remove[1000:]
            yield ForwardsChange(
                add=tuple(Rule(rule=h.rule, proto=h.forward.proto, guest_addr=h.forward.guest_addr,
                               guest_port=h.forward.guest_port) for h in now),
                remove=tuple(gone), close_flows=close_flows, whole=whole,
                commit=not (add or remove)), [h.sock.fileno() for h in now]

    def commit(self) -> None:
        held = self._listeners.held
        reused = {h.sock for h in self._reused}
        for h in self._removed:
            del held[h.forward.endpoint]
            if h.sock not in reused:
                h.sock.close()
        for h in self._fresh + self._reused + self._relabelled:
            held[h.forward.endpoint] = h

    def abort(self) -> None:
        """May be called again."""
        for h in self._fresh:
            h.sock.close()


class Listeners:
    """All forwards of a session."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str, str, int], Held] = {}
        self._rules = 0

    def forwards(self) -> list[Forward]:
        """By protocol and port."""
        return sorted((h.forward for h in self.held.values()),
                      key=lambda f: (f.proto, f.host_port, f.host_addr, f.ifname))

    def _rule(self) -> int:
        self._rules += 1
        return self._rules

    def prepare(self, add: Iterable[Forward], remove: Iterable[Forward]) -> Change:
        """Bind what is added. Raises ForwardError with every reason; then nothing is bound."""
        faults: list[Fault] = []
        skipped: list[Fault] = []
        removed: dict[tuple[str, str, str, int], Held] = {}
        for f in remove:
            held = self.held.get(f.endpoint)
            if held is None or msgspec.structs.replace(f, optional=held.forward.optional) != held.forward:
                faults.append(Fault(forward=f, errno=errno.ENOENT, text="there is no such forward"))
            elif f.endpoint in removed:
                faults.append(Fault(forward=f, errno=errno.EINVAL, text="named twice"))
            else:
                removed[f.endpoint] = held
        fresh: list[Held] = []
        reused: list[Held] = []
        relabelled: list[Held] = []
        seen: set[tuple[str, str, str, int]] = set()
        try:
            for given in add:
                try:
                    self._add(check(given), removed, fresh, reused, relabelled, seen)
                except ForwardSyntaxError as e:
                    faults.append(Fault(forward=given, errno=errno.EINVAL, text=str(e)))
                except OSError as e:
                    hint = _HINTS.get(e.errno or 0)
                    text = f"{e.strerror}: {hint}" if hint else str(e.strerror or e)
                    fault = Fault(forward=given, errno=e.errno or 0, text=text)
                    if given.optional and e.errno != errno.EMFILE:
                        skipped.append(fault)
                        continue
                    faults.append(fault)
                    if e.errno == errno.EMFILE:
                        break  # so will be the others
            if faults:
                raise ForwardError(faults)
        except BaseException:
            for h in fresh:
                h.sock.close()
            raise
        kept = {h.forward.endpoint for h in relabelled}
        return Change(self, fresh, reused, relabelled, [h for key, h in removed.items() if key not in kept], skipped)

    def _add(self, f: Forward, removed: dict[tuple[str, str, str, int], Held], fresh: list[Held], reused: list[Held],
             relabelled: list[Held], seen: set[tuple[str, str, str, int]]) -> None:
        """Raises OSError."""
        key = f.endpoint
        if f.host_port and key in seen:
            raise OSError(errno.EEXIST, "named twice")
        if f.host_port and key in self.held and key not in removed:
            owner = self.held[key].forward.owner
            whose = f"of owner {owner}" if owner else "of no owner"
            raise OSError(errno.EEXIST, f"there is such a forward already, {whose}")
        if f.host_port:
            seen.add(key)
        if old := removed.get(key):  # the port passes over without a moment in which nobody listens
            same = (f.guest_addr, f.guest_port) == (old.forward.guest_addr, old.forward.guest_port)
            rule = old.rule if same else self._rule()
            (relabelled if same else reused).append(Held(rule, f, old.sock))
            return
        sock = _bind_with_room(f)
        if not f.host_port:
            f = msgspec.structs.replace(f, host_port=sock.getsockname()[1])
        fresh.append(Held(self._rule(), f, sock))

    def again(self) -> Iterator[tuple[ForwardsChange, list[int]]]:
        """All there is, for a successor of egress, which knows of those that its predecessor left."""
        return Change(self, list(self.held.values()), [], [], []).messages(close_flows=False, whole=True)

    def close(self) -> None:
        for h in self.held.values():
            h.sock.close()
        self.held.clear()
