"""`ringnet top` and `ringnet flows` as a user sees them: in a terminal, with ten thousand flows, and for programs."""
from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, SERVER, Attached, Netns, run_env, sh, unique

pytestmark = pytest.mark.netns

MANY = """
import socket, sys
for n in range(int(sys.argv[1])):  # a socket each, so a port, so a mapping each
    if n % 500 == 0:  # not faster than they are taken, and not before the gateway was asked for its MAC address
        with socket.create_connection((sys.argv[2], int(sys.argv[3]))) as fence:
            fence.recv(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("10.0.2.2", 20000 + n))
        s.sendto(b"x", ("198.51.100.2", 9999))
"""


class Terminal:
    """A terminal of 200 x 50 in a tmux of its own; what its program writes comes through a pipe, so nobody has to poll."""

    def __init__(self, tmp: Path, *argv: str) -> None:
        self.name = unique("t")
        self.fifo = tmp / "screen"
        os.mkfifo(self.fifo)
        self.fd = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
        start = tmp / "start"
        start.write_text(f"#!/bin/sh\nunset COLUMNS LINES\nread go <{tmp}/go\nexec {' '.join(argv)}\n")
        start.chmod(0o755)
        os.mkfifo(tmp / "go")
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "200", "-y", "50", str(start))
        self.tmux("pipe-pane", f"cat >{self.fifo}")
        (tmp / "go").write_text("\n")

    def tmux(self, *args: str) -> str:
        return sh("tmux", "-L", self.name, *args, env=run_env(TERM="xterm-256color")).stdout

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait(self, *texts: str) -> str:
        """The screen, once all of this is on it."""
        end = time.monotonic() + DEADLINE
        while True:
            seen = self.screen()
            if all(t in seen for t in texts):
                return seen
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"wanted {texts}:\n{seen}"
            os.read(self.fd, 1 << 20)

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self.name, "kill-server"], capture_output=True)
        os.close(self.fd)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:
        def start(*argv: str) -> Terminal:
            made = Terminal(tmp_path, *argv)
            stack.callback(made.close)
            return made

        yield start


def command(tmp_path: Path, name: str, *args: str, status: int = 0) -> str:
    done = sh(*RINGNET, name, "--api-socket", tmp_path / "api", *args, check=False, env=run_env())
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("how", ["plain", "rich"])
def test_ten_thousand_flows(attach: Callable[..., Attached], terminal: Callable[..., Terminal], host_ns: Netns,
                            guest_ns: Netns, tmp_path: Path, how: str) -> None:
    attach("--api-socket", str(tmp_path / "api"), "--udp-max", "15000", "--session", "many")
    n = 10_000
    with host_ns.listen(SERVER) as fence:
        with subprocess.Popen(guest_ns.argv("python3", "-c", MANY, str(n), SERVER, str(fence.getsockname()[1])),
                              env=run_env()) as many:
            while many.poll() is None:
                if select.select([fence], [], [], 0.1)[0]:
                    fence.accept()[0].close()
        assert many.returncode == 0
        top = terminal(*RINGNET, "top", "--api-socket", str(tmp_path / "api"), "-i", "0.2",
                       *(["--plain"] if how == "plain" else []))
        seen = top.wait("ringnet top: session many", f"{n} udp mapped", "classify->egress", "guest_rx", "10.0.2.2:2")
        lines = seen.splitlines()
        assert all(len(line) <= 200 for line in lines)
        stages = [line.split() for line in lines if line.startswith(("guest_tx ", "classify ", "egress ", "services ", "guest_rx "))]
        assert [s[:3] for s in stages[:5]] == [[name, "running", "0"] for name in
                                               ("guest_tx", "classify", "egress", "services", "guest_rx")]
        sorts = ["flows by rate", "flows by bytes", "flows by age"]
        for now, then in zip(sorts, sorts[1:], strict=False):
            top.wait(now)
            top.tmux("send-keys", "s")
            top.wait(then)
        top.tmux("send-keys", "q")
        assert select.select([top.fd], [], [], DEADLINE)[0]
        rows = [json.loads(line) for line in command(tmp_path, "flows", "--json", "--proto", "udp").splitlines()]
        assert len({r["guest_port"] for r in rows}) == n and {r["up_owner"] for r in rows} == {"egress"}
        look = json.loads(command(tmp_path, "top", "--json", "-n", "1", "--flows", "3"))
        assert look["kinds"]["udp mapped"] == n and len(look["top"]) == 3 and look["session"] == "many"


def test_one_flow_in_words(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns, tmp_path: Path) -> None:
    attach("--api-socket", str(tmp_path / "api"))
    with host_ns.listen() as server, guest_ns.socket() as client:
        port = server.getsockname()[1]
        client.connect((GATEWAY, port))
        with server.accept()[0] as connection:
            client.setblocking(False)
            table, end = "", time.monotonic() + DEADLINE
            while "host buffer full" not in table:  # nobody reads; the guest's buffer is full before the host's
                assert time.monotonic() < end, table
                with contextlib.suppress(BlockingIOError):
                    while True:
                        client.send(bytes(1 << 20))
                table = command(tmp_path, "flows", "--port", str(port), "--waiting")
            assert table.count("\n") == 3 and f"{GATEWAY}:{port}" in table
            name = table.splitlines()[2].split()[0]
            said = command(tmp_path, "flows", name)
            assert f"flow         {name}  tcp" in said and "waits for    host buffer full" in said
            connection.settimeout(DEADLINE)
            connection.recv(1 << 20)
    for args, status, wanted in ((["9.9"], 1, "there is no flow 9.9"), (["nine"], 2, "not a flow's name"),
                                 (["--host", "here"], 2, "not an IP address"), (["-i", "0"], 2, "not within 0.1..3600")):
        assert wanted in command(tmp_path, "flows", *args, status=status)


def test_it_cannot_write_to_the_session(attach: Callable[..., Attached], tmp_path: Path) -> None:
    """Descriptors handed out map for reading only."""
    from pipeline import api
    from pipeline.client import Client
    from shm._dataplane import ffi, lib

    attach("--api-socket", str(tmp_path / "api"))
    with Client(tmp_path / "api") as client:
        info = client.call(api.Memory())
        fds = client.take_fds()
        sizes = [info.session.size, info.arena.size, info.flows.size, *(r.size for r in info.rings)]
        assert len(fds) == len(sizes) >= 9
        for fd, size in zip(fds, sizes, strict=True):
            assert lib.rn_map(fd, size, 0) == ffi.NULL
            mapped = lib.rn_map(fd, size, 1)
            assert mapped != ffi.NULL
            lib.rn_unmap(mapped, size)
            os.close(fd)


def test_it_ends_with_the_session(attach: Callable[..., Attached], tmp_path: Path) -> None:
    session = attach("--api-socket", str(tmp_path / "api"), "--session", "short")
    argv = [*RINGNET, "top", "--api-socket", str(tmp_path / "api"), "--json", "-i", "0.1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=run_env()) as top:
        assert json.loads(top.stdout.readline())["session"] == "short"
        assert session.end() == 0
        top.stdout.read()
        assert top.wait(DEADLINE) == 1 and top.stderr.read() == "ringnet top: session short ended\n"


def test_datagrams_and_echoes_have_their_bytes_and_rates(attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns,
                                                         tmp_path: Path) -> None:
    attach("--api-socket", str(tmp_path / "api"))
    with host_ns.socket(kind=socket.SOCK_DGRAM) as server, guest_ns.socket(kind=socket.SOCK_DGRAM) as guest:
        server.bind((SERVER, 0))
        for _ in range(40):  # past promotion
            guest.sendto(b"a" * 100, server.getsockname())
            server.sendto(b"b" * 200, server.recvfrom(1000)[1])
            assert guest.recv(1000) == b"b" * 200
        guest_ns.run("ping", "-n", "-c2", "-i0.01", "-W30", "-s", "72", SERVER)
        rows = [json.loads(line) for line in command(tmp_path, "flows", "--json").splitlines()]
    found = {r["proto"]: r for r in rows}
    udp, icmp = found["udp"], found["icmp"]
    assert (udp["up_bytes"], udp["down_bytes"], udp["up_packets"], udp["down_packets"]) == (4000, 8000, 40, 40)
    assert icmp["up_packets"] == icmp["down_packets"] == 2 and icmp["up_bytes"] == icmp["down_bytes"] >= 2 * 72
    for flow in (udp, icmp):
        assert flow["up_bits_s"] > 0 and flow["down_bits_s"] > 0
