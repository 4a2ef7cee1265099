"""The cluster's status: the state of each node, from its MeshNode and its slice."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from ovsmesh.cli.cluster_status import ClusterState, render, rows, tree, verdict
from ovsmesh.cli.formats import serialize
from ovsmesh.controller.membership import ObjectCondition
from ovsmesh.controller.node_conditions import AgentReport, LostPeer
from ovsmesh.mesh.types import Node
from ovsmesh.probe.quorum import Vote
from ovsmesh.text import timestamp

NOW = 1_700_000_000.0
CONVERGED = ObjectCondition("True", "AsWanted", "")
MEMBER = Node("web1", ip_address("192.0.2.11"), (ip_network("10.97.1.0/24"),), uid="u1")
MESH = {"status": {"conditions": [{"type": "Degraded", "status": "True", "reason": "R", "message": "m\x1b"}]}}


def report(age: float = 5, **fields: Any) -> AgentReport:
    base = AgentReport("web1", "u1", timestamp(NOW - age), CONVERGED, wanted=2, installed=2, up=2, ovs="3.1.0")
    base = base._replace(vote=Vote(2, 2, 0, frozenset(), NOW - age), round_trip="0.42 ms", path_mtu=1362)
    return base._replace(**fields)


def cluster(
    found: AgentReport | None, member: Node | None = MEMBER, mesh: dict[str, Any] | None = None
) -> ClusterState:
    entries = {member.name: member} if member else {}
    return ClusterState({} if mesh is None else mesh, entries, {"web1": found} if found else {}, NOW)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (cluster(report()), "converged"),
        (cluster(None), "unknown"),
        (cluster(report(converged=None)), "unknown"),
        (cluster(report(owner="u0")), "unknown"),
        (cluster(report(age=7200)), "silent"),
        (cluster(report(converged=ObjectCondition("False", "Pending", "3 changes"))), "not converged"),
        (cluster(report(degraded=ObjectCondition("True", "PeersMissing", "web2"))), "degraded"),
        (cluster(report(), member=None), "no member"),
    ],
)
def test_state_of_a_node(state: ClusterState, expected: str) -> None:
    assert [row["state"] for row in rows(state)] == [expected]


def test_table_json_and_yaml_show_the_same_nodes() -> None:
    state = cluster(report(), mesh=MESH)
    head, condition, _, columns, line = render(state).splitlines()
    assert (head, condition) == ("R, see below", "! R: m?")
    assert columns.split()[4:7] == ["REACHABLE", "WORST-RTT", "MTU"]
    assert line.split() == [
        *("web1", "192.0.2.11", "10.97.1.0/24", "2/2", "0.42", "ms", "1362", "3.1.0", "5s", "converged")
    ]
    assert json.loads(serialize(tree(state), "json")) == yaml.safe_load(serialize(tree(state), "yaml"))


def of(count: int, *bad: tuple[int, int], silent: int = 0) -> ClusterState:
    """A cluster of nodes web1, web2, …, and the pairs that packets are lost between."""
    members, reports = {}, {}
    for number in range(1, count + 1):
        name = f"web{number}"
        members[name] = Node(name, ip_address(f"192.0.2.{number}"), (ip_network(f"10.97.{number}.0/24"),), f"u{number}")
        lost = tuple(LostPeer(f"web{a + b - number}", "unreachable", "GRE?") for a, b in bad if number in (a, b))
        vote = Vote(count - 1, count - 1, len(lost), frozenset(peer.name for peer in lost), NOW)
        up = count - 1 - len(lost)
        made = report(0, name=name, owner=f"u{number}", vote=vote, lost=lost, wanted=count - 1, up=up)
        reports[name] = made if number != silent else made._replace(observed_at=timestamp(NOW - 7200))
    return ClusterState({}, members, reports, NOW)


@pytest.mark.parametrize(
    ("state", "headline", "code"),
    [
        (of(4), "4 nodes converged, and packets get through between all of them", 0),
        (of(4, (1, 2)), "packets are lost between web1 and web2", 2),
        (of(4, (1, 3), (2, 3), (4, 3)), "1 of 4 nodes isolated: web3", 2),
        (of(4, (1, 3), (1, 4), (2, 3), (2, 4)), "most nodes can't reach most others", 2),
        (of(4, silent=2), "1 of 4 nodes silent: web2", 2),
        (cluster(report(converged=ObjectCondition("False", "Pending", ""))), "1 of 1 node not converged: web1", 2),
        (cluster(report(degraded=ObjectCondition("True", "X", "y"))), "1 node converged, with problems", 2),
        (cluster(report(vote=None)), "not known yet whether packets get through to all peers of web1", 2),
        (ClusterState({}, {}, {}, NOW), "no node is in the mesh", 1),
    ],
)
def test_the_verdict_comes_first_and_decides_the_exit_status(state: ClusterState, headline: str, code: int) -> None:
    assert verdict(state) == (headline, code)
    assert render(state).splitlines()[0] == headline
    assert tree(state)["well"] is (code == 0)


def test_what_is_wrong_between_nodes_is_named_once_with_its_cause_and_what_to_run() -> None:
    text = render(of(4, (1, 2)))
    (line,) = [line for line in text.splitlines() if line.startswith("!")]
    assert line == "! web1: web2 unreachable: GRE?. Try: kubectl ovsmesh check --on web1 --peer web2"
    rows_of = {line.split()[0]: line for line in text.splitlines() if line.startswith("web")}
    assert "2/3" in rows_of["web1"] and "degraded: web2 unreachable: GRE?" in rows_of["web1"]
    text = render(of(4, (1, 3), (2, 3), (4, 3)))
    (line,) = [line for line in text.splitlines() if line.startswith("!")]
    assert "web3" in line and "check --on web3" in line
    assert text.splitlines()[4].startswith("web3")


def test_troubled_nodes_come_first() -> None:
    other = report(name="web0")
    state = ClusterState(None, {"web1": MEMBER}, {"web1": report(), "web0": other}, NOW)
    assert [row["name"] for row in rows(state)] == ["web0", "web1"]
    assert "there is no Mesh default" in render(state)
