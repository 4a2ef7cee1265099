"""The desired filter rules, as text."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ovsmesh.dataplane.firewall_rules import CHAINS, digest, peer_set, rules, supported
from ovsmesh.dataplane.types import Facts
from ovsmesh.mesh.types import Mesh, Node

ME = Node("web1", ip_address("192.0.2.11"), (ip_network("10.97.1.0/24"), ip_network("fd00:97:1::/64")))
MESH = Mesh((ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")), (ME,))


def shown(found: Any) -> Any:
    return [f"{' '.join(key)}: {rule.text}" for key, rule in found.items()]


GRE = (
    ("", "@th,0,32 & 0x2000ffff == 0x00006558 meta l4proto gre"),
    ("-2", "@th,0,64 & 0xa000ffffffffffff == 0x2000655800000000 meta l4proto gre"),
    ("-3", "@th,0,96 & 0xa000ffff00000000ffffffff == 0xa00065580000000000000000 meta l4proto gre"),
)


def test_golden_dual_stack() -> None:
    enters = 'meta ibrname "kbr0" iifname != "obr0"'
    assert shown(rules(MESH, ME, Facts())) == [
        "inet postrouting masquerade-v4: ip saddr { 10.97.1.0/24 } "
        'ip daddr != { 10.97.0.0/16, 224.0.0.0/4, 255.255.255.255 } oifname != "kbr0" masquerade fully-random',
        "inet postrouting masquerade-v6: ip6 saddr { fd00:97:1::/64 } "
        'ip6 daddr != { fd00:97::/32, ff00::/8 } oifname != "kbr0" masquerade fully-random',
        *(
            line
            for more, form in GRE
            for line in (
                f'inet input tunnel-from-pod{more}: iifname "kbr0" ip daddr 192.0.2.11 {form} drop',
                f"inet input tunnel-not-peer{more}: ip daddr 192.0.2.11 {form} ip saddr != @peers4 drop",
            )
        ),
        *(f'inet forward tunnel-from-pod{more}: iifname "kbr0" ip daddr @peers4 {form} drop' for more, form in GRE),
        f"bridge prerouting spoof-range-v4: {enters} ip saddr {{ 10.97.0.0/16 }} ip saddr != {{ 10.97.1.0/24 }} drop",
        f"bridge prerouting spoof-gateway-v4: {enters} ip saddr {{ 10.97.1.1 }} drop",
        f"bridge prerouting spoof-tunnel-v4: {enters} ip saddr 192.0.2.11 drop",
        f"bridge prerouting spoof-peer-v4: {enters} ip saddr @peers4 drop",
        f"bridge prerouting spoof-range-arp: {enters} "
        "arp saddr ip { 10.97.0.0/16 } arp saddr ip != { 10.97.1.0/24 } drop",
        f"bridge prerouting spoof-gateway-arp: {enters} arp saddr ip {{ 10.97.1.1 }} drop",
        f"bridge prerouting spoof-tunnel-arp: {enters} arp saddr ip 192.0.2.11 drop",
        f"bridge prerouting spoof-peer-arp: {enters} arp saddr ip @peers4 drop",
        f"bridge prerouting spoof-range-v6: {enters} "
        "ip6 saddr { fd00:97::/32 } ip6 saddr != { fd00:97:1::/64 } drop",
        f"bridge prerouting spoof-gateway-v6: {enters} ip6 saddr {{ fd00:97:1::1 }} drop",
        f"bridge prerouting spoof-gateway-nd: {enters} "
        "icmpv6 type nd-neighbor-advert @th,64,128 0xfd000097000100000000000000000001 drop",
        f"bridge prerouting spoof-nested-tag: {enters} meta protocol {{ 0x8100, 0x88a8 }} @nh,0,16 & 0x0fff == 0 drop",
    ]


def test_golden_docker() -> None:
    found = rules(MESH, ME, Facts(forward_drop=("iptables",), exits=("eth0", "wg0")))
    assert [line for line in shown(found) if line.startswith("ip")] == [
        "iptables FORWARD mesh-out: -i kbr0 -o kbr0 -s 10.97.1.0/24 -d 10.97.0.0/16 -j ACCEPT",
        "iptables FORWARD mesh-in: -i kbr0 -o kbr0 -d 10.97.1.0/24 -j ACCEPT",
        "iptables FORWARD leave: -i kbr0 -o eth0 -s 10.97.1.0/24 -j ACCEPT",
        "iptables FORWARD leave-by-2: -i kbr0 -o wg0 -s 10.97.1.0/24 -j ACCEPT",
        "iptables FORWARD return: -o kbr0 -d 10.97.1.0/24 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "iptables FORWARD mesh-probe: -i kbr0 -o kbr0 -s 10.97.0.0/16 -d 10.97.0.0/16"
        " -p icmp -m icmp --icmp-type 8 -j ACCEPT",
    ]


def test_no_ipv6_in_the_kernel_no_ipv6_rules() -> None:
    assert not [
        line for line in shown(rules(MESH, ME, Facts(ipv6=False, forward_drop=("ip6tables",)))) if "ip6" in line
    ]


@pytest.mark.parametrize(
    ("encapsulation", "key", "match"),
    [
        ("gre", None, GRE[0][1]),
        ("gre", 7, "@th,0,64 & 0xa000ffffffffffff == 0x2000655800000007 meta l4proto gre"),
        ("vxlan", 7, "udp dport 4789 @th,96,24 7"),
        ("vxlan", None, "udp dport 4789 @th,96,24 0"),
        ("geneve", 9, "udp dport 6081 @th,96,24 9"),
    ],
)
def test_encapsulations(encapsulation: Any, key: Any, match: Any) -> None:
    found = rules(replace(MESH, encapsulation=encapsulation, key=key), ME, Facts())
    assert found["inet", "input", "tunnel-not-peer"].text == f"ip daddr 192.0.2.11 {match} ip saddr != @peers4 drop"


def test_ipv6_underlay_uses_its_own_set() -> None:
    me = replace(ME, address=ip_address("2001:db8::11"))
    found = rules(MESH, me, Facts())
    assert peer_set(me) == ("2001:db8::11", "peers6")
    assert found["inet", "input", "tunnel-not-peer"].text.endswith("ip6 saddr != @peers6 drop")
    assert ("bridge", "prerouting", "spoof-tunnel-v6") in found
    assert ("bridge", "prerouting", "spoof-tunnel-v4") not in found


def test_overlapping_ranges_are_merged() -> None:
    mesh = replace(MESH, cluster_cidrs=(ip_network("10.97.1.0/24"), ip_network("10.96.0.0/15")))
    text = rules(mesh, ME, Facts())["inet", "postrouting", "masquerade-v4"].text
    assert "ip daddr != { 10.96.0.0/15, 224.0.0.0/4, 255.255.255.255 }" in text


def test_several_ranges_have_names_of_their_own() -> None:
    me = replace(ME, pod_cidrs=(ip_network("10.97.1.0/24"), ip_network("10.98.1.0/24")))
    mesh = replace(MESH, cluster_cidrs=(ip_network("10.97.0.0/16"), ip_network("10.98.0.0/16")))
    names = [
        key[2] for key in rules(mesh, me, Facts(forward_drop=("iptables",), exits=("eth0",))) if key[0] == "iptables"
    ]
    assert names == [
        *("mesh-out", "mesh-out-to-2", "mesh-in", "leave", "return"),
        *("mesh-out-2", "mesh-out-2-to-2", "mesh-in-2", "leave-2", "return-2"),
        *("mesh-probe", "mesh-probe-2"),
    ]


def test_names_fit_a_comment_and_chains_are_known() -> None:
    for key in rules(MESH, ME, Facts(forward_drop=("iptables", "ip6tables"))):
        assert key[0].endswith("tables") or key[:2] in CHAINS
        assert len(key[2]) < 60 and key[2].replace("-", "").isalnum()


def test_digest_covers_chain_and_text() -> None:
    found = rules(MESH, ME, Facts())
    assert len({digest(key, rule) for key, rule in found.items()}) == len(found)
    (key, rule) = next(iter(found.items()))
    assert digest(key, rule) != digest(key, rule._replace(text=f"{rule.text} "))
    assert digest(("inet", "input", key[2]), rule) != digest(key, rule)


def test_what_the_packet_filter_does_not_support_is_left_out() -> None:
    found = rules(MESH, ME, Facts(forward_drop=("iptables",)))
    assert supported(found, ()) == found
    assert {key[0] for key in supported(found, ["nft"])} == {"iptables"}
    assert {key[0] for key in supported(found, ["bridge", "iptables"])} == {"inet"}
    assert {key[1] for key in supported(found, ["inet postrouting", "bridge", "iptables"])} == {"input", "forward"}


def test_without_the_bridge_name_the_rules_match_veth_ports() -> None:
    found = [line for line in shown(supported(rules(MESH, ME, Facts()), ["ibrname"])) if line.startswith("bridge")]
    assert len(found) == 8 and all('meta iifkind "veth" iifname != "obr0"' in line for line in found)
    assert not any("peers" in line or "192.0.2" in line for line in found)
