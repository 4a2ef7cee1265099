"""The command line: options, environment, exit codes, and errors as one line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ovsmesh import __version__
from ovsmesh.agent import cleanup
from ovsmesh.agent import main as agent_main
from ovsmesh.agent.options import Options
from ovsmesh.agent.result import ReconcileResult
from ovsmesh.cli import inspect
from ovsmesh.cli import main as cli
from ovsmesh.dataplane.plan import Plan, plan
from ovsmesh.dataplane.report import Agent, Peer, Report, Self
from ovsmesh.dataplane.types import Dataplane, State, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.names import DEFAULT_OVSDB
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from tests.support.meshkit import FACTS, first, seen, want
from tests.support.meshtext import A, B, text_of

COMMANDS = ["agent", "plan", "status", "cleanup", "confirm", "lab"]


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.cli.main.os.geteuid", lambda: 0)
    for name in [name for name in os.environ if name.startswith("OVSMESH_")]:
        monkeypatch.delenv(name)


def invoke(*argv: Any, **env: Any) -> Any:
    return CliRunner().invoke(cli.cli, argv, env=env)


def result(have: Any, mesh: Any = None, problems: Any = (), mesh_current: Any = True) -> Any:
    mesh = mesh or first(3)
    wanted = want(mesh)
    todo = plan(wanted, have)
    return ReconcileResult(mesh, FACTS, wanted, have, todo, problems, not todo.steps and not todo.blocked, mesh_current)


@pytest.fixture
def look_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what inspect.look finds ("finds"), and the options it was given."""
    asked = {}

    def look(options: Any) -> Any:
        asked.update(dataclasses.asdict(options))
        if isinstance(asked.get("finds"), Exception):
            raise asked["finds"]
        return asked["finds"]

    monkeypatch.setattr(inspect, "look", look)
    return asked


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the options with which agents are started."""
    started = []
    monkeypatch.setattr(agent_main, "serve", lambda options, fd: started.append(options))
    monkeypatch.setattr(cli, "_stop_fd", lambda: -1)
    return started


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: Any) -> None:
    found = invoke(command, "--help")
    assert found.exit_code == 0 and "Usage:" in found.output and "--help" in found.output
    listed = invoke("--help").output
    assert command in listed


def test_version() -> None:
    assert invoke("--version").output == f"ovsmesh, version {__version__}\n"


@pytest.mark.parametrize(
    "argv", [["plan", "--nonsense"], ["nonsense"], ["status", "-o", "xml"], ["agent", "--log-level", "loud"]]
)
def test_wrong_usage_is_exit_2_and_says_where_help_is(argv: Any) -> None:
    found = invoke(*argv)
    assert found.exit_code == 2 and "--help" in found.output and "Traceback" not in found.output


# options


def test_each_option_of_agent_by_environment(agents: Any, tmp_path: Path) -> None:
    found = invoke(
        "agent",
        OVSMESH_AGENT_MESH="/m.yaml",
        OVSMESH_AGENT_NODE="web1",
        OVSMESH_AGENT_OVSDB="unix:/x.sock",
        OVSMESH_AGENT_STATE_DIR=str(tmp_path),
        OVSMESH_AGENT_LISTEN="127.0.0.1:0",
        OVSMESH_AGENT_LOG_LEVEL="error",
    )
    assert found.exit_code == 0, found.output
    assert agents == [Options("/m.yaml", "web1", "unix:/x.sock", str(tmp_path), "127.0.0.1:0")]


def test_the_command_line_wins_over_the_environment(agents: Any) -> None:
    invoke("agent", "--node", "web2", "--mesh", "/m.yaml", OVSMESH_AGENT_NODE="web1")
    assert agents[0].node == "web2"


def test_another_commands_environment_is_not_taken(agents: Any) -> None:
    found = invoke("agent", OVSMESH_PLAN_MESH="/m.yaml")
    assert found.exit_code == 2 and "no mesh" in found.stderr and agents == []


def test_defaults_of_agent(agents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "web7")
    invoke("agent", "--mesh", "/m.yaml")
    assert agents == [
        Options("/m.yaml", "web7", "unix:/var/run/openvswitch/db.sock", "/var/lib/ovsmesh", "127.0.0.1:9474")
    ]


def test_once_listens_nowhere_and_prints_how_it_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def once(options: Options) -> Any:
        asked.append(options)
        return result(seen(want(first(3))))

    monkeypatch.setattr(agent_main, "once", once)
    found = invoke("agent", "--once", "--mesh", "/m.yaml", "--node", "web1", "--listen", "127.0.0.1:9")
    assert (found.exit_code, found.stderr) == (0, "converged\n")
    assert asked[0].listen == ""


def test_once_by_environment(monkeypatch: pytest.MonkeyPatch, agents: Any) -> None:
    monkeypatch.setattr(agent_main, "once", lambda options: result(seen(want(first(3)))))
    assert invoke("agent", OVSMESH_AGENT_MESH="/m.yaml", OVSMESH_AGENT_ONCE="1").exit_code == 0
    assert agents == []


@pytest.mark.parametrize(
    ("ended", "last"),
    [
        (result(seen(Dataplane())), "not converged"),
        (dataclasses.replace(result(seen(want(first(3)))), mesh_current=False), "not converged"),
        (result(seen(Dataplane(), Unmanaged("links", "kbr0", "bridge kbr0 is unmanaged"))), "not converged"),
    ],
)
def test_once_that_is_not_converged_is_exit_1_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch, ended: Any, last: Any
) -> None:
    monkeypatch.setattr(
        agent_main,
        "once",
        lambda options: dataclasses.replace(ended, problems=(Problem(Reason.NodeInvalid, "the problem"),)),
    )
    found = invoke("agent", "--once", "--mesh", "/m.yaml")
    assert found.exit_code == 1
    lines = found.stderr.splitlines()
    assert lines == [*ended.plan.lines(), "the problem", last]


def test_options_default_to_those_of_the_last_agent(look_of: Any, tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    known = {"mesh": "/m.yaml", "node": "web1", "ovsdb": "unix:/x.sock", "listen": "127.0.0.1:1", "pid": 1}
    state.write_agent(known | {"cni_dir": "/etc/cni/net.d", "docker": "replace", "docker_timeout": "soon"})
    look_of["finds"] = result(seen(want(first(3)))), False
    assert invoke("plan", "--state-dir", str(tmp_path), "--node", "web2").exit_code == 0
    del look_of["finds"]
    expected = Options(
        "/m.yaml", "web2", "unix:/x.sock", str(tmp_path), "127.0.0.1:1", cni_dir="/etc/cni/net.d", docker="replace"
    )
    assert look_of == dataclasses.asdict(expected)


def test_garbage_in_the_state_directory_is_ignored(look_of: Any, tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text('{"node": ')
    look_of["finds"] = result(seen(want(first(3)))), False
    assert invoke("plan", "--state-dir", str(tmp_path), "--mesh", "/m.yaml").exit_code == 0
    assert look_of["ovsdb"] == DEFAULT_OVSDB


# plan


@pytest.mark.parametrize(
    ("found", "in_the_way", "code"),
    [
        (result(seen(want(first(3)))), False, 0),
        (result(seen(Dataplane())), False, 2),
        (result(seen(want(first(12)))), False, 2),
        (result(seen(want(first(3))), problems=(Problem(Reason.DatabaseDown, "does not answer"),)), True, 1),
        (result(seen(Dataplane(), Unmanaged("links", "kbr0", "bridge kbr0 is unmanaged"))), True, 1),
    ],
)
def test_exit_codes_of_plan(look_of: Any, found: Any, in_the_way: Any, code: Any) -> None:
    look_of["finds"] = found, in_the_way
    result = invoke("plan", "--mesh", "/m.yaml", "--node", "web1")
    assert result.exit_code == code
    expected = "nothing to change\n" if code == 0 else f"{found.plan}\n" if str(found.plan) else ""
    assert result.stdout == expected
    assert result.stderr == "".join(f"! {p}\n" for p in found.problems)


def test_exit_code_of_cleanup(monkeypatch: pytest.MonkeyPatch) -> None:
    for clean, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(cleanup, "cleanup", lambda *_, clean=clean: (["- port gre-web2", "proof"], clean))
        found = invoke("cleanup", "--dry-run")
        assert (found.exit_code, found.stdout) == (code, "- port gre-web2\nproof\n")


STATUS = Report(0.0, "all is well", True, Self("web1", agent_running=True), (), (), (), (), ())


@pytest.mark.parametrize(
    ("argv", "read"), [([], str.splitlines), (["-o", "json"], json.loads), (["--output", "yaml"], yaml.safe_load)]
)
def test_status_is_printed_as_asked(monkeypatch: pytest.MonkeyPatch, argv: Any, read: Any) -> None:
    monkeypatch.setattr(inspect, "status", lambda _: STATUS)
    found = read(invoke("status", *argv).stdout)
    assert found[0] == "all is well" if isinstance(found, list) else found["headline"] == "all is well"


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (STATUS, 0),
        (replace(STATUS, converged=False), 2),
        (replace(STATUS, self=Self("web1")), 2),
        (replace(STATUS, peers=(Peer("web2", "ok"), Peer("web3", "ok"))), 0),
        *((replace(STATUS, peers=(Peer("web2", "ok"), Peer("web3", str(bad)))), 2) for bad in set(State) - {State.OK}),
        (replace(STATUS, peers=(Peer("web3", "missing"),)), 2),
    ],
)
def test_exit_status_of_status_is_0_only_when_an_agent_runs_and_packets_arrive(
    monkeypatch: pytest.MonkeyPatch, report: Report, code: int
) -> None:
    monkeypatch.setattr(inspect, "status", lambda _: report)
    assert invoke("status").exit_code == code


HELD = {"peers": ["web2", "web3", "web4"], "digest": "0123456789ab", "until": "2999-01-01T00:00:00Z"}


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Return what an agent that runs with the state directory reports; a confirmation of its digest empties it."""
    state, tree = StateDir(tmp_path), {"held": HELD}
    state.lock()

    def ask(_: Options) -> Any:
        if tree.get("held") == HELD and state.confirmation() == HELD["digest"]:
            state.clear_confirmation()
            tree.clear()
        return inspect.Told(Agent(since=1.0), dict(tree))

    monkeypatch.setattr(inspect, "ask", ask)
    yield tree
    state.unlock()


def test_confirm_says_what_the_agent_does(holding: Any, tmp_path: Path) -> None:
    found = invoke("confirm", HELD["digest"], "--state-dir", str(tmp_path))
    assert (found.exit_code, found.stdout) == (0, "confirmed: the agent removes 3 peers now: web2, web3, web4\n")
    assert invoke("confirm").exit_code == 2


@pytest.mark.parametrize(
    ("tree", "digest", "words"),
    [
        ({"held": HELD}, "ba9876543210", "digest 0123456789ab"),
        ({"held": HELD}, "../x", "digest 0123456789ab"),
        ({}, "0123456789ab", "nothing to confirm"),
        ({"held": "garbage"}, "0123456789ab", "nothing to confirm"),
    ],
)
def test_confirm_that_does_nothing_says_why(holding: Any, tmp_path: Path, tree: Any, digest: str, words: str) -> None:
    holding.clear()
    holding.update(tree)
    found = invoke("confirm", digest, "--state-dir", str(tmp_path))
    assert found.exit_code == 1 and words in str(found.exception) and isinstance(found.exception, OvsmeshError)
    assert StateDir(tmp_path).confirmation() is None


def test_confirm_without_an_agent_says_so(tmp_path: Path) -> None:
    found = invoke("confirm", "0123456789ab", "--state-dir", str(tmp_path))
    assert isinstance(found.exception, OvsmeshError) and "no agent runs" in str(found.exception)


def test_an_agent_that_does_not_take_it_is_named(holding: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inspect, "ask", lambda _: inspect.Told(Agent(since=1.0), {"held": HELD}))
    monkeypatch.setattr(inspect, "_CONFIRMING", 0.3)
    found = invoke("confirm", HELD["digest"], "--state-dir", str(tmp_path))
    assert isinstance(found.exception, OvsmeshError) and "has not taken" in str(found.exception)


# errors


def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: Any) -> Any:
    """Run the console script; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["ovsmesh", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return ended.value.code, printed.out, printed.err


def good(tmp_path: Path) -> Any:
    path = tmp_path / "mesh.yaml"
    path.write_text(text_of(A, B))
    return str(path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "mesh.yaml"),
        ("", "mesh.yaml"),
        ("a: [\n", "mesh.yaml"),
        ("a: 1\nb: 2\n", "mesh.yaml"),
        (text_of(B), "web9"),
        ("\x00\n\n", "mesh.yaml"),
    ],
)
def test_a_bad_mesh_file_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Any, word: Any
) -> None:
    path = tmp_path / "mesh.yaml"
    if text is not None:
        path.write_text(text)
    options = ["--mesh", str(path), "--node", "web9", "--state-dir", str(tmp_path / "state")]
    code, out, err = main(capsys, monkeypatch, "plan", *options)
    assert code == 1 and out == ""
    assert err.startswith("ovsmesh: ") and err.count("\n") == 1 and word in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "--state-dir", "{tmp}/none"], "no mesh: no agent has left its options in"),
        (["status", "--state-dir", "{tmp}/none"], "no mesh: no agent has left its options in"),
        (["confirm", "0123", "--state-dir", "{tmp}/none"], "no agent runs"),
    ],
)
def test_an_error_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: Any, words: Any
) -> None:
    places = {"tmp": str(tmp_path), "mesh": good(tmp_path)}
    code, out, err = main(capsys, monkeypatch, *(word.format(**places) for word in argv))
    assert (code, out) == (1, "")
    assert err.startswith("ovsmesh: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("agent", "change links, routes, packet filter rules"),
        ("plan", "read the packet filter"),
        ("status", "`ovsmesh status --all`"),
        ("check", "send probes from raw sockets"),
        ("cleanup", "remove links, routes"),
        ("cleanup --dry-run", "even with --dry-run"),
        ("bootstrap --print", "read the packet filter"),
        ("bootstrap --check", "read the packet filter"),
        ("bootstrap --wait 1", "read the packet filter"),
    ],
)
def test_a_user_who_is_not_root_gets_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, words: str
) -> None:
    monkeypatch.setattr("ovsmesh.cli.main.os.geteuid", lambda: 1000)
    code, _, err = main(capsys, monkeypatch, *command.split(), "--mesh", good(tmp_path))
    assert (code, err.count("\n")) == (1, 1)
    assert "run it as root" in err and words in err
    assert "change" not in err or command == "agent"


def test_an_agent_with_the_same_state_directory_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = StateDir(tmp_path / "state")
    state.lock()
    try:
        for command in (["agent", "--once", "--mesh", good(tmp_path)], ["cleanup"]):
            code, _, err = main(capsys, monkeypatch, *command, "--state-dir", str(tmp_path / "state"))
            assert code == 1 and f"pid {os.getpid()}" in err
    finally:
        state.unlock()


def test_as_a_module_in_a_process_of_its_own(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "ovsmesh", "confirm", "0123", "--state-dir", str(tmp_path / "none")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("ovsmesh: ")


def test_the_agent_carries_no_table_drawing_and_no_kubernetes() -> None:
    code = "import sys, json; import ovsmesh.cli.main, ovsmesh.agent.main; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"rich", "kubernetes"}


def test_an_empty_plan_has_no_lines() -> None:
    assert list(Plan().lines()) == []
