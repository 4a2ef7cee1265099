"""The agent's metrics. No label grows with the mesh; docs/metrics.md is made from this list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ovsmesh import __version__
from ovsmesh.agent.result import NodeStatus
from ovsmesh.dataplane.types import KINDS, State
from ovsmesh.metrics import Metric

_OPERATIONS = {"+": "add", "~": "change", "-": "remove"}
_PEER_STATES = ("wanted", "ok", "missing", "held", "refused", "unknown", *(s for s in State if s is not State.OK))


def _problems(status: NodeStatus) -> Iterator[tuple[tuple[str], float]]:
    reasons = Counter(problem.reason for problem in status.report.problems)
    return (((reason,), number) for reason, number in sorted(reasons.items()))


def _operations(status: NodeStatus) -> Iterator[tuple[tuple[str, str], float]]:
    done = status.counters.operations
    return (((kind, name), done[kind, op]) for kind in KINDS for op, name in _OPERATIONS.items())


METRICS: tuple[Metric[NodeStatus], ...] = (
    Metric(
        "ovsmesh_build_info",
        "gauge",
        "Versions; always 1.",
        lambda s: [((__version__, s.report.self.ovs_version), 1)],
        ("version", "ovs_version"),
    ),
    Metric(
        "ovsmesh_peers",
        "gauge",
        "Peers of this node by state.",
        lambda s: [((state,), s.report.count(state)) for state in _PEER_STATES],
        ("state",),
    ),
    Metric("ovsmesh_converged", "gauge", "1 while nothing is left to do.", lambda s: s.result.converged),
    Metric(
        "ovsmesh_mesh_refused_nodes",
        "gauge",
        "Nodes of the mesh that can't be joined.",
        lambda s: s.report.count("refused"),
    ),
    Metric("ovsmesh_problems", "gauge", "Problems that status names, by reason.", _problems, ("reason",)),
    Metric(
        "ovsmesh_drift",
        "counter",
        "Parts found changed by someone else.",
        lambda s: [((kind,), s.counters.drift[kind]) for kind in KINDS],
        ("kind",),
    ),
    Metric("ovsmesh_apply_operations", "counter", "Changes made.", _operations, ("kind", "op")),
    Metric("ovsmesh_reconcile", "counter", "Reconciles.", lambda s: s.counters.reconciles),
    Metric("ovsmesh_reconcile_errors", "counter", "Reconciles that failed in part.", lambda s: s.counters.failures),
    Metric(
        "ovsmesh_reconcile_duration_seconds",
        "histogram",
        "Duration of a reconcile.",
        lambda s: s.counters.durations,
    ),
    Metric(
        "ovsmesh_last_success_timestamp_seconds",
        "gauge",
        "When a reconcile last ended without an error.",
        lambda s: s.counters.last_success,
    ),
)
