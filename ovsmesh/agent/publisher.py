"""Publish the node's status over HTTP (/metrics, /healthz, /readyz, JSON, a page) and in the state directory.

HTTP threads read one immutable status, so none of them waits for the loop, nor the loop for them. The page is one
static file; what it shows it reads from the JSON documents.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from importlib import resources
from typing import Any

from ovsmesh import __version__
from ovsmesh.agent.metrics import METRICS, Scrape, TunnelTotals
from ovsmesh.agent.result import RETRIED, AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.errors import OvsmeshError
from ovsmesh.http_server import Answer, HttpServer
from ovsmesh.metrics import MetricsCollector
from ovsmesh.probe.exchange import Exchange
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

log = logging.getLogger("ovsmesh")

_OWN_REASONS = (*RETRIED, Reason.MassRemovalHeld)
"""Reasons of problems that only the agent can know; `status` finds the others itself."""
_LISTEN_AGAIN = 5.0
"""Seconds between attempts to listen: another process may hold the port, or lo may be down."""

Documents = dict[str, Callable[[], object]]
"""Path → what makes the object that is answered there as JSON; None while there is none. Called in HTTP's threads."""


@functools.cache
def _page() -> str:
    return (resources.files("ovsmesh.agent") / "page.html").read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """Return the Content-Security-Policy under which nothing but the page's own script and style runs."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


class AgentHttp(HttpServer):
    """The agent's HTTP endpoints. `publish` and `beat` belong to the loop's thread."""

    def __init__(self, listen: str, documents: Documents | None = None) -> None:
        """Listen at once. Raise OvsmeshError where that is not possible."""
        self.policy = _policy(_page())
        self._documents = {} if documents is None else documents
        self._status = NodeStatus(ReconcileResult(), AgentCounters())
        super().__init__(listen)
        self._tunnels = TunnelTotals()
        self.registry.register(MetricsCollector(METRICS, self._scrape))

    def _scrape(self) -> Scrape:
        status = self._status
        return Scrape(status, self._tunnels.add(status.report))

    def publish(self, status: NodeStatus) -> None:
        """Show this status from now on."""
        self.beat()
        self._status = status

    def answer(self, path: str) -> Answer | None:
        """Answer /, /readyz, /status.json and the documents; the rest is HttpServer's."""
        status = self._status
        first = not status.counters.reconciles
        if path == "/":
            return HTTPStatus.OK, "text/html", _page()
        if path == "/readyz":
            unready = "not reconciled yet" if first else _unready(status)
            code = HTTPStatus.SERVICE_UNAVAILABLE if unready else HTTPStatus.OK
            return code, "text/plain", f"{unready or 'ok'}\n"
        if path == "/status.json":
            if first:
                return HTTPStatus.SERVICE_UNAVAILABLE, "application/json", "{}\n"
            return HTTPStatus.OK, "application/json", json.dumps(status.report.to_dict()) + "\n"
        if path in self._documents:
            found = self._documents[path]()
            code = HTTPStatus.SERVICE_UNAVAILABLE if found is None else HTTPStatus.OK
            return code, "application/json", json.dumps(found or {}) + "\n"
        return super().answer(path)

    def paths(self) -> list[str]:
        """Return what there is to get."""
        return ["/", *super().paths(), "/status.json", *self._documents]


def _unready(status: NodeStatus) -> str:
    """Return why the node is not ready, "" if it is.

    A mesh that is away or wrong does not make a node unready, as the node keeps what was good. Nor does a removal
    that is held.
    """
    result = status.result
    held = bool(result.plan.held) and not result.plan.steps and not result.plan.blocked
    if result.converged or held:
        return ""
    fatal = [str(problem) for problem in result.problems if problem.fatal]
    return "not converged: " + "; ".join(fatal or [status.report.headline])


class StatusPublisher:
    """Publishes each reconcile over HTTP at once, and in the state directory when the loop is idle."""

    def __init__(self, listen: str, state: StateDir) -> None:
        """Listen at `listen`; "" for nowhere. Where that is not possible, try again later: the mesh matters more."""
        self._state, self._listen = state, listen
        self._http: AgentHttp | None = None
        self._listen_at = 0.0 if listen else float("inf")
        self._status: NodeStatus | None = None
        self._written: dict[str, Any] = {}
        self._documents: Documents = {}
        self._open()

    def _open(self) -> None:
        if self._http is not None or time.monotonic() < self._listen_at:
            return
        try:
            self._http = AgentHttp(self._listen, self._documents)
        except OvsmeshError as error:
            if not self._listen_at:
                log.warning("no metrics, no readiness and no page: %s", error)
            self._listen_at = time.monotonic() + _LISTEN_AGAIN
            return
        if self._status is not None:
            self._http.publish(self._status)

    def serve(self, path: str, document: Callable[[], object]) -> None:
        """Answer GET `path` with what `document` returns, as JSON; it is called in HTTP's threads."""
        self._documents[path] = document

    def close(self) -> None:
        """Stop listening."""
        if self._http is not None:
            self._http.close()

    def publish(self, status: NodeStatus) -> None:
        """Show this status; write it too if whether the node converged has changed."""
        before, self._status = self._status, status
        if self._http is not None:
            self._http.publish(status)
        if before is None or before.result.converged != status.result.converged:
            self.idle()

    def idle(self) -> None:
        """Try again to listen, say that the loop is alive, and write the status file."""
        self._open()
        if self._http is not None:
            self._http.beat()
        if self._status is not None:
            self._write(self._status)

    def _write(self, status: NodeStatus) -> None:
        """Write what `ovsmesh status` can't see itself into the state directory, if it has changed."""
        counters = status.counters
        facts = {
            "since": counters.started,
            "version": __version__,
            "lastChange": counters.last_change,
            "drift": counters.drift,
            "problems": [[p.reason, str(p)] for p in status.result.problems if p.reason in _OWN_REASONS],
        }
        if facts == self._written:
            return
        self._written = facts
        try:
            self._state.write_status(facts)
        except OSError as error:
            log.warning("%s: the status file can't be written: %s", self._state.path, error.strerror)


class RowPublisher:
    """Gives the peers' agents this node's row of the matrix, as of the last reconcile."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def publish(self, status: NodeStatus) -> None:
        """Give this status from now on."""
        self._exchange.update(status.result.mesh, status.result.facts, lambda: status.report)

    def idle(self) -> None:
        """Do nothing: peers ask when they want."""
