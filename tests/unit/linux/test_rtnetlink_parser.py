"""The rtnetlink parser, on messages of a kernel, of the encoder, and on garbage."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.linux import rtnetlink as rt
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.netlink_socket import messages
from ovsmesh.linux.rtnetlink import AddressEntry, LinkEntry, NeighbourEntry, RouteEntry
from ovsmesh.linux.rtnetlink_parser import parse_address, parse_link, parse_neighbour, parse_route
from tests.support.netlink_recorder import golden

"""A busy machine is no finding."""
RECEIVED = golden("received")
LO, KBR, OBR = 1, 2, 4
PEER_MAC = "0a:58:0a:61:02:01"


def payload(data: bytes) -> memoryview:
    (message,) = messages(data)
    return message.payload


def entries(parse: Any, command: str) -> list[Any]:
    return [parse(payload(data)) for data in RECEIVED[command]]


# what a kernel sent to `ip` and `bridge`


def test_ipv4_routes_of_every_table() -> None:
    assert entries(parse_route, "ip -4 route show table all") == [
        RouteEntry("198.51.100.0/24", 0, "unicast", "", KBR, 0, 3, 1000),
        RouteEntry("0.0.0.0/0", 0, "unicast", "10.97.1.9", KBR, 0, 4, 254),
        RouteEntry("10.97.0.0/16", 4278198272, "unreachable", "", 0, 0, 111, 254),
        RouteEntry("10.97.1.0/24", 0, "unicast", "", KBR, 0, 2, 254),
        RouteEntry("10.97.2.0/24", 111, "unicast", "10.97.2.1", KBR, 1400, 111, 254),
        RouteEntry("10.97.1.1/32", 0, "local", "", KBR, 0, 2, 255),
        RouteEntry("10.97.1.255/32", 0, "broadcast", "", KBR, 0, 2, 255),
        RouteEntry("192.0.2.1/32", 0, "local", "", LO, 0, 2, 255),
    ]


def test_ipv6_routes() -> None:
    managed = [route for route in entries(parse_route, "ip -6 route show table main") if route.protocol == 111]
    assert managed == [
        RouteEntry("fd00:97:2::/64", 111, "unicast", "fd00:97:2::1", KBR, 1462, 111, 254),
        # a route that leads nowhere is on the loopback device
        RouteEntry("fd00:97::/32", 4278198272, "unreachable", "", LO, 0, 111, 254),
    ]


def test_neighbours() -> None:
    permanent = [n for n in entries(parse_neighbour, "ip neigh show nud permanent") if n.state & rt.PERMANENT]
    assert permanent == [
        NeighbourEntry(2, "10.97.2.1", PEER_MAC, KBR, rt.PERMANENT, 111, 0),
        NeighbourEntry(10, "fd00:97:2::1", PEER_MAC, KBR, rt.PERMANENT, 111, 0),
    ]


def test_fdb_entries() -> None:
    found = entries(parse_neighbour, "bridge fdb show brport obr0")
    assert found[0] == NeighbourEntry(rt.AF_BRIDGE, "", PEER_MAC, OBR, rt.NOARP, 0, KBR)
    # the port's own MAC, and a multicast address of the device that is no entry of the bridge
    assert NeighbourEntry(rt.AF_BRIDGE, "", "02:00:00:00:00:05", OBR, rt.PERMANENT, 0, KBR) in found
    assert NeighbourEntry(rt.AF_BRIDGE, "", "33:33:00:00:00:01", OBR, rt.PERMANENT, 0, 0) in found


def test_addresses() -> None:
    found = [a for a in entries(parse_address, "ip address show") if not a.address.startswith("fe80")]
    assert found == [
        # of two ends, the local one
        AddressEntry("192.0.2.1/32", LO, 0),
        AddressEntry("10.97.1.1/24", KBR, 111),
        AddressEntry("fd00:97:1::1/64", KBR, 111),
    ]


def test_a_bridge() -> None:
    (found,) = entries(parse_link, "ip link show dev kbr0")
    assert found == LinkEntry(
        KBR, "kbr0", "bridge", 1400, True, 0, "0a:58:0a:61:01:01", "ovsmesh", False, 0, learned_max=0
    )


def test_a_bridge_port_before_and_after_it_was_made_quiet() -> None:
    port = LinkEntry(OBR, "obr0", "veth", 1400, True, KBR, "02:00:00:00:00:05", "", False, 0)
    assert entries(parse_link, "ip link show dev obr0") == [port]
    assert entries(parse_link, "ip -details link show dev obr0") == [port._replace(quiet=True)]


def test_a_bridges_message_about_its_port() -> None:
    (found,) = entries(parse_link, "bridge link show dev obr0")
    assert (found.family, found.ifindex, found.name, found.quiet, found.hairpin) == (7, OBR, "obr0", True, True)


# what no kernel was asked for


@pytest.mark.parametrize(("offset", "value"), [(8, 0), (9, 2), (0, 28), (0, 128)])
def test_cached_routes_and_other_families_are_none(offset: int, value: int) -> None:
    raw = bytearray(payload(RECEIVED["ip -4 route show table all"][0]))
    raw[offset] = value
    # 0x200, the second byte of the flags: a route of the cache
    assert (parse_route(memoryview(bytes(raw))) is None) is (offset != 8)


QUIET = payload(RECEIVED["ip -details link show dev obr0"][0])


@pytest.mark.parametrize("flag", [8, 9, 27, 30])
def test_a_port_that_learns_or_is_flooded_to_is_not_quiet(flag: int) -> None:
    attribute = bytes([5, 0, flag, 0])
    raw = bytearray(QUIET)
    # a bridge port's settings follow the name of their kind
    raw[raw.index(attribute, raw.index(b"bridge\0")) + 4] = 1
    quiet, noisy = parse_link(QUIET), parse_link(memoryview(bytes(raw)))
    assert quiet is not None and noisy == quiet._replace(quiet=False)


def test_a_link_that_is_no_port_is_not_quiet() -> None:
    link = parse_link(payload(encoder.set_link(9, up=True)))
    assert link is not None and not link.quiet


# round trips

U32 = st.integers(0, 2**32 - 1)
INDEX = st.integers(1, 2**31 - 1)
BYTE = st.integers(0, 255)
V4 = st.integers(0, 2**32 - 1).map(lambda n: str(IPv4Address(n)))
# the C library and Python write addresses that embed IPv4 differently; ovsmesh writes none
V6 = st.integers(2**112, 2**128 - 1).map(lambda n: str(IPv6Address(n)))
MAC = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
ROUTES = st.builds(
    RouteEntry,
    V4.map(lambda a: f"{a}/24") | V6.map(lambda a: f"{a}/64"),
    U32,
    st.just("unicast"),
    st.just(""),
    INDEX,
    U32,
    BYTE,
    st.just(254),
) | st.builds(RouteEntry, V6.map(lambda a: f"{a}/64"), U32, st.just("unicast"), V6, INDEX, U32, BYTE, st.just(254))
NEIGHBOURS = st.builds(NeighbourEntry, st.just(2), V4, MAC, INDEX, st.integers(0, 65535), BYTE, st.just(0))
FDB = st.builds(NeighbourEntry, st.just(7), st.just(""), MAC, INDEX, st.integers(0, 65535), st.just(0), st.just(0))
ADDRESSES = st.builds(AddressEntry, V4.map(lambda a: f"{a}/24") | V6.map(lambda a: f"{a}/64"), INDEX, BYTE)


@given(ROUTES, st.sampled_from([rt.NEWROUTE, rt.DELROUTE]))
def test_routes_come_back_as_they_went(entry: RouteEntry, kind: int) -> None:
    (message,) = messages(encoder.route(kind, 0, entry))
    assert (message.type, parse_route(message.payload)) == (kind, entry)


@given(NEIGHBOURS | FDB)
def test_neighbours_and_fdb_entries_come_back_as_they_went(entry: NeighbourEntry) -> None:
    assert parse_neighbour(payload(encoder.neighbour(rt.NEWNEIGH, 0, entry))) == entry


@given(ADDRESSES)
def test_addresses_come_back_as_they_went(entry: AddressEntry) -> None:
    assert parse_address(payload(encoder.address(rt.NEWADDR, 0, entry))) == entry


# what no kernel sends

PARSERS = (parse_route, parse_neighbour, parse_address, parse_link)
WHOLE = [payload(data) for command in RECEIVED.values() for data in command[:2]]


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.data())
def test_truncated_payloads_never_raise(parse: Any, data: Any) -> None:
    whole = data.draw(st.sampled_from(WHOLE))
    parse(whole[: data.draw(st.integers(0, len(whole)))])


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.data())
def test_garbled_payloads_never_raise(parse: Any, data: Any) -> None:
    raw = bytearray(bytes(data.draw(st.sampled_from(WHOLE))) + data.draw(st.binary(max_size=8)))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(BYTE)
    parse(memoryview(bytes(raw)))
