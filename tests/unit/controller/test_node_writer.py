"""Which Nodes' conditions are to be written, as time goes by; writing them is tests/kube's."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ovsmesh.controller.membership import ObjectCondition
from ovsmesh.controller.node_writer import LOST, NodeWriter
from tests.unit.controller.test_node_conditions import GOOD, MEMBERSHIP, NODE

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
