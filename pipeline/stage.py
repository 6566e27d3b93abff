"""What all stages share: start, granted objects, rights, the standard loop, cancel.

`python -m pipeline stage NAME --control-fd N` ends up in main(). The control descriptor is one end of an
AF_UNIX SOCK_SEQPACKET pair; the conversation and its states are drawn in pipeline/messages.py.

A stage file has `Config`, `run(cfg, ctx) -> Ended`, and may have `acquire(cfg, ctx)`, which takes what needs
rights: after it the process has no capabilities and cannot gain any (no_new_privs), then run() starts.

Signals: SIGINT, SIGQUIT and SIGHUP are ignored (a terminal sends them to the whole group; the supervisor decides),
SIGTERM raises Terminated in run(). The process is killed if the supervisor's thread that forked it ends.
"""
from __future__ import annotations

import errno
import faulthandler
import importlib
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from pipeline.logs import FORMAT_VARIABLE, Log, for_stage, set_level, take_over
from pipeline.messages import (
    VERSION,
    Answer,
    Ask,
    Cancel,
    Capture,
    CaptureEnd,
    Channel,
    Configure,
    Ended,
    Failed,
    Hello,
    Leave,
    Level,
    Link2Change,
    LinkBroken,
    LinkChange,
    LogLevel,
    Message,
    MessageError,
    Pace,
    Ping,
    Pong,
    Ready,
    Running,
    StageExit,
    Start,
    Wire,
)
from pipeline.topology import TOPOLOGY
from shm._dataplane import ffi, lib
from shm.cell import counters_of
from shm.link import link
from shm.mirror import c_filter

CData = Any  # cffi has no type for a pointer

__all__ = ["Ended", "GuestLink", "StageContext", "StageError", "Terminated", "main"]


class StageError(Exception):
    """A stage cannot go on; the text goes to the supervisor as it is."""


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that a handler for errors in a stage does not swallow it."""


class Orphaned(BaseException):
    """The control socket is closed: the supervisor is gone."""


class Memory(tuple[CData, int]):
    """A mapped object: (address, bytes). Never unmapped: the stage's C state points into it until exit."""

    __slots__ = ()


_LOGS: list[Log] = []  # the process's one, set by main()
_AT_ONCE = 16  # control messages between two turns


def set_log_level(level: str) -> None:
    """How much of our own logging goes to standard error."""
    for log in _LOGS:
        set_level(log, level)


def _check(rc: int, what: str, stage: CData) -> None:
    if rc < 0:
        text = ffi.string(lib.rn_stage_error(stage)).decode() if stage != ffi.NULL else ""
        raise StageError(f"{what}: {text or os.strerror(-rc)}")


class StageContext:
    """What one stage was granted, and its line to the supervisor.

    fds: extras by name (link, pcap, raw_icmp, dns_listen, ...): those topology allows and the session has.
    session_mem, arena: (address, bytes); flows, names likewise or None. stage: struct rn_stage *, everything
    granted to it already. draining: a Cancel came; end when nothing is left to move.
    """

    def __init__(self, channel: Channel, conf: Configure, fds: dict[str, int], wake: int = -1, *,
                 by_hand: bool = False) -> None:
        """wake: becomes readable when a signal came (signal.set_wakeup_fd). by_hand: a signal frees the seat."""
        self.name = conf.stage
        self.row = conf.row
        self.generation = conf.generation
        self.draining = False
        self.drain_ms = 0
        # What a stage does when asked: returns "" or why it did not. Descriptors that came with it are its own then.
        self.handlers: dict[type[Ask], Callable[[Any, list[int]], str]] = {
            LogLevel: self._set_log_level, Capture: self._capture, CaptureEnd: self._capture_end,
            Pace: self._set_pace, Wire: self._set_wire}
        self._captures: dict[int, tuple[Memory, int]] = {}  # mirror and doorbell by the capture's number
        self.wake = wake
        self.by_hand = by_hand
        # Called by run_loop() when the seat is left in order, before the C half ends: what a successor shall go on with.
        self.leave: Callable[[], None] = lambda: None
        self._channel = channel
        self._running = False

        def take(name: str, size: int, read_only: bool = False) -> Memory:
            fd = fds.pop(name)
            mem = lib.rn_map(fd, size, int(read_only))
            if mem == ffi.NULL:
                raise StageError(f"cannot map {name} ({size} bytes): {os.strerror(ffi.errno)}")
            os.close(fd)
            return Memory((mem, size))

        self.session_mem = take("session", conf.session_size)
        self.arena = take("arena", conf.arena_size)
        self.flows = take("flows", conf.flows_size) if conf.flows_size else None
        self.names = take("names", conf.names_size, not conf.names_write) if conf.names_size else None
        self.stage = lib.rn_stage_new(conf.row, conf.generation)
        if self.stage == ffi.NULL:
            raise StageError("out of memory")
        _check(lib.rn_stage_set_session(self.stage, *self.session_mem), "session", self.stage)
        _check(lib.rn_stage_set_arena(self.stage, *self.arena, int(conf.has_part)), "arena", self.stage)
        for name in [n for n in fds if n.startswith("bell:")]:  # before the rings: they take them over
            _check(lib.rn_stage_set_bell(self.stage, int(name[5:]), fds.pop(name)), name, self.stage)
        for end in conf.inputs:
            mem = take(f"in:{end.ring}", end.size)
            _check(lib.rn_stage_add_input(self.stage, *mem, end.row), f"ring {end.ring}", self.stage)
        for end in conf.outputs:
            mem = take(f"out:{end.ring}", end.size)
            _check(lib.rn_stage_add_output(self.stage, end.role, *mem, end.row), f"ring {end.ring}", self.stage)
        _check(lib.rn_stage_set_control(self.stage, channel.fileno()), "control", self.stage)
        if wake >= 0:
            _check(lib.rn_stage_set_wake(self.stage, wake), "signals", self.stage)
        for i in conf.impair:
            spec = ffi.new("struct rn_impair_spec *", i.spec())
            _check(lib.rn_stage_set_impair(self.stage, i.output, spec), f"--impair {i.place}", self.stage)
        _check(lib.rn_stage_busy_wait(self.stage, conf.busy_wait_us), "--busy-wait", self.stage)
        if conf.generation > 1:
            _check(lib.rn_stage_recover(self.stage), "what the last generation left", self.stage)
        self.fds = fds

    def control_fileno(self) -> int:
        """Descriptor to watch for readability in a loop of one's own; then call handle_control()."""
        return self._channel.fileno()

    def send(self, message: Message) -> None:
        """Raises Orphaned if the supervisor is gone."""
        try:
            self._channel.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise Orphaned from None

    def running(self) -> None:
        """Tell the supervisor, once, that frames move from now on. run_loop() and handle_control() do it."""
        if not self._running:
            self._running = True
            lib.rn_stage_state(self.stage, lib.RN_ST_RUNNING)
            self.send(Running())

    def handle_control(self) -> Ended | None:
        """Read control messages that wait, a few at most: who sends them as fast as they are answered must not keep a stage
        from its turns. The descriptor stays readable for the others. Returns what run() must return, if it must end now.

        On Cancel: the drain begins (draining is set, rn_stage_drain() called) and None is returned.
        Raises MessageError, Orphaned.
        """
        self.running()
        for _ in range(_AT_ONCE):
            try:
                got = self._channel.recv()
            except BlockingIOError:
                break
            if got is None:
                raise Orphaned
            match got[0]:
                case Cancel(drain_ms=ms):
                    self.draining = True
                    self.drain_ms = ms
                    lib.rn_stage_state(self.stage, lib.RN_ST_DRAINING)
                    lib.rn_stage_drain(self.stage)
                case Leave():
                    return self.ended("left the seat")
                case Ping(seq=seq):
                    self.send(Pong(seq=seq))
                case Ask() as ask if handler := self.handlers.get(type(ask)):
                    self._answer(Answer(seq=ask.seq, error=handler(ask, got[1])))
                case other:
                    raise MessageError(f"{type(other).__name__} to a running stage")
        return None

    def _answer(self, answer: Answer) -> None:
        """Asks come one by one, so there is room for the answer but behind a supervisor that stands still."""
        while True:
            try:
                return self.send(answer)
            except BlockingIOError:
                self._channel.wait_room()

    def notice(self, message: Message) -> bool:
        """Tell the supervisor something it did not ask for. False: it is behind, and the notice is lost."""
        try:
            self.send(message)
        except BlockingIOError:
            return False
        return True

    def say(self, level: Level, text: str) -> None:
        """On standard error; to somebody in a terminal whatever the level asked for."""
        for log in _LOGS:
            log.write(level, text, always=self.by_hand)

    def _set_log_level(self, ask: LogLevel, _fds: list[int]) -> str:
        set_log_level(ask.level)
        return ""

    def _capture(self, ask: Capture, fds: list[int]) -> str:
        mirror, bell = fds
        mem = lib.rn_map(mirror, ask.size, 0)
        error = "" if mem != ffi.NULL else f"cannot map the mirror ({ask.size} bytes): {os.strerror(ffi.errno)}"
        os.close(mirror)
        if not error:
            wanted = c_filter(**{n: getattr(ask.filter, n) for n in ask.filter.__struct_fields__})
            rc = lib.rn_tap_start(self.stage, ask.capture, mem, ask.size, bell, ask.points, ask.snaplen, int(ask.drops),
                                  wanted)
            if rc == 0:
                self._captures[ask.capture] = Memory((mem, ask.size)), bell
                return ""
            error = ffi.string(lib.rn_stage_error(self.stage)).decode()
            lib.rn_unmap(mem, ask.size)
        os.close(bell)
        return error

    def _capture_end(self, ask: CaptureEnd, _fds: list[int]) -> str:
        if ask.capture not in self._captures:
            return f"there is no capture {ask.capture}"
        lib.rn_tap_stop(self.stage, ask.capture)
        memory, bell = self._captures.pop(ask.capture)
        lib.rn_unmap(*memory)
        os.close(bell)
        return ""

    def _set_pace(self, ask: Pace, _fds: list[int]) -> str:
        lib.rn_stage_pace(self.stage, (1 << 64) - 1 if ask.frames is None else ask.frames)
        return ""

    def _set_wire(self, ask: Wire, _fds: list[int]) -> str:
        spec = ffi.new("struct rn_impair_spec *", ask.impair.spec())
        if lib.rn_stage_change_impair(self.stage, ask.impair.output, spec) < 0:
            return ffi.string(lib.rn_stage_error(self.stage)).decode()
        return ""

    @property
    def standing(self) -> bool:
        """Told to take no frame: wait in stand() instead of working."""
        return bool(lib.rn_stage_paused(self.stage))

    def stand(self) -> None:
        """Until a control message or a signal comes."""
        lib.rn_stage_state(self.stage, lib.RN_ST_PAUSED)
        p = select.poll()
        for fd in (self._channel.fileno(), self.wake):
            if fd >= 0:
                p.register(fd, select.POLLIN)
        p.poll()

    def counters(self) -> dict[str, int]:
        """This process's counters that are not zero, as of the last turn."""
        values = ((c.name, lib.rn_stage_counter(self.stage, c.index)) for c in counters_of(self.name))
        return {n: v for n, v in values if v}

    def ended(self, reason: str) -> Ended:
        return Ended(reason=reason, counters=self.counters())

    def run_loop(self, on_notice: Callable[[], None] = lambda: None) -> Ended:
        """The loop of a C stage, after its stage_x_init(): C moves frames and returns only for a reason. on_notice:
        called when the stage's C half has something to tell.

        Calls the kind's fini whatever happens. Raises StageError with the data plane's text.
        """
        reason = "drained"
        try:
            self.running()
            while True:
                match lib.rn_stage_run(self.stage):
                    case lib.RN_RUN_CONTROL:
                        if (ended := self.handle_control()) is not None:
                            on_notice()
                            self.leave()
                            return self.ended(ended.reason)
                    case lib.RN_RUN_DRAINED:
                        break
                    case lib.RN_RUN_STOPPED:
                        reason = "stopped"
                        break
                    case lib.RN_RUN_NOTICE:
                        on_notice()
                    case lib.RN_RUN_SIGNAL:
                        pass  # Python runs its handlers between two bytecodes: about here
                    case _:
                        raise StageError(ffi.string(lib.rn_stage_error(self.stage)).decode() or "data plane error")
        except Terminated:
            if self.by_hand and not self.draining:
                on_notice()
                self.leave()
            raise
        finally:
            lib.rn_stage_fini(self.stage)
        return self.ended(reason)


class GuestLink:
    """The guest's link of a stage that has one: as it is now, and another when the supervisor says so.

    change, broken: the stage's C functions that take another link, and that tell what became of it.
    """

    def __init__(self, ctx: StageContext, change: Callable[[CData, CData], int], broken: Callable[[CData], int], *,
                 kind: str, vnet: bool, frame_max: int, merge: bool = False, unfinished: int = 0, whole: bool = False) -> None:
        self._ctx, self._change, self._broken = ctx, change, broken
        self._made: dict[str, Any] = {"kind": kind, "vnet": vnet, "frame_max": frame_max, "merge": merge,
                                      "unfinished": unfinished, "whole": whole}
        self._fd = ctx.fds.get("link", -1)
        self.now = self._link(self._fd)
        ctx.handlers[LinkChange] = self._handle

    def _link(self, fd: int) -> CData:
        return link(fd, **self._made)

    def _handle(self, ask: LinkChange, fds: list[int]) -> str:
        fd = fds[0] if ask.present else -1
        fresh = self._link(fd)
        if self._change(self._ctx.stage, fresh) < 0:
            os.close(fd)
            return ffi.string(lib.rn_stage_error(self._ctx.stage)).decode()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.now = fd, fresh
        return ""

    def tell(self) -> None:
        """The C half has something to tell."""
        error = -self._broken(self._ctx.stage)
        if not error:
            return
        if error == errno.EPROTO:
            reason = "the guest's stream has a length that no frame has: not this framing, or bytes were lost"
        else:
            reason = f"the guest's side of the link is closed ({os.strerror(error)})"
        self._ctx.notice(LinkBroken(reason=reason))


class SecondLink:
    """The second NIC's link of a stage that has it (fds: link2): as it is now, and another when the supervisor says so."""

    def __init__(self, ctx: StageContext, change: Callable[[CData], int], *, kind: str, vnet: bool, frame_max: int,
                 unfinished: int = 0, whole: bool = False, uso: bool = False) -> None:
        """change: what gives the stage's C half a link. Raises StageError."""
        self._ctx, self._change = ctx, change
        self._made: dict[str, Any] = {"kind": kind, "vnet": vnet, "frame_max": frame_max, "unfinished": unfinished,
                                      "whole": whole, "uso": uso}
        self._fd = -1
        if error := self._take(ctx.fds.get("link2", -1)):
            raise StageError(error)
        ctx.handlers[Link2Change] = self._handle

    def _take(self, fd: int) -> str:
        if self._change(link(fd, **self._made)) < 0:
            return ffi.string(lib.rn_stage_error(self._ctx.stage)).decode()
        self._fd = fd
        return ""

    def _handle(self, ask: Link2Change, fds: list[int]) -> str:
        before, fd = self._fd, fds[0] if ask.present else -1
        error = self._take(fd)
        old = fd if error else before
        if old >= 0:
            os.close(old)
        return error


def _receive(channel: Channel) -> tuple[Any, list[int]]:
    """Wait for a message as long as the supervisor lives: the deadlines are its own."""
    while True:
        channel.wait()
        try:
            got = channel.recv()
        except BlockingIOError:
            continue
        if got is None:
            raise Orphaned
        return got


def _drop_rights() -> None:
    for what, rc in (("no_new_privs", lib.rn_os_no_new_privs()), ("capabilities", lib.rn_os_drop_caps())):
        if rc < 0:
            raise StageError(f"cannot drop {what}: {os.strerror(-rc)}")


def _on_term(signum: int, frame: object) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)
    raise Terminated(signal.Signals(signum).name)


def _raise_nofile() -> None:
    """As many descriptors as the host lets us have: one a flow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(name: str, channel: Channel, wake: int = -1, *, by_hand: bool = False) -> Ended:
    """The whole life of a stage, up to what it has to say at its end. Raises StageError, MessageError, Orphaned,
    Terminated, and whatever the stage raises."""
    channel.send(Hello(version=VERSION, stage=name, pid=os.getpid()))
    conf, fds = _receive(channel)
    if isinstance(conf, (Cancel, Leave)):
        return Ended(reason="cancelled before it was configured")
    if not isinstance(conf, Configure):
        raise MessageError(f"expected Configure, got {type(conf).__name__}")
    if (conf.version, conf.stage) != (VERSION, name):
        raise MessageError(f"Configure of version {conf.version} for {conf.stage!r}; this is {VERSION} and {name!r}")
    module = importlib.import_module(f"pipeline.{name}")
    for log in _LOGS:
        take_over(log)
    try:
        cfg = msgspec.msgpack.decode(conf.config, type=module.Config)
    except msgspec.ValidationError as e:
        raise StageError(f"configuration: {e}") from e
    if conf.flows_size:
        _raise_nofile()
    ctx = StageContext(channel, conf, dict(zip(conf.fds, fds, strict=True)), wake, by_hand=by_hand)
    if (acquire := getattr(module, "acquire", None)) is not None:
        acquire(cfg, ctx)
    _drop_rights()
    lib.rn_stage_state(ctx.stage, lib.RN_ST_READY)
    channel.send(Ready())
    while True:
        message, _ = _receive(channel)
        if isinstance(message, Start):
            break
        if isinstance(message, (Cancel, Leave)):
            return Ended(reason="cancelled before it was started")
        if not isinstance(message, Ping):
            raise MessageError(f"expected Start, got {type(message).__name__}")
        channel.send(Pong(seq=message.seq))
    try:
        ended = module.run(cfg, ctx)
    except Terminated as e:
        ended = ctx.ended(str(e))
    except BaseException:
        lib.rn_stage_state(ctx.stage, lib.RN_ST_FAILED)
        raise
    lib.rn_stage_state(ctx.stage, lib.RN_ST_ENDED)
    return ended


def _say_last(name: str, last: Ended | Failed) -> None:
    counted = ", ".join(f"{n}={v}" for n, v in last.counters.items()) if isinstance(last, Ended) else ""
    text = last.reason if isinstance(last, Ended) else f"failed: {last.error}"
    print(f"ringnet stage: {name} ended: {text}" + (f"; counters: {counted}" if counted else ""), file=sys.stderr)


def main(argv: list[str], *, by_hand: bool = False) -> int:
    """Process entry: argv is [NAME, "--control-fd", N]. by_hand: a person started it, in a terminal: ^C ends it in
    order, and it lives on if the shell or debugger that started it does not. Returns a StageExit."""
    names = [s.name for s in TOPOLOGY.stages]
    if len(argv) != 3 or argv[0] not in names or argv[1] != "--control-fd" or not argv[2].isdecimal():
        print(f"ringnet stage: usage: ringnet stage {{{'|'.join(names)}}} --control-fd N"
              " (N: an inherited AF_UNIX SOCK_SEQPACKET socket; the supervisor makes it)", file=sys.stderr)
        return StageExit.USAGE
    name = argv[0]
    _LOGS[:] = [for_stage(name)]
    if os.environ.get(FORMAT_VARIABLE) != "json":  # whose readers expect objects
        faulthandler.enable()  # one that crashes, or hangs and is aborted, says where in Python
    lib.rn_os_set_name(f"rn-{name}".encode())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if by_hand:
        signal.signal(signal.SIGINT, _on_term)
    else:
        lib.rn_os_pdeathsig(signal.SIGKILL)
        for s in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_term)
    try:
        sock = socket.socket(fileno=int(argv[2]))
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise OSError("not an AF_UNIX SOCK_SEQPACKET socket")
    except OSError as e:
        print(f"ringnet stage {name}: --control-fd {argv[2]}: {e}", file=sys.stderr)
        return StageExit.USAGE
    sock.set_inheritable(False)
    channel = Channel(sock)
    wake, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    code = StageExit.OK
    last: Ended | Failed
    try:
        last = serve(name, channel, wake, by_hand=by_hand)
    except Terminated as e:
        last = Ended(reason=str(e))
    except (Orphaned, BrokenPipeError):
        return StageExit.ORPHANED
    except MessageError as e:
        last, code = Failed(error=str(e)), StageExit.PROTOCOL
    except (StageError, OSError) as e:
        last, code = Failed(error=str(e)), StageExit.FAILED
    except Exception as e:  # a bug: its place is worth more than a short line
        import traceback

        traceback.print_exc()
        last, code = Failed(error=f"{type(e).__name__}: {e}"), StageExit.FAILED
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending: nothing to add
    if by_hand:
        _say_last(name, last)
    try:
        channel.send(last)
    except OSError:
        return StageExit.ORPHANED
    return code
