"""The command line of the benches: which to run, progress, the table, the JSON.

A run makes labs of its own and ends them, also when it fails or is interrupted. The next run ends the labs of a run
that was killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib import (
    change,
    cold,
    detect,
    drift,
    kube_heartbeats,
    kube_joins,
    kube_outages,
    kube_scale,
    kube_watchers,
    restart,
    scale,
    steady,
)
from benchlib.figures import Figure, table
from benchlib.testbed import Plan
from ovsmesh import __version__
from ovsmesh.errors import OvsmeshError
from ovsmesh.lab.lab import end_orphans
from tests.support.binaries import BinariesError

Bench = Callable[[Plan], Iterable[Figure]]
BENCHES: dict[str, tuple[Bench, str]] = {
    "cold": (cold.bench, "start of the process to the last port, flow, route, neighbour and FDB entry"),
    "change": (change.bench, "one peer more and one peer less, from the rename of the mesh file"),
    "memory": (steady.memory, "resident memory and idle CPU, children included"),
    "again": (steady.again, "a second run with nothing to do: what it writes; how long it, plan and status take"),
    "kill": (restart.kill, "agent killed with SIGKILL and restarted under a stream of packets"),
    "drift": (drift.bench, "each drift: time to its repair, packets lost"),
    "restart": (restart.switch, "ovsdb-server, ovs-vswitchd, or both dead for ten seconds"),
    "detect": (detect.bench, "faults between hosts: until the reports say so, and until they say it is over"),
    "lab": (scale.bench, "n² pings of 10 hosts × 3 pods, a lab of 20 hosts"),
    "kube-joins": (kube_joins.bench, "three hosts: a Node joins, leaves, changes its address"),
    "kube-1000": (kube_scale.bench, "1,000 Nodes: agent's start, memory, joins, a burst of 500"),
    "kube-heartbeats": (kube_heartbeats.bench, "heartbeats of 1,000 Nodes, and what an agent receives of them"),
    "kube-watchers": (
        kube_watchers.bench,
        "1,000 and 3,000 watches of the slices: a join until the last one's event",
    ),
    "kube-outages": (
        kube_outages.bench,
        "faults of the control plane: packets and slice members lost, recovery",
    ),
}


@dataclass
class _Progress:
    started: float

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    version = subprocess.run(["ovs-vswitchd", "--version"], capture_output=True, text=True, timeout=10).stdout
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openVSwitch": version.split("\n")[0].rpartition(" ")[2],
        "ovsmesh": __version__,
        "load": os.getloadavg(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:15} {about}" for name, (_, about) in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description=f"Measure ovsmesh in network namespaces (root). Benches:\n{listed}\n"
        "Those of Kubernetes start a real control plane, which is built with Go before the first run (10 minutes).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), metavar="NAME", help="only these benches")
    parser.add_argument("--quick", action="store_true", help="fewer tries and shorter waits: 10 minutes instead of 40")
    parser.add_argument("--big", action="store_true", help="measure with 5,000 peers too")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="numbers of peers (default 100 300 1000)")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="PATH", help="default: bench.json")
    return parser.parse_args()


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Run the chosen benches. Exits with 1 when one failed, with 2 when a figure misses its goal."""
    chosen = _arguments()
    if os.geteuid() != 0:
        sys.exit("bench.py: it makes network namespaces, which needs root; run it with sudo")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    # modules of ovsmesh that a bench uses are not to log
    logging.getLogger("ovsmesh").addHandler(logging.NullHandler())
    progress = _Progress(time.monotonic())
    sizes = tuple(chosen.sizes or (100, 300, 1000)) + ((5000,) if chosen.big else ())
    plan = Plan(chosen.quick, sizes, progress)
    for proof in end_orphans():
        progress(f"a killed run's {proof}")
    figures: list[Figure] = []
    failed: dict[str, str] = {}
    machine = _machine()
    try:
        for name in chosen.only or BENCHES:
            bench, about = BENCHES[name]
            progress(f"{name}: {about}")
            try:
                # one by one: figures of a bench that fails later are kept
                for figure in bench(plan):
                    figures.append(figure)
            except (OvsmeshError, BinariesError, AssertionError) as error:
                failed[name] = str(error)
                progress(f"{name}: FAILED: {error}")
    finally:
        machine["loadAtEnd"] = os.getloadavg()
        result = {"machine": machine, "figures": [f.to_dict() for f in figures], "failed": failed}
        chosen.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        if figures:
            print(table(figures))
            facts = f"{machine['cpus']} CPUs, Linux {machine['kernel']}, Open vSwitch {machine['openVSwitch']}"
            if machine["load"][0] > (machine["cpus"] or 1) / 2:
                print("\nThe machine was busy at the start: seconds and milliseconds are too high, ratios hold.")
            print(f"\n{facts}, Python {machine['python']}; load {machine['load'][0]:.1f} → {os.getloadavg()[0]:.1f}")
        print(f"written to {chosen.json}", file=sys.stderr)
    if failed:
        sys.exit("\n".join(f"bench.py: {name}: {why.splitlines()[0]}" for name, why in failed.items()))
    if any(f.holds is False for f in figures):
        sys.exit(2)
