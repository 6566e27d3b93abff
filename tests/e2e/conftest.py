"""Servers the end-to-end tests put on the host side."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netlab import SERVER, Netns, Program, run_env

from e2e.dns_server import Answer, DnsServer


@pytest.fixture
def dns_upstream(host_ns: Netns) -> Iterator[Callable[..., DnsServer]]:
    """dns_upstream(address, answer): a resolver on the host side, port 53."""
    with ExitStack() as stack:
        def start(address: str, answer: Answer) -> DnsServer:
            server = DnsServer(host_ns, address, answer)
            stack.callback(server.close)
            return server
        yield start


@pytest.fixture
def nginx(host_ns: Netns, tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """nginx on the host side with WebDAV PUT: (address, port, document root)."""
    root = tmp_path / "www"
    root.mkdir()
    listener = host_ns.listen(SERVER)
    port = listener.getsockname()[1]
    conf = tmp_path / "nginx.conf"
    conf.write_text(f"""
        user root; worker_processes 1; daemon off; pid {tmp_path}/nginx.pid; error_log stderr;
        events {{ worker_connections 1024; }}
        http {{
            access_log off; sendfile on; client_max_body_size 0; client_body_temp_path {tmp_path}/body;
            proxy_temp_path {tmp_path}/p; fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u;
            scgi_temp_path {tmp_path}/s;
            server {{ listen {SERVER}:{port}; root {root}; dav_methods PUT; }}
        }}
        """)
    # nginx takes over the listening socket: it is bound before anyone connects, so nothing has to be waited for.
    os.set_inheritable(listener.fileno(), True)
    with Program(host_ns.argv("nginx", "-p", str(tmp_path), "-c", str(conf), "-e", "stderr"), tmp_path / "nginx.log",
                 pass_fds=(listener.fileno(),), env=run_env(NGINX=f"{listener.fileno()};")) as program:
        yield SERVER, port, root
        log = program.output()
    listener.close()
    assert "[alert]" not in log and "[emerg]" not in log, log


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sessions of this test only."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("RINGNET_RUNTIME_DIR", str(path))
    monkeypatch.delenv("RINGNET_SESSION", raising=False)
    return path
