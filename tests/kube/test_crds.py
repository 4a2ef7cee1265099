"""The CRDs against the types they stand for, and against the API server: what it takes, what it refuses.

Names and limits are those of model, meshfile and claims; a Mesh that the file's parser takes, the API takes too,
and the other way round, so that the two can't drift apart. Imports model, meshfile and claims.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovsmesh import names
from ovsmesh.mesh import manifest, validation
from ovsmesh.mesh.types import ENCAPSULATIONS, Mesh, MeshError, Node
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP, MANIFESTS

CRDS = {crd["spec"]["names"]["kind"]: crd for crd in yaml.safe_load_all((MANIFESTS / "crds.yaml").read_text())}
API_VERSION = "ovsmesh.io/v1alpha1"


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest).replace("Cidrs", "CIDRs")


def version(kind: str) -> dict[str, Any]:
    (only,) = CRDS[kind]["spec"]["versions"]
    return dict(only)


def schema(kind: str, *path: str) -> dict[str, Any]:
    """The schema at `path` below spec; "[]" stands for a list's items."""
    found = version(kind)["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for step in path:
        found = found["items"] if step == "[]" else found["properties"][step]
    return dict(found)


# ---------------------------------------------------------------- against the types


def test_kinds_are_cluster_scoped_and_in_our_group() -> None:
    assert sorted(CRDS) == ["Mesh", "MeshNode", "MeshSlice"]
    for crd in CRDS.values():
        assert (crd["spec"]["group"], crd["spec"]["scope"]) == ("ovsmesh.io", "Cluster")
        assert version(crd["spec"]["names"]["kind"])["name"] == "v1alpha1"
    assert names.API_VERSION == API_VERSION and names.MESH in CRDS


def test_mesh_has_the_keys_of_the_file() -> None:
    assert set(schema("Mesh")["properties"]) == set(manifest._SPEC)
    # uid and zone are the controller's to know, from the Node.
    assert set(schema("Mesh", "nodes", "[]")["properties"]) == manifest.NODE_KEYS - {"uid", "zone"}


def test_slices_have_the_fields_of_the_model() -> None:
    entry = schema("MeshSlice", "nodes", "[]")["properties"]
    assert set(entry) == {camel(field.name) for field in dataclasses.fields(Node)} == manifest.NODE_KEYS
    settings = {camel(field.name) for field in dataclasses.fields(Mesh)} - {"nodes"}
    assert set(schema("MeshSlice", "settings")["properties"]) == settings
    assert schema("MeshSlice", "nodes")["maxItems"] == 100


@pytest.mark.parametrize("where", [("Mesh",), ("MeshSlice", "settings")])
def test_limits_of_the_settings(where: tuple[str, ...]) -> None:
    assert tuple(schema(*where, "encapsulation")["enum"]) == ENCAPSULATIONS
    assert schema(*where, "clusterCIDRs")["maxItems"] == manifest.MAX_CLUSTER_CIDRS
    key = schema(*where, "key")
    assert (key["minimum"], key["maximum"]) == (0, 2 ** manifest._KEY_BITS["gre"] - 1)
    (rule,) = schema(*where, "mtu")["x-kubernetes-validations"]
    assert f"self >= {manifest._MTU.start} && self <= {manifest._MTU.stop - 1}" in rule["rule"]


@pytest.mark.parametrize("kind", ["Mesh", "MeshSlice"])
def test_limits_of_a_node(kind: str) -> None:
    assert schema(kind, "nodes", "[]", "podCIDRs")["maxItems"] == manifest.MAX_CIDRS
    assert schema(kind, "nodes", "[]", "name")["pattern"] == f"^{validation._NAME.pattern}$"
    longest = schema(kind, "nodes", "[]", "podCIDRs", "[]")["x-kubernetes-validations"][-1]["rule"]
    assert f"? {validation.LONGEST_PREFIX[4]} : {validation.LONGEST_PREFIX[6]}" in longest


def test_both_say_the_same_of_a_node() -> None:
    """Mesh and MeshSlice write these schemas out twice, as YAML has no way to share them over documents."""
    for part in ("name", "address", "podCIDRs"):
        assert schema("Mesh", "nodes", "[]", part) == schema("MeshSlice", "nodes", "[]", part)


def test_status_subresources_and_columns() -> None:
    for kind, status in (("Mesh", True), ("MeshNode", True), ("MeshSlice", False)):
        assert ("status" in version(kind).get("subresources", {})) == status
        assert len(version(kind)["additionalPrinterColumns"]) >= 5


# ---------------------------------------------------------------- against the API server


def web(name: str = "web1", address: str = "192.0.2.11", *cidrs: str) -> dict[str, Any]:
    return {"name": name, "address": address, "podCIDRs": list(cidrs or ["10.97.1.0/24"])}


def mesh(**spec: Any) -> dict[str, Any]:
    whole = {"clusterCIDRs": ["10.97.0.0/16", "fd00:97::/48"], "nodes": [web()]} | spec
    kept = {key: value for key, value in whole.items() if value is not None}
    return {"apiVersion": API_VERSION, "kind": "Mesh", "metadata": {"name": "default"}, "spec": kept}


GOOD: dict[str, dict[str, Any]] = {
    "plain": mesh(),
    "one family": mesh(clusterCIDRs=["10.97.0.0/16"]),
    "all said": mesh(encapsulation="gre", key=4294967295, mtu="auto", allocatePodCIDRs=True, nodeSubnetLength=24),
    "vxlan": mesh(encapsulation="vxlan", key=16777215),
    "geneve": mesh(encapsulation="geneve", mtu=1280),
    "small mtu": mesh(clusterCIDRs=["10.97.0.0/16"], mtu=576),
    "large mtu": mesh(mtu=65535),
    "two nodes": mesh(nodes=[web(), web("Web_2.example", "192.0.2.12", "10.97.2.0/24", "fd00:97:0:2::/64")]),
    "v6 underlay": mesh(nodes=[web("w", "2001:db8::11", "fd00:97:0:1::/64")]),
    "smallest range": mesh(nodes=[web("w", "192.0.2.11", "10.97.1.4/30", "fd00:97::4/126")]),
}
BAD: dict[str, dict[str, Any]] = {
    "no spec": {k: v for k, v in mesh().items() if k != "spec"},
    "no cluster": mesh(clusterCIDRs=None, nodes=None),
    "empty cluster": mesh(clusterCIDRs=[], nodes=None),
    "cluster not a list": mesh(clusterCIDRs="10.97.0.0/16", nodes=None),
    "cluster host bits": mesh(clusterCIDRs=["10.97.0.1/16"]),
    "cluster host bits v6": mesh(clusterCIDRs=["10.97.0.0/16", "fd00:97::1/48"]),
    "cluster no length": mesh(clusterCIDRs=["10.97.0.0"], nodes=None),
    "cluster word": mesh(clusterCIDRs=["pods"], nodes=None),
    "cluster length 33": mesh(clusterCIDRs=["10.97.0.0/33"], nodes=None),
    "cluster overlap": mesh(clusterCIDRs=["10.97.0.0/16", "10.97.128.0/17"]),
    "cluster twice": mesh(clusterCIDRs=["10.97.0.0/16", "10.97.0.0/16"]),
    "encapsulation": mesh(encapsulation="ipip"),
    "encapsulation case": mesh(encapsulation="GRE"),
    "key negative": mesh(key=-1),
    "key large": mesh(key=4294967296),
    "key vxlan": mesh(encapsulation="vxlan", key=16777216),
    "key geneve": mesh(encapsulation="geneve", key=16777216),
    "key text": mesh(key="7"),
    "mtu small": mesh(clusterCIDRs=["10.97.0.0/16"], mtu=575),
    "mtu small v6": mesh(mtu=1279),
    "mtu large": mesh(mtu=65536),
    "mtu word": mesh(mtu="large"),
    "allocate word": mesh(allocatePodCIDRs="yes"),
    "subnet 0": mesh(nodeSubnetLength=0),
    "subnet 127": mesh(nodeSubnetLength=127),
    "unknown key": mesh(clusterCidrs=["10.97.0.0/16"]),
    "node unknown key": mesh(nodes=[web() | {"ip": "192.0.2.11"}]),
    "node no name": mesh(nodes=[{k: v for k, v in web().items() if k != "name"}]),
    "node bad name": mesh(nodes=[web("-web")]),
    "node twice": mesh(nodes=[web(), web("web1", "192.0.2.12", "10.97.2.0/24")]),
    "node no address": mesh(nodes=[{k: v for k, v in web().items() if k != "address"}]),
    "node address word": mesh(nodes=[web("w", "web.example")]),
    "node address length": mesh(nodes=[web("w", "192.0.2.11/24")]),
    "node address loopback": mesh(nodes=[web("w", "127.0.0.1")]),
    "node address link-local": mesh(nodes=[web("w", "169.254.1.1")]),
    "node address multicast": mesh(nodes=[web("w", "224.0.0.5")]),
    "node address zero": mesh(nodes=[web("w", "0.0.0.0")]),
    "node address broadcast": mesh(nodes=[web("w", "255.255.255.255")]),
    "node address v6 loopback": mesh(nodes=[web("w", "::1")]),
    "node no cidr": mesh(nodes=[web() | {"podCIDRs": []}]),
    "node cidr host bits": mesh(nodes=[web("w", "192.0.2.11", "10.97.1.1/24")]),
    "node cidr outside": mesh(nodes=[web("w", "192.0.2.11", "10.98.1.0/24")]),
    "node cidr wider": mesh(nodes=[web("w", "192.0.2.11", "10.96.0.0/15")]),
    "node cidr word": mesh(nodes=[web("w", "192.0.2.11", "here")]),
    "node cidr too long": mesh(nodes=[web("w", "192.0.2.11", "10.97.1.0/31")]),
    "node cidr too long v6": mesh(nodes=[web("w", "192.0.2.11", "fd00:97::/127")]),
    "node cidr octal": mesh(nodes=[web("w", "192.0.2.11", "10.97.01.0/24")]),
}


def parser_takes(found: dict[str, Any]) -> bool:
    try:
        _, problems = manifest.parse(json.dumps(found) + "\n", "test")
    except MeshError:
        return False
    return not problems


@pytest.mark.kube
@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_api_and_file_agree(cluster: ControlPlane, name: str) -> None:
    found = (GOOD | BAD)[name]
    answer = cluster.call("POST", f"{GROUP}/meshes?dryRun=All&fieldValidation=Strict", found)
    assert answer.status in ((201,) if name in GOOD else (400, 422)), answer.message
    assert parser_takes(found) == (name in GOOD)


@pytest.mark.kube
def test_there_is_one_mesh(cluster: ControlPlane) -> None:
    answer = cluster.call("POST", f"{GROUP}/meshes", mesh() | {"metadata": {"name": "second"}})
    assert answer.status == 422 and "its name is default" in answer.message


@pytest.mark.kube
def test_a_mesh_edited_by_hand_says_what_is_wrong(cluster: ControlPlane, tmp_path: Path) -> None:
    cluster.kubectl("apply", "-f", str(MANIFESTS / "mesh.yaml"))
    stored = cluster.call("GET", f"{GROUP}/meshes/default").body["spec"]
    assert (stored["encapsulation"], stored["mtu"], stored["allocatePodCIDRs"]) == ("gre", "auto", False)
    patch = json.dumps({"spec": {"clusterCIDRs": ["10.244.1.0/16"]}})
    said = cluster.kubectl("patch", "mesh", "default", "--type=merge", f"--patch={patch}", check=False)
    assert 'spec.clusterCIDRs[0]: Invalid value: "10.244.1.0/16": has host bits set' in said
    assert cluster.call("GET", f"{GROUP}/meshes/default").body["spec"] == stored


def slice_of(size: int, **spec: Any) -> dict[str, Any]:
    nodes = [
        {
            "name": f"n{i}",
            "uid": f"u{i}",
            "address": f"192.0.2.{i + 1}",
            "podCIDRs": [f"10.97.{i}.0/24", f"fd00:97:0:{i}::/64"],
        }
        for i in range(size)
    ]
    settings = {"clusterCIDRs": ["10.97.0.0/16", "fd00:97::/48"], "encapsulation": "gre", "key": None, "mtu": "auto"}
    base = {"mesh": "default", "index": 0, "count": 1, "meshGeneration": 1, "settings": settings, "nodes": nodes}
    meta = {"name": "default-000", "labels": {"ovsmesh.io/mesh": "default"}}
    return {"apiVersion": API_VERSION, "kind": "MeshSlice", "metadata": meta, "spec": base | spec}


@pytest.mark.kube
def test_a_slice_holds_a_hundred_nodes(cluster: ControlPlane) -> None:
    path = f"{GROUP}/meshslices?dryRun=All&fieldValidation=Strict"
    assert cluster.call("POST", path, slice_of(100)).status == 201
    assert cluster.call("POST", path, slice_of(101)).status == 422


@pytest.mark.kube
@pytest.mark.parametrize(
    "spec",
    [
        {"index": 1},
        {"index": -1},
        {"count": 0},
        {"mesh": "other"},
        {"settings": {}},
        {"settings": {"clusterCIDRs": ["10.97.0.1/16"], "encapsulation": "gre"}},
        {"settings": {"clusterCIDRs": ["10.97.0.0/16"], "encapsulation": "none"}},
        {"nodes": [web("w", "192.0.2.11", "10.97.1.1/24")]},
        {"nodes": [web("w", "127.0.0.1")]},
        {"nodes": [web(), web()]},
        {"nodes": [web() | {"podCIDRs": []}]},
        {"more": 1},
    ],
)
def test_a_slice_with_bad_values_is_refused(cluster: ControlPlane, spec: dict[str, Any]) -> None:
    path = f"{GROUP}/meshslices?dryRun=All&fieldValidation=Strict"
    answer = cluster.call("POST", path, slice_of(2, **spec))
    assert answer.status in (400, 422), answer


@pytest.mark.kube
def test_a_meshnodes_status_and_how_it_reads(cluster: ControlPlane) -> None:
    path = f"{GROUP}/meshnodes"
    made = {"apiVersion": API_VERSION, "kind": "MeshNode", "metadata": {"name": "node1"}, "spec": {}}
    assert cluster.call("POST", path, made | {"status": {"mtu": 1}}).status == 201
    assert "status" not in cluster.call("GET", f"{path}/node1").body
    when = "2026-01-01T00:00:00Z"
    condition = {
        "type": "Converged",
        "status": "True",
        "reason": "Converged",
        "message": "",
        "lastTransitionTime": when,
    }
    status = {
        "observedSlices": {"default-000": "17"},
        "peers": {"wanted": 9, "installed": 8, "up": 7},
        "reachability": {
            "reachable": "7/9",
            "unreachable": 1,
            "unprobed": 0,
            "worstRoundTrip": "0.42 ms",
            "pathMTU": 1362,
            "worstPeers": [{"name": "node2", "state": "unreachable", "since": when, "cause": "nothing arrives"}],
        },
        "mtu": 1462,
        "versions": {"agent": "0.1.0", "ovs": "3.1.0", "kernel": "6.1"},
        "conditions": [condition],
        "observedAt": when,
    }
    merge = "application/merge-patch+json"
    url = f"{path}/node1/status?fieldValidation=Strict"
    assert cluster.call("PATCH", url, {"status": status}, content_type=merge).body["status"] == status
    head, row = map(str.split, cluster.kubectl("get", "mn", "node1").splitlines())
    assert head[3:6] == ["REACHABLE", "WORST-RTT", "MTU"]
    assert row[:7] == ["node1", "True", "7/9", "0.42", "ms", "1362", "Converged"]
    for bad in ({"mtu": "large"}, {"conditions": [condition | {"status": "Yes"}]}, {"conditions": [condition] * 2}):
        assert cluster.call("PATCH", url, {"status": bad}, content_type=merge).status == 422
    assert cluster.call("PATCH", url, {"status": {"peers": {"lost": 1}}}, content_type=merge).status in (400, 422)
