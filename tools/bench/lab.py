"""Three network namespaces of our own; nothing else on the machine is touched.

    guest --(tap, made by the datapath)-- [datapath's processes, in `host`] --veth-- server

The server's address is not the datapath's gateway address. All are made anew for each start of a datapath: sockets in
TIME-WAIT that one left must not slow the next one's connects. Congestion control is cubic (reno where cubic may not be
chosen): with BBR in the guest, the default of some machines, every datapath loses half its speed and some starve.
"""
from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence

SERVER = "198.51.100.2"  # RFC 5737
HOST, HOST_PEER = "192.0.2.1", "192.0.2.2"
TAP = "tap0"
KERNEL_GUEST, KERNEL_GATEWAY = "10.0.2.2", "10.0.2.1"
_NETNS = "/run/netns"
_NAME = re.compile(r"rb(\d+)(?:host|server|guest)")
_SYSCTL = {
    "net.ipv4.ip_local_port_range": "1024 65535",  # connect-request-close leaves each port in TIME-WAIT
    "net.ipv4.ping_group_range": "0 2147483647",
}


class LabError(Exception):
    """One line: what could not be set up or measured."""


def sh(*argv: str, timeout: float = 30.0) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: status {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def inside(namespace: str, *argv: str) -> list[str]:
    """Command line that runs argv in a namespace, and ends it when we are killed."""
    return ["ip", "netns", "exec", namespace, "setpriv", "--pdeathsig", "KILL", *argv]


def reap() -> list[str]:
    """Remove the namespaces of runs that were killed; returns their names."""
    names = os.listdir(_NETNS) if os.path.isdir(_NETNS) else []
    dead = [n for n in names if (m := _NAME.fullmatch(n)) and not os.path.exists(f"/proc/{m[1]}")]
    for name in dead:
        with contextlib.suppress(LabError):  # another run was faster
            sh("ip", "netns", "del", name)
    return dead


class Lab:
    """Names of the namespaces; they carry our pid, so that labs can run side by side."""

    def __init__(self) -> None:
        self.host, self.server, self.guest = (f"rb{os.getpid()}{role}" for role in ("host", "server", "guest"))

    def _make(self) -> None:
        for name in (self.host, self.server, self.guest):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
            sh(*inside(name, "sysctl", "-qw", *(f"{k}={v}" for k, v in _SYSCTL.items())))
            _congestion_control(name)
        sh("ip", "-n", self.host, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", self.server)
        for name, device, address in ((self.host, "v0", HOST), (self.server, "v1", HOST_PEER)):
            sh("ip", "-n", name, "addr", "add", f"{address}/30", "dev", device)
            sh("ip", "-n", name, "link", "set", device, "up")
        sh("ip", "-n", self.server, "addr", "add", f"{SERVER}/32", "dev", "lo")
        sh("ip", "-n", self.host, "route", "add", "default", "via", HOST_PEER)

    def _remove(self) -> None:
        for name in (self.guest, self.host, self.server):
            with contextlib.suppress(LabError):  # it was not made
                sh("ip", "netns", "del", name)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Lab]:
        try:
            self._make()
            yield self
        finally:
            self._remove()

    def forward_by_kernel(self, mtu: int) -> None:
        """The guest behind a second veth pair, routed: the way without a datapath."""
        sh(*inside(self.host, "sysctl", "-qw", "net.ipv4.ip_forward=1"))
        sh("ip", "-n", self.host, "link", "add", "d0", "mtu", str(mtu), "type", "veth",
           "peer", "name", TAP, "mtu", str(mtu), "netns", self.guest)
        for name, device, address in ((self.host, "d0", KERNEL_GATEWAY), (self.guest, TAP, KERNEL_GUEST)):
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            sh("ip", "-n", name, "link", "set", device, "up")
        sh("ip", "-n", self.server, "route", "add", "10.0.2.0/24", "via", HOST)
        sh("ip", "-n", self.guest, "route", "add", "default", "via", KERNEL_GATEWAY)


def _congestion_control(namespace: str) -> None:
    refused = []
    for name in ("cubic", "reno"):
        try:
            sh(*inside(namespace, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={name}"))
            return
        except LabError as e:
            refused.append(str(e))
    raise LabError("; ".join(refused))


def congestion_control(namespace: str) -> str:
    return sh(*inside(namespace, "sysctl", "-n", "net.ipv4.tcp_congestion_control")).strip()


def guest_address(lab: Lab) -> str:
    """What the datapath gave the guest."""
    words: Sequence[str] = sh("ip", "-n", lab.guest, "-4", "-o", "addr", "show", "dev", TAP).split()
    if "inet" not in words:
        raise LabError(f"the guest's {TAP} has no IPv4 address")
    return words[words.index("inet") + 1].split("/")[0]
