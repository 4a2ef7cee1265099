"""Two lab hosts, each with a real dockerd, shared by the tests of a module; each test begins on docker0."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovsmesh.lab.lab import Lab
from tests.support.docker_versions import by_hand
from tests.support.dockerkit import Docker


@pytest.fixture(scope="module")
def dockers(module_lab: Callable[..., Lab]) -> Iterator[tuple[Lab, list[Docker]]]:
    """The lab without agents, and a Docker a host that has an image and runs on docker0."""
    if shutil.which("dockerd") is None:
        pytest.fail("no dockerd: scripts/setup.sh --dev installs docker.io")
    made = module_lab(2, 1, dual_stack=True, agents=False)
    made.write_mesh()
    found = []
    # short, as a unix socket's path may have 107 characters
    base = Path(tempfile.mkdtemp(prefix="ovsmesh-dk-"))
    try:
        for host in made.hosts:
            docker = Docker(host, base / host.name, by_hand())
            docker.prepare()
            found.append(docker)
            docker.start()
            docker.load()
        yield made, found
    finally:
        for docker in found:
            docker.end()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="module")
def meshed(dockers: tuple[Lab, list[Docker]]) -> Iterator[tuple[Lab, Docker]]:
    """The first host, with its mesh up; its Docker is not touched yet."""
    made, found = dockers
    done = found[0].host.ovsmesh("agent", "--once", "--docker", "off", timeout=60)
    assert done.returncode == 0, done.stderr
    yield made, found[0]
    found[0].reset()


@pytest.fixture
def calm(meshed: tuple[Lab, Docker]) -> tuple[Lab, Docker]:
    """The mesh is up on the first host, and its Docker is on docker0."""
    meshed[1].calm()
    return meshed


@pytest.fixture
def fresh(dockers: tuple[Lab, list[Docker]]) -> Iterator[tuple[Lab, list[Docker]]]:
    """No agent, no container, Docker on docker0 by a file that says nothing; after the test so again."""
    made, found = dockers
    for docker in found:
        docker.reset()
    yield made, found
    for docker in found:
        docker.reset()
