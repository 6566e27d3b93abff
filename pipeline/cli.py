"""The command line: `ringnet run | attach | vm | ctl | capture | passt | slirp4netns | demo | completion | stage`. Parses, checks, calls;
options come from pipeline.config.

Wrong usage is one line and exit 2; what only running shows is one line and exit 1 (pipeline.messages.Exit).
"""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import ConfigError, Settings, load_toml, make, options
from pipeline.messages import Exit
from pipeline.proxies import has_password
from pipeline.vm_types import TYPES, VmOptions

EPILOG = """exit status: 0 fine; 1 it could not be set up; 2 usage; 70 a stage died, 71 a stage failed, 72 a stage did
not start. `ringnet run` otherwise ends with the command's own status (128 + n if signal n ended it)."""

# Commands with a module, and a parser, of their own.
OWN_PARSERS = {
    "ctl": "look at a running session, and change it",
    "capture": "write frames of a running session as pcapng",
    "doctor": "say what this machine lacks for ringnet",
    "bench": "how fast is it here, beside pasta and slirp4netns",
    "top": "watch a running session: stages, rings, drops, busiest flows",
    "flows": "every flow of a session, and in words what it waits for",
    "explain": "what the stages decided about a flow, a drop counter or an address",
    "postmortem": "the same of a session that died",
    "passt": "vm, with passt's options, for scripts that call it",
    "slirp4netns": "attach, with slirp4netns's options, for scripts that call it",
}


class UsageError(Exception):
    """One line about the command line."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, raised."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def version() -> str:
    """From the installed package, or from the checkout's pyproject.toml."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.exists():
        import tomllib

        return str(tomllib.loads(pyproject.read_text())["project"]["version"])
    try:
        return installed("ringnet")
    except PackageNotFoundError:
        return "0"


def add_settings(parser: argparse.ArgumentParser, *, tap: bool = False) -> None:
    """Every option of Settings, and --config. tap: --tap means --ifname."""
    parser.add_argument("--config", metavar="FILE.toml", default="",
                        help="read these options from a file; keys are the long names, flags win over it")
    for o in options():
        names = ([f"-{o.flag}"] if o.flag else []) + [f"--{o.key}"] + (["--tap"] if tap and o.name == "ifname" else [])
        default = "" if o.default in ("", (), {}, False) else f" (default {o.default})"
        kind: dict[str, Any] = {"action": "store_true"} if not o.arg else {"metavar": o.arg}
        if o.many:
            kind["action"] = "append"
        parser.add_argument(*names, dest=o.key, default=argparse.SUPPRESS, help=o.help + default, **kind)


def settings_from(args: argparse.Namespace, **defaults: Any) -> Settings:
    """Settings from a parsed command line and its --config file. defaults: where the command has others, by attribute.
    Raises ConfigError."""
    given = {o.key: getattr(args, o.key) for o in options() if hasattr(args, o.key)}
    if has_password(given.get("proxy", "")):
        print("ringnet: --proxy: every user of this machine can read a password on the command line; put the URL into"
              " --config FILE.toml, or into ALL_PROXY with --proxy auto", file=sys.stderr)
    if "hosts" in given:
        given["hosts"] = hosts_table(given["hosts"])
    from_file = load_toml(args.config) if args.config else {}
    try:
        return make(defaults | from_file | given)
    except ConfigError as e:
        key = str(e).removeprefix("--").split()[0].rstrip(":")
        if key in from_file and key not in given:
            raise ConfigError(f"--config {args.config}: {str(e).removeprefix('--')}") from e
        raise


def hosts_table(pairs: list[str]) -> dict[str, list[str]]:
    """NAME=IP[,IP...], repeated. Raises ConfigError."""
    table: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, addresses = pair.partition("=")
        if not (name and equals and addresses):
            raise ConfigError(f"--hosts {pair}: expected NAME=IP, like db.internal=192.0.2.7")
        table.setdefault(name, []).extend(addresses.split(","))
    return table


def descriptor(option: str, text: str | None, command: str = "attach") -> int:
    """A descriptor we were started with; -1: none. Raises UsageError."""
    if text is None:
        return -1
    try:
        fd = int(text)
        os.fstat(fd)
    except (ValueError, OverflowError):
        raise UsageError(f"ringnet {command}: --{option} {text}: not a descriptor number") from None
    except OSError:
        raise UsageError(f"ringnet {command}: --{option} {text}: not an open descriptor") from None
    return fd


def parser() -> Parser:
    top = Parser(prog="ringnet", allow_abbrev=False, epilog=EPILOG,
                 description="User-mode networking for a guest: a process a stage, shared-memory rings between them.")
    top.add_argument("--version", action="version", version=f"ringnet {version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", allow_abbrev=False, epilog=EPILOG, help="run a command in a new guest namespace",
                              usage="ringnet run [options] [--] [CMD ...]",
                              description="Make a guest namespace, configure it by DHCP through the pipeline, run CMD"
                                          " ($SHELL if none) in it. No root needed.")
    add_settings(run)
    run.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD ...", help="command and its arguments")
    attach = commands.add_parser("attach", allow_abbrev=False, epilog=EPILOG,
                                 help="serve an existing network namespace",
                                 description="Make a tap in an existing network namespace and serve it, in the"
                                             " foreground, until a signal, --exit-fd or the process's end.")
    attach.add_argument("target", metavar="PID|NETNS-PATH", help="a process in the namespace, or /run/netns/NAME")
    attach.add_argument("--config-net", action="store_true", help="set address, route and link up before being ready")
    attach.add_argument("--ready-fd", metavar="N", help="write 1 to this descriptor when ready, then close it")
    attach.add_argument("--exit-fd", metavar="N", help="end when this descriptor is readable or closed by its peer")
    add_settings(attach, tap=True)
    vm = commands.add_parser("vm", allow_abbrev=False, epilog=EPILOG, help="serve a virtual machine",
                             description="Serve a virtual machine that is connected by a socket (docs/vm.md), in the"
                                         " foreground, until a signal. A machine that is started again finds the same"
                                         " session.")
    vm.add_argument("--type", required=True, choices=list(TYPES), metavar="TYPE",
                    help="; ".join(f"{t.name}: {t.does}" for t in TYPES.values()))
    vm.add_argument("--socket", metavar="PATH", default="",
                    help="where the machine comes in: a path that is made, or for qemu-stream 127.0.0.1:PORT")
    vm.add_argument("--fd", metavar="N", help="a connected socket, or a tap, instead")
    vm.add_argument("--nic2-socket", metavar="PATH", default="",
                    help="where the machine's second interface comes in, with --nic2")
    vm.add_argument("--nic2-fd", metavar="N", help="a connected socket or a tap for it instead (docs/nic2.md)")
    vm.add_argument("-1", "--one-off", action="store_true", help="end with the first machine")
    vm.add_argument("--vnet-hdr", action="store_true",
                    help="each frame on the socket has a 12-byte virtio-net header, and offloads")
    vm.add_argument("--offloading", action="store_true",
                    help="frames have no such header but offloads all the same, as of libkrun and krunkit with offloading=on")
    vm.add_argument("--ready-fd", metavar="N", help="write 1 to this descriptor when a machine may come, then close it")
    vm.add_argument("--exit-fd", metavar="N", help="end when this descriptor is readable or closed by its peer")
    add_settings(vm)
    demo = commands.add_parser("demo", add_help=False, help="show the main job with nothing but this machine")
    demo.add_argument("rest", nargs=argparse.REMAINDER)
    for name, does in OWN_PARSERS.items():
        own = commands.add_parser(name, add_help=False, help=does)
        own.add_argument("rest", nargs=argparse.REMAINDER)
    completion = commands.add_parser("completion", help="print the completion script of a shell",
                                     description="Print a script that completes ringnet's commands and options:"
                                                 " source <(ringnet completion bash)")
    completion.add_argument("shell", choices=["bash", "zsh"])
    helper = commands.add_parser("nic2-helper", allow_abbrev=False, help="make a second NIC's host side for a session"
                                                                          " without rights",
                                 usage="ringnet nic2-helper --nic2 MODE [--route NET] [--user USER] -- CMD ...",
                                 description="Run CMD, a ringnet run or attach with --nic2 fd=3, without rights, and make"
                                             " the host side of its second NIC with ours (docs/nic2.md).")
    helper.add_argument("--nic2", metavar="MODE", required=True, help="shared, host or bridged,if=NAME, and options")
    helper.add_argument("--route", metavar="NET", action="append", default=[], help="as of ringnet run; may be repeated")
    helper.add_argument("--user", metavar="USER", default="", help="run CMD as this user (default: who called sudo)")
    commands.add_parser("stage", help="be a stage of a running session, by hand: stage NAME --session S")
    return top


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        if argv[:1] == ["demo"]:
            from pipeline.demo import main as demo

            return int(demo(argv[1:]))
        if argv[:1] and argv[0] in OWN_PARSERS:
            found: int = importlib.import_module(f"pipeline.{argv[0]}").main(argv[1:])
            return found
        ours, command = argv, []
        if "--" in argv:
            cut = argv.index("--")
            ours, command = argv[:cut], argv[cut + 1:]
            if ours[:1] not in (["run"], ["nic2-helper"]):
                raise UsageError("ringnet: only run and nic2-helper take a command after -- (see ringnet run --help)")
        if not argv:
            raise UsageError("ringnet: say what to do: run, attach, vm, ctl or demo (see ringnet --help)")
        args = parser().parse_args(ours)
        if args.command == "completion":
            from pipeline.completion import script

            print(script(args.shell), end="")
            return int(Exit.OK)
        if args.command == "vm":
            options = VmOptions(type=args.type, socket=args.socket, fd=descriptor("fd", args.fd, "vm"),
                                nic2_fd=descriptor("nic2-fd", args.nic2_fd, "vm"), nic2_socket=args.nic2_socket,
                                one_off=args.one_off, vnet_hdr=args.vnet_hdr, offloading=args.offloading,
                                ready_fd=descriptor("ready-fd", args.ready_fd, "vm"),
                                exit_fd=descriptor("exit-fd", args.exit_fd, "vm"))
            from pipeline.vm import vm

            return vm(settings_from(args, mtu=TYPES[args.type].mtu), options)
        if args.command == "nic2-helper":
            if not command:
                raise UsageError("ringnet nic2-helper: say what to run, after -- (see ringnet nic2-helper --help)")
            from pipeline.nic2_helper import main as helper

            return helper(args.nic2, args.route, args.user, command)
        settings = settings_from(args)
        if args.command == "run":
            if args.cmd and command:
                raise UsageError(f"ringnet run: {args.cmd[0]} before -- is no option (see ringnet run --help)")
            from pipeline.netns import shell
            from pipeline.runner import run

            return run(settings, command or args.cmd or shell())
        ready, end = descriptor("ready-fd", args.ready_fd), descriptor("exit-fd", args.exit_fd)
        from pipeline.runner import attach

        return attach(settings, args.target, config_net=args.config_net, ready_fd=ready, exit_fd=end)
    except UsageError as e:
        print(e, file=sys.stderr)
        return int(Exit.USAGE)
    except ConfigError as e:
        text = str(e)
        if argv[0] == "attach" and "--tap" in argv:  # the same option by its other name
            text = text.replace("--ifname", "--tap", 1)
        print(f"ringnet {argv[0]}: {text}", file=sys.stderr)
        return int(Exit.USAGE)
    except KeyboardInterrupt:
        return 130
