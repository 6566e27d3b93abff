"""The control API's words: requests, replies, errors, events. One JSON object a line, both ways, over a Unix socket.

    -> {"v":1,"id":7,"call":"forwards.add","args":{"specs":["8080:80"]}}
    <- {"id":7,"ok":true,"result":{"added":1}}
    <- {"id":7,"ok":false,"error":{"code":"failed","text":"..."}}
    <- {"event":"stage","time":1700000000.0,"stage":"egress","state":"running"}     after `subscribe`

Every call is a Struct here; its fields are the arguments. docs/control-api.md shows each with an example. The server is
pipeline/control_api.py, the client pipeline/client.py.
"""
from __future__ import annotations

import enum
from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from pipeline.forwards import Forward
from pipeline.messages import Level

VERSION = 1  # of this file; a request says which it was written for
LINE_MAX = 65536  # bytes of a request, without its newline
ID_MAX = (1 << 63) - 1
PAGE_MAX = 1000  # entries in one reply of a list

Proto = Literal["tcp", "udp"]
Owner = Annotated[str, Meta(max_length=128)]
Limit = Annotated[int, Meta(ge=1, le=PAGE_MAX)]
Offset = Annotated[int, Meta(ge=0, le=1 << 32)]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]


class Code(enum.StrEnum):
    """Why a request was refused."""

    BAD_JSON = "bad-json"  # the line is not one JSON object
    TOO_LONG = "too-long"  # the line is over LINE_MAX
    BAD_REQUEST = "bad-request"  # an envelope's field is missing, unknown or of the wrong type
    BAD_VERSION = "bad-version"
    UNKNOWN_CALL = "unknown-call"
    BAD_ARGS = "bad-args"  # an argument is missing, unknown or wrong; the text names it
    NOT_FOUND = "not-found"  # there is no such forward, name or flow; nothing was changed
    CONFLICT = "conflict"  # it is there already, or another owner's; nothing was changed
    FAILED = "failed"  # it could not be done, the text says why; nothing was changed
    UNSUPPORTED = "unsupported"  # this session has no such thing
    ENDING = "ending"  # the session is ending
    BUSY = "busy"  # too many clients; the one that was silent longest is told so and disconnected


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The envelope. `v` and `id` may be left out by hand-written requests."""

    call: str
    v: int = VERSION
    id: Annotated[int, Meta(ge=-ID_MAX, le=ID_MAX)] | str | None = None  # comes back in the reply
    args: msgspec.Raw = msgspec.Raw(b"{}")


class Error(Struct, frozen=True, kw_only=True):
    code: str
    text: str  # one sentence


class Reply(Struct, frozen=True, kw_only=True):
    id: int | str | None
    ok: bool
    result: Any = UNSET  # of type Call.result
    error: Error | UnsetType = UNSET


class ApiError(Exception):
    """A request was refused: `code` is a Code, the text one sentence."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


# --- results -------------------------------------------------------------------------------------------------------


class Nothing(Struct, frozen=True):
    """Done; there is nothing to say."""


class Changed(Struct, frozen=True, kw_only=True):
    added: int = 0
    removed: int = 0


class ForwardInfo(Struct, frozen=True, kw_only=True):
    proto: str
    host_addr: str  # "" is every address; "0.0.0.0", "::": every one of one family
    ifname: str  # of the host; "" is every one
    host_port: int
    guest_addr: str  # "" is the guest, whatever address it has
    guest_port: int
    owner: str
    auto: bool = False  # made by a rule `auto`, and goes with what the guest listens on


def forward_info(f: Forward) -> ForwardInfo:
    return ForwardInfo(proto=f.proto, host_addr=f.host_addr, ifname=f.ifname, host_port=f.host_port,
                       guest_addr=f.guest_addr, guest_port=f.guest_port, owner=f.owner, auto=f.auto)


class AutoInfo(Struct, frozen=True, kw_only=True):
    """A rule `auto`."""

    proto: str
    spec: str
    owner: str


class Forwards(Struct, frozen=True, kw_only=True):
    forwards: list[ForwardInfo]
    autos: list[AutoInfo] = []  # with the first page
    next: int | None  # `start` of the next page, null at the end


class HostInfo(Struct, frozen=True, kw_only=True):
    name: str
    addresses: list[str]  # or the one name it is an alias of
    owner: str


class DomainInfo(Struct, frozen=True, kw_only=True):
    domain: str
    owner: str


class Hosts(Struct, frozen=True, kw_only=True):
    names: list[HostInfo]
    domains: list[DomainInfo]  # with the first page
    next: int | None


class NicInfo(Struct, frozen=True, kw_only=True):
    state: str  # "running" or "down"
    reason: str  # why it is down
    interface: str  # of the guest
    mac: str
    mtu: int
    host: str  # the host side
    address: str  # the guest's, if the host side gives it
    gateway: str  # the host's
    routes: list[str]


class Status(Struct, frozen=True, kw_only=True):
    session: str
    version: int  # of the API
    pid: int  # the supervisor's
    socket: str
    state: str  # "running" or "ending"
    uptime_s: float
    address: str  # first lease
    gateway: str
    network: str
    mtu: int
    link: str
    interface: str
    stages: int
    flows: int  # in use, all protocols
    flows_max: int
    forwards: int
    names: int
    clients: int  # of the control API, this one included
    nic2: NicInfo | None = None  # the second interface


class StageInfo(Struct, frozen=True, kw_only=True):
    name: str
    pid: int
    state: str
    frames_in: int
    bytes_in: int
    frames_out: int
    bytes_out: int
    cpu_s: float
    drops: dict[str, int]  # reason: frames


class StageList(Struct, frozen=True, kw_only=True):
    stages: list[StageInfo]


class RingInfo(Struct, frozen=True, kw_only=True):
    name: str
    fill: int  # descriptors waiting now
    total: int  # ever


class BuffersInfo(Struct, frozen=True, kw_only=True):
    stage: str  # that allocates them
    kind: str  # small (2 KiB) or large (68 KiB)
    total: int
    free: int
    held: dict[str, int]  # stage: how many it works on or has waiting in its rings


class StatisticsInfo(Struct, frozen=True, kw_only=True):
    counters: dict[str, dict[str, int]]  # stage: counter: value; zeros left out (docs/metrics.md)
    rings: list[RingInfo]
    buffers: list[BuffersInfo]
    flows: dict[str, int]  # state: entries of the flow table; zeros left out


class Seat(Struct, frozen=True, kw_only=True):
    session: str
    generation: int


class Impairments(Struct, frozen=True, kw_only=True):
    specs: list[str]  # as they were said


class EventInfo(Struct, frozen=True, kw_only=True):
    """A decision of a stage's (shm/trace.py)."""

    stage: str
    time: float  # Unix time, s
    number: int
    at_ns: int  # CLOCK_MONOTONIC
    kind: str  # start, count, refuse, open, end
    counter: str
    n: int
    flow: int  # -1: none
    gen: int
    value: int
    guest: str
    guest_port: int
    peer: str
    peer_port: int
    proto: int


class Events(Struct, frozen=True, kw_only=True):
    events: list[EventInfo]
    next: int | None


class PathLatency(Struct, frozen=True, kw_only=True):
    # guest_tx to guest_tx: of promoted flows, from the guest's link to the host's socket; guest_rx to guest_rx: back
    source: str
    target: str
    buckets: list[tuple[int, int]]  # (upper bound in ns, -1: none; sampled frames); those without a frame are left out


class Latencies(Struct, frozen=True, kw_only=True):
    paths: list[PathLatency]


class Dumped(Struct, frozen=True, kw_only=True):
    directory: str


class FlowInfo(Struct, frozen=True, kw_only=True):
    flow: str  # "INDEX.GENERATION": names this flow and no later one
    proto: str
    state: str
    guest: str
    guest_port: int  # icmp: the echo identifier
    peer: str  # as the guest calls it; "" for a mapping that serves every peer
    peer_port: int
    age_s: float
    idle_s: float
    up_bytes: int
    down_bytes: int
    srtt_us: int
    retransmits: int
    parked: int


class FlowList(Struct, frozen=True, kw_only=True):
    flows: list[FlowInfo]
    next: int | None


class RuleInfo(Struct, frozen=True, kw_only=True):
    rule: str  # as it was written, or the option that stands for it
    action: str  # "allow" or "deny"
    ways: list[str]  # "out", "in"
    protos: list[str]
    networks: list[str]  # of the other side; empty: every one
    ports: list[str]  # called: "22", "80-89"; empty: every one


class PolicyInfo(Struct, frozen=True, kw_only=True):
    rules: list[RuleInfo]  # the first that fits decides; what none fits is allowed
    denied_out: int  # connections, datagrams and pings of the guest
    denied_in: int  # clients and datagrams of forwards


class SharedInfo(Struct, frozen=True, kw_only=True):
    """A shared object; its descriptor comes with the reply."""

    name: str
    size: int


class MemoryInfo(Struct, frozen=True, kw_only=True):
    """Descriptors with the reply, read-only, in this order: session, arena, flows, then each of `rings`."""

    session: SharedInfo
    arena: SharedInfo
    flows: SharedInfo
    rings: list[SharedInfo]
    stages: list[str]  # by row
    started_ns: int  # CLOCK_MONOTONIC


class CaptureInterface(Struct, frozen=True, kw_only=True):
    name: str
    description: str


class CaptureMirror(Struct, frozen=True, kw_only=True):
    stage: str
    size: int
    interfaces: list[int]  # index into CaptureStarted.interfaces, by capture point (csrc/rn_tap.h)


class CaptureStarted(Struct, frozen=True, kw_only=True):
    """Descriptors with the reply: the mirrors (csrc/rn_mirror.h), in order, then the reader's doorbell (eventfd)."""

    capture: int
    interfaces: list[CaptureInterface]
    mirrors: list[CaptureMirror]
    absent: list[str] = []  # stages that are not at work: their frames come when they are


# --- calls ---------------------------------------------------------------------------------------------------------


class Call(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all calls; a subclass's fields are the arguments."""

    call: ClassVar[str] = ""
    result: ClassVar[type] = Nothing


class ForwardsAdd(Call, kw_only=True):
    """Forward ports of the host to the guest. All, or none and an error."""

    call = "forwards.add"
    result = Changed
    specs: Annotated[list[str], Meta(min_length=1, max_length=4096)]  # grammar of --tcp-ports
    proto: Proto = "tcp"
    owner: Owner = ""


class ForwardsRemove(Call, kw_only=True):
    """Stop forwarding. All of `specs`, or none and an error; without specs, all that the owner has."""

    call = "forwards.remove"
    result = Changed
    specs: Annotated[list[str], Meta(max_length=4096)] = []
    proto: Proto = "tcp"
    owner: Owner | None = None  # given: only this owner's may go
    close_flows: bool = False  # flows that came through them end too


class ForwardsReplace(Call, kw_only=True):
    """Let an owner have exactly these forwards. All or none."""

    call = "forwards.replace"
    result = Changed
    owner: Owner
    tcp: Annotated[list[str], Meta(max_length=4096)] = []
    udp: Annotated[list[str], Meta(max_length=4096)] = []
    close_flows: bool = False


class ForwardsList(Call, kw_only=True):
    """What is forwarded, by protocol and port."""

    call = "forwards.list"
    result = Forwards
    owner: Owner | None = None
    start: Offset = 0
    limit: Limit = PAGE_MAX


Names = Annotated[dict[str, list[str]], Meta(max_length=4096)]
Domains = Annotated[list[str], Meta(max_length=1024)]


class HostsAdd(Call, kw_only=True):
    """Give names addresses, or one other name that is answered here (an alias); what an owner gave a name before goes.
    `*.DOMAIN` answers for all below that have no name of their own. `domains`: names below that are not known do not exist,
    nobody else is asked."""

    call = "hosts.add"
    result = Changed
    names: Names = {}
    domains: Domains = []
    owner: Owner = ""


class HostsRemove(Call, kw_only=True):
    """Take an owner's names and domains away; with neither given, all it has."""

    call = "hosts.remove"
    result = Changed
    names: Annotated[list[str], Meta(max_length=4096)] = []
    domains: Domains = []
    owner: Owner = ""


class HostsReplace(Call, kw_only=True):
    """Let an owner have exactly these names and domains. All or none."""

    call = "hosts.replace"
    result = Changed
    owner: Owner
    names: Names = {}
    domains: Domains = []


class HostsList(Call, kw_only=True):
    """Names answered locally, by name; one entry for each owner of it."""

    call = "hosts.list"
    result = Hosts
    owner: Owner | None = None
    start: Offset = 0
    limit: Limit = PAGE_MAX


class GetStatus(Call, kw_only=True):
    """The session in a few words."""

    call = "status"
    result = Status


class Stages(Call, kw_only=True):
    """Each stage: state, frames, drops by reason, CPU."""

    call = "stages"
    result = StageList


class Statistics(Call, kw_only=True):
    """Every counter that is not zero, every ring, and who holds frame buffers and flow entries."""

    call = "statistics"
    result = StatisticsInfo


class FlowsList(Call, kw_only=True):
    """Flows in use."""

    call = "flows.list"
    result = FlowList
    proto: Literal["tcp", "udp", "icmp"] | None = None
    start: Offset = 0
    limit: Limit = PAGE_MAX


class FlowsClose(Call, kw_only=True):
    """End one flow: a TCP connection is reset on both sides."""

    call = "flows.close"
    flow: Annotated[str, Meta(pattern=r"^[0-9]{1,10}\.[0-9]{1,10}$")]


class PolicyList(Call, kw_only=True):
    """What may be called, out and in, and how often that was refused."""

    call = "policy.list"
    result = PolicyInfo


class PolicyReplace(Call, kw_only=True):
    """Other rules instead of those of --policy, for what begins from now on. All or none."""

    call = "policy.replace"
    result = Changed
    rules: Annotated[list[str], Meta(max_length=1024)]


class Memory(Call, kw_only=True):
    """The session's shared memory, to be looked at without asking again: stages, rings and flows (`ringnet top`)."""

    call = "memory"
    result = MemoryInfo


FlowName = Annotated[str, Meta(pattern=r"^[0-9]{1,10}\.[0-9]{1,10}$")]
CAPTURE_BUFFER = 16 << 20  # bytes of a mirror, if not said


class CaptureStart(Call, kw_only=True):
    """Copy frames out of the pipeline, until `capture.stop` or the end of this connection (`ringnet capture`)."""

    call = "capture.start"
    result = CaptureStarted
    # link, all, a ring or a stage; with a second NIC also link2 (the guest's) and bridge (the host's)
    points: Annotated[list[str], Meta(min_length=1, max_length=64)]
    host: str = ""  # only frames from or to this address,
    port: Annotated[int, Meta(ge=0, le=65535)] = 0  # with this port (TCP, UDP),
    proto: Literal["tcp", "udp", "icmp"] | None = None
    flow: FlowName | None = None  # of this flow (`flows.list`); all that is given must match
    snaplen: Annotated[int, Meta(ge=0, le=1 << 17)] = 0  # bytes of a frame kept at most; 0: all
    drops: bool = False  # only frames that a stage drops
    buffer: Annotated[int, Meta(ge=1 << 16, le=1 << 30)] = CAPTURE_BUFFER  # bytes of memory for each stage that copies


class CaptureStop(Call, kw_only=True):
    """End a capture of this connection. What was copied is still there to be read."""

    call = "capture.stop"
    capture: Annotated[int, Meta(ge=1)]


class Log(Call, kw_only=True):
    """How much the session says on standard error."""

    call = "log"
    level: Level
    stage: str | None = None  # only this one's ("supervisor" is the session itself); null: all


class CancelNic(Call, kw_only=True):
    """End an interface of the guest, with all that it has on the host. NIC1 is the session; NIC2 can be started again."""

    call = "cancel"
    nic: Literal["nic1", "nic2"] = "nic1"


class StartNic(Call, kw_only=True):
    """Bring the second interface up again after it was cancelled, or failed."""

    call = "start"
    nic: Literal["nic2"] = "nic2"


class StageHold(Call, kw_only=True):
    """Free a stage's seat, for `ringnet stage`; its process leaves between two bursts of frames."""

    call = "stage.hold"
    stage: str


class StageRelease(Call, kw_only=True):
    """Let the session fill a held seat again."""

    call = "stage.release"
    stage: str


class StageTake(Call, kw_only=True):
    """Become a stage: the caller's process takes a held seat. With the reply comes a descriptor (SCM_RIGHTS), the stage's
    control socket; what is said there is in pipeline/messages.py."""

    call = "stage.take"
    result = Seat
    stage: str


class StagePause(Call, kw_only=True):
    """Let a stage stand still: it takes no frame, and does not look at its sockets, until stage.resume."""

    call = "stage.pause"
    stage: str


class StageStep(Call, kw_only=True):
    """Let a stage take so many frames more, then stand still."""

    call = "stage.step"
    stage: str
    frames: Annotated[int, Meta(ge=1, le=1 << 32)] = 1


class StageResume(Call, kw_only=True):
    """Let a stage go on."""

    call = "stage.resume"
    stage: str


class ImpairSet(Call, kw_only=True):
    """A bad wire from now on (--impair); instead of the one that is there."""

    call = "impair.set"
    spec: Annotated[str, Meta(max_length=512)]


class ImpairClear(Call, kw_only=True):
    """Take a bad wire away; what it holds goes on in its time."""

    call = "impair.clear"
    place: str


class ImpairList(Call, kw_only=True):
    """The bad wires there are."""

    call = "impair.list"
    result = Impairments


class EventsList(Call, kw_only=True):
    """Decisions of a stage, oldest first."""

    call = "events.list"
    result = Events
    stage: str
    start: Annotated[int, Meta(ge=1, lt=1 << 62)] = 1
    limit: Limit = PAGE_MAX


class Latency(Call, kw_only=True):
    """How long sampled frames took from each stage to each other."""

    call = "latency"
    result = Latencies


class Dump(Call, kw_only=True):
    """Write what is in shared memory, but no frame, below a directory (absolute) of the session's host."""

    call = "dump"
    result = Dumped
    directory: Annotated[str, Meta(pattern="^/")]


EventName = Literal["stage", "forward-added", "forward-removed", "forward-skipped", "hosts-changed", "policy-changed",
                    "flow-refused", "lease-given", "nic-changed"]


class Subscribe(Call, kw_only=True):
    """Events from now on, on this connection, between replies. Again: other events. An empty list: none."""

    call = "subscribe"
    events: list[EventName] | None = None  # null: all


EVENTS: tuple[str, ...] = get_args(EventName)

CALLS: dict[str, type[Call]] = {c.call: c for c in (
    ForwardsAdd, ForwardsRemove, ForwardsReplace, ForwardsList, HostsAdd, HostsRemove, HostsReplace, HostsList,
    GetStatus, Stages, Statistics, Memory, FlowsList, FlowsClose, CaptureStart, CaptureStop, PolicyList,
    PolicyReplace, Log, CancelNic, StartNic,
    StageHold, StageRelease, StageTake, StagePause, StageStep, StageResume, ImpairSet, ImpairClear, ImpairList, EventsList,
    Latency, Dump, Subscribe)}


# --- events --------------------------------------------------------------------------------------------------------


class Event(Struct, frozen=True, kw_only=True, tag_field="event"):
    time: float = 0.0  # Unix time, s


class StageChanged(Event, kw_only=True, tag="stage"):
    stage: str
    state: str
    pid: int


class ForwardAdded(Event, kw_only=True, tag="forward-added"):
    forward: ForwardInfo


class ForwardRemoved(Event, kw_only=True, tag="forward-removed"):
    forward: ForwardInfo


class ForwardSkipped(Event, kw_only=True, tag="forward-skipped"):
    """The guest listens there and a rule `auto` would follow, but the host's port cannot be had."""

    forward: ForwardInfo
    reason: str


class HostsChanged(Event, kw_only=True, tag="hosts-changed"):
    owner: str
    added: int
    removed: int


class PolicyChanged(Event, kw_only=True, tag="policy-changed"):
    rules: int  # that hold now


class FlowRefused(Event, kw_only=True, tag="flow-refused"):
    proto: str
    guest: str
    guest_port: int
    peer: str
    peer_port: int
    reason: str
    rule: str = ""  # of the policy, if that was the reason


class LeaseGiven(Event, kw_only=True, tag="lease-given"):
    address: str
    mac: str
    hostname: str
    seconds: int


class NicChanged(Event, kw_only=True, tag="nic-changed"):
    """The second interface came up, or went down."""

    nic: str  # "nic2"
    state: str  # "running" or "down"
    reason: str  # why it is down


class Lost(Event, kw_only=True, tag="lost"):
    """So many events are missing here: they came faster than they were read, or than they are told."""

    count: int


AnyEvent = (StageChanged | ForwardAdded | ForwardRemoved | ForwardSkipped | HostsChanged | PolicyChanged | FlowRefused
            | LeaseGiven | NicChanged | Lost)


def event_name(event: Event) -> str:
    return str(event.__struct_config__.tag)


# --- slirp4netns ---------------------------------------------------------------------------------------------------


class SlirpArguments(Struct, frozen=True, kw_only=True):
    """Arguments of slirp4netns's three requests (slirp4netns(1), API). Fields it does not know it ignores."""

    proto: str = ""
    host_addr: str = ""
    host_port: int = 0
    guest_addr: str = ""
    guest_port: int = 0
    id: int = 0


class SlirpRequest(Struct, frozen=True, kw_only=True):
    execute: str
    arguments: SlirpArguments = SlirpArguments()
