"""Run a command in a container through the API server, as `kubectl exec` does, without a terminal and without input.

WebSocket (RFC 6455) over the connections that all requests use, so logins and proxies are the same. The API server's
subprotocol v4.channel.k8s.io puts a channel number before each message: 1 standard output, 2 standard error, 3 how it
ended.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import urllib3

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api, path_of
from ovsmesh.kube.http import Garbage, Unavailable, wire_errors

Sink = Callable[[bytes], object]

_MOST = 16 << 20
"""Bytes of one message: the kubelet sends 32 KiB."""
_SILENCE = 300.0
"""Seconds without a byte after which the command counts as lost."""
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUED, _CLOSE, _PING, _PONG = 0, 8, 9, 10


def run(api: Api, namespace: str, pod: str, container: str, argv: Sequence[str], out: Sink, err: Sink) -> int:
    """Run `argv` there, hand its output over as it comes, and return its exit status.

    Raises ApiError (NotFound, Forbidden, …), and OvsmeshError if the command can't be run there.
    """
    path = path_of("/api/v1/namespaces", namespace, "pods", pod, "exec")
    key = base64.b64encode(os.urandom(16)).decode()
    headers = {
        # the API server refuses any other here
        "Accept": "*/*",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Protocol": "v5.channel.k8s.io, v4.channel.k8s.io",
    }
    query = {"container": container, "command": list(argv), "stdout": "1", "stderr": "1"}
    response = api.upgrade(path, query, headers)
    try:
        accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()
        if response.headers.get("Sec-WebSocket-Accept") != accept:
            raise Garbage(f"{path}: what answers is no API server: it does not speak WebSocket")
        with wire_errors(f"{path}: the connection was cut before the command ended"):
            for message in _messages(response):
                channel, data = message[:1], message[1:]
                if channel == b"\1":
                    out(data)
                elif channel == b"\2":
                    err(data)
                elif channel == b"\3":
                    return _exit_status(data, argv[0], pod)
        raise Unavailable(f"{path}: the connection ended before the command did")
    finally:
        response.close()


def _exit_status(data: bytes, program: str, pod: str) -> int:
    """Return the exit status that the last message tells. Raises OvsmeshError."""
    try:
        status = json.loads(data)
        if status.get("status") == "Success":
            return 0
        causes = (status.get("details") or {}).get("causes") or ()
        for cause in causes:
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
        why = str(status.get("message"))[:500]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        why = f"{data[:200]!a}"
    raise OvsmeshError(f"{program} can't be run in pod {pod}: {why}")


def _messages(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Yield the messages until the server closes the connection."""
    # what came together with the answer's head is in its buffer already; urllib3 has no public way to that
    stream: IO[bytes] = response._fp.fp  # type: ignore[attr-defined]
    sock: Any = getattr(response.connection, "sock", None)
    if sock is None or stream is None:
        raise Unavailable("the connection was not kept")
    sock.settimeout(_SILENCE)
    message = b""
    while True:
        try:
            last, opcode, data = _frame(stream)
        except EOFError:
            return
        if opcode == _CLOSE:
            return
        if opcode == _PING:
            _send(sock, _PONG, data)
        elif opcode != _PONG:
            message = message + data if opcode == _CONTINUED else data
            if len(message) > _MOST:
                raise Garbage(f"a message of more than {_MOST} bytes")
            if last and message:
                yield message


def _frame(stream: IO[bytes]) -> tuple[bool, int, bytes]:
    """Read one frame: whether it is its message's last, its opcode, its data. Raises EOFError."""
    first, second = _exactly(stream, 2)
    length = second & 127
    if length == 126:
        (length,) = struct.unpack("!H", _exactly(stream, 2))
    elif length == 127:
        (length,) = struct.unpack("!Q", _exactly(stream, 8))
    if second & 128 or length > _MOST:
        raise Garbage("a frame that no server sends")
    return bool(first & 128), first & 15, _exactly(stream, length)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count) if count else b""
    if len(data) < count:
        raise EOFError
    return data


def _send(sock: socket.socket, opcode: int, data: bytes) -> None:
    """Send one short frame, masked as a client must."""
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(data[:125]))
    with contextlib.suppress(OSError):
        sock.sendall(bytes((128 | opcode, 128 | len(masked))) + mask + masked)
