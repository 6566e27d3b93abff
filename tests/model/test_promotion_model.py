"""Owner words and acknowledgements of promoted flows, in every interleaving and at every moment of a kill.

The programs are csrc/rn_promote.h, and what fast_up.c, fast_down.c and tcp_promote.c do around it, access by access. The host
socket is the kernel's: what send() and recv() did is done at once and survives a kill. What must hold: whoever works on a half
finds it as the socket says (rcv_nxt is what was sent), a hand-over is never missed, an acknowledgement is read by whoever
has `down`, and nobody sleeps through one he asked for. Each part is then left out, and the walk must find what goes wrong.
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

EGRESS, LINK, BUSY = 1, 2, 8  # owner words
WORK = 2  # segments each of the two handles


def only(wanted: bool, *ops: Op) -> list[Op]:
    return list(ops) if wanted else []


def segment() -> list[Op]:
    """What the owner of `up` does: the bytes go to the socket, and rcv_nxt says so."""
    return [
        load("rcv", "rcv_nxt"),
        load("sent", "socket"),
        check(lambda r: r["rcv"] == r["sent"], "rcv_nxt is what the socket took"),
        send("socket", lambda r: r["sent"] + 1),
        store("rcv_nxt", lambda r: r["rcv"] + 1),
    ]


def may_die(killed: bool) -> list[Op]:
    """kill -9 here, or not. What the process stored is there when its end is seen."""
    return only(killed, choose("die", lambda r: (0, 1)), jump("dead", lambda r: r["die"] == 1))


def link_stage(without: str = "", killed: bool = False) -> list[Op]:
    """guest_tx: claim, work, leave. A half that is not its own is egress's business."""
    mark = without != "BUSY"
    ops = [
        let("n", 0),
        label("next"),
        jump("end", lambda r: r["n"] == WORK),
        let("n", lambda r: r["n"] + 1),
        update("was", "owner", lambda o: LINK | BUSY * mark if o == LINK else o),  # F1
        jump("next", lambda r: r["was"] != LINK),
    ]
    for op in segment():
        ops += [*may_die(killed), op]
    return [
        *ops,
        *may_die(killed),
        store("owner", LINK, release=without != "leave release"),
        jump("next"),
        label("end"),
        label("dead"),
        *only(killed, fence(), bell_ring("died")),  # one way or the other: the supervisor sees it, and starts a successor
    ]


def seize() -> list[Op]:
    return [
        label("seize"),
        update("was", "owner", lambda o: o if o & BUSY else EGRESS),
        jump("seize", lambda r: bool(r["was"] & BUSY)),
    ]


def egress(without: str = "", killed: bool = False, rounds: int = WORK) -> list[Op]:
    """Take the half, put it right if it is torn, work on it, lend it again; the last time keep it."""
    ops: list[Op] = [let("n", 0), label("next"), let("n", lambda r: r["n"] + 1)]
    ops += seize()
    if killed:
        ops += [
            load("torn", "torn"),
            jump("whole", lambda r: not r["torn"]),
            store("torn", 0),
            load("sent", "socket"),
            *only(without != "repair", store("rcv_nxt", lambda r: r["sent"])),
            label("whole"),
        ]
    return [
        *ops,
        *segment(),
        jump("end", lambda r: r["n"] == rounds),
        store("owner", LINK, release=without != "lend release"),
        jump("next"),
        label("end"),
    ]


def successor(without: str = "") -> list[Op]:
    """A new process of the killed stage: says that the half is torn, and only then gives it back (rn_half_heir())."""
    torn = [load("owner", "owner"), jump("not_torn", lambda r: r["owner"] != LINK | BUSY), store("torn", 1), label("not_torn")]
    heir = update("was", "owner", lambda o: EGRESS if o & ~BUSY == LINK else o)
    early, late = without != "torn before", without == "torn before"
    return [
        bell_wait("died"),
        load("owner", "owner"),
        *only(early and without != "torn", *torn),
        heir,
        *only(late, jump("end", lambda r: r["was"] != LINK | BUSY), store("torn", 1)),
        label("end"),
    ]


def half() -> dict[str, int]:
    return {"owner": LINK, "rcv_nxt": 0, "socket": 0, "torn": 0, "died": 0}


def test_a_half_has_one_owner_who_finds_it_as_the_socket_says():
    assert explore(half(), [link_stage(), egress()]) > 500


@pytest.mark.parametrize(("link", "eg"), [("BUSY", ""), ("leave release", ""), ("", "lend release")])
def test_every_part_of_claim_and_seize_is_needed(link, eg):
    with pytest.raises(Wrong, match="what the socket took"):
        explore(half(), [link_stage(without=link), egress(without=eg)])


def test_a_kill_at_any_moment_leaves_a_half_that_egress_puts_right():
    """Also in the middle of a segment; egress waits for the successor only if the half was being worked on."""
    assert explore(half(), [link_stage(killed=True), egress(killed=True), successor()]) > 5000


@pytest.mark.parametrize(("eg", "heir"), [("repair", ""), ("", "torn"), ("", "torn before")])
def test_every_part_of_the_repair_is_needed(eg, heir):
    programs = [link_stage(killed=True), egress(without=eg, killed=True), successor(without=heir)]
    with pytest.raises(Wrong, match="what the socket took"):
        explore(half(), programs)


# --- an offer: the notice in the ring, and the owner word ---


def offerer(early: bool = False) -> list[Op]:
    """egress: fields, the notice into its slot, the owner word, and at the end of the turn the ring's tail."""
    tail = store("tail", 1, release=True)
    return [store("snd_una", 7), store("slot", 1), *only(early, tail), store("owner", LINK, release=True), *only(not early, tail)]


OFFERED = [
    label("wait"),
    load("tail", "tail"),
    jump("wait", lambda r: not r["tail"]),
    load("notice", "slot"),
    check(lambda r: r["notice"] == 1, "the notice is read as it was written"),
    update("was", "owner", lambda o: LINK | BUSY if o == LINK else o),
    check(lambda r: r["was"] == LINK, "the half is there with its notice"),
    load("una", "snd_una"),
    check(lambda r: r["una"] == 7, "and with its fields"),
]


def test_an_offer_is_never_missed():
    memory = {"owner": EGRESS, "snd_una": 0, "slot": 0, "tail": 0}
    assert explore(memory, [offerer(), OFFERED]) > 10
    with pytest.raises(Wrong, match="the half is there"):
        explore(memory, [offerer(early=True), OFFERED])


# --- acknowledgements: guest_tx posts, guest_rx asks to be told and sleeps ---

ACKS = 3


def poster(without: str = "") -> list[Op]:
    """guest_tx: K1, then K4."""
    ops: list[Op] = []
    for n in range(1, ACKS + 1):
        after = f"after{n}"
        ops += [
            update("old", "ack", lambda old, n=n: max(old, n)) if without != "post before look" else let("x", 0),
            load("want", "want"),
            *only(without == "post before look", update("old", "ack", lambda old, n=n: max(old, n))),
            jump(after, lambda r: not r["want"]),
            load("from", "want_ack"),
            jump(after, lambda r, n=n: n < r["from"]),
            exchange("want", "want", 0),
            jump(after, lambda r: not r["want"]),
            *only(without != "wake", bell_ring("bell")),
            label(after),
        ]
    return ops


def pump(without: str = "") -> list[Op]:
    """guest_rx: takes what was acknowledged; while something is in flight it asks for an ACK of some of it, and sleeps."""
    ask = [store("want_ack", lambda r: r["from"]), store("want", 1, release=True)]
    if without == "want_ack first":
        ask = [store("want", 1), fence(), store("want_ack", lambda r: r["from"])]
    return [
        label("turn"),
        load("seen", "ack"),  # K2
        jump("end", lambda r: r["seen"] == ACKS),
        choose("from", lambda r: range(r["seen"] + 1, ACKS + 1)),
        *only(without != "ask", *ask),  # K3
        *only(without != "K3 fence", fence()),
        *only(without != "second look", load("now", "ack"), jump("turn", lambda r: r["now"] != r["seen"])),
        bell_wait("bell"),
        bell_quiet("bell"),
        jump("turn"),
        label("end"),
    ]


def acks() -> dict[str, int]:
    return {"ack": 0, "want": 0, "want_ack": 0, "bell": 0}


def test_an_acknowledgement_that_was_asked_for_wakes():
    assert explore(acks(), [poster(), pump()]) > 100


@pytest.mark.parametrize(("post", "ask"), [("post before look", ""), ("wake", ""), ("", "ask"), ("", "K3 fence"),
                                           ("", "second look")])
def test_every_part_of_asking_is_needed(post, ask):
    with pytest.raises(Deadlock):
        explore(acks(), [poster(without=post), pump(without=ask)])


# --- acknowledgements, and `down` taken back meanwhile ---


def post_to_owner(without: str = "") -> list[Op]:
    """guest_tx: whose is down? Post, fence, look again: if it is egress's now, egress gets the segment as well."""
    return [
        load("owner", "owner"),
        jump("egress", lambda r: r["owner"] & ~BUSY != LINK),
        # A store, where the C has a compare-and-swap: all that is relied on is the fence behind it.
        store("ack", 1, release=True),
        *only(without != "fence", fence()),
        *only(without != "second look", load("owner", "owner"), jump("egress", lambda r: r["owner"] & ~BUSY != LINK)),
        jump("end"),
        label("egress"),
        send("ring", 1),
        label("end"),
        send("posted", 1),
    ]


TAKE_DOWN = [
    *seize(),
    fence(),
    load("ack", "ack"),
    bell_wait("posted"),  # what it finds in its ring later on
    load("segment", "ring"),
    check(lambda r: bool(r["ack"] or r["segment"]), "the acknowledgement came to egress"),
]


def test_no_acknowledgement_falls_between_two_owners_of_down():
    memory = {"owner": LINK, "ack": 0, "ring": 0, "posted": 0}
    assert explore(memory, [post_to_owner(), TAKE_DOWN]) > 20
    for part in ("fence", "second look"):
        with pytest.raises(Wrong, match="came to egress"):
            explore(memory, [post_to_owner(without=part), TAKE_DOWN])
