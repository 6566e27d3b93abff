#!/usr/bin/env python3
"""What looking at a session costs: bulk TCP with nobody looking, with captures, and with `ringnet top` at many flows.

    tools/bench/looking.py [--seconds 2] [--repeat 5] [--flows 10000] [--mtu 4000] [--json FILE]

capture flow   `ringnet capture all --flow ...` of another connection, which says a few bytes every 10 ms
capture link   `ringnet capture link --snaplen 96` of everything
top            `ringnet top -i 1`, with so many UDP mappings in the table

Each is measured beside a run that differs in nothing but that nobody looks: the other connection speaks, the mappings are
there. One connection, up and then down, as fast as it goes. Of the two, now one comes first, now the other. The table has medians
with their ranges, and the ratio of the medians with the range of the ratios of neighbours. Needs root (namespaces) and
iperf3; leaves nothing behind. Under five minutes as it is.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from spaces import REPO, inside, iperf3, namespace, sh, tcp_socket  # first: it may run this again
from stats import Summary, ratio, summary

SERVER = "198.51.100.2"
TALK_PORT = 5300
MANY = """
import socket, sys
for n in range(int(sys.argv[1])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("10.0.2.2", 20000 + n))
        s.sendto(b"x", ("198.51.100.2", 9))
    if n % 200 == 0:
        with socket.create_connection(("198.51.100.2", 5300)) as s:
            s.sendall(b"x")
            s.recv(1)
"""


class Session:
    """`ringnet attach` between two namespaces, and an echo server on the host side."""

    def __init__(self, stack: contextlib.ExitStack, mtu: int, flows: int) -> None:
        self.host, self.guest = stack.enter_context(namespace("h")), stack.enter_context(namespace("g"))
        sh("ip", "-n", self.host, "addr", "add", f"{SERVER}/32", "dev", "lo")
        self.api = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "api")
        ready, told = os.pipe()
        self._start(stack, self.host, *self.ringnet("attach", f"/run/netns/{self.guest}"), "--config-net", "--mtu", str(mtu),
                    "--udp-max", "15000", "--ready-fd", str(told), "--api-socket", self.api, "-q", fds=(told,))
        os.close(told)
        with os.fdopen(ready, "rb") as f:
            if not select.select([f], [], [], 30)[0] or not f.read(1):
                raise SystemExit("looking.py: ringnet did not get ready")
        server = inside(self.host, tcp_socket)
        server.settimeout(None)
        server.bind((SERVER, TALK_PORT))
        server.listen(64)
        stack.callback(server.close)
        stack.callback(server.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=self._echo, args=(server,), daemon=True).start()
        self.flows = flows

    @staticmethod
    def ringnet(*args: str) -> list[str]:
        return [sys.executable, "-P", "-m", "pipeline", *args]

    @staticmethod
    def _start(stack: contextlib.ExitStack, name: str, *argv: str, fds: tuple[int, ...] = ()) -> None:
        process = subprocess.Popen(["ip", "netns", "exec", name, *argv], stdin=subprocess.DEVNULL, pass_fds=fds,
                                   stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(REPO)})
        stack.callback(process.wait)
        stack.callback(process.send_signal, signal.SIGTERM)

    @staticmethod
    def _echo(server: socket.socket) -> None:
        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(1000):
                    connection.sendall(data)

        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    def bulk(self, seconds: float) -> tuple[float, float]:
        """Gbit/s up, down, by what arrived."""
        up, down = (iperf3(self.host, self.guest, SERVER, seconds, "-O", "0.5", *more)["sum_received"]["bits_per_second"] / 1e9
                    for more in ((), ("-R",)))
        return up, down

    @contextlib.contextmanager
    def looking(self, *args: str) -> Iterator[subprocess.Popen[str]]:
        """A command of ringnet's that looks, from its first word on."""
        with subprocess.Popen([*self.ringnet(*args), "--api-socket", self.api], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPO)}) as process:
            assert process.stdout and process.stderr
            (process.stderr if args[0] == "capture" else process.stdout).readline()
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate()

    @contextlib.contextmanager
    def talk(self) -> Iterator[str]:
        """A connection of the guest that says a few bytes every 10 ms: its flow's name."""
        code = ("import socket, time\ns = socket.create_connection(('%s', %d))\nprint(s.getsockname()[1], flush=True)\n"
                "while True:\n    s.sendall(b'hello')\n    s.recv(10)\n    time.sleep(0.01)\n" % (SERVER, TALK_PORT))
        with subprocess.Popen(["ip", "netns", "exec", self.guest, sys.executable, "-c", code], stdout=subprocess.PIPE,
                              text=True) as process:
            assert process.stdout
            port = process.stdout.readline().strip()
            done = subprocess.run([*self.ringnet("flows", "--json", "--port", port, "--proto", "tcp"), "--api-socket",
                                   self.api], capture_output=True, text=True, check=True, env=os.environ |
                                  {"PYTHONPATH": str(REPO)})
            try:
                yield json.loads(done.stdout.splitlines()[0])["flow"]
            finally:
                process.kill()

    def fill(self) -> None:
        subprocess.run(["ip", "netns", "exec", self.guest, sys.executable, "-c", MANY, str(self.flows)], check=True)


ROWS = ("capture flow", "capture link", "top")
Moved = tuple[float, float]  # Gbit/s up and down


def looked(session: Session, seconds: float, row: str, flow: str, scratch: Path) -> tuple[Moved, dict[str, float]]:
    """With somebody looking: what moved, and what the looker says of itself."""
    if row == "top":
        with session.looking("top", "-i", "1", "--json") as top:
            moved = session.bulk(seconds)
            top.send_signal(signal.SIGINT)
            assert top.stdout
            looks = [json.loads(line) for line in top.stdout.read().splitlines()]
        return moved, {"look_ms": summary([k["took_ms"] for k in looks]).median, "look_ms_most": max(k["took_ms"] for k in looks),
                       "flows": max(k["flows"] for k in looks)}
    args = ["all", "--flow", flow] if row == "capture flow" else ["link", "--snaplen", "96"]
    with session.looking("capture", *args, "-w", str(scratch / "c.pcapng")) as capture:
        moved = session.bulk(seconds)
        capture.send_signal(signal.SIGINT)
        assert capture.stderr
        said = capture.stderr.read()
    return moved, {"frames": float(said.split(" frames captured")[0].split()[-1]),
                   "lost": float(said.split("; ")[1].split()[0]) if "; " in said else 0.0}


def pair(session: Session, seconds: float, row: str, scratch: Path, *, first: bool) -> tuple[Moved, Moved, dict[str, float]]:
    """(nobody looking, somebody looking, what that says). first: the looker is."""
    with contextlib.ExitStack() as stack:
        flow = stack.enter_context(session.talk()) if row == "capture flow" else ""
        if row == "top":
            session.fill()
        if first:
            moved, said = looked(session, seconds, row, flow, scratch)
            return session.bulk(seconds), moved, said
        base = session.bulk(seconds)
        moved, said = looked(session, seconds, row, flow, scratch)
        return base, moved, said


def shown(s: Summary) -> str:
    return f"{s.median:.2f} [{s.low:.2f}..{s.high:.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description="What looking at a session costs.")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--flows", type=int, default=10_000)
    parser.add_argument("--mtu", type=int, default=4000)
    parser.add_argument("--json", metavar="FILE", default="")
    args = parser.parse_args()
    base: dict[str, list[Moved]] = {r: [] for r in ROWS}
    seen: dict[str, list[Moved]] = {r: [] for r in ROWS}
    said: dict[str, list[dict[str, float]]] = {r: [] for r in ROWS}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = Session(stack, args.mtu, args.flows)
        session.bulk(1)
        for n in range(args.repeat):
            for row in ROWS:
                nobody, somebody, more = pair(session, args.seconds, row, scratch, first=bool(n % 2))
                base[row].append(nobody)
                seen[row].append(somebody)
                said[row].append(more)
    out = []
    print("Gbit/s: median [least..most]; ratio to nobody looking: of the medians [least..most of neighbours]")
    for row in ROWS:
        found = {"row": row} | {k: summary([s[k] for s in said[row]]).median for k in said[row][0]}
        for i, way in enumerate(("up", "down")):
            without, with_ = ([m[i] for m in runs[row]] for runs in (base, seen))
            r = ratio(with_, without)
            assert r is not None, "nothing moved"
            found |= {f"{way}_nobody": summary(without), way: summary(with_), f"{way}_ratio": r}
            print(f"{row:13} {way:5} nobody {shown(summary(without)):24} looking {shown(summary(with_)):24} ratio {shown(r)}", flush=True)
        print(f"{row:13}       " + ", ".join(f"{k} {v:g}" for k, v in found.items() if isinstance(v, float | int)), flush=True)
        out.append(found)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
