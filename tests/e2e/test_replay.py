"""A recorded session, replayed: each stage makes the same bytes of it every time, and egress finds its servers again."""
from __future__ import annotations

import hashlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, SERVER, Attached, Netns, pseudorandom, run_env, sha256_file

from pipeline import pcapng
from pipeline.pcapng import TO_GUEST
from pipeline.replay import Tcp

pytestmark = [pytest.mark.netns, pytest.mark.timeout(3600)]

RUNS = 100 if os.environ.get("RINGNET_LONG") else 10
STAGES = ["guest_tx", "classify", "egress", "services", "guest_rx", "vmnet"]


@pytest.fixture
def recorded(attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path
             ) -> Path:
    """Names, pings, a page, an upload, a refused connection and a UDP exchange, over a wire that loses frames."""
    path, (address, port, root) = tmp_path / "in.pcapng", nginx
    session = attach("-p", str(path), "--impair", "down:drop=3%,seed=5", "--impair", "up:drop=3%,seed=5", mtu=1500)
    want = pseudorandom(root / "body", 120_000, b"d")
    (tmp_path / "source").write_bytes((root / "body").read_bytes()[:60_000])
    guest_ns.run("dig", f"@{GATEWAY}", "+time=5", "+tries=5", "host.ringnet.internal")
    guest_ns.run("ping", "-c3", "-i0.2", GATEWAY, check=False)
    guest_ns.run("curl", "-sS", "--fail", "-o", tmp_path / "got", f"http://{address}:{port}/body")
    guest_ns.run("curl", "-sS", "--fail", "-T", tmp_path / "source", f"http://{address}:{port}/arrived")
    guest_ns.run("curl", "-sS", f"http://{address}:1/", check=False)
    with host_ns.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, guest_ns.socket(kind=socket.SOCK_DGRAM) as client:
        server.bind((SERVER, 0))
        asked, end = 0, time.monotonic() + DEADLINE
        while asked < 15:  # some are lost, and nothing tells which: another follows
            assert time.monotonic() < end
            client.sendto(b"ask%d" % asked, server.getsockname())
            while select.select([server], [], [], 0.02)[0]:
                question, who = server.recvfrom(100)
                server.sendto(question.upper(), who)
                asked += 1
    session.end()
    assert sha256_file(tmp_path / "got") == want
    return path


def replays(stage: str, source: Path, out: Path) -> str:
    subprocess.run([sys.executable, "-P", "-m", "pipeline", "stage", stage, "--replay", str(source), "--out", str(out),
                    "--seed", "3", "--set", str(source.with_name("options.toml"))], env=run_env(), check=True,
                   capture_output=True, timeout=DEADLINE)
    return sha256_file(out)


def test_byte_for_byte_the_same_each_time(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text("mtu = 1500\n")
    for stage in STAGES:
        runs = RUNS if stage == "egress" or RUNS > 10 else 2
        outs = {replays(stage, recorded, tmp_path / f"{stage}.{n % 2}") for n in range(runs)}
        assert len(outs) == 1, stage
    made = pcapng.read(tmp_path / "egress.0")
    assert len(made) > 50  # how the kernel cut the stream while it was recorded says how many
    # What the page was, it is again: the longest stream to the guest holds its bytes, in order.
    streams: dict[tuple[int, int], dict[int, bytes]] = {}
    for p in made:
        if (t := Tcp.of(p.frame)) is not None and (payload := p.frame[t.l4 + t.hlen:t.end]):
            pieces = streams.setdefault((t.sport, t.dport), {})
            pieces[t.seq] = max(payload, pieces.get(t.seq, b""), key=len)
    body = max((whole(pieces) for pieces in streams.values()), key=len)
    want = (tmp_path / "got").read_bytes()
    assert hashlib.sha256(body[-len(want):]).digest() == hashlib.sha256(want).digest()
    assert all(p.direction == TO_GUEST for p in made)


def whole(pieces: dict[int, bytes]) -> bytes:
    """A stream out of its segments, repeats and all (it does not wrap here: it would show as a hole)."""
    data, at = b"", min(pieces)
    for seq in sorted(pieces):
        assert seq <= at, "a hole"
        data += pieces[seq][at - seq:] if at - seq < len(pieces[seq]) else b""
        at = max(at, seq + len(pieces[seq]))
    return data
