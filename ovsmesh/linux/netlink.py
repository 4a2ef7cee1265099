"""The kernel side of the dataplane: links, addresses, sysctls, routes, neighbours, FDB entries.

Holds the sockets; what is read goes into a Mirror, which notifications keep current. The kernel is
read whole at start, on doubt (a lost notification, a bridge that went down and took its routes
along silently) and whenever the agent asks. Never imports ovs or kubernetes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ovsmesh.dataplane.types import KBR, MARK, PROTOCOL, Link, Unmanaged
from ovsmesh.errors import OvsmeshError
from ovsmesh.linux import rtnetlink
from ovsmesh.linux.cache import Mirror
from ovsmesh.mesh.types import IPNetwork

_SOL_NETLINK, _ADD_MEMBERSHIP, _SO_RCVBUFFORCE = 270, 1, 33
_GROUPS = (1, 3, 5, 7, 9, 11, 24, 25)
"""RTNLGRP_ LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_NETCONF, IPV6_NETCONF."""
_RECEIVE_BYTES = 8 << 20
_BATCH = 128
"""Messages sent before their errors are read: what fits the receive buffer if all are refused."""
_TIMEOUT = 10.0
_NEW = "ovsmesh-new"
_PROC = Path("/proc/sys")


class Netlink:
    """The calling thread's network namespace as we see and change it; not thread-safe."""

    def __init__(self) -> None:
        try:
            self._command = _socket()
            self._command.settimeout(_TIMEOUT)
            self._bell = _socket()
            self._bell.setblocking(False)
        except PermissionError as error:
            raise OvsmeshError("not allowed to use a netlink socket; run as root (CAP_NET_ADMIN)") from error
        for group in _GROUPS:
            self._bell.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._seq = 0
        self.mirror = Mirror()

    def close(self) -> None:
        self._command.close()
        self._bell.close()

    def fds(self) -> list[int]:
        return [self._bell.fileno()]

    def dirty(self) -> None:
        """Makes the next observation read the kernel whole."""
        self.mirror.doubt = True

    def watch(self, cidrs: Iterable[IPNetwork]) -> None:
        """Which ranges unmanaged routes are of interest in: the cluster CIDRs."""
        self.mirror.watch(cidrs)

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
                self.mirror.doubt = True
                continue
            for message in rtnetlink.messages(data):
                self.mirror.take(message)
        changed = self.mirror.changed or self.mirror.doubt or bool(self.mirror.reread)
        self.mirror.changed = False
        return changed

    def _request(self, message: bytes, take: Callable[[rtnetlink.Message], None]) -> bool:
        """Sends a request and takes its replies; False when a change cut through them."""
        self._command.send(message)
        whole = True
        while True:
            for reply in rtnetlink.messages(self._command.recv(1 << 18)):
                if reply.seq != self._seq:
                    continue
                whole &= not reply.flags & rtnetlink.DUMP_INTR
                if reply.type in (rtnetlink.DONE, rtnetlink.ERROR):
                    # an error is a family or a link that this kernel does not have
                    return whole
                take(reply)
                if not reply.flags & rtnetlink.MULTI:
                    return whole

    def _dump(self, kind: int, family: int) -> None:
        for _ in range(3):
            self._seq += 1
            if self._request(rtnetlink.dump(kind, self._seq, family), self.mirror.take):
                return
        raise OvsmeshError(f"the kernel's tables change too fast to be read (netlink request {kind})")

    def _read(self) -> None:
        """Brings the mirror up to date."""
        self.drain()
        if self.mirror.doubt:
            self.mirror.clear()
            families: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
            self._dump(rtnetlink.GETLINK, 0)
            self._dump(rtnetlink.GETADDR, 0)
            for family in families:
                self._dump(rtnetlink.GETROUTE, family)
            if self.mirror.index(KBR) is not None:
                for family in (*families, rtnetlink.AF_BRIDGE):
                    self._dump(rtnetlink.GETNEIGH, family)
            self.mirror.doubt = False
            self.mirror.whole()
        while self.mirror.reread:
            self._seq += 1
            self._request(rtnetlink.get_link(self._seq, self.mirror.reread.pop()), self.mirror.take)

    def observe(
        self, sysctls: Iterable[str], plugged: bool = False
    ) -> tuple[dict[str, dict[Any, Any]], list[Unmanaged]]:
        """What the kernel holds of ours, by field of Dataplane, the given sysctls, and unmanaged things.

        `plugged`: whether a kbr0 may be the CNI bridge plugin's, see Mirror.our_links.
        """
        self._read()
        links, unmanaged = self.mirror.our_links(plugged)
        found: dict[str, dict[Any, Any]] = {
            "sysctls": read_sysctls(sysctls),
            "links": dict(links),
            "addresses": dict(self.mirror.our_addresses()) if KBR in links else {},
            "neighbours": dict(self.mirror.neighbours),
            "fdb": dict(self.mirror.fdb),
            "routes": dict(self.mirror.routes),
        }
        return found, [*unmanaged, *self.mirror.unmanaged_routes()]

    def underlay(self, address: str) -> tuple[str, int] | None:
        """The link that carries this address and its MTU in bytes; None when no link does."""
        self._read()
        link = self.mirror.carrier(address)
        return None if link is None else (link.name, link.mtu)

    def ra_links(self) -> tuple[str, ...]:
        """Links whose IPv6 default route came from a router advertisement."""
        return self.mirror.ra_links()

    # changing

    def set_link(self, name: str, want: Link, have: Link | None) -> None:
        """Makes kbr0, or brings it or obr0 to what is wanted. Raises OvsmeshError when it can't."""
        if name == KBR and have is None:
            self._make_bridge(want)
            return
        index = _index(name)
        if not index:
            raise OvsmeshError(f"link {name} is not there yet; ovs-vswitchd makes it: is it running?")
        have = have or Link(want.kind, 0, up=not want.up)
        # only what differs: an address that is set again, though the same, empties the neighbour table
        changes = rtnetlink.set_link(
            0,
            index,
            mac=want.mac if want.mac != have.mac else "",
            mtu=want.mtu if want.mtu != have.mtu else 0,
            up=want.up if want.up != have.up else None,
            master=_index(want.master) if want.master != have.master else None,
            alias=MARK if have.unmarked else "",
        )
        self._do({f"set link {name}": changes})
        if name == KBR:
            self._take_back(index)
        if want.quiet and not (have.quiet and have.master == want.master):
            self._do({f"set port {name}": rtnetlink.quiet_port(0, index)})

    def _make_bridge(self, want: Link) -> None:
        stale = _index(_NEW)
        if stale:
            self._do({f"delete link {_NEW}": rtnetlink.del_link(0, stale)})
        self._do({f"add link {KBR}": rtnetlink.new_bridge(0, _NEW, want.mac, want.mtu)})
        # marked before it has its name: a kbr0 without our mark would be someone else's for ever
        index = _index(_NEW)
        try:
            self._do(
                {
                    f"mark link {KBR}": rtnetlink.set_link(0, index, alias=MARK),
                    f"name link {KBR}": rtnetlink.set_link(0, index, name=KBR),
                }
            )
        except OvsmeshError:
            # someone was quicker: what they made is seen in the next observation
            self._do({f"delete link {_NEW}": rtnetlink.del_link(0, index)})
            raise
        with contextlib.suppress(OvsmeshError):
            # before it is up and has a link-local address: duplicate detection would be 1 to 2 s of no new neighbours
            write_sysctl(f"net/ipv6/conf/{KBR}/accept_dad", "0")
        self._do({f"set link {KBR} up": rtnetlink.set_link(0, index, up=want.up)})
        self._take_back(index)

    def _take_back(self, kbr: int) -> None:
        """Plugs the pods in again that a deleted kbr0 left behind, as they were."""
        steps = {}
        for port, hairpin in self.mirror.lost_ports.items():
            if port in self.mirror.links and not self.mirror.links[port].master:
                name = self.mirror.name(port)
                steps[f"enslave {name}"] = rtnetlink.set_link(0, port, master=kbr)
                if hairpin:
                    steps[f"set port {name}"] = rtnetlink.hairpin_port(0, port)
        self.mirror.lost_ports.clear()
        # a pod may end at any moment
        self._do(steps, but=errno.ENODEV)

    def del_link(self, name: str) -> None:
        """Deletes a link of ours."""
        index = _index(name)
        if index:
            self._do({f"delete link {name}": rtnetlink.del_link(0, index)})

    def _do(self, steps: Mapping[str, bytes], but: int = 0) -> None:
        """Raises OvsmeshError for what the kernel refuses, unless with the error `but`."""
        forgiven = os.strerror(but)
        refused = {what: why for what, why in self.batch(list(steps.items())).items() if why != forgiven}
        if refused:
            texts = "; ".join(f"{what}: {why}" for what, why in refused.items())
            raise OvsmeshError(f"the kernel refused to {texts}")

    def batch(self, messages: list[tuple[Any, bytes]]) -> dict[Any, str]:
        """Sends messages in order; returns label → error for those that the kernel refused."""
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
                    numbered[6] |= rtnetlink.ACK
                data += numbered + b"\0" * (-len(numbered) % 4)
            self._command.send(data)
            waiting = True
            while waiting:
                for reply in rtnetlink.messages(self._command.recv(1 << 18)):
                    if reply.type != rtnetlink.ERROR or not first <= reply.seq <= self._seq:
                        continue
                    code = rtnetlink.error_of(reply)
                    if code:
                        refused[some[reply.seq - first][0]] = os.strerror(code)
                    waiting &= reply.seq != self._seq
        return refused

    def message(self, op: str, kind: str, key: Any, value: Any) -> bytes:
        """The message that adds, changes ("+", "~": value is wanted) or removes ("-": value is had) a part."""
        kbr = self.mirror.index(KBR) or _index(KBR)
        gone = op == "-"
        if kind == "routes":
            # never in the place of an unmanaged one
            flags = {"+": rtnetlink.CREATE | rtnetlink.EXCL, "~": rtnetlink.CREATE | rtnetlink.REPLACE, "-": 0}[op]
            oif = kbr if value.dev == KBR else self.mirror.index(value.dev) or 0
            entry = rtnetlink.RouteEntry(key[0], key[1], value.type, value.via, oif, value.mtu, PROTOCOL, 254)
            return rtnetlink.route(rtnetlink.DELROUTE if gone else rtnetlink.NEWROUTE, flags, 0, entry)
        # of the rest the kernel may hold a learned entry in the place of ours
        flags = 0 if gone else rtnetlink.CREATE | rtnetlink.REPLACE
        if kind == "addresses":
            address = rtnetlink.AddressEntry(key, kbr, 0 if gone else PROTOCOL)
            return rtnetlink.address(rtnetlink.DELADDR if gone else rtnetlink.NEWADDR, flags, 0, address)
        what = rtnetlink.DELNEIGH if gone else rtnetlink.NEWNEIGH
        if kind == "neighbours":
            return rtnetlink.neighbour(
                what, flags, 0, rtnetlink.NeighbourEntry(0, key, value, kbr, rtnetlink.PERMANENT, PROTOCOL, 0)
            )
        port = self.mirror.index(value) or _index(value)
        return rtnetlink.neighbour(
            what, flags, 0, rtnetlink.NeighbourEntry(rtnetlink.AF_BRIDGE, "", key, port, rtnetlink.NOARP, 0, 0)
        )


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
    made.bind((0, 0))
    return made


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


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
