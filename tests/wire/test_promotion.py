"""Promoted flows (csrc/rn_promote.h): handed over when settled, handed back for all that is not simple, no byte lost.

Raw frames over a link whose writes are whole frames, through the whole pipeline, with promotion after two segments. Who
has which half is read from the flow table.
"""
from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.messages import CloseFlow
from tests.harness import DEADLINE, GATEWAY, GUEST, UDP, Wire, fresh_port, udp, udp_server
from tests.wire.guest_tcp import ACK, FIN, GUEST_MAC, M32, PSH, RST, SYN, URG, GuestTcp, ethernet, ipv4
from tests.wire.test_control import answer, flow_of
from tests.wire.test_tcp import connection, read_exactly, sack_option

pytestmark = pytest.mark.parametrize("wire", [{"promote": 2}], indirect=True)

THERE = ("guest_tx", "guest_rx")
STAGES = ("guest_tx", "guest_rx", "egress")


def owners(wire: Wire, port: int) -> tuple[str, str]:
    """Names of the stages that have up and down."""
    flow = flow_of(wire, port)
    assert flow is not None, "the flow is gone"
    names = [s.name for s in wire.session.topology.stages]
    return names[flow.up_owner], names[flow.down_owner]


def settle(wire: Wire, g: GuestTcp, host: socket.socket) -> None:
    """Exchange single bytes until the flow is promoted (again: it waits longer each time it was taken back)."""
    end = time.monotonic() + DEADLINE
    while True:
        g.push(b"s")
        assert read_exactly(host, 1) == b"s"
        g.wait_ack()
        if owners(wire, g.sport) == THERE:
            g.fence()  # the word is written before the notice that says so: now that has come as well
            return
        assert time.monotonic() < end, f"not promoted: {owners(wire, g.sport)}"


def edge_of(wire: Wire, g: GuestTcp) -> int:
    """Of the window that the guest was told of, or of 64 KiB of it."""
    flow = flow_of(wire, g.sport)
    assert flow is not None
    return (g.snd_nxt + min((flow.rcv_adv - g.snd_nxt) & M32, 65535)) & M32


@contextlib.contextmanager
def promoted(wire: Wire, **guest) -> Iterator[tuple[GuestTcp, socket.socket]]:
    with connection(wire, **guest) as (g, host):
        settle(wire, g, host)
        yield g, host


def both_ways(g: GuestTcp, host: socket.socket, n: int = 5000) -> None:
    """n bytes each way arrive as they were sent."""
    rnd = random.Random(n)
    up, down = rnd.randbytes(n), rnd.randbytes(n)
    for k in range(0, n, 1000):
        g.push(up[k:k + 1000])
    assert read_exactly(host, n) == up
    g.wait_ack()
    host.sendall(down)
    assert g.pull(n) == down


def gone(wire: Wire, port: int) -> None:
    end = time.monotonic() + DEADLINE
    while flow_of(wire, port) is not None:
        assert time.monotonic() < end, "the flow is still there"
        time.sleep(0.01)  # another process's memory: there is no event


def descriptors(wire: Wire) -> dict[str, int]:
    return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in wire.session.stages().items() if name in STAGES}


def until(wire: Wire, want: dict[str, int]) -> None:
    """The stages have so many descriptors: an owner word is there before the notice is read, and a flow gone before it."""
    end = time.monotonic() + DEADLINE
    while (now := descriptors(wire)) != want:
        assert time.monotonic() < end, f"{now}, not {want}"
        time.sleep(0.01)  # another process's descriptors: there is no event


def test_a_flow_is_promoted_when_it_is_settled_and_not_before(wire: Wire) -> None:
    with connection(wire) as (g, host):
        assert owners(wire, g.sport) == ("egress", "egress")
        settle(wire, g, host)
        before = wire.counters("egress")
        both_ways(g, host, 20000)
        both_ways(g, host)
        after = wire.counters("egress")
        assert owners(wire, g.sport) == THERE
        assert after["frames_in"] == before["frames_in"], "frames of a promoted flow went through egress"


def test_never_with_promote_0(wire: Wire, make_wire: Callable[..., Wire]) -> None:
    other = make_wire(promote=0)
    with connection(other) as (g, host):
        for _ in range(4):
            both_ways(g, host)
        assert owners(other, g.sport) == ("egress", "egress")


@pytest.mark.parametrize("first", ["guest", "host", "both"])
def test_fin(wire: Wire, first: str) -> None:
    """I5: after all data, each direction by itself."""
    with promoted(wire) as (g, host):
        if first == "host":
            host.sendall(b"last")
            host.shutdown(socket.SHUT_WR)
            assert g.pull(4) == b"last"
            seg = g.expect(FIN | ACK)
            assert seg.end == (g.rcv_nxt + 1) & M32
            g.rcv_nxt = seg.end
            g.send(ACK)
            g.push(b"still", FIN)
            assert read_exactly(host, 5) == b"still" and host.recv(1) == b""
        else:
            g.push(b"last")
            if first == "both":
                host.shutdown(socket.SHUT_WR)
            g.push(b"", FIN)
            assert read_exactly(host, 4) == b"last" and host.recv(1) == b""
            if first == "guest":
                host.sendall(b"still")
                assert g.pull(5) == b"still"
                host.shutdown(socket.SHUT_WR)
            seg = g.recv()
            while seg and not seg.flags & FIN:
                seg = g.recv()
            assert seg is not None and seg.end == (g.rcv_nxt + 1) & M32
            g.rcv_nxt = seg.end
            g.send(ACK)
        assert wire.session.poll(0)


def test_a_reset_of_the_guest_is_one_to_the_server(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        g.send(RST, seq=g.snd_nxt)
        with pytest.raises(ConnectionResetError):
            host.recv(1)
        gone(wire, g.sport)


@pytest.mark.parametrize("in_flight", [0, 3000])
def test_a_reset_of_the_server_is_one_to_the_guest_at_the_right_number(wire: Wire, in_flight: int) -> None:
    with promoted(wire) as (g, host):
        host.sendall(bytes(in_flight))
        got = 0
        while got < in_flight:
            seg = g.recv()
            assert seg is not None
            got += len(seg.data)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        host.close()
        seg = g.recv()
        while seg and not seg.flags & RST:
            seg = g.recv()
        assert seg is not None and seg.seq == (g.rcv_nxt + in_flight) & M32
        gone(wire, g.sport)


def test_closed_by_the_control_api(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        flow = flow_of(wire, g.sport)
        assert answer(wire, CloseFlow(index=flow.index, gen=flow.gen)) == ""
        assert g.expect(RST | ACK).seq == g.rcv_nxt
        with pytest.raises(ConnectionResetError):
            host.recv(1)
        assert flow_of(wire, g.sport) is None


def test_early_segments_wait_and_old_ones_are_acknowledged(wire: Wire) -> None:
    """Taken back to egress, which parks them; and promoted again."""
    with promoted(wire) as (g, host):
        start = g.snd_nxt
        g.send(ACK | PSH, b"BBB", seq=start + 3)
        g.wait_ack(start)
        assert owners(wire, g.sport)[0] == "egress"
        g.send(ACK | PSH, b"CCC", seq=start + 6)
        g.send(ACK | PSH, b"AAA", seq=start)
        assert read_exactly(host, 9) == b"AAABBBCCC"
        g.snd_nxt = start + 9
        g.wait_ack()
        for _ in range(2):
            g.send(ACK | PSH, b"BBB", seq=start + 3)
            assert g.wait_ack().ack == start + 9
        settle(wire, g, host)
        both_ways(g, host)


def test_any_order_any_repetition(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        rnd, data, start = random.Random(5), random.Random(6).randbytes(40000), g.snd_nxt
        pieces = [(at, min(at + 700, len(data))) for at in range(0, len(data), 700)]
        jumbled = [p for p in pieces for _ in range(rnd.choice((1, 1, 2)))]
        for k in range(0, len(jumbled), 5):
            part = jumbled[k:k + 5]
            rnd.shuffle(part)
            jumbled[k:k + 5] = part
        for a, b in jumbled:
            g.send(ACK | PSH, data[a:b], seq=start + a)
        assert read_exactly(host, len(data)) == data
        g.snd_nxt = (start + len(data)) & M32
        g.wait_ack()


def lose_one(g: GuestTcp, host: socket.socket, n: int) -> tuple[bytes, int, list]:
    """(sent, what the guest expects, the segments that came): n segments, of which the guest lost the first."""
    data = random.Random(n).randbytes(n * 1460)
    host.sendall(data)
    segs, got = [], 0
    while got < len(data):
        seg = g.recv()
        assert seg is not None
        segs.append(seg)
        got += len(seg.data)
    return data, g.rcv_nxt, segs


def test_duplicate_acks_make_a_fast_retransmission(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        data, una, segs = lose_one(g, host, 6)
        before = wire.counters()["tcp_fast_retransmit"]
        for _ in segs[1:]:
            g.send(ACK)
        seg = g.recv()
        while seg and (seg.seq != una or not seg.data):
            seg = g.recv()
        assert seg is not None
        g.rcv_nxt = (una + len(data)) & M32
        g.send(ACK)
        settle(wire, g, host)
        both_ways(g, host)
        assert wire.counters()["tcp_fast_retransmit"] == before + 1


def test_a_lost_segment_without_any_answer_is_sent_again_after_the_timeout(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        data, una, _ = lose_one(g, host, 1)
        seg = g.recv()
        assert seg is not None and (seg.seq, seg.data) == (una, data), "nothing was sent again"
        g.rcv_nxt = seg.end
        g.send(ACK)
        settle(wire, g, host)
        both_ways(g, host)


def test_selective_acknowledgement(wire: Wire) -> None:
    """Only the hole is sent again."""
    with promoted(wire, sack=True) as (g, host):
        data, una, segs = lose_one(g, host, 6)
        for s in segs[1:]:
            g.send(ACK, opts=sack_option((segs[1].seq, s.end)))
        seg = g.recv()
        while seg and not seg.data:
            seg = g.recv()
        assert seg is not None and seg.seq == una
        g.rcv_nxt = (una + len(data)) & M32
        g.send(ACK)
        assert not [s for s in g.fence() if s.data]
        settle(wire, g, host)
        both_ways(g, host)


def test_a_closed_window_is_probed_and_opens(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        g.send(ACK, wnd=0)
        g.fence()  # read before the host sends
        host.sendall(b"x" * 3000)
        assert not [s for s in g.fence() if s.data], "data into a closed window"
        g.send(ACK)
        assert g.pull(3000) == b"x" * 3000
        g.send(ACK, wnd=0)
        g.fence()  # read before the host sends
        host.sendall(b"y" * 3000)
        probe = g.recv()
        while probe and probe.seq != (g.rcv_nxt - 1) & M32:
            assert not probe.data
            probe = g.recv()
        assert probe is not None, "the closed window is not probed"
        g.send(ACK)
        assert g.pull(3000) == b"y" * 3000
        settle(wire, g, host)


def test_a_window_of_a_few_bytes(wire: Wire) -> None:
    """RFC 9293 3.8.6.2.1 lets a sender wait, but not beyond what is offered, and not for ever."""
    with promoted(wire, wscale=0) as (g, host):
        g.wnd = 1
        g.send(ACK)
        g.fence()
        host.sendall(b"abcde")
        got, end = b"", time.monotonic() + DEADLINE
        while len(got) < 2:
            assert time.monotonic() < end
            seg = g.recv(1)
            if seg and seg.data:
                assert len(seg.data) == 1 and seg.seq == g.rcv_nxt
                got += seg.data
                g.rcv_nxt = seg.end
            if seg:
                g.send(ACK)
        g.wnd = 65535
        g.send(ACK)
        assert got + g.pull(3) == b"abcde"


def test_a_keepalive_probe_is_answered(wire: Wire) -> None:
    """RFC 9293 3.8.4: a byte before what is expected."""
    with promoted(wire, sack=True) as (g, host):
        g.send(ACK, seq=g.snd_nxt - 1)
        answer = g.wait_ack()
        assert answer.data == b"" and answer.sack == ()
        assert owners(wire, g.sport) == THERE
        both_ways(g, host)


@pytest.mark.parametrize("sack", [False, True])
def test_what_is_sent_again_is_answered_and_not_taken_twice(wire: Wire, sack: bool) -> None:
    """RFC 9293 3.10.7.4. Its acknowledgement counts if it is news. Who agreed to SACK is told what it was (RFC 2883 4.1), once."""
    with promoted(wire, sack=sack) as (g, host):
        before = wire.counters("guest_tx")["tcp_duplicate_segments"]
        g.push(b"once")
        assert read_exactly(host, 4) == b"once"
        g.wait_ack()
        host.sendall(b"answer")
        seg = g.expect(ACK)
        assert seg.data == b"answer"
        g.rcv_nxt = seg.end
        g.send(ACK | PSH, b"once", seq=g.snd_nxt - 4)  # acknowledges the answer too
        answer = g.wait_ack()
        assert not answer.data and answer.sack == (((g.snd_nxt - 4 & M32, g.snd_nxt),) if sack else ())
        assert owners(wire, g.sport) == THERE
        assert not g.fence(), "the answer was not acknowledged: it came again"
        g.push(b"more")
        assert read_exactly(host, 4) == b"more" and g.wait_ack().sack == ()
        both_ways(g, host)
        assert wire.counters("guest_tx")["tcp_duplicate_segments"] > before


def test_a_new_syn_on_the_pair_is_challenged(wire: Wire) -> None:
    """RFC 5961 4.2."""
    with promoted(wire) as (g, host):
        g.send(SYN, seq=g.snd_nxt + 100000, opts=g.syn_options())
        seg = g.recv()
        assert seg is not None and (seg.flags & (SYN | RST | ACK), seg.ack) == (ACK, g.snd_nxt)
        both_ways(g, host)


def test_urgent_data_is_data_in_line(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        g.push(b"before")
        g.send(ACK | PSH | URG, b"now")
        g.snd_nxt += 3
        assert read_exactly(host, 9) == b"beforenow"
        g.wait_ack()
        host.send(b"!", socket.MSG_OOB)
        host.sendall(b"after")
        assert g.pull(5)[-5:] == b"after"
        both_ways(g, host)


def test_a_bad_checksum_is_not_taken(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        before = wire.counters("classify")["drop_l4_checksum"]
        g.send(ACK | PSH, b"wrong", corrupt=True)
        g.push(b"right")
        assert read_exactly(host, 5) == b"right"
        g.fence()  # "right" did not go by classify, which may be behind
        assert wire.counters("classify")["drop_l4_checksum"] == before + 1


def test_what_lies_past_the_window_is_not_taken(wire: Wire) -> None:
    with promoted(wire) as (g, host):
        flow = flow_of(wire, g.sport)
        g.send(ACK | PSH, b"far", seq=flow.rcv_adv + 10)
        assert g.wait_ack().data == b""
        g.send(ACK | PSH, b"near", ack=g.rcv_nxt + 99999)  # acknowledges what was never sent (RFC 5961 5)
        g.wait_ack()
        both_ways(g, host)


def fill(wire: Wire, g: GuestTcp, most: int = 1 << 30) -> int:
    """Send until the window is closed, and stays so for half a second, or so many bytes: how many."""
    sent, edge = 0, edge_of(wire, g)
    while sent < most:
        n = min(1400, (edge - g.snd_nxt) & M32)
        if n:
            g.push(b"f" * n)
            sent += n
        seg = g.recv(0.0 if n else 0.5)
        if seg is None and not n:
            return sent
        if seg is not None and (new := (seg.ack + (seg.wnd << g.peer_wscale) - edge) & M32) < 1 << 31:
            edge = (edge + new) & M32
    return sent


def test_a_closed_window_opens_also_if_egress_has_the_flow_by_then(wire: Wire) -> None:
    """A segment outside the window gives the half to egress, so that guest_tx hears of room in vain."""
    with promoted(wire, mss=1400) as (g, host):
        sent = fill(wire, g)
        g.send(ACK | PSH, b"outside", seq=g.snd_nxt + 1_000_000)
        g.fence()
        assert read_exactly(host, sent) == b"f" * sent
        end = time.monotonic() + DEADLINE
        while (flow := flow_of(wire, g.sport)) is not None and (flow.rcv_adv - g.snd_nxt) & M32 < 2000:
            assert time.monotonic() < end, "the window did not open again"
            time.sleep(0.01)  # another process's memory: there is no event
        both_ways(g, host)


def test_a_slow_reader_loses_nothing_and_costs_nothing(wire: Wire) -> None:
    """I1, I3. The window closes, and no stage turns round meanwhile: where the send buffer has some room, but not much, a
    stage that waits for more must not be told of that little again and again (ARCBOX fault 16)."""
    with promoted(wire, mss=1400) as (g, host):
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        rnd, sent, edge = random.Random(7), bytearray(), edge_of(wire, g)
        busy = 0.0
        while True:
            room = (edge - g.snd_nxt) & M32
            if room >= 1400:
                data = rnd.randbytes(1400)
                sent += data
                g.push(data)
                if len(sent) % (1400 * 64) == 0:  # now and then nothing comes from either side
                    busy = max(busy, idle_cpu(wire, "guest_tx", 0.05))
            seg = g.recv(0.0 if room >= 1400 else 0.5)
            if seg is None and room < 1400:
                break
            if seg is not None and (new := (seg.ack + (seg.wnd << g.peer_wscale) - edge) & M32) < 1 << 31:
                edge = (edge + new) & M32
            assert len(sent) < 32 << 20, "the window never closed although nobody reads"
        assert busy < 0.8, f"guest_tx was busy {busy:.0%} of a time when nothing came"
        assert read_exactly(host, len(sent)) == sent
        g.wait_ack()
        assert (g.peer_wscale and flow_of(wire, g.sport).rcv_adv - g.snd_nxt) & M32 > 65535, "the window did not open again"
        both_ways(g, host)


@contextlib.contextmanager
def stands_still(wire: Wire, stage: str) -> Iterator[None]:
    """What is sent to the stage meanwhile, it finds together."""
    pid = wire.session.stages()[stage]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_segments_that_came_together_go_in_one_call(wire: Wire) -> None:
    """Those of a flow, in their order, whatever came between them; a FIN does not overtake them."""
    rnd = random.Random(4)
    with promoted(wire) as (a, host_a), promoted(wire) as (b, host_b):
        wire.fence()
        before = wire.counters("guest_tx")
        sent_a, sent_b = ([rnd.randbytes(1400) for _ in range(6)] for _ in "ab")
        with stands_still(wire, "guest_tx"):
            for one, other in zip(sent_a, sent_b, strict=True):  # in turn, so that the link makes no super-frames of them
                a.push(one)
                b.push(other)
            a.push(b"", FIN)
        assert read_exactly(host_a, 6 * 1400) == b"".join(sent_a) and host_a.recv(1) == b""
        assert read_exactly(host_b, 6 * 1400) == b"".join(sent_b)
        a.wait_ack()  # of the FIN, by egress
        a.fence()
        after = wire.counters("guest_tx")
        assert after["tcp_fast_sends"] - before["tcp_fast_sends"] == 2
        assert after["tcp_fast_up_bytes"] - before["tcp_fast_up_bytes"] == 12 * 1400
        host_a.sendall(b"bye")
        assert a.pull(3) == b"bye"


def test_what_came_together_and_is_not_all_in_order_loses_nothing(wire: Wire) -> None:
    """One is missing, one came twice, one is past the window: what is in order is taken, the rest as by egress."""
    rnd = random.Random(5)
    parts = [rnd.randbytes(1100 + 50 * k) for k in range(6)]  # a longer one is not put behind a shorter one by the link
    at = [sum(map(len, parts[:k])) for k in range(7)]
    with promoted(wire) as (g, host):
        wire.fence()
        first = g.snd_nxt
        with stands_still(wire, "guest_tx"):
            for k in (0, 1, 1, 3, 4):
                g.send(ACK, parts[k], seq=first + at[k])
            g.send(ACK, b"z" * 1400, seq=first + (1 << 26))
        assert read_exactly(host, at[2]) == parts[0] + parts[1]
        g.wait_ack(first + at[2])
        g.send(ACK, parts[2], seq=first + at[2])
        assert read_exactly(host, at[5] - at[2]) == b"".join(parts[2:5])
        g.snd_nxt = (first + at[5]) & M32
        g.wait_ack()
        settle(wire, g, host)
        both_ways(g, host)


OTHER = bytes.fromhex("5254ab000009")


def test_the_guest_changes_its_mac_address(wire: Wire, make_wire: Callable[..., Wire]) -> None:
    """After two segments from the new one every frame goes there, whoever writes it, and the flow is promoted as before."""
    wire = make_wire(promote=2)  # whose last frames to that address come to no other test
    with promoted(wire) as (g, host):
        both_ways(g, host)
        g.mac = OTHER
        for _ in range(2):  # read one by one, or together: then the link makes one of them
            g.push(b"moved")
        assert read_exactly(host, 10) == b"movedmoved"
        g.wait_ack()
        g.fence()
        data = random.Random(1).randbytes(100_000)
        writer = threading.Thread(target=host.sendall, args=(data,))
        writer.start()
        got = b""
        while len(got) < len(data):
            seg = g.recv()
            assert seg is not None and seg.to == OTHER, "a frame to the address that is no more"
            if seg.seq == g.rcv_nxt:
                got += seg.data
                g.rcv_nxt = seg.end
            g.send(ACK)
        writer.join()
        assert got == data
        settle(wire, g, host)
        both_ways(g, host)
        before = wire.counters()["recalled_up"]
        both_ways(g, host)
        assert wire.counters()["recalled_up"] == before, "segments from the new address take the slow way"
        host.sendall(b"x")
        seg = g.recv()
        assert seg is not None and seg.to == OTHER


def test_a_damaged_source_address_now_and_then_diverts_nothing(wire: Wire) -> None:
    """Two in a row do. What guest_tx took in between counts, though egress did not see it."""
    with promoted(wire) as (g, host):
        for _ in range(3):
            settle(wire, g, host)
            g.mac = OTHER
            g.push(b"damaged")
            g.mac = GUEST_MAC
            assert read_exactly(host, 7) == b"damaged"
            g.wait_ack()
            host.sendall(b"still here")
            seg = g.recv()
            while seg is not None and not seg.data:
                seg = g.recv()
            assert seg is not None and seg.to == GUEST_MAC
            g.rcv_nxt = seg.end
            g.send(ACK)
            both_ways(g, host)


def idle_cpu(wire: Wire, stage: str, seconds: float) -> float:
    """Share of this time that a stage was on a processor."""
    path = f"/proc/{wire.session.stages()[stage]}/schedstat"

    def ran() -> int:
        with open(path) as f:
            return int(f.read().split()[0])

    before, start = ran(), time.monotonic_ns()
    time.sleep(seconds)
    return (ran() - before) / (time.monotonic_ns() - start)


def test_idle_promoted_flows_are_not_polled(wire: Wire) -> None:
    """ARCBOX fault 16: also those with a byte that the host has not read, and one that the guest has."""
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            g, host = stack.enter_context(promoted(wire))
            g.push(b"unread")
            g.wait_ack()
            host.sendall(b"read")
            assert g.pull(4) == b"read"
        g.fence()
        assert idle_cpu(wire, "guest_rx", 0.2) < 0.5  # the watch ends with what is in flight; a loop would be 1
        assert [idle_cpu(wire, s, 0.1) < 0.5 for s in STAGES] == [True] * 3


def test_flows_that_cannot_go_on_are_not_looked_at(wire: Wire) -> None:
    """Servers that do not read: with the buffer full, and with as little room in it as there may be for ever."""
    with contextlib.ExitStack() as stack:
        most = 1 << 30
        for k in range(9):
            g, host = stack.enter_context(promoted(wire, mss=1400))
            host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            sent = fill(wire, g, most * (100 - 4 * k) // 100)
            most = sent if k == 0 else most
        g.fence()
        time.sleep(0.05)  # ACKs that wait for an answer, 4 ms
        before = wire.counters("guest_tx")["turns"]
        time.sleep(0.4)
        assert wire.counters("guest_tx")["turns"] - before < 30, "a look each 4 ms would be 100"


def test_a_flow_with_a_closed_window_is_not_offered_again(wire: Wire) -> None:
    """RFC 9293 3.8.6.1: it is egress that probes, so that the time between two probes can grow."""
    with promoted(wire) as (g, host):
        g.send(ACK, wnd=0)
        g.fence()
        host.sendall(b"x" * 3000)
        offers = None
        for _ in range(4):
            seg = g.recv(DEADLINE)
            assert seg is not None and not seg.data and seg.seq == (g.rcv_nxt - 1) & M32
            offers = offers or wire.counters()["promoted_down"]
            g.send(ACK, wnd=0)
        assert wire.counters()["promoted_down"] == offers
        g.send(ACK)
        assert g.pull(3000) == b"x" * 3000
        settle(wire, g, host)


def test_a_busy_flow_starves_neither_another_nor_the_slow_path(wire: Wire) -> None:
    """ARCBOX faults 17 and 18: while one flow has megabytes to send and takes all the guest's link can carry, others'
    single bytes and what egress answers come between its frames, after no more of them than the stage's budget."""
    with promoted(wire, mss=1460) as (g, host), promoted(wire) as (h, small):
        stop = threading.Event()

        def bulk() -> None:
            while not stop.is_set():
                try:
                    host.sendall(bytes(1 << 20))
                except TimeoutError:
                    continue
                except OSError:
                    return

        host.settimeout(0.2)
        sender = threading.Thread(target=bulk)
        sender.start()
        try:
            frames, rounds = 0, 0
            waiting = False
            end = time.monotonic() + 30
            while rounds < 10:
                assert time.monotonic() < end, f"one byte of another flow did not come among {frames} frames"
                if not waiting:
                    small.sendall(b"1")
                    waiting = True
                frame = wire.recv_frame()
                assert frame is not None
                frames += 1
                if (seg := h._mine(frame)) is not None and seg.data:
                    h.rcv_nxt = (h.rcv_nxt + len(seg.data)) & M32
                    h.send(ACK)
                    rounds, waiting = rounds + 1, False
                    assert frames < 8000  # two budgets (fast_down.c), and what the socket pair holds
                    frames = 0
                elif (seg := g._mine(frame)) is not None and seg.data and seg.seq == g.rcv_nxt:
                    g.rcv_nxt = seg.end
                    g.send(ACK)
            for s in h.fence():  # two pings, through classify, in the same crowd
                assert not s.flags & RST
        finally:
            stop.set()
            host.shutdown(socket.SHUT_RDWR)
            sender.join()
        assert not sender.is_alive()


def test_acknowledged_whatever_the_host_does(wire: Wire) -> None:
    """RFC 9293 3.8.6.3: also what is not answered, and less than two full segments."""
    with promoted(wire) as (g, host):
        for _ in range(4):  # a guest whose questions are answered at once
            g.push(b"ask")
            read_exactly(host, 3)
            host.sendall(b"answer")
            assert g.pull(6) == b"answer"
        g.push(b"no answer")
        g.wait_ack()
        first = g.snd_nxt
        g.push(bytes(1460))
        g.push(bytes(1460))
        while (seg := g.recv()) is not None and seg.ack != g.snd_nxt:
            assert seg.ack in (first, first + 1460)
        assert seg is not None
        assert read_exactly(host, 9 + 2920)


def test_many_flows_come_and_go_and_leave_no_descriptor(wire: Wire, make_wire: Callable[..., Wire]) -> None:
    """In all three processes."""
    w = make_wire(promote=2)
    before = descriptors(w)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            flows = [stack.enter_context(promoted(w)) for _ in range(250)]
            until(w, {s: n + 250 for s, n in before.items()})
            for g, _ in flows:
                g.send(RST, seq=g.snd_nxt)
            for g, _ in flows:
                gone(w, g.sport)
        until(w, before)
    assert w.counters()["promoted_up"] == 500


def test_without_descriptors_the_flow_goes_on_where_it_is(wire: Wire, make_wire: Callable[..., Wire]) -> None:
    """The link's stages may have no descriptor left: that costs speed only."""
    w = make_wire(promote=2)
    for stage in ("guest_tx", "guest_rx"):
        pid = w.session.stages()[stage]
        used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
        n = next(k for k in range(1024) if k not in used)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (n, n))
    with connection(w) as (g, host):
        for _ in range(4):
            both_ways(g, host)
        assert w.counters("guest_tx")["promote_failed"] + w.counters("guest_rx")["promote_failed"] > 0
        g.push(b"", FIN)
        assert host.recv(1) == b""


# --- UDP


def with_df(sport: int, dport: int, data: bytes) -> bytes:
    return ethernet(ipv4(UDP, udp(GUEST, sport, GATEWAY, dport, data), GUEST, GATEWAY))


def udp_settle(wire: Wire, port: int, server: socket.socket, n: int = 4) -> tuple[str, int]:
    for _ in range(n):
        wire.send_udp(port, server.getsockname()[1], b"hello")
        data, address = server.recvfrom(100)
        assert data == b"hello"
    assert owners(wire, port) == THERE
    return address


def test_udp_both_ways_without_egress(wire: Wire) -> None:
    port = fresh_port()
    with udp_server() as server:
        address = udp_settle(wire, port, server)
        before = wire.counters()["frames_in"]
        for size in (0, 1, 1472):
            wire.send_udp(port, server.getsockname()[1], b"q" * size)
            assert server.recvfrom(3000) == (b"q" * size, address)
            server.sendto(b"a" * size, address)
            d = wire.recv_udp(port)
            assert (d.data, d.src, d.sport) == (b"a" * size, "10.0.2.1", server.getsockname()[1])
        for k in range(100):
            wire.send_udp(port, server.getsockname()[1], b"%d" % k * (1 + k % 3))
        assert [server.recv(3000) for _ in range(100)] == [b"%d" % k * (1 + k % 3) for k in range(100)]
        assert wire.counters()["frames_in"] == before
        assert flow_of(wire, port).up_packets >= 107


def test_udp_a_second_peer_through_the_same_socket(wire: Wire) -> None:
    """RFC 4787 REQ-1, and anybody may answer (REQ-8)."""
    port = fresh_port()
    with udp_server() as one, udp_server() as two:
        address = udp_settle(wire, port, one)
        wire.send_udp(port, two.getsockname()[1], b"other")
        assert two.recvfrom(10) == (b"other", address)
        two.sendto(b"hi", address)
        d = wire.recv_udp(port)
        assert (d.data, d.sport) == (b"hi", two.getsockname()[1])
        assert udp_settle(wire, port, two, 6) == address
        wire.send_udp(port, one.getsockname()[1], b"again")
        assert one.recvfrom(10) == (b"again", address)


def test_udp_a_reply_over_the_mtu_comes_in_fragments(wire: Wire) -> None:
    port = fresh_port()
    with udp_server() as server:
        address = udp_settle(wire, port, server)
        for size in (1473, 8000, 65507):
            data = random.Random(size).randbytes(size)
            server.sendto(data, address)
            d = wire.recv_udp(port)
            assert d.data == data and d.fragments > 1


def test_udp_fragments_of_the_guest(wire: Wire) -> None:
    port = fresh_port()
    with udp_server() as server:
        udp_settle(wire, port, server)
        data = random.Random(9).randbytes(9000)
        wire.send_udp(port, server.getsockname()[1], data)
        assert server.recv(10000) == data


def test_udp_a_port_that_was_closed_is_told(wire: Wire) -> None:
    """Promoted, then the server is gone: the error comes as ICMP, and the next server on the port is served."""
    port = fresh_port()
    with udp_server() as server:
        udp_settle(wire, port, server)
        there = server.getsockname()
    wire.send_udp(port, there[1], b"anybody?")
    assert wire.recv_error(lambda q: q.proto == UDP and q.sport == port).icmp == (3, 3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(there)
        server.settimeout(DEADLINE)
        wire.send_udp(port, there[1], b"me")
        assert server.recv(10) == b"me"


def test_udp_the_mapping_in_use_is_not_the_one_evicted(wire: Wire, make_wire: Callable[..., Wire]) -> None:
    """The order of use of promoted mappings is known by the flow table alone (last_ns)."""
    w = make_wire(promote=2, udp_max=3)
    before = descriptors(w)
    ports = [fresh_port() for _ in range(4)]
    with udp_server() as server:
        first = {p: udp_settle(w, p, server) for p in ports[:3]}
        assert udp_settle(w, ports[0], server, 1) == first[ports[0]]  # now ports[1] is the oldest
        w.send_udp(ports[3], server.getsockname()[1], b"x")
        server.recvfrom(10)
        for p in (ports[0], ports[2]):
            assert udp_settle(w, p, server, 1) == first[p], "a mapping in use was ended"
        assert flow_of(w, ports[1]) is None
        until(w, {"egress": before["egress"] + 3, "guest_tx": before["guest_tx"] + 2, "guest_rx": before["guest_rx"] + 2})


def test_udp_too_long_for_the_path_with_df(wire: Wire) -> None:
    """The host's loopback takes all there is; what it refuses is more than UDP has. DF itself changes nothing else."""
    port = fresh_port()
    with udp_server() as server:
        there = server.getsockname()[1]
        udp_settle(wire, port, server)
        wire.send(with_df(port, there, b"df"))
        assert server.recv(10) == b"df"
        wire.send_udp(port, there, b"plain")
        assert server.recv(10) == b"plain"


def test_udp_a_short_ttl_is_told_and_not_forwarded(wire: Wire) -> None:
    """To the gateway TTL does not matter: it is here. To others a promoted mapping leaves it to egress."""
    port = fresh_port()
    with udp_server() as server:
        udp_settle(wire, port, server)
        wire.send_udp(port, server.getsockname()[1], b"near", ttl=1)
        assert server.recv(10) == b"near"


def test_udp_bad_checksum_goes_nowhere(wire: Wire) -> None:
    port = fresh_port()
    with udp_server() as server:
        udp_settle(wire, port, server)
        there = server.getsockname()[1]
        frame = bytearray(with_df(port, there, b"bad"))
        frame[40] ^= 0x55
        wire.send(bytes(frame))
        wire.send_udp(port, there, b"good")
        assert server.recv(10) == b"good"
        server.setblocking(False)
        assert not select.select([server], [], [], 0)[0]
