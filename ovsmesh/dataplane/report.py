"""Compute the report of one node, which CLI, status page, metrics and MeshNode show, from desired and observed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ovsmesh.dataplane import cni_config, desired
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.types import KBR, PEER_KINDS, Dataplane, Facts, Observed, Reach, State, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.manifest import digest
from ovsmesh.mesh.types import Mesh, Node, gateway
from ovsmesh.names import ENCAPSULATIONS
from ovsmesh.reasons import Reason
from ovsmesh.text import counted, listed

NOT_REACHED = frozenset({State.UNREACHABLE, State.NOT_FORWARDED, State.LOSSY, State.SMALL})
"""States of a peer that is wired as wanted, and to which packets are lost all the same."""


class Traffic(NamedTuple):
    """What a port has counted since it was made; None: not known. `errors` includes dropped packets."""

    rx_packets: int | None = None
    tx_packets: int | None = None
    rx_bytes: int | None = None
    tx_bytes: int | None = None
    errors: int | None = None


@dataclass(frozen=True, slots=True)
class ReportContext:
    """What only the process that asks knows. Times are seconds since the epoch; None: not known."""

    now: float
    agent_since: float | None = None
    """When the agent on this host was started; None when none runs."""
    agent_version: str = ""
    ovs_version: str = ""
    mesh_from: str = ""
    """The file or the API server that the mesh came from."""
    mesh_since: float | None = None
    """When the mesh in use was read, or, for the last known good one, when it was stored."""
    mesh_current: bool = True
    """False: its source can't be used now, and the last known good mesh is in use."""
    last_change: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when and how a part of it was changed last."""
    reach: Mapping[str, Reach] | None = None
    """Peer → what the probes found; None where nobody probes, so the report tells of the wiring alone."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition as in Kubernetes: `status` is "True", "False" or "Unknown"."""

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
    mesh_digest: str = ""
    """See manifest.digest: hosts with the same mesh have the same."""
    docker: str = ""
    """Where Docker's containers are plugged in; "" where there is no Docker, or it is left alone."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer as this node is wired to it."""

    name: str
    state: str
    """"ok", "missing", "held" (left the mesh, removal held), "refused" or "unknown" (can't be observed now).

    Where the wiring is in place and the peer is probed: what the probes found, see reach.State.
    """
    address: str = ""
    pod_cidrs: tuple[str, ...] = ()
    port: str = ""
    traffic: Traffic | None = None
    last_change: float | None = None
    last_change_text: str = ""
    missing: tuple[str, ...] = ()
    """Which parts are not as wanted, and why; or why packets do not get through."""
    reach: Reach | None = None


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

    @property
    def well(self) -> bool:
        """Whether the node is in sync, an agent keeps it so, and packets get through to every peer."""
        return self.converged and self.self.agent_running and all(peer.state == "ok" for peer in self.peers)

    def count(self, state: str) -> int:
        """Return how many peers are in a state; "wanted" counts all but the held and the refused."""
        if state == "wanted":
            return sum(peer.state not in ("held", "refused") for peer in self.peers)
        return sum(peer.state == state for peer in self.peers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON and YAML: names in camelCase, times as RFC 3339, nothing that is not set."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join("CIDRs" if word == "cidrs" else word.title() for word in rest)


_JSON_NAMES = {"unmanaged": "foreign"}
"""Field → its key in JSON, where it has had another name since the first release."""
_TIMES = frozenset({"time", "agent_since", "mesh_since", "last_change", "since", "silent_since"})


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
    """Return a time as RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(seconds: float) -> str:
    """Return a duration in two units at most, as kubectl shows it: 45s, 3m5s, 2h10m, 5d."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m{left % 60}s"
    if left < 86400:
        return f"{left // 3600}h{left % 3600 // 60}m"
    return f"{left // 86400}d"


_CARRIED_BY = dict(
    zip(ENCAPSULATIONS, ("GRE (IP protocol 47)", "VXLAN (UDP port 4789)", "Geneve (UDP port 6081)"), strict=True)
)


def cause(reach: Reach, mtu: int, encapsulation: str, own: str, peer: str) -> str:
    """Return the likely cause of what the probes found, and what to look at; "" where all is well or nothing is known.

    `mtu` is the pods' MTU in bytes; `own` and `peer` are the two tunnel addresses.
    """
    if reach.state is State.UNREACHABLE:
        if reach.error:
            return f"probes to {reach.destination} can't be sent: {reach.error}"
        carried = _CARRIED_BY[encapsulation]
        if reach.heard:
            return f"its packets arrive here, and ours are not answered: is {carried} blocked from {own} to {peer}?"
        return f"nothing arrives from it: is the host down, or {carried} blocked between {own} and {peer}?"
    if reach.state is State.NOT_FORWARDED:
        return (
            "it answers, but forwards no packets to its pods and back: a firewall rule or policy there drops them "
            "(FORWARD), or ip_forward is 0 there"
        )
    if reach.state is State.SMALL:
        return (
            f"packets above {reach.path_mtu} bytes are lost, and pods send up to {mtu}: "
            f"raise the MTU between {own} and {peer}, or set the mesh's `mtu` to {reach.path_mtu}"
        )
    if reach.state is State.LOSSY:
        return f"{reach.loss or 0:.0%} of the probes are lost between {own} and {peer}"
    return ""


# From the parts to the report


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
    context: ReportContext,
) -> Report:
    """Return the report of one reconcile, or of one look at the system.

    A node of the mesh that can't be joined counts as refused, for the reason that `problems` gives.
    `traffic` is keyed by port.
    """
    have = have or Observed(Dataplane())
    # no peer misses an entry of sets that this host's packet filter can't have
    kinds = [kind for kind in PEER_KINDS if kind != "filter_peers" or want is None or want.filter_peers]
    peers: tuple[Peer, ...] = ()
    if mesh is not None:
        me = mesh.node(self_name)
        joined = desired.peers(mesh, me, desired.wiring(mesh, me, facts))[0] if me and facts else {}
        mtu = desired.pod_mtu(mesh, me, facts) if me and facts else 0
        peers = (
            *_peers(mesh, self_name, joined, mtu, have, kinds, problems, traffic, context),
            *_held(plan, have, traffic, context),
        )
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
        tuple(u.detail for u in have.unmanaged),
        problems,
    )


def unmanaged_beside(have: Observed, plan: Plan) -> tuple[Problem, ...]:
    """Return a problem for each unmanaged object that blocks nothing: it is named all the same."""
    blocking = {blocked.unmanaged for blocked in plan.blocked}
    return tuple(Problem(Reason.Foreign, u.detail) for u in have.unmanaged if u not in blocking)


def _differences(
    parts: Dataplane, have: Dataplane, kinds: Iterable[str], unmanaged: Mapping[Any, Unmanaged]
) -> Iterator[str]:
    """Yield a line for each part of a peer that is not as wanted."""
    for kind in kinds:
        wanted, found = getattr(parts, kind), getattr(have, kind)
        if wanted.items() <= found.items():
            continue
        for key, value in wanted.items():
            old = found.get(key)
            if old == value:
                continue
            line = str(Step("+" if old is None else "~", kind, key, value, old))[2:]
            # an unmanaged route to the same destination conflicts whatever its metric is
            hit = unmanaged.get((kind, key)) or (unmanaged.get((kind, key[0])) if kind == "routes" else None)
            yield f"{line} {'missing' if old is None else 'differs'}{f': {hit.detail}' if hit else ''}"


def _peers(
    mesh: Mesh,
    self_name: str,
    joined: Mapping[str, Dataplane],
    mtu: int,
    have: Observed,
    kinds: list[str],
    problems: Iterable[Problem],
    traffic: Mapping[str, Traffic],
    context: ReportContext,
) -> Iterator[Peer]:
    unmanaged = {(u.kind, u.key): u for u in have.unmanaged if u.blocks}
    me = mesh.node(self_name)
    own = str(me.address) if me else ""
    known = [kind for kind in kinds if kind not in have.unknown]
    unknown = sorted(have.unknown & set(PEER_KINDS))
    why_unknown = next((f": {p.message}" for p in have.problems if p.fatal), "")
    reasons: dict[str, list[str]] = {}
    for problem in problems:
        reasons.setdefault(problem.node, []).append(str(problem).removeprefix(f"node {problem.node}: "))
    for node in mesh.nodes:
        if node.name == self_name:
            continue
        address, cidrs = str(node.address), tuple(map(str, node.pod_cidrs))
        parts = joined.get(node.name)
        if parts is None:
            why = tuple(reasons.get(node.name, ["it can't be joined"]))
            yield Peer(node.name, "refused", address, cidrs, missing=why)
            continue
        state, missing = "ok", tuple(_differences(parts, have.dataplane, known, unmanaged))
        if missing:
            state = "missing"
        elif unknown:
            state, missing = "unknown", (f"{', '.join(unknown)} can't be observed{why_unknown}",)
        reach = None if context.reach is None else context.reach.get(node.name, Reach())
        if reach is not None and state == "ok":
            state, why_not = str(reach.state), cause(reach, mtu, mesh.encapsulation, own, address)
            missing = (why_not,) if why_not else ()
        port = next(iter(parts.ports), "")
        when, how = context.last_change.get(node.name, (None, ""))
        yield Peer(node.name, state, address, cidrs, port, traffic.get(port), when, how, missing, reach)


def _held(plan: Plan, have: Observed, traffic: Mapping[str, Traffic], context: ReportContext) -> Iterator[Peer]:
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
    name: str, mesh: Mesh | None, facts: Facts | None, want: Dataplane | None, have: Observed, context: ReportContext
) -> Self:
    found = Self(
        name,
        docker=have.docker,
        ovs_version=context.ovs_version,
        agent_running=context.agent_since is not None,
        agent_since=context.agent_since,
        agent_version=context.agent_version,
        mesh_from=context.mesh_from,
        mesh_since=context.mesh_since,
        mesh_current=context.mesh_current,
        mesh_digest=digest(mesh) if mesh else "",
    )
    me = mesh.node(name) if mesh else None
    if mesh is None or me is None or facts is None:
        return found
    mtu = want.links[KBR].mtu if want and KBR in want.links else desired.pod_mtu(mesh, me, facts)
    return replace(
        found,
        address=str(me.address),
        pod_cidrs=tuple(map(str, me.pod_cidrs)),
        gateways=tuple(str(gateway(cidr)) for cidr in me.pod_cidrs),
        encapsulation=mesh.encapsulation,
        key=mesh.key,
        mtu=mtu,
        mtu_from=_mtu_from(mesh, me, facts, mtu),
        datapath_type=facts.datapath_type,
        cni=cni_config.conflist_status(facts.cni, want.cni, have.dataplane.cni) if facts.cni and want else None,
    )


def _conditions(
    mesh: Mesh | None,
    plan: Plan,
    peers: tuple[Peer, ...],
    problems: tuple[Problem, ...],
    converged: bool,
    context: ReportContext,
) -> Iterator[Condition]:
    if mesh is None:
        yield Condition("Converged", "Unknown", Reason.NoMesh, "no mesh was read yet, so nothing is touched")
    elif converged:
        yield Condition("Converged", "True", Reason.AsWanted)
    else:
        only_held = plan.held and not plan.steps
        reason = Reason.Blocked if plan.blocked else Reason.RemovalHeld if only_held else Reason.Pending
        text = f"{counted(len(plan.steps), 'change')} to do, {len(plan.blocked)} blocked, {len(plan.held)} held"
        yield Condition("Converged", "False", reason, text)
    reasons = [problem.reason for problem in problems if problem.fatal]
    reasons += [Reason.PeersMissing] * any(peer.state in ("missing", "unknown", "refused") for peer in peers)
    reasons += [Reason.PeersUnreachable] * any(peer.state in NOT_REACHED for peer in peers)
    reasons += [Reason.Blocked] * bool(plan.blocked)
    if reasons:
        yield Condition("Degraded", "True", reasons[0], ", ".join(dict.fromkeys(reasons)))
    else:
        yield Condition("Degraded", "False", Reason.AsWanted)
    if plan.held:
        text = f"{counted(len(plan.held_peers), 'peer')}: {listed(plan.held_peers, 8)}"
        yield Condition("RemovalHeld", "True", Reason.MassRemovalHeld, text)
    if mesh is not None and context.mesh_current:
        source = f"from {context.mesh_from}" if context.mesh_from else ""
        yield Condition("MeshCurrent", "True", Reason.Read, source)
    elif mesh is not None:
        old = f", {age(context.now - context.mesh_since)} old" if context.mesh_since is not None else ""
        yield Condition("MeshCurrent", "False", Reason.LastKnownGood, f"the last known good mesh{old} is in use")


def _headline(
    name: str, mesh: Mesh | None, plan: Plan, peers: tuple[Peer, ...], degraded: bool, converged: bool
) -> str:
    if mesh is None:
        return f"{name} waits for a mesh: nothing was read yet, so nothing is touched"
    wanted = [peer for peer in peers if peer.state != "held"]
    dead = [peer.name for peer in wanted if peer.state in (State.UNREACHABLE, State.NOT_FORWARDED)]
    if dead:
        return f"{name}: {len(dead)} of {len(wanted)} peers not reachable: {listed(dead, 3)}"
    poor = [peer.name for peer in wanted if peer.state in NOT_REACHED]
    if poor:
        return f"{name}: packets to {len(poor)} of {len(wanted)} peers are lost: {listed(poor, 3)}"
    bad = sum(peer.state != "ok" for peer in wanted)
    if bad:
        return f"{name} is degraded: {bad} of {len(wanted)} peers not converged"
    if plan.blocked or (degraded and not converged):
        what = f"{counted(len(plan.blocked), 'part')} blocked" if plan.blocked else "see below"
        return f"{name} is degraded: {what}"
    if plan.held:
        return f"{name} holds back the removal of {counted(len(plan.held_peers), 'peer')}"
    if plan.steps:
        return f"{name} is not converged: {counted(len(plan.steps), 'change')} to do"
    return f"{name} is {'converged, with problems' if degraded else 'converged'}: all {counted(len(wanted), 'peer')} ok"
