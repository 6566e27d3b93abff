"""Decisions and latencies in shared memory: what a stage notes is what a reader finds, whole or not at all."""
from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from frames import inproc
from hypothesis import given
from hypothesis import strategies as st

from pipeline import api, explain, postmortem
from shm import trace
from shm._dataplane import ffi, lib
from shm.cell import Session, counters
from shm.trace import Kind
from tests.harness import GATEWAY, GUEST, EgressOnly, checksum

ROW = inproc.CLASSIFY


@pytest.fixture
def session() -> Iterator[Session]:
    with Session.create(5) as made:
        yield made


@pytest.fixture
def plane(session: Session) -> Iterator[inproc.Classified]:
    with inproc.Classified() as made:
        assert lib.rn_stage_set_session(made.classify, session.mem, session.size) == 0
        yield made


def frame(proto: int = 6, dst: bytes = bytes([192, 0, 2, 1]), ports: bytes = bytes.fromhex("9c400050")) -> bytes:
    """IPv4 to dst, its L4 checksum wrong."""
    ip = bytearray(bytes.fromhex("4500003c0000400040") + bytes([proto]) + bytes(2) + bytes([10, 0, 2, 2]) + dst)
    total = sum(int.from_bytes(ip[k:k + 2], "big") for k in range(0, 20, 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    ip[10:12] = (~total & 0xFFFF).to_bytes(2, "big")
    tcp = ports + bytes(8) + bytes.fromhex("a002faf0") + bytes(4) + bytes.fromhex("020405b40402080a") + bytes(12)
    return bytes.fromhex("02abcd000001" "5254ab000002" "0800") + bytes(ip) + tcp


def test_a_drop_is_noted_with_whose_frame_it_was(plane: inproc.Classified, session: Session) -> None:
    plane.through(frame())
    start, drop = trace.events(session, ROW)
    assert (start.kind, start.value, start.number) == (Kind.START, 0, 1)
    assert (drop.kind, drop.counter, drop.n, drop.flow) == (Kind.COUNT, "drop_l4_checksum", 1, -1)
    assert (drop.proto, drop.guest, drop.guest_port, drop.peer, drop.peer_port) == (
        6, "10.0.2.2", 40000, "192.0.2.1", 80)


def test_every_drop_is_told_even_by_who_knows_nothing(plane: inproc.Classified, session: Session) -> None:
    """A forged descriptor names no frame; the counter's rise alone makes the event."""
    plane.input.forge(1 << 40, 60)
    plane.work()
    last = list(trace.events(session, ROW))[-1]
    assert (last.kind, last.counter, last.n, last.guest, last.proto) == (Kind.COUNT, "drop_bad_descriptor", 1, "", 0)


def test_a_flood_is_counted_and_not_noted_each(plane: inproc.Classified, session: Session) -> None:
    lib.rn_stage_clock(plane.classify, 10**9)
    plane.work()  # a window begins
    sent = 64
    plane.through(*[frame()] * sent)
    noted = [e for e in trace.events(session, ROW) if e.counter == "drop_l4_checksum"]
    assert [e.n for e in noted] == [1, 1]
    lib.rn_stage_clock(plane.classify, 2 * 10**9)  # another window
    plane.through(frame())
    assert sum(e.n for e in trace.events(session, ROW) if e.counter == "drop_l4_checksum") == sent + 1


def test_old_events_make_way_and_are_not_read_as_new_ones(session: Session) -> None:
    stage = lib.rn_stage_new(ROW, 1)
    for generation in range(lib.RN_EVENTS + 10):
        assert lib.rn_stage_set_session(stage, session.mem, session.size) == 0, generation
    lib.rn_stage_free(stage)
    numbers = [e.number for e in trace.events(session, ROW)]
    assert numbers == list(range(11, lib.RN_EVENTS + 11)) and trace.event_count(session, ROW) == lib.RN_EVENTS + 10
    view = ffi.new("struct rn_event_view *")
    assert lib.rn_events_read(session.mem, session.size, ROW, 10, view) < 0
    assert lib.rn_events_read(session.mem, session.size, ROW, lib.RN_EVENTS + 11, view) < 0
    assert lib.rn_events_read(session.mem, session.size, 8, 11, view) < 0


def test_flows_are_noted_from_open_to_end() -> None:
    with EgressOnly() as egress, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens there
        port = bound.getsockname()[1]
        syn = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
        pseudo = socket.inet_aton(GUEST) + socket.inet_aton(GATEWAY) + struct.pack("!BBH", 0, 6, len(syn))
        egress.send_ip(6, syn[:16] + struct.pack("!H", checksum(pseudo + syn)) + syn[18:])
        assert egress.recv_frame() is not None  # the RST
        egress.settle()
        events = [e for e in trace.events(egress._session, 1) if e.flow >= 0 or e.kind is Kind.REFUSE]
    kinds = [(e.kind, e.counter) for e in events]
    assert kinds == [(Kind.OPEN, ""), (Kind.REFUSE, ""), (Kind.COUNT, "tcp_refused"), (Kind.END, "")]
    assert {(e.guest, e.guest_port, e.peer, e.peer_port, e.proto) for e in events} == {
        ("10.0.2.2", 40000, GATEWAY, port, 6)}
    assert os.strerror(events[1].value) == "Connection refused"


@given(st.integers(0, 1 << 50))
def test_a_latency_lies_in_its_bucket(ns: int) -> None:
    bounds = [lib.rn_latency_bound(b) for b in range(lib.RN_LATENCY_BUCKETS)]
    assert bounds == sorted(set(bounds))
    b = lib.rn_latency_bucket(ns)
    assert ns < bounds[b] and (b == 0 or ns >= bounds[b - 1])


def test_sampled_frames_are_timed_where_they_arrive(plane: inproc.Classified, session: Session) -> None:
    echo = bytes.fromhex("02abcd0000015254ab0000020800" "4500001c000040004001" "22ca" "0a0002020a000201" "0800f7ff00000000")
    for _ in range(4):
        plane.send(*[echo] * 64)
        plane.work()
        plane.read("bridge")
    assert sum(n for _, n in trace.latency(session, inproc.GUEST_TX, ROW)) == 4
    assert trace.latency(session, ROW, inproc.GUEST_TX) == []


# -- in words


def event(**kw: object) -> api.EventInfo:
    return api.EventInfo(**{"stage": "egress", "time": 0.0, "number": 1, "at_ns": 0, "kind": "count", "counter": "tcp_rto",
                            "n": 1, "flow": 3, "gen": 2, "value": 0, "guest": "10.0.2.2", "guest_port": 40000,
                            "peer": "192.0.2.1", "peer_port": 443, "proto": 6, **kw})  # type: ignore[arg-type]


@pytest.mark.parametrize(("word", "fits"), [
    ("3.2", True), ("3.3", False), ("tcp_rto", True), ("tcp_refused", False), ("egress", True), ("classify", False),
    ("10.0.2.2", True), ("192.0.2.1:443", True), ("192.0.2.1:80", False), (":443", True), (":44", False),
    ("192.0.2.2", False)])
def test_what_fits_a_word(word: str, fits: bool) -> None:
    assert explain.matcher(word)(event()) is fits


@pytest.mark.parametrize(("word", "hint"), [("checksum", "drop_ip_checksum"), ("nonsense", ""), ("", "")])
def test_a_word_that_means_nothing(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ringnet explain: {word}: neither") and hint in said and said.count("\n") == 1


def test_every_counter_and_kind_has_its_sentence() -> None:
    for c in counters():
        assert c.help in explain.sentence(event(counter=c.name, stage=c.stage))
    assert explain.sentence(event(kind="refuse", value=111)) == (
        "tcp 10.0.2.2:40000 > 192.0.2.1:443 (flow 3.2): not made: Connection refused")
    assert explain.sentence(event(kind="end", value=2_500_000_000)).endswith("ended after 2.5s")
    assert explain.sentence(event(kind="start", value=2, guest="", peer="")) == "generation 2 began"
    assert "; 7 since the last one told here" in explain.sentence(event(n=7))
    assert {k.name.lower() for k in Kind} == {"start", "count", "refuse", "open", "end"}


def test_postmortem_of_what_is_no_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert postmortem.main([str(tmp_path)]) == 1
    assert re.fullmatch(r"ringnet postmortem: .*: holds no dump of a session \(no info.json\)\n", capsys.readouterr().err)
    (tmp_path / "info.json").write_text("{")
    assert postmortem.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
