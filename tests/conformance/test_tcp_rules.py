"""Every rule file under tcp/ against egress alone and through the whole pipeline (see script.py for the language)."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.script import Rule, Script, load
from tests.harness import EgressOnly, Guest

RULES = [load(path) for path in sorted((Path(__file__).parent / "tcp").glob("*.rule"))]


def run(rule: Rule, guest: Guest) -> None:
    """Fails with the file, line and step, not with a traceback of the interpreter."""
    try:
        Script(rule, guest).run()
    except AssertionError as e:
        pytest.fail(str(e), pytrace=False)


@pytest.mark.parametrize("rule", [r for r in RULES if "stage" in r.on], ids=lambda r: r.name)
def test_stage(rule: Rule) -> None:
    with EgressOnly(mtu=rule.mtu) as guest:
        run(rule, guest)


@pytest.mark.parametrize(("rule", "wire"), [pytest.param(r, {"mtu": r.mtu}, id=r.name) for r in RULES
                                            if "wire" in r.on], indirect=["wire"])
def test_wire(rule: Rule, wire) -> None:
    run(rule, wire)
