"""The controller against a real API server, with its own service account: members, refusals, conditions, repair."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.support.controllerkit import NODES, STRATEGIC, TAINT, Cluster, Process, mesh, node, numbered
from tests.support.kubekit import GROUP, eventually

pytestmark = pytest.mark.kube


def three(kube: Cluster) -> None:
    kube.add(mesh())
    for number in (1, 2, 3):
        kube.add(node(f"web{number}", f"192.0.2.{number}", f"10.97.{number}.0/24", taint=True))
    kube.until_members("web1", "web2", "web3")


def test_members_come_change_and_leave(kube: Cluster, controller: Process) -> None:
    three(kube)
    web1 = kube.node("web1")
    entry = {"name": "web1", "uid": web1["metadata"]["uid"], "address": "192.0.2.1", "podCIDRs": ["10.97.1.0/24"]}
    assert kube.members()["web1"] == entry
    assert kube.whole()
    kube.readdress("web1", "192.0.2.101")
    eventually(lambda: kube.members()["web1"]["address"] == "192.0.2.101")
    kube.change("web1", {"metadata": {"annotations": {"ovsmesh.io/tunnel-address": "198.51.100.1"}}})
    eventually(lambda: kube.members()["web1"]["address"] == "198.51.100.1")
    kube.change("web2", {"metadata": {"labels": {"ovsmesh.io/exclude": "true"}}})
    kube.until_members("web1", "web3")
    kube.change("web2", {"metadata": {"labels": {"ovsmesh.io/exclude": None}}})
    kube.until_members("web1", "web2", "web3")
    kube.remove("web3")
    kube.until_members("web1", "web2")


def test_a_virtual_address_that_fails_over_moves_no_tunnel(kube: Cluster, controller: Process) -> None:
    """kube-vip: web1 joined by it and is dead, so its list stays as it is; then web2 lists it, first and alone."""
    kube.add(mesh())
    kube.add(node("web1", "192.0.2.100", "10.97.1.0/24"))
    kube.readdress("web1", "192.0.2.100", "192.0.2.1")
    time.sleep(1.1)  # creationTimestamp has seconds
    kube.add(node("web2", "192.0.2.2", "10.97.2.0/24"))
    kube.until_members("web1", "web2")
    before = kube.members()
    kube.report("web2", True)
    for addresses in (["192.0.2.100", "192.0.2.2"], ["192.0.2.100"]):
        kube.readdress("web2", *addresses)
        time.sleep(1.0)  # whatever the controller does to it, it has done by then
        assert kube.members() == before
    eventually(lambda: "AddressConflict" in kube.events("web2"))
    kube.readdress("web2", "192.0.2.100", "192.0.2.2")
    kube.readdress("web1", "192.0.2.1")
    eventually(lambda: [e["address"] for e in kube.members().values()] == ["192.0.2.1", "192.0.2.2"])


def test_cluster_cidrs_over_the_service_range_are_named(kube: Cluster, controller: Process) -> None:
    """The control plane's Services are in 10.96.0.0/16; the controller gives no Node a range of that."""
    kube.add(mesh("10.96.0.0/15", allocatePodCIDRs=True, nodeSubnetLength=16))
    kube.add(node("web1", "192.0.2.1"))
    kube.until_members("web1")
    assert kube.members()["web1"]["podCIDRs"] == ["10.97.0.0/16"]

    def degraded() -> tuple[str, str]:
        found = {c["type"]: c for c in kube.status().get("conditions", ())}.get("Degraded", {})
        return found.get("reason", ""), found.get("message", "")

    eventually(lambda: degraded()[0] == "ServiceRangeCovered")
    assert "clusterCIDRs 10.96.0.0/15: overlaps the Service range 10.96.0.0/16" in degraded()[1]
    eventually(lambda: "ServiceRangeCovered" in kube.events("default"))
    kube.report("web1", True)
    eventually(lambda: {c["type"]: c["status"] for c in kube.status()["conditions"]}["Ready"] == "True")


def test_a_node_made_again_is_another(kube: Cluster, controller: Process) -> None:
    three(kube)
    before = kube.members()["web2"]
    kube.report("web2", True, uid=before["uid"])
    eventually(lambda: kube.conditions("web2").get("ovsmesh.io/MeshReady") == ("True", "MeshConverged"))
    kube.remove("web2")
    kube.add(node("web2", "192.0.2.202", "10.97.202.0/24"))
    eventually(lambda: kube.members().get("web2", before)["uid"] != before["uid"])
    after = kube.members()["web2"]
    assert (after["address"], after["podCIDRs"]) == ("192.0.2.202", ["10.97.202.0/24"])
    # The old one's agent does not speak for it.
    eventually(lambda: kube.conditions("web2").get("ovsmesh.io/MeshReady") == ("False", "AgentNotReported"))


def test_conditions_and_taint_follow_the_nodes_own_report(kube: Cluster, controller: Process) -> None:
    three(kube)
    eventually(lambda: kube.conditions("web1").get("NetworkUnavailable") == ("True", "AgentNotReported"))
    assert kube.conditions("web1")["ovsmesh.io/MeshReady"] == ("False", "AgentNotReported")
    kube.report("web1", False, "RouteMissing")
    eventually(lambda: kube.conditions("web1")["ovsmesh.io/MeshReady"] == ("False", "RouteMissing"))
    assert TAINT in [t["key"] for t in kube.node("web1")["spec"]["taints"]]
    kube.report("web1", True)
    eventually(lambda: kube.conditions("web1")["ovsmesh.io/MeshReady"] == ("True", "MeshConverged"))
    eventually(lambda: TAINT not in [t["key"] for t in kube.node("web1")["spec"]["taints"]])
    found = kube.conditions("web1")
    assert found["NetworkUnavailable"] == ("False", "MeshConverged")
    assert found["Ready"] == ("True", "KubeletReady")  # the kubelet's own stays
    assert "example.org/other" in [t["key"] for t in kube.node("web1")["spec"]["taints"]]
    assert TAINT in [t["key"] for t in kube.node("web2")["spec"]["taints"]]
    kube.report("web1", False, "RouteMissing")
    eventually(lambda: kube.conditions("web1")["NetworkUnavailable"] == ("True", "RouteMissing"))


def says(reasons: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: ("False", reason) for name, reason in reasons.items()}


def test_what_can_not_be_joined_is_named_and_the_rest_converge(kube: Cluster, controller: Process) -> None:
    three(kube)
    bad = {
        "missing": node("missing", "192.0.2.11"),
        "outside": node("outside", "192.0.2.12", "10.98.1.0/24"),
        "noaddress": node("noaddress", "", "10.97.13.0/24"),
        "nonsense": node(
            "nonsense", "192.0.2.14", "10.97.14.0/24", annotations={"ovsmesh.io/tunnel-address": "nonsense"}
        ),
    }
    good = {
        "v6only": node("v6only", "192.0.2.15", "fd00:97:15::/64"),
        "dual": node("dual", "192.0.2.16", "10.97.16.0/24", "fd00:97:16::/64"),
    }
    for found in (*bad.values(), *good.values()):
        kube.add(found)
    time.sleep(1.1)  # creationTimestamp has seconds
    late = {
        "duplicate": node("duplicate", "192.0.2.17", "10.97.1.0/24"),
        "overlap": node("overlap", "192.0.2.18", "10.97.2.128/25"),
        "address": node("address", "192.0.2.3", "10.97.19.0/24"),
    }
    for found in late.values():
        kube.add(found)
    reasons = {
        "missing": "PodCIDRMissing",
        "outside": "PodCIDROutside",
        "noaddress": "AddressMissing",
        "nonsense": "AddressInvalid",
        "duplicate": "PodCIDRConflict",
        "overlap": "PodCIDRConflict",
        "address": "AddressConflict",
    }
    eventually(lambda: {n: kube.conditions(n).get("ovsmesh.io/MeshReady") for n in bad | late} == says(reasons))
    for name, reason in reasons.items():
        assert kube.conditions(name)["NetworkUnavailable"] == ("True", reason)
    eventually(lambda: all(reason in kube.events(name) for name, reason in reasons.items()))
    message = next(
        c["message"] for c in kube.node("duplicate")["status"]["conditions"] if c["type"] == "NetworkUnavailable"
    )
    assert "10.97.1.0/24" in message and "web1" in message
    members = ["web1", "web2", "web3", *good]
    kube.until_members(*members)
    eventually(lambda: kube.status().get("nodes") == 5)
    for name in members:
        kube.report(name, True)
    eventually(lambda: kube.status().get("converged") == 5)
    degraded = {c["type"]: c for c in kube.status()["conditions"]}["Degraded"]
    assert degraded["status"] == "True" and "duplicate" in degraded["message"]
    # The older leaves: the newer takes its place, with no restart.
    kube.remove("web1")
    kube.until_members(*sorted({*members, "duplicate"} - {"web1"}))


def test_the_mesh_status_says_when_all_is_well(kube: Cluster, controller: Process) -> None:
    three(kube)
    for number in (1, 2, 3):
        kube.report(f"web{number}", True)
    eventually(lambda: kube.status().get("converged") == 3)
    status = kube.status()
    assert {c["type"]: c["status"] for c in status["conditions"]} == {"Ready": "True", "Degraded": "False"}
    assert status["observedGeneration"] == 1


def test_static_members_and_settings(kube: Cluster, controller: Process) -> None:
    three(kube)
    rack = {"name": "rack1", "address": "198.51.100.1", "podCIDRs": ["10.97.200.0/24"]}
    path = f"{GROUP}/meshes/default"
    kube.api.patch(path, {"spec": {"nodes": [rack], "mtu": 1400, "key": 7, "encapsulation": "vxlan"}})
    kube.until_members("rack1", "web1", "web2", "web3")
    spec = kube.slices()[0]["spec"]
    assert (spec["settings"]["mtu"], spec["settings"]["key"], spec["meshGeneration"]) == (1400, 7, 2)
    kube.api.patch(path, {"spec": {"key": None}})
    eventually(lambda: "key" not in kube.slices()[0]["spec"]["settings"])
    assert kube.slices()[0]["spec"]["meshGeneration"] == 3
    clash = rack | {"podCIDRs": ["10.97.1.0/24"], "name": "rack2", "address": "198.51.100.2"}
    kube.api.patch(path, {"spec": {"nodes": [rack, clash]}})
    eventually(lambda: "PodCIDRConflict" in kube.events("default"))
    kube.until_members("rack1", "web1", "web2", "web3")


def test_slices_deleted_or_edited_by_hand_are_put_right(kube: Cluster, controller: Process) -> None:
    kube.add(mesh("10.0.0.0/8"))
    for number in range(230):
        kube.add(numbered(number))
    eventually(lambda: len(kube.members()) == 230)
    before = {entry["name"]: one["metadata"]["name"] for one in kube.slices() for entry in one["spec"]["nodes"]}
    for gone in ("default-000", "default-001", "default-002"):
        kube.api.delete(f"{GROUP}/meshslices/{gone}")
        eventually(lambda: kube.whole() and len(kube.members()) == 230)
    after = {entry["name"]: one["metadata"]["name"] for one in kube.slices() for entry in one["spec"]["nodes"]}
    assert after == before
    wrong = {"spec": {"nodes": [{"name": "evil", "address": "203.0.113.1", "podCIDRs": ["10.200.0.0/24"]}], "count": 9}}
    kube.api.patch(f"{GROUP}/meshslices/default-001", wrong)
    eventually(lambda: kube.whole() and len(kube.members()) == 230 and "evil" not in kube.members())
    stray = kube.slices()[0]
    body = {
        "apiVersion": "ovsmesh.io/v1alpha1",
        "kind": "MeshSlice",
        "metadata": {"name": "default-777"},
        "spec": stray["spec"] | {"index": 777, "count": 778},
    }
    kube.api.create(f"{GROUP}/meshslices", body)
    eventually(lambda: "default-777" not in [one["metadata"]["name"] for one in kube.slices()])


def test_heartbeats_cost_no_write(kube: Cluster, controller: Process) -> None:
    three(kube)
    metric = "ovsmesh_controller_node_writes_total"
    eventually(lambda: controller.metric(metric) == 3)
    slices, passes = kube.slice_writes(), controller.metric("ovsmesh_controller_turns_total")
    for _ in range(30):
        for number in (1, 2, 3):
            beat = {"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"}
            kube.api.patch(f"{NODES}/web{number}/status", {"status": {"conditions": [beat]}}, STRATEGIC)
    # A change behind them all shows that the controller has seen them: its condition and its taint are written.
    kube.report("web1", True)
    eventually(lambda: TAINT not in [t["key"] for t in kube.node("web1")["spec"]["taints"]])
    eventually(lambda: controller.metric(metric) >= 5)
    assert (kube.slice_writes(), controller.metric(metric)) == (slices, 5)
    assert controller.metric("ovsmesh_controller_turns_total") - passes < 15


def test_an_empty_list_of_nodes_empties_no_slice(kube: Cluster, controller: Process) -> None:
    three(kube)
    kube.api.delete(NODES)
    eventually(lambda: "NodesVanished" in kube.events("default"))
    assert len(kube.members()) == 3
    kube.add(node("web4", "192.0.2.4", "10.97.4.0/24"))
    kube.until_members("web4")


def test_status_of_the_cluster(kube: Cluster, controller: Process) -> None:
    three(kube)
    kube.report("web1", True)
    kube.report("web2", False, "RouteMissing")
    eventually(lambda: kube.status().get("converged") == 1)
    config = f"--kubeconfig={kube.plane.kubeconfig()}"
    argv = [sys.executable, "-m", "ovsmesh", "status", "--cluster", config]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    text = ended.stdout
    assert ended.returncode == 2 and text.startswith("1 of 3 nodes not converged: web2; 1 of 3 nodes unknown: web3\n")
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("web")}
    assert "2/2" in lines["web1"] and lines["web1"].endswith("converged")
    assert "not converged: RouteMissing" in lines["web2"] and "has not said anything" in lines["web3"]
    found = json.loads(subprocess.run([*argv, "-o", "json"], capture_output=True, timeout=20, check=False).stdout)
    assert [row["state"] for row in found["nodes"]] == ["not converged", "unknown", "converged"]
    plugin = "from ovsmesh.cli.main import kubectl; kubectl()"
    argv = [sys.executable, "-c", plugin, "status", config]
    assert "of 3 nodes" in subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False).stdout


def test_probes_and_end(kube: Cluster, controller: Process) -> None:
    three(kube)
    assert controller.get("/healthz")[0] == 200
    eventually(lambda: controller.metric("ovsmesh_controller_nodes") == 3)
    assert controller.metric("ovsmesh_controller_leader") == 1
    assert controller.end() == 0
    assert kube.leader() == ""
    assert len(kube.members()) == 3
