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
    # the rules of the bridge table stand in golden/dataplane-dual-stack.txt
    assert [line for line in shown(rules(MESH, ME, Facts())) if line.startswith("inet")] == [
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
    ]


def test_what_pods_and_the_mesh_send_is_refused_unless_a_rule_accepts_it() -> None:
    for me in (ME, replace(ME, pod_cidrs=ME.pod_cidrs[:1]), replace(ME, pod_cidrs=ME.pod_cidrs[1:])):
        found = rules(MESH, me, Facts())
        pods = [rule.text for key, rule in found.items() if key[1] == "pods"]
        mesh = [rule.text for key, rule in found.items() if key[1] == "mesh"]
        assert {"meta protocol { ip, arp } drop", "meta protocol ip6 drop"} <= set(pods)
        assert mesh[-1] == "drop"
        accepted = " ".join(text for text in (*pods, *mesh) if text.endswith("accept"))
        assert ("10.97.1.0/24" in accepted) == (me.pod_cidrs[0].version == 4)
        assert ("fd00:97:1::/64" in accepted) == (me.pod_cidrs[-1].version == 6)


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
    found = [line for line in shown(rules(MESH, ME, Facts(ipv6=False, forward_drop=("ip6tables",)))) if "ip6" in line]
    assert found == ["bridge pods other-v6: meta protocol ip6 drop"]


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
    assert ("bridge", "mesh", "tunnel-v6") in found
    assert ("bridge", "mesh", "tunnel-v4") not in found


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


def test_without_the_bridge_name_the_rules_match_the_ports_that_are_told() -> None:
    full = rules(MESH, ME, Facts())
    found = supported(full, ["ibrname"])
    assert not any("ibrname" in rule.text for rule in found.values())
    gates = {key[2]: rule.text for key, rule in found.items() if key[1] == "prerouting"}
    assert gates == {
        "from-mesh": 'iifname "obr0" goto mesh',
        "from-pods": "iifname @pods goto pods",
        "to-gateway": 'meta iifkind "veth" ether daddr 0a:58:0a:61:01:01 goto pods',
        "from-veths": 'meta iifkind "veth" goto veths',
    }
    # of other bridges' ports, only addresses of the mesh are refused
    veths = [rule.text for key, rule in found.items() if key[1] == "veths" and key[2] != "tag"]
    assert len(veths) == 7 and all("10.97." in text or "fd00:97:" in text or "0xfd0000970001" in text for text in veths)
    assert {key: rule for key, rule in found.items() if key[1] != "prerouting"} == {
        key: rule for key, rule in full.items() if key[1] != "prerouting"
    }
