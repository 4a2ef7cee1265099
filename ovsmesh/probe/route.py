"""Ask the kernel where it would send a pod's packet: a probe is put on kbr0 itself, so no routing rule can stray it."""

from __future__ import annotations

import errno
import os
import socket
import struct
from ipaddress import ip_address

from ovsmesh.mesh.types import IPAddress

_GET_ROUTE, _ROUTE, _ERROR = 26, 24, 2
_REQUEST = 1
_DST, _SRC, _IIF, _OIF = 1, 2, 3, 4
_UNICAST = 1
_HEAD, _BODY = struct.Struct("=IHHII"), struct.Struct("=BBBBBBBBI")


class RouteLookup:
    """A netlink socket for lookups. Raises OSError without one."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        # the kernel has answered when a request is sent
        self._socket.setblocking(False)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def astray(self, bridge: int, gateway: IPAddress, destination: IPAddress) -> str:
        """Return where packets go that pods of this node send to a peer, if not to kbr0; "" where all is well.

        `bridge` is kbr0's number, `gateway` this node's, `destination` the peer's. Also "" where the kernel can't be
        asked.
        """
        try:
            kind, link, error = self._ask(ip_address(int(gateway) + 1), destination, bridge)
            if error:
                # what a policy rule or a route refuses, and what a kernel says that does not forward
                refused = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EINVAL)
                return f"nowhere ({os.strerror(error)})" if error in refused else ""
            if kind != _UNICAST:
                return "nowhere (a route or a rule refuses them)"
            return "" if link in (bridge, 0) else f"to {socket.if_indextoname(link)}"
        except OSError:
            return ""

    def _ask(self, source: IPAddress, destination: IPAddress, link: int) -> tuple[int, int, int]:
        """Return the route's type and outgoing link, and the error that the kernel gave instead."""
        family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
        bits = destination.max_prefixlen
        body = _BODY.pack(family, bits, bits, 0, 0, 0, 0, 0, 0)
        attributes = ((_DST, destination.packed), (_SRC, source.packed), (_IIF, struct.pack("=I", link)))
        body += b"".join(struct.pack("=HH", 4 + len(value), name) + value for name, value in attributes)
        self._sequence += 1
        self._socket.send(_HEAD.pack(_HEAD.size + len(body), _GET_ROUTE, _REQUEST, self._sequence, 0) + body)
        while True:
            answer = self._socket.recv(8192)
            _, what, _, sequence, _ = _HEAD.unpack_from(answer)
            if sequence == self._sequence:
                break
        if what == _ERROR:
            return 0, 0, -int(struct.unpack_from("=i", answer, _HEAD.size)[0])
        kind, at, out = _BODY.unpack_from(answer, _HEAD.size)[7], _HEAD.size + _BODY.size, 0
        while what == _ROUTE and at + 4 <= len(answer):
            length, name = struct.unpack_from("=HH", answer, at)
            if name == _OIF:
                out = int(struct.unpack_from("=I", answer, at + 4)[0])
            at += max(4, (length + 3) & ~3)
        return kind, out, 0
