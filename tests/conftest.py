"""Rules of every test run: skips in CI, what may be left behind (nothing), and the fixtures of the real network.

Fixtures live here, what they are made of in netlab.py.
"""
from __future__ import annotations

import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import netlab  # noqa: E402
from netlab import SERVER, Attached, Netns, PlainUser  # noqa: E402

# Tests that CI may skip: node id (or a prefix of it) -> why. A skip that is not listed here fails the run.
SKIPS_ALLOWED_IN_CI: dict[str, str] = {
    "tests/e2e/test_tcp_bulk.py::test_both_ways_at_once[1500-offset-8]": "kernels before 6.9 cannot; 'discard' is tested",
}

QEMU_MACHINE = "x86_64"
if platform.machine() != QEMU_MACHINE:
    SKIPS_ALLOWED_IN_CI["tests/e2e/test_vm_boot.py"] = "its kernel and machine are x86-64's"

_RUN = "RINGNET_TEST_RUN"  # in the environment of this run's processes, workers included
_CHILD = "RINGNET_TEST_CHILD"  # in the environment of what tests start, so only there


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "netns: makes network namespaces and a tap; needs root and /dev/net/tun")
    config.addinivalue_line("markers", "root: needs root")
    config.addinivalue_line("markers", "qemu: boots a virtual machine under QEMU; x86-64")
    # Speed is no property: an example that takes long, or is long in the making, is one of a busy machine.
    hypothesis.settings.register_profile("ringnet", hypothesis.settings(), deadline=None,
                                         suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("ringnet")
    if not hasattr(config, "workerinput"):
        os.environ[_RUN] = uuid.uuid4().hex
        os.environ.pop(_CHILD, None)
        config.stash[_LEAKS] = []
        config.stash[_BEGAN] = time.time()
        if os.geteuid() == 0:
            netlab.reap()
    # After this process started, so that /proc/<pid>/environ tells a worker from what a test started.
    os.environ[_CHILD] = os.environ[_RUN]


_LEAKS = pytest.StashKey[list[str]]()
_BEGAN = pytest.StashKey[float]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = None
    if os.geteuid() != 0:
        why = "needs root"
    elif not os.path.exists("/dev/net/tun"):
        why = "needs /dev/net/tun (modprobe tun)"
    for item in items:
        if platform.machine() != QEMU_MACHINE and item.get_closest_marker("qemu"):
            item.add_marker(pytest.mark.skip(reason="the guest's kernel and QEMU's machine are x86-64's"))
        if why and (item.get_closest_marker("netns") or (item.get_closest_marker("root") and os.geteuid() != 0)):
            item.add_marker(pytest.mark.skip(reason=why))


def _skip_is_failure(nodeid: str) -> bool:
    return bool(os.environ.get("CI")) and not any(nodeid.startswith(known) for known in SKIPS_ALLOWED_IN_CI)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and _skip_is_failure(item.nodeid):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, and not listed in tests/conftest.py: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.skipped and _skip_is_failure(collector.nodeid):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, and not listed in tests/conftest.py: {report.longrepr}"


@pytest.hookimpl(trylast=True)  # after xdist ended its workers
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing of this run may be left: no process, no namespace, no shared-memory name."""
    if hasattr(session.config, "workerinput"):
        return
    leaks = session.config.stash[_LEAKS]
    left = _processes_of_this_run()
    still = netlab.wait_gone(list(left), timeout=10)  # one that is just ending is no leak
    leaks += [f"process {pid}: {left[pid]}" for pid in still]
    if os.geteuid() == 0:
        leaks += [f"network namespace {name} (removed)" for name in netlab.reap()]
        leaks += [f"network namespace {name}" for name in netlab.netns_of_ours(os.getpid())]
    for name in netlab.shm_objects():
        # A session of another run is allowed its microseconds between making a name and unlinking it.
        try:
            made = os.stat(f"/dev/shm/{name}").st_ctime
        except FileNotFoundError:
            continue
        if session.config.stash[_BEGAN] <= made < time.time() - 5:
            leaks.append(f"shared memory /dev/shm/{name}")
    if leaks and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_LEAKS]:
        terminalreporter.section("left behind", red=True, bold=True)
        for line in config.stash[_LEAKS]:
            terminalreporter.line(line)


def _processes_of_this_run() -> dict[int, str]:
    mark = f"{_CHILD}={os.environ[_RUN]}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environ = Path("/proc", entry, "environ").read_bytes().split(b"\0")
            if mark in environ:
                argv = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(entry)] = argv
        except OSError:
            continue  # ended, or not ours to read
    return found


@pytest.fixture(autouse=True, scope="session")
def _runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sockets of sessions that tests start, and kill, are in a directory of the worker's own."""
    path = tmp_path_factory.mktemp("sessions")
    path.chmod(0o700)
    os.environ["RINGNET_RUNTIME_DIR"] = str(path)


@pytest.fixture
def make_netns() -> Iterator[Callable[[str], Netns]]:
    """Makes network namespaces that go with the test."""
    with ExitStack() as stack:
        yield lambda role: stack.enter_context(Netns(role))


@pytest.fixture
def host_ns(make_netns: Callable[[str], Netns]) -> Netns:
    """The host side: loopback with SERVER on it, a resolv.conf of its own, and no way out."""
    ns = make_netns("h")
    ns.ip("addr", "add", f"{SERVER}/32", "dev", "lo")
    (ns.etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    return ns


@pytest.fixture
def guest_ns(make_netns: Callable[[str], Netns]) -> Netns:
    """The guest: nothing but loopback; its resolv.conf names the gateway."""
    ns = make_netns("g")
    (ns.etc / "resolv.conf").write_text(f"nameserver {netlab.GATEWAY}\n")
    return ns


@pytest.fixture
def attach(host_ns: Netns, guest_ns: Netns, tmp_path: Path) -> Iterator[Callable[..., Attached]]:
    """attach(*options, mtu=, config_net=): start `ringnet attach` between host_ns and guest_ns, ready to use."""
    with ExitStack() as stack:
        yield lambda *options, **kw: stack.enter_context(
            Attached(host_ns, guest_ns, tmp_path / f"attach-{len(os.listdir(tmp_path))}.log", *options, **kw))


@pytest.fixture
def guest_session(attach: Callable[..., Attached]) -> Attached:
    """A session with an interface already configured in the guest (10.0.2.2/24, default route)."""
    return attach()


@pytest.fixture
def plain_user(tmp_path: Path) -> PlainUser:
    """Runs commands as a user without rights (see netlab.PlainUser)."""
    return PlainUser(tmp_path)
