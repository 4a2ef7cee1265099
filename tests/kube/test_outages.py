"""Pods send all the time while the control plane dies, stalls and lies: nothing is lost, nobody leaves the slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from clusterlab import ClusterLab
from controlplane import ControlPlane
from meddler import FAULTS
from outagekit import Storm, storm

from ovsmesh.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.kube, pytest.mark.timeout(240)]


@pytest.fixture
def three(lab: Callable[..., Lab], own_plane: Callable[..., ControlPlane]) -> Iterator[Storm]:
    made = lab(3, 1, agents=False)
    with ClusterLab(made, own_plane(address="192.0.2.1", ns=made.hub)) as cluster:
        try:
            with storm(cluster) as ready:
                yield ready
        finally:
            print(cluster.logs())


def test_forwarding_outlives_whatever_happens_to_the_control_plane(three: Storm) -> None:
    """The bench kube-outages does the same, each way alone and for longer."""

    def leader_killed_and_api_down() -> None:
        three.kill_leader()
        three.api_down(10)
        three.controller()

    ways: dict[str, Callable[[], None]] = {
        "tokens rotate": three.tokens_rotate,
        **{f"watches: {fault}": lambda fault=fault: three.watch_fault(fault) for fault in FAULTS},  # type: ignore[misc]
        "etcd restarted": lambda: three.etcd_restarted(2),
        "the leader and the API server die, and an agent meanwhile": leader_killed_and_api_down,
    }
    for name, way in ways.items():
        found = three.run(name, way)
        print(found)
        assert not found.lost, f"{name}: {found.silent}"
        assert found.least >= len(three.lab.hosts), f"{name}: a slice had {found.least} members"
