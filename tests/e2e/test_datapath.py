"""A datapath embedded in a VMM (pipeline/datapath.py), and the example that shows it."""
from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from netlab import DEADLINE, REPO, run_env, sh, wait_gone

from e2e.test_vm import GATEWAY, GATEWAY_MAC, arp_request
from pipeline import api
from pipeline.config import ConfigError
from pipeline.datapath import Cancellation, Datapath, DatapathError, create_datapath
from tests.fds import open_fds


def answers(net: Datapath) -> bool:
    os.write(net.fd, arp_request())
    assert select.select([net.fd], [], [], DEADLINE)[0], net.said()
    return os.read(net.fd, 65536)[22:32] == GATEWAY_MAC + GATEWAY


def test_a_datapath_from_beginning_to_end() -> None:
    with Cancellation() as token, create_datapath(mtu=1500, cancel=token, hosts={"db.test": "192.0.2.7"}) as net:
        assert not os.get_blocking(net.fd) and not os.get_inheritable(net.fd)
        with socket.socket(fileno=os.dup(net.fd)) as s:
            assert (s.family, s.type) == (socket.AF_UNIX, socket.SOCK_DGRAM) and s.getpeername() == ""
            # As far as this machine allows: 8 MiB (counted twice by the kernel) with CAP_NET_ADMIN.
            most = 16 << 20 if os.geteuid() == 0 else 2 * int(Path("/proc/sys/net/core/wmem_max").read_text())
            assert s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == min(16 << 20, most)
        assert answers(net)
        with net.client() as ctl:
            ctl.call(api.HostsAdd(names={"web.test": ["192.0.2.8"]}))
            names = {h.name: h.addresses for h in ctl.call(api.HostsList()).names}
            assert names["db.test"] == ["192.0.2.7"] and names["web.test"] == ["192.0.2.8"]
        assert not net.wait(0)
        token.cancel()
        assert net.wait(DEADLINE)
        assert token.cancelled


def test_close_ends_one_and_a_token_all() -> None:
    with Cancellation() as token:
        first, second = create_datapath(cancel=token), create_datapath(cancel=token)
        first.close()
        first.close()  # again is fine
        assert answers(second)
        token.cancel()
        assert second.wait(DEADLINE)
        second.close()


def test_many_datapaths_leave_no_descriptor_and_no_process() -> None:
    before = open_fds()
    for _ in range(3):
        with create_datapath() as net:
            assert answers(net)
    assert open_fds() == before


def test_it_ends_with_its_vmm(tmp_path: Path) -> None:
    """kill -9 of the VMM: nobody cancels, nobody closes."""
    script = ("import os, time; from pipeline.datapath import create_datapath\nnet = create_datapath()\n"
              "print(net._process.pid, flush=True); time.sleep(600)")
    vmm = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=run_env(), text=True)
    assert vmm.stdout
    pid = int(vmm.stdout.readline())
    os.kill(pid, 0)
    vmm.send_signal(signal.SIGKILL)
    vmm.wait(DEADLINE)
    vmm.stdout.close()
    assert wait_gone([pid]) == []


def test_wrong_settings_are_named_here() -> None:
    for options, why in (({"mtu": 10}, "--mtu 10: not within"), ({"hosts": {"-": "192.0.2.1"}}, "not a domain name"),
                         ({"options": {"tcp-ports": ["x"]}}, "--tcp-ports"), ({"options": {"no-such": 1}}, "--no-such 1: unknown option")):
        before = open_fds()
        with pytest.raises(ConfigError, match=why):
            create_datapath(**options)  # type: ignore[arg-type]
        assert open_fds() == before


def test_what_cannot_be_set_up_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DatapathError, match=f"cannot forward tcp 127.0.0.1/{port}"):
            create_datapath(options={"tcp-ports": [f"127.0.0.1/{port}:80"]})
    with Cancellation() as token:
        token.cancel()
        with pytest.raises(DatapathError, match="cancelled before it began"):
            create_datapath(cancel=token)
    script = ("import resource; from pipeline.datapath import create_datapath, DatapathError\n"
              "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))\n"
              "try: create_datapath()\nexcept DatapathError as e: print(e)\nexcept OSError as e: print('bare', e)")
    said = sh(sys.executable, "-c", script, env=run_env()).stdout
    assert said == "cannot set up a datapath: Too many open files\n"


def test_a_buffer_that_cannot_be_set_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("pipeline.datapath.widen", refuse)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with create_datapath() as net:
            assert answers(net)
    assert [str(w.message) for w in seen] == ["buffers of the datapath's socket stay as they are: Invalid argument"] * 2


def test_the_toy_vmm_gets_its_pings_answered() -> None:
    example = REPO / "tools" / "examples" / "toy_vmm.py"
    assert len(example.read_text().splitlines()) <= 60  # a page
    said = sh(sys.executable, example, "3", env=run_env()).stdout.splitlines()
    assert [line.rsplit(" ", 2)[0] for line in said] == [f"reply from 10.0.2.1 seq={n}" for n in (1, 2, 3)]
