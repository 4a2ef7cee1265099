"""A rule, a route or an IPsec policy that takes packets elsewhere is named with the command that ends it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, live

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def two(module_lab: Make) -> Lab:
    made = module_lab(2, 1, dual_stack=True)
    at_rest(made)
    one = made.host(1)
    # where another program would take the packets
    one.run(["ip", "link", "add", "tailscale0", "type", "veth", "peer", "name", "away"])
    for link in ("tailscale0", "away"):
        one.run(["ip", "link", "set", link, "up"])
    return made


class Way(NamedTuple):
    """What another program does, how it is undone, what must be named, and whether the remedy is a command."""

    does: tuple[str, ...]
    undoes: tuple[str, ...]
    words: tuple[str, ...]
    remedied: bool = True


WAYS = {
    "a table for all, as Tailscale's": Way(
        ("ip route add 10.97.0.0/16 dev tailscale0 table 52", "ip rule add pref 5270 lookup 52"),
        ("ip rule del pref 5270", "ip route flush table 52"),
        ("pods and this host itself", "h2", "tailscale0", "rule 5270", "table 52", "10.97.0.0/16"),
    ),
    "the same in IPv6": Way(
        ("ip -6 route add fd00:97::/32 dev tailscale0 table 52", "ip -6 rule add pref 5270 lookup 52"),
        ("ip -6 rule del pref 5270", "ip -6 route flush table 52"),
        ("pods and this host itself", "tailscale0", "rule 5270", "table 52", "fd00:97::/32", "ip -6 rule add"),
    ),
    "a default route in a table, as wg-quick's": Way(
        ("ip route add default dev tailscale0 table 51820", "ip rule add not fwmark 51820 table 51820 pref 32000"),
        ("ip rule del pref 32000", "ip route flush table 51820"),
        ("tailscale0", "rule 32000", "table 51820"),
    ),
    "a rule about the pods' addresses": Way(
        ("ip route add 10.97.2.0/24 dev tailscale0 table 77", "ip rule add from 10.97.1.0/24 lookup 77 pref 90"),
        ("ip rule del pref 90", "ip route flush table 77"),
        ("packets of pods to", "tailscale0", "rule 90 (`ip rule`: from 10.97.1.0/24 lookup 77)"),
    ),
    "a rule about what enters kbr0": Way(
        ("ip rule add iif kbr0 to 10.97.0.0/16 prohibit pref 91",),
        ("ip rule del pref 91",),
        ("packets of pods to", "nowhere", "rule 91"),
    ),
    "a rule about the host's own packets": Way(
        ("ip route add 10.97.2.0/24 dev tailscale0 table 78", "ip rule add iif lo lookup 78 pref 92"),
        ("ip rule del pref 92", "ip route flush table 78"),
        ("packets of this host itself to", "tailscale0", "rule 92"),
    ),
    "a blackhole": Way(
        ("ip rule add to 10.97.2.0/24 blackhole pref 93",), ("ip rule del pref 93",), ("nowhere", "rule 93")
    ),
    "a narrower route": Way(
        ("ip route add 10.97.2.128/25 dev tailscale0",),
        ("ip route del 10.97.2.128/25",),
        ("tailscale0", "table main has 10.97.2.128/25", "ip route del 10.97.2.128/25"),
    ),
    "a narrower route in IPv6": Way(
        ("ip -6 route add fd00:97:2::7/128 dev tailscale0",),
        ("ip -6 route del fd00:97:2::7/128",),
        ("tailscale0", "table main has fd00:97:2::7/128", "ip -6 route del fd00:97:2::7/128"),
    ),
    "a route of the same range that is preferred": Way(
        ("ip route add 10.97.2.0/24 dev tailscale0 metric 5",),
        ("ip route del 10.97.2.0/24 metric 5",),
        ("tailscale0", "10.97.2.0/24"),
        False,
    ),
    "a rule about a mark that pods' packets get": Way(
        (
            "nft add table inet marks",
            "nft 'add chain inet marks p { type filter hook prerouting priority mangle; }'",
            "nft add rule inet marks p iifname kbr0 meta mark set 0x7",
            "ip route add 10.97.0.0/16 dev tailscale0 table 77",
            "ip rule add fwmark 0x7 lookup 77 pref 94",
        ),
        ("ip rule del pref 94", "ip route flush table 77", "nft delete table inet marks"),
        ("tailscale0", "with the mark 0x7 that a rule here sets", "rule 94"),
    ),
    "IPsec that blocks": Way(
        ("ip xfrm policy add src 10.97.0.0/16 dst 10.97.2.0/24 dir out action block",),
        ("ip xfrm policy flush",),
        ("nowhere", "src 10.97.0.0/16 dst 10.97.2.0/24 dir out", "ip xfrm policy delete"),
    ),
}


def told(host: Host) -> list[str]:
    problems: list[dict[str, Any]] = live(host).get("problems", [])
    return [problem["message"] for problem in problems if problem["reason"] == "RoutedElsewhere"]


def states(host: Host) -> set[str]:
    return {peer["state"] for peer in live(host).get("peers", ())}


@pytest.fixture
def well(two: Lab) -> Iterator[Host]:
    one = two.host(1)
    wait_for("all to be well", lambda: states(one) == {"ok"} and not told(one), SOON)
    yield one
    wait_for("all to be well again", lambda: states(one) == {"ok"} and not told(one), SOON)


@pytest.mark.parametrize("name", WAYS)
def test_what_takes_packets_elsewhere_is_named_with_its_remedy(well: Host, name: str) -> None:
    way, remedy = WAYS[name], ""
    for command in way.does:
        well.run(shlex.split(command))
    try:
        if name.startswith(("IPsec", "a rule about a mark")):
            # nothing announces a policy, and only packets have marks
            done = well.ovsmesh("check", "-o", "json", timeout=120)
            said = [p["message"] for p in json.loads(done.stdout)["problems"] if p["reason"] == "RoutedElsewhere"]
            assert done.returncode == 2, done.stdout
        else:
            wait_for("it to be named", lambda: told(well), SOON)
            said = told(well)
            done = well.ovsmesh("status")
            assert done.returncode == 2 and said[0] in done.stdout, done.stdout
        assert all(word in said[0] for word in way.words), said
        assert "GRE" not in said[0]
        remedy = said[0].rpartition(": ")[2]
        if way.remedied and not name.startswith(("IPsec", "a rule about a mark")):
            well.run(shlex.split(remedy))
            wait_for("the remedy to work", lambda: not told(well) and states(well) == {"ok"}, SOON)
    finally:
        if " rule add " in remedy:
            well.run(shlex.split(remedy.replace(" add ", " del ")), check=False)
        for command in way.undoes:
            well.run(shlex.split(command), check=False)


def test_rules_that_change_nothing_are_not_called_a_fault(well: Host) -> None:
    """wg-quick's first rule, a table with the same route, a rule about another mark, IPsec between the hosts."""
    harmless = [
        "ip rule add pref 94 lookup main suppress_prefixlength 0",
        "ip route add 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink table 79",
        "ip rule add pref 95 to 10.97.2.0/24 lookup 79",
        "ip rule add pref 96 fwmark 0x80000/0xff0000 unreachable",
        "ip xfrm policy add src 198.51.100.0/24 dst 203.0.113.0/24 dir out action block",
    ]
    for command in harmless:
        well.run(shlex.split(command))
    try:
        done = well.ovsmesh("check", timeout=120)
        assert done.returncode == 0, done.stdout
    finally:
        for command in ("ip rule del pref 94", "ip rule del pref 95", "ip rule del pref 96"):
            well.run(shlex.split(command))
        well.run(["ip", "route", "flush", "table", "79"])
        well.run(["ip", "xfrm", "policy", "flush"])


@pytest.mark.parametrize(("second", "target"), [("203.0.113.7/24", "10.97.2.2"), ("2001:db8:7::7/64", "fd00:97:2::2")])
def test_a_second_links_address_is_named_as_the_source_that_peers_refuse(well: Host, second: str, target: str) -> None:
    address = second.partition("/")[0]
    well.run(["ip", "addr", "add", second, "dev", "tailscale0", *(["nodad"] if ":" in second else [])])
    try:
        done = well.ovsmesh("trace", "-o", "json", address, target, timeout=120)
        found = json.loads(done.stdout)
        assert done.returncode == 2 and "hop 1, source" in found["headline"], found["headline"]
        assert address in found["headline"] and "tailscale0" in found["headline"], found["headline"]
        gateway = "fd00:97:1::1" if ":" in second else "10.97.1.1"
        assert gateway in found["todo"], found["todo"]
        remedy = shlex.split(found["todo"].rpartition("on the way: ")[2])
        well.run(remedy)
        try:
            assert well.run(["ping", "-c", "1", "-W", "3", "-I", address, target], check=False).returncode == 0
            assert well.ovsmesh("trace", address, target, timeout=120).returncode == 0
        finally:
            well.run([word if word != "-A" else "-D" for word in remedy])
        # without an address of its own the host is answered
        assert well.run(["ping", "-c", "1", "-W", "3", target], check=False).returncode == 0
    finally:
        well.run(["ip", "addr", "del", second, "dev", "tailscale0"])
