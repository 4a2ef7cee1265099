"""The documents name what the code has: each reason that a user may be shown stands in docs/troubleshooting.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click import Command, Group

from ovsmesh.cli.main import cli

ROOT = Path(__file__).parents[2]
_TOLD = ("Problem", "Refusal", "_kept")


def reasons() -> Any:
    """First arguments of whatever makes a Problem or a Refusal, as literals in the source."""
    found = set()
    for path in (ROOT / "ovsmesh").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[0]
            if name in _TOLD and isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return sorted(found)


def test_there_are_reasons_to_look_for() -> None:
    assert {"PodCIDRConflict", "ApplyFailed", "SelfMissing"} <= set(reasons())


@pytest.mark.parametrize("reason", reasons())
def test_each_reason_is_in_the_troubleshooting_guide(reason: Any) -> None:
    assert f"`{reason}`" in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def commands(group: Any = cli, before: Any = "ovsmesh") -> Iterator[Any]:
    for name, command in sorted(group.commands.items()):
        assert isinstance(command, Command)
        if isinstance(command, Group):
            yield from commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}"


@pytest.mark.parametrize("command", [c for c in commands() if " lab" not in c])
def test_each_command_is_in_a_document(command: Any) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    assert any(command in text for text in texts)
