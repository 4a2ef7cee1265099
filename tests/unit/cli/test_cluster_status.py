"""The cluster's status: the state of each node, from its MeshNode and its slice."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from ovsmesh.cli.cluster_status import ClusterState, render, rows
from ovsmesh.controller.membership import ObjectCondition
from ovsmesh.controller.node_conditions import AgentReport
from ovsmesh.dataplane.report import timestamp
from ovsmesh.mesh.types import Node

NOW = 1_700_000_000.0
CONVERGED = ObjectCondition("True", "AsWanted", "")
MEMBER = Node("web1", ip_address("192.0.2.11"), (ip_network("10.97.1.0/24"),), uid="u1")
MESH = {"status": {"conditions": [{"type": "Degraded", "status": "True", "reason": "R", "message": "m\x1b"}]}}


def report(age: float = 5, **fields: Any) -> AgentReport:
    base = AgentReport("web1", "u1", timestamp(NOW - age), CONVERGED, wanted=2, installed=2, up=1, ovs="3.1.0")
    return base._replace(**fields)


def cluster(found: AgentReport | None, member: Node | None = MEMBER) -> ClusterState:
    entries = {member.name: member} if member else {}
    return ClusterState(MESH, entries, {"web1": found} if found else {}, NOW)


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
    state = cluster(report())
    head, condition, _, columns, line = render(state).splitlines()
    assert (head, condition) == ("1 of 1 nodes converged", "! R: m?")
    assert columns.split()[0] == "NODE" and line.split() == [
        *("web1", "192.0.2.11", "10.97.1.0/24", "1/2/2", "-", "3.1.0", "5s", "converged")
    ]
    assert json.loads(render(state, "json")) == yaml.safe_load(render(state, "yaml"))


def test_troubled_nodes_come_first() -> None:
    other = report(name="web0")
    state = ClusterState(None, {"web1": MEMBER}, {"web1": report(), "web0": other}, NOW)
    assert [row["name"] for row in rows(state)] == ["web0", "web1"]
    assert "there is no Mesh default" in render(state)
