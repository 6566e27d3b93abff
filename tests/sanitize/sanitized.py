"""The whole data plane under AddressSanitizer and UBSan, and tests run with it: what tools/sanitize calls.

    python -m tests.sanitize.sanitized [--tree DIR] [pytest arguments]

The checkout stays as it is: DIR (default build/sanitize) gets a copy of the sources, whose shm/_dataplane*.so is built with
the sanitizers, and the tests of the copy run from there, so that every stage process loads that one. The interpreter that runs
them is a program of ours around libpython (launcher.c), linked with the runtime: nothing has to be preloaded, so that what tests
and guests start besides (curl, a shell, QEMU) runs as ever, and one runtime writes all reports. Allocations are malloc's own
(PYTHONMALLOC); leaks are not looked for, as CPython leaves some at exit. A report ends the process that made it and is written
to a file, because a stage's stderr may go nowhere and a stage that died is started again; any such file is a failure, whatever
the tests said.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("pipeline", "shm", "csrc", "tests", "tools", "docs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
CC = "clang -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# What shows in minutes, end to end included; tools/sanitize without arguments runs LONG.
SHORT = ("tests/wire/test_tcp.py", "tests/wire/test_succession.py", "tests/unit/test_egress_flows.py", "tests/unit/test_link.py",
         "tests/unit/test_link_kinds.py", "tests/unit/test_gso.py", "tests/unit/test_reassembly.py",
         "tests/unit/test_services_stage.py", "tests/e2e/test_tcp_bulk.py::test_both_ways_at_once[1500-discard-8]",
         "tests/e2e/test_tcp_bulk.py::test_both_ways_at_once[65520-auto-8]", "tests/e2e/test_tcp_edges.py::test_reset_by_the_host",
         "tests/e2e/test_udp.py::test_echo_at_a_small_mtu", "tests/e2e/test_forwards.py::test_udp_echo_of_every_size",
         "tests/e2e/test_dns.py::test_dig_asks_the_upstream")
# Not test_stage_loop.py: it builds its program with sanitizers of its own. Nor test_bench.py, which measures: its programs are
# linked with the data plane's objects, without the runtime.
LONG = ("tests/unit", "tests/property", "tests/wire", "tests/conformance", "tests/faults", "tests/e2e",
        "--ignore=tests/unit/test_stage_loop.py", "--ignore=tests/e2e/test_bench.py")


def prepare(tree: Path) -> None:
    """Copy what changed, and build. Raises CalledProcessError if the compiler fails."""
    tree.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", "_dataplane*.so", ".hypothesis", "sanitize" if tree.is_relative_to(ROOT) else "")
    for name in PARTS:
        source, to = ROOT / name, tree / name
        if source.is_dir():
            for old in [p for p in to.rglob("*") if p.is_file() and not (source / p.relative_to(to)).exists()
                        and "_dataplane" not in p.name and "__pycache__" not in p.parts]:
                old.unlink()
            shutil.copytree(source, to, ignore=ignore, dirs_exist_ok=True)  # keeps times: the build sees what is new
        elif source.exists():
            shutil.copy2(source, to)
    (tree / "build").mkdir(exist_ok=True)
    if not (guest := tree / "build" / "guest").is_symlink():  # the kernel of the tests' virtual machine
        guest.symlink_to(ROOT / "build" / "guest")
    # build() and not the command, which loads what it built: that needs the runtime.
    subprocess.run([sys.executable, "-c", "from shm.build_dataplane import build; build()"], cwd=tree, check=True,
                   env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CC": CC}, timeout=600)


def python(tree: Path) -> Path:
    """The interpreter with the sanitizers' runtime: a virtual environment that is ours but for bin/python."""
    there, ours = tree / "venv", Path(sys.prefix)
    (there / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy2(ours / "pyvenv.cfg", there)
    (there / "lib").unlink(missing_ok=True)
    (there / "lib").symlink_to(ours / "lib")
    variables = sysconfig.get_config_vars()
    program = there / "bin" / "python"
    subprocess.run([*CC.split(), f"-I{variables['INCLUDEPY']}", str(Path(__file__).with_name("launcher.c")), "-o", str(program),
                    f"-L{variables['LIBDIR']}", f"-Wl,-rpath,{variables['LIBDIR']}", f"-lpython{variables['LDVERSION']}"],
                   check=True, timeout=100)
    return program


def environment(reports: Path) -> dict[str, str]:
    options = f"abort_on_error=1:log_path={reports}/report"
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k not in ("PYTHONPATH", "CI", "RINGNET_LONG")} | {
        "RINGNET_SANITIZED": "1", "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{options}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:{options}"}


def run(tree: Path, *argv: str, timeout: float | None = None) -> tuple[int, str, list[str]]:
    """pytest in the tree: exit status, its last words, the sanitizers' reports."""
    reports = tree / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    reports.chmod(0o777)  # stages may run as somebody else
    done = subprocess.run([str(python(tree)), "-m", "pytest", "-p", "no:cacheprovider", "-q", *argv], cwd=tree,
                          env=environment(reports), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    return done.returncode, done.stdout, [p.read_text(errors="replace") for p in sorted(reports.iterdir())]


def main() -> int:
    p = argparse.ArgumentParser(prog="tools/sanitize", description="Build with the sanitizers and run tests with that.")
    p.add_argument("--tree", type=Path, default=ROOT / "build" / "sanitize")
    args, rest = p.parse_known_args()
    prepare(args.tree)
    status, text, reports = run(args.tree, *(rest or ("-n", "auto", *LONG)))
    print(text)
    for r in reports:
        print(r[:8000], file=sys.stderr)
    print(f"{len(reports)} sanitizer reports")
    return 1 if reports else status


if __name__ == "__main__":
    raise SystemExit(main())
