"""`ringnet flows`: every flow of a session: its figures, which stage runs each half, and in words what it waits for."""
from __future__ import annotations

import argparse
import ipaddress
import re
import select
from collections.abc import Callable

import msgspec

from pipeline import api
from pipeline.api import ApiError
from pipeline.client import ClientError
from pipeline.ctl import CtlUsage, Parser, common
from pipeline.look import PROTOCOLS, SORTS, FlowRate, Looker
from pipeline.supervisor import Signals
from pipeline.text import bits, duration, size, table
from pipeline.top import EPILOG, flow_section, run
from shm.flows import Flow


def parser() -> Parser:
    p = Parser(prog="ringnet flows", allow_abbrev=False, parents=[common()], epilog=EPILOG,
               description="Every flow of a running session, and in words what it waits for. FLOW, like 12.3: all that is"
                           " known of one.")
    p.add_argument("flow", nargs="?", metavar="FLOW", help="all that is known of this one")
    p.add_argument("--proto", choices=["tcp", "udp", "icmp"], help="only this protocol")
    p.add_argument("--host", metavar="ADDR", default="", help="only flows of this address, either end")
    p.add_argument("--port", type=int, metavar="N", default=0, help="only flows of this port, either end")
    p.add_argument("--waiting", action="store_true", help="only those that wait for something")
    p.add_argument("--sort", choices=list(SORTS), default="age", help="which come first (default age)")
    p.add_argument("-n", "--most", type=int, metavar="N", default=0, help="at most so many")
    p.add_argument("-i", "--interval", type=float, metavar="S", default=1.0,
                   help="with --watch: between two looks (default 1)")
    p.add_argument("--watch", action="store_true", help="again and again, until ^C; up and down are then bits a second")
    return p


def detail(f: FlowRate) -> str:
    """All that is known of a flow."""
    peer = f"{f.peer}:{f.peer_port}" if f.peer else "every peer"
    return "\n".join([
        f"flow         {f.flow}  {f.proto}  {f.guest}:{f.guest_port} - {peer}  {f.state}",
        f"age          {duration(f.age_s)}, last frame {duration(f.idle_s)} ago",
        f"waits for    {f.waits or 'nothing'}",
        f"up           {size(f.up_bytes)} in {f.up_packets} segments, {bits(f.up_bits_s)}bit/s, run by"
        f" {f.up_owner or 'nobody'}; next byte {f.rcv_nxt}, window offered {size(f.rcv_window)}, parked {size(f.parked)};"
        f" FIN {f.up_fin or 'not seen'}",
        f"down         {size(f.down_bytes)} in {f.down_packets} segments, {bits(f.down_bits_s)}bit/s, run by"
        f" {f.down_owner or 'nobody'}; acknowledged to {f.snd_una}, sent to {f.snd_nxt} ({size(f.in_flight)} in flight),"
        f" guest's window {size(f.snd_window)}, MSS {f.mss}; FIN {f.down_fin or 'not sent'}",
        f"round trip   {f.srtt_ms:.2f} ms, retransmission after {f.rto_ms:.0f} ms; {f.retransmits} frames sent again"])


def _wanted(args: argparse.Namespace) -> Callable[[Flow], bool]:
    """Raises CtlUsage."""
    host, port = args.host, args.port
    if host:
        try:
            host = str(ipaddress.ip_address(host))
        except ValueError:
            raise CtlUsage(f"ringnet flows: --host {host}: not an IP address") from None
    return lambda f: (not host or host in (f.guest, f.peer)) and (not port or port in (f.guest_port, f.peer_port))


def _show(args: argparse.Namespace, looker: Looker, signals: Signals) -> None:
    wanted = _wanted(args)
    if args.flow and not re.fullmatch(r"\d+\.\d+", args.flow):
        raise CtlUsage(f"ringnet flows: {args.flow}: not a flow's name, like 12.3")
    proto = {name: number for number, name in PROTOCOLS.items()}.get(args.proto, 0)
    as_json = getattr(args, "json", False)
    first = True
    while True:
        if args.flow:
            index, gen = map(int, args.flow.split("."))
            found, *_ = looker.flows(most=1, wanted=lambda f: (f.index, f.gen) == (index, gen))
            if not found:
                raise ApiError(api.Code.NOT_FOUND, f"there is no flow {args.flow}")
        else:
            every, *_ = looker.flows(most=-1 if args.waiting or not args.most else args.most, sort=args.sort,
                                     wanted=wanted, proto=proto)
            found = [f for f in every if f.waits] if args.waiting else every
            found = found[:args.most] if args.most else found
        if as_json:
            for f in found:
                print(msgspec.json.encode(f).decode())
            print(end="", flush=True)
        elif args.flow:
            print(detail(found[0]), flush=True)
        else:
            _, head, rows, left = flow_section(found, rates=args.watch and not first)
            print(table(head, rows, left) if rows else "no flows", flush=True)
        if not args.watch:
            return
        first = False
        poll = select.poll()
        for fd in (signals.fileno(), looker.client.fileno()):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(args.interval * 1000)}
        if signals.fileno() in ready and signals.take():
            return
        if looker.client.fileno() in ready:
            raise ClientError(f"session {looker.session} ended")


def main(argv: list[str]) -> int:
    """argv: what follows `ringnet flows`. Returns the exit code."""
    return run(parser, argv, _show)
