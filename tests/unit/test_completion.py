"""Shell completion, as a shell would ask it. That completions/ is current is seen by tests/test_docs.py."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.completion import script


def complete(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    source = tmp_path / "ringnet.bash"
    source.write_text(script("bash"))
    run = (f"ringnet() {{ echo '{{\"session\":\"web\",\"pid\":1}}'; }}; source {source}; COMP_WORDS=(\"$@\");"
           " COMP_CWORD=$(($# - 1)); _ringnet; printf '%s\\n' \"${COMPREPLY[@]}\"")
    out = subprocess.run(["bash", "-c", run, "bash", *words], capture_output=True, text=True, check=True, cwd=tmp_path,
                         env={"PATH": os.environ["PATH"]})
    assert out.stderr == ""
    return out.stdout.split()


@pytest.mark.parametrize(("words", "offered"), [
    (("ringnet", "c"), ["ctl", "capture", "completion"]),
    (("ringnet", "fl"), ["flows"]),
    (("ringnet", "ctl", "f"), ["forward", "flows"]),
    (("ringnet", "ctl", "-s", ""), ["web"]),
    (("ringnet", "ctl", "-s", "web", "st"), ["status", "stages", "statistics", "step", "start"]),
    (("ringnet", "ctl", "forward", "--json", "r"), ["rm", "replace"]),
    (("ringnet", "ctl", "forward", "rm", "--cl"), ["--close-flows"]),
    (("ringnet", "ctl", "log", "w"), ["warning"]),
    (("ringnet", "ctl", "flows", "--proto", ""), ["tcp", "udp", "icmp"]),
    (("ringnet", "run", "--api"), ["--api-socket"]),
    (("ringnet", "run", "--config", "ringnet."), ["ringnet.bash"]),
    (("ringnet", "completion", ""), ["bash", "zsh"]),
])
def test_bash_offers(tmp_path: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert [w for w in complete(tmp_path, *words) if not w.startswith("-") or words[-1].startswith("-")] == offered


def test_the_guests_command_is_completed_as_a_command(tmp_path: Path) -> None:
    assert "bash" in complete(tmp_path, "ringnet", "run", "--", "bas")


def test_the_zsh_script_is_bashs_with_other_words() -> None:
    text = script("zsh")
    assert text.startswith("#compdef ringnet\n") and "mapfile" not in text and "bashcompinit" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
