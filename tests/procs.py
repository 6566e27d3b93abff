"""Second processes for tests: multiprocess with an explicit spawn context, and nothing left behind."""
from __future__ import annotations

import contextlib
import shutil
import subprocess
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


def fixed_layout() -> list[str]:
    """Words to put before a command built with -fsanitize=thread: gcc 12's runtime wants the usual address
    layout, and kernels that randomise more bits break it. Empty where a container forbids personality(2)."""
    setarch = shutil.which("setarch")
    if setarch and subprocess.run([setarch, "-R", "true"], capture_output=True).returncode == 0:
        return [setarch, "-R"]
    return []
