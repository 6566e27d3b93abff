"""`ringnet stage NAME --session S`: become a stage of a running session, in the foreground (docs/debugging.md).

Asks the session's control API for the seat, gets one end of the stage's control socket, and goes on as a stage that the
supervisor started: from here on pipeline/stage.py does not know the difference but for ^C.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from pipeline import api
from pipeline.api import ApiError
from pipeline.client import Client, ClientError, find
from pipeline.topology import TOPOLOGY

Stage = Callable[..., Any]  # pipeline.stage.main: a command may not import what stages share


class HandUsage(Exception):
    """One line about the command line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise HandUsage(f"{self.prog}: {message} (see {self.prog} --help)")


def parser() -> Parser:
    p = Parser(prog="ringnet stage", allow_abbrev=False,
               description="Take a held stage's place in a running session, in the foreground; ^C frees it again.",
               epilog="The supervisor starts stages with --control-fd N instead. exit status: 0 it ended in order; 1 it"
                      " failed, or the seat is not free; 2 usage; 3 the session is gone; 4 control message not"
                      " understood")
    p.add_argument("name", metavar="NAME", choices=[s.name for s in TOPOLOGY.stages],
                   help=", ".join(s.name for s in TOPOLOGY.stages))
    where = p.add_mutually_exclusive_group()
    where.add_argument("-s", "--session", metavar="S", default="",
                       help="which session ($RINGNET_SESSION; else the only one)")
    where.add_argument("--api-socket", metavar="PATH", default="", help="the session's control socket instead")
    return p


def elsewhere(pid: int) -> bool:
    """Has that process another network namespace than we? False if we may not know."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return False


def take(name: str, path: str) -> tuple[int, str, int]:
    """The seat of a stage: (descriptor of its control socket, session's name, generation). Raises ClientError, ApiError."""
    with Client(path) as client:
        session = client.call(api.GetStatus())
        if elsewhere(session.pid):  # the host's sockets would be those of the wrong network
            raise ClientError(f"session {session.session} has another network namespace; start the stage there, with"
                              f" nsenter --net=/proc/{session.pid}/ns/net in front of the command")
        seat = client.call(api.StageTake(stage=name))
        if len(client.fds) != 1:
            raise ClientError(f"{path}: the seat came without its socket")
        return client.fds.pop(), seat.session, seat.generation


def main(argv: list[str], stage: Stage) -> int:
    """Returns the exit code."""
    try:
        args = parser().parse_args(argv)
        fd, session, generation = take(args.name, args.api_socket or str(find(args.session)))
    except HandUsage as e:
        print(e, file=sys.stderr)
        return 2
    except (ClientError, ApiError) as e:
        print(f"ringnet stage: {e}", file=sys.stderr)
        return 1
    print(f"ringnet stage: {args.name} of session {session}, generation {generation}; ^C frees the seat",
          file=sys.stderr, flush=True)
    return int(stage([args.name, "--control-fd", str(fd)], by_hand=True))
