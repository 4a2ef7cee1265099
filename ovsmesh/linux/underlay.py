"""The ways from this host to the tunnel addresses of its peers, as the kernel answers when it is asked for a route.

It is fed with notifications, says for which addresses the kernel must be asked again, and takes in the answers. It
opens no socket. After any notifications, what it has is what asking for everything would give.
"""

from __future__ import annotations

import socket
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from ovsmesh.dataplane.types import PROTOCOL
from ovsmesh.linux import rtnetlink
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.netlink_socket import Message, attributes
from ovsmesh.mesh.types import IPAddress

_UNICAST, _CLONED, _INVERT = 1, 0x200, 0x2
"""RTN_UNICAST, RTM_F_CLONED, FIB_RULE_INVERT."""
_FLAGS_THAT_ROUTE = 0x10041
"""IFF_UP, IFF_RUNNING, IFF_LOWER_UP: a link without a carrier may take no part in routing."""
_BITS = {int(socket.AF_INET): 32, int(socket.AF_INET6): 128}
"""Family → bits of an address."""
_U32 = struct.Struct("=I")
_NEXTHOP = struct.Struct("=HBBi")
_LOOPBACK = "lo"


class Way(NamedTuple):
    """How packets to one address leave: by one of these links; the MTU in bytes that the route has, 0 for none.

    No links: there is no route.
    """

    links: tuple[int, ...]
    mtu: int


class Underlay:
    """The ways to the peers. After `update`, `changed` says whether `smallest_mtu` may return something else."""

    def __init__(self) -> None:
        self.changed = False
        self._source: IPAddress | None = None
        self._peers: list[int] = []
        """Tunnel addresses as numbers, sorted: all of one family."""
        self._ways: dict[int, Way] = {}
        """Those of `_peers` that are known."""
        self._links: dict[int, tuple[int, bytes, bytes] | None] = {}
        """Links that have been on a way → flags, master and MTU, as reported last, if they were."""

    def reach(self, source: IPAddress, peers: Collection[IPAddress]) -> None:
        """Set this node's tunnel address and those of its peers, all of one family."""
        if source != self._source:
            self._source = source
            self.forget()
        self._peers = sorted(map(int, peers))
        if len(self._ways) > len(self._peers):
            kept = set(self._peers)
            self._ways = {peer: way for peer, way in self._ways.items() if peer in kept}

    def forget(self) -> None:
        """Have the kernel be asked for every way again."""
        self._ways.clear()

    def questions(self, flags: int) -> dict[int, bytes]:
        """Return the requests for the ways that are not known, by the peer's address as a number.

        `flags` are RTM_F_ flags.
        """
        source = self._source
        if source is None or len(self._ways) == len(self._peers):
            return {}
        kind, asked = type(source), [peer for peer in self._peers if peer not in self._ways]
        return {peer: encoder.get_output_route(kind(peer), source, flags) for peer in asked}

    def answer(self, peer: int, reply: Message | None, last: bool) -> None:
        """Take in the kernel's answer for one address; None where it refused.

        `last`: the question is not asked in another way where the answer does not hold the link.
        """
        way = Way((), 0) if reply is None else _way(reply.payload)
        if way is None and not last:
            return
        self._ways[peer] = way or Way((), 0)
        for link in way.links if way else ():
            self._links.setdefault(link, None)

    # notifications

    def update(self, message: Message, addressed: Callable[[int], bool]) -> None:
        """Take in a notification. `addressed` tells whether a link has an address that is not link-local."""
        kind, payload = message.type, message.payload
        if self._source is None or not self._peers or len(payload) < 8:
            return
        if kind in (rtnetlink.NEWLINK, rtnetlink.DELLINK):
            if len(payload) >= 16:
                self._update_link(payload, kind == rtnetlink.NEWLINK, addressed)
        elif _BITS.get(payload[0]) != self._source.max_prefixlen:
            return
        elif kind in (rtnetlink.NEWROUTE, rtnetlink.DELROUTE):
            self._update_route(payload)
        elif kind in (rtnetlink.NEWADDR, rtnetlink.DELADDR):
            self._update_address(payload, kind == rtnetlink.NEWADDR)
        elif kind in (rtnetlink.NEWRULE, rtnetlink.DELRULE):
            self._update_rule(payload)

    def _ask_again(self, address: bytes = b"", length: int = 0) -> None:
        """Forget the ways into a range, all by default."""
        assert self._source is not None
        bits = self._source.max_prefixlen
        if len(address) * 8 != bits or not 0 < length <= bits:
            asked = self._peers
        else:
            low = int.from_bytes(address, "big") >> (bits - length) << (bits - length)
            high = low | (1 << (bits - length)) - 1
            asked = self._peers[bisect_left(self._peers, low) : bisect_right(self._peers, high)]
        for peer in asked:
            self._ways.pop(peer, None)
        self.changed |= bool(asked)

    def _update_route(self, payload: memoryview) -> None:
        flags = _U32.unpack_from(payload, 8)[0] if len(payload) >= 12 else 0
        # routes to pods lead to no tunnel address
        if flags & _CLONED or (payload[5] == PROTOCOL and payload[7] == _UNICAST):
            return
        self._ask_again(attributes(payload, 12).get(1, b""), payload[1])

    def _update_address(self, payload: memoryview, added: bool) -> None:
        assert self._source is not None
        found = attributes(payload, 8)
        packed = found.get(2) or found.get(1, b"")
        link_local = packed[:1] == b"\xfe" and len(packed) == 16 and packed[1] & 0xC0 == 0x80
        # the routes that need an address go with it, and the kernel does not report that; new ones are reported
        if packed == self._source.packed or not (added or link_local):
            self._ask_again()

    def _update_rule(self, payload: memoryview) -> None:
        assert self._source is not None
        found = attributes(payload, 12)
        if len(payload) >= 12 and not _U32.unpack_from(payload, 8)[0] & _INVERT:
            shift = self._source.max_prefixlen - payload[2]
            source = int.from_bytes(found.get(2, b""), "big")
            if payload[2] and shift >= 0 and int(self._source) >> shift != source >> shift:
                return
            if found.get(3, b"lo\0").rstrip(b"\0") != _LOOPBACK.encode():
                # a rule for packets that arrive on some link
                return
            self._ask_again(found.get(1, b""), payload[1])
        else:
            self._ask_again()

    def _update_link(self, payload: memoryview, there: bool, addressed: Callable[[int], bool]) -> None:
        index = _U32.unpack_from(payload, 4)[0]
        if payload[0] == socket.AF_INET6:
            # its MTU for IPv6, which a router may have advertised
            self.changed |= index in self._links
        elif payload[0] == 0 and (index in self._links or addressed(index)):
            found = attributes(payload, 16)
            flags = _U32.unpack_from(payload, 8)[0] & _FLAGS_THAT_ROUTE
            now = (flags if there else 0, found.get(10, b""), found.get(4, b""))
            old, self._links[index] = self._links.get(index), now
            if old is None or now[:2] != old[:2] or not there:
                self._ask_again()
            self.changed |= old != now
            if not there:
                del self._links[index]

    # what follows

    def links(self) -> set[int]:
        """Return the links that packets to peers leave by."""
        return {link for way in set(self._ways.values()) for link in way.links}

    def smallest_mtu(
        self, links: Mapping[int, rtnetlink.LinkEntry], ipv6_mtu: Callable[[str], int]
    ) -> tuple[int | None, bool]:
        """Return the smallest MTU in bytes on the known ways, None without one, and whether every way is known.

        `ipv6_mtu` returns the MTU that a link has for IPv6, 0 where that can't be read.
        """
        ways = set(self._ways.values())
        known = [mtu for way in ways for mtu in self._mtus(way, links, ipv6_mtu)]
        routed = all(any(_usable(links, link) for link in way.links) for way in ways)
        return min(known, default=None), routed and len(self._ways) == len(self._peers)

    def _mtus(
        self, way: Way, links: Mapping[int, rtnetlink.LinkEntry], ipv6_mtu: Callable[[str], int]
    ) -> Iterator[int]:
        for link in way.links:
            if _usable(links, link):
                yield links[link].mtu
                if self._source is not None and self._source.version == 6:
                    yield ipv6_mtu(links[link].name) or links[link].mtu
                if way.mtu:
                    yield way.mtu


def _usable(links: Mapping[int, rtnetlink.LinkEntry], link: int) -> bool:
    return link in links and links[link].name != _LOOPBACK


def _way(payload: memoryview) -> Way | None:
    """Return the way that a route shows; None where it names no link, as with the kernel's nexthop objects."""
    if len(payload) < 12 or payload[7] != _UNICAST:
        return Way((), 0)
    found = attributes(payload, 12)
    metrics = attributes(memoryview(found.get(8, b""))).get(2, b"")
    mtu = _U32.unpack(metrics)[0] if len(metrics) == 4 else 0
    links = [_U32.unpack(found[4])[0]] if len(found.get(4, b"")) == 4 else []
    hops, at = found.get(9, b""), 0
    while at + _NEXTHOP.size <= len(hops):
        length, _, _, link = _NEXTHOP.unpack_from(hops, at)
        if length < _NEXTHOP.size:
            break
        links.append(link)
        at += (length + 3) & ~3
    return Way(tuple(sorted(set(links))), mtu) if links else None
