"""One peer that the switch or the kernel does not take: named, and nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from ovsmesh.lab.lab import Lab
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import eventually

pytestmark = [pytest.mark.lab, pytest.mark.kube]


@pytest.fixture
def one(lab: Callable[..., Lab], own_plane: Callable[..., ControlPlane]) -> Iterator[ClusterLab]:
    made = lab(1, 0, agents=False)
    with ClusterLab(made, own_plane(address="192.0.2.1", ns=made.hub)) as cluster:
        cluster.mesh()
        cluster.add_node(made.hosts[0])
        cluster.start_controller()
        cluster.start_agent(made.hosts[0])
        eventually(lambda: made.hosts[0].ready())
        yield cluster
        print(cluster.logs())


def add(cluster: ClusterLab, number: int) -> str:
    """A Node without a host; its range."""
    cidr = f"10.97.{100 + number}.0/24"
    node = {"kind": "Node", "metadata": {"name": f"x{number}"}, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}
    node["status"] = {"addresses": [{"type": "InternalIP", "address": f"198.51.100.{number}"}]}
    assert cluster.plane.call("POST", "/api/v1/nodes", node).status == 201
    return cidr


def test_no_peer_s_error_delays_another(one: ClusterLab) -> None:
    host = one.lab.hosts[0]
    # someone's own port to that address: the switch makes no second one like it
    ends = ("options:remote_ip=198.51.100.1", f"options:local_ip={host.address}")
    kind = f"datapath_type={one.lab.settings.datapath}"
    host.ovs_vsctl("add-br", "other", "--", "set", "bridge", "other", kind)
    host.ovs_vsctl("add-port", "other", "gre-other", "--", "set", "interface", "gre-other", "type=gre", *ends)
    # and someone's own route to that range, with the mesh's metric
    host.run(["ip", "route", "add", "blackhole", "10.97.102.0/24", "metric", "111"])

    def routes() -> str:
        return host.run(["ip", "route", "show", "proto", "111", "dev", "kbr0"]).stdout

    def error() -> str:
        return host.ovs_vsctl("--if-exists", "get", "interface", "gre-x1", "error").strip()

    add(one, 1)
    in_the_way = add(one, 2)
    eventually(lambda: error() not in ("", "[]"))
    times = []
    for number in range(3, 13):
        began = time.monotonic()
        cidr = add(one, number)
        eventually(lambda cidr=cidr: cidr in routes(), 10, 0.005)  # type: ignore[misc]
        eventually(lambda number=number: f"gre-x{number}" in host.ovs_vsctl("list-ports", "obr0"), 10)  # type: ignore[misc]
        times.append(time.monotonic() - began)
    print(
        f"a Node made, to route and port, two others refused: median {sorted(times)[5]:.3f} s, {max(times):.3f} worst"
    )
    assert error() not in ("", "[]")
    assert in_the_way not in routes()
    said = one.log(host.name)
    assert "gre-x1" in said and f"route {in_the_way}" in said

    host.ovs_vsctl("del-br", "other")
    host.run(["ip", "route", "del", "blackhole", "10.97.102.0/24", "metric", "111"])
    eventually(lambda: error() == "[]" and in_the_way in routes())
    eventually(host.ready)
