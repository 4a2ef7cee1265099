"""The comparison of a node's desired and observed dataplane, how a reconcile ended, and the status made from it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ovsmesh import __version__
from ovsmesh.dataplane import desired
from ovsmesh.dataplane import report as reports
from ovsmesh.dataplane.plan import Plan, in_sync, plan
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Reach
from ovsmesh.errors import Problem
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh
from ovsmesh.metrics import Histogram
from ovsmesh.ovs.figures import SwitchFigures
from ovsmesh.reasons import Reason
from ovsmesh.text import counted

if TYPE_CHECKING:
    from ovsmesh.agent.driver import Driver

RETRIED = (Reason.ApplyFailed, Reason.PortError, Reason.NotConverged, Reason.TurnFailed, Reason.FilterFailed)
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


@dataclass(frozen=True, slots=True)
class ReconcileResult:
    """What a look at the system has found, or a reconcile has left."""

    mesh: Mesh | None = None
    facts: Facts | None = None
    want: Dataplane | None = None
    have: Observed | None = None
    plan: Plan = field(default_factory=Plan)
    """What is left to do."""
    problems: tuple[Problem, ...] = ()
    converged: bool = False
    """Nothing is left to do and nothing is in the way: every peer that the mesh rightly names is joined.

    A mesh that could not be read and peers that were refused are problems all the same.
    """
    mesh_current: bool = False
    """Whether the source says this now; else it is the last known good mesh."""
    duration: float = 0.0
    """Seconds."""
    mesh_since: float = 0.0
    """When the mesh was read, in seconds since the epoch; 0 for never."""
    drift: Plan = field(default_factory=Plan)
    """What someone else had changed."""


class Comparison(NamedTuple):
    """What a node should have, what it has, and the difference."""

    mesh: Mesh
    facts: Facts
    want: Dataplane
    refused: tuple[Problem, ...]
    """What in the mesh and on the host is not as it should be, from computing the desired dataplane."""
    have: Observed
    plan: Plan

    def result(self, snapshot: Snapshot, failed: Iterable[Problem] = ()) -> ReconcileResult:
        """Return this as a result; `failed` is what could not be applied."""
        have, todo = self.have, self.plan
        unmanaged = reports.unmanaged_beside(have, todo)
        return ReconcileResult(
            self.mesh,
            self.facts,
            self.want,
            have,
            todo,
            (*snapshot.problems, *self.refused, *have.problems, *failed, *unmanaged),
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
) -> Comparison:
    """Compare the desired with the observed dataplane of `node`, and change nothing.

    The desired dataplane of `previous` is used again, as the same object, while mesh and facts are the same.
    `probe_firewall`: see Firewall.missing. Raise OvsmeshError if the node is not in the mesh.
    """
    # facts and observation must be of one state, so nothing is drained between them
    driver.drain()
    facts = driver.facts(mesh, node, probe_firewall)
    if previous and mesh is previous.mesh and facts == previous.facts:
        want, refused = previous.want, previous.refused
    else:
        want, refused = desired.dataplane(mesh, node, facts)
    have = driver.observe(want)
    return Comparison(mesh, facts, want, refused, have, make_plan(want, have))


def look(driver: Driver, snapshot: Snapshot, node: str) -> ReconcileResult:
    """Return what a reconcile would find now, with nothing changed."""
    if snapshot.mesh is None:
        return ReconcileResult(problems=snapshot.problems)
    return compare(driver, snapshot.mesh, node).result(snapshot)


def peers_text(want: Dataplane) -> str:
    """Return the number of peers that the node is to have tunnels to, as in "3 peers"."""
    return counted(len(want.ports), "peer")


def report(
    result: ReconcileResult, node: str, traffic: Mapping[str, reports.Traffic], context: reports.ReportContext
) -> reports.Report:
    """Return the report that every reader is shown."""
    return reports.report(
        result.mesh,
        node,
        result.facts,
        result.want,
        result.have,
        result.plan,
        result.problems,
        result.converged,
        traffic,
        context,
    )


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
        peers_lost: bool = False,
        switch: Callable[[], SwitchFigures] = SwitchFigures,
    ) -> None:
        self.result, self.counters = result, counters.copy()
        self.peers_lost = peers_lost
        """Whether packets to a peer are lost."""
        self._reach, self._switch = reach, switch
        self._made_at = float("-inf")
        self._node, self._mesh_from = node, mesh_from
        self._making = threading.Lock()
        self._report: reports.Report | None = None

    @property
    def report(self) -> reports.Report:
        """The report. It is made at the first access."""
        with self._making:
            if self._report is None or (self._reach and time.monotonic() - self._made_at > _REPORT_AGE):
                self._made_at, figures = time.monotonic(), self._switch()
                context = reports.ReportContext(
                    now=time.time(),
                    agent_since=self.counters.started,
                    agent_version=__version__,
                    ovs_version=figures.version,
                    mesh_from=self._mesh_from,
                    mesh_since=self.result.mesh_since or None,
                    mesh_current=self.result.mesh_current,
                    last_change=self.counters.last_change,
                    reach=self._reach() if self._reach else None,
                )
                self._report = report(self.result, self._node, figures.traffic, context)
            return self._report
