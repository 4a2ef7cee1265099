"""A pod uses a MAC that is not its own, so that the bridge moves that MAC's entry to the pod's port."""

from __future__ import annotations

from tests.integration.attacks import IN_EVERY, Scene, Theft
from tests.support.labpackets import datagram


def _claim(scene: Scene, mac: str) -> None:
    packet = datagram(scene.address(scene.liar), scene.address(scene.victim), b"claim")
    to_victim = scene.frame(packet, source=mac)
    to_gateway = scene.frame(packet, scene.gateway_mac(), mac)
    # an EtherType that no rule knows (IEEE 802, local experiments)
    strange = to_victim[:12] + b"\x88\xb5" + bytes(46)
    scene.from_pod(*(wrap(frame) for frame in (to_victim, to_gateway) for wrap in IN_EVERY), strange)


ATTACKS = (
    Theft("a peer's MAC", lambda s: _claim(s, s.gateway_mac(2)), lambda s: s.address(s.remote)),
    Theft("its own gateway's MAC", lambda s: _claim(s, s.gateway_mac(1)), lambda s: s.address(s.remote)),
)
