"""-p FILE: the guest link as a pcapng file other tools read (scapy and, if it is there, tcpdump)."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import GATEWAY, GUEST, Attached, Netns

pytestmark = pytest.mark.netns


def test_a_ping_is_in_the_file_both_ways(attach: Callable[..., Attached], guest_ns: Netns, tmp_path: Path) -> None:
    from scapy.layers.inet import ICMP, IP
    from scapy.layers.l2 import ARP
    from scapy.utils import rdpcap

    file = tmp_path / "link.pcapng"
    session = attach("-p", str(file))
    guest_ns.run("ping", "-n", "-c2", "-i0.01", "-w30", "-s", "777", GATEWAY)
    assert session.end() == 0, session.output()
    assert file.stat().st_mode & 0o077 == 0  # holds the guest's traffic: for its owner only
    packets = rdpcap(str(file))
    echoes = [(p[IP].src, p[IP].dst, p[ICMP].type, p[ICMP].seq, len(p[ICMP].payload)) for p in packets if ICMP in p]
    assert echoes == [(GUEST, GATEWAY, 8, 1, 777), (GATEWAY, GUEST, 0, 1, 777),
                      (GUEST, GATEWAY, 8, 2, 777), (GATEWAY, GUEST, 0, 2, 777)]
    assert any(ARP in p and p[ARP].op == 2 and p[ARP].psrc == GATEWAY for p in packets)
    times = [p.time for p in packets]
    assert times == sorted(times)


def test_a_file_that_cannot_be_written_is_said_at_once(host_ns: Netns, guest_ns: Netns, tmp_path: Path) -> None:
    from netlab import RINGNET

    done = host_ns.run(*RINGNET, "attach", guest_ns.path, "--tap", "tap0", "-p", tmp_path / "no" / "such.pcapng",
                       check=False)
    assert done.returncode in (1, 2)
    assert "such.pcapng" in done.stderr and len(done.stderr.strip().splitlines()) == 1
