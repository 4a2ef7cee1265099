"""The underlay of a lab: a bridge in a namespace of its own, and a cable from it to each host.

Knows how namespaces are joined and what must be quiet in them; knows no Open vSwitch. Never imports
ovs, pyroute2, kubernetes, rich.
"""

from __future__ import annotations

from collections.abc import Sequence

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.state import LabSettings

_QUIET = {
    # each multicast group that a link speaks to takes an entry of the machine-wide neighbour table
    "net/ipv6/conf/default/router_solicitations": "0",
    # two of the kernel's checks take ICMP tokens from one bucket, so a stream that is refused gets no error at all
    "net/ipv4/icmp_ratelimit": "0",
}


def hub(settings: LabSettings) -> str:
    return f"{settings.name}-hub"


def join(settings: LabSettings, hosts: Sequence[Host]) -> None:
    """Makes the namespaces of these hosts and their pods, and joins the hosts to the hub (made if need be)."""
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
    # a MAC that the host's number tells, so that a host that is made again is the same to its peers
    mac = f"02:00:c0:00:02:{10 + host.index:02x}"
    return [
        f"link add u{host.index} mtu {mtu} type veth peer name eth0 address {mac} mtu {mtu} netns {host.ns}",
        f"link set u{host.index} addrgenmode none",
        f"link set u{host.index} master hub up",
    ]
