"""Stages of a session with a virtual machine's socket, killed and replaced by hand. On datagrams the machine sees a pause. In a
stream the successor cannot know where in a frame the dead one stood: the connection is closed, the machine connects again, and
its programs see a pause there too."""
from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, Netns, Program
from vmlab import VmSession

from e2e.test_offloading import CSUM_TSO4, Krun, to_the_gateway
from e2e.test_seats import Watch, pids, transfers
from e2e.test_vm import GATEWAY as GATEWAY_BYTES
from e2e.test_vm import GATEWAY_MAC, DgramGuest, StreamGuest, arp_request, resolves_the_gateway
from pipeline import api
from pipeline.client import Client

pytestmark = pytest.mark.usefixtures("runtime")

KILLS = 60 if os.environ.get("RINGNET_LONG") else 6  # each costs a stream's guest a retransmission time-out or two
REPLACED = "was replaced, and a stream cannot be gone on with; the connection is closed"


@contextlib.contextmanager
def session(tmp_path: Path, *options: str, host: Netns | None = None, pass_fds: tuple[int, ...] = ()
            ) -> Iterator[tuple[VmSession, Client, Watch]]:
    """A session, somebody to ask, and its stage events."""
    with (VmSession(host, tmp_path / "log", "--session", "s", "--restarts", "1000", *options, pass_fds=pass_fds) as s,
          Client(tmp_path / "run" / "s.sock") as look, Client(tmp_path / "run" / "s.sock") as listener):
        yield s, look, Watch(listener)


def kill(look: Client, watch: Watch, stage: str) -> None:
    """kill -9, and wait for the successor."""
    victim = pids(look)[stage]
    os.kill(victim, signal.SIGKILL)
    assert watch.until(stage, "running") != victim


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock


# --- in the middle of transfers ---


def moves(arriving: Path, under_way: Callable[[], bool]) -> bool:
    """Wait until more of the file has come: a kill hits a transfer that has got over the one before. False: it is over."""
    before, end = arriving.stat().st_size if arriving.exists() else 0, time.monotonic() + DEADLINE
    while under_way():
        assert time.monotonic() < end, "the download does not go on"
        if arriving.exists() and arriving.stat().st_size > before + (256 << 10):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.netns
@pytest.mark.parametrize("link", ["qemu-stream", "qemu-dgram", "vfkit", "offloading", "fd"])
def test_kill_9_under_load_loses_no_byte(link: str, host_ns: Netns, guest_ns: Netns, nginx: tuple[str, int, Path],
                                         tmp_path: Path) -> None:
    """A download and an upload, while those who read and write the link die one after the other."""
    path, local = tmp_path / "net.sock", tmp_path / "vm.sock"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    options = {"fd": ["--type", "fd", "--fd", str(theirs.fileno())], "offloading": ["--type", "vfkit", "--offloading"]}.get(
        link, ["--type", link])
    if link != "fd":
        options += ["--socket", str(path)]
    with theirs, session(tmp_path, *options, "-m", "1500", host=host_ns, pass_fds=(theirs.fileno(),)) as (s, look, watch):
        if link == "qemu-stream":
            sock = connect(path)
        elif link == "fd":
            sock = ours
        else:
            sock = DgramGuest(local, path, b"" if link == "qemu-dgram" else b"VFKT").sock
        again = (lambda: connect(path)) if link == "qemu-stream" else None
        with Krun(guest_ns, sock, offloads=CSUM_TSO4 if link == "offloading" else 0, again=again) as device:
            to_the_gateway(guest_ns)
            kills = 0
            with transfers(guest_ns, nginx, tmp_path, 12 << 20, "6M") as under_way:
                while kills < KILLS and moves(tmp_path / "got", under_way):
                    kill(look, watch, ("guest_rx", "guest_tx")[kills % 2])
                    kills += 1
            assert kills >= 2, "the transfers were over before each stage was killed once"
            guest_ns.run("ping", "-c1", f"-W{DEADLINE:.0f}", GATEWAY)
            if link == "qemu-stream":
                assert device.connections > 1 and s.output().count(REPLACED) >= device.connections - 1
            else:
                assert device.connections == 1 and "has left" not in s.output()
            device.again = None
            assert s.end() == 0, s.output()
    ours.close()


# --- a stream, in the middle of a frame ---


def taken(guest: StreamGuest) -> None:
    """Until ringnet has read all that was sent: a queue of ours that nothing tells of."""
    end = time.monotonic() + DEADLINE
    while struct.unpack("i", fcntl.ioctl(guest.sock, termios.TIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < end, "it does not read"
        time.sleep(0.002)


@pytest.mark.parametrize("before", [0, 3])
def test_the_reader_dies_within_a_frame(before: int, tmp_path: Path) -> None:
    """Half a frame is in nobody's hands then; also if it was the first. The next connection begins with a whole one."""
    path = tmp_path / "net.sock"
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path)) as (s, look, watch):
        guest = StreamGuest(str(path))
        for _ in range(before):
            assert resolves_the_gateway(guest)
        request = arp_request()
        guest.sock.sendall(struct.pack("!I", len(request)) + request[:20])
        taken(guest)
        kill(look, watch, "guest_tx")
        assert guest.closed()
        again = StreamGuest(str(path))
        assert resolves_the_gateway(again)
        assert s.output().count(f"guest_tx {REPLACED}") == 1
        for g in (guest, again):
            g.close()
        assert s.end() == 0


def ping(n: int) -> bytes:
    """An echo request of n bytes to the gateway."""
    echo = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + bytes(n)
    echo = echo[:2] + struct.pack("!H", 0xFFFF ^ plain_sum(echo)) + echo[4:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(echo), 1, 0x4000, 64, 1, 0) + bytes((10, 0, 2, 2)) + GATEWAY_BYTES
    return (GATEWAY_MAC + b"\x52\x54\0\0\0\x01\x08\0" + ip[:10] + struct.pack("!H", 0xFFFF ^ plain_sum(ip)) + ip[12:] + echo)


def plain_sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_the_writer_dies_with_a_full_socket(tmp_path: Path) -> None:
    """What came is whole frames and at most the beginning of one; then the end, and a new connection."""
    path = tmp_path / "net.sock"
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path), "-m", "65520") as (s, look, watch):
        guest = StreamGuest(str(path))
        assert resolves_the_gateway(guest)
        request = ping(60_000)
        for _ in range(500):  # whose answers nobody reads: over the 16 MiB that wait in a socket
            guest.send(request)
        taken(guest)
        kill(look, watch, "guest_rx")
        guest.sock.settimeout(DEADLINE)
        got = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := guest.sock.recv(1 << 20):
                got += part
        at = frames = 0
        while len(got) - at >= 4 and len(got) - at - 4 >= (n := int.from_bytes(got[at:at + 4], "big")):
            assert n == len(request) and got[at + 4 + 34] == 0, "an echo reply"
            at, frames = at + 4 + n, frames + 1
        assert frames > 10 and len(got) - at < 4 + len(request)
        again = StreamGuest(str(path))
        assert resolves_the_gateway(again)
        assert s.output().count(f"guest_rx {REPLACED}") == 1
        for g in (guest, again):
            g.close()
        assert s.end() == 0


def test_an_inherited_stream_has_no_next_connection(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, session(tmp_path, "--type", "fd", "--fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as (s, look, _):
        theirs.close()
        guest = StreamGuest(ours)
        assert resolves_the_gateway(guest)
        os.kill(pids(look)["guest_rx"], signal.SIGKILL)
        assert s.wait() == 1
        assert "guest_rx was replaced, and a stream cannot be gone on with" in s.output()
        assert guest.closed()
        guest.close()


@pytest.mark.parametrize("stage", ["guest_tx", "classify"])
def test_a_machine_that_comes_while_a_stage_dies(stage: str, tmp_path: Path) -> None:
    """Whatever comes first: the link that the machine brings, or the word that nobody is there to take it."""
    path = tmp_path / "net.sock"
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path)) as (s, look, watch):
        for _ in range(4):
            victim = pids(look)[stage]
            os.kill(victim, signal.SIGKILL)
            guest = StreamGuest(str(path))
            assert watch.until(stage, "running") != victim
            while True:  # a connection that was made in between may be closed, as above
                try:
                    assert resolves_the_gateway(guest)
                    break
                except (AssertionError, ConnectionError):
                    guest.close()
                    guest = StreamGuest(str(path))
            guest.close()
        assert s.end() == 0, s.output()


# --- by hand ---


@pytest.mark.parametrize("type_", ["qemu-stream", "qemu-dgram"])
def test_a_stage_by_hand(type_: str, tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    with session(tmp_path, "--type", type_, "--socket", str(path)) as (s, look, watch):
        guest = StreamGuest(str(path)) if type_ == "qemu-stream" else DgramGuest(tmp_path / "vm.sock", path)
        assert resolves_the_gateway(guest)
        look.call(api.StageHold(stage="guest_tx"))
        watch.until("guest_tx", "vacant")
        with Program([*RINGNET, "stage", "guest_tx", "--session", "s"], tmp_path / "hand.log") as by_hand:
            assert watch.until("guest_tx", "running") == by_hand.pid
            if isinstance(guest, StreamGuest):
                assert guest.closed()
                guest = StreamGuest(str(path))
            assert resolves_the_gateway(guest)
            assert (f"guest_tx {REPLACED}" in s.output()) == (type_ == "qemu-stream")
            guest.close()
            assert s.end() == 0, s.output()


def test_the_first_in_a_held_seat_goes_on_with_the_connection(tmp_path: Path) -> None:
    """Nobody was there before it, and what the machine sent waits whole."""
    path = tmp_path / "net.sock"
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path), "--hold", "guest_tx") as (s, _, watch):
        guest = StreamGuest(str(path))
        guest.send(arp_request())
        with Program([*RINGNET, "stage", "guest_tx", "--session", "s"], tmp_path / "hand.log"):
            assert guest.recv()[12:14] == b"\x08\x06"
            assert REPLACED not in s.output()
            guest.close()
            assert s.end() == 0, s.output()


# --- the second interface ---


@pytest.mark.netns
def test_the_second_interfaces_stream_is_closed_too(host_ns: Netns, tmp_path: Path) -> None:
    """When its reader is replaced, and when a length comes that no frame has; then it may come again."""
    one, two = tmp_path / "one", tmp_path / "two"
    name = f"v{os.getpid() % 100000}"
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(one), "--nic2",
                 f"host,name={name},subnet=192.168.79.1/24,mac=02:00:5e:00:53:09", "--nic2-socket", str(two),
                 host=host_ns) as (s, look, watch):
        first = StreamGuest(str(one))
        assert resolves_the_gateway(first)
        for how in ("killed", "desync"):
            second = StreamGuest(str(two))
            assert asks_the_bridge(second)
            if how == "killed":
                kill(look, watch, "guest_tx")
                assert first.closed()
            else:
                second.sock.sendall(bytes(4))
            assert second.closed()
            second.close()
        second = StreamGuest(str(two))
        assert asks_the_bridge(second)
        second.close()
        first.close()
        assert s.end() == 0, s.output()


def asks_the_bridge(guest: StreamGuest) -> bool:
    mac, host = bytes.fromhex("02005e005309"), bytes((192, 168, 79, 1))
    guest.send(b"\xff" * 6 + mac + b"\x08\x06" + bytes.fromhex("0001080006040001") + mac + bytes((192, 168, 79, 9)) + bytes(6) + host)
    while (reply := guest.recv())[12:14] != b"\x08\x06" or reply[20:22] != b"\0\2":
        pass  # what else a bridge says
    return reply[28:32] == host
