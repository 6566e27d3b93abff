"""egress leaves its seat in order and another process sits down (csrc/egress_estate.c): what the guest and the hosts see of
it is nothing. TCP in every state is in tests/property/test_tcp_transfers.py; here is the rest, and what is refused.

Both processes are stages of this one, over the same shared memory (EgressOnly.leave(), succeed()).
"""
from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shm import build_dataplane
from shm._dataplane import ffi, lib
from tests.fds import open_fds
from tests.harness import (
    DEADLINE,
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    GUEST_MAC,
    TCP,
    UDP,
    Datagram,
    EgressOnly,
    fresh_port,
    ipv4,
    mac_bytes,
    udp,
    udp_server,
)
from tests.wire.guest_tcp import checksum, pseudo

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
ETH = mac_bytes(GATEWAY_MAC) + mac_bytes(GUEST_MAC) + b"\x08\x00"
HEAD, MORE = 0x52534545, 0x52534546  # csrc/rn_estate.c
PACKET = struct.Struct("=IIQ")
SUM_AT, SUMMED_FROM, LAYOUT_AT = 16, 24, 8  # struct estate_head
M32 = 0xFFFFFFFF


def segment(sport: int, dport: int, seq: int, ack: int, flags: int, data: bytes = b"", options: bytes = b"") -> bytes:
    raw = struct.pack("!HHIIBBHHH", sport, dport, seq & M32, ack & M32, (20 + len(options)) // 4 << 4, flags, 65535, 0,
                      0) + options + data
    sum_ = checksum(pseudo(GUEST, GATEWAY, TCP, len(raw)) + raw)
    return raw[:16] + struct.pack("!H", sum_) + raw[18:]


@dataclass
class Conn:
    """The guest's end of a connection over EgressOnly: just enough to open it, to send, and to take."""

    guest: EgressOnly
    dport: int
    sport: int = field(default_factory=fresh_port)
    seq: int = 5000
    ack: int = 0

    def send(self, flags: int, data: bytes = b"", *, at: int | None = None, options: bytes = b"") -> None:
        self.guest.send_ip(TCP, segment(self.sport, self.dport, self.seq if at is None else at, self.ack, flags, data, options))

    def take(self, wanted: Callable[[int, int, int, bytes], bool]) -> tuple[int, int, int, bytes]:
        """(seq, ack, flags, data) of the first segment that is wanted."""
        def match(d: Datagram) -> bool:
            return d.proto == TCP and struct.unpack("!HH", d.payload[:4]) == (self.dport, self.sport) and wanted(*self._of(d.payload))

        return self._of(self.guest.datagram(match).payload)

    @staticmethod
    def _of(body: bytes) -> tuple[int, int, int, bytes]:
        seq, ack, off, flags = struct.unpack_from("!IIBB", body, 4)
        return seq, ack, flags, body[(off >> 4) * 4:]

    def open(self, options: bytes = b"") -> None:
        self.send(SYN, options=options)
        self.seq += 1
        seq, _, _, _ = self.take(lambda seq, ack, flags, data: flags & (SYN | ACK) == SYN | ACK)
        self.ack = (seq + 1) & M32
        self.send(ACK)

    def push(self, data: bytes) -> None:
        self.send(ACK | PSH, data)
        self.seq += len(data)

    def pull(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            seq, _, _, data = self.take(lambda seq, ack, flags, data: bool(data) and seq == self.ack)
            got += data
            self.ack = (self.ack + len(data)) & M32
            self.send(ACK)
        return got


@contextmanager
def server() -> Iterator[socket.socket]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        s.settimeout(20)
        yield s


def accept(listener: socket.socket) -> socket.socket:
    sock = listener.accept()[0]
    sock.settimeout(20)
    return sock


def listen(guest: EgressOnly, proto: str, rule: int, guest_port: int) -> tuple[int, socket.socket]:
    """A forward: its slot, and our duplicate of its socket, as the supervisor has one."""
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    if proto == "tcp":
        sock.listen()
    c = ffi.new("struct egress_listener *", {"fd": os.dup(sock.fileno()), "proto": 6 if proto == "tcp" else 17,
                                             "guest_port": guest_port, "rule": rule})
    slot = lib.stage_egress_listen(guest._stage, c)
    assert slot >= 0
    return slot, sock


def put_udp(guest: EgressOnly, sport: int, dport: int, data: bytes) -> None:
    """On the ring, where it waits for whoever sits down next."""
    guest.put(ETH + ipv4(UDP, udp(GUEST, sport, GATEWAY, dport, data), GUEST, GATEWAY))


def seat_changes(guest: EgressOnly) -> int:
    left = guest.leave()
    assert guest.succeed()[0] == left
    return left


# -- what goes on

def test_a_mapping_keeps_its_host_port_and_what_came_meanwhile() -> None:
    with EgressOnly() as guest, udp_server() as host:
        port = fresh_port()
        guest.send_udp(port, host.getsockname()[1], b"one")
        _, address = host.recvfrom(100)
        assert guest.leave() == 1
        host.sendto(b"for nobody", address)
        put_udp(guest, port, host.getsockname()[1], b"two")
        assert guest.succeed() == (1, "")
        guest.settle()
        assert host.recvfrom(100) == (b"two", address)
        assert guest.recv_udp(port).data == b"for nobody"
        counters = guest.counters()
        assert (counters["flows_left"], counters["flows_inherited"], counters["flows_not_inherited"]) == (1, 1, 0)


def test_nobody_times_out_because_the_seat_was_empty() -> None:
    with EgressOnly() as guest, udp_server() as host:
        port = fresh_port()
        guest.stop_clock()
        guest.send_udp(port, host.getsockname()[1], b"one")
        _, address = host.recvfrom(100)
        assert guest.leave() == 1
        guest._stopped_at += 3600 * 10**9  # longer than any mapping lives
        guest.succeed()
        guest.settle()
        host.sendto(b"late", address)
        assert guest.recv_udp(port).data == b"late"
        guest.advance(200)
        assert guest.flows() == []  # and then it does


def test_early_segments_wait_in_the_successor() -> None:
    """What is parked was not acknowledged, but SACK told the guest that it is here."""
    with EgressOnly() as guest, server() as listener:
        conn = Conn(guest, listener.getsockname()[1])
        conn.open(bytes([4, 2, 1, 1]))
        with accept(listener) as host:
            conn.send(ACK, b"second", at=conn.seq + 5)
            guest.settle()
            assert guest.flows()[0].parked == 6
            seat_changes(guest)
            assert guest.flows()[0].parked == 6
            conn.push(b"first")
            guest.settle()
            assert host.recv(100) == b"firstsecond"


def test_what_the_host_did_not_take_yet_is_not_lost() -> None:
    with EgressOnly(mtu=65520) as guest, server() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        conn = Conn(guest, listener.getsockname()[1])
        conn.open(bytes([2, 4, 255, 215]))
        with accept(listener) as host:
            block = bytes(range(256)) * 200
            for _ in range(400):  # until the host's buffers are full, and segments are parked
                end = conn.seq + len(block)
                conn.send(ACK, block)
                _, conn.seq, _, _ = conn.take(lambda seq, ack, flags, data: True)
                if guest.flows()[0].parked:
                    break
            assert guest.flows()[0].parked and conn.seq < end
            seat_changes(guest)
            got = 0
            host.setblocking(False)
            deadline = time.monotonic() + DEADLINE
            while got < end - 5001 and time.monotonic() < deadline:
                with suppress(BlockingIOError):
                    got += len(host.recv(1 << 20))
                guest.step(0.01)
            assert got == end - 5001


def test_a_host_that_closed_meanwhile_is_noticed() -> None:
    with EgressOnly() as guest, server() as listener:
        conn = Conn(guest, listener.getsockname()[1])
        conn.open()
        host = accept(listener)
        guest.leave()
        host.sendall(b"bye")
        host.close()
        guest.succeed()
        assert conn.pull(3) == b"bye"
        conn.take(lambda seq, ack, flags, data: bool(flags & FIN))


def test_forwards_stay_bound_and_their_flows_live() -> None:
    with EgressOnly() as guest, ExitStack() as stack:
        guest.ping(1, 1)  # its MAC address is known then
        guest.recv_echo(1)
        inside, rule = fresh_port(), 41
        slot, listener = listen(guest, "tcp", rule, inside)
        stack.enter_context(listener)
        _, dgram = listen(guest, "udp", rule + 1, inside)
        stack.enter_context(dgram)
        outside = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        outside.settimeout(20)
        outside.sendto(b"in", dgram.getsockname())
        d = guest.recv_udp(inside)
        guest.leave()
        client = stack.enter_context(socket.create_connection(listener.getsockname()))  # waits in the backlog
        outside.sendto(b"meanwhile", dgram.getsockname())
        assert guest.succeed()[0] == 1
        found = ffi.new("uint32_t *")
        assert [(lib.stage_egress_listener(guest._stage, k, found), found[0]) for k in range(2)] == [(slot, rule), (slot + 1, rule + 1)]
        assert lib.stage_egress_listener(guest._stage, 2, found) == -errno.ENOENT
        guest.settle()
        again = guest.recv_udp(inside)
        assert (again.data, again.sport) == (b"meanwhile", d.sport)
        guest.send_udp(inside, d.sport, b"out", d.src)
        assert outside.recvfrom(100) == (b"out", dgram.getsockname())
        syn = guest.datagram(lambda d: d.proto == TCP and d.payload[13] == SYN)
        assert syn.dport == inside
        client.close()
        assert lib.stage_egress_unlisten(guest._stage, slot + 1, 0) == 1


def test_a_seat_that_nobody_left_is_empty() -> None:
    """Killed: its sockets are closed; the successor begins with none, and says nothing."""
    with EgressOnly() as guest, udp_server() as host:
        guest.send_udp(fresh_port(), host.getsockname()[1], b"one")
        lib.rn_stage_free(guest._stage)
        assert guest.succeed() == (0, "")
        assert guest.flows() == []


def test_it_leaves_once() -> None:
    with EgressOnly() as guest:
        s = guest._stage
        ends = [end.fileno() for end in guest.estate]
        assert lib.stage_egress_leave(s, *ends) == 0
        assert lib.stage_egress_leave(s, *ends) == -errno.EALREADY


def test_what_cannot_be_left_stays() -> None:
    """The socket pair is gone: nothing has changed, and the stage goes on or ends as if it had not been asked."""
    with EgressOnly() as guest, udp_server() as host:
        port = fresh_port()
        guest.send_udp(port, host.getsockname()[1], b"one")
        _, address = host.recvfrom(100)
        guest.estate[1].close()
        assert lib.stage_egress_leave(guest._stage, guest.estate[0].fileno(), guest.estate[0].fileno()) == -errno.EPIPE
        assert "cannot leave 1 flows to a successor" in ffi.string(lib.rn_stage_error(guest._stage)).decode()
        host.sendto(b"two", address)
        assert guest.recv_udp(port).data == b"two"
        guest.estate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


# -- what is refused

Packets = list[tuple[bytes, list[int]]]


def packets(estate: socket.socket) -> Packets:
    found: Packets = []
    estate.setblocking(False)
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(estate, 64, 253)
        except BlockingIOError:
            return found
        found.append((data, fds))


def put_back(estate: socket.socket, found: Packets) -> None:
    for data, fds in found:
        socket.send_fds(estate, [data], fds)
        for fd in fds:
            os.close(fd)


def contents(found: Packets) -> bytes:
    return os.pread(found[0][1][0], PACKET.unpack(found[0][0])[2], 0)


def with_contents(found: Packets, data: bytes) -> Packets:
    """The same packets with other bytes; the sum is made right."""
    if len(data) >= SUMMED_FROM:
        rest = data[SUMMED_FROM:]
        data = data[:SUM_AT] + struct.pack("=Q", lib.stage_egress_siphash(1, 2, rest, len(rest))) + rest  # EgressOnly's key
    fd = found[0][1][0]
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    kind, n, _ = PACKET.unpack(found[0][0])
    return [(PACKET.pack(kind, n, len(data)), found[0][1]), *found[1:]]


def nothing_is_open(before: int) -> bool:
    return len(open_fds()) == before


@contextmanager
def busy() -> Iterator[EgressOnly]:
    """A stage with some of everything, left; its flows reset in the end or not."""
    with ExitStack() as stack:
        guest = stack.enter_context(EgressOnly(ring=64))
        listener = stack.enter_context(server())
        host = stack.enter_context(udp_server())
        for _ in range(2):
            conn = Conn(guest, listener.getsockname()[1])
            conn.open(bytes([4, 2, 1, 1]))
            sock = stack.enter_context(accept(listener))
            conn.send(ACK, b"early", at=conn.seq + 10)
            sock.sendall(b"x" * 5000)
        conn = Conn(guest, listener.getsockname()[1])
        conn.send(SYN)
        guest.send_udp(fresh_port(), host.getsockname()[1], b"one")
        for proto, rule in (("tcp", 1), ("udp", 2)):
            _, sock = listen(guest, proto, rule, 80)
            stack.enter_context(sock)
        outside = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        outside.sendto(b"in", sock.getsockname())
        guest.settle()
        guest.leave()
        yield guest


def still_works(guest: EgressOnly) -> None:
    guest.settle()
    guest.take(64)
    guest._frames.clear()
    with udp_server() as host:
        port = fresh_port()
        guest.send_udp(port, host.getsockname()[1], b"hello")
        data, address = host.recvfrom(100)
        host.sendto(data, address)
        assert guest.recv_udp(port).data == b"hello"


def test_another_build_resets_and_says_why() -> None:
    with EgressOnly() as guest, server() as listener, udp_server() as host:
        conn = Conn(guest, listener.getsockname()[1])
        conn.open()
        guest.send_udp(fresh_port(), host.getsockname()[1], b"one")
        with accept(listener) as sock:
            guest.leave()
            found = packets(guest.estate[1])
            data = bytearray(contents(found))
            data[LAYOUT_AT] ^= 1
            put_back(guest.estate[0], with_contents(found, bytes(data)))
            code, why = guest.succeed()
            assert code == -errno.EPROTO
            assert why == ("the last process in this seat was of a build with other structures: it left 2 flows that this one"
                           " cannot go on with")
            seq, ack, _, _ = conn.take(lambda seq, ack, flags, data: bool(flags & RST))
            assert (seq, ack) == (conn.ack, conn.seq)
            with pytest.raises(ConnectionResetError):
                sock.recv(100)
        assert guest.flows() == [] and guest.counters()["flows_not_inherited"] == 2
        still_works(guest)


def test_part_of_it_is_refused() -> None:
    """Its writer was killed over it, or something else lies there."""
    with busy() as guest:
        found = packets(guest.estate[1])
        for fd in found[-1][1]:
            os.close(fd)
        put_back(guest.estate[0], found[:-1])
        code, why = guest.succeed()
        assert code == -errno.EPROTO and why.startswith("what the last process in this seat left is not whole: ")
        assert guest.flows() == []
        still_works(guest)


def test_a_damaged_byte_is_noticed() -> None:
    with busy() as guest:
        found = packets(guest.estate[1])
        fd = found[0][1][0]
        at = PACKET.unpack(found[0][0])[2] // 2
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1]), at)
        put_back(guest.estate[0], found)
        assert guest.succeed() == (-errno.EPROTO, "what the last process in this seat left is damaged")
        still_works(guest)


@st.composite
def _damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kind = draw(st.sampled_from(["cut", "grow", "bytes", "words"]))
    at = draw(st.floats(0, 1))
    if kind == "cut":
        return lambda data: data[:int(at * len(data))]
    if kind == "grow":
        more = draw(st.binary(min_size=1, max_size=300))
        return lambda data: data + more
    new = draw(st.binary(min_size=1, max_size=8)) if kind == "bytes" else draw(
        st.sampled_from([0, 1, M32, 0x7FFFFFFF, 0xFFFF, 1023, 1024])).to_bytes(4, "little")

    def change(data: bytes) -> bytes:
        place = int(at * (len(data) - len(new)))
        return data[:place] + new + data[place + len(new):]

    return change


@given(damage=st.lists(_damage(), min_size=1, max_size=4))
@settings(max_examples=2000 if os.environ.get("RINGNET_LONG") else 60, deadline=None,
          suppress_health_check=[HealthCheck.too_slow])
def test_whatever_lies_there_is_taken_or_refused(damage: list[Callable[[bytes], bytes]]) -> None:
    """Damage that the sum does not show. No crash, no descriptor left open, and the stage works."""
    before = len(open_fds())
    with busy() as guest:
        found = packets(guest.estate[1])
        data = contents(found)
        for change in damage:
            data = change(data)
        put_back(guest.estate[0], with_contents(found, data))
        code, why = guest.succeed()
        assert code >= 0 or why
        still_works(guest)
        guest.advance(4000)
    assert nothing_is_open(before)


@given(sent=st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_packets_there_are_taken_or_refused(sent: list[tuple[bytes, int]]) -> None:
    before = len(open_fds())
    with EgressOnly(flows=16) as guest:
        guest.leave()
        for _, fds in packets(guest.estate[1]):
            for fd in fds:
                os.close(fd)
        for data, n in sent:
            fds = [os.memfd_create("x") for _ in range(n)]
            socket.send_fds(guest.estate[0], [data or b"x"], fds)
            for fd in fds:
                os.close(fd)
        code, why = guest.succeed()
        assert code == 0 or why.startswith("what the last process in this seat left is not whole")
    assert nothing_is_open(before)


# -- the layout

def test_the_layout_is_that_of_the_declarations() -> None:
    def layout(name: str = "", old: str = "", new: str = "") -> int:
        def read(path: str) -> str:
            text = (build_dataplane.CSRC / path).read_text()
            if path == name:
                assert old in text
                text = text.replace(old, new)
            return text

        return build_dataplane.estate_layout(read)

    assert layout() == build_dataplane.estate_layout()
    assert layout("egress.h", "/* egress.h - what", "/* egress.h - all that") == layout()
    assert layout("egress.h", "void eg_drop(struct egress *e, uint32_t i);", "") == layout()
    for name, old, new in (
            ("egress.h", "uint32_t rtt_seq;", "uint64_t rtt_seq;"),
            ("tcp_internal.h", "W_SYNACK = 1u << 0", "W_SYNACK = 1u << 30"),
            ("tcp_estate.c", "uint32_t seq, len;", "uint32_t len, seq;"),
            ("proxy_handshake.h", "enum hs_state { HS_HTTP, HS_METHOD", "enum hs_state { HS_METHOD, HS_HTTP")):
        assert layout(name, old, new) != layout(), name


def test_the_build_has_the_layout() -> None:
    """Else two builds would take each other's."""
    with EgressOnly() as guest:
        guest.leave()
        found = packets(guest.estate[1])
        assert struct.unpack_from("=Q", contents(found), LAYOUT_AT)[0] == build_dataplane.estate_layout()
        assert re.fullmatch(r"-DRN_ESTATE_LAYOUT=0x[0-9a-f]+ull", build_dataplane._layout_flag())
        for _, fds in found:
            for fd in fds:
                os.close(fd)
