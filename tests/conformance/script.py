"""Runs a rule file: a short script that says who sends what on a TCP connection and what must come back.

    # rule:  A segment of no connection is answered with a reset, unless it is one
    # rfc:   RFC 9293 3.10.7.1
    guest sends ACK seq=500 ack=900 len=4
    guest gets  RST seq=900
    guest sends RST seq=500
    guest gets  nothing

Header lines, all "# key: value": rule (one line, required), rfc (sections, required), fault (numbers in
tests/faults/faults.py), on (stage, wire; default both), mtu, and note (why we do it this way; may be repeated).

"stage" runs egress alone with a clock that moves only when the script says so; "wire" runs every process of the
pipeline. Rules about time or retransmission run on the stage only; on the wire a retransmission is passed over.

Numbers are relative: 0 is each side's SYN, 1 its first byte. Before a SYN-ACK came, the gateway's are absolute. The
bytes of a stream are a function of their number, so whatever is received is compared: a lost, doubled or misplaced byte
fails.

    guest sends FLAGS key=value...           seq= ack= len= win= (as on the wire; stays until changed) urg= mss= wscale=
                                             times=N (consecutive segments), junk (other bytes), corrupt (a wrong
                                             checksum), sack (SYN: permitted), sack=LO:HI,LO:HI (blocks, [LO, HI)),
                                             opts=HEX (raw options), again (SYN: not the guest's real options),
                                             together (stage: with those that follow, as one burst)
    guest gets  FLAGS key=value...           the next segment: exactly these of FIN SYN RST ACK; PSH, URG, ECE, CWR if
                                             named. Also <= and >=; window: win scaled; mss, wscale: a number or none;
                                             sack=permitted, none or LO:HI,LO:HI (.. behind it: and others); noopts: no
                                             other option. seq=new: the SYN-ACK's number is the new 0.
                                             after=S: not before S seconds of the clock have passed, and then
    guest gets  nothing                      no segment of this connection, for=S: within S seconds of the clock
    guest gets  ICMP type=T code=C           an ICMP error that quotes this connection
    guest awaits ...                         as gets, but passes over others
    guest takes N key=value... [quiet]       N new bytes in order, each segment acknowledged (quiet: not); conditions on
                                             each; guest_seq=: the number of the ACKs
    guest fills the window                   in-order segments until no window is left; the host does not read
    connected key=value...                   handshake, as from a guest with these SYN options; accepted by the host
    host listens [backlog=N] | host refuses  a server, or none
    host accepts [rcvbuf=N]
    host writes N | reads N | reads nothing | reads end | reads reset | shuts down | closes | resets
    host drains                              reads all that the guest sent
    clock +S                                 S seconds later
    counter NAME +N                          egress counted so many since the script began (+N.. at least)
    flow gone                                the table has no TCP entry (stage), or a segment is reset (wire)

Whatever the rule is, every segment must also keep these: right checksums, no byte beyond the guest's window or over its
MSS, no ACK of what was not sent, and a right edge of our window that never moves back, nor forward by less than a
segment.
"""
from __future__ import annotations

import contextlib
import random
import re
import shlex
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import (
    DEADLINE,
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    ICMP,
    TCP,
    Datagram,
    EgressOnly,
    Guest,
    checksum,
    closed_tcp_port,
    fresh_port,
    ipv4,
    mac_bytes,
    quoted,
)

FLAGS = {"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32, "ECE": 64, "CWR": 128}
_ALWAYS = FLAGS["FIN"] | FLAGS["SYN"] | FLAGS["RST"] | FLAGS["ACK"]
M32 = 0xFFFFFFFF
TICK = 0.012  # s: timers may be late by this (csrc/egress.h: the wheel turns in 4 ms) ...
EARLY = 0.002  # ... and none may be early by more than rounding
_UP, _DOWN = random.Random(1).randbytes(1 << 20), random.Random(2).randbytes(1 << 20)
HEADER = re.compile(r"#\s*(rule|rfc|fault|on|mtu|note):\s*(.*\S)\s*$")


def stream(source: bytes, at: int, length: int) -> bytes:
    at %= len(source)
    return (source * (1 + (at + length) // len(source)))[at:at + length]


@dataclass(frozen=True)
class Rule:
    """A rule file."""

    path: Path
    text: str
    rfc: str
    on: tuple[str, ...]
    mtu: int
    faults: tuple[int, ...]
    steps: tuple[tuple[int, str], ...]  # (line number, step)

    @property
    def name(self) -> str:
        return self.path.stem


def load(path: Path) -> Rule:
    """Read a rule file. Raises ValueError, with the line, for one without rule or rfc, or with a step nobody knows."""
    head: dict[str, str] = {}
    steps = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if m := HEADER.match(line):
            if m[1] in head and m[1] != "note":
                raise ValueError(f"{path}:{number}: {m[1]} given twice")
            head[m[1]] = m[2]
        elif line and not line.startswith("#"):
            step = line.partition(" #")[0].strip()
            if not any(step == verb or step.startswith(verb + " ") for verb in VERBS):
                raise ValueError(f"{path}:{number}: no such step: {step}")
            steps.append((number, step))
    for key in ("rule", "rfc"):
        if key not in head:
            raise ValueError(f"{path}: no '# {key}:' line")
    if not steps:
        raise ValueError(f"{path}: no steps")
    on = tuple(head.get("on", "stage wire").split())
    if not set(on) <= {"stage", "wire"}:
        raise ValueError(f"{path}: on: {head['on']}")
    timed = [s for _, s in steps if s.startswith("clock ") or " after=" in s or " for=" in s]
    if timed and "on" in head and "wire" in on:
        raise ValueError(f"{path}: only the stage has a clock to move")
    if timed:
        on = ("stage",)
    return Rule(path, head["rule"], head["rfc"], on, int(head.get("mtu", "1500")),
                tuple(int(n) for n in head.get("fault", "").split()), tuple(steps))


@dataclass(frozen=True)
class Segment:
    """One segment to the guest, host order, numbers as on the wire."""

    seq: int
    ack: int
    flags: int
    win: int
    data: bytes
    options: dict[int, bytes]

    @classmethod
    def parse(cls, d: Datagram) -> Segment:
        raw = d.payload
        pseudo = socket.inet_aton(d.src) + socket.inet_aton(d.dst) + struct.pack("!BBH", 0, TCP, len(raw))
        assert checksum(pseudo + raw) == 0, "bad TCP checksum to the guest"
        seq, ack, off, flags, win, urgent = struct.unpack_from("!4xIIBBH2xH", raw)
        hlen, options, at = (off >> 4) * 4, {}, 20
        assert 20 <= hlen <= len(raw) and not off & 15, "bad TCP header to the guest"
        assert flags & FLAGS["URG"] or urgent == 0
        while at < hlen and raw[at]:
            if raw[at] == 1:
                at += 1
                continue
            assert at + 1 < hlen and 2 <= raw[at + 1] <= hlen - at, "bad TCP options to the guest"
            options[raw[at]] = raw[at + 2:at + raw[at + 1]]
            at += raw[at + 1]
        return cls(seq, ack, flags, win, raw[hlen:], options)

    def __str__(self) -> str:
        names = " ".join(n for n, bit in FLAGS.items() if self.flags & bit)
        return f"{names} seq={self.seq} ack={self.ack} len={len(self.data)} win={self.win} {self.options or ''}"


@dataclass
class Args:
    """FLAGS and key=value words of a step."""

    flags: int = 0
    words: list[str] = field(default_factory=list)
    fields: list[tuple[str, str, str]] = field(default_factory=list)  # key, operator, value

    @classmethod
    def parse(cls, words: list[str]) -> Args:
        a = cls()
        for w in words:
            if w in FLAGS:
                a.flags |= FLAGS[w]
            elif m := re.fullmatch(r"(\w+)(<=|>=|=)(\S+)", w):
                a.fields.append((m[1], m[2], m[3]))
            else:
                a.words.append(w)
        return a

    def take(self, key: str, default: Any = None) -> Any:
        for f in self.fields:
            if f[0] == key and f[1] == "=":
                self.fields.remove(f)
                return f[2]
        return default

    def number(self, key: str, default: int | None = None) -> int | None:
        v = self.take(key)
        return default if v is None else int(v, 0)

    def word(self, w: str) -> bool:
        if w in self.words:
            self.words.remove(w)
            return True
        return False

    def done(self) -> None:
        assert not self.words and not self.fields, f"not understood: {self.words} {self.fields}"


def verb(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(f: Callable[..., None]) -> Callable[..., None]:
        VERBS[name] = f
        return f
    return note


VERBS: dict[str, Callable[..., None]] = {}


class Script:
    """One run of one rule."""

    def __init__(self, rule: Rule, guest: Guest) -> None:
        self.rule, self.guest = rule, guest
        self.clock = isinstance(guest, EgressOnly)
        self.sport, self.port = fresh_port(), 9
        self.isn = random.Random(rule.name).randrange(1 << 32)
        self.irs = 0  # the gateway's number that is called 0
        self.snd_max = 0  # the guest's highest number sent, relative
        self.seen = 0  # the gateway's highest number that came, relative
        self.rcv_nxt = 0  # what "takes" expects, relative
        self.win, self.mss, self.wscale, self.peer_wscale = 65535, 1460, 7, 0
        self.agreed = False  # window scaling
        self.edge: int | None = None  # right edge of the gateway's window, relative
        self.acked = 0  # highest that the gateway acknowledged, relative
        self.guest_edge = 0  # the guest's, relative
        self.own_mss = rule.mtu - 40  # what the gateway may be sent
        self.read_at = self.write_at = 1
        self.base = 1
        self.server: socket.socket | None = None
        self.host: socket.socket | None = None
        self.source, self.mac = GUEST, guest.mac
        self.stack = contextlib.ExitStack()
        self.before = guest.counters()

    @classmethod
    def on(cls, guest: Guest, name: str = "test") -> Script:
        """A connection of its own for a test in Python: with Script.on(guest) as c: c.do("connected", ...)."""
        return cls(Rule(Path(name), name, "", (), guest.mtu, (), ()), guest)

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def do(self, *steps: str) -> None:
        for step in steps:
            name = max((v for v in VERBS if step == v or step.startswith(v + " ")), key=len)
            try:
                VERBS[name](self, Args.parse(shlex.split(step[len(name):])))
            except (AssertionError, OSError, EOFError) as e:
                what = str(e).splitlines()[0] if str(e) else type(e).__name__
                raise AssertionError(f"{self.rule.path.name}: {step}\n    {what}") from e

    def run(self) -> None:
        """The whole rule. AssertionError names file, line and step."""
        with self.stack:
            if isinstance(self.guest, EgressOnly):
                self.guest.stop_clock()
            for number, step in self.rule.steps:
                try:
                    self.do(step)
                except AssertionError as e:
                    raise AssertionError(str(e).replace(": ", f":{number}: ", 1)) from e

    # -- segments

    def transmit(self, seq: int, ack: int, flags: int, data: bytes = b"", *, win: int | None = None, opts: bytes = b"",
                 urg: int = 0, corrupt: bool = False, together: bool = False) -> None:
        """One segment out of the guest; numbers relative. together: egress does not look yet (stage)."""
        opts += b"\x01" * (-len(opts) % 4)
        win = self.win if win is None else win
        has_ack = bool(flags & FLAGS["ACK"])
        seg = struct.pack("!HHIIBBHHH", self.sport, self.port, (self.isn + seq) & M32,
                          (self.irs + ack) & M32 if has_ack else 0, (20 + len(opts)) // 4 << 4, flags, win, 0, urg)
        seg += opts + data
        pseudo = socket.inet_aton(self.source) + socket.inet_aton(GATEWAY) + struct.pack("!BBH", 0, TCP, len(seg))
        sum_ = checksum(pseudo + seg) ^ (0x5555 if corrupt else 0)
        seg = seg[:16] + struct.pack("!H", sum_) + seg[18:]
        if not corrupt:
            end = seq + len(data) + bool(flags & FLAGS["SYN"]) + bool(flags & FLAGS["FIN"])
            self.snd_max = max(self.snd_max, end)
            if has_ack:
                self.guest_edge = max(self.guest_edge, ack + (win << (self.wscale if self.agreed else 0)))
        packet = ipv4(TCP, seg, self.source, GATEWAY, frag=0x4000)
        frame = mac_bytes(GATEWAY_MAC) + mac_bytes(self.mac) + b"\x08\x00" + packet
        if together:
            assert isinstance(self.guest, EgressOnly), "together: only on the stage"
            self.guest.put(frame)
        else:
            self.guest.send(frame)

    def frames(self) -> int:
        """Segments for this connection that lie on the ring or link right now; they are taken and checked."""
        n = 0
        while self.receive(0) is not None:
            n += 1
        return n

    def _mine(self, d: Datagram) -> bool:
        return d.proto == TCP and (d.src, d.dst, d.sport, d.dport) == (GATEWAY, self.source, self.port, self.sport)

    def receive(self, timeout: float = DEADLINE) -> Segment | None:
        end = time.monotonic() + timeout
        while (d := self.guest.datagram(self._mine, max(0.0, end - time.monotonic()))) is not None:
            seg = Segment.parse(d)
            self.check(seg)
            if not self._repeated(seg):
                return seg
        return None

    def _repeated(self, seg: Segment) -> bool:
        """Sent again by a timeout, which the real clock may bring at any step: rules about that are the stage's."""
        n = len(seg.data) + bool(seg.flags & FLAGS["FIN"])
        if not n or seg.flags & (FLAGS["SYN"] | FLAGS["RST"]):
            return False
        before, end = self.seen, self.seq(seg) + n
        self.seen = max(end, before)
        return not self.clock and end <= before

    def seq(self, seg: Segment) -> int:
        """Relative sequence number, negative for old ones."""
        n = (seg.seq - self.irs) & M32
        return n - (1 << 32) if n > M32 - (1 << 20) and self.irs else n

    def ack(self, seg: Segment) -> int:
        n = (seg.ack - self.isn) & M32
        return n - (1 << 32) if n > M32 - (1 << 20) else n

    def check(self, seg: Segment) -> None:
        """What every segment must keep, whatever the rule."""
        if seg.flags & (FLAGS["RST"] | FLAGS["SYN"]):
            return
        assert seg.flags & FLAGS["ACK"], f"a segment without ACK: {seg}"
        assert self.ack(seg) <= self.snd_max, f"acknowledges what was never sent: {seg}"
        edge = self.ack(seg) + (seg.win << self.peer_wscale)
        # Two stages write to the link once a flow is promoted: an older acknowledgement may come behind a newer one, and
        # says nothing of the window then (RFC 9293 3.10.7.4).
        old = not self.clock and self.ack(seg) < self.acked
        self.acked = max(self.acked, self.ack(seg))
        if self.edge is not None and not old:  # rounding to the scale is no move (RFC 7323 2.4)
            back = self.edge - edge
            assert back < 1 << self.peer_wscale, f"window shrinks by {back}: {seg} (RFC 9293 3.8.6)"
            moved = edge - self.edge
            assert moved < 1 << self.peer_wscale or moved > self.own_mss - (1 << self.peer_wscale), \
                f"window moves by {moved} only: {seg} (RFC 9293 3.8.6.2.2)"
        self.edge = max(edge, self.edge or 0)
        at = self.seq(seg)
        if seg.data:
            assert len(seg.data) <= (self.mss or 536), f"over the MSS: {seg} (RFC 9293 3.7.1)"
            assert at + len(seg.data) <= self.guest_edge, f"beyond the guest's window, {self.guest_edge}: {seg}"
            assert seg.data == stream(_DOWN, at, len(seg.data)), f"wrong bytes at {at}: {seg}"

    def match(self, seg: Segment, a: Args) -> None:
        """The conditions of a step; AssertionError names the first that does not hold."""
        named = a.flags | _ALWAYS
        want = a.flags
        assert seg.flags & named == want, f"got {self.show(seg)}"
        values: dict[str, int | None] = {
            "seq": self.seq(seg), "ack": self.ack(seg), "len": len(seg.data), "win": seg.win,
            "window": seg.win << self.peer_wscale,
            "mss": int.from_bytes(seg.options[2], "big") if 2 in seg.options else None,
            "wscale": seg.options[3][0] if 3 in seg.options else None}
        for key, op, text in a.fields:
            if key == "sack":
                blocks = self.sack(seg)
                holds = blocks.startswith(text[:-2] + ",") if text.endswith("..") else blocks == text
                assert holds and blocks.count(":") <= 4, f"sack={blocks}"
                continue
            got = values[key]
            if text == "none":
                assert got is None, f"{key} is {got}"
                continue
            n = int(text, 0)
            assert got is not None and {"=": got == n, "<=": got <= n, ">=": got >= n}[op], f"got {self.show(seg)}"
        if "noopts" in a.words:
            assert not set(seg.options) - {2, 3, 4}, f"options {sorted(seg.options)}"

    def sack(self, seg: Segment) -> str:
        """What the segment says about selective acknowledgement (RFC 2018), as a rule spells it."""
        if 4 in seg.options:
            return "permitted"
        if 5 not in seg.options:
            return "none"
        edges = [(n - self.isn) & M32 for n in struct.unpack(f"!{len(seg.options[5]) // 4}I", seg.options[5])]
        return ",".join(f"{lo}:{hi}" for lo, hi in zip(edges[::2], edges[1::2], strict=True))

    def show(self, seg: Segment) -> str:
        names = " ".join(n for n, bit in FLAGS.items() if seg.flags & bit)
        numbers = f"seq={self.seq(seg)} ack={self.ack(seg)} len={len(seg.data)} win={seg.win}"
        return f"{names} {numbers} options={seg.options}"

    def pass_time(self, seconds: float) -> None:
        assert isinstance(self.guest, EgressOnly)
        self.guest.advance(seconds)

    def nothing(self) -> None:
        """All that had to be done is done, and nothing came."""
        if self.clock:
            self.guest.settle()  # type: ignore[attr-defined]
            seg = self.receive(0)
        else:
            self.guest.fence()
            seg = self.receive(0)
        assert seg is None, f"got {self.show(seg)}"

    # -- steps

    @verb("guest sends")
    def guest_sends(self, a: Args) -> None:
        seq, ack, length = a.number("seq", 0), a.number("ack", 0), a.number("len", 0)
        if (win := a.number("win")) is not None:
            self.win = win
        opts, raw, sack = b"", a.take("opts"), a.take("sack")
        if sack is not None:
            edges = [int(n) for block in sack.split(",") for n in block.split(":")]
            absolute = [(self.irs + n) & M32 for n in edges]
            opts += struct.pack(f"!BBBB{len(edges)}I", 1, 1, 5, 2 + 4 * len(edges), *absolute)
        if a.flags & FLAGS["SYN"]:
            mss, wscale = a.take("mss", "none"), a.take("wscale", "none")
            if mss != "none":
                opts += struct.pack("!BBH", 2, 4, int(mss))
            if wscale != "none":
                opts += struct.pack("!BBBB", 1, 3, 3, int(wscale))
            if a.word("sack"):
                opts += b"\x01\x01\x04\x02"
            if not a.flags & FLAGS["ACK"] and not a.word("again"):
                self.mss = 536 if mss in ("none", "0") else int(mss)
                self.wscale = 0 if wscale == "none" else min(int(wscale), 14)
        if raw is not None:
            self.mss = 65535  # the rule itself says what is right
            opts += bytes.fromhex(raw)
        urg, times = a.number("urg", 0), a.number("times", 1)
        junk, corrupt, together = a.word("junk"), a.word("corrupt"), a.word("together")
        a.done()
        assert seq is not None and ack is not None and length is not None and times is not None and urg is not None
        for k in range(times):
            at = seq + k * length
            data = b"\xAA" * length if junk else stream(_UP, at, length)
            self.transmit(at, ack, a.flags, data, opts=opts, urg=urg, corrupt=corrupt, together=together)

    def _get(self, a: Args, *, skip: bool) -> None:
        after = a.take("after")
        if after is not None:
            early = max(0.0, float(after) - EARLY)
            self.nothing()
            self.pass_time(early)
            self.nothing()
            self.pass_time(EARLY + TICK)
        fresh = a.take("seq") if ("seq", "=", "new") in a.fields else None
        if fresh:
            assert a.flags & FLAGS["SYN"]
            self.edge, self.acked = None, 0
        end = time.monotonic() + DEADLINE
        while True:
            seg = self.receive(max(0.0, end - time.monotonic()) if after is None else 0)
            assert seg is not None, "nothing came"
            if fresh and seg.flags & FLAGS["SYN"]:
                self.irs, self.rcv_nxt, self.seen = seg.seq, 1, 0
                self.base = self.ack(seg)
                self.agreed = 3 in seg.options
                self.peer_wscale = seg.options[3][0] if self.agreed else 0
                self.edge = self.ack(seg) + seg.win
                self.guest_edge = self.win << (self.wscale if self.agreed else 0)
                self.read_at, self.write_at = self.base, 1
            try:
                self.match(seg, a)
                return
            except AssertionError:
                if not skip:
                    raise

    @verb("guest gets")
    def guest_gets(self, a: Args) -> None:
        if a.word("nothing"):
            span = a.take("for")
            a.done()
            self.nothing()
            if span is not None:
                self.pass_time(float(span))
                self.nothing()
        elif a.word("ICMP"):
            kind, code = a.number("type"), a.number("code")
            a.done()
            d = self.guest.datagram(lambda d: d.proto == ICMP and d.icmp[0] in (3, 11) and self._about(d), DEADLINE)
            assert d is not None and d.icmp == (kind, code), f"got {d and d.icmp}"
        else:
            self._get(a, skip=False)

    def _about(self, d: Datagram) -> bool:
        q = quoted(d)
        return q.proto == TCP and (q.sport, q.dport) == (self.sport, self.port)

    @verb("guest awaits")
    def guest_awaits(self, a: Args) -> None:
        self._get(a, skip=True)

    @verb("guest takes")
    def guest_takes(self, a: Args) -> None:
        n, quiet = int(a.words.pop(0)), a.word("quiet")
        seq = a.number("guest_seq", self.snd_max)
        until = self.rcv_nxt + n
        assert seq is not None
        while self.rcv_nxt < until:
            seg = self.receive()
            assert seg is not None, f"{until - self.rcv_nxt} of {n} bytes did not come"
            assert not seg.flags & FLAGS["RST"], f"got {self.show(seg)}"
            if not seg.data:
                continue
            self.match(seg, Args(seg.flags & ~FLAGS["URG"], list(a.words), list(a.fields)))
            at = self.seq(seg)
            if at <= self.rcv_nxt:
                self.rcv_nxt = max(self.rcv_nxt, at + len(seg.data))
            if not quiet:
                self.transmit(seq, self.rcv_nxt, FLAGS["ACK"])
        assert self.rcv_nxt == until, f"{self.rcv_nxt - until} bytes more than {n} came"

    @verb("guest fills the window")
    def guest_fills(self, a: Args) -> None:
        a.done()
        start = self.snd_max
        while self.snd_max - start < 64 << 20:
            assert self.edge is not None
            n = min(self.mss, self.edge - self.snd_max)
            if n > 0:
                self.transmit(self.snd_max, self.rcv_nxt or 1, FLAGS["ACK"], stream(_UP, self.snd_max, n))
            if not self.clock and n <= 0:
                self.guest.fence()
            came = 0
            while (seg := self.receive(0)) is not None:
                assert not seg.flags & FLAGS["RST"], f"got {self.show(seg)}"
                came += 1
            if n <= 0 and not came:
                return
        raise AssertionError("64 MiB, and the window never closed")

    @verb("host drains")
    def host_drains(self, a: Args) -> None:
        self.host_reads(Args(words=[str(self.snd_max - self.read_at)]))

    @verb("connected")
    def connected(self, a: Args) -> None:
        self.host_listens(Args())
        mss, wscale, win = a.take("mss", "1460"), a.take("wscale", "7"), a.number("win", 65535)
        isn, rcvbuf = a.number("isn"), a.take("rcvbuf")
        sack = ["sack"] if a.word("sack") else []
        a.done()
        if isn is not None:
            self.isn = isn & M32
        self.guest_sends(Args(FLAGS["SYN"], sack, [("seq", "=", "0"), ("win", "=", str(min(win or 0, 65535))),
                                                 ("mss", "=", mss), ("wscale", "=", wscale)]))
        self._get(Args(FLAGS["SYN"] | FLAGS["ACK"], [], [("seq", "=", "new"), ("ack", "=", "1")]), skip=False)
        self.transmit(1, 1, FLAGS["ACK"])
        self.host_accepts(Args([], [], [("rcvbuf", "=", rcvbuf)] if rcvbuf else []))

    @verb("host listens")
    def host_listens(self, a: Args) -> None:
        self.server = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=a.number("backlog", 16)))
        self.server.settimeout(DEADLINE)
        self.port = self.server.getsockname()[1]
        a.done()

    @verb("host refuses")
    def host_refuses(self, a: Args) -> None:
        a.done()
        self.port = closed_tcp_port()

    @verb("host accepts")
    def host_accepts(self, a: Args) -> None:
        assert self.server is not None
        if self.clock:
            self.guest.settle()  # type: ignore[attr-defined]
        rcvbuf = a.number("rcvbuf")
        a.done()
        self.host = self.stack.enter_context(self.server.accept()[0])
        self.host.settimeout(DEADLINE)
        if rcvbuf:
            self.host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)

    def _end(self) -> socket.socket:
        assert self.host is not None, "the host has not accepted"
        return self.host

    @verb("host reads")
    def host_reads(self, a: Args) -> None:
        what, h = a.words.pop(0), self._end()
        a.done()
        if self.clock:  # egress runs in this thread
            self.guest.settle()  # type: ignore[attr-defined]
        if what == "end":
            assert h.recv(1) == b"", "more data instead of the end"
        elif what == "reset":
            try:
                got = h.recv(1)
            except ConnectionResetError:
                return
            raise AssertionError(f"{'data' if got else 'a clean end'} instead of a reset")
        elif what == "nothing":
            if not self.clock:
                self.guest.fence()
            h.setblocking(False)
            try:
                got = h.recv(1)
            except BlockingIOError:
                return
            finally:
                h.settimeout(DEADLINE)
            raise AssertionError("data" if got else "end of stream")
        else:
            left, out = int(what), bytearray()
            h.settimeout(0 if self.clock else DEADLINE)
            end = time.monotonic() + DEADLINE
            while left:
                try:
                    part = h.recv(left)
                except BlockingIOError:
                    assert time.monotonic() < end, f"{left} of {what} bytes did not come"
                    self.guest.step(0.05)  # type: ignore[attr-defined]
                    continue
                assert part, f"the end, {left} of {what} bytes too early"
                out += part
                left -= len(part)
            h.settimeout(DEADLINE)
            want = stream(_UP, self.read_at, len(out))
            first = next((k for k, (x, y) in enumerate(zip(out, want, strict=True)) if x != y), None)
            assert first is None, f"wrong byte {first} of {what}"
            self.read_at += len(out)

    @verb("host writes")
    def host_writes(self, a: Args) -> None:
        n = int(a.words.pop(0))
        a.done()
        self._end().sendall(stream(_DOWN, self.write_at, n))
        self.write_at += n

    def _host_speaks(self) -> None:
        """What the guest sent before must not arrive after what the host does now."""
        if not self.clock:
            self.guest.fence()

    @verb("host shuts down")
    def host_shuts_down(self, a: Args) -> None:
        a.done()
        self._host_speaks()
        self._end().shutdown(socket.SHUT_WR)

    @verb("host closes")
    def host_closes(self, a: Args) -> None:
        a.done()
        self._host_speaks()
        self._end().close()

    @verb("host resets")
    def host_resets(self, a: Args) -> None:
        a.done()
        self._host_speaks()
        self._end().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end().close()

    @verb("clock")
    def clock_moves(self, a: Args) -> None:
        self.pass_time(float(a.words.pop(0)))
        a.done()

    @verb("counter")
    def counter(self, a: Args) -> None:
        name, text = a.words.pop(0), a.words.pop(0)
        a.done()
        if not self.clock:
            self.guest.fence()
        got = self.guest.counters()[name] - self.before[name]
        least = text.endswith("..")
        want = int(text.rstrip("."))
        assert got >= want if least else got == want, f"{name} went up by {got}"

    @verb("flow gone")
    def flow_gone(self, a: Args) -> None:
        a.done()
        if isinstance(self.guest, EgressOnly):
            self.guest.settle()
            assert not [f for f in self.guest.flows() if f.proto == TCP], "the flow is still in the table"
        else:
            self.guest.fence()
            self.transmit(self.snd_max, 7, FLAGS["ACK"])
            self._get(Args(FLAGS["RST"], [], [("seq", "=", "7")]), skip=False)
