"""What `plan`, `status` and `cleanup` do: they look at the system themselves, whether an agent runs or not.

Joins the same rooms as agent, and changes nothing but in `cleanup`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ovsmesh import mesh as meshes
from ovsmesh.host import Host
from ovsmesh.model import Dataplane, Facts, Mesh, Observed, OvsmeshError, Problem
from ovsmesh.plan import Plan, plan
from ovsmesh.sources import FileSource
from ovsmesh.state import StateDir


@dataclass(frozen=True, slots=True)
class Look:
    """This node as it is and as it should be."""

    mesh: Mesh
    facts: Facts
    want: Dataplane
    have: Observed
    plan: Plan
    problems: tuple[Problem, ...]
    failed: bool
    """Whether something stands in the way of what the plan would do."""


@contextlib.contextmanager
def _host(ovsdb: str) -> Iterator[Host]:
    host = Host(ovsdb)
    try:
        host.ovs.connect()
        yield host
    finally:
        host.close()


def _mesh(mesh: str, node: str, state_dir: str) -> tuple[Mesh, tuple[Problem, ...]]:
    if not mesh:
        raise OvsmeshError(f"no mesh: no agent has left its options in {state_dir}; give --mesh FILE")
    source = FileSource(mesh, state_dir, node)
    try:
        snapshot = source.snapshot()
    finally:
        source.close()
    if snapshot.mesh is None:
        raise OvsmeshError("; ".join(map(str, snapshot.problems)))
    return snapshot.mesh, snapshot.problems


def look(mesh: str, node: str, ovsdb: str, state_dir: str, listen: str = "") -> Look:
    """Compares what the mesh wants of this node with what is there. Raises OvsmeshError without a usable mesh."""
    wanted, problems = _mesh(mesh, node, state_dir)
    me = wanted.node(node)
    with _host(ovsdb) as host:
        facts = host.facts(wanted, me) if me else Facts()
        want, refused = meshes.dataplane(wanted, node, facts)
        want = host.possible(want)
        have = host.observe(want)
        todo = plan(want, have)
    foreign = () if todo.blocked else tuple(Problem("Foreign", f.detail, fatal=False) for f in have.foreign)
    here = [p for p in (*problems, *refused) if p.node == node]
    failed = bool(todo.blocked) or any(p.fatal for p in (*here, *have.problems))
    return Look(wanted, facts, want, have, todo, (*problems, *refused, *have.problems, *foreign), failed)


def status(mesh: str, node: str, ovsdb: str, state_dir: str, listen: str, output: str) -> tuple[str, bool]:
    """The report as text, and whether all is well."""
    found = look(mesh, node, ovsdb, state_dir)
    return "\n".join(map(str, found.problems)) or "ok", not found.failed and not found.plan


def cleanup(mesh: str, node: str, ovsdb: str, state_dir: str, listen: str, dry_run: bool) -> tuple[list[str], bool]:
    """Removes all of ours; what it did and the proof, as lines, and whether nothing is left.

    Raises OvsmeshError while an agent runs with this state directory: it would put all back.
    """
    state = StateDir(state_dir)
    state.lock()
    try:
        with _host(ovsdb) as host:
            return _cleanup(host, state, dry_run)
    finally:
        state.unlock()


def _cleanup(host: Host, state: StateDir, dry_run: bool) -> tuple[list[str], bool]:
    before, problems = state.before()
    want = Dataplane(sysctls={k: v for k, v in before.items() if "/kbr0/" not in k})
    have = host.observe(want)
    todo = plan(want, have, confirmed=True)
    lines = [*todo.lines()]
    if dry_run:
        return [*lines, f"{len(todo.steps)} parts would be removed or restored"], True
    failed = host.apply(todo, want) if todo.steps else []
    host.dirty()
    have = host.observe(want)
    left = plan(want, have, confirmed=True)
    lines += [f"! {p}" for p in (*problems, *failed, *have.problems)]
    lines += [f"left alone: {f.detail}" for f in have.foreign]
    return lines, not left.steps and not have.unknown
