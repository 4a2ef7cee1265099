"""Who is a member of a mesh in Kubernetes: Nodes and static members in, mesh nodes and refusals out.

Of two that want one thing, the one keeps it that the slices hold with it already; else the older does:
creationTimestamp, then uid. A new static member counts as younger than any Node. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_address
from operator import attrgetter
from typing import Any, NamedTuple

from ovsmesh.errors import Problem
from ovsmesh.mesh.conflicts import add_text, keep_last_good, settle
from ovsmesh.mesh.types import IPAddress, Mesh, Node
from ovsmesh.mesh.validation import is_address, validate_node
from ovsmesh.names import GROUP
from ovsmesh.reasons import Reason

NODES = "/api/v1/nodes"
"""Path of the Nodes on an API server."""
ADDRESS = f"{GROUP}/tunnel-address"
"""Annotation on a Node: its tunnel address, where it is not its InternalIP."""
EXCLUDE = f"{GROUP}/exclude"
"""Label on a Node: "true" leaves it out of the mesh."""
TAINT = f"node.{GROUP}/agent-not-ready"
READY = f"{GROUP}/MeshReady"
NETWORK = "NetworkUnavailable"
_ZONE = "topology.kubernetes.io/zone"


class ObjectCondition(NamedTuple):
    """A condition in the status of an API object."""

    status: str
    reason: str
    message: str
    since: str = ""
    """lastTransitionTime, RFC 3339."""


class NodeView(NamedTuple):
    """The parts of a Node that the controller reads. Nothing in it changes with a heartbeat."""

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
    """Places of the startup taint in spec.taints."""
    network: ObjectCondition | None = None
    ready: ObjectCondition | None = None


MEMBERSHIP_FIELDS = 8
"""Only so many of the first fields of a NodeView decide about membership."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The members of the mesh, and what is wrong with those that are not."""

    members: tuple[Node, ...]
    """Sorted by name."""
    problems: Mapping[str, Problem]
    """Node → why it is left out; `fatal` is False if its last good entry stays."""
    static_problems: tuple[Problem, ...] = ()
    """Why static members are left out."""
    static: frozenset[str] = frozenset()
    """Names of the static members among `members`."""


def parse_condition(status: Mapping[str, Any], type_: str) -> ObjectCondition | None:
    """Return the condition of this type in the status of an API object; None if there is none."""
    for c in status.get("conditions") or ():
        if c.get("type") == type_:
            since = c.get("lastTransitionTime") or ""
            return ObjectCondition(c.get("status", ""), c.get("reason", ""), c.get("message", ""), since)
    return None


def parse_node(found: Mapping[str, Any]) -> NodeView:
    """Return a Node object as a NodeView."""
    meta, spec, status = found["metadata"], found.get("spec") or {}, found.get("status") or {}
    annotations, labels = meta.get("annotations") or {}, meta.get("labels") or {}
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
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
        parse_condition(status, NETWORK),
        parse_condition(status, READY),
    )


# ---------------------------------------------------------------- addresses


def _version(text: str) -> int:
    """Return 4 or 6 by the form alone, 0 for what can be neither. Whether it is an address is validated later."""
    return 6 if ":" in text else 4 if "." in text else 0


def family(nodes: Iterable[NodeView], static: Iterable[Node], held: Iterable[Node]) -> int:
    """Return the IP version of tunnel addresses where a Node has both.

    It is the one that most members use already, else the one that most Nodes have; IPv4 where they are equal.
    """
    now: list[int] = [node.address.version for node in held]
    if not now:
        now = [node.address.version for node in static]
        for view in nodes:
            now += [_version(view.asked)] if view.asked else {_version(text) for text in view.addresses}
    return 6 if now.count(6) > now.count(4) else 4


class _Addresses:
    """Which member has which address, and how many Nodes list it; filled as addresses are chosen."""

    def __init__(self, views: Collection[NodeView], members: Iterable[Node], clusters: tuple[str, ...]) -> None:
        self._clusters = clusters
        self._choice = any(len(view.addresses) > 1 for view in views)
        """Whether any Node has more than one: else nothing is noted, which takes most of the time."""
        self._taken = {node.address: node.uid for node in members} if self._choice else {}
        listed = (_parsed(text) for view in views for text in view.addresses) if self._choice else ()
        self._listed = Counter(filter(None, listed))

    def choose(self, view: NodeView, version: int) -> str | Problem:
        """Return the tunnel address of a Node: the one that it asks for, else one of its InternalIPs of this version.

        Its address of before comes first, then one that no other Node lists, then one that no other has; of equal
        ones the first. So no tunnel moves with a virtual address (kube-vip, keepalived), or with the order of a
        Node's addresses.
        """
        if view.asked:
            return view.asked
        own = [text for text in view.addresses if _version(text) == version]
        if own:
            return own[0] if len(own) == 1 else min(own, key=lambda text: self._rank(text, view.uid))
        if not view.addresses:
            message = "has no InternalIP: the kubelet has not told any yet, or its cloud provider has not; or annotate "
            return Problem(Reason.AddressMissing, f"{message}it with {ADDRESS}", view.name)
        message = f"has no IPv{version} InternalIP, which the other nodes use (only {', '.join(view.addresses)}): "
        return Problem(Reason.AddressMissing, f"{message}give it one, or annotate it with {ADDRESS}", view.name)

    def take(self, node: Node) -> None:
        """Enter the address of a member, unless another one has it."""
        if self._choice:
            self._taken.setdefault(node.address, node.uid)

    def _rank(self, text: str, uid: str) -> int:
        if is_address(text, self._clusters):
            address = ip_address(text)
            if address in self._taken:
                return 0 if self._taken[address] == uid else 3
            return 1 if self._listed[address] == 1 else 2
        return 4  # such as a link-local one


@lru_cache(maxsize=16384)
def _parsed(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


# ---------------------------------------------------------------- members

_Age = tuple[int, str, str]
_BY_NAME = attrgetter("name")
_NONE: Mapping[str, Problem] = {}
_FEW = 2
"""So many Nodes may all leave at once."""
_ADVICE = {
    Reason.DuplicateName: "rename one",
    Reason.AddressConflict: "give this node another",
    Reason.PodCIDRConflict: "make this node again with another (a Node's podCIDRs can't be changed)",
}


def membership_of(
    mesh: Mesh, nodes: Iterable[NodeView], held: Sequence[Node], unallocated: Mapping[str, Problem] = _NONE
) -> Membership:
    """Return who is in the mesh now.

    `mesh.nodes` are the static members. `held` is what the slices say now: a Node whose facts can't be used keeps
    its entry of there, if it is the same Node (uid) and nobody good wants any of it. `unallocated` says why Nodes
    have no pod CIDRs, where that is known. No Node at all never means that everyone has left.
    """
    nodes = list(nodes)
    gone = sum(bool(node.uid) for node in held)
    if not nodes and gone > _FEW:
        message = f"the API has no Node any more, while {gone} are in the mesh: slices are left as they are"
        others = frozenset(node.name for node in held if not node.uid)
        return Membership(tuple(sorted(held, key=_BY_NAME)), {}, (Problem(Reason.NodesVanished, message),), others)
    clusters = tuple(map(str, mesh.cluster_cidrs))
    views = {view.name: view for view in nodes if not view.excluded}
    before = {node.name: node for node in held}
    # what a Node of the same name had that is gone is free
    same = {name: node for name, node in before.items() if node.uid == (views[name].uid if name in views else "")}
    version = family(views.values(), mesh.nodes, held)
    addresses = _Addresses(views.values(), same.values(), clusters)
    ages: list[tuple[_Age, Node]] = []
    refused: dict[str, Problem] = {}
    for view in sorted(views.values(), key=attrgetter("created", "uid")):
        found = _validated(view, addresses.choose(view, version), clusters, unallocated)
        if isinstance(found, Node):
            ages.append(((1, view.created, view.uid), found))
            addresses.take(found)
        else:
            refused[view.name] = found
    for place, node in enumerate(mesh.nodes):
        ages.append(((0 if before.get(node.name) == node else 2, f"{place:06d}", ""), node))
    ages.sort(key=lambda item: item[0])
    wanted = [node for _, node in ages]
    good, conflicts = settle(wanted, same)
    if conflicts:
        # again from the outcome, so that the next pass, which finds it in the slices, says the same of the others
        good, conflicts = settle(wanted, {node.name: node for node in good})
    lost: list[Problem] = []
    static = {node.name for node in mesh.nodes}
    for conflict in conflicts:
        older = ages[conflict.winner][0] < ages[conflict.loser][0]
        why = "which is older" if older else "which has it"
        problem = add_text(conflict.problem, f", {why}: {_ADVICE[conflict.problem.reason]}")
        if ages[conflict.loser][0][0] == 1:
            refused[problem.node] = problem
        else:
            lost.append(add_text(problem, "; this static member is left out"))
            static.discard(problem.node)
    good, problems = _keep(good, refused, before, views, clusters)
    return Membership(tuple(sorted(good, key=_BY_NAME)), problems, tuple(lost), frozenset(static))


def _validated(
    view: NodeView, address: str | Problem, clusters: tuple[str, ...], unallocated: Mapping[str, Problem]
) -> Node | Problem:
    if not view.pod_cidrs:
        if view.name in unallocated:
            return unallocated[view.name]
        message = "has no spec.podCIDRs: let kube-controller-manager assign them (--allocate-node-cidrs), "
        return Problem(Reason.PodCIDRMissing, f"{message}or set allocatePodCIDRs in the Mesh", view.name)
    if isinstance(address, Problem):
        return address
    zone = view.zone if len(view.zone) <= 253 else ""
    found = validate_node(view.name, address, view.pod_cidrs, view.uid, zone, clusters)
    if isinstance(found, Problem) and found.field == "address" and view.asked:
        # said where the user wrote it
        return add_text(found, f" (annotation {ADDRESS})")
    return found


def _keep(
    good: list[Node],
    refused: Mapping[str, Problem],
    before: Mapping[str, Node],
    views: Mapping[str, NodeView],
    clusters: tuple[str, ...],
) -> tuple[list[Node], dict[str, Problem]]:
    """Add to `good` the last good entries of Nodes that are refused."""
    again = [before[name] for name in refused if name in before and before[name].uid == views[name].uid]
    kept = keep_last_good(good, again, clusters) if again else []
    names = {node.name for node in kept}
    problems: dict[str, Problem] = {}
    for name, problem in sorted(refused.items()):
        if name in names:
            problems[name] = replace(add_text(problem, "; keeping its last good entry"), fatal=False)
        else:
            problems[name] = add_text(problem, "; the node is left out of the mesh")
    return good + kept, problems
