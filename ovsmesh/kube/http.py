"""Knows the wire to an API server: the connection, an open watch, and the errors that either ends in.

Imports model only; kube is the door to all of it.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from ovsmesh.errors import OvsmeshError

_MAX_LINE = 8 << 20
"""Bytes of one watch event; etcd takes objects of 1.5 MB."""

Object = dict[str, Any]


class ApiError(OvsmeshError):
    """The API server said no, or nothing. `code` is the HTTP status (0: none came), `reason` as the server gave it."""

    def __init__(self, message: str, code: int = 0, reason: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.reason, self.retry_after = code, reason, retry_after


class NotFound(ApiError):
    """404"""


class Conflict(ApiError):
    """409: someone else wrote first, or a precondition did not hold."""


class AlreadyExists(Conflict):
    """409 to a create."""


class Forbidden(ApiError):
    """403: RBAC or an admission policy."""


class Unauthorized(ApiError):
    """401, and the token was read again."""


class Gone(ApiError):
    """410: the resourceVersion or the continue token is too old; list again."""


class Invalid(ApiError):
    """400, 413, 415 or 422: what we sent is not acceptable, and will not be the next time."""


class Unavailable(ApiError):
    """No answer, a cut one, 429 or 5xx: to be tried again, after `retry_after` seconds where the server says so."""


class Garbage(Unavailable):
    """An answer that is not what an API server says."""


class NotLeader(OvsmeshError):
    """A fenced write after the lease was lost; nothing was sent."""


def name_of(found: Object) -> str:
    """metadata.name, with the namespace before a slash where there is one. Raises Garbage."""
    try:
        metadata = found["metadata"]
        name, namespace = metadata["name"], metadata.get("namespace", "")
    except (KeyError, TypeError, AttributeError):
        raise Garbage("an object without metadata.name") from None
    if not isinstance(name, str) or not isinstance(namespace, str):
        raise Garbage("an object whose metadata.name is no string")
    return f"{namespace}/{name}" if namespace else name


def parse_object(data: bytes, path: str) -> Object:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Garbage(f"{path}: the answer is not JSON: {data[:80]!a}") from None
    if not isinstance(found, dict):
        raise Garbage(f"{path}: wanted a JSON object, found {data[:80]!a}")
    return found


class _Socket(ssl.SSLSocket):
    """Closed where the peer has reset the connection before TLS began: Python leaves it open then, to nobody."""

    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, "reset before TLS began") from error


class Connection(http.client.HTTPSConnection):
    """HTTPS with keep-alives, whose certificate may be for another name than the address we connect to."""

    def __init__(self, host: str, port: int, name: str, timeout: float, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        context.sslsocket_class = _Socket
        self._name, self._tls = name, context

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # a peer that is gone without a word is noticed within 25 s, whatever the reads wait for
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                plain.setsockopt(socket.IPPROTO_TCP, option, value)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25000)
            self.sock = self._tls.wrap_socket(plain, server_hostname=self._name)
        except BaseException:
            plain.close()
            raise


class Stream:
    """An open watch. Iterating gives (type, object) until the server ends it; close() from any thread ends it too."""

    def __init__(self, connection: http.client.HTTPSConnection, response: http.client.HTTPResponse, path: str) -> None:
        self._connection, self._response, self._path = connection, response, path
        self._sock = connection.sock
        self.received = 0
        """Bytes of events so far."""

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        """Raises Unavailable (cut, silent), Garbage."""
        while True:
            try:
                line = self._response.readline(_MAX_LINE + 1)
            except TimeoutError as error:
                raise Unavailable(f"{self._path}: the watch went silent") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise Unavailable(f"{self._path}: the watch was cut: {error}") from error
            self.received += len(line)
            if not line.endswith(b"\n"):
                if len(line) > _MAX_LINE:
                    raise Garbage(f"{self._path}: a watch event of more than {_MAX_LINE} bytes")
                return  # what was cut within an event comes again
            if not line.strip():
                continue
            event = parse_object(line, self._path)
            kind, found = event.get("type"), event.get("object")
            if not isinstance(kind, str) or not isinstance(found, dict):
                raise Garbage(f"{self._path}: no watch event: {line[:80]!a}")
            yield kind, found

    def close(self) -> None:
        if self._sock is not None:
            # wakes a thread that reads; SSLSocket's own would pull the TLS away under it
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def release(self) -> None:
        """Frees the connection; for the thread that reads."""
        self._response.close()
        self._connection.close()
