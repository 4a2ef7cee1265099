"""The agent's metrics, and what is added up for them. docs/metrics.md is made from this list.

No label grows with the mesh: peers are counted by state, and at most WORST of them have series of their own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ovsmesh import __version__
from ovsmesh.agent.result import NodeStatus
from ovsmesh.dataplane.report import NOT_REACHED, Peer, Report, Traffic
from ovsmesh.dataplane.types import KINDS, Reach, State
from ovsmesh.metrics import Metric

WORST = 20
"""Peers that have series of their own."""

_OPERATIONS = {"+": "add", "~": "change", "-": "remove"}
PEER_STATES = ("ok", "missing", "held", "refused", "unknown", *(s for s in State if s is not State.OK))
_PASSES_SOME = (State.SMALL, State.LOSSY)
_PASSES_NOTHING = tuple(state for state in State if state in NOT_REACHED and state not in _PASSES_SOME)
_ORDER = (*_PASSES_NOTHING, *_PASSES_SOME, "missing", "unknown", State.UNPROBED)
"""States of peers, the worst first; those that are not named here come last."""

Labelled = Iterator[tuple[tuple[str, ...], float]]


class Scrape(NamedTuple):
    """What one scrape is answered from."""

    status: NodeStatus
    tunnels: Traffic = Traffic()
    """What all tunnel ports have counted, ports that are gone included."""


class TunnelTotals:
    """Adds up what tunnel ports count. A port that goes or is made again takes nothing back: a counter only grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Mapping[str, Traffic] = {}
        self._total = Traffic()

    def add(self, report: Report) -> Traffic:
        """Take in what the ports of a report's peers have counted by now, and return the totals."""
        ports = {peer.port: peer.traffic for peer in report.peers if peer.port and peer.traffic is not None}
        with self._lock:
            for name, now in ports.items():
                self._total = Traffic(*map(_plus, self._total, now, self._last.get(name, Traffic())))
            # what can't be read now is not gone
            self._last = ports or self._last
            return self._total


def _plus(total: int | None, now: int | None, before: int | None) -> int | None:
    if now is None:
        return total
    # a port that was made again begins at nothing
    return (total or 0) + (now if before is None or now < before else now - before)


def _problems(scrape: Scrape) -> Labelled:
    reasons = Counter(problem.reason for problem in scrape.status.report.problems)
    return (((reason,), number) for reason, number in sorted(reasons.items()))


def _operations(scrape: Scrape) -> Labelled:
    done = scrape.status.counters.operations
    return (((kind, name), done[kind, op]) for kind in KINDS for op, name in _OPERATIONS.items())


def _known(*found: tuple[str, float | None]) -> Labelled:
    return (((label,) if label else (), value) for label, value in found if value is not None)


def _worst(report: Report) -> list[Peer]:
    """Return the worst peers that are probed. Equally bad ones are in the order of their names: no series flaps."""
    rank = {state: at for at, state in enumerate(_ORDER)}
    probed = [peer for peer in report.peers if peer.reach is not None]
    return sorted(probed, key=lambda peer: (rank.get(peer.state, len(rank)), peer.name))[:WORST]


def _of_worst(value: Callable[[Reach, Report], float | None]) -> Callable[[Scrape], Labelled]:
    def values(scrape: Scrape) -> Labelled:
        report = scrape.status.report
        return _known(*((p.name, value(p.reach, report)) for p in _worst(report) if p.reach is not None))

    return values


def _unreachable(reach: Reach, _: Report) -> float | None:
    return None if reach.state is State.UNPROBED else reach.state in _PASSES_NOTHING


def _path_mtu(reach: Reach, report: Report) -> float | None:
    # probes are of full size
    return reach.path_mtu or ((report.self.mtu or None) if reach.state is State.OK else None)


METRICS: tuple[Metric[Scrape], ...] = (
    Metric(
        "ovsmesh_build_info",
        "gauge",
        "Versions; always 1.",
        lambda s: [((__version__, s.status.report.self.ovs_version), 1)],
        ("version", "ovs_version"),
    ),
    Metric(
        "ovsmesh_mesh_info",
        "gauge",
        "The mesh in use, by its digest: nodes with the same mesh have the same; always 1.",
        lambda s: [((digest,), 1)] if (digest := s.status.report.self.mesh_digest) else [],
        ("digest",),
    ),
    Metric(
        "ovsmesh_mesh_current",
        "gauge",
        "1 while the mesh in use is what its source says, 0 while it is the last known good one.",
        lambda s: [] if s.status.result.mesh is None else [((), s.status.result.mesh_current)],
    ),
    Metric(
        "ovsmesh_peers",
        "gauge",
        "Peers of this node by state; each is in one state.",
        lambda s: [((state,), s.status.report.count(state)) for state in PEER_STATES],
        ("state",),
    ),
    Metric(
        "ovsmesh_peers_wanted",
        "gauge",
        "Peers that this node is to have: all but the held and the refused.",
        lambda s: s.status.report.count("wanted"),
    ),
    Metric(
        "ovsmesh_held_removals",
        "gauge",
        "Peers that left the mesh and whose removal is held until it is confirmed.",
        lambda s: len(s.status.result.plan.held_peers),
    ),
    Metric(
        "ovsmesh_peer_unreachable",
        "gauge",
        "1 for a peer that no packets get through to, else 0; for the worst 20 peers.",
        _of_worst(_unreachable),
        ("peer",),
    ),
    Metric(
        "ovsmesh_peer_path_mtu_bytes",
        "gauge",
        "The largest IP packet that gets through to a peer; for the worst 20 peers.",
        _of_worst(_path_mtu),
        ("peer",),
    ),
    Metric(
        "ovsmesh_peer_loss_ratio",
        "gauge",
        "Lost of the last 100 probes of a peer, 0 to 1; for the worst 20 peers.",
        _of_worst(lambda reach, _: reach.loss),
        ("peer",),
    ),
    Metric(
        "ovsmesh_peer_round_trip_seconds",
        "gauge",
        "Mean round trip to a peer; for the worst 20 peers.",
        _of_worst(lambda reach, _: reach.round_trip),
        ("peer",),
    ),
    Metric("ovsmesh_probes_sent", "counter", "Probes sent to peers.", lambda s: s.status.probes.sent),
    Metric("ovsmesh_probes_lost", "counter", "Probes that were not answered.", lambda s: s.status.probes.lost),
    Metric(
        "ovsmesh_probe_round_trip_seconds",
        "histogram",
        "Round trips of the probes that were answered, of all peers.",
        lambda s: s.status.probes.round_trips,
    ),
    Metric(
        "ovsmesh_tunnel_bytes",
        "counter",
        "Bytes through all tunnel ports.",
        lambda s: _known(("receive", s.tunnels.rx_bytes), ("transmit", s.tunnels.tx_bytes)),
        ("direction",),
    ),
    Metric(
        "ovsmesh_tunnel_packets",
        "counter",
        "Packets through all tunnel ports.",
        lambda s: _known(("receive", s.tunnels.rx_packets), ("transmit", s.tunnels.tx_packets)),
        ("direction",),
    ),
    Metric(
        "ovsmesh_tunnel_errors",
        "counter",
        "Packets that tunnel ports have dropped or could not carry.",
        lambda s: _known(("", s.tunnels.errors)),
    ),
    Metric("ovsmesh_converged", "gauge", "1 while nothing is left to do.", lambda s: s.status.result.converged),
    Metric(
        "ovsmesh_mesh_refused_nodes",
        "gauge",
        "Nodes of the mesh that can't be joined.",
        lambda s: s.status.report.count("refused"),
    ),
    Metric("ovsmesh_problems", "gauge", "Problems that status names, by reason.", _problems, ("reason",)),
    Metric(
        "ovsmesh_drift",
        "counter",
        "Parts found changed by someone else.",
        lambda s: [((kind,), s.status.counters.drift[kind]) for kind in KINDS],
        ("kind",),
    ),
    Metric("ovsmesh_apply_operations", "counter", "Changes made.", _operations, ("kind", "op")),
    Metric("ovsmesh_reconcile", "counter", "Reconciles.", lambda s: s.status.counters.reconciles),
    Metric(
        "ovsmesh_reconcile_errors", "counter", "Reconciles that failed in part.", lambda s: s.status.counters.failures
    ),
    Metric(
        "ovsmesh_reconcile_duration_seconds",
        "histogram",
        "Duration of a reconcile.",
        lambda s: s.status.counters.durations,
    ),
    Metric(
        "ovsmesh_last_success_timestamp_seconds",
        "gauge",
        "When a reconcile last ended without an error.",
        lambda s: s.status.counters.last_success,
    ),
)
