"""Knows who is a member of a mesh in Kubernetes: Nodes and static members in, entries and refusals out.

Of two that claim one thing the older keeps it: creationTimestamp, then uid. A static member that the slices
hold already counts as older than any Node, a new one as younger. Pure: imports model, claims and slices only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ovsmesh.errors import Problem
from ovsmesh.mesh.meshslice import Entry
from ovsmesh.mesh.types import Mesh
from ovsmesh.mesh.validation import Claim, Refusal, claim
from ovsmesh.reasons import Reason

ADDRESS = "ovsmesh.io/tunnel-address"
"""Annotation on a Node: its tunnel address, where it is not its InternalIP."""
EXCLUDE = "ovsmesh.io/exclude"
"""Label on a Node: "true" leaves it out of the mesh."""
TAINT = "node.ovsmesh.io/agent-not-ready"
READY = "ovsmesh.io/MeshReady"
NETWORK = "NetworkUnavailable"
_ZONE = "topology.kubernetes.io/zone"


class ObjectCondition(NamedTuple):
    status: str
    reason: str
    message: str
    since: str = ""
    """lastTransitionTime, RFC 3339."""


class NodeView(NamedTuple):
    """What the controller needs of a Node. Nothing in it changes with a heartbeat."""

    name: str
    uid: str
    created: str
    """RFC 3339 in UTC, so that texts compare as times do."""
    addresses: tuple[str, ...]
    """InternalIPs, in the Node's order."""
    asked: str
    """The annotation's address; "" for none."""
    excluded: bool
    pod_cidrs: tuple[str, ...]
    zone: str = ""
    taints: tuple[int, ...] = ()
    """Places of our startup taint in spec.taints."""
    network: ObjectCondition | None = None
    ready: ObjectCondition | None = None


MEMBERSHIP_FIELDS = 8
"""The first so many fields of a NodeView decide about membership."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The members, sorted by name; and what is wrong, by node (Nodes) and for the Mesh (static members)."""

    entries: tuple[Entry, ...]
    problems: Mapping[str, Problem]
    """Node → why it is left out; `fatal` False where its last good entry stays."""
    static: tuple[Problem, ...] = ()
    statics: frozenset[str] = frozenset()
    """Names of the static members among `entries`."""


def parse_node(node: Mapping[str, Any]) -> NodeView:
    """A Node object as a NodeView."""
    meta, spec, status = node["metadata"], node.get("spec") or {}, node.get("status") or {}
    annotations, labels = meta.get("annotations") or {}, meta.get("labels") or {}
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    conditions = {
        c["type"]: ObjectCondition(
            c.get("status", ""), c.get("reason", ""), c.get("message", ""), c.get("lastTransitionTime") or ""
        )
        for c in status.get("conditions") or ()
        if c.get("type") in (NETWORK, READY)
    }
    return NodeView(
        meta["name"],
        meta.get("uid", ""),
        meta.get("creationTimestamp") or "",
        tuple(a["address"] for a in status.get("addresses") or () if a.get("type") == "InternalIP"),
        annotations.get(ADDRESS, "").strip(),
        labels.get(EXCLUDE) == "true",
        tuple(cidrs),
        labels.get(_ZONE, ""),
        tuple(place for place, taint in enumerate(spec.get("taints") or ()) if taint.get("key") == TAINT),
        conditions.get(NETWORK),
        conditions.get(READY),
    )


# ---------------------------------------------------------------- addresses


def _version(text: str) -> int:
    """4 or 6 by its form alone, 0 for what can be neither: whether it is an address is for claim() to say."""
    return 6 if ":" in text else 4 if "." in text else 0


def family(nodes: Iterable[NodeView], mesh: Mesh, held: Iterable[Entry]) -> int:
    """The IP version of tunnel addresses where a Node has both: the one that most members use already, else the
    one that most Nodes have; IPv4 where they are equal."""
    now = [_version(entry.address) for entry in held]
    if not any(now):
        now = [node.address.version for node in mesh.nodes]
        for node in nodes:
            if node.excluded:
                continue
            now += [_version(node.asked)] if node.asked else {_version(text) for text in node.addresses}
    return 6 if now.count(6) > now.count(4) else 4


def _address(node: NodeView, version: int) -> str:
    """Raises Refusal."""
    if node.asked:
        return node.asked
    for text in node.addresses:
        if _version(text) == version:
            return text
    if not node.addresses:
        hint = "the kubelet has not told any yet, or its cloud provider has not"
        raise Refusal(
            Reason.AddressMissing, node.name, "", "", f"has no InternalIP: {hint}; or annotate it with {ADDRESS}"
        )
    message = f"has no IPv{version} InternalIP, which the other nodes use (only {', '.join(node.addresses)}): "
    raise Refusal(Reason.AddressMissing, node.name, "", "", f"{message}give it one, or annotate it with {ADDRESS}")


# ---------------------------------------------------------------- claims


class _Held:
    """Who holds what. Ranges in it never overlap, so only the nearest can be met."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._addresses: dict[str, str] = {}
        self._ranges: list[tuple[int, int, int, str, str]] = []

    def clash(self, who: Claim) -> Refusal | None:
        """The first thing of `who` that another holds, as a Refusal."""
        name = who.node.name
        if name in self.names:
            message = "is the name of another member too, which is older: rename one"
            return Refusal(Reason.DuplicateName, name, "name", name, message)
        if holder := self._addresses.get(who.address):
            message = f"is the address of node {holder} too, which is older: give this node another"
            return Refusal(Reason.AddressConflict, name, "address", who.address, message)
        for number, (version, first, last) in enumerate(who.ranges):
            at = bisect_left(self._ranges, (version, last + 1)) - 1
            if at >= 0 and self._ranges[at][0] == version and self._ranges[at][2] >= first:
                _, _, _, holder, cidr = self._ranges[at]
                mine = str(who.node.pod_cidrs[number])
                same = "is the range" if cidr == mine else f"overlaps {cidr}"
                message = f"{same} of node {holder}{' too' if cidr == mine else ''}, which is older: "
                message += "make this node again with another (a Node's podCIDRs can't be changed)"
                return Refusal(Reason.PodCIDRConflict, name, f"podCIDRs[{number}]", mine, message)
        return None

    def add(self, who: Claim) -> None:
        name = who.node.name
        self.names.add(name)
        self._addresses[who.address] = name
        for (version, first, last), cidr in zip(who.ranges, who.node.pod_cidrs, strict=True):
            insort(self._ranges, (version, first, last, name, str(cidr)))


class _Member(NamedTuple):
    claim: Claim
    entry: Entry


@lru_cache(maxsize=32768)
def _member(
    name: str, address: str, cidrs: tuple[str, ...], uid: str, zone: str, clusters: tuple[str, ...]
) -> _Member | Refusal:
    """claim(), with the entry that it makes; remembered as that is."""
    found = claim(name, address, cidrs, uid, zone, clusters)
    if isinstance(found, Refusal):
        return found
    node = found.node
    return _Member(found, Entry(node.name, node.uid, found.address, tuple(map(str, node.pod_cidrs)), node.zone))


_Age = tuple[int, str, str]


def membership_of(
    mesh: Mesh, clusters: tuple[str, ...], nodes: Iterable[NodeView], held: Sequence[Entry]
) -> Membership:
    """Who is in the mesh now.

    `mesh.nodes` are the static members; `clusters` are the texts of its cluster CIDRs; `held` is what the
    slices say now: a Node whose facts can't be used keeps its entry of there, if it is the same Node (uid)
    and nobody good claims any of it.
    """
    nodes = [node for node in nodes if not node.excluded]
    before = {entry.name: entry for entry in held}
    version = family(nodes, mesh, held)
    found: list[tuple[_Age, _Member]] = []
    refused: dict[str, Refusal] = {}
    for node in nodes:
        good = _claim(node, version, clusters)
        if isinstance(good, _Member):
            found.append(((1, node.created, node.uid), good))
        else:
            refused[node.name] = good
    statics: set[str] = set()
    for place, member in enumerate(mesh.nodes):
        cidrs = tuple(map(str, member.pod_cidrs))
        mine = _member(member.name, str(member.address), cidrs, member.uid, member.zone, clusters)
        if isinstance(mine, _Member):
            there = before.get(member.name) == mine.entry
            found.append(((0 if there else 2, f"{place:06d}", ""), mine))
            statics.add(member.name)
    found.sort(key=lambda item: item[0])
    members: dict[str, Entry] = {}
    lost: list[Problem] = []
    taken = _Held()
    for age, who in found:
        clash = taken.clash(who.claim)
        if clash is None:
            taken.add(who.claim)
            members[who.entry.name] = who.entry
        elif age[0] == 1:
            refused[who.entry.name] = clash
        else:
            lost.append(clash.problem("; this static member is left out"))
            statics.discard(who.entry.name)
    uids = {node.name: node.uid for node in nodes}
    problems = _keep(refused, members, taken, before, uids, clusters)
    entries = tuple(members[name] for name in sorted(members))
    return Membership(entries, problems, tuple(lost), frozenset(statics))


def _claim(node: NodeView, version: int, clusters: tuple[str, ...]) -> _Member | Refusal:
    if not node.pod_cidrs:
        message = "has no spec.podCIDRs: let kube-controller-manager assign them (--allocate-node-cidrs), "
        return Refusal(Reason.PodCIDRMissing, node.name, "", "", f"{message}or set allocatePodCIDRs in the Mesh")
    try:
        address = _address(node, version)
    except Refusal as refusal:
        return refusal
    zone = node.zone if len(node.zone) <= 253 else ""
    found = _member(node.name, address, node.pod_cidrs, node.uid, zone, clusters)
    if isinstance(found, Refusal) and found.field == "address" and node.asked:
        # said where the user wrote it
        message = f"{found.message} (annotation {ADDRESS})"
        return Refusal(found.reason, node.name, found.field, found.value, message)
    return found


def _keep(
    refused: Mapping[str, Refusal],
    members: dict[str, Entry],
    taken: _Held,
    before: Mapping[str, Entry],
    uids: Mapping[str, str],
    clusters: tuple[str, ...],
) -> dict[str, Problem]:
    """Adds to `members` the last good entries of those refused for what they say of themselves."""
    problems: dict[str, Problem] = {}
    for name, refusal in sorted(refused.items()):
        problem = refusal.problem("; the node is left out of the mesh")
        old = before.get(name)
        conflict = refusal.reason in (Reason.DuplicateName, Reason.AddressConflict, Reason.PodCIDRConflict)
        if old is not None and old.uid == uids[name] and not conflict:
            again = _member(name, old.address, old.pod_cidrs, old.uid, old.zone, clusters)
            if isinstance(again, _Member) and taken.clash(again.claim) is None:
                taken.add(again.claim)
                members[name] = again.entry
                kept = refusal.problem("; keeping its last good entry")
                problem = Problem(kept.reason, kept.message, name, kept.field, kept.value, fatal=False)
        problems[name] = problem
    return problems
