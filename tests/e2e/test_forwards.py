"""Forwards with real servers in the guest and real clients on the host."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import (
    DEADLINE,
    GATEWAY,
    GUEST,
    REPO,
    SERVER,
    Attached,
    Netns,
    Program,
    pseudorandom,
    run_env,
    serving,
    sh,
    sha256_file,
)

from e2e.dns_server import DnsServer, zone
from pipeline import api
from pipeline.client import Client
from pipeline.config import make
from pipeline.forwards import Forward
from pipeline.supervisor import Link, Session
from shm._dataplane import ffi, lib

pytestmark = pytest.mark.netns

LONG = bool(os.environ.get("RINGNET_LONG"))


@contextlib.contextmanager
def nginx_in(ns: Netns, listener: socket.socket, tmp: Path) -> Iterator[Path]:
    """nginx in a namespace, on a socket that listens already; yields its document root."""
    root = tmp / "www"
    root.mkdir()
    port = listener.getsockname()[1]
    conf = tmp / "nginx.conf"
    conf.write_text(f"""
        user root; worker_processes 1; daemon off; pid {tmp}/nginx.pid; error_log stderr;
        events {{ worker_connections 1024; }}
        http {{
            access_log off; sendfile on; client_max_body_size 0; client_body_temp_path {tmp}/body;
            proxy_temp_path {tmp}/p; fastcgi_temp_path {tmp}/f; uwsgi_temp_path {tmp}/u; scgi_temp_path {tmp}/s;
            server {{ listen 0.0.0.0:{port}; root {root}; dav_methods PUT;
                      location /who {{ default_type text/plain; return 200 $remote_addr; }} }}
        }}
        """)
    os.set_inheritable(listener.fileno(), True)
    with Program(ns.argv("nginx", "-p", str(tmp), "-c", str(conf), "-e", "stderr"), tmp / "nginx.log",
                 pass_fds=(listener.fileno(),), env=run_env(NGINX=f"{listener.fileno()};")):
        yield root


@contextlib.contextmanager
def echo_udp(ns: Netns, address: str = "0.0.0.0") -> Iterator[int]:
    """A UDP echo server; yields its port."""
    stop_r, stop_w = os.pipe()
    with ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.bind((address, 0))

        def serve() -> None:
            while stop_r not in select.select([s, stop_r], [], [])[0]:
                data, peer = s.recvfrom(65535)
                s.sendto(data, peer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield s.getsockname()[1]
        os.close(stop_w)
        thread.join()
    os.close(stop_r)


def test_nginx_of_the_guest_on_the_host(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                        tmp_path: Path) -> None:
    """A guest that has sent nothing but DHCP; up and down, byte for byte."""
    with guest_ns.listen("0.0.0.0") as listener, nginx_in(guest_ns, listener, tmp_path) as root:
        attach("-t", f"8080:{listener.getsockname()[1]}")
        want = pseudorandom(root / "body", 32 << 20, b"forward")
        got = tmp_path / "got"
        host_ns.run("curl", "-sS", "--fail", "-o", got, "http://127.0.0.1:8080/body")
        assert sha256_file(got) == want
        host_ns.run("curl", "-sS", "--fail", "-T", got, "http://127.0.0.1:8080/up")
        assert sha256_file(root / "up") == want
        assert host_ns.run("curl", "-sS", "http://127.0.0.1:8080/who").stdout == GATEWAY
        assert host_ns.run("curl", "-sS", f"http://{SERVER}:8080/who").stdout == SERVER  # visible: its own address


def test_nginx_by_a_rule_added_at_run_time(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                           tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    with guest_ns.listen("0.0.0.0") as listener, nginx_in(guest_ns, listener, tmp_path) as root:
        attach("--api-socket", path)
        want = pseudorandom(root / "body", 8 << 20, b"later")
        got = tmp_path / "got"
        fetch = ("curl", "-sS", "--fail", "-o", got, "http://127.0.0.1:8080/body")
        assert host_ns.run(*fetch, check=False).returncode == 7  # not yet
        spec = f"8080:{listener.getsockname()[1]}"
        with Client(path) as client:
            client.call(api.ForwardsAdd(specs=[spec]))
            host_ns.run(*fetch)
            assert sha256_file(got) == want
            client.call(api.ForwardsRemove(specs=[spec]))
        assert host_ns.run(*fetch, check=False).returncode == 7  # no more


def test_dnsperf_to_a_dns_server_of_the_guest(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                              tmp_path: Path) -> None:
    """Through a UDP forward for some seconds (10 with --long), at a moderate rate: every query has its answer."""
    seconds, rate = 10 if LONG else 3, 500
    names = [f"host{n}.example" for n in range(50)]
    (tmp_path / "queries").write_text("".join(f"{n} A\n" for n in names))
    attach("-u", "5300:53")
    server = DnsServer(guest_ns, GUEST, zone({(n, "A"): [f"192.0.2.{i}"] for i, n in enumerate(names)}))
    try:
        said = host_ns.run("dnsperf", "-s", "127.0.0.1", "-p", "5300", "-d", tmp_path / "queries", "-l", str(seconds),
                           "-Q", str(rate), "-q", "100", "-t", "5").stdout
    finally:
        server.close()
    sent, completed, lost = (int(re.search(rf"Queries {what}:\s+(\d+)", said)[1])  # type: ignore[index]
                             for what in ("sent", "completed", "lost"))
    assert lost == 0 and completed == sent and "NOERROR" in said, said
    assert sent >= rate * seconds // 4 and len(server.asked) >= sent, said  # it did ask


def test_clients_as_the_gateway(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                tmp_path: Path) -> None:
    with guest_ns.listen("0.0.0.0") as listener, nginx_in(guest_ns, listener, tmp_path):
        attach("-t", f"{SERVER}/8080:{listener.getsockname()[1]}", "--forward-as-gateway")
        assert host_ns.run("curl", "-sS", f"http://{SERVER}:8080/who").stdout == GATEWAY
        assert host_ns.run("curl", "-sS", "http://127.0.0.1:8080/who", check=False).returncode == 7  # not there


def test_refused_by_the_guest(attach: Callable[..., Attached], host_ns: Netns) -> None:
    attach("-t", "8080")
    with host_ns.socket() as s:
        with pytest.raises(ConnectionResetError):  # by the connect already, if the reset was that quick
            s.connect(("127.0.0.1", 8080))
            s.recv(1)


def test_only_by_one_interface(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                               tmp_path: Path) -> None:
    host_ns.ip("link", "add", "other0", "type", "veth", "peer", "name", "other1")
    host_ns.ip("link", "set", "other0", "up")
    with guest_ns.listen("0.0.0.0") as listener, nginx_in(guest_ns, listener, tmp_path):
        port = listener.getsockname()[1]
        attach("-t", f"%lo/8080:{port}", "-t", f"%other0/8081:{port}")
        assert host_ns.run("curl", "-sS", "http://127.0.0.1:8080/who").stdout == GATEWAY
        assert host_ns.run("curl", "-sS", "http://127.0.0.1:8081/who", check=False).returncode == 7


def test_ipv6_on_the_hosts_side(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns, tmp_path: Path) -> None:
    host_ns.ip("addr", "add", "2001:db8::7/128", "dev", "lo")
    with guest_ns.listen("0.0.0.0") as listener, nginx_in(guest_ns, listener, tmp_path) as root, echo_udp(guest_ns) as echo:
        port = listener.getsockname()[1]
        want = pseudorandom(root / "body", 8 << 20, b"six")
        attach("-t", f"8080:{port}", "-t", f"[2001:db8::7]/8081:{port}", "-t", f"0.0.0.0/8082:{port}", "-u", f"5353:{echo}")
        for url in ("http://localhost:8080", "http://[::1]:8080", "http://[2001:db8::7]:8081"):
            assert host_ns.run("curl", "-sS", f"{url}/who").stdout == GATEWAY
            host_ns.run("curl", "-sS", "--fail", "-o", tmp_path / "got", f"{url}/body")
            assert sha256_file(tmp_path / "got") == want
        assert host_ns.run("curl", "-sS", f"http://{SERVER}:8080/who").stdout == SERVER  # IPv4 as ever
        for url in ("http://[::1]:8081", "http://127.0.0.1:8081", "http://[::1]:8082"):
            assert host_ns.run("curl", "-sS", f"{url}/who", check=False).returncode == 7
        for address in ("::1", "2001:db8::7", "::ffff:127.0.0.1"):
            with host_ns.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
                s.connect((address, 5353))
                for size in (1, 5000, 65000):
                    s.send(bytes(size))
                    assert s.recv(65535) == bytes(size), f"{size} bytes by {address}"


def test_udp_echo_of_every_size(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns) -> None:
    with echo_udp(guest_ns) as port:
        attach("-u", f"5353:{port}")
        for address in ("127.0.0.1", "127.0.0.2", SERVER):
            with host_ns.socket(kind=socket.SOCK_DGRAM) as s:
                s.connect((address, 5353))
                for size in (1, 1472, 3972, 3973, 9000, 65507):
                    sent = hashlib.shake_256(b"%d" % size).digest(size)
                    s.send(sent)
                    assert s.recv(65535) == sent, f"{size} bytes by {address}"


@pytest.mark.fault(42)
def test_a_port_that_is_taken_ends_the_start(host_ns: Netns, guest_ns: Netns) -> None:
    with host_ns.listen() as taken:
        port = taken.getsockname()[1]
        done = host_ns.run(os.sys.executable, "-P", "-m", "pipeline", "attach", guest_ns.path, "-t", f"80,{port}",
                           check=False)
        assert done.returncode == 1
        assert done.stderr.strip() == (f"ringnet: cannot forward tcp {port}: Address already in use: the port is taken"
                                       " on this host")


@pytest.mark.parametrize("way", [[], ["-R"]], ids=["to-the-guest", "from-the-guest"])
def test_iperf3(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns, way: list[str]) -> None:
    with subprocess.Popen(guest_ns.argv("iperf3", "-s", "-1", "--forceflush"), stdout=subprocess.PIPE, text=True,
                          env=run_env()) as server:
        try:
            assert server.stdout
            while "listening" not in server.stdout.readline():
                pass
            attach("-t", "5201")
            out = json.loads(host_ns.run("iperf3", "-c", "127.0.0.1", "-n", "256M", "-J", *way).stdout)
            end = out["end"]
            assert "error" not in out
            assert end["sum_received"]["bytes"] >= 256 << 20 or not way
            assert end["sum_sent"]["bytes"] >= 256 << 20
            server.wait(DEADLINE)
        finally:
            server.kill()


# --- changes under load, by the session in this process


@pytest.fixture
def session(guest_ns: Netns) -> Iterator[Session]:
    """A session of this process on a tap in the guest's namespace, configured by hand."""
    made: list[int] = []

    def tap() -> None:  # a thread of its own: setns() moves the calling thread only
        fd = os.open(guest_ns.path, os.O_RDONLY | os.O_CLOEXEC)
        lib.rn_os_setns(fd, lib.RN_CLONE_NEWNET)
        os.close(fd)
        made.append(lib.rn_tap_open(b"tap0", ffi.new("int *")))

    thread = threading.Thread(target=tap)
    thread.start()
    thread.join()
    assert made[0] >= 0
    try:
        guest_ns.ip("link", "set", "tap0", "mtu", "4000", "up")
        guest_ns.ip("addr", "add", f"{GUEST}/24", "dev", "tap0")
        guest_ns.ip("route", "add", "default", "via", GATEWAY)
        with Session(make({"quiet": True}), link=Link(fd=made[0], kind="tap", vnet=True)) as s:
            yield s
    finally:
        os.close(made[0])


def digest_server(results: list[str]) -> Callable[[socket.socket], None]:
    """Reads to the end, and sends back how many bytes and what they hash to."""
    def serve(s: socket.socket) -> None:
        h, n = hashlib.sha256(), 0
        while data := s.recv(1 << 18):
            h.update(data)
            n += len(data)
        s.sendall(f"{n} {h.hexdigest()}".encode())
        results.append(h.hexdigest())
    return serve


def fixed_port() -> int:
    """A host port that is free for TCP and UDP, and which no socket gets by asking for any (what runs beside us asks often)."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(first - 1, 1023, -1):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            for s in tcp, udp:
                s.bind(("127.0.0.1", port))
            return port
    pytest.fail("every port below the range for clients is in use")


def test_2000_changes_under_load(session: Session, guest_ns: Netns) -> None:
    """Rules come and go while a flow through another forward, and one the guest made, move data: not a byte is lost;
    and the same port is there again at once, each time."""
    stop = threading.Event()
    errors: list[BaseException] = []
    results: list[str] = []

    def stream(make_socket: Callable[[], socket.socket]) -> None:
        """Keep a connection busy until told to stop; then the other end's account must be ours."""
        try:
            with make_socket() as s:
                h, n = hashlib.sha256(), 0
                while not stop.is_set() or n < 64:
                    block = struct.pack("!I", n) * 16384
                    s.sendall(block)
                    h.update(block)
                    n += 1
                s.shutdown(socket.SHUT_WR)
                said = b""
                while part := s.recv(1000):
                    said += part
                assert said.decode() == f"{n * 65536} {h.hexdigest()}"
        except BaseException as e:
            errors.append(e)

    with guest_ns.listen("0.0.0.0") as in_guest, socket.create_server(("127.0.0.1", 0)) as on_host:
        inside = in_guest.getsockname()[1]
        outside = on_host.getsockname()[1]
        [stays] = session.change_forwards([Forward(proto="tcp", host_addr="127.0.0.1", host_port=0, guest_port=inside)])

        def from_guest() -> socket.socket:
            s = guest_ns.socket()
            s.connect((GATEWAY, outside))
            return s

        with serving(in_guest, digest_server(results)), serving(on_host, digest_server(results)):
            threads = [threading.Thread(target=stream, args=(f,), daemon=True) for f in (
                lambda: socket.create_connection(("127.0.0.1", stays.host_port), DEADLINE), from_guest)]
            for t in threads:
                t.start()
            rule = Forward(proto="tcp", host_addr="127.0.0.1", host_port=fixed_port(), guest_port=inside)
            [rule] = session.change_forwards([rule])
            datagrams = Forward(proto="udp", host_addr="127.0.0.1", host_port=rule.host_port, guest_port=inside)
            try:
                for n in range(2000):  # each is a removal and an addition
                    session.change_forwards(remove=[rule, datagrams] if n % 2 else [rule], close_flows=bool(n % 3))
                    assert session.change_forwards([rule] if n % 2 else [rule, datagrams])[0] == rule
                    if n % 100 == 0:  # and it works: an empty message comes back as such
                        with socket.create_connection(("127.0.0.1", rule.host_port), DEADLINE) as s:
                            s.shutdown(socket.SHUT_WR)
                            assert s.recv(100).startswith(b"0 ")
            finally:
                stop.set()
                for t in threads:
                    t.join(DEADLINE)
            assert not errors, errors
            assert not any(t.is_alive() for t in threads)
            assert session.poll(0)


def test_a_thousand_rules(session: Session) -> None:
    """One change, and all of them listen."""
    rules = [Forward(proto=proto, host_addr="127.0.0.1", host_port=0, guest_port=1 + n) for n in range(500)
             for proto in ("tcp", "udp")]
    made = session.change_forwards(rules)
    assert len(set(made)) == len(session.forwards()) == 1000
    for f in made[::250]:
        with contextlib.suppress(ConnectionResetError):  # the guest's refusal can be faster than connect()
            socket.create_connection(("127.0.0.1", f.host_port), DEADLINE).close()
    session.change_forwards(remove=made)
    assert session.forwards() == []


def test_the_measurement_of_a_thousand_rules_works(tmp_path: Path) -> None:
    """tools/bench/forwards.py, small: it measures something. What it says is for people to look at."""
    out = tmp_path / "samples.json"
    sh(sys.executable, REPO / "tools/bench/forwards.py", "--forwards", "50", "--seconds", "0.1", "--repeat", "1", "--json",
       out, env=run_env())
    assert all(min(samples) > 0 for samples in json.loads(out.read_text()).values())


def test_the_guests_side_has_no_say(attach: Callable[..., Attached], guest_ns: Netns) -> None:
    """What the guest can reach of a forward's port is the host's loopback, as before: a forward is no way back in."""
    attach("-t", "8080", "--no-host-loopback")
    done = sh(*guest_ns.argv("curl", "-sS", "--max-time", "5", f"http://{GATEWAY}:8080/"), check=False)
    assert done.returncode == 7
