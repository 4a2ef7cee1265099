"""The kernel side of the dataplane: links, addresses, sysctls, routes, neighbours, FDB entries.

Links go through pyroute2, what grows with the mesh through rtnl. What was read is kept current
from the kernel's notifications and read whole at start, on doubt (a lost notification, a bridge
that went down and took its routes along silently) and whenever the agent asks.
Never imports ovs or kubernetes.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ovsmesh import rtnl
from ovsmesh.model import KBR, MARK, OBR, PROTOCOL, Foreign, IPNetwork, Link, OvsmeshError, Route, RouteKey

_SOL_NETLINK, _ADD_MEMBERSHIP, _SO_RCVBUFFORCE = 270, 1, 33
_GROUPS = (1, 3, 5, 7, 9, 11, 24, 25)
"""RTNLGRP_ LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_NETCONF, IPV6_NETCONF."""
_RECEIVE_BYTES = 8 << 20
_BATCH = 128
"""Messages sent before their errors are read: what fits the receive buffer if all are refused."""
_TIMEOUT = 10.0
_ORPHANED = 2.0
"""Seconds within which a bridge's ports lose it before its own deletion is told."""
_NEW = "ovsmesh-new"
_OURS = ("0a:58:", "0e:58:")
_RA = 9
"""RTPROT_RA."""
_QUIET = ("learning", "unicast_flood", "mcast_flood", "bcast_flood")
_PROC = Path("/proc/sys")


class Netlink:
    """The calling thread's network namespace as we see and change it; not thread-safe."""

    def __init__(self) -> None:
        try:
            self._command = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
            self._command.settimeout(_TIMEOUT)
            self._command.bind((0, 0))
            self._bell = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
            self._bell.setblocking(False)
            for each in (self._command, self._bell):
                each.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
            self._bell.bind((0, 0))
        except PermissionError as error:
            raise OvsmeshError(
                "not allowed to open a privileged netlink socket; run as root (CAP_NET_ADMIN)"
            ) from error
        for group in _GROUPS:
            self._bell.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._ip = IPRoute()
        self._seq = 0
        self._doubt = True
        self._changed = True
        self._stale_links = True
        self._ranges: list[tuple[int, int, int]] = []
        self._links: dict[int, rtnl.LinkEntry] = {}
        self._indexes: dict[str, int] = {}
        self._orphans: dict[int, float] = {}
        self._lost_ports: set[int] = set()
        self._addresses: dict[tuple[str, int], int] = {}
        self._routes: dict[RouteKey, Route] = {}
        self._foreign_routes: dict[tuple[str, int, int], str] = {}
        self._ra_links: set[int] = set()
        self._neighbours: dict[str, str] = {}
        self._fdb: dict[str, str] = {}
        self._ours: dict[str, Link] = {}
        self._foreign_links: tuple[Foreign, ...] = ()

    def close(self) -> None:
        self._ip.close()
        self._command.close()
        self._bell.close()

    def fds(self) -> list[int]:
        return [self._bell.fileno()]

    def dirty(self) -> None:
        """Makes the next observation read the kernel whole."""
        self._doubt = True

    def watch(self, cidrs: Iterable[IPNetwork]) -> None:
        """Which ranges foreign routes are of interest in: the cluster CIDRs."""
        ranges: list[tuple[int, int, int]] = [
            (c.version, int(c.network_address), int(c.broadcast_address)) for c in cidrs
        ]
        if ranges != self._ranges:
            self._ranges = ranges
            self._doubt = True

    # what the kernel tells

    def drain(self) -> bool:
        """Takes in notifications; True if something that we read may have changed."""
        while True:
            try:
                data = self._bell.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # the kernel dropped notifications
                self._doubt = True
                continue
            for message in rtnl.messages(data):
                self._take(message)
        changed = self._changed or self._doubt or self._stale_links
        self._changed = False
        return changed

    def _take(self, message: rtnl.Message) -> None:
        kind = message.type
        if kind in (rtnl.NEWROUTE, rtnl.DELROUTE):
            route = rtnl.parse_route(message.payload)
            if route:
                self._take_route(route, kind == rtnl.NEWROUTE)
        elif kind in (rtnl.NEWNEIGH, rtnl.DELNEIGH):
            neighbour = rtnl.parse_neighbour(message.payload)
            if neighbour:
                self._take_neighbour(neighbour, kind == rtnl.NEWNEIGH)
        elif kind in (rtnl.NEWADDR, rtnl.DELADDR):
            address = rtnl.parse_address(message.payload)
            if address:
                self._take_address(address, kind == rtnl.NEWADDR)
        elif kind in (rtnl.NEWLINK, rtnl.DELLINK):
            self._take_link(rtnl.parse_link(message.payload), kind == rtnl.NEWLINK)
        elif kind in (rtnl.NEWNETCONF, rtnl.DELNETCONF):
            self._changed = True

    def _take_route(self, entry: rtnl.RouteEntry, there: bool) -> None:
        if entry.table != 254:
            return
        key = (entry.dst, entry.metric)
        if entry.protocol == PROTOCOL:
            if there:
                # IPv6 tells the loopback device for a route that leads nowhere
                dev = self._name(entry.oif) if entry.type == "unicast" else ""
                self._routes[key] = Route(entry.type, entry.via, dev, entry.mtu)
            else:
                self._routes.pop(key, None)
            self._changed = True
            return
        if entry.protocol == _RA and entry.dst == "::/0":
            (self._ra_links.add if there else self._ra_links.discard)(entry.oif)
            self._changed = True
        if entry.oif == self._indexes.get(KBR) or not self._interesting(entry.dst):
            return
        if there and self._routes.pop(key, None) is not None:
            # a replacement is told as one new route, never as the old one's end
            self._changed = True
        where = f"via {entry.via} " if entry.via else ""
        detail = f"route {entry.dst} {where}dev {self._name(entry.oif) or 'none'} metric {entry.metric} proto {entry.protocol}"
        if there:
            self._foreign_routes[*key, entry.oif] = f"{detail} is not ours; delete it if the mesh is to have this range"
        else:
            self._foreign_routes.pop((*key, entry.oif), None)
        self._changed = True

    def _interesting(self, dst: str) -> bool:
        address, _, length = dst.partition("/")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        packed = socket.inet_pton(family, address)
        version, start = (6 if ":" in address else 4), int.from_bytes(packed, "big")
        return any(v == version and low <= start <= high and int(length) > 0 for v, low, high in self._ranges)

    def _take_neighbour(self, entry: rtnl.NeighbourEntry, there: bool) -> None:
        if entry.family == rtnl.AF_BRIDGE:
            if not entry.mac.startswith(_OURS) or entry.master != self._indexes.get(KBR, -1):
                return
            name = self._name(entry.ifindex)
            if there and entry.state & rtnl.NOARP:
                self._fdb[entry.mac] = name
            elif self._fdb.get(entry.mac) == name:
                del self._fdb[entry.mac]
            else:
                return
            self._changed = True
        elif entry.ifindex == self._indexes.get(KBR) and (entry.protocol == PROTOCOL or entry.dst in self._neighbours):
            if there and entry.state & rtnl.PERMANENT and entry.protocol == PROTOCOL:
                self._neighbours[entry.dst] = entry.mac
            else:
                self._neighbours.pop(entry.dst, None)
            self._changed = True

    def _take_address(self, entry: rtnl.AddressEntry, there: bool) -> None:
        key = (entry.address, entry.ifindex)
        if there:
            self._addresses[key] = entry.protocol
        else:
            self._addresses.pop(key, None)
        self._changed = True

    def _take_link(self, entry: rtnl.LinkEntry, there: bool) -> None:
        if entry.family == rtnl.AF_BRIDGE:
            # a bridge's own word on its port: only a port's flags are news
            self._stale_links |= entry.name == OBR
            return
        old = self._links.get(entry.ifindex)
        kbr = self._indexes.get(KBR)
        now = time.monotonic()
        if there:
            self._links[entry.ifindex] = entry
            self._indexes[entry.name] = entry.ifindex
            if old is not None and old.name != entry.name and self._indexes.get(old.name) == entry.ifindex:
                del self._indexes[old.name]
            if old is not None and kbr is not None and old.master == kbr != entry.master:
                self._orphans[entry.ifindex] = now
        else:
            self._links.pop(entry.ifindex, None)
            self._orphans.pop(entry.ifindex, None)
            if self._indexes.get(entry.name) == entry.ifindex:
                del self._indexes[entry.name]
            if entry.name == KBR:
                # its ports are told masterless before its end is: they are whom it leaves behind
                self._lost_ports |= {i for i, since in self._orphans.items() if now - since < _ORPHANED}
        names = {entry.name, old.name if old else ""}
        if names & {KBR, OBR}:
            self._stale_links = True
            # going down takes routes and neighbours along without a word
            if old is None or not there or old.up != entry.up or old.name != entry.name:
                self._doubt = True
        elif old is None or not there or old.name != entry.name:
            self._changed |= not entry.name.startswith("veth")
        else:
            self._changed |= any(index == entry.ifindex for _, index in self._addresses)

    def _name(self, index: int) -> str:
        link = self._links.get(index)
        return link.name if link else (f"#{index}" if index else "")

    # reading whole

    def _dump(self, kind: int, family: int, take: Callable[[rtnl.Message], None]) -> None:
        for _ in range(3):
            self._seq += 1
            self._command.send(rtnl.dump(kind, self._seq, family))
            if self._collect(self._seq, take):
                return
        raise OvsmeshError(f"the kernel's tables change too fast to be read (netlink request {kind})")

    def _collect(self, seq: int, take: Callable[[rtnl.Message], None]) -> bool:
        """False when the dump was cut through by a change and must be taken again."""
        whole = True
        while True:
            for message in rtnl.messages(self._command.recv(1 << 18)):
                if message.seq != seq:
                    continue
                whole &= not message.flags & rtnl.DUMP_INTR
                if message.type == rtnl.DONE:
                    return whole
                if message.type == rtnl.ERROR:
                    # a family that this kernel does not have
                    return True
                take(message)

    def _sync(self) -> None:
        self._doubt = False
        self._stale_links = True
        for mirror in (self._links, self._indexes, self._addresses, self._routes, self._foreign_routes):
            mirror.clear()
        for each in (self._neighbours, self._fdb):
            each.clear()
        self._ra_links.clear()

        def link(message: rtnl.Message) -> None:
            entry = rtnl.parse_link(message.payload)
            self._links[entry.ifindex] = entry
            self._indexes[entry.name] = entry.ifindex

        self._dump(rtnl.GETLINK, 0, link)
        self._dump(rtnl.GETADDR, 0, self._take)
        families: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
        for family in families:
            self._dump(rtnl.GETROUTE, family, self._take)
        if KBR in self._indexes:
            for family in (*families, rtnl.AF_BRIDGE):
                self._dump(rtnl.GETNEIGH, family, self._take)

    def _read_link(self, name: str) -> dict[str, Any] | None:
        try:
            found = self._ip.get_links(ifname=name)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise
        message = next(iter(found), None)
        if message is None:
            return None
        info = message.get_attr("IFLA_LINKINFO")
        slave = info.get_attr("IFLA_INFO_SLAVE_DATA") if info else None
        flags = [slave.get_attr(f"IFLA_BRPORT_{flag.upper()}") if slave else 1 for flag in _QUIET]
        return {
            "kind": (info.get_attr("IFLA_INFO_KIND") if info else "") or "",
            "mtu": message.get_attr("IFLA_MTU"),
            "up": bool(message["flags"] & 1),
            "master": self._name(message.get_attr("IFLA_MASTER") or 0),
            "mac": message.get_attr("IFLA_ADDRESS") or "",
            "quiet": not any(flag for flag in flags if flag is not None),
            "alias": message.get_attr("IFLA_IFALIAS") or "",
        }

    def _read_links(self) -> None:
        self._stale_links = False
        ours: dict[str, Link] = {}
        foreign = []
        kbr = self._read_link(KBR)
        if kbr is not None and kbr["alias"] != MARK:
            what = kbr["kind"] or "device"
            text = f"{what} {KBR} is there and not ours (no alias {MARK}); rename or delete it"
            foreign.append(Foreign("links", KBR, text))
        elif kbr is not None:
            ours[KBR] = Link(kbr["kind"], kbr["mtu"], kbr["up"], kbr["master"], kbr["mac"], False)
        obr = self._read_link(OBR)
        if obr is not None and obr["kind"] not in ("openvswitch", "tun"):
            text = f"{obr['kind'] or 'device'} {OBR} is there and not an Open vSwitch port; rename or delete it"
            foreign.append(Foreign("links", OBR, text))
        elif obr is not None:
            ours[OBR] = Link("", obr["mtu"], obr["up"], obr["master"], "", obr["quiet"])
        self._ours, self._foreign_links = ours, tuple(foreign)

    def observe(self, sysctls: Iterable[str]) -> tuple[dict[str, dict[Any, Any]], list[Foreign]]:
        """What the kernel holds of ours, by field of Dataplane, the given sysctls, and foreign things."""
        if self._doubt:
            self.drain()
            self._sync()
        if self._stale_links:
            self._read_links()
        kbr = self._indexes.get(KBR) if KBR in self._ours else None
        found: dict[str, dict[Any, Any]] = {
            "sysctls": read_sysctls(sysctls),
            "links": dict(self._ours),
            "addresses": {a: KBR for (a, index), p in self._addresses.items() if index == kbr and self._own(a, p)},
            "neighbours": dict(self._neighbours),
            "fdb": dict(self._fdb),
            "routes": dict(self._routes),
        }
        foreign = [Foreign("routes", key[0], text) for key, text in self._foreign_routes.items()]
        return found, [*self._foreign_links, *foreign]

    def _own(self, address: str, protocol: int) -> bool:
        """Whether an address of kbr0 is ours: marked, or, as kernels before 5.18 keep no mark, a gateway."""
        if protocol == PROTOCOL:
            return True
        text, _, length = address.partition("/")
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
        host_bits = len(packed) * 8 - int(length)
        return int.from_bytes(packed, "big") & ((1 << host_bits) - 1) == 1 and self._interesting(f"{text}/{length}")

    def underlay(self, address: str) -> tuple[str, int] | None:
        """The link that carries this address and its MTU in bytes; None when no link does."""
        if self._doubt:
            self.drain()
            self._sync()
        index = next((i for a, i in self._addresses if a.partition("/")[0] == address), None)
        if index is None:
            return None
        link = next(iter(self._ip.get_links(index)), None)
        return None if link is None else (self._name(index), int(link.get_attr("IFLA_MTU")))

    def ra_links(self) -> tuple[str, ...]:
        """Links whose IPv6 default route came from a router advertisement."""
        return tuple(sorted(name for index in self._ra_links if (name := self._name(index)) and name[0] != "#"))

    # changing

    def set_link(self, name: str, want: Link, have: Link | None) -> None:
        """Makes kbr0, or brings it or obr0 to what is wanted. Raises OvsmeshError when it can't."""
        if name == KBR and have is None:
            self._make_bridge(want)
        index = self._index(name)
        if index is None:
            raise OvsmeshError(f"link {name} is not there yet; ovs-vswitchd makes it: is it running?")
        words: dict[str, Any] = {"mtu": want.mtu, "state": "up" if want.up else "down"}
        if want.mac:
            words["address"] = want.mac
        if want.master and (have is None or have.master != want.master):
            words["master"] = self._index(want.master) or 0
        self._do(f"set link {name}", lambda: self._ip.link("set", index=index, **words))
        if want.quiet:
            self._do(f"set port {name}", lambda: self._ip.brport("set", index=index, **dict.fromkeys(_QUIET, 0)))
        self._stale_links = True

    def _make_bridge(self, want: Link) -> None:
        # marked before it has its name: a kbr0 without our mark would be someone else's for ever
        stale = self._index(_NEW)
        if stale:
            self._do(f"delete link {_NEW}", lambda: self._ip.link("del", index=stale))
        words = {"ifname": _NEW, "kind": want.kind, "address": want.mac, "mtu": want.mtu}
        self._do(f"add link {KBR}", lambda: self._ip.link("add", **words))
        index = self._index(_NEW)
        self._do(f"mark link {KBR}", lambda: self._ip.link("set", index=index, ifalias=MARK))
        self._do(f"name link {KBR}", lambda: self._ip.link("set", index=index, ifname=KBR))
        self._do(f"set link {KBR}", lambda: self._ip.link("set", index=index, state="up"))
        for port in self._lost_ports:
            # pods that the deleted bridge left behind
            if port in self._links and not self._links[port].master:
                enslave = functools.partial(self._ip.link, "set", index=port, master=index)
                self._do(f"enslave {self._name(port)}", enslave)
        self._lost_ports.clear()
        self._doubt = True

    def del_link(self, name: str) -> None:
        """Deletes kbr0; obr0 goes with its OVS bridge."""
        index = self._index(name)
        if name == KBR and index is not None:
            self._do(f"delete link {name}", lambda: self._ip.link("del", index=index))
            self._doubt = True

    def ports_of(self, name: str) -> list[str]:
        """The names of a bridge's ports."""
        index = self._indexes.get(name)
        return sorted(link.name for link in self._links.values() if index and link.master == index)

    def _index(self, name: str) -> int | None:
        try:
            return socket.if_nametoindex(name)
        except OSError:
            return None

    def _do(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except NetlinkError as error:
            raise OvsmeshError(f"kernel refused to {what}: {os.strerror(error.code)}") from error

    def batch(self, messages: list[tuple[Any, bytes]]) -> dict[Any, str]:
        """Sends messages made by `message`, in order; returns label → error for those refused."""
        refused: dict[Any, str] = {}
        for start in range(0, len(messages), _BATCH):
            some = messages[start : start + _BATCH]
            first = self._seq + 1
            self._seq += len(some)
            data = bytearray()
            for offset, (_, one) in enumerate(some):
                numbered = bytearray(one)
                numbered[8:12] = (first + offset).to_bytes(4, sys.byteorder)
                if offset == len(some) - 1:
                    numbered[6] |= rtnl.ACK
                data += numbered + b"\0" * (-len(numbered) % 4)
            self._command.send(data)
            waiting = True
            while waiting:
                for message in rtnl.messages(self._command.recv(1 << 18)):
                    if message.type != rtnl.ERROR or not first <= message.seq <= self._seq:
                        continue
                    code = rtnl.error_of(message)
                    if code:
                        refused[some[message.seq - first][0]] = os.strerror(code)
                    waiting &= message.seq != self._seq
        return refused

    def message(self, op: str, kind: str, key: Any, value: Any) -> bytes:
        """The netlink message that adds, changes ("+", "~": value is wanted) or removes ("-": value is had) a part."""
        kbr = self._index(KBR) or 0
        flags = {"+": rtnl.CREATE | rtnl.EXCL, "~": rtnl.CREATE | rtnl.REPLACE, "-": 0}[op]
        if kind == "routes":
            oif = kbr if value.dev == KBR else self._indexes.get(value.dev, 0)
            entry = rtnl.RouteEntry(key[0], key[1], value.type, value.via, oif, value.mtu, PROTOCOL, 254)
            return rtnl.route(rtnl.DELROUTE if op == "-" else rtnl.NEWROUTE, flags, 0, entry)
        if kind == "addresses":
            return rtnl.address(
                rtnl.DELADDR if op == "-" else rtnl.NEWADDR,
                flags,
                0,
                rtnl.AddressEntry(key, kbr, PROTOCOL if op != "-" else 0),
            )
        # the kernel may hold a learned entry in the place of ours
        flags = 0 if op == "-" else rtnl.CREATE | rtnl.REPLACE
        what = rtnl.DELNEIGH if op == "-" else rtnl.NEWNEIGH
        if kind == "neighbours":
            neighbour = rtnl.NeighbourEntry(0, key, value, kbr, rtnl.PERMANENT, PROTOCOL, 0)
        else:
            port = self._indexes.get(value) or self._index(value) or 0
            neighbour = rtnl.NeighbourEntry(rtnl.AF_BRIDGE, "", key, port, rtnl.NOARP, 0, 0)
        return rtnl.neighbour(what, flags, 0, neighbour)


def read_sysctls(keys: Iterable[str]) -> dict[str, str]:
    """The values of those sysctls (paths below /proc/sys) that this kernel has."""
    found = {}
    for key in keys:
        try:
            found[key] = (_PROC / key).read_text().strip()
        except OSError:
            continue
    return found


def write_sysctl(key: str, value: str) -> None:
    """Raises OvsmeshError when the kernel has no such setting or refuses the value."""
    try:
        (_PROC / key).write_text(value + "\n")
    except OSError as error:
        raise OvsmeshError(f"can't set sysctl {key} to {value}: {error.strerror}") from error


def sysctl_differences(want: Mapping[str, str]) -> bool:
    """Whether any of these sysctls is not as wanted: the poll for those that the kernel does not announce."""
    return read_sysctls(want) != want
