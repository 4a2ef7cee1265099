"""`ovsmesh matrix`: what packets do between every two nodes, in each direction, from the agents' own probes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from ovsmesh.agent.options import Options
from ovsmesh.cli import inspect
from ovsmesh.dataplane.report_text import table
from ovsmesh.dataplane.types import Facts, State
from ovsmesh.errors import OvsmeshError, summary
from ovsmesh.probe import exchange
from ovsmesh.probe.matrix import WORST
from ovsmesh.probe.targets import targets
from ovsmesh.text import age, counted, listed, printable

_AGENT_TIME = exchange.COLLECT_TIME + 5.0
"""Seconds for the answer of the agent on this host."""
_WIDTH = 80
_LISTED = 20
"""Directions, and pairs of zones, that are listed where the mesh is too large for a table."""
Object = dict[str, Any]


def matrix(options: Options) -> Object:
    """Return the matrix from the agent of this host; where it does not answer, from the agents of the peers.

    Raises OvsmeshError where nothing can be told.
    """
    listen = inspect.listening(options)
    answer = inspect.get(listen, "/matrix.json", _AGENT_TIME)
    found = dict(answer.tree)
    if answer.state == "ok" and _is_matrix(found):
        return found
    silent = f"the agent of this host does not answer on {listen or 'any address'}"
    if os.geteuid() != 0:
        raise OvsmeshError(f"{silent}; as root (sudo) this command asks the agents of the peers itself")
    source = inspect.snapshot(options)
    if source.mesh is None or source.mesh.node(options.node) is None:
        why = summary(source.problems) or f"node {options.node} is not in the mesh"
        raise OvsmeshError(f"{silent}, and no peer can be asked: {why}")
    found = exchange.collect(source.mesh, targets(source.mesh, options.node, Facts()), None, {})
    if all(node["agent"] == "no answer" for node in found["nodes"]):
        raise OvsmeshError(
            f"{silent}, nor does any peer's to this host: start the agent here, or run this on another host"
        )
    return found


def _is_matrix(found: Object) -> bool:
    """Return whether it can be shown: anyone on this host may listen where no agent does."""
    try:
        render(found)
        exit_code(found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return True


def exit_code(found: Object) -> int:
    """Return 0 where packets get through in every direction and every agent answers, else 2."""
    agents = all(node["agent"] == "ok" for node in found["nodes"])
    return 0 if agents and not set(found["counts"]) - {State.OK} else 2


def render(found: Object, worst: int | None = None) -> str:
    """Return the matrix as text: a table where it fits 80 columns, else, or with `worst`, a list of the worst."""
    lines = [_verdict(found), *_silent(found)]
    grid = _grid(found) if worst is None else []
    lines += ["", *(grid or _list(found, _LISTED if worst is None else worst))]
    zones = _zones(found)
    return "\n".join(map(printable, [*lines, *(["", *zones] if zones else [])]))


def _directions(found: Object) -> Iterator[tuple[str, Object]]:
    for row in found["rows"]:
        for cell in row["cells"]:
            yield row["node"], cell


def _verdict(found: Object) -> str:
    counts: Mapping[str, int] = found["counts"]
    total, ok = sum(counts.values()), counts.get(State.OK, 0)
    slowest = max(_directions(found), key=lambda one: one[1].get("roundTrip", -1.0), default=None)
    more = ""
    if slowest and "roundTrip" in slowest[1]:
        more = f"; slowest {_ms(slowest[1]['roundTrip'])} ms, {slowest[0]} → {slowest[1]['peer']}"
    nodes = counted(len(found["nodes"]), "node")
    if ok == total:
        return f"{nodes}: all {total} directions ok{more}"
    states = ", ".join(f"{counts[state]} {state}" for state in _ordered(counts) if state != State.OK)
    return f"{nodes}: {total - ok} of {total} directions not ok: {states}{more}"


def _ordered(counts: Iterable[str]) -> list[str]:
    return sorted(counts, key=lambda state: (WORST.index(state) if state in WORST else -1, state))


def _silent(found: Object) -> Iterator[str]:
    silent = [node["name"] for node in found["nodes"] if node["agent"] == "no answer"]
    if silent:
        yield f"! no answer from {_agents(silent)}: the row is filled from the other ends (*)"
    other = [node["name"] for node in found["nodes"] if node["agent"] == "outdated"]
    if other:
        yield f"! another mesh in force at {_agents(other)}: compare the digests that `ovsmesh status` shows there"


def _agents(names: list[str]) -> str:
    return f"the agent of {names[0]}" if len(names) == 1 else f"the agents of {listed(names, 5)}"


# The table


_MARKS = {
    State.UNREACHABLE: ("X", "X unreachable"),
    State.NOT_FORWARDED: ("F", "F not forwarded to pods"),
    "missing": ("M", "M wiring missing"),
    "refused": ("R", "R refused"),
    "unknown": ("?", "? unknown: nobody has measured it"),
    State.UNPROBED: ("·", "· not probed yet"),
}


def _ms(trip: float) -> str:
    ms = trip * 1000
    return f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _short(cell: Object, legend: dict[str, None]) -> str:
    """Return a cell in few characters; `legend` takes in what has to be explained."""
    state = cell["state"]
    if state == State.OK and "roundTrip" in cell:
        text, why = _ms(cell["roundTrip"]), ""
    elif state == State.SMALL and "pathMtu" in cell:
        text, why = f"≤{cell['pathMtu']}", "≤N only packets of up to N bytes"
    elif state == State.LOSSY and "loss" in cell:
        text, why = f"{cell['loss']:.0%}", "N% lost"
    else:
        text, why = _MARKS.get(state, ("!", f"! {state}"))
    if why:
        legend[why] = None
    if cell.get("fromOtherEnd"):
        legend["* measured by the other end"] = None
        text += "*"
    return text


def _grid(found: Object) -> list[str]:
    """Return the table of all directions; nothing where it would not fit."""
    names = [row["node"] for row in found["rows"]]
    if not found["complete"] or len(names) > 20:
        return []
    legend: dict[str, None] = {}
    rows = []
    for row in found["rows"]:
        cells = {cell["peer"]: _short(cell, legend) for cell in row["cells"]}
        rows.append(["-" if name == row["node"] else cells.get(name, "?") for name in names])
    heads, labels = names, names
    if max(map(len, names), default=0) > 5:
        heads = [str(n) for n in range(1, len(names) + 1)]
        labels = [f"{head:>2} {name}" for head, name in zip(heads, names, strict=True)]
    first = max(map(len, [*labels, "from \\ to"]))
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    grid = [["from \\ to", *heads], *([label, *row] for label, row in zip(labels, rows, strict=True))]
    lines = [
        "  ".join([row[0].ljust(first), *(text.rjust(w) for text, w in zip(row[1:], widths, strict=True))])
        for row in grid
    ]
    if max(map(len, lines)) > _WIDTH:
        return []
    return [*(line.rstrip() for line in lines), "round trip in ms" + "".join(f"; {text}" for text in legend)]


# The list


def _list(found: Object, most: int) -> list[str]:
    every = sorted(_directions(found), key=lambda one: _badness(one[1]))
    now = _seconds(found["time"])
    rows = [["FROM", "TO", "STATE", "SINCE", "RTT ms", "P99 ms", "LOSS", "MTU"]]
    for node, cell in every[:most]:
        since = _seconds(cell.get("since"))
        trips = [_ms(cell[key]) if key in cell else "-" for key in ("roundTrip", "roundTripP99")]
        loss = f"{cell['loss']:.0%}" if "loss" in cell else "-"
        state = cell["state"] + ("*" if cell.get("fromOtherEnd") else "")
        when = age(now - since) if now is not None and since is not None else "-"
        rows.append([node, cell["peer"], state, when, *trips, loss, str(cell.get("pathMtu", "-"))])
    lines = [*table(rows)]
    if any(cell.get("fromOtherEnd") for _, cell in every[:most]):
        lines.append("* measured by the other end")
    total = sum(found["counts"].values())
    if total > len(rows) - 1:
        lines.append(f"the worst {len(rows) - 1} of {total}; --worst N shows more, -o json what was collected")
    return lines


def _badness(cell: Object) -> tuple[float, ...]:
    state = cell["state"]
    return WORST.index(state) if state in WORST else 0, -cell.get("loss", 0.0), -cell.get("roundTrip", 0.0)


def _seconds(text: object) -> float | None:
    return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None


def _zones(found: Object) -> list[str]:
    """Return a summary by zones, those with the most trouble first."""
    zones = sorted(found["zones"], key=lambda one: (one["ok"] - one["pairs"], -one.get("roundTrip", 0.0)))
    rows = [["FROM ZONE", "TO ZONE", "OK", "UNKNOWN", "RTT ms", "SLOWEST ms"]]
    for one in zones[:_LISTED]:
        trips = [_ms(one[key]) if key in one else "-" for key in ("roundTrip", "slowest")]
        ok = f"{one['ok']}/{one['pairs']}"
        rows.append([one["from"] or "-", one["to"] or "-", ok, str(one["unknown"] or "-"), *trips])
    more = [f"and {len(zones) - _LISTED} more pairs of zones"] if len(zones) > _LISTED else []
    return [*table(rows), *more] if zones else []
