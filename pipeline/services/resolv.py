"""The host's resolv.conf: its name servers, and word when it changes (resolv.conf(5), inotify(7)).

It changes in every way a file can: written in place, replaced by rename (NetworkManager, dhclient), a symlink
to another file (systemd-resolved), a bind mount (containers), and it may be absent for a while. So watched are the
directory of each name on the way, symlinks followed one by one, and the file at the end. After any event all watches
are set anew and the file is read; the callback comes only if the text is another.
"""
from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from msgspec import Struct

from pipeline.services.loop import READ, Loop
from shm._dataplane import lib

log = logging.getLogger("ringnet.services.resolv")

SERVERS_MAX = 8  # glibc takes 3 (MAXNS)
SIZE_MAX = 1 << 16  # bytes of resolv.conf we look at
LINKS_MAX = 40  # symlinks on the way; as the kernel (path_resolution(7))
DNS_PORT = 53


class Upstream(Struct, frozen=True):
    """One name server of the host's."""

    address: IPv4Address | IPv6Address
    port: int = DNS_PORT

    @classmethod
    def parse(cls, text: str) -> Upstream:
        """"ADDRESS" or "ADDRESS#PORT" (the form dnsmasq and systemd-resolved use). Raises ValueError."""
        address, mark, port = text.partition("#")
        if mark and not (port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{text!r}: the port is not in 1..65535")
        return cls(ip_address(address), int(port) if mark else DNS_PORT)

    def sockaddr(self) -> tuple[int, tuple[str, int] | tuple[str, int, int, int]]:
        """(family, address) for connect(2). Raises OSError if the scope names no interface."""
        if isinstance(self.address, IPv4Address):
            return socket.AF_INET, (str(self.address), self.port)
        scope = self.address.scope_id or ""  # RFC 4007 11: needed for link-local addresses
        index = int(scope) if scope.isdecimal() else socket.if_nametoindex(scope) if scope else 0
        return socket.AF_INET6, (str(self.address).partition("%")[0], self.port, 0, index)


def parse_nameservers(text: str) -> list[Upstream]:
    """`nameserver` lines, in order, each once; what is not an address is left out, as glibc does."""
    found: dict[Upstream, None] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":  # comments begin with ; or #, in the first column
            continue
        try:
            found[Upstream(ip_address(words[1]))] = None
        except ValueError:
            log.warning("resolv.conf: %r is not an address", words[1])
    return list(found)[:SERVERS_MAX]


class ResolvWatcher:
    """Calls back with the text of the file, at once and after each change; "" while there is none."""

    def __init__(self, path: str, loop: Loop, changed: Callable[[str], None]) -> None:
        self._path = os.path.abspath(path)
        self._loop = loop
        self._changed = changed
        self._text: str | None = None
        self._watches: set[str] = set()
        self._fd = lib.rn_services_inotify()
        if self._fd < 0:  # user's instance limit (EMFILE)
            log.warning("resolv.conf will not be re-read: inotify: %s", os.strerror(-self._fd))
        self._look()

    def _look(self) -> None:
        """Watch, then read: a change between the two makes an event, so none is lost."""
        self._watch()
        text = self._read()
        if text != self._text:
            self._text = text
            self._changed(text)

    def _watch(self) -> None:
        if self._fd < 0:
            return
        # A fresh inotify instance: old watches may be on inodes that no name leads to any more.
        if self._watches:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = lib.rn_services_inotify()
            self._watches.clear()
            if self._fd < 0:
                log.error("resolv.conf will not be re-read: inotify: %s", os.strerror(-self._fd))
                return
        path = self._path
        for _ in range(LINKS_MAX):
            self._add_directory(os.path.dirname(path))
            try:
                target = os.readlink(path)
            except OSError:  # a file, or nothing
                break
            path = os.path.normpath(os.path.join(os.path.dirname(path), target))
        self._add(path, directory=False)
        self._loop.watch(self._fd, READ, self._event)

    def _add_directory(self, path: str) -> None:
        """The directory, or while it does not exist the nearest one above it, where it will appear."""
        while not self._add(path, directory=True) and path != "/":
            path = os.path.dirname(path)

    def _add(self, path: str, *, directory: bool) -> bool:
        if lib.rn_services_watch(self._fd, os.fsencode(path), int(directory)) < 0:
            return False
        self._watches.add(path)
        return True

    def _event(self, _events: int) -> None:
        """Something moved in one of the directories; what, does not matter: reading a small file costs less than
        being clever, except that a busy directory must not make us re-arm for every unrelated name."""
        names = {os.fsencode(os.path.basename(p)) for p in self._steps()}
        relevant = False
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        while at + 16 <= len(data):  # struct inotify_event: wd, mask, cookie, len, name
            length = int.from_bytes(data[at + 12 : at + 16], "little")
            name = data[at + 16 : at + 16 + length].rstrip(b"\0")
            relevant = relevant or not name or name in names
            at += 16 + length
        if relevant:
            self._look()

    def _steps(self) -> set[str]:
        """Every path whose change can change what we read: each symlink, and each directory above it."""
        out: set[str] = set()
        path = self._path
        for _ in range(LINKS_MAX):
            part = path
            while part != "/" and part not in out:
                out.add(part)
                part = os.path.dirname(part)
            try:
                path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
            except OSError:
                break
        return out

    def _read(self) -> str:
        try:
            # Not a FIFO that would block us for ever, should somebody put one there.
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as err:
            log.warning("%s: %s; no upstream name server until it is back", self._path, err.strerror)
            return ""
        try:
            return os.read(fd, SIZE_MAX).decode("utf-8", "replace")
        except OSError as err:
            log.warning("%s: %s", self._path, err.strerror)
            return ""
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
