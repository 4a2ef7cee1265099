"""`ovsmesh trace`: every hop from one pod, container or address to another, and where it stops."""

from __future__ import annotations

from dataclasses import replace

from ovsmesh.agent import result
from ovsmesh.agent.options import Options, opened
from ovsmesh.cli import inspect
from ovsmesh.errors import OvsmeshError, summary
from ovsmesh.linux.kernel import host_addresses
from ovsmesh.mesh.source import Snapshot
from ovsmesh.state_dir import StateDir
from ovsmesh.trace import places
from ovsmesh.trace.collect import prepare
from ovsmesh.trace.names import addresses
from ovsmesh.trace.types import Evidence, Place, Trace
from ovsmesh.trace.verdict import decide


def trace(options: Options, source: str, target: str, kubeconfig: str | None) -> Trace:
    """Return what packets from `source` to `target` meet. Raises OvsmeshError where nothing can be told."""
    snapshot = inspect.snapshot(options)
    mesh = snapshot.mesh
    if mesh is None:
        raise OvsmeshError(summary(snapshot.problems))
    ends = [addresses(mesh, name, options.docker_socket, kubeconfig) for name in (source, target)]
    one, other = places.pair(mesh, ends[0], ends[1], options.node, host_addresses())
    if one.address == other.address:
        raise OvsmeshError(f"both ends are {one.address}; give two that differ")
    notes = []
    if options.node not in (one.node, other.node):
        raise OvsmeshError(
            f"{one} is on node {one.node}, {other} on {other.node}, and this is {options.node}: "
            f"run it on {one.node}, or on {other.node} for what that one sees"
        )
    if one.node != options.node:
        one, other = other, one
        notes.append(
            f"{other} is on node {other.node}, so this is the way from here to it, which answers take too; "
            f"for the other side run `ovsmesh trace {other.address} {one.address}` on {other.node}"
        )
    runs = StateDir(options.state_dir).held()
    found = _collect(options, snapshot, one, other, runs)
    decided = decide(replace(found, notes=tuple(notes)), mesh.encapsulation)
    if runs and found.missing:
        # the agent repairs what is missing in less time than this takes
        again = decide(replace(_collect(options, snapshot, one, other, runs), notes=tuple(notes)), mesh.encapsulation)
        if again.state == "arrives":
            note = f"a first try was not as wanted ({decided.headline.partition(': ')[2]}); the agent has repaired that"
            return replace(again, evidence=replace(again.evidence, notes=(*notes, note)))
        return again
    return decided


def _collect(options: Options, snapshot: Snapshot, source: Place, target: Place, agent_runs: bool) -> Evidence:
    with opened(options, StateDir(options.state_dir)) as driver:
        found = result.look(driver, snapshot, options.node)
        collector = prepare(driver, found, options.node, options.ovsdb, source, target, agent_runs)
    return collector.evidence()
