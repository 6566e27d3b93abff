"""Closing a flow from outside, and telling of refusals: by the supervisor's messages, with raw frames on the link."""
from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest

from pipeline import api
from pipeline.messages import Answer, Ask, CloseFlow, Notices
from tests.harness import DEADLINE, GATEWAY, GUEST, Wire, closed_tcp_port, fill, fresh_port, udp_server
from tests.wire.guest_tcp import ACK, RST, SYN, GuestTcp


def answer(wire: Wire, ask: Ask, stage: str = "egress") -> str:
    """What a stage says to it."""
    said: list[str] = []
    wire.session.ask(stage, ask, said.append)
    end = time.monotonic() + DEADLINE
    while not said and wire.session.poll(0.1):
        assert time.monotonic() < end, "no answer"
    return said[0]


def flow_of(wire: Wire, port: int):
    assert wire.session.memory is not None
    return next((f for f in wire.session.memory.flows if f.guest_port == port), None)


def test_a_connection_is_reset_on_both_sides(wire: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        g = GuestTcp(wire.sock, server.getsockname()[1])
        g.connect()
        host, _ = server.accept()
        with host:
            flow = flow_of(wire, g.sport)
            assert answer(wire, CloseFlow(index=flow.index, gen=flow.gen)) == ""
            g.expect(RST | ACK)
            host.settimeout(DEADLINE)
            with pytest.raises(ConnectionResetError):
                host.recv(1)
            assert flow_of(wire, g.sport) is None
            assert answer(wire, CloseFlow(index=flow.index, gen=flow.gen)) == "that flow is gone"


def test_a_connect_under_way_is_given_up(make_wire: Callable[..., Wire]) -> None:
    """And its place among those under way is free again: pending_max 1 takes the next."""
    wire = make_wire(pending_max=1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_server(("127.0.0.1", 0)) as free:
        clients = fill(full)
        g = GuestTcp(wire.sock, full.getsockname()[1])
        g.send(SYN, opts=g.syn_options())
        assert g.fence() == []
        flow = flow_of(wire, g.sport)
        assert flow.state.name == "CONNECTING"
        assert answer(wire, CloseFlow(index=flow.index, gen=flow.gen)) == ""
        g.expect(RST | ACK)
        GuestTcp(wire.sock, free.getsockname()[1]).connect()
        for c in clients:
            c.close()


def test_closing_twice_at_once_finds_nothing_the_second_time(wire: Wire) -> None:
    """Also before the RST went out: both requests are read in one go."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        g = GuestTcp(wire.sock, server.getsockname()[1])
        g.connect()
        flow = flow_of(wire, g.sport)
        child = wire.session.child("egress")
        assert child.channel is not None
        asks = [CloseFlow(seq=seq, index=flow.index, gen=flow.gen) for seq in (1, 2)]
        os.kill(child.pid, signal.SIGSTOP)
        for ask in asks:
            child.channel.send(ask)
        os.kill(child.pid, signal.SIGCONT)
        first, second = (child.channel.wait(DEADLINE) and child.channel.recv() for _ in asks)
        assert (first[0], second[0]) == (Answer(seq=1), Answer(seq=2, error="that flow is gone"))
        g.expect(RST | ACK)


def test_another_generation_is_not_closed(wire: Wire) -> None:
    with udp_server() as server:
        port = fresh_port()
        wire.send_udp(port, server.getsockname()[1], b"1")
        server.recvfrom(10)
        flow = flow_of(wire, port)
        assert answer(wire, CloseFlow(index=flow.index, gen=flow.gen + 1)) == "that flow is gone"
        assert answer(wire, CloseFlow(index=4000000000, gen=0)) == "that flow is gone"
        assert flow_of(wire, port) is not None
        assert answer(wire, CloseFlow(index=flow.index, gen=flow.gen)) == ""
        assert flow_of(wire, port) is None


def test_a_refused_connect_is_told_once_asked_for(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire()
    told: list[api.Event] = []
    wire.session.listeners.append(told.append)
    closed = closed_tcp_port()

    def refused() -> None:
        g = GuestTcp(wire.sock, closed)
        g.send(SYN, opts=g.syn_options())
        g.expect(RST | ACK)
        wire.counters("egress")

    refused()
    assert told == []
    assert answer(wire, Notices(on=True)) == ""
    refused()
    (event,) = told
    assert isinstance(event, api.FlowRefused)
    assert (event.guest, event.peer, event.peer_port, event.reason) == (GUEST, GATEWAY, closed, "Connection refused")
    told.clear()
    assert answer(wire, Notices(on=False)) == ""
    refused()
    assert told == []


def test_asks_are_answered_in_order_and_one_at_a_time(wire: Wire) -> None:
    said: list[int] = []
    for n in range(500):
        wire.session.ask("egress", CloseFlow(index=n, gen=1 << 31), lambda error, n=n: said.append(n))
    assert len(wire.session.child("egress").asks) == 500
    end = time.monotonic() + DEADLINE
    while len(said) < 500 and wire.session.poll(0.1):
        assert time.monotonic() < end
    assert said == list(range(500))
