"""The whole, as `kubectl apply -k manifests` makes it: API server, controller, agents, Open vSwitch, pods that ping."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ovsmesh.lab.lab import Lab
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import APISERVER, ETCD, ControlPlane
from tests.support.kubekit import eventually

pytestmark = [pytest.mark.lab, pytest.mark.kube]


@pytest.fixture
def three(lab: Callable[..., Lab], own_plane: Callable[..., ControlPlane]) -> Iterator[ClusterLab]:
    made = lab(3, 1, agents=False)
    with ClusterLab(made, own_plane(address="192.0.2.1", ns=made.hub)) as cluster:
        yield cluster
        print(cluster.logs())


def lost(three: ClusterLab) -> list[str]:
    return [f"{track.pair.source} → {track.pair.target}" for track in three.lab.ping_matrix() if track.lost]


def test_nodes_become_a_mesh_and_it_outlives_the_api(three: ClusterLab) -> None:
    """Nobody makes a Mesh: the controller does, out of the Nodes' podCIDRs."""
    hosts = three.lab.hosts
    for host in hosts:
        three.add_node(host)
    three.start_controller()
    for host in hosts:
        three.start_agent(host)
    eventually(lambda: three.converged() == {host.name: 2 for host in hosts})
    three.plug()
    assert lost(three) == []

    def ready() -> list[str]:
        path = "jsonpath={.items[*].status.conditions[?(@.type=='ovsmesh.io/MeshReady')].status}"
        return three.plane.kubectl("get", "nodes", "-o", path).split()

    eventually(lambda: ready() == ["True"] * 3)

    # Before the outage: an API server that has just started forbids all until it has read its roles.
    for name in ("controller1", *(host.name for host in hosts)):
        assert "forbidden" not in three.log(name).lower()

    three.plane.kill(APISERVER, ETCD)
    three.end(hosts[0].name)
    assert lost(three) == []
    three.plane.start()
    three.start_agent(hosts[0])
    assert lost(three) == []
    eventually(lambda: three.converged() == {host.name: 2 for host in hosts})
