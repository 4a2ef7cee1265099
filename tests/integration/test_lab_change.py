"""The mesh changes under live agents: nodes leave, move, swap, are renamed; the removal guard holds a mass removal."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.lab.ping import Pair, ping
from tests.support.labpackets import assert_reach, assert_whole, silent
from tests.support.labtools import (
    SOON,
    Make,
    State,
    addresses,
    at_rest,
    await_problem,
    await_state,
    confirm,
    confirm_all,
    difference,
    fdb,
    held,
    live,
    neighbours,
    problems,
    report,
    revive,
    routes,
    tunnels,
    wiring,
)

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    return module_lab(3, 1)


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    three.write_mesh()
    confirm_all(three)
    revive(three)
    yield three
    three.write_mesh()
    at_rest(three)


@pytest.fixture(scope="module")
def good(three: Lab) -> list[State]:
    """The wiring of all hosts under the good file, which no bad one may change."""
    return [wiring(host) for host in three.hosts]


def test_a_node_leaves_and_comes_back(mesh: Lab, good: list[State]) -> None:
    host = mesh.host(1)
    two = [h.node for h in mesh.hosts[:2]]
    mesh.write_mesh(two)
    wait_for(
        "h3's parts to go", lambda: not traces(host, "10.97.3.", "0a:58:0a:61:03:01", "gre-h3", "192.0.2.13"), SOON
    )
    assert silent([mesh.pair(mesh.pod(1, 1), mesh.pod(3, 1))])
    assert_whole(ping([mesh.pair(mesh.pod(1, 1), mesh.pod(2, 1))], 5))
    mesh.write_mesh()
    await_state(lambda: wiring(host), good[0])
    at_rest(mesh)
    assert_reach(mesh)


def traces(host: Host, *words: str) -> list[str]:
    """Each line of the host's dataplane in which one of these words stands."""
    lines = [*routes(host), *neighbours(host), *fdb(host), *str(wiring(host)["ovsdb"].get("Port")).split(",")]
    lines += [*wiring(host)["flows"], *wiring(host)["rules"].splitlines()]
    return [line for line in lines if any(word in line for word in words)]


def test_a_renumbered_peer_is_followed_live(mesh: Lab) -> None:
    """Another pod CIDR and another tunnel address for h3, in one file; h3 itself renumbers its gateway."""
    host, third = mesh.host(1), mesh.host(3)
    device = "br-phy" if mesh.settings.datapath == "netdev" else "eth0"
    netns.ip_batch([f"addr add 192.0.2.63/24 dev {device}"], third.ns)
    nodes = [h.node for h in mesh.hosts]
    nodes[2] |= {"address": "192.0.2.63", "podCIDRs": ["10.97.33.0/24"]}
    pod = mesh.pod(3, 1)
    other = mesh.pair(mesh.pod(1, 1), mesh.pod(2, 1))
    with mesh.stream([other], 0.004) as stream:
        mesh.write_mesh(nodes)
        wait_for("h3's old parts to go", lambda: not traces(host, "10.97.3.", "192.0.2.13"), SOON)
        wait_for("h3's old gateway to go", lambda: "10.97.3.1/24 dev kbr0" not in addresses(third), SOON)
        at_rest(mesh)
        assert stream.wait(time.time(), SOON)
    if mesh.settings.datapath == "system":
        # the userspace datapath may drop a packet or two of others whenever it makes a port again
        assert_whole(stream.tracks)
    assert "10.97.33.1/24 dev kbr0" in addresses(third)
    assert "0a:58:0a:61:21:01" in third.run(["cat", "/sys/class/net/kbr0/address"]).stdout
    netns.ip_batch(["addr add 10.97.33.2/24 dev eth0", "route replace default via 10.97.33.1"], pod.ns)
    ways = [Pair(mesh.pod(n, 1).ns, "10.97.33.2", f"h{n}p1", "h3p1") for n in (1, 2)]
    assert_reach(mesh, [*ways, Pair(pod.ns, "10.97.1.2", "h3p1", "h1p1")])
    mesh.converged(SOON, thorough=True)
    mesh.write_mesh()
    mesh.converged(SOON, thorough=True)
    netns.ip_batch(["addr del 10.97.33.2/24 dev eth0", "route replace default via 10.97.3.1"], pod.ns)
    netns.ip_batch([f"addr del 192.0.2.63/24 dev {device}"], third.ns)
    assert_reach(mesh)


def test_a_peer_renamed_keeps_its_address(mesh: Lab, good: list[State]) -> None:
    host = mesh.host(1)
    nodes = [h.node for h in mesh.hosts]
    nodes[1]["name"] = "renamed"
    mesh.write_mesh(nodes)
    wait_for("the port's new name", lambda: "gre-renamed" in host.ovs_vsctl("list-ports", "obr0"), SOON)
    wait_for("the old one to go", lambda: "gre-h2" not in host.ovs_vsctl("list-ports", "obr0").split(), SOON)
    mesh.converged(SOON, [host, mesh.host(3)], thorough=True)
    # h2 itself no longer finds its name: it keeps what it has, and says so
    await_problem(mesh.host(2), "SelfMissing", "h2")
    assert difference(good[1], wiring(mesh.host(2))) == []
    assert_reach(mesh)
    mesh.write_mesh()
    await_state(lambda: wiring(host), good[0])


def test_two_nodes_that_swap_addresses(mesh: Lab, good: list[State]) -> None:
    device = "br-phy" if mesh.settings.datapath == "netdev" else "eth0"
    second, third = mesh.host(2), mesh.host(3)
    nodes = [h.node for h in mesh.hosts]
    nodes[1]["address"], nodes[2]["address"] = nodes[2]["address"], nodes[1]["address"]

    def pass_on(what: str) -> None:
        """Have hosts pass on what comes to an old owner: the userspace datapath keeps a neighbour for 15 minutes."""
        for host in mesh.hosts:
            host.run(["iptables", what, "FORWARD", "-i", device, "-o", device, "-j", "ACCEPT"])

    def move(host: Host, old: str, new: str) -> None:
        lines = [f"addr del {old}/24 dev {device}", f"addr add {new}/24 dev {device}"]
        netns.ip_batch([*lines, f"route replace default via 192.0.2.1 dev {device}"], host.ns)

    pass_on("-I")
    try:
        mesh.write_mesh(nodes)
        move(second, "192.0.2.12", "192.0.2.13")
        move(third, "192.0.2.13", "192.0.2.12")
        for host in mesh.hosts:
            host.run(["ip", "neigh", "flush", "dev", device])
        mesh.converged(SOON, thorough=True)
        assert_reach(mesh)
    finally:
        mesh.write_mesh()
        move(second, "192.0.2.13", "192.0.2.12")
        move(third, "192.0.2.12", "192.0.2.13")
        for host in mesh.hosts:
            host.run(["ip", "neigh", "flush", "dev", device])
        mesh.converged(SOON, thorough=True)
    assert_reach(mesh)
    pass_on("-D")
    for host, old in zip(mesh.hosts, good, strict=True):
        wait_for(
            "FORWARD to be left",
            lambda h=host: "ovsmesh" not in h.run(["iptables", "-S", "FORWARD"]).stdout,  # type: ignore[misc]
            SOON,
        )
        # made by iptables above
        host.run(["nft", "delete", "table", "ip", "filter"])
        await_state(lambda h=host: wiring(h), old)  # type: ignore[misc]


# --- the removal guard


def paper(count: int, first: int = 100) -> list[dict[str, Any]]:
    """Nodes that are in the file only."""
    return [
        {"name": f"n{n}", "address": f"192.0.2.{n}", "podCIDRs": [f"10.97.{n}.0/24"]}
        for n in range(first, first + count)
    ]


def test_a_mass_removal_is_held_until_it_is_confirmed(mesh: Lab, good: list[State]) -> None:
    host = mesh.host(1)
    nodes = [h.node for h in mesh.hosts]
    mesh.write_mesh([*nodes, *paper(6)])
    for each in mesh.hosts:
        wait_for("six more ports", lambda h=each: len(tunnels(h)) == 8, SOON)  # type: ignore[misc]
    at_rest(mesh)
    # 6 of 8 go, one comes
    mesh.write_mesh([*nodes, *paper(1, 150)])
    wait_for("the new one's port", lambda: "gre-n150" in tunnels(host), SOON)
    await_problem(host, "MassRemovalHeld", "ovsmesh confirm")
    assert len(tunnels(host)) == 9
    assert len([route for route in routes(host) if "onlink" in route]) == 9
    status = report(host)
    assert [p["reason"] for p in status["problems"] if "ovsmesh confirm" in p["message"]] == ["MassRemovalHeld"]
    assert [p["state"] for p in status["peers"]].count("held") == 6
    plan = host.ovsmesh("plan")
    assert plan.returncode == 2 and plan.stdout.count("= held port") == 6, plan.stdout
    assert_whole(ping(mesh.pairs(), 2))
    # a wrong digest does nothing; nor does an agent that starts again
    wrong = confirm(host, "000000000000")
    assert (wrong.returncode, wrong.stdout) == (1, "") and held(host) in wrong.stderr, wrong.stderr
    left = live(host)["held"]["left"]
    wait_for("the hold to count down", lambda: live(host)["held"]["left"] < left, SOON)
    host.stop_agent()
    nobody = confirm(host, held(host))
    assert nobody.returncode == 1 and "no agent runs" in nobody.stderr
    host.start_agent()
    await_problem(host, "MassRemovalHeld", "ovsmesh confirm")
    assert len(tunnels(host)) == 9
    # the line of the message can be pasted
    said = re.search(r"`ovsmesh (confirm [^`]*)`", " ".join(problems(host)))
    assert said is not None
    done = host.run([sys.executable, "-m", "ovsmesh", *shlex.split(said[1])], check=False)
    assert (done.returncode, done.stderr) == (0, "") and "confirmed: the agent removes 6 peers now" in done.stdout
    nothing = confirm(host, "000000000000")
    assert nothing.returncode == 1 and "nothing to confirm" in nothing.stderr
    wait_for("the six to go", lambda: tunnels(host) == ["gre-h2", "gre-h3", "gre-n150"], SOON)
    wait_for("rest", lambda: not problems(host), SOON)
    mesh.write_mesh()
    await_state(lambda: wiring(host), good[0])
    # each host confirms for itself, what it holds by then
    for other in mesh.hosts[1:]:
        await_problem(other, "MassRemovalHeld", "7 of")
    confirm_all(mesh)
    at_rest(mesh)
