"""`ringnet run`: a command gets a whole network, as root and as a user without rights."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import GATEWAY, GUEST, HOST_NAME, RINGNET, Netns, PlainUser, Program, run_env, serving, sh

from pipeline.topology import TOPOLOGY, Feature

pytestmark = pytest.mark.netns

PAGE = "a page from the host side\n"


def answer_http(connection: socket.socket) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(4096)
    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PAGE)}\r\nConnection: close\r\n\r\n{PAGE}".encode())


@pytest.fixture
def port(host_ns: Netns) -> Iterator[int]:
    with serving(host_ns.listen("127.0.0.1"), answer_http) as (_, port):
        yield port


@pytest.fixture(params=["root", "plain user"])
def ringnet(request: pytest.FixtureRequest, host_ns: Netns) -> object:
    """ringnet(*args): its command line, on the host side, as each of the users."""
    if request.param == "root":
        return lambda *args: host_ns.argv(*RINGNET, *args)
    user: PlainUser = request.getfixturevalue("plain_user")
    return lambda *args: host_ns.argv(*user.ringnet(*args))


def test_the_command_finds_a_network(ringnet, port: int) -> None:
    script = f"ip -4 addr; cat /etc/resolv.conf; dig +short {HOST_NAME}; curl -sf http://{HOST_NAME}:{port}/"
    out = sh(*ringnet("run", "--", "sh", "-c", script), env=run_env()).stdout
    assert f"inet {GUEST}/24" in out
    assert f"nameserver {GATEWAY}" in out.splitlines()
    assert GATEWAY in out.splitlines()  # dig's answer
    assert out.endswith(PAGE)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 128 + 9)])
def test_ends_with_the_commands_status(ringnet, script: str, status: int) -> None:
    assert sh(*ringnet("run", "-q", "--", "sh", "-c", script), check=False, env=run_env()).returncode == status


def test_a_command_that_does_not_exist(ringnet) -> None:
    done = sh(*ringnet("run", "--", "no-such-command-here"), check=False, env=run_env())
    assert done.returncode == 127
    assert "no-such-command-here" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_command_it_runs_the_shell(host_ns: Netns) -> None:
    done = sh(*host_ns.argv(*RINGNET, "run"), input="ip -4 addr show\nexit 3\n", check=False,
              env=run_env(SHELL="/bin/sh"))
    assert done.returncode == 3, done.stderr
    assert f"inet {GUEST}/24" in done.stdout


def test_the_commands_input_and_output_are_the_callers(ringnet) -> None:
    text = "".join(f"line {n}\n" for n in range(50_000))  # more than a pipe holds
    assert sh(*ringnet("run", "--", "cat"), input=text, env=run_env()).stdout == text


def test_ps_shows_one_process_a_stage_by_name(host_ns: Netns, tmp_path: Path) -> None:
    r, w = os.pipe()
    with Program(host_ns.argv(*RINGNET, "run", "--", "sh", "-c", f"echo here >/dev/fd/{w}; exec sleep 1000"),
                 tmp_path / "run.log", pass_fds=(w,)) as session:
        os.close(w)
        session.wait_word(r, "the command did not start")
        os.close(r)
        out = sh("ps", "-ww", "-o", "comm=,args=", "--ppid", str(session.pid)).stdout
    lines = [line.split() for line in out.splitlines() if " stage " in line]
    names = sorted(s.name for s in TOPOLOGY.only(frozenset({Feature.NIC1})).stages)
    assert sorted(words[words.index("stage") + 1] for words in lines) == names
    assert sorted(words[0] for words in lines) == [f"rn-{name}" for name in names]


def test_a_locked_tun_device_names_the_fix(plain_user: PlainUser, host_ns: Netns) -> None:
    argv = plain_user.ringnet("run", "--", "true", before="chmod 0600 /dev/net/tun")
    done = sh(*host_ns.argv(*argv), check=False, env=run_env())
    assert done.returncode == 1
    assert "/dev/net/tun" in done.stderr and "chmod" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_gateway_is_not_the_hosts_loopback_if_told_so(host_ns: Netns, port: int) -> None:
    script = f"curl -sS --max-time 20 http://{HOST_NAME}:{port}/"
    done = sh(*host_ns.argv(*RINGNET, "run", "--no-host-loopback", "--", "sh", "-c", script), check=False,
              env=run_env())
    assert done.returncode == 7, done  # curl: could not connect, and not its timeout (28)


def test_hosts_and_search_options(host_ns: Netns) -> None:
    script = "cat /etc/resolv.conf; dig +short db.internal; dig +short -x 192.0.2.77"
    out = sh(*host_ns.argv(*RINGNET, "run", "--hosts", "db.internal=192.0.2.77", "-S", "corp.example", "--", "sh", "-c",
                           script), env=run_env()).stdout
    assert "192.0.2.77" in out.splitlines()
    assert "db.internal." in out.splitlines()
    assert any(line.split()[:1] == ["search"] and "corp.example" in line.split() for line in out.splitlines())


def test_own_addresses(host_ns: Netns, port: int) -> None:
    script = f"curl -sf http://{HOST_NAME}:{port}/; ip -4 addr; ip route; ip neigh; ip link"
    out = sh(*host_ns.argv(*RINGNET, "run", "-a", "172.20.5.9", "-n", "20", "-g", "172.20.0.1", "--mac",
                           "02:00:00:00:00:99", "-m", "1500", "--", "sh", "-c", script), env=run_env()).stdout
    assert "inet 172.20.5.9/20" in out
    assert "default via 172.20.0.1" in out
    assert "mtu 1500" in out
    assert "02:00:00:00:00:99" in out.lower()
    assert out.startswith(PAGE)
