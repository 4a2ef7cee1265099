"""A peer sends through its tunnel what it does not own, to whom it may not, as a node whose root is hostile can."""

from __future__ import annotations

from tests.integration.attacks import BROADCAST, IN_EVERY, Attack, Scene, arp, arp_frame
from tests.support.labpackets import datagram, ethernet

FORGED = ("10.97.1.2", "10.97.1.1", "10.97.77.2", "192.0.2.11", "8.8.8.8", "127.0.0.1", "0.0.0.0")
FORGED_6 = ("fd00:97:1::2", "fd00:97:1::1", "fd00:97:77::2", "2001:db8:ffff::8", "fe80::666", "::1", "::")


def _sources(scene: Scene, marker: bytes) -> None:
    for version, sources in ((4, FORGED), (6, FORGED_6)):
        target = scene.address(scene.victim, version)
        frames = [ethernet(scene.gateway_mac(), scene.gateway_mac(2), datagram(s, target, marker)) for s in sources]
        scene.from_peer(*(wrap(frame) for frame in frames for wrap in IN_EVERY))


def _honest(scene: Scene, marker: bytes) -> None:
    for version in (4, 6):
        packet = datagram(scene.address(scene.remote, version), scene.address(scene.victim, version), marker)
        scene.from_peer(ethernet(scene.gateway_mac(), scene.gateway_mac(2), packet))


def _macs(scene: Scene, marker: bytes) -> None:
    victim, own = scene.macs[scene.victim.ns], scene.gateway_mac(2)
    for version in (4, 6):
        packet = datagram(scene.address(scene.remote, version), scene.address(scene.victim, version), marker)
        frames = [ethernet(to, own, packet) for to in (victim, BROADCAST, "33:33:00:00:00:01", "01:00:5e:00:00:01")]
        scene.from_peer(*(wrap(frame) for frame in frames for wrap in IN_EVERY))
    claims = [arp(claimed, own, scene.address(scene.victim), payload=marker) for claimed in ("10.97.1.1", "10.97.1.2")]
    frames = [arp_frame(claim, own, to) for claim in claims for to in (victim, BROADCAST)]
    scene.from_peer(*(wrap(frame) for frame in frames for wrap in IN_EVERY))


def _through(scene: Scene, marker: bytes) -> None:
    """Use h1 as a router: onto the underlay, to another peer, and to the addresses of h1 itself."""
    source = scene.address(scene.remote)
    frames = [
        ethernet(scene.gateway_mac(), scene.gateway_mac(2), datagram(source, target, marker))
        for target in ("192.0.2.1", "192.0.2.13", "8.8.8.8")
    ]
    scene.from_peer(*frames)


def _out(scene: Scene, marker: bytes) -> None:
    scene.from_pod(scene.frame(datagram(scene.address(scene.liar), "192.0.2.1", marker), scene.gateway_mac()))


ATTACKS = (
    Attack("a peer's frames with sources of others", _sources, _honest),
    Attack("a peer's frames to others' MACs", _macs, _honest),
    Attack("a peer that uses its peer as a router", _through, _out, lambda s: (s.lab.hub, "hub")),
)
