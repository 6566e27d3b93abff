"""Build shm._dataplane: every csrc/*.c behind cffi's API mode, stable ABI.

Declarations for Python are the parts of csrc/*.h between the two CFFI marks; each header's include lines give
the order. `python -m shm.build_dataplane` builds in place, only what changed, with warnings as errors; setup.py
uses builder() through cffi_modules for wheels. $RINGNET_CFLAGS is added to our files' flags, like -O0 for a debugger.
"""
from __future__ import annotations

import fcntl
import hashlib
import keyword
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
MODULE = "shm._dataplane"
TARGET = ROOT / "shm" / "_dataplane.abi3.so"
STUB = ROOT / "shm" / "_dataplane.pyi"
OBJECTS = ROOT / "build" / "dataplane"

BASE_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-fno-strict-aliasing", "-fvisibility=hidden"]
STRICT_FLAGS = ["-Wall", "-Wextra", "-Werror"]  # our files; not the wrapper that cffi writes, not in wheels

# Declarations of what egress leaves to a successor, by which two builds know that they mean the same (csrc/egress_estate.c).
ESTATE = "egress_estate.c"
ESTATE_HEADERS = ("rn_flow.h", "rn_promote.h", "egress.h", "tcp_internal.h", "inbound.h", "proxy_handshake.h", "proxy_internal.h")
ESTATE_RECORDS = (ESTATE, "tcp_estate.c", "proxy_estate.c")  # of these the structs

_MARKED = re.compile(r"/\* CFFI BEGIN \*/\n(.*?)/\* CFFI END \*/", re.DOTALL)
_INCLUDE = re.compile(r'^#include "([^"]+\.h)"', re.MULTILINE)


def headers() -> list[Path]:
    """Headers that declare something for Python, each after those it includes; rn_*.h first."""
    found = sorted(CSRC.glob("*.h"), key=lambda p: (not p.name.startswith("rn_"), p.name))
    order: list[Path] = []
    seen: set[Path] = set()

    def visit(path: Path) -> None:
        if path in seen or not path.exists():
            return
        seen.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            visit(CSRC / name)
        order.append(path)

    for path in found:
        visit(path)
    return [p for p in order if _MARKED.search(p.read_text())]


def declarations() -> str:
    """The text for FFI.cdef(). Raises ValueError if a mark has no partner."""
    parts = []
    for path in headers():
        text = path.read_text()
        blocks = _MARKED.findall(text)
        if text.count("/* CFFI BEGIN */") != len(blocks) or text.count("/* CFFI END */") != len(blocks):
            raise ValueError(f"{path.name}: a CFFI mark has no partner")
        parts += [f"/* {path.name} */", *blocks]
    return "\n".join(parts)


def sources() -> list[Path]:
    return sorted(CSRC.glob("*.c"))


_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(r"^struct \w+ \{.*?^\};", re.DOTALL | re.MULTILINE)
_PROTOTYPE = re.compile(r"^(?:static inline )?[a-z][\w ]*[ *]\w+\([^{};]*\);", re.MULTILINE)


def estate_layout(read: Callable[[str], str] = lambda name: (CSRC / name).read_text()) -> int:
    """64 bits of the declarations: other structs, enums or defines make another number, comments and prototypes do not."""
    digest = hashlib.sha256()
    for name in ESTATE_HEADERS:
        digest.update(" ".join(_PROTOTYPE.sub("", _COMMENT.sub(" ", read(name))).split()).encode())
    for name in ESTATE_RECORDS:
        for struct in _STRUCT.findall(_COMMENT.sub(" ", read(name))):
            digest.update(" ".join(struct.split()).encode())
    return int.from_bytes(digest.digest()[:8])


def builder() -> FFI:
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source(
        MODULE,
        "\n".join(f'#include "{p.name}"' for p in headers()),
        sources=[os.path.relpath(p, ROOT) for p in sources()],  # setuptools wants them relative to setup.py
        include_dirs=["csrc"],
        depends=[os.path.relpath(p, ROOT) for p in [*sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("*.def"))]],
        extra_compile_args=[*BASE_FLAGS, _layout_flag()],
        py_limited_api=True,
    )
    return ffi


def _layout_flag() -> str:
    return f"-DRN_ESTATE_LAYOUT={estate_layout():#x}ull"


def _outdated(target: Path, inputs: list[Path]) -> bool:
    if not target.exists():
        return True
    made = target.stat().st_mtime_ns
    return any(not p.exists() or p.stat().st_mtime_ns > made for p in inputs)


def _depends(obj: Path) -> list[Path]:
    """Files an object was made from, out of the compiler's .d file; the object itself if there is none."""
    listing = obj.with_suffix(".d")
    if not listing.exists():
        return [obj.with_suffix(".missing")]
    words = listing.read_text().replace("\\\n", " ").split()
    return [Path(w) for w in words if not w.endswith(":")]


def _compile(src: Path, flags: list[str]) -> Path:
    obj = OBJECTS / (src.stem + ".o")
    stamp = OBJECTS / (src.stem + ".cmd")
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    command = [*compiler, *flags, "-fPIC", f"-I{CSRC}", "-MMD", "-c", str(src), "-o", str(obj)]
    text = shlex.join(command)
    if not _outdated(obj, _depends(obj)) and stamp.exists() and stamp.read_text() == text:
        return obj
    started = time.time_ns()
    subprocess.run(command, check=True)
    os.utime(obj, ns=(started, started))  # a source saved while the compiler ran counts as newer
    stamp.write_text(text)
    return obj


def build(*, verbose: bool = False) -> Path:
    """Bring shm/_dataplane.abi3.so up to date. Raises subprocess.CalledProcessError if the compiler fails."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / ".lock").open("w") as lock:  # several test workers may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        extra = shlex.split(os.environ.get("RINGNET_CFLAGS", ""))
        flags, said = OBJECTS / "flags", shlex.join(extra)
        everything = [*CSRC.glob("*.[ch]"), *CSRC.glob("*.def"), Path(__file__), CSRC]
        if not _outdated(TARGET, everything) and (flags.read_text() if flags.exists() else "") == said:
            return TARGET
        started = time.time_ns()
        wrapper = OBJECTS / "_dataplane.c"
        builder().emit_c_code(str(wrapper))  # rewritten only if it changes
        python = [f"-I{sysconfig.get_path('include')}", "-Wall", "-Wno-unused"]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            jobs = [pool.submit(_compile, wrapper, [*BASE_FLAGS, *python])]
            jobs += [pool.submit(_compile, src, [*BASE_FLAGS, *STRICT_FLAGS, *([_layout_flag()] if src.name == ESTATE else []),
                                                 *extra]) for src in sources()]
        objects = [str(job.result()) for job in jobs]
        fresh = TARGET.with_suffix(".new")
        link = [*shlex.split(os.environ.get("CC", "gcc")), "-shared", *objects, "-o", str(fresh)]
        subprocess.run(link, check=True)
        os.utime(fresh, ns=(started, started))
        flags.write_text(said)
        fresh.replace(TARGET)  # a process that has the old one mapped keeps it
        if verbose:
            print(f"built {TARGET.relative_to(ROOT)}")
    return TARGET


_STUB_HEAD = '''"""Types of the compiled module. `python -m shm.build_dataplane` writes this file: do not edit."""
from typing import Any

CData = Any  # a pointer, array or struct; cffi checks its C type when it is passed


class FFI:
    NULL: CData
    errno: int
    CData: type
    error: type[Exception]
    def new(self, cdecl: str, init: Any = ...) -> CData: ...
    def gc(self, cdata: CData, destructor: Any, size: int = ...) -> CData: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: CData, size: int = ...) -> Any: ...
    def from_buffer(self, cdecl: Any, python_buffer: Any = ..., require_writable: bool = ...) -> CData: ...
    def cast(self, cdecl: str, value: Any) -> CData: ...
    def sizeof(self, cdecl: Any) -> int: ...
    def offsetof(self, cdecl: str, *fields: Any) -> int: ...
    def typeof(self, cdecl: Any) -> Any: ...
    def addressof(self, cdata: CData, *fields: Any) -> CData: ...
    def memmove(self, dest: Any, src: Any, n: int) -> None: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...


class Lib:
'''


def stub() -> str:
    """Text of shm/_dataplane.pyi, from the module as it is built."""
    from shm._dataplane import ffi, lib

    names = {m[1]: [w.split("[")[0].split()[-1].strip("*") for w in m[2].split(",")]
             for m in re.finditer(r"\b(\w+)\(([^()]*)\);", declarations())}

    def word(ctype: Any) -> str:
        match ctype.kind:
            case "primitive":
                return {"float": "float", "double": "float", "_Bool": "bool", "char": "bytes"}.get(ctype.cname, "int")
            case "enum":
                return "int"
            case "void":
                return "None"
        return "CData"

    lines = []
    for name in sorted(dir(lib)):
        what = getattr(lib, name)
        if isinstance(what, int):
            lines.append(f"    {name}: int")
            continue
        ctype = ffi.typeof(what)
        args = [f"{arg}{'_' * keyword.iskeyword(arg)}: {word(t)}" for arg, t in zip(names[name], ctype.args, strict=False)]
        lines.append(f"    def {name}({', '.join(['self', *args, '/'])}) -> {word(ctype.result)}: ...")
    return _STUB_HEAD + "\n".join(lines) + "\n\n\nffi: FFI\nlib: Lib\n"


if __name__ == "__main__":
    try:
        build(verbose=True)
        text = stub()
        if not STUB.exists() or STUB.read_text() != text:
            STUB.write_text(text)
    except subprocess.CalledProcessError as err:
        sys.exit(f"build failed: {shlex.join(map(str, err.cmd))}")
