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
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from importlib import resources

from ovsmesh.agent.metrics import METRICS, Scrape, TunnelTotals
from ovsmesh.agent.result import RETRIED, AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.errors import OvsmeshError
from ovsmesh.http_server import Answer, HttpServer
from ovsmesh.metrics import MetricsCollector
from ovsmesh.probe.exchange import Exchange
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import timestamp

log = logging.getLogger("ovsmesh")

OWN_REASONS = (*RETRIED, Reason.MassRemovalHeld, Reason.StateUnwritable, Reason.NamespaceClaimed)
"""Reasons of problems that only the agent can know; `status` finds the others itself."""
_LISTEN_AGAIN = 5.0
"""Seconds between attempts to listen: another process may hold the port, or lo may be down."""
_WRITE_AGAIN = 5.0
"""Seconds between reports in the state directory."""
_WRITE_SHARE = 0.005
"""Of a core, which the reports may take: one of a thousand peers takes 0.05 s."""
_STILL_TRUE = 10.0
"""Seconds between words that the last one is still true."""

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
            tree = {**status.report.to_dict(), "loopRan": timestamp(time.time() - self.silent)}
            return HTTPStatus.OK, "application/json", json.dumps(tree) + "\n"
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
        self._file = _StatusFile(state)
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
        """Stop listening, and leave the last report."""
        if self._http is not None:
            self._http.close()
        if self._status is not None:
            self._file.close(self._status)

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
            host = self._listen.rpartition(":")[0]
            self._file.update(self._status, f"{host}:{self._http.port}" if self._http else "")


class _StatusFile:
    """Keeps the last report in the state directory, for when the agent does not answer any more.

    The file's time says until when the report was true, but for the figures of the probes.
    """

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._kept: tuple[NodeStatus, str] | None = None
        self._next = self._touch_at = 0.0
        self._thread: threading.Thread | None = None
        self._error = ""
        self._took = 0.0
        """Seconds of CPU that the last report took."""

    def update(self, status: NodeStatus, listen: str) -> None:
        """Write the report, in a thread of its own, where it may have changed; else say that it is still true.

        `listen` is where the agent really listens, "" for nowhere.
        """
        now = time.monotonic()
        if now < self._next or (self._thread is not None and self._thread.is_alive()):
            return
        before, self._kept = self._kept, (status, listen)
        if before is None or before[1] != listen or _differs(status, before[0]):
            self._next = now + max(_WRITE_AGAIN, self._took / _WRITE_SHARE)
            self._touch_at = now + _STILL_TRUE
            self._thread = threading.Thread(target=self._write, args=(status, listen), name="report", daemon=True)
            self._thread.start()
        elif now >= self._touch_at:
            self._touch_at = now + _STILL_TRUE
            self._state.touch_status()

    def close(self, status: NodeStatus) -> None:
        """Write the last report."""
        if self._thread is not None:
            self._thread.join(_WRITE_AGAIN)
        self._write(status, self._kept[1] if self._kept else "")

    def _write(self, status: NodeStatus, listen: str) -> None:
        began = time.thread_time()
        try:
            self._state.write_status({**status.report.to_dict(), "listen": listen})
            self._error = ""
        except OSError as error:
            if str(error) != self._error:
                log.warning("%s: the status file can't be written: %s", self._state.path, error.strerror)
            self._error = str(error)
        self._took = time.thread_time() - began


def _differs(now: NodeStatus, before: NodeStatus) -> bool:
    """Return whether the report of one may say something else than the other's. A report itself takes long to make."""
    if now is before:
        return False
    a, b = now.result, before.result
    same = (a.converged, a.plan, a.problems, now.states) == (b.converged, b.plan, b.problems, before.states)
    return not same or a.mesh is not b.mesh or bool(a.drift)


class RowPublisher:
    """Gives the peers' agents this node's row of the matrix, as of the last reconcile."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def publish(self, status: NodeStatus) -> None:
        """Give this status from now on."""
        self._exchange.update(status.result.mesh, status.result.facts, lambda: status.report)

    def idle(self) -> None:
        """Forget what nobody has asked for lately."""
        self._exchange.idle()
