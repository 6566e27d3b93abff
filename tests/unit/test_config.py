"""Settings: one declaration is the command line, the TOML file, the manual and the stages' configurations."""
from __future__ import annotations

import importlib
import ipaddress
import os
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli, config
from pipeline.config import ConfigError, Settings, load_toml, make, options, options_markdown, stage_configs
from pipeline.topology import TOPOLOGY, Feature
from shm._dataplane import lib


def test_the_defaults_are_the_documented_ones() -> None:
    s = make({})
    assert (s.mtu, s.gateway, s.address, s.network.prefixlen) == (4000, "10.0.2.1", "10.0.2.2", 24)
    assert s.mac.upper() == "02:AB:CD:00:00:01"
    assert config.pool(s) == ("10.0.2.2", "10.0.2.254")


def test_each_option_is_a_flag_a_key_and_a_row_of_the_manual() -> None:
    manual = options_markdown()
    parser = cli.parser()
    for o in options():
        assert f"`--{o.key}`" in manual and f"| `{o.key}` |" in manual
        value = {"hosts": "a=192.0.2.1"}.get(o.key, str(o.default) if isinstance(o.default, int) else "x")
        for flag in [f"--{o.key}", *([f"-{o.flag}"] if o.flag else [])]:
            args = parser.parse_args(["run", flag, *([value] if o.arg else [])])
            assert hasattr(args, o.key)
    flags = [o.flag for o in options() if o.flag]
    assert len(set(flags)) == len(flags)
    # passt's letters, where passt has the option
    assert {o.key: o.flag for o in options() if o.flag} == {
        "mtu": "m", "address": "a", "netmask": "n", "gateway": "g", "dns": "D", "search": "S", "pcap": "p", "pid": "P",
        "ifname": "I", "tcp-ports": "t", "udp-ports": "u", "quiet": "q", "debug": "d"}


NIC1 = TOPOLOGY.only(frozenset({Feature.NIC1}))


@pytest.mark.parametrize("vnet", [True, False])
@pytest.mark.parametrize("name", [s.name for s in NIC1.stages])
def test_each_stage_accepts_what_the_supervisor_will_send(name: str, vnet: bool) -> None:
    s = make({"hosts": {"a.example": "192.0.2.1,2001:db8::1"}, "dns": ["192.0.2.53"], "search": ["x.example"],
              "pcap": "f", "lease-file": "l"})
    made = stage_configs(s, link_kind="tap" if vnet else "dgram", vnet=vnet, dns_path="0001f")
    assert set(made) == {stage.name for stage in NIC1.stages}
    cfg = msgspec.msgpack.decode(msgspec.msgpack.encode(made[name]),
                                 type=importlib.import_module(f"pipeline.{name}").Config)
    assert cfg.__struct_config__.tag == name
    assert cfg.__struct_config__.forbid_unknown_fields and cfg.__struct_config__.frozen


def test_the_frame_limit_is_the_data_planes() -> None:
    header = Path(config.__file__).parent.parent / "csrc" / "rn_layout.h"
    limit = re.search(r"#define RN_FRAME_MAX \((\d+)u \+ RN_ETH_HLEN\)", header.read_text())
    assert limit and config.FRAME_MAX == int(limit[1]) + config.ETH_HLEN
    assert lib.RN_BUF_LARGE > config.FRAME_MAX


@given(st.integers(-10, 70000))
def test_the_mtu_has_its_bounds(mtu: int) -> None:
    if 576 <= mtu <= 65520:
        assert make({"mtu": str(mtu)}).mtu == mtu
    else:
        with pytest.raises(ConfigError, match=f"--mtu {mtu}: not within 576..65520"):
            make({"mtu": str(mtu)})


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_addresses_are_accepted_only_if_a_guest_could_use_them(a: int, g: int, prefix: int) -> None:
    """Against a second way to say it: both are hosts of one network of 8..30 bits, and differ."""
    address, gateway = ipaddress.IPv4Address(a), ipaddress.IPv4Address(g)
    network = ipaddress.IPv4Network((a, prefix), strict=False)
    unusable = any(x.is_multicast or x.is_loopback or x.is_unspecified or x >= ipaddress.IPv4Address("240.0.0.0")
                   for x in (address, gateway))
    ends = {network.network_address, network.broadcast_address}
    fine = 8 <= prefix <= 30 and gateway in network and a != g and not unusable and not {address, gateway} & ends
    given_ = {"address": str(address), "gateway": str(gateway), "netmask": str(prefix)}
    if not fine:
        with pytest.raises(ConfigError, match="^--(address|gateway|netmask) "):
            make(given_)
        return
    s = make(given_)
    first, last = map(ipaddress.IPv4Address, config.pool(s))
    assert first <= address <= last
    assert {first, last} <= set(network) if prefix > 20 else first in network and last in network
    assert not {first, last} & (ends | {gateway})
    assert int(last) - int(first) < config.POOL_MAX


@pytest.mark.parametrize("mask", ["255.255.255.0", "24"])
def test_a_netmask_in_both_forms(mask: str) -> None:
    assert make({"netmask": mask}).network == ipaddress.IPv4Network("10.0.2.0/24")


@pytest.mark.parametrize(("given_", "says"), [
    ({"gateway": "10.0.3.1"}, r"--gateway 10\.0\.3\.1: outside the subnet 10\.0\.2\.0/24"),
    ({"address": "10.0.2.300"}, r"--address 10\.0\.2\.300: not an IPv4 address"),
    ({"address": "10.0.2.1"}, "also the gateway's"),
    ({"address": "10.0.2.255"}, "broadcast"),
    ({"gateway": "127.0.0.1", "address": "127.0.0.2"}, "loopback"),
    ({"netmask": "255.0.255.0"}, "--netmask 255.0.255.0: neither"),
    ({"netmask": "31"}, "out of range 8..30"),
    ({"mac": "01:00:5e:00:00:01"}, "multicast"),
    ({"mac": "02:00"}, "not a MAC address"),
    ({"dns": ["resolver.example"]}, "--dns resolver.example: not an IP address"),
    ({"search": ["-x.example"]}, "--search -x.example: not a domain name"),
    ({"hosts": {"a b": "192.0.2.1"}}, "--hosts a b: not a domain name"),
    ({"hosts": {"a": "1.2.3"}}, "1.2.3: not an IP address"),
    ({"ifname": "sixteen-bytes-xx"}, "16 bytes"),
    ({"ifname": "a/b"}, "has no '/'"),
    ({"peek": "guess"}, "--peek guess"),
    ({"bogus": 1}, "--bogus 1: unknown option"),
])
def test_what_is_wrong_is_named(given_: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        make(given_)
    assert "\n" not in str(error.value)


def test_a_file_has_the_same_names(tmp_path: Path) -> None:
    file = tmp_path / "session.toml"
    file.write_text('mtu = 1500\nno-host-loopback = true\ndns = ["192.0.2.53"]\n[hosts]\n"a.example" = "192.0.2.1"\n'
                    'b = ["192.0.2.2", "2001:db8::2"]\n')
    s = make(load_toml(str(file)))
    assert (s.mtu, s.no_host_loopback, s.dns) == (1500, True, ("192.0.2.53",))
    assert s.hosts_table() == {"a.example": ["192.0.2.1"], "b": ["192.0.2.2", "2001:db8::2"]}


@pytest.mark.parametrize(("text", "says"), [
    ("mtu =", "line 1"), ("# c\nmtu = 1\n", r"mtu: not within 576\.\.65520 \(at line 2\)"),
    ("mtu = '1500'", r"mtu: .*whole number.*line 1"), ("\n\nMTU = 1500", r"MTU: unknown option \(at line 3\)"),
    ("[section]\nx = 1", r"section: unknown option \(at line 1\)"), ("dns = 'x'", "dns: .*list"),
    ("hosts = { a = 1 }", r"hosts: .*line 1"), ("mtu = 1500\nmtu = 1500", "line 2"),
])
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        load_toml(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "session.toml"
    file.write_text('mtu = 1500\nifname = "eth9"\n')
    args = cli.parser().parse_args(["run", "--config", str(file), "-m", "9000"])
    s = cli.settings_from(args)
    assert (s.mtu, s.ifname) == (9000, "eth9")


def test_an_error_between_keys_names_the_file_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "session.toml"
    file.write_text('gateway = "10.9.9.1"\n')
    with pytest.raises(ConfigError, match=f"^--config {re.escape(str(file))}: gateway 10.9.9.1: outside"):
        cli.settings_from(cli.parser().parse_args(["run", "--config", str(file)]))


def test_hosts_flags_add_up() -> None:
    args = cli.parser().parse_args(["run", "--hosts", "a=192.0.2.1", "--hosts", "a=192.0.2.2,2001:db8::1"])
    assert cli.settings_from(args).hosts_table() == {"a": ["192.0.2.1", "192.0.2.2", "2001:db8::1"]}


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings().mtu = 1  # type: ignore[misc]


@pytest.mark.parametrize(("text", "says"), [
    ("nobody=0", "no such stage; there are guest_tx"), ("egress=", "nothing: expected a CPU"), ("x", "x: expected a CPU"),
    ("0-", "expected a CPU"), ("egress=1024", "is over 1023"), ("900-1000", "none of these CPUs is ours; there are"),
])
def test_cpus_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make({"cpus": [text]})


def test_cpus_by_stage() -> None:
    first = min(os.sched_getaffinity(0))
    s = make({"cpus": [f"{first}-{first + 2}", f"egress={first}"]})
    assert s.placement() == {"": frozenset(range(first, first + 3)), "egress": frozenset({first})}
