"""Knows which pod CIDRs are free, and who gets which.

Pure: the same question has the same answer, so two leaders that see the same propose the same. Imports model only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network

from ovsmesh.mesh.types import IPNetwork

DEFAULT_LENGTH = {4: 24, 6: 64}
"""Prefix length of a node's range, as kube-controller-manager has it."""
_LONGEST = {4: 30, 6: 126}


class _Taken:
    """Ranges in use, merged, sorted by first address."""

    def __init__(self, ranges: Iterable[IPNetwork]) -> None:
        self.spans: list[tuple[int, int]] = []
        for first, last in sorted((int(r.network_address), int(r.broadcast_address)) for r in ranges):
            if self.spans and first <= self.spans[-1][1] + 1:
                self.spans[-1] = (self.spans[-1][0], max(last, self.spans[-1][1]))
            else:
                self.spans.append((first, last))

    def free(self, cluster: IPNetwork, length: int, start: int) -> int | None:
        """The first address, from `start` on, of a free range of that length in `cluster`."""
        size = 1 << (cluster.max_prefixlen - length)
        end = int(cluster.broadcast_address)
        at = max(start, int(cluster.network_address))
        at = -(-at // size) * size
        while at + size - 1 <= end:
            index = bisect_left(self.spans, (at + size,)) - 1
            if index < 0 or self.spans[index][1] < at:
                return at
            at = -(-(self.spans[index][1] + 1) // size) * size
        return None

    def take(self, first: int, size: int) -> None:
        insort(self.spans, (first, first + size - 1))


def lengths(clusters: Sequence[IPNetwork], asked: int | None) -> dict[int, int]:
    """IP version → prefix length of a node's range. `asked` is for IPv4 where the cluster has it, else for IPv6.

    Raises ValueError where no node's range of that length fits into any cluster CIDR of its version.
    """
    versions = sorted({cluster.version for cluster in clusters})
    found: dict[int, int] = {version: DEFAULT_LENGTH[version] for version in versions}
    if asked is not None and versions:
        found[versions[0]] = asked
    for version, length in found.items():
        shortest = min(cluster.prefixlen for cluster in clusters if cluster.version == version)
        if not shortest <= length <= _LONGEST[version]:
            raise ValueError(
                f"nodeSubnetLength {length} does not fit: wanted {shortest} to {_LONGEST[version]} for IPv{version}"
            )
    return found


def allocate(
    clusters: Sequence[IPNetwork], length: Mapping[int, int], taken: Iterable[IPNetwork], names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Name → a free range for each IP version of `clusters`, the first that is free; no entry where there is none.

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
