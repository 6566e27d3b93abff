"""Where a virtual machine comes in: a socket at a path (or, for a stream, a port of loopback) that one machine at a time
uses, and the next one after it.

    stream  a machine connects, and its connection is the link. Its end is seen by the socket.
    dgram   a machine binds a socket of its own and sends to ours; its first datagram tells its address. Ours is then
            connected to it: a socket that is sent to by path takes 11 frames and blocks, a connected one what its buffer
            holds (unix(7)). A datagram socket is not told of its peer's end, so the first datagram's credentials say
            which process to watch.

Paths are 0600. One that a killed run left behind is taken over; one where somebody listens is not.
"""
from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.config import ConfigError

PATH_MAX = 107  # bytes: sun_path of unix(7), with its NUL
_NEXT = ".new"  # behind the path, while a socket takes another's place
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


class DoorError(OSError):
    """The socket cannot be had; one line that begins with --socket."""


class Peer(NamedTuple):
    """A machine that came in. Whoever gets it closes both."""

    sock: socket.socket  # the link, connected
    pidfd: int  # the process on the other side, for a datagram socket; -1: not known


def loopback(where: str) -> tuple[str, int] | None:
    """ADDRESS:PORT, if it is that and not a path. Raises ConfigError: not loopback, or no port."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[0-9.]+|localhost):([0-9]+)", where)
    if not match:
        return None
    host, port = match[1].strip("[]"), int(match[2])
    if host == "localhost":
        host = "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"--socket {where}: {host} is not an IP address") from None
    if not address.is_loopback:
        raise ConfigError(f"--socket {where}: only loopback (127.0.0.1 or [::1]): frames are not protected on the way, and"
                          " whoever connects is the guest")
    if not 1 <= port <= 65535:
        raise ConfigError(f"--socket {where}: port {port} is not within 1..65535")
    return host, port


def check_path(path: str, room: int = 0) -> None:
    """room: bytes of a suffix it will get. Raises ConfigError."""
    if len(os.fsencode(path)) > PATH_MAX - room:
        raise ConfigError(f"--socket {path}: {len(os.fsencode(path))} bytes long; the path of this socket has at most"
                          f" {PATH_MAX - room}")
    if not path or "\0" in path:
        raise ConfigError("--socket: expected a path")


def _somebody_listens(path: str, kind: int) -> bool:
    """Is the socket file in use? Raises OSError if that cannot be known."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except FileNotFoundError:
            return False
        except OSError as e:
            if e.errno in (errno.EPROTOTYPE, errno.EPERM, errno.EAGAIN):  # of another kind, or of somebody else's; busy
                return True
            raise
    return True


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors of the system as DoorError."""
    try:
        yield
    except DoorError:
        raise
    except OSError as e:
        raise DoorError(f"--socket {path}: {e.strerror or e}") from e


def _bind(sock: socket.socket, path: str) -> None:
    """Readable and writable by us only, from the first moment on."""
    old = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(old)


def _claim(path: str, kind: int) -> None:
    """Nothing is at the path afterwards. Raises DoorError if something is that is not left over."""
    with _named(path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise DoorError(f"--socket {path}: is there already, and is no socket; remove it or give another path")
        if _somebody_listens(path, kind):
            raise DoorError(f"--socket {path}: is in use by another process; end it or give another path")
        os.unlink(path)


class Door:
    """Of either kind. Use as a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._made: tuple[int, int] | None = None  # device and inode of our socket file

    def fileno(self) -> int:
        """Readable when a machine comes."""
        raise NotImplementedError

    def admit(self) -> Peer | None:
        """The machine at the door; None if it was none."""
        raise NotImplementedError

    def renew(self) -> None:
        """The machine has left: ready for the next."""

    def close(self) -> None:
        """Remove the socket file, if it is still ours."""
        if self._made is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if self._identity() == self._made:
                os.unlink(self.path)
        self._made = None

    def _identity(self) -> tuple[int, int]:
        found = os.lstat(self.path)
        return found.st_dev, found.st_ino

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamDoor(Door):
    """Listens. Who comes while a machine is there waits in the backlog."""

    def __init__(self, where: str) -> None:
        """Raises DoorError, ConfigError."""
        super().__init__(where)
        tcp = loopback(where)
        if tcp is not None:
            family = socket.AF_INET6 if ":" in tcp[0] else socket.AF_INET
            self._sock = socket.socket(family, socket.SOCK_STREAM)
            with self._or_close(), _named(where):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._sock.bind(tcp)
                self._listen()
            return
        check_path(where)
        _claim(where, socket.SOCK_STREAM)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._or_close(), _named(where):
            _bind(self._sock, where)
            self._made = self._identity()
            self._listen()

    @contextlib.contextmanager
    def _or_close(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        self._sock.setblocking(False)
        self._sock.listen(1)

    def fileno(self) -> int:
        return self._sock.fileno()

    def admit(self) -> Peer | None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(sock, -1)

    def close(self) -> None:
        super().close()
        self._sock.close()


class DgramDoor(Door):
    """A datagram socket that waits for a first datagram. hello: what that must be, and is not a frame; b"": any frame."""

    def __init__(self, path: str, hello: bytes, warn: Callable[[str], None]) -> None:
        """Raises DoorError, ConfigError."""
        super().__init__(path)
        check_path(path, len(_NEXT))
        self._hello, self._warn = hello, warn
        _claim(path, socket.SOCK_DGRAM)
        with _named(path):
            self._sock = self._socket(path)
            self._made = self._identity()

    @staticmethod
    def _socket(path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            _bind(sock, path)
        except BaseException:
            sock.close()
            raise
        return sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def admit(self) -> Peer | None:
        """The datagram that came is looked at, not taken, unless it is the hello."""
        try:
            data, anc, flags, address = self._sock.recvmsg(64, socket.CMSG_SPACE(_UCRED.size), socket.MSG_PEEK)
        except BlockingIOError:
            return None
        hello = bool(self._hello) and data == self._hello and not flags & socket.MSG_TRUNC
        if self._hello:
            self._sock.recv(64)
        if self._hello and not hello:
            self._warn(f"{self.path}: a datagram that is not the hello {self._hello.decode()!r}; is --type right?")
            return None
        if not address:
            self._refuse("from a socket without an address; give it a path of its own (QEMU: local.type=unix,local.path=...)",
                         hello)
            return None
        try:
            self._sock.connect(address)
        except OSError as e:
            name = os.fsdecode(address)
            hint = "" if name.startswith("/") else "; the path must be absolute"
            self._refuse(f"from {name}, which cannot be answered: {e.strerror}{hint}", hello)
            return None
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        return Peer(self._sock.dup(), self._process(anc))

    def _refuse(self, text: str, taken: bool) -> None:
        if not taken:
            self._sock.recv(64)
        self._warn(f"{self.path}: a datagram {text}")

    @staticmethod
    def _process(anc: list[tuple[int, int, bytes]]) -> int:
        for level, kind, body in anc:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(body) >= _UCRED.size:
                pid = _UCRED.unpack_from(body)[0]
                if pid > 0:  # 0: of a process id namespace that ours does not see
                    with contextlib.suppress(ProcessLookupError):
                        return os.pidfd_open(pid)
        return -1

    def renew(self) -> None:
        """A socket of its own for the next machine, at the same path without a gap: nothing of the last one waits in it."""
        with _named(self.path):
            fresh = self.path + _NEXT
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            sock = self._socket(fresh)
            try:
                os.rename(fresh, self.path)
            except BaseException:
                sock.close()
                Path(fresh).unlink(missing_ok=True)
                raise
            self._sock.close()
            self._sock, self._made = sock, self._identity()

    def close(self) -> None:
        super().close()
        self._sock.close()
