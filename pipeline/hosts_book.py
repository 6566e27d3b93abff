"""Names answered locally, by owner: what the control API changes, and services is told the outcome of.

Each owner (a container, a tool; the command line is one) has its own addresses for a name. Answered are those of all
owners, in the order they came. What is a possible name is decided by services; here names are only brought to one form.
"""
from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import TypeVar

from msgspec import Struct

from pipeline.config import DOMAIN

Addresses = tuple[str, ...]
_INSIDE = "." + DOMAIN
_Value = TypeVar("_Value")


class NotThere(ValueError):
    """To be removed, but not there."""


class Delta(Struct, frozen=True, kw_only=True):
    """A change of one owner's entries, and what services must be told for it."""

    owner: str
    set: dict[str, Addresses]  # the owner's, new or changed
    drop: tuple[str, ...]  # the owner's
    own: tuple[str, ...]  # domains, likewise
    disown: tuple[str, ...]
    told: dict[str, Addresses]  # what is answered for a name from now on; (): nothing
    told_own: tuple[str, ...]
    told_disown: tuple[str, ...]

    @property
    def added(self) -> int:
        return len(self.set) + len(self.own)

    @property
    def removed(self) -> int:
        return len(self.drop) + len(self.disown)


def one_name(text: str) -> str:
    """One spelling a name: small letters, no final dot, `db` for db.DOMAIN (services knows it as both)."""
    name = text.lower().removesuffix(".")
    inner = name.removesuffix(_INSIDE)
    return inner if inner != name and "." not in inner and inner != "*" else name


def checked(names: Mapping[str, Iterable[str]]) -> dict[str, Addresses]:
    """Names and addresses in one form. Raises ValueError."""
    found: dict[str, Addresses] = {}
    for text, addresses in names.items():
        name = one_name(text)
        try:
            more = [str(ipaddress.ip_address(a)) for a in addresses]
        except ValueError as e:
            raise ValueError(f"{text}: {e}") from None
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), *more)))
        if not found[name]:
            raise ValueError(f"{text}: no address")
    return found


class HostsBook:
    """plan_*() change nothing; commit() does, once services agreed."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Addresses]] = {}  # name: owner: addresses
        self.domains: dict[str, dict[str, None]] = {}  # domain: owners
        self._mine: dict[str, dict[str, Addresses]] = {}  # owner: name: addresses
        self._mine_domains: dict[str, dict[str, None]] = {}

    def plan_add(self, owner: str, names: Mapping[str, Iterable[str]], domains: Iterable[str]) -> Delta:
        """Raises ValueError."""
        return self._plan(owner, checked(names), (), [one_name(d) for d in domains], ())

    def plan_replace(self, owner: str, names: Mapping[str, Iterable[str]], domains: Iterable[str]) -> Delta:
        """Raises ValueError."""
        want, own = checked(names), dict.fromkeys(one_name(d) for d in domains)
        return self._plan(owner, want, [n for n in self._mine.get(owner, {}) if n not in want], own,
                          [d for d in self._mine_domains.get(owner, {}) if d not in own])

    def plan_remove(self, owner: str, names: Iterable[str], domains: Iterable[str]) -> Delta:
        """Neither: all the owner has. Raises NotThere."""
        drop, disown = dict.fromkeys(map(one_name, names)), dict.fromkeys(map(one_name, domains))
        mine, mine_domains = self._mine.get(owner, {}), self._mine_domains.get(owner, {})
        for what in [n for n in drop if n not in mine] + [d for d in disown if d not in mine_domains]:
            raise NotThere(f"{what}: owner {owner!r} has no such name or domain")
        if not drop and not disown:
            return self._plan(owner, {}, list(mine), (), list(mine_domains))
        return self._plan(owner, {}, drop, (), disown)

    def _plan(self, owner: str, want: Mapping[str, Addresses], drop: Iterable[str], own: Iterable[str],
              disown: Iterable[str]) -> Delta:
        mine, mine_domains = self._mine.get(owner, {}), self._mine_domains.get(owner, {})
        new = {n: a for n, a in want.items() if mine.get(n) != a}
        own = tuple(dict.fromkeys(d for d in own if d not in mine_domains))
        told = {n: _union({**self.names.get(n, {}), owner: a}) for n, a in new.items()}
        told |= {n: _union({o: a for o, a in self.names[n].items() if o != owner}) for n in drop}
        return Delta(owner=owner, set=new, drop=tuple(drop), own=own, disown=tuple(disown), told=told,
                     told_own=tuple(d for d in own if d not in self.domains),
                     told_disown=tuple(d for d in disown if len(self.domains[d]) == 1))

    def whole(self, known: Mapping[str, Iterable[str]]) -> Delta:
        """All there is, for a services that was started with the names of `known`."""
        told: dict[str, Addresses] = {one_name(n): () for n in known}
        told |= {n: _union(owners) for n, owners in self.names.items()}
        return Delta(owner="", set={}, drop=(), own=(), disown=(), told=told, told_own=tuple(self.domains),
                     told_disown=())

    def commit(self, delta: Delta) -> None:
        owner = delta.owner
        for name, addresses in delta.set.items():
            self.names.setdefault(name, {})[owner] = addresses
            self._mine.setdefault(owner, {})[name] = addresses
        for domain in delta.own:
            self.domains.setdefault(domain, {})[owner] = None
            self._mine_domains.setdefault(owner, {})[domain] = None
        _forget(self.names, self._mine, owner, delta.drop)
        _forget(self.domains, self._mine_domains, owner, delta.disown)


def _union(owners: Mapping[str, Addresses]) -> Addresses:
    return tuple(dict.fromkeys(a for addresses in owners.values() for a in addresses))


def _forget(table: dict[str, dict[str, _Value]], mine: dict[str, dict[str, _Value]], owner: str,
            gone: Iterable[str]) -> None:
    for key in gone:
        del table[key][owner], mine[owner][key]
        if not table[key]:
            del table[key]
        if not mine[owner]:
            del mine[owner]
