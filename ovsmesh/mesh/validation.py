"""Validation of one node's entry, and of the cluster CIDRs, by themselves. Conflicts between nodes: see conflicts.

A result is remembered by its texts: reading a thousand unchanged entries again costs a thousand look-ups.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address, ip_network

from ovsmesh.errors import Problem
from ovsmesh.mesh.types import IPAddress, IPNetwork, Node
from ovsmesh.mesh.yaml_reader import show
from ovsmesh.reasons import Reason

Range = tuple[int, int, int]
"""IP version, first and last address as integers."""

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?)?")
_ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}")
_CIDR = re.compile(r"[0-9A-Fa-f.:]{2,45}/(0|[1-9][0-9]{0,2})")
LONGEST_PREFIX = {4: 30, 6: 126}
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
    """A node's entry, or one of the cluster CIDRs, can't be used: `problem` says why."""

    def __init__(self, reason: Reason, node: str, field: str, value: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(reason, message, node, field, value)


def range_of(network: IPNetwork) -> Range:
    """Return the addresses of `network` as integers, which compare faster than networks do."""
    first = int(network.network_address)
    return network.version, first, first + (1 << (network.max_prefixlen - network.prefixlen)) - 1


_SPECIAL = tuple((range_of(ip_network(network)), label) for network, label in _SPECIAL_NETWORKS)


def _special(what: Range) -> str:
    """Return what kind of address that no node or pod may have lies in `what`; "" if there is none."""
    for (version, first, last), label in _SPECIAL:
        if what[0] == version and what[1] <= last and first <= what[2]:
            return label
    return ""


def _network(text: str, reason: Reason, node: str, field: str) -> IPNetwork:
    """Return the network that `text` names. Raises Refusal, with the right range where it can be guessed."""
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
    """Return the cluster CIDRs as networks and as ranges. Raises Refusal."""
    networks: list[IPNetwork] = []
    for index, text in enumerate(texts):
        field = f"clusterCIDRs[{index}]"
        network = _network(text, Reason.ClusterCIDRInvalid, "", field)
        if label := _special(range_of(network)):
            raise Refusal(Reason.ClusterCIDRInvalid, "", field, show(text), f"reaches into the {label} range")
        for other in networks:
            if network.overlaps(other):
                raise Refusal(
                    Reason.ClusterCIDRInvalid, "", field, show(text), f"overlaps {other}: leave one of them out"
                )
        networks.append(network)
    return tuple(networks), tuple(range_of(network) for network in networks)


def is_name(text: str) -> bool:
    """Return whether a node may have this name."""
    return _NAME.fullmatch(text) is not None


@lru_cache(maxsize=32768)
def validate_node(
    name: str, address: str, cidrs: tuple[str, ...], uid: str, zone: str, clusters: tuple[str, ...]
) -> Node | Problem:
    """Return the node that an entry with these texts describes, or why it is refused.

    `clusters` are the texts of the cluster CIDRs, valid ones; with none of them no range is outside. The same
    texts give the same object. A Problem is returned, not raised, so that it is remembered too.
    """
    try:
        return _node(name, address, cidrs, uid, zone, clusters)
    except Refusal as refusal:
        return refusal.problem


def validate_again(node: Node, clusters: tuple[str, ...]) -> Node | Problem:
    """Return `node`, if these cluster CIDRs still allow it, or why not."""
    cidrs = tuple(map(str, node.pod_cidrs))
    return validate_node(node.name, str(node.address), cidrs, node.uid, node.zone, clusters)


def _node(name: str, address: str, cidrs: tuple[str, ...], uid: str, zone: str, clusters: tuple[str, ...]) -> Node:
    if not _NAME.fullmatch(name):
        message = "is not a name: wanted letters, digits, - _ . inside, at most 253 characters"
        raise Refusal(Reason.NameInvalid, "", "name", show(name), message)
    for field, text in (("uid", uid), ("zone", zone)):
        if not _LABEL.fullmatch(text):
            message = "wanted letters, digits, - _ . inside, at most 253 characters"
            raise Refusal(Reason.NodeInvalid, name, field, show(text), message)
    where = _address(name, address, clusters)
    networks: list[IPNetwork] = []
    for index, text in enumerate(cidrs):
        field = f"podCIDRs[{index}]"
        network = _network(text, Reason.PodCIDRInvalid, name, field)
        _inside(name, field, text, range_of(network), clusters)
        if network.prefixlen > LONGEST_PREFIX[network.version]:
            message = f"has no room for a gateway and a pod: wanted /{LONGEST_PREFIX[network.version]} or shorter"
            raise Refusal(Reason.PodCIDRInvalid, name, field, show(text), message)
        for before, other in enumerate(networks):
            if network.overlaps(other):
                message = f"overlaps podCIDRs[{before}] {other} of the same node: leave one of them out"
                raise Refusal(Reason.PodCIDRConflict, name, field, show(text), message)
        networks.append(network)
    return Node(name, where, tuple(networks), uid, zone)


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


@lru_cache(maxsize=16384)
def is_address(text: str, clusters: tuple[str, ...]) -> bool:
    """Return whether a node may have this tunnel address, beside these cluster CIDRs."""
    try:
        _address("", text, clusters)
    except Refusal:
        return False
    return True


def _inside(name: str, field: str, text: str, mine: Range, clusters: tuple[str, ...]) -> None:
    networks, ranges = clusters_of(clusters)
    if not ranges or any(
        mine[0] == version and first <= mine[1] and mine[2] <= last for version, first, last in ranges
    ):
        return
    message = f"is not inside spec.clusterCIDRs ({', '.join(clusters[:4])}{', …' if len(clusters) > 4 else ''})"
    if all(network.version != mine[0] for network in networks):
        message += f", which has no IPv{mine[0]} range: add one"
    raise Refusal(Reason.PodCIDROutside, name, field, show(text), message)
