"""A real virtual machine with both interfaces: `ringnet vm --nic2 MODE --nic2-socket PATH`."""
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from netlab import RINGNET, Netns
from vmlab import Qemu, VmSession, fetch

from e2e.test_nic2 import left, pings
from pipeline.messages import Exit

pytestmark = [pytest.mark.netns, pytest.mark.qemu, pytest.mark.xdist_group("qemu")]

MAC = "52:54:00:00:00:02"
SCRIPT = """
printf '#!/bin/sh\\n[ "$1" = bound ] && ip addr add $ip/$mask dev $interface && echo RT second $ip $interface\\nexit 0\\n' > /dhcp2
chmod +x /dhcp2; ip link set eth1 up
udhcpc -n -q -f -t 20 -i eth1 -s /dhcp2 2>/dev/null || echo "RT error no second lease"
ip link set lo up; ip addr add 172.16.7.2/32 dev lo
echo container > /www/who; httpd -p 80 -h /www
"""


@pytest.mark.parametrize("kind", ["stream", *(["dgram"] if os.environ.get("RINGNET_LONG") else [])])
def test_a_machine_with_two_interfaces(host_ns: Netns, tmp_path: Path, kind: str) -> None:
    """A lease from each; the host reaches it, and an address behind it, by the second; twice, as machines come and go."""
    one, two = tmp_path / "one", tmp_path / "two"

    def netdev(n: int, path: Path) -> str:
        if kind == "stream":
            return f"stream,id=n{n},server=off,addr.type=unix,addr.path={path}"
        return f"dgram,id=n{n},local.type=unix,local.path={tmp_path}/vm{n},remote.type=unix,remote.path={path}"

    with VmSession(host_ns, tmp_path / "log", "--type", f"qemu-{kind}", "--socket", str(one), "--nic2",
                   f"shared,mac={MAC}", "--route", "172.16.0.0/12", "--nic2-socket", str(two)) as session:
        for _ in range(2):
            with Qemu(host_ns, tmp_path, SCRIPT, netdev(0, one),
                      more=["-netdev", netdev(1, two), "-device", f"virtio-net-pci,netdev=n1,romfile=,mac={MAC}"]) as machine:
                assert machine.until("lease")[0] == "10.0.2.2"
                address, interface = machine.until("second")
                assert interface == "eth1" and re.fullmatch(r"192\.168\.64\.\d+", address)
                machine.until("end")
                assert pings(host_ns, address) and pings(host_ns, "172.16.7.2")
                assert fetch(host_ns, ("172.16.7.2", 80), "/who") == b"container\n"
                machine.off()
        assert session.end() == 0, session.output()
        assert f"MAC address must be {MAC}, its MTU is 1500" in session.output()
    assert left(host_ns) == [] and not one.exists() and not two.exists()


@pytest.mark.parametrize(("options", "says"), [
    (["--nic2", "shared"], "one of --nic2-socket PATH and --nic2-fd N"),
    (["--nic2-socket", "/tmp/x"], "needs --nic2 MODE"),
])
def test_one_option_needs_the_other(host_ns: Netns, tmp_path: Path, options: list[str], says: str) -> None:
    done = host_ns.run(*RINGNET, "vm", "--type", "qemu-stream", "--socket", str(tmp_path / "s"), *options, check=False)
    assert done.returncode == Exit.USAGE and says in done.stderr, done.stderr
