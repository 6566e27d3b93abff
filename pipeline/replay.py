"""`ringnet stage NAME --replay IN --out OUT`: one stage alone, on a file, bit for bit the same each time.

The stage is the real one (its Config, its C loop's turn, its Python where it has some), in this process; its neighbours
are this file. What the guest sent in IN is put in front of it, frame by frame; what it puts on its rings, or writes to
the link, is written to OUT, an interface a ring. egress and services get what a classify in front of them hands on;
vmnet gets both directions, each on its own side.

Time.   With the virtual clock the stage believes the times of IN: a frame comes when it came, timers that are due before it
        run before it, and a day passes in a second. With --clock real it lives in real time, for gdb and perf.
Chance. Keys, sequence numbers and identifiers come from --seed.
Host.   egress and services are in a private network (pipeline/host_script.py), in which the servers of --host answer, then
        those of the recording, with what it shows they said; all else refuses. Between two frames the replay waits
        until that network is at rest.
TCP.    Sequence numbers towards the guest are not those of the recording. If IN has both directions, acknowledgements of
        the guest are translated: by the difference of the SYN-ACKs' numbers. One of bytes that were not sent yet (what was
        lost, and when it was sent again, is not the same) is cut to what was, and the rest of it follows when they were.
Offload. A capture of a tap with offloads shows unfinished checksums and super-frames: they get the virtio-net header back
        that says so.
"""
from __future__ import annotations

import contextlib
import importlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from pipeline import host_script, pcapng
from pipeline.config import ConfigError, Settings, stage_configs
from pipeline.host_script import Recorded, ScriptError, Talk
from pipeline.messages import VERSION, Channel, Configure, End
from pipeline.nic2 import PLAIN_FRAME_MAX, STORM
from pipeline.nic2 import parse as parse_nic2
from pipeline.pcapng import FROM_GUEST, TO_GUEST, CaptureError, Packet
from pipeline.stage import StageContext, StageError
from pipeline.topology import TOPOLOGY, Feature, Topology
from shm._dataplane import ffi, lib
from shm.arena import Arena, Pool
from shm.cell import Session as CellTable
from shm.cell import counters_of
from shm.flows import Flows
from shm.memory import SharedObject
from shm.names import Names, NamesWriter
from shm.ring import Desc, Ring, RingConsumer

START = 10**15  # virtual CLOCK_MONOTONIC of the first frame, ns
REST_S = 5.0  # real time the private network has to come to rest
LINGER = 5 * 10**9  # ns of virtual time behind the last frame, for what is still due
LINKS = {"guest_tx": ("link", FROM_GUEST), "guest_rx": ("link", TO_GUEST), "vmnet": ("bridge", FROM_GUEST)}  # what it grants; and
# the way of what is written there, or of what is read if the stage only reads
NEVER = (1 << 64) - 1
_VNET = struct.Struct("<BBHHHHH")
_SMALL = 1900  # bytes of a frame that fits a small buffer


class ReplayError(Exception):
    """The replay cannot be, or did not come to rest; one line."""


class Clock:
    """What stage and host believe: virtual, or the truth."""

    def __init__(self, first_ns: int, virtual: bool) -> None:
        self.virtual = virtual
        self.now = START if virtual else time.monotonic_ns()
        self._wall = first_ns - self.now

    def monotonic_ns(self) -> int:
        return self.now if self.virtual else time.monotonic_ns()

    def wall_ns(self) -> int:
        """Time of day as the recording has it."""
        return self.monotonic_ns() + self._wall


class Seat:
    """A stage in this process: granted what the topology grants it, with our own ends of its rings."""

    def __init__(self, plane: Plane, name: str, config: dict[str, Any], link: socket.socket | None = None) -> None:
        topo, decl = plane.topology, plane.topology.stage(name)
        self.name, self.row = name, topo.row(name)
        grants: list[tuple[str, int]] = [("session", plane.session.fd), ("arena", plane.arena.fd)]
        if decl.flows:
            grants.append(("flows", plane.flows.fd))
        if decl.names:
            grants.append(("names", plane.names.fd))
        inputs, outputs = [], []
        for ring in topo.inputs(name):
            grants.append((f"in:{ring.name}", plane.rings[ring.name].fd))
            inputs.append(End(ring=ring.name, size=plane.rings[ring.name].size, row=topo.row(ring.producer)))
        for ring in topo.outputs(name):
            grants.append((f"out:{ring.name}", plane.rings[ring.name].fd))
            outputs.append(End(ring=ring.name, size=plane.rings[ring.name].size, row=topo.row(ring.consumer),
                               role=int(ring.role)))
        grants += [(f"bell:{row}", bell) for row, bell in enumerate(plane.bells)]
        if link is not None:
            grants.append((LINKS[name][0], link.fileno()))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plane.keep += [ours, theirs]
        conf = Configure(
            version=VERSION, stage=name, row=self.row, generation=1, session_size=plane.session.size,
            arena_size=plane.arena.size, has_part=bool(decl.small or decl.large),
            flows_size=plane.flows.size if decl.flows else 0, names_size=plane.names.size if decl.names else 0,
            names_write=decl.names == "write", inputs=tuple(inputs), outputs=tuple(outputs),
            fds=tuple(n for n, _ in grants), config=msgspec.Raw(b"\x80"))
        self.ctx = StageContext(Channel(theirs), conf, {n: os.dup(fd) for n, fd in grants})
        self.stage = self.ctx.stage
        lib.rn_stage_clock(self.stage, plane.clock.now if plane.clock.virtual else 0)
        self._work = self._step_c
        self._due = lambda: int(lib.rn_stage_due(self.stage))
        module = importlib.import_module(f"pipeline.{name}")
        cfg = msgspec.convert(config, module.Config)
        if name == "services":
            self._services(module, cfg, plane)
        else:
            module.init(cfg, self.ctx)

    def _services(self, module: Any, cfg: Any, plane: Plane) -> None:
        clock = plane.clock
        loop = module.Loop(lambda: clock.monotonic_ns() / 1e9)
        made = module.Services(cfg, self.stage, loop, None, wall_clock=lambda: clock.wall_ns() / 1e9,
                               names=NamesWriter(plane.names.mem, plane.names.size), seed=plane.seed)
        plane.stack.callback(loop.close)
        plane.stack.callback(made.close)

        def work() -> bool:
            lib.rn_services_begin(self.stage)
            before = lib.rn_stage_counter(self.stage, _FRAMES_IN)
            more = made.turn()
            ran = loop.step(0)
            if lib.rn_services_end(self.stage) < 0:
                raise StageError(ffi.string(lib.rn_stage_error(self.stage)).decode())
            return bool(more or ran or lib.rn_stage_counter(self.stage, _FRAMES_IN) != before)

        def due() -> int:
            at = loop.deadline()
            return NEVER if at is None else int(at * 1e9) + 1

        self._work, self._due = work, due

    def _step_c(self) -> bool:
        did = lib.rn_stage_step(self.stage)
        if did < 0:
            raise StageError(ffi.string(lib.rn_stage_error(self.stage)).decode())
        return bool(did)

    def step(self) -> bool:
        """One turn; true if it did something. Raises StageError."""
        return self._work()

    def due(self) -> int:
        """When it wants to be woken for a timer, ns of the clock."""
        return self._due()

    def counters(self) -> dict[str, int]:
        quiet = {"turns", "sleeps", "wakes_sent"}
        return {c.name: v for c in counters_of(self.name)
                if c.name not in quiet and (v := int(lib.rn_stage_counter(self.stage, c.index)))}

    def close(self) -> None:
        lib.rn_stage_free(self.stage)


_FRAMES_IN = next(c.index for c in counters_of("classify") if c.name == "frames_in")


class Plane:
    """Memory, rings and time of a replay."""

    def __init__(self, clock: Clock, seed: int, nic2: bool, stack: contextlib.ExitStack) -> None:
        self.clock, self.seed, self.stack = clock, seed, stack
        self.topology: Topology = TOPOLOGY.only(frozenset({Feature.NIC1, Feature.NIC2} if nic2 else {Feature.NIC1}))
        self.keep: list[object] = []
        stages = self.topology.stages
        self.session = self._made(CellTable.create(len(stages)))
        self.arena = self._made(Arena.create([(s.small, s.large) for s in stages]))
        self.flows = self._made(Flows.create(self.topology.flows, (seed * 0x9E3779B97F4A7C15 % 2**64, seed)))
        self.names = self._made(Names.create())
        self.rings = {r.name: self._made(Ring.create(r.slots, name=f"ring {r.name}")) for r in self.topology.rings}
        self.bells = [lib.rn_bell_new() for _ in stages]
        stack.callback(lambda: [os.close(b) for b in self.bells])
        self.bytes = ffi.buffer(self.arena.mem, self.arena.size)
        self._sink = self.arena.pool(self.topology.row("guest_rx"), owner=False)
        self._ends: list[tuple[str, RingConsumer, bool]] = []

    def _made(self, made: Any) -> Any:
        assert isinstance(made, SharedObject)
        self.stack.callback(made.destroy)
        return made

    def drain(self, seat: Seat, *, keep: bool, but: Iterable[str] = ()) -> None:
        """Take what a stage puts on its rings; keep: for the output file. but: rings that somebody else serves."""
        for ring in self.topology.outputs(seat.name):
            if ring.name not in but and not ring.notices:
                self._ends.append((ring.name, self.rings[ring.name].consumer(self.bells[seat.row]), keep))

    def taken(self) -> list[Packet]:
        """What waits on the rings we serve, in the order of the topology. Raises ReplayError."""
        found = []
        for name, end, keep in self._ends:
            descs = end.peek()
            for d in descs:
                if not self._sink.holds(d):
                    raise ReplayError(f"ring {name}: a descriptor that names no frame")
                if keep:
                    found.append(Packet(time_ns=self.clock.wall_ns(), interface=name, direction=self.direction(name),
                                        frame=bytes(self.bytes[d.off:d.off + d.len])))
            self._sink.give_many(descs)
            end.consume(len(descs))
        return found

    def direction(self, ring: str) -> int:
        return TO_GUEST if ring.endswith("->guest_rx") else FROM_GUEST


class Feeder:
    """Puts frames in front of a stage: on a ring, as the stage before it would."""

    def __init__(self, plane: Plane, ring: str) -> None:
        decl = next(r for r in plane.topology.rings if r.name == ring)
        row = plane.topology.row(decl.producer)
        self._plane, self._pool = plane, Pool(plane.arena, row, owner=True)
        self._tx = plane.rings[ring].producer(plane.bells[plane.topology.row(decl.consumer)])

    def put(self, frame: bytes, vnet: bytes) -> None:
        """Raises ReplayError if the ring or the buffers are full: the stage does not take what it is given."""
        d = self._pool.take(len(frame), large=len(frame) > _SMALL)
        if d is None or not self._tx.room():
            raise ReplayError("the stage does not take its input: ring or buffers are full")
        self._plane.bytes[d.off - lib.RN_VNET_BYTES:d.off + len(frame)] = vnet + frame
        self._tx.put(Desc(d.off, d.len, lib.RN_DESC_HAS_VNET if any(vnet) else 0, d.gen))
        self._tx.publish()


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Tcp:
    """A TCP segment in an Ethernet frame, as far as the replay must know it."""

    def __init__(self, frame: bytes) -> None:
        self.l4 = 14 + (frame[14] & 15) * 4
        self.end = min(len(frame), 14 + int.from_bytes(frame[16:18], "big"))
        self.sport, self.dport, self.seq, self.ack, off, self.flags = struct.unpack_from("!HHIIBB", frame, self.l4)
        self.hlen = (off >> 4) * 4
        self.src, self.dst = frame[26:30], frame[30:34]

    @staticmethod
    def of(frame: bytes) -> Tcp | None:
        if len(frame) < 54 or frame[12:14] != b"\x08\x00" or frame[23] != 6 or frame[20] & 0x1F or frame[21]:
            return None
        hlen = (frame[14] & 15) * 4
        return Tcp(frame) if hlen >= 20 and len(frame) >= 14 + hlen + 20 else None

    def pseudo(self) -> bytes:
        return self.src + self.dst + struct.pack("!BBH", 0, 6, self.end - self.l4)


class Numbers:
    """Translates the guest's acknowledgements from the recording's sequence numbers to ours."""

    def __init__(self) -> None:
        # By (peer, peer's port, guest's port). Numbers behind the initial one are counted from it.
        self._recorded: dict[tuple[bytes, int, int], int] = {}  # initial number
        self._ours: dict[tuple[bytes, int, int], int] = {}
        self._sent: dict[tuple[bytes, int, int], int] = {}  # next number we would send
        self._owed: dict[tuple[bytes, int, int], tuple[bytes, int, int]] = {}  # guest's segment, what it acknowledges, and was let

    def recorded(self, frame: bytes) -> None:
        if (t := Tcp.of(frame)) is not None and t.flags & 0x12 == 0x12:  # SYN, ACK
            self._recorded[t.src, t.sport, t.dport] = t.seq

    def ours(self, frame: bytes) -> None:
        if (t := Tcp.of(frame)) is None:
            return
        key = t.src, t.sport, t.dport
        if t.flags & 0x12 == 0x12 and self._ours.get(key) != t.seq:
            self._ours[key], self._sent[key] = t.seq, 0
            self._owed.pop(key, None)
        if key in self._ours and not t.flags & 0x04:
            length = t.end - t.l4 - t.hlen + (t.flags >> 1 & 1) + (t.flags & 1)
            if (end := (t.seq + length - self._ours[key]) % 2**32) < 2**31:
                self._sent[key] = max(self._sent[key], end)

    def translated(self, frame: bytes) -> bytes:
        t = Tcp.of(frame)
        key = (t.dst, t.dport, t.sport) if t else None
        if t is None or key is None or not t.flags & 0x10 or key not in self._recorded or key not in self._ours:
            return frame
        wants = (t.ack - self._recorded[key]) % 2**32
        lets = min(wants, self._sent[key]) if wants < 2**31 else wants
        self._owed.pop(key, None)
        if lets < wants < 2**31 and not t.flags & 0x04:
            self._owed[key] = frame, wants, lets
        shift = (self._ours[key] - self._recorded[key]) % 2**32
        ack = (self._ours[key] + lets) % 2**32
        if not shift and ack == t.ack:
            return frame
        new = bytearray(frame)
        whole = checksum(t.pseudo() + frame[t.l4:t.end]) == 0xFFFF  # else it is unfinished, and stays so
        struct.pack_into("!I", new, t.l4 + 8, ack)
        at, end = t.l4 + 20, min(t.l4 + t.hlen, t.end)
        while at < end and new[at]:  # SACK blocks (RFC 2018) name our numbers too
            if new[at] == 1:
                at += 1
                continue
            size = new[at + 1] if at + 1 < end else 0
            if size < 2 or at + size > end:
                break
            if new[at] == 5:
                for k in range(at + 2, at + size - 3, 4):
                    struct.pack_into("!I", new, k, (struct.unpack_from("!I", new, k)[0] + shift) % 2**32)
            at += size
        if whole:
            _finish(new, t)
        return bytes(new)

    def owed(self) -> list[bytes]:
        """Pure acknowledgements of what was sent since the guest's last segment, which it had when that was recorded."""
        found = []
        for key, (frame, wants, let) in list(self._owed.items()):
            if (now := min(wants, self._sent[key])) == let:
                continue
            if now == wants:
                del self._owed[key]
            else:
                self._owed[key] = frame, wants, now
            t = Tcp(frame)
            new = bytearray(frame[:t.l4 + 20])
            behind = (t.end - t.l4 - t.hlen + (t.flags >> 1 & 1) + (t.flags & 1))  # what that segment carried is behind us
            struct.pack_into("!H", new, 16, len(new) - 14)
            struct.pack_into("!H", new, 24, 0)
            struct.pack_into("!H", new, 24, ~checksum(bytes(new[14:t.l4])) & 0xFFFF)
            struct.pack_into("!IIBB", new, t.l4 + 4, (t.seq + behind) % 2**32, (self._ours[key] + now) % 2**32, 5 << 4, 0x10)
            _finish(new, Tcp(bytes(new)))
            found.append(bytes(new))
        return found


def _finish(frame: bytearray, t: Tcp) -> None:
    """Compute a segment's checksum anew."""
    frame[t.l4 + 16:t.l4 + 18] = b"\0\0"
    struct.pack_into("!H", frame, t.l4 + 16, ~checksum(t.pseudo() + bytes(frame[t.l4:t.end])) & 0xFFFF)


def recorded_host(packets: Iterable[Packet]) -> Recorded:
    """What the host side said, by what the guest got: in its order, each byte once it had been sent what it answers."""
    open_: dict[tuple[bytes, int, int], _Heard] = {}
    by_port: dict[int, list[_Heard]] = {}
    udp: dict[int, list[list[bytes]]] = {}
    last: dict[tuple[bytes, int, int], list[bytes]] = {}  # of a guest's port: where replies to its last datagram go
    for p in packets:
        if (t := Tcp.of(p.frame)) is not None:
            payload = p.frame[t.l4 + t.hlen:t.end]
            if p.direction == TO_GUEST:
                key = t.src, t.sport, t.dport
                if t.flags & 0x12 == 0x12 and key not in open_:
                    open_[key] = _Heard(t.seq + 1, t.ack)
                    by_port.setdefault(t.sport, []).append(open_[key])
                elif key in open_:
                    open_[key].hear(t, payload)
                    if t.flags & 0x04:
                        del open_[key]
            elif t.flags & 0x12 == 0x02:  # a SYN: whatever was there before is over
                open_.pop((t.dst, t.dport, t.sport), None)
            elif (heard := open_.get((t.dst, t.dport, t.sport))) is not None:
                heard.sent += len(payload)
        elif (u := _udp(p.frame)) is not None:
            src, sport, dst, dport, payload = u
            if p.direction != TO_GUEST:
                last[dst, dport, sport] = []
                udp.setdefault(dport, []).append(last[dst, dport, sport])
            elif (src, sport, dport) in last:
                last[src, sport, dport].append(payload)
    return Recorded(tcp={port: [h.talk() for h in heard] for port, heard in by_port.items()},
                    udp={port: replies for port, replies in udp.items() if any(replies)})


class _Heard:
    """One connection's way to the guest, as it was heard."""

    def __init__(self, seq: int, irs: int) -> None:
        self.seq, self.irs = seq % 2**32, irs
        self.sent = 0  # bytes of the guest, repeats included: a bound
        self.said: list[tuple[int, bytes]] = []
        self._early: list[tuple[int, int, bytes]] = []  # behind a hole: (sequence number, after, bytes)
        self.then: Literal["close", "reset", "wait"] = "wait"

    def hear(self, t: Tcp, payload: bytes) -> None:
        if payload:
            self._early.append((t.seq, min((t.ack - self.irs) % 2**32, self.sent), payload))
        while fits := next((e for e in self._early if (self.seq - e[0]) % 2**32 < len(e[2])), None):
            self._early.remove(fits)
            seq, after, data = fits
            new = data[(self.seq - seq) % 2**32:]
            if self.said and self.said[-1][0] >= after:
                self.said[-1] = self.said[-1][0], self.said[-1][1] + new
            else:
                self.said.append((after, new))
            self.seq = (self.seq + len(new)) % 2**32
        self._early = [e for e in self._early if (e[0] - self.seq) % 2**32 < 2**31]  # what is behind us is known
        if t.flags & 0x04:
            self.then = "reset"
        elif t.flags & 0x01 and self.then == "wait":
            self.then = "close"

    def talk(self) -> Talk:
        return Talk(said=self.said, then=self.then)


def _udp(frame: bytes) -> tuple[bytes, int, bytes, int, bytes] | None:
    """(source, its port, destination, its port, payload) of a whole UDP datagram."""
    if len(frame) < 42 or frame[12:14] != b"\x08\x00" or frame[23] != 17 or frame[20] & 0x3F or frame[21]:
        return None
    l4 = 14 + (frame[14] & 15) * 4
    if len(frame) < l4 + 8:
        return None
    sport, dport, size = struct.unpack_from("!HHH", frame, l4)
    return frame[26:30], sport, frame[30:34], dport, frame[l4 + 8:l4 + size]


def vnet_of(frame: bytes, mtu: int) -> bytes:
    """The virtio-net header a frame must have had (virtio 1.2 5.1.6.2): it says so if the checksum is unfinished."""
    none = bytes(12)
    if len(frame) < 34 or frame[12:14] != b"\x08\x00" or frame[20] & 0x3F or frame[21]:
        return none
    proto, l4 = frame[23], 14 + (frame[14] & 15) * 4
    where = {6: 16, 17: 6}.get(proto)
    end = 14 + int.from_bytes(frame[16:18], "big")
    if where is None or end > len(frame) or end < l4 + (20 if proto == 6 else 8):
        return none
    pseudo = frame[26:34] + struct.pack("!BBH", 0, proto, end - l4)
    if frame[l4 + where:l4 + where + 2] != struct.pack("!H", checksum(pseudo)):
        return none
    if proto == 17 or end - 14 <= mtu:
        return _VNET.pack(1, 0, 0, 0, l4, where, 0)
    head = l4 + (frame[l4 + 12] >> 4) * 4
    return _VNET.pack(1, 1, head, mtu - (head - 14), l4, where, 0)


class Replay:
    """One stage on one file."""

    def __init__(self, name: str, settings: Settings, packets: list[Packet], *, seed: int, virtual: bool,
                 play: host_script.Play, stack: contextlib.ExitStack) -> None:
        self.name, self.settings, self.packets = name, settings, packets
        self.clock = Clock(packets[0].time_ns if packets else 0, virtual)
        self.plane = plane = Plane(self.clock, seed, name == "vmnet", stack)
        self.out: list[Packet] = []
        self.numbers = Numbers()
        self.script: host_script.Script | None = None
        self._link: socket.socket | None = None
        configs = stage_configs(settings, link_kind="dgram", vnet=True)
        if name == "vmnet":
            configs[name] = {"link_kind": "dgram", "vnet": True, "uso": True, "frame_max": PLAIN_FRAME_MAX,
                             "storm": parse_nic2(settings.nic2).storm if settings.nic2 else STORM}
        first = "classify" if name in ("egress", "services") else name
        theirs = self._pair(stack) if name in LINKS else None
        if name in ("egress", "services"):
            self.script = host_script.Script(play, recorded_host(packets) if name == "egress" else Recorded())
            stack.callback(self.script.close)
        self.seats = [Seat(plane, n, configs[n], theirs) for n in dict.fromkeys((first, name))]
        for seat in self.seats:
            stack.callback(seat.close)
            mine = seat.name == name
            plane.drain(seat, keep=mine, but=[r.name for r in plane.topology.inputs(name)] if not mine else ())
        self._feeder = None if name == "guest_tx" else Feeder(
            plane, {"guest_rx": "egress->guest_rx", "vmnet": "guest_tx->vmnet"}.get(name, "guest_tx->classify"))
        self.interfaces = [r.name for r in plane.topology.outputs(name) if not r.notices]
        if name in ("guest_rx", "vmnet"):
            self.interfaces.append(LINKS[name][0])

    def _pair(self, stack: contextlib.ExitStack) -> socket.socket:
        """The guest's link: our end and the stage's."""
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for s in (self._link, theirs):
            stack.callback(s.close)
            s.setblocking(False)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        return theirs

    def wanted(self) -> list[Packet]:
        """Those of the file that this stage is given, and, between them, what the guest got back then."""
        if self.name == "vmnet":
            there = {p.interface for p in self.packets}
            up, down = (next((i for i in best if i in there), None) for best in (("guest_tx->vmnet", "link2"), ("bridge", "link2")))
            return [p for p in self.packets if (p.interface == down if p.direction == TO_GUEST else p.interface == up)
                    or not {up, down} & there]
        names = {r.name for r in self.plane.topology.inputs(self.name)}
        of_its_rings = names & {p.interface for p in self.packets}
        mine = TO_GUEST if self.name == "guest_rx" else FROM_GUEST
        return [p for p in self.packets
                if (p.interface in of_its_rings if of_its_rings else p.direction in (0, mine))
                or (p.direction == TO_GUEST != mine)]

    def run(self) -> int:
        """Feed all of it; returns frames fed. Raises ReplayError, StageError."""
        fed = 0
        self._settle()
        first = self.packets[0].time_ns if self.packets else 0
        begin = self.clock.monotonic_ns()
        for p in self.wanted():
            self._until(begin + max(0, p.time_ns - first))
            if p.direction == TO_GUEST and self.name not in ("guest_rx", "vmnet"):
                self.numbers.recorded(p.frame)
                continue
            self._put(p)
            fed += 1
            self._settle()
        self._until(self.clock.monotonic_ns() + LINGER)
        return fed

    def _put(self, p: Packet) -> None:
        frame = p.frame if self.name == "vmnet" else self.numbers.translated(p.frame)
        vnet = vnet_of(frame, self.settings.mtu)
        if self._feeder is not None and not (self.name == "vmnet" and p.direction == TO_GUEST):
            self._feeder.put(frame, vnet)
        elif self._link is not None:
            self._link.send(vnet + frame)

    def _collect(self) -> None:
        for p in self.plane.taken():
            self.numbers.ours(p.frame)
            self.out.append(p)
        link, way = LINKS.get(self.name, ("", 0))
        while self._link is not None and link in self.interfaces:
            try:
                data = self._link.recv(1 << 17)
            except BlockingIOError:
                return
            self.out.append(Packet(time_ns=self.clock.wall_ns(), interface=link, direction=way, frame=data[12:]))

    def _steps(self) -> bool:
        did, again = False, True
        while again:
            again = False
            for seat in self.seats:
                while seat.step():
                    again = did = True
                    self._collect()
        self._collect()
        return did

    def _settle(self) -> None:
        """Until stage and host have nothing to do at this time."""
        deadline = time.monotonic() + REST_S
        while True:
            did = self._steps()
            for frame in self.numbers.owed() if self._feeder is not None else ():
                self._feeder.put(frame, bytes(12))
                did = True
            if self.script is not None:
                self._rest()
                did |= self.script.pump()
                if not did and host_script.unread():  # not seen yet: the stage's turn came before the kernel's event
                    did = True
                    if time.monotonic() > deadline:
                        raise ReplayError(f"datagrams of the host side were not read within {REST_S:g} s")
            if not did:
                return

    def _rest(self) -> None:
        """Until nothing is under way in the private network: nothing there can wake us, so look, and look again."""
        deadline, pause = time.monotonic() + REST_S, 0.0
        while not host_script.at_rest():
            if time.monotonic() > deadline:
                raise ReplayError(f"the host side did not come to rest within {REST_S:g} s")
            time.sleep(pause)
            pause = 0.001

    def _until(self, at: int) -> None:
        """Let time pass, with the timers that are due on the way."""
        if not self.clock.virtual:
            while (left := at - time.monotonic_ns()) > 0:
                self._settle()
                time.sleep(min(left, 10**7) / 1e9)
            return
        while (due := min(seat.due() for seat in self.seats)) <= at:
            self._set(max(due, self.clock.now + 1))
            self._settle()
        self._set(max(at, self.clock.now))

    def _set(self, now: int) -> None:
        self.clock.now = now
        for seat in self.seats:
            lib.rn_stage_clock(seat.stage, now)


def main(name: str, settings: Settings, source: str, out: str, *, seed: int, clock: str, host: str) -> int:
    """Returns the exit code; what went wrong is one line on standard error."""
    try:
        packets = pcapng.read(source)
        play = host_script.load(host) if host else host_script.Play()
        if name in ("egress", "services"):
            settings = msgspec.structs.replace(settings, dns=("127.0.0.1",), proxy="none", lease_file="")
            host_script.enter()
        settings = msgspec.structs.replace(settings, seed=seed, pcap="", impair=(), promote=0)  # alone: nobody to hand to
        with contextlib.ExitStack() as stack:
            replay = Replay(name, settings, packets, seed=seed, virtual=clock == "virtual", play=play, stack=stack)
            fed = replay.run()
            Path(out).write_bytes(pcapng.written(replay.interfaces, replay.out))
            counted = ", ".join(f"{n}={v}" for n, v in replay.seats[-1].counters().items())
            print(f"ringnet stage: {name}: {fed} frames of {source} in, {len(replay.out)} out to {out}; {counted}",
                  file=sys.stderr)
    except (CaptureError, ScriptError, ReplayError, ConfigError, StageError) as e:
        print(f"ringnet stage: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"ringnet stage: {e.filename or source}: {e.strerror}", file=sys.stderr)
        return 1
    return 0


