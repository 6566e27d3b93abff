"""Every fuzz target: how it is built, and run. tests/fuzz/test_fuzz.py runs each for a bounded time, tools/fuzz for long.

    python -m tests.fuzz.targets NAME [--minutes N] [--seed S] [--keep DIR] [-- FILE...]     what tools/fuzz calls

C targets are built with AddressSanitizer and UBSan; with clang they become libFuzzer programs if RINGNET_LIBFUZZER is set,
else fuzz_main.c drives them. FILE...: inputs to replay instead of a run.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SEEDS = HERE / "seeds"  # NAME-what: inputs that once failed, and some that reach far
C_TARGETS = ("egress", "reassembly", "link")  # fuzz_classify.c has a driver and a test of its own
PYTHON_TARGETS = ("dhcp", "dns", "control")
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer",
         "-fno-strict-aliasing", "-fno-sanitize-recover=all", f"-I{CSRC}", f"-I{HERE}"]
ENV = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1", "PATH": "/usr/bin:/bin"}


def objects(where: Path) -> list[Path]:
    """The data plane and the driver, compiled once for all C targets. Raises CalledProcessError."""
    def compile_(source: Path) -> Path:
        out = where / f"{source.stem}.o"
        subprocess.run(["gcc", *FLAGS, "-fsanitize=address,undefined", "-c", str(source), "-o", str(out)], check=True, timeout=600)
        return out

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_, [HERE / "fuzz_main.c", *sorted(CSRC.glob("*.c"))]))


def build(name: str, out: Path, parts: list[Path], *flags: str) -> Path:
    """Link a C target with objects(); raises CalledProcessError with the compiler's words on stderr."""
    subprocess.run(["gcc", *FLAGS, "-fsanitize=address,undefined", *flags, str(HERE / f"fuzz_{name}.c"), *map(str, parts),
                    "-o", str(out)], check=True, timeout=600)
    return out


def build_libfuzzer(name: str, out: Path) -> Path:
    sources = [HERE / f"fuzz_{name}.c", *sorted(CSRC.glob("*.c"))]
    subprocess.run(["clang", *FLAGS, "-DLIBFUZZER", "-fsanitize=fuzzer,address,undefined", *map(str, sources), "-o", str(out)],
                   check=True, timeout=600)
    return out


def seeds(name: str) -> list[Path]:
    return sorted(SEEDS.glob(f"{name}-*"))


def numbers(text: str) -> dict[str, int]:
    """The lines "name number" of a target's report."""
    return {n: int(v) for n, v in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}


def main() -> int:
    p = argparse.ArgumentParser(prog="tools/fuzz", description="Run one fuzz target for as long as you like.")
    p.add_argument("target", choices=[*C_TARGETS, *PYTHON_TARGETS])
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    p.add_argument("--first", type=int, default=0, help="run to begin with, of that seed")
    p.add_argument("--runs", type=int, default=0, help="so many runs instead of a time")
    p.add_argument("--keep", type=Path, default=Path.cwd(), help="where an input that fails is kept")
    p.add_argument("files", nargs="*", type=Path, help="inputs to replay (C targets)")
    args = p.parse_args()
    print(f"{args.target}: seed {args.seed}", flush=True)
    much = ["runs", str(args.runs)] if args.runs else ["seconds", str(args.minutes * 60)]
    if args.target in PYTHON_TARGETS:
        return subprocess.run([sys.executable, "-m", f"tests.fuzz.fuzz_{args.target}", "--seed", str(args.seed), "--first",
                               str(args.first), f"--{much[0]}", much[1]], cwd=ROOT).returncode
    with tempfile.TemporaryDirectory() as tmp:
        if os.environ.get("RINGNET_LIBFUZZER") and shutil.which("clang"):
            program = build_libfuzzer(args.target, Path(tmp) / "fuzz")
            corpus = Path(tmp) / "corpus"
            corpus.mkdir()
            for f in seeds(args.target):
                shutil.copy(f, corpus)
            argv = [str(program), f"-max_total_time={int(args.minutes * 60)}", f"-seed={args.seed}",
                    f"-artifact_prefix={args.keep}/", str(corpus)]
        else:
            program = build(args.target, Path(tmp) / "fuzz", objects(Path(tmp)))
            files = args.files or seeds(args.target)
            argv = [str(program), "-keep", str(args.keep), "-seed", str(args.seed), *map(str, files)]
            if not args.files:
                argv += [f"-{much[0]}", much[1], "-first", str(args.first)]
        return subprocess.run(argv, env=ENV | {k: v for k, v in os.environ.items() if k == "FUZZ_TRACE"}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
