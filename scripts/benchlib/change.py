"""One peer more and one less on a running agent, from the rename of the mesh file to the last part in place.

Compared with one `ovs-vsctl add-port` or `del-port` on the same bridge between two changes. The agent is stopped
(SIGSTOP) meanwhile, so it does not slow them.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import time
from collections import defaultdict
from ipaddress import IPv4Address

from benchlib.cold import add_port
from benchlib.event_probe import EventProbe
from benchlib.figures import Figure
from benchlib.peers import Peer, last_seen, peer
from benchlib.testbed import Plan, Testbed, testbed
from ovsmesh.lab.netns import LabError

_REST = (0.5, 1.2)
"""Seconds between two changes, at random, so that they meet the agent's timers in every phase."""


def bench(plan: Plan) -> list[Figure]:
    """Measure changes at each size."""
    figures = []
    for size in plan.sizes:
        figures += _at(plan, size)
    return figures


class _Samples:
    def __init__(self) -> None:
        self.whole: list[float] = []
        self.by_hand: list[float] = []
        self.parts: dict[str, list[float]] = defaultdict(list)

    def take(self, since: float, parts: dict[str, float]) -> None:
        self.whole.append((max(parts.values()) - since) * 1000)
        for part, at in parts.items():
            self.parts[part].append((at - since) * 1000)

    def figure(self, name: str, baseline: str, bound: float | None) -> Figure:
        split = sorted((statistics.median(times), part) for part, times in self.parts.items())
        note = "median ms to each part: " + ", ".join(f"{part} {at:.0f}" for at, part in split)
        return Figure(
            "change", name, "ms", tuple(self.whole), baseline, tuple(self.by_hand), ratio_bound=bound, note=note
        )


def _at(plan: Plan, size: int) -> list[Figure]:
    more, less = _Samples(), _Samples()
    tries = plan.tries(30 if size >= 1000 else 20, 8)
    with testbed(size) as s:
        s.host.start_agent()
        s.ready()
        base = [peer(n) for n in range(size)]
        with EventProbe(s.host) as probe:
            probe.quiet(1.5)
            for number in range(tries):
                extra = Peer(f"x{number}", str(IPv4Address("172.31.0.1") + number), f"10.200.{number}.0/24")
                probe.addresses = {extra.address}
                more.take(*_more(s, probe, base, extra))
                probe.rest(random.uniform(*_REST))
                if number in (0, tries - 1):
                    s.check()
                more.by_hand.append(_by_hand(s, add_port(_HAND, str(s.host.address))))
                less.by_hand.append(_by_hand(s, ["del-port", "obr0", _HAND.port]))
                probe.rest(random.uniform(*_REST))
                less.take(*_less(s, probe, base, extra))
                probe.rest(random.uniform(*_REST))
                if number in (0, tries - 1):
                    s.check()
                if number % 10 == 9 or number == tries - 1:
                    medians = (statistics.median(x) for x in (more.whole, more.by_hand, less.whole, less.by_hand))
                    text = "more {:.0f} ms (ovs-vsctl {:.0f}), less {:.0f} ms (ovs-vsctl {:.0f})".format(*medians)
                    plan.progress(f"  {size} peers, {number + 1} of {tries}: {text}")
    bound = 1.0 if size == 1000 else None
    return [
        more.figure(f"one peer more at {size:,}", "ovs-vsctl add-port", bound),
        less.figure(f"one peer less at {size:,}", "ovs-vsctl del-port", bound),
    ]


_HAND = Peer("hand", "172.31.255.1", "10.255.255.0/24")


def _more(s: Testbed, probe: EventProbe, base: list[Peer], extra: Peer) -> tuple[float, dict[str, float]]:
    return s.put([*base, extra]), last_seen(probe, [extra], "+", 10)


def _less(s: Testbed, probe: EventProbe, base: list[Peer], extra: Peer) -> tuple[float, dict[str, float]]:
    since = s.put(base)
    found = last_seen(probe, [extra], "-", 10)
    # removed from the database, then from the switch
    until = time.monotonic() + 10
    while not (settled := [t for t, event in probe.events if event == ("settled",) and t >= found["port"]]):
        if time.monotonic() > until:
            raise LabError("ovs-vswitchd did not apply the removal in 10 s")
        probe.look(0.5)
    return since, found | {"ovs-vswitchd": settled[0]}


def _by_hand(s: Testbed, words: list[str]) -> float:
    fd = os.pidfd_open(s.pid())
    signal.pidfd_send_signal(fd, signal.SIGSTOP)
    try:
        start = time.monotonic()
        subprocess.run(["ovs-vsctl", f"--db={s.host.ovsdb}", *words], check=True, timeout=20)
        return (time.monotonic() - start) * 1000
    finally:
        signal.pidfd_send_signal(fd, signal.SIGCONT)
        os.close(fd)
