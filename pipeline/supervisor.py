"""The supervisor: makes a session's memory, starts its stages, watches them, ends them. Never sees a frame.

One loop, one wait: control sockets, pidfds and whatever the caller added (signals, the guest's process) are
watched together with the nearest deadline. The conversation is drawn in pipeline/messages.py.

Memory is made by POSIX shared memory with a name that is gone again before the next line runs: what is left is
descriptors, so that nothing outlives the last process, however it ends. The supervisor keeps every descriptor
it granted (rings, doorbells, link): a successor of a dead stage will need them.

Start:  all stages are spawned at once, sinks first; each phase (Hello, Ready, Running) has a deadline.
Cancel: one stage after the other, sources first, each drained within a deadline; then SIGTERM, then SIGKILL.
        Once a stage is dead, what feeds it can no longer drain: then all are cancelled at the same time.
"""
from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from pipeline import api, dumps, logs, tap_offloads
from pipeline.auto_forwards import UNSEEN, Follower
from pipeline.config import ConfigError, Settings, stage_configs
from pipeline.forwards import Fault, Forward, ForwardError
from pipeline.listeners import Change, Listeners
from pipeline.messages import (
    PACKET_MAX,
    VERSION,
    Answer,
    Ask,
    Cancel,
    Channel,
    Configure,
    End,
    Ended,
    Exit,
    Failed,
    Hello,
    Leased,
    Leave,
    Level,
    Link2Change,
    LinkBroken,
    LinkChange,
    LogLevel,
    Message,
    MessageError,
    Ping,
    PolicyChange,
    Pong,
    Ready,
    Refused,
    Running,
    Seat,
    Start,
    encode,
)
from pipeline.policy import PolicyBook
from pipeline.processors import processors
from pipeline.seats import Seats
from pipeline.sockets import widen
from pipeline.topology import TOPOLOGY, Feature, Stage, Topology
from pipeline.units import LinkKind
from pipeline.watchdog import Watchdog
from shm._dataplane import lib
from shm.arena import Arena, Use
from shm.cell import Session as CellTable
from shm.cell import counters_of
from shm.flows import Flows
from shm.memory import SharedObject
from shm.names import Names
from shm.ring import Ring

if TYPE_CHECKING:
    from pipeline.second_nic import SecondNic

_Object = TypeVar("_Object", bound=SharedObject)
PING_GROUP_RANGE = "net.ipv4.ping_group_range"


class Link(Struct, frozen=True, kw_only=True):
    """The guest's side. fd: duplicated by the session; the caller keeps its own. -1: nobody is there yet, see
    Session.set_link()."""

    fd: int
    kind: LinkKind  # when the peer of a stream or SOCK_SEQPACKET socket closes, Session.on_link_end is called
    vnet: bool  # a 12-byte virtio-net header before each frame, and offloads
    unfinished: bool = False  # frames may lack the header that they had, as libkrun's do (csrc/rn_unfinished.h)
    whole: bool = False  # super-frames of TCP go to the guest as they are, without a header
    name: str = "guest"  # for the capture file
    tables: Mapping[str, int] = {}  # the guest's own of its sockets, if it can be looked into (auto_forwards.py); likewise


class Deadlines(Struct, frozen=True, kw_only=True):
    """Seconds."""

    hello: float = 30.0  # starting an interpreter, on a busy machine: an end is seen at once, this is for what hangs
    ready: float = 15.0
    running: float = 15.0
    answer: float = 15.0  # to something asked of a running stage
    drain: float = 1.0  # a stage, from Cancel to its end
    drain_failed: float = 0.3  # the same, when a stage is dead already
    term: float = 3.0  # from SIGTERM to SIGKILL


class StageEnd(Struct, frozen=True, kw_only=True):
    """How a stage ended."""

    pid: int
    status: int | None  # exit code, or minus the signal, as subprocess has it; None: started by hand, not ours to know
    reason: str
    counters: dict[str, int]  # all of the stage's, as last published
    cpu_s: float  # user + system
    frames_left: int  # descriptors in its input rings when all had ended


class Result(Struct, frozen=True, kw_only=True):
    code: Exit
    reason: str
    stages: dict[str, StageEnd]


class SessionError(Exception):
    """The session could not start, or a stage broke it. `code` is an Exit."""

    def __init__(self, code: Exit, text: str) -> None:
        super().__init__(text)
        self.code = code


class State(enum.Enum):
    """What the supervisor knows of a stage (drawing: pipeline/messages.py)."""

    SPAWNED = enum.auto()
    GREETED = enum.auto()
    CONFIGURED = enum.auto()
    READY = enum.auto()
    STARTING = enum.auto()
    RUNNING = enum.auto()
    CANCELLED = enum.auto()
    ENDED = enum.auto()  # said so; the process may be there still
    GONE = enum.auto()  # reaped
    VACANT = enum.auto()  # no process: its successor is due, or is started by hand (pipeline/seats.py)


# What a stage may say in a state, and the state that follows.
MOVES: dict[State, dict[type[Message], State]] = {
    State.SPAWNED: {Hello: State.GREETED, Failed: State.ENDED, Ended: State.ENDED},
    State.GREETED: {Failed: State.ENDED, Ended: State.ENDED},
    State.CONFIGURED: {Ready: State.READY, Failed: State.ENDED, Ended: State.ENDED},
    State.READY: {Failed: State.ENDED, Ended: State.ENDED, Pong: State.READY},
    State.STARTING: {Running: State.RUNNING, Failed: State.ENDED, Ended: State.ENDED, Pong: State.STARTING},
    State.RUNNING: {Failed: State.ENDED, Ended: State.ENDED, Pong: State.RUNNING, Answer: State.RUNNING,
                    Leased: State.RUNNING, Refused: State.RUNNING, LinkBroken: State.RUNNING},
    # a Cancel may cross what the stage said before it read it
    State.CANCELLED: {Hello: State.CANCELLED, Ready: State.CANCELLED, Running: State.CANCELLED,
                      Failed: State.ENDED, Ended: State.ENDED, Pong: State.CANCELLED, Answer: State.CANCELLED,
                      Leased: State.CANCELLED, Refused: State.CANCELLED, LinkBroken: State.CANCELLED},
    State.ENDED: {},
    State.GONE: {},
    State.VACANT: {},
}


def describe_status(status: int | None) -> str:
    """`exit code 1`, `signal 9 (SIGKILL)`."""
    if status is None:
        return "its process ended"
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


class Child:
    """A stage process as the supervisor has it."""

    def __init__(self, decl: Stage, row: int) -> None:
        self.decl, self.row = decl, row
        self.state = State.SPAWNED
        self.generation = 1
        self.pid = 0  # of the last process
        self.ours = False  # a child process of ours; else it was started by hand
        self.pidfd = -1
        self.channel: Channel | None = None
        self.said: Ended | Failed | None = None
        self.status: int | None = None
        self.cpu_s = 0.0
        self.pongs = 0
        self.hung = ""  # why it was killed, if it was the watchdog that did
        self.asks: deque[tuple[Ask, tuple[int, ...], Callable[[str], None]]] = deque()  # the first is under way
        self.has: dict[str, int] = {}  # which of the links, in the order they were set, it was given last: by name

    @property
    def alive(self) -> bool:
        return self.pid != 0 and self.state not in (State.GONE, State.VACANT)


class Memory:
    """All shared objects of a session, laid out by the topology."""

    def __init__(self, topo: Topology) -> None:
        self._all: list[SharedObject] = []
        self.rings: dict[str, Ring] = {}
        try:
            self.session = self._keep(CellTable.create(len(topo.stages)))
            self.arena = self._keep(Arena.create([(s.small, s.large) for s in topo.stages]))
            self.arena.detach()  # frames are none of the supervisor's business
            self.flows = self._keep(Flows.create(topo.flows, struct.unpack("QQ", os.urandom(16))))  # `secrets` maps OpenSSL, 3 MiB
            self.names = self._keep(Names.create())
            for ring in topo.rings:
                self.rings[ring.name] = self._keep(Ring.create(ring.slots, name=f"ring {ring.name}"))
        except OSError as e:
            self.close()
            raise SessionError(Exit.RUNTIME, f"shared memory: {e.strerror}; is /dev/shm full or missing?") from e
        except BaseException:
            self.close()
            raise

    def _keep(self, made: _Object) -> _Object:
        self._all.append(made)
        return made

    def close(self) -> None:
        for made in self._all:
            made.destroy()


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Orphans below us are our children meanwhile."""
    was = lib.rn_os_subreaper(1)
    try:
        yield
    finally:
        if was == 0:
            lib.rn_os_subreaper(0)


class Signals:
    """Signals as events: handlers only queue, the loop asks. `with Signals(...) as s: session.watch(s.fileno(), ...)`.

    One that was ignored stays so (nohup, a shell's background job). Main thread only. Restores the old handlers.
    """

    def __init__(self, *wanted: signal.Signals) -> None:
        self._wanted = wanted
        self._queue: list[signal.Signals] = []

    def __enter__(self) -> Signals:
        self._r, self._w = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._r.setblocking(False)
        self._w.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._w.fileno(), warn_on_full_buffer=False)
        self._old = {s: signal.signal(s, lambda n, _: self._queue.append(signal.Signals(n))) for s in self._wanted
                     if signal.getsignal(s) != signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for s, old in self._old.items():
            signal.signal(s, old)
        signal.set_wakeup_fd(self._old_fd)
        self._r.close()
        self._w.close()

    def fileno(self) -> int:
        return self._r.fileno()

    def take(self) -> list[signal.Signals]:
        """Those that came since the last call, oldest first."""
        try:
            while self._r.recv(4096):
                pass
        except BlockingIOError:
            pass
        got, self._queue[:] = self._queue[:], []
        return got


class Session:
    """One guest's pipeline. As a library: `with Session(settings, link=Link(...)) as s: ... s.poll(0.1) ...`.

    The block begins with every stage running (SessionError if that fails) and ends with none. start() must be
    called by a thread that lives as long as the session: the stages die with it (PR_SET_PDEATHSIG).
    """

    def __init__(self, settings: Settings, *, link: Link, nic2: SecondNic | None = None, topology: Topology = TOPOLOGY,
                 deadlines: Deadlines = Deadlines(), log: Callable[[str], None] | None = None,
                 warn: Callable[[str], None] | None = None, name: str = "") -> None:
        """name: what the session is called in commands that are printed."""
        self.settings = settings
        self._busy_wait_us = settings.busy_wait if processors() >= 2 else 0
        self.name = name
        self.link = link
        parts = {Feature.NIC1, Feature.NIC2} if nic2 is not None else {Feature.NIC1}
        self.topology = topology.only(frozenset(parts)).validate(max_stages=8)
        self.deadlines = deadlines
        self._log = log or (lambda text: None)
        self._warn = warn or (lambda text: print(f"ringnet: {text}", file=sys.stderr))
        self.children = [Child(s, row) for row, s in enumerate(self.topology.stages)]
        self.memory: Memory | None = None
        self.result: Result | None = None
        self.started_at = 0.0  # CLOCK_MONOTONIC, s
        self._selector = selectors.DefaultSelector()
        self._failure: tuple[Exit, str] | None = None
        self._request: tuple[Exit, str] | None = None
        self._up = False
        self._hurry = False
        self._stopping = False
        self._bells: list[int] = []
        self._extras: dict[str, int] = {}
        self._links: dict[str, int] = {}  # how often the links "link" and "link2" were set
        self._listeners = Listeners()
        self._dns: socket.socket | None = None
        self._link_end: select.epoll | None = None
        self._uso = False  # the guest's link is a tap that takes UDP super-frames, and is asked for them
        self._asked = 0
        self.follower = Follower(self, settings.network, self._warn)
        self._configs: dict[str, dict[str, Any]] = {}
        self.policy = PolicyBook(settings.policy_rules())
        self._levels: dict[str, Level] = {}  # set while it runs, by stage; "": all
        self.info: Callable[[str], None] | None = None  # where `info` goes if it is asked for while the session runs
        self.impairments = {i.place: (text, i) for text, i in zip(settings.impair, settings.impairments(), strict=True)}
        self.seats = Seats(self, settings.hold, settings.restarts)
        self.watchdog = Watchdog(self, settings.watchdog)
        self.nic2 = nic2
        if nic2 is not None:
            nic2.attach(self)
        # The guest's side closed its link, or broke it; why, and the exit code if nothing else can be done.
        self.on_link_end: Callable[[str, Exit], None] = self.end
        self._link_news: list[str] = []
        self.listeners: list[Callable[[api.Event], None]] = []  # told what happens, by whoever makes it happen

    # -- as a context

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.close()

    # -- what the outside may know

    def child(self, name: str) -> Child:
        return self.children[self.topology.row(name)]

    def stages(self) -> dict[str, int]:
        """Process ids by stage name, of those that live."""
        return {c.decl.name: c.pid for c in self.children if c.alive}

    def counters(self, name: str) -> dict[str, int]:
        """A stage's counters (its own and those all have) as last published; zeros included."""
        if self.memory is None:
            return dict(self.result.stages[name].counters) if self.result and name in self.result.stages else \
                dict.fromkeys((c.name for c in counters_of(name)), 0)
        return self.memory.session.counters(self.topology.row(name), name)

    def ring_fill(self, name: str) -> tuple[int, int]:
        """(descriptors waiting, descriptors ever) of a ring."""
        assert self.memory is not None, "session is closed"
        stat = self.memory.rings[name].stat()
        return stat.fill, stat.tail

    def buffers(self) -> dict[str, tuple[Use, Use]]:
        """Frame buffers, small and large, by the stage they belong to. The arena is mapped for as long as that takes."""
        assert self.memory is not None, "session is closed"
        with Arena.look(self.memory.arena.fd, self.memory.arena.size) as arena:
            return {s.name: arena.usage(row) for row, s in enumerate(self.topology.stages) if s.small or s.large}

    # -- the loop

    def watch(self, fd: int, callback: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        """Call back when fd is readable (or closed by its peer), during poll(), start() and stop(). events:
        selectors.EVENT_*; watching again changes them."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        if fd in (self._selector.get_map() or {}):  # None: the session is over, and watches nothing any more
            self._selector.unregister(fd)

    def end(self, reason: str, code: Exit = Exit.OK) -> None:
        """Ask for the end: poll() returns False from now on. The first call counts."""
        if self._request is None:
            self._request = (code, reason)

    @property
    def ending(self) -> bool:
        """Asked to end, or broken."""
        return self._request is not None or self._failure is not None

    def hurry(self) -> None:
        """No patience any more (a second ^C): drains under way and to come end at once."""
        self._hurry = True

    def poll(self, timeout: float | None = None) -> bool:
        """Wait for events at most so many seconds and handle them. False: the session is over, call stop()."""
        if self._failure is None and self._request is None:
            self._step(timeout)
        return self._failure is None and self._request is None

    def run(self) -> Result:
        """Serve until something ends the session."""
        while self.poll():
            pass
        return self.stop()

    def _step(self, timeout: float | None) -> None:
        for due in (self.seats.due(), self.watchdog.due()) if not self.ending else ():
            if due is not None:
                left = max(0.0, due - time.monotonic())
                timeout = left if timeout is None else min(timeout, left)
        events = self._selector.select(timeout)
        # The caller's watches (signals) before the stages': when a signal went to the whole process group, a
        # stage that ended of it is no accident. Looked at anew, because our own signal may have been delivered only
        # on the way out of the wait that reports the stage's end.
        for key, _ in self._selector.select(0) if events else ():
            if not isinstance(key.data, Child) and self._selector.get_map().get(key.fd) is key:
                key.data()
        for key, _ in events:
            if isinstance(key.data, Child):
                if key.data.channel is not None:
                    self._hear(key.data)
                if key.fd == key.data.pidfd and key.data.alive:
                    self._reap(key.data)
        while self._link_news:
            self.on_link_end(self._link_news.pop(), Exit.RUNTIME)
        if not self.ending:
            self.seats.tick()
            if self._up and not self._stopping:
                self.watchdog.tick()

    def _hear(self, child: Child) -> None:
        """Read all a stage said."""
        while child.channel is not None:
            try:
                got = child.channel.recv()
            except BlockingIOError:
                return
            except MessageError as e:
                self._fail(child, str(e))
                got = None
            if got is None:  # EOF: its pidfd will tell the rest
                self._drop_channel(child)
                return
            message = got[0]
            after = MOVES[child.state].get(type(message))
            if after is None:
                self._fail(child, f"said {type(message).__name__} while {child.state.name.lower()}")
                return
            self._log(f"{child.decl.name}: {type(message).__name__}")
            if isinstance(message, Hello) and message.version != VERSION:
                self._fail(child, f"speaks control version {message.version}, not {VERSION}: mixed installation")
            was, child.state = child.state, after
            if after is not was:
                self._changed(child)
                if self._up and self._failure is None:
                    self._go_on(child)
            if isinstance(message, Answer):
                self._answered(child, message)
            elif isinstance(message, Leased):
                self.tell(api.LeaseGiven(address=message.address, mac=message.mac, hostname=message.hostname,
                                         seconds=message.seconds), lost=message.lost)
            elif isinstance(message, Refused):
                self.tell(api.FlowRefused(proto=message.proto, guest=message.guest, guest_port=message.guest_port,
                                          peer=message.peer, peer_port=message.peer_port, reason=message.reason,
                                          rule=self.policy.text(message.rule)),
                          lost=message.lost)
            elif isinstance(message, LinkBroken):
                if child.state is State.RUNNING:
                    self._link_news.append(message.reason)  # acted on when all was heard
            elif isinstance(message, (Ended, Failed)):
                child.said = message
                if was is not State.CANCELLED:
                    self._ended_unasked(child, was, message)
            elif isinstance(message, Pong):
                child.pongs = message.seq

    def _ended_unasked(self, child: Child, was: State, message: Ended | Failed) -> None:
        name = child.decl.name
        if self._request and isinstance(message, Ended):
            return  # a SIGTERM to the whole process group: it ended before it was asked to
        if self._up and (child.decl.restart or name in self.seats.held or self._is_optional(child)):
            return  # what becomes of its seat is seen when the process is gone
        if isinstance(message, Failed):
            if was in (State.SPAWNED, State.GREETED, State.CONFIGURED, State.READY, State.STARTING):
                self._set_failure(Exit.NOT_READY, f"stage {name} did not start: {message.error}")
            else:
                self._set_failure(Exit.STAGE_FAILED, f"stage {name} failed: {message.error}; {self._last(child)}")
        else:
            self._set_failure(Exit.STAGE_DIED, f"stage {name} ended: {message.reason}; {self._last(child)}")

    def _last(self, child: Child) -> str:
        seen = {n: v for n, v in self.counters(child.decl.name).items() if v}
        return "last counters: " + (", ".join(f"{n}={v}" for n, v in seen.items()) or "all zero")

    def _is_optional(self, child: Child) -> bool:
        """Does the session go on without it? NIC2's, once all were running."""
        return self._up and child.decl.feature is Feature.NIC2

    def _optional_failed(self, child: Child, reason: str) -> None:
        if self.nic2 is not None and self.nic2.running:  # else it is being started or stopped, and that is looked after
            self.nic2.failed(f"{reason}; {self._last(child)}")

    def _fail(self, child: Child, why: str) -> None:
        if self._is_optional(child):
            self._optional_failed(child, f"stage {child.decl.name}: {why}")
            return
        code = Exit.STAGE_FAILED if self._up else Exit.NOT_READY
        self._set_failure(code, f"stage {child.decl.name}: {why}")

    def _set_failure(self, code: Exit, reason: str) -> None:
        if self._failure is None:
            self._failure = (code, reason)

    def _reap(self, child: Child) -> None:
        if child.ours:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0:
                return
            child.status = os.waitstatus_to_exitcode(status)
            child.cpu_s += usage.ru_utime + usage.ru_stime
        else:  # started by hand: not our child, its pidfd tells no more than its end
            child.status = None
        was, child.state = child.state, State.GONE
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        child.pidfd = -1
        self._drop_channel(child)
        self._log(f"{child.decl.name}: gone, {describe_status(child.status)}")
        if self._up and not self.ending and not self._stopping and self._accident(child):
            self.dump(f"stage {child.decl.name} is gone: {self._how(child)}")
        if self._up and not self.ending and not self._stopping and self.seats.vacated(child, self._how(child)):
            child.state = State.VACANT
        self._changed(child)
        if child.state is State.VACANT or self._request and child.status == -signal.SIGTERM:
            return  # a SIGTERM: as above, before it had a handler
        if self._is_optional(child):
            if was is not State.CANCELLED and not self._stopping and not self.ending:
                self._optional_failed(child, f"stage {child.decl.name} ended: {self._how(child)}")
        elif was is State.ENDED and child.said is not None and not self._request and not self._stopping:
            code = Exit.STAGE_FAILED if isinstance(child.said, Failed) else Exit.STAGE_DIED
            verb = "failed" if isinstance(child.said, Failed) else "ended"
            self._set_failure(code, f"stage {child.decl.name} {verb}: {self._how(child)}"
                              f"{self.seats.exhausted(child)}; {self._last(child)}")
        elif was is State.RUNNING:
            self._set_failure(Exit.STAGE_DIED, f"stage {child.decl.name} died: {self._how(child)}"
                              f"{self.seats.exhausted(child)}; {self._last(child)}")
        elif was not in (State.CANCELLED, State.ENDED):
            self._set_failure(Exit.NOT_READY, f"stage {child.decl.name} ended before it was running"
                              f" ({was.name.lower()}): {describe_status(child.status)}")

    @staticmethod
    def _how(child: Child) -> str:
        """How a stage that is gone ended, by its own last word if it had one."""
        match child.said:
            case Ended(reason=text) | Failed(error=text):
                return text
        return child.hung or describe_status(child.status)

    @staticmethod
    def _accident(child: Child) -> bool:
        """Did it end without a last word, or with a complaint?"""
        return not isinstance(child.said, Ended)

    def dump(self, reason: str) -> None:
        """Write what is in shared memory to --postmortem's directory, if there is one."""
        if not self.settings.postmortem:
            return
        try:
            path = dumps.write(self, self.settings.postmortem, reason)
        except OSError as e:
            self._warn(f"--postmortem {self.settings.postmortem}: {e.strerror}")
        else:
            self.say(f"{reason}; what is left is in {path}: ringnet postmortem {path}")

    # -- successors (pipeline/seats.py)

    def say(self, text: str) -> None:
        """Something people want to know while a session runs."""
        if not self.settings.quiet:
            self._warn(text)

    def give_up(self, code: Exit, reason: str) -> None:
        """End the session: it is broken."""
        self._set_failure(code, reason)

    def spawn(self, child: Child) -> None:
        """Start a stage's successor; what comes next follows its messages."""
        try:
            self._spawn(child)
        except SessionError as e:
            self._set_failure(Exit(e.code), str(e))
            return
        self._changed(child)

    def seat(self, child: Child, ours: socket.socket, pid: int, pidfd: int) -> None:
        """A process that is there already becomes a stage's successor."""
        child.ours = False
        self._watch_child(child, ours, pid, pidfd)
        self._changed(child)

    def leave(self, child: Child) -> None:
        """Ask a stage to end between two bursts, if there is one."""
        if child.alive and child.state is not State.ENDED:
            child.state = State.CANCELLED
            self._send(child, Leave())

    def _go_on(self, child: Child) -> None:
        """A successor is one step further."""
        match child.state:
            case State.GREETED:
                self._configure(child, self._configs[child.decl.name])
            case State.READY:
                child.state = State.STARTING
                self._send(child, Start())
            case State.RUNNING:
                if (level := self._levels.get(child.decl.name, self._levels.get(""))) is not None:
                    self.ask(child.decl.name, LogLevel(level=level), lambda error: None)
                if child.decl.name == "egress":
                    for ask, fds in self._listeners.again():
                        self.ask(child.decl.name, ask, lambda error: self._warn(error) if error else None, fds)
                for which in (w for w, now in self._links.items() if w in child.decl.fds and child.has.get(w) != now):
                    child.has[which] = self._links[which]  # it came while this stage was on its way
                    self.ask(child.decl.name, *self._late(child, which))
                self.seats.runs(child)

    def _late(self, child: Child, which: str) -> tuple[Ask, Callable[[str], None], tuple[int, ...]]:
        def then(error: str) -> None:
            if error and child.channel is not None:
                self._fail(child, f"cannot take the guest's link: {error}")

        ask, fds = self._link_ask(which)
        return ask, then, fds

    def _drop_channel(self, child: Child) -> None:
        if child.channel is not None:
            self._selector.unregister(child.channel.fileno())
            child.channel.close()
            child.channel = None
        while child.asks:
            child.asks.popleft()[2](f"stage {child.decl.name} is ending")

    def _changed(self, child: Child) -> None:
        self.tell(api.StageChanged(stage=child.decl.name, state=child.state.name.lower(), pid=child.pid))

    def tell(self, event: api.Event, lost: int = 0) -> None:
        """Give an event to all listeners. lost: so many before it are missing."""
        for listener in self.listeners:
            if lost:
                listener(api.Lost(count=lost))
            listener(event)

    def ask(self, name: str, ask: Ask, then: Callable[[str], None], fds: Iterable[int] = ()) -> None:
        """Ask a running stage for something; `then` gets "" when it is done, or why not. One is under way a stage, the
        others wait here: a stage's socket never fills up. Descriptors must stay open until then."""
        child = self.child(name)
        if child.channel is None or child.state is not State.RUNNING:
            then(f"stage {name} is {child.state.name.lower()}")
            return
        self._asked += 1
        child.asks.append((msgspec.structs.replace(ask, seq=self._asked), tuple(fds), then))
        if len(child.asks) == 1:
            self._send(child, child.asks[0][0], child.asks[0][1])

    def _answered(self, child: Child, answer: Answer) -> None:
        if not child.asks or child.asks[0][0].seq != answer.seq:
            self._fail(child, f"answered {answer.seq}, which it was not asked")
            return
        _, _, then = child.asks.popleft()
        if child.asks:
            self._send(child, child.asks[0][0], child.asks[0][1])
        then(answer.error)

    def forwards(self) -> list[Forward]:
        """The forwards there are, by protocol and port."""
        return self._listeners.forwards()

    def change_forwards(self, add: Iterable[Forward] = (), remove: Iterable[Forward] = (),
                        close_flows: bool = False, skipped: Callable[[Fault], None] = lambda fault: None) -> list[Forward]:
        """Add and remove forwards, all or none, and return when it is so: what was added, as it is (with the port that
        was free for port 0). A port in both lists passes over without a gap. close_flows: connections of removed forwards
        are reset; otherwise they live on. skipped: told of each optional one that could not be had. For rules `auto` beside
        them, and events: follower.change.

        Waits for egress, which takes well under a millisecond a message of 60. Raises ForwardError with every reason.
        """
        change = self._listeners.prepare(add, remove)
        self._apply(change, close_flows=close_flows)
        for fault in change.skipped:
            skipped(fault)
        return change.forwards

    def change_policy(self, rules: Iterable[str], then: Callable[[str], None]) -> None:
        """Other rules instead of those of --policy, for what begins from now on; `then` gets "" when it is so, or why not.
        Raises PolicyError: nothing is asked then."""
        found = self.settings.policy_rules(rules)
        first, entries = self.policy.plan(found)

        def answered(error: str) -> None:
            if not error:
                self.policy.commit(found, first)
                self._configs["egress"]["policy"] = self.policy.entries()  # for a successor
            then(error)

        self.ask("egress", PolicyChange(entries=entries), answered)

    def _bind_forwards(self) -> Change:
        """The sockets of -t and -u, early: who may not have them shall not have to wait. Raises SessionError."""
        self.follower.see(self.link.tables)
        for auto in self.settings.auto_forwards():
            if self.follower.unseen(auto):
                raise SessionError(Exit.USAGE, f"--{auto.proto}-ports {auto.spec}: {UNSEEN}")
        try:
            change = self._listeners.prepare(self.settings.forwards(), ())
        except ForwardError as e:
            raise SessionError(Exit.RUNTIME, f"cannot forward {e}") from e
        wanted = {f.proto for f in self.settings.forwards()}
        if missing := wanted - {f.proto for f in change.forwards}:
            raise SessionError(Exit.RUNTIME, f"cannot forward any {' or '.join(sorted(missing))} port: none is free")
        return change

    def _apply(self, change: Change, *, close_flows: bool) -> None:
        """Tell egress. Raises ForwardError."""
        try:
            for ask, fds in change.messages(close_flows=close_flows):
                if error := self._ask_and_wait("egress", ask, fds):
                    raise ForwardError([Fault(forward=None, errno=0, text=error)])
        except BaseException:
            change.abort()
            raise
        change.commit()

    def _ask_and_wait(self, name: str, ask: Ask, fds: Iterable[int] = ()) -> str:
        """As ask(), but return the answer. Only this stage is listened to meanwhile: no callback of another's runs."""
        answers: list[str] = []
        self.ask(name, ask, answers.append, fds)
        child, deadline = self.child(name), time.monotonic() + self.deadlines.answer
        while not answers:
            left = deadline - time.monotonic()
            if child.channel is None or left <= 0 or not child.channel.wait(left):
                self._fail(child, f"does not answer {type(ask).__name__}")
                return f"stage {name} does not answer"
            self._hear(child)
        return answers[0]

    def set_log_level(self, level: Level, stage: str | None = None) -> None:
        """What is said on standard error from now on, by all or by one: `info` and `debug` tell each step of the stages."""
        if stage in (None, "supervisor"):
            self._log = self.info or self._warn if level in ("info", "debug") else lambda text: None
        self._levels = ({"": level} if stage is None else self._levels | {stage: level})
        for child in self.children:
            if child.state is State.RUNNING and stage in (None, child.decl.name):
                self.ask(child.decl.name, LogLevel(level=level), lambda error: None)

    def _send(self, child: Child, message: Message, fds: Iterable[int] = ()) -> None:
        if child.channel is None:
            return
        try:
            child.channel.send(message, list(fds))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is ending: its pidfd says so, and what it said last is read first
        except BlockingIOError:
            self._fail(child, "does not read its control messages")

    # -- one stage alone, for the second NIC (pipeline/second_nic.py)

    def warn(self, text: str) -> None:
        self._warn(text)

    def attend(self, child: Child, *, ended: bool) -> None:
        """Take what a stage said, and, if its pidfd told so, its end."""
        if child.channel is not None:
            self._hear(child)
        if ended and child.alive:
            self._reap(child)

    def spawn_again(self, child: Child) -> None:
        """Start a successor of a stage that is gone, with the same rings; its messages move it on. Raises SessionError."""
        child.generation += 1
        self._spawn(child)
        self._changed(child)

    def send(self, child: Child, message: Message) -> None:
        self._send(child, message)

    def signal(self, child: Child, signum: int) -> None:
        self._signal(child, signum)

    def granted(self, name: str) -> int:
        """A descriptor that stages are granted, or -1."""
        return self._extras.get(name, -1)

    def grant(self, name: str, fd: int) -> None:
        """Have another descriptor for it, ours to close from here on; -1: none."""
        if (old := self._extras.pop(name, -1)) >= 0:
            os.close(old)
        if fd >= 0:
            self._extras[name] = fd

    # -- start

    def start(self) -> None:
        """Make memory, start every stage, return when all are running. Raises SessionError; then nothing is left."""
        forwards: Change | None = None
        try:
            self._prepare()
            forwards = self._bind_forwards()
            sinks_first = [c for c in self.children[::-1] if c.decl.name not in self.seats.held]
            for child in self.children:
                if child not in sinks_first:
                    child.generation, child.state = 0, State.VACANT
            d = self.deadlines
            self._spawn_all(sinks_first)
            self._until(State.GREETED, d.hello, "Hello", sinks_first)
            dns_path = self._dns.getsockname()[1:].decode() if self._dns else ""
            try:
                self._configs = configs = stage_configs(
                    self.settings, link_kind=self.link.kind, vnet=self.link.vnet, unfinished=self.link.unfinished,
                    whole=self.link.whole, dns_path=dns_path,
                    second=self.nic2.stage_facts() if self.nic2 is not None else None,
                    uso=self._uso)
            except ConfigError as e:  # a proxy's name does not resolve
                raise SessionError(Exit.RUNTIME, str(e)) from e
            for child in sinks_first:
                self._configure(child, configs[child.decl.name])
            self._until(State.READY, d.ready, "Ready", sinks_first)
            for child in sinks_first:
                child.state = State.STARTING
                self._send(child, Start())
                self._until(State.RUNNING, d.running, "Running", [child])
            if "egress" in self.seats.held:
                forwards.commit()  # whoever takes the seat is told of them
            else:
                try:
                    self._apply(forwards, close_flows=False)
                except ForwardError as e:
                    raise SessionError(*(self._failure or (Exit.RUNTIME, f"cannot forward: {e}"))) from e
            self._up = True
            self.started_at = time.monotonic()
            try:
                self.follower.change(follow=self.settings.auto_forwards())
            except ForwardError as e:
                raise SessionError(*(self._failure or (Exit.RUNTIME, f"cannot forward: {e}"))) from e
            if self.nic2 is not None:
                self.nic2.started()
        except BaseException:
            if forwards is not None:
                forwards.abort()
            self.stop()
            self.close()
            raise

    def _until(self, state: State, seconds: float, what: str, children: list[Child] | None = None) -> None:
        """Wait until the stages are there. Raises SessionError."""
        deadline = time.monotonic() + seconds
        children = self.children if children is None else children
        while True:
            if self._failure:
                raise SessionError(*self._failure)
            late = [c.decl.name for c in children if c.state is not state]
            if not late:
                return
            if self._request:
                raise SessionError(*self._request)
            left = deadline - time.monotonic()
            if left <= 0:
                self._set_failure(Exit.NOT_READY, f"stage {', '.join(late)}: no {what} within {seconds:g} s")
                continue
            self._step(left)

    def _prepare(self) -> None:
        self.memory = Memory(self.topology)
        for _ in self.children:
            fd = lib.rn_bell_new()
            if fd < 0:
                raise SessionError(Exit.RUNTIME, f"doorbell: {os.strerror(-fd)}")
            self._bells.append(fd)
        if self.link.fd >= 0:
            self._take_link(self.link.fd)
        if self.nic2 is not None:
            self._extras |= self.nic2.grants()
        wanted = {name for c in self.children for name in c.decl.fds}
        if "pcap" in wanted and self.settings.pcap:
            self._extras["pcap"] = self._open_pcap(self.settings.pcap)
        for ours, theirs in (("flows_to_tx", "flows_tx"), ("flows_to_rx", "flows_rx")):
            if {ours, theirs} <= wanted:  # sockets of promoted flows: csrc/rn_fdpass.h
                for name, end in zip((ours, theirs), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), strict=True):
                    self._extras[name] = end.detach()
        if {"estate_put", "estate_take"} <= wanted:  # what a stage left to its successor lies in it: csrc/rn_estate.h
            for name, end in zip(("estate_put", "estate_take"), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
                                 strict=True):
                self._extras[name] = end.detach()
        if "dns_listen" in wanted:
            self._dns = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._dns.bind("")  # the kernel picks a free abstract name (unix(7), autobind)
            self._dns.listen(64)
            self._extras["dns_listen"] = self._dns.fileno()
        if "raw_icmp" in wanted and (raw := self._raw_icmp()) >= 0:
            self._extras["raw_icmp"] = raw

    def _take_link(self, fd: int) -> int:
        """A descriptor of ours of the guest's link, made ready; watched for its end if it is a socket."""
        self._extras["link"] = link = os.dup(fd)
        os.set_blocking(link, False)
        if self.link.kind == "tap":
            if self.settings.offloads:
                self._uso = tap_offloads.ask(link)
            else:
                tap_offloads.plain(link)
            self._extras["link_tap"] = os.dup(link)
        else:
            self._widen(link)
            self._watch_link(link)
        return link

    def _widen(self, fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            try:
                widen(sock)
            except OSError as e:
                self._warn(f"socket buffers of the guest's link stay as they are: {e.strerror}")

    def _watch_link(self, fd: int) -> None:
        """Be told of the link's end, and never of a frame: an epoll that asks for errors only, inside ours.

        For SOCK_STREAM and SOCK_SEQPACKET. A closed peer of SOCK_DGRAM cannot be seen, and a tap tells of its end as if a
        frame had come, so that whoever waits for the end would be woken by frames too.
        """
        self._link_end = end = select.epoll()
        end.register(fd, select.EPOLLRDHUP)  # EPOLLHUP and EPOLLERR are always told

        def gone() -> None:
            self.unwatch(end.fileno())
            self.on_link_end("the guest closed the link", Exit.OK)

        self.watch(end.fileno(), gone)

    def _drop_link(self) -> None:
        if self._link_end is not None:
            self.unwatch(self._link_end.fileno())
            self._link_end.close()
            self._link_end = None
        if (fd := self._extras.pop("link", -1)) >= 0:
            os.close(fd)

    def set_link(self, fd: int = -1) -> None:
        """Another guest's side, of the same kind of link, while the session runs: a socket, of which it takes a duplicate,
        or none. Returns when both stages have it; frames of the old link that wait in rings go to the new one.

        Raises SessionError if a stage cannot take it; there is no link then.
        """
        self._drop_link()
        if fd >= 0:
            self._take_link(fd)
        for name, error in self._link_changed("link"):
            if fd >= 0 and not self.ending:
                self.set_link()
            raise SessionError(Exit.RUNTIME, f"stage {name} cannot take the guest's link: {error}")

    def set_second_link(self, fd: int = -1) -> None:
        """As set_link(), of the second NIC."""
        link = os.dup(fd) if fd >= 0 else -1
        if link >= 0:
            os.set_blocking(link, False)
            self._widen(link)
        self.grant("link2", link)
        for name, error in self._link_changed("link2"):
            self._warn(f"stage {name} cannot take the second NIC's link: {error}")

    def _link_changed(self, which: str) -> Iterator[tuple[str, str]]:
        """Tell the stages that have this link that it is another: (stage, why not) of each that cannot take it. One that is
        dying or just started is passed over: it, or its successor, is given the link as it is when it gets so far."""
        self._links[which] = self._links.get(which, 0) + 1
        # Sinks first, as at the start: what is read may be answered at once. A link that goes is read no more first.
        for child in self.children[::-1] if which in self._extras else self.children:
            if which not in child.decl.fds or child.state is not State.RUNNING:
                continue
            child.has[which] = self._links[which]
            error = self._ask_and_wait(child.decl.name, *self._link_ask(which))
            if error and child.channel is not None:
                yield child.decl.name, error

    def _link_ask(self, which: str) -> tuple[Ask, tuple[int, ...]]:
        fd = self._extras.get(which, -1)
        change = LinkChange if which == "link" else Link2Change
        return change(present=fd >= 0), (fd,) if fd >= 0 else ()

    def _open_pcap(self, path: str) -> int:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise SessionError(Exit.RUNTIME, f"--pcap {path}: {e.strerror}") from e
        rc = lib.rn_pcap_begin(fd, self.link.name.encode(), 0)
        if rc < 0:
            os.close(fd)
            raise SessionError(Exit.RUNTIME, f"--pcap {path}: {os.strerror(-rc)}")
        return fd

    def _raw_icmp(self) -> int:
        """A raw ICMP socket if egress cannot make ping sockets and we may make a raw one; else -1."""
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
            return -1
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EPERM, errno.EPROTONOSUPPORT):
                raise
        try:
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
        except PermissionError:
            if not self.settings.quiet:
                self._warn(f"ping works to the gateway only: allow ping sockets with sysctl {PING_GROUP_RANGE}="
                           "'0 2147483647', or run as root")
            return -1
        return raw.detach()

    def _run_stage_process(self, words: list[str], fds: list[int], level: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """`python -m pipeline WORDS`, with these descriptors. Raises OSError."""
        root = str(Path(__file__).resolve().parent.parent)
        path = os.environ.get("PYTHONPATH")
        env = dict(os.environ, PYTHONPATH=f"{root}{os.pathsep}{path}" if path else root)
        env |= {logs.FORMAT_VARIABLE: self.settings.log_format, logs.SESSION_VARIABLE: self.name, logs.LEVEL_VARIABLE: level}
        # -P: the current directory must not shadow our packages. stdout is the guest command's.
        return subprocess.Popen([sys.executable, "-P", "-m", "pipeline", *words], stdin=subprocess.DEVNULL, stdout=stdout,
                                env=env, pass_fds=fds)

    def _log_level(self, child: Child) -> str:
        levels = self.settings.log_levels()
        return levels.get(child.decl.name, levels[""])

    def _spawn(self, child: Child) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = self._run_stage_process(["stage", child.decl.name, "--control-fd", str(theirs.fileno())],
                                                  [theirs.fileno()], self._log_level(child))
            except OSError as e:
                ours.close()
                raise SessionError(Exit.RUNTIME, f"cannot start stage {child.decl.name}: {e.strerror}") from e
        self._begun(child, ours, process.pid)
        process.returncode = 0  # _reap() waits for it

    def _spawn_all(self, children: list[Child]) -> None:
        """The first processes, as copies of one (pipeline/zygote.py). Raises SessionError."""
        if not children:  # every seat is held
            return
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours, _subreaper():
            control, seats = [], []
            for child in children:
                our_end, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                control.append(ours.enter_context(our_end))
                seats.append(Seat(child.decl.name, theirs.enter_context(their_end).fileno(), self._log_level(child)))
            try:
                process = self._run_stage_process(["zygote", str(os.getpid()), *map(str, seats)], [s.fd for s in seats], "warning",
                                                  subprocess.PIPE)
            except OSError as e:
                raise SessionError(Exit.RUNTIME, f"cannot start the stages: {e.strerror}") from e
            with process:
                theirs.close()
                self._wait_process(process)
                said, status = process.stdout.read().decode().strip(), process.wait()  # type: ignore[union-attr]
            if status != 0:
                if self._request:  # a SIGTERM to the whole process group
                    raise SessionError(*self._request)
                raise SessionError(Exit.NOT_READY, f"the stages did not start: {said or describe_status(status)}")
            for child, end, pid in zip(children, control, map(int, said.split()), strict=True):
                self._begun(child, end, pid)
            ours.pop_all()  # they are the children's

    def _wait_process(self, process: subprocess.Popen[bytes]) -> None:
        """Until it has ended. Raises SessionError; then it is killed."""
        deadline, pidfd, ended = time.monotonic() + self.deadlines.hello, os.pidfd_open(process.pid), []
        self.watch(pidfd, lambda: (self.unwatch(pidfd), ended.append(True)))
        try:
            while not ended:
                if stop := self._failure or self._request:
                    raise SessionError(*stop)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise SessionError(Exit.NOT_READY, f"the stages did not start within {self.deadlines.hello:g} s")
                self._step(left)
        finally:
            if not ended:
                self.unwatch(pidfd)
                process.kill()
            os.close(pidfd)

    def _begun(self, child: Child, ours: socket.socket, pid: int) -> None:
        """A stage's process is there, a child of ours."""
        child.ours = True
        placement = self.settings.placement()
        if (cpus := placement.get(child.decl.name, placement.get(""))) is not None:
            try:
                os.sched_setaffinity(pid, cpus)
            except ProcessLookupError:
                pass  # it ended already; its pidfd tells
        self._watch_child(child, ours, pid, os.pidfd_open(pid))

    def _watch_child(self, child: Child, ours: socket.socket, pid: int, pidfd: int) -> None:
        child.state, child.said, child.status, child.hung = State.SPAWNED, None, None, ""
        child.pid, child.pidfd, child.channel = pid, pidfd, Channel(ours)
        self._selector.register(ours, selectors.EVENT_READ, child)
        self._selector.register(pidfd, selectors.EVENT_READ, child)

    def _configure(self, child: Child, config: dict[str, Any]) -> None:
        """Send a stage what topology grants it, and nothing else."""
        assert self.memory is not None
        topo, mem, decl, name = self.topology, self.memory, child.decl, child.decl.name
        grants: list[tuple[str, int]] = [("session", mem.session.fd), ("arena", mem.arena.fd)]
        if decl.flows:
            grants.append(("flows", mem.flows.fd))
        if decl.names:
            grants.append(("names", mem.names.fd))
        inputs, outputs = [], []
        for ring in topo.inputs(name):
            grants.append((f"in:{ring.name}", mem.rings[ring.name].fd))
            inputs.append(End(ring=ring.name, size=mem.rings[ring.name].size, row=topo.row(ring.producer)))
        for ring in topo.outputs(name):
            grants.append((f"out:{ring.name}", mem.rings[ring.name].fd))
            outputs.append(End(ring=ring.name, size=mem.rings[ring.name].size, row=topo.row(ring.consumer),
                               role=int(ring.role)))
        for row in sorted({child.row, *(topo.row(n) for n in topo.neighbours(name))}):
            grants.append((f"bell:{row}", self._bells[row]))
        grants += [(extra, self._extras[extra]) for extra in decl.fds if extra in self._extras]
        child.has = dict(self._links)
        child.state = State.CONFIGURED
        message = Configure(
            version=VERSION, stage=name, row=child.row, generation=child.generation,
            session_size=mem.session.size, arena_size=mem.arena.size, has_part=bool(decl.small or decl.large),
            flows_size=mem.flows.size if decl.flows else 0, names_size=mem.names.size if decl.names else 0,
            names_write=decl.names == "write", inputs=tuple(inputs), outputs=tuple(outputs),
            fds=tuple(n for n, _ in grants), config=msgspec.Raw(msgspec.msgpack.encode(config)),
            impair=tuple(i for _, i in self.impairments.values() if i.stage == name),
            busy_wait_us=self._busy_wait_us)
        if (size := len(encode(message))) > PACKET_MAX:  # long lists of --policy and --no-proxy
            self._fail(child, f"its settings take {size} bytes, at most {PACKET_MAX}: make lists of options shorter")
            return
        self._send(child, message, [fd for _, fd in grants])

    def serves(self, child: Child) -> bool:
        """Is it to be at work, or on its way out of its seat?"""
        return child.state is State.RUNNING or child.state is State.CANCELLED and child.decl.name in self.seats.held

    def answers(self, child: Child) -> bool:
        """Does it still listen?"""
        return child.state is State.RUNNING

    def ping(self, name: str, seq: int) -> None:
        """Ask a stage for a Pong; child(name).pongs is then seq."""
        self._send(self.child(name), Ping(seq=seq))

    # -- end

    def stop(self) -> Result:
        """End every stage, in order, and say how it went. May be called again."""
        if self.result is not None:
            return self.result
        self._stopping = True
        d = self.deadlines
        failed = self._failure
        if failed is None and self._up and not any(c.state is State.VACANT for c in self.children):
            for child in self.children:  # sources first
                self._cancel([child], d.drain)
        self._cancel(self.children, d.drain_failed)
        if self.nic2 is not None:
            self.nic2.close()
        code, reason = failed or self._failure or self._request or (Exit.OK, "stopped")
        self.result = Result(code=code, reason=reason, stages={c.decl.name: self._stage_end(c) for c in self.children
                                                               if c.pid})
        return self.result

    def _cancel(self, children: list[Child], drain: float) -> None:
        """Cancel these at the same time, and see them gone: Cancel, SIGTERM, SIGKILL."""
        for c in children:
            if c.alive and c.state is not State.ENDED:
                c.state = State.CANCELLED
                self._send(c, Cancel(drain_ms=int(drain * 1000)))
        if self._all_gone(children, drain):
            return
        for c in children:
            if c.alive:
                self._log(f"{c.decl.name}: not drained within {drain:g} s, SIGTERM")
                # The stop word and the doorbell too: a signal just before the loop sleeps would wait for its wake.
                assert self.memory is not None
                self.memory.session.stop(c.row)
                lib.rn_bell_ring(self._bells[c.row])
                self._signal(c, signal.SIGTERM)
        if self._all_gone(children, self.deadlines.term):
            return
        for c in children:
            if c.alive:
                self._warn(f"stage {c.decl.name} did not end: SIGKILL")
                self._signal(c, signal.SIGKILL)
        if not self._all_gone(children, 60.0, patient=True):
            raise RuntimeError("a stage survives SIGKILL: stuck in the kernel")

    def _signal(self, child: Child, signum: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(child.pidfd, signum)
        except ProcessLookupError:
            pass  # ended, and will be reaped

    def _all_gone(self, children: list[Child], seconds: float, *, patient: bool = False) -> bool:
        """See the stages end. False: the deadline passed, or somebody is in a hurry."""
        deadline = time.monotonic() + seconds
        while any(c.alive for c in children):
            left = deadline - time.monotonic()
            if left < 0 or self._hurry and not patient:
                return False
            self._step(left)
        return True

    def _stage_end(self, child: Child) -> StageEnd:
        name = child.decl.name
        reason = f"failed: {self._how(child)}" if isinstance(child.said, Failed) else self._how(child)
        return StageEnd(pid=child.pid, status=child.status, reason=reason, counters=self.counters(name),
                        cpu_s=child.cpu_s,
                        frames_left=sum(self.ring_fill(r.name)[0] for r in self.topology.inputs(name)))

    def close(self) -> None:
        """Give memory and descriptors back; result and its counters stay."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        for fd in self._bells:
            os.close(fd)
        self._bells = []
        self._extras.pop("dns_listen", None)  # the socket object owns it
        if self._dns is not None:
            self._dns.close()
            self._dns = None
        self._drop_link()
        if (estate := self._extras.get("estate_take", -1)) >= 0:
            lib.rn_estate_discard(estate)  # the hosts' ends of what nobody goes on with are reset
        for fd in self._extras.values():
            os.close(fd)
        self._extras = {}
        self.follower.close()
        self._listeners.close()
        self._selector.close()
