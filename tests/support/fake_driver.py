"""A driver, a source and a clock that are values, for the tests of the agent's loop.

Each make_… is a fixture for the test file that says so.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ovsmesh.agent import reconciler as module
from ovsmesh.agent.reconciler import Reconciler
from ovsmesh.dataplane.types import Dataplane, Observed
from ovsmesh.errors import Problem
from ovsmesh.mesh.source import Snapshot
from ovsmesh.ovs.figures import SwitchFigures
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from tests.support.meshkit import FACTS, first


class FakeDriver:
    """A system that does what it is told, unless a test says otherwise."""

    def __init__(self) -> None:
        self.culprit = ""
        self.dataplane = Dataplane()
        self.known = FACTS
        self.unmanaged = ()
        self.problems = ()
        self.unknown: frozenset[str] = frozenset()
        self.switch_up = True
        self.switch_lost = False
        self.busy = self.expecting = False
        self.figures = SwitchFigures
        self.plans: list[Any] = []
        self.fails = 0
        """How many more times applying is to fail."""
        self.ineffective = False
        """Whether what is applied does not take."""
        self.dirtied = 0
        self.waits: list[Any] = []
        self.event = False
        self.on_wait: Callable[[], object] = lambda: None

    def facts(self, mesh: Any, me: Any, probe_firewall: bool = True, path_mtus: Any = ()) -> Any:
        limited = {name: mtu for name, mtu in dict(path_mtus).items() if mtu is not None}
        return dataclasses.replace(self.known, path_mtus=limited) if limited else self.known

    def detours(self, mesh: Any, me: Any, facts: Any) -> Any:
        return ()

    def refusals(self, mesh: Any, me: Any, facts: Any) -> Any:
        return ()

    def observe(self, want: Any) -> Any:
        have = self.dataplane
        parts = {f.name: ({} if f.name in self.unknown else getattr(have, f.name)) for f in dataclasses.fields(have)}
        parts["sysctls"] = self.sysctls(want)
        return Observed(Dataplane(**parts), self.unmanaged, self.problems, self.unknown)

    def apply(self, todo: Any, want: Any) -> Any:
        self.plans.append(todo)
        if self.fails:
            self.fails -= 1
            return [Problem(Reason.ApplyFailed, "ports: no")]
        if not self.ineffective:
            parts = {f.name: dict(getattr(self.dataplane, f.name)) for f in dataclasses.fields(self.dataplane)}
            for step in todo.steps:
                if step.op == "-":
                    del parts[step.kind][step.key]
                else:
                    parts[step.kind][step.key] = step.want
            parts["rules"] = {k: parts["rules"][k] for k in want.rules if k in parts["rules"]}
            self.dataplane = Dataplane(**parts)
        return []

    def lose(self, kind: Any, *keys: Any) -> None:
        left = {k: v for k, v in getattr(self.dataplane, kind).items() if k not in keys}
        self.dataplane = dataclasses.replace(self.dataplane, **{kind: left})

    def who(self, drift: Any) -> Any:
        return self.culprit

    def dirty(self) -> None:
        self.dirtied += 1

    def retry(self) -> None:
        self.dirty()

    def drain(self) -> Any:
        woken, self.event = self.event, False
        return woken

    def fds(self) -> Any:
        return []

    def sysctls(self, want: Any) -> Any:
        return {k: v for k, v in self.dataplane.sysctls.items() if k in want.sysctls}

    def switch_answers(self) -> Any:
        return False

    def wait(self, fds: Any, timeout: Any, look: Any = None, every: float = float("inf")) -> None:
        self.waits.append(min(timeout, every))
        self.on_wait()


class FakeSource:
    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.problems = ()
        self.confirmed = True
        self.committed = 0
        self.event = False

    def snapshot(self) -> Any:
        return Snapshot(self.mesh, self.problems, self.confirmed, 1.0)

    def commit(self) -> Any:
        self.committed += 1
        return ()

    def drain(self) -> Any:
        woken, self.event = self.event, False
        return woken

    def fds(self) -> Any:
        return []

    def close(self) -> None:
        return


class Shown:
    def __init__(self) -> None:
        self.results: list[Any] = []
        self.idled = 0

    def publish(self, status: Any) -> None:
        self.results.append(status.result)

    def idle(self) -> None:
        self.idled += 1


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self, driver: Any) -> None:
        self.now = 1000.0
        driver.on_wait = lambda: self.advance(driver.waits[-1])

    def advance(self, seconds: Any) -> None:
        # select() never returns too early, and a moment always passes
        self.now += seconds + 0.0005

    def monotonic(self) -> Any:
        return self.now


def make_driver() -> Any:
    return FakeDriver()


def make_source() -> Any:
    return FakeSource(first(4))


def make_state(tmp_path: Path) -> Any:
    made = StateDir(tmp_path / "state")
    made.ensure()
    return made


def make_agent(driver: Any, source: Any, state: Any) -> Any:
    return Reconciler("web1", source, driver, state)


def make_clock(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Clock(driver)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made.monotonic, time=time.time))
    return made


def make_stop() -> Iterator[Any]:
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    yield SimpleNamespace(fd=read, now=lambda: os.write(write, b"x"))
    os.close(read)
    os.close(write)


def run(agent: Any, driver: Any, clock: Any, stop: Any, seconds: Any, at: Any = ()) -> Any:
    """Run the loop for so many seconds of the clock; `at` holds (second, what happens then)."""
    start, shown, left = clock.now, Shown(), sorted(at, key=lambda pair: pair[0])

    def pass_time() -> None:
        until = clock.now + driver.waits[-1]
        if left and start + left[0][0] <= until:
            when, what = left.pop(0)
            clock.now = max(clock.now, start + when)
            what()
        else:
            clock.advance(driver.waits[-1])
        if clock.now >= start + seconds:
            stop.now()
        assert len(driver.waits) < 20_000, "the loop does not rest"

    driver.on_wait = pass_time
    agent.run([stop.fd], [shown])
    return shown


def held_removal(agent: Any, source: Any) -> Any:
    """Return a reconcile that finds that all three peers have left the mesh."""
    agent.reconcile()
    source.mesh = first(1)
    return agent.reconcile()
