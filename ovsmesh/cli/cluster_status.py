"""`ovsmesh status --cluster`: a line for each node, from the MeshNodes that agents write and the slices they read.

Reads the API with the caller's permissions and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovsmesh.cli.formats import serialize
from ovsmesh.controller import node_conditions
from ovsmesh.controller.node_conditions import AgentReport
from ovsmesh.dataplane.report import age
from ovsmesh.dataplane.report_text import table
from ovsmesh.kube.client import Api, NotFound, Object, path_of
from ovsmesh.kube.config import find
from ovsmesh.mesh.meshslice import parse_slice
from ovsmesh.mesh.types import Node
from ovsmesh.names import DEFAULT_MESH, MESH_NODES, MESH_SLICES, MESHES
from ovsmesh.reasons import Reason
from ovsmesh.text import printable

_STATES: Mapping[str, str] = {Reason.AgentNotReported: "unknown", Reason.AgentSilent: "silent"}
"""States of a node whose agent is not heard."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What the API says of the mesh at one time (`now`, in seconds since the epoch)."""

    mesh: Mapping[str, Any] | None
    entries: Mapping[str, Node]
    reports: Mapping[str, AgentReport]
    now: float


def read(api: Api) -> ClusterState:
    """Read the Mesh, all MeshSlices and all MeshNodes. Raises ApiError."""
    try:
        mesh: Object | None = api.get(path_of(MESHES, DEFAULT_MESH))
    except NotFound:
        mesh = None
    found = [parse_slice(item) for page in api.pages(MESH_SLICES) for item in page.items]
    entries = {node.name: node for one in found if one.mesh == DEFAULT_MESH for node in one.members}
    reports = [node_conditions.parse_meshnode(item) for page in api.pages(MESH_NODES) for item in page.items]
    return ClusterState(mesh, entries, {report.name: report for report in reports}, time.time())


def rows(cluster: ClusterState) -> list[dict[str, Any]]:
    """Return a row for each node that is in the mesh or has an agent that reports, the troubled ones first."""
    names = sorted(cluster.entries.keys() | cluster.reports.keys())
    made = [_row(name, cluster.entries.get(name), cluster.reports.get(name), cluster.now) for name in names]
    return sorted(made, key=lambda row: row["state"] == "converged")


def _row(name: str, entry: Node | None, report: AgentReport | None, now: float) -> dict[str, Any]:
    said = node_conditions.agent_condition(report, entry.uid if entry else "", "", now)
    state, message = "converged", ""
    if said.status != "True":
        state = _STATES.get(said.reason, "not converged")
        message = said.message if said.reason in _STATES else f"{said.reason}: {said.message}"
    elif report is not None and report.degraded is not None and report.degraded.status == "True":
        state, message = "degraded", f"{report.degraded.reason}: {report.degraded.message}"
    if entry is None:
        rest = f"; {message}" if message else ""
        state, message = "no member", f"in no MeshSlice: see the conditions of the Node{rest}"
    report = report or AgentReport(name)
    return {
        "name": name,
        "state": state,
        "address": str(entry.address) if entry else "",
        "podCIDRs": [str(cidr) for cidr in entry.pod_cidrs] if entry else [],
        "peers": {"wanted": report.wanted, "installed": report.installed, "up": report.up},
        "mtu": report.mtu,
        "versions": {"agent": report.agent, "ovs": report.ovs, "kernel": report.kernel},
        "observedAt": report.observed_at,
        "message": message,
    }


def render(cluster: ClusterState, output: str = "table") -> str:
    """Return the state as a table, JSON or YAML, without a newline at its end."""
    made = rows(cluster)
    status = (cluster.mesh or {}).get("status") or {}
    if output != "table":
        return serialize({"mesh": status, "nodes": made}, output)
    good = sum(row["state"] == "converged" for row in made)
    lines = [f"{good} of {len(made)} nodes converged"]
    if cluster.mesh is None:
        lines = [
            f"there is no Mesh {DEFAULT_MESH}: the controller makes one from the Nodes' podCIDRs. Where it cannot,"
            " `kubectl get events` says why: apply one then (see manifests/mesh.yaml)"
        ]
    for condition in status.get("conditions") or ():
        if (condition["type"], condition["status"]) in (("Degraded", "True"), ("Ready", "False")):
            line = f"! {condition['reason']}: {condition['message']}"
            if condition["type"] == "Degraded" or condition["reason"] == Reason.Converging:
                lines.append(line)
    if made:
        head = ["NODE", "ADDRESS", "POD CIDRS", "PEERS", "MTU", "OVS", "SEEN", "STATE"]
        lines += ["", *table([head, *(_cells(row, cluster.now) for row in made)])]
    return "\n".join(map(printable, lines))


def _cells(row: Mapping[str, Any], now: float) -> list[str]:
    peers = row["peers"]
    counts = "-" if peers["wanted"] is None else f"{peers['up'] or 0}/{peers['installed'] or 0}/{peers['wanted']}"
    at = node_conditions.seconds(row["observedAt"])
    state = f"{row['state']}: {row['message']}" if row["message"] else row["state"]
    return [
        row["name"],
        row["address"] or "-",
        ",".join(row["podCIDRs"]) or "-",
        counts,
        str(row["mtu"] or "-"),
        row["versions"]["ovs"] or "-",
        age(now - at) if at is not None else "-",
        state,
    ]


def status(kubeconfig: str | None, output: str) -> str:
    """Return the cluster's status as a table, JSON or YAML. Raises OvsmeshError."""
    api = Api(find(kubeconfig))
    try:
        return render(read(api), output)
    finally:
        api.close()
