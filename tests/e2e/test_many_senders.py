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
