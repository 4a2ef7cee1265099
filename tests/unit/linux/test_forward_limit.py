"""A host that forwards because of the agent alone forwards the mesh's packets, and what others open, nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ovsmesh.dataplane.nft_syntax import Table, filters_only_ipv4, parse_iptables
from ovsmesh.dataplane.types import Facts
from ovsmesh.linux.firewall import Firewall
from tests.support.firewallkit import converge, desired, inside, needs_nft, needs_root, nft, sh

pytestmark = [pytest.mark.root, needs_root, needs_nft]
BEHIND = {"lan": "198.51.100", "box": "172.20.0", "pod": "10.97.1"}
"""Who is behind a link of the host → where: a neighbour, a container of others, a pod."""
LINKS = {"lan": "eth0", "box": "br0", "pod": "kbr0"}


@pytest.fixture
def host(namespaces: Any) -> Iterator[Any]:
    """A host with a neighbour, a container on another bridge and a pod; it forwards."""
    (name,) = namespaces("h")
    namespaces(*BEHIND)
    prefix = f"fw{os.getpid()}"
    with inside(name):
        sh("ip link add kbr0 type bridge", "ip link add br0 type bridge", "sysctl -qw net.ipv4.ip_forward=1")
        for who, net in BEHIND.items():
            link = LINKS[who] if who == "lan" else f"v{who}"
            sh(f"ip link add {link} type veth peer name eth0 netns {prefix}{who}", f"ip link set {link} up")
            if who != "lan":
                sh(f"ip link set {link} master {LINKS[who]}", f"ip link set {LINKS[who]} up")
            sh(f"ip addr add {net}.1/24 dev {LINKS[who]}", f"ip -n {prefix}{who} addr add {net}.2/24 dev eth0")
            sh(f"ip -n {prefix}{who} link set eth0 up", f"ip -n {prefix}{who} route add default via {net}.1")
        firewall = Firewall()
        yield firewall
        firewall.close()


def reaches(who: str, address: str) -> bool:
    argv = ["ip", "netns", "exec", f"fw{os.getpid()}{who}", "ping", "-c1", "-W1", address]
    return subprocess.run(argv, capture_output=True, timeout=20).returncode == 0


def pairs(*wanted: str) -> None:
    """Exactly these of all ordered pairs reach each other."""
    every = [(a, b) for a in BEHIND for b in BEHIND if a != b]
    assert {f"{a} {b}" for a, b in every if reaches(a, f"{BEHIND[b]}.2")} == set(wanted)


def limited(firewall: Any) -> None:
    firewall.resync()
    firewall.forward_drop()
    facts = Facts(forward_limited=(4,), exits=("eth0",), bridges=("br0",), forward_nft=firewall.forward_nft)
    want = desired(facts=replace(facts, forward_drop=firewall.forward_drop()))
    converge(firewall, want)
    assert not converge(firewall, want)


EITHER = pytest.mark.parametrize("used", [True, False], ids=["iptables", "nft"])
"""Whether somebody uses FORWARD of iptables; else the rules stand in the managed nft table."""


@EITHER
def test_only_pods_go_out(host: Any, used: bool) -> None:
    if used:
        sh("iptables -A FORWARD -s 203.0.113.1 -j DROP")
    assert reaches("lan", f"{BEHIND['box']}.2"), "all is forwarded before"
    limited(host)
    pairs("pod lan")


def test_what_a_docker_that_comes_later_accepts_passes(host: Any) -> None:
    limited(host)
    sh("iptables -A FORWARD -i br0 ! -o br0 -j ACCEPT", "iptables -I FORWARD -s 198.51.100.2 -d 172.20.0.2 -j ACCEPT")
    limited(host)
    pairs("pod lan", "box lan", "box pod", "lan box")


@EITHER
def test_a_published_port_passes(host: Any, used: bool) -> None:
    if used:
        sh("iptables -A FORWARD -s 203.0.113.1 -j DROP")
    limited(host)
    assert not reaches("lan", f"{BEHIND['box']}.2")
    sh("iptables -t nat -A PREROUTING -d 198.51.100.1 -p icmp -j DNAT --to-destination 172.20.0.2")
    sh("ip netns exec " + f"fw{os.getpid()}box" + " sysctl -qw net.ipv4.icmp_echo_ignore_all=0")
    assert reaches("lan", "198.51.100.1")
    with inside(f"fw{os.getpid()}box"):
        sh("sysctl -qw net.ipv4.icmp_echo_ignore_all=1")
    assert not reaches("lan", "198.51.100.1"), "it was the container that answered"


def test_bridges_of_others_pass_where_an_nft_table_of_others_filters(host: Any) -> None:
    limited(host)
    nft("table inet libvirt { chain forward { type filter hook forward priority 0; accept; }; }")
    assert host.drain(), "it is heard"
    limited(host)
    pairs("pod lan", "box lan", "box pod")
    nft("delete table inet libvirt")
    assert host.drain()
    limited(host)
    pairs("pod lan")


@pytest.mark.parametrize(
    ("four", "six", "is_open"),
    [
        # Docker up to 26 without ip6tables, and 28 and later so
        (["-o br0 -j DOCKER", "-i br0 ! -o br0 -j ACCEPT"], [], True),
        (["-j DOCKER-FORWARD", "-A DOCKER-FORWARD -j DOCKER", "-A DOCKER -o br0 -j DOCKER-CT"], [], True),
        (["-i br+ -j ACCEPT"], [], True),
        # nobody forwards IPv4: its owner may want none at all
        ([], [], False),
        (["-i br1 -j ACCEPT", "-i b -j ACCEPT"], [], False),
        (["-i br0 -j DROP"], [], False),
        # the owner's own refusals in IPv6 say nothing of what Docker does
        (["-i br0 -j ACCEPT"], ["-i br0 -d fd00::9/128 -j DROP"], True),
        # with ip6tables, also before it has the bridge
        (["-i br0 -j ACCEPT"], ["-i br0 -j ACCEPT"], False),
        (["-o br0 -j DOCKER"], ["-j DOCKER"], False),
        # a rule about what comes in, not about what is forwarded
        (["-i br0 -j ACCEPT"], ["-A INPUT -i br0 -j ACCEPT"], True),
    ],
)
def test_whose_owner_forwards_ipv6_without_rules(four: list[str], six: list[str], is_open: bool) -> None:
    def table(rules: list[str]) -> Table:
        lines = [rule if rule.startswith("-A") else f"-A FORWARD {rule}" for rule in rules]
        chains = {word for line in lines for word in line.split() if word.startswith("DOCKER")}
        return parse_iptables("\n".join(["-P FORWARD ACCEPT", *(f"-N {chain}" for chain in sorted(chains)), *lines]))

    assert filters_only_ipv4(table(four), table(six), "br0") == is_open


def test_frames_within_a_bridge_that_is_the_way_out_are_not_meant(host: Any) -> None:
    facts = Facts(forward_drop=("iptables",), forward_limited=(4,), exits=("br0", "eth0"), bridges=("br0",))
    want = desired(facts=facts)
    texts = [rule.text for key, rule in want.rules.items() if key[2].startswith("only-mesh")]
    assert [text.partition(" -m ")[0] for text in texts] == ["-i kbr0 ! -o kbr0", "-i br0 ! -o br0", "-i eth0"]


def test_nothing_is_limited_where_others_had_forwarding_on(host: Any) -> None:
    converge(host, desired(facts=Facts(exits=("eth0",), bridges=("br0",))))
    assert reaches("lan", f"{BEHIND['box']}.2")
