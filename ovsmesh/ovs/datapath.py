"""Ask ovs-vswitchd which ports its datapaths have, as nothing in the database tells it."""

from __future__ import annotations

import re
from pathlib import Path

from ovsmesh.ovs.json_rpc import ask_switch

_PORT = re.compile(r"^\s+port \d+: \S+ \((\w+)")


def port_types(run_dir: Path) -> frozenset[str] | None:
    """Return the types of all ports of all datapaths, such as "internal", "tap" and "gre"; None if it is not told."""
    shown = ask_switch(run_dir, "dpctl/show")
    if shown is None:
        return None
    return frozenset(found[1] for line in shown.splitlines() if (found := _PORT.match(line)))
