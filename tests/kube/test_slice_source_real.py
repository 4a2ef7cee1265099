"""An agent's end of a real API server, with the token of its node and no other right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ovsmesh.agent.cluster import connect
from ovsmesh.kube import client
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.config import load
from ovsmesh.mesh.slice_source import SliceSource
from ovsmesh.names import MESH_NODES, MESH_SLICES
from tests.support import slicekit
from tests.support.controlplane import APISERVER, ControlPlane
from tests.support.kubekit import eventually
from tests.support.slicekit import LABELS, becomes, members, node, published, reasons, spec

pytestmark = pytest.mark.kube

state = pytest.fixture(slicekit.make_state)


def apply_slices(admin: Api, *specs: Object) -> None:
    for each in specs:
        name = f"default-{each['index']:03d}"
        body = {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "MeshSlice", "metadata": {"name": name, "labels": LABELS}}
        path = client.path_of(MESH_SLICES, name)
        admin.patch(path, {**body, "spec": each}, client.APPLY, fieldManager="test", force="true")


@pytest.fixture
def admin(cluster: ControlPlane) -> Iterator[Api]:
    with closing(Api(load(cluster.kubeconfig()))) as made:
        for name in ("n0", "n1"):
            made.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        yield made


def test_an_agent_s_own_token_is_enough_and_no_more(cluster: ControlPlane, admin: Api, state: Path) -> None:
    uid = admin.get("/api/v1/nodes/n0")["metadata"]["uid"]
    apply_slices(admin, spec(0, 2, node(0, uid=uid)), spec(1, 2, node(1)))
    config = cluster.token_kubeconfig("agent", cluster.agent_token("n0"))
    began = time.monotonic()
    mine = connect(str(config), str(state), "n0")
    source, writes = mine.source, mine.writer
    with closing(mine):
        assert members(source.snapshot()) == "n0 n1"
        print(f"connected and whole after {time.monotonic() - began:.3f} s")
        writes.publish(published(uid=uid))
        eventually(lambda: writes.writes == 1)
        found = admin.get(f"{MESH_NODES}/n0")
        assert found["status"]["peers"]["wanted"] == 1
        assert found["metadata"]["ownerReferences"][0]["uid"] == uid
        # a token that rotates while the watch is open, and a server that goes meanwhile
        cluster.token_file("agent").write_text(cluster.agent_token("n0"))
        cluster.kill(APISERVER)
        becomes(source, "n0 n1", confirmed=False)
        cluster.start(APISERVER)
        apply_slices(admin, spec(0, 2, node(0, uid=uid), node(2)))
        becomes(source, "n0 n1 n2")
        admin.delete(client.path_of(MESH_SLICES, "default-001"))
        assert reasons(becomes(source, "n0 n1 n2", confirmed=False)) == ["MeshSlicesIncomplete"]
        apply_slices(admin, spec(1, 2, node(1)))
        becomes(source, "n0 n1 n2")
    with closing(Api(load(config))) as agent:
        for path in ("/api/v1/nodes/n0", "/api/v1/nodes", "/api/v1/secrets", "/api/v1/namespaces/ovsmesh/secrets"):
            with pytest.raises(client.Forbidden):
                agent.get(path)
        with pytest.raises(client.Forbidden):
            agent.patch(f"{MESH_SLICES}/default-000", {"spec": {"count": 1}})
        other = {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "MeshNode", "metadata": {"name": "n1"}}
        with pytest.raises((client.Forbidden, client.Invalid)):
            agent.create(MESH_NODES, other)


def test_an_agent_sees_each_join_and_no_heartbeat(cluster: ControlPlane, admin: Api, state: Path) -> None:
    size, count = 100, 10
    groups = [[node(n) for n in range(i * size, i * size + size - 5)] for i in range(count)]
    apply_slices(admin, *(spec(i, count, *group) for i, group in enumerate(groups)))
    config = cluster.token_kubeconfig("agent", cluster.agent_token("n0"))
    with closing(Api(load(config))) as api, closing(SliceSource(api, state, "n0")) as source:
        eventually(lambda: source.snapshot().confirmed)

        def join(number: int) -> int:
            """Add a node to a slice, wait until the source has it; return the bytes that came."""
            before = source.received
            groups[number % count].append(node(2000 + number))
            apply_slices(admin, spec(number % count, count, *groups[number % count]))
            eventually(lambda: (mesh := source.snapshot().mesh) and mesh.node(f"n{2000 + number}"))
            return source.received - before

        sizes = [join(number) for number in range(20)]
        before = source.received
        for number in range(50):
            admin.patch("/api/v1/nodes/n1/status", {"status": {"nodeInfo": {"machineID": str(number)}}})
        join(20)
        # One slice came, perhaps a bookmark, and none of the 50 Nodes.
        assert source.received - before < max(sizes) + 2000
