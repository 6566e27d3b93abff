"""User settings: one declaration for the command line, the TOML file, the checks and the manual.

Each field of Settings is an option: its name with dashes is the long flag and the TOML key, Meta carries the
text, the bounds and (in `extra`) the short flag and what the argument is called. stage_configs() turns
checked settings into the stages' own configurations; the stages' Structs live in their own files.
"""
from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from pipeline import nic2
from pipeline.forwards import Auto, Forward, ForwardSyntaxError, Proto, autos, parse_all
from pipeline.host_names import DOMAIN, alias_of, check_alias, check_chain, is_domain_name, one_name, values
from pipeline.logs import parse_levels
from pipeline.policy import PolicyError, PolicyRule, effective, entries
from pipeline.proxies import ProxyError, chosen, plan
from pipeline.topology import TOPOLOGY, Feature, Role
from pipeline.units import MTU_MAX, MTU_MIN, Impair, Mac

ETH_HLEN, VLAN_HLEN = 14, 4  # bytes
FRAME_MAX = 65535 + ETH_HLEN  # super-frame: IPv4 total length limit (RFC 791 3.1)
IFNAME_MAX = 15  # bytes (IFNAMSIZ - 1)
SESSION_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}\Z"
FORWARDS_OWNER = "options"  # of forwards by -t and -u
CPUS_MAX = 1024  # sched_setaffinity(2): a cpu_set_t
POOL_MAX = 4096  # addresses leased at most, whatever the subnet's size


class ConfigError(ValueError):
    """A setting is wrong; the text is one line that begins with --option."""


def _opt(description: str, flag: str = "", arg: str = "", **bounds: Any) -> Meta:
    return Meta(description=description, extra={"flag": flag, "arg": arg}, **bounds)


LINK_OUTPUT = len(Role)  # RN_IMPAIR_LINK
_ALWAYS = 1 << 32
_GAP_MAX, _BITS_MAX, _TIME_MAX = 1000, 64, 60  # frames, bits (csrc/rn_impair.h), s
_UNITS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


def _probability(text: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{text}: expected a share of the frames, like 0.5% or 0.005")
    return round(share * _ALWAYS)


def _time(text: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(us|ms|s)", text)
    if not match:
        raise ValueError(f"{text}: expected a time, like 500us, 5ms or 1s")
    ns = round(float(match[1]) * _UNITS[match[2]])
    if ns > _TIME_MAX * _UNITS["s"]:
        raise ValueError(f"{text}: is over {_TIME_MAX} s")
    return ns


def _number(text: str, most: int, what: str, least: int = 1) -> int:
    if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{text}: expected {what}, {least}..{most}")
    return int(text)


def _impairment(key: str, value: str) -> dict[str, int | bool]:
    """Fields of Impair that KEY=VALUE says. Raises ValueError."""
    first, slash, second = value.partition("/")
    match key:
        case "super" if not value:
            return {"keep_offloads": True}
        case "seed":
            return {"seed": _number(value, (1 << 63) - 1, "a whole number", 0)}
        case "drop" | "dup" | "truncate":
            return {key: _probability(value)}
        case "reorder":
            return {"reorder": _probability(first)} | (
                {"reorder_gap": _number(second, _GAP_MAX, "how many frames overtake")} if slash else {})
        case "corrupt":
            return {"corrupt": _probability(first)} | (
                {"corrupt_bits": _number(second, _BITS_MAX, "how many bits are flipped")} if slash else {})
        case "burst":
            enter, leave = _probability(first), _probability(second)
            if enter and not leave:
                raise ValueError(f"{value}: a burst that never ends; say drop=100%")
            return {"burst_enter": enter, "burst_leave": leave}
        case "delay":
            first, tilde, second = value.partition("~")
            delay, jitter = _time(first), _time(second) if tilde else 0
            if jitter > delay:
                raise ValueError(f"{value}: varies by more than it is")
            return {"delay_ns": delay, "jitter_ns": jitter}
        case "stall":
            stall, every = _time(first), _time(second)
            if stall >= every:
                raise ValueError(f"{value}: expected how long / how often, like 200ms/1s")
            return {"stall_ns": stall, "stall_every_ns": every}
    raise KeyError(key)


def parse_impair(text: str) -> Impair:
    """PLACE:KEY=VALUE,... of --impair (docs/impairment.md). Raises ConfigError."""
    place, colon, rest = text.partition(":")
    rings = {r.name: r for r in TOPOLOGY.only(frozenset({Feature.NIC1})).rings}
    where: dict[str, Any]
    if place == "up":  # the link's two directions: whoever reads it, whoever writes it
        where = {"stage": "guest_tx", "output": LINK_OUTPUT}
    elif place == "down":
        where = {"stage": "guest_rx", "output": LINK_OUTPUT}
    elif ring := rings.get(place):
        where = {"stage": ring.producer, "output": int(ring.role)}
    else:
        raise ConfigError(f"--impair {text}: {place or 'nothing'} is no place; there are up, down, {', '.join(rings)}")
    said: dict[str, Any] = {}
    for word in rest.split(",") if colon and rest else ():
        key, equals, value = word.partition("=")
        if key in said:
            raise ConfigError(f"--impair {text}: {key} twice")
        try:
            said[key] = _impairment(key, value)
        except ValueError as e:
            raise ConfigError(f"--impair {text}: {key}={e}") from None
        except KeyError:
            raise ConfigError(f"--impair {text}: {word or 'nothing'} is none of drop=, burst=, dup=, reorder=,"
                              " corrupt=, truncate=, delay=, stall=, seed=, super") from None
    if not said.keys() - {"seed", "super"}:
        raise ConfigError(f"--impair {text}: does nothing; expected like {place}:drop=1%,delay=5ms")
    return Impair(place=place, **where, **{k: v for fields in said.values() for k, v in fields.items()})


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What a user may say about a session."""

    mtu: Annotated[int, _opt("MTU of the guest's interface, also told by DHCP (option 26)", "m", "BYTES",
                             ge=MTU_MIN, le=MTU_MAX)] = 4000
    address: Annotated[str, _opt("guest's IPv4 address: the first lease", "a", "ADDR")] = "10.0.2.2"
    netmask: Annotated[str, _opt("its netmask, dotted or as a prefix length 8..30", "n", "MASK")] = "255.255.255.0"
    gateway: Annotated[str, _opt("gateway address; the host's loopback is behind it", "g", "ADDR")] = "10.0.2.1"
    mac: Annotated[str, _opt("gateway's MAC address", "", "MAC")] = "02:ab:cd:00:00:01"
    dns: Annotated[tuple[str, ...], _opt("upstream DNS server instead of the host's resolv.conf; may be repeated",
                                         "D", "ADDR", max_length=8)] = ()
    search: Annotated[tuple[str, ...], _opt("DNS search domain given to the guest; may be repeated", "S", "DOMAIN",
                                            max_length=6)] = ()
    hosts: Annotated[dict[str, str | tuple[str, ...]], _opt(
        "name answered locally; may be repeated (IP: v4 or v6, several with commas; or another such name: an alias)", "",
        "NAME=IP")] = {}
    no_host_loopback: Annotated[bool, _opt("the gateway address does not reach the host's loopback")] = False
    tcp_ports: Annotated[tuple[str, ...], _opt(
        "forward TCP ports of the host to the guest, like 8080:80 (docs/forwards.md); may be repeated", "t", "SPEC")] = ()
    udp_ports: Annotated[tuple[str, ...], _opt("the same for UDP", "u", "SPEC")] = ()
    forward_as_gateway: Annotated[bool, _opt("the guest sees clients of forwards under the gateway's address")] = False
    policy: Annotated[tuple[str, ...], _opt(
        "allow or deny by network, protocol and port, like 'deny out tcp 10.0.0.0/8 port 22'; the first rule that fits"
        " decides (docs/policy.md); may be repeated", "", "RULE", max_length=1024)] = ()
    no_metadata: Annotated[bool, _opt(
        "link-local and cloud metadata addresses (169.254.0.0/16, fd00:ec2::254 ...) are not reached")] = False
    proxy: Annotated[str, _opt(
        "send the guest's TCP through a proxy, and UDP if it speaks SOCKS5: http://[USER:PW@]HOST:PORT, socks5://...,"
        " auto (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) or none (docs/proxy.md)", "", "URL")] = "none"
    no_proxy: Annotated[tuple[str, ...], _opt(
        "what goes past the proxy: names, .suffixes, addresses, networks, with commas; may be repeated", "", "LIST",
        max_length=256)] = ()
    udp_without_proxy: Annotated[str, _opt(
        "UDP that the proxy cannot carry: direct, block, or auto: direct with --proxy auto, else block", "", "HOW",
        pattern="^(auto|direct|block)$")] = "auto"
    pcap: Annotated[str, _opt("write the guest link's frames to this pcapng file", "p", "FILE")] = ""
    session: Annotated[str, _opt("name of the session, for `ringnet ctl -s`; else its process id", "", "NAME")] = ""
    api_socket: Annotated[str, _opt("control API's socket (docs/control-api.md), instead of one by the session's name;"
                                    " none: no control API", "", "PATH")] = ""
    pid: Annotated[str, _opt("write the supervisor's process id to this file once it runs", "P", "FILE")] = ""
    ifname: Annotated[str, _opt("name of the guest's interface", "I", "NAME")] = "tap0"
    resolv_conf: Annotated[str, _opt("file the upstream DNS servers are read from", "", "FILE")] = "/etc/resolv.conf"
    lease_file: Annotated[str, _opt("keep DHCP leases in this file across sessions", "", "FILE")] = ""
    udp_max: Annotated[int, _opt("UDP mappings kept; then the least recently used goes", "", "N",
                                 ge=1, le=15000)] = 1024
    pending_max: Annotated[int, _opt("TCP connects under way; more are refused", "", "N", ge=1, le=15000)] = 1024
    peek: Annotated[str, _opt("how unacknowledged data is read again: auto, offset (SO_PEEK_OFF, Linux 6.9) or discard",
                              "", "HOW", pattern="^(auto|offset|discard)$")] = "auto"
    nic2: Annotated[str, _opt(
        "a second interface on a network of the host, like shared, host, bridged,if=br0, socket,path=PATH or fd=N, and"
        " options with commas (docs/nic2.md)", "", "MODE")] = ""
    route: Annotated[tuple[str, ...], _opt(
        "route of the host into the guest by its second interface, like 172.16.0.0/12; may be repeated", "", "NET",
        max_length=nic2.ROUTES_MAX)] = ()
    promote: Annotated[int, _opt("segments with data after which a flow is run by the link's stages, without a hop; 0: never",
                                 "", "N", ge=0, le=1000000)] = 8
    busy_wait: Annotated[int, _opt("us that a stage looks on before it sleeps, while guest and host talk in turn (docs/performance.md);"
                                   " 0: never", "", "US", ge=0, le=1000)] = 100
    cpus: Annotated[tuple[str, ...], _opt("CPUs a stage may run on, like guest_tx=0, egress=0,1 or 0-3 for all stages; may be"
                                          " repeated. Without it the kernel decides", "", "STAGE=LIST")] = ()
    seed: Annotated[int, _opt("for tests: repeatable sequence numbers; 0 is random", "", "N", ge=0)] = 0
    impair: Annotated[tuple[str, ...], _opt("for tests: a bad wire at up, down or a ring, like up:drop=0.01,delay=5ms;"
                                            " may be repeated", "", "SPEC", max_length=16)] = ()
    hold: Annotated[tuple[str, ...], _opt("leave this stage's seat empty, to be taken by hand: `ringnet stage`"
                                          " (docs/debugging.md); may be repeated", "", "STAGE", max_length=8)] = ()
    restarts: Annotated[int, _opt("how often within a minute a stage that died is started again; 0: its end is the"
                                  " session's", "", "N", ge=0, le=1000)] = 5
    watchdog: Annotated[int, _opt("a stage that gives no sign of life for so many seconds is killed, and started again like one"
                                  " that died (docs/operation.md); 0: never", "", "SECONDS", ge=0, le=3600)] = 10
    postmortem: Annotated[str, _opt("when a stage dies (and on SIGQUIT) write what is in shared memory, but no frame,"
                                    " below this directory: `ringnet postmortem` reads it", "", "DIR")] = ""
    metrics: Annotated[str, _opt("serve metrics (docs/metrics.md): a loopback port, ADDR:PORT of loopback, or unix:PATH", "",
                                 "WHERE")] = ""
    log_format: Annotated[str, _opt("standard error as text, or json: an object a line", "", "HOW",
                                    pattern="^(text|json)$")] = "text"
    log_level: Annotated[tuple[str, ...], _opt("error, warning, info or debug, for all or as STAGE=LEVEL; may be repeated",
                                               "", "LEVEL", max_length=32)] = ()
    stats: Annotated[bool, _opt("print each stage's counters at the end")] = False
    quiet: Annotated[bool, _opt("print errors only", "q")] = False
    debug: Annotated[bool, _opt("print what happens, and --stats", "d")] = False

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"{self.gateway}/{self.netmask}", strict=False)

    def placement(self) -> dict[str, frozenset[int]]:
        """--cpus by stage; "": all others. Raises ConfigError."""
        stages = [s.name for s in TOPOLOGY.stages]
        found: dict[str, frozenset[int]] = {}
        for text in self.cpus:
            stage, equals, numbers = text.rpartition("=")
            if equals and stage not in stages:
                raise ConfigError(f"--cpus {text}: no such stage; there are {', '.join(stages)}")
            chosen: set[int] = set()
            for part in numbers.split(","):
                first, dash, last = part.partition("-")
                if not (first.isascii() and first.isdecimal()) or dash and not (last.isascii() and last.isdecimal()):
                    raise ConfigError(f"--cpus {text}: {part or 'nothing'}: expected a CPU, like 0, or a range, like 0-3")
                if int(last or first) >= CPUS_MAX:
                    raise ConfigError(f"--cpus {text}: {part}: is over {CPUS_MAX - 1}")
                chosen |= set(range(int(first), int(last or first) + 1))
            if not chosen & os.sched_getaffinity(0):
                raise ConfigError(f"--cpus {text}: none of these CPUs is ours; there are"
                                  f" {', '.join(map(str, sorted(os.sched_getaffinity(0))))}")
            found[stage] = frozenset(chosen)
        return found

    def log_levels(self) -> dict[str, str]:
        """--log-level by stage; "": all others. -d is info, -q error. Raises ConfigError."""
        try:
            given = parse_levels(self.log_level, tuple(s.name for s in TOPOLOGY.stages))
        except ValueError as e:
            raise ConfigError(f"--log-level {e}") from None
        return {"": "info" if self.debug else "error" if self.quiet else "warning"} | given

    def impairments(self) -> tuple[Impair, ...]:
        """--impair, parsed. Raises ConfigError."""
        return tuple(parse_impair(text) for text in self.impair)

    @property
    def offloads(self) -> bool:
        """May frames be larger than the MTU, and checksums left to the link? Not on a bad wire, unless it says so: a
        drop would lose 64 KiB at once, and damage would be signed with a right checksum behind it."""
        return all(i.keep_offloads for i in self.impairments())

    def forwards(self) -> list[Forward]:
        """--tcp-ports and --udp-ports, parsed. Raises ForwardSyntaxError."""
        return parse_all({"tcp": self.tcp_ports, "udp": self.udp_ports}, owner=FORWARDS_OWNER)

    def auto_forwards(self) -> list[Auto]:
        """Those of them that follow what the guest listens on. Raises ForwardSyntaxError."""
        return autos({"tcp": self.tcp_ports, "udp": self.udp_ports}, owner=FORWARDS_OWNER)

    def policy_rules(self, instead: Iterable[str] | None = None) -> tuple[PolicyRule, ...]:
        """--policy, --no-metadata and --no-host-loopback as one list; instead: of --policy's rules. Raises PolicyError."""
        return effective(self.policy if instead is None else instead, no_metadata=self.no_metadata, no_host_loopback=self.no_host_loopback,
                         gateway=self.gateway)

    def second_nic(self) -> nic2.Nic2 | None:
        """--nic2, parsed. Raises Nic2SyntaxError."""
        return nic2.parse(self.nic2) if self.nic2 else None

    def nic2_routes(self) -> list[nic2.Route]:
        """--route, parsed. Raises Nic2SyntaxError."""
        return [nic2.parse_route(text) for text in self.route]

    def hosts_table(self) -> dict[str, list[str]]:
        return {n: v.split(",") if isinstance(v, str) else list(v) for n, v in self.hosts.items()}


class Option(Struct, frozen=True):
    """One field of Settings as the command line and the manual see it."""

    name: str  # attribute
    key: str  # TOML key; the long flag is "--" + key
    flag: str  # short letter or ""
    arg: str  # what the argument is called; "": a switch
    many: bool
    help: str
    default: Any
    range: str  # "576..65520", or ""


def options() -> tuple[Option, ...]:
    """The declaration as data, in order."""
    hints = get_type_hints(Settings, include_extras=True)
    found = []
    for f in msgspec.structs.fields(Settings):
        kind, *metas = get_args(hints[f.name])
        meta = next(m for m in metas if isinstance(m, Meta))
        extra = meta.extra or {}
        default = f.default if f.default is not msgspec.NODEFAULT else f.default_factory()
        found.append(Option(f.name, f.encode_name, extra["flag"], extra["arg"], get_origin(kind) in (tuple, dict),
                            meta.description or "", default,
                            f"{meta.ge}..{meta.le}" if meta.ge is not None and meta.le is not None else ""))
    return tuple(found)


def options_markdown() -> str:
    """The option table of the manual."""
    rows = ["| flag | TOML key | default | what |", "|---|---|---|---|"]
    for o in options():
        flags = ", ".join(([f"`-{o.flag}`"] if o.flag else []) + [f"`--{o.key}`"])
        default = "" if o.default in ("", (), {}, False) else f"`{o.default}`"
        rows.append(f"| {flags}{' ' + o.arg if o.arg else ''} | `{o.key}` | {default} | {o.help} |")
    return "\n".join(rows) + "\n"


def _plain(error: msgspec.ValidationError) -> tuple[str, str]:
    """(key, text) of a validation error: msgspec ends with "- at `$.key...`"."""
    text, _, path = str(error).partition(" - at `$")
    if unknown := re.search(r"unknown field `([^`]*)`", text):
        return unknown[1], "unknown option"
    key = re.match(r"\.?\[?\W*([\w-]+)", path)
    if re.match(r"Expected `int` [<>]=", text):
        for o in options():
            if key and o.key == key[1] and o.range:
                return o.key, f"not within {o.range}"
    text = text.replace("`int`", "a whole number").replace("`str`", "text").replace("`bool`", "true or false")
    text = text.replace("`array`", "a list").replace("`object`", "a table").replace(" matching regex", " of the form")
    return key[1] if key else "", text[:1].lower() + text[1:]


def load_toml(path: str) -> dict[str, Any]:
    """Settings from a file, as far as it goes: keys and types are checked, with the line.

    Raises ConfigError.
    """
    import tomllib  # here: stages import this file, and have no use for it

    try:
        with open(path, "rb") as f:
            text = f.read().decode()
    except OSError as e:
        raise ConfigError(f"--config {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"--config {path}: not UTF-8 at byte {e.start}") from e
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        why = str(e).replace("at end of document", f"at line {max(1, len(text.splitlines()))}, end of document")
        raise ConfigError(f"--config {path}: {why}") from e
    try:
        msgspec.convert(data, Settings)
    except msgspec.ValidationError as e:
        key, why = _plain(e)
        line = next((n for n, s in enumerate(text.splitlines(), 1)
                     if key and re.match(rf"\s*\[?\s*[\"']?{re.escape(key)}[\"']?\s*[.=\]]", s)), 0)
        raise ConfigError(f"--config {path}: {key}: {why}" + (f" (at line {line})" if line else "")) from e
    return data


def make(given: dict[str, Any], *, strict: bool = False) -> Settings:
    """Settings from keys (TOML names) to values, all checks done. Raises ConfigError naming the option."""
    try:
        settings = msgspec.convert(given, Settings, strict=strict)
    except msgspec.ValidationError as e:
        key, why = _plain(e)
        value = given.get(key)
        raise ConfigError(f"--{key} {value if isinstance(value, (str, int)) else ''}".rstrip() + f": {why}") from e
    return check(settings)


def _ipv4(option: str, text: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        raise ConfigError(f"--{option} {text}: not an IPv4 address (expected like 10.0.2.2)") from None


def _ip(option: str, text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"--{option} {text}: not an IP address") from None


def _domain(option: str, text: str) -> None:
    if not is_domain_name(text):
        raise ConfigError(f"--{option} {text}: not a domain name (labels of 1..63 letters, digits and dashes)")


def check_ifname(option: str, name: str) -> None:
    """Raises ConfigError: what the kernel (dev_valid_name) would refuse without saying why."""
    if not 1 <= len(name.encode()) <= IFNAME_MAX:
        raise ConfigError(f"--{option} {name}: {len(name.encode())} bytes long; an interface name has 1 to"
                          f" {IFNAME_MAX}")
    if name in (".", "..") or re.search(r"[/:\s%]", name):
        raise ConfigError(f"--{option} {name}: an interface name has no '/', ':', '%' or space")


def check(s: Settings) -> Settings:
    """The checks that need more than one field or a parser; returns the settings. Raises ConfigError."""
    address, gateway = _ipv4("address", s.address), _ipv4("gateway", s.gateway)
    try:
        network = s.network
    except ValueError:
        raise ConfigError(f"--netmask {s.netmask}: neither a netmask like 255.255.255.0 nor a prefix length") from None
    if not 8 <= network.prefixlen <= 30:
        raise ConfigError(f"--netmask {s.netmask}: prefix length {network.prefixlen} is out of range 8..30")
    for option, a in (("gateway", gateway), ("address", address)):
        if a.is_multicast or a.is_loopback or a.is_unspecified or int(a) >> 28 == 15:
            raise ConfigError(f"--{option} {a}: not an address for a host (loopback, multicast or reserved)")
        if a in (network.network_address, network.broadcast_address) and a in network:
            raise ConfigError(f"--{option} {a}: is the network or broadcast address of {network}")
    if address not in network:
        guests = ipaddress.IPv4Network(f"{address}/{network.prefixlen}", strict=False)
        raise ConfigError(f"--gateway {gateway}: outside the subnet {guests} of --address {address}; give --gateway,"
                          " --address and --netmask of one subnet")
    if address == gateway:
        raise ConfigError(f"--address {address}: is also the gateway's; give another")
    if not re.match(get_mac_pattern(), s.mac):
        raise ConfigError(f"--mac {s.mac}: not a MAC address (expected like 02:ab:cd:00:00:01)")
    if int(s.mac[:2], 16) & 1 or not int(s.mac.replace(":", ""), 16):
        raise ConfigError(f"--mac {s.mac}: a multicast or zero address cannot be the gateway's")
    for d in s.dns:
        _ip("dns", d)
    for d in s.search:
        _domain("search", d)
    table = s.hosts_table()
    names = {one_name(name) for name in table}
    for name, texts in table.items():
        _domain("hosts", name)
        if not texts:
            raise ConfigError(f"--hosts {name}: no address")
        try:
            check_alias(values(texts), names.__contains__)
        except ValueError as e:
            raise ConfigError(f"--hosts {name}={e}") from None
    behind = {one_name(name): alias_of(values(texts)) for name, texts in table.items()}
    for name in behind:
        try:
            check_chain(name, behind.get, str)
        except ValueError as e:
            raise ConfigError(f"--hosts {e}") from None
    check_ifname("ifname", s.ifname)
    stages = [stage.name for stage in TOPOLOGY.only(frozenset({Feature.NIC1})).stages]
    for name in s.hold:
        if name not in stages:
            raise ConfigError(f"--hold {name}: no such stage; there are {', '.join(stages)}")
    if s.hold and s.api_socket == "none":
        raise ConfigError("--hold needs the control API, which --api-socket none turns off")
    if s.session and not re.match(SESSION_NAME, s.session):
        raise ConfigError(f"--session {s.session}: not a name (letters, digits, '.', '_' and '-', at most 48)")
    proto: Proto
    for option, proto, specs in (("tcp-ports", "tcp", s.tcp_ports), ("udp-ports", "udp", s.udp_ports)):
        try:
            parse_all({proto: specs})
            autos({proto: specs})
        except ForwardSyntaxError as e:
            raise ConfigError(f"--{option} {e}") from None
    try:
        s.policy_rules()
    except PolicyError as e:
        raise ConfigError(f"--policy {e}") from None
    try:
        chosen(s.proxy, (), os.environ)
    except ProxyError as e:
        raise ConfigError(f"--proxy {'auto: ' if s.proxy == 'auto' else ''}{e}") from None
    try:
        chosen("none", s.no_proxy, {})
    except ProxyError as e:
        raise ConfigError(f"--no-proxy {e}") from None
    _check_nic2(s)
    s.log_levels()
    s.placement()
    if s.metrics:
        metrics_address(s.metrics)
    places = [i.place for i in s.impairments()]
    for text, place in zip(s.impair, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"--impair {text}: {place} twice")
    return s


def _check_nic2(s: Settings) -> None:
    try:
        second = s.second_nic()
    except nic2.Nic2SyntaxError as e:
        raise ConfigError(f"--nic2 {e}") from None
    if second is not None and second.ifname == s.ifname:
        raise ConfigError(f"--nic2 ifname={second.ifname}: is the first interface's name; give another")
    if s.route and second is None:
        raise ConfigError(f"--route {s.route[0]}: there is no second interface; give --nic2")
    try:
        routes = s.nic2_routes()
    except nic2.Nic2SyntaxError as e:
        raise ConfigError(f"--route {e}") from None
    if second is not None and second.mode in ("socket", "fd") and routes:
        raise ConfigError(f"--route {s.route[0]}: this network is made by somebody else; make the route there"
                          " (ringnet nic2-helper has --route too)")
    for n, one in enumerate(routes):
        if any(one.network.overlaps(other.network) for other in routes[:n]):
            raise ConfigError(f"--route {s.route[n]}: overlaps another --route")


def metrics_address(spec: str) -> str | tuple[str, int]:
    """Where metrics are served: path of a Unix socket, or (address, port). Raises ConfigError."""
    if spec.startswith("unix:"):
        path = spec.removeprefix("unix:")
        if not path or len(path.encode()) > 107:  # unix(7): 108 with the NUL
            raise ConfigError(f"--metrics {spec}: a socket's path has 1..107 bytes")
        return os.path.abspath(path)
    host, _, port = spec.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not (port.isascii() and port.isdecimal() and int(port) < 65536):
        raise ConfigError(f"--metrics {spec}: expected a port 0..65535 (0: a free one), ADDR:PORT or unix:PATH")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(f"--metrics {spec}: {host} is no loopback address; metrics are for this machine (put a proxy in"
                          " front to reach them from elsewhere)")
    return host, int(port)


def get_mac_pattern() -> str:
    return next(m.pattern for m in get_args(Mac) if isinstance(m, Meta) and m.pattern)


def pool(s: Settings) -> tuple[str, str]:
    """First and last address leased: all of the subnet behind the gateway, or before it if it comes last."""
    net, gw = s.network, ipaddress.IPv4Address(s.gateway)
    first, last = net.network_address + 1, net.broadcast_address - 1
    if gw == first:
        first += 1
    elif gw == last:
        last -= 1
    guest = ipaddress.IPv4Address(s.address)
    if int(last) - int(first) >= POOL_MAX:  # a window that holds the guest's address
        first = max(first, min(guest, last - (POOL_MAX - 1)))
        last = first + (POOL_MAX - 1)
    return str(first), str(last)


def frame_max(mtu: int, *, vnet: bool) -> int:
    """Largest Ethernet frame on the link, bytes: a super-frame where the link segments, else by the MTU."""
    return FRAME_MAX if vnet else mtu + ETH_HLEN + VLAN_HLEN


class SecondNic(Struct, frozen=True, kw_only=True):
    """The second NIC as the stages are told of it."""

    facts: nic2.Facts
    guest_kind: str  # of link
    guest_vnet: bool  # it has virtio-net headers,
    guest_unfinished: bool = False  # or may have had some,
    guest_whole: bool = False  # and takes super-frames all the same
    host_kind: str
    host_vnet: bool
    guest_uso: bool  # UDP super-frames may come from it
    host_uso: bool
    storm: int
    row: int  # vmnet's


def stage_configs(s: Settings, *, link_kind: str, vnet: bool, unfinished: bool = False, whole: bool = False, dns_path: str = "",
                  second: SecondNic | None = None, uso: bool = False) -> dict[str, dict[str, Any]]:
    """The stages' configurations by stage name, ready to be encoded. dns_path: abstract Unix address (without the
    leading NUL) of services' DNS over TCP. unfinished, whole, uso: the link's frames may lack the virtio-net header they had; it
    takes super-frames of TCP without one; of UDP. Raises ConfigError if a proxy's name has no address."""
    net = s.network
    first, last = pool(s)
    try:
        through = plan(s.proxy, s.no_proxy, s.udp_without_proxy, os.environ)
    except ProxyError as e:
        raise ConfigError(f"--proxy {e}") from None
    link = {"link_kind": link_kind, "vnet": vnet, "mtu": s.mtu, "frame_max": frame_max(s.mtu, vnet=vnet and s.offloads),
            "pcap": bool(s.pcap), "promote": bool(s.promote), "gateway4": s.gateway,
            "gateway_mac": s.mac, "offload": s.offloads}
    seat = {"gateway4": s.gateway, "gateway_mac": s.mac, "mtu": s.mtu}
    # What guest_tx writes to the link itself goes past a bad wire and the capture in guest_rx.
    bad = {i.stage for i in s.impairments()}
    direct = not s.pcap and not {"guest_rx", "egress"} & bad
    made: dict[str, dict[str, Any]] = {
        "guest_tx": {**link, "subnet": str(net), "direct": direct,
                     **({"unfinished": s.mtu, "frame_max": FRAME_MAX} if unfinished else {}),
                     "bypass": not {"guest_tx", "classify"} & bad},
        "guest_rx": {**link, "whole": whole and s.offloads, "uso": uso and s.offloads},
        "classify": {**seat, "netmask": net.prefixlen, "subnet": str(net)},
        "egress": {**seat, "offload": s.offloads, "host_loopback": not s.no_host_loopback, "peek": s.peek,
                   "guest4": s.address, "prefix": net.prefixlen, "forward_as_gateway": s.forward_as_gateway,
                   "promote": s.promote, "direct": direct and bool(s.promote), "frame_max": link["frame_max"],
                   "udp_max": s.udp_max, "pending_max": s.pending_max, "dns_path": dns_path,
                   "seed": s.seed, "policy": entries(s.policy_rules()), "proxy": through},
        "services": {**seat, "prefix": net.prefixlen, "guest4": s.address, "pool_start": first, "pool_end": last,
                     "dns": list(s.dns), "resolv_conf": s.resolv_conf, "search": list(s.search) or [DOMAIN],
                     "domain": DOMAIN, "hosts": s.hosts_table(),
                     "lease_file": os.path.abspath(s.lease_file) if s.lease_file else "", "lease_s": 86400,
                     "learn_names": through is not None},
    }
    if second is not None:
        largest = nic2.frame_max(second.facts)
        link2 = {"link_kind": second.guest_kind, "vnet": second.guest_vnet, "frame_max": largest}
        made["guest_tx"]["nic2"] = link2 | {"unfinished": second.facts.mtu if second.guest_unfinished else 0,
                                            "uso": second.guest_uso}
        made["guest_rx"]["nic2"] = link2 | {"producer": second.row, "whole": second.guest_whole}
        made["vmnet"] = {"link_kind": second.host_kind, "vnet": second.host_vnet, "uso": second.host_uso, "frame_max": largest,
                         "storm": second.storm}
    return {name: {"type": name, **c} for name, c in made.items()}
