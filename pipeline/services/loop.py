"""A small event loop: descriptors, deadlines, one thread.

services waits for a doorbell, a control socket, hundreds of resolver sockets and their timeouts at once.
asyncio would do, but its clock and its waiting cannot be injected simply, and its transports buffer without
bounds. The protocol files see only this class; tests give it a clock of their own.
"""
from __future__ import annotations

import heapq
import itertools
import selectors
from collections.abc import Callable

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """One deadline. cancel() may be called any number of times, also from its own callback."""

    __slots__ = ("when", "callback")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Callbacks for descriptors and deadlines. `clock` gives seconds; only differences matter."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()  # equal deadlines fire in the order they were set

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call back with the events that are ready (READ, WRITE). Watching again changes both."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Stop; harmless if it was not watched. Do it before the descriptor is closed."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.clock() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def deadline(self) -> float | None:
        """Clock value of the next live timer."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        # Cancelled timers deeper in the heap go when they come up; their number is bounded by the rate of
        # queries times the longest timeout, so rebuild only if they outnumber the live ones by far.
        if len(self._timers) > 4096:
            live = [t for t in self._timers if t[2].callback is not None]
            if len(live) * 2 < len(self._timers):
                heapq.heapify(live)
                self._timers = live
        return self._timers[0][0] if self._timers else None

    def step(self, max_wait: float | None = None) -> int:
        """Wait for events or the next deadline, at most `max_wait` seconds; returns callbacks run."""
        deadline = self.deadline()
        wait = max_wait
        if deadline is not None:
            due = max(0.0, deadline - self.clock())
            wait = due if wait is None else min(wait, due)
        ran = 0
        for key, events in self._selector.select(wait):
            # An earlier callback of this round may have closed this descriptor, or closed it and opened
            # another under the same number: then the registration is a different one.
            if self._selector.get_map().get(key.fd) is not key:
                continue
            key.data(events)
            ran += 1
        now = self.clock()
        while (deadline := self.deadline()) is not None and deadline <= now:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
                ran += 1
        return ran

    def close(self) -> None:
        self._selector.close()
        self._timers.clear()
