"""--metrics: the text that is served, the addresses it may be served at, and clients that behave badly."""
from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import ConfigError, make, metrics_address
from pipeline.metrics import CLIENTS_MAX, EXTRA, MetricsServer, exposition, metric_name
from pipeline.supervisor import SessionError
from shm.cell import counters
from shm.ring import Ring
from tests.control import FakeSession


@pytest.fixture
def session() -> Iterator[FakeSession]:
    s = FakeSession()
    s.memory.rings = {"guest_tx->classify": Ring.create(8)}  # type: ignore[attr-defined]
    s.counters = lambda name: {c.name: 3 for c in counters() if c.stage in (name, "all")}  # type: ignore[method-assign]
    yield s
    s.memory.rings["guest_tx->classify"].destroy()  # type: ignore[attr-defined]
    s.close()


LINE = re.compile(r'^(ringnet_[a-z0-9_]+)(\{[a-z]+="[^"\n]*"(?:,[a-z]+="[^"\n]*")*\}) (\d+(?:\.\d+)?)$')


def test_the_text_is_what_prometheus_reads(session: FakeSession) -> None:
    """Exposition formats, text 0.0.4: HELP and TYPE before the samples of a name, which are together; each label set once."""
    text = exposition(session, "we\"b\\")  # type: ignore[arg-type]
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    seen: set[str] = set()
    last = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in kinds and len(line.split(None, 3)) == 4
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds[name] = kind
            assert (kind == "counter") == name.endswith("_total")
            last = name
        else:
            match = LINE.match(line.replace(r"we\"b\\", "web"))
            assert match and match[1] == last, line
            assert (match[1] + match[2]) not in seen
            seen.add(match[1] + match[2])
    assert set(EXTRA) <= set(kinds) | {"ringnet_flows"}
    assert all(metric_name(c.name) in kinds for c in counters() if c.stage in ("all", "egress", "classify"))
    assert kinds["ringnet_small_used"] == "gauge"
    assert 'ringnet_drop_l4_checksum_total{session="we\\"b\\\\",stage="classify"} 3' in text
    assert 'ringnet_ring_slots{session="we\\"b\\\\",ring="guest_tx->classify"} 8' in text


def test_flows_are_counted_by_state(session: FakeSession) -> None:
    guest = b"\0" * 10 + b"\xff\xff" + bytes([10, 0, 2, 2])
    flows = session.memory.flows
    entry = (flows.size - 64) // len(flows)
    for i in range(5):
        struct.pack_into("=16s16sHHBB", flows.buffer(), 64 + i * entry, guest, guest, 1, 2, 6, 3 if i else 1)
    text = exposition(session, "s")  # type: ignore[arg-type]
    assert 'ringnet_flows{session="s",proto="tcp",state="connecting"} 1' in text
    assert 'ringnet_flows{session="s",proto="tcp",state="established"} 4' in text


@pytest.mark.parametrize(("spec", "where"), [("9464", ("127.0.0.1", 9464)), ("127.0.0.2:0", ("127.0.0.2", 0)),
                                             ("[::1]:9464", ("::1", 9464)), ("unix:/run/x", "/run/x")])
def test_addresses(spec: str, where: object) -> None:
    assert metrics_address(spec) == where


@pytest.mark.parametrize(("spec", "why"), [("0.0.0.0:9464", "no loopback"), ("192.0.2.1:1", "no loopback"),
                                           ("example:1", "no loopback"), ("70000", "expected a port"), ("x", "expected a port"),
                                           ("unix:", "1..107 bytes"), ("unix:" + "x" * 200, "1..107 bytes")])
def test_addresses_that_are_refused(spec: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--metrics {re.escape(spec)}: .*{why}"):
        make({"metrics": spec})


def ask(server: MetricsServer, session: FakeSession, request: bytes) -> bytes:
    """A whole exchange; the server's loop runs here, the client in a thread."""
    got = bytearray()

    def client() -> None:
        with socket.create_connection(server.sock.getsockname()[:2], timeout=60) as s:
            with contextlib.suppress(ConnectionResetError):  # one that is sent away has unread bytes
                s.sendall(request)
                while data := s.recv(65536):
                    got.extend(data)

    thread = threading.Thread(target=client)
    thread.start()
    while thread.is_alive():
        session.step(0.01)
    thread.join()
    return bytes(got)


def test_requests(session: FakeSession) -> None:
    server = MetricsServer(session, "0", name="s")  # type: ignore[arg-type]
    head, _, body = ask(server, session, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
    assert f"Content-Length: {len(body)}".encode() in head and b"ringnet_uptime_seconds" in body
    assert ask(server, session, b"HEAD /metrics HTTP/1.0\n\n").endswith(b"\r\n\r\n")
    assert ask(server, session, b"GET /other HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert ask(server, session, b"POST /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert ask(server, session, b"\xff\x00garbage\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert ask(server, session, b"GET /" + b"x" * 20_000) == b""
    silent = []
    for _ in range(CLIENTS_MAX + 3):
        silent.append(socket.create_connection(server.sock.getsockname()))
        while session.step(0):
            pass
    assert len(server.clients) == CLIENTS_MAX
    assert b"200 OK" in ask(server, session, b"GET /metrics HTTP/1.1\r\n\r\n")
    server.close()
    for s in silent:
        s.close()


def test_a_unix_socket_is_its_users_alone_and_goes(session: FakeSession, tmp_path: Path) -> None:
    path = tmp_path / "m"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # as a session that was killed leaves it
    server = MetricsServer(session, f"unix:{path}", name="s")  # type: ignore[arg-type]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SessionError, match="in use by somebody who listens there"):
        MetricsServer(session, f"unix:{path}", name="s")  # type: ignore[arg-type]
    server.close()
    assert not path.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(SessionError, match="--metrics unix:"):
        MetricsServer(session, f"unix:{tmp_path}/file", name="s")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text() == "x"
