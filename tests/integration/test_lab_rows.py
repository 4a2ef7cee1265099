"""Who may ask an agent for its row of the matrix: an agent of a peer, and no pod, no container, no stranger.

Counted in packets: what leaves host 1 from the port of the rows while forged and rightful senders try.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ovsmesh.checksum import internet_checksum
from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.names import ROW_PORT
from tests.support.labpackets import Sniffer, datagram, ethernet, mac, send_frame, send_packet
from tests.support.labtools import SOON, Make, guarded, live

pytestmark = pytest.mark.lab

GATEWAYS = ("10.97.1.1", "fd00:97:1::1")
KBR_1 = "0a:58:0a:61:01:01"
REQUEST = b"GET /row.json HTTP/1.0\r\n\r\n"


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    return module_lab(3, 1, dual_stack=True)


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    yield from guarded(three, thorough=False)


def matrix(host: Host) -> dict[str, Any]:
    done = host.ovsmesh("matrix", "-o", "json")
    assert done.returncode in (0, 2), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def answering(host: Host) -> set[str]:
    """The nodes whose agents answered this host's, in a collection of its own."""
    before = matrix(host)["time"]
    found = wait_for("a new matrix", lambda: (m := matrix(host))["time"] != before and m, SOON, every=0.5)
    return {node["name"] for node in found["nodes"] if node["agent"] != "no answer"}


# --- packets


def ports(frame: bytes) -> tuple[int, int]:
    """Source and destination port of a frame with TCP; zeros for any other."""
    kind = frame[12:14]
    if kind == b"\x08\x00" and frame[23] == 6:
        at = 14 + (frame[14] & 15) * 4
    elif kind == b"\x86\xdd" and frame[20] == 6:
        at = 54
    else:
        return 0, 0
    return struct.unpack_from("!HH", frame, at)


def answers(*sniffers: Sniffer) -> list[bytes]:
    return [frame for sniffer in sniffers for frame in list(sniffer.frames) if ports(frame)[0] == ROW_PORT]


def opening(source: str, target: str, ttl: int = 255, port: int = 40000) -> bytes:
    """An IP packet that opens a connection to the port of the rows."""
    addresses = b"".join(socket.inet_pton(socket.AF_INET6 if ":" in a else socket.AF_INET, a) for a in (source, target))
    head = struct.pack("!HHIIBBHHH", port, ROW_PORT, 1, 0, 0x50, 2, 65535, 0, 0)
    checksum = internet_checksum(addresses + struct.pack("!II", len(head), socket.IPPROTO_TCP) + head)
    packet = datagram(source, target, head[:16] + struct.pack("!H", checksum) + head[18:], socket.IPPROTO_TCP)
    if ":" in source:
        return packet[:7] + bytes([ttl]) + packet[8:]
    packet = packet[:8] + bytes([ttl]) + packet[9:10] + bytes(2) + packet[12:]
    return packet[:10] + struct.pack("!H", internet_checksum(packet[:20])) + packet[12:]


def tagged(frame: bytes, *tags: int) -> bytes:
    return frame[:12] + b"".join(struct.pack("!HH", 0x8100, tag) for tag in tags) + frame[12:]


@contextlib.contextmanager
def watched(lab: Lab) -> Iterator[tuple[Sniffer, ...]]:
    """Sniffers on everything by which host 1 could answer."""
    host = lab.host(1)
    device = "br-phy" if lab.settings.datapath == "netdev" else "eth0"
    with Sniffer(host.ns, "kbr0", outgoing=True) as inside, Sniffer(host.ns, device, outgoing=True) as outside:
        yield inside, outside


def asks(ns: str, target: str, source: str = "", ttl: int = 255) -> bytes:
    """What a program of a namespace is answered by host 1's agent; nothing where it is not let in."""
    six = ":" in target

    def connect() -> bytes:
        with socket.socket(socket.AF_INET6 if six else socket.AF_INET) as sock:
            if six:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
            else:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            sock.settimeout(1.5)
            if source:
                sock.bind((source, 0))
            try:
                sock.connect((target, ROW_PORT))
                sock.sendall(REQUEST)
                found = b""
                while part := sock.recv(65536):
                    found += part
            except OSError:
                return b""
            return found

    return netns.within(ns, connect)


def test_a_program_on_a_peers_host_that_keeps_the_distance_is_answered(mesh: Lab) -> None:
    """The others are refused for what they are, as the same question from the right place is answered."""
    second = mesh.host(2)
    for version, target in enumerate(GATEWAYS):
        source = str(second.pod_cidrs[version].network_address + 1)
        found = wait_for("an answer", lambda t=target, s=source: asks(second.ns, t, s), SOON)  # type: ignore[misc]
        assert found.startswith(b"HTTP/1.0 200 ") and b'"node":"h1"' in found
        assert asks(second.ns, target, source, ttl=64) == b""


@contextlib.contextmanager
def container(host: Host) -> Iterator[str]:
    """A container on a network of its own, behind its host's masquerade, as Docker makes them."""
    ns = f"{host.ns}c"
    netns.run(["ip", "netns", "add", ns])
    try:
        inner = ["addr add 172.18.0.2/24 dev eth0", "addr add fd00:172::2/64 dev eth0 nodad", "link set eth0 up"]
        netns.ip_batch([f"link add vc1 type veth peer name eth0 netns {ns}"], host.ns)
        netns.ip_batch(
            ["addr add 172.18.0.1/24 dev vc1", "addr add fd00:172::1/64 dev vc1 nodad", "link set vc1 up"], host.ns
        )
        netns.ip_batch([*inner, "route add default via 172.18.0.1", "route add default via fd00:172::1"], ns)
        chain = 'type nat hook postrouting priority 90; iifname "vc1" masquerade;'
        host.run(["nft", "-f", "-"], text=f"table inet containers {{ chain c {{ {chain} }}; }}\n")
        for tool in ("iptables", "ip6tables"):
            host.run([tool, "-I", "FORWARD", "-i", "vc1", "-j", "ACCEPT"])
        yield ns
    finally:
        for tool in ("iptables", "ip6tables"):
            host.run([tool, "-D", "FORWARD", "-i", "vc1", "-j", "ACCEPT"], check=False)
        host.run(["nft", "delete table inet containers"], check=False)
        netns.run(["ip", "netns", "del", ns])


def test_pods_containers_and_strangers_are_not_answered_at_all(mesh: Lab) -> None:
    one, two, second = mesh.pod(1, 1), mesh.pod(2, 1), mesh.host(2)
    netns.run(["ip", "route", "replace", "10.97.1.0/24", "via", "192.0.2.11"], mesh.hub)
    netns.run(["ip", "-6", "route", "replace", "fd00:97:1::/64", "via", "2001:db8::11"], mesh.hub)
    try:
        with container(second) as behind, watched(mesh) as sniffers:
            for target in GATEWAYS:
                # the container's packets do arrive, under its host's gateway address
                netns.run(["ping", "-c1", "-w30", target], behind)
                for ttl in (64, 255):
                    assert asks(one.ns, target, ttl=ttl) == b"", "a pod of this node"
                    assert asks(two.ns, target, ttl=ttl) == b"", "a pod of a peer"
                    assert asks(behind, target, ttl=ttl) == b"", "a container behind a peer's masquerade"
                    assert asks(mesh.hub, target, ttl=ttl) == b"", "a stranger on the underlay"
                    assert asks(mesh.host(1).ns, target, ttl=ttl) == b"", "a program on this node"
            assert asks(second.ns, GATEWAYS[0], str(second.address)) == b"", "a peer's tunnel address"
            assert answers(*sniffers) == []
    finally:
        netns.run(["ip", "route", "del", "10.97.1.0/24"], mesh.hub)
        netns.run(["ip", "-6", "route", "del", "fd00:97:1::/64"], mesh.hub)
    with watched(mesh) as sniffers:
        assert "h1" in answering(second)
        assert answers(*sniffers), "a rightful answer is seen"


def test_forged_packets_open_nothing(mesh: Lab) -> None:
    one, two = mesh.pod(1, 1), mesh.pod(2, 1)
    near, far = mac(one.ns), mac(two.ns)
    outside = mac(mesh.host(1).ns, "br-phy" if mesh.settings.datapath == "netdev" else "eth0")
    hub = mac(mesh.hub, "hub")
    with watched(mesh) as sniffers:
        for version, target in enumerate(GATEWAYS):
            peer, third = ("10.97.2.1", "10.97.3.1") if version == 0 else ("fd00:97:2::1", "fd00:97:3::1")
            for source in (peer, third, target, str(one.addresses[version]), str(two.addresses[version])):
                for ttl in (64, 255):
                    packet = opening(source, target, ttl)
                    # a pod of this node
                    send_frame(one.ns, "eth0", *[ethernet(KBR_1, near, packet)] * 3)
                    # with the tag of no VLAN, which the kernel takes off
                    send_frame(one.ns, "eth0", tagged(ethernet(KBR_1, near, packet), 0))
                    send_frame(one.ns, "eth0", tagged(ethernet(KBR_1, near, packet), 0, 0))
                    # with the MAC of a peer
                    send_frame(one.ns, "eth0", ethernet(KBR_1, "0a:58:0a:61:02:01", packet))
                    # a pod of a peer: through its node, and past it
                    send_frame(two.ns, "eth0", ethernet("0a:58:0a:61:02:01", far, packet))
                    send_frame(two.ns, "eth0", *[ethernet(KBR_1, far, packet)] * 3)
                    # a stranger, to this node, and in a tunnel
                    send_frame(mesh.hub, "hub", *[ethernet(outside, hub, packet)] * 3)
                    inner = struct.pack("!HH", 0, 0x6558) + ethernet(KBR_1, "0a:58:0a:61:02:01", packet)
                    send_packet(mesh.hub, datagram("192.0.2.99", "192.0.2.11", inner, 47))
        # what was sent before has arrived
        assert "h1" in answering(mesh.host(2))
        rightful = {mesh.host(2).pod_cidrs[v].network_address.packed[:-1] + b"\x01" for v in (0, 1)}
        wrong = [frame for frame in answers(*sniffers) if not any(to in frame[26:54] for to in rightful)]
        to_peer = [frame for frame in answers(*sniffers) if ports(frame)[1] == 40000]
        assert (wrong, to_peer) == ([], [])
        assert answers(*sniffers), "a rightful answer is seen"


def test_nothing_is_sent_while_nobody_asks(mesh: Lab) -> None:
    host = mesh.host(1)

    def probes() -> int:
        return int(live(host)["peers"][0]["reach"]["sent"])

    with watched(mesh) as sniffers:
        start = probes()
        wait_for("more probes", lambda: probes() > start + 4, SOON)
        every = [frame for sniffer in sniffers for frame in list(sniffer.frames)]
        assert len(every) > 8 and not [frame for frame in every if ROW_PORT in ports(frame)]


# --- a peer that is not what it should be


@contextlib.contextmanager
def in_place_of_the_agent(host: Host, serve: Callable[[socket.socket], None], ns: str = "") -> Iterator[None]:
    """Serve rows on the host's gateway address, or in a pod of it."""
    host.stop_agent()
    address = "0.0.0.0" if ns else str(host.pod_cidrs[0].network_address + 1)

    def listen() -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, ROW_PORT))
        sock.listen(8)
        sock.settimeout(0.1)
        return sock

    stopping = threading.Event()
    sock = netns.within(ns or host.ns, listen)

    def loop() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):
                client, _ = sock.accept()
                with client:
                    client.settimeout(10.0)
                    serve(client)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        sock.close()
        host.start_agent()


def row(**changes: Any) -> bytes:
    about = {"node": "h2", "time": time.time(), "counts": {"ok": 2}, "zones": [], "cells": [], "headline": "mine"}
    body = json.dumps(about | changes).encode()
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def says(text: bytes) -> Callable[[socket.socket], None]:
    def serve(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(text)

    return serve


def drips(client: socket.socket) -> None:
    """Sends a byte from time to time, without an end."""
    for byte in row():
        client.send(bytes([byte]))
        time.sleep(0.1)


def floods(client: socket.socket) -> None:
    client.sendall(row()[:-1] + b" " * (64 << 20))


HOSTILE = {
    "another's row": says(row(node="h3")),
    "garbage": says(b"\x00\xff" * 4096),
    "half a row": says(row()[:-3]),
    "a refusal": says(b"HTTP/1.0 500 No\r\nContent-Length: 2\r\n\r\n{}"),
    "numbers that are none": says(row(cells=[{"peer": "h1", "state": "ok", "roundTrip": -5}])),
    "drops": drips,
    "a flood": floods,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_peer_that_sends_anything_else_counts_as_silent(mesh: Lab, what: str) -> None:
    with in_place_of_the_agent(mesh.host(2), HOSTILE[what]):
        assert answering(mesh.host(1)) == {"h1", "h3"}


def test_a_peer_is_believed_of_its_own_row_only(mesh: Lab) -> None:
    lies = [{"peer": name, "state": "unreachable"} for name in ("h1", "h3", "h9")]
    with in_place_of_the_agent(mesh.host(2), says(row(cells=lies, counts={"unreachable": 2}))):
        assert answering(mesh.host(1)) == {"h1", "h2", "h3"}
        found = matrix(mesh.host(1))
        cells = {(row["node"], cell["peer"]): cell["state"] for row in found["rows"] for cell in row["cells"]}
        assert {pair for pair, state in cells.items() if state == "unreachable"} == {("h2", "h1"), ("h2", "h3")}
        assert len(cells) == 6


def test_a_pod_can_not_answer_in_place_of_its_node(mesh: Lab) -> None:
    second, pod = mesh.host(2), mesh.pod(2, 1)
    table = "table ip taken { chain c { type nat hook prerouting priority -100; "
    to_pod = f"tcp dport {ROW_PORT} dnat to {pod.addresses[0]}; }}; }}\n"
    second.run(["nft", "-f", "-"], text=table + to_pod)
    try:
        with in_place_of_the_agent(second, says(row()), pod.ns):
            assert answering(mesh.host(1)) == {"h1", "h3"}
    finally:
        second.run(["nft", "delete table ip taken"])


def test_a_peer_that_holds_connections_keeps_no_other_from_an_answer(mesh: Lab) -> None:
    second = mesh.host(2)

    def hold() -> list[socket.socket]:
        held = []
        for _ in range(100):
            sock = socket.socket()
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
            sock.setblocking(False)
            sock.bind(("10.97.2.1", 0))
            sock.connect_ex((GATEWAYS[0], ROW_PORT))
            held.append(sock)
        return held

    held = netns.within(second.ns, hold)
    try:
        assert "h1" in answering(mesh.host(3))
    finally:
        for sock in held:
            sock.close()
