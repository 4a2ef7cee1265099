"""Fixtures for all tests: labs that end whatever happens, and their logs when a test fails.

`lab` and `module_lab` are factories: `lab(3, 2, dual_stack=True)` is an ovsmesh.lab.Lab that is up, and ends
with the test or with the module. What they take is what Lab takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

pytest_plugins = ("tests.support.needs", "tests.support.firewallkit")

if TYPE_CHECKING:
    from ovsmesh.lab.lab import Lab

_live: list[Lab] = []


@pytest.fixture(scope="session")
def lab_machine() -> None:
    """Root, and no labs left by an earlier run that was killed."""
    if os.geteuid() != 0:
        pytest.skip("a lab makes network namespaces, which needs root: run `sudo make test`")
    from ovsmesh.lab.lab import end_orphans

    end_orphans()


def _labs() -> Iterator[Callable[..., Lab]]:
    from ovsmesh.lab.lab import Lab

    with ExitStack() as ending:

        def make(hosts: int = 3, pods: int = 1, **options: Any) -> Lab:
            made = Lab(hosts, pods, ephemeral=True, **options)
            # before up(): a half-made lab too has logs to show and must end
            _live.append(made)
            ending.callback(_end, made)
            return made.up()

        yield make


def _end(made: Lab) -> None:
    _live.remove(made)
    proof = made.down()
    assert proof.ok, str(proof)


@pytest.fixture
def lab(lab_machine: None) -> Iterator[Callable[..., Lab]]:
    yield from _labs()


@pytest.fixture(scope="module")
def module_lab(lab_machine: None) -> Iterator[Callable[..., Lab]]:
    yield from _labs()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"logs of lab {made.name}", made.logs()) for made in _live if made.state.exists()]
    return report
