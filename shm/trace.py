"""What stages say of themselves besides counters, read from the session object: decisions (csrc/rn_event.h), and how
long frames take from one stage to another (csrc/rn_session.h)."""
from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterator

from msgspec import Struct

from shm._dataplane import ffi, lib
from shm.cell import Session, counters


class Kind(enum.IntEnum):
    """enum rn_event_kind."""

    START = lib.RN_DID_START
    COUNT = lib.RN_DID_COUNT
    REFUSE = lib.RN_DID_REFUSE
    OPEN = lib.RN_DID_OPEN
    END = lib.RN_DID_END


class Event(Struct, frozen=True, kw_only=True):
    """One decision. Who is known only as far as the stage knew: addresses "", flow -1, protocol 0 otherwise."""

    number: int  # counts the stage's events, from 1
    at_ns: int  # CLOCK_MONOTONIC, of the turn
    kind: Kind
    counter: str  # "" but for COUNT
    n: int  # how many, this one included, since the last one told
    flow: int
    gen: int
    value: int  # START: generation, REFUSE: errno, END: age in ns
    guest: str
    guest_port: int
    peer: str
    peer_port: int
    proto: int


def _address(raw: bytes) -> str:
    if not any(raw):
        return ""
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def event_count(session: Session, row: int) -> int:
    """Events a stage ever noted; the last lib.RN_EVENTS of them can be read."""
    return int(lib.rn_events_count(session.mem, session.size, row))


def events(session: Session, row: int, start: int = 1) -> Iterator[Event]:
    """A stage's events that are still there, oldest first, from number `start` on."""
    v = ffi.new("struct rn_event_view *")
    names = [c.name for c in counters()]
    end = event_count(session, row)
    for number in range(max(start, end - lib.RN_EVENTS + 1, 1), end + 1):
        if lib.rn_events_read(session.mem, session.size, row, number, v) < 0:
            continue  # overwritten since we counted
        yield Event(
            number=v.number, at_ns=v.at_ns, kind=Kind(v.kind), counter=names[v.counter] if v.counter < len(names) else "",
            n=v.n, flow=-1 if v.flow == lib.RN_NO_FLOW else v.flow, gen=v.flow_gen, value=v.value,
            guest=_address(bytes(v.guest)), guest_port=v.guest_port, peer=_address(bytes(v.peer)),
            peer_port=v.peer_port, proto=v.proto)


def latency(session: Session, source: int, target: int) -> list[tuple[int, int]]:
    """(upper bound in ns, -1 for none; frames) of each bucket that counted sampled frames of one stage at another."""
    found = []
    for b in range(lib.RN_LATENCY_BUCKETS):
        if n := lib.rn_latency_read(session.mem, session.size, source, target, b):
            bound = lib.rn_latency_bound(b)
            found.append((-1 if bound == (1 << 64) - 1 else bound, n))
    return found
