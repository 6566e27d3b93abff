"""struct rn_link for the stages that have the guest's link (csrc/rn_link.h)."""
from __future__ import annotations

from typing import Any

from shm._dataplane import ffi, lib

KINDS = {"tap": lib.RN_LINK_TAP, "dgram": lib.RN_LINK_DGRAM, "stream": lib.RN_LINK_STREAM}


def link(fd: int, *, kind: str, vnet: bool, frame_max: int, merge: bool = False, unfinished: int = 0, whole: bool = False,
         uso: bool = False) -> Any:
    """A pointer to one, for a stage to copy. fd: non-blocking, and still the caller's; -1: nobody is there. merge: what
    is read may be super-frames made of segments. unfinished: not 0, the MTU of a peer whose frames may lack the header they had;
    whole: it takes super-frames as they are; uso: second NIC: UDP super-frames may come. Raises KeyError for a kind there is not."""
    return ffi.new("struct rn_link *", {"fd": fd, "kind": KINDS[kind], "vnet": int(vnet), "frame_max": frame_max,
                                       "merge": int(merge), "unfinished": unfinished, "whole": int(whole), "uso": int(uso)})
