"""rtnetlink's bytes, with pyroute2 and the kernel's own replies as independent witnesses."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ovsmesh.linux import rtnetlink
from ovsmesh.linux.rtnetlink import AddressEntry, LinkEntry, NeighbourEntry, RouteEntry

CALM = settings(deadline=None)
"""A busy machine is no finding."""

U32 = st.integers(0, 2**32 - 1)
INDEX = st.integers(1, 2**31 - 1)
BYTE = st.integers(0, 255)
V4 = st.integers(0, 2**32 - 1).map(lambda n: str(IPv4Address(n)))
# the C library and Python write addresses that embed IPv4 differently; none of ours does
V6 = st.integers(2**112, 2**128 - 1).map(lambda n: str(IPv6Address(n)))
MAC = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))


def decoded(kind: Any, data: Any) -> Any:
    """What pyroute2 reads in a message, its attributes by name beside the header's fields."""
    message = kind(data)
    message.decode()
    attrs = {attr[0]: attr[1] for attr in message["attrs"]}
    attrs |= {k: {a[0]: a[1] for a in v["attrs"]} for k, v in attrs.items() if isinstance(v, dict)}
    return {**{k: message[k] for k in message if k != "attrs"}, **attrs}


def payload(data: Any) -> Any:
    (message,) = rtnetlink.messages(data)
    return message.payload


def witness(kind: Any, type_: Any, fields: Any, *attrs: Any) -> Any:
    """The bytes of a message as pyroute2 makes it."""
    message = kind()
    for key, value in fields.items():
        message[key] = value
    message["attrs"] = list(attrs)
    message["header"]["type"] = type_
    message.encode()
    return bytes(message.data)


# ours, read by pyroute2

V4_ROUTE = RouteEntry("10.97.2.0/24", 111, "unicast", "10.97.2.1", 7, 1462, 111, 254)
V6_ROUTE = RouteEntry("fd00:97:2::/64", 111, "unicast", "fd00:97:2::1", 7, 1462, 111, 254)


@pytest.mark.parametrize(("entry", "family", "length"), [(V4_ROUTE, 2, 24), (V6_ROUTE, 10, 64)])
def test_a_route_as_pyroute2_reads_it(entry: Any, family: Any, length: Any) -> None:
    found = decoded(rtmsg, rtnetlink.route(rtnetlink.NEWROUTE, rtnetlink.CREATE | rtnetlink.EXCL, 5, entry))
    assert found["header"]["type"] == 24
    assert found["header"]["sequence_number"] == 5
    assert found["header"]["flags"] == 0x601
    # flags 4: the gateway is on-link; scope 0: the universe; type 1: unicast
    assert [found[k] for k in ("family", "dst_len", "table", "proto", "scope", "type", "flags")] == [
        *(family, length, 254, 111, 0, 1, 4)
    ]
    assert f"{found['RTA_DST']}/{length}" == entry.dst
    assert (found["RTA_PRIORITY"], found["RTA_OIF"], found["RTA_GATEWAY"]) == (111, 7, entry.via)
    assert found["RTA_METRICS"] == {"RTAX_MTU": 1462}


@pytest.mark.parametrize("dst", ["10.97.0.0/16", "fd00:97::/32"])
def test_an_unreachable_route_as_pyroute2_reads_it(dst: Any) -> None:
    entry = RouteEntry(dst, 4278198272, "unreachable", "", 0, 0, 111, 254)
    found = decoded(rtmsg, rtnetlink.route(rtnetlink.NEWROUTE, 0, 1, entry))
    assert (found["type"], found["flags"], found["RTA_PRIORITY"]) == (7, 0, 4278198272)
    assert not {"RTA_GATEWAY", "RTA_OIF", "RTA_METRICS"} & set(found)


@pytest.mark.parametrize(("address", "family"), [("10.97.2.1", 2), ("fd00:97:2::1", 10)])
def test_a_neighbour_as_pyroute2_reads_it(address: Any, family: Any) -> None:
    entry = NeighbourEntry(0, address, "0a:58:0a:61:02:01", 9, rtnetlink.PERMANENT, 111, 0)
    found = decoded(ndmsg, rtnetlink.neighbour(rtnetlink.NEWNEIGH, rtnetlink.CREATE | rtnetlink.REPLACE, 5, entry))
    assert [found[k] for k in ("family", "ifindex", "state", "flags")] == [family, 9, 0x80, 0]
    assert [found[k] for k in ("NDA_DST", "NDA_LLADDR", "NDA_PROTOCOL")] == [address, "0a:58:0a:61:02:01", 111]


def test_an_fdb_entry_as_pyroute2_reads_it() -> None:
    entry = NeighbourEntry(rtnetlink.AF_BRIDGE, "", "0a:58:0a:61:02:01", 9, rtnetlink.NOARP, 0, 0)
    found = decoded(ndmsg, rtnetlink.neighbour(rtnetlink.NEWNEIGH, 0, 5, entry))
    # flags 4 (NTF_MASTER): the bridge's own table, not the port device's
    assert [found[k] for k in ("family", "ifindex", "state", "flags")] == [7, 9, 0x40, 4]
    assert found["NDA_LLADDR"] == "0a:58:0a:61:02:01"
    assert "NDA_DST" not in found


@pytest.mark.parametrize(("address", "family", "flags"), [("10.97.1.1/24", 2, 0), ("fd00:97:1::1/64", 10, 2)])
def test_an_address_as_pyroute2_reads_it(address: Any, family: Any, flags: Any) -> None:
    found = decoded(ifaddrmsg, rtnetlink.address(rtnetlink.NEWADDR, 0, 5, AddressEntry(address, 9, 111)))
    text, _, length = address.partition("/")
    assert [found[k] for k in ("family", "prefixlen", "index", "flags")] == [family, int(length), 9, flags]
    assert found["IFA_ADDRESS"] == found["IFA_LOCAL"] == text
    # IFA_PROTO, which pyroute2 may not know by name
    assert b"\x05\x00\x0b\x00\x6f" in rtnetlink.address(rtnetlink.NEWADDR, 0, 5, AddressEntry(address, 9, 111))
    assert b"\x05\x00\x0b\x00" not in rtnetlink.address(rtnetlink.DELADDR, 0, 5, AddressEntry(address, 9, 0))


def test_a_new_bridge_as_pyroute2_reads_it() -> None:
    found = decoded(ifinfmsg, rtnetlink.new_bridge(5, "ovsmesh-new", "0a:58:0a:61:01:01", 1462))
    assert found["header"]["type"] == 16
    # never in the place of one that is there
    assert found["header"]["flags"] & 0x600 == 0x600
    assert (found["IFLA_IFNAME"], found["IFLA_ADDRESS"], found["IFLA_MTU"]) == (
        "ovsmesh-new",
        "0a:58:0a:61:01:01",
        1462,
    )
    assert found["IFLA_LINKINFO"]["IFLA_INFO_KIND"] == "bridge"
    assert found["flags"] == found["change"] == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"flags": 0, "change": 0}),
        ({"up": True}, {"flags": 1, "change": 1}),
        ({"up": False}, {"flags": 0, "change": 1}),
        ({"mtu": 1462}, {"IFLA_MTU": 1462, "change": 0}),
        ({"mac": "0a:58:0a:61:01:01"}, {"IFLA_ADDRESS": "0a:58:0a:61:01:01"}),
        ({"alias": "ovsmesh"}, {"IFLA_IFALIAS": "ovsmesh"}),
        ({"name": "kbr0"}, {"IFLA_IFNAME": "kbr0"}),
        ({"master": 4}, {"IFLA_MASTER": 4}),
        ({"master": 0}, {"IFLA_MASTER": 0}),
    ],
)
def test_a_changed_link_as_pyroute2_reads_it(given: Any, expected: Any) -> None:
    found = decoded(ifinfmsg, rtnetlink.set_link(5, 9, **given))
    assert found["index"] == 9
    assert {key: found[key] for key in expected} == expected
    assert {key for key in found if key.startswith("IFLA_")} == {key for key in expected if key.startswith("IFLA_")}


def test_a_quiet_port_as_pyroute2_reads_it() -> None:
    found = decoded(ifinfmsg, rtnetlink.quiet_port(5, 9))
    assert (found["family"], found["index"]) == (7, 9)
    words = ("LEARNING", "UNICAST_FLOOD", "MCAST_FLOOD", "BCAST_FLOOD")
    assert found["IFLA_PROTINFO"] == {f"IFLA_BRPORT_{word}": 0 for word in words}


@pytest.mark.parametrize(
    ("data", "type_"),
    [(rtnetlink.del_link(5, 9), 17), (rtnetlink.get_link(5, 9), 18), (rtnetlink.set_link(5, 9, up=True), 19)],
)
def test_what_is_asked_of_a_link(data: Any, type_: Any) -> None:
    found = decoded(ifinfmsg, data)
    assert (found["header"]["type"], found["index"]) == (type_, 9)


@pytest.mark.parametrize(
    ("kind", "reader", "header"),
    [
        (rtnetlink.GETROUTE, rtmsg, 12),
        (rtnetlink.GETNEIGH, ndmsg, 12),
        (rtnetlink.GETADDR, ifaddrmsg, 8),
        (rtnetlink.GETLINK, ifinfmsg, 16),
    ],
)
def test_a_dump_is_asked_for_with_the_whole_header(kind: Any, reader: Any, header: Any) -> None:
    data = rtnetlink.dump(kind, 5, 10)
    found = decoded(reader, data)
    assert found["family"] == 10
    assert found["header"]["flags"] == 0x301
    assert len(data) == found["header"]["length"] == 16 + header


# pyroute2's, read by ours


def test_a_route_of_pyroute2() -> None:
    data = witness(
        rtmsg,
        24,
        {"family": 2, "dst_len": 24, "table": 254, "proto": 4, "type": 1},
        ("RTA_DST", "10.97.2.0"),
        ("RTA_PRIORITY", 20),
        ("RTA_OIF", 3),
        ("RTA_GATEWAY", "192.0.2.1"),
        ("RTA_METRICS", {"attrs": [("RTAX_MTU", 1400)]}),
    )
    assert rtnetlink.parse_route(payload(data)) == RouteEntry(
        "10.97.2.0/24", 20, "unicast", "192.0.2.1", 3, 1400, 4, 254
    )


def test_a_default_route_has_no_destination_attribute() -> None:
    for family, dst in ((2, "0.0.0.0/0"), (10, "::/0")):
        data = witness(rtmsg, 24, {"family": family, "table": 254, "proto": 9, "type": 1}, ("RTA_OIF", 3))
        assert rtnetlink.parse_route(payload(data)) == RouteEntry(dst, 0, "unicast", "", 3, 0, 9, 254)


def test_a_table_above_255_is_read_from_its_attribute() -> None:
    data = witness(rtmsg, 24, {"family": 2, "dst_len": 8, "table": 252}, ("RTA_DST", "10.0.0.0"), ("RTA_TABLE", 1000))
    route = rtnetlink.parse_route(payload(data))
    assert route is not None and route.table == 1000


@pytest.mark.parametrize("fields", [{"family": 2, "flags": 0x200}, {"family": 28}, {"family": 128}])
def test_cached_routes_and_other_families_are_none(fields: Any) -> None:
    assert rtnetlink.parse_route(payload(witness(rtmsg, 24, fields))) is None


def test_a_neighbour_of_pyroute2() -> None:
    data = witness(
        ndmsg,
        28,
        {"family": 10, "ifindex": 4, "state": 2},
        ("NDA_DST", "fd00::1"),
        ("NDA_LLADDR", "02:00:00:00:00:01"),
    )
    assert rtnetlink.parse_neighbour(payload(data)) == NeighbourEntry(10, "fd00::1", "02:00:00:00:00:01", 4, 2, 0, 0)


def test_an_fdb_entry_of_pyroute2_tells_its_bridge() -> None:
    data = witness(
        ndmsg,
        28,
        {"family": 7, "ifindex": 4, "state": 0x40},
        ("NDA_LLADDR", "02:00:00:00:00:01"),
        ("NDA_MASTER", 3),
    )
    assert rtnetlink.parse_neighbour(payload(data)) == NeighbourEntry(7, "", "02:00:00:00:00:01", 4, 0x40, 0, 3)


def test_a_point_to_point_address_is_the_local_one() -> None:
    data = witness(
        ifaddrmsg,
        20,
        {"family": 2, "prefixlen": 32, "index": 4},
        ("IFA_ADDRESS", "192.0.2.2"),
        ("IFA_LOCAL", "192.0.2.1"),
    )
    assert rtnetlink.parse_address(payload(data)) == AddressEntry("192.0.2.1/32", 4, 0)


def test_a_link_of_pyroute2() -> None:
    data = witness(
        ifinfmsg,
        16,
        {"family": 0, "index": 4, "flags": 0x1043},
        ("IFLA_IFNAME", "kbr0"),
        ("IFLA_MTU", 1462),
        ("IFLA_ADDRESS", "0a:58:0a:61:01:01"),
        ("IFLA_IFALIAS", "ovsmesh"),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]}),
    )
    assert rtnetlink.parse_link(payload(data)) == LinkEntry(
        4, "kbr0", "bridge", 1462, True, 0, "0a:58:0a:61:01:01", "ovsmesh", False, 0
    )


def test_hairpin_of_pyroute2() -> None:
    data = witness(
        ifinfmsg,
        16,
        {"family": 7, "index": 6, "flags": 0x1043},
        ("IFLA_IFNAME", "veth1"),
        ("IFLA_MASTER", 4),
        ("IFLA_PROTINFO", {"attrs": [("IFLA_BRPORT_MODE", 1)]}),
    )
    found = rtnetlink.parse_link(payload(data))
    assert found is not None and found.hairpin and found.family == rtnetlink.AF_BRIDGE
    attrs = rtnetlink._attrs(payload(rtnetlink.hairpin_port(1, 6)), rtnetlink._IFINFO.size)
    assert rtnetlink._attrs(memoryview(attrs[12]), 0) == {4: b"\1"}


def port_flags(*values: Any) -> Any:
    """A link message of a bridge port with LEARNING, UNICAST_FLOOD, MCAST_FLOOD and BCAST_FLOOD as given."""
    attr = rtnetlink._attr
    flags = b"".join(attr(kind, bytes([value])) for kind, value in zip((8, 9, 27, 30), values, strict=False))
    info = attr(1, b"tun\0") + attr(4, b"bridge\0") + attr(5, flags)
    return memoryview(
        rtnetlink._IFINFO.pack(0, 1, 5, 1, 0) + attr(3, b"obr0\0") + attr(10, struct.pack("=I", 4)) + attr(18, info)
    )


@pytest.mark.parametrize(
    ("values", "quiet"),
    [((0, 0, 0, 0), True), ((1, 0, 0, 0), False), ((0, 1, 0, 0), False), ((0, 0, 1, 0), False), ((0, 0, 0, 1), False)],
)
def test_a_port_is_quiet_when_it_neither_learns_nor_floods(values: Any, quiet: Any) -> None:
    link = rtnetlink.parse_link(port_flags(*values))
    assert link is not None and (link.quiet, link.kind, link.master) == (quiet, "tun", 4)


def test_a_link_that_is_no_port_is_not_quiet() -> None:
    link = rtnetlink.parse_link(payload(rtnetlink.set_link(1, 9, up=True)))
    assert link is not None and not link.quiet


# round trips


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


@CALM
@given(ROUTES, st.sampled_from([rtnetlink.NEWROUTE, rtnetlink.DELROUTE]), U32)
def test_routes_come_back_as_they_went(entry: Any, kind: Any, seq: Any) -> None:
    (message,) = rtnetlink.messages(rtnetlink.route(kind, 0, seq, entry))
    assert (message.type, message.seq, rtnetlink.parse_route(message.payload)) == (kind, seq, entry)


@CALM
@given(st.builds(NeighbourEntry, st.just(2), V4, MAC, INDEX, st.integers(0, 65535), BYTE, st.just(0)))
def test_neighbours_come_back_as_they_went(entry: Any) -> None:
    assert rtnetlink.parse_neighbour(payload(rtnetlink.neighbour(rtnetlink.NEWNEIGH, 0, 1, entry))) == entry


@CALM
@given(st.builds(NeighbourEntry, st.just(7), st.just(""), MAC, INDEX, st.integers(0, 65535), st.just(0), st.just(0)))
def test_fdb_entries_come_back_as_they_went(entry: Any) -> None:
    assert rtnetlink.parse_neighbour(payload(rtnetlink.neighbour(rtnetlink.NEWNEIGH, 0, 1, entry))) == entry


@CALM
@given(st.builds(AddressEntry, V4.map(lambda a: f"{a}/24") | V6.map(lambda a: f"{a}/64"), INDEX, BYTE))
def test_addresses_come_back_as_they_went(entry: Any) -> None:
    assert rtnetlink.parse_address(payload(rtnetlink.address(rtnetlink.NEWADDR, 0, 1, entry))) == entry


@CALM
@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 40))
def test_messages_in_one_read_are_told_apart_and_a_cut_one_is_left_out(bodies: Any, cut: Any) -> None:
    data, ends = b"", []
    for seq, body in enumerate(bodies):
        one = rtnetlink._pack(rtnetlink.NEWROUTE, 0, seq, body)
        ends.append(len(data) + len(one))
        data += one + b"\0" * (-len(one) % 4)
    data = data[: max(0, len(data) - cut)]
    found = list(rtnetlink.messages(data))
    assert [bytes(m.payload) for m in found] == [b for b, end in zip(bodies, ends, strict=True) if end <= len(data)]


# what the kernel would never say

PARSERS = (rtnetlink.parse_route, rtnetlink.parse_neighbour, rtnetlink.parse_address, rtnetlink.parse_link)
WHOLE = [
    payload(rtnetlink.route(rtnetlink.NEWROUTE, 0, 1, V4_ROUTE)),
    payload(rtnetlink.route(rtnetlink.NEWROUTE, 0, 1, V6_ROUTE)),
    payload(
        rtnetlink.neighbour(
            rtnetlink.NEWNEIGH, 0, 1, NeighbourEntry(0, "10.97.2.1", "0a:58:0a:61:02:01", 9, 128, 111, 0)
        )
    ),
    payload(rtnetlink.address(rtnetlink.NEWADDR, 0, 1, AddressEntry("fd00:97:1::1/64", 9, 111))),
    payload(rtnetlink.new_bridge(1, "kbr0", "0a:58:0a:61:01:01", 1462)),
    port_flags(0, 0, 0, 0),
]


@CALM
@given(st.binary(max_size=64))
def test_garbage_does_not_split_into_nonsense(data: Any) -> None:
    for message in rtnetlink.messages(data):
        assert len(message.payload) <= len(data) - 16


@pytest.mark.parametrize("parse", PARSERS)
@CALM
@given(data=st.data())
def test_truncated_payloads_never_raise(parse: Any, data: Any) -> None:
    whole = data.draw(st.sampled_from(WHOLE))
    parse(whole[: data.draw(st.integers(0, len(whole)))])


@pytest.mark.parametrize("parse", PARSERS)
@CALM
@given(data=st.data())
def test_garbled_payloads_never_raise(parse: Any, data: Any) -> None:
    raw = bytearray(bytes(data.draw(st.sampled_from(WHOLE))) + data.draw(st.binary(max_size=8)))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(BYTE)
    parse(memoryview(bytes(raw)))


@pytest.mark.parametrize(("raw", "code"), [(struct.pack("=i", -17), 17), (struct.pack("=i", 0) + b"\0" * 16, 0)])
def test_an_errors_code(raw: Any, code: Any) -> None:
    assert rtnetlink.error_of(rtnetlink.Message(rtnetlink.ERROR, 0, 1, memoryview(raw))) == code
