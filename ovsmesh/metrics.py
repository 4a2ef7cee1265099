"""Metrics as lists that can be read without a running process, and the collector that serves such a list."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

S = TypeVar("S")


class Histogram(NamedTuple):
    """How many values lay in each bucket, and their sum. Immutable."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets; one more bucket has none."""
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    def plus(self, value: float) -> Histogram:
        """Return this histogram with one value more."""
        counts = list(self.counts or [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        return Histogram(self.bounds, tuple(counts), self.sum + value)

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, number of values up to it), as Prometheus counts them."""
        counts = self.counts or [0] * (len(self.bounds) + 1)
        return list(zip([*map(str, self.bounds), "+Inf"], map(float, accumulate(counts)), strict=True))


Values = float | Histogram | Iterable[tuple[Sequence[str], float]]


@dataclass(frozen=True, slots=True)
class Metric(Generic[S]):
    """One metric: what it is called, what it says, and how its value is read from a snapshot of the process."""

    name: str
    """Without the suffix `_total` that Prometheus gives to counters."""
    kind: str
    """ "gauge", "counter" or "histogram"."""
    text: str
    """What it is, for the reader of /metrics and of docs/metrics.md."""
    value: Callable[[S], Values]
    """One number, or one a combination of `labels`."""
    labels: tuple[str, ...] = ()

    def family(self, snapshot: S) -> Family:
        """Return the metric with its values, as prometheus_client writes it."""
        found = self.value(snapshot)
        if isinstance(found, Histogram):
            histogram = HistogramMetricFamily(self.name, self.text)
            histogram.add_metric([], found.buckets(), found.sum)
            return histogram
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.text, labels=self.labels)
        for labels, value in [((), found)] if isinstance(found, (int, float)) else found:
            family.add_metric(list(labels), value)
        return family


class MetricsCollector(Collector, Generic[S]):
    """Makes the metrics from the current snapshot at each scrape, so nothing is kept of peers that are gone."""

    def __init__(self, metrics: Iterable[Metric[S]], current: Callable[[], S]) -> None:
        self._metrics, self._current = metrics, current

    def collect(self) -> Iterator[Family]:
        """Yield the metrics as they are now."""
        snapshot = self._current()
        return (metric.family(snapshot) for metric in self._metrics)
