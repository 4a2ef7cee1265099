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

_NONE: Mapping[str, Node] = {}


class Conflict(NamedTuple):
    """What one node wants and another one keeps."""

    loser: int
    winner: int
    """Places in the list that was settled."""
    problem: Problem
    """What is wrong with the loser, such as "overlaps 10.97.0.0/16 of node web1"."""
    held: bool
    """Whether the winner had it before."""


class _Index:
    """Who has which address and which ranges. The ranges in it never overlap, so only the nearest can be met."""

    def __init__(self, nodes: Sequence[Node], held: Mapping[str, Node] = _NONE) -> None:
        self._nodes, self._held = nodes, held
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
            other = self._nodes[winner]
            message, value = f"is the address of node {other.name} too", str(node.address)
            problem = Problem(Reason.AddressConflict, message, node.name, "address", value)
            old = self._held.get(other.name)
            return Conflict(place, winner, problem, old is not None and old.address == node.address)
        for number, cidr in enumerate(node.pod_cidrs):
            winner, theirs = self._near(cidr) or (place, 0)
            if winner != place:
                other = self._nodes[winner]
                thing = other.pod_cidrs[theirs]
                same = f"is the range of node {other.name} too"
                message = same if thing == cidr else f"overlaps {thing} of node {other.name}"
                problem = Problem(Reason.PodCIDRConflict, message, node.name, f"podCIDRs[{number}]", str(cidr))
                old = self._held.get(other.name)
                return Conflict(place, winner, problem, old is not None and thing in old.pod_cidrs)
        return None


def _disjoint(nodes: Sequence[Node]) -> bool:
    """Return whether no two of `nodes` meet: the usual case, told by one sort."""
    if len({n.name for n in nodes}) < len(nodes) or len({n.address for n in nodes}) < len(nodes):
        return False
    ranges = sorted([range_of(cidr) for n in nodes for cidr in n.pod_cidrs])
    return all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(ranges))


def settle(nodes: Sequence[Node], held: Mapping[str, Node] = _NONE) -> tuple[list[Node], list[Conflict]]:
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
            old, loser = held.get(node.name), place
            if node == old != nodes[winner]:
                places[node.name], loser, winner = place, winner, place
            message = "is the name of another node too"
            problem = Problem(Reason.DuplicateName, message, node.name, "name", node.name)
            conflicts.append(Conflict(loser, winner, problem, nodes[winner] == old))
    index = _Index(nodes, held)
    for name, place in places.items():
        if name in held:
            index.add(place, only=held[name])
    good: list[Node] = []
    for place in places.values():
        conflict = index.conflict(place)
        if conflict is None:
            index.add(place)
            good.append(nodes[place])
        else:
            conflicts.append(conflict)
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
        why = "which held it before" if conflict.held else "which comes first"
        duplicate = conflict.problem.reason is Reason.DuplicateName
        advice = "rename or remove one" if duplicate else "give this node another"
        text = f"{_line(found[conflict.winner][1])}, {why}: {advice}"
        bad.append((add_text(conflict.problem, text), found[conflict.loser][1]))
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
        problems.append(add_text(problem, f"{_line(line)}; {end}"))
    return tuple(sorted(good + kept, key=lambda node: node.name)), tuple(problems)


def add_text(problem: Problem, text: str) -> Problem:
    """Return `problem` with more text at the end of its message."""
    return replace(problem, message=f"{problem.message}{text}")


def _line(line: int) -> str:
    return f" (line {line})" if line else ""
