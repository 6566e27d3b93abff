"""`ringnet completion bash|zsh`: shell completion, made from the parsers themselves, so from the option declaration.

completions/ has the output; tests/unit/test_completion.py sees that it is current.
"""
from __future__ import annotations

import argparse
import importlib

from msgspec import Struct

from pipeline import cli

SHELLS = ("bash", "zsh")


class Value(Struct, frozen=True):
    """What an option's or a positional's value may be completed to."""

    words: tuple[str, ...] = ()
    files: bool = False
    sessions: bool = False


class Node(Struct, frozen=True, kw_only=True):
    """A command, or a verb of one."""

    path: tuple[str, ...]
    options: tuple[str, ...]
    values: dict[str, Value]  # option: what follows it
    words: tuple[str, ...]  # subcommands, or the choices of a positional
    command: bool  # a command line of somebody else's follows


def _value(action: argparse.Action) -> Value:
    if action.choices is not None:
        return Value(words=tuple(str(c) for c in action.choices))
    meta = str(action.metavar or "")
    return Value(files=any(w in meta for w in ("FILE", "PATH")), sessions="-s" in action.option_strings)


def nodes(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> list[Node]:
    """The parser and all below it."""
    options: list[str] = []
    values: dict[str, Value] = {}
    words: list[str] = []
    below: list[Node] = []
    command = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += action.choices
            for name, sub in action.choices.items():
                if path == () and name in cli.OWN_PARSERS:
                    sub = importlib.import_module(f"pipeline.{name}").parser()
                below += nodes(sub, (*path, name))
        elif action.option_strings:
            options += action.option_strings
            if action.nargs != 0:
                values |= dict.fromkeys(action.option_strings, _value(action))
        elif action.nargs == argparse.REMAINDER:
            command = path == ("run",)
        elif action.choices is not None:
            words += [str(c) for c in action.choices]
    return [Node(path=path, options=tuple(options), values=values, words=tuple(words), command=command), *below]


def _key(path: tuple[str, ...]) -> str:
    return f'"{" ".join(path)}"'


_HEAD = """# {shell} completion for ringnet. Made by `ringnet completion {shell}`; do not edit.
"""

_BASH = """_ringnet_sessions() {{ ringnet ctl ls --json 2>/dev/null | sed -n 's/^{{"session":"\\([^"]*\\)".*/\\1/p'; }}

_ringnet() {{
	local cur=${{COMP_WORDS[COMP_CWORD]}} path="" option="" w i skip=0 rest=0
	for ((i = 1; i < COMP_CWORD; i++)); do
		w=${{COMP_WORDS[i]}}
		if ((skip)); then
			skip=0
			option=""
			continue
		fi
		case "$path|$w" in
{takes}
		esac
		case "${{path:+$path }}$w" in
		{paths}) path="${{path:+$path }}$w" ;;
		"run "[!-]* | "run --") rest=1 ;;
		esac
	done
	COMPREPLY=()
	if ((rest)); then
		mapfile -t COMPREPLY < <(compgen -c -f -- "$cur")
		return
	fi
	if ((skip)); then
		case "$path|$option" in
{values}
		esac
		return
	fi
	case "$path" in
{words}
	esac
}}
complete -F _ringnet ringnet
"""

_ZSH = """#compdef ringnet
autoload -U +X bashcompinit && bashcompinit
"""


def _bash() -> str:
    tree = nodes(cli.parser())
    takes, values, words = [], [], []
    for n in tree:
        if n.values:
            names = " | ".join(f'"{" ".join(n.path)}|{o}"' for o in n.values)
            takes.append(f"\t\t{names})\n\t\t\tskip=1\n\t\t\toption=$w\n\t\t\tcontinue\n\t\t\t;;")
        kinds: dict[Value, list[str]] = {}
        for option, value in n.values.items():
            kinds.setdefault(value, []).append(option)
        for value, names_ in kinds.items():
            flag = "-f" if value.files else f'-W "{" ".join(value.words)}"' if value.words else \
                '-W "$(_ringnet_sessions)"' if value.sessions else ""
            if flag:
                cases = " | ".join(f'"{" ".join(n.path)}|{o}"' for o in names_)
                values.append(f'\t\t{cases}) mapfile -t COMPREPLY < <(compgen {flag} -- "$cur") ;;')
        line = " ".join((*n.words, *n.options))
        also = " -c -f" if n.command else " -f" if n.path == ("attach",) else ""
        words.append(f'\t{_key(n.path)}) mapfile -t COMPREPLY < <(compgen{also} -W "{line}" -- "$cur") ;;')
    return _BASH.format(takes="\n".join(takes), values="\n".join(values), words="\n".join(words),
                        paths=" | ".join(_key(n.path) for n in tree if n.path))


def script(shell: str) -> str:
    """The text to be sourced, or put where the shell looks."""
    if shell == "zsh":  # zsh runs bash's completions (zshcompsys(1), bashcompinit)
        body = _bash().replace("mapfile -t COMPREPLY < <(", "COMPREPLY=($(").replace(' -- "$cur")', ' -- "$cur"))')
        return _ZSH + _HEAD.format(shell="zsh") + body
    return _HEAD.format(shell="bash") + _bash()
