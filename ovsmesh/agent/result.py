"""The comparison of a node's desired and observed dataplane, how a reconcile ended, and what is told of it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ovsmesh import __version__
from ovsmesh.dataplane import desired, plan_text
from ovsmesh.dataplane.node_report import astray, report, unmanaged_beside
from ovsmesh.dataplane.plan import Plan, Step, in_sync, plan
from ovsmesh.dataplane.report import Agent, Report, ReportContext, cause
from ovsmesh.dataplane.report import ReconcileResult as ReconcileResult
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Reach, State
from ovsmesh.errors import Problem
from ovsmesh.history import Event, History
from ovsmesh.mesh.manifest import digest
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh
from ovsmesh.metrics import Histogram
from ovsmesh.ovs.figures import SwitchFigures
from ovsmesh.probe.sender import Totals
from ovsmesh.reasons import Reason
from ovsmesh.text import counted, duration, listed

if TYPE_CHECKING:
    from ovsmesh.agent.driver import Driver

RETRIED = (
    *(Reason.ApplyFailed, Reason.PortError, Reason.NotConverged, Reason.TurnFailed, Reason.FilterFailed),
    Reason.CNIContested,
)
"""Reasons of problems that may go by themselves without an event that says so."""

_DURATIONS = Histogram((0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0))
"""Seconds: an unchanged mesh takes a few milliseconds, the first reconcile with a thousand peers a second or two."""

_REPORT_AGE = 1.0
"""Seconds for which a report is good: the figures of the probes change all the time."""


@dataclass
class AgentCounters:
    """What the agent has counted since it started."""

    started: float = 0.0
    """Seconds since the epoch."""
    drift: Counter[str] = field(default_factory=Counter)
    """Kind → parts that someone else had changed."""
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind, "+", "~" or "-") → changes made."""
    reconciles: int = 0
    failures: int = 0
    durations: Histogram = _DURATIONS
    """Seconds that reconciles took."""
    last_success: float = 0.0
    """Seconds since the epoch; 0 for never."""
    last_change: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when a part of it was changed last (seconds since the epoch), and how."""

    def copy(self) -> AgentCounters:
        """Return a copy that later counting does not change."""
        return replace(
            self, drift=self.drift.copy(), operations=self.operations.copy(), last_change=self.last_change.copy()
        )


class Comparison(NamedTuple):
    """What a node should have, what it has, and the difference."""

    mesh: Mesh
    facts: Facts
    want: Dataplane
    refused: tuple[Problem, ...]
    """What in the mesh and on the host is not as it should be, from computing the desired dataplane."""
    have: Observed
    plan: Plan
    beside: tuple[Problem, ...] = ()
    """What of this host, beside the dataplane, keeps packets of the mesh from their way."""

    def result(self, snapshot: Snapshot, failed: Iterable[Problem] = ()) -> ReconcileResult:
        """Return this as a result; `failed` is what could not be applied."""
        have, todo = self.have, self.plan
        unmanaged = unmanaged_beside(have, todo)
        return ReconcileResult(
            self.mesh,
            self.facts,
            self.want,
            have,
            todo,
            (*snapshot.problems, *self.beside, *self.refused, *have.problems, *failed, *unmanaged),
            in_sync(todo, (*have.problems, *failed)),
            snapshot.confirmed,
            mesh_since=snapshot.since,
        )


def compare(
    driver: Driver,
    mesh: Mesh,
    node: str,
    previous: Comparison | None = None,
    make_plan: Callable[[Dataplane, Observed], Plan] = plan,
    probe_firewall: bool = True,
    path_mtus: Mapping[str, int | None] | None = None,
) -> Comparison:
    """Compare the desired with the observed dataplane of `node`, and change nothing.

    The desired dataplane of `previous` is used again, as the same object, while mesh and facts are the same.
    `probe_firewall`: see Firewall.missing; `path_mtus`: see Prober.path_mtus. Raise OvsmeshError if the node is not in
    the mesh.
    """
    # facts and observation must be of one state, so nothing is drained between them
    driver.drain()
    facts = driver.facts(mesh, node, probe_firewall, path_mtus or {})
    if previous and mesh is previous.mesh and facts == previous.facts:
        want, refused = previous.want, previous.refused
    else:
        want, refused = desired.dataplane(mesh, node, facts)
    have = driver.observe(want)
    beside = (*astray(driver.detours(mesh, node, facts)), *driver.refusals(mesh, node, facts))
    return Comparison(mesh, facts, want, refused, have, make_plan(want, have), beside)


def look(driver: Driver, snapshot: Snapshot, node: str) -> ReconcileResult:
    """Return what a reconcile would find now, with nothing changed."""
    if snapshot.mesh is None:
        return ReconcileResult(problems=snapshot.problems)
    return compare(driver, snapshot.mesh, node).result(snapshot)


def peers_text(want: Dataplane) -> str:
    """Return the number of peers that the node is to have tunnels to, as in "3 peers"."""
    return counted(len(want.ports), "peer")


class NodeStatus:
    """What the agent publishes after a reconcile, or when a peer became reachable or not. Any thread may read it.

    The report of a thousand peers takes longer to make than a reconcile that changes nothing, so it is made when
    somebody asks for it, and again a second later at the earliest. `reach` returns what the probes found by then,
    `switch` what the switch has counted.
    """

    def __init__(
        self,
        result: ReconcileResult,
        counters: AgentCounters,
        node: str = "",
        mesh_from: str = "",
        reach: Callable[[], Mapping[str, Reach]] | None = None,
        states: Mapping[str, State] | None = None,
        switch: Callable[[], SwitchFigures] = SwitchFigures,
        probes: Callable[[], Totals] = Totals,
    ) -> None:
        self.result, self.counters = result, counters.copy()
        self.states = states or {}
        """Peer → what its probes found."""
        self._reach, self._switch, self._probes = reach, switch, probes
        self._made_at = float("-inf")
        self._node, self._mesh_from = node, mesh_from
        self._making = threading.Lock()
        self._report: Report | None = None

    @property
    def probes(self) -> Totals:
        """How many probes were sent and lost by now, and how long the answers took."""
        return self._probes()

    @property
    def report(self) -> Report:
        """The report. It is made at the first access."""
        with self._making:
            if self._report is None or (self._reach and time.monotonic() - self._made_at > _REPORT_AGE):
                self._made_at, figures = time.monotonic(), self._switch()
                context = ReportContext(
                    now=time.time(),
                    agent=Agent(self.counters.started, __version__),
                    ovs_version=figures.version,
                    traffic=figures.traffic,
                    mesh_from=self._mesh_from,
                    last_change=self.counters.last_change,
                    reach=self._reach() if self._reach else {},
                )
                self._report = report(self.result, self._node, context)
            return self._report


_LINES = 10
"""Entries about one thing at one time; more of them are one entry, which holds them all."""
_NAMES = 5
"""Names that a sentence has at most."""


class EventLog:
    """Tells in the log and in the history what has changed since it was told last."""

    def __init__(self, history: History, node: str, mesh_from: str) -> None:
        self._history, self._node, self._mesh_from = history, node, mesh_from
        self._began = time.monotonic()
        self._said: dict[str, float] = {}
        """Problem → since when (monotonic)."""
        self._lost: dict[str, float] = {}
        """Peer that packets do not reach → since when (seconds since the epoch)."""
        self._peers = 0
        self._degraded: float | None = None
        """Since when (monotonic)."""
        self._in_sync = False
        self._digest: tuple[Mesh | None, str] = (None, "")

    def start(self, mesh: Mesh | None) -> None:
        """Tell that the agent starts, with this mesh."""
        peers = (
            "no mesh yet" if mesh is None else counted(len(mesh.nodes) - (mesh.node(self._node) is not None), "peer")
        )
        last = self._history.recent()[-1:]
        killed = bool(last) and last[0].event != Event.STOP
        more = "; the one before was not stopped: it was killed, it crashed or the power was cut" if killed else ""
        text = f"ovsmesh {__version__} starts on node {self._node}, mesh from {self._mesh_from}, {peers}{more}"
        self._history.add(Event.START, text)

    def stop(self) -> None:
        """Tell that the agent stops."""
        text = f"ovsmesh {__version__} stops on node {self._node}; what is in place stays"
        self._history.add(Event.STOP, text, took=time.monotonic() - self._began)

    def reconciled(
        self,
        before: ReconcileResult,
        now: ReconcileResult,
        applied: Iterable[Step],
        who: str,
        lifted: str,
        drift_by: str = "",
    ) -> None:
        """Tell of a reconcile: drift, changes, problems that came and went, whether the node is in sync.

        `who` caused the changes that were `applied`. `lifted` is how the last hold of removals ended. `drift_by` are
        the processes that caused the drift, as far as they are known.
        """
        self._changes(now, applied, who, drift_by)
        self._held(before, now, lifted)
        self._problems(now)
        self._state(now)

    def _changes(self, now: ReconcileResult, applied: Iterable[Step], who: str, drift_by: str) -> None:
        add, drifted = self._history.add, now.drift.steps
        by = "a restart of Open vSwitch" if any(step.kind == "restore_wait" for step in drifted) else "someone"
        for text, steps in plan_text.drift(drifted, by) if drifted else ():
            took = now.duration if now.converged else None
            add(Event.DRIFT, text, drift_by or by, took, plan_text.unnamed(steps))
        told = {(step.kind, step.key) for step in (*drifted, *now.plan.steps)}
        done = {(step.kind, step.key): step for step in applied if (step.kind, step.key) not in told}
        if not done:
            return
        text, parts = plan_text.changes(list(done.values())), plan_text.unnamed(done.values())
        if now.want is None:
            text = f"{text}: how that ended is not known"
        add(Event.CHANGE, text, "repair" if drifted else who, now.duration, parts)

    def _held(self, before: ReconcileResult, now: ReconcileResult, lifted: str) -> None:
        if now.want is None:
            return
        old, new = before.plan.held_peers, now.plan.held_peers
        if new and new != old:
            text = next((str(problem) for problem in now.problems if problem.reason is Reason.MassRemovalHeld), "")
            self._history.add(Event.HELD, text, self._mesh_from, parts=new if len(new) > _NAMES else ())
        elif old and not new:
            what = f"the held removal of {counted(len(old), 'peer')} ({listed(old, _NAMES)})"
            parts = old if len(old) > _NAMES else ()
            if lifted:
                self._history.add(Event.CONFIRMED, f"{what} is carried out", lifted, parts=parts)
            else:
                self._history.add(Event.RESOLVED, f"{what}: they are in the mesh again", parts=parts)

    def _problems(self, now: ReconcileResult) -> None:
        found = {
            str(problem): (
                Event.FAILED if problem.reason in RETRIED else Event.PROBLEM,
                logging.ERROR if problem.fatal else logging.WARNING,
            )
            for problem in now.problems
            if problem.reason is not Reason.MassRemovalHeld
        }
        found |= {str(blocked)[2:]: (Event.PROBLEM, logging.ERROR) for blocked in now.plan.blocked}
        at = time.monotonic()
        new, gone = [text for text in found if text not in self._said], [t for t in self._said if t not in found]
        if len(new) > _LINES:
            level = max(found[text][1] for text in new)
            self._history.add(Event.PROBLEM, f"{len(new)} problems, the first: {new[0]}", parts=new, level=level)
        else:
            for text in new:
                event, level = found[text]
                self._history.add(event, text, level=level)
        if len(gone) > _LINES:
            text = f"{len(gone)} problems, the first: {gone[0]}"
            self._history.add(Event.RESOLVED, text, took=at - self._said[gone[0]], parts=gone)
        else:
            for text in gone:
                self._history.add(Event.RESOLVED, text, took=at - self._said[text])
        self._said = {text: self._said.get(text, at) for text in found}

    def reached(self, states: Mapping[str, State], found: Mapping[str, Reach], now: ReconcileResult) -> None:
        """Tell which peers packets do not reach any more, with the likely cause, and which they reach again.

        `found` has what is known of those that are lost and were not, or were in another way.
        """
        mesh, at = now.mesh, time.time()
        me = mesh.node(self._node) if mesh else None
        again = {name: self._lost[name] for name, state in states.items() if name in self._lost and state is State.OK}
        lost: dict[str, str] = {}
        if mesh is not None and me is not None and now.facts is not None:
            mtu, peers = desired.pod_mtu(mesh, me, now.facts), {peer.name: peer for peer in mesh.nodes}
            for name in sorted(found.keys() & peers.keys()):
                own, address = str(me.address), str(peers[name].address)
                lost[name] = f"{name} {found[name].state}: {cause(found[name], mtu, mesh.encapsulation, own, address)}"
        self._peers = len(states)
        still = {name: since for name, since in self._lost.items() if name in states and name not in again}
        self._lost = {name: found[name].since or at for name in lost} | still
        if len(lost) > _LINES:
            text = (
                f"{len(lost)} peers are not reachable ({listed(lost, _NAMES)}), the first: {next(iter(lost.values()))}"
            )
            self._history.add(Event.LOST, text, parts=lost.values())
        else:
            for text in lost.values():
                self._history.add(Event.LOST, text)
        if len(again) > _LINES:
            text = f"{len(again)} peers are reachable again ({listed(again, _NAMES)})"
            self._history.add(Event.REACHABLE, text, took=at - min(again.values()), parts=again)
        else:
            for name, since in again.items():
                self._history.add(Event.REACHABLE, f"{name} is reachable again", took=max(0.0, at - since))
        self._state(now)

    def _state(self, now: ReconcileResult) -> None:
        """Tell that the node is in sync, or that it is not, where that has changed."""
        why, at = self._why_degraded(now), time.monotonic()
        if why and self._degraded is None:
            self._history.add(Event.DEGRADED, f"degraded: {why}")
            self._degraded, self._in_sync = at, False
        elif not why and not self._in_sync and now.want is not None and now.mesh is not None:
            if self._digest[0] is not now.mesh:
                self._digest = now.mesh, digest(now.mesh)
            text = f"in sync with {peers_text(now.want)} (mesh {self._digest[1]}, {duration(now.duration)})"
            self._history.add(Event.IN_SYNC, text, took=None if self._degraded is None else at - self._degraded)
            self._degraded, self._in_sync = None, True

    def _why_degraded(self, now: ReconcileResult) -> str:
        found = []
        if not now.converged:
            reasons = [str(p) for p in now.problems if p.fatal and p.reason is not Reason.MassRemovalHeld]
            if now.plan.held_peers:
                reasons.append(f"the removal of {counted(len(now.plan.held_peers), 'peer')} is held")
            reasons += [str(blocked)[2:] for blocked in now.plan.blocked]
            more = f" (and {counted(len(reasons) - 1, 'other problem')})" if len(reasons) > 1 else ""
            left = f"{counted(len(now.plan.steps), 'change')} still to be made" if now.want else "no mesh yet"
            found.append(f"{reasons[0]}{more}" if reasons else left)
        if self._lost:
            names = listed(sorted(self._lost), _NAMES)
            found.append(f"{len(self._lost)} of {counted(self._peers, 'peer')} not reachable: {names}")
        return "; ".join(found)
