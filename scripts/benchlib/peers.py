"""Peers that exist only in a mesh file or as Nodes, and the events that show their parts."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from benchlib.event_probe import Event, EventProbe

FLOWS = 3
"""Flows that one IPv4 peer needs: to it, from its pods, from its tunnel address."""


class Peer(NamedTuple):
    """A node that is only in the mesh file."""

    name: str
    address: str
    cidr: str

    @property
    def gateway(self) -> str:
        """The gateway of its pod CIDR."""
        return str(IPv4Network(self.cidr).network_address + 1)

    @property
    def mac(self) -> str:
        """The MAC of its gateway."""
        return "0a:58:" + IPv4Address(self.gateway).packed.hex(":")

    @property
    def port(self) -> str:
        """The name of the tunnel port to it."""
        return f"gre-{self.name}"

    @property
    def text(self) -> str:
        """Its entry of a mesh file."""
        return f"  - name: {self.name}\n    address: {self.address}\n    podCIDRs: [{self.cidr}]\n"


def peer(number: int) -> Peer:
    """Return peer number 0 to 24,000. The host's own pod CIDR is 10.97.1.0/24."""
    return Peer(f"p{number}", f"172.16.{number // 250}.{number % 250 + 1}", f"10.{number // 250}.{number % 250}.0/24")


def events(peers: Sequence[Peer], sign: str) -> dict[str, list[Event]]:
    """Return the events of these peers' parts in kernel and switch, without flows. `sign` is "+" or "-"."""
    return {
        "port": [(f"port{sign}", p.port) for p in peers],
        "neighbour": [(f"neigh{sign}", p.gateway) for p in peers],
        "FDB": [(f"fdb{sign}", p.mac) for p in peers],
        "route": [(f"route{sign}", p.cidr) for p in peers],
        "filter": [(f"nft{sign}", p.address) for p in peers],
    }


def last_seen(probe: EventProbe, peers: Sequence[Peer], sign: str, timeout: float) -> dict[str, float]:
    """Wait for all parts of these peers. Return when the last one of each kind was seen."""
    parts = events(peers, sign)
    seen = probe.wait([event for found in parts.values() for event in found], timeout)
    last = {part: max(seen[event] for event in found) for part, found in parts.items()}
    return last | {"flows": probe.wait_count(f"flow{sign}", FLOWS * len(peers), timeout)}
