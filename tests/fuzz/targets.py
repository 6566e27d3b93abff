"""Every fuzz target: how it is built, and run. tests/fuzz/test_fuzz.py runs each for a bounded time, tools/fuzz for long.

    python -m tests.fuzz.targets NAME [--minutes N] [--seed S] [--engine E] [--keep DIR] [FILE...]     what tools/fuzz calls

C targets are built with AddressSanitizer and UBSan. Engines: libfuzzer (clang; finds its way by coverage) or own (fuzz_main.c;
repeatable to the bit, and what it reaches is known). FILE...: inputs to replay instead of a run.

    classify    what classify does with any frame: parsing, ARP, reassembly        reassembly  against an oracle, byte by byte
    egress      up_segment with state, ACK processing, UDP, ICMP: a hostile guest  link        framing, guest_tx to guest_rx
                against the whole stage with host sockets behind it
    promote     segments and ACKs of promoted flows, with state; and a torn flow table
    dhcp, dns, control     the Python halves: messages of the guest, of resolvers, between stages (pyfuzz.py)
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

from tests import frames

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SEEDS = HERE / "seeds"  # NAME-what: inputs that once failed, and some that reach far
C_TARGETS = ("egress", "promote", "reassembly", "link")  # fuzz_classify.c has a driver and a test of its own,
LIBFUZZER_TARGETS = ("classify", *C_TARGETS)  # but not here
PYTHON_TARGETS = ("dhcp", "dns", "control")
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer",
         "-fno-strict-aliasing", "-fno-sanitize-recover=all", f"-I{CSRC}", f"-I{HERE}"]
ENV = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1", "PATH": "/usr/bin:/bin"}
COMPILE = {"own": ["gcc", *FLAGS, "-fsanitize=address,undefined"],
           "libfuzzer": ["clang", *FLAGS, "-DLIBFUZZER", "-fsanitize=fuzzer-no-link,address,undefined"]}
LINK = {"own": COMPILE["own"], "libfuzzer": ["clang", *FLAGS, "-DLIBFUZZER", "-fsanitize=fuzzer,address,undefined"]}


def objects(where: Path, engine: str = "own") -> list[Path]:
    """The data plane and the driver, compiled once for all C targets. Raises CalledProcessError."""
    def compile_(source: Path) -> Path:
        out = where / f"{source.stem}.o"
        subprocess.run([*COMPILE[engine], "-c", str(source), "-o", str(out)], check=True, timeout=600)
        return out

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_, [HERE / "fuzz_main.c", *sorted(CSRC.glob("*.c"))]))


def build(name: str, out: Path, parts: list[Path], *flags: str, engine: str = "own") -> Path:
    """Link a C target with objects() of that engine; raises CalledProcessError with the compiler's words on stderr."""
    if name == "classify":  # brings what fuzz_main.c brings the others
        parts = [p for p in parts if p.stem != "fuzz_main"]
    subprocess.run([*LINK[engine], *flags, str(HERE / f"fuzz_{name}.c"), *map(str, parts), "-o", str(out)], check=True,
                   timeout=600)
    return out


def seeds(name: str) -> list[Path]:
    return sorted(SEEDS.glob(f"{name}-*"))


def corpus(name: str, where: Path) -> Path:
    """What libFuzzer begins with, in a directory: the seeds, for classify all of tests/frames too."""
    where.mkdir(exist_ok=True)
    for f in seeds(name):
        shutil.copy(f, where)
    if name == "classify":
        for frame in frames.load():
            (where / frame.name).write_bytes(b"\1" + (frame.vnet_data or bytes(12)) + frame.data)
    return where


def numbers(text: str) -> dict[str, int]:
    """The lines "name number" of a target's report."""
    return {n: int(v) for n, v in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}


def main() -> int:
    p = argparse.ArgumentParser(prog="tools/fuzz", description="Run one fuzz target for as long as you like.")
    p.add_argument("target", choices=[*LIBFUZZER_TARGETS, *PYTHON_TARGETS])
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    p.add_argument("--first", type=int, default=0, help="run to begin with, of that seed")
    p.add_argument("--runs", type=int, default=0, help="so many runs instead of a time")
    p.add_argument("--engine", choices=[*COMPILE], help="for C targets; default: libfuzzer if there is clang")
    p.add_argument("--corpus", type=Path, help="libfuzzer: begin with what is in this directory, too, and keep what is new there")
    p.add_argument("--keep", type=Path, default=Path.cwd(), help="where an input that fails is kept")
    p.add_argument("files", nargs="*", type=Path, help="inputs to replay (C targets)")
    args = p.parse_args()
    print(f"{args.target}: seed {args.seed}", flush=True)
    much = ["runs", str(args.runs)] if args.runs else ["seconds", str(args.minutes * 60)]
    if args.target in PYTHON_TARGETS:
        return subprocess.run([sys.executable, "-m", f"tests.fuzz.fuzz_{args.target}", "--seed", str(args.seed), "--first",
                               str(args.first), f"--{much[0]}", much[1]], cwd=ROOT).returncode
    with tempfile.TemporaryDirectory() as tmp:
        engine = args.engine or ("libfuzzer" if shutil.which("clang") else "own")
        if args.target == "classify" and engine == "own":
            p.error("classify by its own driver is a test: tests/fuzz/test_fuzz_classify.py")
        program = build(args.target, Path(tmp) / "fuzz", objects(Path(tmp), engine), engine=engine)
        env = ENV | {k: v for k, v in os.environ.items() if k == "FUZZ_TRACE"}
        if args.files and engine == "libfuzzer":
            return subprocess.run([str(program), *map(str, args.files)], env=env).returncode
        if engine == "libfuzzer":
            begin = corpus(args.target, args.corpus or Path(tmp) / "corpus")
            limit = f"-runs={args.runs}" if args.runs else f"-max_total_time={int(args.minutes * 60)}"
            argv = [str(program), "-max_len=16384", f"-artifact_prefix={args.keep}/", f"-seed={args.seed}", limit, str(begin)]
        else:
            files = args.files or seeds(args.target)
            argv = [str(program), "-keep", str(args.keep), "-seed", str(args.seed), *map(str, files)]
            if not args.files:
                argv += [f"-{much[0]}", much[1], "-first", str(args.first)]
        return subprocess.run(argv, env=env).returncode


if __name__ == "__main__":
    raise SystemExit(main())
