"""Where the second interface of a virtual machine comes in (`ringnet vm --nic2 MODE --nic2-socket PATH`).

A door of its own, of the same type as the machine's first one (pipeline/doors.py). The machine's two devices come and go
each by itself: while the second one is not there its frames wait at the host, and the session goes on.
"""
from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator

from pipeline.doors import DgramDoor, Door, DoorError, Peer, StreamDoor
from pipeline.supervisor import Session
from pipeline.units import LinkKind
from pipeline.vm_types import VmType


class SecondDoor:
    """Use as a context manager; wait() once the session runs."""

    def __init__(self, path: str, vm_type: VmType, say: Callable[[str], None]) -> None:
        """Raises DoorError."""
        self.path, self.kind, self._say = path, kind_for(vm_type), say
        self._peer: Peer | None = None
        self._end: select.epoll | None = None
        self._session: Session | None = None
        with _named():
            self._door: Door = (StreamDoor(path) if self.kind == "stream" else DgramDoor(path, vm_type.hello, say))

    def wait(self, session: Session) -> None:
        if self._session is None and self.kind == "stream":
            session.seats.listeners.append(self._seated)
        self._session = session
        session.watch(self._door.fileno(), self._came)

    def _came(self) -> None:
        assert self._session is not None
        if (peer := self._door.admit()) is None:
            return
        self._session.unwatch(self._door.fileno())
        self._peer = peer
        # Told of the end, and never of a frame: an epoll that asks for errors only, inside the session's.
        self._end = select.epoll()
        self._end.register(peer.sock, select.EPOLLRDHUP)
        self._session.watch(self._end.fileno(), self._left)
        if peer.pidfd >= 0:
            self._session.watch(peer.pidfd, self._left)
        self._session.set_second_link(peer.sock.fileno())
        self._say("the machine's second interface came")

    def _seated(self, stage: str) -> None:
        """A stage has a process again; where in the stream its predecessor stood nobody knows."""
        if stage in ("guest_tx", "guest_rx") and self._peer is not None:
            self._left()

    def _left(self) -> None:
        assert self._session is not None
        if self._peer is None:  # told before: its process and its socket end both
            return
        for fd in (self._end.fileno() if self._end else -1, self._peer.pidfd):
            if fd >= 0:
                self._session.unwatch(fd)
        self._part()
        if self._session.ending:
            return
        self._say("the machine's second interface has left")
        self._session.set_second_link()
        with _named():
            self._door.renew()
        self.wait(self._session)

    def _part(self) -> None:
        peer, self._peer = self._peer, None
        if peer is None:
            return
        if self._end is not None:
            self._end.close()
        if peer.pidfd >= 0:
            os.close(peer.pidfd)
        if self.kind == "stream":
            with contextlib.suppress(OSError):  # it may be gone already
                peer.sock.shutdown(socket.SHUT_RDWR)
        peer.sock.close()

    def __enter__(self) -> SecondDoor:
        return self

    def __exit__(self, *_: object) -> None:
        """After the session, which watches nothing any more."""
        self._part()
        self._door.close()


def kind_for(vm_type: VmType) -> LinkKind:
    return vm_type.kind or "stream"


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Errors of the door name our option."""
    try:
        yield
    except DoorError as e:
        raise DoorError(str(e.args[0]).replace("--socket", "--nic2-socket", 1)) from e
