"""The loop's logic, on a host and a source that are values: what it does when, and when it rests."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from meshkit import FACTS, first, mesh_of, numbered, want

from ovsmesh import agent as room
from ovsmesh.agent import Agent, held_digest
from ovsmesh.model import Dataplane, Foreign, Observed, OvsmeshError, Problem, Rule
from ovsmesh.sources import Snapshot
from ovsmesh.state import StateDir


class FakeHost:
    """A system that does what it is told, unless a test says otherwise."""

    def __init__(self):
        self.dataplane = Dataplane()
        self.known = FACTS
        self.foreign = ()
        self.problems = ()
        self.unknown = frozenset()
        self.switch_up = True
        self.switch_lost = False
        self.ovs = SimpleNamespace(version="3.1.0")
        self.plans = []
        self.fails = 0
        """How many more times applying is to fail."""
        self.deaf = False
        """Whether what is applied does not take."""
        self.dirtied = 0
        self.waits = []
        self.bell = False
        self.on_wait = lambda: None

    def facts(self, mesh, me):
        return self.known

    def possible(self, want, try_out=True):
        return want

    def observe(self, want):
        have = self.dataplane
        parts = {f.name: ({} if f.name in self.unknown else getattr(have, f.name)) for f in dataclasses.fields(have)}
        parts["sysctls"] = {k: v for k, v in have.sysctls.items() if k in want.sysctls}
        return Observed(Dataplane(**parts), self.foreign, self.problems, self.unknown)

    def apply(self, todo, want):
        self.plans.append(todo)
        if self.fails:
            self.fails -= 1
            return [Problem("ApplyFailed", "ports: no")]
        if not self.deaf:
            parts = {f.name: dict(getattr(self.dataplane, f.name)) for f in dataclasses.fields(self.dataplane)}
            for step in todo.steps:
                if step.op == "-":
                    del parts[step.kind][step.key]
                else:
                    parts[step.kind][step.key] = step.want
            parts["rules"] = {k: parts["rules"][k] for k in want.rules if k in parts["rules"]}
            self.dataplane = Dataplane(**parts)
        return []

    def lose(self, kind, *keys):
        left = {k: v for k, v in getattr(self.dataplane, kind).items() if k not in keys}
        self.dataplane = dataclasses.replace(self.dataplane, **{kind: left})

    def dirty(self):
        self.dirtied += 1

    def drain(self):
        rang, self.bell = self.bell, False
        return rang

    def fds(self):
        return []

    def switch_answers(self):
        return False

    def wait(self, fds, timeout):
        self.waits.append(timeout)
        self.on_wait()


class FakeSource:
    def __init__(self, mesh):
        self.mesh = mesh
        self.problems = ()
        self.confirmed = True
        self.committed = 0
        self.bell = False

    def snapshot(self):
        return Snapshot(self.mesh, self.problems, self.confirmed, 1.0)

    def commit(self):
        self.committed += 1
        return ()

    def drain(self):
        rang, self.bell = self.bell, False
        return rang

    def fds(self):
        return []

    def close(self):
        return


class Shown:
    def __init__(self):
        self.turns = []
        self.flushed = 0

    def publish(self, turn, runtime):
        self.turns.append(turn)

    def flush(self):
        self.flushed += 1


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self, host):
        self.now = 1000.0
        host.on_wait = lambda: self.advance(host.waits[-1])

    def advance(self, seconds):
        # select() never returns too early, and a moment always passes
        self.now += seconds + 0.0005

    def monotonic(self):
        return self.now


@pytest.fixture
def host():
    return FakeHost()


@pytest.fixture
def source():
    return FakeSource(first(4))


@pytest.fixture
def state(tmp_path):
    made = StateDir(tmp_path / "state")
    made.ensure()
    return made


@pytest.fixture
def agent(host, source, state):
    return Agent("web1", source, host, state)


@pytest.fixture
def clock(host, monkeypatch):
    made = Clock(host)
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=made.monotonic, time=time.time))
    monkeypatch.setattr(
        room, "read_sysctls", lambda keys: {k: v for k, v in host.dataplane.sysctls.items() if k in keys}
    )
    return made


@pytest.fixture
def stop():
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    yield SimpleNamespace(fd=read, now=lambda: os.write(write, b"x"))
    os.close(read)
    os.close(write)


def run(agent, host, clock, stop, seconds, at=()):
    """Runs the loop for so many seconds of the clock; `at` holds (second, what happens then)."""
    start, shown, left = clock.now, Shown(), sorted(at, key=lambda pair: pair[0])

    def pass_time():
        until = clock.now + host.waits[-1]
        if left and start + left[0][0] <= until:
            when, what = left.pop(0)
            clock.now = max(clock.now, start + when)
            what()
        else:
            clock.advance(host.waits[-1])
        if clock.now >= start + seconds:
            stop.now()
        assert len(host.waits) < 20_000, "the loop does not rest"

    host.on_wait = pass_time
    agent.run(stop.fd, shown)
    return shown


# one turn


def test_a_turn_brings_the_host_to_what_the_mesh_wants(agent, host):
    turn = agent.turn()
    assert host.dataplane == want(first(4))
    assert turn.converged and turn.whole and not turn.plan and turn.problems == ()
    assert len(host.plans) == 1


def test_a_second_turn_writes_nothing(agent, host):
    agent.turn()
    assert agent.turn().converged
    assert len(host.plans) == 1
    assert agent.runtime.operations["ports", "+"] == 3


def test_an_agent_that_starts_again_writes_nothing(agent, host, source, state):
    agent.turn()
    again = Agent("web1", source, host, state)
    assert again.turn().converged and len(host.plans) == 1
    assert again.runtime.drift == {} and again.runtime.operations == {}


def test_no_mesh_touches_nothing(agent, host, source):
    source.mesh, source.problems = None, (Problem("MeshFileInvalid", "is not YAML"),)
    host.dataplane = want(first(3))
    turn = agent.turn()
    assert not turn.converged and turn.mesh is None and host.plans == []
    assert turn.problems == source.problems


def test_the_last_good_mesh_is_followed_and_said_not_to_be_current(agent, host, source):
    source.confirmed, source.problems = False, (Problem("MeshFileUnreadable", "can't be read"),)
    turn = agent.turn()
    assert host.dataplane == want(first(4))
    assert turn.converged and not turn.whole and turn.problems == source.problems


def test_old_sysctls_are_remembered_before_they_are_changed(agent, host, state):
    host.dataplane = Dataplane(sysctls={"net/ipv4/ip_forward": "0"})
    seen = []
    apply = host.apply
    host.apply = lambda todo, want: (seen.append(state.before()[0]), apply(todo, want))[1]
    agent.turn()
    assert seen[0] == {"net/ipv4/ip_forward": "0"}


def test_what_does_not_take_is_said_and_not_tried_for_ever(agent, host):
    host.deaf = True
    turn = agent.turn()
    assert [p.reason for p in turn.problems] == ["NotConverged"]
    assert "the first: + bridge obr0" in str(turn.problems[0])
    assert not turn.converged and 1 <= len(host.plans) <= 3


@pytest.mark.parametrize(
    "error", [OvsmeshError("the kernel's tables change too fast"), PermissionError(1, "not allowed")]
)
def test_an_error_on_the_way_ends_the_turn_and_not_the_agent(agent, host, error):
    def fail(want):
        raise error

    observe, host.observe = host.observe, fail
    turn = agent.turn()
    assert [p.reason for p in turn.problems] == ["TurnFailed"]
    assert ("too fast" in str(turn.problems[0])) or str(turn.problems[0]) == "not allowed"
    assert host.dirtied == 1 and not turn.converged
    host.observe = observe
    assert agent.turn().converged


def test_a_bug_is_not_taken_for_a_failure(agent, host):
    def bug(want):
        raise TypeError("a bug")

    host.observe = bug
    with pytest.raises(TypeError):
        agent.turn()


def test_what_is_wrong_with_others_does_not_keep_this_node_from_converging(agent, source):
    other = dataclasses.replace(numbered(3), address=numbered(3).pod_cidrs[1].network_address + 9)
    source.mesh = mesh_of(numbered(1), numbered(2), other)
    turn = agent.turn()
    assert turn.converged and [p.reason for p in turn.problems] == ["AddressFamilyMismatch"]


def test_foreign_things_are_named_each_way(agent, host):
    host.foreign = (Foreign("flows", "1 ", "flow x is not ours", blocks=False),)
    turn = agent.turn()
    assert turn.converged and [str(p) for p in turn.problems] == ["flow x is not ours"]
    host.foreign = (Foreign("routes", "10.97.2.0/24", "route x is not ours"),)
    host.lose("routes", ("10.97.2.0/24", 111))
    turn = agent.turn()
    assert not turn.converged and len(turn.plan.blocked) == 1


# drift


def test_what_someone_else_takes_away_is_drift_and_put_back(agent, host):
    agent.turn()
    host.lose("routes", ("10.97.2.0/24", 111))
    host.lose("ports", "gre-web3")
    assert agent.turn().converged
    assert host.dataplane == want(first(4))
    assert agent.runtime.drift == Counter(routes=1, ports=1)


def test_what_someone_else_adds_or_changes_is_drift(agent, host):
    agent.turn()
    parts = {**host.dataplane.flows, "50 tcp": "NORMAL", "0 ": "NORMAL"}
    host.dataplane = dataclasses.replace(host.dataplane, flows=parts)
    agent.turn()
    assert agent.runtime.drift == Counter(flows=2)


@pytest.mark.parametrize("what", ["mesh", "facts"])
def test_another_wish_or_another_host_is_not_drift(agent, host, source, what):
    agent.turn()
    if what == "mesh":
        source.mesh = first(5)
    else:
        host.known = dataclasses.replace(FACTS, underlay_mtu=9000)
    assert agent.turn().converged
    assert len(host.plans) == 2 and agent.runtime.drift == {}


def test_the_first_turn_and_unfinished_business_are_not_drift(agent, host):
    host.fails = 9
    host.dataplane = dataclasses.replace(want(first(4)), routes={})
    for _ in range(12):
        agent.turn()
    assert agent.last.converged and agent.runtime.drift == {}


def test_what_could_not_be_seen_for_a_while_is_not_drift(agent, host):
    agent.turn()
    host.unknown, host.problems = frozenset({"flows"}), (Problem("SwitchDown", "does not answer"),)
    assert not agent.turn().converged
    # the switch starts with an empty table
    host.unknown, host.problems = frozenset(), ()
    host.lose("flows", *host.dataplane.flows)
    assert agent.turn().converged
    assert agent.runtime.drift == {} and len(host.dataplane.flows) == len(want(first(4)).flows)


# failing


def test_back_off_grows_to_its_limit_and_starts_anew_after_success(agent, host, clock):
    host.fails = 10**6
    waits = []
    for _ in range(12):
        agent.turn()
        waits.append(agent._retry_at - clock.now)
    # with jitter between half and the whole of 0.2 s, 0.4 s, …, 30 s
    limits = [min(0.2 * 2**n, 30.0) for n in range(12)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True)), waits
    assert agent.runtime.failures == 12
    host.fails = 0
    assert agent.turn().converged
    assert agent._retry_at == float("inf")
    host.fails = 10**6
    host.lose("ports", "gre-web2")
    agent.turn()
    assert agent._retry_at - clock.now <= 0.2


def test_something_in_the_way_waits_for_its_bell(agent, host, clock):
    host.foreign = (Foreign("links", "kbr0", "bridge kbr0 is not ours"),)
    turn = agent.turn()
    assert not turn.converged and agent._retry_at == float("inf") and agent.runtime.failures == 0


# the brake


def braked(agent, source):
    agent.turn()
    source.mesh = first(1)
    return agent.turn()


def test_a_mass_removal_is_held_and_named(agent, host, source, clock):
    turn = braked(agent, source)
    assert len(host.dataplane.ports) == 3 and not turn.converged
    assert [p.reason for p in turn.problems] == ["MassRemovalHeld"]
    text = str(turn.problems[0])
    assert "lacks 3 of this node's peers at once (web2, web3, web4)" in text
    assert f"`ovsmesh confirm {held_digest(turn.plan)}`" in text
    # a removal that is held is neither a failure nor tried again and again
    assert agent.runtime.failures == 0 and agent._retry_at == float("inf")


def test_a_held_removal_is_carried_out_in_the_end(agent, host, source, clock):
    braked(agent, source)
    clock.now += room.BRAKE_HOLD - 1
    assert not agent.turn().converged and host.dataplane.ports
    clock.now += 1
    assert agent.turn().converged and not host.dataplane.ports
    assert agent.runtime.drift == {}


def test_peers_that_come_back_end_it(agent, host, source, clock):
    braked(agent, source)
    source.mesh = first(4)
    turn = agent.turn()
    assert turn.converged and turn.problems == () and len(host.plans) == 1
    # and the next removal is held for the whole time again
    clock.now += room.BRAKE_HOLD
    source.mesh = first(1)
    assert agent.turn().plan.held


def test_more_peers_missing_later_are_held_as_long(agent, host, source, clock):
    source.mesh = first(12)
    agent.turn()
    source.mesh = first(7)
    assert len(agent.turn().plan.held_peers) == 5
    clock.now += room.BRAKE_HOLD - 1
    source.mesh = first(1)
    assert len(agent.turn().plan.held_peers) == 11
    clock.now += 2
    agent.turn()
    assert len(host.dataplane.ports) == 11


def test_confirmed_removals_are_carried_out_and_the_loop_rests(agent, host, source, state, clock, stop):
    turn = braked(agent, source)
    state.request_confirm(held_digest(turn.plan))
    shown = run(agent, host, clock, stop, 20)
    assert not host.dataplane.ports
    assert state.confirmation() is None
    assert shown.turns[-1].converged
    assert len(shown.turns) <= 3


def test_a_confirmation_of_something_else_lifts_nothing(agent, host, source, state, clock):
    source.mesh = first(12)
    agent.turn()
    source.mesh = first(7)
    state.request_confirm(held_digest(agent.turn().plan))
    # before it is heard, the mesh has lost more
    source.mesh = first(1)
    turn = agent.turn()
    assert len(host.dataplane.ports) == 11 and len(turn.plan.held_peers) == 11
    state.request_confirm(held_digest(turn.plan))
    assert agent.turn().converged and not host.dataplane.ports


def test_what_is_added_meanwhile_is_added(agent, host, source):
    agent.turn()
    source.mesh = mesh_of(numbered(1), numbered(9))
    turn = agent.turn()
    assert "gre-web9" in host.dataplane.ports and turn.plan.held_peers == ("web2", "web3", "web4")


# the loop


def test_the_loop_rests_when_nothing_happens(agent, host, clock, stop):
    shown = run(agent, host, clock, stop, 45)
    assert len(shown.turns) == 1
    # it looks at the sysctls now and then, and that is all
    assert len(host.waits) <= 45 / room.SYSCTL_POLL + 2
    assert shown.flushed > 0


def test_a_bell_makes_a_turn_at_once(agent, host, clock, stop):
    def cut():
        host.lose("routes", ("10.97.2.0/24", 111))
        host.bell = True

    shown = run(agent, host, clock, stop, 10, [(3.1, cut)])
    assert len(shown.turns) == 2 and agent.runtime.drift == Counter(routes=1)
    assert host.dataplane == want(first(4))


def test_the_sources_bell_makes_a_turn_and_what_is_applied_is_kept(agent, host, source, clock, stop):
    def join():
        source.mesh, source.bell = first(5), True

    shown = run(agent, host, clock, stop, 10, [(3.1, join)])
    assert len(shown.turns) == 2 and len(host.dataplane.ports) == 4
    assert source.committed == 2


def test_a_mesh_that_could_not_be_applied_is_not_kept(agent, host, source, clock, stop):
    host.deaf = True
    run(agent, host, clock, stop, 5)
    assert source.committed == 0


def test_a_flipped_sysctl_needs_no_bell(agent, host, clock, stop):
    def flip():
        values = {**host.dataplane.sysctls, "net/ipv4/ip_forward": "0"}
        host.dataplane = dataclasses.replace(host.dataplane, sysctls=values)

    shown = run(agent, host, clock, stop, 10, [(3.1, flip)])
    assert agent.runtime.drift == Counter(sysctls=1) and len(shown.turns) == 2
    assert host.dataplane.sysctls["net/ipv4/ip_forward"] == "1"


def test_a_sysctl_that_can_not_be_set_does_not_ring_for_ever(agent, host, clock, stop):
    host.foreign = (Foreign("links", "kbr0", "bridge kbr0 is not ours"),)
    host.dataplane = Dataplane(sysctls=dict.fromkeys(want(first(4)).sysctls, "9"))
    shown = run(agent, host, clock, stop, 20)
    assert len(shown.turns) <= 2


def test_all_is_read_again_now_and_then(agent, host, clock, stop):
    shown = run(agent, host, clock, stop, 10 * room.RESYNC)
    assert 9 <= host.dirtied <= 13
    assert len(shown.turns) == host.dirtied + 1


def test_failures_are_tried_again_ever_more_seldom(agent, host, clock, stop):
    host.fails = 10**6
    shown = run(agent, host, clock, stop, 120)
    # 0.2 + 0.4 + … + 25.6 s, then every 15 to 30 s, and the resyncs
    assert 9 <= len(shown.turns) <= 25


def test_the_end_of_a_failure_is_found_without_a_bell(agent, host, clock, stop):
    host.fails = 4
    shown = run(agent, host, clock, stop, 10)
    assert shown.turns[-1].converged and not shown.turns[0].converged


def test_a_switch_that_is_gone_is_looked_for_and_costs_no_turns(agent, host, clock, stop):
    host.switch_up, host.switch_lost = False, True
    host.unknown, host.problems = frozenset({"flows"}), (Problem("SwitchDown", "does not answer"),)

    def back():
        host.switch_answers = lambda: True
        host.unknown, host.problems, host.switch_up, host.switch_lost = frozenset(), (), True, False
        host.bell = True

    shown = run(agent, host, clock, stop, 10, [(5.0, back)])
    assert len(shown.turns) == 2 and shown.turns[-1].converged


def test_stop_ends_it_and_leaves_the_dataplane(agent, host, clock, stop):
    run(agent, host, clock, stop, 1)
    assert host.dataplane == want(first(4))
    assert [step for todo in host.plans for step in todo.steps if step.op == "-"] == []


# once


def test_once_ends_when_nothing_is_left(agent, host, clock):
    shown = Shown()
    assert agent.once(shown).converged
    assert len(shown.turns) == 1 and host.waits == []


def test_once_tries_again(agent, host, clock):
    host.fails = 2
    shown = Shown()
    assert agent.once(shown).converged and [turn.converged for turn in shown.turns] == [False, False, True]


def test_once_gives_up(agent, host, clock):
    host.fails = 10**6
    start = clock.now
    turn = agent.once(Shown())
    assert not turn.converged and turn.plan.steps
    assert agent.runtime.failures == 4 and clock.now - start < 10


def test_once_does_not_wait_for_what_only_someone_else_can_mend(agent, host, source, clock):
    host.foreign = (Foreign("links", "kbr0", "bridge kbr0 is not ours"),)
    turn = agent.once(Shown())
    assert not turn.converged and host.waits == [] and turn.plan.blocked


def test_once_does_not_wait_for_the_brake(agent, host, source, clock):
    host.dataplane = want(first(12))
    turn = agent.once(Shown())
    assert not turn.converged and host.waits == [] and turn.plan.held


def test_once_keeps_to_its_deadline(agent, host, clock):
    host.fails = 10**6
    agent.once(Shown(), deadline=0.01)
    assert agent.runtime.failures == 1


def test_rules_in_order_are_converged(agent, host):
    # the order of rules is part of what is wanted
    agent.turn()
    host.dataplane = dataclasses.replace(host.dataplane, rules=dict(reversed(host.dataplane.rules.items())))
    assert agent.turn().converged and agent.runtime.drift == Counter(rules=1)
    assert all(isinstance(rule, Rule) for rule in host.dataplane.rules.values())
