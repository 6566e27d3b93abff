"""TCP bridge rules, one test a rule, spoken by a scripted guest over raw frames (RFC sections in each docstring).

The servers are real kernel sockets on loopback, reached through the gateway address. Where a test must show that
nothing more comes, it uses GuestTcp.fence(), not a waiting time.
"""
from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import closed_tcp_port, fill
from tests.wire.guest_tcp import ACK, FIN, M32, PSH, RST, SYN, GuestTcp


@contextlib.contextmanager
def listener(backlog: int = 16):
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as s:
        s.settimeout(60)
        yield s


@contextlib.contextmanager
def connection(wire, data: bytes = b"", **guest):
    """(guest's end, host's accepted socket), handshake done."""
    with listener() as srv:
        g = GuestTcp(wire.sock, srv.getsockname()[1], **guest)
        g.connect(data)
        host, _ = srv.accept()
        host.settimeout(60)
        with host:
            yield g, host


def read_exactly(s: socket.socket, n: int) -> bytes:
    out = bytearray()
    while len(out) < n:
        part = s.recv(min(1 << 16, n - len(out)))
        assert part, f"end after {len(out)} of {n} bytes"
        out += part
    return bytes(out)


def test_syn_ack_offers_mss_of_the_mtu_and_our_window_scale(wire):
    """RFC 9293 3.7.1, RFC 7323 2.2."""
    with listener() as srv:
        g = GuestTcp(wire.sock, srv.getsockname()[1])
        sa = g.connect()
        assert sa.mss == wire.mtu - 40
        assert sa.wscale == 7


def test_no_window_scale_unless_the_guest_offers_it(wire):
    """RFC 7323 2.2: a SYN-ACK carries the option only if the SYN did."""
    with listener() as srv:
        g = GuestTcp(wire.sock, srv.getsockname()[1], wscale=None)
        assert g.connect().wscale is None


def test_refused_connect_is_a_reset_at_once(wire):
    """I4; RFC 9293 3.10.7.1: seq 0, ack behind the SYN."""
    g = GuestTcp(wire.sock, closed_tcp_port(), isn=4242)
    g.send(SYN, opts=g.syn_options())
    rst = g.expect(RST | ACK)
    assert (rst.seq, rst.ack) == (0, 4243)


def test_syn_is_not_answered_before_the_host_side_connected(wire):
    """I4: a listener whose backlog is full leaves connect() pending; the guest must not be told otherwise."""
    with listener(backlog=0) as srv:
        full = fill(srv)
        g = GuestTcp(wire.sock, srv.getsockname()[1])
        g.send(SYN, opts=g.syn_options())
        g.send(SYN, opts=g.syn_options())  # resent by an impatient guest
        assert g.fence() == []
        for s in full:
            s.close()


@pytest.mark.fault(24)
def test_isn_follows_rfc6528_not_a_counter(wire):
    """RFC 6528 3: initial sequence numbers of different connections have no common step."""
    with listener() as srv:
        isns = [GuestTcp(wire.sock, srv.getsockname()[1]).connect().seq for _ in range(8)]
    steps = {(b - a) & M32 for a, b in zip(isns, isns[1:], strict=False)}
    assert len(steps) == len(isns) - 1
    assert max(steps) > 1 << 24  # a clock alone would step by little


def test_data_in_the_final_ack_of_the_handshake_is_delivered(wire):
    """RFC 9293 3.10.7.4 (SYN-RECEIVED, then on): ARCBOX fault 22."""
    with connection(wire, b"hello at once") as (g, host):
        assert read_exactly(host, 13) == b"hello at once"
        g.wait_ack()


def test_data_and_fin_in_the_final_ack(wire):
    """RFC 9293 3.10.7.4: text and FIN of one segment."""
    with listener() as srv:
        g = GuestTcp(wire.sock, srv.getsockname()[1])
        g.send(SYN, opts=g.syn_options())
        sa = g.expect(SYN | ACK)
        g.snd_nxt, g.rcv_nxt = sa.ack, (sa.seq + 1) & M32
        g.push(b"all of it", FIN)
        host, _ = srv.accept()
        with host:
            host.settimeout(60)
            assert read_exactly(host, 9) == b"all of it"
            assert host.recv(1) == b""
            g.wait_ack()


def test_out_of_order_segments_are_kept_and_acknowledged_as_rfc5681_says(wire):
    """RFC 5681 4.2: a hole is answered with a duplicate ACK; the segment that fills it with an ACK of all."""
    with connection(wire) as (g, host):
        start = g.snd_nxt
        g.send(ACK | PSH, b"cccc", seq=start + 8)
        assert g.expect(ACK).ack == start
        g.send(ACK | PSH, b"bbbb", seq=start + 4)
        assert g.expect(ACK).ack == start
        g.send(ACK | PSH, b"aaaa", seq=start)
        assert g.expect(ACK).ack == (start + 12) & M32
        assert read_exactly(host, 12) == b"aaaabbbbcccc"


def test_overlapping_segments_deliver_each_byte_once(wire):
    """RFC 9293 3.10.7.4: the old part of a segment is trimmed. ARCBOX faults 2 and 3."""
    with connection(wire) as (g, host):
        start = g.snd_nxt
        g.send(ACK, b"abcdef", seq=start)
        g.send(ACK, b"abcdefghi", seq=start)
        g.send(ACK, b"fghijkl", seq=start + 5)
        g.wait_ack(start + 12)
        assert read_exactly(host, 12) == b"abcdefghijkl"
        host.setblocking(False)
        with pytest.raises(BlockingIOError):
            host.recv(1)


def test_a_bad_checksum_is_dropped_and_not_acknowledged(wire):
    """RFC 9293 3.1."""
    with connection(wire) as (g, host):
        g.send(ACK | PSH, b"corrupt", corrupt=True)
        assert g.fence() == []
        g.push(b"correct")
        g.wait_ack()
        assert read_exactly(host, 7) == b"correct"


def test_guest_reset_reaches_the_server_as_a_reset(wire):
    """I5, ARCBOX fault 7: a cut upload must not look whole."""
    with connection(wire, b"part") as (g, host):
        assert read_exactly(host, 4) == b"part"
        g.wait_ack()
        g.send(RST, seq=g.snd_nxt)
        with pytest.raises(ConnectionResetError):
            host.recv(1)


def test_reset_in_the_window_but_not_exact_gets_a_challenge_ack(wire):
    """RFC 5961 3.2."""
    with connection(wire) as (g, host):
        g.send(RST, seq=g.snd_nxt + 100)
        assert g.expect(ACK).ack == g.snd_nxt
        g.push(b"still here")
        assert read_exactly(host, 10) == b"still here"


def test_reset_outside_the_window_is_ignored(wire):
    """RFC 9293 3.10.7.4."""
    with connection(wire) as (g, host):
        g.send(RST, seq=g.snd_nxt - 1)
        g.send(RST, seq=g.snd_nxt + (1 << 30))
        assert g.fence() == []
        g.push(b"still here")
        assert read_exactly(host, 10) == b"still here"


def test_syn_in_an_established_connection_gets_a_challenge_ack(wire):
    """RFC 5961 4.2."""
    with connection(wire) as (g, host):
        g.send(SYN, seq=g.snd_nxt + 5, opts=g.syn_options())
        ack = g.expect(ACK)
        assert ack.ack == g.snd_nxt
        g.push(b"x")
        assert read_exactly(host, 1) == b"x"


def test_repeated_syn_ack_path_repeated_syn_gets_the_syn_ack_again(wire):
    """RFC 9293 3.10.7.4 SYN-RECEIVED; ARCBOX fault 8."""
    with listener() as srv:
        g = GuestTcp(wire.sock, srv.getsockname()[1])
        g.send(SYN, opts=g.syn_options())
        first = g.expect(SYN | ACK)
        g.send(SYN, opts=g.syn_options())
        again = g.expect(SYN | ACK)
        assert (first.seq, first.ack) == (again.seq, again.ack)


def test_unacceptable_ack_in_syn_received_is_reset(wire):
    """RFC 9293 3.10.7.4 SYN-RECEIVED: RST with the seq of the bad ACK."""
    with listener() as srv:
        g = GuestTcp(wire.sock, srv.getsockname()[1])
        g.send(SYN, opts=g.syn_options())
        sa = g.expect(SYN | ACK)
        g.send(ACK, seq=sa.ack, ack=sa.seq + 77)
        rst = g.expect(RST)
        assert rst.seq == (sa.seq + 77) & M32


def test_segment_of_no_connection_is_reset(wire):
    """RFC 9293 3.10.7.1; ARCBOX fault 21."""
    g = GuestTcp(wire.sock, 9)
    g.send(ACK | PSH, b"lost", seq=500, ack=900)
    assert g.expect(RST).seq == 900
    g.send(FIN, seq=500)
    rst = g.expect(RST | ACK)
    assert (rst.seq, rst.ack) == (0, 501)


def test_reset_of_no_connection_is_ignored(wire):
    """RFC 9293 3.10.7.1: no RST answers an RST."""
    g = GuestTcp(wire.sock, 9)
    g.send(RST, seq=500)
    g.send(RST | ACK, seq=500, ack=1)
    assert g.fence() == []


def test_keepalive_probe_is_answered(wire):
    """RFC 9293 3.8.4: seq one below, with and without a garbage byte; ARCBOX fault 8."""
    with connection(wire) as (g, _):
        for data in (b"", b"\0"):
            g.send(ACK, data, seq=g.snd_nxt - 1)
            assert g.expect(ACK).ack == g.snd_nxt


def test_ack_of_data_never_sent_is_answered_and_ignored(wire):
    """RFC 9293 3.10.7.4, RFC 5961 5.2."""
    with connection(wire) as (g, host):
        g.send(ACK, ack=g.rcv_nxt + 1000)
        assert g.expect(ACK).seq == g.rcv_nxt
        host.sendall(b"real")
        assert g.pull(4) == b"real"


def test_segment_past_the_window_is_answered_with_an_ack(wire):
    """RFC 9293 3.10.7.4: not acceptable, so an ACK and nothing else."""
    with connection(wire) as (g, host):
        g.send(ACK | PSH, b"far away", seq=g.snd_nxt + (1 << 29))
        assert g.expect(ACK).ack == g.snd_nxt
        g.push(b"near")
        assert read_exactly(host, 4) == b"near"


def test_urgent_pointer_is_data_in_line(wire):
    """RFC 6093 4: urgent data stays in the stream."""
    with connection(wire) as (g, host):
        g.send(ACK | PSH | 32, b"urgent!")
        g.snd_nxt += 7
        g.wait_ack()
        assert read_exactly(host, 7) == b"urgent!"


def test_guest_window_is_honoured(wire):
    """I2, ARCBOX fault 9: never a byte beyond what the guest offered (scaled)."""
    with connection(wire, wnd=10, wscale=3) as (g, host):  # 80 bytes
        host.sendall(b"q" * 500)
        got = 0
        while got < 80:
            seg = g.recv()
            got += len(seg.data)
        assert got == 80
        assert g.fence() == []
        g.rcv_nxt += 80
        g.wnd = 2000
        g.send(ACK)
        assert g.pull(420) == b"q" * 420


def test_zero_window_is_probed_and_opens(wire):
    """RFC 9293 3.8.6.1."""
    with connection(wire, wnd=0) as (g, host):
        host.sendall(b"waiting")
        probe = g.recv()
        assert probe is not None and not probe.flags & RST
        assert ((probe.seq - g.rcv_nxt) & M32) in (M32, 0)
        g.send(ACK)  # still closed
        g.wnd = 1000
        g.send(ACK)
        assert g.pull(7) == b"waiting"


def test_guest_mss_is_honoured(wire):
    """RFC 9293 3.7.1, ARCBOX fault 13."""
    with connection(wire, mss=536) as (g, host):
        host.sendall(b"m" * 5000)
        got = 0
        while got < 5000:
            seg = g.recv()
            assert len(seg.data) <= 536
            got += len(seg.data)
            g.rcv_nxt = (g.rcv_nxt + len(seg.data)) & M32
            g.send(ACK)


def test_without_an_mss_option_536_is_assumed(wire):
    """RFC 9293 3.7.1."""
    with connection(wire, mss=None) as (g, host):
        host.sendall(b"m" * 2000)
        assert len(g.recv().data) <= 536


def test_lost_segment_is_sent_again_after_the_timeout(wire):
    """RFC 6298 5; ARCBOX fault 10."""
    with connection(wire) as (g, host):
        host.sendall(b"once more")
        first = g.recv()
        again = g.recv()
        assert again is not None and (again.seq, again.data) == (first.seq, first.data)
        assert g.pull(0) == b""
        g.rcv_nxt = (g.rcv_nxt + 9) & M32
        g.send(ACK)


@pytest.mark.fault(10)
def test_three_duplicate_acks_resend_one_segment(wire):
    """RFC 5681 3.2."""
    with connection(wire, mss=1000) as (g, host):
        host.sendall(b"".join(bytes([65 + k]) * 1000 for k in range(6)))
        segs = [g.recv() for _ in range(6)]
        assert all(segs)
        g.send(ACK)  # the last ACK again: these are duplicates, the first segment was "lost"
        g.send(ACK)
        g.send(ACK)
        again = g.expect(ACK)
        assert (again.seq, len(again.data)) == (segs[0].seq, 1000)
        assert wire.counters()["tcp_fast_retransmit"] >= 1
        g.rcv_nxt = segs[-1].end
        g.send(ACK)
        host.sendall(b"on")
        assert g.pull(2) == b"on"


def test_half_close_by_the_guest_leaves_the_other_direction_open(wire):
    """I5, RFC 9293 3.6; ARCBOX fault 6."""
    closed = wire.counters()["tcp_closed"]
    with connection(wire) as (g, host):
        g.push(b"request", FIN)
        assert read_exactly(host, 7) == b"request"
        assert host.recv(1) == b""
        g.wait_ack()
        reply = bytes(range(256)) * 100
        host.sendall(reply)
        assert g.pull(len(reply)) == reply
        host.close()
        g.expect(FIN | ACK)
        g.rcv_nxt = (g.rcv_nxt + 1) & M32
        g.send(ACK)
        g.fence()
        assert wire.counters()["tcp_closed"] == closed + 1


def test_half_close_by_the_host_leaves_the_other_direction_open(wire):
    """I5."""
    with connection(wire) as (g, host):
        host.shutdown(socket.SHUT_WR)
        fin = g.expect(FIN | ACK)
        g.rcv_nxt = (fin.seq + 1) & M32
        g.send(ACK)
        for k in range(5):
            g.push(b"still sending %d" % k)
        assert read_exactly(host, 5 * 15) == b"".join(b"still sending %d" % k for k in range(5))
        g.push(b"", FIN)
        assert host.recv(1) == b""
        g.wait_ack()


def test_simultaneous_close(wire):
    """RFC 9293 3.6, figure 13."""
    with connection(wire) as (g, host):
        host.shutdown(socket.SHUT_WR)
        fin = g.expect(FIN | ACK)
        g.push(b"", FIN)  # does not acknowledge ours yet
        assert g.wait_ack().flags & ACK
        g.rcv_nxt = (fin.seq + 1) & M32
        g.send(ACK)
        assert host.recv(1) == b""
        g.fence()
        assert wire.counters()["tcp_closed"] >= 1


def test_host_reset_is_a_reset_to_the_guest_at_the_right_number(wire):
    """I5, RFC 5961 3.2: at exactly what the guest expects; ARCBOX fault 14."""
    with connection(wire) as (g, host):
        host.sendall(b"abc")
        assert g.pull(3) == b"abc"
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        host.close()
        seg = g.recv()
        while seg and not seg.flags & RST:
            seg = g.recv()
        assert seg is not None and seg.seq == g.rcv_nxt


@pytest.mark.fault(1, 5)
def test_slow_reader_loses_nothing_and_closes_the_window(wire):
    """I1, I3; ARCBOX faults 1 and 5: the window closes, nothing beyond it is taken, all arrives."""
    with connection(wire, mss=1400) as (g, host):
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        rnd = random.Random(7)
        sent, edge, closed = hashlib.sha256(), g.edge, False
        total, una = 0, g.snd_nxt
        while total < 24 << 20 and not closed:
            room = (edge - g.snd_nxt) & M32
            if room >= 1400:
                data = rnd.randbytes(1400)
                sent.update(data)
                g.push(data)
                total += len(data)
                timeout = 0.0
            else:
                timeout = 2.0
            while (seg := g.recv(timeout)) is not None:
                timeout = 0.0
                una = seg.ack
                new = (seg.ack + (seg.wnd << g.peer_wscale)) & M32
                if (new - edge) & M32 < 1 << 31:
                    edge = new
            else:
                closed = timeout == 2.0
        assert closed, "the window never closed although nobody reads"
        got = hashlib.sha256(read_exactly(host, total))
        assert got.hexdigest() == sent.hexdigest()
        g.wait_ack() if una != g.snd_nxt else None
        assert wire.counters()["drop_tcp_park_full"] == 0


def test_sequence_numbers_wrap(wire):
    """RFC 9293 3.4."""
    with connection(wire, isn=M32 - 20) as (g, host):
        data = bytes(range(200))
        for k in range(0, 200, 10):
            g.push(data[k:k + 10])
        assert read_exactly(host, 200) == data
        g.wait_ack()


def test_new_syn_on_a_pair_in_time_wait_opens_a_new_connection(wire):
    """RFC 6191, RFC 9293 3.10.7.4; ARCBOX fault 23."""
    with listener() as srv:
        port = srv.getsockname()[1]
        g = GuestTcp(wire.sock, port)
        g.connect()
        host, _ = srv.accept()
        host.close()
        fin = g.expect(FIN | ACK)
        g.rcv_nxt = (fin.seq + 1) & M32
        g.push(b"", FIN)
        g.wait_ack()
        again = GuestTcp(wire.sock, port, sport=g.sport, isn=g.snd_nxt + 1000)
        again.connect(b"second life")
        host, _ = srv.accept()
        with host:
            host.settimeout(60)
            assert read_exactly(host, 11) == b"second life"


def test_established_pair_gets_a_new_connection_after_the_challenge(wire):
    """RFC 5961 4.2: a guest that lost its state resets by the challenge ACK's number, then connects."""
    with listener() as srv:
        port = srv.getsockname()[1]
        g = GuestTcp(wire.sock, port)
        g.connect()
        old, _ = srv.accept()
        new = GuestTcp(wire.sock, port, sport=g.sport, isn=77)
        new.send(SYN, opts=new.syn_options())
        challenge = new.expect(ACK)
        new.send(RST, seq=challenge.ack)
        new.connect(b"anew")
        host, _ = srv.accept()
        with host, old:
            host.settimeout(60)
            assert read_exactly(host, 4) == b"anew"
            old.settimeout(60)
            with pytest.raises(ConnectionResetError):
                old.recv(1)


def test_pending_connects_are_bounded_and_the_rest_is_answered(make_wire):
    """I4: excess is answered with RST, not ignored."""
    with listener(backlog=0) as srv, make_wire(pending_max=4) as wire:
        full = fill(srv)
        guests = [GuestTcp(wire.sock, srv.getsockname()[1]) for _ in range(6)]
        for g in guests:
            g.send(SYN, opts=g.syn_options())
        for g in guests[4:]:
            assert g.expect(RST | ACK).ack == g.isn + 1
        for s in full:
            s.close()


def sack_option(*blocks: tuple[int, int]) -> bytes:
    return struct.pack("!BBBB", 1, 1, 5, 2 + 8 * len(blocks)) + b"".join(
        struct.pack("!II", lo & M32, hi & M32) for lo, hi in blocks)


def test_sack_is_agreed_only_if_the_guest_offers_it(wire):
    """RFC 2018 2."""
    with listener() as srv:
        port = srv.getsockname()[1]
        assert GuestTcp(wire.sock, port, sack=True).connect().sack_ok
        assert not GuestTcp(wire.sock, port).connect().sack_ok


@pytest.mark.fault(5)
def test_sack_blocks_tell_what_is_parked_latest_first(wire):
    """RFC 2018 4: the first block holds the segment that triggered the ACK."""
    with connection(wire, sack=True) as (g, host):
        start = g.snd_nxt
        g.send(ACK, b"c" * 10, seq=start + 20)
        assert g.expect(ACK).sack == ((start + 20, start + 30),)
        g.send(ACK, b"e" * 10, seq=start + 40)
        assert g.expect(ACK).sack == ((start + 40, start + 50), (start + 20, start + 30))
        g.send(ACK, b"d" * 10, seq=start + 30)
        assert g.expect(ACK).sack == ((start + 20, start + 50),)
        g.send(ACK, b"a" * 20, seq=start)
        ack = g.wait_ack(start + 50)
        assert ack.sack == ()
        assert read_exactly(host, 50) == b"a" * 20 + b"c" * 10 + b"d" * 10 + b"e" * 10


def test_sack_resends_the_holes_and_only_them(wire):
    """RFC 6675 4, 5: two segments of eight lost; the guest says so once, both come again, nothing else does."""
    with connection(wire, mss=1000, sack=True) as (g, host):
        host.sendall(b"".join(bytes([65 + k]) * 1000 for k in range(8)))
        segs = [g.recv() for _ in range(8)]
        g.send(ACK, ack=segs[0].end)  # 1 and 4 are lost
        one, five = (segs[2].seq, segs[3].end), (segs[5].seq, segs[7].end)
        g.send(ACK, ack=segs[0].end, opts=sack_option(one))
        g.send(ACK, ack=segs[0].end, opts=sack_option(five, one))
        again = [g.expect(ACK), g.expect(ACK)]
        assert [(s.seq, s.data) for s in again] == [(segs[1].seq, segs[1].data), (segs[4].seq, segs[4].data)]
        g.rcv_nxt = segs[7].end
        g.send(ACK)
        assert g.fence() == []


def test_nonsense_sack_blocks_are_ignored(wire):
    """RFC 2018 3: left of snd_una, right of snd_max, turned round, cut."""
    with connection(wire, mss=1000, sack=True) as (g, host):
        host.sendall(b"z" * 3000)
        segs = [g.recv() for _ in range(3)]
        for opt in (sack_option((segs[0].seq - 500, segs[0].seq)), sack_option((segs[2].end + 1, segs[2].end + 900)),
                    sack_option((segs[2].end, segs[1].seq)), b"\x05\x0a\x00\x00", b"\x05\x01", b"\x05\xff"):
            g.send(ACK, ack=segs[0].end, opts=opt)
            g.rcv_nxt = segs[0].end
            g.send(ACK, wnd=g.wnd - 1 if opt else g.wnd)  # a window update between: no three duplicates in a row
        g.rcv_nxt = segs[2].end
        g.send(ACK)
        host.sendall(b"on")
        seg = g.recv()
        while seg.data != b"on":
            seg = g.recv()


chunks = st.lists(st.integers(1, 900), min_size=1, max_size=24)


@pytest.mark.parametrize("wire", [{"peek": "offset"}, {"peek": "discard"}], indirect=True, ids=["offset", "discard"])
def test_urgent_data_of_the_host_does_not_stall_what_follows(wire):
    """RFC 6093 4: in line. The kernel ends each read at the urgent mark, so a short read must not mean "no more"."""
    with connection(wire) as (g, host):
        host.sendall(b"before")
        host.send(b"!", socket.MSG_OOB)
        host.sendall(b"after")
        assert g.pull(12) == b"before!after"
        host.sendall(b"and on")
        assert g.pull(6) == b"and on"


@pytest.mark.fault(2, 3)
@pytest.mark.parametrize("wire", [{"peek": "offset"}, {"peek": "discard"}], indirect=True, ids=["offset", "discard"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sizes=chunks, seed=st.integers(0, 2**32 - 1), sack=st.booleans(), isn=st.sampled_from([0, 1, M32, M32 - 5000, 2**31 - 3000]))
def test_any_order_any_repetition_of_guest_segments_delivers_the_stream(wire, sizes, seed, sack, isn):
    """I1, I7: what the guest wrote is what the host reads, whatever order and however often segments come."""
    rnd = random.Random(seed)
    data = rnd.randbytes(sum(sizes))
    with connection(wire, isn=isn, sack=sack) as (g, host):
        start, at, segs = g.snd_nxt, 0, []
        for n in sizes:
            lo, hi = max(0, at - rnd.randrange(0, 40)), min(len(data), at + n + rnd.randrange(0, 40))
            segs.append((lo, data[lo:hi]))
            at += n
        order = segs + rnd.sample(segs, rnd.randrange(0, len(segs) + 1))
        rnd.shuffle(order)
        for lo, part in order:
            g.send(ACK | PSH, part, seq=start + lo)
        g.snd_nxt = (start + len(data)) & M32
        g.send(ACK | FIN)
        assert read_exactly(host, len(data)) == data
        assert host.recv(1) == b""
        g.wait_ack((g.snd_nxt + 1) & M32)


@pytest.mark.fault(10)
@pytest.mark.parametrize("wire", [{"peek": "offset"}, {"peek": "discard"}], indirect=True, ids=["offset", "discard"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(n=st.integers(1, 60000), seed=st.integers(0, 2**32 - 1), loss=st.sampled_from([0.0, 0.05, 0.3]),
       mss=st.sampled_from([100, 536, 1460]), wnd=st.sampled_from([600, 5000, 65535]),
       sack=st.booleans())
def test_host_stream_survives_loss_of_its_segments(wire, n, seed, loss, mss, wnd, sack):
    """I2, I7: the guest drops segments at random and acknowledges as RFC 9293 says; it reads the whole stream."""
    rnd = random.Random(seed)
    data = rnd.randbytes(min(n, 40 * mss))  # a hole without SACK costs a timeout: bounds the time of the worst case
    with connection(wire, mss=mss, wnd=wnd, wscale=0, sack=sack) as (g, host):
        host.sendall(data)
        host.shutdown(socket.SHUT_WR)
        got, early, fin_at = bytearray(), {}, None
        while fin_at is None or g.rcv_nxt != fin_at:
            seg = g.recv()
            assert seg is not None, f"stalled at {len(got)} of {len(data)}"
            assert not seg.flags & RST
            if rnd.random() < loss:
                continue
            if seg.data:
                early[seg.seq] = max(early.get(seg.seq, b""), seg.data, key=len)
            if seg.flags & FIN:
                fin_at = (seg.seq + len(seg.data)) & M32
            moved = True
            while moved:
                moved = False
                for s in list(early):
                    skip = (g.rcv_nxt - s) & M32
                    if skip < 1 << 31:
                        part = early.pop(s)[skip:]
                        got += part
                        g.rcv_nxt = (g.rcv_nxt + len(part)) & M32
                        moved = moved or bool(part)
            blocks = [(at, at + len(part)) for at, part in early.items()][-4:] if sack else []
            g.send(ACK, opts=sack_option(*blocks[::-1]) if blocks else b"")
        assert bytes(got) == data
        g.rcv_nxt = (g.rcv_nxt + 1) & M32
        g.push(b"", FIN)
        g.wait_ack()
