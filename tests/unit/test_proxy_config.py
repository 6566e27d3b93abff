"""Proxy settings: URLs, the environment, exceptions; and that no text shows a password (pipeline/proxies.py)."""
from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli, egress, proxies
from pipeline.config import ConfigError, load_toml, make, stage_configs
from pipeline.proxies import Bypass, ProxyError, chosen, parse_bypass, parse_url, plan, redacted
from shm._dataplane import lib

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(("url", "want"), [
    ("http://proxy.example:3128", ("http", "proxy.example", 3128, "", "")),
    ("http://proxy.example", ("http", "proxy.example", 80, "", "")),
    ("http://proxy.example:3128/", ("http", "proxy.example", 3128, "", "")),
    ("proxy.example:3128", ("http", "proxy.example", 3128, "", "")),
    ("socks5://192.0.2.1", ("socks5", "192.0.2.1", 1080, "", "")),
    ("socks5h://u:p%40w%3A@[2001:db8::1]:9", ("socks5", "2001:db8::1", 9, "u", "p@w:")),
    ("SOCKS5://u@h:1", ("socks5", "h", 1, "u", "")),
])
def test_urls(url: str, want: tuple[str, str, int, str, str]) -> None:
    s = parse_url(url)
    assert (s.kind, s.host, s.port, s.user, s.password) == want


@pytest.mark.parametrize("url", [
    f"https://u:{SECRET}@h:1", f"socks4://u:{SECRET}@h:1", f"http://u:{SECRET}@h:99999", f"http://u:{SECRET}@h:x",
    f"http://u:{SECRET}@:1", f"http://u:{SECRET}@h:1/path", f"http://u:{SECRET}@h:1?q", f"http://u:{SECRET}/x@h:1",
    f"http://:{SECRET}@h:1", f"http://u%3A:{SECRET}@h:1", f"socks5://u:{SECRET}{'x' * 255}@h:1", f"u:{SECRET}@h:0",
    f"http://u:{SECRET}@[::1:1", f"socks5://u:{SECRET}#@h:1",
])
def test_what_is_no_proxy_url_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(ProxyError) as e:
        parse_url(url)
    assert SECRET not in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="^--proxy ") as e2:
        make({"proxy": url})
    assert SECRET not in str(e2.value)


@given(st.text(max_size=40))
def test_any_text_is_a_url_or_a_refusal(text: str) -> None:
    try:
        s = parse_url(text)
    except ProxyError:
        return
    assert s.host and 1 <= s.port <= 65535


def test_repr_shows_no_password() -> None:
    s = parse_url(f"http://u:{SECRET}@h:1")
    assert SECRET not in repr(s) + str(s) + repr(plan(f"http://u:{SECRET}@127.0.0.1:1", (), "auto", {}))
    assert redacted(f"http://u:{SECRET}@h:1") == "http://***@h:1"


@pytest.mark.parametrize(("words", "want"), [
    (["Host.Example", ".suffix.example", "*.star.example"],
     Bypass(names=("host.example", ".suffix.example", ".star.example"))),
    (["192.0.2.1", "198.51.100.7/24", "2001:db8::/32", "[::1]"],
     Bypass(networks=("192.0.2.1/32", "198.51.100.0/24", "2001:db8::/32", "::1/128"))),
    (["*"], Bypass(everything=True)),
    (["localhost", "a_b.example."], Bypass(names=("localhost", "a_b.example"))),
])
def test_exceptions(words: list[str], want: Bypass) -> None:
    assert parse_bypass(words) == want


@pytest.mark.parametrize("word", ["", "a\tb", "a$", "192.0.2.1/33", "1.2.3", "host:80", "a..b", "-x", "http://h",
                                  "x" * 64, "a*b"])
def test_what_is_no_exception_is_named(word: str) -> None:
    with pytest.raises(ProxyError):
        parse_bypass([word])
    if word and "\t" not in word:
        with pytest.raises(ConfigError, match="^--no-proxy "):
            make({"no-proxy": [word]})


def test_the_environments_exceptions_are_read_as_others_read_them() -> None:
    """A name and all below it; what is not understood goes through the proxy."""
    _, bypass = proxies.from_environment({"NO_PROXY": "example.com, .org.example 10.0.0.0/8,host:80,,1.2.3"})
    assert bypass == Bypass(networks=("10.0.0.0/8",),
                            names=("example.com", ".example.com", "org.example", ".org.example"))


def test_the_environment() -> None:
    env = {"HTTP_PROXY": "http://a:1", "https_proxy": "http://b:2", "HTTPS_PROXY": "http://wrong:2",
           "ALL_PROXY": "socks5://c:3"}
    servers, _ = chosen("auto", (), env)
    assert [(s.host, s.only_port) for s in servers] == [("a", 80), ("b", 443), ("c", 0)]
    assert chosen("auto", (), {})[0] == ()
    assert chosen("none", (), env)[0] == ()
    with pytest.raises(ProxyError, match="^HTTPS_PROXY=.*socks4"):
        chosen("auto", (), {"HTTPS_PROXY": "socks4://h:1"})


@pytest.mark.parametrize(("proxy", "how", "block"), [
    ("socks5://127.0.0.1:1", "auto", True), ("http://127.0.0.1:1", "auto", True), ("auto", "auto", False),
    ("socks5://127.0.0.1:1", "direct", False), ("auto", "block", True)])
def test_udp_without_a_proxy(proxy: str, how: str, block: bool) -> None:
    p = plan(proxy, (), how, {"ALL_PROXY": "socks5://127.0.0.1:1"})
    assert p is not None and p.udp_block is block


@pytest.mark.parametrize("given_", [{}, {"proxy": "none"}, {"proxy": "auto"},
                                    {"proxy": "http://127.0.0.1:1", "no-proxy": ["*"]}])
def test_nothing_to_do(given_: dict[str, object]) -> None:
    made = stage_configs(make(given_), link_kind="tap", vnet=True)
    assert made["egress"]["proxy"] is None and made["services"]["learn_names"] is False


def test_a_proxys_name_is_resolved_for_egress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", f"socks5://u:{SECRET}@localhost:1")
    made = stage_configs(make({"proxy": "auto", "no-proxy": [".a,b", "10.0.0.0/8"]}), link_kind="tap", vnet=True)
    cfg = msgspec.msgpack.decode(msgspec.msgpack.encode(made["egress"]), type=egress.Config)
    (server,) = cfg.proxy.servers
    assert server.host in ("127.0.0.1", "::1") and (server.user, server.password) == ("u", SECRET)
    assert cfg.proxy.bypass == Bypass(networks=("10.0.0.0/8",), names=(".a", "b"))
    assert made["services"]["learn_names"] is True
    assert SECRET not in repr(cfg)


def test_a_name_without_an_address_is_told() -> None:
    s = make({"proxy": "http://no-such-host.invalid:1"})
    with pytest.raises(ConfigError, match="^--proxy no-such-host.invalid: "):
        stage_configs(s, link_kind="tap", vnet=True)


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('proxy = "socks5://u:p@127.0.0.1:1"\nno-proxy = [".example"]\nudp-without-proxy = "direct"\n')
    s = make(load_toml(str(file)))
    assert (s.no_proxy, s.udp_without_proxy) == ((".example",), "direct")


@pytest.mark.parametrize(("url", "warned"), [(f"http://u:{SECRET}@127.0.0.1:1", True), ("http://127.0.0.1:1", False),
                                             ("socks5://u@127.0.0.1:1", False)])
def test_a_password_on_the_command_line_is_warned_of(url: str, warned: bool,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    cli.settings_from(cli.parser().parse_args(["run", "--proxy", url]))
    err = capsys.readouterr().err
    assert ("--config" in err) is warned and SECRET not in err


def test_a_file_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.toml"
    file.write_text(f'proxy = "http://u:{SECRET}@127.0.0.1:1"\n')
    cli.settings_from(cli.parser().parse_args(["run", "--config", str(file)]))
    assert capsys.readouterr().err == ""


def test_limits_are_the_data_planes() -> None:
    assert proxies.BYPASS_MAX == lib.PROXY_BYPASS_MAX
    assert len(proxies.VARIABLES) <= lib.PROXY_SERVERS
