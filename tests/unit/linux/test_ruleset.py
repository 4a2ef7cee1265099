"""What of other programs' nft tables drops the mesh's packets: as real nft prints them, evaluated."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ovsmesh.linux.ruleset import Query, Ruleset, refusals
from tests.support.firewallkit import inside, needs_nft, needs_root, nft, sh
from tests.support.needs import needs

pytestmark = [pytest.mark.root, needs_root, needs_nft]

FIREWALLD = Path(__file__).parents[2] / "integration/rulesets/firewalld-1.3.nft"
QUERY = Query(
    (ip_network("10.97.1.0/24"), ip_network("fd00:97:1::/64")),
    (
        ("h2", ip_address("192.0.2.12"), (ip_network("10.97.2.0/24"), ip_network("fd00:97:2::/64"))),
        ("h3", ip_address("192.0.2.13"), (ip_network("10.97.3.0/24"),)),
    ),
    (ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")),
    ("gre", 0, "eth0", ip_address("192.0.2.11")),
)
FORWARD = "type filter hook forward priority 0; policy"
INPUT = "type filter hook input priority 0; policy drop;"


@pytest.fixture
@needs("root")
def space() -> Iterator[str]:
    name = f"ruleset{os.getpid()}"
    sh(f"ip netns add {name}")
    try:
        yield name
    finally:
        sh(f"ip netns del {name}")


def said(space: str, script: str, query: Query = QUERY) -> list[str]:
    with inside(space):
        nft(script)
        listed = subprocess.run(["nft", "-a", "-j", "list", "ruleset"], capture_output=True, text=True, check=True)
        return [problem.message for problem in refusals(query, Ruleset(listed.stdout))]


def chain(rules: str, policy: str = "drop", family: str = "inet", more: str = "") -> str:
    return f"table {family} t {{ {more} chain f {{ {FORWARD} {policy}; {rules} }}; }}"


CLOSED = {
    "policy": (chain(""), "all packets between pods here and those of h2, h3 are dropped by policy drop of chain f"),
    "policy and what is known": (chain("ct state established,related accept; ct state invalid drop;"), "policy drop"),
    "ip alone": (chain("", family="ip"), "table ip t"),
    "ip6 alone": (chain("", family="ip6"), "those of h2 are dropped"),
    "a closing drop": (chain("tcp dport 22 accept; counter drop;", "accept"), "`drop` in chain f"),
    "a closing reject": (chain("reject with icmpx type admin-prohibited;", "accept"), "`reject"),
    "one link to another only": (chain('iifname "eth0" oifname "kbr0" accept;'), "policy drop"),
    "another set of ranges": (
        chain(
            "ip saddr @s accept; meta nfproto ipv6 accept;",
            more="set s { type ipv4_addr; flags interval; elements = { 192.168.0.0/16 }; };",
        ),
        "policy drop",
    ),
    "all but one peer": (chain("ip daddr 10.97.3.0/24 accept; ip saddr 10.97.3.0/24 accept;"), "those of h2 are"),
    "one direction": (chain("ip saddr 10.97.1.0/24 accept; ip6 saddr fd00:97:1::/64 accept;"), "policy drop"),
    "pings pass": (chain("meta l4proto { icmp, ipv6-icmp } accept;"), "TCP and UDP packets"),
    "pings pass by type": (
        chain("icmp type echo-request accept; icmpv6 type echo-request accept;"),
        "TCP and UDP packets",
    ),
    "a jump and back": (chain("jump j; drop;", "accept", more="chain j { ip saddr 10.97.1.7 return; };"), "`drop`"),
    "goto ends at the policy": (chain("goto j; accept;", more="chain j { tcp dport 1 accept; };"), "policy drop"),
    "a verdict map": (
        chain("ct state vmap { established : accept, related : accept, invalid : drop };"),
        "policy drop",
    ),
    "a mark that drops first": (chain("meta mark 7 drop; drop;", "accept"), "in chain f"),
    "a limited log": (chain('limit rate 3/minute log prefix "x"; drop;', "accept"), "`drop`"),
    "a link of kbr0": (
        'table netdev t { chain i { type filter hook ingress device "lo" priority 0; policy drop; }; };'
        ' table inet t { chain p { type filter hook postrouting priority 0; oifname "kbr0" drop; }; }',
        "nft insert rule inet t p oifname kbr0 accept",
    ),
    "GRE that is refused": (
        f"table inet t {{ chain i {{ {INPUT} ct state related accept; tcp dport 22 accept; }}; }}",
        "tunnel packets from h2, h3 are dropped by policy drop of chain i, table inet t",
    ),
    "published ports alone, as beside netavark": (chain("ct status dnat accept;"), "policy drop of chain f"),
    "iptables' own raw table": (
        "table ip raw { chain PREROUTING { type filter hook prerouting priority -300; iifname kbr0 drop; }; }",
        "iptables -t raw -I PREROUTING -i kbr0 -j ACCEPT",
    ),
}
OPEN = {
    "nothing": "",
    "accept": chain("", "accept"),
    "links": chain('iifname "kbr0" oifname "kbr0" accept;'),
    "a wildcard": chain('iifname "kbr*" accept;'),
    "not another link": chain('iifname != "eth0" accept;'),
    "the cluster's ranges": chain("ip saddr 10.96.0.0-10.98.0.0 accept; ip6 saddr fd00:97::/32 accept;"),
    "each peer's": chain(
        "ip saddr 10.97.1.0/24 ip daddr { 10.97.2.0/24, 10.97.3.0/24 } accept; ip daddr 10.97.1.0/24 accept;"
        " meta nfproto ipv6 accept;"
    ),
    "a map": chain(
        "iifname vmap @m;",
        more='chain ok { accept; }; map m { type ifname : verdict; elements = { "kbr0" : jump ok }; };',
    ),
    "what can't be told: a mark": chain("meta mark 7 accept;"),
    "what can't be told: a rate": chain("limit rate 10/second accept;"),
    "what can't be told: fib": chain("fib daddr type unicast accept;"),
    "parts": chain("ip daddr 10.97.2.7 drop; tcp dport 25 drop; udp sport 53 reject; ct state invalid drop;", "accept"),
    "others' links": chain('iifname "docker0" drop; oifname "eth0" drop;', "accept"),
    "others' ranges": chain("ip saddr 172.17.0.0/16 drop; ip6 daddr 2001:db8::/32 drop;", "accept"),
    "the host's input": f"table inet t {{ chain i {{ {INPUT} ct state established,related accept; }}; }}",
    "GRE by name": f"table inet t {{ chain i {{ {INPUT} meta l4proto gre accept; }}; }}",
    "iptables' FORWARD, which is read by iptables": f"table ip filter {{ chain FORWARD {{ {FORWARD} drop; }}; }}",
    "an ovsmesh table": f"table inet ovsmesh {{ chain f {{ {FORWARD} drop; }}; }}",
    "NAT": "table inet t { chain n { type nat hook prerouting priority -100; drop; }; }",
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_drops_is_named(space: str, name: str) -> None:
    script, words = CLOSED[name]
    found = said(space, script)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize("name", OPEN)
def test_what_lets_packets_through_or_can_not_be_told_is_not_named(space: str, name: str) -> None:
    assert not said(space, OPEN[name])


@pytest.mark.parametrize(
    ("rules", "port", "closed"),
    [
        ("udp dport 4789 accept;", 4789, False),
        ("udp dport 4789 accept;", 6081, True),
        ("udp dport { 53, 4789 } accept;", 4789, False),
    ],
)
def test_the_port_of_a_tunnel_over_udp_counts(space: str, rules: str, port: int, closed: bool) -> None:
    query = QUERY._replace(tunnel=("udp", port, "eth0", ip_address("192.0.2.11")))
    found = said(space, f"table inet t {{ chain i {{ {INPUT} ct state established accept; {rules} }}; }}", query)
    assert bool(found) is closed
    assert not found or f"nft insert rule inet t i udp dport {port} accept" in found[0]


def test_a_real_firewalld_is_named_with_its_own_command(space: str) -> None:
    (found,) = said(space, FIREWALLD.read_text())
    assert "chain filter_FWD_public, table inet firewalld" in found
    assert "firewall-cmd --permanent --zone=trusted --add-interface=kbr0" in found


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nftables": [{"rule": {}}]}', '{"nftables": 7}'])
def test_output_that_is_not_nfts_says_nothing(text: str) -> None:
    assert not refusals(QUERY, Ruleset(text))


def test_thousands_of_rules_are_judged_as_far_as_half_a_second_goes() -> None:
    rule = {"rule": {"family": "inet", "table": "t", "chain": "f", "handle": 1, "expr": [{"counter": None}]}}
    chain = {"family": "inet", "table": "t", "name": "f", "type": "filter", "hook": "forward", "policy": "drop"}
    for many, named in ((100, True), (5000, True), (50_000, False)):
        ruleset = Ruleset(json.dumps({"nftables": [{"chain": chain}, *[rule] * many]}))
        assert bool(refusals(QUERY, ruleset)) is named
        assert ruleset.left >= -1000


def test_chains_in_a_circle_end(space: str) -> None:
    text = (
        '{"nftables": [{"chain": {"family": "inet", "table": "t", "name": "a", "type": "filter", "hook": "forward",'
        ' "policy": "drop"}}, {"rule": {"family": "inet", "table": "t", "chain": "a", "handle": 1,'
        ' "expr": [{"jump": {"target": "a"}}]}}]}'
    )
    assert not refusals(QUERY, Ruleset(text))
