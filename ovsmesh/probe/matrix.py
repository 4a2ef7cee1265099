"""The matrix of a mesh: each node's row tells what its probes found of every peer.

A row that came from a peer is checked against the mesh in force and believed of that peer's own row only. Where a
node's agent does not answer, its row is filled from the other ends: the round trip and the loss of an echo are those of
both directions. Times are seconds since the epoch; durations are in seconds, sizes in bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from ovsmesh.dataplane.report import Report
from ovsmesh.dataplane.types import State
from ovsmesh.mesh.types import Mesh
from ovsmesh.text import printable, timestamp

_MOST_CELLS = 20_000
"""Cells of a matrix, which bound the memory and the time of one: a mesh of up to 141 nodes has all of them."""
_FEWEST = 20
"""Cells of a row at least; in a large mesh these are the worst."""
_CELL_BYTES, _HEAD_BYTES = 420, 16384
"""Bytes on the wire of one cell and of all else in a row, at most; a name may have 253 characters."""
_MOST_ZONES = 64
"""With more zones than that there is no summary by zone."""
_LONGEST_TRIP = 60.0
_DIGEST = re.compile(r"[0-9a-f]{12}")

UNKNOWN = "unknown"
WORST: tuple[str, ...] = (
    *(
        State.UNREACHABLE,
        State.NOT_FORWARDED,
        "missing",
        "refused",
        State.SMALL,
        State.LOSSY,
        UNKNOWN,
        State.UNPROBED,
        State.OK,
    ),
)
"""States of a cell as of a peer in a report, the worst first. One that is not named counts as unreachable does."""
STATES = frozenset({*map(str, WORST), *map(str, State)})
_MEASURED = frozenset(map(str, State)) - {State.UNPROBED}
"""States that probes have found, so that they hold for the other direction too."""


class RowError(ValueError):
    """What a peer sent is no row of its own."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of the way to one peer and back."""

    peer: str
    state: str
    since: float | None = None
    round_trip: float | None = None
    round_trip_p99: float | None = None
    loss: float | None = None
    path_mtu: int | None = None
    from_other_end: bool = False
    """Whether the peer has measured it, and not the node of the row."""

    def to_dict(self) -> dict[str, Any]:
        """Return the cell for JSON; what is unknown is absent."""
        found = {
            "peer": self.peer,
            "state": self.state,
            "since": None if self.since is None else timestamp(self.since),
            "roundTrip": _rounded(self.round_trip),
            "roundTripP99": _rounded(self.round_trip_p99),
            "loss": _rounded(self.loss),
            "pathMtu": self.path_mtu,
            "fromOtherEnd": self.from_other_end or None,
        }
        return {key: value for key, value in found.items() if value is not None}


class Tally(NamedTuple):
    """The cells of one node, or of one zone, towards one zone."""

    pairs: int = 0
    ok: int = 0
    unknown: int = 0
    trips: float = 0.0
    """Sum of the round trips of the measured ones."""
    measured: int = 0
    slowest: float = 0.0

    def plus(self, other: Tally) -> Tally:
        """Return both together."""
        return Tally(
            self.pairs + other.pairs,
            self.ok + other.ok,
            self.unknown + other.unknown,
            self.trips + other.trips,
            self.measured + other.measured,
            max(self.slowest, other.slowest),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the tally for JSON, with the mean of the round trips."""
        found: dict[str, Any] = {"pairs": self.pairs, "ok": self.ok, "unknown": self.unknown}
        if self.measured:
            found |= {"roundTrip": _rounded(self.trips / self.measured), "slowest": _rounded(self.slowest)}
            found["measured"] = self.measured
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """What one node tells of itself and of its peers."""

    node: str
    time: float
    headline: str = ""
    version: str = ""
    mesh_digest: str = ""
    converged: bool = False
    well: bool = False
    since: float | None = None
    """When its agent was started."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """State → peers in that state, also those that have no cell here."""
    zones: Mapping[str, Tally] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    """Those of all peers, or the worst in a large mesh."""

    @property
    def complete(self) -> bool:
        """Whether there is a cell for each peer that was counted."""
        return len(self.cells) >= sum(self.counts.values())

    def about(self, peers: Collection[str]) -> Row:
        """Return the row with the cells of these peers only."""
        return replace(self, cells=tuple(cell for cell in self.cells if cell.peer in peers))

    def plus(self, cells: Iterable[Cell]) -> Row:
        """Return the row with these cells too."""
        have = {cell.peer for cell in self.cells}
        return replace(self, cells=(*self.cells, *(cell for cell in cells if cell.peer not in have)))

    def worst(self, nodes: int) -> Row:
        """Return the row with as many cells as it may have in a mesh of so many nodes: the worst."""
        return replace(self, cells=_worst(self.cells, most_cells(nodes)))

    def encode(self) -> bytes:
        """Return the row as it goes to a peer."""
        found = {
            "node": self.node,
            "time": self.time,
            "headline": self.headline,
            "version": self.version,
            "meshDigest": self.mesh_digest,
            "converged": self.converged,
            "well": self.well,
            "since": self.since,
            "counts": dict(self.counts),
            "zones": [{"zone": zone, **tally._asdict()} for zone, tally in self.zones.items()],
            "cells": [cell.to_dict() for cell in self.cells],
        }
        return json.dumps(found, separators=(",", ":")).encode()


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 6)


def most_cells(nodes: int) -> int:
    """Return how many cells a row may have in a mesh of this many nodes."""
    return max(_FEWEST, _MOST_CELLS // max(1, nodes))


def most_bytes(nodes: int) -> int:
    """Return how many bytes a row may have."""
    return _HEAD_BYTES + _CELL_BYTES * min(nodes, most_cells(nodes))


def badness(cell: Cell) -> tuple[float, ...]:
    """Return a key by which the worst cell sorts first."""
    rank = WORST.index(cell.state) if cell.state in WORST else 0
    return rank, -(cell.loss or 0.0), -(cell.round_trip or 0.0)


def _worst(cells: Sequence[Cell], most: int) -> tuple[Cell, ...]:
    """Return the worst cells, in the order in which they came."""
    if len(cells) <= most:
        return tuple(cells)
    kept = {cell.peer for cell in sorted(cells, key=badness)[:most]}
    return tuple(cell for cell in cells if cell.peer in kept)


def _zones(mesh: Mesh) -> dict[str, str]:
    """Return node name → zone."""
    many = len({node.zone for node in mesh.nodes}) > _MOST_ZONES
    return {node.name: "" if many else node.zone for node in mesh.nodes}


def _counts(cells: Iterable[Cell]) -> dict[str, int]:
    return dict(Counter(cell.state for cell in cells))


def _tallies(cells: Iterable[Cell], zones: Mapping[str, str]) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for cell in cells:
        ok, unknown = cell.state == State.OK, cell.state in (UNKNOWN, State.UNPROBED)
        trip = cell.round_trip
        one = Tally(1, ok, unknown, trip or 0.0, trip is not None, trip or 0.0)
        zone = zones.get(cell.peer, "")
        found[zone] = found.get(zone, Tally()).plus(one)
    return found


def row(report: Report, mesh: Mesh) -> Row:
    """Return a node's own row from its report, with the cells of all peers."""
    names = {node.name for node in mesh.nodes}
    cells = []
    for peer in report.peers:
        if peer.name not in names:
            continue
        reach = peer.reach
        if reach is None:
            cells.append(Cell(peer.name, str(peer.state)))
        else:
            since = reach.since if peer.state == reach.state else None
            figures = (reach.round_trip, reach.round_trip_p99, reach.loss, reach.path_mtu)
            cells.append(Cell(peer.name, str(peer.state), since, *figures))
    me = report.self
    return Row(
        me.name,
        report.time,
        report.headline,
        me.agent_version,
        me.mesh_digest,
        report.converged,
        report.well,
        me.agent_since,
        _counts(cells),
        _tallies(cells, _zones(mesh)),
        tuple(cells),
    )


# A row from a peer. Whoever is root there can write anything into it.


class Known(NamedTuple):
    """What a row may name."""

    nodes: frozenset[str]
    zones: frozenset[str]


def known(mesh: Mesh) -> Known:
    """Return what a row may name in this mesh."""
    zones = _zones(mesh)
    return Known(frozenset(zones), frozenset(zones.values()))


def parse(data: bytes, node: str, names: Known, now: float) -> Row:
    """Return the row that `node` sent, as of `now`. Raise RowError for anything else.

    A cell of a name that is not in the mesh, or in a state that is not known here, is left out: the two agents may
    have different meshes or versions for a while.
    """
    nodes = len(names.nodes)
    if len(data) > most_bytes(nodes):
        raise RowError(f"has {len(data)} bytes")
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RowError("is not JSON") from None
    if not isinstance(found, dict):
        raise RowError("is no object")
    if found.get("node") != node:
        raise RowError("is of another node")
    theirs = _number(found.get("time"), "time", 0.0, 1e11)
    cells: dict[str, Cell] = {}
    for item in _list(found.get("cells"), "cells", nodes + 1):
        cell = _cell(item, names.nodes, now - (theirs or now), now)
        if cell is not None and cell.peer != node and cells.setdefault(cell.peer, cell) is not cell:
            raise RowError("names a peer twice")
    if len(cells) > most_cells(nodes):
        raise RowError("has too many cells")
    digest = found.get("meshDigest")
    return Row(
        node,
        now,
        printable(_text(found.get("headline")), 300),
        printable(_text(found.get("version")), 40),
        digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else "",
        found.get("converged") is True,
        found.get("well") is True,
        _time(found.get("since"), now - (theirs or now), now),
        _parse_counts(found.get("counts"), nodes),
        _parse_zones(found.get("zones"), names.zones, nodes),
        tuple(cells[name] for name in sorted(cells)),
    )


def _no_constant(text: str) -> None:
    raise RowError(f"has {text} for a number")


def _list(value: object, what: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise RowError(f"has {what} that are no list of at most {most}")
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object, what: str, least: float, most: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"has a {what} that is no number")
    if not least <= value <= most:
        raise RowError(f"has a {what} out of range")
    return float(value)


def _whole(value: object, what: str, least: int, most: int) -> int | None:
    number = _number(value, what, least, most)
    if number is not None and number != int(number):
        raise RowError(f"has a {what} that is no whole number")
    return None if number is None else int(number)


def _time(value: object, behind: float, now: float) -> float | None:
    """Return a time on this node's clock; the peer's is `behind` by so many seconds."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
    number = _number(value, "time", 0.0, 1e11)
    return None if number is None else min(number + behind, now)


def _cell(item: object, names: Collection[str], behind: float, now: float) -> Cell | None:
    if not isinstance(item, dict):
        raise RowError("has a cell that is no object")
    peer, state = item.get("peer"), item.get("state")
    if not isinstance(peer, str) or not isinstance(state, str):
        raise RowError("has a cell without a peer or a state")
    if peer not in names or state not in STATES:
        return None
    return Cell(
        peer,
        state,
        _time(item.get("since"), behind, now),
        _number(item.get("roundTrip"), "round trip", 0.0, _LONGEST_TRIP),
        _number(item.get("roundTripP99"), "round trip", 0.0, _LONGEST_TRIP),
        _number(item.get("loss"), "loss", 0.0, 1.0),
        _whole(item.get("pathMtu"), "path MTU", 68, 65535),
    )


def _parse_counts(value: object, nodes: int) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > 2 * len(STATES):
        raise RowError("has no counts")
    found = {str(state): _whole(number, "count", 0, nodes) or 0 for state, number in value.items() if state in STATES}
    if sum(found.values()) > nodes:
        raise RowError("counts more peers than there are")
    return found


def _parse_zones(value: object, zones: Collection[str], nodes: int) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for item in _list(value, "zones", nodes):
        if not isinstance(item, dict) or not isinstance(item.get("zone"), str):
            raise RowError("has a zone without a name")
        pairs, ok, unknown, measured = (
            _whole(item.get(key), key, 0, nodes) or 0 for key in ("pairs", "ok", "unknown", "measured")
        )
        trips = _number(item.get("trips"), "round trip", 0.0, _LONGEST_TRIP * nodes) or 0.0
        slowest = _number(item.get("slowest"), "round trip", 0.0, _LONGEST_TRIP) or 0.0
        if item["zone"] in zones:
            found[item["zone"]] = Tally(pairs, ok, unknown, trips, measured, slowest)
    return found


# All rows together


def matrix(mesh: Mesh, own_digest: str, rows: Mapping[str, Row], last: Mapping[str, Row], now: float) -> dict[str, Any]:
    """Return what /matrix.json holds. `last` has what is known of nodes that are not in `rows`, from earlier."""
    zones = _zones(mesh)
    filled = {node.name: _filled(node.name, rows, zones, now) for node in mesh.nodes}
    nodes = []
    for node in mesh.nodes:
        told = rows.get(node.name) or last.get(node.name)
        agent = "no answer" if node.name not in rows else "ok"
        if agent == "ok" and told and told.mesh_digest != own_digest:
            agent = "outdated"
        about: dict[str, Any] = {"name": node.name, "zone": node.zone, "agent": agent}
        if told:
            about |= {
                "headline": told.headline,
                "version": told.version,
                "meshDigest": told.mesh_digest,
                "converged": told.converged,
                "well": told.well,
                "since": None if told.since is None else timestamp(told.since),
                "time": timestamp(told.time),
            }
        nodes.append({key: value for key, value in about.items() if value is not None and value != ""})
    counts: Counter[str] = Counter()
    between: dict[tuple[str, str], Tally] = {}
    for name, one in filled.items():
        counts.update(one.counts)
        for zone, tally in one.zones.items():
            key = zones[name], zone
            between[key] = between.get(key, Tally()).plus(tally)
    return {
        "time": timestamp(now),
        "nodes": nodes,
        "counts": dict(counts),
        "complete": all(one.complete for one in filled.values()),
        "zones": [
            {"from": key[0], "to": key[1], **tally.to_dict()} for key, tally in sorted(between.items()) if any(key)
        ],
        "rows": [
            {
                "node": name,
                "time": timestamp(one.time),
                "counts": dict(one.counts),
                "cells": [cell.to_dict() for cell in one.cells],
            }
            for name, one in filled.items()
        ],
    }


def _filled(name: str, rows: Mapping[str, Row], zones: Mapping[str, str], now: float) -> Row:
    """Return a node's row with a cell for each peer: its own, else the other end's, else an unknown one."""
    found = rows.get(name)
    if found is not None and not found.complete:
        return found
    own = {cell.peer: cell for cell in found.cells} if found else {}
    cells = [own.get(peer) or _from_other_end(name, peer, rows.get(peer)) for peer in zones if peer != name]
    if len(own) == len(cells) and found:
        return found
    filled = found or Row(name, now)
    return replace(
        filled, counts=_counts(cells), zones=_tallies(cells, zones), cells=_worst(cells, most_cells(len(zones)))
    )


def _from_other_end(name: str, peer: str, other: Row | None) -> Cell:
    for cell in other.cells if other else ():
        if cell.peer == name and cell.state in _MEASURED:
            return replace(cell, peer=peer, from_other_end=True)
    return Cell(peer, UNKNOWN)
