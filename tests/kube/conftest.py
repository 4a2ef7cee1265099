"""Fixtures of the tests that need a real API server. They carry the marker `kube` by themselves.

`plane` is a control plane for the whole run; `cluster` the same, wiped, with the manifests of the repository
applied, for one test; `own_plane` makes others, for tests that stop them or want other options.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.binaries import BinariesError, binaries, ready
from tests.support.controllerkit import Cluster, Process, cluster_of
from tests.support.controlplane import APISERVER, ETCD, NAMES, ControlPlane
from tests.support.kubekit import eventually, install, wipe

_FIXTURES = {"plane", "cluster", "own_plane"}
_TROUBLE = pytest.StashKey[BinariesError]()
_live: list[ControlPlane] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kube: needs a real control plane, built once with Go; run one at a time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kube)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds what the chosen tests need before any of them runs against its time limit."""
    if (
        session.config.option.collectonly
        or ready()
        or not any(item.get_closest_marker("kube") for item in session.items)
    ):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    # What can't be built is for the fixture to say: a failure in CI, else a skip.
    with capture.global_and_fixture_disabled() if capture else ExitStack():
        try:
            binaries()
        except BinariesError as error:
            session.config.stash[_TROUBLE] = error


@pytest.fixture(scope="session")
def programs(pytestconfig: pytest.Config) -> None:
    """Skips, outside CI, where there is no control plane to be had."""
    trouble = pytestconfig.stash.get(_TROUBLE, None)
    if trouble is None:
        try:
            binaries()
        except BinariesError as error:
            trouble = error
    if trouble is not None and os.environ.get("CI"):
        pytest.fail(str(trouble), pytrace=False)
    if trouble is not None:
        pytest.skip(str(trouble))


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
