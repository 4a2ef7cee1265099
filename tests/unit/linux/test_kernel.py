"""What the kernel says of routes, rules and namespaces, read from a real one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ovsmesh.linux.kernel import Kernel, PodRoutes
from ovsmesh.mesh.types import IPAddress
from ovsmesh.sysctl import Sysctls
from ovsmesh.trace import netns
from ovsmesh.trace.types import REFUSED_SOURCE, RouteFound
from tests.support.firewallkit import inside, needs_root, sh
from tests.support.needs import needs

pytestmark = [pytest.mark.root, needs_root]

SOURCE, TARGET = ip_address("10.97.1.2"), ip_address("10.97.2.2")


@pytest.fixture
@needs("root")
def host() -> Iterator[str]:
    """A namespace that routes, with a pod's namespace behind a bridge; yields the host's name."""
    host, pod = f"tracehost{os.getpid()}", f"tracepod{os.getpid()}"
    sh(f"ip netns add {host}", f"ip netns add {pod}")
    try:
        with inside(host):
            sh("sysctl -qw net.ipv4.ip_forward=1", "ip link add kbr0 type bridge", "ip link set kbr0 up")
            sh(f"ip link add vp1 type veth peer name eth0 netns {pod}", "ip link set vp1 master kbr0 up")
            sh("sysctl -qw net.ipv4.conf.kbr0.rp_filter=2")
            sh("ip addr add 10.97.1.1/24 dev kbr0", "ip route add 10.97.2.0/24 via 10.97.1.9 dev kbr0 mtu lock 1462")
        with inside(pod):
            sh("ip link set eth0 up", "ip addr add 10.97.1.2/24 dev eth0", "ip route add default via 10.97.1.1")
        yield host
    finally:
        sh(f"ip netns del {host}", f"ip netns del {pod}")


def picked(host: str, mark: int = 0) -> tuple[RouteFound, list[str]]:
    """Return the route of a forwarded packet, and the texts of the rules before table main that match it."""
    with inside(host):
        kernel = Kernel()
    try:
        iif = kernel.links()["kbr0"].number
        route = kernel.route(TARGET, SOURCE, iif, mark)
        rules = kernel.policy(TARGET, SOURCE, "kbr0", mark)
        return route, [rule.text for rule in rules if rule.matches and 0 < rule.priority < 32766]
    finally:
        kernel.close()


def test_the_route_is_the_one_that_forwarded_packets_take(host: str) -> None:
    route, rules = picked(host)
    assert (route.type, route.via, route.dev, route.mtu, route.table) == ("unicast", "10.97.1.9", "kbr0", 1462, 254)
    assert not rules and str(route) == "via 10.97.1.9 dev kbr0 mtu 1462"


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ("from 10.97.1.0/24", True),
        ("to 10.97.2.2", True),
        ("iif kbr0", True),
        ("from 10.97.3.0/24", False),
        ("not from 10.97.3.0/24", True),
        ("iif lo", False),
        ("fwmark 0x7", False),
        ("from 10.97.1.0/24 ipproto tcp", False),
    ],
)
def test_a_policy_rule_matches_as_the_kernel_has_it(host: str, rule: str, matches: bool) -> None:
    with inside(host):
        sh("ip route add 10.97.2.0/24 via 10.97.1.8 dev kbr0 table 77", f"ip rule add {rule} lookup 77 priority 50")
    route, rules = picked(host)
    assert (route.table, route.via) == ((77, "10.97.1.8") if matches else (254, "10.97.1.9"))
    assert bool(rules) == matches


def test_a_rule_about_a_mark_matches_packets_with_it(host: str) -> None:
    with inside(host):
        sh("ip route add 10.97.2.0/24 via 10.97.1.8 dev kbr0 table 77", "ip rule add fwmark 7 lookup 77 priority 50")
    assert picked(host, 7)[0].table == 77 and picked(host, 8)[0].table == 254


@pytest.mark.parametrize(
    ("command", "kind", "word"),
    [
        ("ip route add blackhole 10.97.2.0/25", "blackhole", "blackhole"),
        ("ip route add prohibit 10.97.2.2", "prohibit", "prohibited"),
        ("ip route add unreachable 10.97.2.2 table 77", "unreachable", "host unreachable"),
        ("ip rule add to 10.97.2.0/24 prohibit priority 50", "", "prohibited"),
        ("ip route del 10.97.2.0/24", "", "network unreachable"),
        ("sysctl -qw net.ipv4.ip_forward=0", "unicast", "forwarding is off"),
        ("ip route add unreachable 10.97.1.2 table 77", "unicast", REFUSED_SOURCE),
    ],
)
def test_a_refusal_is_explained_by_the_entry_that_refuses(host: str, command: str, kind: str, word: str) -> None:
    with inside(host):
        sh("ip rule add from all lookup 77 priority 60", command)
    route, _ = picked(host)
    if command == "ip route del 10.97.2.0/24":
        assert not route.type and route.error, route
        return
    assert route.type == kind and word in route.error, route


def test_a_namespace_is_found_by_the_number_of_its_ports_link_and_entered_for_a_moment(host: str) -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    with inside(host):
        kernel = Kernel()
    try:
        port = kernel.links()["vp1"]
        assert port.master == "kbr0" and port.namespace is not None
        with netns.known(kernel.netlink) as spaces:
            fd, how = spaces[port.namespace]
            pod = netns.within(fd, Kernel)
            assert "tracepod" in how
        try:
            link = pod.links()["eth0"]
            assert link.number == port.peer_index and str(SOURCE) in pod.addresses()
            assert str(pod.route(TARGET)) == "via 10.97.1.1 dev eth0"
        finally:
            pod.close()
    finally:
        kernel.close()
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_sysctls_are_read_as_they_are_also_of_a_link_that_was_made_again(host: str) -> None:
    keys = ["net/ipv4/ip_forward", "net/ipv4/conf/kbr0/rp_filter", "net/ipv4/conf/kbr0/no_such"]
    with inside(host):
        sysctls = Sysctls()
        assert sysctls.read(keys) == {keys[0]: "1", keys[1]: "2"}
        sh("sysctl -qw net.ipv4.ip_forward=0", "ip link del kbr0")
        assert sysctls.read(keys) == {keys[0]: "0"}
        sh("ip link add kbr0 type bridge", "sysctl -qw net.ipv4.conf.kbr0.rp_filter=1")
        assert sysctls.read(keys) == {keys[0]: "0", keys[1]: "1"}
        sh("ip link set kbr0 name kbr1")
        assert sysctls.read(keys) == {keys[0]: "0"}
        sysctls.close()


def test_the_way_to_a_peer_is_asked_once_and_again_after_a_change(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = PodRoutes._elsewhere

    def spy(self: PodRoutes, target: IPAddress, source: IPAddress, iif: int, bridge: int) -> str:
        asked.append(target)
        return real(self, target, source, iif, bridge)

    monkeypatch.setattr(PodRoutes, "_elsewhere", spy)
    gateways = ip_address("10.97.1.1"), ip_address("10.97.2.1")
    with inside(host):
        routes = PodRoutes()
        bridge = socket.if_nametoindex("kbr0")
        assert [routes.astray(bridge, *gateways) for _ in range(3)] == [""] * 3
        assert len(asked) == 1
        for change, expected in [
            ("ip rule add priority 100 to 10.97.2.0/24 prohibit", "nowhere"),
            ("ip rule del priority 100", ""),
            ("ip route add unreachable 10.97.2.0/25", "nowhere"),
            ("ip route del unreachable 10.97.2.0/25", ""),
            ("sysctl -qw net.ipv4.ip_forward=0", "nowhere"),
            ("sysctl -qw net.ipv4.ip_forward=1", ""),
        ]:
            sh(change)
            found = routes.astray(bridge, *gateways)
            assert found.startswith(expected) and bool(found) == bool(expected), (change, found)
        routes.close()
