"""Probes of both IP families, through every encapsulation, over IPv4 and IPv6: answered, cut, and cut to small ones."""

from __future__ import annotations

from typing import Any

import pytest

from ovsmesh.lab.faults import cut, fault, limit
from ovsmesh.lab.host import Host
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, drift, live

pytestmark = pytest.mark.lab

NAMES = {"gre": "GRE (IP protocol 47)", "vxlan": "VXLAN (UDP port 4789)", "geneve": "Geneve (UDP port 6081)"}
OVERHEAD = {"gre": 38, "vxlan": 50, "geneve": 50}


def peer(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(live(host).get("peers", ())), {})
    return found


def came_back(host: Host) -> list[int]:
    """How many probes the peer forwarded back, in each IP family."""
    found = [line for line in host.ovs_ofctl("dump-flows", "obr0").splitlines() if "mod_dl_dst" in line]
    return [int(line.partition("n_packets=")[2].partition(",")[0]) for line in found]


@pytest.mark.parametrize("underlay6", [False, True], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("encapsulation", NAMES)
def test_both_families_are_probed_through_every_encapsulation(lab: Make, encapsulation: str, underlay6: bool) -> None:
    made = lab(2, 0, dual_stack=True, encapsulation=encapsulation, underlay6=underlay6)
    one, second = made.hosts

    def state() -> str:
        return str(peer(one).get("state"))

    wait_for("h2 to be ok", lambda: state() == "ok", SOON)
    wait_for("probes of both families", lambda: len(came_back(one)) == 2 and min(came_back(one)) > 2, SOON)
    with fault(made, *cut(one, second)):
        wait_for("h2 to be unreachable", lambda: state() == "unreachable", SOON)
        assert NAMES[encapsulation] in peer(one)["missing"][0]
        assert str(second.address) in peer(one)["missing"][0]
    wait_for("h2 to be ok again", lambda: state() == "ok", SOON)
    with fault(made, *limit(one, second, 1400)):
        wait_for("h2 to get small packets only", lambda: state() == "small packets only", SOON)
        assert peer(one)["reach"]["pathMtu"] == 1400 - OVERHEAD[encapsulation] - (20 if underlay6 else 0)
    wait_for("h2 to be ok at last", lambda: state() == "ok", SOON)
    assert not any(drift(one).values())
