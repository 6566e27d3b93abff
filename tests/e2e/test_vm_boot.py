"""A real virtual machine behind the pipeline, under QEMU: lease, names, files both ways with equal sha256, and reached
through a forward. The same script runs with QEMU's own user-mode network (libslirp) beside it: what fails there too is no
fault of ours."""
from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netlab import SERVER, Netns, serving
from vmlab import Qemu, VmSession, fetch, listener

from e2e.dns_server import DnsServer, zone

pytestmark = [pytest.mark.netns, pytest.mark.qemu, pytest.mark.xdist_group("qemu")]

LONG = bool(os.environ.get("RINGNET_LONG"))
SIZE = (32 if LONG else 8) << 20  # bytes of a file, which half of the machine's memory must hold; TCG moves some 30 MB/s
NAME = "files.test"
DOWN, UP, FORWARDED, INSIDE = 8001, 8002, 8003, 80

SCRIPT = f"""
nslookup -type=a {NAME} > /tmp/dns 2>&1; grep -q {SERVER} /tmp/dns && echo "RT name ok" || {{ cat /tmp/dns; echo "RT error name"; }}
nc {NAME} {DOWN} < /dev/null > /www/file || echo "RT error down"
echo "RT down $(sha256sum < /www/file)"
nc {NAME} {UP} < /www/file > /tmp/reply || echo "RT error up"
echo "RT up $(cat /tmp/reply)"
httpd -p {INSIDE} -h /www
"""


class Files:
    """The host side: sends a file to whoever connects to DOWN, and tells who sends one to UP its sha256."""

    def __init__(self, ns: Netns, stack: ExitStack) -> None:
        self.data = os.urandom(1 << 16) * (SIZE >> 16)
        self.sha = hashlib.sha256(self.data).hexdigest()
        stack.enter_context(serving(listener(ns, (SERVER, DOWN)), self._down))
        stack.enter_context(serving(listener(ns, (SERVER, UP)), self._up))

    def _down(self, conn: socket.socket) -> None:
        conn.sendall(self.data)
        conn.shutdown(socket.SHUT_WR)
        while conn.recv(1 << 16):
            pass

    def _up(self, conn: socket.socket) -> None:
        sha = hashlib.sha256()
        while part := conn.recv(1 << 18):
            sha.update(part)
        conn.sendall(f"{sha.hexdigest()}\n".encode())


@pytest.fixture
def files(host_ns: Netns) -> Iterator[Files]:
    with ExitStack() as stack:
        server = DnsServer(host_ns, "127.0.0.1", zone({(NAME, "A"): [SERVER]}))
        stack.callback(server.close)
        yield Files(host_ns, stack)


def whole_run(files: Files, host_ns: Netns, machine: Qemu, address: str, router: str, mtu: int) -> None:
    with machine:
        assert machine.until("lease") == [address, router, str(mtu)]
        assert machine.until("name") == ["ok"]
        assert machine.until("down")[0] == files.sha
        assert machine.until("up") == [files.sha]
        machine.until("end")
        assert hashlib.sha256(fetch(host_ns, ("127.0.0.1", FORWARDED), "/file")).hexdigest() == files.sha
        machine.off()


@pytest.mark.parametrize(("kind", "mtu"), [("stream", 1500), ("dgram", 65520)] +
                         ([("stream", 65520), ("dgram", 1500), ("stream", 4000), ("dgram", 4000)] if LONG else []))
def test_a_machine_behind_ringnet(kind: str, mtu: int, files: Files, host_ns: Netns, tmp_path: Path) -> None:
    path, local = tmp_path / "net", tmp_path / "vm"
    netdev = (f"stream,id=n0,server=off,addr.type=unix,addr.path={path}" if kind == "stream" else
              f"dgram,id=n0,local.type=unix,local.path={local},remote.type=unix,remote.path={path}")
    with VmSession(host_ns, tmp_path / "log", "--type", f"qemu-{kind}", "--socket", str(path), "--one-off", "-m", str(mtu),
                   "-t", f"127.0.0.1/{FORWARDED}:{INSIDE}", "--stats") as session:
        whole_run(files, host_ns, Qemu(host_ns, tmp_path, SCRIPT, netdev), "10.0.2.2", "10.0.2.1", mtu)
        assert session.wait() == 0, session.output()  # --one-off: it ends with the machine
    assert not path.exists()


def test_the_same_machine_behind_libslirp(files: Files, host_ns: Netns, tmp_path: Path) -> None:
    netdev = f"user,id=n0,hostfwd=tcp:127.0.0.1:{FORWARDED}-:{INSIDE}"
    whole_run(files, host_ns, Qemu(host_ns, tmp_path, SCRIPT, netdev), "10.0.2.15", "10.0.2.2", 1500)


@pytest.mark.parametrize("kind", ["stream", "dgram"])
def test_a_machine_that_is_started_again_finds_its_session(kind: str, host_ns: Netns, tmp_path: Path) -> None:
    """Killed, as with kill -9: the next one has the same lease, and the forward leads to it."""
    path, local = tmp_path / "net", tmp_path / "vm"
    netdev = (f"stream,id=n0,server=off,addr.type=unix,addr.path={path}" if kind == "stream" else
              f"dgram,id=n0,local.type=unix,local.path={local},remote.type=unix,remote.path={path}")
    script = f"echo {{}} > /www/file; httpd -p {INSIDE} -h /www"
    with VmSession(host_ns, tmp_path / "log", "--type", f"qemu-{kind}", "--socket", str(path),
                   "-t", f"127.0.0.1/{FORWARDED}:{INSIDE}") as session:
        for name in ("one", "two"):
            with Qemu(host_ns, tmp_path, script.format(name), netdev) as machine:
                assert machine.until("lease")[0] == "10.0.2.2"
                machine.until("end")
                assert fetch(host_ns, ("127.0.0.1", FORWARDED), "/file") == f"{name}\n".encode()
                machine.kill()
        assert session.end() == 0
        assert session.output().count("a virtual machine came") == 2
