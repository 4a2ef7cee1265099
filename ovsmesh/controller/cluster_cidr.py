"""Knows which cluster CIDRs the Nodes' pod CIDRs come from, where nobody has said them.

kube-controller-manager gives all Nodes theirs out of one range for each IP version, so the smallest range around
them never is larger than that one. Where they look as if they came from elsewhere nothing is derived: a range that
is too large would make addresses unreachable that are no pods'. Pure: imports model and membership only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network

from ovsmesh.controller.membership import NodeView
from ovsmesh.mesh.types import IPAddress, IPNetwork, MeshError

_DENSITY = 256
"""At least one in so many addresses of a derived range must be a Node's: a /16 around one /24 may be."""


def derive(nodes: Iterable[NodeView], have: Sequence[str] = (), beside: Sequence[str] = ()) -> tuple[str, ...]:
    """The smallest range for each IP version around the Nodes' pod CIDRs and what was derived before, `have`.

    `beside` are addresses that must not be in it, besides those of the Nodes. Raises MeshError with why not.
    """
    nodes = list(nodes)
    members = [node for node in nodes if not node.excluded]
    theirs = {net for node in members for text in node.pod_cidrs if (net := _network(text)) is not None}
    if not theirs:
        raise MeshError("no Node has spec.podCIDRs")
    before = {net for text in have if (net := _network(text)) is not None}
    outside = {a: f"of Node {n.name}" for n in nodes for a in (*n.addresses, n.asked)}
    outside |= dict.fromkeys(beside, "of the API server")
    made = []
    for version in (4, 6):
        given = [net for net in theirs if net.version == version]
        if not given:
            made += [str(net) for net in before if net.version == version]
            continue
        around = _around([*given, *(net for net in before if net.version == version)])
        if around in before:
            made.append(str(around))
            continue
        known = f"the smallest range around the Nodes' podCIDRs is {around}, "
        if around.num_addresses > _DENSITY * sum(net.num_addresses for net in given):
            raise MeshError(f"{known}of which the Nodes have too little for it to be the cluster's")
        for text, whose in outside.items():
            address = _address(text)
            if address is not None and address in around:
                raise MeshError(f"{known}and {text}, the address {whose}, lies in it")
        made.append(str(around))
    return tuple(made)


def _around(found: Sequence[IPNetwork]) -> IPNetwork:
    """The smallest network that holds all of these, which are of one version."""
    first = min(found, key=lambda net: int(net.network_address))
    last = max(int(net.broadcast_address) for net in found)
    around = first
    while int(around.broadcast_address) < last:
        around = around.supernet()
    return around


@lru_cache(maxsize=16384)
def _network(text: str) -> IPNetwork | None:
    try:
        return ip_network(text)
    except ValueError:
        return None  # refused with its Node


@lru_cache(maxsize=16384)
def _address(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
