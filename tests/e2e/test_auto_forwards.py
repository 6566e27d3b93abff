"""`auto`, by -t and -u and by rules added at run time: what a real guest listens on is there on the host, and goes again;
nothing of the host's is taken."""
from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import DEADLINE, GUEST, RINGNET, SERVER, Attached, Netns, PlainUser, Program, connect_error, run_env, sh
from vmlab import VmSession

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
            listed = [f for f in client.call(api.ForwardsList(owner="options")).forwards if f.auto]
            assert [f.host_port for f in listed if f.proto == "tcp"] == [early.getsockname()[1]]  # there from the start
            with guest_ns.socket() as busy, guest_ns.listen("127.0.0.1"):  # the latter only its loopback's
                busy.bind((GUEST, of_the_host.getsockname()[1]))  # a port the host uses
                busy.listen()
                late = guest_ns.listen(GUEST)
                port = late.getsockname()[1]
                made = added(client)
                assert (made.proto, made.host_port, made.guest_addr, made.owner) == ("tcp", port, GUEST, "options")
                with host_ns.socket() as s, host_ns.socket() as other:
                    s.connect(("127.0.0.1", port))
                    inside, _ = late.accept()
                    late.close()
                    gone = next(e.forward for e in client.events(timeout=DEADLINE) if isinstance(e, api.ForwardRemoved))
                    assert gone.host_port == port
                    inside.sendall(b"lives on")
                    assert s.recv(100) == b"lives on"
                    assert connect_error(other, ("127.0.0.1", port)) == 111
                    inside.close()
            with guest_ns.socket(kind=socket.SOCK_DGRAM) as server:
                server.bind(("0.0.0.0", 5353))
                made = added(client)
                assert (made.proto, made.host_port) == ("udp", 5353)
                there_and_back(host_ns, server)
            ports = {f.host_port for f in client.call(api.ForwardsList()).forwards}
            assert of_the_host.getsockname()[1] not in ports and 7000 in ports


def there_and_back(host_ns: Netns, server: socket.socket) -> None:
    """A datagram of the host to the guest's port 5353, and its answer."""
    with host_ns.socket(kind=socket.SOCK_DGRAM) as s:
        s.connect((SERVER, 5353))
        s.send(b"ping")
        data, peer = server.recvfrom(10)
        server.sendto(data, peer)
        assert s.recv(10) == b"ping"


def happened(client: Client, *, port: int) -> api.ForwardAdded | api.ForwardRemoved | api.ForwardSkipped:
    """The next event about a port."""
    for event in client.events(timeout=DEADLINE):
        if isinstance(event, api.ForwardAdded | api.ForwardRemoved | api.ForwardSkipped) and event.forward.host_port == port:
            return event
    raise AssertionError("the session ended")


def test_rules_added_and_removed_at_run_time(attach: Callable[..., Attached], host_ns: Netns, guest_ns: Netns,
                                             tmp_path: Path) -> None:
    """By `ringnet ctl`, with real servers in the guest: exclusions, a port that the host has, replacing, an end with its flows."""
    path = str(tmp_path / "api.sock")
    session = attach("--api-socket", path)

    def ctl(*args: str) -> str:
        return sh(*RINGNET, "ctl", "--api-socket", path, "forward", *args, env=run_env()).stdout

    with Client(path) as client, guest_ns.listen("0.0.0.0") as quiet, host_ns.listen("0.0.0.0") as of_the_host, \
            guest_ns.socket() as busy:
        busy.bind(("0.0.0.0", taken := of_the_host.getsockname()[1]))
        busy.listen()
        left_out = quiet.getsockname()[1]
        client.call(api.Subscribe(events=["forward-added", "forward-removed", "forward-skipped"]))
        assert ctl("add", f"auto,~{left_out}", "--owner", "box1") == "1 forward added\n"
        skipped = happened(client, port=taken)
        assert isinstance(skipped, api.ForwardSkipped) and skipped.reason == "Address already in use: the port is taken on this host"
        assert f"tcp {taken}: the guest listens there, but it is not forwarded: {skipped.reason}" in session.output()
        with Program(guest_ns.argv("python3", "-m", "http.server", "8000"), tmp_path / "http.log"):
            made = happened(client, port=8000)
            assert isinstance(made, api.ForwardAdded) and (made.forward.owner, made.forward.auto) == ("box1", True)
            assert "<title>" in host_ns.run("curl", "-sS", "http://127.0.0.1:8000/").stdout
            assert [line.split() for line in ctl("ls").splitlines()[2:]] == [
                ["tcp", f"auto,~{left_out}", "what", "it", "listens", "on", "box1"],
                ["tcp", "*:8000", "guest:8000", "(auto)", "box1"]]
        assert isinstance(happened(client, port=8000), api.ForwardRemoved)  # the server's end
        of_the_host.close()
        assert isinstance(happened(client, port=taken), api.ForwardAdded)  # tried again
        with guest_ns.socket(kind=socket.SOCK_DGRAM) as server:
            server.bind(("0.0.0.0", 5353))
            assert ctl("replace", "--owner", "box1", "-t", "auto", "-u", "auto") == "2 forwards added, 1 forward removed\n"
            assert isinstance(happened(client, port=left_out), api.ForwardAdded)  # not left out any more; `taken` was not touched
            assert (made := happened(client, port=5353)).forward.proto == "udp" and isinstance(made, api.ForwardAdded)
            there_and_back(host_ns, server)
            with host_ns.socket() as lives, host_ns.socket() as late:
                lives.connect(("127.0.0.1", left_out))
                inside, _ = quiet.accept()
                with inside:
                    assert ctl("rm", "auto", "--close-flows") == "1 forward removed\n"
                    with pytest.raises(ConnectionResetError):
                        lives.recv(1)
                    assert connect_error(late, ("127.0.0.1", left_out)) == errno.ECONNREFUSED
            assert ctl("rm", "--owner", "box1") == "1 forward removed\n" and ctl("ls") == "no forwards\n"
        assert "there is no such rule" in sh(*RINGNET, "ctl", "--api-socket", path, "forward", "rm", "auto", check=False,
                                             env=run_env()).stderr


def test_a_virtual_machine_cannot_be_followed(tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    with VmSession(None, tmp_path / "log", "--type", "qemu-stream", "--socket", str(tmp_path / "net.sock"), "--api-socket", path):
        done = sh(*RINGNET, "ctl", "--api-socket", path, "forward", "add", "127.0.0.1/auto", check=False, env=run_env())
    assert done.returncode == 1 and done.stderr == (
        "ringnet ctl: tcp 127.0.0.1/auto: what this guest listens on cannot be seen: that of a namespace (run, attach) can, where"
        " /proc shows it, that of a virtual machine cannot; name the ports, or say all\n")


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
