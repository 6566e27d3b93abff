"""A soak: rounds of mixed traffic, and at the rest behind each a look at what the session holds. What tools/soak calls.

    python -m tests.soak.soak [--minutes 30] [--load 1.0] [--json FILE] [options of ringnet attach]

Traffic: tests/soak/traffic.py. At rest, every process may hold as many descriptors as before, as many frame buffers and no
more memory of its own than after the first rounds, rings are empty and the flow table has only what is to time out. At the
end all of that is waited for (--minutes 2 or more), or closed through the control API, and the table must be empty.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))

import netlab  # noqa: E402
from e2e.dns_server import DnsServer, zone  # noqa: E402
from netlab import DEADLINE, SERVER, Attached, Netns, run_env  # noqa: E402

from pipeline import api  # noqa: E402
from pipeline.client import Client  # noqa: E402
from pipeline.text import size, table  # noqa: E402
from tests.soak import traffic  # noqa: E402

WARM = 0.25  # of the rounds: what is made once is made by then
MEMORY_SLACK = 512 << 10  # bytes a process may have more at the end than when warm, and
# for each entry of its tables that was not used before: they are there from the start, but touched one by one (egress:
# struct flow_priv 208, struct tcp_flow 80, what refers to them, whole pages)
ENTRY = 384
BUFFERS_SLACK = 2  # of one kind, of one stage: a stage may keep one to read or peek into
RESTING = {"time_wait", "mapped"}  # flow states that only wait for their time to be over
EXPIRY = 240.0  # s: UDP ends after 180, TIME-WAIT after 60


class Process(Struct, frozen=True, kw_only=True):
    fds: int
    memory: int  # bytes of its own: shared memory, and pages shared with others, left out


class Rest(Struct, frozen=True, kw_only=True):
    """What the session holds between two rounds."""

    at_s: float
    processes: dict[str, Process]  # stage, or "supervisor"
    buffers: dict[str, int]  # "OWNER KIND HOLDER": how many
    waiting: dict[str, int]  # ring: descriptors
    flows: dict[str, int]  # state: entries, before processes were looked at
    mapped_after: int  # those of them that are "mapped", and were still there behind that


def process(pid: int) -> Process:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    # What it took for itself. Not its private clean pages: those are of files, and "private" while no other process of the whole
    # machine has the same library's page in use.
    own = sum(int(n) for n in re.findall(r"^Anonymous: +(\d+) kB", rollup, re.M))
    return Process(fds=len(os.listdir(f"/proc/{pid}/fd")), memory=own << 10)


def judge(rests: list[Rest]) -> list[str]:
    """What is wrong, in words; rests[0] is from before any traffic."""
    if len(rests) < 3:
        return ["too few rests to compare"]
    wrong = []
    warm, last = rests[max(1, int(len(rests) * WARM))], rests[-1]
    for n, rest in enumerate(rests):
        at = f"rest {n}, {rest.at_s:.0f} s"
        wrong += [f"{at}: {fill} frames lie in {ring}" for ring, fill in rest.waiting.items() if fill]
        wrong += [f"{at}: {k} flows are {state}" for state, k in rest.flows.items() if state not in RESTING]
        for name, p in rest.processes.items():
            # A UDP mapping is a socket of egress until it times out, and of the link's stages if it was promoted.
            mapped, before = rest.flows.get("mapped", 0), rests[0].processes[name].fds
            least, most = {"egress": (min(rest.mapped_after, mapped), mapped), "guest_tx": (0, mapped), "guest_rx": (0, mapped)}.get(name, (0, 0))
            if not least <= p.fds - before <= most:
                wrong.append(f"{at}: {name} has {p.fds} descriptors, {least} to {most} of UDP mappings, and had {before}")
        for kind, held in rest.buffers.items():
            if held > rests[0].buffers.get(kind, 0) + BUFFERS_SLACK:
                wrong.append(f"{at}: {held} buffers are held at rest: {kind}")
    entries = max(sum(r.flows.values()) for r in rests) - sum(warm.flows.values())
    for name, p in last.processes.items():
        if (more := p.memory - warm.processes[name].memory) > MEMORY_SLACK + ENTRY * entries:
            wrong.append(f"{name} has {size(more)} more at the end than when warm")
    return wrong


def balance(counters: dict[str, Counter[str]]) -> list[str]:
    """Every connection that began has ended, in one of the ways there are."""
    total: Counter[str] = sum(counters.values(), Counter())
    began = total["tcp_established"]
    ended = {n: total[n] for n in ("tcp_closed", "tcp_reset_by_guest", "tcp_reset_by_host", "tcp_closed_by_control",
                                   "tcp_timed_out")}
    return [] if began == sum(ended.values()) else [f"{began} connections were established, and ended were: {ended}"]


class Soak:
    """Two namespaces, a session between them, servers on the host side. Use as a context."""

    def __init__(self, where: Path, *options: str, load: float = 1.0, seed: int = 1) -> None:
        self.where, self.options, self.load, self.seed = where, options, load, seed
        self.rests: list[Rest] = []
        self.done: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Soak:
        with contextlib.ExitStack() as stack:
            host, guest = stack.enter_context(Netns("h")), stack.enter_context(Netns("g"))
            host.ip("addr", "add", f"{SERVER}/32", "dev", "lo")
            (host.etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            upstream = DnsServer(host, "127.0.0.1", zone({(traffic.REMOTE, "A"): ["192.0.2.9"],
                                                          (traffic.REMOTE, "TXT"): [f'"{"x" * 250}"'] * 20}))
            stack.callback(upstream.close)
            port = self._free_port(host)
            self.guest, self._forward = guest, port
            self._stderr = self.where / "attach.log"
            socket_path = self.where / "api.sock"
            self.attached = stack.enter_context(Attached(
                host, guest, self._stderr, "--api-socket", str(socket_path), "--hosts", f"{traffic.LOCAL}=192.0.2.8",
                "-t", f"127.0.0.1/{port}:{traffic.ECHO_PORT}", *self.options))
            self.client = stack.enter_context(Client(socket_path))

            def dial(to: int) -> socket.socket:
                s = host.socket()
                s.connect(("127.0.0.1", to))
                return s

            self.server = stack.enter_context(netlab.serving(host.listen(SERVER), lambda s: traffic.serve(s, dial)))
            udp = host.socket(kind=socket.SOCK_DGRAM)
            udp.bind((SERVER, 0))
            echo = threading.Thread(target=traffic.serve_udp, args=(udp,), daemon=True)
            echo.start()

            def stop_udp() -> None:
                with host.socket(kind=socket.SOCK_DGRAM) as s:
                    s.sendto(b"stop", udp.getsockname())
                echo.join()
                udp.close()

            stack.callback(stop_udp)
            self.udp = udp.getsockname()
            self._began = time.monotonic()
            self.rests.append(self._rest())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def _free_port(host: Netns) -> int:
        with host.listen() as s:  # in a namespace of our own: nobody else takes it
            return s.getsockname()[1]

    def statistics(self) -> api.StatisticsInfo:
        return self.client.call(api.Statistics())

    def _at_rest(self, deadline: float = DEADLINE) -> api.StatisticsInfo:
        """Once nothing is under way: FINs and ACKs may still be, when the last socket was closed."""
        end = time.monotonic() + deadline
        while True:
            found = self.statistics()
            busy = any(r.fill for r in found.rings) or set(found.flows) - RESTING
            if not busy or time.monotonic() > end:
                return found
            time.sleep(0.1)  # nothing tells of the end of a connection that nobody closed through the API

    def _rest(self) -> Rest:
        found = self._at_rest()
        stages = {s.name: s.pid for s in self.client.call(api.Stages()).stages}
        pids = stages | {"supervisor": self.client.call(api.GetStatus()).pid}
        at_s, processes = round(time.monotonic() - self._began, 1), {name: process(pid) for name, pid in pids.items()}
        after = self.statistics().flows.get("mapped", 0)  # some may have timed out in between
        return Rest(
            at_s=at_s, processes=processes, mapped_after=after,
            buffers={f"{b.stage} {b.kind} {who}": n for b in found.buffers for who, n in b.held.items()},
            waiting={r.name: r.fill for r in found.rings}, flows=found.flows)

    def round(self, seconds: float) -> None:
        """Traffic for so long, then a rest. Raises AssertionError if anything arrived wrong."""
        argv = [sys.executable, "-m", "tests.soak.traffic", "--server", f"{self.server[0]}:{self.server[1]}", "--udp",
                f"{self.udp[0]}:{self.udp[1]}", "--forward", str(self._forward), "--seconds", str(seconds),
                "--seed", str(self.seed * 100_000 + len(self.rests)), "--load", str(self.load)]
        log = self.where / "traffic.log"
        with netlab.Program(self.guest.argv(*argv), log, env=run_env()) as program:
            end = time.monotonic() + seconds + DEADLINE
            while program.process.poll() is None:
                found = self.statistics()
                self.peak |= Counter({"flows": sum(found.flows.values())})
                self.peak |= Counter({"buffers": sum(b.total - b.free for b in found.buffers)})
                with contextlib.suppress(AssertionError):
                    program.wait(min(1.0, max(0.1, end - time.monotonic())))
                assert time.monotonic() < end, f"traffic does not end: {program.output()}"
            assert program.process.returncode == 0, f"round {len(self.rests)}, seed {self.seed}:\n{program.output()}"
            self.done += Counter(json.loads(program.output().splitlines()[-1]))
        self.rests.append(self._rest())

    def finish(self, *, wait: bool) -> list[str]:
        """Let everything time out (or close it), end the session; what is wrong."""
        if not wait:
            for page in list(self.client.pages(api.FlowsList())):
                for f in page.flows:
                    with contextlib.suppress(api.ApiError):  # it went in between
                        self.client.call(api.FlowsClose(flow=f.flow))
        end = time.monotonic() + (EXPIRY if wait else DEADLINE)
        while (found := self.statistics()).flows and time.monotonic() < end:
            time.sleep(0.5 if wait else 0.05)  # as in _at_rest()
        self.rests.append(self._rest())
        wrong = judge(self.rests)
        wrong += [f"{n} flows are still {state}" for state, n in found.flows.items()]
        wrong += balance({stage: Counter(c) for stage, c in found.counters.items()})
        if (status := self.attached.end()) != 0:
            wrong.append(f"the session ended with {status}: {self.attached.output()}")
        return wrong

    def report(self) -> str:
        rows = []
        shown = self.rests if len(self.rests) <= 40 else self.rests[::len(self.rests) // 40 + 1] + self.rests[-1:]
        for r in shown:
            rows.append([f"{r.at_s:.0f}", str(sum(p.fds for p in r.processes.values())),
                         *(size(p.memory) for p in r.processes.values()), str(sum(r.buffers.values())),
                         " ".join(f"{s} {n}" for s, n in sorted(r.flows.items())) or "none"])
        head = ["s", "fds", *self.rests[0].processes, "buffers held", "flows"]
        done = ", ".join(f"{n} {k}" for k, n in sorted(self.done.items()))
        return (f"{table(rows=rows, head=head, left=frozenset({len(head) - 1}))}\n\n{done}\n"
                f"while busy, at most: {self.peak['flows']} flows, {self.peak['buffers']} buffers held")


def run(where: Path, seconds: float, round_s: float, *options: str, load: float = 1.0, seed: int = 1,
        wait: bool = False, say: Any = lambda text: None) -> tuple[Soak, list[str]]:
    """A whole soak; the Soak and what is wrong."""
    with Soak(where, *options, load=load, seed=seed) as soak:
        end = time.monotonic() + seconds
        while len(soak.rests) < 4 or time.monotonic() < end:
            soak.round(round_s)
            say(f"{soak.rests[-1].at_s:.0f} s: {dict(soak.done)}")
        return soak, soak.finish(wait=wait)


def main() -> int:
    p = argparse.ArgumentParser(prog="tools/soak", description="Mixed traffic through a session, and whether anything grows.")
    p.add_argument("--minutes", type=float, default=30.0, help="default %(default)g")
    p.add_argument("--load", type=float, default=1.0, help="part of the time each kind of traffic is at work (default %(default)g)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--json", type=Path, metavar="FILE", help="write every rest there")
    args, options = p.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="ringnet-soak-") as tmp:
        os.environ["RINGNET_RUNTIME_DIR"] = tmp
        seconds = args.minutes * 60
        soak, wrong = run(Path(tmp), seconds, min(60.0, max(5.0, seconds / 10)), *options, load=args.load, seed=args.seed,
                          wait=args.minutes >= 2, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(soak.report())
    if args.json:
        args.json.write_text(json.dumps(to_builtins({"rests": soak.rests, "done": soak.done, "wrong": wrong}), indent=1) + "\n")
    for w in wrong:
        print(f"WRONG: {w}")
    print("nothing grew, everything that was taken was given back" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
