"""What the manifests' own service accounts may do, tried with real tokens bound to a node, never as an administrator.

Imports nothing of ovsmesh.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP, eventually
from tests.support.reach import Answer

pytestmark = pytest.mark.kube

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON = "application/json-patch+json"
NODES = "/api/v1/nodes"
MINE, OTHER = "node1", "node2"
AGENT, CONTROLLER = "ovsmesh-agent", "ovsmesh-controller"


def node(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec}


def mesh_node(name: str) -> dict[str, Any]:
    return {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "MeshNode", "metadata": {"name": name}, "spec": {}}


def mesh_slice(name: str = "default-000") -> dict[str, Any]:
    settings = {"clusterCIDRs": ["10.97.0.0/16"], "encapsulation": "gre", "mtu": "auto"}
    entry = {"name": MINE, "uid": "u1", "address": "192.0.2.11", "podCIDRs": ["10.97.1.0/24"]}
    spec = {"mesh": "default", "index": 0, "count": 1, "meshGeneration": 1, "settings": settings, "nodes": [entry]}
    return {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "MeshSlice", "metadata": {"name": name}, "spec": spec}


def lease(name: str) -> dict[str, Any]:
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": {}}


class As:
    """Requests with one token."""

    def __init__(self, plane: ControlPlane, token: str) -> None:
        self.plane, self.token = plane, token

    def __call__(self, method: str, path: str, body: object = None, kind: str = "application/json") -> Answer:
        return self.plane.call(method, path, body, token=self.token, content_type=kind)


def assert_forbidden(who: As, method: str, path: str) -> None:
    kind = MERGE if method == "PATCH" else "application/json"
    answer = who(method, path, {} if method in ("POST", "PUT", "PATCH") else None, kind)
    assert (answer.status, answer.reason) == (403, "Forbidden"), answer


@pytest.fixture
def nodes(cluster: ControlPlane) -> ControlPlane:
    for name in (MINE, OTHER):
        assert cluster.call("POST", NODES, node(name)).status == 201
    # Admission takes a policy up some moments after it is written.
    probe = As(cluster, cluster.token(AGENT))
    eventually(lambda: probe("POST", f"{GROUP}/meshnodes?dryRun=All", mesh_node("probe")).status == 403)
    return cluster


@pytest.fixture(params=["pod", "node"])
def agent(nodes: ControlPlane, request: pytest.FixtureRequest) -> As:
    """The agent of MINE, with a token bound to its pod there, as the kubelet gets it, or to the Node itself."""
    return As(nodes, nodes.agent_token(MINE) if request.param == "pod" else nodes.token(AGENT, node=MINE))


@pytest.fixture
def controller(nodes: ControlPlane) -> As:
    return As(nodes, nodes.agent_token(MINE, account=CONTROLLER))


# ---------------------------------------------------------------- the agent


def test_agent_reads_slices_and_writes_its_own_meshnode(nodes: ControlPlane, agent: As) -> None:
    assert nodes.call("POST", f"{GROUP}/meshslices", mesh_slice()).status == 201
    assert len(agent("GET", f"{GROUP}/meshslices").body["items"]) == 1
    assert agent("GET", f"{GROUP}/meshslices?watch=1&timeoutSeconds=1").status == 200

    assert agent("POST", f"{GROUP}/meshnodes", mesh_node(MINE)).status == 201
    status = {"status": {"mtu": 1462, "peers": {"wanted": 2, "installed": 2, "up": 1}}}
    written = agent("PATCH", f"{GROUP}/meshnodes/{MINE}/status", status, MERGE)
    assert (written.status, written.body["status"]["peers"]["up"]) == (200, 1)
    applied = mesh_node(MINE) | {"status": {"mtu": 1458}}
    assert agent("PATCH", f"{GROUP}/meshnodes/{MINE}/status?fieldManager=t&force=true", applied, APPLY).status == 200


def test_agent_sees_its_own_namespace(nodes: ControlPlane, agent: As) -> None:
    assert agent("GET", "/api/v1/namespaces/ovsmesh").status == 200
    only = "/api/v1/namespaces?fieldSelector=metadata.name%3Dovsmesh"
    assert [found["metadata"]["name"] for found in agent("GET", only).body["items"]] == ["ovsmesh"]
    assert agent("GET", f"{only}&watch=1&timeoutSeconds=1").status == 200


def test_agent_cannot_write_another_nodes_meshnode(nodes: ControlPlane, agent: As) -> None:
    assert nodes.call("POST", f"{GROUP}/meshnodes", mesh_node(OTHER)).status == 201
    for method, path, body, kind in (
        ("POST", f"{GROUP}/meshnodes", mesh_node("node3"), "application/json"),
        ("PATCH", f"{GROUP}/meshnodes/{OTHER}/status", {"status": {"mtu": 1}}, MERGE),
        ("PATCH", f"{GROUP}/meshnodes/{OTHER}/status?fieldManager=t", mesh_node(OTHER) | {"status": {}}, APPLY),
    ):
        answer = agent(method, path, body, kind)
        assert (answer.status, answer.reason) == (403, "Forbidden"), (method, path, answer)
        assert f"wanted {MINE}, found" in answer.message
    found = nodes.call("GET", f"{GROUP}/meshnodes").body["items"]
    assert [(item["metadata"]["name"], item.get("status")) for item in found] == [(OTHER, None)]


def test_token_without_a_node_writes_no_meshnode(nodes: ControlPlane) -> None:
    unbound = As(nodes, nodes.token(AGENT))
    answer = unbound("POST", f"{GROUP}/meshnodes", mesh_node(MINE))
    assert answer.status == 403
    assert "a token with a node name in its claims" in answer.message


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", NODES),
        ("GET", f"{NODES}/{MINE}"),
        ("GET", f"{NODES}?watch=1&timeoutSeconds=1"),
        ("PATCH", f"{NODES}/{MINE}"),
        ("PATCH", f"{NODES}/{MINE}/status"),
        ("GET", "/api/v1/secrets"),
        ("GET", "/api/v1/namespaces/ovsmesh/secrets"),
        ("GET", "/api/v1/namespaces"),
        ("GET", "/api/v1/namespaces/default"),
        ("DELETE", "/api/v1/namespaces/ovsmesh"),
        ("PATCH", "/api/v1/namespaces/ovsmesh"),
        ("GET", "/api/v1/namespaces/kube-system/secrets/x"),
        ("GET", "/api/v1/pods"),
        ("GET", "/api/v1/namespaces/ovsmesh/configmaps"),
        ("POST", "/api/v1/namespaces/default/events"),
        ("GET", f"{GROUP}/meshes"),
        ("POST", f"{GROUP}/meshes"),
        ("POST", f"{GROUP}/meshslices"),
        ("PATCH", f"{GROUP}/meshslices/default-000"),
        ("DELETE", f"{GROUP}/meshslices/default-000"),
        ("GET", f"{GROUP}/meshnodes"),
        ("PUT", f"{GROUP}/meshnodes/{MINE}"),
        ("PATCH", f"{GROUP}/meshnodes/{MINE}"),
        ("DELETE", f"{GROUP}/meshnodes/{MINE}"),
        ("POST", "/api/v1/namespaces/ovsmesh/serviceaccounts/ovsmesh-controller/token"),
        ("GET", "/apis/coordination.k8s.io/v1/namespaces/ovsmesh/leases/ovsmesh-controller"),
    ],
)
def test_agent_may_nothing_else(nodes: ControlPlane, method: str, path: str) -> None:
    agent = As(nodes, nodes.token(AGENT, node=MINE))
    assert_forbidden(agent, method, path)


def test_token_ends_with_its_node(nodes: ControlPlane) -> None:
    agent = As(nodes, nodes.token(AGENT, node=OTHER))
    assert agent("GET", f"{GROUP}/meshslices").status == 200
    assert nodes.call("DELETE", f"{NODES}/{OTHER}").status == 200
    # The API server remembers for 10 s that a token was good.
    eventually(lambda: agent("GET", f"{GROUP}/meshslices").status == 401, every=0.5)


# ---------------------------------------------------------------- the controller


def test_controller_keeps_nodes(controller: As) -> None:
    assert len(controller("GET", NODES).body["items"]) == 2
    version = controller("GET", f"{NODES}/{OTHER}").body["metadata"]["resourceVersion"]
    given = {
        "metadata": {"resourceVersion": version},
        "spec": {"podCIDR": "10.97.2.0/24", "podCIDRs": ["10.97.2.0/24"]},
    }
    assert controller("PATCH", f"{NODES}/{OTHER}", given, MERGE).status == 200
    assert controller("PATCH", f"{NODES}/{OTHER}", given, MERGE).reason == "Conflict"
    # Kubernetes has put a taint of its own on the new Node, which stays.
    taint = {"key": "node.ovsmesh.io/agent-not-ready", "effect": "NoSchedule"}
    before = controller("GET", f"{NODES}/{OTHER}").body["spec"]["taints"]
    for taints in ([*before, taint], before):
        assert controller("PATCH", f"{NODES}/{OTHER}", {"spec": {"taints": taints}}, MERGE).status == 200
    condition = {"type": "ovsmesh.io/MeshReady", "status": "True", "reason": "Converged", "message": "m"}
    status = {"status": {"conditions": [condition]}}
    assert (
        controller("PATCH", f"{NODES}/{OTHER}/status", status, "application/strategic-merge-patch+json").status == 200
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}, "labels"),
        ({"spec": {"taints": [{"key": "other", "effect": "NoExecute"}]}}, "taints"),
        ({"spec": {"unschedulable": True}}, "cordon"),
    ],
)
def test_controller_may_change_no_more_of_a_node(controller: As, change: dict[str, Any], why: str) -> None:
    answer = controller("PATCH", f"{NODES}/{OTHER}", change, MERGE)
    assert (answer.status, answer.reason) == (403, "Forbidden"), answer
    assert why in answer.message


def test_controller_leaves_others_taints(nodes: ControlPlane, controller: As) -> None:
    ours = {"key": "node.ovsmesh.io/agent-not-ready", "effect": "NoSchedule"}
    theirs = {"key": "other", "effect": "NoSchedule"}
    assert (
        nodes.call("PATCH", f"{NODES}/{OTHER}", {"spec": {"taints": [ours, theirs]}}, content_type=MERGE).status == 200
    )
    assert controller("PATCH", f"{NODES}/{OTHER}", {"spec": {"taints": [theirs]}}, MERGE).status == 200
    assert controller("PATCH", f"{NODES}/{OTHER}", {"spec": {"taints": []}}, MERGE).status == 403


def test_controller_writes_slices_events_and_its_lease(nodes: ControlPlane, controller: As) -> None:
    assert controller("POST", f"{GROUP}/meshslices", mesh_slice()).status == 201
    assert controller("PATCH", f"{GROUP}/meshslices/default-000", {"spec": {"meshGeneration": 2}}, MERGE).status == 200
    assert controller("DELETE", f"{GROUP}/meshslices/default-000").status == 200

    mesh = {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "Mesh", "metadata": {"name": "default"}}
    assert nodes.call("POST", f"{GROUP}/meshes", mesh | {"spec": {"clusterCIDRs": ["10.97.0.0/16"]}}).status == 201
    assert controller("PATCH", f"{GROUP}/meshes/default/status", {"status": {"nodes": 2}}, MERGE).status == 200
    assert controller("PATCH", f"{GROUP}/meshes/default", {"spec": {"mtu": 1400}}, MERGE).status == 403

    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "Node", "name": MINE},
        "reason": "PodCIDRMissing",
    }
    assert controller("POST", "/api/v1/namespaces/default/events", event).status == 201
    assert controller("PATCH", "/api/v1/namespaces/default/events/e", {"count": 2}, MERGE).status == 200

    leases = "/apis/coordination.k8s.io/v1/namespaces/ovsmesh/leases"
    assert controller("POST", leases, lease(CONTROLLER)).status == 201
    mine = controller("GET", f"{leases}/{CONTROLLER}")
    assert controller("PUT", f"{leases}/{CONTROLLER}", mine.body).status == 200
    assert controller("POST", leases, lease("other")).status == 201
    assert controller("PUT", f"{leases}/other", lease("other")).status == 403


NOTE = "ovsmesh.io/derived-cluster-cidrs"


def a_mesh(note: str = "10.97.0.0/24", **spec: Any) -> dict[str, Any]:
    meta = {"name": "default"} | ({"annotations": {NOTE: note}} if note else {})
    spec = {"clusterCIDRs": ["10.97.0.0/24"]} | spec
    return {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "Mesh", "metadata": meta, "spec": spec}


def test_controller_makes_a_mesh_and_widens_what_it_has_derived(nodes: ControlPlane, controller: As) -> None:
    meshes = f"{GROUP}/meshes"
    static = [{"name": "rack1", "address": "198.51.100.1", "podCIDRs": ["10.97.0.0/25"]}]
    for refused in (
        a_mesh(""),
        a_mesh("10.97.0.0/16"),
        a_mesh(key=1),
        a_mesh(nodes=static),
        a_mesh(allocatePodCIDRs=True),
        a_mesh(nodeSubnetLength=26),
        a_mesh(encapsulation="vxlan"),
    ):
        answer = controller("POST", meshes, refused)
        assert (answer.status, answer.reason) == (403, "Forbidden"), (refused, answer)
    assert controller("POST", meshes, a_mesh()).status == 201

    def change(cidrs: list[str], note: str = "", **spec: Any) -> dict[str, Any]:
        told = note or ",".join(cidrs)
        return {"metadata": {"annotations": {NOTE: told}}, "spec": {"clusterCIDRs": cidrs} | spec}

    wider = ["10.97.0.0/16", "fd00:97::/48"]
    for refused in (
        change(wider, "10.97.0.0/16"),
        change(["10.98.0.0/16"]),
        change(["10.97.0.0/25"]),
        change(wider, mtu=1400),
        change(wider, key=1),
        change(wider, nodes=static),
        change(wider, allocatePodCIDRs=True),
        change(wider, encapsulation="geneve"),
    ):
        answer = controller("PATCH", f"{meshes}/default", refused, MERGE)
        assert (answer.status, answer.reason) == (403, "Forbidden"), (refused, answer)
    assert controller("PATCH", f"{meshes}/default", change(wider), MERGE).status == 200
    # Once someone has edited it, it is theirs.
    theirs = {"spec": {"clusterCIDRs": ["10.97.0.0/17"]}}
    assert nodes.call("PATCH", f"{meshes}/default", theirs, content_type=MERGE).status == 200
    answer = controller("PATCH", f"{meshes}/default", change(["10.97.0.0/16"]), MERGE)
    assert answer.status == 403 and "has not derived itself" in answer.message


def test_controller_removes_meshnodes(nodes: ControlPlane, controller: As) -> None:
    assert nodes.call("POST", f"{GROUP}/meshnodes", mesh_node("gone")).status == 201
    assert controller("DELETE", f"{GROUP}/meshnodes/gone").status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", NODES),
        ("DELETE", f"{NODES}/{MINE}"),
        ("PUT", f"{NODES}/{MINE}"),
        ("GET", "/api/v1/secrets"),
        ("GET", "/api/v1/namespaces/ovsmesh/secrets"),
        ("GET", "/api/v1/pods"),
        ("PUT", f"{GROUP}/meshes/default"),
        ("DELETE", f"{GROUP}/meshes/default"),
        ("PATCH", f"{GROUP}/meshes/other"),
        ("PATCH", f"{GROUP}/meshnodes/{MINE}"),
        ("PATCH", f"{GROUP}/meshnodes/{MINE}/status"),
        ("POST", f"{GROUP}/meshnodes"),
        ("POST", "/apis/coordination.k8s.io/v1/namespaces/default/leases"),
        ("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"),
        ("POST", "/api/v1/namespaces/ovsmesh/serviceaccounts/ovsmesh-agent/token"),
    ],
)
def test_controller_may_nothing_else(controller: As, method: str, path: str) -> None:
    assert_forbidden(controller, method, path)


def test_the_real_controller_needs_no_more(nodes: ControlPlane, tmp_path: Path) -> None:
    """Nodes in, slices, conditions, Events and status out, with the service account that the manifests give it."""
    merge_status = "application/strategic-merge-patch+json"
    for number, name in enumerate((MINE, OTHER), start=1):
        address = {"type": "InternalIP", "address": f"192.0.2.{number}"}
        assert (
            nodes.call(
                "PATCH", f"{NODES}/{name}/status", {"status": {"addresses": [address]}}, content_type=merge_status
            ).status
            == 200
        )
    taint = {"key": "node.ovsmesh.io/agent-not-ready", "effect": "NoSchedule"}
    ranges = {"podCIDR": "10.97.1.0/24", "podCIDRs": ["10.97.1.0/24"], "taints": [taint]}
    assert nodes.call("PATCH", f"{NODES}/{MINE}", {"spec": ranges}, content_type=MERGE).status == 200
    mesh = {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "Mesh", "metadata": {"name": "default"}}
    spec = {"clusterCIDRs": ["10.97.0.0/16"], "allocatePodCIDRs": True}
    assert nodes.call("POST", f"{GROUP}/meshes", mesh | {"spec": spec}).status == 201
    config = nodes.token_kubeconfig("controller", nodes.agent_token(MINE, account=CONTROLLER))
    log = tmp_path / "log"

    def said(name: str) -> bool:
        found = nodes.call("GET", f"{NODES}/{name}").body
        return "podCIDR" in found["spec"] and any(
            c["type"] == "ovsmesh.io/MeshReady" for c in found["status"]["conditions"]
        )

    def both() -> bool:
        slices = nodes.call("GET", f"{GROUP}/meshslices").body["items"]
        return sorted(n["name"] for s in slices for n in s["spec"].get("nodes", ())) == [MINE, OTHER]

    def lifted() -> bool:
        return taint not in nodes.call("GET", f"{NODES}/{MINE}").body["spec"].get("taints", ())

    argv = [sys.executable, "-m", "ovsmesh", "controller", f"--kubeconfig={config}", "--listen=127.0.0.1:0"]
    with log.open("w") as out, subprocess.Popen(argv, stdout=out, stderr=out) as process:
        try:
            eventually(both)
            eventually(lambda: said(MINE) and said(OTHER))
            agent = As(nodes, nodes.agent_token(MINE))
            owner = {
                "apiVersion": "v1",
                "kind": "Node",
                "name": MINE,
                "uid": nodes.call("GET", f"{NODES}/{MINE}").body["metadata"]["uid"],
            }
            made = mesh_node(MINE)
            made["metadata"]["ownerReferences"] = [owner]
            assert agent("POST", f"{GROUP}/meshnodes", made).status == 201
            slices = nodes.call("GET", f"{GROUP}/meshslices").body["items"]
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            condition = {
                "type": "Converged",
                "status": "True",
                "reason": "Converged",
                "message": "",
                "lastTransitionTime": now,
            }
            observed = {s["metadata"]["name"]: s["metadata"]["resourceVersion"] for s in slices}
            status = {"observedSlices": observed, "conditions": [condition], "observedAt": now}
            assert agent("PATCH", f"{GROUP}/meshnodes/{MINE}/status", {"status": status}, MERGE).status == 200
            eventually(lifted)
            eventually(lambda: nodes.call("GET", f"{GROUP}/meshes/default").body.get("status", {}).get("nodes") == 2)
        finally:
            process.terminate()
            process.wait(20)
            print(log.read_text())
    assert "forbidden" not in log.read_text().lower()


def test_a_stranger_may_nothing(cluster: ControlPlane) -> None:
    assert cluster.call("GET", f"{GROUP}/meshslices", user="").status == 403
    assert cluster.call("GET", f"{GROUP}/meshslices", token="no token").status == 401
