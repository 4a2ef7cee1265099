"""Options, variables, help and completion: what is wrong is said before anything is done, and names the right thing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ovsmesh import usage
from ovsmesh.agent import main as agent_main
from ovsmesh.cli import formats
from ovsmesh.cli import main as cli
from tests.support.meshtext import A, B, text_of


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    started: list[object] = []
    monkeypatch.setattr(agent_main, "serve", lambda options, fd: started.append(options))
    monkeypatch.setattr(cli, "_stop_fd", lambda: -1)
    monkeypatch.setattr("ovsmesh.cli.main.os.geteuid", lambda: 0)
    for name in [name for name in os.environ if name.startswith("OVSMESH_")]:
        monkeypatch.delenv(name)
    return started


def invoke(*argv: str, **env: str) -> Any:
    return CliRunner().invoke(cli.cli, argv, env=env, terminal_width=80)


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield every command with its path and context; groups too."""
    root = click.Context(cli.cli, info_name="ovsmesh", **cli.cli.context_settings)
    waiting: list[tuple[str, click.Command, click.Context]] = [("", cli.cli, root)]
    while waiting:
        path, command, ctx = waiting.pop()
        yield path, command, ctx
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                below = command.get_command(ctx, name)
                assert below is not None
                waiting.append((f"{path} {name}".strip(), below, click.Context(below, parent=ctx, info_name=name)))


def test_no_summary_of_a_command_is_cut() -> None:
    for path, command, _ in commands():
        if not isinstance(command, click.Group):
            continue
        shown = invoke(*path.split(), "--help").output
        assert "..." not in shown.partition("Commands:")[2] and max(map(len, shown.splitlines())) <= 80
        told = re.sub(r"\s+", " ", shown)
        for name, one in command.commands.items():
            first = (one.help or "").split("\n\n")[0].split(". ")[0].replace("\n", " ").removesuffix(".")
            assert first and first in told, name


def test_each_option_is_set_by_a_variable_named_after_it() -> None:
    seen = 0
    for path, command, ctx in commands():
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in ("help", "version"):
                longest = max((name for name in option.opts if name.startswith("--")), key=len)
                words = f"ovsmesh {path} {longest.removeprefix('--')}"
                assert usage.variables(option, ctx) == [re.sub(r"[ -]+", "_", words).upper()]
                assert isinstance(option, usage.Option), (path, longest)
                seen += 1
    assert seen > 60


WRONG = {
    "--listen": ["9474", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", "300.1.1.1:80", "a b:80", ""],
    "--ovsdb": ["tcp:127.0.0.1:6640", "unix:relative", "/run/db.sock", "unix:/dev", ""],
    "--node": ["", "a b", "-a", "x" * 300],
    "--mesh": ["", "/dev", "/etc/passwd/x", "/" + "x" * 300],
    "--state-dir": ["", "/etc/passwd", "/etc/passwd/x"],
    "--cni-dir": ["/etc/passwd"],
    "--cni-bin-dir": ["/opt:/etc/passwd", ":"],
    "--docker": ["maybe"],
    "--docker-config": ["/etc"],
    "--docker-socket": ["/etc"],
    "--docker-restart": ["", "sh 'a", "  "],
    "--docker-timeout": ["0", "soon", "nan", "inf", "4000"],
    "--log-level": ["loud"],
    "--log-format": ["xml"],
    "--kubeconfig": ["/etc"],
}


def test_a_wrong_value_for_each_option_of_the_agent_is_known() -> None:
    agent = next(command for path, command, _ in commands() if path == "agent")
    every = {max(o.opts, key=len) for o in agent.params if isinstance(o, click.Option) and not o.is_flag}
    assert every == WRONG.keys()


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, many in WRONG.items() for value in many])
def test_a_wrong_value_is_a_usage_error_before_anything_is_done(
    nothing_runs: list[object], option: str, value: str
) -> None:
    found = invoke("agent", *(() if option == "--mesh" else ("--mesh", "/m.yaml")), option, value)
    assert (found.exit_code, nothing_runs) == (2, []), found.output
    assert option in found.stderr
    if value:
        name = "OVSMESH_AGENT_" + option.removeprefix("--").upper().replace("-", "_")
        found = (
            invoke("agent", "--mesh", "/m.yaml", **{name: value})
            if option != "--mesh"
            else invoke("agent", **{name: value})
        )
        assert (found.exit_code, nothing_runs) == (2, []), found.output
        assert f"environment variable {name}" in found.stderr


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "[::1]:9474", ":9474", "0.0.0.0:80", "localhost:9474", "host-1.lan:1"]
)
def test_what_can_be_tried_is_taken(nothing_runs: list[Any], listen: str) -> None:
    assert invoke("agent", "--mesh", "/m.yaml", "--listen", listen).exit_code == 0
    assert nothing_runs[0].listen == listen


@pytest.mark.parametrize(
    "argv",
    [
        ["agent", "--mesh", "/m", "--kubeconfig", "/k"],
        ["agent"],
        ["controller", "--listen", "9475"],
        ["bootstrap"],
        ["bootstrap", "--check", "--print"],
        ["bootstrap", "--wait", "-1"],
        ["bootstrap", "--wait", "nan"],
        ["check", "--peer", ""],
        ["matrix", "--worst", "0"],
        ["history", "--since", "yesterday"],
        ["status", "--kubeconfig", "/k"],
        ["status", "--all", "--cluster"],
        ["confirm"],
        ["lab", "up", "--hosts", "1"],
        ["lab", "up", "--pods", "-1"],
        ["lab", "up", "--name", "A_B"],
        ["lab", "up", "--underlay-mtu", "9"],
        ["lab", "ping", "--count", "0"],
        ["lab", "demo", "--name", ""],
    ],
)
def test_wrong_usage_of_the_other_commands(argv: list[str]) -> None:
    found = invoke(*argv)
    assert found.exit_code == 2 and "Traceback" not in found.output, found.output


@pytest.mark.parametrize(
    ("argv", "right"),
    [
        (["stauts"], "status"),
        (["lba"], "lab"),
        (["lab", "pnig"], "ping"),
        (["check", "--per", "web2"], "--peer"),
        (["lab", "up", "--host", "2"], "--hosts"),
    ],
)
def test_a_misspelt_command_or_option_gets_the_nearest(argv: list[str], right: str) -> None:
    found = invoke(*argv)
    assert found.exit_code == 2 and "Did you mean" in found.stderr and right in found.stderr


@pytest.mark.parametrize(
    ("variable", "right"),
    [
        ("OVSMESH_AGENT_LISEN", "OVSMESH_AGENT_LISTEN"),
        ("OVSMESH_AGNET_NODE", "OVSMESH_AGENT_NODE"),
        ("OVSMESH_AGENT_STATEDIR", "OVSMESH_AGENT_STATE_DIR"),
        ("ovsmesh_agent_node", "OVSMESH_AGENT_NODE"),
        ("OVSMESH_AGENT_NODE", ""),
        # of another command, of a Service in Kubernetes, of something else
        ("OVSMESH_STATUS_NODE", ""),
        ("OVSMESH_AGENT_SERVICE_HOST", ""),
        ("OVSMESH_AGENT_PORT_9474_TCP_ADDR", ""),
        ("OVSMESH_IMAGE", ""),
    ],
)
def test_a_misspelt_variable_is_named_with_the_right_one(nothing_runs: list[object], variable: str, right: str) -> None:
    found = invoke("agent", "--mesh", "/m.yaml", **{variable: "x"})
    assert found.exit_code == 0 and len(nothing_runs) == 1
    said = f"warning: the environment variable {variable} is of no effect; did you mean {right}?\n"
    assert found.stderr == (said if right else "")


def completed(prog: str, variable: str, *words: str) -> list[str]:
    env = {variable: "bash_complete", "COMP_WORDS": " ".join(("ovsmesh", *words)), "COMP_CWORD": str(len(words))}
    found = CliRunner().invoke(cli.cli, prog_name=prog, complete_var=variable, env=env)
    return [line.partition(",")[2] for line in found.output.split()]


def test_a_shell_completes_commands_options_and_nodes(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(text_of(A, B))
    variable = "_OVSMESH_COMPLETE"
    assert completed("ovsmesh", variable, "stat") == ["status"]
    assert "--peer" in completed("ovsmesh", variable, "check", "--p")
    assert completed("ovsmesh", variable, "lab", "pi") == ["ping"]
    mesh = ("--mesh", str(tmp_path / "mesh.yaml"))
    assert completed("ovsmesh", variable, "check", *mesh, "--peer", "") == ["a", "b"]
    assert completed("ovsmesh", variable, "check", "--mesh", str(tmp_path / "none"), "--peer", "") == []


def test_kubectl_gets_the_completions_of_its_plugin() -> None:
    assert next(formats.complete(cli._plugin(), "kubectl ovsmesh", ["stat"])).startswith("status\t")
    assert next(formats.complete(cli._plugin(), "kubectl ovsmesh", ["status", "--clus"])).startswith("--cluster")
    assert list(formats.complete(cli._plugin(), "kubectl ovsmesh", ["plan", "--mesh", ""])) == [":0"]
    assert list(formats.complete(cli._plugin(), "kubectl ovsmesh", [""]))[-1] == ":4"
