"""`ringnet capture`: frames out of a running session as pcapng, to a file, a ring of files, or a pipe to Wireshark.

The stages copy what matches into mirrors in shared memory; this process reads them. If it is too slow, or its disk is,
copies are lost and counted: never a frame. docs/capture.md.
"""
from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from typing import Any

from pipeline import api
from pipeline.api import ApiError
from pipeline.capture_file import CaptureFile, head
from pipeline.client import Client, ClientError, find
from pipeline.ctl import CtlUsage, Parser, common
from pipeline.messages import Exit
from pipeline.supervisor import Signals
from shm.memory import LayoutMismatch
from shm.mirror import FRAME_ROOM, CaptureReader, Mirror, MirrorBroken

CHUNK = 1 << 20  # bytes written at once
QUIET_MS = 2  # after a wake-up, so that a stage is not made to ring for every frame
EPILOG = "exit status: 0 done; 1 refused, no such session, or the file cannot be written; 2 usage"


def parser() -> Parser:
    p = Parser(prog="ringnet capture", allow_abbrev=False, parents=[common(json=False)], epilog=EPILOG,
               description="Write frames of a running session as pcapng, live. POINT: link (the guest's, the default),"
                           " a ring like guest_tx:classify, a stage (all its inputs), or all; with a second NIC link2 (the"
                           " guest's) and bridge (the host's).")
    p.add_argument("point", nargs="*", metavar="POINT", default=["link"])
    p.add_argument("-w", "--write", metavar="FILE", default="", help="to this file; -: standard output, for a pipe")
    p.add_argument("--host", metavar="ADDR", default="", help="only frames from or to this address")
    p.add_argument("--port", type=int, metavar="N", default=0, help="only TCP and UDP from or to this port")
    p.add_argument("--proto", choices=["tcp", "udp", "icmp"], help="only this protocol")
    p.add_argument("--flow", metavar="FLOW", help="only this flow, as `ringnet flows` names it, like 12.3")
    p.add_argument("--drops", action="store_true", help="only frames that a stage drops; the reason is their comment")
    p.add_argument("--snaplen", type=int, metavar="BYTES", default=0, help="keep at most so much of a frame")
    p.add_argument("-c", "--count", type=int, metavar="N", default=0, help="end after so many frames")
    p.add_argument("--file-size", type=int, metavar="MIB", default=0,
                   help="begin a new file (FILE_00001 ...) after so many MiB")
    p.add_argument("--files", type=int, metavar="N", default=0, help="keep the last so many of them")
    p.add_argument("--buffer", type=int, metavar="MIB", default=api.CAPTURE_BUFFER >> 20,
                   help="memory of each stage's copies (default 16)")
    p.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    return p


def _check(args: argparse.Namespace) -> None:
    """Raises CtlUsage."""
    prog = "ringnet capture"
    if not args.write:
        if sys.stdout.isatty():
            raise CtlUsage(f"{prog}: say where to: -w FILE, or -w - | wireshark -k -i -")
        args.write = "-"
    if args.write == "-" and sys.stdout.isatty():
        raise CtlUsage(f"{prog}: -w -: standard output is a terminal; pipe it into a program that reads pcapng")
    if args.write == "-" and args.file_size:
        raise CtlUsage(f"{prog}: --file-size: there is one standard output; give -w FILE")
    if args.files and not args.file_size:
        raise CtlUsage(f"{prog}: --files: say with --file-size when a new one begins")
    for option, least, most in (("count", 0, 1 << 62), ("file_size", 0, 1 << 20), ("files", 0, 100_000),
                                ("buffer", 1, 1024), ("snaplen", 0, 1 << 17), ("port", 0, 65535)):
        if not least <= getattr(args, option) <= most:
            raise CtlUsage(f"{prog}: --{option.replace('_', '-')} {getattr(args, option)}: not within {least}..{most}")


class Capture:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace, client: Client, signals: Signals) -> None:
        self.args, self.client, self.signals = args, client, signals
        self.over = ""  # why no more frames come

    def run(self) -> None:
        """Raises ApiError, ClientError, OSError, LayoutMismatch, MirrorBroken."""
        args = self.args
        started = self.client.call(api.CaptureStart(
            points=args.point, host=args.host, port=args.port, proto=args.proto, flow=args.flow, snaplen=args.snaplen,
            drops=args.drops, buffer=args.buffer << 20))
        fds = self.client.take_fds()
        if len(fds) != len(started.mirrors) + 1:
            raise ClientError(f"{self.client.path}: {len(fds)} descriptors came, {len(started.mirrors) + 1} were told")
        self.bell = fds.pop()
        self.mirrors = [Mirror.attach(fd, m.size, name=f"mirror of {m.stage}")
                        for fd, m in zip(fds, started.mirrors, strict=True)]
        self.reader = CaptureReader([(mirror, m.interfaces) for mirror, m in
                                     zip(self.mirrors, started.mirrors, strict=True)], chunk=CHUNK)
        self.number = started.capture
        self.file = CaptureFile(args.write, head(started.interfaces, args.snaplen), limit=args.file_size << 20,
                                keep=args.files)
        self._say("capturing " + ", ".join(i.name for i in started.interfaces))
        if started.absent:
            self._say(f"not at work: {', '.join(started.absent)}; frames there come when it is")
        try:
            self._loop()
        finally:
            self.file.close()
            lost = f"; {n} copies were not made because this reader was behind (the frames themselves went on)" \
                if (n := self.reader.dropped) else ""
            self._say(f"{self.reader.frames} frames captured{lost}")

    def _say(self, text: str) -> None:
        if not self.args.quiet:
            print(f"ringnet capture: {text}", file=sys.stderr, flush=True)

    def _loop(self) -> None:
        left = self.args.count or 1 << 62
        while True:
            blocks = self.reader.read(self.file.room(FRAME_ROOM, CHUNK), left - self.reader.frames)
            if blocks:
                self.file.write(blocks)
                if self.reader.frames >= left:
                    return
            elif self.over:
                return
            elif not self.reader.arm():
                if self._wait(None, self.bell):
                    os.read(self.bell, 8)
                    self._wait(QUIET_MS)
            if not self.over:
                self._wait(0)  # also while frames come without end

    def _wait(self, ms: int | None, *bell: int) -> bool:
        """Wait for the doorbell (true: it rang), a signal, or the session's end: those two end the capture."""
        poll = select.poll()
        for fd in (self.signals.fileno(), self.client.fileno(), *bell):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(ms)}
        if self.signals.fileno() in ready and self.signals.take():
            self.client.call(api.CaptureStop(capture=self.number))  # what was copied until now is read yet
            self.over = "signal"
        elif self.client.fileno() in ready:
            self._say("the session ended")
            self.over = "ended"
        return bool(ready & set(bell))


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet capture`. Returns the exit code."""
    try:
        args: Any = parser().parse_args(argv)
        _check(args)
        with Signals(signal.SIGINT, signal.SIGTERM) as signals, \
                Client(getattr(args, "api_socket", "") or find(getattr(args, "session", ""))) as client:
            Capture(args, client, signals).run()
    except CtlUsage as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except BrokenPipeError:  # Wireshark was closed
        return int(Exit.OK)
    except (ClientError, ApiError, LayoutMismatch, MirrorBroken) as e:
        print(f"ringnet capture: {e}", file=sys.stderr)
        return int(Exit.USAGE if isinstance(e, ApiError) and e.code == api.Code.BAD_ARGS else Exit.RUNTIME)
    except OSError as e:
        print(f"ringnet capture: {args.write}: {e.strerror}", file=sys.stderr)
        return int(Exit.RUNTIME)
    return int(Exit.OK)
