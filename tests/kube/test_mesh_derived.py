"""One `kubectl apply -k` is enough: the Mesh that the controller makes, and when it keeps its hands off."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.controllerkit import Cluster, Process, cluster_of, mesh, node
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP, MANIFESTS, eventually

pytestmark = pytest.mark.kube

MESH = f"{GROUP}/meshes/default"
NOTE = "ovsmesh.io/derived-cluster-cidrs"


def cidrs(kube: Cluster) -> list[str]:
    found: list[str] = kube.api.get(MESH)["spec"]["clusterCIDRs"]
    return found


def has_mesh(kube: Cluster) -> bool:
    return kube.plane.call("GET", MESH).status == 200


def add(kube: Cluster, *numbers: int) -> None:
    for number in numbers:
        kube.add(node(f"web{number}", f"192.0.2.{number + 1}", f"10.97.{number}.0/24", f"fd00:97:0:{number:x}::/64"))


def test_apply_k_alone_makes_a_mesh_and_delete_k_ends_it(own_plane: Callable[..., ControlPlane]) -> None:
    """As a newcomer does it, with kube-controller-manager giving the ranges, and with Nodes that come one by one."""
    plane = own_plane(pod_cidrs="10.97.0.0/16")
    plane.kubectl("apply", "-k", str(MANIFESTS))
    with cluster_of(plane) as kube:
        controller = kube.controller()
        for number in range(1, 6):
            kube.add(node(f"web{number}", f"192.0.2.{number}"))
        kube.until_members(*(f"web{number}" for number in range(1, 6)))
        # Five ranges of /24, the first five of the cluster's or nearly so.
        assert cidrs(kube) in (["10.97.0.0/21"], ["10.97.0.0/20"])
        assert kube.whole()
        refused = {f"web{number}": kube.events(f"web{number}") & {"PodCIDROutside"} for number in range(1, 6)}
        assert not any(refused.values()), refused
        assert "MeshDerived" in kube.events("default")
        plane.kubectl("delete", "-k", str(MANIFESTS), "--timeout=120s")
        assert plane.call("GET", f"{GROUP}/meshes").status == 404
        assert controller.process.poll() is None
        controller.end()


def test_it_is_widened_as_nodes_come_and_settings_stay(kube: Cluster, controller: Process) -> None:
    add(kube, 0)
    kube.until_members("web0")
    assert cidrs(kube) == ["10.97.0.0/24", "fd00:97::/64"]
    uid = kube.api.get(MESH)["metadata"]["uid"]
    # What else someone sets stays theirs.
    kube.api.patch(MESH, {"spec": {"mtu": 1400, "key": 7}})
    add(kube, 1, 2)
    kube.until_members("web0", "web1", "web2")
    found = kube.api.get(MESH)
    assert (found["metadata"]["uid"], found["spec"]["mtu"], found["spec"]["key"]) == (uid, 1400, 7)
    assert cidrs(kube) == ["10.97.0.0/22", "fd00:97::/62"]
    assert not any("PodCIDROutside" in kube.events(f"web{number}") for number in range(3))
    # Nothing is narrowed when Nodes leave, and what can't be of the same range is refused.
    kube.remove("web2")
    kube.add(node("far", "192.0.2.99", "172.16.0.0/24"))
    kube.until_members("web0", "web1")
    eventually(lambda: kube.conditions("far").get("ovsmesh.io/MeshReady") == ("False", "PodCIDROutside"))
    assert cidrs(kube) == ["10.97.0.0/22", "fd00:97::/62"]


def test_whoever_edits_cluster_cidrs_owns_them(kube: Cluster, controller: Process) -> None:
    add(kube, 0)
    kube.until_members("web0")
    mine = kube.plane.folder / "mine.yaml"
    mine.write_text((MANIFESTS / "mesh.yaml").read_text().replace("10.244.0.0/16", "10.97.0.0/23, 'fd00:97::/63'"))
    kube.plane.kubectl("apply", "-f", str(mine))
    add(kube, 1, 2)
    kube.until_members("web0", "web1")
    eventually(lambda: kube.conditions("web2").get("ovsmesh.io/MeshReady") == ("False", "PodCIDROutside"))
    assert cidrs(kube) == ["10.97.0.0/23", "fd00:97::/63"]


def test_a_mesh_of_ones_own_is_never_touched(kube: Cluster) -> None:
    kube.add(mesh("10.97.0.0/24", "fd00:97::/64"))
    add(kube, 0, 1)
    controller = kube.controller()
    eventually(controller.leads)
    kube.until_members("web0")
    eventually(lambda: "PodCIDROutside" in kube.events("web1"))
    assert cidrs(kube) == ["10.97.0.0/24", "fd00:97::/64"]
    assert NOTE not in kube.api.get(MESH)["metadata"].get("annotations", {})


def test_where_none_can_be_made_it_is_said_and_one_that_is_deleted_is_not_replaced(
    kube: Cluster, controller: Process
) -> None:
    """A Mesh that is gone may have said more than can be derived; what was joined by it stays joined."""
    kube.add(node("web0", "192.0.2.1"))
    eventually(lambda: "MeshMissing" in kube.events("default"))
    assert not has_mesh(kube)
    kube.api.patch("/api/v1/nodes/web0", {"spec": {"podCIDR": "10.97.0.0/24", "podCIDRs": ["10.97.0.0/24"]}})
    kube.until_members("web0")
    kube.api.delete(MESH)
    add(kube, 1)

    def told() -> bool:
        found = kube.items("/api/v1/namespaces/default/events")
        return any("are in use and stay" in event["message"] for event in found)

    eventually(told)
    assert not has_mesh(kube)
    assert list(kube.members()) == ["web0"]
    kube.add(mesh("10.97.0.0/16", "fd00:97::/48"))
    kube.until_members("web0", "web1")
