"""Three namespaces in a row, the first one the host's, for what leaves the host.

    host  192.0.2.1 --- 192.0.2.2  router  198.51.100.1 --- 198.51.100.2  far
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from shm._dataplane import lib
from tests.netlab import Netns

ROUTER, FAR = "192.0.2.2", "198.51.100.2"
NO_ROUTE = "203.0.113.9"  # the router has no route to it


@contextlib.contextmanager
def inside(ns: Netns) -> Iterator[None]:
    """This thread, and what it starts, in the network namespace."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(ns.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert lib.rn_os_setns(there, lib.RN_CLONE_NEWNET) == 0
        yield
    finally:
        assert lib.rn_os_setns(home, lib.RN_CLONE_NEWNET) == 0
        os.close(there)
        os.close(home)


@contextlib.contextmanager
def routed(path_mtu: int = 1500) -> Iterator[tuple[Netns, Netns]]:
    """The host's namespace, and the far one; the link behind the router takes packets of path_mtu bytes."""
    with contextlib.ExitStack() as stack:
        host, router, far = (stack.enter_context(Netns(role)) for role in ("h", "r", "f"))
        host.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", router.name)
        router.ip("link", "add", "v2", "type", "veth", "peer", "name", "v3", "netns", far.name)
        for ns, dev, address in ((host, "v0", "192.0.2.1"), (router, "v1", ROUTER), (router, "v2", "198.51.100.1"),
                                 (far, "v3", FAR)):
            ns.ip("addr", "add", f"{address}/24", "dev", dev)
            ns.ip("link", "set", dev, "up")
        router.ip("link", "set", "v2", "mtu", str(path_mtu))
        host.ip("route", "add", "198.51.100.0/24", "via", ROUTER)
        host.ip("route", "add", "203.0.113.0/24", "via", ROUTER)
        far.ip("route", "add", "default", "via", "198.51.100.1")
        for ns in (router, far):
            with inside(ns):
                for path, value in (("ip_forward", "1"), ("icmp_ratelimit", "0")):  # errors without a pause between them
                    with open(f"/proc/sys/net/ipv4/{path}", "w") as f:
                        f.write(value)
        yield host, far
