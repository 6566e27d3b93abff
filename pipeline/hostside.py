"""The host side of the second NIC on Linux: bridge, tap, NAT, routes; made, shared by sessions, and removed.

What there is, is written on the interfaces themselves (their alias), so that it is true whoever looks and whatever
was killed:

    bridge  rn-NAME   ringnet MODE NAME [forward=IF,IF]   forward: where we turned forwarding on
    tap     rnt0      ringnet PID/START [ADDRESS ...]     the session that has it; where it routes to: its guest

A tap is not persistent: the kernel removes it when the last process that has it ends, also by SIGKILL. So a bridge of
ours is in use exactly as long as a tap of ours is on it, and no process id needs to be believed. Who opens or closes
a host side removes, before anything else, all that nobody uses: bridge, nftables table, forwarding, routes to
guests that are gone. What may be left after a SIGKILL of all of ringnet is therefore gone after the next start.

Two sessions may do so at the same time: the steps are done under a lock of the network namespace, which is a name
in its abstract Unix sockets. The kernel gives it back when its holder ends, and who waits is woken by that.

Source: rtnetlink(7), unix(7), nft(8); IFF_TAP without IFF_PERSIST: tuntap.rst.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from pipeline import netlink
from pipeline.netlink import LinkInfo, NetlinkError
from pipeline.nic2 import MTU, SUBNETS, Facts, Nic2, Route, generated_mac, guest_address
from shm._dataplane import ffi, lib

LOCK = b"\0ringnet-nic2"
LOCK_DEADLINE = 20.0  # s; what is done under it takes some 20 ms
OURS = "ringnet "  # how an alias of ours begins
FORWARD_MAX = 8  # interfaces named in an alias (256 bytes, linux/if.h)
NEEDS = ("needs CAP_NET_ADMIN: run as root, or let root make the host side:"
         " sudo ringnet nic2-helper --nic2 {} -- ringnet run --nic2 fd=3 ...")
_TUNGETIFF = 0x800454D2  # linux/if_tun.h


class HostSideError(Exception):
    """The host side cannot be made; one line that says what to do."""


class Host(Struct, frozen=True, kw_only=True):
    """An open host side. Descriptors belong to the backend, until its close()."""

    fd: int
    kind: str  # of link: "tap", "dgram", "stream"
    vnet: bool  # it has virtio-net headers
    facts: Facts
    dhcp: int = -1  # socket of the DHCP server on the bridge, or -1: somebody else's


class Backend(Protocol):
    """Who has the host side. open() and close() may be called in turn, any number of times."""

    def open(self) -> Host:
        """Raises HostSideError; then nothing is left."""

    def close(self) -> None:
        """Remove what open() made. Harmless if there is nothing."""

    def guest_is(self, address: IPv4Address) -> str:
        """The guest's address became known (somebody else's DHCP gave it). Returns "" or what went wrong."""


# -- the lock

@contextlib.contextmanager
def locked(name: bytes = LOCK, seconds: float = LOCK_DEADLINE) -> Iterator[None]:
    """Alone in this network namespace, for as long as the block runs. Raises HostSideError."""
    until = time.monotonic() + seconds
    while (sock := _claim(name)) is None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
            try:
                waiting.settimeout(max(0.001, until - time.monotonic()))
                waiting.connect(name)
                # The holder never accepts: its end is the only event.
                poll = select.poll()
                poll.register(waiting, select.POLLIN)
                poll.poll(max(0.0, until - time.monotonic()) * 1000)
            except (ConnectionRefusedError, ConnectionResetError, TimeoutError):
                pass  # it let go in between
        if time.monotonic() >= until:
            raise HostSideError(f"--nic2: another process holds the lock @{name[1:].decode()} of this network namespace"
                                f" for over {seconds:g} s")
    with sock:
        yield


def _claim(name: bytes) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name)
        sock.listen(1024)
        return sock
    except OSError as e:
        sock.close()
        if e.errno != errno.EADDRINUSE:
            raise
        return None


class Mac:
    """A MAC address that no other session of this network namespace has, for as long as this object lives.

    Without one given it is the same at every start: made of the machine, the user and the session's name; unnamed sessions
    side by side count up."""

    def __init__(self, given: str, session: str) -> None:
        """Raises HostSideError if the one given is taken."""
        self._held: socket.socket | None = None
        if given:
            self.text = given
            if not self._hold():
                raise HostSideError(f"--nic2 mac={given}: another session here has it")
            return
        for n in range(4096):
            self.text = generated_mac(_machine(), str(os.getuid()), session, str(n))
            if self._hold():
                return
        raise HostSideError("--nic2: no MAC address is free")

    def _hold(self) -> bool:
        self._held = _claim(b"\0ringnet-mac-" + self.text.encode())
        return self._held is not None

    def descriptors(self) -> list[int]:
        """A forked child must close them: a lock held there would outlive us."""
        return [self._held.fileno()] if self._held is not None else []

    def close(self) -> None:
        if self._held is not None:
            self._held.close()


def _machine() -> str:
    """Identity of this machine (machine-id(5)), or its name where it has none."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return socket.gethostname()


# -- what is there, and what nobody uses

def _words(link: LinkInfo) -> list[str]:
    return link.alias.split()[1:] if link.alias.startswith(OURS) else []


def _bridges(links: Iterable[LinkInfo]) -> list[LinkInfo]:
    return [k for k in links if k.kind == "bridge" and _words(k)]


def _ports(links: Iterable[LinkInfo], bridge: LinkInfo) -> list[LinkInfo]:
    """Taps of sessions on it."""
    return [k for k in links if k.master == bridge.index and k.kind == "tun" and _words(k)]


def _guests(ports: Iterable[LinkInfo]) -> set[IPv4Address]:
    """Addresses of the sessions' guests."""
    return {IPv4Address(word) for port in ports for word in _words(port)[1:]}


def _forward_file(ifname: str) -> Path:
    return Path("/proc/sys/net/ipv4/conf") / ifname / "forwarding"


def _forwarded(bridge: LinkInfo) -> list[str]:
    """Interfaces on which we turned forwarding on, by the bridge's alias."""
    return next((w.removeprefix("forward=").split(",") for w in _words(bridge) if w.startswith("forward=")), [])


def _nft_program() -> str | None:
    return shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _nft(text: str, what: str) -> str:
    """Raises HostSideError."""
    if (program := _nft_program()) is None:
        raise HostSideError(f"--nic2: {what} needs the program nft; install the package nftables")
    done = subprocess.run([program, "-f", "-"], input=text, capture_output=True, text=True, timeout=30)
    if done.returncode:
        why = done.stderr.strip().splitlines()
        raise HostSideError(f"--nic2: {what}: nft: {why[0] if why else 'failed'}")
    return done.stdout


def _table(bridge: str) -> str:
    return "ringnet_" + bridge.removeprefix("rn-")


def _tables() -> set[str]:
    """Our tables. None where there is no nft to have made them, or no right to look: what is done next says so."""
    if (program := _nft_program()) is None:
        return set()
    listed = subprocess.run([program, "list", "tables", "ip"], capture_output=True, text=True, timeout=30).stdout
    return set(re.findall(r"(?m)^table ip (ringnet_\S+)$", listed))


def tidy() -> None:
    """Remove every network of ours that no session uses, and routes to guests that are gone. Under the lock.

    Raises NetlinkError, HostSideError.
    """
    links = netlink.links()
    bridges = _bridges(links)
    for bridge in bridges:
        if not _ports(links, bridge):
            _remove_network(bridge, [b for b in bridges if b.index != bridge.index and _ports(links, b)])


    for table in _tables() - {_table(b.name) for b in bridges}:  # somebody deleted its bridge
        _nft(f"delete table ip {table}\n", "removing its table")
    taps = [k for k in links if k.kind == "tun" and _words(k)]
    live = {(k.master, address) for k in taps for address in _guests([k])}
    for route in netlink.routes():
        if route.proto == netlink.RTPROT_OURS and route.via and (route.oif, route.via) not in live:
            netlink.route_delete(route.network, route.via, route.oif)


def _remove_network(bridge: LinkInfo, others: list[LinkInfo]) -> None:
    if _words(bridge)[0] in ("shared", "host"):
        # `add` first: deleting a table that is not there is an error, adding one that is there is none.
        _nft(f"add table ip {_table(bridge.name)}\ndelete table ip {_table(bridge.name)}\n", "removing its table")
        still = {name for other in others for name in _forwarded(other)}
        if _forward_file("all").read_text().strip() == "0":  # else somebody wants it on everywhere by now
            for name in set(_forwarded(bridge)) - still:
                with contextlib.suppress(OSError):  # the interface is gone, or /proc/sys is read-only: nothing was changed
                    _forward_file(name).write_text("0")
    netlink.link_delete(bridge.name)


class LinuxBridge:
    """A tap on a bridge: modes shared, host and bridged."""

    def __init__(self, spec: Nic2, routes: Iterable[Route], mac: str, *,
                 warn: Callable[[str], None] = lambda text: None) -> None:
        self.spec, self.routes, self.mac, self._warn = spec, tuple(routes), mac, warn
        self._tap = self._dhcp = -1
        self._name = ""
        self._bridge = 0  # its interface index
        self._added: list[tuple[Route, IPv4Address]] = []
        self._made = False  # there may be something to remove

    def open(self) -> Host:
        try:
            with locked():
                tidy()
                self._made = True
                return self._open()
        except NetlinkError as e:
            self.close()
            why = f"; {NEEDS.format(self.spec.mode)}" if e.errno in (errno.EPERM, errno.EACCES) else ""
            raise HostSideError(f"--nic2 {self.spec.mode}: {e.strerror}{why}") from e
        except BaseException:
            self.close()
            raise

    def _open(self) -> Host:
        spec = self.spec
        links = netlink.links()
        address: IPv4Address | None = None
        if spec.mode == "bridged":
            bridge, host = self._given_bridge(links), None
        else:
            bridge, host = self._network(links)
            ports = _ports(links, bridge)
            address = guest_address(host, self.mac, _guests(ports))
            if address is None:
                raise HostSideError(f"--nic2: every address of {host.network} is taken")
        self._bridge = bridge.index
        mtu = spec.mtu or bridge.mtu
        self._tap, self._name = self._make_tap()
        self._sign(address)
        with contextlib.suppress(OSError):  # a host without IPv6: a port of a bridge needs no addresses, and sends none then
            (Path("/proc/sys/net/ipv6/conf") / self._name / "disable_ipv6").write_text("1")
        netlink.link_mtu(self._name, mtu)
        netlink.link_queue(self._name)
        netlink.link_master(self._name, bridge.index, isolated=spec.isolate)
        netlink.link_up(self._name)
        if host is not None:
            self._dhcp = _dhcp_socket(bridge.name)
        for route in self.routes:
            if (via := route.via or address) is not None:
                self._add_route(route, via)
        return Host(fd=self._tap, kind="tap", vnet=True, dhcp=self._dhcp, facts=Facts(
            mac=self.mac, mtu=mtu, host=f"bridge {bridge.name}, tap {self._name}",
            address=f"{address}/{host.network.prefixlen}" if host else "", gateway=str(host.ip) if host else "",
            router=spec.mode == "shared"))

    def _sign(self, guest: IPv4Address | None) -> None:
        """Write on the tap whose it is, and to which addresses we route."""
        vias = {r.via or guest for r in self.routes} | {guest}
        netlink.link_alias(self._name, OURS + " ".join([_process(), *(str(v) for v in vias if v is not None)]))

    def _make_tap(self) -> tuple[int, str]:
        failed = ffi.new("int *")
        fd = lib.rn_tap_open(b"rnt%d", failed)
        if fd < 0:
            why = f"; {NEEDS.format(self.spec.mode)}" if -fd in (errno.EPERM, errno.EACCES) else ""
            raise HostSideError(f"--nic2: cannot make a tap: {os.strerror(-fd)}{why}")
        return fd, tap_name(fd)

    def _network(self, links: list[LinkInfo]) -> tuple[LinkInfo, IPv4Interface]:
        """The bridge of a shared or host network, made or joined, and the host's address on it."""
        spec, name = self.spec, f"rn-{self.spec.network}"
        there = next((k for k in links if k.name == name), None)
        if there is None:
            return self._new_network(name, links)
        if _words(there)[:1] != [spec.mode]:
            what = f"is a network of mode {_words(there)[0]}" if _words(there) else "is somebody else's interface"
            raise HostSideError(f"--nic2 {spec.mode}: {name} {what}; give another name=")
        host = next((a for i, a in netlink.addresses() if i == there.index), None)
        if host is None:
            raise HostSideError(f"--nic2 {spec.mode}: {name} has lost its address; end the sessions that use it")
        if spec.address not in (None, host):
            raise HostSideError(f"--nic2 subnet={spec.subnet}: network {spec.network} exists with {host}; leave subnet= out"
                                " to join it, or give another name=")
        if spec.mtu and spec.mtu > there.mtu:
            raise HostSideError(f"--nic2 mtu={spec.mtu}: network {spec.network} exists with MTU {there.mtu}")
        return there, host

    def _new_network(self, name: str, links: list[LinkInfo]) -> tuple[LinkInfo, IPv4Interface]:
        spec = self.spec
        host = spec.address or _free_subnet()
        mtu = spec.mtu or MTU
        forward = self._outward(links) if spec.mode == "shared" else []
        alias = f"{OURS}{spec.mode} {spec.network}" + (f" forward={','.join(forward)}" if forward else "")
        netlink.bridge_add(name, generated_mac("bridge", spec.network), alias)
        netlink.link_mtu(name, mtu)
        netlink.addr_add(name, host)
        netlink.link_up(name)
        _nft(_rules(spec.mode, name, host), "address translation" if spec.mode == "shared" else "keeping it apart")
        for ifname in (forward + [name]) if spec.mode == "shared" else []:
            try:
                _forward_file(ifname).write_text("1")
            except OSError as e:
                self._warn(f"--nic2 shared: guests do not get out: cannot turn on forwarding on {ifname}: {e.strerror};"
                           " do it with sysctl net.ipv4.ip_forward=1")
                break
        return next(k for k in netlink.links() if k.name == name), host

    @staticmethod
    def _outward(links: list[LinkInfo]) -> list[str]:
        """Interfaces that replies to guests come in by, and that do not forward yet."""
        addressed = {i for i, _ in netlink.addresses()}
        outward = {r.oif for r in netlink.routes() if r.via is not None}
        found = [k for k in links if k.index in addressed and k.name != "lo"]
        if len(found) > FORWARD_MAX:
            found = [k for k in found if k.index in outward][:FORWARD_MAX]
        ours = {name for b in _bridges(links) for name in _forwarded(b)}
        return [k.name for k in found
                if k.name in ours or (not _words(k) and _forward_file(k.name).read_text().strip() == "0")]

    def _given_bridge(self, links: list[LinkInfo]) -> LinkInfo:
        name = self.spec.interface
        by_index = {k.index: k for k in links}
        there = next((k for k in links if k.name == name), None)
        if there is None:
            raise HostSideError(f"--nic2 bridged,if={name}: this host has no such interface")
        if there.kind == "bridge":
            return there
        if there.master:
            master = by_index.get(there.master)
            if master is not None and _words(master)[:2] == ["bridged", name]:
                return master  # another session's, made for this interface
            raise HostSideError(f"--nic2 bridged,if={name}: it is on {master.name if master else 'a bridge'}; give that as"
                                " if=")
        if any(i == there.index for i, _ in netlink.addresses()):
            raise HostSideError(f"--nic2 bridged,if={name}: it has an address, which would stop working on a bridge; make a"
                                f" bridge, move the address to it, and give the bridge as if= (docs/nic2.md)")
        bridge = f"rn-{name}"[:15]
        netlink.bridge_add(bridge, generated_mac("bridge", name), f"{OURS}bridged {name}")
        netlink.link_mtu(bridge, there.mtu)
        netlink.link_master(name, netlink.index(bridge))
        netlink.link_up(name)
        netlink.link_up(bridge)
        return next(k for k in netlink.links() if k.name == bridge)

    def _add_route(self, route: Route, via: IPv4Address) -> None:
        try:
            netlink.route_add(route.network, via, self._bridge)
        except NetlinkError as e:
            if e.errno == errno.EEXIST:
                raise HostSideError(f"--route {route.network}: this host has a route to it already (ip route show"
                                    f" {route.network})") from e
            if e.errno == errno.ENETUNREACH:
                raise HostSideError(f"--route {route.network}: {via} is not on a network of this host's bridge; give the"
                                    " bridge an address there") from e
            raise
        self._added.append((route, via))

    def guest_is(self, address: IPv4Address) -> str:
        try:
            with locked():
                self._sign(address)
                for route in self.routes:
                    if route.via is None and not any(r is route for r, _ in self._added):
                        self._add_route(route, address)
        except (HostSideError, NetlinkError) as e:
            return e.strerror if isinstance(e, NetlinkError) else str(e)
        return ""

    def close(self) -> None:
        for route, via in self._added:
            with contextlib.suppress(NetlinkError):  # somebody removed it, or the bridge, before us
                netlink.route_delete(route.network, via, self._bridge)
        self._added = []
        if self._dhcp >= 0:
            os.close(self._dhcp)
            self._dhcp = -1
        if self._tap >= 0:
            with contextlib.suppress(OSError):  # somebody deleted it
                netlink.link_delete(self._name)  # at once, whoever has a descriptor of it still
            os.close(self._tap)
            self._tap = -1
        if not self._made:
            return
        self._made = False
        try:
            with locked():
                tidy()
        except (HostSideError, NetlinkError) as e:
            self._warn(f"--nic2: the network stays until the next start: {e.strerror if isinstance(e, OSError) else e}")


def tap_name(fd: int) -> str:
    """Name of a tap by its descriptor. Raises OSError (EBADFD: it is none)."""
    ifreq = fcntl.ioctl(fd, _TUNGETIFF, bytes(40))
    return ifreq[:16].rstrip(b"\0").decode()


def _process() -> str:
    """Us: process id and start time, in clock ticks since boot (proc_pid_stat(5))."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return f"{os.getpid()}/{fields[19]}"


def _free_subnet() -> IPv4Interface:
    """The first of our own that overlaps nothing this host has an address in or a route to."""
    used = [a.network for _, a in netlink.addresses()] + [r.network for r in netlink.routes() if r.network.prefixlen]
    for text in SUBNETS:
        found = IPv4Interface(text)
        if not any(found.network.overlaps(net) for net in used):
            return found
    raise HostSideError("--nic2: this host uses all of 192.168.64.0/18; give subnet=")


def _rules(mode: str, bridge: str, host: IPv4Interface) -> str:
    """The network's table: nobody but the host gets in, and in mode host nobody gets out."""
    out = {"shared": [f'iifname != "{bridge}" oifname "{bridge}" ct state new drop'],
           "host": [f'iifname != "{bridge}" oifname "{bridge}" drop', f'iifname "{bridge}" oifname != "{bridge}" drop']}[mode]
    table = _table(bridge)
    # Anew, whatever a killed session left under the name.
    lines = [f"add table ip {table}", f"delete table ip {table}", f"add table ip {table}",
             f"add chain ip {table} forward {{ type filter hook forward priority filter; }}",
             *(f"add rule ip {table} forward {rule}" for rule in out)]
    if mode == "shared":
        lines += [f"add chain ip {table} nat {{ type nat hook postrouting priority srcnat; }}",
                  f'add rule ip {table} nat ip saddr {host.network} oifname != "{bridge}" masquerade']
    return "\n".join(lines) + "\n"


def _dhcp_socket(bridge: str) -> int:
    """The server's port on the bridge. Several sessions have it there: a broadcast reaches every one."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode() + b"\0")
        sock.bind(("", 67))  # RFC 2131 4.1
    except OSError as e:
        sock.close()
        raise HostSideError(f"--nic2: no DHCP server on {bridge}: port 67: {e.strerror}"
                            + ("; a server that takes every interface runs here, bind it to its own"
                               if e.errno == errno.EADDRINUSE else "")) from e
    return sock.detach()
