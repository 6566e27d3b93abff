"""Start-up and cancellation, every interleaving: a model of supervisor and stages, walked state by state.

The stages are a chain (source, middle, sink), each with its two message queues. What the supervisor accepts in
which state is not modelled but taken from pipeline.supervisor.MOVES. Faults, at any point and up to a bound:
a stage is killed, hangs (then only SIGKILL helps), or reports a failure; the supervisor is killed; the user asks
for the end. Deadlines may run out at any time.

Checked in every reachable state:
  order    Start goes to a stage only when all it hands frames to are running; Cancel in an orderly end only when
           all that feed it are gone.
  words    the supervisor never hears a message that MOVES does not allow where it stands.
  exit     some step is possible unless everything is over, and no sequence of steps is endless (the graph has no
           cycle): so every schedule ends with no process left.
The last test breaks the rules one by one and sees the walk notice.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pipeline.messages import Cancel, Configure, Ended, Failed, Hello, Ready, Running, Start
from pipeline.supervisor import MOVES, State
from pipeline.topology import TOPOLOGY, Feature

WORDS = {"hello": Hello, "ready": Ready, "running": Running, "ended": Ended, "failed": Failed}
ORDERS = {"configure": Configure, "start": Start, "cancel": Cancel}
N = 3  # source, middle, sink


class Proc(NamedTuple):
    """A stage process, and what is on its way to and from it."""

    at: str = "boot"  # boot, greeted, ready, run, drain, hung, exited (not yet reaped)
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()


class World(NamedTuple):
    phase: tuple[object, ...] = ("hello",)
    view: tuple[State, ...] = (State.SPAWNED,) * N  # what the supervisor knows
    procs: tuple[Proc, ...] = (Proc(),) * N
    failed: bool = False
    ending: bool = False  # the user asked
    faults: int = 0


class Rules(NamedTuple):
    """How the supervisor and its stages behave; the defaults are the real thing."""

    start_order: tuple[int, ...] = (2, 1, 0)
    cancel_order: tuple[int, ...] = (0, 1, 2)
    deadlines: bool = True
    sigkill: bool = True
    die_with_supervisor: bool = True
    cancelled_hears_late_words: bool = True
    max_faults: int = 2


class Broken(AssertionError):
    pass


def put(items: tuple, i: int, value: object) -> tuple:
    return items[:i] + (value,) + items[i + 1:]


def alive(w: World, i: int) -> bool:
    """As Child.alive: not yet reaped."""
    return w.view[i] is not State.GONE


def tell(w: World, i: int, word: str) -> World:
    assert word in ORDERS
    p = w.procs[i]
    return w if p.at == "exited" else w._replace(procs=put(w.procs, i, p._replace(down=(*p.down, word))))


def steps(w: World, r: Rules) -> Iterator[tuple[str, World]]:
    """All that may happen next. Names that begin with "!" are faults and wishes from outside."""
    if w.phase == ("dead",):
        for i, p in enumerate(w.procs):
            if p.at != "exited" and r.die_with_supervisor:
                yield f"stage {i} loses its supervisor", w._replace(procs=put(w.procs, i, Proc("exited")))
        return
    for i, p in enumerate(w.procs):
        yield from stage_steps(w, i, p, r)
    yield from hearing(w, r)
    yield from supervising(w, r)
    if w.faults < r.max_faults and w.phase != ("over",):
        for i, p in enumerate(w.procs):
            if p.at == "exited":
                continue
            yield f"!kill stage {i}", w._replace(procs=put(w.procs, i, p._replace(at="exited", down=())),
                                                 faults=w.faults + 1)
            if p.at != "hung":
                yield f"!hang stage {i}", w._replace(procs=put(w.procs, i, p._replace(at="hung")), faults=w.faults + 1)
                said = p._replace(at="exited", up=(*p.up, "failed"), down=())
                yield f"!fail stage {i}", w._replace(procs=put(w.procs, i, said), faults=w.faults + 1)
        yield "!kill supervisor", World(phase=("dead",), procs=w.procs, faults=w.faults + 1)
    if not w.ending and w.phase[0] in ("hello", "ready", "start", "up"):
        yield "!user asks for the end", w._replace(ending=True)


def stage_steps(w: World, i: int, p: Proc, r: Rules) -> Iterator[tuple[str, World]]:
    """pipeline/stage.py: serve()."""
    def become(at: str, *say: str, heard: bool = True) -> World:
        down = () if at == "exited" else p.down[1:] if heard else p.down
        return w._replace(procs=put(w.procs, i, Proc(at, (*p.up, *say), down)))

    head = p.down[0] if p.down else ""
    match p.at, head:
        case "boot", _:
            yield f"stage {i} says hello", become("greeted", "hello", heard=False)
        case ("greeted" | "ready", "cancel"):
            yield f"stage {i} ends before it runs", become("exited", "ended")
        case "greeted", "configure":
            yield f"stage {i} is ready", become("ready", "ready")
        case "ready", "start":
            yield f"stage {i} runs", become("run", "running")
        case "run", "cancel":
            yield f"stage {i} drains", become("drain")
        case "drain", _:
            yield f"stage {i} is drained", become("exited", "ended")
        case ("greeted" | "ready" | "run", word) if word:
            raise Broken(f"stage {i} is told {word} while {p.at}")


def hearing(w: World, r: Rules) -> Iterator[tuple[str, World]]:
    """Session._hear() and _reap(): words first, then the end of the process."""
    for i, p in enumerate(w.procs):
        was = w.view[i]
        if was is State.GONE:
            continue
        if p.up:
            word, rest = p.up[0], p._replace(up=p.up[1:])
            if not r.cancelled_hears_late_words and was is State.CANCELLED and word not in ("ended", "failed"):
                raise Broken(f"{word} from stage {i} while cancelled")
            after = MOVES[was].get(WORDS[word])
            if after is None:
                raise Broken(f"{word} from stage {i} while {was.name}")
            unasked = after is State.ENDED and was is not State.CANCELLED
            yield f"hear {word} of {i}", w._replace(view=put(w.view, i, after), procs=put(w.procs, i, rest),
                                                    failed=w.failed or unasked)
        elif p.at == "exited":
            sudden = was not in (State.CANCELLED, State.ENDED)
            yield f"reap {i}", w._replace(view=put(w.view, i, State.GONE), failed=w.failed or sudden)


def supervising(w: World, r: Rules) -> Iterator[tuple[str, World]]:
    """Session.start() and stop(): what the supervisor does when it does not read."""
    kind = w.phase[0]
    if kind in ("hello", "ready", "start", "up") and w.failed:
        yield "give up", cancel(w, tuple(range(N)), ("all",))
        return
    if kind in ("hello", "ready", "start") and w.ending:
        yield "user is heard in start-up", cancel(w, tuple(range(N)), ("all",))
        return
    waiting_for = {"hello": State.GREETED, "ready": State.READY}.get(kind)
    if waiting_for is not None:
        if all(v is waiting_for for v in w.view):
            if kind == "hello":
                for i in r.start_order:
                    w = tell(w, i, "configure")._replace(view=put(w.view, i, State.CONFIGURED))
                yield "configure all", w._replace(phase=("ready",))
            else:
                yield "all are ready", start(w, 0, r)
        elif r.deadlines:
            yield f"no {waiting_for.name} in time", w._replace(failed=True)
    elif kind == "start":
        n = w.phase[1]
        if w.view[r.start_order[n]] is State.RUNNING:
            yield "next", start(w, n + 1, r) if n + 1 < N else w._replace(phase=("up",))
        elif r.deadlines:
            yield "not running in time", w._replace(failed=True)
    elif kind == "up" and w.ending:
        yield "orderly end", orderly(w, 0, r)
    elif kind in ("one", "all"):
        yield from ending(w, r)


def start(w: World, n: int, r: Rules) -> World:
    i = r.start_order[n]
    if any(v is not State.RUNNING for v in w.view[i + 1:]):
        raise Broken(f"Start to stage {i} before those it feeds run")
    if any(v in (State.SPAWNED, State.GREETED, State.CONFIGURED) for v in w.view):
        raise Broken(f"Start to stage {i} before all are ready")
    return tell(w, i, "start")._replace(phase=("start", n), view=put(w.view, i, State.STARTING))


def orderly(w: World, n: int, r: Rules) -> World:
    """Cancel the n-th stage, or, after the last, whatever is left."""
    if n == N:
        return cancel(w, tuple(range(N)), ("all",))
    i = r.cancel_order[n]
    if any(v is not State.GONE for v in w.view[:i]):
        raise Broken(f"Cancel to stage {i} while what feeds it lives")
    return cancel(w, (i,), ("one", n))


def cancel(w: World, which: tuple[int, ...], phase: tuple[object, ...]) -> World:
    for i in which:
        if w.view[i] not in (State.GONE, State.ENDED):
            w = tell(w, i, "cancel")._replace(view=put(w.view, i, State.CANCELLED))
    return w._replace(phase=(*phase, "drain"))


def ending(w: World, r: Rules) -> Iterator[tuple[str, World]]:
    """Session._cancel(): wait, SIGTERM, wait, SIGKILL, wait."""
    *phase, step = w.phase
    which = range(N) if phase[0] == "all" else (r.cancel_order[phase[1]],)
    left = [i for i in which if alive(w, i)]
    if not left:
        yield "gone", w._replace(phase=("over",)) if phase[0] == "all" else orderly(w, phase[1] + 1, r)
    elif step == "drain" and r.deadlines:
        procs = w.procs
        for i in left:
            if procs[i].at not in ("hung", "exited"):  # Terminated is raised; what was said before stays said
                late = ("ended",)
                procs = put(procs, i, Proc("exited", procs[i].up + late))
        yield "SIGTERM", w._replace(phase=(*phase, "term"), procs=procs)
    elif step == "term" and r.deadlines and r.sigkill:
        procs = w.procs
        for i in left:
            procs = put(procs, i, procs[i]._replace(at="exited", down=()))
        yield "SIGKILL", w._replace(phase=(*phase, "kill"), procs=procs)


def over(w: World) -> bool:
    """Nothing runs, and the supervisor has reaped all it could."""
    return all(p.at == "exited" for p in w.procs) and (
        w.phase == ("dead",) or w.phase == ("over",) and all(v is State.GONE for v in w.view))


def walk(r: Rules) -> dict[World, tuple[World, ...]]:
    """The graph of all reachable states. Raises Broken."""
    graph: dict[World, tuple[World, ...]] = {}
    todo = [World()]
    while todo:
        w = todo.pop()
        if w in graph:
            continue
        successors = tuple(s for _, s in steps(w, r))
        graph[w] = successors
        if not successors and not over(w):
            raise Broken(f"no way on from {w}")
        todo += [s for s in successors if s not in graph]
    return graph


def assert_no_cycle(graph: dict[World, tuple[World, ...]]) -> None:
    """Depth-first, with a stack of our own: the chains are longer than Python's recursion may be."""
    done: set[World] = set()
    for root in graph:
        if root in done:
            continue
        path: dict[World, Iterator[World]] = {root: iter(graph[root])}
        while path:
            w, rest = next(reversed(path.items()))
            following = next((s for s in rest if s not in done), None)
            if following is None:
                done.add(w)
                del path[w]
            elif following in path:
                raise Broken(f"endless: {following}")
            else:
                path[following] = iter(graph[following])


@pytest.fixture(scope="module")
def graph() -> dict[World, tuple[World, ...]]:
    return walk(Rules())


def test_every_schedule_ends_with_nothing_left(graph: dict[World, tuple[World, ...]]) -> None:
    assert_no_cycle(graph)
    assert all(over(w) for w, successors in graph.items() if not successors)


def test_a_step_is_possible_without_luck(graph: dict[World, tuple[World, ...]]) -> None:
    """No state waits for a fault to get on; a running session waits for the user only."""
    for w in graph:
        own = [name for name, _ in steps(w, Rules()) if not name.startswith("!")]
        if not own and not over(w):
            assert w.phase == ("up",) and not w.failed and not w.ending, w


def test_the_walk_saw_all_phases_and_faults(graph: dict[World, tuple[World, ...]]) -> None:
    assert {w.phase[0] for w in graph} == {"hello", "ready", "start", "up", "one", "all", "over", "dead"}
    assert {p.at for w in graph for p in w.procs} == {"boot", "greeted", "ready", "run", "drain", "hung", "exited"}
    assert {v for w in graph for v in w.view} == set(State) - {State.VACANT}  # of successors: tests/e2e/test_seats.py
    assert any(w.phase == ("over",) and not w.failed and w.faults == 0 for w in graph)


def test_the_models_orders_are_the_sessions() -> None:
    """Rows of the real topology: starting backwards and cancelling forwards keeps both order rules."""
    topo = TOPOLOGY.only(frozenset({Feature.NIC1}))
    for ring in topo.rings:
        if not ring.notices:  # what is said about flows against the order of data need not be heard at either end
            assert topo.row(ring.producer) < topo.row(ring.consumer)
    assert Rules().start_order == tuple(range(N))[::-1] and Rules().cancel_order == tuple(range(N))


@pytest.mark.parametrize(("rules", "notices"), [
    (Rules(start_order=(0, 1, 2), max_faults=0), "Start to stage 0 before"),
    (Rules(start_order=(2, 0, 1), max_faults=0), "Start to stage 0 before"),
    (Rules(cancel_order=(2, 1, 0), max_faults=0), "Cancel to stage 2 while"),
    (Rules(deadlines=False, max_faults=1), "no way on"),
    (Rules(sigkill=False, max_faults=1), "no way on"),
    (Rules(die_with_supervisor=False, max_faults=1), "no way on"),
    (Rules(cancelled_hears_late_words=False, max_faults=0), "while cancelled"),
], ids=["sources first", "middle last", "sinks cancelled first", "no deadlines", "no SIGKILL", "orphans live on",
        "late words refused"])
def test_a_broken_rule_is_noticed(rules: Rules, notices: str) -> None:
    with pytest.raises(Broken, match=notices):
        walk(rules)
