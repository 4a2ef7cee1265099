"""Faults that take some packets, or time: losses, a longer way, a dead switch. The others are in test_lab_check."""

from __future__ import annotations

from typing import Any

import pytest

from ovsmesh.lab.faults import delay, fault, lose
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, live

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def two(module_lab: Make) -> Lab:
    return module_lab(2, 0)


def peer(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(live(host).get("peers", ())), {})
    return found


def until(host: Host, state: str) -> None:
    wait_for(f"{state} at {host.name}", lambda: peer(host).get("state") == state, SOON)


def test_losses_are_told_as_losses_and_their_end_too(two: Lab) -> None:
    one, second = two.hosts
    until(one, "ok")
    with fault(two, lose(one, second, 30)):
        until(one, "lossy")
        assert "% of the probes are lost" in peer(one)["missing"][0]
    until(one, "ok")


def test_a_longer_way_shows_in_the_round_trip(two: Lab) -> None:
    one, second = two.hosts
    until(one, "ok")
    with delay(two, second, 0.3):
        wait_for("the round trip to grow", lambda: peer(one).get("reach", {}).get("roundTrip", 0) > 0.25, SOON)


def test_a_dead_switch_of_a_peer_is_told_and_its_return_too(two: Lab) -> None:
    one, second = two.hosts
    until(one, "ok")
    second.kill_vswitchd()
    try:
        until(one, "unreachable")
    finally:
        second.start_vswitchd()
    until(one, "ok")
