"""A small HTTP server for the health and metrics of a process: /metrics, /healthz, and what a subclass adds.

It reads only. The number of connections and the life of each are limited, and where they are used up the client with
the most of them loses its oldest, so no client keeps others from an answer. A server for all addresses has a socket of
its own for 127.0.0.1, where a kubelet asks: others can't fill that one.
Pods and other machines are given health and metrics; all else is for clients on this host.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from ovsmesh.errors import OvsmeshError

log = logging.getLogger("ovsmesh")

_HOST = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9]([-A-Za-z0-9.]{0,251}[A-Za-z0-9])?")
"""The name of a host: it has a letter, as what has none is an address that was mistyped."""
_REQUEST_TIME = 10.0
"""Seconds that a connection may last, however slowly its bytes come."""
_CONNECTIONS = 16
_QUEUE = 128
"""Connections that the kernel keeps until they are accepted."""
_EVERYWHERE = ("", "0.0.0.0", "::")
LOOP_DEADLINE = 180.0
"""Seconds after which a loop that gives no sign of life counts as stuck: three times its longest pause."""

PUBLIC = frozenset({"/metrics", "/healthz", "/readyz"})
"""What anyone who reaches the port may read: a scraper and a kubelet come from other addresses."""

Answer = tuple[HTTPStatus, str, str | bytes]


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _QUEUE

    def __init__(
        self, family: socket.AddressFamily, address: tuple[str, int], owner: HttpServer, shared: bool = False
    ) -> None:
        """Listen; `shared`: beside another server of this process, for all addresses or for one of them."""
        self.address_family = family
        self.allow_reuse_port = shared
        self.owner = owner
        self._open: dict[socket.socket, tuple[str, float]] = {}
        """Connection → address of the client, and when it came (monotonic)."""
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer.server_bind asks DNS for the host's name, which may take a minute
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "ovsmesh", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= _CONNECTIONS:
            self._drop_one()
        self._open[request] = client_address[0], time.monotonic()
        super().process_request(request, client_address)

    def _drop_one(self) -> None:
        """End the oldest connection of the client that has the most."""
        now = list(self._open.items())
        often = Counter(client for _, (client, _) in now)
        request, _ = max(now, key=lambda one: (often[one[1][0]], -one[1][1]))
        self._open.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        # a client that sends a byte from time to time renews every other timeout
        late = time.monotonic() - _REQUEST_TIME
        for request, (_, since) in list(self._open.items()):
            if since < late:
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # closed by its thread

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP request from %s failed", client_address[0], exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 5.0
    server: _Server

    def version_string(self) -> str:
        return "ovsmesh"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP: %s", format % args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in PUBLIC and (why := self._stranger()):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", why)
            return
        answer = self.server.owner.answer(path)
        if answer is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", f"there are {', '.join(self.server.owner.paths())}\n")
        else:
            self._send(*answer)

    def _stranger(self) -> str:
        """Return why this client may read only what is public; "" for one on this host."""
        client, own = (_unmapped(address[0]) for address in (self.client_address, self.connection.getsockname()))
        port = self.server.server_port
        if not client.is_loopback and client != own:
            return (
                f"only {', '.join(sorted(PUBLIC))} are answered to {client}; the rest is for this host itself: use "
                f"ssh -L {port}:127.0.0.1:{port} HOST, or kubectl port-forward to the pod\n"
            )
        # a web site can give a name of its own this host's address, and have a browser here read for it; it has no
        # name without a dot
        name = (self.headers.get("Host") or "localhost").lower()
        name = name.partition("]")[0].removeprefix("[") if name.startswith("[") else name.partition(":")[0]
        if "." in name.rstrip(".") and not _is_address(name):
            return f"Host {name}: wanted an address, or a name without a dot, as in http://localhost:{port}/\n"
        return ""

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", "GET only\n")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _send(self, code: HTTPStatus, kind: str, body: str | bytes) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        self.send_header("Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", self.server.owner.policy)
        if code is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _unmapped(address: str) -> IPv4Address | IPv6Address:
    found = ip_address(address.partition("%")[0])
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def wrong_address(listen: str) -> str:
    """Return why nobody can listen at an address, "" if it can be tried."""
    try:
        _, (host, _) = _address(listen)
    except OvsmeshError as error:
        return str(error).partition(": ")[2]
    if not host or _is_address(host) or _HOST.fullmatch(host):
        return ""
    return "wanted ADDRESS:PORT, as in 127.0.0.1:9474 or [::1]:9474"


def _address(listen: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise OvsmeshError(f"--listen {listen}: wanted ADDRESS:PORT, as in 127.0.0.1:9474 or [::1]:9474")
    host = host.removeprefix("[").removesuffix("]")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


class HttpServer:
    """Answers GET requests in threads of its own. /healthz says whether the process's loop calls `beat`."""

    policy = "default-src 'none'; frame-ancestors 'none'"
    """The Content-Security-Policy of every answer."""

    def __init__(self, listen: str) -> None:
        """Listen at once. Raise OvsmeshError where that is not possible."""
        family, address = _address(listen)
        self._beat = time.monotonic()
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        try:
            self._servers = self._listening(family, address)
        except (OSError, UnicodeError) as e:
            why = (e.strerror if isinstance(e, OSError) else None) or str(e)
            raise OvsmeshError(
                f"--listen {listen}: can't listen there: {why}; "
                "end what uses that port (another agent?) or give another ADDRESS:PORT"
            ) from None
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(1.0,), name="http", daemon=True).start()

    def _listening(self, family: socket.AddressFamily, address: tuple[str, int]) -> list[_Server]:
        if address[0] not in _EVERYWHERE:
            return [_Server(family, address, self)]
        with socket.socket(family) as asking:
            # a port that is shared within this process must not be shared with another one
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asking.bind(address)
            port = asking.getsockname()[1]
        found = [_Server(family, (address[0], port), self, shared=True)]
        try:
            return [*found, _Server(socket.AF_INET, ("127.0.0.1", port), self, shared=True)]
        except OSError:
            found[0].server_close()
            raise

    @property
    def port(self) -> int:
        """Return the port that the server listens on."""
        return self._servers[0].server_port

    def close(self) -> None:
        """Stop listening, within two seconds for each socket."""
        for server in self._servers:
            stop = threading.Thread(target=server.shutdown, daemon=True)
            stop.start()
            end = time.monotonic() + 2.0
            while stop.is_alive() and time.monotonic() < end:
                # serve_forever looks whether to stop at each connection, and once a second; mypy takes the two parts
                # of the address for any number of them
                with contextlib.suppress(OSError):
                    socket.create_connection(server.server_address[:2], timeout=0.1).close()  # type: ignore[arg-type]
                stop.join(0.02)
            server.server_close()

    @property
    def silent(self) -> float:
        """Return for how many seconds the loop has given no sign of life."""
        return time.monotonic() - self._beat

    def beat(self) -> None:
        """Say that the loop is alive."""
        self._beat = time.monotonic()

    def paths(self) -> list[str]:
        """Return what there is to get, for the reader who has asked for something else."""
        return sorted(PUBLIC)

    def answer(self, path: str) -> Answer | None:
        """Return the answer to a GET; None for a path that does not exist."""
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self.registry)
        return self._healthz() if path == "/healthz" else None

    def _healthz(self) -> Answer:
        if self.silent > LOOP_DEADLINE:
            text = f"the loop has not run for {self.silent:.0f} s (deadline {LOOP_DEADLINE:.0f} s)\n"
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", text
        return HTTPStatus.OK, "text/plain", "ok\n"
