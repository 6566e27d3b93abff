"""docs/control-api.md does what it says: every command and every request in it is run, in its order, on one session."""
from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from netlab import DEADLINE, REPO, Netns

from e2e.doc_shell import Shell, blocks, commands
from pipeline import api

pytestmark = pytest.mark.netns

DOCUMENT = REPO / "docs" / "control-api.md"
# calls whose example values are examples: types are compared
LOOSE = {"status", "stages", "statistics", "flows.list", "memory", "capture.start", "events.list", "latency", "dump"}


def same_shape(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, dict):
        free = wanted and all(isinstance(v, (int, dict)) for v in wanted.values())  # counters by name
        return isinstance(got, dict) and (free or not wanted or wanted.keys() == got.keys()) and all(
            same_shape(v, got[k]) for k, v in wanted.items() if k in got)
    if isinstance(wanted, list):
        return isinstance(got, list) and len(got) >= len(wanted) and all(same_shape(wanted[0], g) for g in got)
    if isinstance(wanted, float):
        return isinstance(got, (int, float))
    return type(wanted) is type(got)


def check_reply(call: str, wanted: dict, got: dict) -> None:
    if text := wanted.get("error", {}).get("text", ""):
        if text.endswith("..."):
            assert got["error"]["text"].startswith(text[:-3]), got
            got["error"]["text"] = text
    if "event" in wanted:
        got["time"] = wanted["time"]
    if call in LOOSE and wanted.get("ok"):
        assert wanted["id"] == got["id"] and got["ok"] and same_shape(wanted["result"], got["result"]), (wanted, got)
    else:
        assert got == wanted


def test_the_document(host_ns: Netns, tmp_path: Path) -> None:
    shell = Shell(host_ns, tmp_path)
    ran, called = 0, set()
    held: list[socket.socket] = []
    events = tmp_path / "events"
    try:
        for kind, lines in blocks(DOCUMENT):
            if kind == "json":
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.settimeout(DEADLINE)
                    peer.connect(str(tmp_path / "run" / "web.sock"))
                    replies, call = peer.makefile(), ""
                    for line in lines:
                        if line.startswith("-> "):
                            peer.sendall(line[3:].encode() + b"\n")
                            call = json.loads(line[3:])["call"] if line.startswith("-> {") else ""
                            called.add(call)
                        else:
                            assert line.startswith("<- "), line
                            check_reply(call, json.loads(line[3:]), json.loads(replies.readline()))
                            ran += 1
                continue
            assert kind == "console", kind
            for command, output in commands(lines):
                ran += 1
                if command.startswith("ringnet run "):
                    shell.start(command)
                    shell.wait_for_text("Serving HTTP")
                    continue
                if command.startswith("ringnet ctl events"):
                    shell.start(command, events)
                    while shell.jobs() > 1:  # the session's stays; the events' end once something happened
                        shell.run("ringnet ctl forward add 7777 --owner probe; ringnet ctl forward rm --owner probe")
                    continue
                said = shell.run(command)
                if output:
                    assert said.splitlines() == output, command
                if command.endswith("forward add 8080:80"):  # two flows: 0.1 and 1.1
                    for _ in range(2):
                        held.append(connection := host_ns.socket())
                        connection.connect(("127.0.0.1", 8080))
                    while json.loads(shell.run("ringnet ctl flows --json --proto tcp"))["flows"][1:] == []:
                        pass
        shell.run("wait", ok=False)
        assert "cancelled through the control API" in shell.served.read_text()
        assert list((tmp_path / "run").iterdir()) == []
        text, line = events.read_text().splitlines()  # one of each command
        assert "7777" in text and json.loads(line)["forward"]["owner"] == "probe"
    finally:
        for connection in held:
            connection.close()
        shell.close()
    assert ran > 60
    assert set(api.CALLS) - {"cancel"} <= called


def test_every_call_event_and_code_is_documented() -> None:
    text = DOCUMENT.read_text()
    for call in api.CALLS:
        assert f'"call": "{call}"' in text, call
    for event in (*api.EVENTS, "lost"):
        assert f"`{event}`" in text, event
    for code in api.Code:
        assert f"| `{code}` |" in text, code
