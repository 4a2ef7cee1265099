"""The controller's quorum on a real API server: what the agents of ten nodes report, written as they write it."""

from __future__ import annotations

import time
from collections.abc import Collection

import pytest

from tests.support.controllerkit import Cluster, Process, mesh, node
from tests.support.kubekit import eventually

pytestmark = pytest.mark.kube

NAMES = [f"web{number}" for number in range(1, 11)]
READY, ISOLATED = ("True", "MeshConverged"), ("False", "Isolated")


def ten(kube: Cluster) -> dict[str, str]:
    """Ten Nodes that reach each other; name → uid."""
    kube.add(mesh())
    for number, name in enumerate(NAMES, 1):
        kube.add(node(name, f"192.0.2.{number}", f"10.97.{number}.0/24"))
    kube.until_members(*NAMES)
    uids = {name: str(kube.members()[name]["uid"]) for name in NAMES}
    report(kube, uids)
    eventually(lambda: ready(kube) == dict.fromkeys(NAMES, READY))
    return uids


def report(kube: Cluster, uids: dict[str, str], *bad: tuple[str, str], silent: Collection[str] = ()) -> None:
    """Everybody's agent reports the pairs that packets are lost between, but those that are dead."""
    for name in NAMES:
        if name not in silent:
            lost = [a if b == name else b for a, b in bad if name in (a, b)]
            kube.report(name, True, "AsWanted", uids[name], lost=lost, wanted=9)


def ready(kube: Cluster) -> dict[str, tuple[str, str]]:
    nodes = kube.items("/api/v1/nodes")
    return {
        found["metadata"]["name"]: next(
            ((c["status"], c["reason"]) for c in found["status"]["conditions"] if c["type"] == "ovsmesh.io/MeshReady"),
            ("", ""),
        )
        for found in nodes
    }


def around(name: str) -> list[tuple[str, str]]:
    return [(name, peer) for peer in NAMES if peer != name]


@pytest.mark.parametrize("silent", [(), ("web3",)], ids=["its agent lives", "its agent is dead"])
def test_exactly_the_isolated_node_is_marked_and_cleared(
    kube: Cluster, controller: Process, silent: Collection[str]
) -> None:
    uids = ten(kube)
    report(kube, uids, *around("web3"), silent=silent)
    marked = dict.fromkeys(NAMES, READY) | {"web3": ISOLATED}
    eventually(lambda: ready(kube) == marked, 30)
    assert kube.conditions("web3")["NetworkUnavailable"] == ("True", "Isolated")
    assert {n: kube.conditions(n)["NetworkUnavailable"][0] for n in NAMES if n != "web3"} == dict.fromkeys(
        set(NAMES) - {"web3"}, "False"
    )
    eventually(lambda: "Isolated" in kube.events("web3"))
    assert not any("PeersUnreachable" in kube.events(name) for name in NAMES)
    eventually(lambda: {c["type"]: c["reason"] for c in kube.status()["conditions"]}["Degraded"] == "Isolated")
    report(kube, uids, silent=silent)
    eventually(lambda: ready(kube) == dict.fromkeys(NAMES, READY), 30)
    eventually(lambda: {c["type"]: c["status"] for c in kube.status()["conditions"]}["Degraded"] == "False")


def test_one_bad_pair_marks_nobody_and_gives_an_event_on_both_ends(kube: Cluster, controller: Process) -> None:
    uids = ten(kube)
    report(kube, uids, ("web1", "web2"))
    eventually(lambda: all("PeersUnreachable" in kube.events(name) for name in ("web1", "web2")), 30)
    assert ready(kube) == dict.fromkeys(NAMES, READY)
    found = [e for e in kube.items("/api/v1/namespaces/default/events") if e["reason"] == "PeersUnreachable"]
    assert {event["involvedObject"]["name"]: event["message"] for event in found} == {
        "web1": "packets are lost: web2 unreachable: nothing arrives from it",
        "web2": "packets are lost: web1 unreachable: nothing arrives from it",
    }


def test_a_controller_that_was_away_changes_nothing_and_one_that_starts_marks_nobody_too_early(kube: Cluster) -> None:
    first = kube.controller()
    uids = ten(kube)
    first.end()
    report(kube, uids, *around("web3"))
    report(kube, uids)
    second = kube.controller()
    eventually(second.leads)
    end = time.monotonic() + 8
    while time.monotonic() < end:
        assert ready(kube) == dict.fromkeys(NAMES, READY)
    # and one that finds a mark keeps it while it is right
    report(kube, uids, *around("web3"))
    marked = dict.fromkeys(NAMES, READY) | {"web3": ISOLATED}
    eventually(lambda: ready(kube) == marked, 30)
    second.end()
    third = kube.controller()
    eventually(third.leads)
    end = time.monotonic() + 8
    while time.monotonic() < end:
        assert ready(kube) == marked
    report(kube, uids)
    eventually(lambda: ready(kube) == dict.fromkeys(NAMES, READY), 30)


def test_a_mesh_that_falls_apart_marks_nobody_and_the_mesh_says_so(kube: Cluster, controller: Process) -> None:
    uids = ten(kube)
    report(kube, uids, *[(a, b) for a in NAMES[:5] for b in NAMES[5:]])
    eventually(lambda: {c["type"]: c["reason"] for c in kube.status()["conditions"]}["Degraded"] == "MeshSplit", 30)
    assert ready(kube) == dict.fromkeys(NAMES, READY)
    eventually(lambda: "MeshSplit" in kube.events("default"))
