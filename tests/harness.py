"""A scripted guest for tests of the egress stage and of the whole pipeline. No root, no namespaces.

Two levels with one interface (class Guest: send frames, receive frames, send and receive whole datagrams):

EgressOnly  egress alone, in the test's own process and thread, one turn after the other. The test plays classify (it
            puts frames on the ring, with what rn_parse.c says about them, or with lies) and guest_rx (it takes frames
            off, or leaves the ring full). Its clock can be set forward: advance(31) is a UDP timeout.
Wire        every stage a process, started by pipeline.supervisor.Session; the test has the guest's end of the link,
            an AF_UNIX SOCK_SEQPACKET socket with one frame a packet and no virtio-net header (vnet=True: with one, and what
            that leaves open of a frame to the guest is finished here).

Host-side servers are real sockets on loopback; the guest reaches them under the gateway's address.

    with EgressOnly(mtu=1500) as guest, udp_server() as server:
        guest.send_udp(4000, server.getsockname()[1], b"hello")
        data, addr = server.recvfrom(100)
        server.sendto(data, addr)
        assert guest.recv_udp(4000).data == b"hello"

What a guest receives is checked on the way: IP header checksum and lengths, no frame over the MTU, fragments that
fit together, UDP and ICMP checksums. What does not hold fails the test at once.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from pipeline.config import make
from pipeline.egress import set_policy, set_proxy
from pipeline.policy import entries
from pipeline.policy import parse_all as parse_policy
from pipeline.proxies import Plan
from pipeline.supervisor import Link, Session
from shm._dataplane import ffi, lib
from shm.names import Names

GATEWAY, GUEST, GUEST2 = "10.0.2.1", "10.0.2.2", "10.0.2.3"
GATEWAY_MAC, GUEST_MAC = "02:ab:cd:00:00:01", "52:54:ab:00:00:02"
ICMP, TCP, UDP = 1, 6, 17
DEADLINE = 60.0  # s: what takes milliseconds is called broken after this
_RN_BUF_ETH_OFF = 82  # csrc/rn_arena.h: from a buffer's start to the Ethernet header ...
_RN_META_OFF = 16  # ... and to struct rn_meta
META = struct.Struct("=BBBBHHHHI")  # struct rn_meta
_ports = itertools.count(os.getpid() % 20000)
_idents = itertools.count(os.getpid() % 30000)
_held: list[socket.socket] = []  # on ports that shall be nobody's


def fresh_port() -> int:
    """A guest port that no other test of this process has used lately, so that no mapping is left from one."""
    return 20000 + next(_ports) % 40000


def fresh_ident() -> int:
    """The same for ICMP echo identifiers and IP identifications."""
    return 1 + next(_idents) % 60000


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    """RFC 1071, independent of the data plane's. 0 over data that holds its own right checksum."""
    if len(data) % 2:
        data += b"\0"
    total = sum(memoryview(data).cast("H"))  # little-endian words: the sum is byte-swapped, undone below
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return socket.htons(~total & 0xFFFF)


def ipv4(proto: int, payload: bytes, src: str, dst: str, *, ttl: int = 64, ident: int = 0, frag: int = 0,
         options: bytes = b"") -> bytes:
    """An IPv4 packet; frag: the flags and offset field as on the wire."""
    hlen = 20 + len(options)
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | hlen // 4, 0, hlen + len(payload), ident, frag, ttl, proto, 0,
                       socket.inet_aton(src), socket.inet_aton(dst)) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(src: str, sport: int, dst: str, dport: int, data: bytes) -> bytes:
    """A UDP header and payload, checksum and all (RFC 768)."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    pseudo = socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!BBH", 0, UDP, 8 + len(data))
    return head[:6] + struct.pack("!H", checksum(pseudo + head + data) or 0xFFFF) + data


def echo(ident: int, seq: int, data: bytes = b"", *, kind: int = 8) -> bytes:
    """An ICMP echo message (RFC 792): kind 8 request, 0 reply."""
    head = struct.pack("!BBHHH", kind, 0, 0, ident, seq)
    return head[:2] + struct.pack("!H", checksum(head + data)) + head[4:] + data


def super_udp(sport: int, dport: int, data: bytes, each: int, dst: str = GATEWAY, *, src: str = GUEST, ttl: int = 64,
              frag: int = 0) -> tuple[bytes, bytes]:
    """A train of datagrams as a kernel with UDP_SEGMENT hands it to its link: virtio-net header, frame."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0x1234)  # the checksum is the link's to make
    frame = mac_bytes(GATEWAY_MAC) + mac_bytes(GUEST_MAC) + b"\x08\x00" + ipv4(UDP, head + data, src, dst, ttl=ttl, frag=frag)
    return struct.pack("<BBHHHHH", 1, 5, 42, each, 34, 6, 0), frame


@dataclass(frozen=True)
class Datagram:
    """One IPv4 datagram to the guest, put together."""

    proto: int
    src: str
    dst: str
    ttl: int
    payload: bytes
    fragments: int  # frames it came in

    @property
    def sport(self) -> int:
        return struct.unpack_from("!H", self.payload, 0)[0]

    @property
    def dport(self) -> int:
        return struct.unpack_from("!H", self.payload, 2)[0]

    @property
    def data(self) -> bytes:
        """UDP or ICMP payload."""
        return self.payload[8:]

    @property
    def icmp(self) -> tuple[int, int]:
        """(type, code)."""
        return self.payload[0], self.payload[1]

    @property
    def rest(self) -> int:
        """ICMP: the second word of the header."""
        return struct.unpack_from("!I", self.payload, 4)[0]


def quoted(error: Datagram) -> Datagram:
    """The packet that an ICMP error quotes, as far as it does; its own header must have a right checksum."""
    ip = error.payload[8:]
    hlen = (ip[0] & 15) * 4
    assert ip[0] >> 4 == 4 and checksum(ip[:hlen]) == 0, "an ICMP error quotes a bad IP header"
    return Datagram(ip[9], socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20]), ip[8], ip[hlen:], 1)


@dataclass
class _Pieces:
    parts: dict[int, bytes] = field(default_factory=dict)
    end: int | None = None
    frames: int = 0


class Guest:
    """What both levels share. mtu: of the link, bytes of L3."""

    mtu: int
    mac = GUEST_MAC

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, str, int, int], _Pieces] = {}
        self._waiting: deque[Datagram] = deque()

    # -- to be provided

    def send(self, frame: bytes | Packet) -> None:
        """One Ethernet frame, bytes or scapy, out of the guest."""
        raise NotImplementedError

    def recv_frame(self, timeout: float = DEADLINE) -> bytes | None:
        """The next frame to the guest, or None after so many seconds."""
        raise NotImplementedError

    def counters(self, stage: str = "egress") -> dict[str, int]:
        raise NotImplementedError

    # -- frames

    def send_super(self, vnet: bytes, frame: bytes) -> None:
        """A frame with what its virtio-net header says of it."""
        raise NotImplementedError

    def send_train(self, sport: int, dport: int, data: bytes, each: int, dst: str = GATEWAY, **ip: Any) -> None:
        """Datagrams of `each` bytes, the last may be shorter, in one frame."""
        self.send_super(*super_udp(sport, dport, data, each, dst, **ip))

    def recv(self, match: Callable[[Packet], bool] = lambda p: True, timeout: float = DEADLINE) -> Packet | None:
        """The next frame that matches, as scapy has it; others are passed over."""
        end = time.monotonic() + timeout
        while (frame := self.recv_frame(max(0.0, end - time.monotonic()))) is not None:
            if match(packet := Ether(frame)):
                return packet
        return None

    def sniff(self, seconds: float = 0.0) -> list[Packet]:
        """Every frame that is there, or comes within so many seconds."""
        end, out = time.monotonic() + seconds, []
        while (frame := self.recv_frame(max(0.0, end - time.monotonic()))) is not None:
            out.append(Ether(frame))
        return out

    def flush(self) -> None:
        """Forget what came so far."""
        while self.recv_frame(0) is not None:
            pass
        self._pieces.clear()
        self._waiting.clear()

    # -- datagrams

    def send_ip(self, proto: int, payload: bytes, dst: str = GATEWAY, *, src: str = GUEST, ttl: int = 64,
                mtu: int | None = None, order: Callable[[list[bytes]], list[bytes]] = lambda f: f) -> None:
        """One IPv4 packet, in fragments where it is over the MTU; order: what becomes of the list of fragments."""
        mtu, ident = mtu or self.mtu, fresh_ident()
        eth = mac_bytes(GATEWAY_MAC) + mac_bytes(self.mac) + b"\x08\x00"
        if 20 + len(payload) <= mtu:
            self.send(eth + ipv4(proto, payload, src, dst, ttl=ttl, ident=ident))
            return
        step = (mtu - 20) // 8 * 8
        frames = []
        for at in range(0, len(payload), step):
            more = 0x2000 if at + step < len(payload) else 0
            frames.append(eth + ipv4(proto, payload[at:at + step], src, dst, ttl=ttl, ident=ident, frag=more | at // 8))
        for frame in order(frames):
            self.send(frame)

    def send_udp(self, sport: int, dport: int, data: bytes, dst: str = GATEWAY, *, src: str = GUEST, **ip: Any) -> None:
        self.send_ip(UDP, udp(src, sport, dst, dport, data), dst, src=src, **ip)

    def ping(self, ident: int, seq: int, data: bytes = b"", dst: str = GATEWAY, **ip: Any) -> None:
        self.send_ip(ICMP, echo(ident, seq, data), dst, **ip)

    def datagram(self, match: Callable[[Datagram], bool] = lambda d: True,
                 timeout: float = DEADLINE) -> Datagram | None:
        """The next whole datagram that matches; the others are kept for later calls. None after so many seconds."""
        for d in self._waiting:
            if match(d):
                self._waiting.remove(d)
                return d
        end = time.monotonic() + timeout
        while (frame := self.recv_frame(max(0.0, end - time.monotonic()))) is not None:
            if (d := self._take(frame)) is None:
                continue
            if match(d):
                return d
            self._waiting.append(d)
        return None

    def recv_udp(self, port: int, timeout: float = DEADLINE) -> Datagram:
        """The next UDP datagram to this port of the guest. Fails if there is none."""
        d = self.datagram(lambda d: d.proto == UDP and d.dport == port, timeout)
        assert d is not None, f"no UDP datagram to port {port} within {timeout} s"
        return d

    def recv_echo(self, ident: int, timeout: float = DEADLINE) -> Datagram:
        """The next echo reply with this identifier. Fails if there is none."""
        d = self.datagram(lambda d: d.proto == ICMP and d.icmp == (0, 0) and d.rest >> 16 == ident, timeout)
        assert d is not None, f"no echo reply with identifier {ident} within {timeout} s"
        return d

    def recv_error(self, about: Callable[[Datagram], bool], timeout: float = DEADLINE) -> Datagram:
        """The next ICMP error that quotes a packet like this. Fails if there is none."""
        d = self.datagram(lambda d: d.proto == ICMP and d.icmp[0] in (3, 11) and about(quoted(d)), timeout)
        assert d is not None, f"no such ICMP error within {timeout} s"
        return d

    def fence(self) -> None:
        """Return when all that egress had to do before this call is done and has come. For "and nothing else came"
        without waiting for a time to pass; what comes meanwhile is kept for datagram(). (Frames are handled in order;
        the reply to a second ping, sent after the first came, cannot overtake what the turns before it had to do.)"""
        for _ in range(2):
            ident = fresh_ident()
            self.ping(ident, 0)
            self.recv_echo(ident)

    def _take(self, frame: bytes) -> Datagram | None:
        """Check one frame, put fragments together (RFC 815); a datagram once it is whole."""
        assert len(frame) >= 14, "runt frame to the guest"
        if frame[12:14] != b"\x08\x00":
            return None
        assert frame[:6] == mac_bytes(self.mac) and frame[6:12] == mac_bytes(GATEWAY_MAC), "wrong MAC addresses"
        ip = frame[14:]
        hlen = (ip[0] & 15) * 4
        total, ident, frag, ttl, proto = struct.unpack_from("!2xHHHBB", ip)
        assert ip[0] >> 4 == 4 and hlen >= 20 and checksum(ip[:hlen]) == 0, "bad IP header to the guest"
        assert hlen <= total <= len(ip), "IP total length and frame do not fit"
        if proto != TCP:  # with a virtio-net header TCP may come in super-frames
            assert total <= self.mtu, f"{total} bytes to a guest with MTU {self.mtu}"
        src, dst, body = socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20]), bytes(ip[hlen:total])
        at, more = (frag & 0x1FFF) * 8, bool(frag & 0x2000)
        frames = 1
        if at or more:
            assert not more or len(body) % 8 == 0, "fragment that is not a multiple of 8 bytes"
            key = (src, dst, proto, ident)
            p = self._pieces.setdefault(key, _Pieces())
            assert at not in p.parts, "fragment sent twice"
            p.parts[at] = body
            p.frames += 1
            if not more:
                p.end = at + len(body)
            if p.end is None or sum(map(len, p.parts.values())) < p.end:
                return None
            del self._pieces[key]
            starts = sorted(p.parts)
            body, frames = b"".join(p.parts[k] for k in starts), p.frames
            fits = all(a + len(p.parts[a]) == b for a, b in itertools.pairwise(starts))
            assert fits and len(body) == p.end, "fragments overlap or leave holes"
        d = Datagram(proto, src, dst, ttl, body, frames)
        if proto == UDP:
            pseudo = ip[12:20] + struct.pack("!BBH", 0, UDP, len(body))
            assert struct.unpack_from("!H", body, 4)[0] == len(body), "UDP length and IP length differ"
            assert body[6:8] != b"\0\0" and checksum(pseudo + body) == 0, "bad UDP checksum to the guest"
        elif proto == ICMP:
            assert checksum(body) == 0, "bad ICMP checksum to the guest"
        return d


class _Memory:
    """Anonymous shared memory of a test."""

    def __init__(self, size: int) -> None:
        self.size = size
        fd = os.memfd_create("ringnet-test")
        try:
            os.ftruncate(fd, size)
            self.mem = lib.rn_map(fd, size, 0)
            assert self.mem != ffi.NULL, os.strerror(ffi.errno)
        finally:
            os.close(fd)

    def free(self) -> None:
        lib.rn_unmap(self.mem, self.size)


def _ok(rc: int, stage: Any = None) -> None:
    assert rc >= 0, (ffi.string(lib.rn_stage_error(stage)).decode() if stage else "") or os.strerror(-rc)


class EgressOnly(Guest):
    """egress between two rings whose other ends the test holds. See the head of this file."""

    _CLASSIFY, _EGRESS, _RX = 0, 1, 2  # rows

    def __init__(self, *, mtu: int = 1500, ring: int = 1024, small: int = 1024, large: int = 64, flows: int = 1024,
                 nfile: int = 1024, udp_max: int = 512, pending_max: int = 64, host_loopback: bool = True,
                 offload: bool = False, raw_icmp_fd: int = -1, seed: int = 0,
                 proxy: Plan | None = None, policy: tuple[str, ...] = (), peek: int = -1) -> None:
        super().__init__()
        self.mtu = mtu
        self._skew = 0  # ns
        self._stopped_at: int | None = None  # ns
        self._frames: deque[bytes] = deque()
        self._with = contextlib.ExitStack()
        spec = ffi.new("struct rn_part_spec[3]", [(256, 32), (small, large), (0, 0)])
        self._session = self._memory(lib.rn_session_size())
        _ok(lib.rn_session_create(self._session.mem, self._session.size, 3))
        self._arena = self._memory(lib.rn_arena_size(spec, 3))
        _ok(lib.rn_arena_create(self._arena.mem, self._arena.size, spec, 3))
        self._bytes = ffi.buffer(self._arena.mem, self._arena.size)
        self._flows = self._memory(lib.rn_flows_size(flows))
        _ok(lib.rn_flows_create(self._flows.mem, self._flows.size, flows, 1, 2))
        self._rings = rings = [self._memory(lib.rn_ring_size(n)) for n in (1024, ring)]
        for r, n in zip(rings, (1024, ring), strict=True):
            _ok(lib.rn_ring_create(r.mem, r.size, n))
        err = ffi.new("int *")
        self._bells = bells = [lib.rn_bell_new() for _ in range(3)]
        self._with.callback(lambda: [os.close(b) for b in bells])
        self._tx = lib.rn_ring_tx_new(rings[0].mem, rings[0].size, bells[1], err)
        self._with.callback(lib.rn_ring_tx_delete, self._tx)
        self._rx = lib.rn_ring_rx_new(rings[1].mem, rings[1].size, bells[1], err)
        self._with.callback(lib.rn_ring_rx_delete, self._rx)
        self._pool = lib.rn_pool_new(self._arena.mem, self._arena.size, self._CLASSIFY, self._CLASSIFY, 0, err)
        self._with.callback(lib.rn_pool_delete, self._pool)
        self._free = lib.rn_pool_new(self._arena.mem, self._arena.size, -1, self._RX, 0, err)
        self._with.callback(lib.rn_pool_delete, self._free)
        lib.rn_pool_bell(self._free, self._EGRESS, bells[1])

        self._config = c = ffi.new("struct egress_config *")
        c.gateway4, c.gateway_mac = socket.inet_aton(GATEWAY), mac_bytes(GATEWAY_MAC)
        c.guest4, c.prefix = socket.inet_aton(GUEST), 24
        c.mtu, c.offload, c.host_loopback, c.peek_offset = mtu, offload, host_loopback, peek
        c.raw_icmp_fd, c.nfile, c.udp_max, c.pending_max, c.seed = raw_icmp_fd, nfile, udp_max, pending_max, seed
        self.names = self._with.enter_context(Names.create())
        self._proxy, self._policy = proxy, policy
        self.estate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # what it leaves goes in at 0, comes out at 1
        self._with.callback(lambda: [end.close() for end in self.estate])
        self._with.callback(lambda: lib.rn_estate_discard(self.estate[1].fileno()))
        self.generation = 0
        self._stage: Any = ffi.NULL
        self._with.callback(lambda: lib.rn_stage_free(self._stage))
        self._sit()
        self._parse = ffi.new("struct classify_config *")
        self._parse.gateway4, self._parse.subnet4 = socket.inet_aton(GATEWAY), socket.inet_aton("10.0.2.0")
        self._parse.prefix, self._parse.gateway_mac, self._parse.mtu = 24, mac_bytes(GATEWAY_MAC), mtu

    def _sit(self) -> None:
        """A process of the stage, as far as before its loop."""
        self.generation += 1
        self._stage = s = lib.rn_stage_new(self._EGRESS, self.generation)
        _ok(lib.rn_stage_set_session(s, self._session.mem, self._session.size), s)
        _ok(lib.rn_stage_set_arena(s, self._arena.mem, self._arena.size, 1), s)
        for row, bell in enumerate(self._bells):
            _ok(lib.rn_stage_set_bell(s, row, bell), s)
        _ok(lib.rn_stage_add_input(s, self._rings[0].mem, self._rings[0].size, self._CLASSIFY), s)
        _ok(lib.rn_stage_add_output(s, lib.RN_ROLE_GUEST, self._rings[1].mem, self._rings[1].size, self._RX), s)
        if self.generation > 1:
            _ok(lib.rn_stage_recover(s), s)
            self._config.heir = 1
            lib.rn_stage_clock(s, self._now())
        _ok(lib.stage_egress_init(s, self._flows.mem, self._flows.size, self._config), s)
        if self._proxy is not None:
            set_proxy(s, self._proxy, (self.names.mem, self.names.size))
        set_policy(s, entries(parse_policy(self._policy)))

    def leave(self) -> int:
        """egress leaves its seat in order; how many flows it leaves. What classify puts on the ring now waits there."""
        lib.rn_stage_clock(self._stage, self._now())
        left = lib.stage_egress_leave(self._stage, self.estate[0].fileno(), self.estate[1].fileno())
        _ok(left, self._stage)
        lib.rn_stage_free(self._stage)
        self._stage = ffi.NULL
        return left

    def succeed(self) -> tuple[int, str]:
        """The next process sits down: how many flows it goes on with, or a negative errno, and why."""
        self._sit()
        found = lib.stage_egress_inherit(self._stage, self.estate[1].fileno())
        lib.rn_stage_clock(self._stage, 0)
        return found, ffi.string(lib.rn_stage_error(self._stage)).decode()

    def _memory(self, size: int) -> _Memory:
        m = _Memory(size)
        self._with.callback(m.free)
        return m

    def __enter__(self) -> EgressOnly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._with.close()

    # -- classify's end

    def meta(self, frame: bytes, vnet: bytes = b"") -> bytes:
        """What classify would write about this frame, as struct rn_meta. Fails if it would not go to egress."""
        p = ffi.new("struct rn_parsed *")
        verdict = lib.rn_parse_bytes(frame, len(frame), vnet or ffi.NULL, self._parse, p)
        assert verdict == lib.RN_V_BRIDGE, f"classify says {ffi.string(lib.rn_verdict_name(verdict)).decode()}"
        return META.pack(4, p.ip_proto, p.ttl, 0, p.l3_off, p.l4_off, p.payload_off, p.each, p.payload_len)

    def put(self, frame: bytes, meta: bytes | None = None, *, len_: int | None = None, gen: int | None = None,
            off: int = 0) -> None:
        """A frame on the ring; not yet seen by egress. meta, len_, gen, off: lies (off is added)."""
        d = ffi.new("struct rn_desc *")
        small = len(frame) <= lib.RN_BUF_SMALL - _RN_BUF_ETH_OFF
        _ok(lib.rn_pool_take(self._pool, lib.RN_SMALL if small else lib.RN_LARGE, len(frame), d))
        assert lib.rn_ring_room(self._tx, 1), "ring to egress is full: step() first"
        self._bytes[d.off:d.off + len(frame)] = frame
        at = d.off - _RN_BUF_ETH_OFF + _RN_META_OFF
        self._bytes[at:at + META.size] = self.meta(frame) if meta is None else meta
        start = d.off - _RN_BUF_ETH_OFF
        self._bytes[start:start + 4] = struct.pack("=I", self._EGRESS + 1)  # whose it is now: a successor looks
        d.len = d.len if len_ is None else len_
        d.gen = d.gen if gen is None else gen
        d.off += off
        lib.rn_ring_put(self._tx, d)
        lib.rn_ring_publish(self._tx)

    # -- egress

    def _now(self) -> int:
        """What egress's clock shows, ns."""
        return time.monotonic_ns() + self._skew if self._stopped_at is None else self._stopped_at

    def step(self, wait: float = 0.0) -> bool:
        """One turn; waits so many seconds for a socket event or a timer first. True if it did something."""
        did = lib.stage_egress_step(self._stage, int(wait * 1000 + 0.999), self._now())
        _ok(did, self._stage)
        return did > 0

    def settle(self) -> None:
        """Turns until one is idle."""
        for _ in range(100000):
            if not self.step():
                return
        raise AssertionError("egress never has nothing to do")

    def advance(self, seconds: float) -> None:
        """Set egress's clock forward and let it notice."""
        self._skew += int(seconds * 1e9)
        if self._stopped_at is not None:
            self._stopped_at += int(seconds * 1e9)
        self.settle()

    def stop_clock(self, at: int | None = None) -> int:
        """From now on only this and advance() move egress's clock; at: ns. Returns what it shows."""
        self._stopped_at = time.monotonic_ns() + self._skew if at is None else at
        self.settle()
        return self._stopped_at

    def due(self) -> int | None:
        """When egress's loop would wake for a timer, ns of its clock; None: never."""
        at = lib.stage_egress_due(self._stage)
        return None if at == (1 << 64) - 1 else at

    def counters(self, stage: str = "egress") -> dict[str, int]:
        return {ffi.string(lib.rn_counter_name(i)).decode(): lib.rn_stage_counter(self._stage, i)
                for i in range(lib.rn_ncounters()) if ffi.string(lib.rn_counter_stage(i)).decode() in (stage, "all")}

    def flows(self) -> list[Any]:
        """struct rn_flow_view of every entry in use."""
        out = []
        for i in range(lib.rn_flows_count(self._flows.mem)):
            view = ffi.new("struct rn_flow_view *")
            if lib.rn_flows_read(self._flows.mem, self._flows.size, i, view) == 0:
                out.append(view)
        return out

    # -- guest_rx's end

    def waiting(self) -> int:
        """Frames on the ring that nobody has taken."""
        n = lib.rn_ring_peek(self._rx, 65535)
        _ok(n)
        return n

    def take(self, most: int = 1024) -> int:
        """Take so many frames off the ring at most; returns how many there were. recv_frame() then has them."""
        n = lib.rn_ring_peek(self._rx, most)
        _ok(n)
        for k in range(n):
            d = ffi.new("struct rn_desc *", lib.rn_ring_at(self._rx, k))
            assert lib.rn_pool_holds(self._free, d), "egress emitted a bad descriptor"
            self._frames.append(bytes(self._bytes[d.off:d.off + d.len]))
            _ok(lib.rn_pool_give(self._free, d))
        lib.rn_ring_consume(self._rx, n)
        return n

    # -- Guest

    def send(self, frame: bytes | Packet) -> None:
        """Through egress at once: what it does to a host socket is done when this returns."""
        self.put(bytes(frame))
        self.settle()

    def send_super(self, vnet: bytes, frame: bytes) -> None:
        self.put(frame, self.meta(frame, vnet))
        self.settle()

    def send_ip(self, proto: int, payload: bytes, dst: str = GATEWAY, *, src: str = GUEST, ttl: int = 64,
                mtu: int | None = None, order: Any = None) -> None:
        """In one frame of any size, as classify hands on what it has put together."""
        super().send_ip(proto, payload, dst, src=src, ttl=ttl, mtu=65535)

    def recv_frame(self, timeout: float = DEADLINE) -> bytes | None:
        end = time.monotonic() + timeout
        while not self._frames:
            left = end - time.monotonic()
            if not self.step() and not self.take():
                if left <= 0:
                    return None
                self.step(left)
            self.take()
        return self._frames.popleft()


class Wire(Guest):
    """The whole pipeline, a process a stage. settings: keys of pipeline.config.Settings in TOML's spelling.

    sock: the guest's end of the link. session: pipeline.supervisor.Session, running.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mtu = settings.setdefault("mtu", 1500)
        settings.setdefault("quiet", True)
        self.vnet = settings.pop("vnet", False)
        self._cut: deque[bytes] = deque()
        if "RINGNET_TEST_PROMOTE" in os.environ:
            settings.setdefault("promote", int(os.environ["RINGNET_TEST_PROMOTE"]))
        self._with = contextlib.ExitStack()
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._with.enter_context(self.sock)
        with theirs:
            for s in (self.sock, theirs):
                for opt in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    s.setsockopt(socket.SOL_SOCKET, opt, 4 << 20)
            self.session = Session(make({k.replace("_", "-"): v for k, v in settings.items()}),
                                   link=Link(fd=theirs.fileno(), kind="dgram", vnet=self.vnet))
            self._with.enter_context(self.session)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._with.close()

    def send(self, frame: bytes | Packet) -> None:
        self.sock.send(bytes(12 if self.vnet else 0) + bytes(frame))

    def send_super(self, vnet: bytes, frame: bytes) -> None:
        self.sock.send(vnet + frame)

    def recv_frame(self, timeout: float = DEADLINE) -> bytes | None:
        if self._cut:
            return self._cut.popleft()
        ready, _, _ = select.select([self.sock], [], [], max(0.0, timeout))
        if not ready:
            return None
        frame = self.sock.recv(1 << 17)
        if not frame:
            self.session.poll(0)
            raise AssertionError(f"the pipeline closed the link; stages alive: {self.session.stages()}")
        if self.vnet:
            out = ffi.new("uint8_t[]", 1 << 18)
            n = lib.rn_gso_all(frame, len(frame) - 12, out, len(out))
            assert n > 0, "a virtio-net header that does not fit its frame"
            data, at = bytes(ffi.buffer(out, n)), 0
            while at < n:
                size = int.from_bytes(data[at:at + 4], "big")
                self._cut.append(data[at + 4:at + 4 + size])
                at += 4 + size
            return self._cut.popleft()
        return frame

    def counters(self, stage: str = "egress") -> dict[str, int]:
        """A stage's counters. A stage publishes them after each turn, so a frame may be here before its count is: ask
        the stage for a Pong first, which it sends between two turns."""
        child = self.session.child(stage)
        seq = child.pongs + 1
        self.session.ping(stage, seq)
        end = time.monotonic() + DEADLINE
        while child.pongs < seq and self.session.poll(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"{stage} does not answer"
        return self.session.counters(stage)


@contextlib.contextmanager
def udp_server(address: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A UDP socket on an ephemeral port, with a large buffer and a deadline."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        s.bind((address, 0))
        s.settimeout(DEADLINE)
        yield s


def closed_udp_port(address: str = "127.0.0.1") -> int:
    """A port where nobody listens, and that nobody else gets while this process lives: a socket has it that is connected to
    itself, so that what others send there finds none."""
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    _held.append(s)
    s.bind((address, 0))
    s.connect(s.getsockname())
    return s.getsockname()[1]


def closed_tcp_port(address: str = "127.0.0.1") -> int:
    """The same for TCP: bound, and nobody listens."""
    s = socket.socket()
    _held.append(s)
    s.bind((address, 0))
    return s.getsockname()[1]


def fill(server: socket.socket) -> list[socket.socket]:
    """Clients of a listener with backlog 0 that fill its queue: a connect() after this stays under way."""
    clients = []
    for _ in range(3):  # one in the queue, and more who want to be
        s = socket.socket()
        s.setblocking(False)
        s.connect_ex(server.getsockname())
        clients.append(s)
    assert select.select([server], [], [], DEADLINE)[0], "nobody came into the queue"
    return clients
