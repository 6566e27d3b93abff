"""Who may know whom. Reads every import and every #include; there is no list of exceptions.

Processes meet in a ring, a cell or a message; modules meet only downwards:

    __main__                        picks what to run
    cli, ctl, demo ...              the commands
    supervisor, monitor, netns ...  control (netlink, dhcp_client): never a stage file, they start stages as processes
    guest_tx, classify, ...         a stage a file: never another stage
    replay, host_script             one stage alone, on a file
    stage                           what stages share
    topology, config, messages ...  declarations
    shm                             handles on shared objects; knows no stage

    stage_*.c  >  protocols (tcp.c, arp.c ...)  >  rn_*.[ch]  >  rn_layout.h
"""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pipeline.topology import TOPOLOGY

REPO = Path(__file__).resolve().parent.parent
ALONE = frozenset({"replay", "host_script", "zygote"})  # one stage in one process: knows control, and loads a stage file by name
STAGES = frozenset(s.name for s in TOPOLOGY.stages)
DECLARATIONS = frozenset({"topology", "units", "config", "messages", "forwards", "api", "text", "proxies", "policy", "nic2", "pcapng",
                          "vm_types", "host_names"})
COMMANDS = frozenset({"cli", "demo", "ctl", "completion", "by_hand", "capture", "explain", "postmortem", "passt",
                      "slirp4netns"})
CONTROL = frozenset({"supervisor", "monitor", "runner", "netns", "netlink", "dhcp_client", "listeners", "auto_forwards",
                     "control_api", "hosts_book", "session_dir", "client", "seats", "captures", "capture_file",
                     "hostside", "second_nic", "debug_api", "dumps", "doors", "vm", "sockets", "datapath"})
COMMANDS |= {"nic2_helper"}
CONTROL |= {"nic2_backends", "vm_nic2", "tap_offloads"}

# Those that look at a session from outside, or tell of it.
DECLARATIONS |= {"logs", "log_handler"}
COMMANDS |= {"top", "flows", "doctor", "manual", "bench"}
CONTROL |= {"look", "metrics", "service_manager", "watchdog", "procs", "processors", "peers", "bench_lab"}


def layer(module: str) -> str:
    """Layer of a dotted module name of ours. Raises KeyError for a module nobody gave a place."""
    top, _, rest = module.partition(".")
    if top == "shm":
        return "shm"
    name = rest.partition(".")[0]
    if name in STAGES:
        return f"stage file {name}"
    for words, names in (("declarations", DECLARATIONS), ("commands", COMMANDS), ("control", CONTROL), ("alone", ALONE),
                         ("stage", {"stage"}), ("main", {"__main__"}), ("package", {""})):
        if name in names:
            return words
    raise KeyError(module)


def allowed(importer: str, imported: str) -> bool:
    """May `importer` (dotted name) import `imported`?"""
    who, what = layer(importer), layer(imported)
    if what == "package":
        return True  # pipeline/__init__.py is empty: a test below
    if who == what:
        return True  # a stage's own package, declarations among themselves, ...
    below = {"shm": set(), "declarations": {"shm"}, "stage": {"shm", "declarations"},
             "control": {"shm", "declarations"}, "commands": {"shm", "declarations", "control"},
             "alone": {"shm", "declarations", "control", "stage"}, "main": {"commands", "stage", "alone"}}
    if who.startswith("stage file"):
        return what in ("shm", "stage") or imported in ("pipeline.config", "pipeline.messages", "pipeline.proxies",
                                                             "pipeline.units", "pipeline.host_names")
    return what in below[who]


def imports(source: str, importer: str) -> set[str]:
    """Modules of ours, and tools or tests, that a source text imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: relative import in line {node.lineno}"
            # `from pipeline import x` names a module by its last word
            package = node.module in ("pipeline", "shm")
            found |= {f"{node.module}.{a.name}" for a in node.names} if package else {node.module}
    return {name for name in found if name.partition(".")[0] in ("pipeline", "shm", "tools", "tests", "netlab")}


def modules() -> dict[str, Path]:
    found = {}
    for path in [*(REPO / "pipeline").rglob("*.py"), *(REPO / "shm").glob("*.py")]:
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("importer", sorted(modules()))
def test_python_arrows(importer: str) -> None:
    wrong = [name for name in imports(modules()[importer].read_text(), importer)
             if name.partition(".")[0] not in ("pipeline", "shm") or not allowed(importer, name)]
    assert wrong == [], f"{importer} ({layer(importer)}) may not import {wrong}"


def test_the_packages_own_file_is_empty() -> None:
    """Else importing one stage would import whatever stands there."""
    for package in ("pipeline", "shm"):
        assert imports((REPO / package / "__init__.py").read_text(), package) == set()


RANKS = {"layout": 0, "rn": 1, "protocol": 2, "stage": 3}


def rank(name: str) -> int:
    if name == "rn_layout.h":
        return RANKS["layout"]
    kind = "rn" if name.startswith("rn_") else "stage" if name.startswith("stage_") else "protocol"
    return RANKS[kind]


def stage_of(name: str) -> str | None:
    """The stage a C file belongs to by name: stage_x.[ch], or x.h that the parts of stage x share."""
    stem = Path(name).stem.removeprefix("stage_")
    return stem if stem in STAGES else None


def include_is_allowed(includer: str, included: str) -> bool:
    if rank(included) > rank(includer):
        return False
    mine, theirs = stage_of(includer), stage_of(included)
    return not (mine and theirs and mine != theirs)


def c_files() -> list[str]:
    return sorted(p.name for p in (REPO / "csrc").iterdir() if p.suffix in (".c", ".h"))


@pytest.mark.parametrize("includer", c_files())
def test_c_arrows(includer: str) -> None:
    included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', (REPO / "csrc" / includer).read_text(), re.M)
    wrong = [name for name in included if name != "rn_metrics.def" and not include_is_allowed(includer, name)]
    assert wrong == [], f"{includer} may not include {wrong}"
    assert [name for name in included if not (REPO / "csrc" / name).exists()] == []


def test_the_rules_can_say_no() -> None:
    assert not allowed("pipeline.classify", "pipeline.egress")
    assert not allowed("pipeline.supervisor", "pipeline.services.dhcp")
    assert not allowed("pipeline.stage", "pipeline.supervisor")
    assert not allowed("shm.ring", "pipeline.topology")
    assert not allowed("pipeline.config", "pipeline.stage")
    assert not allowed("pipeline.egress", "pipeline.topology")
    assert allowed("pipeline.services.dns", "pipeline.services.wire")
    assert allowed("pipeline.cli", "pipeline.supervisor")
    assert not include_is_allowed("rn_ring.c", "tcp.h")
    assert not include_is_allowed("tcp.c", "stage_egress.h")
    assert not include_is_allowed("stage_classify.c", "egress.h")
    assert not include_is_allowed("rn_layout.h", "rn_ring.h")
    assert include_is_allowed("stage_egress.c", "egress.h")
