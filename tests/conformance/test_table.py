"""The committed table lists the rules that the tests have, no more and no fewer; and the rule language says no."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.script import Script, load
from tests.conformance.table import CITATION, DOCUMENT, entries, render
from tests.harness import EgressOnly


def without_results(text: str) -> str:
    return re.sub(r"\| [a-z ,]+ \|$", "|", text, flags=re.M)


def test_the_table_is_of_these_tests() -> None:
    assert without_results(DOCUMENT.read_text()) == without_results(render({})), "run tools/conformance"


def test_the_table_shows_no_failure() -> None:
    bad = re.compile(r"\| [a-z ,]*(failed|not run)[a-z ,]* \|$")
    assert [line for line in DOCUMENT.read_text().splitlines() if bad.search(line)] == []


def test_every_rule_is_stated_once_and_cites_where_it_stands() -> None:
    listed = [e for e in entries() if e.test.endswith(".rule")]
    assert len({e.rule for e in listed}) == len(listed)
    assert [e.test for e in listed if not CITATION.search(e.cites)] == []


@pytest.mark.parametrize(("text", "says"), [
    ("# rfc: RFC 1\nguest gets nothing\n", "no '# rule:'"),
    ("# rule: x\nguest gets nothing\n", "no '# rfc:'"),
    ("# rule: x\n# rfc: RFC 1\n", "no steps"),
    ("# rule: x\n# rule: y\n", "given twice"),
    ("# rule: x\n# rfc: RFC 1\nguest hopes\n", "no such step"),
    ("# rule: x\n# rfc: RFC 1\n# on: wire\nclock +1\n", "clock to move"),
    ("# rule: x\n# rfc: RFC 1\n# on: moon\nguest gets nothing\n", "on: moon"),
])
def test_a_rule_file_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.rule"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        load(path)


@pytest.mark.parametrize(("steps", "says"), [
    ("guest sends ACK seq=500 ack=900\nguest gets nothing", ":4: guest gets nothing"),
    ("guest sends ACK seq=500 ack=900\nguest gets RST seq=901", "seq=900"),
    ("guest sends ACK seq=500 ack=900\nguest gets RST ACK seq=900", "got RST"),
    ("guest sends RST seq=500\nguest gets RST", "nothing came"),
    ("guest sends ACK seq=500 colour=blue", "not understood"),
    ("connected\nhost writes 10\nguest gets ACK seq=1 len=10 after=0.2", "got PSH ACK"),
    ("connected\nhost writes 10\nguest gets ACK seq=1 len=10\nguest gets ACK seq=1 after=0.3", "got PSH ACK"),
    ("connected\nhost writes 10\nguest gets ACK seq=1 len=10\nguest gets ACK seq=1 after=0.1", "nothing came"),
    ("connected\nguest sends ACK seq=1 ack=1 len=10 junk\nhost reads 10", "wrong byte 0"),
    ("connected\nguest sends ACK seq=1 ack=1 len=10\nhost reads nothing", "data"),
    ("connected\nflow gone", "still in the table"),
    ("connected\ncounter tcp_syn +2", "went up by 1"),
])
def test_a_step_that_does_not_hold_fails_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str,
                                                      says: str) -> None:
    monkeypatch.setattr("tests.conformance.script.DEADLINE", 0.2)
    path = tmp_path / "x.rule"
    path.write_text(f"# rule: x\n# rfc: RFC 1\n{steps}\n")
    with EgressOnly() as guest, pytest.raises(AssertionError, match=re.escape(says)):
        Script(load(path), guest).run()
