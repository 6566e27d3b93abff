"""What docs/forwards.md, proxy.md and policy.md tell the reader to type is typed: every command succeeds and shows what it
should, every settings file is taken, every line of Python runs. (docs/control-api.md: test_control_docs.py.)"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import REPO, Netns, sh

from e2e.dns_server import DnsServer, zone
from e2e.doc_shell import Shell, blocks, commands
from pipeline.config import load_toml, make
from tests.proxy_servers import HttpProxy, SocksProxy

pytestmark = pytest.mark.netns

DOCS = REPO / "docs"
SESSION = """
import socket
from pipeline.config import make
from pipeline.supervisor import Link, Session
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
with Session(make({"quiet": True}), link=Link(fd=theirs.fileno(), kind="dgram", vnet=False)) as session:
"""


def console(document: str) -> list[str]:
    return [c for kind, lines in blocks(DOCS / document) if kind == "console" for c, _ in commands(lines)]


@pytest.fixture
def shell(host_ns: Netns, tmp_path: Path) -> Iterator[Shell]:
    (host_ns.etc / "hosts").write_text("127.0.0.1 localhost proxy.example\n")
    made = Shell(host_ns, tmp_path)
    yield made
    made.close()


def test_forwards(shell: Shell, host_ns: Netns) -> None:
    typed = console("forwards.md")
    assert typed[0].endswith(" &") and any(c.startswith("curl") for c in typed)
    for command in typed:
        if command.endswith(" &"):
            shell.start(command)
            shell.wait_for_text("Serving HTTP")
        elif command.startswith("curl"):
            assert "<title>Directory listing" in shell.run(command)
        else:
            shell.run(command)
    (code,) = [lines for kind, lines in blocks(DOCS / "forwards.md") if kind == "python"]
    script = SESSION + "".join(f"    {line}\n" for line in code) + "    print(session.forwards())\n"
    shell.run("kill %1; wait", ok=False)  # it has port 8080
    assert sh(*host_ns.argv("env", f"PYTHONPATH={REPO}", sys.executable, "-c", script)).stdout.strip() == "[]"


def test_proxy(shell: Shell, host_ns: Netns, nginx, dns_upstream: Callable[..., DnsServer]) -> None:
    """proxy.example is this host (/etc/hosts); www.example is an address of nobody, and the proxies know better."""
    address, port, root = nginx
    (root / "index.html").write_text("by the proxy\n")
    dns_upstream("127.0.0.1", zone({("www.example", "A"): ["203.0.113.80"]}))

    def start(kind: type, number: int):
        return kind(make_socket=lambda k: host_ns.socket(kind=k), route=lambda host, p: (address, port), port=number)

    with start(SocksProxy, 1080) as socks, start(HttpProxy, 3128) as http:
        for command in console("proxy.md"):
            assert shell.run(command) == "by the proxy", command
        assert socks.asked == http.asked == [("connect", "www.example", 80)]


def test_policy(shell: Shell) -> None:
    for command in console("policy.md"):
        if command.endswith(" &"):
            shell.start(command)
            shell.wait_for_text("Serving HTTP")
            continue
        said = shell.run(command)
        assert ("default via 10.0.2.1" if "ringnet run" in command else "rule") in said, command


@pytest.mark.parametrize("document", ["policy.md", "proxy.md", "impairment.md"])
def test_settings_files(document: str, tmp_path: Path) -> None:
    found = [lines for kind, lines in blocks(DOCS / document) if kind == "toml"]
    assert found
    for lines in found:
        file = tmp_path / "session.toml"
        file.write_text("\n".join(lines))
        assert make(load_toml(str(file)), strict=True) != make({})
