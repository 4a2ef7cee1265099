"""The rtnetlink cache: what the kernel sent, message by message, and what it holds then."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ovsmesh.dataplane.types import KBR, MARK, OBR, Link, Route, Unmanaged
from ovsmesh.linux import netlink_socket, rtnetlink
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.cache import RtnetlinkCache
from tests.support.rtnl_messages import (
    DST,
    ETH0,
    KBR_INDEX,
    OBR_INDEX,
    PEER_MAC,
    PEER_ROUTE,
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

"""A busy machine is no finding."""


@pytest.fixture
def cache() -> Any:
    """A host that is wired, as it was read whole."""
    made = RtnetlinkCache()
    made.watch([ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")])
    made.clear()
    feed(made, link(ETH0, "eth0"), kbr(), obr(), pod(), address(), address("192.0.2.11/24", index=ETH0, protocol=0))
    feed(made, route(), neighbour(), fdb())
    made.finish_dump()
    made.changed = False
    return made


def feed(cache: Any, *messages: Any) -> None:
    for one in messages:
        cache.update(one)


def test_what_is_wired_is_managed(cache: Any) -> None:
    links, unmanaged = cache.managed_links()
    assert links == {
        KBR: Link("bridge", 1462, True, "", "0a:58:0a:61:01:01"),
        OBR: Link("", 1462, True, KBR, "", True),
    }
    assert unmanaged == [] == cache.unmanaged_routes()
    assert cache.managed_addresses() == {"10.97.1.1/24": KBR}
    assert cache.routes == {DST: PEER_ROUTE}
    assert cache.neighbours == {"10.97.2.1": PEER_MAC}
    assert cache.fdb == {PEER_MAC: OBR}
    assert cache.ports_of(KBR) == [OBR, "veth1"]
    assert [link.name for link in cache.links_with_address("192.0.2.11")] == ["eth0"]
    assert cache.links_with_address("192.0.2.1") == []
    assert cache.addressed(ETH0) and not cache.addressed(POD)


def test_a_new_cache_is_stale() -> None:
    assert RtnetlinkCache().stale


def test_a_cache_is_not_stale_after_a_dump(cache: Any) -> None:
    assert not cache.stale


def test_new_ranges_make_it_stale_and_the_same_do_not(cache: Any) -> None:
    cache.watch([ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")])
    assert not cache.stale
    cache.watch([ip_network("10.0.0.0/8")])
    assert cache.stale


# routes


def test_a_route_comes_and_goes(cache: Any) -> None:
    feed(cache, route("10.97.3.0/24", via="10.97.3.1"))
    assert cache.routes[("10.97.3.0/24", 111)] == Route("unicast", "10.97.3.1", KBR, 1462)
    assert cache.changed
    feed(cache, route("10.97.3.0/24", via="10.97.3.1", gone=True), route(gone=True))
    assert cache.routes == {}


def test_who_changed_a_managed_part_last_is_noted(cache: Any) -> None:
    feed(cache, route(gone=True)._replace(sender=812), neighbour(gone=True)._replace(sender=813))
    feed(cache, route("10.97.9.0/24", via="192.0.2.9", protocol=4)._replace(sender=814), fdb(gone=True))
    assert cache.changed_by == {("routes", ("10.97.2.0/24", 111)): 812, ("neighbours", "10.97.2.1"): 813}
    feed(cache, route()._replace(sender=815), address(gone=True)._replace(sender=816))
    assert cache.changed_by["routes", ("10.97.2.0/24", 111)] == 815 and 816 in cache.changed_by.values()


def test_an_unreachable_route_has_no_link(cache: Any) -> None:
    # IPv6 reports the loopback device
    feed(cache, route("fd00:97::/32", 4278198272, type="unreachable", via="", oif=1, mtu=0))
    assert cache.routes[("fd00:97::/32", 4278198272)] == Route("unreachable")


def test_an_unmanaged_route_is_named_with_all_that_finds_it(cache: Any) -> None:
    feed(cache, route("10.97.3.0/24", 0, via="192.0.2.1", oif=ETH0, mtu=0, protocol=4))
    text = "route 10.97.3.0/24 via 192.0.2.1 dev eth0 metric 0 proto 4 is not managed by ovsmesh; "
    advice = "delete it if the mesh is to have this range"
    assert cache.unmanaged_routes() == [Unmanaged("routes", "10.97.3.0/24", text + advice)]
    assert cache.changed
    feed(cache, route("10.97.3.0/24", 0, via="192.0.2.1", oif=ETH0, mtu=0, protocol=4, gone=True))
    assert cache.unmanaged_routes() == []


def test_a_managed_route_replaced_is_reported_by_the_new_one_alone(cache: Any) -> None:
    feed(cache, replaced(via="192.0.2.1", oif=ETH0, protocol=4))
    assert cache.routes == {}
    assert [f.key for f in cache.unmanaged_routes()] == ["10.97.2.0/24"]


def test_an_unmanaged_route_beside_a_managed_one_leaves_that(cache: Any) -> None:
    # ip route append; or any other metric
    feed(cache, route(via="", oif=ETH0, protocol=3, flags=0xC00), route(metric=0, via="", oif=ETH0, protocol=3))
    assert cache.routes == {DST: PEER_ROUTE}
    assert [f.key for f in cache.unmanaged_routes()] == ["10.97.2.0/24"] * 2


def test_an_unmanaged_route_that_a_managed_one_replaced_is_forgotten(cache: Any) -> None:
    feed(cache, replaced(via="", oif=ETH0, protocol=3), replaced())
    assert cache.routes == {DST: PEER_ROUTE} and cache.unmanaged_routes() == []


def test_a_managed_route_replaced_by_one_through_kbr0(cache: Any) -> None:
    # ip route replace 10.97.2.0/24 dev kbr0 metric 111
    feed(cache, replaced(via="", mtu=0, protocol=3))
    assert cache.routes == {}
    assert [f.key for f in cache.unmanaged_routes()] == ["10.97.2.0/24"]
    assert cache.changed


def test_an_unmanaged_route_replaced_by_one_through_another_link_is_forgotten(cache: Any) -> None:
    feed(cache, link(9, "eth1"))
    feed(cache, route("10.97.3.0/24", 0, via="", oif=ETH0, mtu=0, protocol=3))
    feed(cache, replaced(dst="10.97.3.0/24", metric=0, via="", oif=9, mtu=0, protocol=3))
    assert ["dev eth1" in f.detail for f in cache.unmanaged_routes()] == [True]
    feed(cache, route("10.97.3.0/24", 0, via="", oif=9, mtu=0, protocol=3, gone=True))
    assert cache.unmanaged_routes() == []


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
def test_routes_elsewhere_are_left_out(cache: Any, other: Any) -> None:
    feed(cache, other)
    assert cache.unmanaged_routes() == [] and cache.routes == {DST: PEER_ROUTE}


def test_other_tables_are_left_out(cache: Any) -> None:
    entry = rtnetlink.RouteEntry("10.97.3.0/24", 0, "unicast", "", ETH0, 0, 3, 254)
    data = bytearray(encoder.route(rtnetlink.NEWROUTE, 0, entry))
    # rtm_table
    data[16 + 4] = 255
    feed(cache, message(rtnetlink.NEWROUTE, bytes(data)))
    assert cache.unmanaged_routes() == []


def test_links_that_live_by_router_advertisements(cache: Any) -> None:
    advertised = {"dst": "::/0", "metric": 1024, "via": "fe80::1", "oif": ETH0, "mtu": 0, "protocol": 9}
    feed(cache, route(**advertised))
    assert cache.ra_links() == ("eth0",)
    feed(cache, route(**advertised, gone=True))
    assert cache.ra_links() == ()


# links


def test_kbr0_going_down_makes_it_stale_and_coming_up_too(cache: Any) -> None:
    for up in (False, True):
        cache.stale = False
        feed(cache, kbr(up=up))
        assert cache.stale and cache.changed
        assert cache.managed_links()[0][KBR].up is up


def test_a_pods_coming_and_going_is_no_change(cache: Any) -> None:
    feed(cache, link(9, "veth9", kind="veth"), link(9, "veth9", kind="veth", master=KBR_INDEX), pod(up=False))
    assert not cache.stale and not cache.changed


def test_the_same_once_more_is_no_change(cache: Any) -> None:
    feed(cache, kbr(), obr(), pod())
    assert not cache.stale and not cache.changed


def test_an_mtu_that_changes_is_a_change_and_not_stale(cache: Any) -> None:
    feed(cache, obr(mtu=1400))
    assert cache.changed and not cache.stale
    assert cache.managed_links()[0][OBR].mtu == 1400


def test_the_loopback_device_is_the_last_that_has_an_address(cache: Any) -> None:
    feed(cache, link(1, "lo", mtu=65536), address("192.0.2.11/32", index=1, protocol=0))
    assert [link.name for link in cache.links_with_address("192.0.2.11")] == ["eth0", "lo"]


def test_what_ipv6_tells_of_a_link_is_not_taken_for_the_link(cache: Any) -> None:
    feed(cache, link(ETH0, "eth0", family=10, mtu=1280, gone=True), link(KBR_INDEX, KBR, family=10))
    assert [link.mtu for link in cache.links_with_address("192.0.2.11")] == [1500]
    assert KBR in cache.managed_links()[0] and not cache.changed


@pytest.mark.parametrize("changes", [{"mtu": 1400}, {"gone": True}])
def test_the_underlays_link_matters(cache: Any, changes: Any) -> None:
    feed(cache, link(ETH0, "eth0", **changes))
    assert cache.changed


def test_a_bridge_without_the_alias_is_unmanaged(cache: Any) -> None:
    feed(cache, kbr(alias=""))
    links, unmanaged = cache.managed_links()
    assert KBR not in links
    assert [(f.kind, f.key, f.blocks) for f in unmanaged] == [("links", KBR, True)]
    assert "no alias ovsmesh" in unmanaged[0].detail


def test_an_obr0_that_is_no_ovs_port_is_unmanaged(cache: Any) -> None:
    feed(cache, obr(kind="dummy"))
    links, unmanaged = cache.managed_links()
    assert OBR not in links
    assert [(f.kind, f.key) for f in unmanaged] == [("links", OBR)]
    assert unmanaged[0].detail.startswith("dummy obr0 is not managed by ovsmesh")


def test_kbr0_deleted_leaves_its_ports_to_be_found_again(cache: Any) -> None:
    feed(cache, obr(master=0), pod(master=0), kbr(gone=True))
    assert cache.orphaned_ports.keys() == {OBR_INDEX, POD}
    assert cache.stale
    assert cache.managed_links()[0].keys() == {OBR}
    assert cache.index(KBR) is None


def test_a_port_left_behind_is_known_as_the_hairpin_that_it_was(cache: Any) -> None:
    """The CNI bridge plugin plugs first and makes a hairpin of it then, which is told of the port alone."""
    feed(cache, link(POD, "veth1", kind="veth", master=KBR_INDEX, family=rtnetlink.AF_BRIDGE, hairpin=True))
    assert not cache.changed
    feed(cache, obr(master=0), pod(master=0), kbr(gone=True))
    assert cache.orphaned_ports == {OBR_INDEX: False, POD: True}


def test_a_port_left_behind_unnoticed_is_known_as_a_hairpin_too(cache: Any) -> None:
    feed(cache, pod(hairpin=True))
    cache.clear()
    feed(cache, link(ETH0, "eth0"), pod(master=0))
    cache.finish_dump()
    assert cache.orphaned_ports == {POD: True}


MADE = {"alias": "", "mac": "02:00:00:00:00:07"}
"""As the CNI bridge plugin makes kbr0."""


def by_plugin(cache: Any, *more: Any) -> Any:
    """A kbr0 without a mark, with a pod and a link-local address, and what else is told."""
    feed(
        cache,
        address(gone=True),
        kbr(gone=True),
        kbr(7, **MADE),
        pod(master=7),
        address("fe80::7/64", index=7, protocol=0),
    )
    feed(cache, *more)
    return cache.managed_links(cni=True)


def test_a_kbr0_that_the_bridge_plugin_made_by_the_managed_conflist_can_be_marked(cache: Any) -> None:
    links, unmanaged = by_plugin(cache)
    assert links[KBR] == Link("bridge", 1462, mac="02:00:00:00:00:07", unmarked=True) and not unmanaged
    links, (named,) = cache.managed_links(cni=False)
    assert KBR not in links and named.key == KBR


def test_a_managed_address_on_a_bridge_that_the_plugin_just_made_does_not_keep_it_from_being_marked(cache: Any) -> None:
    assert by_plugin(cache, address("10.97.1.1/24", index=7))[0][KBR].unmarked


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
def test_a_kbr0_that_the_bridge_plugin_would_not_make_is_unmanaged(cache: Any, more: Any) -> None:
    links, unmanaged = by_plugin(cache, more)
    assert KBR not in links and [f.key for f in unmanaged] == [KBR]


def test_a_pod_unplugged_long_before_is_not_an_orphan(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    feed(cache, pod(master=0))
    now[0] += 60
    feed(cache, obr(master=0), kbr(gone=True))
    assert cache.orphaned_ports.keys() == {OBR_INDEX}


def test_a_pod_that_ended_with_kbr0_is_not_an_orphan(cache: Any) -> None:
    feed(cache, pod(master=0), pod(master=0, gone=True), kbr(gone=True))
    assert not cache.orphaned_ports


def test_a_link_that_takes_the_name_kbr0(cache: Any) -> None:
    feed(cache, kbr(gone=True), kbr(9, alias=""))
    assert cache.index(KBR) == 9
    assert [f.key for f in cache.managed_links()[1]] == [KBR]
    # made as a managed one is: under another name first
    feed(cache, kbr(9, gone=True, alias=""), link(10, "ovsmesh-new", kind="bridge", alias=MARK), kbr(10))
    assert cache.index(KBR) == 10 and cache.index("ovsmesh-new") is None
    assert cache.managed_links()[0].keys() == {KBR, OBR}


def test_a_bridge_message_about_obr0_makes_it_be_read_again(cache: Any) -> None:
    feed(cache, link(OBR_INDEX, OBR, family=7), link(POD, "veth1", family=7))
    assert cache.partial_links == {OBR_INDEX}


def test_sysctls_that_are_announced_are_a_change(cache: Any) -> None:
    feed(cache, netlink_socket.Message(rtnetlink.NEWNETCONF, 0, 0, memoryview(b"")))
    assert cache.changed and not cache.stale


# addresses


def test_an_address_lost_makes_it_stale_as_its_routes_go_unreported(cache: Any) -> None:
    feed(cache, address(gone=True))
    assert cache.stale and cache.changed
    assert cache.managed_addresses() == {}


def test_an_address_lost_elsewhere_is_a_change_and_not_stale(cache: Any) -> None:
    feed(cache, address("192.0.2.11/24", index=ETH0, gone=True))
    assert cache.changed and not cache.stale
    assert cache.links_with_address("192.0.2.11") == []


@pytest.mark.parametrize(
    ("text", "protocol", "own"),
    [
        ("10.97.9.1/24", 111, True),
        # kernels before 5.18 store no mark: a gateway in a cluster range is managed
        ("10.97.9.1/24", 0, True),
        ("fd00:97:9::1/64", 0, True),
        ("10.97.9.7/24", 0, False),
        ("192.168.0.1/24", 0, False),
        ("fe80::1/64", 0, False),
    ],
)
def test_which_addresses_of_kbr0_are_managed(cache: Any, text: Any, protocol: Any, own: Any) -> None:
    feed(cache, address(text, protocol=protocol))
    assert (text in cache.managed_addresses()) is own


# neighbours and FDB


@pytest.mark.parametrize("change", [{"protocol": 0}, {"state": 2}, {"gone": True}])
def test_a_neighbour_that_is_no_longer_managed(cache: Any, change: Any) -> None:
    feed(cache, neighbour(**change))
    assert cache.neighbours == {} and cache.changed


def test_neighbours_on_other_links_are_left_out(cache: Any) -> None:
    feed(cache, neighbour("10.97.2.7", index=ETH0), neighbour("10.97.2.8", state=2))
    assert cache.neighbours == {"10.97.2.1": PEER_MAC} and not cache.changed


def test_an_fdb_entry_that_moves(cache: Any) -> None:
    feed(cache, fdb(index=POD))
    assert cache.fdb == {PEER_MAC: "veth1"} and cache.changed
    # the old place's end may be told after the new one's begin
    feed(cache, fdb(gone=True))
    assert cache.fdb == {PEER_MAC: "veth1"}
    feed(cache, fdb(index=POD, gone=True))
    assert cache.fdb == {}


def test_an_fdb_entry_that_a_frame_can_move_is_not_as_wanted(cache: Any) -> None:
    feed(cache, fdb(flags=0))
    assert cache.fdb == {PEER_MAC: f"{OBR} (not sticky)"} and cache.changed
    feed(cache, fdb(index=POD, state=2, flags=0))
    assert cache.fdb == {}


def test_ports_of_kbr0_count_only_where_they_are_watched(cache: Any) -> None:
    for watched in (False, True):
        cache.watch_ports = watched
        feed(cache, link(77, "veth77", master=KBR_INDEX))
        assert cache.changed is watched
        cache.changed = False
        feed(cache, link(77, "veth77", master=KBR_INDEX))
        assert not cache.changed
        feed(cache, link(77, "veth77", gone=True))
        assert cache.changed is watched
        cache.changed = False


def test_an_fdb_entry_that_is_learned_is_not_static(cache: Any) -> None:
    feed(cache, fdb(state=2))
    assert cache.fdb == {} and cache.changed


@pytest.mark.parametrize("other", [fdb("02:00:00:00:00:01"), fdb("0a:58:0a:61:03:01", master=9)])
def test_other_macs_and_bridges_are_left_out(cache: Any, other: Any) -> None:
    feed(cache, other)
    assert cache.fdb == {PEER_MAC: OBR} and not cache.changed


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


@given(st.lists(EVENTS, max_size=25))
def test_no_order_of_notifications_confuses_it(events: Any) -> None:
    cache = RtnetlinkCache()
    cache.watch([ip_network("10.97.0.0/16")])
    cache.clear()
    feed(cache, *events)
    links, _ = cache.managed_links()
    assert all(cache.name(cache.index(name) or 0) == name for name in links)
    assert set(cache.managed_addresses().values()) <= {KBR}
    cache.unmanaged_routes(), cache.ra_links(), cache.ports_of(KBR)


@example(rtnetlink.NEWROUTE, b"\x02\x21" + bytes(10))
@given(st.sampled_from([16, 17, 20, 21, 24, 25, 28, 29, 80, 99]), st.binary(max_size=80))
def test_no_message_ends_it(kind: Any, body: Any) -> None:
    RtnetlinkCache().update(netlink_socket.Message(kind, 0, 0, memoryview(body)))
