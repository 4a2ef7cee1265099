"""Probes as packets, and the sockets that send and receive them.

An echo request goes the way of the host's own packets, and a raw socket takes in its answer. A loop leaves through
kbr0 as a frame to the peer's MAC, as a pod's packet does once it is routed. It comes back on obr0, where a packet
socket reads it; the bridge throws it away behind that. Requests of peers are read there too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from ovsmesh.checksum import internet_checksum
from ovsmesh.mesh.types import IPAddress
from ovsmesh.names import KBR, OBR, PROBE_MAGIC
from ovsmesh.probe.row_socket import Line, attach
from ovsmesh.probe.targets import Target


class Astray(OSError):
    """Packets of this node's pods to the peer do not go to kbr0, wherever a probe goes."""


SHOWS_VERSION = 1
"""Flag in each probe: the filter of this version's agent treats loops as packets to its pods."""
BATCH = 64
"""Packets that are read at a time: a flood of them holds nobody up."""
_SNAP = 128
_ECHO_WAIT = 5.0
"""Seconds for which answers to an echo request are looked for; later than a second it counts as lost."""
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE = 35, 33
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_IP_PMTUDISC_PROBE = 3
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_IP_PKTINFO, _IPV6_PKTINFO = 8, 50
_RECEIVE_BUFFER = 1 << 20
_ETHER = 14
_ETH_P_ALL = 3
_ETHER_TYPE = {4: 0x0800, 6: 0x86DD}
_HEADER = {4: 20, 6: 40}
"""Bytes of an IP header without options."""
_PROTOCOL = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
_REQUEST, _REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
_BODY = struct.Struct("!BBHHH8s8sI")
"""ICMP header, then magic, token of the sending process, and flags with the number of the path."""

PodRoute = Callable[[int, IPAddress, IPAddress], str]
"""(number of kbr0, this node's gateway, a peer's) → where pods' packets to the peer go, "" where they go to kbr0."""


class Received(NamedTuple):
    """A probe that came in: an answer to one of this process, or a request of someone else."""

    own: bool
    number: int
    """Of the path that it was sent on, by its sender's count."""
    sequence: int
    at: float
    """When the kernel took it in, on the monotonic clock."""
    source: bytes
    """Its IP address."""
    shows_version: bool


class ProbeSockets:
    """The sockets of one process. Raises OSError without the right to use raw sockets."""

    def __init__(self, astray: PodRoute) -> None:
        self._token = os.urandom(8)
        self._identifier = int.from_bytes(os.urandom(2))
        self._raw: dict[int, socket.socket] = {4: _raw_socket(4, self._identifier)}
        with contextlib.suppress(OSError):
            self._raw[6] = _raw_socket(6, self._identifier)
        self._out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        self._in = _tap()
        self._astray = astray
        self._echoed = float("-inf")
        """When an echo request was sent last."""
        self._tapped = 0
        """Interface number of obr0 as the tap is bound to it."""
        self._bridge = 0
        """Interface number of kbr0."""

    @property
    def versions(self) -> frozenset[int]:
        """IP versions that can be probed."""
        return frozenset(self._raw)

    def fds(self) -> list[int]:
        """Return what becomes readable when a packet comes in."""
        return [sock.fileno() for sock in (*self._raw.values(), self._in)]

    def close(self) -> None:
        """Close all of them."""
        for sock in (*self._raw.values(), self._out, self._in):
            sock.close()

    def follow_bridge(self) -> None:
        """Read on obr0 as it is now: it may have been made again. To be called before probes are sent."""
        try:
            bridge, number = socket.if_nametoindex(KBR), socket.if_nametoindex(OBR)
        except OSError:
            return
        if bridge != self._bridge:
            with contextlib.suppress(OSError):
                self._out.bind((KBR, 0))
                self._bridge = bridge
        if number != self._tapped:
            with contextlib.suppress(OSError):
                self._in.bind((OBR, _ETH_P_ALL))
                self._tapped = number

    def send_echo(self, target: Target, number: int, sequence: int, size: int) -> None:
        """Send an echo request to the peer's gateway. `size` is of the IP packet, in bytes. Raises OSError."""
        version = target.destination.version
        packet = self._icmp(version, number, sequence, size)
        if version == 4:
            packet = _with_checksum(packet, packet[: _BODY.size])
            about = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, target.source.packed, bytes(4)))
        else:
            # the kernel fills in ICMPv6's checksum
            about = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, target.source.packed + struct.pack("=I", 0))
        self._echoed = time.monotonic()
        self._raw[version].sendmsg([packet], [about], 0, (str(target.destination), 0))

    def send_loop(self, target: Target, number: int, sequence: int, size: int) -> None:
        """Send a packet through the tunnel that the peer forwards back.

        Raises OSError; Astray where this host would not send a pod's packet into the tunnel.
        """
        if where := self._astray(self._bridge, target.source, target.destination):
            raise Astray(0, f"this host sends them {where}")
        version, own = target.source.version, target.source.packed
        packet = self._icmp(version, number, sequence, size)
        if version == 4:
            packet = _with_checksum(packet, packet[: _BODY.size])
            head = (
                struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(packet), sequence, 0x4000, 64, _PROTOCOL[4], 0) + own + own
            )
            head = head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:]
        else:
            head = struct.pack("!IHBB", 6 << 28, len(packet), _PROTOCOL[6], 64) + own + own
            packet = _with_checksum(
                packet, own + own + struct.pack("!II", len(packet), _PROTOCOL[6]) + packet[: _BODY.size]
            )
        macs = bytes.fromhex((target.destination_mac + target.source_mac).replace(":", ""))
        self._out.send(macs + struct.pack("!H", _ETHER_TYPE[version]) + head + packet)

    def _icmp(self, version: int, number: int, sequence: int, size: int) -> bytes:
        flags = SHOWS_VERSION << 24 | number & 0xFFFFFF
        body = _BODY.pack(_REQUEST[version], 0, 0, self._identifier, sequence, PROBE_MAGIC, self._token, flags)
        return body.ljust(size - _HEADER[version], b"\0")

    def receive(self) -> Iterator[Received]:
        """Yield what has come in; of a flood, only the first."""
        now = time.monotonic()
        clocks = now - time.time()
        for version, sock in self._raw.items() if now - self._echoed < _ECHO_WAIT else ():
            for data, at, sender in _read(sock, clocks):
                body = data[(data[0] & 15) * 4 :] if version == 4 else data
                yield from self._parse(body, at, ip_address(str(sender[0]).partition("%")[0]).packed)
        for data, at, _ in _read(self._in, clocks):
            packet = data[_ETHER:]
            if data[12:14] == b"\x08\x00":
                yield from self._parse(packet[(packet[0] & 15) * 4 :], at, packet[12:16])
            else:
                yield from self._parse(packet[40:], at, packet[8:24])

    def _parse(self, body: bytes, at: float, source: bytes) -> Iterator[Received]:
        if len(body) >= _BODY.size and body[8:16] == PROBE_MAGIC:
            _, _, _, _, sequence, _, token, flags = _BODY.unpack_from(body)
            version = bool(flags >> 24 & SHOWS_VERSION)
            yield Received(token == self._token, flags & 0xFFFFFF, sequence, at, source, version)


def _with_checksum(packet: bytes, summed: bytes) -> bytes:
    """Return an ICMP message with its checksum. `summed` may leave out zeros at its end, which add nothing."""
    return packet[:2] + struct.pack("!H", internet_checksum(summed)) + packet[4:]


def _read(sock: socket.socket, clocks: float) -> Iterator[tuple[bytes, float, tuple[str, int]]]:
    """Yield packets with the time when the kernel took them in: the thread may have had to wait since."""
    for _ in range(BATCH):
        try:
            data, ancillary, _, sender = sock.recvmsg(_SNAP, 128)
        except OSError:
            # nothing more; or obr0 is gone, or an ICMP error came in
            return
        at = now = time.monotonic()
        for level, kind, stamp in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(stamp) >= 16:
                seconds, nanoseconds = struct.unpack_from("=qq", stamp)
                at = min(now, max(now - 1.0, seconds + nanoseconds / 1e9 + clocks))
        if data:
            yield data, at, sender


def _raw_socket(version: int, identifier: int) -> socket.socket:
    """Return a raw ICMP socket that takes in answers to this process, and nothing else."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(family, kind, _PROTOCOL[version])
    try:
        # an IPv4 raw socket's program sees the IP header too, an IPv6 one's does not (socket(7), ipv6(7))
        header = [(0xB1, 0, 0, 0)] if version == 4 else [(0x01, 0, 0, 0)]
        answers = [
            (0x48, 0, 0, 4),  # A = half word at X+4
            (0x15, 0, 3, identifier),
            (0x50, 0, 0, 0),  # A = byte at X
            (0x15, 0, 1, _REPLY[version]),
            (0x06, 0, 0, _SNAP),
            (0x06, 0, 0, 0),
        ]
        _prepare(sock, [*header, *answers])
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
    except BaseException:
        sock.close()
        raise
    return sock


def _tap() -> socket.socket:
    """Return a packet socket that takes in echo requests with the magic, once it is bound; not those that leave."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    magic = [int.from_bytes(PROBE_MAGIC[:4]), int.from_bytes(PROBE_MAGIC[4:])]
    program = [
        (0x20, 0, 0, 0xFFFFF004),  # A = packet type
        (0x15, 18, 0, 4),  # outgoing
        (0x28, 0, 0, 12),  # A = EtherType
        (0x15, 0, 5, _ETHER_TYPE[4]),
        (0x30, 0, 0, _ETHER + 9),  # A = protocol
        (0x15, 0, 14, _PROTOCOL[4]),
        (0xB1, 0, 0, _ETHER),  # X = length of the IP header
        (0x50, 0, 0, _ETHER),  # A = ICMP type, at X
        (0x15, 6, 11, _REQUEST[4]),
        (0x15, 0, 10, _ETHER_TYPE[6]),
        (0x30, 0, 0, _ETHER + 6),  # A = next header
        (0x15, 0, 8, _PROTOCOL[6]),
        (0x01, 0, 0, _HEADER[6]),
        (0x50, 0, 0, _ETHER),
        (0x15, 0, 5, _REQUEST[6]),
        (0x40, 0, 0, _ETHER + 8),  # A = word, at X
        (0x15, 0, 3, magic[0]),
        (0x40, 0, 0, _ETHER + 12),
        (0x15, 0, 1, magic[1]),
        (0x06, 0, 0, _SNAP),
        (0x06, 0, 0, 0),
    ]
    try:
        _prepare(sock, program)
        # the filter does it too, after a copy of each packet was made (Linux before 4.20)
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _prepare(sock: socket.socket, program: Sequence[Line]) -> None:
    """Attach a program, and have the kernel tell when it took a packet in."""
    attach(sock, program)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
