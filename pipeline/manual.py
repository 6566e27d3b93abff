"""Manual pages, made from the same declarations as the command line itself: the parsers, and Settings' options.

docs/man/ has the output (tools/draw --update; tests/test_docs.py sees that it is current); `man -l docs/man/ringnet.1`
shows one. What the parsers cannot know, files and examples, is in PAGES.
"""
from __future__ import annotations

import argparse
import importlib
import textwrap

from msgspec import Struct

from pipeline import cli
from pipeline.config import options


class Page(Struct, frozen=True, kw_only=True):
    """What a page says besides options."""

    name: str  # of the command; "": ringnet itself
    brief: str
    text: tuple[str, ...] = ()  # paragraphs behind the parser's description
    examples: tuple[tuple[str, str], ...] = ()  # (command, what it does)
    see: tuple[str, ...] = ()


_FILES = (
    ("NAME.sock in $RINGNET_RUNTIME_DIR, $XDG_RUNTIME_DIR/ringnet, /run/ringnet or /tmp/ringnet-UID",
     "the control socket of session NAME; see docs/control-api.md"),
    ("/etc/resolv.conf", "upstream DNS servers, if none is given"),
    ("/dev/net/tun", "where the guest's interface comes from; must be openable"),
)

PAGES = (
    Page(name="", brief="user-mode networking for a namespace, a container or a virtual machine",
         text=("A guest gets a whole network (address, gateway, DNS, TCP, UDP, ping) through ordinary processes of the host,"
               " without root and without a bridge. What the guest sends ends in host sockets. The work is done by a"
               " pipeline of processes, one a stage, joined by rings in shared memory; each can be seen in ps, measured and"
               " debugged alone.",),
         examples=(("ringnet run -- bash", "A shell with a network of its own."),
                   ("ringnet doctor", "Can this machine run it?"),
                   ("ringnet top", "What is it doing?")),
         see=("run", "attach", "vm", "ctl", "capture", "top", "flows", "explain", "postmortem", "doctor", "bench")),
    Page(name="run", brief="run a command in a new guest namespace",
         text=("The guest has 10.0.2.2/24 unless told otherwise, and learns it by DHCP through the pipeline. The gateway,"
               " by name host.ringnet.internal, reaches the host's loopback.",),
         examples=(("ringnet run -- curl -s http://host.ringnet.internal:8000/", "A web server on the host's 127.0.0.1."),
                   ("ringnet run -t 8080:80 -- python3 -m http.server 80", "A server in the guest, at the host's port 8080."),
                   ("ringnet run --config web.toml -- bash", "Options from a file (docs/ringnet.toml is one).")),
         see=("attach", "ctl")),
    Page(name="attach", brief="serve an existing network namespace",
         text=("Runs in the foreground, as pasta and slirp4netns do for rootless containers. With $NOTIFY_SOCKET it tells"
               " systemd when it is ready (tools/systemd/ has units).",),
         examples=(("ip netns add guest; ringnet attach /run/netns/guest --config-net &", "A namespace with a network."),
                   ("ringnet attach 4711 --tap eth0 --config-net --ready-fd 3 3>&1 | head -c1", "A container's, when it is"
                    " ready.")),
         see=("run", "ctl")),
    Page(name="vm", brief="serve a virtual machine",
         text=("For QEMU, vfkit and whoever else speaks Ethernet frames over a socket, or hands a tap over. See docs/vm.md.",),
         see=("attach", "ctl")),
    Page(name="ctl", brief="look at a running session, and change it",
         text=("Forwards, names, flows, log level. Speaks the control API, JSON lines over a Unix socket"
               " (docs/control-api.md).",),
         examples=(("ringnet ctl forward add 8080:80", "A port of the host leads to the guest."),
                   ("ringnet ctl hosts add db.internal=192.0.2.7", "A name the guest can look up.")),
         see=("top", "flows", "capture")),
    Page(name="capture", brief="write frames of a running session as pcapng",
         text=("The stages copy what matches into shared memory; copies are lost, and counted, if this program is behind:"
               " frames never are. See docs/capture.md.",),
         examples=(("ringnet capture -w - | wireshark -k -i -", "The guest's link, live."),
                   ("ringnet capture all --drops -w why.pcapng", "What is dropped, where, and why.")),
         see=("top", "flows")),
    Page(name="top", brief="watch a running session: stages, rings, drops, busiest flows",
         text=("Reads the session's shared memory and asks it for nothing: watching does not slow it down. See"
               " docs/looking.md.",),
         examples=(("ringnet top --json -n 1", "One look, for a program."),), see=("flows", "capture")),
    Page(name="flows", brief="every flow of a session, and in words what it waits for",
         examples=(("ringnet flows --waiting", "Who is stuck, and on what."),
                   ("ringnet flows 12.3", "All that is known of one.")), see=("top", "capture")),
    Page(name="explain", brief="what the stages decided about a flow, a drop counter or an address",
         text=("See docs/debugging.md.",), see=("flows", "postmortem", "capture")),
    Page(name="postmortem", brief="what the stages of a session that died had decided",
         text=("See docs/debugging.md.",), see=("explain",)),
    Page(name="doctor", brief="say what this machine lacks for ringnet",
         text=("Kernel, rights, limits, settings and tools. Nothing is changed.",), see=("run", "bench")),
    Page(name="bench", brief="how fast is it here, beside pasta and slirp4netns",
         text=("Two network namespaces are made, without root in a user namespace, and each program joins them in turn; nothing"
               " else on the machine is touched, and nothing is left. Processor time is that of all of a program's processes,"
               " latencies are medians.",),
         examples=(("ringnet bench", "The table, in about 20 seconds."),
                   ("ringnet bench --mtu 1500 --json", "For a program, at another MTU.")), see=("doctor",)),
)


def roff(text: str) -> str:
    """Text as roff takes it (groff_man(7)): backslashes, dashes that are typed, leading dots."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return "\\&" + text if text.startswith((".", "'")) else text


def _options(parser: argparse.ArgumentParser, *, settings: bool) -> list[str]:
    """settings: the options of Settings are in ringnet.toml's table of the main page as well; here with their ranges."""
    ranges = {f"--{o.key}": o.range for o in options()}
    lines: list[str] = []
    for a in parser._actions:
        if not a.option_strings or isinstance(a, argparse._HelpAction):
            continue
        arg = "" if a.nargs == 0 else f" \\fI{roff('{' + ','.join(map(str, a.choices)) + '}' if a.choices else str(a.metavar or a.dest.upper()))}\\fR"
        names = ", ".join(f"\\fB{roff(o)}\\fR{arg}" for o in a.option_strings)
        words = roff(a.help or "")
        if settings and (r := ranges.get(a.option_strings[-1])):
            words += f" ({roff(r)})"
        lines += [".TP", names, words]
    return lines


def _positionals(parser: argparse.ArgumentParser) -> list[str]:
    lines: list[str] = []
    for a in parser._actions:
        if not a.option_strings and not isinstance(a, argparse._SubParsersAction) and a.help:
            lines += [".TP", f"\\fI{roff(str(a.metavar or a.dest))}\\fR", roff(a.help)]
    return lines


def _commands(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Subcommands with what they do, and below them their own."""
    lines: list[str] = []
    for a in parser._actions:
        if isinstance(a, argparse._SubParsersAction):
            helps = {c.dest: c.help or "" for c in a._choices_actions}
            for name, sub in a.choices.items():
                usage = " ".join(sub.format_usage().replace("usage: ", "").split())
                deeper = _commands(sub, f"{path} {name}") if path else []
                if deeper:
                    lines += deeper
                else:
                    lines += [".TP", f"\\fB{roff(usage)}\\fR" if path else f"\\fB{roff('ringnet ' + name)}\\fR",
                              roff(helps.get(name, ""))]
    return lines


def _parser_of(name: str) -> argparse.ArgumentParser:
    top = cli.parser()
    if not name:
        return top
    if name in cli.OWN_PARSERS:
        found: argparse.ArgumentParser = importlib.import_module(f"pipeline.{name}").parser()
        return found
    for a in top._actions:
        if isinstance(a, argparse._SubParsersAction):
            return a.choices[name]
    raise KeyError(name)


def page(p: Page) -> str:
    """One page."""
    parser = _parser_of(p.name)
    title = f"ringnet-{p.name}" if p.name else "ringnet"
    usage = " ".join(parser.format_usage().replace("usage: ", "").split())
    if p.name in ("run", "attach"):
        usage = {"run": "ringnet run [options] [--] [CMD ...]", "attach": "ringnet attach [options] PID|NETNS-PATH"}[p.name]
    out = [".\\\" Made by tools/draw --update; do not edit.", f".TH {title.upper()} 1 \"\" \"ringnet {cli.version()}\" ringnet",
           ".SH NAME", f"{roff(title)} \\- {roff(p.brief)}", ".SH SYNOPSIS", f"\\fB{roff(usage)}\\fR", ".SH DESCRIPTION"]
    for n, paragraph in enumerate([parser.description or "", *p.text]):
        out += ([".PP"] if n else []) + [roff(paragraph)]
    out += _positionals(parser)
    if commands := _commands(parser, p.name and f"ringnet {p.name}"):
        out += [".SH COMMANDS", *commands]
    if opts := _options(parser, settings=p.name in ("run", "attach")):
        out += [".SH OPTIONS", *opts]
    if p.name in ("run", "attach"):
        out += [".SH CONFIGURATION FILE", roff("Each option but --config can stand in a TOML file, by its long name"
                                               " without dashes: strings, numbers, true, lists where it may be repeated,"
                                               " and a table for hosts. docs/ringnet.toml shows every one.")]
    if not p.name or p.name in ("run", "attach"):
        out += [".SH FILES"]
        for name, what in _FILES:
            out += [".TP", f"\\fI{roff(name)}\\fR", roff(what)]
    if parser.epilog:
        out += [".SH EXIT STATUS", roff(" ".join(parser.epilog.removeprefix("exit status: ").split()))]
    if p.examples:
        out.append(".SH EXAMPLES")
        for command, what in p.examples:
            out += [".PP", roff(what), ".PP", ".RS 4", ".nf", roff(command), ".fi", ".RE"]
    if p.see or p.name:
        others = [f"ringnet-{n}" for n in p.see] + (["ringnet"] if p.name else [])
        out += [".SH SEE ALSO", ", ".join(f"\\fB{roff(o)}\\fR(1)" for o in others)]
    return "\n".join(out) + "\n"


def pages() -> dict[str, str]:
    """Every page by file name."""
    return {f"ringnet{'-' + p.name if p.name else ''}.1": page(p) for p in PAGES}


def _toml(value: object) -> str:
    """A default as TOML has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"{value}"'
    return "{}" if isinstance(value, dict) else "[]"


_EXAMPLES = {"hosts": '{ "db.internal" = "192.0.2.7" }', "tcp-ports": '["8080:80"]', "dns": '["192.0.2.53"]'}


def sample_toml() -> str:
    """docs/ringnet.toml: every option with what it does and its default, commented out."""
    lines = ["# A file for `ringnet run --config FILE.toml` and `ringnet attach --config FILE.toml`: every option, commented out,",
             "# with its default. An unknown key is an error; a flag on the command line wins over the file.",
             "# Made by tools/draw --update from pipeline/config.py."]
    for o in options():
        words = textwrap.wrap(o.help + (f" ({o.range})" if o.range else ""), 118)
        lines += ["", *(f"# {w}" for w in words)]
        if o.key in _EXAMPLES:
            lines.append(f"# like: {o.key} = {_EXAMPLES[o.key]}")
        lines.append(f"#{o.key} = {_toml(o.default)}")
    return "\n".join(lines) + "\n"
