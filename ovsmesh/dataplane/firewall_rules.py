"""Decide which packets a node refuses, accepts and masquerades, as the texts of its filter rules."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_network
from typing import NamedTuple

from ovsmesh.dataplane.types import KBR, OBR, Facts, Rule, RuleKey
from ovsmesh.mesh.types import IPNetwork, Mesh, Node, gateway, mac

IPTABLES = ("iptables", "ip6tables")
NFT = ("inet", "bridge")
PORTS = "pods"
"""The set of kbr0's ports."""
SETS = {
    "peers4": "ipv4_addr",
    "peers6": "ipv6_addr",
    "ranges4": "ipv4_addr; flags interval",
    "ranges6": "ipv6_addr; flags interval",
    PORTS: "ifname",
}
"""Sets of the managed nft tables → type of their elements: tunnel addresses and ranges of peers, ports of kbr0."""
IN_KBR = f'meta ibrname "{KBR}"'
"""Match on kbr0's ports. Needs nft_meta_bridge in the kernel."""
IN_PODS = f"iifname @{PORTS}"
"""Its substitute in a kernel without nft_meta_bridge: the ports that the agent has told."""
IN_ANY = 'meta iifkind "veth"'
"""Match on what may be a port of kbr0 there."""
_TAGGED = "@ll,96,16 { 0x8100, 0x88a8 }"
"""IEEE 802.1Q and 802.1ad. `meta protocol` is the type of the packet inside."""
_ADVERTISED = "icmpv6 type nd-neighbor-advert @th,64,128"
"""The target of a neighbour advertisement: what ARP's sender is to IPv4. nft has no name for it before 1.0.8."""

_MULTICAST = {4: ("224.0.0.0/4", "255.255.255.255/32"), 6: ("ff00::/8",)}
_GRE_TRANSPARENT_ETHERNET = 0x6558
"""What OVS puts into GRE's protocol field (RFC 1701); a routed site-to-site GRE carries 0x0800 or 0x86dd."""
UDP_PORTS = {"vxlan": 4789, "geneve": 6081}
"""RFC 7348 and RFC 8926."""


class Chain(NamedTuple):
    """An nft chain, as `nft -j` names its fields; a base chain's policy is always accept, others have no fields."""

    type: str
    hook: str
    priority: int


CHAINS = {
    ("inet", "postrouting"): Chain("nat", "postrouting", 100),
    # five before the usual filters, so that no accept in another table of the host comes first
    ("inet", "input"): Chain("filter", "input", -5),
    ("inet", "forward"): Chain("filter", "forward", -5),
    ("bridge", "prerouting"): Chain("filter", "prerouting", -300),
    **{("bridge", name): Chain("", "", 0) for name in ("mesh", "pods", "veths")},
}


def digest(key: RuleKey, rule: Rule) -> str:
    """Return eight hex digits that tell whether the rule under `key` is still as it was written."""
    return hashlib.sha256(f"{CHAINS.get(key[:2])} {key[1]} {rule.text}".encode()).hexdigest()[:8]


def peer_set(node: Node) -> tuple[str, str]:
    """Return a node's tunnel address, and the nft set of senders of encapsulated packets that holds it."""
    return str(node.address), f"peers{node.address.version}"


def range_sets(cidrs: Iterable[IPNetwork]) -> dict[str, str]:
    """Return ranges of a peer, each with the nft set of sources that holds it."""
    return {str(cidr): f"ranges{cidr.version}" for cidr in cidrs}


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


def _sources(own: list[IPNetwork], cluster: list[IPNetwork]) -> Iterator[tuple[str, str]]:
    """Yield rules against sources of the mesh that no pod of this node can have; those of one IP version.

    They hold for ports of any bridge: all other sources pass.
    """
    version = (own or cluster)[0].version
    gateways = [ip_network(gateway(c)) for c in own]
    for name, field in (("v4", "ip saddr"), ("arp", "arp saddr ip")) if version == 4 else (("v6", "ip6 saddr"),):
        other = f" {field} != {_set(own)}" if own else ""
        yield f"range-{name}", f"{field} {_set(cluster)}{other} drop"
        if own:
            yield f"gateway-{name}", f"{field} {_set(gateways)} drop"
    if version == 6 and own:
        yield "gateway-nd", f"{_ADVERTISED} {_numbers(gateways)} drop"


def _numbers(ranges: Iterable[IPNetwork]) -> str:
    """Return ranges of IPv6 as nft wants them where it knows no field."""
    pairs = [(int(r.network_address), int(r.broadcast_address)) for r in ranges]
    return f"{{ {', '.join(f'{low:#x}' if low == high else f'{low:#x}-{high:#x}' for low, high in sorted(pairs))} }}"


def link_local_address(mac: str) -> IPv6Address:
    """Return the link-local address that a kernel makes of a MAC (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])


def _macs(ranges: Iterable[IPNetwork]) -> str:
    """Return the MACs that nodes whose gateway is in these ranges of IPv4 can have, see mesh.types.mac."""
    merged = collapse_addresses(r for r in ranges if isinstance(r, IPv4Network))
    pairs = [(r.network_address.packed.hex(":"), r.broadcast_address.packed.hex(":")) for r in merged]
    return f"{{ {', '.join(f'0a:58:{low}-0a:58:{high}' for low, high in sorted(pairs))} }}"


def _from_pods(mesh: Mesh, me: Node, ipv6: bool) -> Iterator[tuple[str, str]]:
    """Yield the rules for what pods send: only what this node's pods own passes, and what gives them addresses.

    Each follows from those before it: once tags are dropped, the type of a frame is that of its packet.
    """
    own = {v: [c for c in me.pod_cidrs if c.version == v] for v in (4, 6)}
    cluster = [c for c in mesh.cluster_cidrs if c.version == 4]
    # the kernel takes off tags of VLAN 0 one after the other, and a receiver does not see that there were any
    yield "tag", f"{_TAGGED} drop"
    # Open vSwitch looks into LLC and SNAP, as some receivers do (RFC 1042)
    yield "snap", "@ll,112,40 0xaaaa030000 drop"
    yield "mac-own", f"ether saddr {mac(me)} drop"
    if cluster:
        # the CNI bridge plugin gives a pod such a MAC of its own address
        other = f" ether saddr != {_macs(own[4])}" if own[4] else ""
        yield "mac-peer", f"ether saddr {_macs(cluster)}{other} drop"
    yield "dhcp-reply", "udp dport { 68, 546 } drop"

    yield "local-v4", "ip daddr 127.0.0.0/8 drop"
    if own[4]:
        gateways = _set(ip_network(gateway(c)) for c in own[4])
        yield "gateway-v4", f"ip saddr {gateways} drop"
        yield "own-v4", f"ip saddr {_set(own[4])} accept"
        arp = "arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ip"
        yield "own-arp", f"{arp} {_set(own[4])} arp saddr ip != {gateways} accept"
        yield "probe-arp", f"{arp} 0.0.0.0 accept"
    yield "dhcp", "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept"
    yield "igmp", "ip saddr 0.0.0.0 ip protocol igmp accept"
    yield "other-v4", "meta protocol { ip, arp } drop"

    if not ipv6:
        yield "other-v6", "meta protocol ip6 drop"
        return
    link_local = [ip_network("fe80::/10")]
    gateways6 = [ip_network(link_local_address(mac(me))), *(ip_network(gateway(c)) for c in own[6])]
    yield "router", "icmpv6 type { nd-router-advert, nd-redirect } drop"
    yield "gateway-v6", f"ip6 saddr {_set(gateways6)} drop"
    yield "gateway-nd", f"{_ADVERTISED} {_numbers(gateways6)} drop"
    yield "other-nd", f"{_ADVERTISED} != {_numbers([*link_local, *own[6]])} drop"
    yield "own-v6", f"ip6 saddr {_set([*link_local, *own[6]])} accept"
    # duplicate address detection, and what tells a bridge and a router of listeners
    yield "unspecified-v6", "ip6 saddr :: icmpv6 type { 131, 132, 133, 135, 143 } accept"
    yield "other-v6", "meta protocol ip6 drop"


def _from_mesh(mesh: Mesh, me: Node, ipv6: bool) -> Iterator[tuple[str, str]]:
    """Yield the rules for what comes out of obr0: what its flows let in, for while they are not there."""
    yield "mac", f"ether daddr != {mac(me)} drop"
    yield "tag", f"{_TAGGED} drop"
    for version in (4, 6) if ipv6 else (4,):
        ip, own = _ip(version), [c for c in me.pod_cidrs if c.version == version]
        if not own:
            continue
        yield f"range-v{version}", f"{ip} saddr @ranges{version} {ip} daddr {_set(own)} accept"
        if me.address.version == version:
            yield f"tunnel-v{version}", f"{ip} saddr @peers{version} {ip} daddr {_set(own)} accept"
        # a peer's packet to itself, see probe.path
        echo = "icmp type echo-request" if version == 4 else "icmpv6 type echo-request"
        yield f"probe-v{version}", f"{ip} saddr @ranges{version} {ip} daddr @ranges{version} {echo} accept"
    yield "other", "drop"


def _walls(mesh: Mesh, me: Node, ipv6: bool) -> dict[RuleKey, Rule]:
    """Return the rules of the bridge table: what may enter kbr0, from its pods and from the mesh."""
    found = {
        ("prerouting", "from-mesh"): f'iifname "{OBR}" goto mesh',
        ("prerouting", "from-pods"): f"{IN_KBR} goto pods",
        # reached only where the kernel can't tell kbr0's ports, and no agent has told this one
        ("prerouting", "to-gateway"): f"{IN_KBR} ether daddr {mac(me)} goto pods",
        ("prerouting", "from-veths"): f"{IN_KBR} goto veths",
    }
    found |= {("mesh", name): text for name, text in _from_mesh(mesh, me, ipv6)}
    found |= {("pods", name): text for name, text in _from_pods(mesh, me, ipv6)}
    found["veths", "tag"] = f"{_TAGGED} @ll,112,16 & 0x0fff == 0 drop"
    for version in (4, 6) if ipv6 else (4,):
        cluster = [c for c in mesh.cluster_cidrs if c.version == version]
        own = [c for c in me.pod_cidrs if c.version == version]
        found |= {("veths", name): text for name, text in (_sources(own, cluster) if cluster else ())}
    return {("bridge", *key): Rule(text) for key, text in found.items()}


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


def _limit(version: int, facts: Facts) -> dict[RuleKey, Rule]:
    """Return the rules by which a host forwards nothing but the mesh's, and what others accept or have translated.

    They are for a host that forwards because of the agent alone. As soon as others use FORWARD, they stand there behind
    their rules: a Docker, libvirt or kube-proxy that comes later opens what it needs, as in a FORWARD that drops. What
    it opens in an nft table of its own can't be seen there: then what comes from its bridges passes. Answers and what
    a NAT rule sends to a container pass too. Frames between two ports of one bridge are none of this.
    """
    behind = () if facts.forward_nft else (b for b in facts.bridges if b not in facts.exits)
    tool = IPTABLES[version == 6]
    found: dict[RuleKey, Rule] = {}
    for n, link in enumerate((KBR, *facts.exits, *behind)):
        name = f"only-mesh-v{version}" + (f"-{n + 1}" if n else "")
        bridge = link == KBR or link in facts.bridges
        if tool in facts.forward_drop:
            stays = f" ! -o {link}" if bridge else ""
            text = f"-i {link}{stays} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
            found[tool, "FORWARD", name] = Rule(text)
            continue
        to = [*([link] if bridge else []), *(facts.exits if link == KBR else [])]
        quoted = ", ".join(f'"{name}"' for name in to)
        out = f" oifname != {{ {quoted} }}" if to else ""
        what = f'meta nfproto ipv{version} iifname "{link}"{out} ct state != {{ established, related }}'
        found["inet", "forward", name] = Rule(f"{what} ct status & dnat == 0 drop")
    return found


def rules(mesh: Mesh, self_node: Node, facts: Facts) -> dict[RuleKey, Rule]:
    """Return every filter rule that this node should have and can have, in the order in which they stand in a chain."""
    found: dict[RuleKey, Rule] = {}
    accept: dict[RuleKey, Rule] = {}
    only: dict[RuleKey, Rule] = {}
    for version, tool in zip((4, 6), IPTABLES, strict=True):
        if version == 6 and not facts.ipv6:
            continue
        own = [c for c in self_node.pod_cidrs if c.version == version]
        cluster = [c for c in mesh.cluster_cidrs if c.version == version]
        if own:
            found["inet", "postrouting", f"masquerade-v{version}"] = _masquerade(version, own, cluster)
        limited = bool(own) and version in facts.forward_limited
        if tool in facts.forward_drop:
            accept |= _accept(tool, own, cluster, facts.exits)
        if limited:
            (accept if tool in facts.forward_drop else only).update(_limit(version, facts))
    every = found | _tunnel(mesh, self_node) | only | _walls(mesh, self_node, facts.ipv6) | accept
    return supported(every, facts.firewall_missing)


WITHOUT = {
    "nft": "nothing is masqueraded, and neither sources of pods nor senders of tunnel packets are checked",
    "bridge": "a pod may use any source address and MAC on this node, and a peer too while the switch has no flows",
    "ibrname": "a pod that is plugged in while the agent is away may use sources that are nobody's towards other pods"
    " of its node, and the addresses of the mesh are refused to containers on other bridges too",
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
    match the rules for pods apply to the ports of kbr0 that the agent has told, and those about addresses of the mesh
    to the veth ports of any bridge.
    """
    left = {}
    for (tool, chain, name), rule in wanted.items():
        if tool in missing or f"{tool} {chain}" in missing or ("nft" in missing and tool in NFT):
            continue
        if "ibrname" in missing and IN_KBR in rule.text:
            rule = Rule(rule.text.replace(IN_KBR, IN_PODS if name == "from-pods" else IN_ANY))
        left[tool, chain, name] = rule
    return left
