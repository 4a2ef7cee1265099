"""Writes what a Node should say of its mesh: conditions, the startup taint, Events. A few at a time.

One Node's refusal delays nobody: each backs off by itself. Imports kube, kubeevents, reports, membership and model.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovsmesh.controller.membership import TAINT, Membership, NodeView
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
LOST = 360.0
"""Seconds that a ready Node's conditions stand without its MeshNode: someone deleted it, and the node's agent makes it
again with its next routine write, within 300 s. It is not asked for sooner, so that agents hear nothing at rest."""
_ALL = 30.0
"""Seconds after which all Nodes are compared, whether anything about them changed or not."""


@dataclass
class _Sent:
    node: NodeView
    until: float
    failures: int = 0


class NodeWriter:
    """`survey` finds what is to be written, `work` writes of it for a given time."""

    def __init__(self, api: Api, events: EventRecorder) -> None:
        self._api, self._events = api, events
        self._todo: deque[str] = deque()
        self._wanted: dict[str, tuple[NodeView, Wanted]] = {}
        self._sent: dict[str, _Sent] = {}
        self._clean: dict[str, tuple[NodeView, AgentReport | None, Problem | None]] = {}
        """Nodes that say what they should, and what that was found out from."""
        self._clean_until = 0.0
        self._lost: dict[str, float] = {}
        """Ready Node without a MeshNode → since when (monotonic)."""
        self._membership = Membership((), {})
        self.writes = 0
        self.errors = 0

    def survey(
        self, nodes: Mapping[str, NodeView], membership: Membership, reports: Mapping[str, AgentReport]
    ) -> float:
        """Compares all. Returns the seconds after which it should be done again without any change."""
        now, clock = time.time(), time.monotonic()
        self._membership = membership
        self._wanted.clear()
        again = _ALL
        if clock >= self._clean_until:
            # an agent's silence changes a Node's conditions too
            self._clean.clear()
            self._clean_until = clock + _ALL
        for name, node in nodes.items():
            report, problem = reports.get(name), membership.problems.get(name)
            if report is not None or problem is not None or node.ready is None or node.ready.status != "True":
                self._lost.pop(name, None)
            elif (left := self._lost.setdefault(name, clock) + LOST - clock) > 0:
                again = min(again, left)
                continue
            seen = self._clean.get(name)
            if seen is not None and seen[0] is node and seen[1] is report and seen[2] == problem:
                continue
            wanted = judge(node, membership, report, now)
            ready = wanted.ready is not None and wanted.ready.status == "True"
            if not changes(node, wanted, now) and not (ready and node.taints):
                self._clean[name] = (node, report, problem)
                continue
            self._clean.pop(name, None)
            sent = self._sent.get(name)
            if sent is not None and clock < sent.until and sent.node == node:
                again = min(again, sent.until - clock)
                continue
            self._wanted[name] = (node, wanted)
        queued = set(self._todo)
        self._todo.extend(name for name in self._wanted if name not in queued)
        for known in (self._sent, self._clean, self._lost):
            for name in known.keys() - nodes.keys():
                del known[name]
        return max(0.05, again)

    def work(self, seconds: float) -> bool:
        """Writes until `seconds` have passed; True when some are left. Raises Unavailable, NotLeader."""
        end = time.monotonic() + seconds
        while self._todo:
            if time.monotonic() > end:
                return True
            name = self._todo.popleft()
            found = self._wanted.pop(name, None)
            if found is not None:
                self._one(*found)
        return False

    def forget(self) -> None:
        """Nothing of what was found before counts any more: another has led meanwhile."""
        self._todo.clear()
        self._wanted.clear()
        self._sent.clear()
        self._clean.clear()
        self._lost.clear()

    def _one(self, node: NodeView, wanted: Wanted) -> None:
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
        path = path_of("/api/v1/nodes", node.name)
        made = changes(node, wanted, time.time())
        if made:
            body: dict[str, Any] = {"metadata": {"uid": node.uid}, "status": {"conditions": made}}
            self._api.patch(f"{path}/status", body, STRATEGIC)
            self.writes += 1
            self._tell(node)
        if wanted.ready is not None and wanted.ready.status == "True" and node.taints:
            steps: list[dict[str, Any]] = [{"op": "test", "path": "/metadata/uid", "value": node.uid}]
            for place in sorted(node.taints, reverse=True):
                steps.append({"op": "test", "path": f"/spec/taints/{place}/key", "value": TAINT})
                steps.append({"op": "remove", "path": f"/spec/taints/{place}"})
            self._api.patch(path, steps, JSON)
            self.writes += 1
            log.info("node %s: ready, taint %s lifted", node.name, TAINT)

    def _tell(self, node: NodeView) -> None:
        """An Event for a refusal that the Node's condition did not name yet."""
        problem = self._membership.problems.get(node.name)
        if problem is None or (node.ready is not None and node.ready.message == str(problem)[:1024]):
            return
        log.warning("%s", problem)
        self._events.record(ObjectReference("v1", "Node", node.name, node.uid), problem.reason, str(problem))
