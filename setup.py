"""The compiled part; everything else is in pyproject.toml."""
from setuptools import setup

setup(
    cffi_modules=["shm/build_dataplane.py:builder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
