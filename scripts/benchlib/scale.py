"""A whole mesh: pings from every pod to every other, what crosses the tunnels meanwhile, the time of a big lab."""

from __future__ import annotations

import time
from contextlib import ExitStack

from benchlib.figures import Figure
from benchlib.testbed import Plan
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError


def bench(plan: Plan) -> list[Figure]:
    """Measure pings of a whole mesh, and how long a lab of many hosts takes."""
    hosts, pods = (4, 2) if plan.quick else (10, 3)
    with Lab(hosts, pods, ephemeral=True) as lab, ExitStack() as stack:
        captures = [stack.enter_context(host.capture()) for host in lab.hosts]
        tracks = [track for _ in range(2) for track in lab.ping_matrix(count=3)]
        time.sleep(0.2)
        for capture in captures:
            capture.close()
        sent = sum(len(t.sent) for t in tracks)
        encapsulated = sum(c.encapsulated for c in captures)
        plan.progress(f"  {len(tracks) // 2} pairs twice: {sent} pings, {encapsulated} frames in tunnels seen")
        if missed := sum(c.missed for c in captures):
            raise LabError(f"the captures missed {missed} frames; is the machine overloaded?")
        name = f"{hosts} hosts × {pods} pods, all to all, twice"
        note = f"{len(tracks) // 2:,} pairs, {sent:,} pings, {encapsulated:,} encapsulated frames seen at both ends"
        found = [
            Figure("lab", f"{name}: lost", "", (float(sum(t.lost for t in tracks)),), bound=0.0, note=note),
            Figure("lab", "  answered twice", "", (float(sum(t.duplicates for t in tracks)),), bound=0.0),
            Figure("lab", "  broadcast frames in tunnels", "", (float(sum(c.broadcast for c in captures)),), bound=0.0),
            Figure("lab", "  multicast frames in tunnels", "", (float(sum(c.multicast for c in captures)),), bound=0.0),
            Figure("lab", "  round trip", "ms", tuple(t.rtt for t in tracks if t.rtt is not None)),
        ]
    big = 6 if plan.quick else 20
    up, down = [], []
    for _ in range(plan.tries(3, 1)):
        lab = Lab(big, 1, ephemeral=True)
        start = time.monotonic()
        try:
            lab.up()
            up.append(time.monotonic() - start)
        finally:
            start = time.monotonic()
            if not (proof := lab.down()).ok:
                raise LabError(str(proof))
            down.append(time.monotonic() - start)
        plan.progress(f"  lab of {big} hosts: up in {up[-1]:.1f} s, down in {down[-1]:.1f} s")
    return [
        *found,
        Figure("lab", f"lab of {big} hosts × 1 pod up", "s", tuple(up)),
        Figure("lab", "  and down again, proof included", "s", tuple(down)),
    ]
