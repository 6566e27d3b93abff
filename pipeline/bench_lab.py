"""What `ringnet bench` measures in: two network namespaces of its own, nothing else on the machine is touched.

    guest --(tap, made by the program that is measured)-- [its processes, and servers of ours, in `host`]

Without root both are in a user namespace of our own. All of it dies with the process that made it. The server's address is on
the host's loopback interface, and not the gateway's: so what is measured is the program, and no second link. A tap that leads
nowhere gives `host` a default route, which pasta wants to see.

Traffic is sent and taken by processes of our own, in pieces so large that Python costs next to nothing; a request and its answer
cost about 5 us of it, the same for all.
"""
from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import netlink, procs
from pipeline.netns import make_tap, new_namespaces
from pipeline.peers import Driver
from shm._dataplane import ffi, lib

SERVER = "198.51.100.2"  # RFC 5737
UPLINK, HOST, NEXT = "up0", "192.0.2.1", "192.0.2.2"
TAP = "tap0"
PIECE = 1 << 18  # bytes a system call of bulk traffic
PATIENCE = 30.0  # s until a program must work, and beyond what a row takes
TRY_AGAIN = 0.005  # s
TRY = (0.05, 1.0)  # s of a connect(), at first and at most


class LabError(Exception):
    """One line: what could not be set up or measured."""


def _prefer(namespace_wide: str) -> None:
    """Set congestion control where that is allowed: with BBR, some machines' default, everybody is slower in a guest."""
    for name in ("cubic", "reno"):
        with contextlib.suppress(OSError):
            Path(namespace_wide).write_text(name)
            return


class Task:
    """A process of ours that works out one thing, in another network namespace if told so. Killed at the block's end."""

    def __init__(self, work: Callable[[], Any], netns: int = -1) -> None:
        self._fd, w = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid:
            os.close(w)
            return
        code = 1
        try:
            lib.rn_os_pdeathsig(signal.SIGKILL)
            if netns >= 0 and (rc := lib.rn_os_setns(netns, lib.RN_CLONE_NEWNET)) < 0:
                raise OSError(-rc, os.strerror(-rc))
            said = {"is": work()}
            code = 0
        except (OSError, LabError) as e:
            said = {"error": getattr(e, "strerror", None) or str(e)}
        except KeyboardInterrupt:
            os._exit(code)
        os.write(w, json.dumps(said).encode())
        os._exit(code)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def result(self, seconds: float) -> Any:
        """What it worked out. Raises LabError if it could not, or not in time."""
        if not select.select([self._fd], [], [], seconds)[0]:
            raise LabError(f"nothing in {seconds:g} s")
        with os.fdopen(os.dup(self._fd), "rb") as f:
            said = json.loads(f.read() or b'{"error": "it ended"}')
        if "error" in said:
            raise LabError(said["error"])
        return said["is"]


# -- the work: of both ends

def _send(s: socket.socket, seconds: float) -> None:
    piece, end = memoryview(bytes(PIECE)), time.monotonic() + seconds
    s.send(piece)  # also if a busy machine let the time pass before we began
    while time.monotonic() < end:
        s.send(piece)


def _take(s: socket.socket) -> tuple[int, float]:
    """(bytes, seconds from the first to the last)."""
    room, total = bytearray(PIECE), 0
    began = 0.0
    while n := s.recv_into(room):
        began = began or time.monotonic()
        total += n
    return total, time.monotonic() - began


def _connect(port: int) -> socket.socket:
    s = socket.create_connection((SERVER, port), PATIENCE)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def _answer(listener: socket.socket) -> None:
    """Give back each byte of each connection, one connection at a time."""
    while True:
        with listener.accept()[0] as s, contextlib.suppress(ConnectionError):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while got := s.recv(1):
                s.send(got)


def _median_us(times: list[float]) -> float:
    if not times:
        raise LabError("no answer")
    return sorted(times)[len(times) // 2] * 1e6


def _requests(port: int, seconds: float) -> float:
    """Median time of a byte and its answer, on a connection that is open, us."""
    times, end = [], time.monotonic() + seconds
    with _connect(port) as s:
        while (began := time.monotonic()) < end or not times:
            s.send(b"x")
            if not s.recv(1):
                raise LabError("the connection ended")
            times.append(time.monotonic() - began)
    return _median_us(times[len(times) // 10:])  # the first ones find everybody asleep, and caches cold


def _connections(port: int, seconds: float) -> float:
    """The same with a connection for each."""
    times, end = [], time.monotonic() + seconds
    while (began := time.monotonic()) < end or not times:
        with _connect(port) as s:
            s.send(b"x")
            s.recv(1)
        times.append(time.monotonic() - began)
    return _median_us(times[len(times) // 10:])


def _first_connection(port: int) -> float:
    """CLOCK_MONOTONIC s of the first connection that succeeds. That one does is the only sign that all works."""
    end, (patience, most) = time.monotonic() + PATIENCE, TRY
    while time.monotonic() < end:
        try:
            with socket.create_connection((SERVER, port), patience):
                return time.monotonic()
        except TimeoutError:
            patience = min(most, patience * 1.3)  # on a busy machine an answer takes its time
        except OSError:
            time.sleep(TRY_AGAIN)
    raise LabError(f"no connection of the guest's succeeded within {PATIENCE:g} s")


@contextlib.contextmanager
def _named(pid: int, path: Path) -> Iterator[str]:
    """Its network namespace at a path, in our mount namespace: pasta gives up what it takes to open that of /proc."""
    path.touch()
    rc = lib.rn_os_mount(f"/proc/{pid}/ns/net".encode(), os.fsencode(path), ffi.NULL, lib.RN_MS_BIND, ffi.NULL)
    if rc < 0:
        raise OSError(-rc, f"mount {path}: {os.strerror(-rc)}")
    try:
        yield str(path)
    finally:
        lib.rn_os_umount_detach(os.fsencode(path))


class Lab:
    """The namespaces. Made by the process that is in `host` from then on."""

    def __init__(self) -> None:
        """Raises GuestError, OSError."""
        new_namespaces(as_root=True)
        netlink.link_up("lo")
        netlink.addr_add("lo", ipaddress.IPv4Interface(f"{SERVER}/32"))
        self._uplink = make_tap(UPLINK, 1500)
        netlink.addr_add(UPLINK, ipaddress.IPv4Interface(f"{HOST}/30"))
        netlink.link_up(UPLINK)
        netlink.default_route(UPLINK, ipaddress.IPv4Address(NEXT))
        _prefer("/proc/sys/net/ipv4/tcp_congestion_control")

    @contextlib.contextmanager
    def guest(self) -> Iterator[int]:
        """A fresh one: the process id that holds it."""
        r, w = os.pipe2(os.O_CLOEXEC)

        def hold() -> None:
            rc = lib.rn_os_unshare(lib.RN_CLONE_NEWNET)
            if rc < 0:
                raise OSError(-rc, os.strerror(-rc))
            netlink.link_up("lo")
            _prefer("/proc/sys/net/ipv4/tcp_congestion_control")
            os.write(w, b"1")
            signal.pause()

        with Task(hold) as task:
            os.close(w)
            ready = os.read(r, 1)
            os.close(r)
            if not ready:
                task.result(PATIENCE)
            yield task.pid

    def measure(self, driver: Driver, mtu: int, seconds: float) -> dict[str, float]:
        """All figures of one program. Raises LabError."""
        with self.guest() as pid, contextlib.ExitStack() as stack:
            netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, netns)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringnet-bench-")))
            path = stack.enter_context(_named(pid, scratch / "netns"))
            answers = stack.enter_context(socket.create_server((SERVER, 0), backlog=128))
            stack.enter_context(Task(lambda: _answer(answers)))
            port = answers.getsockname()[1]
            probe = stack.enter_context(Task(lambda: _first_connection(port), netns))
            root, began = stack.enter_context(self._running(driver, path, mtu, scratch))
            try:
                found = {"start_s": probe.result(2 * PATIENCE) - began, "memory_mib": procs.pss_mib(root)}
                before, amount = procs.usage(root), 0.0
                for name, up in (("tcp_up_gbps", True), ("tcp_down_gbps", False)):
                    n, took = self._bulk(netns, seconds, up=up)
                    found[name] = n * 8 / max(took, 1e-6) / 1e9
                    amount += n
                found["cpu_s_per_GB"] = procs.total(procs.spent(before, procs.usage(root))).cpu_s / max(amount, 1) * 1e9
                for name, work in (("request_us", _requests), ("connection_us", _connections)):
                    with Task(lambda work=work: work(port, seconds), netns) as asking:
                        found[name] = asking.result(seconds + PATIENCE)
            except LabError as e:
                said = (scratch / "log").read_text(errors="replace").strip()[-300:]
                raise LabError(f"{e}{f'; it said: {said}' if said else ''}") from e
            return found

    @staticmethod
    def _bulk(netns: int, seconds: float, *, up: bool) -> tuple[int, float]:
        with socket.create_server((SERVER, 0)) as listener:
            port = listener.getsockname()[1]

            def near() -> Any:
                with _connect(port) as s:
                    s.settimeout(seconds + PATIENCE)
                    return _send(s, seconds) if up else _take(s)

            def far() -> Any:
                with listener.accept()[0] as s:
                    return _take(s) if up else _send(s, seconds)

            with Task(far) as there, Task(near, netns) as here:
                n, took = (there if up else here).result(seconds + 2 * PATIENCE)
        return n, took

    @staticmethod
    @contextlib.contextmanager
    def _running(driver: Driver, netns: str, mtu: int, scratch: Path) -> Iterator[tuple[int, float]]:
        """(process id, CLOCK_MONOTONIC s of its start)."""
        words = driver.words(netns=netns, tap=TAP, mtu=mtu, tcp="none", api=scratch / "api")
        with (scratch / "log").open("wb") as log:
            began = time.monotonic()
            try:
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                           env=os.environ | driver.env,
                                           preexec_fn=lambda: lib.rn_os_pdeathsig(signal.SIGKILL) and None)
            except OSError as e:
                raise LabError(f"{words[0]}: {e.strerror}") from e
            try:
                yield process.pid, began
            finally:
                for how in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, how)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(PATIENCE)
                        break
