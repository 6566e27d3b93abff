"""What the end-to-end tests stand on: network namespaces, ringnet sessions, servers, an unprivileged user.

Everything is named after the process that made it (rt<pid>n<count><role>), so that runs side by side do not
meet, and so that what a killed run left behind can be told from what is in use (`reap`). All waiting is for an
event (pidfd, pipe, socket) with a deadline that only ever ends a broken run.
"""
from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.procs import named_tree
from pipeline.topology import TOPOLOGY

REPO = Path(__file__).resolve().parent.parent
RINGNET = (sys.executable, "-P", "-m", "pipeline")
GATEWAY = "10.0.2.1"
GUEST = "10.0.2.2"
SERVER = "198.51.100.2"  # on the host side, not the gateway (RFC 5737 TEST-NET-2)
HOST_NAME = "host.ringnet.internal"
NETNS_DIR = Path("/run/netns")
DEADLINE = 60.0  # s; how long a thing that should take milliseconds may take before the test is called broken

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_count = itertools.count()


def unique(role: str) -> str:
    """A name no other process of this machine uses now: rt<pid>n<count><role>."""
    return f"rt{os.getpid()}n{next(_count)}{role}"


def sh(*argv: str | os.PathLike[str], check: bool = True, timeout: float = DEADLINE,
       input: str | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a failure carries what it printed."""
    stdin = subprocess.DEVNULL if input is None else None
    done = subprocess.run([os.fspath(a) for a in argv], text=True, capture_output=True, timeout=timeout, input=input,
                          stdin=stdin, env=env)
    if check and done.returncode:
        raise AssertionError(f"{argv}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def run_env(**more: str) -> dict[str, str]:
    """Environment for commands: C locale, the checkout importable, sbin on PATH."""
    env = dict(os.environ, LC_ALL="C.UTF-8", **more)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    env["PATH"] += ":/usr/sbin:/sbin"
    return env


class Netns:
    """A network namespace made with `ip netns`, loopback up, gone at the end of the `with` block."""

    def __init__(self, role: str) -> None:
        self.name = unique(role)

    def __enter__(self) -> Netns:
        sh("ip", "netns", "add", self.name)
        sh("ip", "-n", self.name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        remove_netns(self.name)

    @property
    def path(self) -> Path:
        return NETNS_DIR / self.name

    @property
    def etc(self) -> Path:
        """/etc/netns/NAME: `ip netns exec` puts these files over /etc."""
        path = Path("/etc/netns") / self.name
        while not path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another run took the empty /etc/netns away in between
                path.mkdir(parents=True, exist_ok=True)
        return path

    def argv(self, *argv: str | os.PathLike[str]) -> list[str]:
        inside = [*map(os.fspath, argv)]
        return ["ip", "netns", "exec", self.name, *inside]

    def run(self, *argv: str | os.PathLike[str], check: bool = True, timeout: float = DEADLINE,
            input: str | None = None) -> subprocess.CompletedProcess[str]:
        return sh(*self.argv(*argv), check=check, timeout=timeout, input=input, env=run_env())

    def ip(self, *argv: str) -> str:
        return sh("ip", "-n", self.name, *argv).stdout

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        """A socket that lives in this namespace, usable from anywhere in this process."""
        made: list[socket.socket | OSError] = []

        def make() -> None:  # a thread of its own: setns() moves the calling thread only
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _libc.setns(fd, _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"setns {self.path}")
                finally:
                    os.close(fd)
                made.append(socket.socket(family, kind, proto))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        made[0].settimeout(DEADLINE)
        return made[0]

    def listen(self, address: str = "127.0.0.1", backlog: int = 1024) -> socket.socket:
        """A TCP listener on an ephemeral port."""
        s = self.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((address, 0))
        s.listen(backlog)
        return s

    def pids(self) -> list[int]:
        return [int(p) for p in sh("ip", "netns", "pids", self.name, check=False).stdout.split()]


def remove_netns(name: str) -> None:
    sh("ip", "netns", "del", name, check=False)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        Path("/etc/netns").rmdir()  # only if empty: it was not there before


def owner(name: str) -> int | None:
    """pid in a name made by unique(), or None."""
    match = re.fullmatch(r"rt(\d+)n\d+[a-z]+", name)
    return int(match[1]) if match else None


def netns_of_ours(pid: int | None = None) -> list[str]:
    """Namespaces of this machine made by tests (of one process, if given)."""
    names = os.listdir(NETNS_DIR) if NETNS_DIR.is_dir() else []
    return [n for n in names if owner(n) is not None and (pid is None or owner(n) == pid)]


def reap() -> list[str]:
    """Remove namespaces whose maker is gone (a run that was killed), and end what runs there; returns their names."""
    dead = [n for n in netns_of_ours() if not Path(f"/proc/{owner(n)}").exists()]
    for name in dead:
        for pid in sh("ip", "netns", "pids", name, check=False).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        remove_netns(name)
    return dead


class Program:
    """A child process with its output in a file; always ended, and reaped, at the end of the `with` block."""

    def __init__(self, argv: Sequence[str], log: Path, *, pass_fds: Sequence[int] = (),
                 env: dict[str, str] | None = None) -> None:
        self.argv, self.log = list(argv), log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                            pass_fds=pass_fds, env=env or run_env(), start_new_session=True)
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def __enter__(self) -> Program:
        return self

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = DEADLINE) -> int:
        """Exit status, as subprocess gives it."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.argv} did not end in {timeout} s:\n{self.output()}") from None

    def wait_readable(self, fd: int, what: str, timeout: float = DEADLINE) -> None:
        """Until fd is readable (EOF counts). Fails at once if the process ends first without writing there."""
        ready, _, _ = select.select([fd, self.pidfd], [], [], timeout)
        if fd not in ready:
            why = f"ended with {self.process.wait(1)}" if self.pidfd in ready else f"nothing in {timeout} s"
            raise AssertionError(f"{what}: {why}: {self.argv}\n{self.output()}")

    def wait_word(self, fd: int, what: str) -> str:
        """What the process says on fd (one read). Fails if it ends without a word."""
        self.wait_readable(fd, what)
        if not (word := os.read(fd, 4096)):
            raise AssertionError(f"{what}: closed without a word: {self.argv}\n{self.output()}")
        return word.decode().strip()

    def end(self, sig: int = signal.SIGTERM, timeout: float = DEADLINE) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.wait(timeout)

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(20)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.pid, signal.SIGKILL)
                    self.process.wait(20)
        finally:
            os.close(self.pidfd)


class Attached(Program):
    """`ringnet attach` run in `host`, serving `guest`; ready when the constructor returns."""

    def __init__(self, host: Netns, guest: Netns, log: Path, *options: str, mtu: int | None = None,
                 config_net: bool = True, tap: str = "tap0") -> None:
        self.host, self.guest, self.tap = host, guest, tap
        ready, told = os.pipe()
        held, self._exit = os.pipe()
        argv = [*RINGNET, "attach", str(guest.path), "--tap", tap, "--ready-fd", str(told), "--exit-fd", str(held)]
        argv += ["--config-net"] if config_net else []
        argv += ["--mtu", str(mtu)] if mtu else []
        try:
            super().__init__(host.argv(*argv, *options), log, pass_fds=(told, held))
            os.close(told)
            told = -1
            self.wait_word(ready, "not ready")
        except BaseException:
            if hasattr(self, "pidfd"):
                super().__exit__()
            self.close_exit_fd()
            raise
        finally:
            for fd in (ready, held, told):
                if fd >= 0:
                    os.close(fd)

    def close_exit_fd(self) -> None:
        if self._exit >= 0:
            os.close(self._exit)
            self._exit = -1

    def __exit__(self, *exc: object) -> None:
        try:
            super().__exit__(*exc)
        finally:
            self.close_exit_fd()


def connect_error(s: socket.socket, address: tuple[str, int]) -> int:
    """The errno that connect() of a socket with a time-out ends with, 0 if it is connected.

    Python asks for SO_ERROR once, when poll() says so. An ICMP error was seen to be set just after that, twice in 21 000: 0,
    with the socket closed and the error waiting. A connection that stands has none waiting.
    """
    return s.connect_ex(address) or s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def children(pid: int) -> list[int]:
    """All descendants of a process, nearest first."""
    found: list[int] = []
    todo = [pid]
    while todo:
        p = todo.pop(0)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{p}/task"):
                kids = [int(c) for c in Path(f"/proc/{p}/task/{task}/children").read_text().split()]
                found += kids
                todo += kids
    return found


def stage_pids(pid: int) -> dict[str, int]:
    """pid of each stage below a process, by name. One that ends while we look is left out."""
    names = {s.name for s in TOPOLOGY.stages}
    return {name: one for one, name in named_tree(pid).items() if name in names}


def wait_gone(pids: Sequence[int], timeout: float = DEADLINE) -> list[int]:
    """Wait until none of the processes runs; returns those that still do at the deadline."""
    left = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([fd], [], [], timeout)[0]:
                left.append(pid)
        finally:
            os.close(fd)
    return left


def shm_objects() -> set[str]:
    return {n for n in os.listdir("/dev/shm") if n.startswith("rn-")}


def shm_left(timeout: float = 5.0) -> set[str]:
    """Names in /dev/shm that stay. A session of another worker has its names only while it starts: microseconds, or
    as long as a loaded machine does not let it run between making one and unlinking it."""
    left, deadline = shm_objects(), time.monotonic() + timeout
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left &= shm_objects()
    return left


@contextlib.contextmanager
def serving(listener: socket.socket, serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """Call serve(connection) in a thread for each connection until the block ends; yields the address.

    At the end every call is waited for, so the client must have closed by then. What `serve` raises is raised here,
    except that the peer went away.
    """
    errors: list[BaseException] = []
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        try:
            with connection:
                serve(connection)
        except ConnectionError:
            pass
        except BaseException as error:
            errors.append(error)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # shut down below
            connection.settimeout(DEADLINE)
            if len(threads) > 200:  # a server may live long
                threads[:] = [t for t in threads if t.is_alive()]
            threads.append(threading.Thread(target=one, args=(connection,), daemon=True))
            threads[-1].start()

    listener.settimeout(None)
    address = listener.getsockname()
    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield address
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        acceptor.join()
        listener.close()
    for thread in threads:  # not if the test has failed already
        thread.join(DEADLINE)
        if thread.is_alive():
            errors.append(AssertionError("a server still waits for its client, which closed"))
    if errors:
        raise errors[0]


def pseudorandom(path: Path, size: int, seed: bytes) -> str:
    """Write `size` bytes that do not repeat within any buffer on the way; returns their SHA-256."""
    digest = hashlib.sha256()
    block = bytearray(hashlib.shake_256(seed).digest(1 << 20))
    with open(path, "wb") as out:
        for n in itertools.count():
            left = size - (n << 20)
            if left <= 0:
                break
            block[:8] = n.to_bytes(8, "big")  # each MiB differs, so a block lost or swapped is seen
            piece = memoryview(block)[: min(left, len(block))]
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# How the sanitizers are to work (tests/sanitize): an environment made anew has it, too.
SANITIZERS = ("RINGNET_SANITIZED", "PYTHONMALLOC", "ASAN_OPTIONS", "UBSAN_OPTIONS")


class PlainUser:
    """Runs commands as a user without rights, in a private mount namespace.

    There it finds a copy of what it needs at /mnt (the checkout may lie below a directory that only root may
    enter), and a /dev/net/tun of mode 0666 as on a usual Debian. Nothing outside that namespace changes.
    """

    MOUNT = "/mnt"

    def __init__(self, tmp: Path) -> None:
        self.uid = 200_000 + os.getpid() % 100_000  # of no account, and of this worker only
        self.tree = tmp / "plain-user"
        self.python = system_python()
        self.tree.mkdir()
        if "RINGNET_SANITIZED" in os.environ:  # only that one has the runtime
            shutil.copy2(sys.executable, self.tree / "python")
            self.python = f"{self.MOUNT}/python"
        site = self.tree / "site"
        keep = shutil.ignore_patterns("__pycache__", "*.c", "*.o")
        for package in ("pipeline", "shm"):
            shutil.copytree(REPO / package, site / package, ignore=keep)
        for distribution in ("cffi", "msgspec", "multiprocess", "posix_ipc"):
            copy_distribution(distribution, site)
        sh("chmod", "-R", "a+rX,go-w", self.tree)

    def argv(self, *argv: str | os.PathLike[str], tun: bool = True, before: str = "") -> list[str]:
        """Command line that runs `argv` as the user. `before`: shell commands run as root in the namespace."""
        setup = ["set -e", "mount --make-rprivate /", f"mount --bind {shlex.quote(str(self.tree))} {self.MOUNT}",
                 "mount -t tmpfs -o mode=1777 tmpfs /tmp"]
        if tun:
            setup += ["mount -t tmpfs -o mode=755,dev tmpfs /dev/net", "mknod -m 0666 /dev/net/tun c 10 200",
                      "chmod 0666 /dev/net/tun"]
        setup += [before] if before else []
        setup += [f"cd {self.MOUNT}"]  # where the test stands may be hidden here
        sanitizers = [f"{name}={shlex.quote(os.environ[name])}" for name in SANITIZERS if name in os.environ]
        setup += [f"exec setpriv --reuid {self.uid} --regid {self.uid} --clear-groups --inh-caps=-all --reset-env "
                  f"env PYTHONPATH={self.MOUNT}/site PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/tmp "
                  f"RINGNET_TEST_CHILD={os.environ.get('RINGNET_TEST_CHILD', '')} LC_ALL=C.UTF-8 {' '.join(sanitizers)} \"$@\""]
        return ["unshare", "--mount", "sh", "-c", "\n".join(setup), "plain-user", *map(os.fspath, argv)]

    def ringnet(self, *args: str, tun: bool = True, before: str = "") -> list[str]:
        return self.argv(self.python, "-P", "-m", "pipeline", *args, tun=tun, before=before)


def system_python() -> str:
    """A Python >= 3.11 outside anyone's home, as a plain user has it (the C extension is abi3: any minor fits)."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        real = os.path.realpath(path)
        if not os.path.exists(real) or not all(os.stat(p).st_mode & 1 for p in [*map(str, Path(real).parents), real]):
            continue
        version = sh(real, "-c", "import sys; print(*sys.version_info[:2])", check=False).stdout.split()
        if tuple(map(int, version)) == sys.version_info[:2]:  # the wheels copied are of this minor version
            return real
    raise AssertionError(f"no Python {sys.version_info[0]}.{sys.version_info[1]} that every user may execute")


def copy_distribution(name: str, site: Path) -> None:
    """Copy an installed distribution's files and those of what it requires, as they lie in site-packages."""
    from importlib.metadata import distribution

    todo, seen = [name], set()
    while todo:
        one = distribution(todo.pop())
        if one.name in seen:
            continue
        seen.add(one.name)
        for file in one.files or ():
            source = Path(one.locate_file(file))
            if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
                continue
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        todo += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in one.requires or () if "extra ==" not in r]
