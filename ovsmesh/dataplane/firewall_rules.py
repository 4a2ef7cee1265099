"""Decide which packets a node refuses, accepts and masquerades, as the texts of its filter rules."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import NamedTuple

from ovsmesh.dataplane.types import KBR, OBR, Facts, Rule, RuleKey
from ovsmesh.mesh.types import IPNetwork, Mesh, Node, gateway

IPTABLES = ("iptables", "ip6tables")
NFT = ("inet", "bridge")
SETS = {"peers4": "ipv4_addr", "peers6": "ipv6_addr"}
"""Sets of the managed nft tables → type of their elements."""
IN_KBR = f'meta ibrname "{KBR}"'
"""Match on kbr0's ports. Needs nft_meta_bridge in the kernel."""
IN_ANY = 'meta iifkind "veth"'
"""Its substitute in a kernel without nft_meta_bridge."""

_MULTICAST = {4: ("224.0.0.0/4", "255.255.255.255/32"), 6: ("ff00::/8",)}
_GRE_TRANSPARENT_ETHERNET = 0x6558
"""What OVS puts into GRE's protocol field (RFC 1701); a routed site-to-site GRE carries 0x0800 or 0x86dd."""
UDP_PORTS = {"vxlan": 4789, "geneve": 6081}
"""RFC 7348 and RFC 8926."""


class Chain(NamedTuple):
    """An nft base chain, as `nft -j` names its fields; the policy is always accept."""

    type: str
    hook: str
    priority: int


CHAINS = {
    ("inet", "postrouting"): Chain("nat", "postrouting", 100),
    # five before the usual filters, so that no accept in another table of the host comes first
    ("inet", "input"): Chain("filter", "input", -5),
    ("inet", "forward"): Chain("filter", "forward", -5),
    ("bridge", "prerouting"): Chain("filter", "prerouting", -300),
}


def digest(key: RuleKey, rule: Rule) -> str:
    """Return eight hex digits that tell whether the rule under `key` is still as it was written."""
    return hashlib.sha256(f"{CHAINS.get(key[:2])} {key[1]} {rule.text}".encode()).hexdigest()[:8]


def peer_set(node: Node) -> tuple[str, str]:
    """Return a node's tunnel address, and the nft set of senders of encapsulated packets that holds it."""
    return str(node.address), f"peers{node.address.version}"


def _set(ranges: Iterable[IPNetwork]) -> str:
    # an nft interval set refuses overlaps
    ranges = list(ranges)
    v4 = collapse_addresses(r for r in ranges if isinstance(r, IPv4Network))
    v6 = collapse_addresses(r for r in ranges if isinstance(r, IPv6Network))
    merged: list[IPNetwork] = [*v4, *v6]
    texts = [str(r.network_address) if r.prefixlen == r.max_prefixlen else str(r) for r in merged]
    return f"{{ {', '.join(texts)} }}"


def _ip(version: int) -> str:
    return "ip" if version == 4 else "ip6"


def _encapsulated(mesh: Mesh) -> list[str]:
    """Return what matches the mesh's tunnel packets, by protocol and key: no tunnel of another key is hit.

    It is all that the switch would take for the mesh's, and no more: OVS makes no difference between no key and key 0.
    """
    key = mesh.key or 0
    if mesh.encapsulation != "gre":
        # the network identifier stands at byte 4 of either header, behind 8 bytes of UDP
        return [f"udp dport {UDP_PORTS[mesh.encapsulation]} @th,96,24 {key}"]
    # RFC 2890: 0x2000 says that there is a key, 0x8000 that a checksum stands before it
    head = _GRE_TRANSPARENT_ETHERNET
    forms = [
        f"@th,0,64 & 0xa000ffffffffffff == {0x2000 << 48 | head << 32 | key:#018x}",
        f"@th,0,96 & 0xa000ffff00000000ffffffff == {0xA000 << 80 | head << 64 | key:#026x}",
    ]
    if not key:
        forms.insert(0, f"@th,0,32 & 0x2000ffff == {head:#010x}")
    # the protocol last: nft 1.0.6 aborts where it is to print a masked match that follows it
    return [f"{form} meta l4proto gre" for form in forms]


def _tunnel(mesh: Mesh, me: Node) -> dict[RuleKey, Rule]:
    ip, (address, peers) = _ip(me.address.version), peer_set(me)
    forms = [(f"-{n + 1}" if n else "", what) for n, what in enumerate(_encapsulated(mesh))]
    found = {}
    for more, what in forms:
        # a pod that forges the outer header could even take a peer's address
        found["inet", "input", f"tunnel-from-pod{more}"] = f'iifname "{KBR}" {ip} daddr {address} {what} drop'
        found["inet", "input", f"tunnel-not-peer{more}"] = f"{ip} daddr {address} {what} {ip} saddr != @{peers} drop"
    for more, what in forms:
        # masquerade would give it this node's address, which the peer trusts
        found["inet", "forward", f"tunnel-from-pod{more}"] = f'iifname "{KBR}" {ip} daddr @{peers} {what} drop'
    return {key: Rule(text) for key, text in found.items()}


def _masquerade(version: int, own: list[IPNetwork], cluster: list[IPNetwork]) -> Rule:
    ip = _ip(version)
    stay = _set([*cluster, *map(ip_network, _MULTICAST[version])])
    # fully-random: two pods that ask one server at the same moment may not meet in one port
    return Rule(f'{ip} saddr {_set(own)} {ip} daddr != {stay} oifname != "{KBR}" masquerade fully-random')


def _spoof(version: int, own: list[IPNetwork], cluster: list[IPNetwork], me: Node) -> dict[RuleKey, Rule]:
    """Return the rules that refuse what enters kbr0 from a pod with a source that no pod of this node can have.

    Only cluster ranges and tunnel addresses are matched: DHCP, ::, link-local addresses and whatever else a
    container uses inside pass.
    """
    enters = f'{IN_KBR} iifname != "{OBR}"'
    gateways = [ip_network(gateway(c)) for c in own]
    sources = [(f"v{version}", f"{_ip(version)} saddr")] + ([("arp", "arp saddr ip")] if version == 4 else [])
    found = {}
    for name, field in sources:
        if cluster:
            other = f" {field} != {_set(own)}" if own else ""
            found[f"spoof-range-{name}"] = f"{enters} {field} {_set(cluster)}{other} drop"
        if own:
            found[f"spoof-gateway-{name}"] = f"{enters} {field} {_set(gateways)} drop"
        for n, own_gateway in enumerate(gateways if version == 6 else ()):
            # the target of a neighbour advertisement: what ARP's sender is to IPv4
            target = f"icmpv6 type nd-neighbor-advert @th,64,128 {int(own_gateway.network_address):#x}"
            found["spoof-gateway-nd" + (f"-{n + 1}" if n else "")] = f"{enters} {target} drop"
        if version == me.address.version:
            found[f"spoof-tunnel-{name}"] = f"{enters} {field} {me.address} drop"
            found[f"spoof-peer-{name}"] = f"{enters} {field} @peers{version} drop"
    return {("bridge", "prerouting", name): Rule(text) for name, text in found.items()}


def _nested_tag() -> dict[RuleKey, Rule]:
    """Return the rule against a VLAN tag inside a tag, both of VLAN 0: no rule sees the packet inside, the kernel does.

    It takes off the tags of VLAN 0 one after the other, where the packet is for the host itself.
    """
    what = "meta protocol { 0x8100, 0x88a8 } @nh,0,16 & 0x0fff == 0"
    return {("bridge", "prerouting", "spoof-nested-tag"): Rule(f'{IN_KBR} iifname != "{OBR}" {what} drop')}


def _accept(tool: str, own: list[IPNetwork], cluster: list[IPNetwork], exits: Iterable[str]) -> dict[RuleKey, Rule]:
    """Return the rules that let the mesh through a FORWARD that drops. They stand behind all others there.

    `mesh-in` names no source: a peer's host process may use its tunnel address, and what a peer or a pod uses as
    its source is checked before (flows on obr0, the bridge table). `leave` names the links out of this host: behind
    a bridge of others are containers that only their owner opens to pods.
    """
    found = {}
    for n, mine in enumerate(own):
        more = f"-{n + 1}" if n else ""
        for m, theirs in enumerate(cluster):
            pair = more + (f"-to-{m + 1}" if m else "")
            found[f"mesh-out{pair}"] = f"-i {KBR} -o {KBR} -s {mine} -d {theirs} -j ACCEPT"
        found[f"mesh-in{more}"] = f"-i {KBR} -o {KBR} -d {mine} -j ACCEPT"
        for m, link in enumerate(exits):
            found[f"leave{more}" + (f"-by-{m + 1}" if m else "")] = f"-i {KBR} -o {link} -s {mine} -j ACCEPT"
        found[f"return{more}"] = f"-o {KBR} -d {mine} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    # what a peer sends to itself through this node shows it whether packets to the pods here are forwarded
    echo = "-p icmp -m icmp --icmp-type 8" if tool == IPTABLES[0] else "-p ipv6-icmp -m icmp6 --icmpv6-type 128"
    for m, theirs in enumerate(cluster if own else ()):
        name = "mesh-probe" + (f"-{m + 1}" if m else "")
        found[name] = f"-i {KBR} -o {KBR} -s {theirs} -d {theirs} {echo} -j ACCEPT"
    return {(tool, "FORWARD", name): Rule(text) for name, text in found.items()}


def rules(mesh: Mesh, self_node: Node, facts: Facts) -> dict[RuleKey, Rule]:
    """Return every filter rule that this node should have and can have, in the order in which they stand in a chain."""
    found: dict[RuleKey, Rule] = {}
    spoof: dict[RuleKey, Rule] = {}
    accept: dict[RuleKey, Rule] = {}
    for version, tool in zip((4, 6), IPTABLES, strict=True):
        if version == 6 and not facts.ipv6:
            continue
        own = [c for c in self_node.pod_cidrs if c.version == version]
        cluster = [c for c in mesh.cluster_cidrs if c.version == version]
        if own:
            found["inet", "postrouting", f"masquerade-v{version}"] = _masquerade(version, own, cluster)
        if tool in facts.forward_drop:
            accept |= _accept(tool, own, cluster, facts.exits)
        spoof |= _spoof(version, own, cluster, self_node)
    every = found | _tunnel(mesh, self_node) | spoof | _nested_tag() | accept
    return supported(every, facts.firewall_missing)


WITHOUT = {
    "nft": "nothing is masqueraded, and neither sources of pods nor senders of tunnel packets are checked",
    "bridge": "a pod may use another pod's source address on this node",
    "ibrname": "a pod may forge a tunnel address towards other pods of its node, and the addresses of the mesh"
    " are refused to containers on other bridges too",
    "inet postrouting": "pods reach nothing outside the mesh, unless something else masquerades them",
    "inet input": "tunnel packets from addresses that are no peers are left to Open vSwitch to refuse",
    "inet forward": "a pod may send packets that look like this node's tunnel packets",
    "iptables": "rules in FORWARD may drop the mesh's packets",
    "ip6tables": "rules in FORWARD may drop the mesh's IPv6 packets",
}
"""What a system may be missing, in the words of `supported` → what that means for its user."""


def supported(wanted: Mapping[RuleKey, Rule], missing: Collection[str]) -> dict[RuleKey, Rule]:
    """Return what is left of the wanted rules on a system without what is `missing`.

    `missing` holds tools ("iptables", "nft", "bridge"), chains ("inet postrouting") or "ibrname". Without that
    match the bridge rules apply to veth ports of any bridge. Those about tunnel addresses are then left out, since
    such packets are legitimate on a bridge that carries the underlay.
    """
    left = {}
    for (tool, chain, name), rule in wanted.items():
        if tool in missing or f"{tool} {chain}" in missing or ("nft" in missing and tool in NFT):
            continue
        if "ibrname" in missing and IN_KBR in rule.text:
            if name.startswith(("spoof-tunnel", "spoof-peer")):
                continue
            rule = Rule(rule.text.replace(IN_KBR, IN_ANY))
        left[tool, chain, name] = rule
    return left
