"""The table of rules, made from the tests: what each shows, in which RFC it stands, and how the last run ended.

    ./tools/conformance                  run all that the table lists and write docs/conformance.md
    ./tools/conformance tests/wire       run these; the others keep the result the document has

A rule is a file in tests/conformance/tcp, or a test function whose docstring cites an RFC or an invariant of the design
(I1 to I7) or that covers a fault (tests/faults/faults.py). Nothing is listed twice by hand: this file only reads.
As a pytest plugin (-p tests.conformance.table --conformance-table FILE) it notes results and writes FILE at the end.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance.script import load
from tests.faults.faults import FAULTS, PARTS, WAITS

REPO = Path(__file__).resolve().parents[2]
DOCUMENT = REPO / "docs" / "conformance.md"
CITATION = re.compile(r"RFC \d+(?: (?:\d+(?:\.\d+)*|[A-Z]\.\d+)(?: REQ-\d+\w?)?| REQ-\d+\w?)?|\bI[1-7]\b")


@dataclass(frozen=True)
class Entry:
    """One row."""

    rule: str
    cites: str
    faults: tuple[int, ...]
    test: str  # node id without parameters; a rule file's path


_TERMS = ("syn ack acks fin rst mss udp icmp tcp ttl mtu dns dhcp ip isn sack rtt rto arp edns tc aaaa "
          "arcount mac opt soa").split()


def _words(name: str) -> str:
    """A test's name as a sentence."""
    text = re.sub(r"^test_(fault_\d+_|req_\d+_)?", "", name).replace("_", " ")
    for term in _TERMS:
        text = re.sub(rf"\b{term}\b", term.upper().replace("ACKS", "ACKs"), text)
    text = text.replace("SYN ACK", "SYN-ACK")
    text = re.sub(r"\b(rfc)(\d+)", r"RFC \2", text)
    return text[0].upper() + text[1:]


def _marked(node: ast.FunctionDef) -> set[int]:
    """Numbers of @pytest.mark.fault(...) and of the name."""
    found = {int(n) for n in re.findall(r"^test_fault_(\d+)_", node.name)}
    for d in node.decorator_list:
        if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.fault":
            found |= {ast.literal_eval(a) for a in d.args}
    return found


def functions() -> Iterator[Entry]:
    """Every test function that shows a rule."""
    for path in sorted((REPO / "tests").rglob("test_*.py")):
        where = path.relative_to(REPO).as_posix()
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            cites = list(dict.fromkeys(CITATION.findall(ast.get_docstring(node) or "")))
            faults = _marked(node)
            if cites or faults:
                yield Entry(_words(node.name), ", ".join(cites), tuple(sorted(faults)), f"{where}::{node.name}")


def files() -> Iterator[Entry]:
    """Every rule file."""
    for path in sorted((REPO / "tests" / "conformance" / "tcp").glob("*.rule")):
        rule = load(path)
        yield Entry(rule.text, rule.rfc, rule.faults, path.relative_to(REPO).as_posix())


def entries() -> list[Entry]:
    return [*files(), *functions()]


def render(results: dict[str, str]) -> str:
    """The document. results: test -> how it ended; what is missing was not run."""
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def stands(e: Entry) -> str:
        return f"fault {', '.join(map(str, e.faults))}"

    def rows(chosen: list[Entry]) -> Iterator[str]:
        yield "| rule | where it stands | test | result |"
        yield "|---|---|---|---|"
        for e in chosen:
            path, _, name = e.test.partition("::")
            label = name or Path(path).stem
            yield f"| {cell(e.rule)} | {cell(e.cites) or stands(e)} | [{label}](../{path}) | {results.get(e.test, 'not run')} |"

    listed = entries()
    from_files = [e for e in listed if e.test.endswith(".rule")]
    by_test = [e for e in listed if not e.test.endswith(".rule")]
    out = ["# Conformance", "",
           "Rule, test and the result of the last run. Made from the tests by `tools/conformance`; do not edit.", "",
           f"## TCP, a file for each rule ({len(from_files)})", "",
           "Each runs against egress alone, with a clock that the rule moves, and through the whole pipeline where",
           "time is not the matter. The language is described in [script.py](../tests/conformance/script.py).", "",
           *rows(from_files), "",
           f"## Other tests that show a rule ({len(by_test)})", "", *rows(by_test), "",
           f"## Known faults of such stacks ({len(FAULTS)})", "",
           "What went wrong elsewhere, and the tests that would fail if it went wrong here.", "",
           "| no. | fault | tests | result |", "|---|---|---|---|"]
    for number, text in FAULTS.items():
        covering = [e for e in listed if number in e.faults]
        ended = sorted({results.get(e.test, "not run") for e in covering})
        parts = [e.test.partition("::") for e in covering]
        names = ", ".join(f"[{name or Path(path).stem}](../{path})" for path, _, name in parts)
        note = WAITS.get(number) or PARTS.get(number)
        result = ", ".join(ended) if covering else "waits"
        out.append(f"| {number} | {cell(text)} | {names or '-'}{f' ({note})' if note else ''} | {result} |")
    return "\n".join(out) + "\n"


def earlier(document: Path) -> dict[str, str]:
    """The results that a document tells."""
    if not document.exists():
        return {}
    row = re.compile(r"\[(\w+)\]\(\.\./([\w/.]+)\) \| ([a-z ]+) \|$", re.M)
    return {path if path.endswith(".rule") else f"{path}::{name}": result
            for name, path, result in row.findall(document.read_text())}


# -- pytest plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", metavar="FILE", help="write rule, test and result to this file")


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("--conformance-table")
    if target and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(Path(target)), "conformance-collector")


_WORST = ("passed", "skipped", "failed")


class _Collector:
    """Notes how each test ended, the worst of its parameters, and writes the table."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        node = re.split(r"[\[@]", report.nodeid)[0]  # without parameters and xdist's group
        tests = [node]
        if node.endswith(("test_tcp_rules.py::test_stage", "test_tcp_rules.py::test_wire")):
            name = re.split(r"[\[\]]", report.nodeid)[1]
            tests = [f"tests/conformance/tcp/{name}.rule"]
        for test in tests:
            before = self._ended.get(test, "passed")
            self._ended[test] = max(before, report.outcome, key=_WORST.index)

    def pytest_sessionfinish(self) -> None:
        self._target.write_text(render(earlier(self._target) | self._ended))
