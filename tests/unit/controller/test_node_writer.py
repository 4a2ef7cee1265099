"""Which Nodes' conditions are to be written, as time goes by; writing them is tests/kube's."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ovsmesh.controller.membership import Membership, NodeView, ObjectCondition
from ovsmesh.controller.node_conditions import AgentReport, parse_meshnode
from ovsmesh.controller.node_writer import LOST, NodeWriter
from ovsmesh.text import timestamp
from tests.support.meshkit import node as member
from tests.unit.controller.test_node_conditions import GOOD, MEMBERSHIP, NODE, NOW

READY = NODE._replace(
    network=ObjectCondition("False", "MeshConverged", ""),
    ready=ObjectCondition("True", "MeshConverged", "its part of the mesh"),
)


def test_a_meshnode_deleted_by_hand_takes_no_node_out_until_its_agent_had_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr("ovsmesh.controller.node_writer.time.monotonic", lambda: now[0])
    writer = NodeWriter(cast(Any, None), cast(Any, None))

    def due(node: Any = READY, **reports: Any) -> list[str]:
        writer.compare({"web1": node}, MEMBERSHIP, reports)
        found = sorted(writer._wanted)
        if node is not READY:
            writer.forget()
        return found

    assert due() == []
    now[0] += LOST - 1
    assert due() == []
    now[0] += 2
    assert due() == ["web1"]
    # it came back, and is deleted again: the time starts again
    writer.compare({"web1": READY}, MEMBERSHIP, {"web1": GOOD})
    assert due() == []
    # a Node that was never ready waits for its agent's own word
    assert due(NODE) == ["web1"]


# Who is cut off, and the Events about bad pairs

NAMES = [f"web{n}" for n in range(10)]
OK, BAD = ObjectCondition("False", "MeshConverged", ""), ObjectCondition("True", "MeshConverged", "")


class Recorded:
    """Takes Events as the recorder does."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, str]] = []

    def record(self, about: Any, reason: str, message: str, warning: bool = True) -> None:
        self.found.append((about.name, str(reason), message))

    def reasons(self) -> list[tuple[str, str]]:
        found = [(name, reason) for name, reason, _ in self.found]
        self.found.clear()
        return found


class Ten:
    """A controller's view of ten good Nodes. Time passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("ovsmesh.controller.node_writer.time.monotonic", lambda: self.now)
        monkeypatch.setattr("ovsmesh.controller.node_writer.time.time", lambda: NOW + self.now)
        self.events = Recorded()
        self.writer = NodeWriter(cast(Any, None), cast(Any, self.events))
        self.nodes = {
            name: NodeView(name, f"u{name}", "", ("192.0.2.1",), "", False, ("10.97.1.0/24",), network=OK, ready=BAD)
            for name in NAMES
        }
        self.membership = Membership(tuple(member(name, "192.0.2.1", uid=f"u{name}") for name in NAMES), {})
        self.reports: dict[str, AgentReport] = {}
        self.report()

    def report(self, *pairs: tuple[str, str], state: str = "unreachable", silent: str = "") -> None:
        """Everybody reports what packets are lost between."""
        made = dict(self.reports)
        for name in set(NAMES) - {silent}:
            lost = sorted({a if b == name else b for a, b in pairs if name in (a, b)})
            status = {
                "observedAt": timestamp(NOW + self.now),
                "peers": {"wanted": 9},
                "reachability": {
                    "unreachable": len(lost) * (state == "unreachable"),
                    "worstPeers": [{"name": peer, "state": state, "cause": "GRE?"} for peer in lost],
                },
                "conditions": [{"type": "Converged", "status": "True", "reason": "AsWanted", "message": ""}],
            }
            made[name] = parse_meshnode(
                {"metadata": {"name": name, "ownerReferences": [{"kind": "Node", "uid": f"u{name}"}]}, "status": status}
            )
        self.reports = made

    def pass_time(self, seconds: float) -> list[str]:
        """Compare as the loop does, when it is due. The Nodes whose conditions would then be written."""
        end = self.now + seconds
        while True:
            pause = self.writer.compare(self.nodes, self.membership, self.reports)
            for name, (node, wanted) in self.writer._wanted.items():
                self.writer._record(node, wanted)
                self.nodes = self.nodes | {name: node._replace(network=wanted.network, ready=wanted.ready)}
            if self.now + pause > end:
                break
            self.now += pause
        self.now = end
        return [name for name, node in self.nodes.items() if node.ready and node.ready.status == "False"]


@pytest.fixture
def ten(monkeypatch: pytest.MonkeyPatch) -> Ten:
    return Ten(monkeypatch)


def around(name: str) -> list[tuple[str, str]]:
    return [(name, peer) for peer in NAMES if peer != name]


@pytest.mark.parametrize("silent", ["", "web3"], ids=["its agent says so too", "its agent is dead"])
def test_an_isolated_node_is_marked_and_cleared_and_one_event_says_so(ten: Ten, silent: str) -> None:
    assert ten.pass_time(20) == []
    ten.report(*around("web3"), silent=silent)
    assert ten.pass_time(20) == ["web3"]
    node = ten.nodes["web3"]
    assert node.ready and node.network and (node.ready.reason, node.network.status) == ("Isolated", "True")
    assert "GRE?" in node.ready.message
    assert ten.events.reasons() == [("web3", "Isolated")]
    found = ten.writer.reachability
    assert [p.reason for p in found.problems] == ["Isolated"]
    assert (found.isolated, found.bad_pairs, found.split) == (1, 0, False)
    before = node.ready
    ten.report(*around("web3")[1:], silent=silent)
    ten.pass_time(20)
    assert ten.nodes["web3"].ready == before
    ten.report(silent=silent)
    assert ten.pass_time(20) == []
    assert ten.events.reasons() == [("web3", "PeersReachable")]
    assert ten.writer.reachability.problems == ()


@pytest.mark.parametrize("state", ["unreachable", "small packets only", "lossy"])
def test_one_bad_pair_marks_nobody_and_both_ends_say_so_once(ten: Ten, state: str) -> None:
    ten.report(("web1", "web2"), state=state)
    assert ten.pass_time(300) == []
    assert [event for event in ten.events.found if "GRE?" in event[2]] == ten.events.found
    assert ten.events.reasons() == [("web1", "PeersUnreachable"), ("web2", "PeersUnreachable")]
    (problem,) = ten.writer.reachability.problems
    assert not problem.fatal and "web1 and web2" in problem.message
    assert (ten.writer.reachability.isolated, ten.writer.reachability.bad_pairs) == (0, 1)
    ten.report()
    ten.pass_time(10)
    assert ten.events.reasons() == [("web1", "PeersReachable"), ("web2", "PeersReachable")]


def test_the_other_end_of_a_bad_pair_gets_its_event_where_its_agent_is_dead(ten: Ten) -> None:
    ten.report(("web1", "web2"), silent="web2")
    ten.pass_time(20)
    assert sorted(ten.events.reasons()) == [("web1", "PeersUnreachable"), ("web2", "PeersUnreachable")]


def test_pairs_that_come_and_go_give_few_events(ten: Ten) -> None:
    for turn in range(100):
        ten.report(*[("web1", f"web{n}") for n in (2, 3)][: turn % 3])
        ten.pass_time(6)
    told = ten.events.reasons()
    assert 1 <= told.count(("web1", "PeersUnreachable")) <= 20


def test_several_lost_peers_are_gathered(ten: Ten) -> None:
    for count in (1, 2, 3, 4):
        ten.report(*around("web0")[:count])
        ten.pass_time(2)
    ten.pass_time(60)
    mine = [message for name, _, message in ten.events.found if name == "web0"]
    assert len(mine) <= 2 and all(f"web{n}" in "".join(mine) for n in (1, 2, 3)) and "GRE?" in mine[0]


def test_a_mesh_without_a_majority_marks_nobody_and_tells_of_no_pair(ten: Ten) -> None:
    ten.report(*[(a, b) for a in NAMES[:5] for b in NAMES[5:]])
    assert ten.pass_time(100) == []
    assert ten.events.reasons() == []
    assert [p.reason for p in ten.writer.reachability.problems] == ["MeshSplit"]
    assert ten.writer.reachability.split


def test_a_new_leader_goes_on_from_the_marks_that_are_there(ten: Ten) -> None:
    ten.report(*around("web3"))
    ten.pass_time(20)
    ten.events.reasons()
    ten.writer.forget()
    assert ten.pass_time(60) == ["web3"] and ten.events.reasons() == []
    ten.report()
    ten.writer.forget()
    assert ten.pass_time(20) == []


def test_an_isolated_node_without_its_meshnode_is_marked_too(ten: Ten) -> None:
    del ten.reports["web3"]
    ten.report(*around("web3"), silent="web3")
    assert ten.pass_time(20) == ["web3"]
    assert ten.nodes["web3"].ready and ten.nodes["web3"].ready.reason == "Isolated"


def test_what_a_nodes_own_agent_finds_wrong_is_its_reason(ten: Ten) -> None:
    ten.report(*around("web3"))
    failed = ObjectCondition("False", "SwitchDown", "ovs-vswitchd does not answer")
    ten.reports = ten.reports | {"web3": ten.reports["web3"]._replace(converged=failed)}
    assert ten.pass_time(20) == ["web3"]
    assert ten.nodes["web3"].ready and ten.nodes["web3"].ready.reason == "SwitchDown"
