"""Why was it dropped, refused, slow: the commands that say so, on sessions that carry traffic."""
from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, SERVER, Attached, Netns, run_env, sh

from pipeline import api
from pipeline.client import Client
from pipeline.dumps import Dump
from shm.cell import State

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("runtime")]


@pytest.fixture
def session(attach: Callable[..., Attached], tmp_path: Path) -> Attached:
    return attach("--session", "s", "--postmortem", str(tmp_path / "dumps"))


@pytest.fixture
def client(session: Attached, runtime: Path) -> Iterator[Client]:
    with Client(runtime / "s.sock") as made:
        yield made


def ringnet(*args: str, status: int = 0) -> str:
    done = sh(*RINGNET, *args, check=False, env=run_env())
    assert done.returncode == status and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def connect(guest_ns: Netns, address: tuple[str, int]) -> socket.socket:
    s = guest_ns.socket()
    s.connect(address)
    return s


def test_a_refused_connection_in_words(session: Attached, guest_ns: Netns, host_ns: Netns) -> None:
    with host_ns.socket() as bound:
        bound.bind((SERVER, 0))  # nobody listens
        port = bound.getsockname()[1]
        with guest_ns.socket() as s:
            with pytest.raises(ConnectionRefusedError):
                s.connect((SERVER, port))
            ours = s.getsockname()[1]
    end = time.monotonic() + DEADLINE
    while len(said := [line.split(None, 2)[1:] for line in ringnet("explain", f"{SERVER}:{port}").splitlines()]) < 4:
        assert time.monotonic() < end, said  # the RST is on its way before the end is written down
    about = f"tcp 10.0.2.2:{ours} > {SERVER}:{port}"
    flow = said[0][1].split("(flow ")[1].split(")")[0]
    assert said[:3] == [["egress", f"{about} (flow {flow}): opened"],
                        ["egress", f"{about}: not made: Connection refused"],
                        ["egress", f"{about} (flow {flow}): tcp_refused: Connects the host side refused (RST to the guest)"]]
    assert said[3][1].startswith(f"{about} (flow {flow}): ended after ")
    as_json = [json.loads(line) for line in ringnet("explain", flow, "--json").splitlines()]
    assert [e["kind"] for e in as_json] == ["open", "count", "end"]
    assert f"{flow}: no such flow now" in ringnet("explain", flow)


def test_a_drop_in_words_and_what_is_unknown(session: Attached, guest_ns: Netns) -> None:
    guest_ns.run("ping", "-c1", "-W1", "10.0.2.77", check=False)  # of the guest's subnet, and nobody's
    guest_ns.ip("neigh", "replace", "10.0.2.77", "lladdr", "02:ab:cd:00:00:01", "dev", "tap0")
    guest_ns.run("ping", "-c1", "-W5", "10.0.2.77", check=False)
    said = ringnet("explain", "drop_no_such_host")
    assert re.match(r"drop_no_such_host: To an address of the guest's subnet that nobody has; .* \(frames\); [12] in classify\n",
                    said), said
    assert "classify  icmp 10.0.2.2 > 10.0.2.77: drop_no_such_host: " in said
    assert "nothing was decided lately that fits" in ringnet("explain", "drop_ip_ttl", status=1)


def test_a_paused_stage_takes_what_it_is_told(session: Attached, client: Client, guest_ns: Netns, host_ns: Netns) -> None:
    def taken() -> int:
        return client.call(api.Statistics()).counters["classify"]["frames_in"]

    with host_ns.listen(SERVER) as listener, connect(guest_ns, listener.getsockname()) as guest, listener.accept()[0] as host:
        host.settimeout(DEADLINE)
        ringnet("ctl", "pause", "classify")
        assert {s.name: s.state for s in client.call(api.Stages()).stages}["classify"] == "paused"
        before = taken()
        guest.sendall(b"now")
        said = ringnet("ctl", "step", "classify", "1")
        assert "frames_in +1" in said
        assert taken() == before + 1
        ringnet("ctl", "resume", "classify")
        assert host.recv(10) == b"now"  # with what was sent again meanwhile, if the step's was another frame
        for stage in ("guest_tx", "egress", "services", "guest_rx"):
            ringnet("ctl", "pause", stage)
            ringnet("ctl", "resume", stage)
        guest.sendall(b"all")
        assert host.recv(10) == b"all"
    guest_ns.run("dig", f"@{GATEWAY}", "host.ringnet.internal")
    ringnet("ctl", "pause", "services")
    session.end()  # a stage that stands is drained like the others


def test_a_bad_wire_while_it_runs(session: Attached, client: Client, guest_ns: Netns) -> None:
    guest_ns.run("ping", "-c1", "-W30", GATEWAY)
    ringnet("ctl", "impair", "set", "up:drop=100%", "egress->guest_rx:delay=20ms")
    assert ringnet("ctl", "impair", "ls").split() == ["up:drop=100%", "egress->guest_rx:delay=20ms"]
    assert "0 received" in guest_ns.run("ping", "-c2", "-i0.2", "-W1", GATEWAY, check=False).stdout
    ringnet("ctl", "impair", "set", "up:dup=100%")
    assert "+1 duplicates" in guest_ns.run("ping", "-c2", "-i0.2", "-W30", GATEWAY).stdout
    os.kill({s.name: s.pid for s in client.call(api.Stages()).stages}["guest_tx"], signal.SIGKILL)
    client.call(api.Subscribe(events=["stage"]))
    next(e for e in client.events(DEADLINE) if (e.stage, e.state) == ("guest_tx", "running"))
    assert "+1 duplicates" in guest_ns.run("ping", "-c2", "-i0.2", "-W30", GATEWAY).stdout  # its successor has it too
    ringnet("ctl", "impair", "rm", "up")
    ringnet("ctl", "impair", "rm", "egress->guest_rx")
    assert "2 received, 0% packet loss" in guest_ns.run("ping", "-c2", "-i0.2", "-W30", GATEWAY).stdout
    counters = client.call(api.Statistics()).counters
    assert counters["guest_tx"]["impair_dropped"] >= 2 and counters["egress"]["impair_delayed"] >= 2
    assert "place: up; nothing is impaired" in ringnet("ctl", "impair", "rm", "up", status=1)


def test_latency_between_two_stages(session: Attached, guest_ns: Netns) -> None:
    guest_ns.run("ping", "-q", "-f", "-c", "400", GATEWAY)
    lines = {tuple(words[:2]): words[2:] for line in ringnet("ctl", "latency").splitlines()[2:] if (words := line.split())}
    for path in (("guest_tx", "classify"), ("guest_tx", "egress"), ("classify", "egress"), ("egress", "guest_rx")):
        assert int(lines[path][0]) >= 6
    assert ("guest_rx", "egress") not in lines
    assert "#" in ringnet("ctl", "latency", "guest_tx", "egress")


def test_latency_of_promoted_flows(session: Attached, guest_ns: Netns, host_ns: Netns, client: Client) -> None:
    """They pass no ring: from the link to the socket, and back."""
    def sampled() -> dict[tuple[str, str], int]:
        return {(p.source, p.target): sum(n for _, n in p.buckets) for p in client.call(api.Latency()).paths}

    with host_ns.listen(SERVER) as listener:
        with connect(guest_ns, listener.getsockname()) as guest, listener.accept()[0] as host:
            end = time.monotonic() + DEADLINE
            while not {("guest_tx", "guest_tx"), ("guest_rx", "guest_rx")} <= sampled().keys():
                assert time.monotonic() < end, sampled()
                for _ in range(64):
                    guest.sendall(b"ask")
                    assert host.recv(3) == b"ask"
                    host.sendall(b"say")
                    assert guest.recv(3) == b"say"
    said = ringnet("ctl", "latency", "guest_tx", "guest_tx")
    assert re.search(r"the guest's link +host socket \(promoted\) +\d+ ", said) and "#" in said


def test_what_a_killed_stage_left_is_read_after_the_session(session: Attached, client: Client, guest_ns: Netns,
                                                            host_ns: Netns, tmp_path: Path) -> None:
    with host_ns.listen(SERVER) as listener:
        there = listener.getsockname()
        with connect(guest_ns, there) as guest, listener.accept()[0]:
            guest.sendall(b"twelve bytes")
            while not any(f.up_bytes == 12 for f in client.call(api.FlowsList()).flows):
                assert session.process.poll() is None
            os.kill({s.name: s.pid for s in client.call(api.Stages()).stages}["egress"], signal.SIGKILL)
            assert session.wait() == 70
    assert f"ringnet postmortem {tmp_path}/dumps/ringnet-s-" in session.output()
    said = ringnet("postmortem", str(tmp_path / "dumps"))
    assert "reason: stage egress is gone: signal 9 (SIGKILL)" in said
    assert f"> {there[0]}:{there[1]} established, 12 bytes up, 0 bytes down" in said
    assert "opened" in ringnet("postmortem", str(tmp_path / "dumps"), f"{there[0]}:{there[1]}")
    with Dump(tmp_path / "dumps") as dump:
        assert not any(dump.flows.buffer()[16:32]), "the session's key is in the dump"
        assert dump.session.cell(dump.row("egress")).state is State.RUNNING
        assert (tmp_path / "dumps").stat().st_mode & 0o777 == 0o700


def test_sigquit_writes_a_dump_and_changes_nothing(session: Attached, guest_ns: Netns, tmp_path: Path) -> None:
    os.kill(session.pid, signal.SIGQUIT)
    guest_ns.run("ping", "-c1", "-W30", GATEWAY)  # it goes on
    ringnet("ctl", "dump", str(tmp_path / "asked"))
    assert "reason: SIGQUIT" in ringnet("postmortem", str(tmp_path / "dumps"))
    assert "reason: asked for" in ringnet("postmortem", str(tmp_path / "asked"))
