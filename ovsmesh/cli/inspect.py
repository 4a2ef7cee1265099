"""What `plan` and `status` do: they look at the system themselves, whether an agent runs or not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import Any

import yaml

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.options import Options, opened
from ovsmesh.agent.result import ReconcileResult, report
from ovsmesh.dataplane import desired
from ovsmesh.dataplane.plan import in_sync, plan
from ovsmesh.dataplane.report import Context, Traffic, unmanaged_beside
from ovsmesh.dataplane.report_text import render_text
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.source import Snapshot
from ovsmesh.ovs.idl import statistics
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir


def snapshot(options: Options) -> Snapshot:
    """The mesh that the file holds now, or the last good one. Raises OvsmeshError where no file is known."""
    if not options.mesh:
        raise OvsmeshError(f"no mesh: no agent has left its options in {options.state_dir}; give --mesh FILE")
    source = FileSource(options.mesh, options.state_dir, options.node)
    try:
        return source.snapshot()
    finally:
        source.close()


def _look(host: Driver, source: Snapshot, node: str) -> ReconcileResult:
    """What an agent's turn would find now, with nothing done about it."""
    wanted, problems = source.mesh, source.problems
    me = wanted.node(node) if wanted else None
    if wanted is None or me is None:
        return ReconcileResult(problems=problems)
    host.drain()
    facts = host.facts(wanted, me)
    want, refused = desired.dataplane(wanted, node, facts)
    have = host.observe(want)
    todo = plan(want, have)
    converged = in_sync(todo, have.problems)
    problems = (*problems, *refused, *have.problems, *unmanaged_beside(have, todo))
    return ReconcileResult(
        wanted, facts, want, have, todo, problems, converged, source.confirmed, mesh_since=source.since
    )


def look(options: Options) -> tuple[ReconcileResult, bool]:
    """What the agent would change now, and whether something stands in the way of it or of knowing it.

    Raises OvsmeshError without a usable mesh.
    """
    wanted = snapshot(options)
    if wanted.mesh is None:
        raise OvsmeshError("; ".join(map(str, wanted.problems)))
    with opened(options, StateDir(options.state_dir)) as host:
        found = _look(host, wanted, options.node)
    unclear = found.have is None or bool(found.have.unknown)
    return found, bool(found.plan.blocked) or unclear or not wanted.confirmed


def status(options: Options, output: str) -> str:
    """The report of this node as text, JSON or YAML."""
    state = StateDir(options.state_dir)
    wanted = snapshot(options)
    with opened(options, state) as host:
        found = _look(host, wanted, options.node)
        counted = statistics(options.ovsdb) if host.ovs.synced else {}
        version = host.ovs.version
    told: dict[str, Any] = {}
    with contextlib.suppress(OvsmeshError):
        told = state.status() or {}
    running = state.held()
    changes = told.get("lastChange")
    known = {str(p) for p in found.problems}
    own = told.get("problems") if running else None
    pairs = [(str(pair[0]), str(pair[1])) for pair in own or () if isinstance(pair, list) and len(pair) == 2]
    more = [Problem(Reason[r], text) for r, text in pairs if r in Reason.__members__ and text not in known]
    found = dataclasses.replace(found, problems=(*found.problems, *more))
    about = Context(
        now=time.time(),
        agent_since=_number(told.get("since")) if running else None,
        agent_version=str(told.get("version") or "") if running else "",
        ovs_version=version,
        mesh_from=options.mesh,
        mesh_since=wanted.since or None,
        mesh_current=wanted.confirmed,
        last_change=_changes(changes) if isinstance(changes, dict) else {},
    )
    made = report(found, options.node, {name: _traffic(numbers) for name, numbers in counted.items()}, about)
    if output == "json":
        return json.dumps(made.to_dict(), indent=2, ensure_ascii=False)
    if output == "yaml":
        return yaml.safe_dump(made.to_dict(), sort_keys=False, allow_unicode=True).rstrip()
    return render_text(made).rstrip()


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _changes(found: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """What a status file says of last changes; what is not of that shape is left out."""
    pairs = {name: pair for name, pair in found.items() if isinstance(pair, list) and len(pair) == 2}
    return {name: (_number(pair[0]), str(pair[1])) for name, pair in pairs.items()}


def _traffic(numbers: dict[str, int]) -> Traffic:
    errors = sum(numbers.get(name, 0) for name in ("rx_errors", "tx_errors", "rx_dropped", "tx_dropped"))
    rx_packets, tx_packets, rx_bytes, tx_bytes = (
        numbers.get(f"{way}_{what}", 0) for what in ("packets", "bytes") for way in ("rx", "tx")
    )
    return Traffic(rx_packets, tx_packets, rx_bytes, tx_bytes, errors)
