"""Send echo requests from wherever a socket was opened, and take in what comes back: answers and ICMP errors."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from ovsmesh.checksum import internet_checksum
from ovsmesh.mesh.types import IPAddress
from ovsmesh.trace.types import EchoFound

SMALL = 84
"""Bytes of a small packet: as ping sends them."""
TOKEN = 8
"""Bytes at the beginning of the data by which a packet of the trace is known everywhere; the last one is the phase."""
_REQUEST = {4: 8, 6: 128}
_REPLY = {4: 0, 6: 129}
_ERRORS = {
    (4, 3, 0): "network unreachable",
    (4, 3, 1): "host unreachable",
    (4, 3, 3): "port unreachable",
    (4, 3, 4): "fragmentation needed",
    (4, 3, 9): "prohibited by a filter",
    (4, 3, 10): "prohibited by a filter",
    (4, 3, 13): "prohibited by a filter",
    (4, 11, 0): "time exceeded: a routing loop",
    (6, 1, 0): "no route",
    (6, 1, 1): "prohibited by a filter",
    (6, 1, 3): "host unreachable",
    (6, 1, 4): "port unreachable",
    (6, 1, 5): "prohibited by a filter",
    (6, 1, 6): "prohibited by a route",
    (6, 2, 0): "fragmentation needed",
    (6, 3, 0): "time exceeded: a routing loop",
}
_ERROR_TYPES = {4: (3, 11, 12), 6: (1, 2, 3, 4)}
_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
_PMTUDISC_PROBE = 3
_IPV6_HDRINCL = 36
_IP_HEADER = {4: 20, 6: 40}


def new_token() -> bytes:
    """Return what marks the packets of one trace; the phase is appended to it."""
    return os.urandom(TOKEN - 1)


def icmp_socket(version: int, source: IPAddress | None = None) -> socket.socket:
    """Return a raw ICMP socket in the calling thread's namespace. Raises OSError."""
    family, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(*_MTU_DISCOVER[version], _PMTUDISC_PROBE)
        if source is not None:
            sock.bind((str(source), 0))
    except OSError:
        sock.close()
        raise
    return sock


class Echo:
    """Echo requests to one address, and what came back."""

    def __init__(
        self, sock: socket.socket, target: IPAddress, token: bytes, forged: IPAddress | None = None, phase: int = 0
    ) -> None:
        """`forged`: the source that is written into the packets. What answers it gets does not come here."""
        self.sock, self.target, self.version = sock, target, target.version
        self._token, self._forged = token + bytes([phase]), forged
        self._identifier = int.from_bytes(os.urandom(2))
        self._sent_at: dict[int, float] = {}
        self._answered: dict[int, float] = {}
        self._errors: dict[str, None] = {}
        self._refused = ""
        self.size = 0

    @classmethod
    def forging(cls, source: IPAddress, target: IPAddress, token: bytes, phase: int = 0) -> Echo:
        """Return one that writes any source address into its packets. Raises OSError."""
        family, level, option = (
            (socket.AF_INET, socket.IPPROTO_IP, socket.IP_HDRINCL)
            if target.version == 4
            else (socket.AF_INET6, socket.IPPROTO_IPV6, _IPV6_HDRINCL)
        )
        sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
        try:
            sock.setsockopt(level, option, 1)
        except OSError:
            sock.close()
            raise
        return cls(sock, target, token, source, phase)

    @property
    def answered(self) -> int:
        """How many were answered."""
        return len(self._answered)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be waited for: all were answered, or an error says why they were not."""
        return bool(self._refused or self._errors) or len(self._answered) == len(self._sent_at)

    def found(self) -> EchoFound:
        """Return what became of them."""
        times = [at - self._sent_at[sequence] for sequence, at in self._answered.items()]
        return EchoFound(
            len(self._sent_at), self.answered, self.size, tuple(self._errors), self._refused, min(times, default=None)
        )

    def send(self, size: int) -> None:
        """Send a request whose IP packet has `size` bytes."""
        self.size = size
        sequence = len(self._sent_at) + 1
        data = self._token.ljust(max(TOKEN, size - _IP_HEADER[self.version] - 8), b"\0")
        body = struct.pack("!BBHHH", _REQUEST[self.version], 0, 0, self._identifier, sequence) + data
        if self.version == 4 or self._forged:
            pseudo = b""
            if self.version == 6 and self._forged:
                pseudo = self._forged.packed + self.target.packed + struct.pack("!IxxxB", len(body), 58)
            body = body[:2] + struct.pack("!H", internet_checksum(pseudo + body)) + body[4:]
        packet = self._header(len(body)) + body
        try:
            self.sock.sendto(packet, (str(self.target), 0))
            self._sent_at[sequence] = time.monotonic()
        except OSError as error:
            words = {errno.EPERM: "a filter drops it", errno.EMSGSIZE: "it is larger than the link's MTU"}
            self._refused = words.get(error.errno or 0, error.strerror or str(error)).lower()

    def _header(self, length: int) -> bytes:
        if self._forged is None:
            return b""
        if self.version == 4:
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 1, 0)
        else:
            head = struct.pack("!IHBB", 6 << 28, length, 58, 64)
        return head + self._forged.packed + self.target.packed

    def receive(self) -> None:
        """Read all that waits."""
        while True:
            try:
                data, sender = self.sock.recvfrom(2048)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # an ICMP error that the kernel hands over in place of a packet
                if error.errno in (errno.EAGAIN, errno.EBADF):
                    return
                continue
            body = data[(data[0] & 15) * 4 :] if self.version == 4 and data else data
            if len(body) >= 8:
                self._take(body, str(sender[0]).partition("%")[0])

    def _take(self, body: bytes, sender: str) -> None:
        if body[0] == _REPLY[self.version] and body[8 : 8 + TOKEN] == self._token:
            sequence = int.from_bytes(body[6:8])
            if sequence in self._sent_at and ip_address(sender) == self.target:
                self._answered.setdefault(sequence, time.monotonic())
        elif body[0] in _ERROR_TYPES[self.version] and len(body) > 8 + _IP_HEADER[self.version]:
            quoted = body[8:]
            inner = quoted[(quoted[0] & 15) * 4 :] if self.version == 4 else quoted[40:]
            if inner[:1] == bytes([_REQUEST[self.version]]) and inner[4:6] == struct.pack("!H", self._identifier):
                kind = (self.version, body[0], body[1])
                text = _ERRORS.get(kind, f"ICMP type {body[0]} code {body[1]}")
                if text == "fragmentation needed":
                    text += f", MTU {int.from_bytes(body[4:8] if self.version == 6 else body[6:8])}"
                self._errors.setdefault(f"{sender}: {text}")

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def exchange(
    echoes: Sequence[tuple[Echo, int, int]],
    gap: float,
    patience: Callable[[float], bool],
    others: Callable[[], None],
    fds: Sequence[int] = (),
) -> None:
    """Send (echo, how many, size) and read until `patience`, given the seconds since the last was sent, says no more.

    `others` is called whenever one of `fds` is readable.
    """
    left = {echo: count for echo, count, _ in echoes}
    sockets = {echo.sock.fileno(): echo for echo, _, _ in echoes}
    start = time.monotonic()
    due = start
    last = start
    while True:
        now = time.monotonic()
        if any(left.values()) and now >= due:
            for echo, _, size in echoes:
                if left[echo]:
                    echo.send(size)
                    left[echo] -= 1
            due, last = now + gap, now
        sending = any(left.values())
        if not sending and not patience(now - last):
            break
        poll = select.poll()
        for fd in (*sockets, *fds):
            poll.register(fd, select.POLLIN)
        pause = due - now if sending else 0.05
        for fd, _ in poll.poll(max(1.0, pause * 1000)):
            if fd in sockets:
                with contextlib.suppress(OSError):
                    sockets[fd].receive()
            else:
                others()
