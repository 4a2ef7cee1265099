"""Every reason that a user may be shown is in the enum, and in docs/troubleshooting.md with its sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovsmesh.reasons import Reason

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "troubleshooting.md"
# what makes something with a reason → the position of the reason in its arguments
MAKERS = {"Problem": 0, "Refusal": 0, "_kept": 0, "Condition": 2, "ObjectCondition": 1, "_both": 1, "record": 1}


def sources() -> Iterator[ast.Module]:
    for path in (ROOT / "ovsmesh").rglob("*.py"):
        if path.name != "reasons.py":
            yield ast.parse(path.read_text(encoding="utf-8"), str(path))


def called(node: ast.Call) -> str:
    return str(getattr(node.func, "id", getattr(node.func, "attr", "")))


def bare(module: ast.Module) -> list[str]:
    """Strings in this module where a reason belongs: given to a maker, or compared with a reason."""
    found = []
    for node in ast.walk(module):
        given: list[ast.expr] = []
        if isinstance(node, ast.Call):
            place = MAKERS.get(called(node), len(node.args))
            given = node.args[place : place + 1]
            given += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            given = sides if any(getattr(side, "attr", "") == "reason" for side in sides) else []
        found += [c.value for arg in given for c in ast.walk(arg) if isinstance(c, ast.Constant)]
    return [text for text in found if isinstance(text, str) and text[:1].isupper()]


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_has_its_row_in_the_troubleshooting_guide(reason: Reason) -> None:
    row = f"| `{reason}` | {reason.severity} | {reason.meaning} | {reason.remedy} |"
    assert row in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_the_guide_has_no_reason_that_is_gone() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").partition("## Reasons")[2].splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == sorted(Reason, key=str.lower)


def test_no_module_has_a_reason_of_its_own() -> None:
    assert [text for module in sources() for text in bare(module)] == []


@pytest.mark.parametrize(
    "source",
    [
        'Problem("Odd", "text")',
        'validation.Refusal("Odd", "web1", "", "", "text")',
        'Condition("Degraded", "True", "Odd" if bad else Reason.Read)',
        'self._events.record(about, "Odd", "text")',
        'Problem(message="text", reason="Odd")',
        'problem.reason in ("Odd", Reason.Read)',
    ],
)
def test_a_planted_reason_is_found(source: str) -> None:
    assert bare(ast.parse(source)) == ["Odd"]


def test_each_maker_is_called() -> None:
    calls = {called(node) for module in sources() for node in ast.walk(module) if isinstance(node, ast.Call)}
    assert calls >= MAKERS.keys()


def test_each_reason_is_used() -> None:
    used = {
        node.attr
        for module in sources()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    assert set(Reason) == used - {"__members__"}
