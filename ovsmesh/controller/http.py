"""The controller's metrics and HTTP endpoints: /metrics, /healthz, /readyz."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from ovsmesh.http_server import Answer, HttpServer
from ovsmesh.metrics import Metric, MetricsCollector


@dataclass(frozen=True, slots=True)
class Counts:
    """What the controller has counted; published whole after each pass of its loop."""

    waiting: str = "the first pass"
    """What it must read before it is ready."""
    leads: bool = False
    nodes: int = 0
    converged: int = 0
    refused: int = 0
    isolated: int = 0
    bad_pairs: int = 0
    split: bool = False
    slices: int = 0
    turns: int = 0
    slice_writes: int = 0
    node_writes: int = 0
    errors: int = 0
    seconds: float = 0.0
    """Time spent in passes."""


METRICS: tuple[Metric[Counts], ...] = (
    Metric("ovsmesh_controller_leader", "gauge", "1 while this process holds the lease.", lambda c: c.leads),
    Metric("ovsmesh_controller_nodes", "gauge", "Members of the mesh.", lambda c: c.nodes),
    Metric(
        "ovsmesh_controller_converged_nodes", "gauge", "Members whose own agent says Converged.", lambda c: c.converged
    ),
    Metric("ovsmesh_controller_refused_nodes", "gauge", "Nodes that can't be joined.", lambda c: c.refused),
    Metric("ovsmesh_controller_isolated_nodes", "gauge", "Nodes that most others can't reach.", lambda c: c.isolated),
    Metric("ovsmesh_controller_bad_pairs", "gauge", "Pairs of other nodes that lose packets.", lambda c: c.bad_pairs),
    Metric("ovsmesh_controller_mesh_split", "gauge", "1 while most nodes can't reach most others.", lambda c: c.split),
    Metric("ovsmesh_controller_slices", "gauge", "MeshSlices.", lambda c: c.slices),
    Metric("ovsmesh_controller_turns", "counter", "Reconciles.", lambda c: c.turns),
    Metric("ovsmesh_controller_turn_seconds", "counter", "Seconds spent in reconciles.", lambda c: c.seconds),
    Metric("ovsmesh_controller_slice_writes", "counter", "MeshSlices written.", lambda c: c.slice_writes),
    Metric("ovsmesh_controller_node_writes", "counter", "Writes to Nodes.", lambda c: c.node_writes),
    Metric("ovsmesh_controller_errors", "counter", "Writes that failed and were tried again.", lambda c: c.errors),
)
"""The controller's metrics; docs/metrics.md is made from this list."""


class ControllerHttp(HttpServer):
    """The controller's HTTP server. Only the loop's thread may call `report`."""

    def __init__(self, listen: str) -> None:
        """Listen at once. Raises OvsmeshError if it can't."""
        self._counts = Counts()
        super().__init__(listen)
        self.registry.register(MetricsCollector(METRICS, lambda: self._counts))

    def report(self, counts: Counts) -> None:
        """Publish `counts`, and show that the loop runs."""
        self.beat()
        self._counts = counts

    def answer(self, path: str) -> Answer | None:
        """Return the answer to a GET of `path`; None where there is no such path."""
        if path == "/readyz":
            counts = self._counts
            if counts.waiting:
                return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"waiting for {counts.waiting}\n"
            return HTTPStatus.OK, "text/plain", "ok, leading\n" if counts.leads else "ok, standing by\n"
        return super().answer(path)
