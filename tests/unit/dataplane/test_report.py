"""The report of a node: golden texts, verdicts, and what must hold for any."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ovsmesh.dataplane import desired
from ovsmesh.dataplane.node_report import report, unmanaged_beside
from ovsmesh.dataplane.plan import Blocked, Plan, Step, in_sync, plan
from ovsmesh.dataplane.report import NOT_REACHED, Agent, ReconcileResult, ReportContext, Traffic
from ovsmesh.dataplane.report_text import problem_lines, render_text
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Reach, State, Unmanaged
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
HOLD = Problem(Reason.MassRemovalHeld, "1 of this node's peers is missing from the mesh")
HELD = Plan(held=(STEP._replace(op="-", have="obr0"),), held_peers=("web8",))
OK = Reach(State.OK, NOW - 600, round_trip=0.0004, loss=0.0, sent=9)
CONTEXT = ReportContext(
    NOW,
    Agent(NOW - 3725, "0.1.0"),
    ovs_version="3.1.0",
    traffic={"gre-web2": Traffic(12, 34567, 1200, 3400, 0)},
    mesh_from="/etc/ovsmesh/mesh.yaml",
    reach={"web2": OK, "web3": OK},
    last_change={"web2": (NOW - 61, "+ port gre-web2")},
)


def copy(dataplane: Any, **changes: Any) -> Any:
    return replace(dataplane, **{kind: dict(parts) for kind, parts in changes.items()})


def wanted(mesh: Any = MESH) -> Any:
    return desired.dataplane(mesh, "web1", FACTS)


def found_by(mesh: Any, have: Any, todo: Plan, problems: Any, converged: bool, **more: Any) -> ReconcileResult:
    more = {"mesh_current": True, "mesh_since": NOW - 185, **more}
    return ReconcileResult(mesh, FACTS, wanted(mesh)[0], have, todo, problems, converged, **more)


def made(mesh: Any = MESH, observed: Any = None, context: Any = CONTEXT, problems: Any = ()) -> Any:
    want, refused = wanted(mesh)
    have = observed or Observed(want)
    todo = plan(want, have)
    every = (*problems, *refused, *have.problems)
    return report(found_by(mesh, have, todo, every, in_sync(todo, have.problems)), "web1", context)


def lost(**reaches: Reach) -> Any:
    """Return the report of a node that is wired as wanted, with these findings of its probes."""
    return made(context=replace(CONTEXT, reach={**CONTEXT.reach, **reaches}))


def test_golden_converged() -> None:
    assert render_text(made()).splitlines() == [
        "web1: all 2 peers ok",
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
        "PEER  ADDRESS     POD CIDRS     STATE     RTT  LOSS   MTU  RX     TX  ERRORS",
        "web2  192.0.2.12  10.97.2.0/24  ok     0.4 ms    0%  1462  12  34.6k       0",
        "web3  192.0.2.13  10.97.3.0/24  ok     0.4 ms    0%  1462   -      -       -",
    ]


def test_golden_degraded() -> None:
    want, _ = wanted()
    routes = {key: value for key, value in want.routes.items() if key[0] != "10.97.3.0/24"}
    ports = {name: port for name, port in want.ports.items() if name != "gre-web3"}
    unmanaged = Unmanaged("routes", "10.97.3.0/24", "an unmanaged route 10.97.3.0/24 via 192.0.2.254 dev eth0")
    have = Observed(copy(want, routes=routes, ports=ports), (unmanaged,))
    lines = render_text(made(observed=have)).splitlines()
    assert lines[:3] == [
        "web1: 1 of 2 peers not in place: web3",
        "! web3: port gre-web3 remote 192.0.2.13 missing; "
        "route 10.97.3.0/24 via 10.97.3.1 dev kbr0 mtu 1462 missing: "
        "an unmanaged route 10.97.3.0/24 via 192.0.2.254 dev eth0",
        "",
    ]
    assert "Converged    False   Blocked       1 change to do, 1 blocked" in lines
    sentences = "1 of 2 peers is not joined, or unknown: web3. An unmanaged object stands where a managed one belongs."
    assert f"Degraded     True    PeersMissing  {sentences}" in lines
    assert lines[-1].split()[:4] == ["web3", "192.0.2.13", "10.97.3.0/24", "missing"]


@pytest.mark.parametrize(
    ("reach", "verdict"),
    [
        (
            Reach(State.UNREACHABLE, NOW - 61),
            "1 of 2 peers not reachable: web3 (since 07:58:59Z, nothing arrives from it)",
        ),
        (
            Reach(State.UNREACHABLE, NOW - 90061, heard=True),
            "1 of 2 peers not reachable: web3 (since 2027-01-14 06:58:59Z, its packets arrive, ours are not answered)",
        ),
        (
            Reach(State.UNREACHABLE, NOW - 61, error="a filter of this host drops it"),
            "1 of 2 peers not reachable: web3 (since 07:58:59Z, probes can't be sent)",
        ),
        (
            Reach(State.SMALL, NOW - 61, path_mtu=1362),
            "only small packets reach 1 of 2 peers: web3 (since 07:58:59Z, path MTU 1362)",
        ),
        (
            Reach(State.LOSSY, NOW - 61, loss=0.3),
            "some packets to 1 of 2 peers are lost: web3 (since 07:58:59Z, 30% are lost)",
        ),
        (
            Reach(State.NOT_FORWARDED, NOW - 61),
            "1 of 2 peers not reachable: web3 (since 07:58:59Z, it answers, but forwards nothing to its pods)",
        ),
        (Reach(), "1 of 2 peers not probed yet"),
    ],
)
def test_the_first_line_is_the_verdict_about_packets(reach: Reach, verdict: str) -> None:
    found = lost(web3=reach)
    assert found.headline == f"web1: {verdict}" and not found.well
    assert render_text(found).startswith(f"web1: {verdict}\n")


def test_several_peers_with_one_cause_or_several() -> None:
    dead = Reach(State.UNREACHABLE, NOW - 61)
    same = lost(web2=replace(dead, since=NOW - 3661), web3=dead)
    assert same.headline == "web1: 2 of 2 peers not reachable: web2, web3 (since 06:58:59Z, nothing arrives from it)"
    other = lost(web2=replace(dead, heard=True), web3=dead)
    assert other.headline.endswith("web2, web3 (since 07:58:59Z, see below)")
    lines = render_text(other).splitlines()
    assert lines[1].startswith("! web2: its packets arrive here") and lines[2].startswith("! web3: nothing arrives")


@pytest.mark.parametrize("state", sorted(set(State) - {State.OK}))
def test_no_state_but_ok_is_well(state: State) -> None:
    found = lost(web3=Reach(state, NOW - 1, loss=0.5, path_mtu=1300))
    assert not found.well and found.headline != made().headline
    degraded = next(c for c in found.conditions if c.type == "Degraded")
    assert degraded.status == str(state in NOT_REACHED)


def test_each_peer_is_in_one_state() -> None:
    found = lost(web3=Reach(State.UNREACHABLE, NOW - 1))
    states = {peer.state for peer in found.peers}
    assert sum(found.count(state) for state in states) == len(found.peers)


DEAD = Agent(problem=Problem(Reason.AgentDown, "no agent runs"), alive=False, heard=NOW - 185, said="all 2 peers ok")


def test_a_dead_agent_is_the_headline_with_its_last_report_and_no_peer_is_ok() -> None:
    found = made(context=replace(CONTEXT, agent=DEAD))
    lines = render_text(found).splitlines()
    assert lines[0] == "web1: no agent runs; its last report, 3m5s ago: all 2 peers ok"
    assert lines[1].startswith("! No agent runs. Forwarding goes on; nothing is repaired")
    assert lines[2] == "! web2, web3: not probed now; it was ok 3m5s ago"
    assert "  agent         not running; last report 3m5s ago, at 07:56:55Z" in lines
    assert not found.well and {peer.state for peer in found.peers} == {"unknown"}
    assert not any(peer.reach for peer in found.peers)
    assert [c.reason for c in found.conditions if c.type == "Degraded"] == ["AgentDown"]
    plain = found.to_dict()["self"]
    assert plain["agentRunning"] is False and plain["agentHeard"] == "2027-01-15T07:56:55Z"


def test_an_agent_that_never_reported() -> None:
    agent = Agent(problem=Problem(Reason.AgentDown, "no agent runs"), alive=False)
    text = render_text(made(context=replace(CONTEXT, agent=agent, reach={})))
    assert text.startswith("web1: no agent runs\n") and "not running; none has reported here" in text


def test_a_hung_agent_is_the_headline() -> None:
    problem = Problem(Reason.AgentHung, "the agent (pid 7) does not answer")
    found = made(context=replace(CONTEXT, agent=replace(DEAD, since=NOW - 999, problem=problem, version="0.1.0")))
    assert found.headline == "web1: the agent (pid 7) does not answer; its last report, 3m5s ago: all 2 peers ok"
    assert "0.1.0 gives no report now; last report 3m5s ago" in render_text(found) and not found.well


def test_an_outdated_agent_is_the_headline_and_its_probes_count() -> None:
    problem = Problem(Reason.AgentOutdated, "the agent runs version 0.0.9, and 0.1.0 is installed")
    found = made(context=replace(CONTEXT, agent=replace(CONTEXT.agent, problem=problem)))
    assert found.headline == "web1: the agent runs version 0.0.9, and 0.1.0 is installed; all 2 peers ok"
    assert not found.well and found.count("ok") == 2


def test_the_mesh_that_the_agent_works_with_is_shown() -> None:
    text = render_text(made(context=replace(CONTEXT, mesh_in_force=("0123456789ab", NOW - 3600))))
    assert "mesh.yaml, digest 0123456789ab, read 1h0m ago" in text


def test_switch_down_is_unknown_not_missing_and_said_once() -> None:
    want, _ = wanted()
    problem = Problem(Reason.SwitchDown, "ovs-vswitchd does not answer")
    have = Observed(copy(want, flows={}), (), (problem,), frozenset({"flows"}))
    found = made(observed=have)
    assert {peer.state for peer in found.peers} == {"unknown"}
    text = render_text(found)
    assert text.splitlines()[:2] == ["web1: 2 of 2 peers unknown: ovs-vswitchd does not answer", ""]
    assert text.count("ovs-vswitchd does not answer") == 2, "the other one is the condition's"


def test_refused_peer_says_why() -> None:
    nodes = (NODES[0], NODES[1], replace(NODES[2], address=ip_address("2001:db8::3")))
    found = made(replace(MESH, nodes=nodes))
    assert [peer.state for peer in found.peers] == ["ok", "refused"]
    assert "another address family" in found.peers[1].missing[0]
    assert found.count("wanted") == 1 and found.count("refused") == 1
    assert found.headline == "web1: 1 of 2 peers refused: web3"


def test_held_removals_and_last_known_good() -> None:
    want, _ = wanted()
    small = replace(MESH, nodes=NODES[:1])
    have = Observed(want)
    todo = replace(plan(want, have), held=plan(wanted(small)[0], have).steps, held_peers=("web2", "web3"))
    found = report(found_by(small, have, todo, (), False, mesh_current=False), "web1", CONTEXT)
    assert found.headline == "web1: holds back the removal of 2 peers"
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
        (Plan(), (), True, "all 2 peers ok", ["AsWanted", "AsWanted"]),
        (Plan(), (WARNING,), True, "all 2 peers ok", ["AsWanted", "AsWanted"]),
        (Plan(), (ERROR,), True, "all 2 peers ok; node web9: is no range", ["AsWanted", "PodCIDRInvalid"]),
        (Plan(), (ERROR,), False, "node web9: is no range", ["Pending", "PodCIDRInvalid"]),
        (Plan((STEP,)), (), False, "not converged: 1 change to do", ["Pending", "AsWanted"]),
        (
            Plan((STEP,), (BLOCKED,)),
            (),
            False,
            "something unmanaged is in the way of fdb 0a:58:0a:61:02:01",
            ["Blocked", "Blocked"],
        ),
        (HELD, (), False, "holds back the removal of 1 peer", ["RemovalHeld", "AsWanted", "MassRemovalHeld"]),
        (HELD, (HOLD,), False, "holds back the removal of 1 peer", ["RemovalHeld", *["MassRemovalHeld"] * 2]),
        (replace(HELD, steps=(STEP,)), (), False, "holds back the", ["Pending", "AsWanted", "MassRemovalHeld"]),
    ],
)
def test_headline_and_reasons(todo: Plan, problems: Any, converged: bool, headline: str, reasons: list[str]) -> None:
    found = report(found_by(MESH, Observed(wanted()[0]), todo, problems, converged), "web1", CONTEXT)
    assert found.headline.startswith(f"web1: {headline}") and found.converged is converged
    assert [c.reason for c in found.conditions] == [*reasons, "Read"]
    assert found.well is (converged and ERROR not in problems)


def test_no_condition_repeats_its_reason_as_its_message() -> None:
    for problems in ((ERROR,), (ERROR, Problem(Reason.DatabaseDown, "does not answer"))):
        found = report(found_by(MESH, Observed(wanted()[0]), Plan(), problems, False), "web1", CONTEXT)
        degraded = next(c for c in found.conditions if c.type == "Degraded")
        assert not any(reason in degraded.message for reason in Reason) and degraded.message.endswith(".")


def test_unmanaged_objects_that_block_nothing_are_named() -> None:
    beside = Unmanaged("ports", "alien", "port alien is not managed", False)
    have = Observed(Dataplane(), (BLOCKED.unmanaged, beside))
    assert list(map(str, unmanaged_beside(have, Plan(blocked=(BLOCKED,))))) == [beside.detail]


def test_no_mesh_yet() -> None:
    found = report(ReconcileResult(), "web1", ReportContext(NOW))
    assert "waits for a mesh" in render_text(found) and "not running" in render_text(found)
    assert found.to_dict()["conditions"][0]["status"] == "Unknown"


def test_problems_first_and_bounded() -> None:
    problems = [Problem(Reason.TurnFailed, f"trouble {n}", fatal=False) for n in range(20)]
    problems.append(Problem(Reason.ApplyFailed, "the worst"))
    lines = render_text(made(problems=problems)).splitlines()
    assert lines[0] == "web1: all 2 peers ok; the worst"
    assert lines[1] == "! trouble 0" and lines[9] == "and 12 more"


def test_one_mistake_at_many_nodes_is_one_line() -> None:
    problems = [
        Problem(Reason.UnknownKey, f"unknown key: did you mean address? (line {n})", f"web{n}", "adress", "192.0.2.1")
        for n in range(10, 40)
    ]
    (line,) = problem_lines(problems)
    assert line == (
        "! node web10: adress 192.0.2.1: unknown key: did you mean address? (line 10). "
        "The same at 29 other nodes: web11, web12, web13, and 26 more"
    )


def test_what_the_node_works_without_is_a_note_behind_what_is_wrong() -> None:
    less = Problem(Reason.FilterUnavailable, "the kernel has less")
    text = render_text(made(problems=(less, Problem(Reason.TurnFailed, "trouble", fatal=False))))
    assert text.splitlines()[1:3] == ["! trouble", "note: the kernel has less"]
    assert made(problems=(less,)).well


def test_filter_peers_that_can_not_be_had_are_not_missing() -> None:
    want, _ = wanted()
    want = replace(want, rules={}, filter_peers={})
    result = replace(found_by(MESH, Observed(want), Plan(), (), True), want=want)
    assert report(result, "web1", CONTEXT).count("ok") == 2


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


def test_empty_observed() -> None:
    found = made(observed=Observed(Dataplane()))
    assert {peer.state for peer in found.peers} == {"missing"}
    assert len(render_text(found).splitlines()) < 30
