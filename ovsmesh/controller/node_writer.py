"""What a Node says of its mesh: conditions and Events are written, the startup taint is removed. A few at a time.

A Node whose writes are refused delays no other: each backs off by itself.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ovsmesh.controller.membership import NODES, TAINT, Membership, NodeView
from ovsmesh.controller.node_conditions import AgentReport, Wanted, bad_pairs, changes, judge, voters, why_isolated
from ovsmesh.errors import Problem
from ovsmesh.kube.client import JSON, Api, Conflict, Forbidden, Invalid, NotFound, path_of
from ovsmesh.kube.events import EventRecorder, ObjectReference
from ovsmesh.probe.quorum import Quorum
from ovsmesh.reasons import Reason
from ovsmesh.text import listed

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


_SETTLE = 5.0
"""Seconds that a bad pair lasts before an Event says so: it may be the first sign that one end is cut off."""
_GATHER = 30.0
"""Seconds between two Events about a node's peers: what comes meanwhile goes into the next one."""


class _Sent(NamedTuple):
    """A write, or an attempt."""

    node: NodeView
    until: float
    """When it is made again, if the Node has not changed by then (monotonic)."""
    failures: int = 0


_Pair = tuple[str, str]
"""A node, and a peer that packets between are lost."""


class Reachability:
    """Which Nodes are cut off and which pairs are bad, by the reports of all; Events about bad pairs.

    `problems` tell the Mesh of it.
    """

    def __init__(self, events: EventRecorder) -> None:
        self._events = events
        self.forget()

    def forget(self) -> None:
        """Begin again: another controller has led since."""
        self._quorum = Quorum()
        self._why: dict[str, str] | None = None
        """Isolated Node → why, as it is written; None before the first decision."""
        self._pairs: dict[_Pair, float] = {}
        """Bad pair, from one of its ends → since when (monotonic)."""
        self._told: dict[str, tuple[frozenset[str], float]] = {}
        """Node → the peers that its Events have named and that are still bad; when the last one was recorded."""
        self.problems: tuple[Problem, ...] = ()
        self.isolated = self.bad_pairs = 0
        """How many Nodes are isolated, and how many pairs of others lose packets."""
        self.split = False
        """Whether most nodes can't reach most others."""
        self._last: tuple[object, object] = (None, None)
        self._until = 0.0
        """What was decided from last, and until when that holds (monotonic)."""

    def decide(
        self, nodes: Mapping[str, NodeView], membership: Membership, reports: Mapping[str, AgentReport], clock: float
    ) -> tuple[Mapping[str, str], float]:
        """Return the isolated Nodes, each with the reason, and the seconds after which to decide again."""
        if self._why is not None and self._last[0] is membership and self._last[1] is reports and clock < self._until:
            return self._why, self._until - clock
        now = time.time()
        heard, able = voters(
            membership.members, reports, lambda name: nodes[name].created if name in nodes else "", now
        )
        if self._why is None:
            ready = {name: node.ready for name, node in nodes.items()}
            self._why = {n: r.message for n, r in ready.items() if r is not None and r.reason == Reason.Isolated}
        votes = {name: report.vote for name, report in heard.items() if report.vote}
        found = self._quorum.decide(votes, able, frozenset(self._why), clock, now)
        self._why = {name: self._why.get(name) or why_isolated(name, heard) for name in sorted(found.isolated)}
        apart = able if found.split else found.isolated | found.doubtful
        bad = bad_pairs(heard, able)
        # what is one node's fault is not told of each of its pairs
        quiet = {pair for pair in bad if not apart.isdisjoint(pair)}
        self._pairs = {pair: clock if pair in quiet else self._pairs.get(pair, clock) for pair in bad}
        again = self._record(bad, quiet, nodes, clock)
        pairs = sorted({(min(pair), max(pair)) for pair in bad.keys() - quiet})
        self.isolated, self.bad_pairs, self.split = len(self._why), len(pairs), found.split
        self.problems = (*self._problems(pairs),)
        self._last, self._until = (membership, reports), clock + min(_ALL, found.again, again)
        return self._why, self._until - clock

    def _record(
        self, bad: Mapping[_Pair, str], quiet: Collection[_Pair], nodes: Mapping[str, NodeView], clock: float
    ) -> float:
        """Record one Event a node about those of its pairs that are new; return the seconds until the next is due."""
        again = _ALL
        now: dict[str, dict[str, str]] = {}
        for (name, peer), text in bad.items():
            if name in nodes:
                now.setdefault(name, {})[peer] = text
        for name in sorted(self._told.keys() | now.keys()):
            lost = now.get(name, {})
            told, at = self._told.get(name, (frozenset[str](), float("-inf")))
            about = nodes.get(name)
            if about is None:
                del self._told[name]
                continue
            fresh = {peer for peer in lost.keys() - told if (name, peer) not in quiet}
            ripe = {peer for peer in fresh if clock - self._pairs[name, peer] >= _SETTLE}
            if ripe and clock - at >= _GATHER:
                texts = listed((lost[peer] for peer in sorted(ripe)), 3, "; ")
                self._events.record(_reference(about), Reason.PeersUnreachable, f"packets are lost: {texts}")
                told, at = told | ripe, clock
            elif told and not lost:
                self._events.record(_reference(about), Reason.PeersReachable, "packets get through again", False)
                told = frozenset()
            if waiting := fresh - told:
                due = max(at + _GATHER, min(self._pairs[name, peer] for peer in waiting) + _SETTLE)
                again = min(again, max(0.0, due - clock))
            if told & lost.keys() or clock - at < _GATHER:
                self._told[name] = told & lost.keys(), at
            else:
                self._told.pop(name, None)
        return again

    def _problems(self, pairs: Collection[_Pair]) -> list[Problem]:
        problems = [Problem(Reason.Isolated, text, name) for name, text in (self._why or {}).items()]
        if self.split:
            problems.append(Problem(Reason.MeshSplit, "most nodes can't reach most others; none of them is to blame"))
        if pairs:
            text = f"packets are lost between {listed((f'{one} and {other}' for one, other in pairs), 5)}"
            problems.append(Problem(Reason.PeersUnreachable, text, fatal=False))
        return problems


class NodeWriter:
    """`compare` finds what differs, `write` writes of it for a given time."""

    def __init__(self, api: Api, events: EventRecorder) -> None:
        self._api, self._events = api, events
        self._wanted: dict[str, tuple[NodeView, Wanted]] = {}
        """What is still to be written."""
        self._sent: dict[str, _Sent] = {}
        self.reachability = Reachability(events)
        self._good: dict[str, tuple[NodeView, AgentReport | None, Problem | None, str]] = {}
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
        self.reachability.forget()

    def compare(
        self, nodes: Mapping[str, NodeView], membership: Membership, reports: Mapping[str, AgentReport]
    ) -> float:
        """Compare all Nodes. Return the seconds after which it is due again without any change."""
        now, clock = time.time(), time.monotonic()
        self._membership = membership
        self._wanted.clear()
        isolated, again = self.reachability.decide(nodes, membership, reports, clock)
        if clock >= self._good_until:
            # An agent's silence changes a Node's conditions too.
            self._good.clear()
            self._good_until = clock + _ALL
        for name, node in nodes.items():
            report, problem, cut_off = reports.get(name), membership.problems.get(name), isolated.get(name, "")
            if (
                cut_off
                or report is not None
                or problem is not None
                or node.ready is None
                or node.ready.status != "True"
            ):
                self._lost.pop(name, None)
            elif (left := self._lost.setdefault(name, clock) + LOST - clock) > 0:
                again = min(again, left)
                continue
            good = self._good.get(name)
            if good is not None and good[0] is node and good[1] is report and good[2:] == (problem, cut_off):
                continue
            wanted = judge(node, membership, report, now, cut_off)
            if not changes(node, wanted, now) and not _removes_taint(node, wanted):
                self._good[name] = (node, report, problem, cut_off)
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
            self._record(node, wanted)
        if _removes_taint(node, wanted):
            steps: list[dict[str, Any]] = [{"op": "test", "path": "/metadata/uid", "value": node.uid}]
            for place in sorted(node.taints, reverse=True):
                steps.append({"op": "test", "path": f"/spec/taints/{place}/key", "value": TAINT})
                steps.append({"op": "remove", "path": f"/spec/taints/{place}"})
            self._api.patch(path, steps, JSON)
            self.writes += 1
            log.info("node %s: ready, taint %s lifted", node.name, TAINT)

    def _record(self, node: NodeView, wanted: Wanted) -> None:
        """Record an Event for a refusal that the Node's condition did not name yet, and for isolation and its end."""
        was = node.ready.reason if node.ready else ""
        if wanted.ready is not None and (was == Reason.Isolated) is not (wanted.ready.reason == Reason.Isolated):
            isolated = was != Reason.Isolated
            text = wanted.ready.message if isolated else "not isolated any more"
            log.warning("node %s: %s", node.name, text)
            self._events.record(
                _reference(node), Reason.Isolated if isolated else Reason.PeersReachable, text, isolated
            )
        problem = self._membership.problems.get(node.name)
        if problem is None or (node.ready is not None and node.ready.message == str(problem)[:1024]):
            return
        log.warning("%s", problem)
        self._events.record(_reference(node), problem.reason, str(problem))


def _reference(node: NodeView) -> ObjectReference:
    return ObjectReference("v1", "Node", node.name, node.uid)


def _removes_taint(node: NodeView, wanted: Wanted) -> bool:
    return bool(node.taints) and wanted.ready is not None and wanted.ready.status == "True"
