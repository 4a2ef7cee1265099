"""A mesh finds its nodes."""

from __future__ import annotations

from tests.support.meshkit import first


def test_node_is_found_by_its_whole_name() -> None:
    mesh = first(12)
    found = mesh.node("web1")
    assert found is not None and found.name == "web1"
    assert mesh.node("web") is None
