"""`ovsmesh plan` and `ovsmesh status` of a node. They read the system themselves, whether an agent runs or not."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ovsmesh import __version__, bounded
from ovsmesh.agent import result
from ovsmesh.agent.options import Options, opened
from ovsmesh.agent.publisher import OWN_REASONS
from ovsmesh.cli.formats import View
from ovsmesh.dataplane.node_report import report
from ovsmesh.dataplane.plan import Plan
from ovsmesh.dataplane.report import Agent, Held, ReconcileResult, Report, ReportContext
from ovsmesh.dataplane.report_text import render_text, table
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.errors import OvsmeshError, Problem, summary
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.manifest import digest
from ovsmesh.mesh.source import Snapshot
from ovsmesh.ovs.figures import SwitchFigures
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import age, clock, counted, listed, printable, seconds

_AGENT_TIMEOUT, _AGENT_MOST = 3.0, 64 * 1024 * 1024
"""Seconds and bytes for the answer of the agent on this host."""
_STILL = 60.0
"""Seconds after which a loop that has not run is worth a word: its longest pause is half a second."""


_CONFIRMING, _LOOK = 30.0, 0.2
"""Seconds for the agent to take a confirmation, and between looks whether it has."""


def snapshot(options: Options) -> Snapshot:
    """Return the mesh of the file, or the last good one. Raises OvsmeshError where no file is known."""
    if not options.mesh:
        raise OvsmeshError(f"no mesh: no agent has left its options in {options.state_dir}; give --mesh FILE")
    source = FileSource(options.mesh, options.state_dir, options.node)
    try:
        return source.snapshot()
    finally:
        source.close()


def usable(options: Options) -> Snapshot:
    """Return the mesh as snapshot() does. Raises OvsmeshError where there is none."""
    source = snapshot(options)
    if source.mesh is None:
        raise OvsmeshError(summary(source.problems))
    return source


def look(options: Options) -> tuple[ReconcileResult, bool]:
    """Return what the agent would change now, and whether a conflict blocks it or something cannot be observed.

    Raises OvsmeshError without a usable mesh.
    """
    source = usable(options)
    with opened(options, StateDir(options.state_dir)) as driver:
        found = result.look(driver, source, options.node)
    unclear = found.have is None or bool(found.have.unknown)
    return found, bool(found.plan.blocked) or unclear or not source.confirmed


def plan_dict(found: ReconcileResult) -> dict[str, Any]:
    """Return a plan for JSON and YAML."""
    todo: Plan = found.plan
    return {
        "steps": [{"op": step.op, "kind": step.kind, "text": str(step)[2:]} for step in todo.steps],
        "blocked": [{"kind": one.step.kind, "text": str(one)[2:]} for one in todo.blocked],
        "held": [{"op": step.op, "kind": step.kind, "text": str(step)[2:]} for step in todo.held],
        "heldPeers": list(todo.held_peers),
        "problems": [{"reason": str(p.reason), "message": str(p), "fatal": bool(p.fatal)} for p in found.problems],
    }


def status(options: Options) -> Report:
    """Return the report of this node. Raises OvsmeshError where no file is known."""
    told = ask(options)
    # an agent that runs and has no mesh is a state; without one nothing can be told
    source = snapshot(options) if told.agent.since is not None else usable(options)
    with opened(options, StateDir(options.state_dir)) as driver:
        found = result.look(driver, source, options.node)
        figures = driver.figures()
    return node_report(options, found, told, context(options, told, figures))


def view_of(found: Report) -> View:
    """Return a report as it is shown."""
    return View(render_text(found), found.to_dict(), 0 if found.well else 2)


def view(options: Options) -> View:
    """Return the status of this node as it is shown. Raises OvsmeshError where no file is known."""
    return view_of(status(options))


def nodes_view(matrix: Mapping[str, Any]) -> View:
    """Return a line for each node of a matrix, as /matrix.json has it; the troubled ones first."""
    counts = {str(row.get("node")): _map(row.get("counts")) for row in _list(matrix.get("rows"))}
    rows = []
    for node in _list(matrix.get("nodes")):
        name, agent = str(node.get("name")), str(node.get("agent"))
        states = {state: n for state, n in counts.get(name, {}).items() if isinstance(n, int)}
        row: dict[str, Any] = {
            "name": name,
            "well": agent == "ok" and node.get("well") is True,
            "agent": agent,
            "headline": node.get("headline"),
            "peers": {"reachable": states.get(str(State.OK), 0), "all": sum(states.values())},
            "version": node.get("version"),
            "meshDigest": node.get("meshDigest"),
            "time": node.get("time"),
        }
        rows.append(row)
    rows.sort(key=lambda row: bool(row["well"]))
    bad = [row["name"] for row in rows if not row["well"]]
    lines = [f"{len(rows) - len(bad)} of {counted(len(rows), 'node')} well{'; not: ' + listed(bad, 5) if bad else ''}"]
    silent = [row["name"] for row in rows if row["agent"] == "no answer"]
    lines += [f"! no answer from the agent of {listed(silent, 8)}"] if silent else []
    meshes = Counter(str(row["meshDigest"]) for row in rows if row["meshDigest"] and row["name"] not in silent)
    for other, _ in meshes.most_common()[1:]:
        names = [row["name"] for row in rows if row["meshDigest"] == other]
        lines.append(f"! {listed(names, 8)}: another mesh ({other}) than most nodes")
    now = seconds(str(matrix.get("time"))) or 0.0
    head = ["NODE", "REACHABLE", "VERSION", "MESH", "AGE", "VERDICT"]
    lines += ["", *table([head, *(_cells(row, now) for row in rows)])]
    good = bool(rows) and not bad and len(meshes) < 2
    return View("\n".join(map(printable, lines)), {"well": good, "nodes": rows}, 0 if good else 2)


def _cells(row: Mapping[str, Any], now: float) -> list[str]:
    at, peers = seconds(str(row["time"])), row["peers"]
    said = str(row["headline"] or "").removeprefix(f"{row['name']}: ")
    return [
        row["name"],
        f"{peers['reachable']}/{peers['all']}" if peers["all"] else "-",
        str(row["version"] or "-"),
        str(row["meshDigest"] or "-"),
        age(now - at) if at is not None else "-",
        said if row["agent"] == "ok" else f"{row['agent']}{said and f'; it said: {said}'}",
    ]


# What the agent tells


class Told(NamedTuple):
    """What this host's agent tells, or has told, and how it is."""

    agent: Agent
    report: Mapping[str, Any]
    """Its report as JSON; {} where there is none."""
    note: Problem | None = None
    """What else is to be said of it."""


def ask(options: Options) -> Told:
    """Ask the agent of this host for its report; read the last one in the state directory if it does not answer."""
    state, now = StateDir(options.state_dir), time.time()
    runs = state.held()
    stored, heard = _kept(state, runs)
    if not runs:
        return _away(Reason.AgentDown, "no agent runs", stored, heard)
    known = state.agent()
    pid, other = known.get("pid"), known.get("node", options.node)
    if other != options.node:
        return _away(Reason.AgentDown, f"no agent runs for this node; the one here is of node {other}", {}, None)
    who = f"the agent (pid {pid})" if isinstance(pid, int) else "the agent"
    listen = str(stored.get("listen", options.listen))
    answer = get(listen, "/status.json")
    if answer.state == "ok" and _is_this_agents(answer.tree, stored, options.node):
        return _alive(answer.tree, seconds(str(answer.tree.get("loopRan"))), now)
    if answer.state == "starting" or (answer.state == "refused" and heard is None):
        return _away(Reason.AgentNotReported, f"{who} has just started and has not reported yet", stored, heard)
    if answer.state == "silent" or heard is None:
        text = f"{who} does not answer on {listen} within {_AGENT_TIMEOUT:.0f} s"
        return _away(Reason.AgentHung, text, stored, heard)
    where = f"on {listen}" if listen else f"on {options.listen}"
    text = f"{who} can't listen {where}, so this is its report of {clock(heard, now)}"
    return _alive(stored, heard, now)._replace(note=Problem(Reason.AgentNotListening, text))


def listening(options: Options) -> str:
    """Return where the agent of this host listens, "" for nowhere; where none has run, where one would."""
    state = StateDir(options.state_dir)
    stored, _ = _kept(state, state.held())
    return str(stored.get("listen", options.listen))


def _kept(state: StateDir, runs: bool) -> tuple[Mapping[str, Any], float | None]:
    """Return the report in the state directory, and when it was last true; {} where the agent that runs has none.

    What an agent before it knew of its peers says nothing of now.
    """
    stored: dict[str, Any] = {}
    with contextlib.suppress(OvsmeshError):
        stored = state.status() or {}
    heard, started = state.status_time() if stored else None, state.agent_time()
    if runs and heard is not None and started is not None and heard < started:
        return {}, None
    return stored, heard


def _away(reason: Reason, text: str, stored: Mapping[str, Any], heard: float | None) -> Told:
    me = _map(stored.get("self"))
    since = None if reason is Reason.AgentDown else seconds(str(me.get("agentSince")))
    said = str(stored.get("headline", "")).partition(": ")[2]
    return Told(Agent(since, str(me.get("agentVersion", "")), Problem(reason, text), False, heard, said), stored)


def _alive(tree: Mapping[str, Any], ran: float | None, now: float) -> Told:
    me = _map(tree.get("self"))
    version, problem = str(me.get("agentVersion", "")), None
    if ran is not None and now - ran > _STILL:
        problem = Problem(Reason.AgentHung, f"the agent's loop has not run for {age(now - ran)}")
    elif version != __version__:
        problem = Problem(Reason.AgentOutdated, f"the agent runs version {version}, and {__version__} is installed")
    return Told(Agent(seconds(str(me.get("agentSince"))), version, problem), tree)


def _is_this_agents(tree: Mapping[str, Any], stored: Mapping[str, Any], node: str) -> bool:
    """Return whether an answer is of the agent whose state directory this is: anyone may listen at its address.

    A newer agent than the one that wrote the report there may have found the disk full or read-only.
    """
    me, before = _map(tree.get("self")), _map(stored.get("self"))
    since, known = (seconds(str(found.get("agentSince"))) or 0.0 for found in (me, before))
    return me.get("name") == node and since >= known


class _Answer(NamedTuple):
    state: str
    """"ok", "refused" (nobody listens), "starting" (no report yet) or "silent"."""
    tree: Mapping[str, Any] = {}


def get(listen: str, path: str, timeout: float = _AGENT_TIMEOUT) -> _Answer:
    """Return the JSON object that an agent answers to a GET, or why there is none."""
    if not listen.rpartition(":")[2]:
        return _Answer("refused")
    try:
        with bounded.opened(listen, path, timeout) as answer:
            return _Answer("ok", _map(json.loads(answer.read(_AGENT_MOST))))
    except urllib.error.HTTPError as error:
        return _Answer("starting" if error.code == 503 else "refused")
    except (TimeoutError, http.client.HTTPException):
        return _Answer("silent")
    except urllib.error.URLError as error:
        return _Answer("silent" if isinstance(error.reason, TimeoutError) else "refused")
    except (OSError, ValueError, RecursionError):
        return _Answer("refused")


def context(options: Options, told: Told, figures: SwitchFigures) -> ReportContext:
    """Return what a report depends on besides the system itself."""
    me = _map(told.report.get("self"))
    used = str(me.get("meshDigest", "")) if told.agent.since is not None else ""
    peers = {str(peer.get("name")): peer for peer in _list(told.report.get("peers"))}
    changes = {
        name: (when, str(peer.get("lastChangeText", "")))
        for name, peer in peers.items()
        if (when := seconds(str(peer.get("lastChange")))) is not None
    }
    return ReportContext(
        now=time.time(),
        agent=told.agent,
        ovs_version=figures.version,
        traffic=figures.traffic,
        mesh_from=str(me.get("meshFrom", "")) if used else options.mesh,
        mesh_in_force=(used, seconds(str(me.get("meshSince")))) if used else None,
        last_change=changes,
        reach={name: _reach(peer["reach"]) for name, peer in peers.items() if isinstance(peer.get("reach"), dict)},
    )


def _reach(found: Mapping[str, Any]) -> Reach:
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


def node_report(options: Options, found: ReconcileResult, told: Told, about: ReportContext, peer: str = "") -> Report:
    """Return the report of what was found, with the problems that only a running agent knows.

    With `peer` it is about this peer alone.
    """
    known = {str(problem) for problem in found.problems}
    more = [*_only_the_agents(told), *_not_in_force(options, found, about), *([told.note] if told.note else ())]
    problems = (*found.problems, *(problem for problem in more if str(problem) not in known))
    mesh = found.mesh
    if mesh is not None and peer:
        about = dataclasses.replace(about, mesh_in_force=about.mesh_in_force or (digest(mesh), found.mesh_since))
        mesh = dataclasses.replace(mesh, nodes=tuple(n for n in mesh.nodes if n.name in (peer, options.node)))
    held = held_by(told) if told.agent.alive else None
    return report(dataclasses.replace(found, mesh=mesh, problems=problems, held=held), options.node, about)


def held_by(told: Told) -> Held | None:
    """Return the removals that a running agent holds."""
    found = _map(told.report.get("held"))
    until, digest_ = seconds(str(found.get("until"))), found.get("digest")
    if told.agent.since is None or until is None or not isinstance(digest_, str):
        return None
    peers = found.get("peers")
    return Held(tuple(map(str, peers if isinstance(peers, list) else ())), digest_, until)


def confirm(options: Options, wanted: str) -> str:
    """Confirm the held removals of this digest, and return what the agent made of it, once that is seen.

    Raises OvsmeshError where no agent runs, nothing or something else is held, or the agent does not take it.
    """
    state = StateDir(options.state_dir)
    if not state.held():
        text = f"no agent runs with the state directory {state.path}, so nothing is held; give --state-dir another"
        raise OvsmeshError(text)
    told = ask(options)
    held = held_by(told)
    if held is None:
        unsure = told.agent.problem or told.note
        raise OvsmeshError(
            f"the agent holds no removal, so there is nothing to confirm{f' ({unsure})' if unsure else ''}"
        )
    what = f"the removal of {counted(len(held.peers), 'peer')} ({listed(held.peers, 10)})"
    if wanted != held.digest:
        raise OvsmeshError(
            f"{printable(wanted, 80)} is not what the agent holds: it holds {what}, digest {held.digest}"
        )
    state.request_confirm(wanted)
    end = time.monotonic() + _CONFIRMING
    while time.monotonic() < end:
        # the agent announces it nowhere else
        time.sleep(_LOOK)
        now = held_by(ask(options))
        if state.confirmation() is None and (now is None or now.digest != wanted):
            peers = f"{counted(len(held.peers), 'peer')} now: {listed(held.peers, 10)}"
            return f"confirmed: the agent removes {peers}"
        if now is not None and now.digest != wanted:
            state.clear_confirmation()
            raise OvsmeshError(f"nothing was confirmed, as what is held has changed meanwhile: it is {now.digest} now")
    text = f"the agent has not taken the confirmation of {what} within {_CONFIRMING:.0f} s; it does when it can. See"
    raise OvsmeshError(f"{text} `ovsmesh status`")


def _only_the_agents(told: Told) -> Iterator[Problem]:
    """Yield the problems that a running agent knows and nobody else can see."""
    for item in _list(told.report.get("problems")) if told.agent.since is not None and told.agent.alive else ():
        reason = str(item.get("reason"))
        if reason in OWN_REASONS:
            node, where, value = (str(item.get(key, "")) for key in ("node", "field", "value"))
            yield Problem(Reason[reason], str(item.get("message", "")), node, where, value)


def _not_in_force(options: Options, found: ReconcileResult, about: ReportContext) -> Iterator[Problem]:
    """Yield a problem where the agent works with another mesh than its file holds."""
    if found.mesh is None or not found.mesh_current or about.mesh_in_force is None or about.mesh_from != options.mesh:
        return
    used, since = about.mesh_in_force
    if used != (now := digest(found.mesh)):
        read = f", read at {clock(since, about.now)}" if since else ""
        yield Problem(Reason.MeshNotTaken, f"{options.mesh} has mesh {now}, and the agent works with mesh {used}{read}")


# What an agent tells is a hint: what is not of the expected shape is left out.


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
