"""`ringnet attach`: what a container engine asks of it (ready, exit and pid files, configuration by flag)."""
from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import GATEWAY, GUEST, RINGNET, Attached, Netns, Program, run_env

pytestmark = pytest.mark.netns


def test_config_net_configures_before_ready(attach: Callable[..., Attached], guest_ns: Netns) -> None:
    attach(mtu=2345)
    assert f"inet {GUEST}/24" in guest_ns.ip("-4", "addr", "show", "dev", "tap0")
    assert f"default via {GATEWAY} dev tap0" in guest_ns.ip("route")
    link = guest_ns.ip("link", "show", "dev", "tap0")
    assert "mtu 2345" in link and re.search(r"[<,]UP[,>]", link)


def test_the_default_mtu(guest_session: Attached, guest_ns: Netns) -> None:
    assert "mtu 4000" in guest_ns.ip("link", "show", "dev", "tap0")


def test_without_config_net_only_the_tap_is_there(attach: Callable[..., Attached], guest_ns: Netns) -> None:
    attach(config_net=False)
    assert "tap0" in guest_ns.ip("-br", "link")
    assert "inet" not in guest_ns.ip("-4", "addr", "show", "dev", "tap0")
    assert guest_ns.ip("route") == ""


def test_it_ends_when_the_exit_fd_is_closed(guest_session: Attached) -> None:
    guest_session.close_exit_fd()
    assert guest_session.wait() == 0, guest_session.output()


def test_the_pid_file(attach: Callable[..., Attached], tmp_path: Path) -> None:
    file = tmp_path / "ringnet.pid"
    session = attach("--pid", str(file))
    assert file.read_text().strip() == str(session.pid)
    assert session.end() == 0
    assert not file.exists()


def test_a_process_names_the_namespace(host_ns: Netns, tmp_path: Path) -> None:
    """PID instead of a path, as slirp4netns takes it."""
    r, w = os.pipe()
    with Program(["unshare", "--net", "sh", "-c", f"echo up >/dev/fd/{w}; exec sleep 1000"], tmp_path / "sleep.log",
                 pass_fds=(w,)) as target:
        os.close(w)
        target.wait_word(r, "no namespace")
        os.close(r)
        ready, told = os.pipe()
        with Program(host_ns.argv(*RINGNET, "attach", str(target.pid), "--tap", "eth7", "--config-net", "--ready-fd",
                                  str(told)), tmp_path / "attach.log", pass_fds=(told,)) as session:
            os.close(told)
            assert session.wait_word(ready, "not ready") == "1"
            os.close(ready)
            out = subprocess.run(["nsenter", "-t", str(target.pid), "-n", "ip", "-4", "addr", "show", "dev", "eth7"],
                                 capture_output=True, text=True, check=True, env=run_env()).stdout
            assert f"inet {GUEST}/24" in out
            assert session.end() == 0, session.output()


def test_quiet_means_quiet(attach: Callable[..., Attached]) -> None:
    session = attach("-q")
    assert session.end() == 0
    assert session.output() == ""
