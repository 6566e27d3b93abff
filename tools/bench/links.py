"""ringnet's links to virtual machines, driven by a guest in user space (linkguest/guest.c), beside passt over its stream socket.
The command line of tools/bench/links. No root, no namespaces: the server is on the host's loopback."""
from __future__ import annotations

import argparse
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.lab import LabError
from bench.load import HERE, REPO, compiled
from bench.report import number, table
from pipeline.sockets import widen

MODES = {"tcp-down": "tcp down, Gbit/s", "tcp-up": "tcp up, Gbit/s", "udp-up": "udp up, Gbit/s",
         "udp-small": "60-byte frames up, thousand/s"}
MTUS = (1500, 65520)
STARTED_S = 20.0


def program() -> Path:
    return compiled([HERE / "linkguest" / "guest.c"], REPO / "build" / "bench" / "linkguest")


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ringnet(log: Path, mtu: int, options: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Started, and ready for a guest. Raises LabError."""
    ready, told = os.pipe()
    argv = [sys.executable, "-P", "-m", "pipeline", "vm", "-q", "-m", str(mtu), "--ready-fd", str(told), *options]
    with open(log, "wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(told, *fds), cwd=REPO,
                                   env=dict(os.environ, PYTHONPATH=str(REPO)))
    os.close(told)
    if not select.select([ready], [], [], STARTED_S)[0] or not os.read(ready, 1):
        process.kill()
        process.wait()
        raise LabError(f"ringnet vm did not start: {log.read_text()}")
    os.close(ready)
    return process


def pair(kind: int) -> tuple[socket.socket, socket.socket]:
    """With the buffers that ringnet gives its sockets: passt drops what does not fit at once."""
    made = socket.socketpair(socket.AF_UNIX, kind)
    for s in made:
        widen(s)
    return made


@contextmanager
def ringnet_dgram(tmp: Path, mtu: int) -> Iterator[tuple[str, socket.socket]]:
    ours, theirs = pair(socket.SOCK_DGRAM)
    with ours, theirs:
        process = _ringnet(tmp / "log", mtu, ["--type", "fd", "--fd", str(theirs.fileno())], (theirs.fileno(),))
        with ended(process):
            yield "dgram", ours


@contextmanager
def ringnet_stream(tmp: Path, mtu: int) -> Iterator[tuple[str, socket.socket]]:
    path = tmp / "net.sock"
    with ended(_ringnet(tmp / "log", mtu, ["--type", "qemu-stream", "--socket", str(path)], ())), socket.socket(
            socket.AF_UNIX) as s:
        widen(s)
        s.connect(str(path))
        yield "stream", s


@contextmanager
def passt_stream(tmp: Path, mtu: int) -> Iterator[tuple[str, socket.socket]]:
    ours, theirs = pair(socket.SOCK_STREAM)
    argv = ["passt", "-f", "-q", "-F", str(theirs.fileno()), "-m", str(mtu), "-a", "10.0.2.2", "-n", "24", "-g", "10.0.2.1",
            "--no-dhcpv6", "--no-ndp", "--no-ra", "--runas", f"{os.getuid()}:{os.getgid()}"]
    with ours, theirs, open(tmp / "log", "wb") as out:
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(theirs.fileno(),))
        except FileNotFoundError:
            raise LabError("passt is not installed (Debian package passt)") from None
        with ended(process):
            yield "stream", ours


TARGETS: dict[str, Callable[[Path, int], Any]] = {
    "ringnet socketpair": ringnet_dgram, "ringnet stream": ringnet_stream, "passt stream": passt_stream}


def measure(target: str, mode: str, mtu: int, seconds: float) -> float:
    """Gbit/s of payload, or thousand frames a second. Raises LabError."""
    with tempfile.TemporaryDirectory(prefix="ringnet-links-") as tmp, TARGETS[target](Path(tmp), mtu) as (kind, sock):
        argv = [str(program()), kind, mode, str(sock.fileno()), str(seconds), str(mtu)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=(sock.fileno(),),
                              timeout=seconds + 30)
        if done.returncode:
            raise LabError(f"{target}, {mode}, MTU {mtu}: {done.stderr.strip()}\n{(Path(tmp) / 'log').read_text()}")
    said = json.loads(done.stdout)
    if mode == "udp-small":
        return said["datagrams"] / said["seconds"] / 1e3
    return said["bytes"] * 8 / said["seconds"] / 1e9


def main() -> int:
    p = argparse.ArgumentParser(prog="tools/bench/links",
                                description="Links to virtual machines: socketpair and stream, beside passt's stream socket.")
    p.add_argument("--seconds", type=float, default=2.0, help="each measurement (default 2)")
    p.add_argument("--repeat", type=int, default=3, help="rounds, targets in turn; the median is shown (default 3)")
    p.add_argument("--mtu", type=int, action="append", help=f"default: {', '.join(map(str, MTUS))}")
    p.add_argument("--mode", choices=list(MODES), action="append", help="default: all")
    p.add_argument("--target", choices=list(TARGETS), action="append", help="default: all")
    args = p.parse_args()
    targets = args.target or list(TARGETS)
    figures: dict[tuple[int, str, str], list[float]] = {}
    try:
        for mtu in args.mtu or MTUS:
            for mode in args.mode or MODES:
                if mode == "udp-small" and mtu != (args.mtu or MTUS)[0]:
                    continue  # the same frames at any MTU
                for _ in range(args.repeat):
                    for target in targets:
                        figures.setdefault((mtu, mode, target), []).append(measure(target, mode, mtu, args.seconds))
    except LabError as e:
        print(f"tools/bench/links: {e}", file=sys.stderr)
        return 1
    rows = [[str(mtu), MODES[mode], *(number(statistics.median(figures[mtu, mode, t])) for t in targets)]
            for mtu, mode in dict.fromkeys((mtu, mode) for mtu, mode, _ in figures)]
    print(table(["MTU", "work", *targets], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
