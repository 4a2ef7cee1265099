"""`ovsmesh status` on live hosts: its verdict, and an agent that is dead, hung, or listens where nobody would look."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, live, revive

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def made(module_lab: Make) -> Lab:
    return module_lab(3, 1)


@pytest.fixture
def three(made: Lab) -> Iterator[Lab]:
    revive(made)
    wait_for("all to be well", lambda: all(live(host).get("well") for host in made.hosts), SOON)
    yield made
    revive(made)


def status(host: Host, *options: str) -> tuple[int, list[str]]:
    """Return the exit status and the lines."""
    done = host.ovsmesh("status", *options)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines()


def tree(host: Host, *options: str) -> Any:
    done = host.ovsmesh("status", "-o", "json", *options)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return json.loads(done.stdout)


@contextmanager
def stopped(process: Any) -> Iterator[None]:
    """Hold a process where it is, as a hung one."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_all_is_well_and_every_report_has_figures_and_versions(three: Lab) -> None:
    host = three.host(1)
    code, lines = status(host)
    assert (code, lines[0]) == (0, "h1: all 2 peers ok")
    assert all(len(line) <= 80 for line in lines if re.match(r"PEER|h\d", line)), lines
    assert "version unknown" not in "\n".join(lines)
    wait_for("the switch to count", lambda: live(host)["peers"][0].get("traffic", {}).get("rxPackets", 0) > 0, SOON)
    for report in (live(host), tree(host)):
        assert re.fullmatch(r"\d+\.\d+\.\d+", report["self"]["ovsVersion"])
        for peer in report["peers"]:
            assert peer["traffic"]["rxPackets"] > 0 and peer["traffic"]["txBytes"] > 0


def test_hosts_with_one_mesh_have_one_digest_and_the_agents_own_time_is_shown(three: Lab) -> None:
    assert len({tree(host)["self"]["meshDigest"] for host in three.hosts}) == 1
    host = three.host(1)
    assert tree(host)["self"]["meshSince"] == live(host)["self"]["meshSince"]
    time.sleep(1.1)  # "read 0s ago" was the command's own reading
    assert tree(host)["self"]["meshSince"] == live(host)["self"]["meshSince"]


def test_a_file_that_the_agent_has_not_taken_is_named(three: Lab) -> None:
    host = three.host(1)
    before = tree(host)["self"]["meshDigest"]
    text = host.mesh.read_text()
    try:
        with stopped(host.agent()):
            host.mesh.write_text(three.mesh_text([h.node for h in three.hosts[:2]]))
            code, lines = status(host)
            assert code == 2 and any("the agent works with mesh" in line and before in line for line in lines), lines
    finally:
        host.mesh.write_text(text)
    wait_for("the agents to be back", lambda: all(live(h).get("well") for h in three.hosts), SOON)


def test_a_dead_agent_is_the_headline_with_its_last_report(three: Lab) -> None:
    host = three.host(1)
    wait_for("a report on disk", lambda: "all 2 peers ok" in (host.state / "agent/status.json").read_text(), SOON)
    host.stop_agent(signal.SIGKILL)
    code, lines = status(host)
    assert code == 2
    assert re.fullmatch(r"h1: no agent runs; its last report, \d+s ago: all 2 peers ok", lines[0]), lines[0]
    report = tree(host)
    assert {peer["state"] for peer in report["peers"]} == {"unknown"} and not report["self"]["agentRunning"]
    assert [c["reason"] for c in report["conditions"] if c["type"] == "Degraded"] == ["AgentDown"]


@pytest.mark.parametrize("who", ["agent", "ovsdb-server", "ovs-vswitchd"])
def test_a_hung_process_is_named_in_seconds(three: Lab, who: str) -> None:
    host = three.host(1)
    with stopped(host.agent() if who == "agent" else host.daemon(who)):
        # the command looks itself, and does not wait for what the agent finds
        code, lines = status(host)
        assert code == 2 and ("the agent (pid" if who == "agent" else who) in lines[0], lines[0]
        assert sum(who in line for line in lines if not line.startswith("Degraded")) == 1 or who == "agent", lines
    at_rest(three)


def test_an_agent_whose_port_is_taken_is_asked_through_its_file(three: Lab) -> None:
    host = three.host(1)
    host.stop_agent()
    holder = netns.within(host.ns, lambda: socket.create_server(("127.0.0.1", 9474)))
    try:
        host.start_agent()
        wait_for("a report on disk", lambda: status(host)[1][0] == "h1: all 2 peers ok", SOON, every=1.0)
        code, lines = status(host)
        assert code == 0 and any(line.startswith("note: the agent (pid") for line in lines), lines
    finally:
        holder.close()
        host.stop_agent()


def test_an_agent_that_listens_elsewhere_is_found(three: Lab) -> None:
    host = three.host(1)
    host.stop_agent()
    host.start_agent("--listen", "127.0.0.1:9499")
    try:
        wait_for("all to be well", lambda: status(host)[:1] == (0,), SOON, every=1.0)
        assert status(host)[1][0] == "h1: all 2 peers ok"
        assert status(host, "--all")[1][0] == "3 of 3 nodes well"
    finally:
        host.stop_agent()


def test_all_nodes_are_shown_from_any_of_them(three: Lab) -> None:
    for host in three.hosts[:2]:
        code, lines = status(host, "--all")
        assert (code, lines[0]) == (0, "3 of 3 nodes well")
        assert [line.split()[:2] for line in lines[3:]] == [["h1", "2/2"], ["h2", "2/2"], ["h3", "2/2"]]
    assert len({node["meshDigest"] for node in tree(three.host(1), "--all")["nodes"]}) == 1
    three.host(3).stop_agent(signal.SIGKILL)
    for host in three.hosts:
        # on h3 itself the agents of the others are asked
        wait_for("h3 to be missed", lambda host=host: status(host, "--all")[0] == 2, SOON)  # type: ignore[misc]
        code, lines = status(host, "--all")
        assert lines[:2] == ["2 of 3 nodes well; not: h3", "! no answer from the agent of h3"], lines


def test_watching_shows_each_change_and_ends_in_peace(three: Lab) -> None:
    host = three.host(1)
    # who runs the tests in the background may have them ignore SIGINT
    argv = ["env", "--default-signal=INT", "ip", "netns", "exec", host.ns]
    argv += [*host.command("status"), "--watch", "-o", "json"]
    watching = subprocess.Popen(
        argv, env={**os.environ, **host.env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert watching.stdout is not None and watching.stderr is not None
        first = json.loads(watching.stdout.readline())
        assert first["headline"] == "h1: all 2 peers ok"
        host.stop_agent(signal.SIGKILL)
        for line in watching.stdout:
            if json.loads(line)["headline"].startswith("h1: no agent runs"):
                break
        watching.send_signal(signal.SIGINT)
        assert watching.wait(SOON) == 2, "the last verdict's"
        assert watching.stderr.read() == ""
    finally:
        watching.kill()
        watching.communicate()


def test_a_plan_as_json(three: Lab) -> None:
    host = three.host(1)
    host.stop_agent()
    done = host.ovsmesh("plan", "-o", "json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == []
    host.run(["ip", "route", "del", "10.97.2.0/24"])
    done = host.ovsmesh("plan", "-o", "json")
    (step,) = json.loads(done.stdout)["steps"]
    assert done.returncode == 2 and (step["op"], step["kind"]) == ("+", "routes") and "10.97.2.0/24" in step["text"]


def test_a_wrong_node_name_gets_the_nearest_one_and_the_list(three: Lab) -> None:
    host = three.host(1)
    argv = [*host.command("status"), "--node", "h11", "--state-dir", str(host.state / "nowhere")]
    done = host.run(argv, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "did you mean h1? There are h1, h2, h3" in done.stderr


def test_one_mistake_at_many_nodes_is_one_line(three: Lab) -> None:
    host, text = three.host(1), three.host(1).mesh.read_text()
    more = [{"name": f"x{n}", "adress": f"192.0.2.{n}", "podCIDRs": [f"10.97.{n}.0/24"]} for n in range(100, 130)]
    try:
        host.mesh.write_text(three.mesh_text([*(h.node for h in three.hosts), *more]))
        code, lines = status(host)
        wrong = [line for line in lines if line.startswith("! ")]
        assert code == 2 and lines[0].startswith("h1: all 2 peers ok; something is wrong with 30 other nodes")
        assert len(wrong) == 1 and "did you mean address?" in wrong[0] and "29 other nodes" in wrong[0], wrong
    finally:
        host.mesh.write_text(text)
