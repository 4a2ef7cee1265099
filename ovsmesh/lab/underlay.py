"""The underlay of a lab: a bridge in a namespace of its own, the hub, and a veth pair from it to each host."""

from __future__ import annotations

from collections.abc import Sequence

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.state import LabSettings

_QUIET = {
    # each multicast group that a link sends to takes an entry of the machine-wide neighbour table
    "net/ipv6/conf/default/router_solicitations": "0",
    # ICMP errors are rate limited, and a stream that is refused would get none
    "net/ipv4/icmp_ratelimit": "0",
}


def hub(settings: LabSettings) -> str:
    """Return the name of the underlay's namespace."""
    return f"{settings.name}-hub"


def join(settings: LabSettings, hosts: Sequence[Host]) -> None:
    """Make the namespaces of these hosts and their pods, join the hosts to the hub, make the hub if it is missing."""
    centre = hub(settings)
    if centre not in netns.namespaces():
        _make_hub(centre, settings.underlay_mtu)
    spaces = [ns for host in hosts for ns in (host.ns, *(pod.ns for pod in host.pods))]
    netns.ip_batch(f"netns add {ns}" for ns in spaces)
    for ns in spaces:
        netns.sysctl(ns, _QUIET)
    netns.ip_batch((line for host in hosts for line in _cable(host, settings.underlay_mtu)), centre)
    for host in hosts:
        netns.ip_batch(["link set lo up", "link set eth0 up"], host.ns)


def _make_hub(centre: str, mtu: int) -> None:
    netns.ip_batch([f"netns add {centre}"])
    netns.sysctl(centre, {"net/ipv6/conf/default/accept_dad": "0"})
    lines = ["link set lo up", f"link add hub mtu {mtu} type bridge mcast_snooping 0", "link set hub up"]
    netns.ip_batch([*lines, "addr add 192.0.2.1/24 dev hub", "addr add 2001:db8::1/64 dev hub nodad"], centre)
    netns.tx_checksum_off(centre, "hub")


def _cable(host: Host, mtu: int) -> list[str]:
    # derived from the host's number, so that a host that is made again is the same to its peers
    mac = f"02:00:c0:00:02:{10 + host.index:02x}"
    return [
        f"link add u{host.index} mtu {mtu} type veth peer name eth0 address {mac} mtu {mtu} netns {host.ns}",
        f"link set u{host.index} addrgenmode none",
        f"link set u{host.index} master hub up",
    ]
