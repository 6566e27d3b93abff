"""`ringnet run` and `ringnet attach`: a guest's namespace and a session tied together, and nothing left behind.

Both fork a child that makes or enters the guest's namespace (pipeline/netns.py), take the tap from it, start the
session, tell the child to go on, and then serve until the first of: the command ended, a signal, the exit
descriptor, the target process, a stage. The child never outlives this process.
"""
from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from pipeline import monitor, netlink
from pipeline.config import Settings
from pipeline.control_api import ControlApi
from pipeline.hostside import Host, HostSideError
from pipeline.logs import Log
from pipeline.messages import Exit
from pipeline.metrics import MetricsServer
from pipeline.netns import (
    SIGNALS,
    Configured,
    Finished,
    Forward,
    Go,
    GuestError,
    Line,
    Resume,
    Said,
    Second,
    Spawned,
    Tap,
    Trouble,
    attach_child,
    give_terminal,
    guest,
    open_target,
)
from pipeline.netns import Stopped as CommandStopped
from pipeline.nic2_backends import backend_for
from pipeline.second_nic import SecondNic
from pipeline.service_manager import ServiceManager, Told
from pipeline.session_dir import SessionDirError
from pipeline.supervisor import Link, Result, Session, SessionError, Signals, describe_status
from pipeline.units import LinkKind

TERM_GRACE = 5.0  # s the command has after a SIGTERM or SIGHUP was passed on to it
END_GRACE = 5.0  # s the guest's init has to end its processes
SECOND_IFNAME = "tap1"  # of the guest's second interface, unless --nic2 says
TAP_DEADLINE = 30.0  # s for making namespaces and a tap, on a busy machine


LOG = Log("supervisor")


def say(text: str) -> None:
    """To the user, whatever the log level."""
    LOG.write("warning", text, always=True)


def set_up_log(settings: Settings) -> None:
    """What say() and info() write from now on."""
    levels = settings.log_levels()
    LOG.form, LOG.session = settings.log_format, settings.session or str(os.getpid())
    LOG.level = levels.get("supervisor", levels[""])


def info(text: str) -> None:
    """What happens, for who asked to be told (Session.info)."""
    LOG.write("info", text, always=True)


class GuestLink(NamedTuple):
    """The tap, as its namespace's child gave it to us."""

    fd: int
    index: int
    events: socket.socket  # netlink: changes to interfaces there
    tables: dict[str, int]  # of its sockets (auto_forwards.open_tables())
    second: int  # the second interface's tap, or -1

    def close(self) -> None:
        """The links and the tables; a session has its own by now."""
        for fd in (self.fd, *self.tables.values(), self.second):
            if fd >= 0:
                os.close(fd)


class Guest:
    """The child on the guest's side: a process, its pidfd, and the line to it."""

    def __init__(self, body: Callable[[socket.socket, socket.socket], None]) -> None:
        """Fork; `body(ours, theirs)` is the child's whole life (ours: the end it must close)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # a collection here would touch, and so copy, what the child shares with us: some MiB
        self.pid = os.fork()
        if self.pid == 0:
            self._child(body, ours, theirs)
        theirs.close()
        self.line = Line(ours)
        self.pidfd = os.pidfd_open(self.pid)
        self.contained: bool | None = None  # None: no command yet

    @staticmethod
    def _child(body: Callable[[socket.socket, socket.socket], None], ours: socket.socket, theirs: socket.socket
               ) -> NoReturn:
        try:
            body(ours, theirs)
            os._exit(0)
        except BaseException:  # a bug; never back into the parent's code
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(1)

    def tap(self, signals: Signals) -> GuestLink:
        """Wait for the tap. Raises GuestError, Stopped."""
        poll = select.poll()
        poll.register(self.line, select.POLLIN)
        poll.register(signals, select.POLLIN)
        while True:
            ready = poll.poll(TAP_DEADLINE * 1000)
            if not ready:
                raise GuestError(f"the guest's namespace was not made within {TAP_DEADLINE:g} s")
            if any(fd == signals.fileno() for fd, _ in ready) and (got := signals.take()):
                raise Stopped(got[0])
            if any(fd == self.line.fileno() for fd, _ in ready):
                match self.line.recv():
                    case (Tap(index=index, tables=names, second=two), [fd, events, *more]):
                        second = more.pop(0) if two else -1
                        return GuestLink(fd, index, socket.socket(fileno=events), dict(zip(names, more, strict=True)), second)
                    case (Trouble(text=text), _):
                        raise GuestError(text)
                    case None:
                        raise GuestError(f"the guest's process ended early: {self._status()}")

    def _status(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return describe_status(os.waitstatus_to_exitcode(status))

    def end(self) -> None:
        """See it gone. A running command gets SIGKILL from its init, which sees our end of the line close."""
        self.line.sock.close()
        if self.pid:
            grace = END_GRACE if self.contained is not None else 0.0
            if not select.select([self.pidfd], [], [], grace)[0]:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        os.close(self.pidfd)


class Stopped(Exception):
    """A signal came before there was anything to end."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.signum = signum


@contextlib.contextmanager
def _pid_file(path: str) -> Iterator[None]:
    """Our process id in a file, for as long as we serve. Raises SessionError."""
    if path:
        try:
            Path(path).write_text(f"{os.getpid()}\n")
        except OSError as e:
            raise SessionError(Exit.RUNTIME, f"--pid {path}: {e.strerror}") from e
    try:
        yield
    finally:
        if path:
            Path(path).unlink(missing_ok=True)


class HostSide:
    """The second NIC's host side, as long as there is no session that has it; nothing without --nic2."""

    def __init__(self, settings: Settings, stack: contextlib.ExitStack) -> None:
        """Opens it; what is open is closed with the stack. Raises HostSideError."""
        self.spec = settings.second_nic()
        self.host: Host | None = None
        if self.spec is None:
            return
        self.backend, self._ours = backend_for(self.spec, settings.nic2_routes(), settings.session, stack, warn=say)
        stack.callback(self.backend.close)
        self.host = self.backend.open()

    def interface(self) -> Second | None:
        """What the guest is to have."""
        if self.spec is None or self.host is None:
            return None
        return Second(name=self.spec.ifname or SECOND_IFNAME, mac=self.host.facts.mac, mtu=self.host.facts.mtu)

    def leave(self) -> None:
        """In a forked child: none of it is the guest's side's business, and a lock held there would outlive us."""
        if self.host is not None:
            for fd in {self.host.fd, self.host.dhcp, *self._ours} - {-1}:
                os.close(fd)

    def second_nic(self, fd: int, kind: LinkKind = "tap", vnet: bool = True, *, offloading: bool = False) -> SecondNic | None:
        """For the session; fd: the guest's tap, or another link's."""
        if self.spec is None or self.host is None:
            return None
        link = Link(fd=fd, kind=kind, vnet=vnet, unfinished=offloading, whole=offloading, name=self.spec.ifname or SECOND_IFNAME)
        return SecondNic(link, self.backend, self.host, storm=self.spec.storm)


def _session(settings: Settings, tap: GuestLink, host: HostSide, gone: Callable[[], None]) -> Session:
    """A session on the tap; gone: what to do when the interface is removed."""
    link = Link(fd=tap.fd, kind="tap", vnet=True, name=settings.ifname, tables=tap.tables)
    session = Session(settings, link=link, nic2=host.second_nic(tap.second), log=info if LOG.wants("info") else None,
                      warn=say, name=settings.session or str(os.getpid()))
    session.info = info

    def changed() -> None:
        if tap.index in netlink.links_removed(tap.events):
            session.unwatch(tap.events.fileno())
            gone()

    session.watch(tap.events.fileno(), changed)
    return session


@contextlib.contextmanager
def _metrics(settings: Settings, session: Session) -> Iterator[None]:
    """--metrics, for as long as we serve. Raises SessionError."""
    if not settings.metrics:
        yield
        return
    server = MetricsServer(session, settings.metrics, name=session.name)
    if not settings.quiet and settings.metrics.rpartition(":")[2] == "0":
        say(f"metrics are at port {server.port}")
    try:
        yield
    finally:
        server.close()


@contextlib.contextmanager
def _control(settings: Settings, session: Session) -> Iterator[None]:
    """The session's control API, for as long as we serve. Raises SessionError if it was asked for and cannot be."""
    if settings.api_socket == "none":
        yield
        return
    try:
        api = ControlApi(session, name=session.name, path=settings.api_socket)
    except SessionDirError as e:
        if settings.session or settings.api_socket:
            raise SessionError(Exit.RUNTIME, str(e)) from e
        if not settings.quiet:
            say(f"no control API: {e}")
        yield
        return
    try:
        yield
    finally:
        api.close()


def _invite(session: Session, what: str) -> None:
    """Say how to take the seats that --hold left empty."""
    if text := session.seats.invitation():
        say(f"{text}\nringnet: {what} when every held seat was taken once")

def _tell_address(session: Session, c: Configured) -> None:
    """Routes into the guest go by the address of its second interface."""
    if session.nic2 is not None and c.second and (wrong := session.nic2.guest_is(c.second)):
        say(wrong)


def _report(settings: Settings, session: Session) -> None:
    if settings.debug or settings.stats:
        print(monitor.stage_table(session), file=sys.stderr, flush=True)


def _failed(result: Result) -> bool:
    """Say why a session ended that nobody asked to end."""
    if result.code is not Exit.OK:
        say(result.reason)
    return result.code is not Exit.OK


@contextlib.contextmanager
def _controlling_terminal() -> Iterator[int | None]:
    """A descriptor of it, or None."""
    try:
        tty = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield tty
    finally:
        os.close(tty)


def _in_foreground() -> bool:
    """Are we in the foreground of a terminal? Then ^C reached the command as well as us."""
    with _controlling_terminal() as tty:
        try:
            return tty is not None and os.tcgetpgrp(tty) == os.getpgrp()
        except OSError:
            return False


def _stop_with_the_command() -> bool:
    """^Z: take the terminal back and stop, for the shell that started us; when continued, say if in the foreground.

    Without such a shell (our group is orphaned) the kernel ignores this SIGTSTP, and the command goes on at once.
    """
    with _controlling_terminal() as tty:
        if tty is not None:
            give_terminal(tty, os.getpgrp())
    os.kill(os.getpid(), signal.SIGTSTP)
    return _in_foreground()


def _reclaim_terminal() -> None:
    """The terminal is the command's group's, of which nobody is left: it is ours again, and our caller's."""
    with _controlling_terminal() as tty:
        if tty is None:
            return
        try:
            os.killpg(os.tcgetpgrp(tty), 0)
        except ProcessLookupError:
            give_terminal(tty, os.getpgrp())
        except OSError:
            pass  # another user's group, or the terminal hung up: not ours to take


class Run:
    """`ringnet run`: a guest of our own, and a command in it."""

    def __init__(self, settings: Settings, argv: list[str]) -> None:
        self.settings, self.argv = settings, argv
        self.status: int | None = None  # the command's, once it ended; or what we end with instead
        self.kill_at: float | None = None  # CLOCK_MONOTONIC, s: patience with a command told to end
        self.fallback = 0  # status if it runs out

    def main(self) -> int:
        ignored = frozenset(s for s in SIGNALS if signal.getsignal(s) == signal.SIG_IGN)
        s, told = self.settings, Told.take(os.environ)
        set_up_log(s)
        with Signals(*SIGNALS) as signals, contextlib.ExitStack() as stack:
            self.signals = signals

            try:
                host = HostSide(s, stack)
            except HostSideError as e:
                say(str(e))
                return int(Exit.RUNTIME)

            def body(ours: socket.socket, theirs: socket.socket) -> None:
                ours.close()
                host.leave()
                guest(theirs, s.ifname, s.mtu, self.argv, ignored, host.interface())

            stack.callback(_reclaim_terminal)
            self.guest = Guest(body)
            stack.callback(self.guest.end)
            try:
                tap = self.guest.tap(signals)
                stack.callback(tap.events.close)
                with contextlib.closing(tap):
                    # Without its interface the command is cut off, but it lives on: it may have meant it.
                    self.session = _session(s, tap, host, lambda: None if s.quiet else say(f"{s.ifname} was removed"))
                    self.session.watch(signals.fileno(), self._signalled)
                    self.session.watch(self.guest.line.fileno(), self._heard)
                    self.session.start()
                stack.callback(self.session.close)
                stack.callback(self.session.stop)
                stack.enter_context(_control(s, self.session))
                stack.enter_context(_metrics(s, self.session))
                stack.enter_context(_pid_file(s.pid))
                self.service = stack.enter_context(contextlib.closing(ServiceManager(self.session, told)))
                _invite(self.session, "the command starts")
                self.session.seats.when_whole(lambda: self.guest.line.send(Go()))
                result = self._serve()
            except Stopped as e:
                return 128 + e.signum
            except (GuestError, SessionError) as e:
                if self.status is not None:  # a signal ended the start
                    return self.status
                say(str(e))
                return int(getattr(e, "code", Exit.RUNTIME))
            _report(s, self.session)
            if _failed(result):
                return int(result.code)
            if self.status is None:  # somebody ended the session, and with it the command
                say(result.reason)
                return int(Exit.RUNTIME)
            return self.status

    def _serve(self) -> Result:
        while True:
            left = None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())
            if not self.session.poll(left):
                return self.session.stop()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self.session.end("the command did not end when told to")
                self.status = self.fallback

    def _heard(self) -> None:
        got = self.guest.line.recv()
        if got is None:
            self.session.unwatch(self.guest.line.fileno())
            if self.status is None:
                self.session.end("the guest's processes were killed", Exit.RUNTIME)
            return
        match got[0]:
            case Configured() as c:
                self._configured(c)
            case Spawned(contained=contained):
                self.guest.contained = contained
                self.service.ready()
            case CommandStopped():
                foreground = _stop_with_the_command()
                with contextlib.suppress(BrokenPipeError):
                    self.guest.line.send(Resume(foreground=foreground))
            case Finished(status=status):
                self.status = status
                self.session.end("the command ended")
            case Trouble(text=text):
                self.status = int(Exit.RUNTIME)
                self.session.end(text, Exit.RUNTIME)

    def _configured(self, c: Configured) -> None:
        _tell_address(self.session, c)
        if self.settings.debug:
            say(f"guest has {c.address}, router {c.router}, DNS {' '.join(c.dns)}")
        if c.note and not self.settings.quiet:
            say(c.note)

    def _signalled(self) -> None:
        for signum in self.signals.take():
            if signum == signal.SIGQUIT:
                self.session.dump("SIGQUIT")  # the command gets it too, as it would without a dump
            if self.guest.contained is None:  # no command yet
                self.status = 128 + signum
                self.session.end(f"{signum.name}")
            elif signum in (signal.SIGINT, signal.SIGQUIT) and _in_foreground():
                continue  # the command has it from the terminal, and decides
            elif self.kill_at is not None:  # told twice
                self.status = 128 + signum
                self.session.end(f"{signum.name} again")
            else:
                with contextlib.suppress(BrokenPipeError):
                    self.guest.line.send(Forward(signum=signum))
                if signum in (signal.SIGTERM, signal.SIGHUP):
                    self.kill_at = time.monotonic() + TERM_GRACE
                    self.fallback = 128 + signum


def run(settings: Settings, argv: list[str]) -> int:
    """`ringnet run`; returns the exit code."""
    return Run(settings, argv).main()


class Attach:
    """`ringnet attach`: serve an existing network namespace in the foreground."""

    def __init__(self, settings: Settings, target: str, *, config_net: bool, ready_fd: int, exit_fd: int) -> None:
        self.settings, self.text = settings, target
        self.config_net, self.ready_fd, self.exit_fd = config_net, ready_fd, exit_fd

    def main(self) -> int:
        s, told = self.settings, Told.take(os.environ)
        set_up_log(s)
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *([signal.SIGQUIT] if s.postmortem else [])]
        with Signals(*wanted) as signals, contextlib.ExitStack() as stack:
            self.signals = signals
            try:
                target = open_target(self.text)
                stack.callback(os.close, target.netns)
                host = HostSide(s, stack)

                def body(ours: socket.socket, theirs: socket.socket) -> None:
                    host.leave()
                    attach_child(ours, theirs, target, s.ifname, s.mtu, self.config_net, host.interface())

                self.guest = Guest(body)
                stack.callback(self.guest.end)
                tap = self.guest.tap(signals)
                stack.callback(tap.events.close)
                with contextlib.closing(tap):
                    self.session = _session(s, tap, host, lambda: self.session.end(
                        f"interface {s.ifname} was removed from the guest's namespace", Exit.RUNTIME))
                    self.session.watch(signals.fileno(), self._signalled)
                    if target.pidfd >= 0:
                        stack.callback(os.close, target.pidfd)
                        self.session.watch(target.pidfd, lambda: self.session.end(f"process {self.text} ended"))
                    if self.exit_fd >= 0:
                        self._watch_exit_fd()
                    self.session.start()
                stack.callback(self.session.close)
                stack.callback(self.session.stop)
                stack.enter_context(_control(s, self.session))
                stack.enter_context(_metrics(s, self.session))
                stack.enter_context(_pid_file(s.pid))
                self.service = stack.enter_context(contextlib.closing(ServiceManager(self.session, told)))
                _invite(self.session, "the guest is configured, and --ready-fd told,")
                self.session.seats.when_whole(self._go)
                result = self.session.run()
            except Stopped:
                return int(Exit.OK)
            except (GuestError, HostSideError, SessionError) as e:
                code = getattr(e, "code", Exit.RUNTIME)
                if code is not Exit.OK:  # else a signal or the exit descriptor ended the start
                    say(str(e))
                return int(code)
            _report(s, self.session)
            _failed(result)
            return int(result.code)

    def _go(self) -> None:
        if self.config_net:
            self.session.watch(self.guest.line.fileno(), self._heard)
            self.guest.line.send(Go())
        else:
            self._ready()

    def _watch_exit_fd(self) -> None:
        try:
            self.session.watch(self.exit_fd, lambda: self.session.end("exit descriptor closed"))
        except PermissionError:  # epoll(7): a regular file is always readable
            raise SessionError(Exit.RUNTIME, f"--exit-fd {self.exit_fd}: is a file; give a pipe or a socket") from None

    def _signalled(self) -> None:
        for signum in self.signals.take():
            if signum == signal.SIGQUIT:
                self.session.dump("SIGQUIT")
                continue
            if self.session.ending:
                self.session.hurry()
            self.session.end(signum.name)

    def _heard(self) -> None:
        got: tuple[Said, list[int]] | None = self.guest.line.recv()
        self.session.unwatch(self.guest.line.fileno())
        match got:
            case (Configured(address=address, router=router, note=note) as c, _):
                _tell_address(self.session, c)
                if self.settings.debug:
                    say(f"{self.settings.ifname} has {address}, router {router}")
                if note and not self.settings.quiet:
                    say(note)
                self._ready()
            case (Trouble(text=text), _):
                self.session.end(text, Exit.RUNTIME)
            case _:
                self.session.end("the process that configures the namespace was killed", Exit.RUNTIME)

    def _ready(self) -> None:
        self.service.ready()
        if self.ready_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                os.write(self.ready_fd, b"1")
            os.close(self.ready_fd)
            self.ready_fd = -1


def attach(settings: Settings, target: str, *, config_net: bool, ready_fd: int = -1, exit_fd: int = -1) -> int:
    """`ringnet attach`; returns the exit code."""
    return Attach(settings, target, config_net=config_net, ready_fd=ready_fd, exit_fd=exit_fd).main()


@contextlib.contextmanager
def serving(settings: Settings, session: Session) -> Iterator[ServiceManager]:
    """A session without a namespace of ours: started, with control API, metrics and pid file, ended at the end of the block.
    Who serves says when it is ready. Raises SessionError."""
    with contextlib.ExitStack() as stack:
        told = Told.take(os.environ)
        session.start()
        stack.callback(session.close)
        stack.callback(session.stop)
        stack.enter_context(_control(settings, session))
        stack.enter_context(_metrics(settings, session))
        stack.enter_context(_pid_file(settings.pid))
        service = stack.enter_context(contextlib.closing(ServiceManager(session, told)))
        _invite(session, "frames move")
        yield service


def outcome(settings: Settings, session: Session, result: Result) -> int:
    """Say what there is to say of a session that ended; the exit code."""
    _report(settings, session)
    _failed(result)
    return int(result.code)
