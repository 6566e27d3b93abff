"""Sleep and wake of the ring and of the arena, in every interleaving: nobody sleeps through work.

The programs below are csrc/rn_ring.c and csrc/rn_arena.c, access by access, with the loop of rn_stage.c around
them. Each part that the protocol needs is then left out, and the walk must find what goes wrong: so the
model can see the fault, and the part is needed.
"""
from __future__ import annotations

import pytest
from weakmem import (
    Deadlock,
    Op,
    Wrong,
    bell_quiet,
    bell_ring,
    bell_wait,
    check,
    choose,
    exchange,
    explore,
    fence,
    jump,
    label,
    let,
    load,
    send,
    store,
    update,
)

SLOTS = 2
FRAMES = 3


def only(wanted: bool, *ops: Op) -> list[Op]:
    return list(ops) if wanted else []


def producer(without: str = "") -> list[Op]:
    """room, put and publish a burst of any size; when full, arm and block."""
    rearm_early = without == "quiet before arming"
    return [
        let("tail", 0),
        label("turn"),
        jump("end", lambda r: r["tail"] == FRAMES),
        load("head", "head"),  # P2
        let("room", lambda r: SLOTS - (r["tail"] - r["head"])),
        jump("full", lambda r: r["room"] == 0),
        choose("burst", lambda r: range(1, min(r["room"], FRAMES - r["tail"]) + 1)),
        label("put"),
        store(lambda r: f"slot{r['tail'] % SLOTS}", lambda r: r["tail"]),
        let("tail", lambda r: r["tail"] + 1),
        let("burst", lambda r: r["burst"] - 1),
        jump("put", lambda r: r["burst"] > 0),
        store("tail", lambda r: r["tail"], release=without != "P1 release"),  # P1
        *only(without != "publish fence", fence()),
        load("asleep", "asleep"),  # P4
        jump("turn", lambda r: not r["asleep"]),
        exchange("asleep", "asleep", 0),
        jump("turn", lambda r: not r["asleep"]),
        *only(without != "publish wake", bell_ring("consumer_bell")),
        jump("turn"),
        label("full"),
        *only(without != "starved", store("starved", 1)),  # P3
        *only(without != "tx_arm fence", fence()),
        *only(without != "tx_arm second look",
              load("head", "head"),
              jump("withdraw", lambda r: r["tail"] - r["head"] < SLOTS)),
        *only(rearm_early, bell_quiet("producer_bell")),
        bell_wait("producer_bell"),
        store("starved", 0),
        *only(not rearm_early, bell_quiet("producer_bell")),
        jump("turn"),
        label("withdraw"),
        store("starved", 0),
        jump("turn"),
        label("end"),
    ]


def consumer(without: str = "") -> list[Op]:
    """peek, read and consume a burst of any size; when empty, arm and block."""
    rearm_early = without == "quiet before arming"
    return [
        let("head", 0),
        label("turn"),
        jump("end", lambda r: r["head"] == FRAMES),
        load("tail", "tail"),  # C1
        jump("empty", lambda r: r["tail"] == r["head"]),
        check(lambda r: 0 < r["tail"] - r["head"] <= SLOTS, "tail within one ring of head"),
        choose("burst", lambda r: range(1, r["tail"] - r["head"] + 1)),
        label("read"),
        load("frame", lambda r: f"slot{r['head'] % SLOTS}"),
        check(lambda r: r["frame"] == r["head"], "a frame is read as it was written"),
        let("head", lambda r: r["head"] + 1),
        let("burst", lambda r: r["burst"] - 1),
        jump("read", lambda r: r["burst"] > 0),
        store("head", lambda r: r["head"], release=True),  # C2
        *only(without != "consume fence", fence()),
        load("starved", "starved"),  # C3
        jump("turn", lambda r: not r["starved"]),
        exchange("starved", "starved", 0),
        jump("turn", lambda r: not r["starved"]),
        *only(without != "consume wake", bell_ring("producer_bell")),
        jump("turn"),
        label("empty"),
        *only(without != "asleep", store("asleep", 1)),  # C4
        *only(without != "rx_arm fence", fence()),
        *only(without != "rx_arm second look",
              load("tail", "tail"),
              jump("withdraw", lambda r: r["tail"] != r["head"])),
        *only(rearm_early, bell_quiet("consumer_bell")),
        bell_wait("consumer_bell"),
        store("asleep", 0),
        *only(not rearm_early, bell_quiet("consumer_bell")),
        jump("turn"),
        label("withdraw"),
        store("asleep", 0),
        jump("turn"),
        label("end"),
    ]


def ring_memory() -> dict[str, int]:
    return {"tail": 0, "head": 0, "asleep": 0, "starved": 0, "consumer_bell": 0, "producer_bell": 0,
            **{f"slot{i}": -1 for i in range(SLOTS)}}


def test_nobody_sleeps_through_work():
    states = explore(ring_memory(), [producer(), consumer()])
    assert states > 1000, "the walk went somewhere"


@pytest.mark.parametrize("part", ["publish fence", "publish wake", "starved", "tx_arm fence", "tx_arm second look",
                                  "quiet before arming"])
def test_every_part_of_the_producer_is_needed(part):
    with pytest.raises(Deadlock, match="lost wake"):
        explore(ring_memory(), [producer(without=part), consumer()])


@pytest.mark.parametrize("part", ["consume fence", "consume wake", "asleep", "rx_arm fence", "rx_arm second look",
                                  "quiet before arming"])
def test_every_part_of_the_consumer_is_needed(part):
    with pytest.raises(Deadlock, match="lost wake"):
        explore(ring_memory(), [producer(), consumer(without=part)])


def test_without_release_a_slot_is_read_before_it_is_written():
    with pytest.raises(Wrong, match="as it was written"):
        explore(ring_memory(), [producer(without="P1 release"), consumer()])


# --- the arena's return list: one owner that runs out, two stages that free ---

BUFFERS = 2
USES = 3


def owner(without: str = "") -> list[Op]:
    """Take buffers and hand each to either stage; out of buffers: arm, look at the list again, block."""
    return [
        let("free", BUFFERS),
        let("uses", 0),
        label("turn"),
        jump("end", lambda r: r["uses"] == USES),
        jump("hand", lambda r: r["free"] > 0),
        exchange("got", "returned", 0),  # A2
        let("free", lambda r: r["got"]),
        jump("hand", lambda r: r["free"] > 0),
        store("starved", 1),  # A3
        *only(without != "arm order", fence()),
        *only(without != "second look",
              load("got", "returned"),
              jump("withdraw", lambda r: r["got"] > 0)),
        bell_wait("owner_bell"),
        store("starved", 0),
        bell_quiet("owner_bell"),
        jump("turn"),
        label("withdraw"),
        store("starved", 0),
        jump("turn"),
        label("hand"),
        let("free", lambda r: r["free"] - 1),
        let("uses", lambda r: r["uses"] + 1),
        choose("to", lambda r: (1, 2)),
        send(lambda r: f"frame{r['uses']}", lambda r: r["to"]),  # a ring, which the walk above is about
        jump("turn"),
        label("end"),
    ]


def freer(me: int, without: str = "") -> list[Op]:
    """Look at each frame in order and free those that are for this stage."""
    ops: list[Op] = []
    for n in range(1, USES + 1):
        after = f"frame{n + 1}"
        look = load("starved", "starved")
        ops += [
            label(f"frame{n}"),
            bell_wait(f"frame{n}"),
            load("to", f"frame{n}"),
            jump(after, lambda r: r["to"] != me),
            *only(without == "push before look", look),
            update("old", "returned", lambda old: old + 1),  # A1
            *only(without != "push before look", look),
            jump(after, lambda r: not r["starved"]),
            exchange("starved", "starved", 0),  # A4
            jump(after, lambda r: not r["starved"]),
            *only(without != "wake", bell_ring("owner_bell")),
        ]
    return [*ops, label(f"frame{USES + 1}")]


def arena_memory() -> dict[str, int]:
    return {"returned": 0, "starved": 0, "owner_bell": 0, **{f"frame{n}": 0 for n in range(1, USES + 1)}}


def test_an_owner_out_of_buffers_is_woken():
    assert explore(arena_memory(), [owner(), freer(1), freer(2)]) > 1000


@pytest.mark.parametrize("part", ["arm order", "second look"])
def test_every_part_of_the_owner_is_needed(part):
    with pytest.raises(Deadlock, match="lost wake"):
        explore(arena_memory(), [owner(without=part), freer(1), freer(2)])


@pytest.mark.parametrize("part", ["push before look", "wake"])
def test_every_part_of_freeing_is_needed(part):
    with pytest.raises(Deadlock, match="lost wake"):
        explore(arena_memory(), [owner(), freer(1, without=part), freer(2, without=part)])
