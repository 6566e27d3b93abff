"""Proxies for tests: SOCKS5 (RFC 1928, RFC 1929, with UDP ASSOCIATE) and HTTP CONNECT, a thread a connection.

    with SocksProxy(user="u", password="p") as proxy:
        ... proxy.url ... proxy.asked == [("connect", "www.example", 80)]

`route` says where a target really is, so a guest can ask for addresses and names that exist nowhere. `make_socket`
makes every socket of the proxy (tests of namespaces give one that makes them elsewhere).
"""
from __future__ import annotations

import base64
import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

DEADLINE = 60.0  # s
Route = Callable[[str, int], tuple[str, int]]


def plain_socket(kind: int = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_INET, kind)


class Refused(Exception):
    """The proxy says no: a SOCKS5 reply code or an HTTP status."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


class Proxy:
    """What both kinds share. asked: ("connect" or "associate", host as the client said it, port)."""

    scheme = ""

    def __init__(self, *, user: str = "", password: str = "", route: Route = lambda host, port: (host, port),
                 refuse: int = 0, address: str = "127.0.0.1", port: int = 0,
                 make_socket: Callable[[int], socket.socket] = plain_socket) -> None:
        """refuse: answer every request with this code."""
        self.user, self.password, self.route, self.refuse = user, password, route, refuse
        self.address, self.make_socket = address, make_socket
        self.asked: list[tuple[str, str, int]] = []
        self.sources: list[tuple[str, int]] = []  # of datagrams to the relays
        self.open: set[socket.socket] = set()
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.listener = make_socket(socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((address, port))
        self.listener.listen(64)
        self.listener.settimeout(None)
        self.port = self.listener.getsockname()[1]

    @property
    def url(self) -> str:
        who = f"{self.user}:{self.password}@" if self.user else ""
        return f"{self.scheme}://{who}{self.address}:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        for s in list(self.open):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for t in self.threads:
            t.join(DEADLINE)
            assert not t.is_alive(), "a proxy's thread does not end"
        self.listener.close()
        if self.errors:
            raise self.errors[0]

    def _start(self, what: Callable[..., None], *args: object) -> None:
        self.threads.append(threading.Thread(target=what, args=args, daemon=True))
        self.threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.open.add(connection)
            self._start(self._one, connection)

    def _one(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(DEADLINE)
                self.serve(connection)
        except (OSError, EOFError):
            pass  # the client went, or the test ends
        except BaseException as e:
            self.errors.append(e)
        finally:
            self.open.discard(connection)

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def dial(self, host: str, port: int) -> socket.socket:
        if self.refuse:
            raise Refused(self.refuse)
        there = self.make_socket(socket.SOCK_STREAM)
        self.open.add(there)
        there.settimeout(DEADLINE)
        there.connect(self.route(host, port))
        return there

    def relay(self, here: socket.socket, there: socket.socket) -> None:
        """Bytes both ways until both ends have ended; half-closes are passed on."""
        here.settimeout(DEADLINE)
        ways = {here: there, there: here}
        with there:
            while ways:
                for s in select.select(list(ways), [], [], DEADLINE)[0]:
                    data = s.recv(1 << 16)
                    if data:
                        ways[s].sendall(data)
                    else:
                        with contextlib.suppress(OSError):
                            ways[s].shutdown(socket.SHUT_WR)
                        del ways[s]
        self.open.discard(there)


def exactly(s: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        piece = s.recv(n - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


class SocksProxy(Proxy):
    """banner: bytes sent right behind the yes, in the same segment. udp: UDP ASSOCIATE is served."""

    scheme = "socks5"

    def __init__(self, *, udp: bool = True, banner: bytes = b"", **more: object) -> None:
        super().__init__(**more)
        self.udp, self.banner = udp, banner
        self.relays: list[socket.socket] = []
        self.controls: list[socket.socket] = []

    def serve(self, connection: socket.socket) -> None:
        version, n = exactly(connection, 2)
        assert version == 5 and n, "SOCKS5 greeting"
        methods = exactly(connection, n)
        if self.user:
            if 2 not in methods:
                connection.sendall(b"\x05\xff")
                return
            connection.sendall(b"\x05\x02")
            assert exactly(connection, 1) == b"\x01"
            user = exactly(connection, exactly(connection, 1)[0])
            password = exactly(connection, exactly(connection, 1)[0])
            good = (user, password) == (self.user.encode(), self.password.encode())
            connection.sendall(b"\x01\x00" if good else b"\x01\x01")
            if not good:
                return
        else:
            assert 0 in methods
            connection.sendall(b"\x05\x00")
        version, command, zero, kind = exactly(connection, 4)
        assert (version, zero) == (5, 0)
        if kind == 3:
            host = exactly(connection, exactly(connection, 1)[0]).decode()
        else:
            family, size = {1: (socket.AF_INET, 4), 4: (socket.AF_INET6, 16)}[kind]
            host = socket.inet_ntop(family, exactly(connection, size))
        port = struct.unpack("!H", exactly(connection, 2))[0]
        self.asked.append(({1: "connect", 3: "associate"}[command], host, port))
        try:
            if command == 3:
                self.associate(connection)
                return
            there = self.dial(host, port)
        except Refused as e:
            connection.sendall(bytes([5, e.code, 0, 1]) + bytes(6))
            return
        except ConnectionRefusedError:
            connection.sendall(bytes([5, 5, 0, 1]) + bytes(6))
            return
        connection.sendall(b"\x05\x00\x00\x01" + socket.inet_aton("192.0.2.1") + b"\x12\x34" + self.banner)
        self.relay(connection, there)

    def associate(self, connection: socket.socket) -> None:
        if self.refuse or not self.udp:
            raise Refused(self.refuse or 7)
        with self.make_socket(socket.SOCK_DGRAM) as relay, self.make_socket(socket.SOCK_DGRAM) as out:
            relay.bind((self.address, 0))
            out.bind(("0.0.0.0", 0))
            self.relays.append(relay)
            self.controls.append(connection)
            connection.sendall(b"\x05\x00\x00\x01" + bytes(4) + struct.pack("!H", relay.getsockname()[1]))
            peer, back = None, {}
            while True:
                ready, _, _ = select.select([connection, relay, out], [], [], DEADLINE)
                if connection in ready and not connection.recv(1):
                    return
                if relay in ready:
                    data, peer = relay.recvfrom(65536)
                    self.sources.append(peer)
                    assert data[:4] == b"\0\0\0\1", "RFC 1928 7, IPv4"
                    to = socket.inet_ntoa(data[4:8]), struct.unpack("!H", data[8:10])[0]
                    real = self.route(*to)
                    back[real] = to
                    out.sendto(data[10:], real)
                if out in ready and peer:
                    data, where = out.recvfrom(65536)
                    shown = back.get(where, where)
                    relay.sendto(b"\0\0\0\1" + socket.inet_aton(shown[0]) + struct.pack("!H", shown[1]) + data, peer)


class HttpProxy(Proxy):
    """CONNECT only. banner: as SocksProxy. headers: lines of the answer besides the first."""

    scheme = "http"

    def __init__(self, *, banner: bytes = b"", headers: tuple[str, ...] = (), interim: bytes = b"",
                 **more: object) -> None:
        super().__init__(**more)
        self.banner, self.headers, self.interim = banner, headers, interim
        self.heads: list[str] = []

    def serve(self, connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += exactly(connection, 1)
        lines = head.decode().split("\r\n")
        self.heads.append(head.decode())
        method, target, version = lines[0].split(" ")
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        assert fields["host"] == target
        host, _, port = target.rpartition(":")
        want = "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.user and fields.get("proxy-authorization") != want:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
            return
        self.asked.append(("connect", host, int(port)))
        try:
            there = self.dial(host, int(port))
        except Refused as e:
            connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % e.code)
            return
        except ConnectionRefusedError:
            connection.sendall(b"HTTP/1.1 500 Refused\r\n\r\n")
            return
        connection.sendall(self.interim + b"HTTP/1.1 200 Connection established\r\n"
                           + "".join(f"{h}\r\n" for h in self.headers).encode() + b"\r\n" + self.banner)
        self.relay(connection, there)


class RawProxy(Proxy):
    """Hands each connection to a function: a proxy that is none."""

    scheme = "socks5"

    def __init__(self, do: Callable[[socket.socket], None], scheme: str = "socks5", **more: object) -> None:
        super().__init__(**more)
        self.serve, self.scheme = do, scheme  # type: ignore[method-assign]
