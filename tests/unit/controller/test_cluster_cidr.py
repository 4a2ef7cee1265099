"""What cluster CIDRs are derived from the Nodes' pod CIDRs, and when none are."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.controller.cluster_cidr import derive
from ovsmesh.controller.membership import NodeView
from ovsmesh.mesh.types import MeshError


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
    """The claim on which this stands: what one range was cut into has its smallest common range inside it."""
    cluster = ip_network((base << 16 & (2**32 - (1 << (32 - length))), length))
    room = 1 << max(0, 24 - length)
    cut = [ip_network((int(cluster.network_address) + (p % room) * 256, 24)) for p in picks]
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
