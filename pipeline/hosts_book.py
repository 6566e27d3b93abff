"""Names answered locally, by owner: what the control API changes, and services is told the outcome of.

Each owner (a container, a tool; the command line is one) has its own addresses for a name, or another name behind it.
Answered are the addresses of all owners, in the order they came; if nobody has any, the first alias. What is a possible name
is decided by services; here names are only brought to one form.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from msgspec import Struct

from pipeline.host_names import alias_of, check_alias, one_name, values

Values = tuple[str, ...]  # addresses, or one name: it is an alias
_Value = TypeVar("_Value")


class NotThere(ValueError):
    """To be removed, but not there."""


class Delta(Struct, frozen=True, kw_only=True):
    """A change of one owner's entries, and what services must be told for it."""

    owner: str
    set: dict[str, Values]  # the owner's, new or changed
    drop: tuple[str, ...]  # the owner's
    own: tuple[str, ...]  # domains, likewise
    disown: tuple[str, ...]
    told: dict[str, Values]  # what is answered for a name from now on; (): nothing
    told_own: tuple[str, ...]
    told_disown: tuple[str, ...]

    @property
    def added(self) -> int:
        return len(self.set) + len(self.own)

    @property
    def removed(self) -> int:
        return len(self.drop) + len(self.disown)


def checked(names: Mapping[str, Iterable[str]]) -> dict[str, Values]:
    """Names, and addresses or the name behind each, in one form. Raises ValueError."""
    found: dict[str, Values] = {}
    for text, given in names.items():
        name = one_name(text)
        try:
            found[name] = values((*found.get(name, ()), *given))
        except ValueError as e:
            raise ValueError(f"{text}: {e}") from None
        if not found[name]:
            raise ValueError(f"{text}: no address")
    return found


class HostsBook:
    """plan_*() change nothing; commit() does, once services agreed."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Values]] = {}  # name: owner: addresses
        self.domains: dict[str, dict[str, None]] = {}  # domain: owners
        self._mine: dict[str, dict[str, Values]] = {}  # owner: name: addresses
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

    def _plan(self, owner: str, want: Mapping[str, Values], drop: Iterable[str], own: Iterable[str],
              disown: Iterable[str]) -> Delta:
        mine, mine_domains = self._mine.get(owner, {}), self._mine_domains.get(owner, {})
        new = {n: a for n, a in want.items() if mine.get(n) != a}
        own = tuple(dict.fromkeys(d for d in own if d not in mine_domains))
        gone = {n for n in drop if n not in want and len(self.names[n]) == 1}
        for name, found in new.items():
            try:
                check_alias(found, lambda n: n in want or n in self.names and n not in gone)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
        told = {n: _union({**self.names.get(n, {}), owner: a}) for n, a in new.items()}
        told |= {n: _union({o: a for o, a in self.names[n].items() if o != owner}) for n in drop}
        return Delta(owner=owner, set=new, drop=tuple(drop), own=own, disown=tuple(disown), told=told,
                     told_own=tuple(d for d in own if d not in self.domains),
                     told_disown=tuple(d for d in disown if len(self.domains[d]) == 1))

    def whole(self, known: Mapping[str, Iterable[str]]) -> Delta:
        """All there is, for a services that was started with the names of `known`."""
        told: dict[str, Values] = {one_name(n): () for n in known}
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


def _union(owners: Mapping[str, Values]) -> Values:
    """Addresses and an alias do not go together (RFC 1034 3.6.2)."""
    addresses = dict.fromkeys(v for found in owners.values() if alias_of(found) is None for v in found)
    return tuple(addresses) or next(iter(owners.values()), ())


def _forget(table: dict[str, dict[str, _Value]], mine: dict[str, dict[str, _Value]], owner: str,
            gone: Iterable[str]) -> None:
    for key in gone:
        del table[key][owner], mine[owner][key]
        if not table[key]:
            del table[key]
        if not mine[owner]:
            del mine[owner]
