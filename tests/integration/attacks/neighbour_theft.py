"""A pod says by ARP or neighbour discovery that an address of another is its own."""

from __future__ import annotations

from ipaddress import ip_address

from tests.integration.attacks import BROADCAST, HEADERS, IN_EVERY, Scene, Theft, arp, arp_frame, icmp6

OVERRIDE = 0x20000000


def _arp(scene: Scene, claimed: str) -> None:
    own, to = scene.macs[scene.liar.ns], scene.macs[scene.victim.ns]
    packets = [
        arp(claimed, own, scene.address(scene.victim), operation, hardware)
        for operation in (1, 2)
        for hardware in (1, 6)
    ]
    packets += [arp(claimed, own, claimed, 1)]
    scene.from_pod(*(wrap(arp_frame(p, own, there)) for p in packets for there in (to, BROADCAST) for wrap in IN_EVERY))


def _advertise(scene: Scene, claimed: str) -> None:
    own = bytes.fromhex(scene.macs[scene.liar.ns].replace(":", ""))
    victim = scene.address(scene.victim, 6)
    body = OVERRIDE.to_bytes(4) + ip_address(claimed).packed + b"\x02\x01" + own
    solicit = bytes(4) + ip_address(victim).packed + b"\x01\x01" + own
    packets = [icmp6(source, victim, 136, body, *chain) for source in ("fe80::666", claimed) for chain in HEADERS]
    packets += [icmp6(claimed, victim, 135, solicit, *chain) for chain in HEADERS]
    scene.from_pod(*(wrap(scene.frame(packet)) for packet in packets for wrap in IN_EVERY))


ATTACKS = (
    Theft("the gateway's address by ARP", lambda s: _arp(s, "10.97.1.1"), lambda s: s.address(s.remote)),
    Theft("the gateway's address by ND", lambda s: _advertise(s, "fd00:97:1::1"), lambda s: s.address(s.remote, 6)),
    Theft(
        "the gateway's link-local address by ND",
        lambda s: _advertise(s, "fe80::858:aff:fe61:101"),
        lambda s: s.address(s.remote, 6),
    ),
)
