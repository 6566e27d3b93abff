"""`ringnet vm --offloading`: frames as libkrun's device leaves them with its offloads on (krunkit: offloading=on).

The guest is Linux's own network stack: a tap in a namespace, with the offloads that libkrun's features stand for, and beside it
what libkrun does with each frame (its src/devices/src/virtio/net): towards the socket the virtio-net header is taken off, whatever
it said; towards the guest one of zeros is put in front. So what leaves is unfinished and of up to 64 KiB, as of a real one.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, GUEST, RINGNET, SERVER, Netns, Program, run_env, serving
from vmlab import VmSession

from shm._dataplane import ffi, lib

pytestmark = pytest.mark.netns

TUNSETOFFLOAD, CSUM_TSO4 = 0x400454D0, 0x03
NEEDS_CSUM, GSO_TCPV4 = 1, 1
BUFFER = 65562  # bytes: libkrun's MAX_BUFFER_SIZE, header included
DATA = random.Random(8).randbytes(1 << 16) * 48  # 3 MiB
SHA = hashlib.sha256(DATA).hexdigest()


class Krun:
    """A device in a namespace, and what libkrun does between it and its socket. Use as a context manager.

    offloads: of the device; 0: none, as behind QEMU's sockets. again: another socket when this one has ended."""

    def __init__(self, ns: Netns, sock: socket.socket, *, name: str = "eth0", mac: str = "52:54:00:00:00:01", address: str = f"{GUEST}/24",
                 mtu: int = 1500, offloads: int = CSUM_TSO4, again: Callable[[], socket.socket] | None = None) -> None:
        self.sock, self.stream, self.again = sock, sock.type == socket.SOCK_STREAM, again
        self.connections, self.old = 1, [sock]
        self.unfinished = self.largest_up = self.largest_down = 0
        made: list[int] = []

        def make() -> None:  # setns() moves the calling thread only
            with open(ns.path) as where:
                assert lib.rn_os_setns(where.fileno(), lib.RN_CLONE_NEWNET) == 0
            made.append(lib.rn_tap_open(name.encode(), ffi.new("int *")))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        (self.tap,) = made
        os.set_blocking(self.tap, True)
        fcntl.ioctl(self.tap, TUNSETOFFLOAD, offloads)
        ns.ip("link", "set", name, "address", mac, "mtu", str(mtu), "up")
        ns.ip("addr", "add", address, "dev", name)
        sock.settimeout(DEADLINE)
        self.stop_r, self.stop_w = os.pipe()
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._until_stopped, args=way)
                        for way in ((lambda: self.tap, self._up), (lambda: self.sock.fileno(), self._down))]

    def __enter__(self) -> Krun:
        for t in self.threads:
            t.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self.stop_w)
        for t in self.threads:
            t.join(DEADLINE)
        os.close(self.stop_r)
        os.close(self.tap)
        for s in self.old:
            s.close()
        if self.errors and kind is None:
            raise self.errors[0]

    def _until_stopped(self, source: Callable[[], int], way: Callable[[], None]) -> None:
        try:
            while self.stop_r not in select.select([source(), self.stop_r], [], [])[0]:
                try:
                    way()
                except (ConnectionError, EOFError):
                    if self.again is None:
                        return  # the session has ended
                    if way == self._down:
                        self._reconnect(self.again)
        except BaseException as e:
            self.errors.append(e)

    def _reconnect(self, again: Callable[[], socket.socket]) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)  # closed at the end: the other thread may be writing to it
        fresh = again()
        fresh.settimeout(DEADLINE)
        self.old.append(fresh)
        self.connections += 1
        self.sock = fresh

    def _up(self) -> None:
        got = os.read(self.tap, BUFFER)
        flags, gso = got[0], got[1]
        frame = got[12:]
        self.unfinished += flags & NEEDS_CSUM
        self.largest_up = max(self.largest_up, len(frame))
        assert gso in (0, GSO_TCPV4)
        self.sock.sendall(struct.pack("!I", len(frame)) + frame if self.stream else frame)

    def _down(self) -> None:
        frame = self._exactly(struct.unpack("!I", self._exactly(4))[0]) if self.stream else self.sock.recv(1 << 17)
        self.largest_down = max(self.largest_down, len(frame))
        assert len(frame) <= BUFFER - 12, "longer than what libkrun reads"
        os.write(self.tap, bytes(12) + frame)  # the guest's kernel verifies the checksum

    def _exactly(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            if not (part := self.sock.recv(n - len(got))):
                raise EOFError
            got += part
        return got


def to_the_gateway(guest: Netns) -> None:
    """Its MAC address is known: a kernel gives up after three questions in three seconds, and a session may be on its way."""
    guest.ip("neigh", "add", GATEWAY, "lladdr", "02:ab:cd:00:00:01", "dev", "eth0")
    guest.ip("route", "add", "default", "via", GATEWAY)


@contextlib.contextmanager
def krun(type_: str, guest_ns: Netns, host_ns: Netns, tmp: Path, *options: str) -> Iterator[tuple[VmSession, Krun]]:
    """A session, and the device at its socket: connected as libkrun connects, with the hello or without."""
    path = tmp / "net.sock"
    with contextlib.ExitStack() as stack:
        if type_ == "fd":
            sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            stack.enter_context(theirs)
            where, fds = ["--fd", str(theirs.fileno())], (theirs.fileno(),)
        else:
            where, fds = ["--socket", str(path)], ()
        s = stack.enter_context(VmSession(host_ns, tmp / "log", "--type", type_, *where, "--stats", *options, pass_fds=fds))
        if type_ == "qemu-stream":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(path))
        elif type_ != "fd":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.bind(str(tmp / "krun-net.sock"))
            sock.connect(str(path))
            if type_ == "vfkit":
                sock.send(b"VFKT")
        with Krun(guest_ns, sock) as device:
            to_the_gateway(guest_ns)
            yield s, device
            assert s.end() == 0, s.output()


def down(connection: socket.socket) -> None:
    connection.sendall(DATA)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


def up(connection: socket.socket) -> None:
    sha = hashlib.sha256()
    while part := connection.recv(1 << 18):
        sha.update(part)
    connection.sendall(sha.hexdigest().encode())


def everything(sock: socket.socket) -> bytes:
    got = bytearray()
    while part := sock.recv(1 << 18):
        got += part
    return bytes(got)


def both_ways(guest: Netns, host: Netns, address: str) -> None:
    """3 MiB each way between a socket of the guest and servers of the host, with equal sha256."""
    with serving(host.listen(address), down) as where, guest.socket() as sock:
        sock.connect(where)
        assert hashlib.sha256(everything(sock)).hexdigest() == SHA
    with serving(host.listen(address), up) as where, guest.socket() as sock:
        sock.connect(where)
        sock.sendall(DATA)
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock).decode() == SHA


@pytest.mark.parametrize(("type_", "promote"), [("vfkit", "8"), ("vfkit", "0"), ("qemu-dgram", "8"), ("qemu-stream", "8"), ("fd", "8")])
def test_a_guest_with_offloads_and_no_header(type_: str, promote: str, guest_ns: Netns, host_ns: Netns, tmp_path: Path) -> None:
    with krun(type_, guest_ns, host_ns, tmp_path, "--offloading", "-m", "1500", "--promote", promote) as (s, device):
        both_ways(guest_ns, host_ns, SERVER)
        with host_ns.socket(kind=socket.SOCK_DGRAM) as echo, guest_ns.socket(kind=socket.SOCK_DGRAM) as sock:
            echo.bind((SERVER, 0))
            for n in (0, 1, 1000, 5000):  # the last in fragments, which the guest finishes itself
                sock.sendto(DATA[:n], echo.getsockname())
                got, sender = echo.recvfrom(1 << 16)
                assert got == DATA[:n]
                echo.sendto(got, sender)
                assert sock.recv(1 << 16) == DATA[:n]
        guest_ns.run("ping", "-c", "1", "-W", str(int(DEADLINE)), GATEWAY)
        # It was what it is to be: no test of a guest without offloads by mistake.
        assert device.unfinished > 10 and device.largest_up > 16_000 and device.largest_down > 16_000
    assert "l4_checksum" not in s.output() and "oversize" not in s.output(), s.output()


def test_without_the_option_its_frames_are_damaged_ones(guest_ns: Netns, host_ns: Netns, tmp_path: Path) -> None:
    """The same guest: its datagram is dropped and counted, before its ping is answered."""
    with krun("vfkit", guest_ns, host_ns, tmp_path, "-m", "1500") as (s, device):
        with guest_ns.socket(kind=socket.SOCK_DGRAM) as sock:
            sock.sendto(b"unfinished", (SERVER, 9))
        guest_ns.run("ping", "-c", "1", "-W", str(int(DEADLINE)), GATEWAY)
        assert device.unfinished == 1
    assert "l4_checksum 1" in s.output()


def test_ringnet_passt_takes_them_as_passt_does(guest_ns: Netns, host_ns: Netns, tmp_path: Path) -> None:
    """On a descriptor, as libkrun gives it; frames to the guest stay within passt's MTU."""
    sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, Program(host_ns.argv(*RINGNET, "passt", "-f", "-F", str(theirs.fileno()), "-m", "1500"), tmp_path / "log",
                         pass_fds=(theirs.fileno(),)) as p:
        theirs.close()
        with Krun(guest_ns, sock) as device:
            to_the_gateway(guest_ns)
            both_ways(guest_ns, host_ns, SERVER)
            assert device.unfinished > 10 and device.largest_up > 16_000 and device.largest_down <= 1514
        assert p.wait() == 0, p.output()  # with its machine


def test_its_second_interface_meets_a_bridge(guest_ns: Netns, host_ns: Netns, tmp_path: Path) -> None:
    """A bridge carries no frame longer than its MTU unless it knows where to cut it: the header is made anew for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    mac, name = "02:00:5e:00:53:07", f"v{os.getpid() % 100000}"
    with theirs, contextlib.ExitStack() as stack:
        first, unused = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for s in (first, unused):
            stack.enter_context(s)
        fds = (unused.fileno(), theirs.fileno())
        session = stack.enter_context(VmSession(
            host_ns, tmp_path / "log", "--type", "fd", "--fd", str(fds[0]), "--nic2-fd", str(fds[1]), "--offloading", "--nic2",
            f"host,name={name},subnet=192.168.78.1/24,mac={mac}", "--stats", pass_fds=fds))
        device = stack.enter_context(Krun(guest_ns, ours, name="eth1", mac=mac, address="192.168.78.9/24"))
        both_ways(guest_ns, host_ns, "192.168.78.1")
        assert device.unfinished > 10 and device.largest_up > 16_000
        assert session.end() == 0, session.output()
        assert "oversize" not in session.output(), session.output()


@pytest.mark.parametrize(("options", "why"), [
    (("--type", "vfkit", "--socket", "/x", "--vnet-hdr"), "--offloading: is for frames without a virtio-net header"),
    (("--type", "vfkit", "--socket", "/x", "--impair", "up:drop=1%"), "let each --impair say super"),
])
def test_what_it_does_not_go_with(options: tuple[str, ...], why: str) -> None:
    done = subprocess.run([*RINGNET, "vm", "--offloading", *options], capture_output=True, text=True, timeout=DEADLINE, env=run_env())
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_tap_has_headers() -> None:
    made: list[int] = []

    def make() -> None:
        assert lib.rn_os_unshare(lib.RN_CLONE_NEWNET) == 0
        made.append(lib.rn_tap_open(b"tap0", ffi.new("int *")))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (tap,) = made
    done = subprocess.run([*RINGNET, "vm", "--offloading", "--type", "fd", "--fd", str(tap)], capture_output=True, text=True,
                          timeout=DEADLINE, env=run_env(), pass_fds=(tap,))
    os.close(tap)
    assert done.returncode == 2 and f"--offloading: --fd {tap} is a tap" in done.stderr, done.stderr
