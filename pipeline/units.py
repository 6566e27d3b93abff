"""Small types that settings, messages and the stages' configurations share: numbers with bounds, addresses as text, and what
a stage is told of a rule or of a bad wire. Nothing else of ours is imported here: each stage is a process, and pays for its imports.
"""
from __future__ import annotations

import zlib
from typing import Annotated, Literal

from msgspec import Meta, Struct

MTU_MIN, MTU_MAX = 576, 65520  # RFC 791 3.2: every host takes 576; 65520: largest the peers of a tap use
LinkKind = Literal["tap", "dgram", "stream"]  # csrc/rn_link.h
Mtu = Annotated[int, Meta(ge=MTU_MIN, le=MTU_MAX)]  # bytes of L3
Mac = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$")]
Ipv4 = Annotated[str, Meta(pattern=r"^[0-9]{1,3}(\.[0-9]{1,3}){3}$")]
Port = Annotated[int, Meta(ge=0, le=65535)]


class Impair(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One --impair, parsed: a bad wire in one place (csrc/rn_impair.h). Probabilities in 2^-32, times in ns."""

    place: str  # "up", "down" or a ring's name
    stage: str  # that has it,
    output: int  # at which of its outputs: enum rn_role; LINK_OUTPUT: between it and the link
    keep_offloads: bool = False  # super-frames pass as one frame, instead of never being made
    seed: int = 1
    drop: int = 0
    burst_enter: int = 0
    burst_leave: int = 0
    dup: int = 0
    reorder: int = 0
    reorder_gap: int = 3  # frames that overtake
    corrupt: int = 0
    corrupt_bits: int = 1  # more may cancel out in a 16-bit checksum
    truncate: int = 0
    delay_ns: int = 0
    jitter_ns: int = 0
    stall_ns: int = 0
    stall_every_ns: int = 0

    def spec(self) -> dict[str, int]:
        """Fields of struct rn_impair_spec. Places with one seed do different things."""
        numbers = {n: getattr(self, n) for n in self.__struct_fields__}
        for name in ("place", "stage", "output", "keep_offloads"):
            del numbers[name]
        return numbers | {"seed": self.seed ^ zlib.crc32(self.place.encode()) << 32}


class PolicyEntry(Struct, frozen=True, array_like=True):
    """One network and one range of ports of a rule, as egress is told (struct policy_rule, csrc/policy.h). Small: all of them
    fit one message."""

    name: Annotated[int, Meta(ge=0, lt=1 << 31)]  # the rule's, in refusals
    deny: bool
    ways: Annotated[int, Meta(ge=1, le=3)]  # bits: WAYS
    protos: Annotated[int, Meta(ge=1, le=7)]  # bits: PROTOS
    net: Annotated[bytes, Meta(min_length=16, max_length=16)]
    prefix: Annotated[int, Meta(ge=0, le=128)]
    port_min: Port
    port_max: Port
