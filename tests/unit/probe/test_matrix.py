"""The rows of the matrix: what a peer may write into its own, and how a row that nobody sends is filled."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.dataplane.report import Peer, Report, Self
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.probe import matrix
from ovsmesh.probe.matrix import Cell, Row, RowError, Tally, known, parse
from tests.support.meshkit import first, mesh_of, node

NOW = 1_800_000_000.0
MESH = first(4)
"""web1 to web4."""
KNOWN = known(MESH)


def sent(**changes: Any) -> dict[str, Any]:
    """What web2 sends."""
    cells = [
        {"peer": "web1", "state": "ok", "since": "2027-01-15T07:00:00Z", "roundTrip": 0.0004, "loss": 0.0},
        {"peer": "web3", "state": "small packets only", "roundTrip": 0.001, "loss": 0.1, "pathMtu": 1362},
    ]
    about = {"node": "web2", "time": NOW, "headline": "web2 is well", "version": "0.1.0", "meshDigest": "0" * 12}
    return about | {"since": NOW - 60, "counts": {"ok": 1}, "zones": [], "cells": cells} | changes


def read(found: Any, name: str = "web2") -> Row:
    return parse(json.dumps(found).encode(), name, KNOWN, NOW)


def test_a_row_comes_through_as_it_was_sent() -> None:
    row = read(sent(converged=True, well=True))
    assert (row.node, row.time, row.headline, row.mesh_digest) == ("web2", NOW, "web2 is well", "0" * 12)
    assert (row.converged, row.well, row.since, dict(row.counts)) == (True, True, NOW - 60, {"ok": 1})
    one, third = row.cells
    assert one == Cell("web1", "ok", NOW - 3600, 0.0004, None, 0.0)
    assert third == Cell("web3", "small packets only", None, 0.001, None, 0.1, 1362)
    assert parse(row.encode(), "web2", KNOWN, NOW) == row


HOSTILE = {
    "of another node": sent(node="web3"),
    "of nobody": {key: value for key, value in sent().items() if key != "node"},
    "no object": [sent()],
    "not a number": sent(time="now"),
    "a truth for a number": sent(cells=[{"peer": "web1", "state": "ok", "loss": True}]),
    "negative": sent(cells=[{"peer": "web1", "state": "ok", "roundTrip": -1}]),
    "endless": sent(cells=[{"peer": "web1", "state": "ok", "roundTrip": 1e300}]),
    "infinite": sent(cells=[{"peer": "web1", "state": "ok", "roundTrip": float("inf")}]),
    "not even a number": sent(cells=[{"peer": "web1", "state": "ok", "loss": float("nan")}]),
    "more than all lost": sent(cells=[{"peer": "web1", "state": "ok", "loss": 1.01}]),
    "no MTU": sent(cells=[{"peer": "web1", "state": "ok", "pathMtu": 70000}]),
    "half a byte": sent(cells=[{"peer": "web1", "state": "ok", "pathMtu": 1400.5}]),
    "a huge number": sent(cells=[{"peer": "web1", "state": "ok", "pathMtu": 10**400}]),
    "twice": sent(cells=[{"peer": "web1", "state": "ok"}, {"peer": "web1", "state": "lossy"}]),
    "a list for a cell": sent(cells=[["web1", "ok"]]),
    "no state": sent(cells=[{"peer": "web1"}]),
    "a state that is a list": sent(cells=[{"peer": "web1", "state": ["ok"]}]),
    "too many cells": sent(cells=[{"peer": f"x{n}", "state": "ok"} for n in range(6)]),
    "cells that are no list": sent(cells={"web1": "ok"}),
    "counts that are no object": sent(counts=[1]),
    "counts of a crowd": sent(counts={"ok": 4, "lossy": 4}),
    "a negative count": sent(counts={"ok": -1}),
    "a zone without a name": sent(zones=[{"pairs": 1}]),
    "large": sent(headline="x" * 60_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_row_of_that_peer_is_refused_whole(what: str) -> None:
    with pytest.raises(RowError):
        read(HOSTILE[what])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[" * 10_000, b"1" * 5000, b"null"])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(RowError):
        parse(data, "web2", KNOWN, NOW)


def test_names_that_are_no_peers_and_states_that_are_none_are_left_out() -> None:
    strange = [
        {"peer": "web9", "state": "ok"},
        {"peer": "web2", "state": "ok"},
        {"peer": "web3", "state": "<b>fine</b>"},
        {"peer": "web4", "state": "ok"},
    ]
    row = read(sent(cells=strange, counts={"ok": 1, "splendid": 3}))
    assert row.cells == (Cell("web4", "ok"),) and row.counts == {"ok": 1}


def test_texts_are_short_and_steer_no_terminal() -> None:
    row = read(sent(headline="\x1b[2Jall is well\n" + "x" * 1000, version="\x07" + "9" * 99, meshDigest="../../etc"))
    assert row.headline.startswith("?[2Jall is well?x") and len(row.headline) == 300
    assert len(row.version) == 40 and row.version[0] == "?" and row.mesh_digest == ""


def test_times_are_on_this_clock_and_never_in_the_future() -> None:
    slow = [{"peer": "web1", "state": "ok", "since": "2027-01-15T07:00:00Z"}]
    row = read(sent(time=NOW - 500, since=NOW - 560, cells=slow))
    assert (row.time, row.since, row.cells[0].since) == (NOW, NOW - 60, NOW - 3100)
    assert read(sent(since=NOW + 9999)).since == NOW


VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "web1",
    "ok",
    [],
    {},
    [[]],
    ["web1"],
]
CELLS = st.dictionaries(st.sampled_from(list(sent()["cells"][1])), st.sampled_from(VALUES))
JSON = st.sampled_from(VALUES) | st.lists(CELLS, max_size=3)


@given(st.dictionaries(st.sampled_from(list(sent())), JSON))
def test_anything_is_a_row_or_refused(changes: dict[str, Any]) -> None:
    try:
        row = read(sent(**changes))
    except RowError:
        return
    assert row.node == "web2" and {cell.peer for cell in row.cells} <= {"web1", "web3", "web4"}
    assert {cell.state for cell in row.cells} <= matrix.STATES
    json.dumps(matrix.matrix(MESH, "", {"web2": row}, {}, NOW), allow_nan=False)


# the own row


def report(name: str, states: dict[str, str], **figures: Any) -> Report:
    peers = tuple(
        Peer(peer, state, reach=Reach(State(state), NOW - 9, **figures) if state in set(State) else None)
        for peer, state in states.items()
    )
    return Report(NOW, f"{name}: well", True, Self(name, agent_since=NOW - 99), (), peers, (), (), ())


def test_the_own_row_has_what_the_report_says_of_each_peer_of_the_mesh() -> None:
    made = report("web1", {"web2": "ok", "web3": "missing", "web8": "held"}, round_trip=0.001, loss=0.0)
    row = matrix.row(made, MESH)
    assert row.cells == (Cell("web2", "ok", NOW - 9, 0.001, None, 0.0), Cell("web3", "missing"))
    assert row.counts == {"ok": 1, "missing": 1} and row.complete


def test_a_large_mesh_sends_the_worst_of_a_row_and_counts_all() -> None:
    zones = {n: "a" if n % 2 else "b" for n in range(1000)}
    mesh = mesh_of(*(node(f"n{n:03}", f"192.0.{n // 250}.{n % 250}", f"10.{n // 250}.{n % 250}.0/24", zone=zones[n])
                     for n in range(1000)))  # fmt: skip
    states = {f"n{n:03}": "ok" for n in range(1, 1000)} | {"n500": "unreachable", "n600": "lossy"}
    row = matrix.row(report("n000", states, round_trip=0.002), mesh).worst(1000)
    assert len(row.cells) == 20 and not row.complete
    assert [c.peer for c in row.cells if c.state != "ok"] == ["n500", "n600"]
    assert row.counts == {"ok": 997, "unreachable": 1, "lossy": 1}
    assert (row.zones["a"].pairs, row.zones["b"].pairs) == (500, 499)
    data = row.encode()
    assert len(data) < matrix.most_bytes(1000) and parse(data, "n000", known(mesh), NOW).counts == row.counts


# all rows


def rows(**states: dict[str, Cell]) -> dict[str, Row]:
    """Rows of these nodes; a node's other peers are well."""
    found = {}
    for name, special in states.items():
        cells = [special.get(n.name) or Cell(n.name, "ok", NOW, 0.001) for n in MESH.nodes if n.name != name]
        counts = dict(Counter(cell.state for cell in cells))
        found[name] = Row(name, NOW, mesh_digest="d", counts=counts, cells=tuple(cells))
    return found


def cells(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["node"], cell["peer"]): cell for row in found["rows"] for cell in row["cells"]}


def test_every_direction_has_a_cell() -> None:
    found = matrix.matrix(MESH, "d", rows(web1={}, web2={}, web3={}, web4={}), {}, NOW)
    names = [n.name for n in MESH.nodes]
    assert cells(found).keys() == {(a, b) for a in names for b in names if a != b}
    assert found["counts"] == {"ok": 12} and found["complete"]
    assert [(n["name"], n["agent"]) for n in found["nodes"]] == [(name, "ok") for name in names]


def test_a_silent_agents_row_is_filled_from_the_other_ends() -> None:
    lossy = Cell("web3", "lossy", NOW - 5, 0.04, 0.05, 0.25, None)
    told = rows(web1={"web3": lossy}, web2={"web3": Cell("web3", "unreachable", NOW)}, web4={})
    last = {"web3": Row("web3", NOW - 77, "web3 was well", mesh_digest="d")}
    found = matrix.matrix(MESH, "d", told, last, NOW)
    by = cells(found)
    assert by["web3", "web1"] == {
        "peer": "web1",
        "state": "lossy",
        "since": "2027-01-15T07:59:55Z",
        "roundTrip": 0.04,
        "roundTripP99": 0.05,
        "loss": 0.25,
        "fromOtherEnd": True,
    }
    assert (by["web3", "web2"]["state"], by["web3", "web4"]["state"]) == ("unreachable", "ok")
    assert not any("fromOtherEnd" in cell for (node, _), cell in by.items() if node != "web3")
    third = found["nodes"][2]
    assert (third["agent"], third["headline"], third["time"]) == ("no answer", "web3 was well", "2027-01-15T07:58:43Z")
    assert found["counts"] == {"ok": 8, "lossy": 2, "unreachable": 2}


def test_what_nobody_measured_is_unknown() -> None:
    found = matrix.matrix(MESH, "d", rows(web1={"web3": Cell("web3", "not probed yet")}, web2={}), {}, NOW)
    by = cells(found)
    for pair in (("web3", "web4"), ("web4", "web3"), ("web3", "web1")):
        assert by[pair] == {"peer": pair[1], "state": "unknown"}
    # the wiring of one end says nothing of the other
    assert by["web1", "web3"]["state"] == "not probed yet"
    found = matrix.matrix(MESH, "d", rows(web1={"web3": Cell("web3", "missing")}), {}, NOW)
    assert cells(found)["web3", "web1"]["state"] == "unknown"


def test_a_peer_is_believed_of_its_own_row_only() -> None:
    liar = {"web1": Cell("web1", "unreachable"), "web3": Cell("web3", "unreachable")}
    by = cells(matrix.matrix(MESH, "d", rows(web1={}, web2=liar, web3={}, web4={}), {}, NOW))
    assert {pair for pair, cell in by.items() if cell["state"] != "ok"} == {("web2", "web1"), ("web2", "web3")}


def test_an_agent_with_another_mesh_is_outdated() -> None:
    told = rows(web1={}, web2={}, web3={}, web4={})
    found = matrix.matrix(MESH, "e", told, {}, NOW)
    assert {n["agent"] for n in found["nodes"]} == {"outdated"}


def test_zones_are_summed_up_in_each_direction() -> None:
    mesh = mesh_of(*(node(f"n{n}", f"192.0.2.{n}", f"10.97.{n}.0/24", zone="ab"[n > 2]) for n in (1, 2, 3)))
    made = {
        name: matrix.row(report(name, {p: "ok" for p in ("n1", "n2", "n3") if p != name}, round_trip=0.002), mesh)
        for name in ("n1", "n2")
    }
    zones = {(z["from"], z["to"]): z for z in matrix.matrix(mesh, "", made, {}, NOW)["zones"]}
    assert zones["a", "b"] == {
        "from": "a",
        "to": "b",
        "pairs": 2,
        "ok": 2,
        "unknown": 0,
        "roundTrip": 0.002,
        "slowest": 0.002,
        "measured": 2,
    }
    assert zones["b", "a"]["ok"] == 2 and zones["a", "a"]["pairs"] == 2
    assert Tally(1, 1, 0, 0.5, 1, 0.5).plus(Tally(1, 0, 1)).to_dict()["roundTrip"] == 0.5
