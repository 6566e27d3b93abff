"""Names that are answered locally, as users write them: one spelling for each, and what may stand behind it.

A name has addresses, or it is an alias of one other name (CNAME, RFC 1034 3.6.2). That name must be known when the alias is
given: the answer is made from the table alone, nobody is asked for the rest.
"""
from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

CHAIN_MAX = 8  # aliases from a name to its addresses
DOMAIN = "ringnet.internal"
PRESETS = ("gateway", "host")  # under DOMAIN; the first is the gateway's reverse name
_INSIDE = "." + DOMAIN
_Name = TypeVar("_Name", str, bytes)  # as text, or in wire form
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\Z")


def one_name(text: str) -> str:
    """One spelling a name: small letters, no final dot, `db` for db.DOMAIN (services knows it as both)."""
    name = text.lower().removesuffix(".")
    inner = name.removesuffix(_INSIDE)
    return inner if inner != name and "." not in inner and inner != "*" else name


def is_domain_name(text: str) -> bool:
    """Labels of letters, digits and dashes (RFC 1123 2.1), as one may type them."""
    name = text.rstrip(".")
    return bool(name) and len(name) <= 253 and all(_LABEL.match(part) for part in name.split("."))


def values(texts: Iterable[str]) -> tuple[str, ...]:
    """Addresses, each once, in one form, or one name. Raises ValueError that says which is neither."""
    found: dict[str, None] = {}
    aliases: list[str] = []
    for text in texts:
        try:
            found[str(ipaddress.ip_address(text))] = None
        except ValueError:
            # RFC 1123 2.1: the last label of a name is not a number, so 192.0.2.777 is an address gone wrong.
            if not is_domain_name(text) or text.rstrip(".").rpartition(".")[2].isdecimal():
                raise ValueError(f"{text}: not an IP address, nor a name") from None
            found[one_name(text)] = None
            aliases.append(text)
    if aliases and len(found) > 1:
        raise ValueError(f"{aliases[0]}: a name has addresses, or one other name behind it")
    return tuple(found)


def alias_of(found: Iterable[str]) -> str | None:
    """The name behind it, if these values() are no addresses."""
    text = next(iter(found), "")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return text or None
    return None


def check_alias(found: Iterable[str], known: Callable[[str], bool]) -> None:
    """Is the name behind an alias known? `known` is asked of names in one spelling, and of wildcards as *.DOMAIN.
    Raises ValueError."""
    target = alias_of(found)
    if target is None or target in PRESETS or known(target):
        return
    below = (f"{target}.{DOMAIN}" if "." not in target else target).split(".")
    if not any(known("*." + ".".join(below[i:])) for i in range(1, len(below))):
        raise ValueError(f"{target}: neither an IP address nor a name that is answered here; an alias is of one of those")


def check_chain(name: _Name, behind: Callable[[_Name], _Name | None], text: Callable[[_Name], str]) -> None:
    """Do the aliases from `name` on end, and soon enough? `behind` is the name behind one. Raises ValueError."""
    way: list[_Name] = [name]
    while (target := behind(way[-1])) is not None:
        way.append(target)
        if target in way[:-1] or len(way) > CHAIN_MAX + 1:
            raise ValueError(f"{' -> '.join(map(text, way))}: aliases lead in a circle, or over more than {CHAIN_MAX} names")
