"""`ringnet ctl` on sessions that carry traffic: what it changes is so in the guest, at once."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, GUEST, RINGNET, SERVER, Attached, Netns, PlainUser, Program, connect_error, run_env, sh

from pipeline import api
from pipeline.client import Client

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("runtime")]


@pytest.fixture
def session(attach: Callable[..., Attached]) -> Attached:
    return attach("--session", "s", "--hosts", "db=192.0.2.1")


@pytest.fixture
def client(session: Attached, runtime: Path) -> Iterator[Client]:
    with Client(runtime / "s.sock") as made:
        yield made


def ctl(*args: str, status: int = 0) -> str:
    done = sh(*RINGNET, "ctl", *args, check=False, env=run_env())
    assert done.returncode == status, done.stdout + done.stderr
    assert (done.returncode == 0) == (done.stderr == "") and "Traceback" not in done.stderr
    return done.stdout + done.stderr


def dig(guest: Netns, *args: str) -> list[str]:
    return guest.run("dig", f"@{GATEWAY}", "+time=30", "+tries=1", "+short", *args).stdout.splitlines()


def test_a_forward_at_run_time(session: Attached, host_ns: Netns, guest_ns: Netns) -> None:
    listener = guest_ns.listen(GUEST)
    port = listener.getsockname()[1]
    ctl("forward", "add", f"8080:{port}")
    with host_ns.socket() as outside:
        outside.settimeout(DEADLINE)
        outside.connect(("127.0.0.1", 8080))
        listener.settimeout(DEADLINE)
        inside, _ = listener.accept()
        with inside:
            outside.sendall(b"in")
            assert inside.recv(10) == b"in"
            ctl("forward", "rm", f"8080:{port}")
            inside.sendall(b"out")  # the connection lives on
            assert outside.recv(10) == b"out"
            with host_ns.socket() as late:
                assert connect_error(late, ("127.0.0.1", 8080)) != 0
    listener.close()


def test_a_port_that_is_taken(session: Attached, host_ns: Netns) -> None:
    with host_ns.listen("0.0.0.0") as taken:
        port = taken.getsockname()[1]
        said = ctl("forward", "add", "8080", str(port), status=1)
    assert said.startswith("ringnet ctl: ") and f"{port}" in said and "in use" in said and len(said.splitlines()) == 1
    assert ctl("forward", "ls") == "no forwards\n"


def test_names_at_run_time(session: Attached, guest_ns: Netns) -> None:
    ctl("hosts", "add", "web=192.0.2.10", "v.example=192.0.2.11,2001:db8::11", "*.apps.example=192.0.2.12",
        "--domain", "dev.example")
    assert dig(guest_ns, "web.ringnet.internal") == dig(guest_ns, "web") == ["192.0.2.10"]
    assert dig(guest_ns, "v.example", "AAAA") == ["2001:db8::11"]
    assert dig(guest_ns, "a.b.apps.example") == ["192.0.2.12"]
    assert dig(guest_ns, "-x", "192.0.2.11") == ["v.example."]
    assert "status: NXDOMAIN" in guest_ns.run("dig", f"@{GATEWAY}", "x.dev.example").stdout
    ctl("hosts", "add", "db=192.0.2.2", "--owner", "box")
    assert sorted(dig(guest_ns, "db")) == ["192.0.2.1", "192.0.2.2"]
    ctl("hosts", "rm", "--owner", "box")
    ctl("hosts", "rm", "web", "v.example")
    assert dig(guest_ns, "db") == ["192.0.2.1"] and dig(guest_ns, "web.ringnet.internal") == []
    assert "web" not in ctl("hosts", "ls")


def test_thousands_of_names(session: Attached, client: Client, guest_ns: Netns) -> None:
    for first in range(0, 4000, 1000):
        names = {f"n{n}.many.example": [f"192.0.{2 + n // 250}.{1 + n % 250}"] for n in range(first, first + 1000)}
        assert client.call(api.HostsAdd(names=names, owner="many")).added == 1000
    assert dig(guest_ns, "n0.many.example") == ["192.0.2.1"] and dig(guest_ns, "n3999.many.example") == ["192.0.17.250"]
    assert client.call(api.HostsRemove(owner="many")).removed == 4000
    assert dig(guest_ns, "n3999.many.example") == []


def test_two_clients_at_once_see_one_truth(session: Attached, runtime: Path) -> None:
    """Both want the same port again and again: whoever gets it has it, alone, until it gives it back."""
    got: dict[str, int] = {}
    errors: list[BaseException] = []

    def contend(owner: str) -> None:
        try:
            with Client(runtime / "s.sock") as c:
                while got.get(owner, 0) < 30:
                    try:
                        c.call(api.ForwardsAdd(specs=["127.0.0.1/9000:80"], owner=owner))
                    except api.ApiError as e:
                        assert e.code == api.Code.CONFLICT, e
                        continue
                    got[owner] = got.get(owner, 0) + 1
                    assert [f.owner for f in c.call(api.ForwardsList()).forwards] == [owner]
                    assert c.call(api.ForwardsRemove(owner=owner)).removed == 1
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=contend, args=(o,), daemon=True) for o in ("one", "two")]
    for t in threads:
        t.start()
    for t in threads:
        t.join(DEADLINE)
    assert not errors, errors
    assert not any(t.is_alive() for t in threads) and got == {"one": 30, "two": 30}
    assert ctl("forward", "ls") == "no forwards\n"


def test_close_resets_both_sides(session: Attached, client: Client, host_ns: Netns, guest_ns: Netns) -> None:
    listener = host_ns.listen(SERVER)
    with guest_ns.socket() as inside, guest_ns.socket() as other:
        for sock in (inside, other):
            sock.settimeout(DEADLINE)
            sock.connect(listener.getsockname())
        outside, outside_other = listener.accept()[0], listener.accept()[0]
        flow = next(f for f in client.call(api.FlowsList()).flows if f.guest_port == inside.getsockname()[1])
        assert (flow.proto, flow.state, flow.peer) == ("tcp", "established", SERVER)
        ctl("close", flow.flow)
        for sock in (inside, outside):
            with pytest.raises(ConnectionResetError):
                sock.settimeout(DEADLINE)
                sock.recv(1)
        other.sendall(b"lives")
        outside_other.settimeout(DEADLINE)
        assert outside_other.recv(10) == b"lives"
        assert "that flow is gone" in ctl("close", flow.flow, status=1)
    for sock in (outside, outside_other, listener):
        sock.close()


def test_a_udp_mapping_is_closed(session: Attached, client: Client, host_ns: Netns, guest_ns: Netns) -> None:
    with host_ns.socket(kind=socket.SOCK_DGRAM) as server, guest_ns.socket(kind=socket.SOCK_DGRAM) as inside:
        server.bind((SERVER, 0))
        server.settimeout(DEADLINE)
        inside.sendto(b"1", server.getsockname())
        _, first = server.recvfrom(10)
        (flow,) = client.call(api.FlowsList(proto="udp")).flows
        client.call(api.FlowsClose(flow=flow.flow))
        assert client.call(api.FlowsList(proto="udp")).flows == []
        inside.sendto(b"2", server.getsockname())  # a new one, by the next datagram
        assert server.recvfrom(10)[0] == b"2"
        (again,) = client.call(api.FlowsList(proto="udp")).flows
        assert again.flow != flow.flow


def test_events_of_the_stages(session: Attached, client: Client, host_ns: Netns, guest_ns: Netns) -> None:
    client.call(api.Subscribe())
    with host_ns.listen(SERVER) as closed:
        port = closed.getsockname()[1]
    with guest_ns.socket() as inside:
        assert connect_error(inside, (SERVER, port)) != 0
    event = next(client.events(timeout=DEADLINE))
    assert isinstance(event, api.FlowRefused)
    assert (event.proto, event.guest, event.peer, event.peer_port) == ("tcp", GUEST, SERVER, port)
    assert event.reason == "Connection refused"
    guest_ns.run("udhcpc", "-i", session.tap, "-n", "-q", "-f", "-s", "/bin/true", "-x", "hostname:box")
    event = next(client.events(timeout=DEADLINE))
    assert isinstance(event, api.LeaseGiven) and (event.hostname, event.seconds) == ("box", 86400)
    os.kill(next(s.pid for s in client.call(api.Stages()).stages if s.name == "classify"), signal.SIGKILL)
    states: list[tuple[str, str]] = []
    for event in client.events(timeout=DEADLINE):
        if isinstance(event, api.StageChanged):
            states.append((event.stage, event.state))
        if states[-1:] == [("classify", "running")]:  # its successor
            break
    assert states[0] == ("classify", "vacant") and {s for s, _ in states} == {"classify"}


def test_many_refusals_are_told_at_a_bounded_rate(session: Attached, client: Client, guest_ns: Netns) -> None:
    """A guest that scans ports keeps nobody busy: 32 at once, 20 a second, and a count of the rest."""
    client.call(api.Subscribe(events=["flow-refused"]))
    refused = told = lost = 0
    while refused < 400 or told + lost < 400:  # what was lost is said with the next one that is told
        with guest_ns.socket() as sock:
            assert connect_error(sock, (SERVER, 1 + refused % 1000)) != 0
        refused += 1
        if refused < 400:
            continue
        with contextlib.suppress(TimeoutError):
            for event in client.events(timeout=0.1):
                told += isinstance(event, api.FlowRefused)
                lost += event.count if isinstance(event, api.Lost) else 0
    assert 32 <= told < refused and told + lost <= refused


def test_log_level(session: Attached, client: Client) -> None:
    assert "Pong" not in session.output() and "Answer" not in session.output()
    ctl("log", "debug")
    client.call(api.FlowsList())
    ctl("hosts", "add", "x=192.0.2.1")
    assert "services: Answer" in session.output()
    ctl("log", "warning")
    before = session.output().count("services: Answer")
    ctl("hosts", "add", "x=192.0.2.2")
    assert session.output().count("services: Answer") <= before + 1  # of the change of level itself


def test_cancel_ends_the_session(session: Attached, runtime: Path) -> None:
    assert "no NIC2" in ctl("cancel", "nic2", status=1)
    assert ctl("cancel") == ""
    assert session.wait() == 0
    assert os.listdir(runtime) == []


def test_two_sessions_and_one_that_was_killed(session: Attached, attach: Callable[..., Attached], host_ns: Netns,
                                              make_netns: Callable[[str], Netns], tmp_path: Path,
                                              runtime: Path) -> None:
    with Attached(host_ns, make_netns("g2"), tmp_path / "two.log", "--session", "two") as two:
        assert [json.loads(line)["session"] for line in ctl("ls", "--json").splitlines()] == ["s", "two"]
        assert "several sessions run: s, two; name one with -s" in ctl("status", status=1)
        assert ctl("-s", "two", "status").startswith(f"session    two (running), supervisor's pid {two.pid}")
        assert "there is no session three; there are s, two" in ctl("status", "-s", "three", status=1)
        again = sh(*host_ns.argv(*RINGNET, "run", "--session", "two", "--", "true"), check=False, env=run_env())
        assert again.returncode == 1
        assert again.stderr == "ringnet: --session two: in use by a session that runs\n"
        two.process.kill()
        two.wait()
        assert [json.loads(line)["session"] for line in ctl("ls", "--json").splitlines()] == ["s"]
        assert os.listdir(runtime) == ["s.sock"]


def test_api_socket(attach: Callable[..., Attached], tmp_path: Path, runtime: Path) -> None:
    path = str(tmp_path / "here.sock")
    attach("--api-socket", path)
    assert json.loads(ctl("--api-socket", path, "status", "--json"))["socket"] == path
    assert json.loads(ctl("status", "--json"))["socket"] == path  # by its name too


def test_no_api(attach: Callable[..., Attached], runtime: Path) -> None:
    attach("--api-socket", "none")
    assert os.listdir(runtime) == []
    assert ctl("ls") == "no session runs\n"


def test_a_plain_users_session(plain_user: PlainUser, host_ns: Netns) -> None:
    """No runtime directory of its own: one in /tmp, and nothing left in it."""
    script = f"""
        ringnet() {{ {plain_user.python} -P -m pipeline "$@"; }}
        mkfifo /tmp/go
        ringnet run -q --session mine -- sh -c 'read line < /tmp/go; exit 5' &
        until ringnet ctl ls --json 2>/dev/null | grep -q mine; do kill -0 $! || exit 1; done
        cd /tmp/ringnet-$(id -u) && stat -c '%a %F' . mine.sock
        ringnet ctl hosts add x=192.0.2.1
        echo go > /tmp/go
        wait $!
        echo ended with $?, left: $(ls -A)
        """
    out = sh(*host_ns.argv(*plain_user.argv("sh", "-c", script)), env=run_env()).stdout
    assert out.splitlines() == ["700 directory", "600 socket", "1 entry added", "ended with 5, left:"]


@pytest.mark.parametrize(("args", "says"), [
    ((), "the following arguments are required: COMMAND"),
    (("frobnicate",), "invalid choice"),
    (("forward", "rm"), "name ports, or --owner"),
    (("forward", "add", "8080x"), "expected a port"),
    (("hosts", "add", "x"), "expected NAME=IP"),
    (("hosts", "add", "x=1.2.3"), "x: 1.2.3: not an IP address, nor a name"),
    (("log", "loud"), "invalid choice"),
    (("close", "x"), "flow"),
    (("events", "sunrise"), "no such event"),
])
def test_wrong_usage(session: Attached, args: tuple[str, ...], says: str) -> None:
    said = ctl(*args, status=2)
    assert says in said and len(said.splitlines()) == 1


def test_no_session() -> None:
    assert ctl("status", status=1) == "ringnet ctl: no session runs (of this user)\n"
    assert "there is no such socket" in ctl("--api-socket", "/nonexistent", "status", status=1)


def test_a_hostile_client_does_not_disturb_traffic(session: Attached, runtime: Path, host_ns: Netns, guest_ns: Netns,
                                                   tmp_path: Path) -> None:
    """Garbage, huge lines and floods of changes while a file moves: not a byte is lost, and the API still answers."""
    data = os.urandom(8 << 20)
    listener = host_ns.listen(SERVER)
    path = str(runtime / "s.sock")
    script = ("import socket,sys\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])))\nn=0\n"
              "while d:=s.recv(1<<16):\n n+=len(d)\nprint(n)")
    with Program(guest_ns.argv("python3", "-c", script, SERVER, str(listener.getsockname()[1])),
                 tmp_path / "reader.log") as reader:
        server, _ = listener.accept()
        deaf = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for sock in deaf:
            sock.connect(path)
            sock.setblocking(False)
        for start in range(0, len(data), 1 << 20):
            for n, sock in enumerate(deaf):
                junk = os.urandom(1 << 15) if n % 2 else b'{"call":"statistics"}\n' * 1000
                try:
                    sock.send(junk)
                except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                    continue
            server.sendall(data[start:start + (1 << 20)])
            assert json.loads(ctl("status", "--json"))["state"] == "running"
        server.close()
        assert reader.wait() == 0 and reader.output().split() == [str(len(data))]
        for sock in deaf:
            sock.close()
    listener.close()
