"""Second processes for tests: multiprocess with an explicit spawn context, and nothing left behind."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from multiprocess import get_context, reduction, resource_tracker


class Fd(int):
    """A descriptor that survives pickling into a spawned process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_fd, (reduction.DupFd(int(self)),)


def _take_fd(sent: Any) -> Fd:
    return Fd(sent.detach())


@contextlib.contextmanager
def spawned(target: Callable[..., None], *args: Any) -> Iterator[Any]:
    """A process running target(*args); killed at the end if it still lives."""
    child = get_context("spawn").Process(target=target, args=args)
    child.start()
    try:
        yield child
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        child.close()
        # spawn starts a helper process that would live as long as this one
        resource_tracker._resource_tracker._stop()
