"""Python's own logging into one of our logs (pipeline/logs.py)."""
from __future__ import annotations

import logging

from pipeline.logs import Log


class Handler(logging.Handler):
    """Python's own logging into a Log: what a stage's modules say."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning" if record.levelno >= logging.WARNING else \
            "info" if record.levelno >= logging.INFO else "debug"
        part = record.name.removeprefix("ringnet.").removeprefix(self._log.stage).lstrip(".")
        self._log.write(level, f"{part}: {record.getMessage()}" if part else record.getMessage())


def take(log: Log) -> None:
    """What is said below the logger "ringnet" goes to this log, and nowhere else."""
    logger = logging.getLogger("ringnet")
    logger.handlers[:] = [Handler(log)]
    logger.propagate = False
