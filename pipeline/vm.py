"""`ringnet vm`: a session whose guest is a virtual machine, reached by a socket instead of a tap.

    qemu-stream  AF_UNIX stream, or TCP on loopback: 4 bytes of length, high byte first, then the frame
    qemu-dgram   AF_UNIX datagram, a frame each, both sides bound to a path
    vfkit        the same, begun by the datagram `VFKT` (vfkit, krunkit)
    fd           a connected socket, or a tap, that we were started with

With a path the session outlives the machine: the next one that comes finds the same leases and forwards. --one-off ends it
with the first. An inherited socket has no next machine.
"""
from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import struct

from pipeline import tap_offloads
from pipeline.config import ConfigError, Settings
from pipeline.doors import DgramDoor, Door, DoorError, Peer, StreamDoor
from pipeline.hostside import HostSideError
from pipeline.messages import Exit
from pipeline.runner import LOG, HostSide, info, outcome, say, serving, set_up_log
from pipeline.supervisor import Link, Session, SessionError, Signals
from pipeline.units import LinkKind
from pipeline.vm_nic2 import SecondDoor
from pipeline.vm_types import TYPES, VmOptions, check

# linux/if_tun.h
_TUNGETIFF, _TUNSETVNETHDRSZ, _TUNSETVNETLE = 0x800454D2, 0x400454D8, 0x400454DC
_IFF_TAP, _IFF_VNET_HDR = 0x0002, 0x4000
_VNET_HLEN = 12


def kind_of(fd: int, option: str = "fd") -> LinkKind:
    """What kind of link a descriptor is. Raises ConfigError if it is none."""
    try:
        return _kind_of(fd)
    except ConfigError as e:
        raise ConfigError(f"--{option} {fd}: {e}") from None


def _kind_of(fd: int) -> LinkKind:
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode):
        return _tap(fd)
    if not stat.S_ISSOCK(mode):
        raise ConfigError("is neither a socket nor a tap")
    with socket.socket(fileno=os.dup(fd)) as sock:
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError("is a socket that listens; give a connected one, or its path by --socket")
        if kind == socket.SOCK_STREAM and sock.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            found: LinkKind = "stream"
        elif kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET) and sock.family == socket.AF_UNIX:
            found = "dgram"
        else:
            raise ConfigError(f"a socket of family {sock.family} and type {kind} is no link to a machine; give"
                              " an AF_UNIX datagram, seqpacket or stream socket, or a TCP connection")
        try:
            sock.getpeername()
        except OSError as e:
            if e.errno == errno.ENOTCONN:
                raise ConfigError("is not connected; socketpair(2) makes a pair that is") from None
            raise
    return found


def _tap(fd: int) -> LinkKind:
    """Make a tap ready, as pipeline.netns would have. Raises ConfigError."""
    request = bytearray(40)
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
    except OSError:
        raise ConfigError("is a device, but no tap") from None
    flags = struct.unpack_from("H", request, 16)[0]
    if not flags & _IFF_TAP or not flags & _IFF_VNET_HDR:
        raise ConfigError("is a tun device, or a tap without IFF_VNET_HDR; open it with IFF_TAP | IFF_NO_PI |"
                          " IFF_VNET_HDR")
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, array.array("i", [_VNET_HLEN]))
    fcntl.ioctl(fd, _TUNSETVNETLE, array.array("i", [1]))
    tap_offloads.ask(fd, udp=False)  # the session asks for more
    return "tap"


class Vm:
    """`ringnet vm`: serve in the foreground until a signal, --exit-fd, or with --one-off the machine's end."""

    def __init__(self, settings: Settings, options: VmOptions) -> None:
        """Raises ConfigError."""
        check(options)
        self.settings, self.options = settings, options
        self.type = TYPES[options.type]
        self.kind: LinkKind = kind_of(options.fd) if options.fd >= 0 else self.type.kind or "dgram"
        if self.type.kind not in (None, self.kind):
            raise ConfigError(f"--fd {options.fd}: is a {self.kind} link, not what --type {options.type} is")
        if options.offloading and self.kind == "tap":
            raise ConfigError(f"--offloading: --fd {options.fd} is a tap, whose frames have a virtio-net header; leave it out")
        if options.offloading and not settings.offloads:
            raise ConfigError("--offloading: what --impair damages in a frame whose checksum is unfinished is not seen; let each"
                              " --impair say super, or leave --offloading out")
        if int(bool(settings.nic2)) != (options.nic2_fd >= 0) + bool(options.nic2_socket):
            raise ConfigError("--nic2: a machine's second NIC needs --nic2 MODE, and one of --nic2-socket PATH and --nic2-fd N")
        self.nic2_kind: LinkKind = kind_of(options.nic2_fd, "nic2-fd") if options.nic2_fd >= 0 else "dgram"
        self.door: Door | None = None
        self.peer: Peer | None = None
        self.ready_fd = options.ready_fd
        self._users: set[str] = set()  # of the link that is there now

    def main(self) -> int:
        s, o = self.settings, self.options
        set_up_log(s)
        with Signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals, contextlib.ExitStack() as stack:
            self.signals = signals
            try:
                if o.socket:
                    self.door = stack.enter_context(self._door())
                host = HostSide(s, stack)
                second = None
                if o.nic2_socket:
                    second = stack.enter_context(SecondDoor(o.nic2_socket, self.type, self._warn))
                    self.nic2_kind = second.kind
                nic2 = host.second_nic(o.nic2_fd, self.nic2_kind, o.vnet_hdr or self.nic2_kind == "tap",
                                        offloading=o.offloading and self.nic2_kind != "tap")
                if host.host is not None:
                    f = host.host.facts
                    self._warn(f"the second NIC's MAC address must be {f.mac}, its MTU is {f.mtu}"
                               + (f", and it will have {f.address}" if f.address else ""))
                link = Link(fd=o.fd, kind=self.kind, vnet=o.vnet_hdr or self.kind == "tap", name=o.type,
                            unfinished=o.offloading or o.unfinished, whole=o.offloading)
                self.session = Session(s, link=link, nic2=nic2, log=info if LOG.wants("info") else None, warn=say,
                                       name=s.session or str(os.getpid()))
                self.session.info = info
                self.session.on_link_end = self._left
                self.session.seats.listeners.append(self._seated)
                self.session.watch(signals.fileno(), self._signalled)
                if o.exit_fd >= 0:
                    self._watch_exit_fd()
                with serving(s, self.session) as service:
                    stack.callback(self._part)
                    self._users = self._sitting()
                    if self.door is not None:
                        self._wait()
                    if second is not None:
                        second.wait(self.session)
                    self._ready()
                    service.ready()
                    result = self.session.run()
            except (DoorError, HostSideError) as e:
                say(str(e.args[0]))
                return int(Exit.RUNTIME)
            except SessionError as e:
                if e.code is not Exit.OK:  # else a signal or the exit descriptor ended the start
                    say(str(e))
                return int(e.code)
            return outcome(s, self.session, result)

    def _door(self) -> Door:
        if self.kind == "stream":
            return StreamDoor(self.options.socket)
        return DgramDoor(self.options.socket, self.type.hello, self._warn)

    def _warn(self, text: str) -> None:
        if not self.settings.quiet:
            say(text)

    def _wait(self) -> None:
        assert self.door is not None
        self.session.watch(self.door.fileno(), self._came)
        self._warn(f"waiting for a virtual machine at {self.options.socket}")

    def _came(self) -> None:
        assert self.door is not None
        peer = self.door.admit()
        if peer is None:
            return
        self.session.unwatch(self.door.fileno())
        self.peer = peer
        self._warn("a virtual machine came")  # before it is served: who reads this and then sees an answer is not misled
        self.session.set_link(peer.sock.fileno())
        self._users = self._sitting()
        if peer.pidfd >= 0:
            self.session.watch(peer.pidfd, lambda: self._left("the machine's process ended", Exit.OK))

    def _part(self) -> None:
        """Forget the machine that was there."""
        peer, self.peer = self.peer, None
        if peer is None:
            return
        if peer.pidfd >= 0:
            self.session.unwatch(peer.pidfd)
            os.close(peer.pidfd)
        if self.kind == "stream":  # tell it, if it is still there: this connection is over
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        peer.sock.close()

    def _left(self, reason: str, code: Exit) -> None:
        """The machine has gone, or its link is of no more use."""
        if self.door is None:
            self.session.end(reason, code)
            return
        if self.peer is None or self.session.ending:  # told before
            return
        if code is not Exit.OK:
            say(f"{reason}; the connection is closed")
        self._part()
        if self.options.one_off:
            self.session.end(reason, code)
            return
        self._warn(f"the virtual machine has left: {reason}")
        self.session.set_link()
        self.door.renew()
        self._wait()

    def _sitting(self) -> set[str]:
        """Stages that have the link and may have read or written a part of a frame."""
        return {c.decl.name for c in self.session.children if "link" in c.decl.fds and c.alive}

    def _seated(self, stage: str) -> None:
        """A stage has a process again. Where in a stream it stands only its predecessor knew, if it had one: perhaps within a
        frame."""
        why = f"{stage} was replaced, and a stream cannot be gone on with"
        if self.options.nic2_fd >= 0 and self.nic2_kind == "stream" and stage in self._users:
            say(f"{why}; the second interface's connection is closed")
            with socket.socket(fileno=os.dup(self.options.nic2_fd)) as second:
                with contextlib.suppress(OSError):  # it may be gone already
                    second.shutdown(socket.SHUT_RDWR)
            self.session.set_second_link()
        if self.kind == "stream" and stage in self._users:
            self._left(why, Exit.RUNTIME)
        if "link" in self.session.child(stage).decl.fds:
            self._users.add(stage)

    def _watch_exit_fd(self) -> None:
        fd = self.options.exit_fd
        try:
            self.session.watch(fd, lambda: self.session.end("exit descriptor closed"))
        except PermissionError:  # epoll(7): a regular file is always readable
            raise SessionError(Exit.RUNTIME, f"--exit-fd {fd}: is a file; give a pipe or a socket") from None

    def _signalled(self) -> None:
        for signum in self.signals.take():
            if self.session.ending:
                self.session.hurry()
            self.session.end(signum.name)

    def _ready(self) -> None:
        if self.ready_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                os.write(self.ready_fd, b"1")
            os.close(self.ready_fd)
            self.ready_fd = -1


def vm(settings: Settings, options: VmOptions) -> int:
    """`ringnet vm`; returns the exit code. Raises ConfigError."""
    return Vm(settings, options).main()
