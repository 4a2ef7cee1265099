"""A pod plays what only a node or a network may be: a router, a DHCP server, the host's own loopback."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from tests.integration.attacks import BROADCAST, HEADERS, IN_EVERY, Attack, Scene, icmp6
from tests.support.labpackets import datagram

LINK_LOCAL = "fe80::666"
ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"


def _udp(source: str, target: str, ports: tuple[int, int], marker: bytes) -> bytes:
    # from port 4000 to port 4001; a receiver's raw socket minds no checksum
    packet = datagram(source, target, marker)
    return packet.replace(struct.pack("!HH", 4000, 4001), struct.pack("!HH", *ports), 1)


def _router(scene: Scene, marker: bytes) -> None:
    advertisement = struct.pack("!BBHII", 64, 0, 1800, 0, 0) + b"\x00" * 0
    packets = [icmp6(LINK_LOCAL, ALL_NODES, 134, advertisement + marker, *chain) for chain in HEADERS]
    target = ip_address(LINK_LOCAL).packed + ip_address("2001:db8::1").packed
    redirect = bytes(4) + target + marker
    packets += [icmp6(LINK_LOCAL, scene.address(scene.victim, 6), 137, redirect, *chain) for chain in HEADERS]
    scene.from_pod(*(wrap(scene.frame(packet, ALL_NODES_MAC)) for packet in packets for wrap in IN_EVERY))


def _neighbour(scene: Scene, marker: bytes) -> None:
    body = bytes(4) + ip_address(scene.address(scene.liar, 6)).packed + marker
    for chain in HEADERS:
        scene.from_pod(scene.frame(icmp6(scene.address(scene.liar, 6), ALL_NODES, 136, body, *chain), ALL_NODES_MAC))


def _dhcp_server(scene: Scene, marker: bytes) -> None:
    own = scene.address(scene.liar)
    replies = [_udp(own, "255.255.255.255", (port, 68), marker) for port in (67, 4000)]
    replies += [_udp(LINK_LOCAL, ALL_NODES, (port, 546), marker) for port in (547, 4000)]
    scene.from_pod(*(wrap(scene.frame(reply, BROADCAST)) for reply in replies for wrap in IN_EVERY))


def _dhcp_client(scene: Scene, marker: bytes) -> None:
    scene.from_pod(scene.frame(_udp("0.0.0.0", "255.255.255.255", (68, 67), marker), BROADCAST))
    solicit = _udp(LINK_LOCAL, "ff02::1:2", (546, 547), marker)
    scene.from_pod(scene.frame(solicit, "33:33:00:01:00:02"))


def _loopback(scene: Scene, marker: bytes) -> None:
    # as portmap does for host ports
    scene.lab.host(1).run(["sysctl", "-qw", "net.ipv4.conf.kbr0.route_localnet=1"])
    try:
        packets = [datagram(scene.address(scene.liar), "127.0.0.1", marker), datagram("127.0.0.1", "10.97.1.1", marker)]
        scene.from_pod(*(wrap(scene.frame(packet, scene.gateway_mac())) for packet in packets for wrap in IN_EVERY))
    finally:
        scene.lab.host(1).run(["sysctl", "-qw", "net.ipv4.conf.kbr0.route_localnet=0"])


ATTACKS = (
    Attack("a router's advertisements and redirects", _router, _neighbour),
    Attack("a DHCP server's replies", _dhcp_server, _dhcp_client),
    Attack(
        "the loopback of its node",
        _loopback,
        lambda s, marker: s.from_pod(s.frame(datagram(s.address(s.liar), "10.97.1.1", marker), s.gateway_mac())),
        lambda s: (s.lab.host(1).ns, "kbr0"),
    ),
)
