"""The second NIC with a host side that is not ours to make: a helper's socket, an inherited descriptor, nic2-helper."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from netlab import DEADLINE, RINGNET, Netns, PlainUser, Program, children, serving, wait_gone

from e2e.test_nic2 import Nic2, assert_nothing_is_lost, left, pings
from pipeline.messages import Exit
from shm._dataplane import ffi, lib

pytestmark = pytest.mark.netns

MAC = "02:00:5e:00:53:02"
TUNSETOFFLOAD = 0x400454D0


class Helper:
    """What socket_vmnet and vmnet-helper do: a Unix socket on one side, an interface of a network on the other.

    stream: each frame behind its length, 4 bytes, high byte first. dgram: a frame each, to whoever sent last."""

    def __init__(self, network: Netns, path: Path, kind: str) -> None:
        self.kind = kind
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if kind == "stream" else socket.SOCK_DGRAM)
        self.listener.bind(str(path))
        self.tap = self._tap(network)
        self.stop_r, self.stop_w = os.pipe()
        self.largest = 0
        self.sock: socket.socket | None = None
        self.thread = threading.Thread(target=self._serve)
        if kind == "stream":
            self.listener.listen()
        self.thread.start()

    @staticmethod
    def _tap(network: Netns) -> int:
        made: list[int] = []

        def make() -> None:
            ns = os.open(network.path, os.O_RDONLY)
            assert lib.rn_os_setns(ns, lib.RN_CLONE_NEWNET) == 0
            os.close(ns)
            made.append(lib.rn_tap_open(b"net0", ffi.new("int *")))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        fcntl.ioctl(made[0], TUNSETOFFLOAD, 0)  # plain frames, as the wire has them
        network.ip("addr", "add", "10.77.0.1/24", "dev", "net0")
        network.ip("link", "set", "net0", "up")
        return made[0]

    def _serve(self) -> None:
        buffer = b""
        watched = self.listener
        while True:
            for fd in select.select([self.stop_r, self.tap, watched], [], [], DEADLINE)[0]:
                if fd == self.stop_r:
                    return
                if fd == self.tap:
                    frame = os.read(self.tap, 1 << 17)[12:]
                    if self.kind == "stream" and self.sock is not None:
                        self.sock.sendall(struct.pack("!I", len(frame)) + frame)
                    elif self.kind == "dgram" and self.sock is not None:
                        try:
                            self.sock.send(frame)
                        except OSError as e:  # the session has ended
                            if e.errno not in (errno.ECONNREFUSED, errno.ENOTCONN):
                                raise
                elif self.kind == "dgram":
                    frame, peer = self.listener.recvfrom(1 << 17)
                    if self.sock is None:
                        self.sock = self.listener
                        self.listener.connect(peer)
                    self._out(frame)
                elif watched is self.listener:
                    self.sock = watched = self.listener.accept()[0]
                else:
                    data = watched.recv(1 << 18)
                    if not data:
                        watched.close()
                        self.sock, watched, buffer = None, self.listener, b""
                        continue
                    buffer += data
                    while len(buffer) >= 4 and len(buffer) >= 4 + (n := struct.unpack("!I", buffer[:4])[0]):
                        self._out(buffer[4:4 + n])
                        buffer = buffer[4 + n:]

    def _out(self, frame: bytes) -> None:
        self.largest = max(self.largest, len(frame))
        os.write(self.tap, bytes(12) + frame)

    def close(self) -> None:
        os.close(self.stop_w)
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        if self.sock is not None:
            self.sock.close()
        self.listener.close()
        os.close(self.tap)
        os.close(self.stop_r)


@contextmanager
def helper(network: Netns, path: Path, kind: str) -> Iterator[Helper]:
    made = Helper(network, path, kind)
    try:
        yield made
    finally:
        made.close()


def set_address(guest: Netns) -> None:
    guest.ip("addr", "add", "10.77.0.2/24", "dev", "tap1")
    guest.ip("link", "set", "tap1", "up")


@pytest.mark.parametrize("kind", ["stream", "dgram"])
def test_a_helper_carries_frames_both_ways(host_ns: Netns, guest_ns: Netns, make_netns: Callable[[str], Netns],
                                           tmp_path: Path, kind: str) -> None:
    """The interface is as the helper's facts say; 8 MiB go each way whole; the guest's super-frames arrive cut."""
    network = make_netns("n")
    facts = tmp_path / "facts"
    facts.write_text(json.dumps({"vmnet_mac_address": MAC.upper(), "vmnet_mtu": 1400, "vmnet_mode": "shared"}))
    with helper(network, tmp_path / "sock", kind) as peer, Nic2(
            host_ns, guest_ns, tmp_path / "log", f"socket,path={tmp_path}/sock,facts={facts}", config_net=False) as session:
        link = guest_ns.ip("link", "show", "dev", "tap1")
        assert MAC in link and "mtu 1400" in link
        set_address(guest_ns)
        assert pings(guest_ns, "10.77.0.1") and pings(network, "10.77.0.2")
        data = os.urandom(1 << 20) * 8
        got: list[bytes] = []

        def exchange(c: socket.socket) -> None:
            parts = [c.recv(1 << 16)]
            while sum(map(len, parts)) < len(data):
                parts.append(c.recv(1 << 16))
            got.append(b"".join(parts))
            c.sendall(data)

        with serving(network.listen("10.77.0.1"), exchange) as there:
            with guest_ns.socket() as here:
                here.connect(there)
                here.sendall(data)
                back = b""
                while len(back) < len(data):
                    back += here.recv(1 << 18)
        assert got == [data] and back == data
        assert peer.largest <= 1400 + 18
        assert_nothing_is_lost(session)
        assert session.end() == 0 and session.output() == "", session.output()


def test_a_helper_that_ends_takes_nic2_down_and_may_come_back(host_ns: Netns, guest_ns: Netns,
                                                              make_netns: Callable[[str], Netns], tmp_path: Path) -> None:
    from pipeline import api
    from pipeline.client import Client, find

    network = make_netns("n")
    path = tmp_path / "sock"
    with helper(network, path, "stream"):
        session = Nic2(host_ns, guest_ns, tmp_path / "log", f"socket,path={path}", config_net=False)
        stack = session.__enter__()
        try:
            client = Client(find(session.name), timeout=DEADLINE)
            client.call(api.Subscribe(events=["nic-changed"]))
        except BaseException:
            stack.__exit__()
            raise
    with session, client:
        assert next(client.events()).state == "down"
        assert "host side" in str(session.nic2["reason"])
        path.unlink()
        with pytest.raises(api.ApiError, match="start the helper first"):
            client.call(api.StartNic())
        with helper(network, path, "stream"):
            client.call(api.StartNic())
            set_address(guest_ns)
            assert pings(guest_ns, "10.77.0.1")
        assert session.end() == 0, session.output()


def test_an_inherited_tap(host_ns: Netns, guest_ns: Netns, tmp_path: Path) -> None:
    """Made by somebody else, as libvirt or systemd would; MTU and all."""
    made: list[int] = []

    def make() -> None:
        ns = os.open(host_ns.path, os.O_RDONLY)
        assert lib.rn_os_setns(ns, lib.RN_CLONE_NEWNET) == 0
        os.close(ns)
        made.append(lib.rn_tap_open(b"theirs", ffi.new("int *")))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    [tap] = made
    host_ns.ip("link", "set", "theirs", "mtu", "1300", "up")
    host_ns.ip("addr", "add", "10.77.0.1/24", "dev", "theirs")
    ready, told = os.pipe()
    argv = [*RINGNET, "attach", str(guest_ns.path), "--nic2", f"fd={tap},mac={MAC}", "--ready-fd", str(told)]
    with Program(host_ns.argv(*argv), tmp_path / "log", pass_fds=(tap, told)) as session:
        os.close(told)
        session.wait_word(ready, "not ready")
        os.close(ready)
        os.close(tap)
        link = guest_ns.ip("link", "show", "dev", "tap1")
        assert MAC in link and "mtu 1300" in link
        set_address(guest_ns)
        assert pings(guest_ns, "10.77.0.1")
        assert session.end() == 0, session.output()


def test_nic2_helper_has_the_rights_and_the_session_has_none(host_ns: Netns, plain_user: PlainUser, tmp_path: Path) -> None:
    """A plain user's `ringnet run`: two interfaces, an address by DHCP, a route on the host; and nothing is left."""
    script = "id -u; ip -br -4 addr show dev tap1; test -S /proc/self/fd/3 && echo the line || echo no line; read -r go"
    go_r, go_w = os.pipe()
    said_r, said_w = os.pipe()
    argv = [*RINGNET, "nic2-helper", "--nic2", "shared,subnet=192.168.88.1/24", "--route", "172.16.0.0/12", "--",
            "sh", "-c", f'exec "$@" </dev/fd/{go_r} >/dev/fd/{said_w}', "sh",
            *plain_user.ringnet("run", "-q", "--nic2", "fd=3", "--", "sh", "-c", f"{script}; echo said")]
    with Program(host_ns.argv(*argv), tmp_path / "log", pass_fds=(go_r, said_w)) as program:
        os.close(go_r)
        os.close(said_w)
        out = ""
        while " line\n" not in out:
            out += program.wait_word(said_r, "nothing from the guest") + "\n"
        assert "no line" in out and out.startswith(f"{plain_user.uid}\n") and re.search(r"tap1\s+\S+\s+192\.168\.88\.\d+/24", out), out
        assert re.search(r"172\.16\.0\.0/12 via 192\.168\.88\.\d+ dev rn-shared", host_ns.ip("route"))
        guest = re.search(r"192\.168\.88\.(\d+)/24", out)
        assert guest and pings(host_ns, f"192.168.88.{guest[1]}")
        os.write(go_w, b"go\n")
        os.close(go_w)
        assert program.wait() == 0, program.output()
        os.close(said_r)
    assert left(host_ns) == []


def test_nic2_helper_cleans_up_after_a_killed_session(host_ns: Netns, tmp_path: Path) -> None:
    """At once, not at the next start: the line closes with its last user."""
    r, w = os.pipe()
    argv = [*RINGNET, "nic2-helper", "--nic2", "host", "--", *RINGNET, "run", "-q", "--nic2", "fd=3", "--", "sh", "-c",
            f"echo up >/dev/fd/{w}; exec sleep 1000"]
    with Program(host_ns.argv(*argv), tmp_path / "log", pass_fds=(w,)) as program:
        os.close(w)
        program.wait_word(r, "not up")
        os.close(r)
        assert "rn-host" in left(host_ns)
        pids = children(program.pid)
        os.kill(pids[0], signal.SIGKILL)
        assert program.wait() == 128 + signal.SIGKILL
        assert wait_gone(pids) == []
    assert left(host_ns) == []


def test_nic2_helper_runs_the_command_as_the_user_it_is_told(host_ns: Netns) -> None:
    done = host_ns.run(*RINGNET, "nic2-helper", "--nic2", "host", "--user", "12345", "--", "sh", "-c",
                       "id -u; id -g; id -G; test -S /proc/self/fd/3 && exit 7", check=False)
    assert done.returncode == 7, done
    assert done.stdout.split() == ["12345", "12345", "12345"]


@pytest.mark.parametrize(("argv", "code", "says"), [
    (["--nic2", "host"], Exit.USAGE, "say what to run"),
    (["--nic2", "fd=3", "--", "true"], Exit.USAGE, "needs no helper"),
    (["--nic2", "host", "--user", "nobody-of-that-name", "--", "true"], Exit.USAGE, "no such user"),
    (["--nic2", "host", "--", "/nonexistent/program"], 127, "cannot run"),
])
def test_nic2_helper_says_what_is_wrong(host_ns: Netns, argv: list[str], code: int, says: str) -> None:
    done = host_ns.run(*RINGNET, "nic2-helper", *argv, check=False)
    assert done.returncode == code and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_without_rights_the_error_says_what_to_grant(host_ns: Netns, plain_user: PlainUser, tmp_path: Path) -> None:
    with Program(host_ns.argv(*plain_user.ringnet("run", "--nic2", "shared", "--", "true")), tmp_path / "log") as program:
        assert program.wait() == Exit.RUNTIME
        said = program.output()
    assert "needs CAP_NET_ADMIN" in said and "nic2-helper --nic2 shared" in said and said.count("\n") == 1, said


@pytest.mark.parametrize(("nic2", "says"), [
    ("socket,path=/nonexistent/sock", "start the helper first"),
    ("fd=77", "Bad file descriptor"),
    ("fd=4", "neither a tap nor a socket"),
    ("socket,path=/nonexistent/sock,facts=/dev/null", "not what vmnet-helper prints"),
])
def test_a_host_side_that_is_not_there(host_ns: Netns, guest_ns: Netns, nic2: str, says: str, tmp_path: Path) -> None:
    argv = ["sh", "-c", f'exec 4<{__file__}; exec "$@"', "sh", *RINGNET, "attach", str(guest_ns.path), "--nic2", nic2]
    done = host_ns.run(*argv, check=False)
    assert done.returncode == Exit.RUNTIME and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert left(host_ns) == []
