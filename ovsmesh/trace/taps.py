"""See the packets of a trace on the links that they pass, through packet sockets: they end with the process."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ovsmesh.bpf import Line, attach
from ovsmesh.linux.nft_trace import Encapsulation, offsets
from ovsmesh.mesh.types import IPAddress
from ovsmesh.trace.echo import TOKEN
from ovsmesh.trace.types import Point

_OUTGOING = 4
_ETHERNET = 14
_PORT = {"vxlan": 4789, "geneve": 6081}
_SNAP = 65535
_REQUEST, _REPLY = (8, 128), (0, 129)


class Seen(NamedTuple):
    """What was seen on a link."""

    tap: str
    out: bool
    """Whether it left through the link."""
    kind: str
    """"request", "reply" or "error"."""
    phase: int


class Taps:
    """The packets of one trace on several links, each tap under a name of the caller's."""

    def __init__(self, version: int, token: bytes) -> None:
        self._version, self._token = version, token
        self._sockets: dict[int, tuple[str, socket.socket, int]] = {}
        """Descriptor → (name, socket, offset of the inner IP header)."""
        self.seen: Counter[Seen] = Counter()
        self.heard = 0
        """Tunnel packets of the peer, whatever is in them."""
        self.errors: dict[str, None] = {}
        """ICMP errors about tunnel packets, as "SENDER: type T code C"."""
        self.addresses: dict[str, str] = {}
        """"source" and "destination" of the last request that left by obr0 or the port of the destination."""

    def add(self, name: str, device: str) -> None:
        """See the packets on a link. Raises OSError where it is missing."""
        sock = self._open(device, socket.SOCK_RAW)
        places = [_ETHERNET + offset for offset in offsets(self._version)]
        attach(sock, _any_of(places, self._token[:4]))
        self._sockets[sock.fileno()] = name, sock, _ETHERNET

    def add_underlay(self, name: str, device: str, form: Encapsulation, peer: IPAddress) -> None:
        """See them inside tunnel packets, and what else the peer sends. Raises OSError where the link is missing."""
        sock = self._open(device, socket.SOCK_DGRAM)
        attach(sock, _any_of([form.inner + offset for offset in offsets(self._version)], self._token[:4]))
        self._sockets[sock.fileno()] = name, sock, form.inner
        heard = self._open(device, socket.SOCK_DGRAM, 1 << 16)
        attach(heard, _from_peer(form, peer))
        self._sockets[heard.fileno()] = "heard", heard, 0
        errors = self._open(device, socket.SOCK_DGRAM)
        attach(errors, _about_peer(peer))
        self._sockets[errors.fileno()] = "errors", errors, peer.version

    @staticmethod
    def _open(device: str, kind: int, buffer: int = 1 << 20) -> socket.socket:
        # nothing is received before the filter is there
        sock = socket.socket(socket.AF_PACKET, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            attach(sock, [(0x06, 0, 0, 0)])
            sock.bind((device, 3))
        except OSError:
            sock.close()
            raise
        return sock

    def fds(self) -> list[int]:
        """Return the descriptors that are readable when something was seen; then call `drain`."""
        return list(self._sockets)

    def drain(self) -> None:
        """Count what was seen."""
        for name, sock, inner in self._sockets.values():
            while True:
                try:
                    data, address = sock.recvfrom(_SNAP)
                except OSError:
                    break
                self._take(name, data, address, inner)

    def _take(self, name: str, data: bytes, address: tuple[str, int, int, int, bytes], inner: int) -> None:
        out = address[2] == _OUTGOING
        if name == "heard":
            self.heard += not out
        elif name == "errors":
            if not out:
                sender, at = (data[12:16], 20) if inner == 4 else (data[8:24], 40)
                family = socket.AF_INET if inner == 4 else socket.AF_INET6
                self.errors.setdefault(f"{socket.inet_ntop(family, sender)}: type {data[at]} code {data[at + 1]}")
        else:
            self._count(name, data, out, inner)

    def _count(self, name: str, data: bytes, out: bool, inner: int) -> None:
        for at, kind in zip(offsets(self._version), ("echo", "error"), strict=True):
            place = inner + at
            if data[place : place + TOKEN - 1] != self._token or len(data) < place + TOKEN:
                continue
            if kind == "echo":
                kind = "request" if data[place - 8] in _REQUEST else "reply"
            self.seen[Seen(name, out, kind, data[place + TOKEN - 1])] += 1
            if kind == "request" and out and name in ("obr0", "target"):
                start, length = (inner + 12, 4) if self._version == 4 else (inner + 8, 16)
                family = socket.AF_INET if self._version == 4 else socket.AF_INET6
                for n, which in enumerate(("source", "destination")):
                    packed = data[start + n * length : start + (n + 1) * length]
                    self.addresses[which] = socket.inet_ntop(family, packed)
            return

    def close(self) -> None:
        """Close all sockets."""
        for _, sock, _ in self._sockets.values():
            sock.close()
        self._sockets.clear()


_POINTS: Mapping[tuple[str, bool, str], Point] = {
    ("port", False, "request"): Point.PORT,
    ("kbr0", False, "request"): Point.KBR_IN,
    ("kbr0", True, "request"): Point.KBR_OUT,
    ("obr0", True, "request"): Point.OBR,
    ("underlay", True, "request"): Point.UNDERLAY,
    ("target", True, "request"): Point.TARGET_PORT,
    ("target", False, "reply"): Point.TARGET_PORT_BACK,
    ("underlay", False, "reply"): Point.UNDERLAY_BACK,
    ("obr0", False, "reply"): Point.OBR_BACK,
    ("kbr0", False, "reply"): Point.KBR_IN_BACK,
    ("kbr0", True, "reply"): Point.KBR_OUT_BACK,
    ("port", True, "reply"): Point.PORT_BACK,
}


def points(seen: Mapping[Seen, int], taps: Sequence[str], phase: int) -> dict[Point, int]:
    """Return how many packets of one phase were seen at each point where a tap is."""
    return {
        point: seen.get(Seen(tap, out, kind, phase), 0) for (tap, out, kind), point in _POINTS.items() if tap in taps
    }


# filters in classic BPF (socket(7)): (operation, jump if true, jump if false, value)

_Program = list[Line]
_LOAD, _LOAD_BYTE, _LOAD_HALF, _EQUAL, _RETURN = 0x20, 0x30, 0x28, 0x15, 0x06


def _any_of(places: Sequence[int], word: bytes) -> _Program:
    """Accept packets with the word at one of these offsets, which ascend: a load behind the end rejects."""
    program: _Program = []
    for n, place in enumerate(places):
        program += [(_LOAD, 0, 0, place), (_EQUAL, 2 * (len(places) - n) - 1, 0, int.from_bytes(word))]
    return [*program, (_RETURN, 0, 0, 0), (_RETURN, 0, 0, _SNAP)]


def _all_of(checks: Sequence[tuple[int, int, int]]) -> _Program:
    """Accept packets for which each (load operation, offset, value) holds."""
    program: _Program = []
    for n, (load, place, value) in enumerate(checks):
        program += [(load, 0, 0, place), (_EQUAL, 0, 2 * (len(checks) - n) - 1, value)]
    return [*program, (_RETURN, 0, 0, _SNAP), (_RETURN, 0, 0, 0)]


def _words(place: int, packed: bytes) -> list[tuple[int, int, int]]:
    return [(_LOAD, place + n, int.from_bytes(packed[n : n + 4])) for n in range(0, len(packed), 4)]


def _from_peer(form: Encapsulation, peer: IPAddress) -> _Program:
    protocol, source = (9, 12) if peer.version == 4 else (6, 8)
    checks = [(_LOAD_BYTE, protocol, 47 if form.protocol == "gre" else 17), *_words(source, peer.packed)]
    if form.protocol in _PORT:
        checks.append((_LOAD_HALF, form.outer + 2, _PORT[form.protocol]))
    return _all_of(checks)


def _about_peer(peer: IPAddress) -> _Program:
    """Accept ICMP errors about packets to the peer: they quote its header, whose last part is its destination."""
    if peer.version == 4:
        return _all_of([(_LOAD_BYTE, 9, 1), (_LOAD_BYTE, 20, 3), *_words(28 + 16, peer.packed)])
    return _all_of([(_LOAD_BYTE, 6, 58), *_words(48 + 24, peer.packed)])
