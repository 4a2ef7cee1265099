"""Open vSwitch ends, starts, stays away: the agent lives through it, and packets flow once the switch is back."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import Process, wait_for
from ovsmesh.lab.ping import ping
from tests.support.labpackets import assert_reach, assert_whole
from tests.support.labtools import SOON, Make, await_state, difference, guarded, links, metrics, routes, turns, wiring

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    return module_lab(3, 1, dual_stack=True)


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    yield from guarded(three)


def ours(host: Host) -> list[str]:
    return [route for route in routes(host) if "proto 111" in route]


def restore_wait(host: Host) -> str:
    return host.ovs_vsctl("get", "Open_vSwitch", ".", "other_config").strip()


def same_agent(host: Host, was: Process | None) -> bool:
    return was is not None and host.agent() == was


def cpu(host: Host) -> float:
    """Seconds of processor time that the agent has used."""
    return metrics(host)["process_cpu_seconds_total"]


def test_ovsdb_server_restarted(mesh: Lab) -> None:
    host = mesh.host(1)
    before, agent = wiring(host), host.agent()
    with mesh.stream(interval=0.02) as stream:
        assert stream.wait(time.time(), SOON)
        host.restart_ovsdb()
        await_state(lambda: wiring(host), before)
        mesh.converged(SOON)
        assert stream.wait(time.time(), SOON)
    if mesh.settings.datapath == "system":
        # forwarding never needs the database; the userspace datapath waits until ovs-vswitchd has its lock again
        assert_whole(stream.tracks)
    assert same_agent(host, agent)


@pytest.mark.parametrize(
    ("how", "wait"),
    [(signal.SIGKILL, True), (signal.SIGTERM, False)],
    ids=["killed, with flow-restore-wait", "ended, without"],
)
def test_ovs_vswitchd_restarted(mesh: Lab, how: signal.Signals, wait: bool) -> None:
    host = mesh.host(1)
    before, agent = wiring(host), host.agent()
    host.kill_vswitchd(how)
    host.start_vswitchd(restore_wait=wait)
    await_state(lambda: wiring(host), before)
    assert "flow-restore-wait" not in restore_wait(host)
    assert_reach(mesh)
    mesh.converged(SOON)
    assert same_agent(host, agent)


def test_both_dead_for_ten_seconds_while_the_agent_goes_on(mesh: Lab) -> None:
    host = mesh.host(1)
    before, agent = wiring(host), host.agent()
    kernel = ours(host)
    host.kill_vswitchd()
    host.kill_ovsdb()
    gone = time.monotonic()
    wait_for("/readyz to say why not", lambda: "ovsdb-server" in host.http("/readyz")[1], SOON)
    assert host.http("/readyz")[0] == 503
    assert host.http("/healthz")[0] == 200
    used, at = cpu(host), time.monotonic()
    # what does not need the switch is kept true all the while
    repaired = 0
    while time.monotonic() < gone + 10:
        host.run(["ip", "route", "del", "10.97.2.0/24"])
        wait_for("the route to be back", lambda: ours(host) == kernel, SOON)
        repaired += 1
        assert same_agent(host, agent)
        assert host.http("/metrics")[0] == 200
        wait_for("a moment", lambda n=repaired: time.monotonic() > gone + n, SOON)  # type: ignore[misc]
    assert repaired >= 5
    assert (cpu(host) - used) / (time.monotonic() - at) < 0.5
    host.start_ovsdb()
    host.start_vswitchd()
    await_state(lambda: wiring(host), before, SOON)
    assert "flow-restore-wait" not in restore_wait(host)
    assert_reach(mesh)
    mesh.converged(SOON)
    assert same_agent(host, agent)


def test_ovsdb_server_away_while_the_switch_runs(mesh: Lab) -> None:
    host = mesh.host(1)
    before, agent, kernel = wiring(host), host.agent(), ours(host)
    host.kill_ovsdb()
    wait_for("/readyz to say why not", lambda: "ovsdb-server" in host.http("/readyz")[1], SOON)
    start, used, turned = time.monotonic(), cpu(host), turns(host)
    host.run(["ip", "route", "del", "10.97.2.0/24"])
    wait_for("the route to be back", lambda: ours(host) == kernel, SOON)
    wait_for("2 seconds", lambda: time.monotonic() > start + 2, SOON)
    # and it does not spin
    assert (cpu(host) - used) / (time.monotonic() - start) < 0.3
    assert turns(host) - turned < 20
    host.start_ovsdb()
    await_state(lambda: wiring(host), before)
    mesh.converged(SOON)
    assert_reach(mesh)
    assert same_agent(host, agent)


def test_a_port_that_goes_while_the_agent_is_away_is_back_when_it_is(mesh: Lab) -> None:
    host = mesh.host(1)
    before = wiring(host)
    host.stop_agent(signal.SIGKILL)
    host.ovs_vsctl("del-port", "gre-h2")
    host.run(["ip", "route", "del", "10.97.3.0/24"])
    host.ovs_ofctl("del-flows", "obr0")
    plan = host.ovsmesh("plan")
    assert plan.returncode == 2
    assert "+ port gre-h2 remote 192.0.2.12" in plan.stdout and "+ route 10.97.3.0/24" in plan.stdout, plan.stdout
    host.start_agent()
    await_state(lambda: wiring(host), before)
    assert_reach(mesh)


def test_an_agent_that_starts_before_open_vswitch(mesh: Lab) -> None:
    host = mesh.host(1)
    before = wiring(host)
    host.stop_agent()
    host.kill_vswitchd()
    host.kill_ovsdb()
    host.start_agent()
    wait_for("the agent to say what it lacks", lambda: "ovsdb-server" in host.http("/readyz")[1], SOON)
    assert host.agent_alive()
    host.start_ovsdb()
    wait_for("the agent to say what it lacks", lambda: "ovs-vswitchd" in host.http("/readyz")[1], SOON)
    host.start_vswitchd()
    await_state(lambda: wiring(host), before, SOON)
    assert "flow-restore-wait" not in restore_wait(host)
    assert_reach(mesh)


def test_a_database_that_lost_everything_is_filled_again(mesh: Lab) -> None:
    host = mesh.host(3)
    host.kill_vswitchd()
    host.kill_ovsdb()
    (host.state / "conf.db").unlink()
    host.start_ovsdb()
    host.ovs_vsctl("--no-wait", "init")
    host.start_vswitchd(restore_wait=False)
    host.run(["nft", "delete", "table", "netdev", "lab"], check=False)
    host.create_underlay()
    mesh.converged(SOON, thorough=True)
    assert_reach(mesh)


def test_a_whole_host_restarted_under_its_agents_last_known_good(mesh: Lab) -> None:
    """Agent, database and switch end at once; the mesh file is gone when they start again."""
    host = mesh.host(1)
    before = wiring(host)
    host.stop_agent(signal.SIGKILL)
    host.kill_vswitchd()
    host.kill_ovsdb()
    host.run(["ip", "link", "del", "kbr0"])
    gone = host.state / "gone.yaml"
    host.start_ovsdb()
    host.start_vswitchd()
    host.start_agent(mesh=gone)
    wait_for("kbr0 to be back", lambda: "kbr0" in links(host), SOON)
    # whoever starts the pods plugs them in: no agent saw where they were
    host.plug()
    await_state(lambda: wiring(host), before, SOON)
    assert_reach(mesh)
    # `status` without options asks with the agent's own
    argv = [sys.executable, "-m", "ovsmesh", "status", "--state-dir", str(host.state / "agent")]
    done = host.run(argv, check=False)
    assert str(gone) in done.stdout and "last good" in done.stdout, done.stdout
    assert str(gone) in host.agent_log.read_text()
    host.stop_agent()
    host.start_agent()
    mesh.converged(SOON)
    assert difference(before, wiring(host)) == []
    assert_whole(ping(mesh.pairs(), 1))
