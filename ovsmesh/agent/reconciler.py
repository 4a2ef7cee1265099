"""The loop of one node: snapshot → desired → plan → apply → report, run again whenever a bell rings.

Joins sources, mesh, plan, host and board; decides nothing that those do not. One thread
has every effect. Level-triggered: a bell only makes the loop run sooner.
"""

from __future__ import annotations

import hashlib
import logging
import random
import select
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.publisher import RETRIED
from ovsmesh.agent.result import AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.dataplane import desired
from ovsmesh.dataplane.plan import Plan, due, in_sync, plan
from ovsmesh.dataplane.report import unmanaged_beside
from ovsmesh.dataplane.types import Dataplane, Facts, Observed
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.linux.netlink import read_sysctls
from ovsmesh.mesh.source import Source
from ovsmesh.mesh.types import Mesh
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

log = logging.getLogger("ovsmesh")

RESYNC = 60.0
"""Seconds between readings of the whole system, in case a notification was lost."""
SYSCTL_POLL = 0.5
"""Seconds between looks at the sysctls, most of which the kernel changes without a word."""
SWITCH_POLL = 0.1
"""Seconds between looks for a switch that is down: its socket coming back rings no bell of ours."""
BRAKE_HOLD = 300.0
"""Seconds for which a mass removal is held unless it is confirmed."""
_ROUNDS = 3
_ONCE_TRIES = 4
_BACKOFF = (0.2, 30.0)
_LOG_LINES = 20


class Publisher(Protocol):
    """Where the node's status goes after each reconcile. Both methods are called in the loop's thread."""

    def publish(self, status: NodeStatus) -> None:
        """Take in the status after a reconcile."""

    def idle(self) -> None:
        """Do what can wait until the loop has nothing else to do."""


class Reconciler:
    """One node's agent. `run` returns when it is told to stop, `once` when there is nothing left to do."""

    def __init__(self, node: str, source: Source, host: Driver, state: StateDir, mesh_from: str = "") -> None:
        self._node, self._mesh_from = node, mesh_from
        self._source = source
        self._host = host
        self._state = state
        self.counters = AgentCounters(started=time.time())
        self._mesh: Mesh | None = None
        self._facts: Facts | None = None
        self._base: tuple[Dataplane, tuple[Problem, ...]] | None = None
        self._was_converged = False
        self._held: frozenset[str] = frozenset()
        self._held_since = float("inf")
        self._wait_failed = _BACKOFF[0]
        self._retry_at = float("inf")
        self._outdated = False
        """Whether the host became another one in the course of the last turn."""
        self._told: frozenset[str] = frozenset()
        self.last = ReconcileResult()

    # one turn

    def reconcile(self) -> ReconcileResult:
        """Brings the system to what the source wants, as far as it goes, and says how that ended."""
        started = time.monotonic()
        self._outdated = False
        try:
            self.last = self._reconcile(started)
        except (OvsmeshError, OSError) as error:
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            problem = Problem(Reason.TurnFailed, text)
            seconds = time.monotonic() - started
            self.last = ReconcileResult(
                self._mesh, self._facts, None, None, Plan(), (problem,), False, duration=seconds
            )
            self._host.dirty()
        self._after(self.last)
        return self.last

    def _reconcile(self, started: float) -> ReconcileResult:
        snapshot = self._source.snapshot()
        problems = snapshot.problems
        if snapshot.mesh is None:
            return ReconcileResult(problems=problems, duration=time.monotonic() - started)
        want, refused = self._desired(snapshot.mesh)
        have = self._host.observe(want)
        todo = self._plan(want, have)
        if todo.steps and self._was_converged:
            self._tell_drift(todo)
        failed: list[Problem] = []
        for _ in range(_ROUNDS):
            now = due(todo, have.problems)
            if not now.steps:
                break
            self._remember(now)
            failed = self._host.apply(now, want)
            self._count(now)
            want, _ = self._desired(snapshot.mesh)
            have = self._host.observe(want)
            before, todo = todo, self._plan(want, have)
            if todo.steps == before.steps:
                break
        # what changed while we worked has rung its bell already
        me = snapshot.mesh.node(self._node)
        self._outdated = me is not None and self._host.facts(snapshot.mesh, me, probe_firewall=False) != self._facts
        if due(todo, have.problems).steps and not failed:
            failed = [
                Problem(Reason.NotConverged, f"{len(todo.steps)} changes did not take, the first: {todo.steps[0]}")
            ]
        converged = in_sync(todo, (*have.problems, *failed))
        problems = (*problems, *refused, *have.problems, *failed, *_braked(todo), *unmanaged_beside(have, todo))
        seconds = time.monotonic() - started
        return ReconcileResult(
            snapshot.mesh,
            self._facts,
            want,
            have,
            todo,
            problems,
            converged,
            snapshot.confirmed,
            seconds,
            snapshot.since,
        )

    def _desired(self, wanted: Mesh) -> tuple[Dataplane, tuple[Problem, ...]]:
        me = wanted.node(self._node)
        # facts and observation must be of one state, so nothing is taken in between them
        self._host.drain()
        # what the packet filter can't do shows when it is written
        facts = self._host.facts(wanted, me, probe_firewall=False) if me else Facts()
        if self._base is None or wanted is not self._mesh or facts != self._facts:
            # another wish or another host: what differs now is no one's drift
            self._was_converged = False
            self._base = desired.dataplane(wanted, self._node, facts)
            self._mesh, self._facts = wanted, facts
        return self._base

    def _plan(self, want: Dataplane, have: Observed) -> Plan:
        """The plan, with the brake lifted where these removals were confirmed or have been held for long enough."""
        todo = plan(want, have)
        held = frozenset(todo.held_peers)
        if not held:
            self._held, self._held_since = held, float("inf")
            return todo
        if not held <= self._held:
            self._held_since = time.monotonic()
        self._held = held
        if self._state.confirmation() == held_digest(todo):
            self._state.clear_confirmation()
            self._held_since = float("-inf")
        if time.monotonic() >= self._held_until():
            return plan(want, have, confirmed=True)
        return todo

    def _remember(self, todo: Plan) -> None:
        old = {s.key: s.have for s in todo.steps if s.kind == "sysctls" and s.have is not None}
        if old:
            for problem in self._state.remember(old):
                log.warning("%s", problem)

    def _count(self, todo: Plan) -> None:
        now = time.time()
        for step in todo.steps:
            self.counters.operations[step.kind, step.op] += 1
            if step.kind == "ports":
                self.counters.last_change[(step.want or step.have).node] = (now, str(step))
        for line in _some(todo.steps):
            log.info("%s", line)

    def _tell_drift(self, todo: Plan) -> None:
        self.counters.drift.update(step.kind for step in todo.steps)
        lines = _some(f"{step.kind} {step.key}" for step in todo.steps)
        log.warning("drift: someone changed %s", "; ".join(lines))

    def _after(self, turn: ReconcileResult) -> None:
        runtime = self.counters
        runtime.reconciles += 1
        runtime.durations = runtime.durations.plus(turn.duration)
        runtime.ovs_version = self._host.ovs.version or runtime.ovs_version
        self._was_converged = turn.converged
        # a blocked or refused part waits for its bell, a failed one for its turn
        failed = any(p.reason in RETRIED for p in turn.problems)
        if failed:
            runtime.failures += 1
            self._retry_at = time.monotonic() + self._wait_failed * random.uniform(0.5, 1.0)
            self._wait_failed = min(self._wait_failed * 2, _BACKOFF[1])
        else:
            runtime.last_success = time.time()
            self._wait_failed = _BACKOFF[0]
            self._retry_at = float("inf")
        told = frozenset(map(str, turn.problems)) | frozenset(map(str, turn.plan.blocked))
        for line in sorted(told - self._told):
            log.warning("%s", line)
        for line in sorted(self._told - told):
            log.info("no longer: %s", line)
        self._told = told

    # for ever

    def run(self, stop_fds: Sequence[int], publish: Publisher) -> None:
        """Turns whenever a bell rings, until one of `stop_fds` is readable. The dataplane stays in place."""
        self._turn_and_publish(publish)
        now = time.monotonic()
        resync, look = now + RESYNC * random.uniform(0.8, 1.0), now + SYSCTL_POLL
        while True:
            timeout = min(resync, look, self._retry_at, self._held_until()) - time.monotonic()
            if self._outdated:
                timeout = 0.0
            waiting = self._waiting()
            if waiting or self._host.switch_lost:
                timeout = min(timeout, SWITCH_POLL)
            self._host.wait([*stop_fds, *self._source.fds()], max(0.0, timeout))
            if readable(stop_fds):
                return
            rang = self._source.drain()
            rang |= self._host.drain()
            now = time.monotonic()
            if now >= look:
                look = now + SYSCTL_POLL
                rang |= self._sysctls_changed()
                rang |= self._confirm_asked()
                if not rang:
                    publish.idle()
            if now >= resync:
                resync = now + RESYNC * random.uniform(0.8, 1.0)
                self._host.dirty()
                rang = True
            if now >= self._retry_at:
                self._host.retry()
                rang = True
            rang |= self._outdated or waiting or now >= self._held_until()
            rang |= self._host.switch_lost and self._host.switch_answers()
            if rang:
                self._turn_and_publish(publish)

    def _turn_and_publish(self, publish: Publisher) -> None:
        turn = self.reconcile()
        publish.publish(NodeStatus(turn, self.counters, self._node, self._mesh_from))
        if turn.converged:
            for problem in self._source.commit():
                log.warning("%s", problem)

    def _waiting(self) -> bool:
        """Whether flow-restore-wait is left standing for a moment, whose end rings no bell."""
        have = self.last.have
        return have is not None and "restore_wait" in have.unknown and not have.unknown & {"flows", "ports"}

    def _sysctls_changed(self) -> bool:
        """Since they were observed last: one that can't be as wanted must not ring for ever."""
        turn = self.last
        if turn.want is None or turn.have is None:
            return False
        return read_sysctls(turn.want.sysctls) != turn.have.dataplane.sysctls

    def _held_until(self) -> float:
        return self._held_since + BRAKE_HOLD

    def _confirm_asked(self) -> bool:
        return bool(self.last.plan.held) and self._state.confirmation() is not None

    def once(self, publish: Publisher, deadline: float = 60.0) -> ReconcileResult:
        """Turns until the plan is empty or nothing more can be done, for `deadline` seconds at most."""
        end = time.monotonic() + deadline
        self._turn_and_publish(publish)
        while (time.monotonic() < end or self._host.busy) and self.counters.failures < _ONCE_TRIES:
            if self._host.busy or self._host.expecting:
                self._host.wait(self._source.fds(), SYSCTL_POLL)
                self._source.drain()
                if not self._host.drain():
                    continue
            elif not self._outdated:
                if self.last.converged or self._retry_at >= end:
                    break
                self._host.wait(self._source.fds(), max(0.0, self._retry_at - time.monotonic()))
                self._source.drain()
                self._host.drain()
                if time.monotonic() < self._retry_at:
                    continue
                self._host.retry()
            self._turn_and_publish(publish)
        return self.last


def held_digest(todo: Plan) -> str:
    """What `ovsmesh confirm` names: these removals and no others."""
    return hashlib.sha256("\n".join(todo.held_peers).encode()).hexdigest()[:12]


def _braked(todo: Plan) -> tuple[Problem, ...]:
    if not todo.held:
        return ()
    names = ", ".join(_some(todo.held_peers, 5))
    text = (
        f"the mesh lacks {len(todo.held_peers)} of this node's peers at once ({names}); their removal is held for "
        f"{BRAKE_HOLD:.0f} s: `ovsmesh confirm {held_digest(todo)}` carries it out now"
    )
    return (Problem(Reason.MassRemovalHeld, text),)


def _some(things: Iterable[object], most: int = _LOG_LINES) -> list[str]:
    """The first of them as texts: telling a thousand peers' parts takes longer than making them."""
    every = list(things)
    more = [f"and {len(every) - most} more"] if len(every) > most else []
    return [*map(str, every[:most]), *more]


def readable(fds: Sequence[int], timeout: float = 0.0) -> bool:
    """Whether one of them is, within `timeout` seconds; nothing is taken out of it."""
    asked = select.poll()
    for fd in fds:
        asked.register(fd, select.POLLIN)
    return bool(asked.poll(timeout * 1000))
