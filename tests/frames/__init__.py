"""Frames as data: bytes and verdict side by side, good ones and hostile ones (classify.toml).

A frame has a name, the counter it must end in, why, its bytes in hex, and mostly `made`: a scapy expression that
gives the same bytes (a test compares), so that a reader sees what is wrong in it. What a fuzzer finds is added with
its bytes alone. `python tests/frames` fills in the hex of frames that have only `made`.
"""
from __future__ import annotations

import tomllib
from pathlib import Path

from msgspec import Struct, convert

HERE = Path(__file__).resolve().parent
GATEWAY, GUEST, SUBNET, PREFIX = "10.0.2.1", "10.0.2.2", "10.0.2.0", 24
GATEWAY_MAC, GUEST_MAC = "02:ab:cd:00:00:01", "52:54:ab:01:02:03"
MTU = 4000  # bytes of L3


class Frame(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    verdict: str  # name of the counter in csrc/rn_metrics.def
    why: str
    made: str = ""  # Python, names of frames.recipes; "": only bytes
    vnet: str = ""  # 12 bytes of virtio-net header, hex; "": none
    hex: str = ""

    @property
    def data(self) -> bytes:
        return bytes.fromhex(self.hex)

    @property
    def vnet_data(self) -> bytes:
        return bytes.fromhex(self.vnet)


def load() -> tuple[Frame, ...]:
    """All frames. Raises msgspec.ValidationError naming the key, or ValueError for a name used twice."""
    frames = convert(tomllib.loads((HERE / "classify.toml").read_text())["frame"], tuple[Frame, ...])
    names = [f.name for f in frames]
    if len(set(names)) != len(names):
        raise ValueError(f"a name is used twice: {sorted(n for n in names if names.count(n) > 1)}")
    return frames


def corpus() -> bytes:
    """The frames as the fuzzer reads them: u16 length (little-endian), 12 bytes of header, frame."""
    return b"".join(len(f.data).to_bytes(2, "little") + (f.vnet_data or bytes(12)) + f.data for f in load())
