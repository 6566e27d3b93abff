"""egress: the guest's TCP, UDP and ICMP over the host's own sockets.

In:      frames that classify checked, with what it learned in the buffer's header (csrc/rn_arena.h, struct rn_meta).
Out:     frames for the guest; every drop has a counter in csrc/rn_metrics.def.
Bounds:  one host socket a flow, at most as many flows as the flow table has and RLIMIT_NOFILE allows.
Source:  TCP RFC 9293, UDP RFC 768 and RFC 4787 (NAT behaviour), ICMP RFC 792, RFC 1812 and RFC 5508.
"""
from __future__ import annotations

import ipaddress
import os
import resource
from typing import Annotated, Literal

from msgspec import Meta, Struct

from pipeline.config import Ipv4, Mac, Mtu
from pipeline.stage import Ended, StageContext, StageError
from shm._dataplane import ffi, lib

DNS_PATH_MAX = 106  # bytes of an abstract Unix address (unix(7): 108 less the leading NUL), one spare for C's NUL
PEEK = {"auto": -1, "discard": 0, "offset": 1}  # struct egress_config.peek_offset
NFILE_MAX = 1 << 20  # an unlimited RLIMIT_NOFILE is no number to count with


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="egress"):
    gateway4: Ipv4
    gateway_mac: Mac
    mtu: Mtu
    offload: bool  # the link has virtio-net headers: partial checksums and super-frames allowed
    host_loopback: bool  # the gateway's address reaches the host's 127.0.0.1
    peek: Literal["auto", "offset", "discard"] = "auto"  # SO_PEEK_OFF, or peek past a discard buffer
    udp_max: Annotated[int, Meta(ge=1, le=65536)]  # UDP mappings; then the least recently used goes
    pending_max: Annotated[int, Meta(ge=1, le=65536)]  # TCP connects under way; then RST
    dns_path: str = ""  # abstract Unix address of services' DNS over TCP, without the leading NUL; "": none
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0  # not 0: ISNs and ids are repeatable


def _c_config(cfg: Config, raw_icmp: int) -> object:
    """struct egress_config *. Raises StageError if dns_path is too long."""
    path = cfg.dns_path.encode()
    if len(path) > DNS_PATH_MAX:
        raise StageError(f"dns_path: {len(path)} bytes, at most {DNS_PATH_MAX}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    c = ffi.new("struct egress_config *")
    c.gateway4 = ipaddress.IPv4Address(cfg.gateway4).packed
    c.gateway_mac = bytes.fromhex(cfg.gateway_mac.replace(":", ""))
    c.mtu = cfg.mtu
    c.offload = cfg.offload
    c.host_loopback = cfg.host_loopback
    c.peek_offset = PEEK[cfg.peek]
    c.raw_icmp_fd = raw_icmp
    c.nfile = NFILE_MAX if soft == resource.RLIM_INFINITY else min(soft, NFILE_MAX)
    c.udp_max = cfg.udp_max
    c.pending_max = cfg.pending_max
    c.dns_path = path
    c.seed = cfg.seed
    return c


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Move frames until told to stop. Raises StageError with the data plane's text; never for a bad frame."""
    if ctx.flows is None:
        raise StageError("the flow table was not granted")
    rc = lib.stage_egress_init(ctx.stage, *ctx.flows, _c_config(cfg, ctx.fds.get("raw_icmp", -1)))
    if rc < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode() or os.strerror(-rc))
    return ctx.run_loop()
