"""Whole TCP transfers over a bad wire, in virtual time: a guest with a small correct TCP, egress, real host sockets.

A World is one egress stage (tests/harness.py, EgressOnly, its clock stopped), a wire that drops, duplicates, reorders,
delays, corrupts and truncates in both directions, and some transfers at once. Each transfer has a guest end (GuestEnd,
a TCP of its own: handshake, retransmission, reassembly, windows, SACK, FIN, RST, keepalive) and a host end (HostEnd, an
application on a real loopback socket). All waiting is done in virtual time, so a world with seconds of retransmission
timeouts runs in milliseconds; where only the kernel can go on (data in its own queues) it is given real time.

What must hold for any seed (World.run() raises Mismatch, with the seed in the text, if it does not):
  - what one end wrote is what the other end read, in order; all of it if both ended well, the start of it otherwise;
  - both ends learn how it ended: end of file, reset or refused;
  - no frame to the guest has a wrong checksum or lies outside its window; an ACK is never of what was not sent;
  - at the end no flow is left, and classify's buffers are all back.

The guest's view of the clock is the egress's: ns of virtual time. Everything random comes from one seed; only what the
host kernel does in between (how it cuts the stream) may differ from run to run.
"""
from __future__ import annotations

import heapq
import itertools
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shm._dataplane import ffi, lib
from tests.harness import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, EgressOnly, mac_bytes

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
M32 = 0xFFFFFFFF
MS, S = 1_000_000, 1_000_000_000  # ns
START = 10**15  # where the virtual clock begins, ns
_HEAD = mac_bytes(GATEWAY_MAC) + mac_bytes(GUEST_MAC) + b"\x08\x00"
_IP_SRC, _IP_DST = socket.inet_aton(GUEST), socket.inet_aton(GATEWAY)
_RN_BUF_ETH_OFF = 82


class Mismatch(AssertionError):
    """A promise was broken; the text has the seed."""


def add(a: int, b: int) -> int:
    return (a + b) & M32


def diff(a: int, b: int) -> int:
    """a - b as a signed distance of sequence numbers."""
    return ((a - b + 0x80000000) & M32) - 0x80000000


def ones(data: bytes) -> int:
    """Sum of RFC 1071 modulo 0xffff: 2^16 is 1 there, so a long number's remainder is the sum of its digits."""
    return int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big") % 0xFFFF


@dataclass(frozen=True, kw_only=True)
class Impairment:
    """One direction of the wire. Probabilities a frame; delays in ns."""

    drop: float = 0.0
    dup: float = 0.0
    reorder: float = 0.0  # held back by up to 10 ms
    corrupt: float = 0.0  # one bit
    truncate: float = 0.0
    delay: int = 0
    jitter: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One transfer. Sizes are bytes, times ns of virtual time."""

    isn: int
    mss: int | None = 1460
    wscale: int | None = 7
    sack: bool = True
    space: int = 65535  # guest's receive buffer
    delayed_ack: bool = False
    up: tuple[tuple[int, int], ...] = ()  # guest's writes: (after, size)
    down: tuple[tuple[int, int], ...] = ()
    guest_reads: tuple[int, int] = (1 << 20, 0)  # so many bytes, then a pause
    host_reads: tuple[int, int] = (1 << 20, 0)
    host_rcvbuf: int = 0  # 0: the kernel's choice
    close_after_eof: str = ""  # "guest" or "host": shuts its side only when the other's end came
    end: str = "clean"  # or "guest_rst", "host_rst", "refused"
    rst_after: int = 0  # bytes written (guest_rst, host_rst) before the reset
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One world."""

    seed: int
    mtu: int = 1500
    to_egress: Impairment = field(default_factory=Impairment)
    to_guest: Impairment = field(default_factory=Impairment)
    burst: int = 1  # frames put on the ring before egress gets its turn
    ring: int = 1024  # slots towards the guest
    peek: int = -1
    leaves: float = 0.0  # how likely another process of egress takes its seat before a turn
    plans: tuple[Plan, ...] = ()


class GuestEnd:
    """The guest's end: a small TCP that keeps every rule it can and is in no hurry."""

    RTO, RTO_MAX, KEEPALIVE = 300 * MS, 5 * S, 20 * S

    def __init__(self, world: World, plan: Plan, port: int, sport: int) -> None:
        self.world, self.plan, self.port, self.sport = world, plan, port, sport
        self.state = "closed"  # syn_sent, open, reset, refused
        self.heard = False  # what ends the handshake came to egress whole: a segment behind the SYN, not a keepalive
        self.out = bytearray()  # all that was written so far
        self.fin_wanted = False
        self.una = self.nxt = self.max = plan.isn  # sequence numbers
        self.peer_wnd, self.peer_shift, self.edge = 0, 0, 0
        self.wl1 = self.wl2 = 0
        self.mss = 536
        self.got = bytearray()  # read by the application
        self.buf = bytearray()  # in order, not read yet
        self.early: dict[int, bytes] = {}
        self.fin_seq: int | None = None
        self.eof = False
        self.irs = self.rcv_nxt = 0
        self.adv = 0  # right edge we offered
        self.shift = 0
        self.agreed_sack = False
        self.backoff = 0
        self.timer_at: int | None = None
        self.timer_gen = 0
        self.ack_due = False
        self.last_heard = 0
        self.paused = False
        self.all_written = self.aborted = False
        self.dupacks = 0

    # -- application

    def begin(self) -> None:
        self.state = "syn_sent"
        self._syn()
        self._arm(1 * S)
        self._keepalive_later()

    def _start_writes(self) -> None:
        at = 0
        for after, size in self.plan.up:
            at += after
            self.world.at(at, lambda n=size: self.write(n))
        self.world.at(at, self._wrote_all)

    def _wrote_all(self) -> None:
        self.all_written = True
        if self.plan.end == "clean" and (self.plan.close_after_eof != "guest" or self.eof):
            self.shut()

    def write(self, size: int) -> None:
        if self.state != "open":
            return
        self.out += self.world.up_data(self, len(self.out), size)
        if self.plan.end == "guest_rst" and len(self.out) >= self.plan.rst_after:
            self.world.at(self.world.rng.randrange(20 * MS), self.abort)
        self.push()

    def shut(self) -> None:
        if self.state == "open" and not self.fin_wanted:
            self.fin_wanted = True
            self.push()

    def abort(self) -> None:
        if self.state != "open":
            return
        self.segment(RST | ACK, self.nxt)
        self.state, self.aborted = "reset", True

    def read(self) -> None:
        """The application takes what it wants, and comes back after its pause."""
        self.paused = False
        if self.state != "open" or not self.buf:
            return
        size, pause = self.plan.guest_reads
        took = bytes(self.buf[:size])
        del self.buf[:size]
        self.got += took
        if pause and self.buf:
            self.paused = True
            self.world.at(pause, self.read)
        elif self.buf:
            self.world.at(0, self.read)
        # Window update once it is worth it (RFC 9293 3.8.6.2.2).
        free = self.plan.space - len(self.buf)
        if diff(add(self.rcv_nxt, free), self.adv) >= min(self.plan.space // 2 or 1, self.plan.mss or 536):
            self.segment(ACK, self.nxt)

    # -- segments out

    def window(self) -> int:
        """The window to offer: never takes back what was offered."""
        edge = add(self.rcv_nxt, max(0, self.plan.space - len(self.buf)))
        if diff(self.adv, edge) > 0:
            edge = self.adv
        wnd = min(diff(edge, self.rcv_nxt) >> self.shift, 65535)
        edge = add(self.rcv_nxt, wnd << self.shift)
        if diff(edge, self.adv) > 0:
            self.adv = edge
        return wnd

    def _syn(self) -> None:
        p = self.plan
        opts = b"" if p.mss is None else struct.pack("!BBH", 2, 4, p.mss)
        if p.wscale is not None:
            opts += struct.pack("!BBBB", 1, 3, 3, p.wscale)
        if p.sack:
            opts += b"\x01\x01\x04\x02"
        self.world.send(self, SYN, p.isn, 0, min(p.space, 65535), b"", opts)

    def _options(self) -> bytes:
        """SACK, if there is something to tell."""
        if not self.agreed_sack or not self.early:
            return b""
        blocks: list[list[int]] = []
        for off in sorted(diff(s, self.rcv_nxt) for s in self.early):
            end = off + len(self.early[add(self.rcv_nxt, off)])
            if blocks and off <= blocks[-1][1]:
                blocks[-1][1] = max(blocks[-1][1], end)
            else:
                blocks.append([off, end])
        blocks = blocks[:3]
        return b"\x01\x01" + struct.pack("!BB", 5, 2 + 8 * len(blocks)) + b"".join(
            struct.pack("!II", add(self.rcv_nxt, a), add(self.rcv_nxt, b)) for a, b in blocks)

    def _most(self) -> int:
        """Bytes in a segment: options come out of the MSS (RFC 6691 3)."""
        return max(1, self.mss - len(self._options()))

    def segment(self, flags: int, seq: int, data: bytes = b"") -> None:
        opts = b"" if flags & RST else self._options()
        self.ack_due = False
        self.world.send(self, flags, seq, self.rcv_nxt, 0 if flags & RST else self.window(), data, opts)

    def push(self) -> None:
        """Send what the peer's window takes, and the FIN behind it."""
        if self.state != "open":
            return
        end = add(self.plan.isn, 1 + len(self.out))
        while diff(end, self.nxt) > 0:
            room = diff(self.edge, self.nxt)
            n = min(self._most(), diff(end, self.nxt), room)
            if n <= 0:
                break
            at = diff(self.nxt, add(self.plan.isn, 1))
            self.segment(ACK | (PSH if n == diff(end, self.nxt) else 0), self.nxt, bytes(self.out[at:at + n]))
            self.nxt = add(self.nxt, n)
            self._sent()
        if self.fin_wanted and self.nxt == end:
            self.segment(ACK | FIN, self.nxt)
            self.nxt = add(self.nxt, 1)
            self._sent()
        if self.timer_at is None and (self.una != self.max or diff(end, self.nxt) > 0):
            self._arm(self.RTO)  # also the persist timer (RFC 9293 3.8.6.1)

    def _sent(self) -> None:
        if diff(self.nxt, self.max) > 0:
            self.max = self.nxt

    # -- timers

    def _arm(self, after: int) -> None:
        self.timer_gen += 1
        gen = self.timer_gen
        self.timer_at = self.world.now + after
        self.world.at(after, lambda: self._timeout(gen))

    def _disarm(self) -> None:
        self.timer_gen += 1
        self.timer_at = None

    def _timeout(self, gen: int) -> None:
        if gen != self.timer_gen or self.state not in ("syn_sent", "open"):
            return
        self.timer_at = None
        self.backoff += 1
        again = min(self.RTO << min(self.backoff, 8), self.RTO_MAX)
        if self.state == "syn_sent":
            self._syn()
            self._arm(max(again, 1 * S))
            return
        end = add(self.plan.isn, 1 + len(self.out))
        if self.una == self.max and diff(end, self.nxt) <= 0:
            return
        if self.una == self.max:  # closed window: one byte past its edge
            at = diff(self.nxt, add(self.plan.isn, 1))
            self.segment(ACK, self.nxt, bytes(self.out[at:at + 1]))
            if diff(self.edge, self.nxt) <= 0:
                self.nxt = add(self.nxt, 1)
                self._sent()
        else:  # back to the first byte that is not acknowledged; one segment, the rest when its ACK comes
            self.nxt = self.una
            n = min(self._most(), diff(end, self.nxt))
            if n > 0:
                at = diff(self.nxt, add(self.plan.isn, 1))
                self.segment(ACK, self.nxt, bytes(self.out[at:at + n]))
                self.nxt = add(self.nxt, n)
            else:
                self.segment(ACK | FIN, self.nxt)
                self.nxt = add(self.nxt, 1)
        self._arm(again)

    def _keepalive_later(self) -> None:
        self.world.at(self.KEEPALIVE, self._keepalive)

    def _keepalive(self) -> None:
        if self.state != "open":
            return
        if not (self.eof and self.una == self.max and self.fin_wanted and self.done_out()):
            if self.world.now - self.last_heard >= self.KEEPALIVE:
                self.segment(ACK, add(self.una, -1))  # RFC 9293 3.8.4
            self._keepalive_later()

    def done_out(self) -> bool:
        return self.fin_wanted and self.una == add(self.plan.isn, 2 + len(self.out))

    # -- segments in

    def arrive(self, seq: int, ack: int, flags: int, wnd: int, data: bytes, opts: bytes) -> None:
        w = self.world
        if self.state in ("reset", "refused", "closed"):
            if not flags & RST:  # no such connection (RFC 9293 3.10.7.1)
                w.send(self, RST, ack, 0, 0, b"", b"") if flags & ACK else None
            return
        self.last_heard = w.now
        if self.state == "syn_sent":
            w.must(not flags & ACK or ack == add(self.plan.isn, 1), self, "an ACK of more than the SYN")
            if flags & RST:
                self.state = "refused"
            elif flags & SYN:
                self._established(seq, wnd, opts)
            return
        if flags & RST:
            if self.eof and self.done_out():
                return  # TIME-WAIT, or closed: a late segment of ours met nobody (RFC 1337)
            if seq == self.rcv_nxt:
                self.state = "reset"
            elif 0 <= diff(seq, self.rcv_nxt) < max(1, diff(self.adv, self.rcv_nxt)):
                self.segment(ACK, self.max)  # challenge (RFC 5961 3.2)
            return
        if flags & SYN:
            self.segment(ACK, self.max)  # our ACK of it was lost
            return
        w.must(bool(flags & ACK), self, "a segment without ACK")
        w.must(diff(ack, self.max) <= 0, self, f"ACK of {diff(ack, self.max)} bytes more than was sent")
        edge = add(ack, wnd << self.peer_shift)
        if diff(ack, self.una) > 0:
            self.una = ack
            self.backoff = self.dupacks = 0
            if diff(self.nxt, ack) < 0:
                self.nxt = ack
            self._disarm()
            if self.una != self.max:
                self._arm(self.RTO)
        elif ack == self.una and self.una != self.max and not data and edge == self.edge:
            self.dupacks += 1
            if self.dupacks == 3:  # fast retransmit (RFC 5681 3.2)
                at = diff(self.una, add(self.plan.isn, 1))
                if 0 <= at < len(self.out):
                    self.segment(ACK, self.una, bytes(self.out[at:at + self._most()]))
        if diff(edge, self.edge) > 0:
            self.edge = edge
        self._data(seq, data, bool(flags & FIN))
        if self.state == "open":
            self.push()

    def _established(self, seq: int, wnd: int, opts: bytes) -> None:
        self.state = "open"
        self.irs, self.rcv_nxt = seq, add(seq, 1)
        self.adv = add(self.rcv_nxt, min(self.plan.space, 65535))
        at = 0
        agreed = None
        while at < len(opts) and opts[at]:
            if opts[at] == 1:
                at += 1
                continue
            if opts[at] == 2:
                self.mss = struct.unpack_from("!H", opts, at + 2)[0]
            elif opts[at] == 3:
                agreed = opts[at + 2]
            elif opts[at] == 4:
                self.agreed_sack = True
            at += opts[at + 1]
        self.world.must(agreed is None or self.plan.wscale is not None, self, "window scale that was not offered")
        self.world.must(not self.agreed_sack or self.plan.sack, self, "SACK that was not offered")
        self.world.must(self.mss == self.world.spec.mtu - 40, self, "MSS of the SYN-ACK")
        if agreed is not None and self.plan.wscale is not None:
            self.peer_shift, self.shift = agreed, self.plan.wscale
        self.una = self.nxt = self.max = add(self.plan.isn, 1)
        self.edge = add(self.una, wnd)  # never scaled (RFC 7323 2.2)
        self.backoff = 0
        self._disarm()
        if self.world.rng.random() < 0.8:
            self.segment(ACK, self.nxt)  # else the first data is its first ACK
        self._start_writes()

    def _data(self, seq: int, data: bytes, fin: bool) -> None:
        w = self.world
        if not data and not fin:
            if diff(seq, self.rcv_nxt) < 0:
                self.segment(ACK, self.max)  # a probe
            return
        w.must(diff(add(seq, len(data)), self.adv) <= 0, self, "data outside the window")
        if fin:
            end = add(seq, len(data))
            w.must(self.fin_seq in (None, end), self, "two places for one FIN")
            self.fin_seq = end
        if data:
            off = diff(seq, self.rcv_nxt)
            if off < 0:
                data, seq, off = data[-off:], self.rcv_nxt, 0
            if data and off >= 0 and len(self.early.get(seq, b"")) < len(data):
                self.early[seq] = data
        in_order = False
        while True:
            for s in list(self.early):
                off = diff(s, self.rcv_nxt)
                if off <= 0:
                    part = self.early.pop(s)[-off:] if off else self.early.pop(s)
                    if part:
                        self.buf += part
                        self.rcv_nxt = add(self.rcv_nxt, len(part))
                        in_order = True
                        break
            else:
                break
        if self.fin_seq is not None and self.rcv_nxt == self.fin_seq and not self.eof:
            self.eof = True
            self.rcv_nxt = add(self.rcv_nxt, 1)
            if self.plan.close_after_eof == "guest" and self.all_written and self.plan.end == "clean":
                w.at(0, self.shut)
        if self.buf and not self.paused:
            self.paused = True
            w.at(0, self.read)
        if self.plan.delayed_ack and in_order and not self.eof and not self.ack_due and not self.early:
            self.ack_due = True
            w.at(40 * MS, self._delayed)
        else:
            self.segment(ACK, self.max)

    def _delayed(self) -> None:
        if self.ack_due and self.state == "open":
            self.segment(ACK, self.max)


class HostEnd:
    """The application on the host side."""

    def __init__(self, world: World, plan: Plan, listener: socket.socket) -> None:
        self.world, self.plan, self.listener = world, plan, listener
        self.sock: socket.socket | None = None
        self.wrote = bytearray()  # taken by the kernel
        self.pending = bytearray()
        self.got = bytearray()
        self.result = "refused" if plan.end == "refused" else ""  # or eof, reset, closed (by our own reset)
        self.all_written = self.shut_wanted = self.shut_done = False
        self.paused = False

    def accept(self) -> None:
        try:
            self.sock, _ = self.listener.accept()
        except BlockingIOError:
            return
        self.sock.setblocking(False)
        # Nagle would wait for the other kernel's delayed ACK, in real time.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        at = 0
        for after, size in self.plan.down:
            at += after
            self.world.at(at, lambda n=size: self.write(n))
        self.world.at(at, self._wrote_all)

    def _wrote_all(self) -> None:
        self.all_written = True
        if self.plan.end == "clean" and (self.plan.close_after_eof != "host" or self.result == "eof"):
            self.shut_wanted = True

    def write(self, size: int) -> None:
        self.pending += self.world.down_data(self, len(self.wrote) + len(self.pending), size)
        if self.plan.end == "host_rst" and len(self.wrote) + len(self.pending) >= self.plan.rst_after:
            self.world.at(self.world.rng.randrange(20 * MS), self.abort)

    def abort(self) -> None:
        if self.sock and not self.result:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close("closed")

    def close(self, result: str) -> None:
        if self.sock:
            self.sock.close()
        self.sock, self.result = None, result

    def _resume(self) -> None:
        self.paused = False

    def pump(self) -> bool:
        """Do what can be done; True if something was."""
        if self.sock is None:
            if not self.result:
                self.accept()
            return self.sock is not None
        did = False
        try:
            while self.pending:
                n = self.sock.send(self.pending[:1 << 18])
                self.wrote += self.pending[:n]
                del self.pending[:n]
                did = True
        except BlockingIOError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            self.close("reset")
            return True
        if self.shut_wanted and not self.pending and not self.shut_done:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:  # reset meanwhile: the read tells
                pass
            self.shut_done = did = True
        size, pause = self.plan.host_reads
        while not self.paused and self.result != "eof":
            try:
                data = self.sock.recv(size)
            except BlockingIOError:
                break
            except ConnectionResetError:
                self.close("reset")
                return True
            did = True
            if not data:
                self.result = "eof"
                if self.plan.close_after_eof == "host" and self.all_written and self.plan.end == "clean":
                    self.shut_wanted = True
                break
            self.got += data
            if pause:
                self.paused = True
                self.world.at(pause, self._resume)
        return did

    def waits_for_kernel(self, acked: int) -> bool:
        """Is there data that only the kernel can bring on? acked: bytes of the guest's that egress acknowledged."""
        return self.sock is not None and not self.paused and not self.result and acked > len(self.got)


class World:
    """One world; run() it once."""

    def __init__(self, spec: Spec, trace: bool = False) -> None:
        self.spec, self.trace = spec, trace
        self.rng = random.Random(spec.seed)
        self.seat = random.Random(spec.seed + 1)  # apart: a world's wire is the same with and without
        self.successions = 0
        self.now = START
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.queue: list[bytes] = []  # frames due at egress
        self.frames = {"to_egress": 0, "to_guest": 0, "lost": 0}
        self.bytes = 0
        self.ends: list[tuple[GuestEnd, HostEnd]] = []
        self.by_port: dict[int, GuestEnd] = {}
        self.parsed = ffi.new("struct rn_parsed *")

    # -- what the ends use

    def must(self, ok: bool, who: Any, what: str) -> None:
        if not ok:
            raise Mismatch(f"seed {self.spec.seed}: {what}\n  at {(self.now - START) / 1e9:.6f} s, {self.describe(who)}")

    def describe(self, who: Any) -> str:
        for g, h in self.ends:
            if who in (g, h):
                return (f"guest {g.state}, wrote {len(g.out)} (acked {diff(g.una, g.plan.isn) - 1}), got {len(g.got)}+{len(g.buf)},"
                        f" eof {g.eof}; host {h.result or 'open'}, wrote {len(h.wrote)}+{len(h.pending)}, got {len(h.got)};"
                        f" {g.plan}")
        return str(who)

    def at(self, after: int, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + after, next(self.order), call))

    def up_data(self, end: GuestEnd, at: int, size: int) -> bytes:
        return self._pattern(end.sport, at, size)

    def down_data(self, end: HostEnd, at: int, size: int) -> bytes:
        return self._pattern(id(end) & 0 | 1, at, size)

    def _pattern(self, key: int, at: int, size: int) -> bytes:
        block = _BLOCK
        start = (at + key * 7919) % len(block)
        out = block[start:start + size]
        while len(out) < size:
            out += block[:size - len(out)]
        return out

    def send(self, end: GuestEnd, flags: int, seq: int, ack: int, wnd: int, data: bytes, opts: bytes) -> None:
        """One segment from the guest, onto the wire."""
        th = struct.pack("!HHIIBBHHH", end.sport, end.port, seq, ack, (20 + len(opts)) // 4 << 4, flags, wnd, 0, 0) + opts
        n = len(th) + len(data)
        seg = th + data
        c = 0xFFFF - ones(_IP_SRC + _IP_DST + struct.pack("!BBH", 0, 6, n) + seg)
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + n, 0, 0x4000, 64, 6, 0, _IP_SRC, _IP_DST)
        ip = ip[:10] + struct.pack("!H", 0xFFFF - ones(ip)) + ip[12:]
        frame = _HEAD + ip + seg[:16] + struct.pack("!H", c) + seg[18:]
        if self.trace:
            print(f"{(self.now - START) / 1e6:12.3f} ms  {end.sport} > {_flags(flags)} seq {diff(seq, end.plan.isn)} "
                  f"ack {diff(ack, end.irs)} wnd {wnd} len {len(data)} opts {opts.hex()}")
        self._wire(self.spec.to_egress, frame, self.queue.append)

    # -- the wire

    def _wire(self, im: Impairment, frame: bytes, deliver: Callable[[bytes], None]) -> None:
        rng = self.rng
        if im.drop and rng.random() < im.drop:
            self.frames["lost"] += 1
            return
        copies = 2 if im.dup and rng.random() < im.dup else 1
        for _ in range(copies):
            f = frame
            if im.corrupt and rng.random() < im.corrupt:
                bad = bytearray(f)
                bad[rng.randrange(14, len(bad))] ^= 1 << rng.randrange(8)  # no checksum guards the MAC addresses
                f = bytes(bad)
            if im.truncate and rng.random() < im.truncate:
                f = f[:rng.randrange(1, len(f))]
            after = im.delay + (rng.randrange(im.jitter) if im.jitter else 0)
            if im.reorder and rng.random() < im.reorder:
                after += rng.randrange(10 * MS)
            if after:
                self.at(after, lambda f=f: deliver(f))
            else:
                deliver(f)

    def _put(self, frame: bytes) -> None:
        """As guest_tx and classify would: what is cut or corrupt does not get to egress."""
        e = self.egress
        if len(frame) < 14 or lib.rn_parse_bytes(frame, len(frame), ffi.NULL, e._parse, self.parsed) != lib.RN_V_BRIDGE:
            self.frames["lost"] += 1
            return
        e.put(frame)
        self.frames["to_egress"] += 1
        end = self.by_port.get(int.from_bytes(frame[34:36], "big"))
        if end is not None and frame[47] & ACK and diff(int.from_bytes(frame[38:42], "big"), end.plan.isn) > 0:
            end.heard = True

    def _to_guest(self, frame: bytes) -> None:
        """A frame that survived the wire; a real stack's checks."""
        if len(frame) < 54 or frame[:6] != _HEAD[6:12] or frame[12:14] != b"\x08\x00" or frame[14] != 0x45:
            return
        ip = frame[14:34]
        total = struct.unpack_from("!H", ip, 2)[0]
        if ones(ip) or total > len(frame) - 14 or ip[9] != 6 or total < 40:
            return
        seg = frame[34:14 + total]
        if ones(ip[12:20] + struct.pack("!BBH", 0, 6, len(seg)) + seg):
            return
        sport, dport, seq, ack, off, flags, wnd = struct.unpack_from("!HHIIBBH", seg)
        end = self.by_port.get(dport)
        if end is None or sport != end.port:
            return
        hlen = (off >> 4) * 4
        if self.trace:
            print(f"{(self.now - START) / 1e6:12.3f} ms  {dport} < {_flags(flags)} seq {diff(seq, end.irs)} "
                  f"ack {diff(ack, end.plan.isn)} wnd {wnd} len {len(seg) - hlen} opts {seg[20:hlen].hex()}")
        end.arrive(seq, ack, flags, wnd, bytes(seg[hlen:]), bytes(seg[20:hlen]))

    # -- the run

    def run(self) -> None:
        """Raises Mismatch."""
        mtu = self.spec.mtu
        listeners = []
        with EgressOnly(mtu=mtu, ring=self.spec.ring, peek=self.spec.peek,
                        seed=self.spec.seed & 0xFFFF | 1) as self.egress:
            self.egress.stop_clock(START)
            try:
                for k, plan in enumerate(self.spec.plans):
                    listener = socket.socket()
                    listeners.append(listener)
                    if plan.host_rcvbuf:
                        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, plan.host_rcvbuf)
                    listener.bind(("127.0.0.1", 0))
                    listener.setblocking(False)
                    if plan.end != "refused":
                        listener.listen(4)
                    guest = GuestEnd(self, plan, listener.getsockname()[1], 20000 + k)
                    self.ends.append((guest, HostEnd(self, plan, listener)))
                    self.by_port[20000 + k] = guest
                    self.at(plan.start, guest.begin)
                self._loop()
                self._check()
            finally:
                for _, host in self.ends:
                    if host.sock:
                        host.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        host.close("closed")
                for listener in listeners:
                    listener.close()

    def _finished(self, g: GuestEnd, h: HostEnd) -> bool:
        if g.plan.end == "refused":
            return g.state == "refused"
        if g.state == "reset" or h.result in ("reset", "closed"):
            return g.state == "reset" and h.result in ("reset", "closed")
        return (g.state == "open" and g.eof and not g.buf and g.done_out() and h.result == "eof" and h.shut_done)

    def _turn(self) -> bool:
        """One turn of everything at this moment; True if anything moved."""
        did = False
        e = self.egress
        if self.spec.leaves and self.seat.random() < self.spec.leaves:
            left = e.leave()
            self.must(e.succeed()[0] == left, None, "egress does not go on with what its predecessor left")
            self.successions += 1
        while self.queue:
            batch, self.queue = self.queue[:self.spec.burst], self.queue[self.spec.burst:]
            for frame in batch:
                self._put(frame)
            e.step()
            did = True
        e._stopped_at = self.now
        did |= e.step()
        if e.take(64):
            did = True
            while e._frames:
                frame = e._frames.popleft()
                self._honest(frame)
                self.frames["to_guest"] += 1
                self._wire(self.spec.to_guest, frame, self._to_guest)
        for _, host in self.live:
            did |= host.pump()
        return did

    def _honest(self, frame: bytes) -> None:
        """Before the wire spoils it: what egress sends is well-formed."""
        ip = frame[14:34]
        total = struct.unpack_from("!H", ip, 2)[0]
        ok = frame[:6] == _HEAD[6:12] and total == len(frame) - 14 and total <= self.spec.mtu and not ones(ip)
        if ok and ip[9] == 6:
            ok = not ones(ip[12:20] + struct.pack("!BBH", 0, 6, total - 20) + frame[34:])
        self.must(ok, None, f"a bad frame from egress: {frame.hex()}")

    def _loop(self) -> None:
        e = self.egress
        deadline = START + 40_000 * S
        self.live = list(self.ends)
        real = 0
        while True:
            while self.events and self.events[0][0] <= self.now:
                heapq.heappop(self.events)[2]()
            if self._turn():
                real = 0
                continue
            if self.events and self.events[0][0] <= self.now or self.queue:
                continue
            self.live = [(g, h) for g, h in self.live if not self._finished(g, h)]
            if not self.live:
                return
            # Only the kernel can go on? Then it gets real time, but not for ever.
            if real < 200 and any(h.waits_for_kernel(diff(g.una, g.plan.isn) - 1) for g, h in self.live):
                real += 1
                e.step(0.005)
                continue
            real = 0
            times = [t for t in (self.events[0][0] if self.events else None, e.due()) if t is not None]
            if not times or min(times) > deadline:
                g = self.live[0][0]
                self.must(False, g, "it never ends")
            self.now = max(self.now, min(times))
            e._stopped_at = self.now

    def _check(self) -> None:
        for g, h in self.ends:
            self.bytes += len(g.got) + len(h.got)
            end = g.plan.end
            up, down = bytes(g.out), bytes(h.wrote + h.pending)
            self.must(up.startswith(h.got), g, "the host read what the guest did not write")
            self.must(down.startswith(g.got), g, "the guest read what the host did not write")
            if end != "refused" and g.state == "reset" and not g.heard:
                # Nothing ended the handshake in the 63 s in which its SYN-ACK is sent again: that both ends are told is right.
                self.must(h.result in ("reset", "closed"), g, "the host was not told that the handshake had failed")
            elif end == "clean":
                self.must((g.state, h.result) == ("open", "eof"), g, "it ended otherwise than both ends wanted")
                self.must(h.got == up and g.got == down, g, "not everything arrived")
            elif end == "refused":
                self.must(g.state == "refused", g, "the guest was not told of the refusal")
            elif end == "guest_rst":
                self.must(g.aborted and h.result == "reset", g, "the host was not told of the guest's reset")
            else:
                self.must(g.state == "reset" and not g.aborted and h.result == "closed", g,
                          "the guest was not told of the host's reset")
        self.now += 3700 * S  # TIME-WAIT and what else is left
        self.egress._stopped_at = self.now
        for _ in range(50):
            self.egress.settle()
            self.egress.take()
            if not self.egress.flows():
                break
            self.now += 3600 * S  # a peer that is gone is found by keepalive; its RST went lost
            self.egress._stopped_at = self.now
        self.must(not self.egress.flows(), self.ends[0][0], f"{len(self.egress.flows())} flows are left")
        pool = self.egress._pool
        left = lib.rn_pool_free(pool, lib.RN_SMALL), lib.rn_pool_free(pool, lib.RN_LARGE)
        self.must(left == (256, 32), None, f"classify's buffers did not come back: {left}")


def _flags(flags: int) -> str:
    return "".join(c for k, c in enumerate("FSRPAU") if flags >> k & 1) or "-"


_BLOCK = random.Random(7).randbytes(1 << 16)


# --- a world by its number ---

def random_impairment(rng: random.Random) -> Impairment:
    if rng.random() < 0.3:
        return Impairment(delay=rng.choice((0, 0, 50_000, 2 * MS)))
    hard = rng.choice((0.01, 0.03, 0.1, 0.2))
    pick = lambda p: rng.random() * hard if rng.random() < p else 0.0  # noqa: E731
    return Impairment(drop=pick(0.8), dup=pick(0.5), reorder=pick(0.6), corrupt=pick(0.4), truncate=pick(0.3),
                      delay=rng.choice((0, 20_000, 1 * MS, 30 * MS)), jitter=rng.choice((0, 0, 30_000, 3 * MS)))


def random_plan(rng: random.Random, mtu: int, bad: bool) -> Plan:
    isn = rng.choice((rng.getrandbits(32), M32 - rng.randrange(3000), 0x7FFFFFFF - rng.randrange(3000), 0, M32))
    mss = rng.choice((1460, 1460, None, 64, 536, 8960, 65495, 1, rng.randrange(64, 65496)))
    space = rng.choice((65535, 65535, 1 << 20, 4096, 1000, 100, 1, 3))
    wscale = rng.choice((7, None, 0, 14, 3))
    if wscale and space >> wscale < 4:
        wscale = 0
    scale = rng.choice((10, 1000, 1000, 20_000, 20_000, 100_000))
    if space < 64:
        scale = 100  # a byte or so a round trip
    elif space < 4096 or (mss or 536) < 200:
        scale = min(scale, 5000)
    if bad:
        scale = min(scale, 30_000)
    writes = lambda: tuple((rng.choice((0, 0, 1 * MS, 50 * MS, 3 * S)), rng.randrange(scale))  # noqa: E731
                           for _ in range(rng.choice((0, 1, 1, 2, 5))))
    up, down = writes(), writes()
    end = rng.choices(("clean", "guest_rst", "host_rst", "refused"), (80, 8, 8, 4))[0]
    total = sum(n for _, n in (up if end == "guest_rst" else down))
    if end in ("guest_rst", "host_rst"):
        if not (up if end == "guest_rst" else down):
            up = down = ((0, 500),)
            total = 500
    slow = lambda: rng.choice(((1 << 20, 0), (1 << 20, 0), (1000, 1 * MS), (100, 0), (7, 100_000), (1 << 14, 700 * MS)))  # noqa: E731
    reads = [slow(), slow()]
    return Plan(
        isn=isn, mss=mss, wscale=wscale, sack=rng.random() < 0.6, space=space, delayed_ack=rng.random() < 0.3,
        up=up, down=down, guest_reads=reads[0], host_reads=reads[1], host_rcvbuf=rng.choice((0, 0, 2048, 16384)),
        close_after_eof=rng.choice(("", "", "guest", "host")) if end == "clean" else "",
        end=end, rst_after=rng.randrange(total + 1), start=rng.choice((0, 0, rng.randrange(100 * MS))))


def random_spec(seed: int, transfers: int | None = None) -> Spec:
    """The world that a seed names."""
    rng = random.Random(seed)
    mtu = rng.choice((1500, 1500, 576, 9000, 65520))
    up, down = random_impairment(rng), random_impairment(rng)
    n = transfers or rng.choice((1, 1, 2, 4, 8))
    return Spec(seed=seed, mtu=mtu, to_egress=up, to_guest=down, burst=rng.choice((1, 4, 16)),
                ring=rng.choice((1024, 1024, 16, 4)), plans=tuple(
                    random_plan(rng, mtu, max(up.drop, down.drop, up.truncate, down.truncate) > 0.05) for _ in range(n)))


# --- many worlds: tools/transfers ---

@dataclass
class Done:
    worlds: int = 0
    transfers: int = 0
    bytes: int = 0
    lost: int = 0
    virtual: float = 0.0  # s
    failures: list[str] = field(default_factory=list)

    def add(self, other: Done) -> None:
        self.worlds += other.worlds
        self.transfers += other.transfers
        self.bytes += other.bytes
        self.lost += other.lost
        self.virtual += other.virtual
        self.failures += other.failures


def run_seed(seed: int) -> Done:
    world = World(random_spec(seed))
    failures = []
    try:
        world.run()
    except AssertionError as e:  # a Mismatch, or one of the harness's own checks
        failures.append(f"seed {seed}: {e}")
    except Exception as e:
        raise RuntimeError(f"seed {seed}: the harness itself failed") from e
    return Done(1, len(world.spec.plans), world.bytes, world.frames["lost"], (world.now - START) / 1e9, failures)


def run_many(count: int, seed: int) -> Done:
    """Worlds seed, seed + 1, ... until `count` transfers were made."""
    done = Done()
    while done.transfers < count:
        done.add(run_seed(seed))
        seed += 1
    return done


def main() -> int:
    import argparse
    import os
    import time
    from concurrent.futures import ProcessPoolExecutor

    p = argparse.ArgumentParser(prog="transfers", description="Seeded TCP transfers over a bad wire, in virtual time.")
    p.add_argument("--count", type=int, default=10_000, help="transfers (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the first world (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    p.add_argument("--trace", action="store_true", help="run the one world of --seed and print every segment")
    args = p.parse_args()
    if args.trace:
        World(random_spec(args.seed), trace=True).run()
        return 0
    began, total, size = time.monotonic(), Done(), 40
    with ProcessPoolExecutor(args.jobs) as pool:
        seed, waiting, asked = args.seed, [], 0
        while total.transfers < args.count:
            while len(waiting) < 2 * args.jobs and asked < args.count:
                n = min(size, args.count - asked)
                waiting.append(pool.submit(_run_range, seed, n))
                # A world has 1 to 8 transfers, and a range ends with its last world: seeds of ranges do not meet.
                seed, asked = seed + n, asked + n
            done = waiting.pop(0).result()
            for text in done.failures:
                print(text, flush=True)
            total.add(done)
            if not waiting and asked >= args.count and total.transfers < args.count:
                asked = total.transfers
    seconds = time.monotonic() - began
    print(f"{total.transfers} transfers in {total.worlds} worlds, {total.bytes} bytes, {total.lost} frames lost to the wire, "
          f"{total.virtual:.0f} s of virtual time in {seconds:.0f} s: {len(total.failures)} mismatches")
    return bool(total.failures)


def _run_range(seed: int, count: int) -> Done:
    return run_many(count, seed)


if __name__ == "__main__":
    raise SystemExit(main())
