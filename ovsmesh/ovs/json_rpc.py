"""One request to a process of Open vSwitch (RFC 7047, section 4; unixctl, as ovs-appctl speaks it), with a deadline."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

DEADLINE = 1.0
"""Seconds for an answer: the counters of a thousand ports take 0.02."""
_MOST = 64 << 20
"""Bytes of an answer."""


def ask_switch(run_dir: Path, command: str) -> str | None:
    """Return what ovs-vswitchd answers to a command, as ovs-appctl would print it; None without an answer."""
    # one that was killed leaves its socket behind
    for path in sorted(run_dir.glob("ovs-vswitchd.*.ctl")):
        answer = request(str(path), command, [])
        if isinstance(answer, str):
            return answer
    return None


def request(path: str, method: str, params: list[Any]) -> Any:
    """Return the result of one JSON-RPC request; None where there is no usable answer in time."""
    asked = json.dumps({"id": 0, "method": method, "params": params}).encode()
    end = time.monotonic() + DEADLINE
    data = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(DEADLINE)
            link.connect(path)
            link.sendall(asked)
            while len(data) < _MOST:
                link.settimeout(max(0.001, end - time.monotonic()))
                part = link.recv(1 << 20)
                data += part
                # only an answer that may be whole is parsed
                if part.endswith(b"}"):
                    with contextlib.suppress(ValueError, RecursionError):
                        answer = json.loads(data)
                        return answer.get("result") if isinstance(answer, dict) else None
                if not part:
                    return None
    except OSError:
        return None
    return None
