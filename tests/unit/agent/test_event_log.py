"""What the agent's log and its history say: each change once, in words, after it happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from ovsmesh.agent.reconciler import Reconciler, held_digest
from ovsmesh.agent.result import EventLog, ReconcileResult
from ovsmesh.dataplane.types import Link, Reach, State, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.history import Entry, Event, History, read
from ovsmesh.reasons import Reason
from tests.support import fake_driver
from tests.support.fake_driver import held_removal
from tests.support.meshkit import FACTS, first, want

driver = pytest.fixture(fake_driver.make_driver)
source = pytest.fixture(fake_driver.make_source)
state = pytest.fixture(fake_driver.make_state)


@pytest.fixture
def history() -> History:
    return History()


@pytest.fixture
def agent(driver: Any, source: Any, state: Any, history: History) -> Reconciler:
    return Reconciler("web1", source, driver, state, "/etc/mesh.yaml", history=history)


@pytest.fixture
def said(history: History) -> Callable[..., list[Entry]]:
    """Return what was said since the last call, of some events or of all."""
    seen = 0

    def since(*events: Event) -> list[Entry]:
        nonlocal seen
        new, seen = history.recent()[seen:], len(history.recent())
        return [entry for entry in new if not events or entry.event in events]

    return since


def test_a_start_says_who_starts_what_was_done_and_that_the_node_is_in_sync(agent: Reconciler, said: Any) -> None:
    agent.reconcile()
    start, change, in_sync = said()
    assert start.event == "start" and start.what.endswith("starts on node web1, mesh from /etc/mesh.yaml, 3 peers")
    assert change.event == "change" and change.who == "agent start" and change.took is not None
    assert change.what.startswith("added bridge obr0, 2 links (kbr0, obr0), ")
    assert in_sync.event == "in-sync" and in_sync.what.startswith("in sync with 3 peers (mesh ")
    agent.reconcile()
    assert said() == []


def test_an_agent_that_was_killed_is_told_by_the_next_one(agent: Reconciler, history: History, said: Any) -> None:
    history.add(Event.CHANGE, "the last thing that an earlier agent did")
    agent.reconcile()
    assert "the one before was not stopped" in said(Event.START)[0].what


def test_an_agent_that_was_stopped_is_no_news(agent: Reconciler, history: History, said: Any) -> None:
    history.add(Event.STOP, "the last thing that an earlier agent did")
    agent.reconcile()
    assert "before" not in said(Event.START)[0].what


def test_once_stops_with_a_line(agent: Reconciler, said: Any) -> None:
    agent.once([])
    (stop,) = said(Event.STOP)
    assert "stops on node web1; what is in place stays" in stop.what and stop.took is not None


def test_a_change_of_the_mesh_is_told_with_its_source_and_kept_in_full(
    driver: Any, source: Any, state: Any, said: Any
) -> None:
    history = History(state.path)
    agent = Reconciler("web1", source, driver, state, "/etc/mesh.yaml", history=history)
    agent.reconcile()
    source.mesh = first(6)
    agent.reconcile()
    history.close()
    change = read(state.path)[-1]
    assert change.event == "change" and change.who == "mesh file" and "2 ports (gre-web5, gre-web6)" in change.what
    assert "+ port gre-web6" in change.parts and len([p for p in change.parts if p.startswith("+ flow ")]) > 1


def test_a_change_of_the_host_is_told_as_such(agent: Reconciler, driver: Any, said: Any) -> None:
    agent.reconcile()
    said()
    driver.known = dataclasses.replace(FACTS, underlay_mtu=1400)
    agent.reconcile()
    assert [entry.who for entry in said(Event.CHANGE)] == ["a change of this host"]


def test_drift_is_told_in_words_with_how_long_until_it_was_repaired(agent: Reconciler, driver: Any, said: Any) -> None:
    agent.reconcile()
    said()
    driver.lose("routes", ("10.97.2.0/24", 111))
    agent.reconcile()
    (drift,) = said()
    assert (drift.event, drift.who) == ("drift", "someone") and drift.took is not None
    assert drift.text.startswith("route 10.97.2.0/24 was deleted by someone; restored after ")


def test_the_process_that_caused_drift_is_named_where_it_is_known(agent: Reconciler, driver: Any, said: Any) -> None:
    agent.reconcile()
    said()
    driver.culprit = "NetworkManager, pid 812"
    driver.lose("routes", ("10.97.2.0/24", 111))
    agent.reconcile()
    (drift,) = said()
    assert drift.who == "NetworkManager, pid 812"
    assert drift.text.startswith("route 10.97.2.0/24 was deleted by someone (NetworkManager, pid 812); restored after ")


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("sysctls", {"net/ipv4/ip_forward": "0"}, "sysctl net/ipv4/ip_forward was changed by someone (0, not 1)"),
        ("neighbours", {"10.97.9.1": "0a:58:0a:61:09:01"}, "neighbour 10.97.9.1 was added by someone"),
        ("restore_wait", {"flow-restore-wait": True}, "flow-restore-wait was set by a restart of Open vSwitch"),
    ],
)
def test_each_way_to_drift_has_its_words(
    agent: Reconciler, driver: Any, said: Any, kind: str, change: Any, text: str
) -> None:
    agent.reconcile()
    said()
    driver.dataplane = dataclasses.replace(driver.dataplane, **{kind: {**getattr(driver.dataplane, kind), **change}})
    agent.reconcile()
    assert [entry.what for entry in said()] == [text]


def test_drift_of_one_part_says_how_it_differs(agent: Reconciler, driver: Any, said: Any) -> None:
    agent.reconcile()
    said()
    links = dict(driver.dataplane.links)
    good: Link = links["kbr0"]
    links["kbr0"] = good._replace(mtu=1400, up=False)
    driver.dataplane = dataclasses.replace(driver.dataplane, links=links)
    agent.reconcile()
    assert said()[0].what == f"link kbr0 was changed by someone (mtu 1400, not {good.mtu}; state down, not up)"


def test_drift_of_many_is_one_line_and_the_history_holds_them_all(
    agent: Reconciler, driver: Any, source: Any, said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source.mesh = first(12)
    agent.reconcile()
    said()
    caplog.set_level("INFO")
    driver.lose("routes", *[(f"10.97.{n}.0/24", 111) for n in range(2, 12)])
    agent.reconcile()
    (drift,) = said()
    assert drift.what == ("10 routes (10.97.10.0/24, 10.97.11.0/24, 10.97.2.0/24, and 7 more) were deleted by someone")
    (line,) = caplog.messages
    assert line.endswith("(`ovsmesh history` has all 10)")


def test_a_change_is_told_after_it_was_made_and_one_that_failed_is_not(
    agent: Reconciler, driver: Any, said: Any
) -> None:
    driver.fails = 1
    agent.reconcile()
    assert [entry.event for entry in said()] == ["start", "failed", "degraded"]
    agent.reconcile()
    change, resolved, in_sync = said()
    assert (change.event, change.who) == ("change", "another attempt")
    assert (resolved.event, resolved.what) == ("resolved", "ports: no") and resolved.took is not None
    assert in_sync.event == "in-sync" and in_sync.took is not None


def test_changes_whose_end_nobody_saw_are_told_as_such(
    agent: Reconciler, driver: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(todo: Any, want: Any) -> Any:
        raise OvsmeshError("the kernel said no")

    monkeypatch.setattr(driver, "apply", break_down)
    agent.reconcile()
    _, change, failed, degraded = said()
    assert change.what.endswith(": how that ended is not known")
    assert failed.what == "the kernel said no" and degraded.what == "degraded: the kernel said no"


def test_a_problem_is_told_when_it_comes_and_when_it_goes(
    agent: Reconciler, driver: Any, said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    agent.reconcile()
    said()
    driver.problems = (Problem(Reason.Foreign, "a flow of someone"), Problem(Reason.SwitchUnseen, "no answer"))
    agent.reconcile()
    agent.reconcile()
    assert [(entry.event, entry.what) for entry in said()] == [
        ("problem", "a flow of someone"),
        ("problem", "no answer"),
        ("degraded", "degraded: no answer"),
    ]
    assert [record.levelname for record in caplog.records[-3:]] == ["WARNING", "ERROR", "WARNING"]
    driver.problems = ()
    agent.reconcile()
    assert [(entry.event, entry.what) for entry in said()][:2] == [
        ("resolved", "a flow of someone"),
        ("resolved", "no answer"),
    ]


def test_what_is_in_the_way_is_a_problem(agent: Reconciler, driver: Any, said: Any) -> None:
    driver.unmanaged = (Unmanaged("routes", "10.97.2.0/24", "route of someone"),)
    agent.reconcile()
    assert "route 10.97.2.0/24 blocked: route of someone" in [entry.what for entry in said(Event.PROBLEM)]


def test_a_thousand_problems_are_one_line(agent: Reconciler, driver: Any, said: Any) -> None:
    agent.reconcile()
    said()
    driver.problems = tuple(Problem(Reason.PortError, f"port {n}: no") for n in range(1000))
    agent.reconcile()
    problem, degraded = said()
    assert problem.what == "1000 problems, the first: port 0: no"
    assert degraded.what == "degraded: port 0: no (and 999 other problems)"
    driver.problems = ()
    agent.reconcile()
    assert said()[0].what == "1000 problems, the first: port 0: no"


def test_held_removals_and_their_confirmation(agent: Reconciler, source: Any, state: Any, said: Any) -> None:
    todo = held_removal(agent, source).plan
    held, degraded = said(Event.HELD, Event.DEGRADED)
    assert held_digest(todo) in held.what and degraded.what == "degraded: the removal of 3 peers is held"
    agent.reconcile()
    state.request_confirm(held_digest(todo))
    agent.reconcile()
    confirmed, change = said(Event.CONFIRMED, Event.CHANGE, Event.RESOLVED, Event.HELD)[-2:][::-1]
    assert confirmed.who == "ovsmesh confirm" and change.who == "ovsmesh confirm"


def test_a_hold_that_the_mesh_ends(agent: Reconciler, source: Any, said: Any) -> None:
    mesh = first(8)
    source.mesh = mesh
    agent.reconcile()
    source.mesh = first(2)
    agent.reconcile()
    source.mesh = mesh
    said()
    agent.reconcile()
    assert said(Event.RESOLVED)[0].what.endswith(": they are in the mesh again")


# peers


def reach(state: State, **more: Any) -> Reach:
    return Reach(state, since=100.0, **more)


@pytest.fixture
def peers(history: History) -> Callable[..., None]:
    """Tell that peers are in these states."""
    mesh = first(40)
    result = ReconcileResult(mesh, FACTS, want(mesh), converged=True)
    events = EventLog(history, "web1", "file")
    events.reconciled(ReconcileResult(), result, (), "", "")

    def tell(**states: State) -> None:
        found = {name: reach(state) for name, state in states.items() if state is State.UNREACHABLE}
        events.reached(states, found, result)

    return tell


def test_a_peer_that_is_lost_is_told_with_the_cause_and_how_long_it_lasted(peers: Any, said: Any) -> None:
    said()
    peers(web2=State.UNPROBED, web3=State.OK)
    assert said() == []
    peers(web2=State.UNREACHABLE, web3=State.OK)
    lost, degraded = said()
    assert lost.event == "lost" and lost.what.startswith("web2 unreachable: nothing arrives from it: ")
    assert degraded.what == "degraded: 1 of 2 peers not reachable: web2"
    peers(web2=State.OK, web3=State.OK)
    again, in_sync = said()
    assert again.what == "web2 is reachable again" and again.took is not None and again.took > 1e9
    assert in_sync.event == "in-sync"


def test_a_peer_that_leaves_the_mesh_is_not_reachable_again(peers: Any, said: Any) -> None:
    peers(web2=State.UNREACHABLE, web3=State.OK)
    said()
    peers(web3=State.OK)
    assert [entry.event for entry in said()] == ["in-sync"]


def test_many_peers_that_are_lost_at_once_are_one_line(peers: Any, said: Any) -> None:
    every = [f"web{n}" for n in range(2, 40)]
    peers(**dict.fromkeys(every, State.UNREACHABLE))
    lost = said(Event.LOST)
    assert len(lost) == 1 and lost[0].what.startswith("38 peers are not reachable (web10, web11, ")
    peers(**dict.fromkeys(every, State.OK))
    again = said(Event.REACHABLE)
    assert len(again) == 1 and again[0].what.startswith("38 peers are reachable again (")
