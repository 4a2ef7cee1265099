"""The mesh as users describe it: the nodes, and what all of them must agree on. Everything is frozen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from ovsmesh.errors import OvsmeshError
from ovsmesh.names import ENCAPSULATIONS as ENCAPSULATIONS

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


def gateway(pod_cidr: IPNetwork) -> IPAddress:
    """Return the first usable address of a pod CIDR: its node's own address on kbr0."""
    return pod_cidr.network_address + 1


def within(inner: IPNetwork, outer: IPNetwork) -> bool:
    """Return whether a range lies in another one; never in one of the other IP version."""
    # mypy does not see that both are of one version
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


class MeshError(OvsmeshError):
    """A mesh that can't be used as a whole: unreadable, not YAML, of the wrong kind, with an unknown key."""


@dataclass(frozen=True, slots=True)
class Node:
    """A host in the mesh. `address` is its tunnel address; `pod_cidrs` has at least one range."""

    name: str
    address: IPAddress
    pod_cidrs: tuple[IPNetwork, ...]
    uid: str = ""
    zone: str = ""


def mac(node: Node) -> str:
    """Return the MAC of a node's kbr0. Every other node computes it alone, so no ARP crosses a tunnel.

    It is 0a:58 and the bytes of the first IPv4 gateway, as the CNI bridge plugin does it; for a node without IPv4,
    0e:58 and four bytes of a hash of its first gateway.
    """
    for cidr in node.pod_cidrs:
        if isinstance(cidr, IPv4Network):
            return "0a:58:" + gateway(cidr).packed.hex(":")
    return "0e:58:" + hashlib.sha256(gateway(node.pod_cidrs[0]).packed).digest()[:4].hex(":")


class MeshSettings(NamedTuple):
    """What all nodes of a mesh must agree on."""

    cluster_cidrs: tuple[IPNetwork, ...]
    encapsulation: str = "gre"
    key: int | None = None
    mtu: int | None = None
    """Pod MTU in bytes; None derives it from the underlay."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """All nodes joined, and what they must agree on. `nodes` is sorted by name; names are unique."""

    cluster_cidrs: tuple[IPNetwork, ...]
    nodes: tuple[Node, ...] = ()
    encapsulation: str = "gre"
    key: int | None = None
    mtu: int | None = None
    """Pod MTU in bytes; None derives it from the underlay."""

    @property
    def settings(self) -> MeshSettings:
        return MeshSettings(self.cluster_cidrs, self.encapsulation, self.key, self.mtu)

    def node(self, name: str) -> Node | None:
        """Return the node called `name`; None if there is none."""
        return next((n for n in self.nodes if n.name == name), None)
