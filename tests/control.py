"""What tests of the control API share: a session without stages, in the test's own thread, and clients that never
block.

FakeSession has what pipeline/control_api.py uses of a Session. services is a real HostsTable; answers of stages can be
held back (`hold`), to see what happens meanwhile.
"""
from __future__ import annotations

import errno
import ipaddress
import json
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import api
from pipeline.auto_forwards import Follower
from pipeline.config import make
from pipeline.control_api import ControlApi
from pipeline.forwards import Fault, Forward, ForwardError
from pipeline.messages import Ask, CloseFlow, HostsChange, PolicyChange
from pipeline.policy import PolicyBook
from pipeline.seats import SeatError
from pipeline.services.hosts import HostsTable
from pipeline.supervisor import Child, Link
from pipeline.topology import TOPOLOGY, Feature
from pipeline.units import Impair
from shm.arena import Arena, Use
from shm.cell import Session as CellTable
from shm.flows import Flows
from shm.ring import Ring

DEADLINE = 60.0


class FakeMemory:
    def __init__(self) -> None:
        self.session = CellTable.create(5)
        self.flows = Flows.create(64, (1, 2))
        self.arena = Arena.create([(4, 0)] * 5)
        self.rings = {"a_b": Ring.create(2)}

    def close(self) -> None:
        for one in (self.session, self.flows, self.arena, *self.rings.values()):
            one.destroy()


class FakeSeats:
    """No stage has a process, so none can be held; what does happen is tests/e2e/test_seats.py's."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[str], None]] = []

    def _refuse(self, name: str, *_: object) -> Any:
        raise SeatError(f"stage {name} has no seat here")

    take = hold = release = _refuse


class FakeSession:
    def __init__(self, **settings: Any) -> None:
        self.settings = make(settings)
        self.policy = PolicyBook(self.settings.policy_rules())
        self.topology = TOPOLOGY.only(frozenset({Feature.NIC1}))
        self.children = [Child(s, row) for row, s in enumerate(self.topology.stages)]
        self.link = Link(fd=-1, kind="dgram", vnet=False)
        self.listeners: list[Callable[[api.Event], None]] = []
        self.seats = FakeSeats()
        self.started_at = time.monotonic()
        self.memory = FakeMemory()
        self.result = None
        self.ending = False
        self.nic2 = None
        self.impairments: dict[str, tuple[str, Impair]] = {}
        self.level = ""
        self.hold = False
        self.asks: deque[tuple[str, Ask, Callable[[str], None]]] = deque()
        self.table = HostsTable(domain="ringnet.internal", gateway=ipaddress.IPv4Address("10.0.2.1"),
                                network=self.settings.network)
        self.parts: list[HostsChange] = []
        self.sizes: list[int] = []  # names in each part
        self.held: dict[object, Forward] = {}
        self.taken: set[int] = set()  # host ports that cannot be bound
        self.follower = Follower(self, self.settings.network, lambda text: None)
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        self.follower.close()
        assert not self._selector.get_map(), "a descriptor is still watched"
        self._selector.close()
        self.memory.close()

    def watch(self, fd: int, callback: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def step(self, timeout: float = 0.0) -> bool:
        ready = self._selector.select(timeout)
        for key, _ in ready:
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        return bool(ready)

    def tell(self, event: api.Event, lost: int = 0) -> None:
        for listener in self.listeners:
            if lost:
                listener(api.Lost(count=lost))
            listener(event)

    def stages(self) -> dict[str, int]:
        return {}

    def counters(self, name: str) -> dict[str, int]:
        return {"frames_in": 1, "drop_policy_out": 0, "drop_policy_in": 0}

    def ring_fill(self, name: str) -> tuple[int, int]:
        return 0, 7

    def buffers(self) -> dict[str, tuple[Use, Use]]:
        return {"guest_tx": (Use(total=8, returned=1, held={0: 1, 2: 3}), Use(total=2, returned=0, held={})),
                "services": (Use(total=4, returned=0, held={-1: 1}), Use(total=0, returned=0, held={}))}

    def end(self, reason: str) -> None:
        self.ending = True

    def set_log_level(self, level: str, stage: str | None = None) -> None:
        self.level = level

    def change_policy(self, rules: Iterable[str], then: Callable[[str], None]) -> None:
        found = self.settings.policy_rules(rules)
        first, told = self.policy.plan(found)

        def answered(error: str) -> None:
            if not error:
                self.policy.commit(found, first)
            then(error)

        self.ask("egress", PolicyChange(entries=told), answered)

    def forwards(self) -> list[Forward]:
        return sorted(self.held.values(), key=lambda f: (f.proto, f.host_port))

    def change_forwards(self, add: Iterable[Forward] = (), remove: Iterable[Forward] = (),
                        close_flows: bool = False, skipped: Callable[[Fault], None] = lambda fault: None) -> list[Forward]:
        add, remove = list(add), list(remove)
        there = {e: f for e, f in self.held.items() if f not in remove}
        faults = [Fault(forward=f, errno=errno.EADDRINUSE, text="the port is taken on this host") for f in add
                  if f.host_port in self.taken]
        for fault in [f for f in faults if f.forward and f.forward.optional]:
            skipped(fault)
            faults.remove(fault)
            add.remove(fault.forward)  # type: ignore[arg-type]
        faults += [Fault(forward=f, errno=errno.EEXIST, text=f"of owner {there[f.endpoint].owner}") for f in add
                   if f.endpoint in there]
        if faults:
            raise ForwardError(faults)
        self.held = there | {f.endpoint: f for f in add}
        return add

    def ask(self, name: str, ask: Ask, then: Callable[[str], None]) -> None:
        self.asks.append((name, ask, then))
        if not self.hold:
            self.answer()

    def answer(self, n: int | None = None) -> None:
        """Answer what was asked, or the first n."""
        while self.asks and n != 0:
            n = None if n is None else n - 1
            _, ask, then = self.asks.popleft()
            then(self._do(ask))

    def _do(self, ask: Ask) -> str:
        if isinstance(ask, CloseFlow):
            return "" if (ask.index, ask.gen) == (3, 4) else "that flow is gone"
        if not isinstance(ask, HostsChange):
            return ""
        self.parts.append(ask)
        self.sizes.append(len(ask.names))
        if not ask.commit:
            return ""
        parts, self.parts = self.parts, []
        try:
            self.table.change({n: [ipaddress.ip_address(x) for x in a] for p in parts for n, a in p.names.items()},
                              own=[d for p in parts for d in p.own], disown=[d for p in parts for d in p.disown])
        except ValueError as e:
            return str(e)
        return ""


class Peer:
    """A client's socket, never blocking, driven by the same thread as the server."""

    def __init__(self, session: FakeSession, path: Path) -> None:
        self.session = session
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.fspath(path))
        self.sock.setblocking(False)
        self.buffer = bytearray()
        self.closed = False

    def send(self, data: bytes) -> None:
        """All of it; the server takes its turns meanwhile."""
        end = time.monotonic() + DEADLINE
        while data:
            try:
                data = data[self.sock.send(data):]
            except BlockingIOError:
                self.session.step()
            assert time.monotonic() < end, "the server does not take it"

    def offer(self, data: bytes) -> int:
        """As much as the server takes before it has nothing to do any more."""
        sent = 0
        while True:
            try:
                sent += self.sock.send(data[sent:sent + 65536])
            except BlockingIOError:
                if not self.session.step():
                    return sent
            if sent == len(data):
                return sent

    def read(self) -> bool:
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        self.closed = self.closed or not data
        self.buffer += data
        return bool(data)

    def line(self) -> Any:
        """The next message; None if the server closed."""
        end = time.monotonic() + DEADLINE
        while b"\n" not in self.buffer:
            if self.read():
                continue
            if self.closed:
                assert not self.buffer, f"a cut line: {bytes(self.buffer)!r}"
                return None
            self.session.step(0.01)
            assert time.monotonic() < end, "no reply"
        line, _, rest = bytes(self.buffer).partition(b"\n")
        self.buffer = bytearray(rest)
        return json.loads(line)

    def idle(self) -> bool:
        """Let the server do all it can; true if nothing came."""
        while self.session.step():
            pass
        self.read()
        return not self.buffer

    def call(self, name: str, **args: Any) -> Any:
        """A reply; events before it are passed over."""
        self.send(json.dumps({"v": 1, "id": 1, "call": name, "args": args}).encode() + b"\n")
        while (got := self.line()) is not None and "event" in got:
            pass
        return got

    def result(self, name: str, **args: Any) -> Any:
        got = self.call(name, **args)
        assert got["ok"], got
        return got["result"]

    def error(self, name: str, **args: Any) -> tuple[str, str]:
        got = self.call(name, **args)
        assert not got["ok"], got
        return got["error"]["code"], got["error"]["text"]

    def close(self) -> None:
        self.sock.close()


class Server:
    def __init__(self, session: FakeSession, served: ControlApi) -> None:
        self.session, self.api = session, served
        self.peers: list[Peer] = []

    def peer(self) -> Peer:
        self.peers.append(Peer(self.session, self.api.listening.path))
        return self.peers[-1]


@contextmanager
def serving(path: Path, **settings: Any) -> Iterator[Server]:
    """A control API on a socket at `path`, with no name in the directory of sessions."""
    session = FakeSession(**settings)
    served = ControlApi(session, name=path.stem, path=str(path))  # type: ignore[arg-type]
    server = Server(session, served)
    try:
        yield server
    finally:
        served.close()
        for peer in server.peers:
            peer.close()
        session.close()
