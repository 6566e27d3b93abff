"""Fill in the hex of frames in classify.toml that have only `made`; with --all, of every frame that has `made`."""
from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from frames import HERE, recipes  # noqa: E402


def main() -> None:
    path = HERE / "classify.toml"
    blocks = re.split(r"(?m)^(?=\[\[frame\]\])", path.read_text())
    for i, block in enumerate(blocks):
        if not block.startswith("[[frame]]"):
            continue
        frame = tomllib.loads(block)["frame"][0]
        if "made" in frame and ("hex" not in frame or "--all" in sys.argv):
            data = recipes.raw(eval(frame["made"], vars(recipes)))
            block = re.sub(r"(?m)^hex = .*\n", "", block).rstrip("\n")
            blocks[i] = f'{block}\nhex = "{data.hex()}"\n\n'
    path.write_text("".join(blocks).rstrip("\n") + "\n")


main()
