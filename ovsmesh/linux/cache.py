"""What the kernel told of links, addresses, routes, neighbours and FDB entries, as far as we care.

A cache of the system, fed message by message, whole or as notifications; never of our intentions.
Tells ours by their marks. Imports rtnl and model; opens no socket.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from ipaddress import ip_interface

from ovsmesh.dataplane.types import KBR, MARK, OBR, PROTOCOL, Link, Route, RouteKey, Unmanaged
from ovsmesh.linux import rtnetlink
from ovsmesh.mesh.types import IPNetwork

_MAIN = 254
_KERNEL, _RA = 2, 9
"""RTPROT_ KERNEL, RA."""
_OURS = ("0a:58:", "0e:58:")
"""How the MAC of a node begins, see mesh.mac."""
_ORPHANED = 2.0
"""Seconds within which a bridge's ports lose it before its own deletion is told."""
_OVS_KINDS = ("openvswitch", "tun")
"""What obr0 is in the kernel: with the kernel datapath, with the userspace one."""


class Mirror:
    """`take` each message; `changed`, `doubt` and `reread` then say what has become of what was known."""

    def __init__(self) -> None:
        self.changed = True
        """Something that we read may be another."""
        self.reread: set[int] = set()
        """Links of which only a bridge's part was told."""
        self.lost_ports: dict[int, bool] = {}
        """Ports that a deleted kbr0 left behind → whether they were hairpins."""
        self._ranges: list[tuple[int, int, int]] = []
        self._orphans: dict[int, tuple[float, bool]] = {}
        self.links: dict[int, rtnetlink.LinkEntry] = {}
        self._indexes: dict[str, int] = {}
        self.clear()
        self.doubt = True
        """The kernel may have changed more than it told: read all again."""

    def clear(self) -> None:
        """Forgets all, before a whole reading; call `whole` after it."""
        self._before = (self._indexes.get(KBR), self.links) if self.links else (None, {})
        self.links = {}
        self._indexes = {}
        self._addresses: dict[tuple[str, int], int] = {}
        self.routes: dict[RouteKey, Route] = {}
        self._unmanaged_routes: dict[tuple[str, int, int], str] = {}
        self._ra_links: set[int] = set()
        self.neighbours: dict[str, str] = {}
        self.fdb: dict[str, str] = {}
        self.doubt = False
        self.reread.clear()

    def whole(self) -> None:
        """All was read: a kbr0 that is gone since the reading before may have left ports behind."""
        kbr, links = self._before
        self._before = (None, {})
        if kbr is not None and kbr not in self.links:
            ports = {i: link.hairpin for i, link in links.items() if link.master == kbr}
            ports |= {i: hairpin for i, (_, hairpin) in self._orphans.items()}
            self.lost_ports |= {i: h for i, h in ports.items() if i in self.links and not self.links[i].master}
        self._orphans.clear()

    def watch(self, cidrs: Iterable[IPNetwork]) -> None:
        """Which ranges unmanaged routes are of interest in: the cluster CIDRs."""
        ranges: list[tuple[int, int, int]] = []
        ranges += [(c.version, int(c.network_address), int(c.broadcast_address)) for c in cidrs]
        if ranges != self._ranges:
            self._ranges = ranges
            self.doubt = True

    def take(self, message: rtnetlink.Message) -> None:
        """Takes in one message of a dump or a notification."""
        kind = message.type
        if kind in (rtnetlink.NEWROUTE, rtnetlink.DELROUTE):
            route = rtnetlink.parse_route(message.payload)
            if route and route.table == _MAIN:
                self._route(route, kind == rtnetlink.NEWROUTE, bool(message.flags & rtnetlink.REPLACE))
        elif kind in (rtnetlink.NEWNEIGH, rtnetlink.DELNEIGH):
            neighbour = rtnetlink.parse_neighbour(message.payload)
            if neighbour and neighbour.family == rtnetlink.AF_BRIDGE:
                self._fdb_entry(neighbour, kind == rtnetlink.NEWNEIGH)
            elif neighbour:
                self._neighbour(neighbour, kind == rtnetlink.NEWNEIGH)
        elif kind in (rtnetlink.NEWADDR, rtnetlink.DELADDR):
            address = rtnetlink.parse_address(message.payload)
            if address:
                self._address(address, kind == rtnetlink.NEWADDR)
        elif kind in (rtnetlink.NEWLINK, rtnetlink.DELLINK):
            link = rtnetlink.parse_link(message.payload)
            if link is None:
                return
            if link.family == rtnetlink.AF_BRIDGE:
                if link.ifindex == self._indexes.get(OBR):
                    self.reread.add(link.ifindex)
                elif kind == rtnetlink.NEWLINK and link.ifindex in self.links:
                    self.links[link.ifindex] = self.links[link.ifindex]._replace(hairpin=link.hairpin)
            else:
                self._link(link, kind == rtnetlink.NEWLINK)
        elif kind in (rtnetlink.NEWNETCONF, rtnetlink.DELNETCONF):
            self.changed = True

    def _route(self, entry: rtnetlink.RouteEntry, there: bool, replaces: bool) -> None:
        key = (entry.dst, entry.metric)
        if replaces and there:
            # told as one new route, never as the old one's end
            self.routes.pop(key, None)
            self._unmanaged_routes = {k: text for k, text in self._unmanaged_routes.items() if k[:2] != key}
            self.changed = True
        if entry.protocol == PROTOCOL:
            if there:
                # IPv6 tells the loopback device for a route that leads nowhere
                dev = self.name(entry.oif) if entry.type == "unicast" else ""
                self.routes[key] = Route(entry.type, entry.via, dev, entry.mtu)
            else:
                self.routes.pop(key, None)
            self.changed = True
            return
        if entry.protocol == _RA and entry.dst == "::/0":
            (self._ra_links.add if there else self._ra_links.discard)(entry.oif)
            self.changed = True
        connected = entry.protocol == _KERNEL and entry.oif == self._indexes.get(KBR)
        if connected or not self._interesting(entry.dst):
            return
        if there:
            via = f"via {entry.via} " if entry.via else ""
            where = f"{via}dev {self.name(entry.oif) or 'none'} metric {entry.metric} proto {entry.protocol}"
            text = f"route {entry.dst} {where} is not ours; delete it if the mesh is to have this range"
            self._unmanaged_routes[*key, entry.oif] = text
        else:
            self._unmanaged_routes.pop((*key, entry.oif), None)
        self.changed = True

    def _interesting(self, dst: str) -> bool:
        address, _, length = dst.partition("/")
        version, family = (6, socket.AF_INET6) if ":" in address else (4, socket.AF_INET)
        start = int.from_bytes(socket.inet_pton(family, address), "big")
        return length != "0" and any(v == version and low <= start <= high for v, low, high in self._ranges)

    def _fdb_entry(self, entry: rtnetlink.NeighbourEntry, there: bool) -> None:
        if not entry.mac.startswith(_OURS) or entry.master != self._indexes.get(KBR, -1):
            return
        name = self.name(entry.ifindex)
        if there and entry.state & rtnetlink.NOARP:
            self.fdb[entry.mac] = name
            self.changed = True
        elif self.fdb.get(entry.mac) == name:
            del self.fdb[entry.mac]
            self.changed = True

    def _neighbour(self, entry: rtnetlink.NeighbourEntry, there: bool) -> None:
        if entry.ifindex != self._indexes.get(KBR):
            return
        if there and entry.state & rtnetlink.PERMANENT and entry.protocol == PROTOCOL:
            self.neighbours[entry.dst] = entry.mac
            self.changed = True
        elif self.neighbours.pop(entry.dst, None) is not None:
            self.changed = True

    def _address(self, entry: rtnetlink.AddressEntry, there: bool) -> None:
        key = (entry.address, entry.ifindex)
        if there:
            self._addresses[key] = entry.protocol
        else:
            self._addresses.pop(key, None)
            # with a link's last address of a family its routes go, without a word
            self.doubt |= entry.ifindex == self._indexes.get(KBR)
        self.changed = True

    def _link(self, entry: rtnetlink.LinkEntry, there: bool) -> None:
        old = self.links.get(entry.ifindex)
        kbr = self._indexes.get(KBR)
        now = time.monotonic()
        if there:
            if old is not None and old.name != entry.name and self._indexes.get(old.name) == entry.ifindex:
                del self._indexes[old.name]
            self.links[entry.ifindex] = entry
            self._indexes[entry.name] = entry.ifindex
            if old is not None and kbr is not None and old.master == kbr != entry.master:
                self._orphans[entry.ifindex] = now, old.hairpin
        else:
            self.links.pop(entry.ifindex, None)
            self._orphans.pop(entry.ifindex, None)
            if self._indexes.get(entry.name) == entry.ifindex:
                del self._indexes[entry.name]
            if entry.name == KBR:
                # its ports are told masterless before its end is: they are whom it leaves behind
                self.lost_ports |= {i: h for i, (since, h) in self._orphans.items() if now - since < _ORPHANED}
                self._orphans.clear()
        if {entry.name, old.name if old else ""} & {KBR, OBR}:
            if entry != old:
                self.changed = True
            # going down takes routes and neighbours along without a word
            if old is None or not there or old.up != entry.up or old.name != entry.name:
                self.doubt = True
        elif old is None or not there or (old.name, old.mtu) != (entry.name, entry.mtu):
            self.changed |= any(index == entry.ifindex for _, index in self._addresses)

    def name(self, index: int) -> str:
        """A link's name; "" for none, "#INDEX" for one that is not known."""
        link = self.links.get(index)
        return link.name if link else (f"#{index}" if index else "")

    def index(self, name: str) -> int | None:
        return self._indexes.get(name)

    def our_links(self, plugged: bool = False) -> tuple[dict[str, Link], list[Unmanaged]]:
        """kbr0 and obr0 where they are ours, and what stands in their place where not.

        `plugged`: a conflist of ours has the CNI bridge plugin plug pods into kbr0, and make one that is not there.
        """
        ours: dict[str, Link] = {}
        unmanaged = []
        for name in (KBR, OBR):
            entry = self.links.get(self._indexes.get(name, 0))
            if entry is None:
                continue
            marked = name == OBR or entry.alias == MARK
            if not marked and not (plugged and self._by_plugin(entry)):
                text = f"{entry.kind or 'device'} {KBR} is there and not ours (no alias {MARK}); rename or delete it"
                unmanaged.append(Unmanaged("links", KBR, text))
            elif name == OBR and entry.kind not in _OVS_KINDS:
                text = f"{entry.kind or 'device'} {OBR} is there and not an Open vSwitch port; rename or delete it"
                unmanaged.append(Unmanaged("links", OBR, text))
            else:
                kind, mac = (entry.kind, entry.mac) if name == KBR else ("", "")
                quiet = entry.quiet and name == OBR
                ours[name] = Link(kind, entry.mtu, entry.up, self.name(entry.master), mac, quiet, not marked)
        return ours, unmanaged

    def _by_plugin(self, entry: rtnetlink.LinkEntry) -> bool:
        """Whether a bridge is as the CNI bridge plugin makes it by our conflist: no alias, no address, pods only.

        An address with our mark came when ours had just been deleted and this one was there already.
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

    def our_addresses(self) -> dict[str, str]:
        """The addresses of kbr0 that are ours."""
        kbr = self._indexes.get(KBR)
        return {a: KBR for (a, index), protocol in self._addresses.items() if index == kbr and self._own(a, protocol)}

    def _own(self, address: str, protocol: int) -> bool:
        """Whether an address of kbr0 is ours: marked, or, as kernels before 5.18 keep no mark, a gateway."""
        if protocol == PROTOCOL:
            return True
        text, _, length = address.partition("/")
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
        host = int.from_bytes(packed, "big") & ((1 << (len(packed) * 8 - int(length))) - 1)
        return host == 1 and self._interesting(address)

    def unmanaged_routes(self) -> list[Unmanaged]:
        """Routes in the watched ranges that are not ours."""
        kbr = self._indexes.get(KBR)
        # Docker routes its IPv6 range into the bridge once more, as the kernel has done already
        own = {str(ip_interface(a).network) for a, index in self._addresses if index == kbr}
        twice = {
            key
            for key, text in self._unmanaged_routes.items()
            if key[2] == kbr and key[0] in own and text.startswith(f"route {key[0]} dev ")
        }
        return [Unmanaged("routes", key[0], text) for key, text in self._unmanaged_routes.items() if key not in twice]

    def carrier(self, address: str) -> rtnetlink.LinkEntry | None:
        """The link that has this address."""
        index = next((i for a, i in self._addresses if a.partition("/")[0] == address), None)
        return None if index is None else self.links.get(index)

    def ra_links(self) -> tuple[str, ...]:
        """Links whose IPv6 default route came from a router advertisement."""
        return tuple(sorted(self.links[index].name for index in self._ra_links if index in self.links))

    def addresses_of(self, name: str) -> tuple[str, ...]:
        """All addresses of a link, ours or not."""
        index = self._indexes.get(name, 0)
        return tuple(sorted(address for address, i in self._addresses if i == index))

    def bridge_ports(self, name: str) -> tuple[str, ...] | None:
        """The ports of a Linux bridge of any owner; None when there is no such bridge."""
        entry = self.links.get(self._indexes.get(name, 0))
        return tuple(self.ports_of(name)) if entry is not None and entry.kind == "bridge" else None

    def ports_of(self, name: str) -> list[str]:
        """The names of a bridge's ports."""
        index = self._indexes.get(name)
        return sorted(link.name for link in self.links.values() if index and link.master == index)
