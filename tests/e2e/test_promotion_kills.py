"""kill -9 of the link's stages while they run flows in bulk both ways: what arrives is what was sent.

The kill comes at any moment, so most of them leave a half torn: bytes handed to the kernel, or taken out of it, that the flow
table does not know of (csrc/tcp_promote.c repairs it by what the kernel says).
"""
from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from netlab import DEADLINE, SERVER, Attached, Netns

from e2e.test_seats import Watch, client, pids  # noqa: F401 (fixtures)
from pipeline import api
from pipeline.client import Client

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("runtime")]

KILLS = 120 if os.environ.get("RINGNET_LONG") else 6
FLOWS = 3
CHUNK = 1 << 18


@dataclass
class End:
    """How one direction ended, at one of its ends."""

    length: int = 0
    reset: bool = False
    wrong_at: int = -1


PERIOD = 1048573  # a prime: what is missing, twice or misplaced does not fit


def send(s: socket.socket, stream: bytes, stop: threading.Event, end: End) -> None:
    try:
        while not stop.is_set():
            at = end.length % PERIOD
            end.length += s.send(memoryview(stream)[at:at + CHUNK])
        s.shutdown(socket.SHUT_WR)
    except (ConnectionResetError, BrokenPipeError):
        end.reset = True


def receive(s: socket.socket, stream: bytes, end: End) -> None:
    try:
        while data := s.recv(CHUNK):
            at = end.length % PERIOD
            if data != stream[at:at + len(data)] and end.wrong_at < 0:
                end.wrong_at = end.length
            end.length += len(data)
    except ConnectionResetError:
        end.reset = True


@pytest.mark.timeout(60 + KILLS * 10)
def test_kills_in_the_middle_of_bulk_both_ways(attach: Callable[..., Attached], guest_ns: Netns, host_ns: Netns,
                                               client: Callable[[], Client]) -> None:  # noqa: F811
    attach("--session", "s", "--restarts", "1000", "--promote", "2")
    look, watch = client(), Watch(client())
    seed = random.randrange(1 << 32)
    rnd, stop = random.Random(seed), threading.Event()

    def counter(stage: str, name: str) -> int:
        return look.call(api.Statistics()).counters[stage].get(name, 0)

    def fast(stage: str) -> int:
        return counter(stage, "fast_frames")

    with ExitStack() as stack:
        listener = stack.enter_context(host_ns.listen(SERVER))
        ways, threads = [], []
        for k in range(FLOWS):
            guest = stack.enter_context(guest_ns.socket())
            guest.settimeout(DEADLINE * 3)
            guest.connect(listener.getsockname())
            host = stack.enter_context(listener.accept()[0])
            host.settimeout(DEADLINE * 3)
            for name, a, b in (("up", guest, host), ("down", host, guest)):
                sent, got = End(), End()
                ways.append((f"flow {k} {name}", sent, got))
                stream = rnd.randbytes(PERIOD) * 2
                threads += [threading.Thread(target=send, args=(a, stream, stop, sent), daemon=True),
                            threading.Thread(target=receive, args=(b, stream, got), daemon=True)]
        for t in threads:
            t.start()
        stack.callback(stop.set)
        kills = 0
        while kills < KILLS or (not counter("egress", "promote_repaired") and kills < 5 * KILLS):
            victims = rnd.choice([["guest_tx"], ["guest_rx"], ["guest_tx", "guest_rx"]])
            before, end = [fast(name) for name in victims], time.monotonic() + DEADLINE
            while any(fast(name) <= n for name, n in zip(victims, before, strict=True)) and time.monotonic() < end:
                time.sleep(0.01)  # until they run flows again: counters in shared memory, there is no event
            time.sleep(rnd.uniform(0, 0.1))  # any moment: that is the test
            at = pids(look)
            for name in victims:
                os.kill(at[name], signal.SIGKILL)
            watch.all_running(victims)
            kills += 1
        stop.set()
        for t in threads:
            t.join(DEADLINE * 4)
        assert not any(t.is_alive() for t in threads), f"seed {seed}: a transfer stands still"
        for name, sent, got in ways:
            assert got.wrong_at < 0, f"seed {seed}: {name}: a wrong byte in the MiB behind {got.wrong_at}"
            assert sent.reset == got.reset, f"seed {seed}: {name}: a reset at one end only: {sent} {got}"
            assert sent.reset or sent.length == got.length, f"seed {seed}: {name}: {sent} {got}"
        assert sum(got.length for _, _, got in ways) > FLOWS * 2 * CHUNK
        assert any(not got.reset for _, _, got in ways)
        assert counter("egress", "promote_repaired"), "no kill hit a stage at work"
