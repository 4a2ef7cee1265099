"""`ovsmesh matrix`: every pair from any host, a dead agent's row too; nobody but a peer's agent is told anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovsmesh.lab.faults import delay, fault, tunnel
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, guarded
from tests.support.matrixkit import all_ok, cells, matrix, pairs, states

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def five(module_lab: Make) -> Lab:
    return module_lab(5, 1, dual_stack=True)


@pytest.fixture
def mesh(five: Lab) -> Iterator[Lab]:
    yield from guarded(five, thorough=False)


def test_every_pair_is_told_from_every_host(mesh: Lab) -> None:
    all_ok(mesh)
    for host in mesh.hosts:
        code, found = matrix(host)
        assert code == 0 and found["counts"] == {"ok": 20} and found["complete"]
        assert {node["agent"] for node in found["nodes"]} == {"ok"}
        every = [cell for row in found["rows"] for cell in row["cells"]]
        assert all(cell["roundTrip"] > 0 and "fromOtherEnd" not in cell for cell in every)
    done = mesh.host(1).ovsmesh("matrix")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("5 nodes: all 20 directions ok; slowest ")
    assert lines[2].split() == ["from", "\\", "to", *(host.name for host in mesh.hosts)]
    assert max(map(len, lines)) <= 80 and len(lines) == 9
    listed = mesh.host(1).ovsmesh("matrix", "--worst", "3").stdout.splitlines()
    assert listed[2].split()[:3] == ["FROM", "TO", "STATE"] and len(listed) == 7


def test_a_cut_shows_in_both_cells_from_a_third_host(mesh: Lab) -> None:
    all_ok(mesh)
    one, _, third = mesh.hosts[:3]
    with fault(mesh, f"{tunnel(one, third)} drop", f"{tunnel(third, one)} drop"):
        bad = {(one.name, third.name), (third.name, one.name)}
        wanted = {pair: "unreachable" if pair in bad else "ok" for pair in pairs(mesh)}
        for index in (2, 1):
            wait_for("both directions and no other", lambda n=index: states(mesh.host(n)) == wanted, SOON)  # type: ignore[misc]
        done = mesh.host(2).ovsmesh("matrix")
        assert done.returncode == 2
        assert done.stdout.startswith("5 nodes: 2 of 20 directions not ok: 2 unreachable"), done.stdout
        assert "X unreachable" in done.stdout
    all_ok(mesh)


def test_a_dead_agents_row_is_filled_from_the_other_ends(mesh: Lab) -> None:
    all_ok(mesh)
    third = mesh.host(3)
    third.stop_agent()
    try:
        for index in (1, 5):
            # an agent asks its peers again after three seconds
            wait_for("the agent to be dead", lambda n=index: matrix(mesh.host(n))[0] == 2, SOON)  # type: ignore[misc]
            code, found = matrix(mesh.host(index))
            by = {(row["node"], cell["peer"]): cell for row in found["rows"] for cell in row["cells"]}
            assert code == 2 and set(by) == pairs(mesh)
            assert {cell["state"] for cell in by.values()} == {"ok"}
            assert {pair[0] for pair, cell in by.items() if "fromOtherEnd" in cell} == {"h3"}
            assert {node["name"]: node["agent"] for node in found["nodes"]}["h3"] == "no answer"
        text = mesh.host(1).ovsmesh("matrix").stdout
        assert "! no answer from the agent of h3: the row is filled from the other ends (*)" in text
        # the host itself has no agent to ask, and asks the others
        assert states(third) == dict.fromkeys(pairs(mesh), "ok")
    finally:
        third.start_agent()
    all_ok(mesh)


def test_a_slow_underlay_shows_in_both_directions(mesh: Lab) -> None:
    all_ok(mesh)
    one, third = mesh.host(1), mesh.host(3)
    with delay(mesh, third, 0.04):

        def slow() -> bool:
            found = {pair: cell.get("roundTrip", 0.0) for pair, cell in cells(one).items()}
            return all((trip > 0.036) == ("h3" in pair) for pair, trip in found.items())

        wait_for("40 ms more to and from h3, and nowhere else", slow, SOON)
    all_ok(mesh)
