"""Control messages between supervisor and stage, the states they move through, and every exit code.

One message a packet over an AF_UNIX SOCK_SEQPACKET pair per stage: msgpack of a tagged union, descriptors
beside it by SCM_RIGHTS in the order the message names them (unix(7), cmsg(3)).

    supervisor                                     stage                       state seen by the supervisor
        |  zygote (a successor: fork, exec)          |                         spawned
        |<------------------------- Hello(version) --|                         greeted
        |-- Configure(grants, stage config) + fds -->|  map, acquire(),        configured
        |                                            |  drop rights
        |<----------------------------------- Ready --|                         ready
        |      (all stages are ready)                |
        |-- Start --------------------------------->|  run()                  starting   sinks first
        |<--------------------------------- Running --|                         running
        |-- Ping ---> <--- Pong (any time after Ready)|
        |-- Ask (HostsChange, CloseFlow ...) ------->|  one under way a stage, running
        |<----------------------- Answer(seq, error) --|
        |<------------- Leased, Refused: unasked ------|  after Notices(on)
        |<------------------- LinkBroken: unasked ------|
        |-- Cancel(deadline) ----------------------->|  drain, end             cancelled  sources first
        |-- Leave ---------------------------------->|  end as it stands       leaving
        |<------------------- Ended(reason, counters) --|                       ended, then exit 0
        |<---------------------------- Failed(error) --|                        failed, then exit 1

Forbidden: Start before every stage is ready; Start to a stage while one it hands frames to is not running;
Cancel to a stage while a stage that feeds it still runs (unless the session already failed: then all at
once). A successor (pipeline/seats.py) goes through the same states, but is started while its neighbours run. From every state a stage may die; the supervisor sees the process end (pidfd), a stage sees its
supervisor end (EOF on control, and PR_SET_PDEATHSIG). tests/model/test_lifecycle_model.py walks it all.
"""
from __future__ import annotations

import array
import enum
import os
import select
import socket
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from pipeline.units import Impair, PolicyEntry

VERSION = 1  # of this file; supervisor and stage are one build, so they must be equal
PACKET_MAX = 65536  # bytes of one message
FDS_MAX = 64  # descriptors with one message; the kernel takes 253 (SCM_MAX_FD)
Level = Literal["error", "warning", "info", "debug"]


class Exit(enum.IntEnum):
    """Exit codes of `ringnet`. `ringnet run` otherwise ends with CMD's own (128 + n if signal n ended it)."""

    OK = 0
    RUNTIME = 1  # the run could not be set up: one line says why
    USAGE = 2  # wrong flags or configuration
    STAGE_DIED = 70  # a running stage ended or was killed: stage, signal and last counters are named
    STAGE_FAILED = 71  # a running stage reported an error
    NOT_READY = 72  # a stage never became ready; its reason is printed


class StageExit(enum.IntEnum):
    """Exit codes of one stage process, for whoever starts it by hand."""

    OK = 0
    FAILED = 1  # it sent Failed first
    USAGE = 2
    ORPHANED = 3  # control socket closed: the supervisor is gone
    PROTOCOL = 4  # a control message it could not read


class Seat(NamedTuple):
    """One stage that a zygote (pipeline/zygote.py) is to begin, as a word of its command line."""

    name: str
    fd: int  # the stage's end of its control socket
    level: str  # of its log

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Seat:
        """Raises ValueError."""
        name, fd, level = text.split(":")
        return cls(name, int(fd), level)


class End(Struct, frozen=True, kw_only=True):
    """One end of a ring as a stage is told of it."""

    ring: str  # name, for errors
    size: Annotated[int, Meta(gt=0)]  # bytes of the shared object
    row: Annotated[int, Meta(ge=0, lt=8)]  # the other end's stage row
    role: Annotated[int, Meta(ge=0)] = 0  # outputs only: enum rn_role


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=str.lower):
    """Base of the union."""

    def carries(self) -> int:
        """Descriptors that come with it."""
        return 0


class Hello(Message):
    version: int
    stage: str
    pid: int


class Configure(Message, kw_only=True):
    """What a stage is granted. Descriptors, in this order, are named by `fds`: session, arena, flows, names,
    in:<ring>, out:<ring>, bell:<row>, then the extras topology allows (link, pcap, raw_icmp, dns_listen)."""

    version: int
    stage: str
    row: Annotated[int, Meta(ge=0, lt=8)]
    generation: Annotated[int, Meta(ge=0)]  # 1: the first; a successor counts up, and recovers what was left
    session_size: int
    arena_size: int
    has_part: bool  # owns frame buffers
    flows_size: int  # 0: not granted
    inputs: tuple[End, ...]
    outputs: tuple[End, ...]
    fds: tuple[str, ...]
    config: msgspec.Raw  # the stage's own Config, decoded by the stage
    impair: tuple[Impair, ...] = ()  # --impair, as far as it is this stage's
    names_size: int = 0  # 0: not granted
    names_write: bool = False  # else its mapping is read-only
    busy_wait_us: Annotated[int, Meta(ge=0, le=1000)] = 0  # csrc/rn_busy_wait.h

    def carries(self) -> int:
        return len(self.fds)


class Ready(Message):
    pass


class Start(Message):
    pass


class Running(Message):
    pass


class Cancel(Message):
    drain_ms: Annotated[int, Meta(ge=0)]  # after that the supervisor sends SIGTERM


class Leave(Message):
    """End now, between two bursts, without emptying rings: a successor goes on (pipeline/seats.py)."""


class Ended(Message):
    reason: str
    counters: dict[str, int] = {}  # last values, by name


class Failed(Message):
    error: str


class Ping(Message):
    seq: int


class Pong(Message):
    seq: int


class Ask(Message, kw_only=True):
    """A request to a running stage. It answers each; the supervisor sends the next one after that (Session.ask)."""

    seq: int = 0  # set by Session.ask


class HostsChange(Ask, kw_only=True):
    """A part of a change of the hosts table; the whole of it happens, or nothing, at the part with `commit`."""

    # Addresses, or one other name (an alias), instead of what the name had; none: the name goes.
    names: dict[str, tuple[str, ...]] = {}
    own: tuple[str, ...] = ()  # domains whose unknown names do not exist (NXDOMAIN)
    disown: tuple[str, ...] = ()
    commit: bool = True


class CloseFlow(Ask, kw_only=True):
    """End one flow, so that both sides see it broken. Error if entry and generation are not a flow's any more."""

    index: Annotated[int, Meta(ge=0, lt=1 << 32)]
    gen: Annotated[int, Meta(ge=0, lt=1 << 32)]


class Rule(Struct, frozen=True, kw_only=True):
    """A forward as egress serves it (pipeline/forwards.py)."""

    rule: Annotated[int, Meta(gt=0)]  # what it is called when it is removed
    proto: Literal["tcp", "udp"]
    guest_addr: str  # "": the guest's, whatever it is
    guest_port: Annotated[int, Meta(ge=1, le=65535)]


class ForwardsChange(Ask, kw_only=True):
    """A part of a change of the forwards; the whole of it happens, or nothing, at the part with `commit`. A descriptor for
    each of `add`: the socket, bound and, if TCP, listening."""

    add: tuple[Rule, ...] = ()
    remove: tuple[int, ...] = ()
    close_flows: bool = False  # connections of removed rules are reset
    whole: bool = False  # what `add` has, in all parts, is all there is: other rules go, those that are there already stay
    commit: bool = True

    def carries(self) -> int:
        return len(self.add)


class LinkChange(Ask, kw_only=True):
    """The guest's link from now on: the socket that comes with it, of the kind configured; or none, the guest is away."""

    present: bool

    def carries(self) -> int:
        return int(self.present)


class PolicyChange(Ask, kw_only=True):
    """These rules from now on, instead of any before."""

    entries: tuple[PolicyEntry, ...]


class Link2Change(LinkChange, kw_only=True):
    """The same of the guest's second link."""


class LogLevel(Ask, kw_only=True):
    """How much the stage says on standard error: a level of logging."""

    level: Level


class Pace(Ask, kw_only=True):
    """Take so many frames more, then stand still but for control; None: go on."""

    frames: Annotated[int, Meta(ge=0, lt=1 << 62)] | None


class Wire(Ask, kw_only=True):
    """Another bad wire (--impair) at one of the stage's places, from now on; one that does nothing takes it away."""

    impair: Impair


class Notices(Ask, kw_only=True):
    """Tell of leases and refusals from now on, or no more."""

    on: bool


class FrameFilter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frames a capture wants (csrc/rn_filter.h): those that match all that is given."""

    proto: Annotated[int, Meta(ge=0, le=255)] = 0  # IP protocol; 0: any
    host: str = ""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    guest: str = ""  # of one flow, with its port
    guest_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    peer: str = ""  # "": a mapping that serves every peer
    peer_port: Annotated[int, Meta(ge=0, le=65535)] = 0


class Capture(Ask, kw_only=True):
    """Copy frames into a mirror (csrc/rn_mirror.h) until CaptureEnd. Descriptors: the mirror, its reader's doorbell."""

    capture: Annotated[int, Meta(gt=0, lt=1 << 32)]  # what it is called when it ends
    size: Annotated[int, Meta(gt=0)]  # bytes of the mirror
    points: Annotated[int, Meta(gt=0)]  # bits of enum rn_tap_point
    snaplen: Annotated[int, Meta(gt=0, lt=1 << 32)]
    drops: bool = False  # only frames that the stage drops
    filter: FrameFilter = FrameFilter()

    def carries(self) -> int:
        return 2


class CaptureEnd(Ask, kw_only=True):
    capture: int


class Nic2Dhcp(Ask, kw_only=True):
    """To services: be the DHCP server of the second NIC's host side, by the socket that comes with it; or, without one,
    be it no more."""

    serve: bool = True  # a descriptor comes with it: UDP port 67, bound to the bridge
    mac: str = ""  # the guest's
    address: str = ""  # the guest's, with the prefix length
    gateway: str = ""  # the host's
    mtu: int = 1500
    router: bool = False  # the host is a way out

    def carries(self) -> int:
        return int(self.serve)


class Answer(Message):
    seq: int
    error: str = ""  # "": done


class Leased(Message):
    """services gave the guest an address, or renewed it."""

    address: str
    mac: str
    hostname: str  # as the guest calls itself, "" if it does not
    seconds: int
    lost: int = 0  # notices not sent since the last one: over the rate


class LinkBroken(Message):
    """guest_tx, guest_rx: this link is of no more use. Told once a link, unasked."""

    reason: str


class Refused(Message):
    """egress could not, or would not, make a flow that was asked for."""

    proto: str  # "tcp", "udp" or "icmp"
    guest: str
    guest_port: int
    peer: str  # as the guest calls it
    peer_port: int
    reason: str
    rule: int = -1  # of the policy (PolicyEntry.name), if that was the reason
    lost: int = 0


FromStage = Hello | Ready | Running | Ended | Failed | Pong | Answer | Leased | Refused | LinkBroken
ToStage = (Configure | Start | Cancel | Leave | Ping | HostsChange | ForwardsChange | CloseFlow | PolicyChange | LogLevel
           | Notices | Capture | CaptureEnd | Nic2Dhcp | Pace | Wire | LinkChange | Link2Change)
Any = FromStage | ToStage

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Any)


class MessageError(Exception):
    """A packet that is no message; the text names the message and the field."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(packet: bytes) -> Any:
    """Raises MessageError, with the path of the field that is wrong."""
    try:
        return _decoder.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:  # text that is no UTF-8; arrays in arrays
        raise MessageError(f"control message ({len(packet)} bytes): {e}") from e


class Channel:
    """One end of a control socket. Owns the socket; descriptors received belong to the caller."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    def send(self, message: Message, fds: list[int] | tuple[int, ...] = ()) -> None:
        """Raises OSError: BrokenPipeError if the peer is gone, BlockingIOError if it does not read."""
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([_encoder.encode(message)], anc, socket.MSG_NOSIGNAL)

    def recv(self) -> tuple[Any, list[int]] | None:
        """The next message and its descriptors (close-on-exec); None at EOF.

        Raises BlockingIOError if none waits, MessageError if it cannot be read (descriptors are closed).
        """
        ask = PACKET_MAX, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            data, anc, flags, _ = self.sock.recvmsg(*ask)
        except ConnectionResetError:  # the peer ended with unread messages of ours: told once, before what it said
            data, anc, flags, _ = self.sock.recvmsg(*ask)
        fds = array.array("i")
        for level, kind, body in anc:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
        if not data and not fds:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise MessageError(f"control message cut: {len(data)} bytes, {len(fds)} descriptors kept")
            message = decode(data)
            if len(fds) != message.carries():
                raise MessageError(f"{type(message).__name__}: field fds names {message.carries()} descriptors,"
                                   f" {len(fds)} came")
        except MessageError:
            for fd in fds:
                os.close(fd)
            raise
        return message, list(fds)

    def wait_room(self) -> None:
        """Return once a message can be sent, or the peer is gone."""
        p = select.poll()
        p.register(self.sock, select.POLLOUT)
        p.poll()

    def wait(self, seconds: float | None = None) -> bool:
        """True once a message (or EOF) can be received."""
        p = select.poll()
        p.register(self.sock, select.POLLIN)
        return bool(p.poll(None if seconds is None else max(0, int(seconds * 1000))))
