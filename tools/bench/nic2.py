#!/usr/bin/env python3
"""iperf3 over the second NIC, beside a plain kernel bridge and beside socat.

    tools/bench/nic2.py [--secs 2] [--reps 3] [--mtu 1500] [--ways ringnet,kernel,socat] [--json FILE]

    kernel    guest -- veth -- bridge of the host: the ceiling, no relay at all
    ringnet   guest -- tap -- guest_tx, vmnet, guest_rx -- tap -- bridge: `ringnet attach --nic2 host`
    socat     guest -- tap -- socat -- datagram socket -- socat -- tap -- bridge: a relay of a frame a system call

One TCP connection, guest to host (up) and host to guest (down), all ways in turn within each repetition. What counts is
the ratio within one run: the figures themselves move by 30 % and more. For ringnet also: what each stage handed on and
the next one took, and what the two taps dropped in the kernel; both must say that no segment was lost on the way.
Needs root, iperf3 and socat; all of it happens in namespaces that are gone afterwards.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spaces import PATIENCE, REPO, iperf3, namespace, program, sh  # first: it may run this again

RINGNET = (sys.executable, "-P", "-m", "pipeline")


def until(what: str, true: Any) -> None:
    """A program of somebody else's that tells nobody when it is ready."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            sys.exit(f"nic2.py: {what}: not within {PATIENCE:g} s")
        time.sleep(0.02)


class Way:
    """A guest, and the host's address as it sees it."""

    def __init__(self, guest: str, host: str, address: str) -> None:
        self.guest, self.host, self.address = guest, host, address

    def lost(self) -> str:
        """What was lost between the two ends; "" if that is not ours to know."""
        return ""


def bridge(host: str, name: str, address: str, mtu: int) -> None:
    sh("ip", "-n", host, "link", "add", name, "mtu", str(mtu), "type", "bridge", "forward_delay", "0")
    sh("ip", "-n", host, "addr", "add", address, "dev", name)
    sh("ip", "-n", host, "link", "set", name, "up")


@contextlib.contextmanager
def kernel(mtu: int) -> Iterator[Way]:
    with namespace("kh") as host, namespace("kg") as guest:
        bridge(host, "br0", "10.55.0.1/24", mtu)
        sh("ip", "-n", host, "link", "add", "v0", "mtu", str(mtu), "type", "veth", "peer", "name", "eth0", "mtu", str(mtu),
           "netns", guest)
        sh("ip", "-n", host, "link", "set", "v0", "master", "br0", "up")
        sh("ip", "-n", guest, "addr", "add", "10.55.0.2/24", "dev", "eth0")
        sh("ip", "-n", guest, "link", "set", "eth0", "up")
        yield Way(guest, host, "10.55.0.1")


@contextlib.contextmanager
def socat(mtu: int) -> Iterator[Way]:
    with namespace("sh") as host, namespace("sg") as guest, tempfile.TemporaryDirectory() as tmp:
        bridge(host, "br0", "10.55.0.1/24", mtu)
        tap = "TUN,tun-type=tap,tun-name={},iff-no-pi,iff-up"
        with program("ip", "netns", "exec", host, "socat", "-lf", "/dev/null", "-b", "70000", tap.format("t0"),
                     f"UNIX-SENDTO:{tmp}/g,bind={tmp}/h"), \
                program("ip", "netns", "exec", guest, "socat", "-lf", "/dev/null", "-b", "70000", tap.format("t1"),
                        f"UNIX-SENDTO:{tmp}/h,bind={tmp}/g"):
            for ns, name in ((host, "t0"), (guest, "t1")):
                until(f"socat's {name}", lambda ns=ns, name=name: f" {name}:" in sh("ip", "-n", ns, "link"))
                sh("ip", "-n", ns, "link", "set", name, "mtu", str(mtu), "up")
            until("socat's sockets", lambda: len(os.listdir(tmp)) == 2)
            sh("ip", "-n", host, "link", "set", "t0", "master", "br0")
            sh("ip", "-n", guest, "addr", "add", "10.55.0.2/24", "dev", "t1")
            yield Way(guest, host, "10.55.0.1")


class Ringnet(Way):
    def __init__(self, guest: str, host: str, env: dict[str, str]) -> None:
        super().__init__(guest, host, "10.55.0.1")
        self.env = env

    def ctl(self, *argv: str) -> Any:
        out = sh(*RINGNET, "ctl", *argv, "--json", env=self.env)
        return json.loads(out) if out.strip() else None

    def lost(self) -> str:
        dropped = [sum(k["stats64"]["tx"]["dropped"] for k in json.loads(sh("ip", "-s", "-j", "-n", ns, "link"))
                       if k["ifname"] in ("tap1", "rnt0")) for ns in (self.guest, self.host)]
        self.ctl("cancel", "nic2")  # so that nothing moves while it is counted
        said = self.ctl("statistics")
        c, fill = said["counters"], {r["name"]: r["fill"] for r in said["rings"]}
        up = c["guest_tx"]["nic2_up_frames"], c["vmnet"]["vmnet_up_frames"] + fill["guest_tx->vmnet"]
        down = (c["vmnet"]["vmnet_down_frames"],
                c["guest_rx"]["nic2_down_frames"] + c["guest_rx"].get("drop_link_down", 0) + fill["vmnet->guest_rx"])
        return (f"up {up[0]} frames in, {up[1]} out; down {down[0]} in, {down[1]} out; dropped by the taps' queues: guest"
                f" {dropped[0]}, host {dropped[1]}")


@contextlib.contextmanager
def ringnet(mtu: int) -> Iterator[Way]:
    with namespace("rh") as host, namespace("rg") as guest, tempfile.TemporaryDirectory() as tmp:
        ready, told = os.pipe()
        env = os.environ | {"PYTHONPATH": str(REPO), "RINGNET_RUNTIME_DIR": tmp}
        with program("ip", "netns", "exec", host, *RINGNET, "attach", f"/run/netns/{guest}", "--config-net", "--ready-fd",
                     str(told), "--quiet", "--nic2", f"host,subnet=10.55.0.1/24,mtu={mtu}", pass_fds=(told,), env=env):
            os.close(told)
            with os.fdopen(ready, "rb") as f:
                if not select.select([f], [], [], PATIENCE)[0] or not f.read(1):
                    sys.exit("nic2.py: ringnet did not get ready")
            yield Ringnet(guest, host, env)


WAYS = {"kernel": kernel, "ringnet": ringnet, "socat": socat}


def measure(way: Way, secs: float, down: bool) -> tuple[float, int]:
    """Gbit/s that the receiver got, and segments the sender sent again."""
    end = iperf3(way.host, way.guest, way.address, secs, *(["-R"] if down else []))
    return end["sum_received"]["bits_per_second"] / 1e9, end["sum_sent"]["retransmits"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--secs", type=int, default=2)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--ways", default="kernel,ringnet,socat")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    names = args.ways.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"--ways: {', '.join(unknown)} is none of {', '.join(WAYS)}")
    if os.geteuid() != 0:
        parser.error("needs root")
    got: dict[tuple[str, bool], list[tuple[float, int]]] = {}
    lost: list[str] = []
    for rep in range(args.reps):
        for name in names[rep % len(names):] + names[:rep % len(names)]:
            with WAYS[name](args.mtu) as way:
                for down in (False, True):
                    got.setdefault((name, down), []).append(measure(way, args.secs, down))
                lost += [said] if (said := way.lost()) else []
    print(f"| MTU {args.mtu}, Gbit/s | " + " | ".join(names) + " | ringnet / kernel | retransmits of ringnet, kernel |")
    print("|---|" + "---|" * (len(names) + 2))
    for down in (False, True):
        middle = {n: statistics.median(g for g, _ in got[n, down]) for n in names}
        again = ["/".join(str(r) for _, r in got[n, down]) if n in names else "" for n in ("ringnet", "kernel")]
        ratio = f"{middle['ringnet'] / middle['kernel']:.2f}" if {"ringnet", "kernel"} <= set(names) else ""
        print(f"| {'down' if down else 'up'} | " + " | ".join(f"{middle[n]:.2f}" for n in names) + f" | {ratio} |"
              f" {', '.join(again)} |")
    for said in lost:
        print(said)
    if args.json:
        Path(args.json).write_text(json.dumps([{"way": n, "down": d, "gbit": [g for g, _ in v], "retransmits": [r for _, r in v]}
                                               for (n, d), v in got.items()]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
