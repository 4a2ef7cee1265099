"""A proxy between agents and a real API server, which does to their watches what networks and servers do wrong.

Ends TLS with a certificate of the same authority and passes all on as it came, tokens too; between two events
of a watch it can put in what the server never said, or let nothing more through.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ovsmesh.lab import netns
from tests.support.controlplane import ControlPlane

EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old"}}\n'
T = TypeVar("T")
FAULTS = {
    "410": EXPIRED,
    "garbage": b'{"type": "ADD\xff\xfe}\n',
    "half an event": b'{"type":"MODIFIED","object":{"metadata":{"name":"default-000"',
}
"""What can be put into a watch; one without an end is followed by the connection's."""
STALL = "a stall"
_SECONDS = 10.0


class Meddler:
    """Serves until its context ends at `url`, inside the control plane's namespace."""

    def __init__(self, plane: ControlPlane) -> None:
        self._server = (plane.address, plane.port)
        self._inside = plane.authority.server("meddler", plane.address)
        self._outside = ssl.create_default_context(cafile=str(plane.ca))
        self._lock = threading.Lock()
        self._ways: set[_Way] = set()
        self._listener = _within(plane.ns, lambda: socket.create_server((plane.address, 0), backlog=64))
        self.url = f"https://{plane.address}:{self._listener.getsockname()[1]}"
        # threads that are started inside the namespace stay in it, and so do those that they start
        _within(plane.ns, threading.Thread(target=self._accept, daemon=True).start)

    def __enter__(self) -> Meddler:
        return self

    def __exit__(self, *_: object) -> None:
        # a thread that waits in accept() is not woken by close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def config(self, of: Path) -> Path:
        """The same kubeconfig, for the way through here."""
        found = json.loads(of.read_text())
        found["clusters"][0]["cluster"]["server"] = self.url
        made = of.with_name(f"meddled-{of.name}")
        made.write_text(json.dumps(found))
        return made

    def do(self, fault: str) -> int:
        """Does one of FAULTS or STALL to each open watch; how many there were."""
        found = self.watches()
        for way in found:
            way.tell(fault)
        return len(found)

    def watches(self) -> list[_Way]:
        """The open ones, but for those that are stalled."""
        with self._lock:
            return [way for way in self._ways if way.watches and not way.stalled]

    def cut(self) -> None:
        """Ends all connections."""
        with self._lock:
            for way in self._ways:
                way.tell("cut")

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with plain, contextlib.suppress(OSError):
            plain.settimeout(_SECONDS)
            with (
                self._inside.wrap_socket(plain, server_side=True) as client,
                socket.create_connection(self._server, _SECONDS) as through,
                self._outside.wrap_socket(through, server_hostname=self._server[0]) as server,
            ):
                way = _Way(client, server)
                with self._lock:
                    self._ways.add(way)
                try:
                    way.run()
                finally:
                    with self._lock:
                        self._ways.discard(way)
                    way.close()


class _Way:
    """One connection through here, in one thread: TLS is not for two at a time."""

    def __init__(self, client: ssl.SSLSocket, server: ssl.SSLSocket) -> None:
        self._client, self._server = client, server
        self._told: list[str] = []
        self._wakeup = os.eventfd(0)
        self.stalled = False
        self.watches = False

    def tell(self, fault: str) -> None:
        self._told.append(fault)
        os.eventfd_write(self._wakeup, 1)

    def close(self) -> None:
        os.close(self._wakeup)

    def run(self) -> None:
        poll = select.poll()
        for fd in (self._client.fileno(), self._server.fileno(), self._wakeup):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wakeup:
                    os.eventfd_read(self._wakeup)
                    if not self._do(self._told.pop(0)):
                        return
                elif not self._pass(self._client if fd == self._client.fileno() else self._server):
                    return

    def _pass(self, source: ssl.SSLSocket) -> bool:
        """Passes on what has come; False at its end."""
        target = self._server if source is self._client else self._client
        while True:
            # what is readable may be no data of theirs, but TLS's own: never wait for more
            source.settimeout(0)
            try:
                data = source.recv(65536)
            except ssl.SSLWantReadError:
                return True
            if not data:
                return False
            if source is self._client:
                self.watches = self.watches or b"watch=1" in data.split(b"\r\n", 1)[0]
            if source is self._client or not self.stalled:
                _send(target, data)

    def _do(self, fault: str) -> bool:
        if fault == STALL:
            self.stalled = True
            return True
        if fault == "cut":
            return False
        data = FAULTS[fault]
        _send(self._client, b"%x\r\n%s\r\n" % (len(data), data))
        return data.endswith(b"\n")


def _within(ns: str, make: Callable[[], T]) -> T:
    return netns.within(ns, make) if ns else make()


def _send(sock: ssl.SSLSocket, data: bytes) -> None:
    sock.settimeout(_SECONDS)
    sock.sendall(data)
