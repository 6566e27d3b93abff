"""Namespaces and programs for the measurements that are one file each (loss, forwards, nic2, looking): all of it is gone afterwards.

Importing it runs the script again in the virtual environment if that is where it must run.
"""
from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))
venv = REPO / ".venv" / "bin" / "python"
if sys.prefix == sys.base_prefix:  # not in a virtual environment
    if not venv.exists():
        sys.exit(f"{Path(sys.argv[0]).name}: run tools/ringnet once, it installs what this needs")
    os.execv(venv, [str(venv), *sys.argv])

from shm._dataplane import lib  # noqa: E402

PATIENCE = 30.0  # s for anything but the measurement itself
_T = TypeVar("_T")


def sh(*argv: str, **more: Any) -> str:
    """Run it; returns what it printed. Raises CalledProcessError."""
    return subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, **more).stdout


@contextlib.contextmanager
def namespace(role: str) -> Iterator[str]:
    """A network namespace by name, loopback up."""
    name = f"rb{os.getpid()}{role}"
    sh("ip", "netns", "add", name)
    try:
        sh("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        sh("ip", "netns", "del", name)


def inside(name: str, make: Callable[[], _T]) -> _T:
    """What make() returns when called in that namespace: by a thread that goes there and ends."""
    made: list[_T] = []

    def go() -> None:
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if (rc := lib.rn_os_setns(fd, lib.RN_CLONE_NEWNET)) < 0:
                raise OSError(-rc, f"setns {name}")
        finally:
            os.close(fd)
        made.append(make())

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    return made[0]


def tcp_socket() -> socket.socket:
    s = socket.socket()
    s.settimeout(PATIENCE)
    return s


@contextlib.contextmanager
def program(*argv: str, **more: Any) -> Iterator[subprocess.Popen[Any]]:
    """Runs until the block ends; ^C is for this script, which then ends it."""
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, **more)
    try:
        yield child
    finally:
        child.terminate()
        child.wait(PATIENCE)


def iperf3(server: str, client: str, address: str, seconds: float, *flags: str) -> dict[str, Any]:
    """The "end" of what iperf3 says of one connection between two namespaces. A server for each: between two clients of
    one server there is a moment in which it does not listen. Exits with iperf3's own words if it fails."""
    argv = ("ip", "netns", "exec", server, "iperf3", "-s", "-1", "--forceflush")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout
        try:
            while "listening" not in (line := listener.stdout.readline()):
                if not line:
                    sys.exit(f"{Path(sys.argv[0]).name}: iperf3 -s ended")
            said = json.loads(subprocess.run(["ip", "netns", "exec", client, "iperf3", "-c", address, "-J", "-t", str(seconds),
                                              *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False).stdout)
            if "sum_received" not in said["end"]:
                sys.exit(f"{Path(sys.argv[0]).name}: iperf3: {said.get('error', 'no result')}")
        except BaseException:
            listener.terminate()
            raise
        listener.stdout.read()
    return dict(said["end"])
