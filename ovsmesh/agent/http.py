"""What the agent shows over HTTP: /metrics, /healthz, /readyz, /status.json and a status page.

Knows: HTTP and Prometheus' text format. Its threads read one immutable snapshot that the agent
publishes, so none of them ever waits for the loop or the loop for them. Never imports ovs,
pyroute2 or kubernetes. No series and no page grows without bound with the mesh.
"""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ovsmesh import __version__
from ovsmesh.dataplane.report import Report, age, timestamp
from ovsmesh.dataplane.types import KINDS
from ovsmesh.http_server import LOOP_DEADLINE, Answer, HttpServer

log = logging.getLogger("ovsmesh")

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: an unchanged mesh takes a few milliseconds a pass, a cold thousand of peers a second or two."""
_OPS = {"+": "add", "~": "change", "-": "remove"}
_STATES = ("wanted", "ok", "missing", "held")
_PAGE_PEERS = 300


@dataclass(frozen=True, slots=True)
class Counters:
    """What the agent has counted since it started."""

    turns: int = 0
    failures: int = 0
    last_success: float = 0.0
    """Seconds since the epoch; 0 for never."""
    duration: float = 0.0
    """Seconds that the last turn took."""
    drift: Mapping[str, int] = field(default_factory=dict)
    """Kind → parts that someone else had changed."""
    operations: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(kind, "+", "~" or "-") → changes made."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    report: Report
    counters: Counters
    buckets: tuple[int, ...]
    """Turns that took no longer than the bucket, for each of _BUCKETS."""
    seconds: float


class _Metrics(Collector):
    """Turns the snapshot into metrics at each scrape, so nothing is counted twice or kept for peers long gone."""

    def __init__(self, current: Callable[[], _Snapshot | None]) -> None:
        self._current = current

    def collect(self) -> Iterator[Metric]:
        snapshot = self._current()
        info = GaugeMetricFamily("ovsmesh_build_info", "Versions; always 1.", labels=["version", "ovs_version"])
        info.add_metric([__version__, snapshot.report.self.ovs_version if snapshot else ""], 1)
        yield info
        if snapshot is None:
            return
        report, counters = snapshot.report, snapshot.counters
        peers = GaugeMetricFamily("ovsmesh_peers", "Peers of this node by state.", labels=["state"])
        for state in _STATES:
            peers.add_metric([state], report.count(state))
        yield peers
        yield GaugeMetricFamily("ovsmesh_converged", "1 while nothing is left to do.", int(report.converged))
        refused = report.count("refused")
        yield GaugeMetricFamily("ovsmesh_mesh_refused_nodes", "Nodes of the mesh that can't be joined.", refused)
        problems = GaugeMetricFamily("ovsmesh_problems", "Problems that status names, by reason.", labels=["reason"])
        reasons = [problem.reason for problem in report.problems]
        for reason in sorted(set(reasons)):
            problems.add_metric([reason], reasons.count(reason))
        yield problems
        drift = CounterMetricFamily("ovsmesh_drift", "Parts found changed by someone else.", labels=["kind"])
        operations = CounterMetricFamily("ovsmesh_apply_operations", "Changes made.", labels=["kind", "op"])
        for kind in KINDS:
            drift.add_metric([kind], counters.drift.get(kind, 0))
            for op, name in _OPS.items():
                operations.add_metric([kind, name], counters.operations.get((kind, op), 0))
        yield drift
        yield operations
        yield CounterMetricFamily("ovsmesh_reconcile", "Turns of the loop.", counters.turns)
        yield CounterMetricFamily("ovsmesh_reconcile_errors", "Turns that failed in part.", counters.failures)
        histogram = HistogramMetricFamily("ovsmesh_reconcile_duration_seconds", "Duration of a turn.")
        buckets = [(str(le), float(n)) for le, n in zip(_BUCKETS, snapshot.buckets, strict=False)]
        histogram.add_metric([], [*buckets, ("+Inf", float(snapshot.buckets[-1]))], snapshot.seconds)
        yield histogram
        name = "ovsmesh_last_success_timestamp_seconds"
        yield GaugeMetricFamily(name, "When a turn last ended without an error.", counters.last_success)


class AgentHttp(HttpServer):
    """The agent's HTTP side. `publish` and `beat` are for the loop's thread; all else runs in threads of its own."""

    def __init__(self, listen: str, deadline: float = LOOP_DEADLINE) -> None:
        """Listens at once. Raises OvsmeshError where it can't."""
        self._snapshot: _Snapshot | None = None
        super().__init__(listen, deadline)
        self.registry.register(_Metrics(lambda: self._snapshot))

    def publish(self, report: Report, counters: Counters) -> None:
        """A turn has ended, and this is what it found; both are kept and must not be changed afterwards."""
        self.beat()
        old = self._snapshot
        counts = list(old.buckets) if old else [0] * (len(_BUCKETS) + 1)
        for n, limit in enumerate((*_BUCKETS, float("inf"))):
            counts[n] += counters.duration <= limit
        seconds = (old.seconds if old else 0.0) + counters.duration
        self._snapshot = _Snapshot(report, counters, tuple(counts), seconds)

    # What is answered

    def answer(self, path: str) -> Answer | None:
        pages = {"/": self._page, "/readyz": self._readyz, "/status.json": self._json}
        return pages[path]() if path in pages else super().answer(path)

    def _readyz(self) -> Answer:
        snapshot = self._snapshot
        if snapshot is None:
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", "no turn has ended yet\n"
        # a mesh that is away or wrong does not make the node unready, as it keeps what was good; nor does the brake
        report = snapshot.report
        held = bool(report.pending) and all(line.startswith("= held") for line in report.pending)
        if not (report.converged or held):
            told = [str(p) for p in report.problems if p.fatal] or [report.headline]
            text = "not converged: " + "; ".join(told)
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", text + "\n"
        return HTTPStatus.OK, "text/plain", "ok\n"

    def _json(self) -> Answer:
        snapshot = self._snapshot
        if snapshot is None:
            return HTTPStatus.SERVICE_UNAVAILABLE, "application/json", "{}\n"
        return HTTPStatus.OK, "application/json", json.dumps(snapshot.report.to_dict()) + "\n"

    def _page(self) -> Answer:
        snapshot = self._snapshot
        body = _page_body(snapshot.report) if snapshot else "<h1>no turn has ended yet</h1>"
        return HTTPStatus.OK, "text/html", _PAGE.format(body=body)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ovsmesh</title><meta http-equiv="refresh" content="5">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
h1 {{ font-size: 1.3em; border-left: .4em solid #2a7; padding-left: .6em }} h1.bad {{ border-color: #c33 }}
table {{ border-collapse: collapse; margin: 1em 0 }} td, th {{ text-align: left; padding: .15em 1em .15em 0 }}
tr.bad td {{ color: #b00 }} ul {{ color: #b00 }} th {{ color: #666; font-weight: normal }}
</style></head><body>
{body}
</body></html>
"""


def _row(cells: list[str], tag: str = "td", bad: bool = False) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{' class=bad' if bad else ''}>{inner}</tr>"


def _page_body(report: Report) -> str:
    me, now = report.self, report.time
    bad = any(c.type == "Degraded" and c.status == "True" for c in report.conditions) or not report.converged
    parts = [f"<h1{' class=bad' if bad else ''}>{html.escape(report.headline)}</h1>"]
    troubles = [str(p) for p in sorted(report.problems, key=lambda p: not p.fatal)] + list(report.unmanaged)
    if troubles:
        parts.append(f"<ul>{''.join(f'<li>{html.escape(text)}' for text in troubles[:_PAGE_PEERS])}</ul>")
    facts = [
        ["node", f"{me.name} {me.address} {me.encapsulation}"],
        ["pod CIDRs", ", ".join(me.pod_cidrs)],
        ["MTU", f"{me.mtu} ({me.mtu_from})"],
        ["Open vSwitch", f"{me.ovs_version} {me.datapath_type}"],
        ["agent since", timestamp(me.agent_since) if me.agent_since is not None else "-"],
        *([c.type, f"{c.status} {c.reason} {c.message}"] for c in report.conditions),
    ]
    parts.append(f"<table>{''.join(map(_row, facts))}</table>")
    rows = [_row(["peer", "address", "pod CIDRs", "port", "rx", "tx", "errors", "changed", "state"], "th")]
    worst = sorted(report.peers, key=lambda peer: peer.state == "ok")
    for peer in worst[:_PAGE_PEERS]:
        t = peer.traffic
        numbers = [str(t.rx_packets), str(t.tx_packets), str(t.errors)] if t else ["-"] * 3
        changed = age(now - peer.last_change) + " ago" if peer.last_change is not None else "-"
        state = ": ".join([peer.state, *peer.missing[:1]])
        cells = [peer.name, peer.address, ", ".join(peer.pod_cidrs), peer.port, *numbers, changed, state]
        rows.append(_row(cells, bad=peer.state != "ok"))
    parts.append(f"<table>{''.join(rows)}</table>")
    if len(worst) > _PAGE_PEERS:
        parts.append(f"<p>and {len(worst) - _PAGE_PEERS} more: see <code>ovsmesh status</code></p>")
    parts.append(f"<p>as of {timestamp(now)}</p>")
    return "\n".join(parts)
