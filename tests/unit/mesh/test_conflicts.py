"""Conflicts between the nodes of a mesh file: one has the thing, the other is named and keeps what it can."""

from __future__ import annotations

import pytest

from tests.support.meshtext import A, B, C, names, read, text_of


def test_a_last_good_entry_never_displaces_a_good_one() -> None:
    last, _ = read(text_of(A, B))
    thief = "{name: d, address: 192.0.2.4, podCIDRs: [10.97.2.0/25]}"
    mesh, (problem,) = read(text_of(A, "{name: b, address: 192.0.2.2}", thief), last)
    assert names(mesh) == "ad"
    assert "can't be kept" in problem.message


def test_a_last_good_entry_must_fit_the_cluster_cidrs_of_now() -> None:
    last, _ = read(text_of(A, B))
    new = "{name: a, address: 192.0.2.1, podCIDRs: [10.50.1.0/24]}"
    mesh, (problem,) = read(text_of(new, B, clusters="[10.50.0.0/16]"), last)
    assert names(mesh) == "a" and problem.node == "b" and "can't be kept" in problem.message


def test_a_node_that_is_absent_has_left() -> None:
    last, _ = read(text_of(A, B))
    mesh, problems = read(text_of(A), last)
    assert names(mesh) == "a" and problems == ()


@pytest.mark.parametrize(
    ("thief", "reason", "value"),
    [
        ("{name: b, address: 192.0.2.1, podCIDRs: [10.97.2.0/24]}", "AddressConflict", "192.0.2.1"),
        ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.1.0/24]}", "PodCIDRConflict", "10.97.1.0/24"),
        ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.1.128/25]}", "PodCIDRConflict", "10.97.1.128/25"),
    ],
)
def test_who_held_it_keeps_it_wherever_it_stands(thief: str, reason: str, value: str) -> None:
    last, _ = read(text_of(A))
    mesh, (problem,) = read(text_of(thief, A), last)
    assert names(mesh) == "a"
    assert (problem.node, problem.reason, problem.value) == ("b", reason, value)
    assert "node a" in problem.message and "held it before" in problem.message
    # Without a past the first in the file wins.
    mesh, (problem,) = read(text_of(thief, A))
    assert names(mesh) == "b" and problem.node == "a" and "comes first" in problem.message


def test_a_range_is_kept_though_the_rest_of_the_entry_changed() -> None:
    last, _ = read(text_of(A))
    moved = A.replace("192.0.2.1", "192.0.2.77")
    mesh, (problem,) = read(text_of("{name: b, address: 192.0.2.2, podCIDRs: [10.97.1.0/24]}", moved), last)
    assert names(mesh) == "a" and str(mesh.nodes[0].address) == "192.0.2.77" and problem.node == "b"


def test_the_loser_of_a_conflict_keeps_its_last_good_entry() -> None:
    last, _ = read(text_of(A, B))
    mesh, (problem,) = read(text_of(B.replace("10.97.2.0", "10.97.1.0"), A), last)
    assert mesh is last and problem.node == "b" and "keeping its last good entry" in problem.message


def test_two_nodes_may_swap() -> None:
    last, _ = read(text_of(A, B))
    mesh, problems = read(text_of(A.replace("10.97.1", "10.97.2"), B.replace("10.97.2", "10.97.1")), last)
    assert problems == () and [str(n.pod_cidrs[0]) for n in mesh.nodes] == ["10.97.2.0/24", "10.97.1.0/24"]


def test_duplicate_name_the_one_that_was_good_stays() -> None:
    last, _ = read(text_of(A, B))
    other = "{name: a, address: 192.0.2.9, podCIDRs: [10.97.9.0/24]}"
    mesh, (problem,) = read(text_of(other, A, B), last)
    assert mesh is last and "held it before" in problem.message and "line 7" in problem.message


def test_an_entry_that_stands_twice_is_used_once() -> None:
    mesh, (problem,) = read(text_of(A, A, B))
    assert names(mesh) == "ab"
    assert (problem.node, problem.reason) == ("a", "DuplicateName")
    assert "line 6" in problem.message and "line 7" in problem.message


def test_the_loser_of_one_thing_gives_the_rest_to_others() -> None:
    """b loses its address to a, so its range is free for c."""
    loser = B.replace("192.0.2.2", "192.0.2.1")
    mesh, problems = read(text_of(A, loser, C.replace("10.97.3.0", "10.97.2.0")))
    assert names(mesh) == "ac" and [p.reason for p in problems] == ["AddressConflict"]
