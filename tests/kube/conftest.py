"""Fixtures of the tests that need a real API server.

`plane` is a control plane for the whole run; `cluster` the same, wiped, with the manifests of the repository
applied, for one test; `own_plane` makes others, for tests that stop them or want other options.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support import built
from tests.support.binaries import BinariesError
from tests.support.controllerkit import Cluster, Process, cluster_of
from tests.support.controlplane import APISERVER, ETCD, NAMES, ControlPlane
from tests.support.kubekit import eventually, install, wipe

_live: list[ControlPlane] = []


@pytest.fixture(scope="session")
def programs() -> None:
    """Skips, outside CI, where there is no control plane to be had."""
    try:
        built.control_plane()
    except BinariesError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


Make = Callable[..., ControlPlane]


@contextmanager
def _planes(folders: pytest.TempPathFactory) -> Iterator[Make]:
    with ExitStack() as ending:

        def make(**options: Any) -> ControlPlane:
            made = ControlPlane(folders.mktemp("kube"), **options)
            _live.append(made)
            ending.callback(_live.remove, made)
            return ending.enter_context(made)

        yield make


@pytest.fixture(scope="session")
def plane(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with _planes(tmp_path_factory) as make:
        yield make()


@pytest.fixture
def own_plane(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """`own_plane(address=…, ns=…, …)`: what ControlPlane takes, without the folder."""
    with _planes(tmp_path_factory) as make:
        yield make


@pytest.fixture
def cluster(plane: ControlPlane) -> Iterator[ControlPlane]:
    """Up, without Nodes and without objects of ours but what the manifests hold."""
    plane.start(*NAMES)
    install(plane)
    wipe(plane)
    yield plane
    if all(plane.running(name) for name in (ETCD, APISERVER)):
        wipe(plane)


@pytest.fixture
def kube(cluster: ControlPlane) -> Iterator[Cluster]:
    """`cluster`, with the objects and controllers that a test adds and that end with it."""
    with cluster_of(cluster) as made:
        yield made


@pytest.fixture
def controller(kube: Cluster) -> Process:
    """One controller, which leads."""
    made = kube.controller()
    eventually(made.leads)
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"log of {name}", plane.log(name, 20)) for plane in _live for name in NAMES]
    return report
