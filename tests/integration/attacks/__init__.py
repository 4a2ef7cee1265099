"""Attacks by packets: each file here is one, and test_attacks.py runs them all in every state of the defender.

To add one, add a file with an `ATTACKS` tuple. An attack says what is sent, who sends it and who must not see it, and
has a control: an honest packet on the same path that must arrive. h1 is attacked; h2 and h3 are its peers.
"""

from __future__ import annotations

import importlib
import pkgutil
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from ipaddress import ip_address
from typing import NamedTuple

from ovsmesh.checksum import internet_checksum
from ovsmesh.lab.host import Pod
from ovsmesh.lab.lab import Lab
from tests.support.labpackets import datagram, ethernet, mac, send_frame, send_packet

GRE = 47
TAG, SERVICE_TAG = 0x8100, 0x88A8
"""IEEE 802.1Q and 802.1ad."""
BROADCAST = "ff:ff:ff:ff:ff:ff"


class Scene:
    """The lab, with short words for what attacks need: two pods of h1, and one of h2."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.liar, self.victim, self.remote = lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1)

    @cached_property
    def macs(self) -> dict[str, str]:
        return {pod.ns: mac(pod.ns) for pod in (self.liar, self.victim, self.remote)}

    def gateway_mac(self, host: int = 1) -> str:
        """By how the mesh derives it."""
        return f"0a:58:0a:61:{host:02x}:01"

    def address(self, pod: Pod, version: int = 4) -> str:
        return str(pod.addresses[version == 6])

    def frame(self, packet: bytes, to: str = "", source: str = "") -> bytes:
        """A frame of the liar, to the victim unless another MAC is given."""
        return ethernet(to or self.macs[self.victim.ns], source or self.macs[self.liar.ns], packet)

    def from_pod(self, *frames: bytes) -> None:
        """The liar sends frames."""
        send_frame(self.liar.ns, "eth0", *frames)

    def from_peer(self, *frames: bytes, peer: int = 2) -> None:
        """A peer sends frames to h1 through its tunnel."""
        outer = [datagram(f"192.0.2.{10 + peer}", "192.0.2.11", struct.pack("!HH", 0, 0x6558) + f, GRE) for f in frames]
        # from the peer itself: a switch learns from tunnel packets which MAC has an underlay address
        send_packet(self.lab.host(peer).ns, *outer)


class Attack(NamedTuple):
    """Frames that nobody may see, and how an honest one goes the same way.

    `send` and `control` get a marker, which is to be in each packet.
    """

    name: str
    send: Callable[[Scene, bytes], None]
    control: Callable[[Scene, bytes], None]
    watched: Callable[[Scene], tuple[str, str]] = lambda scene: (scene.victim.ns, "eth0")
    """Namespace and device where the marker may not be seen."""


class Theft(NamedTuple):
    """Frames after which the liar would get what the victim sends to `target`."""

    name: str
    send: Callable[[Scene], None]
    target: Callable[[Scene], str]


def tagged(frame: bytes, *tags: tuple[int, int]) -> bytes:
    """Put tags (type, VLAN) into a frame, the outermost first."""
    return frame[:12] + b"".join(struct.pack("!HH", *tag) for tag in tags) + frame[12:]


def snap(frame: bytes) -> bytes:
    """Wrap what a frame carries in LLC and SNAP (RFC 1042)."""
    packet = b"\xaa\xaa\x03\0\0\0" + frame[12:]
    return frame[:12] + struct.pack("!H", len(packet)) + packet


ENVELOPES: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda frame: frame,
    "priority tag": lambda frame: tagged(frame, (TAG, 0)),
    "802.1ad priority tag": lambda frame: tagged(frame, (SERVICE_TAG, 0)),
    "VLAN 5": lambda frame: tagged(frame, (TAG, 5)),
    "two priority tags": lambda frame: tagged(frame, (TAG, 0), (TAG, 0)),
    "QinQ of VLAN 0": lambda frame: tagged(frame, (SERVICE_TAG, 0), (TAG, 0)),
    "three priority tags": lambda frame: tagged(frame, (TAG, 0), (TAG, 0), (TAG, 0)),
    "LLC/SNAP": snap,
}
"""Ways to put a packet into a frame that filters may not look into."""
IN_EVERY = tuple(ENVELOPES.values())


def arp(
    sender: str, sender_mac: str, target: str, operation: int = 2, hardware: int = 1, payload: bytes = b""
) -> bytes:
    """An ARP packet; an answer unless it is said otherwise."""
    raw = bytes.fromhex(sender_mac.replace(":", "")), ip_address(sender).packed, bytes(6), ip_address(target).packed
    return struct.pack("!HHBBH", hardware, 0x0800, 6, 4, operation) + b"".join(raw) + payload


def arp_frame(packet: bytes, source: str, to: str = BROADCAST) -> bytes:
    return b"".join(bytes.fromhex(m.replace(":", "")) for m in (to, source)) + b"\x08\x06" + packet


def icmp6(source: str, target: str, kind: int, body: bytes, *headers: tuple[int, bytes]) -> bytes:
    """An ICMPv6 packet with its checksum; `headers` are extension headers (number, contents after the first byte)."""
    a, b = ip_address(source).packed, ip_address(target).packed
    head = struct.pack("!BBH", kind, 0, 0)
    summed = internet_checksum(a + b + struct.pack("!II", 4 + len(body), 58) + head + body)
    payload, following = head[:2] + struct.pack("!H", summed) + body, 58
    for number, contents in reversed(headers):
        payload, following = bytes([following]) + contents + payload, number
    return struct.pack("!IHBB", 6 << 28, len(payload), following, 255) + a + b + payload


HOP_BY_HOP = (0, b"\0" + b"\x01\x04\0\0\0\0")
DESTINATION = (60, b"\0" + b"\x01\x04\0\0\0\0")
ATOMIC_FRAGMENT = (44, b"\0" + struct.pack("!HI", 0, 7))
HEADERS: tuple[tuple[tuple[int, bytes], ...], ...] = (
    (),
    (HOP_BY_HOP,),
    (DESTINATION,),
    (HOP_BY_HOP, DESTINATION),
    (ATOMIC_FRAGMENT,),
    (DESTINATION, ATOMIC_FRAGMENT),
)
"""Chains of extension headers before what is sent."""


def every() -> Sequence[Attack | Theft]:
    """Return the attacks of all files here."""
    found: list[Attack | Theft] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").ATTACKS
    return found
