"""The ways a virtual machine may be connected, and what `ringnet vm` takes besides a session's settings: one declaration for
the command line, the checks and the manual."""
from __future__ import annotations

from msgspec import Struct

from pipeline.config import ConfigError
from pipeline.units import LinkKind

VFKT_HELLO = b"VFKT"  # vfkit, krunkit: the first datagram


class VmType(Struct, frozen=True, kw_only=True):
    """A way virtual machines are connected."""

    name: str
    does: str
    kind: LinkKind | None  # None: by the descriptor
    hello: bytes = b""
    mtu: int = 4000  # told to the guest if the user says nothing


TYPES: dict[str, VmType] = {t.name: t for t in (
    VmType(name="qemu-stream", does="QEMU -netdev stream, passt, gvproxy: a stream with 4 bytes of length", kind="stream"),
    VmType(name="qemu-dgram", does="QEMU -netdev dgram: a datagram each frame", kind="dgram"),
    # Virtualization.framework's device has an MTU of 1500 unless the VMM asks for more.
    VmType(name="vfkit", does="vfkit, krunkit: datagrams, begun by VFKT", kind="dgram", hello=VFKT_HELLO, mtu=1500),
    VmType(name="fd", does="a connected socket or a tap that we inherit (--fd)", kind=None),
)}


class VmOptions(Struct, frozen=True, kw_only=True):
    """What `ringnet vm` takes besides Settings."""

    type: str
    socket: str = ""
    fd: int = -1
    nic2_fd: int = -1
    nic2_socket: str = ""
    one_off: bool = False
    vnet_hdr: bool = False
    offloading: bool = False  # frames come and go as libkrun's: super-frames, and some lost their virtio-net header
    unfinished: bool = False  # they may come so, and go as without
    ready_fd: int = -1
    exit_fd: int = -1


def check(o: VmOptions) -> None:
    """Raises ConfigError."""
    if o.type == "fd":
        if o.socket or o.fd < 0:
            raise ConfigError("--type fd: needs --fd N, and takes no --socket")
    elif bool(o.socket) == (o.fd >= 0):
        raise ConfigError(f"--type {o.type}: needs --socket or --fd, one of them")
    if o.offloading and o.vnet_hdr:
        raise ConfigError("--offloading: is for frames without a virtio-net header, and --vnet-hdr says that they have one; give"
                          " one of them")
