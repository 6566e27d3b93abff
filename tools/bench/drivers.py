"""What is measured: each datapath (pipeline/peers.py) attached to the guest's namespace."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lab import SERVER, TAP, Lab, LabError, inside
from bench.load import Load
from pipeline import peers, procs
from pipeline.peers import Driver

READY_PORT = "5300"
FORWARDS = (5401, 5402)  # host ports that lead to the same ports of the guest
PATIENCE = 30.0  # s until a datapath must work


def builtin(newer_pasta: str | None = None) -> dict[str, Driver]:
    drivers = [
        peers.ringnet(),
        peers.pasta(),
        peers.slirp4netns(),
        Driver("kernel", "kernel"),
    ]
    if newer_pasta:
        drivers.insert(2, peers.pasta("pasta25", newer_pasta))
    return {d.name: d for d in drivers}


def custom(text: str) -> Driver:
    """NAME=COMMAND; or NAME=+OPTIONS for this checkout's ringnet with more options. Raises LabError."""
    name, equals, command = text.partition("=")
    if not equals or not name or not command.strip():
        raise LabError(f"--driver {text}: not NAME=COMMAND (or NAME=+OPTIONS for ringnet with options)")
    if command.startswith("+"):
        return peers.ringnet(name, command[1:].strip())
    return Driver(name, "peer", command)


class Datapath:
    """A driver at work in a lab: `pid` is the root of its processes, None for the kernel's way."""

    def __init__(self, driver: Driver, mtu: int, lab: Lab, pid: int | None, start_s: float | None) -> None:
        self.driver, self.mtu, self.lab, self.pid, self.start_s = driver, mtu, lab, pid, start_s

    def usage(self) -> dict[str, procs.Usage]:
        return procs.usage(self.pid)


@contextlib.contextmanager
def running(driver: Driver, lab: Lab, mtu: int, *, forwards: bool) -> Iterator[Datapath]:
    """Fresh namespaces with the driver between them; the guest has reached the server when the block begins.

    Raises LabError, with what the driver printed.
    """
    with lab.fresh(), Load(lab.server, "serve", SERVER, READY_PORT, 1) as server:
        server.line(PATIENCE)
        if driver.kind == "kernel":
            lab.forward_by_kernel(mtu)
            with Load(lab.guest, "ready", SERVER, READY_PORT, PATIENCE) as probe:
                probe.line(PATIENCE)
                probe.answer(PATIENCE)
            yield Datapath(driver, mtu, lab, None, None)
            return
        with tempfile.TemporaryDirectory(prefix="ringnet-bench-") as scratch, _started(
                driver, lab, mtu, Path(scratch), forwards=forwards) as datapath:
            yield datapath


@contextlib.contextmanager
def _started(driver: Driver, lab: Lab, mtu: int, scratch: Path, *, forwards: bool) -> Iterator[Datapath]:
    log, api = scratch / "log", scratch / "api"
    ports = ",".join(map(str, FORWARDS)) if forwards else "none"
    words = driver.words(netns=f"/run/netns/{lab.guest}", tap=TAP, mtu=mtu, tcp=ports, api=api)
    with Load(lab.guest, "ready", SERVER, READY_PORT, PATIENCE) as probe, log.open("wb") as out:
        probe.line(PATIENCE)
        began = time.monotonic_ns()
        process = subprocess.Popen(inside(lab.host, *words), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   start_new_session=True, env=os.environ | driver.env)
        try:
            try:
                ready = probe.answer(PATIENCE + 5, process)
                if forwards and "{api}" in driver.command:
                    _slirp_forwards(api)
            except (LabError, OSError) as e:
                raise LabError(f"{driver.name}: {e}; it said: {log.read_text(errors='replace').strip()[-400:]}") from e
            yield Datapath(driver, mtu, lab, process.pid, (ready["at_ns"] - began) / 1e9)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its own process group: it was started as a session."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def _slirp_forwards(api: Path) -> None:
    """slirp4netns has no flag for forwards; its API socket takes one request a connection."""
    for port in FORWARDS:
        ask = {"execute": "add_hostfwd", "arguments": {"proto": "tcp", "host_addr": "0.0.0.0", "host_port": port,
                                                       "guest_port": port}}
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(PATIENCE)
            s.connect(str(api))
            s.sendall(json.dumps(ask).encode())
            s.shutdown(socket.SHUT_WR)
            said = s.recv(4096).decode()
        if "error" in said or not said:
            raise LabError(f"add_hostfwd: {said or 'no answer'}")
