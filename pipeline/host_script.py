"""The host side of a replay: a private network in which every address is this process, and servers that follow a script.

enter() moves the process into a network namespace of its own, without a way out, where each IPv4 address is local. What a
stage under replay connects to there is answered by Script: as the recording has it (pipeline/replay.py derives that), or by
a TOML file:

    [[tcp]]                      # a server on a port, whatever address is asked for
    port = 80
    after = 1                    # bytes to have come before it says something (0: at once)
    send = "HTTP/1.0 200 OK\\r\\n\\r\\n"
    fill = 100000                # and so many bytes of a pattern behind it
    then = "close"               # when all was sent: "close", "reset", or "wait" for the other end's close (default)

    [[udp]]
    port = 7
    reply = "echo"               # each datagram comes back; any other text is the reply

    [dns]                        # a resolver on port 53: names it knows; others do not exist
    "example.org" = "192.0.2.1"

A port with no server refuses. Everything is read, always. Order and cutting are the same in each run because the replay
goes on only when the kernel's queues of this namespace are at rest (at_rest()).
"""
from __future__ import annotations

import errno
import fcntl
import ipaddress
import itertools
import os
import socket
import struct
import tomllib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from pipeline import netlink
from shm._dataplane import ffi, lib

IN_FLIGHT = 32768  # bytes that wait in the other end's receive queue at most: less than any holds
_SIOCETHTOOL = 0x8946  # linux/sockios.h
_OFFLOADS_OFF = (0x1F, 0x24, 0x2C)  # ETHTOOL_STSO, SGSO, SGRO (linux/ethtool.h)
Port = Annotated[int, Meta(ge=1, le=65535)]


class ScriptError(Exception):
    """The script, or the private network, cannot be; one line."""


class Talk(Struct, frozen=True, kw_only=True):
    """What a server says on one connection."""

    said: list[tuple[int, bytes]]  # (bytes that must have come before, what it says then)
    then: Literal["close", "reset", "wait"] = "wait"


class TcpServer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    port: Port
    after: Annotated[int, Meta(ge=0)] = 0
    send: str = ""
    fill: Annotated[int, Meta(ge=0, le=1 << 26)] = 0
    then: Literal["close", "reset", "wait"] = "wait"

    def talk(self) -> Talk:
        data = self.send.encode() + bytes(k % 251 for k in range(self.fill))
        return Talk(said=[(self.after, data)] if data else [], then=self.then)


class UdpServer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    port: Port
    reply: str = "echo"


class Play(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A script file."""

    tcp: list[TcpServer] = []
    udp: list[UdpServer] = []
    dns: dict[str, str] = {}


class Recorded(Struct, frozen=True, kw_only=True):
    """What a recording says of the host side, in its order: by port, each connection, and the replies to each datagram."""

    tcp: dict[int, list[Talk]] = {}
    udp: dict[int, list[list[bytes]]] = {}


def load(path: str) -> Play:
    """Raises ScriptError."""
    try:
        play = msgspec.convert(tomllib.loads(Path(path).read_text()), Play)
        for address in play.dns.values():
            ipaddress.IPv4Address(address)
    except (OSError, ValueError) as e:  # msgspec's and tomllib's are ValueErrors
        text = e.strerror if isinstance(e, OSError) else str(e)
        raise ScriptError(f"--host {path}: {text}") from e
    return play


def enter() -> None:
    """Into a private network. Raises ScriptError."""
    uid, gid = os.geteuid(), os.getegid()
    rc = lib.rn_os_unshare(lib.RN_CLONE_NEWNET) if uid == 0 else -errno.EPERM
    if rc == -errno.EPERM:
        rc = lib.rn_os_unshare(lib.RN_CLONE_NEWNET | lib.RN_CLONE_NEWUSER)
        if rc == 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1\n")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1\n")
    if rc < 0:
        raise ScriptError(f"cannot make a network namespace: {os.strerror(-rc)}; run as root, or allow unprivileged user"
                          " namespaces")
    try:
        netlink.link_up("lo")
        netlink.every_address_is_local(netlink.index("lo"))
        _one_segment_a_packet()
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647" if uid == 0 else f"{gid} {gid}")
    except OSError as e:
        raise ScriptError(f"cannot set the private network up: {e.strerror}") from e


def _one_segment_a_packet() -> None:
    """So that the kernel's counts of segments sent and received are of the same things (at_rest())."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for command in _OFFLOADS_OFF:
            value = ffi.new("uint32_t[2]", [command, 0])
            fcntl.ioctl(s, _SIOCETHTOOL, struct.pack("16sP8x", b"lo", int(ffi.cast("uintptr_t", value))))


def _table(kind: str) -> list[list[str]]:
    return [line.split() for line in Path(f"/proc/thread-self/net/{kind}").read_text().splitlines()[1:]]


def at_rest() -> bool:
    """Nothing is on its way between the sockets of this namespace: each segment that was sent has come."""
    rows = [line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()]
    of = {names[0]: dict(zip(names[1:], map(int, values[1:]), strict=True))
          for names, values in zip(rows[::2], rows[1::2], strict=True)}
    tcp, icmp = of["Tcp:"], of["Icmp:"]
    return tcp["InSegs"] == tcp["OutSegs"] + tcp["RetransSegs"] and icmp["InMsgs"] >= icmp["OutMsgs"]


def unread() -> bool:
    """Does a datagram wait to be read?"""
    return any(int(words[4].split(":")[1], 16) for words in _table("udp"))


class _Connection:
    def __init__(self, sock: socket.socket, port: int, talk: Talk) -> None:
        self.sock, self.port, self.then = sock, port, talk.then
        self.said = deque(talk.said)
        self.left = memoryview(b"")  # of what is being said
        self.came = 0
        self.ended = False  # we have closed our side

    def pump(self, unread: dict[tuple[int, int], int]) -> bool:
        """Read all, send as far as it may; true if something was done. unread: bytes in receive queues, by local and
        remote port."""
        did = False
        try:
            while data := self.sock.recv(1 << 16):
                self.came += len(data)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                did = True
            over = True  # the other end closed
        except BlockingIOError:
            over = False
        except ConnectionError:
            self.sock.close()
            return True
        if not self.left and self.said and self.came >= self.said[0][0]:
            self.left = memoryview(self.said.popleft()[1])
        if self.left:
            try:
                room = IN_FLIGHT - unread.get((self.sock.getpeername()[1], self.port), 0)
                if room > 0:
                    self.left = self.left[self.sock.send(self.left[:room]):]
                    did = True
            except OSError:  # it was reset
                self.sock.close()
                return True
        if not self.left and not self.said and not self.ended:
            if self.then == "reset":
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.sock.close()
                return True
            if self.then == "close" or over:
                self.sock.shutdown(socket.SHUT_WR)
                self.ended = did = True
        if over and self.ended:
            self.sock.close()
            did = True
        return did


class Script:
    """The servers of a Play, or of a recording. pump() lets them do what they can."""

    def __init__(self, play: Play, recorded: Recorded = Recorded()) -> None:
        """recorded: for ports that `play` does not name."""
        self._listeners = [(self._bind(socket.SOCK_STREAM, rule.port), rule.port, itertools.repeat(rule.talk()))
                           for rule in play.tcp]
        taken = {rule.port for rule in play.tcp}
        self._listeners += [(self._bind(socket.SOCK_STREAM, port), port, iter(talks))
                            for port, talks in recorded.tcp.items() if port not in taken]
        self._udp: list[tuple[socket.socket, Callable[[bytes], list[bytes]]]] = []
        for server in play.udp:
            self._udp.append((self._bind(socket.SOCK_DGRAM, server.port),
                              lambda data, text=server.reply: [data if text == "echo" else text.encode()]))
        taken = {server.port for server in play.udp} | ({53} if play.dns else set())
        for port, replies in recorded.udp.items():
            if port not in taken:
                self._udp.append((self._bind(socket.SOCK_DGRAM, port), lambda data, rest=iter(replies): next(rest, [])))
        self._dns = self._bind(socket.SOCK_DGRAM, 53) if play.dns else None
        self._names = {n.rstrip(".").lower(): ipaddress.IPv4Address(a).packed for n, a in play.dns.items()}
        self._open: list[_Connection] = []

    @staticmethod
    def _bind(kind: int, port: int) -> socket.socket:
        s = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
        try:
            s.bind(("0.0.0.0", port))
            if kind == socket.SOCK_STREAM:
                s.listen(1024)
            else:
                s.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO: replies come from the address that was asked
        except OSError as e:
            s.close()
            raise ScriptError(f"--host: port {port}: {e.strerror}") from e
        return s

    def pump(self) -> bool:
        """True if something was done. Call it at rest."""
        did = False
        for listener, port, talks in self._listeners:
            while (got := self._accept(listener)) is not None:
                self._open.append(_Connection(got, port, next(talks, Talk(said=[]))))
                did = True
        unread = {(int(w[1].split(":")[1], 16), int(w[2].split(":")[1], 16)): int(w[4].split(":")[1], 16)
                  for w in _table("tcp")} if any(c.left or c.said for c in self._open) else {}
        for connection in self._open:
            did |= connection.pump(unread)
        self._open = [c for c in self._open if c.sock.fileno() >= 0]
        for sock, replies in self._udp:
            did |= self._answer(sock, replies)
        if self._dns is not None:
            did |= self._answer(self._dns, lambda query: [self._resolve(query)])
        return did

    @staticmethod
    def _accept(listener: socket.socket) -> socket.socket | None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return None
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    @staticmethod
    def _answer(sock: socket.socket, replies: Callable[[bytes], list[bytes]]) -> bool:
        did = False
        while True:
            try:
                data, anc, _, who = sock.recvmsg(1 << 16, socket.CMSG_SPACE(12))
            except BlockingIOError:
                return did
            did = True
            # The address asked for, as the source of the reply: in_pktinfo {ifindex, spec_dst, addr}.
            asked = next((body[8:12] for level, kind, body in anc if (level, kind) == (socket.IPPROTO_IP, 8)), bytes(4))
            for reply in replies(data):
                sock.sendmsg([reply], [(socket.IPPROTO_IP, 8, struct.pack("i4s4s", 0, asked, bytes(4)))], 0, who)

    def _resolve(self, query: bytes) -> bytes:
        """RFC 1035, as much as a script needs: one question, A."""
        at, labels = 12, []
        while at < len(query) and query[at]:
            labels.append(query[at + 1:at + 1 + query[at]].decode("ascii", "replace").lower())
            at += 1 + query[at]
        question = query[12:at + 5]
        known = self._names.get(".".join(labels))
        wanted = known is not None and query[at + 1:at + 3] == b"\0\x01"
        answer = b"\xc0\x0c\0\x01\0\x01" + struct.pack("!IH", 60, 4) + known if wanted and known else b""
        return query[:2] + struct.pack("!HHHHH", 0x8180 if known else 0x8183, 1, bool(answer), 0, 0) + question + answer

    def close(self) -> None:
        for sock in [*(s for s, _, _ in self._listeners), *(s for s, _ in self._udp), *(c.sock for c in self._open)]:
            sock.close()
        if self._dns is not None:
            self._dns.close()
