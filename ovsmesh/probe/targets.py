"""Which paths a node probes: to each peer that it joins, in each IP family that both have."""

from __future__ import annotations

from typing import NamedTuple

from ovsmesh.dataplane import desired
from ovsmesh.dataplane.types import Dataplane, Facts
from ovsmesh.mesh.types import IPAddress, Mesh


class Target(NamedTuple):
    """One path of a peer: from one of this node's gateways to one of the peer's; `size` is the pods' MTU in bytes."""

    source: IPAddress
    destination: IPAddress
    size: int
    source_mac: str
    destination_mac: str
    let_in: bool
    """Whether this node's switch lets in what the peer forwards back."""


def targets(mesh: Mesh, self_name: str, facts: Facts, have: Dataplane | None = None) -> dict[str, tuple[Target, ...]]:
    """Return the paths to each peer, from gateway to gateway, at the MTU of the pods; {} for a node not in the mesh.

    `have` is what was observed: without the flows that let loops in, only echo requests can be sent.
    """
    me = mesh.node(self_name)
    if me is None:
        return {}
    wiring = desired.wiring(mesh, me, facts)
    own = desired.gateways(me, facts)
    let_in = {
        version: have is not None and have.flows.get(key) == actions
        for version, (key, actions) in desired.loop_flows(me, facts).items()
    }
    joined, _ = desired.peers(mesh, me, wiring)
    found = {}
    for node in mesh.nodes:
        if node.name in joined:
            theirs = desired.gateways(node, facts)
            mac = desired.mac(node)
            found[node.name] = tuple(
                Target(own[version], theirs[version], wiring.mtu, wiring.mac, mac, let_in[version])
                for version in sorted(own.keys() & theirs.keys())
            )
    return found
