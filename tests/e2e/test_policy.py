"""--policy, --no-metadata and --no-host-loopback with real programs: what is denied fails at once, the rest is as before,
and `ringnet ctl` shows it."""
from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, GUEST, RINGNET, SERVER, Attached, Netns, connect_error, run_env, sh

from pipeline import api
from pipeline.client import Client

pytestmark = pytest.mark.netns

METADATA = "169.254.169.254"


def curl(guest: Netns, url: str) -> int:
    return guest.run("curl", "-sS", "-o", "/dev/null", "--max-time", str(DEADLINE), url, check=False).returncode


def test_programs_in_the_guest(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns, nginx,
                               tmp_path: Path) -> None:
    address, port, root = nginx
    (root / "page").write_text("page\n")
    path = str(tmp_path / "api.sock")
    rule = f"deny out tcp {SERVER} port 22"
    session = attach("--policy", rule, "--policy", "deny out udp,icmp 198.51.100.0/24", "--policy",
                     "deny in tcp 127.0.0.1", "--no-metadata", "-t", "8080", "--api-socket", path)
    assert curl(guest_ns, f"http://{address}:{port}/page") == 0
    with Client(path) as client:
        client.call(api.Subscribe(events=["flow-refused"]))
        assert curl(guest_ns, f"http://{SERVER}:22/") == 7  # could not connect: at once, not after a timeout
        assert guest_ns.run("ping", "-c1", "-W30", SERVER, check=False).stdout.count("Packet filtered") == 1
        with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
            s.connect((SERVER, 9))
            s.send(b"x")
            with pytest.raises(OSError, match="No route to host"):
                s.recv(1)
        with host_ns.socket() as s:
            with pytest.raises(ConnectionResetError):  # by the connect already, if the reset was that quick
                s.connect(("127.0.0.1", 8080))
                s.recv(1)
        events = client.events(timeout=DEADLINE)
        seen = [(e.proto, e.guest, e.peer, e.rule) for e in (next(events) for _ in range(4))]
        assert seen == [("tcp", GUEST, SERVER, rule), ("icmp", GUEST, SERVER, "deny out udp,icmp 198.51.100.0/24"),
                        ("udp", GUEST, SERVER, "deny out udp,icmp 198.51.100.0/24"),
                        ("tcp", GUEST, "127.0.0.1", "deny in tcp 127.0.0.1")]
    with host_ns.socket() as s:  # another client: the guest is asked, and refuses by itself
        s.bind((SERVER, 0))
        with pytest.raises(ConnectionResetError):
            s.connect((SERVER, 8080))
            s.recv(1)
    said = json.loads(sh(*RINGNET, "ctl", "--api-socket", path, "policy", "ls", "--json", env=run_env()).stdout)
    assert [r["rule"] for r in said["rules"]] == ["--no-metadata", rule, "deny out udp,icmp 198.51.100.0/24",
                                                  "deny in tcp 127.0.0.1"]
    assert (said["denied_out"], said["denied_in"]) == (3, 1)
    assert "denied: 3 out, 1 in" in sh(*RINGNET, "ctl", "--api-socket", path, "policy", "ls", env=run_env()).stdout
    assert session.process.poll() is None


@pytest.mark.parametrize("blocked", [False, True])
def test_the_metadata_service(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns, blocked: bool) -> None:
    """As a cloud has it: an address of no interface but the host's side. Reached, or not, by the switch alone."""
    host_ns.ip("addr", "add", f"{METADATA}/32", "dev", "lo")
    attach(*(["--no-metadata"] if blocked else []))
    with host_ns.listen(METADATA) as service, guest_ns.socket() as s:
        code = connect_error(s, service.getsockname())
        assert code == (111 if blocked else 0)


def test_the_hosts_loopback(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns) -> None:
    attach("--no-host-loopback")
    with host_ns.listen("127.0.0.1") as service, guest_ns.socket() as s:
        assert connect_error(s, (GATEWAY, service.getsockname()[1])) == 111


def test_a_bad_rule_is_an_error_of_the_command_line() -> None:
    done = sh(*RINGNET, "run", "--policy", "deny out example.org", "--", "true", check=False, env=run_env())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "--policy deny out example.org: example.org: expected a network like 10.0.0.0/8, an address or any")
