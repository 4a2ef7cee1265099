"""The mesh as its packets see it: all to all, once each, full size, nothing flooded, and still when nothing changes."""

from __future__ import annotations

import re
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.lab.ping import Pair, ping
from tests.support.labpackets import Sniffer, assert_reach, assert_whole, datagram, ethernet, mac, send_frame
from tests.support.labtools import (
    SOON,
    Make,
    difference,
    flows,
    guarded,
    links,
    netlink_watched,
    routes,
    transactions,
    turns,
    wiring,
)

pytestmark = pytest.mark.lab

TRIES = 3
"""How often a test of nothing (no write, no loss) is made again on a machine that is not quiet by itself."""


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    return module_lab(3, 2, dual_stack=True)


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    yield from guarded(three)


def test_all_pods_reach_all_and_nothing_is_flooded_into_a_tunnel(mesh: Lab) -> None:
    with ExitStack() as watching:
        captures = [watching.enter_context(host.capture()) for host in mesh.hosts]
        for pod in mesh.pods:
            # so that each pod asks for its gateway again, by ARP and by neighbour discovery
            pod.run(["ip", "neigh", "flush", "dev", "eth0"])
            pod.run(["ip", "-6", "neigh", "flush", "dev", "eth0"])
            other = next(
                p for p in mesh.pods if p.ns != pod.ns and p.ns[: len(mesh.name) + 3] != pod.ns[: len(mesh.name) + 3]
            )
            send_frame(pod.ns, "eth0", *group_frames(pod.ns, str(pod.addresses[0]), str(other.addresses[0])))
        assert_whole(mesh.ping_matrix(count=5))
    for capture in captures:
        assert capture.missed == 0
        # IPv4 and IPv6 both went through: 4 remote pods × 2 own × 5, there and back, both ways round
        assert capture.inner[0x0800] >= 160 and capture.inner[0x86DD] >= 160, capture.inner
        assert set(capture.inner) == {0x0800, 0x86DD}
        assert (capture.broadcast, capture.multicast) == (0, 0), [frame[:60].hex() for frame in capture.flooded[:5]]


def group_frames(ns: str, address: str, remote: str) -> list[bytes]:
    """What a pod shouts: ARP for a remote pod and for nobody, a gratuitous ARP, broadcast and multicast datagrams."""
    source = mac(ns)

    def arp(sender: str, target: str) -> bytes:
        packed = [bytes(map(int, ip.split("."))) for ip in (sender, target)]
        sent = bytes.fromhex(source.replace(":", ""))
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + sent + packed[0] + bytes(6) + packed[1]
        return b"\xff" * 6 + sent + struct.pack("!H", 0x0806) + body

    return [
        arp(address, remote),
        arp(address, address.rpartition(".")[0] + ".200"),
        arp(address, address),
        ethernet("ff:ff:ff:ff:ff:ff", source, datagram(address, "255.255.255.255", b"hello")),
        ethernet("01:00:5e:00:00:fb", source, datagram(address, "224.0.0.251", b"hello")),
        ethernet("33:33:00:00:00:fb", source, datagram("fe80::1:2", "ff02::fb", b"hello")),
        # not a group address, but one that no bridge has learned: it would be flooded as one
        ethernet("0a:58:0a:61:63:63", source, datagram(address, remote, b"hello")),
    ]


def test_full_size_packets_pass_and_one_byte_more_is_refused_with_the_right_mtu(mesh: Lab) -> None:
    pairs = mesh.pairs(between_hosts_only=True)
    assert_whole(ping(pairs, 2, size=1462, df=True))
    source, target = mesh.pod(1, 1), mesh.pod(2, 1)
    # a pod that was plugged in with the wrong MTU finds out the right one
    device, host = "vp1", mesh.host(1)
    try:
        netns.ip_batch([f"link set {device} mtu 1500"], host.ns)
        netns.ip_batch(["link set eth0 mtu 1500"], source.ns)
        for target_address, header, said in (
            (target.addresses[0], 28, r"[Ff]rag needed and DF set \(mtu = 1462\)"),
            (target.addresses[1], 48, r"[Pp]acket too big: mtu=1462"),
        ):
            ping_argv = ["ping", "-c", "1", "-W", "1", "-M", "do", "-s", str(1463 - header), str(target_address)]
            found = source.run(ping_argv, check=False)
            assert found.returncode == 1 and re.search(said, found.stdout), found.stdout + found.stderr
    finally:
        netns.ip_batch(["link set eth0 mtu 1462"], source.ns)
        netns.ip_batch([f"link set {device} mtu 1462"], host.ns)
        for family in ("-4", "-6"):
            source.run(["ip", family, "route", "flush", "cache"])
    assert_whole(ping(pairs, 1, size=1462, df=True))


def test_a_host_process_bound_to_its_tunnel_address_reaches_remote_pods(mesh: Lab) -> None:
    for host in mesh.hosts:
        for pod in (p for other in mesh.hosts if other.index != host.index for p in other.pods):
            found = host.run(
                ["ping", "-c", "2", "-i", "0.01", "-W", "2", "-I", str(host.address), str(pod.addresses[0])]
            )
            assert " 0% packet loss" in found.stdout


def test_hosts_and_pods_reach_each_other(mesh: Lab) -> None:
    pods = [Pair(h.ns, str(a), h.name, p.name) for h in mesh.hosts for p in mesh.pods for a in p.addresses]
    gateways = [Pair(p.ns, f"10.97.{h.index}.1", p.name, h.name) for h in mesh.hosts for p in mesh.pods]
    assert_whole(ping([*pods, *gateways], 2))


def test_pods_reach_the_world_under_their_hosts_address_and_each_other_under_their_own(mesh: Lab) -> None:
    pod, other = mesh.pod(1, 1), mesh.pod(2, 1)
    with Sniffer(mesh.hub, "hub") as world, Sniffer(other.ns) as there:
        assert_whole(ping([Pair(pod.ns, "192.0.2.1", pod.name, "world")], 3))
        assert_whole(ping([mesh.pair(pod, other)], 3))
        wait_for("the pings to be seen", lambda: len(sources(there)) and len(sources(world)), SOON)
    assert sources(world) == {"192.0.2.11"}
    assert sources(there) == {str(pod.addresses[0])}


def sources(sniffer: Sniffer) -> set[str]:
    """Who sent the echo requests that were seen and are not inside a tunnel."""
    echoes = [f for f in list(sniffer.frames) if f[12:14] == b"\x08\x00" and f[23] == 1 and f[34] == 8]
    return {".".join(map(str, frame[26:30])) for frame in echoes}


def test_what_has_no_node_is_unreachable_and_does_not_leak_to_the_world(mesh: Lab) -> None:
    pod = mesh.pod(1, 1)
    with mesh.host(1).capture() as capture:
        track = ping([Pair(pod.ns, "10.97.77.2", pod.name, "nobody"), Pair(pod.ns, "192.0.2.1", pod.name, "world")], 2)
    assert len(track[0].refused) == 2 and not track[0].received
    assert track[1].lost == 0
    assert capture.encapsulated == 0


def test_a_second_run_at_the_same_state_writes_nothing(mesh: Lab) -> None:
    host = mesh.host(1)
    before = wiring(host)
    host.stop_agent()
    ages = durations(mesh)
    written = transactions(host)
    # a write would show each time; the kernel's own late word of a link does not
    for _ in range(TRIES):
        with netlink_watched(host) as quiet:
            done = host.ovsmesh("agent", "--once")
        if not quiet.lines:
            break
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^converged$", done.stderr), done.stderr
    assert quiet.lines == []
    assert transactions(host) == written
    assert all(age >= ages[flow] for flow, age in durations(mesh).items())
    assert difference(before, wiring(host)) == []
    plan = host.ovsmesh("plan")
    assert (plan.returncode, plan.stdout) == (0, "nothing to change\n"), plan.stderr
    # and so does an agent that stays
    for _ in range(TRIES):
        if host.agent_alive():
            host.stop_agent()
        with netlink_watched(host) as quiet:
            host.start_agent()
            mesh.converged()
            wait_for("the agent's first turn", lambda: turns(host) >= 1, SOON)
        if not quiet.lines:
            break
    assert quiet.lines == []
    assert transactions(host) == written
    assert difference(before, wiring(host)) == []


def durations(mesh: Lab) -> dict[str, float]:
    """Seconds that each flow of host 1 has stood."""
    text = mesh.host(1).ovs_ofctl("dump-flows", "obr0")
    found = re.findall(r"duration=([\d.]+)s.*?(priority=\S+)", text)
    return {flow: float(age) for age, flow in found}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_an_agent_that_ends_and_starts_again_costs_no_packet(mesh: Lab, how: signal.Signals) -> None:
    host = mesh.host(1)
    before = wiring(host)
    pairs = [pair for pair in mesh.pairs(between_hosts_only=True) if "h1" in pair.source + pair.target][:20]
    # what an agent does to packets it does each time; a userspace switch that waits for a CPU loses some by itself
    for _ in range(TRIES):
        with mesh.stream(pairs, len(pairs) / 1000) as stream:
            assert stream.wait(time.time(), SOON)
            for _ in range(2):
                host.stop_agent(how)
                assert not host.agent_alive()
                assert difference(before, wiring(host)) == []
                # some hundred packets without an agent
                assert stream.wait(time.time(), SOON, run=10)
                host.start_agent()
                mesh.converged()
                assert stream.wait(time.time(), SOON)
        if not any(track.lost for track in stream.tracks):
            break
    assert sum(len(track.sent) for track in stream.tracks) > 300
    assert_whole(stream.tracks)
    assert difference(before, wiring(host)) == []


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "vxlan": ({"encapsulation": "vxlan", "dual_stack": True}, 1450),
    "vxlan-key": ({"encapsulation": "vxlan", "key": 7}, 1450),
    "geneve": ({"encapsulation": "geneve", "dual_stack": True}, 1450),
    "gre-key": ({"key": 7}, 1458),
    "gre-underlay6": ({"underlay6": True, "dual_stack": True}, 1442),
    "vxlan-underlay6": ({"encapsulation": "vxlan", "underlay6": True}, 1430),
    "gre-small-underlay": ({"underlay_mtu": 1400}, 1362),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_encapsulation_and_underlay_carries_the_mesh(lab: Make, name: str) -> None:
    options, mtu = VARIANTS[name]
    made = lab(2, 1, **options)
    with made.host(1).capture() as capture, Sniffer(made.host(1).ns, outgoing=True) as wire:
        assert_whole(made.ping_matrix(count=3))
        assert_whole(ping(made.pairs(), 2, size=mtu, df=True))
    assert all(t.lost == 2 for t in ping(made.pairs(), 2, size=mtu + 1, df=True, timeout=0.3))
    assert capture.encapsulated == 20 * len(made.pairs()) // 2
    assert (capture.missed, capture.broadcast, capture.multicast) == (0, 0, 0)
    if made.settings.key:
        assert keys(wire, made) == {made.settings.key}
    for host in made.hosts:
        plan = host.ovsmesh("plan")
        assert plan.returncode == 0, plan.stdout + plan.stderr


def keys(wire: Sniffer, made: Lab) -> set[int]:
    """The keys of the tunnel packets that were seen."""
    found = set()
    for frame in wire.frames:
        if frame[12:14] == b"\x08\x00" and frame[23] == 47:
            flags, _, key = struct.unpack_from("!HHI", frame, 34)
            found.add(key if flags & 0x2000 else -1)
        elif frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == struct.pack("!H", 4789):
            found.add(int.from_bytes(frame[46:49], "big"))
    return found


def test_ten_hosts_with_three_pods(lab: Make) -> None:
    made = lab(10, 3)
    with ExitStack() as watching:
        captures = [watching.enter_context(host.capture()) for host in made.hosts]
        tracks = made.ping_matrix(count=3)
    assert len(tracks) == 30 * 29
    assert_whole(tracks)
    assert [(c.missed, c.broadcast, c.multicast) for c in captures] == [(0, 0, 0)] * 10
    assert all(capture.encapsulated == 2 * 2 * 3 * 3 * 27 for capture in captures)


def test_a_changed_setting_of_the_mesh_reaches_every_host_live(lab: Make) -> None:
    made = lab(2, 1)
    made.write_mesh(encapsulation="vxlan", key=9)
    made.converged(thorough=True)
    assert_reach(made)
    for host in made.hosts:
        assert not any("gre-" in port for port in host.ovs_vsctl("list-ports", "obr0").split())
        assert all("gre-" not in flow for flow in flows(host))
    made.write_mesh(mtu=1400)
    made.converged(thorough=True)
    for host in made.hosts:
        assert {name: links(host)[name]["mtu"] for name in ("kbr0", "obr0")} == {"kbr0": 1400, "obr0": 1400}
        assert all("mtu 1400" in route for route in routes(host) if "onlink" in route)
    assert_reach(made)
