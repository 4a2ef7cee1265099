"""Faults of the control plane under a stream between the pods of three hosts.

Measures packets lost, slice members lost, and the time until a new Node is joined. The faults are those of the tests
(outagekit), for longer. Each is compared with the same stream with nothing done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from benchlib.figures import Figure
from benchlib.kube_testbed import cluster_lab
from benchlib.testbed import Plan
from tests.support.fault_proxy import FAULTS, STALL
from tests.support.outagekit import Storm, storm

_HEALTHY = 6.0
"""Seconds that a watch must have lasted for the next one to start at once."""


def bench(plan: Plan) -> list[Figure]:
    """Measure each fault."""
    figures = []
    lost_beside: list[float] = []
    with cluster_lab(3, 1) as cluster, storm(cluster) as s:
        hosts = len(s.lab.hosts)
        for name, tries, way in _ways(plan, s):
            lost, least, back, sent = [], [], [], 0
            for _ in range(tries):
                found = s.run(name, way)
                lost.append(float(found.lost))
                least.append(float(max(0, hosts - found.least)))
                back.append(found.back)
                sent += found.sent
                plan.progress(
                    f"  {name}: {found.lost} of {found.sent} lost, a new Node is joined {found.back:.1f} s later"
                    f" {found.silent}"
                )
            if not lost_beside:
                lost_beside = lost
                figures.append(Figure("kube-outages", f"{name}: packets lost", "", tuple(lost), note=f"of {sent:,}"))
                continue
            figures += [
                Figure(
                    "kube-outages",
                    f"{name}: packets lost",
                    "",
                    tuple(lost),
                    "nothing done",
                    tuple(lost_beside),
                    bound=0.0,
                    bound_on_max=True,
                    note=f"of {sent:,}",
                ),
                Figure("kube-outages", "  members missing from slices", "", tuple(least), bound=0.0, bound_on_max=True),
                Figure("kube-outages", "  then a Node made to the last route", "s", tuple(back)),
            ]
    return figures


def _ways(plan: Plan, s: Storm) -> list[tuple[str, int, Callable[[], None]]]:
    down, stall = plan.tries(60, 10), plan.tries(30, 5)
    ways: list[tuple[str, int, Callable[[], None]]] = [
        (f"nothing done for {stall} s", plan.tries(2, 1), lambda: s.nothing(stall)),
        (f"API server down for {down} s, an agent killed meanwhile", 1, lambda: s.api_down(down)),
        (f"API server stalls for {stall} s", 1, lambda: s.api_stalls(stall)),
        ("etcd restarted", plan.tries(3, 1), lambda: s.etcd_restarted(3)),
        ("controller's leader killed", plan.tries(2, 1), s.leader_killed),
        ("leader stalls mid-write, past its lease", 1, s.leader_stalls),
        ("tokens rotate", plan.tries(3, 1), s.tokens_rotate),
    ]

    def inject(fault: str) -> None:
        # faults in quick succession look like a server that ends every watch, and agents back off
        time.sleep(_HEALTHY)
        s.watch_fault(fault)

    for fault in FAULTS:
        ways.append((f"watches get {fault}", plan.tries(5, 1), partial(inject, fault)))
    if not plan.quick:
        ways.append((f"watches get {STALL}", 1, lambda: s.watch_fault(STALL)))
    return ways
