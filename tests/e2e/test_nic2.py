"""The second NIC: a network of the host that the guest is on, with a real bridge, tap, nftables and DHCP.

ringnet runs in a namespace that the test made, the host: bridges, rules and routes are that one's, never the machine's.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netlab import DEADLINE, RINGNET, SERVER, Attached, Netns, Program, children, run_env, serving, sh, stage_pids, wait_gone

from pipeline import api
from pipeline.client import Client, find
from pipeline.messages import Exit

pytestmark = pytest.mark.netns

HOST = "192.168.64.1"  # ours in a network that names no subnet
CONTAINER = "172.16.7.2"


def ctl(session: Attached, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return sh(*RINGNET, "ctl", "-s", session.name, *argv, env=run_env(), check=check)


class Nic2(Attached):
    """A session with a name and a second NIC."""

    def __init__(self, host: Netns, guest: Netns, log: Path, nic2: str, *options: str, **more: object) -> None:
        self.name = guest.name
        super().__init__(host, guest, log, "--session", self.name, "--nic2", nic2, *options, **more)

    @property
    def nic2(self) -> dict[str, object]:
        return json.loads(ctl(self, "status", "--json").stdout)["nic2"]

    def counters(self, stage: str) -> dict[str, int]:
        return json.loads(ctl(self, "statistics", "--json").stdout)["counters"].get(stage, {})

    def pid_of(self, stage: str) -> int:
        return stage_pids(self.pid)[stage]


@pytest.fixture
def second(host_ns: Netns, make_netns: Callable[[str], Netns], tmp_path: Path) -> Iterator[Callable[..., Nic2]]:
    """second(nic2, *options): a session in host_ns with a guest of its own, ready to use."""
    with ExitStack() as stack:
        def start(nic2: str, *options: str, guest: Netns | None = None, **more: object) -> Nic2:
            guest = guest or make_netns("g")
            return stack.enter_context(Nic2(host_ns, guest, tmp_path / f"{guest.name}.log", nic2, *options, **more))
        yield start


def address(ns: Netns, ifname: str = "tap1") -> str:
    found = re.search(r"inet ([\d.]+)/", ns.ip("-4", "addr", "show", "dev", ifname))
    assert found, ns.ip("addr")
    return found[1]


def assert_nothing_is_lost(session: Nic2) -> None:
    """What one stage handed on the next one took, frame by frame and byte by byte. Takes NIC2 down, so that it holds still."""
    ctl(session, "cancel", "nic2")
    found = json.loads(ctl(session, "statistics", "--json").stdout)
    c = {stage: dict.fromkeys(("drop_vmnet_down", "drop_vmnet_write", "drop_storm_up", "drop_link_down"), 0) | counters
         for stage, counters in found["counters"].items()}
    fill = {r["name"]: r["fill"] for r in found["rings"]}
    tx, vmnet, rx = c["guest_tx"], c["vmnet"], c["guest_rx"]
    assert tx["nic2_up_frames"] == vmnet["vmnet_up_frames"] + fill["guest_tx->vmnet"] > 0
    assert fill["guest_tx->vmnet"] or tx["nic2_up_bytes"] == vmnet["vmnet_up_bytes"]
    assert vmnet["drop_vmnet_down"] == vmnet["drop_vmnet_write"] == vmnet["drop_storm_up"] == 0
    assert vmnet["vmnet_down_frames"] == rx["nic2_down_frames"] + rx["drop_link_down"] > 0  # down: before it was up
    assert fill["vmnet->guest_rx"] == 0


def pings(ns: Netns, to: str, *, wait: int = 20) -> bool:
    return " 1 received" in ns.run("ping", "-n", "-c1", f"-w{wait}", to, check=False).stdout


def left(host: Netns) -> list[str]:
    """What a host has of ours: interfaces, tables, routes, and forwarding that is on."""
    found = [k["ifname"] for k in json.loads(host.ip("-j", "link")) if k["ifname"].startswith(("rn-", "rnt"))]
    found += host.run("nft", "list", "tables").stdout.splitlines()
    found += [line for line in host.ip("route").splitlines() if "proto 82" in line]
    found += [f"forwarding on {f.split('/')[-2]}" for f in host.run("sh", "-c", "grep -l 1 /proc/sys/net/ipv4/conf/*/forwarding",
                                                                    check=False).stdout.splitlines()]
    return found


def test_host_and_guest_reach_each_other(second: Callable[..., Nic2], host_ns: Netns) -> None:
    session = second("shared")
    guest = session.guest
    assert address(guest, "tap0") == "10.0.2.2"
    assert pings(host_ns, address(guest)) and pings(guest, HOST)
    # the first NIC is the guest's way out, and stays it
    assert guest.ip("route", "show", "default").split()[:5] == ["default", "via", "10.0.2.1", "dev", "tap0"]
    assert session.nic2["state"] == "running" and session.nic2["gateway"] == HOST
    assert session.end() == 0, session.output()
    assert left(host_ns) == []


def test_the_host_reaches_a_container_behind_the_guest_while_nic1_is_busy(
        second: Callable[..., Nic2], host_ns: Netns, make_netns: Callable[[str], Netns], nginx: tuple[str, int, Path],
        tmp_path: Path) -> None:
    """ping and curl of 172.16.7.2 by the route, and on the way a bulk transfer through NIC1 that arrives whole."""
    session = second("shared", "--route", "172.16.0.0/12")
    guest, container = session.guest, make_netns("c")
    sh("sh", "tools/examples/container-netns", guest.name, container.name, f"{CONTAINER}/24")
    assert re.search(rf"172\.16\.0\.0/12 via {address(guest)} dev rn-shared", host_ns.ip("route"))
    server, port, root = nginx
    size = 96 << 20
    (root / "bulk").write_bytes(os.urandom(1 << 20) * (size >> 20))
    with Program(guest.argv("curl", "-sS", "-o", str(tmp_path / "got"), "-w", "%{size_download}",
                            f"http://{server}:{port}/bulk"), tmp_path / "bulk.log") as bulk:
        with serving(container.listen(CONTAINER), lambda c: c.sendall(
                b"HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\nfrom container") if c.recv(4096) else None) as (ip, tcp):
            assert pings(host_ns, CONTAINER)
            said = host_ns.run("curl", "-sS", "-w", " %{remote_ip}", f"http://{ip}:{tcp}/").stdout
        assert said == f"from container {CONTAINER}"
        assert bulk.wait() == 0 and bulk.output() == str(size)
    assert (tmp_path / "got").read_bytes() == (root / "bulk").read_bytes()
    assert session.end() == 0, session.output()
    assert left(host_ns) == []


def test_two_guests_on_one_network_meet_and_the_last_takes_it_away(second: Callable[..., Nic2], host_ns: Netns) -> None:
    one, two = second("shared,name=lab"), second("shared,name=lab")
    assert address(one.guest) != address(two.guest) and one.nic2["mac"] != two.nic2["mac"]
    assert pings(one.guest, address(two.guest)) and pings(two.guest, address(one.guest))
    assert one.end() == 0
    assert "rn-lab" in left(host_ns)
    assert pings(host_ns, address(two.guest))
    assert two.end() == 0
    assert left(host_ns) == []


def test_isolated_guests_do_not_meet(second: Callable[..., Nic2], host_ns: Netns) -> None:
    one, two = second("host,name=lab,isolate"), second("host,name=lab,isolate")
    assert pings(host_ns, address(one.guest)) and pings(host_ns, address(two.guest))
    assert not pings(one.guest, address(two.guest), wait=2) and not pings(two.guest, address(one.guest), wait=2)


@pytest.fixture
def outside(host_ns: Netns, make_netns: Callable[[str], Netns]) -> Netns:
    """A machine next to the host, which knows nothing of the host's networks."""
    machine = make_netns("o")
    host_ns.ip("link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", machine.name)
    host_ns.ip("addr", "add", "203.0.113.1/24", "dev", "up0")
    host_ns.ip("link", "set", "up0", "up")
    machine.ip("addr", "add", "203.0.113.2/24", "dev", "eth0")
    machine.ip("link", "set", "eth0", "up")
    return machine


def test_shared_goes_out_by_translation_and_nobody_comes_in(second: Callable[..., Nic2], host_ns: Netns,
                                                            outside: Netns) -> None:
    session = second("shared")
    guest = session.guest
    guest.ip("route", "add", "203.0.113.2/32", "via", HOST)
    assert pings(guest, "203.0.113.2")
    outside.ip("route", "add", "192.168.64.0/24", "via", "203.0.113.1")
    assert not pings(outside, address(guest), wait=2)
    assert session.end() == 0
    assert left(host_ns) == []  # forwarding too is as it was


def test_host_goes_nowhere_else(second: Callable[..., Nic2], host_ns: Netns, outside: Netns) -> None:
    host_ns.run("sysctl", "-q", "net.ipv4.ip_forward=1")
    guest = second("host").guest
    gateway = re.search(r"inet ([\d.]+)/", host_ns.ip("-4", "addr", "show", "dev", "rn-host"))
    assert gateway and pings(guest, gateway[1])
    guest.ip("route", "add", "203.0.113.2/32", "via", gateway[1])
    outside.ip("route", "add", "192.168.64.0/24", "via", "203.0.113.1")
    assert not pings(guest, "203.0.113.2", wait=2) and not pings(outside, address(guest), wait=2)


@pytest.mark.parametrize("given", ["bridge", "interface"])
def test_bridged_joins_a_network_with_a_dhcp_server_of_its_own(second: Callable[..., Nic2], host_ns: Netns,
                                                               make_netns: Callable[[str], Netns], tmp_path: Path,
                                                               given: str) -> None:
    machine = make_netns("m")
    host_ns.ip("link", "add", "lan0", "type", "veth", "peer", "name", "eth0", "netns", machine.name)
    machine.ip("addr", "add", "10.99.0.1/24", "dev", "eth0")
    machine.ip("link", "set", "eth0", "up")
    if given == "bridge":
        host_ns.ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
        host_ns.ip("link", "set", "lan0", "master", "br0", "up")
        host_ns.ip("addr", "add", "10.99.0.9/24", "dev", "br0")
        host_ns.ip("link", "set", "br0", "up")
    conf = tmp_path / "udhcpd.conf"
    conf.write_text(f"interface eth0\nstart 10.99.0.20\nend 10.99.0.29\nlease_file {tmp_path}/leases\n"
                    f"pidfile {tmp_path}/pid\nopt subnet 255.255.255.0\n")
    (tmp_path / "leases").touch()
    with Program(machine.argv("busybox", "udhcpd", "-f", str(conf)), tmp_path / "udhcpd.log"):
        name = {"bridge": "br0", "interface": "lan0"}[given]
        routes = ["--route", "172.16.0.0/12"] if given == "bridge" else []
        session = second(f"bridged,if={name},mac=02:00:5e:00:53:01", *routes)
        guest = session.guest
        assert address(guest).startswith("10.99.0.2")
        assert pings(guest, "10.99.0.1") and pings(machine, address(guest))
        assert address(guest).encode() and "02:00:5e:00:53:01" in machine.ip("neigh")
        if routes:  # by the address that the other DHCP server gave
            assert f"172.16.0.0/12 via {address(guest)} dev br0" in host_ns.ip("route")
        assert session.end() == 0, session.output()
    assert left(host_ns) == []
    links = host_ns.ip("-br", "link")
    assert "lan0" in links and ("br0" in links) == (given == "bridge")


def test_cancelled_and_started_again_without_touching_nic1(second: Callable[..., Nic2], host_ns: Netns) -> None:
    session = second("shared", "--route", "172.16.0.0/12")
    guest = session.guest
    was, pids = address(guest), set(children(session.pid))
    with serving(host_ns.listen(SERVER), lambda c: c.sendall(c.recv(100))) as (server, port):
        talk = guest.socket()
        talk.connect((server, port))  # a connection by NIC1 that lives through it all
        ctl(session, "cancel", "nic2")
        assert left(host_ns) == []
        assert session.nic2["state"] == "down" and "cancelled" in str(session.nic2["reason"])
        assert "NO-CARRIER" in guest.ip("link", "show", "dev", "tap1")
        ctl(session, "start", "nic2")
        assert session.nic2 == session.nic2 | {"state": "running", "reason": "", "address": f"{was}/24"}
        assert "NO-CARRIER" not in guest.ip("link", "show", "dev", "tap1")
        assert pings(host_ns, was) and f"172.16.0.0/12 via {was}" in host_ns.ip("route")
        talk.sendall(b"still here")
        assert talk.recv(100) == b"still here"
        talk.close()
    assert len(pids & set(children(session.pid))) == len(pids) - 1  # vmnet alone is another process
    assert session.end() == 0, session.output()
    assert left(host_ns) == []


def test_kill_9_of_vmnet_takes_its_host_side_away_and_nothing_else(second: Callable[..., Nic2], host_ns: Netns) -> None:
    session = second("shared", "--route", "172.16.0.0/12")
    guest = session.guest
    vmnet = session.pid_of("vmnet")
    with Client(find(session.name), timeout=DEADLINE) as client:
        client.call(api.Subscribe(events=["nic-changed"]))
        os.kill(vmnet, signal.SIGKILL)
        assert next(client.events()).state == "down"
    assert left(host_ns) == []
    assert "SIGKILL" in str(session.nic2["reason"])
    assert pings(guest, "10.0.2.1")  # NIC1
    ctl(session, "start", "nic2")
    assert pings(host_ns, address(guest)) and session.pid_of("vmnet") != vmnet
    assert session.end() == 0, session.output()
    assert re.search("second NIC down: stage vmnet ended: signal 9", session.output())


def test_kill_9_of_everything_leaves_nothing_after_the_next_start(second: Callable[..., Nic2], host_ns: Netns,
                                                                  outside: Netns) -> None:
    killed = second("shared,name=lab", "--route", "172.16.0.0/12")
    pids = [killed.pid, *children(killed.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert wait_gone(pids) == []
    there = left(host_ns)
    assert "rn-lab" in there and "rnt0" not in there  # the kernel took the tap with its last descriptor
    session = second("host,name=other")
    assert [w for w in left(host_ns) if "lab" in w or "proto 82" in w or "up0" in w] == []
    assert session.end() == 0
    assert left(host_ns) == []


def test_a_killed_session_on_a_network_in_use_leaves_no_route(second: Callable[..., Nic2], host_ns: Netns) -> None:
    living = second("shared")
    killed = second("shared", "--route", "172.16.0.0/12")
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    assert "172.16.0.0/12" in host_ns.ip("route")
    third = second("shared", "--route", "172.20.0.0/16")
    assert "172.16.0.0/12" not in host_ns.ip("route")
    assert pings(living.guest, address(third.guest))


def test_run_gives_its_command_two_interfaces(host_ns: Netns) -> None:
    done = host_ns.run(*RINGNET, "run", "-q", "--nic2", "host,subnet=192.168.77.1/28,ifname=eth1,mtu=1400", "--", "sh", "-c",
                       "ip -br -4 addr; ip link show eth1; ping -n -c1 -w20 192.168.77.1")
    assert re.search(r"tap0 +\S+ +10\.0\.2\.2/24", done.stdout) and re.search(r"eth1 +\S+ +192\.168\.77\.", done.stdout)
    assert "mtu 1400" in done.stdout and " 1 received" in done.stdout
    assert left(host_ns) == []


@pytest.mark.parametrize(("option", "says"), [
    (["--nic2", "bridged,if=nope"], "no such interface"),
    (["--nic2", "bridged,if=lo0"], "has an address"),
    (["--nic2", "host", "--route", "198.18.0.0/15"], "has a route to it already"),
    (["--nic2", "host,name=mine"], "somebody else's interface"),
])
def test_what_the_host_cannot_give_is_said_and_nothing_is_left(host_ns: Netns, guest_ns: Netns, option: list[str],
                                                               says: str) -> None:
    host_ns.ip("link", "add", "lo0", "type", "veth", "peer", "name", "lo1")
    host_ns.ip("addr", "add", "198.18.0.1/15", "dev", "lo0")
    host_ns.ip("link", "set", "lo0", "up")
    host_ns.ip("link", "add", "rn-mine", "type", "bridge")
    done = host_ns.run(*RINGNET, "attach", str(guest_ns.path), *option, check=False)
    assert done.returncode == Exit.RUNTIME and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    host_ns.ip("link", "del", "rn-mine")
    assert left(host_ns) == []


def test_its_stage_by_hand(second: Callable[..., Nic2], host_ns: Netns, tmp_path: Path) -> None:
    """Held, taken, held again, given back: a connection over the second NIC goes on, and NIC2 stays up."""
    session = second("shared")
    guest = address(session.guest)

    with Client(find(session.name)) as client:
        client.call(api.Subscribe(events=["stage"]))

        def until(wanted: str) -> None:
            for event in client.events(DEADLINE):
                if (event.stage, event.state) == ("vmnet", wanted):  # type: ignore[union-attr]
                    return
            raise AssertionError(f"the session ended before vmnet was {wanted}")

        with host_ns.listen(HOST) as listener, session.guest.socket() as inner:
            inner.bind((guest, 0))
            inner.connect(listener.getsockname())
            outer = listener.accept()[0]
            outer.settimeout(DEADLINE)
            with outer:
                ctl(session, "hold", "vmnet")
                until("vacant")
                inner.sendall(b"while nobody sits there")
                with Program(host_ns.argv(*RINGNET, "stage", "vmnet", "--session", session.name), tmp_path / "hand.log") as hand:
                    until("running")
                    assert outer.recv(100) == b"while nobody sits there"
                    outer.sendall(b"back")
                    assert inner.recv(100) == b"back"
                    assert hand.end(signal.SIGINT) == 0, hand.output()
                until("vacant")
                assert session.nic2["state"] == "running"
                ctl(session, "release", "vmnet")
                until("running")
                inner.sendall(b"and again")
                assert outer.recv(100) == b"and again"
    assert pings(host_ns, guest)


def test_its_links_can_be_captured(second: Callable[..., Nic2], host_ns: Netns, tmp_path: Path) -> None:
    """Guest side and host side, both ways."""
    session = second("shared")
    file = tmp_path / "links.pcapng"
    guest = address(session.guest)
    with Program([*RINGNET, "capture", "-s", session.name, "link2", "bridge", "--proto", "icmp", "-c", "8", "-w", str(file)],
                 tmp_path / "capture.log") as capture:
        while capture.process.poll() is None:
            assert pings(host_ns, guest)
        assert capture.wait() == 0, capture.output()
    said = sh("tshark", "-n", "-r", str(file), "-T", "fields", "-e", "frame.interface_name", "-e", "frame.packet_flags_direction",
              "-e", "ip.src").stdout.splitlines()
    assert {(name, int(way, 0), source) for name, way, source in map(str.split, said)} == {
        (name, way, source) for name in ("tap1", "bridge") for way, source in ((1, guest), (2, HOST))}
    assert sh("tshark", "-n", "-r", str(file), "-Y", "_ws.malformed").stdout == ""


def test_what_it_drops_can_be_captured(second: Callable[..., Nic2], host_ns: Netns, tmp_path: Path) -> None:
    session = second("shared,storm=1")
    reason = tmp_path / "drops.pcapng"
    with Program([*RINGNET, "capture", "-s", session.name, "bridge", "--drops", "-c", "1", "-w", str(reason)],
                 tmp_path / "drops.log") as capture:
        with host_ns.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:  # type: ignore[attr-defined]
            s.bind((next(k["ifname"] for k in json.loads(host_ns.ip("-j", "link")) if k["ifname"].startswith("rn-")), 0))
            while capture.process.poll() is None:
                s.send(b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + bytes(46))  # more than one broadcast a second
        assert capture.wait() == 0, capture.output()
    [line] = sh("tshark", "-n", "-r", str(reason), "-T", "fields", "-e", "frame.interface_name", "-e", "frame.comment").stdout.splitlines()
    assert re.match(r"bridge\tdropped: storm_down ", line), line


def test_its_rings_can_be_captured(second: Callable[..., Nic2], host_ns: Netns, tmp_path: Path) -> None:
    session = second("shared")
    file = tmp_path / "nic2.pcapng"
    with Program([*RINGNET, "capture", "-s", session.name, "guest_tx:vmnet", "vmnet:guest_rx", "--proto", "icmp", "-c", "2",
                  "-w", str(file)], tmp_path / "capture.log") as capture:
        while capture.process.poll() is None:
            assert pings(host_ns, address(session.guest))
        assert capture.wait() == 0, capture.output()
    said = sh("tshark", "-n", "-r", str(file), "-T", "fields", "-e", "frame.interface_name", "-e", "ip.src").stdout
    assert set(said.split("\n")) - {""} == {f"vmnet->guest_rx\t{HOST}", f"guest_tx->vmnet\t{address(session.guest)}"}, said


def test_a_services_that_is_started_again_still_gives_the_address(second: Callable[..., Nic2], host_ns: Netns) -> None:
    session = second("shared")
    was = address(session.guest)
    with Client(find(session.name), timeout=DEADLINE) as client:
        client.call(api.Subscribe(events=["stage"]))
        os.kill(session.pid_of("services"), signal.SIGKILL)
        while (event := next(client.events())).state != "running" or event.stage != "services":
            pass
    session.guest.ip("addr", "flush", "dev", "tap1")
    got = session.guest.run("busybox", "udhcpc", "-i", "tap1", "-n", "-q", "-f", "-s", "/bin/true")
    assert f"lease of {was} obtained" in got.stderr, got.stderr


def test_a_table_whose_bridge_somebody_deleted_goes_with_the_next_start(second: Callable[..., Nic2], host_ns: Netns) -> None:
    killed = second("shared,name=lab")
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    host_ns.ip("link", "del", "rn-lab")
    assert left(host_ns) == ["table ip ringnet_lab"]
    assert second("host").end() == 0
    assert left(host_ns) == []


def test_a_connection_outlives_the_relay_and_no_buffer_is_lost(second: Callable[..., Nic2], host_ns: Netns) -> None:
    """vmnet is killed twice in the middle of a transfer both ways, and started again: every byte arrives, in order, and
    afterwards frames pass as before."""
    session = second("shared")
    data = os.urandom(1 << 20)
    rounds, mark = 48, threading.Event()

    def echo(c: socket.socket) -> None:
        while got := c.recv(1 << 18):
            c.sendall(got)

    with serving(host_ns.listen(HOST), echo) as there, session.guest.socket() as here:
        here.connect(there)

        def send() -> None:
            for n in range(rounds):
                here.sendall(data)
                if n % 16 == 8:
                    mark.set()
            here.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        hashed, kills = hashlib.sha256(), 0
        while got := here.recv(1 << 18):
            hashed.update(got)
            if mark.is_set() and kills < 2:
                mark.clear()
                kills += 1
                os.kill(session.pid_of("vmnet"), signal.SIGKILL)
                while session.nic2["state"] != "down":  # said by its process's end, a moment later
                    pass
                ctl(session, "start", "nic2")
        sender.join()
    want = hashlib.sha256()
    for _ in range(rounds):
        want.update(data)
    assert kills == 2 and hashed.digest() == want.digest()
    assert pings(host_ns, address(session.guest))
    assert session.end() == 0
