"""One process that holds any number of watches of the slices, each on a TLS connection of its own, as agents do.

    watch_load.py KUBECONFIG    reads commands on stdin, prints an answer a line on stdout, as JSON

    more N         open watches until there are N    → {"open": N, "seconds": …, "refused": …}
    expect NAME    NAME joins next                   → {"ready": NAME}, then, when every watch had an event with it,
                                                       {"name": NAME, "times": [seconds, …]} (sorted)

Times are CLOCK_MONOTONIC at which this process read the bytes, so they contain the time in its own queue.
"""

from __future__ import annotations

import base64
import contextlib
import json
import resource
import select
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load, read_context
from ovsmesh.names import MESH_SLICES

_QUERY = "labelSelector=ovsmesh.io%2Fmesh%3Ddefault&allowWatchBookmarks=true&timeoutSeconds=3600&watch=1"
_TAIL = 300
"""Bytes kept between two reads: a name may be cut in two."""


class WatchLoad:
    """The watches, and the commands that come on standard input."""

    def __init__(self, config: str) -> None:
        self.config = config
        context = read_context([config])
        server = urlsplit(context.cluster["server"])
        self.address = server.hostname, server.port
        authority = base64.b64decode(context.cluster["certificate-authority-data"]).decode()
        self.context = ssl.create_default_context(cadata=authority)
        self.token = Path(context.user["tokenFile"]).read_text().strip()
        self.epoll = select.epoll()
        self.open: dict[int, tuple[ssl.SSLSocket, bytearray]] = {}
        self.marker = b""
        self.name = ""
        self.times: dict[int, float] = {}
        self.ended = 0

    def _connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(self.address, 60)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.context.wrap_socket(plain, server_hostname=self.address[0])

    def _request(self, sock: ssl.SSLSocket, target: str) -> bytes:
        head = f"GET {target} HTTP/1.1\r\nHost: {self.address[0]}\r\nAccept: application/json\r\n"
        sock.sendall(f"{head}Authorization: Bearer {self.token}\r\n\r\n".encode())
        found = b""
        while b"\r\n\r\n" not in found:
            data = sock.recv(65536)
            if not data:
                break
            found += data
        return found

    def version(self) -> str:
        """Return the version of the whole list, so that a watch from there begins with nothing."""
        with contextlib.closing(Api(load(self.config))) as api:
            return list(api.pages(MESH_SLICES))[-1].version

    def more(self, count: int) -> None:
        """Open watches until there are `count`, and answer."""
        began, version, refused = time.monotonic(), self.version(), 0
        while len(self.open) < count:
            sock = self._connect()
            found = self._request(sock, f"{MESH_SLICES}?{_QUERY}&resourceVersion={version}")
            if b" 200 " not in found.split(b"\r\n", 1)[0]:
                sock.close()
                if time.monotonic() - began > 120:
                    self.answer({"error": found[:300].decode(errors="replace")})
                    return
                refused += 1
                time.sleep(0.2)
                continue
            sock.setblocking(False)
            self.open[sock.fileno()] = (sock, bytearray(found[-_TAIL:]))
            self.epoll.register(sock.fileno(), select.EPOLLIN)
            if len(self.open) % 100 == 0:
                self.look(0)
        self.answer({"open": len(self.open), "seconds": time.monotonic() - began, "refused": refused})

    def answer(self, found: dict[str, Any]) -> None:
        """Print an answer."""
        print(json.dumps(found), flush=True)

    def look(self, timeout: float) -> bool:
        """Read what has come. Return whether a command has."""
        command = False
        for fd, _ in self.epoll.poll(timeout):
            if fd == 0:
                command = True
            else:
                self._read(fd)
        if self.name and len(self.times) == len(self.open):
            self.answer({"name": self.name, "times": sorted(self.times.values()), "ended": self.ended})
            self.name, self.marker, self.times = "", b"", {}
        return command

    def _read(self, fd: int) -> None:
        sock, tail = self.open[fd]
        while True:
            try:
                data = sock.recv(65536)
            except ssl.SSLWantReadError:
                return
            except OSError:
                data = b""
            if not data:
                self.epoll.unregister(fd)
                sock.close()
                del self.open[fd]
                self.ended += 1
                return
            tail += data
            if self.marker and fd not in self.times and self.marker in tail:
                self.times[fd] = time.monotonic()
            del tail[:-_TAIL]

    def run(self) -> None:
        """Obey commands until standard input ends."""
        self.epoll.register(0, select.EPOLLIN)
        while True:
            if not self.look(1.0):
                continue
            line = sys.stdin.readline()
            if not line:
                return
            what, word = line.split()
            if what == "more":
                self.more(int(word))
            else:
                self.name, self.marker, self.times = word, f'"name":"{word}"'.encode(), {}
                self.answer({"ready": word})


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    WatchLoad(sys.argv[1]).run()
