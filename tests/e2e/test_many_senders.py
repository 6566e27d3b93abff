"""Many connections of the guest's kernel that send as much as they may: their windows are opened in turn (csrc/fast_turns.c)."""
from __future__ import annotations

import hashlib
import selectors
import socket
import threading
from collections.abc import Callable

import pytest
from netlab import DEADLINE, SERVER, Attached, Netns

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

FLOWS = 64
SIZE = 4 << 20  # bytes of each
BLOCK = 1 << 16


def data(flow: int) -> bytes:
    return hashlib.shake_256(b"flow %d" % flow).digest(BLOCK)


def receive(listener: socket.socket, got: dict[bytes, str]) -> None:
    """What each of FLOWS connections sent, by its first 8 bytes."""
    digests = {}
    with selectors.DefaultSelector() as sel:
        sel.register(listener, selectors.EVENT_READ)
        while len(got) < FLOWS:
            assert (ready := sel.select(DEADLINE)), f"nothing comes; {len(got)} have ended"
            for key, _ in ready:
                if key.fileobj is listener:
                    s, _ = listener.accept()
                    sel.register(s, selectors.EVENT_READ)
                    digests[s] = [b"", hashlib.sha256()]
                    continue
                s = key.fileobj
                if part := s.recv(1 << 18):
                    digests[s][0] = (digests[s][0] + part)[:8]
                    digests[s][1].update(part)
                else:
                    sel.unregister(s)
                    s.close()
                    got[digests[s][0]] = digests[s][1].hexdigest()


def send(sockets: list[socket.socket]) -> None:
    with selectors.DefaultSelector() as sel:
        left = {}
        for flow, s in enumerate(sockets):
            s.setblocking(False)
            left[s] = memoryview(data(flow) * (SIZE // BLOCK))
            sel.register(s, selectors.EVENT_WRITE)
        while left:
            assert (ready := sel.select(DEADLINE)), f"nobody may send; {len(left)} have not ended"
            for key, _ in ready:
                s = key.fileobj
                left[s] = left[s][s.send(left[s][:BLOCK]):]
                if not left[s]:
                    sel.unregister(s)
                    s.shutdown(socket.SHUT_WR)
                    del left[s]


@pytest.mark.parametrize("mtu", [1500, 65520])
@pytest.mark.parametrize("wire", ["good", "bad"])
def test_all_of_each_arrives(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                             wire: str, mtu: int) -> None:
    attach(*(["--impair", "up:drop=0.3%,dup=0.3%,reorder=0.3%", "--impair", "down:drop=0.3%"] if wire == "bad" else []), mtu=mtu)
    sockets: list[socket.socket] = []
    got: dict[bytes, str] = {}
    with host_ns.listen(SERVER) as listener:
        listener.listen(FLOWS)
        receiver = threading.Thread(target=receive, args=(listener, got), daemon=True)
        receiver.start()
        try:
            for _ in range(FLOWS):
                sockets.append(guest_ns.socket())
                sockets[-1].settimeout(DEADLINE)
                sockets[-1].connect(listener.getsockname())
            send(sockets)
            receiver.join(DEADLINE)
            assert not receiver.is_alive()
        finally:
            for s in sockets:
                s.close()
    assert got == {data(f)[:8]: hashlib.sha256(data(f) * (SIZE // BLOCK)).hexdigest() for f in range(FLOWS)}


@pytest.mark.parametrize("promote", [0, 8])
def test_a_segment_has_room_where_the_hosts_buffer_is_small(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                                            promote: int) -> None:
    """A host socket on a link of 1500 begins with a send buffer of 46 KiB, less than a segment of the guest's. A window of that would
    leave the guest to its persist timer (RFC 9293 3.8.6.1), 0.2 s each segment."""
    host_ns.ip("link", "set", "lo", "mtu", "1500")
    attach("--promote", str(promote), mtu=65520)
    sent, got = data(0) * 64, bytearray()
    with host_ns.listen(SERVER) as listener, guest_ns.socket() as guest:
        guest.settimeout(DEADLINE)
        guest.connect(listener.getsockname())
        host, _ = listener.accept()
        sender = threading.Thread(target=guest.sendall, args=(sent,), daemon=True)
        sender.start()
        with host:
            while len(got) < len(sent):
                assert (part := host.recv(1 << 18)), "the connection ended"
                got += part
        sender.join(DEADLINE)
        info = guest.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        limited_us = int.from_bytes(info[176:184], "little")  # tcpi_rwnd_limited
    assert got == sent
    assert limited_us < 32 * 200_000, "half of the segments waited for the persist timer"
