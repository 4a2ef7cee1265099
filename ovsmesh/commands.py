"""What `plan`, `status` and `cleanup` do: they look at the system themselves, whether an agent runs or not.

Joins the same rooms as agent, and changes nothing but in `cleanup`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import yaml

from ovsmesh import mesh as meshes
from ovsmesh.docker import Docker
from ovsmesh.host import Host
from ovsmesh.model import KBR, KINDS, OBR, Dataplane, Observed, OvsmeshError, Problem
from ovsmesh.options import Options
from ovsmesh.ovsreplica import statistics
from ovsmesh.plan import Plan, plan
from ovsmesh.sources import FileSource, Snapshot
from ovsmesh.state import StateDir
from ovsmesh.status import Runtime, Traffic
from ovsmesh.statustext import render_text
from ovsmesh.turn import Turn, around, report

_FIRST_LOOK = 5.0
"""Seconds for a Docker daemon to say where it is."""
_STEP = 0.2
_SETTLE = 10.0
"""Seconds for obr0's device to go: at once for a thousand ports, 5 s and more for five thousand."""
_PROOF = tuple(kind for kind in KINDS if kind not in ("sysctls", "restore_wait"))


@contextlib.contextmanager
def opened(options: Options, state: StateDir, removing: bool = False) -> Iterator[Host]:
    """The host, connected, with whatever was under way on it settled."""
    host = options.host(state, removing=removing)
    try:
        end = time.monotonic() + _FIRST_LOOK
        while host.expecting and time.monotonic() < end:
            host.wait((), _STEP)
            host.drain()
        host.ovs.connect()
        yield host
    finally:
        host.close()


def snapshot(options: Options) -> Snapshot:
    """The mesh that the file holds now, or the last good one. Raises OvsmeshError where no file is known."""
    if not options.mesh:
        raise OvsmeshError(f"no mesh: no agent has left its options in {options.state_dir}; give --mesh FILE")
    source = FileSource(options.mesh, options.state_dir, options.node)
    try:
        return source.snapshot()
    finally:
        source.close()


def _look(host: Host, source: Snapshot, node: str) -> Turn:
    """What an agent's turn would find now, with nothing done about it."""
    wanted, problems = source.mesh, source.problems
    me = wanted.node(node) if wanted else None
    if wanted is None or me is None:
        return Turn(None, None, None, None, Plan(), problems, False)
    host.drain()
    facts = host.facts(wanted, me)
    want, refused = meshes.dataplane(wanted, node, facts)
    want = host.possible(want)
    have = host.observe(want)
    todo = plan(want, have)
    fatal = any(p.fatal for p in have.problems)
    converged = not (todo.steps or todo.blocked or todo.held or fatal)
    problems = (*problems, *refused, *have.problems, *around(have, todo))
    return Turn(wanted, facts, want, have, todo, problems, converged, source.confirmed, since=source.since)


def look(options: Options) -> tuple[Turn, bool]:
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
    pairs = [pair for pair in own or () if isinstance(pair, list) and len(pair) == 2]
    more = [Problem(str(reason), str(text)) for reason, text in pairs if str(text) not in known]
    found = dataclasses.replace(found, problems=(*found.problems, *more))
    about = Runtime(
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


def cleanup(options: Options, dry_run: bool) -> tuple[list[str], bool]:
    """Removes all of ours; what it did and the proof, as lines, and whether nothing is left.

    Raises OvsmeshError while an agent runs with this state directory: it would put all back.
    """
    state = StateDir(options.state_dir)
    if dry_run:
        return remove(options, state, dry_run)
    state.lock()
    try:
        return remove(options, state)
    finally:
        state.unlock()


def remove(options: Options, state: StateDir, dry_run: bool = False) -> tuple[list[str], bool]:
    """As cleanup, for who holds the state directory already."""
    with opened(options, state, removing=True) as host:
        return _cleanup(host, state, dry_run)


def _cleanup(host: Host, state: StateDir, dry_run: bool) -> tuple[list[str], bool]:
    before, problems = state.before()
    # a setting of kbr0's own goes with it
    want = Dataplane(sysctls={key: value for key, value in before.items() if f"/{KBR}/" not in key})
    have = host.observe(want)
    todo = _spared(plan(want, have, confirmed=True), have)
    steps = [str(step._replace(why="")) for step in todo.steps]
    if dry_run:
        stays = [f"! {text}" for text in [host.docker.stays()] if text] if host.docker else []
        return [*steps, *stays, f"{len(steps)} parts would be removed or restored"], not stays
    moved = _restore_docker(host.docker, host) if host.docker else []
    pods = [name for name in host.net.mirror.ports_of(KBR) if name != OBR] if KBR in have.dataplane.links else []
    failed = [*moved, *(host.apply(todo, want) if todo.steps else [])]
    have, left = _settled(host, want)
    if left.steps and {step.kind for step in left.steps} == {"links"} and not have.unknown:
        failed += host.apply(_spared(left, have), want)
        have, left = _settled(host, want)
    lines = [*steps, *(f"! {problem}" for problem in (*problems, *failed, *have.problems))]
    lines += [f"left alone: {f.detail}" for f in have.foreign]
    if pods:
        lines.append(f"left without a bridge, as {KBR} is gone: {', '.join(pods)}")
    counts = [f"{len(getattr(have.dataplane, kind))} {kind.replace('_', ' ')}" for kind in _PROOF]
    lines.append(f"proof, read back from the system: {', '.join(counts)}")
    guests = [f.key for f in have.foreign if f.kind == "ports"]
    if guests:
        lines.append(f"{OBR} stays, as {', '.join(map(str, guests))} in it is not ours: move that, then run this again")
    clean = not left.steps and not any(p.fatal for p in failed) and not have.unknown
    if clean:
        lines += [f"left in the state directory: {name}" for name in state.remove()]
        restored = sum(step.kind == "sysctls" for step in todo.steps)
        lines.append(f"nothing of ovsmesh is left; {restored} sysctls are as they were")
    else:
        lines += [f"still there: {step}" for step in left.steps]
        lines += [f"can't be seen: {kind}" for kind in sorted(have.unknown)]
    return lines, clean


def _restore_docker(docker: Docker, host: Host) -> list[Problem]:
    """Docker back to where it was, before the bridge under it goes. Raises OvsmeshError where nothing was changed."""
    why = docker.stays()
    if why:
        raise OvsmeshError(why)
    told = docker.restore()
    while host.busy:
        # a restart has deadlines of its own
        host.wait((), _STEP)
        host.drain()
    return [Problem("DockerNotRestored", text) for text in [docker.restored()] if text] + [
        Problem("Docker", text, fatal=False) for text in told
    ]


def _settled(host: Host, want: Dataplane) -> tuple[Observed, Plan]:
    """What is left, once ovs-vswitchd has had its time: it tells of a bridge's end before the device goes."""
    end = time.monotonic() + _SETTLE
    while True:
        host.dirty()
        have = host.observe(want)
        left = _spared(plan(want, have, confirmed=True), have)
        if not left.steps or time.monotonic() > end or any(step.kind != "links" for step in left.steps):
            return have, plan(want, have, confirmed=True)
        host.wait((), end - time.monotonic())
        host.drain()


def _spared(todo: Plan, have: Observed) -> Plan:
    """Without the end of obr0 while a port of someone else is in it, which would end too."""
    if not any(f.kind == "ports" for f in have.foreign):
        return todo
    return Plan(tuple(step for step in todo.steps if step.key != OBR))
