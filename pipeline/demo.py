"""`ringnet demo`: the main job on this machine alone, with real programs, every result checked.

An HTTP server (a process of its own, on the host's 127.0.0.1) and a guest namespace with a session between them.
In the guest: udhcpc configures the interface, dig asks the gateway by UDP and TCP, ping, curl fetches a small
page, and BULK bytes each way, whose SHA-256 both ends work out. Printed: each step with its time, what each
stage did, what was verified. Ends 0 only if every step passed.
"""
from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multiprocess
from msgspec import Struct

from pipeline.cli import Parser, add_settings, settings_from
from pipeline.config import DOMAIN, Settings
from pipeline.messages import Exit
from pipeline.monitor import stage_facts, stage_table
from pipeline.netns import GuestError, attach_child, open_target
from pipeline.runner import Guest as GuestChild
from pipeline.runner import Stopped, say
from pipeline.supervisor import Link, Result, Session, SessionError, Signals
from shm._dataplane import lib

BULK = 256 << 20  # bytes each way
CHUNK = 1 << 20  # bytes a read, write or hash step
PAGE = "A page from the host side of ringnet's demo.\n"
PROGRAMS = {"udhcpc": "udhcpc", "dig": "bind9-dnsutils", "ping": "iputils-ping", "curl": "curl", "ip": "iproute2"}
STEP_S = 180.0  # a step that takes longer is broken
GATEWAY_NAME = f"host.{DOMAIN}"

# What udhcpc(8) runs: takes the lease over as the distribution's script does, without asking for more tools than ip.
UDHCPC_SCRIPT = """#!/bin/sh
set -e
case "$1" in
deconfig) ip -4 addr flush dev "$interface"; ip link set "$interface" up ;;
bound|renew)
	ip addr replace "$ip/$mask" dev "$interface"
	ip link set "$interface" mtu "$mtu"
	ip route replace default via "$router" dev "$interface"
	printf 'search %s\\n' "$search" > /etc/resolv.conf
	for server in $dns; do printf 'nameserver %s\\n' "$server"; done >> /etc/resolv.conf
	echo "lease: $ip/$mask router $router dns $dns mtu $mtu lease $lease" ;;
esac
"""


class StepFailed(Exception):
    """A step did not do what it should; the text says what was seen."""


class Step(Struct, frozen=True):
    what: str
    ok: bool
    seconds: float
    seen: str  # what was found, or what went wrong


# -- the server ------------------------------------------------------------------------------------------------


def pseudorandom(seed: int) -> tuple[int, str]:
    """A memory file of BULK bytes that compress to nothing, and their SHA-256. Raises OSError."""
    fd = os.memfd_create("ringnet-demo")
    digest, block, counter = hashlib.sha256(), bytearray(random.Random(seed).randbytes(CHUNK)), 0
    for counter in range(BULK // CHUNK):
        block[:8] = counter.to_bytes(8, "big")  # no two alike, so one lost or swapped is seen
        digest.update(block)
        os.write(fd, block)
    return fd, digest.hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /page and /body, PUT /up. The answer to a PUT is the SHA-256 of what came."""

    protocol_version = "HTTP/1.1"
    body: tuple[int, str] = (-1, "")

    def do_GET(self) -> None:  # noqa: N802 (the name is http.server's)
        if self.path == "/page":
            self.reply(PAGE.encode())
        elif self.path == "/body":
            self.send_response(200)
            self.send_header("Content-Length", str(BULK))
            self.end_headers()
            with open(f"/proc/self/fd/{self.body[0]}", "rb") as f:  # an offset of its own
                self.connection.sendfile(f)
        else:
            self.send_error(404)

    def do_PUT(self) -> None:  # noqa: N802
        left, digest, piece = int(self.headers["Content-Length"]), hashlib.sha256(), memoryview(bytearray(CHUNK))
        while left:
            got = self.rfile.readinto(piece[: min(left, CHUNK)])
            if not got:
                return  # the client went away; nobody to answer
            digest.update(piece[:got])
            left -= got
        self.reply(digest.hexdigest().encode())

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A guest that goes away in the middle is its own business; curl's status tells it."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(pipe: Any, seed: int) -> None:
    """The server's process: says (port, SHA-256 of /body) when it serves, and lives as long as its parent."""
    _die_with_parent()
    Handler.body = pseudorandom(seed)
    with Server(("127.0.0.1", 0), Handler) as server:
        pipe.send((server.server_address[1], Handler.body[1]))
        server.serve_forever()


# -- the steps -------------------------------------------------------------------------------------------------


class Demo:
    """The list of steps, run in order; a later one is tried even if an earlier one failed."""

    STEPS = 7

    def __init__(self, enter: list[str], settings: Settings, port: int, body_sha: str, tmp: Path,
                 say: Callable[[Step], None]) -> None:
        self.enter, self.settings, self.port, self.body_sha, self.tmp, self.say = (
            enter, settings, port, body_sha, tmp, say)

    def guest(self, *argv: str, stdin: Any = subprocess.DEVNULL) -> str:
        """Run a program in the guest to its end; its output. Raises StepFailed."""
        try:
            done = subprocess.run([*self.enter, *argv], stdin=stdin, capture_output=True, text=True, errors="replace",
                                  timeout=STEP_S, preexec_fn=_die_with_parent)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{argv[0]}: no end within {STEP_S:g} s") from None
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise StepFailed(f"{argv[0]}: status {done.returncode}: {words}")
        return done.stdout

    def step(self, what: str, work: Callable[[], str]) -> None:
        begin = time.monotonic()
        try:
            seen, ok = work(), True
        except StepFailed as e:
            seen, ok = str(e), False
        self.say(Step(what, ok, time.monotonic() - begin, seen))

    def run(self) -> None:
        self.step("udhcpc takes a lease", self.lease)
        for transport in ("UDP", "TCP"):
            self.step(f"dig by {transport} finds {GATEWAY_NAME}", lambda t=transport: self.dig(t))
        self.step("ping reaches the gateway", self.ping)
        self.step("curl fetches a page from the host", self.page)
        self.step(f"curl fetches {BULK >> 20} MiB from the host", self.down)
        self.step(f"curl sends {BULK >> 20} MiB to the host", self.up)

    def lease(self) -> str:
        script = self.tmp / "udhcpc.sh"
        script.write_text(UDHCPC_SCRIPT)
        script.chmod(0o700)
        s = self.settings
        # -t, -T: as many tries, as long apart, as a busy machine may need
        out = self.guest("udhcpc", "-i", s.ifname, "-n", "-q", "-f", "-t", "10", "-T", "1", "-O", "mtu", "-O", "search",
                         "-s", str(script))
        prefix = s.network.prefixlen
        want = f"lease: {s.address}/{prefix} router {s.gateway} dns {s.gateway} mtu {s.mtu} lease "
        lines = [line for line in out.splitlines() if line.startswith("lease:")]
        if not lines or not lines[-1].startswith(want):
            raise StepFailed(f"expected {want!r}, got {lines[-1] if lines else out.strip()!r}")
        if f"inet {s.address}/{prefix}" not in self.guest("ip", "-4", "addr", "show", "dev", s.ifname):
            raise StepFailed(f"{s.ifname} has not got {s.address}/{prefix}")
        return f"{s.address}/{prefix}, router and DNS {s.gateway}, MTU {s.mtu}"

    def dig(self, transport: str) -> str:
        out = self.guest("dig", "+tcp" if transport == "TCP" else "+notcp", "+short", "+time=5", "+tries=2",
                         GATEWAY_NAME).split()
        if out != [self.settings.gateway]:
            raise StepFailed(f"expected {self.settings.gateway}, got {' '.join(out) or 'nothing'}")
        return out[0]

    def ping(self) -> str:
        out = self.guest("ping", "-n", "-c", "5", "-i", "0.2", "-w", "30", self.settings.gateway)
        if "5 received" not in out:
            raise StepFailed(out.strip().splitlines()[-1])
        return out.strip().splitlines()[-1]

    def url(self, path: str) -> str:
        return f"http://{GATEWAY_NAME}:{self.port}{path}"

    def page(self) -> str:
        out = self.guest("curl", "-sS", "--fail", "--max-time", "30", self.url("/page"))
        if out != PAGE:
            raise StepFailed(f"another page came: {out[:60]!r}")
        return f"{len(out)} bytes, as served"

    def down(self) -> str:
        digest, size, begin = hashlib.sha256(), 0, time.monotonic()
        argv = [*self.enter, "curl", "-sS", "--fail", "--max-time", f"{STEP_S:g}", self.url("/body")]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              preexec_fn=_die_with_parent) as curl:
            while piece := curl.stdout.read(CHUNK):
                digest.update(piece)
                size += len(piece)
            words = curl.stderr.read().decode(errors="replace").strip()
        if curl.returncode:
            raise StepFailed(f"curl: status {curl.returncode}: {words}")
        return self.compare(size, digest.hexdigest(), self.body_sha, time.monotonic() - begin)

    def up(self) -> str:
        fd, sha = pseudorandom(seed=2)
        begin = time.monotonic()
        with open(fd, "rb") as body:
            # -T takes its length from the file; an Expect round trip is of no use to a server that takes everything
            out = self.guest("curl", "-sS", "--fail", "--max-time", f"{STEP_S:g}", "-H", "Expect:", "-T", "/dev/stdin",
                             self.url("/up"), stdin=body)
        return self.compare(BULK, out.strip(), sha, time.monotonic() - begin)

    @staticmethod
    def compare(size: int, got: str, want: str, seconds: float) -> str:
        if (size, got) != (BULK, want):
            raise StepFailed(f"{size} bytes with SHA-256 {got[:16]}..., expected {BULK} with {want[:16]}...")
        return f"{size * 8 / seconds / 1e9:.2f} Gbit/s, SHA-256 {got[:16]}... at both ends"


def take_steps(pipe: Any, enter: list[str], settings: Settings, port: int, body_sha: str, tmp: str) -> None:
    """The process that drives the guest: sends each Step as it is done. `enter`: argv in front of a guest's command."""
    _die_with_parent()
    Demo(enter, settings, port, body_sha, Path(tmp), pipe.send).run()
    pipe.close()


# -- the guest -------------------------------------------------------------------------------------------------


class Guest:
    """A namespace as a container engine would hand it to `ringnet attach`: network and mount namespace, kept by
    a `cat` that ends when we do. Not root: a user namespace too, in which we are root (udhcpc and ping need it)."""

    def __init__(self, tmp: Path) -> None:
        resolv = tmp / "resolv.conf"
        resolv.write_text("# udhcpc has not been here yet\n")
        plain = os.geteuid() != 0
        script = 'mount --bind "$1" "$(readlink -f /etc/resolv.conf)"; ip link set lo up; exec cat'
        argv = ["unshare", *(["--user", "--map-root-user"] if plain else []), "--net", "--mount", "--propagation",
                "slave", "sh", "-ec", script, "guest", str(resolv)]
        self.keeper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.keeper.stdin.write(b"\n")
        try:
            self.keeper.stdin.flush()
        except BrokenPipeError:
            pass  # it said why: below
        if self.keeper.stdout.read(1) != b"\n":  # comes back once cat runs in the finished namespace
            words = self.keeper.communicate()[1].decode(errors="replace").strip().splitlines()
            raise GuestError(f"cannot make the guest's namespace: {words[-1] if words else 'no reason given'}")
        self.enter = ["nsenter", "-t", str(self.keeper.pid), *(["--user", "--preserve-credentials"] if plain else []),
                      "--net", "--mount", "--"]

    def tap(self, settings: Settings, signals: Signals) -> Link:
        """The guest's interface, not configured. Raises GuestError, Stopped."""
        target = open_target(str(self.keeper.pid))
        try:
            maker = GuestChild(lambda ours, theirs: attach_child(ours, theirs, target, settings.ifname, settings.mtu,
                                                                 config_net=False))
            try:
                tap = maker.tap(signals)
                tap.events.close()  # if somebody removes the interface, the steps fail and say so
                return Link(fd=tap.fd, kind="tap", vnet=True, name=settings.ifname, tables=tap.tables)
            finally:
                maker.end()
        finally:
            os.close(target.netns)
            os.close(target.pidfd)

    def close(self) -> None:
        self.keeper.communicate()  # EOF on its input ends it


def _die_with_parent() -> None:
    lib.rn_os_pdeathsig(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the demo, which ends us


# -- the command -----------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """`ringnet demo`: argv without the word; returns the exit code. Raises UsageError, ConfigError."""
    parser = Parser(prog="ringnet demo", allow_abbrev=False, description=__doc__.splitlines()[0])
    add_settings(parser)
    settings = settings_from(parser.parse_args(argv))
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=_path())})
    if missing:
        say(f"the demo needs: apt-get install {' '.join(missing)} (or run ./tools/ringnet demo)")
        return Exit.RUNTIME
    os.environ["PATH"] = _path()
    try:
        with tempfile.TemporaryDirectory(prefix="ringnet-demo-") as tmp, contextlib.ExitStack() as stack:
            return _main(settings, Path(tmp), stack)
    except Stopped as e:
        return 128 + e.signum
    except (GuestError, SessionError) as e:
        say(str(e))
        return int(getattr(e, "code", Exit.RUNTIME))


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # udhcpc lives where a plain user's does not reach


def _main(settings: Settings, tmp: Path, stack: contextlib.ExitStack) -> int:
    signals = stack.enter_context(Signals(signal.SIGINT, signal.SIGTERM))
    guest = Guest(tmp)
    stack.callback(guest.close)
    link = guest.tap(settings, signals)
    for fd in (link.fd, *link.tables.values()):
        stack.callback(os.close, fd)
    spawn = multiprocess.get_context("spawn")  # fork would copy a half-made session into the helpers
    session = Session(settings, link=link, log=say if settings.debug else None, warn=say)
    session.watch(signals.fileno(), lambda: [session.end(s.name, Exit.RUNTIME) for s in signals.take()])
    stack.enter_context(session)
    who = ", ".join(f"{name} {pid}" for name, pid in session.stages().items())
    print(f"session: guest {settings.address}, gateway {settings.gateway}, MTU {settings.mtu}; stages: {who}",
          flush=True)

    port, body_sha = _start_server(spawn, session, stack)
    steps: list[Step] = []
    if port:
        pipe, theirs = spawn.Pipe(duplex=False)
        worker = spawn.Process(target=take_steps, name="steps", daemon=True,
                               args=(theirs, guest.enter, settings, port, body_sha, str(tmp)))
        worker.start()
        theirs.close()
        stack.callback(_kill, worker)

        def heard() -> None:
            try:
                step = pipe.recv()
            except EOFError:
                session.end("all steps done")
                return
            steps.append(step)
            print(f"  {'ok    ' if step.ok else 'failed'} {step.seconds:7.2f} s  {step.what}: {step.seen}", flush=True)

        session.watch(pipe.fileno(), heard)
    result = session.run()
    print(f"\nWhat each stage did, by its own counters:\n{stage_table(session)}\n", flush=True)
    return _verdict(session, steps, result)


def _start_server(spawn: Any, session: Session, stack: contextlib.ExitStack) -> tuple[int, str]:
    """Port and SHA-256 of the server's body; (0, "") if the session ended meanwhile."""
    pipe, theirs = spawn.Pipe(duplex=False)
    server = spawn.Process(target=serve, args=(theirs, 1), name="server", daemon=True)
    server.start()
    theirs.close()
    stack.callback(_kill, server)
    said: list[tuple[int, str]] = []

    def heard() -> None:
        session.unwatch(pipe.fileno())
        try:
            said.append(pipe.recv())
        except EOFError:
            session.end("the HTTP server did not start", Exit.RUNTIME)

    session.watch(pipe.fileno(), heard)
    while not said and session.poll():
        pass
    return said[0] if said else (0, "")


def _kill(process: Any) -> None:
    process.kill()
    process.join()


def _verdict(session: Session, steps: list[Step], result: Result) -> int:
    silent = [f.name for f in stage_facts(session) if not f.frames_in]
    bad = [f"failed: {s.what}: {s.seen}" for s in steps if not s.ok]
    if result.code is not Exit.OK:
        bad.append(f"failed: the session ended early: {result.reason}")
    elif len(steps) != Demo.STEPS:
        bad.append(f"failed: {len(steps)} of {Demo.STEPS} steps were taken")
    if silent:
        bad.append(f"failed: no frame went through {', '.join(silent)}")
    if bad:
        print("\n".join(bad))
        return result.code or Exit.RUNTIME
    print("Verified: the lease's address, router, DNS and MTU; the gateway's name by UDP and by TCP; five echoes;\n"
          f"one page byte for byte; {BULK >> 20} MiB each way with the same SHA-256 at both ends; frames through every"
          " stage.")
    return Exit.OK
