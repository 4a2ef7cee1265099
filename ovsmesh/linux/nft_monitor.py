"""A bell that rings when someone changes our filter tables, or Docker's FORWARD chain.

Knows: the netlink notifications of nf_tables, as far as telling whose table a message is about.
Imports nothing of ours; no library either, since a socket and a few struct formats are enough.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7
"""linux/netfilter/nfnetlink.h, as are the next three."""
NFNL_SUBSYS_NFTABLES = 10
_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33
_RECEIVE_BYTES = 4 << 20
"""A thousand new set elements are a thousand messages; charged only while they wait."""

_NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWGEN = 3, 5, 6, 8, 15
"""Message types of linux/netfilter/nf_tables.h."""
_FAMILIES = {1: "inet", 7: "bridge", 2: "iptables", 10: "ip6tables"}
"""NFPROTO_* → the tool whose rules stand there."""
EVERYTHING = frozenset(_FAMILIES.values())


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(body):
        size, kind = struct.unpack_from("=HH", body, at)
        if size < 4 or at + size > len(body):
            return
        yield kind & 0x3FFF, body[at + 4 : at + size]
        at += (size + 3) & ~3


def _about(kind: int, family: int, body: bytes, mark: bytes) -> str:
    """Whose rules a message is about: one of EVERYTHING, or "" for anyone else's."""
    tool = _FAMILIES.get(family, "")
    names = {1: b"", 2: b"", 3: b""}
    for number, value in _attributes(body):
        if number in names:
            names[number] = value.rstrip(b"\0")
    if tool in ("inet", "bridge"):
        return tool if names[1] == mark else ""
    if names[1] != b"filter":
        return ""
    if kind in (_NEWRULE, _DELRULE):
        return tool if names[2] == b"FORWARD" else ""
    if kind in (_NEWCHAIN, _DELCHAIN):
        return tool if names[3] == b"FORWARD" else ""
    return ""


def parse(data: bytes, mark: bytes) -> Iterator[str]:
    """The tools that a datagram's messages are about, and "." where a transaction ends.

    Never raises: what can't be understood is skipped, for others write into these tables too.
    """
    at = 0
    while at + 20 <= len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        if size < 20 or at + size > len(data):
            return
        if kind >> 8 == NFNL_SUBSYS_NFTABLES:
            if kind & 0xFF == _NEWGEN:
                yield "."
            else:
                tool = _about(kind & 0xFF, data[at + 16], data[at + 20 : at + size], mark)
                if tool:
                    yield tool
        at += (size + 3) & ~3


class Bell:
    """Notifications of nf_tables in this network namespace. Raises OSError where the kernel has none."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._open: set[str] = set()
        """Tools named since the last end of a transaction."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._socket.setblocking(False)
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def heard(self) -> list[frozenset[str]] | None:
        """The tools that each finished transaction touched (others' are left out); None: some were missed.

        The end of a transaction comes at once after its messages, so one that is still open rings later.
        """
        finished: list[frozenset[str]] = []
        missed = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except InterruptedError:
                continue
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                missed = True
                continue
            for word in parse(data, self._mark):
                if word != ".":
                    self._open.add(word)
                elif self._open:
                    finished.append(frozenset(self._open))
                    self._open.clear()
        return None if missed else finished
