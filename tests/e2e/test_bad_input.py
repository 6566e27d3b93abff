"""Wrong input: one line that says what is wrong, exit 2 for usage and 1 for what only running shows."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from netlab import RINGNET, Attached, Netns, PlainUser, run_env, sh

USAGE, FAILED = 2, 1


def fails(argv: list[str], status: int, *says: str) -> None:
    done = sh(*argv, check=False, env=run_env())
    assert done.returncode == status, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in says:
        assert re.search(word, lines[0]), f"{word!r} not in {lines[0]!r}"


@pytest.mark.parametrize(("args", "says"), [
    (["run", "--no-such-flag"], "no-such-flag"),
    (["fly"], "fly"),
    (["run", "-m", "67"], "(?i)mtu.*67"),
    (["run", "-m", "65521"], "(?i)mtu.*65521"),
    (["run", "-m", "many"], "many"),
    (["run", "-a", "10.0.2.300"], "10.0.2.300"),
    (["run", "-a", "10.0.3.2"], "10.0.3.2"),
    (["run", "-a", "10.0.2.1"], "10.0.2.1"),
    (["run", "-a", "10.0.2.255"], "10.0.2.255"),
    (["run", "-n", "33"], "33"),
    (["run", "-g", "gateway"], "gateway"),
    (["run", "--mac", "01:00:5e:00:00:01"], "01:00:5e:00:00:01"),
    (["run", "--mac", "02:00"], "02:00"),
    (["run", "-D", "dns.example"], "dns.example"),
    (["run", "--hosts", "no-equals-sign"], "no-equals-sign"),
    (["run", "--hosts", "name=1.2.3"], "1.2.3"),
    (["run", "--config", "/no/such/file.toml"], "/no/such/file.toml"),
    (["attach"], "."),
    (["attach", "1", "--tap", "a-name-that-is-too-long"], "a-name-that-is-too-long"),
    (["attach", "1", "--tap", "a/b"], "a/b"),
], ids=" ".join)
def test_usage(args: list[str], says: str) -> None:
    fails([*RINGNET, *args], USAGE, says)


@pytest.mark.parametrize(("toml", "says"), [
    ("mtu = ", "(?i)line 1"),
    ("mtu = 'large'", "mtu"),
    ("mtu = 10", "mtu"),
    ("no_such_key = 1", "no_such_key"),
    ("address = '10.0.2.999'", "10.0.2.999|address"),
], ids=repr)
def test_config_file(tmp_path: Path, toml: str, says: str) -> None:
    file = tmp_path / "session.toml"
    file.write_text(toml)
    fails([*RINGNET, "run", "--config", str(file), "--", "true"], USAGE, str(file), says)


@pytest.mark.netns
@pytest.mark.parametrize(("target", "says"), [("/run/netns/no-such-namespace", "no-such-namespace"),
                                              ("4194305", "4194305"), ("/dev/null", "/dev/null")])
def test_a_namespace_that_is_none(host_ns: Netns, target: str, says: str) -> None:
    fails(host_ns.argv(*RINGNET, "attach", target, "--tap", "tap0"), FAILED, says)


@pytest.mark.netns
def test_a_tap_name_that_is_taken(host_ns: Netns, guest_ns: Netns, guest_session: Attached) -> None:
    fails(host_ns.argv(*RINGNET, "attach", str(guest_ns.path), "--tap", "tap0"), FAILED, "tap0")
    guest_ns.ip("link", "add", "dummy9", "type", "veth", "peer", "name", "dummy8")
    fails(host_ns.argv(*RINGNET, "attach", str(guest_ns.path), "--tap", "dummy9"), FAILED, "dummy9")


@pytest.mark.netns
def test_no_permission_for_the_namespace(plain_user: PlainUser, host_ns: Netns, guest_ns: Netns) -> None:
    argv = plain_user.ringnet("attach", str(guest_ns.path), "--tap", "tap0")
    fails(host_ns.argv(*argv), FAILED, "(?i)permi")


def test_help_is_no_error() -> None:
    for args in (["--help"], ["run", "--help"], ["attach", "--help"], ["demo", "--help"]):
        done = sh(*RINGNET, *args, env=run_env())
        assert "usage" in done.stdout.lower()


def test_version() -> None:
    assert re.fullmatch(r"ringnet \d+\.\d+\S*\n", sh(*RINGNET, "--version", env=run_env()).stdout)
