"""Faults of a UDP proxy (see faults.py)."""
from __future__ import annotations

import pytest

from tests.harness import EgressOnly, udp_server


@pytest.mark.fault(29)
def test_a_burst_keeps_the_source_port() -> None:
    """RFC 4787 REQ-1: 300 datagrams without an answer are one mapping, and all arrive."""
    with EgressOnly() as guest, udp_server() as server:
        for k in range(300):
            guest.send_udp(4000, server.getsockname()[1], b"%d" % k)
        came = [server.recvfrom(10) for _ in range(300)]
        assert [data for data, _ in came] == [b"%d" % k for k in range(300)]
        assert len({address for _, address in came}) == 1


@pytest.mark.fault(29)
def test_a_guest_that_only_listens_keeps_its_mapping_for_three_minutes_at_a_time() -> None:
    """RFC 4787 REQ-5, REQ-6: datagrams towards the guest prove the mapping's use as well."""
    with EgressOnly() as guest, udp_server() as server:
        guest.stop_clock()
        guest.send_udp(4000, server.getsockname()[1], b"subscribe")
        where = server.recvfrom(20)[1]
        for k in range(10):
            server.sendto(b"%d" % k, where)
            assert guest.recv_udp(4000).data == b"%d" % k
            guest.advance(100)
