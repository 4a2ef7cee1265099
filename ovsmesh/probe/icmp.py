"""Send ICMP echo requests and time the answers."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from ipaddress import ip_address

from ovsmesh.checksum import internet_checksum

_AGAIN = 0.5
"""Seconds between two requests: the first packet of a tunnel may be lost while its remote's MAC is learned."""
_ECHO = {4: 8, 6: 128}
_REPLY = {4: 0, 6: 129}
"""ICMP types by IP version."""


def ping(addresses: Iterable[str], wait: float = 2.0) -> dict[str, float | None]:
    """Return the milliseconds until each address answered; None where it did not within `wait` seconds."""
    found: dict[str, float | None] = dict.fromkeys(addresses)
    mark = os.urandom(8)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as four,
        _ipv6_socket() as six,
    ):
        for sock in (four, six):
            sock.setblocking(False)
        end = time.monotonic() + wait
        sent: dict[str, float] = {}
        again = 0.0
        while any(ms is None for ms in found.values()) and (now := time.monotonic()) < end:
            if now >= again:
                again = now + _AGAIN
                for address in [a for a, ms in found.items() if ms is None]:
                    sent[address] = now
                    _send_echo(six if ":" in address else four, address, mark)
            readable, _, _ = select.select([four, six], [], [], max(0.0, min(again, end) - time.monotonic()))
            for sock in readable:
                data, sender = sock.recvfrom(2048)
                source = ip_address(str(sender[0]).partition("%")[0])
                body = data[(data[0] & 15) * 4 :] if sock is four else data
                answered = body[:1] == bytes([_REPLY[source.version]]) and body[8:16] == mark
                if answered and found.get(str(source), 0.0) is None:
                    found[str(source)] = (time.monotonic() - sent[str(source)]) * 1000
    return found


def _ipv6_socket() -> socket.socket:
    """Return a raw ICMPv6 socket; where the kernel has no IPv6, a socket on which nothing can be sent."""
    try:
        return socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _send_echo(sock: socket.socket, address: str, mark: bytes) -> None:
    """Send an echo request. One that cannot be sent is one without an answer."""
    packet = struct.pack("!BBHHH", _ECHO[ip_address(address).version], 0, 0, os.getpid() & 0xFFFF, 1) + mark
    try:
        # the kernel fills in the checksum of ICMPv6 itself
        sock.sendto(packet[:2] + struct.pack("!H", internet_checksum(packet)) + packet[4:], (address, 0))
    except OSError:
        return
