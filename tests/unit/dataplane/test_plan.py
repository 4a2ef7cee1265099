"""The ordered difference, its text, and the removal guard."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from ovsmesh.dataplane.plan import Plan, due, in_sync, plan
from ovsmesh.dataplane.types import FALLBACK_METRIC, KBR, KINDS, OBR, Dataplane, Port, Route, Rule, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.support.meshkit import first, golden, node, numbered, seen, want
from tests.support.meshkit import mesh_of as mesh

EMPTY = Dataplane()
FULL = want(first(3, key=7))
LONER = want(first(1, key=7))
FATAL, MILD = Problem(Reason.DatabaseDown, "no"), Problem(Reason.FilterUnavailable, "no")


def lines(*args: Any, **named: Any) -> Any:
    return str(plan(*args, **named)).splitlines()


def without(dataplane: Any, kind: Any, *keys: Any) -> Any:
    return replace(dataplane, **{kind: {k: v for k, v in getattr(dataplane, kind).items() if k not in keys}})


def with_(dataplane: Any, kind: Any, key: Any, value: Any) -> Any:
    return replace(dataplane, **{kind: {**getattr(dataplane, kind), key: value}})


def changed(dataplane: Any, kind: Any, part: Any, /, **words: Any) -> Any:
    return with_(dataplane, kind, part, getattr(dataplane, kind)[part]._replace(**words))


# what it says


def test_golden_from_nothing() -> None:
    golden("plan-from-nothing.txt", f"{plan(FULL, seen(EMPTY))}\n")


def test_golden_one_peer_joins() -> None:
    golden("plan-peer-joins.txt", f"{plan(want(first(3, key=7)), seen(want(first(2, key=7))))}\n")


def test_golden_one_peer_leaves() -> None:
    golden("plan-peer-leaves.txt", f"{plan(want(first(2, key=7)), seen(want(first(3, key=7))))}\n")


def test_golden_all_goes() -> None:
    golden("plan-all-goes.txt", f"{plan(EMPTY, seen(FULL), confirmed=True)}\n")


@pytest.mark.parametrize(
    ("have", "line"),
    [
        (changed(FULL, "links", KBR, mtu=1500), "~ link kbr0 mtu 1500 → 1458"),
        (changed(FULL, "links", KBR, mac="02:00:00:00:00:01"), "~ link kbr0 mac 02:00:00:00:00:01 → 0a:58:0a:61:01:01"),
        (changed(FULL, "links", KBR, up=False), "~ link kbr0 state down → up"),
        (changed(FULL, "links", OBR, master=""), "~ link obr0 master none → kbr0"),
        (changed(FULL, "links", OBR, quiet=False), "~ link obr0 flooding on → off"),
        (
            changed(FULL, "links", OBR, mtu=1500, up=False, quiet=False),
            "~ link obr0 mtu 1500 → 1458, state down → up, flooding on → off",
        ),
        (changed(FULL, "bridges", OBR, fail_mode="secure"), "~ bridge obr0 fail-mode secure → standalone"),
        (changed(FULL, "bridges", OBR, datapath_type="netdev"), "~ bridge obr0 datapath netdev → system"),
        (changed(FULL, "bridges", OBR, mtu_request=0), "~ bridge obr0 mtu 0 → 1458"),
        (changed(FULL, "ports", "gre-web2", remote="192.0.2.99"), "~ port gre-web2 remote 192.0.2.99 → 192.0.2.12"),
        (changed(FULL, "ports", "gre-web2", key=""), "~ port gre-web2 key none → 7"),
        (changed(FULL, "ports", "gre-web2", protected=False), "~ port gre-web2 protected no → yes"),
        (
            changed(FULL, "ports", "gre-web2", type="gre with [('csum', 'true')]"),
            "~ port gre-web2 type gre with [('csum', 'true')] → gre",
        ),
        (
            changed(FULL, "routes", ("10.97.2.0/24", 111), via="10.97.3.1", mtu=0),
            "~ route 10.97.2.0/24 via 10.97.3.1 → 10.97.2.1, mtu none → 1458",
        ),
        (
            with_(FULL, "neighbours", "10.97.2.1", "0a:58:00:00:00:00"),
            "~ neighbour 10.97.2.1 lladdr 0a:58:00:00:00:00 → 0a:58:0a:61:02:01",
        ),
        (with_(FULL, "fdb", "0a:58:0a:61:02:01", "veth1"), "~ fdb 0a:58:0a:61:02:01 dev veth1 → obr0"),
        (with_(FULL, "addresses", "10.97.1.1/24", OBR), "~ address 10.97.1.1/24 dev obr0 → kbr0"),
        (with_(FULL, "filter_peers", "192.0.2.12", "x"), "~ filter-peer 192.0.2.12 in x → peers4"),
        (with_(FULL, "flows", "0 ", "NORMAL"), "~ flow priority=0 → drop"),
        (with_(FULL, "sysctls", "net/ipv4/ip_forward", "0"), "~ sysctl net/ipv4/ip_forward 0 → 1"),
        (without(FULL, "sysctls", "net/ipv4/ip_forward"), "~ sysctl net/ipv4/ip_forward (absent) → 1"),
        (without(FULL, "ports", "gre-web2"), "+ port gre-web2 remote 192.0.2.12"),
        (
            without(FULL, "routes", ("10.97.2.0/24", 111)),
            "+ route 10.97.2.0/24 via 10.97.2.1 dev kbr0 mtu 1458",
        ),
        (
            without(FULL, "routes", ("10.97.0.0/16", FALLBACK_METRIC)),
            "+ route 10.97.0.0/16 type unreachable",
        ),
        (without(FULL, "neighbours", "fd00:97:2::1"), "+ neighbour fd00:97:2::1 lladdr 0a:58:0a:61:02:01"),
        (without(FULL, "fdb", "0a:58:0a:61:02:01"), "+ fdb 0a:58:0a:61:02:01 dev obr0"),
        (without(FULL, "addresses", "10.97.1.1/24"), "+ address 10.97.1.1/24 dev kbr0"),
        (without(FULL, "filter_peers", "192.0.2.12"), "+ filter-peer 192.0.2.12 in peers4"),
        (without(FULL, "flows", "0 "), "+ flow priority=0 → drop"),
        (
            without(FULL, "flows", "100 dl_dst=0a:58:0a:61:02:01,in_port=LOCAL"),
            "+ flow priority=100,dl_dst=0a:58:0a:61:02:01,in_port=LOCAL → output:gre-web2",
        ),
        (with_(FULL, "flows", "50 tcp", "NORMAL"), "- flow priority=50,tcp not in the mesh"),
        (with_(FULL, "addresses", "10.97.8.1/24", KBR), "- address 10.97.8.1/24"),
        (with_(FULL, "rules", ("inet", "input", "old"), Rule("drop")), "- rule inet input old"),
        (
            with_(FULL, "rules", ("inet", "input", "tunnel-from-pod"), Rule("digest 123")),
            '~ rule inet input tunnel-from-pod: iifname "kbr0" ip daddr 192.0.2.11 '
            "@th,0,64 & 0xa000ffffffffffff == 0x2000655800000007 meta l4proto gre drop",
        ),
        (
            with_(FULL, "restore_wait", "flow-restore-wait", True),
            "- ovs flow-restore-wait cleared: its flows are back",
        ),
        (
            with_(FULL, "routes", ("10.99.0.0/16", FALLBACK_METRIC), Route("unreachable")),
            "- route 10.99.0.0/16",
        ),
        (
            with_(FULL, "ports", "vx-web2", Port("vxlan", "192.0.2.12", "192.0.2.11", "", "web2", "")),
            "- port vx-web2 replaced at peer (web2)",
        ),
    ],
)
def test_one_difference_is_one_line(have: Any, line: Any) -> None:
    assert lines(FULL, seen(have)) == [line]


def test_sysctls_of_others_are_left_alone() -> None:
    assert not plan(FULL, seen(with_(FULL, "sysctls", "net/ipv4/tcp_ecn", "1")))


def test_rules_in_another_order_are_a_change() -> None:
    turned = replace(FULL, rules=dict(reversed(list(FULL.rules.items()))))
    assert [step.kind for step in plan(FULL, seen(turned)).steps] == ["rules"]


def test_a_plan_is_true_when_there_is_something_to_do() -> None:
    assert plan(FULL, seen(EMPTY))
    assert not plan(FULL, seen(FULL)) and str(plan(FULL, seen(FULL))) == ""


# the order


def test_additions_in_the_order_of_kinds_and_removals_in_reverse() -> None:
    whole = replace(FULL, docker={"bridge": KBR}, cni={"10-ovsmesh.conflist": "{}"})
    up = [step.kind for step in plan(whole, seen(EMPTY)).steps]
    down = [step.kind for step in plan(EMPTY, seen(whole), confirmed=True).steps]
    kinds = [kind for kind in KINDS if kind != "restore_wait"]
    assert list(dict.fromkeys(up)) == kinds
    assert list(dict.fromkeys(down)) == [kind for kind in reversed(kinds) if kind != "sysctls"]


def test_what_carries_is_there_before_what_uses_it() -> None:
    order = ["bridges", "links", "ports", "flows", "neighbours", "fdb", "routes"]
    up = [step.kind for step in plan(FULL, seen(EMPTY)).steps]
    down = [step.kind for step in plan(EMPTY, seen(FULL), confirmed=True).steps]
    for before, after in itertools.pairwise(order):
        assert max(i for i, k in enumerate(up) if k == before) < up.index(after)
        assert max(i for i, k in enumerate(down) if k == after) < down.index(before)


def test_a_peer_is_replaced_without_a_gap() -> None:
    # web2 moves to another address and name: what is new stands before anything old goes
    moved = replace(numbered(2), name="web9", address=node("x", "192.0.2.99", "10.0.0.0/8").address)
    steps = plan(want(mesh(numbered(1), moved, numbered(3))), seen(want(first(3)))).steps
    removals = [step.op == "-" for step in steps]
    assert True in removals and removals == sorted(removals)


def test_the_switch_is_told_that_its_flows_are_back_only_after_they_are() -> None:
    have = with_(replace(FULL, flows={}), "restore_wait", "flow-restore-wait", True)
    kinds = [step.kind for step in plan(FULL, seen(have)).steps]
    assert kinds == ["flows"] * len(FULL.flows) + ["restore_wait"]


# why


def test_what_goes_says_whose_it_was() -> None:
    steps = plan(want(first(2)), seen(want(first(3)))).steps
    assert {step.why for step in steps} == {"peer left (web3)"}
    assert {step.kind for step in steps} == {"filter_peers", "ports", "flows", "neighbours", "fdb", "routes"}


def test_a_peer_that_stays_is_not_said_to_have_left() -> None:
    fewer = replace(numbered(2), pod_cidrs=numbered(2).pod_cidrs[:1])
    steps = plan(want(mesh(numbered(1), fewer)), seen(want(first(2)))).steps
    assert len(steps) == 4
    assert {step.why for step in steps} == {"replaced at peer (web2)"}


# the removal guard


def mesh_without(count: Any, *left: Any) -> Any:
    return want(mesh(*(numbered(n) for n in range(1, count + 1) if n not in left)))


@pytest.mark.parametrize(
    ("peers", "gone", "confirmed", "held"),
    [
        (1, 1, False, False),
        (2, 2, False, False),
        (3, 2, False, False),
        (3, 3, False, True),
        (6, 2, False, False),
        # exactly a third goes, one more is held
        (9, 3, False, False),
        (8, 3, False, True),
        (9, 4, False, True),
        (12, 4, False, False),
        (12, 5, False, True),
        (12, 12, False, True),
        (8, 3, True, False),
        (12, 12, True, False),
    ],
)
def test_a_mass_removal_is_held(peers: Any, gone: Any, confirmed: Any, held: Any) -> None:
    left = range(2, 2 + gone)
    have = want(first(peers + 1))
    found = plan(mesh_without(peers + 1, *left), seen(have), confirmed)
    assert found.held_peers == (tuple(sorted(f"web{n}" for n in left)) if held else ())
    # a peer is a port, four flows, two neighbours, two routes, an FDB entry and three filter entries
    assert len(found.held if held else found.steps) == gone * 13
    assert not (found.steps if held else found.held)


def test_the_guard_holds_removals_alone() -> None:
    # four leave, one joins, one is repaired, a rule of no peer goes
    have = with_(want(first(6)), "rules", ("inet", "input", "old"), Rule("drop"))
    have = without(have, "routes", ("10.97.6.0/24", 111))
    found = plan(want(mesh(numbered(1), numbered(6), numbered(7))), seen(have))
    assert found.held_peers == ("web2", "web3", "web4", "web5")
    assert {step.why for step in found.held} == {f"peer left ({name})" for name in found.held_peers}
    assert sum(step.op == "+" for step in found.steps) == 13 + 1
    assert [str(step) for step in found.steps if step.op == "-"] == ["- rule inet input old"]


def test_held_removals_are_shown_as_such() -> None:
    text = lines(mesh_without(4, 2, 3, 4), seen(want(first(4))))
    assert len(text) == 39 and all(line.startswith("= held ") for line in text)
    assert "= held port gre-web2 peer left (web2)" in text


def test_the_guard_counts_peers_that_are_there() -> None:
    # nine have left the mesh, but eight of them were removed before: one goes
    have = want(mesh(numbered(1), numbered(2), numbered(3)))
    assert not plan(mesh_without(11, *range(3, 12)), seen(have)).held


def test_peers_that_are_renumbered_do_not_leave() -> None:
    moved = [replace(numbered(n), pod_cidrs=numbered(n + 100).pod_cidrs) for n in (2, 3, 4)]
    found = plan(want(mesh(numbered(1), *moved)), seen(want(first(4))))
    assert not found.held
    assert {step.why for step in found.steps if step.op == "-"} == {f"replaced at peer (web{n})" for n in (2, 3, 4)}


def test_the_guard_holds_when_ports_were_deleted_before() -> None:
    have = replace(want(first(10)), ports={})
    assert plan(want(first(1)), seen(have)).held


def test_the_guard_holds_when_ports_are_unknown() -> None:
    # ovsdb-server is away: the kernel's part of the peers is as much theirs as before
    have = replace(want(first(10)), bridges={}, ports={}, flows={})
    found = plan(want(first(1)), seen(have, unknown=("bridges", "ports", "flows", "restore_wait")))
    assert not [step for step in found.steps if step.kind in ("routes", "neighbours", "fdb")]


# what is unmanaged, what is not known


def test_unmanaged_kbr0_blocks_everything() -> None:
    found = plan(FULL, seen(without(EMPTY, "links"), Unmanaged("links", KBR, "bridge kbr0 is unmanaged")))
    assert found.steps == ()
    assert str(found) == "! link kbr0 blocked: bridge kbr0 is unmanaged"


def test_unmanaged_obr0_blocks_everything_of_both_sides() -> None:
    have = replace(EMPTY, links={KBR: FULL.links[KBR]}, routes={("10.97.9.0/24", 111): Route("unicast", "10.97.9.1")})
    found = plan(FULL, seen(have, Unmanaged("bridges", OBR, "OVS bridge obr0 is unmanaged")))
    assert found.steps == () and found.held == ()
    assert str(found) == "! bridge obr0 blocked: OVS bridge obr0 is unmanaged"


def test_cleanup_is_not_stopped_by_an_unmanaged_bridge() -> None:
    # someone put a kbr0 of theirs in its place; the rest is still there and still managed
    have = without(FULL, "links", KBR)
    found = plan(EMPTY, seen(have, Unmanaged("links", KBR, "bridge kbr0 is unmanaged")), confirmed=True)
    assert {(step.kind, step.key) for step in found.steps} >= {
        ("bridges", OBR),
        ("routes", ("10.97.0.0/16", FALLBACK_METRIC)),
    }
    assert not [step for step in found.steps if step.key == KBR]


def test_an_unmanaged_route_blocks_its_own_and_nothing_else() -> None:
    have = without(FULL, "routes", *FULL.routes)
    found = plan(FULL, seen(have, Unmanaged("routes", "10.97.2.0/24", "route 10.97.2.0/24 via 192.0.2.1 is unmanaged")))
    assert [str(b) for b in found.blocked] == [
        "! route 10.97.2.0/24 blocked: route 10.97.2.0/24 via 192.0.2.1 is unmanaged"
    ]
    assert {step.key for step in found.steps} == set(FULL.routes) - {("10.97.2.0/24", 111)}


def test_an_unmanaged_route_to_a_cluster_range_does_not_take_the_fallback_away() -> None:
    have = without(FULL, "routes", ("10.97.0.0/16", FALLBACK_METRIC))
    found = plan(FULL, seen(have, Unmanaged("routes", "10.97.0.0/16", "is unmanaged")))
    assert [step.key for step in found.steps] == [("10.97.0.0/16", FALLBACK_METRIC)]


def test_an_unmanaged_route_beside_a_managed_one_is_named_and_both_stay() -> None:
    found = plan(FULL, seen(FULL, Unmanaged("routes", "10.97.2.0/24", "is unmanaged")))
    assert not found.steps
    assert str(found) == "! route 10.97.2.0/24 blocked: is unmanaged"


def test_an_unmanaged_port_blocks_its_name_only() -> None:
    have = without(FULL, "ports", "gre-web2", "gre-web3")
    found = plan(FULL, seen(have, Unmanaged("ports", "gre-web2", "port gre-web2 is unmanaged")))
    assert [step.key for step in found.steps] == ["gre-web3"]
    assert [b.step.key for b in found.blocked] == ["gre-web2"]


def test_what_is_merely_near_blocks_nothing() -> None:
    have = without(FULL, "flows", "0 ")
    found = plan(FULL, seen(have, Unmanaged("flows", "0 ", "flow of someone", blocks=False)))
    assert [step.key for step in found.steps] == ["0 "] and not found.blocked


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_planned_for_what_can_not_be_seen(kind: Any) -> None:
    for wanted, have in ((FULL, EMPTY), (EMPTY, FULL)):
        known = plan(wanted, seen(have), confirmed=True)
        blind = plan(wanted, seen(have, unknown=(kind,)), confirmed=True)
        assert [s for s in known.steps if s.kind != kind] and not [s for s in blind.steps if s.kind == kind]
        # the words that say whose a part was may be lost with it, the steps not
        assert [s[:5] for s in blind.steps] == [s[:5] for s in known.steps if s.kind != kind]


# in sync


@pytest.mark.parametrize(
    ("todo", "problems", "expected"),
    [
        (Plan(), (), True),
        (Plan(), (MILD,), True),
        (Plan(), (MILD, FATAL), False),
        (plan(FULL, seen(EMPTY)), (), False),
        (plan(FULL, seen(FULL, Unmanaged("routes", "10.97.2.0/24", "is in the way"))), (), False),
        (plan(LONER, seen(want(first(5, key=7)))), (), False),
    ],
    ids=["nothing to do", "a warning", "an error", "steps", "blocked", "held"],
)
def test_in_sync(todo: Plan, problems: Any, expected: bool) -> None:
    assert in_sync(todo, problems) is expected


# what waits

CNI = replace(FULL, cni={"10-ovsmesh.conflist": "{}"})


def kinds(todo: Any) -> Any:
    return {step.kind for step in todo.steps}


def test_a_conflist_waits_for_all_else() -> None:
    todo = plan(CNI, seen(EMPTY))
    assert [s.kind for s in todo.steps][-1] == "cni"
    assert kinds(due(todo, ())) == kinds(todo) - {"cni"}
    alone = plan(CNI, seen(FULL))
    assert due(alone, ()) is alone and kinds(alone) == {"cni"}


@pytest.mark.parametrize(
    ("problem", "waits"),
    [
        (FATAL, True),
        (MILD, False),
        (Problem(Reason.CNIOverruled, "x"), False),
        (Problem(Reason.DockerStarting, "x"), False),
    ],
)
def test_a_conflist_waits_for_what_is_fatal_and_not_of_containers(problem: Any, waits: Any) -> None:
    alone = plan(CNI, seen(FULL))
    assert due(alone, (problem,)).steps == (() if waits else alone.steps)


def test_a_conflist_waits_for_what_is_blocked() -> None:
    key = next(k for k, r in FULL.routes.items() if r.type == "unicast")
    blocked = plan(CNI, seen(without(FULL, "routes", key), Unmanaged("routes", key[0], "theirs")))
    assert blocked.blocked and kinds(blocked) == {"cni"} and not due(blocked, ()).steps


def test_a_conflist_does_not_wait_for_docker() -> None:
    todo = plan(replace(CNI, docker={"bridge": KBR}), seen(FULL))
    assert kinds(due(todo, ())) == {"docker", "cni"}


def test_a_conflist_is_changed_last_and_removed_first() -> None:
    old = replace(FULL, cni={"10-ovsmesh.conflist": "old"})
    assert not due(plan(CNI, seen(without(old, "sysctls", "net/ipv4/ip_forward"))), ()).steps[1:]
    gone = plan(EMPTY, seen(CNI), confirmed=True)
    assert gone.steps[0].kind == "cni" and due(gone, (FATAL,)) is gone


def test_a_kbr0_that_the_bridge_plugin_made_is_told() -> None:
    (line,) = lines(FULL, seen(changed(FULL, "links", KBR, unmarked=True, mac="02:00:00:00:00:01")))
    assert line == "~ link kbr0 mac 02:00:00:00:00:01 → 0a:58:0a:61:01:01, alias none → ovsmesh"
