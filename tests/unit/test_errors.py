"""What goes wrong is said in full, and counts as its reason does."""

from __future__ import annotations

import pytest

from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem(Reason.NodeInvalid, "is wrong"), "is wrong"),
        (Problem(Reason.NodeInvalid, "is wrong", "web2"), "node web2: is wrong"),
        (
            Problem(Reason.NodeInvalid, "has host bits", "web2", "podCIDRs[0]", "10.97.2.1/24"),
            "node web2: podCIDRs[0] 10.97.2.1/24: has host bits",
        ),
        (Problem(Reason.NodeInvalid, "is missing", field="ibrname"), "ibrname: is missing"),
    ],
)
def test_a_problem_names_node_field_and_value(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_a_problem_is_fatal_where_its_reason_is_an_error_unless_told_otherwise() -> None:
    assert Problem(Reason.PortError, "x").fatal is True
    assert Problem(Reason.MTUTooHigh, "x").fatal is False
    assert Problem(Reason.PortError, "x", fatal=False).fatal is False
    assert Problem(Reason.MTUTooHigh, "x", fatal=True).fatal is True
