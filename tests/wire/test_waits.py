"""What a flow is said to wait for (pipeline/look.py), on flows that do wait."""
from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

from pipeline.look import waits_for
from tests.harness import Wire, fill
from tests.wire.guest_tcp import ACK, M32, PSH, SYN, GuestTcp

PATIENCE = 60.0


@contextlib.contextmanager
def connection(wire: Wire, **guest: int) -> Iterator[tuple[GuestTcp, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        g = GuestTcp(wire.sock, server.getsockname()[1], **guest)
        g.connect()
        host, _ = server.accept()
        with host:
            yield g, host


def said(wire: Wire, g: GuestTcp, what: str) -> str:
    """What is said of the guest's connection, once it begins so: the stage says it within a turn."""
    memory, end = wire.session.memory, time.monotonic() + PATIENCE
    assert memory is not None
    text = "no such flow"
    while time.monotonic() < end:
        for f in memory.flows:
            if (f.guest_port, f.peer_port) == (g.sport, g.port):
                text = waits_for(f, time.monotonic_ns())
                if text.startswith(what):
                    return text
    raise AssertionError(f"wanted {what!r}, it says {text!r}")


def test_a_closed_guest_window(wire: Wire) -> None:
    with connection(wire, wnd=3000, wscale=None) as (g, host):
        host.sendall(bytes(20_000))
        got = 0
        while got < 3000:
            seg = g.recv()
            assert seg is not None
            got += len(seg.data)
        assert "B in flight fill its window" in said(wire, g, "guest's ACK ")
        g.rcv_nxt += got
        g.send(ACK, wnd=0)
        first = said(wire, g, "guest window closed ")
        g.fence()  # time passes, nothing else
        assert said(wire, g, "guest window closed ").endswith((" ms", " s")) and first.endswith((" ms", " s"))
        g.wnd = 60_000
        g.send(ACK)
        g.pull(20_000 - got)
        said(wire, g, "")
        assert "window" not in said(wire, g, "")


def test_a_host_that_does_not_read(wire: Wire) -> None:
    with connection(wire) as (g, host):
        memory, una, at, end = wire.session.memory, g.snd_nxt, g.snd_nxt, time.monotonic() + PATIENCE
        assert memory is not None
        while not any(f.up_wait and f.guest_port == g.sport for f in memory.flows):
            assert time.monotonic() < end, "all of it was taken"
            while (seg := g.recv(0)) is not None:
                una = seg.ack
            if (at - una) & M32 > 1 << 17:  # it does not look at the window: what was past it is sent again
                at = una
            g.send(ACK | PSH, bytes(1400), seq=at)
            at = (at + 1400) & M32
        assert said(wire, g, "host buffer full ").endswith("B parked)")
        while "host" in said(wire, g, ""):  # what was sent past the window was not taken, so bytes are not counted here
            assert time.monotonic() < end, "its buffer stays full"
            if select.select([host], [], [], 0.01)[0]:  # no event tells what is said, so it is asked again
                assert host.recv(1 << 20)


def test_a_connect_under_way(wire: Wire) -> None:
    """The host's accept queue is full: its kernel drops our SYN and we wait with it."""
    with socket.socket() as server, contextlib.ExitStack() as fillers:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for s in fill(server):
            fillers.enter_context(s)
        g = GuestTcp(wire.sock, server.getsockname()[1])
        g.send(SYN, opts=g.syn_options())
        assert said(wire, g, "connecting ").endswith(f" to 10.0.2.1:{g.port}")
