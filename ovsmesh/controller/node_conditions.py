"""What agents report (MeshNodes), and the conditions that follow for Nodes and for the Mesh.

Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ovsmesh.controller.membership import (
    EXCLUDE,
    NETWORK,
    READY,
    Membership,
    NodeView,
    ObjectCondition,
    parse_condition,
)
from ovsmesh.dataplane.report import NOT_REACHED
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Node
from ovsmesh.probe.quorum import CUT_OFF, Vote
from ovsmesh.reasons import Reason
from ovsmesh.text import listed, seconds, timestamp

SILENT = 900.0
"""Seconds without a report after which an agent's state is unknown: three of its longest pauses."""
_SHOWN = 8


class LostPeer(NamedTuple):
    """A peer that a node does not reach, or not well, as its agent says."""

    name: str
    state: str
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.state}{f': {self.cause}' if self.cause else ''}"


class AgentReport(NamedTuple):
    """A MeshNode as it was read: what a node's agent says of itself."""

    name: str
    owner: str = ""
    """uid of the Node that owns it; "" if none does."""
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
    """Its own; "" if something else than a Node owns it."""
    created: str = ""
    """RFC 3339."""
    vote: Vote | None = None
    """What it says of its peers; None where nothing probes."""
    lost: tuple[LostPeer, ...] = ()
    """The worst of its peers."""
    round_trip: str = ""
    path_mtu: int | None = None


def parse_meshnode(found: Mapping[str, Any]) -> AgentReport:
    """Return a MeshNode object as an AgentReport. The schema has made sure of the shapes."""
    meta, status = found["metadata"], found.get("status") or {}
    owned = meta.get("ownerReferences") or ()
    owners = [o.get("uid", "") for o in owned if o.get("kind") == "Node"]
    peers, versions = status.get("peers") or {}, status.get("versions") or {}
    reach, wanted = status.get("reachability") or {}, peers.get("wanted") or 0
    worst = reach.get("worstPeers") or ()
    lost = tuple(LostPeer(p["name"], p["state"], p.get("cause") or "") for p in worst if p["state"] in NOT_REACHED)
    cut_off = frozenset(peer.name for peer in lost if peer.state in CUT_OFF)
    probed = wanted - (reach.get("unprobed") or 0)
    at = seconds(status.get("observedAt") or "")
    return AgentReport(
        name=meta["name"],
        owner=owners[0] if owners else "",
        observed_at=status.get("observedAt") or "",
        converged=parse_condition(status, "Converged"),
        degraded=parse_condition(status, "Degraded"),
        wanted=peers.get("wanted"),
        installed=peers.get("installed"),
        up=peers.get("up"),
        mtu=status.get("mtu"),
        agent=versions.get("agent") or "",
        ovs=versions.get("ovs") or "",
        kernel=versions.get("kernel") or "",
        uid="" if len(owned) > len(owners) else meta.get("uid", ""),
        created=meta.get("creationTimestamp") or "",
        vote=Vote(wanted, probed, reach.get("unreachable") or 0, cut_off, at) if reach else None,
        lost=lost,
        round_trip=reach.get("worstRoundTrip") or "",
        path_mtu=reach.get("pathMTU"),
    )


def orphans(reports: Iterable[AgentReport], alive: Mapping[str, str], now: float) -> list[AgentReport]:
    """Return the reports that nobody will write again. `alive` is name → uid, "" for static members.

    These are those that an earlier Node of the same name owns; and those that no Node owns, whose node is gone and
    whose agent is silent.
    """
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


def speaks_for(report: AgentReport, uid: str, created: str) -> bool:
    """Return whether a report is of the node with this uid, and not of an earlier one with its name."""
    if report.owner and uid:
        return report.owner == uid
    observed, made = seconds(report.observed_at), seconds(created)
    return observed is None or made is None or observed >= made


def voters(
    members: Iterable[Node], reports: Mapping[str, AgentReport], created: Callable[[str], str], now: float
) -> tuple[dict[str, AgentReport], set[str]]:
    """Return the reports that tell of peers, and the names of all that should have a vote.

    A static member has one if it uses it: it may well have no agent in this cluster. `created` is as a Node has it.
    """
    heard, able = {}, set()
    for member in members:
        report = reports.get(member.name)
        told = report.vote if report is not None else None
        recent = told is not None and now - (told.at or 0.0) <= SILENT
        if report is not None and recent and speaks_for(report, member.uid, created(member.name)):
            heard[member.name] = report
        if member.uid or member.name in heard:
            able.add(member.name)
    return heard, able


def bad_pairs(heard: Mapping[str, AgentReport], able: Collection[str]) -> dict[tuple[str, str], str]:
    """Return each end of each bad pair, from where it stands, with what it, or else the other end, says of it."""
    bad = {(name, peer.name): str(peer) for name, report in heard.items() for peer in report.lost}
    mirrored = {(peer, name): f"{name} does not reach this node; it has {text}" for (name, peer), text in bad.items()}
    return {pair: text for pair, text in (mirrored | bad).items() if pair[0] in able and pair[1] in able}


def why_isolated(name: str, heard: Mapping[str, AgentReport]) -> str:
    """Return why a node counts as isolated, with the likely cause as one agent names it."""
    own = heard.get(name)
    if own is not None and own.vote is not None and own.vote.lonely and own.lost:
        return f"it can't reach most other nodes; {own.lost[0]}"
    says = ((other, peer) for other, report in heard.items() for peer in report.lost if peer.name == name)
    other, peer = next(says, ("", None))
    return f"most other nodes can't reach it; as {other} says: {peer}" if peer else "most other nodes can't reach it"


def agent_condition(report: AgentReport | None, uid: str, created: str, now: float) -> ObjectCondition:
    """Return whether a node's own agent says that it is converged: True, False or Unknown, and why.

    `uid` and `created` are the Node's, "" for a static member or where they are not known.
    """
    if report is None or report.converged is None or not speaks_for(report, uid, created):
        message = "its agent has not said anything yet: is ovsmesh-agent running on it?"
        return ObjectCondition("False", Reason.AgentNotReported, message)
    at = seconds(report.observed_at)
    if at is not None and now - at > SILENT:
        message = f"its agent was last heard at {report.observed_at}; what it has set up stays in place"
        return ObjectCondition("Unknown", Reason.AgentSilent, message)
    if report.converged.status == "True":
        return ObjectCondition("True", Reason.MeshConverged, "its part of the mesh is as wanted")
    return ObjectCondition("False", report.converged.reason or Reason.NotConverged, report.converged.message)


def count_converged(membership: Membership, nodes: Mapping[str, NodeView], reports: Mapping[str, AgentReport]) -> int:
    """Return how many members say of themselves that they are converged, silent ones included."""
    found = 0
    for member in membership.members:
        report, node = reports.get(member.name), nodes.get(member.name)
        if report is not None and report.converged is not None and report.converged.status == "True":
            found += speaks_for(report, member.uid, node.created if node else "")
    return found


class Wanted(NamedTuple):
    """What a Node's conditions should be; None leaves one as it is."""

    network: ObjectCondition | None
    ready: ObjectCondition | None


def judge(node: NodeView, membership: Membership, report: AgentReport | None, now: float, isolated: str = "") -> Wanted:
    """Return the conditions that follow from the node's own report, from its refusal, or from what others report.

    `isolated` says why it counts as cut off from most others; "" where it is not.

    | the node                               | NetworkUnavailable | MeshReady |
    |----------------------------------------|--------------------|-----------|
    | excluded by its label                  | as it is           | False where there was one |
    | refused                                | True               | False |
    | no report of its own yet               | True               | False |
    | cut off from most other nodes          | True               | False |
    | its agent says Converged               | False              | True |
    | its agent says not Converged           | True               | False |
    | its agent has been silent for 15 min   | as it is           | Unknown |
    """
    if node.excluded:
        left = ObjectCondition("False", Reason.Excluded, f"left out of the mesh by its label {EXCLUDE}")
        return Wanted(None, left if node.ready else None)
    problem = membership.problems.get(node.name)
    if problem is not None and problem.fatal:
        return _both(False, problem.reason, str(problem))
    said = agent_condition(report, node.uid, node.created, now)
    # what its own agent finds wrong says more; one that never reported is not there yet
    unheard = said.reason == Reason.AgentNotReported and node.ready and node.ready.reason != Reason.AgentNotReported
    if isolated and (said.status != "False" or unheard):
        return _both(False, Reason.Isolated, isolated)
    if said.status == "Unknown":
        return Wanted(None, said)
    if said.status == "True" and problem is not None:
        return _both(True, problem.reason, str(problem))
    return _both(said.status == "True", said.reason, said.message)


def _both(good: bool, reason: str, message: str) -> Wanted:
    message = message[:1024]
    return Wanted(
        ObjectCondition("False" if good else "True", reason, message),
        ObjectCondition("True" if good else "False", reason, message),
    )


def changes(node: NodeView, wanted: Wanted, now: float) -> list[dict[str, str]]:
    """Return the conditions to write, in the form of a Node's status; none if it says so already."""
    made = []
    for type_, have, want in ((NETWORK, node.network, wanted.network), (READY, node.ready, wanted.ready)):
        if want is None or (have is not None and have[:3] == want[:3]):
            continue
        same = have is not None and have.status == want.status
        since = have.since if same and have and have.since else timestamp(now)
        made.append({**_condition(type_, want, since), "lastHeartbeatTime": timestamp(now)})
    return made


def mesh_status(
    membership: Membership,
    converged: int,
    generation: int,
    more: Iterable[Problem],
    before: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    """Return the Mesh's status. `before` is what it is now, for the times of the conditions."""
    nodes = len(membership.members)
    problems = [
        *more,
        *membership.static_problems,
        *(membership.problems[name] for name in sorted(membership.problems)),
    ]
    if problems:
        degraded = ObjectCondition("True", problems[0].reason, listed(problems, _SHOWN, "; ")[:32000])
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
        made.append({**_condition(type_, want, since or timestamp(now)), "observedGeneration": generation})
    return {"nodes": nodes, "converged": converged, "observedGeneration": generation, "conditions": made}


def _condition(type_: str, want: ObjectCondition, since: str) -> dict[str, Any]:
    return {
        "type": type_,
        "status": want.status,
        "reason": want.reason,
        "message": want.message[:32000],
        "lastTransitionTime": since,
    }
