"""`ovsmesh bootstrap --check` and `--wait`: a peer that does not answer is a failure of its own, with its cause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.agent.options import Options
from ovsmesh.cli import bootstrap, check
from ovsmesh.cli.preflight import FAIL, OK, UNKNOWN, WARN, Check
from ovsmesh.dataplane.report import Peer, Report, Self
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.probe import icmp
from ovsmesh.state_dir import StateDir
from tests.support.meshkit import first

MESH = first(3)
GOOD = Peer("web2", State.OK, "192.0.2.12", reach=Reach(State.OK, 0.0, 0.0004))
CUT = Peer("web3", State.UNREACHABLE, "192.0.2.13", missing=("is GRE blocked?",))


def report(*peers: Peer) -> Report:
    return Report(0.0, "", True, Self("web1", agent_running=True), (), peers, (), (), ())


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What is left to do, the reports of the looks one after the other, and which addresses answer a ping."""
    host: dict[str, Any] = {"left": [], "reports": [], "pings": set()}
    monkeypatch.setattr(bootstrap, "_left", lambda options: host["left"])
    monkeypatch.setattr(bootstrap, "_POLL", 0.0)
    monkeypatch.setattr(
        check, "check", lambda options: host["reports"].pop(0) if host["reports"][1:] else host["reports"][0]
    )
    monkeypatch.setattr(icmp, "ping", lambda all_: {a: 0.3 if a in host["pings"] else None for a in map(str, all_)})
    yield host


def wait(found: dict[str, Any], *reports: Report, seconds: float = 30.0) -> tuple[list[str], int]:
    found["reports"] = list(reports)
    return bootstrap.await_converged(Options(), seconds)


def test_all_peers_answer(found: dict[str, Any]) -> None:
    assert wait(found, report(GOOD)) == (["web1: converged, 1 peer", "  web2 192.0.2.12: answers in 0.4 ms"], 0)


def test_the_only_node_of_a_mesh_waits_for_nobody(found: dict[str, Any]) -> None:
    assert wait(found, report()) == (["web1: converged, 0 peers"], 0)


def test_peers_that_start_at_the_same_time_are_waited_for(found: dict[str, Any]) -> None:
    assert wait(found, report(GOOD, CUT), report(GOOD, CUT), report(GOOD, GOOD))[1] == 0


def test_a_peer_that_does_not_answer_is_named_with_its_cause(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "_PEERS", 0.0)
    lines, code = wait(found, report(GOOD, CUT))
    assert code == 2 and lines[2:] == ["  web3 192.0.2.13: unreachable: is GRE blocked?"]


def test_the_first_host_is_told_that_it_may_be_the_first(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "_PEERS", 0.0)
    lines, code = wait(found, report(CUT))
    assert code == 2 and "no peer answers. If this is the first host of the mesh" in lines[-1]


def test_what_is_left_to_do_is_another_failure(found: dict[str, Any]) -> None:
    found["left"] = ["+ port gre-web2"]
    assert wait(found, report(GOOD), seconds=0.0) == (["not converged after 0 s:", "  + port gre-web2"], 1)


# --check


def peers_line(tmp_path: Path, mesh: Any = MESH) -> Check:
    return bootstrap._peers(Options(state_dir=str(tmp_path)), mesh, mesh.nodes[0])


@pytest.mark.parametrize(
    ("answering", "state", "words"),
    [
        ({"192.0.2.12", "192.0.2.13"}, OK, "2 of 2 hosts answer"),
        ({"192.0.2.12"}, WARN, "1 of 2 hosts do not answer a ping to their tunnel address: web3 192.0.2.13"),
        (set(), FAIL, "If this is the first host"),
    ],
)
def test_before_an_agent_runs_the_hosts_are_pinged(
    found: dict[str, Any], tmp_path: Path, answering: set[str], state: str, words: str
) -> None:
    found["pings"] = {str(node.address) for node in MESH.nodes[1:] if str(node.address) in answering}
    line = peers_line(tmp_path)
    assert line.state == state and words in line.text


@pytest.mark.parametrize(
    ("peers", "state", "words"),
    [
        ((GOOD,), OK, "through the tunnel"),
        ((GOOD, CUT), FAIL, "1 of 2 do not answer: web3 (unreachable: is GRE blocked?)"),
    ],
)
def test_with_an_agent_the_tunnels_are_probed(
    found: dict[str, Any], tmp_path: Path, peers: tuple[Peer, ...], state: str, words: str
) -> None:
    found["reports"] = [report(*peers)]
    held = StateDir(tmp_path)
    held.lock()
    try:
        line = peers_line(tmp_path)
    finally:
        held.unlock()
    assert line.state == state and words in line.text


def test_the_only_node_has_no_peers_to_check(found: dict[str, Any], tmp_path: Path) -> None:
    assert peers_line(tmp_path, first(1)).state == OK


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([Check(OK, "kernel", ""), Check(WARN, "mtu", ""), Check(UNKNOWN, "gre", "")], 0),
        ([Check(OK, "kernel", ""), Check(FAIL, "peers", "")], 2),
        ([Check(FAIL, "kernel", ""), Check(FAIL, "peers", "")], 1),
    ],
)
def test_exit_status_tells_the_host_from_its_peers(lines: list[Check], code: int) -> None:
    assert bootstrap.exit_code(lines) == code
