"""A session as a service: told to systemd, scraped by Prometheus, logged as JSON lines."""
from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, Attached, Netns, run_env, sh

from pipeline import api
from pipeline.client import Client

pytestmark = pytest.mark.netns


def test_a_manager_is_told(attach: Callable[..., Attached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        session = attach()
        first = manager.recv(4096).decode().splitlines()
        assert first[0] == "READY=1" and first[1].startswith("MAINPID=") and "stages, " in first[2]
        while "WATCHDOG=1" not in manager.recv(4096).decode().splitlines():
            pass
        assert session.end() == 0
        while (said := manager.recv(4096)) != b"STOPPING=1\nSTATUS=ending":
            assert b"READY" not in said


def test_the_guests_command_is_not_the_service(host_ns: Netns, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        done = sh(*host_ns.argv(*RINGNET, "run", "--", "env"), env=run_env(NOTIFY_SOCKET=str(tmp_path / "n")))
        assert "NOTIFY_SOCKET" not in done.stdout and "PATH=" in done.stdout
        manager.setblocking(False)
        assert manager.recv(4096).startswith(b"READY=1")


def test_metrics_at_a_port_and_at_a_unix_socket(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                                tmp_path: Path) -> None:
    attach("--metrics", "9464", "--session", "m")
    guest_ns.run("ping", "-n", "-c3", "-i0.01", "-w30", GATEWAY)
    echoes, end = 0.0, time.monotonic() + DEADLINE
    while echoes != 3:  # a stage publishes its counters before it sleeps, which may be after the last reply came
        assert echoes < 3 and time.monotonic() < end
        text = host_ns.run("curl", "-sS", "--fail", "http://127.0.0.1:9464/metrics").stdout
        values = dict(re.findall(r"^(ringnet_\w+\{[^}]*\}) ([\d.]+)$", text, re.M))
        echoes = float(values['ringnet_icmp_echo_local_total{session="m",stage="egress"}'])
    for stage in ("guest_tx", "classify", "egress", "services", "guest_rx"):
        assert values[f'ringnet_stage_up{{session="m",stage="{stage}"}}'] == "1"
    assert float(values['ringnet_uptime_seconds{session="m"}']) > 0


def test_metrics_at_a_unix_socket(attach: Callable[..., Attached], tmp_path: Path) -> None:
    session = attach("--metrics", f"unix:{tmp_path}/metrics")
    text = sh("curl", "-sS", "--fail", "--unix-socket", tmp_path / "metrics", "http://localhost/metrics").stdout
    assert "ringnet_flows_max" in text
    assert session.end() == 0 and not (tmp_path / "metrics").exists()


def test_logs_are_json_lines_of_all_processes(attach: Callable[..., Attached], tmp_path: Path) -> None:
    session = attach("--log-format", "json", "--log-level", "info", "--session", "j", "--api-socket", str(tmp_path / "api"))
    with Client(tmp_path / "api") as client:
        client.call(api.Log(level="debug", stage="services"))
        with pytest.raises(api.ApiError, match="stage: nobody: no such stage"):
            client.call(api.Log(level="debug", stage="nobody"))
    assert session.end() == 0
    lines = [json.loads(line) for line in session.output().splitlines()]
    assert {line["session"] for line in lines} == {"j"} and {line["stage"] for line in lines} >= {"supervisor"}
    assert all(line["level"] in ("error", "warning", "info", "debug") and line["text"] for line in lines)
    assert any(line["text"] == "egress: Running" for line in lines)
    assert {line["pid"] for line in lines if line["stage"] == "supervisor"} == {lines[0]["pid"]} != {os.getpid()}
