"""From a mesh to a node's desired dataplane."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from ovsmesh.dataplane.desired import dataplane, mac, overhead, pod_mtu, port_name
from ovsmesh.dataplane.types import FALLBACK_METRIC, KBR, OBR, PEER_KINDS, Facts
from ovsmesh.errors import OvsmeshError
from ovsmesh.mesh.types import gateway
from tests.support.meshkit import FACTS, first, golden, mesh_of, node, numbered, shown, want

# names, addresses, MACs


@pytest.mark.parametrize(
    ("cidr", "address"),
    [
        ("10.97.1.0/24", "10.97.1.1"),
        ("10.97.1.128/25", "10.97.1.129"),
        ("10.97.255.252/30", "10.97.255.253"),
        ("fd00:97:1::/64", "fd00:97:1::1"),
    ],
)
def test_gateway_is_the_first_usable_address(cidr: Any, address: Any) -> None:
    assert str(gateway(ip_network(cidr))) == address


def test_mac_is_that_of_the_cni_bridge_plugin() -> None:
    assert mac(node("a", "192.0.2.1", "10.97.1.0/24")) == "0a:58:0a:61:01:01"


def test_mac_comes_from_ipv4_wherever_it_stands() -> None:
    assert mac(node("a", "192.0.2.1", "fd00:97:1::/64", "10.97.1.0/24")) == "0a:58:0a:61:01:01"


def test_mac_without_ipv4_is_local_unicast_and_the_same_everywhere() -> None:
    found = [mac(node(name, "2001:db8::1", f"fd00:97:{n}::/64")) for name in "ab" for n in (1, 2)]
    assert found[0] == found[2] != found[1]
    assert all(re.fullmatch("0e:58(:[0-9a-f]{2}){4}", text) for text in found)
    # bit 1 of the first byte: locally administered; bit 0: not a group
    assert int(found[0][:2], 16) & 3 == 2
    # every version computes the same: nodes of two versions must agree
    assert found[0] == "0e:58:77:21:96:e5"


HOSTILE = ["", "a" * 300, "../x", "a b", "a/b", "a\nb", "ü", "-", "a_b", "WEB2", "--help", "%d", "LOCAL", "7", "\0"]


@pytest.mark.parametrize("encapsulation", ["gre", "vxlan", "geneve"])
@pytest.mark.parametrize("name", HOSTILE)
def test_port_name_fits_an_interface_whatever_the_node_is_called(name: Any, encapsulation: Any) -> None:
    found = port_name(name, encapsulation)
    assert len(found) <= 15 and re.fullmatch(r"(gre|vx|gnv)-[a-z0-9._-]*", found), found
    assert found not in (".", "..")


@pytest.mark.parametrize(
    ("name", "encapsulation", "expected"),
    [
        ("web2", "gre", "gre-web2"),
        ("web2", "vxlan", "vx-web2"),
        ("web2", "geneve", "gnv-web2"),
        ("elevenchars", "gre", "gre-elevenchars"),
        ("db.example", "gre", "gre-db.example"),
    ],
)
def test_port_name_is_the_nodes_own_where_it_fits(name: Any, encapsulation: Any, expected: Any) -> None:
    assert port_name(name, encapsulation) == expected


def test_long_port_names_are_told_apart_and_never_meet_a_short_one() -> None:
    long = [f"rack{n}.dc1.example.org" for n in range(2000)]
    found = {port_name(name, "gre") for name in long}
    assert len(found) == 2000
    assert all("_" in name and len(name) == 15 for name in found)
    assert not any("_" in port_name(name, "gre") for name in ("web2", "a-b.c", "gre-web2"))
    assert port_name("WEB2", "gre") != port_name("web2", "gre")


# MTU


@pytest.mark.parametrize(
    ("settings", "address", "taken"),
    [
        ({}, "192.0.2.1", 38),
        ({"key": 7}, "192.0.2.1", 42),
        ({"key": 0}, "192.0.2.1", 42),
        ({}, "2001:db8::1", 58),
        ({"key": 7}, "2001:db8::1", 62),
        ({"encapsulation": "vxlan"}, "192.0.2.1", 50),
        ({"encapsulation": "vxlan", "key": 7}, "192.0.2.1", 50),
        ({"encapsulation": "vxlan"}, "2001:db8::1", 70),
        ({"encapsulation": "geneve", "key": 7}, "192.0.2.1", 50),
        ({"encapsulation": "geneve"}, "2001:db8::1", 70),
    ],
)
def test_overhead_and_pod_mtu(settings: Any, address: Any, taken: Any) -> None:
    me = node("a", address, "10.97.1.0/24")
    mesh = mesh_of(me, **settings)
    assert overhead(mesh, me.address) == taken
    assert pod_mtu(mesh, me, Facts(underlay_mtu=9000)) == 9000 - taken
    assert pod_mtu(mesh, me, Facts()) == 1500 - taken


@pytest.mark.parametrize(
    ("underlay", "kept", "asked", "given"),
    [
        # address, route or link is away: what is in place stays, at a jumbo MTU too
        (None, 8962, None, 8962),
        (None, 1462, None, 1462),
        (None, None, None, 1462),
        # one of several ways is away: what the others carry may lower it, and not raise it
        (9000, 1462, None, 1462),
        (1400, 8962, None, 1362),
        # the mesh has the last word
        (None, 8962, 1400, 1400),
        (9000, 1400, 8000, 8000),
    ],
)
def test_what_is_in_place_stays_while_a_way_is_not_known(underlay: Any, kept: Any, asked: Any, given: Any) -> None:
    mesh = first(2, mtu=asked)
    assert pod_mtu(mesh, mesh.nodes[0], Facts(underlay_mtu=underlay, kept_mtu=kept)) == given


def test_a_path_that_carries_less_is_in_the_routes_of_that_peer_alone() -> None:
    limited = replace(FACTS, path_mtus={"web2": 1000, "web3": 1400, "gone": 600})
    before, found = want(first(4)), want(first(4), facts=limited)
    mtus = {str(key[0]): route.mtu for key, route in found.routes.items() if route.type == "unicast"}
    assert mtus == {
        # IPv6 has nothing below 1280
        "10.97.2.0/24": 1000,
        "fd00:97:2::/64": 1280,
        "10.97.3.0/24": 1400,
        "fd00:97:3::/64": 1400,
        "10.97.4.0/24": 1462,
        "fd00:97:4::/64": 1462,
    }
    assert replace(found, routes=before.routes) == before
    # more than the pods send is no limit, and what was limited is not limited again
    assert want(first(4), facts=replace(FACTS, path_mtus={"web2": 8000})) == before == want(first(4))


@pytest.mark.parametrize(("asked", "given"), [(1400, 1400), (1462, 1462), (1463, 1462), (9000, 1462)])
def test_the_mesh_can_lower_the_mtu_and_not_raise_it(asked: Any, given: Any) -> None:
    found, problems = dataplane(first(2, mtu=asked), "web1", FACTS)
    assert {link.mtu for link in found.links.values()} == {given}
    assert found.bridges[OBR].mtu_request == given
    assert {route.mtu for route in found.routes.values() if route.type == "unicast"} == {given}
    assert [(p.reason, p.field, p.value, p.fatal) for p in problems] == (
        [("MTUTooHigh", "mtu", str(asked), False)] if asked > given else []
    )


def test_mtu_problem_is_readable_when_the_underlay_is_not_known() -> None:
    _, problems = dataplane(first(2, mtu=9000), "web1", Facts())
    assert not [str(p) for p in problems if "None" in str(p)]


@pytest.mark.parametrize(("underlay", "reasons"), [(1318, []), (1317, ["MTUTooLow"])])
def test_ipv6_needs_1280_bytes(underlay: Any, reasons: Any) -> None:
    _, problems = dataplane(first(2), "web1", Facts(underlay_mtu=underlay))
    assert [p.reason for p in problems] == reasons
    if problems:
        assert str(problems[0]) == (
            "node web1: mtu 1279: is below the 1280 bytes that IPv6 needs; raise the underlay's MTU by 1"
        )


def test_ipv4_alone_lives_with_less() -> None:
    mesh = mesh_of(*(replace(numbered(n), pod_cidrs=numbered(n).pod_cidrs[:1]) for n in (1, 2)))
    assert dataplane(mesh, "web1", Facts(underlay_mtu=600))[1] == ()


# the whole


def test_golden_dual_stack() -> None:
    golden("dataplane-dual-stack.txt", shown(want(first(3, key=7))))


def test_a_peer_brings_these_parts_and_nothing_else_grows() -> None:
    one, two = want(first(1)), want(first(2))
    brought = {
        kind: len(getattr(two, kind)) - len(getattr(one, kind))
        for kind in two.__dataclass_fields__
        if getattr(two, kind) != getattr(one, kind)
    }
    assert brought == {"filter_peers": 3, "ports": 1, "flows": 4, "neighbours": 2, "fdb": 1, "routes": 2}
    assert brought.keys() == set(PEER_KINDS)


def test_uid_and_full_name_travel_with_the_port() -> None:
    peer = node("rack1.dc1.example.org", "192.0.2.99", "10.97.99.0/24", uid="8f0c")
    port = want(mesh_of(numbered(1), peer)).ports[port_name(peer.name, "gre")]
    assert (port.node, port.uid) == ("rack1.dc1.example.org", "8f0c")


@pytest.mark.parametrize("encapsulation", ["gre", "vxlan", "geneve"])
def test_ports_are_of_the_meshs_encapsulation_and_protected(encapsulation: Any) -> None:
    ports = want(first(3, encapsulation=encapsulation)).ports
    assert [(p.type, p.protected) for p in ports.values()] == [(encapsulation, True)] * 2


def test_a_mesh_of_one_has_no_peer_parts() -> None:
    alone = want(first(1))
    assert not (alone.ports or alone.neighbours or alone.fdb or alone.filter_peers)
    assert not any("in_port" in key for key in alone.flows)
    assert set(alone.routes) == {("10.97.0.0/16", FALLBACK_METRIC), ("fd00:97::/32", FALLBACK_METRIC)}


def test_datapath_type_is_the_hosts() -> None:
    assert want(first(2), facts=replace(FACTS, datapath_type="netdev")).bridges[OBR].datapath_type == "netdev"


# what can't be joined


def test_another_address_family_is_refused_by_name_and_the_rest_converges() -> None:
    other = node("web3", "2001:db8::3", "10.97.3.0/24")
    found, problems = dataplane(mesh_of(numbered(1), numbered(2), other), "web1", FACTS)
    assert set(found.ports) == {"gre-web2"}
    assert "web3" not in shown(found) and "10.97.3." not in shown(found)
    assert [(p.reason, p.node, p.field, p.value) for p in problems] == [
        ("AddressFamilyMismatch", "web3", "address", "2001:db8::3")
    ]


def test_a_whole_mesh_on_ipv6_addresses() -> None:
    nodes = [replace(numbered(n), address=node("x", f"2001:db8::{n}", "10.0.0.0/8").address) for n in (1, 2)]
    found, problems = dataplane(mesh_of(*nodes), "web1", FACTS)
    assert problems == ()
    assert found.ports["gre-web2"][1:3] == ("2001:db8::2", "2001:db8::1")
    assert found.filter_peers == {"2001:db8::2": "peers6", "10.97.2.0/24": "ranges4", "fd00:97:2::/64": "ranges6"}
    assert "100 dl_dst=0a:58:0a:61:01:01,in_port=gre-web2,ipv6,ipv6_src=2001:db8::2" in found.flows
    assert {link.mtu for link in found.links.values()} == {1500 - 58}


def test_two_peers_with_one_derived_port_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.dataplane.desired.port_name", lambda name, _: "gre-same")
    # peers of their own: what was computed for others is kept by name
    peers = [replace(numbered(n), name=f"derived{n}") for n in (2, 3)]
    found, problems = dataplane(mesh_of(numbered(1), *peers), "web1", FACTS)
    assert [p.node for p in found.ports.values()] == ["derived2"]
    assert set(found.neighbours.values()) == {mac(peers[0])}
    assert [(p.reason, p.node) for p in problems] == [("DerivedNameConflict", "derived3")]
    assert "derived2" in problems[0].message and "gre-same" in problems[0].message


def test_a_peer_with_selfs_derived_mac_is_refused() -> None:
    # not to be had by IPv4, whose ranges don't overlap, but a hash may meet
    twin = replace(numbered(2), name="twin", pod_cidrs=numbered(1).pod_cidrs)
    found, problems = dataplane(mesh_of(numbered(1), twin), "web1", FACTS)
    assert not found.ports
    assert [(p.reason, p.node) for p in problems] == [("DerivedNameConflict", "twin")]
    assert "web1" in problems[0].message


def test_self_not_in_the_mesh() -> None:
    with pytest.raises(OvsmeshError, match=r"node web9 is not in the mesh \(nodes there: web1, web2\)"):
        dataplane(first(2), "web9", FACTS)


def test_tunnel_address_on_no_link_is_said() -> None:
    _, problems = dataplane(first(2), "web1", Facts(tunnel_address=False))
    assert [(p.reason, p.node, p.value, p.fatal) for p in problems] == [
        ("TunnelAddressMissing", "web1", "192.0.2.11", True)
    ]


# sysctls and IPv6


V4 = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/kbr0/forwarding": "1",
    "net/ipv4/conf/kbr0/arp_ignore": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/kbr0/send_redirects": "0",
    "net/ipv4/conf/kbr0/rp_filter": "2",
    "net/ipv4/conf/kbr0/accept_redirects": "0",
}
QUIET_V6 = {"net/ipv6/conf/kbr0/accept_ra": "0", "net/ipv6/conf/kbr0/accept_redirects": "0"}
FULL_V6 = {
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/kbr0/forwarding": "1",
    "net/ipv6/conf/kbr0/disable_ipv6": "0",
    "net/ipv6/conf/kbr0/accept_dad": "0",
    "net/ipv6/conf/kbr0/addr_gen_mode": "0",
    **QUIET_V6,
}
V4_ALONE = node("web1", "192.0.2.11", "10.97.1.0/24")


@pytest.mark.parametrize(
    ("me", "facts", "sysctls"),
    [
        (numbered(1), FACTS, V4 | FULL_V6),
        (
            numbered(1),
            replace(FACTS, ra_links=("eth0", "eth1")),
            V4 | FULL_V6 | {f"net/ipv6/conf/eth{n}/accept_ra": "2" for n in (0, 1)},
        ),
        # a pod could send the host a router even where the mesh has no IPv6
        (V4_ALONE, FACTS, V4 | QUIET_V6),
        # this host is not made an IPv6 router, so its routes from advertisements are in no danger
        (V4_ALONE, replace(FACTS, ra_links=("eth0",)), V4 | QUIET_V6),
        (V4_ALONE, replace(FACTS, ipv6=False), V4),
    ],
)
def test_sysctls(me: Any, facts: Any, sysctls: Any) -> None:
    assert want(mesh_of(me, numbered(2)), facts=facts).sysctls == sysctls


def test_the_order_of_sysctls_survives_the_kernels_side_effects() -> None:
    keys = list(want(first(2), facts=replace(FACTS, ra_links=("eth0",))).sysctls)
    # turning forwarding on resets send_redirects and ends what a router may accept
    assert keys.index("net/ipv4/ip_forward") < keys.index("net/ipv4/conf/all/send_redirects")
    assert keys.index("net/ipv4/ip_forward") < keys.index("net/ipv4/conf/kbr0/forwarding")
    assert keys.index("net/ipv6/conf/all/forwarding") < keys.index("net/ipv6/conf/kbr0/forwarding")
    assert keys.index("net/ipv6/conf/eth0/accept_ra") < keys.index("net/ipv6/conf/all/forwarding")


def test_pods_with_ipv6_on_a_kernel_without() -> None:
    found, problems = dataplane(first(2), "web1", replace(FACTS, ipv6=False))
    assert [(p.reason, p.node, p.value) for p in problems] == [("IPv6Missing", "web1", "fd00:97:1::/64")]
    assert found.addresses == {"10.97.1.1/24": KBR}
    assert not [key for key in found.sysctls if "ipv6" in key]


def test_nothing_that_needs_ipv6_where_the_kernel_has_none() -> None:
    me = node("web1", "192.0.2.11", "10.97.1.0/24")
    found = want(mesh_of(me, numbered(2)), facts=replace(FACTS, ipv6=False))
    assert not [key for key in (*found.addresses, *found.neighbours, *(r[0] for r in found.routes)) if ":" in key]


# a kernel whose packet filter can't do everything


def test_what_the_packet_filter_does_not_have_is_not_wanted() -> None:
    everything = want(first(2))
    assert {tool for tool, _, _ in everything.rules} == {"inet", "bridge"} and everything.filter_peers
    less = want(first(2), facts=replace(FACTS, firewall_missing=("bridge", "inet postrouting")))
    assert {key[:2] for key in less.rules} == {("inet", "input"), ("inet", "forward")}
    assert less.filter_peers == {e: where for e, where in everything.filter_peers.items() if where == "peers4"}
    nothing = want(first(2), facts=replace(FACTS, firewall_missing=("nft",)))
    assert not nothing.rules and not nothing.filter_peers
    assert replace(nothing, rules=everything.rules, filter_peers=everything.filter_peers) == everything


# peers are computed once


def test_what_is_remembered_of_a_peer_never_outlives_it() -> None:
    before = want(first(2))
    for other in (
        node("web2", "192.0.2.99", "10.97.2.0/24"),
        node("web2", "192.0.2.12", "10.97.7.0/24"),
        node("web2", "192.0.2.12", "10.97.2.0/24", uid="new"),
    ):
        changed = want(mesh_of(numbered(1), other))
        assert changed != before
        assert changed.ports["gre-web2"].remote == str(other.address)
        assert {key for key, _ in changed.routes} >= {str(c) for c in other.pod_cidrs}
        assert want(first(2)) == before
    assert want(first(2, key=9)).ports["gre-web2"].key == "9"
    assert want(first(2, encapsulation="vxlan")).ports.keys() == {"vx-web2"}


def test_a_cluster_cidr_that_holds_the_api_servers_clusterip_leaves_services_reachable() -> None:
    mesh = replace(first(3), cluster_cidrs=(ip_network("10.0.0.0/8"), ip_network("fd00:97::/32")))
    for service, ranges, named in (
        ("10.96.0.1", ["10.97.1.0/24", "10.97.2.0/23", "fd00:97::/32"], ["ServiceRangeCovered"]),
        ("192.0.2.1", ["10.0.0.0/8", "fd00:97::/32"], []),
        ("kubernetes.default", ["10.0.0.0/8", "fd00:97::/32"], []),
        ("", ["10.0.0.0/8", "fd00:97::/32"], []),
    ):
        found, problems = dataplane(mesh, "web1", replace(FACTS, service=service))
        unreachable = [key[0] for key, route in found.routes.items() if route.type == "unreachable"]
        assert unreachable == ranges
        assert [p.reason for p in problems] == named and not any(p.fatal for p in problems)
