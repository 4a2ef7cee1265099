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
MAKERS = {"Problem": 0, "Refusal": 0, "_kept": 0, "Condition": 2, "ObjectCondition": 1, "_both": 1, "emit": 1}


def sources() -> Iterator[ast.Module]:
    for path in (ROOT / "ovsmesh").rglob("*.py"):
        if path.name != "reasons.py":
            yield ast.parse(path.read_text(encoding="utf-8"), str(path))


def bare(module: ast.Module) -> list[str]:
    """Reasons that are strings in this module: what stands where a reason does."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            place = MAKERS.get(getattr(node.func, "id", getattr(node.func, "attr", "")))
            given = [node.args[place]] if place is not None and place < len(node.args) else []
            given += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
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
        'self._events.emit(about, "Odd", "text")',
        'Problem(message="text", reason="Odd")',
    ],
)
def test_a_planted_reason_is_found(source: str) -> None:
    assert bare(ast.parse(source)) == ["Odd"]


def test_each_reason_is_used() -> None:
    used = {
        node.attr
        for module in sources()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    assert set(Reason) == used - {"__members__"}
