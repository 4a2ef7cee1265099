"""Fixtures of the end to end tests: the images, built once, and one cluster that all steps of the story share.

Figures that a test measures are printed when all is over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.support import built, imagekit
from tests.support.binaries import BinariesError
from tests.support.kubecluster import Cluster, cluster

_TOOLS = {
    "containerd": "containerd",
    "runc": "runc",
    "ctr": "containerd",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "busybox": "busybox-static",
}
_figures: list[str] = []
_broken: list[str] = []
_live: list[Cluster] = []


def _lacking() -> str:
    """Why this machine can't run these tests; "" when it can."""
    if os.geteuid() != 0:
        return "nodes are made of namespaces and mounts, which needs root: run `sudo make test-e2e`"
    packages = sorted({package for name, package in _TOOLS.items() if shutil.which(name) is None})
    if packages:
        return f"missing: {' '.join(packages)} (scripts/setup.sh --dev installs them)"
    try:
        built.kubernetes()
    except BinariesError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def machine() -> None:
    if why := _lacking():
        if os.environ.get("CI"):
            pytest.fail(why, pytrace=False)
        pytest.skip(why)


@pytest.fixture(scope="session")
def images(machine: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pod image and ours, as files to load."""
    folder = tmp_path_factory.mktemp("images")
    pod, ours = folder / "pod.tar", built.image()
    imagekit.pod(pod)
    _figures.append(f"image of {ours.stat().st_size / 2**20:.0f} MiB")
    return [pod, ours]


@pytest.fixture(scope="module")
def story(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without nodes, for the steps of one module in the order they stand there."""
    # not below pytest's own folder: pytest keeps that, and here lie gigabytes
    folder = tmp_path_factory.mktemp("e2e")
    with cluster(folder, images) as made:
        _live.append(made)
        yield made
        _live.clear()


@pytest.fixture
def step(request: pytest.FixtureRequest) -> None:
    """A step is of no use after one that failed."""
    if _broken:
        pytest.fail(f"not tried, since {_broken[0]} failed", pytrace=False)


@pytest.fixture
def figure() -> Callable[[str], None]:
    return _figures.append


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("e2e"):
        if not _broken and _live:
            report.sections += [("the cluster", made.logs()) for made in _live]
        _broken.append(item.name)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("end to end, measured")
        for line in _figures:
            terminalreporter.write_line(line)
