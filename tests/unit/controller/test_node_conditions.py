"""What a node's own report makes of its conditions, and all of them of the Mesh's status."""

from __future__ import annotations

from ovsmesh.controller.membership import Membership, NodeView, ObjectCondition
from ovsmesh.controller.node_conditions import AgentReport, changes, judge, mesh_status, orphans, parse_meshnode
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.support.meshkit import node as member

NOW = 1_780_000_000.0
NODE = NodeView("web1", "u1", "2026-05-28T20:00:00Z", ("192.0.2.1",), "", False, ("10.97.1.0/24",))
ENTRY = member("web1", "192.0.2.1", "10.97.1.0/24", uid="u1")
MEMBERSHIP = Membership((ENTRY,), {})
GOOD = AgentReport("web1", "u1", "2026-05-28T20:26:30Z", ObjectCondition("True", "AllThere", "1 of 1"))


def statuses(
    node: NodeView, membership: Membership, report: AgentReport | None, now: float = NOW
) -> tuple[str | None, ...]:
    found = judge(node, membership, report, now)
    return tuple(c.status if c else None for c in found)


def test_only_its_own_word_makes_a_node_ready() -> None:
    bad = GOOD._replace(converged=ObjectCondition("False", "RouteMissing", "1 of 3"))
    assert statuses(NODE, MEMBERSHIP, GOOD) == ("False", "True")
    assert statuses(NODE, MEMBERSHIP, bad) == ("True", "False")
    assert judge(NODE, MEMBERSHIP, bad, NOW).ready == ObjectCondition("False", "RouteMissing", "1 of 3")
    for nothing in (None, AgentReport("web1"), GOOD._replace(owner="other")):
        assert statuses(NODE, MEMBERSHIP, nothing) == ("True", "False")


def test_a_report_from_before_this_node_was_made_is_not_its_own() -> None:
    unowned = GOOD._replace(owner="")
    assert statuses(NODE, MEMBERSHIP, unowned) == ("False", "True")
    assert statuses(NODE, MEMBERSHIP, unowned._replace(observed_at="2026-05-28T19:00:00Z")) == ("True", "False")


def test_refused_excluded_kept_silent() -> None:
    refused = Membership((), {"web1": Problem(Reason.PodCIDRMissing, "has none", "web1")})
    assert statuses(NODE, refused, GOOD) == ("True", "False")
    kept = Membership((ENTRY,), {"web1": Problem(Reason.AddressMissing, "has none", "web1", fatal=False)})
    assert statuses(NODE, kept, GOOD) == ("False", "True")
    ready = judge(NODE, kept, GOOD, NOW).ready
    assert ready is not None and ready.reason == Reason.AddressMissing
    out = NODE._replace(excluded=True)
    assert statuses(out, MEMBERSHIP, GOOD) == (None, None)
    assert statuses(out._replace(ready=ObjectCondition("True", "", "")), MEMBERSHIP, GOOD) == (None, "False")
    assert statuses(NODE, MEMBERSHIP, GOOD, NOW + 901) == (None, "Unknown")


def test_what_is_right_is_not_written_again() -> None:
    wanted = judge(NODE, MEMBERSHIP, GOOD, NOW)
    first = changes(NODE, wanted, NOW)
    assert [(c["type"], c["status"]) for c in first] == [
        ("NetworkUnavailable", "False"),
        ("ovsmesh.io/MeshReady", "True"),
    ]
    assert wanted.network and wanted.ready
    there = NODE._replace(network=wanted.network, ready=wanted.ready._replace(since="2026-01-01T00:00:00Z"))
    assert changes(there, wanted, NOW) == []
    other = wanted._replace(ready=wanted.ready._replace(message="other"))
    (only,) = changes(there, other, NOW)
    assert only["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    (turned,) = changes(there, other._replace(ready=ObjectCondition("False", "R", "m")), NOW)
    assert turned["lastTransitionTime"] == only["lastHeartbeatTime"]


def test_mesh_status() -> None:
    good = mesh_status(MEMBERSHIP, 1, 7, (), {}, NOW)
    assert (good["nodes"], good["converged"], good["observedGeneration"]) == (1, 1, 7)
    assert [(c["type"], c["status"]) for c in good["conditions"]] == [("Ready", "True"), ("Degraded", "False")]
    assert mesh_status(MEMBERSHIP, 1, 7, (), good, NOW + 60) == good
    refused = Membership((ENTRY,), {"web2": Problem(Reason.PodCIDRMissing, "has none", "web2")})
    bad = mesh_status(refused, 1, 7, (), good, NOW + 60)
    ready = bad["conditions"][0]
    assert (ready["status"], ready["reason"]) == ("False", Reason.PodCIDRMissing) and "web2" in ready["message"]
    assert mesh_status(MEMBERSHIP, 0, 7, (), {}, NOW)["conditions"][0]["reason"] == Reason.Converging


def test_orphans_are_of_an_earlier_node_or_of_none_and_silent() -> None:
    old = AgentReport("gone", "", "2026-05-28T20:00:00Z", uid="m1", created="2026-05-28T19:00:00Z")
    alive = {"web1": "u1", "rack1": ""}
    assert orphans([old], alive, NOW) == [old]
    never = old._replace(observed_at="")
    assert orphans([never], alive, NOW) == [never]
    earlier = old._replace(name="web1", owner="u0", observed_at="2026-05-28T20:26:30Z")
    assert orphans([earlier], alive, NOW) == [earlier]
    for kept in (
        old._replace(name="web1"),
        old._replace(name="rack1"),
        old._replace(name="rack1", owner="u9"),
        earlier._replace(owner="u1"),
        earlier._replace(uid=""),
        old._replace(owner="u9"),  # the garbage collector's to remove
        old._replace(uid=""),  # someone else's
        old._replace(observed_at="2026-05-28T20:25:00Z"),
        never._replace(created="2026-05-28T20:25:00Z"),
        never._replace(created=""),
    ):
        assert orphans([kept], alive, NOW) == []


def test_parsing_a_meshnode() -> None:
    assert parse_meshnode({"metadata": {"name": "web1"}}) == AgentReport("web1")
    status = {
        "observedAt": "2026-05-28T20:26:30Z",
        "peers": {"wanted": 3, "installed": 2, "up": 1},
        "mtu": 1462,
        "versions": {"agent": "1", "ovs": "3.1.0", "kernel": "6.1"},
        "conditions": [{"type": "Converged", "status": "True", "reason": "R", "message": "m"}],
    }
    found = parse_meshnode(
        {"metadata": {"name": "web1", "ownerReferences": [{"kind": "Node", "uid": "u1"}], "uid": "m"}, "status": status}
    )
    assert found == AgentReport(
        "web1",
        "u1",
        "2026-05-28T20:26:30Z",
        ObjectCondition("True", "R", "m"),
        None,
        3,
        2,
        1,
        1462,
        "1",
        "3.1.0",
        "6.1",
        "m",
    )
    other = {"name": "web1", "uid": "m", "ownerReferences": [{"kind": "Pod", "uid": "p"}]}
    assert parse_meshnode({"metadata": other}) == AgentReport("web1")
