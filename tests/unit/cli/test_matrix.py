"""What `ovsmesh matrix` shows of a matrix, and its exit status."""

from __future__ import annotations

from typing import Any

import pytest

from ovsmesh.agent.options import Options
from ovsmesh.cli import inspect
from ovsmesh.cli import matrix as module
from ovsmesh.cli.matrix import exit_code, render
from ovsmesh.errors import OvsmeshError
from ovsmesh.probe import matrix
from ovsmesh.probe.exchange import Exchange
from ovsmesh.probe.matrix import Cell, Row
from tests.support.meshkit import first, mesh_of, node

NOW = 1_800_000_000.0


def row(name: str, *cells: Cell) -> Row:
    counts = {state: sum(cell.state == state for cell in cells) for state in {cell.state for cell in cells}}
    return Row(name, NOW, mesh_digest="d", counts=counts, cells=cells)


def ok(peer: str, trip: float = 0.0004) -> Cell:
    return Cell(peer, "ok", NOW - 60, trip, trip * 2, 0.0)


def made(*rows: Row, nodes: int = 3) -> dict[str, Any]:
    return matrix.matrix(first(nodes), "d", {one.node: one for one in rows}, {}, NOW)


WELL = made(row("web1", ok("web2"), ok("web3")), row("web2", ok("web1"), ok("web3", 0.0404)),
            row("web3", ok("web1"), ok("web2")))  # fmt: skip
BAD = made(
    row("web1", Cell("web2", "small packets only", NOW - 5, 0.001, 0.002, 0.5, 1362), Cell("web3", "unreachable", NOW)),
    row("web2", Cell("web1", "lossy", NOW - 65, 0.002, 0.003, 0.25), Cell("web3", "not probed yet")),
)
"""The agent of web3 is silent."""


def test_all_is_well_in_a_table() -> None:
    assert render(WELL).splitlines() == [
        "3 nodes: all 6 directions ok; slowest 40.4 ms, web2 → web3",
        "",
        "from \\ to  web1  web2  web3",
        "web1          -  0.40  0.40",
        "web2       0.40     -  40.4",
        "web3       0.40  0.40     -",
        "round trip in ms",
    ]
    assert exit_code(WELL) == 0


def test_each_state_has_a_mark_and_a_word() -> None:
    assert render(BAD).splitlines() == [
        "3 nodes: 6 of 6 directions not ok: 2 unreachable, 1 small packets only, 1 lossy, 1 unknown, 1 not probed yet; "
        "slowest 2.0 ms, web2 → web1",
        "! no answer from the agent of web3: the row is filled from the other ends (*)",
        "",
        "from \\ to  web1   web2  web3",
        "web1          -  ≤1362     X",
        "web2        25%      -     ·",
        "web3         X*      ?     -",
        "round trip in ms; ≤N only packets of up to N bytes; X unreachable; N% lost; · not probed yet; "
        "* measured by the other end; ? unknown: nobody has measured it",
    ]
    assert exit_code(BAD) == 2


def test_the_worst_directions_are_a_list() -> None:
    assert render(BAD, 3).splitlines()[3:] == [
        "FROM  TO    STATE               SINCE  RTT ms  P99 ms  LOSS  MTU",
        "web1  web3  unreachable         0s     -       -       -     -",
        "web3  web1  unreachable*        0s     -       -       -     -",
        "web1  web2  small packets only  5s     1.0     2.0     50%   1362",
        "* measured by the other end",
        "the worst 3 of 6; --worst N shows more, -o json what was collected",
    ]


def test_a_dead_agent_alone_is_not_well() -> None:
    found = made(row("web1", ok("web2")), nodes=2)
    assert found["counts"] == {"ok": 2} and exit_code(found) == 2


def test_many_nodes_are_a_list_and_zones_a_summary() -> None:
    nodes = [node(f"node-{n:02}", f"192.0.2.{n}", f"10.97.{n}.0/24", zone="ab"[n % 2]) for n in range(1, 31)]
    mesh = mesh_of(*nodes)
    names = [one.name for one in nodes]
    zones = {one.name: one.zone for one in nodes}
    rows = {}
    for name in names:
        cells = [ok(peer, 0.012 if zones[peer] != zones[name] else 0.001) for peer in names if peer != name]
        rows[name] = row(name, *cells)
        tallies = {zone: matrix.Tally() for zone in "ab"}
        for cell in cells:
            trip = cell.round_trip or 0.0
            tallies[zones[cell.peer]] = tallies[zones[cell.peer]].plus(matrix.Tally(1, 1, 0, trip, 1, trip))
        rows[name] = Row(name, NOW, mesh_digest="d", counts={"ok": 29}, zones=tallies, cells=tuple(cells))
    lines = render(matrix.matrix(mesh, "d", rows, {}, NOW)).splitlines()
    assert lines[0].startswith("30 nodes: all 870 directions ok") and max(map(len, lines)) <= 80
    assert lines[2].startswith("FROM") and lines[23].startswith("the worst 20 of 870")
    assert lines[25:28] == [
        "FROM ZONE  TO ZONE  OK       UNKNOWN  RTT ms  SLOWEST ms",
        "a          b        225/225  -        12.0    12.0",
        "b          a        225/225  -        12.0    12.0",
    ]


@pytest.mark.parametrize("tree", [{}, {"rows": []}, {**WELL, "nodes": [{"name": 1}]}, {**WELL, "counts": 7}])
def test_what_is_no_matrix_counts_as_no_answer(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "get", lambda *_: inspect._Answer("ok", tree))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(OvsmeshError, match=r"does not answer on .*as root"):
        module.matrix(Options(node="web1", state_dir="/nonexistent"))


def test_an_agent_without_a_mesh_listens_nowhere_and_has_no_matrix() -> None:
    exchange = Exchange("web1")
    try:
        assert exchange.matrix() is None
        exchange.update(None, None, lambda: pytest.fail("nothing to report"))
        assert exchange.matrix() is None
    finally:
        exchange.close()
