"""`ringnet slirp4netns`: the options of slirp4netns that wrapper scripts use, for `ringnet attach` (docs/vm.md).

An option that is not here is refused by name: to pass it over would mean something else than was asked for.
"""
from __future__ import annotations

import argparse
import ipaddress
import sys
from typing import Any, NoReturn

from pipeline.cli import Parser, UsageError, descriptor
from pipeline.config import ConfigError, make
from pipeline.messages import Exit

CIDR = "10.0.2.0/24"
GUEST, GATEWAY = 100, 2  # addresses in the network, as slirp4netns gives them
MTU = 1500

REFUSED = {  # of slirp4netns, and why not here
    ("-6", "--enable-ipv6"): "use ringnet attach, whose settings say it",
    ("-a", "--api-socket"): "slirp4netns's own protocol; ringnet has ringnet ctl and docs/control-api.md",
    ("--enable-sandbox",): "ringnet's stages drop their rights always, in another way",
    ("--enable-seccomp",): "ringnet's stages drop their rights always, in another way",
    ("--outbound-addr",): "the host's routes choose the address",
    ("--outbound-addr6",): "the host's routes choose the address",
    ("--disable-dns",): "DNS is answered at the gateway's address only",
    ("--macaddress",): "the kernel chooses the interface's",
    ("--userns-path",): "found by itself from the namespace",
    ("--target-type",): "only network namespaces",
}


class Refuse(argparse.Action):
    """An option that means something we do not do."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> NoReturn:
        why = next(why for names, why in REFUSED.items() if option_string in names)
        raise UsageError(f"ringnet slirp4netns: {option_string}: not supported: {why}")


def parser() -> Parser:
    p = Parser(prog="ringnet slirp4netns", allow_abbrev=False, usage="ringnet slirp4netns [options] PID|PATH [TAPNAME]",
               description="Serve a network namespace, with slirp4netns's options.")
    p.add_argument("target", metavar="PID|PATH", help="a process in the namespace, or its path")
    p.add_argument("tap", metavar="TAPNAME", nargs="?", default="tap0", help="interface to make there")
    p.add_argument("-c", "--configure", action="store_true", help="bring the interface up, with address and route")
    p.add_argument("-e", "--exit-fd", metavar="FD", help="end when this descriptor is closed")
    p.add_argument("-r", "--ready-fd", metavar="FD", help="write 1 to this descriptor when ready")
    p.add_argument("-m", "--mtu", metavar="MTU", default=str(MTU), help=f"MTU (default {MTU})")
    p.add_argument("--cidr", metavar="CIDR", default=CIDR, help=f"network (default {CIDR})")
    p.add_argument("--disable-host-loopback", action="store_true", help="the gateway does not reach the host's loopback")
    p.add_argument("--netns-type", metavar="TYPE", choices=["pid", "path"], default="pid", help="what the target is")
    for names in REFUSED:
        p.add_argument(*names, action=Refuse, nargs="?", help=argparse.SUPPRESS)
    return p


def network(cidr: str) -> ipaddress.IPv4Network:
    """Raises ConfigError."""
    try:
        found = ipaddress.IPv4Network(cidr)
    except ValueError:
        raise ConfigError(f"--cidr {cidr}: not an IPv4 network like {CIDR}") from None
    if found.num_addresses <= GUEST + 1:
        raise ConfigError(f"--cidr {cidr}: has no address .{GUEST} for the guest; give /25 or larger")
    return found


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        args = parser().parse_args(argv)
        if args.netns_type == "pid" and not args.target.isdecimal():
            raise UsageError(f"ringnet slirp4netns: {args.target}: not a process id; for a path say --netns-type=path")
        net = network(args.cidr)
        settings = make({"mtu": args.mtu, "address": str(net[GUEST]), "gateway": str(net[GATEWAY]),
                         "netmask": str(net.prefixlen), "ifname": args.tap,
                         "no-host-loopback": args.disable_host_loopback, "quiet": True})
        from pipeline.runner import attach

        return attach(settings, args.target, config_net=args.configure,
                      ready_fd=descriptor("ready-fd", args.ready_fd, "slirp4netns"),
                      exit_fd=descriptor("exit-fd", args.exit_fd, "slirp4netns"))
    except UsageError as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except ConfigError as e:
        print(f"ringnet slirp4netns: {str(e).replace('--ifname', 'TAPNAME', 1)}", file=sys.stderr)
        return int(Exit.USAGE)
