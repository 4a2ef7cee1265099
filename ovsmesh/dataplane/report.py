"""The report of one node: what CLI, status page, metrics and MeshNode show, from what is wanted and what is there.

Pure: the time comes as an argument. Imports model, mesh, conflist and plan only. The text puts what is worst first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ovsmesh.dataplane import cni_config, desired
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.types import KBR, PEER_KINDS, Dataplane, Facts, Observed, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.reasons import Reason

_SHOWN = 8
"""Lines about one thing before the text says "and N more"; the table and JSON hold all."""


class Traffic(NamedTuple):
    """What a tunnel port has counted since it was made: packets, bytes, packets dropped or broken."""

    rx_packets: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """What only the process that asks can tell. Times are seconds since the epoch; None: not known."""

    now: float
    agent_since: float | None = None
    """Since when an agent runs here; None when none does."""
    agent_version: str = ""
    ovs_version: str = ""
    mesh_from: str = ""
    """The file or the API that the mesh came from."""
    mesh_since: float | None = None
    """When the mesh in use was read, or written to disk where it is the last known good."""
    mesh_current: bool = True
    """False: the source can't be read now, and the last known good is used."""
    last_change: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when a part of it was changed last, and how."""


@dataclass(frozen=True, slots=True)
class Condition:
    """In the manner of Kubernetes: `status` is "True", "False" or "Unknown"; `reason` CamelCase."""

    type: str
    status: str
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True)
class Self:
    """The node itself."""

    name: str
    address: str = ""
    pod_cidrs: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    encapsulation: str = ""
    key: int | None = None
    mtu: int = 0
    mtu_from: str = ""
    datapath_type: str = ""
    cni: cni_config.ConflistStatus | None = None
    ovs_version: str = ""
    agent_running: bool = False
    agent_since: float | None = None
    agent_version: str = ""
    mesh_from: str = ""
    mesh_since: float | None = None
    mesh_current: bool = True
    docker: str = ""
    """Where Docker's containers are plugged in; "" where there is no Docker, or it is left alone."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer as this node is wired to it. `missing` says which parts are not as wanted, and why."""

    name: str
    state: str
    """"ok", "missing", "held" (left the mesh, removal held), "refused" or "unknown" (can't be observed now)."""
    address: str = ""
    pod_cidrs: tuple[str, ...] = ()
    port: str = ""
    traffic: Traffic | None = None
    last_change: float | None = None
    last_change_text: str = ""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a user may want to know of one node, at one moment."""

    time: float
    headline: str
    converged: bool
    self: Self
    conditions: tuple[Condition, ...]
    peers: tuple[Peer, ...]
    pending: tuple[str, ...]
    """The plan's lines: what is still to be done, is blocked or is held."""
    unmanaged: tuple[str, ...]
    problems: tuple[Problem, ...]

    def count(self, state: str) -> int:
        """How many peers are in a state; "wanted" counts all that the mesh rightly names."""
        if state == "wanted":
            return sum(peer.state not in ("held", "refused") for peer in self.peers)
        return sum(peer.state == state for peer in self.peers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and YAML: names in camelCase, times as RFC 3339, nothing that is not set."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join("CIDRs" if word == "cidrs" else word.title() for word in rest)


_JSON_NAMES = {"unmanaged": "foreign"}
"""Field → its key in JSON, where it has had another name since the first release."""
_TIMES = frozenset({"time", "agent_since", "mesh_since", "last_change"})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        pairs = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Traffic):
        pairs = list(value._asdict().items())
    elif isinstance(value, tuple):
        return [_plain(item) for item in value]
    else:
        # YAML takes no subclass of str
        return str(value) if isinstance(value, str) else value
    return {
        _JSON_NAMES.get(name, _camel(name)): timestamp(item) if name in _TIMES and item is not None else _plain(item)
        for name, item in pairs
        if item is not None and item != ""
    }


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(seconds: float) -> str:
    """A duration in two units at most, as kubectl shows it: 45s, 3m5s, 2h10m, 5d."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m{left % 60}s"
    if left < 86400:
        return f"{left // 3600}h{left % 3600 // 60}m"
    return f"{left // 86400}d"


# From the parts to the report


def _part_lines(
    kind: str, wanted: Mapping[Any, Any], have: Observed, unmanaged: Mapping[Any, Unmanaged]
) -> Iterator[str]:
    found = getattr(have.dataplane, kind)
    if wanted.items() <= found.items():
        return
    for key, value in wanted.items():
        old = found.get(key)
        if old == value:
            continue
        line = str(Step("+" if old is None else "~", kind, key, value, old))[2:]
        # an unmanaged route to the same destination counts whatever its metric is
        hit = unmanaged.get((kind, key)) or (unmanaged.get((kind, key[0])) if kind == "routes" else None)
        yield f"{line} {'missing' if old is None else 'differs'}{f': {hit.detail}' if hit else ''}"


def _unobserved(have: Observed) -> str:
    why = next((p.message for p in have.problems if p.fatal), "")
    return f"{', '.join(sorted(have.unknown & set(PEER_KINDS)))} can't be observed{': ' + why if why else ''}"


def _peer(
    node: Node, parts: Dataplane, have: Observed, unmanaged: Mapping[Any, Unmanaged]
) -> tuple[str, tuple[str, ...]]:
    lines = [
        line
        for kind in PEER_KINDS
        if kind not in have.unknown
        for line in _part_lines(kind, getattr(parts, kind), have, unmanaged)
    ]
    if lines:
        return "missing", tuple(lines)
    return ("unknown", (_unobserved(have),)) if have.unknown & set(PEER_KINDS) else ("ok", ())


def _peers(
    mesh: Mesh,
    self_name: str,
    parts: Mapping[str, Dataplane],
    have: Observed,
    plan: Plan,
    problems: Iterable[Problem],
    traffic: Mapping[str, Traffic],
    context: Context,
) -> Iterator[Peer]:
    unmanaged = {(f.kind, f.key): f for f in have.unmanaged if f.blocks}
    whys: dict[str, list[str]] = {}
    for problem in problems:
        whys.setdefault(problem.node, []).append(str(problem).removeprefix(f"node {problem.node}: "))
    for node in mesh.nodes:
        if node.name == self_name:
            continue
        cidrs = tuple(map(str, node.pod_cidrs))
        when, how = context.last_change.get(node.name, (None, ""))
        part = parts.get(node.name)
        if part is None:
            why = tuple(whys.pop(node.name, ["it can't be joined"]))
            yield Peer(node.name, "refused", str(node.address), cidrs, missing=why)
            continue
        state, missing = _peer(node, part, have, unmanaged)
        port = next(iter(part.ports), "")
        yield Peer(node.name, state, str(node.address), cidrs, port, traffic.get(port), when, how, missing)
    for name in plan.held_peers:
        for port, row in have.dataplane.ports.items():
            if row.node == name:
                when, how = context.last_change.get(name, (None, ""))
                why = ("left the mesh; its removal is held",)
                yield Peer(name, "held", row.remote, (), port, traffic.get(port), when, how, why)


def _mtu_from(mesh: Mesh, me: Node, facts: Facts, mtu: int) -> str:
    extra = desired.overhead(mesh, me.address)
    if mesh.mtu is not None and mtu == mesh.mtu:
        return "set in the mesh"
    underlay = facts.underlay_mtu
    return f"underlay {underlay or mtu + extra}{'' if underlay else ' assumed'} − {extra} of {mesh.encapsulation}"


def _self(
    name: str, mesh: Mesh | None, facts: Facts | None, want: Dataplane | None, have: Observed, context: Context
) -> Self:
    about = {
        "docker": have.docker,
        "ovs_version": context.ovs_version,
        "agent_running": context.agent_since is not None,
        "agent_since": context.agent_since,
        "agent_version": context.agent_version,
        "mesh_from": context.mesh_from,
        "mesh_since": context.mesh_since,
        "mesh_current": context.mesh_current,
    }
    me = mesh.node(name) if mesh else None
    if mesh is None or me is None or facts is None:
        return Self(name, **about)  # type: ignore[arg-type]
    mtu = want.links[KBR].mtu if want and KBR in want.links else desired.pod_mtu(mesh, me, facts)
    return Self(
        name,
        str(me.address),
        tuple(map(str, me.pod_cidrs)),
        tuple(str(desired.gateway(cidr)) for cidr in me.pod_cidrs),
        mesh.encapsulation,
        mesh.key,
        mtu,
        _mtu_from(mesh, me, facts, mtu),
        facts.datapath_type,
        cni_config.conflist_status(facts.cni, want.cni, have.dataplane.cni) if facts.cni and want else None,
        **about,  # type: ignore[arg-type]
    )


def _conditions(
    mesh: Mesh | None,
    plan: Plan,
    peers: tuple[Peer, ...],
    problems: tuple[Problem, ...],
    converged: bool,
    r: Context,
) -> Iterator[Condition]:
    bad = [peer for peer in peers if peer.state in ("missing", "unknown", "refused")]
    fatal = [problem for problem in problems if problem.fatal]
    if mesh is None:
        yield Condition("Converged", "Unknown", Reason.NoMesh, "no mesh was read yet, so nothing is touched")
    elif converged:
        yield Condition("Converged", "True", Reason.AsWanted)
    else:
        reason = (
            Reason.Blocked if plan.blocked else Reason.RemovalHeld if plan.held and not plan.steps else Reason.Pending
        )
        text = f"{len(plan.steps)} changes to do, {len(plan.blocked)} blocked, {len(plan.held)} held"
        yield Condition("Converged", "False", reason, text)
    reasons = (
        [problem.reason for problem in fatal]
        + [Reason.PeersMissing] * bool(bad)
        + [Reason.Blocked] * bool(plan.blocked)
    )
    if reasons:
        text = ", ".join(dict.fromkeys(reasons))
        yield Condition("Degraded", "True", reasons[0], text)
    else:
        yield Condition("Degraded", "False", Reason.AsWanted)
    if plan.held:
        names = ", ".join(plan.held_peers[:_SHOWN]) + (" …" if len(plan.held_peers) > _SHOWN else "")
        yield Condition("RemovalHeld", "True", Reason.MassRemovalHeld, f"{len(plan.held_peers)} peers: {names}")
    if mesh is not None:
        old = f", {age(r.now - r.mesh_since)} old" if r.mesh_since is not None else ""
        if r.mesh_current:
            yield Condition("MeshCurrent", "True", Reason.Read, f"from {r.mesh_from}" if r.mesh_from else "")
        else:
            yield Condition("MeshCurrent", "False", Reason.LastKnownGood, f"the last known good mesh{old} is in use")


def _headline(name: str, mesh: Mesh | None, plan: Plan, peers: tuple[Peer, ...], degraded: bool, ok: bool) -> str:
    if mesh is None:
        return f"{name} waits for a mesh: nothing was read yet, so nothing is touched"
    wanted = [peer for peer in peers if peer.state != "held"]
    bad = sum(peer.state != "ok" for peer in wanted)
    if bad:
        return f"{name} is degraded: {bad} of {len(wanted)} peers not converged"
    if plan.blocked or (degraded and not ok):
        what = f"{len(plan.blocked)} parts blocked" if plan.blocked else "see below"
        return f"{name} is degraded: {what}"
    if plan.held:
        return f"{name} holds back the removal of {len(plan.held_peers)} peers"
    if plan.steps:
        return f"{name} is not converged: {len(plan.steps)} changes to do"
    return f"{name} is {'converged, with problems' if degraded else 'converged'}: all {len(wanted)} peers ok"


def unmanaged_beside(have: Observed, todo: Plan) -> tuple[Problem, ...]:
    """Return a problem for each unmanaged object that blocks nothing: it is named all the same."""
    told = {blocked.unmanaged for blocked in todo.blocked}
    return tuple(Problem(Reason.Foreign, f.detail) for f in have.unmanaged if f not in told)


def report(
    mesh: Mesh | None,
    self_name: str,
    facts: Facts | None,
    want: Dataplane | None,
    have: Observed | None,
    plan: Plan,
    problems: tuple[Problem, ...],
    converged: bool,
    traffic: Mapping[str, Traffic],
    context: Context,
) -> Report:
    """Return the report of one reconcile, or of one look at the system.

    A node of the mesh that can't be joined counts as refused, for the reason that `problems` gives.
    `traffic` is keyed by port.
    """
    have = have or Observed(Dataplane())
    peers: tuple[Peer, ...] = ()
    me = mesh.node(self_name) if mesh else None
    if mesh is not None:
        parts: Mapping[str, Dataplane] = {}
        if me is not None and facts is not None:
            parts, _ = desired.peers(mesh, me, desired.wiring(mesh, me, facts))
        # parts that this system can't have are missed by nobody
        able = want is None or bool(want.filter_peers) or not parts
        parts = parts if able else {n: _without_filter(p) for n, p in parts.items()}
        peers = tuple(_peers(mesh, self_name, parts, have, plan, problems, traffic, context))
    conditions = tuple(_conditions(mesh, plan, peers, problems, converged, context))
    degraded = any(c.type == "Degraded" and c.status == "True" for c in conditions)
    return Report(
        context.now,
        _headline(self_name, mesh, plan, peers, degraded, converged),
        converged,
        _self(self_name, mesh, facts, want, have, context),
        conditions,
        peers,
        tuple(plan.lines()),
        tuple(f.detail for f in have.unmanaged),
        problems,
    )


def _without_filter(parts: Dataplane) -> Dataplane:
    return Dataplane(**{kind: getattr(parts, kind) for kind in PEER_KINDS if kind != "filter_peers"})
