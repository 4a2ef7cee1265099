"""Drifts of a node's dataplane: the time until each is repaired, and the packets lost.

A drift is made with a user's tools (ip, bridge, ovs-vsctl, ovs-ofctl, nft, sysctl). It begins when a notification, or
a sample every 2 ms, first shows it, and ends when everything is as before.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from benchlib import state
from benchlib.event_probe import EventProbe
from benchlib.figures import Figure
from benchlib.testbed import Plan
from ovsmesh.dataplane.desired import mac
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError
from ovsmesh.lab.ping import Track
from ovsmesh.mesh.types import Node

_TICK = 0.002
_CALM = 0.25
"""Seconds for which everything must stay in sync before a repair counts as complete."""
_UNSEEN = 2.0
"""Seconds in which a drift is seen if it is seen at all; else it was repaired between two samples."""
_TIMEOUT = 30.0
"""Seconds. A writer of a forwarding sysctl may wait long for the kernel's lock."""
_GOAL = 1000.0
"""Milliseconds: the goal for each repair."""
_REST = (0.1, 0.7)
_STREAM = 0.002
_CHANGES = ("route-", "neigh-", "fdb-", "addr-", "link", "conf", "port-", "flow-", "gen")
"""Events of a drift; a drift that was repaired before the next sample shows only in them."""


@dataclass(frozen=True)
class Drift:
    """A drift, the command that makes it, and the parts it changes: "kernel", "switch", "filters", "sysctls"."""

    name: str
    argv: list[str]
    parts: tuple[str, ...]


_SYSCTLS = {
    "net/ipv4/ip_forward": "0",
    "net/ipv6/conf/all/forwarding": "0",
    "net/ipv4/conf/all/send_redirects": "1",
    "net/ipv4/conf/kbr0/send_redirects": "1",
    "net/ipv4/conf/kbr0/rp_filter": "1",
    "net/ipv4/conf/kbr0/accept_redirects": "1",
    "net/ipv6/conf/kbr0/disable_ipv6": "1",
    "net/ipv6/conf/kbr0/accept_ra": "1",
    "net/ipv6/conf/kbr0/accept_redirects": "1",
}
"""Setting → a wrong value."""


def _drifts(host: Host, peer: Host) -> list[Drift]:
    own, other = (str(h.pod_cidrs[0].network_address + 1) for h in (host, peer))
    its_mac = mac(Node(peer.name, peer.address, peer.pod_cidrs))
    length = host.pod_cidrs[0].prefixlen
    mgmt = f"unix:{host.state}/obr0.mgmt"
    vsctl = ["ovs-vsctl", f"--db={host.ovsdb}"]
    flow = f"priority=100,in_port=LOCAL,dl_dst={its_mac}"
    down, up = "ip link set kbr0 down", "ip link set kbr0 up"
    found = [
        Drift("GRE port deleted", [*vsctl, "del-port", "obr0", f"gre-{peer.name}"], ("switch",)),
        Drift("route deleted", ["ip", "route", "del", str(peer.pod_cidrs[0]), "proto", "111"], ("kernel",)),
        Drift("flow table emptied", ["ovs-ofctl", "del-flows", mgmt], ("switch",)),
        Drift("one flow deleted", ["ovs-ofctl", "--strict", "del-flows", mgmt, flow], ("switch",)),
        Drift("neighbour deleted", ["ip", "neigh", "del", other, "dev", "kbr0"], ("kernel",)),
        Drift("FDB entry deleted", ["bridge", "fdb", "del", its_mac, "dev", "obr0", "master"], ("kernel",)),
        Drift("kbr0's address deleted", ["ip", "addr", "del", f"{own}/{length}", "dev", "kbr0"], ("kernel",)),
        Drift("kbr0 set down", down.split(), ("kernel",)),
        Drift("kbr0 set down and up", ["sh", "-c", f"{down}; {up}"], ("kernel",)),
        Drift("kbr0 deleted", ["ip", "link", "del", "kbr0"], ("kernel", "sysctls")),
        Drift("obr0's MTU changed", ["ip", "link", "set", "obr0", "mtu", "1400"], ("kernel",)),
        Drift("obr0 taken out of kbr0", ["ip", "link", "set", "obr0", "nomaster"], ("kernel",)),
        Drift("masquerade table flushed", ["nft", "flush", "table", "inet", "ovsmesh"], ("filters",)),
        Drift("bridge filter table deleted", ["nft", "delete", "table", "bridge", "ovsmesh"], ("filters",)),
    ]
    for path, value in _SYSCTLS.items():
        parts = ("sysctls", "kernel") if path.endswith("disable_ipv6") else ("sysctls",)
        found.append(Drift(f"sysctl {path}", ["sysctl", "-qw", f"{path.replace('/', '.')}={value}"], parts))
    return found


class _Watch:
    """Compares one host with what it was when this was made."""

    def __init__(self, host: Host, probe: EventProbe, kernel: state.Kernel) -> None:
        self._host, self._probe, self._kernel = host, probe, kernel
        probe.quiet(0.7)
        self._good_kernel = kernel.read()
        self._good_switch = state.switch(probe)
        self._good_filters = state.filters(host)
        self._good_sysctls = state.sysctls(host.ns, _SYSCTLS)
        self._seen = 0
        self._since_kernel = 0.0
        self.changed = False
        self._same: dict[str, bool] = {}

    def start(self) -> None:
        self._probe.clear()
        self._seen = 0
        self.changed = False
        self._same = dict.fromkeys(("kernel", "switch", "filters", "sysctls"), True)

    def sample(self, parts: tuple[str, ...]) -> tuple[float, bool]:
        """Return when something was last seen, and whether these parts are as they were.

        `changed` then says whether any of them was changed, even if it is as it was again.
        """
        probe = self._probe
        probe.look(_TICK)
        fresh = probe.events[self._seen :]
        self._seen = len(probe.events)
        now = time.monotonic()
        self.changed |= any(event[0].startswith(_CHANGES) for _, event in fresh)
        for part in parts:
            if part == "sysctls":
                self._same[part] = state.sysctls(self._host.ns, _SYSCTLS) == self._good_sysctls
            elif part == "switch" and fresh:
                self._same[part] = state.switch(probe) == self._good_switch
            elif part == "kernel" and (fresh or now - self._since_kernel > 0.02):
                self._same[part] = self._kernel.read() == self._good_kernel
                self._since_kernel = now
            elif part == "filters" and (changes := [at for at, event in fresh if event == ("gen",)]):
                self._same[part] = state.filters(self._host) == self._good_filters
                # listing takes longer than sampling: take the time of the transaction
                return changes[-1], self._all(parts)
        return time.monotonic(), self._all(parts)

    def _all(self, parts: tuple[str, ...]) -> bool:
        return all(self._same[part] for part in parts)


def bench(plan: Plan) -> Iterator[Figure]:
    """Measure the repair of each drift."""
    tries = plan.tries(20, 3)
    with Lab(2, 1, dual_stack=True, ephemeral=True) as lab:
        host, peer = lab.host(1), lab.host(2)
        lab.converged(20, thorough=True)
        with EventProbe(host) as probe, closing(state.Kernel(host.ns)) as kernel:
            watch = _Watch(host, probe, kernel)
            for drift in _drifts(host, peer):
                repairs, lost, outages = _tries(lab, host, watch, drift, tries)
                yield Figure("drift", drift.name, "ms", tuple(repairs), bound=_GOAL, bound_on_max=True, note=lost)
                if any(outages):
                    yield Figure("drift", "  its longest outage", "ms", tuple(outages))
                _report(plan, drift.name, repairs, outages)
            if (code := host.ovsmesh("plan").returncode) != 0:
                raise LabError(f"after all drifts `ovsmesh plan` exits {code}: {host.ovsmesh('plan').stdout}")


def _report(plan: Plan, name: str, repairs: list[float], outages: list[float]) -> None:
    out = f"p50 {statistics.median(outages):.0f} ms" if any(outages) else "none"
    plan.progress(f"  {name}: p50 {statistics.median(repairs):.0f} ms, max {max(repairs):.0f} ms, outage {out}")


def _tries(lab: Lab, host: Host, watch: _Watch, drift: Drift, tries: int) -> tuple[list[float], str, list[float]]:
    repairs: list[float] = []
    begun: list[float] = []
    with lab.stream([lab.pair(lab.pod(1, 1), lab.pod(2, 1))], _STREAM) as stream:
        for _ in range(tries):
            time.sleep(random.uniform(*_REST))
            begun.append(time.time())
            repairs.append(_once(host, watch, drift))
            if not stream.wait(time.time(), _TIMEOUT, run=5):
                raise LabError(f"{drift.name}: no packet passes {_TIMEOUT} s after the repair; {host.logs(20)}")
        time.sleep(0.05)
    track = stream.tracks[0]
    hit = [_outage(track, since, until) for since, until in zip(begun, [*begun[1:], time.time()], strict=True)]
    note = (
        f"packets lost in all, of {len(track.sent):,} at {1 / _STREAM:.0f}/s: {track.lost}; twice: {track.duplicates}"
    )
    return repairs, note, hit


def _outage(track: Track, since: float, until: float) -> float:
    """Return the milliseconds of the longest outage that began in that time."""
    return max((o.seconds * 1000 for o in track.outages(since) if o.start < until), default=0.0)


def _once(host: Host, watch: _Watch, drift: Drift) -> float:
    """Make a drift. Return the milliseconds from when it is first seen until everything is as before."""
    watch.start()
    argv = ["ip", "netns", "exec", host.ns, *drift.argv]
    child = subprocess.Popen(argv, env=os.environ | host.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    drifted: float | None = None
    repaired: float | None = None
    ended = 0.0
    until = time.monotonic() + _TIMEOUT
    try:
        before = time.monotonic()
        while repaired is None or time.monotonic() - repaired < _CALM:
            at, good = watch.sample(drift.parts)
            if not good:
                drifted, repaired = drifted or at, None
            elif drifted is None and watch.changed:
                # made and repaired between two samples: count all of the time between them
                drifted, repaired = before, at
            elif drifted is not None and repaired is None:
                repaired = at
            before = time.monotonic()
            ended = ended or (before if child.poll() == 0 else 0.0)
            if drifted is None and ended and before - ended > _UNSEEN:
                # a sysctl that was repaired between two samples leaves no trace
                return _TICK * 1000
            if before > until:
                what = "not repaired" if drifted else "no drift was seen"
                raise LabError(f"{drift.name}: {what} in {_TIMEOUT} s: {_stderr(child)} {host.logs(15)}")
        if child.wait(5):
            raise LabError(f"{drift.name}: `{' '.join(drift.argv)}`: {_stderr(child)}")
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()
    assert drifted is not None
    return (repaired - drifted) * 1000


def _stderr(child: subprocess.Popen[bytes]) -> str:
    if child.poll() is None or child.stderr is None:
        return ""
    return child.stderr.read().decode(errors="replace").strip()
