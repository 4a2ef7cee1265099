"""pytest plugin for the inside of the guest: one JSON line a test to the terminal that test_kernel.py reads."""

from __future__ import annotations

import json
import os
from collections import defaultdict

import pytest

from tests.kernel.guest import REPORT

_phases: dict[str, list[pytest.TestReport]] = defaultdict(list)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    phases = _phases[report.nodeid]
    phases.append(report)
    if report.when != "teardown":
        return
    worst = next((phase for phase in phases if not phase.passed), report)
    said = [f"{phase.when}: {phase.longreprtext}" for phase in phases if not phase.passed]
    said.append(report.capstdout)
    tell(
        name=report.nodeid.rpartition("::")[2],
        outcome=worst.outcome,
        seconds=round(sum(phase.duration for phase in phases), 1),
        text="\n".join(text.strip() for text in said if text.strip()),
    )


def tell(**what: str | float) -> None:
    data = json.dumps(what).encode() + b"\n"
    fd = os.open(REPORT, os.O_WRONLY | os.O_NOCTTY)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
