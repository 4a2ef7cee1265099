"""Compute the report of one node from what is desired, what was observed and what the probes found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ovsmesh.dataplane import cni_config, desired, plan_text
from ovsmesh.dataplane.firewall_rules import SETS
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.report import (
    NOT_REACHED,
    Condition,
    Held,
    Peer,
    ReconcileResult,
    Report,
    ReportContext,
    Self,
    cause,
)
from ovsmesh.dataplane.types import KBR, PEER_KINDS, Dataplane, Detour, Facts, Observed, Reach, State, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.manifest import digest
from ovsmesh.mesh.types import Mesh, Node, gateway
from ovsmesh.reasons import IN_THE_WAY, Reason
from ovsmesh.text import age, clock, counted, listed


def report(result: ReconcileResult, self_name: str, context: ReportContext) -> Report:
    """Return the report of one reconcile, or of one look at the system.

    A node of the mesh that can't be joined counts as refused, for the reason that the result's problems give.
    """
    have = result.have or Observed(Dataplane())
    held = replace(result.held, left=max(0.0, round(result.held.until - context.now))) if result.held else None
    result = replace(result, problems=tuple(_counting_down(problem, held) for problem in result.problems))
    problems = (context.agent.problem, *result.problems) if context.agent.problem else result.problems
    mesh, facts, want, plan = result.mesh, result.facts, result.want, result.plan
    # no peer misses an entry of sets that this host's packet filter can't have
    unused = frozenset() if want is None else SETS.keys() - set(want.filter_peers.values())
    peers: tuple[Peer, ...] = ()
    if mesh is not None:
        me = mesh.node(self_name)
        joined = desired.peers(mesh, me, desired.wiring(mesh, me, facts))[0] if me and facts else {}
        mtu = desired.pod_mtu(mesh, me, facts) if me and facts else 0
        peers = (
            *_peers(mesh, self_name, joined, mtu, have, unused, result.problems, context),
            *_held(plan, have, context),
        )
    return Report(
        context.now,
        _headline(self_name, result, peers, context),
        result.converged,
        _self(self_name, mesh, facts, want, have, result, context),
        tuple(_conditions(result, problems, peers, context)),
        peers,
        tuple(plan.lines()),
        tuple(u.detail for u in have.unmanaged),
        problems,
        held,
    )


def _counting_down(problem: Problem, held: Held | None) -> Problem:
    """Return a problem about held removals with the time that is left, any other as it is."""
    if held is None or problem.reason is not Reason.MassRemovalHeld:
        return problem
    left = f"is held for another {age(held.left)}, until"
    return replace(problem, message=problem.message.replace("is held until", left, 1))


def unmanaged_beside(have: Observed, plan: Plan) -> tuple[Problem, ...]:
    """Return a problem for each unmanaged object that blocks nothing: it is named all the same."""
    blocking = {blocked.unmanaged for blocked in plan.blocked}
    return tuple(Problem(Reason.Foreign, u.detail) for u in have.unmanaged if u not in blocking)


def astray(detours: Iterable[Detour]) -> tuple[Problem, ...]:
    """Return a problem for each rule or route of others that takes packets to peers elsewhere, with its peers."""
    kinds: dict[tuple[str, str, str], list[Detour]] = {}
    for one in detours:
        kinds.setdefault((one.where, one.why, one.remedy), []).append(one)
    found = []
    for (where, why, remedy), ways in kinds.items():
        peers = dict.fromkeys(f"{one.node} ({one.cidr})" for one in ways)
        senders = " and ".join(dict.fromkeys(one.sender for one in ways))
        text = f"packets of {senders} to {listed(peers, 3)} go {where}, not to {KBR}: {why}"
        found.append(Problem(Reason.RoutedElsewhere, f"{text}; {remedy}" if remedy else text))
    return tuple(found)


def _differences(
    parts: Dataplane,
    have: Dataplane,
    kinds: Iterable[str],
    unused: Collection[str],
    unmanaged: Mapping[Any, Unmanaged],
) -> Iterator[str]:
    """Yield a line for each part of a peer that is not as wanted. `unused`: sets of filter rules that are not there."""
    for kind in kinds:
        wanted, found = getattr(parts, kind), getattr(have, kind)
        if unused and kind == "filter_peers":
            wanted = {element: where for element, where in wanted.items() if where not in unused}
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
    unused: Collection[str],
    problems: Iterable[Problem],
    context: ReportContext,
) -> Iterator[Peer]:
    unmanaged = {(u.kind, u.key): u for u in have.unmanaged if u.blocks}
    me = mesh.node(self_name)
    own = str(me.address) if me else ""
    known = [kind for kind in PEER_KINDS if kind not in have.unknown]
    unknown = sorted(have.unknown & set(PEER_KINDS))
    why_unknown = f"{', '.join(unknown)} can't be observed now"
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
        state, missing = "ok", tuple(_differences(parts, have.dataplane, known, unused, unmanaged))
        if missing:
            state = "missing"
        elif unknown:
            state, missing = "unknown", (why_unknown,)
        reach = context.reach.get(node.name, Reach())
        if state == "ok" and context.agent.alive:
            state, why_not = str(reach.state), cause(reach, mtu, mesh.encapsulation, own, address)
            missing = (why_not,) if why_not else ()
        elif state == "ok":
            state, missing = "unknown", (_not_probed(reach, context),)
        port = next(iter(parts.ports), "")
        when, how = context.last_change.get(node.name, (None, ""))
        now = reach if context.agent.alive else None
        yield Peer(node.name, state, address, cidrs, port, context.traffic.get(port), when, how, missing, now)


def _not_probed(last: Reach, context: ReportContext) -> str:
    if last.state is State.UNPROBED or context.agent.heard is None:
        return "not probed now"
    return f"not probed now; it was {last.state} {age(context.now - context.agent.heard)} ago"


def _held(plan: Plan, have: Observed, context: ReportContext) -> Iterator[Peer]:
    for name in plan.held_peers:
        for port, row in have.dataplane.ports.items():
            if row.node == name:
                when, how = context.last_change.get(name, (None, ""))
                why = ("left the mesh; its removal is held",)
                yield Peer(name, "held", row.remote, (), port, context.traffic.get(port), when, how, why)


def _mtu_from(mesh: Mesh, me: Node, facts: Facts, mtu: int) -> str:
    extra = desired.overhead(mesh, me.address)
    if mesh.mtu is not None and mtu == mesh.mtu:
        return "set in the mesh"
    underlay = facts.underlay_mtu
    if facts.kept_mtu == mtu and (underlay is None or mtu != underlay - extra):
        return f"kept: {'no route leads to a peer' if facts.tunnel_address else f'{me.address} is on no link'}"
    return f"underlay {underlay or mtu + extra}{'' if underlay else ' assumed'} − {extra} of {mesh.encapsulation}"


def _forwarding(facts: Facts) -> str:
    if not facts.forward_limited:
        return ""
    versions = " and ".join(f"IPv{version}" for version in facts.forward_limited)
    return f"{versions}: the mesh's, and what rules of others accept (nobody had it on before the agent)"


def _self(
    name: str,
    mesh: Mesh | None,
    facts: Facts | None,
    want: Dataplane | None,
    have: Observed,
    result: ReconcileResult,
    context: ReportContext,
) -> Self:
    agent, used = context.agent, context.mesh_in_force
    found = Self(
        name,
        docker=have.docker,
        ovs_version=context.ovs_version,
        agent_running=agent.since is not None and agent.alive,
        agent_since=agent.since,
        agent_version=agent.version,
        agent_heard=agent.heard,
        mesh_from=context.mesh_from,
        mesh_since=(used[1] if used else result.mesh_since) or None,
        mesh_current=result.mesh_current,
        mesh_digest=used[0] if used else digest(mesh) if mesh else "",
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
        forwarding=_forwarding(facts),
        datapath_type=facts.datapath_type,
        cni=cni_config.conflist_status(facts.cni, want.cni, have.dataplane.cni) if facts.cni and want else None,
    )


def _conditions(
    result: ReconcileResult, problems: tuple[Problem, ...], peers: tuple[Peer, ...], context: ReportContext
) -> Iterator[Condition]:
    mesh, plan = result.mesh, result.plan
    if mesh is None:
        yield Condition("Converged", "Unknown", Reason.NoMesh, "no mesh was read yet, so nothing is touched")
    elif result.converged:
        yield Condition("Converged", "True", Reason.AsWanted)
    else:
        only_held = plan.held and not plan.steps
        reason = Reason.Blocked if plan.blocked else Reason.RemovalHeld if only_held else Reason.Pending
        numbers = {"blocked": len(plan.blocked), "held": len(plan.held)}
        parts = [f"{counted(len(plan.steps), 'change')} to do"] if plan.steps else []
        parts += [f"{n} {what}" for what, n in numbers.items() if n]
        yield Condition("Converged", "False", reason, ", ".join(parts) or "not all can be seen or set now")
    # what is wrong, each reason with one sentence; the problems themselves have the rest
    found = {problem.reason: problem.reason.meaning for problem in problems if problem.fatal}
    for reason, states in _DEGRADED_BY.items():
        bad = [peer.name for peer in peers if peer.state in states]
        # that nobody probes is said already
        if bad and (context.agent.alive or any(peer.state not in ("ok", "unknown") for peer in peers)):
            are = "is" if len(bad) == 1 else "are"
            what = "not reached by all packets" if reason is Reason.PeersUnreachable else "not joined, or unknown"
            found.setdefault(reason, f"{len(bad)} of {counted(len(peers), 'peer')} {are} {what}: {listed(bad, 3)}.")
    if plan.blocked:
        found[Reason.Blocked] = Reason.Blocked.meaning
    if found:
        yield Condition("Degraded", "True", next(iter(found)), listed(found.values(), 3, " "))
    else:
        yield Condition("Degraded", "False", Reason.AsWanted)
    if plan.held:
        text = f"{counted(len(plan.held_peers), 'peer')}: {listed(plan.held_peers, 8)}"
        yield Condition("RemovalHeld", "True", Reason.MassRemovalHeld, text)
    if mesh is not None and result.mesh_current:
        source = f"from {context.mesh_from}" if context.mesh_from else ""
        yield Condition("MeshCurrent", "True", Reason.Read, source)
    elif mesh is not None:
        old = f", {age(context.now - result.mesh_since)} old" if result.mesh_since else ""
        yield Condition("MeshCurrent", "False", Reason.LastKnownGood, f"the last known good mesh{old} is in use")


_DEGRADED_BY = {
    Reason.PeersUnreachable: frozenset(map(str, NOT_REACHED)),
    Reason.PeersMissing: frozenset(("missing", "unknown", "refused")),
}


def _headline(name: str, result: ReconcileResult, peers: tuple[Peer, ...], context: ReportContext) -> str:
    """Return the verdict: whether the agent can be relied on, and what becomes of packets."""
    agent = context.agent
    if agent.problem is None:
        return f"{name}: {_verdict(result, peers, context.now)}"
    said = _verdict(result, peers, context.now) if agent.alive else agent.said
    if not agent.alive and agent.heard is not None:
        said = f"its last report, {age(context.now - agent.heard)} ago: {said}"
    return f"{name}: {agent.problem.message}{said and '; ' + said}"


def _verdict(result: ReconcileResult, peers: tuple[Peer, ...], now: float) -> str:
    if result.mesh is None:
        return "waits for a mesh; nothing was read yet, so nothing is touched"
    wanted = [peer for peer in peers if peer.state != "held"]
    worst = next((state for state in _WORST if any(peer.state == state for peer in wanted)), "ok")
    alike = _DEAD if worst in _DEAD else {worst}
    bad = [peer for peer in wanted if peer.state in alike]
    share = f"{len(bad)} of {counted(len(wanted), 'peer')}"
    fatal = next((problem for problem in result.problems if problem.fatal), None)
    lost_here = next((problem for problem in result.problems if problem.reason in IN_THE_WAY), None)
    if lost_here is not None:
        return f"packets of the mesh are lost on this host: {lost_here}"
    if worst in NOT_REACHED:
        what = _LOST.get(worst, "{} not reachable").format(share)
        return f"{what}: {listed([p.name for p in bad], 3)}{_since(bad, now)}"
    if worst == "unknown" and fatal is not None:
        return f"{share} unknown: {fatal}"
    if worst in ("missing", "unknown", "refused"):
        return f"{share} {'not in place' if worst == 'missing' else worst}: {listed([p.name for p in bad], 3)}"
    if result.plan.blocked:
        names = [plan_text.name(one.step.kind, one.step.key) for one in result.plan.blocked]
        return f"something unmanaged is in the way of {listed(names, 3)}"
    if result.plan.held:
        # the problem beside it says how long, and how to confirm it
        return f"holds back the removal of {counted(len(result.plan.held_peers), 'peer')}"
    if fatal is not None and not result.converged:
        return str(fatal)
    if result.plan.steps:
        return f"not converged: {counted(len(result.plan.steps), 'change')} to do"
    if worst != "ok":
        return f"{share} {worst}"
    others = {problem.node for problem in result.problems if problem.wrong and problem.node}
    at_others = f"; something is wrong with {counted(len(others), 'other node')} of the mesh" if others else ""
    with_problems = f"; {fatal}" if fatal is not None else at_others
    return f"all {counted(len(wanted), 'peer')} ok{with_problems}" if wanted else f"no peers{with_problems}"


_DEAD = frozenset({State.UNREACHABLE, State.NOT_FORWARDED})
_WORST: tuple[str, ...] = (
    *(State.UNREACHABLE, State.NOT_FORWARDED, State.SMALL, State.LOSSY, "missing", "unknown", "refused"),
    *(state for state in State if state is not State.OK and state not in NOT_REACHED),
)
_LOST: dict[str, str] = {State.SMALL: "only small packets reach {}", State.LOSSY: "some packets to {} are lost"}


def _since(bad: list[Peer], now: float) -> str:
    """Return since when packets to these peers are lost, and why, where that is the same for all."""
    found = [peer.reach for peer in bad if peer.reach is not None]
    if not found:
        return ""
    why = {_short(reach) for reach in found}
    return f" (since {clock(min(reach.since for reach in found), now)}, {why.pop() if len(why) == 1 else 'see below'})"


def _short(reach: Reach) -> str:
    if reach.error:
        return "probes can't be sent"
    if reach.state is State.SMALL:
        return f"path MTU {reach.path_mtu}"
    if reach.state is State.LOSSY:
        return f"{reach.loss or 0:.0%} are lost"
    if reach.state is State.NOT_FORWARDED:
        return "it answers, but forwards nothing to its pods"
    if reach.state is State.UNREACHABLE:
        return "its packets arrive, ours are not answered" if reach.heard else "nothing arrives from it"
    return str(reach.state)
