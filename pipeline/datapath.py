"""A guest's network for a VMM to embed: one call, one descriptor.

    with Cancellation() as token, create_datapath(mtu=1500, cancel=token, hosts={"db.internal": "192.0.2.7"}) as net:
        ...                      # net.fd: a connected datagram socket, a frame each, non-blocking

The session runs in processes of its own (`ringnet vm --type fd`): the VMM's loop never waits for it, and it ends when it is
cancelled, closed, or when the VMM's process is gone, however that ended. Names, forwards and the rest are changed while it
runs by net.client() (docs/control-api.md).
"""
from __future__ import annotations

import itertools
import os
import select
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pipeline.client import Client, connect
from pipeline.config import ConfigError, make
from pipeline.messages import Exit
from pipeline.sockets import widen

READY_S = 30.0  # for the session to run, on a busy machine
END_S = 10.0  # for it to drain and end; then it is killed
_count = itertools.count()


class DatapathError(Exception):
    """It could not be set up, or ended by itself; one line."""


class Cancellation:
    """Ends the datapaths it was given to, all at once. Ends them also when this process is gone."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._read, self._write = os.pipe()

    @property
    def cancelled(self) -> bool:
        return self._write < 0

    def cancel(self) -> None:
        """They drain and end; Datapath.wait() says when. May be called again."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    def fileno(self) -> int:
        """Readable once it is cancelled."""
        return self._read

    def close(self) -> None:
        self.cancel()
        if self._read >= 0:
            os.close(self._read)
            self._read = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Datapath:
    """What create_datapath() made. fd is the VMM's end, and closed by close(): dup() it to keep it."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes], log: int, session: str,
                 own: Cancellation | None) -> None:
        self._sock, self._process, self._log, self._own = sock, process, log, own
        self.session = session  # its name, for `ringnet ctl -s`

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    def client(self) -> Client:
        """A connection to the session's control API, to be closed. Raises ClientError."""
        return connect(self.session)

    def said(self) -> str:
        """What the session wrote to standard error so far."""
        return os.pread(self._log, 1 << 20, 0).decode(errors="replace")

    def wait(self, timeout: float | None = None) -> bool:
        """Has it ended? Waits so many seconds for that. Raises DatapathError if it ended with an error."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise DatapathError(_last_line(self.said()) or f"the datapath ended with status {code}")
        return True

    def close(self) -> None:
        """End it, if it has not ended, and let go of the descriptor. May be called again."""
        if self._log < 0:
            return
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._sock.close()
        if self._own is not None:
            self._own.close()
        os.close(self._log)
        self._log = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("ringnet: ") if lines else ""


def _argv(options: Mapping[str, Any]) -> list[str]:
    """Settings by their TOML names as flags."""
    argv = []
    for key, value in options.items():
        if isinstance(value, bool):
            argv += [f"--{key}"] if value else []
        else:
            argv += [f"--{key}={v}" for v in ([value] if isinstance(value, (str, int)) else value)]
    return argv


def create_datapath(*, mtu: int = 4000, cancel: Cancellation | None = None,
                    hosts: Mapping[str, str | Sequence[str]] | None = None, options: Mapping[str, Any] | None = None,
                    warn: Callable[[str], None] = lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3)) -> Datapath:
    """Start a network for one guest and return when frames may be sent.

    mtu: told to the guest by DHCP. hosts: names answered locally, with an address or several. options: further settings by
    their names in a TOML file, like {"tcp-ports": ["8080:80"]}. cancel: ends it from outside; one token may be given to
    several. Both ends of the socket get 8 MiB of buffer where the system allows it, and what it allows otherwise.

    Raises ConfigError for a setting that is wrong, DatapathError if it could not be set up; nothing is left then. A buffer
    that could not be set at all is only told to `warn`.
    """
    table = {name: [a] if isinstance(a, str) else list(a) for name, a in (hosts or {}).items()}
    name = f"datapath-{os.getpid()}-{next(_count)}"
    given: dict[str, Any] = {"mtu": mtu, "session": name, "quiet": True, **(options or {})}
    name = make({**given, "hosts": table}).session  # ConfigError here, not in a process that is hard to hear
    argv = _argv(given) + [f"--hosts={n}={','.join(a)}" for n, a in table.items()]
    own = None if cancel is not None else Cancellation()
    end = cancel or own
    assert end is not None
    if end.cancelled:
        raise DatapathError("cancelled before it began")
    sock: socket.socket | None = None
    log = -1
    try:
        try:
            sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            log = os.memfd_create("ringnet-datapath-log", os.MFD_CLOEXEC)
            with theirs:
                for s in (sock, theirs):
                    s.setblocking(False)
                    try:
                        widen(s)
                    except OSError as e:
                        warn(f"buffers of the datapath's socket stay as they are: {e.strerror}")
                process = _start(argv, theirs.fileno(), end.fileno(), log)
        except OSError as e:
            raise DatapathError(f"cannot set up a datapath: {e.strerror or e}") from e
        return Datapath(sock, process, log, name, own)
    except BaseException:
        if sock is not None:
            sock.close()
        if log >= 0:
            os.close(log)
        if own is not None:
            own.close()
        raise


def _start(argv: list[str], fd: int, exit_fd: int, log: int) -> subprocess.Popen[bytes]:
    """The session's process, ready. Raises DatapathError, OSError."""
    ready, told = os.pipe()
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    env = dict(os.environ, PYTHONPATH=f"{root}{os.pathsep}{path}" if path else root)
    command = [sys.executable, "-P", "-m", "pipeline", "vm", "--type", "fd", "--fd", str(fd), "--exit-fd", str(exit_fd),
               "--ready-fd", str(told), *argv]
    try:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                       pass_fds=(fd, exit_fd, told))
        finally:
            os.close(told)
        in_time = bool(select.select([ready], [], [], READY_S)[0])
        if in_time and os.read(ready, 1):
            return process
        if not in_time:
            process.kill()
        code = process.wait()
        text = _last_line(os.pread(log, 1 << 16, 0).decode(errors="replace"))
        if code == Exit.USAGE:
            raise ConfigError(text.partition("ringnet vm: ")[2] or text)
        raise DatapathError(text or ("cancelled before it was ready" if in_time else f"not ready within {READY_S:g} s"))
    finally:
        os.close(ready)
