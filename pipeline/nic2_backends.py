"""Who has the host side of the second NIC, besides a bridge of our own making (pipeline/hostside.py).

    socket   a helper program on a Unix socket: socket_vmnet (stream, each frame behind its length as 4 bytes, high byte
             first) and vmnet-helper (a datagram a frame). On macOS they have the network; the wire is the same anywhere
    fd       a descriptor we were started with: a tap, such a socket, or the line to `ringnet nic2-helper`, which makes a
             bridge and its tap with rights that we do not have, and removes them when the line closes

The line: SOCK_SEQPACKET, one request and one reply at a time, the messages below in msgpack; with Opened come the
descriptors of the tap and of the DHCP server's socket (SCM_RIGHTS).

Source: unix(7); socket_vmnet and vmnet-helper, their manuals.
"""
from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
from msgspec import Struct

from pipeline import netlink, tap_offloads
from pipeline.hostside import Backend, Host, HostSideError, LinuxBridge, Mac, tap_name
from pipeline.nic2 import ETHERNET, MTU, PLAIN_FRAME_MAX, Facts, Nic2, Nic2SyntaxError, Route, check_mac
from pipeline.sockets import LINK_BUFFER, widen

LINE_DEADLINE = 30.0  # s for what takes some 30 ms
_TUNGETIFF, _TUNSETVNETHDRSZ, _TUNSETVNETLE = 0x800454D2, 0x400454D8, 0x400454DC
_IFF_TAP, _IFF_VNET_HDR = 0x0002, 0x4000
_VNET_HLEN = 12


class _Said(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=str.lower):
    """Base of what goes over the line."""


class Open(_Said):
    pass


class Close(_Said):
    pass


class GuestIs(_Said):
    address: str


class Opened(_Said):
    """Descriptors: the tap, and if `dhcp` the DHCP server's socket."""

    facts: Facts
    dhcp: bool


class Answered(_Said):
    error: str = ""  # "": done


Request = Open | Close | GuestIs
Reply = Opened | Answered
_encode = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(Request)
_reply = msgspec.msgpack.Decoder(Reply)


def send(sock: socket.socket, message: _Said, fds: Iterable[int] = ()) -> None:
    """Raises OSError if the other end is gone."""
    anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([_encode(message)], anc, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """A packet and its descriptors; b"" at the end. Raises OSError."""
    data, anc, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(2 * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, body in anc:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return data, list(fds)


def serve(sock: socket.socket, backend: Backend) -> bool:
    """Do one request of the other end's. False: it is gone, or says what is no request; the host side is closed then."""
    try:
        data, fds = receive(sock)
    except OSError:
        data, fds = b"", []
    for fd in fds:  # none belongs to a request
        os.close(fd)
    try:
        wanted = _request.decode(data) if data else None
    except msgspec.MsgspecError:
        wanted = None
    try:
        match wanted:
            case Open():
                try:
                    host = backend.open()
                except HostSideError as e:
                    send(sock, Answered(error=str(e)))
                else:
                    send(sock, Opened(facts=host.facts, dhcp=host.dhcp >= 0), [fd for fd in (host.fd, host.dhcp) if fd >= 0])
                return True
            case Close():
                backend.close()
                send(sock, Answered())
                return True
            case GuestIs(address=text):
                try:
                    address = IPv4Address(text)
                except ValueError:
                    send(sock, Answered(error=f"{text}: not an IPv4 address"))
                else:
                    send(sock, Answered(error=backend.guest_is(address)))
                return True
    except OSError:
        pass  # it left before it had the answer
    backend.close()
    return False


class HelperLine:
    """`ringnet nic2-helper` has the host side; the descriptor is our end of the line to it."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=os.dup(fd))
        self._sock.settimeout(LINE_DEADLINE)
        self._fds: list[int] = []

    def _ask(self, wanted: _Said) -> Reply:
        """Raises HostSideError."""
        try:
            send(self._sock, wanted)
            data, fds = receive(self._sock)
            self._fds += fds
            return _reply.decode(data)
        except TimeoutError:
            raise HostSideError("--nic2 fd: nic2-helper does not answer") from None
        except (OSError, msgspec.MsgspecError):
            raise HostSideError("--nic2 fd: nic2-helper has ended") from None

    def open(self) -> Host:
        match self._ask(Open()):
            case Opened(facts=facts, dhcp=dhcp) if len(self._fds) == 1 + dhcp:
                return Host(fd=self._fds[0], kind="tap", vnet=True, facts=facts, dhcp=self._fds[1] if dhcp else -1)
            case Answered(error=error) if error:
                raise HostSideError(error)
        raise HostSideError("--nic2 fd: what nic2-helper says is not what it should")

    def close(self) -> None:
        if self._fds:
            for fd in self._fds:
                os.close(fd)
            self._fds = []
            with contextlib.suppress(HostSideError):  # it has ended, and removed all
                self._ask(Close())

    def guest_is(self, address: IPv4Address) -> str:
        try:
            answer = self._ask(GuestIs(address=str(address)))
        except HostSideError as e:
            return str(e)
        return answer.error if isinstance(answer, Answered) else ""


class Given:
    """A tap or a connected socket that we were started with. It stays as it is; nothing is ours to remove."""

    def __init__(self, spec: Nic2, mac: str) -> None:
        self.spec, self.mac = spec, mac

    def open(self) -> Host:
        fd = self.spec.fd
        os.set_blocking(fd, False)
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            name, mtu = self._tap(fd)
            return Host(fd=fd, kind="tap", vnet=True,
                        facts=Facts(mac=self.mac, mtu=self.spec.mtu or mtu, host=f"tap {name}, descriptor {fd}"))
        kind = socket_kind(fd)
        if kind == "dgram":
            with socket.socket(fileno=os.dup(fd)) as sock:
                widen(sock)
        return Host(fd=fd, kind=kind, vnet=False,
                    facts=Facts(mac=self.mac, mtu=plain_mtu(self.spec.mtu), host=f"{kind} socket, descriptor {fd}"))

    @staticmethod
    def _tap(fd: int) -> tuple[str, int]:
        """Make it ready, as we would have; (name, MTU). Raises HostSideError."""
        try:
            name = tap_name(fd)
        except OSError:
            raise HostSideError(f"--nic2 fd={fd}: a device, but no tap") from None
        flags = struct.unpack_from("H", fcntl.ioctl(fd, _TUNGETIFF, bytes(40)), 16)[0]
        if not flags & _IFF_TAP or not flags & _IFF_VNET_HDR:
            raise HostSideError(f"--nic2 fd={fd}: a tun device, or a tap without IFF_VNET_HDR; open it with IFF_TAP |"
                                " IFF_NO_PI | IFF_VNET_HDR")
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HLEN))
        fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
        tap_offloads.ask(fd, udp=False)  # as rn_tap_open(); SecondNic asks for more
        # It may be in another network namespace, where we do not see it.
        return name, next((k.mtu for k in netlink.links() if k.name == name and k.kind == "tun"), MTU)

    def close(self) -> None:
        pass

    def guest_is(self, address: IPv4Address) -> str:
        return ""


class Socket:
    """A helper program that listens on a path."""

    def __init__(self, spec: Nic2, mac: str) -> None:
        self.spec, self.mac = spec, mac
        self._sock: socket.socket | None = None
        self._own: tempfile.TemporaryDirectory[str] | None = None  # a datagram socket's, so that it can be answered

    def open(self) -> Host:
        path = self.spec.path
        mac, mtu = self.mac, plain_mtu(self.spec.mtu)
        if self.spec.facts:
            mac, mtu = self._told()
        kind = "stream"
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._sock.connect(path)
            except OSError as e:
                if e.errno != errno.EPROTOTYPE:
                    raise
                self._sock.close()
                kind = "dgram"
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._own = tempfile.TemporaryDirectory(prefix="ringnet-")
                self._sock.bind(f"{self._own.name}/nic2")
                self._sock.connect(path)
                widen(self._sock)
        except OSError as e:
            self.close()
            hint = "; start the helper first" if e.errno in (errno.ENOENT, errno.ECONNREFUSED) else ""
            raise HostSideError(f"--nic2 socket,path={path}: {e.strerror}{hint}") from e
        self._sock.setblocking(False)
        with contextlib.suppress(OSError):  # up to net.core.wmem_max
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINK_BUFFER)
        return Host(fd=self._sock.fileno(), kind=kind, vnet=False,
                    facts=Facts(mac=mac, mtu=mtu, host=f"{kind} socket {path}"))

    def _told(self) -> tuple[str, int]:
        """MAC address and MTU of the interface, as vmnet-helper prints them when it starts; --nic2's own win. Raises
        HostSideError."""
        file = self.spec.facts
        try:
            said = json.loads(Path(file).read_bytes())
            mac = check_mac(str(said["vmnet_mac_address"]))
            mtu = int(said["vmnet_mtu"])
        except OSError as e:
            raise HostSideError(f"--nic2 facts={file}: {e.strerror}") from e
        except Nic2SyntaxError as e:
            raise HostSideError(f"--nic2 facts={file}: vmnet_{str(e).replace('mac=', 'mac_address ', 1)}") from e
        except (ValueError, TypeError, KeyError) as e:
            raise HostSideError(f"--nic2 facts={file}: not what vmnet-helper prints, JSON with vmnet_mac_address and vmnet_mtu"
                                ) from e
        return self.spec.mac or mac, plain_mtu(self.spec.mtu or mtu)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._own is not None:
            self._own.cleanup()
            self._own = None

    def guest_is(self, address: IPv4Address) -> str:
        return ""


def plain_mtu(mtu: int) -> int:
    """Without virtio-net headers."""
    return min(mtu or MTU, PLAIN_FRAME_MAX - ETHERNET)


def socket_kind(fd: int) -> str:
    """Of a link, or "line". Raises HostSideError."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            family, kind = sock.family, sock.type
            sock.getpeername()
    except OSError as e:
        what = {errno.ENOTSOCK: "neither a tap nor a socket", errno.ENOTCONN: "a socket that is not connected"}.get(
            e.errno or 0, e.strerror)
        raise HostSideError(f"--nic2 fd={fd}: {what}") from None
    if family != socket.AF_UNIX:
        raise HostSideError(f"--nic2 fd={fd}: not a Unix socket")
    return {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "dgram"}.get(kind, "line")


def backend_for(spec: Nic2, routes: Iterable[Route], session: str, stack: contextlib.ExitStack, *,
                warn: Callable[[str], None]) -> tuple[Backend, list[int]]:
    """Whoever makes such a host side, and descriptors that a forked child must not keep; all let go with the stack.

    session: its name, for a MAC address that is the same next time. Raises HostSideError."""
    if spec.mode == "fd":
        try:
            os.set_inheritable(spec.fd, False)  # a command of ours has no business with it
            if not stat.S_ISCHR(os.fstat(spec.fd).st_mode) and socket_kind(spec.fd) == "line":
                return HelperLine(spec.fd), [spec.fd]
        except OSError as e:
            raise HostSideError(f"--nic2 fd={spec.fd}: {e.strerror}") from None
    mac = Mac(spec.mac, session)
    stack.callback(mac.close)
    match spec.mode:
        case "fd":
            backend: Backend = Given(spec, mac.text)
        case "socket":
            backend = Socket(spec, mac.text)
        case _:
            backend = LinuxBridge(spec, routes, mac.text, warn=warn)
    return backend, mac.descriptors()
