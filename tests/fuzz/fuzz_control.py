"""Fuzz target: control messages, as bytes and as packets with descriptors.

Promised: decode() returns a message or raises MessageError, nothing else; what it returns encodes to what it came from;
Channel.recv() likewise, and with an error it leaves no descriptor open.
"""
from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import typing
from collections import Counter
from typing import Any

import msgspec

from pipeline import messages
from pipeline.messages import Channel, MessageError, decode, encode
from tests.fuzz import pyfuzz

_reached: Counter[str] = Counter()
_KINDS = typing.get_args(messages.Any)
_WORDS = ("", "egress", "in:tx", "bell:1", "x" * 300, "10.0.2.2", "host.ringnet.internal", "\0", "é")


def _value(rng: random.Random, kind: Any) -> Any:
    """Something of this type, within its bounds mostly."""
    info = msgspec.inspect.type_info(kind) if not isinstance(kind, msgspec.inspect.Type) else kind
    match info:
        case msgspec.inspect.IntType():
            low, high = info.ge if info.ge is not None else (info.gt or 0) + 1, info.le or (info.lt or 2**31) - 1
            return rng.choice((low, high, rng.randint(min(low, high), max(low, high))))
        case msgspec.inspect.BoolType():
            return rng.random() < 0.5
        case msgspec.inspect.FloatType():
            return rng.random()
        case msgspec.inspect.BytesType():
            return rng.randbytes(rng.randrange(20))
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
            return [_value(rng, info.item_type) for _ in range(rng.randrange(4))]
        case msgspec.inspect.TupleType():
            return [_value(rng, t) for t in info.item_types]
        case msgspec.inspect.DictType():
            return {_value(rng, info.key_type): _value(rng, info.value_type) for _ in range(rng.randrange(3))}
        case msgspec.inspect.StructType():
            fields = {f.encode_name: _value(rng, f.type) for f in info.fields if f.required or rng.random() < 0.5}
            return fields | ({info.tag_field: info.tag} if info.tag_field else {})
        case msgspec.inspect.UnionType():
            return _value(rng, rng.choice(info.types))
        case msgspec.inspect.LiteralType():
            return rng.choice(info.values)
        case msgspec.inspect.EnumType():
            return rng.choice(list(info.cls)).value
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.RawType():
            return {"tag": "egress"}
    return rng.choice(_WORDS)


def packet(rng: random.Random) -> bytes:
    return msgspec.msgpack.encode(_value(rng, rng.choice(_KINDS)))


def _decode(data: bytes) -> None:
    try:
        message = decode(data)
    except MessageError:
        _reached["refused"] += 1
        return
    _reached["decoded"] += 1
    assert isinstance(message, _KINDS)
    assert decode(encode(message)) == message


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def one(rng: random.Random) -> None:
    for _ in range(20):
        data = packet(rng)
        _decode(data)
        _decode(pyfuzz.mutate(rng, data))
        _decode(rng.randbytes(rng.randrange(40)))
    before = _descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(theirs)
    with ours:
        for _ in range(8):
            data = pyfuzz.mutate(rng, packet(rng)) or b"\xc0"
            fds = [ours.fileno()] * rng.choice((0, 0, 1, 3, 64, 90))
            ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
            held = _descriptors()
            try:
                got = channel.recv()
            except MessageError:
                _reached["packets_refused"] += 1
                assert _descriptors() == held, "a refused packet left descriptors open"
                continue
            assert got is not None
            _reached["packets"] += 1
            for fd in got[1]:
                os.close(fd)
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_WR)
        assert channel.recv() is None
    channel.close()
    assert _descriptors() == before


def report() -> dict[str, int]:
    return dict(_reached)


if __name__ == "__main__":
    pyfuzz.main(one, report)
