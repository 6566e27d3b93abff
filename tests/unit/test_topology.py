"""The topology says what it should, and a declaration that contradicts itself is refused with the place named."""
from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.topology import TOPOLOGY, Feature, Ring, Role, Stage, Topology, TopologyError
from shm._dataplane import lib

NIC1 = TOPOLOGY.only(frozenset({Feature.NIC1}))


def test_roles_are_the_data_planes() -> None:
    assert {r.name: r.value for r in Role} == {
        n: getattr(lib, f"RN_ROLE_{n}") for n in ("CLASSIFY", "BRIDGE", "SERVICE", "GUEST", "HOSTNET", "OFFER")}
    assert len(Role) == lib.RN_NROLES


def test_the_rings_of_the_design() -> None:
    assert {r.name for r in NIC1.rings} == {
        "guest_tx->classify", "classify->egress", "classify->services", "classify->guest_rx", "egress->guest_rx",
        "services->guest_rx", "guest_tx->guest_rx", "guest_tx->egress", "egress->guest_tx", "guest_rx->egress"}
    assert {r.name for r in TOPOLOGY.rings if r.notices} == {"egress->guest_tx", "guest_rx->egress"}
    assert {r.name for r in TOPOLOGY.rings} - {r.name for r in NIC1.rings} == {"guest_tx->vmnet", "vmnet->guest_rx"}


@pytest.mark.parametrize("topo", [TOPOLOGY, NIC1], ids=["whole", "nic1"])
def test_rows_are_data_order(topo: Topology) -> None:
    """Start-up walks them backwards: who consumes from a stage is there before it. vmnet is both ends of a loop."""
    for ring in topo.rings:
        if "vmnet" not in ring.name and not ring.notices:
            assert topo.row(ring.producer) < topo.row(ring.consumer), ring.name


def test_only_sources_have_no_input_and_all_of_them_are_marked() -> None:
    fed = {r.consumer for r in NIC1.rings if not r.notices}
    assert [s.name for s in NIC1.stages if s.name not in fed] == [s.name for s in NIC1.stages if s.source]


@pytest.mark.parametrize("topo", [TOPOLOGY, NIC1], ids=["whole", "nic1"])
def test_who_may_ring_whom(topo: Topology) -> None:
    """A ring's ends may wake each other, and who frees a buffer may wake its owner; nobody else."""
    for stage in topo.stages:
        near = set(topo.neighbours(stage.name))
        assert stage.name not in near
        for ring in topo.rings:
            if ring.producer == stage.name:
                assert ring.consumer in near
            if ring.consumer == stage.name:
                assert ring.producer in near
    assert set(NIC1.neighbours("services")) == {"guest_tx", "classify", "guest_rx"}
    assert set(NIC1.neighbours("guest_tx")) == {"classify", "egress", "guest_rx"}
    assert set(NIC1.neighbours("guest_rx")) == {"guest_tx", "classify", "egress", "services"}


def test_who_holds_what() -> None:
    holders = {fd: [s.name for s in TOPOLOGY.stages if fd in s.fds] for s in TOPOLOGY.stages for fd in s.fds}
    assert holders == {"link": ["guest_tx", "guest_rx"], "link2": ["guest_tx", "guest_rx"],
                       "pcap": ["guest_tx", "guest_rx"], "raw_icmp": ["egress"],
                       "dns_listen": ["services"], "bridge": ["vmnet"], "flows_to_tx": ["egress"], "flows_to_rx": ["egress"],
                       "flows_tx": ["guest_tx"], "flows_rx": ["guest_rx"],
                       "link_tap": ["egress"], "estate_put": ["egress"], "estate_take": ["egress"]}
    assert [s.name for s in TOPOLOGY.stages if s.flows] == ["guest_tx", "egress", "guest_rx"]


def test_left_out_parts_leave_no_ends() -> None:
    names = {s.name for s in NIC1.stages}
    assert "vmnet" not in names
    assert all({r.producer, r.consumer} <= names for r in NIC1.rings)
    assert NIC1.validate() is NIC1


def tiny(**changes: object) -> Topology:
    base = Topology(
        stages=(Stage(name="a", does="", source=True), Stage(name="b", does="")),
        rings=(Ring(producer="a", consumer="b", role=Role.CLASSIFY, slots=8),), flows=1)
    return msgspec.structs.replace(base, **changes)


RING = Ring(producer="a", consumer="b", role=Role.CLASSIFY, slots=8)


@pytest.mark.parametrize(("changes", "says"), [
    ({"rings": (msgspec.structs.replace(RING, consumer="c"),)}, "ring a->c: no stage 'c'"),
    ({"rings": (msgspec.structs.replace(RING, consumer="a"),)}, "ring a->a: .*same stage"),
    ({"rings": (RING, msgspec.structs.replace(RING, role=Role.GUEST))}, "ring a->b: declared twice"),
    ({"rings": ()}, "stage a has no ring"),
    ({"flows": 0}, "flow table"),
    ({"stages": (Stage(name="a", does=""), Stage(name="a", does=""))}, "declared twice"),
    ({"stages": tuple(Stage(name=f"s{n}", does="") for n in range(9))}, "9 stages"),
])
def test_contradictions_are_named(changes: dict[str, object], says: str) -> None:
    with pytest.raises(TopologyError, match=says):
        tiny(**changes).validate()


def test_two_outputs_of_one_role() -> None:
    topo = tiny(stages=(*tiny().stages, Stage(name="c", does="")),
                rings=(RING, msgspec.structs.replace(RING, consumer="c")))
    with pytest.raises(TopologyError, match="ring a->c: a already has an output called CLASSIFY"):
        topo.validate()


@given(st.integers(0, 1 << 17))
def test_slots_are_what_the_ring_takes(slots: int) -> None:
    """The declaration refuses exactly what rn_ring_size() refuses."""
    topo = tiny(rings=(msgspec.structs.replace(RING, slots=slots),))
    if lib.rn_ring_size(slots):
        topo.validate()
    else:
        with pytest.raises(TopologyError, match=f"ring a->b: {slots} slots"):
            topo.validate()
