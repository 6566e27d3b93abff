"""The second NIC of a running session: its host side, its guest side and the stage between them, as one thing.

    down --start--> running --stop--> down          stop: vmnet drained and ended, then the host side removed
    running --vmnet or its host side ends--> down    the same without the drain; NIC1 and the session go on

While it is down the guest's interface has no carrier, where it is a tap: its kernel then knows, and queues nothing.
What was in the rings stays there and passes when it is started again.

Start and stop are done before the call returns: vmnet alone is listened to meanwhile, within the session's deadlines.
"""
from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from ipaddress import IPv4Interface

from pipeline import api, tap_offloads
from pipeline.config import SecondNic as StageFacts
from pipeline.hostside import Backend, Host, HostSideError
from pipeline.messages import Cancel, Nic2Dhcp
from pipeline.supervisor import Child, Link, Session, SessionError, State

STAGE = "vmnet"
_TUNSETCARRIER = 0x400454E2  # linux/if_tun.h


class Nic2Error(Exception):
    """It could not be started; one line."""


def _ask(tap: int, *, udp: bool) -> bool:
    """tap_offloads.ask(); of a tap whose interface was removed nothing comes, and to it nothing goes."""
    try:
        return tap_offloads.ask(tap, udp=udp)
    except OSError:
        return False


class SecondNic:
    """See above. Given to a Session, which is its owner from then on."""

    session: Session

    def __init__(self, link: Link, backend: Backend, host: Host, *, storm: int) -> None:
        """link: the guest's side; the caller keeps its descriptor. host: of the backend, open; ours to close."""
        self.link, self.backend, self.storm = link, backend, storm
        self.host: Host | None = host
        self.facts = host.facts
        self.running = False
        self.reason = "not started yet"  # why it is not running

    # -- for the control API and the runner

    def stop(self, reason: str) -> None:
        """Take it down in order. Harmless if it is down."""
        if not self.running:
            return
        self.running, self.reason = False, reason
        self._end(drain=self.session.deadlines.drain)
        self._down()

    def start(self) -> None:
        """Bring it up again. Raises Nic2Error; then it is down."""
        if self.running:
            return
        child = self._child
        if STAGE in self.session.seats.held:
            raise Nic2Error(f"the seat of stage {STAGE} is held: ringnet ctl release {STAGE}")
        try:
            self._reopen()
            self.session.spawn_again(child)
            self._bring_up(child)
        except (HostSideError, Nic2Error, SessionError) as e:
            self._end(drain=0.0)
            self._down()
            self.reason = str(e)
            raise Nic2Error(str(e)) from e
        self.started()

    def guest_is(self, text: str) -> str:
        """The guest's address is known. Returns "" or what went wrong."""
        return self.backend.guest_is(IPv4Interface(text).ip) if self.host is not None else ""

    # -- for the session

    def attach(self, session: Session) -> None:
        self.session = session
        session.seats.listeners.append(self._seated)

    @property
    def _child(self) -> Child:
        return self.session.child(STAGE)

    def grants(self) -> dict[str, int]:
        """Descriptors of the stages, each ours to close."""
        assert self.host is not None
        granted = {"bridge": os.dup(self.host.fd)}
        if self.link.fd >= 0:  # else a virtual machine's, which comes later (Session.set_second_link())
            granted["link2"] = os.dup(self.link.fd)
            os.set_blocking(granted["link2"], False)
        return granted

    def stage_facts(self) -> StageFacts:
        assert self.host is not None
        from_guest, from_host = self._ask_offloads()
        return StageFacts(facts=self.facts, guest_kind=self.link.kind, guest_vnet=self.link.vnet,
                          guest_unfinished=self.link.unfinished, guest_whole=self.link.whole, storm=self.storm,
                          host_kind=self.host.kind, host_vnet=self.host.vnet, guest_uso=from_guest, host_uso=from_host,
                          row=self._child.row)

    def _ask_offloads(self) -> tuple[bool, bool]:
        """UDP super-frames of each side, if the other takes them: may they come from the guest, from the host side? A link
        without virtio-net headers takes all (the relay cuts them), a tap what this kernel knows, and what is behind a
        socket with headers was never asked."""
        assert self.host is not None
        sides = ((self.session.granted("link2"), self.link.kind, self.link.vnet), (self.host.fd, self.host.kind, self.host.vnet))
        guest_takes, host_takes = (_ask(fd, udp=True) if kind == "tap" else not vnet for fd, kind, vnet in sides)
        for (fd, kind, _), other_takes in zip(sides, (host_takes, guest_takes), strict=True):
            if kind == "tap" and not other_takes:
                _ask(fd, udp=False)
        return host_takes, guest_takes

    def started(self) -> None:
        """vmnet runs, and so does services."""
        assert self.host is not None
        self.running, self.reason = True, ""
        self._carrier(True)
        self._seated("services")
        self._tell()

    def failed(self, reason: str) -> None:
        """vmnet ended, or did what it may not. Its host side goes with it."""
        if self.host is None:
            return  # said already, or taken down
        self.running, self.reason = False, reason
        self.session.warn(f"second NIC down: {reason}")
        self._end(drain=0.0)
        self._down()

    def close(self) -> None:
        """The session is over."""
        self.running = False
        if self.host is not None:
            self.host = None
            self.backend.close()

    # -- steps

    def _seated(self, stage: str) -> None:
        """services runs, perhaps as a successor, which knows nothing of what its predecessor was told."""
        if stage == "services" and self.running and self.host is not None and self.host.dhcp >= 0:
            f = self.facts
            self.session.ask("services", Nic2Dhcp(mac=f.mac, address=f.address, gateway=f.gateway, mtu=f.mtu,
                                                  router=f.router), self._served, [self.host.dhcp])

    def _served(self, error: str) -> None:
        if error and self.running:
            self.session.warn(f"second NIC: no DHCP server on its host side: {error}")

    def _reopen(self) -> None:
        self.host = self.backend.open()
        before, self.facts = self.facts, self.host.facts
        if (before.mtu, before.mac) != (self.facts.mtu, self.facts.mac):
            raise Nic2Error(f"the host side has MTU {self.facts.mtu} and MAC address {self.facts.mac} now, the guest's"
                            f" interface {before.mtu} and {before.mac}; start a new session")
        self._ask_offloads()
        self.session.grant("bridge", os.dup(self.host.fd))

    def _bring_up(self, child: Child) -> None:
        d = self.session.deadlines
        for state, seconds in ((State.GREETED, d.hello), (State.READY, d.ready), (State.RUNNING, d.running)):
            self._until(child, state, seconds)

    def _until(self, child: Child, state: State, seconds: float) -> None:
        """Listen to vmnet alone until it is there, or further. Raises Nic2Error."""
        def over() -> bool:
            return state.value <= child.state.value <= State.RUNNING.value

        if not self._listen(child, seconds, lambda: over() or not child.alive or child.said is not None):
            raise Nic2Error(f"stage {STAGE} was not {state.name.lower()} within {seconds:g} s")
        if not over():
            error = getattr(child.said, "error", "") or getattr(child.said, "reason", "") or "it ended"
            raise Nic2Error(f"stage {STAGE} did not start: {error}")

    def _listen(self, child: Child, seconds: float, done: Callable[[], bool]) -> bool:
        """False: the time is over."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll = select.poll()
            for fd in (child.pidfd, child.channel.fileno() if child.channel else -1):
                if fd >= 0:
                    poll.register(fd, select.POLLIN)
            if ready := poll.poll(left * 1000 + 1):
                self.session.attend(child, ended=any(fd == child.pidfd for fd, _ in ready))
        return True

    def _end(self, drain: float) -> None:
        """See vmnet gone: Cancel, SIGTERM, SIGKILL."""
        child, d = self._child, self.session.deadlines
        if child.alive and child.state is not State.ENDED:
            child.state = State.CANCELLED
            self.session.send(child, Cancel(drain_ms=int(drain * 1000)))
        for seconds, then in ((max(drain, d.drain_failed), signal.SIGTERM), (d.term, signal.SIGKILL), (60.0, None)):
            if self._listen(child, seconds, lambda: not child.alive):
                return
            if then is not None:
                self.session.signal(child, then)
        raise RuntimeError(f"stage {STAGE} survives SIGKILL: stuck in the kernel")

    def _down(self) -> None:
        """After vmnet: the guest sees the cable pulled, services lets go of the bridge, the host side is removed."""
        self._carrier(False)
        if self.host is not None and self.host.dhcp >= 0 and not self.session.ending:
            self.session.ask("services", Nic2Dhcp(serve=False), lambda error: None)
        self.session.grant("bridge", -1)
        self.host = None
        self.backend.close()
        self._tell()

    def _carrier(self, on: bool) -> None:
        if self.link.kind == "tap" and (link := self.session.granted("link2")) >= 0:
            try:
                fcntl.ioctl(link, _TUNSETCARRIER, struct.pack("i", int(on)))
            except OSError:
                pass  # Linux before 5.0 has no such request, and the guest may have removed its interface

    def _tell(self) -> None:
        self.session.tell(api.NicChanged(nic="nic2", state="running" if self.running else "down", reason=self.reason))
