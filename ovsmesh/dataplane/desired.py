"""Compute the dataplane that a node should have from the mesh, the node's name and its host's facts.

The same input gives the same output on every node, so two nodes agree on both ends of a tunnel without talking.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address
from typing import Any

from ovsmesh.dataplane import cni_config, docker_config, firewall_rules
from ovsmesh.dataplane.nft_syntax import sets_used
from ovsmesh.dataplane.types import (
    FALLBACK_METRIC,
    KBR,
    OBR,
    PEER_KINDS,
    ROUTE_METRIC,
    Bridge,
    Dataplane,
    Facts,
    Link,
    Port,
    Route,
)
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.mesh.types import IPAddress, IPNetwork, Mesh, Node, gateway
from ovsmesh.mesh.types import mac as mac
from ovsmesh.reasons import Reason

_PREFIX = {"gre": "gre-", "vxlan": "vx-", "geneve": "gnv-"}
_OVERHEAD = {"gre": 38, "vxlan": 50, "geneve": 50}
"""Bytes of outer IPv4, encapsulation and inner Ethernet headers (RFC 2784, 7348, 8926)."""
_GRE_KEY = 4
_IPV6_MORE = 20
_DEFAULT_UNDERLAY_MTU = 1500
_MIN_IPV6_MTU = 1280
"""RFC 8200 section 5: a link below it can't carry IPv6."""
_NAME_MAX = 15
"""IFNAMSIZ - 1."""


def port_name(node_name: str, encapsulation: str) -> str:
    """Return the tunnel port's name: the node's own where it fits an interface name, else a hash of it.

    The two forms can't be equal: the second has an underscore, the first never.
    """
    prefix = _PREFIX[encapsulation]
    if len(prefix + node_name) <= _NAME_MAX and re.fullmatch(r"[a-z0-9.-]+", node_name):
        return prefix + node_name
    digest = base64.b32encode(hashlib.sha256(node_name.encode()).digest()).decode().lower()
    return f"{prefix}{re.sub('[^a-z0-9]', '', node_name.lower())[:2]}_{digest}"[:_NAME_MAX]


def overhead(mesh: Mesh, address: IPAddress) -> int:
    """Return the bytes that encapsulation takes from the underlay's MTU, for a tunnel address of this family."""
    keyed = _GRE_KEY if mesh.key is not None and mesh.encapsulation == "gre" else 0
    return _OVERHEAD[mesh.encapsulation] + keyed + (_IPV6_MORE if address.version == 6 else 0)


def pod_mtu(mesh: Mesh, self_node: Node, facts: Facts) -> int:
    """Return the MTU of pods, kbr0, obr0 and routes in bytes: what fits the underlay, or less where the mesh says so.

    While the way to a peer is not known, it does not grow: an address or a route that is away for a moment comes back.
    Where nothing is known, an underlay of 1500 is assumed.
    """
    kept, extra = facts.kept_mtu, overhead(mesh, self_node.address)
    if facts.underlay_mtu is None:
        fits = kept or _DEFAULT_UNDERLAY_MTU - extra
    else:
        fits = facts.underlay_mtu - extra
        if kept and mesh.mtu is None:
            fits = min(fits, kept)
    return fits if mesh.mtu is None else min(mesh.mtu, fits)


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the parts of every peer depend on besides the peer: equal wiring and peer, equal parts."""

    encapsulation: str
    key: str
    local: str
    mac: str
    mtu: int
    families: tuple[int, ...]
    """IP versions of this node's own pods: it has no use for a peer's ranges of the other version."""
    path_mtus: Mapping[str, int] = field(default_factory=dict, compare=False)
    """See Facts. Each is of one peer, so it does not count in a comparison."""

    def route_mtu(self, peer: Node, version: int) -> int:
        """Return the MTU of the routes to a peer in bytes: what its path carries. IPv6 has no smaller one than 1280."""
        mtu = min(self.mtu, self.path_mtus.get(peer.name, self.mtu))
        return mtu if version == 4 else max(mtu, min(self.mtu, _MIN_IPV6_MTU))


def wiring(mesh: Mesh, self_node: Node, facts: Facts) -> Wiring:
    """Return what the parts of every peer depend on."""
    key = "" if mesh.key is None else str(mesh.key)
    families = sorted({c.version for c in self_node.pod_cidrs if facts.ipv6 or c.version == 4})
    mtu = pod_mtu(mesh, self_node, facts)
    me = str(self_node.address), mac(self_node)
    return Wiring(mesh.encapsulation, key, *me, mtu, tuple(families), facts.path_mtus)


_cache: dict[str, tuple[Node, Wiring, int | None, Dataplane]] = {}
"""Node name → its parts as computed last: of a thousand peers, most often one is new and 999 are looked up."""
_CACHE_MAX = 20000


def peer_parts(w: Wiring, peer: Node) -> Dataplane:
    """Return the parts of the dataplane that exist because of one peer. Nothing else grows with the mesh."""
    known, path_mtu = _cache.get(peer.name), w.path_mtus.get(peer.name)
    if known is not None and known[:3] == (peer, w, path_mtu):
        return known[3]
    port, peer_mac = port_name(peer.name, w.encapsulation), mac(peer)
    cidrs = [c for c in peer.pod_cidrs if c.version in w.families]
    flows = {f"100 dl_dst={peer_mac},in_port=LOCAL": f"output:{port}"}
    for source in (*cidrs, peer.address):
        family = "ip,nw_src" if source.version == 4 else "ipv6,ipv6_src"
        flows[f"100 dl_dst={w.mac},in_port={port},{family}={source}"] = "LOCAL"
    set_address, set_name = firewall_rules.peer_set(peer)
    parts = Dataplane(
        filter_peers={set_address: set_name} | firewall_rules.range_sets(cidrs),
        ports={port: Port(w.encapsulation, str(peer.address), w.local, w.key, peer.name, peer.uid)},
        flows=flows,
        neighbours={str(gateway(c)): peer_mac for c in cidrs},
        fdb={peer_mac: OBR},
        routes={
            (str(c), ROUTE_METRIC): Route("unicast", str(gateway(c)), KBR, w.route_mtu(peer, c.version)) for c in cidrs
        },
    )
    if len(_cache) > _CACHE_MAX:
        _cache.clear()
    _cache[peer.name] = (peer, w, path_mtu, parts)
    return parts


def peers(mesh: Mesh, me: Node, w: Wiring) -> tuple[dict[str, Dataplane], tuple[Problem, ...]]:
    """Return the parts of each peer that self joins, by name, and why the others can't be joined.

    A peer can't be joined where its address family is another one, or its derived MAC or port name is taken.
    """
    taken: dict[str, str] = {w.mac: me.name}
    joined: dict[str, Dataplane] = {}
    problems: list[Problem] = []
    for node in mesh.nodes:
        if node.name == me.name:
            continue
        if node.address.version != me.address.version:
            text = f"is of another address family than {me.name}'s {me.address}; a tunnel has both ends in one"
            problems.append(Problem(Reason.AddressFamilyMismatch, text, node.name, "address", str(node.address)))
            continue
        parts = peer_parts(w, node)
        names = (*parts.fdb, *parts.ports)
        holder = next((taken[name] for name in names if name in taken), None)
        if holder is not None:
            text = f"its derived MAC or port name ({' or '.join(names)}) is {holder}'s too; rename or renumber one"
            problems.append(Problem(Reason.DerivedNameConflict, text, node.name))
            continue
        taken |= dict.fromkeys(names, node.name)
        joined[node.name] = parts
    return joined, tuple(problems)


def _self(mesh: Mesh, self_name: str) -> Node:
    me = mesh.node(self_name)
    if me is None:
        known = ", ".join(n.name for n in mesh.nodes[:10]) or "none"
        raise OvsmeshError(f"node {self_name} is not in the mesh (nodes there: {known}); set --node or add it")
    return me


def loop_flows(me: Node, facts: Facts) -> dict[int, tuple[str, str]]:
    """Return, for each IP version of a node's pods, the flow that lets in what peers forward back to it: its loops.

    A loop is an echo request from the node's own gateway address to the same (see probe.path). The flow is one a
    node, whichever peer it comes from. The host must not see a packet from its own address, which it would log: the
    frame gets an address that no bridge passes on (IEEE 802.1D, table 7-10), and is read on obr0 itself.
    """
    found: dict[int, tuple[str, str]] = {}
    for version, address in gateways(me, facts).items():
        match = (
            "icmp,icmp_type=8,nw_dst={0},nw_src={0}"
            if version == 4
            else "icmp6,icmp_type=128,ipv6_dst={0},ipv6_src={0}"
        )
        found[version] = f"50 dl_dst={mac(me)},{match.format(address)}", "mod_dl_dst:01:80:c2:00:00:01,LOCAL"
    return found


def gateways(me: Node, facts: Facts) -> dict[int, IPAddress]:
    """Return the gateway of a node's first range in each IP version that its kernel has."""
    found: dict[int, IPAddress] = {}
    for cidr in me.pod_cidrs:
        if facts.ipv6 or cidr.version == 4:
            found.setdefault(cidr.version, gateway(cidr))
    return found


def _sysctls(me: Node, facts: Facts) -> dict[str, str]:
    v6 = facts.ipv6 and any(c.version == 6 for c in me.pod_cidrs)
    # ip_forward first: the kernel resets other settings when it flips
    values = {"net/ipv4/ip_forward": "1"}
    if v6:
        # a router ignores advertisements unless told otherwise, and would lose its own default route
        values |= {f"net/ipv6/conf/{link}/accept_ra": "2" for link in facts.ra_links}
        values["net/ipv6/conf/all/forwarding"] = "1"
        # each link has its own switch as well, which conf/default sets when the link is made
        values[f"net/ipv6/conf/{KBR}/forwarding"] = "1"
    values |= {
        f"net/ipv4/conf/{KBR}/forwarding": "1",
        # a redirected pod would send through OVS directly, where nothing can answer "fragmentation needed"
        "net/ipv4/conf/all/send_redirects": "0",
        f"net/ipv4/conf/{KBR}/send_redirects": "0",
        # loose: a peer's host process may bind its tunnel address, whose route is not through kbr0
        f"net/ipv4/conf/{KBR}/rp_filter": "2",
        f"net/ipv4/conf/{KBR}/accept_redirects": "0",
        # with 8, which conf/default may say too, nobody answers a pod that asks for its gateway's MAC
        f"net/ipv4/conf/{KBR}/arp_ignore": "0",
    }
    if facts.ipv6:
        if v6:
            values[f"net/ipv6/conf/{KBR}/disable_ipv6"] = "0"
            # the kernel asks for no pod's MAC before duplicate address detection has ended
            values[f"net/ipv6/conf/{KBR}/accept_dad"] = "0"
            # the kernel asks for a pod's MAC from a link-local address, which a link with mode 1 never gets
            values[f"net/ipv6/conf/{KBR}/addr_gen_mode"] = "0"
        # a pod could make itself the host's router
        values |= {f"net/ipv6/conf/{KBR}/accept_ra": "0", f"net/ipv6/conf/{KBR}/accept_redirects": "0"}
    return values


def _problems(mesh: Mesh, me: Node, facts: Facts, mtu: int) -> list[Problem]:
    found = []
    if not facts.tunnel_address:
        text = "is on no link of this host, so no tunnel can work; assign it to a link or correct the mesh"
        found.append(Problem(Reason.TunnelAddressMissing, text, me.name, "address", str(me.address)))
    elif facts.datapath_type == "netdev" and not facts.datapath_carried:
        text = (
            "is on no bridge of the userspace datapath, and this kernel has no openvswitch: no tunnel packet can leave"
        )
        found.append(Problem(Reason.DatapathMissing, text, me.name, "address", str(me.address)))
    if mesh.mtu is not None and mesh.mtu > mtu and facts.underlay_mtu is not None:
        text = (
            f"does not fit the underlay's {facts.underlay_mtu} less {overhead(mesh, me.address)} bytes; {mtu} is used"
        )
        found.append(Problem(Reason.MTUTooHigh, text, field="mtu", value=str(mesh.mtu)))
    for number, cluster in enumerate(mesh.cluster_cidrs):
        if _holds_service(cluster, facts):
            text = (
                f"holds {facts.service}, the ClusterIP of the API server: of it only the nodes' own ranges are "
                "unreachable where their node is missing; give the pods' range alone"
            )
            found.append(Problem(Reason.ServiceRangeCovered, text, field=f"clusterCIDRs[{number}]", value=str(cluster)))
    v6 = [c for c in me.pod_cidrs if c.version == 6]
    if facts.docker and len(v6) == len(me.pod_cidrs):
        text = "hold no IPv4 range, without which Docker can't be on kbr0; it stays where it is"
        found.append(Problem(Reason.DockerNeedsIPv4, text, me.name, "podCIDRs", str(v6[0])))
    if v6 and not facts.ipv6:
        found.append(Problem(Reason.IPv6Missing, "this kernel has no IPv6", me.name, "podCIDRs", str(v6[0])))
    elif v6 and mtu < _MIN_IPV6_MTU:
        text = f"is below the {_MIN_IPV6_MTU} bytes that IPv6 needs; raise the underlay's MTU by {_MIN_IPV6_MTU - mtu}"
        found.append(Problem(Reason.MTUTooLow, text, me.name, "mtu", str(mtu)))
    return found


def _holds_service(cluster: IPNetwork, facts: Facts) -> bool:
    try:
        return ip_address(facts.service) in cluster
    except ValueError:
        return False


def _fallbacks(mesh: Mesh, clusters: Iterable[IPNetwork], facts: Facts) -> Iterator[IPNetwork]:
    """Yield the ranges that are unreachable where no peer has them: the cluster CIDRs.

    Of one that holds ClusterIPs only the nodes' own ranges: the kernel looks for a route before kube-proxy gives a
    host's packet to a Service its real address, and the agent itself would lose the API server.
    """
    for cluster in clusters:
        if not _holds_service(cluster, facts):
            yield cluster
            continue
        inside = [c for n in mesh.nodes for c in n.pod_cidrs if c.version == cluster.version and c.overlaps(cluster)]
        yield from collapse_addresses(c for c in inside if isinstance(c, IPv4Network))
        yield from collapse_addresses(c for c in inside if isinstance(c, IPv6Network))


def dataplane(mesh: Mesh, self_name: str, facts: Facts) -> tuple[Dataplane, tuple[Problem, ...]]:
    """Return the desired dataplane of `self_name`, and what in the mesh or on the host is not as it should be.

    Raises OvsmeshError where the node is not in the mesh.
    """
    me = _self(mesh, self_name)
    w = wiring(mesh, me, facts)
    joined, refused = peers(mesh, me, w)
    clusters = [c for c in mesh.cluster_cidrs if facts.ipv6 or c.version == 4]
    grows: dict[str, dict[Any, Any]] = {kind: {} for kind in PEER_KINDS}
    grows["flows"] = {"0 ": "drop"} | dict(loop_flows(me, facts).values())
    # packets to a missing peer must not leak to the default gateway
    grows["routes"] = {(str(c), FALLBACK_METRIC): Route("unreachable") for c in _fallbacks(mesh, clusters, facts)}
    for kind, into in grows.items():
        for parts in joined.values():
            into.update(getattr(parts, kind))
    rules = firewall_rules.rules(mesh, me, facts)
    grows["filter_peers"] |= dict.fromkeys(facts.pod_ports, firewall_rules.PORTS)
    used = set(sets_used(rule.text for rule in rules.values()))
    grows["filter_peers"] = {element: where for element, where in grows["filter_peers"].items() if where in used}
    cidrs = [c for c in me.pod_cidrs if facts.ipv6 or c.version == 4]
    want = Dataplane(
        bridges={OBR: Bridge(facts.datapath_type, mtu_request=w.mtu)},
        links={KBR: Link("bridge", w.mtu, mac=w.mac), OBR: Link("", w.mtu, master=KBR, quiet=True)},
        sysctls=_sysctls(me, facts),
        addresses={f"{gateway(c)}/{c.prefixlen}": KBR for c in cidrs},
        rules=rules,
        docker=docker_config.desired(me, facts, w.mtu),
        cni=cni_config.desired(cidrs, facts, w.mtu),
        **grows,
    )
    return want, (*_problems(mesh, me, facts, w.mtu), *refused)
