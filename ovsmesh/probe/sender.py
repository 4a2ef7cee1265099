"""Send the probes and take in the answers, in a thread of its own: no reconcile waits for it, nor it for one.

The peer's kernel answers echo requests, so nothing of ovsmesh needs to run there. Requests that the peers' own agents
send here are seen too: they tell that packets arrive from a peer whose answers do not. What is sent when, and what
follows from it, is decided in scheduler and path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import NamedTuple

from ovsmesh.checksum import internet_checksum
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.mesh.types import IPAddress
from ovsmesh.metrics import Histogram
from ovsmesh.names import PROBE_MAGIC
from ovsmesh.probe.scheduler import RATE, Scheduler
from ovsmesh.probe.targets import Target

log = logging.getLogger("ovsmesh")

_HEADER = 8
_BATCH = 64
"""Packets that are read before probes that are due are sent: a flood of answers holds nobody up."""
_REST = 0.01
"""Seconds of pause after a full batch, which bounds what a flood costs."""
_HEARD = 15.0
"""Seconds for which a packet from a peer counts as sign of life: three of its own intervals in a mesh of a hundred."""
_NOTE = 1.0
"""Seconds between two words of changed states."""
_MARGIN = 0.2
"""Seconds: a probe of the peer may have been under way when the first of ours was lost."""
_NEVER = float("-inf")
_SO_ATTACH_FILTER, _SO_TIMESTAMPNS = 26, 35
_IP_PMTUDISC_PROBE = 3
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_IP_PKTINFO, _IPV6_PKTINFO = 8, 50


_Key = tuple[str, IPAddress]
_WORST = (State.UNREACHABLE, State.SMALL, State.LOSSY, State.UNPROBED, State.OK)
_TRIPS = Histogram((0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0))


class Totals(NamedTuple):
    """Probes to all peers since the start, those to peers that left too. Round trips are in seconds."""

    sent: int = 0
    lost: int = 0
    round_trips: Histogram = _TRIPS


class Prober:
    """Probes the peers that `update` names until `close`. All methods may be called from any thread."""

    def __init__(self, rate: float = RATE) -> None:
        """Open the sockets and start, with a budget of `rate` probes a second.

        Raises OSError without the right to use raw sockets.
        """
        self._lock = threading.Lock()
        self._identifier = int.from_bytes(os.urandom(2))
        self._token = os.urandom(8)
        self._sockets: dict[int, socket.socket] = {4: _open(4, self._identifier)}
        with contextlib.suppress(OSError):
            self._sockets[6] = _open(6, self._identifier)
        self._scheduler: Scheduler[_Key] = Scheduler(time.monotonic(), rate)
        self._targets: dict[_Key, Target] = {}
        self._by_destination: dict[IPAddress, _Key] = {}
        self._trips = _TRIPS
        self._heard: dict[str, float] = {}
        self._errors: dict[_Key, str] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable after the state of a peer has changed, until `drain`."""
        self._noted = float("-inf")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()

    def update(self, peers: Mapping[str, Iterable[Target]]) -> None:
        """Probe these peers from now on; what is known of paths that stay is kept."""
        wanted = {(name, target.destination): target for name, targets in peers.items() for target in targets}
        if wanted == self._targets:
            return
        with self._lock:
            groups: dict[object, dict[_Key, int]] = {}
            for key, target in wanted.items():
                if target.destination.version in self._sockets:
                    groups.setdefault(key[0], {})[key] = target.size
            self._targets = wanted
            self._by_destination = {key[1]: key for key in wanted}
            self._heard = {name: at for name, at in self._heard.items() if name in peers}
            self._errors = {key: text for key, text in self._errors.items() if key in wanted}
            self._scheduler.update(groups, time.monotonic())
        os.eventfd_write(self._wake, 1)

    def drain(self) -> bool:
        """Return whether a state has changed since the last call."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def states(self) -> dict[str, State]:
        """Return the state of each peer, its worst path's."""
        with self._lock:
            states = self._scheduler.states()
        found: dict[str, State] = {}
        for (name, _), state in states.items():
            found[name] = min(state, found.get(name, state), key=_WORST.index)
        return found

    def results(self, peers: Container[str] | None = None) -> dict[str, Reach]:
        """Return what is known now of these peers, or of all."""
        with self._lock:
            reaches = self._scheduler.results(lambda key: peers is None or key[0] in peers)
            heard, errors = dict(self._heard), dict(self._errors)
        now, epoch = time.monotonic(), time.time()
        found: dict[str, Reach] = {}
        for key, reach in reaches.items():
            name = key[0]
            one = replace(
                reach,
                since=reach.since + epoch - now,
                silent_since=None if reach.silent_since is None else reach.silent_since + epoch - now,
                # what came before the first loss came before the fault
                heard=heard.get(name, _NEVER) > max(now - _HEARD, (reach.silent_since or _NEVER) + _MARGIN),
                error=errors.get(key, ""),
                destination=str(key[1]),
            )
            old = found.get(name)
            if old is None or _WORST.index(one.state) < _WORST.index(old.state):
                found[name] = one
        return found

    def totals(self) -> Totals:
        """Return how many probes were sent and lost since the start, and how long the answers took."""
        with self._lock:
            return Totals(self._scheduler.sent, self._scheduler.lost, self._trips)

    def close(self) -> None:
        """Stop probing; takes a second at most."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(1.0)
        for sock in self._sockets.values():
            sock.close()
        os.close(self._wake)
        os.close(self.fd)

    # The thread

    def _run(self) -> None:
        poll = select.poll()
        by_fd = {sock.fileno(): (version, sock) for version, sock in self._sockets.items()}
        for fd in (*by_fd, self._wake):
            poll.register(fd, select.POLLIN)
        while not self._stopping:
            with self._lock:
                now = time.monotonic()
                self._send_due(now)
                self._note_changes(now)
                wake = self._scheduler.wake_at(now)
                if self._scheduler.changed:
                    wake = min(wake, self._noted + _NOTE)
                pause = max(0.0, wake - time.monotonic())
            for fd, _ in poll.poll(min(pause, 5.0) * 1000 + 1):
                if fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                else:
                    self._receive(*by_fd[fd])

    def _send_due(self, now: float) -> None:
        for key, probe in self._scheduler.due(now):
            target = self._targets[key]
            try:
                self._send(target, probe.sequence, probe.size)
                self._errors.pop(key, None)
            except OSError as error:
                what = "a filter of this host drops it" if error.errno == errno.EPERM else error.strerror or str(error)
                self._errors[key] = what
                self._scheduler.not_sent(key, probe.sequence, now)

    def _send(self, target: Target, sequence: int, size: int) -> None:
        version = target.destination.version
        kind, header = (8, 20) if version == 4 else (128, 40)
        data = (PROBE_MAGIC + self._token).ljust(max(0, size - header - _HEADER), b"\0")
        packet = struct.pack("!BBHHH", kind, 0, 0, self._identifier, sequence) + data
        if version == 4:
            packet = packet[:2] + struct.pack("!H", internet_checksum(packet)) + packet[4:]
            about = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, target.source.packed, bytes(4)))
        else:
            # the kernel fills in ICMPv6's checksum
            about = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, target.source.packed + struct.pack("=I", 0))
        self._sockets[version].sendmsg([packet], [about], 0, (str(target.destination), 0))

    def _receive(self, version: int, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, ancillary, _, sender = sock.recvmsg(64, 128)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.debug("a probe's answer can't be read: %s", error.strerror)
                return
            now = time.monotonic()
            for level, kind, stamp in ancillary:
                if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(stamp) >= 16:
                    seconds, nanoseconds = struct.unpack_from("=qq", stamp)
                    # when the kernel took it in: the thread may have had to wait since
                    now -= min(max(0.0, time.time() - seconds - nanoseconds / 1e9), 1.0)
            body = data[(data[0] & 15) * 4 :] if version == 4 and data else data
            if len(body) >= 24 and body[8:16] == PROBE_MAGIC:
                self._take(body, ip_address(str(sender[0]).partition("%")[0]), now)
        time.sleep(_REST)

    def _take(self, body: bytes, sender: IPAddress, now: float) -> None:
        key = self._by_destination.get(sender)
        if key is None:
            return
        if body[0] in (0, 129):
            if body[16:24] == self._token:
                with self._lock:
                    trip = self._scheduler.answered(key, int.from_bytes(body[6:8]), now)
                    if trip is not None:
                        self._trips = self._trips.plus(trip)
        else:
            self._heard[key[0]] = now

    def _note_changes(self, now: float) -> None:
        """Wake the readers of changes, once in _NOTE seconds: a thousand new peers change one after the other."""
        if self._scheduler.changed and now - self._noted >= _NOTE:
            self._scheduler.changed, self._noted = False, now
            os.eventfd_write(self.fd, 1)


def _open(version: int, identifier: int) -> socket.socket:
    """Return a raw ICMP socket that takes in answers to this process and probes of peers, and nothing else."""
    family, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    try:
        _attach(sock, version, identifier)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
    except BaseException:
        sock.close()
        raise
    return sock


def _attach(sock: socket.socket, version: int, identifier: int) -> None:
    """Attach a classic BPF program: the magic must be there, and it is a request, or an answer to `identifier`.

    An IPv4 raw socket's program sees the IP header too, an IPv6 one's does not (socket(7), ipv6(7)).
    """
    answer, request = (0, 8) if version == 4 else (129, 128)
    # X = length of the IP header
    program = [(0xB1, 0, 0, 0)] if version == 4 else [(0x01, 0, 0, 0)]
    program += [
        (0x40, 0, 0, 8),  # A = word at X+8
        (0x15, 0, 7, int.from_bytes(PROBE_MAGIC[:4])),
        (0x40, 0, 0, 12),
        (0x15, 0, 5, int.from_bytes(PROBE_MAGIC[4:])),
        (0x50, 0, 0, 0),  # A = byte at X
        (0x15, 4, 0, request),
        (0x15, 0, 2, answer),
        (0x48, 0, 0, 4),  # A = half word at X+4
        (0x15, 1, 0, identifier),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0xFFFF),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))
