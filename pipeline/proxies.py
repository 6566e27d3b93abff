"""Proxy settings: URLs, the environment's variables, and what goes past the proxy (docs/proxy.md).

A password never gets into a text from here: errors show a URL without its credentials, and so does repr().
"""
from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

BYPASS_MAX = 1024  # networks, and as many names: PROXY_BYPASS_MAX (csrc/proxy.h)
CREDENTIAL_MAX = 255  # bytes of a user name or password (RFC 1929 2)
PORTS = {"http": 80, "socks5": 1080}  # RFC 9110 4.2.1, RFC 1928 3
SCHEMES: dict[str, Literal["http", "socks5"]] = {"http": "http", "socks5": "socks5", "socks5h": "socks5"}
VARIABLES = (("HTTP_PROXY", 80), ("HTTPS_PROXY", 443), ("ALL_PROXY", 0))  # port whose flows it is for; 0: all others
_NAME = re.compile(r"^\.?(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$")


class ProxyError(ValueError):
    """A proxy setting is wrong; one line, without credentials."""


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A proxy. host: name or address as given; an address once it is part of a Plan."""

    kind: Literal["http", "socks5"]
    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    user: Annotated[str, Meta(max_length=CREDENTIAL_MAX)] = ""
    password: Annotated[str, Meta(max_length=CREDENTIAL_MAX)] = ""
    only_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # flows to this port only; 0: to any

    def __repr__(self) -> str:
        return f"Server({self.kind}://{'***@' if self.user else ''}{self.host}:{self.port}, only_port={self.only_port})"


class Bypass(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes directly."""

    networks: tuple[str, ...] = ()  # CIDR
    names: tuple[str, ...] = ()  # exact; with a leading dot: every name that ends so
    everything: bool = False

    def __add__(self, other: Bypass) -> Bypass:
        return Bypass(networks=self.networks + other.networks, names=self.names + other.names,
                      everything=self.everything or other.everything)


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What egress does. The first server that takes a flow's port is used."""

    servers: tuple[Server, ...]
    bypass: Bypass = Bypass()
    udp_block: bool  # UDP that a proxy should carry and cannot: refused, else sent directly


def redacted(url: str) -> str:
    """The URL without what stands before its last @, whatever that is."""
    scheme, slashes, rest = url.rpartition("://")
    return f"{scheme}{slashes}***@{rest.rpartition('@')[2]}" if "@" in rest else url


def has_password(url: str) -> bool:
    return ":" in url.rpartition("://")[2].rpartition("@")[0]


def parse_url(url: str, *, only_port: int = 0) -> Server:
    """`http://[user:password@]host[:port]`, socks5:// and socks5h:// likewise; no scheme means http, as curl has it.
    Credentials are percent-decoded. Raises ProxyError."""
    from urllib.parse import unquote, urlsplit  # here: stages import this file, and have no use for it

    shown = redacted(url)
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        raise ProxyError(f"{shown}: not a URL like socks5://user:password@host:1080") from None
    if parts.scheme not in SCHEMES:
        raise ProxyError(f"{shown}: {parts.scheme}:// is not spoken to proxies; http, socks5 and socks5h are")
    kind = SCHEMES[parts.scheme]
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or port == 0:
        raise ProxyError(f"{shown}: not a URL like socks5://user:password@host:1080 (percent-encode / ? # @ in a"
                         " password)")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if max(len(user.encode()), len(password.encode())) > CREDENTIAL_MAX:
        raise ProxyError(f"{shown}: user name and password have at most {CREDENTIAL_MAX} bytes")
    if password and not user:
        raise ProxyError(f"{shown}: a password without a user name")
    if kind == "http" and ":" in user:
        raise ProxyError(f"{shown}: a user name with a colon (RFC 7617 2)")
    return Server(kind=kind, host=parts.hostname, port=port or PORTS[kind], user=user, password=password,
                  only_port=only_port)


def parse_bypass(words: Iterable[str], *, strict: bool = True) -> Bypass:
    """Exact names, .suffixes (also *.suffix), addresses, networks, and * for everything. Raises ProxyError.

    not strict: as NO_PROXY is read by others: a name means itself and all below it, with or without the dot, and
    what cannot be understood is passed over (so it goes through the proxy).
    """
    networks: list[str] = []
    names: list[str] = []
    everything = False
    for word in words:
        word = word.strip().lower()
        if word == "*":
            everything = True
            continue
        try:
            networks.append(str(ipaddress.ip_network(word.strip("[]"), strict=False)))
            continue
        except ValueError:
            pass
        name = word.removeprefix("*").removesuffix(".")
        if len(name) > 254 or not _NAME.match(name) or re.fullmatch(r"[0-9./]+", name):
            if strict:
                raise ProxyError(f"{word or 'nothing'}: neither a name, a .suffix, an address, a network nor *")
            continue
        names += [name] if strict else [name.removeprefix("."), "." + name.removeprefix(".")]
    if len(networks) > BYPASS_MAX or len(names) > BYPASS_MAX:
        raise ProxyError(f"over {BYPASS_MAX} networks or names")
    return Bypass(networks=tuple(networks), names=tuple(names), everything=everything)


def _variable(environ: Mapping[str, str], name: str) -> str:
    """Lower case first, as curl does."""
    return environ.get(name.lower()) or environ.get(name) or ""


def from_environment(environ: Mapping[str, str]) -> tuple[tuple[Server, ...], Bypass]:
    """HTTP_PROXY for flows to port 80, HTTPS_PROXY to 443, ALL_PROXY for the rest; NO_PROXY. Raises ProxyError that
    names the variable."""
    servers = []
    for name, port in VARIABLES:
        if url := _variable(environ, name):
            try:
                servers.append(parse_url(url, only_port=port))
            except ProxyError as e:
                raise ProxyError(f"{name}={e}") from None
    try:
        bypass = parse_bypass([w for w in re.split(r"[,\s]+", _variable(environ, "NO_PROXY")) if w], strict=False)
    except ProxyError as e:
        raise ProxyError(f"NO_PROXY: {e}") from None
    return tuple(servers), bypass


def chosen(proxy: str, no_proxy: Iterable[str], environ: Mapping[str, str]) -> tuple[tuple[Server, ...], Bypass]:
    """Servers and exceptions of --proxy and --no-proxy. Raises ProxyError, beginning with what of --proxy is wrong."""
    bypass = parse_bypass([w for text in no_proxy for w in re.split(r"[,\s]+", text) if w])
    if proxy in ("", "none"):
        return (), bypass
    if proxy == "auto":
        servers, more = from_environment(environ)
        return servers, bypass + more
    return (parse_url(proxy),), bypass


def resolve(server: Server) -> Server:
    """The server with an address for its name, asked of the host's resolver. Raises ProxyError."""
    import socket

    import msgspec

    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise ProxyError(f"{server.host}: {getattr(e, 'strerror', None) or e}") from None
    return msgspec.structs.replace(server, host=str(found[0][4][0]).partition("%")[0])


def plan(proxy: str, no_proxy: Iterable[str], udp: str, environ: Mapping[str, str]) -> Plan | None:
    """What egress shall do; None: everything goes directly. udp: --udp-without-proxy. Raises ProxyError."""
    servers, bypass = chosen(proxy, no_proxy, environ)
    if not servers or bypass.everything:
        return None
    block = proxy != "auto" if udp == "auto" else udp == "block"
    return Plan(servers=tuple(resolve(s) for s in servers), bypass=bypass, udp_block=block)
