"""`ovsmesh trace` names the hop at which packets stop, for each fault, and no hop where nothing is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ovsmesh.lab import netns, underlay
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, difference, wiring

pytestmark = pytest.mark.lab

MAC1, MAC2 = "0a:58:0a:61:01:01", "0a:58:0a:61:02:01"
ADDRESSES = {4: ("10.97.1.2", "10.97.2.2"), 6: ("fd00:97:1::2", "fd00:97:2::2")}
GATEWAY, RANGE = {4: "10.97.2.1", 6: "fd00:97:2::1"}, {4: "10.97.2.0/24", 6: "fd00:97:2::/64"}
OWN_GATEWAY, OWN_RANGE = {4: "10.97.1.1", 6: "fd00:97:1::1"}, {4: "10.97.1.0/24", 6: "fd00:97:1::/64"}
IP = {4: "ip", 6: "ip6"}
TUNNEL = "ip protocol gre ip saddr 192.0.2.11 ip daddr 192.0.2.12"
TUNNEL_BACK = "ip protocol gre ip saddr 192.0.2.12 ip daddr 192.0.2.11"


@pytest.fixture(scope="module")
def mesh(module_lab: Make) -> Lab:
    made = module_lab(2, 2, dual_stack=True)
    at_rest(made)
    return made


def trace(host: Host, *ends: str) -> dict[str, Any]:
    done = host.ovsmesh("trace", "-o", "json", *ends, timeout=120)
    assert done.returncode in (0, 1, 2) and done.stdout, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == {"arrives": 0, "stops": 2, "degraded": 2, "unknown": 1}[found["state"]]
    return found


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {hop["name"]: hop["verdict"] for hop in found["hops"]}


def broken(found: dict[str, Any]) -> list[str]:
    return [hop["name"] for hop in found["hops"] if hop["verdict"] == "broken"]


@contextmanager
def paused(host: Host) -> Iterator[None]:
    """Stop the host's agent, so that nothing is repaired; afterwards it repairs what is missing."""
    host.stop_agent()
    try:
        yield
    finally:
        host.start_agent()
        wait_for(f"the agent of {host.name} to be ready", host.ready, SOON)


@contextmanager
def ruled(namespace: str, table: str, body: str) -> Iterator[None]:
    """Have an nft table of somebody else in a namespace."""
    netns.run(["nft", "-f", "-"], namespace, text=f"table {table} {{ chain c {{ {body} }}; }}\n")
    try:
        yield
    finally:
        netns.run(["nft", f"delete table {table}"], namespace)


@contextmanager
def done(namespace: str, do: list[str], undo: list[str]) -> Iterator[None]:
    """Run commands, and others afterwards that take them back."""
    for line in do:
        netns.run(line.split(), namespace)
    try:
        yield
    finally:
        for line in undo:
            netns.run(line.split(), namespace, check=False)


def hub(lab: Lab) -> str:
    return underlay.hub(lab.settings)


# nothing is wrong


@pytest.mark.parametrize("version", [4, 6])
def test_nothing_is_wrong_and_every_hop_is_ok(mesh: Lab, version: int) -> None:
    found = trace(mesh.host(1), *ADDRESSES[version])
    assert found["state"] == "arrives", found
    assert set(verdicts(found).values()) == {"ok"}, found
    assert {
        "source",
        "policy rules",
        "route",
        "filter",
        "neighbour",
        "FDB entry",
        "flow in obr0",
        "tunnel port",
    } <= set(verdicts(found))
    assert [packets["answered"] for packets in found["packets"]] == [3, 3]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("10.97.1.2", "10.97.1.3"),
        ("10.97.1.2", "10.97.1.1"),
        ("10.97.1.2", "10.97.2.1"),
        ("10.97.1.1", "10.97.2.2"),
        ("10.97.1.1", "10.97.1.3"),
        ("h1", "h2"),
        ("192.0.2.11", "10.97.2.2"),
        ("10.97.1.2", "192.0.2.12"),
        ("192.0.2.11", "192.0.2.12"),
        ("fd00:97:1::2", "fd00:97:1::3"),
        ("10.97.2.2", "10.97.1.2"),
        ("h2", "10.97.1.2"),
    ],
)
def test_every_kind_of_end_can_be_traced(mesh: Lab, source: str, target: str) -> None:
    found = trace(mesh.host(1), source, target)
    assert found["state"] == "arrives" and not broken(found), found
    if source in ("10.97.2.2", "h2"):
        assert found["source"]["node"] == "h1" and "h2" in found["notes"][0]


# on this node, with its agent stopped


def _flow_back(host: Host, version: int) -> None:
    source = {4: "ip,nw_src=10.97.2.0/24", 6: "ipv6,ipv6_src=fd00:97:2::/64"}[version]
    host.ovs_ofctl("del-flows", "obr0", f"dl_dst={MAC1},{source}")


SHARED = ("FDB entry", "flow", "all flows", "tunnel port", "kbr0 down", "obr0 down", "obr0 not enslaved")
MISSING: dict[str, tuple[str, Callable[[Host, int], object]]] = {
    "route": ("route", lambda h, v: h.run(["ip", "route", "del", RANGE[v]])),
    "neighbour": ("neighbour", lambda h, v: h.run(["ip", "neigh", "del", GATEWAY[v], "dev", "kbr0"])),
    "FDB entry": ("FDB entry", lambda h, v: h.run(["bridge", "fdb", "del", MAC2, "dev", "obr0", "master", "static"])),
    "flow": ("flow in obr0", lambda h, v: h.ovs_ofctl("del-flows", "obr0", f"in_port=LOCAL,dl_dst={MAC2}")),
    "flow back": ("flow back in obr0", _flow_back),
    "all flows": ("flow in obr0", lambda h, v: h.ovs_ofctl("del-flows", "obr0")),
    "tunnel port": ("tunnel port", lambda h, v: h.ovs_vsctl("del-port", "gre-h2")),
    "kbr0 down": ("kbr0", lambda h, v: h.run(["ip", "link", "set", "kbr0", "down"])),
    "obr0 down": ("obr0", lambda h, v: h.run(["ip", "link", "set", "obr0", "down"])),
    "obr0 not enslaved": ("obr0", lambda h, v: h.run(["ip", "link", "set", "obr0", "nomaster"])),
    "forwarding off": (
        "forwarding",
        lambda h, v: netns.sysctl(h.ns, {f"net/{'ipv4/ip_forward' if v == 4 else 'ipv6/conf/all/forwarding'}": "0"}),
    ),
    "another MAC": (
        "neighbour",
        lambda h, v: h.run(["ip", "neigh", "replace", GATEWAY[v], "lladdr", "02:00:00:00:00:99", "dev", "kbr0"]),
    ),
}


@pytest.mark.parametrize("part", MISSING)
def test_what_is_missing_is_the_hop_and_the_agent_is_to_be_started(mesh: Lab, part: str) -> None:
    host = mesh.host(1)
    name, remove = MISSING[part]
    with paused(host):
        for version in (4, 6):
            # both families have one of these
            if version == 4 or part not in SHARED:
                remove(host, version)
            found = trace(host, *ADDRESSES[version])
            assert found["stopsAtHop"] == name, found
            assert "agent of h1" in broken(found) and "agent" in found["todo"]
    at_rest(mesh)


def test_an_agent_that_is_dead_is_said_though_packets_arrive(mesh: Lab) -> None:
    with paused(mesh.host(1)):
        found = trace(mesh.host(1), *ADDRESSES[4])
        assert (found["state"], broken(found)) == ("degraded", ["agent of h1"]), found


def test_rp_filter_is_said_though_packets_arrive(mesh: Lab) -> None:
    with paused(mesh.host(1)):
        netns.sysctl(mesh.host(1).ns, {"net/ipv4/conf/kbr0/rp_filter": "1"})
        found = trace(mesh.host(1), *ADDRESSES[4])
    assert found["state"] == "degraded" and "forwarding" in broken(found), found


@pytest.mark.parametrize("tool", ["iptables", "iptables-legacy"])
def test_a_drop_of_iptables_is_named(mesh: Lab, tool: str) -> None:
    host = mesh.host(1)
    # the agent would put its accept rules before it
    with paused(host), done(host.ns, [f"{tool} -I FORWARD -d 10.97.2.0/24 -j DROP"], [f"{tool} -F FORWARD"]):
        found = trace(host, *ADDRESSES[4])
    assert found["stopsAtHop"] == "filter" and "10.97.2.0/24" in found["headline"], found


def test_while_the_agent_repairs_all_is_well_or_the_hop_is_named(mesh: Lab) -> None:
    host = mesh.host(1)
    for part in ("route", "flow", "neighbour"):
        MISSING[part][1](host, 4)
        found = trace(host, *ADDRESSES[4])
        assert found["state"] == "arrives" or found.get("stopsAtHop") == MISSING[part][0], found


# on this node, by somebody else

RULE = "type filter hook {} priority {};"
INGRESS = "type filter hook ingress device {} priority 0;"
HOOKS = {
    "raw prerouting": ("ip t", RULE.format("prerouting", -300) + " {out} drop;", "filter"),
    "forward": ("inet t", RULE.format("forward", 10) + " {out} counter drop;", "filter"),
    "policy": ("inet t", RULE.format("forward", 10) + " policy drop;", "filter"),
    "bridge prerouting": ("bridge t", RULE.format("prerouting", 0) + " {out} drop;", "filter"),
    "bridge output": ("bridge t", RULE.format("output", 0) + " {out} drop;", "filter"),
    "ingress of the port": ("netdev t", INGRESS.format("vp1") + " {out} drop;", "filter"),
    "answers, forward": ("inet t", RULE.format("forward", 10) + " {back} drop;", "filter, back"),
    "answers, ingress of obr0": ("netdev t", INGRESS.format("obr0") + " {back} drop;", "filter, back"),
}


@pytest.mark.parametrize(("hook", "version"), [*((h, 4) for h in HOOKS), ("forward", 6), ("answers, forward", 6)])
def test_a_drop_in_any_table_is_named_with_its_table(mesh: Lab, hook: str, version: int) -> None:
    table, body, name = HOOKS[hook]
    if table == "ip t":
        table = f"{IP[version]} t"
    body = body.replace("{out}", f"{IP[version]} daddr {ADDRESSES[version][1]}")
    body = body.replace("{back}", f"{IP[version]} saddr {ADDRESSES[version][1]}")
    with ruled(mesh.host(1).ns, table, body):
        found = trace(mesh.host(1), *ADDRESSES[version])
    assert found["stopsAtHop"] == name, found
    assert f"table {table}" in found["headline"], found["headline"]


ROUTING = {
    "policy rule": (
        "policy rules",
        ["ip -{v} rule add from {own} lookup 100 priority 500", "ip -{v} route add unreachable default table 100"],
        ["ip -{v} rule del priority 500", "ip -{v} route flush table 100"],
    ),
    "policy rule with another way": (
        "policy rules",
        ["ip -{v} rule add iif kbr0 lookup 100 priority 500", "ip -{v} route add default dev br-phy table 100"],
        ["ip -{v} rule del priority 500", "ip -{v} route flush table 100"],
    ),
    "prohibiting rule": (
        "policy rules",
        ["ip -{v} rule add to {range} prohibit priority 500"],
        ["ip -{v} rule del priority 500"],
    ),
    "policy rule for answers": (
        "route back",
        ["ip -{v} rule add to {own} lookup 100 priority 500", "ip -{v} route add default dev br-phy table 100"],
        ["ip -{v} rule del priority 500", "ip -{v} route flush table 100"],
    ),
    "policy rule that refuses answers": (
        "policy rules",
        ["ip -{v} rule add to {own} lookup 100 priority 500", "ip -{v} route add unreachable default table 100"],
        ["ip -{v} rule del priority 500", "ip -{v} route flush table 100"],
    ),
    "blackhole": ("route", ["ip -{v} route add blackhole {target}"], ["ip -{v} route del blackhole {target}"]),
    "prohibit": ("route", ["ip -{v} route add prohibit {target}"], ["ip -{v} route del prohibit {target}"]),
    "route elsewhere": ("route", ["ip -{v} route add {target} dev br-phy"], ["ip -{v} route del {target} dev br-phy"]),
}


@pytest.mark.parametrize(("case", "version"), [*((c, 4) for c in ROUTING), ("policy rule", 6), ("blackhole", 6)])
def test_a_rule_or_a_route_that_wins_is_named(mesh: Lab, case: str, version: int) -> None:
    name, do, undo = ROUTING[case]
    words = {"v": version, "own": OWN_RANGE[version], "range": RANGE[version], "target": ADDRESSES[version][1]}
    with done(mesh.host(1).ns, [line.format(**words) for line in do], [line.format(**words) for line in undo]):
        found = trace(mesh.host(1), *ADDRESSES[version])
    assert found["stopsAtHop"] == name, found
    if name == "policy rules":
        assert "rule 500" in found["headline"], found["headline"]


def test_an_unmanaged_flow_is_named(mesh: Lab) -> None:
    host = mesh.host(1)
    host.ovs_ofctl("add-flow", "obr0", "priority=200,in_port=LOCAL,icmp,actions=drop")
    try:
        found = trace(host, *ADDRESSES[4])
    finally:
        host.ovs_ofctl("--strict", "del-flows", "obr0", "priority=200,in_port=LOCAL,icmp")
    assert found["stopsAtHop"] == "flow in obr0" and "priority 200" in found["headline"], found


# in the pod

POD = {
    "no route": ("route in the pod", ["ip -{v} route del default"], ["ip -{v} route replace default via {gw}"]),
    "a wrong gateway": (
        "route in the pod",
        ["ip -{v} route replace default via {wrong}"],
        ["ip -{v} route replace default via {gw}"],
    ),
    "a static neighbour": (
        "gateway in the pod",
        ["ip neigh replace {gw} lladdr 02:00:00:00:00:99 dev eth0"],
        ["ip neigh del {gw} dev eth0"],
    ),
}


@pytest.mark.parametrize(("case", "version"), [*((c, 4) for c in POD), ("no route", 6)])
def test_a_fault_in_the_pod_is_its_hop(mesh: Lab, case: str, version: int) -> None:
    name, do, undo = POD[case]
    wrong = {4: "10.97.1.77", 6: "fd00:97:1::77"}[version]
    words = {"v": version, "gw": OWN_GATEWAY[version], "wrong": wrong}
    with done(mesh.pod(1, 1).ns, [line.format(**words) for line in do], [line.format(**words) for line in undo]):
        found = trace(mesh.host(1), *ADDRESSES[version])
    assert found["stopsAtHop"] == name, found


def test_a_pod_whose_interface_is_down_and_its_port_are_told_apart(mesh: Lab) -> None:
    back = ["ip link set eth0 up", "ip route replace default via 10.97.1.1"]
    with done(mesh.pod(1, 2).ns, ["ip link set eth0 down"], back):
        assert trace(mesh.host(1), "10.97.1.3", "10.97.2.2")["stopsAtHop"] == "source"
    with done(mesh.host(1).ns, ["ip link set vp2 down"], ["ip link set vp2 up"]):
        assert trace(mesh.host(1), "10.97.1.3", "10.97.2.2")["stopsAtHop"] == "bridge port"
    with done(mesh.host(1).ns, ["ip link set vp2 nomaster"], ["ip link set vp2 master kbr0"]):
        assert trace(mesh.host(1), "10.97.1.3", "10.97.2.2")["stopsAtHop"] == "bridge port"


@pytest.mark.parametrize("mtu", [1500, 1300])
def test_a_wrong_mtu_in_the_pod_is_said(mesh: Lab, mtu: int) -> None:
    with done(mesh.pod(1, 1).ns, [f"ip link set eth0 mtu {mtu}"], ["ip link set eth0 mtu 1462"]):
        found = trace(mesh.host(1), *ADDRESSES[4])
    assert found["state"] == "degraded" and broken(found) == ["source"] and f"MTU {mtu}" in found["headline"], found


def test_a_filter_inside_the_pod_is_told_from_the_hosts(mesh: Lab) -> None:
    with done(mesh.pod(1, 1).ns, ["iptables -A OUTPUT -j DROP"], ["iptables -F OUTPUT"]):
        assert trace(mesh.host(1), *ADDRESSES[4])["stopsAtHop"] == "filter in the pod"
    with done(mesh.pod(1, 1).ns, ["iptables -A INPUT -j DROP"], ["iptables -F INPUT"]):
        assert trace(mesh.host(1), *ADDRESSES[4])["stopsAtHop"] == "back in the pod"


@pytest.mark.parametrize(("rule", "what"), [("masquerade", "source"), ("dnat to 10.97.2.3", "destination")])
def test_somebodys_nat_is_said_though_packets_arrive(mesh: Lab, rule: str, what: str) -> None:
    hook = "prerouting priority -110" if "dnat" in rule else "postrouting priority 50"
    with ruled(mesh.host(1).ns, "ip t", f"type nat hook {hook}; ip daddr 10.97.2.2 {rule};"):
        found = trace(mesh.host(1), *ADDRESSES[4])
    assert found["state"] == "degraded" and broken(found) == ["filter"], found
    assert f"the {what} of packets becomes" in found["headline"], found


def test_two_pods_with_one_address_are_said(mesh: Lab) -> None:
    both = ["ip addr add 10.97.1.2/24 dev eth0"]
    with done(mesh.pod(1, 2).ns, both, ["ip addr del 10.97.1.2/24 dev eth0"]):
        found = trace(mesh.host(1), *ADDRESSES[4])
    assert "source" in broken(found) and "has its address too" in found["headline"], found


def test_a_static_neighbour_for_the_pod_is_named(mesh: Lab) -> None:
    do = ["ip neigh replace 10.97.1.2 lladdr 02:00:00:00:00:99 dev kbr0"]
    with done(mesh.host(1).ns, do, ["ip neigh del 10.97.1.2 dev kbr0"]):
        assert trace(mesh.host(1), *ADDRESSES[4])["stopsAtHop"] == "pod's neighbour"


def test_a_pod_that_is_not_there_is_named(mesh: Lab) -> None:
    assert trace(mesh.host(1), "10.97.1.99", "10.97.2.2")["stopsAtHop"] == "source"
    assert trace(mesh.host(1), "10.97.1.2", "10.97.1.99")["stopsAtHop"] == "destination"


# the network and the peer


@pytest.mark.parametrize("version", [4, 6])
def test_a_cut_of_the_tunnel_is_the_network(mesh: Lab, version: int) -> None:
    with ruled(hub(mesh), "bridge cut", RULE.format("forward", 0) + f" {TUNNEL} drop; {TUNNEL_BACK} drop;"):
        found = trace(mesh.host(1), *ADDRESSES[version])
    assert found["stopsAtHop"] == "network to h2", found
    assert "GRE (IP protocol 47) is blocked" in found["headline"] and "answers pings" in found["headline"], found


def test_a_cut_in_one_direction_and_a_host_that_is_away_are_told_apart(mesh: Lab) -> None:
    with ruled(hub(mesh), "bridge cut", RULE.format("forward", 0) + f" {TUNNEL} drop;"):
        found = trace(mesh.host(1), *ADDRESSES[4])
        assert found["stopsAtHop"] == "network to h2" and "its tunnel packets arrive here" in found["headline"], found
    away = " ip saddr 192.0.2.12 drop; ip daddr 192.0.2.12 drop;"
    with ruled(hub(mesh), "bridge cut", RULE.format("forward", 0) + away):
        found = trace(mesh.host(1), *ADDRESSES[4])
        assert found["stopsAtHop"] == "network to h2" and "down or cut off" in found["headline"], found


def test_a_path_mtu_is_found_to_the_byte(mesh: Lab) -> None:
    with ruled(hub(mesh), "bridge cut", RULE.format("forward", 0) + f" {TUNNEL} ip length > 1400 drop;"):
        found = trace(mesh.host(1), *ADDRESSES[4])
    assert found["stopsAtHop"] == "path MTU" and "above 1362 bytes" in found["headline"], found


def test_the_agent_of_the_peer_that_is_dead_is_said_though_packets_arrive(mesh: Lab) -> None:
    with paused(mesh.host(2)):
        found = trace(mesh.host(1), *ADDRESSES[4])
        assert (found["state"], broken(found)) == ("degraded", ["agent of h2"]), found


def test_the_agent_of_the_peer_that_hangs_is_told_from_one_that_is_dead(mesh: Lab) -> None:
    agent = mesh.host(2).agent()
    assert agent is not None
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        found = trace(mesh.host(1), *ADDRESSES[4])
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    assert broken(found) == ["agent of h2"] and "hung" in found["headline"], found


@pytest.mark.parametrize("version", [4, 6])
def test_a_drop_on_the_peer_is_told_as_far_as_it_shows(mesh: Lab, version: int) -> None:
    to_pods = RULE.format("forward", 10) + f" {IP[version]} daddr {RANGE[version]} drop;"
    with ruled(mesh.host(2).ns, "inet t", to_pods):
        found = trace(mesh.host(1), *ADDRESSES[version])
        assert found["stopsAtHop"] == "forwarding on h2" and "ovsmesh trace" in found["todo"], found
        # from the other end the rule itself is named
        there = trace(mesh.host(2), *reversed(ADDRESSES[version]))
        assert there["stopsAtHop"] == "filter, back" and "table inet t" in there["headline"], there
    one = RULE.format("forward", 10) + f" {IP[version]} daddr {ADDRESSES[version][1]} drop;"
    with ruled(mesh.host(2).ns, "inet t", one):
        found = trace(mesh.host(1), *ADDRESSES[version])
        assert found["stopsAtHop"] == "destination on h2" and "filter" in found["headline"], found


def test_a_pod_of_the_peer_that_is_gone_is_named(mesh: Lab) -> None:
    assert "nothing there has" in trace(mesh.host(1), "10.97.1.2", "10.97.2.99")["headline"]
    undo = ["ip addr add 10.97.2.3/24 dev eth0", "ip route replace default via 10.97.2.1"]
    with done(mesh.pod(2, 2).ns, ["ip addr del 10.97.2.3/24 dev eth0"], undo):
        found = trace(mesh.host(1), "10.97.1.2", "10.97.2.3")
    assert found["stopsAtHop"] == "destination on h2" and "nothing there has 10.97.2.3" in found["headline"], found


def test_a_dead_switch_is_named_here_and_there(mesh: Lab) -> None:
    for number, hop in ((1, ("obr0", "flow in obr0")), (2, ("network to h2",))):
        host = mesh.host(number)
        host.kill_vswitchd()
        try:
            found = trace(mesh.host(1), *ADDRESSES[4])
        finally:
            host.start_vswitchd()
        assert found["stopsAtHop"] in hop, found
        at_rest(mesh)
        mesh.warm_up()


# what it leaves, and what it says of what it does not know


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_whenever_it_ends(mesh: Lab, how: signal.Signals) -> None:
    host = mesh.host(1)
    before = wiring(host)
    with ruled(hub(mesh), "bridge cut", RULE.format("forward", 0) + f" {TUNNEL} drop; {TUNNEL_BACK} drop;"):
        # who runs the tests in the background may have them ignore SIGINT
        argv = ["env", "--default-signal=INT", "ip", "netns", "exec", host.ns, *host.command("trace"), *ADDRESSES[4]]
        child = subprocess.Popen(argv, env=os.environ | host.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(
                "its table to be there",
                lambda: "ovsmesh-trace" in host.run(["nft", "list", "tables"]).stdout or child.poll() is not None,
                SOON,
            )
            assert child.poll() is None
        finally:
            child.send_signal(how)
            child.wait(SOON)
    assert "ovsmesh-trace" not in host.run(["nft", "list", "tables"]).stdout
    assert not difference(before, wiring(host))


def test_an_unknown_end_says_what_was_looked_at(mesh: Lab) -> None:
    host = mesh.host(1)
    for end, words in {
        "10.97.77.1": ("10.97.77.1", "nearest", "10.97.2.0/24 (h2)"),
        "nosuch": ("nosuch", "no node", "Docker", "h2"),
        "web/nosuch": ("web/nosuch", "cluster"),
    }.items():
        said = host.ovsmesh("trace", "10.97.1.2", end)
        assert said.returncode == 1 and all(word in said.stderr for word in words), said.stderr
        assert "Traceback" not in said.stderr
    said = host.ovsmesh("trace", "10.97.2.2", "10.97.2.3")
    assert said.returncode == 1 and "run it on h2" in said.stderr, said.stderr


def test_the_text_begins_with_the_verdict_and_fits_a_terminal(mesh: Lab) -> None:
    said = mesh.host(1).ovsmesh("trace", *ADDRESSES[4])
    lines = said.stdout.splitlines()
    assert said.returncode == 0 and lines[0].startswith("10.97.1.2 → 10.97.2.2: packets arrive"), said.stdout
    assert max(map(len, lines)) <= 80, said.stdout
