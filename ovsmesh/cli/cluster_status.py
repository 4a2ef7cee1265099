"""`ovsmesh status --cluster`: a line for each node, from the MeshNodes that agents write and the slices they read.

Reads the API with the caller's permissions and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ovsmesh.cli.formats import View
from ovsmesh.controller import node_conditions
from ovsmesh.controller.node_conditions import AgentReport
from ovsmesh.dataplane.report_text import table
from ovsmesh.kube.client import Api, NotFound, Object, path_of
from ovsmesh.kube.config import find
from ovsmesh.mesh.meshslice import parse_slice
from ovsmesh.mesh.types import Node
from ovsmesh.names import DEFAULT_MESH, MESH_NODES, MESH_SLICES, MESHES
from ovsmesh.probe.quorum import Quorum
from ovsmesh.reasons import Reason
from ovsmesh.text import age, counted, listed, printable, seconds, some

_STATES: Mapping[str, str] = {Reason.AgentNotReported: "unknown", Reason.AgentSilent: "silent"}
"""States of a node whose agent is not heard."""
_SHOWN_ABOVE = frozenset({Reason.Isolated, Reason.MeshSplit, Reason.PeersUnreachable})
"""Reasons of the Mesh that the same reports lead to."""


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


class _Reach(NamedTuple):
    """What the reports of all nodes say of packets between them."""

    isolated: Mapping[str, str]
    """Node that is cut off from most others → why."""
    split: bool
    """Whether most nodes cannot reach most others."""
    pairs: Mapping[tuple[str, str], str]
    """Other pairs that packets are lost between, each once, with the likely cause."""
    unknown: frozenset[str]
    """Nodes that do not say whether packets get through to all of their peers."""


def _reach(cluster: ClusterState) -> _Reach:
    """Return what the controller's quorum finds in these reports, without the time that it takes to be sure."""
    heard, able = node_conditions.voters(cluster.entries.values(), cluster.reports, lambda _: "", cluster.now)
    votes = {name: report.vote for name, report in heard.items() if report.vote}
    found = Quorum().decide(votes, able, frozenset(), 0.0, cluster.now)
    isolated = {name: node_conditions.why_isolated(name, heard) for name in sorted(found.doubtful)}
    pairs = {}
    for (one, other), text in sorted(node_conditions.bad_pairs(heard, able).items()):
        if not {one, other} & isolated.keys() and (other, one) not in pairs:
            pairs[one, other] = text
    unknown = able - {name for name, vote in votes.items() if vote.probed == vote.wanted}
    return _Reach(isolated, found.split, pairs, frozenset(unknown))


def rows(cluster: ClusterState) -> list[dict[str, Any]]:
    """Return a row for each node that is in the mesh or has an agent that reports, the troubled ones first."""
    names, reach = sorted(cluster.entries.keys() | cluster.reports.keys()), _reach(cluster)
    made = [_row(name, cluster.entries.get(name), cluster.reports.get(name), reach, cluster.now) for name in names]
    return sorted(made, key=lambda row: (row["state"] == "converged", row["state"] != "isolated"))


def _row(name: str, entry: Node | None, report: AgentReport | None, reach: _Reach, now: float) -> dict[str, Any]:
    said = node_conditions.agent_condition(report, entry.uid if entry else "", "", now)
    lost = report.lost if report is not None else ()
    state, message = "converged", ""
    if said.status != "True" and said.reason not in _STATES:
        state, message = "not converged", f"{said.reason}: {said.message}"
    elif name in reach.isolated:
        state, message = "isolated", reach.isolated[name]
    elif said.status != "True":
        state, message = _STATES[said.reason], said.message
    elif report is not None and report.degraded is not None and report.degraded.status == "True":
        state, message = "degraded", f"{report.degraded.reason}: {listed(lost, 3, '; ') or report.degraded.message}"
    elif lost:
        state, message = "degraded", listed(lost, 3, "; ")
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
        "reachability": _reachability(report),
        "mtu": report.mtu,
        "versions": {"agent": report.agent, "ovs": report.ovs, "kernel": report.kernel},
        "observedAt": report.observed_at,
        "message": message,
    }


def _reachability(report: AgentReport) -> dict[str, Any] | None:
    """Return what the node's probes found; None where nothing probes."""
    if report.vote is None:
        return None
    return {
        "unreachable": report.vote.unreachable,
        "unprobed": report.vote.wanted - report.vote.probed,
        "worstRoundTrip": report.round_trip or None,
        "pathMTU": report.path_mtu,
        "worstPeers": [peer._asdict() for peer in report.lost],
    }


def _degraded(cluster: ClusterState) -> list[Mapping[str, Any]]:
    """Return what the Mesh says is wrong and the reports do not: at most one condition."""
    found = ((cluster.mesh or {}).get("status") or {}).get("conditions") or ()
    return [c for c in found if (c["type"], c["status"]) == ("Degraded", "True") and c["reason"] not in _SHOWN_ABOVE]


def verdict(cluster: ClusterState) -> tuple[str, int]:
    """Return how the mesh is, in one line, and the exit status: 0 all is well, 2 it is not, 1 nothing is known."""
    made, reach = rows(cluster), _reach(cluster)
    if not made:
        return "no node is in the mesh", 1
    parts = []
    if reach.isolated:
        parts.append(f"{len(reach.isolated)} of {counted(len(made), 'node')} isolated: {listed(reach.isolated, 3)}")
    if reach.split:
        parts.append("most nodes can't reach most others")
    elif reach.pairs:
        names = [f"{one} and {other}" for one, other in reach.pairs]
        parts.append(f"packets are lost between {listed(names, 3)}")
    others = {row["name"]: row["state"] for row in made if row["state"] not in ("converged", "isolated", "degraded")}
    for state in sorted(set(others.values())):
        names = [name for name, found in others.items() if found == state]
        parts.append(f"{len(names)} of {counted(len(made), 'node')} {state}: {listed(names, 3)}")
    unknown = sorted(reach.unknown - others.keys())
    if unknown:
        parts.append(f"not known yet whether packets get through to all peers of {listed(unknown, 3)}")
    if not parts and any(row["state"] == "degraded" for row in made):
        parts.append(f"{counted(len(made), 'node')} converged, with problems")
    parts += [f"{condition['reason']}, see below" for condition in _degraded(cluster)]
    if cluster.mesh is None:
        parts.append(f"there is no Mesh {DEFAULT_MESH}")
    if parts:
        return "; ".join(parts), 2
    return f"{counted(len(made), 'node')} converged, and packets get through between all of them", 0


def tree(cluster: ClusterState) -> dict[str, Any]:
    """Return the state for JSON and YAML."""
    headline, code = verdict(cluster)
    status = (cluster.mesh or {}).get("status") or {}
    return {"headline": headline, "well": code == 0, "mesh": status, "nodes": rows(cluster)}


def render(cluster: ClusterState) -> str:
    """Return the state as a table, without a newline at its end."""
    made = rows(cluster)
    lines = [verdict(cluster)[0]]
    if cluster.mesh is None:
        lines.append(
            f"! there is no Mesh {DEFAULT_MESH}: the controller makes one from the Nodes' podCIDRs. Where it cannot,"
            " `kubectl get events` says why: apply one then (see manifests/mesh.yaml)"
        )
    reach = _reach(cluster)
    shown = {f"! {name}: {why}. Try: kubectl ovsmesh check --on {name}": None for name, why in reach.isolated.items()}
    for (one, other), why in [] if reach.split else reach.pairs.items():
        shown[f"! {one}: {why}. Try: kubectl ovsmesh check --on {one} --peer {other}"] = None
    lines += some(shown, 10)
    lines += [f"! {condition['reason']}: {condition['message']}" for condition in _degraded(cluster)]
    if made:
        head = ["NODE", "ADDRESS", "POD CIDRS", "REACHABLE", "WORST-RTT", "MTU", "OVS", "SEEN", "STATE"]
        lines += ["", *table([head, *(_cells(row, cluster.now) for row in made)])]
    return "\n".join(map(printable, lines))


def _cells(row: Mapping[str, Any], now: float) -> list[str]:
    peers, reach = row["peers"], row["reachability"] or {}
    at = seconds(row["observedAt"])
    state = f"{row['state']}: {row['message']}" if row["message"] else row["state"]
    return [
        row["name"],
        row["address"] or "-",
        ",".join(row["podCIDRs"]) or "-",
        "-" if peers["wanted"] is None or not row["reachability"] else f"{peers['up'] or 0}/{peers['wanted']}",
        reach.get("worstRoundTrip") or "-",
        str(reach.get("pathMTU") or row["mtu"] or "-"),
        row["versions"]["ovs"] or "-",
        age(now - at) if at is not None else "-",
        state,
    ]


def view(kubeconfig: str | None) -> View:
    """Return the cluster's status as it is shown. Raises OvsmeshError, also where the caller may not read it."""
    api = Api(find(kubeconfig))
    try:
        found = read(api)
    finally:
        api.close()
    return View(render(found), tree(found), verdict(found)[1])
