"""An agent's end of a real API server, with the token of its node and no other right."""

from __future__ import annotations

import json
import select
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


@pytest.mark.timeout(180)
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


def test_joins_are_seen_soon_by_a_real_agent_s_source(cluster: ControlPlane, admin: Api, state: Path) -> None:
    size, count = 100, 10
    groups = [[node(n) for n in range(i * size, i * size + size - 5)] for i in range(count)]
    apply_slices(admin, *(spec(i, count, *group) for i, group in enumerate(groups)))
    config = cluster.token_kubeconfig("agent", cluster.agent_token("n0"))
    with closing(Api(load(config))) as api, closing(SliceSource(api, state, "n0")) as source:
        began = time.monotonic()
        eventually(lambda: source.snapshot().confirmed, every=0.005)
        print(f"950 nodes whole after {time.monotonic() - began:.3f} s")
        times = []
        for turn_ in range(20):
            number = 2000 + turn_
            group = groups[turn_ % count]
            group.append(node(number))
            began = time.monotonic()
            apply_slices(admin, spec(turn_ % count, count, *group))
            while (mesh := source.snapshot().mesh) is None or mesh.node(f"n{number}") is None:
                assert time.monotonic() - began < 20
                select.select(source.fds(), [], [], 1)
            times.append(time.monotonic() - began)
        # heartbeats of Nodes cost an agent nothing
        before = source.received
        for n in range(50):
            admin.patch("/api/v1/nodes/n1/status", {"status": {"nodeInfo": {"machineID": str(n)}}})
        assert source.received - before < 2000  # a bookmark, which may come at any time; a slice has 15 KB
    times.sort()
    print(f"slice written → mesh of 950: median {times[10] * 1000:.1f} ms, worst {times[-1] * 1000:.1f} ms")
    assert times[10] < 2.0
    assert json.loads((cluster.folder / "agent.kubeconfig").read_text())["kind"] == "Config"
