"""What a tap's kernel is asked to leave to us: checksums, and the cutting of super-frames (TUNSETOFFLOAD).

It is about what is read from the tap. What is written to it may have virtio-net headers of every kind that the kernel
knows, asked for or not. UDP super-frames are known from Linux 6.2 on, both ways, and only for both families at once.
"""
from __future__ import annotations

import errno
import fcntl

_TUNSETOFFLOAD = 0x400454D0  # linux/if_tun.h: _IOW('T', 208, unsigned int)
_CSUM, _TSO4, _TSO6, _USO4, _USO6 = 0x01, 0x02, 0x04, 0x20, 0x40  # TUN_F_*


def plain(tap: int) -> None:
    """Nothing: the kernel behind the tap cuts segments and completes checksums itself. Raises OSError."""
    fcntl.ioctl(tap, _TUNSETOFFLOAD, 0)


def ask(tap: int, *, udp: bool = True) -> bool:
    """TCP super-frames and, if udp, those of UDP too where this kernel has them. Returns whether it has. Raises OSError."""
    if udp:
        try:
            fcntl.ioctl(tap, _TUNSETOFFLOAD, _CSUM | _TSO4 | _TSO6 | _USO4 | _USO6)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        else:
            return True
    fcntl.ioctl(tap, _TUNSETOFFLOAD, _CSUM | _TSO4 | _TSO6)
    return False
