"""Does a packet get through? One GRE packet to a tunnel address, one ping to a gateway, all at once.

Knows: raw sockets and what their errors mean. A probe changes nothing: the GRE packet carries an
Ethernet frame of a type for local experiments (IEEE 802, 0x88b5), which nobody forwards.
Imports model only.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from ipaddress import ip_address

from ovsmesh.checksum import internet_checksum

_GRE = 47
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_ORIGIN_ICMP = (2, 3)
"""SO_EE_ORIGIN_ ICMP, ICMP6."""
_PROHIBITED = {(2, 3, 9), (2, 3, 10), (2, 3, 13), (3, 1, 1), (3, 1, 5), (3, 1, 6)}
"""(origin, type, code) that a filter answers with."""
_UNWANTED = {(2, 3, 2), (3, 4, 1)}
"""Protocol unreachable: it arrived, and nothing there takes GRE as yet."""
_FRAME = struct.pack("!HH6s6sH46x", 0, 0x6558, bytes(6), bytes(6), 0x88B5)

ARRIVES, REFUSED, SILENT = "arrives", "refused", "silent"


def gre(local: str, remotes: Iterable[str], wait: float = 1.0) -> dict[str, tuple[str, str]]:
    """Tunnel address → what became of a GRE packet to it (one of the words above), and why.

    Silence says nothing: a peer whose tunnel is up takes the packet without a word, as a filter does.
    """
    found: dict[str, tuple[str, str]] = {}
    waiting: dict[int, tuple[str, socket.socket]] = {}
    try:
        for remote in remotes:
            found[remote] = (SILENT, "no answer, which says nothing either way")
            v6 = ":" in remote
            sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW, _GRE)
            waiting[sock.fileno()] = (remote, sock)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP, _IPV6_RECVERR if v6 else _IP_RECVERR, 1)
            try:
                sock.bind((local, 0))
                sock.connect((remote, 0))
                sock.send(_FRAME)
            except OSError as error:
                why = "a filter of this host drops it" if error.errno == errno.EPERM else error.strerror
                found[remote] = (REFUSED, f"can't be sent: {why}")
                del waiting[sock.fileno()]
                sock.close()
        _errors(waiting, found, time.monotonic() + wait)
    finally:
        for _, sock in waiting.values():
            sock.close()
    return found


def _errors(waiting: dict[int, tuple[str, socket.socket]], found: dict[str, tuple[str, str]], end: float) -> None:
    poll = select.poll()
    left = set(waiting)
    for fd in waiting:
        poll.register(fd, 0)
    while left and (rest := end - time.monotonic()) > 0:
        for fd, _ in poll.poll(rest * 1000):
            remote, sock = waiting[fd]
            try:
                _, ancillary, _, _ = sock.recvmsg(2048, 512, socket.MSG_ERRQUEUE)
            except OSError:
                continue
            for _, _, data in ancillary:
                if len(data) < 16:
                    continue
                _, origin, kind, code = struct.unpack_from("=IBBB", data)
                if (origin, kind, code) in _UNWANTED:
                    found[remote] = (ARRIVES, "it arrives")
                elif (origin, kind, code) in _PROHIBITED:
                    found[remote] = (REFUSED, "a filter on the way answers that it is prohibited")
                elif origin in _ORIGIN_ICMP:
                    found[remote] = (SILENT, f"ICMP says unreachable (type {kind}, code {code})")
                poll.unregister(fd)
                left.discard(fd)
                break


def ping(addresses: Iterable[str], wait: float = 2.0) -> dict[str, float | None]:
    """Address → milliseconds until it answered, None where it did not within `wait` seconds."""
    found: dict[str, float | None] = dict.fromkeys(addresses)
    mark = os.urandom(8)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as four,
        _six() as six,
    ):
        for sock in (four, six):
            sock.setblocking(False)
        end = time.monotonic() + wait
        sent: dict[str, float] = {}
        again = 0.0
        while any(ms is None for ms in found.values()) and (now := time.monotonic()) < end:
            if now >= again:
                # the first packet of a tunnel may be lost while its remote's MAC is learned
                again = now + 0.5
                for address in [a for a, ms in found.items() if ms is None]:
                    sent[address] = now
                    _echo(six if ":" in address else four, address, mark)
            readable, _, _ = select.select([four, six], [], [], max(0.0, min(again, end) - time.monotonic()))
            for sock in readable:
                data, sender = sock.recvfrom(2048)
                address = str(ip_address(str(sender[0]).partition("%")[0]))
                body = data[(data[0] & 15) * 4 :] if sock is four else data
                answered = body[:1] in (b"\0", b"\x81") and body[8:16] == mark
                if answered and found.get(address, 0.0) is None:
                    found[address] = (time.monotonic() - sent[address]) * 1000
    return found


def _six() -> socket.socket:
    """A raw ICMPv6 socket; where the kernel has no IPv6, one that nothing is sent through."""
    try:
        return socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _echo(sock: socket.socket, address: str, mark: bytes) -> None:
    """Sends an echo request; one that can't be sent is one without an answer."""
    kind = 128 if ":" in address else 8
    packet = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, 1) + mark
    try:
        # the kernel fills ICMPv6's in by itself
        sock.sendto(packet[:2] + struct.pack("!H", internet_checksum(packet)) + packet[4:], (address, 0))
    except OSError:
        return
