"""Real DHCP clients each get a lease with address, MTU, router, name server and search list."""
from __future__ import annotations

import ipaddress
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import GATEWAY, GUEST, Attached, Netns, unique

pytestmark = pytest.mark.netns

MTU = 3400  # not the default: what the client reports must have come by DHCP

# Every client calls a script with what it learned in the environment: write that down instead of acting on it.
# All three tell the script by $1 or $reason why it is called.
REPORT = """#!/bin/sh
case "$1$reason" in bound|renew|BOUND|REBOOT|RENEW) env > "$REPORT_TO.tmp" && mv "$REPORT_TO.tmp" "$REPORT_TO";; esac
exit 0
"""


@pytest.fixture
def report(tmp_path: Path) -> tuple[Path, Path]:
    script, to = tmp_path / "report.sh", tmp_path / "lease.env"
    script.write_text(REPORT.replace("$REPORT_TO", str(to)))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script, to


def lease(to: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in to.read_text().splitlines() if "=" in line)


@pytest.fixture
def link(attach: Callable[..., Attached], guest_ns: Netns) -> str:
    """An unconfigured interface in the guest, up; its name is unique because dhcpcd keeps files by name."""
    name = unique("t")
    attach("-S", "corp.example", config_net=False, tap=name, mtu=MTU)
    guest_ns.ip("link", "set", name, "up")
    return name


def test_udhcpc(link: str, guest_ns: Netns, report: tuple[Path, Path]) -> None:
    script, to = report
    guest_ns.run("udhcpc", "-i", link, "-n", "-q", "-f", "-O", "mtu", "-O", "search", "-s", script)
    got = lease(to)
    assert (got["ip"], got["mask"], got["router"], got["dns"]) == (GUEST, "24", GATEWAY, GATEWAY)
    assert got["mtu"] == str(MTU)
    assert got["serverid"] == GATEWAY
    assert "corp.example" in got["search"].split()


def test_dhclient(link: str, guest_ns: Netns, report: tuple[Path, Path], tmp_path: Path) -> None:
    script, to = report
    conf = tmp_path / "dhclient.conf"
    conf.write_text("request subnet-mask, routers, domain-name-servers, domain-search, interface-mtu;\ntimeout 30;\n")
    guest_ns.run("dhclient", "-4", "-1", "-v", "-cf", conf, "-lf", tmp_path / "leases", "-pf", tmp_path / "pid",
                 "-sf", script, "-e", f"REPORT_TO={to}", link)
    try:
        got = lease(to)
        assert (got["new_ip_address"], got["new_subnet_mask"]) == (GUEST, "255.255.255.0")
        assert (got["new_routers"], got["new_domain_name_servers"]) == (GATEWAY, GATEWAY)
        assert got["new_interface_mtu"] == str(MTU)
        assert "corp.example" in got["new_domain_search"]
    finally:  # it went to the background
        guest_ns.run("dhclient", "-4", "-x", "-cf", conf, "-lf", tmp_path / "leases", "-pf", tmp_path / "pid",
                     "-sf", script, link)


def test_dhcpcd(link: str, guest_ns: Netns, report: tuple[Path, Path], tmp_path: Path) -> None:
    script, to = report
    conf = tmp_path / "dhcpcd.conf"
    conf.write_text("ipv4only\nnoipv4ll\nnoarp\n"
                    "option subnet_mask, routers, domain_name_servers, domain_search, interface_mtu\n")
    # Its state directories are fixed: give it empty ones (`ip netns exec` has made a private mount namespace).
    guest_ns.run("sh", "-c", 'mount -t tmpfs none /run && mkdir -p /run/dhcpcd /var/lib/dhcpcd && '
                 'mount -t tmpfs none /var/lib/dhcpcd && exec dhcpcd "$@"', "sh",
                 "--oneshot", "--debug", "--timeout", "30", "--config", conf, "--script", script, link)
    got = lease(to)
    assert (got["new_ip_address"], got["new_subnet_cidr"]) == (GUEST, "24")
    assert (got["new_routers"], got["new_domain_name_servers"]) == (GATEWAY, GATEWAY)
    assert got["new_interface_mtu"] == str(MTU)
    assert "corp.example" in got["new_domain_search"]


def test_udhcpc_gets_the_same_address_again(link: str, guest_ns: Netns, report: tuple[Path, Path]) -> None:
    script, to = report
    for _ in range(2):
        guest_ns.run("udhcpc", "-i", link, "-n", "-q", "-f", "-s", script)
        assert lease(to)["ip"] == GUEST
        to.unlink()


def test_a_wish_outside_the_pool_is_not_granted(link: str, guest_ns: Netns, report: tuple[Path, Path]) -> None:
    script, to = report
    guest_ns.run("udhcpc", "-i", link, "-n", "-q", "-f", "-r", "10.9.9.9", "-s", script)
    assert ipaddress.ip_address(lease(to)["ip"]) in ipaddress.ip_network("10.0.2.0/24")
