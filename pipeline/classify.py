"""classify: check each frame of the guest's and decide which stage must see it.

In:      frames of guest_tx, whatever the guest put in them.
Out:     TCP, UDP and ICMP to egress; DHCP, and DNS to the gateway, to services; ARP replies and ICMP errors to
         guest_rx. IPv4 fragments leave as whole datagrams. Every drop has a counter in csrc/rn_metrics.def.
Source:  EtherTypes: IANA IEEE 802 Numbers (RFC 9542); ARP: RFC 826, RFC 5227; IPv4: RFC 791, RFC 1122 3.2, RFC 815.
         The loop is csrc/stage_classify.c, the rules are csrc/rn_parse.c.
"""
from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from msgspec import Meta, Struct

from pipeline.stage import Ended, StageContext, StageError
from pipeline.units import Ipv4, Mac, Mtu
from shm._dataplane import ffi, lib


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="classify"):
    gateway4: Ipv4
    gateway_mac: Mac
    netmask: Annotated[int, Meta(ge=8, le=30)]  # prefix length
    subnet: str  # the guest's, like 10.0.2.0/24
    mtu: Mtu  # bytes of L3


def c_config(cfg: Config) -> Any:
    """struct classify_config *. Raises ValueError (ipaddress) for an address that is none."""
    subnet = ipaddress.IPv4Network(cfg.subnet)
    return ffi.new("struct classify_config *", {
        "gateway4": list(ipaddress.IPv4Address(cfg.gateway4).packed),
        "subnet4": list(subnet.network_address.packed),
        "prefix": subnet.prefixlen,
        "gateway_mac": list(bytes.fromhex(cfg.gateway_mac.replace(":", ""))),
        "mtu": cfg.mtu,
    })


def init(cfg: Config, ctx: StageContext) -> None:
    """Make ctx.stage this stage. Raises StageError."""
    if lib.stage_classify_init(ctx.stage, c_config(cfg)) < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode() or "classify: out of memory")


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Move frames until told to stop. Raises StageError for a gateway outside the subnet, or if a neighbour's
    ring index is impossible; never for a bad frame."""
    init(cfg, ctx)
    return ctx.run_loop()
