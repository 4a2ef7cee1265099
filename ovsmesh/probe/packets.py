"""Probes as packets, and the sockets that send and receive them.

An echo request goes the way of the host's own packets, and a raw socket takes in its answer. A loop leaves through
kbr0 as a frame to the peer's MAC, as a pod's packet does once it is routed. It comes back on obr0, where a packet
socket reads it; the bridge throws it away behind that. Requests of peers are read there too. Where a peer's route back
takes smaller packets only, its kernel says so in an ICMP error: the loop has arrived there.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from ovsmesh.bpf import Line, attach
from ovsmesh.checksum import internet_checksum
from ovsmesh.mesh.types import IPAddress
from ovsmesh.names import KBR, OBR, PROBE_MAGIC
from ovsmesh.probe.targets import Target


class Astray(OSError):
    """Packets of this node's pods to the peer do not go to kbr0, wherever a probe goes."""


SHOWS_VERSION = 1
"""Flag in each probe: the filter of this version's agent treats loops as packets to its pods."""
MOST_PATHS = 1 << 15
"""Numbers that there are for paths: 15 bits. Above the flag's bit and below it are the 7 and 9 bits of an MTU."""
_LEAST_MTU = 576
"""Bytes. Agents before this one have other bits there, which look like less."""
BATCH = 64
"""Packets that are read at a time: a flood of them holds nobody up."""
_SNAP = 128
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
_TOO_BIG = {4: (3, 4), 6: (2, 0)}
"""Type and code of "fragmentation needed" and "packet too big". What is quoted begins 8 bytes behind."""
_BODY = struct.Struct("!BBHHH8s8sI")
"""ICMP header, then magic, token of the sending process, and flags with the sender's MTU and the number of the path."""

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
    mtu: int = 0
    """Of the sender's pods in bytes, 0 where it does not say."""
    too_big: bool = False
    """It is the word of a peer that got a loop, and may send back smaller packets only."""


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
        self._answers = select.poll()
        """Tells which raw sockets have something: mostly none has."""
        for sock in self._raw.values():
            self._answers.register(sock, select.POLLIN)
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
        packet = self._icmp(target, number, sequence, size)
        if version == 4:
            packet = _with_checksum(packet, packet[: _BODY.size])
            about = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, target.source.packed, bytes(4)))
        else:
            # the kernel fills in ICMPv6's checksum
            about = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, target.source.packed + struct.pack("=I", 0))
        self._raw[version].sendmsg([packet], [about], 0, (str(target.destination), 0))

    def send_loop(self, target: Target, number: int, sequence: int, size: int) -> None:
        """Send a packet through the tunnel that the peer forwards back.

        Raises OSError; Astray where this host would not send a pod's packet into the tunnel.
        """
        if where := self._astray(self._bridge, target.source, target.destination):
            raise Astray(0, f"this host sends them {where}")
        version, own = target.source.version, target.source.packed
        packet = self._icmp(target, number, sequence, size)
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

    def _icmp(self, target: Target, number: int, sequence: int, size: int) -> bytes:
        version, mtu = target.destination.version, min(target.size, 0xFFFF)
        flags = mtu >> 9 << 25 | SHOWS_VERSION << 24 | (mtu & 0x1FF) << 15 | number % MOST_PATHS
        body = _BODY.pack(_REQUEST[version], 0, 0, self._identifier, sequence, PROBE_MAGIC, self._token, flags)
        return body.ljust(size - _HEADER[version], b"\0")

    def receive(self) -> Iterator[Received]:
        """Yield what has come in; of a flood, only the first."""
        clocks = time.monotonic() - time.time()
        ready = {fd for fd, _ in self._answers.poll(0)}
        for version, sock in self._raw.items() if ready else ():
            for data, at, sender in _read(sock, clocks):
                body, too_big = data[(data[0] & 15) * 4 :] if version == 4 else data, False
                if body[:2] == bytes(_TOO_BIG[version]):
                    own, body, too_big = _quoted_loop(body[8:], version), body[8 + _HEADER[version] :], True
                    if not own:
                        continue
                yield from self._parse(body, at, ip_address(str(sender[0]).partition("%")[0]).packed, too_big)
        for data, at, _ in _read(self._in, clocks):
            packet = data[_ETHER:]
            if data[12:14] == b"\x08\x00":
                yield from self._parse(packet[(packet[0] & 15) * 4 :], at, packet[12:16])
            else:
                yield from self._parse(packet[40:], at, packet[8:24])

    def _parse(self, body: bytes, at: float, source: bytes, too_big: bool = False) -> Iterator[Received]:
        if len(body) >= _BODY.size and body[8:16] == PROBE_MAGIC:
            _, _, _, _, sequence, _, token, flags = _BODY.unpack_from(body)
            version, mtu = bool(flags >> 24 & SHOWS_VERSION), flags >> 25 << 9 | flags >> 15 & 0x1FF
            mtu = mtu if version and mtu >= _LEAST_MTU else 0
            yield Received(token == self._token, flags % MOST_PATHS, sequence, at, source, version, mtu, too_big)


def _quoted_loop(packet: bytes, version: int) -> bool:
    """Return whether what an ICMP error quotes is a loop, from an address to the same: it has arrived at the peer."""
    start, size = (12, 4) if version == 4 else (8, 16)
    return packet[start : start + size] == packet[start + size : start + 2 * size] != b""


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
    """Return a raw ICMP socket that takes in answers to this process, errors about its packets, and nothing else."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(family, kind, _PROTOCOL[version])
    try:
        # an IPv4 raw socket's program sees the IP header too, an IPv6 one's does not (socket(7), ipv6(7))
        header = [(0xB1, 0, 0, 0)] if version == 4 else [(0x01, 0, 0, 0)]
        type_, code = _TOO_BIG[version]
        answers = [
            (0x50, 0, 0, 0),  # A = byte at X
            (0x15, 5, 0, _REPLY[version]),
            (0x15, 0, 7, type_),
            (0x50, 0, 0, 1),
            (0x15, 0, 5, code),
            (0x48, 0, 0, 8 + _HEADER[version] + 4),  # A = half word, in the quoted packet
            (0x05, 0, 0, 1),
            (0x48, 0, 0, 4),  # A = half word at X+4
            (0x15, 0, 1, identifier),
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
