"""Where the sockets of sessions are: one directory a user, one socket a session, NAME.sock.

A session makes its socket with rights for its user only and removes it at its end. One that was killed leaves the
file; nobody answers there (ECONNREFUSED), and whoever looks next removes it. A socket elsewhere (--api-socket) is
named here by a symbolic link, so that the session is found by its name all the same.
"""
from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SUFFIX = ".sock"
PATH_MAX = 107  # bytes of a Unix socket's path (unix(7): 108 with the NUL)
_DRAFT = "."  # first letter of a socket's name until it listens
_DRAFT_S = 60  # s after which a draft that nobody listens on was left by one that was killed


class SessionDirError(Exception):
    """One line about a socket or the directory."""


def _usable(path: Path) -> bool:
    """A directory of our own that nobody else can write to."""
    try:
        s = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(s.st_mode) and s.st_uid == os.geteuid() and not s.st_mode & 0o022


def directories() -> list[Path]:
    """Where our sessions may be, whatever the environment of the one that made them: best first. Only
    $RINGNET_RUNTIME_DIR if it is set."""
    if only := os.environ.get("RINGNET_RUNTIME_DIR"):
        return [Path(os.path.abspath(only))]
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    found = [Path(runtime)] if runtime and os.path.isabs(runtime) and _usable(Path(runtime)) else []
    found += [Path("/run")] if uid == 0 else [Path(f"/run/user/{uid}")]
    made = [d / "ringnet" for d in found if _usable(d)] + [Path(f"/tmp/ringnet-{uid}")]
    return list(dict.fromkeys(made))


def own_directory() -> Path:
    """The first of them that can be had, made if it is not there. Raises SessionDirError."""
    trouble = []
    for path in directories():
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            trouble.append(f"{path}: {e.strerror}")
            continue
        if _usable(path):
            return path
        trouble.append(f"{path}: not a directory that is ours alone")
    raise SessionDirError("; ".join(trouble))


def connect(path: str | Path) -> socket.socket:
    """A connection to a session. Raises OSError: FileNotFoundError, ConnectionRefusedError if it was killed."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(10)
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


def alive(path: Path) -> bool:
    """Does somebody listen there?"""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as e:
            return e.errno not in (errno.ENOTSOCK, errno.EPROTOTYPE)  # EAGAIN: its queue is full, so it lives
    return True


def sessions(*, tidy: bool = True) -> dict[str, Path]:
    """Sockets by session name, of those that live. tidy: remove what dead ones left."""
    found: dict[str, Path] = {}
    for directory in directories():
        if not _usable(directory):
            continue
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            draft = path.name.startswith(_DRAFT)
            if alive(path):
                if not draft:
                    found.setdefault(path.name.removesuffix(SUFFIX), path)
            elif tidy:
                with contextlib.suppress(OSError):  # another one tidied as well
                    if not draft or time.time() - path.lstat().st_mtime > _DRAFT_S:
                        path.unlink()
    return found


class Listening:
    """A session's socket and its name. close() removes both, if they are still ours."""

    def __init__(self, name: str, path: str = "") -> None:
        """path: put the socket there; "": into the directory. Raises SessionDirError."""
        self.name = name
        self._mine: list[tuple[Path, int]] = []  # files of ours, and their inodes
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if path:
                self.path = self._put(Path(os.path.abspath(path)), "--api-socket")
                with contextlib.suppress(SessionDirError):  # it can be reached, only not by its name
                    self._link_to(own_directory() / f"{name}{SUFFIX}")
            else:
                self.path = self._put(own_directory() / f"{name}{SUFFIX}", "--session")
        except BaseException:
            self.close()
            raise

    def _put(self, path: Path, option: str) -> Path:
        """Bind beside the name, listen, then give it the name: who sees the name can connect."""
        draft = path.with_name(f"{_DRAFT}{os.urandom(4).hex()}{SUFFIX}")
        if max(len(os.fsencode(path)), len(os.fsencode(draft))) > PATH_MAX:
            raise SessionDirError(f"{option} {path}: {len(os.fsencode(path))} bytes; a socket's path has at most"
                                  f" {PATH_MAX}")
        os.fchmod(self.sock.fileno(), 0o600)  # before the bind: the file never has other rights
        try:
            self.sock.bind(os.fspath(draft))
            try:
                self.sock.listen(64)
                self._claim(path, option, lambda: os.link(draft, path))
            finally:
                draft.unlink()
        except OSError as e:
            raise SessionDirError(f"{option} {path}: {e.strerror}") from e
        return path

    def _link_to(self, link: Path) -> None:
        try:
            self._claim(link, "--session", lambda: os.symlink(self.path, link))
        except OSError as e:
            raise SessionDirError(f"{link}: {e.strerror}") from e

    def _claim(self, path: Path, option: str, make: Callable[[], None]) -> None:
        """Make a file that nobody has; what a dead session left there goes. Raises OSError, SessionDirError."""
        while True:
            try:
                make()
            except FileExistsError:
                try:
                    was = path.lstat()
                except FileNotFoundError:
                    continue
                if not (stat.S_ISSOCK(was.st_mode) or stat.S_ISLNK(was.st_mode)):
                    raise SessionDirError(f"{option} {path}: exists, and is no socket") from None
                if alive(path):
                    what = path.name.removesuffix(SUFFIX) if option == "--session" else str(path)
                    raise SessionDirError(f"{option} {what}: in use by a session that runs") from None
                path.unlink(missing_ok=True)
                continue
            self._mine.append((path, path.lstat().st_ino))
            return

    def close(self) -> None:
        self.sock.close()
        for path, inode in self._mine:
            with contextlib.suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()
        self._mine = []

    def __iter__(self) -> Iterator[Path]:
        """The files."""
        return iter([path for path, _ in self._mine])
