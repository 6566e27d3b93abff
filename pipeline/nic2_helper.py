"""`ringnet nic2-helper`: make the host side of a second NIC with rights that the session does not have.

    sudo ringnet nic2-helper --nic2 shared --route 172.16.0.0/12 -- ringnet run --nic2 fd=3 -- bash

A small process with rights runs the command without them (as --user, or as the user that called sudo), gives it a line as
descriptor 3, and does what is asked there: open, close, the guest's address; which network it is, and which routes, is
said here and not there. When the line closes, however its user ended, all of it is removed. It ends with the command,
and with its exit status.

Source: pipeline/nic2_backends.py for the line.
"""
from __future__ import annotations

import contextlib
import os
import pwd
import select
import signal
import socket
import sys
from typing import NoReturn

from pipeline.config import ConfigError, Settings, make
from pipeline.hostside import HostSideError
from pipeline.messages import Exit
from pipeline.nic2_backends import backend_for, serve
from pipeline.runner import say
from pipeline.supervisor import Signals

LINE = 3  # the command's descriptor


class User:
    """Whose rights the command gets."""

    def __init__(self, text: str) -> None:
        """Name or number; "": who called sudo, or us. Raises ConfigError."""
        self.uid, self.gid, self.groups = -1, -1, list[int]()
        text = text or os.environ.get("SUDO_UID", "")
        if not text:
            return
        try:
            entry = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
        except KeyError:
            if not text.isdecimal() or int(text) >= 1 << 32:
                raise ConfigError(f"--user {text}: no such user") from None
            self.uid = self.gid = int(text)  # a number that no account has: its group is the same number, and no other
            return
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.groups = os.getgrouplist(entry.pw_name, entry.pw_gid)

    def become(self) -> None:
        if self.uid >= 0:
            os.setgroups(self.groups)
            os.setgid(self.gid)
            os.setuid(self.uid)


def _command(argv: list[str], theirs: socket.socket, user: User) -> NoReturn:
    """In the child: give up rights, keep the line, become the command."""
    try:
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(s, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if theirs.fileno() == LINE:
            os.set_inheritable(LINE, True)
        else:
            os.dup2(theirs.fileno(), LINE, inheritable=True)
        user.become()
        os.execvp(argv[0], argv)
    except OSError as e:
        os.write(2, f"ringnet nic2-helper: cannot run {argv[0]}: {e.strerror}\n".encode())
    finally:
        os._exit(127)


def main(nic2: str, routes: list[str], user: str, argv: list[str]) -> int:
    """Returns the exit code: the command's, 128 + n if signal n ended it. Raises ConfigError."""
    settings: Settings = make({"nic2": nic2, "route": routes})
    spec = settings.second_nic()
    if spec is None or spec.mode in ("socket", "fd"):
        raise ConfigError(f"--nic2 {nic2}: give shared, host or bridged,if=NAME; a socket or descriptor needs no helper")
    who = User(user)
    with Signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals, contextlib.ExitStack() as stack:
        try:
            backend, _ = backend_for(spec, settings.nic2_routes(), "", stack, warn=say)
        except HostSideError as e:
            say(str(e))
            return int(Exit.RUNTIME)
        stack.callback(backend.close)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(ours.close)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _command(argv, theirs, who)
        theirs.close()
        pidfd = os.pidfd_open(pid)
        stack.callback(os.close, pidfd)
        poll = select.poll()
        for fd in (pidfd, ours.fileno(), signals.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if signals.fileno() in ready:
                for signum in signals.take():
                    if signum != signal.SIGINT or not os.isatty(0):  # ^C went to the command as well
                        with contextlib.suppress(ProcessLookupError):
                            signal.pidfd_send_signal(pidfd, signum)
            if ours.fileno() in ready and not serve(ours, backend):
                poll.unregister(ours.fileno())
            if pidfd in ready:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                return code if code >= 0 else 128 - code
