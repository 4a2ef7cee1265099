"""Knows what a node of a mesh may claim (a name, a tunnel address, pod CIDRs), and who wins where two claim one thing.

A claim is checked once and remembered by its text: reading a thousand entries again costs a thousand look-ups.
Imports model and yamltree (for quoting) only.
"""

from __future__ import annotations

import re
from bisect import bisect_right, insort
from functools import lru_cache
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import NamedTuple

from ovsmesh.errors import Problem
from ovsmesh.mesh.types import IPAddress, IPNetwork, Mesh, Node
from ovsmesh.mesh.yaml_reader import show
from ovsmesh.reasons import Reason

Range = tuple[int, int, int]
"""IP version, first and last address as integers."""

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?)?")
_ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}")
_CIDR = re.compile(r"[0-9A-Fa-f.:]{2,45}/(0|[1-9][0-9]{0,2})")
_LONGEST = {4: 30, 6: 126}
"""Longest prefix with room for the network address, the gateway and one pod."""
_SPECIAL_NETWORKS = (
    ("0.0.0.0/8", "unspecified"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::ffff:0:0/96", "IPv4-mapped"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
)


class Refusal(Exception):
    """Why a node's entry, or one of the cluster CIDRs, can't be used."""

    def __init__(self, reason: Reason, node: str, field: str, value: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.node, self.field, self.value, self.message = reason, node, field, value, message

    def about(self, node: str) -> Refusal:
        return Refusal(self.reason, node, self.field, self.value, self.message)

    def problem(self, addition: str = "") -> Problem:
        return Problem(self.reason, self.message + addition, self.node, self.field, self.value)


class Claim(NamedTuple):
    """A node whose entry is good by itself; the rest is kept ready for comparing it with the others."""

    node: Node
    address: str
    ranges: tuple[Range, ...]


def _range(network: IPNetwork) -> Range:
    return network.version, int(network.network_address), int(network.broadcast_address)


_SPECIAL = tuple((_range(ip_network(network)), label) for network, label in _SPECIAL_NETWORKS)


def _special(what: Range) -> str:
    """What kind of address that no node or pod may have lies in `what`; "" when there is none."""
    for (version, first, last), label in _SPECIAL:
        if what[0] == version and what[1] <= last and first <= what[2]:
            return label
    return ""


def _network(text: str, reason: Reason, node: str, field: str) -> IPNetwork:
    """Raises Refusal, with the right range where it can be guessed."""
    if _CIDR.fullmatch(text):
        try:
            return ip_network(text)
        except ValueError:
            pass
        try:
            right = ip_network(text, strict=False)
        except ValueError:
            pass
        else:
            raise Refusal(reason, node, field, show(text), f"has host bits set; the range it lies in is {right}")
    hint = ", with the prefix length after a slash" if _ADDRESS.fullmatch(text) else ""
    raise Refusal(reason, node, field, show(text), f"is not a CIDR such as 10.97.1.0/24 or fd00:97:1::/64{hint}")


@lru_cache(maxsize=16)
def clusters_of(texts: tuple[str, ...]) -> tuple[tuple[IPNetwork, ...], tuple[Range, ...]]:
    """The cluster CIDRs, as networks and as ranges. Raises Refusal (not remembered)."""
    networks: list[IPNetwork] = []
    for index, text in enumerate(texts):
        field = f"clusterCIDRs[{index}]"
        network = _network(text, Reason.ClusterCIDRInvalid, "", field)
        if label := _special(_range(network)):
            raise Refusal(Reason.ClusterCIDRInvalid, "", field, show(text), f"reaches into the {label} range")
        for other in networks:
            if network.overlaps(other):
                raise Refusal(
                    Reason.ClusterCIDRInvalid, "", field, show(text), f"overlaps {other}: leave one of them out"
                )
        networks.append(network)
    return tuple(networks), tuple(_range(network) for network in networks)


@lru_cache(maxsize=32768)
def claim(
    name: str, address: str, cidrs: tuple[str, ...], uid: str, zone: str, clusters: tuple[str, ...]
) -> Claim | Refusal:
    """What an entry with these texts claims, or why it is refused; the same object for the same texts.

    `clusters` are texts that clusters_of() takes. A Refusal is returned, not raised, to be remembered too.
    """
    try:
        return _claim(name, address, cidrs, uid, zone, clusters)
    except Refusal as refusal:
        return refusal.with_traceback(None)


def _claim(
    name: str, address: str, cidrs: tuple[str, ...], uid: str, zone: str, clusters: tuple[str, ...]
) -> Claim | Refusal:
    if not _NAME.fullmatch(name):
        message = "is not a name: wanted letters, digits, - _ . inside, at most 253 characters"
        raise Refusal(Reason.NameInvalid, "", "name", show(name), message)
    for field, text in (("uid", uid), ("zone", zone)):
        if not _LABEL.fullmatch(text):
            message = "wanted letters, digits, - _ . inside, at most 253 characters"
            raise Refusal(Reason.NodeInvalid, name, field, show(text), message)
    where = _address(name, address, clusters)
    networks: list[IPNetwork] = []
    ranges: list[Range] = []
    for index, text in enumerate(cidrs):
        field = f"podCIDRs[{index}]"
        network = _network(text, Reason.PodCIDRInvalid, name, field)
        mine = _range(network)
        _inside(name, field, text, mine, clusters)
        if network.prefixlen > _LONGEST[network.version]:
            message = f"has no room for a gateway and a pod: wanted /{_LONGEST[network.version]} or shorter"
            raise Refusal(Reason.PodCIDRInvalid, name, field, show(text), message)
        for before, other in enumerate(networks):
            if network.overlaps(other):
                message = f"overlaps podCIDRs[{before}] {other} of the same node: leave one of them out"
                raise Refusal(Reason.PodCIDRConflict, name, field, show(text), message)
        networks.append(network)
        ranges.append(mine)
    return Claim(Node(name, where, tuple(networks), uid, zone), str(where), tuple(ranges))


def _address(name: str, text: str, clusters: tuple[str, ...]) -> IPAddress:
    def refuse(message: str) -> Refusal:
        return Refusal(Reason.AddressInvalid, name, "address", show(text), message)

    if not _ADDRESS.fullmatch(text):
        hint = ": leave out the prefix length" if "/" in text else ""
        raise refuse(f"is not an IP address such as 192.0.2.11 or 2001:db8::11{hint}")
    try:
        address = ip_address(text)
    except ValueError:
        raise refuse("is not an IP address such as 192.0.2.11 or 2001:db8::11") from None
    mine = (address.version, int(address), int(address))
    if address.version == 4 and int(address) == 0xFFFFFFFF:
        raise refuse("is the broadcast address: give the node's own")
    if label := _special(mine):
        article = "an" if label[0] in "uIi" else "a"
        raise refuse(f"is {article} {label} address, which no tunnel can go to: give one that the other nodes reach")
    networks, ranges = clusters_of(clusters)
    for network, (version, first, last) in zip(networks, ranges, strict=True):
        if mine[0] == version and first <= mine[1] <= last:
            raise refuse(f"lies inside the cluster CIDR {network}: a tunnel's own address can't be behind the tunnel")
    return address


def _inside(name: str, field: str, text: str, mine: Range, clusters: tuple[str, ...]) -> None:
    networks, ranges = clusters_of(clusters)
    if any(mine[0] == version and first <= mine[1] and mine[2] <= last for version, first, last in ranges):
        return
    message = f"is not inside spec.clusterCIDRs ({', '.join(clusters[:4])}{', …' if len(clusters) > 4 else ''})"
    if all(network.version != mine[0] for network in networks):
        message += f", which has no IPv{mine[0]} range: add one"
    raise Refusal(Reason.PodCIDROutside, name, field, show(text), message)


# ---------------------------------------------------------------- two claims for one thing


class _Index:
    """Who holds what. The ranges in it never overlap, so the nearest below is the only one that can be hit."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.ranges: list[tuple[int, int, int, str]] = []

    def hit(self, what: Range) -> tuple[int, int, int, str] | None:
        version, first, last = what
        at = bisect_right(self.ranges, (version, last + 1)) - 1
        if at < 0:
            return None
        near = self.ranges[at]
        return near if near[0] == version and near[2] >= first else None

    def clash(self, who: Claim) -> tuple[int, str] | None:
        """The first thing in `who` that another holds: index of the pod CIDR (-1: the address), and the holder."""
        name = who.node.name
        holder = self.addresses.get(who.address, name)
        if holder != name:
            return -1, holder
        for index, what in enumerate(who.ranges):
            near = self.hit(what)
            if near is not None and near[3] != name:
                return index, near[3]
        return None

    def add(self, who: Claim, only: Claim | None = None) -> None:
        """Takes in what `who` claims; with `only`, no more of it than both do."""
        name = who.node.name
        if only is None or only.address == who.address:
            self.addresses.setdefault(who.address, name)
        for what in who.ranges if only is None else set(who.ranges) & set(only.ranges):
            if self.hit(what) is None:
                insort(self.ranges, (*what, name))


def _peaceful(claims: list[Claim]) -> bool:
    """True when no two of `claims` meet: the usual case, told apart by one sort."""
    if len({c.node.name for c in claims}) < len(claims) or len({c.address for c in claims}) < len(claims):
        return False
    ranges = sorted([r for c in claims for r in c.ranges])
    return all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(ranges))


def settle(
    found: list[tuple[Claim, int]], refused: list[tuple[Refusal, int]], last: Mesh | None, clusters: tuple[str, ...]
) -> tuple[tuple[Node, ...], tuple[Problem, ...]]:
    """The nodes that stay, sorted by name, and a Problem for each entry that does not.

    `found` and `refused` come in the order of the file, each with its line (0: unknown). Whoever held exactly
    that name, address or range in `last` keeps it, otherwise the first in the file. A refused node keeps its
    entry of `last` where that meets no good one.
    """
    old = {node.name: node for node in last.nodes} if last is not None else {}
    good = [c for c, _ in found]
    if not _peaceful(good):
        good, losers = _contest(found, old, clusters)
        refused = refused + losers
    nodes = []
    for c in good:
        before = old.get(c.node.name)
        nodes.append(before if before is not None and before == c.node else c.node)
    problems: list[Problem] = []
    if refused:
        nodes, problems = _keep(good, nodes, refused, old, clusters)
    nodes.sort(key=lambda node: node.name)
    return tuple(nodes), tuple(problems)


def _again(node: Node, clusters: tuple[str, ...]) -> Claim | None:
    """The claim of a node of the last mesh; None where these cluster CIDRs no longer allow it."""
    cidrs = tuple(map(str, node.pod_cidrs))
    found = claim(node.name, str(node.address), cidrs, node.uid, node.zone, clusters)
    return found if isinstance(found, Claim) else None


def _line(line: int) -> str:
    return f" (line {line})" if line else ""


def _contest(
    found: list[tuple[Claim, int]], old: dict[str, Node], clusters: tuple[str, ...]
) -> tuple[list[Claim], list[tuple[Refusal, int]]]:
    losers: list[tuple[Refusal, int]] = []
    by_name: dict[str, tuple[Claim, int]] = {}
    for entry in found:
        name = entry[0].node.name
        first = by_name.setdefault(name, entry)
        if first is entry:
            continue
        held = old.get(name)
        newcomer = held is not None and entry[0].node == held and first[0].node != held
        winner, loser = (entry, first) if newcomer else (first, entry)
        by_name[name] = winner
        why = "it is the one that held until now" if newcomer else "it comes first"
        message = f"is the name of another entry too{_line(winner[1])}; that one counts, as {why}: rename or remove one"
        losers.append((Refusal(Reason.DuplicateName, name, "name", show(name), message), loser[1]))
    taken = _Index()
    held_by: dict[str, Claim] = {}
    for name, (mine, _) in by_name.items():
        before = _again(old[name], clusters) if name in old else None
        if before is not None:
            held_by[name] = before
            taken.add(mine, only=before)
    good: list[Claim] = []
    for mine, line in by_name.values():
        clash = taken.clash(mine)
        if clash is None:
            taken.add(mine)
            good.append(mine)
            continue
        index, holder = clash
        losers.append((_lost(mine, index, by_name[holder], held_by.get(holder)), line))
    return good, losers


def _lost(mine: Claim, index: int, winner: tuple[Claim, int], held: Claim | None) -> Refusal:
    other, line = winner
    if index < 0:
        reason, field, value = Reason.AddressConflict, "address", mine.address
        older = held is not None and held.address == value
        message = f"is the address of node {other.node.name} too"
    else:
        reason, field, value = Reason.PodCIDRConflict, f"podCIDRs[{index}]", str(mine.node.pod_cidrs[index])
        theirs = next(i for i, r in enumerate(other.ranges) if _meet(r, mine.ranges[index]))
        older = held is not None and other.ranges[theirs] in held.ranges
        message = f"overlaps {other.node.pod_cidrs[theirs]} of node {other.node.name}"
    why = "which held it before" if older else "which comes first in the file"
    return Refusal(reason, mine.node.name, field, value, f"{message}{_line(line)}, {why}: give this node another")


def _meet(a: Range, b: Range) -> bool:
    return a[0] == b[0] and a[1] <= b[2] and b[1] <= a[2]


def _keep(
    good: list[Claim],
    nodes: list[Node],
    refused: list[tuple[Refusal, int]],
    old: dict[str, Node],
    clusters: tuple[str, ...],
) -> tuple[list[Node], list[Problem]]:
    """Adds to `nodes` the last good entries of the refused; says of each refusal what became of it."""
    taken = _Index()
    for c in good:
        taken.add(c)
    there = {c.node.name for c in good}
    kept: set[str] = set()
    for name in sorted({r.node for r, _ in refused} & old.keys() - there):
        before = _again(old[name], clusters)
        if before is not None and taken.clash(before) is None:
            taken.add(before)
            kept.add(name)
            nodes.append(old[name])
    problems = []
    for refusal, line in refused:
        if refusal.node in kept:
            end = "; keeping its last good entry"
        elif refusal.node in there:
            end = "; its other entry is used"
        elif refusal.node in old:
            end = (
                "; its last good entry can't be kept either, others have taken from it or the cluster's ranges changed"
            )
        else:
            end = "; the node is left out"
        problems.append(refusal.problem(_line(line) + end))
    return nodes, problems
