"""`ovsmesh plan` and `ovsmesh status` of a node. They read the system themselves, whether an agent runs or not."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from ovsmesh.agent import result
from ovsmesh.agent.options import Options, opened
from ovsmesh.agent.result import ReconcileResult
from ovsmesh.controller.node_conditions import seconds
from ovsmesh.dataplane.report import Report, ReportContext, Traffic
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.source import Snapshot
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

_AGENT_TIMEOUT, _AGENT_MOST = 2.0, 64 * 1024 * 1024
"""Seconds and bytes for the answer of the agent on this host."""


def snapshot(options: Options) -> Snapshot:
    """Return the mesh of the file, or the last good one. Raises OvsmeshError where no file is known."""
    if not options.mesh:
        raise OvsmeshError(f"no mesh: no agent has left its options in {options.state_dir}; give --mesh FILE")
    source = FileSource(options.mesh, options.state_dir, options.node)
    try:
        return source.snapshot()
    finally:
        source.close()


def look(options: Options) -> tuple[ReconcileResult, bool]:
    """Return what the agent would change now, and whether a conflict blocks it or something cannot be observed.

    Raises OvsmeshError without a usable mesh.
    """
    source = snapshot(options)
    if source.mesh is None:
        raise OvsmeshError("; ".join(map(str, source.problems)))
    with opened(options, StateDir(options.state_dir)) as driver:
        found = result.look(driver, source, options.node)
    unclear = found.have is None or bool(found.have.unknown)
    return found, bool(found.plan.blocked) or unclear or not source.confirmed


def status(options: Options) -> Report:
    """Return the report of this node. Raises OvsmeshError where no file is known."""
    state = StateDir(options.state_dir)
    source = snapshot(options)
    with opened(options, state) as driver:
        found = result.look(driver, source, options.node)
        figures = driver.figures()
    return report(options, found, figures.traffic, context(options, source, figures.version))


def _stored(options: Options) -> tuple[dict[str, Any], bool]:
    """Return what an agent has left for this command, and whether it runs."""
    state = StateDir(options.state_dir)
    stored: dict[str, Any] = {}
    with contextlib.suppress(OvsmeshError):
        stored = state.status() or {}
    return stored, state.held()


def context(options: Options, source: Snapshot, version: str) -> ReportContext:
    """Return what a report depends on besides the system itself. `version` is Open vSwitch's."""
    stored, running = _stored(options)
    return ReportContext(
        now=time.time(),
        agent_since=_number(stored.get("since")) if running else None,
        agent_version=str(stored.get("version") or "") if running else "",
        ovs_version=version,
        mesh_from=options.mesh,
        mesh_since=source.since or None,
        mesh_current=source.confirmed,
        last_change=_changes(stored.get("lastChange")),
        reach=_reach(options.listen) if running else None,
    )


def _reach(listen: str) -> dict[str, Reach]:
    """Return what the running agent's probes found; {} where it does not answer, so that no peer counts as well."""
    host, _, port = listen.rpartition(":")
    local = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}.get(host, host)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{local}:{port}/status.json", timeout=_AGENT_TIMEOUT) as answer:
            peers = json.loads(answer.read(_AGENT_MOST)).get("peers")
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return {}
    return {str(peer.get("name")): _one_reach(peer["reach"]) for peer in peers or () if _has_reach(peer)}


def _has_reach(peer: object) -> bool:
    return isinstance(peer, dict) and isinstance(peer.get("reach"), dict)


def _one_reach(found: dict[str, Any]) -> Reach:
    number = {key: value for key, value in found.items() if isinstance(value, (int, float))}
    state, mtu = found.get("state"), found.get("pathMtu")
    return Reach(
        State(state) if state in set(State) else State.UNPROBED,
        seconds(str(found.get("since"))) or 0.0,
        number.get("roundTrip"),
        number.get("roundTripP99"),
        number.get("loss"),
        mtu if isinstance(mtu, int) else None,
        int(number.get("sent", 0)),
        int(number.get("lost", 0)),
        seconds(str(found.get("silentSince"))),
        found.get("heard") is True,
        str(found.get("error", "")),
        str(found.get("destination", "")),
    )


def report(options: Options, found: ReconcileResult, traffic: Mapping[str, Traffic], about: ReportContext) -> Report:
    """Return the report of what was found, with the problems that only a running agent knows."""
    stored, running = _stored(options)
    if running:
        known = {str(p) for p in found.problems}
        more = (problem for problem in _problems(stored.get("problems")) if problem.message not in known)
        found = dataclasses.replace(found, problems=(*found.problems, *more))
    return result.report(found, options.node, traffic, about)


# The status file is a hint: what is not of the expected shape is left out.


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _problems(value: object) -> list[Problem]:
    pairs = [(str(pair[0]), str(pair[1])) for pair in (value if isinstance(value, list) else ()) if _is_pair(pair)]
    return [Problem(Reason[reason], text) for reason, text in pairs if reason in Reason.__members__]


def _changes(value: object) -> dict[str, tuple[float, str]]:
    items = value.items() if isinstance(value, dict) else ()
    return {name: (_number(pair[0]), str(pair[1])) for name, pair in items if _is_pair(pair)}


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2
