"""What an address is in the mesh: whose pod, gateway or tunnel address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ovsmesh.errors import OvsmeshError
from ovsmesh.mesh.types import IPAddress, Mesh, gateway
from ovsmesh.text import listed, printable
from ovsmesh.trace.types import Kind, Place


def place(
    mesh: Mesh, address: IPAddress, name: str = "", host: str = "", own: Mapping[str, str] | None = None
) -> Place:
    """Return what the address is. Raises OvsmeshError with the nearest ranges where it is nothing of the mesh.

    `own`: the addresses of the node `host`, whatever they are for, and the link of each.
    """
    for node in mesh.nodes:
        if address == node.address:
            return Place(address, Kind.TUNNEL, node.name, None, name)
        for cidr in node.pod_cidrs:
            if address in cidr:
                return Place(address, Kind.GATEWAY if address == gateway(cidr) else Kind.POD, node.name, cidr, name)
    here = mesh.node(host)
    if here is not None and (link := (own or {}).get(str(address))):
        mine = next((str(gateway(cidr)) for cidr in here.pod_cidrs if cidr.version == address.version), "")
        return Place(address, Kind.OTHER, host, None, name, link, mine)
    what = f"{printable(name, 80)} has the address {address}, which" if name else str(address)
    raise OvsmeshError(f"{what} is in no node's pod CIDR and is no tunnel address; nearest: {_nearest(mesh, address)}")


def _nearest(mesh: Mesh, address: IPAddress) -> str:
    def distance(start: IPAddress, end: IPAddress) -> int:
        return max(int(start) - int(address), int(address) - int(end), 0)

    near = [
        (distance(cidr.network_address, cidr.broadcast_address), f"{cidr} ({node.name})")
        for node in mesh.nodes
        for cidr in node.pod_cidrs
        if cidr.version == address.version
    ]
    near += [
        (distance(node.address, node.address), f"{node.address} ({node.name})")
        for node in mesh.nodes
        if node.address.version == address.version
    ]
    inside = [str(cidr) for cidr in mesh.cluster_cidrs if address in cidr]
    where = f" (it is inside the cluster CIDR {inside[0]}, in a range that no node has)" if inside else ""
    return (listed([text for _, text in sorted(near)[:3]]) or f"no node has IPv{address.version}") + where


def of_node(mesh: Mesh, name: str) -> tuple[IPAddress, ...]:
    """Return the gateways of the node of that name, () where there is none."""
    node = mesh.node(name)
    return tuple(gateway(cidr) for cidr in node.pod_cidrs) if node else ()


def pair(
    mesh: Mesh,
    source: tuple[str, Iterable[IPAddress]],
    target: tuple[str, Iterable[IPAddress]],
    host: str = "",
    own: Mapping[str, str] | None = None,
) -> tuple[Place, Place]:
    """Return both ends in one address family, IPv4 where both have it. Each is (what the user called it, addresses).

    `host` and `own`: see place. Raises OvsmeshError where they have none in common, or an address is nothing of the
    mesh.
    """
    (source_name, ours), (target_name, theirs) = (source[0], list(source[1])), (target[0], list(target[1]))
    for version in (4, 6):
        one = next((a for a in ours if a.version == version), None)
        other = next((a for a in theirs if a.version == version), None)
        if one is not None and other is not None:
            return place(mesh, one, source_name, host, own), place(mesh, other, target_name, host, own)
    raise OvsmeshError(
        f"{listed(ours)} and {listed(theirs)} have no IP version in common; give two addresses of one version"
    )
