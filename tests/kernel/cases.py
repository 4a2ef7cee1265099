"""What the mesh must hold on the kernel's own datapath. Runs inside the guest, in this order, on one lab.

pytest on the host does not collect this file: test_kernel.py boots the guest that runs it. The
guest has one CPU, a process starts ten times slower than outside, and its kernel has no nftables
for IP; so repair times here are upper bounds, and only Open vSwitch filters.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ovsmesh.checksum import internet_checksum
from ovsmesh.dataplane.types import COOKIE, KBR, OBR, PROTOCOL
from ovsmesh.lab import netns
from ovsmesh.lab.host import Host, Pod
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError
from ovsmesh.lab.ping import Prober, ping

pytestmark = pytest.mark.kernel

UNDERLAY_MTU = 1500
POD_MTU = UNDERLAY_MTU - 38
"""Outer IPv4 header 20, GRE 4, inner Ethernet 14."""
REPAIR = 60.0
"""Seconds to wait for drift to be gone: a guest is ten times slower than its host, and that may be busy."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab(hosts=3, pods=2, name="kernel", dual_stack=True, underlay_mtu=UNDERLAY_MTU)
    try:
        lab.up()
    except LabError:
        print(lab.logs())
        raise
    yield lab


@pytest.fixture(autouse=True)
def logs_of_failures(request: pytest.FixtureRequest, lab: Lab) -> Iterator[None]:
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        print(lab.logs(25))


def ip(host: Host, *args: str) -> str:
    return host.run(["ip", *args]).stdout


def all_reach_all(lab: Lab) -> None:
    """Within REPAIR, every pod has three answers in a row from every other."""
    with lab.stream(lab.pairs(), interval=0.3) as probes:
        if not probes.wait(time.time(), REPAIR):
            mute = [f"{t.pair.source}→{t.pair.target}" for t in probes.tracks if not t.answered_since(0.0)]
            pytest.fail(
                f"not all pods reach each other {REPAIR:g} s later; no answer at all: {', '.join(mute) or 'none'}"
            )


def repaired(check: Callable[[], bool], what: str) -> None:
    # the guest pays ten times for each process, so looking more often would slow down what is looked at
    netns.wait_for(what, lambda: _looks(check), REPAIR, every=0.1)


def _looks(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except LabError:
        # what it looks at is not there yet
        return False


def mtu(host: Host, link: str) -> int:
    return int(json.loads(ip(host, "-j", "link", "show", link))[0]["mtu"])


def received_echoes(pod: Pod) -> int:
    """Echo requests that the pod's kernel took in, from whomever."""
    lines = netns.within(pod.ns, lambda: Path("/proc/thread-self/net/snmp").read_text()).splitlines()
    names, values = (line.split() for line in lines if line.startswith("Icmp:"))
    return int(dict(zip(names, values, strict=True))["InEchos"])


# --- the mesh as it is built


def test_tunnels_are_the_kernels_own(lab: Lab) -> None:
    for host in lab.hosts:
        assert "system@ovs-system" in host.ovs_appctl("dpif/show")
        assert host.ovs_vsctl("get", "bridge", OBR, "datapath_type").strip() == "system"
    links = ip(lab.host(1), "-d", "link", "show", "type", "gretap")
    assert "gre_sys" in links, f"the kernel has no tunnel device of the datapath: {links!r}"


def test_every_pod_reaches_every_other_once_and_nothing_is_flooded(lab: Lab) -> None:
    with lab.host(1).capture() as wire:
        tracks = lab.ping_matrix(count=5, timeout=3.0)
    assert len(tracks) == 30 * 2
    assert sum(t.lost for t in tracks) == 0
    assert sum(t.duplicates for t in tracks) == 0
    assert wire.missed == 0
    # four pods elsewhere, two here, both ways, IPv4 and IPv6, five echoes and their answers
    assert wire.encapsulated == 4 * 2 * 2 * 2 * 5 * 2
    assert wire.broadcast + wire.multicast == 0


def test_full_size_packets_pass_unfragmented(lab: Lab) -> None:
    assert mtu(lab.host(1), KBR) == POD_MTU
    for track in ping(lab.pairs(between_hosts_only=True), count=1, size=POD_MTU, df=True, timeout=3.0):
        assert not track.lost, f"{POD_MTU} bytes {track.pair.source}→{track.pair.target}: lost"


def test_one_byte_more_is_refused_with_the_right_mtu(lab: Lab) -> None:
    host, pod = lab.host(1), lab.pod(1, 1)
    target = str(lab.pod(2, 1).addresses[0])
    # a pod that was plugged in with the underlay's MTU, as one that was there before the mesh
    pod.run(["ip", "link", "set", "eth0", "mtu", str(UNDERLAY_MTU)])
    ip(host, "link", "set", "vp1", "mtu", str(UNDERLAY_MTU))
    try:
        assert mtu(host, KBR) == POD_MTU, "kbr0 followed its port"
        sent = pod.run(["ping", "-n", "-c1", "-W3", "-Mdo", f"-s{POD_MTU - 28 + 1}", target], check=False)
        assert f"mtu = {POD_MTU}" in sent.stdout + sent.stderr
        fits = pod.run(["ping", "-n", "-c1", "-W3", "-Mdo", f"-s{POD_MTU - 28}", target], check=False)
        assert fits.returncode == 0, fits.stdout
    finally:
        host.plug()


# --- what peers may send


def test_trace_follows_packets_on_this_datapath_without_nftables(lab: Lab) -> None:
    host, (one, other) = lab.host(1), (lab.pod(1, 1), lab.pod(2, 1))

    def trace() -> dict[str, Any]:
        done = host.ovsmesh("trace", "-o", "json", str(one.addresses[0]), str(other.addresses[0]), timeout=300)
        assert done.returncode in (0, 2), done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    well = trace()
    assert well["state"] == "arrives", well
    seen = {point["at"]: point["packets"] for point in well["seen"]}
    assert min(seen.values()) >= 3 and {"underlay", "underlay, back"} <= seen.keys(), well
    ip(host, "route", "add", "blackhole", str(other.addresses[0]))
    try:
        assert trace()["stopsAtHop"] == "route"
    finally:
        ip(host, "route", "del", "blackhole", str(other.addresses[0]))
    netns.ip_batch(["link set u2 down"], lab.hub)
    try:
        assert trace()["stopsAtHop"] == "network to h2"
    finally:
        netns.ip_batch(["link set u2 up"], lab.hub)
    all_reach_all(lab)


def test_spoofed_source_is_refused(lab: Lab) -> None:
    liar, robbed, victim = lab.pod(1, 1), lab.pod(2, 1), lab.pod(3, 1)
    address = str(victim.addresses[0])
    before = received_echoes(victim)
    assert not ping([lab.pair(liar, victim)], count=3)[0].lost
    assert received_echoes(victim) == before + 3, "an honest packet must be counted, or this test shows nothing"
    liar.run(["ip", "addr", "add", f"{robbed.addresses[0]}/32", "dev", "lo"])
    try:
        liar.run(["ping", "-n", "-c3", "-i0.2", "-W1", "-I", str(robbed.addresses[0]), address], check=False)
    finally:
        liar.run(["ip", "addr", "del", f"{robbed.addresses[0]}/32", "dev", "lo"])
    assert received_echoes(victim) == before + 3


def gre_echo(lab: Lab, source: Pod, target: Host) -> bytes:
    """An echo request to the target's first pod, as a peer sends it: GRE, Ethernet, IPv4, ICMP."""
    mac = json.loads(ip(target, "-j", "link", "show", KBR))[0]["address"]
    icmp = struct.pack("!BBHHH", 8, 0, 0, 7, 7)
    icmp = icmp[:2] + struct.pack("!H", internet_checksum(icmp)) + icmp[4:]
    ends = source.addresses[0].packed + target.pod(1).addresses[0].packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), 1, 0, 64, socket.IPPROTO_ICMP, 0) + ends
    header = header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:]
    ethernet = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("020000000001") + b"\x08\x00"
    return struct.pack("!HH", 0, 0x6558) + ethernet + header + icmp


def send_gre(ns: str, packet: bytes, target: Host) -> None:
    with netns.within(ns, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_GRE)) as sock:
        for _ in range(3):
            sock.sendto(packet, (str(target.address), 0))


def test_gre_from_no_peer_is_refused(lab: Lab) -> None:
    target, victim = lab.host(1), lab.pod(1, 1)
    packet = gre_echo(lab, lab.pod(2, 1), target)
    before = received_echoes(victim)
    send_gre(lab.host(2).ns, packet, target)
    netns.wait_for("a peer's own GRE packets to arrive", lambda: received_echoes(victim) == before + 3, REPAIR)
    # the same packets from an address of the underlay that is no peer, and from the wrong peer
    send_gre(lab.hub, packet, target)
    send_gre(lab.host(3).ns, packet, target)
    assert not ping([lab.pair(lab.pod(2, 1), victim)], count=1)[0].lost, "sent later, so the others have arrived"
    assert received_echoes(victim) == before + 4


# --- drift


class Drift(NamedTuple):
    """How to break something on a host, and what must read as before when it is repaired."""

    break_it: Callable[[Host], object]
    state: Callable[[Host], object]


def ports(host: Host) -> str:
    return host.ovs_vsctl("list-ports", OBR)


def flows(host: Host) -> int:
    return host.ovs_ofctl("dump-flows", "obr0").count(f"cookie={COOKIE:#x}")


def routes(host: Host) -> list[str]:
    both = [ip(host, family, "route", "show", "proto", str(PROTOCOL)) for family in ("-4", "-6")]
    return sorted("".join(both).splitlines())


def neighbours(host: Host) -> list[str]:
    return sorted(ip(host, "neigh", "show", "dev", KBR, "nud", "permanent").splitlines())


def fdb(host: Host) -> list[str]:
    """The peers' entries. The kernel's own, of obr0's addresses, are others once that is made again."""
    lines = host.run(["bridge", "fdb", "show", "br", KBR, "dev", OBR]).stdout.splitlines()
    return sorted(line for line in lines if "static" in line)


def addresses(host: Host) -> str:
    return ip(host, "-br", "addr", "show", KBR)


DRIFTS = {
    "port": Drift(lambda host: host.ovs_vsctl("--no-wait", "del-port", OBR, "gre-h2"), ports),
    "flows": Drift(lambda host: host.ovs_ofctl("del-flows", OBR), flows),
    "neighbour": Drift(lambda host: ip(host, "neigh", "del", "10.97.2.1", "dev", KBR), neighbours),
    "fdb": Drift(lambda host: host.run(["bridge", "fdb", "del", "0a:58:0a:61:02:01", "dev", OBR, "master"]), fdb),
    "route": Drift(lambda host: ip(host, "route", "del", "10.97.2.0/24"), routes),
    "address": Drift(
        lambda host: ip(host, "addr", "del", "10.97.1.1/24", "dev", KBR), lambda host: (addresses(host), routes(host))
    ),
    "kbr0-down": Drift(lambda host: ip(host, "link", "set", KBR, "down"), lambda host: (addresses(host), routes(host))),
    "kbr0-deleted": Drift(
        lambda host: ip(host, "link", "del", KBR),
        lambda host: (addresses(host), routes(host), neighbours(host), fdb(host)),
    ),
    "obr0-renamed": Drift(
        # at once, or the agent is quicker than the second
        lambda host: netns.ip_batch([f"link set {OBR} down", f"link set {OBR} name astray"], host.ns),
        lambda host: (fdb(host), flows(host)),
    ),
    "obr0-moved": Drift(
        lambda host: ip(host, "link", "set", OBR, "netns", host.pod(1).ns), lambda host: (fdb(host), flows(host))
    ),
    "obr0-deleted": Drift(
        lambda host: host.ovs_appctl("dpctl/del-if", "ovs-system", OBR), lambda host: (fdb(host), flows(host))
    ),
    "gre-deleted": Drift(
        lambda host: ip(host, "link", "del", "gre_sys"), lambda host: ("gre_sys" in ip(host, "link"), flows(host))
    ),
    "datapath-deleted": Drift(lambda host: host.run(["ovs-dpctl", "del-dp", "ovs-system"]), lambda host: flows(host)),
    "obr0-mtu": Drift(lambda host: ip(host, "link", "set", OBR, "mtu", "1400"), lambda host: mtu(host, OBR)),
}


@pytest.mark.parametrize("kind", DRIFTS)
def test_drift_is_repaired(lab: Lab, kind: str) -> None:
    host, drift = lab.host(1), DRIFTS[kind]
    before = drift.state(host)
    drift.break_it(host)
    start = time.monotonic()
    repaired(lambda: drift.state(host) == before, f"{kind} to be as before: {before!r}")
    seconds = time.monotonic() - start
    all_reach_all(lab)
    print(f"{kind}: as before {seconds:.2f} s after it was broken")


# --- restarts


def stream(lab: Lab) -> Prober:
    """About 200 packets a second between two pods, both ways."""
    a, b = lab.pod(1, 1), lab.pod(2, 1)
    return lab.stream([lab.pair(a, b), lab.pair(b, a)], interval=0.01)


def peer_states(host: Host) -> dict[str, str]:
    status, body = host.http("/status.json", timeout=20.0)
    peers = json.loads(body).get("peers", ()) if status == 200 else ()
    return {peer["name"]: peer["state"] for peer in peers}


def let_in(host: Host) -> list[int]:
    """How many probes the flows have let in that the peers forwarded back, in each IP family."""
    found = [line for line in host.ovs_ofctl("dump-flows", OBR).splitlines() if "mod_dl_dst" in line]
    return [int(line.partition("n_packets=")[2].partition(",")[0]) for line in found]


def test_probes_pass_the_peers_forwarding_and_a_peer_that_does_not_forward_is_named(lab: Lab) -> None:
    one, third = lab.host(1), lab.host(3)
    netns.wait_for("all peers ok", lambda: peer_states(one) == {"h2": "ok", "h3": "ok"}, REPAIR)
    netns.wait_for("probes of both families", lambda: len(let_in(one)) == 2 and all(let_in(one)), REPAIR)
    third.stop_agent()
    try:
        third.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
        start = time.monotonic()
        netns.wait_for("h3 not to forward", lambda: peer_states(one) == {"h2": "ok", "h3": "not forwarded"}, REPAIR)
        print(f"named after {time.monotonic() - start:.1f} s")
    finally:
        third.start_agent()
    start = time.monotonic()
    netns.wait_for("all peers ok again", lambda: peer_states(one) == {"h2": "ok", "h3": "ok"}, REPAIR)
    print(f"cleared {time.monotonic() - start:.1f} s after its agent was started")


def test_killed_agent_loses_no_packet(lab: Lab) -> None:
    host = lab.host(1)
    with stream(lab) as probes:
        assert probes.wait(time.time(), REPAIR)
        host.stop_agent(signal.SIGKILL)
        assert probes.wait(time.time(), 5.0, run=50)
        host.start_agent()
        lab.converged(REPAIR, [host])
        assert probes.wait(time.time(), 5.0, run=50)
    sent = sum(len(t.sent) for t in probes.tracks)
    assert sum(t.lost for t in probes.tracks) == 0
    assert sum(t.duplicates for t in probes.tracks) == 0
    print(f"{sent} packets sent, none lost")


def test_restarted_switch_forwards_again(lab: Lab) -> None:
    host = lab.host(1)
    wanted = flows(host)
    with stream(lab) as probes:
        host.kill_vswitchd()
        host.start_vswitchd()
        assert probes.wait(time.time(), REPAIR), "nothing is forwarded after ovs-vswitchd is back"
        lab.converged(REPAIR, [host])
    lost, sent = sum(t.lost for t in probes.tracks), sum(len(t.sent) for t in probes.tracks)
    longest = max((outage.seconds for t in probes.tracks for outage in t.outages()), default=0.0)
    print(f"{lost} of {sent} packets lost, the longest outage {longest:.2f} s")
    assert "flow-restore-wait" not in host.ovs_vsctl("get", "Open_vSwitch", ".", "other_config")
    assert flows(host) == wanted
    all_reach_all(lab)


def test_restarted_database_loses_no_packet(lab: Lab) -> None:
    host = lab.host(1)
    with stream(lab) as probes:
        host.restart_ovsdb()
        lab.converged(REPAIR, [host])
        assert probes.wait(time.time(), REPAIR)
    assert sum(t.lost for t in probes.tracks) == 0
    # the agent must be listening again, not just alive
    host.ovs_vsctl("--no-wait", "del-port", OBR, "gre-h2")
    repaired(lambda: "gre-h2" in ports(host), "the port to be back")
    all_reach_all(lab)


# --- the mesh changes


def test_peer_leaves_and_comes_back(lab: Lab) -> None:
    host = lab.host(1)
    before = routes(host), ports(host), flows(host)
    lab.write_mesh([lab.host(1).node, lab.host(2).node])
    repaired(
        lambda: not any(":3:" in r or ".3." in r for r in routes(host)) and "gre-h3" not in ports(host),
        "h3's route and port to go",
    )
    sent = lab.pod(1, 1).run(["ping", "-n", "-c1", "-W1", str(lab.pod(3, 1).addresses[0])], check=False)
    assert "Unreachable" in sent.stdout, f"packets to a peer that left may have gone elsewhere: {sent.stdout}"
    lab.write_mesh()
    repaired(lambda: (routes(host), ports(host), flows(host)) == before, "h3's route, port and flows to be back")
    lab.converged(REPAIR)
    all_reach_all(lab)


def test_what_this_kernel_lacks_is_named_and_no_obstacle(lab: Lab) -> None:
    status = lab.host(1).ovsmesh("status", "-o", "json", timeout=60)
    assert status.returncode == 0, status.stdout + status.stderr
    assert "nft" in status.stdout, status.stdout
    plan = lab.host(1).ovsmesh("plan", timeout=60)
    assert plan.returncode == 0, plan.stdout + plan.stderr


# --- the end


def test_cleanup_leaves_nothing(lab: Lab) -> None:
    for host in lab.hosts:
        host.stop_agent()
    all_reach_all(lab)
    host = lab.host(1)
    done = host.ovsmesh("cleanup", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert host.ovs_vsctl("list-br").strip() == ""
    links = {link["ifname"] for link in json.loads(ip(host, "-j", "link"))}
    assert not links & {KBR, OBR}
    assert f"proto {PROTOCOL}" not in ip(host, "route", "show", "table", "all") + ip(
        host, "-6", "route", "show", "table", "all"
    )
    assert "10.97." not in ip(host, "neigh", "show", "nud", "all")
    assert "ovsmesh" not in host.run(["iptables-save"]).stdout
    assert str(ip_address(host.address)) in ip(host, "addr", "show", "eth0"), "the host's own address stays"


def test_the_recipe_alone_joins_this_host_again(lab: Lab) -> None:
    host = lab.host(1)
    printed = host.ovsmesh("bootstrap", "--print", timeout=60)
    assert printed.returncode == 0, printed.stderr
    host.run(["sh", "-s"], timeout=60, text=printed.stdout)
    host.plug()
    plan = host.ovsmesh("plan", timeout=60)
    assert (plan.returncode, plan.stdout) == (0, "nothing to change\n"), plan.stdout + plan.stderr
    all_reach_all(lab)


def test_the_lab_leaves_nothing(lab: Lab) -> None:
    proof = lab.down()
    assert proof.ok, str(proof)
