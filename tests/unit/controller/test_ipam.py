"""Cluster CIDRs that are derived, and pod CIDRs out of them: never two that overlap."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network
from itertools import combinations
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.controller.ipam import allocate, derive, lengths
from ovsmesh.controller.membership import NodeView
from ovsmesh.mesh.types import MeshError

V4 = [ip_network("10.97.0.0/16")]
DUAL = [ip_network("10.97.0.0/16"), ip_network("fd00:97::/48")]


def test_one_range_of_each_version_in_order() -> None:
    found = allocate(DUAL, lengths(DUAL, None), [], ["a", "b"])
    assert found == {"a": ("10.97.0.0/24", "fd00:97::/64"), "b": ("10.97.1.0/24", "fd00:97:0:1::/64")}


def test_what_is_taken_is_passed_over_whatever_its_length() -> None:
    taken = [ip_network(text) for text in ("10.97.0.0/23", "10.97.2.128/25", "10.97.4.0/24", "10.0.0.0/24", "fd00::/8")]
    assert allocate(V4, {4: 24}, taken, ["a", "b"]) == {"a": ("10.97.3.0/24",), "b": ("10.97.5.0/24",)}


def test_an_exhausted_cluster_gives_what_there_is() -> None:
    small = [ip_network("10.97.0.0/23"), ip_network("10.98.0.0/24")]
    found = allocate(small, {4: 24}, [], list("abcd"))
    assert found == {"a": ("10.97.0.0/24",), "b": ("10.97.1.0/24",), "c": ("10.98.0.0/24",)}
    assert allocate(small, {4: 24}, small, ["a"]) == {}


def test_no_half_of_a_dual_stack_node() -> None:
    clusters = [ip_network("10.97.0.0/24"), ip_network("fd00::/48")]
    assert list(allocate(clusters, lengths(clusters, None), [], ["a", "b"])) == ["a"]


def test_small_ipv6_numbers_stay_ipv6() -> None:
    clusters = [ip_network("::1:0:0/96")]
    assert allocate(clusters, {6: 112}, [], ["a"]) == {"a": ("::1:0:0/112",)}


def test_lengths() -> None:
    assert lengths(DUAL, None) == {4: 24, 6: 64}
    assert lengths(DUAL, 26) == {4: 26, 6: 64}
    assert lengths([ip_network("fd00:97::/48")], 80) == {6: 80}
    for clusters, asked in ((V4, 15), (V4, 31), ([ip_network("10.0.0.0/25")], None), (DUAL[1:], 127)):
        with pytest.raises(ValueError, match="does not fit"):
            lengths(clusters, asked)


def test_ten_thousand_nodes_are_quick() -> None:
    clusters = [ip_network("10.0.0.0/8")]
    taken = [ip_network((0x0A000000 + 512 * n, 24)) for n in range(10_000)]
    found = allocate(clusters, {4: 24}, taken, [f"n{n}" for n in range(10_000)])
    assert len(set(found.values())) == 10_000


ranges = st.builds(
    lambda bits, length: IPv4Network((0x0A610000 | bits << (32 - length) & 0xFFFF, length)),
    st.integers(0, 0xFFFF),
    st.integers(18, 30),
)


@given(st.lists(ranges, max_size=30), st.integers(18, 30), st.integers(1, 20))
def test_never_two_that_overlap(taken: list[IPv4Network], length: int, nodes: int) -> None:
    names = [f"n{n}" for n in range(nodes)]
    found = allocate(V4, {4: length}, taken, names)
    made = [ip_network(cidr) for cidrs in found.values() for cidr in cidrs]
    assert not any(a.overlaps(b) for a, b in combinations(made, 2))
    assert not any(a.overlaps(b) for a in made for b in taken)
    assert all(a.prefixlen == length and cast(IPv4Network, V4[0]).supernet_of(cast(IPv4Network, a)) for a in made)
    # Whoever went without: nothing was free for it.
    if len(found) < nodes:
        every = V4[0].subnets(new_prefix=length)
        assert not any(not any(s.overlaps(t) for t in (*taken, *made)) for s in every)
    # In halves it is the same: a new leader goes on where the last one was.
    half = allocate(V4, {4: length}, taken, names[: nodes // 2])
    rest = allocate(V4, {4: length}, [*taken, *(ip_network(c) for v in half.values() for c in v)], names[nodes // 2 :])
    assert {**half, **rest} == found


def node(name: str, *cidrs: str, address: str = "", asked: str = "", excluded: bool = False) -> NodeView:
    return NodeView(name, name, "", (address,) if address else (), asked, excluded, cidrs)


def test_the_smallest_range_for_each_version() -> None:
    assert derive([node("a", "10.244.0.0/24")]) == ("10.244.0.0/24",)
    three = [node(f"n{i}", f"10.244.{i}.0/24", f"fd00:97:0:{i}::/64", address=f"192.0.2.{i}") for i in range(3)]
    assert derive(three) == ("10.244.0.0/22", "fd00:97::/62")
    assert derive([node("a", "fd00:97::/64")]) == ("fd00:97::/64",)
    assert derive([node("a", "10.244.255.0/24"), node("b", "10.244.0.0/24")]) == ("10.244.0.0/16",)


def test_it_is_widened_and_never_narrowed() -> None:
    assert derive([node("a", "10.244.4.0/24")], ("10.244.0.0/22",)) == ("10.244.0.0/21",)
    assert derive([node("a", "10.244.1.0/24")], ("10.244.0.0/16",)) == ("10.244.0.0/16",)
    assert derive([node("a", "10.244.1.0/24", "fd00::/64")], ("10.244.0.0/16",)) == ("10.244.0.0/16", "fd00::/64")
    assert derive([node("a", "10.244.1.0/24")], ("10.244.0.0/16", "fd00::/60")) == ("10.244.0.0/16", "fd00::/60")


def test_where_nobody_has_a_range_there_is_none() -> None:
    for nodes in ([], [node("a")], [node("a", "nonsense")], [node("a", "10.244.0.0/24", excluded=True)]):
        with pytest.raises(MeshError, match=r"no Node has spec\.podCIDRs"):
            derive(nodes)


@pytest.mark.parametrize(
    ("nodes", "beside", "why"),
    [
        ([node("a", "10.244.0.0/24"), node("b", "10.246.0.0/24")], (), "10.244.0.0/14, of which the Nodes have too"),
        ([node("a", "10.0.0.0/24"), node("b", "192.168.0.0/24")], (), "0.0.0.0/0, of which"),
        ([node("a", "10.0.0.0/24", address="10.0.7.9"), node("b", "10.0.8.0/24")], (), "10.0.7.9, the address of Node"),
        ([node("a", "10.0.0.0/24"), node("b", "10.0.8.0/24", asked="10.0.1.1")], (), "10.0.1.1, the address of Node b"),
        (
            [node("a", "10.0.0.0/24"), node("b", "10.0.8.0/24"), node("x", address="10.0.4.1", excluded=True)],
            (),
            "the address of Node x",
        ),
        ([node("a", "10.0.0.0/24"), node("b", "10.0.128.0/24")], ("10.0.96.1",), "10.0.96.1, the address of the API"),
    ],
)
def test_what_does_not_look_like_one_range_is_left_to_the_user(
    nodes: list[NodeView], beside: tuple[str, ...], why: str
) -> None:
    with pytest.raises(MeshError, match=why):
        derive(nodes, (), (*beside, "api.example.org"))


def test_many_nodes_may_come_from_a_large_range() -> None:
    spread = [node(f"n{i}", f"10.{i}.0.0/24") for i in range(0, 256, 2)]
    with pytest.raises(MeshError, match="too little"):
        derive(spread)
    assert derive([*spread, *(node(f"m{i}", f"10.{i}.1.0/24") for i in range(0, 256, 2))]) == ("10.0.0.0/8",)


@given(
    st.integers(0, 2**16 - 1), st.integers(8, 24), st.sets(st.integers(0, 2**12), min_size=1, max_size=20), st.data()
)
def test_it_never_is_larger_than_the_range_that_all_come_from(
    base: int, length: int, picks: set[int], data: st.DataObject
) -> None:
    """The assumption of derive(): what one range was cut into has its smallest common range inside it."""
    cluster = ip_network((base << 16 & (2**32 - (1 << (32 - length))), length))
    parts = 1 << max(0, 24 - length)
    cut = [ip_network((int(cluster.network_address) + (p % parts) * 256, 24)) for p in picks]
    nodes = [node(f"n{i}", str(net)) for i, net in enumerate(cut)]
    try:
        (found,) = derive(nodes)
    except MeshError:
        return
    around = ip_network(found)
    assert around.subnet_of(cluster)  # type: ignore[arg-type]
    assert all(net.subnet_of(around) for net in cut)  # type: ignore[arg-type]
    later = data.draw(st.sampled_from(cut))
    assert derive([node("one", str(later))], (found,)) == (found,)


@pytest.mark.parametrize("theirs", ["12.0.0.0/6", "0.0.0.0/0", "11.0.0.0/8", "12.1.0.0/16", "192.168.7.0/24"])
def test_one_node_widens_the_cluster_s_range_by_no_more_than_its_own(theirs: str) -> None:
    nodes = [node(f"n{i}", f"10.244.{i}.0/24") for i in range(4)]
    assert derive([*nodes, node("bad", theirs)], ("10.244.0.0/23",)) == ("10.244.0.0/22",)
    with pytest.raises(MeshError):
        derive([node("bad", "12.0.0.0/6")])
