"""Faults of a lab's underlay: packets between two hosts that are dropped, or only where they are large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ovsmesh.lab import netns, underlay
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab


@contextmanager
def fault(lab: Lab, *rules: str) -> Iterator[None]:
    """Have the hub do this to packets that cross it. A rule is one of nft's; see `tunnel`."""
    hub = underlay.hub(lab.settings)
    chain = "type filter hook forward priority 0; policy accept;"
    netns.run(["nft", "-f", "-"], hub, text=f"table bridge fault {{ chain c {{ {chain} {'; '.join(rules)}; }}; }}\n")
    try:
        yield
    finally:
        netns.run(["nft", "delete table bridge fault"], hub)


def tunnel(source: Host, target: Host) -> str:
    """Return a match of the tunnel's packets from one host to another, whatever the encapsulation."""
    ip = "ip" if source.address.version == 4 else "ip6"
    ports = "meta l4proto udp th dport { 4789, 6081 }" if source.settings.encapsulation != "gre" else "meta l4proto gre"
    return f"{ip} saddr {source.address} {ip} daddr {target.address} {ports}"


def cut(lab: Lab, one: Host, other: Host) -> list[str]:
    """Return the rules that cut the tunnel between two hosts both ways."""
    return [f"{tunnel(one, other)} drop", f"{tunnel(other, one)} drop"]


def limit(lab: Lab, one: Host, other: Host, size: int) -> list[str]:
    """Return the rules that lose the tunnel's packets above `size` bytes, outer IP header included, both ways."""
    length = f"ip length > {size}" if one.address.version == 4 else f"ip6 length > {size - 40}"
    return [f"{tunnel(*pair)} {length} drop" for pair in ((one, other), (other, one))]
