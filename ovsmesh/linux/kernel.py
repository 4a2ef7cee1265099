"""Ask the kernel what it has, what it is set to, and which way it would send a packet."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Collection, Iterable, Mapping
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from ovsmesh.dataplane.types import Detour
from ovsmesh.linux import netlink_socket, rtnetlink, rtnetlink_parser
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.netlink_socket import Message, NetlinkError, NetlinkSocket, attributes
from ovsmesh.linux.rtnetlink import REFUSED_SOURCE, LinkFound, NeighbourEntry, PolicyRule, RouteFound
from ovsmesh.linux.rtnetlink_parser import parse_address, parse_neighbour, parse_route
from ovsmesh.mesh.types import IPAddress, IPNetwork, Node, gateway

_FIB_MATCH, _LOOKUP_TABLE = 0x2000, 0x1000
"""RTM_F_ flags of a request: the entry of the table, and which table."""
_ROUTE_TYPES = {**rtnetlink.ROUTE_TYPES, 4: "anycast", 9: "throw"}
_ACTIONS = {1: "table", 2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
_TABLES = {253: "default", 254: "main", 255: "local"}
_U32 = struct.Struct("=I")
_ELSEWHERE = f"{REFUSED_SOURCE}: it would be answered on another link (rp_filter)"
_INGRESS = 0xFFFFFFF2
"""TC_H_CLSACT, TC_H_MIN_INGRESS."""
_PERMANENT = 0x80
_FAILED = 0x20
_UNICAST = 1
"""RTN_UNICAST."""
_ROUTING_GROUPS = (1, 5, 7, 8, 9, 11, 19, 24, 25)
"""RTNLGRP_ LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, IPV4_NETCONF, IPV6_NETCONF:
what may change the way that a packet takes."""
_CHANGES_BYTES = 1 << 16
"""Of notifications that may wait: more of them say no more."""
_KERNELS_RULES = frozenset({(0, 255), (32766, 254), (32767, 253)})
"""Priority and table of the rules that every kernel has."""
_EXPLAINED, _MOST_TOLD = 5.0, 1000
"""Seconds for which an explanation of a wrong way is good, and how many are kept."""
_XFRM_GETPOLICY, _XFRM_ID, _XFRM_INFO = 21, 64, 168
"""XFRM_MSG_GETPOLICY; bytes of a xfrm_userpolicy_id and of a xfrm_userpolicy_info (<linux/xfrm.h>)."""
_XFRM_DIRECTIONS = {1: "out", 2: "fwd"}


_OVS_DATAPATH = "ovs_datapath"
"""The generic netlink family of the kernel datapath (<linux/openvswitch.h>)."""


def kernel_datapath() -> bool:
    """Return whether this kernel has Open vSwitch's datapath. Asking loads its module, if there is one."""
    with NetlinkSocket(netlink_socket.GENERIC) as sock:
        try:
            sock.request(encoder.get_genl_family(_OVS_DATAPATH), lambda reply: None)
        except NetlinkError as error:
            return error.errno not in (errno.ENOENT, errno.EOPNOTSUPP)
    return True


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


class Kernel:
    """One network namespace: the calling thread's at the time it is made. Not thread-safe."""

    def __init__(self) -> None:
        """Open the socket. Raises OSError where that is not permitted."""
        self.netlink = NetlinkSocket(netlink_socket.ROUTE)
        self._names: dict[int, str] = {}

    def close(self) -> None:
        """Close the socket."""
        self.netlink.close()

    def dump(self, request: bytes) -> list[Message]:
        """Return the answers to a request, none where the kernel refuses it."""
        found: list[Message] = []
        try:
            self.netlink.request(request, found.append)
        except NetlinkError:
            return []
        return found

    def links(self) -> dict[str, LinkFound]:
        """Return all links by name."""
        raw = [self._link(message) for message in self.dump(encoder.dump(rtnetlink.GETLINK, 0))]
        self._names = {link.number: link.name for link, _ in raw}
        return {link.name: link._replace(master=self._names.get(master, "")) for link, master in raw}

    @staticmethod
    def _link(message: Message) -> tuple[LinkFound, int]:
        _, _, index, flags, _ = struct.unpack_from("=BxHiII", message.payload)
        attrs = attributes(message.payload, 16)
        info = attributes(memoryview(attrs.get(18, b"")))
        port = attributes(memoryview(info.get(5, b"")))
        xdp = attributes(memoryview(attrs.get(43, b""))).get(2, b"\0")
        link = LinkFound(
            attrs.get(3, b"").rstrip(b"\0").decode(errors="replace"),
            index,
            bool(flags & 1),
            bool(flags & 0x40),
            _U32.unpack(attrs[4])[0] if 4 in attrs else 0,
            attrs.get(1, b"").hex(":"),
            "",
            _U32.unpack(attrs[5])[0] if 5 in attrs else 0,
            struct.unpack("=i", attrs[37])[0] if 37 in attrs else None,
            info.get(1, b"").rstrip(b"\0").decode(errors="replace"),
            port.get(1, b"\3")[0] if info.get(4, b"").startswith(b"bridge") else 3,
            "an XDP program" if xdp[0] else "",
        )
        return link, _U32.unpack(attrs[10])[0] if 10 in attrs else 0

    def name(self, index: int) -> str:
        """Return the name of a link as `links` has read it, "" for none."""
        return self._names.get(index, "")

    def traffic_filters(self, index: int) -> bool:
        """Return whether a link has tc filters on what arrives."""
        return bool(self.dump(encoder.dump_filters(index, _INGRESS)))

    def addresses(self) -> dict[str, int]:
        """Return address, without its prefix length → index of its link."""
        found = {}
        for message in self.dump(encoder.dump(rtnetlink.GETADDR, 0)):
            if entry := parse_address(message.payload):
                found[entry.address.partition("/")[0]] = entry.ifindex
        return found

    def neighbours(self, version: int, index: int) -> dict[str, NeighbourEntry]:
        """Return the neighbours on a link, by address, that have a MAC."""
        request = encoder.dump(rtnetlink.GETNEIGH, _family(version), ifindex=index)
        entries = (parse_neighbour(message.payload) for message in self.dump(request))
        return {e.dst: e for e in entries if e and e.ifindex == index and e.mac and not e.state & _FAILED}

    def fdb(self, bridge: int) -> dict[str, str]:
        """Return MAC → port of a bridge, in any VLAN. `links` must have been read before."""
        found: dict[str, str] = {}
        for message in self.dump(encoder.dump(rtnetlink.GETNEIGH, rtnetlink.AF_BRIDGE)):
            entry = parse_neighbour(message.payload)
            if entry and entry.master == bridge:
                found[entry.mac] = self._names.get(entry.ifindex, f"#{entry.ifindex}")
        return found

    def route(self, target: IPAddress, source: IPAddress | None = None, iif: int = 0, mark: int = 0) -> RouteFound:
        """Return the route that a packet takes. With `iif`, one that arrives on that link, as forwarding looks it up.

        `links` must have been read before.
        """
        picked = self._route(target, source, iif, mark, 0)
        if picked.error and not picked.type:
            # the kernel does not say which entry refuses
            return self._entry(target, source, iif, mark, picked.error)
        entry = self._route(target, source, iif, mark, _FIB_MATCH)
        # the entry has type, gateway and MTU as they were written; the pick has what the kernel does
        return entry._replace(via=entry.via or picked.via, dev=entry.dev or picked.dev, error=picked.error)

    def _entry(self, target: IPAddress, source: IPAddress | None, iif: int, mark: int, error: str) -> RouteFound:
        """Return the entry that a packet meets, found by going through rules and tables as the kernel does."""
        request = encoder.dump(rtnetlink.GETROUTE, _family(target.version))
        parsed = (parse_route(message.payload) for message in self.dump(request))
        entries = [e for e in parsed if e and target in ip_network(e.dst) and e.type not in ("broadcast", "multicast")]
        for rule in self.policy(target, source, self._names.get(iif, ""), mark):
            if not rule.matches:
                continue
            if rule.action in ("blackhole", "unreachable", "prohibit"):
                return RouteFound(error=error)
            inside = [e for e in entries if e.table == rule.table]
            if rule.action != "table" or not inside:
                continue
            best = max(inside, key=lambda e: (int(e.dst.partition("/")[2]), -e.metric))
            if best.type == "unicast" and error == _word(22):
                error = _ELSEWHERE
            elif best.type == "unicast" and error == _word(113):
                error = "forwarding is off"
            dev = self._names.get(best.oif, "")
            return RouteFound(best.type, best.via, dev, best.table, best.mtu, error, best.dst)
        return RouteFound(error=error)

    def _route(self, target: IPAddress, source: IPAddress | None, iif: int, mark: int, flags: int) -> RouteFound:
        found: list[Message] = []
        try:
            self.netlink.request(encoder.get_route(target, source, iif, mark, _LOOKUP_TABLE | flags), found.append)
        except NetlinkError as error:
            return RouteFound(error=_word(error.errno or 0))
        _, length, _, _, table, _, _, kind, _ = struct.unpack_from("=BBBBBBBBI", found[0].payload)
        attrs = attributes(found[0].payload, 12)
        metrics = attributes(memoryview(attrs.get(8, b"")))
        info = struct.unpack_from("=IIiI", attrs[12]) if len(attrs.get(12, b"")) >= 16 else (0, 0, 0, 0)
        oif = _U32.unpack(attrs[4])[0] if 4 in attrs else 0
        via = attrs.get(5) or attrs.get(18, b"\0\0")[2:]
        return RouteFound(
            _ROUTE_TYPES.get(kind, str(kind)),
            str(ip_address(via)) if len(via) in (4, 16) else "",
            self._names.get(oif, f"#{oif}" if oif else ""),
            _U32.unpack(attrs[15])[0] if 15 in attrs else table,
            _U32.unpack(metrics[2])[0] if 2 in metrics else 0,
            _word(-info[2]) if info[2] < 0 else "",
            _range(attrs.get(1), length, target.version) if flags & _FIB_MATCH else "",
        )

    def policy(
        self, target: IPAddress, source: IPAddress | None, iif: str = "", mark: int = 0
    ) -> tuple[PolicyRule, ...]:
        """Return the policy rules in their order, and which ones match a packet."""
        request = encoder.dump(rtnetlink.GETRULE, _family(target.version))
        found = [self._rule(message, target, source, iif, mark) for message in self.dump(request)]
        return tuple(sorted(found, key=lambda rule: rule.priority))

    @staticmethod
    def _rule(message: Message, target: IPAddress, source: IPAddress | None, iif: str, mark: int) -> PolicyRule:
        _, dst_len, src_len, tos, table, _, _, action, flags = struct.unpack_from("=BBBBBBBBI", message.payload)
        attrs = attributes(message.payload, 12)
        number = _U32.unpack(attrs[15])[0] if 15 in attrs else table
        words, matches = [], True
        for name, kind, length, address in (("from", 2, src_len, source), ("to", 1, dst_len, target)):
            if kind in attrs and length:
                net = ip_network((attrs[kind], length), strict=False)
                words.append(f"{name} {net}")
                matches &= address is not None and address.version == net.version and address in net
            elif name == "from":
                words.append("from all")
        for name, kind, link in (("iif", 3, iif), ("oif", 17, "")):
            if kind in attrs:
                wanted = attrs[kind].rstrip(b"\0").decode(errors="replace")
                words.append(f"{name} {wanted}")
                matches &= wanted == (link or ("lo" if name == "iif" else ""))
        if 10 in attrs:
            value, mask = _U32.unpack(attrs[10])[0], _U32.unpack(attrs.get(16, b"\xff" * 4))[0]
            if mask:
                words.append(f"fwmark {value:#x}/{mask:#x}")
                matches &= mark & mask == value
        if tos:
            words.append(f"tos {tos:#x}")
            matches = False
        for kind, name in ((20, "uidrange"), (22, "ipproto"), (23, "sport"), (24, "dport")):
            if kind in attrs:
                words.append(name)
                # ICMP is none of these, but for a rule of its own protocol
                matches &= name == "ipproto" and attrs[kind][0] in (1, 58)
        if 14 in attrs and _U32.unpack(attrs[14])[0] != 0xFFFFFFFF:
            words.append("suppress_prefixlength")
        kind_name = _ACTIONS.get(action, str(action))
        words.append(f"lookup {_TABLES.get(number, number)}" if kind_name == "table" else kind_name)
        if flags & 2:
            words.insert(0, "not")
            matches = not matches
        priority = _U32.unpack(attrs[6])[0] if 6 in attrs else 0
        return PolicyRule(priority, " ".join(words), number, kind_name, matches)


def _range(packed: bytes | None, length: int, version: int) -> str:
    """Return the range of a table's entry, as `ip route` writes it."""
    if not length:
        return "default"
    return str(ip_network((packed or bytes(4 if version == 4 else 16), length), strict=False))


def _word(code: int) -> str:
    """Return what an error of a route means."""
    words = {
        113: "host unreachable",
        101: "network unreachable",
        13: "prohibited",
        22: "blackhole",
        18: _ELSEWHERE,
        19: "no such device",
    }
    return words.get(code, os.strerror(code))


def host_addresses() -> dict[str, str]:
    """Return the addresses of this host, and the link of each."""
    kernel = Kernel()
    try:
        kernel.links()
        return {address: kernel.name(index) for address, index in kernel.addresses().items()}
    finally:
        kernel.close()


class PodRoutes:
    """Asks the kernel where it would send packets for peers' pods. Not thread-safe.

    Raises OSError without a netlink socket, OvsmeshError where pyroute2 does not fit.
    """

    def __init__(self) -> None:
        self._kernel = Kernel()
        self._changes = NetlinkSocket(netlink_socket.ROUTE, _ROUTING_GROUPS, _CHANGES_BYTES)
        self._clear: set[tuple[int, IPAddress, IPAddress]] = set()
        """What `astray` was asked since the last change, and where all was well."""
        self._told: dict[IPAddress, tuple[str, float, str]] = {}
        """Destination → where its packets go, when that was explained, and why they do."""
        for address in map(ip_address, ("192.0.2.1", "2001:db8::1")):
            encoder.get_forwarding_route(address, address, 1)

    def close(self) -> None:
        """Close the sockets."""
        self._kernel.close()
        self._changes.close()

    def astray(self, bridge: int, gateway: IPAddress, destination: IPAddress) -> str:
        """Return where packets go that pods of this node send to a peer, if not to kbr0; "" where all is well.

        `bridge` is kbr0's number, `gateway` this node's, `destination` the peer's. Also "" where the kernel can't be
        asked.
        """
        # the kernel tells each change of links, addresses, routes, rules and forwarding, or that it has lost some
        if self._changes.discard():
            self._clear.clear()
        asked = (bridge, gateway, destination)
        if asked in self._clear:
            return ""
        source = _pod(gateway)
        where = self._elsewhere(destination, source, bridge, bridge)
        if not where:
            self._clear.add(asked)
            return ""
        before, at, why = self._told.get(destination, ("", 0.0, ""))
        if before != where or time.monotonic() - at > _EXPLAINED:
            if len(self._told) > _MOST_TOLD:
                self._told.clear()
            why = self._reason(destination, source, bridge)[0]
            self._told[destination] = where, time.monotonic(), why
        return f"{where}: {why}"

    def detours(
        self,
        bridge: int,
        gateways: Mapping[int, IPAddress],
        peers: Iterable[Node],
        ranges: Collection[IPNetwork],
        narrower: Collection[IPNetwork] = (),
        mark: int = 0,
    ) -> tuple[Detour, ...]:
        """Return the ways that packets of pods and of this host itself to peers' pods take instead of kbr0.

        `gateways` are this node's by IP version, `ranges` the mesh's. `narrower`: routes of others in these.
        """
        found = []
        policies = xfrm_policies()
        for node in peers:
            for cidr in node.pod_cidrs:
                own = gateways.get(cidr.version)
                if own is None:
                    continue
                # the address that a host's own packets have before the kernel picks one
                unset = ip_address(bytes(len(own.packed)))
                inside = [one for one in narrower if one.network_address in cidr and one.prefixlen > cidr.prefixlen]
                for sender, source, iif in (("pods", _pod(own), bridge), ("this host itself", unset, 0)):
                    for target in (gateway(cidr), *(one.network_address for one in inside)):
                        where = self._elsewhere(target, source, iif, bridge, mark)
                        why, remedy = self._reason(target, source, iif, ranges, mark) if where else ("", "")
                        if not where and (policy := blocking(policies, _pod(own), _pod(target))):
                            where, why, remedy = policy
                        if where and why:
                            found.append(Detour(node.name, str(cidr), sender, where, why, remedy))
                            break
        return tuple(found)

    def rules(self) -> bytes:
        """Return the policy rules of both families as the kernel sends them, b"" where there are only its own."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in self._kernel.dump(encoder.dump(rtnetlink.GETRULE, family)):
                payload = bytes(message.payload)
                attrs = attributes(message.payload, 12)
                number = _U32.unpack(attrs[15])[0] if 15 in attrs else payload[4]
                priority = _U32.unpack(attrs[6])[0] if 6 in attrs else 0
                if (priority, number) not in _KERNELS_RULES:
                    found.append(payload)
        return b"".join(found)

    def _elsewhere(self, target: IPAddress, source: IPAddress, iif: int, bridge: int, mark: int = 0) -> str:
        """Return where a packet goes that is to leave through kbr0, "" where it does, or nobody can tell."""
        found: list[netlink_socket.Message] = []
        try:
            request = encoder.get_forwarding_route(target, source, iif)
            if mark:
                request = encoder.get_route(target, source if int(source) else None, iif, mark)
            self._kernel.netlink.request(request, found.append)
            kind, link = rtnetlink_parser.picked(found[0].payload)
            if kind != _UNICAST:
                return "nowhere (a route or a rule refuses them)"
            return "" if link in (bridge, 0) else f"to {socket.if_indextoname(link)}"
        except NetlinkError as error:
            # what a policy rule or a route refuses, and what a kernel says that does not forward
            refused = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EINVAL)
            return f"nowhere ({_word(error.errno or 0)})" if error.errno in refused else ""
        except OSError:
            return ""

    def _reason(
        self, target: IPAddress, source: IPAddress, iif: int, ranges: Collection[IPNetwork] = (), mark: int = 0
    ) -> tuple[str, str]:
        """Return the rule and the route that take a packet elsewhere, and the command that ends that.

        "" where that is the mesh's own route for ranges that no peer has.
        """
        kernel = self._kernel
        kernel.links()
        known = source if int(source) else None
        route = kernel.route(target, known, iif, mark)
        rules = kernel.policy(target, known, kernel.name(iif), mark)
        ip = "ip" if target.version == 4 else "ip -6"
        entry = " ".join(filter(None, (route.destination if route.type == "unicast" else "", str(route))))
        rule = rtnetlink.deciding(rules, route)
        if rule is None:
            if route.type == "unreachable" and route.destination in map(str, ranges):
                return "", ""
            if not route.destination:
                return f"table main has {entry}", ""
            dev = f" dev {route.dev}" if route.dev else ""
            kind = "" if route.type == "unicast" else f"{route.type} "
            return f"table main has {entry}", f"delete that route: {ip} route del {kind}{route.destination}{dev}"
        why = f"rule {rule.priority} (`ip rule`: {rule.text}) comes before table main"
        if rule.action == "table":
            why += f", and has {entry}"
        mesh = next((str(one) for one in ranges if target in one), f"{target}/{target.max_prefixlen}")
        if rule.priority < 2:
            return why, f"delete that rule: {ip} rule del priority {rule.priority}"
        return why, f"let the mesh's range come first: {ip} rule add priority {rule.priority - 1} to {mesh} lookup main"


def _pod(gateway: IPAddress) -> IPAddress:
    """Return an address that a pod behind a gateway may have."""
    return ip_address(gateway.packed[:-1] + bytes([(gateway.packed[-1] + 1) & 0xFF]))


# IPsec


class XfrmPolicy(NamedTuple):
    """A policy of the kernel's IPsec, `ip xfrm policy`, for packets that leave or are forwarded."""

    source: IPNetwork
    destination: IPNetwork
    direction: str
    block: bool
    priority: int


def xfrm_policies() -> list[XfrmPolicy]:
    """Return the IPsec policies that hold for all protocols and ports; none where the kernel has no IPsec."""
    found: list[XfrmPolicy] = []

    def take(message: Message) -> None:
        payload = bytes(message.payload)
        if len(payload) < _XFRM_INFO:
            return
        family, plen, slen, proto = struct.unpack_from("=HBBB", payload, 40)
        direction = _XFRM_DIRECTIONS.get(payload[160], "")
        if proto or not direction or any(payload[32:40]) or family not in (socket.AF_INET, socket.AF_INET6):
            return
        size = 4 if family == socket.AF_INET else 16
        destination = ip_network((payload[:size], plen), strict=False)
        source = ip_network((payload[16 : 16 + size], slen), strict=False)
        priority = _U32.unpack_from(payload, 152)[0]
        found.append(XfrmPolicy(source, destination, direction, payload[161] == 1, priority))

    try:
        with NetlinkSocket(netlink_socket.XFRM) as sock:
            header = struct.pack("=IHHII", 16 + _XFRM_ID, _XFRM_GETPOLICY, 0x301, 0, 0)
            sock.request(header + bytes(_XFRM_ID), take)
    except OSError:
        return []
    return found


def blocking(policies: Iterable[XfrmPolicy], source: IPAddress, target: IPAddress) -> tuple[str, str, str] | None:
    """Return where an IPsec policy sends a packet, which policy it is, and what to do; None where none does."""
    for direction in _XFRM_DIRECTIONS.values():
        hits = [
            p
            for p in policies
            if p.direction == direction
            and p.source.version == target.version
            and target in p.destination
            and source in p.source
        ]
        first = min(hits, key=lambda policy: policy.priority, default=None)
        if first is None:
            continue
        what = f"src {first.source} dst {first.destination} dir {direction}"
        where = "nowhere" if first.block else "into IPsec"
        return (
            where,
            f"the IPsec policy `{what}` {'blocks' if first.block else 'takes'} them",
            f"delete it, or let it not cover the mesh's ranges: ip xfrm policy delete {what}",
        )
    return None
