"""Real DHCP clients that are in each other's way: one address for two, an address in use, none left, and a restart.

Machines are network namespaces on a bridge in the guest, as containers there are. The client is busybox's; its script sets the
address and writes it down. Nothing takes an address away again: the kernel may still be asking by ARP where to send a RELEASE.
"""
from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netlab import Attached, Netns, Program, stage_pids, wait_gone

pytestmark = pytest.mark.netns

REPORT = """#!/bin/sh
case "$1" in
bound|renew) ip addr flush dev "$interface" && ip addr add "$ip/$mask" dev "$interface" && echo "$ip" > "$REPORT_TO" ;;
esac
"""


class Lan:
    """Machines on the guest's side, each with an interface eth0 and a MAC of its own."""

    def __init__(self, guest: Netns, make_netns: Callable[[str], Netns], tmp: Path) -> None:
        self.guest, self.make_netns, self.tmp = guest, make_netns, tmp
        self.script = tmp / "report.sh"
        self.script.write_text(REPORT)
        self.script.chmod(self.script.stat().st_mode | stat.S_IXUSR)
        self.machines: list[Netns] = []

    def machine(self) -> Netns:
        ns = self.make_netns("m")
        n = len(self.machines)
        self.guest.ip("link", "add", f"v{n}", "type", "veth", "peer", "name", "eth0", "netns", ns.name)
        self.guest.ip("link", "set", f"v{n}", "master", "br0", "up")
        ns.ip("link", "set", "eth0", "address", f"02:00:00:00:01:{n:02x}", "up")
        self.machines.append(ns)
        return ns

    def bridge(self, tap: str = "tap0") -> None:
        """The link's end and the machines on one wire."""
        if not self.machines:
            self.guest.ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
            self.guest.ip("link", "set", "br0", "up")
        self.guest.ip("link", "set", tap, "master", "br0", "up")

    def argv(self, ns: Netns, *options: str) -> tuple[list[str], Path]:
        to = self.tmp / f"lease-{ns.name}"
        to.unlink(missing_ok=True)
        return ns.argv("env", f"REPORT_TO={to}", "udhcpc", "-i", "eth0", "-f", "-q", "-s", str(self.script), *options), to

    def lease(self, ns: Netns, *options: str) -> str:
        """The address a client is given that does not give up."""
        argv, to = self.argv(ns, "-t", "20", *options)
        with Program(argv, self.tmp / f"client-{ns.name}.log") as client:
            assert client.wait() == 0, client.output()
        return to.read_text().strip()

    def refused(self, ns: Netns, *options: str) -> bool:
        """Does a client that asks three times get nothing?"""
        argv, to = self.argv(ns, "-t", "3", "-T", "1", "-n", *options)
        with Program(argv, self.tmp / f"client-{ns.name}.log") as client:
            return client.wait() != 0 and not to.exists()


@pytest.fixture
def lan(guest_ns: Netns, make_netns: Callable[[str], Netns], tmp_path: Path) -> Lan:
    return Lan(guest_ns, make_netns, tmp_path)


@pytest.fixture
def start(attach: Callable[..., Attached], lan: Lan) -> Iterator[Callable[..., Attached]]:
    def start(*options: str) -> Attached:
        session = attach(*options, config_net=False)
        lan.bridge()
        return session
    yield start


def test_a_client_that_finds_its_address_in_use_declines_and_gets_another(start: Callable[..., Attached], lan: Lan) -> None:
    """RFC 2131 3.1 step 5: busybox -a asks by ARP before it takes an address; somebody answers for 10.0.2.2. It is not
    given to the next, either."""
    start()
    squatter, first, second = lan.machine(), lan.machine(), lan.machine()
    squatter.ip("addr", "add", "10.0.2.2/24", "dev", "eth0")
    assert lan.lease(first, "-a", "-A", "1") == "10.0.2.3"
    assert "declin" in (lan.tmp / f"client-{first.name}.log").read_text()
    assert lan.lease(second, "-r", "10.0.2.2") == "10.0.2.4"


def test_two_clients_at_once_that_want_one_address(start: Callable[..., Attached], lan: Lan) -> None:
    """RFC 2131 4.3.1."""
    start()
    with ExitStack() as stack:
        running = []
        for ns in (lan.machine(), lan.machine()):
            argv, to = lan.argv(ns, "-t", "20", "-r", "10.0.2.77")
            running.append((stack.enter_context(Program(argv, lan.tmp / f"client-{ns.name}.log")), to))
        assert all(client.wait() == 0 for client, _ in running)
        assert sorted(to.read_text().strip() for _, to in running) == ["10.0.2.2", "10.0.2.77"]


def test_the_last_address_is_one_clients_until_it_gives_it_back(start: Callable[..., Attached], lan: Lan) -> None:
    """RFC 2131 4.3.4."""
    start("--netmask", "30")  # the gateway's address, and one more
    first, second = lan.machine(), lan.machine()
    argv, to = lan.argv(first, "-t", "20")
    argv.remove("-q")  # it stays, to release what it has when told to
    os.mkfifo(to)  # tells when it has one
    held = os.open(to, os.O_RDWR)
    with Program(argv, lan.tmp / "stays.log") as client:
        client.wait_readable(held, "no lease")
        assert os.read(held, 100).strip() == b"10.0.2.2"
        assert lan.refused(second)
        client.process.send_signal(signal.SIGUSR2)
        assert lan.lease(second) == "10.0.2.2"  # it asks until it is given something
    os.close(held)
    to.unlink()
    assert lan.refused(first)


def test_leases_outlive_a_killed_services_stage_and_the_session(start: Callable[..., Attached], lan: Lan, tmp_path: Path) -> None:
    """RFC 2131 2.2: asked in another order, each client gets its own address again: nobody else remembers which that was."""
    file = tmp_path / "leases.json"
    session = start("--lease-file", str(file))
    first, second = lan.machine(), lan.machine()
    assert [lan.lease(first), lan.lease(second)] == ["10.0.2.2", "10.0.2.3"]
    services = stage_pids(session.process.pid)["services"]
    os.kill(services, signal.SIGKILL)
    assert not wait_gone([services])
    assert lan.lease(second) == "10.0.2.3"
    assert lan.lease(first) == "10.0.2.2"
    assert session.end() == 0, session.output()
    start("--lease-file", str(file))
    assert lan.lease(second) == "10.0.2.3"
    assert lan.lease(lan.machine()) == "10.0.2.4"
    assert lan.lease(first) == "10.0.2.2"
