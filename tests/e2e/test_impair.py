"""A guest on a bad wire: the kernel's own TCP gets its bytes through ringnet, whatever the link does to them."""
from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import GATEWAY, RINGNET, Attached, Netns, pseudorandom, run_env, sh, sha256_file
from scapy.utils import RawPcapNgReader

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

SIZE = 3 << 20
WIRES = {
    "loss": "drop=1%",
    "mess": "drop=1%,reorder=1%/3,dup=1%,corrupt=1%",
    "bursts": "burst=0.3%/40%,truncate=0.5%",
    "late": "delay=3ms~2ms,reorder=2%/4,drop=0.5%",
    "stalls": "stall=50ms/200ms,drop=0.5%",
    "all": "drop=2%,reorder=2%/3,dup=2%,corrupt=1%,truncate=1%,burst=0.2%/40%,delay=1ms~1ms",
}


def both_ways(attach: Callable[..., Attached], guest_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path,
              *options: str) -> Attached:
    """SIZE bytes down and SIZE bytes up at the same time arrive as they were sent."""
    session = attach(*options, mtu=1500)
    address, port, root = nginx
    want_down, want_up = pseudorandom(root / "body", SIZE, b"d"), pseudorandom(tmp_path / "source", SIZE, b"u")
    url = f"http://{address}:{port}"
    with subprocess.Popen(guest_ns.argv("curl", "-sS", "--fail", "--max-time", "200", "-T", str(tmp_path / "source"),
                                        f"{url}/arrived"), env=run_env()) as up:
        guest_ns.run("curl", "-sS", "--fail", "--max-time", "200", "-o", tmp_path / "got", f"{url}/body", timeout=220)
    assert up.returncode == 0, session.output()
    assert sha256_file(tmp_path / "got") == want_down
    assert sha256_file(root / "arrived") == want_up
    return session


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("wire", WIRES)
def test_what_arrives_is_what_was_sent(attach: Callable[..., Attached], guest_ns: Netns, nginx: tuple[str, int, Path],
                                       tmp_path: Path, wire: str, seed: int) -> None:
    both_ways(attach, guest_ns, nginx, tmp_path, "--impair", f"up:{WIRES[wire]},seed={seed}",
              "--impair", f"down:{WIRES[wire]},seed={seed}")


@pytest.mark.parametrize(("word", "largest"), [("", range(1514, 1515)), (",super", range(1515, 65550))])
def test_frames_are_of_the_mtu_unless_super(attach: Callable[..., Attached], guest_ns: Netns, tmp_path: Path,
                                            nginx: tuple[str, int, Path], word: str, largest: range) -> None:
    """Without it no drop costs 64 KiB at once: segments are cut before the bad wire; with it they come whole."""
    capture = tmp_path / "wire.pcapng"
    both_ways(attach, guest_ns, nginx, tmp_path, "--pcap", str(capture),
              *(w for d in ("up", "down") for w in ("--impair", f"{d}:drop=0.5%,dup=0.5%,reorder=0.5%{word}")))
    with RawPcapNgReader(str(capture)) as packets:
        up, down = [], []
        for data, _ in packets:
            (down if data[6:12] == bytes.fromhex("02abcd000001") else up).append(len(data))
    assert max(up) in largest and max(down) in largest


@pytest.mark.parametrize("rings", [
    ("guest_tx->classify", "egress->guest_rx"),
    ("classify->egress", "classify->guest_rx", "services->guest_rx", "classify->services")])
def test_on_the_rings(attach: Callable[..., Attached], guest_ns: Netns, nginx: tuple[str, int, Path], tmp_path: Path,
                      rings: tuple[str, ...]) -> None:
    words = [w for ring in rings for w in ("--impair", f"{ring}:drop=1%,dup=1%,reorder=1%,delay=1ms~1ms")]
    both_ways(attach, guest_ns, nginx, tmp_path, *words)


def test_every_ping_twice(attach: Callable[..., Attached], guest_ns: Netns) -> None:
    attach("--impair", "up:dup=100%")
    out = guest_ns.run("ping", "-c", "20", "-i", "0.01", GATEWAY).stdout
    assert re.search(r"20 received, \+(19|20) duplicates, 0% packet loss", out), out  # ping leaves at the 20th reply


@pytest.mark.parametrize("argv", [["run", "--impair", "up:drop=7", "--", "true"],
                                  ["attach", "1", "--impair", "up:drop=7"]])
def test_wrong_words_are_a_usage_error(argv: list[str]) -> None:
    done = sh(*RINGNET, *argv, check=False, env=run_env())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"ringnet {argv[0]}: --impair up:drop=7: drop=7: expected a share of the frames, like 0.5%"
                           " or 0.005\n")


def test_from_a_file(attach: Callable[..., Attached], guest_ns: Netns, tmp_path: Path) -> None:
    config = tmp_path / "ringnet.toml"
    config.write_text('impair = ["egress->guest_rx:dup=100%"]\n')
    attach("--config", str(config))
    out = guest_ns.run("ping", "-c", "5", "-i", "0.01", GATEWAY).stdout
    assert re.search(r"5 received, \+[45] duplicates, 0% packet loss", out), out
