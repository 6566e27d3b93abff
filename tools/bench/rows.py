"""The rows of the tables: kinds of work, each a function of a running datapath that returns its figures.

Figures (keys of Record.values) are named with their unit; FIGURES says which way is better. CPU is that of the
datapath's whole process tree, from the start of the work to its end.
"""
from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.drivers import FORWARDS, Datapath
from bench.lab import HOST, SERVER, LabError, guest_address, inside
from bench.load import Load
from bench.stats import summary
from pipeline import procs

PATIENCE = 30.0  # s beyond what the work itself takes
PORT = "5301"
ROUNDS = 4  # of a latency row
RAMP = 0.5  # s that flows may take to find their speed before it is measured
OFFERED = 2e9  # bit/s of UDP payload
DATAGRAM = 1400  # bytes of UDP payload
FLOWS = (1, 8, 10, 100, 1000, 10000)
ENOUGH = 0.98  # of the connections asked for; Record.values says how many there were
IDLE_FLOWS = 10000
DATAGRAMS = (64, 256, 1400, 4096, 16384, 60000)
MESSAGES = (64, 1024, 16384, 65536, 262144)

MORE, LESS = "more", "less"
FIGURES = {  # figure -> (what is better, unit as printed)
    "gbps": (MORE, "Gbit/s"), "cpu_s_per_GB": (LESS, "CPU s/GB"), "p50_us": (LESS, "us"), "p90_us": (LESS, "us"),
    "p99_us": (LESS, "us"), "cpu_us_each": (LESS, "CPU us"), "sleeps_each": (LESS, "sleeps"), "per_s": (MORE, "/s"),
    "loss_percent": (LESS, "%"), "offered_gbps": (MORE, "Gbit/s"), "kpps": (MORE, "1000/s"), "jain": (MORE, ""),
    "flows": (MORE, ""), "connects_per_s": (MORE, "/s"), "cpu_percent": (LESS, "% of a core"),
    "p50_ratio": (LESS, "x"), "pss_rest_mib": (LESS, "MiB"), "pss_load_mib": (LESS, "MiB"), "seconds": (LESS, "s"),
}


@dataclass
class Measured:
    values: dict[str, float]
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    name: str
    group: str
    figure: str  # the one the table shows
    run: Callable[[Datapath, float], Measured]
    each_mtu: bool = True  # False: at the first MTU of a run only
    forwards: bool = False  # needs ports forwarded to the guest
    kernel: bool = True  # the kernel's way has such a thing


# --- bulk TCP: iperf3 ---

def _iperf(d: Datapath, secs: float, client: str, server: str, target: str, port: int, flags: tuple[str, ...]) -> Measured:
    """client, server: namespaces."""
    # bound, for an answer to a datagram would leave from the server's address on the veth
    bind = ["-B", SERVER] if server == d.lab.server else []
    listen = inside(server, "iperf3", "-s", "-1", *bind, "-p", str(port), "--forceflush")
    with subprocess.Popen(listen, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            while "listening" not in (line := serving.stdout.readline()):
                if not line:
                    raise LabError("iperf3 -s ended")
            argv = inside(client, "iperf3", "-J", "-c", target, "-p", str(port), "-t", f"{max(1, round(secs))}", *flags)
            before = d.usage()
            try:
                done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=secs + PATIENCE)
            except subprocess.TimeoutExpired as e:
                raise LabError(f"iperf3 did not end in {e.timeout:g} s") from e
            used = procs.spent(before, d.usage())
        finally:
            serving.kill()
    try:
        said = json.loads(done.stdout)
        if "error" in said:
            raise LabError(f"iperf3: {said['error']}")
        if "-u" in flags:
            return _iperf_datagrams(said["end"]["sum"], used)
        ends = [said["end"]["sum_received"]]
        if "--bidir" in flags:
            ends.append(said["end"]["sum_received_bidir_reverse"])
    except (ValueError, KeyError) as e:
        raise LabError(f"iperf3: {done.stderr.strip() or done.stdout.strip()[-300:]}") from e
    rate, amount = (sum(e[key] for e in ends) for key in ("bits_per_second", "bytes"))
    return _per_gigabyte({"gbps": rate / 1e9}, used, amount)


def _iperf_datagrams(ended: dict[str, float], used: dict[str, procs.Usage]) -> Measured:
    arrived = 1 - ended["lost_percent"] / 100
    offered = ended["bits_per_second"] / 1e9
    return _per_gigabyte({"gbps": offered * arrived, "offered_gbps": offered, "loss_percent": ended["lost_percent"]}, used,
                         ended["bytes"] * arrived)


def _per_gigabyte(values: dict[str, float], used: dict[str, procs.Usage], amount: float) -> Measured:
    if not amount:
        raise LabError("nothing arrived")
    if not used:  # the kernel's way: its CPU is on nobody's account
        return Measured(values)
    gigabytes = amount / 1e9
    return Measured(values | {"cpu_s_per_GB": procs.total(used).cpu_s / gigabytes},
                    {name: u.cpu_s / gigabytes for name, u in used.items()})


def _bulk(*flags: str) -> Callable[[Datapath, float], Measured]:
    return lambda d, secs: _iperf(d, secs, d.lab.guest, d.lab.server, SERVER, int(PORT), flags)


def _forwarded_to(d: Datapath) -> tuple[str, int]:
    """Where the server's side reaches the guest: a forwarded port, or, through the kernel, the guest itself."""
    return (guest_address(d.lab) if d.driver.kind == "kernel" else HOST), FORWARDS[0]


def _bulk_forwarded(*flags: str) -> Callable[[Datapath, float], Measured]:
    def run(d: Datapath, secs: float) -> Measured:
        target, port = _forwarded_to(d)
        return _iperf(d, secs, d.lab.server, d.lab.guest, target, port, flags)
    return run


# --- request and response ---

def _latency(d: Datapath, secs: float, mode: str, size: int, *, forwarded: bool = False) -> Measured:
    """Several rounds with new processes, the median of each figure: on which core the scheduler puts them in a round
    may halve or double its latency."""
    rounds = [_round(d, secs / ROUNDS, mode, size, forwarded=forwarded) for _ in range(ROUNDS)]

    def medians(of: list[dict[str, float]]) -> dict[str, float]:
        return {k: summary([r[k] for r in of if k in r]).median for k in of[0]}

    return Measured(medians([r.values for r in rounds]), medians([r.stages for r in rounds]))


def _round(d: Datapath, secs: float, mode: str, size: int, *, forwarded: bool = False) -> Measured:
    client, server = (d.lab.server, d.lab.guest) if forwarded else (d.lab.guest, d.lab.server)
    target, port = _forwarded_to(d) if forwarded else (SERVER, int(PORT))
    words: list[str | float] = [target, port, secs] + ([size] if mode != "crr" else [])
    with Load(server, "serve", "0.0.0.0" if forwarded else SERVER, port, 1 if mode == "crr" else size) as serving:
        serving.line(PATIENCE)
        before = d.usage()
        with Load(client, mode, *words) as asking:
            said = asking.answer(secs + PATIENCE)
        used = procs.spent(before, d.usage())
    n = said["n"]
    values = {k: float(said[k]) for k in ("per_s", "p50_us", "p90_us", "p99_us")}
    values["loss_percent"] = 100 * said["lost"] / (n + said["lost"])
    if not used:
        return Measured(values)
    sum_of = procs.total(used)
    return Measured(values | {"cpu_us_each": sum_of.cpu_s / n * 1e6, "sleeps_each": sum_of.sleeps / n},
                    {name: u.cpu_s / n * 1e6 for name, u in used.items()})


def _requests(mode: str, size: int, *, forwarded: bool = False) -> Callable[[Datapath, float], Measured]:
    return lambda d, secs: _latency(d, min(secs, 3.0), mode, size, forwarded=forwarded)


# --- datagrams ---

def _udp(d: Datapath, secs: float, *, up: bool, rate: float, size: int) -> Measured:
    with Load(d.lab.server, "udp-listen", SERVER, PORT) as far:
        far.line(PATIENCE)
        with Load(d.lab.guest, "udp-connect", SERVER, PORT) as near:
            near.line(PATIENCE)
            sender, receiver = (near, far) if up else (far, near)
            receiver.order("mark")
            before = d.usage()
            sent = json.loads(sender.order(f"send {secs} {rate} {size}", secs + PATIENCE))
            got = json.loads(receiver.order("report"))
            used = procs.spent(before, d.usage())
    values = {"gbps": got["bytes"] * 8 / sent["seconds"] / 1e9, "kpps": got["datagrams"] / sent["seconds"] / 1e3,
              "offered_gbps": sent["datagrams"] * size * 8 / sent["seconds"] / 1e9,
              "loss_percent": 100 * (1 - got["datagrams"] / sent["datagrams"])}
    return _per_gigabyte(values, used, got["bytes"])


def _datagrams(*, up: bool, rate: float = OFFERED, size: int = DATAGRAM) -> Callable[[Datapath, float], Measured]:
    return lambda d, secs: _udp(d, min(secs, 3.0), up=up, rate=rate, size=size)


# --- many flows ---

def _connected(near: Load, n: int) -> dict[str, float]:
    """Its answer when it has n connections; a few less will do, as where a datapath is out of descriptors."""
    made = near.answer(3 * PATIENCE)
    if made["flows"] < ENOUGH * n:
        raise LabError(f"{made['flows']} of {n} connections were made in {made['seconds']:.0f} s")
    return made


def _flows(n: int, *, up: bool) -> Callable[[Datapath, float], Measured]:
    def run(d: Datapath, secs: float) -> Measured:
        with Load(d.lab.server, "flows-listen", SERVER, PORT) as far:
            far.line(PATIENCE)
            with Load(d.lab.guest, "flows-connect", SERVER, PORT, n) as near:
                made = _connected(near, n)
                sender, receiver = (near, far) if up else (far, near)
                sender.order("send")
                time.sleep(RAMP)
                before = d.usage()
                receiver.order("mark")
                time.sleep(secs)
                got = json.loads(receiver.order("report"))
                used = procs.spent(before, d.usage())
        values = {"gbps": got["bytes"] * 8 / got["seconds"] / 1e9, "jain": got["jain"], "flows": float(got["flows"]),
                  "connects_per_s": made["flows"] / made["seconds"]}
        return _per_gigabyte(values, used, got["bytes"])
    return run


def _idle(d: Datapath, secs: float) -> Measured:
    """Connections nobody uses: what they cost, and what they cost others."""
    secs = min(secs, 3.0)
    with Load(d.lab.server, "flows-listen", SERVER, "5302") as far:
        far.line(PATIENCE)
        alone = _latency(d, secs, "rr", 1).values["p50_us"]
        with Load(d.lab.guest, "flows-connect", SERVER, "5302", IDLE_FLOWS) as near:
            _connected(near, IDLE_FLOWS)
            beside = _latency(d, secs, "rr", 1).values["p50_us"]
            before, began = d.usage(), time.monotonic()
            time.sleep(secs)
            used = procs.spent(before, d.usage())
            percent = 100 * procs.total(used).cpu_s / (time.monotonic() - began)
            pss = procs.pss_mib(d.pid)
            left = json.loads(near.order("count"))
    values = {"p50_us": beside, "p50_ratio": beside / alone, "flows": float(left["flows"])}
    if not used:
        return Measured(values)
    return Measured(values | {"cpu_percent": percent, "pss_load_mib": pss}, {name: u.cpu_s for name, u in used.items()})


# --- what a datapath is by itself ---

def _memory(d: Datapath, secs: float) -> Measured:
    """Before any work (rows of a run begin with this one), and the most that was seen under 100 flows each way."""
    values = {"pss_rest_mib": procs.pss_mib(d.pid)}
    most = 0.0
    with Load(d.lab.server, "flows-listen", SERVER, PORT) as far:
        far.line(PATIENCE)
        with Load(d.lab.guest, "flows-connect", SERVER, PORT, 100) as near:
            near.answer(PATIENCE)
            for side in (far, near):
                side.order("send")
            end = time.monotonic() + min(secs, 2.0)
            while time.monotonic() < end:
                time.sleep(0.1)
                most = max(most, procs.pss_mib(d.pid))
    return Measured(values | {"pss_load_mib": most})


def _start(d: Datapath, _secs: float) -> Measured:
    """From starting the command to the first connection of the guest that succeeds."""
    assert d.start_s is not None
    return Measured({"seconds": d.start_s})


ROWS: tuple[Row, ...] = (
    Row("memory", "memory", "pss_rest_mib", _memory, each_mtu=False, kernel=False),
    Row("start", "start", "seconds", _start, kernel=False),
    Row("tcp up 1", "tcp", "gbps", _bulk()),
    Row("tcp down 1", "tcp", "gbps", _bulk("-R")),
    Row("tcp up 8", "tcp", "gbps", _bulk("-P", "8")),
    Row("tcp down 8", "tcp", "gbps", _bulk("-P", "8", "-R")),
    Row("tcp both ways", "tcp", "gbps", _bulk("--bidir")),
    Row("tcp rr", "rr", "p50_us", _requests("rr", 1)),
    Row("udp rr", "rr", "p50_us", _requests("udp-rr", 8)),
    Row("tcp crr", "rr", "p50_us", _requests("crr", 1)),
    Row("udp up 1400", "udp", "gbps", _datagrams(up=True)),
    Row("udp down 1400", "udp", "gbps", _datagrams(up=False)),
    Row("iperf3 udp up 1400", "udp", "gbps", _bulk("-u", "-b", "2G", "-l", "1400")),
    Row("iperf3 udp down 1400", "udp", "gbps", _bulk("-u", "-b", "2G", "-l", "1400", "-R")),
    Row("inbound to guest", "forward", "gbps", _bulk_forwarded(), forwards=True),
    Row("inbound from guest", "forward", "gbps", _bulk_forwarded("-R"), forwards=True),
    Row("inbound rr", "forward", "p50_us", _requests("rr", 1, forwarded=True), forwards=True),
    Row("inbound crr", "forward", "p50_us", _requests("crr", 1, forwarded=True), forwards=True),
    *(Row(f"flows {way} {n}", "flows", "gbps", _flows(n, up=way == "up"), each_mtu=False)
      for n in FLOWS for way in ("up", "down")),
    Row(f"idle {IDLE_FLOWS} flows", "idle", "cpu_percent", _idle, each_mtu=False),
    *(Row(f"datagram {way} {n}", "size", "gbps", _datagrams(up=way == "up", rate=0, size=n), each_mtu=False)
      for n in DATAGRAMS for way in ("up", "down")),
    *(Row(f"message {n}", "size", "p50_us", _requests("rr", n), each_mtu=False) for n in MESSAGES),
)
GROUPS = tuple(dict.fromkeys(r.group for r in ROWS))


def chosen(words: list[str]) -> list[Row]:
    """Rows by group, by name, or by the beginning of their names; in the order of ROWS. Raises LabError."""
    found: set[str] = set()
    for word in words:
        exact = {r.name for r in ROWS if word in (r.group, r.name)}
        names = exact or {r.name for r in ROWS if word and r.name.startswith(word)}
        if not names:
            raise LabError(f"--rows {word}: neither a group ({', '.join(GROUPS)}) nor a row's name, nor its beginning")
        found |= names
    return [r for r in ROWS if r.name in found]
