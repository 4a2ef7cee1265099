"""Whatever someone changes on a live host comes back as it was, is counted, and costs nothing else anything."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.result import compare
from ovsmesh.dataplane.types import MARK, OBR
from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.lab.ping import ping
from ovsmesh.mesh.file_source import FileSource
from tests.support.firewallkit import inside
from tests.support.labpackets import assert_reach, assert_whole
from tests.support.labtools import SOON, Make, State, await_state, difference, drift, flows, guarded, wiring

pytestmark = pytest.mark.lab

UNMANAGED_NFT = """
table inet others { chain forward { type filter hook forward priority 10; policy accept; counter; }; }
table bridge others { set peers4 { type ipv4_addr; elements = { 192.0.2.99 }; }; }
"""


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    made = module_lab(3, 1, dual_stack=True)
    host = made.host(1)
    # what others have on this host, and no repair may touch
    host.run(["nft", "-f", "-"], text=UNMANAGED_NFT)
    lines = [
        "link add others type bridge",
        "link set others up",
        "addr add 198.51.100.1/24 dev others",
        "route add 203.0.113.0/24 via 192.0.2.1 metric 111",
        "neigh add 198.51.100.9 lladdr 02:00:00:00:00:09 dev others nud permanent",
    ]
    netns.ip_batch(lines, host.ns)
    host.ovs_vsctl("add-br", "br-else", "--", "set", "bridge", "br-else", f"datapath_type={made.settings.datapath}")
    host.ovs_vsctl("add-port", "br-else", "else0", "--", "set", "interface", "else0", "type=internal")
    host.ovs_ofctl("add-flow", "br-else", "priority=7,in_port=LOCAL,actions=drop")
    return made


@pytest.fixture(scope="module")
def elsewhere(three: Lab) -> list[State]:
    """The other hosts as they were before the first fault of host 1."""
    return [wiring(host) for host in three.hosts[1:]]


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    yield from guarded(three, thorough=False)


Break = Callable[[Host], object]


class Fault(NamedTuple):
    """How someone breaks a host, and the kinds of parts at least one of which has to be counted as drift
    (none where someone else may be quicker than the agent)."""

    does: Break
    kinds: frozenset[str]


def _ip(*args: str) -> Break:
    return lambda host: host.run(["ip", *args])


def _vsctl(*args: str) -> Break:
    return lambda host: host.ovs_vsctl(*args)


def _nft(text: str) -> Break:
    return lambda host: host.run(["nft", "-f", "-"], text=text)


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


PEER_GATEWAY, PEER_MAC = "10.97.2.1", "0a:58:0a:61:02:01"
FLOW_OUT = f"priority=100,in_port=LOCAL,dl_dst={PEER_MAC}"
FAULTS = {
    "port deleted": Fault(_vsctl("del-port", "gre-h2"), _kinds("ports")),
    "all ports deleted": Fault(_vsctl("del-port", "gre-h2", "--", "del-port", "gre-h3"), _kinds("ports")),
    "remote_ip changed": Fault(_vsctl("set", "interface", "gre-h2", "options:remote_ip=192.0.2.77"), _kinds("ports")),
    "local_ip removed": Fault(_vsctl("remove", "interface", "gre-h2", "options", "local_ip"), _kinds("ports")),
    "key set": Fault(_vsctl("set", "interface", "gre-h2", "options:key=5"), _kinds("ports")),
    "protected cleared": Fault(_vsctl("set", "port", "gre-h2", "protected=false"), _kinds("ports")),
    # ovs-vswitchd drops all flows with it, and may say so first
    "fail_mode changed": Fault(_vsctl("set", "bridge", "obr0", "fail_mode=secure"), _kinds("bridges flows")),
    "route deleted": Fault(_ip("route", "del", "10.97.2.0/24"), _kinds("routes")),
    "IPv6 route deleted": Fault(_ip("-6", "route", "del", "fd00:97:2::/64"), _kinds("routes")),
    "route's MTU changed": Fault(
        _ip(
            *("route", "change", "10.97.2.0/24", "via", PEER_GATEWAY, "dev", "kbr0", "onlink"),
            *("proto", "111", "metric", "111", "mtu", "900"),
        ),
        _kinds("routes"),
    ),
    "unreachable fallback deleted": Fault(
        _ip("route", "del", "unreachable", "10.97.0.0/16", "metric", "4278198272"), _kinds("routes")
    ),
    "all routes of ours flushed": Fault(_ip("route", "flush", "proto", "111"), _kinds("routes")),
    "flows emptied": Fault(lambda host: host.ovs_ofctl("del-flows", "obr0"), _kinds("flows")),
    "one flow deleted": Fault(lambda host: host.ovs_ofctl("--strict", "del-flows", "obr0", FLOW_OUT), _kinds("flows")),
    "one flow's actions changed": Fault(
        lambda host: host.ovs_ofctl("--strict", "mod-flows", "obr0", f"{FLOW_OUT},actions=drop"), _kinds("flows")
    ),
    "one flow's source widened": Fault(
        lambda host: host.ovs_ofctl("del-flows", "obr0", "ip,nw_src=10.97.2.0/24"), _kinds("flows")
    ),
    "neighbour deleted": Fault(_ip("neigh", "del", PEER_GATEWAY, "dev", "kbr0"), _kinds("neighbours")),
    "neighbour's MAC changed": Fault(
        _ip("neigh", "replace", PEER_GATEWAY, "lladdr", "02:00:00:00:00:01", "dev", "kbr0", "nud", "permanent"),
        _kinds("neighbours"),
    ),
    "IPv6 neighbour deleted": Fault(_ip("neigh", "del", "fd00:97:2::1", "dev", "kbr0"), _kinds("neighbours")),
    "FDB entry deleted": Fault(
        lambda host: host.run(["bridge", "fdb", "del", PEER_MAC, "dev", "obr0", "master"]), _kinds("fdb")
    ),
    "FDB entry moved to a pod": Fault(
        lambda host: host.run(["bridge", "fdb", "replace", PEER_MAC, "dev", "vp1", "master", "static"]), _kinds("fdb")
    ),
    "kbr0's IPv4 address deleted": Fault(_ip("addr", "del", "10.97.1.1/24", "dev", "kbr0"), _kinds("addresses")),
    "kbr0's IPv6 address deleted": Fault(_ip("addr", "del", "fd00:97:1::1/64", "dev", "kbr0"), _kinds("addresses")),
    "kbr0's addresses flushed": Fault(_ip("addr", "flush", "dev", "kbr0"), _kinds("addresses")),
    "kbr0 down": Fault(_ip("link", "set", "kbr0", "down"), _kinds("links routes")),
    "kbr0 down and up": Fault(
        lambda host: netns.ip_batch(["link set kbr0 down", "link set kbr0 up"], host.ns), _kinds("routes neighbours")
    ),
    "kbr0 renamed with pods on it": Fault(
        lambda host: netns.ip_batch(["link set kbr0 down", "link set kbr0 name astray"], host.ns), _kinds("links")
    ),
    "kbr0's MAC changed": Fault(_ip("link", "set", "kbr0", "address", "02:00:00:00:00:02"), _kinds("links")),
    "kbr0's MTU changed": Fault(_ip("link", "set", "kbr0", "mtu", "1300"), _kinds("links")),
    "kbr0 deleted with pods on it": Fault(_ip("link", "del", "kbr0"), _kinds("links")),
    "obr0 removed from kbr0": Fault(_ip("link", "set", "obr0", "nomaster"), _kinds("links")),
    "obr0 down": Fault(_ip("link", "set", "obr0", "down"), _kinds("links")),
    "obr0's link deleted": Fault(_ip("link", "del", "obr0"), _kinds("bridges")),
    "obr0's link renamed": Fault(
        lambda host: netns.ip_batch(["link set obr0 down", "link set obr0 name astray"], host.ns), _kinds("bridges")
    ),
    "obr0's link moved to another namespace": Fault(
        lambda host: host.run(["ip", "link", "set", "obr0", "netns", host.pod(1).ns]), _kinds("bridges")
    ),
    # ovs-vswitchd may be the first to put it back; the link is a new one then
    "obr0's port deleted from the datapath": Fault(
        lambda host: host.ovs_appctl("dpctl/del-if", "netdev@ovs-netdev", "obr0"), _kinds("bridges links")
    ),
    "the tunnels' port deleted from the datapath": Fault(
        lambda host: host.ovs_appctl("dpctl/del-if", "netdev@ovs-netdev", "gre_sys"), _kinds("bridges")
    ),
    "a controller on obr0": Fault(_vsctl("set-controller", "obr0", "tcp:127.0.0.1:6653"), _kinds("bridges")),
    # each changes how a switch forwards that has no flows, or may write any
    "flood_vlans, snooping and another protocol on obr0": Fault(
        _vsctl(
            *("set", "bridge", "obr0", "flood_vlans=1,2", "mcast_snooping_enable=true", "protocols=OpenFlow15"),
            *("--", "set", "port", "obr0", "tag=7"),
        ),
        _kinds("bridges"),
    ),
    "a tunnel port in a VLAN": Fault(
        _vsctl("set", "port", "gre-h2", "tag=7", "vlan_mode=access", "trunks=7,8"), _kinds("ports")
    ),
    "spanning tree on obr0": Fault(_vsctl("set", "bridge", "obr0", "stp_enable=true"), _kinds("bridges")),
    # ovs-vswitchd puts it back too, and may be the first
    "obr0's MTU changed": Fault(_ip("link", "set", "obr0", "mtu", "1300"), frozenset()),
    "obr0's mtu_request removed": Fault(_vsctl("clear", "interface", "obr0", "mtu_request"), _kinds("bridges")),
    "obr0 floods": Fault(
        lambda host: host.run(["bridge", "link", "set", "dev", "obr0", "flood", "on", "learning", "on"]),
        _kinds("links"),
    ),
    "bridge obr0 deleted": Fault(_vsctl("del-br", "obr0"), _kinds("bridges")),
    "masquerade flushed": Fault(_nft("flush chain inet ovsmesh postrouting"), _kinds("rules")),
    "nft table flushed": Fault(_nft("flush table inet ovsmesh"), _kinds("rules")),
    "nft tables deleted": Fault(_nft("delete table inet ovsmesh; delete table bridge ovsmesh"), _kinds("rules")),
    "a peer taken out of the nft set": Fault(
        _nft("delete element inet ovsmesh peers4 { 192.0.2.12 }"), _kinds("filter_peers")
    ),
    "a stranger put into the nft set": Fault(
        _nft("add element inet ovsmesh peers4 { 192.0.2.66 }"), _kinds("filter_peers")
    ),
    "an accept rule put first in our chain": Fault(_nft("insert rule inet ovsmesh input accept"), _kinds("rules")),
}
SYSCTLS = {
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/send_redirects": "1",
    "net/ipv4/conf/kbr0/forwarding": "0",
    "net/ipv4/conf/kbr0/arp_ignore": "8",
    "net/ipv4/conf/kbr0/send_redirects": "1",
    "net/ipv4/conf/kbr0/rp_filter": "1",
    "net/ipv4/conf/kbr0/accept_redirects": "1",
    "net/ipv6/conf/all/forwarding": "0",
    "net/ipv6/conf/kbr0/forwarding": "0",
    "net/ipv6/conf/kbr0/accept_ra": "1",
    "net/ipv6/conf/kbr0/accept_redirects": "1",
    "net/ipv6/conf/kbr0/disable_ipv6": "1",
    "net/ipv6/conf/kbr0/accept_dad": "1",
    "net/ipv6/conf/kbr0/addr_gen_mode": "1",
}
FAULTS |= {
    f"sysctl {path}": Fault(lambda host, p=path, v=value: netns.sysctl(host.ns, {p: v}), _kinds("sysctls"))  # type: ignore[misc]
    for path, value in SYSCTLS.items()
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_someone_changes_is_put_back(mesh: Lab, elsewhere: list[State], name: str) -> None:
    host, fault = mesh.host(1), FAULTS[name]
    before, counted = wiring(host), drift(host)
    fault.does(host)

    def noticed() -> bool:
        now = drift(host)
        return any(now[kind] > counted[kind] for kind in fault.kinds)

    if fault.kinds:
        wait_for(f"{name} to be counted as drift", noticed, SOON, hint=f"{counted} → {drift(host)}")
    await_state(lambda: wiring(host), before)
    assert_reach(mesh)
    assert " by someone; restored after " in host.agent_log.read_text()


def test_no_repair_touched_another_host(mesh: Lab, elsewhere: list[State]) -> None:
    assert [difference(old, wiring(host)) for old, host in zip(elsewhere, mesh.hosts[1:], strict=True)] == [[], []]
    assert [sum(drift(host).values()) for host in mesh.hosts[1:]] == [0, 0]


def test_after_all_repairs_a_fresh_look_finds_nothing_to_change(mesh: Lab) -> None:
    """The state was compared after each; `plan` reads the system whole, as the agent's notifications do not."""
    for host in mesh.hosts:
        plan = host.ovsmesh("plan")
        assert (plan.returncode, plan.stdout) == (0, "nothing to change\n"), plan.stdout + plan.stderr


def test_every_sysctl_that_the_agent_sets_is_among_those_tried(mesh: Lab) -> None:
    history = mesh.host(1).ovsmesh("history").stdout
    named = {line.split("sysctl ")[1].split()[0] for line in history.splitlines() if "~ sysctl " in line}
    assert named and named <= set(SYSCTLS), named - set(SYSCTLS)


def test_everything_broken_at_once_on_every_host_comes_back(mesh: Lab) -> None:
    before = [wiring(host) for host in mesh.hosts]
    names = ("nft tables deleted", "sysctl net/ipv4/ip_forward", "bridge obr0 deleted", "kbr0 deleted with pods on it")
    for host in mesh.hosts:
        for name in names:
            FAULTS[name].does(host)
    for host, old in zip(mesh.hosts, before, strict=True):
        await_state(lambda h=host: wiring(h), old, SOON)  # type: ignore[misc]
    assert_reach(mesh)


def test_a_repair_costs_the_other_peers_no_packet(mesh: Lab) -> None:
    host = mesh.host(1)
    stays = [pair for pair in mesh.pairs(between_hosts_only=True) if {pair.source[:2], pair.target[:2]} == {"h1", "h3"}]
    before = wiring(host)
    with mesh.stream(stays, 0.004) as stream:
        assert stream.wait(time.time(), SOON)
        names = ["route deleted", "one flow deleted", "neighbour deleted", "FDB entry deleted"]
        if mesh.settings.datapath == "system":
            # the userspace datapath may drop a packet or two of others whenever it closes any port
            names.append("port deleted")
        for name in names:
            FAULTS[name].does(host)
            await_state(lambda: wiring(host), before)
            assert stream.wait(time.time(), SOON)
    assert_whole(stream.tracks)


def test_an_unmanaged_flow_is_named_and_left(mesh: Lab) -> None:
    host = mesh.host(1)
    host.ovs_ofctl("add-flow", "obr0", "priority=5,udp,tp_dst=9,actions=drop")
    try:
        said = wait_for(
            "status to name the flow",
            lambda: [p for p in host.ovsmesh("status").stdout.splitlines() if "is not managed by ovsmesh" in p],
            SOON,
        )
        assert "priority=5,udp,tp_dst=9" in said[0]
        assert any("priority=5,udp,tp_dst=9" in flow for flow in flows(host))
        assert host.ready()
        assert_whole(ping(mesh.pairs(), 1))
    finally:
        host.ovs_ofctl("--strict", "del-flows", "obr0", "priority=5,udp,tp_dst=9")


def test_reading_all_again_at_rest_starts_no_process_and_misses_no_change(
    mesh: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = mesh.host(2)
    host.stop_agent()
    ran: list[object] = []
    run = subprocess.Popen.__init__

    def spy(self: Any, args: Any, *more: Any, **options: Any) -> None:
        ran.append(args)
        run(self, args, *more, **options)

    with contextlib.ExitStack() as ending:
        ending.callback(host.start_agent)
        ending.enter_context(inside(host.ns))
        source = FileSource(str(host.mesh), str(tmp_path), host.name)
        ending.callback(source.close)
        driver = Driver(host.ovsdb, acting=True)
        ending.callback(driver.close)
        driver.connect()
        filters = driver._filters
        assert filters is not None
        known = source.snapshot().mesh
        assert known is not None
        for _ in range(2):
            # the second look reads the kernel's filters again where others have changed them meanwhile
            driver.dirty()
            assert not compare(driver, known, host.name, probe_firewall=False).plan.steps
        wait_for("the filters of others to be looked at", lambda: filters._thread is None, SOON)
        with monkeypatch.context() as patched:
            patched.setattr(subprocess.Popen, "__init__", spy)
            driver.dirty()
            assert not compare(driver, known, host.name, probe_firewall=False).plan.steps
            wait_for("the filters of others to be looked at", lambda: filters._thread is None, SOON)
        assert ran == []
        # what tells of changes hangs, so that this one is told to nobody
        monitor = driver.flows._monitor
        assert monitor is not None
        os.kill(monitor.pid, signal.SIGSTOP)
        host.ovs_ofctl("--strict", "del-flows", OBR, "priority=0")
        host.run(["nft", "flush", "table", "inet", MARK])
        assert driver.firewall._monitor is not None and driver.firewall._monitor.transactions()
        driver.dirty()
        found = {step.kind for step in compare(driver, known, host.name, probe_firewall=False).plan.steps}
        assert found == {"flows", "rules"}
