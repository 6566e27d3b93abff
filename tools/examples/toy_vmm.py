#!/usr/bin/env python3
"""A toy VMM around ringnet's datapath: its "virtual machine" is this loop. It finds the gateway, pings it COUNT times, and
answers whoever resolves or pings it. Run with the checkout's interpreter: .venv/bin/python tools/examples/toy_vmm.py [COUNT]"""
import os
import select
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from pipeline.datapath import Cancellation, create_datapath  # noqa: E402

MAC, IP, GATEWAY = bytes.fromhex("525400000001"), bytes((10, 0, 2, 2)), bytes((10, 0, 2, 1))


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return 0xFFFF ^ (total % 0xFFFF or (0xFFFF if total else 0))


def arp(op: int, to_mac: bytes, to_ip: bytes) -> bytes:
    head = (to_mac if op == 2 else b"\xff" * 6) + MAC + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, op)
    return head + MAC + IP + to_mac + to_ip


def echo(kind: int, mac: bytes, ip: bytes, rest: bytes) -> bytes:
    """An ICMP echo (8) or its reply (0); rest: identifier, sequence number, data."""
    icmp = struct.pack("!BBH", kind, 0, checksum(bytes((kind, 0, 0, 0)) + rest)) + rest
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0x4000, 64, 1, 0, IP, ip)
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return mac + MAC + b"\x08\x00" + header + icmp


def main(count: int) -> int:
    with Cancellation() as token, create_datapath(mtu=1500, cancel=token, hosts={"toy.internal": "192.0.2.7"}) as net:
        os.write(net.fd, arp(1, bytes(6), GATEWAY))
        seq, sent = 0, 0.0
        while seq < count:
            if not select.select([net.fd], [], [], 10.0)[0]:
                sys.exit("the datapath does not answer")
            frame = os.read(net.fd, 65536)
            if frame[12:14] == b"\x08\x06" and frame[21] == 1 and frame[38:42] == IP:
                os.write(net.fd, arp(2, frame[22:28], frame[28:32]))
            elif frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 8:
                os.write(net.fd, echo(0, frame[6:12], frame[26:30], frame[38:]))
            elif frame[12:14] == b"\x08\x06" or (frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 0):
                if frame[12:14] == b"\x08\x00":
                    seq += 1
                    print(f"reply from {'.'.join(map(str, frame[26:30]))} seq={seq} {(time.monotonic() - sent) * 1e3:.2f} ms")
                sent = time.monotonic()
                os.write(net.fd, echo(8, frame[6:12], GATEWAY, struct.pack("!HH", 1, seq + 1) + b"toy ping"))
        token.cancel()
        return 0 if net.wait(10) else 1


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
