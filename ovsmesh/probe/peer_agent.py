"""Ask the agent of a peer how it is, over the mesh, as agents ask each other for the rows of the matrix."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.names import KBR, ROW_PORT
from ovsmesh.probe import exchange, matrix
from ovsmesh.probe.targets import Target
from ovsmesh.text import printable

_TIMEOUT = 1.0
"""Seconds for a peer that is up to accept or refuse a connection."""
_HOPS6 = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
_BYTES = 1024
"""Of the head of an answer."""


def ask_agent(mesh: Mesh, peer: Node, paths: Sequence[Target]) -> tuple[str, str]:
    """Return how the peer's agent is ("ok", "unknown", or what is wrong with it), and its headline."""
    if not paths:
        return "unknown", ""
    answers = exchange.ask({peer.name: paths}, matrix.most_bytes(len(mesh.nodes)) + _BYTES, _TIMEOUT)
    if peer.name in answers:
        try:
            row = matrix.parse(answers[peer.name], peer.name, matrix.known(mesh), time.time())
        except matrix.RowError as error:
            return f"its answer {error}", ""
        return "ok", printable(row.headline)
    return _why(paths[0]), ""


def _why(path: Target) -> str:
    """Return why it has not answered, as far as a connection tells."""
    family = socket.AF_INET if path.destination.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_TIMEOUT)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, KBR.encode())
            # it hears nothing that may have been forwarded
            hops = (socket.IPPROTO_IP, socket.IP_TTL) if family == socket.AF_INET else _HOPS6
            sock.setsockopt(*hops, 255)
            sock.bind((str(path.source), 0))
            sock.connect((str(path.destination), ROW_PORT))
        except ConnectionRefusedError:
            return f"not running, or older than this one: {path.destination} refuses port {ROW_PORT}"
        except OSError:
            return "unknown"
    return f"hung: it accepts at {path.destination} port {ROW_PORT}, and does not answer"
