#!/usr/bin/env python3
"""TCP over a lossy link: ringnet beside the kernel's own TCP, each over the same bad wire (csrc/rn_impair.c).

    tools/bench/loss.py [--losses 0,0.1,1,5] [--seconds 2] [--repeat 3] [--extra delay=2ms] [--mtu 1500]
                        [--congestion cubic] [--json FILE]

ringnet  guest's kernel -- tap, wire -- ringnet -- host's kernel: `ringnet attach --impair up:... --impair down:...`
kernel   kernel -- tap, wire, tap -- kernel: two namespaces joined by rn_impair_relay(), nothing else between them

Same MTU, no offloads on either link, the same probabilities and seeds; the wire loses frames both ways, so ACKs too.
Congestion control is the machine's own, or --congestion, on every kernel socket: how much 5 % loss costs depends on it
more than on anything (BBR hardly slows down, cubic and reno do).
A run is one connection that sends as fast as it can; what counts is what the receiver has read `--seconds` after the
first byte. Runs alternate, the seed is the run's number; the table shows medians and, as the machine is never quiet,
the ratio, which is the figure to look at. Needs root (namespaces); leaves nothing behind.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from spaces import PATIENCE, REPO, inside, namespace, sh, tcp_socket  # first: it may run this again

from pipeline.config import ConfigError, parse_impair
from shm._dataplane import ffi, lib

SERVER, GUEST, GATEWAY = "198.51.100.2", "10.0.2.2", "10.0.2.1"
_TUNSETOFFLOAD = 0x400454D0  # linux/if_tun.h


class Path2(contextlib.ExitStack):
    """Two namespaces and a lossy way between them: client (the guest's side) and server, at `address`."""

    client: str
    server: str
    address: str


def ringnet(words: str, mtu: int) -> Path2:
    way = Path2()
    with contextlib.ExitStack() as undo:
        undo.push(way)
        way.server, way.client = way.enter_context(namespace("h")), way.enter_context(namespace("g"))
        way.address = SERVER
        sh("ip", "-n", way.server, "addr", "add", f"{SERVER}/32", "dev", "lo")
        ready, told = os.pipe()
        argv = ["ip", "netns", "exec", way.server, sys.executable, "-P", "-m", "pipeline", "attach",
                f"/run/netns/{way.client}", "--config-net", "--mtu", str(mtu), "--ready-fd", str(told), "--quiet",
                "--impair", f"up:{words}", "--impair", f"down:{words}"]
        attached = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=(told,), start_new_session=True,
                                    env=os.environ | {"PYTHONPATH": str(REPO)})
        way.callback(attached.wait)
        way.callback(attached.send_signal, signal.SIGTERM)
        os.close(told)
        with os.fdopen(ready, "rb") as f:
            if not select.select([f], [], [], PATIENCE)[0] or not f.read(1):
                raise SystemExit("loss.py: ringnet did not get ready")
        undo.pop_all()
    return way


def kernel(words: str, mtu: int) -> Path2:
    way = Path2()
    with contextlib.ExitStack() as undo:
        undo.push(way)
        way.server, way.client = way.enter_context(namespace("s")), way.enter_context(namespace("c"))
        way.address = GATEWAY
        taps = []
        for name, address in ((way.client, GUEST), (way.server, GATEWAY)):
            fd = inside(name, lambda: lib.rn_tap_open(b"tap0", ffi.new("int *")))
            if fd < 0:
                raise SystemExit(f"loss.py: cannot make a tap: {os.strerror(-fd)}")
            way.callback(os.close, fd)
            fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "tap0")
            sh("ip", "-n", name, "link", "set", "tap0", "mtu", str(mtu), "up")
            taps.append(ffi.new("struct rn_link *", {"fd": fd, "kind": lib.RN_LINK_TAP, "vnet": 1,
                                                     "frame_max": mtu + 18}))
        hold, stop = os.pipe()
        pid = os.fork()  # a process of its own, as each of ringnet's stages is
        if pid == 0:
            try:
                os.close(stop)
                lib.rn_os_pdeathsig(signal.SIGKILL)
                wires = [lib.rn_impair_new(ffi.new("struct rn_impair_spec *", parse_impair(f"{d}:{words}").spec()),
                                           time.monotonic_ns()) for d in ("up", "down")]
                rc = lib.rn_impair_relay(*taps, *wires, hold)
            finally:
                os._exit(1 if sys.exc_info()[0] or rc else 0)
        os.close(hold)
        way.callback(os.waitpid, pid, 0)
        way.callback(os.close, stop)  # the relay sees it close
        undo.pop_all()
    return way


def throughput(way: Path2, direction: str, seconds: float, congestion: str) -> float:
    """bit/s that one connection's receiver got. up: client to server. congestion: an algorithm's name."""
    listener = inside(way.server, tcp_socket)
    client = inside(way.client, tcp_socket)
    with listener, client:
        for s in (listener, client):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        listener.bind((way.address, 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE)
            source, sink = (client, server) if direction == "up" else (server, client)
            for s in (source, sink):  # at the end: reset, nobody waits for what is under way
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

            def send() -> None:
                block = bytes(256 << 10)
                with contextlib.suppress(OSError):
                    while True:
                        source.sendall(block)

            sender = threading.Thread(target=send)
            sender.start()
            try:
                buf = bytearray(256 << 10)
                sink.recv_into(buf)
                began, got, end = time.monotonic(), 0, time.monotonic() + seconds
                while (now := time.monotonic()) < end:
                    if not select.select([sink], [], [], end - now)[0]:
                        continue
                    n = sink.recv_into(buf)
                    if n == 0:
                        raise SystemExit("loss.py: the connection ended early")
                    got += n
                return got * 8 / (time.monotonic() - began)
            finally:
                source.shutdown(socket.SHUT_RDWR)
                sender.join()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--losses", default="0,0.1,1,5", help="percent, with commas (default %(default)s)")
    p.add_argument("--seconds", type=float, default=2.0, help="of each run (default %(default)s)")
    p.add_argument("--repeat", type=int, default=3, help="runs of each kind (default %(default)s)")
    p.add_argument("--extra", default="", help="more for the wire, both ways: delay=2ms,reorder=1%%")
    p.add_argument("--mtu", type=int, default=1500, help="default %(default)s")
    p.add_argument("--congestion", default=Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
                   metavar="NAME", help="congestion control of every kernel socket (default %(default)s)")
    p.add_argument("--json", metavar="FILE", help="also write every run there; - is standard output")
    a = p.parse_args()
    losses = a.losses.split(",")

    def words(loss: str, seed: int) -> str:
        return ",".join(filter(None, [f"drop={loss}%", a.extra, f"seed={seed}"]))

    try:
        for loss in losses:
            parse_impair(f"up:{words(loss, 1)}")
    except ConfigError as e:
        p.error(str(e))
    runs: list[dict[str, Any]] = []
    for seed in range(1, a.repeat + 1):
        for loss in losses:
            for name, make in (("ringnet", ringnet), ("kernel", kernel)):
                with make(words(loss, seed), a.mtu) as way:
                    for direction in ("up", "down"):
                        rate = throughput(way, direction, a.seconds, a.congestion)
                        runs.append({"system": name, "loss_percent": float(loss), "direction": direction, "seed": seed,
                                     "bits_per_second": round(rate)})
                        print(f"{name:8} {loss:>5} % {direction:5} seed {seed}: {rate / 1e6:10.1f} Mbit/s",
                              file=sys.stderr)

    def median(name: str, loss: str, direction: str) -> float:
        return statistics.median(r["bits_per_second"] for r in runs
                                 if (r["system"], r["loss_percent"], r["direction"]) == (name, float(loss), direction))

    print(f"MTU {a.mtu}, {a.congestion}{f', wire also: {a.extra}' if a.extra else ''}\n")
    print("| loss each way | direction | ringnet, Mbit/s | kernel, Mbit/s | ratio |\n|---|---|---|---|---|")
    for loss in losses:
        for direction, text in (("up", "guest to host"), ("down", "host to guest")):
            ours, theirs = median("ringnet", loss, direction), median("kernel", loss, direction)
            print(f"| {loss} % | {text} | {ours / 1e6:.1f} | {theirs / 1e6:.1f} |"
                  f" {f'{ours / theirs:.2f}' if theirs else '-'} |")
    if a.json:
        text = json.dumps({"mtu": a.mtu, "seconds": a.seconds, "extra": a.extra, "congestion_control": a.congestion,
                           "kernel": os.uname().release, "cpus": os.cpu_count(), "runs": runs}, indent=1)
        if a.json == "-":
            print(text)
        else:
            Path(a.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
