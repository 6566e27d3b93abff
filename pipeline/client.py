"""A client of the control API: `with connect("web") as c: c.call(api.ForwardsAdd(specs=["8080:80"]))`.

Blocking, one thread. For other languages: docs/control-api.md; it is JSON lines over a Unix socket.
"""
from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from pipeline import api, session_dir
from pipeline.api import ApiError

FDS_MAX = 64  # descriptors with one reply
REPLY_S = 30.0  # for a reply: a session answers within milliseconds, on a busy machine within seconds
_event = msgspec.json.Decoder(api.AnyEvent)


class ClientError(Exception):
    """There is no such session, or the connection broke; one line."""


class _Answer(msgspec.Struct):
    """A line from the server, told apart from an event by its lack of one."""

    id: int | str | None = None
    ok: bool = False
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: api.Error | None = None
    event: str = ""


_answer = msgspec.json.Decoder(_Answer)


class Client:
    """One connection. Events that come between replies are kept for events()."""

    def __init__(self, path: str | Path, *, timeout: float = REPLY_S) -> None:
        """Raises ClientError."""
        try:
            self._sock = session_dir.connect(path)
        except FileNotFoundError:
            raise ClientError(f"{path}: there is no such socket") from None
        except ConnectionRefusedError:
            raise ClientError(f"{path}: nobody listens there; the session was killed") from None
        except OSError as e:
            raise ClientError(f"{path}: {e.strerror or e}") from None
        self.path = Path(path)
        self._sock.settimeout(timeout)
        self._timeout = timeout
        self._buffer = bytearray()
        self._events: deque[api.AnyEvent] = deque()
        self._id = 0
        self.fds: list[int] = []  # descriptors that came with replies: whoever asked takes them out

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        for fd in self.take_fds():
            os.close(fd)

    def take_fds(self) -> list[int]:
        """Descriptors that came with the last result; the caller's own from now on."""
        fds, self.fds = self.fds, []
        return fds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def call(self, call: api.Call) -> Any:
        """The result, of type call.result. Raises ApiError if it was refused, ClientError if the connection broke."""
        self._id += 1
        self.send(msgspec.json.encode({"v": api.VERSION, "id": self._id, "call": call.call, "args": call}))
        while True:
            line = self._line()
            answer = self._decode(_answer, line)
            if answer.event:
                self._events.append(self._decode(_event, line))
            elif answer.id in (self._id, None):
                if answer.ok:
                    return self._decode(msgspec.json.Decoder(call.result), bytes(answer.result))
                error = answer.error or api.Error(code="failed", text="no reason was given")
                raise ApiError(error.code, error.text)

    def pages(self, call: api.ForwardsList | api.HostsList | api.FlowsList) -> Iterator[Any]:
        """All pages of a list, one result each."""
        while True:
            result = self.call(call)
            yield result
            if result.next is None:
                return
            call = msgspec.structs.replace(call, start=result.next)

    def events(self, timeout: float | None = None) -> Iterator[api.AnyEvent]:
        """Events as they come, after a Subscribe; ends when the session does. Raises TimeoutError."""
        self._sock.settimeout(timeout)
        try:
            while True:
                if self._events:
                    yield self._events.popleft()
                    continue
                try:
                    line = self._line()
                except ClientError:
                    return
                if self._decode(_answer, line).event:
                    self._events.append(self._decode(_event, line))
        finally:
            if self._sock.fileno() >= 0:  # else it was closed meanwhile
                self._sock.settimeout(self._timeout)

    def send(self, line: bytes) -> None:
        """One request as it is. Raises ClientError."""
        try:
            self._sock.sendall(line + b"\n")
        except TimeoutError:
            raise ClientError(f"{self.path}: the session does not read") from None
        except OSError as e:
            raise ClientError(f"{self.path}: {e.strerror}") from None

    def _receive(self) -> bytes:
        data, anc, _, _ = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC)
        for level, kind, body in anc:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
                self.fds += fds
        return data

    def _line(self) -> bytes:
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            try:
                data = self._receive()
            except TimeoutError:
                if self._sock.gettimeout() != self._timeout:
                    raise  # the caller's, of events()
                raise ClientError(f"{self.path}: no answer within {self._timeout:g} s") from None
            except OSError as e:
                raise ClientError(f"{self.path}: {e.strerror}") from None
            if not data:
                raise ClientError(f"{self.path}: the session closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        return line

    def _decode(self, decoder: msgspec.json.Decoder[Any], line: bytes) -> Any:
        try:
            return decoder.decode(line)
        except msgspec.MsgspecError as e:
            raise ClientError(f"{self.path}: not what this version expects: {e}") from e


def find(name: str = "") -> Path:
    """The socket of a session by name, or of the only one. Raises ClientError."""
    name = name or os.environ.get("RINGNET_SESSION", "")
    there = session_dir.sessions()
    if name:
        if name not in there:
            known = f"; there are {', '.join(there)}" if there else "; none runs"
            raise ClientError(f"there is no session {name}{known}")
        return there[name]
    if not there:
        raise ClientError("no session runs (of this user)")
    if len(there) > 1:
        raise ClientError(f"several sessions run: {', '.join(there)}; name one with -s")
    return next(iter(there.values()))


def connect(name: str = "") -> Client:
    """To a session by name, or to the only one. Raises ClientError."""
    return Client(find(name))
