"""What is not the mesh's: forged packets are delivered to nobody, and others' things are named and left alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.lab.ping import ping
from tests.support.labpackets import (
    Sniffer,
    assert_reach,
    assert_whole,
    datagram,
    ethernet,
    mac,
    send_frame,
    send_packet,
)
from tests.support.labtools import SOON, Make, difference, guarded, ip_json, links, ovsdb, report, routes, wiring

pytestmark = pytest.mark.lab

GRE = 47


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    return module_lab(3, 2, dual_stack=True)


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    yield from guarded(three, thorough=False)


def kbr_mac(host: int) -> str:
    """By how the mesh derives it, so that a sender outside can know it too."""
    return f"0a:58:0a:61:{host:02x}:01"


# --- forged sources

FORGED = {
    "a pod of another node": ("10.97.3.2", "fd00:97:3::2"),
    "the target's neighbour": ("10.97.2.3", "fd00:97:2::3"),
    "another node's gateway": ("10.97.3.1", "fd00:97:3::1"),
    "a cluster address of no node": ("10.97.77.2", "fd00:97:77::2"),
    "the pod's own gateway": ("10.97.1.1", "fd00:97:1::1"),
    "another node's tunnel address": ("192.0.2.13", None),
    "its own node's tunnel address": ("192.0.2.11", None),
}
"""Sources that no pod of host 1 may use."""


def sees_tunnel_addresses(host: Host) -> bool:
    """Whether the kernel can tell kbr0's ports from other bridges', without which a pod may forge
    a tunnel address towards another pod of its own node (and `status` says so)."""
    return not any("nft_meta_bridge" in p["message"] for p in report(host)["problems"])


def test_a_pod_that_forges_its_source_reaches_nobody(mesh: Lab) -> None:
    pod, beside, remote = mesh.pod(1, 1), mesh.pod(1, 2), mesh.pod(2, 1)
    own, far = mac(pod.ns), kbr_mac(1)
    bare = not sees_tunnel_addresses(mesh.host(1))
    with Sniffer(beside.ns) as near, Sniffer(remote.ns) as there:
        for number, sources in enumerate(FORGED.values()):
            for version, source in enumerate(sources):
                if source is None:
                    continue
                to_there, to_beside = str(remote.addresses[version]), str(beside.addresses[version])
                forged = [datagram(source, to_there, f"forged-far-{number}".encode())]
                frames = [ethernet(far, own, packet) for packet in forged]
                if not (bare and source.startswith("192.0.2.")):
                    packet = datagram(source, to_beside, f"forged-near-{number}".encode())
                    frames.append(ethernet(mac(beside.ns), own, packet))
                    frames.append(ethernet(far, own, packet))
                for _ in range(3):
                    send_frame(pod.ns, "eth0", *frames)
                # and through its own kernel, as any process with CAP_NET_RAW can
                send_packet(pod.ns, *forged)
        for version in (0, 1):
            rightful = str(pod.addresses[version])
            for target, sniffer in ((beside, near), (remote, there)):
                mark = f"rightful-{version}".encode()
                send_packet(pod.ns, datagram(rightful, str(target.addresses[version]), mark))
                sniffer.await_marker(mark)
        # what goes to the remote pod goes through the same tunnel: these came last
        assert_whole(ping([mesh.pair(pod, remote), mesh.pair(pod, beside)], 5))
        assert [seen for seen in markers(there) + markers(near) if seen.startswith("forged")] == []


def markers(sniffer: Sniffer) -> list[str]:
    """The payloads of our datagrams that were seen."""
    found = []
    for frame in list(sniffer.frames):
        for mark in (b"forged", b"rightful", b"gre-"):
            at = frame.find(mark)
            if at >= 0:
                found.append(frame[at:].rstrip(b"\0").decode(errors="replace"))
    return found


def test_a_pod_that_says_it_is_the_gateway_is_not_heard(mesh: Lab) -> None:
    pod, beside = mesh.pod(1, 1), mesh.pod(1, 2)
    own = bytes.fromhex(mac(pod.ns).replace(":", ""))

    def arp(sender: str) -> bytes:
        packed = bytes(map(int, sender.split(".")))
        head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2)
        return b"\xff" * 6 + own + struct.pack("!H", 0x0806) + head + own + packed + b"\xff" * 6 + packed

    with Sniffer(beside.ns) as near:
        for _ in range(3):
            send_frame(pod.ns, "eth0", arp("10.97.1.1"), arp("10.97.2.2"))
        send_frame(pod.ns, "eth0", arp(str(pod.addresses[0])))
        wait_for("the rightful ARP", lambda: pod.addresses[0].packed in said(near), SOON)
        assert said(near) == {pod.addresses[0].packed}
    gateway = ip_json(mesh.host(1), "link", "show", "kbr0")[0]["address"]
    assert gateway == kbr_mac(1)
    assert_whole(ping([mesh.pair(beside, mesh.pod(2, 1))], 3))


def said(sniffer: Sniffer) -> set[bytes]:
    """The senders of broadcast ARP replies that were seen."""
    return {f[28:32] for f in list(sniffer.frames) if f[:6] == b"\xff" * 6 and f[12:14] == b"\x08\x06" and f[21] == 2}


# --- forged tunnels


def encapsulated(inner_source: str, target: str, mark: str, peer: int, key: int | None = None) -> bytes:
    """What a peer's tunnel end would send: a GRE header and a frame to host 1's kbr0."""
    frame = ethernet(kbr_mac(1), kbr_mac(peer), datagram(inner_source, target, mark.encode()))
    head = struct.pack("!HH", 0 if key is None else 0x2000, 0x6558)
    return head + (b"" if key is None else struct.pack("!I", key)) + frame


def test_a_tunnel_from_who_is_no_peer_delivers_nothing(mesh: Lab) -> None:
    pod = mesh.pod(1, 1)
    four, six = str(pod.addresses[0]), str(pod.addresses[1])
    tunnel = "192.0.2.11"
    with Sniffer(pod.ns) as there:
        for source in ("192.0.2.1", "192.0.2.99", "198.51.100.7"):
            for inner, target in (("10.97.2.2", four), ("fd00:97:2::2", six), ("192.0.2.12", four), ("8.8.8.8", four)):
                packet = encapsulated(inner, target, f"gre-stranger {source} {inner}", 2)
                for _ in range(3):
                    send_packet(mesh.hub, datagram(source, tunnel, packet, GRE))
        # a peer may send what is its own, under the mesh's key, and nothing else
        for inner, target, key in (
            ("10.97.3.2", four, None),
            ("fd00:97:3::2", six, None),
            ("192.0.2.13", four, None),
            ("10.97.1.3", four, None),
            ("8.8.8.8", four, None),
            ("10.97.2.2", four, 5),
        ):
            for _ in range(3):
                packet = encapsulated(inner, target, f"gre-beyond {inner} {key}", 2, key)
                send_packet(mesh.hub, datagram("192.0.2.12", tunnel, packet, GRE))
        assert_whole(ping([mesh.pair(mesh.pod(2, 1), pod)], 3))
        # the same packet with a peer's address is delivered: so it was the sender that was refused
        for inner, target in (("10.97.2.2", four), ("fd00:97:2::2", six), ("192.0.2.12", four)):
            mark = f"gre-good {inner}"
            packet = encapsulated(inner, target, mark, 2)
            send_packet(mesh.hub, datagram("192.0.2.12", tunnel, packet, GRE))
            there.await_marker(mark.encode())
        assert [seen for seen in markers(there) if not seen.startswith("gre-good")] == []


def test_a_pod_cannot_speak_as_a_tunnel_end(mesh: Lab) -> None:
    """To its own node under a peer's address, and to a remote node, which would see its node's address."""
    pod, beside, remote = mesh.pod(1, 1), mesh.pod(1, 2), mesh.pod(2, 1)
    with Sniffer(beside.ns) as near, Sniffer(remote.ns) as there:
        # the remote one first: connection tracking would take its masqueraded packets for answers to the others
        frame = ethernet(kbr_mac(2), kbr_mac(1), datagram("10.97.1.9", str(remote.addresses[0]), b"gre-pod-far"))
        outer = datagram(str(pod.addresses[0]), "192.0.2.12", struct.pack("!HH", 0, 0x6558) + frame, GRE)
        send_frame(pod.ns, "eth0", *[ethernet(kbr_mac(1), mac(pod.ns), outer)] * 3)
        inner = encapsulated("10.97.2.2", str(beside.addresses[0]), "gre-pod-near", 2)
        for source in ("192.0.2.12", str(pod.addresses[0])):
            outer = datagram(source, "192.0.2.11", inner, GRE)
            send_frame(pod.ns, "eth0", *[ethernet(kbr_mac(1), mac(pod.ns), outer)] * 3)
        assert_whole(ping([mesh.pair(pod, remote), mesh.pair(pod, beside), mesh.pair(remote, beside)], 5))
        assert markers(near) + markers(there) == []


# --- others' things


def told(host: Host, *words: str) -> None:
    """`status`, `plan` and the last words of `agent --once` name it; the exit codes say that it is in the way."""
    live = wait_for(
        f"status to name {words}",
        lambda: [line for line in host.ovsmesh("status").stdout.splitlines() if all(w in line for w in words)],
        SOON,
    )
    assert live[0].startswith("!"), live
    assert json.dumps(report(host)).count(words[0]) >= 1
    plan = host.ovsmesh("plan")
    assert all(word in plan.stdout + plan.stderr for word in words), plan.stdout + plan.stderr
    assert plan.returncode == 1, plan.stdout + plan.stderr
    host.stop_agent()
    once = host.ovsmesh("agent", "--once", timeout=90)
    assert once.returncode == 1, once.stderr
    assert all(word in once.stderr for word in words), once.stderr
    assert once.stderr.rstrip().endswith("not converged")


@pytest.mark.parametrize(
    "route",
    [
        "10.97.2.0/24 via 192.0.2.1",
        "10.97.2.0/24 via 192.0.2.1 metric 111",
        "10.97.2.0/24 dev kbr0 metric 111",
    ],
)
def test_an_unmanaged_route_to_a_peers_range_is_named_and_left(mesh: Lab, route: str) -> None:
    host = mesh.host(1)
    before = wiring(host)
    host.run(["ip", "route", "replace", *route.split()])
    unmanaged = [line for line in routes(host) if line not in before["routes"]]
    assert len(unmanaged) == 1
    told(host, "route 10.97.2.0/24", "is not managed by ovsmesh")
    assert unmanaged[0] in routes(host)
    host.start_agent()
    wait_for("/readyz to say no", lambda: host.http("/readyz")[0] == 503, SOON)
    # a repair beside it leaves it too
    host.run(["ip", "route", "del", "10.97.3.0/24"])
    wait_for("the other route", lambda: any("10.97.3.0/24 via 10.97.3.1" in line for line in routes(host)), SOON)
    assert unmanaged[0] in routes(host)
    assert_whole(ping([mesh.pair(mesh.pod(1, 1), mesh.pod(3, 1))], 2))
    host.run(["ip", "route", "del", *route.split()])
    mesh.converged(SOON, thorough=True)
    assert difference(before, wiring(host)) == []
    assert_reach(mesh)


def test_an_unmanaged_port_in_obr0_is_named_and_left(mesh: Lab) -> None:
    host = mesh.host(1)
    host.ovs_vsctl("add-port", "obr0", "alien", "--", "set", "interface", "alien", "type=internal")
    try:
        wait_for("status to name it", lambda: "alien" in host.ovsmesh("status").stdout, SOON)
        host.stop_agent()
        once = host.ovsmesh("agent", "--once")
        # it is in nobody's way
        assert once.returncode == 0, once.stderr
        assert "port alien" in once.stderr and "not managed by ovsmesh" in once.stderr, once.stderr
        plan = host.ovsmesh("plan")
        assert plan.returncode == 0 and "alien" in plan.stdout + plan.stderr
        host.start_agent()
        mesh.converged(SOON)
        host.ovs_vsctl("del-port", "gre-h2")
        wait_for("the port to be back", lambda: "gre-h2" in host.ovs_vsctl("list-ports", "obr0"), SOON)
        assert "alien" in host.ovs_vsctl("list-ports", "obr0")
        assert_reach(mesh)
    finally:
        host.ovs_vsctl("--if-exists", "del-port", "obr0", "alien")


def _unmanaged_kbr0(host: Host) -> None:
    netns.ip_batch(["link add kbr0 type bridge", "link set kbr0 up", "addr add 172.30.0.1/24 dev kbr0"], host.ns)


def _unmanaged_obr0(host: Host) -> None:
    datapath = host.settings.datapath
    host.ovs_vsctl("add-br", "obr0", "--", "set", "bridge", "obr0", f"datapath_type={datapath}")


@pytest.mark.parametrize(("make", "word"), [(_unmanaged_kbr0, "kbr0"), (_unmanaged_obr0, "obr0")], ids=["kbr0", "obr0"])
def test_an_unmanaged_bridge_under_our_name_is_named_and_left(lab: Make, make: Any, word: str) -> None:
    made = lab(2, 1, agents=False)
    host = made.host(1)
    make(host)
    before = links(host)[word], ovsdb(host)["Bridge"], [a for a in wiring(host)["addresses"] if word in a]
    host.start_agent()
    told(host, word, "delete it")
    after = links(host)[word], ovsdb(host)["Bridge"], [a for a in wiring(host)["addresses"] if word in a]
    assert after[0] == before[0] and after[2] == before[2]
    assert [b for b in after[1] if b["name"] == word] == [b for b in before[1] if b["name"] == word]
    # once it is gone, ours is made
    host.start_agent()
    if word == "kbr0":
        host.run(["ip", "link", "del", "kbr0"])
    else:
        host.ovs_vsctl("del-br", "obr0")
    made.host(2).start_agent()
    made.converged(SOON, thorough=True)
    for one in made.hosts:
        one.plug()
    assert_reach(made)


def test_exit_codes_say_what_is_left_to_do(mesh: Lab) -> None:
    host = mesh.host(1)
    host.stop_agent()
    assert host.ovsmesh("plan").returncode == 0
    host.run(["ip", "route", "del", "10.97.2.0/24"])
    plan = host.ovsmesh("plan")
    assert (plan.returncode, plan.stdout) == (2, "+ route 10.97.2.0/24 via 10.97.2.1 dev kbr0 mtu 1462\n")
    once = host.ovsmesh("agent", "--once")
    assert once.returncode == 0 and once.stderr.rstrip().endswith("converged")
    assert host.ovsmesh("plan").returncode == 0
    # a file that is refused as a whole: nothing to change, but not as the file wants it
    mesh.write_mesh_text("nodes: 7\n")
    plan, once = host.ovsmesh("plan"), host.ovsmesh("agent", "--once")
    mesh.write_mesh()
    assert plan.returncode == 1 and "mesh.yaml" in plan.stderr
    assert once.returncode == 1 and "mesh.yaml" in once.stderr
    host.start_agent()
