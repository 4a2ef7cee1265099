"""A netlink socket: requests with their replies, batches of changes, and notifications.

It handles message headers and attributes (<linux/netlink.h>), and knows no protocol on top of them.
It numbers the messages that it sends.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from ovsmesh.bpf import Line, attach

ROUTE, XFRM, NETFILTER, GENERIC = 0, 6, 12, 16
"""NETLINK_ protocols."""
ERROR, DONE, OVERRUN = 2, 3, 4
"""NLMSG_ types. `notifications` yields OVERRUN where the kernel dropped some."""
_ACK, _MULTI, _DUMP_INTERRUPTED = 0x4, 0x2, 0x10
_SOL_NETLINK, _ADD_MEMBERSHIP, _SO_RCVBUFFORCE = 270, 1, 33
_READ_BYTES = 1 << 18
_BATCH = 128
"""Messages sent before their errors are read: 128 errors fit the receive buffer."""
_TIMEOUT = 10.0
"""Seconds to wait for the kernel's answer."""

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_I32 = struct.Struct("=i")
_U16 = struct.Struct("=H")
_FLAGS_OFFSET, _SEQUENCE_OFFSET = 6, 8


class NetlinkError(OSError):
    """The kernel refused a request."""


class Message(NamedTuple):
    """A netlink message: its type, flags, sequence number and payload.

    `sender` is the port of the socket whose request it tells of, mostly the process id of its owner; 0 for the kernel.
    """

    type: int
    flags: int
    seq: int
    payload: memoryview
    sender: int = 0


def messages(data: bytes) -> Iterator[Message]:
    """Split what one read of a netlink socket returned; stop at the first malformed header."""
    view = memoryview(data)
    at = 0
    while at + 16 <= len(view):
        length, kind, flags, seq, sender = _HEADER.unpack_from(view, at)
        if length < 16 or at + length > len(view):
            return
        yield Message(kind, flags, seq, view[at + 16 : at + length], sender)
        at += (length + 3) & ~3


def attributes(view: memoryview, at: int = 0) -> dict[int, bytes]:
    """Return the attributes that begin at an offset, by type; stop at the first malformed one."""
    found = {}
    end = len(view)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(view, at)
        if length < 4 or at + length > end:
            break
        found[kind & 0x3FFF] = bytes(view[at + 4 : at + length])
        at += (length + 3) & ~3
    return found


def error_code(message: Message) -> int:
    """Return the errno of an ERROR message, 0 for an acknowledgement."""
    return -int(_I32.unpack_from(message.payload)[0])


class NetlinkSocket:
    """A socket in the calling thread's network namespace. Not thread-safe."""

    def __init__(
        self, protocol: int, groups: Collection[int] = (), buffer: int = 8 << 20, bpf: Sequence[Line] = ()
    ) -> None:
        """Open the socket for requests or, with multicast groups, for their notifications.

        `buffer`: how many bytes of messages may wait; memory is used only while they do. `bpf`: a program that
        returns 0 for each message that the kernel is to leave out.
        Raise OSError where the kernel has no such protocol or group, or does not permit it.
        """
        self._seq = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.settimeout(0 if groups else _TIMEOUT)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            if bpf:
                attach(self._socket, bpf)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the file descriptor. It is readable while notifications wait."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """The port of this socket, which is the sender of what it asks for."""
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def notifications(self) -> Iterator[Message]:
        """Yield the messages that wait, and an OVERRUN where the kernel dropped some."""
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield Message(OVERRUN, 0, 0, memoryview(b""))
            else:
                yield from messages(data)

    def discard(self) -> bool:
        """Throw away the notifications that wait. Return whether there were any, or the kernel has dropped some."""
        found = False
        while True:
            try:
                self._socket.recv(1)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            found = True

    def request(self, message: bytes, take: Callable[[Message], None]) -> bool:
        """Send a request and hand each reply to `take`; return False if a dump is not consistent.

        Raise NetlinkError if the kernel refuses, TimeoutError if it does not answer.
        """
        first = self._send([message])
        consistent = True
        while True:
            for reply in messages(self._socket.recv(_READ_BYTES)):
                if reply.seq != first:
                    continue
                consistent &= not reply.flags & _DUMP_INTERRUPTED
                if reply.type == ERROR and (code := error_code(reply)):
                    raise NetlinkError(code, os.strerror(code))
                if reply.type in (DONE, ERROR):
                    return consistent
                take(reply)
                if not reply.flags & _MULTI:
                    return consistent

    def ask(self, batch: Sequence[bytes]) -> list[Message | None]:
        """Send requests that have one reply each; return the replies in order, None for what the kernel refused.

        Raise TimeoutError if the kernel does not answer.
        """
        found: list[Message | None] = [None] * len(batch)
        for start in range(0, len(batch), _BATCH):
            some = batch[start : start + _BATCH]
            first, waiting = self._send(some), len(some)
            while waiting:
                for reply in messages(self._socket.recv(_READ_BYTES)):
                    if first <= reply.seq <= self._seq:
                        waiting -= 1
                        if reply.type != ERROR:
                            found[start + reply.seq - first] = reply
        return found

    def change(self, batch: Sequence[bytes]) -> dict[int, int]:
        """Send messages in order; return position → errno for each that the kernel refused.

        Raise TimeoutError if the kernel does not answer.
        """
        refused: dict[int, int] = {}
        for start in range(0, len(batch), _BATCH):
            some = batch[start : start + _BATCH]
            first = self._send(some, _ACK)
            waiting = True
            while waiting:
                for reply in messages(self._socket.recv(_READ_BYTES)):
                    if reply.type != ERROR or not first <= reply.seq <= self._seq:
                        continue
                    if code := error_code(reply):
                        refused[start + reply.seq - first] = code
                    waiting &= reply.seq != self._seq
        return refused

    def transaction(self, batch: Sequence[bytes]) -> dict[int, int]:
        """Send one transaction of nf_tables, from its begin to its end; return position → errno for what was refused.

        All of it is done, or nothing. Raise TimeoutError if the kernel does not answer.
        """
        some = [bytearray(message) for message in batch]
        _U16.pack_into(some[-2], _FLAGS_OFFSET, _U16.unpack_from(some[-2], _FLAGS_OFFSET)[0] | _ACK)
        refused: dict[int, int] = {}
        first = self._send(some)
        while True:
            for reply in messages(self._socket.recv(_READ_BYTES)):
                if reply.type != ERROR or not first <= reply.seq <= self._seq:
                    continue
                if code := error_code(reply):
                    refused[reply.seq - first] = code
                # without the subsystem the begin is what is refused, and nothing else is answered
                if reply.seq >= self._seq - 1 or reply.seq == first:
                    return refused

    def _send(self, some: Sequence[bytes | bytearray], flags: int = 0) -> int:
        """Send messages, each padded to four bytes, as one; return the sequence number of the first.

        `flags` are added to those of the last message.
        """
        data = bytearray().join(some)
        first = self._seq + 1
        at = last = 0
        for message in some:
            self._seq += 1
            _U32.pack_into(data, at + _SEQUENCE_OFFSET, self._seq)
            last, at = at, at + len(message)
        _U16.pack_into(data, last + _FLAGS_OFFSET, _U16.unpack_from(data, last + _FLAGS_OFFSET)[0] | flags)
        self._socket.send(data)
        return first
