"""What Python and C must agree on: numbers, names, types of the compiled module."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pipeline.topology import TOPOLOGY, Role
from shm import build_dataplane
from shm._dataplane import ffi, lib
from shm.cell import State
from shm.flows import FlowState
from shm.memory import NAME_MAX, new_segment

ROOT = Path(build_dataplane.__file__).resolve().parent.parent


def c_enum(prefix: str) -> dict[str, int]:
    return {n.removeprefix(prefix): getattr(lib, n) for n in dir(lib) if n.startswith(prefix)}


def test_roles_are_those_of_the_topology():
    assert {r.name: r.value for r in Role} == c_enum("RN_ROLE_")
    assert len(Role) == lib.RN_NROLES


def test_states_are_complete():
    assert {s.name: s.value for s in State} == c_enum("RN_ST_")
    assert {s.name: s.value for s in FlowState} == c_enum("RN_FL_")


def test_topology_fits_the_layout():
    assert max(r.slots for r in TOPOLOGY.rings) <= lib.RN_RING_SLOTS_MAX
    rows = re.search(r"#define RN_STAGES_MAX (\d+)u", (ROOT / "csrc/rn_layout.h").read_text())
    assert rows and len(TOPOLOGY.stages) <= int(rows[1])
    for stage in TOPOLOGY.stages:
        inputs = re.search(r"#define RN_INPUTS_MAX (\d+)", (ROOT / "csrc/rn_stage.h").read_text())
        assert inputs and len(TOPOLOGY.inputs(stage.name)) <= int(inputs[1])


def test_descriptor_is_sixteen_bytes():
    assert ffi.sizeof("struct rn_desc") == 16
    assert [ffi.offsetof("struct rn_desc", f) for f in ("off", "len", "flags", "gen")] == [0, 8, 12, 14]


def test_structs_with_atomics_are_opaque():
    for name in ("rn_ring_tx", "rn_ring_rx", "rn_pool", "rn_stage"):
        with pytest.raises(ffi.error):
            ffi.sizeof(f"struct {name}")


def test_every_header_is_declared_after_what_it_includes():
    order = [p.name for p in build_dataplane.headers()]
    for path in build_dataplane.headers():
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            if name in order:
                assert order.index(name) < order.index(path.name)


def test_a_mark_without_a_partner_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "x.h").write_text("/* CFFI BEGIN */\nint f(void);\n/* CFFI END */\n/* CFFI BEGIN */\n")
    monkeypatch.setattr(build_dataplane, "CSRC", tmp_path)
    with pytest.raises(ValueError, match="x.h"):
        build_dataplane.declarations()


def test_the_stub_is_that_of_the_module():
    """`python -m shm.build_dataplane` writes it; a header was changed without building, if this fails."""
    assert build_dataplane.STUB.read_text() == build_dataplane.stub()


def test_everything_python_calls_exists():
    used: dict[str, str] = {}
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "shm").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lib":
                used[node.attr] = path.name
    assert used
    assert {n: where for n, where in used.items() if not hasattr(lib, n)} == {}


def test_names_of_segments_are_short_enough():
    with pytest.raises(ValueError, match=f"over {NAME_MAX} characters"):
        new_segment("a-name-that-is-far-too-long", 4096)
    with pytest.raises(ValueError, match="size 0"):
        new_segment("x", 0)


def test_map_refuses_more_than_the_object_has():
    import os

    fd = new_segment("x", 4096)
    try:
        assert lib.rn_map(fd, 8192, 0) == ffi.NULL
        assert lib.rn_map(fd, 0, 0) == ffi.NULL
        assert lib.rn_map(-1, 4096, 0) == ffi.NULL
        mem = lib.rn_map(fd, 4096, 1)
        assert mem != ffi.NULL
        lib.rn_unmap(mem, 4096)
    finally:
        os.close(fd)
