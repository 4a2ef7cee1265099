"""An agent as a process: its options, its state directory, where its mesh comes from and where it is seen.

Joins agent, host, board, notify and the sources; what a turn does is agent's. Imports Kubernetes' rooms only
when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ovsmesh import __version__
from ovsmesh.agent import cleanup
from ovsmesh.agent.options import Options
from ovsmesh.agent.publisher import StatusPublisher
from ovsmesh.agent.reconciler import Publisher, Reconciler, readable
from ovsmesh.agent.result import NodeStatus, ReconcileResult
from ovsmesh.agent.systemd import SystemdNotifier
from ovsmesh.errors import OvsmeshError
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.source import Source
from ovsmesh.ovs.idl import run_dir
from ovsmesh.state_dir import StateDir

if TYPE_CHECKING:
    from ovsmesh.agent.uninstall import UninstallWatch

log = logging.getLogger("ovsmesh")

REMOVING, REMOVED = "ovsmesh.removing", "ovsmesh.removed"
"""File beside the database's socket while all of ours is removed, which the switch's own pod waits for, and after."""
_AGAIN = 2.0
"""Seconds between attempts to remove all of ours."""
_FOR_EVER = 3600.0
"""Seconds that an agent with nothing left to do waits for its end: a Namespace may take its time."""


class _Quiet:
    """Publishes nothing: `--once` tells its outcome itself."""

    def publish(self, status: NodeStatus) -> None:
        return

    def idle(self) -> None:
        return


class _All:
    """Several publishers as one."""

    def __init__(self, *publishers: Publisher) -> None:
        self._publishers = publishers

    def publish(self, status: NodeStatus) -> None:
        for publisher in self._publishers:
            publisher.publish(status)

    def idle(self) -> None:
        for publisher in self._publishers:
            publisher.idle()


@contextlib.contextmanager
def _agent(
    options: Options, state: StateDir, tells: Publisher, patience: float
) -> Iterator[tuple[Reconciler, Publisher, UninstallWatch | None]]:
    """An agent, where it publishes its turns (to `tells`, and in its MeshNode where there is one), and its home.

    `patience` is for how many seconds a cluster's first word is waited for.
    """
    with contextlib.ExitStack() as ending:
        host = options.host(state, acting=True)
        ending.callback(host.close)
        source: Source
        home = None
        if options.mesh:
            source = FileSource(options.mesh, options.state_dir, options.node)
            ending.callback(source.close)
        else:
            from ovsmesh.agent.cluster import connect  # a mesh from a file needs no TLS

            cluster = connect(options.kubeconfig, options.state_dir, options.node, patience)
            ending.callback(cluster.close)
            source, tells, home = cluster.source, _All(tells, cluster.writer), cluster.home
        host.ovs.connect()
        yield Reconciler(options.node, source, host, state, options.mesh or "MeshSlices"), tells, home


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
    """Runs the agent until `stop_fd` is readable. Raises OvsmeshError when it can't start.

    What is in place stays, unless the cluster says that all of ovsmesh is to go.
    """
    with _locked(options) as state:
        with contextlib.ExitStack() as ending:
            board = StatusPublisher(options.listen, state)
            ending.callback(board.close)
            notifier = SystemdNotifier()
            agent, tells, home = ending.enter_context(_agent(options, state, _All(board, notifier), 1.0))
            ending.callback(notifier.close)
            beside = run_dir(options.ovsdb)
            _tell(beside, "")
            agent.run([stop_fd, home.fd] if home else [stop_fd], tells)
            leaving = home is not None and home.ask()
            if leaving:
                log.warning("the Namespace that this agent is of is being deleted: removing all of ours from this node")
                _tell(beside, REMOVING)
        if leaving:
            try:
                clean = _remove(options, state, stop_fd)
            finally:
                _tell(beside, "")
            if clean:
                _tell(beside, REMOVED)
            # to end before being told to would have us started anew
            readable([stop_fd], _FOR_EVER)


def _tell(folder: Path, name: str) -> None:
    """Of REMOVING and REMOVED only this one is there; a folder that is not, or can't be written, has nobody to tell."""
    for each in (REMOVING, REMOVED):
        with contextlib.suppress(OSError):
            if each == name:
                (folder / each).touch()
            else:
                (folder / each).unlink()


def _remove(options: Options, state: StateDir, stop_fd: int) -> bool:
    """Removes all of ours, again until nothing is left, which it returns, or there is no more time."""
    while True:
        try:
            lines, clean = cleanup.remove(options, state)
        except OvsmeshError as error:
            lines, clean = [str(error)], False
        for line in lines:
            log.info("%s", line)
        if clean or readable([stop_fd], _AGAIN):
            return clean


def once(options: Options) -> ReconcileResult:
    """Applies until nothing is left to do or nothing more can be done. Raises OvsmeshError when it can't start."""
    with _locked(options) as state, _agent(options, state, _Quiet(), 10.0) as (agent, tells, _):
        return agent.once(tells)
