"""MeshSlices: what is written is what is read, and what is wrong in one is named instead of raised."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.errors import Problem
from ovsmesh.mesh.meshslice import labels, parse_slice, slice_name, slice_spec
from ovsmesh.mesh.types import MeshSettings, Node
from tests.support.meshkit import CLUSTERS, node

NODES = (
    node("web1", "192.0.2.1", "10.97.1.0/24", "fd00:97:1::/64", uid="u1", zone="z"),
    node("web2", "2001:db8::2", "10.97.2.0/24"),
)
SETTINGS = MeshSettings(CLUSTERS, "vxlan", 7, 1400)


def slice_of(**change: Any) -> dict[str, Any]:
    spec = slice_spec("default", 1, 3, 5, SETTINGS, NODES)
    meta = {"name": slice_name("default", 1), "resourceVersion": "42", "labels": labels("default")}
    return {"metadata": meta, "spec": spec | change}


def test_what_is_written_is_what_is_read() -> None:
    found = parse_slice(slice_of())
    assert (found.name, found.mesh, found.index, found.count, found.generation) == ("default-001", "default", 1, 3, 5)
    assert (found.settings, found.nodes, found.members) == (SETTINGS, NODES, NODES)
    assert (found.resource_version, found.labelled, found.problem) == ("42", True, "")


def test_equal_objects_are_equal_slices() -> None:
    """A watch that brings the same again wakes nobody."""
    spoilt = slice_of(nodes=[{"name": "web1", "address": "nonsense", "podCIDRs": []}])
    assert parse_slice(spoilt) == parse_slice(slice_of(nodes=[dict(spoilt["spec"]["nodes"][0])]))
    assert parse_slice(slice_of()) == parse_slice(slice_of()) != parse_slice(slice_of(count=4))


def test_what_a_newer_controller_adds_to_an_entry_is_passed_over() -> None:
    entries = [entry | {"later": 1} for entry in slice_of()["spec"]["nodes"]]
    assert parse_slice(slice_of(nodes=entries)).nodes == NODES


@pytest.mark.parametrize(
    ("entry", "named", "reason", "field"),
    [
        ({"name": "web1", "address": "192.0.2.1"}, "web1", "PodCIDRMissing", "podCIDRs"),
        ({"name": "web1", "address": 7, "podCIDRs": ["10.97.1.0/24"]}, "web1", "AddressInvalid", "address"),
        (
            {"name": "web1", "address": "192.0.2.1", "podCIDRs": ["10.1.1.0/24"]},
            "web1",
            "PodCIDROutside",
            "podCIDRs[0]",
        ),
        ({"name": "a b", "address": "192.0.2.1", "podCIDRs": ["10.97.1.0/24"]}, "nodes[1]", "NameInvalid", "name"),
        ({"name": None}, "nodes[1]", "NameMissing", "name"),
        ("web1", "nodes[1]", "NodeInvalid", "entry"),
    ],
)
def test_a_bad_entry_is_named_and_the_others_stay(entry: object, named: str, reason: str, field: str) -> None:
    good = slice_of()["spec"]["nodes"]
    found = parse_slice(slice_of(nodes=[good[0], entry]))
    assert found.problem == "" and found.members == NODES[:1]
    (problem,) = (one for one in found.nodes if isinstance(one, Problem))
    assert (problem.node, problem.reason, problem.field) == (named, reason, field)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"settings": None}, "wanted settings"),
        ({"settings": {"clusterCIDRs": ["10.97.0.1/16"], "encapsulation": "gre", "mtu": "auto"}}, "host bits"),
        ({"settings": {"clusterCIDRs": ["10.97.0.0/16"], "encapsulation": "gre"}}, "mtu"),
        ({"settings": {"clusterCIDRs": ["10.97.0.0/16"], "encapsulation": "gre", "mtu": "auto", "new": 1}}, "new"),
        ({"index": True}, "index"),
        ({"count": 0}, "count"),
        ({"meshGeneration": "5"}, "meshGeneration"),
    ],
)
def test_a_slice_that_is_of_no_use_says_why(change: dict[str, Any], part: str) -> None:
    found = parse_slice(slice_of(**change))
    assert part in found.problem and "default-001" in found.problem
    names = [one.name if isinstance(one, Node) else one.node for one in found.nodes]
    assert names == ["web1", "web2"], "a controller could not put them back in their place"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["mesh", "index", "count", "meshGeneration", "settings", "nodes"]
ENTRY = st.dictionaries(st.sampled_from(["name", "address", "podCIDRs", "uid", "zone", "x"]), json_values)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values | st.lists(ENTRY, max_size=3)), json_values, json_values)
def test_nothing_in_a_slice_raises(change: dict[str, Any], metadata: object, spec: object) -> None:
    found = parse_slice(slice_of(**change))
    assert all(isinstance(one, Node | Problem) for one in found.nodes)
    assert parse_slice({"metadata": metadata, "spec": spec}).problem


def test_nothing_in_a_slice_is_nested_too_deep() -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    found = parse_slice(slice_of(nodes=[{"name": deep}, deep], settings=deep))
    assert found.problem and [one.reason for one in found.nodes if isinstance(one, Problem)] == ["NodeInvalid"] * 2


def test_settings_are_typed() -> None:
    found = parse_slice(slice_of())
    assert found.settings is not None and found.settings.cluster_cidrs[0] == ip_network("10.97.0.0/16")
