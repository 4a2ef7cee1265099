"""Outages are read from which packets were answered."""

from __future__ import annotations

from tests.support.labpackets import track


def test_outages_are_the_runs_of_lost_packets() -> None:
    found = track(10, {0: 0.1, 3: 3.1, 4: 4.1, 6: 6.1}).outages()
    assert [(o.start, o.end, o.lost, o.over) for o in found] == [
        (1, 3, 2, True),
        (5, 6, 1, True),
        (7, 9, 3, False),
    ]
    assert track(3, {0: 0.0, 1: 1.0, 2: 2.0}).outages() == []
