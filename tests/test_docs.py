"""The documents show what the code says: drawing, option table and metrics table are generated, and checked here."""
from __future__ import annotations

import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent


def load_draw() -> ModuleType:
    loader = SourceFileLoader("ringnet_draw", str(REPO / "tools" / "draw"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


draw = load_draw()


@pytest.mark.parametrize("name", sorted([*draw.PARTS, *draw.FILES]))
def test_generated_parts_are_current(name: str) -> None:
    assert (REPO / name).read_text() == draw.rendered(name), f"run tools/draw --update: {name} is out of date"


def test_the_metrics_table_has_every_counter() -> None:
    from shm._dataplane import ffi, lib

    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| (\w+) \| (.*) \|$", draw.metrics(), re.M)
    compiled = [tuple(ffi.string(get(i)).decode() for get in (lib.rn_counter_stage, lib.rn_counter_name,
                                                              lib.rn_counter_unit, lib.rn_counter_help))
                for i in range(lib.rn_ncounters())]
    assert rows == compiled


def test_every_ring_is_drawn_with_both_ends() -> None:
    from pipeline.topology import TOPOLOGY

    drawing = draw.text()
    assert drawing.count("├") == drawing.count("◀") - drawing.count("◀═") == \
        sum(not r.notices for r in TOPOLOGY.rings)
    for stage in TOPOLOGY.stages:
        assert stage.name in drawing and stage.does in drawing


def test_the_two_commands_come_first() -> None:
    """README: before anything else is explained, how to see it work and how to test it."""
    first_block = re.search(r"```\w*\n(.*?)```", (REPO / "README.md").read_text(), re.S)[1]
    assert "./tools/ringnet demo" in first_block and "./tools/test" in first_block


def test_links_between_documents_lead_somewhere() -> None:
    for document in [REPO / "README.md", *(REPO / "docs").glob("*.md"), *(REPO / "pipeline").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
