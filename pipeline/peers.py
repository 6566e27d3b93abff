"""Programs that do what `ringnet attach` does, ourselves among them: the command that gives a namespace a network, and its version.

`ringnet bench` and tools/bench measure by this.
"""
from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PASTA = ("{pasta} -f -q --runas 0:0 --netns-only --no-map-gw --config-net --mtu {mtu} --netns {netns} -I {tap}"
          " -t {tcp} -u none -T none -U none")
_SLIRP = "slirp4netns --configure --mtu {mtu} --netns-type=path --api-socket {api} {netns} {tap}"


@dataclass(frozen=True)
class Driver:
    """In `command` {netns}, {tap}, {mtu}, {tcp} (ports to forward, or none) and {api} (a socket's path) are filled in."""

    name: str
    kind: str  # ringnet, peer, kernel
    command: str = ""
    version: str = ""  # words of a command that says it
    env: dict[str, str] = field(default_factory=dict)
    package: str = ""  # of Debian

    def available(self) -> bool:
        return not self.command or shutil.which(shlex.split(self.command)[0]) is not None

    def said_version(self) -> str:
        if not self.version:
            return ""
        done = subprocess.run(shlex.split(self.version), stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""

    def words(self, **filled: object) -> list[str]:
        """Its command line."""
        return [w.format(**filled) for w in shlex.split(self.command)]


def ringnet(name: str = "ringnet", options: str = "") -> Driver:
    """This installation; {tcp} is 'none' without forwards, which ringnet's -t takes too."""
    command = (f"{shlex.quote(sys.executable)} -P -m pipeline attach {{netns}} --tap {{tap}} --mtu {{mtu}} --config-net"
               f" --quiet --tcp-ports {{tcp}} {options}")
    return Driver(name, "ringnet", command.strip(), env={"PYTHONPATH": str(ROOT)})


def pasta(name: str = "pasta", path: str = "pasta") -> Driver:
    return Driver(name, "peer", _PASTA.replace("{pasta}", shlex.quote(path)), f"{shlex.quote(path)} --version", package="passt")


def slirp4netns() -> Driver:
    return Driver("slirp4netns", "peer", _SLIRP, "slirp4netns --version", package="slirp4netns")
