"""`ringnet vm` without a machine: sockets as VMMs use them, held by the test. Who comes, who comes again, and what is no
guest. (Real machines: test_vm_boot.py; framing frame by frame: tests/unit/test_link_kinds.py.)"""
from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import DEADLINE, RINGNET, Netns, run_env, sh
from vmlab import VmSession

GATEWAY, GATEWAY_MAC = bytes((10, 0, 2, 1)), bytes.fromhex("02abcd000001")


def arp_request(n: int = 2, mac: int = 1) -> bytes:
    """Who has the gateway? Says 10.0.2.n."""
    me = b"\x52\x54\0\0\0" + bytes([mac])
    return (b"\xff" * 6 + me + b"\x08\x06" + bytes.fromhex("0001080006040001") + me + bytes((10, 0, 2, n)) + bytes(6)
            + GATEWAY)


class StreamGuest:
    def __init__(self, where: str | tuple[str, int] | socket.socket) -> None:
        if isinstance(where, socket.socket):
            self.sock = where
        else:
            self.sock = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET, socket.SOCK_STREAM)
            self.sock.connect(where)
        self.sock.settimeout(DEADLINE)

    def send(self, frame: bytes) -> None:
        self.sock.sendall(struct.pack("!I", len(frame)) + frame)

    def recv(self) -> bytes:
        return self._exactly(struct.unpack("!I", self._exactly(4))[0])

    def _exactly(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            part = self.sock.recv(n - len(got))
            assert part, "ringnet closed the connection"
            got += part
        return got

    def closed(self) -> bool:
        """Wait for ringnet to close the connection."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.sock.close()


class DgramGuest:
    def __init__(self, local: Path, where: Path, hello: bytes = b"") -> None:
        self.local = local
        self.local.unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        self.sock.bind(str(local))
        self.sock.connect(str(where))
        self.sock.settimeout(DEADLINE)
        if hello:
            self.sock.send(hello)

    def send(self, frame: bytes) -> None:
        self.sock.send(frame)

    def recv(self) -> bytes:
        return self.sock.recv(1 << 17)

    def close(self) -> None:
        self.sock.close()


Guest = StreamGuest | DgramGuest


def resolves_the_gateway(guest: Guest, n: int = 2) -> bool:
    guest.send(arp_request(n))
    reply = guest.recv()
    return reply[12:14] == b"\x08\x06" and reply[22:32] == GATEWAY_MAC + GATEWAY


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.sock"


@contextlib.contextmanager
def session(tmp_path: Path, *options: str, pass_fds: tuple[int, ...] = ()) -> Iterator[VmSession]:
    with VmSession(None, tmp_path / "log", *options, pass_fds=pass_fds) as s:
        yield s


def says(s: VmSession, text: str, times: int = 1) -> bool:
    """Has it said so? What it says comes before what it does next, so that an answer of the new link is behind it."""
    assert s.output().count(text) == times, s.output()
    return True


# --- who comes ---


def test_stream_one_machine_after_another(tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path)) as s:
        assert path.stat().st_mode & 0o777 == 0o600
        for n in range(1, 4):
            guest = StreamGuest(str(path))
            assert resolves_the_gateway(guest)
            assert says(s, "a virtual machine came", n)
            guest.close()
        assert s.end() == 0
    assert not path.exists()


def test_stream_who_comes_second_waits(tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path)):
        first, second = StreamGuest(str(path)), None
        assert resolves_the_gateway(first)
        second = StreamGuest(str(path))
        second.send(arp_request(3))
        assert resolves_the_gateway(first)  # still served
        assert not select.select([second.sock], [], [], 0)[0]
        first.close()
        assert second.recv()[12:14] == b"\x08\x06"
        second.close()


def test_stream_on_a_port_of_loopback(tmp_path: Path) -> None:
    with socket.socket() as held:  # both with SO_REUSEADDR, so that it is nobody else's meanwhile
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with session(tmp_path, "--type", "qemu-stream", "--socket", f"127.0.0.1:{port}", "--one-off") as s:
            guest = StreamGuest(("127.0.0.1", port))
            assert resolves_the_gateway(guest)
            guest.close()
            assert s.wait() == 0


@contextlib.contextmanager
def dgram_machine(local: Path, where: Path, hello: bytes) -> Iterator[None]:
    """A process of its own that came in and saw the gateway resolved; killed at the end of the block."""
    said_r, said_w = os.pipe()
    held_r, held_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(held_w)
            os.write(said_w, b"1" if resolves_the_gateway(DgramGuest(local, where, hello)) else b"0")
            os.read(held_r, 1)  # ends with the test, however that ends
        finally:
            os._exit(1)
    os.close(said_w)
    os.close(held_r)
    try:
        assert os.read(said_r, 1) == b"1"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(said_r)
        os.close(held_w)


@pytest.mark.parametrize(("type_", "hello"), [("qemu-dgram", b""), ("vfkit", b"VFKT")])
def test_dgram_one_machine_after_another(type_: str, hello: bytes, tmp_path: Path, path: Path) -> None:
    """A datagram socket is not told of its peer's end: the process is watched that sent the first datagram."""
    with session(tmp_path, "--type", type_, "--socket", str(path)) as s:
        for n in range(1, 3):
            with dgram_machine(tmp_path / "vm.sock", path, hello):
                assert says(s, "a virtual machine came", n)
            waits_again(s, n + 1)
        assert s.end() == 0
    assert not path.exists()


def waits_again(s: VmSession, times: int) -> None:
    """Until it waits for a machine again, so many times by now. Its log is a file: looked at when it grows."""
    with open(s.log, "rb") as log, select.epoll() as never:
        text = b""
        for _ in range(int(DEADLINE * 100)):
            text += log.read()
            if text.count(b"waiting for a virtual machine") >= times:
                return
            assert s.process.poll() is None, text
            never.poll(0.01)
    raise AssertionError(f"it does not wait again:\n{text.decode()}")


def test_dgram_is_connected_both_ways(tmp_path: Path, path: Path) -> None:
    """A socket that is sent to by path takes 11 frames (net.unix.max_dgram_qlen) and then blocks."""
    with session(tmp_path, "--type", "qemu-dgram", "--socket", str(path)) as s:
        guest = DgramGuest(tmp_path / "vm.sock", path)
        assert resolves_the_gateway(guest)
        for _ in range(200):
            guest.send(arp_request())
        got = [guest.recv() for _ in range(200)]  # none was read meanwhile
        assert all(g[12:14] == b"\x08\x06" for g in got)
        assert s.end() == 0, s.output()  # while the machine is there
        guest.close()


def test_vfkit_needs_its_hello(tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", "vfkit", "--socket", str(path)) as s:
        wrong = DgramGuest(tmp_path / "wrong.sock", path)
        wrong.send(arp_request())
        guest = DgramGuest(tmp_path / "vm.sock", path, b"VFKT")
        assert resolves_the_gateway(guest)
        assert says(s, "a datagram that is not the hello 'VFKT'; is --type right?")
        with pytest.raises(OSError, match="not permitted"):  # one machine at a time: ours is connected
            wrong.send(arp_request())
        for g in (wrong, guest):
            g.close()


def test_dgram_from_nowhere_is_refused(tmp_path: Path, path: Path) -> None:
    """From a socket without an address, or with one that nobody answers at: said, and the next one may come."""
    with session(tmp_path, "--type", "qemu-dgram", "--socket", str(path)) as s:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless:
            nameless.sendto(arp_request(), str(path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
            gone.bind(str(tmp_path / "gone.sock"))
            os.kill(s.pid, signal.SIGSTOP)  # so that the address is gone when it is looked at
            gone.sendto(arp_request(), str(path))
            os.unlink(tmp_path / "gone.sock")
            os.kill(s.pid, signal.SIGCONT)
            end = time.monotonic() + DEADLINE
            while "which cannot be answered: No such file or directory" not in s.output():  # a file: nothing tells
                assert time.monotonic() < end, s.output()
                time.sleep(0.01)
            guest = DgramGuest(tmp_path / "vm.sock", path)
            assert resolves_the_gateway(guest)
        assert says(s, "from a socket without an address; give it a path of its own")
        guest.close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["dgram", "stream", "seqpacket"])
def test_inherited_socket(kind: int, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs, session(tmp_path, "--type", "fd", "--fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as s:
        theirs.close()
        if kind == socket.SOCK_STREAM:
            guest: Guest = StreamGuest(ours)
        else:
            guest = DgramGuest.__new__(DgramGuest)
            guest.sock = ours
            ours.settimeout(DEADLINE)
        assert resolves_the_gateway(guest)
        if kind == socket.SOCK_DGRAM:  # its end shows when something is written
            guest.send(arp_request())
        ours.close()
        if kind == socket.SOCK_DGRAM:
            s.end()
        else:
            assert s.wait() == 0, s.output()


def test_virtio_net_headers_on_request(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options = ("--type", "fd", "--fd", str(theirs.fileno()), "--vnet-hdr")
    with ours, theirs, session(tmp_path, *options, pass_fds=(theirs.fileno(),)):
        guest = StreamGuest(ours)
        guest.send(bytes(12) + arp_request())
        assert guest.recv()[12 + 12:12 + 14] == b"\x08\x06"


@pytest.mark.parametrize("type_", ["qemu-stream", "qemu-dgram"])
def test_one_off(type_: str, tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", type_, "--socket", str(path), "--one-off") as s:
        if type_ == "qemu-stream":
            guest = StreamGuest(str(path))
            assert resolves_the_gateway(guest)
            guest.close()
        else:
            with dgram_machine(tmp_path / "vm.sock", path, b""):
                pass
        assert s.wait() == 0, s.output()
    assert not path.exists()


def test_several_machines_several_sessions(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(2):
            (tmp_path / str(n)).mkdir()
            stack.enter_context(session(tmp_path / str(n), "--type", "qemu-stream", "--socket", str(tmp_path / f"s{n}")))
        guests = [StreamGuest(str(tmp_path / f"s{n}")) for n in range(2)]
        assert all(resolves_the_gateway(g) for g in guests)
        for g in guests:
            g.close()


def test_exit_fd(tmp_path: Path, path: Path) -> None:
    r, w = os.pipe()
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path), "--exit-fd", str(r), pass_fds=(r,)) as s:
        os.close(w)
        assert s.wait() == 0
    os.close(r)


# --- what is no guest ---


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_a_bad_length_ends_the_connection_not_the_session(word: int, tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path)) as s:
        bad = StreamGuest(str(path))
        bad.sock.sendall(struct.pack("!I", word) + arp_request())
        assert bad.closed()
        guest = StreamGuest(str(path))
        assert resolves_the_gateway(guest)
        assert says(s, "a length that no frame has: not this framing, or bytes were lost; the connection is closed")
        for g in (bad, guest):
            g.close()


def test_a_bad_length_on_an_inherited_socket_is_the_end(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, session(tmp_path, "--type", "fd", "--fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as s:
        ours.sendall(b"GET / HTTP/1.1\r\n\r\n")  # 0x47455420 bytes
        assert s.wait() == 1
        assert says(s, "a length that no frame has")


def test_frames_of_wrong_sizes(tmp_path: Path, path: Path) -> None:
    """Dropped and counted; what follows is served."""
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path), "-m", "1500", "--stats") as s:
        guest = StreamGuest(str(path))
        for n in (1, 13, 1519, 60000):
            guest.send(bytes(n))
        assert resolves_the_gateway(guest)
        guest.close()
        assert s.end() == 0
        assert "oversize 2" in s.output() and "runt 2" in s.output()


@pytest.mark.parametrize("type_", ["qemu-stream", "qemu-dgram"])
def test_a_guest_that_sends_without_end_and_does_not_read(type_: str, tmp_path: Path, path: Path) -> None:
    """Memory stays as it was; when it reads at last, it is served."""
    with session(tmp_path, "--type", type_, "--socket", str(path)) as s:
        guest: Guest = StreamGuest(str(path)) if type_ == "qemu-stream" else DgramGuest(tmp_path / "vm.sock", path)
        assert resolves_the_gateway(guest)
        before = memory(s)
        guest.sock.setblocking(False)
        frame = arp_request()
        burst = (struct.pack("!I", len(frame)) + frame) * 100 if type_ == "qemu-stream" else frame
        sent, left = 0, b""
        for _ in range(40_000):
            try:
                n = guest.sock.send(left or burst)
                left = (left or burst)[n:]
                sent += n
            except BlockingIOError:
                if not select.select([], [guest.sock], [], 0.05)[1]:
                    break  # it takes no more: nothing of ours reads
        assert sent > 10_000
        assert memory(s) - before < 32 << 20
        guest.sock.settimeout(DEADLINE)
        for _ in range(1000):
            assert guest.recv()[12:14] == b"\x08\x06"
        guest.close()


def memory(s: VmSession) -> int:
    """Bytes of its own of all its processes."""
    total = 0
    from netlab import children

    for pid in (s.pid, *children(s.pid)):
        text = Path(f"/proc/{pid}/status").read_text()
        total += int(text.split("RssAnon:")[1].split()[0]) * 1024
    return total


def refused(*options: str, pass_fds: tuple[int, ...] = ()) -> tuple[int, str]:
    done = subprocess.run([*RINGNET, "vm", *options], capture_output=True, text=True, timeout=DEADLINE, env=run_env(),
                          pass_fds=pass_fds)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0]


def test_descriptors_that_are_no_link(tmp_path: Path) -> None:
    r, w = os.pipe()
    with open(os.devnull) as null, open(tmp_path / "file", "w") as file, socket.socket() as tcp, socket.socket(
            socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as alone, socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM) as udp:
        listening.bind(str(tmp_path / "l"))
        listening.listen()
        for fd, why in ((r, "neither a socket nor a tap"), (file.fileno(), "neither a socket nor a tap"),
                        (null.fileno(), "is a device, but no tap"), (listening.fileno(), "a socket that listens"),
                        (alone.fileno(), "is not connected"), (tcp.fileno(), "is not connected"),
                        (udp.fileno(), "is no link to a machine")):
            code, said = refused("--type", "fd", "--fd", str(fd), pass_fds=(fd,))
            assert code == 2 and why in said, said
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        code, said = refused("--type", "qemu-stream", "--fd", str(ours.fileno()), pass_fds=(ours.fileno(),))
        assert code == 2 and "is a dgram link, not what --type qemu-stream is" in said
        for s in (ours, theirs):
            s.close()
        for fd in (r, w):
            os.close(fd)


@pytest.mark.parametrize(("options", "why"), [
    (("--type", "fd"), "--type fd: needs --fd N"),
    (("--type", "fd", "--fd", "999"), "--fd 999: not an open descriptor"),
    (("--type", "fd", "--fd", "x"), "--fd x: not a descriptor number"),
    (("--type", "qemu-stream"), "--type qemu-stream: needs --socket or --fd, one of them"),
    (("--type", "qemu-stream", "--socket", "/x", "--fd", "0"), "needs --socket or --fd, one of them"),
    (("--type", "tap", "--socket", "/x"), "invalid choice: 'tap'"),
    (("--socket", "/x"), "--type"),
    (("--type", "qemu-stream", "--socket", "/tmp/" + "x" * 103), "108 bytes long; the path of this socket has at most 107"),
    (("--type", "vfkit", "--socket", "/tmp/" + "x" * 99), "104 bytes long; the path of this socket has at most 103"),
    (("--type", "qemu-stream", "--socket", "0.0.0.0:4000"), "only loopback"),
    (("--type", "qemu-stream", "--socket", "127.0.0.1:0"), "port 0 is not within 1..65535"),
    (("--type", "qemu-stream", "--socket", "/x", "--nic2", "shared"), "needs --nic2 MODE, and one of --nic2-socket PATH and"),
])
def test_usage(options: tuple[str, ...], why: str) -> None:
    code, said = refused(*options)
    assert code == 2 and why in said, said


def test_paths_that_cannot_be_had(tmp_path: Path, path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where, why in ((tmp_path / "file", "is there already, and is no socket; remove it or give another path"),
                       (tmp_path / "no" / "where", "No such file or directory")):
        code, said = refused("--type", "qemu-stream", "--socket", str(where))
        assert code == 1 and why in said, said
    assert (tmp_path / "file").exists()
    for type_ in ("qemu-stream", "qemu-dgram", "vfkit"):
        with session(tmp_path, "--type", type_, "--socket", str(path)):
            for other in ("qemu-stream", "vfkit"):
                code, said = refused("--type", other, "--socket", str(path))
                assert code == 1 and "is in use by another process; end it or give another path" in said, said
            assert path.exists()


@pytest.mark.parametrize("type_", ["qemu-stream", "vfkit"])
def test_a_socket_left_by_a_killed_run_is_taken_over(type_: str, tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", type_, "--socket", str(path)) as s:
        s.process.kill()
        s.wait()
    assert path.exists()
    with session(tmp_path, "--type", type_, "--socket", str(path)) as s:
        assert s.end() == 0
    assert not path.exists()


def test_it_removes_only_its_own_socket(tmp_path: Path, path: Path) -> None:
    with session(tmp_path, "--type", "qemu-stream", "--socket", str(path)) as s:
        path.unlink()
        path.write_text("somebody else's")
        assert s.end() == 0
    assert path.read_text() == "somebody else's"


@pytest.mark.parametrize(("options", "mtu"), [(("--type", "qemu-stream"), 4000), (("--type", "vfkit"), 1500),
                                              (("--type", "vfkit", "-m", "9000"), 9000)])
def test_the_session_is_seen_like_any_other(options: tuple[str, ...], mtu: int, tmp_path: Path, path: Path) -> None:
    """`ringnet ctl` does not care what the guest's link is. The MTU is one that fits it, unless one is given."""
    name = f"vm{os.getpid()}"
    with session(tmp_path, *options, "--socket", str(path), "--session", name):
        said = sh(*RINGNET, "ctl", "-s", name, "status", env=run_env()).stdout
        assert "stages     5 running" in said and options[1] in said and f"MTU {mtu}," in said


@pytest.mark.netns
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["dgram", "stream"])
def test_a_second_nic(kind: int, host_ns: Netns, tmp_path: Path) -> None:
    """Whole frames between its socket and a bridge of the host, whose own address answers there."""
    pairs = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(2)]
    fds = tuple(theirs.fileno() for _, theirs in pairs)
    name = f"v{os.getpid() % 100000}"
    with VmSession(host_ns, tmp_path / "log", "--type", "fd", "--fd", str(fds[0]), "--nic2-fd", str(fds[1]), "--nic2",
                   f"host,name={name},subnet=192.168.77.1/24,mac=02:00:5e:00:53:01", pass_fds=fds) as s:
        assert "the second NIC's MAC address must be 02:00:5e:00:53:01" in s.output()
        first, second = (StreamGuest(ours) for ours, _ in pairs)
        mac, host = bytes.fromhex("02005e005301"), bytes((192, 168, 77, 1))
        ask = (b"\xff" * 6 + mac + b"\x08\x06" + bytes.fromhex("0001080006040001") + mac + bytes((192, 168, 77, 9)) + bytes(6)
               + host)
        put = StreamGuest.send if kind == socket.SOCK_STREAM else lambda g, f: g.sock.send(f)
        get = StreamGuest.recv if kind == socket.SOCK_STREAM else lambda g: g.sock.recv(65536)
        put(second, ask)
        while (reply := get(second))[12:14] != b"\x08\x06" or reply[20:22] != b"\0\2":
            pass  # what else a bridge says
        assert reply[28:32] == host and reply[:6] == mac
        put(first, arp_request())
        assert get(first)[22:32] == GATEWAY_MAC + GATEWAY
    for pair in pairs:
        for sock in pair:
            sock.close()
