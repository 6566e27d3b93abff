"""`ringnet ctl`: look at a running session and change it, through its control API (docs/control-api.md).

Prints for people, or with --json the API's own results. Exit 0: done; 1: refused, or there is no such session, one line
says why; 2: wrong usage.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from pipeline import api, session_dir
from pipeline.api import ApiError
from pipeline.client import Client, ClientError, find
from pipeline.messages import Exit, Level
from pipeline.seats import by_hand
from pipeline.text import duration, size, table

STEP_S = 1.0  # s that `step` waits for the frames
EPILOG = "exit status: 0 done; 1 refused, or no such session; 2 usage"


class CtlUsage(Exception):
    """One line about the command line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise CtlUsage(f"{self.prog}: {message} (see {self.prog} --help)")


def common(*, json: bool = True) -> Parser:
    """Options of every command that looks at a session."""
    made = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    made.add_argument("-s", "--session", metavar="NAME", help="which session ($RINGNET_SESSION; else the only one)")
    made.add_argument("--api-socket", metavar="PATH", help="the session's control socket, instead of its name")
    if json:
        made.add_argument("--json", action="store_true", help="print the API's result, one JSON object a line")
    return made


def parser() -> Parser:
    shared = common()
    top = Parser(prog="ringnet ctl", allow_abbrev=False, parents=[shared], epilog=EPILOG,
                 description="Look at a running session and change it.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(where: Any, name: str, does: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        p: argparse.ArgumentParser = where.add_parser(name, allow_abbrev=False, parents=[shared], help=text,
                                                      description=text[:1].upper() + text[1:] + ".")
        p.set_defaults(does=does)
        return p

    def group(name: str, text: str) -> Any:
        return commands.add_parser(name, allow_abbrev=False, parents=[shared], help=text).add_subparsers(
            dest="verb", metavar="VERB", required=True)

    add(commands, "ls", ls, "the sessions that run")
    add(commands, "status", status, "the session in a few words")
    add(commands, "stages", stages, "each stage: state, frames, drops by reason, CPU")
    add(commands, "statistics", statistics, "every counter that is not zero, rings, frame buffers and flows")

    forward = group("forward", "ports of the host that lead to the guest")
    p = add(forward, "add", forward_add, "forward ports; all, or none")
    p.add_argument("spec", nargs="+", metavar="SPEC", help="like 8080:80, or auto (docs/forwards.md)")
    _udp_owner(p)
    p = add(forward, "ls", forward_ls, "what is forwarded")
    p.add_argument("--owner", help="only what this owner added")
    p = add(forward, "rm", forward_rm, "stop forwarding; without SPEC all that the owner has")
    p.add_argument("spec", nargs="*", metavar="SPEC")
    p.add_argument("-u", "--udp", action="store_true", help="UDP ports, not TCP")
    p.add_argument("--owner", help="only what this owner added")
    p.add_argument("--close-flows", action="store_true", help="end the connections that came through them too")
    p = add(forward, "replace", forward_replace, "let an owner have exactly these forwards; all, or none")
    p.add_argument("--owner", required=True)
    p.add_argument("-t", "--tcp-ports", action="append", default=[], metavar="SPEC", help="may be repeated")
    p.add_argument("-u", "--udp-ports", action="append", default=[], metavar="SPEC", help="may be repeated")
    p.add_argument("--close-flows", action="store_true", help="end the connections that came through those that go")

    hosts = group("hosts", "names that are answered locally")
    for name, does, text in (("add", hosts_add, "give names addresses"),
                             ("replace", hosts_replace, "let an owner have exactly these names and domains")):
        p = add(hosts, name, does, text)
        p.add_argument("name", nargs="*", metavar="NAME=IP[,IP...]",
                       help="*.DOMAIN=IP: what has no name of its own; NAME=NAME: an alias")
        p.add_argument("--domain", action="append", default=[], help="below it unknown names do not exist")
        p.add_argument("--owner", default="", required=name == "replace", help="who they belong to")
    p = add(hosts, "ls", hosts_ls, "names, their addresses and owners")
    p.add_argument("--owner", help="only this owner's")
    p = add(hosts, "rm", hosts_rm, "take names away; without any, all that the owner has")
    p.add_argument("name", nargs="*", metavar="NAME")
    p.add_argument("--domain", action="append", default=[], help="an owned domain; may be repeated")
    p.add_argument("--owner", default="", help="who they belong to")

    p = add(commands, "flows", flows, "connections and mappings in use")
    p.add_argument("--proto", choices=["tcp", "udp", "icmp"])
    p = add(commands, "close", close, "end one flow; a TCP connection is reset on both sides")
    p.add_argument("flow", metavar="FLOW", help="as `flows` names it, like 12.3")
    rules = group("policy", "what may be called, out and in")
    add(rules, "ls", policy_ls, "the rules that hold, and how often they denied something")
    p = add(rules, "replace", policy_replace, "other rules instead of those of --policy; all, or none")
    p.add_argument("rule", nargs="*", metavar="RULE", help="like 'deny out tcp 10.0.0.0/8 port 22' (docs/policy.md)")
    p = add(commands, "hold", hold, "free a stage's seat, to take it by hand (ringnet stage NAME)")
    p.add_argument("stage", metavar="STAGE")
    p = add(commands, "release", release, "let the session fill a held seat again")
    p.add_argument("stage", metavar="STAGE")
    p = add(commands, "pause", pause, "let a stage stand still; its neighbours feel a busy one")
    p.add_argument("stage", metavar="STAGE")
    p = add(commands, "step", step, "let a stage take N frames more, then stand still; says what it counted")
    p.add_argument("stage", metavar="STAGE")
    p.add_argument("frames", nargs="?", type=int, default=1, metavar="N", help="frames (1)")
    p = add(commands, "resume", resume, "let a stage go on")
    p.add_argument("stage", metavar="STAGE")
    impair = group("impair", "bad wires on purpose (docs/impairment.md)")
    p = add(impair, "set", impair_set, "from now on; instead of one that is there")
    p.add_argument("spec", nargs="+", metavar="SPEC", help="as --impair takes it, like down:drop=1%%")
    add(impair, "ls", impair_ls, "those there are")
    p = add(impair, "rm", impair_rm, "take one away; what it holds goes on in its time")
    p.add_argument("place", metavar="PLACE", help="up, down, or a ring")
    p = add(commands, "latency", latency, "how long sampled frames took between two stages")
    p.add_argument("source", nargs="?", metavar="FROM", help="only from this stage")
    p.add_argument("target", nargs="?", metavar="TO", help="to this one, with the histogram")
    p = add(commands, "dump", dump, "write what is in shared memory below a directory, for ringnet postmortem")
    p.add_argument("directory", metavar="DIR")
    p = add(commands, "log", log, "how much the session says on standard error")
    p.add_argument("level", choices=get_args(Level))
    p.add_argument("--stage", metavar="NAME", help="only this stage's (supervisor: the session itself)")
    p = add(commands, "events", events, "what happens, as it happens")
    p.add_argument("event", nargs="*", metavar="EVENT", help=f"only these: {', '.join(api.EVENTS)}")
    p.add_argument("--count", type=int, default=0, metavar="N", help="end after so many")
    p = add(commands, "cancel", cancel, "end an interface of the guest; nic1 is the session")
    p.add_argument("nic", nargs="?", default="nic1", choices=["nic1", "nic2"])
    p = add(commands, "start", start, "bring an interface of the guest up again that was cancelled, or failed")
    p.add_argument("nic", nargs="?", default="nic2", choices=["nic2"])
    return top


def _udp_owner(p: argparse.ArgumentParser) -> None:
    p.add_argument("-u", "--udp", action="store_true", help="UDP ports, not TCP")
    p.add_argument("--owner", default="", help="tag, to be removed or replaced by")


class Output:
    """Where results go: as JSON, or as text made of them."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def show(self, result: Any, text: str | None) -> None:
        """text: None or "" prints nothing."""
        if self.as_json:
            text = msgspec.json.encode(result).decode()
        if text:
            print(text, flush=True)


# --- commands: (client, arguments, output) ---


def ls(args: argparse.Namespace, out: Output) -> None:
    found = []
    for name, path in session_dir.sessions().items():
        try:
            with Client(path, timeout=5) as client:
                found.append(client.call(api.GetStatus()))
        except (ClientError, ApiError) as e:
            print(f"ringnet ctl: session {name}: {e}", file=sys.stderr)
    if out.as_json:
        for s in found:
            out.show(s, None)
        return
    rows = [[s.session, str(s.pid), s.address, str(s.mtu), duration(s.uptime_s), str(s.flows), str(s.forwards),
             s.socket] for s in found]
    out.show(None, table(["session", "pid", "guest", "MTU", "up", "flows", "forwards", "socket"], rows,
                         frozenset({0, 2, 7})) if rows else "no session runs")


def status(client: Client, args: argparse.Namespace, out: Output) -> None:
    s = client.call(api.GetStatus())
    out.show(s, "\n".join([
        f"session    {s.session} ({s.state}), supervisor's pid {s.pid}, up {duration(s.uptime_s)}",
        f"socket     {s.socket}",
        f"guest      {s.address} in {s.network}, gateway {s.gateway}, MTU {s.mtu}, {s.link} {s.interface}",
        f"stages     {s.stages} running",
        f"flows      {s.flows} of {s.flows_max}",
        f"forwards   {s.forwards}",
        f"names      {s.names}", *_second(s.nic2)]))


def _second(nic: api.NicInfo | None) -> list[str]:
    if nic is None:
        return []
    address = f"{nic.address or 'address by DHCP of its network'}" + (f", host {nic.gateway}" if nic.gateway else "")
    return [f"NIC2       {nic.state}{': ' + nic.reason if nic.reason else ''}; {nic.interface}, {nic.mac}, MTU {nic.mtu},"
            f" {address}; {nic.host}" + (f"; routes {', '.join(nic.routes)}" if nic.routes else "")]


def stages(client: Client, args: argparse.Namespace, out: Output) -> None:
    found = client.call(api.Stages())
    rows = []
    for f in found.stages:
        drops = ", ".join(f"{reason} {n}" for reason, n in sorted(f.drops.items(), key=lambda d: -d[1])) or "none"
        rows.append([f.name, f.state, str(f.pid), str(f.frames_in), size(f.bytes_in), str(f.frames_out),
                     size(f.bytes_out), f"{f.cpu_s:.2f} s", drops])
    out.show(found, table(["stage", "state", "pid", "frames in", "bytes in", "frames out", "bytes out", "CPU",
                           "drops by reason"], rows, frozenset({0, 1, 8})))


def statistics(client: Client, args: argparse.Namespace, out: Output) -> None:
    found = client.call(api.Statistics())
    rows = [[stage, name, str(value)] for stage, counters in found.counters.items() for name, value in counters.items()]
    rings = [[r.name, str(r.fill), str(r.total)] for r in found.rings]
    buffers = [[b.stage, b.kind, str(b.total), str(b.free), ", ".join(f"{who} {n}" for who, n in b.held.items()) or "nobody"]
               for b in found.buffers]
    out.show(found, table(["stage", "counter", "value"], rows, frozenset({0, 1})) + "\n\n"
             + table(["ring", "waiting", "ever"], rings) + "\n\n"
             + table(["buffers of", "kind", "total", "free", "held by"], buffers, frozenset({0, 1, 4})) + "\n\n"
             + table(["flows", "entries"], [[state, str(n)] for state, n in sorted(found.flows.items())]))


def _done(out: Output, changed: api.Changed, one: str, many: str) -> None:
    said = [f"{n} {one if n == 1 else many} {verb}" for n, verb in ((changed.added, "added"),
                                                                        (changed.removed, "removed")) if n]
    out.show(changed, ", ".join(said) or "nothing changed")


def forward_add(client: Client, args: argparse.Namespace, out: Output) -> None:
    _done(out, client.call(api.ForwardsAdd(specs=args.spec, proto="udp" if args.udp else "tcp", owner=args.owner)),
          "forward", "forwards")


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address or "*"


def forward_ls(client: Client, args: argparse.Namespace, out: Output) -> None:
    pages = list(client.pages(api.ForwardsList(owner=args.owner)))
    found, autos = [f for page in pages for f in page.forwards], pages[0].autos
    rows = [[a.proto, a.spec, "what it listens on", a.owner] for a in autos]
    rows += [[f.proto, f"{_host(f.host_addr)}{'%' + f.ifname if f.ifname else ''}:{f.host_port}",
              f"{f.guest_addr or 'guest'}:{f.guest_port}{' (auto)' if f.auto else ''}", f.owner] for f in found]
    out.show(api.Forwards(forwards=found, autos=autos, next=None),
             table(["proto", "host", "guest", "owner"], rows, frozenset({0, 1, 2, 3})) if rows else "no forwards")


def forward_rm(client: Client, args: argparse.Namespace, out: Output) -> None:
    if not args.spec and args.owner is None:
        raise CtlUsage("ringnet ctl forward rm: name ports, or --owner for all of its")
    if not args.spec and args.udp:
        raise CtlUsage("ringnet ctl forward rm: --udp says what the SPECs are; there is none")
    _done(out, client.call(api.ForwardsRemove(specs=args.spec, proto="udp" if args.udp else "tcp", owner=args.owner,
                                              close_flows=args.close_flows)), "forward", "forwards")


def forward_replace(client: Client, args: argparse.Namespace, out: Output) -> None:
    _done(out, client.call(api.ForwardsReplace(owner=args.owner, tcp=args.tcp_ports, udp=args.udp_ports,
                                               close_flows=args.close_flows)), "forward", "forwards")


def _names(pairs: list[str]) -> dict[str, list[str]]:
    """Raises CtlUsage."""
    names: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, addresses = pair.partition("=")
        if not (name and equals and addresses):
            raise CtlUsage(f"ringnet ctl hosts: {pair}: expected NAME=IP, like db.internal=192.0.2.7")
        names.setdefault(name, []).extend(addresses.split(","))
    return names


def hosts_add(client: Client, args: argparse.Namespace, out: Output) -> None:
    if not args.name and not args.domain:
        raise CtlUsage("ringnet ctl hosts add: name something: NAME=IP, or --domain")
    _done(out, client.call(api.HostsAdd(names=_names(args.name), domains=args.domain, owner=args.owner)),
          "entry", "entries")


def hosts_replace(client: Client, args: argparse.Namespace, out: Output) -> None:
    _done(out, client.call(api.HostsReplace(names=_names(args.name), domains=args.domain, owner=args.owner)),
          "entry", "entries")


def hosts_ls(client: Client, args: argparse.Namespace, out: Output) -> None:
    pages = list(client.pages(api.HostsList(owner=args.owner)))
    names, domains = [n for page in pages for n in page.names], pages[0].domains
    rows = [[n.name, ", ".join(n.addresses), n.owner] for n in names]
    rows += [[d.domain, "(no names but these)", d.owner] for d in domains]
    out.show(api.Hosts(names=names, domains=domains, next=None),
             table(["name", "addresses", "owner"], rows, frozenset({0, 1, 2})) if rows else "no names")


def hosts_rm(client: Client, args: argparse.Namespace, out: Output) -> None:
    _done(out, client.call(api.HostsRemove(names=args.name, domains=args.domain, owner=args.owner)),
          "entry", "entries")


def flows(client: Client, args: argparse.Namespace, out: Output) -> None:
    found = [f for page in client.pages(api.FlowsList(proto=args.proto)) for f in page.flows]
    rows = [[f.flow, f.proto, f.state, f"{f.guest}:{f.guest_port}", f"{f.peer}:{f.peer_port}" if f.peer else "*",
             size(f.up_bytes), size(f.down_bytes), duration(f.age_s), duration(f.idle_s)] for f in found]
    out.show(api.FlowList(flows=found, next=None), table(
        ["flow", "proto", "state", "guest", "peer", "up", "down", "age", "idle"], rows, frozenset({0, 1, 2, 3, 4}))
        if rows else "no flows")


def close(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.FlowsClose(flow=args.flow)), None)


def policy_ls(client: Client, args: argparse.Namespace, out: Output) -> None:
    found = client.call(api.PolicyList())
    rows = [[r.action, ",".join(r.ways), ",".join(r.protos), ",".join(r.networks) or "any", ",".join(r.ports) or "any",
             r.rule] for r in found.rules]
    rows.append(["allow", "out,in", "tcp,udp,icmp", "any", "any", "(what no rule fits)"])
    out.show(found, table(["action", "way", "protocol", "network", "ports", "rule"], rows, frozenset(range(6)))
             + f"\n\ndenied: {found.denied_out} out, {found.denied_in} in")


def policy_replace(client: Client, args: argparse.Namespace, out: Output) -> None:
    _done(out, client.call(api.PolicyReplace(rules=args.rule)), "rule", "rules")


def log(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.Log(level=args.level, stage=args.stage)), None)


def hold(client: Client, args: argparse.Namespace, out: Output) -> None:
    client.call(api.StageHold(stage=args.stage))
    name = client.call(api.GetStatus()).session
    commands = "\n".join(f"{what:<17} {command}" for what, command in by_hand(args.stage, name))
    out.show(api.Nothing(), f"take its seat, as often as you like:\n{commands}")


def release(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.StageRelease(stage=args.stage)), None)


def pause(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.StagePause(stage=args.stage)), None)


def resume(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.StageResume(stage=args.stage)), None)


def step(client: Client, args: argparse.Namespace, out: Output) -> None:
    """Waits a moment for the frames, to say what became of them; there need not be any."""
    def counted() -> dict[str, int]:
        return client.call(api.Statistics()).counters.get(args.stage, {})

    before = counted()
    result = client.call(api.StageStep(stage=args.stage, frames=args.frames))
    until, after = time.monotonic() + STEP_S, counted()
    while after.get("frames_in", 0) - before.get("frames_in", 0) < args.frames and time.monotonic() < until:
        time.sleep(0.02)
        after = counted()
    more = {n: v - before.get(n, 0) for n, v in after.items() if v != before.get(n, 0)}
    for name in ("turns", "sleeps", "wakes_sent"):
        more.pop(name, None)
    out.show(result, "\n".join(f"{n} +{v}" for n, v in more.items()) or "no frame came yet")


def impair_set(client: Client, args: argparse.Namespace, out: Output) -> None:
    for spec in args.spec:
        out.show(client.call(api.ImpairSet(spec=spec)), None)


def impair_ls(client: Client, args: argparse.Namespace, out: Output) -> None:
    result = client.call(api.ImpairList())
    out.show(result, "\n".join(result.specs) or None)


def impair_rm(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.ImpairClear(place=args.place)), None)


def _quantile(buckets: list[tuple[int, int]], q: float) -> str:
    """Upper bound of the bucket that this share of the frames is within."""
    left = q * sum(n for _, n in buckets)
    for bound, n in buckets:
        left -= n
        if left <= 0:
            return _ns(bound)
    return ""


def _ns(bound: int) -> str:
    if bound < 0:
        return "more"
    return f"{bound / 1e3:.3g} us" if bound < 1e6 else f"{bound / 1e6:.3g} ms" if bound < 1e9 else f"{bound / 1e9:.3g} s"


def latency(client: Client, args: argparse.Namespace, out: Output) -> None:
    result = client.call(api.Latency())
    paths = [p for p in result.paths if args.source in (None, p.source) and args.target in (None, p.target)]
    inline = {"guest_tx": ("the guest's link", "host socket (promoted)"), "guest_rx": ("host socket (promoted)", "the guest's link")}
    rows = [[*(inline.get(p.source, (p.source, p.target)) if p.source == p.target else (p.source, p.target)), str(sum(n for _, n in p.buckets)), _quantile(p.buckets, 0.5), _quantile(p.buckets, 0.9),
             _quantile(p.buckets, 0.99), _quantile(p.buckets, 1.0)] for p in paths]
    text = table(["from", "to", "sampled", "50 %", "90 %", "99 %", "all"], rows, frozenset({0, 1}))
    for p in paths if args.target else ():
        most = max(n for _, n in p.buckets)
        text += "\n" + "\n".join(f"< {_ns(b):>8} {n:>8} {'#' * (40 * n // most)}" for b, n in p.buckets)
    out.show(api.Latencies(paths=paths), text if paths else "no frame was sampled yet (one in 64 is)")


def dump(client: Client, args: argparse.Namespace, out: Output) -> None:
    result = client.call(api.Dump(directory=os.path.abspath(args.directory)))
    out.show(result, f"ringnet postmortem {result.directory}")


def cancel(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.CancelNic(nic=args.nic)), None)


def start(client: Client, args: argparse.Namespace, out: Output) -> None:
    out.show(client.call(api.StartNic(nic=args.nic)), None)


def events(client: Client, args: argparse.Namespace, out: Output) -> None:
    if unknown := [e for e in args.event if e not in api.EVENTS]:
        raise CtlUsage(f"ringnet ctl events: {unknown[0]}: no such event; there are {', '.join(api.EVENTS)}")
    client.call(api.Subscribe(events=args.event or None))
    for seen, event in enumerate(client.events(), 1):
        fields = " ".join(f"{k}={_flat(v)}" for k, v in msgspec.to_builtins(event).items()
                          if k not in ("event", "time"))
        out.show(event, f"{api.event_name(event)} {fields}")
        if seen == args.count:
            return


def _flat(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items() if v != "") if isinstance(value, dict) else str(value)


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet ctl`. Returns the exit code."""
    try:
        args = parser().parse_args(argv)
        out = Output(getattr(args, "json", False))
        if args.command == "ls":
            ls(args, out)
            return int(Exit.OK)
        with Client(getattr(args, "api_socket", "") or find(getattr(args, "session", ""))) as client:
            args.does(client, args, out)
    except CtlUsage as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except (ClientError, ApiError) as e:
        code = 2 if isinstance(e, ApiError) and e.code == api.Code.BAD_ARGS else 1
        print(f"ringnet ctl: {e}", file=sys.stderr)
        return code
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads us: no second complaint at exit
        return int(Exit.RUNTIME)
    except KeyboardInterrupt:
        return 130
    return int(Exit.OK)
