"""A guest's program that sends many datagrams with one call (UDP_SEGMENT, udp(7)), as QUIC and DNS servers do.

Its kernel hands them over as one frame where the tap was asked for that (Linux 6.2), and as many where it was not: what
arrives is the same.
"""
from __future__ import annotations

import errno
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, SERVER, Attached, Netns, run_env, sh

from e2e.test_nic2 import HOST, Nic2, address, second

__all__ = ["second"]  # a fixture
pytestmark = pytest.mark.netns
UDP_SEGMENT = 103  # linux/udp.h
ONE_FRAME = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 2)  # TUN_F_USO4
PROGRAM = """
import random, socket, struct, sys
to, seed, df = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, 10, 2 if df else 0)  # IP_MTU_DISCOVER: DO, DONT
s.settimeout(20)
for size, n in eval(sys.argv[5]):
    data = rng.randbytes(size * (n - 1) + rng.randint(1, size))
    s.setsockopt(17, 103, size)  # SOL_UDP, UDP_SEGMENT
    s.sendto(data, to)
    assert s.recv(10) == b"next"  # so that nothing is lost for want of room at the receiver
print(s.getsockname()[1])
"""


def expected(seed: int, trains: list[tuple[int, int]]) -> list[list[bytes]]:
    rng = random.Random(seed)
    found = []
    for size, n in trains:
        data = rng.randbytes(size * (n - 1) + rng.randint(1, size))
        found.append([data[at:at + size] for at in range(0, len(data), size)])
    return found


def run(guest: Netns, server: socket.socket, to: str, trains: list[tuple[int, int]], *, df: bool = False) -> int:
    """Send them, and check each datagram; how many there were."""
    seed, n = random.randrange(1 << 30), 0
    with subprocess.Popen(guest.argv(sys.executable, "-c", PROGRAM, to, str(server.getsockname()[1]), str(seed), str(int(df)),
                                     repr(trains)), env=run_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            for want in expected(seed, trains):
                for datagram in want:
                    data, peer = server.recvfrom(70000)
                    assert data == datagram, f"seed {seed}: datagram {n}"
                    n += 1
                server.sendto(b"next", peer)
        except TimeoutError:
            p.kill()
            raise AssertionError(f"seed {seed}: datagram {n} did not come: {p.communicate()}") from None
        out, err = p.communicate(timeout=DEADLINE)
        assert p.returncode == 0, err
    return n


def counters(session: Attached, stage: str) -> dict[str, int]:
    return json.loads(sh(*RINGNET, "ctl", "-s", session.guest.name, "statistics", "--json", env=run_env()).stdout)["counters"][stage]


TRAINS = [(1472, 44), (1472, 2), (1, 64), (1000, 10), (512, 64), (1200, 3), (700, 30), (1472, 44)]


@pytest.mark.parametrize("promote", [0, 8], ids=["egress", "promoted"])
@pytest.mark.parametrize("to", [GATEWAY, SERVER], ids=["gateway", "server"])
def test_every_datagram_arrives(attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, promote: int, to: str) -> None:
    session = attach("--session", guest_ns.name, "--promote", str(promote), mtu=1500)
    with host_ns.socket(kind=socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind(("127.0.0.1" if to == GATEWAY else to, 0))
        before = counters(session, "guest_tx")["frames_in"]
        n = run(guest_ns, server, to, TRAINS)
        assert n == sum(k for _, k in TRAINS)
        frames = counters(session, "guest_tx")["frames_in"] - before
        if ONE_FRAME:
            assert frames < n // 4, f"{n} datagrams came as {frames} frames"
        assert ("udp_fast_up" in counters(session, "guest_tx")) == bool(promote)


def test_a_way_with_a_smaller_mtu(attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns) -> None:
    """The host's kernel refuses such a train. Without DF each datagram is fragmented by it; with DF the guest is told the MTU."""
    attach(mtu=4000)
    host_ns.ip("link", "set", "lo", "mtu", "1300")
    with host_ns.socket(kind=socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind((SERVER, 0))
        assert run(guest_ns, server, SERVER, [(3000, 5), (1272, 20), (3900, 10)] * 3) == 3 * 35
        with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
            s.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
            s.connect(server.getsockname())
            s.sendmsg([bytes(9000)], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", 3000))])
            with pytest.raises(OSError) as e:
                s.recv(10)
            assert e.value.errno == errno.EMSGSIZE
            assert s.getsockopt(socket.IPPROTO_IP, 14) == 1300  # IP_MTU


def test_impairment_is_of_datagrams(attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns) -> None:
    """A bad wire loses datagrams, not trains: the guest's kernel is not asked for those then."""
    session = attach("--session", guest_ns.name, "--impair", "up:dup=100%", mtu=1500)
    with host_ns.socket(kind=socket.SOCK_DGRAM) as server, guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        server.bind((SERVER, 0))
        before = counters(session, "guest_tx")["frames_in"]
        s.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
        s.sendto(b"".join(b"%099d\n" % n for n in range(20)), server.getsockname())
        assert sorted(int(server.recv(200)) for _ in range(40)) == sorted([*range(20), *range(20)])
        end = time.monotonic() + DEADLINE  # a stage shows its counters a turn late
        while counters(session, "guest_tx")["frames_in"] - before < 20:
            assert time.monotonic() < end, "they came as one frame"


def test_trains_through_the_second_nic(second: Callable[..., Nic2], host_ns: Netns) -> None:  # noqa: F811
    """Whole from tap to tap, both ways."""
    session = second("host", mtu=1500)
    guest = session.guest
    with host_ns.socket(kind=socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind((HOST, 0))
        before = session.counters("vmnet")
        n = run(guest, server, HOST, TRAINS)
        up = session.counters("vmnet")["vmnet_up_frames"] - before["vmnet_up_frames"]
        if ONE_FRAME:
            assert up < n // 4, f"{n} datagrams passed as {up} frames"
    with guest.socket(kind=socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind((address(guest), 0))
        before = session.counters("vmnet")
        n = run(host_ns, server, address(guest), TRAINS)
        down = session.counters("vmnet")["vmnet_down_frames"] - before["vmnet_down_frames"]
        if ONE_FRAME:
            assert down < n // 4, f"{n} datagrams passed as {down} frames"
