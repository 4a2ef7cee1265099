"""The ways to the peers on a real kernel: which links and routes count. Notifications tell what a whole read does."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsmesh.checksum import internet_checksum
from ovsmesh.linux.netlink import Netlink
from ovsmesh.mesh.types import IPAddress
from tests.support.firewallkit import inside, namespaces, needs_root, sh

__all__ = ["namespaces"]
pytestmark = [pytest.mark.root, needs_root]

OWN = {4: ip_address("192.0.2.11"), 6: ip_address("2001:db8::11")}
PEERS = {
    4: [ip_address("192.0.2.12"), ip_address("192.0.2.13"), ip_address("198.51.100.14")],
    6: [ip_address("2001:db8::12"), ip_address("2001:db8::13"), ip_address("2001:db8:f::14")],
}
LINKS = ("ip link add eth0 type veth peer name far0", "ip link add eth1 type veth peer name far1")
HOST = (
    "ip link set lo up",
    *LINKS,
    *(f"ip link set {end} mtu 9000 up" for end in ("far0", "eth0")),
    *(f"ip link set {end} up" for end in ("far1", "eth1")),
    "ip addr add 192.0.2.11/24 dev eth0",
    "ip addr add 2001:db8::11/64 dev eth0 nodad",
)


@pytest.fixture
def host(namespaces: Callable[..., list[str]]) -> Iterator[str]:
    """A host with its tunnel addresses on eth0, MTU 9000, and with eth1, MTU 1500."""
    (name,) = namespaces("underlay")
    with inside(name):
        sh("sysctl -q -w net.ipv6.conf.default.accept_dad=0", *HOST)
        yield name


def found(version: int, *peers: IPAddress) -> tuple[int | None, bool]:
    """The smallest MTU on the ways to these peers, and whether all are known, as a whole read has it."""
    net = Netlink()
    try:
        net.reach(OWN[version], peers or PEERS[version][:2])
        return net.underlay_mtu(OWN[version])
    finally:
        net.close()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("commands", "mtu"),
    {
        "an address on lo too": (["ip addr add 192.0.2.11/32 dev lo"], 9000),
        "an address on lo and another link": (["ip addr del 192.0.2.11/24 dev eth0", "ip addr add 192.0.2.11/32 dev lo",
            "ip addr add 192.0.2.21/24 dev eth0"], 9000),
        "an address on a bridge that the way does not take": (["ip link add br0 mtu 1400 type bridge",
            "ip link set br0 up", "ip addr add 192.0.2.11/32 dev br0"], 9000),
        "the address on a bridge, the ways by a link": (["ip link add br0 mtu 1400 type bridge", "ip link set br0 up",
            "ip addr del 192.0.2.11/24 dev eth0", "ip addr add 192.0.2.11/32 dev br0",
            "ip route add 192.0.2.0/24 dev eth0"], 9000),
        "a peer behind another link": (["ip route add 192.0.2.13/32 dev eth1"], 1500),
        "the MTU of a route": (["ip route add 192.0.2.13/32 dev eth0 mtu 1400"], 1400),
        "the locked MTU of a route": (["ip route add 192.0.2.13/32 dev eth0 mtu lock 1300"], 1300),
        "a route with more than its link": (["ip route add 192.0.2.13/32 dev eth1 mtu 9000"], 1500),
        "several next hops": (["ip route add 192.0.2.13/32 nexthop dev eth0 nexthop dev eth1"], 1500),
        "a nexthop object": (["ip nexthop add id 5 dev eth1", "ip route add 192.0.2.13/32 nhid 5"], 1500),
        "a nexthop object alone": (["sysctl -q -w net.ipv4.nexthop_compat_mode=0", "ip nexthop add id 5 dev eth1",
            "ip route add 192.0.2.13/32 nhid 5"], 1500),
        "a policy rule": (["ip rule add from 192.0.2.11 lookup 77", "ip route add default dev eth1 table 77"], 1500),
        "a link that no way takes": (["ip link set eth1 mtu 1280"], 9000),
    }.values(),
)  # fmt: skip
def test_the_smallest_on_the_ways_that_packets_to_peers_take(commands: list[str], mtu: int) -> None:
    sh(*commands)
    assert found(4) == (mtu, True)


@pytest.mark.usefixtures("host")
def test_a_default_route_counts_where_a_peer_is_behind_it() -> None:
    far = PEERS[4][2]
    assert found(4, *PEERS[4]) == (9000, False)
    sh("ip route add default via 192.0.2.1 mtu 1400")
    assert found(4) == (9000, True)
    assert found(4, far) == (1400, True) == found(4, *PEERS[4])


@pytest.mark.usefixtures("host")
def test_what_a_router_advertised_counts_for_ipv6() -> None:
    assert found(6) == (9000, True)
    sh("sysctl -q -w net.ipv6.conf.eth0.mtu=1480")
    assert found(6) == (1480, True) and found(4) == (9000, True)
    sh("ip -6 route add 2001:db8::12/128 dev eth1 mtu 1300")
    assert found(6) == (1300, True)


@pytest.mark.usefixtures("host")
def test_a_path_mtu_that_somebody_on_the_way_said_does_not_count() -> None:
    """It is gone in ten minutes, and whoever can send ICMP can say it."""
    own, peer = OWN[4].packed, PEERS[4][0].packed
    quoted = struct.pack("!BBHHHBBH", 0x45, 0, 1000, 0, 0x4000, 64, 1, 0) + own + peer + bytes(8)
    error = struct.pack("!BBHHH", 3, 4, 0, 0, 600) + quoted
    error = error[:2] + struct.pack("!H", internet_checksum(error)) + error[4:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(error), 0, 0, 64, 1, 0) + peer + own
    head = head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:]
    (eth0,) = json.loads(subprocess.run(["ip", "-j", "link", "show", "eth0"], capture_output=True, check=True).stdout)
    mac = bytes.fromhex(eth0["address"].replace(":", ""))
    sh("sysctl -q -w net.ipv4.conf.eth0.rp_filter=0", "sysctl -q -w net.ipv4.conf.all.rp_filter=0")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as far:
        far.sendto(mac + mac + b"\x08\x00" + head + error, ("far0", 0))
    shown = subprocess.run(["ip", "route", "get", "192.0.2.12"], capture_output=True, text=True, check=True).stdout
    assert "mtu 600" in shown
    assert found(4) == (9000, True)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    "away",
    ["ip addr del 192.0.2.11/24 dev eth0", "ip link set eth0 down", "ip link del eth0", "ip route flush dev eth0"],
)
def test_without_address_route_or_link_no_way_is_known(away: str) -> None:
    sh(away)
    assert found(4) == (None, False)


@pytest.mark.usefixtures("host")
def test_without_a_peer_the_links_with_the_address_count_but_not_lo() -> None:
    net = Netlink()
    net.reach(OWN[4], [])
    try:
        assert net.underlay_mtu(OWN[4]) == (9000, True)
        sh("ip addr add 192.0.2.11/32 dev lo", "ip addr add 192.0.2.11/32 dev eth1")
        assert net.underlay_mtu(OWN[4]) == (1500, True)
        sh("ip addr del 192.0.2.11/24 dev eth0", "ip addr del 192.0.2.11/32 dev eth1")
        assert net.underlay_mtu(OWN[4]) == (None, False)
    finally:
        net.close()


NUMBERS = itertools.count()
ADDRESSES = ("192.0.2.11/24", "192.0.2.11/32", "192.0.2.21/24", "2001:db8::11/64", "2001:db8::21/64", "fe80::7/64")
TARGETS = ("192.0.2.13/32", "192.0.2.12/31", "198.51.100.0/24", "0.0.0.0/0", "2001:db8::13/128", "2001:db8:f::/48")
link, target = st.sampled_from(["eth0", "eth1", "br0"]), st.sampled_from(TARGETS)
mtu = st.sampled_from(["1400", "1500", "4000", "lock 1300"])
table = st.sampled_from(["main", "77"])
CHANGES = st.one_of(
    st.builds("ip addr {} {} dev {}".format, st.sampled_from(["add", "del"]), st.sampled_from(ADDRESSES),
              st.sampled_from(["eth0", "eth1", "br0", "lo"])),
    st.builds("ip link set {} {}".format, link, st.sampled_from(["up", "down", "mtu 1400", "mtu 8000", "nomaster"])),
    st.builds("ip link set far{} {}".format, st.sampled_from("01"), st.sampled_from(["up", "down"])),
    st.builds("ip route replace {} dev {} mtu {} table {}".format, target, link, mtu, table),
    st.builds("ip route add {} dev {} metric 7".format, target, link),
    st.builds("ip route replace {} nexthop dev eth0 nexthop dev eth1".format, target),
    st.builds("ip route del {} table {}".format, target, table),
    st.builds("ip -{} rule {} pref 70 {} lookup 77".format, st.sampled_from("46"), st.sampled_from(["add", "del"]),
              st.sampled_from(["from all", "from 192.0.2.11", "from 203.0.113.1", "to 192.0.2.13", "iif eth1",
                               "not from 192.0.2.11", "from 2001:db8::11"])),
    st.sampled_from(["ip link del eth1", *LINKS[1:], "ip link add br0 type bridge", "ip link set eth1 master br0",
                     "ip link set eth1 name eth9", "ip link set eth9 name eth1",
                     "ip nexthop replace id 5 dev eth0", "ip nexthop replace id 5 dev eth1",
                     "ip route replace 192.0.2.13/32 nhid 5", "ip route add unreachable 192.0.2.12/31",
                     "ip nexthop del id 5", "ip route flush table 77"]),
)  # fmt: skip


@needs_root
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=12))
def test_any_notifications_leave_what_a_whole_read_gives(
    namespaces: Callable[..., list[str]], changes: list[str]
) -> None:
    (name,) = namespaces(f"w{next(NUMBERS)}")
    with inside(name):
        sh("sysctl -q -w net.ipv6.conf.default.accept_dad=0", *HOST)
        followed = {version: Netlink() for version in OWN}
        try:
            for version, net in followed.items():
                net.reach(OWN[version], PEERS[version])
                net.underlay_mtu(OWN[version])
            for number, change in enumerate(changes):
                # many are refused
                subprocess.run(change.split(), check=False, capture_output=True, timeout=10)
                for version, net in followed.items():
                    wait_until_equal(net, version, changes[: number + 1])
        finally:
            for net in followed.values():
                net.close()


def wait_until_equal(net: Netlink, version: int, changes: list[str]) -> None:
    """IPv6 does some of its work later; what it tells then must do."""
    end = time.monotonic() + 20.0
    while True:
        seen, read = net.underlay_mtu(OWN[version]), found(version, *PEERS[version])
        if seen == read:
            return
        assert time.monotonic() < end, (changes, seen, read)
        time.sleep(0.05)
