"""`ringnet stage NAME --session S`: become a stage of a running session, in the foreground; and --replay: run one alone, on
a file (docs/debugging.md).

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
from pipeline.config import ConfigError, Settings, load_toml, make
from pipeline.topology import TOPOLOGY

Stage = Callable[..., Any]  # pipeline.stage.main, pipeline.replay.main: a command may not import what stages share




class HandUsage(Exception):
    """One line about the command line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise HandUsage(f"{self.prog}: {message} (see {self.prog} --help)")


def parser() -> Parser:
    p = Parser(prog="ringnet stage", allow_abbrev=False,
               usage="ringnet stage NAME [--session S] | ringnet stage NAME --replay IN --out OUT [options]",
               description="Take a held stage's place in a running session, in the foreground; ^C frees it again. Or, with"
                           " --replay, run the stage alone on a capture file: what it makes of it is the same each time.",
               epilog="The supervisor starts stages with --control-fd N instead. exit status: 0 it ended in order; 1 it"
                      " failed, or the seat is not free; 2 usage; 3 the session is gone; 4 control message not"
                      " understood")
    p.add_argument("name", metavar="NAME", choices=[s.name for s in TOPOLOGY.stages],
                   help=", ".join(s.name for s in TOPOLOGY.stages))
    where = p.add_mutually_exclusive_group()
    where.add_argument("-s", "--session", metavar="S", default="",
                       help="which session ($RINGNET_SESSION; else the only one)")
    where.add_argument("--api-socket", metavar="PATH", default="", help="the session's control socket instead")
    alone = p.add_argument_group("replay")
    alone.add_argument("--replay", metavar="IN", default="", help="a pcapng or pcap file: what the guest sent (for guest_rx:"
                       " got; for vmnet: both), or what was on the stage's input rings")
    alone.add_argument("--out", metavar="OUT", default="", help="pcapng file for what comes out, an interface a ring")
    alone.add_argument("--seed", metavar="N", type=int, default=1, help="of keys and numbers (1)")
    alone.add_argument("--clock", choices=["virtual", "real"], default="virtual",
                       help="virtual: the recording's times, at once (default); real: as long as it took")
    alone.add_argument("--host", metavar="SCRIPT.toml", default="", help="servers on the host side, for egress and services")
    alone.add_argument("--set", metavar="FILE.toml", default="", dest="config", help="the session's options, as run --config")
    return p


def settings_of(path: str) -> Settings:
    """Raises ConfigError."""
    return make(load_toml(path) if path else {})


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


def main(argv: list[str], stage: Stage, replay: Stage) -> int:
    """Returns the exit code."""
    try:
        args = parser().parse_args(argv)
        if bool(args.replay) != bool(args.out):
            raise HandUsage("ringnet stage: --replay and --out go together (see ringnet stage --help)")
        if args.replay:
            if not 0 <= args.seed < 1 << 63:
                raise HandUsage(f"ringnet stage: --seed {args.seed}: not within 0..2^63-1")
            return int(replay(args.name, settings_of(args.config), args.replay, args.out, seed=args.seed, clock=args.clock,
                              host=args.host))
        fd, session, generation = take(args.name, args.api_socket or str(find(args.session)))
    except HandUsage as e:
        print(e, file=sys.stderr)
        return 2
    except ConfigError as e:
        print(f"ringnet stage: {str(e).replace('--config', '--set', 1)}", file=sys.stderr)
        return 2
    except (ClientError, ApiError) as e:
        print(f"ringnet stage: {e}", file=sys.stderr)
        return 1
    print(f"ringnet stage: {args.name} of session {session}, generation {generation}; ^C frees the seat",
          file=sys.stderr, flush=True)
    return int(stage([args.name, "--control-fd", str(fd)], by_hand=True))
