"""Fixtures of the scripted-guest tests, shared (tests/wire/conftest.py)."""
from tests.wire.conftest import _pipelines, make_wire, wire

__all__ = ["_pipelines", "make_wire", "wire"]
