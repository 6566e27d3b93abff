"""vmnet: relay the second NIC's frames between the guest and a network of the host.

In:      whole Ethernet frames of the guest's second NIC, from guest_tx; and those of the host side (fds: bridge): a
         tap on a bridge, or a socket to a helper that has the network. At most `frame_max` B, or 64 KiB super-frames
         where both sides have virtio-net headers.
Out:     the same frames, unchanged, to the other side; a side that is full makes frames wait. Broadcast and multicast
         pass up to `storm` frames a second each way (csrc/rn_metrics.def: drop_storm_up, drop_storm_down).
Source:  virtio-net header: virtio 1.2 5.1.6; group bit: IEEE 802.3 3.2.3. The loop is csrc/stage_vmnet.c.
"""
from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from pipeline.stage import Ended, StageContext, StageError
from shm._dataplane import ffi, lib

KINDS = {"tap": lib.RN_LINK_TAP, "dgram": lib.RN_LINK_DGRAM, "stream": lib.RN_LINK_STREAM}


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vmnet"):
    link_kind: Literal["tap", "dgram", "stream"]  # of the host side
    vnet: bool  # it has virtio-net headers
    uso: bool  # UDP super-frames may come from it: the guest's side takes them
    frame_max: int  # bytes of Ethernet frame, header included; super-frames may be longer
    storm: Annotated[int, Meta(ge=0, le=1_000_000_000)]  # frames a second; 0: no limit


def init(cfg: Config, ctx: StageContext) -> None:
    """Make ctx.stage this stage. Raises StageError."""
    if "bridge" not in ctx.fds:  # its seat was released while it had none
        raise StageError("the second NIC is down; ringnet ctl start nic2 brings it up")
    link = ffi.new("struct rn_link *", {"fd": ctx.fds["bridge"], "kind": KINDS[cfg.link_kind], "vnet": int(cfg.vnet),
                                        "uso": int(cfg.uso), "frame_max": cfg.frame_max})
    if lib.stage_vmnet_init(ctx.stage, link, cfg.storm) < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Move frames until told to stop. Raises StageError if the host side is gone, or a neighbour's ring index is
    impossible; never for a frame."""
    init(cfg, ctx)
    return ctx.run_loop()
