"""A proxy before a real API server that meddles with the watches through it, at the moment a test wants.

Ends TLS with a certificate of the control plane's own authority and hands everything on: tokens, answers, errors.
Imports nothing of ovsmesh.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from controlplane import ControlPlane, free_ports
from pki import kubeconfig

FAULTS = ("410 event", "500 event", "410", "garbage", "half", "cut", "end", "stall")
_EXPIRED = {"kind": "Status", "apiVersion": "v1", "code": 410, "reason": "Expired", "message": "too old"}
_SAYS = {
    "410 event": json.dumps({"type": "ERROR", "object": _EXPIRED}).encode() + b"\n",
    "500 event": json.dumps({"type": "ERROR", "object": _EXPIRED | {"code": 500, "reason": "Odd"}}).encode() + b"\n",
    "garbage": b'{"type": "MODIFIED\xff\xfe", "obj\n',
    "half": b'{"type": "MODIFIED", "object": {"metadata": {"name": "default-000", "resou',
}


class _Watch:
    """One open watch through the proxy."""

    def __init__(self, handler: _Handler, upstream: http.client.HTTPSConnection) -> None:
        self.handler, self.lock, self.mute = handler, threading.Lock(), False
        self._upstream = upstream.sock

    def write(self, data: bytes) -> None:
        with self.lock:
            if not self.mute:
                self.handler.chunk(data)

    def end(self) -> None:
        """Ends the API server's side, which else would hold on to it."""
        if self._upstream is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._upstream, socket.SHUT_RDWR)

    def meddle(self, fault: str) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.mute = True
            if fault in _SAYS:
                self.handler.chunk(_SAYS[fault])
            if fault == "end":
                self.handler.chunk(b"")
            if fault in ("410", "cut", "half"):
                socket.socket.shutdown(self.handler.connection, socket.SHUT_RDWR)


class Meddler:
    """Stands before `plane` until close()."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.watches: list[_Watch] = []
        self._stalled: list[_Watch] = []
        self.refuse = 0
        """So many watches still are answered 410."""
        (port,) = free_ports(1)
        self.url = f"https://127.0.0.1:{port}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*plane.authority.sign("meddler", "/CN=meddler", "IP:127.0.0.1"))
        meddler = self

        class Handler(_Handler):
            owner = meddler

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went

            def finish_request(self, request: Any, client_address: Any) -> None:
                with context.wrap_socket(request, server_side=True) as secure:
                    super().finish_request(secure, client_address)

        self._server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def meddle(self, fault: str) -> int:
        """Does it to all open watches; how many they were."""
        found, self.watches = self.watches, []
        self.refuse = len(found) if fault == "410" else 0
        for watch in found:
            watch.meddle(fault)
            if fault == "stall":
                self._stalled.append(watch)
            else:
                watch.end()
        return len(found)

    def kubeconfig(self, name: str, token: str) -> Path:
        """As the control plane's token_kubeconfig, through here."""
        path = self.plane.token_kubeconfig(name, token)
        user = {"tokenFile": str(self.plane.token_file(name))}
        path.write_text(json.dumps(kubeconfig(self.url, self.plane.ca, user, True)))
        return path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.meddle("cut")
        for watch in self._stalled:
            watch.end()


class _Handler(BaseHTTPRequestHandler):
    owner: Meddler
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "watch=1" in self.path and self.owner.refuse > 0:
            self.owner.refuse -= 1
            return self.answer(410, json.dumps(_EXPIRED).encode())
        with self.upstream(body) as (connection, response):
            if "watch=1" in self.path and response.status == 200:
                self.stream(_Watch(self, connection), response)
            else:
                self.answer(response.status, response.read())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    @contextlib.contextmanager
    def upstream(self, body: bytes) -> Iterator[tuple[http.client.HTTPSConnection, http.client.HTTPResponse]]:
        connection = self.owner.plane.connection("", 120.0)
        kept = ("Authorization", "Content-Type", "Accept", "User-Agent")
        headers = {name: self.headers[name] for name in kept if self.headers[name]}
        try:
            connection.request(self.command, self.path, body or None, headers)
            with connection.getresponse() as response:
                yield connection, response
        finally:
            connection.close()

    def stream(self, watch: _Watch, response: http.client.HTTPResponse) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        self.owner.watches.append(watch)
        with contextlib.suppress(OSError):
            while line := response.readline():
                watch.write(line)
            watch.write(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
