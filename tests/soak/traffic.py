"""What a soak sends: the guest's side runs as a program in its namespace, the host's side in threads of the caller.

    python -m tests.soak.traffic --server ADDR:PORT --udp ADDR:PORT --seconds 5 --seed 1 [--load 0.5]

Everything that arrives is compared with what was sent; the first difference ends the program with a traceback. At the end every
connection is closed and one JSON line tells how often each thing was done. `--load`: the part of the time spent at work.

The server's protocol, one request a connection: U n (takes n bytes, tells their SHA-256), D n seed (sends), E (echoes
messages of a u32 length and a body), F n (sends n bytes and closes first), R (resets), I n port (calls the guest's echo
server through the forward, n times).
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import dns.message
import dns.query
import dns.rcode
import dns.rdatatype

PATIENCE = 30.0  # s, for any one step
GATEWAY = "10.0.2.1"
ECHO_PORT = 7007  # in the guest, behind the forward
LOCAL, REMOTE = "soak.local.test", "soak.example"  # in the hosts table; at the upstream
_BLOCK = random.Random(4).randbytes(1 << 20)
_RESET = struct.pack("ii", 1, 0)


def pattern(size: int, seed: int) -> Iterator[bytes]:
    """`size` bytes that depend on the seed and do not repeat from piece to piece."""
    for n in range(-(-size // 65536)):
        at = (seed * 7919 + n * 65537) % (len(_BLOCK) - 65536)
        piece = struct.pack("!QQ", seed & (1 << 64) - 1, n) + _BLOCK[at:at + 65520]
        yield piece[:size - n * 65536]


def exactly(s: socket.socket, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        piece = s.recv(min(n - len(data), 1 << 16))
        if not piece:
            raise AssertionError(f"the connection ended after {len(data)} of {n} bytes")
        data += piece
    return bytes(data)


def line(s: socket.socket) -> list[str]:
    text = b""
    while not text.endswith(b"\n"):
        piece = s.recv(1)
        if not piece:
            return text.decode().split()
        text += piece
    return text.decode().split()


def take(s: socket.socket, size: int) -> str:
    """Receive that many bytes; their SHA-256."""
    digest = hashlib.sha256()
    while size:
        piece = s.recv(min(size, 1 << 18))
        if not piece:
            raise AssertionError(f"the stream ended {size} bytes early")
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def give(s: socket.socket, size: int, seed: int) -> str:
    digest = hashlib.sha256()
    for piece in pattern(size, seed):
        digest.update(piece)
        s.sendall(piece)
    return digest.hexdigest()


# -- the host's side

def serve(connection: socket.socket, dial: Callable[[int], socket.socket]) -> None:
    """One connection of the host's server. dial(port): a connection to a port of the host."""
    match line(connection):
        case ["U", size]:
            connection.sendall(take(connection, int(size)).encode())
        case ["D", size, seed]:
            give(connection, int(size), int(seed))
        case ["E"]:
            while head := connection.recv(4, socket.MSG_WAITALL):
                connection.sendall(head + exactly(connection, struct.unpack("!I", head)[0]))
        case ["F", size]:
            with contextlib.suppress(OSError):  # ENOTCONN, too: the guest may have reset it
                connection.sendall(bytes(int(size)))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        case ["R"]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        case ["I", times, port]:
            for n in range(int(times)):
                with dial(int(port)) as s:
                    s.sendall(b"%08d" % n)
                    if n % 2:
                        s.shutdown(socket.SHUT_WR)
                    assert exactly(s, 8) == b"%08d" % n
            connection.sendall(b"done")
        case other:
            raise AssertionError(f"no such request: {other}")


def serve_udp(s: socket.socket) -> None:
    """Echo until the socket is shut."""
    s.settimeout(None)
    while True:
        try:
            data, peer = s.recvfrom(65535)
        except OSError:
            return
        if data == b"stop":
            return
        s.sendto(data, peer)


# -- the guest's side

class Guest:
    """Workers, a thread each, until the time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.server, self.udp = ((a, int(p)) for a, p in (args.server.split(":"), args.udp.split(":")))
        self.forward, self.load, self.seed = args.forward, args.load, args.seed
        self.end = time.monotonic() + args.seconds
        self.stop = threading.Event()
        self.done: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()

    def count(self, what: str, n: int = 1) -> None:
        with self.lock:
            self.done[what] += n

    def ask(self, request: str) -> socket.socket:
        s = socket.create_connection(self.server, PATIENCE)
        try:
            s.sendall(request.encode() + b"\n")
        except BaseException:
            s.close()
            raise
        return s

    def bulk(self, rng: random.Random) -> None:
        size, seed = rng.choice((rng.randrange(1 << 16), rng.randrange(4 << 20), rng.randrange(32 << 20))), rng.getrandbits(32)
        if rng.random() < 0.5:
            with self.ask(f"U {size}") as s:
                sent = give(s, size, seed)
                assert exactly(s, 64).decode() == sent, f"up: {size} bytes, seed {seed}"
        else:
            with self.ask(f"D {size} {seed}") as s:
                want = hashlib.sha256()
                for piece in pattern(size, seed):
                    want.update(piece)
                assert take(s, size) == want.hexdigest(), f"down: {size} bytes, seed {seed}"
                assert s.recv(1) == b""
        self.count("bulk")
        self.count("bulk_bytes", size)

    def requests(self, rng: random.Random) -> None:
        with self.ask("E") as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(200):
                body = rng.randbytes(rng.randrange(1, 4000))
                s.sendall(struct.pack("!I", len(body)) + body)
                assert exactly(s, 4 + len(body))[4:] == body
                self.count("requests")
                if self.stop.is_set():
                    break

    def churn(self, rng: random.Random) -> None:
        """Every way for a connection to end."""
        match rng.randrange(6):
            case 0:
                with self.ask("F 100") as s:  # the server first
                    assert exactly(s, 100) == bytes(100) and s.recv(1) == b""
            case 1:
                with self.ask("R") as s, contextlib.suppress(ConnectionResetError):
                    assert s.recv(1) == b"", "a reset was asked for"
                    raise AssertionError("a reset became an orderly end")
            case 2:
                with self.ask("F 30000") as s:  # the guest's reset, with data under way
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            case 3:
                with socket.socket() as s:
                    s.settimeout(PATIENCE)
                    with contextlib.suppress(ConnectionRefusedError):
                        s.connect((self.server[0], 9))  # nobody is there
                        raise AssertionError("port 9 answered")
            case 4:
                with self.ask("U 1000") as s:  # half closed early
                    sent = give(s, 1000, 1)
                    s.shutdown(socket.SHUT_WR)
                    assert exactly(s, 64).decode() == sent
            case 5:
                with self.ask("E") as s:
                    s.sendall(struct.pack("!I", 3) + b"abc")
                    assert exactly(s, 7)[4:] == b"abc"
        self.count("connections")

    def datagrams(self, rng: random.Random) -> None:
        """From a port of its own each time: a mapping each. A lost one is no error, but may not be the rule."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(1.0)
            lost = 0
            for n in range(20):
                body = struct.pack("!I", n) + rng.randbytes(rng.choice((0, 100, 1400, 5000, rng.randrange(20000))))
                s.sendto(body, self.udp)
                try:
                    while s.recv(65535) != body:
                        pass  # a late one
                except TimeoutError:
                    lost += 1
                    self.count("datagrams_lost")
                self.count("datagrams")
            assert lost < 10, f"{lost} of 20 datagrams were lost"

    def names(self, rng: random.Random) -> None:
        name, kind, rcode = rng.choice((
            (LOCAL, "A", dns.rcode.NOERROR), (REMOTE, "A", dns.rcode.NOERROR), (REMOTE, "TXT", dns.rcode.NOERROR),
            (f"n{rng.randrange(5000)}.{REMOTE}", "A", dns.rcode.NXDOMAIN), ("host.ringnet.internal", "A", dns.rcode.NOERROR)))
        query = dns.message.make_query(name, kind)
        if rng.random() < 0.1:
            reply = dns.query.tcp(query, GATEWAY, timeout=PATIENCE)
        else:
            reply, _ = dns.query.udp_with_fallback(query, GATEWAY, timeout=PATIENCE)
        assert reply.rcode() == rcode, reply
        self.count("names")

    def inbound(self, rng: random.Random) -> None:
        with self.ask(f"I 5 {self.forward}") as s:
            assert exactly(s, 4) == b"done"
        self.count("inbound", 5)

    def echo_server(self, listener: socket.socket) -> None:
        """Behind the forward: eight bytes there and back."""
        while True:
            try:
                s, _ = listener.accept()
            except OSError:
                return
            with s, contextlib.suppress(ConnectionError):
                s.settimeout(PATIENCE)
                s.sendall(exactly(s, 8))
                s.shutdown(socket.SHUT_WR)
                assert s.recv(1) == b""

    def work(self, job: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(f"{self.seed}.{job.__name__}.{number}")
        try:
            while time.monotonic() < self.end and not self.stop.is_set():
                began = time.monotonic()
                job(rng)
                if self.load < 1:
                    self.stop.wait((time.monotonic() - began) * (1 / self.load - 1))
        except BaseException as e:
            self.errors.append(e)
            self.stop.set()

    def run(self) -> None:
        listener = socket.create_server(("", ECHO_PORT), backlog=64)
        listener.settimeout(None)
        echo = threading.Thread(target=self.echo_server, args=(listener,))
        jobs = [self.bulk, self.requests, self.churn, self.churn, self.datagrams, self.names]
        jobs += [self.inbound] if self.forward else []
        threads = [threading.Thread(target=self.work, args=(job, n)) for n, job in enumerate(jobs)]
        for t in (echo, *threads):
            t.start()
        for t in threads:
            t.join()
        listener.shutdown(socket.SHUT_RDWR)
        echo.join()
        listener.close()
        if self.errors:
            raise self.errors[0]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--server", required=True)
    p.add_argument("--udp", required=True)
    p.add_argument("--forward", type=int, default=0, help="port of the host that leads to the guest's echo server")
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--load", type=float, default=1.0)
    guest = Guest(p.parse_args())
    guest.run()
    print(json.dumps(guest.done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
