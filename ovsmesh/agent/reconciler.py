"""The loop of one node: snapshot, desired, observed, plan, apply, publish; again whenever an event source wakes it.

One thread has every effect. Level-triggered: an event only makes the loop run sooner.
"""

from __future__ import annotations

import hashlib
import logging
import random
import select
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.result import (
    RETRIED,
    AgentCounters,
    Comparison,
    EventLog,
    NodeStatus,
    ReconcileResult,
    compare,
)
from ovsmesh.containers.forwarding import FORWARDING, side_effects
from ovsmesh.dataplane.plan import Plan, Step, due, plan
from ovsmesh.dataplane.report import NOT_REACHED, Held
from ovsmesh.dataplane.types import KINDS, Dataplane, Facts, Observed, State
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.history import History
from ovsmesh.mesh.source import Snapshot, Source
from ovsmesh.mesh.types import Mesh
from ovsmesh.names import DEFAULT_STATE
from ovsmesh.probe.sender import Prober, Totals
from ovsmesh.probe.targets import targets
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import clock, duration, listed

log = logging.getLogger("ovsmesh")

RESYNC = 60.0
"""Seconds between readings of the whole system, in case a notification was lost."""
SYSCTL_POLL = 0.5
"""Seconds between looks at the sysctls: the kernel announces few of their changes."""
_IDLE = 2.0
"""Seconds between what publishers do while nothing happens."""
SWITCH_POLL = 0.1
"""Seconds between looks for a switch that is down: nothing announces that its socket is back."""
REMOVAL_HOLD = 300.0
"""Seconds for which a mass removal is held unless it is confirmed."""
_ROUNDS = 3
_ONCE_TRIES = 4
_BACKOFF = (0.2, 30.0)
_NEVER = float("inf")


class Publisher(Protocol):
    """Where the node's status goes after each reconcile. Both methods are called in the loop's thread."""

    def publish(self, status: NodeStatus) -> None:
        """Take in the status after a reconcile."""

    def idle(self) -> None:
        """Do what can wait until the loop has nothing else to do."""


class RemovalGuard:
    """Holds a mass removal until it is confirmed in the state directory, or was held for REMOVAL_HOLD seconds."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._peers: frozenset[str] = frozenset()
        self._since = _NEVER
        self._ends = 0.0
        """When a hold ends, in seconds since the epoch: for people."""
        self.lifted = ""
        """Who lifted the last hold; "" while there is none, or it ended by itself."""
        self.until = _NEVER
        """When a hold ends (monotonic seconds)."""

    def answered(self) -> bool:
        """Return whether there is a hold, and somebody has confirmed something."""
        return self.until != _NEVER and self._state.confirmation() is not None

    def plan(self, want: Dataplane, have: Observed) -> Plan:
        """Return the plan, with its removals where they need not be held any longer."""
        todo = plan(want, have)
        peers = frozenset(todo.held_peers)
        if not peers:
            self._since = _NEVER
        elif not peers <= self._peers:
            self._since, self._ends, self.lifted = time.monotonic(), time.time() + REMOVAL_HOLD, ""
        self._peers = peers
        if peers and self._state.confirmation() == held_digest(todo):
            self._state.clear_confirmation()
            self._since, self.lifted = -_NEVER, "ovsmesh confirm"
        self.until = self._since + REMOVAL_HOLD
        if time.monotonic() < self.until:
            return todo
        # lifted for these peers: what fails is tried again as any other step is
        self.until = _NEVER
        if peers and not self.lifted:
            self.lifted = f"nobody objected for {duration(REMOVAL_HOLD)}"
        return plan(want, have, confirmed=True)

    def held(self, todo: Plan) -> Held | None:
        """Return what a plan holds."""
        return Held(todo.held_peers, held_digest(todo), self._ends) if todo.held else None

    def problems(self, held: Held | None) -> tuple[Problem, ...]:
        """Return the problem that names the held removals, and how to confirm them."""
        if held is None:
            return ()
        own = "" if str(self._state.path) == DEFAULT_STATE else f" --state-dir {shlex.quote(str(self._state.path))}"
        text = (
            f"{len(held.peers)} of this node's peers are missing from the mesh at once ({listed(held.peers, 5)}); "
            f"their removal is held until {clock(held.until, held.until)}: `ovsmesh confirm {held.digest}{own}` "
            "carries it out now"
        )
        return (Problem(Reason.MassRemovalHeld, text),)


class Reconciler:
    """One node's agent. `run` returns when it is told to stop, `once` when there is nothing left to do."""

    def __init__(
        self,
        node: str,
        source: Source,
        driver: Driver,
        state: StateDir,
        mesh_from: str = "",
        prober: Prober | None = None,
        history: History | None = None,
    ) -> None:
        self._node, self._mesh_from = node, mesh_from
        self._source, self._driver, self._state = source, driver, state
        self._prober = prober
        self._reached: dict[str, State] = {}
        self._cut_off = False
        """Whether no peer is reachable."""
        self._guard = RemovalGuard(state)
        self.counters = AgentCounters(started=time.time())
        self.last = ReconcileResult()
        self._compared: Comparison | None = None
        self._outdated = False
        """Whether the facts changed during the last reconcile."""
        self._backoff = _BACKOFF[0]
        self._retry_at = _NEVER
        self._events = EventLog(history or History(), node, mesh_from)
        self._applied: list[Step] = []
        """What the present reconcile has applied, and who caused it."""
        self._who = "agent start"
        self._drift_by = ""

    # one reconcile

    def reconcile(self) -> ReconcileResult:
        """Bring the node to what the source wants, as far as that is possible, and return how it ended."""
        started = time.monotonic()
        self._outdated = False
        self._applied.clear()
        snapshot = Snapshot(None)
        try:
            snapshot = self._source.snapshot()
            if not self.counters.reconciles:
                self._events.start(snapshot.mesh)
            result = self._reconcile(snapshot)
        except (OvsmeshError, OSError) as error:
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            result = ReconcileResult(snapshot.mesh, self.last.facts, problems=(Problem(Reason.TurnFailed, text),))
            self._compared = None
            self._driver.dirty()
        before, self.last = self.last, replace(result, duration=time.monotonic() - started)
        self._count(self.last)
        self._events.reconciled(before, self.last, self._applied, self._who, self._guard.lifted, self._drift_by)
        return self.last

    def _reconcile(self, snapshot: Snapshot) -> ReconcileResult:
        if snapshot.mesh is None:
            return ReconcileResult(problems=snapshot.problems)
        before, now = self._compared, self._compare(snapshot.mesh)
        self._who = self._cause(before, now)
        drift = _drift(before, now) if self.last.converged and before else Plan()
        self.counters.drift.update(step.kind for step in drift.steps)
        self._drift_by = self._driver.who(drift)
        failed: list[Problem] = []
        for _ in range(_ROUNDS):
            steps = due(now.plan, now.have.problems)
            if not steps:
                break
            self._record_sysctls(steps, now.facts)
            self._applied += steps.steps
            failed = self._driver.apply(steps, now.want)
            self._count_steps(steps)
            before, now = now, self._compare(snapshot.mesh)
            if now.plan.steps == before.plan.steps:
                break
        if due(now.plan, now.have.problems) and not failed:
            text = f"{len(now.plan.steps)} changes did not take, the first: {now.plan.steps[0]}"
            failed = [Problem(Reason.NotConverged, text)]
        # an event of this time is read already, and wakes nobody
        self._outdated = self._driver.facts(snapshot.mesh, self._node, False, self._path_mtus()) != now.facts
        held = self._guard.held(now.plan)
        return replace(
            now.result(snapshot, (*failed, *self._guard.problems(held), *self._state.problems)), drift=drift, held=held
        )

    def _compare(self, mesh: Mesh) -> Comparison:
        # the packet filter is not probed: a refused apply() finds out what it can't do
        self._compared = compare(
            self._driver, mesh, self._node, self._compared, self._guard.plan, False, self._path_mtus()
        )
        return self._compared

    def _path_mtus(self) -> Mapping[str, int | None]:
        return self._prober.path_mtus() if self._prober else {}

    def _path_mtu_changed(self) -> bool:
        """Return whether the probes know something else of a path's MTU than its route has."""
        facts = self.last.facts
        return facts is not None and any(facts.path_mtus.get(n) != mtu for n, mtu in self._path_mtus().items())

    def _record_sysctls(self, todo: Plan, facts: Facts | None) -> None:
        """Record the old values of the sysctls that are about to be written, for `cleanup` and the next agent."""
        old = {s.key: s.have for s in todo.steps if s.kind == "sysctls" and s.have is not None}
        for key in list(old):
            old |= {k: v for k, v in side_effects(key).items() if k not in old}
        problems = self._state.remember(old) if old else ()
        if facts and any(key in FORWARDING for key in old):
            problems = (*problems, *self._state.note_off(facts.forward_limited))
        for problem in problems:
            log.warning("%s", problem)

    def _count_steps(self, todo: Plan) -> None:
        now = time.time()
        for step in todo.steps:
            self.counters.operations[step.kind, step.op] += 1
            if step.kind == "ports":
                self.counters.last_change[(step.want or step.have).node] = (now, str(step))

    def _count(self, result: ReconcileResult) -> None:
        """Count a reconcile, and set the time of the next if it failed. What is blocked waits for its event."""
        counters = self.counters
        counters.reconciles += 1
        counters.durations = counters.durations.plus(result.duration)
        if any(problem.reason in RETRIED and problem.fatal for problem in result.problems):
            counters.failures += 1
            self._retry_at = time.monotonic() + self._backoff * random.uniform(0.5, 1.0)
            self._backoff = min(self._backoff * 2, _BACKOFF[1])
        else:
            counters.last_success = time.time()
            self._backoff, self._retry_at = _BACKOFF[0], _NEVER

    def _cause(self, before: Comparison | None, now: Comparison) -> str:
        """Return who causes the changes of a reconcile, as far as that is known."""
        if self._guard.lifted and self.last.plan.held:
            return self._guard.lifted
        if not self.counters.reconciles:
            return "agent start"
        if now.mesh is not (before.mesh if before else self.last.mesh):
            return self._mesh_from if self._mesh_from == "MeshSlices" else "mesh file"
        if before is not None and now.want is not before.want:
            if before.facts == replace(now.facts, path_mtus=before.facts.path_mtus):
                return "the path MTU that the probes found"
            return "a change of this host"
        reasons = {problem.reason for problem in self.last.problems}
        return "Open vSwitch is back" if reasons & {Reason.DatabaseDown, Reason.SwitchDown} else "another attempt"

    def _tell_reach(self, prober: Prober) -> None:
        """Tell which peers are not reachable any more, with the likely cause, and which are again."""
        before, self._reached = self._reached, prober.states()
        lost = {name for name, state in self._reached.items() if state is not before.get(name) and state in NOT_REACHED}
        self._events.reached(self._reached, prober.results(lost) if lost else {}, self.last)

    # the loop

    def run(self, stop_fds: Sequence[int], publishers: Sequence[Publisher]) -> None:
        """Reconcile at every event until one of `stop_fds` is readable. The dataplane stays in place."""
        self._reconcile_and_publish(publishers)
        now = time.monotonic()
        resync, idle = now + RESYNC * random.uniform(0.8, 1.0), now + SYSCTL_POLL
        while True:
            polled = self._restore_pending()
            pause = min(resync, idle, self._retry_at, self._guard.until) - time.monotonic()
            if polled or self._driver.switch_lost:
                pause = min(pause, SWITCH_POLL)
            probes = [self._prober.fd] if self._prober else []
            pause = 0.0 if self._outdated else max(0.0, pause)
            self._driver.wait([*stop_fds, *self._source.fds(), *probes], pause, self._looked, SYSCTL_POLL)
            if readable(stop_fds):
                self._events.stop()
                return
            now = time.monotonic()
            woken = self._source.drain()
            woken |= self._driver.drain()
            woken |= self._looked()
            if now >= idle:
                idle = now + _IDLE
                for publisher in () if woken else publishers:
                    publisher.idle()
            if now >= resync:
                resync = now + RESYNC * random.uniform(0.8, 1.0)
                self._driver.dirty()
                self._state.retry()
                woken = True
            if now >= self._retry_at:
                self._driver.retry()
                woken = True
            woken |= self._outdated or polled or now >= self._guard.until
            if woken or (self._driver.switch_lost and self._driver.switch_answers()):
                self._reconcile_and_publish(publishers)
            elif self._prober and self._prober.drain():
                self._tell_reach(self._prober)
                before, states = self._cut_off, set(self._reached.values())
                self._cut_off = bool(states) and states <= NOT_REACHED
                if self._path_mtu_changed():
                    self._reconcile_and_publish(publishers)
                elif self._cut_off and not before:
                    # what cuts all of them off at once is on this host, and not everything here announces its end
                    self._driver.dirty()
                    self._reconcile_and_publish(publishers)
                else:
                    self._publish(publishers)

    def _publish(self, publishers: Sequence[Publisher]) -> None:
        reach, states = (self._prober.results, self._prober.states()) if self._prober else (None, None)
        totals = self._prober.totals if self._prober else Totals
        status = NodeStatus(
            self.last, self.counters, self._node, self._mesh_from, reach, states, self._driver.figures, totals
        )
        for publisher in publishers:
            publisher.publish(status)

    def _reconcile_and_publish(self, publishers: Sequence[Publisher]) -> None:
        result = self.reconcile()
        if self._prober and result.mesh is not None and result.facts is not None and result.have is not None:
            self._prober.update(targets(result.mesh, self._node, result.facts, result.have.dataplane))
        self._publish(publishers)
        if result.converged:
            for problem in self._source.commit():
                log.warning("%s", problem)

    def _restore_pending(self) -> bool:
        """Return whether flow-restore-wait is deliberately left set. Nothing announces its end."""
        have = self.last.have
        return have is not None and "restore_wait" in have.unknown and not have.unknown & {"flows", "ports"}

    def _looked(self) -> bool:
        """Return whether there is something to do that nothing announces.

        A sysctl counts that differs from what was observed: one that can't be set must not wake the loop.
        """
        want, have = self.last.want, self.last.have
        if want is not None and have is not None and self._driver.sysctls(want) != have.dataplane.sysctls:
            return True
        return self._guard.answered()

    def once(self, publishers: Sequence[Publisher], deadline: float = 60.0) -> ReconcileResult:
        """Reconcile until the plan is empty or nothing more can be done, for `deadline` seconds at most."""
        end = time.monotonic() + deadline
        self._reconcile_and_publish(publishers)
        while (time.monotonic() < end or self._driver.busy) and self.counters.failures < _ONCE_TRIES:
            if self._driver.busy or self._driver.expecting:
                self._driver.wait(self._source.fds(), SYSCTL_POLL)
                self._source.drain()
                if not self._driver.drain():
                    continue
            elif not self._outdated:
                if self.last.converged or self._retry_at >= end:
                    break
                self._driver.wait(self._source.fds(), max(0.0, self._retry_at - time.monotonic()))
                self._source.drain()
                self._driver.drain()
                if time.monotonic() < self._retry_at:
                    continue
                self._driver.retry()
            self._reconcile_and_publish(publishers)
        self._events.stop()
        return self.last


def _drift(before: Comparison, now: Comparison) -> Plan:
    """Return what of a plan another mesh or another fact of this host does not explain."""
    if now.want is before.want:
        return now.plan
    if now.mesh is not before.mesh:
        return Plan()
    same = {kind for kind in KINDS if getattr(now.want, kind) == getattr(before.want, kind)}
    return Plan(tuple(step for step in now.plan.steps if step.kind in same))


def held_digest(todo: Plan) -> str:
    """Return what `ovsmesh confirm` names: the held removals and no others."""
    return hashlib.sha256("\n".join(todo.held_peers).encode()).hexdigest()[:12]


def readable(fds: Sequence[int], timeout: float = 0.0) -> bool:
    """Return whether one of them is readable within `timeout` seconds. Read nothing."""
    asked = select.poll()
    for fd in fds:
        asked.register(fd, select.POLLIN)
    return bool(asked.poll(timeout * 1000))
