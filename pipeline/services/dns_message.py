"""DNS messages: what a forwarder must read and write, and no more (RFC 1035 4, EDNS RFC 6891).

Every read is checked against the message; whatever a message contains, parse functions return or raise
DnsFormatError. Names stay in wire form (length-prefixed labels, uncompressed), lower-cased where they are
compared: names are bytes, not text (RFC 2181 11).
"""
from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from msgspec import Struct

HEADER = 12  # bytes (RFC 1035 4.1.1)
NAME_MAX = 255  # bytes of a name on the wire (RFC 1035 2.3.4)
LABEL_MAX = 63
UDP_MAX = 512  # bytes without EDNS (RFC 1035 4.2.1)
IPV4_UDP_MAX = 65507  # bytes: 65535 less IP and UDP headers (RFC 791 3.1, RFC 768)
IN = 1
ANY_CLASS = 255

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
EDNS_DO = 0x8000  # in the OPT record's TTL, low half (RFC 3225 3)
EDNS_CLIENT_SUBNET = 8  # RFC 7871 6


class Rtype(enum.IntEnum):
    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    SIG = 24
    AAAA = 28
    OPT = 41
    TSIG = 250
    IXFR = 251
    AXFR = 252
    ANY = 255


class Rcode(enum.IntEnum):
    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16  # RFC 6891 9; the upper bits lie in the OPT record


class DnsFormatError(ValueError):
    """The message breaks RFC 1035; the text says where."""


class Record(Struct, frozen=True):
    """One resource record and where it lies."""

    name: bytes
    rtype: int
    rclass: int
    ttl: int  # seconds; for OPT: extended rcode, version, flags
    start: int  # offset of the name
    ttl_at: int  # offset of the TTL
    rdata_at: int
    rdata_len: int
    section: int  # 1 answer, 2 authority, 3 additional

    @property
    def end(self) -> int:
        return self.rdata_at + self.rdata_len


class Edns(Struct, frozen=True):
    size: int  # bytes of UDP payload the sender takes, at least 512 (RFC 6891 6.2.3)
    version: int
    do: bool  # DNSSEC OK
    extended_rcode: int  # upper 8 of 12 bits
    subnet: bool  # carries a client subnet: the answer holds for this client only


class Question(Struct, frozen=True):
    name: bytes  # wire form, as asked
    rtype: int
    rclass: int
    wire: bytes  # name, type, class, as in the message

    @property
    def folded(self) -> bytes:
        return self.name.lower()


class Message(Struct, frozen=True):
    """A parsed message; records are only walked, not decoded."""

    id: int
    flags: int
    question: Question | None
    records: tuple[Record, ...]
    edns: Edns | None
    data: bytes
    end: int  # offset behind the last record

    @property
    def opcode(self) -> int:
        return self.flags >> 11 & 15

    @property
    def rcode(self) -> int:
        return self.flags & 15 | (self.edns.extended_rcode << 4 if self.edns else 0)


def read_name(data: bytes, at: int) -> tuple[bytes, int]:
    """Name at an offset: (uncompressed wire form, offset behind it). Raises DnsFormatError.

    A pointer must point before the place where the name, or the part of it read last, began: "a prior
    occurrence" (RFC 1035 4.1.4), and what it points to must end before that place too. So the walk ends, whatever the
    bytes are.
    """
    out = bytearray()
    bound = at  # pointers must go below
    limit = len(data)  # and what they point to must end here
    end = 0
    while True:
        if at >= limit:
            raise DnsFormatError("name runs past the end")
        length = data[at]
        if length & 0xC0 == 0xC0:
            if at + 2 > limit:
                raise DnsFormatError("pointer runs past the end")
            target = (length & 0x3F) << 8 | data[at + 1]
            if target >= bound or target < HEADER:
                raise DnsFormatError(f"pointer at {at} to {target} does not point back into the message")
            end = end or at + 2
            limit = bound
            at = bound = target
            continue
        if length & 0xC0:
            raise DnsFormatError(f"label type {length >> 6} is not defined")
        at += 1
        if at + length > limit:
            raise DnsFormatError("label runs past the end")
        out.append(length)
        out += data[at : at + length]
        at += length
        if len(out) > NAME_MAX:
            raise DnsFormatError("name is over 255 bytes")
        if not length:
            return bytes(out), end or at


def _read_edns(data: bytes, opt: Record) -> Edns:
    if opt.name != b"\0":
        raise DnsFormatError("OPT record with an owner name")  # RFC 6891 6.1.2: MUST be the root
    at, subnet = opt.rdata_at, False
    while at < opt.end:
        if at + 4 > opt.end:
            raise DnsFormatError("EDNS option header is cut")
        code, length = struct.unpack_from("!HH", data, at)
        at += 4 + length
        if at > opt.end:
            raise DnsFormatError("EDNS option runs past the record")
        subnet = subnet or code == EDNS_CLIENT_SUBNET
    return Edns(size=max(UDP_MAX, opt.rclass), version=opt.ttl >> 16 & 255, do=bool(opt.ttl & EDNS_DO),
                extended_rcode=opt.ttl >> 24, subnet=subnet)


def parse(data: bytes) -> Message:
    """Whole message. Raises DnsFormatError if a count or a length does not hold; bytes behind the last record
    are not looked at. `question` is None only if there is none; more than one is an error (RFC 9619)."""
    if len(data) < HEADER:
        raise DnsFormatError(f"{len(data)} bytes, a header has {HEADER}")
    ident, flags, qdcount, *counts = struct.unpack_from("!6H", data)
    if qdcount > 1:
        raise DnsFormatError(f"{qdcount} questions")
    at, question = HEADER, None
    if qdcount:
        name, at = read_name(data, HEADER)
        if at + 4 > len(data):
            raise DnsFormatError("question is cut")
        rtype, rclass = struct.unpack_from("!HH", data, at)
        at += 4
        question = Question(name=name, rtype=rtype, rclass=rclass, wire=data[HEADER:at])
        if len(question.wire) != len(name) + 4:
            raise DnsFormatError("compressed question")  # nothing stands before it to point at
    records: list[Record] = []
    opt: Record | None = None
    for section, count in enumerate(counts, 1):
        for _ in range(count):
            start = at
            name, at = read_name(data, at)
            if at + 10 > len(data):
                raise DnsFormatError("record is cut")
            rtype, rclass, ttl, length = struct.unpack_from("!HHIH", data, at)
            record = Record(name=name, rtype=rtype, rclass=rclass, ttl=ttl, start=start, ttl_at=at + 4,
                            rdata_at=at + 10, rdata_len=length, section=section)
            at = record.end
            if at > len(data):
                raise DnsFormatError("record data runs past the end")
            if rtype == Rtype.OPT:
                if section != 3 or opt is not None:
                    raise DnsFormatError("OPT record twice or not in the additional section")  # RFC 6891 6.1.1
                opt = record
            records.append(record)
    edns = _read_edns(data, opt) if opt is not None else None
    return Message(id=ident, flags=flags, question=question, records=tuple(records), edns=edns, data=data, end=at)


def encode_name(name: str) -> bytes:
    """Wire form of a host name in text, with or without the final dot; other scripts by IDNA.
    Raises DnsFormatError if a label is empty or over 63 bytes, or the name over 255."""
    out = bytearray()
    try:
        labels = [p.encode() if p.isascii() else p.encode("idna") for p in name.removesuffix(".").split(".")]
    except UnicodeError as err:
        raise DnsFormatError(f"{name!r}: {err}") from None
    for label in labels if labels != [b""] else []:
        if not 0 < len(label) <= LABEL_MAX:
            raise DnsFormatError(f"{name!r}: a label has 1 to {LABEL_MAX} bytes")
        out.append(len(label))
        out += label
    out.append(0)
    if len(out) > NAME_MAX:
        raise DnsFormatError(f"{name!r}: over {NAME_MAX} bytes")
    return bytes(out)


def labels_of(name: bytes) -> list[bytes]:
    """Labels of an uncompressed wire name, without the root."""
    out, at = [], 0
    while name[at]:
        out.append(name[at + 1 : at + 1 + name[at]])
        at += 1 + name[at]
    return out


def parents_of(name: bytes) -> Iterator[bytes]:
    """The name itself, then each parent, the root last; wire form."""
    at = 0
    while True:
        yield name[at:]
        if not name[at]:
            return
        at += 1 + name[at]


def reverse_name(address: IPv4Address | IPv6Address) -> bytes:
    """Wire name that PTR records of an address stand at (RFC 1035 3.5, RFC 3596 2.5)."""
    return encode_name(address.reverse_pointer)


def opt_record(*, size: int, do: bool = False, extended_rcode: int = 0) -> bytes:
    """An OPT record without options, version 0 (RFC 6891 6.1.2)."""
    return struct.pack("!BHHBBHH", 0, Rtype.OPT, size, extended_rcode, 0, EDNS_DO if do else 0, 0)


def resource(name: bytes, rtype: int, ttl: int, rdata: bytes) -> bytes:
    """One record of class IN, name uncompressed or a pointer."""
    return name + struct.pack("!HHIH", rtype, IN, ttl, len(rdata)) + rdata


def soa_rdata(mname: bytes, rname: bytes, *, minimum: int) -> bytes:
    """SOA data (RFC 1035 3.3.13); only `minimum`, the negative TTL, means something for us (RFC 2308 4)."""
    return mname + rname + struct.pack("!5I", 1, 3600, 600, 86400, minimum)


OUR_UDP_SIZE = 1232  # bytes told in OPT records of our own (RFC 9715 3)


def respond(query: Message | None, data: bytes, rcode: int, *, answers: list[bytes] | None = None,
            authority: list[bytes] | None = None, authoritative: bool = False) -> bytes:
    """Response to a query in `data`, of which at least the header is there; `query` is None if it did not parse.

    Counts are those of what is written (ArcBox fault 35 copied ARCOUNT from the query). An OPT record is added
    if, and only if, the query had one (RFC 6891 7).
    """
    ident, qflags = struct.unpack_from("!HH", data)
    flags = QR | qflags & (0x7800 | RD | CD) | RA | rcode & 15  # RFC 1035 4.1.1; CD: RFC 4035 3.2.2
    if authoritative:
        flags |= AA
    question = query.question.wire if query is not None and query.question is not None else b""
    extra = b""
    if query is not None and query.edns is not None:
        extra = opt_record(size=OUR_UDP_SIZE, do=query.edns.do, extended_rcode=rcode >> 4)
    answers, authority = answers or [], authority or []
    head = struct.pack("!6H", ident, flags, 1 if question else 0, len(answers), len(authority), 1 if extra else 0)
    return head + question + b"".join(answers) + b"".join(authority) + extra


def limit_of(query: Message | None) -> int:
    """Bytes of UDP payload the asker takes."""
    size = query.edns.size if query is not None and query.edns is not None else UDP_MAX
    return min(size, IPV4_UDP_MAX)


def truncate(reply: Message, limit: int) -> bytes:
    """The reply if it fits; else header with TC, question and OPT, no other record (RFC 2181 9): the asker
    comes back over TCP. Of the OPT record's options nothing is kept."""
    if len(reply.data) <= limit:
        return reply.data
    question = reply.question.wire if reply.question is not None else b""
    extra = b""
    if reply.edns is not None:
        extra = opt_record(size=OUR_UDP_SIZE, do=reply.edns.do, extended_rcode=reply.edns.extended_rcode)
    return struct.pack("!6H", reply.id, reply.flags | TC, 1 if question else 0, 0, 0, 1 if extra else 0) + (
        question + extra)
