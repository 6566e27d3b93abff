"""Control messages: what is sent arrives, descriptors included; what is no message is refused by field."""
from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import messages
from pipeline.messages import (
    Answer,
    Cancel,
    Channel,
    CloseFlow,
    Configure,
    End,
    Ended,
    Failed,
    Hello,
    HostsChange,
    Leased,
    LogLevel,
    MessageError,
    Notices,
    Ping,
    Pong,
    Ready,
    Running,
    Start,
    decode,
    encode,
)
from tests.fds import open_fds

WORDS = st.text(max_size=20)
COUNT = st.integers(0, 2**64 - 1)
SIZE = st.integers(1, 2**40)
ROW = st.integers(0, 7)
ENDS = st.lists(st.builds(End, ring=WORDS, size=SIZE, row=ROW, role=st.integers(0, 5)), max_size=3).map(tuple)
MESSAGES = st.one_of(
    st.builds(Hello, version=COUNT, stage=WORDS, pid=COUNT),
    st.builds(Configure, version=COUNT, stage=WORDS, row=ROW, generation=COUNT, session_size=SIZE, arena_size=SIZE,
              has_part=st.booleans(), flows_size=SIZE, inputs=ENDS, outputs=ENDS,
              fds=st.lists(WORDS, max_size=5).map(tuple),
              config=st.dictionaries(WORDS, COUNT, max_size=3).map(lambda d: msgspec.Raw(msgspec.msgpack.encode(d)))),
    st.just(Ready()), st.just(Start()), st.just(Running()),
    st.builds(Cancel, drain_ms=st.integers(0, 10**6)),
    st.builds(Ended, reason=WORDS, counters=st.dictionaries(WORDS, COUNT, max_size=5)),
    st.builds(HostsChange, seq=COUNT, names=st.dictionaries(WORDS, st.lists(WORDS, max_size=3).map(tuple), max_size=3),
              own=st.lists(WORDS, max_size=2).map(tuple), disown=st.lists(WORDS, max_size=2).map(tuple),
              commit=st.booleans()),
    st.builds(CloseFlow, seq=COUNT, index=st.integers(0, 2**32 - 1), gen=st.integers(0, 2**32 - 1)),
    st.builds(LogLevel, seq=COUNT, level=st.sampled_from(["error", "warning", "info", "debug"])),
    st.builds(Notices, seq=COUNT, on=st.booleans()), st.builds(Answer, seq=COUNT, error=WORDS),
    st.builds(Leased, address=WORDS, mac=WORDS, hostname=WORDS, seconds=COUNT, lost=COUNT),
    st.builds(Failed, error=WORDS), st.builds(Ping, seq=COUNT), st.builds(Pong, seq=COUNT),
)


def plain(message: object) -> object:
    """Comparable: Raw is equal by identity only."""
    return msgspec.msgpack.decode(encode(message))  # type: ignore[arg-type]


@given(MESSAGES)
def test_what_is_encoded_is_decoded(message: messages.Message) -> None:
    again = decode(encode(message))
    assert type(again) is type(message)
    assert plain(again) == plain(message)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_an_error_of_ours(packet: bytes) -> None:
    try:
        assert isinstance(decode(packet), messages.Message)
    except MessageError as e:
        assert "control message" in str(e)


@pytest.mark.parametrize(("fields", "names"), [
    ({"type": "hello", "version": "one", "stage": "egress", "pid": 1}, r"\$\.version"),
    ({"type": "hello", "version": 1, "stage": "egress"}, "pid"),
    ({"type": "cancel", "drain_ms": -1}, r"\$\.drain_ms"),
    ({"type": "ended", "reason": "x", "counters": {"a": "b"}}, r"\$\.counters"),
    ({"type": "ready", "surplus": 1}, "surplus"),
    ({"type": "nonsense"}, r"nonsense.*\$\.type"),
    ({"version": 1}, "type"),
])
def test_an_error_names_the_field(fields: dict[str, object], names: str) -> None:
    with pytest.raises(MessageError, match=names):
        decode(msgspec.msgpack.encode(fields))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = Channel(a), Channel(b)
    yield ends
    for end in ends:
        end.close()


def configure(*fds: str) -> Configure:
    return Configure(version=1, stage="egress", row=2, generation=0, session_size=1, arena_size=1, has_part=True,
                     flows_size=0, inputs=(), outputs=(), fds=fds, config=msgspec.Raw(b"\x80"))


def test_descriptors_come_in_order_and_close_on_exec(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    pipes = [os.pipe() for _ in range(3)]
    a.send(configure("one", "two", "three"), [r for r, _ in pipes])
    got = b.recv()
    assert got is not None
    message, fds = got
    assert message.fds == ("one", "two", "three")
    for n, (r, w) in enumerate(pipes):
        assert not os.get_inheritable(fds[n])
        os.write(w, bytes([n]))
        assert os.read(fds[n], 1) == bytes([n])
        for fd in (r, w, fds[n]):
            os.close(fd)


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_a_wrong_number_of_descriptors_is_refused_and_none_leaks(pair: tuple[Channel, Channel], sent: int) -> None:
    a, b = pair
    before = open_fds()
    a.send(configure("one", "two"), [a.fileno()] * sent)
    with pytest.raises(MessageError, match=f"fds names 2 descriptors, {sent} came"):
        b.recv()
    assert open_fds() == before


def test_descriptors_with_a_message_that_has_none_are_refused_and_closed(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    before = open_fds()
    a.sock.sendmsg([encode(Ready())], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [a.fileno()]))])
    with pytest.raises(MessageError, match="Ready"):
        b.recv()
    assert open_fds() == before


def test_a_packet_over_the_limit_is_refused(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.send(Failed(error="x" * messages.PACKET_MAX))
    with pytest.raises(MessageError, match="cut"):
        b.recv()


def test_the_end_of_the_peer_is_none_after_what_it_said(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.send(Ready())
    b.send(Start())  # never read: the kernel then reports a reset, ahead of what is still to be read
    a.close()
    assert b.recv() == (Ready(), [])
    assert b.recv() is None
    with pytest.raises(OSError):
        b.send(Start())


def test_nothing_waiting_is_not_the_end(pair: tuple[Channel, Channel]) -> None:
    _, b = pair
    assert not b.wait(0)
    with pytest.raises(BlockingIOError):
        b.recv()


def test_every_exit_code_is_its_own() -> None:
    assert len(set(messages.Exit)) == len(messages.Exit.__members__)
    assert len(set(messages.StageExit)) == len(messages.StageExit.__members__)
