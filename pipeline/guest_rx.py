"""guest_rx: write frames to the guest.

In:      frames of classify, egress, services and guest_tx, each in turn; a virtio-net header in front of each. Then
         what the host sockets of promoted flows have (fds: flows_rx). With `nic2` vmnet's frames too, for the second
         link (fds: link2).
Out:     the guest's link (fds: link). A link that is full for now makes the frames wait in their rings; with
         `pcap` a copy of each frame written goes to the capture file (fds: pcap, O_APPEND). Without a descriptor
         nobody is there, and frames are dropped and counted; LinkChange brings one, another or none.
Source:  virtio-net header: virtio 1.2 5.1.6. The loop is csrc/stage_guest_rx.c.
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
    frame_max: int
    whole: bool = False
    producer: int  # stage row of vmnet, whose frames it takes


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="guest_rx"):
    link_kind: LinkKind
    vnet: bool  # the link takes virtio-net headers
    mtu: Mtu  # bytes of L3
    frame_max: int  # bytes of Ethernet frame, header included; super-frames may be longer
    pcap: bool  # fds has the capture file
    promote: bool  # promoted flows are run here; fds has flows_rx
    offload: bool  # the link completes checksums and cuts super-frames
    gateway4: Ipv4
    gateway_mac: Mac
    whole: bool = False  # no header, but super-frames of TCP are taken as they are
    uso: bool = False  # the link cuts UDP super-frames
    nic2: Nic2Link | None = None  # the guest's second NIC (fds: link2)


def _promote(cfg: Config, ctx: StageContext) -> None:
    """Raises StageError."""
    if ctx.flows is None:
        raise StageError("the flow table was not granted")
    c = ffi.new("struct fast_down_config *", {
        "gateway4": list(ipaddress.IPv4Address(cfg.gateway4).packed), "gateway_mac": list(bytes.fromhex(cfg.gateway_mac.replace(":", ""))), "mtu": cfg.mtu,
        "offload": cfg.offload, "uso": cfg.offload and cfg.uso, "flows_fd": ctx.fds["flows_rx"]})
    if lib.stage_guest_rx_promote(ctx.stage, *ctx.flows, c) < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())


def init(cfg: Config, ctx: StageContext) -> GuestLink:
    """Make ctx.stage this stage; returns its link. Raises StageError."""
    link = GuestLink(ctx, lib.stage_guest_rx_link, lib.stage_guest_rx_broken, kind=cfg.link_kind, vnet=cfg.vnet,
                     frame_max=cfg.frame_max, whole=cfg.whole)
    if lib.stage_guest_rx_init(ctx.stage, link.now, ctx.fds["pcap"] if cfg.pcap else -1) < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())
    if cfg.nic2 is not None:
        producer = cfg.nic2.producer
        SecondLink(ctx, lambda link2: lib.stage_guest_rx_nic2(ctx.stage, link2, producer), kind=cfg.nic2.link_kind,
                   vnet=cfg.nic2.vnet, frame_max=cfg.nic2.frame_max, whole=cfg.nic2.whole)
    if cfg.promote:
        _promote(cfg, ctx)
    return link


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Move frames until told to stop. Raises StageError if the link cannot be watched, or a neighbour's ring
    index is impossible; never for a frame the link does not take."""
    return ctx.run_loop(init(cfg, ctx).tell)
