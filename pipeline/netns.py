"""The guest's side of `ringnet run` and `ringnet attach`: namespaces, tap, address, resolv.conf, the command.

run     a child process makes the guest: user namespace (unless root), network, mount and PID namespace. It makes
        the tap there, hands it to the supervisor, waits until the pipeline runs, does a real DHCP exchange, sets
        address, route and resolv.conf, and runs the command below a small init. All of it before the command's
        exec, because that is where an unprivileged user's rights in the namespace end.
attach  a short-lived child enters an existing network namespace and does the same up to the route.

Child and supervisor talk over a SOCK_SEQPACKET pair with the messages below. Everything dies with the
supervisor: PR_SET_PDEATHSIG from process to process, and the end of the PID namespace's init for the rest. Where
no PID namespace can be made (/proc is masked, as in some containers), the command's descendants are killed when
the command ends, but those that left it survive a SIGKILL of ringnet itself.

Terminal: a command whose input and output are the terminal gets a process group of its own and the terminal with
it, as a shell would do. Else a shell in the PID namespace could not name the group it must give the terminal back
to (it is 0 there), and dash ends with 2 for that. When ^Z stops the command, the supervisor takes the terminal back
and stops too, so that the caller's shell sees one job; fg hands it on again.

Source: namespaces(7), user_namespaces(7), pid_namespaces(7), ioctl_ns(2), tuntap.rst.
"""
from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec import Struct

from pipeline import netlink
from pipeline.auto_forwards import TABLES, open_tables
from pipeline.dhcp_client import DhcpError, Lease, ask
from shm._dataplane import ffi, lib

TUN = "/dev/net/tun"
SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)  # those that mean the command
RESOLV_CONF = "/etc/resolv.conf"
TAKEN = "interface {} exists already in the guest's namespace; choose another name or remove it"


class GuestError(Exception):
    """The guest cannot be made; one line that says what to do."""


class _Said(Struct, frozen=True, kw_only=True, tag=str.lower):
    """Base of what goes over the pair."""


class Tap(_Said):
    """Child: the link's descriptor is beside this message, then a netlink socket of the namespace, then the second
    interface's if there is one, then the namespace's tables of sockets."""

    index: int  # of the interface
    tables: tuple[str, ...] = ()  # their names (auto_forwards.TABLES)
    second: bool = False  # there is a second interface


class Go(_Said):
    """Supervisor: the pipeline runs."""


class Configured(_Said):
    address: str
    router: str
    dns: tuple[str, ...]
    note: str = ""  # something to tell the user
    second: str = ""  # address of the second interface, with its prefix length; "" if it got none


class Spawned(_Said):
    pid: int  # the command, as its own PID namespace numbers it
    contained: bool  # in a PID namespace


class Trouble(_Said):
    text: str


class Stopped(_Said):
    """The command was stopped from its terminal (^Z)."""


class Resume(_Said):
    """Supervisor: let it go on; foreground: it has the terminal."""

    foreground: bool


class Forward(_Said):
    """Supervisor: send the command a signal."""

    signum: int


class Finished(_Said):
    status: int  # the command's: exit code, or 128 + signal


Said = Tap | Go | Configured | Spawned | Trouble | Stopped | Resume | Forward | Finished
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Said).decode


class Line:
    """One end of the pair."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: _Said, *fds: int) -> None:
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([_encode(message)], anc, socket.MSG_NOSIGNAL)

    def recv(self) -> tuple[Said, list[int]] | None:
        """A message and its descriptors; None at EOF. Blocks."""
        data, anc, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(4 * (3 + len(TABLES))), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, body in anc:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
        return (_decode(data), list(fds)) if data else None


def _call(rc: int, what: str) -> int:
    """Raises OSError for a negative errno."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def c(text: str | None) -> object:
        return ffi.NULL if text is None else text.encode()

    _call(lib.rn_os_mount(c(source), target.encode(), c(kind), flags, c(data)), f"mount {target}")


# -- the tap

class Second(Struct, frozen=True, kw_only=True):
    """The second interface to make (pipeline/nic2.py)."""

    name: str
    mac: str
    mtu: int


def make_tap(name: str, mtu: int, mac: str = "") -> int:
    """Make the guest's interface in this namespace and set its MTU and, if given, its MAC address; returns the
    descriptor.

    Raises GuestError, naming the fix.
    """
    if name in (n for _, n in socket.if_nameindex()):
        raise GuestError(TAKEN.format(name))
    failed = ffi.new("int *")
    fd = lib.rn_tap_open(name.encode(), failed)
    if fd < 0:
        err = -fd
        if failed[0] == lib.RN_TAP_OPEN and err in (errno.EACCES, errno.EPERM):
            raise GuestError(f"cannot open {TUN}: {os.strerror(err)}; as root do: chmod 0666 {TUN} (for good: a udev"
                             ' rule KERNEL=="tun", MODE="0666"), or run ringnet as root')
        if failed[0] == lib.RN_TAP_OPEN and err in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise GuestError(f"cannot open {TUN}: {os.strerror(err)}; load the module as root: modprobe tun")
        if failed[0] == lib.RN_TAP_CREATE and err == errno.EPERM:
            raise GuestError(f"cannot make interface {name}: not permitted in this namespace; run as its owner or as"
                             " root")
        if failed[0] == lib.RN_TAP_CREATE and err in (errno.EBUSY, errno.EEXIST):
            raise GuestError(TAKEN.format(name))
        raise GuestError(f"cannot make interface {name}: {os.strerror(err)}")
    try:
        if mac:
            netlink.link_address(name, mac)
        netlink.link_mtu(name, mtu)
        netlink.link_queue(name)
    except OSError as e:
        os.close(fd)
        raise GuestError(e.strerror) from e
    return int(fd)


def configure(name: str) -> Lease:
    """Bring the interface up and give it what DHCP says. Raises GuestError."""
    try:
        netlink.link_up(name)
        lease = ask(name)
        if lease.mtu:
            netlink.link_mtu(name, lease.mtu)
        netlink.addr_add(name, lease.address)
        if lease.router is not None:
            netlink.default_route(name, lease.router, onlink=lease.router not in lease.address.network)
    except DhcpError as e:
        raise GuestError(str(e)) from e
    except OSError as e:
        raise GuestError(f"{name}: {e.strerror or e}") from e
    return lease


SECOND_WAIT = 4.0  # s; the network of a second interface may have no DHCP server


def configure_second(second: Second | None) -> tuple[str, str]:
    """Bring the second interface up, with an address if a DHCP server there gives one; returns (address, note). No
    default route, no DNS: those are the first one's. Raises GuestError."""
    if second is None:
        return "", ""
    try:
        netlink.link_up(second.name)
        lease = ask(second.name, seconds=SECOND_WAIT)
        netlink.addr_add(second.name, lease.address)
    except DhcpError as e:
        return "", f"{second.name} is up and has no address: {e}"
    except OSError as e:
        raise GuestError(f"{second.name}: {e.strerror or e}") from e
    return str(lease.address), ""


def _configured(lease: Lease, note: str, second: str) -> Configured:
    return Configured(address=str(lease.address), router=str(lease.router or ""), dns=tuple(map(str, lease.dns)),
                      note=note, second=second)


# -- attach: an existing namespace

class Target(Struct, frozen=True, kw_only=True):
    """What `ringnet attach` was pointed at."""

    netns: int  # descriptor
    pidfd: int  # -1: a path was given
    text: str  # as the user wrote it


def open_target(text: str) -> Target:
    """PID or path. Raises GuestError."""
    pidfd = -1
    path = text
    if text.isdecimal():
        path = f"/proc/{text}/ns/net"
        try:
            pidfd = os.pidfd_open(int(text))
        except ProcessLookupError:
            raise GuestError(f"no process {text}: give the PID of a process in the guest's namespace, or a path like"
                             " /run/netns/NAME") from None
        except (OSError, OverflowError) as e:
            raise GuestError(f"process {text}: {e}") from None
    try:
        netns = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        if pidfd >= 0:
            os.close(pidfd)
        if e.errno == errno.ENOENT:
            raise GuestError(f"no network namespace at {path}; make one with: ip netns add NAME (it is then"
                             " /run/netns/NAME)") from e
        raise GuestError(f"cannot open network namespace {path}: {e.strerror}; run as its owner or as root") from e
    kind = lib.rn_os_ns_type(netns)
    if kind != lib.RN_CLONE_NEWNET:
        os.close(netns)
        raise GuestError(f"{path} is not a network namespace; give /run/netns/NAME, /proc/PID/ns/net or a PID")
    return Target(netns=netns, pidfd=pidfd, text=text)


def enter(target: Target) -> None:
    """Move this (single-threaded, short-lived) process there. Raises GuestError.

    If another user namespace owns it, that one is entered first: rights over the network come with it.
    """
    owner = lib.rn_os_ns_owner(target.netns)
    if owner >= 0:
        ours, theirs = os.stat("/proc/self/ns/user"), os.fstat(owner)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            rc = lib.rn_os_setns(owner, lib.RN_CLONE_NEWUSER)
            if rc < 0 and os.geteuid() != 0:
                raise GuestError(f"cannot enter the user namespace that owns {target.text}: {os.strerror(-rc)};"
                                 " run as its owner or as root")
        os.close(owner)
    rc = lib.rn_os_setns(target.netns, lib.RN_CLONE_NEWNET)
    if rc < 0:
        raise GuestError(f"cannot enter network namespace {target.text}: {os.strerror(-rc)}; run as its owner or as"
                         " root")


def attach_child(ours: socket.socket, sock: socket.socket, target: Target, name: str, mtu: int,
                 config_net: bool, second: Second | None = None) -> None:
    """The whole life of attach's child: enter, tap, and with config_net: wait for Go, configure.

    `ours`: the supervisor's end, which a forked child has too, and must not, to see its EOF.
    """
    lib.rn_os_pdeathsig(signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for s in SIGNALS:
        signal.signal(s, signal.SIG_DFL)
    ours.close()
    line = Line(sock)
    with _telling(line):
        enter(target)
        _hand_over(line, name, mtu, second)
        if config_net and line.recv() is not None:
            lease = configure(name)
            address, note = configure_second(second)
            line.send(_configured(lease, note, address))


def _hand_over(line: Line, name: str, mtu: int, second: Second | None) -> None:
    """Make the taps and give them away: an interface lives as long as somebody in the session has it."""
    with netlink.link_events() as events, contextlib.ExitStack() as stack:
        fd = make_tap(name, mtu)
        stack.callback(os.close, fd)
        fds = [fd, events.fileno()]
        if second is not None:
            fds.append(make_tap(second.name, second.mtu, second.mac))
            stack.callback(os.close, fds[-1])
        tables = open_tables()
        for table in tables.values():
            stack.callback(os.close, table)
        line.send(Tap(index=netlink.index(name), second=second is not None, tables=tuple(tables)), *fds, *tables.values())


@contextlib.contextmanager
def _telling(line: Line) -> Iterator[None]:
    """What goes wrong goes to the supervisor, which prints it and ends."""
    try:
        yield
    except GuestError as e:
        _tell(line, str(e))
    except OSError as e:
        _tell(line, e.strerror or str(e))


def _tell(line: Line, text: str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody left to tell
        line.send(Trouble(text=text))


# -- run: a namespace of our own

def _map_ids(uid: int, gid: int, *, as_root: bool) -> None:
    """Ourselves to ourselves, or to root in there, nothing else (user_namespaces(7): the mappings that need no rights)."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{0 if as_root else uid} {uid} 1\n")
    Path("/proc/self/gid_map").write_text(f"{0 if as_root else gid} {gid} 1\n")


def new_namespaces(*, as_root: bool = False) -> None:
    """User (unless root), network and mount namespace. as_root: programs that are started in it have rights over it.
    Raises GuestError."""
    uid, gid = os.geteuid(), os.getegid()
    flags = lib.RN_CLONE_NEWNET | lib.RN_CLONE_NEWNS
    rc = lib.rn_os_unshare(flags) if uid == 0 else -errno.EPERM
    if rc == -errno.EPERM:  # a plain user, or root without rights (in a container)
        rc = lib.rn_os_unshare(flags | lib.RN_CLONE_NEWUSER)
        if rc < 0:
            hint = {errno.EPERM: "; allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1,"
                                 " kernel.apparmor_restrict_unprivileged_userns=0), or run as root",
                    errno.ENOSPC: "; raise sysctl user.max_user_namespaces"}.get(-rc, "")
            raise GuestError(f"cannot make a user namespace: {os.strerror(-rc)}{hint}")
        _map_ids(uid, gid, as_root=as_root)
    elif rc < 0:
        raise GuestError(f"cannot make a network namespace: {os.strerror(-rc)}")
    # What we mount stays ours; what the host mounts or unmounts later reaches us.
    _mount(None, "/", None, lib.RN_MS_REC | lib.RN_MS_SLAVE)


def _pid_namespace_works() -> bool:
    """Can we have a PID namespace with a /proc of its own? Tried in a process that ends, for there is no way back."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    code = 1
    try:
        if lib.rn_os_unshare(lib.RN_CLONE_NEWPID | lib.RN_CLONE_NEWNS) == 0:
            inner = os.fork()
            if not inner:
                os._exit(1 if lib.rn_os_mount(b"proc", b"/proc", b"proc", _PROC_FLAGS, ffi.NULL) < 0 else 0)
            code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    finally:
        os._exit(code)


_PROC_FLAGS = lib.RN_MS_NOSUID | lib.RN_MS_NODEV | lib.RN_MS_NOEXEC


def resolv_text(lease: Lease) -> str:
    search = lease.search or ((lease.domain,) if lease.domain else ())
    lines = ["# by ringnet, from DHCP"]
    lines += [f"search {' '.join(search)}"] if search else []
    lines += [f"nameserver {a}" for a in lease.dns]
    return "\n".join(lines) + "\n"


def replace_resolv_conf(text: str) -> str:
    """Put our text over /etc/resolv.conf in this mount namespace; returns a note for the user or "".

    The file lives on a tmpfs that has no place in the tree any more once it is bound over the real one. A link is
    followed; if it leads nowhere, or there is no file, /etc becomes an overlay with the file in it.
    """
    real = os.path.realpath(RESOLV_CONF)
    try:
        with _scratch() as top:
            mine = f"{top}/resolv.conf"
            Path(mine).write_text(text)
            os.chmod(mine, 0o644)
            if os.path.isfile(real):
                _mount(mine, real, None, lib.RN_MS_BIND)
            else:
                for d in ("upper", "work"):
                    os.mkdir(f"{top}/{d}")
                _mount("overlay", "/etc", "overlay", 0, f"lowerdir=/etc,upperdir={top}/upper,workdir={top}/work")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(RESOLV_CONF)
                Path(RESOLV_CONF).write_text(text)
    except OSError as e:
        return f"the guest keeps the host's {RESOLV_CONF}: {e.strerror or e}"
    return ""


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A private tmpfs, mounted for the block over a directory that every system has."""
    top = next(d for d in ("/tmp", "/mnt", "/var/tmp") if os.path.isdir(d))
    _mount("tmpfs", top, "tmpfs", lib.RN_MS_NOSUID | lib.RN_MS_NODEV, "mode=755,size=64k")
    try:
        yield top
    finally:
        _call(lib.rn_os_umount_detach(top.encode()), f"unmount {top}")


def guest(sock: socket.socket, name: str, mtu: int, argv: list[str], ignored: frozenset[signal.Signals],
          second: Second | None = None) -> NoReturn:
    """The whole life of run's child, from fork to the command's end. Never returns.

    `ignored`: signals that were ignored when ringnet began (nohup), and so are by the command.
    Exits with the command's status, which the supervisor has been told already.
    """
    lib.rn_os_pdeathsig(signal.SIGKILL)
    lib.rn_os_set_name(b"ringnet-guest")
    signal.set_wakeup_fd(-1)
    for s in SIGNALS:  # a terminal or a group kill sends them to the command as well, and it decides
        signal.signal(s, signal.SIG_IGN)
    line = Line(sock)
    code = 1
    try:
        with _telling(line):
            code = _guest(line, name, mtu, argv, ignored, second)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _guest(line: Line, name: str, mtu: int, argv: list[str], ignored: frozenset[signal.Signals],
           second: Second | None) -> int:
    home, tty = os.getcwd(), terminal()
    new_namespaces()
    netlink.link_up("lo")
    _hand_over(line, name, mtu, second)
    if line.recv() is None:  # Go, or the supervisor gave up
        return 1
    lease = configure(name)
    note = replace_resolv_conf(resolv_text(lease))
    address, second_note = configure_second(second)
    with contextlib.suppress(OSError):  # so that /sys/class/net shows the guest's interfaces; not where it is masked
        _mount("sysfs", "/sys", "sysfs", lib.RN_MS_RDONLY | _PROC_FLAGS)
    with contextlib.suppress(OSError):  # the scratch mount may have moved it out from under us
        os.chdir(home)
    line.send(_configured(lease, "; ".join(filter(None, (note, second_note))), address))
    contained = _pid_namespace_works()
    if not contained:
        return _init(line, argv, ignored, tty, contained=False)
    _call(lib.rn_os_unshare(lib.RN_CLONE_NEWPID), "make a PID namespace")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with _telling(line):
                lib.rn_os_pdeathsig(signal.SIGKILL)
                lib.rn_os_set_name(b"ringnet-init")
                _mount("proc", "/proc", "proc", _PROC_FLAGS)
                code = _init(line, argv, ignored, tty, contained=True)
        finally:
            os._exit(code)
    line.sock.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _exit_code(status: int) -> int:
    """As a shell has it: 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def terminal() -> int:
    """A descriptor of the terminal, if it is our input and output and we are in its foreground; else -1."""
    if not (os.isatty(0) and os.isatty(1)):
        return -1
    try:
        tty = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it is not our controlling terminal
        return -1
    if os.tcgetpgrp(tty) != os.getpgrp():
        os.close(tty)
        return -1
    return tty


def give_terminal(tty: int, group: int) -> None:
    """Put a process group into the foreground, also from the background (where SIGTTOU would stop us)."""
    old = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        os.tcsetpgrp(tty, group)
    except OSError:  # the group ended, or the terminal hung up: nobody is there to have it
        pass
    finally:
        signal.signal(signal.SIGTTOU, old)


def _init(line: Line, argv: list[str], ignored: frozenset[signal.Signals], tty: int, *, contained: bool) -> int:
    """Run the command, reap what is orphaned, pass signals on; returns the command's status.

    One wait for three things: signals come through a wake-up pipe, the supervisor's words and its end by socket.
    """
    if not contained:
        lib.rn_os_subreaper(1)
    r, w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(w)
    command = os.fork()
    if command == 0:
        _exec(argv, ignored, tty)
    with contextlib.suppress(BrokenPipeError):
        line.send(Spawned(pid=command, contained=contained))
    poll = select.poll()
    poll.register(r, select.POLLIN)
    poll.register(line, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == r:
                os.read(r, 4096)
                while True:
                    try:
                        pid, status = os.waitpid(-1, os.WNOHANG | (os.WUNTRACED if tty >= 0 else 0))
                    except ChildProcessError:
                        break
                    if pid == 0:
                        break
                    if os.WIFSTOPPED(status):
                        if pid == command:
                            line.send(Stopped())
                    elif pid == command:
                        code = _exit_code(status)
                        if not contained:
                            _kill_descendants()
                        with contextlib.suppress(BrokenPipeError):
                            line.send(Finished(status=code))
                        return code
            else:
                got = line.recv()
                if got is None:  # the supervisor ended: so do we all
                    os.kill(command, signal.SIGKILL)
                    if not contained:
                        _kill_descendants()
                    return 1
                if isinstance(got[0], Resume):
                    if got[0].foreground:
                        give_terminal(tty, command)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(command, signal.SIGCONT)
                if isinstance(got[0], Forward):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(command, got[0].signum)


def _kill_descendants() -> None:
    """End what the command left behind, where no PID namespace does it. As a subreaper we are its parent in the end."""
    while True:
        children = [int(p) for p in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0)[0]:
                pass


def _exec(argv: list[str], ignored: frozenset[signal.Signals], tty: int) -> NoReturn:
    """In the command's process: undo what is ours, then become it. 127 and 126 as a shell has them."""
    try:
        lib.rn_os_pdeathsig(signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        if tty >= 0:
            os.setpgid(0, 0)
            give_terminal(tty, os.getpid())
        for s in (*SIGNALS, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(s, signal.SIG_IGN if s in ignored else signal.SIG_DFL)
        os.execvp(argv[0], argv)
    except OSError as e:
        os.write(2, f"ringnet: cannot run {argv[0]}: {e.strerror}\n".encode())
        os._exit(127 if e.errno == errno.ENOENT else 126)
    finally:
        os._exit(126)


def shell() -> list[str]:
    return [os.environ.get("SHELL") or "/bin/sh"]

