"""Three hosts with real Open vSwitch: a Node that joins, one that leaves, one whose address changes.

A join begins when the request that makes the Node is sent. The agent starts after it, as its token needs the Node. The
pod is plugged in once kbr0 exists, as a CNI plugin would do. The join ends when packets of every pod pass to the new
node's pod and back, three in a row. The same is measured for a node whose agent runs already and whose Node gets its
address.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial

from benchlib.event_probe import EventProbe
from benchlib.figures import Figure, percentile
from benchlib.kube_testbed import cluster_lab
from benchlib.peers import Peer, last_seen
from benchlib.testbed import Plan
from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.netns import LabError
from ovsmesh.lab.ping import Pair, Prober, Track
from tests.support.clusterlab import ClusterLab

_P50, _P99 = 1.0, 2.0
_INTERVAL = 0.01
_RUN = 3
_TIMEOUT = 20.0


def bench(plan: Plan) -> list[Figure]:
    """Measure joins, leaves and address changes."""
    fresh: list[float] = []
    waiting: list[float] = []
    gone: list[float] = []
    with cluster_lab(3, 1) as cluster:
        *old, new = cluster.lab.hosts
        for host in old:
            cluster.add_node(host)
        cluster.start_controller(1)
        cluster.start_controller(2)
        for host in old:
            cluster.start_agent(host)
        netns.wait_for("two agents that are converged", lambda: len(cluster.converged()) == 2, 30)
        for host in old:
            host.plug()
        tries = plan.tries(30, 5)
        parts: dict[str, list[float]] = defaultdict(list)
        after: dict[str, list[float]] = defaultdict(list)
        for number in range(tries):
            for way, took, split in ((_join, fresh, parts), (_complete, waiting, after)):
                time.sleep(random.uniform(0.2, 0.6))
                took.append(way(cluster, new, split))
                time.sleep(random.uniform(0.2, 0.6))
                gone.append(_leave(cluster, new))
            if number % 5 == 4:
                text = "join {:.2f} s, complete {:.2f} s, leave {:.3f} s".format(
                    *map(statistics.median, (fresh, waiting, gone))
                )
                plan.progress(f"  {number + 1} of {tries}: {text}")
        _join(cluster, new, parts)
        moved, outages = _moves(plan, cluster, new)
    name = "kube-joins"
    begun, complete = "Node made to all pods ping, agent's start included", "Node complete to all pods ping, agent runs"
    return [
        Figure(name, begun, "s", tuple(fresh), bound=_P50, note=_medians(parts)),
        Figure(name, "  p99 of them", "s", (percentile(fresh, 0.99),), bound=_P99),
        Figure(name, complete, "s", tuple(waiting), bound=_P50, note=_medians(after)),
        Figure(name, "  p99 of them", "s", (percentile(waiting, 0.99),), bound=_P99),
        Figure(name, "Node deleted to gone everywhere", "s", tuple(gone), bound=_P50),
        Figure(name, "  p99 of them", "s", (percentile(gone, 0.99),), bound=_P99),
        Figure(name, "Node's address changed to all pods ping", "s", tuple(moved), bound=_P50),
        Figure(name, "  p99 of them", "s", (percentile(moved, 0.99),), bound=_P99),
        Figure(name, "  longest silence of a pair then", "s", tuple(outages)),
    ]


def _medians(parts: dict[str, list[float]]) -> str:
    return "median ms: " + ", ".join(f"{part} {statistics.median(times) * 1000:.0f}" for part, times in parts.items())


def _others(cluster: ClusterLab, new: Host) -> list[Host]:
    return [host for host in cluster.lab.hosts if host.name != new.name]


def _pairs(cluster: ClusterLab, new: Host) -> list[Pair]:
    """Return every old pod with the new node's, both ways."""
    mine = new.pod(1)
    pods = [host.pod(1) for host in _others(cluster, new)]
    return [pair for pod in pods for pair in (cluster.lab.pair(pod, mine), cluster.lab.pair(mine, pod))]


def _passing(track: Track, since: float) -> float:
    """Return when the first packet came back after which none was lost."""
    known = range(max(track.received) + 1)
    lost = [n for n in known if n not in track.received and track.sent[n] >= since]
    first = lost[-1] + 1 if lost else 0
    return min(at for n, at in track.received.items() if n >= first and track.sent[n] >= since)


def _until_passing(cluster: ClusterLab, stream: Prober, since: float) -> float:
    if not stream.wait(since, _TIMEOUT, _RUN):
        silent = [f"{t.pair.source} → {t.pair.target}" for t in stream.tracks if not t.answered_since(since, _RUN)]
        raise LabError(f"no packet passes {_TIMEOUT:.0f} s after the change: {', '.join(silent)}\n{cluster.logs(10)}")
    return max(_passing(track, since) for track in stream.tracks) - since


def _in_time(cluster: ClusterLab, new: Host, since: float, parts: dict[str, list[float]]) -> float:
    """Plug a new pod in as soon as kbr0 exists; then let every pod send until all packets are answered.

    Not before: Linux waits a second before it asks again for a neighbour that did not answer.
    """
    address = f"{new.pod_cidrs[0].network_address + 1}/{new.pod_cidrs[0].prefixlen}"
    look = ["ip", "-4", "addr", "show", "kbr0"]
    netns.wait_for("kbr0", lambda: address in new.run(look, check=False).stdout, _TIMEOUT)
    parts["kbr0 exists"].append(time.time() - since)
    new.plug()
    parts["pod plugged in"].append(time.time() - since)
    with cluster.lab.stream(_pairs(cluster, new), _INTERVAL) as stream:
        return _until_passing(cluster, stream, since)


def _join(cluster: ClusterLab, new: Host, parts: dict[str, list[float]]) -> float:
    since = time.time()
    cluster.add_node(new)
    account = cluster.agent_account(new)
    parts["token made"].append(time.time() - since)
    cluster.start_agent(new, account)
    return _in_time(cluster, new, since, parts)


def _complete(cluster: ClusterLab, new: Host, parts: dict[str, list[float]]) -> float:
    """Start the agent of a Node without an address, then set the address."""
    cidrs = [str(cidr) for cidr in new.pod_cidrs]
    node = {"kind": "Node", "metadata": {"name": new.name}, "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}}
    answer = cluster.plane.call("POST", "/api/v1/nodes", node)
    if answer.status != 201:
        raise LabError(f"Node {new.name}: {answer}")
    cluster.start_agent(new)
    netns.wait_for("an agent that waits", lambda: new.http("/healthz")[0], _TIMEOUT)
    since = time.time()
    cluster.set_address(new, str(new.address))
    return _in_time(cluster, new, since, parts)


def _leave(cluster: ClusterLab, new: Host) -> float:
    """Remove the Node. Return the seconds until no other host has anything of it."""
    left = Peer(new.name, str(new.address), str(new.pod_cidrs[0]))
    with ExitStack() as stack:
        probes = [stack.enter_context(EventProbe(host)) for host in _others(cluster, new)]
        for probe in probes:
            probe.quiet(0.2)
            probe.addresses = {left.address}
        since = time.monotonic()
        cluster.remove_node(new)
        last = [max(last_seen(probe, [left], "-", _TIMEOUT).values()) for probe in probes]
    cluster.end(new.name)
    cluster.clean(new)
    netns.ip_batch(["link del vp1"], new.ns)
    return max(last) - since


def _moves(plan: Plan, cluster: ClusterLab, new: Host) -> tuple[list[float], list[float]]:
    """Change the Node's address to and fro, without a restart."""
    netns.wait_for("three agents that are converged", lambda: len(cluster.converged()) == 3, 30)
    pids = [cluster.pid(host.name) for host in cluster.lab.hosts]
    device = "br-phy" if cluster.lab.settings.datapath == "netdev" else "eth0"
    second = "192.0.2.113"
    netns.ip_batch([f"addr add {second}/24 dev {device}"], new.ns)
    took, dark = [], []
    tries = plan.tries(30, 4)
    for address in itertools.islice(itertools.cycle((second, str(new.address))), tries):
        with cluster.lab.stream(_pairs(cluster, new), _INTERVAL) as stream:
            time.sleep(random.uniform(0.3, 0.8))
            since = time.time()
            cluster.set_address(new, address)
            netns.wait_for(f"ports to {address}", partial(_all_to, cluster, new, address), _TIMEOUT)
            _until_passing(cluster, stream, time.time())
            took.append(max(_passing(track, since) for track in stream.tracks) - since)
            time.sleep(0.5)
        dark.append(max((outage.seconds for track in stream.tracks for outage in track.outages(since)), default=0.0))
    netns.wait_for("three agents that are converged again", lambda: len(cluster.converged()) == 3, 30)
    if pids != [cluster.pid(host.name) for host in cluster.lab.hosts]:
        raise LabError("an agent was restarted when the address changed")
    plan.progress(
        f"  address changed {tries} times: {statistics.median(took):.2f} s, outage {statistics.median(dark):.2f} s"
    )
    return took, dark


def _all_to(cluster: ClusterLab, new: Host, address: str) -> bool:
    """Return whether every other host's port for it leads to this address."""
    look = ("--columns=options", "find", "interface", f"name=gre-{new.name}")
    return all(f'"{address}"' in host.ovs_vsctl(*look) for host in _others(cluster, new))
