"""One browser for all tests here, and an agent's HTTP server that serves what a test gives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.agent.publisher import AgentHttp
from ovsmesh.agent.result import AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.dataplane.report import Report
from tests.support.chromium import Chromium


class Shown(NodeStatus):
    """A status with a report of the test's own."""

    def __init__(self, report: Report) -> None:
        super().__init__(ReconcileResult(converged=report.converged), AgentCounters(reconciles=1))
        self._report = report


class Agent:
    """An agent as its page sees it. `matrix` and `history` are what it serves; None: it does not serve that."""

    def __init__(self, report: Report | None, matrix: Any = None, history: Any = None) -> None:
        documents: dict[str, Callable[[], object]] = {}
        self.matrix, self.history = matrix, history
        if matrix is not None:
            documents["/matrix.json"] = lambda: self.matrix
        if history is not None:
            documents["/history.json"] = lambda: self.history
        self._http = AgentHttp("127.0.0.1:0", documents)
        self.url = f"http://127.0.0.1:{self._http.port}/"
        self.close = self._http.close
        if report is not None:
            self.show(report)

    def show(self, report: Report) -> None:
        self._http.publish(Shown(replace(report, time=time.time())))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def agent() -> Iterator[Callable[..., Agent]]:
    made: list[Agent] = []

    def make(report: Report | None, matrix: Any = None, history: Any = None) -> Agent:
        made.append(Agent(report, matrix, history))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tmp_path / "pictures"
