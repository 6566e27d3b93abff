"""UDP super-frames of the guest (virtio 1.2 5.1.6.2, VIRTIO_NET_HDR_GSO_UDP_L4): the datagrams that arrive are the guest's."""
from __future__ import annotations

import random
import socket
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shm._dataplane import lib
from tests.harness import DEADLINE, META, UDP, EgressOnly, Wire, fresh_port, super_udp, udp_server
from tests.proxy_servers import SocksProxy
from tests.wire.test_inbound_udp import forward, known
from tests.wire.test_promotion import THERE, owners
from tests.wire.test_proxy import plan, quoted_url

SHARED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BOTH = [pytest.param({"vnet": True, "promote": 0}, id="egress"), pytest.param({"vnet": True, "promote": 2}, id="promoted")]
MOST = lib.RN_USO_DATAGRAMS_MAX


def cut(data: bytes, each: int) -> list[bytes]:
    return [data[at:at + each] for at in range(0, len(data), each)]


def settled(wire: Wire, port: int, server: socket.socket) -> None:
    """Promoted, if anything is."""
    for _ in range(4):
        wire.send_udp(port, server.getsockname()[1], b"hello")
        assert server.recv(100) == b"hello"
    assert owners(wire, port) == (THERE if wire.session.settings.promote else ("egress", "egress"))


small = st.integers(1, 1400).flatmap(lambda each: st.tuples(st.just(each), st.integers(each + 1, min(20000, each * MOST))))
trains = st.integers(1, 3000).flatmap(lambda each: st.tuples(st.just(each), st.integers(each + 1, min(65507, each * MOST))))


@pytest.mark.parametrize("wire", BOTH, indirect=True)
@SHARED
@given(trains=st.lists(trains, min_size=1, max_size=3))
def test_any_train_arrives_as_its_datagrams(wire: Wire, trains: list[tuple[int, int]]) -> None:
    port = fresh_port()
    with udp_server() as server:
        settled(wire, port, server)
        stage, name = ("guest_tx", "udp_fast_up") if wire.session.settings.promote else ("egress", "udp_up")
        before = wire.counters(stage)[name]
        sent = 0
        for each, length in trains:
            data = random.Random(length).randbytes(length)
            wire.send_udp(port, server.getsockname()[1], b"before")
            wire.send_train(port, server.getsockname()[1], data, each)
            wire.send_udp(port, server.getsockname()[1], b"behind")
            want = [b"before", *cut(data, each), b"behind"]
            assert [server.recv(70000) for _ in want] == want  # in order, too
            sent += len(want)
        assert wire.counters(stage)[name] - before == sent


@pytest.mark.parametrize("wire", BOTH, indirect=True)
def test_what_is_no_train_goes_nowhere(wire: Wire) -> None:
    port = fresh_port()
    with udp_server() as server:
        there = server.getsockname()[1]
        settled(wire, port, server)
        before = wire.counters("classify")["drop_gso_mismatch"], wire.counters("guest_tx")["drop_bad_vnet_header"]
        wire.send_train(port, there, bytes(MOST + 1), 1)  # more than any kernel makes
        wire.send_train(port, there, bytes(400), 100, frag=0x2000)
        wire.send_train(port, there, bytes(400), 0)
        wire.send_udp(port, there, b"good")
        assert server.recv(1000) == b"good"
        wire.fence()
        assert wire.counters("classify")["drop_gso_mismatch"] - before[0] == 2
        assert wire.counters("guest_tx")["drop_bad_vnet_header"] - before[1] == 1


@pytest.mark.parametrize("wire", BOTH, indirect=True)
def test_nobody_listens_is_told_and_the_next_train_arrives(wire: Wire) -> None:
    port = fresh_port()
    with udp_server() as server:
        there = server.getsockname()[1]
        settled(wire, port, server)  # so that the mapping has its own port before this one is free
    wire.send_train(port, there, bytes(500), 100)
    assert wire.recv_error(lambda q: q.proto == UDP and q.sport == port).icmp == (3, 3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", there))
        server.settimeout(20)
        wire.send_train(port, there, b"a" * 250, 100)
        assert [len(server.recv(200)) for _ in range(3)] == [100, 100, 50]


def test_policy_counts_datagrams() -> None:
    with EgressOnly(policy=("deny out udp 203.0.113.0/24",)) as guest:
        port = fresh_port()
        guest.send_train(port, 9, bytes(450), 100, "203.0.113.9")
        assert guest.recv_error(lambda q: q.sport == port).icmp == (3, 13)
        assert guest.counters()["drop_policy_out"] == 5


def test_dns_queries_in_a_train_are_answered_each(make_wire: Callable[..., Wire]) -> None:
    """services knows single datagrams: classify cuts."""
    wire = make_wire(vnet=True, hosts={"db.test": ["192.0.2.7"]})
    port = fresh_port()
    name = b"\x02db\x04test\0" + b"\0\1\0\1"
    queries = [bytes([0x12, n]) + b"\1\0\0\1\0\0\0\0\0\0" + name for n in range(5)]
    before = wire.counters("classify")
    wire.send_train(port, 53, b"".join(queries), len(queries[0]))
    answers = {wire.recv_udp(port).data for _ in queries}
    assert {a[:2] for a in answers} == {q[:2] for q in queries}
    assert all(a.endswith(bytes([192, 0, 2, 7])) for a in answers)
    after = wire.counters("classify")
    assert {k: after[k] - before[k] for k in ("frames_in", "to_services", "trains_cut")} == {"frames_in": 1, "to_services": 5,
                                                                                                      "trains_cut": 4}


def test_a_short_ttl_is_told() -> None:
    with EgressOnly() as guest:
        port = fresh_port()
        guest.send_train(port, 9, bytes(300), 100, "203.0.113.9", ttl=1)
        assert guest.recv_error(lambda q: q.sport == port).icmp == (11, 0)


@settings(max_examples=25, deadline=None)
@given(train=small, early=st.booleans())
def test_a_train_through_a_socks_proxy(train: tuple[int, int], early: bool) -> None:
    """Each datagram behind a header of its own (RFC 1928 7), also where the train waited for the association."""
    each, length = train
    data = random.Random(length).randbytes(length)
    want = [*([] if early else [b"first"]), *cut(data, each)]
    with udp_server() as server, SocksProxy(route=lambda h, p: server.getsockname()) as proxy, \
            EgressOnly(proxy=plan(quoted_url(proxy))) as guest:
        port = fresh_port()
        if not early:
            guest.send_udp(port, 9, b"first", "203.0.113.7")
            while guest.counters()["udp_up"] == 0:
                guest.step(0.05)
        guest.send_train(port, 9, data, each, "203.0.113.7")
        while guest.counters()["udp_up"] < len(want):
            guest.step(0.05)
        assert [server.recv(70000) for _ in want] == want
        assert guest.counters()["udp_up"] == len(want)


def test_a_train_that_no_proxy_carries_is_counted_by_datagram() -> None:
    with SocksProxy(udp=False) as proxy, EgressOnly(proxy=plan(quoted_url(proxy))) as guest:
        port = fresh_port()
        guest.send_train(port, 9, bytes(450), 100, "203.0.113.7")
        assert guest.recv_error(lambda q: q.sport == port).icmp == (3, 13)
        assert guest.counters()["drop_proxy_udp"] == 5


@pytest.mark.parametrize("wire", [{"vnet": True, "promote": 0}], indirect=True)
@pytest.mark.parametrize("listens", ["127.0.0.1", "::1"])
def test_answers_to_a_forwards_peer(wire: Wire, listens: str) -> None:
    """They leave from the forward's own socket, whatever family the peer has."""
    known(wire)
    with forward(wire, host_addr=listens) as rule, socket.socket(
            socket.AF_INET6 if ":" in listens else socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(DEADLINE)
        peer.connect((listens, rule.host_port))
        peer.send(b"ask")
        d = wire.recv_udp(rule.guest_port)
        data = random.Random(1).randbytes(2345)
        wire.send_train(d.dport, d.sport, data, 100, d.src)
        assert [peer.recv(200) for _ in range(24)] == cut(data, 100)


@pytest.mark.parametrize("lie", [{"proto": 6}, {"each": 1}, {"length": 100}], ids=["no UDP", "too many", "not more than one"])
def test_egress_believes_no_neighbour(lie: dict[str, int]) -> None:
    with EgressOnly() as guest, udp_server() as server:
        vnet, frame = super_udp(fresh_port(), server.getsockname()[1], bytes(400), 100)
        version, proto, ttl, flags, l3, l4, off, each, length = META.unpack(guest.meta(frame, vnet))
        guest.put(frame, META.pack(version, lie.get("proto", proto), ttl, flags, l3, l4, off, lie.get("each", each),
                                   lie.get("length", length)))
        guest.settle()
        assert guest.counters()["drop_bad_descriptor"] == 1
        guest.put(frame, guest.meta(frame, vnet))
        guest.settle()
        assert [len(server.recv(200)) for _ in range(4)] == [100] * 4
