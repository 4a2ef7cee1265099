"""An API server for tests that a real one can't serve: one that misbehaves when told to.

Keeps objects by path, gives each write the next resourceVersion, lists in pages and watches. What a watch does
wrong is taken from `faults`, one for each watch that is opened. Imports nothing of ovsmesh.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.pki import Authority, kubeconfig

Object = dict[str, Any]
_PORTS = range(10000, 20000)
"""Below what Linux gives to connections."""


class Stub:
    """Serves until close(). `authorization` is the only such header that is let in; None lets everyone in."""

    def __init__(self, folder: Path, authorization: str | None = None) -> None:
        self.authority = Authority(folder / "pki")
        self.folder, self.authorization = folder, authorization
        self.objects: dict[str, Object] = {}
        self.version = 100
        self.log: list[tuple[float, str, str]] = []
        self.headers: list[Message] = []
        self.peers: list[str] = []
        self.faults: list[str] = []
        self.answers: list[tuple[int, bytes, dict[str, str]]] = []
        self.history: list[tuple[int, str, str, Object]] = []
        self.changed = threading.Condition()
        self.cut = 0
        self.delay = 0.0
        self._server: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()
        self.port = 0
        self.up()

    # ------------------------------------------------------------ up and down

    def up(self) -> None:
        stub = self

        class Handler(_Handler):
            api = stub

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

            def finish_request(self, request: Any, client_address: Any) -> None:
                with context.wrap_socket(request, server_side=True) as secure:
                    stub._open.add(secure)
                    try:
                        super().finish_request(secure, client_address)
                    finally:
                        stub._open.discard(secure)

        context = self.authority.server("stub", "127.0.0.1")
        context.load_verify_locations(self.authority.certificate)
        context.verify_mode = ssl.CERT_OPTIONAL
        self._server = self._listen(lambda port: Server(("127.0.0.1", port), Handler))
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _listen(self, server: Callable[[int], ThreadingHTTPServer]) -> ThreadingHTTPServer:
        """At the port it had; the first time, at one that nobody's outgoing connection takes while it is down."""
        for port in [self.port] if self.port else random.sample(_PORTS, 100):
            try:
                return server(port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise AssertionError(f"no free port for the stub, tried {self.port or _PORTS}")

    def down(self) -> None:
        """Refuses connections and cuts those that are open."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        self.cut_all()

    def cut_all(self) -> None:
        with self.changed:
            self.cut += 1
            self.changed.notify_all()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    close = down

    def kubeconfig(self, user: dict[str, Any] | None = None) -> Path:
        path = self.folder / "stub.kubeconfig"
        config = kubeconfig(f"https://127.0.0.1:{self.port}", self.authority.certificate, user or {"token": "t"})
        path.write_text(json.dumps(config))
        return path

    # ------------------------------------------------------------ objects

    def put(self, path: str, spec: object, **metadata: Any) -> Object:
        """Creates or changes the object at `path`."""
        with self.changed:
            old = self.objects.get(path)
            self.version += 1
            meta = {"name": path.rpartition("/")[2], **metadata, "resourceVersion": str(self.version)}
            made = {**(old or {}), "metadata": {**(old or {}).get("metadata", {}), **meta}, "spec": spec}
            self._note("MODIFIED" if old else "ADDED", path, made)
            return made

    def remove(self, path: str) -> None:
        with self.changed:
            self.version += 1
            gone = self.objects[path]
            gone = {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self.version)}}
            self._note("DELETED", path, gone)

    def _note(self, kind: str, path: str, found: Object) -> None:
        if kind == "DELETED":
            del self.objects[path]
        else:
            self.objects[path] = found
        self.history.append((self.version, kind, path, found))
        self.changed.notify_all()

    def count(self, method: str, part: str = "") -> int:
        return sum(m == method and part in target for _, m, target in self.log)


class _Handler(BaseHTTPRequestHandler):
    api: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        api, target = self.api, urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(target.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api.headers.append(self.headers)
        api.peers.append(_common_name(self.connection))
        api.log.append((time.monotonic(), "WATCH" if "watch" in query else self.command, self.path))
        if api.delay:
            time.sleep(api.delay)
        if api.authorization is not None and self.headers.get("Authorization") != api.authorization:
            self.fail(401, "Unauthorized")
        elif api.answers and "watch" not in query:
            code, data, headers = api.answers.pop(0)
            if code:
                self.answer(code, data, headers)
            else:
                self.close_connection = True  # without a word
        elif "watch" in query:
            self.watch(target.path, query)
        else:
            with api.changed:
                self.serve(target.path, query, json.loads(body) if body else {})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def serve(self, path: str, query: dict[str, str], body: Any) -> None:
        api = self.api
        thing = path.removesuffix("/status")
        if self.command == "GET" and thing not in api.objects and path.endswith("s"):
            self.list(path, query)
            return
        if self.command == "POST":
            thing = f"{path}/{body['metadata']['name']}"
            if thing in api.objects:
                return self.fail(409, "AlreadyExists")
        elif thing not in api.objects:
            return self.fail(404, "NotFound")
        old = api.objects.get(thing, {})
        if self.command == "GET":
            return self.answer(200, json.dumps(old).encode())
        wanted = body.get("metadata", {}).get("resourceVersion") if isinstance(body, dict) else None
        if wanted and wanted != old.get("metadata", {}).get("resourceVersion"):
            return self.fail(409, "Conflict")
        if self.command == "DELETE":
            api.remove(thing)
            return self.answer(200, b"{}")
        new = _merge(old, body) if self.command == "PATCH" else body
        api.version += 1
        new = {**new, "metadata": {**new.get("metadata", {}), "resourceVersion": str(api.version)}}
        api._note("MODIFIED" if old else "ADDED", thing, new)
        self.answer(201 if self.command == "POST" else 200, json.dumps(new).encode())

    def list(self, path: str, query: dict[str, str]) -> None:
        api = self.api
        names = sorted(p for p in api.objects if p.rpartition("/")[0] == path)
        at, limit = int(query.get("continue", "0")), int(query.get("limit", "500"))
        more = str(at + limit) if at + limit < len(names) else ""
        meta = {"resourceVersion": str(api.version), **({"continue": more} if more else {})}
        items = [api.objects[name] for name in names[at : at + limit]]
        self.answer(200, json.dumps({"kind": "List", "metadata": meta, "items": items}).encode())

    def watch(self, path: str, query: dict[str, str]) -> None:
        api = self.api
        fault = api.faults.pop(0) if api.faults else ""
        if fault == "410":
            return self.fail(410, "Expired")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if fault == "close":
            self.send_header("Connection", "close")
            self.end_headers()
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        send: dict[str, Callable[[], None]] = {
            "410 event": lambda: self.event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired"}),
            "500 event": lambda: self.event("ERROR", {"kind": "Status", "code": 500, "message": "no progress"}),
            "garbage": lambda: self.chunk(b'{"type": "ADD\xff\xfe}\n'),
            "no object": lambda: self.chunk(b'{"type": "ADDED", "object": [1]}\n'),
            "no name": lambda: self.event("ADDED", {"metadata": {"resourceVersion": "1"}}),
            "unknown type": lambda: self.event("RENAMED", {"metadata": {"name": "x", "resourceVersion": "1"}}),
            "half": lambda: self.chunk(b'{"type": "ADDED", "object": {"meta'),
            "": lambda: None,
        }
        if fault in send:
            send[fault]()
        if fault in ("half", "cut"):
            self.close_connection = True
            return
        if fault == "end":
            self.chunk(b"")
            return
        seen, cut = int(query["resourceVersion"]), api.cut
        end = time.monotonic() + float(query["timeoutSeconds"])
        while time.monotonic() < end:
            with api.changed:
                news = [e for e in api.history if e[0] > seen and e[2].rpartition("/")[0] == path]
                if fault == "stall":
                    news = []
                if not news:
                    api.changed.wait(min(0.1, max(0.0, end - time.monotonic())))
            if api.cut != cut:
                self.close_connection = True
                return
            for version, kind, _, found in news:
                self.event(kind, found)
                seen = version
        self.event("BOOKMARK", {"metadata": {"resourceVersion": str(max(seen, api.version))}})
        self.chunk(b"")

    def event(self, kind: str, found: Object) -> None:
        self.chunk(json.dumps({"type": kind, "object": found}).encode() + b"\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def fail(self, code: int, reason: str) -> None:
        body = {"kind": "Status", "code": code, "reason": reason, "message": f"told to say {reason}"}
        self.answer(code, json.dumps(body).encode())

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        drip = (headers or {}).get("Drip")
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = "Content-Length" in (headers or {})  # a wrong one
        for part in (data[n : n + 1] for n in range(len(data))) if drip else (data,):
            self.wfile.write(part)
            time.sleep(float(drip or 0))


def _common_name(connection: Any) -> str:
    """The name in the client's certificate, "" where it shows none."""
    certificate = connection.getpeercert() or {}
    return next((value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"), "")


def _merge(old: Any, new: Any) -> Any:
    """RFC 7396."""
    if not isinstance(new, dict):
        return new
    made = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = _merge(made.get(key), value)
    return made
