"""`auto`: what is read of the kernel's tables, what becomes of it, how a session's forwards follow, and rules that change."""
from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import api
from pipeline.auto_forwards import PORTS_MAX, Follower, listening, open_tables, read_table, wanted
from pipeline.config import ConfigError, make
from pipeline.forwards import Auto, Fault, Forward, ForwardError, ForwardSyntaxError, autos, parse_all, parse_auto
from pipeline.messages import Exit
from pipeline.supervisor import Link, Session, SessionError

NETWORK = ipaddress.IPv4Network("10.0.2.0/24")
TCP = b"""\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0019 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0202000A:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0202000A:9C40 0102000A:0050 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0 100 0 0 10 0
"""
TCP6 = b"""\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
   1: 00000000000000000000000001000000:0017 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
   2: 0000000000000000FFFF00000202000A:0018 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
"""
UDP = b"""\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  100: 0202000A:A000 08080808:0035 01 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0
  101: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 2 2 0 0
"""


def test_what_a_table_says() -> None:
    assert listening(TCP, "tcp") == {("", 8080), ("127.0.0.1", 25), ("10.0.2.2", 80)}
    assert listening(TCP6, "tcp") == {("", 22), ("10.0.2.2", 24)}
    assert listening(UDP, "udp") == {("", 53)}
    assert listening(b"", "tcp") == listening(TCP.splitlines()[0], "tcp") == set()


def test_this_kernels_tables() -> None:
    """Real sockets, and the same descriptors again after a change; listeners first, whatever else is there."""
    tables = open_tables()
    made: list[socket.socket] = []
    try:
        with socket.create_server(("127.0.0.1", 0), backlog=512) as server, socket.socket(type=socket.SOCK_DGRAM) as peer:
            port = server.getsockname()[1]
            peer.bind(("127.0.0.1", 0))
            for _ in range(300):  # more than one read() of the table
                made.append(socket.create_connection(server.getsockname()))
            assert ("127.0.0.1", port) in listening(read_table(tables["tcp"], "tcp"), "tcp")
            assert ("127.0.0.1", peer.getsockname()[1]) in listening(read_table(tables["udp"], "udp"), "udp")
            peer.connect(server.getsockname())
            assert ("127.0.0.1", peer.getsockname()[1]) not in listening(read_table(tables["udp"], "udp"), "udp")
        assert ("127.0.0.1", port) not in listening(read_table(tables["tcp"], "tcp"), "tcp")
    finally:
        for s in made:
            s.close()
        for fd in tables.values():
            os.close(fd)


def ports(auto: Auto, *there: tuple[str, int]) -> list[tuple[str, int]]:
    return [(f.guest_addr, f.host_port) for f in wanted([auto], {auto.proto: set(there)}, NETWORK, range(32768, 61000))]


def test_what_is_followed() -> None:
    tcp, udp = Auto(proto="tcp"), Auto(proto="udp")
    assert ports(tcp, ("", 80), ("127.0.0.1", 81), ("10.0.2.7", 82), ("172.17.0.1", 83), ("", 40000)) == [
        ("", 80), ("10.0.2.7", 82), ("", 40000)]
    assert ports(tcp, ("10.0.2.7", 80), ("", 80)) == ports(tcp, ("", 80), ("10.0.2.7", 80)) == [("", 80)]
    assert ports(udp, ("", 53), ("", 40000), ("", 68), ("10.0.2.2", 69)) == [("", 53), ("10.0.2.2", 69)]
    assert ports(Auto(proto="tcp", without=frozenset({80})), ("", 80), ("", 81)) == [("", 81)]
    assert len(ports(tcp, *(("", n) for n in range(1, 3000)))) == PORTS_MAX
    rule = Auto(proto="tcp", host_addr="192.0.2.1", ifname="eth0", owner="box1")
    (f,) = wanted([rule], {"tcp": {("", 80)}}, NETWORK, range(0))
    assert (f.host_addr, f.ifname, f.owner, f.optional, f.auto) == ("192.0.2.1", "eth0", "box1", True, True)
    assert rule.makes(f) and not Auto(proto="tcp", host_addr="192.0.2.1", ifname="eth0", owner="box2").makes(f)


@given(st.binary(max_size=300), st.sampled_from(["tcp", "udp"]))
def test_a_table_of_spaces_and_garbage_is_no_listener_of_ours(text: bytes, proto: Any) -> None:
    """The kernel wrote it, so only what the kernel writes is read: other lines have no such state in that place."""
    assert listening(b"head\n" + text.replace(b"0A", b"01").replace(b"07", b"01"), proto) == set()


# --- grammar


@pytest.mark.parametrize(("spec", "want"), [
    ("auto", {}), ("127.0.0.1/auto", {"host_addr": "127.0.0.1"}), ("%lo/auto", {"ifname": "lo"}),
    ("auto,~22,~80-82", {"without": frozenset({22, 80, 81, 82})}), ("~22,auto", {"without": frozenset({22})}),
])
def test_specs(spec: str, want: dict[str, Any]) -> None:
    assert parse_auto(spec, "udp") == Auto(proto="udp", **want)
    assert parse_all({"udp": [spec, "53"]}) == parse_all({"udp": ["53"]})
    assert autos({"tcp": ["22"], "udp": [spec]}) == [Auto(proto="udp", **want)]


@pytest.mark.parametrize(("spec", "names"), [
    ("auto,22", "22: beside auto only what is left out"), ("auto,", "nothing: beside auto"), ("auto,~x", "expected a port"),
    ("auto,auto", "auto: beside auto"), ("/auto", "nothing before the /"), ("::x/auto", "not an address"),
])
def test_specs_that_are_wrong(spec: str, names: str) -> None:
    with pytest.raises(ForwardSyntaxError) as e:
        parse_auto(spec, "tcp")
    assert names in str(e.value)
    with pytest.raises(ConfigError, match="^--tcp-ports "):
        make({"tcp-ports": [spec]})


@pytest.mark.parametrize("spec", ["auto", "127.0.0.1/auto,~22", "[::1]%lo/auto,~1-3,~5"])
def test_a_rule_is_written_as_it_is_read(spec: str) -> None:
    made = parse_auto(spec, "tcp", owner="me")
    assert made and made.owner == "me" and made.spec == spec and str(made) == f"tcp {spec}"


def test_two_of_one_place() -> None:
    assert len(autos({"tcp": ["auto", "%lo/auto", "auto"], "udp": ["auto"]})) == 3
    with pytest.raises(ForwardSyntaxError, match="auto,~22: beside auto: say all that is left out in one of them"):
        autos({"tcp": ["auto", "auto,~22"]})
    with pytest.raises(ConfigError, match="^--udp-ports auto,~22: beside auto"):
        make({"udp-ports": ["auto", "auto,~22"]})


def test_a_guest_that_cannot_be_looked_into_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        s = Session(make({"udp-ports": ["auto"], "quiet": True}), link=Link(fd=theirs.fileno(), kind="dgram", vnet=False))
        with pytest.raises(SessionError, match="--udp-ports auto: what .* virtual machine cannot; name the ports") as e:
            s.start()
        assert e.value.code is Exit.USAGE


# --- following, with a session that only keeps lists


class Fake:
    def __init__(self) -> None:
        self.held: dict[object, Forward] = {}
        self.watched: dict[int, Callable[[], None]] = {}
        self.told: list[api.Event] = []
        self.taken: set[int] = set()
        self.changes = 0
        self.error = ""
        self.ending = False

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def forwards(self) -> list[Forward]:
        return sorted(self.held.values(), key=lambda f: (f.proto, f.host_port))

    def change_forwards(self, add: Iterable[Forward] = (), remove: Iterable[Forward] = (), close_flows: bool = False,
                        skipped: Callable[[Fault], None] = lambda fault: None) -> list[Forward]:
        self.changes += 1
        if self.error:
            raise ForwardError([Fault(forward=None, errno=errno.EMFILE, text=self.error)])
        for f in remove:
            del self.held[f.endpoint]
        made = [f for f in add if f.host_port not in self.taken]
        for f in add:
            if f not in made:
                skipped(Fault(forward=f, errno=errno.EADDRINUSE, text="taken"))
        self.held |= {f.endpoint: f for f in made}
        return made

    def tell(self, event: api.Event) -> None:
        self.told.append(event)

    def said(self) -> list[tuple[str, int, bool]]:
        """Events since the last time: what, port, by a rule `auto`?"""
        told = [(api.event_name(e), e.forward.host_port, e.forward.auto) for e in self.told]  # type: ignore[attr-defined]
        self.told.clear()
        return told

    def ports(self) -> list[int]:
        return sorted(f.host_port for f in self.held.values())


@contextlib.contextmanager
def table(*there: int) -> Iterator[tuple[dict[str, int], Callable[..., None]]]:
    """The guest's table of TCP sockets, as a file; and how to write it anew."""
    fd = os.memfd_create("tcp")

    def write(*there: int) -> None:
        text = b"  sl  local_address rem_address   st\n" + b"".join(
            b"%4d: 00000000:%04X 00000000:0000 0A\n" % (n, port) for n, port in enumerate(there))
        os.ftruncate(fd, 0)
        os.pwrite(fd, text, 0)

    write(*there)
    try:
        yield {"tcp": fd}, write
    finally:
        os.close(fd)


@pytest.fixture
def session() -> Fake:
    return Fake()


@pytest.fixture
def said() -> list[str]:
    return []


@contextlib.contextmanager
def following(session: Fake, said: list[str], tables: dict[str, int], *rules: Auto) -> Iterator[Follower]:
    follower = Follower(session, NETWORK, said.append)
    follower.see(tables)
    try:
        follower.change(follow=rules)
        yield follower
    finally:
        follower.close()
        follower.close()
        assert session.watched == {}


TCP_AUTO = Auto(proto="tcp", owner="options")


def named(port: int, to: int = 0, owner: str = "") -> Forward:
    return Forward(proto="tcp", host_port=port, guest_port=to or port, owner=owner)


def test_forwards_come_and_go_with_the_guests_listeners(session: Fake, said: list[str]) -> None:
    session.change_forwards([named(22, 2222)])
    with table(22, 8080, 8081) as (tables, write):
        session.taken = {8081}
        with following(session, said, tables, TCP_AUTO) as follower:
            assert session.ports() == [22, 8080]
            assert session.said() == [("forward-added", 8080, True), ("forward-skipped", 8081, True)]
            assert said == ["tcp 8081: the guest listens there, but it is not forwarded: taken; it is tried again each second"]
            follower.look()
            assert session.said() == [] and len(said) == 1  # as before: nothing more is said
            session.taken = set()
            follower.look()
            assert session.ports() == [22, 8080, 8081] and session.said() == [("forward-added", 8081, True)]
            changes = session.changes
            follower.look()
            assert session.changes == changes  # nothing new: nothing is done
            write(22, 8081)
            follower.look()
            assert session.ports() == [22, 8081] and session.said() == [("forward-removed", 8080, True)]
            assert session.held["tcp", "", "", 22].guest_port == 2222  # somebody else's: left alone
            session.error = "too many descriptors in use"
            write(22, 8081, 9000)
            follower.look()
            follower.look()
            assert said[1:] == ["cannot follow the guest's ports: too many descriptors in use"]
            session.error = ""
            (callback,) = session.watched.values()
            session.ending = True
            select.select(list(session.watched), [], [])
            callback()
            assert session.ports() == [22, 8081]  # what ends is not followed
            session.ending = False
            select.select(list(session.watched), [], [])  # by the timer
            callback()
            assert session.ports() == [22, 8081, 9000]


def test_a_port_is_skipped_again_with_another_event_but_no_other_line(session: Fake, said: list[str]) -> None:
    with table(8081, 8082) as (tables, write):
        session.taken = {8081, 8082}
        with following(session, said, tables, TCP_AUTO) as follower:
            assert len(said) == 1 and said[0].startswith("tcp 8081 (and 1 more): the guest listens there")
            for _ in range(3):
                write()
                follower.look()
                write(8082)
                follower.look()
            assert [e for e in session.said() if e[1] == 8082] == [("forward-skipped", 8082, True)] * 4
            assert len(said) == 1


def test_rules_that_come_and_go_while_it_runs(session: Fake, said: list[str]) -> None:
    with table(80, 81, 82) as (tables, write), following(session, said, tables) as follower:
        assert session.watched == {} and session.changes == 1  # without a rule nobody looks
        rule = Auto(proto="tcp", owner="box1", without=frozenset({80}))
        assert follower.change([named(8080)], follow=[rule]) == [named(8080)]
        assert follower.rules == [rule] and session.ports() == [81, 82, 8080] and len(session.watched) == 1
        assert session.said() == [("forward-added", 8080, False), ("forward-added", 81, True), ("forward-added", 82, True)]
        # the same place, others left out: what both want is not touched
        other = Auto(proto="tcp", owner="box1", without=frozenset({81}))
        follower.change(follow=[other], unfollow=[rule])
        assert session.said() == [("forward-removed", 81, True), ("forward-added", 80, True)]
        # a forward by name takes a followed one's place, and gives it back
        follower.change([named(80, 8000)])
        assert session.held["tcp", "", "", 80] == named(80, 8000)
        assert session.said() == [("forward-removed", 80, True), ("forward-added", 80, False)]
        follower.look()
        assert session.said() == []
        follower.change(remove=[named(80, 8000)])
        assert session.said() == [("forward-removed", 80, False), ("forward-added", 80, True)]
        follower.change(unfollow=[other])
        assert session.ports() == [8080] and follower.rules == [] and session.watched == {}
        assert session.said() == [("forward-removed", 80, True), ("forward-removed", 82, True)]


def test_a_change_of_rules_happens_whole_or_not(session: Fake, said: list[str]) -> None:
    mine, theirs = Auto(proto="tcp", owner="me"), Auto(proto="tcp", owner="they", without=frozenset({9}))
    with table(80) as (tables, _), following(session, said, tables) as follower:
        for change, number, text in (
                ({"follow": [Auto(proto="udp")]}, errno.EOPNOTSUPP, "udp auto: what this guest listens on cannot be seen"),
                ({"unfollow": [mine]}, errno.ENOENT, "tcp auto: there is no such rule")):
            with pytest.raises(ForwardError, match=text) as e:
                follower.change([named(8080)], **change)
            assert [f.errno for f in e.value.faults] == [number]
            assert session.held == {} and session.watched == {}
        session.error = "no"
        with pytest.raises(ForwardError, match="no"):
            follower.change([named(8080)], follow=[mine])
        session.error = ""
        assert session.held == {} and session.watched == {} and follower.rules == []
        follower.change(follow=[mine])
        with pytest.raises(ForwardError, match="tcp auto,~9: there is tcp auto already, of owner me"):
            follower.change([named(8080)], follow=[theirs])
        session.error = "no"
        with pytest.raises(ForwardError, match="no"):
            follower.change(unfollow=[mine])
        session.error = ""
        assert follower.rules == [mine] and session.ports() == [80] and len(session.watched) == 1


def test_a_table_that_cannot_be_read_is_said_once(session: Fake, said: list[str]) -> None:
    ours, theirs = os.pipe()  # cannot be sought in: an OSError, as a table might give one
    with table(80) as (tables, _), following(session, said, tables, TCP_AUTO) as follower:
        os.dup2(ours, follower._guest["tcp"])
        (callback,) = session.watched.values()
        for _ in range(2):
            select.select(list(session.watched), [], [])
            callback()
        assert said == ["cannot see the guest's ports: Illegal seek"] and session.ports() == [80]
    os.close(ours)
    os.close(theirs)


def test_a_port_the_host_has_by_ipv6_alone_is_not_taken(session: Fake, said: list[str]) -> None:
    with socket.socket(socket.AF_INET6) as host:
        host.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        host.bind(("::", 0))
        host.listen()
        port = host.getsockname()[1]
        with table(port, 8080) as (tables, _), following(session, said, tables, TCP_AUTO) as follower:
            assert session.ports() == [8080]
            assert ("forward-skipped", port, True) in session.said() and "by IPv6" in said[0]
            host.close()
            follower.look()
            assert session.ports() == sorted([port, 8080])
