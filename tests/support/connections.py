"""TCP between any two network namespaces: servers that tell a client as whom they see it, and many clients at once.

A namespace is named as `ip netns` names it, or by a path such as /proc/PID/ns/net.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from ovsmesh.lab import netns
from tests.support.needs import needs

NO_ANSWER = "no answer"
_ERRORS = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EACCES: "unreachable",
}


FAILURES = (NO_ANSWER, "refused", "unreachable", "closed")


class Attempt(NamedTuple):
    """One connection: from a namespace to an address and port, with a source address if `source` is not empty."""

    ns: str
    address: str
    port: int
    source: str = ""


@needs("lab")
class Servers:
    """TCP servers in many namespaces, in one thread. Each writes the address of its client and hangs up."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, name="servers", daemon=True)
        self._thread.start()

    def listen(self, ns: str, ports: Iterable[int]) -> None:
        """Listen on these ports of all addresses, of both families, until `close` or the namespace's end."""

        def make() -> list[socket.socket]:
            return [
                socket.create_server(("::", p), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512) for p in ports
            ]

        made = netns.within(ns, make)
        with self._lock:
            for server in made:
                server.setblocking(False)
                self._open.append(server)
                self._selector.register(server, selectors.EVENT_READ)
        self._wake.send(b".")

    def forget(self) -> None:
        """Stop listening everywhere; a container that is started again has another namespace."""
        with self._lock:
            for server in self._open:
                self._selector.unregister(server)
                server.close()
            self._open.clear()

    def close(self) -> None:
        """End the thread."""
        self.forget()
        self._wake.close()
        self._thread.join(10)
        self._woken.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._woken:
                        if not sock.recv(1):
                            return
                    elif sock.fileno() >= 0:
                        self._answer(sock)

    def _answer(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            peer, about = server.accept()
            with peer:
                peer.sendall(about[0].encode())


def connect(attempts: Sequence[Attempt], seconds: float) -> list[str]:
    """Make all connections at once; return for each as whom the server saw it, or what became of it instead.

    That is "no answer" after so many seconds, "refused", "unreachable", or "closed" without a word.
    """
    results = [NO_ANSWER] * len(attempts)
    selector = selectors.DefaultSelector()
    by_ns: dict[str, list[int]] = {}
    for number, attempt in enumerate(attempts):
        by_ns.setdefault(attempt.ns, []).append(number)
    left = 0
    for ns, numbers in by_ns.items():
        dialled = netns.within(ns, functools.partial(_dial, attempts, numbers, results))
        for number, sock in zip(numbers, dialled, strict=True):
            if sock is not None:
                selector.register(sock, selectors.EVENT_WRITE, number)
                left += 1
    end = time.monotonic() + seconds
    while left and (rest := end - time.monotonic()) > 0:
        for key, _ in selector.select(rest):
            made, number = key.fileobj, key.data
            assert isinstance(made, socket.socket)
            dialling = key.events == selectors.EVENT_WRITE
            failed = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if dialling else 0
            if dialling and not failed:
                selector.modify(made, selectors.EVENT_READ, number)
                continue
            results[number] = _failure(failed) if failed else _word(made)
            selector.unregister(made)
            made.close()
            left -= 1
    for key in list(selector.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    selector.close()
    return results


def _dial(attempts: Sequence[Attempt], numbers: Sequence[int], results: list[str]) -> list[socket.socket | None]:
    made: list[socket.socket | None] = []
    for number in numbers:
        attempt = attempts[number]
        sock = socket.socket(socket.AF_INET6 if ":" in attempt.address else socket.AF_INET)
        sock.setblocking(False)
        try:
            if attempt.source:
                sock.bind((attempt.source, 0))
            failed = sock.connect_ex((attempt.address, attempt.port))
        except OSError as error:
            failed = error.errno or 0
        if failed in (0, errno.EINPROGRESS):
            made.append(sock)
        else:
            sock.close()
            made.append(None)
            results[number] = _failure(failed)
    return made


def _failure(number: int) -> str:
    return _ERRORS.get(number) or errno.errorcode.get(number, str(number))


def _word(sock: socket.socket) -> str:
    try:
        text = sock.recv(100).decode()
    except OSError as error:
        return _ERRORS.get(error.errno or 0, "closed")
    if not text:
        return "closed"
    seen = ip_address(text.partition("%")[0])
    return str(getattr(seen, "ipv4_mapped", None) or seen)
