"""Policy rules: what is read and refused, what the switches stand for, and the data plane's verdicts against a plain
model of "the first rule that fits"."""
from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError, load_toml, make, stage_configs
from pipeline.messages import PACKET_MAX, PolicyChange, encode
from pipeline.policy import (
    METADATA,
    PROTOS,
    RULES_MAX,
    WAYS,
    PolicyBook,
    PolicyError,
    PolicyRule,
    effective,
    entries,
    parse,
    parse_all,
)
from shm._dataplane import ffi, lib
from tests.harness import EgressOnly

BOTH, ALL = ("out", "in"), ("tcp", "udp", "icmp")
NUMBER = {"tcp": 6, "udp": 17, "icmp": 1}


def rule(text: str, action: str, ways: tuple = BOTH, protos: tuple = ALL, networks: tuple = (), ports: tuple = ()
         ) -> PolicyRule:
    return PolicyRule(text=text, action=action, ways=ways, protos=protos,  # type: ignore[arg-type]
                      networks=networks, ports=ports)


@pytest.mark.parametrize(("text", "want"), [
    ("deny", {"action": "deny"}),
    ("allow out", {"action": "allow", "ways": ("out",)}),
    ("deny  out  10.0.0.0/8", {"action": "deny", "ways": ("out",), "networks": ("10.0.0.0/8",)}),
    ("deny udp,tcp any port 25,465-467", {"action": "deny", "protos": ("tcp", "udp"), "ports": ((25, 25), (465, 467))}),
    ("deny in 127.0.0.1,2001:DB8::/32", {"action": "deny", "ways": ("in",),
                                          "networks": ("127.0.0.1/32", "2001:db8::/32")}),
    ("deny port 53", {"action": "deny", "protos": ("tcp", "udp"), "ports": ((53, 53),)}),
    ("allow out icmp 192.0.2.9/24", {"action": "allow", "ways": ("out",), "protos": ("icmp",),
                                     "networks": ("192.0.2.0/24",)}),
])
def test_rules(text: str, want: dict[str, Any]) -> None:
    assert parse(text) == rule(text, **want)


@pytest.mark.parametrize(("text", "names"), [
    ("", "begins with allow or deny"), ("block 10.0.0.0/8", "begins with allow or deny"),
    ("deny 10.0.0.0/33", "10.0.0.0/33"), ("deny out example.org", "example.org"), ("deny out 10.0.0.0/8,", "nothing"),
    ("deny port", "nothing after port"), ("deny port 0", "0: expected a port"), ("deny port 70000", "70000"),
    ("deny port 9-8", "ends before"), ("deny port 5-", "expected a port"), ("deny tcp out", "out: expected a network"),
    ("deny out tcp any 22", "22: expected the end"), ("deny any port 22 now", "now: expected the end"),
    ("deny icmp any port 1", "icmp has no ports"), ("deny in icmp", "goes out only"),
    ("deny out 127.0.0.1", "gateway's address"),
])
def test_errors_name_the_bad_part(text: str, names: str) -> None:
    with pytest.raises(PolicyError) as e:
        parse(text)
    assert names in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="^--policy ") as e2:
        make({"policy": [text]})
    assert names in str(e2.value)


WORDS = st.sampled_from(["allow", "deny", "out", "in", "tcp", "udp,icmp", "any", "10.0.0.0/8", "::/0", "port", "1-9", ","])


@given(st.text(max_size=30) | st.lists(WORDS, max_size=7).map(" ".join))
def test_any_text_is_a_rule_or_one_line(text: str) -> None:
    try:
        read = parse(text)
    except PolicyError as e:
        assert "\n" not in str(e) or "\n" in text
    else:
        assert parse(read.text) == read and 1 <= read.size() <= RULES_MAX


def test_rules_are_bounded() -> None:
    most = RULES_MAX - len(METADATA) - 1
    many = ",".join(str(ipaddress.IPv4Address(n)) for n in range(1, most + 1))
    assert parse_all([f"deny {many}"])[0].size() == most
    with pytest.raises(PolicyError, match=f"at most {most}"):
        parse_all([f"deny {many}", "deny"])
    assert lib.POLICY_RULES_MAX == RULES_MAX
    assert [1 << n for n, _ in enumerate(WAYS)] == [lib.POLICY_OUT, lib.POLICY_IN]
    assert [1 << n for n, _ in enumerate(PROTOS)] == [lib.POLICY_TCP, lib.POLICY_UDP, lib.POLICY_ICMP]
    largest = entries(parse_all([f"deny 2001:db8::{n:x} port 65534" for n in range(most)]), (1 << 31) - most)
    assert len(encode(PolicyChange(seq=1 << 40, entries=largest))) < PACKET_MAX * 3 // 4  # with a Configure around it too


def test_a_refusal_names_the_rule_that_held_when_it_was_made() -> None:
    book = PolicyBook(parse_all(["deny 192.0.2.1", "deny 192.0.2.2"]))
    assert [book.text(n) for n in (-1, 0, 1, 2)] == ["", "deny 192.0.2.1", "deny 192.0.2.2", ""]
    refused, _ = book.plan(parse_all(["deny 192.0.2.9"]))  # egress said no to this one
    later = parse_all(["deny 192.0.2.3"])
    first, told = book.plan(later)
    assert first > refused and [e.name for e in told] == [first]
    book.commit(later, first)
    assert [book.text(n) for n in (0, 1, first, first + 1)] == ["deny 192.0.2.1", "deny 192.0.2.2", "deny 192.0.2.3", ""]
    assert book.entries() == told


def test_the_switches_come_first_and_are_rules_of_egress(tmp_path: Path) -> None:
    s = make({"no-metadata": True, "no-host-loopback": True, "policy": ["allow", "deny out 192.0.2.0/24"]})
    texts = [r.text for r in s.policy_rules()]
    assert texts == ["--no-host-loopback", "--no-metadata", "allow", "deny out 192.0.2.0/24"]
    assert stage_configs(s, link_kind="dgram", vnet=False)["egress"]["policy"] == entries(s.policy_rules())
    assert make({}).policy_rules() == ()
    file = tmp_path / "c.toml"
    file.write_text('policy = ["deny out tcp any port 25"]\nno-metadata = true\n')
    assert [r.text for r in make(load_toml(str(file)), strict=True).policy_rules()] == ["--no-metadata",
                                                                                    "deny out tcp any port 25"]


@pytest.mark.parametrize("address", ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "fe80::a9fe:a9fe",
                                     "100.100.100.200"])
def test_metadata_addresses(address: str) -> None:
    (only,) = effective([], no_metadata=True, no_host_loopback=False, gateway="10.0.2.1")
    nets = [ipaddress.ip_network(n) for n in only.networks]
    assert any(ipaddress.ip_address(address) in n for n in nets)
    with EgressOnly(policy=("deny out " + ",".join(METADATA),)) as guest:
        for proto in ALL:
            assert verdict(guest, "out", proto, address, 80) == 0
            assert verdict(guest, "out", proto, "192.0.2.1", 80) == verdict(guest, "in", proto, address, 80) == -1


# --- the data plane


def mapped(address: str) -> bytes:
    a = ipaddress.ip_address(address)
    return a.packed if a.version == 6 else b"\0" * 10 + b"\xff\xff" + a.packed


def verdict(guest: EgressOnly, way: str, proto: str, address: str, port: int) -> int:
    return lib.stage_egress_policy_verdict(guest._stage, {"out": lib.POLICY_OUT, "in": lib.POLICY_IN}[way],
                                           NUMBER[proto], mapped(address), port)


def model(rules: tuple[PolicyRule, ...], way: str, proto: str, address: str, port: int) -> int:
    for n, r in enumerate(rules):
        if way in r.ways and proto in r.protos and (not r.ports or any(a <= port <= b for a, b in r.ports)) and (
                not r.networks or any(ipaddress.ip_address(address) in ipaddress.ip_network(x) for x in r.networks)):
            return n if r.action == "deny" else -1
    return -1


ADDRESSES = ["10.0.0.1", "10.255.255.255", "11.0.0.0", "192.0.2.7", "169.254.1.1", "::1", "2001:db8::1", "fe80::1",
             "::ffff:ffff:ffff:ffff"]
NETS = ["any", "0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.0/9", "10.0.0.1", "192.0.2.0/29", "2001:db8::/33", "fe80::/10",
        "::/1", "10.0.0.0/8,2001:db8::1", "128.0.0.0/1"]
RULES = st.builds(lambda *w: " ".join(x for x in w if x), st.sampled_from(["allow", "deny"]),
                  st.sampled_from(["", "out", "in"]), st.sampled_from(["", "tcp", "udp", "tcp,udp"]),
                  st.sampled_from(NETS), st.sampled_from(["", "port 22", "port 1-1023", "port 22,80-90,443"]))


@settings(deadline=None, max_examples=60)
@given(st.lists(RULES, max_size=8), st.lists(st.tuples(
    st.sampled_from(BOTH), st.sampled_from(ALL), st.sampled_from(ADDRESSES),
    st.sampled_from([0, 1, 22, 80, 90, 91, 443, 1023, 1024, 65535])), max_size=60))
def test_verdicts_are_the_first_rule_that_fits(texts: list[str], asked: list[tuple[str, str, str, int]]) -> None:
    rules = parse_all(texts)
    with EgressOnly(policy=tuple(texts), small=64, large=4, flows=16) as guest:
        for _ in range(2):  # once looked up, once remembered
            for question in asked:
                assert verdict(guest, *question) == model(rules, *question), (texts, question)


def test_more_destinations_than_are_remembered() -> None:
    with EgressOnly(policy=("allow out 10.0.0.0/9", "deny out 10.0.0.0/8")) as guest:
        for _ in range(2):
            for n in range(5000):
                address = str(ipaddress.IPv4Address((10 << 24) + n * 3355))
                assert verdict(guest, "out", "udp", address, n) == (-1 if n * 3355 < 1 << 23 else 1)


@pytest.mark.parametrize("wrong", [{"prefix": 129}, {"ways": 0}, {"protos": 0}, {"port_min": 2, "port_max": 1},
                                   {"name": 1 << 31}])
def test_rules_that_say_nothing_leave_the_old_ones(wrong: dict[str, int]) -> None:
    good = {"prefix": 96, "net": mapped("0.0.0.0"), "port_max": 65535, "ways": 3, "protos": 7, "deny": 1}
    with EgressOnly(policy=("deny out 192.0.2.1",)) as guest:
        assert lib.stage_egress_policy(guest._stage, ffi.new("struct policy_rule[]", [good, good | wrong]), 2) < 0
        assert verdict(guest, "out", "tcp", "192.0.2.1", 1) == 0 and verdict(guest, "out", "tcp", "10.0.0.1", 1) == -1
        assert lib.stage_egress_policy(guest._stage, ffi.new("struct policy_rule[]", [good]), 1) == 0
        assert verdict(guest, "out", "tcp", "10.0.0.1", 1) == 0
        assert lib.stage_egress_policy(guest._stage, ffi.NULL, RULES_MAX + 1) < 0
        assert lib.stage_egress_policy(guest._stage, ffi.NULL, 0) == 0
        assert verdict(guest, "out", "tcp", "10.0.0.1", 1) == -1
