"""Micro benchmarks: microbench/*.c with the data plane's own sources, in ns a frame. The command line of tools/bench/micro."""
from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.lab import LabError
from bench.load import HERE, REPO, compiled
from bench.report import number, table
from bench.results import ResultsError, conditions, replaced
from shm import build_dataplane

PARTS = ("machine", "ring", "arena", "classify", "checksum", "tcp_up", "fast_up")
MARK, END = "<!-- generated: micro (tools/bench/micro --docs) -->", "<!-- end of generated: micro -->"
CSRC = build_dataplane.CSRC
WRAPPED = ("sendmsg", "send", "recv", "getsockopt", "epoll_wait", "ioctl", "write")  # syscalls.c times these
FLAGS = [*build_dataplane.BASE_FLAGS, *build_dataplane.STRICT_FLAGS, f"-I{CSRC}"]


def program() -> Path:
    build_dataplane.build()
    mine = HERE / "microbench"
    # the product's own objects, as it links them; a checkout that came with the module ready may lack them
    product = [obj if (obj := build_dataplane.OBJECTS / f"{c.stem}.o").exists() else c for c in build_dataplane.sources()]
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    return compiled([*sorted(mine.glob("*.c")), *product], REPO / "build" / "bench" / "micro",
                    flags=[*FLAGS, *wraps, "-lpthread"],
                    depends=[*mine.glob("*.h"), *CSRC.glob("*.h"), *CSRC.glob("*.def")])


def run(parts: list[str]) -> list[dict[str, Any]]:
    """A figure a dict: part, case, bytes, ns, least, most. Raises LabError."""
    done = subprocess.run([str(program()), *parts], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"micro: {done.stderr.strip() or f'status {done.returncode}'}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def markdown(figures: list[dict[str, Any]], meta: dict[str, Any]) -> str:
    rows = [[f["part"], f["case"], number(f["ns"]), f"{number(f['least'])}..{number(f['most'])}",
             number(f["bytes"] / f["least"]) if f["bytes"] else ""] for f in figures]
    said = (f"Measured {meta['date']} on Linux {meta['kernel']}, {meta['cpus']} CPUs ({meta['cpu']}), ringnet at commit "
            f"{meta['commit']}.\n\n")
    return said + table(["part", "case", "ns a frame, median", "range", "GB/s at best"], rows)


def main() -> int:
    p = argparse.ArgumentParser(prog="tools/bench/micro", description="What parts of the data plane cost by themselves.")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    p.add_argument("--docs", type=Path, metavar="FILE.md", help="put the table between this document's marks")
    args = p.parse_args()
    if wrong := sorted(set(args.parts) - set(PARTS)):
        p.error(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    meta = conditions() | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    try:
        figures = run(args.parts)
        if args.json:
            args.json.write_text(json.dumps({"meta": meta, "figures": figures}, indent=1) + os.linesep)
        if args.docs:
            args.docs.write_text(replaced(args.docs.read_text(), MARK, END, markdown(figures, meta)))
        else:
            print(markdown(figures, meta), end="")
    except (LabError, ResultsError, OSError, subprocess.CalledProcessError) as e:
        print(f"micro: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
