"""The agent's loop: what wakes it, that it rests otherwise, and how it ends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from ovsmesh.agent import reconciler as room
from ovsmesh.agent.reconciler import held_digest
from ovsmesh.dataplane.types import Dataplane, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.support import fake_host
from tests.support.fake_host import Shown, braked, run
from tests.support.meshkit import FACTS, first, want

host = pytest.fixture(fake_host.make_host)
source = pytest.fixture(fake_host.make_source)
state = pytest.fixture(fake_host.make_state)
agent = pytest.fixture(fake_host.make_agent)
clock = pytest.fixture(fake_host.make_clock)
stop = pytest.fixture(fake_host.make_stop)


# the loop


def test_the_loop_rests_when_nothing_happens(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    shown = run(agent, host, clock, stop, 45)
    assert len(shown.turns) == 1
    # it looks at the sysctls now and then, and that is all
    assert len(host.waits) <= 45 / room.SYSCTL_POLL + 2
    assert shown.idled > 0


def test_a_bell_makes_a_turn_at_once(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    def cut() -> None:
        host.lose("routes", ("10.97.2.0/24", 111))
        host.bell = True

    shown = run(agent, host, clock, stop, 10, [(3.1, cut)])
    assert len(shown.turns) == 2 and agent.counters.drift == Counter(routes=1)
    assert host.dataplane == want(first(4))


def test_what_changes_while_the_agent_works_needs_no_second_bell(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    observe = host.observe

    def meanwhile(wanted: Any) -> Any:
        have = observe(wanted)
        if have.dataplane.ports:
            # the turn takes the notification in with this reading, and its facts are of before
            host.known, host.observe = dataclasses.replace(FACTS, underlay_mtu=9000), observe
        return have

    host.observe = meanwhile
    shown = run(agent, host, clock, stop, 0.1)
    assert len(shown.turns) == 2 and shown.turns[-1].converged
    assert host.dataplane == want(first(4), facts=host.known)
    assert agent.counters.drift == {}


def test_the_sources_bell_makes_a_turn_and_what_is_applied_is_kept(
    agent: Any, host: Any, source: Any, clock: Any, stop: Any
) -> None:
    def join() -> None:
        source.mesh, source.bell = first(5), True

    shown = run(agent, host, clock, stop, 10, [(3.1, join)])
    assert len(shown.turns) == 2 and len(host.dataplane.ports) == 4
    assert source.committed == 2


def test_a_mesh_that_could_not_be_applied_is_not_kept(
    agent: Any, host: Any, source: Any, clock: Any, stop: Any
) -> None:
    host.deaf = True
    run(agent, host, clock, stop, 5)
    assert source.committed == 0


def test_a_flipped_sysctl_needs_no_bell(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    def flip() -> None:
        values = {**host.dataplane.sysctls, "net/ipv4/ip_forward": "0"}
        host.dataplane = dataclasses.replace(host.dataplane, sysctls=values)

    shown = run(agent, host, clock, stop, 10, [(3.1, flip)])
    assert agent.counters.drift == Counter(sysctls=1) and len(shown.turns) == 2
    assert host.dataplane.sysctls["net/ipv4/ip_forward"] == "1"


def test_a_sysctl_that_can_not_be_set_does_not_ring_for_ever(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    host.unmanaged = (Unmanaged("links", "kbr0", "bridge kbr0 is not ours"),)
    host.dataplane = Dataplane(sysctls=dict.fromkeys(want(first(4)).sysctls, "9"))
    shown = run(agent, host, clock, stop, 20)
    assert len(shown.turns) <= 2


def test_all_is_read_again_now_and_then(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    shown = run(agent, host, clock, stop, 10 * room.RESYNC)
    assert 9 <= host.dirtied <= 13
    assert len(shown.turns) == host.dirtied + 1


def test_failures_are_tried_again_ever_more_seldom(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    host.fails = 10**6
    shown = run(agent, host, clock, stop, 120)
    # 0.2 + 0.4 + … + 25.6 s, then every 15 to 30 s, and the resyncs
    assert 9 <= len(shown.turns) <= 25


def test_the_end_of_a_failure_is_found_without_a_bell(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    host.fails = 4
    shown = run(agent, host, clock, stop, 10)
    assert shown.turns[-1].converged and not shown.turns[0].converged


def test_a_switch_that_is_gone_is_looked_for_and_costs_no_turns(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    host.switch_up, host.switch_lost = False, True
    host.unknown, host.problems = frozenset({"flows"}), (Problem(Reason.SwitchDown, "does not answer"),)

    def back() -> None:
        host.switch_answers = lambda: True
        host.unknown, host.problems, host.switch_up, host.switch_lost = frozenset(), (), True, False
        host.bell = True

    shown = run(agent, host, clock, stop, 10, [(5.0, back)])
    assert len(shown.turns) == 2 and shown.turns[-1].converged


def test_stop_ends_it_and_leaves_the_dataplane(agent: Any, host: Any, clock: Any, stop: Any) -> None:
    run(agent, host, clock, stop, 1)
    assert host.dataplane == want(first(4))
    assert [step for todo in host.plans for step in todo.steps if step.op == "-"] == []


def test_a_confirmation_is_heard_without_a_bell(
    agent: Any, host: Any, source: Any, state: Any, clock: Any, stop: Any
) -> None:
    digest = held_digest(braked(agent, source).plan)
    shown = run(agent, host, clock, stop, 20, [(5.0, lambda: state.request_confirm(digest))])
    assert not host.dataplane.ports and len(shown.turns) == 2


def test_confirmed_removals_are_carried_out_and_the_loop_rests(
    agent: Any, host: Any, source: Any, state: Any, clock: Any, stop: Any
) -> None:
    turn = braked(agent, source)
    state.request_confirm(held_digest(turn.plan))
    shown = run(agent, host, clock, stop, 20)
    assert not host.dataplane.ports
    assert state.confirmation() is None
    assert shown.turns[-1].converged
    assert len(shown.turns) <= 3


# once


def test_once_ends_when_nothing_is_left(agent: Any, host: Any, clock: Any) -> None:
    shown = Shown()
    assert agent.once(shown).converged
    assert len(shown.turns) == 1 and host.waits == []


def test_once_tries_again(agent: Any, host: Any, clock: Any) -> None:
    host.fails = 2
    shown = Shown()
    assert agent.once(shown).converged and [turn.converged for turn in shown.turns] == [False, False, True]


def test_once_gives_up(agent: Any, host: Any, clock: Any) -> None:
    host.fails = 10**6
    start = clock.now
    turn = agent.once(Shown())
    assert not turn.converged and turn.plan.steps
    assert agent.counters.failures == 4 and clock.now - start < 10


def test_once_does_not_wait_for_what_only_someone_else_can_mend(agent: Any, host: Any, source: Any, clock: Any) -> None:
    host.unmanaged = (Unmanaged("links", "kbr0", "bridge kbr0 is not ours"),)
    turn = agent.once(Shown())
    assert not turn.converged and host.waits == [] and turn.plan.blocked


def test_once_does_not_wait_for_the_brake(agent: Any, host: Any, source: Any, clock: Any) -> None:
    host.dataplane = want(first(12))
    turn = agent.once(Shown())
    assert not turn.converged and host.waits == [] and turn.plan.held


def test_once_keeps_to_its_deadline(agent: Any, host: Any, clock: Any) -> None:
    host.fails = 10**6
    agent.once(Shown(), deadline=0.01)
    assert agent.counters.failures == 1
