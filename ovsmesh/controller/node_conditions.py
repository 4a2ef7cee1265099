"""Knows what agents report (MeshNodes), and what that makes of Nodes' conditions and of the Mesh's status.

Pure: the time is an argument. Imports model, membership, status (for the form of times) only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from ovsmesh.controller.membership import NETWORK, READY, Membership, NodeView, ObjectCondition
from ovsmesh.dataplane.report import timestamp
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason

SILENT = 900.0
"""Seconds without a report after which nothing is known of an agent: three of its longest pauses."""
_SHOWN = 8


class AgentReport(NamedTuple):
    """A MeshNode as it was read."""

    name: str
    owner: str = ""
    """uid of the Node that it belongs to; "" where it says none."""
    observed_at: str = ""
    converged: ObjectCondition | None = None
    degraded: ObjectCondition | None = None
    wanted: int | None = None
    installed: int | None = None
    up: int | None = None
    mtu: int | None = None
    agent: str = ""
    ovs: str = ""
    kernel: str = ""
    uid: str = ""
    """Its own; "" where it belongs to something that is no Node."""
    created: str = ""
    """RFC 3339."""


def parse_meshnode(found: Mapping[str, Any]) -> AgentReport:
    """A MeshNode object as a AgentReport; the schema has made sure of the shapes."""
    meta, status = found["metadata"], found.get("status") or {}
    owned = meta.get("ownerReferences") or ()
    owners = [o.get("uid", "") for o in owned if o.get("kind") == "Node"]
    conditions = {
        c["type"]: ObjectCondition(
            c.get("status", ""), c.get("reason", ""), c.get("message", ""), c.get("lastTransitionTime") or ""
        )
        for c in status.get("conditions") or ()
    }
    peers, versions = status.get("peers") or {}, status.get("versions") or {}
    return AgentReport(
        meta["name"],
        owners[0] if owners else "",
        status.get("observedAt") or "",
        conditions.get("Converged"),
        conditions.get("Degraded"),
        peers.get("wanted"),
        peers.get("installed"),
        peers.get("up"),
        status.get("mtu"),
        versions.get("agent") or "",
        versions.get("ovs") or "",
        versions.get("kernel") or "",
        "" if len(owned) > len(owners) else meta.get("uid", ""),
        meta.get("creationTimestamp") or "",
    )


def seconds(text: str) -> float | None:
    """An RFC 3339 time in seconds since the epoch; None for anything else."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def silent_for(report: AgentReport, now: float) -> float:
    """Seconds since the agent's last report; 0 where it says no time."""
    at = seconds(report.observed_at)
    return max(0.0, now - at) if at is not None else 0.0


def orphans(reports: Iterable[AgentReport], alive: Mapping[str, str], now: float) -> list[AgentReport]:
    """Those of an earlier Node of a living one's name; and those that no Node owns, of nobody who is alive, whose
    agents have been silent for as long as counts. `alive` is name → uid, "" for static members."""
    found = []
    for report in reports:
        uid = alive.get(report.name)
        if report.owner:
            gone = bool(uid) and uid != report.owner
        else:
            last = seconds(report.observed_at or report.created)
            gone = uid is None and last is not None and now - last > SILENT
        if gone and report.uid:
            found.append(report)
    return found


def speaks_for(report: AgentReport | None, node: NodeView) -> bool:
    """Whether it is of this Node, and not of an earlier one with its name."""
    if report is None:
        return False
    if report.owner:
        return report.owner == node.uid
    observed, made = seconds(report.observed_at), seconds(node.created)
    return observed is None or made is None or observed >= made


class Wanted(NamedTuple):
    """What a Node's conditions should be; None leaves one as it is."""

    network: ObjectCondition | None
    ready: ObjectCondition | None


def judge(node: NodeView, membership: Membership, report: AgentReport | None, now: float) -> Wanted:
    """The conditions that the node's own report, or its refusal, makes.

    | the node                               | NetworkUnavailable | MeshReady |
    |----------------------------------------|--------------------|-----------|
    | excluded by its label                  | as it is           | False where there was one |
    | refused                                | True               | False |
    | no report of its own yet               | True               | False |
    | its agent says Converged               | False              | True |
    | its agent says not Converged           | True               | False |
    | its agent has been silent for 15 min   | as it is           | Unknown |
    """
    if node.excluded:
        left = ObjectCondition("False", Reason.Excluded, "left out of the mesh by its label ovsmesh.io/exclude")
        return Wanted(None, left if node.ready else None)
    problem = membership.problems.get(node.name)
    if problem is not None and problem.fatal:
        return _both(False, problem.reason, str(problem))
    if report is None or not speaks_for(report, node) or report.converged is None:
        return _both(
            False, Reason.AgentNotReported, "its agent has not said anything yet: is ovsmesh-agent running on it?"
        )
    if silent_for(report, now) > SILENT:
        message = f"its agent was last heard at {report.observed_at}; what it has set up stays in place"
        return Wanted(None, ObjectCondition("Unknown", Reason.AgentSilent, message))
    if report.converged.status == "True":
        if problem is not None:
            return _both(True, problem.reason, str(problem))
        return _both(True, Reason.MeshConverged, "its part of the mesh is as wanted")
    return _both(False, report.converged.reason or Reason.NotConverged, report.converged.message)


def _both(good: bool, reason: str, message: str) -> Wanted:
    message = message[:1024]
    return Wanted(
        ObjectCondition("False" if good else "True", reason, message),
        ObjectCondition("True" if good else "False", reason, message),
    )


def changes(node: NodeView, wanted: Wanted, now: float) -> list[dict[str, str]]:
    """The conditions to write, as a Node's status has them; empty when it says so already."""
    made = []
    for type_, have, want in ((NETWORK, node.network, wanted.network), (READY, node.ready, wanted.ready)):
        if want is None or (have is not None and have[:3] == want[:3]):
            continue
        same = have is not None and have.status == want.status
        entry = {"type": type_, "status": want.status, "reason": want.reason, "message": want.message}
        entry["lastHeartbeatTime"] = timestamp(now)
        entry["lastTransitionTime"] = have.since if same and have and have.since else timestamp(now)
        made.append(entry)
    return made


def mesh_status(
    membership: Membership,
    converged: int,
    generation: int,
    more: Iterable[Problem],
    before: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    """The Mesh's status. `before` is what it is now, for the times of the conditions."""
    nodes = len(membership.members)
    problems = [
        *more,
        *membership.static_problems,
        *(membership.problems[name] for name in sorted(membership.problems)),
    ]
    if problems:
        shown = "; ".join(map(str, problems[:_SHOWN]))
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        degraded = ObjectCondition("True", problems[0].reason, (shown + rest)[:32000])
    else:
        degraded = ObjectCondition("False", Reason.AllGood, "every node can be joined")
    if any(p.fatal for p in problems):
        ready = ObjectCondition(
            "False", problems[0].reason, f"{converged} of {nodes} nodes converged; {degraded.message}"
        )
    elif converged < nodes:
        ready = ObjectCondition("False", Reason.Converging, f"{converged} of {nodes} nodes converged")
    else:
        ready = ObjectCondition("True", Reason.AllConverged, f"{nodes} nodes converged")
    old = {c.get("type"): c for c in before.get("conditions") or () if isinstance(c, dict)}
    made = []
    for type_, want in (("Ready", ready), ("Degraded", degraded)):
        had = old.get(type_) or {}
        since = had.get("lastTransitionTime") if had.get("status") == want.status else None
        entry = {"type": type_, "status": want.status, "reason": want.reason, "message": want.message[:32000]}
        made.append(entry | {"lastTransitionTime": since or timestamp(now), "observedGeneration": generation})
    return {"nodes": nodes, "converged": converged, "observedGeneration": generation, "conditions": made}
