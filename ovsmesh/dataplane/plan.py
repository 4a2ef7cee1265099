"""Compute the ordered difference between the desired and the observed dataplane, and hold back mass removals.

An empty plan means in sync.

    desired  observed  equal  unmanaged  outcome
    yes      no        -      no         + step
    yes      yes       no     no         ~ step
    yes      any       -      yes        blocked, named
    no       yes       -      -          - step, or held by the removal guard
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any, NamedTuple

from ovsmesh.dataplane import plan_text
from ovsmesh.dataplane.firewall_rules import PORTS
from ovsmesh.dataplane.types import KBR, KINDS, OBR, PEER_KINDS, Dataplane, Observed, Route, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import gateway
from ovsmesh.reasons import Reason

GUARD_PEERS = 2
GUARD_SHARE = 3
"""The removal of more than 2 peers, and more than a third of them, at once is held."""

_VERBS = {"+": "add", "~": "change", "-": "remove"}
_CONTAINERS = ("docker", "cni")
"""Kinds that plug containers into what the others are."""
_CONTAINER_REASONS = ("Docker", "CNI")


class Step(NamedTuple):
    """One change: `op` is "+", "~" or "-"; `want` is None for a removal, `have` for an addition."""

    op: str
    kind: str
    key: Any
    want: Any
    have: Any
    why: str = ""

    def __str__(self) -> str:
        """Return the step as one line."""
        return f"{self.op} {plan_text.subject(*self[:5])}{self.why and ' ' + self.why}"

    @property
    def words(self) -> str:
        """The step as a sentence asks for it: "add route 10.97.2.0/24 …"."""
        return f"{_VERBS[self.op]} {str(self)[2:]}"


class Blocked(NamedTuple):
    """A step that an unmanaged object stands in the way of."""

    step: Step
    unmanaged: Unmanaged

    def __str__(self) -> str:
        """Return the step and what blocks it as one line."""
        return f"! {plan_text.name(self.step.kind, self.step.key)} blocked: {self.unmanaged.detail}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, in order, and what is not done: blocked steps, and removals that the guard holds."""

    steps: tuple[Step, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    held: tuple[Step, ...] = ()
    held_peers: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether there is something to do."""
        return bool(self.steps)

    def __str__(self) -> str:
        """Return the lines as one text."""
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield one line for each step, blocked step and held removal."""
        yield from map(str, self.steps)
        yield from map(str, self.blocked)
        yield from (f"= held {str(step)[2:]}" for step in self.held)


def plan(want: Dataplane, observed: Observed, confirmed: bool = False) -> Plan:
    """Return what is to be done so that `observed` becomes `want`. `confirmed` lifts the removal guard."""
    have = observed.dataplane
    added, removed = _differences(want, have, [kind for kind in KINDS if kind not in observed.unknown])
    unmanaged = {(u.kind, u.key): u for u in observed.unmanaged if u.blocks}
    blocked: list[Blocked] = []
    if unmanaged:
        docker, added, removed = _all_or_nothing("docker", unmanaged, added, removed)
        hits = [(step, _blocks(step, unmanaged)) for step in added]
        blocked = [Blocked(step, hit) for step, hit in hits if hit]
        added = [step for step, hit in hits if not hit]
        blocked += _route_beside(want, have, unmanaged) + docker
        if any(base in unmanaged and base[1] in getattr(want, base[0]) for base in (("links", KBR), ("bridges", OBR))):
            # everything depends on these two; half a dataplane around an unmanaged bridge would touch that bridge
            return Plan(blocked=tuple(blocked))
    removed = _with_owners(want, have, removed)
    leaving = () if confirmed else _mass_removal(want, have)
    held = tuple(step for step in removed if leaving and step.kind in PEER_KINDS)
    kept = [step for step in removed if not leaving or step.kind not in PEER_KINDS]
    return Plan((*added, *kept), tuple(blocked), held, leaving)


def in_sync(todo: Plan, problems: Iterable[Problem]) -> bool:
    """Return whether a node is as wanted: nothing is left to do, blocked or held, and no problem is fatal.

    `problems` are those of observing and applying. Problems of the mesh itself do not count: its writer corrects
    it, and meanwhile all that it rightly names is in place.
    """
    return not (todo.steps or todo.blocked or todo.held or any(problem.fatal for problem in problems))


def due(todo: Plan, problems: Iterable[Problem]) -> Plan:
    """Return what of a plan is to be done now: the conflist lets pods in, so it waits until all else is in place.

    It does not wait for Docker, nor for another network's conflist: neither keeps a pod from working. Where another
    program undoes it each time, it is written from time to time only.
    """
    rest = tuple(step for step in todo.steps if step.kind != "cni" or step.op == "-")
    if len(rest) == len(todo.steps):
        return todo
    waits = any(step.kind not in _CONTAINERS for step in rest)
    waits |= any(blocked.step.kind not in _CONTAINERS for blocked in todo.blocked)
    waits |= any(
        problem.fatal and (problem.reason is Reason.CNIContested or not problem.reason.startswith(_CONTAINER_REASONS))
        for problem in problems
    )
    return replace(todo, steps=rest) if waits else todo


def _differences(want: Dataplane, have: Dataplane, kinds: Iterable[str]) -> tuple[list[Step], list[Step]]:
    """Return additions and changes in the order of `kinds`, and removals in reverse."""
    added: list[Step] = []
    removed: list[list[Step]] = []
    for kind in kinds:
        wanted, found = getattr(want, kind), getattr(have, kind)
        if wanted == found and (kind != "rules" or list(wanted) == list(found)):
            continue
        before = len(added)
        for key, value in wanted.items():
            old = found.get(key)
            if old is None:
                added.append(Step("~" if kind == "sysctls" else "+", kind, key, value, None))
            elif old != value:
                added.append(Step("~", kind, key, value, old))
        # a sysctl can't be removed, and those that nobody wants are not managed
        gone = [] if kind == "sysctls" else [key for key in found if key not in wanted]
        removed.append([Step("-", kind, key, None, found[key]) for key in gone])
        if kind == "rules" and not gone and len(added) == before:
            key = next(iter(wanted))
            added.append(Step("~", kind, key, wanted[key], wanted[key], "order"))
    return added, [step for steps in reversed(removed) for step in steps]


# Unmanaged objects


def _blocks(step: Step, unmanaged: Mapping[tuple[str, Any], Unmanaged]) -> Unmanaged | None:
    hit = unmanaged.get((step.kind, step.key))
    if hit is None and step.kind == "routes" and step.want.type == "unicast":
        # an unmanaged route to the same destination wins or loses by its metric: either way one of the two is wrong
        hit = unmanaged.get(("routes", step.key[0]))
    return hit


def _all_or_nothing(
    kind: str, unmanaged: Mapping[tuple[str, Any], Unmanaged], added: list[Step], removed: list[Step]
) -> tuple[list[Blocked], list[Step], list[Step]]:
    """Block a kind as a whole where one thing of it is blocked: a Docker that is moved by half is worse than none."""
    hit = next((u for u in unmanaged.values() if u.kind == kind), None)
    first = next((step for step in (*added, *removed) if step.kind == kind), None)
    if hit is None or first is None:
        return [], added, removed
    left = [[step for step in steps if step.kind != kind] for steps in (added, removed)]
    return [Blocked(first, hit)], left[0], left[1]


def _route_beside(want: Dataplane, have: Dataplane, unmanaged: Mapping[tuple[str, Any], Unmanaged]) -> list[Blocked]:
    """Return the managed routes that are in place, with an unmanaged one to the same destination beside them."""
    return [
        Blocked(Step("~", "routes", key, value, value), unmanaged["routes", key[0]])
        for key, value in want.routes.items()
        if ("routes", key[0]) in unmanaged and value.type == "unicast" and have.routes.get(key) == value
    ]


# Whose a part was, and the removal guard


def _owners(have: Dataplane) -> dict[str, str]:
    """Return peer MAC → node name, as the system itself tells it: from flow to port, from port to node."""
    owners = {}
    for match, actions in have.flows.items():
        if match.endswith("in_port=LOCAL") and actions.startswith("output:"):
            port = have.ports.get(actions[7:])
            if port:
                owners[match.partition("dl_dst=")[2][:17]] = port.node
    return owners


def _owner(step: Step, have: Dataplane, owners: Mapping[str, str]) -> str:
    """Return the peer that a removed part was for; "" where the system does not tell it any more."""
    match step.kind:
        case "ports":
            return str(step.have.node)
        case "fdb":
            return owners.get(step.key, "")
        case "neighbours":
            return owners.get(step.have, "")
        case "routes":
            return owners.get(have.neighbours.get(step.have.via, ""), "")
        case "filter_peers" if "/" in step.key:
            return owners.get(have.neighbours.get(str(gateway(ip_network(step.key))), ""), "")
        case "filter_peers":
            return next((p.node for p in have.ports.values() if p.remote == step.key), "")
    fields = step.key.partition(" ")[2].split(",")
    in_port = next((field[8:] for field in fields if field.startswith("in_port=")), "")
    port = have.ports.get(step.have[7:] if in_port == "LOCAL" else in_port)
    return port.node if port else ""


def _with_owners(want: Dataplane, have: Dataplane, steps: list[Step]) -> list[Step]:
    """Return the same removals, each with its reason."""
    if not steps:
        return []
    owners = _owners(have)
    wanted = {p.node for p in want.ports.values()}
    found = []
    for step in steps:
        why = ""
        if step.kind == "restore_wait":
            why = "cleared: its flows are back"
        elif step.kind in PEER_KINDS and step.have != PORTS and not _fallback(step.have):
            name = _owner(step, have, owners)
            what = "peer left" if name not in wanted else "replaced at peer"
            why = f"{what} ({name})" if name else "not in the mesh"
        found.append(step._replace(why=why))
    return found


def _fallback(have: object) -> bool:
    return isinstance(have, Route) and have.type != "unicast"


def _mass_removal(want: Dataplane, have: Dataplane) -> tuple[str, ...]:
    """Return the peers whose removal is to be held: names or, where the ports that tell those are gone, MACs.

    Each peer has one port and one FDB entry. The two are counted apart: where someone deleted the ones, or they
    can't be observed, the others still tell how many peers there were.
    """
    wanted = {p.node for p in want.ports.values()}
    ports = {p.node for p in have.ports.values()}
    owners = _owners(have)
    left = [mac for mac in have.fdb if mac not in want.fdb and owners.get(mac) not in wanted]
    for there, gone in ((len(ports), ports - wanted), (len(have.fdb), {owners.get(mac, mac) for mac in left})):
        if len(gone) > GUARD_PEERS and len(gone) * GUARD_SHARE > there:
            return tuple(sorted(gone))
    return ()
