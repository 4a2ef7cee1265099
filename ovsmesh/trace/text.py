"""A trace as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from ovsmesh.text import printable
from ovsmesh.trace.types import EchoFound, Hop, Place, Point, Trace, Verdict

_WIDTH = 80
_MARK = {Verdict.OK: "ok", Verdict.BROKEN: "BROKEN", Verdict.UNKNOWN: "?"}
_NOT_REACHED = "-"
"""Mark of a hop that is as wanted, and to which no packet came."""
EXIT = {"arrives": 0, "stops": 2, "degraded": 2, "unknown": 1}


def _place(place: Place, here: str) -> str:
    where = f"in {place.cidr} of {place.node}" if place.cidr else f"of {place.node}"
    return f"{place}, {place.kind} {where}{' (this node)' if place.node == here else ''}"


def _echo(found: EchoFound) -> str:
    if found.refused:
        return f"not sent: {found.refused}"
    errors = "".join(f"; {error}" for error in found.errors)
    return f"{found.sent} of {found.size} bytes, {found.answered} answered{errors}"


def _hop(number: int, hop: Hop, width: int) -> Iterator[str]:
    head = f"{number:>3}  {hop.name:<{width}}  {_MARK[hop.verdict] if hop.reached else _NOT_REACHED:<6}  "
    rest = " " * len(head)
    lines = textwrap.wrap(hop.found, max(24, _WIDTH - len(head)), break_on_hyphens=False) or [""]
    yield head + lines[0]
    yield from (rest + line for line in lines[1:])
    if hop.verdict is Verdict.BROKEN:
        for word, text in (("wanted", hop.wanted), ("do", hop.todo)):
            if text:
                first, *more = textwrap.wrap(f"{word}: {text}", max(24, _WIDTH - len(head)), subsequent_indent="  ")
                yield rest + first
                yield from (rest + line for line in more)


def render(trace: Trace) -> str:
    """Return the trace for a terminal or a pipe; it ends with a newline."""
    e = trace.evidence
    lines = textwrap.wrap(trace.headline, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    if trace.todo:
        lines += textwrap.wrap(trace.todo, _WIDTH, initial_indent="! ", subsequent_indent="  ")
    lines += ["", f"  from  {_place(e.source, e.self_name)}", f"  to    {_place(e.target, e.self_name)}"]
    how = {"pod": "from inside the pod", "host": "from this node", "host for the pod": "from this node, as if from it"}
    sent = f"{_echo(e.small)}, {how[e.sent_from]}"
    lines += textwrap.wrap(sent, _WIDTH, initial_indent="  sent  ", subsequent_indent="        ")
    if e.full.sent or e.full.refused:
        lines.append(f"        {_echo(e.full)}")
    for note in e.notes:
        lines += textwrap.wrap(note, _WIDTH, initial_indent="  note  ", subsequent_indent="        ")
    width = max(len(hop.name) for hop in trace.hops)
    lines.append("")
    for number, hop in enumerate(trace.hops, 1):
        lines += _hop(number, hop, width)
        if number == trace.stops_at:
            lines.append("-" * 5 + " stops here " + "-" * 5)
    return "\n".join(map(printable, lines)) + "\n"


def to_dict(trace: Trace) -> dict[str, Any]:
    """Return the trace for JSON: names in camelCase, sizes in bytes, times in seconds, nothing that is not known."""
    e = trace.evidence
    return {
        "headline": printable(trace.headline),
        "state": trace.state,
        **({"stopsAt": trace.stops_at, "stopsAtHop": trace.hops[trace.stops_at - 1].name} if trace.stops_at else {}),
        **({"todo": printable(trace.todo)} if trace.todo else {}),
        "node": e.self_name,
        "source": _end(e.source),
        "destination": _end(e.target),
        "sentFrom": e.sent_from,
        "packets": [_sent(found) for found in (e.small, e.full) if found.sent or found.refused],
        "seen": [{"at": str(point), "packets": e.seen[point]} for point in Point if point in e.seen],
        "hops": [
            {
                "number": number,
                "name": hop.name,
                "verdict": str(hop.verdict),
                **({} if hop.reached else {"reached": False}),
                "found": printable(hop.found),
                **({"wanted": printable(hop.wanted)} if hop.wanted else {}),
                **({"todo": printable(hop.todo)} if hop.todo and hop.verdict is Verdict.BROKEN else {}),
            }
            for number, hop in enumerate(trace.hops, 1)
        ],
        "notes": [printable(note) for note in e.notes],
    }


def _end(place: Place) -> dict[str, str]:
    about = {"address": str(place.address), "kind": str(place.kind), "node": place.node, "name": printable(place.name)}
    return {key: value for key, value in (about | {"podCIDR": str(place.cidr or "")}).items() if value}


def _sent(found: EchoFound) -> dict[str, Any]:
    about: dict[str, Any] = {"size": found.size, "sent": found.sent, "answered": found.answered}
    about |= {"errors": list(map(printable, found.errors))} if found.errors else {}
    about |= {"refused": printable(found.refused)} if found.refused else {}
    return about | ({"roundTrip": round(found.round_trip, 6)} if found.round_trip is not None else {})
