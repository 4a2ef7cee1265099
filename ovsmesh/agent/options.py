"""The options of an agent, which `plan`, `status` and `cleanup` take over, and the driver that they describe."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Iterator, Mapping

from ovsmesh.agent.driver import Driver
from ovsmesh.containers.docker import Docker
from ovsmesh.containers.docker_migration import DockerOptions
from ovsmesh.names import CNI_BIN_DIR, DEFAULT_LISTEN, DEFAULT_OVSDB, DEFAULT_STATE
from ovsmesh.ovs.idl import run_dir
from ovsmesh.state_dir import DOCKER_FILES, StateDir

_FIRST_LOOK = 5.0
"""Seconds for a Docker daemon to say where it is."""
_STEP = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How an agent is started."""

    mesh: str = ""
    """The mesh file; "" for MeshSlices."""
    node: str = dataclasses.field(default_factory=lambda: socket.gethostname())
    ovsdb: str = DEFAULT_OVSDB
    state_dir: str = DEFAULT_STATE
    listen: str = DEFAULT_LISTEN
    """"" for nowhere."""
    kubeconfig: str = ""
    """ "" for the pod's service account."""
    cni_dir: str = ""
    """Where the container runtime reads its networks, as in /etc/cni/net.d; "" leaves CNI alone."""
    cni_bin_dir: str = CNI_BIN_DIR
    """Where the runtime finds its plugins: directories as in PATH."""
    docker: str = "auto"
    """"auto" keeps a Docker that is on kbr0 there and names one that is not; "replace" puts it there; "off"."""
    docker_config: str = "/etc/docker/daemon.json"
    docker_socket: str = "/var/run/docker.sock"
    docker_restart: str = "systemctl restart docker"
    """Split as a shell splits words, run without a shell."""
    docker_timeout: float = 120.0
    """Seconds for the restart command, and again for the daemon to answer."""

    def driver(self, state: StateDir, *, acting: bool = False, removing: bool = False) -> Driver:
        """Return the driver that these options describe. `acting`: for an agent; `removing`: for cleanup."""
        run_dir(self.ovsdb)  # refuses a wrong one before Docker's thread runs
        docker = None
        # cleanup restores what an earlier agent changed in Docker, also if the last agent left Docker alone
        if self.docker != "off" or (removing and (state.path / DOCKER_FILES[0]).exists()):
            values = (self.docker, self.docker_config, self.docker_socket, self.docker_restart, self.docker_timeout)
            docker = Docker(DockerOptions(*values), state, removing, acting)
        return Driver(self.ovsdb, self.cni_dir, self.cni_bin_dir, docker, acting, state.found_off())


def remembered(state_dir: str, chosen: Mapping[str, object]) -> Options:
    """Return the options that are `chosen`; else those of the last agent with this state directory; else the defaults.

    So `ovsmesh status` needs no option. A recorded value of another type is ignored.
    """
    plain = Options(state_dir=state_dir)
    recorded = {**StateDir(state_dir).agent(), "state_dir": state_dir}
    kinds = {f.name: type(getattr(plain, f.name)) for f in dataclasses.fields(Options)}
    found = {
        name: recorded[name] for name, kind in kinds.items() if isinstance(recorded.get(name), kind) and recorded[name]
    }
    return dataclasses.replace(plain, **{**found, **chosen})


@contextlib.contextmanager
def opened(options: Options, state: StateDir, removing: bool = False) -> Iterator[Driver]:
    """Return a connected driver, once Docker has said where it is."""
    driver = options.driver(state, removing=removing)
    try:
        end = time.monotonic() + _FIRST_LOOK
        while driver.expecting and time.monotonic() < end:
            driver.wait((), _STEP)
            driver.drain()
        driver.connect()
        yield driver
    finally:
        driver.close()
