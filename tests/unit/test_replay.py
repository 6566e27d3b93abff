"""One stage alone, on a file: the same bytes each time, in the recording's time, with the host side as it was said."""
from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from frames.recipes import arp, ip, raw, tcp, udp
from hypothesis import given
from hypothesis import strategies as st
from netlab import DEADLINE, run_env
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import PcapNgReader, wrpcap

from pipeline import pcapng
from pipeline.pcapng import FROM_GUEST, TO_GUEST, CaptureError, Packet
from pipeline.replay import Numbers, Tcp, checksum, recorded_host, vnet_of

T0 = 1_700_000_000_000_000_000  # ns
S = 10**9


def recording(path: Path, *frames: tuple[float, bytes] | tuple[float, bytes, int], interface: str = "tap0") -> Path:
    """(seconds, frame, direction)"""
    path.write_bytes(pcapng.written([interface], [
        Packet(time_ns=T0 + round(f[0] * S), interface=interface, direction=f[2] if len(f) > 2 else FROM_GUEST, frame=f[1])
        for f in frames]))
    return path


def replay(stage: str, source: Path, *options: str, status: int = 0) -> tuple[list[Packet], str]:
    """What came out, and what was said. A process of its own: egress and services change their network namespace."""
    out = source.with_name(f"{stage}.out")
    done = subprocess.run([sys.executable, "-P", "-m", "pipeline", "stage", stage, "--replay", str(source), "--out", str(out),
                           *options], env=run_env(), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == status and "Traceback" not in done.stderr and done.stdout == "", done.stderr
    return (pcapng.read(out) if status == 0 else []), done.stderr


# -- files

packets = st.builds(Packet, time_ns=st.integers(0, 2**63 - 1), interface=st.sampled_from(["a", "b->c"]),
                    direction=st.sampled_from([0, FROM_GUEST, TO_GUEST]), frame=st.binary(max_size=200))


@given(st.lists(packets, max_size=20))
def test_what_is_written_is_read(made: list[Packet]) -> None:
    path = Path(f"/dev/shm/rnt-{os.getpid()}.pcapng")
    try:
        path.write_bytes(pcapng.written(["a", "b->c"], made))
        assert pcapng.read(path) == made
    finally:
        path.unlink(missing_ok=True)


def test_others_read_what_we_write(tmp_path: Path) -> None:
    path = recording(tmp_path / "x", (0, raw(arp())), (1.5, raw(ip() / udp() / b"hello"), TO_GUEST))
    with PcapNgReader(str(path)) as reader:
        found = [(p.time, bytes(p)) for p in reader]
    assert [round(float(t) - T0 / S, 3) for t, _ in found] == [0, 1.5]
    assert found[1][1] == raw(ip() / udp() / b"hello")


@pytest.mark.parametrize("nano", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_older_format_is_read(tmp_path: Path, order: str, nano: bool) -> None:
    path = tmp_path / "x.pcap"
    frame = raw(arp())
    wrpcap(str(path), [Ether(frame)], endianness=order, nano=nano)
    (one,) = pcapng.read(path)
    assert (one.frame, one.direction, one.interface) == (frame, 0, "")


def test_a_big_endian_section_is_read(tmp_path: Path) -> None:
    frame = raw(arp())
    packet = struct.pack(">IIIII", 0, 0, 5_000_000, len(frame), len(frame)) + frame + bytes(-len(frame) % 4)
    parts = [(0x0A0D0D0A, struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1)), (1, struct.pack(">HHI", 1, 0, 0)), (6, packet)]
    path = tmp_path / "x"
    path.write_bytes(b"".join(struct.pack(">II", k, len(b) + 12) + b + struct.pack(">I", len(b) + 12) for k, b in parts))
    assert pcapng.read(path) == [Packet(time_ns=5 * S, interface="", direction=0, frame=frame)]  # microseconds: the default


@given(st.data())
def test_a_damaged_file_is_an_error_and_no_crash(data: st.DataObject) -> None:
    whole = bytearray(pcapng.written(["a"], [Packet(time_ns=T0, interface="a", direction=1, frame=bytes(60))] * 3))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    path = Path(f"/dev/shm/rnt-{os.getpid()}.damaged")
    try:
        path.write_bytes(whole[:data.draw(st.integers(0, len(whole)))])
        pcapng.read(path)
    except CaptureError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    finally:
        path.unlink(missing_ok=True)


# -- the stages


def test_classify_on_a_file(tmp_path: Path) -> None:
    bad = bytearray(raw(ip() / tcp(dport=80, flags="S")))
    bad[-1] ^= 1
    source = recording(tmp_path / "in", (0, raw(arp())), (0.1, raw(ip() / udp(dport=53) / b"x")),
                       (0.2, raw(ip() / tcp(dport=80, flags="S"))), (0.3, bytes(bad)), (0.4, raw(arp()), TO_GUEST))
    out, said = replay("classify", source)
    assert [(p.interface, p.direction) for p in out] == [("classify->guest_rx", TO_GUEST), ("classify->egress", FROM_GUEST),
                                                         ("classify->egress", FROM_GUEST)]
    assert [p.time_ns - T0 for p in out] == [0, S // 10, S // 5]
    assert "4 frames of" in said and "3 out to" in said and "drop_l4_checksum=1" in said


def test_timers_run_in_the_recordings_time(tmp_path: Path) -> None:
    """Half a datagram; the rest never comes. A minute later something else does."""
    first = raw(Ether(raw(ip())[:14]) / IP(raw(ip() / udp(dport=7) / bytes(800))[14:]))[:14]
    whole = IP(raw(ip() / udp(dport=7) / bytes(800))[14:])
    piece = first + bytes(IP(src=whole.src, dst=whole.dst, proto=17, id=9, flags="MF") / bytes(whole[UDP])[:400])
    out, said = replay("classify", recording(tmp_path / "in", (0, piece), (60, raw(arp()))))
    exceeded, reply = out
    assert Ether(exceeded.frame)[ICMP].type == 11 and Ether(exceeded.frame)[ICMP].code == 1
    assert 10 * S <= exceeded.time_ns - T0 <= 31 * S and reply.time_ns - T0 == 60 * S
    assert "drop_fragment_timeout=1" in said


@pytest.mark.parametrize("stage", ["guest_tx", "guest_rx"])
def test_the_links_stages_on_a_file(tmp_path: Path, stage: str) -> None:
    frames = [raw(ip() / udp() / bytes(n)) for n in (0, 1, 1400)]
    way, other = (FROM_GUEST, TO_GUEST) if stage == "guest_tx" else (TO_GUEST, FROM_GUEST)
    source = recording(tmp_path / "in", *((n / 10, f, way) for n, f in enumerate(frames)), (1, raw(arp()), other))
    out, _ = replay(stage, source)
    assert [p.frame for p in out] == frames
    assert {p.interface for p in out} == {"guest_tx->classify" if stage == "guest_tx" else "link"}


def test_a_capture_of_rings_gives_a_stage_its_own(tmp_path: Path) -> None:
    made = [Packet(time_ns=T0 + n, interface=name, direction=TO_GUEST, frame=raw(ip() / udp() / bytes([n])))
            for n, name in enumerate(["egress->guest_rx", "classify->egress", "services->guest_rx"])]
    (tmp_path / "in").write_bytes(pcapng.written([p.interface for p in made], made))
    out, _ = replay("guest_rx", tmp_path / "in")
    assert [p.frame for p in out] == [made[0].frame, made[2].frame]


@pytest.mark.netns
def test_services_with_a_scripted_resolver(tmp_path: Path) -> None:
    def query(name: str, ident: int) -> bytes:
        return raw(ip(dst="10.0.2.1") / udp(sport=5000 + ident, dport=53) / DNS(id=ident, rd=1, qd=DNSQR(qname=name)))

    (tmp_path / "host.toml").write_text('[dns]\n"example.org" = "192.0.2.80"\n')
    source = recording(tmp_path / "in", (0, query("example.org", 1)), (0.1, query("other.example", 2)),
                       (0.2, query("host.ringnet.internal", 3)))
    out, _ = replay("services", source, "--host", str(tmp_path / "host.toml"))
    replies = {r[DNS].id: r[DNS] for r in (Ether(p.frame) for p in out)}
    assert (replies[1].an[0].rdata, replies[2].rcode, replies[3].an[0].rdata) == ("192.0.2.80", 3, "10.0.2.1")


@pytest.mark.netns
def test_egress_with_a_scripted_host(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text('[[udp]]\nport = 7\n[[udp]]\nport = 9\nreply = "fixed"\n'
                                        '[[tcp]]\nport = 80\nsend = "hello"\nthen = "close"\n')
    source = recording(
        tmp_path / "in", (0, raw(ip(dst="192.0.2.1") / udp(sport=1000, dport=7) / b"ping")),
        (0.1, raw(ip(dst="192.0.2.2") / udp(sport=1000, dport=9) / b"x")),
        (0.2, raw(ip(dst="192.0.2.3") / tcp(sport=1001, dport=80, flags="S", seq=100))),
        (0.3, raw(ip(dst="192.0.2.3") / tcp(sport=1002, dport=81, flags="S", seq=100))),
        (0.4, raw(ip(dst="192.0.2.3") / udp(sport=1003, dport=81) / b"nobody")))
    out, _ = replay("egress", source, "--host", str(tmp_path / "host.toml"))
    by_port: dict[int, list[Ether]] = {}
    for p in out:
        got = Ether(p.frame)
        by_port.setdefault(got[IP].payload.dport if got[IP].proto != 1 else 0, []).append(got)
    assert [(g[IP].src, bytes(g[UDP].payload)) for g in by_port[1000]] == [("192.0.2.1", b"ping"), ("192.0.2.2", b"fixed")]
    assert by_port[1001][0].sprintf("%TCP.flags%") == "SA" and by_port[1002][0].sprintf("%TCP.flags%") == "RA"
    assert (by_port[0][0][ICMP].type, by_port[0][0][ICMP].code) == (3, 3)


def test_vmnet_relays_both_ways_and_holds_a_storm(tmp_path: Path) -> None:
    """Each side's frames come out at the other, whole, in the recording's time: with two group frames a second each way."""
    (tmp_path / "options.toml").write_text('nic2 = "host,storm=2"\n')
    up = [raw(ip(dst="172.16.0.9") / udp(sport=1, dport=2) / (b"x" * n)) for n in (1, 200, 3000)]
    group = b"\xff" * 6 + raw(arp())[6:]
    frames = [(0.1 * n, f, FROM_GUEST) for n, f in enumerate(up)] + [(0.35, up[0], TO_GUEST)] + \
        [(0.4 + 0.01 * n, group, TO_GUEST) for n in range(4)] + [(2.5, group, TO_GUEST)]
    made, said = replay("vmnet", recording(tmp_path / "in", *frames), "--set", str(tmp_path / "options.toml"))
    assert [p.frame for p in made if p.interface == "bridge" and p.direction == FROM_GUEST] == up
    back = [p for p in made if p.interface == "vmnet->guest_rx" and p.direction == TO_GUEST]
    assert [p.frame for p in back] == [up[0], group, group, group] and len(made) == 7
    assert [(p.time_ns - T0) / S for p in back] == pytest.approx([0.35, 0.4, 0.41, 2.5])
    assert "drop_storm_down=2" in said
    assert replay("vmnet", tmp_path / "in", "--set", str(tmp_path / "options.toml"))[0] == made


def test_vmnet_takes_its_own_side_of_a_capture_of_all(tmp_path: Path) -> None:
    """guest_tx's ring and the bridge are its inputs; the same frames are also at link2, and what it made of them at the bridge."""
    one, other = raw(ip() / udp() / b"up"), raw(ip() / udp() / b"down")
    names = ["link2", "guest_tx->vmnet", "bridge", "vmnet->guest_rx"]
    (tmp_path / "in").write_bytes(pcapng.written(names, [
        Packet(time_ns=T0 + n, interface=i, direction=d, frame=f) for n, (i, d, f) in enumerate((
            ("link2", FROM_GUEST, one), ("guest_tx->vmnet", FROM_GUEST, one), ("bridge", FROM_GUEST, one),
            ("bridge", TO_GUEST, other), ("vmnet->guest_rx", TO_GUEST, other), ("link2", TO_GUEST, other)))]))
    made, said = replay("vmnet", tmp_path / "in")
    assert [(p.interface, p.frame) for p in made] == [("bridge", one), ("vmnet->guest_rx", other)]
    assert "2 frames" in said


@pytest.mark.parametrize(("arguments", "says", "status"), [
    (["classify", "--replay", "{no}", "--out", "{out}"], "No such file", 1),
    (["classify", "--replay", "{text}", "--out", "{out}"], "neither a pcapng nor a pcap file", 1),
    (["classify", "--replay", "{good}", "--out", "/no/such/dir/x"], "No such file", 1),
    (["classify", "--replay", "{good}"], "--replay and --out go together", 2),
    (["vmnet", "--replay", "{no}", "--out", "{out}"], "No such file", 1),
    (["classify", "--replay", "{good}", "--out", "{out}", "--seed", "-1"], "--seed -1: not within", 2),
    (["classify", "--replay", "{good}", "--out", "{out}", "--set", "{text}"], "--set", 2),
    (["egress", "--replay", "{good}", "--out", "{out}", "--host", "{text}"], "--host", 1),
    (["egress", "--replay", "{good}", "--out", "{out}", "--host", "{no}"], "--host", 1),
])
def test_what_is_wrong_is_one_line(tmp_path: Path, arguments: list[str], says: str, status: int) -> None:
    (tmp_path / "text").write_text("port = 80 80")
    recording(tmp_path / "good", (0, raw(arp())))
    names = {n: str(tmp_path / n) for n in ("no", "text", "good", "out")}
    done = subprocess.run([sys.executable, "-P", "-m", "pipeline", "stage", *(a.format(**names) for a in arguments)],
                          env=run_env(), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == status and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


# -- what a recording tells


def segment(way: int, seq: int, ack: int, flags: str, data: bytes = b"") -> tuple[float, bytes, int]:
    if way == FROM_GUEST:
        return 0.0, raw(ip(dst="192.0.2.1") / tcp(sport=4000, dport=80, seq=seq, ack=ack, flags=flags) / data), way
    there = ip(src="192.0.2.1", dst="10.0.2.2") / tcp(sport=80, dport=4000, seq=seq, ack=ack, flags=flags) / data
    return 0.0, raw(there), way


def test_the_host_side_is_read_out_of_the_recording() -> None:
    made = [segment(FROM_GUEST, 10, 0, "S"), segment(TO_GUEST, 2**32 - 1, 11, "SA"), segment(FROM_GUEST, 11, 0, "PA", b"GET"),
            segment(TO_GUEST, 0, 14, "PA", b"one"), segment(TO_GUEST, 3, 14, "A", b"two"),
            segment(TO_GUEST, 0, 14, "PA", b"onetwo!"), segment(FROM_GUEST, 14, 7, "PA", b"more"),
            segment(TO_GUEST, 7, 18, "FPA", b"end")]
    got = recorded_host(Packet(time_ns=0, interface="", direction=way, frame=f) for _, f, way in made)
    (talk,) = got.tcp[80]
    assert (talk.said, talk.then) == ([(3, b"onetwo!"), (7, b"end")], "close")


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_acknowledgements_are_translated(recorded: int, ours: int, past: int) -> None:
    numbers = Numbers()
    numbers.recorded(segment(TO_GUEST, recorded, 1, "SA")[1])
    numbers.ours(segment(TO_GUEST, ours, 1, "SA")[1])
    numbers.ours(segment(TO_GUEST, (ours + past) % 2**32, 1, "A")[1])  # all of it was sent
    _, frame, _ = segment(FROM_GUEST, 7, (recorded + past) % 2**32, "A", b"data")
    new = numbers.translated(frame)
    t = Tcp.of(new)
    assert t is not None and t.ack == (ours + past) % 2**32 and len(new) == len(frame)
    assert checksum(t.pseudo() + new[t.l4:t.end]) == 0xFFFF


def test_an_acknowledgement_that_is_early_waits_for_what_it_is_about() -> None:
    """The guest of the recording had 500 bytes; ours sent 100 of them so far, then 300, then the rest and a FIN."""
    numbers, recorded, ours = Numbers(), 1000, 2**32 - 50
    numbers.recorded(segment(TO_GUEST, recorded, 1, "SA")[1])
    numbers.ours(segment(TO_GUEST, ours, 1, "SA")[1])
    numbers.ours(segment(TO_GUEST, ours + 1, 1, "A", bytes(100))[1])
    _, frame, _ = segment(FROM_GUEST, 7, recorded + 501, "A", b"data")
    t = Tcp.of(numbers.translated(frame))
    assert t is not None and t.ack == (ours + 101) % 2**32 and numbers.owed() == []
    for sent, flags, lets in ((200, "A", 301), (199, "FA", 501)):
        numbers.ours(segment(TO_GUEST, (ours + lets - sent) % 2**32, 1, flags, bytes(sent))[1])
        (pure,) = numbers.owed()
        t = Tcp.of(pure)
        assert t is not None and (t.seq, t.ack, t.flags) == (11, (ours + lets) % 2**32, 0x10)
        assert len(pure) == 54 and checksum(t.pseudo() + pure[t.l4:t.end]) == 0xFFFF == checksum(pure[14:34])
        assert numbers.owed() == []
    assert numbers.translated(frame) != frame and numbers.owed() == []  # nothing is early any more


def test_unfinished_checksums_get_their_header_back() -> None:
    frame = bytearray(raw(ip() / tcp(dport=80, flags="PA") / bytes(3000)))
    assert vnet_of(bytes(frame), 1500) == bytes(12)  # it is finished
    t = Tcp.of(bytes(frame))
    assert t is not None
    frame[t.l4 + 16:t.l4 + 18] = struct.pack("!H", checksum(t.pseudo()))
    assert struct.unpack("<BBHHHHH", vnet_of(bytes(frame), 4000)) == (1, 0, 0, 0, 34, 16, 0)
    assert struct.unpack("<BBHHHHH", vnet_of(bytes(frame), 1500)) == (1, 1, 54, 1460, 34, 16, 0)
    small = bytearray(raw(ip() / udp() / b"hi"))
    small[40:42] = struct.pack("!H", checksum(bytes(small[26:34]) + struct.pack("!BBH", 0, 17, 10)))
    assert struct.unpack("<BBHHHHH", vnet_of(bytes(small), 1500)) == (1, 0, 0, 0, 34, 6, 0)
    assert re.fullmatch("0{24}", vnet_of(b"short", 1500).hex())
