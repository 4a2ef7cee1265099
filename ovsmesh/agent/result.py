"""One turn of an agent's loop as it ended, and what the agent has counted: what its readers are shown.

Knows how a turn becomes a report. Imports the pure rooms only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ovsmesh.dataplane import report as reports
from ovsmesh.dataplane.plan import Plan
from ovsmesh.dataplane.types import Dataplane, Facts, Observed
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Mesh


@dataclass
class AgentCounters:
    """What the agent has counted since it started; published as a copy."""

    started: float = 0.0
    """Seconds since the epoch."""
    drift: Counter[str] = field(default_factory=Counter)
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    turns: int = 0
    failures: int = 0
    last_success: float = 0.0
    ovs_version: str = ""
    last_change: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when a part of it was changed last (seconds since the epoch), and how."""


@dataclass(frozen=True, slots=True)
class ReconcileResult:
    """One turn of the loop, as it ended."""

    mesh: Mesh | None
    facts: Facts | None
    want: Dataplane | None
    have: Observed | None
    plan: Plan
    problems: tuple[Problem, ...]
    converged: bool
    """Nothing is left to do and nothing in the way: every peer that the mesh rightly names is joined.

    A mesh that could not be read, or peers that were refused, are problems all the same.
    """
    whole: bool = False
    """Whether the source says this now; else it is the last known good."""
    duration: float = 0.0
    """Seconds."""
    since: float = 0.0
    """When the mesh was read, in seconds since the epoch; 0 for never."""


def report(
    turn: ReconcileResult, node: str, traffic: Mapping[str, reports.Traffic], about: reports.Context
) -> reports.Report:
    """A turn, or a look at the system, as the report that every reader is shown."""
    return reports.report(
        turn.mesh,
        node,
        turn.facts,
        turn.want,
        turn.have,
        turn.plan,
        turn.problems,
        turn.converged,
        traffic,
        about,
    )
