"""Real virtual machines for tests: Debian's cloud kernel under QEMU without KVM, and an initramfs made here.

tools/test puts the kernel, its virtio modules and a static busybox into build/guest (tools/lib/guest.sh). A machine boots in
some seconds, runs a script, and says what it has to say on its serial console, in lines that begin with "RT ".
"""
from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from netlab import DEADLINE, REPO, RINGNET, Netns, Program, run_env

GUEST = REPO / "build" / "guest"
BOOT = 120.0  # s; how long a machine that boots in 3 may take on a busy host before the test is called broken
# In the order they need each other.
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "failover", "net_failover",
           "virtio_net")

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
echo  # behind what the firmware left on the line
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for m in {modules}; do insmod /mod/$m.ko || echo "RT error insmod $m"; done
ip link set lo up; ip link set eth0 up
cat > /dhcp <<'E'
#!/bin/sh
[ "$1" = bound ] || exit 0
[ -z "$mtu" ] || ip link set dev $interface mtu $mtu
ip addr add $ip/$mask dev $interface
ip route add default via $router
for d in $dns; do echo nameserver $d; done > /etc/resolv.conf
echo "RT lease $ip $router $(cat /sys/class/net/$interface/mtu)" > /lease
E
chmod +x /dhcp
udhcpc -n -q -f -t 20 -i eth0 -s /dhcp -O mtu >/dev/null 2>&1 || echo "RT error no lease"
cat /lease
{script}
echo "RT end"
read line
poweroff -f
"""


def _entry(name: str, data: bytes = b"", mode: int = 0o100755, device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a "newc" archive, as the kernel unpacks it (its Documentation/driver-api/early-userspace)."""
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    out = b"070701" + "".join(f"{n:08X}" for n in numbers).encode() + name.encode() + b"\0"
    out += bytes(-len(out) % 4) + data
    return out + bytes(-len(out) % 4)


def initramfs(script: str) -> bytes:
    """An archive whose /init gets a lease, runs the script, says "RT end" and powers off when a line comes."""
    out = b"".join(_entry(d, mode=0o040755) for d in ("bin", "dev", "proc", "sys", "etc", "mod", "www", "tmp"))
    out += _entry("dev/console", mode=0o020600, device=(5, 1))
    out += _entry("bin/busybox", (GUEST / "busybox").read_bytes())
    for name in MODULES:
        out += _entry(f"mod/{name}.ko", (GUEST / f"{name}.ko").read_bytes())
    return out + _entry("init", INIT.format(modules=" ".join(MODULES), script=script).encode()) + _entry("TRAILER!!!", mode=0)


class Qemu:
    """A machine, running. Use as a context manager: it is killed at the end if it is still there."""

    def __init__(self, ns: Netns, tmp: Path, script: str, netdev: str, *, mac: str = "52:54:00:00:00:01",
                 pass_fds: Sequence[int] = (), more: Sequence[str] = ()) -> None:
        assert (GUEST / "vmlinuz").exists(), f"{GUEST} has no kernel: run the tests by tools/test, which fetches it"
        initrd = tmp / f"initrd-{time.monotonic_ns()}"
        initrd.write_bytes(initramfs(script))
        argv = ["qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-nographic", "-nodefaults", "-no-reboot", "-serial",
                "stdio", "-kernel", str(GUEST / "vmlinuz"), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
                "-netdev", netdev, "-device", f"virtio-net-pci,netdev=n0,romfile=,mac={mac}", *more]
        self.process = subprocess.Popen(ns.argv(*argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, env=run_env(), pass_fds=pass_fds, start_new_session=True)
        self.said = ""

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()

    def kill(self) -> None:
        """As when a host loses it."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def until(self, word: str) -> list[str]:
        """Wait for a line "RT word ...", and return the words behind it. Fails if the machine says "RT error"."""
        assert self.process.stdout
        end = time.monotonic() + BOOT
        while True:
            lines = [line.split()[1:] for line in self.said.replace("\r", "").split("\n")[:-1] if line.lstrip().startswith("RT ")]
            for words in lines:
                assert words[0] != "error", f"the machine: {' '.join(words)}\n{self.said}"
                if words[0] == word:
                    return words[1:]
            left = end - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, left))
            assert ready, f"no {word!r} within {BOOT:g} s:\n{self.said}"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, f"the machine ended before {word!r}:\n{self.said}"
            self.said += more.decode(errors="replace")

    def off(self) -> None:
        """Let it go on from "RT end", to its end."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        assert self.process.wait(DEADLINE) == 0, self.said


class VmSession(Program):
    """`ringnet vm` run in `host` (None: where the test runs), waiting for a machine when the constructor returns. It ends with
    us, however that comes: we hold the other end of its --exit-fd."""

    def __init__(self, host: Netns | None, log: Path, *options: str, pass_fds: Sequence[int] = ()) -> None:
        ready, told = os.pipe()
        held, self.exit_fd = os.pipe()
        try:
            argv = [*RINGNET, "vm", "--ready-fd", str(told), "--exit-fd", str(held), *options]
            super().__init__(host.argv(*argv) if host else argv, log, pass_fds=(told, held, *pass_fds))
            os.close(told)
            told = -1
            self.wait_word(ready, "not ready")
        except BaseException:
            if hasattr(self, "pidfd"):
                self.__exit__()
            else:
                os.close(self.exit_fd)
            raise
        finally:
            for fd in (ready, told, held):
                if fd >= 0:
                    os.close(fd)

    def __exit__(self, *exc: object) -> None:
        try:
            super().__exit__(*exc)
        finally:
            os.close(self.exit_fd)


def fetch(ns: Netns, address: tuple[str, int], path: str) -> bytes:
    """GET over HTTP/1.0 from a socket of that namespace."""
    with ns.socket() as sock:
        sock.settimeout(DEADLINE)
        sock.connect(address)
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        got = b""
        while part := sock.recv(1 << 16):
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], head
    return body


def listener(ns: Netns, address: tuple[str, int]) -> socket.socket:
    sock = ns.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    sock.listen()
    return sock
