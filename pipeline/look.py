"""Looking at a running session from outside: its shared memory, mapped read-only, turned into figures and words.

The session is asked once, for descriptors (control API, `memory`); after that a look costs it nothing, however many flows
there are. `ringnet top` and `ringnet flows` show what is made here; docs/looking.md.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from pipeline import api
from pipeline.client import Client, ClientError
from pipeline.text import span
from pipeline.topology import TOPOLOGY
from shm.cell import State
from shm.flows import FIN_ACKED, FIN_SEEN, FIN_SENT, Flow, FlowState, Wait
from shm.view import MemoryView, Snapshot

PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}
IDLE_NS = 1_000_000_000  # a flow silent for longer is called idle


class StageRate(Struct, frozen=True, kw_only=True):
    """A stage since the last look; the first time since it began."""

    name: str
    pid: int
    state: str
    restarts: int
    frames_in_s: float
    bits_in_s: float
    frames_out_s: float
    bits_out_s: float
    wakes_s: float  # doorbells it rang
    sleeps_s: float  # times it had nothing to do
    batch: float  # frames a turn that had some
    stalls_room_s: float
    stalls_buf_s: float
    small_used: int  # frame buffers of its own that are out
    small_total: int
    large_used: int
    large_total: int
    cpu: float  # share of one processor
    memory_kib: int  # its own, without the shared objects
    drops: dict[str, int]  # reason: frames, since the session began
    drops_s: dict[str, float]  # those that grow


class RingRate(Struct, frozen=True, kw_only=True):
    name: str
    fill: int
    slots: int
    high: int  # most that its consumer ever found waiting
    frames_s: float
    waits: str  # "", "consumer sleeps" or "producer waits for room"


class FlowRate(Struct, frozen=True, kw_only=True):
    """One flow, in figures and words."""

    flow: str
    proto: str
    state: str
    guest: str
    guest_port: int
    peer: str  # "": every one
    peer_port: int
    age_s: float
    idle_s: float
    up_owner: str  # stage that runs this half, "" if none
    up_bytes: int
    up_bits_s: float
    up_packets: int
    rcv_nxt: int
    rcv_window: int  # bytes we offer the guest
    parked: int
    up_fin: str
    down_owner: str
    down_bytes: int
    down_bits_s: float
    down_packets: int
    snd_una: int
    snd_nxt: int
    in_flight: int
    snd_window: int  # bytes the guest offers
    mss: int
    srtt_ms: float
    rto_ms: float
    retransmits: int
    down_fin: str
    waits: str  # what it waits for, in words


class Look(Struct, frozen=True, kw_only=True):
    """One look at everything."""

    time: float  # Unix time
    session: str
    uptime_s: float
    interval_s: float  # what the rates are of
    stages: list[StageRate]
    rings: list[RingRate]
    flows: int
    flows_max: int
    kinds: dict[str, int]  # flows by protocol and state
    promoted: int  # halves that another stage than the one they began in runs
    top: list[FlowRate]  # as many as were asked for
    took_ms: float  # making this look


def owner_name(row: int, stages: tuple[str, ...]) -> str:
    return stages[row] if 0 <= row < len(stages) else ""


def _fin(bits: int) -> str:
    return "acknowledged" if bits & FIN_ACKED else "sent" if bits & FIN_SENT else "seen" if bits & FIN_SEEN else ""


def waits_for(f: Flow, now_ns: int) -> str:
    """In words, what a flow waits for; "" if it moves."""
    def since(ns: int) -> str:
        return span(max(0, now_ns - ns) / 1e9)

    peer = f"{f.peer}:{f.peer_port}"
    match f.state:
        case FlowState.CONNECTING:
            return f"connecting {since(f.created_ns)} to {peer}"
        case FlowState.SYN_RCVD:
            return f"the guest's ACK of our SYN-ACK {since(f.last_ns)}"
        case FlowState.SYN_SENT:
            return f"the guest's answer to our SYN {since(f.created_ns)}"
        case FlowState.TIME_WAIT:
            return f"TIME-WAIT {since(f.last_ns)}"
        case FlowState.MAPPED:
            return f"idle {since(f.last_ns)}" if now_ns - f.last_ns > IDLE_NS else ""
        case FlowState.ESTABLISHED:
            pass
        case _:
            return ""
    said = []
    match f.down_wait:
        case Wait.WINDOW:
            said.append(f"guest window closed {since(f.down_wait_ns)}")
        case Wait.ACK:
            said.append(f"guest's ACK {since(f.down_wait_ns)} ({(f.snd_nxt - f.snd_una) % (1 << 32)} B in flight fill its"
                        " window)")
        case Wait.ROOM:
            said.append(f"room towards the guest {since(f.down_wait_ns)}")
    if f.up_wait == Wait.HOST:
        said.append(f"host buffer full {since(f.up_wait_ns)} ({f.parked} B parked)")
    elif f.up_wait == Wait.TURN:
        said.append(f"its turn among many senders {since(f.up_wait_ns)}")
    elif f.parked:
        said.append(f"a segment missing from the guest ({f.parked} B behind it parked)")
    if f.down_fin & FIN_SENT and not f.down_fin & FIN_ACKED:
        said.append("guest's ACK of our FIN")
    elif f.down_fin & FIN_ACKED and not f.up_fin & FIN_SEEN:
        said.append(f"the guest's FIN {since(f.last_ns)}: the host side has closed")
    elif f.up_fin & FIN_SEEN and not f.down_fin:
        said.append(f"the host side's FIN {since(f.last_ns)}: the guest has closed")
    if said:
        return "; ".join(said)
    return f"idle {since(f.last_ns)}" if now_ns - f.last_ns > IDLE_NS else ""


def flow_rate(f: Flow, stages: tuple[str, ...], now_ns: int, before: tuple[int, int] | None, seconds: float) -> FlowRate:
    up, down = before or (f.up_bytes, f.down_bytes)
    return FlowRate(
        flow=f"{f.index}.{f.gen}", proto=PROTOCOLS.get(f.proto, str(f.proto)), state=f.state.name.lower(),
        guest=f.guest, guest_port=f.guest_port, peer=f.peer, peer_port=f.peer_port,
        age_s=round(max(0, now_ns - f.created_ns) / 1e9, 3), idle_s=round(max(0, now_ns - f.last_ns) / 1e9, 3),
        up_owner=owner_name(f.up_owner, stages), up_bytes=f.up_bytes,
        up_bits_s=round(max(0, f.up_bytes - up) * 8 / seconds), up_packets=f.up_packets,
        rcv_nxt=f.rcv_nxt, rcv_window=(f.rcv_adv - f.rcv_nxt) % (1 << 32), parked=f.parked, up_fin=_fin(f.up_fin),
        down_owner=owner_name(f.down_owner, stages), down_bytes=f.down_bytes,
        down_bits_s=round(max(0, f.down_bytes - down) * 8 / seconds), down_packets=f.down_packets,
        snd_una=f.snd_una, snd_nxt=f.snd_nxt, in_flight=(f.snd_nxt - f.snd_una) % (1 << 32), snd_window=f.snd_wnd,
        mss=f.mss, srtt_ms=f.srtt_us / 1000, rto_ms=f.rto_us / 1000, retransmits=f.retransmits,
        down_fin=_fin(f.down_fin), waits=waits_for(f, now_ns))


def cpu_ticks(pid: int) -> float:
    """Seconds of processor a process has used; 0.0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_memory_kib(pid: int) -> int:
    """Resident memory without the shared objects (/proc/PID/statm: resident less shared)."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * (os.sysconf("SC_PAGE_SIZE") // 1024)


SORTS: dict[str, str] = {  # of flows: what comes first
    "rate": "bits a second, both ways, since the last look",
    "bytes": "bytes, both ways",
    "age": "oldest",
    "idle": "silent longest",
    "rtt": "slowest",
    "retransmits": "most sent again",
}


class Looker:
    """Takes looks at one session."""

    def __init__(self, client: Client) -> None:
        """Raises ClientError, ApiError, LayoutMismatch, OSError."""
        self.client = client
        self.session = client.call(api.GetStatus()).session
        info = client.call(api.Memory())
        fds = client.take_fds()
        if len(fds) != 3 + len(info.rings):
            for fd in fds:
                os.close(fd)
            raise ClientError(f"{client.path}: {len(fds)} descriptors came, {3 + len(info.rings)} were told")
        session, arena, flows, *rings = fds
        os.close(arena)
        self.stages = tuple(info.stages)
        self.view = MemoryView(self.stages, (session, info.session.size),
                               {r.name: (fd, r.size) for r, fd in zip(info.rings, rings, strict=True)},
                               (flows, info.flows.size))
        self.started_ns = info.started_ns
        self._last: Snapshot | None = None
        self._cpu: dict[int, tuple[float, int]] = {}  # by pid: seconds used, at (ns)
        self._bytes: dict[tuple[int, int], tuple[int, int]] = {}  # by entry and generation: up, down
        self._bytes_ns = 0

    def close(self) -> None:
        self.view.close()

    # -- flows

    def flows(self, *, most: int, sort: str = "age", wanted: Callable[[Flow], bool] | None = None,
              proto: int = 0) -> tuple[list[FlowRate], dict[str, int], int, int]:
        """(flows, all by protocol and state, halves promoted, all). Objects are made only of those that are shown."""
        scan = self.view.scan
        n, now = scan.look(), time.monotonic_ns()
        # The first look has nothing to compare with: then a rate is of the flow's whole life.
        seconds = (now - self._bytes_ns) / 1e9 if self._bytes_ns else 0.0
        before, entries = self._bytes, scan.entries(proto)
        egress = next((row for row, name in enumerate(self.stages) if TOPOLOGY.stage(name).flows), -1)
        kinds, promoted = scan.census(egress)
        keys = {
            "rate": lambda e: sum(b - a for a, b in zip(before.get(e[:2], (e[2], e[3])), e[2:4], strict=True)),
            "bytes": lambda e: e[2] + e[3], "age": lambda e: -e[4], "idle": lambda e: -e[5], "rtt": lambda e: e[6],
            "retransmits": lambda e: e[7]}
        entries.sort(key=keys[sort], reverse=True)
        shown: list[FlowRate] = []
        for e in entries:
            if len(shown) == most:
                break
            flow = scan.flow(e[8])
            if wanted is None or wanted(flow):
                was = before.get(e[:2])
                life = max(1e-3, (now - flow.created_ns) / 1e9)
                shown.append(flow_rate(flow, self.stages, now, was if seconds else (0, 0), seconds if seconds else life))
        self._bytes = {e[:2]: (e[2], e[3]) for e in entries}
        self._bytes_ns = now
        named = {f"{PROTOCOLS.get(p, p)} {FlowState(s).name.lower()}": count for (p, s), count in sorted(kinds.items())}
        return shown, named, promoted, n

    # -- all

    def look(self, *, flows: int = 20, sort: str = "rate") -> Look:
        began = time.monotonic_ns()
        now = self.view.read()
        then = self._last
        seconds = (now.at_ns - (then.at_ns if then else self.started_ns)) / 1e9 or 1e-3
        top, kinds, promoted, n = self.flows(most=flows, sort=sort)
        stages = [self._stage(now, then, row, seconds) for row in range(len(self.stages))]
        rings = []
        for name, ring in now.rings.items():
            moved = ring.tail - (then.rings[name].tail if then else 0)
            rings.append(RingRate(name=name, fill=ring.fill, slots=ring.slots, high=ring.high,
                                  frames_s=round(moved / seconds, 1),
                                  waits="producer waits for room" if ring.starved else
                                  "consumer sleeps" if ring.asleep else ""))
        self._last = now
        return Look(time=time.time(), session=self.session, uptime_s=round((now.at_ns - self.started_ns) / 1e9, 3),
                    interval_s=round(seconds, 3), stages=stages, rings=rings, flows=n, flows_max=self.view.flows_max,
                    kinds=kinds, promoted=promoted, top=top, took_ms=round((time.monotonic_ns() - began) / 1e6, 2))

    def _stage(self, now: Snapshot, then: Snapshot | None, row: int, seconds: float) -> StageRate:
        s = now.stages[row]
        c, before = s.counters, then.stages[row].counters if then else {}

        def rate(name: str) -> float:
            return round((c.get(name, 0) - before.get(name, 0)) / seconds, 1)

        pid, at = s.cell.pid, time.monotonic_ns()
        used = cpu_ticks(pid)
        was, was_at = self._cpu.get(pid, (0.0, self.started_ns))
        self._cpu[pid] = used, at
        turns = c["turns"] - before.get("turns", 0) - (c["sleeps"] - before.get("sleeps", 0))
        drops = {n.removeprefix("drop_"): v for n, v in c.items() if v and n.startswith("drop_")}
        decl = TOPOLOGY.stage(s.name)
        return StageRate(
            name=s.name, pid=pid, state=State(s.cell.state).name.lower(), restarts=max(0, s.cell.generation - 1),
            frames_in_s=rate("frames_in"), bits_in_s=8 * rate("bytes_in"), frames_out_s=rate("frames_out"),
            bits_out_s=8 * rate("bytes_out"), wakes_s=rate("wakes_sent"), sleeps_s=rate("sleeps"),
            batch=round((c["frames_in"] - before.get("frames_in", 0)) / max(1, turns), 1),
            stalls_room_s=rate("stalls_room"), stalls_buf_s=rate("stalls_buf"),
            small_used=c["now_small_used"], small_total=decl.small, large_used=c["now_large_used"],
            large_total=decl.large, cpu=round(max(0.0, used - was) / max(1e-3, (at - was_at) / 1e9), 3),
            memory_kib=own_memory_kib(pid), drops=drops,
            drops_s={n: r for n in drops if (r := rate(f"drop_{n}")) > 0})
