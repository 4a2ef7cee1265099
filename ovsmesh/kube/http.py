"""HTTP to an API server: sessions over kept connections, bounded answers, watch lines, and the errors of all of them.

Built on urllib3, which the `kubernetes` library uses too, so that an agent in a pod (service_account) and whoever
has a kubeconfig (config) share one path through one set of deadlines. Does not know what is asked: that is client's.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import (
    ClosedPoolError,
    HTTPError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
)

from ovsmesh.errors import OvsmeshError

Object = dict[str, Any]
"""A Kubernetes object as it came, as JSON."""
Headers = urllib3.HTTPHeaderDict
Send = Callable[[str, str, Headers, object, float], urllib3.BaseHTTPResponse]
"""Method, URL, headers, JSON body or None, seconds to connect and of each read → an answer whose body is unread."""

SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # A peer that vanishes is noticed within 25 s, whatever the reads wait for.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25000),
]
KEPT_CONNECTIONS = 16
"""More than the threads that ask at a time: urllib3 logs a warning for each connection that it cannot keep."""

_MAX_LINE = 8 << 20
"""Bytes of one watch event; etcd takes objects of 1.5 MB."""
_MAX_ANSWER = 64 << 20
"""Bytes of one answer: 500 Nodes have 3–6 MB."""
_MAX_TOKEN = 1 << 20
_CLOSE_SECONDS = 1.0
_MAX_SECONDS = 60.0
"""Seconds from the first byte of an answer to its last."""


class ApiError(OvsmeshError):
    """The API server refused, or gave no usable answer.

    `code` is the HTTP status (0: none came), `reason` is the server's.
    """

    def __init__(self, message: str, code: int = 0, reason: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.reason, self.retry_after = code, reason, retry_after


class NotFound(ApiError):
    """404: the object is not there."""


class Conflict(ApiError):
    """409: another writer came first, or a precondition did not hold."""


class AlreadyExists(Conflict):
    """409 to a create."""


class Forbidden(ApiError):
    """403: RBAC or an admission policy."""


class Unauthorized(ApiError):
    """401, also with credentials that were read again."""


class Gone(ApiError):
    """410: the resourceVersion or the continue token is too old; list again."""


class Invalid(ApiError):
    """400, 413, 415 or 422: the request is wrong and will be wrong again."""


class Unavailable(ApiError):
    """No answer, a broken one, 429 or 5xx: retry, after `retry_after` seconds where the server says so."""


class Disconnected(Unavailable):
    """The connection ended before the answer did; the server may or may not have carried out the request."""


class Garbage(Unavailable):
    """An answer that no API server gives."""


class NotLeader(OvsmeshError):
    """A fenced write after the lease was lost; nothing was sent."""


def name_of(found: Object) -> str:
    """Return metadata.name, prefixed with "namespace/" where there is one. Raises Garbage."""
    try:
        metadata = found["metadata"]
        name, namespace = metadata["name"], metadata.get("namespace", "")
    except (KeyError, TypeError, AttributeError):
        raise Garbage("an object without metadata.name") from None
    if not isinstance(name, str) or not isinstance(namespace, str):
        raise Garbage("an object whose metadata.name is no string")
    return f"{namespace}/{name}" if namespace else name


def parse_object(data: bytes, path: str) -> Object:
    """Return the JSON object in `data`. Raises Garbage."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Garbage(f"{path}: the answer is not JSON: {data[:80]!a}") from None
    if not isinstance(found, dict):
        raise Garbage(f"{path}: expected a JSON object, found {data[:80]!a}")
    return found


# ---------------------------------------------------------------- TLS


class _Socket(ssl.SSLSocket):
    """Close the socket where the peer resets before the handshake: CPython leaks it then."""

    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, "reset before TLS began") from None


def tls_context(ca: str | None, cert: str | None = None, key: str | None = None, verify: bool = True) -> ssl.SSLContext:
    """Return a client context that trusts the authorities in file `ca` and no others, or the system's where it is None.

    `cert` and `key` are files of a client certificate. Raises OSError or ValueError where a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _Socket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif ca:
        context.load_verify_locations(ca)
    else:
        context.load_default_certs()
    if cert:
        # Without a callback OpenSSL asks the terminal for the passphrase of an encrypted key.
        context.load_cert_chain(cert, key, password=lambda: "")
    return context


def read_token(name: str, where: str) -> str:
    """Return the token in file `name`, without white space around it. Raises OvsmeshError."""
    try:
        with open(name, encoding="ascii") as file:
            token = file.read(_MAX_TOKEN).strip()
    except OSError as error:
        raise OvsmeshError(f"{where}: token file {name}: {error.strerror}") from error
    except UnicodeError as error:
        raise OvsmeshError(f"{where}: token file {name} holds no token: it is not ASCII") from error
    if not token or not token.isprintable():
        raise OvsmeshError(f"{where}: token file {name} holds no token")
    return token


# ---------------------------------------------------------------- sessions


class Session:
    """Connections to one API server with one set of credentials; never changed, replaced by another.

    `files` are what it was made from, `expires` is the time.time() at which its credentials end.
    """

    def __init__(
        self,
        send: Send,
        headers: Headers,
        close: Callable[[], None],
        files: Iterable[str] = (),
        expires: float = float("inf"),
    ) -> None:
        self._send, self._headers, self.close = send, headers, close
        self._expires = expires
        self._files = {name: _stat(name) for name in files if name}

    @property
    def current(self) -> bool:
        """Whether its credentials have not ended, and no file that they are from has changed."""
        return time.time() < self._expires and all(_stat(name) == seen for name, seen in self._files.items())

    def send(
        self, method: str, url: str, headers: dict[str, str], body: object, timeout: float
    ) -> urllib3.BaseHTTPResponse:
        """Return the answer as soon as its headers are here. Raises what wire_errors() turns into Unavailable."""
        both = self._headers.copy()
        both.update(headers)
        return self._send(method, url, both, body, timeout)


def _stat(name: str) -> object:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Transport:
    """The way to one API server. For any number of threads.

    `open` makes a Session; it is called again when the last one is no longer current and after a 401. It raises
    OvsmeshError where credentials cannot be read.
    """

    def __init__(self, open: Callable[[], Session], server: str, namespace: str = "default") -> None:
        self.server = server.rstrip("/")
        """The URL that paths are appended to."""
        self.namespace = namespace
        self._open = open
        self._lock = threading.Lock()
        self._session: Session | None = None

    @property
    def host(self) -> str:
        """The server's name or address."""
        return urlsplit(self.server).hostname or ""

    def session(self) -> Session:
        """Return the current session. Raises OvsmeshError."""
        with self._lock:
            if self._session is None or not self._session.current:
                self._drop()
                self._session = self._open()
            return self._session

    def renew(self, rejected: Session) -> None:
        """Make the next session() read the credentials again, unless another thread's already has."""
        with self._lock:
            if self._session is rejected:
                self._drop()

    def close(self) -> None:
        """Close the kept connections. The transport can be used again."""
        # A login may hold the lock for a minute; then the connections end with the process.
        if self._lock.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._drop()
            finally:
                self._lock.release()

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


# ---------------------------------------------------------------- answers


@contextlib.contextmanager
def wire_errors(what: str) -> Iterator[None]:
    """Turn what a connection can fail with into Unavailable, whose message begins with `what`."""
    try:
        yield
    except (OSError, http.client.HTTPException, HTTPError) as error:
        causes = list(_causes(error))
        why = str(causes[-1]) or type(causes[-1]).__name__
        kind: type[Unavailable] = Unavailable
        if any(isinstance(each, TimeoutError | ReadTimeoutError) for each in causes):
            why = "no answer in time"
        elif verify := [each for each in causes if isinstance(each, ssl.SSLCertVerificationError)]:
            why = f"its certificate is not valid: {verify[0].verify_message}"
        elif any(isinstance(each, ProxyError) for each in causes):
            why = f"the proxy refuses: {why}"
        elif isinstance(error, ProtocolError | ConnectionError | ClosedPoolError | http.client.HTTPException):
            kind = Disconnected
        raise kind(f"{what}: {why}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that urllib3 wrapped in it, the outermost first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = next((each for each in found.args if isinstance(each, BaseException)), found.__cause__)


def read_answer(response: urllib3.BaseHTTPResponse) -> bytes:
    """Return the whole body and release the connection. Raises Garbage, and what wire_errors() is for."""
    parts: list[bytes] = []
    size, end = 0, time.monotonic() + _MAX_SECONDS
    try:
        while part := response.read1(1 << 20, decode_content=False):
            parts.append(part)
            size += len(part)
            if size > _MAX_ANSWER:
                raise Garbage(f"an answer of more than {_MAX_ANSWER} bytes")
            if time.monotonic() > end:
                raise TimeoutError
    except BaseException:
        response.close()
        raise
    response.release_conn()
    return b"".join(parts)


class Stream:
    """An open watch. Iterating gives (type, object) until the server ends it; close() from any thread ends it too."""

    def __init__(self, response: urllib3.BaseHTTPResponse, path: str, silence: float) -> None:
        self._response, self._path = response, path
        connection = response.connection
        # http.client gives the socket away where the answer is the connection's last
        self._sock: socket.socket | None = getattr(connection, "sock", None)
        if self._sock is None:
            response.close()
            raise Unavailable(f"{path}: a watch needs a connection that is kept; a proxy on the way closes each")
        self._sock.settimeout(silence)
        self.received = 0
        """Bytes of events so far."""

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        """Yield the events. Raises Unavailable (cut, silent), Garbage."""
        for line in self._lines():
            if not line.strip():
                continue
            event = parse_object(line, self._path)
            kind, found = event.get("type"), event.get("object")
            if not isinstance(kind, str) or not isinstance(found, dict):
                raise Garbage(f"{self._path}: no watch event: {line[:80]!a}")
            yield kind, found

    def _lines(self) -> Iterator[bytes]:
        """Yield whole lines; what is cut within an event comes again with the next watch."""
        rest = b""
        while part := self._read():
            self.received += len(part)
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > _MAX_LINE:
                raise Garbage(f"{self._path}: a watch event of more than {_MAX_LINE} bytes")
            yield from lines

    def _read(self) -> bytes:
        try:
            return self._response.read1(1 << 16, decode_content=False)
        except (TimeoutError, ReadTimeoutError) as error:
            raise Unavailable(f"{self._path}: the watch is silent") from error
        except (OSError, http.client.HTTPException, HTTPError, ValueError, AttributeError) as error:
            raise Unavailable(f"{self._path}: the watch was cut: {error}") from error

    def close(self) -> None:
        """End the watch, from any thread."""
        if self._sock is not None:
            # Wakes a thread that reads; SSLSocket's own shutdown would pull the TLS away under it.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def release(self) -> None:
        """Free the connection; for the thread that reads."""
        self._response.close()
