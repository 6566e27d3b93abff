"""DHCP server for one link (RFC 2131, options RFC 2132).

Theory of operation
  `DhcpServer.handle()` takes one message and returns the replies; it does no input or output but the lease
  file, and asks the injected clock for the time (seconds since the epoch: leases outlive the process).

  Who is who: a client is its client identifier (option 61), else its hardware type and address (RFC 2131 4.2).
  One address, at most one lease; the table is therefore no larger than the pool.

  A lease is OFFERED for `offer_s` (60 s), BOUND for `lease_s` once REQUEST was answered, FREE when it was
  released or ran out: the address may go to others, but its last owner gets it back while it can
  (RFC 2131 4.3.1). A declined address is quarantined for `quarantine_s` and has no lease (ArcBox fault 33:
  an offer must not hold an address for a day, and a declined one must not be offered again).

  Order of allocation, the same every time: the client's own address, the one it asks for (option 50), the
  first lease (`first`), the lowest address nobody had, the address free for longest, and last the oldest
  offer that was not taken up. Then there is none: no reply, counted.

  Departure from RFC 2131 4.3.2: a client we do not know that asks for a usable address in INIT-REBOOT,
  RENEWING or REBINDING gets it, where the RFC wants silence for the sake of other servers. There is none on
  this link, silence costs the guest 5-10 s at each session start, and `authoritative=False` brings it back.

Limits: Ethernet only; relays (giaddr) are ignored and counted; the pool counts 4096 addresses at most; client
identifier and host name up to 255 bytes.
"""
from __future__ import annotations

import contextlib
import enum
import ipaddress
import logging
import os
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

log = logging.getLogger("ringnet.services.dhcp")

SERVER_PORT = 67  # RFC 2131 4.1
CLIENT_PORT = 68
FIXED = 236  # bytes before the magic cookie (RFC 2131 2)
COOKIE = b"\x63\x82\x53\x63"  # RFC 2131 3
BOOTP_MIN = 300  # bytes; older clients and relays drop shorter messages (RFC 1542 2.1)
BROADCAST4 = IPv4Address("255.255.255.255")
BROADCAST_MAC = b"\xff" * 6
UNSPECIFIED = IPv4Address(0)
LEASE_FILE_MAX = 4 << 20  # bytes
ADDRESSES_MAX = 4096  # of a pool; a larger one is used up to here
SAVE_SLACK = 60  # seconds that an expiry in the lease file may be too early: see _bind()


class Type(enum.IntEnum):
    """Option 53 (RFC 2132 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Opt(enum.IntEnum):
    """Option codes: RFC 2132 unless said otherwise."""

    PAD = 0
    SUBNET_MASK = 1
    ROUTER = 3
    DNS = 6
    HOST_NAME = 12
    DOMAIN_NAME = 15
    MTU = 26
    BROADCAST = 28
    REQUESTED = 50
    LEASE_TIME = 51
    OVERLOAD = 52
    TYPE = 53
    SERVER_ID = 54
    PARAMETERS = 55
    MESSAGE = 56
    MAX_SIZE = 57
    T1 = 58
    T2 = 59
    CLIENT_ID = 61
    RAPID_COMMIT = 80  # RFC 4039
    RELAY = 82  # RFC 3046; ignored: no relay is on this link
    SEARCH = 119  # RFC 3397
    ROUTES = 121  # RFC 3442
    END = 255


class State(enum.StrEnum):
    OFFERED = "offered"
    BOUND = "bound"
    FREE = "free"  # remembered for its last owner


class DhcpConfig(Struct, frozen=True, kw_only=True):
    server: IPv4Address  # also router and DNS server, unless:
    network: IPv4Network
    first: IPv4Address  # the first lease, if nothing speaks against it
    pool_start: IPv4Address
    pool_end: IPv4Address  # inclusive
    mtu: int  # bytes of L3
    domain: str = ""
    search: tuple[str, ...] = ()
    lease_s: int = 86400
    offer_s: int = 60
    quarantine_s: int = 86400
    authoritative: bool = True  # see "Departure" above
    lease_file: str = ""  # "": memory only
    router: bool = True  # clients are told a default route through it
    resolver: bool = True  # they are told to ask it for names


class Lease(Struct, kw_only=True):
    address: IPv4Address
    key: bytes
    mac: bytes
    state: State
    since: float  # clock value of the last change of state
    expires: float  # seconds since the epoch
    hostname: str = ""
    saved: float = 0.0  # expiry that the lease file knows


class Reply(Struct, frozen=True):
    payload: bytes
    dst: IPv4Address
    dst_mac: bytes
    dst_port: int = CLIENT_PORT


class MalformedMessage(ValueError):
    """The message breaks RFC 2131 or 2132; the text says where."""


class Message(Struct, kw_only=True):
    """What we read of a client's message. Addresses are unspecified (0.0.0.0) where the client left them so."""

    xid: bytes
    secs: bytes
    broadcast: bool
    ciaddr: IPv4Address
    giaddr: IPv4Address
    chaddr: bytes  # 16 bytes, padded
    mac: bytes  # its first 6
    type: Type
    options: dict[int, bytes]

    @property
    def key(self) -> bytes:
        """RFC 2131 4.2: client identifier, else hardware type and address. The two cannot be equal."""
        if (ident := self.options.get(Opt.CLIENT_ID)) is not None:
            return b"\x01" + ident
        return b"\x00\x01" + self.mac

    def address(self, code: Opt) -> IPv4Address | None:
        """Option of one IPv4 address. Raises MalformedMessage if it has another length."""
        if (raw := self.options.get(code)) is None:
            return None
        if len(raw) != 4:
            raise MalformedMessage(f"option {code} has {len(raw)} bytes, not 4")
        return IPv4Address(raw)


def _scan_options(data: bytes, out: dict[int, list[bytes]]) -> None:
    """Options of one field. Raises MalformedMessage if one runs past its end."""
    i = 0
    while i < len(data):
        code = data[i]
        i += 1
        if code == Opt.PAD:
            continue
        if code == Opt.END:
            return
        if i >= len(data):
            raise MalformedMessage(f"option {code} has no length")
        length = data[i]
        i += 1
        if length > len(data) - i:
            raise MalformedMessage(f"option {code} says {length} bytes, {len(data) - i} are left")
        out.setdefault(code, []).append(data[i : i + length])
        i += length


def parse(data: bytes) -> Message:
    """Client message (RFC 2131 2). Raises MalformedMessage."""
    if len(data) < FIXED + len(COOKIE):
        raise MalformedMessage(f"{len(data)} bytes, a message has at least {FIXED + len(COOKIE)}")
    op, htype, hlen = data[0], data[1], data[2]
    if op != 1:
        raise MalformedMessage(f"op {op} is not BOOTREQUEST")
    if htype != 1 or hlen != 6:
        raise MalformedMessage(f"hardware type {htype} with {hlen} byte addresses is not Ethernet")
    if data[FIXED : FIXED + 4] != COOKIE:
        raise MalformedMessage("no magic cookie: BOOTP is not served")
    parts: dict[int, list[bytes]] = {}
    _scan_options(data[FIXED + 4 :], parts)
    # RFC 2132 9.3: 1 file, 2 sname, 3 both hold options; RFC 2131 4.1: file first, then sname.
    overload = parts.get(Opt.OVERLOAD, [b"\0"])[0]
    if len(overload) != 1:
        raise MalformedMessage("option 52 is not one byte")
    if overload[0] & 1:
        _scan_options(data[108:236], parts)
    if overload[0] & 2:
        _scan_options(data[44:108], parts)
    options = {code: b"".join(chunks) for code, chunks in parts.items()}  # RFC 3396 7: split options are joined
    raw_type = options.get(Opt.TYPE, b"")
    if len(raw_type) != 1 or raw_type[0] not in Type.__members__.values():
        raise MalformedMessage(f"message type {raw_type.hex() or 'absent'}")
    if not 0 < len(options.get(Opt.CLIENT_ID, b"\0")) <= 255:
        raise MalformedMessage("client identifier is empty or over 255 bytes")
    return Message(
        xid=data[4:8],
        secs=data[8:10],
        broadcast=bool(data[10] & 0x80),
        ciaddr=IPv4Address(data[12:16]),
        giaddr=IPv4Address(data[24:28]),
        chaddr=data[28:44],
        mac=data[28:34],
        type=Type(raw_type[0]),
        options=options,
    )


def encode_search(names: tuple[str, ...]) -> bytes:
    """Search list in DNS wire form with compression (RFC 3397 2, RFC 1035 4.1.4). Names that cannot be
    encoded (label over 63 bytes, name over 255) are left out: config refuses them earlier."""
    out = bytearray()
    seen: dict[bytes, int] = {}
    for name in names:
        try:
            parts = name.rstrip(".").split(".")
            labels = [part.encode() if part.isascii() else part.encode("idna") for part in parts]
        except UnicodeError:
            continue
        if any(not 0 < len(label) < 64 for label in labels) or sum(len(label) + 1 for label in labels) > 254:
            continue
        for i, label in enumerate(labels):
            rest = b".".join(labels[i:]).lower()
            if rest in seen:
                out += struct.pack("!H", 0xC000 | seen[rest])
                break
            if len(out) < 0x4000:
                seen[rest] = len(out)
            out += bytes([len(label)]) + label
        else:
            out.append(0)
    return bytes(out)


def encode_routes(routes: tuple[tuple[IPv4Network, IPv4Address], ...]) -> bytes:
    """Classless static routes (RFC 3442): prefix length, significant octets, router."""
    out = bytearray()
    for network, router in routes:
        out.append(network.prefixlen)
        out += network.network_address.packed[: (network.prefixlen + 7) // 8]
        out += router.packed
    return bytes(out)


class _StoredLease(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    address: str
    key: str  # hexadecimal
    mac: Annotated[str, Meta(pattern="^[0-9a-f]{12}$")]
    state: State
    since: float
    expires: float
    hostname: str = ""


class _LeaseFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=1)]
    leases: list[_StoredLease]
    quarantine: dict[str, float]  # address: until, seconds since the epoch


def no_count(name: str, n: int = 1) -> None:
    """Default counter sink: nobody watches."""


class DhcpServer:
    """State of one link's addresses. `count` gets names from csrc/rn_metrics.def."""

    def __init__(
        self,
        config: DhcpConfig,
        clock: Callable[[], float],
        count: Callable[[str], None] = no_count,
        leased: Callable[[Lease], None] = lambda lease: None,
    ) -> None:
        self.config = config
        self._leased = leased  # told of each lease given or renewed
        self._clock = clock
        self._count = count
        self._by_address: dict[IPv4Address, Lease] = {}
        self._by_key: dict[bytes, Lease] = {}
        self._quarantine: dict[IPv4Address, float] = {}
        self._file_failed = False
        reserved = {config.server, config.network.broadcast_address, config.network.network_address}
        low, high = int(config.pool_start), int(config.pool_end)
        order = [config.first] if low <= int(config.first) <= high else []
        order += [IPv4Address(n) for n in range(low, min(high, low + ADDRESSES_MAX - 1) + 1)]
        self._pool = {a: None for a in order if a in config.network and a not in reserved}  # ordered set
        if not self._pool:
            raise ValueError(f"pool {config.pool_start}-{config.pool_end} has no usable address in {config.network}")
        self._handlers: dict[Type, Callable[[Message, IPv4Address], list[Reply]]] = {
            Type.DISCOVER: self._discover,
            Type.REQUEST: self._request,
            Type.DECLINE: self._decline,
            Type.RELEASE: self._release,
            Type.INFORM: self._inform,
        }
        if config.lease_file:
            self._load()

    # --- messages ---

    def handle(self, payload: bytes, src_mac: bytes = b"", src: IPv4Address = UNSPECIFIED) -> list[Reply]:
        """Answer one message; never raises for what a client sent. `src` is the IP source (for INFORM)."""
        self._count("dhcp_requests")
        try:
            msg = parse(payload)
            if int(msg.giaddr):
                self._count("drop_dhcp_relayed")
                return []
            handler = self._handlers.get(msg.type)
            if handler is None:
                raise MalformedMessage(f"{msg.type.name} is a server's message")
            replies = handler(msg, src)
        except MalformedMessage as bad:
            self._count("drop_dhcp_bad")
            log.debug("message from %s dropped: %s", src_mac.hex(":"), bad)
            return []
        for _ in replies:
            self._count("dhcp_replies")
        return replies

    def leases(self) -> tuple[Lease, ...]:
        """Leases held now, by address; copies."""
        now = self._clock()
        held = (lease for lease in self._by_address.values() if self._held(lease, now))
        return tuple(sorted((msgspec.structs.replace(lease) for lease in held), key=lambda lease: lease.address))

    def quarantined(self) -> tuple[IPv4Address, ...]:
        """Declined addresses not to be given out yet."""
        now = self._clock()
        return tuple(sorted(a for a, until in self._quarantine.items() if until > now))

    def _discover(self, msg: Message, src: IPv4Address) -> list[Reply]:
        now = self._clock()
        address = self._choose(msg.key, msg.address(Opt.REQUESTED), now)
        if address is None:
            self._count("drop_dhcp_no_address")
            log.debug("no free address for %s", msg.mac.hex(":"))  # at the guest's will: no line for each
            return []
        if Opt.RAPID_COMMIT in msg.options:  # RFC 4039 3.1: commit at once and answer with an ACK
            self._bind(msg, address, now)
            return [self._reply(msg, Type.ACK, yiaddr=address, extra={Opt.RAPID_COMMIT: b""})]
        lease = self._by_key.get(msg.key)
        if lease is None or lease.address != address or not self._is_bound(lease, now):
            self._put(msg, address, State.OFFERED, now, now + self.config.offer_s)
        return [self._reply(msg, Type.OFFER, yiaddr=address)]

    def _request(self, msg: Message, src: IPv4Address) -> list[Reply]:
        """RFC 2131 4.3.2; which state the client is in shows in what it filled in."""
        now = self._clock()
        server_id = msg.address(Opt.SERVER_ID)
        requested = msg.address(Opt.REQUESTED)
        lease = self._by_key.get(msg.key)

        if server_id is not None and server_id != self.config.server:
            # SELECTING, another server: our offer is declined by that (3.1 step 3; ArcBox fault 34).
            if lease is not None and lease.state is State.OFFERED:
                self._forget(lease)
            return []
        if server_id is not None and requested is None and not int(msg.ciaddr):
            raise MalformedMessage("REQUEST in SELECTING without requested address")
        if int(msg.ciaddr):
            # RENEWING or REBINDING. Some clients add the server id there; ciaddr is what they use now.
            address = msg.ciaddr
        elif requested is not None:
            address = requested  # SELECTING or INIT-REBOOT
        else:
            raise MalformedMessage("REQUEST names no address")

        if lease is None and server_id is None and not self.config.authoritative and address in self.config.network:
            return []  # 4.3.2: no record of this client, remain silent
        if not self._usable(address, msg.key, now):
            return [self._nak(msg, f"{address} is not available")]
        if lease is not None and self._held(lease, now) and lease.address != address:
            # It holds another address. In SELECTING the client must take what was offered; elsewhere its
            # notion is wrong (4.3.2). It will come back with DISCOVER.
            return [self._nak(msg, f"your address is {lease.address}")]
        self._bind(msg, address, now)
        return [self._reply(msg, Type.ACK, yiaddr=address, ciaddr=msg.ciaddr)]

    def _decline(self, msg: Message, src: IPv4Address) -> list[Reply]:
        """RFC 2131 4.3.3: the address is in use by somebody we do not know."""
        now = self._clock()
        address = msg.address(Opt.REQUESTED)
        server_id = msg.address(Opt.SERVER_ID)
        if address is None:
            raise MalformedMessage("DECLINE without requested address")  # table 5: MUST
        if server_id is not None and server_id != self.config.server:
            return []
        lease = self._by_address.get(address)
        if lease is None or lease.key != msg.key or not self._held(lease, now):
            raise MalformedMessage(f"DECLINE of {address}, which this client does not hold")
        log.warning("%s is in use by another host, says %s; not given out for %d s", address, msg.mac.hex(":"),
                    self.config.quarantine_s)
        self._forget(lease)
        self._quarantine[address] = now + self.config.quarantine_s
        self._save()
        return []

    def _release(self, msg: Message, src: IPv4Address) -> list[Reply]:
        """RFC 2131 4.3.4: free, but remembered for this client."""
        now = self._clock()
        server_id = msg.address(Opt.SERVER_ID)
        if server_id is not None and server_id != self.config.server:
            return []
        lease = self._by_address.get(msg.ciaddr)
        if lease is None or lease.key != msg.key or not self._held(lease, now):
            raise MalformedMessage(f"RELEASE of {msg.ciaddr}, which this client does not hold")
        lease.state, lease.since, lease.expires = State.FREE, now, now
        self._save()
        return []

    def _inform(self, msg: Message, src: IPv4Address) -> list[Reply]:
        """RFC 2131 4.3.5: parameters only, to ciaddr, no lease."""
        to = msg.ciaddr if int(msg.ciaddr) else src
        if not int(to) or to not in self.config.network or to == self.config.network.broadcast_address:
            raise MalformedMessage(f"INFORM from {to}, which is not an address of {self.config.network}")
        reply = self._build(msg, Type.ACK, UNSPECIFIED, msg.ciaddr, self._parameters(msg, lease=False))
        return [Reply(reply, to, msg.mac)]

    # --- leases ---

    def _is_bound(self, lease: Lease, now: float) -> bool:
        return lease.state is State.BOUND and lease.expires > now

    def _held(self, lease: Lease, now: float) -> bool:
        """Nobody else may have the address."""
        return lease.state is not State.FREE and lease.expires > now

    def _usable(self, address: IPv4Address, key: bytes, now: float) -> bool:
        """In the pool, not quarantined, and free or this client's own."""
        if address not in self._pool:
            return False
        until = self._quarantine.get(address)
        if until is not None:
            if until > now:
                return False
            del self._quarantine[address]
        lease = self._by_address.get(address)
        return lease is None or lease.key == key or not self._held(lease, now)

    def _choose(self, key: bytes, requested: IPv4Address | None, now: float) -> IPv4Address | None:
        """RFC 2131 4.3.1: own address, the one asked for, then our own order (see top)."""
        own = self._by_key.get(key)
        if own is not None and self._usable(own.address, key, now):
            return own.address
        if requested is not None and self._usable(requested, key, now):
            return requested
        oldest_free: Lease | None = None
        oldest_offer: Lease | None = None
        for address in self._pool:
            lease = self._by_address.get(address)
            if lease is None:
                if self._usable(address, key, now):
                    return address
            elif not self._held(lease, now):
                if oldest_free is None or lease.expires < oldest_free.expires:
                    oldest_free = lease
            elif lease.state is State.OFFERED and (oldest_offer is None or lease.since < oldest_offer.since):
                oldest_offer = lease
        chosen = oldest_free or oldest_offer
        return chosen.address if chosen is not None else None

    def _put(self, msg: Message, address: IPv4Address, state: State, now: float, expires: float) -> None:
        """Give the address to this client; what client and address had before is forgotten."""
        for old in (self._by_key.get(msg.key), self._by_address.get(address)):
            if old is not None:
                self._forget(old)
        hostname = msg.options.get(Opt.HOST_NAME, b"")[:255].rstrip(b"\0").decode("ascii", "replace")
        lease = Lease(address=address, key=msg.key, mac=msg.mac, state=state, since=now, expires=expires,
                      hostname="".join(c if c.isprintable() else "?" for c in hostname))
        self._by_key[lease.key] = lease
        self._by_address[address] = lease

    def _bind(self, msg: Message, address: IPv4Address, now: float) -> None:
        old = self._by_address.get(address)
        # A renewal storm must not become an fsync storm: an expiry moved by less than a minute can wait for
        # the next write; _load() adds that minute.
        expires = now + self.config.lease_s
        self._put(msg, address, State.BOUND, now, expires)
        self._leased(self._by_address[address])
        renewed = old is not None and old.key == msg.key and old.state is State.BOUND
        if renewed and 0 <= expires - old.saved < SAVE_SLACK:
            self._by_address[address].saved = old.saved
            return
        self._save()

    def _forget(self, lease: Lease) -> None:
        if self._by_key.get(lease.key) is lease:
            del self._by_key[lease.key]
        if self._by_address.get(lease.address) is lease:
            del self._by_address[lease.address]

    # --- replies ---

    def _parameters(self, msg: Message, *, lease: bool) -> list[tuple[int, bytes]]:
        """Options in the order asked for (RFC 2132 9.8), then what a client needs and did not ask for."""
        cfg = self.config
        have: dict[int, bytes] = {
            Opt.SUBNET_MASK: cfg.network.netmask.packed,
            Opt.MTU: struct.pack("!H", cfg.mtu),
            Opt.BROADCAST: cfg.network.broadcast_address.packed,
        }
        if cfg.router:
            have[Opt.ROUTER] = cfg.server.packed
            # RFC 3442: a client that takes 121 ignores 3, so the default route stands in it too.
            have[Opt.ROUTES] = encode_routes(((IPv4Network("0.0.0.0/0"), cfg.server),))
        if cfg.resolver:
            have[Opt.DNS] = cfg.server.packed
        if cfg.domain:
            have[Opt.DOMAIN_NAME] = cfg.domain.encode("ascii", "ignore")
        if search := encode_search(cfg.search):
            have[Opt.SEARCH] = search
        out: list[tuple[int, bytes]] = [(Opt.TYPE, b""), (Opt.SERVER_ID, cfg.server.packed)]  # type: filled in later
        if lease:
            out += [
                (Opt.LEASE_TIME, struct.pack("!I", cfg.lease_s)),
                (Opt.T1, struct.pack("!I", cfg.lease_s // 2)),  # RFC 2131 4.4.5
                (Opt.T2, struct.pack("!I", cfg.lease_s * 7 // 8)),
            ]
        asked = msg.options.get(Opt.PARAMETERS)
        needed = [Opt.SUBNET_MASK, Opt.ROUTER, Opt.DNS, Opt.MTU]
        if asked is None:
            wanted = [*needed, Opt.BROADCAST, Opt.DOMAIN_NAME, Opt.SEARCH]
        else:
            # RFC 2132 3.3: the mask comes before the router, whatever the order asked for.
            wanted = [Opt.SUBNET_MASK, *asked, *needed]
        out += [(code, have[code]) for code in dict.fromkeys(wanted) if code in have]
        return out

    def _reply(self, msg: Message, kind: Type, *, yiaddr: IPv4Address, ciaddr: IPv4Address = UNSPECIFIED,
               extra: dict[int, bytes] | None = None) -> Reply:
        """OFFER or ACK, addressed as RFC 2131 4.1 says for giaddr 0."""
        options = self._parameters(msg, lease=True) + list((extra or {}).items())
        payload = self._build(msg, kind, yiaddr, ciaddr, options)
        if int(ciaddr):  # only REQUEST has one (table 5), and it was found usable
            return Reply(payload, ciaddr, msg.mac)
        if msg.broadcast:
            return Reply(payload, BROADCAST4, BROADCAST_MAC)
        return Reply(payload, yiaddr, msg.mac)

    def _nak(self, msg: Message, why: str) -> Reply:
        """RFC 2131 4.3.2, table 3: no address, no parameters; always broadcast (4.1)."""
        self._count("dhcp_naks")
        options = [(Opt.TYPE, b""), (Opt.SERVER_ID, self.config.server.packed), (Opt.MESSAGE, why.encode())]
        return Reply(self._build(msg, Type.NAK, UNSPECIFIED, UNSPECIFIED, options), BROADCAST4, BROADCAST_MAC)

    def _build(self, msg: Message, kind: Type, yiaddr: IPv4Address, ciaddr: IPv4Address,
               options: list[tuple[int, bytes]]) -> bytes:
        """Whole message, padded. Options that do not fit what the client takes (option 57) are left out,
        last first; those at the front are the ones it cannot do without."""
        limit = 576 - 28  # RFC 2131 2: what every client takes, without IP and UDP headers
        raw = msg.options.get(Opt.MAX_SIZE, b"")
        if len(raw) == 2:
            limit = max(limit, min(int.from_bytes(raw), self.config.mtu) - 28)
        head = struct.pack("!4B4s2sH4s4s4s4s16s192x", 2, 1, 6, 0, msg.xid, b"\0\0", 0x8000 if msg.broadcast else 0,
                           ciaddr.packed, yiaddr.packed, UNSPECIFIED.packed, UNSPECIFIED.packed, msg.chaddr)
        out = bytearray(head + COOKIE)
        tail = bytearray()
        if ident := msg.options.get(Opt.CLIENT_ID):  # RFC 6842 3: sent back as it came
            tail += _option(Opt.CLIENT_ID, ident)
        tail.append(Opt.END)
        for code, value in options:
            encoded = _option(code, bytes([kind]) if code == Opt.TYPE else value)
            if len(out) + len(encoded) + len(tail) <= limit:
                out += encoded
        out += tail
        return bytes(out.ljust(BOOTP_MIN, b"\0"))

    # --- lease file ---

    def _load(self) -> None:
        """Read the lease file; one that is not ours is put aside, and we start empty."""
        path = self.config.lease_file
        try:
            with open(path, "rb") as file:
                raw = file.read(LEASE_FILE_MAX + 1)
        except FileNotFoundError:
            return
        except OSError as err:
            log.error("lease file %s cannot be read (%s); starting with no leases", path, err.strerror)
            return
        try:
            if len(raw) > LEASE_FILE_MAX:
                raise ValueError(f"over {LEASE_FILE_MAX} bytes")
            stored = msgspec.json.decode(raw, type=_LeaseFile)
            leases = [
                Lease(address=IPv4Address(s.address), key=bytes.fromhex(s.key), mac=bytes.fromhex(s.mac),
                      state=s.state, since=s.since, expires=s.expires, hostname=s.hostname)
                for s in stored.leases
            ]
            quarantine = {IPv4Address(a): until for a, until in stored.quarantine.items()}
        except (ValueError, msgspec.DecodeError) as err:  # DecodeError is not a ValueError in every version
            aside = f"{path}.bad"
            with contextlib.suppress(OSError):  # a read-only directory: say the same, leave it where it is
                os.replace(path, aside)
            log.error("lease file %s is not readable as leases (%s); kept as %s, starting with no leases", path, err,
                      aside)
            return
        now = self._clock()
        for lease in leases:
            # The pool may have changed since; a lease outside it is void. Never believe an expiry further
            # away than a whole lease: the host's clock may have been set back.
            if lease.address not in self._pool or lease.address in self._by_address or lease.key in self._by_key:
                continue
            lease.expires = min(lease.expires + SAVE_SLACK, now + self.config.lease_s)
            self._by_address[lease.address] = lease
            self._by_key[lease.key] = lease
        self._quarantine = {a: min(until, now + self.config.quarantine_s) for a, until in quarantine.items()
                            if a in self._pool and until > now}

    def _save(self) -> None:
        """Write bound and remembered leases atomically: new file, fsync, rename, fsync of the directory."""
        path = self.config.lease_file
        if not path:
            return
        stored = _LeaseFile(
            version=1,
            leases=[
                _StoredLease(address=str(x.address), key=x.key.hex(), mac=x.mac.hex(), state=x.state, since=x.since,
                             expires=x.expires, hostname=x.hostname)
                for x in self._by_address.values() if x.state is not State.OFFERED
            ],
            quarantine={str(a): until for a, until in self._quarantine.items()},
        )
        new = f"{path}.new"
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(stored)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            dirfd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(dirfd)
            finally:
                os.close(dirfd)
        except OSError as err:
            if not self._file_failed:  # once: the lease holds in memory, and the guest must not flood the log
                log.error("lease file %s cannot be written (%s); leases will not survive a restart", path, err.strerror)
            self._file_failed = True
        else:
            self._file_failed = False
            for lease in self._by_address.values():
                lease.saved = lease.expires


def _option(code: int, value: bytes) -> bytes:
    """Code, length, value; longer than 255 bytes in several pieces (RFC 3396 5)."""
    pieces = [value[i : i + 255] for i in range(0, len(value), 255)] or [b""]
    return b"".join(bytes([code, len(piece)]) + piece for piece in pieces)


def config_from(*, gateway4: str, prefix: int, guest4: str, pool_start: str, pool_end: str, mtu: int, domain: str,
                search: list[str], lease_s: int, lease_file: str) -> DhcpConfig:
    """From the texts of the stage's Config. Raises ValueError (ipaddress) for one that is no address."""
    return DhcpConfig(
        server=IPv4Address(gateway4),
        network=ipaddress.IPv4Network((gateway4, prefix), strict=False),
        first=IPv4Address(guest4),
        pool_start=IPv4Address(pool_start),
        pool_end=IPv4Address(pool_end),
        mtu=mtu,
        domain=domain,
        search=tuple(search),
        lease_s=lease_s,
        lease_file=lease_file,
    )
