"""Observe and change links, addresses, routes, neighbours and FDB entries through rtnetlink.

What is read goes into a cache that notifications keep current. Everything is dumped at start, when the
agent asks, and when the kernel may have changed more than it reported (a lost notification, a bridge
that went down and took its routes along).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovsmesh.dataplane.types import FDB_LEARNED, KBR, MARK, OBR, PROTOCOL, Link, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.linux import netlink_socket, rtnetlink, rtnetlink_parser
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.cache import NOT_STICKY, RtnetlinkCache
from ovsmesh.linux.netlink_socket import NetlinkError, NetlinkSocket
from ovsmesh.linux.underlay import Underlay
from ovsmesh.mesh.types import IPAddress, IPNetwork
from ovsmesh.reasons import Reason
from ovsmesh.sysctl import read_sysctls, write_sysctl
from ovsmesh.text import printable

_GROUPS = (1, 3, 5, 7, 8, 9, 11, 12, 19, 24, 25)
"""RTNLGRP_ LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_IFINFO, IPV6_RULE,
IPV4_NETCONF, IPV6_NETCONF."""
_DUMP_TRIES = 3
_FIB_MATCH = 0x2000
"""RTM_F_FIB_MATCH: a route as it was written, without a path MTU that someone on the way has said for now."""
_NEW = "ovsmesh-new"
"""The name of kbr0 until it carries its alias."""


class Netlink:
    """The rtnetlink side of the dataplane in the calling thread's network namespace. Not thread-safe."""

    def __init__(self) -> None:
        try:
            self._requests = NetlinkSocket(netlink_socket.ROUTE)
            bpf = rtnetlink_parser.managed_neighbours(PROTOCOL)
            self._notifications = NetlinkSocket(netlink_socket.ROUTE, _GROUPS, bpf=bpf)
        except PermissionError as error:
            raise OvsmeshError("not allowed to use a netlink socket; run as root (CAP_NET_ADMIN)") from error
        self.cache = RtnetlinkCache()
        self._ways = Underlay()
        self._sticky = True
        """Whether the kernel has sticky FDB entries, as far as is known."""
        self._stuck: set[str] = set()
        """MACs of FDB entries that were written to be sticky, and not seen since."""

    def close(self) -> None:
        """Close both sockets."""
        self._requests.close()
        self._notifications.close()

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable while notifications wait."""
        return [self._notifications.fileno()]

    def dirty(self) -> None:
        """Make the next observation dump everything."""
        self.cache.stale = self._sticky = True

    def watch(self, cidrs: Iterable[IPNetwork]) -> None:
        """Set the ranges, the cluster CIDRs, in which unmanaged routes are reported."""
        self.cache.watch(cidrs)

    def watch_ports(self, wanted: bool) -> None:
        """Set whether it counts as a change when a port of kbr0 comes or goes."""
        self.cache.watch_ports = wanted

    def drain(self) -> bool:
        """Take in notifications; return whether anything that is observed may have changed."""
        for message in self._notifications.notifications():
            self.cache.update(message)
            self._ways.update(message, self.cache.addressed)
        changed = self.cache.changed or self.cache.stale or bool(self.cache.partial_links) or self._ways.changed
        self.cache.changed = self._ways.changed = False
        return changed

    def _request(self, message: bytes) -> bool:
        # a refusal means a family or a link that this kernel does not have
        with contextlib.suppress(NetlinkError):
            return self._requests.request(message, self.cache.update)
        return True

    def _dump(self, kind: int, family: int) -> None:
        self._dump_all(encoder.dump(kind, family), kind)

    def _dump_all(self, request: bytes, kind: int) -> None:
        if not any(self._request(request) for _ in range(_DUMP_TRIES)):
            raise OvsmeshError(f"the kernel's tables change too fast to be read (netlink request {kind})")

    def _read(self) -> None:
        """Bring the cache up to date."""
        self.drain()
        if self.cache.stale:
            self.cache.clear()
            self._dump(rtnetlink.GETLINK, 0)
            self._dump(rtnetlink.GETADDR, 0)
            families: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
            for family in families:
                self._dump(rtnetlink.GETROUTE, family)
            if self.cache.index(KBR) is not None:
                for family in families:
                    self._dump(rtnetlink.GETNEIGH, family)
            if obr := self.cache.index(OBR):
                # a pod may have filled the rest of the FDB
                self._dump_all(encoder.dump_fdb(obr), rtnetlink.GETNEIGH)
            self.cache.finish_dump()
            self._ways.forget()
        while self.cache.partial_links:
            self._request(encoder.get_link(self.cache.partial_links.pop()))

    def who(self, parts: Iterable[tuple[str, object]]) -> set[str]:
        """Return the processes that changed these parts (kind and key) last, as far as they are still there."""
        noted, self.cache.changed_by = self.cache.changed_by, {}
        senders = {noted[part] for part in parts if part in noted} - {self._requests.port}
        return {name for name in map(_process, senders) if name}

    def observe(self, cni: bool = False) -> tuple[dict[str, dict[Any, Any]], list[Unmanaged]]:
        """Return what is managed, by field of Dataplane, and the unmanaged things in its way.

        `cni`: whether the CNI bridge plugin may have created kbr0, see RtnetlinkCache.managed_links.
        """
        self._read()
        links, unmanaged = self.cache.managed_links(cni)
        # without it the kernel takes the flag, and keeps nothing of it
        self._sticky &= not any(self.cache.fdb.get(mac, "").endswith(NOT_STICKY) for mac in self._stuck)
        self._stuck.clear()
        fdb = self.cache.fdb
        found: dict[str, dict[Any, Any]] = {
            "links": dict(links),
            "addresses": dict(self.cache.managed_addresses()) if KBR in links else {},
            "neighbours": dict(self.cache.neighbours),
            "fdb": dict(fdb) if self._sticky else {m: port.removesuffix(NOT_STICKY) for m, port in fdb.items()},
            "routes": dict(self.cache.routes),
        }
        return found, [*unmanaged, *self.cache.unmanaged_routes()]

    def limit_learning(self) -> None:
        """Limit how many MACs a managed kbr0 learns that someone else made, where the kernel has a limit.

        It is no part of the dataplane: `ip` can't set it before iproute2 6.7, so a script can't.
        """
        kbr = self.cache.links.get(self.cache.index(KBR) or 0)
        if kbr is not None and kbr.learned_max == 0 and kbr.alias == MARK:
            # a kernel that refuses says so by keeping 0
            self._requests.change([encoder.limit_learning(kbr.ifindex, FDB_LEARNED)])

    def problems(self) -> tuple[Problem, ...]:
        """Return what this kernel is known not to have."""
        text = "a pod that uses a peer's MAC takes what its node sends to that peer (no sticky FDB entries: Linux 4.20)"
        return () if self._sticky else (Problem(Reason.FilterUnavailable, text, field="sticky"),)

    def present(self, name: str) -> bool:
        """Return whether there is such a link at this moment, whatever is still to be read of notifications."""
        return bool(_index(name))

    def carrier(self, name: str) -> bool:
        """Return whether there is such a link and it has a carrier: a tap device has one while a program holds it."""
        found: list[bool] = []
        index = _index(name)
        if index:
            request = encoder.get_link(index)
            self._requests.request(request, lambda m: found.append(rtnetlink_parser.carrier(m.payload)))
        return any(found)

    def reach(self, source: IPAddress, peers: Collection[IPAddress]) -> None:
        """Set this node's tunnel address, and those of the peers that it reaches by it."""
        self._ways.reach(source, peers)

    def holders(self, address: IPAddress) -> list[str]:
        """Return the links that have this address, the loopback device last."""
        self._read()
        return [link.name for link in self.cache.links_with_address(str(address))]

    def underlay_links(self) -> list[str]:
        """Return the links by which packets to the peers leave."""
        self._ask_ways()
        return sorted(self.cache.name(link) for link in self._ways.links())

    def underlay_mtu(self, address: IPAddress) -> tuple[int | None, bool]:
        """Return the smallest MTU in bytes on the ways to the peers, and whether the way to each of them is known.

        None while no way is known. Without a peer it is what the links with this tunnel address have.
        """
        self._ask_ways()
        mtu, complete = self._ways.smallest_mtu(self.cache.links, _ipv6_mtu)
        if mtu is None and complete:
            own = [link.mtu for link in self.cache.links_with_address(str(address)) if link.name != "lo"]
            return min(own, default=None), bool(own)
        return mtu, complete

    def _ask_ways(self) -> None:
        self._read()
        for flags in (_FIB_MATCH, 0):
            asked = self._ways.questions(flags)
            for peer, reply in zip(asked, self._requests.ask(list(asked.values())), strict=True):
                self._ways.answer(peer, reply, last=not flags)

    def small_routes(self) -> dict[str, int]:
        """Return the managed routes, by destination, that have a smaller MTU in bytes than kbr0 has."""
        self._read()
        kbr = self.cache.managed_links()[0].get(KBR)
        routes = self.cache.routes.items() if kbr else ()
        return {dst: route.mtu for (dst, _), route in routes if kbr and 0 < route.mtu < kbr.mtu}

    def exits(self) -> tuple[str, ...]:
        """Return the links by which packets leave this host, see RtnetlinkCache.exits."""
        self._read()
        return self.cache.exits()

    def ra_links(self) -> tuple[str, ...]:
        """Return the links whose IPv6 default route came from a router advertisement."""
        return self.cache.ra_links()

    # changing

    def set_link(self, name: str, want: Link, have: Link | None) -> None:
        """Create kbr0, or change what differs of kbr0 or obr0. Raise OvsmeshError if that fails."""
        if name == KBR and have is None:
            self._make_bridge(want)
            return
        index = _index(name)
        if not index:
            raise OvsmeshError(f"link {name} is missing; ovs-vswitchd creates it: is it running?")
        have = have or Link(want.kind, 0, up=not want.up)
        # only what differs: setting the MAC, even to the same value, flushes the neighbour table
        changes = encoder.set_link(
            index,
            mac=want.mac if want.mac != have.mac else "",
            mtu=want.mtu if want.mtu != have.mtu else 0,
            up=want.up if want.up != have.up else None,
            master=_index(want.master) if want.master != have.master else None,
            alias=MARK if have.unmarked else "",
        )
        self._do({f"set link {name}": changes})
        if name == KBR:
            self._enslave_orphans(index)
        if want.quiet and not (have.quiet and have.master == want.master):
            self._do({f"set port {name}": encoder.quiet_port(index)})

    def _make_bridge(self, want: Link) -> None:
        """Make kbr0; where someone has renamed the managed one, rename that back, as pods are plugged into it."""
        strays = [i for i, one in self.cache.links.items() if one.kind == want.kind and one.alias == MARK]
        if stray := next((i for i in strays if self.cache.name(i) not in (KBR, _NEW)), 0):
            down, name = encoder.set_link(stray, up=False), encoder.set_link(stray, name=KBR)
            changes = encoder.set_link(stray, mac=want.mac, mtu=want.mtu, up=want.up)
            # a link that is up can't be renamed before Linux 6.2
            self._do({f"set link {KBR} down": down, f"name link {KBR}": name, f"set link {KBR}": changes})
            return
        stale = _index(_NEW)
        if stale:
            self._do({f"delete link {_NEW}": encoder.del_link(stale)})
        self._do({f"add link {KBR}": encoder.new_bridge(_NEW, want.mac, want.mtu)})
        # marked before it is named: a kbr0 without the alias would count as unmanaged from then on
        index = _index(_NEW)
        try:
            self._do(
                {
                    f"limit what {KBR} learns": encoder.limit_learning(index, FDB_LEARNED),
                    f"mark link {KBR}": encoder.set_link(index, alias=MARK),
                    f"name link {KBR}": encoder.set_link(index, name=KBR),
                }
            )
        except OvsmeshError:
            # another kbr0 was created meanwhile: the next observation shows it
            self._do({f"delete link {_NEW}": encoder.del_link(index)})
            raise
        with contextlib.suppress(OvsmeshError):
            # before the bridge is up and has a link-local address: duplicate address detection
            # would hold back new neighbours for 1 to 2 s
            write_sysctl(f"net/ipv6/conf/{KBR}/accept_dad", "0")
        self._do({f"set link {KBR} up": encoder.set_link(index, up=want.up)})
        self._enslave_orphans(index)

    def _enslave_orphans(self, kbr: int) -> None:
        """Enslave the pods' ports that a deleted kbr0 left behind, with the settings that they had."""
        steps = {}
        for port, hairpin in self.cache.orphaned_ports.items():
            if port in self.cache.links and not self.cache.links[port].master:
                name = self.cache.name(port)
                steps[f"enslave {name}"] = encoder.set_link(port, master=kbr)
                if hairpin:
                    steps[f"set port {name}"] = encoder.hairpin_port(port)
        self.cache.orphaned_ports.clear()
        # a pod may end at any moment
        self._do(steps, ignore=errno.ENODEV)

    def del_link(self, name: str) -> None:
        """Delete a link, if it is there. Raise OvsmeshError if that fails."""
        index = _index(name)
        if index:
            self._do({f"delete link {name}": encoder.del_link(index)})

    def _do(self, steps: Mapping[str, bytes], ignore: int = 0) -> None:
        """Send messages. Raise OvsmeshError for what the kernel refuses, but for the errno `ignore`."""
        codes = self._requests.change(list(steps.values()))
        names = list(steps)
        refused = [f"{names[at]}: {os.strerror(code)}" for at, code in codes.items() if code != ignore]
        if refused:
            raise OvsmeshError(f"the kernel refused to {'; '.join(refused)}")

    def batch(self, messages: Sequence[tuple[Any, bytes]]) -> dict[Any, str]:
        """Send labelled messages in order; return label → error for those that the kernel refused."""
        refused = self._requests.change([message for _, message in messages])
        return {messages[at][0]: os.strerror(code) for at, code in refused.items()}

    def message(self, op: str, kind: str, key: Any, value: Any) -> bytes:
        """Return the message that adds ("+"), changes ("~") or removes ("-") an entry of the dataplane.

        `kind` and `key` are those of the plan's step; `value` is what is wanted or, with "-", what is there.
        """
        kbr = self.cache.index(KBR) or _index(KBR)
        remove = op == "-"
        if kind == "routes":
            # never in the place of an unmanaged one
            flags = {"+": rtnetlink.CREATE | rtnetlink.EXCL, "~": rtnetlink.CREATE | rtnetlink.REPLACE, "-": 0}[op]
            oif = kbr if value.dev == KBR else self.cache.index(value.dev) or 0
            entry = rtnetlink.RouteEntry(key[0], key[1], value.type, value.via, oif, value.mtu, PROTOCOL, 254)
            return encoder.route(rtnetlink.DELROUTE if remove else rtnetlink.NEWROUTE, flags, entry)
        # the kernel may hold a learned entry in the place of a managed one
        flags = 0 if remove else rtnetlink.CREATE | rtnetlink.REPLACE
        if kind == "addresses":
            address = rtnetlink.AddressEntry(key, kbr, 0 if remove else PROTOCOL)
            return encoder.address(rtnetlink.DELADDR if remove else rtnetlink.NEWADDR, flags, address)
        type_ = rtnetlink.DELNEIGH if remove else rtnetlink.NEWNEIGH
        if kind == "neighbours":
            neighbour = rtnetlink.NeighbourEntry(0, key, value, kbr, rtnetlink.PERMANENT, PROTOCOL, 0)
            return encoder.neighbour(type_, flags, neighbour)
        port = self.cache.index(value) or _index(value.removesuffix(NOT_STICKY))
        if not remove:
            self._stuck.add(key)
        fdb = rtnetlink.NeighbourEntry(rtnetlink.AF_BRIDGE, "", key, port, rtnetlink.NOARP, 0, 0, sticky=True)
        return encoder.neighbour(type_, flags, fdb)


def _process(pid: int) -> str:
    """Return a process of this network namespace by its id; "" where there is none: a port may be no process id."""
    folder = Path(f"/proc/{pid}")
    try:
        if not os.path.samestat(os.stat(folder / "ns/net"), os.stat("/proc/self/ns/net")):
            return ""
        return f"{printable((folder / 'comm').read_text().strip(), 32)}, pid {pid}"
    except OSError:
        return ""


def _ipv6_mtu(link: str) -> int:
    """Return the MTU in bytes that a link has for IPv6: a router may have advertised less than the link's own."""
    value = read_sysctls([f"net/ipv6/conf/{link}/mtu"]).values()
    return next((int(text) for text in value if text.isdecimal()), 0)


def _index(name: str) -> int:
    """Return a link's index from the kernel, 0 if there is no such link."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
