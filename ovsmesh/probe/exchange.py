"""Exchange the rows of the matrix with the agents of the peers, over the mesh: gateway to gateway, over TCP.

Each agent answers `GET /row.json` on its gateway addresses. The kernel drops, without an answer, what does not come
in on kbr0 from a gateway of a peer, or was forwarded on the way: both sides send with a TTL of 255, and accept
nothing less (RFC 5082). So pods, containers behind a peer's masquerade and strangers are not heard, on
hosts without nf_tables too. Rows are asked for only when somebody asks for the matrix.
"""

from __future__ import annotations

import errno
import heapq
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from ovsmesh.bpf import attach
from ovsmesh.dataplane.report import Report
from ovsmesh.dataplane.types import Facts
from ovsmesh.mesh.manifest import digest
from ovsmesh.mesh.types import IPAddress, Mesh
from ovsmesh.names import KBR, ROW_PORT
from ovsmesh.probe import matrix
from ovsmesh.probe.matrix import Row, RowError
from ovsmesh.probe.row_socket import answer_program, listener, new_socket
from ovsmesh.probe.targets import Target, targets
from ovsmesh.wakeup import Wakeup

log = logging.getLogger("ovsmesh")

COLLECT_TIME = 2.0
"""Seconds after which a collection ends, whoever has not answered."""
_CACHE = 3.0
"""Seconds for which a matrix is good, so that a page that many look at asks the peers no more often."""
_ROW_CACHE = 1.0
_OTHER_FAMILY = 0.5
"""Seconds until the next of a peer's addresses is tried too."""
_AT_ONCE = 64
"""Peers that are asked at the same time."""
_CONNECTIONS, _OF_ONE = 64, 2
"""Connections that are served at the same time: in all, and of one peer."""
_REQUEST_BYTES, _REQUEST_TIME = 1024, 2.0
_REQUEST = b"GET /row.json%s HTTP/1.0\r\nHost: gateway\r\n\r\n"
_NAMES_BYTES = 900
"""Of the names of peers in a request."""
_IP_BIND_ADDRESS_NO_PORT = 24
"""From Linux's in.h."""
_MORE_TIME = 1.0
"""Seconds for the second question in a large mesh: what was found of those that did not answer the first."""


# Serving the own row


@dataclass
class _Client:
    sock: socket.socket
    source: str
    end: float
    request: bytes = b""
    answer: memoryview | None = None


_Gateways = Mapping[IPAddress, frozenset[IPAddress]]
"""This node's gateway → the gateways of the peers that may ask there."""


class RowServer:
    """Answers the agents of peers with what `row` returns, in a thread of its own. At rest it only waits.

    `row` is called with the names of the peers whose cells are wanted; with none for a whole row.
    """

    def __init__(self, row: Callable[[Collection[str]], bytes | None]) -> None:
        self._row = row
        self._wanted: tuple[int, _Gateways] = (0, {})
        self._listeners: dict[int, tuple[socket.socket, frozenset[str]]] = {}
        self._clients: dict[int, _Client] = {}
        self._poll = select.poll()
        self._wakeup = Wakeup()
        self._poll.register(self._wakeup.fd, select.POLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def update(self, gateways: _Gateways) -> None:
        """Listen on these addresses from now on; on none while there is no kbr0."""
        try:
            wanted = socket.if_nametoindex(KBR), gateways
        except OSError:
            wanted = 0, {}
        if wanted != self._wanted:
            self._wanted = wanted
            self._wakeup.wake()

    def close(self) -> None:
        """Stop, within a second."""
        self._stopping = True
        self._wakeup.wake()
        self._thread.join(1.0)
        self._close_all()
        self._wakeup.close()

    def _listen(self, device: int, gateways: _Gateways) -> None:
        self._close_all()
        for address, peers in gateways.items():
            try:
                sock = listener(address, peers, device)
            except OSError as error:
                log.warning("no row of the matrix is served on %s port %d: %s", address, ROW_PORT, error.strerror)
                continue
            self._listeners[sock.fileno()] = sock, frozenset(map(str, peers))
            self._poll.register(sock, select.POLLIN)

    def _close_all(self) -> None:
        for fd, (sock, _) in self._listeners.items():
            self._poll.unregister(fd)
            sock.close()
        self._listeners.clear()
        for client in list(self._clients.values()):
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.sock.fileno()]
        self._poll.unregister(client.sock)
        client.sock.close()

    def _run(self) -> None:
        listening: tuple[int, _Gateways] = (0, {})
        while not self._stopping:
            if listening is not self._wanted:
                listening = self._wanted
                self._listen(*listening)
            pause = min((client.end for client in self._clients.values()), default=None)
            for fd, _ in self._poll.poll(None if pause is None else max(0.0, pause - time.monotonic()) * 1000 + 1):
                if fd == self._wakeup.fd:
                    self._wakeup.clear()
                elif fd in self._listeners:
                    self._accept(*self._listeners[fd])
                elif fd in self._clients:
                    self._serve(self._clients[fd])
            now = time.monotonic()
            for client in [client for client in self._clients.values() if client.end <= now]:
                self._drop(client)

    def _accept(self, listener: socket.socket, peers: frozenset[str]) -> None:
        try:
            sock, sender = listener.accept()
        except OSError:
            return
        source = str(sender[0])
        same = sum(client.source == source for client in self._clients.values())
        if source not in peers or same >= _OF_ONE or len(self._clients) >= _CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(sock, source, time.monotonic() + _REQUEST_TIME)
        self._poll.register(sock, select.POLLIN)

    def _serve(self, client: _Client) -> None:
        try:
            if client.answer is None:
                part = client.sock.recv(_REQUEST_BYTES)
                client.request += part
                if not part or len(client.request) > _REQUEST_BYTES:
                    self._drop(client)
                    return
                if b"\r\n\r\n" not in client.request:
                    return
                client.answer = memoryview(self._answer(client.request))
                self._poll.modify(client.sock, select.POLLOUT)
            client.answer = client.answer[client.sock.send(client.answer) :]
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if not client.answer:
            self._drop(client)

    def _answer(self, request: bytes) -> bytes:
        code, body = "404 Not Found", b""
        method, path, *_ = (*request.decode(errors="replace").split(None, 2), "", "")
        path, _, query = path.partition("?")
        if (method, path) == ("GET", "/row.json"):
            row = self._row(frozenset(map(unquote, filter(None, query.split("&")))))
            code, body = ("503 Service Unavailable", b"") if row is None else ("200 OK", row)
        head = f"HTTP/1.0 {code}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


# Asking for the rows of the peers


class _Question:
    """One connection to a peer's gateway."""

    def __init__(self, name: str, path: Target, request: bytes) -> None:
        self.name, self.request = name, request
        self.data = bytearray()
        self.sock = new_socket(path.destination.version)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, KBR.encode())
            self.sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            # ends without the last words of TCP, which the kernel says with a usual TTL
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            attach(self.sock, answer_program(path.destination.version))
            self.sock.bind((str(path.source), 0))
            self.sock.connect_ex((str(path.destination), ROW_PORT))
        except BaseException:
            self.sock.close()
            raise

    def proceed(self, limit: int) -> bool:
        """Send and receive what is possible now. Return whether the peer has said all. Raise OSError."""
        if self.request:
            self.request = self.request[self.sock.send(self.request) :]
            return False
        while True:
            part = self.sock.recv(65536)
            if not part:
                return True
            self.data += part
            if len(self.data) > limit:
                raise OSError(errno.EMSGSIZE, "sends too much")

    def body(self) -> bytes | None:
        """Return the row; None where it is not whole."""
        head, _, body = bytes(self.data).partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        if not (lines[0].startswith(b"HTTP/1.") and lines[0][8:].startswith(b" 200 ")):
            return None
        return body if b"Content-Length: %d" % len(body) in lines else None


def ask(
    paths: Mapping[str, Sequence[Target]], limit: int, seconds: float = COLLECT_TIME, about: Collection[str] = ()
) -> dict[str, bytes]:
    """Return what the peers answered within `seconds`, by name. Those named first are asked first.

    `about`: ask for their cells of these peers only.
    """
    request = _REQUEST % ("?" * bool(about) + "&".join(quote(name, safe="") for name in about)).encode()
    start = time.monotonic()
    waiting = [
        (start + n * _OTHER_FAMILY, order, name, path)
        for order, (name, ways) in enumerate(paths.items())
        for n, path in enumerate(ways)
    ]
    heapq.heapify(waiting)
    found: dict[str, bytes] = {}
    asked: dict[int, _Question] = {}
    poll = select.poll()

    def end(question: _Question) -> None:
        poll.unregister(question.sock)
        del asked[question.sock.fileno()]
        question.sock.close()

    try:
        while (now := time.monotonic()) < start + seconds and (asked or waiting):
            while waiting and waiting[0][0] <= now and len(asked) < _AT_ONCE:
                _, _, name, path = heapq.heappop(waiting)
                if name in found:
                    continue
                try:
                    question = _Question(name, path, request)
                except OSError as error:
                    log.debug("row of %s: %s", name, error)
                    continue
                asked[question.sock.fileno()] = question
                poll.register(question.sock, select.POLLOUT)
            until = start + seconds
            if waiting and len(asked) < _AT_ONCE:
                until = min(until, waiting[0][0])
            for fd, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000 + 1):
                question = asked[fd]
                try:
                    done = question.proceed(limit)
                except BlockingIOError:
                    done = False
                except OSError as error:
                    log.debug("row of %s: %s", question.name, error)
                    end(question)
                    continue
                if not done:
                    poll.modify(fd, select.POLLOUT if question.request else select.POLLIN)
                    continue
                body = question.body()
                if body is not None:
                    found.setdefault(question.name, body)
                end(question)
    finally:
        for question in list(asked.values()):
            end(question)
    return found


def collect(mesh: Mesh, paths: Mapping[str, Sequence[Target]], own: Row | None, last: dict[str, Row]) -> dict[str, Any]:
    """Return the matrix, as /matrix.json holds it. `last` keeps each peer's last row, without cells, from call to call.

    Without `own` this node counts as one whose agent does not answer.
    """
    lost = {cell.peer: matrix.badness(cell) for cell in own.cells} if own else {}
    # the ones that are most likely to answer first: time may run out
    order = sorted(paths, key=lambda name: lost.get(name, (float("inf"),)), reverse=True)
    limit = matrix.most_bytes(len(mesh.nodes)) + _REQUEST_BYTES
    answers = ask({name: paths[name] for name in order}, limit)
    now, names = time.time(), matrix.known(mesh)
    rows = _parsed(answers, names, now) | ({own.node: own} if own else {})
    if not all(row.complete for row in rows.values()):
        silent = _fitting(names.nodes - rows.keys())
        known = {name: paths[name] for name in order if name in answers}
        more = _parsed(ask(known, limit, _MORE_TIME, silent), names, now) if silent else {}
        rows |= {name: rows[name].plus(row.cells) for name, row in more.items() if name in rows}
    if own:
        rows[own.node] = own.worst(len(mesh.nodes)).plus(own.about(names.nodes - rows.keys()).cells)
    for name in last.keys() - names.nodes:
        del last[name]
    last.update({name: replace(row, cells=(), counts={}, zones={}) for name, row in rows.items()})
    return matrix.matrix(mesh, own.mesh_digest if own else digest(mesh), rows, last, now)


def _parsed(answers: Mapping[str, bytes], names: matrix.Known, now: float) -> dict[str, Row]:
    rows = {}
    for name, data in answers.items():
        try:
            rows[name] = matrix.parse(data, name, names, now)
        except RowError as error:
            log.warning("the row of %s is not used: it %s", name, error)
    return rows


def _fitting(names: Collection[str]) -> list[str]:
    """Return those that fit one request."""
    found, length = [], 0
    for name in sorted(names):
        length += len(quote(name, safe="")) + 1
        if length <= _NAMES_BYTES:
            found.append(name)
    return found


class Exchange:
    """Serves this node's row to its peers, and collects theirs when somebody asks for the matrix."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._collecting = threading.Lock()
        self._making = threading.Lock()
        self._mesh: Mesh | None = None
        self._facts: Facts | None = None
        self._paths: Mapping[str, Sequence[Target]] = {}
        self._gateways: _Gateways = {}
        self._report: Callable[[], Report] | None = None
        self._row: tuple[float, Row] | None = None
        self._encoded: tuple[Row, bytes] | None = None
        self._last: dict[str, Row] = {}
        self._made: tuple[float, Mesh, dict[str, Any]] | None = None
        self._server = RowServer(self._serve)

    def update(self, mesh: Mesh | None, facts: Facts | None, report: Callable[[], Report]) -> None:
        """Take in the mesh in force and what makes this node's report. Nothing is served without a mesh."""
        if mesh is not self._mesh or facts != self._facts:
            paths = targets(mesh, self._node, facts) if mesh and facts else {}
            gateways: dict[IPAddress, set[IPAddress]] = {}
            for ways in paths.values():
                for path in ways:
                    gateways.setdefault(path.source, set()).add(path.destination)
            self._gateways = {own: frozenset(peers) for own, peers in gateways.items()}
            self._mesh, self._facts, self._paths = mesh, facts, paths
        self._report = report
        self._server.update(self._gateways)

    def idle(self) -> None:
        """Forget a matrix that is too old to be shown: that of a thousand nodes has 15 MB."""
        made = self._made
        if made is not None and time.monotonic() - made[0] > _CACHE:
            self._made = None

    def close(self) -> None:
        """Stop serving."""
        self._server.close()

    def _own(self) -> Row | None:
        mesh, report = self._mesh, self._report
        if mesh is None or report is None:
            return None
        with self._making:
            now = time.monotonic()
            if self._row is None or now - self._row[0] > _ROW_CACHE:
                self._row = now, matrix.row(report(), mesh)
            return self._row[1]

    def _serve(self, about: Collection[str]) -> bytes | None:
        own, mesh = self._own(), self._mesh
        if own is None or mesh is None:
            return None
        if about:
            return own.about(about).worst(len(mesh.nodes)).encode()
        if self._encoded is None or self._encoded[0] is not own:
            self._encoded = own, own.worst(len(mesh.nodes)).encode()
        return self._encoded[1]

    def matrix(self) -> dict[str, Any] | None:
        """Return the matrix of all nodes, for JSON; None without a mesh. Takes COLLECT_TIME at most, and is cached."""
        with self._collecting:
            mesh, own = self._mesh, self._own()
            if mesh is None or own is None or mesh.node(self._node) is None:
                return None
            made = self._made
            if made is None or made[1] is not mesh or time.monotonic() - made[0] > _CACHE:
                found = collect(mesh, self._paths, own, self._last)
                self._made = made = time.monotonic(), mesh, found
            return made[2]
