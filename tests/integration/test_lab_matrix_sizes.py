"""The matrix of every kind of tunnel, and of the largest lab."""

from __future__ import annotations

from typing import Any

import pytest

from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make
from tests.support.matrixkit import all_ok, cells, matrix, pairs

pytestmark = pytest.mark.lab


@pytest.mark.parametrize(
    "options",
    [{"encapsulation": "vxlan", "key": 7}, {"encapsulation": "geneve"}, {"underlay6": True}, {"key": 9}],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_rows_go_through_every_kind_of_tunnel(lab: Make, options: dict[str, Any]) -> None:
    all_ok(lab(2, 1, **options))


def test_twenty_hosts_with_a_dead_agent_have_every_cell(lab: Make) -> None:
    twenty = lab(20, 1)
    dead = twenty.host(7)

    def filled(index: int) -> bool:
        found = cells(twenty.host(index))
        assert set(found) == pairs(twenty)
        return all(cell["state"] == "ok" and cell["roundTrip"] > 0 for cell in found.values())

    wait_for("every cell", lambda: filled(1), 3 * SOON, every=1.0)
    dead.stop_agent()
    for host in twenty.hosts:
        wait_for(f"every cell from {host.name}", lambda n=host.index: filled(n), SOON, every=1.0)  # type: ignore[misc]
    code, found = matrix(twenty.host(1))
    other = {row["node"] for row in found["rows"] for cell in row["cells"] if "fromOtherEnd" in cell}
    assert (code, other, found["counts"]) == (2, {"h7"}, {"ok": 380})
    text = twenty.host(1).ovsmesh("matrix").stdout
    assert text.startswith("20 nodes: all 380 directions ok") and max(map(len, text.splitlines())) <= 80, text
