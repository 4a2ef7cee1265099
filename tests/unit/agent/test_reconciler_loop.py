"""The agent's loop: what wakes it, that it rests otherwise, and how it ends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from ovsmesh.agent import reconciler as module
from ovsmesh.agent.reconciler import held_digest
from ovsmesh.dataplane.types import Dataplane, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.support import fake_driver
from tests.support.fake_driver import Shown, held_removal, run
from tests.support.meshkit import FACTS, first, want

driver = pytest.fixture(fake_driver.make_driver)
source = pytest.fixture(fake_driver.make_source)
state = pytest.fixture(fake_driver.make_state)
agent = pytest.fixture(fake_driver.make_agent)
clock = pytest.fixture(fake_driver.make_clock)
stop = pytest.fixture(fake_driver.make_stop)


# the loop


def test_the_loop_rests_when_nothing_happens(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    shown = run(agent, driver, clock, stop, 45)
    assert len(shown.results) == 1
    # it looks at the sysctls now and then, and that is all
    assert len(driver.waits) <= 45 / module.SYSCTL_POLL + 2
    assert shown.idled > 0


def test_an_event_makes_a_reconcile_at_once(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    def cut() -> None:
        driver.lose("routes", ("10.97.2.0/24", 111))
        driver.event = True

    shown = run(agent, driver, clock, stop, 10, [(3.1, cut)])
    assert len(shown.results) == 2 and agent.counters.drift == Counter(routes=1)
    assert driver.dataplane == want(first(4))


def test_what_changes_while_the_agent_works_needs_no_second_event(
    agent: Any, driver: Any, clock: Any, stop: Any
) -> None:
    observe = driver.observe

    def meanwhile(wanted: Any) -> Any:
        have = observe(wanted)
        if have.dataplane.ports:
            # the reconcile reads the notification here, and its facts are of before
            driver.known, driver.observe = dataclasses.replace(FACTS, underlay_mtu=9000), observe
        return have

    driver.observe = meanwhile
    shown = run(agent, driver, clock, stop, 0.1)
    assert len(shown.results) == 2 and shown.results[-1].converged
    assert driver.dataplane == want(first(4), facts=driver.known)
    assert agent.counters.drift == {}


def test_an_event_of_the_source_makes_a_reconcile_and_what_is_applied_is_kept(
    agent: Any, driver: Any, source: Any, clock: Any, stop: Any
) -> None:
    def join() -> None:
        source.mesh, source.event = first(5), True

    shown = run(agent, driver, clock, stop, 10, [(3.1, join)])
    assert len(shown.results) == 2 and len(driver.dataplane.ports) == 4
    assert source.committed == 2


def test_a_mesh_that_could_not_be_applied_is_not_kept(
    agent: Any, driver: Any, source: Any, clock: Any, stop: Any
) -> None:
    driver.ineffective = True
    run(agent, driver, clock, stop, 5)
    assert source.committed == 0


def test_a_flipped_sysctl_needs_no_event(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    def flip() -> None:
        values = {**driver.dataplane.sysctls, "net/ipv4/ip_forward": "0"}
        driver.dataplane = dataclasses.replace(driver.dataplane, sysctls=values)

    shown = run(agent, driver, clock, stop, 10, [(3.1, flip)])
    assert agent.counters.drift == Counter(sysctls=1) and len(shown.results) == 2
    assert driver.dataplane.sysctls["net/ipv4/ip_forward"] == "1"


def test_a_sysctl_that_can_not_be_set_does_not_wake_the_loop_without_end(
    agent: Any, driver: Any, clock: Any, stop: Any
) -> None:
    driver.unmanaged = (Unmanaged("links", "kbr0", "bridge kbr0 is unmanaged"),)
    driver.dataplane = Dataplane(sysctls=dict.fromkeys(want(first(4)).sysctls, "9"))
    shown = run(agent, driver, clock, stop, 20)
    assert len(shown.results) <= 2


def test_all_is_read_again_now_and_then(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    shown = run(agent, driver, clock, stop, 10 * module.RESYNC)
    assert 9 <= driver.dirtied <= 13
    assert len(shown.results) == driver.dirtied + 1


def test_failures_are_tried_again_ever_more_seldom(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    driver.fails = 10**6
    shown = run(agent, driver, clock, stop, 120)
    # 0.2 + 0.4 + … + 25.6 s, then every 15 to 30 s, and the resyncs
    assert 9 <= len(shown.results) <= 25


def test_the_end_of_a_failure_is_found_without_an_event(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    driver.fails = 4
    shown = run(agent, driver, clock, stop, 10)
    assert shown.results[-1].converged and not shown.results[0].converged


def test_a_switch_that_is_gone_is_looked_for_and_costs_no_reconciles(
    agent: Any, driver: Any, clock: Any, stop: Any
) -> None:
    driver.switch_up, driver.switch_lost = False, True
    driver.unknown, driver.problems = frozenset({"flows"}), (Problem(Reason.SwitchDown, "does not answer"),)

    def back() -> None:
        driver.switch_answers = lambda: True
        driver.unknown, driver.problems, driver.switch_up, driver.switch_lost = frozenset(), (), True, False
        driver.event = True

    shown = run(agent, driver, clock, stop, 10, [(5.0, back)])
    assert len(shown.results) == 2 and shown.results[-1].converged


def test_stop_ends_it_and_leaves_the_dataplane(agent: Any, driver: Any, clock: Any, stop: Any) -> None:
    run(agent, driver, clock, stop, 1)
    assert driver.dataplane == want(first(4))
    assert [step for todo in driver.plans for step in todo.steps if step.op == "-"] == []


def test_a_confirmation_is_noticed_without_an_event(
    agent: Any, driver: Any, source: Any, state: Any, clock: Any, stop: Any
) -> None:
    digest = held_digest(held_removal(agent, source).plan)
    shown = run(agent, driver, clock, stop, 20, [(5.0, lambda: state.request_confirm(digest))])
    assert not driver.dataplane.ports and len(shown.results) == 2


def test_confirmed_removals_are_carried_out_and_the_loop_rests(
    agent: Any, driver: Any, source: Any, state: Any, clock: Any, stop: Any
) -> None:
    result = held_removal(agent, source)
    state.request_confirm(held_digest(result.plan))
    shown = run(agent, driver, clock, stop, 20)
    assert not driver.dataplane.ports
    assert state.confirmation() is None
    assert shown.results[-1].converged
    assert len(shown.results) <= 3


def test_a_confirmed_removal_that_fails_is_tried_again_as_seldom_as_other_steps(
    agent: Any, driver: Any, source: Any, state: Any, clock: Any, stop: Any
) -> None:
    result = held_removal(agent, source)
    state.request_confirm(held_digest(result.plan))
    driver.fails = 10**6
    shown = run(agent, driver, clock, stop, 120)
    assert driver.dataplane.ports and len(shown.results) <= 25


# once


def test_once_ends_when_nothing_is_left(agent: Any, driver: Any, clock: Any) -> None:
    shown = Shown()
    assert agent.once([shown]).converged
    assert len(shown.results) == 1 and driver.waits == []


def test_once_tries_again(agent: Any, driver: Any, clock: Any) -> None:
    driver.fails = 2
    shown = Shown()
    assert agent.once([shown]).converged and [result.converged for result in shown.results] == [False, False, True]


def test_once_gives_up(agent: Any, driver: Any, clock: Any) -> None:
    driver.fails = 10**6
    start = clock.now
    result = agent.once([Shown()])
    assert not result.converged and result.plan.steps
    assert agent.counters.failures == 4 and clock.now - start < 10


def test_once_does_not_wait_for_what_only_someone_else_can_repair(
    agent: Any, driver: Any, source: Any, clock: Any
) -> None:
    driver.unmanaged = (Unmanaged("links", "kbr0", "bridge kbr0 is unmanaged"),)
    result = agent.once([Shown()])
    assert not result.converged and driver.waits == [] and result.plan.blocked


def test_once_does_not_wait_for_a_held_removal(agent: Any, driver: Any, source: Any, clock: Any) -> None:
    driver.dataplane = want(first(12))
    result = agent.once([Shown()])
    assert not result.converged and driver.waits == [] and result.plan.held


def test_once_keeps_to_its_deadline(agent: Any, driver: Any, clock: Any) -> None:
    driver.fails = 10**6
    agent.once([Shown()], deadline=0.01)
    assert agent.counters.failures == 1
