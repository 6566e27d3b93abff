"""guest_tx: read the frames the guest sends.

In:      the guest's link (fds: link), Ethernet frames of at most `frame_max` B, each behind a 12 B virtio-net
         header if `vnet`, or perhaps robbed of it if `unfinished`; with `pcap` a copy of each goes to the capture file (fds: pcap, O_APPEND). Without a
         descriptor nobody is there yet; LinkChange brings one, another or none.
         With `nic2` a second link of the same kind (fds: link2).
Out:     the same frames to classify, those of the second link to vmnet; what belongs to promoted flows to their host
         sockets (fds: flows_tx). A full ring, or no free buffer, stops the reading: nothing is dropped here
         but what is no frame, by reason (csrc/rn_metrics.def).
Source:  virtio-net header: virtio 1.2 5.1.6. The loop is csrc/stage_guest_tx.c.
"""
from __future__ import annotations

import ipaddress

from msgspec import Struct

from pipeline.stage import Ended, GuestLink, SecondLink, StageContext, StageError
from pipeline.units import Ipv4, LinkKind, Mac, Mtu
from shm._dataplane import ffi, lib


class Nic2Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The second NIC's link; as above."""

    link_kind: LinkKind
    vnet: bool
    uso: bool  # UDP super-frames may come from it: the other side takes them
    frame_max: int
    unfinished: int = 0


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="guest_tx"):
    link_kind: LinkKind
    vnet: bool  # the link has virtio-net headers
    mtu: Mtu  # bytes of L3
    frame_max: int  # bytes of Ethernet frame, header included, either way
    pcap: bool  # fds has the capture file
    promote: bool  # promoted flows are run here; fds has flows_tx
    offload: bool  # the link completes checksums
    bypass: bool  # TCP segments go to egress without classify
    direct: bool  # ACKs of promoted flows are written to the link from here, if its writes are whole frames
    gateway4: Ipv4
    gateway_mac: Mac
    subnet: str  # the guest's, like 10.0.2.0/24
    unfinished: int = 0  # not 0: the peer's frames may lack the virtio-net header they had; its MTU
    nic2: Nic2Link | None = None  # the guest's second NIC (fds: link2)


def _promote(cfg: Config, ctx: StageContext) -> None:
    """Raises StageError."""
    if ctx.flows is None:
        raise StageError("the flow table was not granted")
    subnet = ipaddress.IPv4Network(cfg.subnet)
    c = ffi.new("struct fast_up_config *")
    c.parse.gateway4 = ipaddress.IPv4Address(cfg.gateway4).packed
    c.parse.subnet4, c.parse.prefix = subnet.network_address.packed, subnet.prefixlen
    c.parse.gateway_mac = bytes.fromhex(cfg.gateway_mac.replace(":", ""))
    c.parse.mtu = cfg.mtu
    c.offload, c.bypass, c.direct, c.flows_fd = cfg.offload, cfg.bypass, cfg.direct, ctx.fds["flows_tx"]
    if lib.stage_guest_tx_promote(ctx.stage, *ctx.flows, c) < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())


def init(cfg: Config, ctx: StageContext) -> GuestLink:
    """Make ctx.stage this stage; returns its link. Raises StageError."""
    link = GuestLink(ctx, lib.stage_guest_tx_link, lib.stage_guest_tx_broken, kind=cfg.link_kind, vnet=cfg.vnet,
                     frame_max=cfg.frame_max, merge=cfg.offload, unfinished=cfg.unfinished)
    if lib.stage_guest_tx_init(ctx.stage, link.now, ctx.fds["pcap"] if cfg.pcap else -1) < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())
    if cfg.nic2 is not None:
        SecondLink(ctx, lambda link2: lib.stage_guest_tx_nic2(ctx.stage, link2), kind=cfg.nic2.link_kind,
                   vnet=cfg.nic2.vnet, frame_max=cfg.nic2.frame_max, unfinished=cfg.nic2.unfinished, uso=cfg.nic2.uso)
    if cfg.promote:
        _promote(cfg, ctx)
    return link


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Move frames until told to stop. Raises StageError if the link cannot be watched, or a neighbour's ring
    index is impossible; never for a bad frame."""
    return ctx.run_loop(init(cfg, ctx).tell)
