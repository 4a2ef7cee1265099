"""The mesh from MeshSlices: whole or the last good one, whatever the API server does."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from ovsmesh.controller.slice_layout import assign
from ovsmesh.kube.client import Object
from ovsmesh.mesh.manifest import dump
from ovsmesh.mesh.meshslice import parse_slice
from ovsmesh.mesh.slice_source import SliceSource
from ovsmesh.mesh.types import Mesh, MeshSettings, Node
from ovsmesh.names import MESH_SLICES
from tests.support import slicekit
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub
from tests.support.meshkit import node as mesh_node
from tests.support.slicekit import CLUSTER, LABELS, SETTINGS, Open, becomes, members, node, put, reasons, spec

stub = pytest.fixture(slicekit.make_stub)
state = pytest.fixture(slicekit.make_state)
open_source = pytest.fixture(slicekit.make_open_source)


# ---------------------------------------------------------------- whole or not at all


def test_slices_become_a_mesh(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 2, node(0), node(2, zone="z"), key=7, mtu=1400)
    put(stub, 1, 2, node(1), key=7, mtu=1400)
    source = open_source()
    found = becomes(source, "n0 n1 n2")
    assert found.mesh is not None
    assert (found.mesh.key, found.mesh.mtu, found.mesh.encapsulation) == (7, 1400, "gre")
    assert found.mesh.nodes[2].zone == "z"
    assert found.mesh.nodes[2].uid == "u2"
    assert found.problems == ()
    assert source.snapshot() is found
    assert source.observed() == {"default-000": "101", "default-001": "102"}
    put(stub, 1, 2, node(1), node(3), key=7, mtu=1400)
    later = becomes(source, "n0 n1 n2 n3")
    assert later.mesh is not None
    assert later.mesh.nodes[0] is found.mesh.nodes[0]
    assert source.observed()["default-001"] == "103"


def test_what_is_not_whole_is_not_handed_on(stub: Stub, open_source: Open) -> None:
    source = open_source()
    assert reasons(becomes(source, "-", False)) in (["MeshWaiting"], ["MeshSlicesMissing"])
    put(stub, 1, 2, node(1))
    eventually(lambda: reasons(source.snapshot()) == ["MeshSlicesIncomplete"])
    assert members(source.snapshot()) == "-"
    put(stub, 0, 2, node(0))
    becomes(source, "n0 n1")


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_slice_deleted_by_hand_removes_nobody(stub: Stub, open_source: Open, gone: int) -> None:
    for index in range(3):
        put(stub, index, 3, node(index))
    source = open_source()
    before = becomes(source, "n0 n1 n2")
    stub.remove(f"{MESH_SLICES}/default-{gone:03d}")
    kept = becomes(source, "n0 n1 n2", confirmed=False)
    assert kept.mesh is before.mesh
    assert reasons(kept) == ["MeshSlicesIncomplete"]
    assert not any(p.fatal for p in kept.problems)
    put(stub, gone, 3, node(gone))
    assert becomes(source, "n0 n1 n2").problems == ()


def test_all_slices_deleted_removes_nobody(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 1, node(0), node(1))
    source = open_source()
    becomes(source, "n0 n1")
    stub.remove(f"{MESH_SLICES}/default-000")
    kept = becomes(source, "n0 n1", confirmed=False)
    assert reasons(kept) == ["MeshSlicesMissing"]


def test_settings_change_for_all_at_once(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 2, node(0))
    put(stub, 1, 2, node(1))
    source = open_source()
    becomes(source, "n0 n1")
    put(stub, 1, 2, node(1), generation=2, key=9)
    kept = becomes(source, "n0 n1", confirmed=False)
    assert kept.mesh is not None
    assert kept.mesh.key is None
    put(stub, 0, 2, node(0), generation=2, key=9)
    found = becomes(source, "n0 n1")
    assert found.mesh is not None
    assert found.mesh.key == 9


def test_fewer_slices_are_whole_when_slice_0_says_so(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 2, node(0))
    put(stub, 1, 2, node(1))
    source = open_source()
    becomes(source, "n0 n1")
    put(stub, 0, 1, node(0), node(1))
    stub.remove(f"{MESH_SLICES}/default-001")
    becomes(source, "n0 n1")
    put(stub, 0, 1, node(0))
    becomes(source, "n0")


def test_a_node_without_a_place_waits(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 1, node(1))
    source = open_source()
    eventually(lambda: reasons(source.snapshot()) == ["SelfMissing"])
    assert members(source.snapshot()) == "-"
    put(stub, 0, 1, node(0), node(1))
    becomes(source, "n0 n1")
    put(stub, 0, 1, node(1))
    assert reasons(becomes(source, "n0 n1", confirmed=False)) == ["SelfMissing"]


def test_a_bad_entry_costs_its_node_only(stub: Stub, open_source: Open) -> None:
    bad = [
        node(1, address="nonsense"),
        node(2, podCIDRs=["10.0.2.1/24"]),
        node(3, podCIDRs=["172.16.0.0/24"]),
        node(4, podCIDRs=[]),
        {"name": "n5"},
        {"name": 6},
        "n7",
        node(8, podCIDRs=["10.0.0.0/25"]),
    ]
    put(stub, 0, 1, node(0), *bad, node(9))  # type: ignore[arg-type]
    found = becomes(open_source(), "n0 n9")
    told = {(p.node, p.reason) for p in found.problems}
    assert told == {
        ("n1", "AddressInvalid"),
        ("n2", "PodCIDRInvalid"),
        ("n3", "PodCIDROutside"),
        ("n4", "PodCIDRMissing"),
        ("n5", "AddressMissing"),
        ("nodes[6]", "NameInvalid"),
        ("nodes[7]", "NodeInvalid"),
        ("n8", "PodCIDRConflict"),
    }
    assert not any(p.fatal for p in found.problems)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {**SETTINGS, "clusterCIDRs": []}},
        {"settings": {**SETTINGS, "encapsulation": "carrier pigeon"}},
        {"settings": None},
        {"index": "0"},
        {"count": None},
    ],
)
def test_a_slice_edited_to_nonsense_changes_nothing(stub: Stub, open_source: Open, change: Object) -> None:
    put(stub, 0, 1, node(0), node(1))
    source = open_source()
    before = becomes(source, "n0 n1")
    stub.put(f"{MESH_SLICES}/default-000", {**spec(0, 1, node(0)), **change}, labels=LABELS)
    kept = becomes(source, "n0 n1", confirmed=False)
    assert kept.mesh is before.mesh
    assert reasons(kept)[0] in ("MeshSlicesInvalid", "MeshSlicesIncomplete", "MeshSlicesMissing")
    put(stub, 0, 1, node(0), node(1), node(2))
    becomes(source, "n0 n1 n2")


def test_a_node_made_again_replaces_its_old_entry_whole(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 2, node(0), node(5))
    put(stub, 1, 2, node(1))
    source = open_source()
    becomes(source, "n0 n1 n5")
    put(stub, 1, 2, node(1), {**node(6), "name": "n5"})  # in both for a moment
    put(stub, 0, 2, node(0))

    def five() -> list[str]:
        mesh = becomes(source, "n0 n1 n5").mesh
        found = mesh.node("n5") if mesh else None
        return [found.uid, str(found.address), str(found.pod_cidrs[0])] if found else []

    assert five() in (["u5", "192.0.0.6", "10.0.5.0/24"], ["u6", "192.0.0.7", "10.0.6.0/24"])
    eventually(lambda: five() == ["u6", "192.0.0.7", "10.0.6.0/24"])


def nodes_of(source: SliceSource) -> tuple[Node, ...]:
    mesh = source.snapshot().mesh
    return mesh.nodes if mesh else ()


def member(number: int) -> Node:
    n = node(number)
    return mesh_node(n["name"], n["address"], *n["podCIDRs"], uid=n["uid"])


def test_what_the_controller_writes_is_what_the_agent_reads(stub: Stub, open_source: Open) -> None:
    wanted = [member(number) for number in range(1000)]
    settings = MeshSettings((ip_network(CLUSTER),), key=3)
    for write in assign("default", wanted, settings, 4, ()):
        stub.put(f"{MESH_SLICES}/{write.name}", write.spec, labels=LABELS)
    source = open_source()
    eventually(lambda: source.snapshot().confirmed)
    mesh = source.snapshot().mesh
    assert mesh is not None
    assert list(mesh.nodes) == sorted(wanted, key=lambda node: node.name)
    assert mesh.key == 3
    for number in range(1000, 1030):
        wanted.append(member(number))
        there = [parse_slice(o) for p, o in stub.objects.items() if p.startswith(MESH_SLICES)]
        for write in assign("default", wanted, settings, 4, there):
            stub.put(f"{MESH_SLICES}/{write.name}", write.spec, labels=LABELS)
        eventually(lambda number=number: len(nodes_of(source)) == number + 1, every=0.005)  # type: ignore[misc]


def test_a_slice_that_the_controller_did_not_name_is_ignored(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 1, node(0), node(1))
    stub.put(f"{MESH_SLICES}/default-evil", spec(0, 1, node(0), node(7)), labels=LABELS)
    put(stub, 1, 2, node(2))  # not counted by slice 0
    assert becomes(open_source(), "n0 n1").problems == ()


def test_slices_of_one_generation_with_different_settings_are_not_whole(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 2, node(0))
    put(stub, 1, 2, node(1))
    source = open_source()
    becomes(source, "n0 n1")
    put(stub, 1, 2, node(1), key=9)
    assert reasons(becomes(source, "n0 n1", confirmed=False)) == ["MeshSlicesIncomplete"]


# ---------------------------------------------------------------- the API server away


def lose_and_find(stub: Stub, source: SliceSource) -> None:
    before = becomes(source, "n0 n1")
    stub.down()
    away = becomes(source, "n0 n1", confirmed=False)
    assert away.mesh is before.mesh
    assert reasons(away) == ["ApiUnavailable"]
    put(stub, 0, 1, node(0), node(1), node(2))
    stub.up()
    assert becomes(source, "n0 n1 n2").problems == ()


def test_the_api_server_away_and_back(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 1, node(0), node(1))
    lose_and_find(stub, open_source())


def test_a_start_without_api_server_uses_the_last_good_mesh_at_once(stub: Stub, open_source: Open) -> None:
    put(stub, 0, 1, node(0), node(1))
    first = open_source()
    becomes(first, "n0 n1")
    assert first.commit() == ()
    first.close()
    stub.down()
    source = open_source()
    assert source.settled(20.0)
    found = source.snapshot()
    assert members(found) == "n0 n1"
    assert not found.confirmed
    assert reasons(found) == ["ApiUnavailable"]
    assert not any(p.fatal for p in found.problems)
    assert source.observed() == {}
    put(stub, 0, 1, node(0))
    stub.up()
    becomes(source, "n0")


def test_a_start_with_a_silent_api_server_uses_the_last_good_mesh_before_it_answers(
    stub: Stub, open_source: Open, state: Path
) -> None:
    mesh = Mesh((), ())
    put(stub, 0, 1, node(0), node(1))
    first = open_source()
    mesh = becomes(first, "n0 n1").mesh or mesh
    (state / "mesh.json").write_text(dump(mesh))
    stub.delay = 5.0
    source = open_source()
    assert reasons(becomes(source, "n0 n1", confirmed=False)) == ["ApiUnavailable"]
    stub.delay = 0.0
    becomes(source, "n0 n1")


@pytest.mark.parametrize("text", ["", "garbage: [", "{}"])
def test_a_last_good_mesh_that_is_garbage_is_said_to_be(stub: Stub, open_source: Open, state: Path, text: str) -> None:
    (state / "mesh.json").write_text(text)
    put(stub, 0, 1, node(0))
    source = open_source()
    assert reasons(becomes(source, "n0")) == ["LastGoodUnreadable"]
    source.commit()
    assert reasons(source.snapshot()) == []


@pytest.mark.parametrize("fault", ["410", "410 event", "500 event", "garbage", "no object", "half", "cut", "stall"])
def test_whatever_a_watch_does_the_mesh_follows(stub: Stub, open_source: Open, fault: str) -> None:
    stub.faults = [fault]
    put(stub, 0, 1, node(0), node(1))
    source = open_source(silence=0.5)
    becomes(source, "n0 n1", confirmed=source.snapshot().confirmed)
    eventually(lambda: stub.count("WATCH"))
    put(stub, 0, 1, node(0), node(1), node(2))
    assert becomes(source, "n0 n1 n2").problems == ()
