"""The ordered difference between the desired and the observed dataplane, and the brake on mass removal.

Pure: imports model and conflist only. An empty plan is convergence. `str(step)` is what CLI, log and golden
tests show alike.

    in want  in have   equal    unmanaged     outcome
    yes      no        -        no            + step
    yes      yes       no       no            ~ step
    yes      any       -        yes           blocked, named
    no       yes       -        -             - step, or held by the brake
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.types import KBR, KINDS, MARK, OBR, Dataplane, Observed, Route, Unmanaged
from ovsmesh.errors import Problem

BRAKE_PEERS = 2
BRAKE_SHARE = 3
"""A snapshot that removes more than 2 peers and more than a third of them at once is held."""

_PEER_KINDS = frozenset({"filter_peers", "ports", "flows", "neighbours", "fdb", "routes"})
_CONTAINERS = ("docker", "cni")
"""Kinds that plug containers into what the others are."""
_CONTAINER_REASONS = ("Docker", "CNI")
_NAMES = {
    "sysctls": "sysctl",
    "bridges": "bridge",
    "links": "link",
    "addresses": "address",
    "rules": "rule",
    "filter_peers": "filter-peer",
    "ports": "port",
    "flows": "flow",
    "neighbours": "neighbour",
    "fdb": "fdb",
    "routes": "route",
    "restore_wait": "ovs",
    "docker": "docker",
    "cni": "cni",
}


_ABSENT = {"state": "up", "flooding": "off", "protected": "yes", "alias": MARK}
"""What it means that a word has no value: the usual is not said."""


class Step(NamedTuple):
    """One change: op is "+", "~" or "-"; `want` is None for a removal, `have` for an addition."""

    op: str
    kind: str
    key: Any
    want: Any
    have: Any
    why: str = ""

    def __str__(self) -> str:
        return f"{self.op} {_NAMES[self.kind]} {_subject(self)}{self.why and ' ' + self.why}"


class Blocked(NamedTuple):
    """A wanted part whose place something unmanaged holds."""

    step: Step
    unmanaged: Unmanaged

    def __str__(self) -> str:
        return f"! {_NAMES[self.step.kind]} {_key_text(self.step.kind, self.step.key)} blocked: {self.unmanaged.detail}"


@dataclass(frozen=True, slots=True)
class Plan:
    """`steps` in the order in which they are to be done; `held` are removals that the brake keeps back."""

    steps: tuple[Step, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    held: tuple[Step, ...] = ()
    held_peers: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        yield from map(str, self.steps)
        yield from map(str, self.blocked)
        yield from (f"= held {str(step)[2:]}" for step in self.held)


def _key_text(kind: str, key: Any) -> str:
    if kind == "routes":
        return str(key[0])
    if kind == "rules":
        return " ".join(key)
    if kind == "flows":
        priority, _, match = key.partition(" ")
        return f"priority={priority},{match}" if match else f"priority={priority}"
    return str(key)


def _words(kind: str, value: Any) -> list[tuple[str, str]]:
    """What a value holds, as (word, text) in the order in which a reader expects it."""
    if kind == "ports":
        words = [
            ("remote", value.remote),
            ("local", value.local),
            ("key", value.key),
            ("type", value.type),
        ]
        words += [
            ("node", value.node),
            ("uid", value.uid),
            ("protected", "" if value.protected else "no"),
        ]
    elif kind == "links":
        words = [
            ("mtu", str(value.mtu)),
            ("mac", value.mac),
            ("master", value.master),
            ("kind", value.kind),
        ]
        words += [
            ("state", "" if value.up else "down"),
            ("flooding", "" if value.quiet or not value.master else "on"),
            ("alias", "none" if value.unmarked else ""),
        ]
    elif kind == "bridges":
        words = [
            ("datapath", value.datapath_type),
            ("fail-mode", value.fail_mode),
            ("mtu", str(value.mtu_request)),
        ]
    elif kind == "routes":
        words = [
            ("type", "" if value.type == "unicast" else value.type),
            ("via", value.via),
            ("dev", value.dev),
        ]
        words += [("mtu", str(value.mtu or ""))]
    elif kind == "cni":
        words = cni_config.words(value)
    else:
        words = [
            (
                {
                    "addresses": "dev",
                    "neighbours": "lladdr",
                    "fdb": "dev",
                    "filter_peers": "in",
                }.get(kind, ""),
                value,
            )
        ]
    return [(word, str(text)) for word, text in words]


def _subject(step: Step) -> str:
    text = _key_text(step.kind, step.key)
    if step.kind == "sysctls":
        return f"{text} {step.have if step.have is not None else '(absent)'} → {step.want}"
    if step.kind == "restore_wait":
        return text
    if step.op == "-":
        return text
    if step.kind == "rules":
        return f"{text}: {step.want.text}"
    if step.kind == "flows":
        return f"{text} → {step.want}"
    want = _words(step.kind, step.want)
    if step.op == "+":
        shown = want[:1] if step.kind == "ports" else want
        return " ".join([text, *(f"{word} {value}".lstrip() for word, value in shown if value)])
    have = dict(_words(step.kind, step.have))
    changes = [
        f"{word and word + ' '}{have[word] or _ABSENT.get(word, 'none')} → {value or _ABSENT.get(word, 'none')}"
        for word, value in want
        if have[word] != value
    ]
    return " ".join([text, ", ".join(changes) or "text differs"])


def _owners(have: Dataplane) -> dict[str, str]:
    """Peer MAC → node name, as the system itself tells it: flow to a port, port to a node."""
    owners = {}
    for match, actions in have.flows.items():
        if match.endswith("in_port=LOCAL") and actions.startswith("output:"):
            port = have.ports.get(actions[7:])
            if port:
                owners[match.partition("dl_dst=")[2][:17]] = port.node
    return owners


def _owner(step: Step, have: Dataplane, owners: dict[str, str]) -> str:
    if step.kind == "ports":
        return str(step.have.node)
    if step.kind == "fdb":
        return owners.get(step.key, "")
    if step.kind == "neighbours":
        return owners.get(step.have, "")
    if step.kind == "routes":
        return owners.get(have.neighbours.get(step.have.via, ""), "")
    if step.kind == "filter_peers":
        return next((p.node for p in have.ports.values() if p.remote == step.key), "")
    if step.kind == "flows":
        field = next(
            (f for f in step.key.partition(" ")[2].split(",") if f.startswith("in_port=")),
            "",
        )
        port = have.ports.get(step.have[7:] if field == "in_port=LOCAL" else field[8:])
        return port.node if port else ""
    return ""


def _removals(want: Dataplane, have: Dataplane, steps: list[Step]) -> list[Step]:
    """The same removals with their reason, where the system still tells whose a part was."""
    if not steps:
        return []
    owners = _owners(have)
    wanted = {p.node for p in want.ports.values()}
    told = []
    for step in steps:
        if step.kind == "restore_wait":
            told.append(step._replace(why="cleared: its flows are back"))
        elif step.kind not in _PEER_KINDS or (isinstance(step.have, Route) and step.have.type != "unicast"):
            told.append(step)
        else:
            name = _owner(step, have, owners)
            why = "peer left" if name not in wanted else "replaced at peer"
            told.append(step._replace(why=f"{why} ({name})" if name else "not in the mesh"))
    return told


def _blocks(step: Step, unmanaged: dict[tuple[str, Any], Unmanaged]) -> Unmanaged | None:
    hit = unmanaged.get((step.kind, step.key))
    if hit is None and step.kind == "routes":
        # an unmanaged route to the same destination wins or loses by its metric: either way one of the two is wrong
        hit = unmanaged.get(("routes", step.key[0])) if step.want.type == "unicast" else None
    return hit


def _all_or_nothing(
    kind: str, unmanaged: Iterable[Unmanaged], added: list[Step], removed: list[Step]
) -> tuple[list[Blocked], list[Step], list[Step]]:
    """Where one thing stands in the way of a kind: a Docker that is switched by half is worse than none."""
    hit = next((f for f in unmanaged if f.kind == kind), None)
    first = next((step for step in (*added, *removed) if step.kind == kind), None)
    if hit is None or first is None:
        return [], added, removed
    left = [[step for step in steps if step.kind != kind] for steps in (added, removed)]
    return [Blocked(first, hit)], left[0], left[1]


def _overruled(want: Dataplane, have: Dataplane, unmanaged: dict[tuple[str, Any], Unmanaged]) -> list[Blocked]:
    """Routes of ours that are in place, with an unmanaged one to the same destination beside them."""
    beside = [(key, value) for key, value in want.routes.items() if ("routes", key[0]) in unmanaged]
    return [
        Blocked(Step("~", "routes", key, value, value), unmanaged["routes", key[0]])
        for key, value in beside
        if value.type == "unicast" and have.routes.get(key) == value
    ]


def _differences(want: Dataplane, have: Dataplane, kinds: Iterable[str]) -> tuple[list[Step], list[Step]]:
    added: list[Step] = []
    removed: list[list[Step]] = []
    for kind in kinds:
        wanted, found = getattr(want, kind), getattr(have, kind)
        if wanted == found and (kind != "rules" or list(wanted) == list(found)):
            continue
        for key, value in wanted.items():
            old = found.get(key)
            if old is None:
                added.append(Step("~" if kind == "sysctls" else "+", kind, key, value, None))
            elif old != value:
                added.append(Step("~", kind, key, value, old))
        if kind != "sysctls":
            removed.append([Step("-", kind, key, None, old) for key, old in found.items() if key not in wanted])
        if kind == "rules" and list(wanted) != list(found) and not added[-1:] and not removed[-1]:
            key = next(iter(wanted))
            added.append(Step("~", kind, key, wanted[key], wanted[key], "order"))
    return added, [step for steps in reversed(removed) for step in steps]


def _braked(want: Dataplane, have: Dataplane) -> tuple[str, ...]:
    """Whose removal is to be held, as names or, where the ports that tell those are gone, as MACs.

    Ports and FDB entries, of which each peer has one, are counted each for itself: if someone deleted
    the ones, or they can't be seen, the others still tell how many peers there were.
    """
    wanted = {p.node for p in want.ports.values()}
    ports = {p.node for p in have.ports.values()}
    owners = _owners(have)
    left = [mac for mac in have.fdb if mac not in want.fdb and owners.get(mac) not in wanted]
    for there, gone in ((len(ports), ports - wanted), (len(have.fdb), {owners.get(mac, mac) for mac in left})):
        if len(gone) > BRAKE_PEERS and len(gone) * BRAKE_SHARE > there:
            return tuple(sorted(gone))
    return ()


def in_sync(todo: Plan, problems: Iterable[Problem]) -> bool:
    """Return whether a node is as wanted: nothing is left to do, blocked or held, and no problem is fatal.

    `problems` are those of observing and applying. What is wrong with the mesh itself does not count: its writer
    corrects it, and all that the mesh rightly names is in place meanwhile.
    """
    return not (todo.steps or todo.blocked or todo.held or any(problem.fatal for problem in problems))


def due(todo: Plan, problems: Iterable[Problem]) -> Plan:
    """What of a plan is to be done now: a conflist lets pods in, so it comes when all else is true.

    A Docker that does not obey keeps no pod out, and neither does another network's conflist.
    """
    rest = tuple(step for step in todo.steps if step.kind != "cni" or step.op == "-")
    if len(rest) == len(todo.steps):
        return todo
    waits = any(step.kind not in _CONTAINERS for step in rest)
    waits |= any(blocked.step.kind not in _CONTAINERS for blocked in todo.blocked)
    waits |= any(problem.fatal and not problem.reason.startswith(_CONTAINER_REASONS) for problem in problems)
    return replace(todo, steps=rest) if waits else todo


def plan(want: Dataplane, observed: Observed, confirmed: bool = False) -> Plan:
    """What is to be done so that `observed` becomes `want`; `confirmed` lifts the brake."""
    have = observed.dataplane
    kinds = [kind for kind in KINDS if kind not in observed.unknown]
    added, removed = _differences(want, have, kinds)
    unmanaged = {(f.kind, f.key): f for f in observed.unmanaged if f.blocks}
    blocked: list[Blocked] = []
    if unmanaged:
        docker, added, removed = _all_or_nothing("docker", unmanaged.values(), added, removed)
        hits = [(step, _blocks(step, unmanaged)) for step in added]
        blocked = [Blocked(step, hit) for step, hit in hits if hit]
        added = [step for step, hit in hits if not hit]
        blocked += _overruled(want, have, unmanaged) + docker
        if (("links", KBR) in unmanaged and KBR in want.links) or (
            ("bridges", OBR) in unmanaged and OBR in want.bridges
        ):
            # everything hangs on these two; half a dataplane around someone else's bridge would touch theirs
            return Plan(blocked=tuple(blocked))
    removed = _removals(want, have, removed)
    gone = () if confirmed else _braked(want, have)
    if gone:
        held = tuple(step for step in removed if step.kind in _PEER_KINDS)
        kept = tuple(step for step in removed if step.kind not in _PEER_KINDS)
        return Plan((*added, *kept), tuple(blocked), held, gone)
    return Plan((*added, *removed), tuple(blocked))
