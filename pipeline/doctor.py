"""`ringnet doctor`: can this machine, and this user, run ringnet, and how well? Looks, changes nothing, says what to fix.

Each check is one function: what it looked at, how that is, and the command that would make it better. Exit 0: all that
is needed is there (a warning is about something that works less well); 1: something that is needed is missing.
"""
from __future__ import annotations

import argparse
import enum
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import session_dir
from pipeline.ctl import CtlUsage, Parser
from pipeline.messages import Exit
from pipeline.topology import TOPOLOGY

EPILOG = "exit status: 0 ringnet can run here; 1 something it needs is missing; 2 usage"
TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000  # linux/if_tun.h
_TCP, _SO_PEEK_OFF = socket.IPPROTO_TCP, 42
SHM_NEEDED = 160 << 20  # bytes of a session's objects, as they are touched (docs/operation.md)
FILES_WANTED = TOPOLOGY.flows + 128  # one a flow, and what a stage holds besides
KERNEL_NEEDED, KERNEL_PEEK_OFF = (5, 9), (6, 9)


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"  # works, less well, or only a part does not
    FAIL = "FAIL"


class Finding(NamedTuple):
    what: str
    level: Level
    found: str
    fix: str = ""


def parser() -> Parser:
    p = Parser(prog="ringnet doctor", allow_abbrev=False, epilog=EPILOG,
               description="Look at kernel, limits, rights, settings and tools, and say what to change for ringnet. Nothing"
                           " is changed.")
    p.add_argument("--json", action="store_true", help="print one JSON object a line")
    p.add_argument("-q", "--quiet", action="store_true", help="only what could be better")
    return p


def release(text: str) -> tuple[int, int]:
    """"6.1.0-13-amd64" -> (6, 1)."""
    major, _, rest = text.partition(".")
    minor = "".join(c for c in rest.partition(".")[0].partition("-")[0] if c.isdigit())
    return int(major), int(minor or 0)


def sysctl(name: str) -> str | None:
    """Its value, or None if there is no such setting."""
    try:
        return Path("/proc/sys", name.replace(".", "/")).read_text().strip()
    except OSError:
        return None


# --- checks ---


def kernel() -> Iterator[Finding]:
    text = platform.release()
    if release(text) < KERNEL_NEEDED:
        yield Finding("kernel", Level.FAIL, f"Linux {text}", "Linux 5.9 or newer is needed (pidfd_open, close_range)")
    elif release(text) < KERNEL_PEEK_OFF:
        yield Finding("kernel", Level.NOTE, f"Linux {text}: no SO_PEEK_OFF on TCP",
                      "Linux 6.9 reads again what a guest has not acknowledged without copying it past a discard buffer")
    else:
        yield Finding("kernel", Level.OK, f"Linux {text}")
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64"):
        yield Finding("processor", Level.NOTE, machine, "tested on x86-64 and arm64 only")


def python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info < (3, 11):
        yield Finding("Python", Level.FAIL, version, "Python 3.11 or newer is needed")
    else:
        yield Finding("Python", Level.OK, version)
    try:
        from shm._dataplane import lib

        yield Finding("data plane", Level.OK, f"compiled, {lib.rn_ncounters()} counters")
    except ImportError as e:
        yield Finding("data plane", Level.FAIL, str(e), "build it: tools/ringnet (in a checkout), or install the package again")


def peek_offset() -> Iterator[Finding]:
    with socket.socket() as s:
        try:
            s.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
            yield Finding("SO_PEEK_OFF", Level.OK, "TCP sockets take it")
        except OSError as e:
            yield Finding("SO_PEEK_OFF", Level.NOTE, f"TCP sockets do not take it ({e.strerror}); ringnet peeks past a"
                          " discard buffer", "costs processor time on downloads; Linux 6.9 or newer has it")


def tun() -> Iterator[Finding]:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield Finding(TUN, Level.FAIL, "is not there", f"as root: modprobe tun; in a container: --device {TUN}")
        return
    except OSError as e:
        fix = f"as root: chmod 0666 {TUN}; for good, a udev rule: KERNEL==\"tun\", MODE=\"0666\"" \
            if e.errno == errno.EACCES else "as root: modprobe tun"
        yield Finding(TUN, Level.FAIL, f"cannot be opened: {e.strerror}", fix)
        return
    try:
        features = struct.unpack("I", fcntl.ioctl(fd, 0x800454CF, b"\0" * 4))[0]  # TUNGETFEATURES
        if features & _IFF_VNET_HDR:
            yield Finding(TUN, Level.OK, "can be opened; taps have virtio-net headers")
        else:
            yield Finding(TUN, Level.NOTE, "can be opened; taps have no virtio-net header", "every segment is then a frame"
                          " of its own: slow at small MTU")
    except OSError as e:
        yield Finding(TUN, Level.FAIL, f"can be opened, but does not answer: {e.strerror}", "not a tun device?")
    finally:
        os.close(fd)


def namespaces() -> Iterator[Finding]:
    root = os.geteuid() == 0
    what = "namespaces"
    flags = ["--net"] if root else ["--user", "--map-root-user", "--net"]
    unshare = shutil.which("unshare")
    if unshare is None:
        yield Finding(what, Level.NOTE, "cannot be tried: no unshare(1)", "install util-linux")
        return
    done = subprocess.run([unshare, *flags, "true"], capture_output=True, text=True, timeout=20)
    if done.returncode == 0:
        yield Finding(what, Level.OK, "network namespaces" if root else "user and network namespaces" + " can be made")
        return
    fixes = []
    if sysctl("kernel.unprivileged_userns_clone") == "0":
        fixes.append("sysctl kernel.unprivileged_userns_clone=1")
    if sysctl("user.max_user_namespaces") == "0" or sysctl("user.max_net_namespaces") == "0":
        fixes.append("sysctl user.max_user_namespaces=15000 user.max_net_namespaces=15000")
    if sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1":
        fixes.append("sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that allows userns")
    yield Finding(what, Level.FAIL, f"cannot be made: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else '?'}",
                  "as root: " + "; ".join(fixes) if fixes else "in a container: it must allow unshare(2); or run as root")


def ping() -> Iterator[Finding]:
    for kind, name in ((socket.SOCK_DGRAM, "ping sockets"), (socket.SOCK_RAW, "raw sockets")):
        try:
            socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP).close()
            yield Finding("ping", Level.OK, f"by {name}")
            return
        except OSError:
            continue
    value = sysctl("net.ipv4.ping_group_range")
    yield Finding("ping", Level.NOTE, f"only to the gateway (net.ipv4.ping_group_range = {value})",
                  "as root: sysctl net.ipv4.ping_group_range='0 2147483647'")


def files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES_WANTED:
        yield Finding("open files", Level.NOTE, f"at most {hard}, so at most about {max(0, hard - 128)} flows of"
                      f" {TOPOLOGY.flows}", f"ulimit -Hn {FILES_WANTED} (in a unit: LimitNOFILE={FILES_WANTED})")
    else:
        yield Finding("open files", Level.OK, f"{'unlimited' if hard == resource.RLIM_INFINITY else hard}")


def memory() -> Iterator[Finding]:
    try:
        at = os.statvfs("/dev/shm")
    except OSError as e:
        yield Finding("/dev/shm", Level.FAIL, f"is not there: {e.strerror}", "mount -t tmpfs -o mode=1777 tmpfs /dev/shm")
        return
    free = at.f_bavail * at.f_frsize
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        yield Finding("/dev/shm", Level.FAIL, "is not writable", "chmod 1777 /dev/shm")
    elif free < SHM_NEEDED:
        yield Finding("/dev/shm", Level.NOTE, f"{free >> 20} MiB free; a busy session touches up to {SHM_NEEDED >> 20} MiB",
                      "mount -o remount,size=1G /dev/shm (in a container: --shm-size=1g)")
    else:
        yield Finding("/dev/shm", Level.OK, f"{free >> 20} MiB free")


def socket_buffers() -> Iterator[Finding]:
    """TCP's are what a connection's speed over a long way depends on."""
    for name, wanted in (("net.ipv4.tcp_rmem", 4 << 20), ("net.ipv4.tcp_wmem", 4 << 20)):
        value = sysctl(name)
        most = int(value.split()[-1]) if value else 0
        if value and most < wanted:
            yield Finding(name, Level.NOTE, value.replace("\t", " "), f"as root: sysctl {name}='4096 131072 {wanted}'")
    for name in ("net.core.rmem_max", "net.core.wmem_max"):
        value = sysctl(name)
        if value and int(value) < 4 << 20 and os.geteuid():
            yield Finding(name, Level.NOTE, f"{value}: a virtual machine's datagram link queues few frames",
                          f"as root: sysctl {name}={8 << 20}")


def processors() -> Iterator[Finding]:
    n = len(os.sched_getaffinity(0))
    if n < 2:
        yield Finding("processors", Level.NOTE, f"{n}", "the stages are processes of their own: two or more help")
    else:
        yield Finding("processors", Level.OK, f"{n}")


def resolver() -> Iterator[Finding]:
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except OSError as e:
        yield Finding("/etc/resolv.conf", Level.NOTE, f"cannot be read: {e.strerror}",
                      "the guest's DNS needs a server: --dns ADDR")
        return
    servers = [w[1] for line in lines if (w := line.split())[:1] == ["nameserver"] and len(w) > 1]
    if servers:
        yield Finding("DNS", Level.OK, f"upstream {', '.join(servers)}")
    else:
        yield Finding("DNS", Level.NOTE, "no nameserver in /etc/resolv.conf", "the guest's DNS needs a server: --dns ADDR")


def sockets() -> Iterator[Finding]:
    try:
        yield Finding("sessions", Level.OK, f"sockets in {session_dir.own_directory()}")
    except session_dir.SessionDirError as e:
        yield Finding("sessions", Level.NOTE, f"no control API: {e}", "set RINGNET_RUNTIME_DIR to a directory of your own")


def tools() -> Iterator[Finding]:
    """Programs that a user of ringnet wants, and what may be in its way."""
    for name, package, why in (("ip", "iproute2", "to make namespaces for `attach`"),
                               ("tshark", "tshark", "to read what `capture` writes")):
        if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            yield Finding(name, Level.NOTE, "is not installed", f"apt-get install {package}: {why}")
    default = sysctl("net.ipv4.ip_local_port_range")
    if default and int(default.split()[1]) - int(default.split()[0]) < 4096:
        yield Finding("local ports", Level.NOTE, f"net.ipv4.ip_local_port_range = {default}".replace("\t", " "),
                      "each of the guest's connections needs one: sysctl net.ipv4.ip_local_port_range='32768 60999'")
    if sysctl("net.netfilter.nf_conntrack_max") and (count := sysctl("net.netfilter.nf_conntrack_count")):
        most = int(sysctl("net.netfilter.nf_conntrack_max") or 0)
        if int(count) > most * 9 // 10:
            yield Finding("conntrack", Level.NOTE, f"{count} of {most} entries used: new connections will be dropped",
                          f"as root: sysctl net.netfilter.nf_conntrack_max={most * 4}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    kernel, python, processors, tun, namespaces, peek_offset, ping, files, memory, socket_buffers, resolver, sockets, tools)


def examine() -> list[Finding]:
    return [finding for check in CHECKS for finding in check()]


def text(findings: list[Finding], quiet: bool) -> str:
    lines = []
    width = max((len(f.what) for f in findings), default=0)
    for f in findings:
        if quiet and f.level is Level.OK:
            continue
        lines.append(f"{f.level:>4}  {f.what:<{width}}  {f.found}")
        if f.fix:
            lines.append(f"{'':>4}  {'':<{width}}  -> {f.fix}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet doctor`. Returns the exit code."""
    try:
        args: argparse.Namespace = parser().parse_args(argv)
    except CtlUsage as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    findings = examine()
    if args.json:
        for f in findings:
            if not (args.quiet and f.level is Level.OK):
                print(json.dumps({"what": f.what, "level": f.level.lower(), "found": f.found, "fix": f.fix}))
    elif said := text(findings, args.quiet):
        print(said)
    bad = [f for f in findings if f.level is Level.FAIL]
    notes = sum(f.level is Level.NOTE for f in findings)
    if not args.json and not (args.quiet and not bad):
        print(f"\nringnet cannot run here: {len(bad)} to fix" if bad else
              f"\nringnet can run here{f'; {notes} could be better' if notes else ''}")
    return int(Exit.RUNTIME if bad else Exit.OK)
