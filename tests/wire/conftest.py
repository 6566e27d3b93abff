"""Pipelines for the scripted-guest tests (tests/harness.py).

Starting five processes takes longer than most of these tests, so a worker keeps one pipeline for each set of
settings. Tests that share it use ports of their own (fresh_port()); what a test left on the link is thrown away
before the next one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.harness import EgressOnly, Guest, Wire

_Cache = dict[tuple[tuple[str, Any], ...], Wire]


@pytest.fixture(scope="session")
def _pipelines() -> Iterator[_Cache]:
    cache: _Cache = {}
    try:
        yield cache
    finally:
        for w in cache.values():
            w.close()


@pytest.fixture
def wire(request: pytest.FixtureRequest, _pipelines: _Cache) -> Iterator[Wire]:
    """A running pipeline. Other settings: @pytest.mark.parametrize("wire", [{"peek": "discard"}], indirect=True)."""
    settings = getattr(request, "param", {})
    key = tuple(sorted(settings.items()))
    if key not in _pipelines:
        _pipelines[key] = Wire(**settings)
    w = _pipelines[key]
    w.flush()
    yield w
    if not w.session.poll(0):  # a stage died: that is this test's doing, and no later test's
        del _pipelines[key]
        w.close()
        result = w.session.result
        pytest.fail(f"the pipeline ended: {result.reason if result else 'no result'}")


@pytest.fixture
def make_wire() -> Iterator[Callable[..., Wire]]:
    """make_wire(key=value, ...): a pipeline of the test's own."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Wire(**settings))


@pytest.fixture(params=["stage", "pipeline"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """The same test twice: against egress alone, and through the whole pipeline."""
    if request.param == "pipeline":
        yield request.getfixturevalue("wire")
    else:
        with EgressOnly() as g:
            yield g
