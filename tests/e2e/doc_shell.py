"""Documents as programs: their code blocks, and a shell that runs their commands."""
from __future__ import annotations

import re
import select
import subprocess
import sys
from pathlib import Path

from netlab import DEADLINE, Netns, run_env


def blocks(document: Path) -> list[tuple[str, list[str]]]:
    """Code blocks in order: (language, lines)."""
    return [(kind, body.splitlines()) for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(),
                                                                   re.M | re.S)]


def commands(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Of a console block: (command, the output shown below it, if any)."""
    found = [(m[1], m[2].splitlines()) for m in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "\n".join(lines) + "\n",
                                                            re.M)]
    assert found, lines
    return found


class Shell:
    """One bash on the host side for the whole document; `ringnet` is this checkout's."""

    def __init__(self, host: Netns, tmp: Path, **env_: str) -> None:
        (tmp / "bin").mkdir()
        (tmp / "run").mkdir(mode=0o700)
        wrapper = tmp / "bin" / "ringnet"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m pipeline "$@"\n')
        wrapper.chmod(0o755)
        self.errors = tmp / "stderr"
        env = run_env(RINGNET_RUNTIME_DIR=str(tmp / "run"), PYTHONUNBUFFERED="1", **env_)
        env["PATH"] = f"{tmp / 'bin'}:{env['PATH']}"
        self.served = tmp / "served"
        with open(self.errors, "wb") as errors:
            self.bash = subprocess.Popen(host.argv("bash"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=errors, env=env, start_new_session=True)

    def run(self, command: str, *, ok: bool = True) -> str:
        assert self.bash.stdin and self.bash.stdout
        self.bash.stdin.write(f"{command}\necho \"<$?>\"\n".encode())
        self.bash.stdin.flush()
        out = b""
        while not (end := re.search(rb"(?:^|\n)<(\d+)>\n$", out)):
            ready, _, _ = select.select([self.bash.stdout], [], [], DEADLINE)
            assert ready, f"{command}: no end; {out!r} {self.errors.read_text()}"
            data = self.bash.stdout.read1(65536)  # type: ignore[attr-defined]
            assert data, f"bash ended: {self.errors.read_text()}"
            out += data
        assert not ok or end[1] == b"0", f"{command}: {end[1]!r}\n{out!r}\n{self.errors.read_text()}"
        return out[:end.start()].decode().strip("\n")

    def start(self, command: str, said: Path | None = None) -> None:
        """In the background, as `command &`: what it says goes to @said, as between another's lines it would hide their end."""
        self.run(f"{command.removesuffix('&')} >> {said or self.served} 2>&1 &")

    def wait_for_text(self, text: str) -> None:
        """Until the served command's output has it: it says so once it can be connected to."""
        self.run(f"timeout {DEADLINE:.0f} sh -c \"until grep -q '{text}' {self.served}; do sleep 0.1; done\"")

    def close(self) -> None:
        if self.bash.stdin:
            self.bash.stdin.write(b"kill $(jobs -p) 2>/dev/null; wait; exit\n")
            self.bash.stdin.close()
        self.bash.wait(DEADLINE)
        self.bash.stdout.close()  # type: ignore[union-attr]

    def jobs(self) -> int:
        return int(self.run("jobs -r | wc -l"))
