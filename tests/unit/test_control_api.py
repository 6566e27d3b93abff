"""The control API's server: every call, every refusal, and clients that misbehave."""
from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from control import Peer, Server, serving

from pipeline import api, control_api, session_dir
from pipeline.auto_forwards import open_tables
from pipeline.client import Client, ClientError, find
from pipeline.messages import Notices

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sessions of this test only."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("RINGNET_RUNTIME_DIR", str(runtime / "ringnet"))
    monkeypatch.delenv("RINGNET_SESSION", raising=False)
    return runtime / "ringnet"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s.sock", hosts={"db": "192.0.2.1"}) as made:
        yield made


@pytest.fixture
def peer(server: Server) -> Peer:
    return server.peer()


def specs(peer: Peer, owner: str | None = None) -> list[tuple[str, int, int, str]]:
    return [(f["proto"], f["host_port"], f["guest_port"], f["owner"])
            for f in peer.result("forwards.list", owner=owner)["forwards"]]


def names(peer: Peer) -> dict[tuple[str, str], list[str]]:
    return {(n["name"], n["owner"]): n["addresses"] for n in peer.result("hosts.list")["names"]}


# --- calls ---


def test_forwards_by_owner(peer: Peer) -> None:
    assert peer.result("forwards.add", specs=["8080:80", "9000-9002"]) == {"added": 4, "removed": 0}
    assert peer.result("forwards.add", specs=["8080:80"]) == {"added": 0, "removed": 0}  # the same again
    assert peer.result("forwards.add", specs=["53"], proto="udp", owner="c1") == {"added": 1, "removed": 0}
    assert specs(peer, "c1") == [("udp", 53, 53, "c1")]
    assert peer.result("forwards.replace", owner="c1", tcp=["443"], udp=["53"]) == {"added": 1, "removed": 0}
    assert peer.result("forwards.replace", owner="c1", tcp=["444"]) == {"added": 1, "removed": 2}
    assert specs(peer, "c1") == [("tcp", 444, 444, "c1")]
    assert peer.result("forwards.remove", specs=["9001"]) == {"added": 0, "removed": 1}
    assert peer.result("forwards.remove", owner="c1") == {"added": 0, "removed": 1}
    assert [port for _, port, _, _ in specs(peer)] == [8080, 9000, 9002]


def test_a_change_of_forwards_happens_whole_or_not(server: Server, peer: Peer) -> None:
    peer.result("forwards.add", specs=["1000"], owner="other")
    peer.result("forwards.add", specs=["2000"], owner="me")
    before = specs(peer)
    server.session.taken = {3001}
    assert peer.error("forwards.add", specs=["3000", "3001"], owner="me")[0] == "failed"
    assert peer.error("forwards.replace", owner="me", tcp=["3000-3001"])[0] == "failed"
    assert peer.error("forwards.replace", owner="me", tcp=["1000"])[0] == "conflict"
    assert peer.error("forwards.remove", specs=["2000", "2001"])[0] == "not-found"
    assert peer.error("forwards.remove", specs=["2000:1"])[0] == "not-found"
    assert peer.error("forwards.remove", specs=["1000"], owner="me")[0] == "not-found"
    code, text = peer.error("forwards.add", specs=["3000", "x"])
    assert code == "bad-args" and text.startswith("specs: x")
    assert specs(peer) == before


def test_rules_auto(server: Server, peer: Peer) -> None:
    """With this process's own tables of sockets for the guest's."""
    code, text = peer.error("forwards.add", specs=["8080", "auto"])
    assert code == "unsupported" and "that of a virtual machine cannot" in text and specs(peer) == []
    tables = open_tables()
    server.session.follower.see(tables)
    for fd in tables.values():
        os.close(fd)

    def rules(owner: str | None = None) -> list[tuple[str, str, str]]:
        return [(a["proto"], a["spec"], a["owner"]) for a in peer.result("forwards.list", owner=owner)["autos"]]

    def followed() -> set[int]:
        return {f["host_port"] for f in peer.result("forwards.list", owner="c1")["forwards"] if f["auto"]}

    with socket.socket() as listens:  # on every address, and the host's own is not looked at here
        listens.bind(("0.0.0.0", 0))
        listens.listen()
        port = listens.getsockname()[1]
        assert peer.result("forwards.add", specs=["8080:80", "auto,~1-9"], owner="c1") == {"added": 2, "removed": 0}
        assert rules() == [("tcp", "auto,~1-9", "c1")] and rules("c2") == [] and port in followed()
        assert peer.result("forwards.add", specs=["auto,~1-9"], owner="c1") == {"added": 0, "removed": 0}  # the same again
        assert peer.error("forwards.add", specs=["auto"], owner="c2") == (
            "conflict", "tcp auto: there is tcp auto,~1-9 already, of owner c1")
        assert peer.error("forwards.add", specs=["auto", "auto,~5"])[1].startswith("specs: auto,~5: beside auto")
        assert peer.error("forwards.add", specs=["auto,22"])[0] == "bad-args"
        code, text = peer.error("forwards.remove", specs=[str(port)])
        assert code == "conflict" and f"tcp auto,~1-9 follows what the guest listens on; remove that, or leave out the port: auto,~{port}" in text
        assert peer.result("forwards.remove", specs=["~8080"])["removed"] == 0  # what is followed was not named
        assert peer.error("forwards.remove", specs=["auto,~7"])[0] == "not-found"
        assert peer.error("forwards.remove", specs=["auto"], proto="udp")[0] == "not-found"
        assert peer.error("forwards.remove", specs=["auto"], owner="c2")[0] == "not-found"
        assert peer.result("forwards.replace", owner="c1", tcp=[f"auto,~{port}", "8080:80"]) == {"added": 1, "removed": 1}
        assert rules() == [("tcp", f"auto,~{port}", "c1")] and port not in followed()
        assert peer.result("forwards.replace", owner="c1", tcp=["auto"], udp=["auto"]) == {"added": 2, "removed": 2}
        assert rules() == [("tcp", "auto", "c1"), ("udp", "auto", "c1")] and port in followed()
        assert peer.error("forwards.replace", owner="c2", tcp=["auto", "8080"])[0] == "conflict"
        assert peer.result("forwards.remove", specs=["auto"], proto="tcp") == {"added": 0, "removed": 1}
        assert rules() == [("udp", "auto", "c1")] and port not in followed()
        assert peer.result("forwards.remove", owner="c1") == {"added": 0, "removed": 1}
        assert rules() == [] and specs(peer) == []


def test_a_thousand_forwards_in_pages(peer: Peer) -> None:
    peer.result("forwards.add", specs=["10000-11499"])
    first = peer.result("forwards.list")
    second = peer.result("forwards.list", start=first["next"])
    assert (len(first["forwards"]), first["next"], len(second["forwards"]), second["next"]) == (1000, 1000, 500, None)


def test_names_by_owner(server: Server, peer: Peer) -> None:
    assert names(peer) == {("db", "options"): ["192.0.2.1"]}
    peer.result("hosts.add", names={"Web.": ["10.0.2.2"], "db.ringnet.internal": ["10.0.2.3"]}, owner="c1")
    peer.result("hosts.add", names={"web": ["10.0.2.4", "fd00::4"]}, domains=["dev.example"], owner="c2")
    assert names(peer) == {("db", "options"): ["192.0.2.1"], ("db", "c1"): ["10.0.2.3"], ("web", "c1"): ["10.0.2.2"],
                           ("web", "c2"): ["10.0.2.4", "fd00::4"]}
    answered = {n: [str(a) for a in found] for n, found in server.session.table.names().items()}
    assert answered["web"] == answered["web.ringnet.internal"] == ["10.0.2.2", "10.0.2.4", "fd00::4"]
    assert answered["db"] == ["192.0.2.1", "10.0.2.3"]
    assert peer.result("hosts.list")["domains"] == [{"domain": "dev.example", "owner": "c2"}]
    assert peer.result("hosts.replace", owner="c2", names={"api": ["10.0.2.9"]}) == {"added": 1, "removed": 2}
    assert peer.result("hosts.remove", owner="c1") == {"added": 0, "removed": 2}
    assert peer.result("hosts.list")["domains"] == []
    assert set(server.session.table.names()) == {"host.ringnet.internal", "gateway.ringnet.internal", "db",
                                                 "db.ringnet.internal", "api", "api.ringnet.internal"}


@pytest.mark.parametrize(("call", "args", "code"), [
    ("hosts.add", {"names": {"ok": ["10.0.2.2"], "x..y": ["10.0.2.2"]}}, "failed"),
    ("hosts.add", {"names": {"ok": ["10.0.2.2"], "host": ["10.0.2.2"]}}, "failed"),
    ("hosts.add", {"names": {"ok": ["10.0.2.2"], "*": ["10.0.2.2"]}}, "failed"),
    ("hosts.add", {"names": {"ok": ["10.0.2.2"]}, "domains": ["."]}, "failed"),
    ("hosts.add", {"names": {"ok": ["10.0.2.2"]}, "domains": ["ringnet.internal"]}, "failed"),
    ("hosts.add", {"names": {"ok": ["10.0.2.2"], "y": ["10.0.2"]}}, "bad-args"),
    ("hosts.add", {"names": {"ok": ["10.0.2.2"], "y": []}}, "bad-args"),
    ("hosts.add", {"names": {"ok": [f"10.0.3.{n}" for n in range(33)]}}, "failed"),
    ("hosts.replace", {"owner": "options", "names": {"x..y": ["10.0.2.2"]}}, "failed"),
    ("hosts.remove", {"owner": "options", "names": ["db", "ok"]}, "not-found"),
    ("hosts.remove", {"owner": "options", "domains": ["dev.example"]}, "not-found"),
])
def test_a_change_of_names_happens_whole_or_not(server: Server, peer: Peer, call: str, args: dict, code: str) -> None:
    before, table = names(peer), server.session.table.names()
    assert peer.error(call, **args)[0] == code
    assert names(peer) == before and server.session.table.names() == table


def test_many_names_go_to_services_in_parts(server: Server, peer: Peer) -> None:
    for n in range(4):
        peer.result("hosts.add", owner="big", names={f"name-{n}-{i}.example": ["10.0.2.2"] for i in range(1000)})
    server.session.sizes.clear()
    assert peer.result("hosts.remove", owner="big") == {"added": 0, "removed": 4000}
    assert len(server.session.sizes) > 3 and sum(server.session.sizes) == 4000
    assert not any(n.endswith("example") for n in server.session.table.names())


def test_changes_of_names_wait_for_each_other(server: Server) -> None:
    """services is slow: the second client's change is worked out on the outcome of the first's, and others go on."""
    one, two, three = server.peer(), server.peer(), server.peer()
    server.session.hold = True
    one.send(b'{"id":1,"call":"hosts.add","args":{"names":{"a":["10.0.2.2"]},"owner":"o"}}\n')
    two.send(b'{"id":2,"call":"hosts.remove","args":{"names":["a"],"owner":"o"}}\n{"id":3,"call":"status"}\n')
    assert one.idle() and two.idle()
    assert three.result("status")["names"] == 1
    assert len(server.session.asks) == 1
    server.session.answer(1)
    assert one.line()["result"] == {"added": 1, "removed": 0}
    assert two.idle()
    server.session.answer()
    assert [two.line()["id"], two.line()["id"]] == [2, 3]
    assert names(three) == {("db", "options"): ["192.0.2.1"]}


def test_a_client_that_leaves_before_its_answer(server: Server, peer: Peer) -> None:
    server.session.hold = True
    gone = server.peer()
    gone.send(b'{"call":"hosts.add","args":{"names":{"a":["10.0.2.2"]}}}\n')
    assert gone.idle()
    gone.close()
    peer.idle()
    server.session.answer()
    server.session.hold = False
    assert ("a", "") in names(peer)


def test_status_stages_statistics(server: Server, peer: Peer) -> None:
    status = peer.result("status")
    assert (status["session"], status["address"], status["clients"]) == ("s", "10.0.2.2", 1)
    assert [s["name"] for s in peer.result("stages")["stages"]] == [c.decl.name for c in server.session.children]
    statistics = peer.result("statistics")
    assert statistics["counters"]["egress"] == {"frames_in": 1}
    assert {"name": "guest_tx->classify", "fill": 0, "total": 7} in statistics["rings"]
    assert statistics["buffers"] == [
        {"stage": "guest_tx", "kind": "small", "total": 8, "free": 4, "held": {"guest_tx": 1, "egress": 3}},
        {"stage": "guest_tx", "kind": "large", "total": 2, "free": 2, "held": {}},
        {"stage": "services", "kind": "small", "total": 4, "free": 3, "held": {"nobody": 1}}]
    assert statistics["flows"] == {}


def test_flows_close_log_cancel(server: Server, peer: Peer) -> None:
    assert peer.result("flows.list", proto="tcp") == {"flows": [], "next": None}
    assert peer.result("flows.close", flow="3.4") == {}
    assert peer.error("flows.close", flow="3.5") == ("not-found", "flow: 3.5: that flow is gone")
    assert peer.error("flows.close", flow="9999999999.1")[0] == "not-found"
    assert peer.result("log", level="debug") == {} and server.session.level == "debug"
    assert peer.error("cancel", nic="nic2")[0] == "unsupported"
    assert peer.result("cancel") == {}
    assert peer.error("status")[0] == "ending"


def test_policy(server: Server, peer: Peer) -> None:
    other = server.peer()
    other.result("subscribe", events=["policy-changed"])
    server.session.asks.clear()
    assert peer.result("policy.list") == {"rules": [], "denied_out": 0, "denied_in": 0}
    assert peer.result("policy.replace", rules=["deny out tcp 192.0.2.1 port 22,80-89", "allow in"]) == {
        "added": 2, "removed": 0}
    assert other.line()["rules"] == 2
    assert peer.result("policy.list")["rules"] == [
        {"rule": "deny out tcp 192.0.2.1 port 22,80-89", "action": "deny", "ways": ["out"], "protos": ["tcp"],
         "networks": ["192.0.2.1/32"], "ports": ["22", "80-89"]},
        {"rule": "allow in", "action": "allow", "ways": ["in"], "protos": ["tcp", "udp", "icmp"], "networks": [],
         "ports": []}]
    code, text = peer.error("policy.replace", rules=["allow in", "permit"])
    assert code == "bad-args" and text.startswith("rules: permit: a rule begins with")
    assert peer.error("policy.replace")[0] == "bad-args"
    assert peer.result("policy.replace", rules=["allow in"]) == {"added": 0, "removed": 1}
    assert peer.result("policy.replace", rules=[]) == {"added": 0, "removed": 1}
    assert peer.result("policy.list")["rules"] == []


# --- events ---


def test_events(server: Server, peer: Peer) -> None:
    other = server.peer()
    assert not server.session.asks
    assert peer.result("subscribe") == {}
    other.result("subscribe", events=["hosts-changed"])
    server.peer().result("forwards.add", specs=["8080:80"], owner="c")
    got = peer.line()
    assert got.pop("time") > 0
    assert got == {"event": "forward-added", "forward": {
        "proto": "tcp", "host_addr": "", "ifname": "", "host_port": 8080, "guest_addr": "", "guest_port": 80,
        "owner": "c", "auto": False}}
    server.peer().result("hosts.add", names={"a": ["10.0.2.2"]}, owner="c")
    assert {**peer.line(), "time": 0} == {**other.line(), "time": 0} == {
        "event": "hosts-changed", "owner": "c", "added": 1, "removed": 0, "time": 0}
    assert peer.result("subscribe", events=[]) == {}
    server.session.tell(api.StageChanged(stage="egress", state="gone", pid=1))
    assert peer.idle() and other.idle()


def test_stages_tell_only_while_somebody_listens(server: Server) -> None:
    server.session.hold = True
    one, two = server.peer(), server.peer()
    one.result("subscribe", events=["stage"])
    assert not server.session.asks
    one.result("subscribe", events=["lease-given"])
    two.result("subscribe")
    assert [(s, a) for s, a, _ in server.session.asks] == [("egress", Notices(on=True)), ("services", Notices(on=True))]
    server.session.asks.clear()
    one.close()
    assert two.idle() and not server.session.asks
    two.result("subscribe", events=[])
    assert [a for _, a, _ in server.session.asks] == [Notices(on=False)] * 2


def test_a_subscriber_that_does_not_read_loses_events_and_is_told_how_many(server: Server, peer: Peer) -> None:
    slow = server.peer()
    slow.result("subscribe")
    told = 20000
    for n in range(told):
        server.session.tell(api.StageChanged(stage="egress", state="running", pid=n))
    client = next(c for c in server.api.clients if c.events)
    assert len(client.out) < control_api.EVENTS_MAX + 1000
    peer.result("status")  # nobody else noticed
    seen = lost = 0
    while seen + lost < told:
        event = slow.line()
        if event["event"] == "lost":
            lost += event["count"]
        else:
            assert event["pid"] == seen + lost  # in its place
            seen += 1
    assert seen and lost
    server.session.tell(api.StageChanged(stage="egress", state="running", pid=1))
    assert slow.line()["event"] == "stage"


def test_half_closed_subscriber_still_hears(server: Server) -> None:
    """`echo ... | nc -N` wants to read on."""
    peer = server.peer()
    peer.send(b'{"call":"subscribe"}')
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.line()["ok"]
    peer.idle()
    server.session.tell(api.StageChanged(stage="egress", state="running", pid=1))
    assert peer.line()["event"] == "stage"


# --- bad input ---


@pytest.mark.parametrize(("line", "code", "says"), [
    (b"hello", "bad-json", "not JSON"),
    (b"{", "bad-json", "not JSON"),
    (b"[1]", "bad-json", "object"),
    (b"null", "bad-json", "object"),
    (b'{"call":"status"} x', "bad-json", "not JSON"),
    (b"\xff\xfe", "bad-json", "not JSON"),
    (b'{"call":"\xff"}', "bad-json", "not JSON"),
    (b"[" * 60000, "bad-json", "not JSON"),
    (b'{"call":"status","args":' + b"[" * 60000, "bad-json", "not JSON"),
    (b"{}", "bad-request", "call"),
    (b'{"call":1}', "bad-request", "call"),
    (b'{"call":"status","x":1}', "bad-request", "x"),
    (b'{"call":"status","id":[]}', "bad-request", "id"),
    (b'{"call":"status","id":99999999999999999999999999}', "bad-request", "id"),
    (b'{"call":"status","v":2}', "bad-version", "v"),
    (b'{"call":"statu"}', "unknown-call", "there are forwards.add"),
    (b'{"call":"status","args":[]}', "bad-args", "object"),
    (b'{"call":"status","args":{"a":1}}', "bad-args", "a: unknown field"),
    (b'{"call":"forwards.add","args":{}}', "bad-args", "specs"),
    (b'{"call":"forwards.add","args":{"specs":[]}}', "bad-args", "specs"),
    (b'{"call":"forwards.add","args":{"specs":[1]}}', "bad-args", "specs[0]"),
    (b'{"call":"forwards.add","args":{"specs":["80"],"proto":"sctp"}}', "bad-args", "proto"),
    (b'{"call":"forwards.remove","args":{}}', "bad-args", "specs"),
    (b'{"call":"flows.close","args":{"flow":"x"}}', "bad-args", "flow"),
    (b'{"call":"log","args":{"level":"loud"}}', "bad-args", "level"),
    (b'{"call":"subscribe","args":{"events":["sunrise"]}}', "bad-args", "events[0]"),
    (b'{"call":"forwards.list","args":{"limit":1001}}', "bad-args", "limit"),
])
def test_a_bad_request_gets_a_code_and_a_sentence_and_the_connection_lives(peer: Peer, line: bytes, code: str,
                                                                          says: str) -> None:
    peer.send(line + b"\n")
    got = peer.line()
    assert got["ok"] is False and got["error"]["code"] == code
    assert says in got["error"]["text"] and "\n" not in got["error"]["text"]
    assert peer.result("status")["session"] == "s"


def test_the_id_comes_back(peer: Peer) -> None:
    for sent in (7, "seven", None):
        peer.send(json.dumps({"id": sent, "call": "nothing"}).encode() + b"\n")
        assert peer.line()["id"] == sent


@pytest.mark.parametrize("size", [api.LINE_MAX, api.LINE_MAX + 1, 5 << 20])
def test_a_line_too_long_is_skipped(peer: Peer, server: Server, size: int) -> None:
    request = b'{"id":1,"call":"status"'
    peer.send(request + b" " * (size - len(request) - 1) + b'}\n{"id":2,"call":"status"}\n')
    first = peer.line()
    if size > api.LINE_MAX:
        assert first["error"]["code"] == "too-long"
    else:
        assert first["id"] == 1 and first["ok"]
    assert peer.line()["id"] == 2
    assert all(len(c.inbuf) <= api.LINE_MAX + control_api.RECV for c in server.api.clients)


def test_requests_in_pieces_and_in_heaps(peer: Peer) -> None:
    for byte in b'\n \n{"id":1,"call":"status"}\r\n':
        peer.send(bytes([byte]))
        peer.session.step()
    assert peer.line()["id"] == 1
    peer.send(b"".join(b'{"id":%d,"call":"status"}\n' % n for n in range(500)))
    assert [peer.line()["id"] for _ in range(500)] == list(range(500))


def test_a_request_without_newline_counts_at_the_end(peer: Peer, server: Server) -> None:
    peer.send(b'{"id":1,"call":"status"}')
    assert peer.idle()
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.line()["id"] == 1
    assert peer.line() is None and not server.api.clients


def test_a_client_that_does_not_read_is_not_read_from(server: Server, peer: Peer) -> None:
    flood = b'{"call":"statistics"}\n' * 100_000
    deaf = server.peer()
    sent = deaf.offer(flood)
    assert sent < len(flood)
    client = server.api.clients[-1]
    assert len(client.out) < 2 * control_api.OUT_MAX
    assert peer.result("status")["clients"] == 2
    deaf.sock.shutdown(socket.SHUT_WR)  # now it reads: all whole lines are answered
    replies = 0
    while deaf.line() is not None:
        replies += 1
    assert replies == -(-sent // len(b'{"call":"statistics"}\n'))


def test_silent_clients_make_way_for_new_ones(server: Server) -> None:
    peers = [server.peer() for _ in range(control_api.CLIENTS_MAX)]
    for p in peers:
        p.session.step()
    peers[0].result("status")  # so the second is silent longest
    more = server.peer()
    assert more.result("status")["clients"] == control_api.CLIENTS_MAX
    assert peers[1].line()["error"]["code"] == "busy" and peers[1].line() is None
    assert peers[0].result("status") and peers[2].result("status")


# --- slirp4netns ---


def slirp(server: Server, request: object, *, end: bytes = b"") -> object:
    peer = server.peer()
    peer.send((request if isinstance(request, bytes) else json.dumps(request).encode()) + end)
    reply = peer.line()
    assert peer.line() is None  # it closes, as slirp4netns does
    return reply


def test_slirp4netns_requests(server: Server, peer: Peer) -> None:
    add = {"execute": "add_hostfwd", "arguments": {"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 8080,
                                                   "guest_addr": "10.0.2.100", "guest_port": 80}}
    assert slirp(server, add) == {"return": {"id": 1}}
    more = {"execute": "add_hostfwd", "arguments": {"proto": "udp", "host_port": 53, "guest_port": 53}}
    assert slirp(server, more, end=b"\n") == {"return": {"id": 2}}
    entries = [{"id": 1, "proto": "tcp", "host_addr": "127.0.0.1", "host_port": 8080, "guest_addr": "10.0.2.100",
                "guest_port": 80},
               {"id": 2, "proto": "udp", "host_addr": "0.0.0.0", "host_port": 53, "guest_addr": "10.0.2.2",
                "guest_port": 53}]
    listed = slirp(server, {"execute": "list_hostfwd"})
    assert listed == {"return": {"entries": entries}, "entries": entries}
    assert slirp(server, {"execute": "remove_hostfwd", "arguments": {"id": 1}}) == {"return": {}}
    assert slirp(server, {"execute": "remove_hostfwd", "arguments": {"id": 1}}) == {
        "error": {"desc": "bad request: remove_hostfwd: bad arguments.id"}}
    assert specs(peer) == [("udp", 53, 53, "slirp4netns")]
    peer.result("forwards.remove", owner="slirp4netns")
    assert slirp(server, {"execute": "list_hostfwd"}) == {"return": {"entries": []}, "entries": []}


@pytest.mark.parametrize(("arguments", "says"), [
    ({"proto": "sctp", "host_port": 1, "guest_port": 1}, "bad arguments.proto"),
    ({"proto": "tcp", "host_port": 0, "guest_port": 1}, "bad arguments.host_port"),
    ({"proto": "tcp", "host_port": 1, "guest_port": 65536}, "bad arguments.guest_port"),
    ({"proto": "tcp", "host_port": 1, "guest_port": 1, "host_addr": "x"}, "bad arguments.host_addr"),
    ({"proto": "tcp", "host_port": 1, "guest_port": 1, "guest_addr": "1.2.3"}, "bad arguments.guest_addr"),
    ({"proto": 7}, "arguments.proto"),
    ([], "arguments"),
])
def test_slirp4netns_errors(server: Server, arguments: object, says: str) -> None:
    reply = slirp(server, {"execute": "add_hostfwd", "arguments": arguments})
    assert says in reply["error"]["desc"] and reply["error"]["desc"].startswith("bad request: ")


def test_slirp4netns_other_errors(server: Server, peer: Peer) -> None:
    assert slirp(server, {"execute": "fly"}) == {"error": {"desc": "bad request: unknown execute"}}
    server.session.taken = {8080}
    assert "taken" in slirp(server, {"execute": "add_hostfwd", "arguments": {
        "proto": "tcp", "host_port": 8080, "guest_port": 1}})["error"]["desc"]
    assert specs(peer) == []


# --- the socket and its name ---


def test_the_socket_is_ours_alone_and_goes_with_the_session(own_directory: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "elsewhere.sock"):
        assert stat.S_IMODE((tmp_path / "elsewhere.sock").stat().st_mode) == 0o600
        assert os.readlink(own_directory / "elsewhere.sock") == str(tmp_path / "elsewhere.sock")
        assert session_dir.sessions() == {"elsewhere": own_directory / "elsewhere.sock"}
    assert os.listdir(own_directory) == [] and not (tmp_path / "elsewhere.sock").exists()


def test_a_named_session(own_directory: Path) -> None:
    listening = session_dir.Listening("web")
    assert os.listdir(own_directory) == ["web.sock"]
    assert stat.S_IMODE(own_directory.stat().st_mode) == 0o700
    with pytest.raises(session_dir.SessionDirError, match="--session web: in use by a session that runs"):
        session_dir.Listening("web")
    assert find() == find("web") == own_directory / "web.sock"
    with pytest.raises(ClientError, match="no session nope; there are web"):
        find("nope")
    other = session_dir.Listening("db")
    with pytest.raises(ClientError, match="several sessions run: db, web"):
        find()
    for made in (listening, other):
        made.close()
    assert os.listdir(own_directory) == []


def test_what_a_killed_session_left_is_removed(own_directory: Path) -> None:
    def left(name: str) -> None:
        killed = session_dir.Listening(name)
        killed._mine.clear()
        killed.close()

    left("dead")
    assert os.listdir(own_directory) == ["dead.sock"]
    assert session_dir.sessions() == {} and os.listdir(own_directory) == []
    left("dead")
    again = session_dir.Listening("dead")  # the name is free
    assert list(session_dir.sessions()) == ["dead"]
    again.close()


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    with pytest.raises(session_dir.SessionDirError, match="is no socket"):
        session_dir.Listening("x", str(tmp_path / "precious"))
    assert (tmp_path / "precious").read_text() == "text" and sorted(os.listdir(tmp_path)) == ["precious", "run"]


@pytest.mark.parametrize("path", ["x" * 120, "no/such/directory/s.sock"])
def test_a_path_that_cannot_be(tmp_path: Path, path: str) -> None:
    with pytest.raises(session_dir.SessionDirError, match="--api-socket"):
        session_dir.Listening("x", str(tmp_path / path))


def test_a_directory_others_can_write_to_is_not_used(own_directory: Path) -> None:
    own_directory.mkdir(mode=0o777)
    own_directory.chmod(0o777)
    with pytest.raises(session_dir.SessionDirError, match="not a directory that is ours alone"):
        session_dir.Listening("x")


def test_where_the_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not ours alone is passed over."""
    monkeypatch.delenv("RINGNET_RUNTIME_DIR")
    last = Path(f"/tmp/ringnet-{os.geteuid()}")
    xdg = tmp_path / "xdg"
    xdg.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(xdg))
    assert session_dir.directories()[0] == xdg / "ringnet" and session_dir.directories()[-1] == last
    xdg.chmod(0o777)
    assert xdg / "ringnet" not in session_dir.directories()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert all(d.is_absolute() for d in session_dir.directories())


# --- the client class ---


def test_the_client(server: Server) -> None:
    """In a thread of its own: it blocks."""
    done = threading.Event()
    found: list[object] = []

    def talk() -> None:
        try:
            with Client(server.api.listening.path) as client:
                found.append(client.call(api.ForwardsAdd(specs=["1-1500"])))
                found.append([len(page.forwards) for page in client.pages(api.ForwardsList())])
                client.call(api.Subscribe(events=["forward-removed"]))
                client.call(api.ForwardsRemove(specs=["7"]))
                found.append(next(client.events(timeout=60)).forward.host_port)
                try:
                    client.call(api.FlowsClose(flow="1.1"))
                except api.ApiError as e:
                    found.append((e.code, str(e)))
                client.send(b"nonsense")
        finally:
            done.set()

    thread = threading.Thread(target=talk)
    thread.start()
    while not done.is_set():
        server.session.step(0.01)
    thread.join()
    assert found == [api.Changed(added=1500), [1000, 500], 7, ("not-found", "flow: 1.1: that flow is gone")]
