"""What goes to standard error: text and JSON lines, levels, and no more than is good (pipeline/logs.py)."""
from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Callable, Iterator

import pytest

from pipeline import logs
from pipeline.config import ConfigError, make
from pipeline.log_handler import Handler
from pipeline.logs import BURST, RATE, Log, parse_levels

STAGES = ("guest_tx", "egress")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[Log, Clock, Callable[[], list[str]]]]]:
    """made(**Log's arguments): a log, its clock, and what it wrote since last asked."""
    r, w = os.pipe()
    os.set_blocking(r, False)
    clock = Clock()

    def read() -> list[str]:
        try:
            return os.read(r, 1 << 20).decode().splitlines()
        except BlockingIOError:
            return []

    yield lambda stage="egress", **kw: (Log(stage, fd=w, clock=clock, **kw), clock, read)
    os.close(r)
    os.close(w)


def test_text(made: Callable) -> None:
    log, _, read = made()
    log.write("warning", "ping does not work")
    log.write("info", "not asked for")
    log.write("info", "the user must know", always=True)
    log.stage = "supervisor"
    log.write("error", "gone")
    assert read() == ["ringnet: egress: ping does not work", "ringnet: egress: the user must know", "ringnet: gone"]


def test_json_is_an_object_a_line_whatever_is_said(made: Callable) -> None:
    log, _, read = made(form="json", level="debug", session="web")
    for text in ("plain", 'quotes " and \\', "two\nlines", "\udcff not UTF-8", "ü"):
        log.write("debug", text)
        (line,) = read()
        said = json.loads(line)
        assert said | {"time": ""} == {"time": "", "level": "debug", "stage": "egress", "session": "web", "pid": os.getpid(),
                                       "text": text}
        at = datetime.datetime.fromisoformat(said["time"])
        assert abs((datetime.datetime.now(datetime.UTC) - at).total_seconds()) < 60


def test_a_flood_is_counted_and_errors_pass(made: Callable) -> None:
    log, clock, read = made(form="json")
    for n in range(int(BURST) + 500):
        log.write("warning", f"{n}")
    assert len(read()) == BURST
    log.write("error", "a fault")
    assert json.loads(read()[0])["text"] == "a fault"
    clock.now += 1.5 / RATE
    log.write("warning", "again")
    log.write("warning", "and again")
    (line,) = read()
    assert json.loads(line)["text"] == "again" and json.loads(line)["suppressed"] == 500
    clock.now += 1000
    for _ in range(int(BURST) + 1):
        log.write("warning", "x")
    assert len(read()) == BURST
    log.form = "text"
    clock.now += 1
    log.write("warning", "y")
    assert read() == ["ringnet: egress: y (1 lines before it were too many)"]


def test_pythons_own_logging_comes_through(made: Callable) -> None:
    log, _, read = made(stage="services", level="info")
    logger = logging.Logger("ringnet.services.dns")
    logger.addHandler(Handler(log))
    logger.warning("no server for %s", "x")
    logger.debug("details")
    logger.name = "ringnet.services"
    logger.critical("end")
    assert read() == ["ringnet: services: dns: no server for x", "ringnet: services: end"]


def test_a_stage_takes_its_settings_from_the_environment() -> None:
    logger = logging.getLogger("ringnet")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        log = logs.for_stage("egress", {"RINGNET_LOG_FORMAT": "json", "RINGNET_LOG_LEVEL": "debug", "RINGNET_LOG_SESSION": "s"})
        assert (log.form, log.level, log.session, logger.level) == ("json", "debug", "s", logging.DEBUG)
        logs.set_level(log, "error")
        assert not log.wants("warning") and logger.level == logging.ERROR
        assert logs.for_stage("egress", {}).level == "warning" and len(logger.handlers) == 1
    finally:
        logger.handlers[:], logger.level, logger.propagate = before


def test_levels() -> None:
    assert parse_levels(("info", "egress=debug", "supervisor=error"), STAGES) == {
        "": "info", "egress": "debug", "supervisor": "error"}
    for bad, why in (("loud", "loud is no level"), ("egress=", " is no level"), ("nobody=info", "no such stage")):
        with pytest.raises(ValueError, match=why):
            parse_levels((bad,), STAGES)


def test_the_options() -> None:
    assert make({}).log_levels() == {"": "warning"}
    assert make({"debug": True, "log-level": ["egress=error"]}).log_levels() == {"": "info", "egress": "error"}
    assert make({"quiet": True}).log_levels() == {"": "error"}
    with pytest.raises(ConfigError, match=r"^--log-level loud: loud is no level"):
        make({"log-level": ["loud"]})
    with pytest.raises(ConfigError, match=r"^--log-format"):
        make({"log-format": "xml"})
