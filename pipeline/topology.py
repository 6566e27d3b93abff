"""The one declaration of stages, rings, memory and descriptors of a session.

The supervisor starts from it, `ringnet` draws and watches from it, the tests check it, and the README's
drawing is rendered from it. Nothing repeats it. The C data plane gets rings by role and knows no stage names.

Row order is the stage's number in shared memory (stage table, buffer owners, doorbells) and is also data
order: sources first. Start-up walks it backwards (sinks first), cancellation walks it forwards.
"""
from __future__ import annotations

import enum
from typing import Literal

from msgspec import Struct


class Role(enum.IntEnum):
    """What a producer calls an output ring; values are enum rn_role in csrc/rn_stage.h (a test compares)."""

    CLASSIFY = 0
    BRIDGE = 1
    SERVICE = 2
    GUEST = 3
    HOSTNET = 4
    OFFER = 5


class Feature(enum.StrEnum):
    """Parts of the topology that a session may leave out."""

    NIC1 = "nic1"
    NIC2 = "nic2"


class Stage(Struct, frozen=True, kw_only=True):
    """One OS process."""

    name: str  # also the module in pipeline/ and the word in argv
    does: str  # one line, for drawings, `ps`-like tables and docs
    feature: Feature = Feature.NIC1
    small: int = 0  # 2 KiB frame buffers of its own; 0 with large 0: it only frees
    large: int = 0  # 68 KiB frame buffers of its own
    fds: tuple[str, ...] = ()  # what it may hold besides its rings, arena, session, doorbells, control
    flows: bool = False  # maps the flow table
    names: Literal["", "read", "write"] = ""  # maps the table of names (csrc/rn_names.h); one stage writes
    source: bool = False  # takes in work from outside: stopped first on cancel
    restart: bool = False  # what it knows is in shared memory or can be asked for again: a successor goes on


class Ring(Struct, frozen=True, kw_only=True):
    """One producer, one consumer; 16-byte descriptors."""

    producer: str
    consumer: str
    role: Role
    slots: int  # power of two, 2..32768
    notices: bool = False  # carries notices about flows against the order of data, and no frames (csrc/rn_promote.h)
    feature: Feature = Feature.NIC1

    @property
    def name(self) -> str:
        return f"{self.producer}->{self.consumer}"


class TopologyError(ValueError):
    """The declaration contradicts itself; the text names the ring and both ends."""


class Topology(Struct, frozen=True, kw_only=True):
    stages: tuple[Stage, ...]
    rings: tuple[Ring, ...]
    flows: int  # entries of the flow table

    def row(self, name: str) -> int:
        """Row of a stage in shared memory. Raises KeyError."""
        for i, stage in enumerate(self.stages):
            if stage.name == name:
                return i
        raise KeyError(name)

    def stage(self, name: str) -> Stage:
        return self.stages[self.row(name)]

    def inputs(self, name: str) -> tuple[Ring, ...]:
        return tuple(r for r in self.rings if r.consumer == name)

    def outputs(self, name: str) -> tuple[Ring, ...]:
        return tuple(r for r in self.rings if r.producer == name)

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Stages whose doorbell this one may ring: the other ends of its rings, and the owners of buffers
        that can reach it (it frees them, and an owner that waits for one must be woken)."""
        ends = {r.consumer for r in self.outputs(name)} | {r.producer for r in self.inputs(name)}
        todo = [r.producer for r in self.inputs(name) if not r.notices]
        seen: set[str] = set()
        while todo:
            up = todo.pop()
            if up in seen:
                continue
            seen.add(up)
            todo += [r.producer for r in self.inputs(up) if not r.notices]
        owners = {s for s in seen if self.stage(s).small or self.stage(s).large}
        return tuple(s.name for s in self.stages if s.name in (ends | owners) - {name})

    def only(self, features: frozenset[Feature]) -> Topology:
        """The part a session uses. Rows keep their numbers only among the stages left, so the caller
        builds all shared memory from the result, never from the whole."""
        names = {s.name for s in self.stages if s.feature in features}
        return Topology(
            stages=tuple(s for s in self.stages if s.name in names),
            rings=tuple(r for r in self.rings if r.feature in features and {r.producer, r.consumer} <= names),
            flows=self.flows,
        )

    def validate(self, *, max_stages: int = 8) -> Topology:
        """Check the declaration; returns itself. Raises TopologyError."""
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise TopologyError(f"a stage is declared twice: {names}")
        if len(names) > max_stages:
            raise TopologyError(f"{len(names)} stages, shared memory has rows for {max_stages}")
        pairs: set[tuple[str, str]] = set()
        roles: set[tuple[str, Role]] = set()
        for r in self.rings:
            for end in (r.producer, r.consumer):
                if end not in names:
                    raise TopologyError(f"ring {r.name}: no stage {end!r}")
            if r.producer == r.consumer:
                raise TopologyError(f"ring {r.name}: producer and consumer are the same stage")
            if r.slots & (r.slots - 1) or not 2 <= r.slots <= 32768:
                raise TopologyError(f"ring {r.name}: {r.slots} slots is not a power of two in 2..32768")
            if (r.producer, r.consumer) in pairs:
                raise TopologyError(f"ring {r.name}: declared twice; a ring has one producer and one consumer")
            if (r.producer, r.role) in roles:
                raise TopologyError(f"ring {r.name}: {r.producer} already has an output called {r.role.name}")
            pairs.add((r.producer, r.consumer))
            roles.add((r.producer, r.role))
        for s in self.stages:
            if not self.inputs(s.name) and not self.outputs(s.name):
                raise TopologyError(f"stage {s.name} has no ring")
        if len(writers := [s.name for s in self.stages if s.names == "write"]) > 1:
            raise TopologyError(f"the table of names has two writers: {', '.join(writers)}")
        if self.flows < 1:
            raise TopologyError("the flow table has no entries")
        return self


TOPOLOGY = Topology(
    stages=(
        Stage(name="guest_tx", does="reads the frames the guest sends", small=2048, large=128,
              fds=("link", "link2", "pcap", "flows_tx"), flows=True, source=True, restart=True),
        Stage(name="classify", does="checks, dispatches, answers ARP, reassembles fragments", small=256, large=32,
              restart=True),
        Stage(name="egress", does="TCP bridge, UDP and ICMP proxies over host sockets", small=2048, large=128,
              fds=("raw_icmp", "flows_to_tx", "flows_to_rx", "link_tap", "estate_put", "estate_take"), flows=True, names="read"),
        Stage(name="services", does="DHCP server, DNS forwarder, hosts table", small=128, large=16,
              fds=("dns_listen",), names="write", restart=True),
        Stage(name="guest_rx", does="writes frames to the guest", fds=("link", "link2", "pcap", "flows_rx"), flows=True,
              restart=True),
        Stage(name="vmnet", does="relays NIC2's frames to a host bridge", feature=Feature.NIC2, small=512, large=64,
              fds=("bridge",), source=True),
    ),
    rings=(
        Ring(producer="guest_tx", consumer="classify", role=Role.CLASSIFY, slots=1024),
        Ring(producer="classify", consumer="egress", role=Role.BRIDGE, slots=1024),
        Ring(producer="classify", consumer="services", role=Role.SERVICE, slots=128),
        Ring(producer="classify", consumer="guest_rx", role=Role.GUEST, slots=256),
        Ring(producer="egress", consumer="guest_rx", role=Role.GUEST, slots=1024),
        Ring(producer="services", consumer="guest_rx", role=Role.GUEST, slots=128),
        Ring(producer="guest_tx", consumer="egress", role=Role.BRIDGE, slots=1024),
        Ring(producer="egress", consumer="guest_tx", role=Role.OFFER, slots=512, notices=True),
        Ring(producer="guest_tx", consumer="guest_rx", role=Role.GUEST, slots=512),
        Ring(producer="guest_rx", consumer="egress", role=Role.BRIDGE, slots=512, notices=True),
        Ring(producer="guest_tx", consumer="vmnet", role=Role.HOSTNET, slots=1024, feature=Feature.NIC2),
        Ring(producer="vmnet", consumer="guest_rx", role=Role.GUEST, slots=1024, feature=Feature.NIC2),
    ),
    flows=16384,
).validate()
