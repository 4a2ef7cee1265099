"""One agent in a network namespace, whatever its state directory; and a state directory that can't be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labpackets import assert_reach
from tests.support.labtools import Make, at_rest, await_problem, revive

pytestmark = pytest.mark.lab

SQUAT = "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.bind('\\0ovsmesh'); "


@pytest.fixture(scope="module")
def two(module_lab: Make) -> Lab:
    return module_lab(2, 1)


@pytest.fixture
def lab(two: Lab) -> Iterator[Lab]:
    revive(two)
    yield two
    revive(two)
    at_rest(two)


def beside(host: Host, command: str, state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [*host.command(command), *options]
    argv[argv.index("--state-dir") + 1] = str(state)
    return host.run(argv, check=False)


@pytest.mark.parametrize("command", ["agent", "cleanup"])
def test_nobody_else_changes_this_node(lab: Lab, tmp_path: Path, command: str) -> None:
    host = lab.hosts[0]
    agent = host.agent()
    assert agent is not None
    options = ("--once", "--listen", ":0") if command == "agent" else ()
    for _ in range(20):
        done = beside(host, command, tmp_path / "other", *options)
        assert done.returncode == 1, done.stdout
        assert f"in this network namespace (pid {agent.pid})" in done.stderr, done.stderr
        assert "--state-dir" not in done.stderr
    assert host.agent() == agent
    assert_reach(lab)
    host.stop_agent()
    done = beside(host, "agent", tmp_path / "other", "--once", "--listen", ":0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("listens", [True, False])
def test_a_name_that_anyone_may_take_stops_no_agent(lab: Lab, listens: bool) -> None:
    host = lab.hosts[0]
    host.stop_agent()
    code = SQUAT + ("s.listen(); " if listens else "") + "print('has it', flush=True); sys.stdin.read()"
    argv = ["ip", "netns", "exec", host.ns, sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as squatter:
        try:
            assert squatter.stdout is not None and squatter.stdout.readline() == "has it\n"
            host.start_agent()
            wait_for("the agent beside the squatter", host.ready, 60.0)
            said = host.agent_log.read_text()
            assert "@ovsmesh" in said
            assert "NamespaceClaimed" in host.ovsmesh("status", "-o", "json").stdout
            assert not listens or f"user 65534 (pid {squatter.pid})" in said, said
        finally:
            squatter.kill()
    host.stop_agent()


@pytest.mark.parametrize(("how", "new"), [("read-only", True), ("full", False)])
def test_a_disk_that_takes_no_writes_takes_no_network(lab: Lab, how: str, new: bool) -> None:
    host = lab.hosts[0]
    host.stop_agent()
    state = host.state / "agent"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "lab", str(state)], check=True, timeout=10)
    try:
        if not new:
            host.start_agent()
            wait_for("an agent with a new state directory", host.ready, 60.0)
            host.stop_agent()
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(state)], check=True, timeout=10)
        else:
            with (state / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
                while filler.write(os.urandom(4096)):
                    pass
        host.run(["ip", "route", "flush", "proto", "111"], check=False)
        host.start_agent()
        wait_for("an agent without its state directory", host.ready, 60.0)
        assert_reach(lab)
        assert "can't be" in await_problem(host, "StateUnwritable", str(state))
        shown = host.ovsmesh("status", "-o", "json")
        assert "StateUnwritable" in {p["reason"] for p in json.loads(shown.stdout)["problems"]}, shown.stdout
        assert "Traceback" not in host.agent_log.read_text()
    finally:
        host.stop_agent()
        subprocess.run(["umount", str(state)], check=True, timeout=10)
