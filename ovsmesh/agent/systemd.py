"""Tells systemd how the agent is: ready, alive, what it is doing, about to stop (sd_notify(3)).

A Publisher like board: it is told of turns by the loop, in the thread that has every effect, so a
watchdog that is fed is a loop that turns. Without systemd, or with a NOTIFY_SOCKET that is nobody's,
it does nothing: no message of this kind is worth a packet. Imports turn only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

from ovsmesh.agent.result import NodeStatus, ReconcileResult, peers_text

_TEXT = 200
"""Characters of a status line."""


class SystemdNotifier:
    """`publish` and `flush` come from the loop. Takes what it reads out of the environment, for the children's sake."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address, usec, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        # "@" is the abstract namespace; of vsock and of relative paths sd_notify(3) knows nothing that concerns us
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "\0")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        ours = pid in ("", str(os.getpid()))
        self._beat = int(usec) / 2e6 if usec.isascii() and usec.isdigit() and ours else 0.0
        """Seconds between signs of life; 0 for none."""
        self._beaten = float("-inf")
        self._ready = False
        self._line = ""

    def publish(self, status: NodeStatus) -> None:
        # ready is "the loop runs, and did what could be done": a host that waits for a peer's name or for its
        # own address must not keep from starting what is ordered after it
        line = status_line(status.result)
        text = f"STATUS={line}" if self._ready else f"READY=1\nSTATUS={line}"
        if (not self._ready or line != self._line) and self._send(text):
            self._ready, self._line = True, line
        self.idle()

    def idle(self) -> None:
        if self._beat and time.monotonic() - self._beaten >= self._beat and self._send("WATCHDOG=1"):
            self._beaten = time.monotonic()

    def close(self) -> None:
        """The agent is about to end."""
        if self._socket is not None:
            self._send("STOPPING=1\nSTATUS=stopping; what is in place stays")
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> bool:
        if self._socket is None:
            return False
        # a socket that is gone, full or never was: said again at the next turn
        with contextlib.suppress(OSError, ValueError):
            self._socket.sendto(text.encode(errors="replace"), self._address)
            return True
        return False


def status_line(turn: ReconcileResult) -> str:
    """A turn in one line, as `systemctl status` shows it."""
    if turn.mesh is None or turn.want is None:
        said = "no mesh yet" if turn.mesh is None else "the last turn failed"
    else:
        said = f"{peers_text(turn.want)}, {'converged' if turn.converged else 'not converged'}"
    problem = next((str(p) for p in turn.problems if p.fatal), "") or next(map(str, turn.plan.blocked), "")
    text = f"{said}; {problem}" if problem else said
    # one line, or a name could say READY=1
    return "".join(c if c.isprintable() else " " for c in text)[:_TEXT]
