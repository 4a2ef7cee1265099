"""What the controller shows over HTTP: /metrics, /healthz, /readyz. Imports health and prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ovsmesh.http_server import Answer, HttpServer


@dataclass(frozen=True, slots=True)
class Counts:
    """What the controller has counted; published whole after each turn."""

    synced: bool = False
    leads: bool = False
    nodes: int = 0
    converged: int = 0
    refused: int = 0
    slices: int = 0
    turns: int = 0
    slice_writes: int = 0
    node_writes: int = 0
    errors: int = 0
    seconds: float = 0.0
    """Time spent in turns."""
    waiting: str = ""
    """What it waits for before it can be ready."""


_GAUGES = {
    "leader": ("leads", "1 while this process holds the lease."),
    "nodes": ("nodes", "Members of the mesh."),
    "converged_nodes": ("converged", "Members whose own agent says Converged."),
    "refused_nodes": ("refused", "Nodes that can't be joined."),
    "slices": ("slices", "MeshSlices."),
}
_COUNTERS = {
    "turns": ("turns", "Turns of the loop."),
    "turn_seconds": ("seconds", "Seconds spent in turns."),
    "slice_writes": ("slice_writes", "MeshSlices written."),
    "node_writes": ("node_writes", "Writes to Nodes."),
    "errors": ("errors", "Writes that failed and were tried again."),
}


class _Metrics(Collector):
    def __init__(self) -> None:
        self.counts = Counts()

    def collect(self) -> Iterator[Metric]:
        counts = self.counts
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"ovsmesh_controller_{name}", text, float(getattr(counts, field)))
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"ovsmesh_controller_{name}", text, float(getattr(counts, field)))


class ControllerHttp(HttpServer):
    """The controller's HTTP side. `report` and `beat` are for the loop's thread."""

    def __init__(self, listen: str) -> None:
        """Listens at once. Raises OvsmeshError where it can't."""
        self._metrics_of = _Metrics()
        super().__init__(listen)
        self.registry.register(self._metrics_of)

    def report(self, counts: Counts) -> None:
        self.beat()
        self._metrics_of.counts = counts

    def answer(self, path: str) -> Answer | None:
        if path == "/readyz":
            counts = self._metrics_of.counts
            if not counts.synced:
                text = f"waiting for {counts.waiting or 'the first turn'}\n"
                return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", text
            return HTTPStatus.OK, "text/plain", "ok, leading\n" if counts.leads else "ok, standing by\n"
        return super().answer(path)
