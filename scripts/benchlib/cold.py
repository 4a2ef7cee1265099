"""Cold start: from the agent's process start to the last port, flow, route, neighbour and FDB entry.

Compared, alternating and each on a fresh Open vSwitch, with the work by hand: a shell loop of `ovs-vsctl add-port`, all
ports in one ovs-vsctl, all routes in one `ip -batch`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchlib.event_probe import EventProbe
from benchlib.figures import Figure
from benchlib.peers import Peer, events, peer
from benchlib.testbed import Plan, Testbed, cpu_seconds, testbed
from ovsmesh.lab import netns
from ovsmesh.lab.netns import LabError

_GOAL = 1.8
"""Seconds to 1,000 peers on two quiet cores."""


def bench(plan: Plan) -> list[Figure]:
    """Measure cold starts at each size."""
    figures = []
    for size in plan.sizes:
        own: list[float] = []
        used: list[float] = []
        batch: list[float] = []
        routes: list[float] = []
        splits: list[dict[str, float]] = []
        for number in range(plan.tries(5, 2)):
            took, cpu = _agent(size)
            own.append(took)
            used.append(cpu)
            batch.append(_by_hand(size, _one_vsctl))
            routes.append(_by_hand(size, _ip_batch))
            splits.append(_split(size))
            plan.progress(f"  {size} peers, try {number + 1}: {own[-1]:.2f} s; one ovs-vsctl {batch[-1]:.2f} s")
        loop = []
        if size <= (300 if plan.quick else 1000):
            loop = [_by_hand(size, _loop)]
            plan.progress(f"  {size} peers, shell loop of ovs-vsctl: {loop[0]:.1f} s")
        name = f"cold start, {size:,} peers"
        bound = _GOAL if size == 1000 else None
        floor = 1 / 20 if size == 1000 else None
        figures.append(Figure("cold", name, "s", tuple(own), "loop of ovs-vsctl", tuple(loop), bound, floor))
        figures.append(
            Figure("cold", f"  against all ports at once, {size:,}", "s", tuple(own), "one ovs-vsctl", tuple(batch))
        )
        figures.append(Figure("cold", f"  against routes alone, {size:,}", "s", tuple(own), "ip -batch", tuple(routes)))
        name = f"  CPU of agent, ovsdb-server and ovs-vswitchd, {size:,}"
        figures.append(Figure("cold", name, "s", tuple(used)))
        figures += _split_figures(size, splits)
    return figures


def _split_figures(size: int, splits: list[dict[str, float]]) -> list[Figure]:
    """Return a figure for each part of a profiled run, the largest first."""
    parts = sorted(
        {part for split in splits for part in split}, key=lambda p: -statistics.median(s.get(p, 0) for s in splits)
    )
    return [
        Figure("cold", f"  part of {size:,}: {part}", "ms", tuple(split.get(part, 0.0) * 1000 for split in splits))
        for part in parts
        if statistics.median(split.get(part, 0.0) for split in splits) >= 0.001
    ]


def _agent(size: int) -> tuple[float, float]:
    """Return the seconds from the start of the process to the last part, and the CPU seconds used by then.

    Taken from notifications, then confirmed by reading everything back. The CPU is that of agent, ovsdb-server and
    ovs-vswitchd.
    """
    with testbed(size) as s, EventProbe(s.host, flows=False, database=False) as probe:
        start = time.monotonic()
        s.host.start_agent()
        parts = events(s.peers, "+")
        seen = probe.wait([event for part in ("neighbour", "FDB", "route") for event in parts[part]], 60)
        agent = s.host.agent()
        processes = (agent, s.host.daemon("ovsdb-server"), s.host.daemon("ovs-vswitchd"))
        used = sum(cpu_seconds(process.pid) for process in processes if process)
        s.ready()
        probe.look(0)
        last_filter = max(when for when, event in probe.events if event == ("gen",))
        found = s.check()
        # a port exists before the flows that name its number
        return max(*seen.values(), found.last_flow, last_filter) - start, used


def _split(size: int) -> dict[str, float]:
    with testbed(size) as s:
        program = str(Path(__file__).with_name("startup_profile.py"))
        (s.host.state / "agent").mkdir(parents=True, exist_ok=True)
        host = s.host
        options = [str(s.mesh), host.name, host.ovsdb, str(host.state / "agent")]
        done = host.run([sys.executable, program, str(time.monotonic()), *options], timeout=60)
        s.check()
        found: dict[str, float] = json.loads(done.stdout)
        return found


def _by_hand(size: int, way: Callable[[Testbed, str, list[Peer]], None]) -> float:
    with testbed(0) as s:
        database = f"--db={s.host.ovsdb}"
        kind = s.lab.settings.datapath
        subprocess.run(
            ["ovs-vsctl", database, "add-br", "obr0", "--", "set", "bridge", "obr0", f"datapath_type={kind}"],
            check=True,
            timeout=20,
        )
        peers = [peer(n) for n in range(size)]
        start = time.monotonic()
        way(s, database, peers)
        return time.monotonic() - start


def add_port(p: Peer, local: str) -> list[str]:
    """Return the arguments of `ovs-vsctl` that make one tunnel port."""
    remote = (f"options:remote_ip={p.address}", f"options:local_ip={local}")
    return ["add-port", "obr0", p.port, "--", "set", "interface", p.port, "type=gre", *remote]


def _one_vsctl(s: Testbed, database: str, peers: list[Peer]) -> None:
    words = [word for p in peers for word in ("--", *add_port(p, str(s.host.address)))]
    subprocess.run(["ovs-vsctl", database, *words], check=True, timeout=120)
    _all_there(s, database, len(peers))


def _loop(s: Testbed, database: str, peers: list[Peer]) -> None:
    lines = "\n".join(" ".join(["ovs-vsctl", database, *add_port(p, str(s.host.address))]) for p in peers)
    script = s.host.state / "loop.sh"
    script.write_text(f"set -e\n{lines}\n")
    subprocess.run(["bash", str(script)], check=True, timeout=600, env=dict(os.environ))
    _all_there(s, database, len(peers))


def _all_there(s: Testbed, database: str, count: int) -> None:
    done = subprocess.run(
        ["ovs-vsctl", database, "list-ports", "obr0"], capture_output=True, text=True, check=True, timeout=20
    )
    if len(done.stdout.split()) != count:
        raise LabError(f"{len(done.stdout.split())} ports in obr0, wanted the {count} made by hand")


def _ip_batch(s: Testbed, database: str, peers: list[Peer]) -> None:
    lines = ["link add kbr0 type bridge", "link set kbr0 up", "addr add 10.97.1.1/24 dev kbr0"]
    netns.ip_batch([*lines, *(f"route add {p.cidr} via {p.gateway} dev kbr0 onlink" for p in peers)], s.host.ns)
