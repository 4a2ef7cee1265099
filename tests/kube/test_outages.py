"""Pods send all the time while the control plane dies, stalls and lies: nothing is lost, nobody leaves the slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import ControlPlane
from tests.support.fault_proxy import FAULTS
from tests.support.kubekit import eventually
from tests.support.outagekit import Storm, storm

pytestmark = [pytest.mark.lab, pytest.mark.kube]


@pytest.fixture(scope="module")
def three(module_lab: Callable[..., Lab], programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    made = module_lab(3, 1, agents=False)
    folder = tmp_path_factory.mktemp("kube")
    with (
        ControlPlane(folder, address="192.0.2.1", ns=made.hub) as plane,
        ClusterLab(made, plane) as cluster,
        storm(cluster) as ready,
    ):
        yield ready
        print(cluster.logs())


def lost(three: Storm) -> list[str]:
    return [f"{track.pair.source} → {track.pair.target}" for track in three.lab.ping_matrix() if track.lost]


def test_a_node_s_address_changes_and_nobody_is_restarted(three: Storm) -> None:
    one, other, moved = three.lab.hosts
    device = "br-phy" if three.lab.settings.datapath == "netdev" else "eth0"
    netns.ip_batch([f"addr add 192.0.2.113/24 dev {device}"], moved.ns)
    pids = [three.cluster.pid(host.name) for host in three.lab.hosts]
    for address in ("192.0.2.113", str(moved.address)):
        three.cluster.set_address(moved, address)

        def all_to(address: str = address) -> bool:
            look = ("--columns=options", "find", "interface", f"name=gre-{moved.name}")
            return all(f'"{address}"' in host.ovs_vsctl(*look) for host in (one, other))

        eventually(all_to)
        eventually(lambda: lost(three) == [])
    eventually(three.converged)
    assert pids == [three.cluster.pid(host.name) for host in three.lab.hosts]


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


def test_a_node_leaves_and_comes_back_under_its_running_agent(three: Storm) -> None:
    """What its MeshNode says then is test_by_hand's."""
    *stay, gone = three.lab.hosts
    three.cluster.remove_node(gone)
    eventually(lambda: not any(str(gone.pod_cidrs[0]) in three.routes(host) for host in stay))
    three.cluster.add_node(gone)
    # the old token went with the old Node's pod
    three.new_token(gone)
    eventually(lambda: all(str(gone.pod_cidrs[0]) in three.routes(host) for host in stay))
    eventually(lambda: lost(three) == [])
