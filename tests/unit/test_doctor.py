"""`ringnet doctor`: what each check says of a good and of a bad machine."""
from __future__ import annotations

import errno
import os
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import Finding, Level


def one(check: Callable[[], Iterator[Finding]]) -> Finding:
    (found,) = check()
    return found


@pytest.mark.parametrize(("text", "numbers"), [("6.1.0-13-amd64", (6, 1)), ("5.9", (5, 9)), ("6.10-rc3", (6, 10)),
                                               ("6.9.1+", (6, 9)), ("4.19.0", (4, 19))])
def test_kernel_releases(text: str, numbers: tuple[int, int]) -> None:
    assert doctor.release(text) == numbers


@pytest.mark.parametrize(("text", "level"), [("4.19.0", Level.FAIL), ("6.1.0", Level.NOTE), ("6.9.0", Level.OK),
                                             ("7.0.0", Level.OK)])
def test_kernel(monkeypatch: pytest.MonkeyPatch, text: str, level: Level) -> None:
    monkeypatch.setattr(platform, "release", lambda: text)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = one(doctor.kernel)
    assert found.level is level and text in found.found and bool(found.fix) == (level is not Level.OK)


@pytest.mark.parametrize(("number", "fix"), [(errno.EACCES, "chmod 0666"), (errno.ENOENT, "modprobe tun"),
                                             (errno.ENODEV, "modprobe tun")])
def test_a_tun_device_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, number: int, fix: str) -> None:
    def refuse(path: str, flags: int) -> int:
        assert path == "/dev/net/tun"
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    found = one(doctor.tun)
    assert found.level is Level.FAIL and fix in found.fix


def test_namespaces_that_a_sysctl_forbids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "unshare"
    program.write_text("#!/bin/sh\necho unshare: unshare failed: Operation not permitted >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "sysctl", {"kernel.unprivileged_userns_clone": "0"}.get)
    found = one(doctor.namespaces)
    assert (found.level, found.fix) == (Level.FAIL, "as root: sysctl kernel.unprivileged_userns_clone=1")
    assert found.found == "cannot be made: unshare: unshare failed: Operation not permitted"


@pytest.mark.parametrize(("hard", "level"), [(1024, Level.NOTE), (doctor.FILES_WANTED, Level.OK),
                                             (resource.RLIM_INFINITY, Level.OK)])
def test_open_files(monkeypatch: pytest.MonkeyPatch, hard: int, level: Level) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, hard))
    assert one(doctor.files).level is level


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs("/dev/shm")
    monkeypatch.setattr(os, "statvfs", lambda path: type("S", (), {"f_bavail": 10, "f_frsize": real.f_frsize})())
    found = one(doctor.memory)
    assert found.level is Level.NOTE and "remount" in found.fix


def test_text_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good, note = Finding("a", Level.OK, "fine"), Finding("b", Level.NOTE, "slow", "do this")
    bad = Finding("c", Level.FAIL, "missing", "install it")
    for findings, args, status, lines in (
            ([good], [], 0, ["  ok  a  fine", "", "ringnet can run here"]),
            ([good, note], ["-q"], 0, ["note  b  slow", "         -> do this"]),
            ([good, note, bad], ["-q"], 1, ["note  b  slow", "         -> do this", "FAIL  c  missing", "         -> install it",
                                            "", "ringnet cannot run here: 1 to fix"])):
        monkeypatch.setattr(doctor, "CHECKS", (lambda found=findings: iter(found),))
        assert doctor.main(args) == status
        assert capsys.readouterr().out.splitlines() == lines
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([bad]),))
    assert doctor.main(["--json"]) == 1
    assert capsys.readouterr().out == '{"what": "c", "level": "fail", "found": "missing", "fix": "install it"}\n'
    assert doctor.main(["--what"]) == 2 and "unrecognized" in capsys.readouterr().err


def test_this_machine_runs_the_tests_so_it_can_run_ringnet() -> None:
    """Every check says something, and none that it needs is missing."""
    for check in doctor.CHECKS:
        for found in check():
            assert found.what and found.found and (found.fix or found.level is Level.OK)
            if os.geteuid() == 0 and os.path.exists("/dev/net/tun"):
                assert found.level is not Level.FAIL, found
