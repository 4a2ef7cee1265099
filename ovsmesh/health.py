"""What the agent shows over HTTP: /metrics, /healthz, /readyz, /status.json and a status page.

Knows: HTTP and Prometheus' text format. Its threads read one immutable snapshot that the agent
publishes, so none of them ever waits for the loop or the loop for them. Never imports ovs,
pyroute2 or kubernetes. No series and no page grows without bound with the mesh.
"""

from __future__ import annotations

import contextlib
import html
import http.server
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from ovsmesh import __version__
from ovsmesh.model import KINDS, OvsmeshError
from ovsmesh.status import Report, age, timestamp

log = logging.getLogger("ovsmesh")

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: an unchanged mesh takes a few milliseconds a pass, a cold thousand of peers a second or two."""
_OPS = {"+": "add", "~": "change", "-": "remove"}
_STATES = ("wanted", "ok", "missing", "held")
_REQUEST_TIME = 10.0
"""Seconds that a connection may last, however slowly its bytes come."""
_CONNECTIONS = 16
_PAGE_PEERS = 300
LOOP_DEADLINE = 180.0
"""Seconds without a turn after which the loop counts as stuck: three times its longest pause."""


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


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int], health: Health) -> None:
        self.address_family = family
        self.health = health
        self._open: dict[socket.socket, float] = {}
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the host's name, which may take a minute
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "ovsmesh", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= _CONNECTIONS:
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        # a client that sends a byte now and then renews each timeout, but not this one
        late = time.monotonic() - _REQUEST_TIME
        for request, since in list(self._open.items()):
            if since < late:
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # its thread has just closed it

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP request from %s failed", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 5.0
    server: _Server

    def version_string(self) -> str:
        return "ovsmesh"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP %r", format % args)

    def do_GET(self) -> None:
        answer = self.server.health.answer(self.path.partition("?")[0])
        if answer is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there are /, /metrics, /healthz, /readyz, /status.json\n")
        else:
            self._send(*answer)

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", "GET only\n")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _send(self, code: HTTPStatus, kind: str, body: str | bytes) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        self.send_header("Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        if code is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _address(listen: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise OvsmeshError(f"--listen {listen}: wanted ADDRESS:PORT, as in 127.0.0.1:9474 or [::1]:9474")
    host = host.removeprefix("[").removesuffix("]")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


Answer = tuple[HTTPStatus, str, str | bytes]


class Health:
    """The agent's HTTP side. `publish` and `beat` are for the loop's thread; all else runs in threads of its own."""

    def __init__(self, listen: str, deadline: float = LOOP_DEADLINE) -> None:
        """Listens at once. Raises OvsmeshError where it can't."""
        family, address = _address(listen)
        self._deadline = deadline
        self._beat = time.monotonic()
        self._snapshot: _Snapshot | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(_Metrics(lambda: self._snapshot))
        try:
            self._server = _Server(family, address, self)
        except (OSError, UnicodeError) as e:
            why = (e.strerror if isinstance(e, OSError) else None) or str(e)
            raise OvsmeshError(
                f"--listen {listen}: can't listen there: {why}; "
                "end what uses that port (another agent?) or give another ADDRESS:PORT"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(1.0,), name="http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        """Stops listening; takes two seconds at most."""
        stop = threading.Thread(target=self._server.shutdown, daemon=True)
        stop.start()
        end = time.monotonic() + 2.0
        while stop.is_alive() and time.monotonic() < end:
            # it looks whether to stop when something connects, and once a second
            with contextlib.suppress(OSError):
                socket.create_connection(self._server.server_address[:2], timeout=0.1).close()  # type: ignore[arg-type]
            stop.join(0.02)
        self._server.server_close()

    def beat(self) -> None:
        """The loop is alive."""
        self._beat = time.monotonic()

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
        """The answer to a GET; None for a path that there is not."""
        pages: dict[str, Callable[[], Answer]] = {
            "/": self._page,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/status.json": self._json,
        }
        page = pages.get(path)
        return page() if page else None

    def _metrics(self) -> Answer:
        return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)

    def _healthz(self) -> Answer:
        silent = time.monotonic() - self._beat
        if silent > self._deadline:
            text = f"the loop has not turned for {silent:.0f} s (deadline {self._deadline:.0f} s)\n"
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", text
        return HTTPStatus.OK, "text/plain", "ok\n"

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
    troubles = [str(p) for p in sorted(report.problems, key=lambda p: not p.fatal)] + list(report.foreign)
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
