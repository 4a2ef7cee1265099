"""Ask Open vSwitch for figures, each by one request with a deadline: what its ports have counted, its version.

The replica leaves the counters out, as ovs-vswitchd writes all of them every five seconds.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ovsmesh.dataplane.report import Traffic
from ovsmesh.ovs.idl import run_dir
from ovsmesh.text import printable

_KEPT = 2.0
"""Seconds for which figures are good; ovs-vswitchd counts every five."""
_DEADLINE = 1.0
"""Seconds for an answer: the counters of a thousand ports take 0.02."""
_MOST = 64 << 20
"""Bytes of an answer."""
_ERRORS = ("rx_errors", "tx_errors", "rx_dropped", "tx_dropped")
_COUNTERS = {"op": "select", "table": "Interface", "where": [], "columns": ["name", "statistics"]}


class SwitchFigures(NamedTuple):
    """What ovs-vswitchd and its database tell beside the dataplane."""

    version: str = ""
    """Of ovs-vswitchd, as in "3.1.0"; "" where it does not answer."""
    traffic: Mapping[str, Traffic] = MappingProxyType({})
    """Port → what it has counted; no entry where that is not known."""


class SwitchReader:
    """Reads the figures when they are asked for, and again after a few seconds. Any thread may call it."""

    def __init__(self, remote: str) -> None:
        self._folder, self._path = run_dir(remote), remote.removeprefix("unix:")
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._figures = SwitchFigures()

    def __call__(self) -> SwitchFigures:
        """Return figures that are at most a few seconds old. Takes two seconds at most."""
        with self._lock:
            if time.monotonic() - self._read_at > _KEPT:
                self._figures = SwitchFigures(self._version(), self._traffic())
                self._read_at = time.monotonic()
            return self._figures

    def _version(self) -> str:
        """Ask the switch, as the database knows its version only where ovs-ctl has started it."""
        for socket_path in sorted(self._folder.glob("ovs-vswitchd.*.ctl")):
            answer = _request(str(socket_path), "version", [])
            if isinstance(answer, str) and answer.strip():
                # "ovs-vswitchd (Open vSwitch) 3.1.0"
                return printable(answer.splitlines()[0].rpartition(" ")[2], 32)
        return ""

    def _traffic(self) -> dict[str, Traffic]:
        answer = _request(self._path, "transact", ["Open_vSwitch", _COUNTERS])
        try:
            return {row["name"]: _traffic_of(dict(row["statistics"][1])) for row in answer[0]["rows"]}
        except (LookupError, TypeError, ValueError):
            return {}


def _traffic_of(counters: Mapping[str, int]) -> Traffic:
    errors = [counters[name] for name in _ERRORS if name in counters]
    return Traffic(
        counters.get("rx_packets"),
        counters.get("tx_packets"),
        counters.get("rx_bytes"),
        counters.get("tx_bytes"),
        sum(errors) if errors else None,
    )


def _request(path: str, method: str, params: list[Any]) -> Any:
    """Return the result of one JSON-RPC request (RFC 7047, section 4); None where there is no usable answer in time."""
    request = json.dumps({"id": 0, "method": method, "params": params}).encode()
    end = time.monotonic() + _DEADLINE
    data = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_DEADLINE)
            link.connect(path)
            link.sendall(request)
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
