"""Our objects edited and deleted by hand, field by field: refused by the schema, or put right by whose it is.

On a real API server, by an administrator, against a real controller and a real agent's writer with their own tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovsmesh.agent.meshnode import MeshNodeWriter
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.kube.client import JSON, MERGE, Api
from ovsmesh.kube.config import load
from tests.support import slicekit
from tests.support.controllerkit import Cluster, Object, mesh, node
from tests.support.kubekit import GROUP, MANIFESTS, NAMESPACE, eventually
from tests.support.slicekit import published

pytestmark = pytest.mark.kube

state = pytest.fixture(slicekit.make_state)
CRDS = {crd["spec"]["names"]["kind"]: crd for crd in yaml.safe_load_all((MANIFESTS / "crds.yaml").read_text())}
GONE = object()
"""Instead of a value: the field is removed."""
Edits = dict[str, list[Any]]


def leaves(kind: str, top: str) -> set[str]:
    """Each field of the schema below `top`, as a JSON pointer; the first item stands for a list of objects."""
    (only,) = CRDS[kind]["spec"]["versions"]

    def walk(schema: Object, path: str) -> Iterator[str]:
        yield path
        for name, below in schema.get("properties", {}).items():
            yield from walk(below, f"{path}/{name}")
        if schema.get("items", {}).get("type") == "object":
            yield from walk(schema["items"], f"{path}/0")

    return set(walk(only["schema"]["openAPIV3Schema"]["properties"][top], f"/{top}"))


def edit(kube: Cluster, path: str, field: str, value: Any) -> int:
    """The API server's answer to an administrator's `kubectl edit`."""
    step = {"op": "remove", "path": field} if value is GONE else {"op": "add", "path": field, "value": value}
    return kube.plane.call("PATCH", path, [step], content_type=JSON).status


SLICE: Edits = {
    "/spec": [GONE, {}, 7],
    "/spec/mesh": ["other", "", 7, GONE],
    "/spec/index": [0, 7, -1, "x", GONE],
    "/spec/count": [3, 99, 1, 0, "x", GONE],
    "/spec/meshGeneration": [0, -1, "x", GONE],
    "/spec/settings": [{}, GONE],
    "/spec/settings/clusterCIDRs": [["10.96.0.0/12"], [], ["nonsense"], ["10.97.0.1/16"], GONE],
    "/spec/settings/encapsulation": ["vxlan", "pigeon", GONE],
    "/spec/settings/key": [9, -1, 1 << 32, "x"],
    "/spec/settings/mtu": [1400, 1, "large", GONE],
    "/spec/nodes": [[], GONE, [{"name": "evil", "address": "203.0.113.1", "podCIDRs": ["10.97.200.0/24"]}]],
    "/spec/nodes/0": [GONE, {}, "web1"],
    "/spec/nodes/0/name": ["evil", "", "-", 7, GONE],
    "/spec/nodes/0/uid": ["other", "", 7, GONE],
    "/spec/nodes/0/address": ["203.0.113.9", "127.0.0.1", "nonsense", "", GONE],
    "/spec/nodes/0/podCIDRs": [["10.97.99.0/24"], [], ["10.97.1.1/24"], ["nonsense"], ["10.97.1.0/31"], GONE],
    "/spec/nodes/0/zone": ["elsewhere", "z" * 300, 7],
    "/metadata/labels": [{}, {"ovsmesh.io/mesh": "other"}],
}


def test_a_slice_edited_by_hand(kube: Cluster) -> None:
    assert set(SLICE) - {"/metadata/labels"} == leaves("MeshSlice", "spec")
    kube.add(mesh("10.97.0.0/16"))
    for number in range(1, 104):
        kube.add(node(f"web{number:03d}", f"192.0.2.{number}", f"10.97.{number}.0/24"))
    controller = kube.controller()
    eventually(lambda: len(kube.members()) == 103)
    path = f"{GROUP}/meshslices/default-001"

    def now() -> list[Object]:
        """All that agents read, but for the generation, which may grow for all alike, and the nodes' order."""
        found = kube.slices()
        assert len({one["spec"]["meshGeneration"] for one in found}) == 1
        made = []
        for one in found:
            spec = one["spec"]
            # a key of null is the same as none
            settings = {key: value for key, value in spec["settings"].items() if value is not None}
            same = {"meshGeneration": 0, "settings": settings, "nodes": sorted(spec["nodes"], key=lambda n: n["name"])}
            made.append(one["metadata"]["labels"] | spec | same)
        return made

    def right() -> bool:
        try:
            return now() == before
        except (AssertionError, KeyError):
            return False

    before = now()
    refused = repaired = 0
    for field, values in SLICE.items():
        for value in values:
            status = edit(kube, path, field, value)
            assert status in (200, 400, 422), (field, value, status)
            refused, repaired = refused + (status != 200), repaired + (status == 200)
            told = f"{field} = {value!r}: {status}"
            try:
                eventually(right)
            except AssertionError:
                pytest.fail(f"not put right: {told}: {now()[1]}")
    for name in ("default-000", "default-001"):
        kube.api.delete(f"{GROUP}/meshslices/{name}")
        eventually(right)
    print(f"{refused} edits refused, {repaired} put right")
    assert refused > 30 and repaired > 15
    assert controller.leads()


MESH: Edits = {
    "/spec": [GONE, 7],
    "/spec/clusterCIDRs": [[], ["nonsense"], ["10.97.0.1/16"], ["10.97.0.0/16", "10.97.1.0/24"], "10.97.0.0/16", GONE],
    "/spec/encapsulation": ["pigeon", 7],
    "/spec/key": [-1, 1 << 32, "x"],
    "/spec/mtu": [1, 65536, "large"],
    "/spec/allocatePodCIDRs": ["yes", 1],
    "/spec/nodeSubnetLength": [0, 127, "x"],
    "/spec/nodes": [{}, [7]],
    "/spec/nodes/0": [{}, 7],
    "/spec/nodes/0/name": ["", "-x-", 7, GONE],
    "/spec/nodes/0/address": ["127.0.0.1", "nonsense", GONE],
    "/spec/nodes/0/podCIDRs": [[], ["10.97.250.1/24"], ["10.98.0.0/24"], GONE],
}
MESH_STATUS: Edits = {
    "/status": [GONE, {}, 7],
    "/status/nodes": [99, -1, "x", GONE],
    "/status/converged": [99, "x", GONE],
    "/status/observedGeneration": [99, "x", GONE],
    "/status/conditions": [[], GONE, "x"],
    "/status/conditions/0": [GONE, {}],
    "/status/conditions/0/type": ["Other", GONE],
    "/status/conditions/0/status": ["Unknown", "Maybe", GONE],
    "/status/conditions/0/reason": ["Edited", "", GONE],
    "/status/conditions/0/message": ["edited", 7, GONE],
    "/status/conditions/0/lastTransitionTime": ["yesterday", GONE],
    "/status/conditions/0/observedGeneration": [99, -1],
}


def test_a_mesh_edited_by_hand(kube: Cluster) -> None:
    """Its spec is the user's: what is bad is refused. Its status is the controller's, who puts it right."""
    assert set(MESH) == leaves("Mesh", "spec")
    assert set(MESH_STATUS) == leaves("Mesh", "status")
    rack = {"name": "rack1", "address": "198.51.100.1", "podCIDRs": ["10.97.250.0/24"]}
    kube.add(mesh("10.97.0.0/16", nodes=[rack]))
    kube.add(node("web1", "192.0.2.1", "10.97.1.0/24"))
    kube.controller()
    kube.until_members("rack1", "web1")
    path = f"{GROUP}/meshes/default"
    spec, slices = kube.api.get(path)["spec"], kube.slices()
    for field, values in MESH.items():
        for value in values:
            assert edit(kube, path, field, value) in (400, 422), (field, value)
    assert kube.api.get(path)["spec"] == spec
    assert kube.slices() == slices

    eventually(lambda: kube.status().get("nodes") == 2)

    def now() -> Object:
        """The times of conditions may begin again."""
        found = kube.status()
        conditions = [{k: v for k, v in c.items() if k != "lastTransitionTime"} for c in found.get("conditions", ())]
        return found | {"conditions": conditions}

    wanted = now()
    for field, values in MESH_STATUS.items():
        for value in values:
            status = edit(kube, f"{path}/status", field, value)
            assert status in (200, 400, 422), (field, value, status)
            try:
                eventually(lambda: now() == wanted)
            except AssertionError:
                pytest.fail(f"not put right: {field} = {value!r}: {status}: {now()}")


MESHNODE: Edits = {
    "/status": [GONE, {}, 7],
    "/status/observedSlices": [{}, {"default-000": "1"}, {"default-000": "7", "more": "1"}, {"default-000": 7}, GONE],
    "/status/peers": [{}, 7, GONE],
    "/status/peers/wanted": [9, -1, "x", GONE],
    "/status/peers/installed": [9, -1, "x", GONE],
    "/status/peers/up": [9, -1, "x", GONE],
    "/status/reachability": [{}, 7, GONE],
    "/status/reachability/reachable": ["9/9", "9" * 40, 9, GONE],
    "/status/reachability/unreachable": [0, -1, "x", GONE],
    "/status/reachability/unprobed": [9, -1, "x", GONE],
    "/status/reachability/worstRoundTrip": ["0.01 ms", "9" * 40, 7, GONE],
    "/status/reachability/pathMTU": [576, -1, "x", GONE],
    "/status/reachability/worstPeers": [[], "x", GONE],
    "/status/reachability/worstPeers/0": [GONE, {}],
    "/status/reachability/worstPeers/0/name": ["other", "", 7, GONE],
    "/status/reachability/worstPeers/0/state": ["ok", "s" * 70, 7, GONE],
    "/status/reachability/worstPeers/0/since": ["2020-01-01T00:00:00Z", "yesterday", 7, GONE],
    "/status/reachability/worstPeers/0/cause": ["nobody's fault", "c" * 300, 7, GONE],
    "/status/mtu": [9, -1, "x", GONE],
    "/status/versions": [{}, 7, GONE],
    "/status/versions/agent": ["0", "v" * 200, 7, GONE],
    "/status/versions/ovs": ["0", "v" * 200, 7, GONE],
    "/status/versions/kernel": ["0", "v" * 200, 7, GONE],
    "/status/observedAt": ["2020-01-01T00:00:00Z", "yesterday", 7, GONE],
    "/status/conditions": [[], "x", GONE],
    "/status/conditions/0": [GONE, {}],
    "/status/conditions/0/type": ["Other", GONE],
    "/status/conditions/0/status": ["False", "Maybe", GONE],
    "/status/conditions/0/reason": ["Edited", "", GONE],
    "/status/conditions/0/message": ["edited", 7, GONE],
    "/status/conditions/0/lastTransitionTime": ["yesterday", GONE],
    "/status/conditions/0/observedGeneration": [99, -1],
}


def test_a_meshnode_edited_or_deleted_by_hand(kube: Cluster, state: Path) -> None:
    """Its own agent puts it right; with its token, which may write no other."""
    assert set(MESHNODE) == leaves("MeshNode", "status")
    made = kube.add(node("n0", "192.0.2.1", "10.0.1.0/24"))
    config = kube.plane.token_kubeconfig("by-hand", kube.plane.agent_token("n0"))
    path = f"{GROUP}/meshnodes/n0"

    def now() -> Object:
        status = kube.api.get(path).get("status") or {}
        conditions = [{k: v for k, v in c.items() if k != "lastTransitionTime"} for c in status.get("conditions") or ()]
        return status | {"conditions": conditions, "observedAt": ""}

    with closing(Api(load(config))) as api:
        writer = MeshNodeWriter(api, "n0", lambda: {"default-000": "7"}, check=0.2).start()
        with closing(writer):
            reach = {"y": Reach(State.OK, 1.0, 0.002), "z": Reach(State.UNREACHABLE, 1.0)}
            writer.publish(published(uid=made["metadata"]["uid"], reach=reach))
            eventually(lambda: writer.writes == 1)
            wanted = now()
            for field, values in MESHNODE.items():
                for value in values:
                    before = writer.writes
                    status = edit(kube, f"{path}/status", field, value)
                    assert status in (200, 400, 422), (field, value, status)
                    if status == 200:
                        eventually(lambda before=before: writer.writes > before, 10)  # type: ignore[misc]
                    assert now() == wanted, (field, value, status)
            kube.api.delete(path)
            eventually(lambda: kube.plane.call("GET", path).status == 200 and now() == wanted)
            owner = kube.api.get(path)["metadata"]["ownerReferences"][0]
            assert owner["uid"] == made["metadata"]["uid"]


def test_a_node_made_again_gets_a_meshnode_of_its_own_soon(kube: Cluster, state: Path) -> None:
    """The old one is the earlier Node's: it says nothing of this one, and its agent may not remove it."""
    kube.add(mesh("10.0.0.0/8"))
    kube.controller()

    def joined(uid: str) -> bool:
        said = kube.plane.call("GET", f"{GROUP}/meshnodes/n0").body.get("metadata", {}).get("ownerReferences", ())
        ready = kube.conditions("n0").get("ovsmesh.io/MeshReady")
        return [owner["uid"] for owner in said] == [uid] and ready == ("True", "MeshConverged")

    first = kube.add(node("n0", "192.0.2.1", "10.0.1.0/24"))["metadata"]["uid"]
    config = kube.plane.token_kubeconfig("again", kube.plane.agent_token("n0"))
    with closing(Api(load(config))) as api, closing(MeshNodeWriter(api, "n0", dict).start()) as writer:
        writer.publish(published(uid=first))
        eventually(lambda: joined(first))
        kube.remove("n0")
        pod = f"/api/v1/namespaces/{NAMESPACE}/pods/ovsmesh-agent-n0?gracePeriodSeconds=0"
        assert kube.plane.call("DELETE", pod).status in (200, 404)
        second = kube.add(node("n0", "192.0.2.1", "10.0.2.0/24"))["metadata"]["uid"]
        kube.plane.token_file("again").write_text(kube.plane.agent_token("n0"))
        writer.publish(published(uid=second))
        eventually(lambda: joined(second))


def test_meshnodes_of_nobody_are_removed(kube: Cluster) -> None:
    """Those that no Node owns, of nodes that are gone, long silent; no living one's."""
    rack = {"name": "rack1", "address": "198.51.100.1", "podCIDRs": ["10.97.250.0/24"]}
    kube.add(mesh("10.97.0.0/16", nodes=[rack]))
    kube.add(node("web1", "192.0.2.1", "10.97.1.0/24"))
    for name in ("web1", "rack1", "gone", "fresh"):
        kube.report(name, True)
        if name != "fresh":
            old = {"status": {"observedAt": "2020-01-01T00:00:00Z"}}
            kube.api.patch(f"{GROUP}/meshnodes/{name}/status", old, MERGE)
    kube.controller()
    kube.until_members("rack1", "web1")
    eventually(lambda: kube.plane.call("GET", f"{GROUP}/meshnodes/gone").status == 404)
    time.sleep(0.5)
    assert sorted(item["metadata"]["name"] for item in kube.items(f"{GROUP}/meshnodes")) == ["fresh", "rack1", "web1"]
