"""DNS forwarder: hosts table, cache, then the host's resolvers (RFC 1035, 5452, 5625, 6891, 7766).

Theory of operation
  `query()` takes one message from the guest and a function to answer with. Answered on the spot: what is not a
  plain query (FORMERR, NOTIMP, REFUSED, BADVERS), names of the hosts table, what the cache knows, and SERVFAIL if
  there is nobody to ask. The rest is forwarded as it came, under another id: EDNS options pass through.

  Upstream, each try has a socket of its own: fresh random id, fresh port chosen by the kernel at random, connected,
  so that the kernel drops what comes from another address (RFC 5452 9). A reply counts if id, opcode and the whole
  question, letter case included, are those sent; anything else is dropped and counted, and we go on waiting. The
  next server is tried after 1 s, then 2 s; at once if one refuses (ICMP, SERVFAIL, REFUSED). Late replies to earlier
  tries are still taken. After 5 s, or when every server has refused: SERVFAIL.

  A query over TCP is asked over TCP. A truncated reply (TC) goes to the guest as it is: the guest then comes over
  TCP. A reply longer than the guest takes over UDP (its EDNS size, else 512) is cut to header, question and TC.

  The same bytes asked twice while the first is under way wait for the same reply. A change of resolvers empties
  the cache and asks again for what is under way.

  Cache: 1024 replies, least recently used go first; time to live is the smallest in the reply, for "no such name"
  and "no data" the SOA's (RFC 2308 5), at most a day and 15 minutes; keyed by name, type, class, DO and CD. Not kept:
  TC, SERVFAIL, replies that depend on the client's subnet, zone transfers (refused), over 4096 bytes.

Limits: 512 queries under way (beyond: UDP dropped and counted, TCP gets SERVFAIL), 64 TCP connections, each 32
queries at a time and 30 s idle; one reply a query, so no zone transfer.
"""
from __future__ import annotations

import logging
import os
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from ipaddress import IPv4Address, IPv6Address

from msgspec import Struct

from pipeline.services import dns_message as dm
from pipeline.services.dns_message import Rcode, Rtype
from pipeline.services.hosts import HostsTable
from pipeline.services.loop import READ, WRITE, Loop, Timer
from pipeline.services.resolv import Upstream

log = logging.getLogger("ringnet.services.dns")

Answer = Callable[[bytes], None]
Learn = Callable[[IPv4Address | IPv6Address, str, int, bool], None]  # address, name asked for, TTL s, from hosts
MESSAGE_MAX = 65535  # bytes: the TCP length prefix (RFC 1035 4.2.2)
FAILURES = (Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED)


class Limits(Struct, frozen=True, kw_only=True):
    under_way: int = 512  # queries
    joined: int = 64  # askers that wait for one query
    first_s: float = 1.0  # seconds until the second server is tried
    next_s: float = 2.0  # and the ones after it
    total_s: float = 5.0  # as long as a stub resolver waits (resolv.conf(5), timeout)
    prefer_s: float = 60.0  # a server that had to stand in is asked first for so long
    connections: int = 64  # TCP, from the guest
    stream_queries: int = 32  # under way on one connection; then we stop reading it
    stream_out: int = 1 << 18  # bytes of replies the guest does not take; then likewise
    idle_s: float = 30.0  # TCP connection without a query (RFC 7766 6.2.3)
    cache_entries: int = 1024
    cache_reply: int = 4096  # bytes
    positive_s: int = 86400
    negative_s: int = 900  # RFC 2308 5: sensible up to three hours; a guest's typo need not last so long


class _Asker(Struct, frozen=True):
    answer: Answer
    id: int
    who: Hashable


class _Attempt:
    """One query to one server, on a socket of its own."""

    __slots__ = ("server", "sock", "id", "out", "inbox", "stream")

    def __init__(self, server: int, sock: socket.socket, ident: int, message: bytes, *, stream: bool) -> None:
        self.server = server
        self.sock = sock
        self.id = ident
        self.stream = stream
        self.out = struct.pack("!H", len(message)) + message if stream else message
        self.inbox = bytearray()


class _Pending:
    """A forwarded query."""

    __slots__ = ("key", "query", "stream", "askers", "servers", "attempts", "refused", "cursor", "tries", "deadline",
                 "timer", "failure")

    def __init__(self, key: Hashable, query: dm.Message, deadline: float, *, stream: bool) -> None:
        self.key = key
        self.query = query
        self.stream = stream
        self.deadline = deadline
        self.askers: list[_Asker] = []
        self.timer: Timer | None = None
        self.attempts: list[_Attempt] = []
        self.restart((), 0)

    def restart(self, servers: Sequence[Upstream], first: int) -> None:
        self.servers = servers
        self.cursor = first
        self.refused: set[int] = set()
        self.tries = 0
        self.failure: dm.Message | None = None  # a server's own SERVFAIL: it may say why (RFC 8914)


class _Cached(Struct, frozen=True):
    data: bytes  # reply without OPT
    ttls: tuple[int, ...]  # offsets
    stored: float  # clock, seconds
    lives: int  # seconds


CacheKey = tuple[bytes, int, int, bool, bool]


class Cache:
    """Replies by question, least recently used last (RFC 1035 7.4, RFC 2308)."""

    def __init__(self, clock: Callable[[], float], limits: Limits) -> None:
        self._clock = clock
        self._limits = limits
        self._entries: OrderedDict[CacheKey, _Cached] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()

    @staticmethod
    def key(query: dm.Message) -> CacheKey | None:
        """None: this query goes upstream each time. Without RD the asker wants to know what the server has; a client
        subnet makes the answer one for that subnet only (RFC 7871 7.3)."""
        q = query.question
        if q is None or not query.flags & dm.RD or q.rtype == Rtype.ANY or (query.edns and query.edns.subnet):
            return None
        if any(r.section == 3 and r.rtype in (Rtype.TSIG, Rtype.SIG) for r in query.records):
            return None  # signed: the reply is signed for this query
        return q.folded, q.rtype, q.rclass, bool(query.edns and query.edns.do), bool(query.flags & dm.CD)

    def get(self, query: dm.Message) -> bytes | None:
        """A reply to this very query, its times to live counted down."""
        if (key := self.key(query)) is None or (entry := self._entries.get(key)) is None:
            return None
        age = int(self._clock() - entry.stored)
        if age >= entry.lives:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        assert query.question is not None
        out = bytearray(entry.data)
        flags = int.from_bytes(out[2:4]) & ~(dm.AA | dm.RD | dm.CD) | query.flags & (dm.RD | dm.CD)
        if not (query.flags & dm.AD or query.edns and query.edns.do):
            flags &= ~dm.AD  # RFC 6840 5.8
        struct.pack_into("!HH", out, 0, query.id, flags)
        # Same name but for letter case, so of the same length: pointers to it stay right.
        out[dm.HEADER : dm.HEADER + len(query.question.wire)] = query.question.wire
        for at in entry.ttls:
            ttl = int.from_bytes(out[at : at + 4])
            struct.pack_into("!I", out, at, max(0, ttl - age))
        if query.edns is not None:
            out += dm.opt_record(size=dm.OUR_UDP_SIZE, do=query.edns.do)
            struct.pack_into("!H", out, 10, int.from_bytes(out[10:12]) + 1)
        return bytes(out)

    def put(self, query: dm.Message, reply: dm.Message) -> None:
        """Keep a reply, if it is one to keep."""
        key = self.key(query)
        if key is None or reply.flags & dm.TC or len(reply.data) > self._limits.cache_reply:
            return
        lives = self._lives(query, reply)
        if lives <= 0:
            return
        data, records = reply.data[: reply.end], list(reply.records)
        if reply.edns is not None:
            opt = records.pop()
            if opt.rtype != Rtype.OPT:  # cutting it out of the middle would move what pointers point at
                return
            data = bytearray(data[: opt.start])
            struct.pack_into("!H", data, 10, int.from_bytes(data[10:12]) - 1)
        self._entries[key] = _Cached(data=bytes(data), ttls=tuple(r.ttl_at for r in records), stored=self._clock(),
                                     lives=lives)
        self._entries.move_to_end(key)
        while len(self._entries) > self._limits.cache_entries:
            self._entries.popitem(last=False)

    def _lives(self, query: dm.Message, reply: dm.Message) -> int:
        """Seconds to keep it; 0: not at all."""
        assert query.question is not None
        records = [r for r in reply.records if r.rtype != Rtype.OPT]
        signed = any(r.rtype in (Rtype.TSIG, Rtype.SIG) for r in records)
        if signed or reply.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
            return 0
        # A TTL with the top bit set counts as 0 (RFC 2181 8).
        lives = min((r.ttl if r.ttl < 1 << 31 else 0 for r in records), default=0)
        if reply.rcode == Rcode.NOERROR and any(
                r.section == 1 and r.rtype == query.question.rtype for r in records):
            return min(lives, self._limits.positive_s)
        for r in records:
            if r.section == 2 and r.rtype == Rtype.SOA and r.rdata_len >= 22:
                # RFC 2308 5: the smaller of the SOA's own TTL and its last field.
                return min(lives, int.from_bytes(reply.data[r.end - 4 : r.end]), self._limits.negative_s)
        return 0  # no SOA: a referral, or a negative answer that must not be kept


def no_count(name: str, n: int = 1) -> None:
    """Default counter sink: nobody watches."""


class DnsForwarder:
    """`count` gets names from csrc/rn_metrics.def; `learn` the addresses in answers, before they go out. One thread;
    never blocks."""

    def __init__(self, loop: Loop, hosts: HostsTable, *, count: Callable[[str], None] = no_count,
                 limits: Limits = Limits(), random_id: Callable[[], int] = lambda: int.from_bytes(os.urandom(2)),
                 learn: Learn | None = None) -> None:
        self._loop = loop
        self._hosts = hosts
        self._count = count
        self._limits = limits
        self._random_id = random_id
        self._learn = learn
        self._servers: tuple[Upstream, ...] = ()
        self._preferred = 0
        self._preferred_until = 0.0
        self._pending: dict[Hashable, _Pending] = {}
        self._streams: dict[_Stream, None] = {}  # ordered: idle longest first
        self.cache = Cache(loop.clock, limits)

    @property
    def under_way(self) -> int:
        return len(self._pending)

    @property
    def connections(self) -> int:
        return len(self._streams)

    def set_upstreams(self, servers: Sequence[Upstream]) -> None:
        """Ask these from now on, in this order (ArcBox fault 37: they were read once)."""
        if tuple(servers) == self._servers:
            return
        self._servers = tuple(servers)
        self._preferred = 0
        self.cache.clear()  # another network may know the same name by another address
        if not servers:
            log.warning("no upstream name server; queries are answered with SERVFAIL")
        for pending in list(self._pending.values()):
            self._stop(pending)
            pending.restart(self._servers, 0)
            self._try_next(pending)

    def close(self) -> None:
        """Forget what is under way, close every socket."""
        for pending in list(self._pending.values()):
            self._stop(pending)
        self._pending.clear()
        for stream in list(self._streams):
            stream.close()

    # --- from the guest ---

    def accept(self, sock: socket.socket) -> None:
        """Serve a connection of DNS over TCP; the socket is ours now."""
        if len(self._streams) >= self._limits.connections:
            idle = next((s for s in self._streams if s.idle), None)
            if idle is None:
                log.debug("DNS over TCP: %d connections, all busy; one refused", len(self._streams))
                sock.close()
                return
            idle.close()
        sock.setblocking(False)
        self._streams[_Stream(self, self._loop, sock, self._limits)] = None

    def stream_used(self, stream: _Stream) -> None:
        """It is the least idle now."""
        if stream in self._streams:
            del self._streams[stream]
            self._streams[stream] = None

    def stream_gone(self, stream: _Stream) -> None:
        self._streams.pop(stream, None)

    def query(self, data: bytes, answer: Answer, *, who: Hashable = None, stream: bool = False) -> bool:
        """One message from the guest. `answer` is called at most once, now or later, with a whole message that
        fits what was asked for; `who` tells a repeated query from a second asker; `stream`: came over TCP.

        Never raises for what the guest sent. False: there will be no answer.
        """
        self._count("dns_queries")
        if len(data) < dm.HEADER or data[2] & 0x80:
            self._count("drop_dns_bad")  # no answer: it may itself be one, and two servers could go on for ever
            return False
        if data[2] >> 3 & 15:
            answer(dm.respond(None, data, Rcode.NOTIMP))  # RFC 1035 4.1.1: only QUERY is served
            return True
        try:
            query = dm.parse(data)
            if query.question is None or any(r.section == 1 for r in query.records):
                raise dm.DnsFormatError("no question, or answers in a query")
        except dm.DnsFormatError as err:
            log.debug("query: %s", err)
            self._count("drop_dns_bad")
            answer(dm.respond(None, data, Rcode.FORMERR))
            return True
        asker = _Asker(answer, query.id, who)
        if query.edns is not None and query.edns.version:
            self._deliver(asker, query, dm.respond(query, data, Rcode.BADVERS), stream)  # RFC 6891 6.1.3
        elif query.question.rtype in (Rtype.AXFR, Rtype.IXFR):
            self._deliver(asker, query, dm.respond(query, data, Rcode.REFUSED), stream)
        elif (local := self._hosts.lookup(query.question)) is not None:
            self._count("dns_local")
            reply = dm.respond(query, data, local.rcode, answers=local.records, authority=local.authority,
                               authoritative=True)
            self._deliver(asker, query, reply, stream, local=True)
        elif (cached := self.cache.get(query)) is not None:
            self._count("dns_cached")
            self._deliver(asker, query, cached, stream)
        else:
            return self._forward(query, asker, stream=stream)
        return True

    def _note_names(self, query: dm.Message, reply: bytes, local: bool) -> None:
        """Which addresses the guest gets for the name it asked for; CNAMEs on the way are not its business."""
        assert self._learn is not None and query.question is not None
        try:
            name = b".".join(dm.labels_of(query.question.folded)).decode("ascii")
            message = dm.parse(reply)
        except (dm.DnsFormatError, UnicodeDecodeError):
            return
        for r in message.records:
            if (r.section, r.rtype, r.rclass, r.rdata_len) == (1, Rtype.A, dm.IN, 4):
                self._learn(IPv4Address(reply[r.rdata_at : r.end]), name, r.ttl, local)
            elif (r.section, r.rtype, r.rclass, r.rdata_len) == (1, Rtype.AAAA, dm.IN, 16):
                self._learn(IPv6Address(reply[r.rdata_at : r.end]), name, r.ttl, local)

    def _deliver(self, asker: _Asker, query: dm.Message, reply: bytes, stream: bool, local: bool = False) -> None:
        if self._learn is not None and query.question is not None and query.question.rtype in (Rtype.A, Rtype.AAAA):
            self._note_names(query, reply, local)  # before the guest can use the address
        reply = asker.id.to_bytes(2) + reply[2:]
        if not stream and len(reply) > (limit := dm.limit_of(query)):
            reply = dm.truncate(dm.parse(reply), limit)
        asker.answer(reply)

    def _forward(self, query: dm.Message, asker: _Asker, *, stream: bool) -> bool:
        key = (stream, query.data[2:])
        pending = self._pending.get(key)
        full = len(self._pending) >= self._limits.under_way if pending is None else (
            len(pending.askers) >= self._limits.joined)
        if not self._servers:
            self._servfail(asker, query, stream)
            return True
        if pending is not None and not stream and any(
                (a.who, a.id) == (asker.who, asker.id) for a in pending.askers):
            return True  # the guest repeats itself; its answer is on the way
        if full:
            self._count("drop_dns_limit")
            if not stream:
                return False
            self._servfail(asker, query, stream)
            return True
        if pending is not None:
            pending.askers.append(asker)
            return True
        pending = _Pending(key, query, self._loop.clock() + self._limits.total_s, stream=stream)
        pending.askers.append(asker)
        self._pending[key] = pending
        if self._preferred and self._loop.clock() >= self._preferred_until:
            self._preferred = 0
        pending.restart(self._servers, self._preferred)
        self._try_next(pending)
        return True

    def _servfail(self, asker: _Asker, query: dm.Message, stream: bool) -> None:
        self._count("dns_servfail")
        self._deliver(asker, query, dm.respond(query, query.data, Rcode.SERVFAIL), stream)

    # --- to the servers ---

    def _try_next(self, pending: _Pending) -> None:
        """Ask the next server that has not refused; if there is none or no time, end with SERVFAIL."""
        if pending.timer is not None:
            pending.timer.cancel()
            pending.timer = None
        n = len(pending.servers)
        while True:
            left = pending.deadline - self._loop.clock()
            server = next((i % n for i in range(pending.cursor, pending.cursor + n) if i % n not in pending.refused),
                          None)
            if server is None or left <= 0:
                self._fail(pending)
                return
            pending.cursor = server + 1
            try:
                self._ask(pending, server)
            except OSError as err:  # no route, no descriptor, unknown interface
                log.debug("%s: %s", pending.servers[server], err)
                pending.refused.add(server)
                continue
            break
        wait = self._limits.next_s if pending.tries else self._limits.first_s
        pending.tries += 1
        pending.timer = self._loop.after(min(wait, left), lambda: self._try_next(pending))

    def _ask(self, pending: _Pending, server: int) -> None:
        """Raises OSError if the host's network refuses at once."""
        family, address = pending.servers[server].sockaddr()
        kind = socket.SOCK_STREAM if pending.stream else socket.SOCK_DGRAM
        ident = self._random_id()  # RFC 5452 9.2: unpredictable; so is the port, which the kernel chooses in connect()
        message = ident.to_bytes(2) + pending.query.data[2:]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            attempt = _Attempt(server, sock, ident, message, stream=pending.stream)
            try:
                sock.connect(address)
            except BlockingIOError:  # TCP: EINPROGRESS
                pass
            if not pending.stream:
                sock.send(message)
            self._loop.watch(sock.fileno(), WRITE if pending.stream else READ,
                             lambda _events: self._ready(pending, attempt))
        except BaseException:
            sock.close()
            raise
        pending.attempts.append(attempt)
        self._count("dns_forwarded")

    def _ready(self, pending: _Pending, attempt: _Attempt) -> None:
        """Something on an upstream socket: reply, error, or room to write."""
        try:
            reply = self._read_stream(pending, attempt) if attempt.stream else self._read_datagram(pending, attempt)
        except BlockingIOError:
            return
        except (OSError, EOFError, dm.DnsFormatError) as err:  # ICMP refused or unreachable; TCP reset or closed early
            log.debug("%s: %s", pending.servers[attempt.server], err)
            self._refused(pending, attempt)
            return
        if reply is None:
            return
        if reply.rcode in (Rcode.SERVFAIL, Rcode.REFUSED) or reply.question is None:
            if reply.rcode == Rcode.SERVFAIL and reply.question is not None:
                pending.failure = reply
            self._refused(pending, attempt)
            return
        if attempt.server != self._preferred and pending.servers is self._servers:
            # Stand-in: asking the silent one first each time would cost every query its timeout.
            self._preferred = attempt.server
            self._preferred_until = self._loop.clock() + self._limits.prefer_s
        self.cache.put(pending.query, reply)
        self._finish(pending, reply.data)

    def _read_datagram(self, pending: _Pending, attempt: _Attempt) -> dm.Message | None:
        """The reply among what waits on the socket. Raises BlockingIOError if it is not there yet, OSError for an
        ICMP error."""
        for _ in range(16):  # a flood of forgeries must not keep the loop here
            data = attempt.sock.recv(MESSAGE_MAX)
            if (reply := self._match(pending, attempt, data)) is not None:
                return reply
            self._count("drop_dns_reply")
        return None

    def _read_stream(self, pending: _Pending, attempt: _Attempt) -> dm.Message | None:
        """Write what is left of the query, then read the reply; None: more to come."""
        if attempt.out:
            if err := attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(err, "connect")
            attempt.out = attempt.out[attempt.sock.send(attempt.out):]
            if not attempt.out:
                self._loop.watch(attempt.sock.fileno(), READ, lambda _events: self._ready(pending, attempt))
            return None
        chunk = attempt.sock.recv(MESSAGE_MAX + 2)
        if not chunk:
            raise EOFError("closed before the reply")
        attempt.inbox += chunk
        if len(attempt.inbox) < 2 or len(attempt.inbox) < 2 + (length := int.from_bytes(attempt.inbox[:2])):
            return None
        reply = self._match(pending, attempt, bytes(attempt.inbox[2 : 2 + length]))
        if reply is None:
            self._count("drop_dns_reply")
            raise EOFError("reply to another query")
        return reply

    def _match(self, pending: _Pending, attempt: _Attempt, data: bytes) -> dm.Message | None:
        """The reply if it is one to what we sent (RFC 5452 4 and 9.1), else None."""
        question = pending.query.question
        assert question is not None
        if len(data) < dm.HEADER:
            return None
        ident, flags = struct.unpack_from("!HH", data)
        if ident != attempt.id or not flags & dm.QR or flags >> 11 & 15:
            return None
        try:
            reply = dm.parse(data)
        except dm.DnsFormatError:
            # Some servers cut a long reply anywhere and set TC. All the guest needs of it is that bit.
            end = dm.HEADER + len(question.wire)
            if attempt.stream or not flags & dm.TC or data[4:6] != b"\0\1" or data[dm.HEADER : end] != question.wire:
                return None
            return dm.parse(data[:6] + bytes(6) + question.wire)
        if reply.question is None:
            # Servers that could not read the query answer with a bare header; never an answer to pass on.
            return reply if reply.rcode in FAILURES else None
        return reply if reply.question.wire == question.wire else None

    def _refused(self, pending: _Pending, attempt: _Attempt) -> None:
        """This server will not answer this query. The next one is asked now, unless a later try is under way."""
        pending.refused.add(attempt.server)
        newest = pending.attempts[-1] is attempt
        for each in [a for a in pending.attempts if a.server == attempt.server]:
            pending.attempts.remove(each)
            self._drop(each)
        if newest or not pending.attempts:
            self._try_next(pending)

    def _drop(self, attempt: _Attempt) -> None:
        self._loop.unwatch(attempt.sock.fileno())
        attempt.sock.close()

    def _stop(self, pending: _Pending) -> None:
        if pending.timer is not None:
            pending.timer.cancel()
            pending.timer = None
        for attempt in pending.attempts:
            self._drop(attempt)
        pending.attempts.clear()

    def _fail(self, pending: _Pending) -> None:
        if pending.failure is not None:
            self._count("dns_servfail")
            self._finish(pending, pending.failure.data)
            return
        self._count("dns_servfail")
        self._finish(pending, dm.respond(pending.query, pending.query.data, Rcode.SERVFAIL))

    def _finish(self, pending: _Pending, reply: bytes) -> None:
        self._stop(pending)
        self._pending.pop(pending.key, None)
        for asker in pending.askers:
            self._deliver(asker, pending.query, reply, pending.stream)


class _Stream:
    """One TCP connection from the guest: queries in, each behind its length; replies out as they come, in any order
    (RFC 7766 6.2.1.1)."""

    def __init__(self, forwarder: DnsForwarder, loop: Loop, sock: socket.socket, limits: Limits) -> None:
        self._forwarder = forwarder
        self._loop = loop
        self._sock = sock
        self._limits = limits
        self._in = bytearray()
        self._out = bytearray()
        self._waiting = 0  # queries without a reply yet
        self._eof = False
        self._pumping = False
        self._closed = False
        self._watched = 0
        self._timer = loop.after(limits.idle_s, self._idle)
        self._update()

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._out

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._forwarder.stream_gone(self)

    def _touch(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.after(self._limits.idle_s, self._idle)
        self._forwarder.stream_used(self)

    def _idle(self) -> None:
        """No whole query came and no reply was taken for so long. What waits for an upstream is bounded by its own
        time limit."""
        if self._waiting:
            self._touch()
        else:
            self.close()

    @property
    def _full(self) -> bool:
        return self._waiting >= self._limits.stream_queries or len(self._out) >= self._limits.stream_out

    def _update(self) -> None:
        """Watch for what we can use now; close when there is nothing left to do."""
        if self._closed:
            return
        if self._eof and self.idle:
            self.close()
            return
        want = (0 if self._eof or self._full else READ) | (WRITE if self._out else 0)
        if want == self._watched:
            return
        self._watched = want
        if want:
            self._loop.watch(self._sock.fileno(), want, self._ready)
        else:
            self._loop.unwatch(self._sock.fileno())

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._flush()
            if events & READ and not self._eof and not self._full:
                chunk = self._sock.recv(MESSAGE_MAX + 2)
                self._eof = not chunk
                self._in += chunk
        except BlockingIOError:
            pass
        except OSError:  # reset by the guest
            self.close()
            return
        self._pump()

    def _pump(self) -> None:
        """Take whole queries from what was read, as long as replies have room. A query may be answered within
        query(); then _answer() finds us at work and leaves the rest to this loop."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while not self._closed and not self._full and len(self._in) >= 2:
                length = int.from_bytes(self._in[:2])
                if len(self._in) < 2 + length:
                    break
                message = bytes(self._in[2 : 2 + length])
                del self._in[: 2 + length]
                self._waiting += 1
                self._touch()
                if not self._forwarder.query(message, self._answer, stream=True):
                    self.close()  # not a query at all: whoever sends that cannot be trusted to frame messages
                    return
                if self._full:
                    self._flush()  # makes room for what was read already: no event would tell of that
            if self._out and not self._closed:
                self._flush()
        except OSError:
            self.close()
        finally:
            self._pumping = False
        self._update()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
                self._touch()
        except BlockingIOError:
            pass

    def _answer(self, reply: bytes) -> None:
        if self._closed:
            return
        self._waiting -= 1
        self._out += struct.pack("!H", len(reply)) + reply
        self._pump()
