"""A host's own dataplane as one comparable value, read in about a millisecond through netlink dumps.

It holds the mesh's links, addresses, routes, neighbours and FDB entries. `whole` compares it with that of a good
moment. For a mesh of a few hosts, not of thousands.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path

from benchlib.event_probe import EventProbe
from ovsmesh.lab.host import Host
from ovsmesh.lab.netns import within
from ovsmesh.linux import netlink_socket, rtnetlink
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux import rtnetlink_parser as parser
from ovsmesh.linux.netlink_socket import Message, NetlinkSocket

_PROC = Path("/proc/sys")
_PORT = re.compile(r"(in_port=|output:)(\d+)")
Part = tuple[object, ...]


class Kernel:
    """The kernel's part, read whole at each call."""

    def __init__(self, ns: str) -> None:
        self._sock = within(ns, lambda: NetlinkSocket(netlink_socket.ROUTE))

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _dump(self, kind: int, family: int) -> list[Message]:
        found: list[Message] = []
        self._sock.request(encoder.dump(kind, family), found.append)
        return found

    def read(self) -> frozenset[Part]:
        """Return all parts that belong to the mesh."""
        found = (parser.parse_link(m.payload) for m in self._dump(rtnetlink.GETLINK, 0))
        links = {link.ifindex: link for link in found if link}
        names = {index: link.name for index, link in links.items()}
        parts: set[Part] = set()
        for link in links.values():
            if link.name in ("kbr0", "obr0"):
                mac = link.mac if link.name == "kbr0" else ""
                parts.add(("link", link.name, link.up, link.mtu, mac, names.get(link.master, ""), link.quiet))
        for message in self._dump(rtnetlink.GETADDR, 0):
            address = parser.parse_address(message.payload)
            if address and names.get(address.ifindex) == "kbr0" and not address.address.startswith("fe80"):
                parts.add(("address", address.address))
        for family in (int(socket.AF_INET), int(socket.AF_INET6)):
            for message in self._dump(rtnetlink.GETROUTE, family):
                route = parser.parse_route(message.payload)
                if route and route.protocol == 111:
                    parts.add(("route", *route[:4], names.get(route.oif, ""), route.mtu))
        for family in (int(socket.AF_INET), int(socket.AF_INET6), rtnetlink.AF_BRIDGE):
            for message in self._dump(rtnetlink.GETNEIGH, family):
                entry = parser.parse_neighbour(message.payload)
                if entry is None:
                    continue
                device = names.get(entry.ifindex, "")
                if device == "kbr0" and entry.dst and entry.state & rtnetlink.PERMANENT:
                    parts.add(("neighbour", entry.dst, entry.mac))
                elif device == "obr0" and not entry.dst and entry.state & rtnetlink.NOARP:
                    parts.add(("fdb", entry.mac))
        return frozenset(parts)


def sysctls(ns: str, paths: Iterable[str]) -> dict[str, str]:
    """Values below /proc/sys of the namespace; "" for one that is not there."""

    def read() -> dict[str, str]:
        found = {}
        for path in paths:
            try:
                found[path] = (_PROC / path).read_text().strip()
            except OSError:
                found[path] = ""
        return found

    return within(ns, read)


def switch(probe: EventProbe) -> frozenset[Part]:
    """Return the switch's part, from its events: ports that have a number, flows with names for numbers."""
    names = {str(number): name for name, number in probe.ports.items() if number > 0 and name.startswith("gre-")}

    def named(text: str) -> str:
        return _PORT.sub(lambda found: found[1] + names.get(found[2], f"?{found[2]}"), text)

    ports: set[Part] = {("port", name) for name in names.values()}
    return frozenset(ports | {("flow", named(match), named(actions)) for match, actions in probe.table.items()})


def filters(host: Host) -> str:
    """Return the filter tables as nft lists them, sorted: nft lists a table that was made again last."""
    tables = host.run(["nft", "list", "ruleset"]).stdout.split("\ntable ")
    return "\n".join(sorted(table.removeprefix("table ").strip() for table in tables))
