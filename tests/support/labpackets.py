"""Packets of the tests of a live mesh: pings that must all be answered, forged frames, and who received them."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Sequence
from ipaddress import ip_address
from types import TracebackType

from ovsmesh.checksum import internet_checksum
from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError, wait_for
from ovsmesh.lab.ping import Pair, Track, ping
from tests.support.labtools import SOON
from tests.support.needs import needs


def track(sent: int, received: dict[int, float], source: str = "h1p1", target: str = "h2p1") -> Track:
    """Return a track of packets sent at 0, 1, 2, … seconds."""
    return Track(Pair("", "10.97.2.2", source, target), [float(n) for n in range(sent)], received)


def assert_whole(tracks: Sequence[Track]) -> None:
    """Every packet came back once, from where it was sent to."""
    assert tracks
    bad = [t for t in tracks if t.lost or t.duplicates or t.strays or t.errors]
    told = [f"{t.pair}: lost {t.lost} of {len(t.sent)}, twice {t.duplicates}, {dict(t.errors)}" for t in bad]
    assert not bad, "\n".join(told[:10])


def assert_reach(lab: Lab, pairs: Sequence[Pair] | None = None, timeout: float = SOON) -> None:
    """Every pod reaches every other again, within the deadline; from then on with no packet lost."""
    left = list(lab.pairs() if pairs is None else pairs)

    def all_answer() -> bool:
        left[:] = [t.pair for t in ping(left, 1, timeout=0.3) if t.lost]
        return not left

    try:
        wait_for("every pair to answer", all_answer, timeout, every=0.05)
    except LabError:
        raise AssertionError(f"no answer in {timeout:g} s: {left[:10]}") from None
    assert_whole(ping(lab.pairs() if pairs is None else pairs, 3))


def silent(pairs: Sequence[Pair]) -> bool:
    """No pair gets a single answer."""
    return all(not track.received for track in ping(pairs, 2, timeout=0.3))


@needs("root")
class Sniffer:
    """Collects the frames that a device of a namespace receives, until it is left. Bound before it returns."""

    def __init__(self, ns: str, device: str = "eth0", outgoing: bool = False) -> None:
        self._outgoing = outgoing
        self.frames: list[bytes] = []
        self._socket = netns.within(ns, lambda: self._open(device))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"sniffer-{ns}", daemon=True)

    @staticmethod
    def _open(device: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((device, 0))
        sock.settimeout(0.05)
        return sock

    def __enter__(self) -> Sniffer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                frame, address = self._socket.recvfrom(65535)
            except TimeoutError:
                continue
            except OSError:
                # the device went down: reading takes the error
                continue
            if self._outgoing or address[2] != socket.PACKET_OUTGOING:
                self.frames.append(frame)

    def count(self, marker: bytes) -> int:
        return sum(marker in frame for frame in list(self.frames))

    def await_marker(self, marker: bytes, timeout: float = SOON) -> None:
        wait_for(f"a frame with {marker!r}", lambda: self.count(marker) > 0, timeout)


def datagram(source: str, target: str, payload: bytes, protocol: int = socket.IPPROTO_UDP) -> bytes:
    """An IP packet of either family; as UDP it goes from port 4000 to port 4001."""
    a, b = ip_address(source), ip_address(target)
    if protocol == socket.IPPROTO_UDP:
        head = struct.pack("!HHHH", 4000, 4001, 8 + len(payload), 0)
        pseudo = a.packed + b.packed + struct.pack("!II", 8 + len(payload), protocol)
        payload = head[:6] + struct.pack("!H", internet_checksum(pseudo + head + payload) or 0xFFFF) + payload
    if a.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + a.packed + b.packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + a.packed + b.packed
    return head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:] + payload


def ethernet(target: str, source: str, packet: bytes) -> bytes:
    """A frame around an IP packet; MACs as text."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    return (
        bytes.fromhex(target.replace(":", ""))
        + bytes.fromhex(source.replace(":", ""))
        + struct.pack("!H", kind)
        + packet
    )


def send_frame(ns: str, device: str, *frames: bytes) -> None:
    def opened() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind((device, 0))
        return sock

    with netns.within(ns, opened) as sock:
        for frame in frames:
            sock.send(frame)


def send_packet(ns: str, *packets: bytes) -> None:
    """IP packets with headers of our own making, as a process of the namespace with CAP_NET_RAW sends them."""
    for packet in packets:
        four = packet[0] >> 4 == 4
        family = socket.AF_INET if four else socket.AF_INET6
        with netns.within(ns, lambda f=family: socket.socket(f, socket.SOCK_RAW, socket.IPPROTO_RAW)) as sock:  # type: ignore[misc]
            target = socket.inet_ntop(family, packet[16:20] if four else packet[24:40])
            sock.sendto(packet, (target, 0))


def mac(ns: str, device: str = "eth0") -> str:
    return str(json.loads(netns.run(["ip", "-j", "link", "show", device], ns).stdout)[0]["address"])
