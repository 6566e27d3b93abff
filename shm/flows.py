"""The flow table, as the supervisor makes it and the monitor reads it."""
from __future__ import annotations

import enum
import errno
import ipaddress
from collections.abc import Iterator
from typing import Self

from msgspec import Struct

from shm._dataplane import ffi, lib
from shm.memory import CData, SharedObject, check


class FlowState(enum.IntEnum):
    """enum rn_flow_state."""

    FREE = lib.RN_FL_FREE
    CONNECTING = lib.RN_FL_CONNECTING
    SYN_RCVD = lib.RN_FL_SYN_RCVD
    ESTABLISHED = lib.RN_FL_ESTABLISHED
    TIME_WAIT = lib.RN_FL_TIME_WAIT
    MAPPED = lib.RN_FL_MAPPED
    SYN_SENT = lib.RN_FL_SYN_SENT


class Wait(enum.IntEnum):
    """enum rn_wait: what keeps a half from moving."""

    NONE = lib.RN_WAIT_NONE
    HOST = lib.RN_WAIT_HOST
    WINDOW = lib.RN_WAIT_WINDOW
    ACK = lib.RN_WAIT_ACK
    ROOM = lib.RN_WAIT_ROOM
    TURN = lib.RN_WAIT_TURN


FIN_SEEN, FIN_SENT, FIN_ACKED = lib.RN_FIN_SEEN, lib.RN_FIN_SENT, lib.RN_FIN_ACKED


class Flow(Struct, frozen=True, kw_only=True):
    """One entry. Read while it may change: good to look at, not to decide by."""

    index: int
    proto: int  # IP protocol number
    state: FlowState
    guest: str  # address; IPv4 in its usual form
    guest_port: int  # ICMP: echo identifier
    peer: str  # as the guest calls it; "" for a UDP mapping
    peer_port: int
    up_owner: int  # stage row, -1: nobody
    down_owner: int
    up_fin: int  # RN_FIN_*
    down_fin: int
    created_ns: int  # CLOCK_MONOTONIC
    last_ns: int
    up_bytes: int
    up_packets: int
    down_bytes: int
    down_packets: int
    rcv_nxt: int
    rcv_adv: int
    snd_una: int
    snd_nxt: int
    snd_wnd: int  # bytes
    mss: int
    srtt_us: int
    rto_us: int
    retransmits: int
    parked: int  # bytes of guest segments kept
    gen: int  # counts uses of the entry: with index, names this flow and no later one
    up_wait: int = 0  # enum rn_wait, and CLOCK_MONOTONIC since when
    up_wait_ns: int = 0
    down_wait: int = 0
    down_wait_ns: int = 0


def _address(raw: bytes) -> str:
    """Shortest text of a 16-byte address, "" if it is zero."""
    if not any(raw):
        return ""
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def _flow(v: CData) -> Flow:
    """From a struct rn_flow_view."""
    return Flow(
        index=v.index, proto=v.proto, state=FlowState(v.state),
        guest=_address(bytes(v.guest_addr)), guest_port=v.guest_port,
        peer=_address(bytes(v.peer_addr)), peer_port=v.peer_port,
        up_owner=v.up_owner - 1, down_owner=v.down_owner - 1, up_fin=v.up_fin, down_fin=v.down_fin,
        created_ns=v.created_ns, last_ns=v.last_ns,
        up_bytes=v.up_bytes, up_packets=v.up_packets, down_bytes=v.down_bytes, down_packets=v.down_packets,
        rcv_nxt=v.rcv_nxt, rcv_adv=v.rcv_adv, snd_una=v.snd_una, snd_nxt=v.snd_nxt, snd_wnd=v.snd_wnd,
        mss=v.mss, srtt_us=v.srtt_us, rto_us=v.rto_us, retransmits=v.retransmits, parked=v.parked, gen=v.gen,
        up_wait=v.up_wait, up_wait_ns=v.up_wait_ns, down_wait=v.down_wait, down_wait_ns=v.down_wait_ns,
    )


class Flows(SharedObject):
    kind = "flows"

    @classmethod
    def create(cls, entries: int, secret: tuple[int, int], *, name: str = "flows") -> Self:
        """`secret`: 128 random bits, the key of initial sequence numbers (RFC 6528 3)."""
        size = lib.rn_flows_size(entries) if 0 <= entries < 2**32 else 0
        return cls._new("flows", size, name, lambda mem, size: lib.rn_flows_create(mem, size, entries, *secret))

    def _check(self) -> int:
        return lib.rn_flows_check(self.mem, self.size)

    def __len__(self) -> int:
        """Entries, free ones included."""
        return int(lib.rn_flows_count(self.mem))

    def read(self, index: int) -> Flow | None:
        """One entry; None if it is free. Raises LayoutMismatch (no such entry)."""
        v = ffi.new("struct rn_flow_view *")
        rc = lib.rn_flows_read(self.mem, self.size, index, v)
        if rc == -errno.ENOENT:
            return None
        check(rc, f"{self.name}, entry {index}")
        return _flow(v)

    def used(self, start: int = 0) -> Iterator[Flow]:
        """Entries in use, from one on."""
        while (start := lib.rn_flows_next(self.mem, self.size, start)) < len(self):
            if (flow := self.read(start)) is not None:
                yield flow
            start += 1

    def __iter__(self) -> Iterator[Flow]:
        """Entries in use."""
        return self.used()

    def census(self) -> dict[tuple[int, int], int]:
        """Flows by (protocol, state)."""
        scan = Scan(self)
        scan.look()
        return scan.census(-1)[0]


Entry = tuple[int, int, int, int, int, int, int, int, int]


class Scan:
    """Looks at all entries in use at once; Python objects are made only of those that are asked for."""

    def __init__(self, flows: Flows) -> None:
        self._flows = flows
        self._views = ffi.new("struct rn_flow_view[]", len(flows))
        self.n = 0

    def look(self) -> int:
        """Take a look; how many there are."""
        self.n = int(lib.rn_flows_collect(self._flows.mem, self._flows.size, self._views, len(self._views)))
        return self.n

    def flow(self, at: int) -> Flow:
        """The flow at a place of the last look."""
        return _flow(self._views[at])

    def entries(self, proto: int = 0) -> list[Entry]:
        """(index, generation, up bytes, down bytes, created ns, last ns, round trip us, retransmits, place) of each; proto
        0: of all protocols."""
        views = self._views
        return [(v.index, v.gen, v.up_bytes, v.down_bytes, v.created_ns, v.last_ns, v.srtt_us, v.retransmits, at)
                for at in range(self.n) if (v := views[at]).proto == proto or not proto]

    def census(self, home: int) -> tuple[dict[tuple[int, int], int], int]:
        """Flows by (protocol, state); halves owned by another row than `home`."""
        kinds: dict[tuple[int, int], int] = {}
        away, views = 0, self._views
        for at in range(self.n):
            v = views[at]
            kind = v.proto, v.state
            kinds[kind] = kinds.get(kind, 0) + 1
            away += (v.up_owner not in (0, home + 1)) + (v.down_owner not in (0, home + 1))
        return kinds, away
