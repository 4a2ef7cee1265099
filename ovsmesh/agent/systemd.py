"""Tell systemd that the agent is ready, alive, what it does, and that it stops (sd_notify(3)).

The loop calls it in the thread that has every effect, so a watchdog that is fed means a loop that runs. Without
systemd, or with a NOTIFY_SOCKET where nobody listens, it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

from ovsmesh.agent.result import NodeStatus, ReconcileResult, peers_text
from ovsmesh.text import printable

_TEXT = 200
"""Characters of a status line."""


class SystemdNotifier:
    """A Publisher. It removes the variables that it reads from the environment, so that no child process has them."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address, usec, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        # "@" is the abstract namespace; vsock addresses are for virtual machines
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "\0")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        for_us = pid in ("", str(os.getpid()))
        self._beat = int(usec) / 2e6 if usec.isascii() and usec.isdigit() and for_us else 0.0
        """Seconds between signs of life; 0 for none."""
        self._beaten = float("-inf")
        self._ready = False
        self._line = ""

    def publish(self, status: NodeStatus) -> None:
        """Say that the agent is ready, and what it does."""
        # ready after the first attempt, whether it succeeded or not: units that are ordered after the agent must
        # start also while it waits for an address
        line = status_line(status.result)
        text = f"STATUS={line}" if self._ready else f"READY=1\nSTATUS={line}"
        if (not self._ready or line != self._line) and self._send(text):
            self._ready, self._line = True, line
        self.idle()

    def idle(self) -> None:
        """Feed the watchdog when that is due."""
        if self._beat and time.monotonic() - self._beaten >= self._beat and self._send("WATCHDOG=1"):
            self._beaten = time.monotonic()

    def close(self) -> None:
        """Say that the agent stops."""
        if self._socket is not None:
            self._send("STOPPING=1\nSTATUS=stopping; what is in place stays")
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> bool:
        if self._socket is None:
            return False
        # a socket that is absent or full: sent again after the next reconcile
        with contextlib.suppress(OSError, ValueError):
            self._socket.sendto(text.encode(errors="replace"), self._address)
            return True
        return False


def status_line(result: ReconcileResult) -> str:
    """Return a result in one line, as `systemctl status` shows it."""
    if result.mesh is None or result.want is None:
        said = "no mesh yet" if result.mesh is None else "the last reconcile failed"
    else:
        said = f"{peers_text(result.want)}, {'converged' if result.converged else 'not converged'}"
    problem = next((str(p) for p in result.problems if p.fatal), "") or next(map(str, result.plan.blocked), "")
    text = f"{said}; {problem}" if problem else said
    # a line end in a name could begin READY=1
    return printable(text, _TEXT, " ")
