"""What the kernel told, message by message, and what is made of it."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovsmesh.dataplane.types import KBR, MARK, OBR, Link, Route, Unmanaged
from ovsmesh.linux import rtnetlink
from ovsmesh.linux.cache import Mirror
from tests.support.rtnl_messages import (
    DST,
    ETH0,
    KBR_INDEX,
    OBR_INDEX,
    OURS,
    PEER_MAC,
    POD,
    address,
    fdb,
    kbr,
    link,
    message,
    neighbour,
    obr,
    pod,
    replaced,
    route,
)

CALM = settings(deadline=None)
"""A busy machine is no finding."""


@pytest.fixture
def mirror() -> Any:
    """A host that is wired, as it was read whole."""
    made = Mirror()
    made.watch([ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")])
    made.clear()
    feed(made, link(ETH0, "eth0"), kbr(), obr(), pod(), address(), address("192.0.2.11/24", index=ETH0, protocol=0))
    feed(made, route(), neighbour(), fdb())
    made.doubt = made.changed = False
    return made


def feed(mirror: Any, *messages: Any) -> None:
    for one in messages:
        mirror.take(one)


def test_what_is_wired_is_ours(mirror: Any) -> None:
    links, unmanaged = mirror.our_links()
    assert links == {
        KBR: Link("bridge", 1462, True, "", "0a:58:0a:61:01:01"),
        OBR: Link("", 1462, True, KBR, "", True),
    }
    assert unmanaged == [] == mirror.unmanaged_routes()
    assert mirror.our_addresses() == {"10.97.1.1/24": KBR}
    assert mirror.routes == {DST: OURS}
    assert mirror.neighbours == {"10.97.2.1": PEER_MAC}
    assert mirror.fdb == {PEER_MAC: OBR}
    assert mirror.ports_of(KBR) == [OBR, "veth1"]
    assert mirror.carrier("192.0.2.11").name == "eth0"
    assert mirror.carrier("192.0.2.1") is None


def test_a_new_mirror_is_in_doubt() -> None:
    assert Mirror().doubt


def test_new_ranges_are_a_doubt_and_the_same_are_none(mirror: Any) -> None:
    mirror.watch([ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")])
    assert not mirror.doubt
    mirror.watch([ip_network("10.0.0.0/8")])
    assert mirror.doubt


# routes


def test_a_route_comes_and_goes(mirror: Any) -> None:
    feed(mirror, route("10.97.3.0/24", via="10.97.3.1"))
    assert mirror.routes[("10.97.3.0/24", 111)] == Route("unicast", "10.97.3.1", KBR, 1462)
    assert mirror.changed
    feed(mirror, route("10.97.3.0/24", via="10.97.3.1", gone=True), route(gone=True))
    assert mirror.routes == {}


def test_an_unreachable_route_has_no_link(mirror: Any) -> None:
    # IPv6 tells the loopback device
    feed(mirror, route("fd00:97::/32", 4278198272, type="unreachable", via="", oif=1, mtu=0))
    assert mirror.routes[("fd00:97::/32", 4278198272)] == Route("unreachable")


def test_an_unmanaged_route_is_named_with_all_that_finds_it(mirror: Any) -> None:
    feed(mirror, route("10.97.3.0/24", 0, via="192.0.2.1", oif=ETH0, mtu=0, protocol=4))
    text = "route 10.97.3.0/24 via 192.0.2.1 dev eth0 metric 0 proto 4 is not ours; delete it if the mesh is to have "
    assert mirror.unmanaged_routes() == [Unmanaged("routes", "10.97.3.0/24", text + "this range")]
    assert mirror.changed
    feed(mirror, route("10.97.3.0/24", 0, via="192.0.2.1", oif=ETH0, mtu=0, protocol=4, gone=True))
    assert mirror.unmanaged_routes() == []


def test_our_route_replaced_is_told_by_the_new_one_alone(mirror: Any) -> None:
    feed(mirror, replaced(via="192.0.2.1", oif=ETH0, protocol=4))
    assert mirror.routes == {}
    assert [f.key for f in mirror.unmanaged_routes()] == ["10.97.2.0/24"]


def test_an_unmanaged_route_beside_ours_leaves_ours(mirror: Any) -> None:
    # ip route append; or any other metric
    feed(mirror, route(via="", oif=ETH0, protocol=3, flags=0xC00), route(metric=0, via="", oif=ETH0, protocol=3))
    assert mirror.routes == {DST: OURS}
    assert [f.key for f in mirror.unmanaged_routes()] == ["10.97.2.0/24"] * 2


def test_an_unmanaged_route_that_ours_replaced_leaves_no_ghost(mirror: Any) -> None:
    feed(mirror, replaced(via="", oif=ETH0, protocol=3), replaced())
    assert mirror.routes == {DST: OURS} and mirror.unmanaged_routes() == []


def test_our_route_replaced_by_one_through_kbr0(mirror: Any) -> None:
    # ip route replace 10.97.2.0/24 dev kbr0 metric 111
    feed(mirror, replaced(via="", mtu=0, protocol=3))
    assert mirror.routes == {}
    assert [f.key for f in mirror.unmanaged_routes()] == ["10.97.2.0/24"]
    assert mirror.changed


def test_an_unmanaged_route_replaced_by_one_through_another_link_leaves_no_ghost(mirror: Any) -> None:
    feed(mirror, link(9, "eth1"))
    feed(mirror, route("10.97.3.0/24", 0, via="", oif=ETH0, mtu=0, protocol=3))
    feed(mirror, replaced(dst="10.97.3.0/24", metric=0, via="", oif=9, mtu=0, protocol=3))
    assert ["dev eth1" in f.detail for f in mirror.unmanaged_routes()] == [True]
    feed(mirror, route("10.97.3.0/24", 0, via="", oif=9, mtu=0, protocol=3, gone=True))
    assert mirror.unmanaged_routes() == []


@pytest.mark.parametrize(
    "other",
    [
        route("0.0.0.0/0", 0, via="192.0.2.1", oif=ETH0, protocol=3),
        route("10.0.0.0/8", 0, via="192.0.2.1", oif=ETH0, protocol=3),
        route("10.98.0.0/16", 0, via="192.0.2.1", oif=ETH0, protocol=3),
        route("fd00:98::/64", 0, via="fe80::1", oif=ETH0, protocol=3),
        # the kernel's own, that comes with kbr0's address
        route("10.97.1.0/24", 0, via="", mtu=0, protocol=2),
    ],
)
def test_routes_that_are_no_ones_business(mirror: Any, other: Any) -> None:
    feed(mirror, other)
    assert mirror.unmanaged_routes() == [] and mirror.routes == {DST: OURS}


def test_other_tables_are_no_ones_business(mirror: Any) -> None:
    entry = rtnetlink.RouteEntry("10.97.3.0/24", 0, "unicast", "", ETH0, 0, 3, 254)
    data = bytearray(rtnetlink.route(rtnetlink.NEWROUTE, 0, 1, entry))
    # rtm_table
    data[16 + 4] = 255
    feed(mirror, message(rtnetlink.NEWROUTE, bytes(data)))
    assert mirror.unmanaged_routes() == []


def test_links_that_live_by_router_advertisements(mirror: Any) -> None:
    advertised = {"dst": "::/0", "metric": 1024, "via": "fe80::1", "oif": ETH0, "mtu": 0, "protocol": 9}
    feed(mirror, route(**advertised))
    assert mirror.ra_links() == ("eth0",)
    feed(mirror, route(**advertised, gone=True))
    assert mirror.ra_links() == ()


# links


def test_kbr0_going_down_is_a_doubt_and_coming_up_too(mirror: Any) -> None:
    for up in (False, True):
        mirror.doubt = False
        feed(mirror, kbr(up=up))
        assert mirror.doubt and mirror.changed
        assert mirror.our_links()[0][KBR].up is up


def test_a_pods_coming_and_going_is_nothing_to_us(mirror: Any) -> None:
    feed(mirror, link(9, "veth9", kind="veth"), link(9, "veth9", kind="veth", master=KBR_INDEX), pod(up=False))
    assert not mirror.doubt and not mirror.changed


def test_the_same_once_more_is_no_change(mirror: Any) -> None:
    feed(mirror, kbr(), obr(), pod())
    assert not mirror.doubt and not mirror.changed


def test_an_mtu_that_changes_is_a_change_and_no_doubt(mirror: Any) -> None:
    feed(mirror, obr(mtu=1400))
    assert mirror.changed and not mirror.doubt
    assert mirror.our_links()[0][OBR].mtu == 1400


@pytest.mark.parametrize("changes", [{"mtu": 1400}, {"gone": True}])
def test_the_underlays_link_matters(mirror: Any, changes: Any) -> None:
    feed(mirror, link(ETH0, "eth0", **changes))
    assert mirror.changed


def test_a_bridge_without_our_alias_is_someone_elses(mirror: Any) -> None:
    feed(mirror, kbr(alias=""))
    links, unmanaged = mirror.our_links()
    assert KBR not in links
    assert [(f.kind, f.key, f.blocks) for f in unmanaged] == [("links", KBR, True)]
    assert "no alias ovsmesh" in unmanaged[0].detail


def test_an_obr0_that_is_no_ovs_port_is_someone_elses(mirror: Any) -> None:
    feed(mirror, obr(kind="dummy"))
    links, unmanaged = mirror.our_links()
    assert OBR not in links
    assert [(f.kind, f.key) for f in unmanaged] == [("links", OBR)]
    assert unmanaged[0].detail.startswith("dummy obr0 is there")


def test_kbr0_deleted_leaves_its_ports_to_be_found_again(mirror: Any) -> None:
    feed(mirror, obr(master=0), pod(master=0), kbr(gone=True))
    assert mirror.lost_ports.keys() == {OBR_INDEX, POD}
    assert mirror.doubt
    assert mirror.our_links()[0].keys() == {OBR}
    assert mirror.index(KBR) is None


def test_a_port_left_behind_is_known_as_the_hairpin_that_it_was(mirror: Any) -> None:
    """The CNI bridge plugin plugs first and makes a hairpin of it then, which is told of the port alone."""
    feed(mirror, link(POD, "veth1", kind="veth", master=KBR_INDEX, family=rtnetlink.AF_BRIDGE, hairpin=True))
    assert not mirror.changed
    feed(mirror, obr(master=0), pod(master=0), kbr(gone=True))
    assert mirror.lost_ports == {OBR_INDEX: False, POD: True}


def test_a_port_left_behind_unnoticed_is_known_as_a_hairpin_too(mirror: Any) -> None:
    feed(mirror, pod(hairpin=True))
    mirror.clear()
    feed(mirror, link(ETH0, "eth0"), pod(master=0))
    mirror.whole()
    assert mirror.lost_ports == {POD: True}


MADE = {"alias": "", "mac": "02:00:00:00:00:07"}
"""As the CNI bridge plugin makes kbr0."""


def by_plugin(mirror: Any, *more: Any) -> Any:
    """A kbr0 without a mark, with a pod and a link-local address, and what else is told."""
    feed(
        mirror,
        address(gone=True),
        kbr(gone=True),
        kbr(7, **MADE),
        pod(master=7),
        address("fe80::7/64", index=7, protocol=0),
    )
    feed(mirror, *more)
    return mirror.our_links(plugged=True)


def test_a_kbr0_that_the_bridge_plugin_made_by_our_conflist_is_ours_to_mark(mirror: Any) -> None:
    links, unmanaged = by_plugin(mirror)
    assert links[KBR] == Link("bridge", 1462, mac="02:00:00:00:00:07", unmarked=True) and not unmanaged
    links, (named,) = mirror.our_links(plugged=False)
    assert KBR not in links and named.key == KBR


def test_our_own_address_on_a_bridge_that_the_plugin_made_just_before_is_no_one_s(mirror: Any) -> None:
    assert by_plugin(mirror, address("10.97.1.1/24", index=7))[0][KBR].unmarked


@pytest.mark.parametrize(
    "more",
    [
        kbr(7, **MADE | {"alias": "mine"}),
        kbr(7, **MADE | {"kind": "openvswitch"}),
        address("192.168.1.1/24", index=7, protocol=0),
        address("172.17.0.1/16", index=7, protocol=0),
        address("2001:db8::1/64", index=7, protocol=0),
        link(9, "eth1", master=7),
        link(9, "tap1", kind="tun", master=7),
    ],
)
def test_a_kbr0_that_the_bridge_plugin_would_not_make_is_someone_s(mirror: Any, more: Any) -> None:
    links, unmanaged = by_plugin(mirror, more)
    assert KBR not in links and [f.key for f in unmanaged] == [KBR]


def test_a_pod_unplugged_long_before_is_not_an_orphan(mirror: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    feed(mirror, pod(master=0))
    now[0] += 60
    feed(mirror, obr(master=0), kbr(gone=True))
    assert mirror.lost_ports.keys() == {OBR_INDEX}


def test_a_pod_that_ended_with_kbr0_is_not_an_orphan(mirror: Any) -> None:
    feed(mirror, pod(master=0), pod(master=0, gone=True), kbr(gone=True))
    assert not mirror.lost_ports


def test_a_link_that_takes_the_name_kbr0(mirror: Any) -> None:
    feed(mirror, kbr(gone=True), kbr(9, alias=""))
    assert mirror.index(KBR) == 9
    assert [f.key for f in mirror.our_links()[1]] == [KBR]
    # made as ours is: under another name first
    feed(mirror, kbr(9, gone=True, alias=""), link(10, "ovsmesh-new", kind="bridge", alias=MARK), kbr(10))
    assert mirror.index(KBR) == 10 and mirror.index("ovsmesh-new") is None
    assert mirror.our_links()[0].keys() == {KBR, OBR}


def test_a_bridge_message_about_obr0_makes_it_be_read_again(mirror: Any) -> None:
    feed(mirror, link(OBR_INDEX, OBR, family=7), link(POD, "veth1", family=7))
    assert mirror.reread == {OBR_INDEX}


def test_sysctls_that_are_announced_are_a_change(mirror: Any) -> None:
    feed(mirror, rtnetlink.Message(rtnetlink.NEWNETCONF, 0, 0, memoryview(b"")))
    assert mirror.changed and not mirror.doubt


# addresses


def test_an_address_lost_is_a_doubt_as_its_routes_go_without_a_word(mirror: Any) -> None:
    feed(mirror, address(gone=True))
    assert mirror.doubt and mirror.changed
    assert mirror.our_addresses() == {}


def test_an_address_lost_elsewhere_is_a_change_and_no_doubt(mirror: Any) -> None:
    feed(mirror, address("192.0.2.11/24", index=ETH0, gone=True))
    assert mirror.changed and not mirror.doubt
    assert mirror.carrier("192.0.2.11") is None


@pytest.mark.parametrize(
    ("text", "protocol", "own"),
    [
        ("10.97.9.1/24", 111, True),
        # kernels before 5.18 keep no mark: a gateway in a cluster range is ours
        ("10.97.9.1/24", 0, True),
        ("fd00:97:9::1/64", 0, True),
        ("10.97.9.7/24", 0, False),
        ("192.168.0.1/24", 0, False),
        ("fe80::1/64", 0, False),
    ],
)
def test_whose_an_address_of_kbr0_is(mirror: Any, text: Any, protocol: Any, own: Any) -> None:
    feed(mirror, address(text, protocol=protocol))
    assert (text in mirror.our_addresses()) is own


# neighbours and FDB


@pytest.mark.parametrize("change", [{"protocol": 0}, {"state": 2}, {"gone": True}])
def test_a_neighbour_that_is_no_longer_ours(mirror: Any, change: Any) -> None:
    feed(mirror, neighbour(**change))
    assert mirror.neighbours == {} and mirror.changed


def test_neighbours_on_other_links_are_no_ones_business(mirror: Any) -> None:
    feed(mirror, neighbour("10.97.2.7", index=ETH0), neighbour("10.97.2.8", state=2))
    assert mirror.neighbours == {"10.97.2.1": PEER_MAC} and not mirror.changed


def test_an_fdb_entry_that_moves(mirror: Any) -> None:
    feed(mirror, fdb(index=POD))
    assert mirror.fdb == {PEER_MAC: "veth1"} and mirror.changed
    # the old place's end may be told after the new one's begin
    feed(mirror, fdb(gone=True))
    assert mirror.fdb == {PEER_MAC: "veth1"}
    feed(mirror, fdb(index=POD, gone=True))
    assert mirror.fdb == {}


def test_an_fdb_entry_that_is_learned_is_not_static(mirror: Any) -> None:
    feed(mirror, fdb(state=2))
    assert mirror.fdb == {} and mirror.changed


@pytest.mark.parametrize("other", [fdb("02:00:00:00:00:01"), fdb("0a:58:0a:61:03:01", master=9)])
def test_other_macs_and_bridges_are_no_ones_business(mirror: Any, other: Any) -> None:
    feed(mirror, other)
    assert mirror.fdb == {PEER_MAC: OBR} and not mirror.changed


# whatever comes


EVENTS = st.sampled_from(
    [
        *(kbr(), kbr(up=False), kbr(gone=True), kbr(alias=""), kbr(9), kbr(9, gone=True)),
        *(obr(), obr(master=0), obr(gone=True), obr(mtu=1400), pod(), pod(master=0), pod(gone=True)),
        *(address(), address(gone=True), address("10.97.9.1/24")),
        *(route(), route(gone=True), route(oif=ETH0, protocol=4), route(oif=ETH0, protocol=4, gone=True)),
        *(route(via="", protocol=3), route(via="", protocol=3, gone=True), route(oif=99)),
        *(replaced(), replaced(oif=ETH0, protocol=3), replaced(via="", protocol=3)),
        *(neighbour(), neighbour(gone=True), neighbour(protocol=0), fdb(), fdb(gone=True), fdb(index=POD)),
    ]
)


@CALM
@given(st.lists(EVENTS, max_size=25))
def test_no_order_of_notifications_confuses_it(events: Any) -> None:
    mirror = Mirror()
    mirror.watch([ip_network("10.97.0.0/16")])
    mirror.clear()
    feed(mirror, *events)
    links, _ = mirror.our_links()
    assert all(mirror.name(mirror.index(name) or 0) == name for name in links)
    assert set(mirror.our_addresses().values()) <= {KBR}
    mirror.unmanaged_routes(), mirror.ra_links(), mirror.ports_of(KBR)


@CALM
@given(st.sampled_from([16, 17, 20, 21, 24, 25, 28, 29, 80, 99]), st.binary(max_size=80))
def test_no_message_ends_it(kind: Any, body: Any) -> None:
    Mirror().take(rtnetlink.Message(kind, 0, 0, memoryview(body)))
