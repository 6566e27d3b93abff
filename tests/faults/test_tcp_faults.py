"""Faults of a TCP bridge that need more than one connection, or a link that is full (see faults.py).

The rest are rule files (tests/conformance/tcp) and tests marked where they are.
"""
from __future__ import annotations

import contextlib
import socket

import pytest

from tests.conformance.script import FLAGS, Script
from tests.harness import GUEST, GUEST2, EgressOnly, fill

ACK = FLAGS["ACK"]


@pytest.mark.fault(11)
@pytest.mark.parametrize("room", [{"ring": 4}, {"small": 8, "large": 2}], ids=["ring", "buffers"])
def test_nothing_sent_is_lost_inside_while_the_guest_is_slow(room: dict[str, int]) -> None:
    """I2: a full ring or an empty arena delays; no frame is counted as sent that did not go out."""
    with EgressOnly(**room) as guest, Script.on(guest) as c:
        guest.stop_clock()
        c.do("connected", "host writes 300000", "guest takes 300000", "guest sends ACK PSH seq=1 ack=300001 len=50",
             "guest awaits ACK ack=51", "host reads 50")
        assert guest.counters()["tcp_retransmit_frames"] == 0


@pytest.mark.fault(11, 21)
def test_answers_wait_for_room_as_well() -> None:
    """The SYN-ACKs of more connections than the ring has slots all come, in the first place, not by retransmission."""
    with EgressOnly(ring=2) as guest, contextlib.ExitStack() as stack:
        guest.stop_clock()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        connections = [stack.enter_context(Script.on(guest)) for _ in range(20)]
        for c in connections:
            c.port = server.getsockname()[1]
            c.do("guest sends SYN seq=0 mss=1460 wscale=7")
        for c in connections:
            c.do("guest gets SYN ACK seq=new ack=1")


@pytest.mark.fault(16, 41)
def test_idle_connections_cost_nothing() -> None:
    """With 100 of them open the process wakes for the timer wheel's turn (4 s) at most, as it would with one."""
    with EgressOnly() as guest, contextlib.ExitStack() as stack:
        guest.stop_clock()
        for _ in range(100):
            stack.enter_context(Script.on(guest)).do("connected")
        guest.advance(10)  # the handshakes' timers look once more, and go
        start = guest.stop_clock()
        wakes, turns, sent = 0, guest.counters()["turns"], guest.counters()["frames_out"]
        while (due := guest.due()) is not None and due < start + 600 * 10**9:
            guest.stop_clock(due)
            wakes += 1
        assert wakes <= 600 / 4 + 1
        assert guest.counters()["frames_out"] == sent and guest.counters()["turns"] - turns <= 2 * wakes


@pytest.mark.fault(17)
def test_a_busy_connection_leaves_room_for_the_others() -> None:
    """A stream that would fill the ring for ever; another connection's few bytes are not behind it."""
    with EgressOnly(ring=64) as guest, Script.on(guest) as busy, Script.on(guest) as quiet:
        guest.stop_clock()
        busy.do("connected wscale=14")
        quiet.do("connected")
        busy.transmit(1, 1, ACK, win=65535)
        busy.do("host writes 150000")  # over twice the ring
        guest.settle()
        quiet.do("host writes 10")
        guest.settle()
        order = []
        while (frame := guest.recv_frame(0)) is not None:
            order.append(int.from_bytes(frame[36:38], "big"))
        first = order.index(quiet.sport)
        assert order.count(busy.sport) > 64, "the busy connection did not fill the ring"
        assert first <= 64 + 8, f"{first} frames of the other connection came first"


@pytest.mark.fault(17)
def test_a_busy_connection_does_not_hold_up_answers_to_pings() -> None:
    """What egress answers itself goes out in turn as well."""
    with EgressOnly(ring=64) as guest, Script.on(guest) as busy:
        guest.stop_clock()
        busy.do("connected wscale=14")
        busy.transmit(1, 1, ACK, win=65535)
        busy.do("host writes 150000")
        guest.settle()
        guest.ping(77, 1)
        protocols = [guest.recv_frame(0)[23] for _ in range(64 + 8)]
        assert 1 in protocols


@pytest.mark.fault(20)
def test_a_connect_slower_than_a_minute_succeeds() -> None:
    """I4: the entry lives as long as the host's connect() does. The listener's queue is full until a minute passed."""
    with EgressOnly() as guest, Script.on(guest) as c, contextlib.ExitStack() as stack:
        guest.stop_clock()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        server.settimeout(60)
        waiting = [stack.enter_context(s) for s in fill(server)]
        c.port, c.server = server.getsockname()[1], server
        c.do("guest sends SYN seq=0 mss=1460 wscale=7", "guest gets nothing for=60",
             "guest sends SYN seq=0 mss=1460 wscale=7", "guest gets nothing")
        for s in waiting:  # room in the queue: the kernel's next try succeeds
            s.close()
        with contextlib.suppress(BlockingIOError):
            server.setblocking(False)
            while True:
                server.accept()[0].close()
        c.do("guest gets SYN ACK seq=new ack=1", "guest sends ACK seq=1 ack=1")
        assert guest.counters()["tcp_syn"] == 1


@pytest.mark.fault(31)
def test_the_guests_mac_may_change_in_a_connection() -> None:
    """Frames go to where the guest's last two segments came from: one may have been damaged, no checksum covers it."""
    with EgressOnly() as guest, Script.on(guest) as c:
        guest.stop_clock()
        c.do("connected", "host writes 10", "guest takes 10")
        c.mac = "52:54:ab:00:00:99"
        c.do("guest sends ACK PSH seq=1 ack=11 len=10", "guest gets ACK ack=11")
        guest.mac = c.mac  # from now on the harness wants this destination in each frame
        c.do("guest sends ACK PSH seq=11 ack=11 len=10", "guest gets ACK ack=21", "host writes 10", "guest takes 10")


@pytest.mark.fault(31)
def test_a_guest_with_another_lease_is_served() -> None:
    """Two addresses of the subnet, the same ports: two connections."""
    with EgressOnly() as guest, Script.on(guest) as a, Script.on(guest) as b:
        guest.stop_clock()
        assert a.source == GUEST
        b.source, b.sport = GUEST2, a.sport
        a.do("connected")
        b.server, b.port = a.server, a.port
        b.do("guest sends SYN seq=0 mss=1460 wscale=7", "guest gets SYN ACK seq=new ack=1",
             "guest sends ACK seq=1 ack=1", "host accepts")
        a.do("host writes 100")
        b.do("host writes 50", "guest takes 50")
        a.do("guest takes 100")


@pytest.mark.fault(32)
def test_the_hosts_loopback_can_be_closed() -> None:
    """Refused as if nobody listened; the server sees nothing."""
    with EgressOnly(host_loopback=False) as guest, Script.on(guest) as c:
        guest.stop_clock()
        c.do("host listens", "guest sends SYN seq=0 mss=1460 wscale=7", "guest gets RST ACK seq=0 ack=1")
        assert c.server is not None
        c.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            c.server.accept()


@pytest.mark.fault(42)
def test_connections_are_listed_with_their_state() -> None:
    """The flow table tells ports, sequence numbers and bytes of a connection, and forgets it when it ends."""
    with EgressOnly() as guest, Script.on(guest) as c:
        guest.stop_clock()
        c.do("connected", "guest sends ACK PSH seq=1 ack=1 len=70", "guest gets ACK ack=71",
             "host writes 30", "guest takes 30")
        guest.settle()
        flow, = guest.flows()
        assert (flow.proto, flow.guest_port, flow.peer_port) == (6, c.sport, c.port)
        assert (flow.up_bytes, flow.down_bytes) == (70, 30)
        c.do("guest sends RST seq=71")
        assert guest.flows() == []
