"""The loop of one node: snapshot → desired → plan → apply → report, run again whenever a bell rings.

Joins sources, mesh, plan, host, status and health; decides nothing that those do not. One thread
has every effect. Level-triggered: a bell only makes the loop run sooner.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ovsmesh import __version__, mesh, status
from ovsmesh.health import Counters, Health
from ovsmesh.host import Host
from ovsmesh.model import Dataplane, Facts, Mesh, Observed, OvsmeshError, Problem
from ovsmesh.netlink import sysctl_differences
from ovsmesh.plan import Plan, plan
from ovsmesh.sources import FileSource, Source
from ovsmesh.state import StateDir

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
_BACKOFF = (0.2, 30.0)
_LOG_LINES = 20
_RETRIED = ("ApplyFailed", "NotConverged", "TurnFailed", "FilterFailed")
"""Problems that may go by themselves, and ring no bell when they do."""
_OWN_REASONS = (*_RETRIED, "MassRemovalHeld")
"""Problems that only the agent can know; `status` finds the others itself."""


@dataclass
class Runtime:
    """What the agent has counted since it started; published as a copy."""

    started: float = field(default_factory=time.time)
    drift: Counter[str] = field(default_factory=Counter)
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    turns: int = 0
    failures: int = 0
    last_success: float = 0.0
    ovs_version: str = ""
    last_change: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when a part of it was changed last (seconds since the epoch), and how."""


class Publisher(Protocol):
    """Where a turn's outcome goes: metrics, status file."""

    def publish(self, turn: Turn, runtime: Runtime) -> None:
        """A turn has ended."""

    def flush(self) -> None:
        """The loop has nothing else to do."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the loop, as it ended."""

    mesh: Mesh | None
    facts: Facts | None
    want: Dataplane | None
    have: Observed | None
    plan: Plan
    problems: tuple[Problem, ...]
    converged: bool
    """Nothing is left to do and nothing in the way: every peer that the mesh rightly names is joined.

    A mesh that could not be read, or peers that were refused, are problems all the same.
    """
    whole: bool = False
    """Whether the source says this now; else it is the last known good."""
    duration: float = 0.0
    """Seconds."""
    since: float = 0.0
    """When the mesh was read, in seconds since the epoch; 0 for never."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an agent was started; also what `status`, `plan` and `cleanup` take over from it."""

    mesh: str
    node: str
    ovsdb: str
    state_dir: str
    listen: str = ""


class Agent:
    """One node's agent. `run` returns when it is told to stop, `once` when there is nothing left to do."""

    def __init__(self, node: str, source: Source, host: Host, state: StateDir) -> None:
        self._node = node
        self._source = source
        self._host = host
        self._state = state
        self.runtime = Runtime()
        self._mesh: Mesh | None = None
        self._facts: Facts | None = None
        self._base: tuple[Dataplane, tuple[Problem, ...]] | None = None
        self._was_converged = False
        self._held_since: float | None = None
        self._confirmed = False
        self._wait_failed = _BACKOFF[0]
        self._retry_at = float("inf")
        self._told: frozenset[str] = frozenset()
        self.last = Turn(None, None, None, None, Plan(), (), False)

    # one turn

    def turn(self) -> Turn:
        """Brings the system to what the source wants, as far as it goes, and says how that ended."""
        started = time.monotonic()
        try:
            self.last = self._turn(started)
        except (OvsmeshError, OSError) as error:
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            problem = Problem("TurnFailed", text)
            seconds = time.monotonic() - started
            self.last = Turn(self._mesh, self._facts, None, None, Plan(), (problem,), False, duration=seconds)
            self._host.dirty()
        self._after(self.last)
        return self.last

    def _turn(self, started: float) -> Turn:
        snapshot = self._source.snapshot()
        problems = snapshot.problems
        if snapshot.mesh is None:
            return Turn(None, None, None, None, Plan(), problems, False, duration=time.monotonic() - started)
        want, refused = self._desired(snapshot.mesh)
        have = self._host.observe(want)
        todo = plan(want, have, self._lifted())
        if todo.steps and self._was_converged:
            self._tell_drift(todo)
        failed: list[Problem] = []
        for _ in range(_ROUNDS):
            if not todo.steps:
                break
            self._remember(todo)
            failed = self._host.apply(todo, want)
            self._count(todo)
            want, _ = self._desired(snapshot.mesh)
            have = self._host.observe(want)
            before, todo = todo, plan(want, have, self._lifted())
            if todo.steps == before.steps:
                break
        if todo.steps and not failed:
            failed = [Problem("NotConverged", f"{len(todo.steps)} changes did not take, the first: {todo.steps[0]}")]
        self._brake(todo)
        ignored = () if todo.steps or todo.blocked else self._around(have)
        # what the mesh says of other nodes is theirs to mend; the rest is this node's
        here = [p for p in (*problems, *refused) if p.node == self._node]
        fatal = any(p.fatal for p in (*here, *have.problems, *failed))
        converged = not (todo.steps or todo.blocked or todo.held or fatal)
        problems = (*problems, *refused, *have.problems, *failed, *_braked(todo), *ignored)
        seconds = time.monotonic() - started
        return Turn(
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
        facts = self._host.facts(wanted, me) if me else Facts()
        if self._base is None or wanted is not self._mesh or facts != self._facts:
            # another wish or another host: what differs now is no one's drift
            self._was_converged = False
            self._base = mesh.dataplane(wanted, self._node, facts)
            self._mesh, self._facts = wanted, facts
        return self._host.possible(self._base[0], try_out=False), self._base[1]

    def _around(self, have: Observed) -> tuple[Problem, ...]:
        """Foreign things that block nothing of ours, named all the same."""
        return tuple(Problem("Foreign", f.detail, fatal=False) for f in have.foreign)

    def _lifted(self) -> bool:
        since = self._held_since
        return self._confirmed or (since is not None and time.monotonic() - since >= BRAKE_HOLD)

    def _brake(self, todo: Plan) -> None:
        if not todo.held:
            self._held_since, self._confirmed = None, False
            return
        if self._held_since is None:
            self._held_since = time.monotonic()
        if self._state.confirmation() == held_digest(todo):
            self._state.clear_confirmation()
            self._confirmed = True
            self._retry_at = 0.0

    def _remember(self, todo: Plan) -> None:
        old = {s.key: s.have for s in todo.steps if s.kind == "sysctls" and s.have is not None}
        if old:
            for problem in self._state.remember(old):
                log.warning("%s", problem)

    def _count(self, todo: Plan) -> None:
        now = time.time()
        for step in todo.steps:
            self.runtime.operations[step.kind, step.op] += 1
            if step.kind == "ports":
                self.runtime.last_change[(step.want or step.have).node] = (now, str(step))
        for line in _some(map(str, todo.steps)):
            log.info("%s", line)

    def _tell_drift(self, todo: Plan) -> None:
        self.runtime.drift.update(step.kind for step in todo.steps)
        lines = _some(f"{step.kind} {step.key}" for step in todo.steps)
        log.warning("drift: someone changed %s", "; ".join(lines))

    def _after(self, turn: Turn) -> None:
        runtime = self.runtime
        runtime.turns += 1
        runtime.ovs_version = self._host.ovs.version or runtime.ovs_version
        self._was_converged = turn.converged
        # a blocked or refused part waits for its bell, a failed one for its turn
        failed = any(p.reason in _RETRIED for p in turn.problems)
        if failed:
            runtime.failures += 1
            self._retry_at = time.monotonic() + self._wait_failed * random.uniform(0.5, 1.0)
            self._wait_failed = min(self._wait_failed * 2, _BACKOFF[1])
        else:
            runtime.last_success = time.time()
            self._wait_failed = _BACKOFF[0]
            if self._retry_at:
                self._retry_at = float("inf")
        told = frozenset(map(str, turn.problems)) | frozenset(map(str, turn.plan.blocked))
        for line in sorted(told - self._told):
            log.warning("%s", line)
        for line in sorted(self._told - told):
            log.info("no longer: %s", line)
        self._told = told

    # for ever

    def run(self, stop_fd: int, publish: Publisher) -> None:
        """Turns whenever a bell rings, until `stop_fd` is readable. The dataplane stays in place."""
        self._turn_and_publish(publish)
        now = time.monotonic()
        resync, look = now + RESYNC * random.uniform(0.8, 1.0), now + SYSCTL_POLL
        while True:
            timeout = min(resync, look, self._retry_at, self._held_until()) - time.monotonic()
            waiting = self._waiting()
            if waiting or (self.last.mesh is not None and not self._host.switch_up):
                timeout = min(timeout, SWITCH_POLL)
            self._host.wait([stop_fd, *self._source.fds()], max(0.0, timeout))
            if _readable(stop_fd):
                return
            rang = self._source.drain()
            rang |= self._host.drain()
            now = time.monotonic()
            if now >= look:
                look = now + SYSCTL_POLL
                rang |= self.last.want is not None and sysctl_differences(self.last.want.sysctls)
                rang |= self._confirm_asked()
                if not rang:
                    publish.flush()
            if now >= resync:
                resync = now + RESYNC * random.uniform(0.8, 1.0)
                self._host.dirty()
                rang = True
            if now >= self._retry_at:
                self._host.dirty()
                rang = True
            rang |= waiting or now >= self._held_until()
            rang |= self.last.mesh is not None and not self._host.switch_up and self._host.switch_answers()
            if rang:
                self._turn_and_publish(publish)

    def _turn_and_publish(self, publish: Publisher) -> None:
        turn = self.turn()
        publish.publish(turn, self.runtime)
        if turn.converged:
            for problem in self._source.commit():
                log.warning("%s", problem)

    def _waiting(self) -> bool:
        """Whether flow-restore-wait is left standing for a moment, whose end rings no bell."""
        have = self.last.have
        return have is not None and "restore_wait" in have.unknown and "flows" not in have.unknown

    def _held_until(self) -> float:
        return float("inf") if self._held_since is None else self._held_since + BRAKE_HOLD

    def _confirm_asked(self) -> bool:
        return bool(self.last.plan.held) and self._state.confirmation() is not None

    def once(self, publish: Publisher, deadline: float = 60.0) -> Turn:
        """Turns until the plan is empty or nothing more can be done, for `deadline` seconds at most."""
        end = time.monotonic() + deadline
        self._turn_and_publish(publish)
        while not self.last.converged and self._retry_at < end and self.runtime.failures < 4:
            self._host.wait(self._source.fds(), max(0.0, self._retry_at - time.monotonic()))
            self._source.drain()
            self._host.drain()
            if time.monotonic() >= self._retry_at:
                self._host.dirty()
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
    return (Problem("MassRemovalHeld", text),)


def _some(lines: Iterator[str] | tuple[str, ...], most: int = _LOG_LINES) -> list[str]:
    every = list(lines)
    return every if len(every) <= most else [*every[:most], f"and {len(every) - most} more"]


def _readable(fd: int) -> bool:
    try:
        return bool(os.read(fd, 64))
    except BlockingIOError:
        return False


class _Quiet:
    """Publishes nothing: `--once` tells its outcome itself."""

    def publish(self, turn: Turn, runtime: Runtime) -> None:
        return

    def flush(self) -> None:
        return


def _agent(options: Options, state: StateDir) -> tuple[Agent, Host]:
    host = Host(options.ovsdb)
    host.ovs.connect()
    return Agent(options.node, FileSource(options.mesh, options.state_dir, options.node), host, state), host


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[StateDir]:
    state = StateDir(options.state_dir)
    state.lock()
    try:
        state.write_agent({**dataclasses.asdict(options), "pid": os.getpid(), "version": __version__})
        yield state
    except OSError as error:
        raise OvsmeshError(f"state directory {options.state_dir}: {error.strerror}") from error
    finally:
        state.unlock()


def serve(options: Options, stop_fd: int) -> None:
    """Runs the agent until `stop_fd` is readable. Raises OvsmeshError when it can't start."""
    with _locked(options) as state:
        board = Board(options, state)
        agent, host = _agent(options, state)
        try:
            agent.run(stop_fd, board)
        finally:
            host.close()
            board.close()


def once(options: Options) -> Turn:
    """Applies until nothing is left to do or nothing more can be done. Raises OvsmeshError when it can't start."""
    with _locked(options) as state:
        agent, host = _agent(options, state)
        try:
            return agent.once(_Quiet())
        finally:
            host.close()


class Board:
    """Where a serving agent's turns are seen: over HTTP, and in the state directory for `ovsmesh status`.

    The report of a thousand peers takes longer to make than a turn, so it is made when the loop has
    nothing better to do, unless it changes whether all is well.
    """

    def __init__(self, options: Options, state: StateDir) -> None:
        self._options = options
        self._state = state
        self._health = Health(options.listen)
        self._turn: Turn | None = None
        self._runtime = Runtime()
        self._shown: Turn | None = None
        self._kept: dict[str, Any] = {}

    def close(self) -> None:
        self._health.close()

    def publish(self, turn: Turn, runtime: Runtime) -> None:
        self._turn, self._runtime = turn, runtime
        if self._shown is None or self._shown.converged != turn.converged:
            self.flush()

    def flush(self) -> None:
        self._health.beat()
        turn, runtime = self._turn, self._runtime
        if turn is None or turn is self._shown:
            return
        self._shown = turn
        about = status.Runtime(
            now=time.time(),
            agent_since=runtime.started,
            agent_version=__version__,
            ovs_version=runtime.ovs_version,
            mesh_from=self._options.mesh,
            mesh_since=turn.since or None,
            mesh_current=turn.whole,
            last_change=dict(runtime.last_change),
        )
        counters = Counters(
            runtime.turns,
            runtime.failures,
            runtime.last_success,
            turn.duration,
            dict(runtime.drift),
            dict(runtime.operations),
        )
        self._health.publish(report(turn, self._options.node, {}, about), counters)
        kept = {
            "since": runtime.started,
            "version": __version__,
            "lastChange": runtime.last_change,
            "drift": runtime.drift,
            "problems": [str(p) for p in turn.problems if p.reason in _OWN_REASONS],
        }
        if kept != self._kept:
            self._kept = copy.deepcopy(kept)
            try:
                self._state.write_status(kept)
            except OSError as error:
                log.warning("status file in %s: %s", self._options.state_dir, error.strerror)


def report(turn: Turn, node: str, traffic: Mapping[str, status.Traffic], about: status.Runtime) -> status.Report:
    """A turn, or a look at the system, as the report that every reader is shown."""
    me = turn.mesh.node(node) if turn.mesh else None
    parts: Mapping[str, Dataplane] = {}
    if turn.mesh and me and turn.facts:
        parts, _ = mesh.peers(turn.mesh, me, mesh.wiring(turn.mesh, me, turn.facts))
    return status.report(
        turn.mesh,
        node,
        turn.facts,
        turn.want,
        turn.have,
        turn.plan,
        turn.problems,
        turn.converged,
        parts,
        traffic,
        about,
    )
