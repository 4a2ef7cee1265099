"""How `status` finds this host's agent: alive, dead, hung, stuck, outdated, or listening nowhere."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ovsmesh import __version__
from ovsmesh.agent.options import Options
from ovsmesh.cli import inspect
from ovsmesh.dataplane.report import ReconcileResult
from ovsmesh.dataplane.types import State
from ovsmesh.http_server import Answer, HttpServer
from ovsmesh.ovs.figures import SwitchFigures
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import timestamp
from tests.support.meshkit import first

REACH = {"state": "ok", "since": "2026-11-29T01:00:00Z", "roundTrip": 0.0004, "loss": 0.01, "pathMtu": 1462, "sent": 7}


def told(**changes: Any) -> dict[str, Any]:
    me = {
        "name": "web1",
        "agentSince": "2026-11-29T01:00:00Z",
        "agentVersion": __version__,
        "meshDigest": "0123456789ab",
        "meshSince": "2026-11-29T01:00:00Z",
        "meshFrom": "/m.yaml",
    }
    changes["self"] = me | changes.get("self", {})
    peers = [{"name": "web2", "state": "ok", "reach": REACH, "lastChange": "2026-11-29T01:00:01Z"}]
    return {"headline": "web1: all 1 peer ok", "loopRan": timestamp(time.time()), "peers": peers, **changes}


class Fixed(HttpServer):
    """Answers /status.json with one text."""

    def __init__(self, code: int, text: str) -> None:
        self._said: Any = (code, "application/json", text)
        super().__init__("127.0.0.1:0")

    def answer(self, path: str) -> Answer | None:
        return self._said if path == "/status.json" else None


class Place:
    """A state directory, the agent that holds it, and what answers at its address."""

    def __init__(self, path: Path) -> None:
        self.state = StateDir(path)
        self.state.ensure()
        self.options = Options("/m.yaml", "web1", state_dir=str(path), listen="127.0.0.1:1")
        self._open: list[Any] = []

    def runs(self) -> None:
        self.state.lock()
        self.state.write_agent({"pid": os.getpid()})
        os.utime(self.state.path / "agent.json", (time.time() - 3600,) * 2)

    def reported(self, ago: float = 0.0, **changes: Any) -> None:
        self.state.write_status({"listen": "127.0.0.1:1", **told(**changes)})
        os.utime(self.state.path / "status.json", (time.time() - ago,) * 2)

    def answers(self, tree: Any, code: int = 200) -> None:
        served = Fixed(code, json.dumps(tree))
        self._open.append(served)
        self.options = Options("/m.yaml", "web1", state_dir=str(self.state.path), listen=f"127.0.0.1:{served.port}")

    def silent(self) -> None:
        held = socket.create_server(("127.0.0.1", 0))
        self._open.append(held)
        port = held.getsockname()[1]
        self.options = Options("/m.yaml", "web1", state_dir=str(self.state.path), listen=f"127.0.0.1:{port}")

    def close(self) -> None:
        for each in self._open:
            each.close()
        self.state.unlock()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with closing(Place(tmp_path)) as made:
        yield made


def problem(found: inspect.Told) -> tuple[Any, str]:
    assert found.agent.problem is not None
    return found.agent.problem.reason, found.agent.problem.message


def test_an_agent_that_runs_as_it_should(place: Place) -> None:
    place.runs()
    place.answers(told())
    found = inspect.ask(place.options)
    assert found.agent.alive and found.agent.problem is None and found.agent.version == __version__
    context = inspect.context(place.options, found, SwitchFigures("3.1.0"))
    assert context.reach["web2"].state is State.OK and context.reach["web2"].path_mtu == 1462
    assert context.mesh_in_force is not None and context.mesh_in_force[0] == "0123456789ab"
    assert context.last_change["web2"][0] == context.mesh_in_force[1] + 1  # type: ignore[operator]


def test_a_dead_agents_last_report_has_its_age(place: Place) -> None:
    place.reported(ago=185)
    found = inspect.ask(place.options)
    assert problem(found)[0] is Reason.AgentDown and not found.agent.alive and found.agent.since is None
    assert found.agent.heard == pytest.approx(time.time() - 185, abs=30) and found.agent.said == "all 1 peer ok"
    assert inspect.context(place.options, found, SwitchFigures()).mesh_in_force is None


def test_no_agent_has_ever_run(place: Place) -> None:
    found = inspect.ask(place.options)
    assert problem(found)[0] is Reason.AgentDown and found.agent.heard is None and found.report == {}


def test_a_hung_agent_is_told_in_seconds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_AGENT_TIMEOUT", 0.3)
    place.runs()
    place.silent()
    place.reported(ago=5)
    place.state.write_status(told())
    found = inspect.ask(place.options)
    assert problem(found)[0] is Reason.AgentHung and f"(pid {os.getpid()})" in problem(found)[1]
    assert not found.agent.alive and found.agent.since is not None and found.agent.heard is not None


def test_a_loop_that_stands_still_is_told_though_http_answers(place: Place) -> None:
    place.runs()
    place.answers(told(loopRan=timestamp(time.time() - 75)))
    found = inspect.ask(place.options)
    assert problem(found)[0] is Reason.AgentHung and "has not run for 1m1" in problem(found)[1]


def test_an_agent_of_another_version_is_outdated_and_its_probes_count(place: Place) -> None:
    place.runs()
    place.answers(told(self={"agentVersion": "0.0.1"}))
    found = inspect.ask(place.options)
    assert problem(found) == (
        Reason.AgentOutdated,
        f"the agent runs version 0.0.1, and {__version__} is installed",
    )
    assert found.agent.alive


def test_the_agent_of_another_node_is_not_this_ones(place: Place) -> None:
    place.runs()
    place.state.write_agent({"pid": os.getpid(), "node": "web7"})
    place.answers(told(self={"name": "web7"}))
    found = inspect.ask(place.options)
    assert problem(found) == (Reason.AgentDown, "no agent runs for this node; the one here is of node web7")
    assert found.report == {} and found.agent.heard is None


def test_an_agent_that_has_just_started(place: Place) -> None:
    place.runs()
    place.answers({}, 503)
    found = inspect.ask(place.options)
    assert problem(found)[0] is Reason.AgentNotReported and not found.agent.alive


@pytest.mark.parametrize("listens", [True, False])
def test_the_report_of_an_agent_before_it_says_nothing_of_one_that_has_just_started(
    place: Place, listens: bool
) -> None:
    place.reported(ago=4000, listen="127.0.0.1:1")
    place.runs()
    if listens:
        place.answers({}, 503)
    found = inspect.ask(place.options)
    assert problem(found)[0] is Reason.AgentNotReported and found.report == {} and found.agent.heard is None
    place.answers(told(self={"agentSince": "2026-11-29T09:00:00Z"}, headline="web1: 1 peer not probed yet"))
    found = inspect.ask(place.options)
    assert found.report["headline"] == "web1: 1 peer not probed yet" and found.note is None
    assert inspect.listening(place.options) == place.options.listen


@pytest.mark.parametrize("listen", ["127.0.0.1:1", ""])
def test_an_agent_that_listens_nowhere_is_known_by_its_file(place: Place, listen: str) -> None:
    place.runs()
    place.reported(listen=listen)
    found = inspect.ask(place.options)
    assert found.agent.alive and found.agent.problem is None
    assert found.note is not None and found.note.reason is Reason.AgentNotListening and not found.note.fatal
    place.reported(ago=75, listen=listen)
    assert problem(inspect.ask(place.options))[0] is Reason.AgentHung


def test_where_the_agent_really_listens_is_in_its_file(place: Place) -> None:
    place.runs()
    place.answers(told())
    real = place.options.listen
    place.reported(ago=999, listen=real)
    place.options = Options("/m.yaml", "web1", state_dir=str(place.state.path), listen="127.0.0.1:1")
    assert inspect.listening(place.options) == real and inspect.ask(place.options).agent.problem is None


@pytest.mark.parametrize("other", [{"name": "web7"}, {"agentSince": "2026-11-29T00:00:00Z"}])
def test_another_agent_at_the_address_is_not_believed(place: Place, other: Any) -> None:
    place.runs()
    place.answers(told(self=other, headline="web1: a stranger"))
    place.reported(listen=place.options.listen)
    found = inspect.ask(place.options)
    assert found.report["headline"] == "web1: all 1 peer ok" and found.note is not None


@pytest.mark.parametrize(
    "answer", [[], {"self": 1, "peers": 7}, {"peers": [1, {}, {"name": "web2", "reach": {"state": 1}}]}]
)
def test_garbage_is_no_answer_and_no_traceback(place: Place, answer: Any) -> None:
    place.runs()
    place.answers(answer)
    found = inspect.ask(place.options)
    assert found.agent.problem is not None
    inspect.context(place.options, found._replace(report=answer if isinstance(answer, dict) else {}), SwitchFigures())


def test_a_mesh_that_the_agent_has_not_taken_is_named(place: Place) -> None:
    place.runs()
    place.answers(told())
    found = inspect.ask(place.options)
    context = inspect.context(place.options, found, SwitchFigures())
    result = ReconcileResult(first(2), mesh_current=True)
    report = inspect.node_report(place.options, result, found, context)
    (line,) = [str(p) for p in report.problems if p.reason is Reason.MeshNotTaken]
    assert "/m.yaml has mesh" in line and "works with mesh 0123456789ab" in line and not report.well
    assert report.self.mesh_digest == "0123456789ab"


def node(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "agent": "ok",
        "headline": f"{name}: all 2 peers ok",
        "version": "0.1.0",
        "meshDigest": "aaaaaaaaaaaa",
        "well": True,
        "time": timestamp(1_800_000_000),
        **changes,
    }


def matrix(*nodes: dict[str, Any], **counts: int) -> dict[str, Any]:
    counts = counts or {"ok": 2}
    rows = [{"node": one["name"], "counts": counts} for one in nodes]
    return {"time": timestamp(1_800_000_007), "nodes": list(nodes), "rows": rows}


def test_all_nodes_are_well() -> None:
    found = inspect.nodes_view(matrix(node("h1"), node("h2")))
    assert found.code == 0 and found.text.splitlines() == [
        "2 of 2 nodes well",
        "",
        "NODE  REACHABLE  VERSION  MESH          AGE  VERDICT",
        "h1    2/2        0.1.0    aaaaaaaaaaaa  7s   all 2 peers ok",
        "h2    2/2        0.1.0    aaaaaaaaaaaa  7s   all 2 peers ok",
    ]
    assert found.tree["nodes"][0]["peers"] == {"reachable": 2, "all": 2}


def test_a_silent_node_and_another_mesh_are_named_first() -> None:
    silent = node("h3", agent="no answer", time=timestamp(1_799_999_822))
    found = inspect.nodes_view(matrix(node("h1"), node("h2", meshDigest="bbbbbbbbbbbb"), silent))
    lines = found.text.splitlines()
    assert found.code == 2 and lines[:3] == [
        "2 of 3 nodes well; not: h3",
        "! no answer from the agent of h3",
        "! h2: another mesh (bbbbbbbbbbbb) than most nodes",
    ]
    assert lines[5].split()[:5] == ["h3", "2/2", "0.1.0", "aaaaaaaaaaaa", "3m5s"]
    assert lines[5].endswith("no answer; it said: all 2 peers ok")


@pytest.mark.parametrize("changes", [{"well": False}, {"agent": "outdated"}, {"agent": "no answer"}, {"well": None}])
def test_one_node_that_is_not_well_is_exit_status_2(changes: Any) -> None:
    assert inspect.nodes_view(matrix(node("h1"), node("h2", **changes))).code == 2


@pytest.mark.parametrize("garbage", [{}, {"nodes": 1, "rows": [1]}, {"nodes": [{}], "rows": [{"counts": {"ok": "x"}}]}])
def test_garbage_is_not_well_and_no_traceback(garbage: Any) -> None:
    assert inspect.nodes_view(garbage).code == 2
