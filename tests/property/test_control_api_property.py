"""The control API under any bytes in any pieces, and the names book against a plain model."""
from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from control import Server, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import api
from pipeline.hosts_book import HostsBook, NotThere

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=12)
CALLS = st.sampled_from([c for c in api.CALLS if c not in ("cancel", "subscribe")])
ARGS = st.dictionaries(st.sampled_from(["specs", "proto", "owner", "names", "domains", "start", "limit", "flow",
                                        "level", "tcp", "udp", "close_flows", "nic", "x"]),
                       JSON | st.lists(st.sampled_from(["80", "8080:80", "1-5", "~3", "all", "auto", "auto,~3"]), max_size=3)
                       | st.dictionaries(st.sampled_from(["a", "b.c", "*.d", "host"]),
                                         st.lists(st.sampled_from(["10.0.2.9", "fd00::1", "x"]), max_size=2),
                                         max_size=2),
                       max_size=4)
REQUESTS = st.fixed_dictionaries({"call": CALLS | st.text(max_size=8)}, optional={
    "v": st.sampled_from([1, 2, "1"]), "id": JSON, "args": ARGS | JSON, "execute": st.text(max_size=5)}).map(
    lambda r: json.dumps(r).encode("utf-8", "surrogatepass"))
LINES = st.one_of(REQUESTS, JSON.map(lambda j: json.dumps(j).encode("utf-8", "surrogatepass")),
                  st.binary(max_size=60),
                  st.sampled_from([b"", b" ", b"[" * 5000, b'{"call":"\\ud800"}', b"x" * 70000]))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGNET_RUNTIME_DIR", str(Path(directory) / "d"))
        with serving(Path(directory) / "s.sock") as made:
            yield made


def is_slirp(line: bytes) -> bool:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "execute" in data and "call" not in data


@pytest.mark.parametrize("call", [c for c in api.CALLS if c not in ("cancel", "subscribe")])
def test_every_call_without_arguments_gets_a_reply(server: Server, call: str) -> None:
    peer = server.peer()
    peer.send(json.dumps({"call": call}).encode() + b"\n")
    peer.sock.shutdown(socket.SHUT_WR)
    reply = peer.line()
    assert reply is not None and reply["ok"] in (True, False)
    assert peer.line() is None
    peer.close()
    server.peers.remove(peer)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=150)
@given(lines=st.lists(LINES.map(lambda b: b.replace(b"\n", b"")), max_size=8), cuts=st.lists(st.integers(1, 400)))
def test_every_line_gets_one_reply_however_it_arrives(server: Server, lines: list[bytes], cuts: list[int]) -> None:
    lines = [line for line in lines if not is_slirp(line)]
    expected = sum(bool(line.strip()) for line in lines)
    peer = server.peer()
    stream = b"".join(line + b"\n" for line in lines)
    for cut in cuts:
        peer.send(stream[:cut])
        stream = stream[cut:]
        peer.session.step()
    peer.send(stream)
    peer.sock.shutdown(socket.SHUT_WR)
    replies = []
    while (reply := peer.line()) is not None:
        replies.append(reply)
    peer.close()
    server.peers.remove(peer)
    assert len(replies) == expected
    for reply in replies:
        assert reply["ok"] in (True, False) and ("result" in reply) == reply["ok"] != ("error" in reply)
        if not reply["ok"]:
            assert reply["error"]["code"] in list(api.Code)
            assert reply["error"]["text"] and "\n" not in reply["error"]["text"]
            assert reply["error"]["code"] != api.Code.ENDING
    assert not server.api.clients


OWNERS = st.sampled_from(["", "a", "b"])
NAMES = st.dictionaries(st.sampled_from(["x", "X.", "x.ringnet.internal", "y.z", "*.w"]),
                        st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "FD00::1"]), min_size=1, max_size=3),
                        max_size=3)
DOMAINS = st.lists(st.sampled_from(["d.e", "D.E.", "f"]), max_size=2)
OPS = st.lists(st.tuples(st.sampled_from(["add", "replace", "remove"]), OWNERS, NAMES, DOMAINS), max_size=12)
SPELLING = {"X.": "x", "x.ringnet.internal": "x", "D.E.": "d.e", "FD00::1": "fd00::1"}


def spell(text: str) -> str:
    return SPELLING.get(text, text)


@given(OPS)
def test_the_book_is_each_owners_wishes(ops: list) -> None:
    book = HostsBook()
    model: dict[str, tuple[dict[str, set[str]], set[str]]] = {}
    told: dict[str, tuple[str, ...]] = {}  # as services has it
    owned: set[str] = set()
    for op, owner, names, domains in ops:
        mine, mine_domains = model.get(owner, ({}, set()))
        wanted: dict[str, set[str]] = {}
        for n, a in names.items():
            wanted.setdefault(spell(n), set()).update(map(spell, a))
        wanted_domains = {spell(d) for d in domains}
        if op == "remove":
            missing = wanted.keys() - mine.keys() or wanted_domains - mine_domains
            if missing:
                with pytest.raises(NotThere):
                    book.plan_remove(owner, names, domains)
                continue
            delta = book.plan_remove(owner, names, domains)
            if not wanted and not wanted_domains:
                mine, mine_domains = {}, set()
            else:
                mine = {n: a for n, a in mine.items() if n not in wanted}
                mine_domains = mine_domains - wanted_domains
        elif op == "add":
            delta = book.plan_add(owner, names, domains)
            mine, mine_domains = {**mine, **wanted}, mine_domains | wanted_domains
        else:
            delta = book.plan_replace(owner, names, domains)
            mine, mine_domains = wanted, wanted_domains
        model[owner] = (mine, mine_domains)
        book.commit(delta)
        for name, addresses in delta.told.items():
            told.pop(name, None)
            if addresses:
                told[name] = addresses
        assert not owned & set(delta.told_own) and set(delta.told_disown) <= owned
        owned = owned - set(delta.told_disown) | set(delta.told_own)
        assert {(n, o): set(a) for n, owners in book.names.items() for o, a in owners.items()} == {
            (n, o): a for o, (all_names, _) in model.items() for n, a in all_names.items()}
        union: dict[str, set[str]] = {}
        for all_names, _ in model.values():
            for n, a in all_names.items():
                union.setdefault(n, set()).update(a)
        assert {n: set(a) for n, a in told.items()} == union
        assert owned == {d for _, ds in model.values() for d in ds}
