"""Ask ovs-vswitchd which ports its datapaths have, as nothing in the database tells it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

TIMEOUT = 5.0
"""Seconds; a few milliseconds are usual."""
_PORT = re.compile(r"^\s+port \d+: \S+ \((\w+)")


def port_types(run_dir: Path) -> frozenset[str] | None:
    """Return the types of all ports of all datapaths, such as "internal", "tap" and "gre"; None if it is not told."""
    try:
        done = subprocess.run(
            ["ovs-appctl", "--timeout=5", "dpctl/show"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env=os.environ | {"OVS_RUNDIR": str(run_dir)},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return frozenset(found[1] for line in done.stdout.splitlines() if (found := _PORT.match(line)))
