"""The messages that ovsmesh sends, compared with those that `ip`, `bridge` and `genl` send for the same."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from ovsmesh.errors import OvsmeshError
from ovsmesh.linux import rtnetlink as rt
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.rtnetlink import AddressEntry, NeighbourEntry, RouteEntry
from tests.support.netlink_recorder import golden

SENT = golden("sent")
KBR, OBR = 2, 4
MAC, PEER_MAC = "0a:58:0a:61:01:01", "0a:58:0a:61:02:01"
ADD, CHANGE = rt.CREATE | rt.EXCL, rt.CREATE | rt.REPLACE
V4_ROUTE = RouteEntry("10.97.2.0/24", 111, "unicast", "10.97.2.1", KBR, 1462, 111, 254)
V6_ROUTE = RouteEntry("fd00:97:2::/64", 111, "unicast", "fd00:97:2::1", KBR, 1462, 111, 254)
V4_UNREACHABLE = RouteEntry("10.97.0.0/16", 4278198272, "unreachable", "", 0, 0, 111, 254)
V6_UNREACHABLE = V4_UNREACHABLE._replace(dst="fd00:97::/32")
V4_NEIGHBOUR = NeighbourEntry(0, "10.97.2.1", PEER_MAC, KBR, rt.PERMANENT, 111, 0)
V6_NEIGHBOUR = V4_NEIGHBOUR._replace(dst="fd00:97:2::1")
FDB = NeighbourEntry(rt.AF_BRIDGE, "", PEER_MAC, OBR, rt.NOARP, 0, 0)

ACK = 0x4
HEADERS = {16: 16, 17: 16, 18: 16, 19: 16, 20: 8, 21: 8, 22: 8, 24: 12, 25: 12, 26: 12, 28: 12, 29: 12, 30: 12}
"""Message type → bytes of its own header, from <linux/rtnetlink.h>."""
NESTED = {(16, 18), (19, 12), (24, 8), (25, 8)}
"""(message type, attribute type) of attributes that hold attributes: link info, port settings, metrics."""


def attributes(type_: int, data: bytes, depth: int = 0) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while data:
        size, kind = int.from_bytes(data[:2], sys.byteorder), int.from_bytes(data[2:4], sys.byteorder)
        value: Any = data[4:size]
        if depth == 0 and (type_, kind & 0x3FFF) in NESTED:
            value = attributes(type_, value, 1)
        elif type_ == 16 and value.rstrip(b"\0").isalpha():
            # `ip` leaves out the end of some strings; the kernel takes both
            value = value.rstrip(b"\0")
        assert size >= 4 and kind not in found
        found[kind] = value
        data = data[(size + 3) & ~3 :]
    return found


def parts(data: bytes, header: int = 0) -> tuple[int, int, bytes, dict[int, Any]]:
    """A message's type, flags (but for ACK, which the socket adds), own header and attributes, whatever their order."""
    assert int.from_bytes(data[:4], sys.byteorder) == len(data) and len(data) % 4 == 0
    type_ = int.from_bytes(data[4:6], sys.byteorder)
    assert data[8:16] == bytes(8)
    end = 16 + (header or HEADERS[type_])
    return (
        type_,
        int.from_bytes(data[6:8], sys.byteorder) & ~ACK,
        data[16:end],
        attributes(type_, data[end:]),
    )


SAME = {
    "ip link add ovsmesh-new address 0a:58:0a:61:01:01 mtu 1462 type bridge": encoder.new_bridge(
        "ovsmesh-new", MAC, 1462
    ),
    "ip link set ovsmesh-new alias ovsmesh": encoder.set_link(KBR, alias="ovsmesh"),
    "ip link set ovsmesh-new name kbr0": encoder.set_link(KBR, name="kbr0"),
    "ip link set kbr0 up": encoder.set_link(KBR, up=True),
    "ip link set kbr0 down": encoder.set_link(KBR, up=False),
    "ip link set kbr0 mtu 1400": encoder.set_link(KBR, mtu=1400),
    "ip link set kbr0 address 0a:58:0a:61:01:01": encoder.set_link(KBR, mac=MAC),
    "ip link set obr0 master kbr0": encoder.set_link(OBR, master=KBR),
    "ip link set obr0 nomaster": encoder.set_link(OBR, master=0),
    "ip link del kbr0": encoder.del_link(KBR),
    "bridge link set dev obr0 learning off flood off mcast_flood off bcast_flood off": encoder.quiet_port(OBR),
    "bridge link set dev obr0 hairpin on": encoder.hairpin_port(OBR),
    "ip address replace 10.97.1.1/24 dev kbr0 proto 111": encoder.address(
        rt.NEWADDR, CHANGE, AddressEntry("10.97.1.1/24", KBR, 111)
    ),
    "ip address replace fd00:97:1::1/64 dev kbr0 nodad proto 111": encoder.address(
        rt.NEWADDR, CHANGE, AddressEntry("fd00:97:1::1/64", KBR, 111)
    ),
    "ip address del 10.97.1.1/24 dev kbr0": encoder.address(rt.DELADDR, 0, AddressEntry("10.97.1.1/24", KBR, 0)),
    "ip route add 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111 mtu 1462": encoder.route(
        rt.NEWROUTE, ADD, V4_ROUTE
    ),
    "ip route add fd00:97:2::/64 via fd00:97:2::1 dev kbr0 onlink proto 111 metric 111 mtu 1462": encoder.route(
        rt.NEWROUTE, ADD, V6_ROUTE
    ),
    "ip route replace 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111 mtu 1400": encoder.route(
        rt.NEWROUTE, CHANGE, V4_ROUTE._replace(mtu=1400)
    ),
    "ip route add unreachable 10.97.0.0/16 proto 111 metric 4278198272": encoder.route(
        rt.NEWROUTE, ADD, V4_UNREACHABLE
    ),
    "ip route add unreachable fd00:97::/32 proto 111 metric 4278198272": encoder.route(
        rt.NEWROUTE, ADD, V6_UNREACHABLE
    ),
    "ip neigh replace 10.97.2.1 lladdr 0a:58:0a:61:02:01 dev kbr0 nud permanent protocol 111": encoder.neighbour(
        rt.NEWNEIGH, CHANGE, V4_NEIGHBOUR
    ),
    "ip neigh replace fd00:97:2::1 lladdr 0a:58:0a:61:02:01 dev kbr0 nud permanent protocol 111": encoder.neighbour(
        rt.NEWNEIGH, CHANGE, V6_NEIGHBOUR
    ),
}


@pytest.mark.parametrize("command", SAME)
def test_a_message_is_the_one_of_iproute2(command: str) -> None:
    (theirs,) = SENT[command]
    assert parts(SAME[command]) == parts(theirs)


def test_an_fdb_entry_differs_from_that_of_bridge_by_one_state() -> None:
    (theirs,) = SENT["bridge fdb replace 0a:58:0a:61:02:01 dev obr0 master static"]
    # NUD_REACHABLE, which the kernel does not look at where NUD_NOARP is set
    patched = bytearray(theirs)
    assert patched[24] == rt.NOARP | 0x02
    patched[24] = rt.NOARP
    assert parts(encoder.neighbour(rt.NEWNEIGH, CHANGE, FDB)) == parts(bytes(patched))


DELETED = {
    # what of the header differs: the scope, which `ip` leaves open; the state, which the kernel does not look at
    "ip route del 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111": (
        encoder.route(rt.DELROUTE, 0, V4_ROUTE),
        {6: 0},
    ),
    "ip neigh del 10.97.2.1 dev kbr0": (encoder.neighbour(rt.DELNEIGH, 0, V4_NEIGHBOUR), {8: rt.PERMANENT}),
    "bridge fdb del 0a:58:0a:61:02:01 dev obr0 master": (encoder.neighbour(rt.DELNEIGH, 0, FDB), {8: rt.NOARP}),
}


@pytest.mark.parametrize("command", DELETED)
def test_a_deletion_names_at_least_what_iproute2_names(command: str) -> None:
    ours, differs = DELETED[command]
    (theirs,) = SENT[command]
    type_, flags, header, named = parts(ours)
    their_type, their_flags, their_header, needed = parts(theirs)
    expected = bytearray(their_header)
    for offset, value in differs.items():
        assert (type_, offset) != (rt.DELROUTE, 7)
        expected[offset] = value
    if type_ == rt.DELROUTE:
        # `ip` leaves the type open too
        expected[7] = 1
    assert (type_, flags, header) == (their_type, their_flags, bytes(expected))
    assert needed.items() <= named.items()


@pytest.mark.parametrize(
    ("command", "type_", "family"),
    [
        ("ip link show", rt.GETLINK, 17),
        ("ip address show", rt.GETADDR, 0),
        ("ip -4 route show table all", rt.GETROUTE, 2),
        ("ip -4 neigh show", rt.GETNEIGH, 2),
    ],
)
def test_a_dump_is_asked_for_as_iproute2_asks(command: str, type_: int, family: int) -> None:
    (theirs,) = SENT[command]
    assert parts(encoder.dump(type_, family))[:3] == parts(theirs)[:3]


def test_one_link_is_asked_for_by_its_index() -> None:
    assert parts(encoder.get_link(9)) == (rt.GETLINK, 1, bytes(4) + b"\x09" + bytes(11), {})


def test_a_generic_netlink_family_is_asked_for_as_genl_asks() -> None:
    (theirs,) = SENT["genl ctrl get name ovs_datapath"]
    # the version of the request, which the kernel does not look at
    patched = bytearray(theirs)
    assert patched[17] == 0
    patched[17] = 1
    assert parts(encoder.get_genl_family("ovs_datapath"), 4) == parts(bytes(patched), 4)


# templates

V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str)
U32 = st.integers(1, 2**32 - 1)
INDEX = st.integers(1, 2**31 - 1)
MACS = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))


def routes(addresses: st.SearchStrategy[str], longest: int) -> st.SearchStrategy[RouteEntry]:
    dst = st.builds("{}/{}".format, addresses, st.integers(0, longest))
    via = st.just("") | addresses
    none = st.just(0)
    return st.builds(
        RouteEntry,
        *(dst, U32, st.sampled_from(["unicast", "unreachable"]), via),
        *(none | INDEX, none | U32, st.integers(0, 255), st.just(254)),
    )


@given(st.sampled_from([rt.NEWROUTE, rt.DELROUTE]), st.sampled_from([0, ADD, CHANGE]), routes(V4, 32) | routes(V6, 128))
def test_a_filled_in_route_is_as_pyroute2_encodes_it(type_: int, flags: int, entry: RouteEntry) -> None:
    assert encoder.route(type_, flags, entry) == bytes(encoder._route(type_, flags, entry).data)


@given(
    st.sampled_from([rt.NEWNEIGH, rt.DELNEIGH]),
    st.builds(NeighbourEntry, st.just(0), V4 | V6, MACS, INDEX, st.just(rt.PERMANENT), st.integers(0, 255), st.just(0))
    | st.builds(NeighbourEntry, st.just(7), st.just(""), MACS, INDEX, st.just(rt.NOARP), st.just(0), st.just(0)),
)
def test_a_filled_in_neighbour_is_as_pyroute2_encodes_it(type_: int, entry: NeighbourEntry) -> None:
    assert encoder.neighbour(type_, CHANGE, entry) == bytes(encoder._neighbour(type_, CHANGE, entry).data)


def test_another_encoding_of_pyroute2_is_noticed_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_templates", {})
    places = encoder._places

    def shifted(message: Any) -> dict[str, tuple[int, int]]:
        return {name: (start + 4 * (name == "RTA_DST"), size) for name, (start, size) in places(message).items()}

    monkeypatch.setattr(encoder, "_places", shifted)
    with pytest.raises(OvsmeshError, match="pyroute2"):
        encoder.route(rt.NEWROUTE, ADD, V4_ROUTE)
    assert not encoder._templates


def test_an_attribute_that_pyroute2_does_not_have_is_not_left_out() -> None:
    # as NDA_PROTOCOL before 0.9.5
    with pytest.raises(OvsmeshError, match="NDA_NEWER"):
        encoder._encode(ndmsg, rt.NEWNEIGH, 0, {}, [("NDA_LLADDR", MAC), ("NDA_NEWER", 111)])


# the import

LEAN = """
import json, sys
import ovsmesh.agent.main
loaded = sorted(sys.modules)
import pyroute2
from pyroute2 import IPRoute
with IPRoute() as route:
    names = [link.get("ifname") for link in route.get_links()]
print(json.dumps([loaded, names]))
"""


def test_the_agent_imports_the_message_classes_alone_and_leaves_pyroute2_usable() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=60, check=True)
    loaded, names = json.loads(done.stdout)
    assert "pyroute2.netlink.rtnl.rtmsg" in loaded
    assert not {"pyroute2", "pyroute2.iproute", "pyroute2.ndb", "asyncio"} & set(loaded)
    assert "lo" in names


ROUTES = {
    # header, rtmsg, RTA_DST, RTA_SRC, RTA_IIF, RTA_MARK, packed by hand from <linux/rtnetlink.h>
    ("10.97.2.1", "10.97.1.2", 2, 0): (
        "340000001a0001000000000000000000 022020000000000000000000 080001000a610201 080002000a610102 0800030002000000"
    ),
    ("fd00:97:2::1", "fd00:97:1::2", 2, 0): (
        "4c0000001a0001000000000000000000 0a8080000000000000000000 14000100fd000097000200000000000000000001"
        "14000200fd000097000100000000000000000002 0800030002000000"
    ),
    (
        "10.97.2.1",
        "",
        0,
        9,
    ): "2c0000001a0001000000000000000000 022000000000000000000000 080001000a610201 0800100009000000",
}


@pytest.mark.parametrize("asked", ROUTES)
@pytest.mark.skipif(sys.byteorder == "big", reason="the bytes are those of a little-endian machine")
def test_a_request_for_a_route(asked: tuple[str, str, int, int]) -> None:
    target, source, link, mark = asked
    addresses = ip_address(target), ip_address(source) if source else None
    wanted = bytes.fromhex(ROUTES[asked])
    assert encoder.get_route(*addresses, link, mark) == wanted
    if addresses[1] is not None:
        assert encoder.get_forwarding_route(addresses[0], addresses[1], link) == wanted
