"""What an address is, and what is said of one that is nothing."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from ovsmesh.errors import OvsmeshError
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.trace import places
from ovsmesh.trace.types import Kind

NODES = tuple(
    Node(
        f"h{n}",
        ip_address(f"192.0.2.{10 + n}"),
        (ip_network(f"10.97.{n}.0/24"), *([ip_network(f"fd00:97:{n}::/64")] if n < 3 else [])),
    )
    for n in (1, 2, 3)
)
MESH = Mesh((ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")), NODES)


@pytest.mark.parametrize(
    ("address", "kind", "node"),
    [
        ("10.97.2.1", Kind.GATEWAY, "h2"),
        ("10.97.2.2", Kind.POD, "h2"),
        ("10.97.2.255", Kind.POD, "h2"),
        ("192.0.2.13", Kind.TUNNEL, "h3"),
        ("fd00:97:1::1", Kind.GATEWAY, "h1"),
        ("fd00:97:1::2", Kind.POD, "h1"),
    ],
)
def test_an_address_is_a_pods_a_gateway_or_a_tunnel_address(address: str, kind: Kind, node: str) -> None:
    found = places.place(MESH, ip_address(address))
    assert (found.kind, found.node) == (kind, node)


def test_an_unknown_address_names_the_nearest_ranges_first() -> None:
    with pytest.raises(OvsmeshError) as error:
        places.place(MESH, ip_address("10.97.4.7"))
    text = str(error.value)
    assert "10.97.4.7 is in no node's pod CIDR" in text and "inside the cluster CIDR 10.97.0.0/16" in text
    assert text.index("10.97.3.0/24 (h3)") < text.index("10.97.2.0/24 (h2)")


def test_both_ends_are_of_one_ip_version_and_ipv4_where_both_have_it() -> None:
    one, other = places.pair(MESH, ("h1", places.of_node(MESH, "h1")), ("h2", places.of_node(MESH, "h2")))
    assert (str(one.address), str(other.address)) == ("10.97.1.1", "10.97.2.1")
    one, _ = places.pair(MESH, ("h1", places.of_node(MESH, "h1")), ("", [ip_address("fd00:97:2::2")]))
    assert str(one.address) == "fd00:97:1::1"
    with pytest.raises(OvsmeshError, match="no IP version in common"):
        places.pair(MESH, ("h3", places.of_node(MESH, "h3")), ("", [ip_address("fd00:97:2::2")]))
