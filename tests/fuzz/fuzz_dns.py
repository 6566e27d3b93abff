"""Fuzz target: the DNS forwarder, with a guest and a resolver that are both nearly right.

Queries come as datagrams and over TCP; the resolver is a socket of ours and answers with damaged, late, repeated or
foreign messages. Promised: nothing raises; each query over UDP gets one answer at most, and exactly one if query() said
so; an answer is a message with the query's id; nothing is under way after the time is over.
"""
from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections import Counter
from ipaddress import IPv4Address, IPv4Network

from pipeline.services import dns_message as dm
from pipeline.services.dns import DnsForwarder
from pipeline.services.hosts import HostsTable
from pipeline.services.loop import Loop
from pipeline.services.resolv import Upstream
from tests.fuzz import pyfuzz

_reached: Counter[str] = Counter()


def question(rng: random.Random) -> bytes:
    name = rng.choice(("example.com", "a.b.c.d.e.f", "db.ringnet.internal", "x.ringnet.internal", "www.example.com",
                       "b.loop.example", "2.2.0.10.in-addr.arpa", ""))
    q = struct.pack("!HHHHHH", rng.getrandbits(16), rng.choice((0x0100, 0x0100, 0x0000, 0x0110)), 1, 0, 0, 0)
    q += (dm.encode_name(name) if name else b"\0") + struct.pack("!HH", rng.choice((1, 28, 5, 12, 15, 255, 252)), 1)
    if rng.random() < 0.4:
        q = q[:10] + b"\0\1" + q[12:] + b"\0" + struct.pack("!HHIH", 41, rng.choice((0, 512, 1232, 65535)),
                                                             rng.choice((0, 0x8000, 0x10000)), 0)
    return q


def response(rng: random.Random, query: bytes) -> bytes:
    """What a resolver would say to these bytes; names compressed, sometimes to themselves."""
    if len(query) < 17:
        return query
    end = 12
    while end < len(query) and query[end]:
        end += query[end] + 1
    end += 5
    body = query[12:end]
    n = rng.randrange(4)
    answers = b""
    for _ in range(n):
        pointer = struct.pack("!H", 0xC000 | rng.choice((12, 12, 12, 12 + rng.randrange(64), 0)))
        kind, rdata = rng.choice(((1, b"\xc0\0\2\1"), (28, bytes(16)), (5, b"\xc0\x0c"), (16, b"\5hello"), (6, b"\0\0" + bytes(20))))
        answers += pointer + struct.pack("!HHIH", kind, 1, rng.choice((0, 60, 0x7FFFFFFF, 0xFFFFFFFF)), len(rdata)) + rdata
    flags = rng.choice((0x8180, 0x8180, 0x8183, 0x8182, 0x8380, 0x8580))
    return query[:2] + struct.pack("!HHHHH", flags, 1, n, 0, 0) + body + answers


class _Far:
    """The resolver: UDP, and TCP on the same port."""

    def __init__(self) -> None:
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp = socket.socket()
        while True:
            self.udp.bind(("127.0.0.1", 0))
            try:
                self.tcp.bind(self.udp.getsockname())
                break
            except OSError:  # the other protocol's port is taken: another pair
                self.udp.close()
                self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp.listen(8)
        for s in (self.udp, self.tcp):
            s.setblocking(False)
        self.streams: list[socket.socket] = []

    def serve(self, rng: random.Random) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                query, addr = self.udp.recvfrom(65536)
                for _ in range(rng.choice((0, 1, 1, 1, 2))):
                    reply = response(rng, query)
                    if rng.random() < 0.4:
                        reply = pyfuzz.mutate(rng, reply, limit=60000)
                    if rng.random() < 0.1:
                        reply = rng.randbytes(2) + reply[2:]
                    self.udp.sendto(reply, addr)
        with contextlib.suppress(BlockingIOError):
            while True:
                s, _ = self.tcp.accept()
                s.setblocking(False)
                self.streams.append(s)
        for s in list(self.streams):
            try:
                data = s.recv(65536)
                if len(data) > 2:
                    reply = response(rng, data[2:])
                    if rng.random() < 0.4:
                        reply = pyfuzz.mutate(rng, reply, limit=60000)
                    s.sendall(struct.pack("!H", len(reply) if rng.random() < 0.8 else rng.getrandbits(16)) + reply)
                if not data or rng.random() < 0.3:
                    raise ConnectionError
            except BlockingIOError:
                pass
            except OSError:
                s.close()
                self.streams.remove(s)

    def close(self) -> None:
        for s in (self.udp, self.tcp, *self.streams):
            s.close()


def one(rng: random.Random) -> None:
    now = [1000.0]
    loop = Loop(lambda: now[0])
    counts: Counter[str] = Counter()
    hosts = HostsTable(domain="ringnet.internal", gateway=IPv4Address("10.0.2.1"), network=IPv4Network("10.0.2.0/24"))
    hosts.change({"db": [IPv4Address("10.0.2.50")], "sql": ["db"], "www.example.com": ["sql"],
                  "*.loop.example": ["a.loop.example"]})
    forwarder = DnsForwarder(loop, hosts, count=lambda name, n=1: counts.update({name: n}), random_id=lambda: rng.getrandbits(16))
    far = _Far()
    answers: dict[int, list[bytes]] = {}
    promised: set[int] = set()
    streams: list[socket.socket] = []
    try:
        forwarder.set_upstreams([Upstream(IPv4Address("127.0.0.1"), far.udp.getsockname()[1])] * rng.choice((1, 1, 2)))
        for k in range(rng.randrange(1, 12)):
            data = question(rng)
            if rng.random() < 0.4:
                data = pyfuzz.mutate(rng, data)
            if rng.random() < 0.2:
                ours, theirs = socket.socketpair()
                ours.setblocking(False)
                streams.append(ours)
                forwarder.accept(theirs)
                with contextlib.suppress(OSError):
                    ours.send(pyfuzz.mutate(rng, struct.pack("!H", len(data)) + data, times=rng.randrange(2)))
                if rng.random() < 0.3:
                    ours.close()
            else:
                answers[k] = []
                if forwarder.query(data, lambda reply, k=k, ident=data[:2]: _answered(answers[k], reply, ident), who=k % 3):
                    promised.add(k)
            for _ in range(rng.randrange(3)):
                loop.step(0)
                far.serve(rng)
                loop.step(0)
            now[0] += rng.choice((0.0, 0.0, 0.01, 1.5))
        for _ in range(12):
            loop.step(0)
            far.serve(rng)
            loop.step(0)
            now[0] += 4.0
        loop.step(0)
        assert forwarder.under_way == 0, "a query that never ends"
        for k, got in answers.items():
            assert len(got) <= 1, "two answers to one query"
            assert got or k not in promised, "no answer, though one was promised"
        _reached["queries"] += len(answers)
        _reached["answers"] += sum(map(len, answers.values()))
        _reached.update({k: counts[k] for k in ("dns_forwarded", "dns_local", "dns_cached", "dns_servfail", "drop_dns_bad",
                                                "drop_dns_reply")})
    finally:
        forwarder.close()
        loop.close()
        far.close()
        for s in streams:
            s.close()


def _answered(got: list[bytes], reply: bytes, ident: bytes) -> None:
    assert len(reply) >= dm.HEADER and reply[2] & 0x80 and reply[:2] == ident, "an answer that is none to this query"
    got.append(reply)


def report() -> dict[str, int]:
    return dict(_reached)


if __name__ == "__main__":
    pyfuzz.main(one, report)
