"""classify, from one frame's verdict to the stage with its rings: the promises of rn_parse.c and stage_classify.c."""
from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from frames import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, Frame, inproc, load, recipes
from frames.inproc import Classified, config, count, counts, error, run
from frames.recipes import ARP, ICMP, IP, UDP, Ether, Raw, arp, ip, raw, tcp, udp

from shm._dataplane import ffi, lib

FRAMES = load()
GOOD = [f for f in FRAMES if f.verdict in ("to_bridge", "to_services")]
ids = [f.name for f in FRAMES]


@pytest.fixture
def plane() -> Iterator[Classified]:
    with Classified() as p:
        yield p


def parse(data: bytes, vnet: bytes = b"", cfg=None):
    out = ffi.new("struct rn_parsed *")
    verdict = lib.rn_parse_bytes(data, len(data), vnet or ffi.NULL, cfg or config(), out)
    return ffi.string(lib.rn_verdict_name(verdict)).decode(), out


@pytest.mark.parametrize("frame", FRAMES, ids=ids)
def test_verdict(frame: Frame) -> None:
    assert parse(frame.data, frame.vnet_data)[0] == frame.verdict


@pytest.mark.parametrize("frame", [f for f in FRAMES if f.made], ids=[f.name for f in FRAMES if f.made])
def test_bytes_are_what_the_expression_makes(frame: Frame) -> None:
    assert raw(eval(frame.made, vars(recipes))) == frame.data


def test_every_verdict_has_a_frame() -> None:
    names = {ffi.string(lib.rn_verdict_name(v)).decode() for v in range(lib.RN_NVERDICTS)}
    assert {f.verdict for f in FRAMES} == names
    assert lib.rn_verdict_name(lib.RN_NVERDICTS) == ffi.NULL and lib.rn_verdict_counter(-1) == -1


@pytest.mark.fault(42)
def test_every_verdict_counts_what_it_is_called() -> None:
    for v in range(lib.RN_NVERDICTS):
        assert ffi.string(lib.rn_counter_name(lib.rn_verdict_counter(v))) == ffi.string(lib.rn_verdict_name(v))


@pytest.mark.parametrize("frame", GOOD, ids=[f.name for f in GOOD])
def test_payload_is_where_scapy_finds_it(frame: Frame) -> None:
    _, p = parse(frame.data, frame.vnet_data)
    packet = Ether(frame.data)[IP]
    layer = packet.payload
    want = raw(layer.payload)
    if isinstance(layer, UDP):
        want = want[:layer.len - 8]
    elif isinstance(layer, ICMP):
        want = raw(layer)[8:]
    else:
        want = raw(packet)[packet.ihl * 4 + layer.dataofs * 4:packet.len]
    assert frame.data[p.payload_off:p.payload_off + p.payload_len] == want
    assert (p.l3_off, p.l4_off, p.frame_len) == (14, 14 + packet.ihl * 4, 14 + packet.len)
    assert (p.ip_proto, p.ttl) == (packet.proto, packet.ttl)


@pytest.mark.parametrize("frame", [f for f in FRAMES if len(f.data) >= 14],
                         ids=[f.name for f in FRAMES if len(f.data) >= 14])
def test_frame_through_the_stage(plane: Classified, frame: Frame) -> None:
    """Counted by its verdict, once, and it comes out where it should, as it came but for link padding."""
    out = plane.through(frame.data, vnet=frame.vnet_data or inproc.VNET)
    got = counts(plane.classify)
    assert got.pop("frames_in") == 1
    assert got[frame.verdict] == 1
    where = {"to_bridge": "bridge", "to_services": "service", "arp_replies": "reply"}.get(frame.verdict)
    if where in ("bridge", "service"):
        _, p = parse(frame.data, frame.vnet_data)
        assert out[where] == [frame.data[:p.frame_len]]
    elif where:
        assert len(out[where]) == 1
    else:
        assert not out["bridge"] and not out["service"]
        assert len(out["reply"]) == got.get("icmp_errors_sent", 0)


def test_virtio_header_goes_along_only_when_it_says_something(plane: Classified) -> None:
    partial = bytes.fromhex("010000000000220010000000")
    plane.send(raw(ip() / tcp()), vnet=partial)
    plane.send(raw(ip() / udp()), vnet=bytes.fromhex("020000000000000000000000"))
    assert [d[2] for d in plane.input.descriptors()] == [1, 0]  # RN_DESC_VNET
    plane.work()
    assert [d[:12] for d in plane.read("bridge", vnet=True)] == [partial, bytes(12)]


def test_metadata_of_a_frame_in_its_buffer(plane: Classified) -> None:
    plane.send(raw(ip(ttl=9) / tcp(flags="PA", ack=1, options=[("MSS", 1460)]) / Raw(b"hello")))
    plane.work()
    (off, length, _, _), = plane.rings["bridge"].descriptors()
    start = off - 82  # RN_BUF_ETH_OFF; the metadata is at 16 (csrc/rn_arena.h)
    meta = struct.unpack_from("<BBBBHHII", plane.arena.map, start + 16)
    assert meta == (4, 6, 9, 0, 14, 34, 34 + 24, 5)
    assert length == 34 + 24 + 5


# --- answers ---


def test_arp_reply(plane: Classified) -> None:
    reply = Ether(plane.through(raw(arp()))["reply"][0])
    assert (reply.dst, reply.src, reply[ARP].op) == (GUEST_MAC, GATEWAY_MAC, 2)
    assert (reply[ARP].hwsrc, reply[ARP].psrc, reply[ARP].hwdst, reply[ARP].pdst) == (
        GATEWAY_MAC, GATEWAY, GUEST_MAC, GUEST)


def test_arp_probe_is_answered_to_the_prober() -> None:
    out = ffi.new("uint8_t[42]")
    probe = raw(arp(psrc="0.0.0.0"))
    assert lib.arp_answer_bytes(probe, len(probe), config(), out) == 42
    reply = Ether(bytes(out))
    assert (reply.dst, reply[ARP].psrc, reply[ARP].pdst) == (GUEST_MAC, GATEWAY, "0.0.0.0")


def test_arp_replies_do_not_outgrow_the_ring() -> None:
    with Classified(guest_slots=2) as p:
        p.send(*[raw(arp())] * 5)
        p.work()
        assert (count(p.classify, "arp_replies"), count(p.classify, "drop_reply_full")) == (2, 3)
        assert len(p.read("reply")) == 2
        assert len(p.through(raw(arp()))["reply"]) == 1


@pytest.mark.parametrize(("frame", "code"), [
    (ip(proto=132, options=recipes.IPOption_NOP()) / Raw(bytes(range(64))), 2),
    (ip(dst="10.0.2.77") / tcp(flags="S") / Raw(b"x" * 1000), 1),
    (ip(dst="10.0.2.77") / ICMP() / Raw(b"ping"), 1),
    (ip(proto=132, flags="MF") / Raw(bytes(8)), 2),
], ids=["protocol", "host", "host-ping", "first-fragment"])
def test_icmp_error(plane: Classified, frame: Ether, code: int) -> None:
    data = raw(frame)
    (reply,) = plane.through(data)["reply"]
    e = Ether(reply)
    assert (e.dst, e.src, e[IP].src, e[IP].dst) == (GUEST_MAC, GATEWAY_MAC, GATEWAY, GUEST)
    assert (e[ICMP].type, e[ICMP].code) == (3, code)
    quote = raw(e[ICMP])[8:]
    assert quote == data[14:14 + 548] and len(reply) == 14 + e[IP].len <= 14 + 576
    sums = e[IP].chksum, e[ICMP].chksum
    del e[IP].chksum, e[ICMP].chksum
    again = Ether(raw(e))
    assert (again[IP].chksum, again[ICMP].chksum) == sums


@pytest.mark.parametrize("frame", [
    ip(proto=132, frag=100) / Raw(bytes(8)),
    ip(dst="10.0.2.77") / ICMP(type=3, code=3) / Raw(bytes(28)),
    ip(dst="10.0.2.77") / ICMP(type=0) / Raw(bytes(28)),
    ip(dst="10.0.2.77", proto=1),
    ip(proto=132, src="0.0.0.0") / Raw(bytes(8)),
    ip(proto=2, dst="224.0.0.22", dmac="01:00:5e:00:00:16") / Raw(bytes(8)),
    ip(proto=132, dst="255.255.255.255", dmac="ff:ff:ff:ff:ff:ff") / Raw(bytes(8)),
], ids=["fragment", "about-an-error", "about-a-reply", "icmp-without-type", "no-source", "multicast", "broadcast"])
def test_no_icmp_error(plane: Classified, frame: Ether) -> None:
    """RFC 1122 3.2.2."""
    assert plane.through(raw(frame))["reply"] == []
    assert count(plane.classify, "icmp_errors_sent") == count(plane.classify, "icmp_errors_withheld") == 0


def test_icmp_errors_are_limited(plane: Classified) -> None:
    """64 frames in one turn see one clock: the burst and not one more."""
    plane.send(*[raw(ip(proto=132) / Raw(bytes(8)))] * 64)
    assert plane.input.fill == 64
    plane.work()
    assert (count(plane.classify, "icmp_errors_sent"), count(plane.classify, "icmp_errors_withheld")) == (32, 32)
    assert count(plane.classify, "drop_ip_protocol") == 64
    assert len(plane.read("reply")) == 32


# --- full outputs ---


def test_a_full_ring_to_egress_loses_nothing() -> None:
    frames = [raw(ip(id=i) / udp() / Raw(bytes([i]))) for i in range(40)]
    with Classified(bridge_slots=4) as p:
        p.send(*frames)
        got = []
        while len(got) < len(frames):
            p.work()
            assert p.rings["bridge"].fill <= 4
            more = p.read("bridge")
            assert more
            got += more
        assert got == frames
        assert counts(p.classify)["frames_in"] == count(p.classify, "to_bridge") == 40
        assert count(p.classify, "stalls_room") > 0 and p.input.fill == 0


def test_what_waits_for_egress_keeps_its_place() -> None:
    """ARP behind a frame that has no room is not answered before it: order on the wire stays."""
    with Classified(bridge_slots=2) as p:
        p.send(*[raw(ip(id=i) / udp()) for i in range(3)], raw(arp()))
        p.work()
        assert p.read("reply") == [] and p.input.fill == 2
        assert len(p.read("bridge")) == 2
        p.work()
        assert len(p.read("reply")) == 1 and len(p.read("bridge")) == 1


def test_a_full_ring_to_services_holds_nobody_up() -> None:
    query = raw(ip(dst=GATEWAY) / udp(dport=53) / Raw(bytes(12)))
    with Classified(service_slots=2) as p:
        p.send(*[query] * 5, raw(ip() / tcp()))
        p.work()
        assert (count(p.classify, "to_services"), count(p.classify, "drop_services_full")) == (2, 3)
        assert len(p.read("bridge")) == 1 and p.read("service") == [query] * 2


def test_buffers_come_back() -> None:
    """Many times more frames than buffers, of all verdicts."""
    with Classified() as p:
        for _ in range(20):
            for f in FRAMES:
                if len(f.data) >= 14 and f.verdict != "fragments_in":
                    p.through(f.data, vnet=f.vnet_data or inproc.VNET)
        sent = sum(len(f.data) >= 14 and f.verdict != "fragments_in" for f in FRAMES) * 20
        assert count(p.guest_tx, "frames_out") == count(p.classify, "frames_in") == sent
        assert count(p.classify, "drop_reply_full") == 0


# --- a neighbour that cannot be trusted ---


@pytest.mark.parametrize("forged", [
    (0, 60, 0, 0), (2**64 - 1, 60, 0, 0), (4096, 2**32 - 1, 0, 1), (4096 + 64, 60, 0, 1), (4096 + 82, 1967, 0, 1),
    (4096 + 82, 60, 0, 999)], ids=["header", "wrap", "length", "no-room-for-vnet", "past-buffer", "generation"])
def test_bad_descriptor(plane: Classified, forged: tuple[int, int, int, int]) -> None:
    plane.input.forge(*forged)
    plane.work()
    assert counts(plane.classify) == {"frames_in": 1, "drop_bad_descriptor": 1}


def test_impossible_tail_ends_the_stage(plane: Classified) -> None:
    struct.pack_into("<Q", plane.input.map, inproc.RING_TAIL, 129)
    assert run(plane.classify) == lib.RN_RUN_ERROR
    assert "tail 129 is over 128 slots past head 0" in error(plane.classify)


# --- configuration and virtio-net header ---


@pytest.mark.parametrize("bad", [
    {"prefix": 7}, {"prefix": 31}, {"prefix": 0}, {"gateway4": [10, 0, 3, 1]}, {"gateway_mac": [1, 0, 0, 0, 0, 1]},
    {"gateway_mac": [0] * 6}], ids=str)
def test_configuration_is_checked(bad: dict[str, object]) -> None:
    s = lib.rn_stage_new(1, 0)
    try:
        assert lib.classify_config_check(config()) == 0
        assert lib.stage_classify_init(s, config(**bad)) < 0
        assert "classify" in error(s)
    finally:
        lib.rn_stage_free(s)


@pytest.mark.parametrize("prefix", [8, 16, 23, 25, 29, 30])
def test_subnet_of_any_size(prefix: int) -> None:
    mask = (0xFFFFFFFF << (32 - prefix)) & 0xFFFFFFFF
    net = 0x0A000200 & mask

    def text(a: int) -> str:
        return ".".join(str(a >> s & 255) for s in (24, 16, 8, 0))

    cfg = config(prefix=prefix)
    last = net | ~mask & 0xFFFFFFFF
    guest = text(last - 1)
    assert parse(raw(ip(src=guest) / udp()), cfg=cfg)[0] == "to_bridge"
    assert parse(raw(ip(src=text(net)) / udp()), cfg=cfg)[0] == "drop_spoofed_source"
    assert parse(raw(ip(src=text(last)) / udp()), cfg=cfg)[0] == "drop_spoofed_source"
    assert parse(raw(ip(src=text(last + 2)) / udp()), cfg=cfg)[0] == "drop_spoofed_source"
    assert parse(raw(ip(src=guest, dst=text(last)) / udp()), cfg=cfg)[0] == "drop_bad_destination"
    assert parse(raw(ip(src=guest, dst=text(last)) / UDP(sport=68, dport=67)), cfg=cfg)[0] == "to_services"


def vnet(flags: int = 0, gso: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, gso_size, start, offset, 0)


@pytest.mark.parametrize(("header", "length", "ok"), [
    (vnet(), 60, 1),
    (vnet(flags=2), 60, 1),
    (vnet(flags=4), 60, 0),
    (vnet(flags=0x80), 60, 0),
    (vnet(flags=1, start=34, offset=16), 52, 1),
    (vnet(flags=1, start=34, offset=16), 51, 0),
    (vnet(flags=1, start=13, offset=16), 60, 0),
    (vnet(flags=1, start=0xFFFF, offset=0xFFFF), 65549, 0),
    (vnet(start=0xFFFF, offset=0xFFFF), 60, 1),  # fields nobody uses
    (vnet(flags=1, gso=1, hdr_len=54, gso_size=1460, start=34, offset=16), 3000, 1),
    (vnet(flags=1, gso=0x81, hdr_len=54, gso_size=1460, start=34, offset=16), 3000, 1),
    (vnet(flags=1, gso=4, hdr_len=74, gso_size=1440, start=54, offset=16), 3000, 1),
    (vnet(flags=1, gso=1, hdr_len=54, gso_size=0, start=34, offset=16), 3000, 0),
    (vnet(flags=1, gso=1, hdr_len=3001, gso_size=1460, start=34, offset=16), 3000, 0),
    (vnet(gso=1, hdr_len=54, gso_size=1460, start=34, offset=16), 3000, 0),
    (vnet(flags=1, gso=0x80, gso_size=1460, start=34, offset=16), 3000, 0),
    (vnet(flags=1, gso=2, gso_size=1460, start=34, offset=16), 3000, 0),
    (vnet(flags=1, gso=3, gso_size=1460, start=34, offset=6), 3000, 0),
    (vnet(flags=1, gso=5, gso_size=1460, start=34, offset=6), 3000, 1),
    (vnet(flags=1, gso=0x85, gso_size=1460, start=34, offset=6), 3000, 0),  # ECN is TCP's
    (vnet(flags=1, gso=5, gso_size=0, start=34, offset=6), 3000, 0),
    (vnet(gso=5, gso_size=1460), 3000, 0),
])
def test_virtio_header(header: bytes, length: int, ok: int) -> None:
    assert lib.rn_vnet_ok(header, length) == ok


# --- fragments through the stage ---


def fragments(payload: bytes, size: int, **kw: object) -> list[bytes]:
    """A UDP datagram in fragments of `size` bytes."""
    whole = raw(ip(**{"id": 77, **kw}) / udp() / Raw(payload))
    body = whole[34:]
    return [raw(ip(**{"id": 77, **kw}, proto=17, frag=o // 8, flags="MF" if o + size < len(body) else 0)
                / Raw(body[o:o + size])) for o in range(0, len(body), size)]


def test_fragments_become_the_datagram(plane: Classified) -> None:
    payload = bytes(range(256)) * 40
    parts = fragments(payload, 1480)
    plane.send(*reversed(parts))
    plane.work()
    (off, _, flags, _), = plane.rings["bridge"].descriptors()
    assert flags == 0
    (frame,) = plane.read("bridge")
    packet = Ether(frame)
    assert raw(packet[UDP].payload) == payload
    assert (packet[IP].flags, packet[IP].frag, packet[IP].len) == (0, 0, len(payload) + 28)
    assert parse(frame)[0] == "to_bridge"
    got = counts(plane.classify)
    assert (got["fragments_in"], got["reassembled"], got["to_bridge"], got["frames_in"]) == (7, 1, 1, 7)


def test_reassembled_datagram_is_checked_as_any_other(plane: Classified) -> None:
    parts = fragments(b"x" * 100, 48)
    parts[1] = recipes.poke(parts[1], 40, b"y")
    plane.through(*parts)
    got = counts(plane.classify)
    assert (got["reassembled"], got["drop_l4_checksum"], got["fragments_in"]) == (1, 1, 3)


def test_reassembled_datagram_for_services(plane: Classified) -> None:
    whole = raw(ip(dst=GATEWAY, id=5) / udp(dport=53) / Raw(bytes(60)))
    parts = [raw(ip(dst=GATEWAY, id=5, proto=17, frag=o // 8, flags=f) / Raw(whole[34 + o:34 + o + 40]))
             for o, f in ((0, "MF"), (40, 0))]
    assert raw(Ether(plane.through(*parts)["service"][0])[UDP]) == whole[34:]


def test_largest_datagram(plane: Classified) -> None:
    payload = bytes(65507)
    for part in fragments(payload, 1480):
        plane.send(part)
        plane.work()
    (frame,) = plane.read("bridge")
    assert len(frame) == 65549 and raw(Ether(frame)[UDP].payload) == payload


def test_reassembly_has_a_bound_and_gives_buffers_back() -> None:
    with Classified(large=4) as p:
        for i in range(40):
            p.through(fragments(b"x" * 100, 48, id=i)[0])
        got = counts(p.classify)
        assert (got["fragments_in"], got["drop_fragment_table"]) == (40, 36)  # 4 buffers: 4 under way
        out = p.through(*fragments(b"y" * 3000, 1480, id=1000))["bridge"]
        assert raw(Ether(out[0])[UDP].payload) == b"y" * 3000


def test_reassembly_waits_while_egress_is_full() -> None:
    parts = fragments(b"z" * 100, 48)
    with Classified(bridge_slots=2) as p:
        p.send(raw(ip() / tcp()), raw(ip() / tcp()), *parts)
        p.work()
        assert p.input.fill == 3
        assert len(p.read("bridge")) == 2
        p.work()
        assert raw(Ether(p.read("bridge")[0])[UDP].payload) == b"z" * 100
