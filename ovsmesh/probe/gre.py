"""Send one GRE packet to each tunnel address, and learn from ICMP errors whether it arrives.

The packet changes nothing: it carries an Ethernet frame of a type for local experiments (IEEE 802, 0x88b5), which
nobody forwards.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from collections.abc import Iterable

_GRE = 47
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_ORIGIN_ICMP = (2, 3)
"""SO_EE_ORIGIN_ ICMP, ICMP6."""
_PROHIBITED = {(2, 3, 9), (2, 3, 10), (2, 3, 13), (3, 1, 1), (3, 1, 5), (3, 1, 6)}
"""(origin, type, code) of the answers of a filter."""
_NO_PROTOCOL = {(2, 3, 2), (3, 4, 1)}
"""Protocol unreachable: the packet arrived, and no tunnel takes GRE there yet."""
_PACKET = struct.pack("!HH6s6sH46x", 0, 0x6558, bytes(6), bytes(6), 0x88B5)

ARRIVES, REFUSED, SILENT = "arrives", "refused", "silent"


def probe(local: str, remotes: Iterable[str], wait: float = 1.0) -> dict[str, tuple[str, str]]:
    """Return, for each remote tunnel address, what became of a GRE packet to it, and the reason.

    What became of it is ARRIVES, REFUSED or SILENT. SILENT says nothing: a peer whose tunnel is up takes the packet
    without an answer, as a filter may do. `wait` is in seconds, for all.
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
                sock.send(_PACKET)
            except OSError as error:
                why = "a filter of this host drops it" if error.errno == errno.EPERM else error.strerror
                found[remote] = (REFUSED, f"can't be sent: {why}")
                del waiting[sock.fileno()]
                sock.close()
        _read_errors(waiting, found, time.monotonic() + wait)
    finally:
        for _, sock in waiting.values():
            sock.close()
    return found


def _read_errors(waiting: dict[int, tuple[str, socket.socket]], found: dict[str, tuple[str, str]], end: float) -> None:
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
                if (origin, kind, code) in _NO_PROTOCOL:
                    found[remote] = (ARRIVES, "it arrives")
                elif (origin, kind, code) in _PROHIBITED:
                    found[remote] = (REFUSED, "a filter on the way answers that it is prohibited")
                elif origin in _ORIGIN_ICMP:
                    found[remote] = (SILENT, f"ICMP says unreachable (type {kind}, code {code})")
                poll.unregister(fd)
                left.discard(fd)
                break
