"""-t auto and -u auto: what a real guest listens on is there on the host, and goes again; nothing of the host's is taken."""
from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import DEADLINE, GUEST, RINGNET, SERVER, Attached, Netns, PlainUser, Program, run_env, sh

from pipeline import api
from pipeline.client import Client

pytestmark = pytest.mark.netns


def added(client: Client) -> api.ForwardInfo:
    """The next forward that is made. By the event; no waiting for a second to pass."""
    return next(e.forward for e in client.events(timeout=DEADLINE) if isinstance(e, api.ForwardAdded))


def test_what_the_guest_listens_on(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                   tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    with guest_ns.listen("0.0.0.0") as early, host_ns.listen("0.0.0.0") as of_the_host:
        attach("-t", "auto", "-u", "auto", "-t", "7000:7001", "--api-socket", path)
        with Client(path) as client:
            client.call(api.Subscribe(events=["forward-added", "forward-removed"]))
            listed = client.call(api.ForwardsList(owner="auto")).forwards
            assert [f.host_port for f in listed if f.proto == "tcp"] == [early.getsockname()[1]]  # there from the start
            with guest_ns.socket() as busy, guest_ns.listen("127.0.0.1"):  # the latter only its loopback's
                busy.bind((GUEST, of_the_host.getsockname()[1]))  # a port the host uses
                busy.listen()
                late = guest_ns.listen(GUEST)
                port = late.getsockname()[1]
                made = added(client)
                assert (made.proto, made.host_port, made.guest_addr, made.owner) == ("tcp", port, GUEST, "auto")
                with host_ns.socket() as s, host_ns.socket() as other:
                    s.connect(("127.0.0.1", port))
                    inside, _ = late.accept()
                    late.close()
                    gone = next(e.forward for e in client.events(timeout=DEADLINE) if isinstance(e, api.ForwardRemoved))
                    assert gone.host_port == port
                    inside.sendall(b"lives on")
                    assert s.recv(100) == b"lives on"
                    assert other.connect_ex(("127.0.0.1", port)) == 111
                    inside.close()
            with guest_ns.socket(kind=socket.SOCK_DGRAM) as server:
                server.bind(("0.0.0.0", 5353))
                made = added(client)
                assert (made.proto, made.host_port) == ("udp", 5353)
                with host_ns.socket(kind=socket.SOCK_DGRAM) as s:
                    s.connect((SERVER, 5353))
                    s.send(b"ping")
                    data, peer = server.recvfrom(10)
                    server.sendto(data, peer)
                    assert s.recv(10) == b"ping"
            ports = {f.host_port for f in client.call(api.ForwardsList()).forwards}
            assert of_the_host.getsockname()[1] not in ports and 7000 in ports


def test_a_command_of_run(host_ns: Netns, tmp_path: Path) -> None:
    """As a container's user has it: nothing is said but auto, and the server is there."""
    path, fifo = str(tmp_path / "api.sock"), str(tmp_path / "up")
    os.mkfifo(fifo)
    up = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with Program(host_ns.argv(*RINGNET, "run", "-q", "-t", "127.0.0.1/auto,~8001", "--api-socket",
                              path, "--", "sh", "-c", "echo up > $0; python3 -m http.server 8001 & exec python3 -m http.server 8000", fifo),
                 tmp_path / "run.log", env=run_env()) as program:
        program.wait_word(up, "no command")
        os.close(up)
        with Client(path) as client:
            client.call(api.Subscribe(events=["forward-added"]))
            listed = client.call(api.ForwardsList()).forwards or [added(client)]
            assert [(f.host_addr, f.host_port) for f in listed] == [("127.0.0.1", 8000)]
        assert "<title>" in host_ns.run("curl", "-sS", "http://127.0.0.1:8000/").stdout
        program.end()


def test_a_plain_users_guest(plain_user: PlainUser, host_ns: Netns) -> None:
    script = f"""
        ringnet() {{ {plain_user.python} -P -m pipeline "$@"; }}
        mkfifo /tmp/end
        ringnet run -q --session mine -t auto -- sh -c 'python3 -m http.server 8000 2>/dev/null & read x < /tmp/end; kill $!' &
        until ringnet ctl -s mine forward ls 2>/dev/null | grep -q 8000; do kill -0 $! || exit 1; done
        curl -sS http://localhost:8000/ | grep -o '<title>'
        echo > /tmp/end
        wait $!
        """
    assert sh(*host_ns.argv(*plain_user.argv("sh", "-c", script)), env=run_env()).stdout == "<title>\n"
