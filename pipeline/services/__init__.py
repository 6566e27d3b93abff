"""services: DHCP server, DNS forwarder and hosts table.

In:      UDP datagrams to port 67 and to gateway:53, from classify; DNS over TCP on a Unix socket that egress
         bridges the guest's TCP to gateway:53 to.
Out:     UDP replies on the ring to the guest; DNS queries to the host's resolvers.
Source:  DHCP RFC 2131 and 2132 (dhcp.py); DNS RFC 1035, 5452, 5625, 7766 (dns.py); see README.md here.

The loop is Python: this is a few hundred messages a second, and tables and text. One thread; everything is an
event or a deadline, nothing polls.
"""
from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Annotated, Any

from msgspec import Meta, Struct

from pipeline.messages import HostsChange, Leased, Nic2Dhcp, Notices
from pipeline.services.bridge import BridgeDhcp
from pipeline.services.dhcp import DhcpServer, Lease, config_from
from pipeline.services.dns import DnsForwarder
from pipeline.services.hosts import Address, HostsTable
from pipeline.services.loop import READ, Loop
from pipeline.services.resolv import ResolvWatcher, Upstream, parse_nameservers
from pipeline.stage import Ended, StageContext, StageError
from shm._dataplane import ffi, lib
from shm.names import NamesWriter

log = logging.getLogger("ringnet.services")

BATCH = 64  # datagrams a turn: bounds the time until control, sockets and timers are looked at
PAYLOAD_MAX = 65507  # bytes; RFC 768 within RFC 791's total length
NOTICE_RATE, NOTICE_BURST = 20.0, 64  # leases told, a second and at once
NAME_MIN_S, NAME_MAX_S = 300, 86400  # a name is kept: a program may use an address longer than its TTL says
DHCP_PORT = 67  # RFC 2131 4.1
DNS_PORT = 53  # RFC 1035 4.2


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="services"):
    gateway4: str  # router, DNS server, DHCP server: us
    prefix: Annotated[int, Meta(ge=1, le=30)]
    gateway_mac: str
    mtu: Annotated[int, Meta(ge=68, le=65535)]  # bytes of L3, told to the guest (option 26)
    guest4: str  # first lease
    pool_start: str
    pool_end: str  # inclusive
    dns: list[str] = []  # upstream resolvers, "ADDRESS" or "ADDRESS#PORT"; empty: those in resolv_conf
    resolv_conf: str = "/etc/resolv.conf"
    search: list[str] = []  # told to the guest (option 119)
    domain: str = "ringnet.internal"  # owned: never asked upstream; told to the guest (option 15)
    hosts: dict[str, list[str]] = {}  # name: addresses, or one name (an alias); besides host.DOMAIN and gateway.DOMAIN
    lease_file: str = ""  # "": leases end with the session
    learn_names: bool = False  # keep the names that answers gave addresses, for egress (csrc/rn_names.h)
    lease_s: Annotated[int, Meta(ge=60, le=0xFFFFFFFE)] = 86400  # seconds; the largest 32-bit value means for ever


class Bucket:
    """At most `burst` at once, `rate` a second."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = float(burst), clock()

    def take(self) -> bool:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def counter_sink(stage: Any) -> Callable[..., None]:
    """count(name, n=1) for the counters services may use. Raises KeyError for a name rn_metrics.def lacks."""
    index = {
        ffi.string(lib.rn_counter_name(i)).decode(): i
        for i in range(lib.rn_ncounters())
        if ffi.string(lib.rn_counter_stage(i)) in (b"services", b"all")
    }

    def count(name: str, n: int = 1) -> None:
        lib.rn_services_count(stage, index[name], n)

    return count


def _value(text: str) -> Address | str:
    """An address, or the name that another is an alias of; what is possible, HostsTable says."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return text


def same_user(sock: socket.socket) -> bool:
    """SO_PEERCRED (unix(7)): is the other end a process of our own user? egress is; strangers are not."""
    _, uid, _ = ffi.unpack(
        ffi.cast("int *", ffi.from_buffer(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))), 3)
    return uid == os.geteuid()


class Services:
    """The stage's objects, tied to the ring. Tests drive it with a stage of their own."""

    def __init__(self, cfg: Config, stage: Any, loop: Loop, listener: socket.socket | None = None,
                 wall_clock: Callable[[], float] = time.time, names: NamesWriter | None = None,
                 seed: int | None = None) -> None:
        """seed: first identification of fragmented replies; random if None."""
        self.stage = stage
        self.loop = loop
        self.count = counter_sink(stage)
        conf = ffi.new("struct services_config *", {"mtu": cfg.mtu, "seed": int.from_bytes(os.urandom(2)) if seed is None else seed & 0xFFFF})
        if lib.stage_services_init(stage, conf) < 0:
            raise StageError(ffi.string(lib.rn_stage_error(stage)).decode())
        self._mac = bytes.fromhex(cfg.gateway_mac.replace(":", ""))
        self._gateway = IPv4Address(cfg.gateway4)
        self._in = ffi.new("struct services_datagram *")
        self._buf = ffi.new("uint8_t[]", PAYLOAD_MAX)
        self.dhcp = DhcpServer(
            config_from(gateway4=cfg.gateway4, prefix=cfg.prefix, guest4=cfg.guest4, pool_start=cfg.pool_start,
                        pool_end=cfg.pool_end, mtu=cfg.mtu, domain=cfg.domain, search=cfg.search,
                        lease_s=cfg.lease_s, lease_file=cfg.lease_file),
            clock=wall_clock, count=self.count, leased=self._leased)
        self.hosts = HostsTable(domain=cfg.domain, gateway=self._gateway, network=self.dhcp.config.network)
        for name, addresses in cfg.hosts.items():
            self.hosts.set(name, [_value(a) for a in addresses])
        self._change: list[HostsChange] = []  # parts of one change of the hosts table, as far as they came
        self.tell: Callable[[Leased], bool] = lambda notice: True
        self._notices = False
        self._rate = Bucket(NOTICE_RATE, NOTICE_BURST, loop.clock)
        self._lost = 0
        self._names = names if cfg.learn_names else None
        self.dns = DnsForwarder(loop, self.hosts, count=self.count, learn=self._learn if self._names else None)
        self._watcher: ResolvWatcher | None = None
        if cfg.dns:
            self.dns.set_upstreams([Upstream.parse(text) for text in cfg.dns])
        else:
            self._watcher = ResolvWatcher(cfg.resolv_conf, loop, self._resolv_changed)
        self._listener = listener
        if listener is not None:
            listener.setblocking(False)
            loop.watch(listener.fileno(), READ, self._accept)

    def change_hosts(self, part: HostsChange, _fds: list[int]) -> str:
        """Take a part of a change; at the last one all of it happens, or, with a reason returned, nothing."""
        self._change.append(part)
        if not part.commit:
            return ""
        parts, self._change = self._change, []
        names: dict[str, list[Address | str]] = {}
        try:
            for p in parts:
                names.update((n, [_value(a) for a in found]) for n, found in p.names.items())
            self.hosts.change(names, own=[d for p in parts for d in p.own], disown=[d for p in parts for d in p.disown])
        except ValueError as err:  # DnsFormatError too
            return str(err)
        return ""

    def set_notices(self, ask: Notices, _fds: list[int]) -> str:
        self._notices = ask.on
        return ""

    def _leased(self, lease: Lease) -> None:
        """A lease was given or renewed. Renewals are the guest's to send: so many a second are told, not more."""
        if not self._notices:
            return
        if self._rate.take() and self.tell(Leased(address=str(lease.address), mac=lease.mac.hex(":"),
                                                  hostname=lease.hostname, lost=self._lost,
                                                  seconds=max(0, int(lease.expires - lease.since)))):
            self._lost = 0
        else:
            self._lost += 1

    def _learn(self, address: Address, name: str, ttl: int, local: bool) -> None:
        assert self._names is not None
        seconds = min(max(ttl, NAME_MIN_S), NAME_MAX_S)
        self._names.set(address, name, now_ns=time.monotonic_ns(), seconds=seconds, local=local)

    def _resolv_changed(self, text: str) -> None:
        self.dns.set_upstreams(parse_nameservers(text))

    def _accept(self, _events: int) -> None:
        """Take what waits on the DNS-over-TCP socket. A flood from one guest is bounded by the forwarder."""
        assert self._listener is not None
        for _ in range(BATCH):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as err:  # EMFILE, ENFILE, ENOMEM: the connection waits in the backlog
                log.error("DNS over TCP: accept: %s", err.strerror)
                self.loop.unwatch(self._listener.fileno())  # level-triggered: it would spin
                self.loop.after(1.0, self._accept_again)
                return
            if same_user(sock):
                self.dns.accept(sock)
            else:
                log.warning("DNS over TCP: connection from another user refused")
                sock.close()

    def _accept_again(self) -> None:
        if self._listener is not None:
            self.loop.watch(self._listener.fileno(), READ, self._accept)

    def turn(self) -> bool:
        """One batch from the ring; true if there may be more."""
        for _ in range(BATCH):
            if lib.rn_services_recv(self.stage, self._in, self._buf, PAYLOAD_MAX) != 1:
                return False
            d = self._in
            payload = bytes(ffi.buffer(self._buf, d.len))
            src_mac = bytes(ffi.buffer(d.src_mac))
            src = bytes(ffi.buffer(d.src))[12:]
            if d.dst_port == DHCP_PORT:
                for reply in self.dhcp.handle(payload, src_mac, IPv4Address(src)):
                    self.send(reply.payload, reply.dst.packed, reply.dst_port, reply.dst_mac, DHCP_PORT,
                              self._gateway.packed)
            elif d.dst_port == DNS_PORT:
                dst, port = bytes(ffi.buffer(d.dst))[12:], int(d.src_port)

                def answer(reply: bytes, src: bytes = src, port: int = port, src_mac: bytes = src_mac,
                           dst: bytes = dst) -> None:
                    self.send(reply, src, port, src_mac, DNS_PORT, dst)

                self.dns.query(payload, answer, who=(src, port))
            else:
                self.count("drop_services_port")
        return True

    def send(self, payload: bytes, dst: bytes, dst_port: int, dst_mac: bytes, src_port: int, src: bytes) -> int:
        """One UDP datagram to the guest; 0 or -errno, full is counted there."""
        d = ffi.new("struct services_datagram *", {
            "src": b"\0" * 10 + b"\xff\xff" + src, "dst": b"\0" * 10 + b"\xff\xff" + dst, "src_port": src_port,
            "dst_port": dst_port, "src_mac": self._mac, "dst_mac": dst_mac, "len": len(payload),
        })
        return int(lib.rn_services_send(self.stage, d, ffi.from_buffer(payload)))

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
        self.dns.close()


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Serve until told to stop; return why, with the last counts.

    On cancel what is in the ring is still answered; queries that wait for an upstream are not waited for, their
    guest is going. Raises StageError with the data plane's text if it cannot start or a neighbour's ring counter
    is impossible, ValueError for a configured address that is none. Never raises for what a guest or a resolver sent.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a socket a query under way
    ended: list[Ended] = []
    loop = Loop(time.monotonic)
    listener = socket.socket(fileno=ctx.fds["dns_listen"]) if "dns_listen" in ctx.fds else None
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        if listener is not None:
            stack.callback(listener.close)
        names = NamesWriter(*ctx.names) if ctx.names is not None else None
        services = Services(cfg, ctx.stage, loop, listener, names=names)
        stack.callback(lib.rn_stage_fini, ctx.stage)
        stack.callback(services.close)

        def on_control(_events: int) -> None:
            if (end := ctx.handle_control()) is not None:
                ended.append(end)

        nic2 = BridgeDhcp(loop, services.count)
        stack.callback(nic2.close)
        ctx.handlers |= {HostsChange: services.change_hosts, Notices: services.set_notices, Nic2Dhcp: nic2.serve}
        services.tell = ctx.notice
        loop.watch(ctx.control_fileno(), READ, on_control)
        if ctx.wake >= 0:
            loop.watch(ctx.wake, READ, lambda _events: None)  # Python handles the signal on its way here
        loop.watch(lib.rn_services_bell(ctx.stage), READ, lambda _events: None)  # disarm() quiets it
        ctx.running()
        reason = serve(services, ctx, ended)
    return ended[0] if ended else ctx.ended(reason)


def serve(services: Services, ctx: StageContext, ended: list[Ended]) -> str:
    """The loop: batches from the ring, then events and timers; sleeps when there is neither."""
    stage, loop = services.stage, services.loop
    while not ended:
        if ctx.standing:
            ctx.stand()
            if (end := ctx.handle_control()) is not None:
                ended.append(end)
            continue
        lib.rn_services_begin(stage)
        more = services.turn()
        loop.step(0)
        rc = lib.rn_services_end(stage)
        if rc > 0:
            return "stopped"
        if rc == 0 and not more and not ended:
            if ctx.draining and not lib.rn_services_pending(stage):
                return "drained"
            rc = lib.rn_services_arm(stage)
            if rc == 0:
                wait = lib.rn_stage_impair_wait(stage)  # -1 but for --impair
                try:
                    loop.step(wait / 1000 if wait >= 0 else None)
                finally:
                    lib.rn_services_disarm(stage)
        if rc < 0:
            raise StageError(ffi.string(lib.rn_stage_error(stage)).decode())
    return "ended"
