"""The words: frozen, comparable, and said in full."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from ovsmesh.dataplane.types import KINDS, Dataplane
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.support.meshkit import first


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
def test_a_problem_names_node_field_and_value(problem: Any, text: Any) -> None:
    assert str(problem) == text


def test_kinds_are_the_parts_in_the_order_of_adding() -> None:
    assert [f.name for f in dataclasses.fields(Dataplane)] == list(KINDS)
    order = [KINDS.index(kind) for kind in ("bridges", "ports", "flows", "neighbours", "fdb", "routes")]
    assert order == sorted(order)


def test_an_empty_dataplane_can_not_be_written_to() -> None:
    with pytest.raises(TypeError):
        cast(Any, Dataplane().ports)["gre-web2"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast(Any, Dataplane()).ports = {}


def test_node_is_found_by_its_whole_name() -> None:
    mesh = first(12)
    found = mesh.node("web1")
    assert found is not None and found.name == "web1"
    assert mesh.node("web") is None
