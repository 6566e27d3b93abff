"""A scripted guest TCP: speaks raw frames over the link, one segment at a time, and keeps no state it was not told.

What a test sends is what goes out, right or wrong; what comes back is parsed and its checksums are checked (a
frame with a bad one fails the test). It is the guest's end of the link of a pipeline without virtio-net headers.
"""
from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import time
from dataclasses import dataclass

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
GATEWAY = "10.0.2.1"
GUEST = "10.0.2.2"
GATEWAY_MAC = bytes.fromhex("02abcd000001")
GUEST_MAC = bytes.fromhex("5254ab000002")
M32 = 0xFFFFFFFF
DEADLINE = 60.0  # s: what takes milliseconds is called broken after this

_ports = itertools.count(20000 + os.getpid() % 20000)
_idents = itertools.count(1)


def checksum(data: bytes) -> int:
    """RFC 1071, byte by byte: independent of the data plane's."""
    if len(data) % 2:
        data += b"\0"
    s = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while s >> 16:
        s = (s & 0xFFFF) + (s >> 16)
    return ~s & 0xFFFF


def ipv4(proto: int, payload: bytes, src: str, dst: str, *, ttl: int = 64, ident: int = 0, frag: int = 0x4000) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), ident, frag, ttl, proto, 0,
                       socket.inet_aton(src), socket.inet_aton(dst))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ethernet(payload: bytes, ethertype: int = 0x0800, *, dst: bytes = GATEWAY_MAC, src: bytes = GUEST_MAC) -> bytes:
    return dst + src + struct.pack("!H", ethertype) + payload


def pseudo(src: str, dst: str, proto: int, length: int) -> bytes:
    return socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!BBH", 0, proto, length)


@dataclass(frozen=True)
class Segment:
    """One TCP segment from the gateway side, host order."""

    seq: int
    ack: int
    flags: int
    wnd: int  # as on the wire, not scaled
    data: bytes
    mss: int | None = None
    wscale: int | None = None
    sack_ok: bool = False
    sack: tuple[tuple[int, int], ...] = ()
    to: bytes = GUEST_MAC  # where the frame went

    @property
    def end(self) -> int:
        return (self.seq + len(self.data) + bool(self.flags & SYN) + bool(self.flags & FIN)) & M32


def receive(link: socket.socket, timeout: float) -> bytes | None:
    """One frame, or None when the time is over. Raises EOFError if the pipeline closed the link."""
    ready, _, _ = select.select([link], [], [], max(0.0, timeout))
    if not ready:
        return None
    frame = link.recv(70000)
    if not frame:
        raise EOFError("link closed")
    return frame


def parse_ipv4(frame: bytes) -> tuple[int, str, str, bytes] | None:
    """(protocol, source, destination, payload) of an IPv4 frame to the guest; checks the header checksum."""
    if frame[12:14] != b"\x08\x00":
        return None
    ihl = (frame[14] & 15) * 4
    assert frame[14] >> 4 == 4 and checksum(frame[14:14 + ihl]) == 0, "bad IP header from the pipeline"
    total = struct.unpack("!H", frame[16:18])[0]
    assert total <= len(frame) - 14, "IP total length past the frame"
    return frame[23], socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34]), frame[14 + ihl:14 + total]


class GuestTcp:
    """The guest's end of one connection. Sequence numbers are the test's business: snd_nxt and rcv_nxt move
    only in connect(), push(), pull() and the like, never behind a test's back."""

    def __init__(self, link: socket.socket, port: int, dst: str = GATEWAY, *, sport: int | None = None,
                 isn: int = 1000, mss: int | None = 1460, wscale: int | None = 7, wnd: int = 65535,
                 sack: bool = False) -> None:
        self.link, self.port, self.dst = link, port, dst
        self.sport = sport or 1024 + next(_ports) % 60000
        self.isn, self.mss, self.wscale, self.wnd, self.sack = isn & M32, mss, wscale, wnd, sack
        self.snd_nxt = self.isn
        self.rcv_nxt = 0
        self.irs = 0
        self.peer_wscale = 0
        self.edge = 0  # of the window that the SYN-ACK offered
        self.mac = GUEST_MAC  # what it sends from

    def send(self, flags: int, data: bytes = b"", *, seq: int | None = None, ack: int | None = None,
             wnd: int | None = None, opts: bytes = b"", corrupt: bool = False) -> None:
        opts += b"\x01" * (-len(opts) % 4)
        seg = struct.pack("!HHIIBBHHH", self.sport, self.port, (self.snd_nxt if seq is None else seq) & M32,
                          (self.rcv_nxt if ack is None else ack) & M32 if flags & ACK else 0,
                          (20 + len(opts)) // 4 << 4, flags, self.wnd if wnd is None else wnd, 0, 0) + opts + data
        c = checksum(pseudo(GUEST, self.dst, 6, len(seg)) + seg) ^ (0x5555 if corrupt else 0)
        self.link.send(ethernet(ipv4(6, seg[:16] + struct.pack("!H", c) + seg[18:], GUEST, self.dst),
                                src=self.mac))

    def recv(self, timeout: float = DEADLINE) -> Segment | None:
        """Next segment of this connection, or None after @timeout seconds."""
        end = time.monotonic() + timeout
        while (frame := receive(self.link, end - time.monotonic())) is not None:
            if (seg := self._mine(frame)) is not None:
                return seg
        return None

    def _mine(self, frame: bytes) -> Segment | None:
        ip = parse_ipv4(frame)
        if ip is None or ip[0] != 6 or ip[1] != self.dst or ip[2] != GUEST:
            return None
        raw = ip[3]
        sport, dport, seq, ack, off, flags, wnd = struct.unpack("!HHIIBBH", raw[:16])
        if (sport, dport) != (self.port, self.sport):
            return None
        assert checksum(pseudo(self.dst, GUEST, 6, len(raw)) + raw) == 0, "bad TCP checksum from the pipeline"
        hlen, mss, wscale, at = (off >> 4) * 4, None, None, 20
        sack_ok, sack = False, ()
        while at < hlen and raw[at]:
            if raw[at] == 1:
                at += 1
                continue
            if raw[at] == 2:
                mss = struct.unpack("!H", raw[at + 2:at + 4])[0]
            elif raw[at] == 3:
                wscale = raw[at + 2]
            elif raw[at] == 4:
                sack_ok = True
            elif raw[at] == 5:
                w = struct.unpack(f"!{(raw[at + 1] - 2) // 4}I", raw[at + 2:at + raw[at + 1]])
                sack = tuple(zip(w[::2], w[1::2], strict=True))
            at += raw[at + 1]
        return Segment(seq, ack, flags, wnd, raw[hlen:], mss, wscale, sack_ok, sack, frame[:6])

    def expect(self, flags: int, mask: int = FIN | SYN | RST | ACK, timeout: float = DEADLINE) -> Segment:
        """Next segment must have these of the flags in @mask."""
        seg = self.recv(timeout)
        assert seg is not None, f"no segment, wanted flags {flags:#x}"
        assert seg.flags & mask == flags, f"got {seg}, wanted flags {flags:#x}"
        return seg

    def fence(self) -> list[Segment]:
        """Everything of this connection that the pipeline sends before it has answered two pings, one after the other:
        a way to say "and nothing else came" without waiting for a time to pass. Frames take one path in order; an echo
        may overtake what the same turn of egress still has to do, the second one, sent later, cannot."""
        return self._echo() + self._echo()

    def _echo(self) -> list[Segment]:
        ident, out = next(_idents) & 0xFFFF, []
        echo = struct.pack("!BBHHH", 8, 0, 0, ident, 1)
        echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
        self.link.send(ethernet(ipv4(1, echo, GUEST, GATEWAY)))
        while (frame := receive(self.link, DEADLINE)) is not None:
            ip = parse_ipv4(frame)
            if ip and ip[0] == 1 and ip[3][0] == 0 and struct.unpack("!H", ip[3][4:6])[0] == ident:
                return out
            if (seg := self._mine(frame)) is not None:
                out.append(seg)
        raise AssertionError("the gateway did not answer a ping")

    def syn_options(self) -> bytes:
        o = b"" if self.mss is None else struct.pack("!BBH", 2, 4, self.mss)
        o += b"\x01\x01\x04\x02" if self.sack else b""
        return o + (b"" if self.wscale is None else struct.pack("!BBBB", 1, 3, 3, self.wscale))

    def connect(self, data: bytes = b"") -> Segment:
        """Handshake; @data rides on its final ACK. Returns the SYN-ACK."""
        self.send(SYN, opts=self.syn_options())
        sa = self.expect(SYN | ACK)
        assert sa.ack == (self.isn + 1) & M32
        self.snd_nxt, self.irs, self.rcv_nxt = sa.ack, sa.seq, (sa.seq + 1) & M32
        self.peer_wscale = sa.wscale or 0
        self.edge = (sa.ack + sa.wnd) & M32  # not scaled (RFC 7323 2.2)
        self.send(ACK | (PSH if data else 0), data)
        self.snd_nxt = (self.snd_nxt + len(data)) & M32
        return sa

    def push(self, data: bytes, flags: int = 0) -> None:
        """In-order data (and FIN, if in @flags); snd_nxt moves."""
        self.send(ACK | PSH | flags, data)
        self.snd_nxt = (self.snd_nxt + len(data) + bool(flags & FIN)) & M32

    def wait_ack(self, ack: int | None = None, timeout: float = DEADLINE) -> Segment:
        """First segment that acknowledges @ack (default: all sent)."""
        want, end = (self.snd_nxt if ack is None else ack) & M32, time.monotonic() + timeout
        while (seg := self.recv(end - time.monotonic())) is not None:
            if seg.flags & ACK and seg.ack == want:
                return seg
        raise AssertionError(f"no ACK of {want}")

    def pull(self, n: int, timeout: float = DEADLINE) -> bytes:
        """Receive @n bytes in order, acknowledging each segment; out-of-order and old ones are acknowledged as
        RFC 9293 says. A FIN behind them is left for the caller (see self.fin)."""
        out, end = b"", time.monotonic() + timeout
        while len(out) < n:
            seg = self.recv(end - time.monotonic())
            assert seg is not None, f"{len(out)} of {n} bytes came"
            assert not seg.flags & RST, f"reset after {len(out)} of {n} bytes"
            if seg.seq == self.rcv_nxt and seg.data:
                out += seg.data
                self.rcv_nxt = (self.rcv_nxt + len(seg.data)) & M32
                if seg.flags & FIN:
                    self.rcv_nxt = (self.rcv_nxt + 1) & M32
            if seg.data or seg.flags & FIN:
                self.send(ACK)
        return out
