"""Manual pages, sample file and units say what the program does: each is read back."""
from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from pipeline import cli, manual
from pipeline.config import Settings, load_toml, make, options

REPO = Path(__file__).resolve().parent.parent.parent
UNITS = sorted((REPO / "tools" / "systemd").iterdir())


def plain(page: str) -> str:
    return re.sub(r"\\f[BIR]|\\&", "", page).replace("\\-", "-").replace("\\e", "\\")


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    words = {"run", "attach", "vm", *cli.OWN_PARSERS} - {"passt", "slirp4netns"}  # these two are others' command lines
    assert {p.name for p in manual.PAGES} == words | {""}
    for p in manual.PAGES:
        assert all(other in {q.name for q in manual.PAGES} for other in p.see)


@pytest.mark.parametrize("name", sorted(manual.pages()))
def test_pages_have_what_a_page_has(name: str) -> None:
    page = manual.pages()[name]
    heads = re.findall(r"^\.SH (.*)$", page, re.M)
    assert heads[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert all(line for line in page.split("\n")[:-1]), "groff_man(7): an empty line is a paragraph of its own"
    assert not [line for line in page.splitlines() if line.startswith(("'",)) or
                line.startswith(".") and not re.match(r"\.(\\\"|TH |SH |TP$|PP$|RS 4$|RE$|nf$|fi$)", line)]


@pytest.mark.parametrize("name", ["ringnet-run.1", "ringnet-attach.1"])
def test_every_option_is_in_the_manual(name: str) -> None:
    text = plain(manual.pages()[name])
    for o in options():
        assert f"--{o.key}" in text and o.help.replace("`", "").split(";")[0] in text, o.key


def test_the_sample_file_is_the_defaults(tmp_path: Path) -> None:
    sample = (REPO / "docs" / "ringnet.toml").read_text()
    assert load_toml(str(REPO / "docs" / "ringnet.toml")) == {}
    keys = [o.key for o in options()]
    assert re.findall(r"^#([\w-]+) = ", sample, re.M) == keys
    full = tmp_path / "full.toml"
    full.write_text(re.sub(r"^#(?=[\w-]+ = )", "", sample, flags=re.M))
    assert make(load_toml(str(full))) == Settings()
    example = tmp_path / "example.toml"
    example.write_text("\n".join(re.findall(r"^# like: (.*)$", sample, re.M)))
    assert make(load_toml(str(example))).tcp_ports == ("8080:80",)


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_units_start_a_command_there_is(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    service = parser["Service"]
    assert service["Type"] == "notify" and int(service["WatchdogSec"]) > 0
    program, *argv = service["ExecStart"].replace("%i", "web").replace(" $OPTIONS", "").split()
    assert program == "/usr/bin/ringnet"
    args = cli.parser().parse_args(argv)
    assert args.command == "attach" and args.target.startswith("/run/netns/")
    args.config = ""
    assert cli.settings_from(args)
    pages = re.findall(r"man:([\w-]+)\(1\)", parser["Unit"]["Documentation"])
    assert pages and all(f"{page}.1" in manual.pages() for page in pages)
