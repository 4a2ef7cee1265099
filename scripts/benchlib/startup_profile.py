"""Run `agent --once` in this process, time each part, and print the seconds by part as JSON.

A program of its own: `startup_profile.py START MESH NODE OVSDB STATE_DIR`, where START is the CLOCK_MONOTONIC second
at which it was started. A part's seconds do not contain those of the parts inside it.
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


def _timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
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
    ("netlink messages and their echo", "ovsmesh.agent.apply", "Apply._kernel_tables"),
    ("log", "ovsmesh.agent.reconciler", "Reconciler._count_steps"),
)


def instrument() -> None:
    """Time the calls of each part from now on. Raises AttributeError where a part no longer exists."""
    for part, module, path in _PARTS:
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for step in classes:
            owner = getattr(owner, step)
        setattr(owner, name, _timed(part, getattr(owner, name)))


def main() -> None:
    """Run the agent once and print the seconds of each part."""
    start, *options = sys.argv[1:]
    began = time.monotonic()
    seconds["python"] = began - float(start)
    agent = importlib.import_module("ovsmesh.agent.main")
    importlib.import_module("ovsmesh.cli.main")
    seconds["imports"] = time.monotonic() - began
    instrument()
    result = _timed("the rest", agent.once)(importlib.import_module("ovsmesh.agent.options").Options(*options))
    if not result.converged:
        sys.exit(f"not converged: {'; '.join(map(str, result.problems))}")
    print(json.dumps(dict(seconds) | {"the whole run": time.monotonic() - float(start)}))


if __name__ == "__main__":
    main()
