"""1 GiB up and 1 GiB down by curl against nginx arrive byte for byte."""
from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import Attached, Netns, pseudorandom, run_env, sha256_file

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]

SIZE = 1 << 30


@pytest.mark.xdist_group("bulk")  # one at a time: each wants a processor and 1 GiB of disk
def test_one_gib_down(guest_session: Attached, guest_ns: Netns, nginx: tuple[str, int, Path]) -> None:
    address, port, root = nginx
    body = root / "body"
    try:
        want = pseudorandom(body, SIZE, b"down")
        got, size = hashlib.sha256(), 0
        with subprocess.Popen(guest_ns.argv("curl", "-sS", "--fail", "--max-time", "600", f"http://{address}:{port}/body"),
                              stdout=subprocess.PIPE, env=run_env()) as curl:
            while piece := curl.stdout.read(1 << 20):
                got.update(piece)
                size += len(piece)
        assert (curl.returncode, size, got.hexdigest()) == (0, SIZE, want)
    finally:
        body.unlink(missing_ok=True)


@pytest.mark.xdist_group("bulk")
def test_one_gib_up(guest_session: Attached, guest_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path) -> None:
    address, port, root = nginx
    source, arrived = tmp_path / "source", root / "arrived"
    try:
        want = pseudorandom(source, SIZE, b"up")
        out = guest_ns.run("curl", "-sS", "--fail", "--max-time", "600", "-w", "%{http_code} %{size_upload}",
                           "-T", source, f"http://{address}:{port}/arrived", timeout=700).stdout
        assert out == f"201 {SIZE}"
        assert (arrived.stat().st_size, sha256_file(arrived)) == (SIZE, want)
    finally:
        source.unlink(missing_ok=True)
        arrived.unlink(missing_ok=True)


@pytest.mark.xdist_group("bulk")
@pytest.mark.parametrize(("mtu", "peek", "promote"), [(576, "auto", 8), (1500, "offset", 8), (1500, "discard", 8), (1500, "auto", 0),
                                                      (1500, "auto", 1), (4000, "discard", 8), (65520, "auto", 0),
                                                      (65520, "auto", 8)])
def test_both_ways_at_once(attach: Callable[..., Attached], guest_ns: Netns, nginx: tuple[str, int, Path],
                           tmp_path: Path, mtu: int, peek: str, promote: int) -> None:
    """At other MTUs, by both ways of reading again what the guest has not acknowledged, through egress alone and promoted."""
    if peek == "offset" and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9):
        pytest.skip("SO_PEEK_OFF on TCP needs Linux 6.9")
    attach("--peek", peek, "--promote", str(promote), mtu=mtu)
    address, port, root = nginx
    size = 32 << 20
    want_down, want_up = pseudorandom(root / "body", size, b"d"), pseudorandom(tmp_path / "source", size, b"u")
    url = f"http://{address}:{port}"
    with subprocess.Popen(guest_ns.argv("curl", "-sS", "--fail", "--max-time", "300", "-T", str(tmp_path / "source"),
                                        f"{url}/arrived"), env=run_env()) as up:
        guest_ns.run("curl", "-sS", "--fail", "--max-time", "300", "-o", tmp_path / "got", f"{url}/body", timeout=320)
    assert up.returncode == 0
    assert sha256_file(tmp_path / "got") == want_down
    assert sha256_file(root / "arrived") == want_up
