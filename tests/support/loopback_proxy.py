"""A proxy on loopback for tests: HTTP CONNECT and SOCKS5, told apart by the first byte.

Counts what goes through. Imports nothing of ovsmesh.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

_SECONDS = 10.0


class LoopbackProxy:
    """Serves until its context ends. `targets` holds "host:port" of each connection that was asked for."""

    def __init__(self, refuse: bool = False) -> None:
        self._refuse = refuse
        self.targets: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # a thread that waits in accept() is not woken by close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(_SECONDS)
            first = client.recv(1)
            host, port = self._socks(client) if first == b"\x05" else self._connect(client, first)
            self.targets.append(f"{host}:{port}")
            if self._refuse:
                client.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            with socket.create_connection((host, port), _SECONDS) as server:
                client.sendall(b"\x05\x00\x00\x01" + bytes(6) if first == b"\x05" else b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pass, args=(server, client), daemon=True)
                back.start()
                _pass(client, server)
                back.join(_SECONDS)

    @staticmethod
    def _connect(client: socket.socket, head: bytes) -> tuple[str, int]:
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        host, _, port = head.split()[1].decode().rpartition(":")
        return host, int(port)

    @staticmethod
    def _socks(client: socket.socket) -> tuple[str, int]:
        """RFC 1928, without authentication."""
        client.recv(client.recv(1)[0])
        client.sendall(b"\x05\x00")
        kind = client.recv(4)[3]
        host = socket.inet_ntoa(client.recv(4)) if kind == 1 else client.recv(client.recv(1)[0]).decode()
        return host, int.from_bytes(client.recv(2))


def _pass(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
