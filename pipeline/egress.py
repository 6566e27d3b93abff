"""egress: the guest's TCP, UDP and ICMP over the host's own sockets.

In:      frames that classify checked, with what it learned in the buffer's header (csrc/rn_arena.h, struct rn_meta).
Out:     frames for the guest; every drop has a counter in csrc/rn_metrics.def.
Bounds:  one host socket a flow, at most as many flows as the flow table has and RLIMIT_NOFILE allows.
Source:  TCP RFC 9293, UDP RFC 768 and RFC 4787 (NAT behaviour), ICMP RFC 792, RFC 1812 and RFC 5508.
"""
from __future__ import annotations

import errno
import ipaddress
import os
import resource
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pipeline.messages import CloseFlow, ForwardsChange, Notices, PolicyChange, Refused, Rule
from pipeline.proxies import Plan
from pipeline.stage import Ended, StageContext, StageError
from pipeline.units import Ipv4, Mac, Mtu, PolicyEntry
from shm._dataplane import ffi, lib

DNS_PATH_MAX = 106  # bytes of an abstract Unix address (unix(7): 108 less the leading NUL), one spare for C's NUL
PEEK = {"auto": -1, "discard": 0, "offset": 1}  # struct egress_config.peek_offset
NFILE_MAX = 1 << 20  # an unlimited RLIMIT_NOFILE is no number to count with


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="egress"):
    gateway4: Ipv4
    gateway_mac: Mac
    mtu: Mtu
    offload: bool  # partial checksums and super-frames: what the guest takes, or guest_rx's link finishes
    host_loopback: bool  # the gateway's address reaches the host's 127.0.0.1
    peek: Literal["auto", "offset", "discard"] = "auto"  # SO_PEEK_OFF, or peek past a discard buffer
    udp_max: Annotated[int, Meta(ge=1, le=65536)]  # UDP mappings; then the least recently used goes
    pending_max: Annotated[int, Meta(ge=1, le=65536)]  # TCP connects under way; then RST
    direct: bool = False  # with link_tap among fds: small frames are written to the guest's tap from here
    frame_max: int = 1514  # of that link: bytes of Ethernet frame
    promote: Annotated[int, Meta(ge=0)] = 0  # segments with data until a flow is settled; 0: flows stay here
    dns_path: str = ""  # abstract Unix address of services' DNS over TCP, without the leading NUL; "": none
    guest4: Ipv4  # the guest's address, for forwards that name none
    prefix: Annotated[int, Meta(ge=1, le=30)]  # of the guest's subnet
    forward_as_gateway: bool = False  # clients of forwards appear as the gateway
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0  # not 0: ISNs and ids are repeatable
    policy: tuple[PolicyEntry, ...] = ()  # the first that fits decides
    proxy: Plan | None = None  # hosts are addresses


def _c_config(cfg: Config, raw_icmp: int, heir: bool) -> object:
    """struct egress_config *. Raises StageError if dns_path is too long."""
    path = cfg.dns_path.encode()
    if len(path) > DNS_PATH_MAX:
        raise StageError(f"dns_path: {len(path)} bytes, at most {DNS_PATH_MAX}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    c = ffi.new("struct egress_config *")
    c.gateway4 = ipaddress.IPv4Address(cfg.gateway4).packed
    c.gateway_mac = bytes.fromhex(cfg.gateway_mac.replace(":", ""))
    c.guest4 = ipaddress.IPv4Address(cfg.guest4).packed
    c.prefix = cfg.prefix
    c.as_gateway = cfg.forward_as_gateway
    c.mtu = cfg.mtu
    c.offload = cfg.offload
    c.host_loopback = cfg.host_loopback
    c.peek_offset = PEEK[cfg.peek]
    c.raw_icmp_fd = raw_icmp
    c.nfile = NFILE_MAX if soft == resource.RLIM_INFINITY else min(soft, NFILE_MAX)
    c.udp_max = cfg.udp_max
    c.pending_max = cfg.pending_max
    c.dns_path = path
    c.seed = cfg.seed
    c.heir = heir
    return c


def _mapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def set_proxy(stage: Any, plan: Plan, names: tuple[Any, int] | None) -> None:
    """Tell the data plane of the proxies. Raises StageError."""
    def must(rc: int) -> None:
        if rc < 0:
            raise StageError(f"proxy: {ffi.string(lib.rn_stage_error(stage)).decode() or os.strerror(-rc)}")

    c = ffi.new("struct proxy_config *")
    if not 0 < len(plan.servers) <= len(c.server):
        raise StageError(f"proxy: {len(plan.servers)} servers, at most {len(c.server)}")
    c.nservers, c.udp_block = len(plan.servers), plan.udp_block
    for to, server in zip(c.server, plan.servers, strict=False):
        to.kind = lib.PROXY_HTTP if server.kind == "http" else lib.PROXY_SOCKS5
        to.addr = _mapped(ipaddress.ip_address(server.host))
        to.port, to.only_port = server.port, server.only_port
        user, password = server.user.encode(), server.password.encode()
        if max(len(user), len(password)) > len(to.user):
            raise StageError("proxy: user name or password too long")
        to.user, to.user_len = user, len(user)
        to.password, to.password_len = password, len(password)
    must(lib.stage_egress_proxy(stage, c, *(names or (ffi.NULL, 0))))
    ffi.buffer(c)[:] = bytes(ffi.sizeof(c[0]))  # the data plane has its copy
    for text in plan.bypass.networks:
        net = ipaddress.ip_network(text)
        prefix = net.prefixlen + (96 if net.version == 4 else 0)
        must(lib.stage_egress_bypass_net(stage, _mapped(net.network_address), prefix))
    for name in plan.bypass.names:
        must(lib.stage_egress_bypass_name(stage, name.encode()))


def set_policy(stage: Any, entries: tuple[PolicyEntry, ...]) -> None:
    """Tell the data plane what is allowed. Raises StageError; then it is as before."""
    rules = [{"net": e.net, "prefix": e.prefix, "port_min": e.port_min, "port_max": e.port_max, "ways": e.ways,
              "protos": e.protos, "deny": e.deny, "name": e.name} for e in entries]
    rc = lib.stage_egress_policy(stage, ffi.new("struct policy_rule[]", rules) if rules else ffi.NULL, len(rules))
    if rc < 0:
        raise StageError(f"policy: {os.strerror(-rc)} ({len(entries)} entries, at most {lib.POLICY_RULES_MAX})")


PROTO = {1: "icmp", 6: "tcp", 17: "udp"}
# What an errno of connect() means to the guest's user; others by strerror().
REASONS = {errno.EMFILE: "too many flows, connects under way or descriptors"}
DENIED = "denied by the policy"


def _address(raw: bytes) -> str:
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def refusals(stage: Any) -> list[Refused]:
    """What the data plane kept of flows it did not make, oldest first."""
    found = []
    r = ffi.new("struct egress_refusal *")
    while lib.stage_egress_refusal(stage, r):
        found.append(Refused(
            proto=PROTO.get(r.proto, str(r.proto)), guest=_address(bytes(r.guest)), guest_port=r.guest_port,
            peer=_address(bytes(r.peer)), peer_port=r.peer_port,
            reason=DENIED if r.rule >= 0 else REASONS.get(r.error) or os.strerror(r.error),
            rule=r.rule, lost=r.lost))
    return found


def _listeners(stage: Any) -> Iterator[tuple[int, int]]:
    """(rule, the data plane's name for it) of what is served."""
    rule = ffi.new("uint32_t *")
    k = 0
    while (slot := lib.stage_egress_listener(stage, k, rule)) >= 0:
        yield rule[0], slot
        k += 1


class Forwards:
    """What the supervisor has us listen on. Descriptors are the data plane's once it took them."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self._slots = dict(_listeners(stage))  # rule: the data plane's name for it
        self._add: list[tuple[Rule, int]] = []  # of the parts so far
        self._remove: list[int] = []

    def change(self, ask: ForwardsChange, fds: list[int]) -> str:
        """One part; all is done at the last one, or nothing, and why."""
        self._add += zip(ask.add, fds, strict=True)
        self._remove += ask.remove
        if not ask.commit:
            return ""
        add, self._add, remove, self._remove = self._add, [], self._remove, []
        if ask.whole:
            remove = list(self._slots.keys() - {rule.rule for rule, _ in add})
            for _, fd in (known := [(rule, fd) for rule, fd in add if rule.rule in self._slots]):
                os.close(fd)  # a predecessor left it to us
            add = [a for a in add if a not in known]
        made: dict[int, int] = {}
        for n, (rule, fd) in enumerate(add):
            slot = self._listen(rule, fd)
            if slot < 0:
                for done in made.values():
                    lib.stage_egress_unlisten(self._stage, done, 0)
                for _, left in add[n:]:
                    os.close(left)
                why = "too many descriptors in use" if slot == -errno.EMFILE else os.strerror(-slot)
                return f"egress cannot serve forward {n + 1} of {len(add)}: {why}"
            made[rule.rule] = slot
        for rule_id in remove:
            lib.stage_egress_unlisten(self._stage, self._slots.pop(rule_id), int(ask.close_flows))
        self._slots |= made
        return ""

    def _listen(self, rule: Rule, fd: int) -> int:
        guest = ipaddress.IPv4Address(rule.guest_addr or 0).packed
        c = ffi.new("struct egress_listener *", {"fd": fd, "proto": 6 if rule.proto == "tcp" else 17, "guest4": guest,
                                                 "guest_port": rule.guest_port, "rule": rule.rule})
        return lib.stage_egress_listen(self._stage, c)


def _handle(ctx: StageContext) -> None:
    """What egress does when the supervisor asks."""

    def close_flow(ask: CloseFlow, _fds: list[int]) -> str:
        rc = lib.stage_egress_close_flow(ctx.stage, ask.index, ask.gen)
        return "" if rc == 0 else "that flow is gone"

    def notices(ask: Notices, _fds: list[int]) -> str:
        lib.stage_egress_notices(ctx.stage, int(ask.on))
        return ""

    def policy(ask: PolicyChange, _fds: list[int]) -> str:
        try:
            set_policy(ctx.stage, ask.entries)
        except StageError as e:
            return str(e)
        return ""

    ctx.handlers |= {CloseFlow: close_flow, Notices: notices, ForwardsChange: Forwards(ctx.stage).change,
                     PolicyChange: policy}


def _inherit(ctx: StageContext) -> None:
    """Go on with the flows of the process that left this seat, if there was one."""
    n = lib.stage_egress_inherit(ctx.stage, ctx.fds["estate_take"])
    if n < 0:
        ctx.say("warning", f"{ffi.string(lib.rn_stage_error(ctx.stage)).decode()}; its connections are reset")
    elif n:
        ctx.say("info", f"goes on with {n} flows of the process that left this seat")


def _leave(ctx: StageContext) -> None:
    """All flows to whoever takes this seat next."""
    n = lib.stage_egress_leave(ctx.stage, ctx.fds["estate_put"], ctx.fds["estate_take"])
    if n < 0:
        ctx.say("warning", f"{ffi.string(lib.rn_stage_error(ctx.stage)).decode()}; its connections are reset")
    elif n:
        ctx.say("info", f"leaves {n} flows to whoever takes this seat")


def init(cfg: Config, ctx: StageContext) -> None:
    """Make ctx.stage this stage. Raises StageError with the data plane's text."""
    if ctx.flows is None:
        raise StageError("the flow table was not granted")
    rc = lib.stage_egress_init(ctx.stage, *ctx.flows, _c_config(cfg, ctx.fds.get("raw_icmp", -1), "estate_take" in ctx.fds))
    if rc < 0:
        raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode() or os.strerror(-rc))
    if cfg.promote:
        c = ffi.new("struct egress_promote *", {"tx_fd": ctx.fds["flows_to_tx"], "rx_fd": ctx.fds["flows_to_rx"],
                                                "after": cfg.promote})
        if lib.stage_egress_promote(ctx.stage, c) < 0:
            raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())
    if cfg.direct and (tap := ctx.fds.get("link_tap", -1)) >= 0:
        link = ffi.new("struct rn_link *", {"fd": tap, "kind": lib.RN_LINK_TAP, "vnet": 1, "frame_max": cfg.frame_max})
        if lib.stage_egress_direct(ctx.stage, link) < 0:
            raise StageError(ffi.string(lib.rn_stage_error(ctx.stage)).decode())
    if cfg.proxy is not None:
        set_proxy(ctx.stage, cfg.proxy, ctx.names)
    set_policy(ctx.stage, cfg.policy)
    if "estate_take" in ctx.fds:
        _inherit(ctx)
        ctx.leave = lambda: _leave(ctx)
    _handle(ctx)


def run(cfg: Config, ctx: StageContext) -> Ended:
    """Move frames until told to stop. Raises StageError with the data plane's text; never for a bad frame."""
    init(cfg, ctx)

    def tell() -> None:
        for refused in refusals(ctx.stage):
            ctx.notice(refused)

    return ctx.run_loop(tell)
