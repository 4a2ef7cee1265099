"""Ranges: the cluster CIDRs that the Nodes' pod CIDRs come from, and the pod CIDRs that are free in them.

Pure. The same question has the same answer, so two leaders that see the same propose the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from ovsmesh.controller.membership import NodeView
from ovsmesh.mesh.types import IPNetwork, MeshError
from ovsmesh.mesh.validation import LONGEST_PREFIX, range_of

DEFAULT_LENGTH = {4: 24, 6: 64}
"""Prefix length of a node's range, as in kube-controller-manager."""
_DENSITY = 256
"""At least one address in this many of a derived range must belong to a Node: a /16 around one /24 is derived."""
_SHORTEST = {4: 16, 6: 48}
"""Prefix length of the largest range that a Node may have for it to count: kube-controller-manager cuts a cluster's
range into at most 65,536."""


@lru_cache(maxsize=16384)
def network(text: str) -> IPNetwork | None:
    """Return the range that `text` names; None if it is none (its Node is refused)."""
    try:
        return ip_network(text)
    except ValueError:
        return None


# ---------------------------------------------------------------- the cluster's ranges


def derive(
    nodes: Iterable[NodeView],
    have: Sequence[str] = (),
    beside: Sequence[str] = (),
    services: Sequence[IPNetwork] = (),
) -> tuple[str, ...]:
    """Return the smallest range for each IP version around the Nodes' pod CIDRs and `have`, the last ones derived.

    kube-controller-manager gives all Nodes theirs out of one range for each version, so the smallest range around
    them is never larger than that one. A range that is too large would make other addresses unreachable: none is
    derived where the Nodes have too little of it, where an address of a Node or of `beside` lies in it, or where it
    overlaps `services`, the ranges of ClusterIPs. Raises MeshError, which says why.
    """
    nodes = list(nodes)
    texts = (text for node in nodes if not node.excluded for text in node.pod_cidrs)
    theirs = {net for text in texts if (net := network(text)) and net.prefixlen >= _SHORTEST[net.version]}
    if not theirs:
        raise MeshError("no Node has spec.podCIDRs")
    before = [net for text in have if (net := network(text))]
    outside = {address: f"of Node {node.name}" for node in nodes for address in (*node.addresses, node.asked)}
    outside |= dict.fromkeys(beside, "of the API server")
    made = []
    for version in (4, 6):
        old = [net for net in before if net.version == version]
        given = _fitting([net for net in theirs if net.version == version], old)
        around = _around([*given, *old]) if given else None
        if around is None or around in old:
            made += [str(net) for net in ([around] if around else old)]
            continue
        known = f"the smallest range around the Nodes' podCIDRs is {around}, "
        if not _dense(around, given):
            raise MeshError(f"{known}of which the Nodes have too little for it to be the cluster's")
        for text, whose in outside.items():
            if _inside(text, around):
                raise MeshError(f"{known}and {text}, the address {whose}, lies in it")
        for service in services:
            if service.overlaps(around):
                raise MeshError(f"{known}and {service}, a range of ClusterIPs, overlaps it")
        made.append(str(around))
    return tuple(made)


def _around(found: Sequence[IPNetwork]) -> IPNetwork:
    """Return the smallest network that holds all of these, which are of one version."""
    around = min(found, key=lambda net: int(net.network_address))
    last = max(range_of(net)[2] for net in found)
    while range_of(around)[2] < last:
        around = around.supernet()
    return around


def _dense(around: IPNetwork, given: Sequence[IPNetwork]) -> bool:
    """Return whether enough of a range belongs to Nodes."""
    inside = [net.num_addresses for net in given if net.network_address in around]
    return around.num_addresses <= _DENSITY * len(inside) * min(inside, default=0)


def _fitting(given: list[IPNetwork], old: Sequence[IPNetwork]) -> list[IPNetwork]:
    """Return the pod CIDRs without those that no dense range holds together with the range derived last."""
    if not old:
        return given
    around = _around(old)
    far: list[IPNetwork] = []
    for net in sorted(given, key=lambda net: -_around([around, net]).prefixlen):
        wider = _around([around, net])
        if wider == around or _dense(wider, given):
            around = wider
        else:
            far.append(net)
    return [net for net in given if net not in far]


def _inside(text: str, around: IPNetwork) -> bool:
    try:
        return ip_address(text) in around
    except ValueError:
        return False


# ---------------------------------------------------------------- the nodes' ranges


class _Taken:
    """Ranges in use, merged, sorted by first address."""

    def __init__(self, ranges: Iterable[IPNetwork]) -> None:
        self.spans: list[tuple[int, int]] = []
        for _, first, last in sorted(map(range_of, ranges)):
            if self.spans and first <= self.spans[-1][1] + 1:
                self.spans[-1] = (self.spans[-1][0], max(last, self.spans[-1][1]))
            else:
                self.spans.append((first, last))

    def free(self, cluster: IPNetwork, length: int, start: int) -> int | None:
        """Return the first address, from `start` on, of a free range of that length in `cluster`."""
        size = 1 << (cluster.max_prefixlen - length)
        _, first, end = range_of(cluster)
        at = -(-max(start, first) // size) * size
        while at + size - 1 <= end:
            index = bisect_left(self.spans, (at + size,)) - 1
            if index < 0 or self.spans[index][1] < at:
                return at
            at = -(-(self.spans[index][1] + 1) // size) * size
        return None

    def take(self, first: int, size: int) -> None:
        """Enter a range that was handed out."""
        insort(self.spans, (first, first + size - 1))


def lengths(clusters: Sequence[IPNetwork], asked: int | None) -> dict[int, int]:
    """Return IP version → prefix length of a node's range.

    `asked` is for IPv4 if the cluster has it, else for IPv6. Raises ValueError if no range of that length fits
    into a cluster CIDR of its version.
    """
    found: dict[int, int] = {
        version: DEFAULT_LENGTH[version] for version in sorted({cluster.version for cluster in clusters})
    }
    if asked is not None and found:
        found[min(found)] = asked
    for version, length in found.items():
        shortest = min(cluster.prefixlen for cluster in clusters if cluster.version == version)
        longest = LONGEST_PREFIX[version]
        if not shortest <= length <= longest:
            raise ValueError(f"nodeSubnetLength {length} does not fit: wanted {shortest} to {longest} for IPv{version}")
    return found


def allocate(
    clusters: Sequence[IPNetwork], length: Mapping[int, int], taken: Iterable[IPNetwork], names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return name → the first free range for each IP version of `clusters`; no entry where there is none.

    `taken` may hold anything, overlaps included. No two ranges handed out overlap each other or any of `taken`.
    """
    used = list(taken)
    pools = {v: _Taken(r for r in used if r.version == v) for v in length}
    cursor: dict[int, tuple[int, int]] = dict.fromkeys(length, (0, 0))
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        got: list[tuple[int, int, int, int]] = []
        for version, bits in length.items():
            ranges = [cluster for cluster in clusters if cluster.version == version]
            which, start = cursor[version]
            for number in range(which, len(ranges)):
                at = pools[version].free(ranges[number], bits, start if number == which else 0)
                if at is not None:
                    got.append((version, number, at, 1 << (ranges[number].max_prefixlen - bits)))
                    break
        if len(got) < len(length):
            return found
        texts = []
        for version, number, at, size in got:
            pools[version].take(at, size)
            cursor[version] = (number, at + size)
            made = IPv4Network if version == 4 else IPv6Network
            texts.append(str(made((at, length[version]))))
        found[name] = tuple(texts)
    return found
