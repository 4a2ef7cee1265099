"""One reconcile: what it does, what counts as drift, when it is tried again, when a removal is held."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from ovsmesh.agent import reconciler as module
from ovsmesh.agent.reconciler import Reconciler, held_digest
from ovsmesh.agent.result import look
from ovsmesh.dataplane.types import CniFacts, CniPlugin, Dataplane, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason
from tests.support import fake_driver
from tests.support.fake_driver import held_removal
from tests.support.meshkit import FACTS, first, mesh_of, numbered, want

driver = pytest.fixture(fake_driver.make_driver)
source = pytest.fixture(fake_driver.make_source)
state = pytest.fixture(fake_driver.make_state)
agent = pytest.fixture(fake_driver.make_agent)
clock = pytest.fixture(fake_driver.make_clock)


# one reconcile

CNI = dataclasses.replace(
    FACTS, cni=CniFacts("/etc/cni/net.d", tuple(CniPlugin(n, ("1.0.0",)) for n in ("bridge", "host-local")))
)


def test_pods_are_let_in_when_all_else_is_true(agent: Any, driver: Any) -> None:
    driver.known = CNI
    assert agent.reconcile().converged
    first_plan, last_plan = driver.plans
    assert {s.kind for s in last_plan.steps} == {"cni"} and not {s for s in first_plan.steps if s.kind == "cni"}


def test_no_pod_is_let_in_while_something_fails(agent: Any, driver: Any) -> None:
    driver.known, driver.fails = CNI, 1
    result = agent.reconcile()
    assert not result.converged and not driver.dataplane.cni
    assert agent.reconcile().converged and driver.dataplane.cni


def test_no_pod_is_let_in_while_something_can_t_be_seen_and_that_is_no_failure(agent: Any, driver: Any) -> None:
    driver.known, driver.problems, driver.unknown = CNI, (Problem(Reason.DatabaseDown, "no"),), frozenset({"ports"})
    result = agent.reconcile()
    assert not result.converged and not driver.dataplane.cni
    assert [s.kind for s in result.plan.steps] == ["cni"]
    assert {p.reason for p in result.problems} == {Reason.DatabaseDown} and agent.counters.failures == 0
    driver.problems, driver.unknown = (), frozenset()
    assert agent.reconcile().converged and driver.dataplane.cni


def test_a_conflist_stays_when_something_breaks(agent: Any, driver: Any) -> None:
    driver.known = CNI
    agent.reconcile()
    driver.lose("links", "kbr0")
    driver.ineffective = True
    assert not agent.reconcile().converged and driver.dataplane.cni


def test_a_conflist_that_someone_removes_is_drift(agent: Any, driver: Any) -> None:
    driver.known = CNI
    agent.reconcile()
    driver.lose("cni", *driver.dataplane.cni)
    assert agent.reconcile().converged and driver.dataplane.cni
    assert agent.counters.drift == {"cni": 1}


def test_a_reconcile_brings_the_host_to_what_the_mesh_wants(agent: Any, driver: Any) -> None:
    result = agent.reconcile()
    assert driver.dataplane == want(first(4))
    assert result.converged and result.mesh_current and not result.plan and result.problems == ()
    assert len(driver.plans) == 1


def test_a_second_reconcile_writes_nothing(agent: Any, driver: Any) -> None:
    agent.reconcile()
    assert agent.reconcile().converged
    assert len(driver.plans) == 1
    assert agent.counters.operations["ports", "+"] == 3


def test_an_agent_that_starts_again_writes_nothing(agent: Any, driver: Any, source: Any, state: Any) -> None:
    agent.reconcile()
    again = Reconciler("web1", source, driver, state)
    assert again.reconcile().converged and len(driver.plans) == 1
    assert again.counters.drift == {} and again.counters.operations == {}


def test_no_mesh_touches_nothing(agent: Any, driver: Any, source: Any) -> None:
    source.mesh, source.problems = None, (Problem(Reason.MeshFileInvalid, "is not YAML"),)
    driver.dataplane = want(first(3))
    result = agent.reconcile()
    assert not result.converged and result.mesh is None and driver.plans == []
    assert result.problems == source.problems


def test_the_last_good_mesh_is_followed_and_said_not_to_be_current(agent: Any, driver: Any, source: Any) -> None:
    source.confirmed, source.problems = False, (Problem(Reason.MeshFileUnreadable, "can't be read"),)
    result = agent.reconcile()
    assert driver.dataplane == want(first(4))
    assert result.converged and not result.mesh_current and result.problems == source.problems


def test_old_sysctls_are_remembered_before_they_are_changed(agent: Any, driver: Any, state: Any) -> None:
    driver.dataplane = Dataplane(sysctls={"net/ipv4/ip_forward": "0"})
    seen = []
    apply = driver.apply

    def applied(todo: Any, want: Any) -> Any:
        seen.append(state.before()[0])
        return apply(todo, want)

    driver.apply = applied
    agent.reconcile()
    assert seen[0] == {"net/ipv4/ip_forward": "0"}


def test_what_does_not_take_is_said_and_not_tried_without_end(agent: Any, driver: Any) -> None:
    driver.ineffective = True
    result = agent.reconcile()
    assert [p.reason for p in result.problems] == [Reason.NotConverged]
    assert "the first: + bridge obr0" in str(result.problems[0])
    assert not result.converged and 1 <= len(driver.plans) <= 3


@pytest.mark.parametrize(
    "error", [OvsmeshError("the kernel's tables change too fast"), PermissionError(1, "not allowed")]
)
def test_an_error_on_the_way_ends_the_reconcile_and_not_the_agent(agent: Any, driver: Any, error: Any) -> None:
    def fail(want: Any) -> None:
        raise error

    observe, driver.observe = driver.observe, fail
    result = agent.reconcile()
    assert [p.reason for p in result.problems] == [Reason.TurnFailed]
    assert ("too fast" in str(result.problems[0])) or str(result.problems[0]) == "not allowed"
    assert driver.dirtied == 1 and not result.converged
    driver.observe = observe
    assert agent.reconcile().converged


def test_a_bug_is_not_taken_for_a_failure(agent: Any, driver: Any) -> None:
    def bug(want: Any) -> None:
        raise TypeError("a bug")

    driver.observe = bug
    with pytest.raises(TypeError):
        agent.reconcile()


def test_what_is_wrong_with_others_does_not_keep_this_node_from_converging(agent: Any, source: Any) -> None:
    other = dataclasses.replace(numbered(3), address=numbered(3).pod_cidrs[1].network_address + 9)
    source.mesh = mesh_of(numbered(1), numbered(2), other)
    result = agent.reconcile()
    assert result.converged and [p.reason for p in result.problems] == [Reason.AddressFamilyMismatch]


def test_unmanaged_things_are_named_each_way(agent: Any, driver: Any) -> None:
    driver.unmanaged = (Unmanaged("flows", "1 ", "flow x is unmanaged", blocks=False),)
    result = agent.reconcile()
    assert result.converged and [str(p) for p in result.problems] == ["flow x is unmanaged"]
    driver.unmanaged = (Unmanaged("routes", "10.97.2.0/24", "route x is unmanaged"),)
    driver.lose("routes", ("10.97.2.0/24", 111))
    result = agent.reconcile()
    assert not result.converged and len(result.plan.blocked) == 1


# drift


def test_what_someone_else_takes_away_is_drift_and_put_back(agent: Any, driver: Any) -> None:
    agent.reconcile()
    driver.lose("routes", ("10.97.2.0/24", 111))
    driver.lose("ports", "gre-web3")
    assert agent.reconcile().converged
    assert driver.dataplane == want(first(4))
    assert agent.counters.drift == Counter(routes=1, ports=1)


def test_what_someone_else_adds_or_changes_is_drift(agent: Any, driver: Any) -> None:
    agent.reconcile()
    parts = {**driver.dataplane.flows, "50 tcp": "NORMAL", "0 ": "NORMAL"}
    driver.dataplane = dataclasses.replace(driver.dataplane, flows=parts)
    agent.reconcile()
    assert agent.counters.drift == Counter(flows=2)


@pytest.mark.parametrize("what", ["mesh", "facts"])
def test_another_wish_or_another_host_is_not_drift(agent: Any, driver: Any, source: Any, what: Any) -> None:
    agent.reconcile()
    if what == "mesh":
        source.mesh = first(5)
    else:
        driver.known = dataclasses.replace(FACTS, underlay_mtu=9000)
    assert agent.reconcile().converged
    assert len(driver.plans) == 2 and agent.counters.drift == {}


def test_the_first_reconcile_and_unfinished_business_are_not_drift(agent: Any, driver: Any) -> None:
    driver.fails = 9
    driver.dataplane = dataclasses.replace(want(first(4)), routes={})
    for _ in range(12):
        agent.reconcile()
    assert agent.last.converged and agent.counters.drift == {}


def test_what_could_not_be_seen_for_a_while_is_not_drift(agent: Any, driver: Any) -> None:
    agent.reconcile()
    driver.unknown, driver.problems = frozenset({"flows"}), (Problem(Reason.SwitchDown, "does not answer"),)
    assert not agent.reconcile().converged
    # the switch starts with an empty table
    driver.unknown, driver.problems = frozenset(), ()
    driver.lose("flows", *driver.dataplane.flows)
    assert agent.reconcile().converged
    assert agent.counters.drift == {} and len(driver.dataplane.flows) == len(want(first(4)).flows)


# failing


def test_back_off_grows_to_its_limit_and_starts_again_after_success(agent: Any, driver: Any, clock: Any) -> None:
    driver.fails = 10**6
    waits = []
    for _ in range(12):
        agent.reconcile()
        waits.append(agent._retry_at - clock.now)
    # with jitter between half and the whole of 0.2 s, 0.4 s, …, 30 s
    limits = [min(0.2 * 2**n, 30.0) for n in range(12)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True)), waits
    assert agent.counters.failures == 12
    driver.fails = 0
    assert agent.reconcile().converged
    assert agent._retry_at == float("inf")
    driver.fails = 10**6
    driver.lose("ports", "gre-web2")
    agent.reconcile()
    assert agent._retry_at - clock.now <= 0.2


def test_a_conflict_waits_for_its_event(agent: Any, driver: Any, clock: Any) -> None:
    driver.unmanaged = (Unmanaged("links", "kbr0", "bridge kbr0 is unmanaged"),)
    result = agent.reconcile()
    assert not result.converged and agent._retry_at == float("inf") and agent.counters.failures == 0


# the removal guard


def test_a_mass_removal_is_held_and_named(agent: Any, driver: Any, source: Any, clock: Any) -> None:
    result = held_removal(agent, source)
    assert len(driver.dataplane.ports) == 3 and not result.converged
    assert [p.reason for p in result.problems] == [Reason.MassRemovalHeld]
    text = str(result.problems[0])
    assert "3 of this node's peers are missing from the mesh at once (web2, web3, web4)" in text
    # the line can be pasted, and the text is the same at each reconcile
    assert f"`ovsmesh confirm {held_digest(result.plan)} --state-dir {agent._state.path}`" in text
    assert agent.reconcile().problems == result.problems
    # a removal that is held is neither a failure nor tried again and again
    assert agent.counters.failures == 0 and agent._retry_at == float("inf")


def test_a_held_removal_is_carried_out_in_the_end(agent: Any, driver: Any, source: Any, clock: Any) -> None:
    held_removal(agent, source)
    clock.now += module.REMOVAL_HOLD - 1
    assert not agent.reconcile().converged and driver.dataplane.ports
    clock.now += 1
    assert agent.reconcile().converged and not driver.dataplane.ports
    assert agent.counters.drift == {}


def test_peers_that_come_back_end_it(agent: Any, driver: Any, source: Any, clock: Any) -> None:
    held_removal(agent, source)
    source.mesh = first(4)
    result = agent.reconcile()
    assert result.converged and result.problems == () and len(driver.plans) == 1
    # and the next removal is held for the whole time again
    clock.now += module.REMOVAL_HOLD
    source.mesh = first(1)
    assert agent.reconcile().plan.held


def test_more_peers_missing_later_are_held_as_long(agent: Any, driver: Any, source: Any, clock: Any) -> None:
    source.mesh = first(12)
    agent.reconcile()
    source.mesh = first(7)
    assert len(agent.reconcile().plan.held_peers) == 5
    clock.now += module.REMOVAL_HOLD - 1
    source.mesh = first(1)
    assert len(agent.reconcile().plan.held_peers) == 11
    clock.now += 2
    agent.reconcile()
    assert len(driver.dataplane.ports) == 11


def test_a_confirmation_of_something_else_lifts_nothing(
    agent: Any, driver: Any, source: Any, state: Any, clock: Any
) -> None:
    source.mesh = first(12)
    agent.reconcile()
    source.mesh = first(7)
    state.request_confirm(held_digest(agent.reconcile().plan))
    # before it is heard, the mesh has lost more
    source.mesh = first(1)
    result = agent.reconcile()
    assert len(driver.dataplane.ports) == 11 and len(result.plan.held_peers) == 11
    state.request_confirm(held_digest(result.plan))
    assert agent.reconcile().converged and not driver.dataplane.ports


def test_what_is_added_meanwhile_is_added(agent: Any, driver: Any, source: Any) -> None:
    agent.reconcile()
    source.mesh = mesh_of(numbered(1), numbered(9))
    result = agent.reconcile()
    assert "gre-web9" in driver.dataplane.ports and result.plan.held_peers == ("web2", "web3", "web4")


def test_rules_in_order_are_converged(agent: Any, driver: Any) -> None:
    # the order of rules is part of what is wanted
    agent.reconcile()
    driver.dataplane = dataclasses.replace(driver.dataplane, rules=dict(reversed(driver.dataplane.rules.items())))
    assert agent.reconcile().converged and agent.counters.drift == Counter(rules=1)


# the log and a look


def test_the_log_says_what_drifted_and_what_became_of_it(
    agent: Any, driver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    agent.reconcile()
    assert [line for line in caplog.messages if line.startswith("in sync with 3 peers (")]
    driver.lose("routes", ("10.97.2.0/24", 111))
    driver.fails = 1
    agent.reconcile()
    agent.reconcile()
    driver.lose("neighbours", "10.97.2.1")
    agent.reconcile()
    first_line, second_line = [line for line in caplog.messages if "by someone" in line]
    assert first_line == "route 10.97.2.0/24 was deleted by someone; not restored yet"
    assert second_line.startswith("neighbour 10.97.2.1 was deleted by someone; restored after ")
    assert [line for line in caplog.messages if line.startswith("resolved after ") and line.endswith(": ports: no")]


def test_a_look_finds_what_a_reconcile_would_and_changes_nothing(agent: Any, driver: Any, source: Any) -> None:
    found = look(driver, source.snapshot(), "web1")
    assert not found.converged and not driver.plans
    agent.reconcile()
    (applied,) = driver.plans
    assert found.plan == applied
    assert look(driver, source.snapshot(), "web1").converged
