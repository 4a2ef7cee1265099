"""A thousand Nodes: memory of agent and controller, and the time until a join is in kernel and switch.

The agent is real, on a real switch; its peers are Nodes without hosts. Times end when notifications of the kernel,
nft, OVSDB and the flow table show the last part.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import IPv4Address

from benchlib.event_probe import EventProbe
from benchlib.figures import Figure, percentile
from benchlib.kube_testbed import KubeTestbed, SliceWatch, kube_testbed, slice_watch
from benchlib.peers import Peer, events, last_seen, peer
from benchlib.testbed import Plan, cpu_seconds, mib
from ovsmesh.lab.netns import LabError

NODES = 1000
_START, _AGENT_MIB, _CONTROLLER_MIB = 1.8, 66.0, 120.0
_JOIN, _JOIN_WORST = 100.0, 400.0
_BURST, _BURST_SECONDS, _BURST_WRITES = 500, 5.0, 60.0
_REST = (0.3, 0.8)


def bench(plan: Plan) -> list[Figure]:
    """Measure memory, starts, joins and a burst of joins."""
    figures = []
    with kube_testbed([peer(n) for n in range(NODES)]) as s:
        controller = s.pid("controller1")
        figures.append(
            Figure("kube-1000", "memory of the controller", "MiB", (mib(controller),), bound=_CONTROLLER_MIB)
        )
        figures += _starts(plan, s)
        figures += _joins(plan, s)
        figures += _burst(plan, s)
        figures += [
            Figure("kube-1000", "memory of the agent at 1,500", "MiB", (mib(s.pid()),)),
            Figure("kube-1000", "memory of the controller at 1,500", "MiB", (mib(controller),), bound=_CONTROLLER_MIB),
            Figure("kube-1000", "  the highest it was", "MiB", (mib(controller, "VmHWM"),), bound=_CONTROLLER_MIB),
        ]
    return figures


def _start(s: KubeTestbed, start: Callable[[], object], pid: Callable[[], int]) -> tuple[float, float, float]:
    """Start an agent. Return the seconds to the last part, the agent's CPU, and the CPU of agent and switch."""
    with EventProbe(s.host, flows=False, database=False) as probe:
        parts = events(s.peers, "+")
        switch = [p.pid for name in ("ovsdb-server", "ovs-vswitchd") if (p := s.host.daemon(name))]
        before = sum(map(cpu_seconds, switch))
        began = time.monotonic()
        start()
        seen = probe.wait([event for part in ("neighbour", "FDB", "route") for event in parts[part]], 60)
        agent = cpu_seconds(pid())
        whole = agent + sum(map(cpu_seconds, switch)) - before
        s.ready()
        probe.look(0)
        last_filter = max(when for when, event in probe.events if event == ("gen",))
        return max(*seen.values(), s.check().last_flow, last_filter) - began, agent, whole


def _from_file(s: KubeTestbed) -> float:
    """Return the seconds of a start from a mesh file. Remove everything again."""
    s.put(s.peers)
    took, _, _ = _start(s, s.host.start_agent, super(KubeTestbed, s).pid)
    s.host.stop_agent()
    s.cluster.clean(s.host)
    return took


def _starts(plan: Plan, s: KubeTestbed) -> list[Figure]:
    """Measure starts of an agent on a clean host. Leaves an agent running."""
    took: list[float] = []
    own: list[float] = []
    whole: list[float] = []
    baseline: list[float] = []
    account = s.cluster.agent_account(s.host)
    tries = plan.tries(10, 3)
    for number in range(tries):
        baseline.append(_from_file(s))
        found = _start(s, lambda: s.cluster.start_agent(s.host, account), s.pid)
        for value, samples in zip(found, (took, own, whole), strict=True):
            samples.append(value)
        text = f"{took[-1]:.2f} s, from a file {baseline[-1]:.2f} s, CPU of the agent {own[-1]:.2f} s"
        plan.progress(f"  start {number + 1} of {tries}: {text}")
        if number + 1 < tries:
            s.reset()
    time.sleep(3)
    name = f"agent's start to the last part, {NODES:,}"
    return [
        Figure("kube-1000", name, "s", tuple(took), "from a mesh file", tuple(baseline), bound=_START),
        Figure("kube-1000", "  the fastest of them", "s", (min(took),), bound=_START),
        Figure("kube-1000", "  CPU of the agent by then", "s", tuple(own)),
        Figure("kube-1000", "  CPU of agent, ovsdb-server and ovs-vswitchd", "s", tuple(whole)),
        Figure("kube-1000", "memory of the agent", "MiB", (mib(s.pid()),), bound=_AGENT_MIB),
        Figure("kube-1000", "  the highest it was", "MiB", (mib(s.pid(), "VmHWM"),), bound=_AGENT_MIB),
    ]


class _Joins:
    """Joins and leaves of single Nodes, and when their parts were seen."""

    def __init__(self, s: KubeTestbed, probe: EventProbe, slices: SliceWatch) -> None:
        self._s, self._probe, self._slices = s, probe, slices
        self.more: list[float] = []
        self.less: list[float] = []
        self.sliced: list[float] = []
        self.parts: dict[str, list[float]] = {}

    def one(self, number: int) -> None:
        extra = Peer(f"x{number}", str(IPv4Address("172.31.0.1") + number), f"10.200.{number}.0/24")
        self._probe.addresses = {extra.address}
        since = self._s.admin.add(extra)
        found = last_seen(self._probe, [extra], "+", 20)
        self.more.append((max(found.values()) - since) * 1000)
        for part, at in found.items():
            self.parts.setdefault(part, []).append((at - since) * 1000)
        # this watch may receive it later than the agent does
        until = time.monotonic() + 5
        while extra.name not in self._slices.seen and time.monotonic() < until:
            self._probe.look(0.01)
        self.sliced.append((self._slices.seen[extra.name] - since) * 1000)
        self._probe.rest(random.uniform(*_REST))
        since = self._s.admin.remove(extra)
        self.less.append((max(last_seen(self._probe, [extra], "-", 20).values()) - since) * 1000)
        self._probe.rest(random.uniform(*_REST))

    @property
    def note(self) -> str:
        worst = max(range(len(self.more)), key=self.more.__getitem__)
        return f"median ms: {self._split(statistics.median)}; the worst: {self._split(lambda times: times[worst])}"

    def _split(self, of: Callable[[list[float]], float]) -> str:
        split = sorted((of(times), part) for part, times in self.parts.items())
        return f"in a slice {of(self.sliced):.0f}, " + ", ".join(f"{part} {at:.0f}" for at, part in split)


def _joins(plan: Plan, s: KubeTestbed) -> list[Figure]:
    tries = plan.tries(50, 10)
    with ExitStack() as stack:
        probe = stack.enter_context(EventProbe(s.host))
        slices = stack.enter_context(slice_watch(s.plane))
        probe.quiet(1.5)
        calm, broken = _Joins(s, probe, slices), _Joins(s, probe, slices)
        for number in range(tries):
            calm.one(number)
            if number % 10 == 9:
                plan.progress(f"  {number + 1} of {tries}: in {statistics.median(calm.more):.0f} ms; {calm.note}")
        with _Conflict(s) as bad:
            for number in range(tries // 2):
                broken.one(tries + number)
            plan.progress(f"  with {bad} refused: {statistics.median(broken.more):.0f} ms")
        probe.quiet(1)
    return [
        Figure("kube-1000", "Node made to its last part, agent", "ms", tuple(calm.more), bound=_JOIN, note=calm.note),
        Figure("kube-1000", "  p99 of them", "ms", (percentile(calm.more, 0.99),), bound=_JOIN_WORST),
        Figure("kube-1000", "Node deleted to its last part", "ms", tuple(calm.less)),
        Figure(
            "kube-1000",
            "Node made, while the switch refuses another peer",
            "ms",
            tuple(broken.more),
            "none refused",
            tuple(calm.more),
            bound=_JOIN_WORST,
        ),
    ]


class _Conflict:
    """An unmanaged port to the address of a Node that joins: the switch refuses a second port like it."""

    def __init__(self, s: KubeTestbed) -> None:
        self._s, self._peer = s, Peer("refused", "172.31.254.1", "10.201.0.0/24")

    def __enter__(self) -> str:
        host, kind = self._s.host, self._s.lab.settings.datapath
        remote = f"options:remote_ip={self._peer.address}"
        local = f"options:local_ip={host.address}"
        host.ovs_vsctl("add-br", "other", "--", "set", "bridge", "other", f"datapath_type={kind}")
        made = ("add-port", "other", "gre-other", "--", "set", "interface", "gre-other", "type=gre", remote, local)
        host.ovs_vsctl(*made)
        self._s.admin.add(self._peer)
        time.sleep(2)
        errors = host.ovs_vsctl("get", "interface", self._peer.port, "error")
        if "already" not in errors and "exists" not in errors:
            raise LabError(f"the switch did not refuse {self._peer.port}: {errors}")
        return self._peer.name

    def __exit__(self, *_: object) -> None:
        self._s.host.ovs_vsctl("del-br", "other")
        self._s.admin.remove(self._peer)
        time.sleep(2)


def _burst(plan: Plan, s: KubeTestbed) -> list[Figure]:
    more = [peer(n) for n in range(NODES, NODES + _BURST)]
    writes = s.admin.slice_writes()
    with EventProbe(s.host) as probe:
        probe.quiet(1)
        probe.addresses = {p.address for p in more}
        started = time.monotonic()
        coming = threading.Thread(target=s.admin.fill, args=(more,))
        coming.start()
        found = last_seen(probe, more, "+", 60)
        coming.join()
    took = max(found.values()) - started
    s.peers += more
    s.check()
    written = s.admin.slice_writes() - writes
    plan.progress(f"  {_BURST} Nodes at once: in after {took:.2f} s, {written} slice writes")
    return [
        Figure("kube-1000", f"{_BURST} Nodes at once, to the last part", "s", (took,), bound=_BURST_SECONDS),
        Figure("kube-1000", "  slice writes", "", (float(written),), bound=_BURST_WRITES - 1),
    ]
