"""The report of a node: golden texts, verdicts, and what must hold for any."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ovsmesh.dataplane import desired
from ovsmesh.dataplane.plan import Blocked, Plan, Step, in_sync, plan
from ovsmesh.dataplane.report import ReportContext, Traffic, age, report, unmanaged_beside
from ovsmesh.dataplane.report_text import render_text
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.reasons import Reason

NOW = 1_800_000_000.0
NODES = tuple(
    Node(f"web{n}", ip_address(f"192.0.2.1{n}"), (ip_network(f"10.97.{n}.0/24"),), uid=f"uid-{n}") for n in (1, 2, 3)
)
MESH = Mesh((ip_network("10.97.0.0/16"),), NODES)
FACTS = Facts(underlay_mtu=1500)
WARNING, ERROR = Problem(Reason.MTUTooHigh, "is too high"), Problem(Reason.PodCIDRInvalid, "is no range", "web9")
STEP = Step("+", "fdb", "0a:58:0a:61:02:01", "obr0", None)
BLOCKED = Blocked(STEP, Unmanaged("fdb", STEP.key, "is in the way"))
HELD = Plan(held=(STEP._replace(op="-", have="obr0"),), held_peers=("web8",))
CONTEXT = ReportContext(
    NOW,
    agent_since=NOW - 3725,
    agent_version="0.1.0",
    ovs_version="3.1.0",
    mesh_from="/etc/ovsmesh/mesh.yaml",
    mesh_since=NOW - 185,
    last_change={"web2": (NOW - 61, "+ port gre-web2")},
)


def copy(dataplane: Any, **changes: Any) -> Any:
    return replace(dataplane, **{kind: dict(parts) for kind, parts in changes.items()})


def wanted(mesh: Any = MESH) -> Any:
    return desired.dataplane(mesh, "web1", FACTS)


def made(mesh: Any = MESH, observed: Any = None, context: Any = CONTEXT, problems: Any = ()) -> Any:
    want, refused = wanted(mesh)
    have = observed or Observed(want)
    todo = plan(want, have)
    every = (*problems, *refused, *have.problems)
    traffic = {"gre-web2": Traffic(12, 34, 1200, 3400, 0)}
    return report(mesh, "web1", FACTS, want, have, todo, every, in_sync(todo, have.problems), traffic, context)


def test_golden_converged() -> None:
    assert render_text(made()).splitlines() == [
        "web1 is converged: all 2 peers ok",
        "",
        "  node          web1 192.0.2.11 gre",
        "  pod CIDRs     10.97.1.0/24 (gateway 10.97.1.1)",
        "  MTU           1462 (underlay 1500 − 38 of gre)",
        "  Open vSwitch  3.1.0, datapath system",
        "  agent         0.1.0 running for 1h2m (since 2027-01-15T06:57:55Z)",
        "  mesh          /etc/ovsmesh/mesh.yaml, digest ce6fb1abe2d0, read 3m5s ago",
        "",
        "CONDITION    STATUS  REASON    MESSAGE",
        "Converged    True    AsWanted",
        "Degraded     False   AsWanted",
        "MeshCurrent  True    Read      from /etc/ovsmesh/mesh.yaml",
        "",
        "PEER  ADDRESS     POD CIDRS     PORT      RX  TX  ERRORS  CHANGED  STATE",
        "web2  192.0.2.12  10.97.2.0/24  gre-web2  12  34       0     1m1s  ok",
        "web3  192.0.2.13  10.97.3.0/24  gre-web3   -   -       -        -  ok",
    ]


def test_golden_degraded() -> None:
    want, _ = wanted()
    routes = {key: value for key, value in want.routes.items() if key[0] != "10.97.3.0/24"}
    ports = {name: port for name, port in want.ports.items() if name != "gre-web3"}
    unmanaged = Unmanaged("routes", "10.97.3.0/24", "an unmanaged route 10.97.3.0/24 via 192.0.2.254 dev eth0")
    have = Observed(copy(want, routes=routes, ports=ports), (unmanaged,))
    text = render_text(made(observed=have))
    lines = text.splitlines()
    assert lines[:2] == [
        "web1 is degraded: 1 of 2 peers not converged",
        "! web3: port gre-web3 remote 192.0.2.13 missing; "
        "route 10.97.3.0/24 via 10.97.3.1 dev kbr0 mtu 1462 missing: "
        "an unmanaged route 10.97.3.0/24 via 192.0.2.254 dev eth0",
    ]
    assert "Converged    False   Blocked       1 change to do, 1 blocked, 0 held" in lines
    assert "Degraded     True    PeersMissing  PeersMissing, Blocked" in lines
    assert lines[-1].endswith("missing: port gre-web3 remote 192.0.2.13 missing (+1)")


def test_switch_down_is_unknown_not_missing() -> None:
    want, _ = wanted()
    problem = Problem(Reason.SwitchDown, "ovs-vswitchd does not answer")
    have = Observed(copy(want, flows={}), (), (problem,), frozenset({"flows"}))
    found = made(observed=have)
    assert {peer.state for peer in found.peers} == {"unknown"}
    assert render_text(found).splitlines()[:2] == [
        "web1 is degraded: 2 of 2 peers not converged",
        "! ovs-vswitchd does not answer",
    ]


def test_refused_peer_says_why() -> None:
    nodes = (NODES[0], NODES[1], replace(NODES[2], address=ip_address("2001:db8::3")))
    found = made(replace(MESH, nodes=nodes))
    assert [peer.state for peer in found.peers] == ["ok", "refused"]
    assert "another address family" in found.peers[1].missing[0]
    assert found.count("wanted") == 1 and found.count("refused") == 1
    assert found.headline == "web1 is degraded: 1 of 2 peers not converged"


def test_held_removals_and_last_known_good() -> None:
    want, _ = wanted()
    small = replace(MESH, nodes=NODES[:1])
    have = Observed(want)
    todo = replace(plan(want, have), held=plan(wanted(small)[0], have).steps, held_peers=("web2", "web3"))
    context = replace(CONTEXT, mesh_current=False)
    found = report(small, "web1", FACTS, wanted(small)[0], have, todo, (), False, {}, context)
    assert found.headline == "web1 holds back the removal of 2 peers"
    assert [(peer.name, peer.state, peer.port) for peer in found.peers] == [
        ("web2", "held", "gre-web2"),
        ("web3", "held", "gre-web3"),
    ]
    conditions = {c.type: c for c in found.conditions}
    assert conditions["RemovalHeld"].message == "2 peers: web2, web3"
    assert conditions["MeshCurrent"].reason == Reason.LastKnownGood and "3m5s old" in conditions["MeshCurrent"].message
    assert "last known good" in render_text(found)


@pytest.mark.parametrize(
    ("todo", "problems", "converged", "headline", "reasons"),
    [
        (Plan(), (), True, "web1 is converged: all 2 peers ok", ["AsWanted", "AsWanted"]),
        (Plan(), (WARNING,), True, "web1 is converged: all 2 peers ok", ["AsWanted", "AsWanted"]),
        (Plan(), (ERROR,), True, "web1 is converged, with problems: all 2 peers ok", ["AsWanted", "PodCIDRInvalid"]),
        (Plan(), (ERROR,), False, "web1 is degraded: see below", ["Pending", "PodCIDRInvalid"]),
        (Plan((STEP,)), (), False, "web1 is not converged: 1 change to do", ["Pending", "AsWanted"]),
        (Plan((STEP,), (BLOCKED,)), (), False, "web1 is degraded: 1 part blocked", ["Blocked", "Blocked"]),
        (HELD, (), False, "web1 holds back the removal of 1 peer", ["RemovalHeld", "AsWanted", "MassRemovalHeld"]),
        (replace(HELD, steps=(STEP,)), (), False, "web1 holds back the", ["Pending", "AsWanted", "MassRemovalHeld"]),
    ],
)
def test_headline_and_reasons(todo: Plan, problems: Any, converged: bool, headline: str, reasons: list[str]) -> None:
    want, _ = wanted()
    found = report(MESH, "web1", FACTS, want, Observed(want), todo, problems, converged, {}, CONTEXT)
    assert found.headline.startswith(headline) and found.converged is converged
    assert [c.reason for c in found.conditions] == [*reasons, "Read"]


def test_unmanaged_objects_that_block_nothing_are_named() -> None:
    beside = Unmanaged("ports", "alien", "port alien is not managed", False)
    have = Observed(Dataplane(), (BLOCKED.unmanaged, beside))
    assert list(map(str, unmanaged_beside(have, Plan(blocked=(BLOCKED,))))) == [beside.detail]


def test_no_mesh_yet() -> None:
    found = report(None, "web1", None, None, None, Plan(), (), False, {}, ReportContext(NOW))
    assert "waits for a mesh" in render_text(found) and "not running" in render_text(found)
    assert found.to_dict()["conditions"][0]["status"] == "Unknown"


def test_problems_first_and_bounded() -> None:
    problems = [Problem(Reason.TurnFailed, f"trouble {n}", fatal=False) for n in range(20)]
    problems.append(Problem(Reason.ApplyFailed, "the worst"))
    lines = render_text(made(problems=problems)).splitlines()
    assert lines[0] == "web1 is converged, with problems: all 2 peers ok"
    assert lines[1] == "! the worst" and lines[9] == "and 13 more"


def test_filter_peers_that_can_not_be_had_are_not_missing() -> None:
    want, _ = wanted()
    want = replace(want, rules={}, filter_peers={})
    found = report(MESH, "web1", FACTS, want, Observed(want), Plan(), (), True, {}, CONTEXT)
    assert found.count("ok") == 2


def test_dict_is_json_with_camel_case_names() -> None:
    plain = made().to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["self"]["podCIDRs"] == ["10.97.1.0/24"] and plain["self"]["mtuFrom"]
    assert plain["peers"][0]["traffic"]["rxPackets"] == 12
    assert plain["peers"][0]["lastChange"] == "2027-01-15T07:58:59Z"
    assert "traffic" not in plain["peers"][1]


def test_text_can_not_steer_a_terminal() -> None:
    want, _ = wanted()
    have = Observed(want, (Unmanaged("ports", "evil", "port \x1b[2J\x07evil\nroot", False),))
    text = render_text(made(observed=have))
    assert "\x1b" not in text and "port ?[2J?evil?root" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.9, "59s"), (60, "1m0s"), (3725, "1h2m"), (86400, "1d")],
)
def test_age(seconds: Any, text: Any) -> None:
    assert age(seconds) == text


def test_empty_observed() -> None:
    found = made(observed=Observed(Dataplane()))
    assert {peer.state for peer in found.peers} == {"missing"}
    assert len(render_text(found).splitlines()) < 30
