"""resolv.conf: reading it, and noticing every way in which it changes. No sleeps: inotify is the event."""
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from pipeline.services.loop import Loop
from pipeline.services.resolv import ResolvWatcher, Upstream, parse_nameservers
from tests.fds import open_fds


def test_nameserver_lines():
    text = """# nameserver 1.1.1.1
; nameserver 2.2.2.2
search example.com
nameserver 192.0.2.1
nameserver\t2001:db8::1   trailing words
  nameserver 192.0.2.9
nameserver fe80::1%lo
nameserver not-an-address
nameserver
nameserver 192.0.2.1
options ndots:5
"""
    assert [str(u.address) for u in parse_nameservers(text)] == ["192.0.2.1", "2001:db8::1", "192.0.2.9", "fe80::1%lo"]


def test_at_most_eight():
    assert len(parse_nameservers("".join(f"nameserver 10.0.0.{i}\n" for i in range(20)))) == 8


def test_sockaddr_has_the_interface_of_a_link_local_address():
    import socket

    assert Upstream(IPv4Address("192.0.2.1")).sockaddr() == (socket.AF_INET, ("192.0.2.1", 53))
    assert Upstream(IPv6Address("fe80::1%lo")).sockaddr() == (
        socket.AF_INET6, ("fe80::1", 53, 0, socket.if_nametoindex("lo")))
    with pytest.raises(OSError):
        Upstream(IPv6Address("fe80::1%nosuch0")).sockaddr()


@pytest.mark.parametrize("text,want", [("127.0.0.1#5353", ("127.0.0.1", 5353)), ("::1", ("::1", 53))])
def test_configured_upstreams(text, want):
    assert (str(Upstream.parse(text).address), Upstream.parse(text).port) == want


@pytest.mark.parametrize("text", ["", "dns.example", "127.0.0.1#", "127.0.0.1#0", "127.0.0.1#65536", "127.0.0.1#x"])
def test_bad_configured_upstreams(text):
    with pytest.raises(ValueError):
        Upstream.parse(text)


class Watch:
    """A watcher and the texts it told."""

    def __init__(self, path: Path) -> None:
        self.loop = Loop(time.monotonic)
        self.seen: list[str] = []
        self.watcher = ResolvWatcher(str(path), self.loop, self.seen.append)

    def wait(self, text: str) -> None:
        """Until the last word is `text`; pytest-timeout ends a test whose event never comes."""
        while self.seen[-1] != text:
            self.loop.step(5)

    def quiet(self) -> bool:
        """Nothing more to tell: all pending events are worked off without a callback."""
        before = len(self.seen)
        while self.loop.step(0):
            pass
        return len(self.seen) == before

    def close(self) -> None:
        self.watcher.close()
        self.loop.close()


@pytest.fixture
def watch() -> Iterator[object]:
    made: list[Watch] = []

    def make(path: Path) -> Watch:
        made.append(Watch(path))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_fault_37_written_in_place(watch, tmp_path):
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 1.1.1.1\n")
    w = watch(file)
    assert w.seen == ["nameserver 1.1.1.1\n"]
    for n in range(3):
        file.write_text(f"nameserver 2.2.2.{n}\n")
        w.wait(f"nameserver 2.2.2.{n}\n")


def test_a_writer_that_truncates_first_is_not_seen_half_way(watch, tmp_path):
    file = tmp_path / "resolv.conf"
    file.write_text("old")
    w = watch(file)
    with file.open("w") as f:
        assert w.quiet()
        f.write("nameserver ")
        f.flush()
        assert w.quiet()
        f.write("9.9.9.9\n")
    w.wait("nameserver 9.9.9.9\n")
    assert w.seen == ["old", "nameserver 9.9.9.9\n"]


def test_fault_37_replaced_by_rename(watch, tmp_path):
    file = tmp_path / "resolv.conf"
    file.write_text("a")
    w = watch(file)
    for n in range(3):
        (tmp_path / "new").write_text(f"b{n}")
        os.replace(tmp_path / "new", file)
        w.wait(f"b{n}")


def test_symlink_is_followed_and_may_be_swapped(watch, tmp_path):
    """systemd-resolved: /etc/resolv.conf -> ../run/systemd/resolve/stub-resolv.conf."""
    run, etc = tmp_path / "run", tmp_path / "etc"
    run.mkdir()
    etc.mkdir()
    (run / "stub").write_text("stub")
    (run / "other").write_text("other")
    (etc / "resolv.conf").symlink_to("../run/stub")
    w = watch(etc / "resolv.conf")
    (run / "new").write_text("stub2")
    os.replace(run / "new", run / "stub")
    w.wait("stub2")
    (etc / "link").symlink_to("../run/other")
    os.replace(etc / "link", etc / "resolv.conf")
    w.wait("other")
    (run / "other").write_text("other2")
    w.wait("other2")


def test_dangling_symlink_whose_target_appears(watch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "resolv.conf").symlink_to("run/stub")
    w = watch(tmp_path / "resolv.conf")
    assert w.seen == [""]
    (tmp_path / "run" / "stub").write_text("x")
    w.wait("x")


def test_absent_then_there_then_gone(watch, tmp_path, caplog):
    w = watch(tmp_path / "a" / "b" / "resolv.conf")
    assert w.seen == [""]
    (tmp_path / "a").mkdir()
    w.loop.step(5)
    (tmp_path / "a" / "b").mkdir()
    w.loop.step(5)
    (tmp_path / "a" / "b" / "resolv.conf").write_text("x")
    w.wait("x")
    (tmp_path / "a" / "b" / "resolv.conf").unlink()
    w.wait("")
    (tmp_path / "a" / "b" / "resolv.conf").write_text("y")
    w.wait("y")


def test_other_files_of_the_directory_and_equal_texts_are_not_told(watch, tmp_path):
    file = tmp_path / "resolv.conf"
    file.write_text("a")
    w = watch(file)
    (tmp_path / "hosts").write_text("x")
    assert w.quiet()
    file.write_text("a")
    assert w.quiet() and w.seen == ["a"]


def test_a_fifo_does_not_block(watch, tmp_path):
    os.mkfifo(tmp_path / "resolv.conf")
    assert watch(tmp_path / "resolv.conf").seen == [""]


def test_a_symlink_loop_ends(watch, tmp_path):
    (tmp_path / "resolv.conf").symlink_to("resolv.conf")
    assert watch(tmp_path / "resolv.conf").seen == [""]


def test_undecodable_bytes_are_read_around(watch, tmp_path):
    (tmp_path / "resolv.conf").write_bytes(b"\xff\xfe\nnameserver 1.2.3.4\n")
    assert [str(u.address) for u in parse_nameservers(watch(tmp_path / "resolv.conf").seen[0])] == ["1.2.3.4"]


def test_close_leaves_no_descriptor(tmp_path):
    before = len(open_fds())
    w = Watch(tmp_path / "resolv.conf")
    w.close()
    assert len(open_fds()) == before
