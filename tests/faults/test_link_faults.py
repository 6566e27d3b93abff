"""Faults of the last hop: frames on their way to the guest's link. Stages in this process, with rings and a link of their own."""
from __future__ import annotations

import pytest
from frames import inproc
from frames.inproc import error, link, pair, received, run

from shm._dataplane import lib

VNET = bytes(12)


@pytest.mark.fault(18)
def test_each_frame_is_at_the_guest_before_the_next_one_is_waited_for() -> None:
    """500 frames, each behind the last without a pause: no timer that the next frame starts anew, no batch to be filled. A write to
    the link is what wakes the guest, so a frame that is there has been told."""
    with inproc.Plane({0: (64, 4)}) as plane:
        ring = inproc.Ring(64)
        (inner, tx), (outer, rx) = pair(), pair()
        try:
            guest_tx = plane.stage(0, outputs={lib.RN_ROLE_CLASSIFY: (ring, 1)})
            guest_rx = plane.stage(1, inputs={0: ring})
            assert lib.stage_guest_tx_init(guest_tx, link(inner), -1) == 0
            assert lib.stage_guest_rx_init(guest_rx, link(outer), -1) == 0
            for n in range(500):
                frame = VNET + n.to_bytes(4, "big") * 16
                tx.send(frame)
                for stage in (guest_tx, guest_rx):
                    assert run(stage) == lib.RN_RUN_CONTROL, error(stage)  # until it would sleep
                assert received(rx) == [frame]
        finally:
            for s in (inner, tx, outer, rx):
                s.close()
