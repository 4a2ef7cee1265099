"""Pod CIDRs out of the cluster's: never two that overlap."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network
from itertools import combinations
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovsmesh.controller.ipam import allocate, lengths

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


@settings(deadline=None)
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
