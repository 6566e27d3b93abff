"""Wrong command lines, called in this process: one line on stderr, exit 2 (usage) or 1 (run time)."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.messages import Exit, StageExit
from tests.fds import open_fds

REPO = Path(__file__).resolve().parent.parent.parent

USAGE = [
    ("", "say what to do"),
    ("fly", "fly"),
    ("run --no-such", "--no-such"),
    ("run --mt 1500", "--mt"),  # no abbreviations: they would break when an option is added
    ("run -m", "expected one argument"),
    ("run -m 575", "--mtu 575: not within 576..65520"),
    ("run -m 65521", "--mtu 65521"),
    ("run -m many", "--mtu many"),
    ("run -a 10.0.2", "--address 10.0.2:"),
    ("run -g 10.0.3.1", "--gateway 10.0.3.1: outside the subnet"),
    ("run -n 255.255.0.255", "--netmask"),
    ("run --mac zz", "--mac zz"),
    ("run -D nowhere", "--dns nowhere"),
    ("run -S a..b", "--search a..b"),
    ("run --hosts name", "expected NAME=IP"),
    ("run --hosts =192.0.2.1", "expected NAME=IP"),
    ("run --hosts a=b", "neither an IP address nor a name that is answered here"), ("run --hosts a=1.2", "not an IP address"),
    ("run -I interface-of-19-by", "--ifname interface-of-19-by: 18 bytes long"),
    ("run --udp-max 0", "--udp-max 0: not within 1..15000"),
    ("run --config /no/such.toml", "/no/such.toml: No such file"),
    ("run --config /", "--config /: Is a directory"),
    ("run word -- true", "word before --"),
    ("attach", "PID|NETNS-PATH"),
    ("attach 1 2", "unrecognized arguments: 2"),
    ("attach 1 --tap interface-of-19-by", "--tap interface-of-19-by"),
    ("attach 1 --tap a:b", "--tap a:b"),
    ("attach 1 --ready-fd x", "--ready-fd x: not a descriptor number"),
    ("attach 1 --exit-fd 99999", "--exit-fd 99999: not an open descriptor"),
    ("attach 1 -- true", "only run and nic2-helper take a command"),
]


@pytest.mark.parametrize(("line", "says"), USAGE, ids=[line or "nothing" for line, _ in USAGE])
def test_usage(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == Exit.USAGE
    err = capsys.readouterr().err
    assert says in err and err.startswith("ringnet") and err.count("\n") == 1, err


RUN_TIME = [
    ("attach /no/such/netns", "no network namespace at /no/such/netns; make one with: ip netns add"),
    ("attach /dev/null", "/dev/null is not a network namespace"),
    ("attach 4194305", "no process 4194305"),  # one over the largest pid there can be (proc_sys_kernel(5), pid_max)
    ("attach 99999999999999999999", "process 99999999999999999999"),
]


@pytest.mark.parametrize(("line", "says"), RUN_TIME, ids=[line for line, _ in RUN_TIME])
def test_what_only_running_shows(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_fds()
    assert cli.main(line.split()) == Exit.RUNTIME
    err = capsys.readouterr().err
    assert says in err and err.startswith("ringnet: ") and err.count("\n") == 1, err
    assert open_fds() == before


@pytest.mark.parametrize("line", ["", "nobody", "nobody --control-fd 0", "egress --session", "egress --control-fd x",
                                  "egress --control-fd 99999"])
def test_a_stage_by_hand(line: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "pipeline", "stage", *line.split()], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60, env=dict(os.environ, PYTHONPATH=str(REPO)))
    assert done.returncode == StageExit.USAGE
    assert done.stderr.startswith("ringnet stage") and done.stderr.count("\n") == 1, done.stderr


def test_a_stage_needs_the_right_kind_of_socket() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "pipeline", "stage", "egress", "--control-fd", "0"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, PYTHONPATH=str(REPO)))
    assert done.returncode == StageExit.USAGE
    assert "--control-fd 0" in done.stderr


@pytest.mark.parametrize("line", ["--help", "run --help", "attach --help", "--version"])
def test_help_is_no_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 0
    out = capsys.readouterr()
    assert out.err == "" and "ringnet" in out.out
