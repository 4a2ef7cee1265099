"""Faults of a lab's underlay: packets between two hosts that are dropped, all or some, or that take longer."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ovsmesh.lab import netns, underlay
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab

_ETH_P_ALL = 3


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


def cut(one: Host, other: Host) -> list[str]:
    """Return the rules that cut the tunnel between two hosts both ways."""
    return [f"{tunnel(one, other)} drop", f"{tunnel(other, one)} drop"]


def limit(one: Host, other: Host, size: int) -> list[str]:
    """Return the rules that lose the tunnel's packets above `size` bytes, outer IP header included, both ways."""
    length = f"ip length > {size}" if one.address.version == 4 else f"ip6 length > {size - 40}"
    return [f"{tunnel(*pair)} {length} drop" for pair in ((one, other), (other, one))]


def lose(source: Host, target: Host, percent: int) -> str:
    """Return the rule that loses this share of the tunnel's packets from one host to another."""
    return f"{tunnel(source, target)} numgen random mod 100 < {percent} drop"


@contextmanager
def delay(lab: Lab, host: Host, seconds: float) -> Iterator[None]:
    """Hold up each packet that a host sends into the underlay: a thread stands between its cable and the hub."""
    hub, cable, ends = underlay.hub(lab.settings), f"u{host.index}", (f"d{host.index}", f"e{host.index}")
    mtu = lab.settings.underlay_mtu
    netns.ip_batch(
        [
            f"link add {ends[0]} mtu {mtu} type veth peer name {ends[1]} mtu {mtu}",
            *(f"link set {end} addrgenmode none" for end in ends),
            *(f"link set {end} up" for end in ends),
            f"link set {cable} nomaster",
            f"link set {ends[0]} master hub",
        ],
        hub,
    )
    relay = _Relay(hub, cable, ends[1], seconds)
    try:
        yield
    finally:
        relay.close()
        netns.ip_batch([f"link del {ends[0]}", f"link set {cable} master hub"], hub)


class _Relay:
    """Passes frames on between two links, one way late."""

    def __init__(self, ns: str, slow: str, fast: str, seconds: float) -> None:
        self._slow = netns.within(ns, lambda: _tap(slow))
        self._fast = netns.within(ns, lambda: _tap(fast))
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"delay-{slow}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._slow.close()
        self._fast.close()

    def _run(self) -> None:
        held: deque[tuple[float, bytes]] = deque()
        while not self._stop.is_set():
            pause = held[0][0] - time.monotonic() if held else 0.05
            select.select([self._slow, self._fast], [], [], max(0.0, min(pause, 0.05)))
            held.extend((time.monotonic() + self._seconds, frame) for frame in _frames(self._slow))
            for frame in _frames(self._fast):
                _put(self._slow, frame)
            while held and held[0][0] <= time.monotonic():
                _put(self._fast, held.popleft()[1])


def _tap(link: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL))
    sock.bind((link, 0))
    return sock


def _frames(sock: socket.socket) -> Iterator[bytes]:
    """Yield the frames that came in, and none of those that were sent."""
    while True:
        try:
            frame, address = sock.recvfrom(65535)
        except OSError:
            return
        if address[2] != socket.PACKET_OUTGOING:
            yield frame


def _put(sock: socket.socket, frame: bytes) -> None:
    # a frame that the full queue does not take is lost, as on a wire
    with suppress(OSError):
        sock.send(frame)
