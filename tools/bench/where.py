"""Where the time goes: CPU, sleeps, system calls and kernel functions, for one request, one connection, one 64 KiB.

Three runs of the same work, because to look closer is to slow down: plain (CPU and context switches from /proc), under
`strace -c` (system calls: the counts are right, the times are not), under `perf record` (shares of functions). The command
line of tools/bench/where.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import drivers, lab
from bench.lab import SERVER, LabError
from bench.load import Load
from bench.report import number, table
from bench.results import ResultsError, conditions, replaced
from pipeline import procs

PATIENCE = 30.0
PORT = "5301"
PIECE = 65536  # bytes: what one super-frame carries at most, nearly
MARK, END = "<!-- generated: where (tools/bench/where --docs) -->", "<!-- end of generated: where -->"
# The first that matches says what a kernel function is for; what matches none is "other".
KINDS: tuple[tuple[str, str], ...] = (
    ("copy", r"copy_(to|from|user)|_copy_|rep_movs|memcpy|memmove|csum_partial|csum_and|skb_copy|memset|clear_page|rep_stos"),
    ("wake, switch", r"sched|ttwu|try_to_wake|wake_up|wake_q|switch|pick_next|(en|de)queue_(task|entity)|update_(curr|load|rq|cfs|se)"
                     r"|autoremove|finish_task|hrtick|resched|idle|__set_task|cpu_util|native_write_msr|smp_call|set_next|put_prev"
                     r"|raw_spin_rq|_raw_spin_unlock_irq|eventfd|default_wake|place_entity|avg_vruntime|(de|en)queue|psi_|cputime|vruntime|nohz"),
    ("epoll", r"^_*(ep_|epoll|do_epoll|eventpoll)"),
    ("memory", r"alloc|free|slab|kmem|page|memcg|folio|obj_cgroup|refill|charge|skb_release|kfree|put_cpu"),
    ("guest's link (tap)", r"^_*(tun_|tap_|virtio_net|skb_flow_diss|eth_type|__skb_get_hash)"),
    ("TCP, IP, veth", r"tcp|ip_|inet|sock|skb|nf_|dst_|fib|neigh|veth|dev_|netif|napi|gro|xmit|sk_|qdisc|rt_|ipv4|net_rx|backlog"
                      r"|lock_sock|release_sock|csum|udp|checksum"),
    ("system call entry", r"syscall|entry_|fdget|fput|x64_sys|security_|__fget|import_|iov|exit_to_user|vfs_|rw_verify|ksys|fsnotify"
                          r"|sysret|sockfd|srso|retbleed|apparmor|seccomp|bpf|file"),
)


@dataclass
class Case:
    """What a process of the datapath did for one unit of the work."""

    work: str
    unit: str
    per_s: float
    cpu_us: dict[str, float]  # by stage
    sleeps: dict[str, float]
    calls: dict[str, dict[str, float]]  # by stage and system call
    kinds: dict[str, float]  # CPU us by kind, all stages
    top: list[tuple[str, float]]  # functions, CPU us


@dataclass(frozen=True)
class Work:
    name: str
    unit: str
    run: Callable[[drivers.Datapath, float], float]  # units done


def _requests(mode: str, *size: int) -> Callable[[drivers.Datapath, float], float]:
    def run(d: drivers.Datapath, secs: float) -> float:
        with Load(d.lab.server, "serve", SERVER, PORT, 1) as far:
            far.line(PATIENCE)
            with Load(d.lab.guest, mode, SERVER, PORT, secs, *size) as near:
                return float(near.answer(secs + PATIENCE)["n"])
    return run


def _bulk(*, up: bool) -> Callable[[drivers.Datapath, float], float]:
    def run(d: drivers.Datapath, secs: float) -> float:
        with Load(d.lab.server, "flows-listen", SERVER, PORT) as far:
            far.line(PATIENCE)
            with Load(d.lab.guest, "flows-connect", SERVER, PORT, 1) as near:
                near.answer(PATIENCE)
                sender, receiver = (near, far) if up else (far, near)
                sender.order("send")
                time.sleep(secs)
                return float(json.loads(receiver.order("report"))["bytes"]) / PIECE
    return run


WORKS = (
    Work("tcp rr", "request", _requests("rr", 1)),
    Work("udp rr", "request", _requests("udp-rr", 8)),
    Work("tcp crr", "connection", _requests("crr")),
    Work("tcp up 1", "64 KiB", _bulk(up=True)),
    Work("tcp down 1", "64 KiB", _bulk(up=False)),
)


def strace_counts(text: str) -> dict[str, int]:
    """Calls by name, out of what strace -c prints."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 5 and words[0].replace(".", "").isdigit() and words[-1] != "total":
            found[words[-1]] = int(words[3])
    return found


@contextlib.contextmanager
def straced(stages: dict[int, str], scratch: Path) -> Iterator[dict[str, dict[str, int]]]:
    """Counts of the block, by stage, there when it is over."""
    counts: dict[str, dict[str, int]] = {}
    tracers: list[tuple[str, Path, subprocess.Popen[str]]] = []
    try:
        for one, name in stages.items():
            out = scratch / f"strace-{one}"
            tracer = subprocess.Popen(["strace", "-f", "-c", "-U", "time-percent,total-time,avg-time,calls,errors,name",
                                       "-o", str(out), "-p", str(one)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            tracers.append((name, out, tracer))
            assert tracer.stderr is not None
            if not select.select([tracer.stderr], [], [], PATIENCE)[0] or "attached" not in (said := tracer.stderr.readline()):
                raise LabError(f"strace -p {one}: {said.strip() or 'ended'}")
        yield counts
    finally:
        for name, out, tracer in tracers:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=PATIENCE)
            if out.exists():
                counts[name] = strace_counts(out.read_text())


def kind_of(symbol: str, *, kernel: bool) -> str:
    if not kernel:
        return "our own code"
    return next((kind for kind, pattern in KINDS if re.search(pattern, symbol)), "other kernel")


def perf_shares(text: str) -> list[tuple[str, bool, float]]:
    """(symbol, in the kernel, share of all in [0, 1]), out of `perf report --stdio -t ';' --sort symbol`."""
    found = []
    for line in text.splitlines():
        if m := re.match(r"\s*([\d.]+)%\s*;\s*\[(.)\]\s+([^\s;]+)", line):
            found.append((m[3], m[2] == "k", float(m[1]) / 100))
    return found


def _profile(pids: Sequence[int], scratch: Path, work: Callable[[], float]) -> list[tuple[str, bool, float]]:
    data = scratch / "perf.data"
    (order_out, order), (acked, ack_in) = os.pipe(), os.pipe()
    recorder = subprocess.Popen(["perf", "record", "-q", "-e", "cpu-clock", "-F", "4999", "-o", str(data), "-D", "-1",
                                 "--control", f"fd:{order_out},{ack_in}", "-p", ",".join(map(str, pids))],
                                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=(order_out, ack_in))
    os.close(order_out)
    os.close(ack_in)
    try:
        os.write(order, b"enable\n")
        if not select.select([acked], [], [], PATIENCE)[0] or not os.read(acked, 16).startswith(b"ack"):
            raise LabError("perf record did not begin")
        work()
    finally:
        recorder.send_signal(signal.SIGINT)
        _, said = recorder.communicate(timeout=PATIENCE)
        os.close(order)
        os.close(acked)
    done = subprocess.run(["perf", "report", "-i", str(data), "--stdio", "-t", ";", "--sort", "symbol"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode or not (shares := perf_shares(done.stdout)):
        raise LabError(f"perf: {(said or done.stderr).strip() or 'no samples'}")
    return shares


def look(d: drivers.Datapath, work: Work, secs: float, scratch: Path) -> Case:
    """One kind of work, three times."""
    assert d.pid is not None
    began = time.monotonic()
    before = d.usage()
    units = work.run(d, secs)
    took = time.monotonic() - began
    used = {name: u for name, u in procs.spent(before, d.usage()).items() if u.cpu_s / units > 1e-8}
    stages = {pid: name for pid, name in procs.named_tree(d.pid).items() if name in used}
    with straced(stages, scratch) as counts:
        traced = work.run(d, secs)
    shares = _profile(list(stages), scratch, lambda: work.run(d, secs))
    cpu_us = {name: u.cpu_s / units * 1e6 for name, u in used.items()}
    all_us = sum(cpu_us.values())
    kinds: Counter[str] = Counter()
    for symbol, kernel, share in shares:
        kinds[kind_of(symbol, kernel=kernel)] += share * all_us
    return Case(work.name, work.unit, units / took, cpu_us, {name: u.sleeps / units for name, u in used.items()},
                {name: {call: n / traced for call, n in by.items() if n / traced >= 0.005} for name, by in counts.items()},
                dict(kinds.most_common()), [(s, share * all_us) for s, _, share in shares[:12]])


def markdown(by_driver: dict[str, list[Case]], meta: dict[str, Any]) -> str:
    said = (f"Measured {meta['date']} on Linux {meta['kernel']}, {meta['cpus']} CPUs ({meta['cpu']}), MTU {meta['mtu']}, "
            f"ringnet at commit {meta['commit']}.\n")
    return "\n".join([said, *(f"### {name}\n\n{_of_driver(cases)}" for name, cases in by_driver.items())])


def _of_driver(cases: Sequence[Case]) -> str:
    parts, rows = [], []
    for c in cases:
        for name in c.cpu_us:
            calls = sorted(c.calls.get(name, {}).items(), key=lambda kv: -kv[1])
            rows.append([f"{c.work}, {number(c.per_s)}/s", c.unit, name, number(c.cpu_us[name]), number(c.sleeps[name]),
                         ", ".join(f"{call} {number(n)}" for call, n in calls) or "-"])
        rows.append([c.work, c.unit, "**all**", number(sum(c.cpu_us.values())), number(sum(c.sleeps.values())),
                     f"{number(sum(n for by in c.calls.values() for n in by.values()))} calls"])
    parts.append(table(["work", "unit", "process", "CPU, us", "sleeps", "system calls"], rows))
    kinds = list(dict.fromkeys(k for c in cases for k in c.kinds))
    parts.append("CPU by what it was spent on, us a unit (`perf record -e cpu-clock`; functions are sorted by their names):\n")
    parts.append(table(["", *(f"{c.work} ({c.unit})" for c in cases)],
                       [[k, *(number(c.kinds.get(k, 0.0)) for c in cases)] for k in kinds]))
    return "\n".join(parts)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="tools/bench/where", description="Where the time of a request, or of 64 KiB, goes.")
    p.add_argument("--driver", action="append", metavar="NAME",
                   help="ringnet (the default), pasta, slirp4netns, or NAME=COMMAND as in tools/bench/run; may be repeated")
    p.add_argument("--newer-pasta", metavar="PATH", help="as in tools/bench/run: driver pasta25")
    p.add_argument("--mtu", type=int, default=1500)
    p.add_argument("--secs", type=float, default=2.0, help="of each of three runs a kind of work (default %(default)s)")
    p.add_argument("--work", default=",".join(w.name for w in WORKS), metavar="LIST", help="default: %(default)s")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--docs", type=Path, metavar="FILE.md", help="put the tables between this document's marks")
    return p


def chosen(args: argparse.Namespace) -> tuple[list[drivers.Driver], list[Work]]:
    known = {name: d for name, d in drivers.builtin(args.newer_pasta).items() if d.kind != "kernel"}
    which = []
    for name in args.driver or ["ringnet"]:
        if "=" not in name and name not in known:
            raise LabError(f"--driver {name}: not one of {', '.join(known)}")
        which.append(drivers.custom(name) if "=" in name else known[name])
    names = args.work.split(",")
    if unknown := set(names) - {w.name for w in WORKS}:
        raise LabError(f"--work {', '.join(sorted(unknown))}: not one of {', '.join(w.name for w in WORKS)}")
    for program in ("strace", "perf"):
        if not shutil.which(program):
            raise LabError(f"{program} is not installed")
    return which, [w for w in WORKS if w.name in names]


def main() -> int:
    args = parser().parse_args()
    try:
        which, works = chosen(args)
        lab.reap()
        meta = conditions() | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "mtu": args.mtu}
        found: dict[str, list[Case]] = {}
        for driver in which:
            with tempfile.TemporaryDirectory(prefix="ringnet-bench-") as scratch, drivers.running(
                    driver, lab.Lab(), args.mtu, forwards=False) as datapath:
                cases = found.setdefault(driver.name, [])
                for work in works:
                    cases.append(look(datapath, work, args.secs, Path(scratch)))
                    print(f"{driver.name}, {work.name}: {sum(cases[-1].cpu_us.values()):.1f} us CPU each {work.unit}",
                          file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"meta": meta, "cases": {name: [asdict(c) for c in cases]
                                                                     for name, cases in found.items()}}, indent=1) + "\n")
        if args.docs:
            args.docs.write_text(replaced(args.docs.read_text(), MARK, END, markdown(found, meta)))
        else:
            print(markdown(found, meta), end="")
    except (LabError, ResultsError, OSError) as e:
        print(f"where: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
