"""One turn of the agent: what it does, what it counts as drift, when it tries again, when it brakes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from ovsmesh.agent import reconciler as room
from ovsmesh.agent.reconciler import Reconciler, held_digest
from ovsmesh.dataplane.types import CniFacts, CniPlugin, Dataplane, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason
from tests.support import fake_host
from tests.support.fake_host import braked
from tests.support.meshkit import FACTS, first, mesh_of, numbered, want

host = pytest.fixture(fake_host.make_host)
source = pytest.fixture(fake_host.make_source)
state = pytest.fixture(fake_host.make_state)
agent = pytest.fixture(fake_host.make_agent)
clock = pytest.fixture(fake_host.make_clock)


# one turn

CNI = dataclasses.replace(
    FACTS, cni=CniFacts("/etc/cni/net.d", tuple(CniPlugin(n, ("1.0.0",)) for n in ("bridge", "host-local")))
)


def test_pods_are_let_in_when_all_else_is_true(agent: Any, host: Any) -> None:
    host.known = CNI
    assert agent.reconcile().converged
    first_plan, last_plan = host.plans
    assert {s.kind for s in last_plan.steps} == {"cni"} and not {s for s in first_plan.steps if s.kind == "cni"}


def test_no_pod_is_let_in_while_something_fails(agent: Any, host: Any) -> None:
    host.known, host.fails = CNI, 1
    turn = agent.reconcile()
    assert not turn.converged and not host.dataplane.cni
    assert agent.reconcile().converged and host.dataplane.cni


def test_no_pod_is_let_in_while_something_can_t_be_seen_and_that_is_no_failure(agent: Any, host: Any) -> None:
    host.known, host.problems, host.unknown = CNI, (Problem(Reason.DatabaseDown, "no"),), frozenset({"ports"})
    turn = agent.reconcile()
    assert not turn.converged and not host.dataplane.cni
    assert [s.kind for s in turn.plan.steps] == ["cni"]
    assert {p.reason for p in turn.problems} == {Reason.DatabaseDown} and agent.counters.failures == 0
    host.problems, host.unknown = (), frozenset()
    assert agent.reconcile().converged and host.dataplane.cni


def test_a_conflist_stays_when_something_breaks(agent: Any, host: Any) -> None:
    host.known = CNI
    agent.reconcile()
    host.lose("links", "kbr0")
    host.deaf = True
    assert not agent.reconcile().converged and host.dataplane.cni


def test_a_conflist_that_someone_removes_is_drift(agent: Any, host: Any) -> None:
    host.known = CNI
    agent.reconcile()
    host.lose("cni", *host.dataplane.cni)
    assert agent.reconcile().converged and host.dataplane.cni
    assert agent.counters.drift == {"cni": 1}


def test_a_turn_brings_the_host_to_what_the_mesh_wants(agent: Any, host: Any) -> None:
    turn = agent.reconcile()
    assert host.dataplane == want(first(4))
    assert turn.converged and turn.mesh_current and not turn.plan and turn.problems == ()
    assert len(host.plans) == 1


def test_a_second_turn_writes_nothing(agent: Any, host: Any) -> None:
    agent.reconcile()
    assert agent.reconcile().converged
    assert len(host.plans) == 1
    assert agent.counters.operations["ports", "+"] == 3


def test_an_agent_that_starts_again_writes_nothing(agent: Any, host: Any, source: Any, state: Any) -> None:
    agent.reconcile()
    again = Reconciler("web1", source, host, state)
    assert again.reconcile().converged and len(host.plans) == 1
    assert again.counters.drift == {} and again.counters.operations == {}


def test_no_mesh_touches_nothing(agent: Any, host: Any, source: Any) -> None:
    source.mesh, source.problems = None, (Problem(Reason.MeshFileInvalid, "is not YAML"),)
    host.dataplane = want(first(3))
    turn = agent.reconcile()
    assert not turn.converged and turn.mesh is None and host.plans == []
    assert turn.problems == source.problems


def test_the_last_good_mesh_is_followed_and_said_not_to_be_current(agent: Any, host: Any, source: Any) -> None:
    source.confirmed, source.problems = False, (Problem(Reason.MeshFileUnreadable, "can't be read"),)
    turn = agent.reconcile()
    assert host.dataplane == want(first(4))
    assert turn.converged and not turn.mesh_current and turn.problems == source.problems


def test_old_sysctls_are_remembered_before_they_are_changed(agent: Any, host: Any, state: Any) -> None:
    host.dataplane = Dataplane(sysctls={"net/ipv4/ip_forward": "0"})
    seen = []
    apply = host.apply

    def applied(todo: Any, want: Any) -> Any:
        seen.append(state.before()[0])
        return apply(todo, want)

    host.apply = applied
    agent.reconcile()
    assert seen[0] == {"net/ipv4/ip_forward": "0"}


def test_what_does_not_take_is_said_and_not_tried_for_ever(agent: Any, host: Any) -> None:
    host.deaf = True
    turn = agent.reconcile()
    assert [p.reason for p in turn.problems] == [Reason.NotConverged]
    assert "the first: + bridge obr0" in str(turn.problems[0])
    assert not turn.converged and 1 <= len(host.plans) <= 3


@pytest.mark.parametrize(
    "error", [OvsmeshError("the kernel's tables change too fast"), PermissionError(1, "not allowed")]
)
def test_an_error_on_the_way_ends_the_turn_and_not_the_agent(agent: Any, host: Any, error: Any) -> None:
    def fail(want: Any) -> None:
        raise error

    observe, host.observe = host.observe, fail
    turn = agent.reconcile()
    assert [p.reason for p in turn.problems] == [Reason.TurnFailed]
    assert ("too fast" in str(turn.problems[0])) or str(turn.problems[0]) == "not allowed"
    assert host.dirtied == 1 and not turn.converged
    host.observe = observe
    assert agent.reconcile().converged


def test_a_bug_is_not_taken_for_a_failure(agent: Any, host: Any) -> None:
    def bug(want: Any) -> None:
        raise TypeError("a bug")

    host.observe = bug
    with pytest.raises(TypeError):
        agent.reconcile()


def test_what_is_wrong_with_others_does_not_keep_this_node_from_converging(agent: Any, source: Any) -> None:
    other = dataclasses.replace(numbered(3), address=numbered(3).pod_cidrs[1].network_address + 9)
    source.mesh = mesh_of(numbered(1), numbered(2), other)
    turn = agent.reconcile()
    assert turn.converged and [p.reason for p in turn.problems] == [Reason.AddressFamilyMismatch]


def test_unmanaged_things_are_named_each_way(agent: Any, host: Any) -> None:
    host.unmanaged = (Unmanaged("flows", "1 ", "flow x is not ours", blocks=False),)
    turn = agent.reconcile()
    assert turn.converged and [str(p) for p in turn.problems] == ["flow x is not ours"]
    host.unmanaged = (Unmanaged("routes", "10.97.2.0/24", "route x is not ours"),)
    host.lose("routes", ("10.97.2.0/24", 111))
    turn = agent.reconcile()
    assert not turn.converged and len(turn.plan.blocked) == 1


# drift


def test_what_someone_else_takes_away_is_drift_and_put_back(agent: Any, host: Any) -> None:
    agent.reconcile()
    host.lose("routes", ("10.97.2.0/24", 111))
    host.lose("ports", "gre-web3")
    assert agent.reconcile().converged
    assert host.dataplane == want(first(4))
    assert agent.counters.drift == Counter(routes=1, ports=1)


def test_what_someone_else_adds_or_changes_is_drift(agent: Any, host: Any) -> None:
    agent.reconcile()
    parts = {**host.dataplane.flows, "50 tcp": "NORMAL", "0 ": "NORMAL"}
    host.dataplane = dataclasses.replace(host.dataplane, flows=parts)
    agent.reconcile()
    assert agent.counters.drift == Counter(flows=2)


@pytest.mark.parametrize("what", ["mesh", "facts"])
def test_another_wish_or_another_host_is_not_drift(agent: Any, host: Any, source: Any, what: Any) -> None:
    agent.reconcile()
    if what == "mesh":
        source.mesh = first(5)
    else:
        host.known = dataclasses.replace(FACTS, underlay_mtu=9000)
    assert agent.reconcile().converged
    assert len(host.plans) == 2 and agent.counters.drift == {}


def test_the_first_turn_and_unfinished_business_are_not_drift(agent: Any, host: Any) -> None:
    host.fails = 9
    host.dataplane = dataclasses.replace(want(first(4)), routes={})
    for _ in range(12):
        agent.reconcile()
    assert agent.last.converged and agent.counters.drift == {}


def test_what_could_not_be_seen_for_a_while_is_not_drift(agent: Any, host: Any) -> None:
    agent.reconcile()
    host.unknown, host.problems = frozenset({"flows"}), (Problem(Reason.SwitchDown, "does not answer"),)
    assert not agent.reconcile().converged
    # the switch starts with an empty table
    host.unknown, host.problems = frozenset(), ()
    host.lose("flows", *host.dataplane.flows)
    assert agent.reconcile().converged
    assert agent.counters.drift == {} and len(host.dataplane.flows) == len(want(first(4)).flows)


# failing


def test_back_off_grows_to_its_limit_and_starts_anew_after_success(agent: Any, host: Any, clock: Any) -> None:
    host.fails = 10**6
    waits = []
    for _ in range(12):
        agent.reconcile()
        waits.append(agent._retry_at - clock.now)
    # with jitter between half and the whole of 0.2 s, 0.4 s, …, 30 s
    limits = [min(0.2 * 2**n, 30.0) for n in range(12)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True)), waits
    assert agent.counters.failures == 12
    host.fails = 0
    assert agent.reconcile().converged
    assert agent._retry_at == float("inf")
    host.fails = 10**6
    host.lose("ports", "gre-web2")
    agent.reconcile()
    assert agent._retry_at - clock.now <= 0.2


def test_something_in_the_way_waits_for_its_bell(agent: Any, host: Any, clock: Any) -> None:
    host.unmanaged = (Unmanaged("links", "kbr0", "bridge kbr0 is not ours"),)
    turn = agent.reconcile()
    assert not turn.converged and agent._retry_at == float("inf") and agent.counters.failures == 0


# the brake


def test_a_mass_removal_is_held_and_named(agent: Any, host: Any, source: Any, clock: Any) -> None:
    turn = braked(agent, source)
    assert len(host.dataplane.ports) == 3 and not turn.converged
    assert [p.reason for p in turn.problems] == [Reason.MassRemovalHeld]
    text = str(turn.problems[0])
    assert "lacks 3 of this node's peers at once (web2, web3, web4)" in text
    assert f"`ovsmesh confirm {held_digest(turn.plan)}`" in text
    # a removal that is held is neither a failure nor tried again and again
    assert agent.counters.failures == 0 and agent._retry_at == float("inf")


def test_a_held_removal_is_carried_out_in_the_end(agent: Any, host: Any, source: Any, clock: Any) -> None:
    braked(agent, source)
    clock.now += room.BRAKE_HOLD - 1
    assert not agent.reconcile().converged and host.dataplane.ports
    clock.now += 1
    assert agent.reconcile().converged and not host.dataplane.ports
    assert agent.counters.drift == {}


def test_peers_that_come_back_end_it(agent: Any, host: Any, source: Any, clock: Any) -> None:
    braked(agent, source)
    source.mesh = first(4)
    turn = agent.reconcile()
    assert turn.converged and turn.problems == () and len(host.plans) == 1
    # and the next removal is held for the whole time again
    clock.now += room.BRAKE_HOLD
    source.mesh = first(1)
    assert agent.reconcile().plan.held


def test_more_peers_missing_later_are_held_as_long(agent: Any, host: Any, source: Any, clock: Any) -> None:
    source.mesh = first(12)
    agent.reconcile()
    source.mesh = first(7)
    assert len(agent.reconcile().plan.held_peers) == 5
    clock.now += room.BRAKE_HOLD - 1
    source.mesh = first(1)
    assert len(agent.reconcile().plan.held_peers) == 11
    clock.now += 2
    agent.reconcile()
    assert len(host.dataplane.ports) == 11


def test_a_confirmation_of_something_else_lifts_nothing(
    agent: Any, host: Any, source: Any, state: Any, clock: Any
) -> None:
    source.mesh = first(12)
    agent.reconcile()
    source.mesh = first(7)
    state.request_confirm(held_digest(agent.reconcile().plan))
    # before it is heard, the mesh has lost more
    source.mesh = first(1)
    turn = agent.reconcile()
    assert len(host.dataplane.ports) == 11 and len(turn.plan.held_peers) == 11
    state.request_confirm(held_digest(turn.plan))
    assert agent.reconcile().converged and not host.dataplane.ports


def test_what_is_added_meanwhile_is_added(agent: Any, host: Any, source: Any) -> None:
    agent.reconcile()
    source.mesh = mesh_of(numbered(1), numbered(9))
    turn = agent.reconcile()
    assert "gre-web9" in host.dataplane.ports and turn.plan.held_peers == ("web2", "web3", "web4")


def test_rules_in_order_are_converged(agent: Any, host: Any) -> None:
    # the order of rules is part of what is wanted
    agent.reconcile()
    host.dataplane = dataclasses.replace(host.dataplane, rules=dict(reversed(host.dataplane.rules.items())))
    assert agent.reconcile().converged and agent.counters.drift == Counter(rules=1)
