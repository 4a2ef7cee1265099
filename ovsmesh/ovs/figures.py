"""Ask Open vSwitch for figures, each by one request with a deadline: what its ports have counted, its version.

The replica leaves the counters out, as ovs-vswitchd writes all of them every five seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from ovsmesh.dataplane.report import Traffic
from ovsmesh.ovs.idl import run_dir
from ovsmesh.ovs.json_rpc import ask_switch, request
from ovsmesh.text import printable

_KEPT = 2.0
"""Seconds for which figures are good; ovs-vswitchd counts every five."""
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
        answer = (ask_switch(self._folder, "version") or "").strip()
        # "ovs-vswitchd (Open vSwitch) 3.1.0"
        return printable(answer.splitlines()[0].rpartition(" ")[2], 32) if answer else ""

    def _traffic(self) -> dict[str, Traffic]:
        answer = request(self._path, "transact", ["Open_vSwitch", _COUNTERS])
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
