"""Metrics of a session in Prometheus's text format, over HTTP on a Unix socket or a loopback port (`--metrics`).

Every counter of csrc/rn_metrics.def is `ringnet_<name>_total` with the label `stage`; a value of the moment (`now_<name>`
there) is the gauge `ringnet_<name>`. What is known of processes, rings and flows besides is in EXTRA. docs/metrics.md is
generated from both. The server is part of the supervisor's loop: nobody is waited for, no client is trusted.
"""
from __future__ import annotations

import contextlib
import ipaddress
import os
import selectors
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from pipeline import monitor
from pipeline.config import metrics_address
from pipeline.messages import Exit
from pipeline.supervisor import Session, SessionError
from shm.cell import counters
from shm.flows import FlowState

CLIENTS_MAX = 16
REQUEST_MAX = 8192  # bytes
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}


class Extra(Struct, frozen=True):
    """A metric that is no counter of the data plane."""

    name: str
    kind: str  # "gauge" or "counter"
    labels: tuple[str, ...]  # besides session
    help: str


EXTRA = {e.name: e for e in (
    Extra("ringnet_uptime_seconds", "gauge", (), "Since every stage ran"),
    Extra("ringnet_stage_up", "gauge", ("stage",), "1: the stage's process lives"),
    Extra("ringnet_stage_restarts_total", "counter", ("stage",), "Times the stage was started again"),
    Extra("ringnet_stage_heartbeat_age_seconds", "gauge", ("stage",), "Since its last turn; 0 while it sleeps with nothing to do"),
    Extra("ringnet_stage_cpu_seconds_total", "counter", ("stage",), "Processor time, user and system"),
    Extra("ringnet_ring_waiting", "gauge", ("ring",), "Descriptors in the ring"),
    Extra("ringnet_ring_waiting_most", "gauge", ("ring",), "Most that the consumer ever found waiting"),
    Extra("ringnet_ring_slots", "gauge", ("ring",), "Descriptors it can hold"),
    Extra("ringnet_ring_descriptors_total", "counter", ("ring",), "Descriptors put there"),
    Extra("ringnet_flows", "gauge", ("proto", "state"), "Connections and mappings in use"),
    Extra("ringnet_flows_max", "gauge", (), "Entries of the flow table"),
    Extra("ringnet_forwards", "gauge", (), "Forwards from the host to the guest"),
)}


def metric_name(counter: str) -> str:
    """What a counter of csrc/rn_metrics.def is called here."""
    return f"ringnet_{counter.removeprefix('now_')}" if counter.startswith("now_") else f"ringnet_{counter}_total"


def _labels(**labels: str) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{k}="{quoted(v)}"' for k, v in labels.items()) + "}"


def _extra(session: Session) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of all of EXTRA."""
    assert session.memory is not None
    now = time.monotonic()
    yield "ringnet_uptime_seconds", {}, round(now - session.started_at, 3)
    for child in session.children:
        cell = session.memory.session.cell(child.row)
        label = {"stage": child.decl.name}
        yield "ringnet_stage_up", label, int(child.alive)
        yield "ringnet_stage_restarts_total", label, max(0, child.generation - 1)
        yield ("ringnet_stage_heartbeat_age_seconds", label,
               0.0 if cell.asleep or not child.alive else max(0.0, round(now - cell.heartbeat_ns / 1e9, 3)))
        yield ("ringnet_stage_cpu_seconds_total", label,
               round(child.cpu_s + (monitor.cpu_seconds(child.pid) if child.alive else 0.0), 2))
    for name, ring in session.memory.rings.items():
        stat = ring.stat()
        label = {"ring": name}
        yield "ringnet_ring_waiting", label, stat.fill
        yield "ringnet_ring_waiting_most", label, stat.high
        yield "ringnet_ring_slots", label, stat.slots
        yield "ringnet_ring_descriptors_total", label, stat.tail
    kinds = session.memory.flows.census()
    for (proto, state), n in sorted(kinds.items()):
        yield "ringnet_flows", {"proto": PROTOCOLS.get(proto, str(proto)), "state": FlowState(state).name.lower()}, n
    yield "ringnet_flows_max", {}, len(session.memory.flows)
    yield "ringnet_forwards", {}, len(session.forwards())


def exposition(session: Session, name: str) -> str:
    """All metrics of a session (Prometheus exposition formats, text 0.0.4)."""
    lines: list[str] = []
    stages = {c.decl.name: session.counters(c.decl.name) for c in session.children}
    for counter in counters():
        metric = metric_name(counter.name)
        values = [(stage, found[counter.name]) for stage, found in stages.items() if counter.name in found]
        if values:
            kind = "gauge" if counter.name.startswith("now_") else "counter"
            lines += [f"# HELP {metric} {counter.help}", f"# TYPE {metric} {kind}"]
            lines += [f"{metric}{_labels(session=name, stage=stage)} {value}" for stage, value in values]
    by_name: dict[str, list[str]] = {}
    for metric, labels, value in _extra(session):
        by_name.setdefault(metric, []).append(f"{metric}{_labels(session=name, **labels)} {value}")
    for extra in EXTRA.values():
        if extra.name in by_name:
            lines += [f"# HELP {extra.name} {extra.help}", f"# TYPE {extra.name} {extra.kind}", *by_name[extra.name]]
    return "\n".join(lines) + "\n"


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = bytearray()
        self.reply = bytearray()


class MetricsServer:
    """Serves until close(). One request a connection."""

    def __init__(self, session: Session, spec: str, *, name: str) -> None:
        """spec: --metrics. Raises SessionError."""
        self.session, self.name = session, name
        self.clients: list[_Client] = []
        self._path: Path | None = None
        self._inode = 0
        where = metrics_address(spec)
        try:
            if isinstance(where, str):
                self._listen_unix(Path(where))
            else:
                family = socket.AF_INET6 if ipaddress.ip_address(where[0]).version == 6 else socket.AF_INET
                self.sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.sock.bind(where)
                self.sock.listen(CLIENTS_MAX)
        except OSError as e:
            raise SessionError(Exit.RUNTIME, f"--metrics {spec}: {e.strerror or e}") from e
        session.watch(self.sock.fileno(), self._accept)

    def _listen_unix(self, path: Path) -> None:
        """A socket that a killed session left there goes; one that somebody listens on does not."""
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(os.fspath(path)) == 0:
                    raise OSError(98, "in use by somebody who listens there")
            path.unlink()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        os.fchmod(self.sock.fileno(), 0o600)
        self.sock.bind(os.fspath(path))
        self._path, self._inode = path, path.lstat().st_ino
        self.sock.listen(CLIENTS_MAX)

    @property
    def port(self) -> int:
        """The TCP port, for --metrics 0."""
        return int(self.sock.getsockname()[1])

    def close(self) -> None:
        for client in list(self.clients):
            self._drop(client)
        self.session.unwatch(self.sock.fileno())
        self.sock.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.lstat().st_ino == self._inode:
                    self._path.unlink()

    def _accept(self) -> None:
        try:
            sock, _ = self.sock.accept()
        except OSError:
            return  # gone again, or no descriptor left: the others go on
        sock.setblocking(False)
        if len(self.clients) >= CLIENTS_MAX:
            self._drop(self.clients[0])  # the oldest: it has had its time
        client = _Client(sock)
        self.clients.append(client)
        self.session.watch(sock.fileno(), lambda: self._read(client))

    def _drop(self, client: _Client) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self.session.unwatch(client.sock.fileno())
            client.sock.close()

    def _read(self, client: _Client) -> None:
        try:
            data = client.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.request += data
        if b"\r\n\r\n" in client.request or b"\n\n" in client.request:
            client.reply += self._answer(bytes(client.request))
            self.session.watch(client.sock.fileno(), lambda: self._write(client), selectors.EVENT_WRITE)
        elif not data or len(client.request) > REQUEST_MAX:
            self._drop(client)

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.split(b"\n", 1)[0].strip().partition(b" ")
        path = rest.split(b" ", 1)[0].split(b"?", 1)[0]
        status, body = "200 OK", ""
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", "GET it\n"
        elif path not in (b"/metrics", b"/"):
            status, body = "404 Not Found", "there is /metrics\n"
        elif self.session.memory is None:
            status, body = "503 Service Unavailable", "the session is ending\n"
        else:
            body = exposition(self.session, self.name)
        head = (f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body.encode())}\r\n"
                "Connection: close\r\n\r\n")
        return (head + ("" if method == b"HEAD" else body)).encode()

    def _write(self, client: _Client) -> None:
        try:
            sent = client.sock.send(client.reply)
        except BlockingIOError:
            return
        except OSError:
            sent = len(client.reply)
        del client.reply[:sent]
        if not client.reply:
            self._drop(client)
