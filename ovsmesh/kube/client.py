"""Knows how to talk to an API server: raw JSON over http.client and ssl, no models, a deadline on everything.

Objects are dicts as they came; whoever asked projects them. The parts that run for long are rooms of
their own: kubewatch (Reflector), kubelease (Lease), kubeevents (Events). Imports kubewire and kubeconfig;
never ovs, pyroute2 or kubernetes.

    api = Api(load(path))                                # or Api(in_cluster())
    api.get("/api/v1/nodes/web1")
    for page in api.pages("/api/v1/nodes"): page.items, page.version
    api.patch(path, {"status": …}, MERGE)
    api.fenced(lease.remaining).patch(…)                 # no write after the lease is lost
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import select
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import quote, urlencode

from ovsmesh import __version__
from ovsmesh.kube.config import Config, in_cluster, load
from ovsmesh.kube.http import (
    AlreadyExists,
    ApiError,
    Conflict,
    Connection,
    Forbidden,
    Garbage,
    Gone,
    Invalid,
    NotFound,
    NotLeader,
    Object,
    Stream,
    Unauthorized,
    Unavailable,
    name_of,
    parse_object,
)

__all__ = [
    "APPLY", "JSON", "MERGE", "AlreadyExists", "Api", "ApiError", "Config", "Conflict", "Forbidden", "Garbage",
    "Gone", "Invalid", "NotFound", "NotLeader", "Object", "Page", "Stream", "Unauthorized", "Unavailable", "in_cluster",
    "load", "name_of", "path_of",
]  # fmt: skip

MERGE = "application/merge-patch+json"
JSON = "application/json-patch+json"
APPLY = "application/apply-patch+yaml"
"""Kinds of patch. JSON takes a list of operations; APPLY a whole object, and makes it where it is absent."""

TIMEOUT = 10.0
"""Seconds for a request that is no watch, from the connection to the last byte of each read."""
_IDLE = 20.0
"""Seconds after which a kept connection is not used again: whatever is on the way may have forgotten it."""
_KEPT = 4
_SLOWEST = 60.0
"""Seconds from the first byte of an answer to its last."""
_LONGEST = 64 << 20
"""Bytes of one answer: 500 Nodes have 3–6 MB."""
_ERRORS: dict[int, type[ApiError]] = {
    400: Invalid, 401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 413: Invalid,
    415: Invalid, 422: Invalid,
}  # fmt: skip


class Page(NamedTuple):
    """One page of a list. `items` lack apiVersion and kind, as the server sends them."""

    items: list[Object]
    version: str
    """resourceVersion of the list: watch from here, once the last page has come."""


def path_of(*parts: str) -> str:
    """A path of `parts`, of which the first is taken as it is: path_of("/api/v1/nodes", name, "status")."""
    return "/".join((parts[0], *(quote(part, safe="") for part in parts[1:])))


def _spoke(sock: ssl.SSLSocket) -> bool:
    """Whether something can be read: poll, as select knows no file descriptor above 1023."""
    look = select.poll()
    look.register(sock, select.POLLIN)
    return bool(look.poll(0))


class Api:
    """One API server. For any number of threads; each request has a connection for itself.

    Every method raises ApiError, or OvsmeshError where our own token or certificates can't be read.
    """

    def __init__(self, config: Config, agent: str = "ovsmesh", timeout: float = TIMEOUT) -> None:
        self.config = config
        self.timeout = timeout
        self._agent = f"{agent}/{__version__}"
        self._lock = threading.Lock()
        self._idle: list[tuple[http.client.HTTPSConnection, float]] = []
        self._context: tuple[tuple[object, ...], ssl.SSLContext] | None = None
        self._remaining: Callable[[], float] | None = None

    def fenced(self, remaining: Callable[[], float]) -> Api:
        """This API, whose writes raise NotLeader once `remaining` (seconds) is 0, and never wait longer than it."""
        other = copy.copy(self)
        other._remaining = remaining
        return other

    def within(self, timeout: float) -> Api:
        """This API, whose requests wait for `timeout` seconds."""
        other = copy.copy(self)
        other.timeout = timeout
        return other

    def close(self) -> None:
        """Closes what is kept open. The Api can be used again."""
        with self._lock:
            kept, self._idle[:] = list(self._idle), []
        for connection, _ in kept:
            connection.close()

    # ------------------------------------------------------------ what can be asked

    def get(self, path: str, **query: str) -> Object:
        return self._ask("GET", path, query)

    def pages(self, path: str, limit: int = 500, **query: str) -> Iterator[Page]:
        """A list in pages of `limit`. Gone between two pages: begin again."""
        more = ""
        while True:
            found = self._ask("GET", path, {**query, "limit": str(limit), **({"continue": more} if more else {})})
            items, metadata = found.get("items"), found.get("metadata")
            if items is None:
                items = []
            if not isinstance(items, list) or not isinstance(metadata, dict):
                raise Garbage(f"{path}: wanted a list, found {str(found.get('kind'))[:80]!a}")
            version = metadata.get("resourceVersion")
            if not isinstance(version, str) or not version:
                raise Garbage(f"{path}: a list without resourceVersion")
            more = metadata.get("continue") or ""
            yield Page(items, version)
            if not more:
                return

    def create(self, path: str, body: Object, **query: str) -> Object:
        """POST to the collection `path`. Raises AlreadyExists."""
        return self._ask("POST", path, query, body)

    def replace(self, path: str, body: Object, **query: str) -> Object:
        """PUT: with metadata.resourceVersion in `body`, Conflict where someone wrote since."""
        return self._ask("PUT", path, query, body)

    def patch(self, path: str, body: Object | list[Object], kind: str = MERGE, **query: str) -> Object:
        """PATCH. MERGE takes metadata.resourceVersion as a precondition; APPLY needs fieldManager=… too."""
        return self._ask("PATCH", path, query, body, kind)

    def delete(self, path: str, uid: str = "", version: str = "", **query: str) -> Object:
        """DELETE, only where it still has this uid and this resourceVersion (Conflict else)."""
        pre = {**({"uid": uid} if uid else {}), **({"resourceVersion": version} if version else {})}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": pre} if pre else None
        return self._ask("DELETE", path, query, body)

    def watch(self, path: str, version: str, seconds: int, silence: float, **query: str) -> Stream:
        """A watch from `version`, which the server ends after `seconds`; a read waits for `silence` seconds at most.

        Raises Gone when `version` is too old already; else that comes as an ERROR event.
        """
        more = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        connection = self._connect(self.timeout)
        try:
            response = self._send(connection, "GET", self._target(path, {**query, **more}), None, "")
            if response.status != 200:
                raise self._error(response, self._read(response), "GET", path)
            assert connection.sock is not None
            connection.sock.settimeout(silence)
            return Stream(connection, response, path)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unavailable(error, "watch", path) from error
        except BaseException:
            connection.close()
            raise

    # ------------------------------------------------------------ how it is asked

    def _target(self, path: str, query: Mapping[str, str]) -> str:
        path = self.config.path + path
        return f"{path}?{urlencode(query)}" if query else path

    def _ask(
        self, method: str, path: str, query: Mapping[str, str], body: object = None, kind: str = "application/json"
    ) -> Object:
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        target = self._target(path, query)
        again = 2
        while True:
            timeout = self._fence(method)
            connection, fresh = self._take(timeout)
            try:
                response = self._send(connection, method, target, data, kind)
                answer = self._read(response)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A kept connection that the server has just ended; a create may have been carried out all the same.
                cut = isinstance(error, ConnectionError | http.client.BadStatusLine)
                if not fresh and cut and method != "POST" and again > 0:
                    again -= 1
                    continue
                raise self._unavailable(error, method, path) from error
            except BaseException:
                connection.close()
                raise
            self._keep(connection, response)
            if response.status == 401 and again > 0 and self.config.token_file:
                again = 0
                continue
            if response.status >= 300 or response.status < 200:
                raise self._error(response, answer, method, path)
            return parse_object(answer, path)

    def _fence(self, method: str) -> float:
        if self._remaining is None or method == "GET":
            return self.timeout
        left = self._remaining()
        if left <= 0:
            raise NotLeader("the lease is lost, so nothing is written any more")
        return min(self.timeout, left)

    def _send(
        self, connection: http.client.HTTPSConnection, method: str, target: str, data: bytes | None, kind: str
    ) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json", "User-Agent": self._agent}
        if token := self.config.bearer():
            headers["Authorization"] = f"Bearer {token}"
        if data is not None:
            headers["Content-Type"] = kind
        connection.request(method, target, data, headers)
        return connection.getresponse()

    @staticmethod
    def _read(response: http.client.HTTPResponse) -> bytes:
        parts: list[bytes] = []
        size, end = 0, time.monotonic() + _SLOWEST
        while part := response.read1(1 << 20):
            parts.append(part)
            size += len(part)
            if size > _LONGEST:
                raise Garbage(f"an answer of more than {_LONGEST} bytes")
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        response.close()  # read1 leaves it open at its end, and so the connection in use
        return b"".join(parts)

    def _unavailable(self, error: Exception, method: str, path: str) -> ApiError:
        why = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"its certificate is not good: {error.verify_message}"
        return Unavailable(f"API server {self.config.server}: {method} {path}: {why}")

    def _error(self, response: http.client.HTTPResponse, answer: bytes, method: str, path: str) -> ApiError:
        code = response.status
        message, reason = "", ""
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(answer)
            if isinstance(told, dict):
                message, reason = str(told.get("message") or ""), str(told.get("reason") or "")
        kind = _ERRORS.get(code, Unavailable)
        if reason == "AlreadyExists":
            kind = AlreadyExists
        after = response.getheader("Retry-After", "")
        wait = float(after) if after.isascii() and after.isdigit() and len(after) < 5 else 0.0
        text = f"{self.config.server}: {method} {path}: {code} {reason or response.reason}: {message[:1000]}"
        return kind(text.rstrip(": "), code, reason, wait)

    # ------------------------------------------------------------ connections

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        config = self.config
        signature = config.signature()
        with self._lock:
            if self._context is None or self._context[0] != signature:
                self._context = signature, config.tls()
            context = self._context[1]
        return Connection(config.host, config.port, config.server_name or config.host, timeout, context)

    def _take(self, timeout: float) -> tuple[http.client.HTTPSConnection, bool]:
        """A connection, and whether it is a new one."""
        while True:
            with self._lock:
                if not self._idle:
                    break
                connection, since = self._idle.pop()
            sock = connection.sock
            # what is readable while nothing was asked is the server's goodbye
            if sock is None or time.monotonic() - since > _IDLE or _spoke(sock):
                connection.close()
                continue
            sock.settimeout(timeout)
            return connection, False
        return self._connect(timeout), True

    def _keep(self, connection: http.client.HTTPSConnection, response: http.client.HTTPResponse) -> None:
        with self._lock:
            if not response.will_close and connection.sock is not None and len(self._idle) < _KEPT:
                self._idle.append((connection, time.monotonic()))
                return
        connection.close()
