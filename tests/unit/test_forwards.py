"""The grammar of forwards: passt's, with errors that name the bad part."""
from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError, load_toml, make, stage_configs
from pipeline.forwards import Forward, ForwardError, ForwardSyntaxError, check, parse, parse_all, render
from pipeline.listeners import PART, Listeners, bind
from pipeline.messages import FDS_MAX, ForwardsChange, Rule, decode, encode

OUTGOING = range(32768, 61000)


def pairs(spec: str) -> list[tuple[int, int]]:
    return [(f.host_port, f.guest_port) for f in parse(spec, "tcp", outgoing=OUTGOING)]


@pytest.mark.parametrize(("spec", "want"), [
    ("none", []),
    ("22", [(22, 22)]),
    ("22:23", [(22, 23)]),
    ("22,25", [(22, 22), (25, 25)]),
    ("22-25", [(n, n) for n in range(22, 26)]),
    ("22-24:32-34", [(22, 32), (23, 33), (24, 34)]),
    ("2000-2005,~2001-2003", [(2000, 2000), (2004, 2004), (2005, 2005)]),
    ("~2001,2000-2002:3000-3002", [(2000, 3000), (2002, 3002)]),
    ("80:8080,443:8443", [(80, 8080), (443, 8443)]),
    ("1", [(1, 1)]),
    ("65535", [(65535, 65535)]),
])
def test_passts_examples(spec: str, want: list[tuple[int, int]]) -> None:
    assert pairs(spec) == want
    assert not any(f.optional for f in parse(spec, "tcp"))


@pytest.mark.parametrize(("spec", "address", "interface"), [
    ("192.0.2.1/22", "192.0.2.1", ""), ("192.0.2.1%eth0/22", "192.0.2.1", "eth0"), ("%eth0/22", "", "eth0"),
    ("0.0.0.0/22", "0.0.0.0", ""), ("192.0.2.1/20-30,~25", "192.0.2.1", ""), ("[::1]/22", "::1", ""), ("::/22", "::", ""),
    ("[2001:DB8::1]%eth0/22", "2001:db8::1", "eth0"),
])
def test_where_to_listen(spec: str, address: str, interface: str) -> None:
    found = parse(spec, "udp", owner="me")
    assert found
    assert {(f.host_addr, f.ifname, f.proto, f.owner) for f in found} == {(address, interface, "udp", "me")}


@pytest.mark.parametrize(("spec", "without"), [("all", set()), ("~20000-20010", set(range(20000, 20011)))])
def test_all_is_what_connections_of_the_host_do_not_use(spec: str, without: set[int]) -> None:
    found = parse(spec, "tcp", outgoing=OUTGOING)
    assert {f.host_port for f in found} == set(range(1, 65536)) - set(OUTGOING) - without
    assert all(f.optional and f.guest_port == f.host_port for f in found)


@pytest.mark.parametrize(("spec", "names"), [
    ("", "expected a port"), ("x", "x: expected a port, 1..65535"), ("0", "0: expected a port"),
    ("65536", "65536: expected a port"), ("22,", "expected a port"), ("22:x", "22:x: x: expected a port"),
    ("80:", "80:: expected a port"), ("5-3", "5-3: the range ends before it begins"),
    ("1-3:4-5", "1-3:4-5: 3 ports to 2"), ("22,20-30", "20-30: port 22 twice"), ("1.2.3/4", "1.2.3: not an address"),
    ("[::1/22", "[::1: not an address"), ("[ff02::1]/22", "not an address of a host"), ("/22", "nothing before the /"),
    ("[::ffff:192.0.2.1]/22", "say 192.0.2.1"), ("[fe80::1%eth0]/22", "[fe80::1: not an address"),
    ("%/22", "no interface after the %"), ("%abcdefghijklmnop/22", "abcdefghijklmnop: not an interface name"),
    ("224.0.0.1/22", "not an address of a host"), ("auto", "auto: no list of ports"),
    ("22,all", "all: cannot be combined"), ("22,none", "none: cannot be combined"), ("~5:6", "~5:6: what is left out"),
    ("22 ", "22 : expected a port"), ("²", "expected a port"), ("-5", "expected a port"), ("5-", "expected a port"),
    ("99999999999999999999", "expected a port"), ("1/2/3", "1/2: not an address"),
])
def test_errors_name_the_bad_part(spec: str, names: str) -> None:
    with pytest.raises(ForwardSyntaxError) as e:
        parse(spec, "tcp")
    assert names in str(e.value)
    assert str(e.value).startswith(f"{spec}: ")
    assert "\n" not in str(e.value)


@given(st.text(alphabet="0123456789,:-~%/.alnoeut", max_size=30))
def test_any_text_is_rules_or_one_line(text: str) -> None:
    try:
        found = parse(text, "tcp", outgoing=OUTGOING)
    except ForwardSyntaxError as e:
        assert str(e).startswith(f"{text}: ") and "\n" not in str(e)
    else:
        assert all(check(f) == f for f in found)
        assert len({f.endpoint for f in found}) == len(found)


ADDRESS = st.just("") | st.ip_addresses(v=4).map(str).filter(lambda a: int(a.split(".")[0]) < 224) | st.ip_addresses(
    v=6).filter(lambda a: not a.is_multicast and a.ipv4_mapped is None).map(str)
PORTS = st.dictionaries(st.integers(1, 65535), st.integers(1, 65535), min_size=1, max_size=30)


@given(ADDRESS, st.sampled_from(["", "eth0", "a.b"]), PORTS)
def test_rendered_rules_are_parsed_again(address: str, ifname: str, ports: dict[int, int]) -> None:
    rules = [Forward(proto="udp", host_addr=address, ifname=ifname, host_port=p, guest_port=ports[p])
             for p in sorted(ports)]
    assert parse(render(rules), "udp") == rules


@given(st.integers(1, 65000), st.integers(1, 400), st.integers(1, 65000))
def test_runs_are_rendered_as_ranges(first: int, count: int, target: int) -> None:
    count = min(count, 65536 - max(first, target))
    rules = [Forward(proto="tcp", host_port=first + n, guest_port=target + n) for n in range(count)]
    assert "," not in render(rules)
    assert parse(render(rules), "tcp") == rules


def test_a_named_port_wins_over_all() -> None:
    found = {f.host_port: f for f in parse_all({"tcp": ["all", "22:23"], "udp": ["53"]})}
    assert (found[22].guest_port, found[22].optional) == (23, False)
    assert len(found) == len(parse("all", "tcp"))


@pytest.mark.parametrize(("given_", "names"), [
    ({"tcp-ports": ["22", "20-30"]}, "--tcp-ports 20-30: 22: port 22 twice"),
    ({"tcp-ports": ["none", "22"]}, "--tcp-ports none: cannot be combined"),
    ({"udp-ports": ["x"]}, "--udp-ports x: x: expected a port"),
    ({"tcp-ports": "22"}, "--tcp-ports 22: expected a list"),
])
def test_options_are_checked(given_: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError) as e:
        make(given_)
    assert str(e.value).startswith(names.split(":")[0]) and names.split(": ", 1)[1] in str(e.value).lower()


@pytest.mark.parametrize("toml", [False, True])
def test_options_make_rules(toml: bool, tmp_path: Path) -> None:
    given_ = {"tcp-ports": ["8080:80"], "udp-ports": ["53"], "forward-as-gateway": True}
    if toml:
        file = tmp_path / "session.toml"
        file.write_text('tcp-ports = ["8080:80"]\nudp-ports = ["53"]\nforward-as-gateway = true\n')
        given_ = load_toml(str(file))
    s = make(given_, strict=toml)
    assert [str(f) for f in s.forwards()] == ["tcp 8080:80", "udp 53"]
    assert {f.owner for f in s.forwards()} == {"options"}
    assert stage_configs(s, link_kind="dgram", vnet=False)["egress"]["forward_as_gateway"]


# --- sockets of the host side


def test_a_change_is_bound_at_once_and_undone_at_once() -> None:
    listeners = Listeners()
    change = listeners.prepare([Forward(proto="tcp", host_addr="127.0.0.1", host_port=0, guest_port=1)], [])
    [made] = change.forwards
    assert made.host_port and listeners.forwards() == []
    socket.create_connection(("127.0.0.1", made.host_port)).close()
    change.abort()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", made.host_port))


def test_a_host_without_ipv6_has_ipv4_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def no_ipv6(family: int = -1, *args: Any, **more: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *args, **more)

    monkeypatch.setattr(socket, "socket", no_ipv6)
    for proto in ("tcp", "udp"):
        with bind(Forward(proto=proto, host_port=0, guest_port=1)) as sock:
            assert sock.family == socket.AF_INET and sock.getsockname()[0] == "0.0.0.0"
        with pytest.raises(OSError, match="not supported"):
            bind(Forward(proto=proto, host_addr="::1", host_port=0, guest_port=1))


@pytest.mark.parametrize(("address", "family", "only"), [("", socket.AF_INET6, 0), ("::", socket.AF_INET6, 1),
                                                         ("::1", socket.AF_INET6, 1), ("0.0.0.0", socket.AF_INET, None)])
def test_families(address: str, family: int, only: int | None) -> None:
    with bind(Forward(proto="tcp", host_addr=address, host_port=0, guest_port=1)) as sock:
        assert sock.family == family
        assert only is None or sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == only


def test_all_skips_what_is_taken() -> None:
    listeners = Listeners()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rules = [Forward(proto="tcp", host_addr="127.0.0.1", host_port=p, guest_port=1, optional=p != 0)
                 for p in (taken.getsockname()[1], 0)]
        change = listeners.prepare(rules, [])
        change.commit()
        assert [f.host_port for f in change.forwards] == [listeners.forwards()[0].host_port]
        assert listeners.forwards()[0].host_port != taken.getsockname()[1]
    listeners.close()


def test_the_same_rule_of_another_owner_keeps_its_listener() -> None:
    listeners = Listeners()
    change = listeners.prepare([Forward(proto="udp", host_addr="127.0.0.1", host_port=0, guest_port=1, owner="a")], [])
    change.commit()
    [a] = listeners.forwards()
    b = Forward(proto="udp", host_addr=a.host_addr, host_port=a.host_port, guest_port=1, owner="b")
    with pytest.raises(ForwardError) as e:
        listeners.prepare([b], [])
    assert e.value.faults[0].errno == errno.EEXIST and "of owner a" in str(e.value)
    change = listeners.prepare([b], [a])
    assert list(change.messages(close_flows=False)) == []  # nothing for egress to do
    change.commit()
    assert listeners.forwards() == [b]
    change = listeners.prepare([], [b])
    change.commit()
    assert listeners.held == {}


def test_a_change_of_any_size_fits_its_messages() -> None:
    assert PART <= FDS_MAX
    listeners = Listeners()
    change = listeners.prepare(
        [Forward(proto="udp", host_addr="127.0.0.1", host_port=0, guest_port=1) for _ in range(2 * PART + 1)], [])
    parts = list(change.messages(close_flows=True))
    assert [p.commit for p, _ in parts] == [False, False, True]
    assert [len(fds) for _, fds in parts] == [p.carries() for p, _ in parts] == [PART, PART, 1]
    assert all(decode(encode(p)) == p for p, _ in parts)
    change.abort()


def test_message() -> None:
    message = ForwardsChange(add=(Rule(rule=1, proto="tcp", guest_addr="", guest_port=80),), remove=(7,), seq=3)
    assert decode(encode(message)) == message
