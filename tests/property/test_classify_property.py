"""classify for any bytes: never a crash, every frame counted exactly once, and no damaged packet passes."""
from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from frames import GATEWAY, GATEWAY_MAC, GUEST_MAC, load
from frames.inproc import COUNTERS, Classified, config, count
from frames.recipes import ICMP, IP, TCP, UDP, Ether, IPOption_NOP, Raw, ip, raw
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from shm._dataplane import ffi, lib

FRAMES = [f for f in load() if len(f.data) >= 14]
VERDICTS = [ffi.string(lib.rn_verdict_name(v)).decode() for v in range(lib.RN_NVERDICTS)]
OUTCOMES = sorted({*VERDICTS, "drop_services_full", "drop_reply_full"})
CFG, OUT = config(), ffi.new("struct rn_parsed *")
relaxed = settings(deadline=None, max_examples=200)


def parse(data: bytes, vnet: bytes | None = None) -> str:
    # A copy of its own size, so that a sanitizer or valgrind sees one byte too many.
    buf = ffi.new("uint8_t[]", data)
    v = lib.rn_parse_bytes(buf, len(data), vnet or ffi.NULL, CFG, OUT)
    for off, n in ((OUT.l3_off, 0), (OUT.l4_off, OUT.l4_len), (OUT.payload_off, OUT.payload_len)):
        assert off + n <= OUT.frame_len <= len(data)
    return VERDICTS[v]


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A frame from the collection with bytes changed, cut out, put in or cut off; or plain noise."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(FRAMES)).data)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, min(len(data) - 1, 80))))
        match draw(st.integers(0, 3)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at:at + draw(st.integers(1, 20))]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
            case 3:
                del data[draw(st.integers(0, len(data))):]
    if len(data) >= 34 and draw(st.booleans()):  # a right header checksum leads to the checks behind it
        n = min((data[14] & 15) * 4, len(data) - 14) & ~1
        data[24:26] = b"\0\0"
        total = sum(int.from_bytes(data[i:i + 2], "big") for i in range(14, 14 + n, 2))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        data[24:26] = (total ^ 0xFFFF).to_bytes(2, "big")
    return bytes(data)


@relaxed
@given(hostile(), st.none() | st.binary(min_size=12, max_size=12))
def test_any_bytes_have_a_verdict_and_offsets_in_the_frame(data: bytes, vnet: bytes | None) -> None:
    parse(data, vnet)


@settings(deadline=None)
@given(payload=st.integers(0, 2000), each=st.integers(0, 2100), dst=st.sampled_from(["192.0.2.10", GATEWAY]),
       dport=st.sampled_from([7, 53]), options=st.integers(0, 10))
def test_a_train_is_what_its_header_says(payload: int, each: int, dst: str, dport: int, options: int) -> None:
    packet = ip(dst=dst, options=[IPOption_NOP()] * (4 * options)) / UDP(sport=4000, dport=dport, chksum=1) / Raw(bytes(payload))
    data, l4 = raw(packet), 34 + 4 * options
    header = struct.pack("<BBHHHHH", 1, 5, l4 + 8, each, l4, 6, 0)
    if not each:
        assert not lib.rn_vnet_ok(header, len(data))
        return
    n = max(1, -(-payload // each))
    if n > lib.RN_USO_DATAGRAMS_MAX:
        assert parse(data, header) == "drop_gso_mismatch"
        return
    assert parse(data, header) == ("to_services" if (dst, dport) == (GATEWAY, 53) else "to_bridge")
    assert (OUT.payload_off, OUT.payload_len, OUT.each) == (l4 + 8, payload, each if n > 1 else 0)


@pytest.fixture(scope="module")
def plane() -> Iterator[Classified]:
    with Classified(slots=64) as p:
        yield p


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(hostile(), st.sampled_from([bytes(12), bytes.fromhex("010000000000220010000000"),
                                                      bytes.fromhex("01013600b405220010000000"),
                                                      bytes.fromhex("01052a001400220006000000")])),
                min_size=1, max_size=50))
def test_every_frame_is_counted_exactly_once(plane: Classified, frames: list[tuple[bytes, bytes]]) -> None:
    """frames_in + reassembled + trains_cut == the sum of the outcomes, over the stage's whole life; and what was counted
    as handed on comes out."""
    before = {n: count(plane.classify, n) for n in COUNTERS}
    for data, vnet in frames:
        plane.guest.send(vnet + data)
    plane.send()
    plane.work()
    got = {n: count(plane.classify, n) - before[n] for n in COUNTERS}
    out = {name: len(plane.read(name)) for name in plane.rings}
    assert plane.input.fill == 0
    assert got["frames_in"] + got["reassembled"] + got["trains_cut"] == sum(got[n] for n in OUTCOMES)
    assert out == {"bridge": got["to_bridge"], "service": got["to_services"],
                   "reply": got["arp_replies"] + got["icmp_errors_sent"]}
    assert got["frames_out"] == sum(out.values())
    assert count(plane.guest_tx, "frames_out") == count(plane.classify, "frames_in")
    assert count(plane.guest_tx, "frames_in") == sum(count(plane.guest_tx, n) for n in (
        "frames_out", "drop_runt", "drop_oversize", "drop_bad_vnet_header"))


def world() -> st.SearchStrategy[str]:
    """Addresses somebody can have."""
    return st.integers(1 << 24, (224 << 24) - 1).filter(
        lambda a: a >> 24 != 127 and a >> 8 != 0x0A0002).map(
            lambda a: ".".join(str(a >> s & 255) for s in (24, 16, 8, 0)))


ports = st.integers(1, 65535)
payloads = st.binary(max_size=300)


@st.composite
def packets(draw: st.DrawFn, udp: bool = True) -> tuple[Ether, bytes]:
    """A correct packet to somewhere, and its payload."""
    payload = draw(payloads)
    kinds = [
        lambda: TCP(sport=draw(ports), dport=draw(ports), seq=draw(st.integers(0, 2**32 - 1)), ack=draw(ports),
                    flags=draw(st.sampled_from(["S", "A", "PA", "FA", "R", "RA", "SEC"])),
                    options=[("NOP", None)] * draw(st.integers(0, 40))),
        lambda: ICMP(type=8, id=draw(ports), seq=draw(ports)),
        lambda: UDP(sport=draw(ports), dport=draw(ports)),
    ]
    l4 = draw(st.sampled_from(kinds if udp else kinds[:2]))()
    header = ip(dst=draw(world() | st.just(GATEWAY)), ttl=draw(st.integers(1, 255)), id=draw(st.integers(0, 65535)),
                tos=draw(st.integers(0, 255)), flags=draw(st.sampled_from(["DF", ""])),
                src=f"10.0.2.{draw(st.integers(2, 254))}", options=[IPOption_NOP()] * draw(st.integers(0, 40)))
    return header / l4 / Raw(payload), payload


@relaxed
@given(packets(), st.integers(0, 40))
def test_whatever_scapy_makes_right_is_passed(made: tuple[Ether, bytes], padding: int) -> None:
    packet, payload = made
    data = raw(packet)
    verdict = parse(data + bytes(padding))
    service = UDP in packet and (packet[UDP].dport, packet[IP].dst) in ((53, GATEWAY), (67, GATEWAY))
    assert verdict == ("to_services" if service else "to_bridge")
    assert OUT.frame_len == len(data)
    assert data[OUT.payload_off:OUT.payload_off + OUT.payload_len] == payload


@relaxed
@given(packets(udp=False), st.data())
def test_no_flipped_bit_passes(made: tuple[Ether, bytes], data: st.DataObject) -> None:
    """Checksums cover the whole packet, and each check on the way to them fails safe. (UDP is left out: one flipped bit
    can make its checksum zero, which means none.)"""
    good = bytearray(raw(made[0]))
    bit = data.draw(st.integers(14 * 8, len(good) * 8 - 1))
    good[bit // 8] ^= 1 << bit % 8
    assert parse(bytes(good)) not in ("to_bridge", "to_services", "fragments_in")


@relaxed
@given(packets(), st.integers(1, 400))
def test_nothing_cut_passes(made: tuple[Ether, bytes], n: int) -> None:
    data = raw(made[0])
    assert parse(data[:max(0, len(data) - n)]).startswith("drop_")


@settings(deadline=None, max_examples=60)
@given(packets(udp=False), st.integers(0, 2**16 - 1))
@example((ip() / TCP() / Raw(b"x"), 0), 0)
def test_partial_checksum_is_believed_only_where_it_is_promised(made: tuple[Ether, bytes], other: int) -> None:
    packet, _ = made
    assume(TCP in packet)
    right = Ether(raw(packet))[TCP].chksum
    assume(other not in (right, right ^ 0xFFFF))
    data = bytearray(raw(packet))
    l4 = 14 + Ether(raw(packet))[IP].ihl * 4
    data[l4 + 16:l4 + 18] = other.to_bytes(2, "big")
    vnet = b"\1" + bytes(5) + l4.to_bytes(2, "little") + b"\x10\0" + bytes(2)
    assert parse(bytes(data)) == "drop_l4_checksum"
    assert parse(bytes(data), vnet) == "to_bridge"
    assert parse(bytes(data), vnet[:6] + (l4 + 2).to_bytes(2, "little") + vnet[8:]) == "drop_l4_checksum"


@relaxed
@given(st.binary(min_size=28, max_size=60), st.binary(min_size=6, max_size=6))
def test_arp_is_answered_only_for_the_gateway(body: bytes, mac: bytes) -> None:
    """Whatever else it says, an answer is about our address and goes to who asked."""
    frame = bytes.fromhex(GATEWAY_MAC.replace(":", "")) + bytes.fromhex(GUEST_MAC.replace(":", "")) + b"\x08\x06"
    ours = bytes.fromhex("0001080006040001") + mac + body[14:24] + b"\x0a\0\2\1"
    for data in (frame + body, frame + ours):
        out = ffi.new("uint8_t[42]")
        n = lib.arp_answer_bytes(data, len(data), CFG, out)
        answer = bytes(out)
        assert n in (0, 42)
        if n:
            assert data[38:42] == bytes([10, 0, 2, 1]) and not data[22] & 1
            assert answer[:6] == data[22:28] and answer[28:32] == bytes([10, 0, 2, 1]) and answer[20:22] == b"\0\2"
        else:
            assert not any(answer)
