"""A thousand watches of the slices and more: when the last one receives a join, and what it costs the API server.

One process (watch_load) holds the watches, all with one agent's token, on the same cores as the API server, etcd and
the controller.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchlib.figures import Figure
from benchlib.kube_testbed import CLUSTER, KubeTestbed, cluster_lab
from benchlib.peers import Peer, peer
from benchlib.testbed import Plan, cpu_seconds, mib
from ovsmesh.lab.netns import LabError

_NODES = 900
"""So that the slice that a join changes is more than half full."""
_REST = (0.3, 0.7)


class Watchers:
    """The load process: sends its commands, reads its answers."""

    def __init__(self, s: KubeTestbed, config: Path) -> None:
        argv = ["ip", "netns", "exec", s.plane.ns, sys.executable, str(Path(__file__).with_name("watch_load.py"))]
        root = str(Path(__file__).resolve().parents[2])
        self.process = subprocess.Popen(
            [*argv, str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root},
        )

    def send(self, text: str) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return an answer. Raises LabError for an error."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "the load process has ended"}
        if "error" in found:
            raise LabError(f"watches: {found['error']}")
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@contextmanager
def _watchers(s: KubeTestbed) -> Iterator[Watchers]:
    made = Watchers(s, s.cluster.agent_config(s.host))
    try:
        yield made
    finally:
        made.close()


def bench(plan: Plan) -> list[Figure]:
    """Measure joins with many watches open."""
    figures = []
    with cluster_lab(1, 0, clusterCIDRs=[CLUSTER]) as cluster:
        s = KubeTestbed(cluster.lab, cluster)
        s.fill([peer(n) for n in range(_NODES)])
        time.sleep(plan.tries(20, 8))
        with _watchers(s) as load:
            first = 0
            for count in (1000, 3000):
                figures += _at(plan, s, load, count, first)
                first += 100
    return figures


def _at(plan: Plan, s: KubeTestbed, load: Watchers, count: int, first: int) -> list[Figure]:
    server = s.plane.pid("kube-apiserver")
    used = cpu_seconds(server)
    load.send(f"more {count}")
    opened = load.receive()
    plan.progress("  {open} watches open after {seconds:.1f} s, {refused} refused at first".format(**opened))
    opening = cpu_seconds(server) - used
    time.sleep(3)
    pids = {
        "the API server": server,
        "the load process": load.process.pid,
        "etcd": s.plane.pid("etcd"),
        "the controller": s.pid("controller1"),
    }
    idle = {name: cpu_seconds(pid) for name, pid in pids.items()}
    time.sleep(5)
    idle = {name: (cpu_seconds(pid) - idle[name]) / 5 for name, pid in pids.items()}
    last, middle, soonest = [], [], []
    before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    tries = plan.tries(50, 8)
    joined: list[Peer] = []
    for number in range(first, first + tries):
        extra = Peer(f"w{number:04d}", f"172.30.{number // 250}.{number % 250 + 1}", f"10.201.{number}.0/24")
        load.send(f"expect {extra.name}")
        load.receive()
        since = s.admin.add(extra)
        joined.append(extra)
        times = load.receive()["times"]
        if len(times) != count:
            raise LabError(f"{len(times)} watches of {count} are still open")
        soonest.append((times[0] - since) * 1000)
        middle.append((statistics.median(times) - since) * 1000)
        last.append((times[-1] - since) * 1000)
        time.sleep(random.uniform(*_REST))
    seconds = time.monotonic() - began
    spent = {name: (cpu_seconds(pid) - before[name] - idle[name] * seconds) / tries for name, pid in pids.items()}
    for extra in joined:
        s.admin.remove(extra)
    s.until_members(_NODES + 1)
    plan.progress(f"  {count:,} watches: last one after {statistics.median(last):.0f} ms; {_shares(spent)}")
    return [
        Figure("kube-watchers", f"{count:,} watches: join to the last one's event", "ms", tuple(last)),
        Figure("kube-watchers", "  to half of them", "ms", tuple(middle)),
        Figure("kube-watchers", "  to the first", "ms", tuple(soonest)),
        Figure(
            "kube-watchers",
            "  CPU of the API server a join",
            "ms",
            (spent["the API server"] * 1000,),
            note=_shares(spent),
        ),
        Figure("kube-watchers", "  memory of the API server", "MiB", (mib(server),)),
        Figure("kube-watchers", "  CPU of the API server to open them", "s", (opening,)),
    ]


def _shares(spent: dict[str, float]) -> str:
    """Return what takes the CPU time, the most first."""
    ordered: Sequence[tuple[str, float]] = sorted(spent.items(), key=lambda item: -item[1])
    return "CPU a join: " + ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in ordered)
