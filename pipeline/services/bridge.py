"""DHCP on the host side of the second NIC: this session's guest gets its address there, and nobody else does.

In:      broadcasts to port 67 on the bridge, by a UDP socket that the supervisor bound to it. Every session of a network
         has such a socket and gets every broadcast; each answers for its own guest, known by its MAC address.
Out:     replies, always by broadcast: the client has no address yet, and its frames are told apart by their xid.
         Without UDP checksums (RFC 768 allows 0), because one that the kernel leaves to the tap is not there yet when a
         client reads the packet by a packet socket.
Source:  RFC 2131, 2132; the engine is dhcp.py with a pool of one address.

A renewal is sent to the server by unicast, and reaches the socket made last: another session's may be the one that does
not know the client. Then the client asks again by broadcast before its lease ends (RFC 2131 4.4.5, REBINDING).
"""
from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address

from pipeline.messages import Nic2Dhcp
from pipeline.services.dhcp import CLIENT_PORT, DhcpConfig, DhcpServer
from pipeline.services.loop import READ, Loop

BATCH = 32  # datagrams at once, then the loop goes round
SO_NO_CHECK = 11  # linux: socket(7) does not name it
CHADDR = slice(28, 34)  # client's MAC address in a message (RFC 2131 2)
LEASE_S = 3600


class BridgeDhcp:
    """The server, while there is a second NIC whose addresses are ours to give."""

    def __init__(self, loop: Loop, count: Callable[[str], None]) -> None:
        self._loop, self._count = loop, count
        self._sock: socket.socket | None = None
        self._server: DhcpServer | None = None
        self._mac = b""

    def serve(self, ask: Nic2Dhcp, fds: list[int]) -> str:
        """Begin with the socket that came, instead of any other; without one, end. Returns "" or what is wrong."""
        self.close()
        if not fds:
            return ""
        self._sock = socket.socket(fileno=fds[0])
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        guest = ipaddress.IPv4Interface(ask.address)
        self._mac = bytes.fromhex(ask.mac.replace(":", ""))
        self._server = DhcpServer(
            DhcpConfig(server=IPv4Address(ask.gateway), network=guest.network, first=guest.ip, pool_start=guest.ip,
                       pool_end=guest.ip, mtu=ask.mtu, lease_s=LEASE_S, router=ask.router, resolver=False),
            clock=time.time, count=self._count)
        self._loop.watch(self._sock.fileno(), READ, self._read)
        return ""

    def _read(self, _events: int) -> None:
        assert self._sock is not None and self._server is not None
        for _ in range(BATCH):
            try:
                message, (source, _) = self._sock.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError:  # the bridge was removed (ENODEV): said once, nothing more comes
                return
            if message[CHADDR] != self._mac:
                continue
            for reply in self._server.handle(message, self._mac, IPv4Address(source)):
                try:
                    self._sock.sendto(reply.payload, ("255.255.255.255", CLIENT_PORT))
                except OSError:  # as above, or its queue is full: the client asks again
                    return

    def close(self) -> None:
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
        self._sock = self._server = None
