"""--nic2 and --route: what they say, and that what is wrong is named."""
from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError, make, stage_configs
from pipeline.nic2 import (
    STORM,
    Facts,
    Nic2,
    Nic2SyntaxError,
    check_mac,
    generated_mac,
    guest_address,
    parse,
    parse_route,
)


def test_what_the_words_mean() -> None:
    assert parse("shared") == Nic2(mode="shared") and parse("shared").network == "shared"
    assert parse("host,name=lab,subnet=10.9.0.1/20,isolate,mac=02:AB:cd:00:00:01,mtu=9000,ifname=eth1,storm=0") == Nic2(
        mode="host", name="lab", subnet="10.9.0.1/20", isolate=True, mac="02:ab:cd:00:00:01", mtu=9000, ifname="eth1",
        storm=0)
    assert parse("bridged,if=br0,isolate") == Nic2(mode="bridged", interface="br0", isolate=True)
    assert parse("socket,path=/run/x.sock") == Nic2(mode="socket", path="/run/x.sock", storm=STORM)


@pytest.mark.parametrize(("text", "says"), [
    ("", "nothing is no mode; there are shared, host, bridged, socket"),
    ("nat", "nat is no mode"),
    ("shared,", "nothing is none of name="),
    ("shared,nat", "nat is none of"),
    ("shared,mtu=1500,mtu=1500", "mtu twice"),
    ("shared,name=UPPER", "name=UPPER: not a network's name"),
    ("shared,name=abcdefghijk", "name=abcdefghijk"),
    ("shared,name=a-", "name=a-"),
    ("shared,mac=zz:00:00:00:00:01", "mac=zz:00:00:00:00:01: not a MAC address"),
    ("shared,mac=03:00:00:00:00:01", "multicast or zero"),
    ("shared,mac=00:00:00:00:00:00", "multicast or zero"),
    ("shared,mtu=575", "mtu=575: not within 576..65520"),
    ("shared,mtu=1e3", "mtu=1e3"),
    ("shared,storm=-1", "storm=-1"),
    ("shared,subnet=192.168.70.0/24", "is the network itself; give the host's address in it, like 192.168.70.1/24"),
    ("shared,subnet=192.168.70.1", "prefix length 32 is out of range 16..30"),
    ("shared,subnet=10.0.0.1/8", "prefix length 8"),
    ("shared,subnet=224.0.0.1/24", "not an address for a host"),
    ("shared,subnet=x", "subnet=x: not an address"),
    ("shared,ifname=a/b", "ifname=a/b: not the name"),
    ("bridged", "say which bridge or interface"),
    ("shared,if=br0", "if= says nothing about mode shared"),
    ("bridged,if=br0,name=lab", "name= says nothing about mode bridged"),
    ("socket", "say where the helper listens"),
    ("socket,path=", "not the path of a socket"),
    ("socket,path=/x,isolate", "isolate says nothing"),
    ("socket,path=/x,mtu=9199", "over 9198"),
])
def test_wrong_words_are_one_line_and_named(text: str, says: str) -> None:
    with pytest.raises(Nic2SyntaxError) as e:
        parse(text)
    assert says in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match=r"^--nic2 "):
        make({"nic2": text} if text else {"nic2": ","})


@pytest.mark.parametrize(("routes", "nic2", "says"), [
    (["172.16.0.0/12"], "", "there is no second interface"),
    (["172.16.0.1/12"], "shared", "has host bits set"),
    (["x"], "shared", "not a network"),
    (["0.0.0.0/0"], "shared", "not a network to be routed"),
    (["172.16.0.0/12@y"], "shared", "y is not an IPv4 address"),
    (["172.16.0.0/12", "172.20.0.0/16"], "shared", "--route 172.20.0.0/16: overlaps"),
    (["172.16.0.0/12"], "socket,path=/x", "made by somebody else"),
])
def test_routes_that_cannot_be(routes: list[str], nic2: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        make({"route": routes} | ({"nic2": nic2} if nic2 else {}))


def test_a_route() -> None:
    assert parse_route("172.16.0.0/12").via is None
    assert parse_route("10.4.0.0/16@192.168.1.9").via == ipaddress.IPv4Address("192.168.1.9")


def test_the_two_interfaces_have_two_names() -> None:
    with pytest.raises(ConfigError, match="is the first interface's name"):
        make({"nic2": "shared,ifname=tap0"})


@given(st.text(max_size=40) | st.from_regex(r"(shared|host|bridged|socket)(,[a-z]{2,6}=?[0-9a-z:./]{0,20}){0,3}", fullmatch=True))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert parse(text).mode == text.split(",")[0]
    except Nic2SyntaxError as e:
        assert "\n" not in str(e).replace(text, "")


@given(st.lists(st.text(max_size=8), max_size=3))
def test_generated_addresses_are_local_unicast_and_the_same_again(parts: list[str]) -> None:
    mac = generated_mac(*parts)
    assert check_mac(mac) == mac == generated_mac(*parts)
    assert int(mac[:2], 16) & 3 == 2


@given(st.integers(16, 30), st.integers(0, 6))
def test_every_guest_gets_an_address_of_its_own_until_there_is_none(prefix: int, extra: int) -> None:
    net = ipaddress.IPv4Network((0x0A090000, prefix))
    host = ipaddress.IPv4Interface((net.network_address + 1, prefix))
    usable = net.num_addresses - 3  # without the host's
    taken: set[ipaddress.IPv4Address] = set()
    for n in range(min(usable, 8) + (extra if usable <= 8 else 0)):
        mac = generated_mac(str(n))
        found = guest_address(host, mac, taken)
        if len(taken) == usable:
            assert found is None
            return
        assert found is not None and found in net and found not in taken and found != host.ip
        assert found not in (net.network_address, net.broadcast_address)
        assert found == guest_address(host, mac, taken)
        taken.add(found)


def test_stages_are_told_only_if_there_is_one() -> None:
    from pipeline.config import SecondNic

    assert "vmnet" not in stage_configs(make({}), link_kind="tap", vnet=True)
    second = SecondNic(facts=Facts(mac="02:00:00:00:00:01", mtu=1500), guest_kind="tap", guest_vnet=True, host_kind="dgram",
                       host_vnet=False, guest_uso=True, host_uso=False, storm=7, row=5)
    made = stage_configs(make({}), link_kind="tap", vnet=True, second=second)
    assert made["vmnet"] == {"type": "vmnet", "link_kind": "dgram", "vnet": False, "uso": False, "frame_max": 1518, "storm": 7}
    assert made["guest_tx"]["nic2"] == {"link_kind": "tap", "vnet": True, "frame_max": 1518, "unfinished": 0, "uso": True}
    assert made["guest_rx"]["nic2"]["producer"] == 5
