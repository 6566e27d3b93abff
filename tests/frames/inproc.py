"""Stages of the data plane in one process: real rings, arena, links and loops, no supervisor.

Each C stage keeps all it has in one struct, so a test can hold several and run each until it is idle. What a stage
puts on a ring is read back by a guest_rx stage at the ring's other end, which writes it to a socket.
"""
from __future__ import annotations

import mmap
import os
import socket
import struct
from types import TracebackType
from typing import Any

from frames import GATEWAY, GATEWAY_MAC, MTU, PREFIX, SUBNET
from shm._dataplane import ffi, lib

VNET = bytes(12)  # virtio-net header that says nothing
FRAME_MAX = 65535 + 14
COUNTERS = {ffi.string(lib.rn_counter_name(i)).decode(): i for i in range(lib.rn_ncounters())}
RING_TAIL, RING_HEAD, RING_SLOTS, DESC = 64, 128, 192, struct.Struct("<QIHH")  # csrc/rn_ring.h


def config(**kw: Any) -> Any:
    """struct classify_config * of the guest that the frames are from."""
    return ffi.new("struct classify_config *", {
        "gateway4": list(socket.inet_aton(GATEWAY)), "subnet4": list(socket.inet_aton(SUBNET)), "prefix": PREFIX,
        "gateway_mac": list(bytes.fromhex(GATEWAY_MAC.replace(":", ""))), "mtu": MTU, **kw})


def link(sock: socket.socket | int, *, vnet: bool = True, frame_max: int = FRAME_MAX,
         kind: int = lib.RN_LINK_DGRAM, merge: bool = False, unfinished: int = 0, whole: bool = False, uso: bool = False) -> Any:
    fd = sock if isinstance(sock, int) else sock.fileno()
    return ffi.new("struct rn_link *", {"fd": fd, "kind": kind, "vnet": int(vnet), "frame_max": frame_max,
                                       "merge": int(merge), "unfinished": unfinished, "whole": int(whole), "uso": int(uso)})


def pair(buffers: int = 4 << 20) -> tuple[socket.socket, socket.socket]:
    """A datagram link: the stage's end and the guest's, both non-blocking."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for s in (a, b):
        s.setblocking(False)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
    return a, b


def received(sock: socket.socket) -> list[bytes]:
    """All datagrams that wait."""
    found = []
    while True:
        try:
            found.append(sock.recv(1 << 17))
        except BlockingIOError:
            return found


class Memory:
    """Zeroed bytes for one shared object; page-aligned."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size)
        self.ptr = ffi.from_buffer(self.map)
        self.size = size


class Ring(Memory):
    def __init__(self, slots: int) -> None:
        super().__init__(lib.rn_ring_size(slots))
        assert lib.rn_ring_create(self.ptr, self.size, slots) == 0

    def stat(self) -> Any:
        out = ffi.new("struct rn_ring_stat *")
        assert lib.rn_ring_stat(self.ptr, self.size, out) == 0
        return out

    @property
    def fill(self) -> int:
        st = self.stat()
        return st.tail - st.head

    def descriptors(self) -> list[tuple[int, int, int, int]]:
        """(offset, length, flags, generation) of all that wait."""
        st = self.stat()
        return [DESC.unpack_from(self.map, RING_SLOTS + 16 * (i % st.nslots)) for i in range(st.head, st.tail)]

    def forge(self, offset: int, length: int, flags: int = 0, gen: int = 0) -> None:
        """Publish any descriptor, as a taken-over producer could."""
        st = self.stat()
        DESC.pack_into(self.map, RING_SLOTS + 16 * (st.tail % st.nslots), offset, length, flags, gen)
        struct.pack_into("<Q", self.map, RING_TAIL, st.tail + 1)


class Plane:
    """An arena, and stages that share it. Use as a context manager; stages() are freed in reverse order."""

    def __init__(self, parts: dict[int, tuple[int, int]]) -> None:
        """parts: row -> (small, large) buffers."""
        n = max(parts, default=0) + 1
        spec = ffi.new("struct rn_part_spec[]", [parts.get(i, (0, 0)) for i in range(n)])
        self.arena = Memory(lib.rn_arena_size(spec, n))
        assert lib.rn_arena_create(self.arena.ptr, self.arena.size, spec, n) == 0
        self.parts = parts
        self.stages: list[Any] = []
        self.keep: list[Any] = []
        self.go = lib.rn_bell_new()  # always readable: a loop comes back as soon as it would block
        lib.rn_bell_ring(self.go)

    def stage(self, row: int, *, inputs: dict[int, Ring] | None = None,
              outputs: dict[int, tuple[Ring, int]] | None = None) -> Any:
        """inputs: producer's row -> ring; outputs: role -> (ring, consumer's row)."""
        s = lib.rn_stage_new(row, 0)
        assert s != ffi.NULL
        self.stages.append(s)
        assert lib.rn_stage_set_arena(s, self.arena.ptr, self.arena.size, int(row in self.parts)) == 0
        for producer, ring in (inputs or {}).items():
            self.keep.append(ring)
            assert lib.rn_stage_add_input(s, ring.ptr, ring.size, producer) == 0
        for role, (ring, consumer) in (outputs or {}).items():
            self.keep.append(ring)
            assert lib.rn_stage_add_output(s, role, ring.ptr, ring.size, consumer) == 0
        assert lib.rn_stage_set_control(s, self.go) == 0
        return s

    def __enter__(self) -> Plane:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for s in reversed(self.stages):
            lib.rn_stage_free(s)
        self.stages.clear()
        os.close(self.go)


def run(stage: Any) -> int:
    """Until it has nothing to do; enum rn_run, RN_RUN_CONTROL unless something is wrong or drained."""
    first = lib.rn_stage_run(stage)
    # Control is always readable here, so the loop comes back with what epoll told it: that work is done next time.
    return lib.rn_stage_run(stage) if first == lib.RN_RUN_CONTROL else first


def error(stage: Any) -> str:
    return ffi.string(lib.rn_stage_error(stage)).decode()


def count(stage: Any, name: str) -> int:
    return lib.rn_stage_counter(stage, COUNTERS[name])


def counts(stage: Any) -> dict[str, int]:
    """Counters that are not zero, without those about the loop itself, and without what is only so now."""
    loop = {"turns", "sleeps", "wakes_sent", "stalls_room", "stalls_buf"}
    return {n: v for n, i in COUNTERS.items() if n not in loop and not n.startswith("now_") and (v := lib.rn_stage_counter(stage, i))}


GUEST_TX, CLASSIFY, EGRESS, SERVICES, GUEST_RX = range(5)


class Classified(Plane):
    """guest_tx -> classify -> three readers: what goes in by `guest` comes out by `bridge`, `service` or `reply`."""

    def __init__(self, *, slots: int = 128, large: int = 32, bridge_slots: int = 0, service_slots: int = 0,
                 guest_slots: int = 0) -> None:
        super().__init__({GUEST_TX: (256, 16), CLASSIFY: (64, large)})
        tx, bridge = Ring(slots), Ring(bridge_slots or slots)
        service, guest = Ring(service_slots or slots), Ring(guest_slots or slots)
        self.input, self.rings = tx, {"bridge": bridge, "service": service, "reply": guest}
        inner, self.guest = pair()
        self.keep += [inner]
        self.guest_tx = self.stage(GUEST_TX, outputs={lib.RN_ROLE_CLASSIFY: (tx, CLASSIFY)})
        assert lib.stage_guest_tx_init(self.guest_tx, link(inner), -1) == 0, error(self.guest_tx)
        self.classify = self.stage(CLASSIFY, inputs={GUEST_TX: tx}, outputs={
            lib.RN_ROLE_BRIDGE: (bridge, EGRESS), lib.RN_ROLE_SERVICE: (service, SERVICES),
            lib.RN_ROLE_GUEST: (guest, GUEST_RX)})
        assert lib.stage_classify_init(self.classify, config()) == 0, error(self.classify)
        self.readers, self.sockets = {}, {}
        for row, (name, ring) in zip((EGRESS, SERVICES, GUEST_RX), self.rings.items(), strict=True):
            inner, self.sockets[name] = pair()
            self.keep += [inner]
            reader = self.readers[name] = self.stage(row, inputs={CLASSIFY: ring})
            assert lib.stage_guest_rx_init(reader, link(inner), -1) == 0, error(reader)

    def send(self, *frames: bytes, vnet: bytes = VNET) -> None:
        """As the guest: up to ring and classify, which is not run."""
        for f in frames:
            self.guest.send(vnet + f)
        assert run(self.guest_tx) == lib.RN_RUN_CONTROL, error(self.guest_tx)

    def work(self) -> None:
        assert run(self.classify) == lib.RN_RUN_CONTROL, error(self.classify)

    def read(self, name: str, *, vnet: bool = False) -> list[bytes]:
        """What came out there: frames, with their virtio-net header if asked."""
        assert run(self.readers[name]) == lib.RN_RUN_CONTROL, error(self.readers[name])
        return [d if vnet else d[12:] for d in received(self.sockets[name])]

    def through(self, *frames: bytes, vnet: bytes = VNET) -> dict[str, list[bytes]]:
        """Send, classify, read all three."""
        self.send(*frames, vnet=vnet)
        self.work()
        return {name: self.read(name) for name in self.rings}

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for s in (self.guest, *self.sockets.values(), *(k for k in self.keep if isinstance(k, socket.socket))):
            s.close()
