"""The rtnetlink driver on a real kernel, with `ip` and `bridge` as its witnesses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from ovsmesh.dataplane.types import FDB_LEARNED, KBR, MARK, OBR, PROTOCOL, Link, Route
from ovsmesh.errors import OvsmeshError
from ovsmesh.linux import rtnetlink
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.netlink import Netlink
from ovsmesh.linux.netlink_socket import attributes
from tests.support.firewallkit import inside, namespaces, needs_root, sh

__all__ = ["namespaces"]
pytestmark = [pytest.mark.root, needs_root]

MAC = "0a:58:0a:61:01:01"
BRIDGE = Link("bridge", 1462, mac=MAC)
PORT = Link("", 1462, master=KBR, quiet=True)
PEER_MAC = "0a:58:0a:61:02:01"
PEERS = 200


@pytest.fixture
def net(namespaces: Callable[..., list[str]]) -> Iterator[Netlink]:
    """A driver in a namespace that has a veth in the place of obr0, and no kbr0."""
    (name,) = namespaces("net")
    with inside(name):
        sh("ip link set lo up", f"ip link add {OBR} type veth peer name other", "ip link set other up")
        made = Netlink()
        made.observe()
        yield made
        made.close()


def printed(*command: str) -> Any:
    """What `ip` or `bridge` prints, as JSON."""
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout or "[]")


def test_requests_with_one_reply_each_are_answered_in_order(net: Netlink) -> None:
    sh("ip addr add 192.0.2.1/24 dev other", f"ip link set {OBR} up")
    own, asked = ip_address("192.0.2.1"), [ip_address("192.0.2.0") + n % 256 for n in range(400)]
    asked[7] = ip_address("203.0.113.1")
    found = net._requests.ask([encoder.get_output_route(peer, own, 0) for peer in asked])
    dsts = [None if reply is None else attributes(reply.payload, 12)[1] for reply in found]
    assert dsts == [None if peer == asked[7] else peer.packed for peer in asked]


def wire(net: Netlink) -> None:
    net.set_link(KBR, BRIDGE, None)
    net.set_link(OBR, PORT, None)
    net.observe()


def steps(mtu: int = 1462) -> dict[tuple[str, Any], Any]:
    """(kind, key) → value, of addresses and of what there is for each peer, in IPv4 and IPv6."""
    found: dict[tuple[str, Any], Any] = {("addresses", "10.97.1.1/24"): KBR, ("addresses", "fd00:97:1::1/64"): KBR}
    for n in range(2, PEERS + 2):
        mac = f"0a:58:0a:61:{n:02x}:01"
        found["fdb", mac] = OBR
        for gateway, cidr in ((f"10.97.{n}.1", f"10.97.{n}.0/24"), (f"fd00:97:{n}::1", f"fd00:97:{n}::/64")):
            found["neighbours", gateway] = mac
            found["routes", (cidr, 111)] = Route("unicast", gateway, KBR, mtu)
    found["routes", ("10.97.0.0/16", 4278198272)] = Route("unreachable")
    found["routes", ("fd00:97::/32", 4278198272)] = Route("unreachable")
    return found


def write(net: Netlink, op: str, entries: dict[tuple[str, Any], Any]) -> dict[Any, str]:
    return net.batch([(at, net.message(op, *at, value)) for at, value in entries.items()])


def test_kbr0_is_made_marked_and_up(net: Netlink) -> None:
    net.set_link(KBR, BRIDGE, None)
    (link,) = printed("ip", "-j", "-d", "link", "show", KBR)
    assert (link["address"], link["mtu"], link["ifalias"], link["linkinfo"]["info_kind"]) == (MAC, 1462, MARK, "bridge")
    assert "UP" in link["flags"]
    assert net.observe()[0]["links"] == {KBR: BRIDGE}


def test_a_kbr0_that_was_renamed_is_renamed_back_with_its_ports(net: Netlink) -> None:
    wire(net)
    (before,) = printed("ip", "-j", "link", "show", KBR)
    for command in (f"ip link set {KBR} down", f"ip link set {KBR} name astray"):
        sh(command)
    assert KBR not in net.observe()[0]["links"]
    net.set_link(KBR, BRIDGE, None)
    (after,) = printed("ip", "-j", "link", "show", KBR)
    assert after["ifindex"] == before["ifindex"] and "UP" in after["flags"]
    assert net.observe()[0]["links"][KBR] == BRIDGE
    assert printed("bridge", "-j", "link", "show", "dev", OBR)[0]["master"] == KBR


def test_obr0_is_enslaved_and_quiet(net: Netlink) -> None:
    wire(net)
    (port,) = printed("bridge", "-j", "-d", "link", "show", "dev", OBR)
    assert (port["master"], port["mtu"]) == (KBR, 1462)
    assert not [flag for flag in ("learning", "flood", "mcast_flood", "bcast_flood") if port[flag]]


def test_only_what_differs_of_a_link_is_set(net: Netlink) -> None:
    wire(net)
    net.set_link(KBR, BRIDGE._replace(mtu=1400, up=False), BRIDGE)
    (link,) = printed("ip", "-j", "link", "show", KBR)
    assert link["mtu"] == 1400 and "UP" not in link["flags"] and link["address"] == MAC


def test_a_stale_half_made_bridge_is_replaced(net: Netlink) -> None:
    sh("ip link add ovsmesh-new type bridge")
    net.set_link(KBR, BRIDGE, None)
    assert {link["ifname"] for link in printed("ip", "-j", "link", "show", "type", "bridge")} == {KBR}


def test_an_unmanaged_kbr0_is_an_error_and_stays(net: Netlink) -> None:
    sh(f"ip link add {KBR} type bridge")
    with pytest.raises(OvsmeshError, match=os.strerror(errno.EEXIST)):
        net.set_link(KBR, BRIDGE, None)
    (link,) = printed("ip", "-j", "link", "show", "type", "bridge")
    assert link["ifname"] == KBR and "ifalias" not in link


def test_entries_of_many_peers_are_as_ip_and_bridge_read_them(net: Netlink) -> None:
    wire(net)
    want = steps()
    assert write(net, "+", want) == {}
    routes = [
        (route["dst"], route.get("gateway"), route["metric"], route["metrics"][0]["mtu"], route["flags"])
        for version in "46"
        for route in printed("ip", f"-{version}", "-j", "route", "show", "proto", str(PROTOCOL))
        if route.get("type", "unicast") == "unicast"
    ]
    assert sorted(routes) == sorted(
        (key[0], value.via, 111, 1462, ["onlink"])
        for (kind, key), value in want.items()
        if kind == "routes" and value.via
    )
    neighbours = {n["dst"]: n["lladdr"] for n in printed("ip", "-j", "neigh", "show", "dev", KBR, "nud", "permanent")}
    assert neighbours == {key: value for (kind, key), value in want.items() if kind == "neighbours"}
    static = {e["mac"] for e in printed("bridge", "-j", "fdb", "show", "brport", OBR, "static")}
    fdb = {mac for mac in static if mac.startswith("0a:58:")}
    assert fdb == {key for kind, key in want if kind == "fdb"}
    found, unmanaged = net.observe()
    assert {(kind, key): value for kind in found if kind != "links" for key, value in found[kind].items()} == want
    # the veth that stands for the switch's port is no such port
    assert [conflict.key for conflict in unmanaged] == [OBR]


def test_entries_are_changed_and_removed(net: Netlink) -> None:
    wire(net)
    write(net, "+", steps())
    changed = {at: value for at, value in steps(mtu=1400).items() if at[0] == "routes" and value.via}
    assert write(net, "~", changed) == {}
    assert set(net.observe()[0]["routes"].values()) - {Route("unreachable")} == set(changed.values())
    assert write(net, "-", dict(reversed(steps(mtu=1400).items()))) == {}
    found, _ = net.observe()
    assert not any(found[kind] for kind in found if kind != "links")
    assert not printed("ip", "-j", "route", "show", "proto", str(PROTOCOL))


def test_routes_with_a_smaller_mtu_than_kbr0_are_told_from_the_others(net: Netlink) -> None:
    assert net.small_routes() == {}
    wire(net)
    small = {at: value._replace(mtu=1400) for at, value in steps().items() if at[1] == ("10.97.7.0/24", 111)}
    write(net, "+", steps() | small)
    assert net.small_routes() == {"10.97.7.0/24": 1400}
    net.set_link(KBR, BRIDGE._replace(mtu=1400), BRIDGE)
    assert net.small_routes() == {}


def test_an_unmanaged_route_is_not_replaced_and_the_others_are_written(net: Netlink) -> None:
    wire(net)
    sh(f"ip route add 10.97.7.0/24 dev {KBR} metric 111 proto static")
    at = ("routes", ("10.97.7.0/24", 111))
    assert write(net, "+", steps()) == {at: os.strerror(errno.EEXIST)}
    found, _ = net.observe()
    assert len(found["routes"]) == len([1 for kind, _ in steps() if kind == "routes"]) - 1
    (route,) = printed("ip", "-j", "route", "show", "10.97.7.0/24")
    assert route["protocol"] == "static"


def test_a_pods_port_is_enslaved_again_with_its_hairpin(net: Netlink) -> None:
    wire(net)
    sh(
        "ip link add pod type veth peer name inside",
        f"ip link set pod master {KBR}",
        "bridge link set dev pod hairpin on",
    )
    net.observe()
    sh(f"ip link del {KBR}")
    assert net.drain()
    net.observe()
    wire(net)
    (port,) = printed("bridge", "-j", "-d", "link", "show", "dev", "pod")
    assert (port["master"], port["hairpin"]) == (KBR, True)
    assert OBR in net.cache.ports_of(KBR)


def test_changes_of_others_are_noticed_without_a_dump(net: Netlink) -> None:
    wire(net)
    write(net, "+", steps())
    net.observe()
    net.drain()
    assert not net.drain()
    sh(
        "ip route del 10.97.9.0/24",
        f"bridge fdb del 0a:58:0a:61:09:01 dev {OBR} master",
        f"ip neigh del 10.97.9.1 dev {KBR}",
    )
    assert net.drain() and not net.cache.stale
    found, _ = net.observe()
    assert ("10.97.9.0/24", 111) not in found["routes"]
    assert "0a:58:0a:61:09:01" not in found["fdb"] and "10.97.9.1" not in found["neighbours"]


def neighbour_messages(net: Netlink) -> list[int]:
    return [m.type for m in net._notifications.notifications() if m.type in (rtnetlink.NEWNEIGH, rtnetlink.DELNEIGH)]


def test_what_pods_make_the_kernel_learn_is_not_told(net: Netlink) -> None:
    wire(net)
    sh("ip link set other up", f"ip link set {KBR} up", f"ip link set {OBR} up")
    neighbour_messages(net)
    sh(
        f"bridge fdb add 02:00:00:00:00:05 dev {OBR} master dynamic",
        f"ip neigh add 10.97.1.5 lladdr 02:00:00:00:00:05 dev {KBR} nud stale",
        f"ip neigh add fd00:97:1::5 lladdr 02:00:00:00:00:05 dev {KBR} nud reachable",
        f"ip neigh del 10.97.1.5 dev {KBR}",
    )
    assert neighbour_messages(net) == []
    # and what is managed is told, whatever takes its place
    net.batch([("n", net.message("+", "neighbours", "10.97.2.1", MAC)), ("f", net.message("+", "fdb", PEER_MAC, OBR))])
    assert len(neighbour_messages(net)) == 2
    sh(f"bridge fdb replace {PEER_MAC} dev {OBR} master dynamic")
    assert neighbour_messages(net)
    sh(f"ip neigh del 10.97.2.1 dev {KBR}")
    assert rtnetlink.DELNEIGH in neighbour_messages(net)


def test_fdb_entries_of_peers_are_sticky_and_what_kbr0_learns_is_limited(net: Netlink) -> None:
    wire(net)
    assert net.cache.links[net.cache.index(KBR) or 0].learned_max in (FDB_LEARNED, None)
    net.batch([("f", net.message("+", "fdb", PEER_MAC, OBR))])
    assert net.observe()[0]["fdb"] == {PEER_MAC: OBR} and not net.problems()
    sh(f"bridge fdb replace {PEER_MAC} dev {OBR} master static")
    assert net.observe()[0]["fdb"] == {PEER_MAC: f"{OBR} (not sticky)"}


def test_a_kernel_without_sticky_entries_is_named(net: Netlink) -> None:
    wire(net)
    net.message("+", "fdb", PEER_MAC, OBR)
    sh(f"bridge fdb replace {PEER_MAC} dev {OBR} master static")
    # as if the kernel had kept nothing of the flag
    assert net.observe()[0]["fdb"] == {PEER_MAC: OBR}
    assert [problem.field for problem in net.problems()] == ["sticky"]
