"""An agent with nothing to do: its memory, its CPU time, and what a second run writes.

A write shows in rtnetlink notifications, in transactions of the OVS database's file, in nft's generation or in the age
of a flow.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import ClassVar

from benchlib.event_probe import Event, EventProbe, generation
from benchlib.figures import Figure
from benchlib.testbed import Plan, Testbed, children, cpu_seconds, mib, testbed
from ovsmesh.lab.netns import LabError

_MIB_GOAL = 60.0
_CPU_GOAL = 0.6
_PROBES_GOAL = 20.0


def memory(plan: Plan) -> list[Figure]:
    """Measure memory and idle CPU at all sizes at once: idle agents do not disturb each other."""
    figures = []
    with ExitStack() as stack:
        beds = {size: stack.enter_context(testbed(size)) for size in plan.sizes}
        for s in beds.values():
            s.host.start_agent()
            s.ready()
        with ExitStack() as answers:
            for s in beds.values():
                answers.enter_context(s.answering())
            # until every peer of the largest mesh was probed once
            time.sleep(plan.tries(round(max(plan.sizes) / _PROBES_GOAL) + 5, 5))
            figures += _idle(plan, beds, "all peers answer")
        for size, s in beds.items():
            pid = s.pid()
            own = mib(pid)
            peak = mib(pid, "VmHWM")
            others = children(pid)
            pss = sum(mib(one, "Pss", "smaps_rollup") for one in (pid, *others))
            rss = sum(map(mib, (pid, *others)))
            goal = _MIB_GOAL if size == 1000 else None
            at = f"at {size:,}"
            figures += [
                Figure("memory", f"resident memory of the agent {at}", "MiB", (own,), bound=goal),
                Figure("memory", f"  the highest it was {at}", "MiB", (peak,), bound=goal),
                Figure("memory", f"  with its {len(others)} children {at}", "MiB", (rss,), bound=goal),
                Figure("memory", f"  the same, shared pages once (PSS) {at}", "MiB", (pss,)),
            ]
            plan.progress(f"  {size} peers: {own:.1f} MiB (peak {peak:.1f})")
        time.sleep(plan.tries(15, 5))
        figures += _idle(plan, beds, "none answers")
    return figures


def _idle(plan: Plan, beds: Mapping[int, Testbed], how: str) -> list[Figure]:
    """Measure the CPU time of agents at rest, and the probes that they send."""
    seconds = plan.tries(60, 15)
    plan.progress(f"  idle for {seconds} s, {how}")
    before = {size: (cpu_seconds(s.pid()), s.metric("ovsmesh_probes_sent_total")) for size, s in beds.items()}
    began = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    figures = []
    for size, s in beds.items():
        share = (cpu_seconds(s.pid()) - before[size][0]) / took * 100
        # read last: a scrape takes time of its own
        rate = (s.metric("ovsmesh_probes_sent_total") - before[size][1]) / took
        cpu, sent = (_CPU_GOAL, _PROBES_GOAL * 1.02) if size == 1000 else (None, None)
        what = f"over {seconds} s at {size:,}, {how}"
        figures += [
            Figure("memory", f"idle CPU, children included, {what}", "%", (share,), bound=cpu),
            Figure("memory", f"  probes a second {what}", "", (rate,), bound=sent),
        ]
        plan.progress(f"  {size} peers: {share:.2f} % of a core, {rate:.1f} probes/s")
    return figures


class _Counters:
    """Counts what is written on a host. `seen` keeps the rtnetlink notifications of all counters."""

    seen: ClassVar[Counter[Event]] = Counter()

    def __init__(self, s: Testbed, probe: EventProbe) -> None:
        self._s, self._probe = s, probe
        probe.quiet(0.5)
        probe.events.clear()
        self.since = time.monotonic()
        self._database = self._transactions()
        self._generation = generation(s.host.ns)

    def _transactions(self) -> int:
        return (self._s.host.state / "conf.db").read_bytes().count(b"\nOVSDB JSON ")

    def written(self) -> dict[str, int]:
        """Return what was written since this was made, by kind."""
        self._probe.look(0.2)
        # neighbours of the underlay come and go
        events = [event for _, event in self._probe.events if event[0] != "neigh~"]
        kinds = Counter(event[0] for event in events)
        kernel = [
            event for event in events if event[0] not in ("cfg", "settled", "gen", "nft", "port+", "port-", "port?")
        ]
        self.seen.update(kernel)
        found = {
            "rtnetlink": len(kernel),
            "OVSDB": self._transactions() - self._database + kinds["cfg"],
            "nft": generation(self._s.host.ns) - self._generation,
        }
        back = self._s.check()
        found["flows"] = int(back.last_flow > self.since)
        return found


def _timed(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def again(plan: Plan) -> list[Figure]:
    """Measure second runs: what they write, and how long they, plan and status take."""
    size = max(size for size in plan.sizes if size <= 1000) if min(plan.sizes) <= 1000 else min(plan.sizes)
    written: dict[str, Counter[str]] = {"once": Counter(), "restarted": Counter(), "killed": Counter()}
    once: list[float] = []
    ready: list[float] = []
    looks: dict[str, list[float]] = {"plan": [], "status": [], "status -o json": []}
    tries = plan.tries(5, 2)
    with testbed(size) as s:
        s.host.start_agent()
        s.ready()
        s.check()
        time.sleep(1)
        with EventProbe(s.host, flows=False) as probe:
            for _ in range(tries):
                s.host.stop_agent()
                counters = _Counters(s, probe)
                once.append(_timed(lambda: _once(s)))
                written["once"].update(counters.written())
                counters = _Counters(s, probe)
                ready.append(_timed(lambda: _start(s)))
                time.sleep(1)
                written["restarted"].update(counters.written())
                s.host.stop_agent(signal.SIGKILL)
                counters = _Counters(s, probe)
                s.host.start_agent()
                s.ready()
                time.sleep(1)
                written["killed"].update(counters.written())
                for words, times in looks.items():
                    times.append(_timed(partial(_look, s, words)))
                plan.progress(f"  {size} peers: second run {once[-1]:.2f} s, wrote {dict(written['once'])}")
    figures = [
        Figure("again", f"`agent --once`, nothing to do, {size:,}", "s", tuple(once)),
        Figure("again", f"agent started again until /readyz, {size:,}", "s", tuple(ready)),
        *(Figure("again", f"`{words}`, {size:,}", "s", tuple(times)) for words, times in looks.items()),
    ]
    for how, counts in written.items():
        for kind, count in sorted(counts.items()):
            name = f"writes of {tries} runs ({how}): {kind}"
            what = "; ".join(f"{' '.join(event)} × {n}" for event, n in _Counters.seen.items())
            note = f"in all runs: {what}" if kind == "rtnetlink" and count else ""
            figures.append(Figure("again", name, "", (float(count),), bound=0.0, note=note))
    return figures


def _start(s: Testbed) -> None:
    s.host.start_agent()
    s.ready()


def _once(s: Testbed) -> None:
    done = s.host.run(s.command("agent", "--once", "--log-level", "warning"), timeout=60, check=False)
    if done.returncode:
        raise LabError(f"agent --once: exit status {done.returncode}: {done.stderr.strip()}")


def _look(s: Testbed, words: str) -> None:
    command, *options = words.split()
    done = s.host.ovsmesh(command, *options, timeout=60)
    # status: 2, as a bench's peers are not there
    if done.returncode not in ((0, 2) if words.startswith("status") else (0,)):
        raise LabError(f"{words}: exit status {done.returncode}: {done.stdout[-500:]} {done.stderr.strip()}")
