"""Conflicts between nodes: two that want one name, one tunnel address or overlapping pod CIDRs.

One index finds them; the caller says who goes first. In a mesh file that is the order of the file, and whoever
held the thing before keeps it. Among Nodes of Kubernetes it is their age.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from ovsmesh.errors import Problem
from ovsmesh.mesh.types import IPAddress, IPNetwork, Mesh, Node
from ovsmesh.mesh.validation import range_of, validate_again
from ovsmesh.reasons import Reason

_REASONS = {"name": Reason.DuplicateName, "address": Reason.AddressConflict}


class Conflict(NamedTuple):
    """What one node wants and another one keeps. Nodes are places in the list that was settled."""

    loser: int
    winner: int
    field: str
    """name, address or podCIDRs[i] of the loser."""
    value: str
    what: str
    """What is wrong with the value, such as "overlaps 10.97.0.0/16 of node web1"."""
    thing: IPAddress | IPNetwork | None = None
    """What the winner has; None for a name."""
    held: bool = False
    """Whether the winner had it before."""

    def problem(self, name: str, why: str) -> Problem:
        """Return the refusal of the loser, `name`; `why` says why it lost and what to do."""
        return Problem(
            _REASONS.get(self.field, Reason.PodCIDRConflict), f"{self.what}{why}", name, self.field, self.value
        )


class _Index:
    """Who has which address and which ranges. The ranges in it never overlap, so only the nearest can be met."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._addresses: dict[IPAddress, int] = {}
        self._ranges: list[tuple[int, int, int, int, int]] = []
        """Version, first and last address; place of the node, number of its pod CIDR."""

    def add(self, place: int, only: Node | None = None) -> None:
        """Enter what the node at `place` has and nobody else; with `only`, no more of it than both have."""
        node = self._nodes[place]
        if only is None or only.address == node.address:
            self._addresses.setdefault(node.address, place)
        for number, cidr in enumerate(node.pod_cidrs):
            if (only is None or cidr in only.pod_cidrs) and self._near(cidr) is None:
                insort(self._ranges, (*range_of(cidr), place, number))

    def _near(self, cidr: IPNetwork) -> tuple[int, int] | None:
        version, first, last = range_of(cidr)
        at = bisect_right(self._ranges, (version, last + 1)) - 1
        if at >= 0 and self._ranges[at][0] == version and self._ranges[at][2] >= first:
            return self._ranges[at][3:]
        return None

    def conflict(self, place: int) -> Conflict | None:
        """Return the first thing of the node at `place` that another one has."""
        node = self._nodes[place]
        winner = self._addresses.get(node.address, place)
        if winner != place:
            what = f"is the address of node {self._nodes[winner].name} too"
            return Conflict(place, winner, "address", str(node.address), what, node.address)
        for number, cidr in enumerate(node.pod_cidrs):
            winner, other = self._near(cidr) or (place, 0)
            if winner != place:
                name, thing = self._nodes[winner].name, self._nodes[winner].pod_cidrs[other]
                what = f"is the range of node {name} too" if thing == cidr else f"overlaps {thing} of node {name}"
                return Conflict(place, winner, f"podCIDRs[{number}]", str(cidr), what, thing)
        return None


def _disjoint(nodes: Sequence[Node]) -> bool:
    """Return whether no two of `nodes` meet: the usual case, told by one sort."""
    if len({n.name for n in nodes}) < len(nodes) or len({n.address for n in nodes}) < len(nodes):
        return False
    ranges = sorted([range_of(cidr) for n in nodes for cidr in n.pod_cidrs])
    return all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(ranges))


def settle(nodes: Sequence[Node], held: Mapping[str, Node]) -> tuple[list[Node], list[Conflict]]:
    """Return the nodes that stay, and a conflict for each that does not.

    `nodes` come in order of precedence. A node that has the same name, address or range in `held`, by its name,
    keeps it against those before it too.
    """
    if _disjoint(nodes):
        return list(nodes), []
    conflicts: list[Conflict] = []
    places: dict[str, int] = {}
    for place, node in enumerate(nodes):
        winner = places.setdefault(node.name, place)
        if winner != place:
            old = held.get(node.name)
            loser = place
            if node == old != nodes[winner]:
                places[node.name], loser, winner = place, winner, place
            what = "is the name of another node too"
            conflicts.append(Conflict(loser, winner, "name", node.name, what, held=nodes[winner] == old))
    index = _Index(nodes)
    for name, place in places.items():
        if name in held:
            index.add(place, only=held[name])
    good: list[Node] = []
    for place in places.values():
        found = index.conflict(place)
        if found is None:
            index.add(place)
            good.append(nodes[place])
        else:
            old = held.get(nodes[found.winner].name)
            conflicts.append(found._replace(held=old is not None and found.thing in (old.address, *old.pod_cidrs)))
    return good, conflicts


def keep_last_good(good: Iterable[Node], old: Iterable[Node], clusters: tuple[str, ...]) -> list[Node]:
    """Return those of `old` that these cluster CIDRs still allow and that meet no other: not `good`, not each other.

    `old` are the last good entries of nodes whose entry of now is refused.
    """
    nodes = list(good)
    index = _Index(nodes)
    for place in range(len(nodes)):
        index.add(place)
    names = {node.name for node in nodes}
    kept: list[Node] = []
    for node in sorted(old, key=lambda node: node.name):
        if node.name in names or not isinstance(validate_again(node, clusters), Node):
            continue
        nodes.append(node)
        if index.conflict(len(nodes) - 1) is None:
            index.add(len(nodes) - 1)
            kept.append(node)
    return kept


def settle_entries(
    found: Sequence[tuple[Node, int]],
    refused: Sequence[tuple[Problem, int]],
    last: Mesh | None,
    clusters: tuple[str, ...],
) -> tuple[tuple[Node, ...], tuple[Problem, ...]]:
    """Return the nodes of a mesh, sorted by name, and a problem for each entry that is not used.

    `found` are entries that are good by themselves, `refused` the others, in the order of the file, each with its
    line (0: unknown). What a node had in `last` it keeps; else the first has it. A refused node keeps its entry of
    `last`, where that meets no good one.
    """
    old = {node.name: node for node in last.nodes} if last is not None else {}
    good, conflicts = settle([node for node, _ in found], old)
    bad = list(refused)
    for conflict in conflicts:
        node, line = found[conflict.loser]
        why = "which held it before" if conflict.held else "which comes first"
        advice = "rename or remove one" if conflict.field == "name" else "give this node another"
        bad.append((conflict.problem(node.name, f"{_line(found[conflict.winner][1])}, {why}: {advice}"), line))
    again = {problem.node: old[problem.node] for problem, _ in bad if problem.node in old}
    kept = keep_last_good(good, again.values(), clusters) if again else []
    used, names = {node.name for node in good}, {node.name for node in kept}
    problems = []
    for problem, line in bad:
        if problem.node in names:
            end = "keeping its last good entry"
        elif problem.node in used:
            end = "its other entry is used"
        elif problem.node in old:
            end = "its last good entry can't be kept either: others have taken from it, or the cluster CIDRs changed"
        else:
            end = "the node is left out"
        problems.append(replace(problem, message=f"{problem.message}{_line(line)}; {end}"))
    return tuple(sorted(good + kept, key=lambda node: node.name)), tuple(problems)


def _line(line: int) -> str:
    return f" (line {line})" if line else ""
