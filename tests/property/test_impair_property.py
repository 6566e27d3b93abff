"""The bad wire (csrc/rn_impair.c) under any spec and any sequence of feeding, waiting and taking."""
from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib

NEVER = (1 << 64) - 1
VNET = bytes(12)

probability = st.sampled_from([0, 0, 0, 1 << 26, 1 << 30, 1 << 31, 1 << 32])


@st.composite
def specs(draw: st.DrawFn) -> dict[str, int]:
    """Any that rn_impair_check() takes."""
    delay = draw(st.sampled_from([0, 0, 1, 1_000_000, 50_000_000]))
    enter = draw(probability)
    stall = draw(st.sampled_from([0, 0, 1, 3_000_000]))
    return {
        "seed": draw(st.integers(0, NEVER)),
        "drop": draw(probability), "dup": draw(probability), "reorder": draw(probability),
        "reorder_gap": draw(st.integers(1, 8)), "corrupt": draw(probability),
        "corrupt_bits": draw(st.integers(1, lib.RN_IMPAIR_BITS_MAX)), "truncate": draw(probability),
        "burst_enter": enter, "burst_leave": draw(st.sampled_from([1 << 30, 1 << 32])) if enter else 0,
        "delay_ns": delay, "jitter_ns": draw(st.integers(0, delay)), "stall_ns": stall,
        "stall_every_ns": stall and stall + draw(st.sampled_from([1, 5_000_000])),
    }


steps = st.lists(st.tuples(st.sampled_from(["feed", "wait", "due", "pull"]), st.integers(0, 12_000_000),
                           st.integers(0, 200)), max_size=120)


class Wire:
    def __init__(self, spec: dict[str, int]) -> None:
        self.now = 1
        self.im = ffi.gc(lib.rn_impair_new(ffi.new("struct rn_impair_spec *", spec), self.now), lib.rn_impair_free)
        assert self.im != ffi.NULL
        self.fed: list[bytes] = []
        self.decided: list[int] = []
        self.out: list[bytes] = []

    def feed(self, n: int) -> None:
        frame = len(self.fed).to_bytes(4, "big") + bytes(i & 255 for i in range(n))
        self.fed.append(frame)
        self.decided.append(lib.rn_impair_feed(self.im, self.now, VNET + frame, len(frame), 0, ffi.NULL))

    def pull(self, everything: bool = False) -> None:
        f = ffi.new("struct rn_impair_frame *")
        while lib.rn_impair_peek(self.im, self.now, int(everything), f):
            self.out.append(bytes(ffi.buffer(f.vnet_then_frame + 12, f.len)))
            lib.rn_impair_pop(self.im)
        # Nothing is due now, so what rn_impair_due() says lies ahead: a loop that sleeps until then does not spin.
        assert everything or lib.rn_impair_due(self.im, self.now) > self.now

    def stat(self) -> dict[str, int]:
        s = ffi.new("struct rn_impair_stat *")
        lib.rn_impair_stat(self.im, s)
        return {name: getattr(s, name) for name, _ in ffi.typeof("struct rn_impair_stat").fields}


def play(spec: dict[str, int], script: list[tuple[str, int, int]]) -> Wire:
    w = Wire(spec)
    for what, ns, n in script:
        match what:
            case "feed":
                w.feed(n)
            case "wait":
                w.now += ns
            case "due":
                w.pull()
                due = lib.rn_impair_due(w.im, w.now)
                w.now = w.now if due == NEVER else due
            case "pull":
                w.pull()
        s = w.stat()
        assert s["in"] + s["duplicated"] == s["out"] + s["dropped"] + s["held"]
        assert (s["in"], s["out"]) == (len(w.fed), len(w.out))
    return w


@given(specs(), steps)
@settings(max_examples=150, deadline=None)
def test_no_frame_is_lost_without_a_counter(spec: dict[str, int], script: list[Any]) -> None:
    w = play(spec, script)
    w.pull(everything=True)
    s = w.stat()
    assert s["held"] == s["held_bytes"] == 0
    times = [sum(bool(m & bit) for m in w.decided) for bit in (
        lib.RN_IMPAIRED_DROP, lib.RN_IMPAIRED_DUP, lib.RN_IMPAIRED_REORDER, lib.RN_IMPAIRED_CORRUPT,
        lib.RN_IMPAIRED_TRUNCATE, lib.RN_IMPAIRED_DELAY)]
    assert times == [s[n] for n in ("dropped", "duplicated", "reordered", "corrupted", "truncated", "delayed")]
    # What was neither damaged nor held back is there, unchanged, in its order; twins too.
    hurt = lib.RN_IMPAIRED_CORRUPT | lib.RN_IMPAIRED_TRUNCATE | lib.RN_IMPAIRED_REORDER
    want = [f for f, m in zip(w.fed, w.decided, strict=True) if not m & (hurt | lib.RN_IMPAIRED_DROP)
            for _ in range(2 if m & lib.RN_IMPAIRED_DUP else 1)]
    left = iter(w.out)
    assert all(f in left for f in want)


@given(specs(), steps, st.integers(1, 5_000_000))
@settings(max_examples=100, deadline=None)
def test_the_same_frames_meet_the_same_fate_at_any_speed(spec: dict[str, int], script: list[Any], pause: int) -> None:
    one = play(spec, script)
    two = play(spec, [s for step in script for s in (step, ("wait", pause, 0)) if step[0] == "feed"])
    assert one.decided == two.decided
    one.pull(everything=True)
    two.pull(everything=True)
    assert sorted(one.out) == sorted(two.out)


@given(specs(), st.lists(st.integers(0, 100), max_size=60))
@settings(max_examples=100, deadline=None)
def test_waiting_for_what_is_due_empties_the_wire(spec: dict[str, int], frames: list[int]) -> None:
    """Following rn_impair_due() alone, as a stage does whose neighbours are silent, lets everything out."""
    w = Wire(spec)
    for n in frames:
        w.feed(n)
    for _ in range(10 * len(frames) + 10):
        w.pull()
        if not w.stat()["held"]:
            return
        w.now = lib.rn_impair_due(w.im, w.now)
        assert w.now != NEVER, "held, and nobody will look again"
    raise AssertionError("never empty")
