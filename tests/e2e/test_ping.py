"""ping reaches the gateway and beyond, by a ping socket or by a raw one, with small and large messages."""
from __future__ import annotations

from collections.abc import Callable

import pytest
from netlab import GATEWAY, SERVER, Attached, Netns

pytestmark = pytest.mark.netns


def ping(guest: Netns, address: str, *options: str) -> str:
    """Three echoes, as fast as the answers come. -w only ends a broken run."""
    return guest.run("ping", "-n", "-c3", "-i0.01", "-w30", *options, address, check=False).stdout


@pytest.mark.parametrize("size", [0, 8, 56, 3972, 3973, 20_000, 65507])
def test_the_gateway(guest_session: Attached, guest_ns: Netns, size: int) -> None:
    assert "3 received" in ping(guest_ns, GATEWAY, "-s", str(size))


@pytest.mark.parametrize("group_range", ["0 2147483647", "1 0"], ids=["ping socket", "raw socket"])
@pytest.mark.parametrize("size", [56, 8000])
def test_beyond_the_gateway(host_ns: Netns, attach: Callable[..., Attached], guest_ns: Netns, group_range: str,
                            size: int) -> None:
    host_ns.run("sh", "-c", f'echo "{group_range}" > /proc/sys/net/ipv4/ping_group_range')
    attach()
    out = ping(guest_ns, SERVER, "-s", str(size))
    assert "3 received" in out, out


def test_two_pings_at_once_keep_their_own_replies(guest_session: Attached, guest_ns: Netns) -> None:
    out = guest_ns.run("sh", "-c", f"ping -n -c5 -i0.01 -w30 {SERVER} & ping -n -c5 -i0.01 -w30 {SERVER}; wait").stdout
    assert out.count("5 received") == 2
    assert "DUP" not in out


def test_unreachable_is_said(host_ns: Netns, guest_session: Attached, guest_ns: Netns) -> None:
    out = guest_ns.run("ping", "-n", "-c1", "-w30", "203.0.113.1", check=False).stdout
    assert "Unreachable" in out, out
