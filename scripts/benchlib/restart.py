"""Restarts under a stream of packets: of the agent, of ovsdb-server, of ovs-vswitchd, of both.

The agent's restart is compared with the same stream with nothing done, alternating.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable

from benchlib.figures import Figure
from benchlib.testbed import Plan
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError

_PACE = 0.00095
"""Seconds between two packets; with the time of sending, about 1,000 packets a second."""
_GOAL = 1000.0
"""Milliseconds: the goal, from the switch being up to packets passing."""


def kill(plan: Plan) -> list[Figure]:
    """Measure the packets lost while an agent is killed and started again."""
    lost: dict[bool, list[float]] = {True: [], False: []}
    twice: dict[bool, list[float]] = {True: [], False: []}
    rates = []
    with Lab(2, 1, ephemeral=True) as lab:
        pair = lab.pair(lab.pod(1, 1), lab.pod(2, 1))
        for number in range(plan.tries(20, 4)):
            for killed in (True, False):
                began = time.monotonic()
                with lab.stream([pair], _PACE) as stream:
                    time.sleep(0.3)
                    if killed:
                        host = lab.host(1 + number % 2)
                        host.stop_agent(signal.SIGKILL)
                        host.start_agent()
                        lab.converged(20)
                    time.sleep(1.0 if killed else 1.7)
                    took = time.monotonic() - began
                track = stream.tracks[0]
                lost[killed].append(track.lost)
                twice[killed].append(track.duplicates)
                rates.append(len(track.sent) / took)
    rate = f"{sum(rates) / len(rates):.0f} packets/s, echo and answer; compared with the same stream with nothing done"
    return [
        Figure(
            "kill", "packets lost", "", tuple(lost[True]), "nothing done", tuple(lost[False]), 0.0, None, True, rate
        ),
        Figure("kill", "packets twice", "", tuple(twice[True]), "nothing done", tuple(twice[False]), 0.0, None, True),
    ]


def _database(agents: bool) -> tuple[float, float]:
    """Restart ovsdb-server in a fresh lab. Return the packets lost, and the longest silence in milliseconds.

    Fresh, because ovs-vswitchd waits longer each time before it connects again to a server that keeps dying.
    """
    with Lab(2, 1, ephemeral=True) as lab:
        host = lab.host(1)
        if not agents:
            for each in lab.hosts:
                each.stop_agent()
        alive = host.agent()
        with lab.stream([lab.pair(lab.pod(1, 1), lab.pod(2, 1))], _PACE) as stream:
            time.sleep(0.5)
            host.kill_ovsdb()
            time.sleep(0.2)
            host.start_ovsdb()
            back = time.time()
            if not stream.wait(back, 30, run=20):
                raise LabError(f"ovsdb-server restarted: no packet passes 30 s after it; {host.logs(20)}")
            time.sleep(2.5)
        if host.agent() != alive:
            raise LabError(f"ovsdb-server restarted: the agent has ended; {host.logs(20)}")
        if agents:
            lab.converged(20, [host])
        track = stream.tracks[0]
        times = sorted(track.received.values())
        return float(track.lost), max(b - a for a, b in itertools.pairwise(times)) * 1000


def database(plan: Plan) -> list[Figure]:
    """Measure restarts of ovsdb-server with agents and, alternating, without any."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(plan.tries(5, 1)):
        for agents in (True, False):
            found[agents].append(_database(agents))
        plan.progress(f"  ovsdb-server restarted: lost, silent ms: {found[True][-1]}; no agent: {found[False][-1]}")
    lost, silent = zip(*found[True], strict=True)
    lost_alone, silent_alone = zip(*found[False], strict=True)
    note = "the userspace datapath stops until ovs-vswitchd has its database again; the kernel's does not"
    return [
        Figure("restart", "ovsdb-server restarted: packets lost", "", lost, "no agent", lost_alone, note=note),
        Figure("restart", "  longest silence", "ms", silent, "no agent", silent_alone),
    ]


def _vswitchd(host: Host, seconds: float) -> tuple[float, float]:
    host.kill_vswitchd()
    time.sleep(0.5)
    start = time.time()
    host.start_vswitchd()
    return start, time.time()


def _both(host: Host, seconds: float) -> tuple[float, float]:
    host.kill_vswitchd()
    host.kill_ovsdb()
    time.sleep(seconds)
    host.start_ovsdb()
    start = time.time()
    host.start_vswitchd()
    return start, time.time()


def switch(plan: Plan) -> list[Figure]:
    """Measure restarts of the processes of Open vSwitch."""
    figures = database(plan)
    ended = 0
    seconds = plan.tries(10, 3)
    kinds: list[tuple[str, Callable[[Host, float], tuple[float, float]], int]] = [
        ("ovs-vswitchd restarted", _vswitchd, plan.tries(10, 2)),
        (f"both dead for {seconds} s", _both, plan.tries(5, 1)),
    ]
    with Lab(2, 1, ephemeral=True) as lab:
        host = lab.host(1)
        agent = host.agent()
        for name, way, tries in kinds:
            since_up, since_start, starts, lost = [], [], [], []
            for _ in range(tries):
                with lab.stream([lab.pair(lab.pod(1, 1), lab.pod(2, 1))], _PACE) as stream:
                    time.sleep(0.3)
                    begun = time.time()
                    start, up = way(host, seconds)
                    if not stream.wait(up, 30, run=20):
                        raise LabError(f"{name}: no packet passes 30 s after it; {host.logs(20)}")
                    time.sleep(1.5)
                end = max((o.end for o in stream.tracks[0].outages(begun)), default=start)
                since_up.append(max(0.0, end - up) * 1000)
                since_start.append(max(0.0, end - start) * 1000)
                starts.append((up - start) * 1000)
                lost.append(float(stream.tracks[0].lost))
                ended += host.agent() != agent
                agent = host.agent()
                lab.converged(20, [host])
                plan.progress(f"  {name}: passing {since_up[-1]:.0f} ms after it was up, {lost[-1]:.0f} lost")
            figures.append(Figure("restart", f"{name}: packets lost", "", tuple(lost)))
            what = f"{name}: up until packets pass"
            note = "up: configured from its database, as `ovs-vswitchd --detach` says by returning"
            figures.append(Figure("restart", what, "ms", tuple(since_up), "", (), _GOAL, None, True, note))
            figures.append(
                Figure("restart", "  since its start", "ms", tuple(since_start), "its own start", tuple(starts))
            )
    figures.append(Figure("restart", "agents that ended meanwhile", "", (float(ended),), bound=0.0))
    return figures
