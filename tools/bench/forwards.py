#!/usr/bin/env python3
"""What a thousand forwards cost: the time to add and to remove them, and what an established flow notices of them.

    tools/bench/forwards.py [--forwards 1000] [--seconds 2] [--repeat 3] [--json FILE]

One session (`ringnet attach`), and two connections through a forward of it that stand from the beginning to the end: over one
a 64-byte request goes to the guest and comes back, over the other bytes go to the guest as fast as they can. Turns without and with the
forwards alternate; the forwards are added and removed by one call of the control API, with the request/response going on
meanwhile. Shown are medians, and the slowest round trip while forwards were added or removed. Needs root (namespaces); leaves
nothing behind.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from spaces import PATIENCE, REPO, inside, namespace, program  # first: it may run this again

from pipeline import api
from pipeline.client import Client

FIRST = 10000  # host port
SERVER = """
import socket, threading
def serve(s):
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    kind, buffer = s.recv(1), bytearray(1 << 20)
    while n := s.recv_into(buffer):
        if kind == b"e":
            s.sendall(buffer[:n])
listener = socket.create_server(("0.0.0.0", 5001))
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def connect_in(name: str, kind: bytes) -> socket.socket:
    """A connection from that namespace to the forward."""
    made = inside(name, lambda: socket.create_connection(("127.0.0.1", 5001), PATIENCE))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.sendall(kind)
    return made


def round_trips(s: socket.socket, enough: Callable[[], bool]) -> list[float]:
    """Seconds of each, until it is enough."""
    request, found = bytes(64), []
    while not enough():
        begin = time.perf_counter()
        s.sendall(request)
        left = len(request)
        while left:
            left -= len(s.recv(left))
        found.append(time.perf_counter() - begin)
    return found


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def rate(s: socket.socket, seconds: float) -> float:
    """Gbit/s that the socket took."""
    block, sent, begin = bytes(256 << 10), 0, time.perf_counter()
    enough = for_seconds(seconds)
    while not enough():
        s.sendall(block)
        sent += len(block)
    return sent * 8e-9 / (time.perf_counter() - begin)


def change(path: str, call: api.Call, rr: socket.socket) -> tuple[float, float]:
    """(seconds it took, slowest round trip meanwhile)."""
    took: list[float] = []

    def go() -> None:
        with Client(path) as client:
            begin = time.perf_counter()
            client.call(call)
            took.append(time.perf_counter() - begin)

    thread = threading.Thread(target=go)
    thread.start()
    slowest = max(round_trips(rr, lambda: not thread.is_alive()), default=0.0)
    thread.join()
    return took[0], slowest


def measure(forwards: int, seconds: float, repeat: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {k: [] for k in (
        "add_s", "remove_s", "slowest_s", "rr_without_s", "rr_with_s", "gbps_without", "gbps_with")}
    with contextlib.ExitStack() as stack:
        host, guest = stack.enter_context(namespace("h")), stack.enter_context(namespace("g"))
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/api.sock"
        ready, told = os.pipe()
        env = dict(os.environ, PYTHONPATH=str(REPO))
        stack.enter_context(program(
            "ip", "netns", "exec", host, sys.executable, "-P", "-m", "pipeline", "attach", f"/run/netns/{guest}",
            "--config-net", "--ready-fd", str(told), "-q", "-t", "127.0.0.1/5001", "--api-socket", path,
            pass_fds=[told], env=env))
        os.close(told)
        if os.read(ready, 1) != b"1":
            sys.exit("forwards.py: the session did not start")
        os.close(ready)
        server = stack.enter_context(program("ip", "netns", "exec", guest, sys.executable, "-c", SERVER,
                                             stdout=subprocess.PIPE))
        assert server.stdout
        server.stdout.readline()
        rr, bulk = (stack.enter_context(connect_in(host, kind)) for kind in (b"e", b"d"))
        rate(bulk, 0.5)  # windows open
        for _ in range(repeat):
            found["rr_without_s"] += round_trips(rr, for_seconds(seconds / 2))
            found["gbps_without"].append(rate(bulk, seconds))
            took, slow = change(path, api.ForwardsAdd(specs=[f"{FIRST}-{FIRST + forwards - 1}"], owner="bench"), rr)
            found["add_s"].append(took)
            found["rr_with_s"] += round_trips(rr, for_seconds(seconds / 2))
            found["gbps_with"].append(rate(bulk, seconds))
            gone, slower = change(path, api.ForwardsRemove(owner="bench"), rr)
            found["remove_s"].append(gone)
            found["slowest_s"].append(max(slow, slower))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--forwards", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each throughput figure")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", help="write all samples to this file")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("forwards.py: needs root, to make network namespaces")
    found = measure(args.forwards, args.seconds, args.repeat)
    mid = {k: statistics.median(v) for k, v in found.items()}
    n = args.forwards
    print(f"adding {n} forwards      {mid['add_s'] * 1e3:8.1f} ms   removing them {mid['remove_s'] * 1e3:.1f} ms   slowest"
          f" round trip meanwhile {max(found['slowest_s']) * 1e3:.1f} ms")
    print(f"                        without   with {n}")
    print(f"round trip, us         {mid['rr_without_s'] * 1e6:8.1f}   {mid['rr_with_s'] * 1e6:8.1f}")
    print(f"bulk, Gbit/s           {mid['gbps_without']:8.2f}   {mid['gbps_with']:8.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
