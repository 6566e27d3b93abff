"""What `ringnet top` and `ringnet flows` say of what they see (pipeline/look.py, top.py, flows.py), and bulk looks at the
flow table (shm/flows.py, Scan)."""
from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from pipeline.flows import detail
from pipeline.look import flow_rate, waits_for
from pipeline.text import bits, span
from pipeline.top import flow_section
from shm._dataplane import lib
from shm.flows import FIN_ACKED, FIN_SEEN, FIN_SENT, Flow, Flows, FlowState, Scan, Wait

HEADER = 64
ENTRY = lib.rn_flows_size(2) - lib.rn_flows_size(1)
NOW = 100_000_000_000
STAGES = ("guest_tx", "classify", "egress", "services", "guest_rx")


def flow(**fields: Any) -> Flow:
    """One that moves, but for what is given."""
    made = dict.fromkeys(Flow.__struct_fields__, 0) | {
        "index": 12, "gen": 3, "proto": 6, "state": FlowState.ESTABLISHED, "guest": "10.0.2.2", "guest_port": 40000,
        "peer": "192.0.2.1", "peer_port": 443, "up_owner": 2, "down_owner": 2, "created_ns": NOW - 5_000_000_000,
        "last_ns": NOW}
    return msgspec.convert(made | fields, Flow)


@pytest.mark.parametrize(("fields", "said"), [
    ({}, ""),
    ({"last_ns": NOW - 3_200_000_000}, "idle 3.2 s"),
    ({"state": FlowState.CONNECTING, "created_ns": NOW - 1_200_000_000}, "connecting 1.2 s to 192.0.2.1:443"),
    ({"state": FlowState.SYN_RCVD, "last_ns": NOW - 40_000_000}, "the guest's ACK of our SYN-ACK 40 ms"),
    ({"state": FlowState.SYN_SENT}, "the guest's answer to our SYN 5.0 s"),
    ({"state": FlowState.TIME_WAIT, "last_ns": NOW - 61_000_000_000}, "TIME-WAIT 1m01s"),
    ({"state": FlowState.MAPPED, "proto": 17}, ""),
    ({"state": FlowState.MAPPED, "proto": 17, "last_ns": NOW - 9_000_000_000}, "idle 9.0 s"),
    ({"down_wait": Wait.WINDOW, "down_wait_ns": NOW - 340_000_000}, "guest window closed 340 ms"),
    ({"down_wait": Wait.ACK, "down_wait_ns": NOW - 2_000_000, "snd_una": 2**32 - 10, "snd_nxt": 90},
     "guest's ACK 2 ms (100 B in flight fill its window)"),
    ({"down_wait": Wait.ROOM, "down_wait_ns": NOW}, "room towards the guest 0 ms"),
    ({"up_wait": Wait.TURN, "up_wait_ns": NOW - 30_000_000}, "its turn among many senders 30 ms"),
    ({"up_wait": Wait.HOST, "up_wait_ns": NOW - 1_500_000_000, "parked": 7000}, "host buffer full 1.5 s (7000 B parked)"),
    ({"parked": 1460}, "a segment missing from the guest (1460 B behind it parked)"),
    ({"up_wait": Wait.HOST, "up_wait_ns": NOW, "down_wait": Wait.WINDOW, "down_wait_ns": NOW},
     "guest window closed 0 ms; host buffer full 0 ms (0 B parked)"),
    ({"down_fin": FIN_SEEN | FIN_SENT}, "guest's ACK of our FIN"),
    ({"down_fin": FIN_SEEN | FIN_SENT | FIN_ACKED}, "the guest's FIN 0 ms: the host side has closed"),
    ({"up_fin": FIN_SEEN | FIN_SENT, "last_ns": NOW - 2_000_000_000}, "the host side's FIN 2.0 s: the guest has closed"),
])
def test_waits_in_words(fields: dict[str, Any], said: str) -> None:
    assert waits_for(flow(**fields), NOW) == said


def test_a_flow_in_figures() -> None:
    f = flow_rate(flow(up_bytes=3000, down_bytes=10_000, rcv_nxt=2**32 - 1, rcv_adv=999, snd_una=2**32 - 1, snd_nxt=499,
                       down_owner=4, srtt_us=1500, rto_us=200_000), STAGES, NOW, (1000, 2000), 2.0)
    assert (f.flow, f.proto, f.state, f.up_owner, f.down_owner) == ("12.3", "tcp", "established", "egress", "guest_rx")
    assert (f.up_bits_s, f.down_bits_s) == (8000, 32_000)
    assert (f.rcv_window, f.in_flight, f.srtt_ms, f.age_s) == (1000, 500, 1.5, 5.0)
    _, _, [row], _ = flow_section([f], rates=True)
    assert row[:7] == ["12.3", "tcp", "10.0.2.2:40000", "192.0.2.1:443", "established", "8.00 k", "32.0 k"]
    assert row[8] == "egress/guest_rx"
    said = detail(f)
    assert "run by guest_rx" in said and "waits for    nothing" in said and "500 B in flight" in said
    assert flow_rate(flow(up_owner=-1, up_bytes=5), STAGES, NOW, None, 1.0).up_bits_s == 0


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 ms"), (0.34, "340 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"),
                                               (59.9, "59.9 s"), (61, "1m01s")])
def test_spans(seconds: float, said: str) -> None:
    assert span(seconds) == said


@pytest.mark.parametrize(("n", "said"), [(0, "0"), (999, "999"), (999.6, "1.00 k"), (12_340, "12.3 k"), (123_400, "123 k"),
                                         (9_876_000, "9.88 M"), (23_400_000_000, "23.4 G"), (10**13, "10000 G")])
def test_bits(n: float, said: str) -> None:
    assert bits(n) == said


def test_a_scan_sees_every_flow_and_makes_objects_of_none() -> None:
    guest = b"\0" * 10 + b"\xff\xff" + bytes([10, 0, 2, 2])
    with Flows.create(100, (1, 2)) as flows:
        for i in range(0, 100, 3):
            proto, state = (6, FlowState.ESTABLISHED) if i % 2 else (17, FlowState.MAPPED)
            struct.pack_into("=16s16sHHBB", flows.buffer(), HEADER + i * ENTRY, guest, guest, i, 443, proto, state)
        scan = Scan(flows)
        assert scan.look() == 34 == len(list(flows))
        assert [scan.flow(e[8]).guest_port for e in scan.entries()] == [e[0] for e in scan.entries()] == list(range(0, 100, 3))
        assert [scan.flow(e[8]) for e in scan.entries()] == list(flows)
        assert [e[0] for e in scan.entries(17)] == list(range(0, 100, 6))
        assert scan.census(2) == ({(17, FlowState.MAPPED): 17, (6, FlowState.ESTABLISHED): 17}, 0)
        assert flows.census() == scan.census(-1)[0]
