"""Who is a member, who is not and why: Nodes and static members as values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.controller.membership import Membership, NodeView, membership_of, parse_node
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.mesh.validation import clusters_of
from tests.support.meshkit import node as member

CLUSTERS = ("10.97.0.0/16", "fd00:97::/32")


def view(number: int, *cidrs: str, created: int | None = None, **more: object) -> NodeView:
    created = number if created is None else created
    made = NodeView(
        f"web{number}",
        f"uid{number}",
        f"2026-01-01T00:00:{created:02d}Z",
        (f"192.0.2.{number}",),
        "",
        False,
        cidrs or (f"10.97.{number}.0/24",),
    )
    return made._replace(**more)  # type: ignore[arg-type]


def of(*nodes: NodeView, static: tuple[object, ...] = (), held: tuple[Node, ...] = ()) -> Membership:
    mesh = Mesh(clusters_of(CLUSTERS)[0], static)  # type: ignore[arg-type]
    return membership_of(mesh, nodes, held)


def names(found: Membership) -> list[str]:
    return [entry.name for entry in found.members]


def test_an_entry_carries_what_agents_need() -> None:
    (entry,) = of(view(1, "10.97.1.0/24", "fd00:97:1::/64", zone="z1")).members
    assert entry == member("web1", "192.0.2.1", "10.97.1.0/24", "fd00:97:1::/64", uid="uid1", zone="z1")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"pod_cidrs": ()}, "PodCIDRMissing"),
        ({"pod_cidrs": ("10.98.0.0/24",)}, "PodCIDROutside"),
        ({"pod_cidrs": ("2001:db8::/64",)}, "PodCIDROutside"),
        ({"pod_cidrs": ("10.97.1.0/24",)}, "PodCIDRConflict"),
        ({"pod_cidrs": ("10.97.0.0/22",)}, "PodCIDRConflict"),
        ({"pod_cidrs": ("10.97.9.0/24", "10.97.1.128/25")}, "PodCIDRConflict"),
        ({"addresses": ()}, "AddressMissing"),
        ({"addresses": ("2001:db8::1",)}, "AddressMissing"),
        ({"addresses": ("192.0.2.1",)}, "AddressConflict"),
        ({"asked": "192.0.2.1"}, "AddressConflict"),
        ({"asked": "nonsense"}, "AddressInvalid"),
        ({"asked": "10.97.1.1"}, "AddressInvalid"),
        ({"asked": "127.0.0.1"}, "AddressInvalid"),
    ],
)
def test_one_bad_node_is_named_and_the_rest_are_in(bad: dict[str, Any], reason: str) -> None:
    found = of(view(1), view(2), view(3, **bad))
    assert names(found) == ["web1", "web2"]
    problem = found.problems["web3"]
    assert (problem.reason, problem.node, problem.fatal) == (reason, "web3", True)
    assert "left out" in problem.message


def test_ipv6_only_and_dual_stack_nodes_are_members() -> None:
    found = of(view(1), view(2, "fd00:97:2::/64"), view(3, "10.97.3.0/24", "fd00:97:3::/64"))
    assert names(found) == ["web1", "web2", "web3"] and not found.problems


def test_the_older_keeps_it_in_whatever_order_they_come() -> None:
    old, new = view(2, "10.97.1.0/24", created=1), view(1, "10.97.1.0/24", created=2)
    for nodes in ((old, new), (new, old)):
        assert names(of(*nodes)) == ["web2"]
    # at the same second the uid decides
    twins = view(1, "10.97.1.0/24", created=1, uid="b"), view(2, "10.97.1.0/24", created=1, uid="a")
    assert names(of(*twins)) == ["web2"]


def test_who_has_lost_takes_nothing_from_others() -> None:
    """web2 loses its address to web1: its pod CIDR is free for web3, younger than both."""
    found = of(view(1), view(2, addresses=("192.0.2.1",)), view(3, "10.97.2.0/24"))
    assert names(found) == ["web1", "web3"]


def test_the_newer_is_in_once_the_older_has_left() -> None:
    assert names(of(view(1), view(2, "10.97.1.0/24"))) == ["web1"]
    assert names(of(view(2, "10.97.1.0/24"))) == ["web2"]


def test_excluded_nodes_hold_nothing() -> None:
    found = of(view(1, excluded=True), view(2, "10.97.1.0/24"))
    assert names(found) == ["web2"] and not found.problems


def test_the_annotation_comes_first_and_leading_space_is_forgiven() -> None:
    (entry,) = of(view(1, asked="198.51.100.7")).members
    assert str(entry.address) == "198.51.100.7"


def test_the_family_that_most_use_is_kept() -> None:
    dual = [view(n, addresses=(f"2001:db8::{n}", f"192.0.2.{n}")) for n in (1, 2)]
    assert [str(e.address) for e in of(*dual).members] == ["192.0.2.1", "192.0.2.2"]
    held = of(*(n._replace(addresses=n.addresses[:1]) for n in dual)).members
    assert [str(e.address) for e in held] == ["2001:db8::1", "2001:db8::2"]
    assert of(*dual, held=held).members == held
    # One that has the other only does not turn all others round.
    found = of(*dual, view(3), held=held)
    assert found.members == held and found.problems["web3"].reason == "AddressMissing"


def test_a_node_that_turns_bad_keeps_its_last_good_entry() -> None:
    held = of(view(1), view(2)).members
    found = of(view(1), view(2, addresses=()), held=held)
    assert found.members == held
    assert not found.problems["web2"].fatal and "last good" in found.problems["web2"].message
    # but not when it is another Node, or when another has what it had
    assert names(of(view(1), view(2, addresses=(), uid="new"), held=held)) == ["web1"]
    found = of(view(1), view(2, addresses=()), view(3, addresses=("192.0.2.2",)), held=held)
    assert names(found) == ["web1", "web3"] and found.problems["web2"].fatal


VIP = "192.0.2.100"


def at(found: Membership) -> dict[str, str]:
    return {entry.name: str(entry.address) for entry in found.members}


def test_a_virtual_address_that_fails_over_throws_nobody_out() -> None:
    """kube-vip: the older Node is dead and lists the address still; the living one lists it too, and first."""
    alone = of(view(1, addresses=(VIP, "192.0.2.1")), view(2))
    assert at(alone) == {"web1": VIP, "web2": "192.0.2.2"}
    both = [view(n, addresses=(VIP, f"192.0.2.{n}")) for n in (1, 2)]
    found = of(*both, held=alone.members)
    assert found.members == alone.members and not found.problems
    # the dead one comes back without it
    found = of(view(1), both[1], held=found.members)
    assert at(found) == {"web1": "192.0.2.1", "web2": "192.0.2.2"}
    assert at(of(*both)) == at(found), "where nobody has it, each takes what is its own alone"


@pytest.mark.parametrize("created", [1, 9], ids=["younger", "older"])
def test_a_node_that_lists_nothing_but_anothers_address_keeps_its_last_good_entry(created: int) -> None:
    held = of(view(1, addresses=(VIP,), created=5), view(2, created=created)).members
    only = [view(1, addresses=(VIP,), created=5), view(2, addresses=(VIP,), created=created)]
    found = of(*only, held=held)
    assert found.members == held
    problem = found.problems["web2"]
    assert (problem.reason, problem.fatal) == ("AddressConflict", False) and "last good" in problem.message
    # a newcomer has no such entry
    found = of(*only, held=held[:1])
    assert names(found) == ["web1"] and found.problems["web2"].fatal


def test_an_older_node_takes_nothing_from_the_one_that_has_it() -> None:
    held = of(view(1), view(2)).members
    for bad in ({"addresses": ("192.0.2.2",)}, {"asked": "192.0.2.2"}, {"pod_cidrs": ("10.97.2.0/24",)}):
        found = of(view(1, **bad), view(2), held=held)
        assert found.members == held
        assert "which has it" in found.problems["web1"].message


def test_a_node_made_again_takes_what_is_its_own() -> None:
    held = of(view(1, addresses=(VIP, "192.0.2.1")), view(2)).members
    again = view(2, addresses=(VIP, "192.0.2.2"), uid="new", created=30)
    found = of(view(1, addresses=(VIP, "192.0.2.1")), again, held=held)
    assert at(found) == {"web1": VIP, "web2": "192.0.2.2"} and not found.problems
    # what the old one had is free for others
    found = of(view(2, addresses=("192.0.2.7",), uid="new"), view(3, addresses=("192.0.2.2",)), held=held)
    assert at(found) == {"web2": "192.0.2.7", "web3": "192.0.2.2"}


@pytest.mark.parametrize(
    "addresses",
    [
        (VIP, "192.0.2.2"),
        ("192.0.2.2", VIP),
        ("2001:db8::2", VIP, "192.0.2.2"),
        ("169.254.20.10", "192.0.2.2"),
        ("10.97.2.1", "192.0.2.2"),
        ("192.0.2.1", "192.0.2.2"),
    ],
)
def test_the_order_of_a_nodes_addresses_moves_nothing(addresses: tuple[str, ...]) -> None:
    held = of(view(1), view(2)).members
    found = of(view(1), view(2, addresses=addresses), held=held)
    assert found.members == held and not found.problems


@pytest.mark.parametrize("other", ["169.254.20.10", "10.97.2.1", "192.0.2.1"])
def test_a_new_node_joins_by_an_address_that_is_usable_and_its_own(other: str) -> None:
    assert at(of(view(1), view(2, addresses=(other, "192.0.2.2")))) == {"web1": "192.0.2.1", "web2": "192.0.2.2"}


def test_an_address_that_a_node_no_longer_lists_is_given_up() -> None:
    held = of(view(1), view(2)).members
    found = of(view(1), view(2, addresses=("192.0.2.7", "192.0.2.8")), held=held)
    assert at(found)["web2"] == "192.0.2.7" and not found.problems


def test_the_annotation_moves_a_node_at_once() -> None:
    held = of(view(1), view(2)).members
    assert at(of(view(1), view(2, asked="198.51.100.7"), held=held))["web2"] == "198.51.100.7"


def test_static_members() -> None:
    static = member("rack1", "198.51.100.1", "10.97.200.0/24")
    found = of(view(1), static=(static,))
    assert names(found) == ["rack1", "web1"] and found.static == {"rack1"}
    held = found.members
    # One that is there already goes before a Node, a new one after it.
    newcomer = view(2, "10.97.200.0/24")
    found = of(view(1), newcomer, static=(static,), held=held)
    assert names(found) == ["rack1", "web1"] and found.problems["web2"].reason == "PodCIDRConflict"
    found = of(view(1), newcomer, static=(static,))
    assert names(found) == ["web1", "web2"] and found.static_problems[0].node == "rack1"


def test_parsing_a_node() -> None:
    found = {
        "metadata": {
            "name": "web1",
            "uid": "u",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"ovsmesh.io/exclude": "true", "topology.kubernetes.io/zone": "z"},
            "annotations": {"ovsmesh.io/tunnel-address": " 192.0.2.9 "},
        },
        "spec": {"podCIDR": "10.97.1.0/24", "taints": [{"key": "a"}, {"key": "node.ovsmesh.io/agent-not-ready"}]},
        "status": {
            "addresses": [
                {"type": "Hostname", "address": "web1"},
                {"type": "ExternalIP", "address": "203.0.113.1"},
                {"type": "InternalIP", "address": "192.0.2.1"},
            ],
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "NetworkUnavailable", "status": "False"}],
        },
    }
    node = parse_node(found)
    assert (node.asked, node.excluded, node.taints, node.zone) == ("192.0.2.9", True, (1,), "z")
    assert node.addresses == ("192.0.2.1",), "neither a Hostname nor an ExternalIP is a tunnel address"
    assert node.pod_cidrs == ("10.97.1.0/24",)
    assert node.network is not None and node.network.status == "False" and node.ready is None
    bare = parse_node({"metadata": {"name": "x"}})
    assert bare.pod_cidrs == () and bare.addresses == ()


def some_views(most: int) -> st.SearchStrategy[NodeView]:
    """Nodes that list up to so many addresses out of twelve."""
    return st.builds(
        lambda number, cidr, length, addresses, created: view(
            number,
            f"10.97.{cidr >> (24 - length) << (24 - length)}.0/{length}",
            addresses=tuple(f"192.0.2.{address}" for address in addresses),
            created=created,
        ),
        st.integers(1, 30),
        st.integers(0, 15),
        st.integers(20, 24),
        st.lists(st.integers(1, 12), min_size=1, max_size=most),
        st.integers(0, 5),
    )


def check(nodes: list[NodeView], random: object) -> Membership:
    found = of(*nodes)
    shuffled = list(nodes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert of(*shuffled) == found
    addresses = [entry.address for entry in found.members]
    assert len(set(addresses)) == len(addresses)
    networks = [n for entry in found.members for n in entry.pod_cidrs]
    assert not any(a.overlaps(b) for i, a in enumerate(networks) for b in networks[:i])
    assert {e.name for e in found.members} | found.problems.keys() == {n.name for n in nodes}
    return found


@given(st.lists(some_views(1), max_size=12, unique_by=lambda v: v.name), st.randoms())
def test_never_two_with_one_thing(nodes: list[NodeView], random: object) -> None:
    found = check(nodes, random)
    # Held by itself it stays as it is.
    assert of(*nodes, held=found.members) == found


@given(st.lists(some_views(3), max_size=8, unique_by=lambda v: v.name), st.randoms(), st.data())
def test_addresses_that_wander_never_take_a_member_out(
    nodes: list[NodeView], random: object, data: st.DataObject
) -> None:
    """Each member goes on listing the address that it has, among others in any order: no tunnel moves."""
    held = {entry.name: entry for entry in check(nodes, random).members}
    moved = []
    for node in nodes:
        others = data.draw(st.lists(st.integers(1, 12), max_size=3))
        texts = {f"192.0.2.{n}" for n in others} | ({str(held[node.name].address)} if node.name in held else set())
        moved.append(node._replace(addresses=tuple(data.draw(st.permutations(sorted(texts))))))
    after = {entry.name: entry for entry in of(*moved, held=tuple(held.values())).members}
    assert {name: after.get(name) for name in held} == held
