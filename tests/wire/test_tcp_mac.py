"""Where a connection's frames go: to the MAC address its segments come from, which no checksum covers."""
from __future__ import annotations

import socket
import struct

import pytest

from tests.harness import EgressOnly, ipv4
from tests.wire.guest_tcp import ACK, GATEWAY_MAC, GUEST_MAC, PSH, SYN, checksum, pseudo

DAMAGED = bytes([GUEST_MAC[0] ^ 0x40, *GUEST_MAC[1:]])  # one bit of it
OTHER = bytes.fromhex("5254ab000009")
GATEWAY, GUEST = "10.0.2.1", "10.0.2.2"


class Connection:
    """A guest's TCP in a few segments, each from any MAC address."""

    def __init__(self, egress: EgressOnly) -> None:
        self.egress = egress
        self.server = socket.create_server(("127.0.0.1", 0))
        self.seq, self.ack = 1000, 0

    def send(self, flags: int, mac: bytes = GUEST_MAC) -> None:
        port = self.server.getsockname()[1]
        seg = struct.pack("!HHIIBBHHH", 4000, port, self.seq, self.ack, 5 << 4, flags, 65535, 0, 0)
        seg = seg[:16] + struct.pack("!H", checksum(pseudo(GUEST, GATEWAY, 6, len(seg)) + seg)) + seg[18:]
        self.egress.send(GATEWAY_MAC + mac + b"\x08\x00" + ipv4(6, seg, GUEST, GATEWAY))

    def recv(self) -> bytes:
        """The next frame's destination; its end is acknowledged by the next send()."""
        frame = self.egress.recv_frame()
        assert frame is not None
        self.ack = int.from_bytes(frame[38:42], "big") + len(frame) - 54 - (frame[46] >> 4) * 4 + 20
        if frame[47] & SYN:
            self.ack += 1
        return frame[:6]

    def connect(self) -> socket.socket:
        self.send(SYN)
        assert self.recv() == GUEST_MAC
        self.seq += 1
        self.send(ACK)
        return self.server.accept()[0]


@pytest.fixture
def connection():
    with EgressOnly() as egress:
        c = Connection(egress)
        with c.server:
            yield c


def test_one_damaged_source_address_diverts_nothing(connection: Connection) -> None:
    """A guest that only receives has no other segment to put it right: all retransmissions would go astray."""
    with connection.connect() as host:
        host.send(b"one")
        assert connection.recv() == GUEST_MAC
        connection.send(ACK, DAMAGED)
        host.send(b"two")
        assert connection.recv() == GUEST_MAC


def test_a_guest_may_change_its_address(connection: Connection) -> None:
    with connection.connect() as host:
        for _ in range(2):
            connection.send(ACK | PSH, OTHER)
        host.send(b"one")
        assert connection.recv() == OTHER


def test_a_repeated_syn_is_answered_to_where_it_came_from(connection: Connection) -> None:
    """The first one's source was damaged, so the guest never saw the answer."""
    connection.send(SYN, DAMAGED)
    assert connection.recv() == DAMAGED
    connection.send(SYN)
    assert connection.recv() == GUEST_MAC
