"""How a reconcile ended, what the agent has counted, and the status that is made from both."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ovsmesh import __version__
from ovsmesh.dataplane import report as reports
from ovsmesh.dataplane.plan import Plan
from ovsmesh.dataplane.types import Dataplane, Facts, Observed
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Mesh
from ovsmesh.metrics import Histogram

_DURATIONS = Histogram((0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0))
"""Seconds: an unchanged mesh takes a few milliseconds, the first reconcile with a thousand peers a second or two."""


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
    ovs_version: str = ""
    last_change: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when a part of it was changed last (seconds since the epoch), and how."""

    def copy(self) -> AgentCounters:
        """Return a copy that later counting does not change."""
        return replace(
            self, drift=self.drift.copy(), operations=self.operations.copy(), last_change=self.last_change.copy()
        )


@dataclass(frozen=True, slots=True)
class ReconcileResult:
    """What a reconcile, or a look at the system without changing it, has found and left."""

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


def report(
    result: ReconcileResult, node: str, traffic: Mapping[str, reports.Traffic], context: reports.Context
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
    """What the agent publishes after a reconcile. Immutable; may be read from any thread.

    The report of a thousand peers takes longer to make than a reconcile that changes nothing, so it is made when
    somebody first asks for it, and once.
    """

    def __init__(self, result: ReconcileResult, counters: AgentCounters, node: str = "", mesh_from: str = "") -> None:
        self.result, self.counters = result, counters.copy()
        self._node, self._mesh_from = node, mesh_from
        self._making = threading.Lock()
        self._report: reports.Report | None = None

    @property
    def report(self) -> reports.Report:
        with self._making:
            if self._report is None:
                context = reports.Context(
                    now=time.time(),
                    agent_since=self.counters.started,
                    agent_version=__version__,
                    ovs_version=self.counters.ovs_version,
                    mesh_from=self._mesh_from,
                    mesh_since=self.result.mesh_since or None,
                    mesh_current=self.result.mesh_current,
                    last_change=self.counters.last_change,
                )
                self._report = report(self.result, self._node, {}, context)
            return self._report
