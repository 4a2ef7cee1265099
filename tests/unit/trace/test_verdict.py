"""The hop at which packets stop, from where they were seen and what is not as wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Network, ip_address
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsmesh.trace.text import EXIT, render, to_dict
from ovsmesh.trace.types import (
    Drop,
    EchoFound,
    Evidence,
    FilterFound,
    HookCount,
    Hop,
    Kind,
    LinkFound,
    PeerFound,
    Place,
    PodFound,
    Point,
    PolicyRule,
    RouteFound,
    Switch,
    Trace,
    Verdict,
)
from ovsmesh.trace.verdict import decide, order, stop

MAC, POD_MAC, PEER_MAC = "0a:58:0a:61:01:01", "02:00:00:00:00:01", "0a:58:0a:61:02:01"
HERE, THERE = IPv4Network("10.97.1.0/24"), IPv4Network("10.97.2.0/24")
OUT = (Point.SENT, Point.PORT, Point.KBR_IN, Point.KBR_OUT, Point.OBR, Point.UNDERLAY)
BACK = (Point.UNDERLAY_BACK, Point.OBR_BACK, Point.KBR_IN_BACK, Point.KBR_OUT_BACK, Point.PORT_BACK, Point.ANSWERED)
LOCAL = PolicyRule(0, "from all lookup local", 255, "table", True)
MAIN = PolicyRule(32766, "from all lookup main", 254, "table", True)


def link(name: str, master: str = "kbr0", mac: str = "", **more: Any) -> LinkFound:
    return LinkFound(name, 7, True, True, 1462, mac, master, 3, 0, **more)


PORT = link("vp1")
POD = PodFound("namespace x", link("eth0", "", POD_MAC), PORT, RouteFound("unicast", "10.97.1.1", "eth0"), MAC)
PEER = PeerFound(
    "h2",
    ip_address("192.0.2.12"),
    ip_address("10.97.2.1"),
    EchoFound(3, 3, 84, round_trip=0.001),
    EchoFound(3, 3, 84),
    EchoFound(1, 0, 84, ("10.97.2.1: host unreachable",)),
    "ok",
    "h2 is converged",
)
LINKS = {"kbr0": link("kbr0", "", MAC), "obr0": link("obr0"), "vp1": PORT}
WELL = Evidence(
    source=Place(ip_address("10.97.1.2"), Kind.POD, "h1", HERE),
    target=Place(ip_address("10.97.2.2"), Kind.POD, "h2", THERE),
    self_name="h1",
    sent_from="pod",
    mtu=1462,
    seen=dict.fromkeys((*OUT, *BACK), 3),
    small=EchoFound(3, 3, 84, round_trip=0.0012),
    full=EchoFound(3, 3, 1462),
    seen_full=dict.fromkeys((*OUT, *BACK), 3),
    pod=POD,
    links=LINKS,
    route=RouteFound("unicast", "10.97.2.1", "kbr0", 254, 1462),
    route_back=RouteFound("unicast", "", "kbr0"),
    policy=(LOCAL, MAIN),
    policy_back=(LOCAL, MAIN),
    peer_mac=PEER_MAC,
    neighbour=PEER_MAC,
    pod_neighbour=POD_MAC,
    fdb={PEER_MAC: "obr0", POD_MAC: "vp1"},
    underlay_route=RouteFound("unicast", "", "eth0"),
    underlay_link=link("eth0", ""),
    filter=FilterFound(
        (), (HookCount("inet forward", 3, 3, False), HookCount("inet forward", 3, 3, True)), ("ip mine",)
    ),
    switch=Switch(9, 9, 9, 9, port_name="gre-h2", port_number=1),
    peer=PEER,
)


def lost(after: Point, evidence: Evidence = WELL, **more: Any) -> Evidence:
    """Return evidence of packets that were last seen at a point."""
    every = (*OUT, *BACK)
    seen = {point: 3 if every.index(point) <= every.index(after) else 0 for point in every}
    return replace(evidence, seen=seen, small=EchoFound(3, 0, 84), full=EchoFound(), seen_full={}, **more)


def missing(kind: str, line: str) -> Mapping[str, tuple[str, ...]]:
    return {kind: (line,)}


def stopped(evidence: Evidence) -> str:
    found = decide(evidence, "gre")
    assert found.state == "stops" and found.stops_at is not None and EXIT[found.state] == 2, found.headline
    hop = found.hops[found.stops_at - 1]
    assert hop.verdict is Verdict.BROKEN and hop.todo
    return hop.name


def hop(found: Trace, name: str) -> Hop:
    return next(hop for hop in found.hops if hop.name == name)


def test_when_all_is_well_every_hop_is() -> None:
    found = decide(WELL, "gre")
    assert (found.state, found.stops_at, EXIT[found.state]) == ("arrives", None, 0)
    assert {hop.verdict for hop in found.hops} == {Verdict.OK}
    assert render(found).startswith(
        "10.97.1.2 → 10.97.2.2: packets arrive, round trip 1.2 ms; all hops are as wanted\n"
    )


CALM = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
FLOW = "flow priority=100,dl_dst=…,in_port=LOCAL → output:gre-h2 is missing"
REFUSED = RouteFound(error="host unreachable")
OWN = PolicyRule(500, "from 10.97.1.0/24 lookup 100", 100, "table", True)
CASES = {
    "the pod has no route": (
        "route in the pod",
        lost(Point.SENT, pod=replace(POD, route=RouteFound(error="network unreachable"))),
    ),
    "a wrong gateway": (
        "route in the pod",
        lost(Point.SENT, pod=replace(POD, route=RouteFound("unicast", "10.97.1.77", "eth0"))),
    ),
    "the pod's interface is down": (
        "source",
        lost(Point.SENT, pod=replace(POD, interface=POD.interface._replace(up=False))),
    ),
    "the pod's own filter": (
        "filter in the pod",
        replace(
            lost(Point.SENT),
            small=EchoFound(0, 0, 84, refused="a filter drops it"),
            seen={Point.SENT: 0, Point.PORT: 0},
        ),
    ),
    "a static ARP entry in the pod": ("gateway in the pod", lost(Point.PORT, pod=replace(POD, gateway_mac="02:99"))),
    "the port has no bridge": (
        "bridge port",
        lost(Point.PORT, links=LINKS | {"vp1": PORT._replace(master="")}),
    ),
    "kbr0 is down": (
        "kbr0",
        lost(
            Point.SENT,
            missing=missing("links", "link kbr0 state down → up differs"),
            links=LINKS | {"kbr0": LINKS["kbr0"]._replace(up=False), "vp1": PORT._replace(port_state=0)},
        ),
    ),
    "kbr0 has no address, and its routes went with it": (
        "kbr0",
        lost(
            Point.KBR_IN,
            missing={"addresses": ("address 10.97.1.1/24 dev kbr0 is missing",), "routes": ("route is missing",)},
            route=RouteFound("unreachable", error="host unreachable"),
        ),
    ),
    "ip_forward=0": (
        "forwarding",
        lost(Point.KBR_IN, missing=missing("sysctls", "sysctl net/ipv4/ip_forward 0 → 1 differs"), route=REFUSED),
    ),
    "a policy rule": (
        "policy rules",
        lost(
            Point.KBR_IN,
            policy=(LOCAL, OWN, MAIN),
            route=RouteFound("unicast", "192.0.2.1", "eth0", 100),
        ),
    ),
    "a refusing policy rule": (
        "policy rules",
        lost(Point.KBR_IN, policy=(LOCAL, OWN._replace(action="prohibit"), MAIN), route=RouteFound(error="prohibited")),
    ),
    "route missing": (
        "route",
        lost(
            Point.KBR_IN,
            route=RouteFound("unreachable", error="host unreachable"),
            missing=missing("routes", "route 10.97.2.0/24 via 10.97.2.1 dev kbr0 is missing"),
        ),
    ),
    "another route": ("route", lost(Point.KBR_IN, route=RouteFound("blackhole", error="blackhole"))),
    "a drop in a table": (
        "filter",
        lost(Point.KBR_IN, filter=FilterFound((Drop("`drop` in chain f", "table ip mine"),))),
    ),
    "a drop on the bridge": (
        "filter",
        lost(Point.PORT, filter=FilterFound((Drop("`drop` in chain f", "table bridge mine"),))),
    ),
    "a drop of iptables-legacy": (
        "filter",
        lost(
            Point.KBR_IN,
            filter=FilterFound(
                (Drop("policy DROP", "iptables-legacy", certain=False),), (HookCount("inet forward", 3, 0, False),)
            ),
        ),
    ),
    "neighbour missing": (
        "neighbour",
        lost(Point.KBR_IN, missing=missing("neighbours", "neighbour 10.97.2.1 is missing"), neighbour=""),
    ),
    "another MAC": ("neighbour", lost(Point.KBR_OUT, neighbour="02:00:00:00:00:99")),
    "FDB entry missing": (
        "FDB entry",
        lost(Point.KBR_OUT, missing=missing("fdb", "fdb 0a:58 dev obr0 is missing"), fdb={}),
    ),
    "obr0 not on kbr0": (
        "obr0",
        lost(
            Point.KBR_OUT,
            missing={"links": ("link obr0 master differs",), "fdb": ("fdb is missing",)},
            links=LINKS | {"obr0": link("obr0", "")},
            fdb={},
        ),
    ),
    "flow missing": ("flow in obr0", lost(Point.OBR, missing=missing("flows", FLOW))),
    "an unmanaged flow": ("flow in obr0", lost(Point.OBR, switch=replace(WELL.switch, shadow_out="priority 200"))),
    "the switch is down": ("flow in obr0", lost(Point.OBR, switch=Switch(unanswered="it does not answer"))),
    "tunnel port missing": ("tunnel port", lost(Point.OBR, missing=missing("ports", "port gre-h2 is missing"))),
    "an error of the tunnel port": (
        "tunnel port",
        lost(Point.OBR, switch=replace(WELL.switch, port_error="no device")),
    ),
    "no route to the peer": (
        "underlay route",
        lost(Point.OBR, underlay_route=RouteFound(error="network unreachable")),
    ),
    "GRE cut": ("network to h2", lost(Point.UNDERLAY, peer=replace(PEER, gateway_echo=EchoFound(3, 0, 84)))),
    "the peer's switch or host is down, and nobody answers ARP": (
        "network to h2",
        lost(Point.OBR, peer=replace(PEER, gateway_echo=EchoFound(3, 0, 84), underlay_echo=EchoFound(3, 0, 84))),
    ),
    "the destination is gone": (
        "destination on h2",
        replace(lost(Point.UNDERLAY), small=EchoFound(3, 0, 84, ("10.97.2.1: host unreachable",))),
    ),
    "the destination does not answer": ("destination on h2", lost(Point.UNDERLAY)),
    "the peer forwards nothing": (
        "forwarding on h2",
        lost(Point.UNDERLAY, peer=replace(PEER, unused_echo=EchoFound(1, 0, 84))),
    ),
    "the peer's filter answers": (
        "filter of h2",
        replace(lost(Point.UNDERLAY), small=EchoFound(3, 0, 84, ("10.97.2.1: prohibited by a filter",))),
    ),
    "flow back missing": (
        "flow back in obr0",
        lost(Point.UNDERLAY_BACK, missing=missing("flows", "flow in_port=gre-h2,ip → LOCAL is missing")),
    ),
    "a drop of answers": (
        "filter, back",
        lost(Point.KBR_IN_BACK, filter=FilterFound((Drop("`drop` in chain f", "table ip mine"),))),
    ),
    "a policy rule for answers": (
        "route back",
        lost(Point.KBR_IN_BACK, route_back=RouteFound("unicast", "192.0.2.1", "eth0", 100)),
    ),
    "a static ARP entry for the pod": ("pod's neighbour", lost(Point.PORT_BACK, pod_neighbour="02:99")),
    "the pod's own filter drops answers": ("back in the pod", lost(Point.PORT_BACK)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_stops_at_its_hop(case: str) -> None:
    name, evidence = CASES[case]
    assert stopped(evidence) == name


@pytest.mark.parametrize("case", CASES)
def test_what_no_packet_reached_is_not_called_ok(case: str) -> None:
    found = decide(CASES[case][1], "gre")
    assert found.stops_at is not None
    behind = found.hops[found.stops_at :]
    assert all(hop.verdict is not Verdict.OK or hop.name == "network to h2" for hop in behind if hop.after)


def test_large_packets_that_are_lost_name_the_path_mtu() -> None:
    full = dict.fromkeys(OUT, 3) | dict.fromkeys(BACK, 0)
    evidence = replace(WELL, full=EchoFound(3, 0, 1462), seen_full=full, peer=replace(PEER, path_mtu=1362))
    assert stopped(evidence) == "path MTU"
    found = decide(evidence, "gre")
    assert "large packets stop at hop" in found.headline and "above 1362 bytes" in found.headline


def test_a_lossy_network_is_told_from_a_slow_first_packet() -> None:
    seen = dict.fromkeys(OUT, 23) | dict.fromkeys(BACK, 15)
    assert stopped(replace(WELL, seen=seen, small=EchoFound(23, 15, 84))) == "network to h2"
    first = dict.fromkeys(OUT, 23) | dict.fromkeys(BACK, 22)
    assert decide(replace(WELL, seen=first, small=EchoFound(23, 22, 84)), "gre").state == "arrives"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("agent of h2", {"peer": replace(PEER, agent="not running: 10.97.2.1 refuses port 9476")}),
        ("agent of h1", {"agent": "no agent runs on this node"}),
        ("forwarding", {"missing": missing("sysctls", "sysctl net/ipv4/conf/kbr0/rp_filter 1 → 2 differs")}),
        ("source", {"pod": replace(POD, interface=POD.interface._replace(mtu=1500))}),
        ("source", {"pod": replace(POD, others=("vp2",))}),
        ("filter", {"rewritten": "source 10.97.1.1"}),
    ],
)
def test_what_is_not_as_wanted_is_said_though_packets_arrive(name: str, change: dict[str, Any]) -> None:
    found = decide(replace(WELL, **change), "gre")
    assert (found.state, EXIT[found.state]) == ("degraded", 2)
    assert f", {name}, is not as wanted" in found.headline and hop(found, name).verdict is Verdict.BROKEN


def test_a_policy_rule_with_the_same_route_is_fine() -> None:
    same = replace(WELL, policy=(LOCAL, OWN, MAIN), route=WELL.route._replace(table=100))
    assert decide(same, "gre").state == "arrives"


def test_a_counter_that_grew_is_no_drop_while_packets_arrive() -> None:
    drops = (Drop("policy DROP", "iptables-legacy", certain=False),)
    assert decide(replace(WELL, filter=replace(WELL.filter, drops=drops)), "gre").state == "arrives"


def test_an_agent_that_can_not_be_asked_is_unknown_and_no_fault() -> None:
    found = decide(replace(WELL, peer=replace(PEER, agent="unknown")), "gre")
    assert found.state == "arrives" and hop(found, "agent of h2").verdict is Verdict.UNKNOWN


def test_a_pod_on_the_same_node_that_is_gone_is_named() -> None:
    evidence = replace(
        lost(Point.SENT),
        target=Place(ip_address("10.97.1.9"), Kind.POD, "h1", HERE),
        peer=None,
        seen={Point.SENT: 3, Point.PORT: 0, Point.PORT_BACK: 0, Point.ANSWERED: 0},
        pod=replace(POD, route=RouteFound("unicast", "", "eth0")),
    )
    assert stopped(evidence) == "destination"


@CALM
@given(st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_any_counts_give_a_place_that_packets_reached(counts: list[int]) -> None:
    seen = dict(zip((*OUT, *BACK), counts, strict=True))
    points = [*OUT, *BACK]
    at = stop(seen, points)
    assert at is None or at in points
    if at is None:
        assert seen[Point.ANSWERED]
    elif at is not Point.SENT:
        assert seen[at] and not any(seen[later] for later in points[points.index(at) + 1 :])


@CALM
@given(st.sampled_from(sorted(CASES)), st.sets(st.sampled_from(sorted({*OUT, *BACK} - {Point.SENT, Point.ANSWERED}))))
def test_fewer_points_in_sight_never_make_it_well(case: str, hidden: set[Point]) -> None:
    evidence = CASES[case][1]
    seen = {point: n for point, n in evidence.seen.items() if point not in hidden}
    found = decide(replace(evidence, seen=seen), "gre")
    assert found.state != "arrives" and EXIT[found.state] in (1, 2)
    assert set(order(replace(evidence, seen=seen))).isdisjoint(hidden)


def test_hostile_names_are_shown_as_text_and_lines_fit() -> None:
    pod = replace(POD, where="namespace \x1b[2J")
    evidence = replace(WELL, pod=pod, source=replace(WELL.source, name="web\n\x1b]0;x\x07"))
    text = render(decide(evidence, "gre"))
    assert "\x1b" not in text and "\x07" not in text
    assert all(len(line) <= 80 for line in text.splitlines()[5:])


def test_json_says_where_it_stops_and_gives_every_hop_its_verdict() -> None:
    found = to_dict(decide(CASES["flow missing"][1], "gre"))
    assert (found["state"], found["stopsAtHop"]) == ("stops", "flow in obr0")
    at = found["hops"][found["stopsAt"] - 1]
    assert (at["name"], at["verdict"]) == ("flow in obr0", "broken") and at["wanted"] and at["todo"]
    assert {hop["verdict"] for hop in found["hops"]} == {"ok", "broken", "unknown"}
    assert {"at": "obr0", "packets": 3} in found["seen"] and {"at": "underlay", "packets": 0} in found["seen"]
