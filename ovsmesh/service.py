"""An agent as a process: its options, its state directory, where its mesh comes from and where it is seen.

Joins agent, host, board, notify and the sources; what a turn does is agent's. Imports Kubernetes' rooms only
when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from ovsmesh import __version__
from ovsmesh.agent import Agent, Publisher
from ovsmesh.board import Board
from ovsmesh.docker import Docker
from ovsmesh.dockerswitch import Settings as DockerSettings
from ovsmesh.host import Host
from ovsmesh.model import CNI_BIN_DIR, OvsmeshError
from ovsmesh.notify import Notifier
from ovsmesh.sources import FileSource, Source
from ovsmesh.state import StateDir
from ovsmesh.turn import Runtime, Turn


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How an agent was started; also what `status`, `plan` and `cleanup` take over from it."""

    mesh: str
    """The mesh file; "" reads MeshSlices."""
    node: str
    ovsdb: str
    state_dir: str
    listen: str = ""
    kubeconfig: str = ""
    """"" is the service account's."""
    cni_dir: str = ""
    """Where the container runtime reads its networks, e.g. /etc/cni/net.d; "" leaves CNI alone."""
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

    def docker_room(self, state: StateDir, removing: bool = False, acting: bool = False) -> Docker | None:
        """What keeps this host's Docker; None where it is to be left alone."""
        if self.docker == "off":
            return None
        about = (self.docker, self.docker_config, self.docker_socket, self.docker_restart, self.docker_timeout)
        return Docker(DockerSettings(*about), state, removing, acting)


def remembered(state: StateDir, ovsdb: str) -> Options:
    """What the agent that last ran with this state directory was told about Docker and CNI."""
    told, plain = state.agent(), Options("", "", ovsdb, str(state.path))
    names = [f.name for f in dataclasses.fields(Options) if f.name.startswith(("docker", "cni"))]
    good = {name: told[name] for name in names if isinstance(told.get(name), type(getattr(plain, name)))}
    return dataclasses.replace(plain, **good)


class _Quiet:
    """Publishes nothing: `--once` tells its outcome itself."""

    def publish(self, turn: Turn, runtime: Runtime) -> None:
        return

    def flush(self) -> None:
        return


class _All:
    """Several publishers as one."""

    def __init__(self, *publishers: Publisher) -> None:
        self._publishers = publishers

    def publish(self, turn: Turn, runtime: Runtime) -> None:
        for publisher in self._publishers:
            publisher.publish(turn, runtime)

    def flush(self) -> None:
        for publisher in self._publishers:
            publisher.flush()


@contextlib.contextmanager
def _agent(options: Options, state: StateDir, tells: Publisher, patience: float) -> Iterator[tuple[Agent, Publisher]]:
    """An agent, and where it publishes its turns: to `tells`, and in its MeshNode where there is one.

    `patience` is for how many seconds a cluster's first word is waited for.
    """
    with contextlib.ExitStack() as ending:
        host = Host(options.ovsdb, options.cni_dir, options.cni_bin_dir, options.docker_room(state, acting=True))
        ending.callback(host.close)
        source: Source
        if options.mesh:
            source = FileSource(options.mesh, options.state_dir, options.node)
            ending.callback(source.close)
        else:
            from ovsmesh.agentkube import connect  # a mesh from a file needs no TLS

            cluster = connect(options.kubeconfig, options.state_dir, options.node, patience)
            ending.callback(cluster.close)
            source, tells = cluster.source, _All(tells, cluster.writer)
        host.ovs.connect()
        yield Agent(options.node, source, host, state), tells


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[StateDir]:
    state = StateDir(options.state_dir)
    state.lock()
    try:
        # what other commands read in place of MeshSlices is the last mesh that was whole and applied
        told = {**dataclasses.asdict(options), "mesh": options.mesh or str(state.mesh_file)}
        state.write_agent({**told, "pid": os.getpid(), "version": __version__})
        yield state
    except OSError as error:
        raise OvsmeshError(f"state directory {options.state_dir}: {error.strerror}") from error
    finally:
        state.unlock()


def serve(options: Options, stop_fd: int) -> None:
    """Runs the agent until `stop_fd` is readable. Raises OvsmeshError when it can't start."""
    with _locked(options) as state, contextlib.ExitStack() as ending:
        board = Board(options.listen, options.node, options.mesh or "MeshSlices", state)
        ending.callback(board.close)
        notifier = Notifier()
        agent, tells = ending.enter_context(_agent(options, state, _All(board, notifier), 1.0))
        ending.callback(notifier.close)
        agent.run(stop_fd, tells)


def once(options: Options) -> Turn:
    """Applies until nothing is left to do or nothing more can be done. Raises OvsmeshError when it can't start."""
    with _locked(options) as state, _agent(options, state, _Quiet(), 10.0) as (agent, tells):
        return agent.once(tells)
