"""An agent as a process: it joins options, state directory, mesh source, driver and publishers, and runs the loop.

Imports Kubernetes' modules only when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ovsmesh import __version__
from ovsmesh.agent import cleanup
from ovsmesh.agent.options import Options
from ovsmesh.agent.publisher import RowPublisher, StatusPublisher
from ovsmesh.agent.reconciler import Publisher, Reconciler, readable
from ovsmesh.agent.result import ReconcileResult
from ovsmesh.agent.systemd import SystemdNotifier
from ovsmesh.errors import OvsmeshError
from ovsmesh.history import History
from ovsmesh.linux.kernel import PodRoutes
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.source import Source
from ovsmesh.ovs.idl import run_dir
from ovsmesh.probe.exchange import Exchange
from ovsmesh.probe.sender import Prober
from ovsmesh.state_dir import StateDir, sole_writer

if TYPE_CHECKING:
    from ovsmesh.agent.cluster import UninstallWatch

log = logging.getLogger("ovsmesh")

REMOVING, REMOVED = "ovsmesh.removing", "ovsmesh.removed"
"""File beside the database's socket while all that is managed is removed, and after. The switch's pod waits for it."""
_AGAIN = 2.0
"""Seconds between attempts to remove all that is managed."""
_WAIT_FOR_STOP = 3600.0
"""Seconds that an agent with nothing left to do waits to be stopped: a Namespace may take its time."""


class _Agent(NamedTuple):
    reconciler: Reconciler
    publishers: tuple[Publisher, ...]
    """The MeshNode's, if there is a cluster."""
    uninstall: UninstallWatch | None


@contextlib.contextmanager
def _agent(
    options: Options, state: StateDir, history: History, patience: float, probing: bool = False
) -> Iterator[_Agent]:
    """Open what an agent needs. Wait `patience` seconds at most for the first answer of a cluster."""
    with contextlib.ExitStack() as ending:
        driver = options.driver(state, acting=True)
        ending.callback(driver.close)
        source: Source
        publishers: tuple[Publisher, ...] = ()
        uninstall = None
        if options.mesh:
            source = FileSource(options.mesh, options.state_dir, options.node)
            ending.callback(source.close)
        else:
            from ovsmesh.agent.cluster import connect  # a mesh from a file needs no TLS

            cluster = connect(options.kubeconfig, options.state_dir, options.node, patience)
            ending.callback(cluster.close)
            source, publishers, uninstall = cluster.source, (cluster.writer,), cluster.uninstall
        prober = None
        if probing:
            try:
                routes = PodRoutes()
                ending.callback(routes.close)
                prober = Prober(routes.astray)
            except OSError as error:
                raise OvsmeshError(f"the agent needs raw sockets to probe its peers: {error.strerror}") from None
            ending.callback(prober.close)
        driver.connect()
        reconciler = Reconciler(options.node, source, driver, state, options.mesh or "MeshSlices", prober, history)
        yield _Agent(reconciler, publishers, uninstall)


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[StateDir]:
    state = StateDir(options.state_dir)
    with sole_writer() as doubts:
        state.lock()
        try:
            # other commands read the last mesh that was whole and applied in place of MeshSlices
            running = {**dataclasses.asdict(options), "mesh": options.mesh or str(state.mesh_file)}
            state.write_agent({**running, "pid": os.getpid(), "version": __version__})
            state.problems += doubts
            for problem in state.problems:
                log.warning("%s", problem)
            yield state
        except OSError as error:
            raise OvsmeshError(f"state directory {options.state_dir}: {error.strerror}") from error
        finally:
            state.unlock()


def serve(options: Options, stop_fd: int) -> None:
    """Run the agent until `stop_fd` is readable. Raise OvsmeshError if it can't start.

    The dataplane stays in place, unless the agent's Namespace is being deleted.
    """
    with _locked(options) as state:
        with contextlib.ExitStack() as ending:
            history = History(state.path)
            ending.callback(history.close)
            status = StatusPublisher(options.listen, state)
            status.serve("/history.json", history.document)
            ending.callback(status.close)
            exchange = Exchange(options.node)
            ending.callback(exchange.close)
            status.serve("/matrix.json", exchange.matrix)
            notifier = SystemdNotifier()
            agent = ending.enter_context(_agent(options, state, history, 1.0, probing=True))
            ending.callback(notifier.close)
            folder, uninstall = run_dir(options.ovsdb), agent.uninstall
            _mark(folder, "")
            stops = [stop_fd, uninstall.fd] if uninstall else [stop_fd]
            agent.reconciler.run(stops, [status, RowPublisher(exchange), notifier, *agent.publishers])
            leaving = uninstall is not None and uninstall.ask()
            if leaving:
                log.warning("this agent's Namespace is being deleted: all that is managed on this node is removed now")
                _mark(folder, REMOVING)
        if leaving:
            try:
                clean = _remove(options, state, stop_fd)
            finally:
                _mark(folder, "")
            if clean:
                _mark(folder, REMOVED)
            # the kubelet starts an agent again that ends before it is stopped
            readable([stop_fd], _WAIT_FOR_STOP)


def _mark(folder: Path, name: str) -> None:
    """Keep the file `name` of REMOVING and REMOVED only. A folder that can't be written has no reader either."""
    for each in (REMOVING, REMOVED):
        with contextlib.suppress(OSError):
            if each == name:
                (folder / each).touch()
            else:
                (folder / each).unlink()


def _remove(options: Options, state: StateDir, stop_fd: int) -> bool:
    """Remove all that is managed until nothing is left or the agent is stopped. Return whether nothing is left."""
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
    """Apply until nothing is left to do or nothing more can be done. Raise OvsmeshError if it can't start."""
    with (
        _locked(options) as state,
        contextlib.closing(History(state.path)) as history,
        _agent(options, state, history, 10.0) as agent,
    ):
        return agent.reconciler.once(agent.publishers)
