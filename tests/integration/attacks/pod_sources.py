"""A pod sends with a source that is not its own, to its neighbour and to another node."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.integration.attacks import IN_EVERY, Attack, Scene
from tests.support.labpackets import datagram, send_packet

SOURCES = {
    "nobody of the mesh": ("8.8.8.8", "2001:db8:ffff::8"),
    "a loopback address": ("127.0.0.1", "::1"),
    "a link-local address, as a cloud's metadata service has": ("169.254.169.254", ""),
    "no address": ("0.0.0.0", "::"),
    "the broadcast address": ("255.255.255.255", ""),
    "a multicast address": ("224.0.0.251", "ff02::fb"),
    "another node's pod": ("10.97.3.2", "fd00:97:3::2"),
    "the gateway": ("10.97.1.1", "fd00:97:1::1"),
    "another node's gateway": ("10.97.3.1", "fd00:97:3::1"),
    "its node's tunnel address": ("192.0.2.11", "2001:db8::11"),
    "a peer's tunnel address": ("192.0.2.12", "2001:db8::12"),
}


def _near(sources: tuple[str, str], scene: Scene, marker: bytes) -> None:
    for version, source in zip((4, 6), sources, strict=True):
        if source:
            packet = datagram(source, scene.address(scene.victim, version), marker)
            scene.from_pod(*(wrap(scene.frame(packet)) for wrap in IN_EVERY))


def _far(sources: tuple[str, str], scene: Scene, marker: bytes) -> None:
    for version, source in zip((4, 6), sources, strict=True):
        if source:
            packet = datagram(source, scene.address(scene.remote, version), marker)
            frames = [scene.frame(packet, scene.gateway_mac()), scene.frame(packet, scene.gateway_mac(2))]
            scene.from_pod(*(wrap(frame) for frame in frames for wrap in IN_EVERY))


def _honest(far: bool, scene: Scene, marker: bytes) -> None:
    for version in (4, 6):
        target = scene.address(scene.remote if far else scene.victim, version)
        send_packet(scene.liar.ns, datagram(scene.address(scene.liar, version), target, marker))


def _attacks() -> Iterator[Attack]:
    for what, sources in SOURCES.items():
        yield Attack(f"the source of {what}, to its neighbour", partial(_near, sources), partial(_honest, False))
        there = lambda scene: (scene.remote.ns, "eth0")  # noqa: E731
        yield Attack(f"the source of {what}, to another node", partial(_far, sources), partial(_honest, True), there)


ATTACKS = tuple(_attacks())
