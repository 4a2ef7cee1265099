"""Which paths a node probes: to each peer that it joins, in each IP family that both have."""

from __future__ import annotations

from typing import NamedTuple

from ovsmesh.dataplane import desired
from ovsmesh.dataplane.types import Facts
from ovsmesh.mesh.types import IPAddress, Mesh, gateway


class Target(NamedTuple):
    """One path of a peer: from one of this node's gateways to one of the peer's; `size` is the pods' MTU in bytes."""

    source: IPAddress
    destination: IPAddress
    size: int


def targets(mesh: Mesh, self_name: str, facts: Facts) -> dict[str, tuple[Target, ...]]:
    """Return the paths to each peer, from gateway to gateway, at the MTU of the pods; {} for a node not in the mesh."""
    me = mesh.node(self_name)
    if me is None:
        return {}
    wiring = desired.wiring(mesh, me, facts)
    own = {cidr.version: gateway(cidr) for cidr in reversed(me.pod_cidrs) if cidr.version in wiring.families}
    joined, _ = desired.peers(mesh, me, wiring)
    found = {}
    for node in mesh.nodes:
        if node.name in joined:
            theirs = {cidr.version: gateway(cidr) for cidr in reversed(node.pod_cidrs)}
            found[node.name] = tuple(
                Target(own[version], theirs[version], wiring.mtu) for version in sorted(own.keys() & theirs.keys())
            )
    return found
