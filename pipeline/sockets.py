"""Socket buffers for a guest's link, larger than the system's default lets anybody ask for."""
from __future__ import annotations

import socket

LINK_BUFFER = 8 << 20  # bytes each way; of datagrams 93 queue at the default, 7282 at this
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # socket(7); Python has no names for them


def widen(sock: socket.socket) -> None:
    """LINK_BUFFER both ways, as far as the kernel lets us. Raises OSError."""
    for force, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, LINK_BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, LINK_BUFFER)  # up to net.core.[rw]mem_max
