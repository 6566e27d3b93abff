"""The control API's server: a Unix socket in the supervisor's own loop. Words: pipeline/api.py, docs/control-api.md.

Nobody is waited for. A client's requests are done one after the other, one at a time: what a stage has to confirm
(names, closing a flow) is answered when it did, and meanwhile other clients go on. Forwards are the exception: the
change is complete when the call returns (Session.change_forwards), below a millisecond for 60 of them. Changes of the
names are made one after the other for all clients, so that each sees the outcome of the one before.

Bounds for each client: LINE_MAX bytes of a request (longer: an error, and the rest of the line is skipped); while
OUT_MAX bytes of replies are unread no more requests are taken; events that find EVENTS_MAX unread bytes are dropped,
and counted in the `lost` event that comes in their place; REQUESTS_A_TURN requests, then the loop goes round.
CLIENTS_MAX clients: for one more, the one that was silent longest is sent away. Frames never pass here: nothing a
client does is in their way.

slirp4netns's requests ({"execute": ...}, slirp4netns(1)) are understood on the same socket: as there, one a connection,
with or without a newline, and the connection is closed after the reply.
"""
from __future__ import annotations

import array
import contextlib
import errno
import ipaddress
import os
import re
import select
import selectors
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from pipeline import api, monitor
from pipeline.api import ApiError, Code
from pipeline.captures import CaptureError, Captures
from pipeline.config import FORWARDS_OWNER as OPTIONS_OWNER
from pipeline.debug_api import DebugApi
from pipeline.forwards import Auto, Forward, ForwardError, ForwardSyntaxError, Proto, parse_auto
from pipeline.forwards import autos as parse_autos
from pipeline.forwards import check as check_forward
from pipeline.forwards import parse as parse_forwards
from pipeline.hosts_book import Delta, HostsBook, NotThere
from pipeline.messages import CloseFlow, FrameFilter, HostsChange, Notices
from pipeline.policy import PolicyError
from pipeline.seats import SeatError
from pipeline.second_nic import Nic2Error, SecondNic
from pipeline.session_dir import Listening
from pipeline.supervisor import Session

CLIENTS_MAX = 64
OUT_MAX = 256 << 10  # bytes of unread replies above which no request is taken
EVENTS_MAX = 512 << 10  # bytes unread above which events are dropped
RECV = 65536
SEND = 256 << 10  # bytes a send(): the supervisor has other things to do
REQUESTS_A_TURN = 32
PART = 16384  # bytes of names, about, in one message to services: PACKET_MAX is 65536
SLIRP_OWNER = "slirp4netns"  # of forwards made by its requests
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}

Done = Callable[[Any], None]  # takes a result, or an ApiError


class _Later:
    """A call answers by itself, later."""


LATER = _Later()


class Carried(msgspec.Struct):
    """A result with descriptors beside it: the caller's own if `give` is not set, else closed when they are sent."""

    result: Any
    fds: list[int]
    give: bool = False


_request = msgspec.json.Decoder(api.Request)
_slirp = msgspec.json.Decoder(api.SlirpRequest)
_args = {name: msgspec.json.Decoder(call) for name, call in api.CALLS.items()}
_encode = msgspec.json.Encoder().encode


def said(error: Exception) -> str:
    """What msgspec, or the text decoder, found wrong, as a sentence that names the field."""
    text, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    for pattern, why in ((r"Object contains unknown field `(.*)`", "unknown field"),
                         (r"Object missing required field `(.*)`", "missing")):
        if named := re.fullmatch(pattern, text, re.S):
            return f"{path + '.' if path else ''}{named[1]}: {why}".replace("\n", " ")
    text = text.replace("`", "")
    return f"{path}: {text[:1].lower()}{text[1:]}" if path else text[:1].lower() + text[1:]


_Item = TypeVar("_Item")


def _page(items: list[_Item], start: int, limit: int) -> tuple[list[_Item], int | None]:
    """A page, and where the next one starts."""
    end = start + limit
    return items[start:end], end if end < len(items) else None


def _parts(delta: Delta) -> Iterator[HostsChange]:
    """What services is told, in messages of bounded size; the last one commits."""
    names: dict[str, tuple[str, ...]] = {}
    own: list[str] = []
    disown: list[str] = []
    size = 0
    for name, addresses in delta.told.items():
        names[name] = addresses
        size += len(name.encode()) + sum(map(len, addresses)) + 8
        if size > PART:
            yield HostsChange(names=names, commit=False)
            names, size = {}, 0
    for domains, told in ((own, delta.told_own), (disown, delta.told_disown)):
        for domain in told:
            domains.append(domain)
            size += len(domain.encode()) + 8
            if size > PART:
                yield HostsChange(names=names, own=tuple(own), disown=tuple(disown), commit=False)
                names, size = {}, 0
                own.clear()
                disown.clear()
    yield HostsChange(names=names, own=tuple(own), disown=tuple(disown))


def _peer(sock: socket.socket) -> tuple[int, int]:
    """(process, user) of the other end, as of its connect()."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _read_only(fd: int) -> int:
    """Another descriptor of the same memory, that cannot be mapped for writing."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _hung_up(sock: socket.socket) -> bool:
    """Did the peer close its end whole, not only for writing?"""
    p = select.poll()
    p.register(sock, 0)  # POLLHUP is always told
    return bool(p.poll(0))


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket, serial: int) -> None:
        self.sock = sock
        self.serial = serial  # grows with each request of any client: least is silent longest
        self.inbuf = bytearray()
        self.out = bytearray()
        self.skipping = False  # a line over LINE_MAX, until its end
        self.busy = False  # a request is under way
        self.eof = False
        self.closing = False  # once `out` is sent
        self.gone = False
        self.events: frozenset[str] = frozenset()
        self.lost = 0
        self.sent = 0  # bytes, ever
        self.fds: deque[tuple[int, list[int]]] = deque()  # descriptors, and the byte, counted as `sent`, they go with
        self.captures: set[int] = set()  # of this connection


class ControlApi:
    """Serves a session's control API from the session's own loop, until close()."""

    def __init__(self, session: Session, *, name: str, path: str = "") -> None:
        """path: of the socket; "": in the directory of sessions, by name. Raises SessionDirError."""
        self.session = session
        self.name = name
        self.clients: list[Client] = []
        self.book = HostsBook()
        self.captures = Captures(session)
        self._slirp_ids: dict[int, Forward] = {}
        self._slirp_next = 1
        self._serial = 0
        self._handling = False
        self._hosts_queue: deque[tuple[Callable[[], Delta], Done]] = deque()  # the first is under way
        self._notices = False
        self.book.commit(self.book.plan_add(OPTIONS_OWNER, session.settings.hosts_table(), ()))
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)  # given up to refuse a client: EMFILE
        self.calls: dict[type[api.Call], Callable[[Client, Any, Done], Any]] = {
            api.ForwardsAdd: self._forwards_add, api.ForwardsRemove: self._forwards_remove,
            api.ForwardsReplace: self._forwards_replace, api.ForwardsList: self._forwards_list,
            api.HostsAdd: self._hosts_add, api.HostsRemove: self._hosts_remove,
            api.HostsReplace: self._hosts_replace, api.HostsList: self._hosts_list,
            api.GetStatus: self._status, api.Stages: self._stages, api.Statistics: self._statistics,
            api.FlowsList: self._flows_list, api.FlowsClose: self._flows_close, api.PolicyList: self._policy_list,
            api.PolicyReplace: self._policy_replace, api.Log: self._log,
            api.CancelNic: self._cancel, api.Subscribe: self._subscribe, api.StageHold: self._stage_hold,
            api.StageRelease: self._stage_release, api.StageTake: self._stage_take, api.Memory: self._memory,
            api.CaptureStart: self._capture_start, api.CaptureStop: self._capture_stop,
            api.StartNic: self._start_nic,
        }
        self.calls |= DebugApi(session, LATER).calls
        try:
            self.listening = Listening(name, path)
        except BaseException:
            os.close(self._spare)
            raise
        session.watch(self.listening.sock.fileno(), self._accept)
        session.listeners.append(self._happened)
        session.seats.listeners.append(self._seated)

    def close(self) -> None:
        """Say what can be said without waiting, and let go. The session must not be closed yet."""
        self.session.listeners.remove(self._happened)
        self.session.seats.listeners.remove(self._seated)
        self.session.unwatch(self.listening.sock.fileno())
        self.listening.close()
        for client in list(self.clients):
            self._flush(client)
            self._drop(client)
        self.captures.close()
        os.close(self._spare)

    # -- connections

    def _accept(self) -> None:
        for _ in range(8):
            try:
                sock, _ = self.listening.sock.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # the client is gone again
                os.close(self._spare)  # make room to take it, and to let it go: else it would wake us for ever
                with contextlib.suppress(OSError):
                    self.listening.sock.accept()[0].close()
                self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                return
            if _peer(sock)[1] not in (0, os.geteuid()):  # the file's mode says so already, but for who got the descriptor
                sock.close()
                continue
            sock.setblocking(False)
            if len(self.clients) >= CLIENTS_MAX:
                silent = min(self.clients, key=lambda c: c.serial)
                self._put(silent, api.Reply(id=None, ok=False, error=api.Error(
                    code=Code.BUSY, text=f"over {CLIENTS_MAX} clients, and this one was silent longest")))
                self._flush(silent)
                self._drop(silent)
            self._serial += 1
            client = Client(sock, self._serial)
            self.clients.append(client)
            self._await(client)

    def _drop(self, client: Client) -> None:
        if client.gone:
            return
        client.gone = True
        self.clients.remove(client)
        for _, fds in client.fds:
            _close(fds)
        for number in list(client.captures):
            self.captures.end(number)
        self.session.unwatch(client.sock.fileno())
        client.sock.close()
        self._want_notices()

    def _takes(self, client: Client) -> bool:
        """May another request of this client be looked at?"""
        return not client.busy and not client.closing and len(client.out) <= OUT_MAX

    def _await(self, client: Client) -> None:
        """Ask the loop for what this client can go on with."""
        events = 0
        if client.out or (self._takes(client) and b"\n" in client.inbuf):  # lines that wait: as soon as it is our turn
            events |= selectors.EVENT_WRITE
        if self._takes(client) and not client.eof and len(client.inbuf) <= api.LINE_MAX:
            events |= selectors.EVENT_READ
        if events:
            self.session.watch(client.sock.fileno(), lambda: self._ready(client), events)
        else:
            self.session.unwatch(client.sock.fileno())

    def _ready(self, client: Client) -> None:
        if self._handling:
            return  # a call waits in the loop for something: one at a time
        self._flush(client)
        if not client.gone and self._takes(client) and not client.eof and len(client.inbuf) <= api.LINE_MAX:
            self._receive(client)
        self._go_on(client)

    def _go_on(self, client: Client) -> None:
        """Do waiting requests, send, close if that was all."""
        for _ in range(REQUESTS_A_TURN):
            if client.gone or not self._takes(client):
                break
            line = self._line(client)
            if line is None:
                break
            self._handle(client, line)
        if client.gone:
            return
        self._flush(client)
        if client.gone:
            return
        # A client that said all it wants may still read: its replies, and events if it asked for them.
        over = client.eof and not client.inbuf and not client.busy and not (client.events and not _hung_up(client.sock))
        if (client.closing or over) and not client.out:
            self._drop(client)
            return
        self._await(client)

    def _receive(self, client: Client) -> None:
        try:
            data = client.sock.recv(RECV)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        client.eof = not data
        client.inbuf += data

    def _line(self, client: Client) -> bytes | None:
        """The next whole line, if there is one; too long ones are answered here."""
        while True:
            end = client.inbuf.find(b"\n")
            if end < 0 and client.eof and client.inbuf:
                client.inbuf += b"\n"
                continue
            if client.skipping or end > api.LINE_MAX or (end < 0 and len(client.inbuf) > api.LINE_MAX):
                if not client.skipping:
                    self._refuse(client, None, Code.TOO_LONG, f"the line is over {api.LINE_MAX} bytes")
                client.skipping = end < 0
                del client.inbuf[:end + 1 if end >= 0 else len(client.inbuf)]
                if end < 0 or not self._takes(client):
                    return None
                continue
            if end < 0:
                return self._unended(client)
            line = bytes(client.inbuf[:end])
            del client.inbuf[:end + 1]
            if line.strip():
                return line

    @staticmethod
    def _unended(client: Client) -> bytes | None:
        """slirp4netns's clients send no newline (`echo -n`): a whole request of theirs counts as a line."""
        if not client.inbuf.endswith((b"}", b" ")) or b'"execute"' not in client.inbuf:
            return None
        line = bytes(client.inbuf)
        try:
            _slirp.decode(line)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
            if not isinstance(e, msgspec.ValidationError):
                return None  # not whole yet
        client.inbuf.clear()
        return line

    def _flush(self, client: Client) -> None:
        while client.out:
            upto, with_it = SEND, False
            if client.fds:  # SCM_RIGHTS come with the first byte of the send() they go with (unix(7))
                ahead = client.fds[0][0] - client.sent
                with_it = ahead == 0
                upto = min(SEND, ahead) if ahead else 1
            anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", client.fds[0][1]))] if with_it else []
            try:
                sent = client.sock.sendmsg([memoryview(client.out)[:upto]], anc)
            except BlockingIOError:
                return
            except OSError:
                self._drop(client)
                return
            del client.out[:sent]
            client.sent += sent
            if with_it:
                _close(client.fds.popleft()[1])
        self._tell_lost(client)

    @staticmethod
    def _tell_lost(client: Client) -> None:
        """In the place of the events that were dropped, before any later one."""
        if client.lost and not client.gone:
            lost, client.lost = client.lost, 0
            client.out += _encode(api.Lost(count=lost, time=time.time())) + b"\n"

    def _put(self, client: Client, message: msgspec.Struct) -> None:
        if not client.gone:
            client.out += _encode(message) + b"\n"

    def _refuse(self, client: Client, request_id: int | str | None, code: str, text: str) -> None:
        self._put(client, api.Reply(id=request_id, ok=False, error=api.Error(code=code, text=text)))

    # -- requests

    def _handle(self, client: Client, line: bytes) -> None:
        """Do one line. Never raises for what is in it."""
        self._serial += 1
        client.serial = self._serial
        try:
            data = msgspec.json.decode(line)
            if not isinstance(data, dict):
                self._refuse(client, None, Code.BAD_JSON, "a request is one JSON object in one line")
                return
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
            self._refuse(client, None, Code.BAD_JSON, f"not JSON: {said(e)}")
            return
        if "execute" in data and "call" not in data:
            self._slirp(client, line)
            return
        given = data.get("id")
        request_id = given if isinstance(given, str) or type(given) is int and abs(given) <= api.ID_MAX else None
        client.busy = True
        answered = False

        def done(result: Any) -> None:
            nonlocal answered
            assert not answered, "a request is answered once"
            answered = True
            client.busy = False
            if isinstance(result, ApiError):
                self._refuse(client, request_id, result.code, str(result))
            elif isinstance(result, Carried):
                fds = result.fds if result.give else [os.dup(fd) for fd in result.fds]
                if client.gone:
                    _close(fds)
                else:
                    client.fds.append((client.sent + len(client.out), fds))
                self._put(client, api.Reply(id=request_id, ok=True, result=result.result))
            else:
                self._put(client, api.Reply(id=request_id, ok=True, result=result))
            if not self._handling:
                self._go_on(client)
            elif not client.gone:  # whoever handles goes on, with another client perhaps
                self._await(client)

        self._handling = True
        try:
            result = self._call(client, line, done)
            if result is not LATER:
                done(result)
        except ApiError as e:
            done(e)
        finally:
            self._handling = False

    def _call(self, client: Client, line: bytes, done: Done) -> Any:
        """A result, or LATER. Raises ApiError."""
        try:
            request = _request.decode(line)
        except msgspec.ValidationError as e:
            raise ApiError(Code.BAD_REQUEST, said(e)) from None
        if request.v != api.VERSION:
            raise ApiError(Code.BAD_VERSION, f"v: version {request.v} is asked for, this is {api.VERSION}")
        kind = api.CALLS.get(request.call)
        if kind is None:
            raise ApiError(Code.UNKNOWN_CALL, f"call: no such call; there are {', '.join(api.CALLS)}")
        try:
            call = _args[request.call].decode(request.args)
        except msgspec.ValidationError as e:
            raise ApiError(Code.BAD_ARGS, said(e)) from None
        if self.session.ending:
            raise ApiError(Code.ENDING, "the session is ending")
        return self.calls[kind](client, call, done)

    # -- forwards

    @staticmethod
    def _parse(specs: Iterable[str], proto: Proto, owner: str) -> tuple[list[Forward], list[Auto]]:
        """Raises ApiError."""
        specs = list(specs)
        try:
            autos = parse_autos({proto: specs}, owner=owner)
            named = [s for s in specs if not parse_auto(s, proto)]
            return list(dict.fromkeys(f for s in named for f in parse_forwards(s, proto, owner=owner))), autos
        except ForwardSyntaxError as e:
            raise ApiError(Code.BAD_ARGS, f"specs: {e}") from None

    def _change(self, add: list[Forward], remove: list[Forward], close_flows: bool = False, *,
                follow: Sequence[Auto] = (), unfollow: Sequence[Auto] = ()) -> api.Changed:
        """All of it, or, raising ApiError, nothing."""
        try:
            made = self.session.follower.change(add, remove, close_flows, follow=follow, unfollow=unfollow)
        except ForwardError as e:
            numbers = {f.errno for f in e.faults}
            code = {frozenset({errno.EEXIST}): Code.CONFLICT, frozenset({errno.ENOENT}): Code.NOT_FOUND,
                    frozenset({errno.EOPNOTSUPP}): Code.UNSUPPORTED}.get(frozenset(numbers), Code.FAILED)
            raise ApiError(code, str(e)) from None
        return api.Changed(added=len(made) + len(follow), removed=len(remove) + len(unfollow))

    def _forwards_add(self, client: Client, call: api.ForwardsAdd, done: Done) -> api.Changed:
        forwards, autos = self._parse(call.specs, call.proto, call.owner)
        there, rules = set(self.session.forwards()), self.session.follower.rules  # the same again is no error
        return self._change([f for f in forwards if f not in there], [], follow=[a for a in autos if a not in rules])

    def _forwards_remove(self, client: Client, call: api.ForwardsRemove, done: Done) -> api.Changed:
        there, rules = self.session.forwards(), self.session.follower.rules
        if not call.specs:
            if call.owner is None:
                raise ApiError(Code.BAD_ARGS, "specs: missing, and so is owner; give one of them")
            return self._change([], [f for f in there if f.owner == call.owner and not f.auto], call.close_flows,
                                unfollow=[r for r in rules if r.owner == call.owner])
        by_endpoint, by_place = {f.endpoint: f for f in there}, {r.place: r for r in rules}
        found: list[Forward] = []
        stopped: list[Auto] = []
        whose = "" if call.owner is None else f" of owner {call.owner!r}"
        forwards, autos = self._parse(call.specs, call.proto, "")
        for wanted in forwards:
            forward = by_endpoint.get(wanted.endpoint)
            if wanted.optional and (forward is None or forward.auto):
                continue  # one of "all" that could not be had
            if forward is not None and forward.auto:
                rule = next(r for r in rules if r.makes(forward))
                raise ApiError(Code.CONFLICT, f"specs: {wanted}: {rule} follows what the guest listens on; remove that, or leave"
                                              f" out the port: auto,~{wanted.host_port}")
            if forward is None or forward.guest_port != wanted.guest_port or call.owner not in (None, forward.owner):
                raise ApiError(Code.NOT_FOUND, f"specs: {wanted}: there is no such forward{whose}")
            found.append(forward)
        for auto in autos:
            there_is = by_place.get(auto.place)
            if (there_is is None or call.owner not in (None, there_is.owner)
                    or auto.without and auto.without != there_is.without):
                raise ApiError(Code.NOT_FOUND, f"specs: {auto}: there is no such rule{whose}")
            stopped.append(there_is)
        return self._change([], found, call.close_flows, unfollow=stopped)

    def _forwards_replace(self, client: Client, call: api.ForwardsReplace, done: Done) -> api.Changed:
        tcp, udp = self._parse(call.tcp, "tcp", call.owner), self._parse(call.udp, "udp", call.owner)
        wanted, autos = tcp[0] + udp[0], tcp[1] + udp[1]
        mine = [f for f in self.session.forwards() if f.owner == call.owner and not f.auto]
        rules = [r for r in self.session.follower.rules if r.owner == call.owner]
        have, want = set(mine), set(wanted)
        return self._change([f for f in wanted if f not in have], [f for f in mine if f not in want], call.close_flows,
                            follow=[a for a in autos if a not in rules], unfollow=[r for r in rules if r not in autos])

    def _forwards_list(self, client: Client, call: api.ForwardsList, done: Done) -> api.Forwards:
        found = [f for f in self.session.forwards() if call.owner in (None, f.owner)]
        page, following = _page(found, call.start, call.limit)
        autos = [] if call.start else [api.AutoInfo(proto=r.proto, spec=r.spec, owner=r.owner)
                                       for r in self.session.follower.rules if call.owner in (None, r.owner)]
        return api.Forwards(forwards=[api.forward_info(f) for f in page], autos=autos, next=following)

    # -- names

    def _hosts_add(self, client: Client, call: api.HostsAdd, done: Done) -> _Later:
        return self._change_hosts(lambda: self.book.plan_add(call.owner, call.names, call.domains), done)

    def _hosts_remove(self, client: Client, call: api.HostsRemove, done: Done) -> _Later:
        return self._change_hosts(lambda: self.book.plan_remove(call.owner, call.names, call.domains), done)

    def _hosts_replace(self, client: Client, call: api.HostsReplace, done: Done) -> _Later:
        return self._change_hosts(lambda: self.book.plan_replace(call.owner, call.names, call.domains), done)

    def _change_hosts(self, plan: Callable[[], Delta], done: Done) -> _Later:
        self._hosts_queue.append((plan, done))
        if len(self._hosts_queue) == 1:
            self._next_hosts()
        return LATER

    def _next_hosts(self) -> None:
        """Begin the change that is first in line."""
        try:
            delta = self._hosts_queue[0][0]()
        except NotThere as e:
            self._end_hosts(ApiError(Code.NOT_FOUND, str(e)))
        except ValueError as e:
            self._end_hosts(ApiError(Code.BAD_ARGS, f"names: {e}"))
        else:
            parts = list(_parts(delta))
            left = len(parts)

            def answered(error: str) -> None:
                nonlocal left
                left -= 1
                if left:
                    return  # only the last part does something
                if error:
                    self._end_hosts(ApiError(Code.ENDING if self.session.ending else Code.FAILED, error))
                    return
                self.book.commit(delta)
                self._end_hosts(api.Changed(added=delta.added, removed=delta.removed))
                if delta.added or delta.removed:
                    self.session.tell(api.HostsChanged(owner=delta.owner, added=delta.added, removed=delta.removed))

            for part in parts:
                self.session.ask("services", part, answered)

    def _end_hosts(self, result: Any) -> None:
        _, done = self._hosts_queue.popleft()
        done(result)
        if self._hosts_queue:
            self._next_hosts()

    def _hosts_list(self, client: Client, call: api.HostsList, done: Done) -> api.Hosts:
        found = [(name, owner, addresses) for name, owners in sorted(self.book.names.items())
                 for owner, addresses in owners.items() if call.owner in (None, owner)]
        page, following = _page(found, call.start, call.limit)
        domains = [api.DomainInfo(domain=d, owner=o) for d, owners in sorted(self.book.domains.items())
                   for o in owners if call.owner in (None, o)] if call.start == 0 else []
        return api.Hosts(names=[api.HostInfo(name=n, addresses=list(a), owner=o) for n, o, a in page],
                         domains=domains, next=following)

    # -- looking

    def _status(self, client: Client, call: api.GetStatus, done: Done) -> api.Status:
        s, session = self.session.settings, self.session
        assert session.memory is not None
        return api.Status(
            session=self.name, version=api.VERSION, pid=os.getpid(), socket=str(self.listening.path),
            state="ending" if session.ending else "running", uptime_s=round(time.monotonic() - session.started_at, 3),
            address=s.address, gateway=s.gateway, network=str(s.network), mtu=s.mtu, link=session.link.kind,
            interface=session.link.name, stages=len(session.stages()), flows=sum(1 for _ in session.memory.flows),
            flows_max=len(session.memory.flows), forwards=len(session.forwards()), names=len(self.book.names),
            clients=len(self.clients), nic2=self._nic_info())

    def _stages(self, client: Client, call: api.Stages, done: Done) -> api.StageList:
        return api.StageList(stages=[
            api.StageInfo(name=f.name, pid=f.pid, state=f.state, frames_in=f.frames_in, bytes_in=f.bytes_in,
                          frames_out=f.frames_out, bytes_out=f.bytes_out, cpu_s=f.cpu_s, drops=f.drops)
            for f in monitor.stage_facts(self.session)])

    def _statistics(self, client: Client, call: api.Statistics, done: Done) -> api.StatisticsInfo:
        assert self.session.memory is not None
        rings = [(r.name, self.session.ring_fill(r.name)) for r in self.session.topology.rings]

        def named(held: dict[int, int]) -> dict[str, int]:
            stages = self.session.topology.stages
            return {stages[row].name if 0 <= row < len(stages) else "nobody": n for row, n in held.items()}

        return api.StatisticsInfo(
            counters={f.name: f.counters for f in monitor.stage_facts(self.session)},
            rings=[api.RingInfo(name=n, fill=fill, total=total) for n, (fill, total) in rings],
            buffers=[api.BuffersInfo(stage=stage, kind=kind, total=use.total, free=use.free, held=named(use.held))
                     for stage, uses in self.session.buffers().items()
                     for kind, use in zip(("small", "large"), uses, strict=True) if use.total],
            flows=dict(Counter(f.state.name.lower() for f in self.session.memory.flows)))

    def _flows_list(self, client: Client, call: api.FlowsList, done: Done) -> api.FlowList:
        """`start` is an entry of the table here, so that a page costs what it shows."""
        assert self.session.memory is not None
        table, now = self.session.memory.flows, time.monotonic_ns()
        found: list[api.FlowInfo] = []
        for f in table.used(call.start):
            proto = PROTOCOLS.get(f.proto, str(f.proto))
            if call.proto not in (None, proto):
                continue
            if len(found) == call.limit:
                return api.FlowList(flows=found, next=f.index)
            found.append(api.FlowInfo(
                flow=f"{f.index}.{f.gen}", proto=proto, state=f.state.name.lower(), guest=f.guest,
                guest_port=f.guest_port, peer=f.peer, peer_port=f.peer_port,
                age_s=round(max(0, now - f.created_ns) / 1e9, 3), idle_s=round(max(0, now - f.last_ns) / 1e9, 3),
                up_bytes=f.up_bytes, down_bytes=f.down_bytes, srtt_us=f.srtt_us, retransmits=f.retransmits,
                parked=f.parked))
        return api.FlowList(flows=found, next=None)

    def _policy_list(self, client: Client, call: api.PolicyList, done: Done) -> api.PolicyInfo:
        counters = self.session.counters("egress")
        return api.PolicyInfo(
            rules=[api.RuleInfo(rule=r.text, action=r.action, ways=list(r.ways), protos=list(r.protos),
                                networks=list(r.networks),
                                ports=[str(a) if a == b else f"{a}-{b}" for a, b in r.ports])
                   for r in self.session.policy.rules],
            denied_out=counters["drop_policy_out"], denied_in=counters["drop_policy_in"])

    # -- doing

    def _policy_replace(self, client: Client, call: api.PolicyReplace, done: Done) -> _Later:
        before = self.session.policy.rules

        def answered(error: str) -> None:
            if error:
                done(ApiError(Code.FAILED, error))
                return
            now = self.session.policy.rules
            done(api.Changed(added=len([r for r in now if r not in before]),
                             removed=len([r for r in before if r not in now])))
            self.session.tell(api.PolicyChanged(rules=len(now)))

        try:
            self.session.change_policy(call.rules, answered)
        except PolicyError as e:
            raise ApiError(Code.BAD_ARGS, f"rules: {e}") from None
        return LATER

    def _flows_close(self, client: Client, call: api.FlowsClose, done: Done) -> _Later:
        index, gen = (int(n) for n in call.flow.split("."))
        if max(index, gen) >= 1 << 32:
            raise ApiError(Code.NOT_FOUND, f"flow: {call.flow} is no flow")

        def answered(error: str) -> None:
            done(ApiError(Code.NOT_FOUND, f"flow: {call.flow}: {error}") if error else api.Nothing())

        self.session.ask("egress", CloseFlow(index=index, gen=gen), answered)
        return LATER

    def _memory(self, client: Client, call: api.Memory, done: Done) -> Carried:
        memory, session = self.session.memory, self.session
        assert memory is not None
        objects = [memory.session, memory.arena, memory.flows, *memory.rings.values()]
        infos = [api.SharedInfo(name=o.name, size=o.size) for o in objects]
        fds: list[int] = []
        try:
            for o in objects:
                fds.append(_read_only(o.fd))
        except OSError as e:
            _close(fds)
            raise ApiError(Code.FAILED, f"cannot hand out the session's memory: {e.strerror}") from None
        rings = [api.SharedInfo(name=n, size=r.size) for n, r in memory.rings.items()]
        return Carried(api.MemoryInfo(session=infos[0], arena=infos[1], flows=infos[2], rings=rings,
                                      stages=[s.name for s in session.topology.stages],
                                      started_ns=int(session.started_at * 1e9)), fds, give=True)

    def _flow_filter(self, name: str) -> dict[str, Any]:
        """Raises ApiError."""
        assert self.session.memory is not None
        index, gen = (int(n) for n in name.split("."))
        table = self.session.memory.flows
        flow = table.read(index) if index < len(table) else None
        if flow is None or flow.gen != gen:
            raise ApiError(Code.NOT_FOUND, f"flow: there is no flow {name}")
        return {"proto": flow.proto, "guest": flow.guest, "guest_port": flow.guest_port, "peer": flow.peer,
                "peer_port": flow.peer_port}

    def _capture_start(self, client: Client, call: api.CaptureStart, done: Done) -> _Later:
        wanted: dict[str, Any] = {}
        if call.host:
            try:
                wanted["host"] = str(ipaddress.ip_address(call.host))
            except ValueError:
                raise ApiError(Code.BAD_ARGS, f"host: {call.host}: not an IP address") from None
        if call.port:
            wanted["port"] = call.port
        if call.flow:
            wanted |= self._flow_filter(call.flow)
        if call.proto:
            wanted["proto"] = {name: number for number, name in PROTOCOLS.items()}[call.proto]

        def started(result: tuple[api.CaptureStarted, list[int]] | CaptureError) -> None:
            if isinstance(result, CaptureError):
                done(ApiError(Code.FAILED, f"capture: {result}"))
            elif client.gone:
                self.captures.end(result[0].capture)
            else:
                client.captures.add(result[0].capture)
                done(Carried(*result))

        try:
            number = self.captures.start(call, FrameFilter(**wanted), started)
        except CaptureError as e:
            raise ApiError(Code.BAD_ARGS, f"points: {e}") from None
        client.captures.add(number)
        return LATER

    def _capture_stop(self, client: Client, call: api.CaptureStop, done: Done) -> api.Nothing:
        if call.capture not in client.captures:
            raise ApiError(Code.NOT_FOUND, f"capture: this connection has no capture {call.capture}")
        client.captures.remove(call.capture)
        self.captures.end(call.capture)
        return api.Nothing()

    def _log(self, client: Client, call: api.Log, done: Done) -> api.Nothing:
        if call.stage not in (None, "supervisor", *(s.name for s in self.session.topology.stages)):
            raise ApiError(Code.BAD_ARGS, f"stage: {call.stage}: no such stage")
        self.session.set_log_level(call.level, call.stage)
        return api.Nothing()

    def _cancel(self, client: Client, call: api.CancelNic, done: Done) -> api.Nothing:
        if call.nic == "nic2":
            self._second_nic().stop("cancelled through the control API")
            return api.Nothing()
        self.session.end("cancelled through the control API")
        return api.Nothing()

    @staticmethod
    def _seat(do: Callable[[], _Item]) -> _Item:
        """Raises ApiError."""
        try:
            return do()
        except SeatError as e:
            raise ApiError(Code.NOT_FOUND if e.missing else Code.CONFLICT, f"stage: {e}") from None

    def _stage_hold(self, client: Client, call: api.StageHold, done: Done) -> api.Nothing:
        self._seat(lambda: self.session.seats.hold(call.stage))
        return api.Nothing()

    def _stage_release(self, client: Client, call: api.StageRelease, done: Done) -> api.Nothing:
        self._seat(lambda: self.session.seats.release(call.stage))
        return api.Nothing()

    def _stage_take(self, client: Client, call: api.StageTake, done: Done) -> Carried:
        with self._seat(lambda: self.session.seats.take(call.stage, _peer(client.sock)[0])) as theirs:
            line = os.dup(theirs.fileno())
        seat = api.Seat(session=self.name, generation=self.session.child(call.stage).generation)
        return Carried(seat, [line], give=True)

    def _seated(self, stage: str) -> None:
        """Session.seats.listeners: a successor knows nothing of what its predecessor was told."""
        self.captures.again(stage)
        if self._notices and stage in ("egress", "services"):
            self.session.ask(stage, Notices(on=True), lambda error: None)
        if stage == "services":
            for part in _parts(self.book.whole(self.session.settings.hosts_table())):
                self.session.ask(stage, part, lambda error: None)

    def _start_nic(self, client: Client, call: api.StartNic, done: Done) -> api.Nothing:
        try:
            self._second_nic().start()
        except Nic2Error as e:
            raise ApiError(Code.FAILED, f"nic: {e}") from None
        return api.Nothing()

    def _second_nic(self) -> SecondNic:
        """Raises ApiError."""
        if self.session.nic2 is None:
            raise ApiError(Code.UNSUPPORTED, "nic: this session has no NIC2")
        return self.session.nic2

    def _nic_info(self) -> api.NicInfo | None:
        if (second := self.session.nic2) is None:
            return None
        f = second.facts
        return api.NicInfo(state="running" if second.running else "down", reason=second.reason,
                           interface=second.link.name, mac=f.mac, mtu=f.mtu, host=f.host, address=f.address,
                           gateway=f.gateway, routes=[str(r.network) for r in self.session.settings.nic2_routes()])

    def _subscribe(self, client: Client, call: api.Subscribe, done: Done) -> api.Nothing:
        client.events = frozenset(call.events if call.events is not None else api.EVENTS)
        self._want_notices()
        return api.Nothing()

    def _want_notices(self) -> None:
        """Stages tell of leases and refusals only while somebody listens."""
        wanted = any(c.events & {"lease-given", "flow-refused"} for c in self.clients)
        if wanted != self._notices and not self.session.ending:
            self._notices = wanted
            for stage in ("egress", "services"):
                self.session.ask(stage, Notices(on=wanted), lambda error: None)

    def _happened(self, event: api.Event) -> None:
        """Session.listeners."""
        if not self.clients:
            return
        name = api.event_name(event)
        line = b""
        for client in self.clients:
            if not client.events or (name not in client.events and not isinstance(event, api.Lost)):
                continue
            if len(client.out) > EVENTS_MAX:
                client.lost += event.count if isinstance(event, api.Lost) else 1
                continue
            self._tell_lost(client)
            line = line or _encode(msgspec.structs.replace(event, time=time.time())) + b"\n"
            client.out += line
            self._await(client)

    # -- slirp4netns

    def _slirp(self, client: Client, line: bytes) -> None:
        """One of slirp4netns's requests; its errors have its words where it has some."""
        client.closing = True
        reply: dict[str, Any]
        try:
            request = _slirp.decode(line)
            reply = self._slirp_do(request)
        except (msgspec.ValidationError, ApiError) as e:
            reply = {"error": {"desc": f"bad request: {said(e)}"}}
        client.out += _encode(reply) + b"\n"

    def _slirp_do(self, request: api.SlirpRequest) -> dict[str, Any]:
        """Raises ApiError."""
        a = request.arguments
        match request.execute:
            case "add_hostfwd":
                forward = self._slirp_forward(a)
                self._change([forward], [])
                self._slirp_ids[self._slirp_next] = forward
                self._slirp_next += 1
                return {"return": {"id": self._slirp_next - 1}}
            case "list_hostfwd":
                there = set(self.session.forwards())
                self._slirp_ids = {i: f for i, f in self._slirp_ids.items() if f in there}
                entries = [{"id": i, "proto": f.proto, "host_addr": f.host_addr, "host_port": f.host_port,
                            "guest_addr": f.guest_addr or self.session.settings.address, "guest_port": f.guest_port}
                           for i, f in self._slirp_ids.items()]
                # Its manual has them below "return", its program beside: tools were written for either.
                return {"return": {"entries": entries}, "entries": entries}
            case "remove_hostfwd":
                if (gone := self._slirp_ids.get(a.id)) is None:
                    raise ApiError(Code.NOT_FOUND, "remove_hostfwd: bad arguments.id")
                self._change([], [gone])
                del self._slirp_ids[a.id]
                return {"return": {}}
        raise ApiError(Code.UNKNOWN_CALL, "unknown execute")

    @staticmethod
    def _slirp_forward(a: api.SlirpArguments) -> Forward:
        """Raises ApiError."""
        if a.proto not in ("tcp", "udp"):
            raise ApiError(Code.BAD_ARGS, "add_hostfwd: bad arguments.proto")
        for name, port in (("host_port", a.host_port), ("guest_port", a.guest_port)):
            if not 0 < port < 65536:
                raise ApiError(Code.BAD_ARGS, f"add_hostfwd: bad arguments.{name}")
        made = {"proto": a.proto, "host_port": a.host_port, "guest_port": a.guest_port, "owner": SLIRP_OWNER}
        for name in ("host_addr", "guest_addr"):
            try:
                check_forward(msgspec.convert(made | {name: getattr(a, name)}, Forward))
            except ForwardSyntaxError:
                raise ApiError(Code.BAD_ARGS, f"add_hostfwd: bad arguments.{name}") from None
        return check_forward(msgspec.convert(made | {"host_addr": a.host_addr or "0.0.0.0", "guest_addr": a.guest_addr},
                                             Forward))
