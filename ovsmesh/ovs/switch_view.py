"""Ask the switch about obr0: what its flows and its tunnel port have counted, and which flow takes a packet."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ovsmesh.dataplane.types import COOKIE, OBR
from ovsmesh.text import printable

_TIMEOUT = 5.0
"""Seconds for one tool; a switch that has let one wait so long is not asked again."""
_FLOW = re.compile(
    r"cookie=(0x[0-9a-f]+|0),.*? table=(\d+), n_packets=(\d+),.*? (?:priority=(\d+),?)?(\S*) actions=(\S*)"
)
_PORT = re.compile(r"port\s+\"?([^\":]+)\"?: rx pkts=(\d+|\?),.*\n\s+tx pkts=(\d+|\?),")
_PICKED = re.compile(r"^ ?\d+\. (.*?)(?:, cookie (0x[0-9a-f]+))?$", re.MULTILINE)


class Counted(NamedTuple):
    """What obr0 had counted at one moment."""

    flows: Mapping[str, int]
    """Key of a managed flow, as in Dataplane.flows, with port names → packets."""
    ports: Mapping[str, tuple[int, int]]
    """Port → packets received and sent."""


class SwitchView:
    """obr0 of the switch whose sockets are in `run_dir`. `ports` are OpenFlow numbers by name."""

    def __init__(self, run_dir: Path, ports: Mapping[str, int]) -> None:
        self._dir = run_dir
        self._ports = ports
        self._hung = False
        self._names = {str(number): name for name, number in ports.items()}
        self._bridge = f"unix:{run_dir / f'{OBR}.mgmt'}"

    def _run(self, *argv: str) -> str | None:
        if self._hung:
            return None
        try:
            env = os.environ | {"OVS_RUNDIR": str(self._dir)}
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, env=env, check=False
            )
        except subprocess.TimeoutExpired:
            self._hung = True
            return None
        except OSError:
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    def counted(self) -> Counted | None:
        """Return what is counted now; None where the switch does not answer."""
        flows = self._run("ovs-ofctl", "--no-names", "dump-flows", self._bridge)
        ports = self._run("ovs-ofctl", "--no-names", "dump-ports", self._bridge)
        if flows is None or ports is None:
            return None
        counts = {}
        for cookie, table, packets, priority, match, _ in _FLOW.findall(flows):
            if int(cookie, 16) == COOKIE and table == "0":
                fields = [self._named(field) for field in sorted(match.split(",")) if field]
                counts[f"{priority or 32768} {','.join(sorted(fields))}"] = int(packets)
        numbers = {}
        for port, received, sent in _PORT.findall(ports):
            if received != "?" and sent != "?":
                numbers[self._names.get(port.strip(), port.strip())] = int(received), int(sent)
        return Counted(counts, numbers)

    def _named(self, field: str) -> str:
        name, _, value = field.partition("=")
        return f"in_port={self._names.get(value, value)}" if name == "in_port" else field

    def picked(self, flow: str) -> tuple[str, int | None] | None:
        """Return the flow that takes a packet, and its cookie, by ofproto/trace; None where that can't be asked.

        `flow` names ports by number.
        """
        # one that was killed leaves its socket behind
        sockets = sorted(self._dir.glob("ovs-vswitchd.*.ctl"), key=lambda path: path.lstat().st_mtime)
        if not sockets:
            return None
        text = self._run("ovs-appctl", "-t", str(sockets[-1]), "-T", "5", "ofproto/trace", OBR, flow)
        found = _PICKED.search(text or "")
        if found is None:
            return None
        return printable(found[1], 120), int(found[2], 16) if found[2] else None

    def number(self, port: str) -> int | None:
        """Return the OpenFlow number of a port."""
        return self._ports.get(port)
