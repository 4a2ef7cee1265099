"""ICMP echo packets between many network namespaces from one process, timed by the kernel.

A send is stamped just before the system call, a receipt by the kernel (SO_TIMESTAMPNS), both on CLOCK_REALTIME.
So a round trip does not depend on when this process reads the answer.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import TracebackType
from typing import NamedTuple

from ovsmesh.checksum import internet_checksum
from ovsmesh.lab.netns import LabError, within

_SO_TIMESTAMPNS = 35
_SOL_RAW = 255
_ICMP_FILTER = 1
_ICMP6_FILTER = 1
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_PMTUDISC_PROBE = 3
"""Set DF, and send the packet whatever path MTU the sender's kernel has recorded."""
_REPLY = {socket.AF_INET: 0, socket.AF_INET6: 129}
_REFUSALS = {socket.AF_INET: (3, 11), socket.AF_INET6: (1, 2, 3)}
_MARK = b"ovsm"
_BODY = struct.Struct("!4sIII")
HEADERS = {4: 28, 6: 48}
"""Bytes of IP and ICMP header around an echo's data, by IP version."""
_RECEIVE_BUFFER = 1 << 20


class Pair(NamedTuple):
    """Who pings whom: the source's namespace, the target's address, and a name of each to show."""

    ns: str
    address: str
    source: str
    target: str


@dataclass(slots=True)
class Track:
    """What became of the packets of one pair. Times are seconds of CLOCK_REALTIME."""

    pair: Pair
    sent: list[float] = field(default_factory=list)
    received: dict[int, float] = field(default_factory=dict)
    duplicates: int = 0
    strays: int = 0
    """Answers that came from another address than the target's."""
    refused: dict[int, float] = field(default_factory=dict)
    """Number of a packet → when an ICMP error came back for it, or the send failed."""
    errors: Counter[str] = field(default_factory=Counter)
    """Errors of the send itself."""

    @property
    def lost(self) -> int:
        """How many packets were not answered."""
        return len(self.sent) - len(self.received)

    @property
    def rtts(self) -> list[float]:
        """The round trips in ms, in the order of sending."""
        return [(self.received[n] - self.sent[n]) * 1000 for n in sorted(self.received)]

    @property
    def rtt(self) -> float | None:
        """The median round trip in ms; None when nothing came back."""
        return statistics.median(self.rtts) if self.received else None

    def outages(self, since: float = 0.0) -> list[Outage]:
        """Return each run of consecutive lost packets among those sent at or after `since`."""
        found: list[Outage] = []
        first: int | None = None
        for number, at in enumerate(self.sent):
            if at < since:
                continue
            if number not in self.received:
                first = number if first is None else first
            elif first is not None:
                found.append(Outage(self.sent[first], at, number - first, True))
                first = None
        if first is not None:
            found.append(Outage(self.sent[first], self.sent[-1], len(self.sent) - first, False))
        return found

    def answered_since(self, at: float, run: int = 1) -> bool:
        """Return whether `run` packets in a row, all sent at or after `at`, were answered."""
        streak = 0
        for number in range(len(self.sent) - 1, -1, -1):
            if self.sent[number] < at:
                return False
            streak = streak + 1 if number in self.received else 0
            if streak >= run:
                return True
        return False


class Outage(NamedTuple):
    """The time from sending the first lost packet to sending the next one that was answered."""

    start: float
    end: float
    lost: int
    over: bool

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.end - self.start


class _Endpoint:
    """One raw socket in a namespace, for one address family."""

    def __init__(self, ns: str, version: int, df: bool) -> None:
        self.family = socket.AF_INET if version == 4 else socket.AF_INET6
        self.id = int.from_bytes(os.urandom(2), "big")
        self.socket = within(ns, lambda: self._open(df))

    def _open(self, df: bool) -> socket.socket:
        six = self.family == socket.AF_INET6
        sock = socket.socket(self.family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP)
        passed = (_REPLY[self.family], *_REFUSALS[self.family])
        if six:
            bits = (1 << 256) - 1 - sum(1 << kind for kind in passed)
            words = struct.pack("=8I", *(bits >> 32 * n & 0xFFFFFFFF for n in range(8)))
            sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, words)
        else:
            blocked = 0xFFFFFFFF - sum(1 << kind for kind in passed)
            sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", blocked))
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        if df:
            level, name = (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER) if six else (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
            sock.setsockopt(level, name, _PMTUDISC_PROBE)
        sock.setblocking(False)
        return sock

    def echo(self, body: bytes, number: int) -> bytes:
        """Return an echo request. The kernel fills in the checksum of ICMPv6."""
        if self.family == socket.AF_INET6:
            return struct.pack("!BBHHH", 128, 0, 0, self.id, number & 0xFFFF) + body
        packet = struct.pack("!BBHHH", 8, 0, 0, self.id, number & 0xFFFF) + body
        return packet[:2] + struct.pack("!H", internet_checksum(packet)) + packet[4:]


class Prober:
    """Sends echo requests for each pair in turn and records what comes back.

    Ends when its context does, or after `count` packets for each pair. `interval` is in seconds between two packets
    of one pair; the pairs are spread evenly over it, and late packets are not sent in a burst. `size` is the bytes
    of the IP packet, 0 for the least. `df` sets "don't fragment". The last answers are awaited for `grace` seconds.
    Use it as a context manager for a stream in the background, or call `run()`.
    Raises LabError when a namespace is missing or the user is not root.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        interval: float,
        count: int | None = None,
        size: int = 0,
        df: bool = False,
        grace: float = 1.0,
    ) -> None:
        self.tracks = [Track(pair) for pair in pairs]
        self._gap = interval / max(1, len(pairs))
        self._count, self._grace, self._size = count, grace, size
        self._run = int.from_bytes(os.urandom(4), "big")
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="prober", daemon=True)
        self._epoll = select.epoll()
        self._endpoints: dict[tuple[str, int], _Endpoint] = {}
        self._by_fd: dict[int, _Endpoint] = {}
        self._closing = ExitStack()
        self._closing.callback(self._epoll.close)
        self._addresses = [ip_address(pair.address) for pair in pairs]
        self._targets = [str(address) for address in self._addresses]
        try:
            self._sources = [self._endpoint(p.ns, a.version, df) for p, a in zip(pairs, self._addresses, strict=True)]
        except PermissionError as error:
            self._closing.close()
            raise LabError("pinging from inside a namespace needs root; run it with sudo") from error
        except (OSError, LabError):
            self._closing.close()
            raise

    def _endpoint(self, ns: str, version: int, df: bool) -> _Endpoint:
        if (known := self._endpoints.get((ns, version))) is None:
            known = self._endpoints[ns, version] = _Endpoint(ns, version, df)
            self._closing.callback(known.socket.close)
            self._by_fd[known.socket.fileno()] = known
            self._epoll.register(known.socket.fileno(), select.EPOLLIN)
        return known

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def run(self) -> list[Track]:
        """Send `count` packets for each pair, await the answers and return what became of them."""
        with self:
            self._thread.join()
        return self.tracks

    def wait(self, since: float, timeout: float, run: int = 3) -> bool:
        """Wait until each pair has `run` answers in a row to packets sent after `since`.

        `since` is in seconds of CLOCK_REALTIME, `timeout` in seconds. Returns False when time ran out.
        """
        return self._wait(lambda track: track.answered_since(since, run), timeout)

    def wait_refused(self, since: float, timeout: float) -> bool:
        """Wait until each pair had an ICMP error, or an error of the send, for a packet sent after `since`."""
        return self._wait(lambda track: any(track.sent[number] >= since for number in track.refused), timeout)

    def _wait(self, done: Callable[[Track], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: all(map(done, self.tracks)), timeout)

    def _loop(self) -> None:
        with self._closing:
            due, number, pairs = time.monotonic(), 0, len(self.tracks)
            total = None if self._count is None else self._count * pairs
            while pairs and not self._stop.is_set() and (total is None or number < total):
                # the kernel stamps receipts, so it is enough to read them between two sends
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(due + self._gap, time.monotonic())
                self._send(number % pairs)
                number += 1
                self._drain(0)
            self._await_last()

    def _await_last(self) -> None:
        """Wait for each unanswered packet until `grace` seconds after it was sent."""
        out = [(t, n) for t in self.tracks for n in range(len(t.sent)) if n not in t.received and n not in t.refused]
        while out := [(t, n) for t, n in out if n not in t.received and n not in t.refused]:
            left = max(t.sent[n] for t, n in out) + self._grace - time.time()
            if left <= 0:
                return
            self._drain(left)

    def _send(self, index: int) -> None:
        track, source = self.tracks[index], self._sources[index]
        number = len(track.sent)
        body = _BODY.pack(_MARK, self._run, index, number)
        body += bytes(max(0, self._size - HEADERS[self._addresses[index].version] - len(body)))
        packet = source.echo(body, number)
        track.sent.append(time.time())
        try:
            source.socket.sendto(packet, (self._targets[index], 0))
        except OSError as error:
            track.errors[error.strerror or str(error)] += 1
            track.refused[number] = time.time()

    def _drain(self, timeout: float) -> None:
        ready = self._epoll.poll(timeout)
        if not ready:
            return
        with self._changed:
            for fd, _ in ready:
                self._read(self._by_fd[fd])
            self._changed.notify_all()

    def _read(self, endpoint: _Endpoint) -> None:
        while True:
            try:
                data, control, _, sender = endpoint.socket.recvmsg(65535, 256)
            except BlockingIOError:
                return
            except OSError:
                # a pending error of the socket, as when its link went away: this read clears it
                continue
            at = time.time()
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanos = struct.unpack("@ll", value[:16])
                    at = seconds + nanos / 1e9
            self._record(endpoint, data, str(sender[0]).partition("%")[0], at)

    def _record(self, endpoint: _Endpoint, data: bytes, sender: str, at: float) -> None:
        icmp = data[(data[0] & 15) * 4 :] if endpoint.family == socket.AF_INET else data
        found = icmp.find(_MARK, 8)
        if len(icmp) < 8 or found < 0 or len(icmp) < found + _BODY.size:
            return
        _, run, index, number = _BODY.unpack_from(icmp, found)
        if run != self._run or index >= len(self.tracks) or self._sources[index] is not endpoint:
            return
        track = self.tracks[index]
        if number >= len(track.sent):
            return
        if icmp[0] != _REPLY[endpoint.family]:
            track.refused.setdefault(number, at)
        elif sender != self._targets[index]:
            track.strays += 1
        elif number in track.received:
            track.duplicates += 1
        else:
            track.received[number] = at


def ping(
    pairs: Sequence[Pair],
    count: int = 3,
    pace: float = 0.001,
    size: int = 0,
    df: bool = False,
    timeout: float = 1.0,
    interval: float = 0.0,
) -> list[Track]:
    """Ping every pair `count` times, one packet each `pace` seconds. An answer may take `timeout` seconds.

    `interval` is the least number of seconds between two packets of one pair.
    """
    return Prober(pairs, max(interval, pace * len(pairs)), count, size, df, timeout).run()
