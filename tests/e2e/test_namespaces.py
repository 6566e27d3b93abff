"""What `ringnet run` and `ringnet attach` do with namespaces, signals and terminals, where it is easy to get wrong."""
from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netlab import (
    DEADLINE,
    GATEWAY,
    GUEST,
    RINGNET,
    Attached,
    Netns,
    PlainUser,
    Program,
    children,
    run_env,
    sh,
    stage_pids,
    wait_gone,
)

pytestmark = pytest.mark.netns


# -- attach


@pytest.fixture
def container(plain_user: PlainUser, tmp_path: Path) -> Iterator[Program]:
    """A rootless container's essence: a process of a plain user in a user and network namespace of its own."""
    r, w = os.pipe()
    argv = plain_user.argv("unshare", "--user", "--map-root-user", "--net", plain_user.python, "-c",
                           f"import os, signal; os.write({w}, b'up'); signal.pause()")
    with Program(argv, tmp_path / "container.log", pass_fds=(w,)) as program:
        os.close(w)
        program.wait_readable(r, "the container did not start")
        os.close(r)
        yield program


@pytest.mark.parametrize("who", ["its user", "root"])
def test_attach_to_a_rootless_container(container: Program, plain_user: PlainUser, host_ns: Netns, tmp_path: Path,
                                        who: str) -> None:
    """The network belongs to a user namespace, which is entered first."""
    words = ("attach", str(container.pid), "--tap", "eth0", "--config-net")
    argv = plain_user.ringnet(*words) if who == "its user" else [*RINGNET, *words]
    ready, told = os.pipe()
    with Program(host_ns.argv(*argv, "--ready-fd", str(told)), tmp_path / "attach.log", pass_fds=(told,)) as session:
        os.close(told)
        session.wait_readable(ready, "not ready")
        assert os.read(ready, 16) == b"1", session.output()
        os.close(ready)
        enter = ["nsenter", "-t", str(container.pid), "-U", "-n", "--preserve-credentials"]
        assert f"inet {GUEST}/24" in sh(*enter, "ip", "-4", "addr", "show", "dev", "eth0").stdout
        assert f"default via {GATEWAY} dev eth0" in sh(*enter, "ip", "route").stdout
        os.kill(container.pid, signal.SIGKILL)
        assert session.wait() == 0, session.output()  # its process is gone: nothing more to serve


def test_attach_ends_when_its_interface_is_removed(guest_session: Attached, guest_ns: Netns) -> None:
    pids = children(guest_session.pid)
    guest_ns.ip("link", "del", "tap0")
    assert guest_session.wait() == 1
    assert "tap0 was removed" in guest_session.output()
    assert wait_gone(pids) == []


def test_attach_is_ready_only_once_and_closes_the_descriptor(host_ns: Netns, guest_ns: Netns, tmp_path: Path) -> None:
    ready, told = os.pipe()
    with Program(host_ns.argv(*RINGNET, "attach", str(guest_ns.path), "--tap", "tap0", "--ready-fd", str(told)),
                 tmp_path / "log", pass_fds=(told,)) as session:
        os.close(told)
        with open(ready, "rb") as f:
            assert f.read() == b"1"  # and its end, while the session lives
        assert session.process.poll() is None


# -- run: what the guest finds


RESOLV = {
    "a file": "true",
    "a link": "cp -a /etc /tmp/etc; cp --remove-destination -L /etc/resolv.conf /tmp/real; rm -f /tmp/etc/resolv.conf;"
              " ln -s /tmp/real /tmp/etc/resolv.conf; mount --bind /tmp/etc /etc",
    "a link to nowhere": "cp -a /etc /tmp/etc; rm -f /tmp/etc/resolv.conf; ln -s ../run/no/such /tmp/etc/resolv.conf;"
                         " mount --bind /tmp/etc /etc",
    "missing": "cp -a /etc /tmp/etc; rm -f /tmp/etc/resolv.conf; mount --bind /tmp/etc /etc",
}


@pytest.mark.parametrize("what", RESOLV)
def test_the_guest_has_its_own_resolv_conf(plain_user: PlainUser, host_ns: Netns, what: str) -> None:
    """Whatever /etc/resolv.conf is on the host; which keeps its own."""
    before = f"umount -l /etc/resolv.conf || true; {RESOLV[what]}"  # what `ip netns exec` put there
    argv = plain_user.ringnet("run", "-q", "--", "cat", "/etc/resolv.conf", before=before)
    out = sh(*host_ns.argv(*argv), env=run_env()).stdout
    assert f"nameserver {GATEWAY}" in out.splitlines(), out


def test_the_hosts_files_are_as_they_were(host_ns: Netns, tmp_path: Path) -> None:
    before = (host_ns.etc / "resolv.conf").read_text()
    mounts = mounted()
    sh(*host_ns.argv(*RINGNET, "run", "--", "true"), env=run_env())
    assert (host_ns.etc / "resolv.conf").read_text() == before
    assert mounted() == mounts


def mounted() -> list[str]:
    """Mount points here, without the namespaces that tests beside this one make."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if "/run/netns/" not in line]


LEFT_BEHIND = "(sleep 1000 & echo left); setsid sleep 1000 & echo done"


@pytest.mark.parametrize("proc", ["visible", "masked"])
def test_what_the_command_leaves_behind_ends_with_it(plain_user: PlainUser, host_ns: Netns, proc: str) -> None:
    """By the PID namespace; or by a subreaper where there can be none, because parts of /proc are hidden."""
    before = "mount -t tmpfs tmpfs /proc/fs" if proc == "masked" else ""
    argv = host_ns.argv(*plain_user.ringnet("run", "-q", "--", "sh", "-c", LEFT_BEHIND, before=before))
    assert sh(*argv, env=run_env()).stdout.split() == ["left", "done"]
    assert host_ns.pids() == []
    # its processes are in a namespace of their own; by user, then
    assert sh("pgrep", "-u", str(plain_user.uid), check=False).stdout == ""


def test_the_commands_directory_is_the_callers(host_ns: Netns, tmp_path: Path) -> None:
    done = subprocess.run(host_ns.argv(*RINGNET, "run", "--", "pwd"), cwd=tmp_path, capture_output=True, text=True,
                          timeout=DEADLINE, env=run_env())
    assert done.stdout == f"{tmp_path}\n", done


def test_the_interface_has_the_name_asked_for(host_ns: Netns, tmp_path: Path) -> None:
    out = sh(*host_ns.argv(*RINGNET, "run", "-I", "net7", "--", "sh", "-c", "ls /sys/class/net; ip -br -4 addr"),
             env=run_env()).stdout
    assert "net7" in out.split() and f"{GUEST}/24" in out.split()


# -- run: signals


def started(host: Netns, tmp: Path, script: str) -> tuple[Program, int]:
    """`ringnet run` of a Python script that says when it is set up on the pipe given back."""
    r, w = os.pipe()
    program = Program(host.argv(*RINGNET, "run", "--", sys.executable, "-c", script), tmp / "run.log", pass_fds=(w,),
                      env=run_env(SAY=str(w)))
    os.close(w)
    program.wait_readable(r, "the command did not start")
    return program, r


SETUP = "import os, signal, sys; say = lambda t: os.write(int(os.environ['SAY']), t);"


@pytest.mark.parametrize(("signum", "script", "status"), [
    (signal.SIGTERM, "say(b'up'); signal.pause()", 128 + signal.SIGTERM),
    (signal.SIGHUP, "say(b'up'); signal.pause()", 128 + signal.SIGHUP),
    (signal.SIGINT, "signal.signal(2, signal.SIG_DFL); say(b'up'); signal.pause()", 128 + signal.SIGINT),
    (signal.SIGTERM, "signal.signal(15, lambda *_: sys.exit(9)); say(b'up'); signal.pause()", 9),
], ids=["TERM", "HUP", "INT without a terminal", "TERM handled"])
def test_signals_are_the_commands(host_ns: Netns, tmp_path: Path, signum: int, script: str, status: int) -> None:
    program, r = started(host_ns, tmp_path, SETUP + script)
    with program:
        pids = children(program.pid)
        assert program.end(signum) == status, program.output()
        assert wait_gone(pids) == []
    os.close(r)


def test_a_command_that_ignores_sigterm_ends_at_the_second(host_ns: Netns, tmp_path: Path) -> None:
    script = SETUP + "signal.signal(15, lambda *_: say(b't'));say(b'u')\nwhile True: signal.pause()"
    program, r = started(host_ns, tmp_path, script)
    with program:
        assert os.read(r, 1) == b"u"
        pids = children(program.pid)
        program.process.send_signal(signal.SIGTERM)
        program.wait_readable(r, "the signal was not passed on")
        assert os.read(r, 1) == b"t"
        assert program.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert wait_gone(pids) == []
    os.close(r)


def test_nohup_is_the_commands_too(host_ns: Netns) -> None:
    """A signal ignored by ringnet's caller is ignored by the command."""
    script = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    out = sh(*host_ns.argv("sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *RINGNET, "run", "--", sys.executable, "-c",
                           script), env=run_env()).stdout
    assert out == "True\n"


def test_a_stages_death_ends_run_with_its_own_status(host_ns: Netns, tmp_path: Path) -> None:
    program, r = started(host_ns, tmp_path, SETUP + "say(b'up'); signal.pause()")
    with program:
        pids = children(program.pid)
        os.kill(stage_pids(program.pid)["egress"], signal.SIGKILL)
        assert program.wait() == 70
        assert "stage egress died: signal 9 (SIGKILL); last counters: " in program.output()
        assert wait_gone(pids) == []
    os.close(r)


# -- run: a terminal


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, argv: list[str], **env: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.execvpe(argv[0], argv, run_env(**env))
            finally:
                os._exit(127)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str) -> None:
        """Read until the text was seen; what was read is forgotten."""
        deadline = time.monotonic() + DEADLINE
        while text.encode() not in self.seen:
            assert select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0], (text, self.seen)
            try:
                more = os.read(self.fd, 4096)
            except OSError:  # EIO: the last process on the terminal ended
                more = b""
            assert more, (text, self.seen)
            self.seen += more
        self.seen = self.seen.partition(text.encode())[2]

    def wait(self) -> int:
        fd = os.pidfd_open(self.pid)
        assert select.select([fd], [], [], DEADLINE)[0], self.seen
        os.close(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        with contextlib.suppress(OSError):  # EIO: nobody holds the terminal any more
            self.seen += os.read(self.fd, 65536)
        return status

    def close(self) -> None:
        os.close(self.fd)  # hangs up
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(host_ns: Netns) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:
        def start(*argv: str, **env: str) -> Terminal:
            t = Terminal(host_ns.argv(*RINGNET, "run", *argv), **env)
            stack.callback(t.close)
            return t
        yield start


def test_an_interactive_shell_has_job_control(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """^C and ^Z are the job's, not the shell's and not ringnet's."""
    job = tmp_path / "job.py"  # says where it is when it has the terminal, so that what is typed then is for it
    job.write_text("import signal\nsignal.signal(signal.SIGCONT, lambda *_: print('continued', flush=True))\n"
                   "try:\n    print('started', flush=True)\n    while True: signal.pause()\n"
                   "except KeyboardInterrupt: print('interrupted', flush=True)\n")
    t = terminal("--", "sh", "-i", PS1="ready> ")
    t.expect("ready> ")
    t.type(f"{sys.executable} {job}\n")
    t.expect("started")
    t.type("\x1a")
    t.expect("Stopped")
    t.expect("ready> ")
    t.type("fg\n")
    t.expect("continued")
    t.type("\x03")
    t.expect("interrupted")
    t.expect("ready> ")
    t.type("exit 5\n")
    assert t.wait() == 5, t.seen


def test_interrupt_on_a_terminal_is_the_commands(terminal: Callable[..., Terminal]) -> None:
    script = ("import signal, sys\nsignal.signal(2, lambda *_: (print('in' + 'terrupted'), sys.exit(4)))\n"
              "print('re' + 'ady')\nsignal.pause()")
    t = terminal("--", sys.executable, "-u", "-c", script)
    t.expect("ready")
    t.type("\x03")
    t.expect("interrupted")
    assert t.wait() == 4


def test_a_command_stopped_from_the_terminal_is_a_stopped_job_of_the_caller(terminal: Callable[..., Terminal],
                                                                           host_ns: Netns, tmp_path: Path) -> None:
    """In an ordinary shell: ^Z on `ringnet run CMD` gives its prompt back, fg goes on; the terminal follows."""
    job = tmp_path / "job.py"
    job.write_text("import signal, sys\nsignal.signal(signal.SIGCONT, lambda *_: print('continued', flush=True))\n"
                   "print('started', flush=True)\nprint('read', sys.stdin.readline(), flush=True)\nsys.exit(6)\n")
    t = Terminal(host_ns.argv("sh", "-i"), PS1="ready> ")
    with contextlib.closing(t):
        t.expect("ready> ")
        t.type(" ".join([*RINGNET, "run", "--", sys.executable, str(job)]) + "\n")
        t.expect("started")
        t.type("\x1a")
        t.expect("Stopped")
        t.expect("ready> ")
        t.type("fg\n")
        t.expect("continued")
        t.type("words\n")
        t.expect("read words")
        t.expect("ready> ")
        t.type("echo status $?; read line; echo got $line\n")
        t.expect("status 6")
        t.type("the terminal\n")
        t.expect("got the terminal")
        t.type("exit 3\n")
        assert t.wait() == 3


def test_a_pipe_behind_the_command_keeps_the_terminal(host_ns: Netns) -> None:
    """`ringnet run CMD | less`: less reads keys, so the command must not take the terminal."""
    pager = "sh -c 'cat; echo ready; read k </dev/tty; echo key $k'"
    t = Terminal(host_ns.argv("sh", "-c", f"{' '.join(RINGNET)} run -- echo out | {pager}"))
    with contextlib.closing(t):
        t.expect("out")
        t.expect("ready")
        t.type("pressed\n")
        t.expect("key pressed")
        assert t.wait() == 0
