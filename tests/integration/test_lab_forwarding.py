"""A peer that answers and forwards nothing to its pods is named; one whose setup is merely odd is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, drift, live

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    made = module_lab(3, 1, dual_stack=True)
    at_rest(made)
    return made


@contextmanager
def without_agent(host: Host) -> Iterator[None]:
    """Nobody repairs the host meanwhile."""
    host.stop_agent()
    try:
        yield
    finally:
        host.start_agent()


@contextmanager
def nft(host: Host, text: str) -> Iterator[None]:
    host.run(["nft", "-f", "-"], text=f"table inet odd {{ {text} }}\n")
    try:
        yield
    finally:
        host.run(["nft", "delete table inet odd"])


def states(host: Host) -> dict[str, str]:
    return {peer["name"]: peer["state"] for peer in live(host).get("peers", ())}


def all_ok(lab: Lab) -> None:
    wait_for("all peers to be ok", lambda: all(set(states(h).values()) == {"ok"} for h in lab.hosts), SOON)


def named(lab: Lab) -> None:
    """h1 says of h3, and only of h3, that it does not forward; so do `status`, `check` and its text."""
    one = lab.host(1)
    wait_for("h3 not to forward", lambda: states(one) == {"h2": "ok", "h3": "not forwarded"}, SOON)
    done = one.ovsmesh("status")
    assert done.returncode == 2 and "h3" in done.stdout.splitlines()[0], done.stdout
    assert "FORWARD" in done.stdout and "ip_forward" in done.stdout, done.stdout
    done = one.ovsmesh("check", "-o", "json", timeout=120)
    assert done.returncode == 2, done.stdout
    assert {p["name"]: p["state"] for p in json.loads(done.stdout)["peers"]} == {"h2": "ok", "h3": "not forwarded"}


def pods_reach(one: Host, other: Host) -> bool:
    target = str(other.pods[0].addresses[0])
    return one.pods[0].run(["ping", "-c", "1", "-W", "2", target], check=False).returncode == 0


def test_a_forward_policy_of_drop_is_named(three: Lab) -> None:
    all_ok(three)
    third = three.host(3)
    with without_agent(third):
        third.run(["iptables", "-P", "FORWARD", "DROP"])
        try:
            assert not pods_reach(three.host(1), third)
            named(three)
        finally:
            third.run(["iptables", "-P", "FORWARD", "ACCEPT"])
        wait_for("h3 to be ok again", lambda: states(three.host(1))["h3"] == "ok", SOON)
    all_ok(three)


def test_a_drop_in_another_table_is_named_though_the_agent_lives(three: Lab) -> None:
    all_ok(three)
    third = three.host(3)
    with nft(third, 'chain f { type filter hook forward priority 10; iifname "kbr0" drop; };'):
        named(three)
        assert not pods_reach(three.host(1), third)
    all_ok(three)


@pytest.mark.parametrize("sysctl", ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"])
def test_forwarding_that_is_switched_off_is_named_in_each_family(three: Lab, sysctl: str) -> None:
    all_ok(three)
    third = three.host(3)
    with without_agent(third):
        third.run(["sysctl", "-qw", f"{sysctl}=0"])
        named(three)
    all_ok(three)


def test_the_agents_rules_let_probes_through_where_they_let_pods_through(three: Lab) -> None:
    all_ok(three)
    third = three.host(3)
    tools = ("iptables", "ip6tables")
    for tool in tools:
        third.run([tool, "-P", "FORWARD", "DROP"])
    try:
        for tool in tools:
            accepted = lambda tool=tool: "mesh-probe" in third.run([tool, "-S", "FORWARD"]).stdout  # noqa: E731
            wait_for(f"the rules of {tool}", accepted, SOON)
        all_ok(three)
        sent = live(three.host(1))["peers"][1]["reach"]["sent"]
        wait_for("ten more probes", lambda: live(three.host(1))["peers"][1]["reach"]["sent"] > sent + 10, SOON)
        assert set(states(three.host(1)).values()) == {"ok"} and pods_reach(three.host(1), third)
    finally:
        for tool in tools:
            third.run([tool, "-P", "FORWARD", "ACCEPT"])
    all_ok(three)


@pytest.mark.parametrize("family", ["-4", "-6"])
@pytest.mark.parametrize("rule", ["blackhole", "table 999"])
def test_a_policy_rule_that_takes_pods_packets_elsewhere_is_named_here(three: Lab, family: str, rule: str) -> None:
    all_ok(three)
    one, third = three.host(1), three.host(3)
    cidr = str(third.pod_cidrs[family == "-6"])
    one.run(["ip", family, "route", "add", cidr, "dev", "lo", "table", "999"])
    one.run(["ip", family, "rule", "add", "pref", "100", "to", cidr, *rule.split()])
    try:
        bad = lambda: states(one)["h3"] in ("not forwarded", "unreachable") and states(one)["h2"] == "ok"  # noqa: E731
        wait_for("h3 not to be reached", bad, SOON)
        said = one.ovsmesh("status").stdout
        assert "ip rule" in said and ("to lo" in said or "nowhere" in said), said
    finally:
        one.run(["ip", family, "rule", "del", "pref", "100"])
        one.run(["ip", family, "route", "del", cidr, "dev", "lo", "table", "999"])
    all_ok(three)


ODD = {
    "strict rp_filter": ["net.ipv4.conf.all.rp_filter=1"],
    "log_martians": ["net.ipv4.conf.all.log_martians=1", "net.ipv4.conf.kbr0.log_martians=1"],
    "arp_ignore": ["net.ipv4.conf.all.arp_ignore=2", "net.ipv4.conf.all.arp_announce=2"],
    "accept_local": ["net.ipv4.conf.all.accept_local=1"],
    "no echo replies": ["net.ipv4.icmp_echo_ignore_all=1", "net.ipv6.icmp.echo_ignore_all=1"],
}


@pytest.mark.parametrize("odd", ODD)
def test_a_host_with_an_odd_setup_is_not_called_broken(three: Lab, odd: str) -> None:
    all_ok(three)
    third, names = three.host(3), [setting.partition("=")[0] for setting in ODD[odd]]
    before = third.run(["sysctl", *names]).stdout.replace(" ", "").split()
    third.run(["sysctl", "-qw", *ODD[odd]])
    try:
        counts = [peer["reach"]["sent"] for host in three.hosts for peer in live(host)["peers"]]

        def more() -> bool:
            now = [peer["reach"]["sent"] for host in three.hosts for peer in live(host)["peers"]]
            return all(b > a + 8 for a, b in zip(counts, now, strict=True))

        wait_for("eight more probes of each", more, SOON)
        assert all(set(states(host).values()) == {"ok"} for host in three.hosts)
        assert pods_reach(three.host(1), third)
    finally:
        third.run(["sysctl", "-qw", *before])


def test_what_comes_back_is_not_seen_by_the_host_and_makes_no_redirects(three: Lab) -> None:
    all_ok(three)
    one, rules = three.host(1), []
    for cidr, family in zip(one.pod_cidrs, ("ip", "ip6"), strict=True):
        rules.append(f"{family} saddr {cidr[1]} {family} daddr {cidr[1]} counter;")

    def errors() -> list[str]:
        # redirects and errors that the peers' kernels sent because of what they forward
        names = ["IcmpOutRedirects", "Icmp6OutRedirects", "IcmpOutDestUnreachs", "Icmp6OutDestUnreachs"]
        return [
            line.split()[1]
            for host in three.hosts
            for line in host.run(["nstat", "-asz", *names]).stdout.splitlines()[1:]
        ]

    before = errors()
    with nft(one, f"chain p {{ type filter hook prerouting priority -450; {' '.join(rules)} }};"):
        sent = live(one)["peers"][0]["reach"]["sent"]
        wait_for("twenty more probes", lambda: live(one)["peers"][0]["reach"]["sent"] > sent + 20, SOON)
        shown = one.run(["nft", "list table inet odd"]).stdout
    assert shown.count("packets 0 ") == 2, shown
    assert errors() == before and not any(drift(one).values())
