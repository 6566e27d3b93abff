"""A stage that hangs is found, killed and succeeded, and the guest's connections go on (pipeline/watchdog.py)."""
from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, SERVER, Attached, Netns, run_env, sh

from e2e.test_seats import Watch, pids
from pipeline import api
from pipeline.client import Client

pytestmark = pytest.mark.netns


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Client]]:
    """To the session s of this test."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("RINGNET_RUNTIME_DIR", str(path))
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Client(path / "s.sock"))


PATIENCE = "3"  # s; more than a machine at work keeps a stage waiting
REPLACED = {"guest_tx", "classify", "services", "guest_rx"}


def test_stages_that_are_stopped_are_replaced_and_connections_go_on(
        attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns, tmp_path: Path, client: Callable[[], Client]) -> None:
    session = attach("--session", "s", "--watchdog", PATIENCE, "--postmortem", str(tmp_path / "dumps"))
    look = client()
    before, news = pids(look), client()
    news.call(api.Subscribe(events=["stage"]))
    with host_ns.listen(SERVER) as listener, guest_ns.socket() as guest:
        guest.connect(listener.getsockname())
        host = listener.accept()[0]
        host.settimeout(DEADLINE)
        with host:
            guest.sendall(b"before")
            assert host.recv(100) == b"before"
            for name in REPLACED:
                os.kill(before[name], signal.SIGSTOP)
            guest.sendall(b"meanwhile")
            host.sendall(b"also")
            left = set(REPLACED)
            for event in news.events(DEADLINE):
                assert isinstance(event, api.StageChanged)
                if event.state == "running":
                    assert event.pid != before[event.stage]
                    left.discard(event.stage)
                if not left:
                    break
            assert host.recv(100) == b"meanwhile" and guest.recv(100) == b"also"
    assert guest_ns.run("dig", f"@{GATEWAY}", "+short", "host.ringnet.internal").stdout.split() == [GATEWAY]
    assert pids(look)["egress"] == before["egress"]
    said = session.output()
    for name in REPLACED:
        assert re.search(rf"stage {name} is gone \(it hung: no answer for [0-9.]+ s, stopped by a signal, as by kill -STOP\):"
                         r" started again, 1 of at most 5 times within a minute", said), said
    told = sh(*RINGNET, "postmortem", str(tmp_path / "dumps"), env=run_env()).stdout
    assert re.search(r"stage \w+ is gone: it hung: no answer for", told), told


def test_one_that_cannot_be_replaced_ends_the_session(attach: Callable[..., Attached], client: Callable[[], Client]
                                                      ) -> None:
    session = attach("--session", "s", "--watchdog", PATIENCE, "--restarts", "0")
    os.kill(pids(client())["classify"], signal.SIGSTOP)
    assert session.wait() == 70
    assert re.search(r"stage classify died: it hung: no answer for [0-9.]+ s, stopped by a signal", session.output())


def test_one_that_is_paused_is_not_hanging(attach: Callable[..., Attached], guest_ns: Netns, client: Callable[[], Client]
                                           ) -> None:
    """Another, stopped later, is replaced first: so the paused one was watched for as long."""
    attach("--session", "s", "--watchdog", PATIENCE)
    look, watch = client(), Watch(client())
    before = pids(look)
    sh(*RINGNET, "ctl", "-s", "s", "pause", "classify", env=run_env())
    os.kill(before["services"], signal.SIGSTOP)
    watch.until("services", "running")
    assert pids(look)["classify"] == before["classify"]
    sh(*RINGNET, "ctl", "-s", "s", "resume", "classify", env=run_env())
    guest_ns.run("ping", "-c1", "-W30", GATEWAY)
