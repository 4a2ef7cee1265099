"""Runs `agent --once` in this process with a clock around each room, and prints seconds by part as JSON.

A program of its own: `split.py START MESH NODE OVSDB STATE_DIR`, where START is the CLOCK_MONOTONIC
second at which it was started. A part's seconds leave out those of the parts inside it.
"""

import functools
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

seconds: defaultdict[str, float] = defaultdict(float)
_running: list[list[Any]] = []


def _clocked(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any, **options: Any) -> Any:
        begun = time.monotonic()
        _running.append([part, 0.0])
        try:
            return call(*args, **options)
        finally:
            took = time.monotonic() - begun
            inner = _running.pop()[1]
            seconds[part] += took - inner
            if _running:
                _running[-1][1] += took

    return timed


_PARTS = (
    ("mesh file", "ovsmesh.mesh.file_source", "FileSource.snapshot"),
    ("desired", "ovsmesh.dataplane.desired", "dataplane"),
    ("plan", "ovsmesh.agent.reconciler", "plan"),
    ("OVSDB connect", "ovsmesh.ovs.ovsdb", "Ovs.connect"),
    ("OVSDB and ovs-vswitchd", "ovsmesh.ovs.ovsdb", "Ovs.apply"),
    ("flows", "ovsmesh.ovs.openflow", "FlowTable.apply"),
    ("nft", "ovsmesh.linux.firewall", "Firewall.apply"),
    ("netlink", "ovsmesh.linux.netlink", "Netlink.batch"),
    ("read OVSDB", "ovsmesh.ovs.ovsdb", "Ovs.observe"),
    ("read flows", "ovsmesh.ovs.openflow", "FlowTable.observe"),
    ("read nft", "ovsmesh.linux.firewall", "Firewall.observe"),
    ("read nft", "ovsmesh.linux.firewall", "Firewall.forward_drop"),
    ("read nft", "ovsmesh.linux.firewall", "Firewall.missing"),
    ("read kernel", "ovsmesh.linux.netlink", "Netlink.observe"),
    ("save mesh", "ovsmesh.mesh.file_source", "FileSource.commit"),
    ("netlink messages and their echo", "ovsmesh.agent.driver", "Driver._kernel"),
    ("log", "ovsmesh.agent.reconciler", "Reconciler._count"),
)


def main() -> None:
    start, *options = sys.argv[1:]
    began = time.monotonic()
    seconds["python"] = began - float(start)
    room = importlib.import_module("ovsmesh.agent.main")
    importlib.import_module("ovsmesh.cli.main")
    seconds["imports"] = time.monotonic() - began
    for part, module, path in _PARTS:
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for step in classes:
            owner = getattr(owner, step)
        if call := getattr(owner, name, None):
            setattr(owner, name, _clocked(part, call))
    turn = _clocked("the rest", room.once)(importlib.import_module("ovsmesh.agent.options").Options(*options))
    if not turn.converged:
        sys.exit(f"not converged: {'; '.join(map(str, turn.problems))}")
    print(json.dumps(dict(seconds) | {"the whole run": time.monotonic() - float(start)}))


if __name__ == "__main__":
    main()
