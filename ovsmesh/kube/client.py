"""Requests to an API server: raw JSON, no models, a deadline on everything.

Objects are dicts as they came; each caller projects what it needs. What runs for long stands beside it: reflector
(a current copy of a collection), leader_election, events.

    api = Api(config.find(path))                         # or Api(service_account.transport())
    api.get("/api/v1/nodes/web1")
    for page in api.pages("/api/v1/nodes"): page.items, page.version
    api.patch(path, {"status": …}, MERGE)
    api.fenced(elector.remaining).patch(…)               # no write after the lease is lost
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, urlencode

import urllib3

from ovsmesh import __version__
from ovsmesh.kube.http import (
    AlreadyExists,
    ApiError,
    Conflict,
    Disconnected,
    Forbidden,
    Garbage,
    Gone,
    Invalid,
    NotFound,
    NotLeader,
    Object,
    Stream,
    Transport,
    Unauthorized,
    Unavailable,
    name_of,
    parse_object,
    read_answer,
    wire_errors,
)

__all__ = [
    "APPLY", "JSON", "MERGE", "AlreadyExists", "Api", "ApiError", "Conflict", "Forbidden", "Garbage", "Gone", "Invalid",
    "NotFound", "NotLeader", "Object", "Page", "Stream", "Unauthorized", "Unavailable", "name_of", "path_of",
]  # fmt: skip

MERGE = "application/merge-patch+json"
JSON = "application/json-patch+json"
APPLY = "application/apply-patch+yaml"
"""Kinds of patch. JSON takes a list of operations; APPLY takes a whole object, and creates it where it is absent."""

Query = Mapping[str, str | Sequence[str]]
"""Parameters of a request; one with several values is repeated."""
_NONE: Mapping[str, str] = {}
TIMEOUT = 10.0
"""Seconds to connect, and seconds for each read of an answer."""
_ERRORS: dict[int, type[ApiError]] = {
    400: Invalid, 401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 413: Invalid,
    415: Invalid, 422: Invalid,
}  # fmt: skip


class Page(NamedTuple):
    """One page of a list. `items` have no apiVersion and kind, as the server sends them."""

    items: list[Object]
    version: str
    """resourceVersion of the list: watch from here, once the last page has come."""


def path_of(*parts: str) -> str:
    """Join the parts of a path, such as "/api/v1/nodes", a name and "status"; all but the first are quoted."""
    return "/".join((parts[0], *(quote(part, safe="") for part in parts[1:])))


class Api:
    """One API server. For any number of threads; each request has a connection for itself.

    Every method raises ApiError, or OvsmeshError where this client's own credentials cannot be read.
    """

    def __init__(self, transport: Transport, agent: str = "ovsmesh", timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self._transport = transport
        self._agent = f"{agent}/{__version__}"
        self._remaining: Callable[[], float] | None = None

    @property
    def server(self) -> str:
        """The server's URL."""
        return self._transport.server

    @property
    def host(self) -> str:
        """The server's name or address."""
        return self._transport.host

    @property
    def namespace(self) -> str:
        """The namespace of the context or the service account."""
        return self._transport.namespace

    def fenced(self, remaining: Callable[[], float]) -> Api:
        """Return this API; its writes raise NotLeader once `remaining` is 0 (seconds), and wait no longer than it."""
        other = copy.copy(self)
        other._remaining = remaining
        return other

    def within(self, timeout: float) -> Api:
        """Return this API with another timeout, in seconds."""
        other = copy.copy(self)
        other.timeout = timeout
        return other

    def close(self) -> None:
        """Close the kept connections. The Api can be used again."""
        self._transport.close()

    # ------------------------------------------------------------ what can be asked

    def get(self, path: str, **query: str) -> Object:
        """Return one object. Raises NotFound."""
        return self._ask("GET", path, query)

    def pages(self, path: str, limit: int = 500, **query: str) -> Iterator[Page]:
        """Yield a list in pages of `limit`. Raises Gone between two pages: begin again."""
        more = ""
        while True:
            found = self._ask("GET", path, {**query, "limit": str(limit), **({"continue": more} if more else {})})
            items, metadata = found.get("items"), found.get("metadata")
            if items is None:
                items = []
            if not isinstance(items, list) or not isinstance(metadata, dict):
                raise Garbage(f"{path}: expected a list, found {str(found.get('kind'))[:80]!a}")
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
        """PUT. With metadata.resourceVersion in `body` it raises Conflict where someone wrote since."""
        return self._ask("PUT", path, query, body)

    def patch(self, path: str, body: Object | list[Object], kind: str = MERGE, **query: str) -> Object:
        """PATCH. MERGE takes metadata.resourceVersion as a precondition; APPLY needs fieldManager=… too."""
        return self._ask("PATCH", path, query, body, kind)

    def delete(self, path: str, uid: str = "", version: str = "", **query: str) -> Object:
        """DELETE. Raises Conflict where the object has another uid or resourceVersion than given."""
        pre = {**({"uid": uid} if uid else {}), **({"resourceVersion": version} if version else {})}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": pre} if pre else None
        return self._ask("DELETE", path, query, body)

    def watch(self, path: str, version: str, seconds: int, silence: float, **query: str) -> Stream:
        """Open a watch from `version`, which the server ends after `seconds`; a read waits `silence` seconds at most.

        Raises Gone when `version` is already too old; later that comes as an ERROR event.
        """
        more = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        response = self._send("GET", path, {**query, **more})
        if response.status != 200:
            raise self._error(response, self._read(response, "GET", path), "watch", path)
        return Stream(response, path, silence)

    def upgrade(self, path: str, query: Query, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """Return the answer 101 to a request for another protocol, on a connection that is the caller's."""
        response = self._send("GET", path, query, more=headers)
        if response.status != 101:
            raise self._error(response, self._read(response, "GET", path), "GET", path)
        return response

    # ------------------------------------------------------------ how it is asked

    def _ask(
        self, method: str, path: str, query: Mapping[str, str], body: object = None, kind: str = "application/json"
    ) -> Object:
        try:
            response = self._send(method, path, query, body, kind)
            answer = self._read(response, method, path)
        except Disconnected:
            # The server may have ended a kept connection just now. A create may have been carried out all the same.
            if method == "POST":
                raise
            response = self._send(method, path, query, body, kind)
            answer = self._read(response, method, path)
        if not 200 <= response.status < 300:
            raise self._error(response, answer, method, path)
        return parse_object(answer, path)

    def _read(self, response: urllib3.BaseHTTPResponse, method: str, path: str) -> bytes:
        with wire_errors(self._what(method, path)):
            return read_answer(response)

    def _what(self, method: str, path: str) -> str:
        return f"API server {self.server}: {method} {path}"

    def _send(
        self,
        method: str,
        path: str,
        query: Query,
        body: object = None,
        kind: str = "application/json",
        more: Mapping[str, str] = _NONE,
    ) -> urllib3.BaseHTTPResponse:
        """Return the answer with its body unread. After a 401 the credentials are read again, once."""
        url = f"{self.server}{path}?{urlencode(query, doseq=True)}" if query else self.server + path
        headers = {"Accept": "application/json", "User-Agent": self._agent, **more}
        if body is not None:
            headers["Content-Type"] = kind
        session = self._transport.session()
        with wire_errors(self._what(method, path)):
            response = session.send(method, url, headers, body, self._deadline(method))
            if response.status == 401:
                read_answer(response)
                self._transport.renew(session)
                session = self._transport.session()
                response = session.send(method, url, headers, body, self._deadline(method))
        return response

    def _deadline(self, method: str) -> float:
        """Return the seconds that a request may take. Raises NotLeader for a write after the lease is lost."""
        if self._remaining is None or method == "GET":
            return self.timeout
        left = self._remaining()
        if left <= 0:
            raise NotLeader("the lease is lost, so nothing is written")
        return min(self.timeout, left)

    def _error(self, response: urllib3.BaseHTTPResponse, answer: bytes, method: str, path: str) -> ApiError:
        code = response.status
        message, reason = "", ""
        with contextlib.suppress(ValueError, RecursionError):
            status = json.loads(answer)
            if isinstance(status, dict):
                message, reason = str(status.get("message") or ""), str(status.get("reason") or "")
        kind = _ERRORS.get(code, Unavailable)
        if reason == "AlreadyExists":
            kind = AlreadyExists
        after = response.headers.get("Retry-After", "")
        wait = float(after) if after.isascii() and after.isdigit() and len(after) < 5 else 0.0
        text = f"{self._what(method, path)}: {code} {reason or response.reason}: {message[:1000]}"
        return kind(text.rstrip(": "), code, reason, wait)
