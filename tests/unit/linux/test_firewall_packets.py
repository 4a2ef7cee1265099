"""What the filter rules do to packets, in a kernel."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from ovsmesh.checksum import internet_checksum
from ovsmesh.dataplane.desired import dataplane
from ovsmesh.dataplane.types import FALLBACK_METRIC, Facts
from ovsmesh.linux.firewall import Firewall
from tests.support.firewallkit import MESH, converge, desired, inside, needs_nft, needs_root, nft, sh


def ipv4(source: Any, target: Any, protocol: Any, payload: Any) -> Any:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target))  # fmt: skip
    return head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:] + payload


def udp(payload: Any, port: Any = 9) -> Any:
    return struct.pack("!HHHH", port, port, 8 + len(payload), 0) + payload


def ipv6(source: Any, target: Any, payload: Any, protocol: Any = 59) -> Any:
    pair = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + pair + payload


def advertisement(target: Any, payload: Any) -> Any:
    head = struct.pack("!BBHI", 136, 0, 0, 3 << 29) + socket.inet_pton(socket.AF_INET6, target)
    return ipv6("fe80::1", "fd00:97:1::3", head + payload, 58)


def arp(sender: Any, target: Any, payload: Any) -> Any:
    return struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 2, bytes(6), socket.inet_aton(sender), bytes(6),
                       socket.inet_aton(target)) + payload  # fmt: skip


def gre(protocol: Any, payload: Any, key: int | None = None, flags: int = 0) -> Any:
    """RFC 2890. `flags`: 0x8000 with a checksum (0), 0x1000 with a sequence number (0), others as they are."""
    head = struct.pack("!HH", flags | (0x2000 if key is not None else 0), protocol)
    if flags & 0x8000:
        head += bytes(4)
    if key is not None:
        head += struct.pack("!I", key)
    return head + (bytes(4) if flags & 0x1000 else b"") + payload + bytes(14)


def gre_forms(key: int | None) -> Iterator[tuple[bytes, bytes, bool]]:
    """Marker, packet, and whether the switch takes it for the mesh's with this key."""
    mine: list[dict[str, Any]] = [{"key": key, "flags": flags} for flags in (0, 0x8000, 0x9000, 0x0800)]
    others: list[dict[str, Any]] = [{"key": 8, "flags": flags} for flags in (0, 0x8000, 0x1000)] + [{"key": 7 << 16}]
    (mine if key is None else others).extend([{"key": 0}, {"key": 0, "flags": 0x8000}])
    if key is not None:
        others += [{}, {"flags": 0x8000}]
    for form in (*mine, *others):
        marker = f"{form}.".encode()
        yield marker, gre(0x6558, marker, **form), form in mine
    for protocol in (0x800, 0x86DD, 0x88BE, 0x22EB):
        marker = f"{protocol:#x}.".encode()
        yield marker, gre(protocol, marker), False


class Wire:
    """A raw socket in a namespace that sends frames and says which of our markers arrive."""

    def __init__(self, namespace: Any, device: Any) -> None:
        with inside(namespace):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self.socket.bind((device, 0))
        self.mac = self.socket.getsockname()[4]

    def send(self, to: Any, kind: Any, packet: Any) -> None:
        self.socket.send(to + self.mac + struct.pack("!H", kind) + packet)

    def got(self, marker: Any, seconds: Any = 0.3) -> Any:
        """The first frame that holds the marker, or b""."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                frame = self.socket.recv(65535)
            except TimeoutError:
                return b""
            if marker in frame:
                return frame
        return b""


@pytest.fixture
def host(namespaces: Any) -> Iterator[Any]:
    """A node with kbr0, two pods, a veth that plays obr0, and an underlay with a peer and a stranger in it."""
    node, pod, pod2, mesh, out = namespaces("h", "p", "q", "m", "o")
    sh(
        f"ip -n {node} link add kbr0 address 0a:58:0a:61:01:01 type bridge",
        f"ip -n {node} link add pod type veth peer name eth0 netns {pod}",
        f"ip -n {node} link add pod2 type veth peer name eth0 netns {pod2}",
        f"ip -n {node} link add obr0 type veth peer name eth0 netns {mesh}",
        f"ip -n {node} link add eth0 type veth peer name eth0 netns {out}",
        f"ip -n {node} address add 10.97.1.1/24 dev kbr0",
        f"ip -n {node} address add 192.0.2.1/24 dev eth0",
        f"ip -n {pod} address add 10.97.1.2/24 dev eth0",
        f"ip -n {pod2} address add 10.97.1.3/24 dev eth0",
        f"ip -n {mesh} address add 10.97.2.1/16 dev eth0",
        f"ip -n {out} address add 192.0.2.2/24 dev eth0",
        f"ip -n {out} address add 192.0.2.9/24 dev eth0",
        f"ip netns exec {node} sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0",
    )
    for port in ("pod", "pod2", "obr0"):
        sh(f"ip -n {node} link set {port} master kbr0 up")
    for name in (pod, pod2, mesh, out):
        sh(f"ip -n {name} link set eth0 up")
    sh(
        f"ip -n {node} link set kbr0 up",
        f"ip -n {node} link set eth0 up",
        f"ip -n {node} route add 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink",
        f"ip -n {pod} route add default via 10.97.1.1",
    )
    # as the agent does it: no ARP crosses obr0
    there = subprocess.run(
        ["ip", "-n", mesh, "-j", "link", "show", "eth0"], capture_output=True, text=True, check=True
    ).stdout
    sh(f"ip -n {node} neighbour replace 10.97.2.1 lladdr {json.loads(there)[0]['address']} dev kbr0 nud permanent")
    wires = {"pod": Wire(pod, "eth0"), "pod2": Wire(pod2, "eth0"), "mesh": Wire(mesh, "eth0"), "out": Wire(out, "eth0")}
    with inside(node):
        wires["kbr0"] = Wire(node, "kbr0")
        wires["eth0"] = Wire(node, "eth0")
        firewall = Firewall()
    yield node, firewall, wires
    firewall.close()
    for wire in wires.values():
        wire.socket.close()


@needs_root
@needs_nft
@pytest.mark.root
class TestPackets:
    """What passes and what does not, shown by packets."""

    def delivered(self, raw: Any, marker: Any) -> Any:
        end = time.monotonic() + 0.3
        while (left := end - time.monotonic()) > 0:
            raw.settimeout(left)
            try:
                if marker in raw.recv(65535):
                    return True
            except TimeoutError:
                return False
        return False

    def test_tunnel_packets_from_peers_only(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired())
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_GRE)
        to = wires["eth0"].mac

        def passes(via: Any, source: Any, packet: Any, marker: Any, to: Any = to) -> Any:
            wires[via].send(to, 0x800, ipv4(source, "192.0.2.1", 47, packet))
            return self.delivered(raw, marker)

        with raw:
            assert passes("out", "192.0.2.2", gre(0x6558, b"peer"), b"peer")
            assert not passes("out", "192.0.2.9", gre(0x6558, b"stranger"), b"stranger")
            assert passes("out", "192.0.2.9", gre(0x800, b"site-to-site"), b"site-to-site")
            inner = wires["kbr0"].mac
            assert not passes("pod", "192.0.2.2", gre(0x6558, b"forged"), b"forged", inner)
            assert not passes("pod", "10.97.1.2", gre(0x6558, b"pod"), b"pod", inner)

    @pytest.mark.parametrize("key", [None, 7])
    def test_a_tunnel_of_another_key_is_someone_elses(self, host: Any, key: int | None) -> None:
        """A gretap of the host with a stranger as its other end, or of a container to it; ERSPAN; routed GRE."""
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired(replace(MESH, key=key)))
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_GRE)
        with raw:
            for marker, packet, mine in gre_forms(key):
                for source, passes in (("192.0.2.2", True), ("192.0.2.9", not mine)):
                    wires["out"].send(wires["eth0"].mac, 0x800, ipv4(source, "192.0.2.1", 47, packet))
                    assert self.delivered(raw, marker) is passes, (source, marker)
                wires["pod"].send(wires["kbr0"].mac, 0x800, ipv4("10.97.1.2", "192.0.2.1", 47, packet))
                assert self.delivered(raw, marker) is not mine, ("pod", marker)

    @pytest.mark.parametrize("key", [None, 7])
    def test_a_container_may_have_a_tunnel_of_another_key_to_a_peers_host(self, host: Any, key: int | None) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired(replace(MESH, key=key)))
        for marker, packet, mine in gre_forms(key):
            wires["pod"].send(wires["kbr0"].mac, 0x800, ipv4("10.97.1.2", "192.0.2.2", 47, packet))
            assert bool(wires["out"].got(marker, 0.3 if mine else 2)) is not mine, marker

    def test_vxlan_of_our_network_only(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired(replace(MESH, encapsulation="vxlan", key=7)))
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            server.bind(("192.0.2.1", 4789))

        def passes(source: Any, vni: Any, marker: Any) -> Any:
            packet = udp(struct.pack("!II", 8 << 24, vni << 8) + marker, 4789)
            wires["out"].send(wires["eth0"].mac, 0x800, ipv4(source, "192.0.2.1", 17, packet))
            return self.delivered(server, marker)

        with server:
            assert passes("192.0.2.2", 7, b"peer")
            assert not passes("192.0.2.9", 7, b"stranger")
            assert passes("192.0.2.9", 8, b"another")

    def test_a_pod_can_not_send_tunnel_packets_to_a_peer(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired())
        pod, gateway = wires["pod"], wires["kbr0"].mac
        pod.send(gateway, 0x800, ipv4("10.97.1.2", "192.0.2.2", 47, gre(0x800, b"routed gre")))
        assert wires["out"].got(b"routed gre", 1)
        pod.send(gateway, 0x800, ipv4("10.97.1.2", "192.0.2.2", 47, gre(0x6558, b"tunnel")))
        assert not wires["out"].got(b"tunnel")

    @pytest.mark.parametrize("service", ["", "10.96.0.1"], ids=["unknown", "known"])
    def test_a_host_reaches_services_inside_the_cluster_cidr(self, host: Any, service: str) -> None:
        """kube-proxy gives a packet its real address after the kernel has found a route for the ClusterIP."""
        node, _, _ = host
        mesh = replace(MESH, cluster_cidrs=(ip_network("10.0.0.0/8"), ip_network("fd00:97::/32")))
        routes = dataplane(mesh, "web1", Facts(service=service))[0].routes
        unreachable = [key[0] for key, route in routes.items() if route.type == "unreachable" and "." in key[0]]
        sh(f"ip -n {node} route add default via 192.0.2.2")
        sh(*(f"ip -n {node} route add unreachable {cidr} metric {FALLBACK_METRIC}" for cidr in unreachable))
        with inside(node):
            proxy = ["type nat hook output priority -100;", "ip daddr 10.96.0.0/16 dnat to 192.0.2.2"]
            nft("\n".join(["table ip proxy {", "chain output {", *proxy, "}", "}", ""]))

        def reaches(address: str) -> bool:
            argv = ["ip", "netns", "exec", node, "ping", "-n", "-c", "1", "-W", "5", address]
            return subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0

        assert [reaches(address) for address in ("10.96.0.1", "10.96.7.7")] == [bool(service)] * 2
        # a node that is in the mesh and has no tunnel now; its packets must not leak to the default gateway
        sh(f"ip -n {node} route del 10.97.2.0/24")
        asked = subprocess.run(
            ["ip", "-n", node, "route", "get", "10.97.2.1"], capture_output=True, timeout=10, check=False
        )
        assert b"No route to host" in asked.stderr

    def test_masquerade_only_what_leaves(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired())
        pod, gateway = wires["pod"], wires["kbr0"].mac
        pod.send(gateway, 0x800, ipv4("10.97.1.2", "192.0.2.9", 17, udp(b"leaves")))
        assert wires["out"].got(b"leaves", 1)[26:30] == socket.inet_aton("192.0.2.1")
        pod.send(gateway, 0x800, ipv4("10.97.1.2", "10.97.2.1", 17, udp(b"stays")))
        assert wires["mesh"].got(b"stays", 1)[26:30] == socket.inet_aton("10.97.1.2")

    def test_pods_send_only_what_their_node_owns(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired(ports=("pod", "pod2")))
        pod, pod2 = wires["pod"], wires["pod2"]

        def passes(kind: Any, packet: Any) -> Any:
            marker = os.urandom(8)
            pod.send(pod2.mac, kind, packet(marker))
            return bool(pod2.got(marker))

        def from_v4(source: Any) -> Any:
            return lambda marker: ipv4(source, "10.97.1.3", 17, udp(marker))

        assert passes(0x800, from_v4("10.97.1.2"))
        for source in ("10.97.2.5", "10.97.1.1", "0.0.0.0", "192.0.2.1", "192.0.2.2", "203.0.113.9", "127.0.0.1"):
            assert not passes(0x800, from_v4(source)), source
        assert passes(0x806, lambda marker: arp("10.97.1.2", "10.97.1.3", marker))
        for source in ("10.97.2.1", "10.97.1.1", "192.0.2.1", "192.0.2.2", "203.0.113.9"):
            assert not passes(0x806, lambda marker, s=source: arp(s, "10.97.1.3", marker)), source
        for source, good in (
            ("fd00:97:1::2", True),
            ("fe80::1", True),
            ("::", False),
            ("fd00:97:2::2", False),
            ("fd00:97:1::1", False),
            ("2001:db8::9", False),
        ):
            assert passes(0x86DD, lambda marker, s=source: ipv6(s, "fd00:97:1::3", marker)) == good, source
        for target, good in (("fd00:97:1::2", True), ("fd00:97:1::1", False), ("2001:db8::1", False)):
            assert passes(0x86DD, lambda marker, t=target: advertisement(t, marker)) == good

    def test_a_port_that_is_not_told_may_not_use_addresses_of_the_mesh(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired())
        pod, pod2 = wires["pod"], wires["pod2"]

        def passes(source: Any) -> Any:
            marker = os.urandom(8)
            pod.send(pod2.mac, 0x800, ipv4(source, "10.97.1.3", 17, udp(marker)))
            return bool(pod2.got(marker))

        assert passes("10.97.1.2")
        assert not passes("10.97.2.5") and not passes("10.97.1.1")
        # where the kernel can't tell kbr0's ports, this may be another bridge's
        bare = any("nft_meta_bridge" in problem.message for problem in firewall.observe({}).problems)
        assert passes("203.0.113.9") == bare

    def test_the_mesh_sends_from_peers_ranges_to_own_ranges_only(self, host: Any) -> None:
        node, firewall, wires = host
        with inside(node):
            converge(firewall, desired())
        mesh, pod2, out = wires["mesh"], wires["pod2"], wires["out"]
        gateway = wires["kbr0"].mac

        def passes(to: Any, source: Any, target: str, there: Any = pod2) -> Any:
            marker = os.urandom(8)
            mesh.send(to, 0x800, ipv4(source, target, 17, udp(marker)))
            return bool(there.got(marker))

        assert passes(gateway, "10.97.2.5", "10.97.1.3")
        assert passes(gateway, "192.0.2.2", "10.97.1.3")
        for source in ("10.97.77.5", "10.97.1.2", "192.0.2.1", "203.0.113.9", "127.0.0.1"):
            assert not passes(gateway, source, "10.97.1.3"), source
        assert not passes(pod2.mac, "10.97.2.5", "10.97.1.3")
        assert not passes(b"\xff" * 6, "10.97.2.5", "10.97.1.255")
        assert not passes(gateway, "10.97.2.5", "192.0.2.9", out)
        mesh.send(b"\xff" * 6, 0x806, arp("10.97.1.2", "10.97.1.3", b"theft"))
        assert not pod2.got(b"theft")
