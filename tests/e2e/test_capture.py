"""`ringnet capture` on a session that carries traffic: what it writes is read by tshark, and nobody waits for it."""
from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, GUEST, RINGNET, Attached, Netns, Program, pseudorandom, run_env, sh, sha256_file

from pipeline import api
from pipeline.client import Client

pytestmark = pytest.mark.netns


@pytest.fixture
def session(attach: Callable[..., Attached], tmp_path: Path) -> Attached:
    return attach("--api-socket", str(tmp_path / "api"), "--session", f"c{os.getpid()}")


@pytest.fixture
def capture(session: Attached, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """capture(*arguments): start `ringnet capture`, return when the stages copy."""
    with contextlib.ExitStack() as stack:
        def start(*args: str) -> Program:
            r, w = os.pipe()
            log = tmp_path / f"capture-{len(os.listdir(tmp_path))}.log"
            argv = ["sh", "-c", f'exec "$@" 2>/dev/fd/{w} >/dev/null', "sh", *RINGNET, "capture", "--api-socket",
                    str(tmp_path / "api"), *args]
            program = stack.enter_context(Program(argv, log, pass_fds=(w,)))
            os.close(w)
            program.said = stack.enter_context(os.fdopen(r))
            line = program.said.readline()
            assert line.startswith("ringnet capture: capturing "), line
            return program

        yield start


def tshark(path: Path, *args: str) -> list[str]:
    done = sh("tshark", "-n", "-r", path, *args, env=run_env(HOME=str(path.parent)))
    return done.stdout.splitlines()


def counters(tmp_path: Path) -> dict[str, int]:
    """Of all stages, added up."""
    with Client(tmp_path / "api") as client:
        total: dict[str, int] = {}
        for stage in client.call(api.Statistics()).counters.values():
            for name, value in stage.items():
                total[name] = total.get(name, 0) + value
        return total


def test_everything_everywhere(capture: Callable[..., Program], guest_ns: Netns, nginx: tuple[str, int, Path],
                               tmp_path: Path) -> None:
    address, port, root = nginx
    (root / "body").write_bytes(os.urandom(300_000))
    file = tmp_path / "all.pcapng"
    running = capture("all", "-w", str(file))
    guest_ns.run("ping", "-n", "-c2", "-i0.01", "-w30", GATEWAY)
    guest_ns.run("dig", f"@{GATEWAY}", "+tries=1", "+time=30", "host.ringnet.internal")
    with guest_ns.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:  # type: ignore[attr-defined]
        s.bind(("tap0", 0))
        s.send(b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + bytes(46))  # IEEE 802 local experimental: nobody serves it
    guest_ns.run("curl", "-sS", "--fail", "-o", "/dev/null", f"http://{address}:{port}/body")  # behind it, in order
    assert running.end(signal.SIGINT) == 0
    said = running.said.read()
    frames = len(tshark(file))
    assert said == f"ringnet capture: {frames} frames captured\n" and frames > 50
    # Of a stream that is in the file once for each point tshark cannot put segments together; of one point it can.
    whole = ["-o", "tcp.desegment_tcp_streams:FALSE"]
    assert tshark(file, *whole, "-Y", "_ws.malformed || _ws.expert.group == malformed") == []
    by_interface = set(tshark(file, "-T", "fields", "-e", "frame.interface_name"))
    assert {"tap0", "guest_tx->classify", "classify->egress", "classify->services", "egress->guest_rx",
            "services->guest_rx"} <= by_interface
    dropped = tshark(file, "-Y", "frame.comment", "-T", "fields", "-e", "frame.interface_name", "-e", "frame.comment",
                     "-e", "eth.type")
    assert "guest_tx->classify\tdropped: unknown_ethertype (Neither IPv4 nor ARP)\t0x88b5" in dropped
    both_ways = tshark(file, "-Y", 'frame.interface_name == "tap0" && icmp', "-T", "fields", "-e",
                       "frame.packet_flags_direction", "-e", "icmp.type")
    assert [(int(way, 0), kind) for way, kind in map(str.split, both_ways)] == [(1, "8"), (2, "0")] * 2
    down = f'frame.interface_name == "tap0" && ip.src == {address} && tcp.len > 0'  # the link: a promoted flow is in no ring
    lengths = tshark(file, "-Y", down, "-T", "fields", "-e", "tcp.len")
    assert sum(map(int, lengths)) > 300_000  # whole frames: every byte of the body is in the file


def test_a_stage_that_is_not_there_joins_when_it_is(capture: Callable[..., Program], guest_ns: Netns, tmp_path: Path) -> None:
    """And one that dies meanwhile goes on."""
    file = tmp_path / "joins.pcapng"
    with Client(tmp_path / "api") as client:
        client.call(api.StageHold(stage="services"))
        with Client(tmp_path / "api") as news:
            news.call(api.Subscribe(events=["stage"]))

            def until(stage: str, state: str) -> None:
                for event in news.events(DEADLINE):
                    assert isinstance(event, api.StageChanged)
                    if (event.stage, event.state) == (stage, state):
                        return
                raise AssertionError(f"the session ended before {stage} was {state}")

            if any(s.name == "services" and s.state != "vacant" for s in client.call(api.Stages()).stages):
                until("services", "vacant")
            running = capture("services", "classify", "-w", str(file))
            assert running.said.readline() == "ringnet capture: not at work: services; frames there come when it is\n"
            client.call(api.StageRelease(stage="services"))
            until("services", "running")
            [victim] = [s.pid for s in client.call(api.Stages()).stages if s.name == "classify"]
            os.kill(victim, signal.SIGKILL)
            until("classify", "running")
    guest_ns.run("dig", f"@{GATEWAY}", "+tries=1", "+time=30", "host.ringnet.internal")
    assert running.end(signal.SIGINT) == 0
    asked = tshark(file, "-Y", "dns", "-T", "fields", "-e", "frame.interface_name")
    assert asked == ["guest_tx->classify", "classify->services"]


def test_only_what_is_asked_for(capture: Callable[..., Program], guest_ns: Netns, host_ns: Netns, tmp_path: Path) -> None:
    file = tmp_path / "port.pcapng"
    with host_ns.listen() as wanted, host_ns.listen() as other:
        port = wanted.getsockname()[1]
        running = capture("link", "--port", str(port), "--host", GUEST, "--snaplen", "60", "-w", str(file))
        for listener in (wanted, other):
            with guest_ns.socket() as s:
                s.connect((GATEWAY, listener.getsockname()[1]))
                s.sendall(bytes(5000))
                listener.settimeout(DEADLINE)
                with listener.accept()[0] as connection:
                    left = 5000
                    while left:
                        left -= len(connection.recv(left))
        guest_ns.run("ping", "-n", "-c1", "-w30", GATEWAY)
        assert running.end(signal.SIGINT) == 0
    assert tshark(file, "-Y", "_ws.malformed || _ws.expert.group == malformed") == []
    rows = [line.split("\t") for line in tshark(file, "-T", "fields", "-e", "tcp.srcport", "-e", "tcp.dstport", "-e",
                                                "frame.cap_len")]
    assert len(rows) >= 5
    assert all(str(port) in row[:2] and int(row[2]) <= 60 for row in rows)


def test_one_flow_into_a_pipe_live(session: Attached, guest_ns: Netns, host_ns: Netns, tmp_path: Path) -> None:
    with host_ns.listen() as listener, guest_ns.socket() as mine, guest_ns.socket() as other:
        pairs = []
        for s in (mine, other):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a frame each
            s.connect((GATEWAY, listener.getsockname()[1]))
            pairs.append(listener.accept()[0])
        with Client(tmp_path / "api") as client:
            flow = next(f.flow for f in client.call(api.FlowsList()).flows if f.guest_port == mine.getsockname()[1])
        argv = [*RINGNET, "capture", "--api-socket", str(tmp_path / "api"), "--flow", flow, "-c", "6", "-w", "-"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False, env=run_env()) as program:
            assert b"capturing" in program.stderr.readline()
            for n in range(6):
                for s in (mine, other):
                    s.sendall(b"%d" % n)
            done = subprocess.run(["tshark", "-n", "-r", "-", "-T", "fields", "-e", "tcp.port"], stdin=program.stdout,
                                  capture_output=True, text=True, timeout=DEADLINE, env=run_env(HOME=str(tmp_path)))
            assert program.wait(DEADLINE) == 0
        for connection in pairs:
            connection.close()
        ports = done.stdout.splitlines()
        assert len(ports) == 6 and all(str(mine.getsockname()[1]) in p.split(",") for p in ports), done


def test_a_stopped_reader_holds_up_nothing(capture: Callable[..., Program], guest_ns: Netns, nginx: tuple[str, int, Path],
                                           tmp_path: Path) -> None:
    """Like one whose disk has stopped: 64 MiB through a 1 MiB mirror nobody reads, and every byte arrives."""
    address, port, root = nginx
    want = pseudorandom(root / "body", 64 << 20, b"stopped")
    file = tmp_path / "slow.pcapng"
    running = capture("all", "--buffer", "1", "-w", str(file))
    os.kill(running.pid, signal.SIGSTOP)
    got = tmp_path / "got"
    guest_ns.run("curl", "-sS", "--fail", "-o", got, f"http://{address}:{port}/body")
    assert sha256_file(got) == want
    seen = counters(tmp_path)
    assert seen["capture_dropped"] > 500
    assert not {n: v for n, v in seen.items() if n.startswith("drop_") and n != "drop_ipv6"}
    os.kill(running.pid, signal.SIGCONT)
    assert running.end(signal.SIGINT) == 0
    said = running.said.read()
    assert "copies were not made because this reader was behind" in said
    assert tshark(file, "-Y", "_ws.malformed") == [] and len(tshark(file)) > 10
    (root / "body").unlink()


def test_a_killed_reader_ends_its_capture(capture: Callable[..., Program], tmp_path: Path) -> None:
    """More often than a stage has places for captures."""
    for _ in range(6):
        running = capture("all", "-w", str(tmp_path / "x.pcapng"))
        os.kill(running.pid, signal.SIGKILL)
        running.wait()


def test_it_ends_with_the_session(session: Attached, capture: Callable[..., Program], tmp_path: Path) -> None:
    running = capture("link", "-w", str(tmp_path / "x.pcapng"))
    assert session.end() == 0
    assert running.wait() == 0 and "the session ended" in running.said.read()


@pytest.mark.parametrize(("args", "status", "said"), [
    (["nowhere"], 2, "points: nowhere: no such point"),
    (["--host", "example"], 2, "host: example: not an IP address"),
    (["--flow", "9.9"], 1, "flow: there is no flow 9.9"),
    (["--port", "70000"], 2, "--port 70000: not within 0..65535"),
    (["--files", "2"], 2, "--files: say with --file-size when a new one begins"),
])
def test_bad_requests(session: Attached, tmp_path: Path, args: list[str], status: int, said: str) -> None:
    done = sh(*RINGNET, "capture", "--api-socket", tmp_path / "api", *args, "-w", tmp_path / "x", check=False)
    assert done.returncode == status and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_that_cannot_be_written(session: Attached, tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "x", Path("/dev/full")):
        done = sh(*RINGNET, "capture", "--api-socket", tmp_path / "api", "-w", path, "-q", check=False)
        assert done.returncode == 1 and f"{path}: " in done.stderr
