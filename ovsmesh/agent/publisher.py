"""Where a serving agent's turns are seen: over HTTP, and in the state directory for `ovsmesh status`.

Knows when a report is worth its making; the report itself is status's. Never imports ovs or pyroute2.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

from ovsmesh import __version__
from ovsmesh.agent.http import AgentHttp, Counters
from ovsmesh.agent.result import AgentCounters, ReconcileResult, report
from ovsmesh.dataplane import report as reports
from ovsmesh.errors import OvsmeshError
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

log = logging.getLogger("ovsmesh")

RETRIED = (Reason.ApplyFailed, Reason.PortError, Reason.NotConverged, Reason.TurnFailed, Reason.FilterFailed)
"""Problems that may go by themselves, and ring no bell when they do."""
_LISTEN_AGAIN = 5.0
"""Seconds between attempts to listen: another process may hold the port, or lo be down as yet."""
_OWN_REASONS = (*RETRIED, Reason.MassRemovalHeld)
"""Problems that only the agent can know; `status` finds the others itself."""


class StatusPublisher:
    """The report of a thousand peers takes longer to make than a turn, so it is made when the loop has
    nothing better to do, unless it changes whether all is well.
    """

    def __init__(self, listen: str, node: str, mesh_from: str, state: StateDir) -> None:
        self._node = node
        self._mesh_from = mesh_from
        self._state = state
        self._listen = listen
        self._health: AgentHttp | None = None
        self._listen_at = 0.0
        self._turn: ReconcileResult | None = None
        self._runtime = AgentCounters()
        self._shown: ReconcileResult | None = None
        self._kept: dict[str, Any] = {}
        self._open()

    def _open(self) -> None:
        """Listens; where that can't be, says so and tries again later: the mesh matters more than its metrics."""
        if self._health is None and time.monotonic() >= self._listen_at:
            try:
                self._health, self._shown = AgentHttp(self._listen), None
            except OvsmeshError as error:
                if not self._listen_at:
                    log.warning("no metrics and no readiness: %s", error)
                self._listen_at = time.monotonic() + _LISTEN_AGAIN

    def close(self) -> None:
        if self._health is not None:
            self._health.close()

    def publish(self, turn: ReconcileResult, runtime: AgentCounters) -> None:
        self._turn, self._runtime = turn, runtime
        if self._shown is None or self._shown.converged != turn.converged:
            self.flush()

    def flush(self) -> None:
        self._open()
        if self._health is not None:
            self._health.beat()
        turn, runtime = self._turn, self._runtime
        if turn is None or turn is self._shown:
            return
        self._shown = turn
        about = reports.Context(
            now=time.time(),
            agent_since=runtime.started,
            agent_version=__version__,
            ovs_version=runtime.ovs_version,
            mesh_from=self._mesh_from,
            mesh_since=turn.since or None,
            mesh_current=turn.whole,
            last_change=dict(runtime.last_change),
        )
        counters = Counters(
            runtime.turns,
            runtime.failures,
            runtime.last_success,
            turn.duration,
            dict(runtime.drift),
            dict(runtime.operations),
        )
        if self._health is not None:
            self._health.publish(report(turn, self._node, {}, about), counters)
        kept = {
            "since": runtime.started,
            "version": __version__,
            "lastChange": runtime.last_change,
            "drift": runtime.drift,
            "problems": [[p.reason, str(p)] for p in turn.problems if p.reason in _OWN_REASONS],
        }
        if kept != self._kept:
            self._kept = copy.deepcopy(kept)
            try:
                self._state.write_status(kept)
            except OSError as error:
                log.warning("status file in %s: %s", self._state.path, error.strerror)
