"""Every interleaving of a few small threads over memory with store buffers.

A thread's stores wait in its buffer and reach memory later: in any order for different variables, in program
order for one variable, and a release store after all stores before it. A load sees the thread's own newest
waiting store, else memory. A sequentially consistent fence waits for an empty buffer; an exchange or
compare-and-swap waits for one and then works on memory. This allows what x86 allows (stores delayed past
loads) and, between stores, what arm64 allows. The kernel's eventfd counters are memory that is read and
written at once and, to be on the safe side, orders nothing.

A state without a next step in which a thread has not finished is a deadlock: here, a lost wake.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Regs = dict[str, int]
Value = int | Callable[[Regs], int]
Name = str | Callable[[Regs], str]


class Op(NamedTuple):
    kind: str
    args: tuple[Any, ...] = ()


def store(var: Name, value: Value, *, release: bool = False) -> Op:
    return Op("store", (var, value, release))


def load(reg: str, var: Name) -> Op:
    return Op("load", (reg, var))


def fence() -> Op:
    return Op("fence")


def exchange(reg: str, var: Name, value: Value) -> Op:
    return Op("exchange", (reg, var, value))


def update(reg: str, var: Name, new: Callable[[int], int]) -> Op:
    """Sequentially consistent read-modify-write: a compare-and-swap loop that has succeeded."""
    return Op("update", (reg, var, new))


def send(var: Name, value: Value) -> Op:
    """Written at once, by a mechanism the model is not about."""
    return Op("put", (var, value))


def bell_ring(var: Name) -> Op:
    """eventfd write: at once."""
    return Op("put", (var, 1))


def bell_quiet(var: Name) -> Op:
    """eventfd read: at once."""
    return Op("put", (var, 0))


def bell_wait(var: Name) -> Op:
    """epoll_wait: blocks until the counter is not zero, and leaves it."""
    return Op("wait", (var,))


def let(reg: str, value: Value) -> Op:
    return Op("let", (reg, value))


def choose(reg: str, values: Callable[[Regs], Sequence[int]]) -> Op:
    return Op("choose", (reg, values))


def label(name: str) -> Op:
    return Op("label", (name,))


def jump(where: str, when: Callable[[Regs], bool] = lambda _: True) -> Op:
    return Op("jump", (where, when))


def check(claim: Callable[[Regs], bool], text: str) -> Op:
    return Op("check", (claim, text))


class Deadlock(AssertionError):
    pass


class Wrong(AssertionError):
    pass


Buffer = tuple[tuple[str, int, bool], ...]  # oldest first: variable, value, release
Thread = tuple[int, tuple[tuple[str, int], ...], Buffer]  # next op, registers, buffer
State = tuple[tuple[tuple[str, int], ...], tuple[Thread, ...]]


def explore(memory: dict[str, int], programs: Sequence[Sequence[Op]], *, limit: int = 2_000_000) -> int:
    """Walk all reachable states; returns how many. Raises Deadlock, Wrong (a check failed), both with the way there."""
    code = []
    for program in programs:
        labels: dict[str, int] = {}
        ops: list[Op] = []
        for op in program:
            if op.kind == "label":
                labels[op.args[0]] = len(ops)
            else:
                ops.append(op)
        code.append([Op("jump", (labels[o.args[0]], o.args[1])) if o.kind == "jump" else o for o in ops])
    start: State = (tuple(sorted(memory.items())), tuple((0, (), ()) for _ in programs))
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    todo = [start]

    def way(state: State, last: str = "") -> str:
        steps = [last] if last else []
        while (link := came_from[state]) is not None:
            state, text = link
            steps.append(text)
        return "\n".join(reversed(steps))

    while todo:
        state = todo.pop()
        mem = dict(state[0])
        moved = False
        for i, (pc, regs, buf) in enumerate(state[1]):
            for text, new_mem, new in _steps(i, code[i], mem, pc, dict(regs), buf, lambda t, s=state: way(s, t)):
                moved = True
                threads = state[1][:i] + (new,) + state[1][i + 1:]
                nxt = (tuple(sorted(new_mem.items())), threads)
                if nxt not in came_from:
                    came_from[nxt] = (state, text)
                    if len(came_from) > limit:
                        raise RuntimeError(f"over {limit} states")
                    todo.append(nxt)
        if not moved and any(t[0] < len(code[i]) for i, t in enumerate(state[1])):
            raise Deadlock(f"lost wake; memory {mem}\n{way(state)}")
    return len(came_from)


def _steps(i: int, ops: Sequence[Op], mem: dict[str, int], pc: int, regs: Regs,
           buf: Buffer, way: Callable[[str], str]) -> list[tuple[str, dict[str, int], Thread]]:
    """What thread `i` can do next: (words, memory, thread) each."""
    found = []

    def val(v: Value) -> int:
        return v(regs) if callable(v) else v

    def name(n: Name) -> str:
        return n(regs) if callable(n) else n

    def frozen(r: Regs) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(r.items()))

    for k, (var, value, release) in enumerate(buf):  # a waiting store reaches memory
        if any(v == var for v, _, _ in buf[:k]) or (release and k):
            continue
        found.append((f"  [{i}] {var} = {value} reaches memory", mem | {var: value},
                      (pc, frozen(regs), buf[:k] + buf[k + 1:])))
    if pc >= len(ops):
        return found
    op = ops[pc]
    new_mem, new_buf, nxt = mem, buf, pc + 1
    said = op.kind
    match op.kind, op.args:
        case "store", (var, value, release):
            new_buf = (*buf, (name(var), val(value), release))
            said = f"store {new_buf[-1]}"
        case "load", (reg, var):
            waiting = [v for n, v, _ in buf if n == name(var)]
            regs = regs | {reg: waiting[-1] if waiting else mem[name(var)]}
            said = f"load {name(var)} -> {regs[reg]}"
        case "fence", ():
            if buf:
                return found
        case "exchange", (reg, var, value):
            if buf:
                return found
            new = val(value)
            regs = regs | {reg: mem[name(var)]}
            new_mem = mem | {name(var): new}
            said = f"exchange {name(var)}: {regs[reg]} -> {new}"
        case "update", (reg, var, fn):
            if buf:
                return found
            regs = regs | {reg: mem[name(var)]}
            new_mem = mem | {name(var): fn(regs[reg])}
            said = f"update {name(var)}: {regs[reg]} -> {new_mem[name(var)]}"
        case "put", (var, value):
            new_mem = mem | {name(var): val(value)}
            said = f"{name(var)} set to {new_mem[name(var)]}"
        case "wait", (var,):
            if not mem[name(var)]:
                return found
            said = f"woken by {name(var)}"
        case "let", (reg, value):
            regs = regs | {reg: val(value)}
        case "choose", (reg, values):
            for v in values(regs):
                found.append((f"[{i}] choose {reg} = {v}", mem, (nxt, frozen(regs | {reg: v}), buf)))
            return found
        case "jump", (where, when):
            if when(regs):
                nxt = where
        case "check", (claim, text):
            if not claim(regs):
                raise Wrong(f"{text}: {regs}\n{way(f'[{i}] check')}")
    found.append((f"[{i}] {said}", new_mem, (nxt, frozen(regs), new_buf)))
    return found
