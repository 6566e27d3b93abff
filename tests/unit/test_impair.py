"""The bad wire (csrc/rn_impair.c): what it does by seed, what it counts, and its places in the stages."""
from __future__ import annotations

import math
import os
import select
import threading
from pathlib import Path
from typing import Any

import pytest
from frames import inproc
from frames.inproc import counts, error, link, pair, received, run

from pipeline.config import LINK_OUTPUT, ConfigError, Impair, load_toml, make, parse_impair, stage_configs
from pipeline.topology import TOPOLOGY
from shm._dataplane import ffi, lib

VNET = bytes(12)
DROP, BURST, DUP, REORDER = lib.RN_IMPAIRED_DROP, lib.RN_IMPAIRED_BURST, lib.RN_IMPAIRED_DUP, lib.RN_IMPAIRED_REORDER
CORRUPT, TRUNCATE = lib.RN_IMPAIRED_CORRUPT, lib.RN_IMPAIRED_TRUNCATE
MS = 1_000_000  # ns


class Wire:
    """A struct rn_impair with a clock of its own, made as the command line makes it."""

    def __init__(self, words: str, place: str = "up") -> None:
        self.now = 1_000 * MS
        spec = ffi.new("struct rn_impair_spec *", parse_impair(f"{place}:{words}").spec())
        self.im = ffi.gc(lib.rn_impair_new(spec, self.now), lib.rn_impair_free)
        assert self.im != ffi.NULL

    def feed(self, frame: bytes, flags: int = 0) -> int:
        return lib.rn_impair_feed(self.im, self.now, VNET + frame, len(frame), flags, ffi.NULL)

    def pull(self, *, everything: bool = False) -> list[bytes]:
        """What is due."""
        out, f = [], ffi.new("struct rn_impair_frame *")
        while lib.rn_impair_peek(self.im, self.now, int(everything), f):
            out.append(bytes(ffi.buffer(f.vnet_then_frame + 12, f.len)))
            lib.rn_impair_pop(self.im)
        return out

    def due(self) -> int | None:
        """ns from now; None: never."""
        at = lib.rn_impair_due(self.im, self.now)
        return None if at == (1 << 64) - 1 else at - self.now

    def stat(self) -> Any:
        st = ffi.new("struct rn_impair_stat *")
        lib.rn_impair_stat(self.im, st)
        assert st.__getattribute__("in") + st.duplicated == st.out + st.dropped + st.held
        return st

    def trace(self, n: int) -> list[int]:
        """Decisions about n frames of one size."""
        frame, out = bytes(100), []
        for _ in range(n):
            out.append(self.feed(frame))
            self.pull(everything=True)
        return out


def numbered(n: int) -> list[bytes]:
    return [i.to_bytes(4, "big") * 16 for i in range(n)]


EVERYTHING = "drop=3%,dup=4%,reorder=5%/2,corrupt=6%,truncate=7%,burst=1%/30%,delay=5ms~2ms"


# --- decisions ---


def test_a_seed_decides() -> None:
    one, same, other = (Wire(f"{EVERYTHING},seed={s}").trace(5000) for s in (7, 7, 8))
    assert one == same
    assert sum(a != b for a, b in zip(one, other, strict=True)) > 500


def test_a_place_is_a_seed_of_its_own() -> None:
    up, down = (Wire(f"{EVERYTHING},seed=7", place).trace(2000) for place in ("up", "down"))
    assert sum(a != b for a, b in zip(up, down, strict=True)) > 200


def test_the_clock_decides_nothing() -> None:
    quick, slow = Wire(EVERYTHING), Wire(EVERYTHING)
    frame, traces = bytes(200), ([], [])
    for i in range(2000):
        traces[0].append(quick.feed(frame))
        traces[1].append(slow.feed(frame))
        slow.now += (i % 13) * MS
        slow.pull()
    assert traces[0] == traces[1]


def test_one_option_does_not_reshuffle_another() -> None:
    drops = [m & DROP for m in Wire("drop=5%,seed=3").trace(3000)]
    assert [m & DROP for m in Wire("drop=5%,dup=20%,reorder=10%,corrupt=5%,seed=3").trace(3000)] == drops
    more = [m & DROP for m in Wire("drop=10%,seed=3").trace(3000)]
    assert all(b for a, b in zip(drops, more, strict=True) if a) and sum(more) > sum(drops)


@pytest.mark.parametrize("seed", [1, 2, 12345])
@pytest.mark.parametrize(("words", "mask", "share"), [
    ("drop=1%", DROP, 0.01), ("drop=0.5", DROP, 0.5), ("dup=0.5%", DUP, 0.005), ("reorder=2%/3", REORDER, 0.02),
    ("corrupt=0.1%", CORRUPT, 0.001), ("truncate=30%", TRUNCATE, 0.3)])
def test_rates(words: str, mask: int, share: float, seed: int) -> None:
    """Within five standard deviations of a binomial distribution; the seeds are fixed, so it is always the same."""
    n = 100_000
    hits = sum(bool(m & mask) for m in Wire(f"{words},seed={seed}").trace(n))
    assert abs(hits - n * share) <= 5 * math.sqrt(n * share * (1 - share))


def test_never_and_always() -> None:
    assert set(Wire("drop=100%").trace(1000)) == {DROP}
    assert set(Wire("drop=0,dup=100%").trace(1000)) == {DUP}


def test_bursts() -> None:
    """Gilbert: enter/(enter+leave) of the frames are lost, 1/leave in a row."""
    n, enter, leave = 200_000, 0.01, 0.25
    trace = Wire("burst=1%/25%").trace(n)
    assert set(trace) == {0, DROP | BURST}
    lengths = [len(run) for run in "".join("x" if m else "." for m in trace).split(".") if run]
    assert abs(len(lengths) - n * enter * leave / (enter + leave)) < 5 * math.sqrt(n * enter)
    assert abs(sum(lengths) / len(lengths) - 1 / leave) < 5 * (1 / leave) / math.sqrt(len(lengths))


# --- what comes out ---


def test_nothing_befalls_a_frame_by_accident() -> None:
    w = Wire("drop=0,seed=1")
    for f in numbered(100):
        assert w.feed(f) == 0
    assert w.pull() == numbered(100) and w.due() is None


def test_delay_and_jitter_keep_the_order() -> None:
    w = Wire("delay=5ms~2ms")
    for f in numbered(50):
        w.feed(f)
    w.now += 3 * MS - 1
    assert w.pull() == []
    assert 0 < w.due() <= 4 * MS + 1
    got = []
    while (wait := w.due()) is not None:
        w.now += wait - 1
        assert w.pull() == []
        w.now += 1
        got += w.pull()
    assert got == numbered(50) and w.now <= 1_000 * MS + 7 * MS
    assert w.stat().delayed == 50


def test_reorder_by_gap() -> None:
    """The frame comes behind exactly so many others that were fed after it."""
    w = Wire("reorder=3%/4,seed=5")
    frames = numbered(2000)
    late = [f for f in frames if w.feed(f) & REORDER]
    assert w.stat().reordered == len(late) > 20
    w.now += 20 * MS
    got = w.pull()
    assert sorted(got) == frames and got != frames
    assert [f for f in got if f not in late] == [f for f in frames if f not in late]
    for f in late[:-2]:
        on_time = [g for g in frames[frames.index(f) + 1:] if g not in late][:5]
        assert got.index(on_time[3]) < got.index(f) < got.index(on_time[4])


def test_the_last_frame_is_not_held_for_ever() -> None:
    w = Wire("reorder=100%/3")
    w.feed(b"x" * 60)
    assert w.pull() == [] and w.due() == lib.RN_IMPAIR_LATE_NS
    w.now += w.due()
    assert w.pull() == [b"x" * 60]


def test_duplicates_follow_at_once() -> None:
    w = Wire("dup=100%")
    for f in numbered(3):
        w.feed(f)
    assert w.pull() == [f for f in numbered(3) for _ in range(2)]


@pytest.mark.parametrize("bits", [1, 2, 17, 64])
def test_corrupt_flips_so_many_bits(bits: int) -> None:
    w = Wire(f"corrupt=100%/{bits}")
    seen = bytearray(64)
    for _ in range(1500):
        w.feed(bytes(64))
        (got,) = w.pull()
        assert sum(b.bit_count() for b in got) == bits
        seen = bytearray(a | b for a, b in zip(seen, got, strict=True))
    assert all(seen)  # anywhere, headers included


def test_corrupt_frames_smaller_than_the_bits_asked_for() -> None:
    w = Wire("corrupt=100%/64")
    for n in range(9):
        w.feed(bytes(n))
        assert w.pull() == [b"\xff" * n]


def test_truncate_leaves_an_ethernet_header() -> None:
    w = Wire("truncate=100%")
    lengths = set()
    for _ in range(500):
        w.feed(bytes(range(40)))
        (got,) = w.pull()
        assert got == bytes(range(len(got)))
        lengths.add(len(got))
    assert lengths == set(range(14, 40))
    assert w.feed(bytes(14)) == 0  # nothing to cut
    assert w.pull() == [bytes(14)]


def test_a_stall_holds_everything_and_ends() -> None:
    w = Wire("stall=200ms/1s")
    opened = []
    for _ in range(30):
        opened.append(bool(lib.rn_impair_open(w.im, w.now)))
        if opened[-1]:
            w.feed(b"x" * 60)
            assert len(w.pull()) == 1
        else:
            assert w.due() <= 200 * MS
        w.now += 100 * MS
    assert opened == ([True] * 8 + [False] * 2) * 3
    w.feed(b"y" * 60)
    w.now += 800 * MS
    assert w.pull() == [] and w.due() == 200 * MS
    assert w.pull(everything=True) == [b"y" * 60]


def test_a_bound_on_what_is_held() -> None:
    w = Wire("delay=60s")
    frame = bytes(60000)
    fed = 0
    while lib.rn_impair_open(w.im, w.now):
        w.feed(frame)
        fed += 1
    assert fed == -(-lib.RN_IMPAIR_BYTES_MAX // 60000) and w.stat().dropped == 0
    w.now += 60_000 * MS
    assert len(w.pull()) == fed and lib.rn_impair_open(w.im, w.now)


@pytest.mark.parametrize("wrong", [
    {"drop": (1 << 32) + 1}, {"reorder": 1}, {"reorder": 1, "reorder_gap": 1001}, {"corrupt": 1},
    {"corrupt": 1, "corrupt_bits": 65}, {"burst_enter": 1}, {"jitter_ns": 1}, {"stall_ns": 1, "stall_every_ns": 1}])
def test_c_checks_what_it_is_told(wrong: dict[str, int]) -> None:
    spec = ffi.new("struct rn_impair_spec *", wrong)
    assert lib.rn_impair_check(spec) < 0 and lib.rn_impair_new(spec, 0) == ffi.NULL


# --- in its places ---


class Pipe(inproc.Plane):
    """guest_tx and guest_rx back to back, each place impaired as asked: place -> words."""

    def __init__(self, *, slots: int = 1024, small: int = 1024, large: int = 16, buffers: int = 4 << 20,
                 **places: str) -> None:
        super().__init__({0: (small, large)})
        self.ring = inproc.Ring(slots)
        self.inner, self.tx = pair()
        self.outer, self.rx = pair(buffers)
        self.free = (small, large)
        self.guest_tx = self.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (self.ring, 1)})
        self.guest_rx = self.stage(1, inputs={0: self.ring})
        assert lib.stage_guest_tx_init(self.guest_tx, link(self.inner), -1) == 0
        assert lib.stage_guest_rx_init(self.guest_rx, link(self.outer), -1) == 0
        stage = {"up": (self.guest_tx, lib.RN_IMPAIR_LINK), "down": (self.guest_rx, lib.RN_IMPAIR_LINK),
                 "ring": (self.guest_tx, lib.RN_ROLE_CLASSIFY)}
        for place, words in places.items():
            name = "guest_tx->classify" if place == "ring" else place
            spec = ffi.new("struct rn_impair_spec *", parse_impair(f"{name}:{words}").spec())
            assert lib.rn_stage_set_impair(stage[place][0], stage[place][1], spec) == 0, error(stage[place][0])

    def send(self, frames: list[bytes]) -> None:
        for f in frames:
            self.tx.send(VNET + f)

    def work(self) -> list[bytes]:
        """Both stages until idle; what came out."""
        for s in (self.guest_tx, self.guest_rx):
            assert run(s) in (lib.RN_RUN_CONTROL, lib.RN_RUN_DRAINED), error(s)
        return [d[12:] for d in received(self.rx)]

    def end(self) -> list[bytes]:
        """Drain both; the rest of what comes out."""
        got = []
        for s in (self.guest_tx, self.guest_rx):
            lib.rn_stage_drain(s)
            while run(s) != lib.RN_RUN_DRAINED:
                got += [d[12:] for d in received(self.rx)]
                run(self.guest_rx)
            assert lib.rn_stage_impair_held(s) == 0
        return got + [d[12:] for d in received(self.rx)]

    def buffers_out(self) -> tuple[int, int]:
        """Small and large buffers that are not free, guest_tx's own spare counted as free."""
        lib.rn_stage_fini(self.guest_tx)
        err = ffi.new("int *")
        pool = lib.rn_pool_new(self.arena.ptr, self.arena.size, 0, 0, 1, err)
        try:
            return tuple(n - lib.rn_pool_free(pool, c) for n, c in zip(self.free, (lib.RN_SMALL, lib.RN_LARGE),
                                                                       strict=True))
        finally:
            lib.rn_pool_delete(pool)

    def impaired(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for s in (self.guest_tx, self.guest_rx):
            for name, value in counts(s).items():
                if name.startswith("impair_"):
                    total[name] = total.get(name, 0) + value
        return total

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for s in (self.inner, self.tx, self.outer, self.rx):
            s.close()


PLACES = ["up", "ring", "down"]


@pytest.mark.parametrize("place", PLACES)
def test_in_place_by_seed_and_with_counters(place: str) -> None:
    words = "drop=10%,dup=10%,reorder=10%/2,corrupt=10%,seed=4"
    runs = []
    for _ in range(2):
        with Pipe(**{place: words}) as p:
            got = []
            for at in range(0, 600, 100):
                p.send(numbered(600)[at:at + 100])
                got += p.work()
            got += p.end()
            n = p.impaired()
            assert len(got) == 600 - n["impair_dropped"] + n["impair_duplicated"]
            assert n["impair_dropped"] > 30 and n["impair_reordered"] > 30 and n["impair_corrupted"] > 30
            assert p.buffers_out() == (0, 0)
            # How far a frame is overtaken is time's too (RN_IMPAIR_LATE_NS); test_reorder_by_gap has a clock of its own.
            runs.append((sorted(got), n))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("place", PLACES)
def test_in_place_large_frames_and_flags(place: str) -> None:
    """Super-frames pass with their virtio-net header."""
    tso = bytes.fromhex("01013600b405220010000000")
    with Pipe(**{place: "dup=100%"}) as p:
        frame = bytes(60000)
        p.tx.send(tso + frame)
        for s in (p.guest_tx, p.guest_rx):
            run(s)
        assert received(p.rx) == [tso + frame] * 2
        p.end()
        assert p.buffers_out() == (0, 0)


@pytest.mark.parametrize("place", PLACES)
def test_in_place_a_delay_is_waited_for_and_a_drain_is_not_delayed(place: str) -> None:
    with Pipe(**{place: "delay=60s"}) as p:
        p.send(numbered(20))
        assert p.work() == []
        stage = p.guest_rx if place == "down" else p.guest_tx
        assert lib.rn_stage_impair_held(stage) == 20
        assert 50_000 < lib.rn_stage_impair_wait(stage) <= 60_000
        assert p.end() == numbered(20)
        assert p.buffers_out() == (0, 0)


@pytest.mark.parametrize("place", PLACES)
def test_in_place_time_wakes_the_stage(place: str) -> None:
    """No frame comes after it, no doorbell rings: the loop's own deadline lets the frame out."""
    with Pipe(**{place: "delay=20ms"}) as p:
        p.send(numbered(1))
        while not (got := p.work()):
            stage = p.guest_rx if place == "down" else p.guest_tx
            lib_wait = lib.rn_stage_impair_wait(stage)
            assert 0 <= lib_wait <= 20
            select.select([], [], [], lib_wait / 1000)
        assert got == numbered(1)


@pytest.mark.parametrize("place", PLACES)
def test_in_place_what_a_stage_holds_at_its_end_is_counted(place: str) -> None:
    with Pipe(**{place: "delay=60s"}) as p:
        p.send(numbered(9))
        p.work()
        for s in (p.guest_tx, p.guest_rx):
            lib.rn_stage_fini(s)
        assert p.impaired()["impair_dropped"] == 9


@pytest.mark.parametrize("place", PLACES)
def test_in_place_a_stall_is_back_pressure(place: str) -> None:
    """Nothing is lost: what cannot go waits where it is."""
    with Pipe(**{place: "stall=59s/59001ms"}) as p:
        select.select([], [], [], 0.005)  # into the stall, which begins 1 ms after the start
        p.send(numbered(20))
        assert p.work() == []
        stage = p.guest_rx if place == "down" else p.guest_tx
        assert lib.rn_stage_impair_held(stage) == 0 and lib.rn_stage_impair_wait(stage) > 40_000
        assert p.ring.fill == (20 if place == "down" else 0)
        got = p.end()
        assert got == (numbered(20) if place == "down" else [])
        assert len(received(p.inner)) == (0 if place == "down" else 20)  # still in the link: a source drains so


def test_a_full_ring_or_link_behind_the_wire_loses_nothing() -> None:
    with Pipe(slots=8, small=16, large=4, buffers=1, up="dup=50%", ring="dup=50%", down="dup=50%") as p:
        p.send(numbered(200))
        got: list[bytes] = []
        for _ in range(2000):
            got += p.work()
            if len(set(got)) == 200 and not p.ring.fill:
                break
        got += p.end()
        n = p.impaired()
        assert len(got) == 200 + n["impair_duplicated"] and set(got) == set(numbered(200))
        assert p.buffers_out() == (0, 0)


@pytest.mark.parametrize("where", [-1, lib.RN_ROLE_BRIDGE, lib.RN_IMPAIR_LINK + 1])
def test_no_such_output(where: int) -> None:
    with Pipe() as p:
        assert lib.rn_stage_set_impair(p.guest_tx, where, ffi.new("struct rn_impair_spec *")) < 0
        assert "no such output" in error(p.guest_tx)


def test_relay_carries_frames_between_two_links() -> None:
    (a, guest), (b, host) = pair(), pair()
    stop_r, stop_w = os.pipe()
    drop = Wire("drop=20%,dup=20%,seed=9", "up")
    thread = threading.Thread(target=lib.rn_impair_relay, args=(link(a), link(b), drop.im, ffi.NULL, stop_r))
    thread.start()
    try:
        for f in numbered(300):
            guest.send(VNET + f)
        for s in (guest, host):
            s.settimeout(60)
        want = sum(1 if not m & DUP else 2 for m in Wire("drop=20%,dup=20%,seed=9", "up").trace(300) if not m & DROP)
        got = [host.recv(100)[12:] for _ in range(want)]
        assert set(got) < set(numbered(300)) and got == sorted(got)
        host.send(VNET + b"back" * 20)
        assert guest.recv(100) == VNET + b"back" * 20
    finally:
        os.close(stop_w)
        thread.join(60)
        assert not thread.is_alive()
        for s in (a, b, guest, host):
            s.close()
        os.close(stop_r)


# --- --impair ---


def test_what_the_words_mean() -> None:
    got = parse_impair("up:drop=1%,reorder=2%/5,delay=5ms~2ms,dup=0.5%,corrupt=0.1%/2,truncate=.001,burst=0.1%/25%,"
                       "stall=200ms/1s,seed=7,super")
    share = {p: round(p * (1 << 32)) for p in (0.01, 0.02, 0.005, 0.001, 0.25)}
    assert got == Impair(
        place="up", stage="guest_tx", output=LINK_OUTPUT, keep_offloads=True, seed=7, drop=share[0.01],
        reorder=share[0.02], reorder_gap=5, delay_ns=5 * MS, jitter_ns=2 * MS, dup=share[0.005], corrupt=share[0.001],
        corrupt_bits=2, truncate=share[0.001], burst_enter=share[0.001], burst_leave=share[0.25], stall_ns=200 * MS,
        stall_every_ns=1000 * MS)
    assert lib.rn_impair_check(ffi.new("struct rn_impair_spec *", got.spec())) == 0


def test_places() -> None:
    assert lib.RN_IMPAIR_LINK == LINK_OUTPUT
    assert parse_impair("down:drop=1%").stage == "guest_rx"
    for ring in TOPOLOGY.rings:
        if "vmnet" in ring.name:
            with pytest.raises(ConfigError, match="is no place"):
                parse_impair(f"{ring.name}:drop=1%")
        else:
            got = parse_impair(f"{ring.name}:drop=1%")
            assert (got.stage, got.output) == (ring.producer, int(ring.role))


@pytest.mark.parametrize(("text", "said"), [
    ("", "nothing is no place"), ("up", "does nothing"), ("up:", "does nothing"), ("up:seed=1", "does nothing"),
    ("sideways:drop=1%", "sideways is no place; there are up, down, guest_tx->classify"),
    ("up:drop=101%", "drop=101%: expected a share"), ("up:drop=2", "expected a share"), ("up:drop", "expected a share"),
    ("up:drop=-1%", "expected a share"), ("up:drop=nan", "expected a share"),
    ("up:drop=1%,,dup=1%", "nothing is none of"),
    ("up:drops=1%", "drops=1% is none of drop="), ("up:drop=1%,drop=2%", "drop twice"),
    ("up:super=1", "super=1 is none"),
    ("up:reorder=1%/0", "how many frames overtake, 1..1000"), ("up:reorder=1%/", "how many frames overtake"),
    ("up:corrupt=1%/65", "1..64"), ("up:burst=1%", "expected a share"), ("up:burst=1%/0", "a burst that never ends"),
    ("up:delay=5", "expected a time"), ("up:delay=1ms~2ms", "varies by more than it is"),
    ("up:delay=61s", "is over 60 s"),
    ("up:stall=1s", "expected a time"), ("up:stall=1s/1s", "how long / how often"),
    ("up:seed=x,drop=1%", "a whole number"),
    ("up:seed=-1,drop=1%", "a whole number"), ("up:truncate=1e-3", "expected a share")])
def test_wrong_words_are_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        make({"impair": (text,)})
    assert str(e.value).startswith(f"--impair {text}: ".replace(" :", ":") if text else "--impair")
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_place_once() -> None:
    make({"impair": ("up:drop=1%", "down:drop=1%")})
    with pytest.raises(ConfigError, match="up twice"):
        make({"impair": ("up:drop=1%", "up:dup=1%")})


def test_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('impair = ["up:drop=1%", "egress->guest_rx:delay=1ms"]\n')
    assert [i.place for i in make(load_toml(str(path))).impairments()] == ["up", "egress->guest_rx"]


@pytest.mark.parametrize(("impair", "offload"), [
    ((), True), (("up:drop=1%",), False), (("up:drop=1%,super",), True),
    (("up:drop=1%,super", "down:drop=1%"), False), (("classify->egress:delay=1ms",), False)])
def test_offloads_are_off_unless_super(impair: tuple[str, ...], offload: bool) -> None:
    made = stage_configs(make({"impair": impair, "mtu": 1500}), link_kind="tap", vnet=True)
    assert made["egress"]["offload"] is offload
    assert made["guest_tx"]["frame_max"] == (65549 if offload else 1518)


