"""Count the frames that pass a device of a namespace, and look inside GRE, VXLAN and Geneve."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections import Counter
from types import TracebackType

from ovsmesh.lab.netns import within
from ovsmesh.names import PROBE_MAGIC

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_BUFFER = 16 << 20
_IPV4, _IPV6 = 0x0800, 0x86DD
_GRE, _UDP = 47, 17
_TEB = 0x6558
"""Transparent Ethernet bridging: an Ethernet frame inside GRE or Geneve."""
_VXLAN_PORT, _GENEVE_PORT = 4789, 6081
_KEEP = 10000


def inner_frame(frame: bytes) -> bytes | None:
    """Return the Ethernet frame inside an encapsulated one; None when `frame` is not encapsulated."""
    if len(frame) < 34:
        return None
    kind = int.from_bytes(frame[12:14], "big")
    if kind == _IPV4:
        protocol, payload = frame[23], frame[14 + (frame[14] & 15) * 4 :]
    elif kind == _IPV6:
        protocol, payload = frame[20], frame[54:]
    else:
        return None
    if protocol == _GRE and len(payload) >= 4:
        flags, inner = struct.unpack_from("!HH", payload)
        # checksum, key, sequence number: four bytes each (RFC 2784, RFC 2890)
        return payload[4 + 4 * (flags & 0xB000).bit_count() :] if inner == _TEB else None
    if protocol == _UDP and len(payload) >= 16:
        port = int.from_bytes(payload[2:4], "big")
        if port == _VXLAN_PORT:
            return payload[16:]
        if port == _GENEVE_PORT:
            return payload[16 + 4 * (payload[8] & 0x3F) :]
    return None


class Capture:
    """Counts frames until `close()` or the end of its context; the counts may be read at any time.

    `frames` counts all frames, `probes` the agents' own probes and their answers in tunnels, `encapsulated` all else
    in tunnels; `broadcast` and `multicast` count inner frames to a group address.
    `inner` counts inner EtherTypes. `flooded` keeps the first group frames, `kept` the first inner frames.
    `missed`, set by `close()`, counts what the kernel dropped. No frame sent after the constructor returns is missed
    otherwise.
    """

    def __init__(self, ns: str, device: str) -> None:
        self.frames = self.probes = self.encapsulated = self.broadcast = self.multicast = self.missed = 0
        self.inner: Counter[int] = Counter()
        self.flooded: list[bytes] = []
        self.kept: list[bytes] = []
        self._socket = within(ns, lambda: self._open(device))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"capture-{ns}", daemon=True)
        self._thread.start()

    @staticmethod
    def _open(device: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        sock.bind((device, 0))
        sock.setblocking(False)
        return sock

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._read()
            self.missed = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
            self._socket.close()

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not self._stop.is_set():
            if poll.poll(50):
                self._read()

    def _read(self) -> None:
        while True:
            try:
                frame = self._socket.recv(65535)
            except BlockingIOError:
                return
            except OSError:
                # the device went down: this read takes the error, the next one goes on
                continue
            self.frames += 1
            inner = inner_frame(frame)
            if inner is None or len(inner) < 14:
                continue
            if PROBE_MAGIC in inner[14:80]:
                self.probes += 1
                continue
            self.encapsulated += 1
            self.inner[int.from_bytes(inner[12:14], "big")] += 1
            if inner[:6] == b"\xff" * 6:
                self.broadcast += 1
            elif inner[0] & 1:
                self.multicast += 1
            if inner[0] & 1 and len(self.flooded) < _KEEP:
                self.flooded.append(inner)
            if len(self.kept) < _KEEP:
                self.kept.append(inner)
