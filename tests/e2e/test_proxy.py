"""curl in the guest through proxies on the host; names that only the proxy can resolve; what is not to leak."""
from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, SERVER, Netns, connect_error

from e2e.dns_server import zone
from tests.proxy_servers import HttpProxy, Proxy, SocksProxy

pytestmark = pytest.mark.netns

FAKE = "203.0.113.80"  # what the guest is told of www.example: nobody has it
KEY = {"user": "u", "password": "p"}
KINDS = [pytest.param(SocksProxy, {}, id="socks5"), pytest.param(SocksProxy, KEY, id="socks5-password"),
         pytest.param(HttpProxy, {}, id="connect"), pytest.param(HttpProxy, KEY, id="connect-password")]


@pytest.fixture
def start(host_ns: Netns) -> Iterator[Callable[..., Proxy]]:
    """start(kind, **options): a proxy in the host's namespace."""
    with ExitStack() as stack:
        yield lambda kind, **options: stack.enter_context(kind(make_socket=lambda k: host_ns.socket(kind=k), **options))


def curl(guest: Netns, url: str) -> str:
    return guest.run("curl", "-sS", "--noproxy", "*", "--max-time", str(DEADLINE), url).stdout


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_curl_by_a_name_that_the_proxy_resolves(kind: type[Proxy], options: dict[str, str], start, attach, dns_upstream,
                                                guest_ns: Netns, nginx) -> None:
    """Our resolver's answer is an address of nobody; the proxy is asked for the name, and knows better."""
    address, port, root = nginx
    (root / "file").write_bytes(bytes(300_000))
    (root / "page").write_text("from the real one\n")
    dns_upstream("127.0.0.1", zone({("www.example", "A"): [FAKE]}))
    proxy = start(kind, route=lambda host, p: (address, port) if host == "www.example" else ("0.0.0.0", 1), **options)
    session = attach("--proxy", proxy.url)
    assert curl(guest_ns, f"http://www.example:{port}/page") == "from the real one\n"
    guest_ns.run("curl", "-sS", "--noproxy", "*", "-o", "/dev/null", "-f", f"http://www.example:{port}/file")
    assert proxy.asked == [("connect", "www.example", port)] * 2
    assert ("password" in session.output()) is bool(options)  # the warning, and not the password itself
    assert f"u:{options.get('password', 'x')}@" not in session.output()


@pytest.mark.parametrize("kind", [SocksProxy, HttpProxy])
def test_curl_by_address(kind: type[Proxy], start, attach, guest_ns: Netns, nginx) -> None:
    address, port, root = nginx
    (root / "page").write_text("page\n")
    proxy = start(kind, route=lambda host, p: (address, port))
    attach("--proxy", proxy.url)
    assert curl(guest_ns, f"http://{FAKE}/page") == "page\n"
    assert proxy.asked == [("connect", FAKE, 80)]


def test_what_is_excepted_goes_past_the_proxy(start, attach, dns_upstream, guest_ns: Netns, nginx) -> None:
    address, port, root = nginx
    (root / "page").write_text("page\n")
    dns_upstream("127.0.0.1", zone({("a.intern.example", "A"): [SERVER]}))
    proxy = start(SocksProxy, refuse=2)
    attach("--proxy", proxy.url, "--no-proxy", ".intern.example,192.0.2.0/24", "--hosts", f"named.example={SERVER}")
    assert curl(guest_ns, f"http://a.intern.example:{port}/page") == "page\n"
    assert proxy.asked == []
    # The same address under another name is the proxy's; a name of --hosts goes by its address.
    failed = guest_ns.run("curl", "-sS", "--noproxy", "*", f"http://named.example:{port}/page", check=False)
    assert failed.returncode == 7 and proxy.asked == [("connect", SERVER, port)]


def test_errors_are_the_proxys(start, attach, guest_ns: Netns) -> None:
    proxy = start(SocksProxy)
    attach("--proxy", proxy.url)
    for code, want in ((5, errno.ECONNREFUSED), (3, errno.ENETUNREACH), (4, errno.EHOSTUNREACH),
                       (2, errno.EHOSTUNREACH)):
        proxy.refuse = code
        with guest_ns.socket() as s:
            assert connect_error(s, (FAKE, 80)) == want, code


def test_the_gateways_loopback_is_no_business_of_the_proxy(start, attach, guest_ns: Netns, host_ns: Netns) -> None:
    proxy = start(SocksProxy, refuse=2)
    attach("--proxy", proxy.url)
    with host_ns.listen("127.0.0.1") as server, guest_ns.socket() as s:
        s.connect((GATEWAY, server.getsockname()[1]))
    assert proxy.asked == []


@pytest.fixture
def udp_echo(host_ns: Netns) -> Iterator[tuple[str, int]]:
    with host_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.bind((SERVER, 0))

        def serve() -> None:
            while (got := s.recvfrom(65535))[0] != b"end":
                s.sendto(got[0], got[1])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield s.getsockname()
        s.sendto(b"end", s.getsockname())
        thread.join(DEADLINE)


@pytest.mark.parametrize("options", [{}, {"user": "u", "password": "p"}], ids=["open", "password"])
def test_udp_through_an_association(options: dict[str, str], start, attach, guest_ns: Netns, udp_echo) -> None:
    proxy = start(SocksProxy, route=lambda host, p: udp_echo, **options)
    attach("--proxy", proxy.url)
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.connect((FAKE, 4242))
        for size in (1, 1000, 9000):
            s.send(bytes(size))
            assert s.recv(65535) == bytes(size)
    assert proxy.asked == [("associate", "0.0.0.0", 0)]


@pytest.mark.parametrize(("options", "arrives"), [((), False), (("--udp-without-proxy", "direct"), True)])
def test_udp_without_an_association_does_not_leak_unless_asked(options: tuple[str, ...], arrives: bool, start, attach,
                                                               guest_ns: Netns, udp_echo) -> None:
    proxy = start(HttpProxy)
    attach("--proxy", proxy.url, *options)
    with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: soft errors too (ip(7))
        s.connect(udp_echo)
        s.send(b"x")
        if arrives:
            assert s.recv(10) == b"x"
        else:
            with pytest.raises(OSError) as e:
                s.recv(10)
            assert e.value.errno == errno.EHOSTUNREACH  # ICMP code 13 (RFC 1812 5.2.7.1)


def test_a_relay_on_the_hosts_loopback_is_for_a_proxy_there_only(start, attach, guest_ns: Netns,
                                                                 host_ns: Netns) -> None:
    """Else a proxy could have the guest's bytes sent to any port of the host."""
    with host_ns.socket(kind=socket.SOCK_DGRAM) as victim:
        victim.bind(("127.0.0.1", 0))
        port = victim.getsockname()[1]

        class Liar(SocksProxy):
            def associate(self, connection: socket.socket) -> None:
                connection.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01" + port.to_bytes(2))
                connection.recv(1)

        proxy = start(Liar, address=SERVER)
        attach("--proxy", proxy.url)
        with guest_ns.socket(kind=socket.SOCK_DGRAM) as s:
            s.setsockopt(socket.IPPROTO_IP, 11, 1)
            s.connect((FAKE, 4242))
            s.send(b"x")
            with pytest.raises(OSError) as e:
                s.recv(10)
            assert e.value.errno == errno.EHOSTUNREACH
        victim.setblocking(False)
        with pytest.raises(BlockingIOError):
            victim.recv(10)


def test_a_host_name_for_the_proxy_and_auto(start, attach, guest_ns: Netns, nginx, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """--proxy auto takes the environment's; --config keeps a password off the command line."""
    address, port, root = nginx
    (root / "page").write_text("page\n")
    proxy = start(HttpProxy, user="u", password="p", route=lambda host, p: (address, port))
    monkeypatch.setenv("http_proxy", f"http://u:p@localhost:{proxy.port}")
    monkeypatch.setenv("NO_PROXY", "198.51.100.0/24")
    file = tmp_path / "session.toml"
    file.write_text('proxy = "auto"\n')
    session = attach("--config", str(file))
    assert curl(guest_ns, f"http://{FAKE}/page") == "page\n"
    assert curl(guest_ns, f"http://{address}:{port}/page") == "page\n"  # not port 80, and excepted
    assert proxy.asked == [("connect", FAKE, 80)]
    assert "password" not in session.output()
