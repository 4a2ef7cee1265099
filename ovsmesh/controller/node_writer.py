"""What a Node says of its mesh: conditions and Events are written, the startup taint is removed. A few at a time.

A Node whose writes are refused delays no other: each backs off by itself.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ovsmesh.controller.membership import NODES, TAINT, Membership, NodeView
from ovsmesh.controller.node_conditions import AgentReport, Wanted, changes, judge
from ovsmesh.errors import Problem
from ovsmesh.kube.client import JSON, Api, Conflict, Forbidden, Invalid, NotFound, path_of
from ovsmesh.kube.events import EventRecorder, ObjectReference

log = logging.getLogger("ovsmesh")

STRATEGIC = "application/strategic-merge-patch+json"
"""Merges conditions by their type, so that the kubelet's stay."""
_ECHO = 5.0
"""Seconds in which a write should come back through the watch; then it is made again."""
_LONGEST = 60.0
"""Seconds that a Node whose writes are refused waits at most."""
LOST = 360.0
"""Seconds that a ready Node's conditions stand without its MeshNode. If someone deleted it, the node's agent makes it
again with its next routine write, within 300 s. Nothing asks for it sooner, so that agents hear nothing at rest."""
_ALL = 30.0
"""Seconds after which all Nodes are compared, whether anything about them changed or not."""


class _Sent(NamedTuple):
    """A write, or an attempt."""

    node: NodeView
    until: float
    """When it is made again, if the Node has not changed by then (monotonic)."""
    failures: int = 0


class NodeWriter:
    """`compare` finds what differs, `write` writes of it for a given time."""

    def __init__(self, api: Api, events: EventRecorder) -> None:
        self._api, self._events = api, events
        self._wanted: dict[str, tuple[NodeView, Wanted]] = {}
        """What is still to be written."""
        self._sent: dict[str, _Sent] = {}
        self._good: dict[str, tuple[NodeView, AgentReport | None, Problem | None]] = {}
        """Nodes that need no write, and what that was decided from."""
        self._good_until = 0.0
        self._lost: dict[str, float] = {}
        """Ready Node without a MeshNode → since when (monotonic)."""
        self._membership = Membership((), {})
        self.writes = 0
        self.errors = 0

    def forget(self) -> None:
        """Forget all decisions and writes: another controller has led since."""
        for known in (self._wanted, self._sent, self._good, self._lost):
            known.clear()

    def compare(
        self, nodes: Mapping[str, NodeView], membership: Membership, reports: Mapping[str, AgentReport]
    ) -> float:
        """Compare all Nodes. Return the seconds after which it is due again without any change."""
        now, clock = time.time(), time.monotonic()
        self._membership = membership
        self._wanted.clear()
        again = _ALL
        if clock >= self._good_until:
            # An agent's silence changes a Node's conditions too.
            self._good.clear()
            self._good_until = clock + _ALL
        for name, node in nodes.items():
            report, problem = reports.get(name), membership.problems.get(name)
            if report is not None or problem is not None or node.ready is None or node.ready.status != "True":
                self._lost.pop(name, None)
            elif (left := self._lost.setdefault(name, clock) + LOST - clock) > 0:
                again = min(again, left)
                continue
            good = self._good.get(name)
            if good is not None and good[0] is node and good[1] is report and good[2] == problem:
                continue
            wanted = judge(node, membership, report, now)
            if not changes(node, wanted, now) and not _removes_taint(node, wanted):
                self._good[name] = (node, report, problem)
                continue
            self._good.pop(name, None)
            sent = self._sent.get(name)
            if sent is not None and clock < sent.until and sent.node == node:
                again = min(again, sent.until - clock)
                continue
            self._wanted[name] = (node, wanted)
        for known in (self._sent, self._good, self._lost):
            for name in known.keys() - nodes.keys():
                del known[name]
        return max(0.05, again)

    def write(self, seconds: float) -> bool:
        """Write until `seconds` have passed; return whether some are left. Raises Unavailable, NotLeader."""
        end = time.monotonic() + seconds
        while self._wanted and time.monotonic() <= end:
            _, found = self._wanted.popitem()
            self._try(*found)
        return bool(self._wanted)

    def _try(self, node: NodeView, wanted: Wanted) -> None:
        before = self._sent.get(node.name)
        failures = before.failures if before else 0
        try:
            self._write(node, wanted)
        except (Conflict, Invalid, NotFound, Forbidden) as error:
            self.errors += 1
            pause = min(_LONGEST, 0.2 * 2.0 ** min(failures, 9)) * random.uniform(0.7, 1.3)
            self._sent[node.name] = _Sent(node, time.monotonic() + pause, failures + 1)
            level = logging.WARNING if failures == 3 else logging.DEBUG
            log.log(level, "node %s: conditions not written: %s", node.name, error)
        else:
            self._sent[node.name] = _Sent(node, time.monotonic() + _ECHO)

    def _write(self, node: NodeView, wanted: Wanted) -> None:
        path = path_of(NODES, node.name)
        made = changes(node, wanted, time.time())
        if made:
            body: dict[str, Any] = {"metadata": {"uid": node.uid}, "status": {"conditions": made}}
            self._api.patch(f"{path}/status", body, STRATEGIC)
            self.writes += 1
            self._record(node)
        if _removes_taint(node, wanted):
            steps: list[dict[str, Any]] = [{"op": "test", "path": "/metadata/uid", "value": node.uid}]
            for place in sorted(node.taints, reverse=True):
                steps.append({"op": "test", "path": f"/spec/taints/{place}/key", "value": TAINT})
                steps.append({"op": "remove", "path": f"/spec/taints/{place}"})
            self._api.patch(path, steps, JSON)
            self.writes += 1
            log.info("node %s: ready, taint %s lifted", node.name, TAINT)

    def _record(self, node: NodeView) -> None:
        """Record an Event for a refusal that the Node's condition did not name yet."""
        problem = self._membership.problems.get(node.name)
        if problem is None or (node.ready is not None and node.ready.message == str(problem)[:1024]):
            return
        log.warning("%s", problem)
        self._events.record(ObjectReference("v1", "Node", node.name, node.uid), problem.reason, str(problem))


def _removes_taint(node: NodeView, wanted: Wanted) -> bool:
    return bool(node.taints) and wanted.ready is not None and wanted.ready.status == "True"
