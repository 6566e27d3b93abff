"""`ringnet passt` and `ringnet slirp4netns`: as scripts call the originals."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import DEADLINE, GATEWAY, RINGNET, Netns, Program, run_env, wait_gone

from e2e.test_vm import StreamGuest, resolves_the_gateway


def test_passt_goes_to_the_background_and_ends_with_its_machine(tmp_path: Path) -> None:
    path, pid_file, pcap = tmp_path / "passt.sock", tmp_path / "pid", tmp_path / "link.pcapng"
    argv = [*RINGNET, "passt", "--one-off", "--socket", str(path), "--pid", str(pid_file), "-m", "1500", "-p", str(pcap), "-q",
            "-a", "10.0.2.2", "-n", "24", "-g", "10.0.2.1", "-t", "none", "-u", "none", "-D", "192.0.2.53"]
    # It lets go of our output too: capture_output waits for the end of the pipes.
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, env=run_env())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pid_file.read_text())
    guest = StreamGuest(str(path))
    assert resolves_the_gateway(guest)
    guest.close()
    assert wait_gone([pid]) == []
    assert not path.exists() and not pid_file.exists() and pcap.stat().st_size > 100


def test_passt_in_the_foreground(tmp_path: Path) -> None:
    path = tmp_path / "passt.sock"
    with Program([*RINGNET, "passt", "-f", "-s", str(path)], tmp_path / "log") as p:
        guest = connect_when_there(path, p)
        assert resolves_the_gateway(guest)
        guest.close()
        assert p.end(signal.SIGTERM) == 0
        assert "waiting for a virtual machine" in p.output()


def connect_when_there(path: Path, p: Program) -> StreamGuest:
    """The socket's directory is watched: a file appears when it is bound, and is listened to at once."""
    import ctypes
    import select
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        libc.inotify_add_watch(fd, str(path.parent).encode(), 0x100)  # IN_CREATE
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            try:
                return StreamGuest(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                ready, _, _ = select.select([fd, p.pidfd], [], [], 0.05)
                assert p.pidfd not in ready, p.output()
                if fd in ready:
                    os.read(fd, 65536)
        raise AssertionError(p.output())
    finally:
        os.close(fd)


@pytest.mark.parametrize(("options", "why"), [
    (("--map-guest-addr", "10.0.0.1"), "unrecognized arguments: --map-guest-addr"),
    (("-4",), "unrecognized arguments: -4"),
    (("--mac-addr", "02:00:00:00:00:01"), "unrecognized arguments: --mac-addr"),
    (("-m", "70000"), "--mtu 70000: not within"),
    (("-s", "/x", "-F", "0"), "-s and -F: give one of them"),
])
def test_passt_refuses_by_name(options: tuple[str, ...], why: str) -> None:
    done = subprocess.run([*RINGNET, "passt", *options], capture_output=True, text=True, timeout=DEADLINE, env=run_env())
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1


def test_passt_says_in_the_foreground_what_fails_in_the_background(tmp_path: Path) -> None:
    done = subprocess.run([*RINGNET, "passt", "-s", str(tmp_path)], capture_output=True, text=True, timeout=DEADLINE,
                          env=run_env())
    assert done.returncode == 1 and "is there already, and is no socket" in done.stderr


@pytest.mark.netns
def test_slirp4netns(host_ns: Netns, make_netns: Callable[[str], Netns], tmp_path: Path) -> None:
    guest = make_netns("g")
    ready, told = os.pipe()
    held, ours = os.pipe()
    argv = [*RINGNET, "slirp4netns", "-c", "-m", "65520", "--netns-type=path", f"--ready-fd={told}", f"--exit-fd={held}",
            "--disable-host-loopback", str(guest.path), "tap7"]
    with Program(host_ns.argv(*argv), tmp_path / "log", pass_fds=(told, held)) as p:
        os.close(told)
        os.close(held)
        assert p.wait_word(ready, "not ready") == "1"
        assert "inet 10.0.2.100/24" in guest.ip("-4", "addr", "show", "tap7")
        assert "mtu 65520" in guest.ip("link", "show", "tap7")
        assert "default via 10.0.2.2" in guest.ip("route")
        assert guest.run("ping", "-c", "1", "-W", "30", "10.0.2.2").returncode == 0
        os.close(ours)
        assert p.wait() == 0, p.output()
    os.close(ready)
    assert GATEWAY not in guest.ip("route")


@pytest.mark.parametrize(("options", "why"), [
    (("-6", "1", "tap0"), "-6: not supported"),
    (("--enable-sandbox", "1", "tap0"), "--enable-sandbox: not supported: ringnet's stages drop their rights always"),
    (("--api-socket", "/x", "1", "tap0"), "--api-socket: not supported"),
    (("--what", "1", "tap0"), "unrecognized arguments: --what"),
    (("--cidr=10.0.2.0/26", "1", "tap0"), "--cidr 10.0.2.0/26: has no address .100 for the guest"),
    (("--cidr=fd00::/64", "1", "tap0"), "--cidr fd00::/64: not an IPv4 network"),
    (("/run/netns/x", "tap0"), "not a process id; for a path say --netns-type=path"),
    (("1", "an-interface-name-too-long"), "TAPNAME an-interface-name-too-long"),
])
def test_slirp4netns_refuses_by_name(options: tuple[str, ...], why: str) -> None:
    done = subprocess.run([*RINGNET, "slirp4netns", *options], capture_output=True, text=True, timeout=DEADLINE, env=run_env())
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
