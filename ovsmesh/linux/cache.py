"""A cache of the kernel's links, addresses, routes, neighbours and FDB entries.

It is fed with the messages of a dump or of notifications, and holds only what the kernel reported.
Ownership is told by the marks in the entries. It opens no socket.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable
from ipaddress import ip_interface, ip_network

from ovsmesh.dataplane.types import KBR, MARK, OBR, PROTOCOL, TUNNEL_LINKS, Link, Route, RouteKey, Unmanaged
from ovsmesh.linux import netlink_socket, rtnetlink
from ovsmesh.linux import rtnetlink_parser as parser
from ovsmesh.mesh.types import IPNetwork

_KERNEL, _RA = 2, 9
"""RTPROT_KERNEL, RTPROT_RA."""
NOT_STICKY = " (not sticky)"
"""What follows the port of an FDB entry that a frame moves to another one."""
_RELEASED_SECONDS = 2.0
"""The kernel reports the ports of a deleted bridge as released up to this long before the bridge's own end."""
_TUNNELS = frozenset(TUNNEL_LINKS.values())
_NOTED = 4096
"""Changes of which it is noted who made them, until the next drift."""
_NO_EXITS = ("bridge", "dummy")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")
"""A link's name that a filter rule may hold: the kernel allows quotes, and iptables takes a + for any end."""
_LINK_LOCAL = ("fe80:", "169.254.")
_OVS_KINDS = ("openvswitch", "tun")
"""Kind of obr0: with the kernel datapath, with the userspace datapath."""


class RtnetlinkCache:
    """What the kernel reported. After `update`, `changed`, `stale` and `partial_links` say what to do."""

    def __init__(self) -> None:
        self.changed = True
        """Something that `observe` returns may differ."""
        self.partial_links: set[int] = set()
        """Links of which only the bridge's part was reported: request them."""
        self.watch_ports = False
        """Whether it is such a change when a port of kbr0 comes or goes."""
        self.orphaned_ports: dict[int, bool] = {}
        """Ports that a deleted kbr0 left behind → whether they were hairpins."""
        self.changed_by: dict[tuple[str, object], int] = {}
        """Kind and key of a managed part → sender of the message of its last change."""
        self.routing = 0
        """Counts the changes of routes and policy rules of others by which packets of the mesh may go another way."""
        self._sender = 0
        self._ranges: list[tuple[int, int, int]] = []
        self._released: dict[int, tuple[float, bool]] = {}
        """Ports that kbr0 released → when, and whether they were hairpins."""
        self.links: dict[int, rtnetlink.LinkEntry] = {}
        self._indexes: dict[str, int] = {}
        self.clear()
        self.stale = True
        """The kernel may have changed more than it reported: dump everything again."""

    def clear(self) -> None:
        """Drop everything before a dump. Call `finish_dump` after it."""
        self._before = (self._indexes.get(KBR), self.links) if self.links else (None, {})
        self.links = {}
        self._indexes = {}
        self._addresses: dict[tuple[str, int], int] = {}
        self.routes: dict[RouteKey, Route] = {}
        self._unmanaged_routes: dict[tuple[str, int, int], str] = {}
        self._ra_links: set[int] = set()
        self._defaults: set[tuple[str, int, int]] = set()
        """Default routes: destination, metric and link."""
        self.neighbours: dict[str, str] = {}
        self.fdb: dict[str, str] = {}
        """MAC of a node → port, with NOT_STICKY where a frame can move it."""
        self.partial_links.clear()

    def finish_dump(self) -> None:
        """Take the cache as up to date, and find the ports of a kbr0 that was deleted since the dump before."""
        self.stale = False
        kbr, links = self._before
        self._before = (None, {})
        if kbr is not None and kbr not in self.links:
            ports = {i: link.hairpin for i, link in links.items() if link.master == kbr}
            ports |= {i: hairpin for i, (_, hairpin) in self._released.items()}
            self.orphaned_ports |= {i: h for i, h in ports.items() if i in self.links and not self.links[i].master}
        self._released.clear()

    def watch(self, cidrs: Iterable[IPNetwork]) -> None:
        """Set the ranges, the cluster CIDRs, in which unmanaged routes are reported."""
        ranges: list[tuple[int, int, int]] = []
        ranges += [(c.version, int(c.network_address), int(c.broadcast_address)) for c in cidrs]
        if ranges != self._ranges:
            self._ranges = ranges
            self.stale = True

    def update(self, message: netlink_socket.Message) -> None:
        """Take in one message of a dump or a notification."""
        kind, self._sender = message.type, message.sender
        if kind in (rtnetlink.NEWROUTE, rtnetlink.DELROUTE):
            route = parser.parse_route(message.payload)
            if route and route.protocol != PROTOCOL and self._overlaps(route.dst):
                self.routing += 1
                self.changed = True
            if route and route.table == rtnetlink.MAIN_TABLE:
                self._update_route(route, kind == rtnetlink.NEWROUTE, bool(message.flags & rtnetlink.REPLACE))
        elif kind in (rtnetlink.NEWNEIGH, rtnetlink.DELNEIGH):
            neighbour = parser.parse_neighbour(message.payload)
            if neighbour and neighbour.family == rtnetlink.AF_BRIDGE:
                self._update_fdb(neighbour, kind == rtnetlink.NEWNEIGH)
            elif neighbour:
                self._update_neighbour(neighbour, kind == rtnetlink.NEWNEIGH)
        elif kind in (rtnetlink.NEWADDR, rtnetlink.DELADDR):
            address = parser.parse_address(message.payload)
            if address:
                self._update_address(address, kind == rtnetlink.NEWADDR)
        elif kind in (rtnetlink.NEWLINK, rtnetlink.DELLINK):
            link = parser.parse_link(message.payload)
            if link and link.family == rtnetlink.AF_BRIDGE:
                self._update_port(link, kind == rtnetlink.NEWLINK)
            elif link and link.family != socket.AF_INET6:
                self._update_link(link, kind == rtnetlink.NEWLINK)
        elif kind in (rtnetlink.NEWRULE, rtnetlink.DELRULE):
            self.routing += 1
            self.changed = True
        elif kind in (rtnetlink.NEWNETCONF, rtnetlink.DELNETCONF):
            self.changed = True
        elif kind == netlink_socket.OVERRUN:
            self.stale = True

    def _note(self, kind: str, key: object) -> None:
        """Note who changed a managed part."""
        if self._sender:
            if len(self.changed_by) >= _NOTED:
                self.changed_by.clear()
            self.changed_by[kind, key] = self._sender

    def _update_route(self, entry: rtnetlink.RouteEntry, added: bool, replaces: bool) -> None:
        key = (entry.dst, entry.metric)
        if entry.protocol == PROTOCOL or (replaces and added and key in self.routes):
            self._note("routes", key)
        if replaces and added:
            # the kernel reports the new route only, not the end of the one that it replaces
            self.routes.pop(key, None)
            self._unmanaged_routes = {k: text for k, text in self._unmanaged_routes.items() if k[:2] != key}
            self._defaults = {default for default in self._defaults if default[:2] != key}
            self.changed = True
        if entry.protocol == PROTOCOL:
            if added:
                # IPv6 reports the loopback device for an unreachable route
                dev = self.name(entry.oif) if entry.type == "unicast" else ""
                self.routes[key] = Route(entry.type, entry.via, dev, entry.mtu)
            else:
                self.routes.pop(key, None)
            self.changed = True
            return
        if entry.dst in ("0.0.0.0/0", "::/0"):
            default = (entry.dst, entry.metric, entry.oif)
            (self._defaults.add if added else self._defaults.discard)(default)
            self.changed = True
        if entry.protocol == _RA and entry.dst == "::/0":
            (self._ra_links.add if added else self._ra_links.discard)(entry.oif)
            self.changed = True
        connected = entry.protocol == _KERNEL and entry.oif == self._indexes.get(KBR)
        if connected or not self._in_ranges(entry.dst):
            return
        if added:
            via = f"via {entry.via} " if entry.via else ""
            where = f"{via}dev {self.name(entry.oif) or 'none'} metric {entry.metric} proto {entry.protocol}"
            text = f"route {entry.dst} {where} is not managed by ovsmesh; delete it if the mesh is to have this range"
            self._unmanaged_routes[*key, entry.oif] = text
        else:
            self._unmanaged_routes.pop((*key, entry.oif), None)
        self.changed = True

    def _in_ranges(self, dst: str) -> bool:
        address, _, length = dst.partition("/")
        version, family = (6, socket.AF_INET6) if ":" in address else (4, socket.AF_INET)
        start = int.from_bytes(socket.inet_pton(family, address), "big")
        return length != "0" and any(v == version and low <= start <= high for v, low, high in self._ranges)

    def _overlaps(self, dst: str) -> bool:
        """Return whether a route holds addresses of the watched ranges, as one of all addresses does."""
        address, _, length = dst.partition("/")
        version, family, bits = (6, socket.AF_INET6, 128) if ":" in address else (4, socket.AF_INET, 32)
        first = int.from_bytes(socket.inet_pton(family, address), "big")
        last = first | (1 << (bits - int(length))) - 1
        return any(v == version and low <= last and first <= high for v, low, high in self._ranges)

    def narrower_routes(self) -> list[IPNetwork]:
        """Return the ranges of the unmanaged routes in the watched ranges."""
        return [ip_network(key[0]) for key in self._unmanaged_routes]

    def _update_fdb(self, entry: rtnetlink.NeighbourEntry, added: bool) -> None:
        if not entry.mac.startswith(rtnetlink.NODE_MACS) or entry.master != self._indexes.get(KBR, -1):
            return
        name = self.name(entry.ifindex)
        if added and entry.state & rtnetlink.NOARP:
            self.fdb[entry.mac] = name if entry.sticky else name + NOT_STICKY
            self.changed = True
        elif entry.mac in self.fdb and (added or self.fdb[entry.mac].removesuffix(NOT_STICKY) == name):
            # a bridge has one entry of a MAC: a learned one stands in its place
            del self.fdb[entry.mac]
            self.changed = True

    def _update_neighbour(self, entry: rtnetlink.NeighbourEntry, added: bool) -> None:
        if entry.ifindex != self._indexes.get(KBR):
            return
        if added and entry.state & rtnetlink.PERMANENT and entry.protocol == PROTOCOL:
            self.neighbours[entry.dst] = entry.mac
            self._note("neighbours", entry.dst)
            self.changed = True
        elif self.neighbours.pop(entry.dst, None) is not None:
            self._note("neighbours", entry.dst)
            self.changed = True

    def _update_address(self, entry: rtnetlink.AddressEntry, added: bool) -> None:
        key = (entry.address, entry.ifindex)
        if entry.ifindex == self._indexes.get(KBR):
            self._note("addresses", entry.address)
        if added:
            self._addresses[key] = entry.protocol
        else:
            self._addresses.pop(key, None)
            # the routes go with a link's last address of a family, and the kernel does not report that
            self.stale |= entry.ifindex == self._indexes.get(KBR)
        self.changed = True

    def _update_port(self, entry: rtnetlink.LinkEntry, added: bool) -> None:
        """Take in a message of a bridge about one of its ports; it does not hold all of the link."""
        if entry.ifindex == self._indexes.get(OBR):
            self.partial_links.add(entry.ifindex)
        elif added and entry.ifindex in self.links:
            self.links[entry.ifindex] = self.links[entry.ifindex]._replace(hairpin=entry.hairpin)

    def _update_link(self, entry: rtnetlink.LinkEntry, added: bool) -> None:
        old = self.links.get(entry.ifindex)
        kbr = self._indexes.get(KBR)
        now = time.monotonic()
        if added:
            if old is not None and old.name != entry.name and self._indexes.get(old.name) == entry.ifindex:
                del self._indexes[old.name]
            self.links[entry.ifindex] = entry
            self._indexes[entry.name] = entry.ifindex
            if old is not None and kbr is not None and old.master == kbr != entry.master:
                self._released[entry.ifindex] = now, old.hairpin
        else:
            self.links.pop(entry.ifindex, None)
            self._released.pop(entry.ifindex, None)
            if self._indexes.get(entry.name) == entry.ifindex:
                del self._indexes[entry.name]
            if entry.name == KBR:
                # the kernel reports ports as released before the bridge's DELLINK
                recent = {i: h for i, (since, h) in self._released.items() if now - since < _RELEASED_SECONDS}
                self.orphaned_ports |= recent
                self._released.clear()
        if self.watch_ports and kbr is not None and kbr in (entry.master, old.master if old else 0):
            self.changed |= not added or old is None or (old.name, old.master) != (entry.name, entry.master)
        if "bridge" in (entry.kind, old.kind if old else "") and (old is None or not added or old.name != entry.name):
            self.changed = True
        if {entry.name, old.name if old else ""} & {KBR, OBR}:
            if entry != old:
                self._note("links", entry.name)
                self.changed = True
            # a link that goes down loses its routes and neighbours, and the kernel does not report that
            if old is None or not added or old.up != entry.up or old.name != entry.name:
                self.stale = True
        elif old is None or not added or (old.name, old.mtu) != (entry.name, entry.mtu):
            self.changed |= entry.name in _TUNNELS or any(index == entry.ifindex for _, index in self._addresses)

    def name(self, index: int) -> str:
        """Return a link's name: "" for index 0, "#INDEX" for an unknown one."""
        link = self.links.get(index)
        return link.name if link else (f"#{index}" if index else "")

    def index(self, name: str) -> int | None:
        """Return a link's index, None if there is no such link."""
        return self._indexes.get(name)

    def managed_links(self, cni: bool = False) -> tuple[dict[str, Link], list[Unmanaged]]:
        """Return kbr0 and obr0 where they are managed, and the unmanaged links that have their names.

        `cni`: our conflist is installed, by which the CNI bridge plugin creates a missing kbr0.
        """
        managed: dict[str, Link] = {}
        unmanaged = []
        for name in (KBR, OBR):
            entry = self.links.get(self._indexes.get(name, 0))
            if entry is None:
                continue
            kind = entry.kind or "device"
            marked = name == OBR or entry.alias == MARK
            if not marked and not (cni and self._made_by_cni(entry)):
                text = f"{kind} {KBR} is not managed by ovsmesh (no alias {MARK}); rename or delete it"
                unmanaged.append(Unmanaged("links", KBR, text))
            elif name == OBR and entry.kind not in _OVS_KINDS:
                text = f"{kind} {OBR} is not managed by ovsmesh (no Open vSwitch port); rename or delete it"
                unmanaged.append(Unmanaged("links", OBR, text))
            else:
                kind, mac = (entry.kind, entry.mac) if name == KBR else ("", "")
                quiet = entry.quiet and name == OBR
                managed[name] = Link(kind, entry.mtu, entry.up, self.name(entry.master), mac, quiet, not marked)
        return managed, unmanaged

    def _made_by_cni(self, entry: rtnetlink.LinkEntry) -> bool:
        """Return whether a bridge is as the CNI bridge plugin creates it: no alias, no address, ports of pods.

        An address with our mark was added when a managed kbr0 had just been deleted and replaced by this one.
        """
        ports = [link for link in self.links.values() if link.master == entry.ifindex]
        return (
            entry.kind == "bridge"
            and not entry.alias
            and all(port.kind == "veth" or port.name == OBR for port in ports)
            and all(
                a.startswith("fe80:") or protocol == PROTOCOL
                for (a, index), protocol in self._addresses.items()
                if index == entry.ifindex
            )
        )

    def managed_addresses(self) -> dict[str, str]:
        """Return the managed addresses of kbr0, each with the link's name."""
        kbr = self._indexes.get(KBR)
        return {a: KBR for (a, index), protocol in self._addresses.items() if index == kbr and self._owns(a, protocol)}

    def _owns(self, address: str, protocol: int) -> bool:
        """Return whether an address of kbr0 is managed: it has our mark, or is a gateway.

        Kernels before 5.18 store no mark.
        """
        if protocol == PROTOCOL:
            return True
        text, _, length = address.partition("/")
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
        host = int.from_bytes(packed, "big") & ((1 << (len(packed) * 8 - int(length))) - 1)
        return host == 1 and self._in_ranges(address)

    def unmanaged_routes(self) -> list[Unmanaged]:
        """Return the unmanaged routes in the watched ranges."""
        kbr = self._indexes.get(KBR)
        # Docker adds a route for its IPv6 range to the bridge, as the kernel has done already
        own = {str(ip_interface(a).network) for a, index in self._addresses if index == kbr}
        twice = {
            key
            for key, text in self._unmanaged_routes.items()
            if key[2] == kbr and key[0] in own and text.startswith(f"route {key[0]} dev ")
        }
        return [Unmanaged("routes", key[0], text) for key, text in self._unmanaged_routes.items() if key not in twice]

    def links_with_address(self, address: str) -> list[rtnetlink.LinkEntry]:
        """Return the links that have this address, given without its prefix length; the loopback device last."""
        found = {i for a, i in self._addresses if a.partition("/")[0] == address}
        return sorted((self.links[i] for i in found if i in self.links), key=lambda link: (link.name == "lo", link))

    def addressed(self, index: int) -> bool:
        """Return whether a link has an address that is not link-local."""
        return any(i == index and not address.startswith("fe80:") for address, i in self._addresses)

    def ra_links(self) -> tuple[str, ...]:
        """Return the links whose IPv6 default route came from a router advertisement."""
        return tuple(sorted(self.links[index].name for index in self._ra_links if index in self.links))

    def exits(self) -> tuple[str, ...]:
        """Return the links by which packets leave this host: those with an address or a default route.

        A bridge with addresses alone is none of them: containers or virtual machines of others are behind it.
        """
        with_address = {index for a, index in self._addresses if not a.startswith(_LINK_LOCAL)}
        addressed = [link for i in with_address if (link := self.links.get(i)) and link.kind not in _NO_EXITS]
        routed = [link for *_, i in self._defaults if (link := self.links.get(i))]
        names = {link.name for link in (*addressed, *routed)}
        return tuple(sorted(name for name in names - {"lo", KBR, OBR} if _PLAIN_NAME.fullmatch(name)))

    def bridges(self) -> tuple[str, ...]:
        """Return the Linux bridges of others: not kbr0, also where somebody has renamed it."""
        names = {link.name for link in self.links.values() if link.kind == "bridge" and link.alias != MARK}
        return tuple(sorted(name for name in names - {KBR} if _PLAIN_NAME.fullmatch(name)))

    def addresses_of(self, name: str) -> tuple[str, ...]:
        """Return all addresses of a link, managed or not."""
        index = self._indexes.get(name, 0)
        return tuple(sorted(address for address, i in self._addresses if i == index))

    def bridge_ports(self, name: str) -> tuple[str, ...] | None:
        """Return the ports of a Linux bridge, managed or not; None if there is no such bridge."""
        entry = self.links.get(self._indexes.get(name, 0))
        return tuple(self.ports_of(name)) if entry is not None and entry.kind == "bridge" else None

    def ports_of(self, name: str) -> list[str]:
        """Return the names of a bridge's ports."""
        index = self._indexes.get(name)
        return sorted(link.name for link in self.links.values() if index and link.master == index)
