"""All that is built or downloaded for tests, each once and before the first test that reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.support import docker_versions, imagekit, systemd_container
from tests.support.binaries import NODE_PROGRAMS, PROGRAMS, binaries
from tests.support.docker_versions import Kind
from tests.support.needs import built_ahead, needs


@needs("kube")
@built_ahead
def control_plane() -> Mapping[str, Path]:
    """Return the programs of a control plane. Raises BuildError."""
    return binaries(PROGRAMS)


@needs("e2e")
@built_ahead
def kubernetes() -> Mapping[str, Path]:
    """Return the programs of a whole cluster. Raises BuildError."""
    return binaries(PROGRAMS + NODE_PROGRAMS)


@needs("lab")
@built_ahead
def machine() -> tuple[Path, Path]:
    """Return the archive of a fresh Debian and the folder that `make dist` makes. Raises BuildError."""
    return systemd_container.image(), systemd_container.dist()


@needs("e2e")
@built_ahead
def image() -> Path:
    """Return the archive with the container image of this checkout. Raises BuildError."""
    return imagekit.ours()


@needs("docker")
@built_ahead
def docker_20() -> Kind:
    """Return Debian 12's Docker. Raises DebianError."""
    return docker_versions.debian("bookworm")


@needs("docker")
@built_ahead
def docker_26() -> Kind:
    """Return Debian 13's Docker. Raises DebianError."""
    return docker_versions.debian("trixie")


@needs("docker")
@built_ahead
def docker_29() -> Kind:
    """Return Docker 29. Raises BuildError."""
    return docker_versions.newest()
