"""`ringnet passt`: the options of passt that wrapper scripts use, for `ringnet vm --type qemu-stream` (docs/vm.md).

An option that is not here is refused by name: to pass it over would mean something else than was asked for.
"""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pipeline.cli import Parser, UsageError, descriptor
from pipeline.config import ConfigError, Settings, make
from pipeline.messages import Exit
from pipeline.vm_types import VmOptions

MTU = 65520  # passt's default
PROBED = range(1, 64)  # /tmp/passt_N.socket


def parser() -> Parser:
    p = Parser(prog="ringnet passt", allow_abbrev=False, usage="ringnet passt [options]",
               description="Serve a virtual machine on a stream socket, with passt's options.")
    p.add_argument("-s", "--socket", metavar="PATH", default="", help="socket; default: the first free /tmp/passt_N.socket")
    p.add_argument("-F", "--fd", metavar="FD", help="a connected socket instead; implies -1")
    p.add_argument("-1", "--one-off", action="store_true", help="end with the first machine")
    p.add_argument("-f", "--foreground", action="store_true", help="do not go to the background when ready")
    for letter, name, what, help_ in (
            ("t", "tcp-ports", "SPEC", "TCP ports to forward"), ("u", "udp-ports", "SPEC", "UDP ports to forward"),
            ("D", "dns", "ADDR", "DNS server the guest's questions go to")):
        p.add_argument(f"-{letter}", f"--{name}", metavar=what, action="append", default=[], help=help_)
    for letter, name, what, help_ in (
            ("m", "mtu", "BYTES", f"MTU told to the guest (default {MTU})"), ("a", "address", "ADDR", "guest's IPv4 address"),
            ("n", "netmask", "MASK", "its netmask"), ("g", "gateway", "ADDR", "gateway's address"),
            ("P", "pid", "FILE", "write our process id there"), ("p", "pcap", "FILE", "capture the link")):
        p.add_argument(f"-{letter}", f"--{name}", metavar=what, help=help_)
    p.add_argument("-q", "--quiet", action="store_true", help="say errors only")
    p.add_argument("-d", "--debug", action="store_true", help="say what happens")
    p.add_argument("-e", "--stderr", action="store_true", help="log to standard error: always so here")
    return p


def settings(args: Any) -> Settings:
    """Raises ConfigError."""
    given = {k: getattr(args, k.replace("-", "_")) for k in (
        "tcp-ports", "udp-ports", "dns", "mtu", "address", "netmask", "gateway", "pid", "pcap", "quiet", "debug")}
    given = {k: v for k, v in given.items() if v not in (None, [], False)}
    for proto in ("tcp-ports", "udp-ports"):
        given[proto] = [spec for spec in given.get(proto, []) if spec != "none"]
    return make({"mtu": MTU, **given})


def free_path() -> str:
    """As passt probes it. Raises UsageError."""
    for n in PROBED:
        path = f"/tmp/passt_{n}.socket"
        if not os.path.exists(path):
            return path
    raise UsageError("ringnet passt: no free /tmp/passt_N.socket; give one by --socket")


def in_background(serve: Callable[[int], int]) -> int:
    """Run serve(ready_fd) in a process of its own; ours ends when it is ready, or with its status. What it says until then
    is printed here; later nobody hears it, so that a script which reads our output to its end need not wait."""
    ready, told = os.pipe()
    log = os.memfd_create("ringnet-passt-log", os.MFD_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd, to in ((null, 0), (null, 1), (log, 2)):
            os.dup2(fd, to)
        code = int(Exit.RUNTIME)
        try:
            code = serve(told)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(told)
    word = os.read(ready, 1)
    os.close(ready)
    code = int(Exit.OK)
    if not word:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
    sys.stderr.write(os.pread(log, 1 << 16, 0).decode(errors="replace"))
    os.close(log)
    return code


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        args = parser().parse_args(argv)
        if args.socket and args.fd is not None:
            raise UsageError("ringnet passt: -s and -F: give one of them")
        made = settings(args)
        fd = descriptor("fd", args.fd, "passt")
        path = "" if fd >= 0 else args.socket or free_path()
        from pipeline.vm import Vm

        def serve(ready_fd: int) -> int:
            # As passt, which verifies no checksum of the guest's: libkrun starts it, and leaves them unfinished.
            options = VmOptions(type="qemu-stream", socket=path, fd=fd, one_off=args.one_off or fd >= 0, ready_fd=ready_fd,
                                unfinished=True)
            return Vm(made, options).main()

        if args.foreground:
            return serve(-1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of the terminal it leaves
        return in_background(serve)
    except UsageError as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except ConfigError as e:
        print(f"ringnet passt: {e}", file=sys.stderr)
        return int(Exit.USAGE)
